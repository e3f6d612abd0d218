// The parts of the page that follow the runs: each has an element, update() for new data and mark() for another step looked at.

/** Numbers of every layer at the step that is looked at. */
function overview() {
  const element = make("div", {});
  function mark() {
    const rows = layers().map((layer) => {
      const i = indexAt(layer.run, state.step);
      const signal = "h" in layer.rows ? "h" : "x";
      const row = layer.rows[signal]?.[i];
      const T = row ? row.length : null;
      const horizon = layer.horizon?.[i];
      const decay = layer.decay?.[i];
      const ends = row ? extent(row) : null;
      return [
        layer.full,
        layer.cell || "torch",
        isNumber(horizon) && T ? `${horizon} of ${T - 1} steps` : "none",
        isNumber(decay) ? `× ${short(10 ** -decay)} a step` : "not to be seen",
        ends ? `${norm(ends[0])} … ${norm(ends[1])}` : "none",
      ];
    });
    const head = ["layer", "cell", "memory horizon", "gradient, going back", "smallest … largest norm"];
    element.replaceChildren(
      rows.length
        ? table(`At training step ${state.step}`, [head, ...rows])
        : make("p", { class: "empty" }, "No recurrent layer is watched."),
      ...state.runs
        .filter((run) => run.nonfinite)
        .map((run) =>
          make(
            "p",
            { class: "warning" },
            `First NaN or Inf: layer ${run.nonfinite.layer}, training step ${run.nonfinite.step}, time step ${run.nonfinite.time_step ?? "unknown"}.`,
          ),
        ),
      ...state.runs
        .filter((run) => isNumber(run.clip_rate))
        .map((run) =>
          make(
            "p",
            { class: "note" },
            `Gradients were clipped in ${percent(run.clip_rate)} of the steps${state.runs.length > 1 ? ` of ${run.name}` : ""}.`,
          ),
        ),
    );
  }
  return { element, update: mark, mark };
}

/** A heatmap for every layer. */
function heatmaps() {
  const key = colourKey();
  const grid = make("div", { class: "panels" });
  let panels = [];
  let known = "";
  let domain = [-1, 0];
  function update() {
    const names = JSON.stringify(layers().map((layer) => layer.full));
    if (names !== known) {
      known = names;
      panels = layers().map((layer) => heatmap(() => layers().find((l) => l.full === layer.full)));
      grid.replaceChildren(...panels.map((panel) => panel.element));
      for (const panel of panels) onWidth(panel.plot, () => panel.paint(domain));
    }
    domain = colourDomain();
    key.update(domain);
    for (const panel of panels) panel.paint(domain);
  }
  const element = make("div", {}, key.element, grid);
  return { element, update, mark: () => panels.forEach((panel) => panel.mark()) };
}

/** How a layer is drawn, in every chart the same. */
const styleOf = (layer) => ({ hue: layers().indexOf(layer), dashed: layer.direction === "reverse" });

/** All layers at one training step, by how far back in time. */
function profiles() {
  const chart = lineFigure(
    "The gradient on its way back, at the training step looked at",
    () => {
      const series = layers().map((layer) => {
        const signal = signalOf(layer);
        const row = signal === null ? null : shown(layer, signal, indexAt(layer.run, state.step));
        const points = row ? Array.from(row, (value, t) => [stepsBack(layer, t, row.length), value]) : [];
        return { name: layer.full, points: points.sort((a, b) => a[0] - b[0]), ...styleOf(layer) };
      });
      const share = isShare(state.signal);
      return {
        label: `${signalName(state.signal)} of every layer at training step ${state.step}, by steps back from the end`,
        x: { label: "steps back from the end of the sequence", whole: true, format: String },
        y: {
          label: signalName(state.signal) + (state.relative && !share ? ", relative" : ""),
          decades: !share,
          domain: share ? [0, 1] : null,
        },
        series,
      };
    },
    300,
  );
  return { element: chart.element, update: chart.update, mark: chart.update };
}

/** A chart over training with a line per entry: `pick(run)` gives [name, values]. `joined`: a line passes over steps that were not measured. */
function overTraining(title, y, pick, joined = false) {
  const chart = lineFigure(title, () => ({
    x: { label: "training step", domain: extent(state.steps), whole: true, format: String },
    y,
    series: state.runs.flatMap((run) =>
      pick(run).map(([name, values, more]) => {
        const points = values.map((value, i) => [run.steps[i], value]);
        return { name, points: joined ? points.filter(([, value]) => isNumber(value)) : points, ...more };
      }),
    ),
    cursor: state.step,
  }));
  return { element: chart.element, update: chart.update, mark: chart.update };
}

const log10OrNull = (value) => (isNumber(value) && value > 0 ? Math.log10(value) : null);

/** Views one after the other, behaving as one. */
function together(...views) {
  return {
    element: make(
      "div",
      { class: "panels" },
      views.map((view) => view.element),
    ),
    update: () => views.forEach((view) => view.update()),
    mark: () => views.forEach((view) => view.mark()),
  };
}

const reaching = () =>
  together(
    overTraining(
      "Memory horizon: how many steps back the gradient keeps a thousandth of its norm",
      { label: "steps", whole: true, format: String },
      (run) => run.layers.map((layer) => [layer.full, layer.horizon || [], styleOf(layer)]),
    ),
    overTraining(
      "Decay: powers of ten that the gradient loses with every step back; below 0 it grows",
      { label: "decades a step" },
      (run) => run.layers.map((layer) => [layer.full, layer.decay || [], styleOf(layer)]),
    ),
  );

function blocks() {
  const named = (run, block) => (state.runs.length > 1 ? `${run.name} · ${block.name}` : block.name);
  const both = (run) =>
    (run.blocks || []).flatMap((block, hue) => [
      [`${named(run, block)}, entrance`, block.entrance, { hue }],
      [`${named(run, block)}, exit`, block.exit, { hue, dashed: true }],
    ]);
  return together(
    overTraining(
      "Norm of the gradient at the entrance and the exit of every block",
      { label: "‖∂L/∂x‖", decades: true },
      both,
    ),
    overTraining("Share of the gradient that took the residual path", { label: "share", format: percent }, (run) =>
      (run.blocks || []).map((block, hue) => [named(run, block), block.residual_share, { hue }]),
    ),
  );
}

function parameters() {
  const full = (run, group) => (state.runs.length > 1 ? `${run.name} · ${group.name}` : group.name);
  const lines = (field) => (run) =>
    (run.parameters || []).map((group) => [full(run, group), (group[field] || []).map(log10OrNull)]);
  return together(
    overTraining("Norm of the gradient by parameters", { label: "‖∂L/∂W‖", decades: true }, lines("grad"), true),
    overTraining(
      "Size of an update relative to the weights",
      { label: "‖ΔW‖ / ‖W‖", decades: true },
      lines("update_ratio"),
      true,
    ),
  );
}
