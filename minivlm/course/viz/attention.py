"""Attention masks, one or several, and the attention weights of a model.

T queries, one per row · S keys, one per column · the queries are the last T of the S tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from minivlm.course.viz.drawing import rectangle, scale_bar, sheet, styled, write
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.inputs import Numbers, check_array
from minivlm.course.viz.style import BLUE, GRAY, INK, KINDS, LIGHT, SMALL, VERMILION, WIDTH, cividis, text_color
from minivlm.course.viz.text import count, fit, listed, number, text_width, titled, visible
from minivlm.course.viz.tokens import Run, Token, runs, stretches

ALLOWED, MOST_CELLS = BLUE, 1_000_000
KIND_OF_TEXT = {"<image>": "image", "<pad>": "padding", "<bos>": "bos", "<eos>": "eos", "\n": "newline"}
Tokens = Sequence[str] | Sequence[Token]


@dataclass
class Grid:
    """Runs of queries and keys, and the edges of their cells in pixels."""

    queries: list[Run]
    keys: list[Run]
    x: np.ndarray
    y: np.ndarray

    def area(self, i: Integral, j: Integral) -> tuple[Real, Real, Real, Real]:
        """x0, y0, x1, y1 of the cell of query run i and key run j."""
        return self.x[j], self.y[i], self.x[j + 1], self.y[i + 1]


@styled
def attention_mask(mask: Numbers, tokens: Tokens | None = None, title: str | None = None) -> Figure:
    """Which token attends to which: a cell is filled if the query (row) can attend to the key (column).

    Runs of image and padding tokens are drawn as one large cell, which is filled from below up to the share of its
    pairs that are allowed. Padding is hatched.

    Args:
        mask: [T, S], True (or not 0) where the query can attend to the key.
        tokens: S Tokens or S strings. Default: the positions.
        title: A line above.

    Raises:
        ValueError: If the mask does not have two dimensions, it has more queries than keys, or there are not S tokens.
    """
    mask = check_mask("mask", mask)
    tokens = as_tokens(tokens, mask.shape[1])
    figure, axes, grid = new_grid(mask.shape, tokens, title, foot=44)
    shares = means(mask, grid)
    draw_cells(axes, grid, shares)
    draw_legend(axes, grid.y[-1] + 26, shares, grid)
    return from_figure(figure, describe_mask(mask, tokens))


@styled
def compare_masks(masks: Mapping[str, Numbers], tokens: Tokens | None = None, title: str | None = None) -> Figure:
    """Masks of the same tokens side by side. A frame marks every cell that differs from the first mask.

    Args:
        masks: Two to six names, each with a mask [T, S]. All have the same shape.
        tokens: As for ``attention_mask``.
        title: A line above.

    Raises:
        ValueError: If there are fewer than two or more than six masks, their shapes differ, or there are not S tokens.
    """
    if not 2 <= len(masks) <= 6:
        raise ValueError(f"compare_masks needs two to six masks, not {len(masks)}.")
    tables = {name: check_mask(f"the mask {name!r}", mask) for name, mask in masks.items()}
    first = next(iter(tables.values()))
    if any(table.shape != first.shape for table in tables.values()):
        raise ValueError(f"The masks have different shapes: {listed([str(list(t.shape)) for t in tables.values()])}.")
    tokens = as_tokens(tokens, first.shape[1])
    columns = min(3 if len(tables) != 4 else 2, len(tables))
    lines = -(-len(tables) // columns)
    names = 24 + 96  # pixels for the names of the queries, left of the first panel of a line
    width = (WIDTH - names - 12) / columns
    panel = make_grid(first.shape, tokens, 0, 0, width - 24)
    height = 30 + label_height(panel) + panel.y[-1] + 14
    figure, axes, top = sheet(lines * height + 34, title, margin=0)
    for k, (name, table) in enumerate(tables.items()):
        x0, y0 = names + k % columns * width, top + k // columns * height
        write(axes, x0, y0 + 16, fit(name, width - 20, 14), 14, ha="left", fontweight="bold")
        grid = make_grid(first.shape, tokens, x0, y0 + 30 + label_height(panel), width - 24)
        draw_names(axes, grid, queries=k % columns == 0)
        draw_cells(axes, grid, means(table, grid), differs=means(table != first, grid))
    shares = np.concatenate([means(table, panel).ravel() for table in tables.values()])
    draw_legend(axes, top + lines * height + 14, shares, panel, different=True)
    return from_figure(figure, describe_difference(tables, tokens))


@styled
def attention_over_mask(
    weights: Numbers,
    mask: Numbers,
    tokens: Tokens | None = None,
    title: str | None = None,
    query: Integral | None = None,
) -> Figure:
    """Attention weights over the mask: brighter cells have more weight, crossed cells are blocked.

    The cell of a collapsed run shows the summed weight of its keys, averaged over its queries.

    Args:
        weights: [T, S], at least 0: one head's weights, or the mean of several heads.
        mask: [T, S], as for ``attention_mask``.
        tokens: As for ``attention_mask``.
        title: A line above.
        query: A row to frame and to describe, from 0 to T − 1. Default: the last is described.

    Raises:
        ValueError: If weights and mask differ in shape, a weight is negative, or there is no such row.
    """
    mask, weights = check_mask("mask", mask), check_array("weights", weights, 2)
    if weights.shape != mask.shape:
        raise ValueError(
            f"Weights and mask must have the same shape, but got {list(weights.shape)} and {list(mask.shape)}."
        )
    if weights.min() < 0:
        raise ValueError("A weight is negative. Pass the attention weights after the softmax.")
    tokens = as_tokens(tokens, mask.shape[1])
    if query is not None and not 0 <= query < len(mask):
        raise ValueError(f"query must be a row from 0 to {len(mask) - 1}, not {query}.")
    figure, axes, grid = new_grid(mask.shape, tokens, title, foot=50)
    together = means(weights, grid) * [run.length for run in grid.keys]
    draw_weights(axes, grid, together, means(mask, grid))
    if query is not None:
        row = next(i for i, run in enumerate(grid.queries) if query < run.stop)  # runs start at the first query
        rectangle(axes, grid.x[0], grid.y[row], grid.x[-1], grid.y[row + 1], "none", VERMILION, linewidth=2.4)
    note = "attention, in % of the row     × blocked by the mask"
    scale_bar(axes, grid.y[-1] + 28, "0%", f"{together.max():.0%}", note)
    return from_figure(figure, titled(title, describe_weights(weights, mask, tokens, query)))


# --- checks of the input -------------------------------------------------------------------------------------------


def check_mask(name: str, mask: Numbers) -> np.ndarray:
    """The mask [T, S] as booleans."""
    table = check_array(name, mask, 2)
    if table.shape[0] > table.shape[1]:
        raise ValueError(f"{name} has {table.shape[0]} queries (rows) but only {table.shape[1]} keys (columns).")
    if table.size > MOST_CELLS:
        raise ValueError(f"{name} has {table.size:,} cells, too many to draw. Draw a part of it.")
    return table != 0


def as_tokens(tokens: Tokens | None, S: int) -> list[Token]:
    """Converts strings to Tokens. Without tokens, the positions are their names."""
    tokens = [str(i) for i in range(S)] if tokens is None else list(tokens)
    if len(tokens) != S:
        raise ValueError(f"Expected one token per key, but got {count(S, 'key')} and {count(len(tokens), 'token')}.")
    return [t if isinstance(t, Token) else Token(t, KIND_OF_TEXT.get(t, "text")) for t in tokens]


# --- layout --------------------------------------------------------------------------------------------------------


def make_grid(shape: tuple[int, int], tokens: list[Token], x0: Real, y0: Real, width: Real) -> Grid:
    """The grid of a mask of shape (T, S), with its corner at (x0, y0) and at most ``width`` pixels wide."""
    T, S = shape
    keys, queries = runs(tokens), runs(tokens[S - T :])
    wide, high = ([1 if run.length == 1 else 3 for run in side] for side in (keys, queries))
    side = min(34.0, width / sum(wide), 620 / sum(high))
    x, y = (np.concatenate([[0], np.cumsum(sizes)]) * side for sizes in (wide, high))
    return Grid(queries, keys, x0 + x, y0 + y)


def label_size(grid: Grid) -> Real:
    """Font size of the names beside the cells, 0 if the cells are too small for names."""
    side = np.diff(grid.y).min()
    return 0 if side < 8 else min(SMALL, side * 0.8)


def name_width(found: list[Run], size: Real) -> Real:
    """Pixels of the longest name, 96 at most."""
    return min(96, max(text_width(run.text, size) for run in found)) if size else 0


def label_height(grid: Grid) -> Real:
    """Height of the names above the keys with their colored bars."""
    size = label_size(grid)
    return 16 + name_width(grid.keys, size) if size else 14


def new_grid(shape: tuple[int, int], tokens: list[Token], title: str | None, foot: Real):
    """A sheet with one grid and its names, without the cells."""
    width = WIDTH - 174
    grid = make_grid(shape, tokens, 0, 0, width)
    names = 20 + name_width(grid.queries, label_size(grid))
    x0 = max(names + 30, (WIDTH - grid.x[-1]) / 2)
    above = label_height(grid) + 26
    figure, axes, top = sheet(above + grid.y[-1] + foot, title, margin=0)
    grid = make_grid(shape, tokens, x0, top + above, width)
    draw_names(axes, grid)
    write(axes, x0, top + 14, "keys →", SMALL, GRAY, ha="left")
    if grid.y[-1] - grid.y[0] > 60:
        write(axes, x0 - names - 10, grid.y[0], "← queries", SMALL, GRAY, va="top", rotation=90)
    return figure, axes, grid


def draw_names(axes, grid: Grid, queries: bool = True) -> None:
    """Bars in the colors of the kinds along both sides, and the names of the tokens if they fit."""
    size = label_size(grid)
    x0, y0 = grid.x[0], grid.y[0]
    for kind, start, stop in stretches(grid.keys, lambda run: run.token.kind):
        rectangle(axes, grid.x[start], y0 - 9, grid.x[stop], y0 - 4, KINDS[kind][0], "white", hatch=KINDS[kind][1])
    for kind, start, stop in stretches(grid.queries, lambda run: run.token.kind):
        rectangle(axes, x0 - 9, grid.y[start], x0 - 4, grid.y[stop], KINDS[kind][0], "white", hatch=KINDS[kind][1])
    if not size:
        return
    for j, run in enumerate(grid.keys):
        middle = (grid.x[j] + grid.x[j + 1]) / 2
        write(axes, middle, y0 - 13, fit(run.text, 96, size), size, va="bottom", rotation=90)
    for i, run in enumerate(grid.queries if queries else []):
        middle = (grid.y[i] + grid.y[i + 1]) / 2
        write(axes, x0 - 13, middle, fit(run.text, 96, size), size, ha="right")


# --- cells ---------------------------------------------------------------------------------------------------------


def means(table: np.ndarray, grid: Grid) -> np.ndarray:
    """The mean of the table over each cell of the grid: 1 where all pairs of two runs are allowed."""
    rows = np.add.reduceat(table.astype(float), [run.start for run in grid.queries], axis=0)
    cells = np.add.reduceat(rows, [run.start for run in grid.keys], axis=1)
    return cells / np.outer([run.length for run in grid.queries], [run.length for run in grid.keys])


def draw_mesh(axes, grid: Grid, colors: np.ndarray) -> None:
    """All cells in their colors [rows, columns, 3], with thin lines between them if they are large enough."""
    gap = np.diff(grid.x).min() >= 6
    axes.pcolormesh(grid.x, grid.y, colors, edgecolors=LIGHT if gap else "none", linewidth=0.8 if gap else 0)
    rectangle(axes, grid.x[0], grid.y[0], grid.x[-1], grid.y[-1], "none", GRAY)


def draw_cells(axes, grid: Grid, shares: np.ndarray, differs: np.ndarray | None = None) -> None:
    """Fills each cell up to its share of allowed pairs, hatches padding and frames cells where ``differs``."""
    from matplotlib.colors import to_rgb

    draw_mesh(axes, grid, np.where((shares == 1)[..., None], to_rgb(ALLOWED), 1.0))
    for i, j in zip(*((shares > 0) & (shares < 1)).nonzero(), strict=True):
        fill_to(axes, *grid.area(i, j), shares[i, j])
    hatched = is_padding(grid) & (shares < 1)
    for i, row in enumerate(hatched):
        for padding, start, stop in stretches(row):
            if padding:
                area = grid.x[start], grid.y[i], grid.x[stop], grid.y[i + 1]
                rectangle(axes, *area, "none", LIGHT, hatch="////", linewidth=0)
    if differs is not None:
        thick = min(2.4, np.diff(grid.x).min() / 6)
        for i, j in zip(*differs.nonzero(), strict=True):
            x0, y0, x1, y1 = grid.area(i, j)
            rectangle(axes, x0 + 1, y0 + 1, x1 - 1, y1 - 1, "none", VERMILION, linewidth=thick)


def fill_to(axes, x0: Real, y0: Real, x1: Real, y1: Real, share: Real) -> None:
    """Fills a cell from below, inside its edges. So much is always filled or left empty that no frame hides it."""
    high = y1 - y0 - 2
    least = min(6, high / 4)
    height = np.clip(share * high, least, high - least)
    rectangle(axes, x0 + 1, y1 - 1 - height, x1 - 1, y1 - 1, ALLOWED, "none", linewidth=0)


def is_padding(grid: Grid) -> np.ndarray:
    """True for the cells whose query or key is padding."""
    keys, queries = ([run.token.kind == "padding" for run in side] for side in (grid.keys, grid.queries))
    return np.array(queries)[:, None] | np.array(keys)[None]


def draw_weights(axes, grid: Grid, weights: np.ndarray, shares: np.ndarray) -> None:
    """Cells in cividis with percentages if these fit. Blocked cells are white with a cross."""
    blocked = shares == 0
    colors = np.where(blocked[..., None], 1.0, cividis(weights, 0, weights.max()))
    draw_mesh(axes, grid, colors)
    side = np.diff(grid.x).min()
    if side < 10:
        return
    x, y = (grid.x[1:] + grid.x[:-1]) / 2, (grid.y[1:] + grid.y[:-1]) / 2
    rows, columns = blocked.nonzero()
    axes.plot(x[columns], y[rows], linestyle="", marker="x", markersize=side / 4, color=LIGHT)
    if side >= 22:
        for i, j in zip(*(~blocked).nonzero(), strict=True):
            write(axes, x[j], y[i], f"{100 * weights[i, j]:.0f}", SMALL, text_color(colors[i, j]))


def draw_legend(axes, y: Real, shares: np.ndarray, grid: Grid, different: bool = False) -> None:
    """A sample of every sort of cell that occurs with its meaning, centered."""
    entries = [("query attends to key", {"fill": ALLOWED}), ("blocked", {"fill": "white"})]
    if ((shares > 0) & (shares < 1)).any():
        entries.append(("filled to the share of its pairs that are allowed", {"share": 0.6}))
    if any(run.token.kind == "padding" for run in grid.keys):
        entries.append(("padding", {"fill": "white", "hatch": "////"}))
    if different:
        entries.append(("differs from the first", {"fill": "white", "edge": VERMILION, "linewidth": 2.4}))
    x = (WIDTH - sum(42 + text_width(text, SMALL) for text, _ in entries) + 22) / 2
    for text, how in entries:
        share = how.pop("share", None)
        rectangle(axes, x, y - 7, x + 14, y + 7, **how)
        if share:
            fill_to(axes, x, y - 7, x + 14, y + 7, share)
        write(axes, x + 20, y, text, SMALL, INK, ha="left")
        x += 20 + text_width(text, SMALL) + 22


# --- alt texts -----------------------------------------------------------------------------------------------------


def parts_of(tokens: Sequence[Token]) -> list[tuple[str, int, int]]:
    """The parts of the sequence: (image, prefix, suffix, padding or text, start, stop)."""
    parts = {"bos": "prefix", "newline": "prefix", "eos": "suffix", "loc": "suffix", "seg": "suffix"}
    return list(stretches(tokens, lambda token: parts.get(token.kind, token.kind)))


def how_allowed(part: np.ndarray, square: bool) -> str:
    """All, none, causally or partly."""
    if part.all():
        return "fully"
    if not part.any():
        return "not at all"
    if square and len(part) > 1 and (part == np.tri(len(part), dtype=bool)).all():
        return "causally"
    return "partly"


def describe_mask(mask: np.ndarray, tokens: list[Token]) -> str:
    """Alt text: how many cells are allowed, and how each part of the sequence attends to the others."""
    T, S = mask.shape
    text = f"An attention mask of {count(T, 'query row')} by {count(S, 'key column')}, {mask.mean():.0%} of it allowed."
    sentences = []
    for part, q0, q1 in parts_of(tokens[S - T :]):
        own = (q0 + S - T, q1 + S - T)
        keys = [f"{key} {how_allowed(mask[q0:q1, k0:k1], own == (k0, k1))}" for key, k0, k1 in parts_of(tokens)]
        queries = f"{q1 - q0} {part} queries attend" if q1 - q0 > 1 else f"{part} query attends"
        sentences.append(f"The {queries} to: {listed(keys)}.")
    return " ".join([text, *sentences[:8]])


def describe_difference(tables: dict[str, np.ndarray], tokens: list[Token]) -> str:
    """Alt text: the first mask, and how many cells of each other mask differ from it."""
    first, *others = tables
    text = f"{len(tables)} attention masks side by side. {first}: {describe_mask(tables[first], tokens)}"
    for name in others:
        differ = tables[name] != tables[first]
        more, fewer = int((differ & tables[name]).sum()), int((differ & tables[first]).sum())
        text += f" {name}: {count(more, 'cell')} allowed that {first} blocks, {fewer} blocked that it allows."
    return text


def describe_weights(weights: np.ndarray, mask: np.ndarray, tokens: list[Token], query: Integral | None) -> str:
    """Alt text: what a query, or else the last, attends to, and whether blocked cells really have no weight."""
    T, S = weights.shape
    which, row = ("last query", T - 1) if query is None else (f"query in row {query + 1}", query)
    total = weights[row].sum() or 1
    parts = [f"{name} {weights[row, start:stop].sum() / total:.0%}" for name, start, stop in parts_of(tokens)]
    best = int(weights[row].argmax())
    leak = np.where(mask, 0, weights).max()
    blocked = "Blocked cells have no weight." if leak < 1e-6 else f"A blocked cell has the weight {number(leak)}."
    return (
        f"Attention of {count(T, 'query row')} over {count(S, 'key column')}, drawn over the mask. The {which}, "
        f"“{visible(tokens[S - T + row].text)}”, attends to {listed(parts)}, most to token {best}, "
        f"“{visible(tokens[best].text)}”. {blocked}"
    )
