"""Chapter 00: three warm-up exercises, on shapes, axes and softmax."""

import math

import torch

from minivlm.course.exercises.exercise import Case, Exercise, Mistake

# --- 00.1 -----------------------------------------------------------------------------------------------------------


def num_image_tokens(image_size, patch_size):
    """Side of the image and of a patch in pixels → how many whole patches the image contains."""
    return (image_size // patch_size) ** 2


def size_cases(rng):
    """The sizes of PaliGemma and of the embedded model, then some with few or many leftover pixels at the edge."""
    yield Case((224, 14), "PaliGemma's sizes")
    yield Case((112, 16), "the embedded model's sizes")
    for _ in range(3):
        patch = int(rng.integers(5, 17))
        whole, half = patch * int(rng.integers(4, 12)), patch // 2
        yield Case((whole + int(rng.integers(half + 1, patch)), patch), "more than half a patch is left over")
        yield Case((whole + int(rng.integers(1, half)), patch), "less than half a patch is left over")
    yield Case((patch - 1, patch), "an image smaller than a patch")
    yield Case((patch, patch), "an image of one patch")


IMAGE_TOKENS = Exercise(
    key="00.1",
    reference=num_image_tokens,
    cases=size_cases,
    difficulty=1,
    minutes=4,
    hints=(
        (
            "How many whole patches fit along one side? Python has a division that rounds down. Then count rows "
            "and columns."
        ),
        "`image_size // patch_size` patches fit along one side, and the grid is a square.",
    ),
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
            "rounds to the nearest integer",
            lambda image_size, patch_size: round(image_size / patch_size) ** 2,
            "Only whole patches count, so leftover pixels are always dropped: `//` rounds down.",
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
            "doubles the number along one side instead of squaring it",
            lambda image_size, patch_size: image_size // patch_size * 2,
            "With n rows of n patches, there are n × n of them: `n ** 2`.",
        ),
        Mistake(
            "writes `^ 2`, which in Python is not a square",
            lambda image_size, patch_size: (image_size // patch_size) ^ 2,
            "`^` is the bitwise exclusive or. A power is written `**`.",
        ),
        Mistake(
            "uses `%`, which returns the remainder",
            lambda image_size, patch_size: (image_size % patch_size) ** 2,
            "`//` counts how often the patch fits, `%` how many pixels are left over.",
        ),
        Mistake(
            "counts every position of a patch, as if patches overlapped",
            lambda image_size, patch_size: max(0, image_size - patch_size + 1) ** 2,
            "Patches lie side by side, so the next one starts `patch_size` pixels later.",
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
    """Every axis has a different length, so none can be confused with another."""
    for name, count, height, width in (
        ("two images", 2, 4, 5),
        ("images that are wider than high", 4, 2, 6),
        ("a batch of one", 1, 5, 2),
        ("images that are higher than wide", 5, 6, 4),
        ("images of one row", 4, 1, 2),
        ("many images", 8, 4, 1),
    ):
        yield Case((torch.from_numpy(rng.random((count, height, width, 3))).float(),), name)


MEAN_COLOR = Exercise(
    key="00.2",
    reference=mean_color,
    cases=image_cases,
    difficulty=1,
    minutes=6,
    hints=(
        (
            "Compare the two shapes: which axes are gone? Those are the ones to average over. Axes are numbered "
            "from 0, and `mean` also takes several of them at once."
        ),
        "Rows and columns are axes 1 and 2. `mean` takes a tuple of axes.",
    ),
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
            "averages over the columns but not over the rows",
            lambda images: images.mean(2),
            "`mean` accepts several axes at once: `mean((1, 2))`.",
        ),
        Mistake(
            "averages over columns and colors, as if axes were numbered from 1",
            lambda images: images.mean((2, 3)),
            "The axes of [N, H, W, 3] are numbered from 0: rows are axis 1 and columns axis 2.",
        ),
        Mistake(
            "averages over rows, columns and colors",
            lambda images: images.mean((1, 2, 3)),
            "Keep the color axis: the result has three numbers per image.",
        ),
        Mistake(
            "reshapes to [N, 3, …], which mixes red, green and blue",
            lambda images: images.reshape(len(images), 3, -1).mean(-1),
            "The colors are the last axis and must stay there: average over axes 1 and 2 without a reshape.",
        ),
        Mistake(
            "takes the color of one pixel",
            lambda images: images[:, 0, 0],
            "Every pixel contributes: average over rows and columns.",
        ),
        Mistake(
            "takes the largest value instead of the mean",
            lambda images: images.amax((1, 2)),
            "`mean` adds up all values and divides by how many there are.",
        ),
        Mistake(
            "takes the median instead of the mean",
            lambda images: images.flatten(1, 2).median(1).values,
            "`mean` adds up all values and divides by how many there are.",
        ),
        Mistake(
            "divides the sum by the number of rows only",
            lambda images: images.sum((1, 2)) / images.shape[1],
            "An image has H × W pixels.",
        ),
        Mistake(
            "divides the sum by the number of columns only",
            lambda images: images.sum((1, 2)) / images.shape[2],
            "An image has H × W pixels.",
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


WORDS = ["cat", "dog", "owl", "▁fox", "<loc0012>", "", "yak", "emu"]


def score_cases(rng):
    for name, rows, vocabulary, low, high in (
        ("two rows", 2, 5, -3, 3),
        ("many rows", 7, 8, -3, 3),
        ("more rows than words", 4, 3, -3, 3),
        ("one row", 1, 6, -3, 3),
        ("only negative scores", 5, 4, -6, -2),
        ("large scores", 3, 7, 8, 30),
        ("a vocabulary of one word", 2, 1, -3, 3),
    ):
        words = [WORDS[i] for i in rng.permutation(len(WORDS))[:vocabulary]]
        yield Case((torch.from_numpy(rng.uniform(low, high, (rows, vocabulary))).float(), words), name)
    scores = torch.from_numpy(rng.uniform(-3, 3, (4, 6))).float()
    yield Case((scores, ["unused", "cat", "unused", "dog", "unused", "unused"]), "a word that occurs several times")


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


def _from_columns(scores):
    """``scores.argmax(0)`` used as if it had one entry per row."""
    best = scores.argmax(0)
    return torch.stack([best[n] for n in range(len(scores))])


def _probabilities(scores):
    return scores.softmax(-1)


BEST_WORDS = Exercise(
    key="00.3",
    reference=best_words,
    cases=score_cases,
    difficulty=2,
    minutes=8,
    hints=(
        (
            "A softmax over the words turns each row of scores into probabilities. Then you need two things "
            "from each row: the largest probability, and where it is."
        ),
        (
            "`scores.softmax(-1)` works along the last axis, row by row. `p.max(-1)` has `.values` and "
            "`.indices`. `.tolist()` turns either of them into plain Python numbers, and `words[i]` looks up "
            "the word."
        ),
    ),
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
            "finds the best row for each word instead of the best word for each row",
            _chosen(lambda scores: _from_columns(scores), _probabilities),
            "One answer per row: look for the maximum along the last axis.",
        ),
        Mistake(
            "takes the index of the maximum along axis 0, but the probability along the last axis",
            lambda scores, words: _pairs(scores.softmax(-1).amax(-1), _from_columns(scores), words),
            "Index and probability belong together: look for the maximum along the last axis for both.",
        ),
        Mistake(
            "chooses a single word for all rows, the one with the largest score of all",
            _chosen(lambda scores: scores.amax(0).argmax().expand(len(scores)), _probabilities),
            "Every row has its own most likely word: pass an axis, `argmax(-1)`.",
        ),
        Mistake(
            "applies a sigmoid to each score instead of a softmax to each row",
            _chosen(_largest, lambda scores: scores.sigmoid()),
            "A sigmoid treats every word on its own. The probabilities of a row must sum to 1: `softmax(-1)`.",
        ),
        Mistake(
            "returns the logarithm of the probability",
            _chosen(_largest, lambda scores: scores.log_softmax(-1)),
            "Use `softmax`, not `log_softmax`: a probability is between 0 and 1.",
        ),
        Mistake(
            "applies the softmax twice",
            _chosen(_largest, lambda scores: scores.softmax(-1).softmax(-1)),
            "Once is enough: the softmax of a softmax makes all words nearly equally likely.",
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
            "divides the exponentials by the largest one instead of their sum",
            _chosen(_largest, lambda scores: (scores - scores.amax(-1, keepdim=True)).exp()),
            "Subtracting the maximum is fine, but then divide by the sum over the row.",
        ),
        Mistake(
            "rounds the probability",
            lambda scores, words: [(word, round(p, 2)) for word, p in best_words(scores, words)],
            "Return the probability as it is and round only when you print it.",
        ),
        Mistake(
            "returns the probability before the word",
            lambda scores, words: [(p, word) for word, p in best_words(scores, words)],
            "The pair is (word, probability).",
        ),
        Mistake(
            "returns a dictionary, which has only one entry per word",
            lambda scores, words: dict(best_words(scores, words)),
            "Two rows can choose the same word: return a list with one pair per row.",
        ),
        Mistake(
            "returns the words and the probabilities as two lists",
            lambda scores, words: tuple(list(column) for column in zip(*best_words(scores, words), strict=True)),
            "Return one list of pairs: `list(zip(words, probabilities))`.",
        ),
        Mistake(
            "returns all words of a row with their probabilities",
            lambda scores, words: [list(zip(words, row, strict=True)) for row in scores.softmax(-1).tolist()],
            "Return only the most likely word of each row: find its index with `argmax` or `max`.",
        ),
        Mistake(
            "takes the word before the most likely one",
            lambda scores, words: _pairs(*scores.softmax(-1).max(-1), [words[-1], *words[:-1]]),
            "Use the index as it is: `argmax` counts from 0, as lists do.",
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
