"""Chapter 01: how images and text come to share one embedding space."""

import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def random_rows(rng, rows, width):
    """Vectors of very different lengths, so that a missing normalization shows."""
    x = rng.normal(0, 1, (rows, width)) * rng.uniform(0.3, 3, (rows, 1))
    return torch.from_numpy(x).float()


def table_cases(rng):
    """Never as many rows as columns, so that the axes cannot be confused."""
    for name, rows, width in (
        ("fewer rows than columns", 2, 3),
        ("more rows than columns", 4, 2),
        ("three rows", 3, 5),
        ("a batch of one", 1, 4),
        ("many rows", 9, 7),
    ):
        yield Case((random_rows(rng, rows, width),), name)
    yield Case((random_rows(rng, 5, 3) * 1000,), "long vectors")
    yield Case((-random_rows(rng, 2, 6).abs(),), "only negative numbers")


NORMALIZE = Exercise(
    key="01.1",
    reference=losses.l2_normalize,
    name="l2_normalize",  # chapter 04 has another normalize
    cases=table_cases,
    difficulty=1,
    minutes=5,
    hints=(
        (
            "The numpy line above does it for the toy. You need one length per row, in the shape `[N, 1]`, so "
            "that the division works row by row. torch can compute norms directly."
        ),
        "`x.norm(dim=-1, keepdim=True)` has the shape `[N, 1]`.",
    ),
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
            "divides by the sum of the numbers",
            lambda x: x / x.sum(-1, keepdim=True),
            "Square the numbers before you sum them, or positive and negative ones cancel.",
        ),
        Mistake(
            "divides by the square root of the sum, without squaring first",
            lambda x: x / x.sum(-1, keepdim=True).sqrt(),
            "The L2 norm is √(Σ x²): square the numbers before you sum them.",
        ),
        Mistake(
            "divides by the largest number of each row",
            lambda x: x / x.abs().amax(-1, keepdim=True),
            "The L2 norm is the square root of the sum of squares.",
        ),
        Mistake(
            "multiplies by the norm",
            lambda x: x * x.norm(dim=-1, keepdim=True),
            "Divide by the norm, so that every row gets length 1.",
        ),
        Mistake(
            "returns the norms",
            lambda x: x.norm(dim=-1, keepdim=True),
            "Divide each row by its norm: the result has the shape of x.",
        ),
        Mistake(
            "subtracts the mean of each row first",
            lambda x: (x - x.mean(-1, keepdim=True)) / (x - x.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True),
            "Only the length changes, not the direction: divide, do not subtract.",
        ),
        Mistake(
            "applies a softmax",
            lambda x: x.softmax(-1),
            "The squares of a row should sum to 1, not its exponentials.",
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
    for name, N, M, D, low, high in (
        ("more texts than images", 2, 3, 4, 1.5, 3),
        ("more images than texts", 4, 2, 3, 1.5, 3),
        ("more texts than dimensions", 3, 5, 2, 1.5, 3),
        ("one image", 1, 4, 3, 1.5, 3),
        ("one text", 5, 1, 6, 1.5, 3),
        ("CLIP's largest temperature", 6, 5, 7, 4.6, 4.61),
        ("a temperature below 1", 3, 6, 2, -1.5, -0.5),
    ):
        yield Case((random_rows(rng, N, D), random_rows(rng, M, D), torch.tensor(float(rng.uniform(low, high)))), name)


def _unscaled(images, texts):
    """The logits at temperature 1: cosines."""
    return losses.l2_normalize(images) @ losses.l2_normalize(texts).T


def _normalize_columns(x):
    return x / x.norm(dim=0, keepdim=True)


LOGITS = Exercise(
    key="01.2",
    reference=clip_logits,
    cases=logit_cases,
    difficulty=1,
    minutes=8,
    hints=(
        (
            "You had a table of cosines for the toy: which product of which two tables was it? And remember "
            "that you get t, while the factor is exp(t)."
        ),
        (
            "Multiply the normalized images by the transposed normalized texts with `@`, and the whole table by "
            "`log_temperature.exp()`."
        ),
    ),
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
            "normalizes the texts but not the images",
            lambda images, texts, log_temperature: log_temperature.exp() * (images @ losses.l2_normalize(texts).T),
            "The image embeddings have different lengths too.",
        ),
        Mistake(
            "normalizes over the batch axis",
            lambda images, texts, log_temperature: (
                log_temperature.exp() * (_normalize_columns(images) @ _normalize_columns(texts).T)
            ),
            "Each row is one embedding: its length is the norm along the last axis, `dim=-1`.",
        ),
        Mistake(
            "normalizes the table instead of the embeddings",
            lambda images, texts, log_temperature: log_temperature.exp() * losses.l2_normalize(images @ texts.T),
            "Normalize images and texts before you multiply them.",
        ),
        Mistake(
            "reshapes the texts to [D, M] instead of transposing them",
            lambda images, texts, log_temperature: (
                log_temperature.exp()
                * (losses.l2_normalize(images) @ losses.l2_normalize(texts).reshape(texts.shape[1], -1))
            ),
            "`reshape` and `view` keep the order in memory and mix the texts: use `.T`.",
        ),
        Mistake(
            "does not transpose the texts",
            lambda images, texts, log_temperature: losses.l2_normalize(images) @ losses.l2_normalize(texts),
            "The table of all cosines is `images @ texts.T`: [N, D] times [D, M].",
        ),
        Mistake(
            "uses distances instead of cosines",
            lambda images, texts, log_temperature: (
                -log_temperature.exp() * torch.cdist(losses.l2_normalize(images), losses.l2_normalize(texts))
            ),
            "The cosine of two vectors of length 1 is their dot product.",
        ),
        Mistake(
            "divides by t itself",
            lambda images, texts, log_temperature: _unscaled(images, texts) / log_temperature,
            "Multiply by the temperature, `log_temperature.exp()`.",
        ),
        Mistake(
            "adds the temperature instead of multiplying by it",
            lambda images, texts, log_temperature: _unscaled(images, texts) + log_temperature.exp(),
            "A temperature is a factor: it makes the differences between the cosines larger.",
        ),
        Mistake(
            "takes the exponential of the logits",
            lambda images, texts, log_temperature: (log_temperature * _unscaled(images, texts)).exp(),
            "Only the temperature is exponentiated, not the cosines.",
        ),
        Mistake(
            "takes the exponential of the cosines too",
            lambda images, texts, log_temperature: clip_logits(images, texts, log_temperature).exp(),
            "Return logits. Their exponentials are part of the softmax, which comes later.",
        ),
        Mistake(
            "applies the softmax over the images too",
            lambda images, texts, log_temperature: clip_logits(images, texts, log_temperature).softmax(0),
            "Return logits, the values before the softmax.",
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
    for name, N, D, low, high in (
        ("three pairs", 3, 4, 0.5, 2),
        ("more pairs than dimensions", 5, 3, 0.5, 2),
        ("two pairs", 2, 6, 0.5, 2),
        ("many pairs", 9, 7, 0.5, 2),
        ("a temperature below 1", 6, 4, -1.5, -0.5),
        ("a high temperature", 4, 5, 2.5, 3),
    ):
        images = random_rows(rng, N, D)
        texts = images + random_rows(rng, N, D)
        texts[:2] = texts[:2].flip(0)
        yield Case((images, texts, torch.tensor(float(rng.uniform(low, high)))), name)
    images = random_rows(rng, 4, 3)
    yield Case((images, images[[0, 0, 2, 1]], torch.tensor(float(rng.uniform(1, 2)))), "two texts that are equal")


def _two_ways(images, texts, log_temperature, reduction="mean", logits=clip_logits, targets=torch.arange):
    """The cross-entropy over rows and over columns."""
    table, target = logits(images, texts, log_temperature), targets(len(images))
    return F.cross_entropy(table, target, reduction=reduction), F.cross_entropy(table.T, target, reduction=reduction)


def _average(images, texts, log_temperature, **how):
    rows, columns = _two_ways(images, texts, log_temperature, **how)
    return (rows + columns) / 2


def _with_logits(logits):
    return lambda images, texts, log_temperature: _average(images, texts, log_temperature, logits=logits)


def _probabilities(images, texts, log_temperature):
    return clip_logits(images, texts, log_temperature).softmax(1)


def _all_entries(images, texts, log_temperature):
    table = clip_logits(images, texts, log_temperature)
    return -(table.log_softmax(1) + table.log_softmax(0)).mean() / 2


def _first_is_right(count):
    return torch.zeros(count, dtype=torch.long)


def _sigmoid(images, texts, log_temperature):
    logits = clip_logits(images, texts, log_temperature)
    return F.binary_cross_entropy_with_logits(logits, torch.eye(len(logits)))


def _one_softmax(images, texts, log_temperature):
    logits = clip_logits(images, texts, log_temperature)
    return -logits.flatten().log_softmax(0).view_as(logits).diagonal().mean()


def _one_hot_mean(images, texts, log_temperature):
    logits = clip_logits(images, texts, log_temperature)
    return -(torch.eye(len(logits)) * (logits.log_softmax(1) + logits.log_softmax(0))).mean() / 2


def _no_logarithm(images, texts, log_temperature):
    logits = clip_logits(images, texts, log_temperature)
    return -(logits.softmax(1) + logits.softmax(0)).diagonal().mean() / 2


CLIP_LOSS = Exercise(
    key="01.3",
    reference=losses.clip_loss,
    cases=pair_cases,
    difficulty=2,
    minutes=10,
    points=3,
    hints=(
        (
            "In each row of the logits, the right answer is on the diagonal, and in each column too. So there "
            "are two classifications: find the text of each image, and find the image of each text."
        ),
        (
            "Compute the cross-entropy of the logits and of the transposed logits, both with the targets "
            "`torch.arange(len(logits))`. Then take the mean of the two."
        ),
    ),
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
            _with_logits(_probabilities),
            "`F.cross_entropy` expects logits and applies the softmax itself.",
        ),
        Mistake(
            "averages over the whole table instead of its diagonal",
            _all_entries,
            "Only the matching pairs contribute, and pair i is at (i, i).",
        ),
        Mistake(
            "forgets to normalize",
            _with_logits(lambda x, y, t: t.exp() * (x @ y.T)),
            "Logits are temperature × cosine: normalize both sides, as in 1.1.",
        ),
        Mistake(
            "normalizes the images but not the texts",
            _with_logits(lambda x, y, t: t.exp() * (losses.l2_normalize(x) @ y.T)),
            "The text embeddings have different lengths too.",
        ),
        Mistake(
            "normalizes the texts but not the images",
            _with_logits(lambda x, y, t: t.exp() * (x @ losses.l2_normalize(y).T)),
            "The image embeddings have different lengths too.",
        ),
        Mistake(
            "normalizes over the batch axis",
            _with_logits(lambda x, y, t: t.exp() * (_normalize_columns(x) @ _normalize_columns(y).T)),
            "Each row is one embedding: normalize along the last axis, `dim=-1`.",
        ),
        Mistake(
            "divides by the temperature instead of multiplying",
            _with_logits(lambda x, y, t: clip_logits(x, y, -t)),
            "exp(log_temperature) is a factor of the cosines.",
        ),
        Mistake(
            "leaves out the temperature",
            _with_logits(lambda x, y, t: clip_logits(x, y, t * 0)),
            "Multiply the cosines by `log_temperature.exp()`.",
        ),
        Mistake(
            "uses target 0 in every row, as if the first text belonged to all images",
            lambda images, texts, log_temperature: _average(images, texts, log_temperature, targets=_first_is_right),
            "The matching pairs are on the diagonal, so the target of row i is i: `torch.arange(N)`.",
        ),
        Mistake(
            "asks of each pair whether it matches, with a sigmoid",
            _sigmoid,
            "That is SigLIP's question, in chapter 02. CLIP chooses one of N: a softmax over each row and each column.",
        ),
        Mistake(
            "takes one softmax over the whole table",
            _one_softmax,
            "Each row is one choice, and so is each column: two softmaxes, each along one axis.",
        ),
        Mistake(
            "averages over all N² entries, although only the N on the diagonal are not 0",
            _one_hot_mean,
            "There are N choices in each direction: divide by N, not by N².",
        ),
        Mistake(
            "averages the probabilities instead of their logarithms",
            _no_logarithm,
            "A choice costs −log of its probability.",
        ),
        Mistake(
            "averages the logits of the matching pairs, without the softmax",
            lambda images, texts, log_temperature: -clip_logits(images, texts, log_temperature).diagonal().mean(),
            "Other pairs matter too: subtract the log-sum-exp of the row (or column), as `F.cross_entropy` does.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            _with_logits(lambda x, y, t: t * clip_logits(x, y, t * 0)),
            "The learned parameter is the logarithm: the factor is `log_temperature.exp()`.",
        ),
    ),
)


def zero_shot(images, class_texts):
    """[N, D], [C, D] → [N] integers: for each image, the class whose text has the largest cosine with it."""
    return (losses.l2_normalize(images) @ losses.l2_normalize(class_texts).T).argmax(1)


def class_cases(rng):
    for name, N, C, D in (
        ("more images than classes", 9, 6, 3),
        ("more classes than images", 5, 8, 4),
        ("two dimensions", 12, 7, 2),
        ("a batch of one", 1, 8, 5),
        ("two classes", 10, 2, 4),
    ):
        yield Case((random_rows(rng, N, D), random_rows(rng, C, D)), name)
    images, texts = random_rows(rng, 8, 3).abs(), -random_rows(rng, 6, 3).abs()
    yield Case((images, texts), "only negative cosines")


ZERO_SHOT = Exercise(
    key="01.4",
    reference=zero_shot,
    cases=class_cases,
    difficulty=2,
    minutes=8,
    hints=(
        "Each image chooses the text that points most nearly in its own direction.",
        (
            "Compute the table of cosines, then take the index of the largest value in each row with `argmax`. "
            "One of the two normalizations would not change the answer. Which one?"
        ),
    ),
    mistakes=(
        Mistake(
            "finds the best image for each class instead of the best class for each image",
            lambda images, class_texts: _unscaled(images, class_texts).argmax(0),
            "One answer per image: the largest value in each *row*, `argmax(1)`.",
        ),
        Mistake(
            "returns the cosines instead of the classes",
            lambda images, class_texts: _unscaled(images, class_texts).amax(1),
            "Return the index of the largest value, `argmax`, not the value itself.",
        ),
        Mistake(
            "picks the least similar class",
            lambda images, class_texts: _unscaled(images, class_texts).argmin(1),
            "The larger the cosine, the more similar: use `argmax`.",
        ),
        Mistake(
            "forgets to normalize the texts, so long ones win",
            lambda images, class_texts: (images @ class_texts.T).argmax(1),
            "The length of a text embedding says nothing about the image: divide by it.",
        ),
        Mistake(
            "normalizes over the batch axis",
            lambda images, class_texts: (_normalize_columns(images) @ _normalize_columns(class_texts).T).argmax(1),
            "Each row is one embedding: its length is the norm along the last axis, `dim=-1`.",
        ),
        Mistake(
            "ignores the sign of the cosines",
            lambda images, class_texts: _unscaled(images, class_texts).abs().argmax(1),
            "A cosine of −1 means opposite directions, the least similar there is: compare without `abs`.",
        ),
        Mistake(
            "returns a class only if its cosine is positive, and 0 otherwise",
            lambda images, class_texts: _unscaled(images, class_texts).clamp(min=0).argmax(1),
            "Even if all cosines are negative, one is the largest: start the search at −∞, not at 0.",
        ),
        Mistake(
            "returns the whole table instead of one class per image",
            _unscaled,
            "For each row, return the index of the largest value: `argmax(1)`.",
        ),
        Mistake(
            "returns probabilities instead of classes",
            lambda images, class_texts: _unscaled(images, class_texts).softmax(1),
            "For each row, return the index of the largest value: `argmax(1)`.",
        ),
        Mistake(
            "returns the index in the flattened table",
            lambda images, class_texts: _unscaled(images, class_texts).argmax(),
            "One answer per image: pass the axis of the classes, `argmax(1)`.",
        ),
        Mistake(
            "keeps the axis of the classes with length 1",
            lambda images, class_texts: _unscaled(images, class_texts).argmax(1, keepdim=True),
            "The result is [N], not [N, 1]: drop `keepdim=True`, or `squeeze(1)` after `topk`.",
        ),
        Mistake(
            "counts classes from 1",
            lambda images, class_texts: zero_shot(images, class_texts) + 1,
            "Classes are numbered from 0, as `argmax` does.",
        ),
        Mistake(
            "does not transpose the texts",
            lambda images, class_texts: losses.l2_normalize(images) @ losses.l2_normalize(class_texts),
            "The table of cosines is `images @ class_texts.T`.",
        ),
        Mistake(
            "takes the smallest distance between unnormalized vectors",
            lambda images, class_texts: torch.cdist(images, class_texts).argmin(1),
            "The embedding space was trained with cosines, so only directions matter.",
        ),
        Mistake(
            "applies a softmax over the images before it chooses",
            lambda images, class_texts: _unscaled(images, class_texts).softmax(0).argmax(1),
            "The class of an image must not depend on the other images in the batch: no softmax over the rows.",
        ),
    ),
)


def retrieval_ranks(similarity):
    """[N, N], indexed [image, text] → [N] integers: the rank, from 1, at which each text finds its own image."""
    return (similarity > similarity.diagonal()).sum(0) + 1


def similarity_cases(rng):
    for name, N in (("five pairs", 5), ("seven pairs", 7), ("two pairs", 2), ("six pairs", 6)):
        yield Case((torch.from_numpy(rng.normal(0, 1, (N, N))).float(),), name)
    similarity, far = torch.from_numpy(rng.normal(0, 1, (2, 4, 4))).float(), 9 * torch.eye(4)
    yield Case((similarity[0] + far,), "every image comes first")
    yield Case((similarity[1] - far,), "every image comes last")
    yield Case((torch.from_numpy(rng.integers(0, 3, (8, 8))).float(),), "images that are equally similar")
    yield Case((similarity[0][:1, :1],), "a batch of one")


RANKS = Exercise(
    key="01.5",
    reference=retrieval_ranks,
    cases=similarity_cases,
    difficulty=3,
    minutes=12,
    points=3,
    hints=(
        "There is no need to sort. Count how many images beat the right one.",
        (
            "The rank is 1 plus the number of images in the column that are more similar than the text's own "
            "image. The similarities of the own images are `similarity.diagonal()`, one per column."
        ),
    ),
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
            "also counts images that are exactly as similar as the right one",
            lambda similarity: (similarity >= similarity.diagonal()).sum(0),
            "Only images that are *more* similar come before the right one: count with `>`, then add 1.",
        ),
        Mistake(
            "puts images that are equally similar in the order of their index",
            lambda similarity: similarity.argsort(0, descending=True, stable=True).argsort(0).diagonal() + 1,
            "The rank is 1 plus the number of images that are *more* similar. Sorting cannot tell, so count with `>`.",
        ),
        Mistake(
            "compares each text with the diagonal entry of the row instead of the column",
            lambda similarity: (similarity > similarity.diagonal()[:, None]).sum(0) + 1,
            "The right image of text j is in column j: compare with `similarity.diagonal()`, without a new axis.",
        ),
        Mistake(
            "compares with the diagonal of the columns but counts along the rows",
            lambda similarity: (similarity > similarity.diagonal()).sum(1) + 1,
            "A text is a column, so sum over the rows: `sum(0)`.",
        ),
        Mistake(
            "counts the images that are less similar",
            lambda similarity: (similarity < similarity.diagonal()).sum(0),
            "Rank 1 means that no image is *more* similar: count with `>`, then add 1.",
        ),
        Mistake(
            "ignores the sign of the similarities",
            lambda similarity: retrieval_ranks(similarity.abs()),
            "A negative similarity is smaller than any positive one: compare without `abs`.",
        ),
        Mistake(
            "returns the mean rank",
            lambda similarity: retrieval_ranks(similarity).float().mean(),
            "Return one rank for each text, [N].",
        ),
        Mistake(
            "gives rank 1 to the least similar image",
            lambda similarity: retrieval_ranks(-similarity),
            "The largest similarity has rank 1.",
        ),
        Mistake(
            "sorts only once, which tells which image has rank j instead of which rank image j has",
            lambda similarity: similarity.argsort(0, descending=True).diagonal() + 1,
            "The rank of an image is 1 plus the number of larger entries in the column: count, do not sort.",
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
