// What both node and Chromium do for tests/test_web.py: answers, logits, pixels and more of the JavaScript modules in web/.
import { MaskVQVAE } from "../../web/vqvae.js";
import { distribution, generateTokens } from "../../web/generation.js";
import { parseDetections, pasteMask } from "../../web/locations.js";
import { prefixLmMask } from "../../web/masks.js";
import { fromPretrained } from "../../web/paligemma.js";
import { resize, toRgb } from "../../web/processor.js";

export async function load(read) {
  const { model, processor } = await fromPretrained(read);
  return { model, processor, vae: await MaskVQVAE.fromPretrained(await read("vae-emoji.npz")) };
}

// A scene {image: {data, width, height}, prompts} → for each prompt its tokens, text, and the first and last logits
export function answer({ model, processor }, { image, prompts }) {
  const pixels = processor.preprocessImage(image), features = model.encodeImage(pixels);
  const answers = prompts.map((prompt) => {
    const steps = [...generateTokens(model, processor.promptIds(prompt), features, { maxNewTokens: 96 })];
    const tokens = steps.map((step) => step.token), logits = [steps[0], steps.at(-1)].map((step) => Array.from(step.logits));
    return { tokens, text: processor.decode(tokens), logits };
  });
  return { answers, pixels: Array.from(pixels) };
}

export const other = {
  encode: ({ processor }, texts) => texts.map((text) => processor.tokenizer.encode(text)),
  decode: ({ processor }, rows) => rows.map((ids) => processor.decode(ids)),
  parse: (_, texts) => texts.map((text) => parseDetections(text, 112, 112)),
  resize: (_, { image, sizes, filter }) => sizes.map(([w, h]) => Array.from(resize(toRgb(image), w, h, filter).data)),
  mask: ({ vae }, { codes, box }) => {
    const values = vae.decode(codes);
    return { values: Array.from(values), mask: Array.from(pasteMask(values, box, 112, 112)) };
  },
  distribution: (_, { logits, options }) => options.map((option) => Array.from(distribution(logits, option))),
  prefixLm: (_, types) => Array.from(prefixLmMask(types)),
};
