// Images and prompts → what the model receives:   <image> × P, <bos>, prefix, \n
//   C channels · H, W height and width of an image in pixels · P image tokens, one per patch

// --- an image ---

const triangle = { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) };  // bilinear
const cubic = {  // bicubic with a = -1/2
  support: 2,
  weight(x) {
    x = Math.abs(x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
  },
};
const FILTERS = { 2: triangle, 3: cubic };  // PIL's numbers
const BITS = 22;  // PIL computes bytes with integers: weights have this many bits after the point

// For each output, the first input it reads and the weights of the inputs from there. When an image shrinks, the filter
// grows with it (antialiasing), so that every input counts.
function resizeWeights(inputs, outputs, { support, weight }, areBytes) {
  const scale = inputs / outputs, stretch = Math.max(scale, 1);
  return Array.from({ length: outputs }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.floor(center - support * stretch + 0.5));
    const end = Math.min(inputs, Math.floor(center + support * stretch + 0.5));
    const raw = Array.from({ length: end - first }, (_, k) => weight((first + k - center + 0.5) / stretch));
    const sum = raw.reduce((a, b) => a + b, 0), round = (v) => Math.trunc(v * 2 ** BITS + (v < 0 ? -0.5 : 0.5));
    return { first, weights: raw.map((v) => (areBytes ? round(v / sum) : v / sum)) };
  });
}

// image {data, width, height} with any number of channels → the same with another size, exactly as PIL resizes: columns
// first, then rows, and bytes are rounded and clipped after each. Floats stay floats.
export function resize(image, width, height, filter = 3) {
  const across = resizeAxis(image, width, FILTERS[filter], true);
  return resizeAxis(across, height, FILTERS[filter], false);
}

function resizeAxis(image, size, filter, isHorizontal) {
  const { data, width, height } = image, C = data.length / (width * height), inputs = isHorizontal ? width : height;
  if (size === inputs) return image;
  const areBytes = !(data instanceof Float32Array), weights = resizeWeights(inputs, size, filter, areBytes);
  const result = isHorizontal ? { width: size, height } : { width, height: size };
  result.data = new (areBytes ? Uint8ClampedArray : Float32Array)(result.width * result.height * C);
  const stride = isHorizontal ? C : width * C;  // from one input to the next
  for (let y = 0; y < result.height; y++) for (let x = 0; x < result.width; x++) {
    const at = weights[isHorizontal ? x : y], from = isHorizontal ? (y * width + at.first) * C : (at.first * width + x) * C;
    for (let c = 0; c < C; c++) {
      let sum = 0;
      for (let k = 0; k < at.weights.length; k++) sum += data[from + k * stride + c] * at.weights[k];
      result.data[(y * result.width + x) * C + c] = areBytes ? Math.floor((sum + 2 ** (BITS - 1)) / 2 ** BITS) : sum;
    }
  }
  return result;
}

// RGBA bytes, as a canvas has them → RGB over white
export function toRgb({ data, width, height }) {
  const rgb = new Uint8ClampedArray(width * height * 3);
  for (let i = 0; i < width * height; i++) for (let c = 0; c < 3; c++) {
    const alpha = data[4 * i + 3];
    rgb[3 * i + c] = Math.round((data[4 * i + c] * alpha + 255 * (255 - alpha)) / 255);
  }
  return { data: rgb, width, height };
}

// --- text ---

// tokenizer.json: BPE over characters, spaces written as ▁, unknown characters spelled as the bytes of their UTF-8.
export class Tokenizer {
  constructor({ model, added_tokens }) {
    this.vocab = new Map([...Object.entries(model.vocab), ...added_tokens.map((t) => [t.content, t.id])]);
    this.tokens = new Map(Array.from(this.vocab, ([token, id]) => [id, token]));
    this.ranks = new Map(model.merges.map((pair, rank) => [pair.join(" "), rank]));
    this.special = new Set(added_tokens.filter((t) => t.special).map((t) => t.id));
    const added = added_tokens.map((t) => t.content.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.added = new RegExp(`(${added.join("|")})`);
  }

  // Added tokens are cut out first; what is between them is encoded by merging.
  encode(text) {
    if (/\p{Surrogate}/u.test(text)) throw new Error("The text has half of a character in it: type it again.");
    const parts = text.split(this.added).filter(Boolean);
    return parts.flatMap((part) => (this.added.test(part) ? [this.vocab.get(part)] : this.merge(part)));
  }

  // One text without added tokens: join the two neighbors whose merge was learned first, until no merge applies.
  merge(text) {
    const symbols = Array.from(text.replaceAll(" ", "▁")).flatMap((c) => (this.vocab.has(c) ? [c] : bytesOf(c)));
    while (true) {
      let best = -1, bestRank = Infinity;
      for (let i = 0; i + 1 < symbols.length; i++) {
        const rank = this.ranks.get(`${symbols[i]} ${symbols[i + 1]}`) ?? Infinity;
        if (rank < bestRank) [best, bestRank] = [i, rank];
      }
      if (best < 0) return symbols.map((symbol) => this.vocab.get(symbol));
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
    }
  }

  // A run of byte tokens is decoded together, since one character can be up to four bytes.
  decode(ids, skipSpecial = true) {
    let text = "", bytes = [];
    const flush = () => { text += fromBytes(bytes); bytes = []; };
    for (const id of ids) {
      if (!this.tokens.has(id) || (skipSpecial && this.special.has(id))) continue;
      const token = this.tokens.get(id), isByte = /^<0x[0-9A-F]{2}>$/.test(token);
      if (isByte) bytes.push(parseInt(token.slice(3, 5), 16));
      else flush();
      text += isByte ? "" : token.replaceAll("▁", " ");
    }
    flush();
    return text;
  }
}

const bytesOf = (character) => Array.from(new TextEncoder().encode(character), (b) => `<0x${b.toString(16).toUpperCase().padStart(2, "0")}>`);

// Bytes → their text, or one � per byte if they are not valid UTF-8
function fromBytes(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return "\uFFFD".repeat(bytes.length);
  }
}

// --- both ---

export class Processor {
  constructor(tokenizer, settings, config) {
    this.tokenizer = new Tokenizer(tokenizer);
    this.settings = settings;
    this.imageToken = config.image_token_index;
    this.size = config.vision_config.image_size;
    this.numImageTokens = Math.floor(this.size / config.vision_config.patch_size) ** 2;
  }

  // RGBA or RGB bytes of any size → [3, H, W], values in [-1, 1]
  preprocessImage(image) {
    const rgb = image.data.length === image.width * image.height * 4 ? toRgb(image) : image;
    const { data } = resize(rgb, this.size, this.size, this.settings.resample), area = this.size ** 2;
    const { image_mean: mean, image_std: std } = this.settings, pixels = new Float32Array(3 * area);
    for (let i = 0; i < area; i++) for (let c = 0; c < 3; c++) pixels[c * area + i] = (data[3 * i + c] / 255 - mean[c]) / std[c];
    return pixels;
  }

  // The newline ends the prompt. `newline` is only there so that the page can leave it out.
  promptIds(prefix, newline = "\n") {
    if (prefix.includes("<image>")) throw new Error("Leave <image> out of the prompt: it is added.");
    return [...new Array(this.numImageTokens).fill(this.imageToken), ...this.tokenizer.encode(`<bos>${prefix}${newline}`)];
  }

  decode(ids, skipSpecial = true) {
    return this.tokenizer.decode(ids, skipSpecial);
  }
}
