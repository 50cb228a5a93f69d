"""Chapter 01: how images and text come to share one embedding space."""

import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course.exercises.exercise import Exercise, Mistake


def random_rows(rng, rows, width):
    """Vectors of very different lengths, so that a missing normalization shows."""
    x = rng.normal(0, 1, (rows, width)) * rng.uniform(0.3, 3, (rows, 1))
    return torch.from_numpy(x).float()


def table_cases(rng):
    """Never as many rows as columns, so that the axes cannot be confused."""
    for rows, width in ((2, 3), (4, 2), (3, 5), (1, 4), (5, 2)):
        yield (random_rows(rng, rows, width),)


NORMALIZE = Exercise(
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
            "Each row is one vector: sum the squares along the last axis, `dim=-1`.",
        ),
        Mistake(
            "divides every vector by the norm of the whole table",
            lambda x: x / x.norm(),
            "Every row has its own length: pass `dim=-1`.",
        ),
        Mistake(
            "drops the summed axis, so the division does not broadcast row by row",
            lambda x: x / x.norm(dim=-1),
            "`keepdim=True` keeps the lengths as a column, [N, 1], which divides row by row.",
        ),
        Mistake(
            "divides by the sum of the absolute values",
            lambda x: x / x.abs().sum(-1, keepdim=True),
            "That is the L1 norm. The L2 norm is the square root of the sum of squares.",
        ),
        Mistake(
            "forgets the square root",
            lambda x: x / x.square().sum(-1, keepdim=True),
            "Σ x² is the squared length: take its square root.",
        ),
        Mistake(
            "divides by the root mean square instead of the norm",
            lambda x: x / x.square().mean(-1, keepdim=True).sqrt(),
            "Sum the squares. With their mean, vectors end up with length √D.",
        ),
    ),
)


def clip_logits(images, texts, log_temperature):
    """[N, D], [M, D], a scalar → [N, M]: temperature × cosine of every image with every text."""
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
            "forgets to normalize, so long vectors win",
            lambda images, texts, log_temperature: log_temperature.exp() * (images @ texts.T),
            "A cosine is the dot product of two vectors of length 1: normalize both sides first.",
        ),
        Mistake(
            "normalizes the images but not the texts",
            lambda images, texts, log_temperature: log_temperature.exp() * (losses.l2_normalize(images) @ texts.T),
            "The text embeddings have different lengths too.",
        ),
        Mistake(
            "divides by the temperature instead of multiplying",
            lambda images, texts, log_temperature: clip_logits(images, texts, -log_temperature),
            "Here exp(t) is a factor: larger means sharper. The τ in the paper, which divides, is its inverse.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            lambda images, texts, log_temperature: log_temperature * clip_logits(images, texts, log_temperature * 0),
            "The learned parameter is the logarithm: the factor is `log_temperature.exp()`.",
        ),
        Mistake(
            "leaves out the temperature",
            lambda images, texts, log_temperature: clip_logits(images, texts, log_temperature * 0),
            "Multiply the cosines by `log_temperature.exp()`.",
        ),
        Mistake(
            "puts texts in the rows and images in the columns",
            lambda images, texts, log_temperature: clip_logits(texts, images, log_temperature),
            "The table is indexed [image, text]: `images @ texts.T`.",
        ),
        Mistake(
            "applies the softmax too",
            lambda images, texts, log_temperature: clip_logits(images, texts, log_temperature).softmax(1),
            "Return logits, the values before the softmax.",
        ),
    ),
)


def pair_cases(rng):
    """Somewhat similar pairs, two of them swapped: the loss of an easy batch would be little more than rounding."""
    for N, D in ((3, 4), (5, 3), (2, 6), (6, 4), (4, 5)):
        images = random_rows(rng, N, D)
        texts = images + random_rows(rng, N, D)
        texts[:2] = texts[:2].flip(0)
        yield images, texts, torch.tensor(float(rng.uniform(0.5, 2)))


def _two_ways(images, texts, log_temperature, reduction="mean", logits=clip_logits):
    """The cross-entropy over rows and over columns."""
    table, target = logits(images, texts, log_temperature), torch.arange(len(images))
    return F.cross_entropy(table, target, reduction=reduction), F.cross_entropy(table.T, target, reduction=reduction)


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
            "takes only the loss over rows, from images to texts",
            lambda images, texts, log_temperature: _two_ways(images, texts, log_temperature)[0],
            "Each text also chooses among the images: average this with the cross-entropy of `logits.T`.",
        ),
        Mistake(
            "takes only the loss over columns, from texts to images",
            lambda images, texts, log_temperature: _two_ways(images, texts, log_temperature)[1],
            "Each image also chooses among the texts: average this with the cross-entropy of `logits` itself.",
        ),
        Mistake(
            "adds the two directions instead of averaging them",
            lambda images, texts, log_temperature: sum(_two_ways(images, texts, log_temperature)),
            "Guessing should cost log N, not twice that: halve the sum.",
        ),
        Mistake(
            "sums over the pairs instead of averaging",
            lambda images, texts, log_temperature: _average(images, texts, log_temperature, reduction="sum"),
            "With the mean, losses of different batch sizes are comparable.",
        ),
        Mistake(
            "applies the softmax twice",
            lambda images, texts, log_temperature: _average(images, texts, log_temperature, logits=_probabilities),
            "`F.cross_entropy` expects logits and applies the softmax itself.",
        ),
        Mistake(
            "averages over the whole table instead of its diagonal",
            _all_entries,
            "Only the matching pairs contribute, and pair i is at (i, i).",
        ),
        Mistake(
            "forgets to normalize",
            lambda images, texts, log_temperature: _average(
                images, texts, log_temperature, logits=lambda x, y, t: t.exp() * (x @ y.T)
            ),
            "Logits are temperature × cosine: normalize both sides, as in 1.1.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            lambda images, texts, log_temperature: _average(
                images, texts, log_temperature, logits=lambda x, y, t: t * clip_logits(x, y, t * 0)
            ),
            "The learned parameter is the logarithm: the factor is `log_temperature.exp()`.",
        ),
    ),
)


def zero_shot(images, class_texts):
    """[N, D], [C, D] → [N] integers: for each image, the class whose text has the largest cosine with it."""
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
            "finds the best image for each class instead of the best class for each image",
            lambda images, class_texts: _cosines(images, class_texts).argmax(0),
            "One answer per image: the largest value in each *row*, `argmax(1)`.",
        ),
        Mistake(
            "returns the cosines instead of the classes",
            lambda images, class_texts: _cosines(images, class_texts).amax(1),
            "Return the index of the largest value, `argmax`, not the value itself.",
        ),
        Mistake(
            "picks the least similar class",
            lambda images, class_texts: _cosines(images, class_texts).argmin(1),
            "The larger the cosine, the more similar: use `argmax`.",
        ),
        Mistake(
            "forgets to normalize the texts, so long ones win",
            lambda images, class_texts: (images @ class_texts.T).argmax(1),
            "The length of a text embedding says nothing about the image: divide by it.",
        ),
        Mistake(
            "takes the smallest distance between unnormalized vectors",
            lambda images, class_texts: torch.cdist(images, class_texts).argmin(1),
            "The embedding space was trained with cosines, so only directions matter.",
        ),
        Mistake(
            "applies a softmax over the images before it chooses",
            lambda images, class_texts: _cosines(images, class_texts).softmax(0).argmax(1),
            "The class of an image must not depend on the other images in the batch: no softmax over the rows.",
        ),
    ),
)


def retrieval_ranks(similarity):
    """[N, N], indexed [image, text] → [N] integers: the rank, from 1, at which each text finds its own image."""
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
            "ranks the texts for each image instead of the images for each text",
            lambda similarity: retrieval_ranks(similarity.T),
            "A text is a column: compare the column with its entry on the diagonal, along axis 0.",
        ),
        Mistake(
            "counts ranks from 0",
            lambda similarity: retrieval_ranks(similarity) - 1,
            "The best rank is 1: add 1 to the number of images that are more similar.",
        ),
        Mistake(
            "counts the image itself as better than itself",
            lambda similarity: retrieval_ranks(similarity) + 1,
            "Count with `>`, not `>=`.",
        ),
        Mistake(
            "gives rank 1 to the least similar image",
            lambda similarity: retrieval_ranks(-similarity),
            "The largest similarity has rank 1.",
        ),
        Mistake(
            "sorts only once, which tells which image has rank j instead of which rank image j has",
            lambda similarity: similarity.argsort(0, descending=True).diagonal() + 1,
            "Sort the order again (argsort of argsort), or count how many entries of the column are larger.",
        ),
        Mistake(
            "returns which image comes first instead of the rank of the right one",
            lambda similarity: similarity.argmax(0),
            "The rank is 1 if the right image comes first, 2 if one image beats it, and so on.",
        ),
        Mistake(
            "returns only whether the right image comes first",
            lambda similarity: (similarity.argmax(0) == torch.arange(len(similarity))).long(),
            "Count how many images in the column are more similar than the right one.",
        ),
    ),
)

EXERCISES = [NORMALIZE, LOGITS, CLIP_LOSS, ZERO_SHOT, RANKS]
