"""Chapter 08: how it all answers a question about a picture."""

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
    """Rows of T tokens with P image tokens each, in the first row in front, in the others anywhere."""
    for rows, length, pictures, width in ((2, 6, 3, 4), (3, 5, 2, 3), (1, 7, 4, 2), (2, 8, 3, 5), (3, 4, 2, 2)):
        is_image = torch.zeros(rows, length, dtype=torch.bool)
        is_image[0, :pictures] = True
        for row in is_image[1:]:
            row[torch.from_numpy(rng.permutation(length)[:pictures])] = True
        yield normal(rng, rows, length, width), is_image, normal(rng, rows, pictures, width)


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
            "multiplies the image features by √D as well",
            lambda x, is_image, features: _merge(x, is_image, features * features.shape[-1] ** 0.5),
            "The text in `x` has been scaled before; the image features go in as they come from the projector.",
        ),
        Mistake(
            "divides the image features by √D",
            lambda x, is_image, features: _merge(x, is_image, features / features.shape[-1] ** 0.5),
            "That belongs to the other convention, in which everything is multiplied by √D afterwards.",
        ),
        Mistake(
            "overwrites the first P places, whatever stands there",
            _over_the_first,
            "Padding may stand in front of the picture: `is_image` says where the places are, row by row.",
        ),
        Mistake(
            "gives every row the first picture",
            lambda x, is_image, features: _merge(x, is_image, features[:1].expand_as(features)),
            "Row b takes `features[b]`.",
        ),
        Mistake(
            "adds the image features to what stood there",
            lambda x, is_image, features: x + _merge(torch.zeros_like(x), is_image, features),
            "The placeholder's embedding means nothing: it is replaced, not added to.",
        ),
        Mistake(
            "puts the patches in backwards",
            lambda x, is_image, features: _merge(x, is_image, features.flip(1)),
            "The first image token of a row takes the first of its patches.",
        ),
        Mistake(
            "loses the text",
            lambda x, is_image, features: _merge(torch.zeros_like(x), is_image, features),
            "Where `is_image` is False, the row of `x` stays: start from a copy of `x`, not from zeros.",
        ),
        Mistake(
            "puts the image features in front of everything and keeps the placeholders",
            lambda x, is_image, features: torch.cat((features, x), dim=1),
            "The result has the shape of `x`: the placeholders hold the room for the picture.",
        ),
    ),
)


# --- 08.2 -----------------------------------------------------------------------------------------------------------


def nearest_word(features, table):
    """Patches [P, D], embedding table [V, D] → for each patch the row of the table with the largest cosine, [P]."""
    return (F.normalize(features, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


def table_cases(rng):
    """Words of very different lengths, so that the dot product and the cosine disagree."""
    for patches, words, width in ((5, 7, 3), (6, 4, 2), (4, 9, 5), (7, 8, 4), (9, 6, 3)):
        lengths = torch.from_numpy(rng.lognormal(0, 1, (words, 1))).float()
        yield normal(rng, patches, width) * 2, normal(rng, words, width) * lengths


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
            "compares by the dot product, which long embeddings win",
            lambda features, table: (features @ table.T).argmax(-1),
            "Bring every row to length 1 first: `F.normalize(table, dim=-1)`.",
        ),
        Mistake(
            "normalizes along the wrong axis",
            lambda features, table: (F.normalize(features, dim=0) @ F.normalize(table, dim=0).T).argmax(-1),
            "Each vector lies along the last axis: `F.normalize(…, dim=-1)`.",
        ),
        Mistake(
            "finds the patch nearest to each word, not the word nearest to each patch",
            lambda features, table: _cosines(features, table).argmax(0),
            "One answer a patch: of the cosines [P, V] take the largest along the words, the last axis.",
        ),
        Mistake(
            "finds the word farthest away",
            lambda features, table: _cosines(features, table).argmin(-1),
            "A large cosine means near: `argmax`.",
        ),
        Mistake(
            "takes the smallest distance instead of the largest cosine",
            lambda features, table: torch.cdist(features, table).argmin(-1),
            "Distance depends on the lengths of the vectors, the cosine on their directions alone.",
        ),
        Mistake(
            "takes opposite for near",
            lambda features, table: _cosines(features, table).abs().argmax(-1),
            "A cosine of −1 is the opposite direction: leave the sign.",
        ),
        Mistake(
            "gives the cosines and not the words",
            lambda features, table: _cosines(features, table).amax(-1),
            "Which word it is, its row in the table, is what `argmax` gives.",
        ),
    ),
)


# --- 08.3 -----------------------------------------------------------------------------------------------------------


def places_cases(rng):
    """Pictures that are not square, so that width and height cannot be taken for each other."""
    for width, height in ((400, 100), (112, 224), (640, 480), (30, 70), (1023, 341)):
        y0, y1 = sorted(int(i) for i in rng.choice(1024, 2, replace=False))
        x0, x1 = sorted(int(i) for i in rng.choice(1024, 2, replace=False))
        yield (y0, x0, y1, x1), width, height


def _pixels(places, width, height, bins=1023):
    y0, x0, y1, x1 = places
    return x0 / bins * width, y0 / bins * height, x1 / bins * width, y1 / bins * height


def _corner_and_size(places, width, height):
    x0, y0, x1, y1 = _pixels(places, width, height)
    return x0, y0, x1 - x0, y1 - y0


def _reordered(order):
    def function(places, width, height):
        box = _pixels(places, width, height)
        return tuple(box[i] for i in order)

    return function


PLACES = Exercise(
    key="08.3",
    reference=locations.locations_to_box,
    cases=places_cases,
    difficulty=1,
    minutes=8,
    mistakes=(
        Mistake(
            "reads x before y",
            lambda places, width, height: _pixels([places[i] for i in (1, 0, 3, 2)], width, height),
            "PaliGemma writes y min, x min, y max, x max: the first of the four is a height.",
        ),
        Mistake(
            "returns y before x",
            _reordered((1, 0, 3, 2)),
            "Each number is right, but the box is (x0, y0, x1, y1).",
        ),
        Mistake(
            "divides by 1024",
            lambda places, width, height: _pixels(places, width, height, 1024),
            "There are 1,024 bins, and the last, 1023, is the far edge: divide by 1023.",
        ),
        Mistake(
            "leaves fractions of the picture",
            lambda places, width, height: _pixels(places, 1, 1),
            "Pixels are wanted: x times the width, y times the height.",
        ),
        Mistake(
            "multiplies x by the height and y by the width",
            lambda places, width, height: _pixels(places, height, width),
            "x runs along the width, y along the height.",
        ),
        Mistake(
            "gives a corner with width and height in place of two corners",
            _corner_and_size,
            "The last two numbers are the second corner, not the size.",
        ),
        Mistake(
            "puts both x before both y",
            _reordered((0, 2, 1, 3)),
            "One corner after the other: (x0, y0, x1, y1).",
        ),
        Mistake(
            "rounds to whole pixels",
            lambda places, width, height: tuple(round(v) for v in _pixels(places, width, height)),
            "A bin is a fraction of a pixel in a small picture: leave the numbers as they are.",
        ),
    ),
)


# --- 08.4 -----------------------------------------------------------------------------------------------------------


def code_cases(rng):
    """Small codebooks whose width is neither 4 nor the number of masks."""
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
            "The first four codes are the top row, from left to right: place i is row i // 4, column i % 4.",
        ),
        Mistake(
            "leaves the width behind rows and columns",
            lambda codes, codebook: codebook[codes].unflatten(1, (4, 4)),
            "A convolution wants [B, D, rows, columns]: bring D in front of the places, `transpose(1, 2)`.",
        ),
        Mistake(
            "reshapes where it should transpose, and so mixes width and places",
            lambda codes, codebook: codebook[codes].reshape(len(codes), -1, 4, 4),
            "`reshape` keeps the numbers in their order: first `transpose(1, 2)`, then split the 16 places.",
        ),
        Mistake(
            "stands the grid on its head",
            lambda codes, codebook: _grid(codes, codebook).flip(2),
            "The first row of codes is the top row of the mask.",
        ),
        Mistake(
            "mirrors the grid",
            lambda codes, codebook: _grid(codes, codebook).flip(3),
            "Within a row the codes go from left to right.",
        ),
        Mistake(
            "fills the grid from its end",
            lambda codes, codebook: _grid(codes.flip(1), codebook),
            "The first code is the top left one.",
        ),
        Mistake(
            "leaves the 16 places in one line",
            lambda codes, codebook: codebook[codes].mT,
            "Split the last axis in two, `unflatten(2, (4, 4))`: a convolution needs rows and columns.",
        ),
        Mistake(
            "puts the width between rows and columns",
            lambda codes, codebook: _grid(codes, codebook).transpose(1, 2),
            "The order is [B, D, rows, columns]: both axes of the grid come last.",
        ),
        Mistake(
            "puts the width in front of the masks",
            lambda codes, codebook: _grid(codes, codebook).transpose(0, 1),
            "The batch stays the first axis, the width is the second: [B, D, 4, 4].",
        ),
        Mistake(
            "counts the codes from 1",
            lambda codes, codebook: _grid(codes - 1, codebook),
            "`<seg000>` is the first row of the codebook, row 0.",
        ),
        Mistake(
            "lays out the codes themselves, not their vectors",
            lambda codes, codebook: codes.reshape(-1, 1, 4, 4),
            "A code is the number of a row of the codebook: `codebook[codes]` are the vectors.",
        ),
    ),
)


# --- 08.5 -----------------------------------------------------------------------------------------------------------


def paste_cases(rng):
    """Blots in boxes that are never square and fit into the picture either way round; the last box has no width."""
    for width, height, flat in ((40, 30, 0), (30, 44, 0), (130, 100, 0), (28, 60, 0), (50, 36, 1)):
        short, clear = min(width, height), False
        while not clear:
            (x0, x1), (y0, y1) = np.sort(rng.uniform(0, short, (2, 2))).tolist()
            box = (x0, y0, x0 if flat else x1, y1)
            blots = _stretch(rng.normal(0, 3, (7, 7)).astype(np.float32), (64, 64))
            values = np.tanh(blots + rng.normal(0, 0.3, (64, 64))).astype(np.float32)
            part = _stretch(values, _size(locations.pixel_box(box, width, height)))
            large = min(x1 - x0, y1 - y0) > short / 4 and abs((x1 - x0) - (y1 - y0)) > 3
            clear = large and np.abs(part).min() > 1e-4  # so that no rounding of a float decides
        yield values, box, width, height


def _size(window):
    x0, y0, x1, y1 = window
    return x1 - x0, y1 - y0


def _stretch(values, size, how=Image.Resampling.BILINEAR):
    return np.asarray(Image.fromarray(values).resize(size, how))


def _skipping(values, size):
    values = torch.from_numpy(values)[None, None]
    return F.interpolate(values, size[::-1], mode="bilinear", align_corners=False)[0, 0].numpy()


def _pasted(inside):
    """The right paste, but for what it takes to be inside the box: `inside(values, (w, h))` → [h, w] of booleans."""

    def function(values, box, width, height):
        x0, y0, x1, y1 = window = locations.pixel_box(box, width, height)
        mask = np.zeros((height, width), bool)
        mask[y0:y1, x0:x1] = inside(values, _size(window))
        return mask

    return function


def _at_the_origin(values, box, width, height):
    w, h = _size(locations.pixel_box(box, width, height))
    mask = np.zeros((height, width), bool)
    mask[:h, :w] = _stretch(values, (w, h)) > 0
    return mask


def _x_along_the_rows(values, box, width, height):
    x0, y0, x1, y1 = locations.pixel_box(box, width, height)
    mask = np.zeros((height, width), bool)
    mask[x0:x1, y0:y1] = _stretch(values, (y1 - y0, x1 - x0)) > 0
    return mask


def _width_many_rows(values, box, width, height):
    x0, y0, x1, y1 = window = locations.pixel_box(box, width, height)
    mask = np.zeros((width, height), bool)
    mask[y0:y1, x0:x1] = _stretch(values, _size(window)) > 0
    return mask


def _corners_cut_off(values, box, width, height):
    return _pasted(lambda values, size: _stretch(values, size) > 0)(values, tuple(int(v) for v in box), width, height)


PASTE = Exercise(
    key="08.5",
    reference=locations.paste_mask,
    cases=paste_cases,
    difficulty=2,
    minutes=15,
    mistakes=(
        Mistake(
            "compares with 0.5, as if the values went from 0 to 1",
            _pasted(lambda values, size: _stretch(values, size) > 0.5),
            "The decoder's values go from about −1, outside, to 1, inside: the middle is 0.",
        ),
        Mistake(
            "compares with 127, as if the values were bytes",
            _pasted(lambda values, size: _stretch(values, size) > 127),
            "The decoder's values go from about −1, outside, to 1, inside: the middle is 0.",
        ),
        Mistake(
            "compares first and stretches afterwards",
            _pasted(lambda values, size: _stretch((values > 0).astype(np.float32), size) > 0.5),
            "Stretch the numbers, then compare: how far inside a value is decides where the outline runs.",
        ),
        Mistake(
            "takes the nearest value in place of a blend",
            _pasted(lambda values, size: _stretch(values, size, Image.Resampling.NEAREST) > 0),
            "`Image.Resampling.BILINEAR`, and on numbers: a picture of True and False is never blended.",
        ),
        Mistake(
            "skips values where the box is smaller than 64×64",
            _pasted(lambda values, size: _skipping(values, size) > 0),
            "`F.interpolate` blends what it would skip with `antialias=True` only; PIL's `resize` does so by itself.",
        ),
        Mistake(
            "calls inside what is outside",
            _pasted(lambda values, size: _stretch(values, size) < 0),
            "Above 0 is inside.",
        ),
        Mistake(
            "fills the whole box",
            _pasted(lambda values, size: True),
            "Within the box only the places are True where the stretched values are above 0.",
        ),
        Mistake(
            "returns the part in the box alone",
            lambda values, box, width, height: _stretch(values, _size(locations.pixel_box(box, width, height))) > 0,
            "The mask is as large as the picture: paste the part into `np.zeros((height, width), bool)`.",
        ),
        Mistake(
            "pastes at the picture's corner, not at the box's",
            _at_the_origin,
            "The part belongs to the rows y0 to y1 and the columns x0 to x1: `mask[y0:y1, x0:x1] = …`.",
        ),
        Mistake(
            "stretches over the whole picture",
            lambda values, box, width, height: _stretch(values, (width, height)) > 0,
            "The 64×64 values are a picture of the box, not of the whole.",
        ),
        Mistake(
            "lets x count the rows and y the columns",
            _x_along_the_rows,
            "An array is indexed [row, column], that is [y, x].",
        ),
        Mistake(
            "makes a mask with as many rows as the picture is wide",
            _width_many_rows,
            "Rows first: `np.zeros((height, width), bool)`.",
        ),
        Mistake(
            "gives `resize` the height before the width",
            _pasted(lambda values, size: _stretch(values, size[::-1]) > 0),
            "PIL's sizes are (width, height), numpy's shapes (rows, columns): `resize((x1 - x0, y1 - y0), …)`.",
        ),
        Mistake(
            "cuts off the fractions of the corners instead of rounding them",
            _corners_cut_off,
            "`pixel_box(box, width, height)` rounds the corners to whole pixels.",
        ),
    ),
)


# --- 08.6 -----------------------------------------------------------------------------------------------------------


def top_p_cases(rng):
    for rows, words in ((2, 7), (3, 6), (1, 9), (4, 8), (2, 12)):
        yield normal(rng, rows, words) * 1.5, float(rng.uniform(0.4, 0.9))


def _sorted(logits):
    return logits.softmax(-1).sort(-1, descending=True)


def _drop(logits, order, dropped):
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, dropped), -math.inf)


def _top_p(logits, p, largest_first=True):
    probabilities, order = logits.softmax(-1).sort(-1, descending=largest_first)
    return _drop(logits, order, probabilities.cumsum(-1) - probabilities >= p)


def _without_the_crossing(logits, p):
    probabilities, order = _sorted(logits)
    return _drop(logits, order, probabilities.cumsum(-1) > p)


def _one_too_many(logits, p):
    probabilities, order = _sorted(logits)
    before = probabilities.cumsum(-1) - probabilities
    return _drop(logits, order, F.pad(before[:, :-1], (1, 0)) >= p)


def _left_in_order(logits, p):
    values, _ = logits.sort(-1, descending=True)
    probabilities = values.softmax(-1)
    return values.masked_fill(probabilities.cumsum(-1) - probabilities >= p, -math.inf)


def _mask_not_put_back(logits, p):
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
            "drops the token with which the sum reaches p",
            _without_the_crossing,
            "Keep a token while the sum of those *before* it is below p; then the likeliest always stays.",
        ),
        Mistake(
            "keeps one token too many",
            _one_too_many,
            "What stands before the first token is 0, before the second the first one's probability alone.",
        ),
        Mistake(
            "keeps the unlikely tokens",
            lambda logits, p: _top_p(logits, p, largest_first=False),
            "Sort with `descending=True`: the likeliest come first.",
        ),
        Mistake(
            "returns the logits sorted, no longer in the order of the vocabulary",
            _left_in_order,
            "`sort` gives the order too: `scatter(-1, order, dropped)` puts the mask back to where the tokens were.",
        ),
        Mistake(
            "lays the mask of the sorted tokens over the unsorted ones",
            _mask_not_put_back,
            "`sort` gives the order too: `scatter(-1, order, dropped)` puts the mask back to where the tokens were.",
        ),
        Mistake(
            "puts 0 where −∞ belongs",
            lambda logits, p: _top_p(logits, p).masked_fill(_top_p(logits, p).isinf(), 0.0),
            "A logit of 0 still has a probability: only exp(−∞) is 0.",
        ),
        Mistake(
            "compares each single probability with p",
            lambda logits, p: logits.masked_fill(logits.softmax(-1) < p, -math.inf),
            "It is the running sum, likeliest first, that is compared with p: `cumsum(-1)`.",
        ),
        Mistake(
            "gives probabilities in place of logits",
            lambda logits, p: _top_p(logits, p).softmax(-1),
            "Kept logits stay as they are: the softmax comes when the token is drawn.",
        ),
    ),
)


# --- 08.7 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talker:
    """A toy language model: the scores of the next token depend on all tokens so far and on their order."""

    table: tuple[tuple[float, ...], ...]

    def __call__(self, ids):
        weights = torch.arange(1, ids.shape[1] + 1)
        return torch.tensor(self.table)[(ids * weights).sum(-1) % len(self.table)]


def greedy_loop(next_logits, ids, eos, pad, max_new_tokens):
    """Prompts [B, T] → new tokens [B, N]: the likeliest each time, until every row has written eos, or N is reached."""
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
    """Tokens of each row up to eos; one more than there are where a row has none."""
    return [row.index(eos) + 1 if eos in row else len(row) + 1 for row in new.tolist()]


def loop_cases(rng):
    """Rows that end at different steps, all of them before the limit or one of them cut by it."""
    pad, eos, most = 0, 1, 7
    for rows, cut in ((2, False), (3, True), (1, False), (3, False), (2, True)):
        while True:
            talker = Talker(tuple(tuple(row) for row in rng.normal(0, 1, (29, 6)).round(3).tolist()))
            ids = torch.from_numpy(rng.integers(2, 6, (rows, 3)))
            ends = lengths(greedy_loop(talker, ids, eos, pad, most), eos)
            if min(ends) > 1 and len(set(ends)) == rows and (max(ends) > most if cut else max(ends) < most):
                break
        yield talker, ids, eos, pad, most


def _loop(
    next_logits, ids, eos, pad, most, *, finish=torch.all, pads=True, hides=False, feeds=None, prompt=False, fewer=0
):
    """The loop with one thing wrong: which, is told by the options."""
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
            "never looks for `<eos>`",
            lambda *case: _loop(*case, finish=None, pads=False),
            "Keep a boolean a row, `finished`: set where the token is eos, and when all are set, stop.",
        ),
        Mistake(
            "writes on in a row that has ended, while others are not done",
            lambda *case: _loop(*case, pads=False),
            "Where a row is finished, its token becomes pad: `masked_fill(finished, pad)`.",
        ),
        Mistake(
            "stops as soon as one row has ended",
            lambda *case: _loop(*case, finish=torch.any),
            "The others still have something to say: stop when `finished.all()`.",
        ),
        Mistake(
            "goes on to max_new_tokens when all rows have ended",
            lambda *case: _loop(*case, finish=None),
            "When `finished.all()`, leave the loop: every further step would only write padding.",
        ),
        Mistake(
            "writes pad over `<eos>` itself",
            lambda *case: _loop(*case, hides=True),
            "First pad the rows that had finished *before*, then look whether the new token is eos.",
        ),
        Mistake(
            "does not append the new token to ids",
            lambda *case: _loop(*case, feeds="nothing"),
            "The next step must see what was written: `torch.cat((ids, token[:, None]), dim=1)`.",
        ),
        Mistake(
            "feeds the newest token without those before it",
            lambda *case: _loop(*case, feeds="newest"),
            "This model has no cache: it needs the prompt and all new tokens at every step.",
        ),
        Mistake(
            "returns the prompt as well",
            lambda *case: _loop(*case, prompt=True),
            "Only the new tokens are wanted, [B, N]: collect them in a list of their own.",
        ),
        Mistake(
            "writes one token too few",
            lambda *case: _loop(*case, fewer=1),
            "A row that does not end by itself has max_new_tokens tokens.",
        ),
    ),
)

EXERCISES = [MERGE, NEAREST, PLACES, CODE_GRID, PASTE, TOP_P, LOOP]
