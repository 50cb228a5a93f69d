"""Images in rows, cut into patches, with attention over them or a word on every patch, and the shapes of a codebook.

P patches in reading order, row by row from the top left · D hidden size · C codes
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
from PIL import Image

from minivlm.course.viz.drawing import heat_map, paste, rectangle, scale_bar, sheet, styled, write
from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.inputs import Numbers, Pixels, check_array, check_strings, to_image
from minivlm.course.viz.style import BODY, GRAY, LIGHT, SMALL, VERMILION, WIDTH
from minivlm.course.viz.text import (
    break_lines,
    count,
    fit,
    fixed,
    listed,
    number,
    readable,
    text_width,
    titled,
    visible,
)


@styled
def image_row(
    images: Sequence[Pixels],
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    title: str | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
) -> Figure:
    """Images side by side, each with its line of text below.

    Args:
        images: PIL images, uint8 [H, W, 3], fractions from 0 to 1 [H, W, 3], or any numbers [H, W], which become heat
            maps.
        titles: One text per image.
        columns: Images per row. Default: up to five.
        title: A line above everything.
        x_label: What the columns of the images are, such as "key →", above the first row.
        y_label: What the rows of the images are, such as "← query", left of each row.

    Raises:
        ValueError: If there is no image, an array is not an image, or there is not one title per image.
    """
    images = [to_image(image) for image in images]
    if not images:
        raise ValueError("A row needs at least one image.")
    titles = check_strings("titles", [""] * len(images) if titles is None else titles, len(images))
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}.")
    columns = min(columns or 5, len(images))
    gap, left, above = 12, 20 if y_label else 0, 20 if x_label else 0
    width = min(280, (WIDTH - gap - left) / columns - gap)
    texts = [break_lines(text, width, SMALL + 1) if text else [] for text in titles]
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    sizes = [(width * min(1, i.width / i.height), width * min(1, i.height / i.width)) for i in images]
    heights = [max(sizes[k][1] for k in row) + 16 * max(len(texts[k]) for k in row) + 8 + gap for row in rows]
    wide = WIDTH if title else left + gap + columns * (width + gap)
    figure, axes, top = sheet(sum(heights) + above, title, width=wide)
    for line, row in enumerate(rows):
        y = top + above + sum(heights[:line])
        if y_label:
            write(axes, gap + 6, y, y_label, SMALL, GRAY, va="top", rotation=90)
        below = y + max(sizes[k][1] for k in row) + 8
        for j, k in enumerate(row):
            middle = left + gap + j * (width + gap) + width / 2
            w, h = sizes[k]
            if x_label and line == 0:
                write(axes, middle - w / 2, y - 10, x_label, SMALL, GRAY, ha="left")
            paste(axes, images[k], middle - w / 2, y, middle + w / 2, y + h)
            rectangle(axes, middle - w / 2, y, middle + w / 2, y + h, "none")
            for n, text in enumerate(texts[k]):
                write(axes, middle, below + 8 + 16 * n, text, SMALL + 1)
    named = f": {'; '.join(t.replace(chr(10), ', ') for t in titles)}" if any(titles) else ""
    labels = (f" {axis}: {label.strip('←→ ')}." for axis, label in (("Columns", x_label), ("Rows", y_label)) if label)
    return from_figure(figure, titled(title, f"{count(len(images), 'image')} in a row{named}.{''.join(labels)}"))


# --- cut into patches ----------------------------------------------------------------------------------------------


@styled
def patch_grid(
    image: Pixels, patch_size: int, numbers: bool = True, title: str | None = None, drop_edge: bool = False
) -> Figure:
    """The image cut into patches, numbered in reading order, and below it the sequence that they become.

    Args:
        image: Its width and height are multiples of ``patch_size``, unless ``drop_edge``.
        patch_size: Side of a patch in pixels.
        numbers: Whether to write each patch's position in the sequence on it, if it is large enough.
        title: A line above.
        drop_edge: Leave out what is too narrow for another patch, as a convolution does. It is drawn pale and crossed.

    Raises:
        ValueError: If the image does not divide into such patches, or is smaller than one.
    """
    image = to_image(image)
    fits = isinstance(patch_size, int) and 1 <= patch_size <= min(image.size)
    if not fits or not (drop_edge or image.width % patch_size == image.height % patch_size == 0):
        raise ValueError(
            f"An image of {image.width}×{image.height} pixels cannot be cut into patches of {patch_size}×{patch_size}. "
            "Resize it first, as the processor does."
        )
    columns, rows = image.width // patch_size, image.height // patch_size
    gap = 4 if max(columns, rows) <= 16 else 1
    side = max(3, min(72, (520 - gap * columns) / columns, (520 - gap * rows) / rows))
    wide, high = columns * (side + gap) - gap, rows * (side + gap) - gap
    right, bottom = (size % patch_size * side / patch_size for size in image.size)  # the dropped edge
    right, bottom = right + gap * (right > 0), bottom + gap * (bottom > 0)
    figure, axes, top = sheet(high + bottom + 92, title)
    x0 = (WIDTH - wide - right) / 2
    patches = cut(image, patch_size)
    if right or bottom:
        draw_edge(axes, image, patch_size, (x0, top, x0 + wide, top + high), (right, bottom), gap)
    for k, patch in enumerate(patches):
        x, y = x0 + k % columns * (side + gap), top + k // columns * (side + gap)
        paste(axes, patch, x, y, x + side, y + side)
        if numbers and side >= 20:
            label = text_width(str(k), SMALL) + 6
            rectangle(axes, x, y, x + label, y + 15, "white", "none", alpha=0.85, linewidth=0)
            write(axes, x + 3, y + 8, str(k), SMALL, ha="left")
    draw_sequence(axes, patches, columns, top + high + bottom + 22)
    shape = f"{rows} rows of {columns}" if rows != columns else f"{rows}×{columns}"
    alt = (
        f"An image of {image.width}×{image.height} pixels cut into {shape} patches of {patch_size}×{patch_size} "
        f"pixels, numbered 0 to {len(patches) - 1} row by row from the top left. Below, the same patches in one line."
    )
    if right or bottom:
        alt += f" Dropped: {dropped_edge(image.size, patch_size)}."
    return from_figure(figure, titled(title, alt))


def draw_edge(axes, image: Image.Image, patch_size: int, grid: tuple, beyond: tuple[Real, Real], gap: Real) -> None:
    """The dropped strips right of the grid and below it, pale and hatched."""
    (x0, y0, x1, y1), (right, bottom) = grid, beyond
    width, height = image.width // patch_size * patch_size, image.height // patch_size * patch_size
    strips = [
        ((width, 0, image.width, height), (x1 + gap, y0, x1 + right, y1)),
        ((0, height, image.width, image.height), (x0, y1 + gap, x1 + right, y1 + bottom)),
    ]
    for pixels, area in strips:
        if pixels[0] < pixels[2] and pixels[1] < pixels[3]:
            paste(axes, image.crop(pixels), *area)
            rectangle(axes, *area, "white", "none", alpha=0.6, linewidth=0)
            rectangle(axes, *area, "none", VERMILION, hatch="////", linewidth=0.8)


def dropped_edge(size: tuple[int, int], patch_size: int) -> str:
    """``2 pixels on the right and 2 pixels at the bottom``."""
    sides = [(size[0] % patch_size, "on the right"), (size[1] % patch_size, "at the bottom")]
    return listed([f"{count(pixels, 'pixel')} {where}" for pixels, where in sides if pixels])


def cut(image: Image.Image, patch_size: int) -> list[Image.Image]:
    """The whole patches in reading order."""
    rows, columns = (range(0, length - patch_size + 1, patch_size) for length in (image.height, image.width))
    return [image.crop((x, y, x + patch_size, y + patch_size)) for y in rows for x in columns]


def draw_sequence(axes, patches: list[Image.Image], columns: int, y: Real) -> None:
    """The patches in one line, or only the first and last if they do not fit, numbered at each new row of the image."""
    P = len(patches)
    step = min(34, (WIDTH - 24) / P) if P <= 64 else 24
    most = int((WIDTH - 24) // step)
    shown = list(range(P)) if P <= most else [*range(most - 4), None, *range(P - 3, P)]
    side = step - (2 if step < 20 else 4)
    x = (WIDTH - step * len(shown) + step - side) / 2
    for k in shown:
        if k is None:
            write(axes, x + side / 2, y + side / 2, "…", 16)
        else:
            paste(axes, patches[k], x, y, x + side, y + side)
            if k % columns == 0 or k == P - 1:
                write(axes, x + side / 2, y + side + 10, str(k), SMALL, GRAY)
        x += step


# --- positions, attention, nearest words ---------------------------------------------------------------------------


def square_side(name: str, P: int) -> int:
    """The side of a square grid of P patches."""
    side = math.isqrt(P)
    if P == 0 or side**2 != P:
        raise ValueError(f"{name} must have one entry per patch of a square grid, but {P} is not a square number.")
    return side


@styled
def position_similarity(position_embeddings: Numbers, title: str | None = None) -> Figure:
    """For each patch a heat map: the cosine of its position embedding with that of every patch.

    Each heat map is at the position of its patch. At most eight rows and columns of the grid are shown.

    Args:
        position_embeddings: [P, D] with P a square number.
        title: A line above.

    Raises:
        ValueError: If P is not a square number.
    """
    vectors = check_array("position_embeddings", position_embeddings, 2)
    grid = square_side("position_embeddings", len(vectors))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.where(lengths > 0, lengths, 1)
    similarity = directions @ directions.T
    shown = np.unique(np.linspace(0, grid - 1, min(grid, 8)).round().astype(int))
    low, high = similarity.min(), similarity.max()
    step = 560 / len(shown)
    side = step - 8
    figure, axes, top = sheet(34 + 560 + 44, title, margin=10)
    y0, x0 = top + 34, (WIDTH - 560) / 2
    for a, row in enumerate(shown):
        write(axes, x0 - 10, y0 + a * step + side / 2, str(row), SMALL, GRAY, ha="right")
        write(axes, x0 + a * step + side / 2, y0 - 10, str(shown[a]), SMALL, GRAY)
        for b, column in enumerate(shown):
            own = similarity[row * grid + column].reshape(grid, grid)
            x, y = x0 + b * step, y0 + a * step
            heat_map(axes, own, x, y, x + side, y + side, low, high)
    write(axes, x0 - 34, y0 + 280, "row of the patch", SMALL, GRAY, rotation=90)
    write(axes, x0 + 280, y0 - 28, "column of the patch", SMALL, GRAY)
    scale_bar(axes, y0 + 560 + 22, number(low), number(high), "cosine with the embedding of this patch")
    return from_figure(figure, describe_positions(similarity, grid, len(shown)))


def describe_positions(similarity: np.ndarray, grid: int, shown: int) -> str:
    """Alt text with the numbers that matter: whether neighbors are more similar than the others."""
    position = np.stack(np.divmod(np.arange(grid**2), grid), -1)
    distance = np.abs(position[:, None] - position[None]).sum(-1)
    near, far = similarity[distance == 1], similarity[distance > 1]
    text = (
        f"{shown}×{shown} heat maps of {grid}×{grid} cells: the cosine of one position embedding with all of them, "
        f"from {number(similarity.min())} to {number(similarity.max())}."
    )
    if near.size and far.size:
        text += f" Neighbors have {fixed(near.mean())} on average, all others {fixed(far.mean())}."
    return text


@styled
def attention_on_image(
    image: Pixels,
    weights: Numbers,
    titles: Sequence[str] | None = None,
    title: str | None = None,
    query: int | None = None,
) -> Figure:
    """Attention as a heat map over the image: brighter where the weight is larger. The strongest patch has a frame.

    Args:
        image: The image that the tower received, before or after it was resized to a square.
        weights: [P] or, for N panels, [N, P], at least 0, with P a square number.
        titles: N texts, such as the tokens that attend.
        title: A line above.
        query: The patch that attends, if it is one. It is marked by a cross.

    Raises:
        ValueError: If P is not a square number, a weight is negative, there are not N titles, or no such patch.
    """
    image = to_image(image)
    panels = check_array("weights", weights, 1)[None] if np.ndim(weights) == 1 else check_array("weights", weights, 2)
    N, P = panels.shape
    grid = square_side("weights", P)
    if panels.min() < 0:
        raise ValueError("A weight is negative. Pass the attention weights after the softmax.")
    titles = check_strings("titles", [""] * N if titles is None else titles, N)
    if query is not None and not 0 <= query < P:
        raise ValueError(f"query must be a patch from 0 to {P - 1}, not {query}.")
    columns = {1: 1, 2: 2, 4: 4}.get(N, min(N, 4))
    side = min(380, (WIDTH - 12) / columns - 12)
    lines = -(-N // columns)
    height = side + 46
    figure, axes, top = sheet(lines * height + 24, title)
    x0 = (WIDTH - columns * (side + 12) + 12) / 2
    for k, (weight, name) in enumerate(zip(panels, titles, strict=True)):
        x, y = x0 + k % columns * (side + 12), top + k // columns * height
        draw_heat(axes, image, weight.reshape(grid, grid), x, y, side)
        if query is not None:
            at = x + (query % grid + 0.5) * side / grid, y + (query // grid + 0.5) * side / grid
            for color, width in (("black", 5), ("white", 2.4)):  # seen on every color
                axes.plot(*at, "x", color=color, markersize=side / grid / 3.2, markeredgewidth=width)
        share = f"strongest patch {weight.max() / (weight.sum() or 1):.0%}"
        label = fit(readable(name), side, BODY) if name else share
        write(axes, x + side / 2, y + side + 12, label, BODY)
        if name:
            write(axes, x + side / 2, y + side + 28, share, SMALL, GRAY)
    note = "attention, each image on its own scale" + ("     × the patch that attends" if query is not None else "")
    scale_bar(axes, top + lines * height + 8, "0", "most", note)
    text = describe_heat(panels, titles, grid)
    if query is not None:
        text += f" The patch that attends is in row {query // grid + 1}, column {query % grid + 1}."
    return from_figure(figure, titled(title, text))


def draw_heat(axes, image: Image.Image, weight: np.ndarray, x: Real, y: Real, side: Real) -> None:
    """The image in gray, a translucent heat map over it, and a frame around the largest weight."""
    area = (x, y, x + side, y + side)
    paste(axes, image.convert("L").convert("RGB"), *area)
    high = weight.max() or 1
    heat_map(axes, weight, *area, 0, high, alpha=0.35 + 0.3 * weight / high)
    row, column = np.unravel_index(weight.argmax(), weight.shape)
    step = side / len(weight)
    x0, y0 = x + column * step, y + row * step
    rectangle(axes, x0, y0, x0 + step, y0 + step, "none", VERMILION, linewidth=2.4)


def describe_heat(panels: np.ndarray, titles: list[str], grid: int) -> str:
    """Alt text: the strongest patch of each panel and its share."""
    parts = []
    for k, (weight, name) in enumerate(zip(panels, titles, strict=True)):
        row, column = divmod(int(weight.argmax()), grid)
        panel = readable(name) if name else f"panel {k + 1}"
        share = weight.max() / (weight.sum() or 1)
        parts.append(f"{panel}: strongest in row {row + 1}, column {column + 1}, with {share:.0%}")
    return f"Attention over an image of {grid}×{grid} patches. {'; '.join(parts)}."


@styled
def nearest_words(
    image: Pixels, words: Sequence[str], scores: Numbers | None = None, title: str | None = None
) -> Figure:
    """The image with a word on every patch, such as the token whose embedding is nearest to the patch's.

    Args:
        image: The image.
        words: P strings in reading order, with P a square number.
        scores: [P], such as the cosines, written below the words.
        title: A line above.

    Raises:
        ValueError: If P is not a square number, or scores and words differ in number.
    """
    image = to_image(image)
    words = check_strings("words", words, len(words))
    grid = square_side("words", len(words))
    if scores is not None:
        scores = check_array("scores", scores, 1)
        if len(scores) != len(words):
            raise ValueError(f"Expected one score per word, but got {len(words)} words and {len(scores)} scores.")
    side = max(720, 44 * grid)
    step = side / grid
    figure, axes, top = sheet(side + 12, title, width=side + 80)
    x0 = 40
    paste(axes, image, x0, top, x0 + side, top + side)
    size = min(13, step / 5)
    with_scores = scores is not None and step >= 56
    for k, word in enumerate(words):
        x, y = x0 + k % grid * step, top + k // grid * step
        rectangle(axes, x, y, x + step, y + step, "none", "white", linewidth=0.8)
        text = fit(visible(word), step - 8, size)
        half, tall = max(text_width(text, size), 28 * with_scores) / 2 + 4, size * (1.45 if with_scores else 0.75)
        middle, center = x + step / 2, y + step / 2
        area = middle - half, center - tall, middle + half, center + tall
        rectangle(axes, *area, "white", "none", 4, alpha=0.88, linewidth=0)
        write(axes, middle, center - (size * 0.6 if with_scores else 0), text, size)
        if with_scores:
            write(axes, middle, center + size * 0.75, fixed(scores[k]), size - 2)
    return from_figure(figure, titled(title, describe_words(words, grid)))


def describe_words(words: list[str], grid: int) -> str:
    """Alt text: the most frequent words, and all of them row by row if they are not too many."""
    names = [readable(word).strip() or "space" for word in words]
    common = sorted(set(names), key=lambda name: (-names.count(name), name))[:5]
    often = listed([f"{name} ({names.count(name)})" for name in common])
    text = f"An image of {grid}×{grid} patches, each with its nearest word. Most often {often}."
    if grid > 8:
        return text
    rows = (f"row {i + 1}: {', '.join(names[i * grid : (i + 1) * grid])}" for i in range(grid))
    return f"{text} {'; '.join(rows)}."


# --- the codebook of the mask VQ-VAE -------------------------------------------------------------------------------


@styled
def codebook(shapes: Numbers, counts: Numbers | None = None, title: str | None = None) -> Figure:
    """One small shape per code, up to 16 per row, each with its index and how often it is used.

    Args:
        shapes: [C, h, w], at most 128 shapes from −1 outside to 1 inside. Values beyond that are clipped.
        counts: [C], how often each code is used. A code that is never used has a cross instead of a shape.
        title: A line above.

    Raises:
        ValueError: If there are more than 128 shapes, or not one count per shape.
    """
    shapes = check_array("shapes", shapes, 3).clip(-1, 1)
    C = len(shapes)
    if C > 128:
        raise ValueError(f"{C} shapes are too many. Show at most 128.")
    counts = check_array("counts", counts, 1).astype(int) if counts is not None else None
    if counts is not None and len(counts) != C:
        raise ValueError(
            f"Expected one count per shape, but got {count(C, 'shape')} and {count(len(counts), 'count')}."
        )
    columns, side, step = min(16, C), 42, 48.5
    high = side + (32 if counts is not None else 19)
    figure, axes, top = sheet(-(-C // columns) * high + 34, title)
    x0 = (WIDTH - columns * step + step - side) / 2
    for k, shape in enumerate(shapes):
        x, y = x0 + k % columns * step, top + k // columns * high
        if counts is None or counts[k]:
            heat_map(axes, shape, x, y, x + side, y + side, -1, 1)
        else:
            axes.plot([x, x + side], [y, y + side], [x, x + side], [y + side, y], color=LIGHT, linewidth=1)
        rectangle(axes, x, y, x + side, y + side, "none")
        write(axes, x + side / 2, y + side + 8, f"{k:03d}", SMALL)
        if counts is not None:
            write(axes, x + side / 2, y + side + 20, f"{counts[k]}×", SMALL - 1, GRAY)
    note = "below each: its index" + (", and how often it is used" if counts is not None else "")
    scale_bar(axes, top + -(-C // columns) * high + 16, "outside", "inside", note)
    return from_figure(figure, describe_codebook(shapes, counts))


def describe_codebook(shapes: np.ndarray, counts: np.ndarray | None) -> str:
    """Alt text: how many codes are used, which most often, and how many shapes are mostly inside or outside."""
    used = np.arange(len(shapes)) if counts is None else np.flatnonzero(counts)
    text = f"The shapes of {count(len(shapes), 'code')}."
    if counts is not None:
        most = sorted(used.tolist(), key=lambda k: (-counts[k], k))[:5]
        text += f" {len(used)} of them are used"
        text += f", most often {listed([f'{k:03d} ({counts[k]}×)' for k in most])}." if most else "."
    mean = shapes[used].mean((1, 2))
    full, empty = int((mean > 0.5).sum()), int((mean < -0.5).sum())
    return f"{text} {full} are mostly inside, {empty} mostly outside, {len(used) - full - empty} between."
