// Two things to try: what a simple RNN does to its gradient, and how far apart a subject and its verb may be.

const LOWEST = -16; // decades; bars below this are as good as nothing

const verdict = (log10) =>
  log10 < -3
    ? ["vanishing", "The gradient vanishes: the first steps learn next to nothing from this loss."]
    : log10 > 3
      ? [
          "exploding",
          "The gradient explodes: one step of the optimizer would throw the weights away. Clipping holds that, and only that.",
        ]
      : ["healthy", "The gradient arrives: the first steps can learn from this loss."];

/** Bars per time step for a simple RNN whose length, weights, activation and input can be chosen. */
function rnnLesson() {
  const chosen = { T: 20, scale: 0.9, activation: "tanh", matrix: "orthogonal", input: 0.1 };
  const plot = make("div", { class: "plot" });
  const says = make("p", { class: "verdict", "aria-live": "polite" });
  const numbers = make("dl", { class: "numbers" });
  let found = null;
  let from = 0; // bars from here to the end are drawn; less than all of them while it plays
  let playing = 0;

  const bases = { orthogonal: orthogonal(WIDTH, generator(1)), random: uniform(WIDTH, WIDTH, generator(2)) };
  for (const name of Object.keys(bases)) bases[name] = scaled(bases[name], 1 / spectralNorm(bases[name]));
  const radii = { orthogonal: 1, random: spectralRadius(bases.random) };

  function compute() {
    const { T, scale, activation, matrix, input } = chosen;
    const random = generator(3);
    const inputs = Array.from({ length: T }, () => vector(WIDTH, () => input * gaussian(random)));
    const w = scaled(bases[matrix], scale);
    const { norms, slope } = rnnNorms(w, inputs, activation, random);
    const factor = scale * ACTIVATIONS[activation][2];
    const logs = norms.map((value) => (value > 0 ? Math.log10(value) : -Infinity));
    found = { logs, slope, factor, bound: Math.log10(factor), radius: scale * radii[matrix] };
    from = 0;
    cancelAnimationFrame(playing);
    paint();
  }

  function paint() {
    const width = Math.floor(plot.clientWidth);
    if (!width || !found) return;
    const { logs, slope, factor, bound, radius } = found;
    const T = logs.length;
    const ends = logs.map((value, t) => [value, (T - 1 - t) * bound]).flat();
    const high = Math.max(1, Math.min(-LOWEST, Math.ceil(Math.max(...ends))));
    const low = Math.max(LOWEST, Math.min(-4, Math.floor(Math.min(...ends.filter(Number.isFinite)))));
    const frame = axes(
      width,
      280,
      { label: "time step t", domain: [0.5, T + 0.5], whole: true, format: String },
      { label: "‖∂L/∂hₜ‖", domain: [low, high], decades: true },
    );
    const svg = draw(
      "svg",
      { width, height: 280, role: "img", "aria-label": `norm of the gradient at each of ${T} time steps` },
      frame.group,
    );
    const clamped = (value) => Math.max(low, Math.min(high, value));
    const wide = Math.max(1, (frame.right - frame.left) / T - (T > 80 ? 0 : 2));
    logs.forEach((value, t) => {
      if (t < from) return;
      const y = frame.toY(clamped(value));
      svg.append(
        draw(
          "rect",
          {
            x: frame.toX(t + 1) - wide / 2,
            width: wide,
            y,
            height: Math.max(0, frame.bottom - y),
            class: verdict(value)[0],
            "data-time": t + 1,
            "data-value": Number.isFinite(value) ? value : "",
          },
          draw("title", {}, `t = ${t + 1}: ${norm(value)}`),
        ),
      );
    });
    const limit = logs.map((_, t) => [t + 1, clamped((T - 1 - t) * bound)]);
    svg.append(draw("path", { class: "line bound", d: path(limit, frame.toX, frame.toY) }));
    plot.replaceChildren(svg);
    const first = logs[0];
    const [kind, text] = verdict(first);
    says.className = `verdict ${kind}`;
    says.dataset.kind = kind;
    says.textContent = text;
    const each = T > 1 ? 10 ** ((first - logs[T - 1]) / (T - 1)) : 1;
    const pairs = [
      ["gradient at t = 1", first === -Infinity ? "0, every unit is off" : norm(first)],
      ["its bound, (max φ′ · ‖W‖)ᵀ⁻¹", norm((T - 1) * bound)],
      ["at most a step: max φ′ · ‖W‖", short(factor)],
      ["in the mean a step, measured", short(each)],
      ["mean slope φ′ along the way", short(slope)],
      ["spectral norm ‖W‖", short(chosen.scale)],
      ["spectral radius ρ(W)", short(radius)],
    ];
    numbers.replaceChildren(
      ...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
    );
  }

  /** The bars one after the other, from the end back, in a second and a half. */
  function play() {
    cancelAnimationFrame(playing);
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    const T = found.logs.length;
    let begin = null;
    const step = (now) => {
      begin ??= now;
      from = Math.max(0, Math.ceil(T * (1 - (now - begin) / 1500)));
      paint();
      if (from > 0) playing = requestAnimationFrame(step);
    };
    playing = requestAnimationFrame(step);
  }

  const change = (name) => (value) => {
    chosen[name] = value;
    compute();
  };
  const controls = make(
    "div",
    { class: "controls" },
    slider("sequence length", { min: 1, max: 200, step: 1, value: chosen.T }, change("T")),
    slider(
      "weight scale ‖W‖",
      { min: 0.1, max: 2, step: 0.05, value: chosen.scale, format: (v) => v.toFixed(2) },
      change("scale"),
    ),
    slider(
      "size of the input",
      { min: 0, max: 2, step: 0.05, value: chosen.input, format: (v) => v.toFixed(2) },
      change("input"),
    ),
    choice(
      "activation",
      Object.keys(ACTIVATIONS).map((name) => [name, name]),
      chosen.activation,
      change("activation"),
    ),
    choice(
      "matrix",
      [
        ["orthogonal", "orthogonal"],
        ["random", "independent entries"],
      ],
      chosen.matrix,
      change("matrix"),
    ),
    make("button", { type: "button", onclick: play }, "Play backwards"),
  );
  onWidth(plot, paint);
  compute();
  return make(
    "div",
    { id: "lesson-rnn" },
    controls,
    make(
      "figure",
      {},
      plot,
      make(
        "p",
        { class: "note" },
        "Bars: computed by backpropagation through a network of 32 units, the loss being at the end. Line: the bound.",
      ),
    ),
    says,
    numbers,
  );
}

const BETWEEN =
  "to the old cabinet in the hall of the house by the river near the mill that the baker of the village behind the hill once sold to a friend of the mayor".split(
    " ",
  );
const NOUNS = new Set(["cabinet", "hall", "house", "river", "mill", "baker", "village", "hill", "friend", "mayor"]);
const NETWORKS = 8; // the mean of so many: one is a matter of luck

/** How much of the verb's gradient reaches the subject, through words in between. */
function agreementLesson() {
  const chosen = { distance: 8, bias: 1, model: "lstm" };
  const sentence = make("p", {
    class: "sentence",
    "aria-label": "the sentence, words shaded by the gradient that reaches them",
  });
  const bars = make("div", { class: "bars" });
  const says = make("p", { class: "verdict", "aria-live": "polite" });
  const models = { rnn: "simple RNN", lstm: "LSTM", biased: "LSTM, forget bias", attention: "attention" };

  /** The mean of log10 norms relative to the verb, per word and model, over several networks. */
  function strengths(count) {
    const sums = Object.fromEntries(Object.keys(models).map((name) => [name, new Float64Array(count)]));
    for (let n = 0; n < NETWORKS; n += 1) {
      const random = generator(100 + n);
      const words = Array.from({ length: count }, () => vector(WIDTH, () => gaussian(random)));
      const w = uniform(WIDTH, WIDTH, random);
      const u = uniform(WIDTH, WIDTH, random);
      const found = {
        rnn: rnnNorms(
          w,
          words.map((x) => times(u, x)),
          "tanh",
          random,
        ).norms,
        lstm: lstmNorms(words, 0, generator(200 + n)),
        biased: lstmNorms(words, chosen.bias, generator(200 + n)),
        attention: attentionNorms(words, random),
      };
      for (const name of Object.keys(models)) {
        found[name].forEach((value, t) => (sums[name][t] += Math.log10(value / found[name][count - 1]) / NETWORKS));
      }
    }
    return sums;
  }

  function paint() {
    const between = Array.from({ length: chosen.distance - 1 }, (_, i) => BETWEEN[i % BETWEEN.length]);
    const words = ["The", "keys", ...between, "are"];
    const found = strengths(words.length);
    const shade = (value) => Math.max(0, Math.min(1, 1 + value / 6));
    sentence.replaceChildren(
      ...words.flatMap((word, t) => {
        const role = t === 1 ? "subject" : t === words.length - 1 ? "verb" : NOUNS.has(word) ? "attractor" : "";
        const [value, ink] = [
          found[chosen.model][t],
          make(
            "span",
            { class: `word ${role}`, title: norm(found[chosen.model][t]), "data-value": found[chosen.model][t] },
            word,
          ),
        ];
        ink.style.setProperty("--strength", `${Math.round(100 * shade(value))}%`);
        return [ink, " "];
      }),
    );
    bars.replaceChildren(
      ...Object.entries(models).map(([name, text]) => {
        const value = found[name][1];
        const bar = make("span", { class: `strength ${verdict(value)[0]}` });
        bar.style.setProperty("--strength", `${Math.round(100 * Math.max(0.01, 1 + value / 12))}%`);
        const label = name === "biased" ? `${text} ${chosen.bias}` : text;
        return make(
          "div",
          { "data-model": name, "data-value": value },
          make("span", {}, label),
          make("span", { class: "track" }, bar),
          make("span", { class: "value" }, norm(value)),
        );
      }),
    );
    const [kind] = verdict(found[chosen.model][1]);
    says.className = `verdict ${kind}`;
    says.textContent =
      `With ${chosen.distance - 1} words between them, ${norm(found[chosen.model][1])} of the gradient at “are” reaches “keys” in an untrained ${models[chosen.model]}` +
      `${chosen.model === "biased" ? ` of ${chosen.bias}` : ""}: ${kind === "healthy" ? "enough to learn from." : "too little to learn from."}`;
  }

  const change = (name) => (value) => {
    chosen[name] = value;
    paint();
  };
  const controls = make(
    "div",
    { class: "controls" },
    slider("distance from subject to verb", { min: 1, max: 60, step: 1, value: chosen.distance }, change("distance")),
    slider("forget bias", { min: 0, max: 5, step: 0.5, value: chosen.bias }, change("bias")),
    choice("words shaded by", Object.entries(models), chosen.model, change("model")),
  );
  paint();
  return make(
    "div",
    { id: "lesson-agreement" },
    controls,
    sentence,
    says,
    bars,
    make(
      "p",
      { class: "note" },
      `Geometric means over ${NETWORKS} networks of 32 units with torch's initial weights and random words; of attention, what arrives through keys and values.`,
    ),
  );
}

function lessons() {
  byId("lesson-one").append(rnnLesson());
  byId("lesson-two").append(agreementLesson());
}
