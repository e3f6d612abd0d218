// What the page knows: the runs, and what the reader looks at.

const state = {
  runs: [], // as in a snapshot; every layer has `rows`, by signal and kept step
  steps: [], // the training steps of all runs, in order
  step: 0, // the training step that is looked at
  time: null, // the time step that is looked at
  signal: "h",
  relative: false, // to the end of the sequence
};

/** A row of float32 from its packed form. */
function unpack(text) {
  if (text === null) return null;
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

const labelOf = (layer) =>
  layer.direction === "reverse" && !layer.name.includes("reverse") ? `${layer.name} reverse` : layer.name;

/** Takes new data in, with rows that the page has already; false when it lacks some of those. */
function adopt(runs) {
  const before = new Map(state.runs.map((run) => [run.name, run]));
  for (const run of runs) {
    const old = before.get(run.name);
    const places = new Map(old ? old.steps.map((step, i) => [step, i]) : []);
    const had = run.steps.slice(0, run.have);
    if (!had.every((step) => places.has(step))) return false;
    for (const layer of run.layers) {
      layer.run = run;
      layer.label = labelOf(layer);
      const same = old && old.layers.find((other) => other.label === layer.label);
      layer.rows = {};
      for (const [kind, prefix] of [
        ["signals", ""],
        ["saturation", "gate "],
      ]) {
        for (const [name, rows] of Object.entries(layer[kind])) {
          const earlier = same && same.rows[prefix + name];
          layer.rows[prefix + name] = [
            ...had.map((step) => (earlier ? earlier[places.get(step)] : null)),
            ...rows.map(unpack),
          ];
        }
        delete layer[kind];
      }
      layer.full = runs.length > 1 ? `${run.name} · ${layer.label}` : layer.label;
    }
    if (!adoptSpectra(run, old)) return false;
  }
  const latest = state.steps.length === 0 || state.step === state.steps.at(-1);
  state.runs = runs;
  state.steps = [...new Set(runs.flatMap((run) => run.steps))].sort((a, b) => a - b);
  // Whoever looks at the newest step goes on doing so.
  if (latest && state.steps.length) state.step = state.steps.at(-1);
  if (!signals().includes(state.signal) && signals().length) state.signal = signals()[0];
  return true;
}

/** The spectra of a run, with those that the page has already; false when it lacks some of these. */
function adoptSpectra(run, old) {
  for (const record of run.spectra) {
    const parts = unpack(record.eigenvalues);
    record.eigenvalues = Array.from({ length: parts.length / 2 }, (_, i) => [parts[2 * i], parts[2 * i + 1]]);
    record.singular_values = [...unpack(record.singular_values)];
  }
  const sent = new Set(run.spectra.map((record) => record.step));
  const kept = (old?.spectra || []).filter(
    (record) => !sent.has(record.step) && run.spectrum_steps.includes(record.step),
  );
  run.spectra = [...kept, ...run.spectra];
  return run.spectrum_steps.every((step) => run.spectra.some((record) => record.step === step));
}

const layers = () => state.runs.flatMap((run) => run.layers);

/** Every signal that some layer has, states first. */
const signals = () => {
  const order = (name) => (name.startsWith("gate ") ? 2 : name === "x" ? 1 : 0);
  return [...new Set(layers().flatMap((layer) => Object.keys(layer.rows)))].sort((a, b) => order(a) - order(b));
};

const isShare = (signal) => signal.startsWith("gate ");

const signalName = (signal) => (isShare(signal) ? `saturated units, ${signal}` : `‖∂L/∂${signal}ₜ‖`);

/** The signal that is shown of a layer: one of torch's own has the gradient of its input and no other. */
function signalOf(layer) {
  if (state.signal in layer.rows) return state.signal;
  return layer.kind === "input" && "x" in layer.rows && !isShare(state.signal) ? "x" : null;
}

/** The index of the last kept step of a run that is not after `step`, or -1. */
function indexAt(run, step) {
  let [low, high] = [0, run.steps.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (run.steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** How many steps of the recurrence lie between time step t and the last one that it ran. */
const stepsBack = (layer, t, length) => (layer.direction === "reverse" ? t : length - 1 - t);

/** The time step at which the gradient comes in: the last that the recurrence ran, or that the loss reaches; -1 if there is none. */
function entry(layer, row) {
  return layer.direction === "reverse"
    ? row.findIndex((value) => !Number.isNaN(value))
    : row.findLastIndex((value) => !Number.isNaN(value));
}

/** What a row is relative to: its value where the gradient comes in, if that is wanted. */
const reference = (layer, signal, row) => (state.relative && !isShare(signal) ? (row[entry(layer, row)] ?? 0) : 0);

/** The row of a layer's signal at the i-th kept step as it is to be shown, NaN where there is nothing. */
function shown(layer, signal, i) {
  const rows = layer.rows[signal] || [];
  // Saturation changes slowly and is measured at some steps only: it is taken to stay until it is measured again.
  if (isShare(signal)) while (i >= 0 && !rows[i]) i -= 1;
  const row = rows[i];
  if (!row) return null;
  const zero = reference(layer, signal, row);
  return zero === 0 ? row : row.map((value) => value - zero);
}

const format = (signal, value) => (isShare(signal) ? percent(value) : norm(value));
