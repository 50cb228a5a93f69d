"""Tables of scores between pictures and texts, the subject of both contrastive losses.

N pictures, one a row · M texts, one a column
"""

from collections.abc import Sequence
from numbers import Real

import numpy as np

from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.style import (
    GRAY,
    SMALL,
    VERMILION,
    WIDTH,
    Numbers,
    Pixels,
    box,
    check,
    check_names,
    cividis,
    count,
    fit,
    fixed,
    listed,
    number,
    on,
    paste,
    scale_bar,
    sheet,
    styled,
    text_width,
    to_image,
    write,
    write_title,
)


@styled
def similarity_matrix(
    similarity: Numbers,
    pictures: Sequence[Pixels] | Sequence[str],
    words: Sequence[str],
    truth: Numbers | None = None,
    title: str | None = None,
) -> Figure:
    """How alike every picture is to every text: a colored table, with numbers in the cells while there is room.

    Args:
        similarity: [N, M], any finite numbers.
        pictures: N pictures or N strings, down the side.
        words: M strings, along the top.
        truth: for each row the column that belongs to it, which is framed; where not given, the diagonal if N = M.
            An empty list frames none.
        title: a line above.

    Raises:
        ValueError: the numbers of rows, columns and names do not fit, or ``truth`` names no column.
    """
    table = check("similarity", similarity, 2)
    N, M = table.shape
    if len(pictures) != N:
        raise ValueError(f"There are {count(N, 'row')} of similarity and {count(len(pictures), 'picture')}.")
    words = check_names("words", words, M)
    truth = check_truth(truth, N, M)
    named = isinstance(pictures[0], str)
    side = max(2.0, min(56, 560 / M, 640 / N))
    left = 24 + (min(200, max(text_width(p, SMALL) for p in pictures)) if named else min(side, 56))
    upright = all(text_width(w, SMALL) < side - 4 for w in words)  # then the words need not be turned
    above = 20 if upright else 12 + min(130, max(text_width(w, SMALL) for w in words))
    x0, y0 = max(left, (WIDTH - M * side) / 2), (40 if title else 0) + (above if side >= 11 else 12)
    figure, axes = sheet(y0 + N * side + 52)
    write_title(axes, title)
    low, high = table.min(), table.max()
    draw_table(axes, table, x0, y0, side, low, high)
    for i, j in enumerate(truth):
        area = x0 + j * side, y0 + i * side, x0 + (j + 1) * side, y0 + (i + 1) * side
        box(axes, *area, "none", VERMILION, linewidth=min(3, side / 8))
    if side >= 11:
        name_rows(axes, pictures, x0, y0, side)
        for j, word in enumerate(words):
            word = fit(word, 130, SMALL)
            write(axes, x0 + (j + 0.5) * side, y0 - 6, word, SMALL, va="bottom", rotation=0 if upright else 90)
    note = "framed: picture and text that belong together" if truth else ""
    scale_bar(axes, y0 + N * side + 28, number(low), number(high), note)
    return from_figure(figure, describe_similarity(table, pictures if named else None, words, truth))


def check_truth(truth: Numbers | None, N: int, M: int) -> list[int]:
    if truth is None:
        return list(range(N)) if N == M else []
    truth = [int(j) for j in truth]
    if truth and (len(truth) != N or not all(0 <= j < M for j in truth)):
        raise ValueError(f"truth must give each of the {N} rows a column from 0 to {M - 1}, or be empty.")
    return truth


def name_rows(axes, pictures: Sequence, x0: Real, y0: Real, side: Real) -> None:
    """The pictures, small, or their names, to the left of the rows."""
    for i, picture in enumerate(pictures):
        y = y0 + i * side
        if isinstance(picture, str):
            write(axes, x0 - 8, y + side / 2, fit(picture, 200, SMALL), SMALL, ha="right")
        else:
            thumbnail = to_image(picture)
            width = (side - 4) * min(1, thumbnail.width / thumbnail.height)
            height = (side - 4) * min(1, thumbnail.height / thumbnail.width)
            middle = y + side / 2
            paste(axes, thumbnail, x0 - 6 - width, middle - height / 2, x0 - 6, middle + height / 2)


def draw_table(axes, table: np.ndarray, x0: Real, y0: Real, side: Real, low: Real, high: Real) -> None:
    """The cells from (x0, y0) on, in cividis, with their numbers where these fit."""
    N, M = table.shape
    axes.imshow(
        table,
        extent=(x0, x0 + M * side, y0 + N * side, y0),
        aspect="auto",
        cmap="cividis",
        vmin=low,
        vmax=high if high > low else low + 1,
        interpolation="nearest",
    )
    texts = [fixed(v) for v in table.ravel()]
    if side < 24 or max(text_width(t, SMALL) for t in texts) > side - 3:
        texts = [fixed(v, 1) for v in table.ravel()]
    if side < 24 or max(text_width(t, SMALL) for t in texts) > side - 2:
        return
    for k, (text, color) in enumerate(zip(texts, cividis(table, low, high).reshape(-1, 3), strict=True)):
        i, j = divmod(k, M)
        write(axes, x0 + (j + 0.5) * side, y0 + (i + 0.5) * side, text, SMALL, on(color))


def describe_similarity(table: np.ndarray, pictures, words: list[str], truth: list[int]) -> str:
    """Alt text: the size, the range, and how often the framed text is the most alike, with the first few failures."""
    N, M = table.shape
    best = table.argmax(1)
    text = (
        f"A table of {count(N, 'picture')} (rows) by {count(M, 'text')} (columns), "
        f"with values from {number(table.min())} to {number(table.max())}."
    )
    names = pictures or [f"picture {i + 1}" for i in range(N)]
    if not truth:
        return f"{text} Largest in its row: {listed([f'{n}: {words[j]}' for n, j in zip(names, best, strict=True)])}."
    wrong = [i for i in range(N) if table[i, truth[i]] < table[i, best[i]]]
    text += f" In {N - len(wrong)} of {N} rows the text that belongs to the picture has the largest value."
    if wrong:
        text += f" Elsewhere another text has it: {listed([f'{names[i]}: {words[best[i]]}' for i in wrong], 4)}."
    return text


# --- softmax beside sigmoid ----------------------------------------------------------------------------------------


@styled
def softmax_and_sigmoid(
    logits: Numbers,
    bias: Real = 0.0,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """The same logits four times: as they are, softmax over rows, softmax over columns, sigmoid of each alone.

    Beside and below each table of probabilities stand its sums: those that must be 1 are set in bold.

    Args:
        logits: [N, M], N and M at most 8: temperature × cosine, without a bias.
        bias: added before the sigmoid; a softmax would not notice it.
        rows, columns: names, such as "picture 1"; numbered where not given.

    Raises:
        ValueError: no such table, or names that do not fit it.
    """
    table = check("logits", logits, 2)
    N, M = table.shape
    if max(N, M) > 8:
        raise ValueError(f"A table of {N} × {M} logits cannot be read four times on one page: give at most 8 × 8.")
    rows = check_names("rows", rows if rows is not None else [f"picture {i + 1}" for i in range(N)], N)
    columns = check_names("columns", columns if columns is not None else [f"text {j + 1}" for j in range(M)], M)
    over_rows, over_columns = softmax(table, 1), softmax(table, 0)
    sigmoid = 0.5 * (1 + np.tanh((table + bias) / 2))  # 1 / (1 + exp(−x)), without overflow
    plus = f"logit {fixed(bias, 1).replace('−', '− ') if bias < 0 else f'+ {fixed(bias, 1)}'}" if bias else "logit"
    panels = [
        ("logits", "temperature × cosine", table, None),
        ("softmax over each row", "which text for this picture?", over_rows, "rows"),
        ("softmax over each column", "which picture for this text?", over_columns, "columns"),
        ("sigmoid of each pair", f"do these two match?  σ({plus})", sigmoid, "none"),
    ]
    side = min(48, 230 / max(N, M))
    top = 40 if title else 0
    height = 64 + 24 + N * side + 44
    figure, axes = sheet(top + 2 * height)
    write_title(axes, title)
    for k, (name, question, values, sums) in enumerate(panels):
        x, y = 12 + k % 2 * WIDTH / 2, top + k // 2 * height
        write(axes, x, y + 18, name, 14, ha="left", fontweight="bold")
        write(axes, x, y + 38, question, 12, GRAY, ha="left")
        draw_panel(axes, values, x + 84, y + 84, side, rows, columns, sums)
    return from_figure(figure, describe_four(table, over_rows, over_columns, sigmoid, bias))


def draw_panel(axes, values: np.ndarray, x0: Real, y0: Real, side: Real, rows, columns, sums: str | None) -> None:
    """One of the four tables with its names, and its sums where it holds probabilities."""
    N, M = values.shape
    low, high = (0, 1) if sums else (values.min(), values.max())
    draw_table(axes, values, x0, y0, side, low, high)
    for i, name in enumerate(rows):
        write(axes, x0 - 6, y0 + (i + 0.5) * side, fit(name, 76, SMALL), SMALL, ha="right")
    for j, name in enumerate(columns):
        write(axes, x0 + (j + 0.5) * side, y0 - 10, fit(name, side - 2, SMALL), SMALL)
    if not sums:
        return
    right, bottom = x0 + M * side, y0 + N * side
    weight = {True: {"fontweight": "bold"}, False: {"color": GRAY}}  # what must be 1 stands out
    for i, total in enumerate(values.sum(1)):
        y = y0 + (i + 0.5) * side
        write(axes, right + 10, y, fixed(total), SMALL, ha="left", **weight[sums == "rows"])
    for j, total in enumerate(values.sum(0)):
        x = x0 + (j + 0.5) * side
        write(axes, x, bottom + 12, fixed(total), SMALL, **weight[sums == "columns"])
    write(axes, x0 - 6, bottom + 12, "sum", SMALL, GRAY, ha="right")
    write(axes, right + 10, y0 - 10, "sum", SMALL, GRAY, ha="left")


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def describe_four(table, over_rows, over_columns, sigmoid, bias: Real) -> str:
    N, M = table.shape
    sums = sigmoid.sum(1)
    return (
        f"Four tables of {N} × {M}. The logits, from {number(table.min())} to {number(table.max())}. "
        f"Softmax over rows: every row sums to 1, the columns to {number(over_rows.sum(0).min())} to "
        f"{number(over_rows.sum(0).max())}. Softmax over columns: every column sums to 1. Sigmoid of each logit"
        f"{f' plus the bias {number(bias)}' if bias else ''}: every cell stands alone, its rows sum to "
        f"{number(sums.min())} to {number(sums.max())}."
    )
