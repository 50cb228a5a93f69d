"""Lab L7: does the model look at its image?"""

import torch

from minivlm.course import looking
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def normal(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- L7.1 -----------------------------------------------------------------------------------------------------------


def answer_cases(rng):
    """Answers of models that say yes too often, too rarely, always or never."""
    for n, yes, right, name in (
        (23, 0.7, 0.4, "says yes too often"),
        (31, 0.25, 0.6, "says yes too rarely"),
        (17, 0.5, 0.3, "few objects are there"),
        (19, 1.0, 0.4, "always says yes"),
        (19, 0.0, 0.4, "never says yes"),
    ):
        said, truth = rng.permutation(n) < round(n * yes), rng.permutation(n) < round(n * right)
        truth[:3], said[:3] = (True, True, False), (True, False, True) if 0 < yes < 1 else said[:3]
        yield Case((torch.from_numpy(said), torch.from_numpy(truth)), name)


def _metrics(**changes):
    """The right metrics, some of them replaced by ``change(said, truth, right)``."""

    def function(said, truth):
        right = looking.yes_no_metrics(said, truth)
        return right | {name: change(said, truth, right) for name, change in changes.items()}

    return function


METRICS = Exercise(
    key="L7.1",
    reference=looking.yes_no_metrics,
    cases=answer_cases,
    difficulty=1,
    minutes=10,
    hints=(
        "Count the hits first: the model said yes, and yes is true. Precision and recall divide the same count.",
        "`(said & truth).sum()` are the hits. Divide by `said.sum()` for one, by `truth.sum()` for the other.",
    ),
    mistakes=(
        Mistake(
            "swaps precision and recall",
            _metrics(precision=lambda s, t, r: r["recall"], recall=lambda s, t, r: r["precision"]),
            "Precision divides by how often the model said yes, recall by how often yes is true.",
        ),
        Mistake(
            "takes the arithmetic mean for F1",
            _metrics(f1=lambda s, t, r: (r["precision"] + r["recall"]) / 2),
            "F1 is the harmonic mean, 2·p·r / (p + r): it is low if one of the two is.",
        ),
        Mistake(
            "forgets the factor 2 of F1",
            _metrics(f1=lambda s, t, r: r["f1"] / 2),
            "With precision = recall = 1, F1 must be 1: 2·p·r / (p + r).",
        ),
        Mistake(
            "reports how often yes is true instead of how often the model says it",
            _metrics(yes=lambda s, t, r: float(t.float().mean())),
            "The last number shows the model's own bias: the mean of `said`.",
        ),
        Mistake(
            "counts only the hits as accurate",
            _metrics(accuracy=lambda s, t, r: float((s & t).float().mean())),
            "A no is also right where the object is absent: compare `said == truth`.",
        ),
        Mistake(
            "treats no as the positive answer",
            lambda said, truth: looking.yes_no_metrics(~said, ~truth),
            "POPE's positive answer is yes.",
        ),
        Mistake(
            "returns percentages",
            lambda said, truth: {k: 100 * v for k, v in looking.yes_no_metrics(said, truth).items()},
            "Return fractions from 0 to 1.",
        ),
    ),
)


# --- L7.2 -----------------------------------------------------------------------------------------------------------


def negative_cases(rng):
    """Scenes of few names, some of which occur together often."""
    for n, m, count, name in (
        (9, 8, 2, "nine scenes"),
        (14, 11, 3, "more names than are asked for"),
        (12, 9, 1, "one name per scene"),
        (20, 12, 2, "twenty scenes"),
    ):
        habit = rng.random(m) ** 2 * 0.7
        group = rng.random((n, 1)) < 0.5
        present = rng.random((n, m)) < habit
        present[:, :3] = group & (rng.random((n, 3)) < 0.8)
        present[:, count + 4 :][present[:, count + 4 :].sum(1) > 4] = False
        present[range(n), rng.integers(0, m, n)] = True
        yield Case((torch.from_numpy(present), count), name)


def _ranked(scores, count, descending=True):
    return scores.argsort(dim=1, descending=descending, stable=True)[:, :count]


def _scores(present):
    shown = present.long()
    return shown @ (shown.T @ shown)


def _by_largest_pair(present, count):
    shown = present.long()
    together = shown.T @ shown
    scores = torch.stack([together[row].amax(0) for row in present])
    return _ranked(scores.masked_fill(present, -1), count)


def _rarest(present, count):
    return _ranked(_scores(present).masked_fill(present, 10**6), count, descending=False)


def _once_per_name(present, count):
    shown = present.long()
    return _ranked((shown @ (shown.T @ shown > 0).long()).masked_fill(present, -1), count)


NEGATIVES = Exercise(
    key="L7.2",
    reference=looking.adversarial_negatives,
    cases=negative_cases,
    difficulty=3,
    minutes=20,
    points=3,
    hints=(
        "How often two names occur together, for all pairs, is one matrix product of `present` with itself.",
        (
            "As integers, `present.T @ present` counts pairs [M, M]; another product sums the rows of what a scene "
            "shows. Give present names a score below 0, then `argsort(dim=1, descending=True, stable=True)`."
        ),
    ),
    mistakes=(
        Mistake(
            "picks names that the scene shows",
            lambda present, count: _ranked(_scores(present), count),
            "A negative must be absent: give the present names a score below 0 before you sort.",
        ),
        Mistake(
            "ranks by popularity, whatever the scene shows",
            looking.popular_negatives,
            "These are POPE's popular negatives. Adversarial ones occur together with what this scene shows.",
        ),
        Mistake(
            "takes the names that occur together least often",
            _rarest,
            "The hardest negatives occur with the scene's objects most often: sort in descending order.",
        ),
        Mistake(
            "takes the largest pair instead of the sum over the present names",
            _by_largest_pair,
            "Add the co-occurrences with all names that the scene shows.",
        ),
        Mistake(
            "counts whether two names ever occur together, not how often",
            _once_per_name,
            "Keep the number of scenes: `present.T @ present` in integers, not in booleans.",
        ),
        Mistake(
            "returns the scores instead of the names",
            lambda present, count: _scores(present).masked_fill(present, -1).sort(1, descending=True).values[:, :count],
            "Return the indices of the names: `argsort`, not `sort().values`.",
        ),
    ),
)


# --- L7.3 -----------------------------------------------------------------------------------------------------------


def occlusion_cases(rng):
    """Images that are not square, so that rows and columns differ."""
    for channels, height, width, size, fill, name in (
        (3, 8, 12, 4, 0.0, "wide"),
        (3, 12, 6, 3, 0.0, "tall"),
        (1, 6, 6, 2, -0.5, "one channel"),
        (2, 4, 10, 2, 0.7, "another value"),
    ):
        yield Case((normal(rng, channels, height, width), size, fill), name)


def _columns_first(pixels, patch_size, fill=0.0):
    return looking.occlude_patches(pixels.mT.contiguous(), patch_size, fill).mT


def _all_but_one(pixels, patch_size, fill=0.0):
    return torch.where(_covered(pixels, patch_size), pixels, torch.tensor(fill))


def _covered(pixels, patch_size):
    return looking.occlude_patches(torch.zeros_like(pixels), patch_size, 1.0) > 0


def _cumulative(pixels, patch_size, fill=0.0):
    return pixels.masked_fill(_covered(pixels, patch_size).cumsum(0) > 0, fill)


def _first_channel(pixels, patch_size, fill=0.0):
    copies = looking.occlude_patches(pixels, patch_size, fill)
    return torch.cat([copies[:, :1], pixels[1:].expand(len(copies), -1, -1, -1)], dim=1)


def _mean_of_image(pixels, patch_size, fill=0.0):
    return looking.occlude_patches(pixels, patch_size, float(pixels.mean()))


OCCLUDE = Exercise(
    key="L7.3",
    reference=looking.occlude_patches,
    cases=occlusion_cases,
    difficulty=2,
    minutes=15,
    hints=(
        "One copy per patch, and in each copy a square of its own that is filled. Which rows and columns is patch p?",
        (
            "`pixels.repeat(P, 1, 1, 1)` makes independent copies. Patch p is in row p // columns and column "
            "p % columns, each times the patch size in pixels."
        ),
    ),
    mistakes=(
        Mistake(
            "goes down the columns instead of along the rows",
            _columns_first,
            "Reading order goes along the first row, then along the second.",
        ),
        Mistake(
            "hides everything but the patch",
            _all_but_one,
            "In copy p only patch p is filled, and everything else stays.",
        ),
        Mistake(
            "keeps the patches filled from one copy to the next",
            _cumulative,
            "Each copy starts from the original image: `repeat`, not the same tensor again.",
        ),
        Mistake(
            "fills only the first channel",
            _first_channel,
            "Color is the first axis: `copy[:, rows, columns] = fill`.",
        ),
        Mistake(
            "ignores `fill` and writes 0",
            lambda pixels, patch_size, fill=0.0: looking.occlude_patches(pixels, patch_size, 0.0),
            "Use the argument `fill`.",
        ),
        Mistake(
            "fills with the mean of the image",
            _mean_of_image,
            "Use the argument `fill`.",
        ),
        Mistake(
            "reverses the order of the patches",
            lambda pixels, patch_size, fill=0.0: looking.occlude_patches(pixels, patch_size, fill).flip(0),
            "Copy 0 hides the top left patch.",
        ),
    ),
)


# --- L7.4 -----------------------------------------------------------------------------------------------------------


def contrast_cases(rng):
    """Logits in which some tokens are plausible and some are not; the largest of both images differ."""
    for rows, vocabulary, alpha, beta, name in (
        (2, 6, 1.0, 0.1, "alpha 1"),
        (3, 9, 0.5, 0.3, "alpha 0.5"),
        (1, 8, 2.0, 0.02, "one row"),
        (4, 5, 1.5, 0.6, "a strict beta"),
    ):
        yield Case((2 * normal(rng, rows, vocabulary), 2 * normal(rng, rows, vocabulary), alpha, beta), name)


def _mixed(a, b, alpha):
    return (1 + alpha) * a - alpha * b


def _cut(values, by, beta):
    p = by.softmax(-1)
    return values.masked_fill(p < beta * p.amax(-1, keepdim=True), -torch.inf)


CONTRAST = Exercise(
    key="L7.4",
    reference=looking.contrastive_logits,
    cases=contrast_cases,
    difficulty=2,
    minutes=15,
    hints=(
        "Which tokens stay is decided by the original logits alone. The difference only reorders those that stay.",
        (
            "A softmax of `logits` tells which tokens are plausible: compare with β times the row's largest. "
            "Use `masked_fill` with −inf on (1 + α) times one minus α times the other."
        ),
    ),
    mistakes=(
        Mistake(
            "keeps implausible tokens",
            lambda logits, blind, alpha, beta: _mixed(logits, blind, alpha),
            "Without the cut, a token that both images make unlikely can win: fill it with −inf.",
        ),
        Mistake(
            "judges plausibility by the blank image",
            lambda logits, blind, alpha, beta: _cut(_mixed(logits, blind, alpha), blind, beta),
            "The original image says what is plausible.",
        ),
        Mistake(
            "judges plausibility by the result",
            lambda logits, blind, alpha, beta: _cut(_mixed(logits, blind, alpha), _mixed(logits, blind, alpha), beta),
            "Compare the original probabilities with β, before the subtraction.",
        ),
        Mistake(
            "swaps the two images",
            lambda logits, blind, alpha, beta: _cut(_mixed(blind, logits, alpha), logits, beta),
            "What the blank image makes likely is subtracted.",
        ),
        Mistake(
            "adds the blank image's logits",
            lambda logits, blind, alpha, beta: _cut((1 + alpha) * logits + alpha * blind, logits, beta),
            "What the blank image makes likely is subtracted.",
        ),
        Mistake(
            "forgets the 1 in 1 + α",
            lambda logits, blind, alpha, beta: _cut(alpha * (logits - blind), logits, beta),
            "With α = 0 the original logits must remain.",
        ),
        Mistake(
            "compares with β itself, not with β times the largest probability",
            lambda logits, blind, alpha, beta: _mixed(logits, blind, alpha).masked_fill(
                logits.softmax(-1) < beta, -torch.inf
            ),
            "The threshold is relative, β · max, so that the most likely token always stays.",
        ),
        Mistake(
            "contrasts probabilities instead of logits",
            lambda logits, blind, alpha, beta: _cut(_mixed(logits.softmax(-1), blind.softmax(-1), alpha), logits, beta),
            "Subtract logits. Probabilities are only for the cut.",
        ),
    ),
)

EXERCISES = [METRICS, NEGATIVES, OCCLUDE, CONTRAST]
