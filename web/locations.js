// Boxes and masks in an answer's text. Four tokens are a box, in the order y min, x min, y max, x max, each a bin from 0
// to 1023 along the side of the image. Sixteen <seg…> tokens after them are the codes of a mask. Items are joined by " ; ".
//     <loc0102><loc0051><loc0870><loc0512> cat ; <loc0000><loc0600><loc0400><loc1023> dog
// Boxes are [x0, y0, x1, y1] in pixels.
import { resize } from "./processor.js";

const BINS = 1024, CODES = 128, CODES_PER_MASK = 16;
export const MASK_SIDE = 64;
const BILINEAR = 2;

// Answer → {detections: [{label, box, codes}], problems: [sentence]}. Whatever cannot be read is left out, and a problem
// says why. swapsXY reads the tokens in the wrong order, x before y, to show what the order is for.
export function parseDetections(text, width, height, swapsXY = false) {
  const detections = [], problems = [], seen = new Set();
  const items = text.trim().replace(/;$/, "");
  (items.trim() ? items.split(";") : []).forEach((item, index) => {
    const found = parseItem(item.trim(), width, height, swapsXY);
    const isNew = found.detections.filter((d) => !seen.has(JSON.stringify(d)) && seen.add(JSON.stringify(d)));
    if (isNew.length < found.detections.length) found.problems = ["repeats an earlier box", ...(isNew.length ? found.problems : [])];
    detections.push(...isNew);
    problems.push(...Array.from(new Set(found.problems), (problem) => `Item ${index + 1} ${problem}: '${item.trim().slice(0, 60)}'.`));
  });
  return { detections, problems };
}

// The text between two ";". Several boxes in it share the label that follows them.
function parseItem(item, width, height, swapsXY) {
  const [before, ...runs] = item.split(/((?:<loc[^<>]*>\s*)+)/);  // then in turn: location tokens, the text after them
  if (!runs.length) return { detections: [], problems: ["has a box with 0 instead of 4 location tokens"] };
  const detections = [], problems = before.trim() ? ["has text before its box, which is ignored"] : [];
  let label = "";
  for (let r = runs.length - 2; r >= 0; r -= 2) {  // from the end, where the label is
    const [, segs, ownLabel] = runs[r + 1].match(/^((?:<seg[^<>]*>\s*)*)([^]*)$/);
    const [text, ...cutOff] = (ownLabel.trim() || label).split(/[<>]/);
    label = text.trim();
    const bins = tokenNumbers(runs[r], 4, BINS);
    let codes = tokenNumbers(segs, 3, CODES);
    if (!bins || bins.length % 4) {
      problems.push(bins ? `has a box with ${bins.length} instead of 4 location tokens`
        : `has a location token that is not one of <loc0000> to <loc${BINS - 1}>`);
      continue;
    }
    if (cutOff.length) problems.push("has a token, or part of one, in its label, which is cut off there");
    if (!codes || ![0, CODES_PER_MASK].includes(codes.length)) {
      codes = [];
      problems.push(`has a mask that is not ${CODES_PER_MASK} tokens from <seg000> to <seg${CODES - 1}>, so only its box is used`);
    }
    for (let start = bins.length - 4; start >= 0; start -= 4) {
      const [a, b, c, d] = bins.slice(start, start + 4), [y0, x0, y1, x1] = swapsXY ? [b, a, d, c] : [a, b, c, d];
      const pixels = (bin, side) => bin / (BINS - 1) * side;
      if (y0 > y1 || x0 > x1) problems.push("has a box that is upside down or mirrored");
      else detections.push({ label, box: [pixels(x0, width), pixels(y0, height), pixels(x1, width), pixels(y1, height)], codes });
      codes = [];  // they belong to the box right before them
    }
  }
  return { detections: detections.reverse(), problems };
}

// "<loc0001><loc0002>" → [1, 2]; null if a number has the wrong number of digits or is not below `count`
function tokenNumbers(text, digits, count) {
  const numbers = Array.from(text.matchAll(/<(?:loc|seg)([^<>]*)>/g), (match) => match[1]);
  const isValid = numbers.every((n) => /^[0-9]+$/.test(n) && n.length === digits && Number(n) < count);
  return isValid ? numbers.map(Number) : null;
}

// Rounded to integer pixels, ties to even as in Python, and clipped to the image; at least one pixel wide and high
export function pixelBox(box, width, height) {
  const [left, top, right, bottom] = box.map((v) => (v % 1 === 0.5 ? 2 * Math.round(v / 2) : Math.round(v)));
  const clip = (v, low, high) => Math.min(Math.max(v, low), high);
  const x0 = clip(left, 0, width - 1), y0 = clip(top, 0, height - 1);
  return [x0, y0, Math.min(Math.max(right, x0 + 1), width), Math.min(Math.max(bottom, y0 + 1), height)];
}

// A decoded mask [64, 64] resized to its box, then thresholded → [height, width] of 0 and 1
export function pasteMask(values, box, width, height) {
  const [x0, y0, x1, y1] = pixelBox(box, width, height), mask = new Uint8Array(width * height);
  const part = resize({ data: values, width: MASK_SIDE, height: MASK_SIDE }, x1 - x0, y1 - y0, BILINEAR);
  part.data.forEach((v, i) => { mask[(y0 + Math.floor(i / part.width)) * width + x0 + (i % part.width)] = v > 0 ? 1 : 0; });
  return mask;
}
