// The decoder of the mask VQ-VAE: 16 codes → a 64×64 mask with values in about [-1, 1], where above 0 is inside.
// Weights are in a .npz file: a zip of arrays. An image here is {side, data [side · side, C]}, channels last.
import { halvesToFloats } from "./safetensors.js";
import { addTo, linear } from "./tensor.js";

export class MaskVQVAE {
  constructor(arrays) {
    this.arrays = arrays;
  }

  static async fromPretrained(buffer) {
    return new MaskVQVAE(await readNpz(buffer));
  }

  // codes [16] → [64, 64]
  decode(codes) {
    const codebook = this.arrays["_vq_vae._embedding"], D = codebook.shape[1];
    const data = new Float32Array(codes.length * D);
    codes.forEach((code, cell) => data.set(codebook.data.subarray(code * D, (code + 1) * D), cell * D));
    let x = relu(this.conv({ data, side: Math.sqrt(codes.length) }, "decoder.0"));   // 512 → 128 channels, 4 × 4
    for (const block of ["decoder.2.net", "decoder.3.net"]) x = this.residual(x, block);
    for (const i of [4, 6, 8, 10]) x = relu(this.transposed(x, `decoder.${i}`));     // 4 → 8 → 16 → 32 → 64
    return this.conv(x, "decoder.12").data;                                          // 16 → 1 channel
  }

  // x + 1×1(ReLU(3×3(ReLU(3×3(x)))))
  residual(x, name) {
    const inner = relu(this.conv(relu(this.conv(x, `${name}.0`)), `${name}.2`));
    return { side: x.side, data: addTo(this.conv(inner, `${name}.4`).data, x.data) };
  }

  // Stride 1, padded so that the size stays. weight [O, I, k, k]: input row y reaches output row y − q + pad with kernel row q.
  conv(x, name) {
    const { data, shape: [O, I, k] } = this.arrays[`${name}.weight`], pad = (k - 1) / 2;
    return this.paint(x, name, O, k, (q, o, i) => data[(o * I + i) * k * k + q], (y, q) => y - q + pad, x.side);
  }

  // Transposed, stride 2, padding 1. weight [I, O, k, k]: input row y reaches output row 2y + q − 1 with kernel row q.
  transposed(x, name) {
    const { data, shape: [, O, k] } = this.arrays[`${name}.weight`];
    return this.paint(x, name, O, k, (q, o, i) => data[(i * O + o) * k * k + q], (y, q) => 2 * y + q - 1, 2 * x.side);
  }

  // Both are the same: one matrix turns each input pixel [I] into a square of k × k output pixels [O], and the squares of
  // all pixels are added up, each at its place.
  paint(x, name, O, k, weightAt, target, side) {
    const I = x.data.length / x.side ** 2, matrix = new Float32Array(k * k * O * I);  // [k · k · O, I]
    for (let j = 0; j < matrix.length; j++) matrix[j] = weightAt(Math.floor(j / (O * I)), Math.floor(j / I) % O, j % I);
    const squares = linear(x.data, { data: matrix, shape: [k * k * O, I] });
    const out = new Float32Array(side * side * O), bias = this.arrays[`${name}.bias`].data;
    for (let p = 0; p < side * side; p++) out.set(bias, p * O);
    for (let y = 0; y < x.side; y++) for (let q = 0; q < k; q++) {
      const row = target(y, q);
      for (let column = 0; column < x.side && row >= 0 && row < side; column++) for (let r = 0; r < k; r++) {
        const to = target(column, r), from = ((y * x.side + column) * k * k + q * k + r) * O;
        if (to < 0 || to >= side) continue;
        for (let o = 0; o < O; o++) out[(row * side + to) * O + o] += squares[from + o];
      }
    }
    return { data: out, side };
  }
}

const relu = (x) => ({ side: x.side, data: x.data.map((v) => Math.max(0, v)) });

// .npz → {name: {data: Float32Array, shape}}. A zip ends in a directory: one entry per file, which says where it begins.
// Sources: PKWARE's APPNOTE, 4.3; numpy.lib.format. Nothing is unpickled.
export async function readNpz(buffer) {
  const view = new DataView(buffer), bytes = new Uint8Array(buffer), arrays = {};
  let end = buffer.byteLength - 22;
  while (view.getUint32(end, true) !== 0x06054b50) end--;  // the end record's signature
  let at = view.getUint32(end + 16, true);
  for (let file = view.getUint16(end + 10, true); file > 0; file--) {
    const lengths = [28, 30, 32].map((offset) => view.getUint16(at + offset, true));  // of name, extra field, comment
    const name = new TextDecoder().decode(bytes.subarray(at + 46, at + 46 + lengths[0]));
    const [method, size, local] = [view.getUint16(at + 10, true), view.getUint32(at + 20, true), view.getUint32(at + 42, true)];
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const content = bytes.subarray(start, start + size);
    if (!name.startsWith("encoder")) arrays[name.replace(/\.npy$/, "")] = readNpy(method ? await inflate(content) : content.slice().buffer);
    at += 46 + lengths[0] + lengths[1] + lengths[2];
  }
  return arrays;
}

const inflate = (bytes) => new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).arrayBuffer();

// .npy: magic, version, length of a header that is a Python literal, header, numbers
function readNpy(buffer) {
  const length = new DataView(buffer).getUint16(8, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, 10, length)), numbers = buffer.slice(10 + length);
  const shape = header.match(/'shape': \(([^)]*)\)/)[1].split(",").filter((part) => part.trim()).map(Number);
  if (header.includes("'<f4'")) return { data: new Float32Array(numbers), shape };
  if (header.includes("'<f2'")) return { data: halvesToFloats(numbers), shape };
  throw new Error("An array of the mask VQ-VAE is neither float16 nor float32.");
}
