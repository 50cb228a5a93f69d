// The mask explorer: an attention mask to change, to query and to predict. One module without dependencies:
// anywidget calls `render`, a page of its own calls `mount`.
//
// Tokens are numbered by position from 0, as in mask[query, key]. An item is what is drawn as one row or one column: a
// token, or a long run of image or padding tokens.

export const LIMITS = { image: [0, 256], prefix: [1, 16], suffix: [0, 16], padding: [0, 16] };

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

const COLORS = { image: "#56B4E9", prefix: "#E69F00", suffix: "#009E73", padding: "#C8C8C8" };
const ALLOWED = "#0072B2", ONLY_A = "#D55E00", ONLY_B = "#0072B2", INK = "#222222", GRAY = "#6B6B6B", LINE = "#C8C8C8";

// --- the mask ---------------------------------------------------------------------------------------------------

/** Clamps numbers to their limits. A decode step needs a generated token. */
export function normalize(settings) {
  const s = { ...settings };
  for (const [name, [low, high]] of Object.entries(LIMITS)) s[name] = Math.min(high, Math.max(low, Math.round(s[name])));
  if (s.call === "decode") s.suffix = Math.max(1, s.suffix);
  s.window = Math.max(1, Math.round(s.window));
  return s;
}

/** The sequence: [{kind, label}]. In a decode step, the padding of a right-padded prompt is before the answer. */
export function tokens({ image, prefix, suffix, padding, side, call }) {
  const run = (kind, n, label) => Array.from({ length: n }, (_, i) => ({ kind, label: label(i) }));
  const inPrefix = (i) => (i === 0 ? "<bos>" : i === prefix - 1 ? "\\n" : `pre ${i}`);
  const pad = run("padding", padding, () => "<pad>");
  const prompt = [...run("image", image, () => "<image>"), ...run("prefix", prefix, inPrefix)];
  const answer = run("suffix", suffix, (i) => `suf ${i + 1}`);
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
  const one = `Attention mask, ${MODES[settings.mode].name}, of ${kinds.join(", ")} tokens. ${MODES[settings.mode].rule} ` +
    `${number(allowed)} of ${number(pairs)} pairs are allowed.`;
  if (!settings.compare) return one;
  return `${one} Beside it ${MODES[settings.compare].name}: they differ in ${number(difference(settings))} pairs.`;
}

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
      const style = { "text-anchor": "middle", "font-size": size, fill: allowed === pairs ? "#FFFFFF" : INK };
      if (allowed < pairs) out += rect(x - wide / 2, y - size / 2 - 2, wide, size + 4, { fill: "#FFFFFF", rx: 4 });
      out += text(x, y + size * 0.36, words, style);
    }
  return out;
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
      ? text(x + w / 2, y + h / 2 + 3.5, words(item), { "text-anchor": "middle", "font-size": 10, fill: INK }) : "";
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
    out += shape("mask", { id }, rect(...whole, { fill: "#FFFFFF" }) +
      lines.map((at) => rect(...place(plan, corner, at), { fill: "#000000" })).join(""));
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
    path(fill(plan, corner, allows), { fill: ALLOWED, "data-cells": "allowed" }) +
    path(dots(plan, corner, (q, k) => !allows(q, k) && !padded(q, k)), dot) +
    tallies(plan, corner, settings, table) + gridLines(plan, corner) + strips(plan, corner, blocks(settings).block) +
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
    return maskPanel(view, corner, 0, settings, MODES[settings.mode].name) + marks.join("") +
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
    title(corner, `${MODES[settings.mode].name}: predict row ${span(r)}`) +
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
  const entries = [[tile({ fill: ALLOWED }), "query attends to key"], [blocked, "blocked"]];
  if (settings.compare && !view.round)
    entries.push([tile({ fill: "url(#only-a)" }), `only ${MODES[settings.mode].name}`],
      [tile({ fill: "url(#only-b)" }), `only ${MODES[settings.compare].name}`], [tile({ fill: "#E3E3E3" }), "both"]);
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
  const names = compare ? [`A  ${MODES[settings.mode].name}`, `B  ${MODES[compare].name}`] : [MODES[settings.mode].name];
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
:host { display: block; color-scheme: light; }
* { box-sizing: border-box; }
.card { font: 14px/1.45 system-ui, "Segoe UI", Roboto, Helvetica, Arial, "DejaVu Sans", sans-serif; color: #222;
  background: #fff; border: 1px solid #d9d9d9; border-radius: 8px; padding: 16px 18px 14px; max-width: 902px; }
h2 { font-size: 18px; line-height: 1.2; margin: 0 0 12px; font-weight: 600; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
legend, .pick span { display: block; padding: 0; font-size: 12px; color: #595959; }
.choice { display: inline-flex; flex-wrap: wrap; border: 1px solid #b5b5b5; border-radius: 6px; overflow: hidden; }
.choice label { position: relative; padding: 4px 11px; cursor: pointer; border-left: 1px solid #d4d4d4; margin-left: -1px; }
.choice input { position: absolute; inset: 0; opacity: 0; margin: 0; cursor: pointer; }
.choice label:has(:checked) { background: #222; color: #fff; }
.choice label:has(:focus-visible) { outline: 2px solid #0072B2; outline-offset: -3px; }
.choice label:has(:disabled), .slider:has(:disabled) { opacity: 0.45; cursor: default; }
.rule { margin: 8px 0 12px; color: #444; min-height: 1.45em; }
.sliders { display: grid; grid-template-columns: repeat(5, minmax(110px, 1fr)); gap: 4px 18px; margin-bottom: 10px; }
.slider { display: block; font-size: 12px; color: #595959; }
.slider span { display: flex; justify-content: space-between; }
.slider b { color: #222; font-weight: 600; font-variant-numeric: tabular-nums; }
.slider input { width: 100%; margin: 2px 0 0; accent-color: #0072B2; }
.line { display: flex; flex-wrap: wrap; gap: 8px 22px; align-items: end; margin-bottom: 14px; font-size: 13px; }
select, button { font: inherit; color: inherit; background: #fff; border: 1px solid #b5b5b5; border-radius: 6px; padding: 4px 10px; }
button { cursor: pointer; }
button:hover { background: #f0f0f0; }
button.main { background: #0072B2; border-color: #0072B2; color: #fff; }
button.main:hover { background: #005a8d; }
button:focus-visible, select:focus-visible, input:focus-visible { outline: 2px solid #0072B2; outline-offset: 2px; }
.stage { display: flex; flex-wrap: wrap; gap: 14px 20px; align-items: flex-start; }
.grid { flex: 0 1 auto; max-width: 100%; border-radius: 6px; outline: 0; }
.grid:focus-visible { box-shadow: 0 0 0 2px #0072B2; }
.grid svg { display: block; max-width: 100%; height: auto; cursor: pointer; user-select: none; touch-action: manipulation; }
.beside { flex: 1 1 270px; min-width: 240px; }
.sentence { background: #f5f6f7; border-left: 3px solid #0072B2; border-radius: 0 6px 6px 0; padding: 9px 12px; min-height: 5.4em; }
.sentence p { margin: 0 0 4px; overflow-wrap: anywhere; }
.pins { margin: 10px 0 0; padding: 0; list-style: none; font-size: 13px; }
.pins li { display: flex; gap: 8px; padding: 4px 0; border-top: 1px solid #e6e6e6; align-items: flex-start; }
.pins b { flex: none; width: 17px; height: 17px; border-radius: 9px; background: #222; color: #fff; font-size: 10.5px;
  line-height: 17px; text-align: center; margin-top: 2px; }
.pins span { flex: 1; overflow-wrap: anywhere; }
.pins button { border: 0; padding: 0 6px; color: #595959; }
.buttons { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 12px; }
.keys { color: #6b6b6b; font-size: 12px; margin: 10px 0 0; }
[hidden] { display: none !important; }
@media (max-width: 640px) { .sliders { grid-template-columns: repeat(2, 1fr); } }
`;

const choice = (name, caption, options) => `<fieldset><legend>${caption}</legend><div class="choice">${Object.entries(options)
  .map(([value, words]) => `<label><input type="radio" name="${name}" value="${value}">${words}</label>`).join("")}</div></fieldset>`;
const slider = (name, caption) =>
  `<label class="slider"><span>${caption}<b></b></span><input type="range" name="${name}" aria-label="${caption}"></label>`;
const modeNames = Object.fromEntries(Object.entries(MODES).map(([key, { name }]) => [key, name]));

const HTML = `<style>${CSS}</style><section class="card" aria-label="Mask explorer">
<h2>Which token attends to which</h2>
${choice("mode", "mask", modeNames)}
<p class="rule"></p>
<div class="sliders">${slider("image", "image tokens")}${slider("prefix", "prefix")}${slider("suffix", "suffix")}
${slider("padding", "padding")}${slider("window", "window")}</div>
<div class="line">
${choice("side", "padding on the", { left: "left", right: "right" })}
${choice("call", "queries of", { prefill: "the whole sequence (prefill, training)", decode: "one decode step" })}
<label class="pick"><span>compare with</span><select name="compare"><option value="">nothing</option>${Object.entries(modeNames)
  .map(([key, words]) => `<option value="${key}">${words}</option>`).join("")}</select></label>
</div>
<div class="stage"><div class="grid" tabindex="0" role="application" aria-label="Attention mask" aria-describedby="help"></div>
<div class="beside"><div class="sentence" aria-live="polite"></div><ol class="pins"></ol>
<div class="buttons"><button class="main" data-do="predict">Predict a row</button><button class="main" data-do="reveal">Reveal</button>
<button class="main" data-do="next">Next row</button><button data-do="end">Back to the mask</button>
<button data-do="unpin">Remove pins</button><button data-do="png">Save PNG</button><button data-do="svg">Save SVG</button></div>
<p class="keys" id="help">Keyboard: the arrow keys move, also to the labels. Enter pins, or marks a prediction.
Escape removes the pins, or ends the round.</p></div></div></section>`;

/** Shows the explorer in an element. `changed` is called with the settings whenever the learner changes one. */
export function mount(element, given, changed = () => {}) {
  element.setAttribute("data-lm-suppress-shortcuts", "true"); // otherwise JupyterLab handles the arrow keys
  const root = element.attachShadow({ mode: "open" });
  root.innerHTML = HTML;
  const find = (selector) => root.querySelector(selector), grid = find(".grid");
  const view = { settings: normalize(given), pins: [], hover: null, cursor: false, round: null };
  view.score = { rounds: 0, right: 0, cells: 0 };

  function update() {
    const { settings } = view;
    view.table = mask(settings);
    view.plan = layout(settings, settings.compare && !view.round ? 3 : 1);
    showControls(root, view);
    draw();
  }

  function draw() {
    grid.innerHTML = figure(view);
    const lines = words(view).map((line) => `<p>${escape(line)}</p>`).join("");
    if (find(".sentence").innerHTML !== lines) find(".sentence").innerHTML = lines;
    find(".pins").innerHTML = view.round ? "" : view.pins.map((at, i) => `<li><b>${i + 1}</b><span>${sentences(view, at)
      .map(escape).join("<br>")}</span><button data-unpin="${i}" aria-label="Remove pin ${i + 1}">×</button></li>`).join("");
    find("[data-do=unpin]").hidden = Boolean(view.round) || !view.pins.length;
  }

  function change(name, value) {
    const before = view.settings;
    view.settings = normalize({ ...before, [name]: value });
    const sameTokens = ["mode", "window", "compare"].includes(name); // otherwise the pins would point at other tokens
    if (!sameTokens) view.pins = [];
    if (view.round && name !== "compare") view.round = null;
    view.hover = null;
    update();
    changed({ ...view.settings });
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
    svg: () => save(new Blob([exported(view)], { type: "image/svg+xml" }), "mask.svg"),
  };

  root.addEventListener("input", ({ target }) => {
    if (target.name === "compare") change("compare", target.value || null);
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

function showControls(root, { settings, round: game }) {
  const sliding = settings.mode === "sliding" || settings.compare === "sliding";
  for (const input of root.querySelectorAll("input[type=radio]")) input.checked = settings[input.name] === input.value;
  for (const input of root.querySelectorAll("input[type=range]")) {
    [input.min, input.max] = input.name === "window" ? [1, total(settings)] : LIMITS[input.name];
    if (input.name === "suffix" && settings.call === "decode") input.min = 1;
    input.value = settings[input.name];
    input.disabled = input.name === "window" && !sliding;
    input.parentElement.querySelector("b").textContent = settings[input.name];
  }
  for (const input of root.querySelectorAll("input[name=side]")) input.disabled = !settings.padding;
  root.querySelector("select").value = settings.compare ?? "";
  root.querySelector(".rule").textContent = MODES[settings.mode].rule;
  const shown = { predict: !game, reveal: game && !game.revealed, next: game?.revealed, end: game, png: !game, svg: !game };
  for (const [name, on] of Object.entries(shown)) root.querySelector(`[data-do=${name}]`).hidden = !on;
}

/** Sentences about a cell, row or column, one for each mask shown. */
function sentences({ settings, plan }, { row, col }) {
  const [r, c] = [plan.rows[row], plan.cols[col]];
  return [settings.mode, ...(settings.compare ? [settings.compare] : [])].map((mode) => {
    const s = { ...settings, mode }, words = r && c ? explain(s, r, c) : summarize(s, r, c);
    return settings.compare ? `${sentence(MODES[mode].name)}: ${words}` : sentence(words);
  });
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

/** What anywidget calls. The settings go back to the model, so that another view of it starts with the same ones. */
function render({ model, el }) {
  mount(el, model.get("settings"), (settings) => {
    model.set("settings", settings);
    model.save_changes();
  });
}

export default { render };
