// PaliGemma: vision tower → projector → decoder. P image tokens · D hidden size of the decoder · V vocabulary size
import { StaticCache } from "./cache.js";
import { GemmaForCausalLM } from "./gemma.js";
import { causalMask, prefixLmMask } from "./masks.js";
import { Processor } from "./processor.js";
import { readSafetensors } from "./safetensors.js";
import { SiglipVisionModel } from "./siglip.js";
import { linear } from "./tensor.js";

export class PaliGemma {
  constructor(weights, config) {
    if (config.text_config.model_type !== "gemma") throw new Error("Only the first PaliGemma runs here, not PaliGemma 2.");
    this.config = config;
    this.visionTower = new SiglipVisionModel(weights, config.vision_config);
    this.projector = (x) => linear(x, weights["multi_modal_projector.linear.weight"], weights["multi_modal_projector.linear.bias"]);
    this.languageModel = new GemmaForCausalLM(weights, config.text_config);
  }

  // pixels [3, size, size] → [P, D]
  encodeImage(pixels) {
    return this.projector(this.visionTower.forward(pixels));
  }

  newCache(maxLength) {
    return new StaticCache(this.config.text_config, maxLength);
  }

  // Image and prompt at once: ids [T], image features [P, D] → logits [V] of the first new token, mask [T, T].
  // Text embeddings are multiplied by √D, image vectors are not.
  prefill(ids, features, cache, record, isCausal = false) {
    const T = ids.length, D = this.config.text_config.hidden_size, image = this.config.image_token_index;
    const x = this.languageModel.embed(ids.map((id) => (id === image ? 0 : id)));
    let next = 0;
    ids.forEach((id, t) => {
      if (id !== image) return;
      x.set(features.subarray(next, next + D), t * D);
      next += D;
    });
    const mask = isCausal ? causalMask(T) : prefixLmMask(new Uint8Array(T));
    const positions = ids.map((_, t) => t + 1);  // they count from 1
    const hidden = this.languageModel.forward(x, positions, mask, cache, record);
    return { logits: this.languageModel.logits(hidden.subarray((T - 1) * D)), mask };
  }

  // One more token → logits [V] of the next. It attends to all that is in the cache, so it needs no mask.
  decode(id, cache, record, shift = 0) {
    const hidden = this.languageModel.forward(this.languageModel.embed([id]), [cache.length + 1 + shift], null, cache, record);
    return this.languageModel.logits(hidden);
  }
}

// The hub's files → {model, processor}. `read(name)` returns the ArrayBuffer of a file of the checkpoint's folder.
export async function fromPretrained(read) {
  const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));
  const [config, tokenizer, image, weights] = await Promise.all([
    json("config.json"), json("tokenizer.json"), json("preprocessor_config.json"),
    read("model.safetensors").then(readSafetensors),
  ]);
  return { model: new PaliGemma(weights, config), processor: new Processor(tokenizer, image, config) };
}
