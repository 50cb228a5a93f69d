// The few operations that torch gives to the Python modules. A tensor is a Float32Array whose shape is in a comment:
// rows follow one another, so element [t, i] of [T, D] is x[t * D + i].
// Sums run in double precision, as JavaScript's numbers are. Only what is stored is rounded to 32 bits.

// y = x Wᵀ + b:  x [T, I], weight {data, shape: [O, I]}, bias {data} or null → [T, O]
// Four outputs at a time, so that the processor has four independent sums to work on.
export function linear(x, weight, bias = null) {
  const O = weight.shape[0], I = weight.data.length / O, T = x.length / I, W = weight.data;
  const y = new Float32Array(T * O);
  for (let o = 0; o < O; o += 4) {
    const a = o * I, b = a + I, c = b + I, d = c + I, few = Math.min(4, O - o);
    for (let t = 0; t < T; t++) {
      const row = t * I;
      if (few === 4) {
        let p = 0, q = 0, r = 0, s = 0;
        for (let i = 0; i < I; i++) {
          const v = x[row + i];
          p += W[a + i] * v; q += W[b + i] * v; r += W[c + i] * v; s += W[d + i] * v;
        }
        const to = t * O + o;
        y[to] = p; y[to + 1] = q; y[to + 2] = r; y[to + 3] = s;
      } else {
        for (let k = 0; k < few; k++) y[t * O + o + k] = dot(W, a + k * I, x, row, I);
      }
    }
  }
  if (bias) for (let j = 0; j < y.length; j++) y[j] += bias.data[j % O];
  return y;
}

export function dot(a, i, b, j, n) {
  let sum = 0;
  for (let k = 0; k < n; k++) sum += a[i + k] * b[j + k];
  return sum;
}

// x + y, written into x
export function addTo(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
  return x;
}

// softmax of n values from `start`, in place. Minus infinity becomes 0.
export function softmax(x, start = 0, n = x.length) {
  let max = -Infinity, sum = 0;
  for (let i = start; i < start + n; i++) max = Math.max(max, x[i]);
  for (let i = start; i < start + n; i++) sum += x[i] = Math.exp(x[i] - max);
  for (let i = start; i < start + n; i++) x[i] /= sum;
  return x;
}

// GELU in its tanh approximation
export function gelu(v) {
  return 0.5 * v * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (v + 0.044715 * v * v * v)));
}

// Attention of H query heads over S keys. Each of the K key/value heads serves H / K consecutive query heads.
//   q [T, H, d] · keys, values [S, K, d] · mask [T, S] of 0 and 1, or null → out [T, H, d], weights [H, T, S]
export function attention(q, keys, values, { T, S, H, K, d, mask = null, scale = d ** -0.5 }) {
  const out = new Float32Array(T * H * d), weights = new Float32Array(H * T * S);
  for (let h = 0; h < H; h++) {
    const kv = Math.floor(h / (H / K)) * d;
    for (let t = 0; t < T; t++) {
      const query = (t * H + h) * d, row = (h * T + t) * S;
      for (let s = 0; s < S; s++) {
        weights[row + s] = mask && !mask[t * S + s] ? -Infinity : dot(q, query, keys, s * K * d + kv, d) * scale;
      }
      softmax(weights, row, S);
      for (let s = 0; s < S; s++) {
        const w = weights[row + s], value = s * K * d + kv;
        if (w) for (let i = 0; i < d; i++) out[query + i] += w * values[value + i];
      }
    }
  }
  return { out, weights };
}
