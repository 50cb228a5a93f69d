"""Chapter 02: softmax without overflow, and a loss without softmax."""

import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course.exercises.ch01 import clip_logits, random_rows
from minivlm.course.exercises.exercise import Exercise, Mistake

INF = float("inf")


def table_cases(rng):
    """Small and huge values, along either axis; rows that are far apart; a row of −inf only."""
    for shape, dim, size in (((2, 3), -1, 1), ((3, 4), 0, 3), ((2, 5), 1, 400), ((4, 3), 0, 900), ((3, 4), -1, 2)):
        x = torch.from_numpy(rng.normal(0, size, shape)).float()
        if size == 400:
            x += torch.tensor([[2000.0], [-2000.0]])
        if size == 2:
            x[0, 1], x[1] = -INF, -INF
        yield x, dim


def _quotient(e, dim):
    return e / e.sum(dim, keepdim=True)


def _top(x, dim):
    return x.amax(dim, keepdim=True)


def _guarded(e, dim):
    total = e.sum(dim, keepdim=True)
    return e / torch.where(total == 0, 1, total)


SAFE_SOFTMAX = Exercise(
    key="02.1",
    reference=losses.safe_softmax,
    cases=table_cases,
    difficulty=2,
    minutes=10,
    mistakes=(
        Mistake(
            "does not subtract the maximum, so it overflows",
            lambda x, dim=-1: _quotient(x.exp(), dim),
            "Subtract the largest value along `dim` first: `x - x.amax(dim, keepdim=True)`.",
        ),
        Mistake(
            "returns NaN if all values are −inf",
            lambda x, dim=-1: _quotient((x - _top(x, dim)).exp(), dim),
            "−inf − (−inf) is NaN: if the maximum is not finite, subtract 0, and if the sum is 0, divide by 1.",
        ),
        Mistake(
            "subtracts the maximum of the whole table, so rows far below it become 0/0",
            lambda x, dim=-1: _quotient((x - x.max()).exp(), dim),
            "That is right on paper, but every row needs its own shift, or all its exponentials underflow to 0.",
        ),
        Mistake(
            "subtracts the maximum along the wrong axis",
            lambda x, dim=-1: _quotient((x - _top(x, 1 - dim % 2)).exp(), dim),
            "All values in one sum need the same shift: take the maximum along the same `dim`.",
        ),
        Mistake(
            "drops the reduced axis, so rows and columns do not line up",
            lambda x, dim=-1: (x - x.amax(dim)).exp() / (x - x.amax(dim)).exp().sum(dim),
            "`keepdim=True` keeps `dim` with length 1.",
        ),
        Mistake(
            "always normalizes along the last axis and ignores `dim`",
            lambda x, dim=-1: _guarded_softmax(x, -1),
            "Use `dim` for both the maximum and the sum.",
        ),
        Mistake(
            "subtracts the mean, so the largest value can still overflow",
            lambda x, dim=-1: _quotient((x - x.mean(dim, keepdim=True)).exp(), dim),
            "Only the maximum guarantees that no exponent is above 0.",
        ),
        Mistake(
            "does not return zeros if all values are −inf",
            lambda x, dim=-1: torch.where(_top(x, dim) == -INF, 1 / x.shape[dim], _guarded_softmax(x, dim)),
            "With only −inf there is nothing to choose from: return zeros, not equal probabilities.",
        ),
    ),
)


def _guarded_softmax(x, dim):
    return _guarded((x - torch.where(_top(x, dim).isfinite(), _top(x, dim), 0)).exp(), dim)


def _plain_lse(x, dim):
    """The formula without special treatment of rows of −inf."""
    return x.amax(dim) + (x - _top(x, dim)).exp().sum(dim).log()


LOG_SUM_EXP = Exercise(
    key="02.2",
    reference=losses.log_sum_exp,
    cases=table_cases,
    difficulty=2,
    minutes=8,
    mistakes=(
        Mistake(
            "does not subtract the maximum, so it overflows",
            lambda x, dim=-1: x.exp().sum(dim).log(),
            "max + log Σ exp(x − max) has the same value and no exponent above 0.",
        ),
        Mistake(
            "returns NaN if all values are −inf",
            _plain_lse,
            "log 0 is −inf, but −inf − (−inf) is NaN: if the maximum is not finite, subtract 0.",
        ),
        Mistake(
            "forgets to add the maximum back",
            lambda x, dim=-1: torch.logsumexp(x - _top(x, dim).nan_to_num(neginf=0), dim),
            "You took the factor exp(max) out of the sum; outside the logarithm that is + max.",
        ),
        Mistake(
            "subtracts the maximum at the end instead of adding it",
            lambda x, dim=-1: torch.logsumexp(x, dim) - 2 * x.amax(dim).nan_to_num(neginf=0),
            "You took the factor exp(max) out of the sum, so its logarithm, max, must be added.",
        ),
        Mistake(
            "subtracts the maximum of the whole table, so rows far below it underflow",
            lambda x, dim=-1: x.max() + (x - x.max()).exp().sum(dim).log(),
            "Every row needs its own shift: `amax(dim)`.",
        ),
        Mistake(
            "keeps the axis that it sums over",
            lambda x, dim=-1: torch.logsumexp(x, dim).unsqueeze(dim),
            "The result has one axis fewer than x: drop `keepdim=True` at the end.",
        ),
        Mistake(
            "takes the mean instead of the sum",
            lambda x, dim=-1: torch.logsumexp(x, dim) - torch.tensor(float(x.shape[dim])).log(),
            "It is the logarithm of a *sum*.",
        ),
        Mistake(
            "always sums along the last axis and ignores `dim`",
            lambda x, dim=-1: torch.logsumexp(x, -1),
            "Use `dim` for both the maximum and the sum.",
        ),
    ),
)


def number(rng, low, high):
    return torch.tensor(float(rng.uniform(low, high)))


def labeled_cases(rng):
    """First with labels: N ≠ M, and rows with two matches. Then plain pairs."""
    for N, M, D in ((2, 3, 4), (4, 3, 2)):
        labels = torch.from_numpy(rng.random((N, M)) < 0.4)
        labels[0, :2], labels[-1, 0] = True, False
        yield random_rows(rng, N, D), random_rows(rng, M, D), number(rng, 0.5, 2), number(rng, -3, -1), labels
    for N, D in ((3, 4), (5, 2), (2, 6)):
        x = random_rows(rng, N, D)
        yield x, x + random_rows(rng, N, D), number(rng, 0.5, 2), number(rng, -3, -1), None


def _z(images, labels, no=-1.0):
    """1 where image and text match, ``no`` elsewhere."""
    return torch.where(torch.eye(len(images), dtype=torch.bool) if labels is None else labels, 1.0, no)


def _sum_over_pairs(z, logits):
    return -F.logsigmoid(z * logits).sum()


def _wrong_sigmoid(logits, z=_z, count=len):
    """The sigmoid loss with one part replaced: ``logits`` of (x, y, t, b), or ``count``, which divides the sum."""

    def loss(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
        table = logits(image_embeddings, text_embeddings, log_temperature, bias)
        return _sum_over_pairs(z(image_embeddings, labels), table) / count(image_embeddings)

    return loss


def _logits(x, y, t, b):
    return clip_logits(x, y, t) + b


def _mean_of_all(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    table = _logits(image_embeddings, text_embeddings, log_temperature, bias)
    return _sum_over_pairs(_z(image_embeddings, labels), table) / table.numel()


SIGMOID_LOSS = Exercise(
    key="02.3",
    reference=losses.sigmoid_loss,
    cases=labeled_cases,
    difficulty=2,
    minutes=12,
    points=3,
    mistakes=(
        Mistake(
            "takes the mean over all pairs instead of the sum per image",
            _mean_of_all,
            "Divide the sum over the table by N, the number of images. With N·M, a matching pair hardly contributes.",
        ),
        Mistake(
            "sums without dividing",
            _wrong_sigmoid(_logits, count=lambda images: 1),
            "Divide by the number of images.",
        ),
        Mistake(
            "forgets the bias",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, t)),
            "logit = exp(log_temperature) · cosine + bias.",
        ),
        Mistake(
            "subtracts the bias",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, t) - b),
            "The bias is added. It starts out negative.",
        ),
        Mistake(
            "adds the bias to the cosine, before the temperature",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, t) + t.exp() * b),
            "The temperature scales only the cosine; the bias comes after.",
        ),
        Mistake(
            "labels non-matching pairs 0 instead of −1",
            _wrong_sigmoid(_logits, z=lambda images, labels: _z(images, labels, 0.0)),
            "With 0, a non-matching pair costs log 2 whatever the model predicts: z is 1 or −1.",
        ),
        Mistake(
            "treats every pair as a match",
            _wrong_sigmoid(_logits, z=lambda images, labels: _z(images, labels, 1.0)),
            "For an image and a text that do not belong together, z = −1.",
        ),
        Mistake(
            "flips the sign of z",
            _wrong_sigmoid(_logits, z=lambda images, labels: -_z(images, labels)),
            "z is +1 for matching pairs and −1 for the rest.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            _wrong_sigmoid(lambda x, y, t, b: t * clip_logits(x, y, t * 0) + b),
            "The learned parameter is the logarithm: the factor is `log_temperature.exp()`.",
        ),
        Mistake(
            "forgets to normalize",
            _wrong_sigmoid(lambda x, y, t, b: t.exp() * (x @ y.T) + b),
            "Logits are scaled cosines: normalize both sides, as in chapter 01.",
        ),
    ),
)


def chunk_cases(rng):
    """Chunk sizes that do and do not divide the batch size, and one that is larger."""
    for N, D, chunk_size in ((5, 3, 2), (6, 4, 3), (7, 2, 3), (3, 4, 8), (4, 3, 1)):
        x = random_rows(rng, N, D)
        yield x, x + random_rows(rng, N, D), number(rng, 0.5, 2), number(rng, -3, -1), chunk_size


def _by_chunks(block, starts=lambda N, size: range(0, N, size)):
    """A loop over chunks of texts; ``block(logits of the chunk, first, N)`` is the loss of one chunk."""

    def loss(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
        N, total = len(image_embeddings), torch.zeros(())
        for first in starts(N, chunk_size):
            texts = text_embeddings[first : first + chunk_size]
            total = total + block(_logits(image_embeddings, texts, log_temperature, bias), first, N)
        return total

    return loss


def _signs(logits, first):
    """+1 at (first + j, j), −1 elsewhere."""
    z = -torch.ones_like(logits)
    z.diagonal(-first).fill_(1.0)
    return z


def _own_rows(logits, first, N):
    rows = slice(first, first + logits.shape[1])
    return _sum_over_pairs(_signs(logits, first)[rows], logits[rows]) / N


CHUNKED = Exercise(
    key="02.4",
    reference=losses.chunked_sigmoid_loss,
    cases=chunk_cases,
    difficulty=3,
    minutes=15,
    points=4,
    mistakes=(
        Mistake(
            "restarts the diagonal in every chunk",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, 0), logits) / N),
            "Text j of a chunk that starts at `first` belongs to image first + j.",
        ),
        Mistake(
            "marks matching pairs only in the first chunk",
            _by_chunks(
                lambda logits, first, N: (
                    _sum_over_pairs(_signs(logits, 0) if first == 0 else -torch.ones_like(logits), logits) / N
                )
            ),
            "Every chunk contains the texts of some images: those from `first` on.",
        ),
        Mistake(
            "also splits the images, so it misses the pairs across chunks",
            _by_chunks(_own_rows),
            "Compare each chunk of texts with *all* images; only the texts are split.",
        ),
        Mistake(
            "skips the last chunk if it is not full",
            _by_chunks(
                lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits) / N,
                starts=lambda N, size: range(0, N - size + 1, size),
            ),
            "Use `range(0, N, chunk_size)`: a slice can extend past the end.",
        ),
        Mistake(
            "divides each chunk by its own size",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits) / logits.shape[1]),
            "The loss is per image: divide by N, the number of all images.",
        ),
        Mistake(
            "sums without dividing",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits)),
            "Divide by the number of images.",
        ),
        Mistake(
            "averages over the pairs of each chunk",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits) / logits.numel()),
            "A sum can be split anywhere, a mean can't: sum over all chunks, then divide by N.",
        ),
    ),
)

EXERCISES = [SAFE_SOFTMAX, LOG_SUM_EXP, SIGMOID_LOSS, CHUNKED]
