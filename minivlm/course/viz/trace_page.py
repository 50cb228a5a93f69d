"""A tensor trace as a tree: as plain text, as HTML to step through, and as a whole page.

The HTML is a tree of <details>, which open and close without a script and pass through the sanitizers of notebooks.
If scripts can run, buttons, arrow keys and a pane that shows one tensor at a time are added. Nothing is loaded.
"""

import base64
from collections.abc import Sequence
from html import escape

from minivlm.course.viz.figure import Figure
from minivlm.course.viz.text import number, percent
from minivlm.course.viz.trace_data import Entry, magnification, tree
from minivlm.course.viz.trace_figures import BARS, compact

STYLE = """
.minivlm-trace { box-sizing: border-box; max-width: 62rem; padding: 1rem 1.25rem; border: 1px solid #ddd;
  border-radius: 8px; background: #fff; color: #222; font: 14px/1.4 system-ui, sans-serif; color-scheme: light; }
.minivlm-trace * { box-sizing: border-box; }
.minivlm-trace:focus-visible, .minivlm-trace :focus-visible { outline: 2px solid #0072B2; outline-offset: 1px; }
.minivlm-trace p { margin: 0 0 .6rem; }
.minivlm-trace p code { padding: 0; background: none; color: inherit; font: 13px/1.4 ui-monospace, monospace; }
.minivlm-trace .title { font-weight: 600; font-size: 16px; }
.minivlm-trace .muted, .minivlm-trace .size, .minivlm-trace figcaption { color: #666; font-size: 12.5px; }
.minivlm-trace .overview { max-width: 100%; height: auto; margin: .25rem 0 .75rem; }
.minivlm-trace summary { padding: 2px 6px; border-radius: 5px; cursor: pointer; }
.minivlm-trace summary:hover { background: #f3f3f3; }
.minivlm-trace .stage > summary { font-weight: 600; }
.minivlm-trace .stage details { margin-left: 1rem; }
.minivlm-trace .size { float: right; margin-left: 1rem; font-variant-numeric: tabular-nums; }
.minivlm-trace figure { margin: .75rem 0; }
.minivlm-trace figure img { display: block; max-width: 100%; height: auto; margin: 0 0 .4rem;
  image-rendering: pixelated; }
.minivlm-trace table { margin: 0; border-collapse: collapse; font-size: 13px; }
.minivlm-trace table tbody tr, .minivlm-trace table tbody tr:nth-child(odd) { background: none; }
.minivlm-trace table tr th, .minivlm-trace table tr td { padding: 2px 1.25rem 2px 0; border: 0; text-align: left;
  vertical-align: top; }
.minivlm-trace table tr th { color: #666; font-weight: 400; white-space: nowrap; }
.minivlm-trace .body { padding: .25rem 0 .75rem 1.25rem; }
.minivlm-trace.live .overview { display: none; }
.minivlm-trace.live .columns { display: grid; grid-template-columns: minmax(15rem, 23rem) minmax(0, 1fr); gap: 1.5rem; }
.minivlm-trace.live .tree { height: 34rem; overflow: auto; padding: 2px; border-right: 1px solid #eee; }
.minivlm-trace.live .pane { height: 34rem; overflow: auto; padding: 2px; }
.minivlm-trace.live .pane .body { padding: 0; }
.minivlm-trace.live .entry > summary { list-style: none; display: flex; align-items: center; gap: .5rem; }
.minivlm-trace.live .entry > summary::-webkit-details-marker { display: none; }
.minivlm-trace.live .entry .size { margin-left: auto; white-space: nowrap; }
.minivlm-trace .thumb { flex: none; width: 18px; height: 18px; margin: 0; border-radius: 3px; object-fit: cover; }
.minivlm-trace [aria-current], .minivlm-trace .steps [aria-current] { background: #0072B2; color: #fff; }
.minivlm-trace [aria-current] .size { color: #fff; }
.minivlm-trace .steps { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem; margin: .25rem 0 .9rem; }
.minivlm-trace .steps button { padding: 3px 10px; border: 1px solid #ccc; border-radius: 999px; background: #fff;
  color: #222; font: inherit; font-size: 13px; cursor: pointer; }
.minivlm-trace .steps button:hover { border-color: #0072B2; }
.minivlm-trace .steps button:disabled { color: #767676; border-color: #e5e5e5; cursor: default; }
.minivlm-trace .steps .gap { flex: 1; }
.minivlm-trace .steps output { min-width: 5.5em; padding: 0; text-align: center; font-variant-numeric: tabular-nums; }
@media (max-width: 44rem) {
  .minivlm-trace.live .columns { grid-template-columns: minmax(0, 1fr); }
  .minivlm-trace.live .tree { order: 1; height: auto; max-height: 16rem; border-right: 0; border-top: 1px solid #eee; }
  .minivlm-trace.live .pane { height: auto; }
}
@media print { .minivlm-trace.live .tree, .minivlm-trace.live .pane { height: auto; overflow: visible; } }
"""

SCRIPT = """
(() => {
  const root = document.currentScript.closest(".minivlm-trace");
  if (!root || root.classList.contains("live")) return;
  const make = (tag, text, parent) => {
    const element = document.createElement(tag);
    element.textContent = text;
    return parent.appendChild(element);
  };
  const all = (selector) => [...root.querySelectorAll(selector)];
  const tree = root.querySelector(".tree"), entries = all(".entry"), stages = all(".stage"), layers = all(".layer");
  const rows = entries.map((entry) => entry.querySelector("summary"));
  const bodies = entries.map((entry) => entry.querySelector(".body"));
  let current = -1;

  const steps = document.createElement("div");
  steps.className = "steps";
  root.querySelector(".columns").before(steps);
  const jumps = stages.map((stage) => {
    const jump = make("button", stage.querySelector("summary .name").textContent, steps);
    jump.onclick = () => show(entries.findIndex((entry) => stage.contains(entry)));
    return jump;
  });
  make("span", "", steps).className = "gap";
  const previous = make("button", "← Previous", steps), counter = make("output", "", steps);
  const next = make("button", "Next →", steps);
  all(".steps button").forEach((button) => (button.type = "button"));
  counter.setAttribute("aria-live", "polite");
  previous.onclick = () => show(current - 1);
  next.onclick = () => show(current + 1);
  const pane = make("div", "", root.querySelector(".columns"));
  Object.assign(pane, { className: "pane", tabIndex: 0 });  // it scrolls, so the keyboard must reach it
  pane.setAttribute("role", "region");
  pane.setAttribute("aria-label", "Tensor");

  const mark = (elements, chosen, value) => elements.forEach((element) => {
    if (element === chosen) element.setAttribute("aria-current", value);
    else element.removeAttribute("aria-current");
  });

  function show(index) {
    if (index < 0 || index >= entries.length || index === current) return;
    const onRow = rows.includes(document.activeElement);
    if (current >= 0) entries[current].append(bodies[current]);
    current = index;
    pane.replaceChildren(bodies[current]);
    pane.scrollTop = 0;
    const inside = (branch) => branch.contains(entries[current]);
    stages.filter(inside).forEach((stage) => (stage.open = true));
    layers.forEach((layer) => (layer.open = inside(layer)));
    mark(rows, rows[current], "step");
    mark(jumps, jumps[stages.findIndex(inside)], "true");
    counter.value = `${current + 1} of ${entries.length}`;
    previous.disabled = current === 0;
    next.disabled = current === entries.length - 1;
    if (onRow) rows[current].focus({ preventScroll: true });
    const box = tree.getBoundingClientRect(), at = rows[current].getBoundingClientRect();
    tree.scrollTop += Math.min(0, at.top - box.top - 8) + Math.max(0, at.bottom - box.bottom + 8);
  }

  rows.forEach((row, index) => {
    const thumb = document.createElement("img");
    thumb.src = bodies[index].querySelector("img").src;
    thumb.className = "thumb";
    thumb.alt = "";
    row.prepend(thumb);
    row.onclick = (event) => { event.preventDefault(); show(index); };
  });
  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const listener = root.parentElement === document.body ? document : root;
  listener.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key.length === 1) event.stopPropagation(); // in JupyterLab, pressing d twice deletes the cell
    if (event.key in moves) show(current + moves[event.key]);
    else if (event.key === "Home") show(0);
    else if (event.key === "End") show(entries.length - 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  entries.forEach((entry) => (entry.open = false));
  root.tabIndex = 0;
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Tensor trace. The arrow keys move from tensor to tensor.");
  root.classList.add("live");
  show(0);
})();
"""


# --- plain text ----------------------------------------------------------------------------------------------------


def as_text(tokens: str, entries: Sequence[Entry]) -> str:
    """The tree with one line per tensor: name, shape, dtype, range."""
    lines = [f"{tokens} → {len(entries)} tensors"]
    add_branches(lines, "", tree(entries))
    return "\n".join(lines)


def add_branches(lines: list[str], indent: str, branches: list) -> None:
    """Appends the lines of some branches, which are entries or (name, branches)."""
    for i, branch in enumerate(branches):
        is_last = i == len(branches) - 1
        start = f"{indent}{'└─' if is_last else '├─'} "
        if isinstance(branch, Entry):
            broken = f", {percent(branch.stats.broken)} NaN or infinite" if branch.stats.broken else ""
            start += branch.label
            lines.append(f"{start:<38} {branch.shape_text:<24} {branch.dtype:<8} {branch.range}{broken}")
        else:
            lines.append(start + branch[0])
            add_branches(lines, indent + ("   " if is_last else "│  "), branch[1])


# --- HTML ----------------------------------------------------------------------------------------------------------


def as_html(tokens: str, entries: Sequence[Entry], overview: Figure) -> str:
    """The tree for a notebook's output: style, tree, script."""
    stages = "".join(
        f'<details class="stage" open><summary><span class="name">{stage}</span></summary>'
        f"{''.join(map(html_branch, branches))}</details>"
        for stage, branches in tree(entries)
    )
    return (
        f'<div class="minivlm-trace"><style>{STYLE}</style>'
        f'<p class="title">One forward pass of PaliGemma, {len(entries)} tensors</p>'
        f'<p class="muted"><code>{escape(tokens)}</code></p>'
        f"{img(overview, overview.image.width, 'overview')}"
        f'<div class="columns"><div class="tree">{stages}</div></div>'
        f"<script>{SCRIPT}</script></div>"
    )


def as_page(prompt: str, html: str) -> str:
    """A page around the HTML, with a policy that keeps the browser from loading anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Tensor trace: {escape(prompt)}</title></head><body>{html}</body></html>\n"
    )


def html_branch(branch: Entry | tuple[str, list[Entry]]) -> str:
    """An entry, folded to its name and shape, or a layer with its entries."""
    if not isinstance(branch, Entry):
        return f'<details class="layer"><summary>{branch[0]}</summary>{"".join(map(html_branch, branch[1]))}</details>'
    image = branch.figure.image
    width = image.width * (1 if image.size == BARS else magnification(image))
    size = " × ".join(map(str, branch.shape))
    return (
        f'<details class="entry"><summary><span>{branch.label}</span> <span class="size">{size}</span></summary>'
        f'<div class="body"><p class="title">{escape(branch.title)}</p><p class="muted"><code>{branch.name}</code></p>'
        f"<figure>{img(branch.figure, width)}<figcaption>{escape(branch.caption)}</figcaption></figure>"
        f"<table><tbody>{facts(branch)}</tbody></table></div></details>"
    )


def facts(entry: Entry) -> str:
    """The rows of an entry's table."""
    s = entry.stats
    lines = {
        "shape": entry.shape_text,
        "dtype": entry.dtype,
        "range": entry.range,
        "mean ± std": f"{number(s.mean)} ± {number(s.std)}",
        "NaN or infinite": percent(s.broken) if s.broken else "none",
        "explained in": f"chapter {entry.step.chapter:02d}, {entry.step.module}",
    }
    return "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in lines.items())


def img(figure: Figure, width: int, kind: str = "") -> str:
    """The figure as an element of the page."""
    data = base64.b64encode(compact(figure)).decode()
    attributes = f'class="{kind}" ' if kind else ""
    return f'<img {attributes}src="data:image/png;base64,{data}" alt="{escape(figure.alt)}" width="{width}">'
