// Numbers as text, axes and colours.

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** 10 to an integer power, as text. */
const powerOfTen = (exponent) => `10${[...String(exponent)].map((c) => SUPERSCRIPTS[c]).join("")}`;

/** A norm from its logarithm, which may be far below what a float holds: "2.31e-60". */
function norm(log10) {
  if (!isNumber(log10)) return "none";
  if (log10 >= -3 && log10 < 4) return (10 ** log10).toPrecision(3);
  let exponent = Math.floor(log10);
  let mantissa = (10 ** (log10 - exponent)).toFixed(2);
  if (mantissa === "10.00") [mantissa, exponent] = ["1.00", exponent + 1];
  return `${mantissa}e${exponent}`;
}

/** Three significant digits, and no more zeros than that takes. */
function short(value) {
  if (!isNumber(value)) return "none";
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e5 || size < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(3));
}

const percent = (share) => (isNumber(share) ? `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %` : "none");

/** The smallest and the largest of the numbers among `values`, or null where there are none. */
function extent(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (!isNumber(value)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return low <= high ? [low, high] : null;
}

/** At most `count` round numbers from `low` to `high`. */
function ticks(low, high, count, whole = false) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  let gap = [1, 2, 5, 10].map((m) => m * power).find((g) => g >= rough * 0.999);
  if (whole) gap = Math.max(1, Math.round(gap));
  const first = Math.ceil(low / gap - 1e-9);
  const last = Math.floor(high / gap + 1e-9);
  return Array.from({ length: Math.max(0, last - first + 1) }, (_, i) => +((first + i) * gap).toPrecision(12));
}

/** Maps [low, high] to [from, to]. */
function linear([low, high], [from, to]) {
  const slope = high !== low ? (to - from) / (high - low) : 0;
  return (value) => (slope ? from + (value - low) * slope : (from + to) / 2);
}

// From dark to light through hues that the colour-blind tell apart, and as even to the eye.
const STOPS = [
  [18, 10, 64],
  [30, 40, 115],
  [36, 80, 145],
  [33, 118, 150],
  [38, 154, 140],
  [92, 188, 111],
  [173, 213, 72],
  [250, 232, 80],
];

/** A colour as a word of a canvas's pixels, whose bytes are red, green, blue and opacity on every machine that browsers run on. */
const word = (red, green, blue, opacity = 255) => ((opacity << 24) | (blue << 16) | (green << 8) | red) >>> 0;

/** 256 colours. */
const COLOURS = Uint32Array.from({ length: 256 }, (_, i) => {
  const place = (i / 255) * (STOPS.length - 1);
  const k = Math.min(STOPS.length - 2, Math.floor(place));
  return word(...STOPS[k].map((c, j) => Math.round(c + (place - k) * (STOPS[k + 1][j] - c))));
});

/** The colour of a value in [low, high]; what lies outside has the colour of the nearer end. */
function colour(value, [low, high]) {
  const share = high > low ? (value - low) / (high - low) : 1;
  return COLOURS[Math.max(0, Math.min(255, Math.round(share * 255)))];
}

const STRIPES = [word(128, 128, 128, 40), word(128, 128, 128, 90)];
