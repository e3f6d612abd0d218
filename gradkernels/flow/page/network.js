// Small recurrent networks, run and differentiated here, so that the lessons show gradients and not formulas.

const WIDTH = 32;

/** The same random numbers in every browser, from a seed: uniform in [0, 1). */
function generator(seed) {
  let s = seed >>> 0;
  return () => {
    s = (s + 0x6d2b79f5) >>> 0;
    let t = Math.imul(s ^ (s >>> 15), 1 | s);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

const gaussian = (random) => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
function vector(n, value) {
  const v = new Float64Array(n);
  for (let i = 0; i < n; i += 1) v[i] = value(i);
  return v;
}
function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i += 1) sum += a[i] * b[i];
  return sum;
}
const length2 = (a) => Math.sqrt(dot(a, a));
/** Rows of weights uniform in +-1/sqrt(width), as torch begins. */
const uniform = (rows, columns, random) =>
  Array.from({ length: rows }, () => vector(columns, () => (2 * random() - 1) / Math.sqrt(WIDTH)));
const times = (matrix, v) => vector(matrix.length, (i) => dot(matrix[i], v));
const transposed = (matrix) =>
  Array.from({ length: matrix[0].length }, (_, j) => vector(matrix.length, (i) => matrix[i][j]));

/** An orthogonal matrix: random rows, each freed of those before it. */
function orthogonal(n, random) {
  const rows = [];
  while (rows.length < n) {
    const row = vector(n, () => gaussian(random));
    for (const other of [...rows, ...rows]) {
      const share = dot(row, other);
      row.forEach((_, i) => (row[i] -= share * other[i]));
    }
    const size = length2(row);
    rows.push(row.map((value) => value / size));
  }
  return rows;
}

/** The largest singular value, by powers of the matrix times its transpose. */
function spectralNorm(matrix) {
  const back = transposed(matrix);
  let v = vector(matrix.length, (i) => 1 + Math.sin(i));
  let size = 0;
  for (let i = 0; i < 300; i += 1) {
    v = times(back, times(matrix, v));
    size = length2(v);
    v = v.map((value) => value / size);
  }
  return Math.sqrt(size);
}

/** The largest |eigenvalue|: what the norm of the n-th power grows by, n = 2^12. */
function spectralRadius(matrix) {
  let [power, log, n] = [matrix, 0, 1];
  for (let i = 0; i < 12; i += 1) {
    const columns = transposed(power);
    const square = power.map((row) => vector(row.length, (j) => dot(row, columns[j])));
    const size = Math.sqrt(square.reduce((sum, row) => sum + dot(row, row), 0));
    power = square.map((row) => row.map((value) => value / size));
    log = 2 * log + Math.log(size);
    n *= 2;
  }
  return Math.exp(log / n);
}

const scaled = (matrix, factor) => matrix.map((row) => row.map((value) => value * factor));
const sigmoid = (z) => 1 / (1 + Math.exp(-z));

// name: [value, slope by value, largest slope]
const ACTIVATIONS = {
  tanh: [Math.tanh, (h) => 1 - h * h, 1],
  sigmoid: [sigmoid, (h) => h * (1 - h), 0.25],
  relu: [(z) => Math.max(0, z), (h) => (h > 0 ? 1 : 0), 1],
};

/** Norms of dL/dh_t of h_t = phi(W h + x_t), for a loss at the end whose gradient there has norm 1; and the mean slope of phi. */
function rnnNorms(matrix, inputs, activation, random) {
  const [value, slope] = ACTIVATIONS[activation];
  const back = transposed(matrix);
  let h = vector(WIDTH, () => 0);
  const states = inputs.map((x) => (h = times(matrix, h).map((z, i) => value(z + x[i]))));
  let g = vector(WIDTH, () => gaussian(random));
  const size = length2(g);
  g = g.map((v) => v / size);
  const norms = [];
  let slopes = 0;
  for (let t = inputs.length - 1; t >= 0; t -= 1) {
    norms[t] = length2(g);
    const here = states[t].map(slope);
    slopes += here.reduce((a, b) => a + b, 0) / WIDTH;
    g = times(
      back,
      g.map((v, i) => v * here[i]),
    );
  }
  return { norms, slope: slopes / inputs.length };
}

/** Norms of dL/dh_t and dL/dc_t together of an LSTM with torch's weights and `bias` added to the forget gate. */
function lstmNorms(inputs, bias, random) {
  const gates = Array.from({ length: 4 }, () => uniform(WIDTH, WIDTH, random)); // i f g o
  const feeds = Array.from({ length: 4 }, () => uniform(WIDTH, WIDTH, random));
  const backs = gates.map(transposed);
  let [h, c] = [vector(WIDTH, () => 0), vector(WIDTH, () => 0)];
  const kept = inputs.map((x) => {
    const before = c;
    const z = gates.map((w, k) => {
      const fed = times(feeds[k], x);
      return times(w, h).map((value, j) => value + fed[j] + (k === 1 ? bias : 0));
    });
    const [i, f, g, o] = z.map((values, k) => values.map(k === 2 ? Math.tanh : sigmoid));
    c = c.map((value, j) => f[j] * value + i[j] * g[j]);
    const squashed = c.map(Math.tanh);
    h = squashed.map((value, j) => o[j] * value);
    return { i, f, g, o, before, squashed };
  });
  let dh = vector(WIDTH, () => gaussian(random));
  let dc = vector(WIDTH, () => 0);
  const norms = [];
  for (let t = inputs.length - 1; t >= 0; t -= 1) {
    const { i, f, g, o, before, squashed } = kept[t];
    dc = dc.map((value, j) => value + dh[j] * o[j] * (1 - squashed[j] ** 2));
    norms[t] = Math.hypot(length2(dh), length2(dc));
    const dz = [
      dc.map((v, j) => v * g[j] * i[j] * (1 - i[j])),
      dc.map((v, j) => v * before[j] * f[j] * (1 - f[j])),
      dc.map((v, j) => v * i[j] * (1 - g[j] ** 2)),
      dh.map((v, j) => v * squashed[j] * o[j] * (1 - o[j])),
    ];
    dc = dc.map((v, j) => v * f[j]);
    dh = vector(WIDTH, () => 0);
    backs.forEach((w, k) => times(w, dz[k]).forEach((v, j) => (dh[j] += v)));
  }
  return norms;
}

/** Norms of dL/dx_t where the last step attends to all: softmax(q K) V with random projections. */
function attentionNorms(inputs, random) {
  const [query, key, value] = Array.from({ length: 3 }, () => uniform(WIDTH, WIDTH, random));
  const q = times(query, inputs[inputs.length - 1]);
  const values = inputs.map((x) => times(value, x));
  const scores = inputs.map((x) => Math.exp(dot(q, times(key, x)) / Math.sqrt(WIDTH)));
  const total = scores.reduce((a, b) => a + b, 0);
  const weights = scores.map((s) => s / total);
  const context = vector(WIDTH, (j) => weights.reduce((sum, w, t) => sum + w * values[t][j], 0));
  const g = vector(WIDTH, () => gaussian(random));
  const throughValue = times(transposed(value), g);
  const throughKey = times(transposed(key), q);
  return weights.map((w, t) => {
    const score =
      dot(
        g,
        values[t].map((v, j) => v - context[j]),
      ) / Math.sqrt(WIDTH);
    return w * length2(throughValue.map((v, j) => v + score * throughKey[j]));
  });
}
