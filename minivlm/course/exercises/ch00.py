"""Chapter 00: three warm-up exercises, on shapes, axes and softmax."""

import math

import torch

from minivlm.course.exercises.exercise import Exercise, Mistake

# --- 00.1 -----------------------------------------------------------------------------------------------------------


def num_image_tokens(image_size, patch_size):
    """Side of the image and of a patch in pixels → how many whole patches the image contains."""
    return (image_size // patch_size) ** 2


def size_cases(rng):
    """The sizes of PaliGemma and of the embedded model, then some with leftover pixels at the edge."""
    yield 224, 14
    yield 112, 16
    for _ in range(5):
        patch = int(rng.integers(5, 17))
        yield patch * int(rng.integers(4, 12)) + int(rng.integers(patch // 2 + 1, patch)), patch


IMAGE_TOKENS = Exercise(
    key="00.1",
    reference=num_image_tokens,
    cases=size_cases,
    difficulty=1,
    minutes=4,
    mistakes=(
        Mistake(
            "counts the patches along one side only",
            lambda image_size, patch_size: image_size // patch_size,
            "There are as many rows of patches as columns: square the number.",
        ),
        Mistake(
            "counts the pixels of one patch",
            lambda image_size, patch_size: patch_size**2,
            "How many patches fit into the image? Start with how many fit along one side.",
        ),
        Mistake(
            "rounds up, as if a patch could extend beyond the edge",
            lambda image_size, patch_size: math.ceil(image_size / patch_size) ** 2,
            "Only whole patches count. Leftover pixels at the edge are dropped: `//` rounds down.",
        ),
        Mistake(
            "divides the areas, so leftover pixels at the edges add up to extra patches",
            lambda image_size, patch_size: image_size**2 // patch_size**2,
            "Patches form whole rows and columns: divide the sides first, then square.",
        ),
        Mistake(
            "returns a fraction",
            lambda image_size, patch_size: (image_size / patch_size) ** 2,
            "The number of patches is an integer: use `//` instead of `/`.",
        ),
        Mistake(
            "also counts a [class] token",
            lambda image_size, patch_size: (image_size // patch_size) ** 2 + 1,
            "Many vision transformers add one, but PaliGemma's vision tower doesn't.",
        ),
    ),
)


# --- 00.2 -----------------------------------------------------------------------------------------------------------


def mean_color(images):
    """Images [N, H, W, 3] → the mean red, green and blue of each, [N, 3]."""
    return images.mean((1, 2))


def image_cases(rng):
    """Batches of images that are not square, so that every axis has a different length."""
    for count, height, width in ((2, 4, 5), (4, 2, 6), (1, 5, 2), (5, 6, 4), (3, 1, 2)):
        yield (torch.from_numpy(rng.random((count, height, width, 3))).float(),)


MEAN_COLOR = Exercise(
    key="00.2",
    reference=mean_color,
    cases=image_cases,
    difficulty=1,
    minutes=6,
    mistakes=(
        Mistake(
            "takes the mean of all values at once",
            lambda images: images.mean(),
            "One color per image: keep the batch axis and the color axis, `mean((1, 2))`.",
        ),
        Mistake(
            "averages over the batch too",
            lambda images: images.mean((0, 1, 2)),
            "Each image has its own mean: leave axis 0 alone.",
        ),
        Mistake(
            "averages over the colors, which turns the images gray",
            lambda images: images.mean(-1),
            "The last axis is red, green and blue: keep it and average over rows and columns.",
        ),
        Mistake(
            "averages over the rows but not over the columns",
            lambda images: images.mean(1),
            "`mean` accepts several axes at once: `mean((1, 2))`.",
        ),
        Mistake(
            "sums instead of averaging",
            lambda images: images.sum((1, 2)),
            "Divide by the number of pixels, or call `mean`.",
        ),
        Mistake(
            "averages over images and rows instead of rows and columns",
            lambda images: images.mean((0, 1)),
            "The axes of [N, H, W, 3] are numbered from 0: H is 1 and W is 2.",
        ),
        Mistake(
            "keeps the averaged axes with length 1",
            lambda images: images.mean((1, 2), keepdim=True),
            "`keepdim=True` leaves axes of length 1, but the shape should be [N, 3].",
        ),
    ),
)


# --- 00.3 -----------------------------------------------------------------------------------------------------------


def best_words(scores, words):
    """Scores [N, V] of V words → for each of the N rows, the most likely word and its probability."""
    best = scores.softmax(-1).max(-1)
    return [(words[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


WORDS = ["cat", "dog", "owl", "fox", "bee", "ant", "yak", "emu"]


def score_cases(rng):
    for rows, vocabulary in ((2, 5), (3, 8), (4, 3), (1, 6), (5, 4)):
        words = [WORDS[i] for i in rng.permutation(len(WORDS))[:vocabulary]]
        yield torch.from_numpy(rng.normal(0, 1.5, (rows, vocabulary))).float(), words


def _pairs(values, indices, words):
    return [(words[i], v) for v, i in zip(values.tolist(), indices.tolist(), strict=True)]


def _chosen(choose, probability):
    """A wrong answer: which column each row chooses, and what it returns as its probability."""

    def function(scores, words):
        index = choose(scores)
        return _pairs(probability(scores).gather(-1, index[:, None])[:, 0], index, words)

    return function


def _largest(scores):
    return scores.argmax(-1)


def _probabilities(scores):
    return scores.softmax(-1)


BEST_WORDS = Exercise(
    key="00.3",
    reference=best_words,
    cases=score_cases,
    difficulty=2,
    minutes=8,
    mistakes=(
        Mistake(
            "returns the raw scores instead of probabilities",
            _chosen(_largest, lambda scores: scores),
            "Scores can be negative or above 1: `scores.softmax(-1)` turns them into probabilities.",
        ),
        Mistake(
            "takes the softmax over the rows instead of the words",
            _chosen(lambda scores: scores.softmax(0).argmax(-1), lambda scores: scores.softmax(0)),
            "In each row, the probabilities of the V words sum to 1: that is the last axis, `softmax(-1)`.",
        ),
        Mistake(
            "takes the softmax over the whole table",
            _chosen(_largest, lambda scores: scores.flatten().softmax(0).view_as(scores)),
            "Every row is its own distribution: `softmax(-1)`.",
        ),
        Mistake(
            "chooses the least likely word",
            _chosen(lambda scores: scores.argmin(-1), _probabilities),
            "The most likely word has the largest score: use `argmax` or `max`.",
        ),
        Mistake(
            "divides the scores by their sum",
            _chosen(_largest, lambda scores: scores / scores.sum(-1, keepdim=True)),
            "Softmax exponentiates first, exp(score) / Σ exp(score), so that nothing is negative.",
        ),
        Mistake(
            "forgets to divide the exponentials by their sum",
            _chosen(_largest, lambda scores: scores.exp()),
            "exp(score) becomes a probability when you divide it by the sum over the row.",
        ),
        Mistake(
            "returns the words without their probabilities",
            lambda scores, words: [words[i] for i in scores.argmax(-1).tolist()],
            "Return a pair for each row: (word, probability).",
        ),
        Mistake(
            "returns the index of the word instead of the word",
            lambda scores, words: _pairs(*scores.softmax(-1).max(-1), range(len(words))),
            "`words[i]` is the word with index i.",
        ),
    ),
)

EXERCISES = [IMAGE_TOKENS, MEAN_COLOR, BEST_WORDS]
