// Charts of lines in SVG, drawn anew for the width there is, so that text keeps its size on a phone.

const MARGIN = { left: 58, right: 12, top: 10, bottom: 40 };

/**
 * Axes around a rectangle, for lines, points and heatmaps alike.
 * `x` and `y`: {label, domain: [low, high], whole, decades, format}. Returns the group, and where values lie.
 */
function axes(width, height, x, y, margin = MARGIN) {
  const right = width - margin.right;
  const bottom = height - margin.bottom;
  const toX = linear(x.domain, [margin.left, right]);
  const toY = linear(y.domain, [bottom, margin.top]);
  const text = (axis) => axis.format || (axis.decades ? powerOfTen : short);
  const group = draw("g", { class: "axes" });
  for (const value of ticks(...x.domain, (right - margin.left) / 90, x.whole || x.decades)) {
    group.append(
      draw("line", { x1: toX(value), x2: toX(value), y1: margin.top, y2: bottom, class: "grid" }),
      draw("text", { x: toX(value), y: bottom + 16, "text-anchor": "middle" }, text(x)(value)),
    );
  }
  for (const value of ticks(...y.domain, (bottom - margin.top) / 36, y.whole || y.decades)) {
    group.append(
      draw("line", { x1: margin.left, x2: right, y1: toY(value), y2: toY(value), class: "grid" }),
      draw("text", { x: margin.left - 6, y: toY(value) + 4, "text-anchor": "end" }, text(y)(value)),
    );
  }
  const middle = (margin.top + bottom) / 2;
  group.append(
    draw("text", { x: (margin.left + right) / 2, y: height - 6, "text-anchor": "middle", class: "title" }, x.label),
    draw(
      "text",
      { transform: `translate(13 ${middle}) rotate(-90)`, "text-anchor": "middle", class: "title" },
      y.label,
    ),
  );
  return { group, toX, toY, left: margin.left, right, top: margin.top, bottom };
}

/** The path through [x, y] points; where y is missing it is broken. */
function path(points, toX, toY) {
  let text = "";
  let pen = "M";
  for (const [x, y] of points) {
    if (!isNumber(y)) {
      pen = "M";
      continue;
    }
    text += `${pen}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
    pen = "L";
  }
  return text;
}

/** The area between low and high of [x, low, high], where there are both. */
function ribbon(band, toX, toY) {
  const whole = band.filter(([, low, high]) => isNumber(low) && isNumber(high));
  const edge = (k) => whole.map((point) => `${toX(point[0]).toFixed(1)} ${toY(point[k]).toFixed(1)}`);
  return whole.length ? `M${[...edge(1), ...edge(2).reverse()].join("L")}Z` : "";
}

/** [low, high] a little wider than the values, so that a flat line has room, too. */
function roomy(range, least = 1e-9) {
  const [low, high] = range || [0, 1];
  const pad = Math.max((high - low) * 0.05, least);
  return [low - pad, high + pad];
}

/**
 * A figure of lines that draws itself anew when its width or its data change.
 * `describe()` gives {x, y, series: [{name, points, dashed, hue, band: [[x, low, high]]}], cursor, label}; axes without a domain
 * get that of the points.
 */
function lineFigure(title, describe, height = 260) {
  const heading = make("figcaption", {}, title);
  const plot = make("div", { class: "plot" });
  const legend = make("ul", { class: "legend" });
  const figure = make("figure", {}, heading, plot, legend);
  const paint = () => {
    const width = Math.floor(plot.clientWidth);
    if (!width) return;
    const { x, y, series, cursor, label } = describe();
    // With more lines than colours, those that share one are told apart by dashes.
    const drawn = series
      .filter((s) => s.points.some(([, value]) => isNumber(value)))
      .map((s, i) => ({ ...s, hue: (s.hue ?? i) % 8, dashed: s.dashed || (s.hue ?? i) >= 8 }));
    if (!drawn.length) {
      plot.replaceChildren(make("p", { class: "empty" }, "Nothing has been measured yet."));
      legend.replaceChildren();
      return;
    }
    const points = drawn.flatMap((s) => s.points);
    const domains = {
      x: x.domain || extent(points.map((p) => p[0])),
      y: y.domain || roomy(extent(points.map((p) => p[1])), y.decades ? 0.5 : 1e-9),
    };
    if (domains.x[0] === domains.x[1]) domains.x = [domains.x[0] - 1, domains.x[1] + 1];
    const frame = axes(width, height, { ...x, domain: domains.x }, { ...y, domain: domains.y });
    const svg = draw("svg", { width, height, role: "img", "aria-label": label || title }, frame.group);
    const clip = `clip-${(lineFigure.count = (lineFigure.count || 0) + 1)}`;
    svg.append(
      draw(
        "clipPath",
        { id: clip },
        draw("rect", {
          x: frame.left,
          y: frame.top,
          width: frame.right - frame.left,
          height: frame.bottom - frame.top,
        }),
      ),
    );
    drawn.forEach((s, i) => {
      if (s.band)
        svg.append(
          draw("path", {
            d: ribbon(s.band, frame.toX, frame.toY),
            class: `band hue${s.hue}`,
            "clip-path": `url(#${clip})`,
          }),
        );
      const line = draw("path", {
        d: path(s.points, frame.toX, frame.toY),
        class: `line hue${s.hue}${s.dashed ? " dashed" : ""}`,
        "clip-path": `url(#${clip})`,
        "data-series": s.name,
      });
      svg.append(line);
      // A value between two that are missing is a line of no length.
      s.points.forEach(([px, py], k) => {
        const alone = isNumber(py) && !isNumber(s.points[k - 1]?.[1]) && !isNumber(s.points[k + 1]?.[1]);
        if (alone)
          svg.append(draw("circle", { cx: frame.toX(px), cy: frame.toY(py), r: 2.5, class: `dot hue${s.hue}` }));
      });
    });
    if (isNumber(cursor)) {
      svg.append(
        draw("line", {
          x1: frame.toX(cursor),
          x2: frame.toX(cursor),
          y1: frame.top,
          y2: frame.bottom,
          class: "cursor",
        }),
      );
    }
    plot.replaceChildren(svg);
    legend.replaceChildren(
      ...drawn.map((s, i) =>
        make("li", {}, make("span", { class: `key hue${s.hue}${s.dashed ? " dashed" : ""}` }), s.name),
      ),
    );
  };
  onWidth(plot, paint);
  return { element: figure, update: paint };
}
