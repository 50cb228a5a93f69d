"""Attention masks, one or several, and the attention that a model really pays.

T queries, one a row · S keys, one a column · the queries are the last T of the S tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral, Real

import numpy as np

from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.style import (
    BLUE,
    GRAY,
    INK,
    KINDS,
    LIGHT,
    SMALL,
    VERMILION,
    WIDTH,
    Numbers,
    box,
    check,
    cividis,
    count,
    fit,
    listed,
    number,
    on,
    scale_bar,
    sheet,
    styled,
    text_width,
    visible,
    write,
    write_title,
)
from minivlm.course.viz.tokens import Run, Token, runs

SEEN, MOST_CELLS = BLUE, 1_000_000
NAMES = {"<image>": "image", "<pad>": "padding", "<bos>": "bos", "<eos>": "eos", "\n": "newline"}
Tokens = Sequence[str] | Sequence[Token]


@dataclass
class Grid:
    """Where the cells of a mask lie: runs of queries and keys, and the edges of their cells in pixels."""

    queries: list[Run]
    keys: list[Run]
    x: np.ndarray
    y: np.ndarray

    def area(self, i: Integral, j: Integral) -> tuple[Real, Real, Real, Real]:
        """x0, y0, x1, y1 of the cell of query run i and key run j."""
        return self.x[j], self.y[i], self.x[j + 1], self.y[i + 1]


@styled
def attention_mask(mask: Numbers, tokens: Tokens | None = None, title: str | None = None) -> Figure:
    """Who may look at whom: a filled cell where the query (row) sees the key (column).

    Runs of image and padding tokens are drawn as one large cell: filled where all its pairs are allowed, half filled
    where some are. Padding is hatched.

    Args:
        mask: [T, S], True (or not 0) where the query sees the key. T < S: the queries are the last T tokens.
        tokens: S Tokens, or S strings.
        title: a line above.

    Raises:
        ValueError: the mask is no table, has more queries than keys, or the tokens are not S.
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
    """Masks of the same tokens side by side; a frame marks every cell that differs from the first mask.

    Args:
        masks: two to six names with masks [T, S] of one shape.
        tokens, title: as for ``attention_mask``.

    Raises:
        ValueError: fewer than two masks, more than six, different shapes, or tokens that do not fit.
    """
    if not 2 <= len(masks) <= 6:
        raise ValueError(f"Two to six masks can be compared, not {len(masks)}.")
    tables = {name: check_mask(f"the mask {name!r}", mask) for name, mask in masks.items()}
    first = next(iter(tables.values()))
    if any(table.shape != first.shape for table in tables.values()):
        raise ValueError(f"The masks have different shapes: {listed([str(list(t.shape)) for t in tables.values()])}.")
    tokens = as_tokens(tokens, first.shape[1])
    columns = min(3 if len(tables) != 4 else 2, len(tables))
    lines = -(-len(tables) // columns)
    names = 24 + 96  # pixels for the names of the queries, which stand before the first panel of a line
    width = (WIDTH - names - 12) / columns
    _, _, panel = make_grid(first.shape, tokens, 0, 0, width - 24)
    height = 30 + label_height(panel) + panel.y[-1] + 14
    top = 40 if title else 0
    figure, axes = sheet(top + lines * height + 34)
    write_title(axes, title)
    for k, (name, table) in enumerate(tables.items()):
        x0, y0 = names + k % columns * width, top + k // columns * height
        write(axes, x0, y0 + 16, fit(name, width - 20, 14), 14, ha="left", fontweight="bold")
        grid = make_grid(first.shape, tokens, x0, y0 + 30 + label_height(panel), width - 24)[2]
        draw_names(axes, grid, queries=k % columns == 0)
        draw_cells(axes, grid, means(table, grid), differs=means(table != first, grid))
    shares = np.concatenate([means(table, panel).ravel() for table in tables.values()])
    draw_legend(axes, top + lines * height + 14, shares, panel, different=True)
    return from_figure(figure, describe_difference(tables, tokens))


@styled
def attention_over_mask(
    weights: Numbers, mask: Numbers, tokens: Tokens | None = None, title: str | None = None
) -> Figure:
    """The attention that was paid, laid over the mask: brighter cells got more, crossed cells are blocked.

    In the cell of a collapsed run stands what its keys get together, averaged over its queries.

    Args:
        weights: [T, S], at least 0: one head's, or the mean of several.
        mask, tokens, title: as for ``attention_mask``.

    Raises:
        ValueError: weights and mask differ in shape, or a weight is negative.
    """
    mask, weights = check_mask("mask", mask), check("weights", weights, 2)
    if weights.shape != mask.shape:
        raise ValueError(f"The weights are {list(weights.shape)} but the mask is {list(mask.shape)}: they must agree.")
    if weights.min() < 0:
        raise ValueError("A weight is negative: give attention after the softmax.")
    tokens = as_tokens(tokens, mask.shape[1])
    figure, axes, grid = new_grid(mask.shape, tokens, title, foot=50)
    together = means(weights, grid) * [run.length for run in grid.keys]
    draw_weights(axes, grid, together, means(mask, grid))
    note = "attention, in % of the row     × blocked by the mask"
    scale_bar(axes, grid.y[-1] + 28, "0%", f"{together.max():.0%}", note)
    return from_figure(figure, describe_weights(weights, mask, tokens))


# --- what comes in -------------------------------------------------------------------------------------------------


def check_mask(name: str, mask: Numbers) -> np.ndarray:
    table = check(name, mask, 2)
    if table.shape[0] > table.shape[1]:
        raise ValueError(f"{name} has {table.shape[0]} queries (rows) but only {table.shape[1]} keys (columns).")
    if table.size > MOST_CELLS:
        raise ValueError(f"{name} has {table.size:,} cells, too many to see: draw a part, or a smaller picture's mask.")
    return table != 0


def as_tokens(tokens: Tokens | None, S: int) -> list[Token]:
    """Strings become Tokens; without any, the numbers of the positions."""
    tokens = [str(i) for i in range(S)] if tokens is None else list(tokens)
    if len(tokens) != S:
        raise ValueError(f"There are {count(S, 'key')} and {count(len(tokens), 'token')}: give one token a key.")
    return [t if isinstance(t, Token) else Token(t, NAMES.get(t, "text")) for t in tokens]


# --- where things lie ----------------------------------------------------------------------------------------------


def make_grid(shape: tuple[int, int], tokens: list[Token], x0: Real, y0: Real, room: Real):
    """The grid at (x0, y0), at most ``room`` wide and high; also its cells' side and the runs' widths in cells."""
    T, S = shape
    keys, queries = runs(tokens), runs(tokens[S - T :])
    wide = [1 if run.length == 1 else 3 for run in keys]
    high = [1 if run.length == 1 else 3 for run in queries]
    side = min(34.0, room / sum(wide), 620 / sum(high))
    x, y = (np.concatenate([[0], np.cumsum(sizes)]) * side for sizes in (wide, high))
    return side, wide, Grid(queries, keys, x0 + x, y0 + y)


def label_size(grid: Grid) -> Real:
    """The font size of the names beside the cells; 0 where there is no room for any."""
    side = np.diff(grid.y).min()
    return 0 if side < 8 else min(SMALL, side * 0.8)


def label_height(grid: Grid) -> Real:
    """What the names above the keys need, their colored bars included."""
    size = label_size(grid)
    return 14 if not size else 16 + min(96, max(text_width(run.text, size) for run in grid.keys))


def new_grid(shape: tuple[int, int], tokens: list[Token], title: str | None, foot: Real):
    """A sheet with one grid and its names, ready for the cells."""
    left = 150
    _, _, grid = make_grid(shape, tokens, 0, 0, WIDTH - left - 24)
    size = label_size(grid)
    names = 20 + (min(96, max(text_width(run.text, size) for run in grid.queries)) if size else 0)
    x0 = max(names + 30, (WIDTH - grid.x[-1]) / 2)
    y0 = (40 if title else 0) + label_height(grid) + 26
    figure, axes = sheet(y0 + grid.y[-1] + foot)
    write_title(axes, title)
    grid = make_grid(shape, tokens, x0, y0, WIDTH - left - 24)[2]
    draw_names(axes, grid)
    write(axes, x0, y0 - label_height(grid) - 12, "keys: who is looked at →", SMALL, GRAY, ha="left")
    if grid.y[-1] - grid.y[0] > 130:
        write(axes, x0 - names - 10, grid.y[0], "← queries: who looks", SMALL, GRAY, va="top", rotation=90)
    return figure, axes, grid


def draw_names(axes, grid: Grid, queries: bool = True) -> None:
    """Bars in the colors of the kinds along both sides, and the tokens' names where there is room."""
    size = label_size(grid)
    x0, y0 = grid.x[0], grid.y[0]
    for kind, start, stop in kinds_of(grid.keys):
        box(axes, grid.x[start], y0 - 9, grid.x[stop], y0 - 4, KINDS[kind][0], "white", hatch=KINDS[kind][1])
    for kind, start, stop in kinds_of(grid.queries):
        box(axes, x0 - 9, grid.y[start], x0 - 4, grid.y[stop], KINDS[kind][0], "white", hatch=KINDS[kind][1])
    if not size:
        return
    for j, run in enumerate(grid.keys):
        middle = (grid.x[j] + grid.x[j + 1]) / 2
        write(axes, middle, y0 - 13, fit(run.text, 96, size), size, va="bottom", rotation=90)
    for i, run in enumerate(grid.queries if queries else []):
        middle = (grid.y[i] + grid.y[i + 1]) / 2
        write(axes, x0 - 13, middle, fit(run.text, 96, size), size, ha="right")


def kinds_of(found: Sequence[Run]) -> list[tuple[str, int, int]]:
    """Neighboring runs of one kind: (kind, start, stop)."""
    groups, start = [], 0
    for kind, group in groupby(found, lambda run: run.token.kind):
        stop = start + len(list(group))
        groups.append((kind, start, stop))
        start = stop
    return groups


# --- cells ---------------------------------------------------------------------------------------------------------


def means(table: np.ndarray, grid: Grid) -> np.ndarray:
    """The mean of the table over each cell of the grid: 1 where a whole run sees a whole run."""
    rows = np.add.reduceat(table.astype(float), [run.start for run in grid.queries], axis=0)
    cells = np.add.reduceat(rows, [run.start for run in grid.keys], axis=1)
    return cells / np.outer([run.length for run in grid.queries], [run.length for run in grid.keys])


def draw_mesh(axes, grid: Grid, colors: np.ndarray) -> None:
    """All cells in their colors [rows, columns, 3], with thin lines between them while they are large enough."""
    gap = np.diff(grid.x).min() >= 6
    axes.pcolormesh(grid.x, grid.y, colors, edgecolors=LIGHT if gap else "none", linewidth=0.8 if gap else 0)
    box(axes, grid.x[0], grid.y[0], grid.x[-1], grid.y[-1], "none", GRAY)


def draw_cells(axes, grid: Grid, shares: np.ndarray, differs: np.ndarray | None = None) -> None:
    """Filled where seen, a filled triangle where partly seen; padding hatched; frames where ``differs``."""
    from matplotlib.colors import to_rgb

    draw_mesh(axes, grid, np.where((shares == 1)[..., None], to_rgb(SEEN), 1.0))
    for i, j in zip(*((shares > 0) & (shares < 1)).nonzero(), strict=True):
        x0, y0, x1, y1 = grid.area(i, j)
        axes.fill([x0, x1, x0], [y0, y1, y1], color=SEEN, linewidth=0)
    hatched = is_padding(grid) & (shares < 1)
    for i, row in enumerate(
        np.diff(hatched, axis=1, prepend=False, append=False)
    ):  # True where a stretch begins or ends
        ends = row.nonzero()[0]  # where a stretch begins and, next in turn, ends
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            box(axes, grid.x[start], grid.y[i], grid.x[stop], grid.y[i + 1], "none", LIGHT, hatch="////", linewidth=0)
    if differs is not None:
        thick = min(2.4, np.diff(grid.x).min() / 6)
        for i, j in zip(*differs.nonzero(), strict=True):
            x0, y0, x1, y1 = grid.area(i, j)
            box(axes, x0 + 1, y0 + 1, x1 - 1, y1 - 1, "none", VERMILION, linewidth=thick)


def is_padding(grid: Grid) -> np.ndarray:
    keys, queries = ([run.token.kind == "padding" for run in side] for side in (grid.keys, grid.queries))
    return np.array(queries)[:, None] | np.array(keys)[None]


def draw_weights(axes, grid: Grid, weights: np.ndarray, shares: np.ndarray) -> None:
    """Cells in cividis with percentages where these fit; white ones with a cross where nothing is allowed."""
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
            write(axes, x[j], y[i], f"{100 * weights[i, j]:.0f}", SMALL, on(colors[i, j]))


def draw_legend(axes, y: Real, shares: np.ndarray, grid: Grid, different: bool = False) -> None:
    """A sample of every sort of cell that occurs, with its meaning, in the middle of the sheet."""
    entries = [("query sees key", {"fill": SEEN}), ("blocked", {"fill": "white"})]
    if ((shares > 0) & (shares < 1)).any():
        entries.append(("some of the pairs", {"half": True}))
    if any(run.token.kind == "padding" for run in grid.keys):
        entries.append(("padding", {"fill": "white", "hatch": "////"}))
    if different:
        entries.append(("differs from the first", {"fill": "white", "edge": VERMILION, "linewidth": 2.4}))
    x = (WIDTH - sum(42 + text_width(text, SMALL) for text, _ in entries) + 22) / 2
    for text, how in entries:
        half = how.pop("half", False)
        box(axes, x, y - 7, x + 14, y + 7, **({"fill": "white", "edge": LIGHT} | how))
        if half:
            axes.fill([x, x + 14, x], [y - 7, y + 7, y + 7], color=SEEN, linewidth=0)
        write(axes, x + 20, y, text, SMALL, INK, ha="left")
        x += 20 + text_width(text, SMALL) + 22


# --- in words ------------------------------------------------------------------------------------------------------


def blocks_of(tokens: Sequence[Token]) -> list[tuple[str, int, int]]:
    """Neighbors that belong together: (image, prefix, suffix, padding or text, start, stop)."""
    parts = {"bos": "prefix", "newline": "prefix", "eos": "suffix", "loc": "suffix", "seg": "suffix", "text": "text"}
    found, start = [], 0
    for name, group in groupby(tokens, lambda t: parts.get(t.kind, t.kind)):
        stop = start + len(list(group))
        found.append((name, start, stop))
        start = stop
    return found


def how_seen(part: np.ndarray, square: bool) -> str:
    """All, none, causally or partly."""
    if part.all():
        return "fully"
    if not part.any():
        return "not at all"
    if square and len(part) > 1 and (part == np.tri(len(part), dtype=bool)).all():
        return "causally"
    return "partly"


def describe_mask(mask: np.ndarray, tokens: list[Token]) -> str:
    """Alt text: how many cells are allowed, and for each part of the sequence how it sees the others."""
    T, S = mask.shape
    text = f"An attention mask of {count(T, 'query row')} by {count(S, 'key column')}, {mask.mean():.0%} of it allowed."
    queries, keys = blocks_of(tokens[S - T :]), blocks_of(tokens)
    sentences = []
    for who, q0, q1 in queries:
        own = (q0 + S - T, q1 + S - T)
        seen = [f"{whom} {how_seen(mask[q0:q1, k0:k1], own == (k0, k1))}" for whom, k0, k1 in keys]
        many = f"{q1 - q0} {who} queries see" if q1 - q0 > 1 else f"{who} query sees"
        sentences.append(f"The {many} {listed(seen)}.")
    return " ".join([text, *sentences[:8]])


def describe_difference(tables: dict[str, np.ndarray], tokens: list[Token]) -> str:
    first, *others = tables
    text = f"{len(tables)} attention masks side by side. {first}: {describe_mask(tables[first], tokens)}"
    for name in others:
        differ = tables[name] != tables[first]
        more, fewer = int((differ & tables[name]).sum()), int((differ & tables[first]).sum())
        text += f" {name}: {count(more, 'cell')} allowed that {first} blocks, {fewer} blocked that it allows."
    return text


def describe_weights(weights: np.ndarray, mask: np.ndarray, tokens: list[Token]) -> str:
    """Alt text: what the last query looks at, and whether blocked cells really get nothing."""
    T, S = weights.shape
    total = weights[-1].sum() or 1
    parts = [f"{name} {weights[-1, a:b].sum() / total:.0%}" for name, a, b in blocks_of(tokens)]
    best = int(weights[-1].argmax())
    leak = np.where(mask, 0, weights).max()
    blocked = "Blocked cells get nothing." if leak < 1e-6 else f"A blocked cell gets {number(leak)}."
    return (
        f"Attention of {count(T, 'query row')} over {count(S, 'key column')}, laid over the mask. The last query, "
        f"“{visible(tokens[-1].text)}”, looks at: {listed(parts)}; most at token {best}, "
        f"“{visible(tokens[best].text)}”. {blocked}"
    )
