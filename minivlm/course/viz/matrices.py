"""Tables of scores between images and texts, the subject of both contrastive losses.

N images, one per row · M texts, one per column
"""

from collections.abc import Sequence
from numbers import Real

import numpy as np

from minivlm.course.viz.drawing import heat_map, paste, rectangle, scale_bar, sheet, styled, write
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.inputs import Numbers, Pixels, check_array, check_strings, softmax, to_image
from minivlm.course.viz.style import GRAY, SMALL, VERMILION, WIDTH, cividis, text_color
from minivlm.course.viz.text import count, fit, fixed, listed, number, text_width, titled


@styled
def similarity_matrix(
    similarity: Numbers,
    images: Sequence[Pixels] | Sequence[str],
    words: Sequence[str],
    truth: Numbers | None = None,
    title: str | None = None,
) -> Figure:
    """How similar every image is to every text: a heat map, with numbers in the cells if these fit.

    Args:
        similarity: [N, M], any finite numbers.
        images: N images or N strings, along the left side.
        words: M strings, along the top.
        truth: For each row the column that belongs to it, which gets a frame. Default: the diagonal if N = M. With an
            empty list there are no frames.
        title: A line above.

    Raises:
        ValueError: If the numbers of rows, columns and names do not fit, or ``truth`` contains no column's index.
    """
    table = check_array("similarity", similarity, 2)
    N, M = table.shape
    if len(images) != N:
        raise ValueError(
            f"Expected one image per row, but got {count(N, 'row')} of similarity and {count(len(images), 'image')}."
        )
    words = check_strings("words", words, M)
    truth = check_truth(truth, N, M)
    has_names = isinstance(images[0], str)
    side = max(2.0, min(56, 560 / M, 640 / N))
    left = 24 + (min(200, max(text_width(name, SMALL) for name in images)) if has_names else min(side, 56))
    upright = all(text_width(w, SMALL) < side - 4 for w in words)  # otherwise the texts are rotated
    above = 20 if upright else 12 + min(130, max(text_width(w, SMALL) for w in words))
    above = above if side >= 11 else 12
    figure, axes, top = sheet(above + N * side + 52, title, margin=0)
    x0, y0 = max(left, (WIDTH - M * side) / 2), top + above
    low, high = table.min(), table.max()
    draw_table(axes, table, x0, y0, side, low, high)
    for i, j in enumerate(truth):
        area = x0 + j * side, y0 + i * side, x0 + (j + 1) * side, y0 + (i + 1) * side
        rectangle(axes, *area, "none", VERMILION, linewidth=min(3, side / 8))
    if side >= 11:
        name_rows(axes, images, x0, y0, side)
        for j, word in enumerate(words):
            word = fit(word, 130, SMALL)
            write(axes, x0 + (j + 0.5) * side, y0 - 6, word, SMALL, va="bottom", rotation=0 if upright else 90)
    note = "framed: image and text that belong together" if truth else ""
    scale_bar(axes, y0 + N * side + 28, number(low), number(high), note)
    names = images if has_names else [f"image {i + 1}" for i in range(N)]
    return from_figure(figure, titled(title, describe_similarity(table, names, words, truth)))


def check_truth(truth: Numbers | None, N: int, M: int) -> list[int]:
    """One column per row, or an empty list."""
    if truth is None:
        return list(range(N)) if N == M else []
    truth = [int(j) for j in truth]
    if truth and (len(truth) != N or not all(0 <= j < M for j in truth)):
        raise ValueError(f"truth must have one column from 0 to {M - 1} for each of the {N} rows, or be empty.")
    return truth


def name_rows(axes, images: Sequence, x0: Real, y0: Real, side: Real) -> None:
    """Thumbnails of the images, or their names, to the left of the rows."""
    for i, image in enumerate(images):
        middle = y0 + (i + 0.5) * side
        if isinstance(image, str):
            write(axes, x0 - 8, middle, fit(image, 200, SMALL), SMALL, ha="right")
        else:
            image = to_image(image)
            width = (side - 4) * min(1, image.width / image.height)
            height = (side - 4) * min(1, image.height / image.width)
            paste(axes, image, x0 - 6 - width, middle - height / 2, x0 - 6, middle + height / 2)


def draw_table(axes, table: np.ndarray, x0: Real, y0: Real, side: Real, low: Real, high: Real) -> None:
    """A heat map with its corner at (x0, y0), and the numbers in its cells if they fit."""
    N, M = table.shape
    heat_map(axes, table, x0, y0, x0 + M * side, y0 + N * side, low, high)
    texts = [fixed(v) for v in table.ravel()]
    if side < 24 or max(text_width(t, SMALL) for t in texts) > side - 3:
        texts = [fixed(v, 1) for v in table.ravel()]
    if side < 24 or max(text_width(t, SMALL) for t in texts) > side - 2:
        return
    for k, (text, color) in enumerate(zip(texts, cividis(table, low, high).reshape(-1, 3), strict=True)):
        i, j = divmod(k, M)
        write(axes, x0 + (j + 0.5) * side, y0 + (i + 0.5) * side, text, SMALL, text_color(color))


def describe_similarity(table: np.ndarray, names: Sequence[str], words: list[str], truth: list[int]) -> str:
    """Alt text: size, range, in how many rows the framed text has the largest value, and the first few other rows."""
    N, M = table.shape
    best = table.argmax(1)
    text = (
        f"A table of {count(N, 'image')} (rows) by {count(M, 'text')} (columns), "
        f"with values from {number(table.min())} to {number(table.max())}."
    )
    if not truth:
        return f"{text} Largest in its row: {listed([f'{n}: {words[j]}' for n, j in zip(names, best, strict=True)])}."
    wrong = [i for i in range(N) if table[i, truth[i]] < table[i, best[i]]]
    text += f" In {N - len(wrong)} of {N} rows the text that belongs to the image has the largest value."
    if wrong:
        text += f" In the others another text has it: {listed([f'{names[i]}: {words[best[i]]}' for i in wrong], 4)}."
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
    """The same logits four times: as they are, softmax over rows, softmax over columns, and sigmoid of each.

    The sums of rows and columns are beside and below each table of probabilities. Sums that must be 1 are bold.

    Args:
        logits: [N, M], N and M at most 8: temperature × cosine, without a bias.
        bias: Added before the sigmoid. It would not change a softmax.
        rows: Names of the rows. Default: "image 1" and so on.
        columns: Names of the columns. Default: "text 1" and so on.
        title: A line above.

    Raises:
        ValueError: If the logits are not such a table, or the names do not fit it.
    """
    table = check_array("logits", logits, 2)
    N, M = table.shape
    if max(N, M) > 8:
        raise ValueError(f"The table of logits must be at most 8 × 8 to be readable, not {N} × {M}.")
    rows = check_strings("rows", rows if rows is not None else [f"image {i + 1}" for i in range(N)], N)
    columns = check_strings("columns", columns if columns is not None else [f"text {j + 1}" for j in range(M)], M)
    over_rows, over_columns = softmax(table, 1), softmax(table, 0)
    sigmoid = 0.5 * (1 + np.tanh((table + bias) / 2))  # 1 / (1 + exp(−x)), without overflow
    plus = f"logit {fixed(bias, 1).replace('−', '− ') if bias < 0 else f'+ {fixed(bias, 1)}'}" if bias else "logit"
    panels = [
        ("logits", "temperature × cosine", table, None),
        ("softmax over each row", "which text for this image?", over_rows, "rows"),
        ("softmax over each column", "which image for this text?", over_columns, "columns"),
        ("sigmoid of each pair", f"do these two match?  σ({plus})", sigmoid, "none"),
    ]
    side = min(48, 230 / max(N, M))
    height = 64 + 24 + N * side + 44
    figure, axes, top = sheet(2 * height, title, margin=0)
    for k, (name, question, values, sums) in enumerate(panels):
        x, y = 12 + k % 2 * WIDTH / 2, top + k // 2 * height
        write(axes, x, y + 18, name, 14, ha="left", fontweight="bold")
        write(axes, x, y + 38, question, 12, GRAY, ha="left")
        draw_panel(axes, values, x + 84, y + 84, side, rows, columns, sums)
    return from_figure(figure, titled(title, describe_four(table, over_rows, over_columns, sigmoid, bias)))


def draw_panel(axes, values: np.ndarray, x0: Real, y0: Real, side: Real, rows, columns, sums: str | None) -> None:
    """One of the four tables with its names. ``sums`` says which sums are 1, or None for a table without sums."""
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
    weight = {True: {"fontweight": "bold"}, False: {"color": GRAY}}  # True: must be 1
    for i, total in enumerate(values.sum(1)):
        y = y0 + (i + 0.5) * side
        write(axes, right + 10, y, fixed(total), SMALL, ha="left", **weight[sums == "rows"])
    for j, total in enumerate(values.sum(0)):
        x = x0 + (j + 0.5) * side
        write(axes, x, bottom + 12, fixed(total), SMALL, **weight[sums == "columns"])
    write(axes, x0 - 6, bottom + 12, "sum", SMALL, GRAY, ha="right")
    write(axes, right + 10, y0 - 10, "sum", SMALL, GRAY, ha="left")


def describe_four(table, over_rows, over_columns, sigmoid, bias: Real) -> str:
    """Alt text: the ranges of the values and of the sums."""
    N, M = table.shape
    sums = sigmoid.sum(1)
    return (
        f"Four tables of {N} × {M}. The logits, from {number(table.min())} to {number(table.max())}. "
        f"Softmax over rows: every row sums to 1, the columns to {number(over_rows.sum(0).min())} to "
        f"{number(over_rows.sum(0).max())}. Softmax over columns: every column sums to 1. Sigmoid of each logit"
        f"{f' plus the bias {number(bias)}' if bias else ''}: every cell is independent of the others, and the rows "
        f"sum to {number(sums.min())} to {number(sums.max())}."
    )
