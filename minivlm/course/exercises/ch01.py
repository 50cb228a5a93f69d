"""Chapter 01: how pictures and words come to share a space."""

import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course.exercises.exercise import Exercise, Mistake


def random_rows(rng, rows, width):
    """Vectors of very different lengths, so that it shows when a length is not divided out."""
    x = rng.normal(0, 1, (rows, width)) * rng.uniform(0.3, 3, (rows, 1))
    return torch.from_numpy(x).float()


def table_cases(rng):
    """Never as many rows as columns, so that no axis can be taken for the other."""
    for rows, width in ((2, 3), (4, 2), (3, 5), (1, 4), (5, 2)):
        yield (random_rows(rng, rows, width),)


NORMALISE = Exercise(
    key="01.1",
    reference=losses.l2_normalize,
    name="l2_normalize",  # chapter 04 has another normalize
    cases=table_cases,
    difficulty=1,
    minutes=5,
    mistakes=(
        Mistake(
            "normalizes over the batch axis",
            lambda x: x / x.norm(dim=0, keepdim=True),
            "Each row is a vector of its own: sum the squares along the last axis, `dim=-1`.",
        ),
        Mistake(
            "divides all vectors by one length, that of the whole table",
            lambda x: x / x.norm(),
            "Every row has its own length: say `dim=-1`.",
        ),
        Mistake(
            "lets the summed axis disappear, so that the division does not line up",
            lambda x: x / x.norm(dim=-1),
            "`keepdim=True` leaves the lengths as a column, [N, 1], which divides row by row.",
        ),
        Mistake(
            "divides by the sum of the absolute values",
            lambda x: x / x.abs().sum(-1, keepdim=True),
            "That is the L1 norm; the L2 norm is the root of the sum of the squares.",
        ),
        Mistake(
            "forgets the square root",
            lambda x: x / x.square().sum(-1, keepdim=True),
            "Σ x² is the square of the length: take its root.",
        ),
        Mistake(
            "divides by the root of the mean square, not of the sum",
            lambda x: x / x.square().mean(-1, keepdim=True).sqrt(),
            "Pythagoras sums the squares; the mean makes vectors of length √D.",
        ),
    ),
)


def clip_logits(images, texts, log_temperature):
    """[N, D], [M, D], a number → [N, M]: temperature × cosine of every picture with every text."""
    return log_temperature.exp() * (losses.l2_normalize(images) @ losses.l2_normalize(texts).T)


def logit_cases(rng):
    for N, M, D in ((2, 3, 4), (4, 2, 3), (3, 5, 2), (1, 4, 3), (5, 3, 6)):
        yield random_rows(rng, N, D), random_rows(rng, M, D), torch.tensor(float(rng.uniform(1.5, 3)))


LOGITS = Exercise(
    key="01.2",
    reference=clip_logits,
    cases=logit_cases,
    difficulty=1,
    minutes=8,
    mistakes=(
        Mistake(
            "forgets to normalize, so that long vectors win",
            lambda images, texts, log_temperature: log_temperature.exp() * (images @ texts.T),
            "A cosine is the dot product of vectors of length 1: normalize both sides first.",
        ),
        Mistake(
            "normalizes the pictures alone",
            lambda images, texts, log_temperature: log_temperature.exp() * (losses.l2_normalize(images) @ texts.T),
            "The texts have lengths too.",
        ),
        Mistake(
            "divides by the temperature instead of multiplying",
            lambda images, texts, log_temperature: clip_logits(images, texts, -log_temperature),
            "Here exp(t) is a factor, large for sharp choices; the τ of the paper, which divides, is its inverse.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            lambda images, texts, log_temperature: log_temperature * clip_logits(images, texts, log_temperature * 0),
            "What is learned is the logarithm: the factor is `log_temperature.exp()`.",
        ),
        Mistake(
            "leaves the temperature out",
            lambda images, texts, log_temperature: clip_logits(images, texts, log_temperature * 0),
            "Multiply the cosines by `log_temperature.exp()`.",
        ),
        Mistake(
            "has texts in the rows and pictures in the columns",
            lambda images, texts, log_temperature: clip_logits(texts, images, log_temperature),
            "The table is indexed [picture, text]: `images @ texts.T`.",
        ),
        Mistake(
            "goes on to the softmax",
            lambda images, texts, log_temperature: clip_logits(images, texts, log_temperature).softmax(1),
            "Logits are wanted: what comes before a softmax.",
        ),
    ),
)


def pair_cases(rng):
    """Pairs that are a little alike, two of them mixed up: the loss of an easy batch is little more than rounding."""
    for N, D in ((3, 4), (5, 3), (2, 6), (6, 4), (4, 5)):
        images = random_rows(rng, N, D)
        texts = images + random_rows(rng, N, D)
        texts[:2] = texts[:2].flip(0)
        yield images, texts, torch.tensor(float(rng.uniform(0.5, 2)))


def _two_ways(images, texts, log_temperature, reduction="mean", logits=clip_logits):
    """The cross-entropy of the rows and that of the columns."""
    table, own = logits(images, texts, log_temperature), torch.arange(len(images))
    return F.cross_entropy(table, own, reduction=reduction), F.cross_entropy(table.T, own, reduction=reduction)


def _average(images, texts, log_temperature, **how):
    rows, columns = _two_ways(images, texts, log_temperature, **how)
    return (rows + columns) / 2


def _probabilities(images, texts, log_temperature):
    return clip_logits(images, texts, log_temperature).softmax(1)


def _all_entries(images, texts, log_temperature):
    table = clip_logits(images, texts, log_temperature)
    return -(table.log_softmax(1) + table.log_softmax(0)).mean() / 2


CLIP_LOSS = Exercise(
    key="01.3",
    reference=losses.clip_loss,
    cases=pair_cases,
    difficulty=2,
    minutes=10,
    points=3,
    mistakes=(
        Mistake(
            "asks the pictures alone: rows only",
            lambda images, texts, log_temperature: _two_ways(images, texts, log_temperature)[0],
            "Each text chooses among the pictures too: the same cross-entropy of `logits.T`, and the mean of both.",
        ),
        Mistake(
            "asks the texts alone: columns only",
            lambda images, texts, log_temperature: _two_ways(images, texts, log_temperature)[1],
            "Each picture chooses among the texts too: the cross-entropy of `logits` itself, and the mean of both.",
        ),
        Mistake(
            "adds the two directions where it should take their mean",
            lambda images, texts, log_temperature: sum(_two_ways(images, texts, log_temperature)),
            "Guessing should cost log N, not twice that: halve the sum.",
        ),
        Mistake(
            "sums over the pairs where it should take the mean",
            lambda images, texts, log_temperature: _average(images, texts, log_temperature, reduction="sum"),
            "The mean keeps batches of different size comparable.",
        ),
        Mistake(
            "takes the softmax twice",
            lambda images, texts, log_temperature: _average(images, texts, log_temperature, logits=_probabilities),
            "`F.cross_entropy` takes logits and does the softmax itself.",
        ),
        Mistake(
            "averages over the whole table instead of its diagonal",
            _all_entries,
            "Only the right answers count, and pair i stands at (i, i).",
        ),
        Mistake(
            "forgets to normalize",
            lambda images, texts, log_temperature: _average(
                images, texts, log_temperature, logits=lambda x, y, t: t.exp() * (x @ y.T)
            ),
            "Logits are temperature × cosine: divide both sides by their lengths, as in 1.1.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            lambda images, texts, log_temperature: _average(
                images, texts, log_temperature, logits=lambda x, y, t: t * clip_logits(x, y, t * 0)
            ),
            "What is learned is the logarithm: the factor is `log_temperature.exp()`.",
        ),
    ),
)


def zero_shot(images, class_texts):
    """[N, D], [C, D] → [N] integers: for each picture the class whose text has the largest cosine with it."""
    return (losses.l2_normalize(images) @ losses.l2_normalize(class_texts).T).argmax(1)


def class_cases(rng):
    for N, C, D in ((9, 6, 3), (8, 5, 4), (12, 7, 2), (10, 8, 5)):
        yield random_rows(rng, N, D), random_rows(rng, C, D)


def _cosines(images, class_texts):
    return losses.l2_normalize(images) @ losses.l2_normalize(class_texts).T


ZERO_SHOT = Exercise(
    key="01.4",
    reference=zero_shot,
    cases=class_cases,
    difficulty=2,
    minutes=8,
    mistakes=(
        Mistake(
            "finds the best picture of each class, not the best class of each picture",
            lambda images, class_texts: _cosines(images, class_texts).argmax(0),
            "One answer a picture: the largest number of each *row*, `argmax(1)`.",
        ),
        Mistake(
            "returns the cosines instead of the classes",
            lambda images, class_texts: _cosines(images, class_texts).amax(1),
            "Wanted is where the largest number stands, `argmax`, not how large it is.",
        ),
        Mistake(
            "picks the least similar class",
            lambda images, class_texts: _cosines(images, class_texts).argmin(1),
            "The larger the cosine, the more alike: `argmax`.",
        ),
        Mistake(
            "forgets to normalize the texts, so that long ones win",
            lambda images, class_texts: (images @ class_texts.T).argmax(1),
            "The length of a text says nothing about the picture: divide it out.",
        ),
        Mistake(
            "measures the distance of vectors that still have their lengths",
            lambda images, class_texts: torch.cdist(images, class_texts).argmin(1),
            "The space was trained with cosines: only directions count.",
        ),
        Mistake(
            "lets the pictures compete for each class before it chooses",
            lambda images, class_texts: _cosines(images, class_texts).softmax(0).argmax(1),
            "A picture's class must not depend on which other pictures are asked about: no softmax over the rows.",
        ),
    ),
)


def retrieval_ranks(similarity):
    """[N, N], indexed [picture, text] → [N] integers: at which place, from 1, each text finds its own picture."""
    return (similarity > similarity.diagonal()).sum(0) + 1


def similarity_cases(rng):
    for N in (5, 7, 4, 6):
        yield (torch.from_numpy(rng.normal(0, 1, (N, N))).float(),)


RANKS = Exercise(
    key="01.5",
    reference=retrieval_ranks,
    cases=similarity_cases,
    difficulty=3,
    minutes=12,
    points=3,
    mistakes=(
        Mistake(
            "ranks the texts of each picture, not the pictures of each text",
            lambda similarity: retrieval_ranks(similarity.T),
            "A text is a column: compare its entries with its own one along axis 0.",
        ),
        Mistake(
            "counts ranks from 0",
            lambda similarity: retrieval_ranks(similarity) - 1,
            "The best has rank 1: add 1 to the number of better pictures.",
        ),
        Mistake(
            "counts the own picture among the better ones",
            lambda similarity: retrieval_ranks(similarity) + 1,
            "Better is `>`, not `>=`: nothing is better than itself.",
        ),
        Mistake(
            "gives rank 1 to the least similar picture",
            lambda similarity: retrieval_ranks(-similarity),
            "The largest similarity comes first.",
        ),
        Mistake(
            "sorts once: that says which picture stands at place j, not at which place picture j stands",
            lambda similarity: similarity.argsort(0, descending=True).diagonal() + 1,
            "Sort the order once more, or count how many entries of the column are larger.",
        ),
        Mistake(
            "returns which picture is found first, not where the own one comes",
            lambda similarity: similarity.argmax(0),
            "A rank is a place: 1 if the own picture is found first.",
        ),
        Mistake(
            "says only whether the own picture came first",
            lambda similarity: (similarity.argmax(0) == torch.arange(len(similarity))).long(),
            "Count how many pictures of the column are more similar than the own one.",
        ),
    ),
)

EXERCISES = [NORMALISE, LOGITS, CLIP_LOSS, ZERO_SHOT, RANKS]
