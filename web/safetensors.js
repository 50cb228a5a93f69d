// model.safetensors as it is on the hub: 8 bytes with the length of a JSON header, the header, then the raw numbers.
// Source: github.com/huggingface/safetensors, "Format".

const READERS = {
  F32: (bytes) => new Float32Array(bytes),
  F16: halvesToFloats,
  BF16: (bytes) => {  // bfloat16 is the upper half of a float32
    const halves = new Uint16Array(bytes), bits = new Uint32Array(halves.length);
    for (let i = 0; i < bits.length; i++) bits[i] = halves[i] << 16;
    return new Float32Array(bits.buffer);
  },
};

// ArrayBuffer → {name: {data: Float32Array, shape}}
export function readSafetensors(buffer) {
  const headerLength = Number(new DataView(buffer).getBigUint64(0, true)), start = 8 + headerLength;
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, headerLength)));
  const tensors = {};
  for (const [name, entry] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const [from, to] = entry.data_offsets;
    if (!READERS[entry.dtype]) throw new Error(`${name} has dtype ${entry.dtype}, which this page does not read.`);
    tensors[name] = { data: READERS[entry.dtype](buffer.slice(start + from, start + to)), shape: entry.shape };
  }
  return tensors;
}

// Each float16 is 16 bits: sign, 5 of exponent, 10 of fraction.
export function halvesToFloats(bytes) {
  const halves = new Uint16Array(bytes), floats = new Float32Array(halves.length);
  for (let i = 0; i < floats.length; i++) {
    const half = halves[i], sign = half & 0x8000 ? -1 : 1, exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent === 0) floats[i] = sign * 2 ** -24 * fraction;
    else if (exponent === 31) floats[i] = fraction ? NaN : sign * Infinity;
    else floats[i] = sign * 2 ** (exponent - 25) * (1024 + fraction);
  }
  return floats;
}
