// Architectures compared: what gk.flow.compare measured, over lengths of sequences.

function comparison(found) {
  if (!found) return { element: make("div", {}), update: () => {}, mark: () => {} };
  const looked = { length: found.lengths.at(-1), signal: found.signal };
  const run = (model, length = looked.length) => model.runs.find((one) => one.length === length);
  /** [steps back, ...values] from the last step on. */
  const back = (...rows) => rows[0].map((_, k) => [k, ...rows.map((row) => row[row.length - 1 - k])]);
  const hueOf = new Map(found.models.map((model, i) => [model.name, i]));

  const curves = lineFigure(
    "The gradient on its way back",
    () => ({
      label: `${signalName(looked.signal)} of every model over ${looked.length} steps, by steps back from the end`,
      x: { label: "steps back from the end of the sequence", whole: true, format: String },
      y: { label: signalName(looked.signal), decades: true },
      series: [
        ...found.models.flatMap((model, hue) => {
          const rows = run(model)?.signals[looked.signal];
          return rows ? [{ name: model.name, hue, points: back(rows.log10), band: back(rows.low, rows.high) }] : [];
        }),
        ...found.lines
          .filter((line) => line.length === looked.length && line.signal === looked.signal)
          .map((line) => ({
            name: line.name,
            hue: hueOf.get(line.model) ?? 7,
            points: back(line.log10),
            dashed: true,
          })),
      ],
    }),
    320,
  );
  const ratios = lineFigure(
    "What arrives at the first step, by length",
    () => ({
      x: { label: "length of the sequence", whole: true, format: String },
      y: { label: "first step / last step", decades: true },
      series: found.models.map((model, hue) => ({
        name: model.name,
        hue,
        points: model.runs.map((one) => [one.length, one.ratio]),
      })),
      cursor: looked.length,
    }),
    320,
  );
  const arrived = (one) => (isNumber(one?.ratio) ? norm(one.ratio) : "0");
  const summary = table(
    "Gradient at the first step relative to the last, and the memory horizon at the greatest length",
    [
      ["model", ...found.lengths.map((length) => `T = ${length}`), "horizon"],
      ...found.models.map((model) => [
        model.name,
        ...found.lengths.map((length) => arrived(run(model, length))),
        String(run(model, found.lengths.at(-1))?.horizon ?? "none"),
      ]),
    ],
  );

  function update() {
    curves.update();
    ratios.update();
  }
  const change = (name, as) => (value) => {
    looked[name] = as(value);
    update();
  };
  const names = [...new Set(found.models.flatMap((model) => model.runs.flatMap((one) => Object.keys(one.signals))))];
  const controls = make(
    "div",
    { class: "controls" },
    choice(
      "length",
      found.lengths.map((length) => [length, String(length)]),
      looked.length,
      change("length", Number),
    ),
    choice(
      "signal",
      names.map((name) => [name, signalName(name)]),
      looked.signal,
      change("signal", String),
    ),
  );
  const settings = Object.entries(found.settings || {}).map(([name, value]) => `${name} ${value}`);
  const element = make(
    "div",
    {},
    make("p", { class: "note" }, [found.title, ...settings].join(", ")),
    controls,
    make("div", { class: "panels" }, curves.element, ratios.element),
    summary,
    make(
      "p",
      { class: "note" },
      "Curves are medians over seeds, bands reach from the least to the greatest; dashed lines are theory.",
    ),
  );
  return { element, update, mark: () => {} };
}
