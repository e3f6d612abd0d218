// Norms per time step and training step of a layer as a picture, with a cursor for mouse and keyboard.

const DECADES = 12; // Colours tell so many apart; what is smaller looks all the same.

/** What colours stand for: the same for all layers, so that they can be compared. */
function colourDomain() {
  if (isShare(state.signal)) return [0, 1];
  let [low, high] = [Infinity, -Infinity];
  for (const layer of layers()) {
    const signal = signalOf(layer);
    if (signal === null) continue;
    layer.rows[signal].forEach((_, i) => {
      const found = extent(shown(layer, signal, i) || []);
      if (found) [low, high] = [Math.min(low, found[0]), Math.max(high, found[1])];
    });
  }
  if (!(low <= high)) return [-DECADES, 0];
  high = Math.ceil(high);
  return [Math.min(high - 1, Math.max(Math.floor(low), high - DECADES)), high];
}

/** The legend of the colours. */
function colourKey() {
  const canvas = make("canvas", { width: 256, height: 1, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const strip = context.createImageData(256, 1);
  new Uint32Array(strip.data.buffer).set(COLOURS);
  context.putImageData(strip, 0, 0);
  const [low, high] = [make("span"), make("span")];
  const element = make(
    "div",
    { class: "colours" },
    low,
    canvas,
    high,
    make("span", { class: "nothing" }),
    make("span", {}, "no gradient, or not measured"),
  );
  const update = (domain) => {
    const share = isShare(state.signal);
    low.textContent = share ? "0 %" : `≤ ${powerOfTen(domain[0])}`;
    high.textContent = share ? "100 %" : powerOfTen(domain[1]);
  };
  return { element, update };
}

/** The panel of a layer; `find()` gives the layer, which is another object after every update. */
function heatmap(find) {
  const canvas = make("canvas", { "aria-hidden": "true" });
  const overlay = draw("svg", { "aria-hidden": "true" });
  const plot = make(
    "div",
    { class: "plot map", tabindex: 0, role: "application", "aria-roledescription": "heatmap" },
    canvas,
    overlay,
  );
  const readout = make("output", { class: "readout", "aria-live": "polite" });
  const note = make("span", { class: "note" });
  const heading = make("span");
  const values = make("details", {}, make("summary", {}, "Values as a table"));
  const element = make("figure", { class: "panel" }, make("figcaption", {}, heading, note), plot, readout, values);
  let frame = null;

  const length = (layer, signal) => Math.max(1, ...layer.rows[signal].map((row) => (row ? row.length : 0)));

  function paint(domain) {
    const layer = find();
    const signal = signalOf(layer);
    heading.textContent = `${layer.full} `;
    note.textContent = [
      layer.cell,
      signal === "x" && state.signal !== "x" ? "torch's own layer: gradient of its input" : null,
    ]
      .filter(Boolean)
      .join(", ");
    element.dataset.layer = layer.full;
    element.dataset.signal = signal ?? "";
    plot.setAttribute(
      "aria-label",
      `${signal ? signalName(signal) : "nothing"} of ${layer.full} by training step and time step; arrow keys move the cursor`,
    );
    const width = Math.floor(plot.clientWidth);
    if (!width) return;
    const steps = layer.run.steps;
    if (signal === null || !steps.length) {
      frame = null;
      canvas.width = canvas.height = 0;
      overlay.replaceChildren();
      overlay.setAttribute("height", 0);
      readout.textContent =
        signal === null
          ? `${signalName(state.signal)} is not measured for this layer.`
          : "Nothing has been measured yet.";
      return;
    }
    const T = length(layer, signal);
    const gap = steps.length > 1 ? (steps.at(-1) - steps[0]) / (steps.length - 1) : 1;
    const height = 260;
    frame = axes(
      width,
      height,
      { label: "training step", domain: [steps[0], steps.at(-1) + gap], whole: true, format: String },
      { label: "time step t", domain: [0, T], whole: true, format: String },
    );
    frame.width = Math.max(1, frame.right - frame.left);
    frame.height = frame.bottom - frame.top;
    frame.gap = gap;
    frame.T = T;
    fillPixels(layer, signal, T, domain);
    overlay.setAttribute("width", width);
    overlay.setAttribute("height", height);
    frame.marks = draw("g", { class: "marks" });
    overlay.replaceChildren(frame.group, reach(layer, signal), frame.marks);
    mark();
  }

  /** Every pixel has the value of the last step kept before it: steps are as wide as the time until the next. */
  function fillPixels(layer, signal, T, domain) {
    const ratio = Math.min(2, window.devicePixelRatio || 1);
    const [w, h] = [Math.round(frame.width * ratio), Math.round(frame.height * ratio)];
    [canvas.width, canvas.height] = [w, h];
    Object.assign(canvas.style, {
      left: `${frame.left}px`,
      top: `${frame.top}px`,
      width: `${frame.width}px`,
      height: `${frame.height}px`,
    });
    const context = canvas.getContext("2d");
    const image = context.createImageData(w, h);
    const pixels = new Uint32Array(image.data.buffer);
    const toStep = linear([0, w], [layer.run.steps[0], layer.run.steps.at(-1) + frame.gap]);
    let [last, row] = [-1, null];
    for (let px = 0; px < w; px += 1) {
      const i = indexAt(layer.run, toStep(px + 0.5));
      if (i !== last) [last, row] = [i, shown(layer, signal, i)];
      for (let py = 0; py < h; py += 1) {
        const t = Math.floor(((h - 1 - py + 0.5) / h) * T);
        if (row && t >= row.length) continue; // this sequence was shorter
        const value = row ? row[t] : NaN;
        pixels[py * w + px] = Number.isNaN(value) ? STRIPES[((px + py) >> 3) & 1] : colour(value, domain);
      }
    }
    context.putImageData(image, 0, 0);
  }

  /** The line down to which the gradient reaches. */
  function reach(layer, signal) {
    const line = draw("path", { class: "reach" });
    if (signal !== "h" || !layer.horizon) return line;
    const points = [];
    layer.horizon.forEach((k, i) => {
      const row = layer.rows.h[i];
      const t =
        row && isNumber(k) ? (layer.direction === "reverse" ? entry(layer, row) + k + 1 : entry(layer, row) - k) : null;
      const step = layer.run.steps[i];
      points.push([step, t], [layer.run.steps[i + 1] ?? step + frame.gap, t]);
    });
    line.setAttribute("d", path(points, frame.toX, frame.toY));
    return line;
  }

  function mark() {
    if (!frame) return;
    const layer = find();
    const i = indexAt(layer.run, state.step);
    frame.marks.replaceChildren();
    if (i >= 0) {
      const x = frame.toX(layer.run.steps[i]);
      const next = frame.toX(layer.run.steps[i + 1] ?? layer.run.steps[i] + frame.gap);
      frame.marks.append(
        draw("rect", { x, width: Math.max(1, next - x), y: frame.top, height: frame.height, class: "column" }),
      );
    }
    if (state.time !== null && state.time < frame.T) {
      const y = frame.toY(state.time + 1);
      frame.marks.append(
        draw("rect", {
          x: frame.left,
          width: frame.width,
          y,
          height: Math.max(1, frame.toY(state.time) - y),
          class: "column",
        }),
      );
    }
    say(i, state.time);
    if (values.open) list();
  }

  /** Says what is at a place, in words and for whoever reads the page by program. */
  function say(i, time) {
    const layer = find();
    const signal = signalOf(layer);
    const row = i >= 0 ? shown(layer, signal, i) : null;
    const t = time ?? (row ? (layer.direction === "reverse" ? row.length - 1 : 0) : null);
    const value = row && t < row.length ? row[t] : NaN;
    const data = { step: layer.run.steps[i] ?? "", time: t ?? "", value: Number.isNaN(value) ? "" : value };
    Object.assign(readout.dataset, data);
    const what = Number.isNaN(value) ? "none" : format(signal, value);
    const relative = state.relative && !isShare(signal) ? " of that at the end" : "";
    readout.textContent = `step ${data.step}, t = ${data.time}: ${signalName(signal)} = ${what}${relative}`;
  }

  function list() {
    const layer = find();
    const signal = signalOf(layer);
    const i = indexAt(layer.run, state.step);
    const row = signal !== null && i >= 0 ? shown(layer, signal, i) : null;
    const rows = row ? Array.from(row, (value, t) => [String(t), format(signal, value)]) : [];
    const caption = `${layer.full}, training step ${layer.run.steps[i] ?? "none"}`;
    const from = values.lastChild.scrollTop;
    values.replaceChildren(
      values.firstChild,
      table(caption, [["t", signal === null ? "" : signalName(signal)], ...rows]),
    );
    values.lastChild.scrollTop = from;
  }
  values.addEventListener("toggle", () => values.open && list());

  function place(event) {
    const box = plot.getBoundingClientRect();
    const layer = find();
    const steps = layer.run.steps;
    const toStep = linear([frame.left, frame.right], [steps[0], steps.at(-1) + frame.gap]);
    const time = Math.floor(linear([frame.bottom, frame.top], [0, frame.T])(event.clientY - box.top));
    const i = Math.max(0, indexAt(layer.run, toStep(event.clientX - box.left)));
    return [i, Math.max(0, Math.min(frame.T - 1, time))];
  }
  plot.addEventListener("pointermove", (event) => frame && say(...place(event)));
  plot.addEventListener("pointerleave", () => frame && mark());
  plot.addEventListener("pointerdown", (event) => {
    if (!frame) return;
    const [i, time] = place(event);
    look(find().run.steps[i], time);
  });
  plot.addEventListener("keydown", (event) => {
    if (!frame || event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = find().run.steps;
    const i = Math.max(0, indexAt(find().run, state.step));
    const far = event.shiftKey ? 10 : 1;
    const sideways = { ArrowLeft: i - far, ArrowRight: i + far, Home: 0, End: steps.length - 1 }[event.key];
    const upwards = { ArrowUp: far, ArrowDown: -far, PageUp: 10, PageDown: -10 }[event.key];
    if (sideways === undefined && upwards === undefined) return;
    event.preventDefault();
    const time = upwards === undefined ? state.time : Math.max(0, Math.min(frame.T - 1, (state.time ?? 0) + upwards));
    look(sideways === undefined ? state.step : steps[Math.max(0, Math.min(steps.length - 1, sideways))], time);
  });

  return { element, plot, paint, mark };
}
