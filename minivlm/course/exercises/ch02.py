"""Chapter 02: softmax without overflow, and a loss without softmax."""

import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course.exercises.ch01 import clip_logits, random_rows
from minivlm.course.exercises.exercise import Exercise, Mistake

INF = float("inf")


def table_cases(rng):
    """Tame rows and wild ones, either axis; rows of very different size; a row where everything is forbidden."""
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
            "does not subtract the maximum, and overflows",
            lambda x, dim=-1: _quotient(x.exp(), dim),
            "Subtract the largest number along `dim` first: `x - x.amax(dim, keepdim=True)`.",
        ),
        Mistake(
            "gives NaN for a row of nothing but −inf",
            lambda x, dim=-1: _quotient((x - _top(x, dim)).exp(), dim),
            "−inf − (−inf) is NaN: where the maximum is not finite, subtract 0, and where the sum is 0, divide by 1.",
        ),
        Mistake(
            "subtracts the maximum of the whole table, so that rows far below it become 0/0",
            lambda x, dim=-1: _quotient((x - x.max()).exp(), dim),
            "Right on paper; but every row needs a shift of its own, or all its exponentials vanish.",
        ),
        Mistake(
            "subtracts the maximum over the wrong axis",
            lambda x, dim=-1: _quotient((x - _top(x, 1 - dim % 2)).exp(), dim),
            "The shift must be the same for all numbers that are summed: the maximum is taken along the same `dim`.",
        ),
        Mistake(
            "lets the reduced axis disappear, so that rows and columns do not line up",
            lambda x, dim=-1: (x - x.amax(dim)).exp() / (x - x.amax(dim)).exp().sum(dim),
            "`keepdim=True` keeps a 1 in the place of `dim`.",
        ),
        Mistake(
            "always normalizes along the last axis, whatever `dim` says",
            lambda x, dim=-1: _guarded_softmax(x, -1),
            "Use `dim` both for the maximum and for the sum.",
        ),
        Mistake(
            "subtracts the mean, which leaves the largest number free to overflow",
            lambda x, dim=-1: _quotient((x - x.mean(dim, keepdim=True)).exp(), dim),
            "Only the maximum makes sure that no exponent is above 0.",
        ),
        Mistake(
            "does not give zeros where everything is forbidden",
            lambda x, dim=-1: torch.where(_top(x, dim) == -INF, 1 / x.shape[dim], _guarded_softmax(x, dim)),
            "A row of nothing but −inf has no choice at all: zeros, not equal shares.",
        ),
    ),
)


def _guarded_softmax(x, dim):
    return _guarded((x - torch.where(_top(x, dim).isfinite(), _top(x, dim), 0)).exp(), dim)


def _plain_lse(x, dim):
    """The formula without a thought for rows of −inf."""
    return x.amax(dim) + (x - _top(x, dim)).exp().sum(dim).log()


LOG_SUM_EXP = Exercise(
    key="02.2",
    reference=losses.log_sum_exp,
    cases=table_cases,
    difficulty=2,
    minutes=8,
    mistakes=(
        Mistake(
            "does not subtract the maximum, and overflows",
            lambda x, dim=-1: x.exp().sum(dim).log(),
            "max + log Σ exp(x − max): the same number, and no exponent above 0.",
        ),
        Mistake(
            "gives NaN for a row of nothing but −inf",
            _plain_lse,
            "The logarithm of an empty sum is −inf; −inf − (−inf) is NaN: where the maximum is not finite, subtract 0.",
        ),
        Mistake(
            "forgets to add the maximum back",
            lambda x, dim=-1: torch.logsumexp(x - _top(x, dim).nan_to_num(neginf=0), dim),
            "A factor exp(max) was taken out of the sum; outside of the logarithm it is + max.",
        ),
        Mistake(
            "subtracts the maximum at the end instead of adding it",
            lambda x, dim=-1: torch.logsumexp(x, dim) - 2 * x.amax(dim).nan_to_num(neginf=0),
            "exp(max) was taken out of the sum, so its logarithm comes back with a plus.",
        ),
        Mistake(
            "subtracts the maximum of the whole table, so that rows far below it vanish",
            lambda x, dim=-1: x.max() + (x - x.max()).exp().sum(dim).log(),
            "Every row needs a shift of its own: `amax(dim)`.",
        ),
        Mistake(
            "keeps the axis that should disappear",
            lambda x, dim=-1: torch.logsumexp(x, dim).unsqueeze(dim),
            "One number a row: the result has one axis fewer than x.",
        ),
        Mistake(
            "takes the mean where it should take the sum",
            lambda x, dim=-1: torch.logsumexp(x, dim) - torch.tensor(float(x.shape[dim])).log(),
            "It is the logarithm of a *sum*.",
        ),
        Mistake(
            "always sums along the last axis, whatever `dim` says",
            lambda x, dim=-1: torch.logsumexp(x, -1),
            "Use `dim` for the maximum and for the sum.",
        ),
    ),
)


def number(rng, low, high):
    return torch.tensor(float(rng.uniform(low, high)))


def labeled_cases(rng):
    """With labels first, more texts than pictures and some rows with two matches; then plain pairs."""
    for N, M, D in ((2, 3, 4), (4, 3, 2)):
        labels = torch.from_numpy(rng.random((N, M)) < 0.4)
        labels[0, :2], labels[-1, 0] = True, False
        yield random_rows(rng, N, D), random_rows(rng, M, D), number(rng, 0.5, 2), number(rng, -3, -1), labels
    for N, D in ((3, 4), (5, 2), (2, 6)):
        x = random_rows(rng, N, D)
        yield x, x + random_rows(rng, N, D), number(rng, 0.5, 2), number(rng, -3, -1), None


def _z(images, labels, no=-1.0):
    """1 where picture and text match, ``no`` elsewhere."""
    return torch.where(torch.eye(len(images), dtype=torch.bool) if labels is None else labels, 1.0, no)


def _sum_over_pairs(z, logits):
    return -F.logsigmoid(z * logits).sum()


def _wrong_sigmoid(logits, z=_z, share=len):
    """The sigmoid loss with one part exchanged: ``logits`` of (x, y, t, b), ``share`` by which the sum is divided."""

    def loss(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
        table = logits(image_embeddings, text_embeddings, log_temperature, bias)
        return _sum_over_pairs(z(image_embeddings, labels), table) / share(image_embeddings)

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
            "takes the mean over all pairs, not the sum per picture",
            _mean_of_all,
            "The sum over the table is divided by the number of pictures, N; by N·M, a right pair hardly counts.",
        ),
        Mistake(
            "sums and does not divide",
            _wrong_sigmoid(_logits, share=lambda images: 1),
            "Divide by the number of pictures.",
        ),
        Mistake(
            "forgets the bias",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, t)),
            "logit = exp(log_temperature) · cosine + bias.",
        ),
        Mistake(
            "subtracts the bias",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, t) - b),
            "The bias, a negative number at the start, is added.",
        ),
        Mistake(
            "adds the bias to the cosine, before the temperature",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, t) + t.exp() * b),
            "The temperature scales the cosine alone; the bias comes after.",
        ),
        Mistake(
            "labels wrong pairs 0 instead of −1",
            _wrong_sigmoid(_logits, z=lambda images, labels: _z(images, labels, 0.0)),
            "With 0 a wrong pair costs log 2 whatever the model says: z is 1 or −1.",
        ),
        Mistake(
            "treats every pair as a match",
            _wrong_sigmoid(_logits, z=lambda images, labels: _z(images, labels, 1.0)),
            "Where picture and text do not belong together the sign turns: z = −1.",
        ),
        Mistake(
            "has the sign of z the wrong way round",
            _wrong_sigmoid(_logits, z=lambda images, labels: -_z(images, labels)),
            "z is +1 for what belongs together, −1 for the rest.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            _wrong_sigmoid(lambda x, y, t, b: t * clip_logits(x, y, t * 0) + b),
            "What is learned is the logarithm: the factor is `log_temperature.exp()`.",
        ),
        Mistake(
            "forgets to normalize",
            _wrong_sigmoid(lambda x, y, t, b: t.exp() * (x @ y.T) + b),
            "Logits are made of cosines: divide both sides by their lengths, as in chapter 01.",
        ),
    ),
)


def chunk_cases(rng):
    """Chunks that do and do not divide the batch, and one that is larger than it."""
    for N, D, chunk_size in ((5, 3, 2), (6, 4, 3), (7, 2, 3), (3, 4, 8), (4, 3, 1)):
        x = random_rows(rng, N, D)
        yield x, x + random_rows(rng, N, D), number(rng, 0.5, 2), number(rng, -3, -1), chunk_size


def _by_chunks(block, starts=lambda N, size: range(0, N, size)):
    """A walk over chunks of texts with ``block(logits of the chunk, first, N)`` for the loss of each."""

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
            "starts the diagonal anew in every chunk",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, 0), logits) / N),
            "Text j of a chunk that begins at `first` belongs to picture first + j.",
        ),
        Mistake(
            "counts right pairs in the first chunk alone",
            _by_chunks(
                lambda logits, first, N: (
                    _sum_over_pairs(_signs(logits, 0) if first == 0 else -torch.ones_like(logits), logits) / N
                )
            ),
            "Every chunk holds the partners of some pictures: those from `first` on.",
        ),
        Mistake(
            "cuts the pictures too, and so leaves out the pairs between chunks",
            _by_chunks(_own_rows),
            "Each chunk of texts meets *all* pictures; only the texts are cut.",
        ),
        Mistake(
            "leaves out the last chunk where it is not full",
            _by_chunks(
                lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits) / N,
                starts=lambda N, size: range(0, N - size + 1, size),
            ),
            "`range(0, N, chunk_size)`: a slice may reach beyond the end.",
        ),
        Mistake(
            "divides each chunk by its own size",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits) / logits.shape[1]),
            "The loss is per picture: divide by N, the number of all pictures.",
        ),
        Mistake(
            "sums and does not divide",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits)),
            "Divide by the number of pictures.",
        ),
        Mistake(
            "takes the mean over the pairs of each chunk",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(_signs(logits, first), logits) / logits.numel()),
            "Sums may be cut anywhere, means may not: sum all chunks, then divide by N.",
        ),
    ),
)

EXERCISES = [SAFE_SOFTMAX, LOG_SUM_EXP, SIGMOID_LOSS, CHUNKED]
