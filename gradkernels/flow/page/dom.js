// Makers of elements, so that the rest of the page reads as what it shows.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element: make("p", {class: "note"}, "text", child). Attributes that are null or false are left out, "on..." are listeners. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

/** A table with a caption: the first row is its head, the first cell of every other row names the row. */
function table(caption, [head, ...rows]) {
  const cells = (row) => row.map((cell, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, cell));
  return make(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    make(
      "table",
      {},
      make("caption", {}, caption),
      make(
        "thead",
        {},
        make(
          "tr",
          {},
          head.map((cell) => make("th", { scope: "col" }, cell)),
        ),
      ),
      make(
        "tbody",
        {},
        rows.map((row) => make("tr", {}, cells(row))),
      ),
    ),
  );
}

/** Something to choose from: a labelled select. `choices` are [value, text]. */
function choice(label, choices, value, onchange) {
  const options = choices.map(([v, text]) => make("option", { value: v, selected: v === value }, text));
  const select = make("select", { onchange: () => onchange(select.value) }, options);
  return make("label", { class: "control" }, make("span", {}, label), select);
}

/** A labelled slider, whose value is shown as `format` has it; `fit(max, value)` changes where it ends and stands. */
function slider(label, { min, max, step, value, format = String }, onchange) {
  const shown = make("output");
  const input = make("input", { type: "range", min, max, step, value, "aria-label": label });
  const say = () => {
    shown.textContent = format(+input.value);
    input.setAttribute("aria-valuetext", shown.textContent);
  };
  input.addEventListener("input", () => {
    say();
    onchange(+input.value);
  });
  say();
  const element = make("label", { class: "control wide" }, make("span", {}, label), input, shown);
  element.fit = (most, now) => {
    Object.assign(input, { max: most, value: now, disabled: most <= +input.min });
    say();
  };
  return element;
}

const painted = new Set(); // [element, its width, what paints it]

/** Calls `paint()` now and whenever the element gets another width. */
function onWidth(element, paint) {
  const one = { element, width: 0, paint };
  painted.add(one);
  // in the next frame: painting may change sizes, which an observer may not do while it reports them
  new ResizeObserver(() => requestAnimationFrame(() => fit(one))).observe(element);
}

function fit(one) {
  const width = Math.floor(one.element.clientWidth);
  if (!width || width === one.width) return;
  one.width = width;
  one.paint();
}

/** Everything as wide as it is now, at once: a printer does not wait until the browser says that widths have changed. */
function fitAll() {
  for (const one of painted) {
    if (one.element.isConnected) fit(one);
    else painted.delete(one);
  }
}

for (const [event, printed] of [
  ["beforeprint", true],
  ["afterprint", false],
]) {
  window.addEventListener(event, () => {
    document.documentElement.classList.toggle("printed", printed);
    fitAll();
  });
}
