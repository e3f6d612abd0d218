// Alerts on a time line and as a list; each leads to its step.

const KINDS = ["nonfinite", "exploding", "vanishing", "saturated", "dead", "stalled"];
const LISTED = 100;

function alerts() {
  const plot = make("div", { class: "plot" });
  const list = make("ol", { class: "alerts" });
  const element = make("div", {}, make("figure", {}, make("figcaption", {}, "When what was noticed"), plot), list);

  const all = () =>
    state.runs
      .flatMap((run) => (run.alerts || []).map((alert) => ({ ...alert, run: run.name })))
      .sort((a, b) => a.step - b.step);

  /** A lane for every kind that there is. */
  function paint() {
    const found = all();
    const width = Math.floor(plot.clientWidth);
    if (!width) return;
    if (!found.length || !state.steps.length) {
      plot.replaceChildren(make("p", { class: "empty" }, "No alerts."));
      return;
    }
    const kinds = [...new Set([...KINDS, ...found.map((alert) => alert.kind)])].filter((kind) =>
      found.some((alert) => alert.kind === kind),
    );
    const height = 52 + 26 * kinds.length;
    const [low, high] = [state.steps[0], Math.max(state.steps.at(-1), state.steps[0] + 1)];
    const margin = { left: 84, right: 12, top: 8, bottom: 40 };
    const frame = axes(
      width,
      height,
      { label: "training step", domain: [low, high], whole: true, format: String },
      { label: "", domain: [0, kinds.length], format: () => "" },
      margin,
    );
    const lane = (kind) => frame.toY(kinds.length - kinds.indexOf(kind) - 0.5);
    const svg = draw(
      "svg",
      { width, height, role: "img", "aria-label": `${found.length} alerts: ${kinds.join(", ")}` },
      frame.group,
    );
    for (const kind of kinds) svg.append(draw("text", { x: 76, y: lane(kind) + 4, "text-anchor": "end" }, kind));
    for (const alert of found) {
      const mark = { cx: frame.toX(alert.step), cy: lane(alert.kind), r: 5, class: `alert ${alert.kind}` };
      svg.append(
        draw(
          "circle",
          { ...mark, onclick: () => look(alert.step, alert.time_step ?? state.time) },
          draw("title", {}, `step ${alert.step}: ${alert.message}`),
        ),
      );
    }
    svg.append(
      draw("line", {
        x1: frame.toX(state.step),
        x2: frame.toX(state.step),
        y1: frame.top,
        y2: frame.bottom,
        class: "cursor",
      }),
    );
    plot.replaceChildren(svg);
  }
  onWidth(plot, paint);

  let listed = "";
  function update() {
    paint();
    const found = all();
    const known = JSON.stringify(found);
    if (known === listed) return; // nobody's focus is taken away
    listed = known;
    const item = (alert) =>
      make(
        "li",
        { "data-kind": alert.kind, "data-step": alert.step, "data-layer": alert.layer },
        make("span", { class: `badge ${alert.kind}` }, alert.kind),
        make(
          "button",
          { type: "button", onclick: () => look(alert.step, alert.time_step ?? state.time) },
          `step ${alert.step}`,
        ),
        make("span", {}, ` ${state.runs.length > 1 ? `${alert.run}: ` : ""}${alert.message}`),
        alert.advice ? make("p", { class: "note" }, alert.advice) : null,
      );
    list.replaceChildren(...found.slice(-LISTED).reverse().map(item));
    if (found.length > LISTED)
      list.append(make("li", { class: "note" }, `and ${found.length - LISTED} earlier ones, on the time line`));
  }
  return { element, update, mark: paint };
}
