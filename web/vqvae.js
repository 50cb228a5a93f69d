// The decoder of the mask VQ-VAE: 16 codes → a 64×64 mask with values in about [-1, 1], where above 0 is inside.
// Weights are in a .npz file: a zip of arrays. Images here are [C, H, W].
import { halfToFloat } from "./safetensors.js";

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
    const side = Math.sqrt(codes.length), grid = new Float32Array(D * codes.length);
    codes.forEach((code, cell) => {  // channels come first, as a convolution expects
      for (let i = 0; i < D; i++) grid[i * codes.length + cell] = codebook.data[code * D + i];
    });
    let x = relu(this.conv({ data: grid, side }, "decoder.0"));                       // 512 → 128 channels, 4 × 4
    for (const block of ["decoder.2.net", "decoder.3.net"]) x = this.residual(x, block);
    for (const i of [4, 6, 8, 10]) x = relu(this.transposed(x, `decoder.${i}`));      // 4 → 8 → 16 → 32 → 64
    return this.conv(x, "decoder.12").data;                                           // 16 → 1 channel
  }

  // x + 1×1(ReLU(3×3(ReLU(3×3(x)))))
  residual(x, name) {
    const inner = relu(this.conv(relu(this.conv(x, `${name}.0`)), `${name}.2`)), out = this.conv(inner, `${name}.4`);
    return { side: x.side, data: out.data.map((v, i) => v + x.data[i]) };
  }

  // Stride 1, padded so that the size stays: weight [out, in, k, k]
  conv(x, name) {
    const weight = this.arrays[`${name}.weight`], [O, I, k] = weight.shape, pad = (k - 1) / 2;
    return this.spread(x, weight, name, O, (o, i, ky, kx) => ((o * I + i) * k + ky) * k + kx, (p, q) => p - q + pad, x.side);
  }

  // Transposed, kernel 4, stride 2, padding 1: every input pixel is painted with the kernel. weight [in, out, k, k]
  transposed(x, name) {
    const weight = this.arrays[`${name}.weight`], [, O, k] = weight.shape;
    return this.spread(x, weight, name, O, (o, i, ky, kx) => ((i * O + o) * k + ky) * k + kx, (p, q) => 2 * p + q - 1, 2 * x.side);
  }

  // Both are sums over inputs and kernel positions; `target` says where input row (or column) p goes with kernel row q.
  spread(x, weight, name, O, indexOf, target, side) {
    const bias = this.arrays[`${name}.bias`].data, k = weight.shape[3], I = x.data.length / x.side ** 2;
    const sums = new Float64Array(O * side * side);
    for (let o = 0; o < O; o++) {
      sums.fill(bias[o], o * side * side, (o + 1) * side * side);
      for (let i = 0; i < I; i++) for (let ky = 0; ky < k; ky++) for (let kx = 0; kx < k; kx++) {
        const w = weight.data[indexOf(o, i, ky, kx)];
        for (let y = 0; y < x.side; y++) {
          const row = target(y, ky);
          if (row < 0 || row >= side) continue;
          for (let column = 0; column < x.side; column++) {
            const to = target(column, kx);
            if (to >= 0 && to < side) sums[(o * side + row) * side + to] += w * x.data[(i * x.side + y) * x.side + column];
          }
        }
      }
    }
    return { data: Float32Array.from(sums), side };
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
  if (header.includes("'<f2'")) return { data: Float32Array.from(new Uint16Array(numbers), halfToFloat), shape };
  throw new Error("An array of the mask VQ-VAE is neither float16 nor float32.");
}
