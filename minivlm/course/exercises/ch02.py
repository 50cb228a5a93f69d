"""Chapter 02: softmax without overflow, and a loss without softmax."""

import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course.exercises.ch01 import clip_logits, random_rows
from minivlm.course.exercises.exercise import Case, Exercise, Mistake

INF = float("inf")


def table_cases(rng):
    """Any shape, along any axis; small and huge values; rows that are far apart; rows of −inf only; ties."""

    def values(*shape, size=2.0):
        return torch.from_numpy(rng.normal(0, size, shape)).float()

    yield Case((values(2, 3), -1), "small values")
    yield Case((values(3, 4), 0), "along the first axis")
    yield Case((values(2, 5, size=400) + torch.tensor([[2000.0], [-2000.0]]), 1), "rows that are far apart")
    yield Case((values(4, 3, size=900), 0), "huge values along the first axis")
    yield Case((values(3, 2) - 500, -1), "all values far below 0")
    masked = values(3, 4)
    masked[0, 1], masked[1] = -INF, -INF
    yield Case((masked, -1), "a row that is all −inf")
    yield Case((values(5),), "one axis, and `dim` is left out")
    deep = values(2, 4, 3)
    deep[1, :, 2] = -INF
    yield Case((deep, 1), "along the middle one of three axes, where one row is all −inf")
    yield Case((values(3, 2, 5), -3), "along the first of three axes, counted from the end")
    yield Case((torch.tensor([1000.0, 1000, 990]) + values(2, 1), -1), "ties")
    half = torch.full((3, 4), -20.0)
    half[torch.arange(3), torch.from_numpy(rng.permutation(4)[:3])] = 20.0  # so far apart that nothing is rounded
    yield Case((half.half(), -1), "float16, in which exp overflows above 11")


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
    hints=(
        (
            "If you subtract the maximum of each row before `exp`, nothing overflows. In a row of only −∞, two "
            "steps go wrong: the subtraction and the division."
        ),
        (
            "`x.amax(dim, keepdim=True)` keeps the axis with length 1, so the subtraction works row by row. "
            "`torch.where(maximum.isfinite(), maximum, 0)` fixes the shift, and `torch.where(total == 0, 1, "
            "total)` fixes the division."
        ),
    ),
    mistakes=(
        Mistake(
            "does not subtract the maximum, so it overflows",
            lambda x, dim=-1: _quotient(x.exp(), dim),
            "Subtract the largest value along `dim` first: `x - x.amax(dim, keepdim=True)`.",
        ),
        Mistake(
            "replaces a sum of 0 but does not subtract the maximum, so it overflows",
            lambda x, dim=-1: _guarded(x.exp(), dim),
            "Subtract the largest value along `dim` first: `x - x.amax(dim, keepdim=True)`.",
        ),
        Mistake(
            "clamps large values instead of subtracting the maximum",
            lambda x, dim=-1: _guarded(x.clamp(max=80).exp(), dim),
            "Clamping makes large values equal. Subtract the largest value along `dim`: that changes no probability.",
        ),
        Mistake(
            "returns logarithms of probabilities",
            lambda x, dim=-1: x.log_softmax(dim),
            "Return exp(x) / Σ exp(x), computed from x − max.",
        ),
        Mistake(
            "returns logarithms of probabilities, with 0 in place of NaN",
            lambda x, dim=-1: torch.where(x.log_softmax(dim).isnan(), 0.0, x.log_softmax(dim)),
            "Return exp(x) / Σ exp(x), computed from x − max.",
        ),
        Mistake(
            "turns −inf into 0, so forbidden choices get a probability",
            lambda x, dim=-1: x.nan_to_num(neginf=0).softmax(dim),
            "exp(−inf) is 0 already. Only the maximum needs care: if it is −inf, subtract 0 instead.",
        ),
        Mistake(
            "divides by the sum over the whole tensor",
            lambda x, dim=-1: (
                (x - _top(x, dim).nan_to_num(neginf=0)).exp() / ((x - _top(x, dim).nan_to_num(neginf=0)).exp().sum())
            ),
            "The probabilities of every row sum to 1: `sum(dim, keepdim=True)`.",
        ),
        Mistake(
            "does not divide by the sum",
            lambda x, dim=-1: (x - _top(x, dim).nan_to_num(neginf=0)).exp(),
            "Divide the exponentials by their sum along `dim`.",
        ),
        Mistake(
            "subtracts the minimum, so the largest value can still overflow",
            lambda x, dim=-1: _quotient((x - x.amin(dim, keepdim=True)).exp(), dim),
            "Only the maximum guarantees that no exponent is above 0.",
        ),
        Mistake(
            "subtracts the largest absolute value, so the sum can underflow to 0",
            lambda x, dim=-1: _quotient((x - x.abs().amax(dim, keepdim=True)).exp(), dim),
            "If all values are negative, the largest one is still `x.amax(dim, keepdim=True)`, without `abs`.",
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
            "subtracts the maximum of the whole tensor, so rows far below it become zeros",
            lambda x, dim=-1: _guarded((x - x.max()).exp(), dim),
            "That is right on paper, but every row needs its own shift, or all its exponentials underflow to 0.",
        ),
        Mistake(
            "subtracts the maximum along the wrong axis",
            lambda x, dim=-1: _quotient((x - _top(x, (dim + 1) % x.ndim)).exp(), dim),
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
            "always normalizes along axis 1 and ignores `dim`",
            lambda x, dim=-1: _guarded_softmax(x, 1),
            "Use `dim` for both the maximum and the sum.",
        ),
        Mistake(
            "subtracts the mean, so the largest value can still overflow",
            lambda x, dim=-1: _quotient((x - x.mean(dim, keepdim=True)).exp(), dim),
            "Only the maximum guarantees that no exponent is above 0.",
        ),
        Mistake(
            "does not return zeros if all values are −inf",
            lambda x, dim=-1: x.clamp(min=torch.finfo(x.dtype).min).softmax(dim),
            "With only −inf there is nothing to choose from: return zeros, not equal probabilities.",
        ),
    ),
)


def _guarded_softmax(x, dim):
    return _guarded((x - torch.where(_top(x, dim).isfinite(), _top(x, dim), 0)).exp(), dim)


def _plain_lse(x, dim=-1):
    """The formula without special treatment of rows of −inf."""
    return x.amax(dim) + (x - _top(x, dim)).exp().sum(dim).log()


LOG_SUM_EXP = Exercise(
    key="02.2",
    reference=losses.log_sum_exp,
    cases=table_cases,
    difficulty=2,
    minutes=8,
    hints=(
        (
            "Start as in 2.1. But the maximum that you add at the end no longer has the axis `dim`, so it is "
            "`x.amax(dim)`."
        ),
        (
            "Add `total.log()` and the maximum, where `total` is the sum of the shifted exponentials. In a row "
            "of only −∞, `torch.where(total == 0, 1, total)` keeps the logarithm finite."
        ),
    ),
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
            "returns 0 if all values are −inf",
            lambda x, dim=-1: torch.where(x.amax(dim) == -INF, 0, torch.logsumexp(x, dim)),
            "A sum of nothing is 0, and log 0 is −inf: add the true maximum, −inf, at the end.",
        ),
        Mistake(
            "returns the maximum only",
            lambda x, dim=-1: x.amax(dim),
            "Add log Σ exp(x − max).",
        ),
        Mistake(
            "returns the logarithm of the softmax",
            lambda x, dim=-1: x.log_softmax(dim),
            "Return log Σ exp(x), one number in place of the axis `dim`.",
        ),
        Mistake(
            "adds the maximum without dropping its axis, so the result is a table",
            lambda x, dim=-1: _top(x, dim) + (x - _top(x, dim)).exp().sum(dim).log(),
            "At the end, the sum has no axis `dim` any more, so add `x.amax(dim)`, without `keepdim=True`.",
        ),
        Mistake(
            "forgets the logarithm",
            lambda x, dim=-1: (x - _top(x, dim).nan_to_num(neginf=0)).exp().sum(dim) + x.amax(dim),
            "The result is max + *log* Σ exp(x − max).",
        ),
        Mistake(
            "clamps large values instead of subtracting the maximum",
            lambda x, dim=-1: torch.logsumexp(x.clamp(max=80), dim),
            "Clamping changes the result. max + log Σ exp(x − max) has the right value and no exponent above 0.",
        ),
        Mistake(
            "adds 1 inside the logarithm",
            lambda x, dim=-1: x.amax(dim) + (x - _top(x, dim)).exp().sum(dim).log1p(),
            "Use `log`: `log1p(s)` is log(1 + s).",
        ),
        Mistake(
            "sums over the whole tensor",
            lambda x, dim=-1: torch.logsumexp(x.flatten(), 0),
            "Every row has its own result: pass `dim` to both the maximum and the sum.",
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
    """With labels (N ≠ M, rows with two matches and with none) and without; logits that are large."""

    def case(name, N, M, D, *columns):
        """Row i of the labels is True in ``columns[i]``."""
        labels = torch.zeros(N, M, dtype=torch.bool)
        for row, matches in zip(labels, columns, strict=True):
            row[list(matches)] = True
        images, texts = random_rows(rng, N, D), random_rows(rng, M, D)
        return Case((images, texts, number(rng, 0.5, 2), number(rng, -3, -1), labels), name)

    def pairs(name, N, D, log_temperature, bias):
        images = random_rows(rng, N, D)
        return Case((images, images + random_rows(rng, N, D), log_temperature, bias), name)

    yield case("labels: a row with two matches and a row with none", 2, 3, 4, (0, 1), ())
    yield case("labels: more images than texts", 4, 3, 2, (1,), (0, 2), (2,), ())
    yield pairs("three pairs, no labels", 3, 4, number(rng, 0.5, 2), number(rng, -3, -1))
    yield pairs("more pairs than dimensions, no labels", 5, 2, number(rng, 0.5, 2), number(rng, -3, -1))
    yield pairs("a batch of one, no labels", 1, 6, number(rng, 0.5, 2), number(rng, -3, -1))
    yield pairs("a positive bias, no labels", 4, 3, number(rng, -1, -0.5), number(rng, 1, 2))
    yield case("labels: one image, several texts", 1, 4, 3, (1, 3))
    yield case("labels: several images, one text", 5, 1, 2, (), (0,), (0,), (), ())
    yield case("labels: no match at all", 2, 5, 3, (), ())
    yield case("labels: the pairs are not on the diagonal", 4, 4, 5, (3,), (2,), (1,), (0,))
    images = random_rows(rng, 3, 5)
    hot, bias = torch.tensor(100.0).log(), torch.tensor(-50.0)
    yield Case((images, -images, hot, bias), "a large temperature and bias, and images that oppose their texts")


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


def _sum_of(values):
    """The sigmoid loss with other values than log σ(z · logit) in its sum."""

    def loss(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
        table = _logits(image_embeddings, text_embeddings, log_temperature, bias)
        return -values(_z(image_embeddings, labels), table).sum() / len(image_embeddings)

    return loss


def _wrong_bias_sign(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    scaled = clip_logits(image_embeddings, text_embeddings, log_temperature)
    return -F.logsigmoid(_z(image_embeddings, labels) * scaled + bias).sum() / len(image_embeddings)


def _per_match(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    z = _z(image_embeddings, labels)
    table = _logits(image_embeddings, text_embeddings, log_temperature, bias)
    return _sum_over_pairs(z, table) / (z == 1).sum()


def _per_text(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    table = _logits(image_embeddings, text_embeddings, log_temperature, bias)
    return _sum_over_pairs(_z(image_embeddings, labels), table) / len(text_embeddings)


def _diagonal_only(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    table = _logits(image_embeddings, text_embeddings, log_temperature, bias)
    return _sum_over_pairs(2 * torch.eye(*table.shape) - 1, table) / len(image_embeddings)


def _square_diagonal_only(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    table = _logits(image_embeddings, text_embeddings, log_temperature, bias)
    return _sum_over_pairs(2 * torch.eye(len(image_embeddings)) - 1, table) / len(image_embeddings)


def _first_match_only(images, labels):
    """z that is 1 at the first match of each row only, or at index 0 if there is none."""
    if labels is None:
        return _z(images, None)
    z = torch.full(labels.shape, -1.0)
    z[torch.arange(len(z)), labels.int().argmax(1)] = 1.0
    return z


SIGMOID_LOSS = Exercise(
    key="02.3",
    reference=losses.sigmoid_loss,
    cases=labeled_cases,
    difficulty=2,
    minutes=12,
    points=3,
    hints=(
        (
            "Each cell of the table is a question of its own: do this image and this text belong together? Its "
            "loss is −log σ(z · logit), with z = 1 for yes and −1 for no. Sum over all cells, then divide by "
            "the number of images."
        ),
        (
            "`losses.l2_normalize` normalizes the embeddings. If no labels are passed, use `torch.eye(N, "
            "dtype=torch.bool)`. `torch.where(labels, 1.0, -1.0)` is z."
        ),
    ),
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
            "divides by the number of matches instead of the number of images",
            _per_match,
            "An image can have two matching texts, or none. Divide the sum by N, the number of images.",
        ),
        Mistake(
            "divides by the number of texts instead of the number of images",
            _per_text,
            "The loss is per image: divide by N, not by M.",
        ),
        Mistake(
            "ignores `labels` and always takes the diagonal as the matches",
            _diagonal_only,
            "If `labels` is passed, z is 1 where it is True. Use `torch.eye` only if it is None.",
        ),
        Mistake(
            "ignores `labels` and builds a square table, so N and M must be equal",
            _square_diagonal_only,
            "If `labels` is passed, z is 1 where it is True. Use `torch.eye` only if it is None.",
        ),
        Mistake(
            "uses only one match per row of `labels`",
            _wrong_sigmoid(_logits, z=_first_match_only),
            "An image can have two matching texts, or none: `torch.where(labels, 1.0, -1.0)` handles every entry.",
        ),
        Mistake(
            "computes log σ as the logarithm of a sigmoid, which underflows to log 0",
            _sum_of(lambda z, logits: (z * logits).sigmoid().log()),
            "`F.logsigmoid` computes log σ without overflow.",
        ),
        Mistake(
            "sums probabilities instead of their logarithms",
            _sum_of(lambda z, logits: (z * logits).sigmoid()),
            "A pair costs −log σ(z · logit): use `F.logsigmoid`.",
        ),
        Mistake(
            "multiplies z by the scaled cosine only, so the bias keeps its sign",
            _wrong_bias_sign,
            "z multiplies the whole logit: z · (exp(log_temperature) · cosine + bias).",
        ),
        Mistake(
            "counts only the matching pairs",
            _sum_of(lambda z, logits: F.logsigmoid(logits) * (z == 1)),
            "Pairs that do not match have a cost too, with z = −1.",
        ),
        Mistake(
            "counts only the pairs that do not match",
            _sum_of(lambda z, logits: F.logsigmoid(-logits) * (z == -1)),
            "The matching pairs have a cost too, with z = 1.",
        ),
        Mistake(
            "leaves out z and sums over all logits",
            _sum_of(lambda z, logits: logits),
            "A pair costs −log σ(z · logit).",
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
        Mistake(
            "normalizes the images but not the texts",
            _wrong_sigmoid(lambda x, y, t, b: t.exp() * (losses.l2_normalize(x) @ y.T) + b),
            "The text embeddings have different lengths too.",
        ),
        Mistake(
            "normalizes over the batch axis",
            _wrong_sigmoid(lambda x, y, t, b: t.exp() * (x / x.norm(dim=0) @ (y / y.norm(dim=0)).T) + b),
            "Each row is one embedding: normalize along the last axis, `dim=-1`.",
        ),
        Mistake(
            "leaves out the temperature",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, t * 0) + b),
            "Multiply the cosines by `log_temperature.exp()`.",
        ),
        Mistake(
            "divides by the temperature instead of multiplying",
            _wrong_sigmoid(lambda x, y, t, b: clip_logits(x, y, -t) + b),
            "exp(log_temperature) is a factor of the cosines.",
        ),
    ),
)


def chunk_cases(rng):
    """Chunk sizes that do and do not divide the batch size, and larger ones."""

    def pairs(N, D):
        images = random_rows(rng, N, D)
        return images, images + random_rows(rng, N, D), number(rng, 0.5, 2), number(rng, -3, -1)

    yield Case((*pairs(5, 3), 2), "a last chunk of one text")
    yield Case((*pairs(6, 4), 3), "two full chunks")
    yield Case((*pairs(8, 2), 3), "a last chunk that is not full")
    yield Case((*pairs(3, 4), 8), "a chunk that is larger than the batch")
    yield Case((*pairs(4, 3), 1), "chunks of one text")
    yield Case((*pairs(5, 7), 5), "one full chunk")
    yield Case((*pairs(9, 5), 2), "many chunks")
    yield Case((*pairs(1, 4), 3), "a batch of one")
    yield Case(pairs(6, 2), "`chunk_size` is left out")
    images, hot, bias = random_rows(rng, 7, 4), torch.tensor(100.0).log(), torch.tensor(-50.0)
    yield Case((images, -images, hot, bias, 3), "a large temperature and bias, and images that oppose their texts")


def _every(N, size):
    return range(0, N, size)


def _by_chunks(block, starts=_every, logits=None, join=sum, width=lambda size: size):
    """A loop over chunks of texts; ``block(logits of the chunk, first, N)`` is the loss of one chunk.

    Args:
        starts: Where the chunks start, from N and the chunk size.
        logits: The logits of images, texts, log_temperature and bias, if they are wrong.
        join: Makes one loss of those of the chunks.
        width: How many texts a chunk takes, from the chunk size.
    """
    logits = logits or _logits

    def loss(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
        N, found = len(image_embeddings), [torch.zeros(())]
        for first in starts(N, chunk_size):
            texts = text_embeddings[first : first + width(chunk_size)]
            found.append(block(logits(image_embeddings, texts, log_temperature, bias), first, N))
        return join(found)

    return loss


def _signs(logits, first):
    """+1 at (first + j, j), −1 elsewhere."""
    z = -torch.ones_like(logits)
    z.diagonal(-first).fill_(1.0)
    return z


def _own_rows(logits, first, N):
    rows = slice(first, first + logits.shape[1])
    return _sum_over_pairs(_signs(logits, first)[rows], logits[rows]) / N


def _right_block(logits, first, N):
    return _sum_over_pairs(_signs(logits, first), logits) / N


def _mean_of_chunks(found):
    return sum(found) / (len(found) - 1)


def _by_hint(block):
    """As the hint says: the sum over everything as mismatches, corrected at the matches; ``block`` is one chunk's."""
    return _by_chunks(lambda logits, first, N: -block(F.logsigmoid(-logits).sum(), logits.diagonal(-first)) / N)


def _chunks_counted_by_size(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """``torch.chunk`` takes the number of chunks, but the loop counts on with their size."""
    total, N = 0, len(image_embeddings)
    for k, texts in enumerate(text_embeddings.chunk(chunk_size)):
        total = total + _right_block(_logits(image_embeddings, texts, log_temperature, bias), k * chunk_size, N)
    return total


CHUNKED = Exercise(
    key="02.4",
    reference=losses.chunked_sigmoid_loss,
    cases=chunk_cases,
    difficulty=3,
    minutes=15,
    points=4,
    hints=(
        (
            "The cells do not depend on each other, so you can sum them piece by piece. In each piece, find the "
            "matching pairs."
        ),
        (
            "Loop with `for first in range(0, N, chunk_size)`. Text *j* of the chunk belongs to image `first + "
            "j`. In the logits of the chunk, `[N, C]`, these matches are `logits.diagonal(-first)`. Start with "
            "the sum of −log σ(−logit) over everything, then correct the matches, which need the other sign."
        ),
    ),
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
            "Text j of every chunk belongs to image first + j: in the chunk's logits, that is `diagonal(-first)`.",
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
        Mistake(
            "averages over the chunks instead of adding them up",
            _by_chunks(_right_block, join=_mean_of_chunks),
            "The sum over all pairs is the sum over the chunks. Divide it only by N, the number of images.",
        ),
        Mistake(
            "returns the loss of the last chunk only",
            _by_chunks(_right_block, join=lambda found: found[-1]),
            "Add the loss of every chunk to a total: `total = total + …`.",
        ),
        Mistake(
            "returns the loss of the first chunk only",
            _by_chunks(_right_block, join=lambda found: found[1]),
            "Add up the other chunks too: the `return` comes after the loop.",
        ),
        Mistake(
            "leaves out the last text of every chunk",
            _by_chunks(_right_block, width=lambda size: size - 1),
            "A slice does not include its end: `texts[first : first + chunk_size]` has `chunk_size` texts.",
        ),
        Mistake(
            "takes one text too many in every chunk",
            _by_chunks(_right_block, width=lambda size: size + 1),
            "A slice does not include its end: `texts[first : first + chunk_size]` has `chunk_size` texts.",
        ),
        Mistake(
            "stops one text early, so a last chunk of one text is skipped",
            _by_chunks(_right_block, starts=lambda N, size: range(0, N - 1, size)),
            "Use `range(0, N, chunk_size)`: the end of a range is not included anyway.",
        ),
        Mistake(
            "makes `chunk_size` chunks instead of chunks of this size",
            _chunks_counted_by_size,
            "`torch.chunk` takes the number of chunks, `torch.split` their size. Text j of a chunk is text first + j.",
        ),
        Mistake(
            "treats all pairs as mismatches",
            _by_hint(lambda everything, matches: everything),
            "Text j of a chunk matches image first + j: its logit needs the other sign.",
        ),
        Mistake(
            "counts the matches as mismatches too",
            _by_hint(lambda everything, matches: everything + F.logsigmoid(matches).sum()),
            "Take the matches out of the sum over everything before you add them with the other sign.",
        ),
        Mistake(
            "takes the matches out of the sum but does not add them with the other sign",
            _by_hint(lambda everything, matches: everything - F.logsigmoid(-matches).sum()),
            "A matching pair costs −log σ(logit).",
        ),
        Mistake(
            "treats all pairs as matches",
            _by_chunks(lambda logits, first, N: -F.logsigmoid(logits).sum() / N),
            "For an image and a text that do not belong together, the sign flips: −log σ(−logit).",
        ),
        Mistake(
            "flips the sign of z",
            _by_chunks(lambda logits, first, N: _sum_over_pairs(-_signs(logits, first), logits) / N),
            "z is +1 for matching pairs and −1 for the rest.",
        ),
        Mistake(
            "computes log σ as the logarithm of a sigmoid, which underflows to log 0",
            _by_chunks(lambda logits, first, N: -(_signs(logits, first) * logits).sigmoid().log().sum() / N),
            "`F.logsigmoid` computes log σ without overflow.",
        ),
        Mistake(
            "forgets the bias",
            _by_chunks(_right_block, logits=lambda x, y, t, b: clip_logits(x, y, t)),
            "logit = exp(log_temperature) · cosine + bias.",
        ),
        Mistake(
            "forgets to normalize",
            _by_chunks(_right_block, logits=lambda x, y, t, b: t.exp() * (x @ y.T) + b),
            "Logits are scaled cosines: normalize both sides, as in chapter 01.",
        ),
        Mistake(
            "multiplies by t itself instead of exp(t)",
            _by_chunks(_right_block, logits=lambda x, y, t, b: t * clip_logits(x, y, t * 0) + b),
            "The learned parameter is the logarithm: the factor is `log_temperature.exp()`.",
        ),
        Mistake(
            "leaves out the temperature",
            _by_chunks(_right_block, logits=lambda x, y, t, b: clip_logits(x, y, t * 0) + b),
            "Multiply the cosines by `log_temperature.exp()`.",
        ),
    ),
)

EXERCISES = [SAFE_SOFTMAX, LOG_SUM_EXP, SIGMOID_LOSS, CHUNKED]
