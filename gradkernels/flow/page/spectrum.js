// Eigenvalues of the recurrent matrices in the complex plane, with a slider over training.

function spectra() {
  const looked = { block: null, at: null }; // of which matrix, at which of its records; null: the last one
  const controls = make("div", { class: "controls" });
  const plot = make("div", { class: "plot" });
  const numbers = make("output", { class: "readout", "aria-live": "polite" });
  const plane = make(
    "figure",
    {},
    make("figcaption", {}, "Eigenvalues in the complex plane, with the unit circle"),
    plot,
    numbers,
  );
  const radii = lineFigure("Spectral radius and spectral norm over training", () => ({
    x: { label: "training step", whole: true, format: String },
    y: { label: "size" },
    series: [
      { name: "spectral norm", points: records().map((r) => [r.step, r.norm]), dashed: true, hue: 1 },
      { name: "spectral radius", points: records().map((r) => [r.step, r.radius]), hue: 0 },
    ],
    cursor: current()?.step,
  }));
  const singular = lineFigure("Singular values", () => ({
    x: { label: "rank", whole: true, format: String },
    y: { label: "singular value" },
    series: [{ name: "singular values", points: (current()?.singular_values || []).map((value, i) => [i + 1, value]) }],
  }));
  const element = make(
    "div",
    {},
    controls,
    make("div", { class: "panels" }, plane, make("div", {}, radii.element, singular.element)),
  );

  const full = (run, name) => (state.runs.length > 1 ? `${run.name} · ${name}` : name);
  const all = () =>
    state.runs.flatMap((run) => (run.spectra || []).map((record) => ({ ...record, block: full(run, record.name) })));
  const names = () => [...new Set(all().map((record) => record.block))];
  const records = () =>
    all()
      .filter((record) => record.block === looked.block)
      .sort((a, b) => a.step - b.step);
  const current = () => {
    const found = records();
    return found[Math.min(looked.at ?? Infinity, found.length - 1)];
  };

  const over = slider(
    "training step of the spectrum",
    { min: 0, max: 0, step: 1, value: 0, format: (i) => String(records()[i]?.step ?? "none") },
    (i) => {
      looked.at = i === records().length - 1 ? null : i;
      paint();
    },
  );
  let offered = "";
  function control() {
    const last = records().length - 1;
    over.fit(last, Math.min(looked.at ?? last, last));
    if (JSON.stringify(names()) === offered) return; // what somebody is about to choose from stays
    offered = JSON.stringify(names());
    const choose = (name) => {
      looked.block = name;
      looked.at = null;
      update();
    };
    controls.replaceChildren(
      choice(
        "matrix",
        names().map((name) => [name, name]),
        looked.block,
        choose,
      ),
      over,
    );
  }

  /** The unit circle and the eigenvalues, before them those of the record before. */
  function paint() {
    const found = records();
    const record = current();
    const size = Math.min(plot.clientWidth, 520);
    if (!record || !size) return;
    const before = found[found.indexOf(record) - 1];
    const far = Math.max(1.15, ...found.map((r) => (isNumber(r.radius) ? r.radius * 1.1 : 0)));
    const margin = { left: 48, right: 8, top: 8, bottom: 40 };
    const frame = axes(
      size,
      size - 8,
      { label: "real", domain: [-far, far] },
      { label: "imaginary", domain: [-far, far] },
      margin,
    );
    const at = ([re, im]) => ({ cx: frame.toX(re).toFixed(2), cy: frame.toY(im).toFixed(2) });
    const circle = {
      cx: frame.toX(0),
      cy: frame.toY(0),
      rx: frame.toX(1) - frame.toX(0),
      ry: frame.toY(0) - frame.toY(1),
    };
    const points = (values, attributes) =>
      values
        .filter(([re, im]) => isNumber(re) && isNumber(im))
        .map((value) => draw("circle", { ...at(value), ...attributes(value) }));
    plot.replaceChildren(
      draw(
        "svg",
        {
          width: size,
          height: size - 8,
          role: "img",
          "aria-label": `eigenvalues of ${looked.block} at training step ${record.step}`,
        },
        frame.group,
        draw("ellipse", { ...circle, class: "unit" }),
        draw("g", {}, before ? points(before.eigenvalues, () => ({ r: 2.5, class: "before" })) : []),
        draw(
          "g",
          { class: "eigenvalues" },
          points(record.eigenvalues, ([re, im]) => ({
            r: 3.5,
            class: Math.hypot(re, im) > 1 ? "outside" : "inside",
            "data-re": re,
            "data-im": im,
          })),
        ),
      ),
    );
    Object.assign(numbers.dataset, { step: record.step, radius: record.radius ?? "", norm: record.norm ?? "" });
    numbers.textContent = `step ${record.step}: spectral radius ${short(record.radius)}, spectral norm ${short(record.norm)}`;
    radii.update();
    singular.update();
  }
  onWidth(plot, paint);

  function update() {
    if (!names().includes(looked.block)) looked.block = names()[0] ?? null;
    control();
    paint();
  }
  return { element, update, mark: () => {} };
}
