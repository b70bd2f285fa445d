// What the Python takes from PyTorch, as far as playground.llava.js needs it. Two habits are the same here:
//
//   a matrix (rows, columns) is one Float32Array, row after row;
//   sums are taken in double precision, as JavaScript does it, and every result is kept in float32.

// nn.Linear: x Wᵀ + b for x (rows, inputs), W (outputs, inputs). Nearly all of the time goes here: four outputs of W
// lie side by side, and four rows of x are taken at once, so that each number that is fetched is used four times.
function linear(x, layer) {
  const { bias, inputs, outputs } = layer, w = layer.packed ??= pack(layer), rows = x.length / inputs, end = 4 * inputs;
  const y = new Float32Array(rows * outputs), four = new Float64Array(end);
  let row = 0;
  for (; row + 4 <= rows; row += 4) {
    for (let i = 0; i < end; i++) four[i] = x[(row + i % 4) * inputs + (i >> 2)];
    for (let out = 0; out < outputs; out += 4) {
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0; // a row of x each: a, b, c, d
      let c0 = 0, c1 = 0, c2 = 0, c3 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;
      for (let i = 0, at = out * inputs; i < end; i += 4, at += 4) {
        const a = four[i], b = four[i + 1], c = four[i + 2], d = four[i + 3];
        const p = w[at], q = w[at + 1], r = w[at + 2], s = w[at + 3];
        a0 += a * p; a1 += a * q; a2 += a * r; a3 += a * s;
        b0 += b * p; b1 += b * q; b2 += b * r; b3 += b * s;
        c0 += c * p; c1 += c * q; c2 += c * r; c3 += c * s;
        d0 += d * p; d1 += d * q; d2 += d * r; d3 += d * s;
      }
      let at = row * outputs + out;
      y[at] = a0; y[at + 1] = a1; y[at + 2] = a2; y[at + 3] = a3; at += outputs;
      y[at] = b0; y[at + 1] = b1; y[at + 2] = b2; y[at + 3] = b3; at += outputs;
      y[at] = c0; y[at + 1] = c1; y[at + 2] = c2; y[at + 3] = c3; at += outputs;
      y[at] = d0; y[at + 1] = d1; y[at + 2] = d2; y[at + 3] = d3;
    }
  }
  for (; row < rows; row++) // those that are left over, and the one row of a step
    for (let out = 0; out < outputs; out += 4) {
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0;
      for (let i = row * inputs, at = out * inputs; i < (row + 1) * inputs; i++, at += 4) {
        const a = x[i];
        a0 += a * w[at]; a1 += a * w[at + 1]; a2 += a * w[at + 2]; a3 += a * w[at + 3];
      }
      const at = row * outputs + out;
      y[at] = a0; y[at + 1] = a1; y[at + 2] = a2; y[at + 3] = a3;
    }
  if (bias) for (let i = 0; i < y.length; i++) y[i] += bias[i % outputs];
  return y; // (rows, outputs)
}

// W (outputs, inputs) → the same numbers, those of four outputs at each input side by side.
function pack({ weight, inputs, outputs }) {
  const packed = new Float32Array(weight.length);
  for (let out = 0; out < outputs; out++)
    for (let i = 0; i < inputs; i++) packed[(out - out % 4) * inputs + 4 * i + out % 4] = weight[out * inputs + i];
  return packed;
}

const add = (x, y) => x.map((number, i) => number + y[i]);
const multiply = (x, y) => x.map((number, i) => number * y[i]);
const range = n => Array.from({ length: n }, (_, i) => i);

function dot(x, at, y, there, length) {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += x[at + i] * y[there + i];
  return sum;
}

// The scores of one query become weights that add up to 1.
function softmax(scores, length) {
  let most = -Infinity, sum = 0;
  for (let i = 0; i < length; i++) most = Math.max(most, scores[i]);
  for (let i = 0; i < length; i++) sum += scores[i] = Math.exp(scores[i] - most);
  for (let i = 0; i < length; i++) scores[i] /= sum;
  return scores;
}

// F.scaled_dot_product_attention: softmax(q kᵀ / √E) v, in A heads side by side. q (T, A · E); k, v (S, K · E), each of
// their heads for A / K of the queries'. Query t looks at the first visible(t) keys; watch(t, weights) hears how much.
function scaled_dot_product_attention(q, k, v, { A, K, E }, visible, watch) {
  const T = q.length / (A * E), y = new Float32Array(q.length);
  const scores = new Float64Array(visible(T - 1)), sum = new Float64Array(E);
  for (let head = 0; head < A; head++)
    for (let t = 0; t < T; t++) {
      const S = visible(t), query = (t * A + head) * E, shared = Math.floor(head / (A / K)) * E;
      for (let s = 0; s < S; s++) scores[s] = dot(q, query, k, s * K * E + shared, E) / Math.sqrt(E);
      softmax(scores, S);
      watch?.(t, scores);
      sum.fill(0);
      for (let s = 0; s < S; s++)
        for (let e = 0, at = s * K * E + shared; e < E; e++) sum[e] += scores[s] * v[at + e];
      y.set(sum, (head * T + t) * E);
    }
  return y; // (A, T, E)
}

// x.transpose(0, 1).flatten(1): the heads of each position side by side, (A, T, E) → (T, A · E).
function transpose(x, A, E) {
  const T = x.length / (A * E), y = new Float32Array(x.length);
  for (let head = 0; head < A; head++)
    for (let t = 0; t < T; t++) y.set(x.subarray((head * T + t) * E, (head * T + t + 1) * E), (t * A + head) * E);
  return y;
}

// nn.LayerNorm, over rows of x.
function layer_norm(x, { weight, bias }, eps) {
  const width = weight.length, y = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += width) {
    let mean = 0, variance = 0;
    for (let i = 0; i < width; i++) mean += x[at + i] / width;
    for (let i = 0; i < width; i++) variance += (x[at + i] - mean) ** 2 / width;
    const scale = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < width; i++) y[at + i] = (x[at + i] - mean) * scale * weight[i] + bias[i];
  }
  return y;
}

const silu = x => x / (1 + Math.exp(-x));

const gelu = x => x / 2 * (1 + erf(x / Math.SQRT2)); // exact

// 2/√π e^(-x²) Σ 2ⁿ x²ⁿ⁺¹ / (1 · 3 · … · (2n+1)): all terms have one sign, so nothing cancels.
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) sum += term *= 2 * x * x / (2 * n + 1);
  return 2 / Math.sqrt(Math.PI) * Math.exp(-x * x) * sum;
}

// logits.argmax()
function argmax(x) {
  let best = 0;
  for (let i = 1; i < x.length; i++) if (x[i] > x[best]) best = i;
  return best;
}
