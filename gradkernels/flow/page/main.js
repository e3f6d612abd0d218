// Puts the parts into the page, and keeps it up to date where a server says more.

const given = JSON.parse(byId("data").textContent);

const VIEWS = {
  overview: [overview(), () => true],
  heatmaps: [heatmaps(), () => layers().length],
  profiles: [profiles(), () => layers().length],
  reach: [reaching(), () => layers().some((layer) => layer.horizon?.some(isNumber))],
  blocks: [blocks(), () => state.runs.some((run) => run.blocks?.length)],
  parameters: [parameters(), () => state.runs.some((run) => run.parameters?.length)],
  spectra: [spectra(), () => state.runs.some((run) => run.spectra?.length)],
  comparison: [comparison(given.comparison), () => given.comparison],
  alerts: [alerts(), () => true],
};

// ------ what the reader looks at

const bar = { signal: byId("signal"), relative: byId("relative"), step: byId("step"), shown: byId("step-shown") };

/** Look at another training step, and time step. */
function look(step, time = state.time) {
  [state.step, state.time] = [step, time];
  showStep();
  for (const [view] of Object.values(VIEWS)) view.mark();
}

function showStep() {
  bar.step.max = Math.max(0, state.steps.length - 1);
  bar.step.value = Math.max(0, indexAt(state, state.step));
  bar.step.disabled = state.steps.length < 2;
  bar.shown.textContent = state.steps.length ? String(state.step) : "none";
  bar.step.setAttribute("aria-valuetext", bar.shown.textContent);
}

/** There is new data, or another signal to look at. */
function changed() {
  const names = signals();
  if (names.join() !== bar.signal.dataset.names) {
    bar.signal.dataset.names = names.join();
    bar.signal.replaceChildren(...names.map((name) => make("option", { value: name }, signalName(name))));
  }
  bar.signal.value = state.signal;
  bar.relative.disabled = isShare(state.signal);
  showStep();
  for (const [id, [view, has]] of Object.entries(VIEWS)) {
    const section = byId(id);
    const there = Boolean(has());
    section.classList.toggle("absent", !there);
    if (there) view.update();
  }
  describe();
}

function describe() {
  const models = [...new Set(state.runs.map((run) => run.model))].join(", ");
  const [run] = state.runs;
  byId("model").textContent = models;
  document.title = `Gradient flow of ${models}`;
  const thinned = state.runs.some((r) => r.recorded > r.steps.length);
  const versions = Object.entries(run.versions || {}).map(([name, version]) => `${name} ${version}`);
  const counts = state.runs.map(
    (r) =>
      `${state.runs.length > 1 ? `${r.name}: ` : ""}training step ${r.step}${thinned ? `, ${r.steps.length} of ${r.recorded} recorded steps shown` : `, ${r.steps.length} recorded`}`,
  );
  byId("about").textContent = [...counts, ...versions].join(" · ");
}

bar.signal.addEventListener("change", () => {
  state.signal = bar.signal.value;
  changed();
});
bar.relative.addEventListener("change", () => {
  state.relative = bar.relative.checked;
  changed();
});
bar.step.addEventListener("input", () => look(state.steps[+bar.step.value]));

// ------ light and dark

const theme = byId("theme");
const system = matchMedia("(prefers-color-scheme: dark)");

/** What was chosen before; pages from disk may be denied a memory. */
function remembered(value) {
  try {
    if (value !== undefined) localStorage.setItem("gradient-flow-theme", value);
    return localStorage.getItem("gradient-flow-theme");
  } catch {
    return null;
  }
}

function dress(name) {
  document.documentElement.dataset.theme = name;
  theme.textContent = name === "dark" ? "Light" : "Dark";
  theme.setAttribute("aria-label", `${theme.textContent} theme`);
}
theme.addEventListener("click", () => {
  const name = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  remembered(name);
  dress(name);
});
system.addEventListener("change", () => remembered() ?? dress(system.matches ? "dark" : "light"));
dress(remembered() ?? (system.matches ? "dark" : "light"));

// ------ a run that goes on

const status = byId("status");

function say(kind, text) {
  status.dataset.kind = kind;
  status.textContent = text;
}

/** What has come since the page was last told, null if nothing has; throws an error that says why there is no answer. */
async function more(query) {
  let answer;
  try {
    answer = await fetch(`data?${new URLSearchParams(query)}`, { cache: "no-store" });
  } catch {
    throw new Error("no answer");
  }
  if (answer.status === 403) throw new Error("another run has this address now");
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.status === 200 ? answer.json() : null;
}

/** Asks for more once a second, less often while nobody answers, and never twice at a time. */
async function follow({ milliseconds }) {
  const token = new URLSearchParams(location.search).get("token");
  byId("save").href = `report.html?${new URLSearchParams({ token })}`;
  byId("save").hidden = false;
  const has = (run) => [run.name, [run.steps.at(-1) ?? -1, run.spectrum_steps.at(-1) ?? -1]];
  let wait = milliseconds;
  let whole = false; // a part is missing here: everything is asked for
  say("live", "live");
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, wait));
    let found = null;
    try {
      found = await more({ token, seen: JSON.stringify(whole ? {} : Object.fromEntries(state.runs.map(has))) });
    } catch (error) {
      wait = Math.min(2 * wait, 10 * milliseconds);
      say("lost", `${error.message}; asking again every ${short(wait / 1000)} s`);
      continue;
    }
    wait = milliseconds;
    say("live", found ? "live" : "live, no new step");
    if (!found) continue;
    whole = !adopt(found.runs);
    if (!whole) changed();
  }
}

// ------ beginning

for (const [id, [view]] of Object.entries(VIEWS)) byId(id).querySelector(".view").append(view.element);
adopt(given.runs);
lessons();
changed();
if (given.live) follow(given.live);
document.documentElement.dataset.ready = "";
