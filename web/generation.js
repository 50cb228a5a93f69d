// From logits to text: the prefill reads image and prompt in one call, then each decode step adds one token.
//   T tokens of the prompt · V vocabulary size
import { softmax } from "./tensor.js";

export function greedy(logits) {
  return logits.reduce((best, value, i) => (value > logits[best] ? i : best), 0);
}

// The probabilities to sample from, [V]: divide by the temperature, then keep the smallest set of most likely tokens
// whose probabilities sum to topP or more (nucleus sampling, arXiv:1904.09751).
export function distribution(logits, { temperature = 1, topP = 1 } = {}) {
  const probs = softmax(Float64Array.from(logits, (v) => v / temperature));
  if (topP >= 1) return probs;
  const order = Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a]);
  let total = 0;
  for (const i of order) {
    const before = total;
    total += probs[i];
    if (before >= topP && before > 0) probs[i] = 0;
  }
  const kept = probs.reduce((sum, p) => sum + p, 0);
  return probs.map((p) => p / kept);
}

// One index, with these probabilities
export function sample(probs, random) {
  let left = random();
  for (let i = 0; i < probs.length; i++) if (probs[i] > 0 && (left -= probs[i]) < 0) return i;
  return greedy(probs);  // the probabilities summed to a hair less than 1
}

// A small generator of numbers in [0, 1): an additive counter through an integer hash (murmur3's finalizer).
// The same seed gives the same answer here, but not the answer that torch's generator gives.
export function seeded(seed) {
  let counter = seed >>> 0;
  return () => {
    counter = (counter + 0x9e3779b9) >>> 0;
    let h = counter;
    h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
    h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
    return ((h ^ (h >>> 16)) >>> 0) / 2 ** 32;
  };
}

// Yields one object per new token. Options: maxNewTokens; doSample, temperature, topP, seed; forced, ids that the answer
// must start with; breaks, a set of "causal" and "positions" (see worker.js).
//   token · logits [V] it was chosen from · attention, per layer [H, S], of the query that predicts it · length of the cache
//   The first also has the prefill's mask [T, T] and hidden, per layer [T, D].
export function* generateTokens(model, ids, features, options = {}) {
  const { maxNewTokens = 32, doSample = false, seed = 0, forced = [], breaks = new Set() } = options;
  const limit = model.config.text_config.max_position_embeddings, last = ids.length - 1;
  if (ids.length + maxNewTokens > limit) throw new Error(`${ids.length} + ${maxNewTokens} tokens exceed the ${limit} positions.`);
  const cache = model.newCache(ids.length + maxNewTokens - 1), random = seeded(seed);  // the last token is not fed
  const ends = [model.config.eos_token_id].flat(), shift = breaks.has("positions") ? -1 : 0;
  let record = { hidden: [], attention: [] };
  const prefill = model.prefill(ids, features, cache, record, breaks.has("causal"));
  let { logits } = prefill, T = ids.length, first = { mask: prefill.mask, hidden: record.hidden };
  for (let step = 0; step < maxNewTokens; step++) {
    const token = forced[step] ?? (doSample ? sample(distribution(logits, options), random) : greedy(logits));
    const attention = record.attention.map((weights) => lastRows(weights, T, cache.length));
    yield { token, logits, attention, length: cache.length, isEnd: ends.includes(token), ...first };
    if (ends.includes(token) || step + 1 === maxNewTokens) return;
    record = { hidden: [], attention: [] };
    logits = model.decode(token, cache, record, shift);
    [T, first] = [1, {}];
  }
}

// weights [H, T, S] → [H, S] of the last query
function lastRows(weights, T, S) {
  const H = weights.length / (T * S), rows = new Float32Array(H * S);
  for (let h = 0; h < H; h++) rows.set(weights.subarray(((h + 1) * T - 1) * S, (h + 1) * T * S), h * S);
  return rows;
}

// The answer, token for token. Python: generate(model, processor, image, prompt)
export function generate(model, processor, image, prompt, options = {}) {
  const features = model.encodeImage(processor.preprocessImage(image));
  const tokens = [...generateTokens(model, processor.promptIds(prompt), features, options)].map((step) => step.token);
  return { tokens, text: processor.decode(tokens) };
}
