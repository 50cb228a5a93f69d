"""Chapter 00: three pieces to warm up with, on shapes, axes and softmax."""

import math

import torch

from minivlm.course.exercises.exercise import Exercise, Mistake

# --- 00.1 -----------------------------------------------------------------------------------------------------------


def num_image_tokens(image_size, patch_size):
    """Pixels along a side of the picture and of a patch → how many whole patches the picture holds."""
    return (image_size // patch_size) ** 2


def size_cases(rng):
    """The sizes of PaliGemma and of the embedded model, then some that leave a rest at the edge."""
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
            "There are as many rows of patches as columns: square it.",
        ),
        Mistake(
            "counts the pixels of one patch",
            lambda image_size, patch_size: patch_size**2,
            "How many patches go into the picture? Start with how many go along one side.",
        ),
        Mistake(
            "rounds up, as if a patch could hang over the edge",
            lambda image_size, patch_size: math.ceil(image_size / patch_size) ** 2,
            "Only whole patches count, what is left at the edge is dropped: `//` rounds down.",
        ),
        Mistake(
            "divides the areas, so that rests at the edges add up to patches",
            lambda image_size, patch_size: image_size**2 // patch_size**2,
            "Patches lie in whole rows and columns: divide the sides first, then square.",
        ),
        Mistake(
            "keeps the fraction",
            lambda image_size, patch_size: (image_size / patch_size) ** 2,
            "A number of patches is whole: `//` instead of `/`.",
        ),
        Mistake(
            "counts a [class] token as well",
            lambda image_size, patch_size: (image_size // patch_size) ** 2 + 1,
            "Many vision transformers add one; PaliGemma's tower has none.",
        ),
    ),
)


# --- 00.2 -----------------------------------------------------------------------------------------------------------


def mean_color(images):
    """Pictures [N, H, W, 3] → the mean red, green and blue of each, [N, 3]."""
    return images.mean((1, 2))


def picture_cases(rng):
    """Pictures that are not square, of different numbers, so that every axis has a length of its own."""
    for count, height, width in ((2, 4, 5), (4, 2, 6), (1, 5, 2), (5, 6, 4), (3, 1, 2)):
        yield (torch.from_numpy(rng.random((count, height, width, 3))).float(),)


MEAN_COLOR = Exercise(
    key="00.2",
    reference=mean_color,
    cases=picture_cases,
    difficulty=1,
    minutes=6,
    mistakes=(
        Mistake(
            "takes the mean of all numbers together",
            lambda images: images.mean(),
            "One color for each picture: keep the axes of pictures and of colors, `mean((1, 2))`.",
        ),
        Mistake(
            "takes the mean over the pictures too",
            lambda images: images.mean((0, 1, 2)),
            "Each picture has a mean of its own: leave axis 0 alone.",
        ),
        Mistake(
            "takes the mean over the colors, which gives grays",
            lambda images: images.mean(-1),
            "The last axis holds red, green and blue: keep it, and take the mean over rows and columns.",
        ),
        Mistake(
            "takes the mean over rows or columns, but not over both",
            lambda images: images.mean(1),
            "`mean` takes several axes at once: `mean((1, 2))`.",
        ),
        Mistake(
            "sums where it should average",
            lambda images: images.sum((1, 2)),
            "Divide by the number of pixels, or call `mean`.",
        ),
        Mistake(
            "mixes the first three axes up: it averages over pictures and rows",
            lambda images: images.mean((0, 1)),
            "The axes of [N, H, W, 3] are counted from 0: H is 1 and W is 2.",
        ),
        Mistake(
            "keeps the axes that it has averaged away",
            lambda images: images.mean((1, 2), keepdim=True),
            "`keepdim=True` leaves axes of length 1; here the shape is to be [N, 3].",
        ),
    ),
)


# --- 00.3 -----------------------------------------------------------------------------------------------------------


def best_words(scores, words):
    """Scores [N, V] of V words → for each of the N rows, the likeliest word and its probability."""
    best = scores.softmax(-1).max(-1)
    return [(words[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


WORDS = ["cat", "dog", "owl", "fox", "bee", "ant", "yak", "emu"]


def score_cases(rng):
    for rows, vocabulary in ((2, 5), (3, 8), (4, 3), (1, 6), (5, 4)):
        words = [WORDS[i] for i in rng.permutation(len(WORDS))[:vocabulary]]
        yield torch.from_numpy(rng.normal(0, 1.5, (rows, vocabulary))).float(), words


def _pairs(values, indices, words):
    return [(words[i], v) for v, i in zip(values.tolist(), indices.tolist(), strict=True)]


def _chosen(choose, weigh):
    """A wrong answer: which column each row chooses, and what it calls its probability."""

    def function(scores, words):
        index = choose(scores)
        return _pairs(weigh(scores).gather(-1, index[:, None])[:, 0], index, words)

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
            "gives the scores as they are in place of probabilities",
            _chosen(_largest, lambda scores: scores),
            "Scores may be negative or above 1: `scores.softmax(-1)` makes probabilities of them.",
        ),
        Mistake(
            "takes the softmax over the rows, not over the words",
            _chosen(lambda scores: scores.softmax(0).argmax(-1), lambda scores: scores.softmax(0)),
            "In each row the probabilities of the V words sum to 1: the last axis, `softmax(-1)`.",
        ),
        Mistake(
            "takes the softmax over the whole table",
            _chosen(_largest, lambda scores: scores.flatten().softmax(0).view_as(scores)),
            "Every row is a choice of its own: `softmax(-1)`.",
        ),
        Mistake(
            "chooses the unlikeliest word",
            _chosen(lambda scores: scores.argmin(-1), _probabilities),
            "The likeliest has the largest score: `argmax`, or `max`.",
        ),
        Mistake(
            "divides the scores by their sum",
            _chosen(_largest, lambda scores: scores / scores.sum(-1, keepdim=True)),
            "Softmax takes exponentials first, exp(score) / Σ exp(score), so that nothing is negative.",
        ),
        Mistake(
            "gives the exponentials without dividing by their sum",
            _chosen(_largest, lambda scores: scores.exp()),
            "exp(score) becomes a probability when divided by the sum over the row.",
        ),
        Mistake(
            "gives the words alone",
            lambda scores, words: [words[i] for i in scores.argmax(-1).tolist()],
            "For each row a pair is wanted: (word, probability).",
        ),
        Mistake(
            "gives the number of the word, not the word",
            lambda scores, words: _pairs(*scores.softmax(-1).max(-1), range(len(words))),
            "`words[i]` is the word in place i.",
        ),
    ),
)

EXERCISES = [IMAGE_TOKENS, MEAN_COLOR, BEST_WORDS]
