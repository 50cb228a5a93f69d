"""Chapter 03: how a picture becomes a sequence."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minivlm import siglip
from minivlm.course.exercises.exercise import Exercise, Mistake


def random(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- patches --------------------------------------------------------------------------------------------------------

PICTURES = ((2, 3, 4, 6, 2), (1, 3, 6, 4, 2), (2, 3, 6, 9, 3), (3, 1, 8, 4, 4), (1, 2, 8, 8, 2))  # B, C, H, W, patch


def patch_cases(rng):
    """Pictures that are not square, with patches of two pixels or more."""
    for *shape, patch_size in PICTURES:
        yield random(rng, *shape), patch_size


def _patches(pixels, size, order):
    """The axes B, row of patches, row, column of patches, column in another order, then flattened to [B, P, …]."""
    B, C, H, W = pixels.shape
    six = pixels.reshape(B, C, H // size, size, W // size, size)
    return six.permute(order).flatten(3).flatten(1, 2)


PATCHIFY = Exercise(
    key="03.1",
    reference=siglip.patchify,
    cases=patch_cases,
    difficulty=2,
    minutes=12,
    mistakes=(
        Mistake(
            "numbers the patches column by column",
            lambda pixels, size: _patches(pixels, size, (0, 4, 2, 1, 3, 5)),
            "Patches are read as a page is: along the first row, then the next one.",
        ),
        Mistake(
            "puts the colors last inside of each patch",
            lambda pixels, size: _patches(pixels, size, (0, 2, 4, 3, 5, 1)),
            "A patch is laid out as the weights of the convolution are: all of red, then green, then blue.",
        ),
        Mistake(
            "lays each patch on its side",
            lambda pixels, size: _patches(pixels, size, (0, 2, 4, 1, 5, 3)),
            "Inside a patch the row comes before the column.",
        ),
        Mistake(
            "cuts the memory into equal pieces instead of the picture into squares",
            lambda pixels, size: pixels.reshape(len(pixels), -1, pixels.shape[1] * size * size),
            "A patch's pixels are not neighbors in memory: split them into six axes, `permute`, flatten.",
        ),
        Mistake(
            "gives every patch a column instead of a row",
            lambda pixels, size: F.unfold(pixels, size, stride=size),
            "The result is [B, P, C·h·w]: `F.unfold` has the last two axes the other way round.",
        ),
        Mistake(
            "moves on by half a patch, so that patches overlap",
            lambda pixels, size: F.unfold(pixels, size, stride=max(1, size // 2)).transpose(1, 2),
            "The stride is the patch size: every pixel belongs to exactly one patch.",
        ),
    ),
)


def embedding_cases(rng):
    for width, (B, C, H, W, size) in zip((5, 3, 4, 2, 7), PICTURES, strict=True):
        yield random(rng, B, C, H, W), random(rng, width, C, size, size), random(rng, width)


def _convolve(pixels, weight, bias, stride=None):
    """[B, D, rows, columns]."""
    return F.conv2d(pixels, weight, bias, stride=stride or weight.shape[-1])


EMBED = Exercise(
    key="03.2",
    reference=siglip.embed_patches,
    cases=embedding_cases,
    difficulty=1,
    minutes=8,
    mistakes=(
        Mistake(
            "forgets the bias",
            lambda pixels, weight, bias: _convolve(pixels, weight, None).flatten(2).transpose(1, 2),
            "SigLIP's patch embedding has a bias of D numbers: add it to every patch.",
        ),
        Mistake(
            "flattens the weights in another order than the patches",
            lambda pixels, weight, bias: F.linear(
                siglip.patchify(pixels, weight.shape[-1]), weight.permute(0, 2, 3, 1).flatten(1), bias
            ),
            "Both go color, row, column: `weight.flatten(1)`, without moving an axis.",
        ),
        Mistake(
            "fills the weights into a matrix [C·h·w, D] without turning them",
            lambda pixels, weight, bias: (
                siglip.patchify(pixels, weight.shape[-1]) @ weight.reshape(-1, len(weight)) + bias
            ),
            "A reshape does not transpose: `weight.flatten(1).T`.",
        ),
        Mistake(
            "puts the filters on every pixel instead of every patch",
            lambda pixels, weight, bias: _convolve(pixels, weight, bias, 1).flatten(2).transpose(1, 2),
            "The stride is the size of the kernel.",
        ),
        Mistake(
            "reshapes [B, D, P] to [B, P, D] instead of swapping the axes",
            lambda pixels, weight, bias: (
                _convolve(pixels, weight, bias).flatten(2).reshape(len(pixels), -1, len(weight))
            ),
            "`reshape` keeps the order of the numbers and mixes channels with patches: use `transpose(1, 2)`.",
        ),
        Mistake(
            "leaves the patches on the last axis",
            lambda pixels, weight, bias: _convolve(pixels, weight, bias).flatten(2),
            "The sequence comes first, the width last: [B, P, D].",
        ),
        Mistake(
            "numbers the patches column by column",
            lambda pixels, weight, bias: _convolve(pixels, weight, bias).transpose(2, 3).flatten(2).transpose(1, 2),
            "Flatten [rows, columns] as they are: the first row of patches comes first.",
        ),
        Mistake(
            "turns the filters by half a turn, as a convolution in mathematics does",
            lambda pixels, weight, bias: _convolve(pixels, weight.flip(2, 3), bias).flatten(2).transpose(1, 2),
            "What deep learning calls convolution does not flip the kernel: pixel (0, 0) meets weight (0, 0).",
        ),
    ),
)

# --- norms ----------------------------------------------------------------------------------------------------------


def norm_cases(rng):
    """Vectors away from zero, and an eps that can be seen."""
    for shape, eps in (((2, 3, 4), 0.1), ((3, 2, 5), 1e-6), ((2, 4, 3), 0.03), ((1, 3, 6), 1.0), ((4, 3), 0.01)):
        x = random(rng, *shape) * float(rng.uniform(0.5, 3)) + random(rng, *shape[:-1], 1)
        yield x, random(rng, shape[-1]), random(rng, shape[-1]), eps


def _standardised(x, eps, dim=-1, unbiased=False):
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, unbiased=unbiased) + eps).sqrt()


LAYER_NORM = Exercise(
    key="03.3",
    reference=siglip.layer_norm,
    cases=norm_cases,
    difficulty=1,
    minutes=8,
    mistakes=(
        Mistake(
            "normalizes over the batch: that is batch norm",
            lambda x, weight, bias, eps: _standardised(x, eps, 0) * weight + bias,
            "Each vector stands for itself: mean and variance over the last axis, `dim=-1`.",
        ),
        Mistake(
            "normalizes over the patches",
            lambda x, weight, bias, eps: _standardised(x, eps, -2) * weight + bias,
            "Mean and variance are those of the D numbers of one vector, the last axis.",
        ),
        Mistake(
            "divides the variance by D − 1",
            lambda x, weight, bias, eps: _standardised(x, eps, unbiased=True) * weight + bias,
            "The mean of the squares, not an estimate from a sample: `var(-1, keepdim=True, unbiased=False)`.",
        ),
        Mistake(
            "divides by the variance and not by its root",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps) * weight + bias
            ),
            "The standard deviation is the square root of the variance.",
        ),
        Mistake(
            "adds eps after the root",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False).sqrt() + eps) * weight + bias
            ),
            "eps goes under the root, beside the variance.",
        ),
        Mistake(
            "does not subtract the mean: that is RMS norm",
            lambda x, weight, bias, eps: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias,
            "SigLIP centers each vector first; Gemma does not, as chapter 06 shows.",
        ),
        Mistake(
            "forgets the scale and the shift",
            lambda x, weight, bias, eps: _standardised(x, eps),
            "The normalized vector is multiplied by `weight`, then `bias` is added.",
        ),
        Mistake(
            "adds the shift before it scales",
            lambda x, weight, bias, eps: (_standardised(x, eps) + bias) * weight,
            "First times `weight`, then plus `bias`.",
        ),
    ),
)

# --- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Stands for a norm, an attention or an MLP: any function would do, so these are as plain as can be."""

    scale: float
    shift: float

    def __call__(self, x):
        return torch.tanh(self.scale * x + self.shift)


def block_cases(rng):
    for shape in ((2, 3, 4), (1, 4, 5), (3, 2, 3), (2, 5, 2)):
        layers = (Layer(*map(float, rng.uniform(0.3, 1.5, 2).round(3))) for _ in range(4))
        yield random(rng, *shape), *layers


def _post_norm(x, norm1, attention, norm2, mlp):
    x = norm1(x + attention(x))
    return norm2(x + mlp(x))


def _from_normalized(x, norm1, attention, norm2, mlp):
    x = norm1(x)
    x = norm2(x + attention(x))
    return x + mlp(x)


def _first_residual_only(x, norm1, attention, norm2, mlp):
    x = x + attention(norm1(x))
    return mlp(norm2(x))


def _norm_after_block(x, norm1, attention, norm2, mlp):
    x = x + norm1(attention(x))
    return x + norm2(mlp(x))


def _from_input(x, norm1, attention, norm2, mlp):
    return x + mlp(norm2(x + attention(norm1(x))))


def _mlp_first(x, norm1, attention, norm2, mlp):
    x = x + mlp(norm2(x))
    return x + attention(norm1(x))


BLOCK = Exercise(
    key="03.4",
    reference=siglip.pre_norm_block,
    cases=block_cases,
    difficulty=2,
    minutes=7,
    mistakes=(
        Mistake(
            "is post-norm",
            _post_norm,
            "The norm stands on the way into the block, `x + attention(norm1(x))`, and none on the stream itself.",
        ),
        Mistake(
            "forgets the residual connections",
            lambda x, norm1, attention, norm2, mlp: mlp(norm2(attention(norm1(x)))),
            "What a block gives is *added* to the stream.",
        ),
        Mistake(
            "forgets the residual connection of the MLP",
            _first_residual_only,
            "Both blocks add their result to the stream.",
        ),
        Mistake(
            "adds to the normalized copy instead of the stream",
            _from_normalized,
            "Keep x as it is: only what goes into the block is normalized.",
        ),
        Mistake(
            "lets both blocks read the same x",
            lambda x, norm1, attention, norm2, mlp: x + attention(norm1(x)) + mlp(norm2(x)),
            "The MLP reads the stream after attention has added to it.",
        ),
        Mistake(
            "adds the MLP's result to the stream from before attention, and loses what attention gave",
            _from_input,
            "Overwrite x after the first block: `x = x + attention(norm1(x))`.",
        ),
        Mistake(
            "puts the MLP before attention",
            _mlp_first,
            "First attention, with norm1, then the MLP, with norm2.",
        ),
        Mistake(
            "normalizes what comes out of a block instead of what goes in",
            _norm_after_block,
            "`x + attention(norm1(x))`: first the norm, then the block.",
        ),
    ),
)

# --- attention ------------------------------------------------------------------------------------------------------


def attention_cases(rng):
    """Two heads or more of two numbers or more, as many patches as keep the axes apart."""
    for B, P, heads, d in ((2, 5, 2, 3), (1, 4, 3, 2), (3, 2, 2, 4), (2, 6, 4, 2)):
        yield *(random(rng, B, P, heads * d) * 1.5 for _ in range(3)), heads


def _split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x):
    return x.transpose(1, 2).flatten(2)


def _attend(q, k, v, scale, mask=0.0, dim=-1):
    """Heads already split: [B, N, P, d]."""
    return (q @ k.transpose(-1, -2) * scale + mask).softmax(dim) @ v


def _with(scale=None, dim=-1, causal=False):
    """Attention with another scale (a function of d and D), softmax axis or mask."""

    def attend(q, k, v, heads):
        D, P = q.shape[-1], q.shape[1]
        factor = (D // heads) ** -0.5 if scale is None else scale(D // heads, D)
        mask = torch.full((P, P), -torch.inf).triu(1) if causal else 0.0
        return _merge(_attend(*(_split(x, heads) for x in (q, k, v)), factor, mask, dim))

    return attend


def _cut_across_patches(q, k, v, heads):
    B, P, D = q.shape
    out = _attend(*(x.reshape(B, heads, P, D // heads) for x in (q, k, v)), (D // heads) ** -0.5)
    return _merge(out)


def _not_moved_back(q, k, v, heads):
    out = _attend(*(_split(x, heads) for x in (q, k, v)), (q.shape[-1] // heads) ** -0.5)
    return out.reshape(q.shape)


def _heads_to_heads(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    return _attend(q, k, v, q.shape[-1] ** -0.5).flatten(2)


def _interleaved(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2) for x in (q, k, v))
    return _attend(q, k, v, q.shape[-1] ** -0.5).permute(0, 2, 3, 1).flatten(2)


ATTENTION = Exercise(
    key="03.5",
    reference=siglip.bidirectional_attention,
    cases=attention_cases,
    difficulty=3,
    minutes=18,
    points=3,
    mistakes=(
        Mistake(
            "forgets the scale",
            _with(scale=lambda d, D: 1.0),
            "The scores are divided by √d before the softmax, or it becomes too sharp.",
        ),
        Mistake(
            "scales by the whole width D, not by the width d of a head",
            _with(scale=lambda d, D: D**-0.5),
            "A score is a sum of d products, those of one head: divide by √d with d = D / num_heads.",
        ),
        Mistake(
            "divides by d and not by its root",
            _with(scale=lambda d, D: 1 / d),
            "A sum of d random products spreads like √d: multiply by `d ** -0.5`.",
        ),
        Mistake(
            "multiplies by √d where it should divide",
            _with(scale=lambda d, D: d**0.5),
            "The scale is `d ** -0.5`, which makes scores smaller.",
        ),
        Mistake(
            "takes the softmax over the queries",
            _with(dim=-2),
            "Scores are [B, N, query, key]: each query shares out 1 among the keys, along the last axis.",
        ),
        Mistake(
            "is causal",
            _with(causal=True),
            "Patches have no before and after: every patch sees every other.",
        ),
        Mistake(
            "has a single head",
            lambda q, k, v, heads: _attend(q, k, v, q.shape[-1] ** -0.5),
            "Split the width into `num_heads` heads, each with a softmax of its own.",
        ),
        Mistake(
            "cuts the heads across the patches",
            _cut_across_patches,
            "Split the last axis into [N, d] first, then move N: `unflatten(-1, (num_heads, -1)).transpose(1, 2)`.",
        ),
        Mistake(
            "joins the heads without moving their axis back",
            _not_moved_back,
            "Out of the heads comes [B, N, P, d]: `transpose(1, 2)` before `flatten(2)`.",
        ),
        Mistake(
            "lets the heads of one patch look at each other",
            _heads_to_heads,
            "With [B, P, N, d] the product compares heads: move N before P first.",
        ),
        Mistake(
            "deals the width out to the heads in turn",
            _interleaved,
            "Head 0 has the first d numbers, head 1 the next d: `unflatten(-1, (num_heads, -1))`.",
        ),
    ),
)

EXERCISES = [PATCHIFY, EMBED, LAYER_NORM, BLOCK, ATTENTION]
