// The tensor trace: a pane that shows one tensor at a time, buttons, keys, search, and the numbers behind each image.
// One module without dependencies. It finds the trees that trace_page.py writes, which also unfold without it.
//
// A cell is one pixel of an image and one number of the tensor; it is chosen by [row, column]. Images of large tensors
// have evenly spaced cells.

const AXES = {
  B: "row of the batch", C: "channel", D: "dimension", d: "dimension", H: "head", K: "head", N: "head",
  P: "patch", S: "key", T: "token", V: "vocabulary entry", W: "column",
};
const LEVELS = [0, 16, 239, 255]; // as in trace_figures.py: where the four knots of an image are in its colors

/** Which of n things the i-th of m evenly spaced ones is. */
export const evenly = (i, m, n) => (m > 1 ? Math.floor((i * (n - 1)) / (m - 1)) : 0);

/** The index of a cell in its tensor, whose heads are side by side. A null stands for all of an axis. */
export function indexOf({ shape, colors }, [width, height], [row, column]) {
  const [rows, columns] = shape.slice(-2), heads = shape.length === 4 && !colors ? shape[1] : 1, m = width / heads;
  const last = [evenly(row, height, rows), evenly(column % m, m, columns)];
  if (shape.length < 4) return [0, ...last];
  return [0, colors ? null : Math.floor(column / m), ...last];
}

/** The number that a level of the color scale stands for. */
export function decode(level, knots) {
  const i = level < LEVELS[1] ? 0 : level < LEVELS[2] ? 1 : 2;
  const share = (level - LEVELS[i]) / (LEVELS[i + 1] - LEVELS[i]);
  return knots[i] + share * (knots[i + 1] - knots[i]);
}

const rounded = (value) => `≈ ${String(Number(value.toPrecision(3))).replaceAll("-", "−")}`;

/** A function of [row, column] that reads the image's numbers from its colors. */
function reader(img, palette) {
  const { shape, knots, truth, colors } = JSON.parse(img.dataset.cells), [w, h] = [img.naturalWidth, img.naturalHeight];
  const context = Object.assign(document.createElement("canvas"), { width: w, height: h }).getContext("2d");
  context.drawImage(img, 0, 0);
  const { data } = context.getImageData(0, 0, w, h);
  return ([row, column]) => {
    const [r, g, b] = data.slice(4 * (row * w + column));
    if (colors) {
      const values = [r, g, b].map((byte, i) => rounded(knots[2 * i] + (byte / 255) * (knots[2 * i + 1] - knots[2 * i])));
      return `red ${values[0]}, green ${values[1]}, blue ${values[2]}`;
    }
    const level = palette.get((r << 16) | (g << 8) | b);
    if (level === undefined) return "NaN or infinite";
    if (truth) return level > 127 ? "True" : "False";
    return knots[0] === knots[3] ? `${rounded(knots[0])}` : rounded(decode(level, knots));
  };
}

export function mount(root) {
  if (root.classList.contains("live")) return;
  const { tokens, past, grid, palette: hex, first } = JSON.parse(root.dataset.trace);
  const palette = new Map(hex.match(/.{6}/g).map((color, level) => [parseInt(color, 16), level]));
  const make = (tag, text, parent, properties = {}) => {
    const element = Object.assign(document.createElement(tag), properties);
    if (text) element.textContent = text;
    return parent.appendChild(element);
  };
  const all = (selector) => [...root.querySelectorAll(selector)];
  const tree = root.querySelector(".tree"), entries = all(".entry"), stages = all(".stage"), layers = all(".layer");
  const rows = entries.map((entry) => entry.querySelector("summary"));
  const bodies = entries.map((entry) => entry.querySelector(".body"));
  const texts = entries.map((entry) => entry.dataset.search.toLowerCase());
  let current = -1, found = entries.map((_, i) => i);

  // --- the numbers behind an image ---------------------------------------------------------------------------------

  const readers = new Map();
  const read = (img, cell) => {
    if (!readers.has(img)) readers.set(img, reader(img, palette));
    return readers.get(img)(cell);
  };

  /** In words, where an axis has this index. */
  function place(letter, index, letters, axis) {
    const name = letter === "P" && letters[axis - 1] === "P" ? "key patch" : AXES[letter];
    if (letter === "P") return `${name} ${index} (row ${Math.floor(index / grid)}, column ${index % grid})`;
    if (letter === "T" || letter === "S") {
      const at = letter === "T" ? past + index : index;
      return `${name} ${at} “${tokens[at]}”${past && at >= past ? " (new)" : ""}`;
    }
    return `${letter === "H" && letters.includes("C") ? "row" : name} ${index}`;
  }

  /** Chooses a cell of an image, and of the body's other images of tensors with the same shape. */
  function choose(body, chosen, cell) {
    const meta = JSON.parse(chosen.dataset.cells), { naturalWidth: w, naturalHeight: h } = chosen;
    const [row, column] = [Math.min(h - 1, Math.max(0, cell[0])), Math.min(w - 1, Math.max(0, cell[1]))];
    const index = indexOf(meta, [w, h], [row, column]), letters = meta.letters.split(" ");
    const where = letters.map((letter, i) => (i && index[i] !== null ? place(letter, index[i], letters, i) : null));
    const values = [];
    for (const img of body.querySelectorAll(".cells img")) {
      const alike = String(JSON.parse(img.dataset.cells).shape) === String(meta.shape);
      const { heading } = img.closest("figure").dataset;
      if (alike) values.push(`${heading ? `${heading} ` : ""}${read(img, [row, column])}`);
      const mark = img.parentElement.querySelector(".mark") ?? make("i", "", img.parentElement, { className: "mark" });
      mark.hidden = !alike;
      mark.style.cssText = `left:${(100 * column) / w}%;top:${(100 * row) / h}%;width:${100 / w}%;height:${100 / h}%`;
    }
    body.cell = [row, column];
    body.querySelector(".cell").textContent = `${where.filter(Boolean).join(", ")}: ${values.join("; ")}`;
    const line = body.querySelector(".line");
    line.textContent = `${line.dataset.line}[${index.map((i) => i ?? ":").join(", ")}]`;
  }

  const turns = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  bodies.forEach((body) => {
    const grids = [...body.querySelectorAll(".cells")];
    if (!grids.length) return;
    const hint = make("output", "Values: point at a cell, or focus the image and use the arrow keys.", body, {
      className: "cell",
    });
    body.querySelector(".figures").after(hint);
    for (const element of grids) {
      Object.assign(element, { tabIndex: 0, role: "group" });
      element.setAttribute("aria-label", "Cells of the tensor. The arrow keys choose one, with Shift ten further.");
      const img = element.querySelector("img");
      const point = (event) => {
        const box = img.getBoundingClientRect();
        const part = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
        choose(body, img, [Math.floor(part[0] * img.naturalHeight), Math.floor(part[1] * img.naturalWidth)]);
      };
      element.onpointermove = element.onpointerdown = point;
      element.onfocus = () => element.matches(":focus-visible") && choose(body, img, body.cell ?? [0, 0]);
      element.onkeydown = (event) => {
        const by = turns[event.key];
        if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
        const [row, column] = body.cell ?? [0, 0], far = event.shiftKey ? 10 : 1;
        choose(body, img, [row + far * by[0], column + far * by[1]]);
        event.preventDefault();
        event.stopPropagation();
      };
    }
  });

  // --- one tensor at a time ----------------------------------------------------------------------------------------

  const steps = document.createElement("div");
  steps.className = "steps";
  root.querySelector(".columns").before(steps);
  const jumps = stages.map((stage) => make("button", stage.querySelector("summary .name").textContent, steps, {
    onclick: () => show(entries.findIndex((entry) => stage.contains(entry))),
  }));
  make("span", "", steps, { className: "gap" });
  const search = make("input", "", steps, { type: "search", placeholder: "Search tensors" });
  search.setAttribute("aria-label", "Search tensors");
  const turn = make("span", "", steps, { className: "turn" });
  const previous = make("button", "← Previous", turn), counter = make("output", "", turn);
  const next = make("button", "Next →", turn);
  all(".steps button").forEach((button) => (button.type = "button"));
  previous.onclick = () => move(-1);
  next.onclick = () => move(1);
  const pane = make("div", "", root.querySelector(".columns"));
  Object.assign(pane, { className: "pane", tabIndex: 0 }); // it scrolls, so the keyboard must reach it
  pane.setAttribute("role", "region");
  pane.setAttribute("aria-label", "Tensor");

  const mark = (elements, chosen, value) => elements.forEach((element) => {
    if (element === chosen) element.setAttribute("aria-current", value);
    else element.removeAttribute("aria-current");
  });

  /** The next or previous tensor among those found. */
  const move = (by) => {
    const ahead = by > 0 ? found.find((i) => i > current) : found.findLast((i) => i < current);
    if (ahead !== undefined) show(ahead);
  };

  function count() {
    const at = found.indexOf(current);
    counter.value = !found.length ? "none found" : at < 0 ? `${found.length} found` : `${at + 1} of ${found.length}`;
    previous.disabled = !found.some((i) => i < current);
    next.disabled = !found.some((i) => i > current);
  }

  function show(index) {
    if (index === current) return;
    const onRow = rows.includes(document.activeElement);
    if (current >= 0) entries[current].append(bodies[current]);
    current = index;
    pane.replaceChildren(bodies[current]);
    pane.scrollTop = 0;
    const inside = (branch) => branch.contains(entries[current]);
    stages.filter(inside).forEach((stage) => (stage.open = true));
    layers.forEach((layer) => (layer.open = inside(layer) || Boolean(search.value)));
    mark(rows, rows[current], "step");
    mark(jumps, jumps[stages.findIndex(inside)], "true");
    count();
    if (onRow) rows[current].focus({ preventScroll: true });
    const box = tree.getBoundingClientRect(), at = rows[current].getBoundingClientRect();
    tree.scrollTop += Math.min(0, at.top - box.top - 8) + Math.max(0, at.bottom - box.bottom + 8);
  }

  search.oninput = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    found = entries.flatMap((_, i) => (words.every((word) => texts[i].includes(word)) ? [i] : []));
    entries.forEach((entry, i) => (entry.hidden = !found.includes(i)));
    for (const branch of [...layers, ...stages]) {
      branch.hidden = !branch.querySelector(".entry:not([hidden])");
      branch.open = search.value ? true : branch.contains(entries[current]) || stages.includes(branch);
    }
    count();
  };
  search.onkeydown = (event) => {
    if (event.key === "Enter" && found.length) show(found[0]);
  };

  rows.forEach((row, index) => {
    const thumb = document.createElement("img");
    Object.assign(thumb, { src: bodies[index].querySelector("figure:last-child img").src, className: "thumb", alt: "" });
    row.prepend(thumb);
    row.onclick = (event) => { event.preventDefault(); show(index); };
  });
  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const listener = root.parentElement === document.body ? document : root;
  listener.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target === search && !["ArrowDown", "ArrowUp"].includes(event.key);
    if (event.key.length === 1 || typing) event.stopPropagation(); // in JupyterLab, d pressed twice deletes the cell
    if (typing) return;
    if (event.key in moves) move(moves[event.key]);
    else if (event.key === "Home" && found.length) show(found[0]);
    else if (event.key === "End" && found.length) show(found.at(-1));
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  counter.setAttribute("aria-live", "polite");
  entries.forEach((entry) => (entry.open = false));
  root.tabIndex = 0;
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Tensor trace. The arrow keys move from tensor to tensor.");
  root.classList.add("live");
  show(first);
}

document.querySelectorAll(".minivlm-trace").forEach(mount);
