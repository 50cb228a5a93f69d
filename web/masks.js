// Which token attends to which. The one rule (big_vision, models/proj/paligemma, make_attn_mask): every token has a
// maskAr, 0 if it joins the block of the previous token and 1 if it starts a new one. Then
//     query attends to key  ⟺  cumsum(maskAr)[key] <= cumsum(maskAr)[query]
// All zeros: bidirectional. All ones: causal. Zeros on image and prefix, ones on the suffix: prefix-LM.
// There is one row and no padding here, so the rule is all that is needed.

// [T] → [T, T] of 0 and 1, indexed [query, key]
export function blockMask(maskAr) {
  let sum = 0;
  const block = Array.from(maskAr, (ar) => (sum += ar)), T = block.length;
  return Uint8Array.from({ length: T * T }, (_, i) => (block[i % T] <= block[Math.floor(i / T)] ? 1 : 0));
}

export const causalMask = (length) => blockMask(new Uint8Array(length).fill(1));

export const prefixLmMask = (tokenTypeIds) => blockMask(tokenTypeIds);
