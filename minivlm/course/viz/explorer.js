// The mask explorer: an attention mask to change, to query and to predict. One module without dependencies:
// anywidget calls `render`, a page of its own calls `mount`.
//
// Tokens are numbered by position from 0, as in mask[query, key]. An item is what is drawn as one row or one column: a
// token, or a long run of image or padding tokens.
//
// Settings are what explorer.py calls so, and two more things: `own`, what a learner's function returned for one of
// them, and `attention`, the weights of a model in 256 steps.

export const LIMITS = { image: [0, 1024], prefix: [1, 16], suffix: [0, 16], padding: [0, 16] };

export const MODES = {
  causal: { name: "causal", rule: "Every token starts a new block: it attends to itself and to earlier tokens." },
  "prefix-lm": {
    name: "prefix-LM",
    rule: "Image and prefix are one block and attend to each other fully. Every suffix token starts a new block.",
  },
  bidirectional: { name: "bidirectional", rule: "All tokens are one block: every token attends to every token." },
  sliding: {
    name: "sliding window",
    rule: "Prefix-LM, but keys far behind are blocked. The window never cuts inside image and prefix.",
  },
  "unmasked-padding": {
    name: "unmasked padding",
    rule: "Prefix-LM with a bug: padding is not masked, so tokens attend to it.",
  },
};

const OWN = "own"; // the mode that draws the learner's function
const SEQUENCE = ["image", "prefix", "suffix", "padding", "side", "window", "call"]; // what its result depends on

const COLORS = { image: "#56B4E9", prefix: "#E69F00", suffix: "#009E73", padding: "#C8C8C8" };
const ALLOWED = "#0072B2", ONLY_A = "#D55E00", ONLY_B = "#0072B2", INK = "#222222", GRAY = "#6B6B6B", LINE = "#C8C8C8";

// --- the mask ---------------------------------------------------------------------------------------------------

/** Clamps numbers to their limits. A decode step needs a generated token. A layer with attention has its own mask. */
export function normalize(settings) {
  const s = { ...settings }, { attention, texts } = s;
  for (const [name, [low, high]] of Object.entries(LIMITS)) s[name] = Math.min(high, Math.max(low, Math.round(s[name])));
  if (s.call === "decode") s.suffix = Math.max(1, s.suffix);
  if (texts) [s.prefix, s.suffix] = texts.map((list) => list.length);
  s.window = Math.max(1, Math.round(s.window));
  if (s.compare === OWN && !s.own) s.compare = null;
  if (s.mode === OWN && !s.own) s.mode = "prefix-lm";
  if (!attention || s.layer === null) return { ...s, layer: null };
  s.layer = Math.min(attention.shape[0] - 1, Math.max(0, s.layer));
  if (s.head !== null) s.head = Math.min(attention.shape[1] - 1, Math.max(0, s.head));
  const window = attention.windows[s.layer], mode = window === null ? { mode: "prefix-lm" } : { mode: "sliding", window };
  return { ...s, ...mode, compare: null, call: "prefill" };
}

/** The sliders that move something: not those of texts or of a sequence that a model has read. */
const adjustable = ({ texts, attention }) => attention ? ["window"]
  : ["image", "suffix", "padding", "prefix", "window"].filter((name) => !texts || !["suffix", "prefix"].includes(name));

const isOf = (own, settings) => SEQUENCE.every((name) => own.of[name] === settings[name]);

/** PaliGemma's mask of the same tokens, which the learner's function is compared with. */
const reference = (settings) => ({ ...settings, mode: settings.own.reference });
const isOwn = (settings) => settings.mode === OWN && Boolean(settings.own.rows) && isOf(settings.own, settings);

/** The name of a mode and its rule in a sentence. */
function about(mode, { own }) {
  if (mode !== OWN) return MODES[mode];
  if (own.error) return { name: "PaliGemma's mask", rule: `${own.error} This is PaliGemma's mask.` };
  return { name: own.name, rule: `The mask of ${own.name} for these tokens.` };
}

/** The sequence: [{kind, label}]. In a decode step, the padding of a right-padded prompt is before the answer. */
export function tokens({ image, prefix, suffix, padding, side, call, texts }) {
  const run = (kind, n, label) => Array.from({ length: n }, (_, i) => ({ kind, label: label(i) }));
  const inPrefix = (i) => (i === 0 ? "<bos>" : i === prefix - 1 ? "\\n" : `pre ${i}`);
  const pad = run("padding", padding, () => "<pad>");
  const prompt = [...run("image", image, () => "<image>"), ...run("prefix", prefix, texts ? (i) => texts[0][i] : inPrefix)];
  const answer = run("suffix", suffix, (i) => (texts ? texts[1][i] : `suf ${i + 1}`));
  if (side === "left") return [...pad, ...prompt, ...answer];
  return call === "decode" ? [...prompt, ...pad, ...answer] : [...prompt, ...answer, ...pad];
}

/** 1 where a token starts a new block, and the cumulative sum, which is PaliGemma's whole rule. */
export function blocks(settings) {
  const starts = tokens(settings).map(({ kind }) =>
    settings.mode === "causal" ? 1 : settings.mode === "bidirectional" ? 0 : Number(kind === "suffix"));
  let sum = 0;
  return { starts, block: starts.map((start) => (sum += start)) };
}

/** rows[query][key] is 1 where the query can attend to the key. A decode step has one row, for the newest token. */
export function mask(settings) {
  if (isOwn(settings)) return settings.own.rows.map((row) => Uint8Array.from(row, Number));
  if (settings.mode === OWN) return mask(reference(settings));
  const list = tokens(settings), { starts, block } = blocks(settings), S = list.length;
  const real = list.map(({ kind }) => settings.mode === "unmasked-padding" || kind !== "padding");
  const reach = settings.mode === "sliding" ? settings.window : Infinity;
  const rows = [];
  for (let q = firstQuery(settings); q < S; q++) {
    const row = new Uint8Array(S);
    for (let k = 0; k < S; k++) {
      const near = q - k < reach || (!starts[q] && !starts[k]);
      row[k] = q === k || (real[k] && block[k] <= block[q] && near) ? 1 : 0;
    }
    rows.push(row);
  }
  return rows;
}

const total = (s) => s.image + s.prefix + s.suffix + s.padding;
const firstQuery = (s) => (s.call === "decode" ? total(s) - 1 : 0);

// --- sentences about the mask -----------------------------------------------------------------------------------

const COLLAPSE = 12; // longer runs of image and padding tokens are one item

/** The tokens from `start` on as items: {kind, label, from, n}. */
export function items(settings, start = 0) {
  const found = [], counts = { image: settings.image, padding: settings.padding };
  tokens(settings).forEach(({ kind, label }, i) => {
    if (i < start) return;
    const last = found.at(-1);
    if (counts[kind] > COLLAPSE && last?.kind === kind) last.n++;
    else found.push({ kind, label, from: i, n: 1 });
  });
  return found;
}

const span = (item) => (item.n === 1 ? `${item.from}` : `${item.from}–${item.from + item.n - 1}`);
const named = (one, many, item) => `${item.n === 1 ? one : many} ${span(item)} '${item.label}'`;
const number = (n) => n.toLocaleString("en");
const asQuery = (item) => named("query", "queries", item);
const asKey = (item) => named("key", "keys", item);

function count(settings, rows, row, col) {
  const first = firstQuery(settings);
  let allowed = 0;
  for (let q = row.from; q < row.from + row.n; q++)
    for (let k = col.from; k < col.from + col.n; k++) allowed += rows[q - first][k];
  return allowed;
}

/** One sentence: whether the query can attend to the key, and why. Both are items. */
export function explain(settings, row, col) {
  if (settings.mode === OWN) return explainOwn(settings, row, col);
  const allowed = count(settings, mask(settings), row, col), pairs = row.n * col.n;
  if (allowed > 0 && allowed < pairs) {
    const why = col.kind === "padding" && settings.mode !== "unmasked-padding"
      ? "padding is masked, but each padding token attends to itself, because softmax needs at least one key"
      : settings.mode === "causal"
        ? "each attends to itself and to earlier tokens"
        : `the others are outside the window of ${settings.window}`;
    const part = row.n === 1
      ? `can attend to ${number(allowed)} of the ${number(pairs)} ${asKey(col)}`
      : `attend to ${asKey(col)} in ${number(allowed)} of ${number(pairs)} pairs`;
    return `${asQuery(row)} ${part}: ${why}.`;
  }
  const q = row.from + row.n - 1;
  const k = allowed ? col.from : col.from + col.n - 1; // the key that needs the reason most: farthest, or nearest
  const verb = allowed ? "can attend to" : "cannot attend to";
  return `${asQuery(row)} ${verb} ${asKey(col)}: ${reason(settings, q, k, col.n > 1)}.`;
}

/** The same for the learner's function: PaliGemma's reason, or what PaliGemma does instead and why. */
function explainOwn(settings, row, col) {
  const theirs = explain(reference(settings), row, col);
  if (!isOwn(settings) || !differing(settings, mask(settings), mask(reference(settings)), row, col).some(Boolean)) return theirs;
  const allowed = count(settings, mask(settings), row, col), pairs = row.n * col.n, { name } = settings.own;
  const verb = pairs === 1 || allowed === 0 || allowed === pairs
    ? `${allowed ? "can attend to" : "cannot attend to"} ${asKey(col)}`
    : `attend to ${asKey(col)} in ${number(allowed)} of ${number(pairs)} pairs`;
  if (pairs > 1) return `${asQuery(row)} ${verb} in ${name}. In PaliGemma, ${theirs}`;
  return `${asQuery(row)} ${verb} in ${name}. PaliGemma ${allowed ? "blocks" : "allows"} this: ` +
    `${reason(reference(settings), row.from, col.from, false)}.`;
}

/** How many pairs of a cell only the first table allows, and how many only the second. */
function differing(settings, a, b, row, col) {
  const first = firstQuery(settings), found = [0, 0];
  for (let q = row.from - first; q < row.from - first + row.n; q++)
    for (let k = col.from; k < col.from + col.n; k++) if (a[q][k] !== b[q][k]) found[a[q][k] ? 0 : 1]++;
  return found;
}

function reason(settings, q, k, plural) {
  const [it, comes, is] = plural ? ["they", "come", "are"] : ["it", "comes", "is"];
  const { mode, window } = settings, list = tokens(settings), { starts, block } = blocks(settings);
  const [query, key] = [list[q].kind, list[k].kind], behind = q - k, masked = mode !== "unmasked-padding";
  if (q === k && query === "padding" && masked)
    return "a padding token attends to itself, because softmax needs at least one key";
  if (q === k) return "every token attends to itself";
  if (key === "padding" && masked) return `${it} ${is} padding, which is masked`;
  const inPrefix = !starts[q] && !starts[k];
  if (mode === "sliding" && behind >= window && !inPrefix)
    return `${it} ${is} ${behind} steps behind, and a window of ${window} reaches ${window - 1}`;
  if (query === "padding")
    return `block ${block[q]} attends to blocks up to ${block[q]}, and ${it} ${is} in block ${block[k]}. ` +
      "The output of a padding token is not used";
  if (key === "padding" && block[k] <= block[q]) return "padding is not masked, which is the bug";
  if (key === "padding") return `${it} ${comes} later, in the block of the last suffix token`;
  if (mode === "bidirectional") return "every token attends to every token";
  if (mode === "causal") return behind > 0 ? `${it} ${comes} earlier` : `${it} ${comes} later`;
  if (inPrefix && mode === "sliding" && behind >= window)
    return "image and prefix attend to each other at any distance, because the window does not cut there";
  if (inPrefix) return "image and prefix attend to each other fully";
  if (!starts[q]) return `${it} ${comes} later, and image and prefix do not attend to the suffix`;
  if (behind < 0) return `${it} ${comes} later, and the suffix is causal`;
  const near = mode === "sliding" ? `, ${behind} ${behind === 1 ? "step" : "steps"} behind and so inside the window` : "";
  return starts[k] ? `${it} ${comes} earlier in the suffix${near}` : `the suffix attends to image and prefix${near}`;
}

/** How many keys a query attends to, or how many queries attend to a key, by kind. */
export function summarize(settings, row, col) {
  const rows = mask(settings), whole = row ?? col, others = items(settings, row ? 0 : firstQuery(settings));
  const perKind = {};
  let allowed = 0, all = 0;
  for (const other of others) {
    const here = row ? count(settings, rows, row, other) : count(settings, rows, other, col);
    const tally = (perKind[other.kind] ??= [0, 0]);
    tally[0] += here;
    tally[1] += other.n * whole.n;
    allowed += here;
    all += other.n * whole.n;
  }
  const parts = Object.entries(perKind).map(([kind, [a, b]]) => `${number(a)} of ${number(b)} ${kind}`);
  const unit = whole.n > 1 ? "pairs" : row ? "keys" : "queries";
  const verb = row ? (row.n > 1 ? "attend in" : "attends to") : col.n > 1 ? "are attended to in" : "is attended to by";
  const item = row ? asQuery(row) : asKey(col);
  return `${item} ${verb} ${number(allowed)} of ${number(all)} ${unit}: ${parts.join(", ")}.`;
}

/** Alt text of the whole figure. */
export function describe(settings) {
  const rows = mask(settings), allowed = rows.reduce((sum, row) => sum + row.reduce((a, b) => a + b, 0), 0);
  const kinds = Object.keys(LIMITS).filter((kind) => settings[kind]).map((kind) => `${settings[kind]} ${kind}`);
  const pairs = rows.length * total(settings);
  const { name, rule } = about(settings.mode, settings);
  let one = `Attention mask, ${name}, of ${kinds.join(", ")} tokens. ${rule} ` +
    `${number(allowed)} of ${number(pairs)} pairs are allowed.`;
  if (isOwn(settings)) one += ` ${disagreement(settings)}`;
  if (settings.layer !== null && settings.attention) one += ` The attention of ${whose(settings)} is laid over it.`;
  if (!settings.compare) return one;
  return `${one} Beside it ${about(settings.compare, settings).name}: they differ in ${number(difference(settings))} pairs.`;
}

function disagreement(settings) {
  const wrong = difference({ ...settings, compare: settings.own.reference });
  return wrong ? `It differs from PaliGemma's mask in ${number(wrong)} pairs, which are crossed.` : "It equals PaliGemma's mask.";
}

const whose = ({ layer, head }) => `layer ${layer}, ${head === null ? "mean of the heads" : `head ${head}`}`;

function difference(settings) {
  const a = mask(settings), b = mask({ ...settings, mode: settings.compare });
  return a.reduce((sum, row, q) => sum + row.reduce((n, cell, k) => n + (cell !== b[q][k] ? 1 : 0), 0), 0);
}

// --- layout -----------------------------------------------------------------------------------------------------

const WIDTH = 864, SIDE = 532, GAP = 30, STRIP = 14, LARGE = 4, STRIPES = 32; // a run is as large as 4 cells

function axis(list, size) {
  let at = 0;
  return list.map((item) => {
    const place = { ...item, at, size: size * (item.n > 1 ? LARGE : 1) };
    at += place.size;
    return place;
  });
}

const length = (places) => (places.length ? places.at(-1).at + places.at(-1).size : 0);
const textWidth = (text, size) => text.length * size * 0.56;

/** Rows, columns and the corner of each panel, in pixels. */
function layout(settings, panels) {
  const keys = items(settings), queries = items(settings, firstQuery(settings));
  const left = 28 + STRIP + Math.max(...queries.map((item) => textWidth(`${span(item)} ${item.label}`, 12)), 66);
  const space = (panels === 1 ? SIDE : WIDTH) - left - (panels - 1) * (GAP + STRIP);
  const size = Math.max(panels === 1 ? 9 : 4, Math.min(30, space / panels / length(axis(keys, 1))));
  const cols = axis(keys, size), rows = axis(queries, size), font = Math.min(12, Math.max(0, size - 1));
  const labels = Math.max(...keys.map((item) => textWidth(`${span(item)} ${item.label}`, font || 0)), 0);
  const top = 36 + (font < 8 ? 0 : labels + 22) + STRIP;
  const step = length(cols) + GAP + STRIP;
  const corners = Array.from({ length: panels }, (_, i) => left + i * step);
  const width = Math.max(420, corners.at(-1) + length(cols) + 12);
  return { cols, rows, size, font: font < 8 ? 0 : font, left, top, corners, width, foot: top + length(rows) };
}

/** Row and column under a point. -1 means the labels beside the cells. */
function locate({ cols, rows, corners, top }, x, y) {
  const find = (places, at) => places.findIndex((place) => at >= place.at && at < place.at + place.size);
  const row = y < top ? -1 : find(rows, y - top);
  if (y > top && row < 0) return null;
  const corner = corners.findLast((c) => x >= c - STRIP - 4) ?? null;
  const col = corner === null || x < corner ? -1 : find(cols, x - corner);
  if (corner !== null && x >= corner && col < 0) return null;
  return row < 0 && col < 0 ? null : { row, col };
}

// --- drawing: strings of SVG --------------------------------------------------------------------------------------

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const round = (v) => Math.round(v * 100) / 100;
const attributes = (a) => Object.entries(a).map(([k, v]) => ` ${k}="${typeof v === "number" ? round(v) : escape(v)}"`).join("");
const shape = (name, a, inner = "") => `<${name}${attributes(a)}>${inner}</${name}>`;
const rect = (x, y, width, height, a) => shape("rect", { x, y, width: Math.max(0, width), height: Math.max(0, height), ...a });
const text = (x, y, words, a) => shape("text", { x, y, ...a }, escape(words));
const path = (d, a) => (d ? shape("path", { d, ...a }) : "");
const area = (x, y, w, h) => `M${round(x)} ${round(y)}h${round(w)}v${round(h)}h${round(-w)}z`;
const LARGE_DOTS = { stroke: "#B4B4B4", "stroke-linecap": "round", fill: "none" };

// The drawing's colors on a dark page. Saved files keep the light ones; "white" and "black" never change.
const DARK = {
  "#FFFFFF": "#1B1E23", [INK]: "#ECECEC", [GRAY]: "#A9AEB5", [LINE]: "#5F656E", "#DEDEDE": "#3A3F46", "#CFCFCF": "#565C65",
  "#B4B4B4": "#747B84", "#9A9A9A": "#80868F", "#E3E3E3": "#565C65", "#F4F4F4": "#282C32", "#FBE3D6": "#4A2A1A",
  "#D3E6F3": "#17384F",
};
const inDark = (svg) => svg.replace(/"(#[0-9A-F]{6})"/gi, (whole, color) => (DARK[color] ? `"${DARK[color]}"` : whole));

const PATTERNS = shape("defs", {},
  shape("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    rect(0, 0, 6, 6, { fill: "#FFFFFF" }) + rect(0, 0, 1.6, 6, { fill: "#CFCFCF" })) +
  shape("pattern", { id: "only-a", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    rect(0, 0, 5, 5, { fill: "#FBE3D6" }) + rect(0, 0, 2.6, 5, { fill: ONLY_A })) +
  shape("pattern", { id: "only-b", width: 6, height: 6, patternUnits: "userSpaceOnUse" },
    rect(0, 0, 6, 6, { fill: "#D3E6F3" }) + rect(1, 1, 3.6, 3.6, { fill: ONLY_B })));

/** The part of a cell where test(query, key) holds, as a few rectangles in at most STRIPES rows. */
function parts(row, col, test) {
  const n = Math.min(row.n, STRIPES), found = [];
  for (let i = 0; i < n; i++) {
    const q = row.from + Math.floor(((i + 0.5) * row.n) / n);
    for (let k = col.from, end = col.from + col.n; k < end; k++) {
      if (!test(q, k)) continue;
      const start = k;
      while (k + 1 < end && test(q, k + 1)) k++;
      const x0 = (start - col.from) / col.n, x1 = (k + 1 - col.from) / col.n;
      const above = found.at(-1);
      if (above && above.x0 === x0 && above.x1 === x1 && above.y1 === i / n) above.y1 = (i + 1) / n;
      else found.push({ x0, x1, y0: i / n, y1: (i + 1) / n });
    }
  }
  return found;
}

/** All cells where test holds, as one path. */
function fill(plan, corner, test) {
  const inset = plan.size > 8 ? 1 : 0.25;
  let d = "";
  for (const row of plan.rows)
    for (const col of plan.cols) {
      const w = col.size - 2 * inset, h = row.size - 2 * inset;
      for (const { x0, x1, y0, y1 } of parts(row, col, test))
        d += area(corner + col.at + inset + x0 * w, plan.top + row.at + inset + y0 * h, (x1 - x0) * w, (y1 - y0) * h);
    }
  return d;
}

const dots = (plan, corner, test) => plan.rows.map((row) => plan.cols.map((col) => {
  const found = parts(row, col, test); // a large cell has a dot only if all of it is blocked
  if (found.length !== 1 || found[0].x1 - found[0].x0 < 1 || found[0].y1 - found[0].y0 < 1) return "";
  return `M${round(corner + col.at + col.size / 2)} ${round(plan.top + row.at + row.size / 2)}h0`;
}).join("")).join("");

function gridLines({ cols, rows, top }, corner) {
  const w = length(cols), h = length(rows);
  const d = cols.map((c) => `M${round(corner + c.at)} ${round(top)}v${round(h)}`).join("") +
    rows.map((r) => `M${round(corner)} ${round(top + r.at)}h${round(w)}`).join("");
  return path(d, { stroke: "#DEDEDE", "stroke-width": 1, fill: "none" }) +
    rect(corner, top, w, h, { fill: "none", stroke: GRAY, "stroke-width": 1 });
}

/** How many pairs of a large cell are allowed, written into it. */
function tallies(plan, corner, settings, table) {
  let out = "";
  for (const row of plan.rows)
    for (const col of plan.cols) {
      if (row.n * col.n === 1) continue;
      const allowed = count(settings, table, row, col), pairs = row.n * col.n;
      if (!allowed) continue;
      const words = allowed === pairs ? (row.n > 1 && col.n > 1 ? `${row.n} × ${col.n}` : `${pairs}`)
        : `${number(allowed)} of ${number(pairs)}`;
      const size = Math.min(11, row.size - 3);
      if (size < 8 || textWidth(words, size) > col.size - 4) continue;
      const x = corner + col.at + col.size / 2, y = plan.top + row.at + row.size / 2, wide = textWidth(words, size) + 8;
      const style = { "text-anchor": "middle", "font-size": size, fill: allowed === pairs ? "white" : INK };
      if (allowed < pairs) out += rect(x - wide / 2, y - size / 2 - 2, wide, size + 4, { fill: "#FFFFFF", rx: 4 });
      out += text(x, y + size * 0.36, words, style);
    }
  return out;
}

/** Crossed frames on the cells of the learner's mask that differ from PaliGemma's. */
function crosses(plan, corner, settings, table) {
  const theirs = mask(reference(settings)), inset = plan.size > 8 ? 1 : 0.25, d = { extra: "", missing: "" };
  let lines = "";
  for (const row of plan.rows)
    for (const col of plan.cols) {
      const [extra, missing] = differing(settings, table, theirs, row, col);
      if (!extra && !missing) continue;
      const [x, y] = [corner + col.at + inset, plan.top + row.at + inset];
      const [w, h] = [col.size - 2 * inset, row.size - 2 * inset], r = 0.22 * Math.min(w, h);
      if (extra) d.extra += area(x, y, w, h);
      if (missing) d.missing += area(x, y, w, h);
      const [cx, cy] = [round(x + w / 2), round(y + h / 2)].map((c) => round(c - r)), s = round(2 * r);
      lines += `M${cx} ${cy}l${s} ${s}m0 ${-s}l${-s} ${s}`;
    }
  const thin = Math.max(0.6, Math.min(2.2, plan.size / 9)), frame = { fill: "none", stroke: ONLY_A, "stroke-width": thin };
  return path(d.extra, { ...frame, "data-cells": "extra" }) + path(d.missing, { ...frame, "data-cells": "missing" }) +
    path(lines, { fill: "none", stroke: "white", "stroke-width": 2.4 * thin, "stroke-linecap": "round" }) +
    path(lines, { ...frame, "stroke-linecap": "round" });
}

/** How much a query attends to a key, both by their place in the drawing, from 0 to 1. */
function weight({ attention, layer, head }, size, row, col) {
  attention.bytes ??= Uint8Array.from(atob(attention.values), (c) => c.charCodeAt(0));
  const H = attention.shape[1], heads = head === null ? [...Array(H).keys()] : [head];
  const at = (h) => attention.bytes[((layer * H + h) * size + row) * size + col];
  return heads.reduce((sum, h) => sum + at(h), 0) / heads.length / 255;
}

const hasWeights = ({ attention, layer }) => Boolean(attention) && layer !== null;
const percent = (share) => `${(100 * share).toFixed(1)}%`;

/** The weights of all cells: [{row, col, share}], and the largest. */
function weights({ rows, cols }, settings) {
  const all = rows.flatMap((_, row) => cols.map((_, col) => ({ row, col, share: weight(settings, cols.length, row, col) })));
  return { all, largest: Math.max(...all.map(({ share }) => share)) };
}

/** The weights as opacity: the square root of the share of the largest, so that small ones show. */
function overlay(plan, corner, settings, table) {
  const { all, largest } = weights(plan, settings), inset = plan.size > 8 ? 1 : 0.25;
  return all.filter(({ row, col }) => count(settings, table, plan.rows[row], plan.cols[col])).map(({ row, col, share }) =>
    rect(corner + plan.cols[col].at + inset, plan.top + plan.rows[row].at + inset, plan.cols[col].size - 2 * inset,
      plan.rows[row].size - 2 * inset, { fill: ALLOWED, opacity: Math.sqrt(share / largest), "data-weight": `${row} ${col}` })).join("");
}

/** The strips along both sides: the color of the kind, and the number of the block. */
function strips(plan, corner, block) {
  const words = (item) => {
    const [a, b] = [block[item.from], block[item.from + item.n - 1]];
    return a === b ? `${a}` : `${a}–${b}`;
  };
  const cell = (item, x, y, w, h) => {
    const hatch = item.kind === "padding" ? "url(#hatch)" : COLORS[item.kind];
    const label = block && textWidth(words(item), 10) <= w && h >= 10
      ? text(x + w / 2, y + h / 2 + 3.5, words(item),
        { "text-anchor": "middle", "font-size": 10, fill: item.kind === "padding" ? INK : "black" }) : "";
    return rect(x, y, w, h, { fill: hatch, stroke: item.kind === "padding" ? LINE : "none" }) + label;
  };
  const inset = plan.size > 8 ? 0.75 : 0.1;
  return plan.cols.map((c) => cell(c, corner + c.at + inset, plan.top - STRIP - 4, c.size - 2 * inset, STRIP)).join("") +
    plan.rows.map((r) => cell(r, corner - STRIP - 4, plan.top + r.at + inset, STRIP, r.size - 2 * inset)).join("");
}

function labels(plan, corner, first, bright) {
  if (!plan.font) return "";
  const style = (on) => ({ "font-size": plan.font, fill: on === false ? "#9A9A9A" : INK, "font-weight": on ? "600" : "400" });
  const words = (item) => `${span(item)} ${item.label}`;
  const above = plan.cols.map((c, i) => {
    const x = corner + c.at + c.size / 2, y = plan.top - STRIP - 10;
    const turn = { transform: `translate(${round(x + plan.font * 0.36)} ${round(y)}) rotate(-90)` };
    return text(0, 0, words(c), { ...turn, ...style(bright.cols?.has(i)), "data-key": `${i}` });
  });
  const beside = plan.rows.map((r, i) =>
    text(corner - STRIP - 10, plan.top + r.at + r.size / 2 + plan.font * 0.36, words(r),
      { "text-anchor": "end", ...style(bright.rows?.has(i)), "data-query": `${i}` }));
  return above.join("") + (first ? beside.join("") : "");
}

/** Rows and columns whose labels are highlighted, as sets of indices, or null for none. */
function highlighted(view, settings) {
  const at = view.hover ?? (view.pins.length === 1 ? view.pins[0] : null);
  if (!at || view.round) return { rows: null, cols: null };
  const { plan } = view, table = mask(settings), rows = new Set(), cols = new Set();
  if (at.row >= 0) rows.add(at.row);
  if (at.col >= 0) cols.add(at.col);
  if (at.col < 0) plan.cols.forEach((c, i) => count(settings, table, plan.rows[at.row], c) && cols.add(i));
  if (at.row < 0) plan.rows.forEach((r, i) => count(settings, table, r, plan.cols[at.col]) && rows.add(i));
  return { rows, cols };
}

/** The rectangle of a cell, or of a whole row or column if the other index is -1. */
function place(plan, corner, { row, col }) {
  const [c, r] = [plan.cols[col], plan.rows[row]];
  return [corner + (c?.at ?? 0), plan.top + (r?.at ?? 0), c?.size ?? length(plan.cols), r?.size ?? length(plan.rows)];
}

/** Dims everything except the highlighted rows and columns, and frames what is pinned or pointed at. */
function highlights(view, corner, index) {
  const { plan, pins, hover, cursor } = view;
  const lines = [...pins, ...(hover ? [hover] : [])].filter((at) => at.row < 0 || at.col < 0);
  let out = "";
  if (lines.length) {
    const id = `bright-${index}`, whole = place(plan, corner, { row: -1, col: -1 });
    out += shape("mask", { id }, rect(...whole, { fill: "white" }) +
      lines.map((at) => rect(...place(plan, corner, at), { fill: "black" })).join(""));
    out += rect(...whole, { fill: "#FFFFFF", opacity: 0.72, mask: `url(#${id})` });
  }
  const frame = (at, a) => rect(...place(plan, corner, at), { fill: "none", stroke: INK, ...a });
  out += pins.map((at) => frame(at, { "stroke-width": 2.5 })).join("");
  if (hover && hover.row >= 0 && hover.col >= 0)
    out += frame({ row: hover.row, col: -1 }, { "stroke-width": 1, opacity: 0.45 }) +
      frame({ row: -1, col: hover.col }, { "stroke-width": 1, opacity: 0.45 });
  if (hover) out += frame(hover, { "stroke-width": 2, ...(cursor ? { "stroke-dasharray": "4 2" } : {}) });
  return out;
}

/** A numbered badge for every pin, beside its label or in its cell. */
function badges({ plan, pins }, corner, first) {
  return pins.map((at, i) => {
    const [x, y, w, h] = place(plan, corner, at);
    if (at.col < 0 && !first) return "";
    const [cx, cy] = at.col < 0 ? [9, y + h / 2] : at.row < 0 ? [x + w / 2, 34] : [x + w, y];
    const r = Math.min(8, at.row < 0 ? Math.max(5, w / 2) : 8);
    return shape("circle", { cx, cy, r, fill: INK, stroke: "#FFFFFF", "stroke-width": 1.5 }) +
      text(cx, cy + 3.4, `${i + 1}`, { "text-anchor": "middle", "font-size": 9.5, fill: "#FFFFFF", "font-weight": "600" });
  }).join("");
}

const title = (x, words) => text(x, 17, words, { "font-size": 14, "font-weight": "600", fill: INK });

function maskPanel(view, corner, index, settings, name) {
  const { plan } = view, table = mask(settings), first = firstQuery(settings), list = tokens(settings);
  const allows = (q, k) => table[q - first][k] === 1;
  const padded = (q, k) => !allows(q, k) && (list[k].kind === "padding" || list[q].kind === "padding");
  const dot = { ...LARGE_DOTS, "stroke-width": Math.max(1.2, plan.size * 0.13) };
  return shape("g", { "data-panel": name },
    title(corner, name) +
    rect(corner, plan.top, length(plan.cols), length(plan.rows), { fill: "#FFFFFF" }) +
    path(fill(plan, corner, padded), { fill: "url(#hatch)" }) +
    path(fill(plan, corner, allows), { fill: ALLOWED, "data-cells": "allowed", opacity: hasWeights(settings) ? 0.12 : 1 }) +
    (hasWeights(settings) ? overlay(plan, corner, settings, table) : "") +
    path(dots(plan, corner, (q, k) => !allows(q, k) && !padded(q, k)), dot) +
    (hasWeights(settings) ? "" : tallies(plan, corner, settings, table)) + gridLines(plan, corner) +
    (isOwn(settings) ? crosses(plan, corner, settings, table) : "") + strips(plan, corner, blocks(settings).block) +
    labels(plan, corner, index === 0, highlighted(view, settings)) + highlights(view, corner, index));
}

function differencePanel(view, corner, index) {
  const { plan, settings } = view, first = firstQuery(settings);
  const a = mask(settings), b = mask({ ...settings, mode: settings.compare });
  const both = (want, other) => (q, k) => a[q - first][k] === want && b[q - first][k] === other;
  const dot = { ...LARGE_DOTS, "stroke-width": Math.max(1.2, plan.size * 0.13) };
  return shape("g", { "data-panel": "difference" },
    title(corner, `difference: ${number(difference(settings))} pairs`) +
    rect(corner, plan.top, length(plan.cols), length(plan.rows), { fill: "#FFFFFF" }) +
    path(fill(plan, corner, both(1, 1)), { fill: "#E3E3E3" }) +
    path(fill(plan, corner, both(1, 0)), { fill: "url(#only-a)", "data-cells": "only-a" }) +
    path(fill(plan, corner, both(0, 1)), { fill: "url(#only-b)", "data-cells": "only-b" }) +
    path(dots(plan, corner, both(0, 0)), dot) + gridLines(plan, corner) + strips(plan, corner, null) +
    labels(plan, corner, false, highlighted(view, settings)) + highlights(view, corner, index));
}

const TICK = "M-4 0l3 3.4l5.4 -6.6", CROSS = "M-3.6 -3.6l7.2 7.2M3.6 -3.6l-7.2 7.2";

/** A row to predict: question marks and guesses, or after the reveal the mask with a tick or a cross on every cell. */
function roundPanel(view, corner) {
  const { plan, settings, round: game } = view, r = plan.rows[game.row], y = plan.top + r.at + r.size / 2;
  if (game.revealed) {
    const marks = plan.cols.map((c, i) => {
      const right = isRight(view, i), scale = Math.min(1, r.size / 18);
      const at = `translate(${round(corner + c.at + c.size / 2)} ${round(y)}) scale(${round(scale)})`;
      return shape("g", { transform: at, "data-mark": right ? "right" : "wrong" },
        shape("circle", { r: 8, fill: "#FFFFFF", stroke: right ? INK : ONLY_A, "stroke-width": 1.5 }) +
        path(right ? TICK : CROSS, { fill: "none", stroke: right ? INK : ONLY_A, "stroke-width": 2 }));
    });
    return maskPanel(view, corner, 0, settings, about(settings.mode, settings).name) + marks.join("") +
      rect(...place(plan, corner, { row: game.row, col: -1 }), { fill: "none", stroke: INK, "stroke-width": 2.5 });
  }
  const size = Math.min(14, plan.size * 0.6);
  const cells = plan.cols.map((c, i) => {
    const x = corner + c.at + c.size / 2, w = c.size - 4;
    if (!game.guess.has(i))
      return text(x, y + size * 0.36, "?", { "text-anchor": "middle", "font-size": size, fill: GRAY });
    return rect(x - w / 2, y - r.size / 2 + 2, w, r.size - 4, { fill: INK, "data-guess": `${i}` }) +
      shape("g", { transform: `translate(${round(x)} ${round(y)})` },
        path(TICK, { fill: "none", stroke: "#FFFFFF", "stroke-width": 2 }));
  });
  return shape("g", { "data-panel": "predict" },
    title(corner, `${about(settings.mode, settings).name}: predict row ${span(r)}`) +
    rect(corner, plan.top, length(plan.cols), length(plan.rows), { fill: "#F4F4F4" }) +
    rect(...place(plan, corner, { row: game.row, col: -1 }), { fill: "#FFFFFF" }) +
    gridLines(plan, corner) + strips(plan, corner, blocks(settings).block) +
    labels(plan, corner, true, { rows: new Set([game.row]), cols: null }) + cells.join("") +
    rect(...place(plan, corner, { row: game.row, col: -1 }), { fill: "none", stroke: INK, "stroke-width": 2.5 }) +
    highlights({ ...view, pins: [], hover: view.hover?.col >= 0 ? { row: game.row, col: view.hover.col } : null }, corner, 0));
}

function legend(view) {
  const { plan, settings } = view, y0 = plan.foot + 26;
  const tile = (a) => (x, y) => rect(x, y - 10, 12, 12, { stroke: LINE, ...a });
  const blocked = (x, y) => tile({ fill: "#FFFFFF" })(x, y) + path(`M${x + 6} ${y - 4}h0`, { ...LARGE_DOTS, "stroke-width": 3 });
  const kinds = Object.keys(LIMITS).filter((kind) => settings[kind]);
  const light = (x, y) => tile({ fill: "#FFFFFF" })(x, y) + tile({ fill: ALLOWED, opacity: 0.12 })(x, y);
  const cross = (x, y) => tile({ fill: "#FFFFFF", stroke: ONLY_A })(x, y) +
    path(`M${x + 3} ${y - 7}l6 6m0 -6l-6 6`, { stroke: ONLY_A, "stroke-width": 1.5, fill: "none" });
  const entries = hasWeights(settings) && !view.round
    ? [[tile({ fill: ALLOWED }), `largest weight, ${percent(weights(plan, settings).largest)}`], [light, "allowed, weight 0"]]
    : [[tile({ fill: ALLOWED }), "query attends to key"]];
  entries.push([blocked, "blocked"]);
  if (isOwn(settings) && !view.round) entries.push([cross, "differs from PaliGemma"]);
  if (settings.compare && !view.round)
    entries.push([tile({ fill: "url(#only-a)" }), `only ${about(settings.mode, settings).name}`],
      [tile({ fill: "url(#only-b)" }), `only ${about(settings.compare, settings).name}`], [tile({ fill: "#E3E3E3" }), "both"]);
  const strip = kinds.map((kind) => [tile({ fill: kind === "padding" ? "url(#hatch)" : COLORS[kind] }), kind]);
  let x = 12, y = y0, out = "";
  const put = ([draw, words]) => {
    const wide = 18 + textWidth(words, 12) + 16;
    if (x + wide > plan.width) [x, y] = [12, y + 20];
    out += draw(x, y) + text(x + 18, y, words, { "font-size": 12, fill: INK });
    x += wide;
  };
  entries.forEach(put);
  [x, y] = [12, y + 20];
  strip.forEach(put);
  const note = "number: block of the token";
  if (x + textWidth(note, 12) > plan.width) [x, y] = [12, y + 20];
  out += text(x, y, note, { "font-size": 12, fill: GRAY });
  return { out, height: y + 12 };
}

/** The figure as one SVG document. */
function figure(view) {
  const { plan, settings } = view, { compare } = settings;
  const b = { ...settings, mode: compare };
  const names = compare ? [`A  ${about(settings.mode, settings).name}`, `B  ${about(compare, settings).name}`]
    : [about(settings.mode, settings).name];
  let panels;
  if (view.round) panels = roundPanel(view, plan.corners[0]);
  else {
    panels = maskPanel(view, plan.corners[0], 0, settings, names[0]);
    if (compare) panels += maskPanel(view, plan.corners[1], 1, b, names[1]) + differencePanel(view, plan.corners[2], 2);
    panels += plan.corners.map((corner, i) => badges(view, corner, i === 0)).join("");
  }
  const { out, height } = legend(view);
  const axes = plan.font ? text(plan.left - STRIP - 10, plan.top - STRIP - 12, "query ↓   key →",
    { "text-anchor": "end", "font-size": 11, fill: GRAY }) : "";
  const w = Math.ceil(plan.width), h = Math.ceil(height);
  const words = view.round && !view.round.revealed ? "A row of an attention mask to predict." : describe(settings);
  return shape("svg", {
    xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${w} ${h}`, width: w, height: h, role: "img", "aria-label": words,
    "font-family": "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif",
  }, shape("desc", {}, escape(words)) + PATTERNS + rect(0, 0, w, h, { fill: "#FFFFFF" }) + axes + panels + out);
}

// --- predict, then reveal -----------------------------------------------------------------------------------------

const isAllowed = ({ settings, table, plan, round: game }, col) =>
  count(settings, table, plan.rows[game.row], plan.cols[col]) > 0;
const isRight = (view, col) => view.round.guess.has(col) === isAllowed(view, col);

function verdict(view) {
  const { plan, settings, round: game, score } = view;
  const wrong = plan.cols.map((_, i) => i).filter((i) => !isRight(view, i));
  const right = `${plan.cols.length - wrong.length} of ${plan.cols.length} right`;
  const soFar = score.rounds > 1 ? ` In ${score.rounds} rounds: ${score.right} of ${score.cells}.` : "";
  if (!wrong.length) return [`${right}: the whole row.${soFar}`];
  const few = wrong.slice(0, 3).map((i) => sentence(explain(settings, plan.rows[game.row], plan.cols[i])));
  const more = wrong.length > few.length ? [`And ${wrong.length - few.length} more.`] : [];
  return [`${right}.${soFar}`, ...few, ...more];
}

// --- the page -------------------------------------------------------------------------------------------

const sentence = (words) => words[0].toUpperCase() + words.slice(1);

const CSS = `
:host { display: block; }
* { box-sizing: border-box; }
.card { --ink: #222; --paper: #fff; --soft: #f5f6f7; --gray: #595959; --line: #d9d9d9; --edge: #8a8a8a; --blue: #0072B2;
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, Helvetica, Arial, "DejaVu Sans", sans-serif; color: var(--ink);
  color-scheme: light; background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 16px 18px 14px; max-width: 902px; }
.card.dark { --ink: #ececec; --paper: #1b1e23; --soft: #282c32; --gray: #b4b9c0; --line: #3f454d; --edge: #7d848d;
  --blue: #56B4E9; color-scheme: dark; }
h2 { font-size: 18px; line-height: 1.2; margin: 0 0 12px; font-weight: 600; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
legend, .pick span { display: block; padding: 0; font-size: 12px; color: var(--gray); }
.choice { display: inline-flex; flex-wrap: wrap; border: 1px solid var(--edge); border-radius: 6px; overflow: hidden; }
.choice label { position: relative; padding: 4px 11px; cursor: pointer; border-left: 1px solid var(--line); margin-left: -1px; }
.choice input { position: absolute; inset: 0; opacity: 0; margin: 0; cursor: pointer; }
.choice label:has(:checked) { background: var(--ink); color: var(--paper); }
.choice label:has(:focus-visible) { outline: 2px solid var(--blue); outline-offset: -3px; }
.choice label:has(:disabled), .slider:has(:disabled) { opacity: 0.45; cursor: default; }
.rule { margin: 8px 0 2px; min-height: 1.45em; }
.note { margin: 0 0 12px; color: var(--gray); font-size: 13px; }
.sliders { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 4px 18px; margin-bottom: 10px; }
.slider { display: block; font-size: 12px; color: var(--gray); }
.slider span { display: flex; justify-content: space-between; }
.slider b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.slider input { width: 100%; margin: 2px 0 0; accent-color: var(--blue); }
.line { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: end; margin-bottom: 12px; font-size: 13px; }
.more { margin-bottom: 12px; }
.more summary { width: fit-content; padding: 2px 4px; margin-bottom: 6px; cursor: pointer; font-size: 13px; }
select, button { font: inherit; color: inherit; background: var(--paper); border: 1px solid var(--edge); border-radius: 6px;
  padding: 4px 10px; max-width: 100%; }
button { cursor: pointer; }
button:hover { background: var(--soft); }
button.main { background: #0072B2; border-color: #0072B2; color: #fff; }
button.main:hover { background: #005a8d; }
button:focus-visible, select:focus-visible, input:focus-visible, summary:focus-visible { outline: 2px solid var(--blue);
  outline-offset: 2px; }
.stage { display: flex; flex-wrap: wrap; gap: 14px 20px; align-items: flex-start; }
.grid { flex: 0 1 auto; max-width: 100%; border-radius: 6px; outline: 0; }
.grid:focus-visible { box-shadow: 0 0 0 2px var(--blue); }
.grid svg { display: block; max-width: 100%; height: auto; cursor: pointer; user-select: none; touch-action: manipulation; }
.beside { flex: 1 1 250px; min-width: 0; }
.sentence { background: var(--soft); border-left: 3px solid var(--blue); border-radius: 0 6px 6px 0; padding: 9px 12px;
  min-height: 5.4em; }
.sentence p { margin: 0 0 4px; overflow-wrap: anywhere; }
.pins { margin: 10px 0 0; padding: 0; list-style: none; font-size: 13px; }
.pins li { display: flex; gap: 8px; padding: 4px 0; border-top: 1px solid var(--line); align-items: flex-start; }
.pins b { flex: none; width: 17px; height: 17px; border-radius: 9px; background: var(--ink); color: var(--paper);
  font-size: 10.5px; line-height: 17px; text-align: center; margin-top: 2px; }
.pins span { flex: 1; overflow-wrap: anywhere; }
.pins button { border: 0; padding: 0 6px; color: var(--gray); }
.buttons { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 12px; }
.python { display: block; margin-top: 10px; font: 12.5px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.keys { color: var(--gray); font-size: 12px; margin: 10px 0 0; }
[hidden] { display: none !important; }
@media (max-width: 480px) { .card { padding: 12px 10px; } }
`;

const choice = (name, caption, options) => `<fieldset><legend>${caption}</legend><div class="choice">${Object.entries(options)
  .map(([value, words]) => `<label><input type="radio" name="${name}" value="${value}">${words}</label>`).join("")}</div></fieldset>`;
const slider = (name, caption) =>
  `<label class="slider"><span>${caption}<b></b></span><input type="range" name="${name}" aria-label="${caption}"></label>`;
const modeNames = Object.fromEntries(Object.entries(MODES).map(([key, { name }]) => [key, name]));

const pick = (name, caption, options) => `<label class="pick"><span>${caption}</span><select name="${name}">${Object
  .entries(options).map(([value, words]) => `<option value="${value}">${words}</option>`).join("")}</select></label>`;
const numbered = (word, n) => Object.fromEntries(Array.from({ length: n }, (_, i) => [i, `${word} ${i}`]));

/** The page for settings with this `own` and `attention`. Two sliders are in sight, the others under "More". */
function html(settings) {
  const { own, attention } = settings, names = own ? { [OWN]: escape(own.name), ...modeNames } : modeNames;
  const captions = { image: "image tokens" }, all = adjustable(settings).map((name) => slider(name, captions[name] ?? name));
  const [L, H] = attention?.shape ?? [0, 0];
  const menus = attention ? `<div class="line">${pick("layer", "attention of", { "": "none, only the mask", ...numbered("layer", L) })}
${pick("head", "head", { "": "mean of the heads", ...numbered("head", H) })}</div>` : "";
  return `<style>${CSS}</style><section class="card" aria-label="Mask explorer">
<h2>Which token attends to which</h2>
${menus}${choice("mode", "mask", names)}
<p class="rule" aria-live="polite"></p>
<p class="note">The number on a token is its block: a query attends to keys of its own and of earlier blocks.</p>
<div class="sliders">${attention ? "" : all.slice(0, 2).join("")}</div>
<details class="more"><summary>More settings</summary>
<div class="sliders">${attention ? all.join("") : all.slice(2).join("")}</div>
<div class="line">
${attention ? "" : choice("side", "padding on the", { left: "left", right: "right" })}
${choice("call", "queries of", { prefill: "the whole sequence (prefill, training)", decode: "one decode step" })}
${pick("compare", "compare with", { "": "nothing", ...names })}
</div></details>
<div class="stage"><div class="grid" tabindex="0" role="application" aria-label="Attention mask" aria-describedby="help"></div>
<div class="beside"><div class="sentence" aria-live="polite"></div><ol class="pins"></ol>
<div class="buttons"><button class="main" data-do="predict">Predict a row</button><button class="main" data-do="reveal">Reveal</button>
<button class="main" data-do="next">Next row</button><button data-do="end">Back to the mask</button>
<button data-do="unpin">Remove pins</button><button data-do="png">Save PNG</button><button data-do="svg">Save SVG</button>
<button data-do="python">Copy as Python</button></div><output class="python"></output>
<p class="keys" id="help">Keyboard: the arrow keys move, also to the labels. Enter pins, or marks a prediction.
Escape removes the pins, or ends the round.</p></div></div></section>`;
}

/** Whether something that is set lies under "More". */
const needsMore = (s) => Boolean(s.compare) || s.call === "decode" || s.mode === "sliding" ||
  (s.padding > 0 || s.mode === "unmasked-padding") && !adjustable(s).slice(0, 2).includes("padding");

/** JupyterLab says whether its theme is dark, and so do pages that it exports. Elsewhere the system says it. */
function isDark() {
  const theme = (window.frameElement?.ownerDocument ?? document).body.dataset.jpThemeLight;
  return theme ? theme === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** Calls `follow` whenever the theme changes. Returns a function that stops it. */
function watchTheme(follow) {
  const system = matchMedia("(prefers-color-scheme: dark)"), observer = new MutationObserver(follow);
  system.addEventListener("change", follow);
  observer.observe((window.frameElement?.ownerDocument ?? document).body, { attributeFilter: ["data-jp-theme-light"] });
  return () => { system.removeEventListener("change", follow); observer.disconnect(); };
}

/**
 * Shows the explorer in an element. `data` is what explorer.py sends beside the settings. `changed` is called with the
 * settings whenever the learner changes one. If `live`, a kernel then calls the learner's function again. Returns
 * functions that pass on its result, and that stop.
 */
export function mount(element, given, data = {}, changed = () => {}, live = false) {
  element.setAttribute("data-lm-suppress-shortcuts", "true"); // otherwise JupyterLab handles the arrow keys
  const root = element.attachShadow({ mode: "open" });
  const view = { settings: normalize({ ...given, own: data.own, attention: data.attention }), pins: [], hover: null };
  Object.assign(view, { cursor: false, round: null, data, live, mostImages: Math.max(256, given.image) });
  root.innerHTML = html(view.settings);
  const find = (selector) => root.querySelector(selector), grid = find(".grid");
  find(".more").open = needsMore(view.settings);
  view.score = { rounds: 0, right: 0, cells: 0 };

  function update() {
    const { settings } = view, shown = [settings.mode, settings.compare];
    view.waits = shown.includes(OWN) && !isOf(settings.own, settings);
    find(".card").classList.toggle("dark", isDark());
    if (view.waits) return showControls(root, view); // the old drawing stays until the kernel has answered
    view.table = mask(settings);
    view.plan = layout(settings, settings.compare && !view.round ? 3 : 1);
    showControls(root, view);
    draw();
  }

  function draw() {
    grid.innerHTML = isDark() ? inDark(figure(view)) : figure(view);
    const lines = words(view).map((line) => `<p>${escape(line)}</p>`).join("");
    if (find(".sentence").innerHTML !== lines) find(".sentence").innerHTML = lines;
    find(".pins").innerHTML = view.round ? "" : view.pins.map((at, i) => `<li><b>${i + 1}</b><span>${sentences(view, at)
      .map(escape).join("<br>")}</span><button data-unpin="${i}" aria-label="Remove pin ${i + 1}">×</button></li>`).join("");
    find("[data-do=unpin]").hidden = Boolean(view.round) || !view.pins.length;
  }

  function change(name, value) {
    const before = view.settings;
    view.settings = normalize({ ...before, [name]: value });
    const { settings } = view, { own } = settings;
    if (!live && [settings.mode, settings.compare].includes(OWN)) Object.assign(settings, own.of); // all that is known
    if (needsMore(settings) && (name === "mode")) find(".more").open = true;
    find(".python").textContent = "";
    const sameTokens = ["mode", "window", "compare", "layer", "head"].includes(name); // otherwise the pins would point at other tokens
    if (!sameTokens) view.pins = [];
    if (view.round && name !== "compare") view.round = null;
    view.hover = null;
    update();
    changed(plain(settings));
  }

  function point(at, cursor) {
    if (view.cursor === cursor && at?.row === view.hover?.row && at?.col === view.hover?.col) return;
    [view.hover, view.cursor] = [at, cursor];
    draw();
  }

  function press(at) {
    if (view.round) {
      if (view.round.revealed || at.col < 0 || (at.row >= 0 && at.row !== view.round.row)) return;
      if (!view.round.guess.delete(at.col)) view.round.guess.add(at.col);
    } else {
      const old = view.pins.findIndex((pin) => pin.row === at.row && pin.col === at.col);
      if (old >= 0) view.pins.splice(old, 1);
      else view.pins.push(at);
    }
    draw();
  }

  function startRound() {
    const rows = view.plan.rows.map((_, i) => i);
    const real = rows.filter((i) => view.plan.rows[i].kind !== "padding" && i !== view.round?.row);
    const from = real.length ? real : rows;
    view.round = { row: from[Math.floor(Math.random() * from.length)], guess: new Set(), revealed: false };
    view.hover = null;
    update();
  }

  function reveal() {
    view.round.revealed = true;
    view.hover = null;
    const { score, plan } = view, right = plan.cols.filter((_, i) => isRight(view, i)).length;
    view.score = { rounds: score.rounds + 1, right: score.right + right, cells: score.cells + plan.cols.length };
    update();
  }

  const actions = {
    predict: startRound,
    next: startRound,
    reveal,
    end: () => { view.round = null; update(); },
    unpin: () => { view.pins = []; draw(); },
    png: () => savePng(view),
    python: () => {
      const line = python(view.settings, data);
      find(".python").textContent = line;
      navigator.clipboard?.writeText(line).catch(() => {}); // where the page may not, the line can be selected
    },
    svg: () => save(new Blob([exported(view)], { type: "image/svg+xml" }), "mask.svg"),
  };

  root.addEventListener("input", ({ target }) => {
    const number = ["layer", "head"].includes(target.name);
    if (target.tagName === "SELECT") change(target.name, target.value === "" ? null : number ? Number(target.value) : target.value);
    else if (target.name) change(target.name, target.type === "range" ? Number(target.value) : target.value);
  });
  root.addEventListener("click", ({ target }) => {
    if (target.dataset.do) actions[target.dataset.do]();
    if (target.dataset.unpin) { view.pins.splice(Number(target.dataset.unpin), 1); draw(); }
    const next = { reveal: "[data-do=next]", end: "[data-do=predict]" }[target.dataset.do] ?? ".grid";
    if (target.hidden || !target.isConnected) find(next).focus(); // the button has gone, and the focus with it
  });
  const under = (event) => {
    const svg = grid.firstChild, box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    return locate(view.plan, (event.clientX - box.left) * scale, (event.clientY - box.top) * scale);
  };
  grid.addEventListener("pointermove", (event) => point(under(event), false));
  grid.addEventListener("pointerleave", () => point(null, false));
  grid.addEventListener("click", (event) => { const at = under(event); if (at) press(at); });
  grid.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (move) point(moved(view, move), true);
    else if (event.key === "Enter" || event.key === " ") { if (view.hover) press(view.hover); }
    else if (event.key === "Escape") view.round ? actions.end() : actions.unpin();
    else return;
    event.preventDefault();
  });
  update();
  const stop = watchTheme(update);
  const answer = (own) => { view.settings = { ...view.settings, own }; update(); };
  return { answer, stop };
}

/** One step on the grid. The labels are row -1 and column -1. A round stays in its row. */
function moved({ hover, plan, round: game }, [down, right]) {
  if (game && !game.revealed) {
    const col = hover ? hover.col + right : 0;
    return { row: game.row, col: Math.min(plan.cols.length - 1, Math.max(0, col)) };
  }
  if (!hover) return { row: 0, col: 0 };
  const row = Math.min(plan.rows.length - 1, Math.max(-1, hover.row + down));
  const col = Math.min(plan.cols.length - 1, Math.max(-1, hover.col + right));
  return row < 0 && col < 0 ? hover : { row, col };
}

/** A sentence under the choice of masks. */
function ruleOf({ settings, waits, live }) {
  const { mode, padding, own } = settings, { rule } = about(mode, settings);
  if (waits) return `Waiting for the kernel to call ${own.name} …`;
  if (mode === "unmasked-padding" && !padding) return `${rule} There is no padding now, so nothing changes: move its slider.`;
  if (hasWeights(settings)) return `${rule} The color shows the square root of the weight. Weights are stored in ` +
    "256 steps, exact to 0.2 percentage points.";
  if (mode !== OWN) return rule;
  const frozen = live ? "" : " Without a kernel, its sequence cannot change.";
  return `${rule}${own.rows ? ` ${disagreement(settings)}` : ""}${frozen}`;
}

function showControls(root, view) {
  const { settings, round: game } = view, masks = [settings.mode, settings.compare];
  const fixed = !view.live && masks.includes(OWN), sliding = masks.includes("sliding") ||
    (masks.includes(OWN) && settings.own.reference === "sliding");
  for (const input of root.querySelectorAll("input[type=radio]")) {
    input.checked = settings[input.name] === input.value;
    input.disabled = input.name === "side" ? !settings.padding || fixed : input.name === "call" ? fixed : false;
    if (hasWeights(settings)) input.disabled = true;
  }
  for (const input of root.querySelectorAll("input[type=range]")) {
    [input.min, input.max] = input.name === "window" ? [1, total(settings)] : LIMITS[input.name];
    if (input.name === "image") input.max = view.mostImages;
    if (input.name === "suffix" && settings.call === "decode") input.min = 1;
    input.value = settings[input.name];
    input.disabled = fixed || (input.name === "window" && (!sliding || hasWeights(settings)));
    input.parentElement.querySelector("b").textContent = settings[input.name];
  }
  for (const menu of root.querySelectorAll("select")) menu.value = settings[menu.name] ?? "";
  root.querySelector("[name=compare]").disabled = hasWeights(settings);
  if (settings.attention) root.querySelector("[name=head]").disabled = !hasWeights(settings);
  root.querySelector(".rule").textContent = ruleOf(view);
  const shown = { predict: !game, reveal: game && !game.revealed, next: game?.revealed, end: game, png: !game, svg: !game };
  for (const [name, on] of Object.entries(shown)) root.querySelector(`[data-do=${name}]`).hidden = !on;
}

/** Sentences about a cell, row or column, one for each mask shown. */
function sentences({ settings, plan }, { row, col }) {
  const [r, c] = [plan.rows[row], plan.cols[col]];
  return [settings.mode, ...(settings.compare ? [settings.compare] : [])].map((mode) => {
    const s = { ...settings, mode }, words = r && c ? explain(s, r, c) : summarize(s, r, c);
    if (hasWeights(s)) return `${sentence(words)} ${spent(s, plan, row, col)}`.trim();
    return settings.compare ? `${sentence(about(mode, s).name)}: ${words}` : sentence(words);
  });
}

/** The attention of a cell, or the keys that a query attends to most. */
function spent(settings, plan, row, col) {
  if (row < 0) return "";
  if (col >= 0) return `Its weight in ${whose(settings)} is ${percent(weight(settings, plan.cols.length, row, col))}.`;
  const found = plan.cols.map((c, i) => ({ c, share: weight(settings, plan.cols.length, row, i) }));
  const most = found.sort((a, b) => b.share - a.share).slice(0, 3).map(({ c, share }) => `${percent(share)} '${c.label}'`);
  return `Most weight in ${whose(settings)}: ${most.join(", ")}.`;
}

function words(view) {
  const { plan, hover, round: game } = view;
  if (game && !game.revealed) {
    const large = plan.cols.some((c) => c.n > 1) ? " A run counts as a key if any of its tokens is attended to." : "";
    const query = asQuery(plan.rows[game.row]);
    const verb = plan.rows[game.row].n > 1 ? "do" : "does";
    const lines = [`Which keys ${verb} ${query} attend to? Click them, or use the arrow keys and Enter.${large}`];
    const guess = game.guess.has(hover?.col) ? "your prediction is allowed" : "your prediction is blocked";
    if (hover?.col >= 0) lines.push(`${sentence(asKey(plan.cols[hover.col]))}: ${guess}.`);
    return lines;
  }
  if (hover) return sentences(game ? { ...view, settings: { ...view.settings, compare: null } } : view, hover);
  if (game) return verdict(view);
  return ["Point at a query on the left to see which keys it attends to, at a key above to see which queries attend " +
    "to it, or at a cell to see why. Click to pin."];
}

// --- files ------------------------------------------------------------------------------------------------------

const exported = (view) => figure({ ...view, hover: null });

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // the browser reads it after the click
}

function savePng(view) {
  const image = new Image();
  image.onload = () => {
    const canvas = document.createElement("canvas"), scale = 2;
    [canvas.width, canvas.height] = [image.width * scale, image.height * scale];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(blob, "mask.png"), "image/png");
  };
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(exported(view))}`;
}

// --- the state as text --------------------------------------------------------------------------------------------

const START = { image: 4, prefix: 4, suffix: 3, padding: 0, side: "right", window: 4, mode: "prefix-lm", call: "prefill" };
const ARGUMENTS = { image: "image_tokens", side: "padding_side" }; // the others have the names of the settings

/** The settings that explorer.py knows and the learner can change. */
const plain = ({ own, attention, ...settings }) => settings;

/** The call of viz.explore that starts with these settings. */
export function python(settings, { written = [], image = START.image } = {}) {
  const { own, attention, texts } = settings, ofLayer = ["mode", "window", "compare", "call"];
  const start = { ...START, image, mode: own ? OWN : START.mode, compare: null };
  if (texts) [start.prefix, start.suffix] = [settings.prefix, settings.suffix];
  if (hasWeights(settings)) for (const name of ofLayer) start[name] = settings[name];
  if (attention) Object.assign(start, { layer: 0, head: null });
  const changed = Object.keys(start).filter((name) => settings[name] !== start[name]);
  const value = (name) => (settings[name] === null ? "None" : JSON.stringify(settings[name]));
  return `viz.explore(${[...written, ...changed.map((name) => `${ARGUMENTS[name] ?? name}=${value(name)}`)].join(", ")})`;
}

/** What differs from the first settings, for the address of a page. */
export function toHash(settings, first) {
  const names = [...Object.keys(START), "compare", "layer", "head"].filter((name) => settings[name] !== first[name]);
  return new URLSearchParams(names.map((name) => [name, settings[name] ?? ""])).toString();
}

/** The settings with what an address says. What it says of unknown names or with unknown values is ignored. */
export function fromHash(hash, first) {
  const settings = { ...first }, { own, attention } = first, modes = [...Object.keys(MODES), ...(own ? [OWN] : [])];
  const words = { mode: modes, compare: ["", ...modes], side: ["left", "right"], call: ["prefill", "decode"] };
  const [L, H] = attention?.shape ?? [0, 0], numbers = { ...LIMITS, window: [1, 4096], layer: [0, L - 1], head: [0, H - 1] };
  for (const [name, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    const moves = !(name in LIMITS) || adjustable(first).includes(name), range = moves && numbers[name];
    if (words[name]?.includes(text)) settings[name] = text || null;
    else if (range && /^\d+$/.test(text) && range[0] <= text && text <= range[1]) settings[name] = Number(text);
    else if (text === "" && attention && ["layer", "head"].includes(name)) settings[name] = null;
  }
  if ([settings.mode, settings.compare].includes(OWN)) Object.assign(settings, own.of);
  return settings;
}

/** A page of its own keeps its state in its address. In the output of a notebook, it takes the place of the figure. */
export function showPage(element, given, data) {
  const frame = window.frameElement, first = { ...given, own: data.own, attention: data.attention };
  if (!frame) document.documentElement.style.colorScheme = "light dark";
  const changed = (settings) => frame ?? history.replaceState(null, "", `#${toHash(settings, given)}`);
  mount(element, frame ? given : fromHash(location.hash, first), data, changed);
  if (!frame) return addEventListener("hashchange", () => location.reload());
  frame.previousElementSibling.hidden = true;
  new ResizeObserver(() => (frame.style.height = `${document.body.offsetHeight}px`)).observe(document.body);
}

/** What anywidget calls. The settings go back to the model, so that another view of it starts with the same ones. */
function render({ model, el }) {
  const data = model.get("data"), own = model.get("own"), newest = own.name ? { ...data, own } : data;
  const { answer, stop } = mount(el, model.get("settings"), newest, (settings) => {
    model.set("settings", settings);
    model.save_changes();
  }, true);
  const heard = () => answer(model.get("own"));
  model.on("change:own", heard);
  return () => { model.off("change:own", heard); stop(); };
}

export default { render };
