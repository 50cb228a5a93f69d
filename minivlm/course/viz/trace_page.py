"""A tensor trace as a tree: as plain text, as HTML to step through, and as a whole page.

The HTML is a tree of <details>, which open and close without a script and pass through the sanitizers of notebooks.
If scripts can run, trace.js adds buttons, keys, search, and a pane that shows one tensor at a time and its numbers.
Nothing is loaded.
"""

import base64
import json
import os
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from minivlm import hub
from minivlm.course.viz.figure import Figure
from minivlm.course.viz.text import percent
from minivlm.course.viz.trace_data import Drawing, Step, tree
from minivlm.course.viz.trace_figures import COLORS, compact

PACKAGE = Path(__file__).resolve().parents[2]
NOTEBOOKS = hub.DATA.parent / "notebooks"  # in a clone; a wheel has none
FILES = {
    3: "03_patch_embedding.ipynb",
    4: "04_processor.ipynb",
    5: "05_prefix_lm_mask.ipynb",
    6: "06_gemma_decoder.ipynb",
    7: "07_kv_cache.ipynb",
    8: "08_inference.ipynb",
}


@cache
def read(ending: str) -> str:
    """The text of trace.css or trace.js."""
    return Path(__file__).with_name(f"trace.{ending}").read_text(encoding="utf-8")


# --- plain text ----------------------------------------------------------------------------------------------------


def as_text(title: str, entries: Sequence) -> str:
    """The tree with one line per tensor."""
    lines = [title]
    add_branches(lines, "", tree(entries))
    return "\n".join(lines)


def add_branches(lines: list[str], indent: str, branches: list) -> None:
    """Appends the lines of some branches, which are entries or (name, branches)."""
    for i, branch in enumerate(branches):
        is_last = i == len(branches) - 1
        start = f"{indent}{'└─' if is_last else '├─'} "
        if isinstance(branch, tuple):
            lines.append(start + branch[0])
            add_branches(lines, indent + ("   " if is_last else "│  "), branch[1])
        else:
            lines.append(f"{start + branch.step.label:<38} {branch.line}")


# --- HTML ----------------------------------------------------------------------------------------------------------


def as_html(
    title: str,
    notes: Sequence[str],
    entries: Sequence,
    overview: Figure,
    settings: dict[str, Any],
    folder: Path,
    **more,
) -> str:
    """The tree for a notebook's output: style, tree, script.

    Args:
        title: The line at the top.
        notes: HTML of the paragraphs below it.
        entries: The tensors.
        overview: What is shown where scripts cannot run.
        settings: What trace.js needs besides the tree: the tokens, how many of them are in the cache, patches per row
            of the image, and the index of the first tensor to show.
        folder: Where the page or notebook is, for its links.
        more: ``variable``, the name of the trace in lines of Python, and ``below``, HTML below the tree.
    """
    variable, below = more.get("variable", "trace"), more.get("below", "")
    stages = "".join(
        f'<details class="stage" open><summary><span class="name">{stage}</span></summary>'
        f"{''.join(html_branch(branch, folder, variable) for branch in branches)}</details>"
        for stage, branches in tree(entries)
    )
    settings = settings | {"palette": COLORS.tobytes().hex()}
    return (
        f'<div class="minivlm-trace" data-trace="{escape(json.dumps(settings))}"><style>{read("css")}</style>'
        f'<p class="title">{escape(title)}</p>{"".join(f"<p>{note}</p>" for note in notes)}'
        f'<div class="overview">{overview.html()}</div>'
        f'<div class="columns"><div class="tree">{stages}</div></div>{below}'
        f'<script type="module">{read("js")}</script></div>'
    )


def as_page(title: str, html: str) -> str:
    """A page around the HTML, with a policy that keeps the browser from loading anything."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        "<style>:root { color-scheme: light dark; }</style>"
        f"<title>Tensor trace: {escape(title)}</title></head><body>{html}</body></html>\n"
    )


def words_table(tokens: Sequence[str], rows: Sequence[Sequence[Sequence[tuple[str, float]]]]) -> str:
    """A table of next words: one row per layer, one column per token, bold where the last layer says the same."""

    def cell(likely: Sequence[tuple[str, float]], last: Sequence[tuple[str, float]]) -> str:
        if not likely:
            return "<td>NaN</td>"
        (token, p), tag = likely[0], "b" if last and likely[0][0] == last[0][0] else "span"
        return f"<td><{tag}>{escape(token)}</{tag}> {percent(p)}</td>"

    head = "".join(f"<th>{escape(token)}</th>" for token in tokens)
    body = "".join(
        f"<tr><th>layer {i}</th>{''.join(map(cell, row, rows[-1]))}</tr>" for i, row in reversed(list(enumerate(rows)))
    )
    return (
        '<details class="words" open><summary>Next words at every layer</summary><div class="body">'
        "<p>If the decoder ended after a layer, which token would most likely follow each token? The final norm and "
        "the output head read the residual stream there. Bold: as after the last layer. "
        "<code>trace.next_words(layer=0, position=0)</code> answers for any position, the image's too.</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="Next words"><table>'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></div></details>"
    )


def html_branch(branch: Any, folder: Path, variable: str) -> str:
    """An entry, folded to its name and shape, or a layer with its entries."""
    if isinstance(branch, tuple):
        inside = "".join(html_branch(entry, folder, variable) for entry in branch[1])
        return f'<details class="layer"><summary>{branch[0]}</summary>{inside}</details>'
    step, line = branch.step, escape(f'{variable}.tensor("{branch.step.name}")')
    drawings = "".join(html_drawing(heading, drawing) for heading, drawing in branch.drawings)
    search = f"{step.name} {step.title} {step.module}"
    facts = {name: escape(value) for name, value in branch.facts.items()} | {"explained in": source(step, folder)}
    table = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in facts.items())
    return (
        f'<details class="entry" data-search="{escape(search)}"><summary><span>{step.label}</span> '
        f'<span class="size">{branch.size}</span></summary>'
        f'<div class="body"><p class="title">{escape(step.title)}</p>'
        f'<p class="muted"><code class="line" data-line="{line}">{line}</code></p>'
        f'<div class="figures">{drawings}</div><table><tbody>{table}</tbody></table></div></details>'
    )


def html_drawing(heading: str, drawing: Drawing) -> str:
    """The figure of an entry, with its caption, and what trace.js needs to read its numbers."""
    figure, (width, _) = drawing.figure, drawing.figure.size
    data = base64.b64encode(compact(figure)).decode()
    cells = f' data-cells="{escape(json.dumps(drawing.cells))}"' if drawing.cells else ""
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(figure.alt)}" width="{width}"{cells}>'
    kind = ' class="cells"' if drawing.cells else ""
    above = f"<b>{heading}</b>" if heading else ""
    return (
        f'<figure data-heading="{heading}" style="width: {width}px; max-width: 100%">{above}<div{kind}>{image}</div>'
        f"<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def source(step: Step, folder: Path) -> str:
    """The chapter and the module of a step, as links from the folder of a page where there are such files."""
    name, module = FILES[step.chapter], PACKAGE.joinpath(*step.module.split(".")[1:]).with_suffix(".py")
    chapter = folder / name if (folder / name).is_file() else NOTEBOOKS / name  # in a copy, the learner's own
    links = ((f"chapter {step.chapter:02d}", chapter), (step.module, module))
    return ", ".join(linked(text, path, folder) for text, path in links)


def linked(text: str, path: Path, folder: Path) -> str:
    """The text as a link to a file of the clone; just the text in an installed package."""
    if not (NOTEBOOKS.is_dir() and path.is_file()):
        return text
    try:
        return f'<a href="{escape(Path(os.path.relpath(path, folder)).as_posix())}">{text}</a>'
    except ValueError:  # on another drive
        return text
