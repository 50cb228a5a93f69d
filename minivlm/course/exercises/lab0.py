"""Lab L0: how a language model writes the outline of an object."""

import numpy as np
import torch
from PIL import Image

from minivlm import locations, vqvae
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- L0.1 -----------------------------------------------------------------------------------------------------------


def code_cases(rng):
    """Small codebooks whose dimension is neither 4 nor the number of masks."""
    for masks, entries, width, name in (
        (2, 7, 3, "two masks"),
        (3, 9, 5, "three masks"),
        (1, 12, 6, "a batch of one"),
        (5, 10, 1, "a single channel"),
        (3, 20, 8, "more entries than codes"),
    ):
        yield Case((torch.from_numpy(rng.integers(0, entries, (masks, 16))), normal(rng, entries, width)), name)


def _grid(codes, codebook):
    return codebook[codes].mT.unflatten(2, (4, 4))


CODE_GRID = Exercise(
    key="L0.1",
    reference=vqvae.code_grid,
    cases=code_cases,
    difficulty=2,
    minutes=10,
    hints=(
        (
            "Look up the vectors first. Then the D numbers of a code have to come before its place in the grid: "
            "move that axis, and only then split the 16."
        ),
        (
            "`codebook[codes]` is `[B, 16, D]`. First move D in front of the 16 (`transpose`), then split the "
            "16 into 4 × 4 (`unflatten` or `reshape`). `reshape` alone produces the right shape but scrambles "
            "the values."
        ),
    ),
    mistakes=(
        Mistake(
            "fills the grid column by column",
            lambda codes, codebook: _grid(codes, codebook).mT,
            "The first four codes are the top row, from left to right: code i is in row i // 4, column i % 4.",
        ),
        Mistake(
            "leaves the channels last",
            lambda codes, codebook: codebook[codes].unflatten(1, (4, 4)),
            "A convolution expects [B, D, rows, columns]: move D before the 16 codes, `transpose(1, 2)`.",
        ),
        Mistake(
            "reshapes instead of transposing, which mixes channels and codes",
            lambda codes, codebook: codebook[codes].reshape(len(codes), -1, 4, 4),
            "`reshape` keeps the memory order: first `transpose(1, 2)`, then split the 16 codes.",
        ),
        Mistake(
            "flips the grid vertically",
            lambda codes, codebook: _grid(codes, codebook).flip(2),
            "The first row of codes is the top row of the mask.",
        ),
        Mistake(
            "flips the grid horizontally",
            lambda codes, codebook: _grid(codes, codebook).flip(3),
            "Within a row, the codes go from left to right.",
        ),
        Mistake(
            "fills the grid in reverse order",
            lambda codes, codebook: _grid(codes.flip(1), codebook),
            "The first code is the top left one.",
        ),
        Mistake(
            "leaves the 16 codes in one row",
            lambda codes, codebook: codebook[codes].mT,
            "Split the last axis in two, `unflatten(2, (4, 4))`: a convolution needs rows and columns.",
        ),
        Mistake(
            "puts the channels between rows and columns",
            lambda codes, codebook: _grid(codes, codebook).transpose(1, 2),
            "The order is [B, D, rows, columns]: both axes of the grid come last.",
        ),
        Mistake(
            "puts the channels before the batch",
            lambda codes, codebook: _grid(codes, codebook).transpose(0, 1),
            "The batch is the first axis, the channels the second: [B, D, 4, 4].",
        ),
        Mistake(
            "counts the codes from 1",
            lambda codes, codebook: _grid(codes - 1, codebook),
            "`<seg000>` is the first row of the codebook, row 0.",
        ),
        Mistake(
            "arranges the codes instead of their vectors",
            lambda codes, codebook: codes.reshape(-1, 1, 4, 4),
            "A code is a row index of the codebook: `codebook[codes]` are the vectors.",
        ),
    ),
)


# --- L0.2 -----------------------------------------------------------------------------------------------------------


def paste_cases(rng):
    """Blobs in boxes that are never square and also fit with x and y swapped; one box has zero width."""
    for width, height, name in (
        (40, 30, "a wide image"),
        (30, 44, "a tall image"),
        (130, 100, "a large image"),
        (28, 60, "a narrow image"),
        (50, 36, "a box without width"),
        (34, 26, "a box beyond the edges"),
    ):
        short, clear = min(width, height), False
        while not clear:
            (x0, x1), (y0, y1) = np.sort(rng.uniform(0, short, (2, 2))).tolist()
            box = (x0, y0, x0 if name == "a box without width" else x1, y1)
            if name == "a box beyond the edges":
                box = (-2.3, -1.4, x1, y1)
            blobs = _resize(rng.normal(0, 3, (7, 7)).astype(np.float32), (64, 64))
            values = np.tanh(blobs + rng.normal(0, 0.3, (64, 64))).astype(np.float32)
            window = locations.pixel_box(box, width, height)
            part, (w, h) = _resize(values, _size(window)), _size((x0, y0, x1, y1))
            large = min(w, h) > short / 4 and abs(w - h) > 3
            clear = large and np.abs(part).min() > 1e-4  # so that rounding never decides
        yield Case((values, box, width, height), name)


def _size(window):
    x0, y0, x1, y1 = window
    return x1 - x0, y1 - y0


def _resize(values, size, how=Image.Resampling.BILINEAR):
    return np.asarray(Image.fromarray(values).resize(size, how))


def _without_antialias(values, size):
    values = torch.from_numpy(values)[None, None]
    return F.interpolate(values, size[::-1], mode="bilinear", align_corners=False)[0, 0].numpy()


def _pasted(inside):
    """The right paste with another mask inside the box: ``inside(values, (w, h))`` → booleans [h, w]."""

    def function(values, box, width, height):
        x0, y0, x1, y1 = window = locations.pixel_box(box, width, height)
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = inside(values, _size(window))
        return mask

    return function


def _at_the_origin(values, box, width, height):
    w, h = _size(locations.pixel_box(box, width, height))
    mask = np.zeros((height, width), bool)
    mask[:h, :w] = _resize(values, (w, h)) > 0
    return mask


def _x_as_rows(values, box, width, height):
    x0, y0, x1, y1 = locations.pixel_box(box, width, height)
    mask = np.zeros((height, width), bool)
    mask[x0:x1, y0:y1] = _resize(values, (y1 - y0, x1 - x0)) > 0
    return mask


def _swapped_shape(values, box, width, height):
    x0, y0, x1, y1 = window = locations.pixel_box(box, width, height)
    mask = np.zeros((width, height), bool)
    mask[y0:y1, x0:x1] = _resize(values, _size(window)) > 0
    return mask


def _truncated_corners(values, box, width, height):
    return _pasted(lambda values, size: _resize(values, size) > 0)(values, tuple(int(v) for v in box), width, height)


PASTE = Exercise(
    key="L0.2",
    reference=locations.paste_mask,
    cases=paste_cases,
    difficulty=2,
    minutes=15,
    hints=(
        ("Resize the values to the box, in pixels. Turn them into True and False, and put them into an empty mask."),
        (
            "`x0, y0, x1, y1 = pixel_box(…)`. PIL sizes are (width, height), numpy shapes are (rows, columns). "
            "The resized part has y1 − y0 rows, and it goes into `mask[y0:y1, x0:x1]`. Resize first, then "
            "compare with 0."
        ),
    ),
    mistakes=(
        Mistake(
            "compares with 0.5, as if the values ranged from 0 to 1",
            _pasted(lambda values, size: _resize(values, size) > 0.5),
            "The decoder's values range from about −1, outside, to 1, inside: the threshold is 0.",
        ),
        Mistake(
            "compares with 127, as if the values were bytes",
            _pasted(lambda values, size: _resize(values, size) > 127),
            "The decoder's values range from about −1, outside, to 1, inside: the threshold is 0.",
        ),
        Mistake(
            "thresholds before resizing",
            _pasted(lambda values, size: _resize((values > 0).astype(np.float32), size) > 0.5),
            "Resize the values, then compare with 0: values between −1 and 1 say where between pixels the outline is.",
        ),
        Mistake(
            "resizes with nearest neighbor instead of bilinear",
            _pasted(lambda values, size: _resize(values, size, Image.Resampling.NEAREST) > 0),
            "Use `Image.Resampling.BILINEAR`, and on floats: a boolean image is never interpolated.",
        ),
        Mistake(
            "skips values if the box is smaller than 64×64",
            _pasted(lambda values, size: _without_antialias(values, size) > 0),
            "`F.interpolate` averages skipped values only with `antialias=True`; PIL's `resize` always does.",
        ),
        Mistake(
            "swaps inside and outside",
            _pasted(lambda values, size: _resize(values, size) < 0),
            "Values above 0 are inside.",
        ),
        Mistake(
            "reads the values as rows of x",
            _pasted(lambda values, size: _resize(np.ascontiguousarray(values.T), size) > 0),
            "The values are already [row, column]: do not transpose them.",
        ),
        Mistake(
            "flips the mask vertically",
            _pasted(lambda values, size: _resize(values, size)[::-1] > 0),
            "The first row of values is the top of the box.",
        ),
        Mistake(
            "also thresholds outside the box",
            lambda values, box, width, height: (
                ~_pasted(lambda v, size: _resize(v, size) <= 0)(values, box, width, height)
            ),
            "Everywhere outside the box the mask is False.",
        ),
        Mistake(
            "fills the whole box",
            _pasted(lambda values, size: True),
            "Within the box, only pixels whose resized value is above 0 are True.",
        ),
        Mistake(
            "returns only the part inside the box",
            lambda values, box, width, height: _resize(values, _size(locations.pixel_box(box, width, height))) > 0,
            "The mask has the size of the image: paste the part into `np.zeros((height, width), bool)`.",
        ),
        Mistake(
            "pastes at the corner of the image instead of the box",
            _at_the_origin,
            "The part belongs in rows y0 to y1 and columns x0 to x1: `mask[y0:y1, x0:x1] = …`.",
        ),
        Mistake(
            "resizes to the whole image instead of the box",
            lambda values, box, width, height: _resize(values, (width, height)) > 0,
            "The 64×64 values cover the box, not the whole image.",
        ),
        Mistake(
            "uses x for rows and y for columns",
            _x_as_rows,
            "An array is indexed [row, column], that is [y, x].",
        ),
        Mistake(
            "swaps width and height in the shape of the mask",
            _swapped_shape,
            "Rows come first: `np.zeros((height, width), bool)`.",
        ),
        Mistake(
            "passes `resize` the height before the width",
            _pasted(lambda values, size: _resize(values, size[::-1]) > 0),
            "PIL sizes are (width, height), numpy shapes (rows, columns): `resize((x1 - x0, y1 - y0), …)`.",
        ),
        Mistake(
            "truncates the corners instead of rounding them",
            _truncated_corners,
            "`pixel_box(box, width, height)` rounds the corners to whole pixels.",
        ),
    ),
)

EXERCISES = [CODE_GRID, PASTE]
