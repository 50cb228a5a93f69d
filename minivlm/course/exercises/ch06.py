"""Chapter 06: how the decoder turns embeddings into the next token."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm import gemma
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def random(rng, *shape, spread=1.0):
    return torch.from_numpy(rng.normal(0, spread, shape)).float()


def small_integers(rng, *shape):
    """Small integers in bfloat16: their sums and products have no rounding, in whatever order they are computed."""
    return torch.from_numpy(rng.integers(-8, 9, shape)).bfloat16()


# --- RMSNorm --------------------------------------------------------------------------------------------------------


def norm_cases(rng):
    """An eps large enough to matter, values with nonzero mean, and one case in bfloat16."""
    for shape, eps, name in (
        ((2, 3, 5), 0.3, "a large eps"),
        ((4, 6), 1e-6, "two axes"),
        ((7,), 0.05, "a single vector"),
        ((3, 1, 2, 4), 0.01, "four axes"),
        ((1, 3, 8), 0.02, "a vector of zeros"),
    ):
        x = random(rng, *shape) + 0.7
        if name == "a vector of zeros":
            x[0, 1] = 0
        yield Case((x, random(rng, shape[-1], spread=0.5), eps), name)
    while True:
        x, weight = random(rng, 3, 16).bfloat16() + 0.7, random(rng, 16, spread=0.5).bfloat16()
        if _far_from_rounding(x, weight, 0.2):
            yield Case((x, weight, 0.2), "bfloat16")
            return


def _far_from_rounding(x, weight, eps):
    """Whether the bfloat16 result is the same if the order of the arithmetic changes a last bit of float32."""
    y = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + weight.double())
    return torch.equal((y * (1 + 1e-5)).bfloat16(), (y * (1 - 1e-5)).bfloat16())


def _normed(x, eps, axis=-1):
    return x.float() / (x.float().pow(2).mean(axis, keepdim=True) + eps).sqrt()


def _layer_norm(x, weight, eps):
    centered = x.float() - x.float().mean(-1, keepdim=True)
    return (_normed(centered, eps) * (1 + weight.float())).type_as(x)


def _layer_norm_with_std(x, weight, eps):
    centered = x.float() - x.float().mean(-1, keepdim=True)
    return _with_root(centered, weight, centered.pow(2).mean(-1, keepdim=True).sqrt() + eps).type_as(x)


def _in_dtype_of_x(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (1 + weight)


def _with_root(x, weight, root):
    return (x.float() / root * (1 + weight.float())).type_as(x)


RMS_NORM = Exercise(
    key="06.1",
    reference=gemma.rms_norm,
    cases=norm_cases,
    difficulty=1,
    minutes=10,
    hints=(
        (
            "Translate the slow loop: which of its sums becomes a mean over an axis? Each vector is divided by "
            "its own RMS, so that axis has to stay, with length 1 (`keepdim`). And think about the dtype twice: "
            "where you start, and where you return."
        ),
        (
            "Start with `x.float()`, multiply by `torch.rsqrt(… + eps)` and by one plus the weight, and end "
            "with `type_as(x)`."
        ),
    ),
    mistakes=(
        Mistake(
            "multiplies by w instead of 1 + w",
            lambda x, weight, eps: (_normed(x, eps) * weight.float()).type_as(x),
            "Gemma stores the difference from 1: w = 0 means a factor of 1.",
        ),
        Mistake(
            "subtracts the mean first, as LayerNorm does",
            _layer_norm,
            "RMSNorm does not center: it only divides by the root mean square.",
        ),
        Mistake(
            "adds eps outside the square root",
            lambda x, weight, eps: _with_root(x, weight, x.float().pow(2).mean(-1, keepdim=True).sqrt() + eps),
            "eps belongs inside: √(mean(x²) + eps).",
        ),
        Mistake(
            "leaves out eps",
            lambda x, weight, eps: _with_root(x, weight, x.float().pow(2).mean(-1, keepdim=True).sqrt()),
            "Without eps, a vector of zeros is divided by zero: √(mean(x²) + eps).",
        ),
        Mistake(
            "forgets the square root",
            lambda x, weight, eps: _with_root(x, weight, x.float().pow(2).mean(-1, keepdim=True) + eps),
            "The R in RMS is a root: divide by √(mean(x²) + eps), or multiply by `torch.rsqrt(mean + eps)`.",
        ),
        Mistake(
            "sums the squares instead of averaging them",
            lambda x, weight, eps: _with_root(x, weight, (x.float().pow(2).sum(-1, keepdim=True) + eps).sqrt()),
            "The M in RMS is a mean, `.mean(-1, keepdim=True)`, so the hidden size does not matter.",
        ),
        Mistake(
            "divides by the mean instead of the root mean square",
            lambda x, weight, eps: _with_root(x, weight, x.float().mean(-1, keepdim=True) + eps),
            "Square the values, take their mean, then the root: √(mean(x²) + eps).",
        ),
        Mistake(
            "ignores the weight",
            lambda x, weight, eps: _normed(x, eps).type_as(x),
            "The last step multiplies by 1 + weight.",
        ),
        Mistake(
            "takes one mean over all vectors",
            lambda x, weight, eps: _with_root(x, weight, (x.float().pow(2).mean() + eps).sqrt()),
            "Each vector is normalized on its own, along the last axis: `.mean(-1, keepdim=True)`.",
        ),
        Mistake(
            "always uses an eps of 1e-6",
            lambda x, weight, eps: (_normed(x, 1e-6) * (1 + weight.float())).type_as(x),
            "`eps` is an argument, because models differ in it.",
        ),
        Mistake(
            "subtracts the mean first, as LayerNorm does, and adds eps outside the square root",
            _layer_norm_with_std,
            "RMSNorm does not center: it only divides by √(mean(x²) + eps).",
        ),
        Mistake(
            "loses the axis of the mean",
            lambda x, weight, eps: _with_root(x, weight, (x.float().pow(2).mean(-1) + eps).sqrt()),
            "`.mean(-1, keepdim=True)` keeps an axis of length 1, so that each vector is divided by its own root.",
        ),
        Mistake(
            "takes the mean over the first axis",
            lambda x, weight, eps: (_normed(x, eps, axis=0) * (1 + weight.float())).type_as(x),
            "Each vector is normalized on its own, along the last axis: `.mean(-1, keepdim=True)`.",
        ),
        Mistake(
            "computes in the dtype of x",
            _in_dtype_of_x,
            "In bfloat16, the squares and their mean lose most of their digits: start with `x.float()`.",
        ),
        Mistake(
            "casts back before it multiplies by 1 + w",
            lambda x, weight, eps: _normed(x, eps).type_as(x) * (1 + weight),
            "Llama casts first. Gemma multiplies in float32 and casts last: `(y * (1 + weight.float())).type_as(x)`.",
        ),
        Mistake(
            "rounds 1 + w to the dtype of the weights",
            lambda x, weight, eps: (_normed(x, eps) * (1 + weight)).type_as(x),
            "In bfloat16, 1 + w has only eight significant bits: use `1 + weight.float()`.",
        ),
        Mistake(
            "returns float32 whatever the dtype of x",
            lambda x, weight, eps: _normed(x, eps) * (1 + weight.float()),
            "Compute in float32, but return the dtype of x: `.type_as(x)`.",
        ),
    ),
)


# --- rotary positions -----------------------------------------------------------------------------------------------


def rotary_cases(rng):
    """At least four dimensions, so that halves and neighbors differ; different positions in every row."""
    for B, H, T, d, name in (
        (2, 3, 5, 6, "two rows"),
        (1, 2, 5, 4, "a batch of one"),
        (3, 2, 1, 8, "one token, as in a decode step"),
        (2, 1, 3, 10, "a single head"),
    ):
        positions = torch.from_numpy(rng.integers(1, 30, (B, T)))
        positions[-1, 0] = positions[0, 0] + 3
        yield Case((random(rng, B, H, T, d), *gemma.rotary_table(positions, d, 50.0)), name)
    B, H, T, d = 3, 2, 4, 8
    angles = torch.from_numpy(rng.integers(0, 4, (B, T, d // 2))).repeat(1, 1, 2) * torch.pi / 2
    yield Case(
        (small_integers(rng, B, H, T, d), angles.cos().round().bfloat16(), angles.sin().round().bfloat16()),
        "bfloat16, quarter turns",
    )


def _rotate(x, cos, sin, signs=(-1, 1)):
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((signs[0] * second, signs[1] * first), dim=-1) * sin[:, None]


def _interleaved(x, cos, sin):
    """Rotate the pairs (0, 1), (2, 3), …, each by its angle."""
    cos, sin = (table[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1)[:, None] for table in (cos, sin))
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + rotated * sin


def _half_interleaved(x, cos, sin):
    rotated = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos[:, None] + rotated * sin[:, None]


def _first_half_only(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((_rotate(x, cos, sin).chunk(2, dim=-1)[0], second), dim=-1)


def _first_half_in_place(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    cos, sin = (table.chunk(2, dim=-1)[0][:, None] for table in (cos, sin))
    first = first * cos - second * sin
    return torch.cat((first, second * cos + first * sin), dim=-1)


def _quarters(x, cos, sin):
    swapped = [torch.cat((-half.chunk(2, -1)[1], half.chunk(2, -1)[0]), -1) for half in x.chunk(2, -1)]
    return x * cos[:, None] + torch.cat(swapped, -1) * sin[:, None]


ROTARY = Exercise(
    key="06.2",
    reference=gemma.apply_rotary,
    cases=rotary_cases,
    difficulty=2,
    minutes=12,
    hints=(
        (
            "Number i of the first half and number i of the second are the two coordinates of a point. Each "
            "point turns by its own angle."
        ),
        (
            "`first, second = x.chunk(2, dim=-1)`. With `swapped = torch.cat((-second, first), dim=-1)`, the "
            "result is one line. `cos[:, None]` has shape `[B, 1, T, d]`."
        ),
    ),
    mistakes=(
        Mistake(
            "rotates pairs of neighboring dimensions",
            _interleaved,
            "Gemma's pairs are (i, i + d/2): split x into two halves with `x.chunk(2, dim=-1)`.",
        ),
        Mistake(
            "pairs neighboring dimensions but uses the angles for halves",
            _half_interleaved,
            "The tables are for the pairs (i, i + d/2): swap the two halves of x, not neighbors.",
        ),
        Mistake(
            "rotates in the opposite direction",
            lambda x, cos, sin: _rotate(x, cos, sin, (1, -1)),
            "The first half becomes first·cos − second·sin, the second half second·cos + first·sin.",
        ),
        Mistake(
            "forgets the minus sign",
            lambda x, cos, sin: _rotate(x, cos, sin, (1, 1)),
            "A rotation has one minus sign: first·cos − second·sin. Without it, lengths change.",
        ),
        Mistake(
            "puts a minus sign on both halves",
            lambda x, cos, sin: _rotate(x, cos, sin, (-1, -1)),
            "Only the first half has a minus sign; the second half becomes second·cos + first·sin.",
        ),
        Mistake(
            "swaps sine and cosine",
            lambda x, cos, sin: _rotate(x, sin, cos),
            "At position 0 the angle is 0 and x must stay unchanged. Since cos 0 = 1, x is multiplied by the cosine.",
        ),
        Mistake(
            "does not swap the halves for the sine term",
            lambda x, cos, sin: (
                x * cos[:, None] + torch.cat((-x.chunk(2, -1)[0], x.chunk(2, -1)[1]), -1) * sin[:, None]
            ),
            "Each value is mixed with its partner in the other half: `torch.cat((-second, first), dim=-1)`.",
        ),
        Mistake(
            "rotates only the first half",
            _first_half_only,
            "Both values of a pair change: the second half becomes second·cos + first·sin.",
        ),
        Mistake(
            "uses the rotated first half to compute the second",
            _first_half_in_place,
            "Compute both halves from the old ones: the second half becomes second·cos + first·sin with the old first.",
        ),
        Mistake(
            "joins the halves in the wrong order",
            lambda x, cos, sin: torch.cat(_rotate(x, cos, sin).chunk(2, -1)[::-1], -1),
            "The first half of the result is first·cos − second·sin.",
        ),
        Mistake(
            "rotates the halves as if each were a pair of quarters",
            _quarters,
            "Split the head once: value i belongs to value i + d/2, so swap whole halves.",
        ),
        Mistake(
            "returns only the sine term",
            lambda x, cos, sin: _rotate(x, 0 * cos, sin),
            "A rotation adds two terms: x·cos + swapped·sin.",
        ),
        Mistake(
            "returns only the cosine term",
            lambda x, cos, sin: _rotate(x, cos, 0 * sin),
            "A rotation adds two terms: x·cos + swapped·sin.",
        ),
        Mistake(
            "uses the first row's positions for all rows",
            lambda x, cos, sin: _rotate(x, cos[:1], sin[:1]),
            "The tables are [B, T, d]: `cos[:, None]` adds the head axis and keeps the batch axis.",
        ),
    ),
)


# --- attention ------------------------------------------------------------------------------------------------------


def attention_cases(rng):
    """All sizes differ, except that K = H in one case and B or T = 1 in some; each with or without mask and cap."""
    for B, H, K, T, S, d, mask_rows, cap, name in (
        (3, 8, 2, 4, 5, 7, 3, None, "a mask for each row"),
        (1, 6, 2, 4, 5, 3, 0, None, "a batch of one, no mask"),
        (2, 9, 3, 4, 5, 7, 1, 1.5, "one mask for all rows, a cap"),
        (3, 4, 2, 5, 6, 7, 0, 2.5, "a cap, no mask"),
        (2, 4, 4, 3, 6, 5, 2, None, "as many key heads as query heads"),
        (3, 4, 1, 2, 7, 6, 3, 2.0, "a single key head, a cap"),
        (2, 6, 3, 1, 8, 4, 2, None, "one query, many keys"),
        (3, 6, 2, 1, 7, 5, 0, None, "one query, no mask"),
    ):
        mask = None
        if mask_rows:
            mask = torch.from_numpy(rng.random((mask_rows, T, S)) < 0.5)
            mask[..., -1] = ~mask[..., 0]  # no row is all True or all False
        q, k, v = random(rng, B, H, T, d, spread=2), random(rng, B, K, S, d), random(rng, B, K, S, d)
        scale = float(rng.uniform(0.6, 0.9))
        if cap is None:  # leaves out the cap, or passes None
            yield Case((q, k, v, mask, scale), name, {} if mask_rows else {"cap": None})
        else:
            yield Case((q, k, v, mask, scale, cap), name)
    yield _bfloat16_attention(rng)


def _bfloat16_attention(rng):
    """Each query has the same score for 1, 2 or 4 of the allowed keys and a far smaller one for all others.

    So the weights are exact in bfloat16, and correct answers agree however they round in between.
    """
    B, H, K, T, S, d = 2, 6, 3, 5, 7, 4
    codes = torch.tensor([0, 1, 1, 2, 2, 2, 2])[torch.from_numpy(rng.permutation(S))]
    k = 12 * F.one_hot(codes, d).bfloat16().repeat(B, K, 1, 1)
    q = 12 * F.one_hot(torch.from_numpy(rng.integers(0, 3, (B, H, T))), d).bfloat16()
    mask = torch.ones(B, T, S, dtype=torch.bool)
    mask[0, :, int((codes == 1).nonzero()[0])] = False
    return Case((q, k, small_integers(rng, B, K, S, d), mask, 0.5), "bfloat16")


def _unchanged(x):
    return x


def _hide(scores, mask, hidden=-torch.inf):
    return scores if mask is None else scores.masked_fill(~mask[:, None], hidden)


def _cap(scores, cap):
    return scores if cap is None else cap * torch.tanh(scores / cap)


def _attend(q, k, v, scores_of, heads=torch.repeat_interleave, axis=-1, after=_unchanged):
    """Attention with key heads repeated by ``heads`` and q·k turned into scores by ``scores_of``."""
    times = q.shape[1] // k.shape[1]
    k, v = (heads(x, times, 1) for x in (k, v))
    return after(scores_of(q @ k.transpose(2, 3)).softmax(axis)) @ v


def _in_turn(x, times, axis):
    return x.repeat(1, times, 1, 1)


def _first_head(x, times, axis):
    return x[:, :1].expand(-1, x.shape[1] * times, -1, -1)


ATTENTION = Exercise(
    key="06.3",
    reference=gemma.grouped_query_attention,
    cases=attention_cases,
    difficulty=3,
    minutes=20,
    points=3,
    hints=(
        (
            "Give each query head its own key head, and the rest is ordinary attention. What the mask blocks "
            "must be −∞ when the softmax starts, so cap before you mask."
        ),
        (
            "`k.repeat_interleave(H // K, dim=1)` repeats each key head for its group: 0 0 1 1. `q @ "
            "k.transpose(2, 3)` has shape `[B, H, T, S]`, and `mask[:, None]` broadcasts to it. "
            "`masked_fill(~mask, -torch.inf)` masks scores."
        ),
    ),
    mistakes=(
        Mistake(
            "repeats the key heads in turn instead of in groups",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale, cap), mask), heads=_in_turn
            ),
            "Neighboring query heads share a key head, 0 0 1 1, not 0 1 0 1: `repeat_interleave`, not `repeat`.",
        ),
        Mistake(
            "forgets the scale",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _hide(_cap(s, cap), mask)),
            "Multiply q·k by `scale` before anything else.",
        ),
        Mistake(
            "scales by 1/√d on top of `scale`",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale * q.shape[-1] ** -0.5, cap), mask)
            ),
            "`scale` is the whole factor: 1/√d, if the model wants it, is already in it.",
        ),
        Mistake(
            "uses the root of the scale",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _hide(_cap(s * scale**0.5, cap), mask)),
            "`scale` is a factor, such as 1/√d: multiply by it once.",
        ),
        Mistake(
            "applies the scale to q and to k",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _hide(_cap(s * scale**2, cap), mask)),
            "`scale` is a factor of q·k: multiply by it once.",
        ),
        Mistake(
            "divides by the scale",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _hide(_cap(s / scale, cap), mask)),
            "`scale` is a factor, such as 1/√d: multiply by it.",
        ),
        Mistake(
            "scales by 1/√d and ignores `scale`",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * q.shape[-1] ** -0.5, cap), mask)
            ),
            "The scale is an argument because it is not always 1/√d: PaliGemma 2 28B uses 144^-½ with d = 128.",
        ),
        Mistake(
            "takes the softmax over the queries",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale, cap), mask), axis=-2
            ),
            "The weights of a query sum to 1 over the keys, the last axis: `softmax(-1)`.",
        ),
        Mistake(
            "ignores the mask",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _cap(s * scale, cap)),
            "Where the mask is False, set the score to −∞ before the softmax.",
        ),
        Mistake(
            "blocks the keys that the mask allows",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale, cap), None if mask is None else ~mask)
            ),
            "True means visible: fill where the mask is False, `masked_fill(~mask, …)`.",
        ),
        Mistake(
            "sets masked scores to 0",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _hide(_cap(s * scale, cap), mask, 0.0)),
            "A masked score of 0 (or 1e-9) still contributes e⁰ = 1 to the softmax: fill with `-torch.inf`.",
        ),
        Mistake(
            "adds the mask to the scores",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _cap(s * scale, cap) + (0 if mask is None else mask[:, None].to(s.dtype))
            ),
            "A boolean adds only 0 or 1: where the mask is False, set the score to −∞.",
        ),
        Mistake(
            "masks after the softmax",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _cap(s * scale, cap), after=lambda p: _hide(p, mask, 0.0)
            ),
            "The weights of a query must sum to 1: mask the scores before the softmax, not the weights after it.",
        ),
        Mistake(
            "caps after masking",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _cap(_hide(s * scale, mask, -torch.inf), cap)
            ),
            "The cap turns −∞ into −cap, so masked keys get weight again: cap first, then mask.",
        ),
        Mistake(
            "ignores the cap",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _hide(s * scale, mask)),
            "If `cap` is not None, the scores become `cap * torch.tanh(scores / cap)`.",
        ),
        Mistake(
            "does not multiply by the cap after tanh",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(s * scale if cap is None else torch.tanh(s * scale / cap), mask)
            ),
            "tanh never exceeds 1. Multiply it by `cap`: `cap * torch.tanh(scores / cap)`.",
        ),
        Mistake(
            "does not divide by the cap before tanh",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(s * scale if cap is None else cap * torch.tanh(s * scale), mask)
            ),
            "Small scores should hardly change: `cap * torch.tanh(scores / cap)`.",
        ),
        Mistake(
            "expects a mask even if it is None",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _cap(s * scale, cap).masked_fill(~mask[:, None], -torch.inf)
            ),
            "If mask is None, every query attends to every key: skip the line that applies it.",
        ),
        Mistake(
            "is causal, whatever the mask",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale, cap), torch.ones_like(s[0, :1], dtype=torch.bool).tril())
            ),
            "The mask is an argument: set the score to −∞ where it is False.",
        ),
        Mistake(
            "uses the first row's mask for all rows",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale, cap), None if mask is None else mask[:1])
            ),
            "Each row of the batch has its own mask: `mask[:, None]` keeps the batch axis.",
        ),
        Mistake(
            "does not repeat the key heads",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale, cap), mask), heads=lambda x, times, axis: x
            ),
            "K key heads serve H query heads: repeat each of them H/K times, `repeat_interleave(H // K, dim=1)`.",
        ),
        Mistake(
            "uses the first key head for all query heads",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(_cap(s * scale, cap), mask), heads=_first_head
            ),
            "Query heads share keys in groups of H/K: `repeat_interleave(H // K, dim=1)`.",
        ),
        Mistake(
            "caps before it scales",
            lambda q, k, v, mask, scale, cap=None: _attend(q, k, v, lambda s: _hide(_cap(s, cap) * scale, mask)),
            "The order is scale, cap, mask, softmax.",
        ),
        Mistake(
            "clamps the scores instead of using tanh",
            lambda q, k, v, mask, scale, cap=None: _attend(
                q, k, v, lambda s: _hide(s * scale if cap is None else (s * scale).clamp(-cap, cap), mask)
            ),
            "The cap is soft: `cap * torch.tanh(scores / cap)`.",
        ),
    ),
)


# --- the gated MLP --------------------------------------------------------------------------------------------------


def gate_cases(rng):
    """Any number of axes; in bfloat16, gates whose GELU is exact."""
    for shape, name in (
        ((2, 3, 5), "three axes"),
        ((4, 6), "two axes"),
        ((9,), "a single vector"),
        ((3, 1, 2, 8), "four axes"),
    ):
        yield Case((random(rng, *shape, spread=1.5), random(rng, *shape, spread=1.5)), name)
    gate = 16 * torch.from_numpy(rng.integers(-1, 2, (2, 3, 7))).bfloat16()
    yield Case((gate, small_integers(rng, 2, 3, 7)), "bfloat16")


def _gelu(x):
    return F.gelu(x, approximate="tanh")


GEGLU = Exercise(
    key="06.4",
    reference=gemma.geglu,
    cases=gate_cases,
    difficulty=1,
    minutes=6,
    hints=(
        (
            "torch has a GELU. Which version does it compute by default, and which one was Gemma trained with? "
            "Of the two arguments, only one passes through it."
        ),
        '`torch.nn.functional.gelu` has an argument `approximate`. Gemma\'s version is `"tanh"`.',
    ),
    mistakes=(
        Mistake(
            "applies GELU to `up` instead of `gate`",
            lambda gate, up: gate * _gelu(up),
            "GELU is applied to `gate`, and `up` stays linear.",
        ),
        Mistake(
            "uses the exact GELU",
            lambda gate, up: F.gelu(gate) * up,
            'Gemma was trained with the tanh approximation: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "applies the exact GELU to `up` instead of `gate`",
            lambda gate, up: gate * F.gelu(up),
            'Apply GELU to `gate`, with the tanh approximation: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "uses the sigmoid approximation of GELU",
            lambda gate, up: gate * torch.sigmoid(1.702 * gate) * up,
            'Gemma was trained with the tanh approximation: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "uses tanh itself as the gate",
            lambda gate, up: torch.tanh(gate) * up,
            'The gate uses GELU, which tanh only approximates: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "is a bilinear gate, without GELU",
            lambda gate, up: gate * up,
            'Apply GELU to `gate` before you multiply: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "forgets `up`",
            lambda gate, up: _gelu(gate),
            "Multiply by `up`: GELU(gate) · up.",
        ),
        Mistake(
            "adds instead of multiplying",
            lambda gate, up: _gelu(gate) + up,
            "A gate multiplies: near 0 it shuts, whatever `up` is.",
        ),
        Mistake(
            "is SwiGLU, Llama's gate",
            lambda gate, up: F.silu(gate) * up,
            'SiLU is x·sigmoid(x). Gemma uses GELU: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "is a plain GLU with a sigmoid gate",
            lambda gate, up: torch.sigmoid(gate) * up,
            'The gate uses GELU, not a sigmoid: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "uses ReLU in the gate",
            lambda gate, up: F.relu(gate) * up,
            'The gate uses GELU, which is not zero just below 0: `F.gelu(gate, approximate="tanh")`.',
        ),
        Mistake(
            "applies GELU to both",
            lambda gate, up: _gelu(gate) * _gelu(up),
            "Apply GELU only to `gate`; `up` stays linear.",
        ),
        Mistake(
            "applies GELU to the product",
            lambda gate, up: _gelu(gate * up),
            "Apply GELU to `gate` only, then multiply.",
        ),
        Mistake(
            "leaves out the gate",
            lambda gate, up: _gelu(up),
            "Two projections come in: GELU(gate) · up.",
        ),
    ),
)


# --- the whole layer ------------------------------------------------------------------------------------------------


class LayerWeights(NamedTuple):
    """The weights of one Gemma 1 layer.

    D hidden size · H heads · K key/value heads · d head dimension · I intermediate size.
    Matrices are [out, in], as in ``nn.Linear``: ``x @ weights.q.T``.
    """

    attention_norm: Tensor  # [D]
    q: Tensor  # [H·d, D]
    k: Tensor  # [K·d, D]
    v: Tensor  # [K·d, D]
    o: Tensor  # [D, H·d]
    mlp_norm: Tensor  # [D]
    gate: Tensor  # [I, D]
    up: Tensor  # [I, D]
    down: Tensor  # [D, I]


def decoder_layer(x, weights, cos, sin, mask, head_dim):
    """Gemma 1's layer: x + attention(norm(x)), then x + mlp(norm(x)).

    x [B, T, D], ``LayerWeights``, cos and sin [B, T, d], mask [B, T, T] or None, head dimension d → [B, T, D].
    """
    B, T, _ = x.shape
    y = gemma.rms_norm(x, weights.attention_norm, 1e-6)
    q, k, v = ((y @ w.T).view(B, T, -1, head_dim).transpose(1, 2) for w in (weights.q, weights.k, weights.v))
    q, k = gemma.apply_rotary(q, cos, sin), gemma.apply_rotary(k, cos, sin)
    heads = gemma.grouped_query_attention(q, k, v, mask, head_dim**-0.5)
    x = x + heads.transpose(1, 2).reshape(B, T, -1) @ weights.o.T
    y = gemma.rms_norm(x, weights.mlp_norm, 1e-6)
    return x + gemma.geglu(y @ weights.gate.T, y @ weights.up.T) @ weights.down.T


def layer_cases(rng):
    """All sizes differ; causal masks, one of them with padding, and two cases without a mask."""
    for B, T, D, H, K, d, inner, kind, name in (
        (3, 5, 8, 4, 2, 6, 11, "causal", "a causal mask"),
        (1, 5, 7, 6, 3, 4, 9, None, "a batch of one, no mask"),
        (2, 5, 11, 3, 1, 6, 7, "padded", "padded on the left"),
        (3, 1, 9, 4, 2, 8, 10, None, "a single token"),
    ):
        shapes = ((H * d, D), (K * d, D), (K * d, D), (D, H * d), (inner, D), (inner, D), (D, inner))
        q, k, v, o, gate, up, down = (random(rng, *shape, spread=1.5 * shape[1] ** -0.5) for shape in shapes)
        norms = [random(rng, D, spread=0.3) for _ in range(2)]
        weights = LayerWeights(norms[0], q, k, v, o, norms[1], gate, up, down)
        cos, sin = gemma.rotary_table(torch.from_numpy(rng.integers(1, 9, (B, T))), d, 50.0)
        mask = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T).clone() if kind else None
        if kind == "padded":
            mask[1, :, :2] = torch.eye(T, dtype=torch.bool)[:, :2]
        yield Case((random(rng, B, T, D), weights, cos, sin, mask, d), name)


def _attention(y, w, cos, sin, mask, d, rotated="qk", scale=None, split=None, join=None, masked=True):
    """Attention with a choice of what is rotated, of scale and mask, and of how heads are split and joined."""
    B, T, _ = y.shape
    split = split or _split
    heads = {name: split(y @ matrix.T, d) for name, matrix in (("q", w.q), ("k", w.k), ("v", w.v))}
    heads |= {name: gemma.apply_rotary(heads[name], cos, sin) for name in rotated}
    mask = mask if masked else None
    out = gemma.grouped_query_attention(heads["q"], heads["k"], heads["v"], mask, scale or d**-0.5)
    return (join or _join)(out).reshape(B, T, -1) @ w.o.T


def _split(y, d):
    return y.view(*y.shape[:2], -1, d).transpose(1, 2)


def _join(heads):
    return heads.transpose(1, 2)


def _split_without_transpose(y, d):
    return y.reshape(y.shape[0], -1, y.shape[1], d)


def _split_interleaved(y, d):
    return y.view(*y.shape[:2], d, -1).permute(0, 3, 1, 2)


def _mlp(y, w):
    return gemma.geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T


def _exchanged(*names):
    """The layer with two of its weights exchanged."""

    def layer(x, w, cos, sin, mask, d):
        first, second = names
        return decoder_layer(x, w._replace(**{first: getattr(w, second), second: getattr(w, first)}), cos, sin, mask, d)

    return layer


def _norms(w):
    return tuple(lambda x, weight=weight: gemma.rms_norm(x, weight, 1e-6) for weight in (w.attention_norm, w.mlp_norm))


def _with_attention(**how):
    """The layer with one thing wrong in its attention."""

    def layer(x, w, cos, sin, mask, d):
        first, second = _norms(w)
        x = x + _attention(first(x), w, cos, sin, mask, d, **how)
        return x + _mlp(second(x), w)

    return layer


def _joined(join):
    """The layer with attention and MLP combined by ``join(x, attention, mlp, first norm, second norm)``."""

    def layer(x, w, cos, sin, mask, d):
        return join(x, lambda y: _attention(y, w, cos, sin, mask, d), lambda y: _mlp(y, w), *_norms(w))

    return layer


def _post_norm(x, attend, mlp, first, second):
    x = first(x + attend(x))
    return second(x + mlp(x))


def _residual_of_norm(x, attend, mlp, first, second):
    y = first(x)
    y = second(y + attend(y))
    return y + mlp(y)


def _parallel(x, attend, mlp, first, second):
    return x + attend(first(x)) + mlp(second(x))


def _no_second_residual(x, attend, mlp, first, second):
    x = x + attend(first(x))
    return mlp(second(x))


def _no_first_residual(x, attend, mlp, first, second):
    x = attend(first(x))
    return x + mlp(second(x))


def _one_norm(x, attend, mlp, first, second):
    x = x + attend(first(x))
    return x + mlp(first(x))


def _no_second_norm(x, attend, mlp, first, second):
    x = x + attend(first(x))
    return x + mlp(x)


def _no_first_norm(x, attend, mlp, first, second):
    x = x + attend(x)
    return x + mlp(second(x))


def _no_norms(x, attend, mlp, first, second):
    x = x + attend(x)
    return x + mlp(x)


def _no_residuals(x, attend, mlp, first, second):
    return mlp(second(attend(first(x))))


def _one_normed_input(x, attend, mlp, first, second):
    return x + attend(first(x)) + mlp(first(x))


def _second_norm_twice(x, attend, mlp, first, second):
    x = x + attend(second(x))
    return x + mlp(second(x))


def _first_x_again(x, attend, mlp, first, second):
    return x + mlp(second(x + attend(first(x))))


def _second_norm_of_attention(x, attend, mlp, first, second):
    attended = attend(first(x))
    return x + attended + mlp(second(attended))


def _mlp_first(x, attend, mlp, first, second):
    x = x + mlp(second(x))
    return x + attend(first(x))


def _no_mlp(x, attend, mlp, first, second):
    return x + attend(first(x))


def _hidden_size_scale(x, w, cos, sin, mask, d):
    return _with_attention(scale=x.shape[-1] ** -0.5)(x, w, cos, sin, mask, d)


LAYER = Exercise(
    key="06.5",
    reference=decoder_layer,
    cases=layer_cases,
    difficulty=3,
    minutes=20,
    points=4,
    hints=(
        (
            "Both halves, attention and MLP, have the same form: normalize, compute, and add the result to the "
            "`x` from before the norm."
        ),
        (
            "`y @ weights.q.T` is `[B, T, H·d]`. `.view(B, T, -1, head_dim).transpose(1, 2)` turns it into `[B, "
            "H, T, d]`, and `.transpose(1, 2).reshape(B, T, -1)` turns that back. Queries and keys are rotated; "
            "values are not."
        ),
    ),
    mistakes=(
        Mistake(
            "forgets the residual connection around attention",
            _joined(_no_first_residual),
            "Attention's output is added to x: `x = x + …`.",
        ),
        Mistake(
            "forgets the residual connection around the MLP",
            _joined(_no_second_residual),
            "The MLP's output is added to x: `return x + …`.",
        ),
        Mistake(
            "is post-norm: it normalizes after attention and MLP instead of before",
            _joined(_post_norm),
            "Gemma is pre-norm: normalize what goes into attention and the MLP, never x itself.",
        ),
        Mistake(
            "adds to the normalized x instead of x itself",
            _joined(_residual_of_norm),
            "Keep x and give the normalized one another name: `y = rms_norm(x, …)`, then `x = x + attention of y`.",
        ),
        Mistake(
            "feeds attention and the MLP with the same x",
            _joined(_parallel),
            "The MLP comes second: its input already includes attention's output.",
        ),
        Mistake(
            "forgets both residual connections",
            _joined(_no_residuals),
            "What attention and the MLP return is added to x, each time: `x = x + …`.",
        ),
        Mistake(
            "adds the MLP's output to the layer's input, so attention's output is lost",
            _joined(_first_x_again),
            "The second residual connection starts from the new x: `x = x + …` after attention, then add to that x.",
        ),
        Mistake(
            "feeds the MLP with attention's output instead of the sum",
            _joined(_second_norm_of_attention),
            "Add attention's output to x first, then normalize that x for the MLP.",
        ),
        Mistake(
            "runs the MLP before attention",
            _joined(_mlp_first),
            "Attention comes first, the MLP second.",
        ),
        Mistake(
            "leaves out the MLP",
            _joined(_no_mlp),
            "A layer adds to x twice: attention's output, then the MLP's.",
        ),
        Mistake(
            "exchanges the two norms",
            _exchanged("attention_norm", "mlp_norm"),
            "`weights.attention_norm` is for attention's input, `weights.mlp_norm` for the MLP's.",
        ),
        Mistake(
            "exchanges gate and up",
            _exchanged("gate", "up"),
            "GELU is applied to the projection with `weights.gate`, which comes first: `geglu(gate, up)`.",
        ),
        Mistake(
            "exchanges keys and values",
            _exchanged("k", "v"),
            "Queries are compared with the keys, and the values are averaged: q, k, v, in this order.",
        ),
        Mistake(
            "does not pass on the mask",
            _with_attention(masked=False),
            "Attention needs the mask: a token must not attend to later tokens or to padding.",
        ),
        Mistake(
            "forgets the first norm",
            _joined(_no_first_norm),
            "Attention's input is `rms_norm(x, weights.attention_norm, 1e-6)`.",
        ),
        Mistake(
            "forgets both norms",
            _joined(_no_norms),
            "Normalize what goes into attention, and what goes into the MLP.",
        ),
        Mistake(
            "feeds the MLP with the normalized input of attention",
            _joined(_one_normed_input),
            "Normalize again before the MLP: its input is `rms_norm(x, weights.mlp_norm, 1e-6)`, with the new x.",
        ),
        Mistake(
            "uses the second norm twice",
            _joined(_second_norm_twice),
            "Attention has its own norm, `weights.attention_norm`.",
        ),
        Mistake(
            "uses the first norm twice",
            _joined(_one_norm),
            "The MLP has its own norm, `weights.mlp_norm`.",
        ),
        Mistake(
            "forgets the second norm",
            _joined(_no_second_norm),
            "The MLP's input is `rms_norm(x, weights.mlp_norm, 1e-6)`.",
        ),
        Mistake(
            "rotates the values too",
            _with_attention(rotated="qkv"),
            "Positions affect which token attends to which, not the values: rotate only q and k.",
        ),
        Mistake(
            "rotates only the queries",
            _with_attention(rotated="q"),
            "Scores should depend only on the difference of two positions: rotate both q and k.",
        ),
        Mistake(
            "forgets the rotation",
            _with_attention(rotated=""),
            "Without `apply_rotary` on q and k, attention knows nothing about positions.",
        ),
        Mistake(
            "scales by the hidden size instead of the head dimension",
            _hidden_size_scale,
            "The scale is `head_dim ** -0.5`.",
        ),
        Mistake(
            "forgets the scale",
            _with_attention(scale=1.0),
            "The scale is `head_dim ** -0.5`.",
        ),
        Mistake(
            "passes head_dim as the scale",
            lambda x, w, cos, sin, mask, d: _with_attention(scale=d)(x, w, cos, sin, mask, d),
            "The scale is `head_dim ** -0.5`: the more dimensions, the smaller.",
        ),
        Mistake(
            "mixes up heads and tokens when it splits the heads: a view without a transpose",
            _with_attention(split=_split_without_transpose),
            "View as [B, T, heads, d] first, then move the head axis: `.view(B, T, -1, head_dim).transpose(1, 2)`.",
        ),
        Mistake(
            "mixes up heads and head dimension when it splits the heads",
            _with_attention(split=_split_interleaved),
            "The d values of a head are next to each other: the last axis splits into [heads, d], not [d, heads].",
        ),
        Mistake(
            "mixes up heads and tokens when it joins the heads",
            _with_attention(join=lambda heads: heads),
            "Move the head axis next to d before you join them: `.transpose(1, 2).reshape(B, T, -1)`.",
        ),
        Mistake(
            "mixes up heads and head dimension when it joins the heads",
            _with_attention(join=lambda heads: heads.permute(0, 2, 3, 1)),
            "Each head's d values stay together: `.transpose(1, 2).reshape(B, T, -1)`.",
        ),
        Mistake(
            "does not split the heads",
            _with_attention(split=lambda y, d: y[:, None]),
            "A head has head_dim values: `.view(B, T, -1, head_dim).transpose(1, 2)` gives every head its own axis.",
        ),
    ),
)

EXERCISES = [RMS_NORM, ROTARY, ATTENTION, GEGLU, LAYER]
