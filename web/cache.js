// The KV cache: keys and values that each layer has already computed. A token's keys and values never change, because no
// later token influences an earlier one.  M slots · S filled · K key/value heads · d head dimension

export class StaticCache {
  constructor(config, maxLength) {
    const { num_hidden_layers, num_key_value_heads, head_dim } = config;
    this.rowSize = num_key_value_heads * head_dim;
    const allocate = () => Array.from({ length: num_hidden_layers }, () => new Float32Array(maxLength * this.rowSize));
    this.maxLength = maxLength;
    this.keys = allocate();    // per layer [M, K, d]
    this.values = allocate();
    this.filled = new Array(num_hidden_layers).fill(0);
  }

  get length() {
    return this.filled.at(-1);
  }

  // Write k, v [T, K, d] behind what is there, and return views of all filled slots, [S + T, K, d]
  update(layer, k, v) {
    const start = this.filled[layer] * this.rowSize, end = start + k.length;
    if (end > this.keys[layer].length) throw new Error(`The cache has only ${this.maxLength} slots.`);
    this.keys[layer].set(k, start);
    this.values[layer].set(v, start);
    this.filled[layer] = end / this.rowSize;
    return [this.keys[layer].subarray(0, end), this.values[layer].subarray(0, end)];
  }
}

// Keys and values of all layers for this many tokens, in bytes, as 32-bit floats
export function cacheBytes(config, tokens) {
  return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * 4;
}
