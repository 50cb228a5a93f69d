// SigLIP's vision tower: an image becomes a sequence of P patch vectors. Pre-norm layers, no [class] token, no pooling.
//   P patches · D hidden size · N heads · C, h, w channels, height and width of a patch
import { addTo, attention, gelu, linear } from "./tensor.js";

// [C, size, size] → [P, C·h·w]: squares, row by row from the top left, each in the order channel, row, column
export function patchify(pixels, channels, size, patch) {
  const side = Math.floor(size / patch), patches = new Float32Array(side * side * channels * patch * patch);
  let to = 0;
  for (let row = 0; row < side; row++) for (let column = 0; column < side; column++) {
    for (let c = 0; c < channels; c++) for (let y = 0; y < patch; y++) {
      const from = (c * size + row * patch + y) * size + column * patch;
      patches.set(pixels.subarray(from, from + patch), to);
      to += patch;
    }
  }
  return patches;
}

// Each vector to mean 0 and variance 1, then scaled and shifted: x [T, D] → [T, D]
export function layerNorm(x, weight, bias, eps) {
  const D = weight.data.length, y = new Float32Array(x.length);
  for (let t = 0; t < x.length; t += D) {
    let mean = 0, variance = 0;
    for (let i = 0; i < D; i++) mean += x[t + i] / D;
    for (let i = 0; i < D; i++) variance += (x[t + i] - mean) ** 2 / D;
    const scale = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < D; i++) y[t + i] = (x[t + i] - mean) * scale * weight.data[i] + bias.data[i];
  }
  return y;
}

export class SiglipVisionModel {
  constructor(weights, config) {
    this.config = config;
    this.get = (name) => weights[`vision_tower.vision_model.${name}`];
  }

  // pixels [C, size, size], values in [-1, 1] → [P, D]
  forward(pixels) {
    const { num_channels, image_size, patch_size, num_hidden_layers } = this.config;
    const patches = patchify(pixels, num_channels, image_size, patch_size);
    // A convolution whose stride equals its kernel size is one matrix for all patches.
    const x = linear(patches, this.get("embeddings.patch_embedding.weight"), this.get("embeddings.patch_embedding.bias"));
    addTo(x, this.get("embeddings.position_embedding.weight").data);
    for (let i = 0; i < num_hidden_layers; i++) this.layer(x, `encoder.layers.${i}`);
    return this.norm(x, "post_layernorm");
  }

  // x += attention(norm(x)), then x += mlp(norm(x))
  layer(x, name) {
    addTo(x, this.attention(this.norm(x, `${name}.layer_norm1`), `${name}.self_attn`));
    const hidden = this.project(this.norm(x, `${name}.layer_norm2`), `${name}.mlp.fc1`);
    addTo(x, this.project(hidden.map(gelu), `${name}.mlp.fc2`));
  }

  // Every patch attends to every patch: there is no mask.
  attention(x, name) {
    const N = this.config.num_attention_heads, D = this.config.hidden_size, P = x.length / D;
    const [q, k, v] = ["q_proj", "k_proj", "v_proj"].map((part) => this.project(x, `${name}.${part}`));  // [P, N, d]
    const { out } = attention(q, k, v, { T: P, S: P, H: N, K: N, d: D / N });
    return this.project(out, `${name}.out_proj`);
  }

  project(x, name) {
    return linear(x, this.get(`${name}.weight`), this.get(`${name}.bias`));
  }

  norm(x, name) {
    return layerNorm(x, this.get(`${name}.weight`), this.get(`${name}.bias`), this.config.layer_norm_eps);
  }
}
