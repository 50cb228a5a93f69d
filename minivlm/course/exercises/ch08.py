"""Chapter 08: how it all answers a question about an image."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from minivlm import generation, locations, paligemma
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- 08.1 -----------------------------------------------------------------------------------------------------------


def merge_cases(rng):
    """Rows of T tokens, P of them placeholders: together, behind padding of any length, or apart."""
    for rows, length, P, D, where, name in (
        (2, 6, 3, 4, "start", "placeholders first"),
        (3, 8, 2, 5, "together", "padding in front of the placeholders"),
        (1, 7, 4, 2, "apart", "a batch of one, placeholders apart"),
        (3, 9, 4, 6, "apart", "placeholders apart"),
        (4, 7, 3, 2, "together", "more rows than image tokens"),
        (2, 8, 1, 5, "together", "one image token"),
    ):
        yield Case(_merge_arguments(rng, rows, length, P, D, where), name)
    x, is_image, features = _merge_arguments(rng, 3, 7, 2, 4, "together")
    yield Case((x.bfloat16(), is_image, features.bfloat16()), "bfloat16")


def _merge_arguments(rng, rows, length, P, D, where):
    is_image = torch.zeros(rows, length, dtype=torch.bool)
    starts = rng.permutation(length - P)[:rows] + 1  # all rows differ, and no row starts with a placeholder
    for row, start in zip(is_image, starts, strict=True):
        if where == "apart":  # the last token and others, but not all behind one another
            row[torch.from_numpy(rng.permutation(length - 2)[: P - 1])] = True
            row[-1] = True
        else:
            start = 0 if where == "start" else start
            row[start : start + P] = True
    return normal(rng, rows, length, D), is_image, normal(rng, rows, P, D)


def _merge(x, is_image, features):
    return x.masked_scatter(is_image[..., None], features)


def _over_the_first(x, is_image, features):
    x = x.clone()
    x[:, : features.shape[1]] = features
    return x


def _from_the_first_placeholder(x, is_image, features):
    x = x.clone()
    for row, marks, patches in zip(x, is_image, features, strict=True):
        start = int(marks.long().argmax())
        row[start : start + len(patches)] = patches[: len(row) - start]
    return x


def _into_the_text(x, is_image, features):
    slot = (is_image.long().cumsum(1) - 1).clamp(min=0)
    spread = features.gather(1, slot[..., None].expand_as(x))
    return torch.where(is_image[..., None], x, spread)


def _at_position(x, is_image, features):
    spread = F.pad(features, (0, 0, 0, x.shape[1] - features.shape[1]))
    return torch.where(is_image[..., None], spread, x)


MERGE = Exercise(
    key="08.1",
    reference=paligemma.merge_image_features,
    cases=merge_cases,
    difficulty=2,
    minutes=12,
    hints=(
        (
            "Read row by row, the placeholders come in the same order as the patches. Nothing has to be "
            "computed, only put in the right places."
        ),
        (
            "There are two ways. Copy and assign: `y[is_image] = …`, where the right-hand side has shape `[B · "
            "P, D]`. Or use `x.masked_scatter(mask, source)`, whose mask can be `[B, T, 1]`."
        ),
    ),
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
            "expects the placeholders of a row to be next to each other",
            _from_the_first_placeholder,
            "`is_image` marks each position: assign to these positions, not to a slice.",
        ),
        Mistake(
            "uses the placeholders of the first row for all rows",
            lambda x, is_image, features: _merge(x, is_image[:1].expand_as(is_image), features),
            "Each row has its own placeholders: index with the whole of `is_image`.",
        ),
        Mistake(
            "fills in the images one patch at a time across the rows",
            lambda x, is_image, features: _merge(x, is_image, features.transpose(0, 1).contiguous()),
            "The mask is read row by row, so the features must come in the order [B, P]: first all patches of row 0.",
        ),
        Mistake(
            "scales the text embeddings too",
            lambda x, is_image, features: _merge(x * x.shape[-1] ** 0.5, is_image, features),
            "The embeddings in `x` are already scaled: they stay unchanged.",
        ),
        Mistake(
            "replaces the text instead of the placeholders",
            _into_the_text,
            "`is_image` is True at the placeholders: only these positions change.",
        ),
        Mistake(
            "gives all placeholders of a row its first patch",
            lambda x, is_image, features: torch.where(is_image[..., None], features[:, :1], x),
            "The first placeholder of a row gets the first patch, the next one the second, and so on.",
        ),
        Mistake(
            "gives all placeholders of a row the mean of its patches",
            lambda x, is_image, features: torch.where(is_image[..., None], features.mean(1, keepdim=True), x),
            "Each placeholder gets one patch of its own.",
        ),
        Mistake(
            "places patch t at position t",
            _at_position,
            "The first placeholder of a row gets the first patch, wherever it is.",
        ),
        Mistake(
            "passes a mask without the axis D",
            lambda x, is_image, features: x.masked_scatter(is_image, features),
            "`masked_scatter` broadcasts the mask to `x`, which has three axes: `is_image[..., None]`.",
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
    for P, V, D, name in (
        (5, 7, 3, "more tokens than patches"),
        (8, 4, 2, "more patches than tokens"),
        (4, 9, 5, "five dimensions"),
        (1, 8, 4, "a single patch"),
        (9, 6, 3, "three dimensions"),
    ):
        lengths = torch.from_numpy(rng.lognormal(0, 1, (V, 1))).float()
        yield Case((normal(rng, P, D) * 2, normal(rng, V, D) * lengths), name)


def _cosines(features, table):
    return F.normalize(features, dim=-1) @ F.normalize(table, dim=-1).T


NEAREST = Exercise(
    key="08.2",
    reference=nearest_word,
    cases=table_cases,
    difficulty=1,
    minutes=8,
    hints=(
        (
            "A cosine is a dot product of vectors of length 1. So what has to happen to the rows of both "
            "tensors first? All P · V dot products are then one matrix product. And you need the index of the "
            "largest, not its value."
        ),
        ("`torch.nn.functional.normalize(…, dim=-1)` for both, then `@` with the transposed table, then `argmax`."),
    ),
    mistakes=(
        Mistake(
            "compares dot products, so long embeddings win",
            lambda features, table: (features @ table.T).argmax(-1),
            "Scale every row to length 1 first, the table's too: `F.normalize(table, dim=-1)`.",
        ),
        Mistake(
            "divides by squared lengths, so short embeddings win",
            lambda features, table: (features @ (table / table.square().sum(-1, keepdim=True)).T).argmax(-1),
            "The length of a vector is the root of its summed squares.",
        ),
        Mistake(
            "subtracts the mean of each vector first",
            lambda features, table: _cosines(
                features - features.mean(-1, keepdim=True), table - table.mean(-1, keepdim=True)
            ).argmax(-1),
            "A cosine compares the vectors themselves. With centered vectors it is a correlation.",
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
            "returns one index for all patches together",
            lambda features, table: _cosines(features, table).argmax(),
            "One answer per patch: take the largest over the vocabulary, the last axis, `argmax(-1)`.",
        ),
        Mistake(
            "returns the embeddings instead of their indices",
            lambda features, table: table[_cosines(features, table).argmax(-1)],
            "The answer is the row number itself, an integer per patch.",
        ),
        Mistake(
            "returns all cosines",
            lambda features, table: _cosines(features, table),
            "One index per patch: `argmax(-1)` finds the largest.",
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
    for width, height, name in (
        (400, 100, "a wide image"),
        (112, 224, "a tall image"),
        (640, 480, "a photo"),
        (30, 70, "a small image"),
        (2046, 341, "a box up to the far edges"),
        (333, 500, "a box without width"),
    ):
        y0, y1 = sorted(int(i) for i in rng.choice(1024, 2, replace=False))
        x0, x1 = sorted(int(i) for i in rng.choice(1024, 2, replace=False))
        if name.endswith("far edges"):
            y1 = x1 = 1023
        yield Case(((y0, x0, y1, x0 if name.endswith("width") else x1), width, height), name)


def _pixels(bins, width, height, largest=1023):
    y0, x0, y1, x1 = bins
    return x0 / largest * width, y0 / largest * height, x1 / largest * width, y1 / largest * height


def _corner_and_size(bins, width, height):
    x0, y0, x1, y1 = _pixels(bins, width, height)
    return x0, y0, x1 - x0, y1 - y0


def _center_and_size(bins, width, height):
    x0, y0, x1, y1 = _pixels(bins, width, height)
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


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
    hints=(
        (
            "Turn each bin into a fraction of its side first: bin 0 is one edge of the image and bin 1023 the "
            "other. Which side belongs to which bin, and in which order should the four come out?"
        ),
        ("Unpack `y0, x0, y1, x1 = bins`. A fraction is `bin / 1023`; x belongs to the width and y to the height."),
    ),
    outputs=("x0", "y0", "x1", "y1"),
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
            "divides by 1022",
            lambda bins, width, height: _pixels(bins, width, height, 1022),
            "The last bin, 1023, is the far edge: divide by 1023.",
        ),
        Mistake(
            "divides by 1000",
            lambda bins, width, height: _pixels(bins, width, height, 1000),
            "There are 1,024 bins, and the last, 1023, is the far edge: divide by 1023.",
        ),
        Mistake(
            "takes the middle of each bin",
            lambda bins, width, height: _pixels([i + 0.5 for i in bins], width, height, 1024),
            "Bin 0 is the near edge and bin 1023 the far edge: divide by 1023.",
        ),
        Mistake(
            "makes bin 1023 the last pixel instead of the far edge",
            lambda bins, width, height: _pixels(bins, width - 1, height - 1),
            "Bin 1023 is the far edge of the image: x = width, not width − 1.",
        ),
        Mistake(
            "returns the bins instead of pixels",
            lambda bins, width, height: tuple(float(bins[i]) for i in (1, 0, 3, 2)),
            "A bin is a fraction of the image in steps of 1/1023: return pixels.",
        ),
        Mistake(
            "multiplies everything by the width",
            lambda bins, width, height: _pixels(bins, width, width),
            "x runs along the width, y along the height.",
        ),
        Mistake(
            "multiplies everything by the height",
            lambda bins, width, height: _pixels(bins, height, height),
            "x runs along the width, y along the height.",
        ),
        Mistake(
            "truncates to whole pixels",
            lambda bins, width, height: tuple(int(v) for v in _pixels(bins, width, height)),
            "In a small image, a bin is a fraction of a pixel: do not round.",
        ),
        Mistake(
            "returns the center, width and height instead of two corners",
            _center_and_size,
            "The box is two corners: (x0, y0, x1, y1).",
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


def top_p_cases(rng):
    """Logits that sum to no probability near p, so that rounding never decides; ties only where all of them stay."""
    for rows, V, p, name in (
        (2, 7, None, "two rows"),
        (3, 6, None, "three rows"),
        (1, 9, None, "a batch of one"),
        (4, 12, 0.9, "a large p"),
        (2, 8, 0.01, "a tiny p"),
        (3, 5, 1.0, "p = 1"),
        (2, 9, None, "after top-k"),
        (3, 8, 0.95, "ties"),
    ):
        clear = False
        while not clear:
            logits, q = normal(rng, rows, V) * 1.5, float(rng.uniform(0.4, 0.9)) if p is None else p
            if name == "after top-k":
                logits[:, [1, 4]] = -math.inf
            if name == "ties":
                logits[:, 2] = logits[:, 5] = logits.amax(-1) + 0.5
            probabilities, _ = _sorted(logits)
            sums = probabilities.cumsum(-1)[:, : -2 if name == "after top-k" else None]
            clear = q == 1 or (sums - q).abs().min() > 1e-4
        yield Case((logits, q), name)


def _sorted(logits):
    return logits.softmax(-1).sort(-1, descending=True)


def _drop(logits, order, dropped):
    return logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, dropped), -math.inf)


def _top_p(logits, p, largest_first=True, keep=True):
    probabilities, order = logits.softmax(-1).sort(-1, descending=largest_first)
    return _drop(logits, order, (probabilities.cumsum(-1) - probabilities >= p) == keep)


def _first_always(logits, p):
    probabilities, order = _sorted(logits)
    dropped = probabilities.cumsum(-1) >= p
    dropped[:, 0] = False
    return _drop(logits, order, dropped)


def _gathered(logits, p):
    probabilities, order = _sorted(logits)
    return logits.masked_fill((probabilities.cumsum(-1) - probabilities >= p).gather(-1, order), -math.inf)


def _summed_logits(logits, p):
    values, order = logits.sort(-1, descending=True)
    return _drop(logits, order, values.cumsum(-1) - values >= p)


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
    key="08.4",
    reference=generation.top_p_filter,
    cases=top_p_cases,
    difficulty=2,
    minutes=15,
    hints=(
        "Sort the tokens by probability. A token is dropped if those before it already reach p.",
        (
            "`values, order = probabilities.sort(-1, descending=True)`. The sum before each token is the "
            "running sum, `cumsum(-1)`, minus the token's own probability. `torch.zeros_like(logits, "
            "dtype=torch.bool).scatter(-1, order, dropped)` puts a mask of the sorted tokens back into the "
            "original order."
        ),
    ),
    mistakes=(
        Mistake(
            "drops the token whose probability makes the sum reach p",
            _without_crossing_token,
            "Keep a token if the sum of those *before* it is below p. Then the most likely token always stays.",
        ),
        Mistake(
            "drops the token whose probability makes the sum reach p, unless it is the most likely",
            _first_always,
            "Keep a token if the sum of those *before* it is below p: the one that reaches p stays.",
        ),
        Mistake(
            "uses gather instead of scatter to restore the order",
            _gathered,
            "`order[i]` is where sorted token i belongs: `scatter(-1, order, dropped)` writes it there.",
        ),
        Mistake(
            "sums logits instead of probabilities",
            _summed_logits,
            "Only probabilities sum to 1: take the softmax first.",
        ),
        Mistake(
            "keeps the tokens it should drop",
            lambda logits, p: _top_p(logits, p, keep=False),
            "Drop a token if the sum of those before it is p or more.",
        ),
        Mistake(
            "compares with 1 − p",
            lambda logits, p: _top_p(logits, 1 - p),
            "The kept tokens, most likely first, sum to p or more.",
        ),
        Mistake(
            "keeps every token with at least p times the largest probability",
            lambda logits, p: logits.masked_fill(
                logits.softmax(-1) < p * logits.softmax(-1).amax(-1, keepdim=True), -math.inf
            ),
            "That is min-p. Top-p compares the cumulative sum with p, most likely token first: `cumsum(-1)`.",
        ),
        Mistake(
            "uses the first row's tokens for all rows",
            lambda logits, p: logits.masked_fill(_top_p(logits, p)[:1].isinf(), -math.inf),
            "Each row has its own kept tokens: do everything along the last axis and keep the batch axis.",
        ),
        Mistake(
            "returns which tokens are kept instead of their logits",
            lambda logits, p: _top_p(logits, p) > -math.inf,
            "Return the logits: `masked_fill` sets the others to −∞.",
        ),
        Mistake(
            "renormalizes the kept logits",
            lambda logits, p: _top_p(logits, p).log_softmax(-1),
            "Kept logits stay unchanged: the softmax is applied when a token is sampled.",
        ),
        Mistake(
            "fills with a large negative number instead of −∞",
            lambda logits, p: _top_p(logits, p).masked_fill(_top_p(logits, p).isinf() & ~logits.isinf(), -1e9),
            "Fill with `-torch.inf`: only exp(−∞) is exactly 0, and it works for logits of any size.",
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


# --- 08.5 -----------------------------------------------------------------------------------------------------------


TOY_VOCAB_SIZE, TOY_TABLE_SIZE = 6, 1009


@dataclass(frozen=True)
class ToyModel:
    """A toy language model: the logits of the next token depend on all tokens so far and on their order.

    They are random, except that the texts in ``planned`` (by their hash) are followed by a given token.
    """

    seed: int
    planned: tuple[tuple[int, int], ...]

    def __call__(self, ids):
        table = torch.randn(TOY_TABLE_SIZE, TOY_VOCAB_SIZE, generator=torch.Generator().manual_seed(self.seed))
        table[tuple(torch.tensor(self.planned).T)] += 10
        return table[text_hash(ids)]


def text_hash(ids):
    """A number for each row of token ids, [B]."""
    result = torch.zeros(len(ids), dtype=torch.long)
    for column in ids.T:
        result = (31 * result + column + 1) % TOY_TABLE_SIZE
    return result


def plan(rng, ids, answers):
    """A model that answers each prompt as planned, or None if two texts with one hash need different tokens."""
    planned = {}
    for prompt, answer in zip(ids.tolist(), answers, strict=True):
        for i, token in enumerate(answer):
            text = int(text_hash(torch.tensor([prompt + answer[:i]])))
            if planned.setdefault(text, token) != token:
                return None
    return ToyModel(int(rng.integers(10_000)), tuple(planned.items()))


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


def loop_cases(rng):
    """Rows that end at different steps, by an eos or by the limit; the ids of pad and eos differ from case to case.

    ``lengths`` are those of the answers up to eos. One that is longer than the limit has no eos.
    """
    for lengths, length, pad, eos, most, name in (
        ((2, 5), 3, 0, 1, 7, "rows that end at different steps"),
        ((7, 2, 4), 5, 3, 0, 6, "a row that reaches the limit"),
        ((3,), 5, 2, 4, 8, "a batch of one"),
        ((4, 1, 3), 2, 0, 5, 7, "a row that ends at once"),
        ((2, 2), 4, 5, 3, 1, "max_new_tokens = 1"),
        ((3, 4), 5, 0, 1, 7, "a prompt that contains eos"),
        ((5, 2, 3), 4, 0, 1, 8, "prompts padded on the left"),
        ((7, 7), 3, 1, 2, 6, "no row ends by itself"),
        ((3, 6), 4, 2, 1, 6, "a row that ends at the limit"),
    ):
        words, model = np.setdiff1d(np.arange(TOY_VOCAB_SIZE), (pad, eos)), None
        while model is None:
            ids = torch.from_numpy(rng.choice(words, (len(lengths), length)))
            if name == "a prompt that contains eos":
                ids[0, 1] = eos
            if name == "prompts padded on the left":
                ids[0, :2], ids[1, :1] = pad, pad
            answers = [rng.choice(words, n - 1).tolist() + [eos] for n in lengths]
            model = plan(rng, ids, [answer[:most] for answer in answers])
        yield Case((model, ids, eos, pad, most), name)


def _loop(
    next_logits,
    ids,
    eos,
    pad,
    most,
    *,
    finish=torch.all,
    pads=True,
    hides=False,
    feeds=None,
    prompt=False,
    fewer=0,
    best=torch.argmax,
    axis=1,
    finished_before=False,
    drops_eos=False,
):
    """The loop with one thing wrong, chosen by the options."""
    new, start = [], ids
    finished = (ids == eos).any(-1) & finished_before
    for _ in range(most - fewer):
        token = best(next_logits(ids), -1)
        if hides:
            finished = finished | (token == eos)
        token = token.masked_fill(finished, pad) if pads else token
        if drops_eos and (finished | (token == eos)).all():
            break
        new.append(token)
        finished = finished | (token == eos)
        if finish is not None and finish(finished):
            break
        ids = {"nothing": ids, "newest": token[:, None]}.get(feeds, torch.cat((ids, token[:, None]), dim=1))
    new = torch.stack(new, dim=axis) if new else start[:, :0]
    return torch.cat((start, new), dim=1) if prompt else new


def _first_row_for_all(next_logits, ids, eos, pad, most):
    new = []
    for _ in range(most):
        new.append(int(next_logits(ids)[0].argmax()))
        if new[-1] == eos:
            break
        ids = F.pad(ids, (0, 1), value=new[-1])
    return torch.tensor([new] * len(ids))


LOOP = Exercise(
    key="08.5",
    reference=greedy_loop,
    cases=loop_cases,
    difficulty=3,
    minutes=20,
    points=3,
    hints=(
        (
            "All rows go on until the last one has ended. A row that has ended still gets a token in each step, "
            "so replace it."
        ),
        (
            "Keep a boolean tensor `finished` `[B]`. In each iteration, in this order: choose; pad where "
            "finished; store the token; update with `finished = finished | (token == eos)`; stop if "
            "`finished.all()`; append with `torch.cat((ids, token[:, None]), dim=1)`."
        ),
    ),
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
            "fills with eos instead of pad",
            lambda model, ids, eos, pad, most: _loop(model, ids, eos, eos, most),
            "After its `<eos>`, a row is filled with `pad`.",
        ),
        Mistake(
            "fills with 0 instead of pad",
            lambda model, ids, eos, pad, most: _loop(model, ids, eos, 0, most),
            "`pad` is an argument, because not every tokenizer has it at 0.",
        ),
        Mistake(
            "ends a row because of an eos in its prompt",
            lambda *case: _loop(*case, finished_before=True),
            "Only new tokens end an answer: `finished` starts as all False.",
        ),
        Mistake(
            "leaves out the last eos",
            lambda *case: _loop(*case, drops_eos=True),
            "The answer includes its `<eos>`: store the token, then check whether all rows are finished.",
        ),
        Mistake(
            "replaces `<eos>` itself by pad and leaves out the last one",
            lambda *case: _loop(*case, drops_eos=True, hides=True),
            "The answer includes its `<eos>`: store the token first, then update `finished`, then check it.",
        ),
        Mistake(
            "generates the first row's tokens for all rows",
            _first_row_for_all,
            "Each row has its own next token: `next_logits(ids).argmax(-1)` has shape [B].",
        ),
        Mistake(
            "takes the least likely token",
            lambda *case: _loop(*case, best=torch.argmin),
            "The next token is the most likely one: `argmax(-1)`.",
        ),
        Mistake(
            "returns [N, B] instead of [B, N]",
            lambda *case: _loop(*case, axis=0),
            "Each row of the result is one answer: `torch.stack(new, dim=1)`.",
        ),
        Mistake(
            "generates one token too many",
            lambda *case: _loop(*case, fewer=-1),
            "A row without `<eos>` has max_new_tokens tokens.",
        ),
        Mistake(
            "ignores max_new_tokens",
            lambda model, ids, eos, pad, most: _loop(model, ids, eos, pad, 10 * most),
            "A row may never produce `<eos>`: stop after max_new_tokens.",
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

EXERCISES = [MERGE, NEAREST, LOCATIONS, TOP_P, LOOP]
