"""Chapter 08: how it all answers a question about an image."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from minivlm import generation, locations, paligemma, vqvae
from minivlm.course.exercises.exercise import Exercise, Mistake


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- 08.1 -----------------------------------------------------------------------------------------------------------


def merge_cases(rng):
    """Rows of T tokens with P image tokens each: at the start of the first row, anywhere in the others."""
    for rows, length, P, D in ((2, 6, 3, 4), (3, 5, 2, 3), (1, 7, 4, 2), (2, 8, 3, 5), (3, 4, 2, 2)):
        is_image = torch.zeros(rows, length, dtype=torch.bool)
        is_image[0, :P] = True
        for row in is_image[1:]:
            row[torch.from_numpy(rng.permutation(length)[:P])] = True
        yield normal(rng, rows, length, D), is_image, normal(rng, rows, P, D)


def _merge(x, is_image, features):
    return x.masked_scatter(is_image[..., None], features)


def _over_the_first(x, is_image, features):
    x = x.clone()
    x[:, : features.shape[1]] = features
    return x


MERGE = Exercise(
    key="08.1",
    reference=paligemma.merge_image_features,
    cases=merge_cases,
    difficulty=2,
    minutes=12,
    mistakes=(
        Mistake(
            "multiplies the image features by √D too",
            lambda x, is_image, features: _merge(x, is_image, features * features.shape[-1] ** 0.5),
            "The text embeddings in `x` are already scaled; the projector's image features are inserted unscaled.",
        ),
        Mistake(
            "divides the image features by √D",
            lambda x, is_image, features: _merge(x, is_image, features / features.shape[-1] ** 0.5),
            "That is the other convention, where everything is multiplied by √D afterwards.",
        ),
        Mistake(
            "always overwrites the first P positions",
            _over_the_first,
            "There can be padding in front of the image: `is_image` marks the positions, row by row.",
        ),
        Mistake(
            "gives every row the first image",
            lambda x, is_image, features: _merge(x, is_image, features[:1].expand_as(features)),
            "Row b gets `features[b]`.",
        ),
        Mistake(
            "adds the image features to the placeholder embeddings",
            lambda x, is_image, features: x + _merge(torch.zeros_like(x), is_image, features),
            "The placeholder's embedding means nothing: replace it.",
        ),
        Mistake(
            "inserts the patches in reverse order",
            lambda x, is_image, features: _merge(x, is_image, features.flip(1)),
            "The first image token of a row gets the first of its patches.",
        ),
        Mistake(
            "loses the text embeddings",
            lambda x, is_image, features: _merge(torch.zeros_like(x), is_image, features),
            "Where `is_image` is False, `x` stays unchanged: start from a copy of `x`, not from zeros.",
        ),
        Mistake(
            "puts the image features in front and keeps the placeholders",
            lambda x, is_image, features: torch.cat((features, x), dim=1),
            "The result has the shape of `x`: the placeholders are the image's slots.",
        ),
    ),
)


# --- 08.2 -----------------------------------------------------------------------------------------------------------


def nearest_word(features, table):
    """Patches [P, D], embedding table [V, D] → for each patch, the row of the table with the largest cosine, [P]."""
    return (F.normalize(features, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


def table_cases(rng):
    """Embeddings of very different lengths, so that the dot product and the cosine disagree."""
    for P, V, D in ((5, 7, 3), (6, 4, 2), (4, 9, 5), (7, 8, 4), (9, 6, 3)):
        lengths = torch.from_numpy(rng.lognormal(0, 1, (V, 1))).float()
        yield normal(rng, P, D) * 2, normal(rng, V, D) * lengths


def _cosines(features, table):
    return F.normalize(features, dim=-1) @ F.normalize(table, dim=-1).T


NEAREST = Exercise(
    key="08.2",
    reference=nearest_word,
    cases=table_cases,
    difficulty=1,
    minutes=8,
    mistakes=(
        Mistake(
            "compares dot products, so long embeddings win",
            lambda features, table: (features @ table.T).argmax(-1),
            "Normalize every row to length 1 first: `F.normalize(table, dim=-1)`.",
        ),
        Mistake(
            "normalizes along the wrong axis",
            lambda features, table: (F.normalize(features, dim=0) @ F.normalize(table, dim=0).T).argmax(-1),
            "Each vector runs along the last axis: `F.normalize(…, dim=-1)`.",
        ),
        Mistake(
            "finds the nearest patch for each token instead of the nearest token for each patch",
            lambda features, table: _cosines(features, table).argmax(0),
            "One answer per patch: in the cosines [P, V], take the largest over the vocabulary, the last axis.",
        ),
        Mistake(
            "finds the farthest token",
            lambda features, table: _cosines(features, table).argmin(-1),
            "A large cosine means near: use `argmax`.",
        ),
        Mistake(
            "takes the smallest distance instead of the largest cosine",
            lambda features, table: torch.cdist(features, table).argmin(-1),
            "Distance depends on the lengths of the vectors, the cosine only on their directions.",
        ),
        Mistake(
            "takes the absolute value of the cosine",
            lambda features, table: _cosines(features, table).abs().argmax(-1),
            "A cosine of −1 is the opposite direction: keep the sign.",
        ),
        Mistake(
            "returns the cosines instead of the indices",
            lambda features, table: _cosines(features, table).amax(-1),
            "`argmax` returns the index, the row of the table.",
        ),
    ),
)


# --- 08.3 -----------------------------------------------------------------------------------------------------------


def location_cases(rng):
    """Images that are not square, so that width and height cannot be confused."""
    for width, height in ((400, 100), (112, 224), (640, 480), (30, 70), (1023, 341)):
        y0, y1 = sorted(int(i) for i in rng.choice(1024, 2, replace=False))
        x0, x1 = sorted(int(i) for i in rng.choice(1024, 2, replace=False))
        yield (y0, x0, y1, x1), width, height


def _pixels(bins, width, height, largest=1023):
    y0, x0, y1, x1 = bins
    return x0 / largest * width, y0 / largest * height, x1 / largest * width, y1 / largest * height


def _corner_and_size(bins, width, height):
    x0, y0, x1, y1 = _pixels(bins, width, height)
    return x0, y0, x1 - x0, y1 - y0


def _reordered(order):
    def function(bins, width, height):
        box = _pixels(bins, width, height)
        return tuple(box[i] for i in order)

    return function


LOCATIONS = Exercise(
    key="08.3",
    reference=locations.locations_to_box,
    cases=location_cases,
    difficulty=1,
    minutes=8,
    mistakes=(
        Mistake(
            "reads x before y",
            lambda bins, width, height: _pixels([bins[i] for i in (1, 0, 3, 2)], width, height),
            "PaliGemma writes y min, x min, y max, x max: the first token is a y coordinate.",
        ),
        Mistake(
            "returns y before x",
            _reordered((1, 0, 3, 2)),
            "Each value is right, but the box is (x0, y0, x1, y1).",
        ),
        Mistake(
            "divides by 1024",
            lambda bins, width, height: _pixels(bins, width, height, 1024),
            "There are 1,024 bins, and the last, 1023, is the far edge: divide by 1023.",
        ),
        Mistake(
            "returns fractions of the image",
            lambda bins, width, height: _pixels(bins, 1, 1),
            "Return pixels: x times the width, y times the height.",
        ),
        Mistake(
            "multiplies x by the height and y by the width",
            lambda bins, width, height: _pixels(bins, height, width),
            "x runs along the width, y along the height.",
        ),
        Mistake(
            "returns a corner, width and height instead of two corners",
            _corner_and_size,
            "The last two values are the second corner, not the size.",
        ),
        Mistake(
            "puts both x before both y",
            _reordered((0, 2, 1, 3)),
            "One corner after the other: (x0, y0, x1, y1).",
        ),
        Mistake(
            "rounds to whole pixels",
            lambda bins, width, height: tuple(round(v) for v in _pixels(bins, width, height)),
            "In a small image, a bin is a fraction of a pixel: do not round.",
        ),
    ),
)


# --- 08.4 -----------------------------------------------------------------------------------------------------------


def code_cases(rng):
    """Small codebooks whose dimension is neither 4 nor the number of masks."""
    for masks, entries, width in ((2, 7, 3), (3, 9, 5), (1, 12, 6), (2, 8, 5), (4, 10, 3)):
        yield torch.from_numpy(rng.integers(0, entries, (masks, 16))), normal(rng, entries, width)


def _grid(codes, codebook):
    return codebook[codes].mT.unflatten(2, (4, 4))


CODE_GRID = Exercise(
    key="08.4",
    reference=vqvae.code_grid,
    cases=code_cases,
    difficulty=2,
    minutes=10,
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


# --- 08.5 -----------------------------------------------------------------------------------------------------------


def paste_cases(rng):
    """Blobs in boxes that are never square and also fit with x and y swapped; the last box has zero width."""
    for width, height, flat in ((40, 30, 0), (30, 44, 0), (130, 100, 0), (28, 60, 0), (50, 36, 1)):
        short, clear = min(width, height), False
        while not clear:
            (x0, x1), (y0, y1) = np.sort(rng.uniform(0, short, (2, 2))).tolist()
            box = (x0, y0, x0 if flat else x1, y1)
            blobs = _resize(rng.normal(0, 3, (7, 7)).astype(np.float32), (64, 64))
            values = np.tanh(blobs + rng.normal(0, 0.3, (64, 64))).astype(np.float32)
            part = _resize(values, _size(locations.pixel_box(box, width, height)))
            large = min(x1 - x0, y1 - y0) > short / 4 and abs((x1 - x0) - (y1 - y0)) > 3
            clear = large and np.abs(part).min() > 1e-4  # so that rounding never decides
        yield values, box, width, height


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
    key="08.5",
    reference=locations.paste_mask,
    cases=paste_cases,
    difficulty=2,
    minutes=15,
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


# --- 08.6 -----------------------------------------------------------------------------------------------------------


def top_p_cases(rng):
    for rows, V in ((2, 7), (3, 6), (1, 9), (4, 8), (2, 12)):
        yield normal(rng, rows, V) * 1.5, float(rng.uniform(0.4, 0.9))


def _sorted(logits):
    return logits.softmax(-1).sort(-1, descending=True)


def _drop(logits, order, dropped):
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, dropped), -math.inf)


def _top_p(logits, p, largest_first=True):
    probabilities, order = logits.softmax(-1).sort(-1, descending=largest_first)
    return _drop(logits, order, probabilities.cumsum(-1) - probabilities >= p)


def _without_crossing_token(logits, p):
    probabilities, order = _sorted(logits)
    return _drop(logits, order, probabilities.cumsum(-1) > p)


def _one_too_many(logits, p):
    probabilities, order = _sorted(logits)
    before = probabilities.cumsum(-1) - probabilities
    return _drop(logits, order, F.pad(before[:, :-1], (1, 0)) >= p)


def _left_sorted(logits, p):
    values, _ = logits.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    return values.masked_fill(probabilities.cumsum(-1) - probabilities >= p, -math.inf)


def _unsorted_mask(logits, p):
    probabilities, _ = _sorted(logits)
    return logits.masked_fill(probabilities.cumsum(-1) - probabilities >= p, -math.inf)


TOP_P = Exercise(
    key="08.6",
    reference=generation.top_p_filter,
    cases=top_p_cases,
    difficulty=2,
    minutes=15,
    mistakes=(
        Mistake(
            "drops the token whose probability makes the sum reach p",
            _without_crossing_token,
            "Keep a token if the sum of those *before* it is below p. Then the most likely token always stays.",
        ),
        Mistake(
            "keeps one token too many",
            _one_too_many,
            "The sum before the first token is 0, and before the second it is the first token's probability.",
        ),
        Mistake(
            "keeps the least likely tokens",
            lambda logits, p: _top_p(logits, p, largest_first=False),
            "Sort with `descending=True`: the most likely token comes first.",
        ),
        Mistake(
            "returns the logits sorted instead of in vocabulary order",
            _left_sorted,
            "`sort` also returns the order: `scatter(-1, order, dropped)` moves the mask back to vocabulary order.",
        ),
        Mistake(
            "applies the mask of the sorted tokens to the unsorted ones",
            _unsorted_mask,
            "`sort` also returns the order: `scatter(-1, order, dropped)` moves the mask back to vocabulary order.",
        ),
        Mistake(
            "fills with 0 instead of −∞",
            lambda logits, p: _top_p(logits, p).masked_fill(_top_p(logits, p).isinf(), 0.0),
            "A logit of 0 still has a probability: only exp(−∞) is 0.",
        ),
        Mistake(
            "compares each probability with p on its own",
            lambda logits, p: logits.masked_fill(logits.softmax(-1) < p, -math.inf),
            "Compare the cumulative sum with p, most likely token first: `cumsum(-1)`.",
        ),
        Mistake(
            "returns probabilities instead of logits",
            lambda logits, p: _top_p(logits, p).softmax(-1),
            "Kept logits stay unchanged: the softmax is applied when a token is sampled.",
        ),
    ),
)


# --- 08.7 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyModel:
    """A toy language model: the logits of the next token depend on all tokens so far and on their order."""

    table: tuple[tuple[float, ...], ...]

    def __call__(self, ids):
        weights = torch.arange(1, ids.shape[1] + 1)
        return torch.tensor(self.table)[(ids * weights).sum(-1) % len(self.table)]


def greedy_loop(next_logits, ids, eos, pad, max_new_tokens):
    """Prompts [B, T] → new tokens [B, N], always the most likely, until every row has an eos or N is reached."""
    new, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(max_new_tokens):
        token = next_logits(ids).argmax(-1).masked_fill(finished, pad)
        new.append(token)
        finished = finished | (token == eos)
        if finished.all():
            break
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.stack(new, dim=1)


def lengths(new, eos):
    """Number of tokens in each row up to eos. A row without eos counts one more than it has."""
    return [row.index(eos) + 1 if eos in row else len(row) + 1 for row in new.tolist()]


def loop_cases(rng):
    """Rows that end at different steps, all before the limit, or one of them cut off by it."""
    pad, eos, most = 0, 1, 7
    for rows, cut in ((2, False), (3, True), (1, False), (3, False), (2, True)):
        while True:
            model = ToyModel(tuple(tuple(row) for row in rng.normal(0, 1, (29, 6)).round(3).tolist()))
            ids = torch.from_numpy(rng.integers(2, 6, (rows, 3)))
            ends = lengths(greedy_loop(model, ids, eos, pad, most), eos)
            if min(ends) > 1 and len(set(ends)) == rows and (max(ends) > most if cut else max(ends) < most):
                break
        yield model, ids, eos, pad, most


def _loop(
    next_logits, ids, eos, pad, most, *, finish=torch.all, pads=True, hides=False, feeds=None, prompt=False, fewer=0
):
    """The loop with one thing wrong, chosen by the options."""
    new, finished, start = [], torch.zeros(len(ids), dtype=torch.bool), ids
    for _ in range(most - fewer):
        token = next_logits(ids).argmax(-1)
        if hides:
            finished = finished | (token == eos)
        token = token.masked_fill(finished, pad) if pads else token
        new.append(token)
        finished = finished | (token == eos)
        if finish is not None and finish(finished):
            break
        ids = {"nothing": ids, "newest": token[:, None]}.get(feeds, torch.cat((ids, token[:, None]), dim=1))
    new = torch.stack(new, dim=1)
    return torch.cat((start, new), dim=1) if prompt else new


LOOP = Exercise(
    key="08.7",
    reference=greedy_loop,
    cases=loop_cases,
    difficulty=3,
    minutes=20,
    points=3,
    mistakes=(
        Mistake(
            "never checks for `<eos>`",
            lambda *case: _loop(*case, finish=None, pads=False),
            "Keep one boolean per row, `finished`: set it if the token is eos, and stop when all are set.",
        ),
        Mistake(
            "keeps generating in a row that has ended while others have not",
            lambda *case: _loop(*case, pads=False),
            "In a finished row, the token becomes pad: `masked_fill(finished, pad)`.",
        ),
        Mistake(
            "stops as soon as one row has ended",
            lambda *case: _loop(*case, finish=torch.any),
            "The other rows are not done: stop when `finished.all()`.",
        ),
        Mistake(
            "continues to max_new_tokens after all rows have ended",
            lambda *case: _loop(*case, finish=None),
            "Leave the loop when `finished.all()`: any further step only generates padding.",
        ),
        Mistake(
            "replaces `<eos>` itself by pad",
            lambda *case: _loop(*case, hides=True),
            "First pad the rows that finished *before*, then check whether the new token is eos.",
        ),
        Mistake(
            "does not append the new token to ids",
            lambda *case: _loop(*case, feeds="nothing"),
            "The next step needs the new token: `torch.cat((ids, token[:, None]), dim=1)`.",
        ),
        Mistake(
            "feeds only the newest token",
            lambda *case: _loop(*case, feeds="newest"),
            "This model has no cache: it needs the prompt and all new tokens at every step.",
        ),
        Mistake(
            "returns the prompt too",
            lambda *case: _loop(*case, prompt=True),
            "Return only the new tokens, [B, N]: collect them in a separate list.",
        ),
        Mistake(
            "generates one token too few",
            lambda *case: _loop(*case, fewer=1),
            "A row without `<eos>` has max_new_tokens tokens.",
        ),
    ),
)

EXERCISES = [MERGE, NEAREST, LOCATIONS, CODE_GRID, PASTE, TOP_P, LOOP]
