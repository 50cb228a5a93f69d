// Gemma: embeddings in, logits of the next token out.
//   T new tokens (queries) · S tokens including those in the cache (keys) · D hidden size · V vocabulary size
//   H query heads · K key/value heads · d head dimension
import { addTo, attention, gelu, linear } from "./tensor.js";

// x / √(mean(x²) + eps) · (1 + weight): x [T, D] → [T, D]
export function rmsNorm(x, weight, eps) {
  const D = weight.data.length, y = new Float32Array(x.length);
  for (let t = 0; t < x.length; t += D) {
    let square = 0;
    for (let i = 0; i < D; i++) square += x[t + i] ** 2 / D;
    const scale = 1 / Math.sqrt(square + eps);
    for (let i = 0; i < D; i++) y[t + i] = x[t + i] * scale * (1 + weight.data[i]);
  }
  return y;
}

// Rotate each pair (i, i + d/2) of each head by position · theta^(-2i/d), in place: x [T, heads, d], positions [T].
// The halves of a head are paired, not neighbors.
export function applyRotary(x, positions, d, theta) {
  const rowSize = x.length / positions.length, half = d / 2;
  positions.forEach((position, t) => {
    for (let i = 0; i < half; i++) {
      const angle = position * theta ** (-2 * i / d), cos = Math.cos(angle), sin = Math.sin(angle);
      for (let at = t * rowSize + i; at < (t + 1) * rowSize; at += d) {
        const first = x[at], second = x[at + half];
        x[at] = first * cos - second * sin;
        x[at + half] = second * cos + first * sin;
      }
    }
  });
  return x;
}

export class GemmaForCausalLM {
  constructor(weights, config) {
    this.config = config;
    this.get = (name) => weights[`language_model.model.${name}.weight`];
  }

  // Token embeddings × √D: ids [T] → [T, D]
  embed(ids) {
    const D = this.config.hidden_size, table = this.get("embed_tokens").data, x = new Float32Array(ids.length * D);
    ids.forEach((id, t) => x.set(table.subarray(id * D, (id + 1) * D), t * D));
    return x.map((v) => v * Math.fround(Math.sqrt(D)));
  }

  // x [T, D] of the newest tokens, their positions [T], mask [T, S] or null, cache → hidden states [T, D].
  // `record` gets, for the page: hidden, the residual stream [T, D] before and after each layer; attention [H, T, S].
  forward(x, positions, mask, cache, record = { hidden: [], attention: [] }) {
    record.hidden.push(x.slice());
    for (let i = 0; i < this.config.num_hidden_layers; i++) {
      addTo(x, this.attention(this.norm(x, `layers.${i}.input_layernorm`), i, positions, mask, cache, record));
      addTo(x, this.mlp(this.norm(x, `layers.${i}.post_attention_layernorm`), `layers.${i}.mlp`));
      record.hidden.push(x.slice());
    }
    return this.norm(x, "norm");
  }

  attention(x, layer, positions, mask, cache, record) {
    const { num_attention_heads: H, num_key_value_heads: K, head_dim: d, rope_theta } = this.config;
    const project = (part) => linear(x, this.get(`layers.${layer}.self_attn.${part}`));
    const q = applyRotary(project("q_proj"), positions, d, rope_theta);   // [T, H, d]
    const k = applyRotary(project("k_proj"), positions, d, rope_theta);   // [T, K, d]
    const [keys, values] = cache.update(layer, k, project("v_proj"));     // [S, K, d]
    const sizes = { T: positions.length, S: keys.length / (K * d), H, K, d, mask };
    const { out, weights } = attention(q, keys, values, sizes);
    record.attention.push(weights);
    return linear(out, this.get(`layers.${layer}.self_attn.o_proj`));
  }

  // GeGLU: one projection, through GELU, gates the other
  mlp(x, name) {
    const gate = linear(x, this.get(`${name}.gate_proj`)), up = linear(x, this.get(`${name}.up_proj`));
    return linear(up.map((v, i) => v * gelu(gate[i])), this.get(`${name}.down_proj`));
  }

  norm(x, name) {
    return rmsNorm(x, this.get(name), this.config.rms_norm_eps);
  }

  // The output head is the embedding table: hidden [T, D] → [T, V]
  logits(hidden) {
    return linear(hidden, this.get("embed_tokens"));
  }

  // The logit lens: what the output head would say if the residual stream x [T, D] were the last one
  lens(x) {
    return this.logits(this.norm(x, "norm"));
  }
}
