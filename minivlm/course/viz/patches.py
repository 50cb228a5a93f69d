"""Pictures in rows, cut into patches, under attention, and with a word on every patch; the shapes of a codebook.

P patches in reading order, row by row from the top left · D width of a vector
"""

import math
from collections.abc import Sequence
from numbers import Real

import numpy as np
from PIL import Image

from minivlm.course.viz.figure import Figure, from_figure
from minivlm.course.viz.style import (
    BODY,
    GRAY,
    LIGHT,
    SMALL,
    VERMILION,
    WIDTH,
    Numbers,
    Pixels,
    box,
    break_lines,
    check,
    check_names,
    count,
    fit,
    fixed,
    listed,
    number,
    paste,
    scale_bar,
    sheet,
    styled,
    text_width,
    to_image,
    visible,
    write,
    write_title,
)


@styled
def image_row(
    images: Sequence[Pixels], titles: Sequence[str] | None = None, columns: int | None = None, title: str | None = None
) -> Figure:
    """Pictures side by side, each with its line of text below.

    Args:
        images: PIL images, bytes [H, W, 3], fractions [H, W, 3] in 0…1, or maps of any numbers [H, W].
        titles: one text a picture.
        columns: how many in a row; up to five where not given.
        title: a line above everything.

    Raises:
        ValueError: no picture, an array that is none, or not one title a picture.
    """
    pictures = [to_image(image) for image in images]
    if not pictures:
        raise ValueError("A row of pictures needs at least one picture.")
    titles = check_names("titles", titles, len(pictures)) if titles is not None else [""] * len(pictures)
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}.")
    columns = min(columns or 5, len(pictures))
    gap = 12
    width = min(280, (WIDTH - gap) / columns - gap)
    texts = [break_lines(text, width, SMALL + 1) if text else [] for text in titles]
    rows = [range(i, min(i + columns, len(pictures))) for i in range(0, len(pictures), columns)]
    sizes = [(width * min(1, p.width / p.height), width * min(1, p.height / p.width)) for p in pictures]
    heights = [max(sizes[k][1] for k in row) + 16 * max(len(texts[k]) for k in row) + 8 + gap for row in rows]
    top = 40 if title else gap
    figure, axes = sheet(top + sum(heights), gap + columns * (width + gap) if title is None else WIDTH)
    write_title(axes, title)
    for line, row in enumerate(rows):
        y = top + sum(heights[:line])
        below = y + max(sizes[k][1] for k in row) + 8
        for j, k in enumerate(row):
            middle = gap + j * (width + gap) + width / 2
            w, h = sizes[k]
            paste(axes, pictures[k], middle - w / 2, y, middle + w / 2, y + h)
            box(axes, middle - w / 2, y, middle + w / 2, y + h, "none")
            for n, text in enumerate(texts[k]):
                write(axes, middle, below + 8 + 16 * n, text, SMALL + 1)
    named = f": {'; '.join(t.replace(chr(10), ', ') for t in titles)}" if any(titles) else ""
    return from_figure(figure, f"{title + '. ' if title else ''}{count(len(pictures), 'picture')} in a row{named}.")


# --- cut into patches ----------------------------------------------------------------------------------------------


@styled
def patch_grid(image: Pixels, patch_size: int, numbers: bool = True, title: str | None = None) -> Figure:
    """The picture cut into patches, numbered in reading order, and below it the sequence that they become.

    Args:
        image: a picture whose sides are multiples of ``patch_size``.
        patch_size: side of a patch in pixels.
        numbers: whether to write each patch's place in the sequence on it, where it is large enough.

    Raises:
        ValueError: the picture does not divide into such patches.
    """
    picture = to_image(image)
    if not isinstance(patch_size, int) or patch_size < 1 or picture.width % patch_size or picture.height % patch_size:
        raise ValueError(
            f"A picture of {picture.width}×{picture.height} pixels cannot be cut into patches of {patch_size}×"
            f"{patch_size}: resize it to multiples first, as the processor does."
        )
    columns, rows = picture.width // patch_size, picture.height // patch_size
    gap = 4 if max(columns, rows) <= 16 else 1
    side = max(3, min(72, (520 - gap * columns) / columns, (520 - gap * rows) / rows))
    top = 40 if title else 12
    wide, high = columns * (side + gap) - gap, rows * (side + gap) - gap
    figure, axes = sheet(top + high + 92)
    write_title(axes, title)
    x0 = (WIDTH - wide) / 2
    patches = cut(picture, patch_size)
    for k, patch in enumerate(patches):
        x, y = x0 + k % columns * (side + gap), top + k // columns * (side + gap)
        paste(axes, patch, x, y, x + side, y + side)
        if numbers and side >= 20:
            plate = text_width(str(k), SMALL) + 6
            box(axes, x, y, x + plate, y + 15, "white", "none", alpha=0.85, linewidth=0)
            write(axes, x + 3, y + 8, str(k), SMALL, ha="left")
    draw_sequence(axes, patches, columns, top + high + 22)
    shape = f"{rows} rows of {columns}" if rows != columns else f"{rows}×{columns}"
    alt = (
        f"A picture of {picture.width}×{picture.height} pixels cut into {shape} patches of {patch_size}×{patch_size} "
        f"pixels, numbered 0 to {len(patches) - 1} row by row from the top left; below, the same patches in one line."
    )
    return from_figure(figure, alt)


def cut(picture: Image.Image, patch_size: int) -> list[Image.Image]:
    """The patches in reading order."""
    lines = range(0, picture.height, patch_size), range(0, picture.width, patch_size)
    return [picture.crop((x, y, x + patch_size, y + patch_size)) for y in lines[0] for x in lines[1]]


def draw_sequence(axes, patches: list[Image.Image], columns: int, y: Real) -> None:
    """The patches in one line, numbered where a row of the picture begins; of too many, the first and the last."""
    P = len(patches)
    step = min(34, (WIDTH - 24) / P) if P <= 64 else 24
    room = int((WIDTH - 24) // step)
    shown = list(range(P)) if P <= room else [*range(room - 4), None, *range(P - 3, P)]
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


# --- what the patches know -----------------------------------------------------------------------------------------


@styled
def position_similarity(position_embeddings: Numbers, title: str | None = None) -> Figure:
    """For each patch a map: how alike its position embedding is to everyone's, by the cosine.

    The maps stand where their patches stand; of a large grid about every second, third … row and column is shown.

    Args:
        position_embeddings: [P, D] with P a square number.

    Raises:
        ValueError: P is no square.
    """
    vectors = check("position_embeddings", position_embeddings, 2)
    P = len(vectors)
    grid = math.isqrt(P)
    if grid**2 != P:
        raise ValueError(f"{P} positions form no square: give those of a square picture's patches alone.")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.where(lengths > 0, lengths, 1)
    similarity = directions @ directions.T
    shown = np.unique(np.linspace(0, grid - 1, min(grid, 8)).round().astype(int))
    low, high = similarity.min(), similarity.max()
    step = 560 / len(shown)
    side = step - 8
    top = 40 if title else 10
    y0, x0 = top + 34, (WIDTH - 560) / 2
    figure, axes = sheet(y0 + 560 + 44)
    write_title(axes, title)
    for a, row in enumerate(shown):
        write(axes, x0 - 10, y0 + a * step + side / 2, str(row), SMALL, GRAY, ha="right")
        write(axes, x0 + a * step + side / 2, y0 - 10, str(shown[a]), SMALL, GRAY)
        for b, column in enumerate(shown):
            own = similarity[row * grid + column].reshape(grid, grid)
            x, y = x0 + b * step, y0 + a * step
            area = (x, x + side, y + side, y)
            axes.imshow(own, extent=area, aspect="auto", cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
    write(axes, x0 - 34, y0 + 280, "row of the patch", SMALL, GRAY, rotation=90)
    write(axes, x0 + 280, y0 - 28, "column of the patch", SMALL, GRAY)
    scale_bar(axes, y0 + 560 + 22, number(low), number(high), "cosine with the embedding at this place")
    return from_figure(figure, describe_positions(similarity, grid, len(shown)))


def describe_positions(similarity: np.ndarray, grid: int, shown: int) -> str:
    """Alt text with the decisive number: whether neighbors are more alike than the rest."""
    place = np.stack(np.divmod(np.arange(grid**2), grid), -1)
    distance = np.abs(place[:, None] - place[None]).sum(-1)
    near, far = similarity[distance == 1], similarity[distance > 1]
    text = (
        f"{shown}×{shown} maps of {grid}×{grid} cells: the cosine of one position embedding with all others, "
        f"from {number(similarity.min())} to {number(similarity.max())}."
    )
    if near.size and far.size:
        text += f" Neighbors have {fixed(near.mean())} on average, all others {fixed(far.mean())}."
    return text


@styled
def attention_on_image(
    image: Pixels, weights: Numbers, titles: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Attention as heat over the picture: bright and clear where much is paid; the strongest patch is framed.

    Args:
        image: the picture as the tower gets it, squashed to a square or not.
        weights: [P] or [N, P] for N panels, at least 0, P a square number.
        titles: N texts, such as the words that look.

    Raises:
        ValueError: P is no square, a weight is negative, or the titles are not N.
    """
    picture = to_image(image)
    panels = check("weights", weights, 1)[None] if np.ndim(weights) == 1 else check("weights", weights, 2)
    N, P = panels.shape
    grid = math.isqrt(P)
    if grid**2 != P or panels.min() < 0:
        raise ValueError(f"The weights must be at least 0 and as many as a square picture has patches, not {P}.")
    titles = check_names("titles", titles, N) if titles is not None else [""] * N
    columns = {1: 1, 2: 2, 4: 4}.get(N, min(N, 4))
    side = min(380, (WIDTH - 12) / columns - 12)
    lines = -(-N // columns)
    height = side + 46
    top = 40 if title else 12
    figure, axes = sheet(top + lines * height + 24)
    write_title(axes, title)
    x0 = (WIDTH - columns * (side + 12) + 12) / 2
    for k, (weight, name) in enumerate(zip(panels, titles, strict=True)):
        x, y = x0 + k % columns * (side + 12), top + k // columns * height
        draw_heat(axes, picture, weight.reshape(grid, grid), x, y, side)
        share = f"strongest patch {weight.max() / (weight.sum() or 1):.0%}"
        label = fit(visible(name).replace("␣", " "), side, BODY) if name else share
        write(axes, x + side / 2, y + side + 12, label, BODY)
        if name:
            write(axes, x + side / 2, y + side + 28, share, SMALL, GRAY)
    scale_bar(axes, top + lines * height + 8, "0", "most", "attention; each picture on its own scale")
    return from_figure(figure, describe_heat(panels, titles, grid))


def draw_heat(axes, picture: Image.Image, weight: np.ndarray, x: Real, y: Real, side: Real) -> None:
    """The picture in gray, cividis over it, and a frame around the largest weight."""
    gray = picture.convert("L").convert("RGB")
    paste(axes, gray, x, y, x + side, y + side)
    area = {"extent": (x, x + side, y + side, y), "aspect": "auto", "interpolation": "nearest"}
    high = weight.max() or 1
    axes.imshow(weight, cmap="cividis", vmin=0, vmax=high, alpha=0.35 + 0.3 * weight / high, **area)
    row, column = np.unravel_index(weight.argmax(), weight.shape)
    step = side / len(weight)
    corner = (x + column * step, y + row * step)
    frame = {"fill": "none", "linewidth": 2.4}
    box(axes, *corner, corner[0] + step, corner[1] + step, edge=VERMILION, **frame)


def describe_heat(panels: np.ndarray, titles: list[str], grid: int) -> str:
    parts = []
    for k, (weight, name) in enumerate(zip(panels, titles, strict=True)):
        row, column = divmod(int(weight.argmax()), grid)
        who = visible(name).replace("␣", " ") if name else f"panel {k + 1}"
        share = weight.max() / (weight.sum() or 1)
        parts.append(f"{who}: strongest in row {row + 1}, column {column + 1}, with {share:.0%}")
    return f"Attention over a picture of {grid}×{grid} patches. {'; '.join(parts)}."


@styled
def nearest_words(
    image: Pixels, words: Sequence[str], scores: Numbers | None = None, title: str | None = None
) -> Figure:
    """The picture with a word on every patch: that of the vocabulary whose embedding is nearest to the patch's.

    Args:
        image: the picture.
        words: P strings in reading order, P a square number.
        scores: [P], the cosines, written below the words.

    Raises:
        ValueError: P is no square, or scores and words differ in number.
    """
    picture = to_image(image)
    words = check_names("words", words, len(words))
    grid = math.isqrt(len(words))
    if not words or grid**2 != len(words):
        raise ValueError(f"{len(words)} words do not lie on a square grid of patches: give one word a patch.")
    if scores is not None:
        scores = check("scores", scores, 1)
        if len(scores) != len(words):
            raise ValueError(f"There are {len(words)} words and {len(scores)} scores.")
    side = max(720, 44 * grid)
    step = side / grid
    top = 40 if title else 12
    figure, axes = sheet(top + side + 12, side + 80)
    write_title(axes, title)
    x0 = 40
    paste(axes, picture, x0, top, x0 + side, top + side)
    size = min(13, step / 5)
    with_scores = scores is not None and step >= 56
    for k, word in enumerate(words):
        x, y = x0 + k % grid * step, top + k // grid * step
        box(axes, x, y, x + step, y + step, "none", "white", linewidth=0.8)
        text = fit(visible(word), step - 8, size)
        half, tall = max(text_width(text, size), 28 * with_scores) / 2 + 4, size * (1.45 if with_scores else 0.75)
        middle, center = x + step / 2, y + step / 2
        box(
            axes,
            middle - half,
            center - tall,
            middle + half,
            center + tall,
            "white",
            "none",
            4,
            alpha=0.88,
            linewidth=0,
        )
        write(axes, middle, center - (size * 0.6 if with_scores else 0), text, size)
        if with_scores:
            write(axes, middle, center + size * 0.75, fixed(scores[k]), size - 2)
    return from_figure(figure, describe_words(words, grid))


def describe_words(words: list[str], grid: int) -> str:
    """Alt text: the commonest words, and all of them row by row while they are not too many."""
    names = [visible(word).replace("␣", " ").strip() or "space" for word in words]
    common = sorted(set(names), key=lambda name: (-names.count(name), name))[:5]
    often = listed([f"{name} ({names.count(name)})" for name in common])
    text = f"A picture of {grid}×{grid} patches, each with its nearest word. Most often {often}."
    if grid > 8:
        return text
    rows = (f"row {i + 1}: {', '.join(names[i * grid : (i + 1) * grid])}" for i in range(grid))
    return f"{text} {'; '.join(rows)}."


# --- what the codes of masks stand for -----------------------------------------------------------------------------


@styled
def codebook(shapes: Numbers, counts: Numbers | None = None, title: str | None = None) -> Figure:
    """One small shape a code, up to 16 in a row, each with its number and how often it is used.

    Args:
        shapes: [C, h, w], about −1 outside to 1 inside, at most 128 of them; what goes beyond is clipped.
        counts: [C], how often each is used. A code that never is gets a cross in place of a shape.
        title: a line above.

    Raises:
        ValueError: more than 128 shapes, or not one count a shape.
    """
    shapes = check("shapes", shapes, 3).clip(-1, 1)
    C = len(shapes)
    if C > 128:
        raise ValueError(f"{C} shapes are too many to see: show at most 128.")
    counts = check("counts", counts, 1).astype(int) if counts is not None else None
    if counts is not None and len(counts) != C:
        raise ValueError(f"There are {count(C, 'shape')} and {count(len(counts), 'count')}.")
    columns, side, step = min(16, C), 42, 48.5
    high = side + (32 if counts is not None else 19)
    top = 40 if title else 12
    figure, axes = sheet(top + -(-C // columns) * high + 34)
    write_title(axes, title)
    x0 = (WIDTH - columns * step + step - side) / 2
    for k, shape in enumerate(shapes):
        x, y = x0 + k % columns * step, top + k // columns * high
        if counts is None or counts[k]:
            area = (x, x + side, y + side, y)
            axes.imshow(shape, extent=area, aspect="auto", cmap="cividis", vmin=-1, vmax=1, interpolation="nearest")
        else:
            axes.plot([x, x + side], [y, y + side], [x, x + side], [y + side, y], color=LIGHT, linewidth=1)
        box(axes, x, y, x + side, y + side, "none")
        write(axes, x + side / 2, y + side + 8, f"{k:03d}", SMALL)
        if counts is not None:
            write(axes, x + side / 2, y + side + 20, f"{counts[k]}×", SMALL - 1, GRAY)
    note = "below each: the code" + (", and how often it is used" if counts is not None else "")
    scale_bar(axes, top + -(-C // columns) * high + 16, "outside", "inside", note)
    return from_figure(figure, describe_codebook(shapes, counts))


def describe_codebook(shapes: np.ndarray, counts: np.ndarray | None) -> str:
    """Alt text: how many codes are used and which most, and what most of the shapes are."""
    used = np.arange(len(shapes)) if counts is None else np.flatnonzero(counts)
    text = f"The shapes of {count(len(shapes), 'code')}."
    if counts is not None:
        most = sorted(used.tolist(), key=lambda k: (-counts[k], k))[:5]
        text += f" {len(used)} of them are used"
        text += f", most often {listed([f'{k:03d} ({counts[k]}×)' for k in most])}." if most else "."
    mean = shapes[used].mean((1, 2))
    full, empty = int((mean > 0.5).sum()), int((mean < -0.5).sum())
    return f"{text} {full} are mostly inside, {empty} mostly outside, {len(used) - full - empty} between."
