"""Chapter 03: how an image becomes a sequence."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minivlm import siglip
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def random(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


def integers(rng, *shape):
    """Small integers in bfloat16: their sums and products are exact, so every right answer agrees to the last bit."""
    return torch.from_numpy(rng.integers(-3, 4, shape)).bfloat16()


# --- patches --------------------------------------------------------------------------------------------------------

IMAGES = {  # B, C, H, W, patch
    "images that are wider than high": (5, 3, 8, 12, 2),
    "images that are higher than wide": (2, 4, 15, 9, 3),
    "a batch of one": (1, 3, 8, 20, 4),
    "one channel": (3, 1, 6, 8, 2),
    "one patch": (2, 3, 5, 5, 5),
    "one row of patches": (6, 2, 3, 12, 3),
    "bfloat16": (5, 3, 4, 6, 2),
}


def patch_cases(rng):
    """Images that are not square, with patches of two pixels or more."""
    for name, (*shape, patch_size) in IMAGES.items():
        pixels = integers(rng, *shape) if name == "bfloat16" else random(rng, *shape)
        yield Case((pixels, patch_size), name)
    yield Case((random(rng, 2, 3, 5, 4), 1), "patches of one pixel")


def _unfolded(pixels, size):
    return F.unfold(pixels, size, stride=size).transpose(1, 2)


def _patches(pixels, size, order):
    """Split into [B, C, patch row, row, patch column, column], permute by ``order``, and flatten to [B, P, …]."""
    B, C, H, W = pixels.shape
    six = pixels.reshape(B, C, H // size, size, W // size, size)
    return six.permute(order).flatten(3).flatten(1, 2)


PATCHIFY = Exercise(
    key="03.1",
    reference=siglip.patchify,
    cases=patch_cases,
    difficulty=2,
    minutes=12,
    hints=(
        (
            "The pixels of a patch are not neighbors in memory, so a reshape alone cannot do it. Split height "
            "and width into two axes each, reorder the axes, then join them."
        ),
        (
            "Split both sides: `reshape(B, C, H // p, p, W // p, p)` has the axes B, C, patch row, row, patch "
            "column, column. `permute` them to B, patch row, patch column, C, row, column, then flatten two "
            "groups of axes."
        ),
    ),
    mistakes=(
        Mistake(
            "numbers the patches column by column",
            lambda pixels, size: _patches(pixels, size, (0, 4, 2, 1, 3, 5)),
            "Number the patches as you read a page: along the first row, then the next one.",
        ),
        Mistake(
            "puts the colors last within each patch",
            lambda pixels, size: _patches(pixels, size, (0, 2, 4, 3, 5, 1)),
            "A patch has the layout of the convolution's weights: all of red, then green, then blue.",
        ),
        Mistake(
            "transposes each patch",
            lambda pixels, size: _patches(pixels, size, (0, 2, 4, 1, 5, 3)),
            "Within a patch, rows come before columns.",
        ),
        Mistake(
            "splits the memory into equal chunks instead of the image into squares",
            lambda pixels, size: pixels.reshape(len(pixels), -1, pixels.shape[1] * size * size),
            "The pixels of a patch are not contiguous in memory: split into six axes, `permute`, flatten.",
        ),
        Mistake(
            "returns one column per patch instead of one row",
            lambda pixels, size: F.unfold(pixels, size, stride=size),
            "The result is [B, P, C·h·w]; `F.unfold` has the last two axes swapped.",
        ),
        Mistake(
            "puts the colors between rows and columns within each patch",
            lambda pixels, size: _patches(pixels, size, (0, 2, 4, 3, 1, 5)),
            "Within a patch, the order is color, row, column.",
        ),
        Mistake(
            "leaves the color axis before the patches, so each patch mixes pixels from everywhere",
            lambda pixels, size: _patches(pixels, size, (0, 1, 2, 4, 3, 5)).reshape(
                len(pixels), -1, pixels.shape[1] * size * size
            ),
            "Move the colors behind the two patch axes with `permute` before you flatten.",
        ),
        Mistake(
            "swaps rows and columns of the grid of patches",
            lambda pixels, size: (
                pixels.reshape(*pixels.shape[:2], pixels.shape[3] // size, size, pixels.shape[2] // size, size)
                .permute(0, 2, 4, 1, 3, 5)
                .flatten(3)
                .flatten(1, 2)
            ),
            "The grid has H // patch_size rows and W // patch_size columns: the rows come first.",
        ),
        Mistake(
            "assumes a square image",
            lambda pixels, size: (
                pixels.reshape(*pixels.shape[:2], pixels.shape[2] // size, size, pixels.shape[2] // size, size)
                .permute(0, 2, 4, 1, 3, 5)
                .flatten(3)
                .flatten(1, 2)
            ),
            "H and W can differ: use `W // patch_size` for the columns.",
        ),
        Mistake(
            "assumes three colors",
            lambda pixels, size: (
                pixels.reshape(len(pixels), 3, pixels.shape[2] // size, size, pixels.shape[3] // size, size)
                .permute(0, 2, 4, 1, 3, 5)
                .flatten(3)
                .flatten(1, 2)
            ),
            "Take the number of channels C from `pixel_values.shape`.",
        ),
        Mistake(
            "keeps the rows and columns of the grid as two axes",
            lambda pixels, size: (
                pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3)
            ),
            "Number the patches from 0 to P − 1: `flatten(1, 2)`.",
        ),
        Mistake(
            "keeps the color axis of each patch",
            lambda pixels, size: _unfolded(pixels, size).unflatten(-1, (pixels.shape[1], -1)),
            "Each patch becomes one row of C·h·w numbers.",
        ),
        Mistake(
            "turns [B, C·h·w, P] into [B, P, C·h·w] with a reshape",
            lambda pixels, size: F.unfold(pixels, size, stride=size).reshape(
                len(pixels), -1, pixels.shape[1] * size * size
            ),
            "`reshape` keeps the order in memory: swap the last two axes with `transpose(1, 2)`.",
        ),
        Mistake(
            "moves by half a patch, so patches overlap",
            lambda pixels, size: F.unfold(pixels, size, stride=max(1, size // 2)).transpose(1, 2),
            "The stride is the patch size, so every pixel belongs to exactly one patch.",
        ),
    ),
)


def embedding_cases(rng):
    for width, (name, (B, C, H, W, size)) in zip((7, 5, 6, 9, 4, 8, 9), IMAGES.items(), strict=True):
        sample = integers if name == "bfloat16" else random
        yield Case((sample(rng, B, C, H, W), sample(rng, width, C, size, size), sample(rng, width)), name)
    yield Case((random(rng, 2, 3, 8, 12), random(rng, 1, 3, 4, 4), random(rng, 1)), "a hidden size of one")


def _convolve(pixels, weight, bias, stride=None):
    """[B, D, rows, columns]."""
    return F.conv2d(pixels, weight, bias, stride=stride or weight.shape[-1])


EMBED = Exercise(
    key="03.2",
    reference=siglip.embed_patches,
    cases=embedding_cases,
    difficulty=1,
    minutes=8,
    hints=(
        (
            "The patches are `[B, P, C·h·w]`. Which shape does the matrix need, and which axes of `weight` do "
            "you have to flatten for that? If you prefer `F.conv2d`, write down the shape that it returns and "
            "compare it with `[B, P, D]`."
        ),
        (
            "`weight.flatten(1).T` has the shape `[C·h·w, D]`. With `F.conv2d`, the stride is the side of a "
            "patch, and the result needs `flatten(2)` and a transpose."
        ),
    ),
    mistakes=(
        Mistake(
            "forgets the bias",
            lambda pixels, weight, bias: _convolve(pixels, weight, None).flatten(2).transpose(1, 2),
            "SigLIP's patch embedding has a bias [D]: add it to every patch.",
        ),
        Mistake(
            "flattens the weights in a different order than the patches",
            lambda pixels, weight, bias: F.linear(
                siglip.patchify(pixels, weight.shape[-1]), weight.permute(0, 2, 3, 1).flatten(1), bias
            ),
            "The order of both is color, row, column: use `weight.flatten(1)` without moving an axis.",
        ),
        Mistake(
            "reshapes the weights to [C·h·w, D] instead of transposing them",
            lambda pixels, weight, bias: (
                siglip.patchify(pixels, weight.shape[-1]) @ weight.reshape(-1, len(weight)) + bias
            ),
            "A reshape does not transpose: use `weight.flatten(1).T`.",
        ),
        Mistake(
            "splits the memory into equal chunks instead of the image into squares",
            lambda pixels, weight, bias: F.linear(
                pixels.reshape(len(pixels), -1, weight[0].numel()), weight.flatten(1), bias
            ),
            "The pixels of a patch are not contiguous in memory: cut the image with `patchify`.",
        ),
        Mistake(
            "transposes each patch",
            lambda pixels, weight, bias: _convolve(pixels, weight.mT, bias).flatten(2).transpose(1, 2),
            "Within a patch, rows come before columns, as in the weights.",
        ),
        Mistake(
            "does not transpose the weights",
            lambda pixels, weight, bias: siglip.patchify(pixels, weight.shape[-1]) @ weight.flatten(1) + bias,
            "`weight.flatten(1)` is [D, C·h·w]: multiply by its transpose.",
        ),
        Mistake(
            "subtracts the bias",
            lambda pixels, weight, bias: _convolve(pixels, weight, -bias).flatten(2).transpose(1, 2),
            "The bias is added.",
        ),
        Mistake(
            "averages over the colors before it multiplies",
            lambda pixels, weight, bias: (
                _convolve(pixels.mean(1, keepdim=True).expand_as(pixels), weight, bias).flatten(2).transpose(1, 2)
            ),
            "Each color has its own weights: a filter is [C, h, w].",
        ),
        Mistake(
            "leaves the result as a grid",
            lambda pixels, weight, bias: _convolve(pixels, weight, bias).permute(0, 2, 3, 1),
            "The result is a sequence, [B, P, D]: flatten rows and columns into one axis.",
        ),
        Mistake(
            "leaves the result as the convolution returns it",
            _convolve,
            "Flatten the rows and columns of [B, D, rows, columns] into P, then move D to the end.",
        ),
        Mistake(
            "applies the filters at every pixel instead of every patch",
            lambda pixels, weight, bias: _convolve(pixels, weight, bias, 1).flatten(2).transpose(1, 2),
            "The stride is the kernel size.",
        ),
        Mistake(
            "reshapes [B, D, P] to [B, P, D] instead of swapping the axes",
            lambda pixels, weight, bias: (
                _convolve(pixels, weight, bias).flatten(2).reshape(len(pixels), -1, len(weight))
            ),
            "`reshape` keeps the memory order and mixes channels with patches: use `transpose(1, 2)`.",
        ),
        Mistake(
            "leaves the patches on the last axis",
            lambda pixels, weight, bias: _convolve(pixels, weight, bias).flatten(2),
            "The patches come first, the hidden size last: [B, P, D].",
        ),
        Mistake(
            "numbers the patches column by column",
            lambda pixels, weight, bias: _convolve(pixels, weight, bias).transpose(2, 3).flatten(2).transpose(1, 2),
            "Flatten [rows, columns] without swapping them: the first row of patches comes first.",
        ),
        Mistake(
            "rotates the filters by 180°, like a mathematical convolution",
            lambda pixels, weight, bias: _convolve(pixels, weight.flip(2, 3), bias).flatten(2).transpose(1, 2),
            "In deep learning, a convolution does not flip the kernel: weight (0, 0) multiplies pixel (0, 0).",
        ),
    ),
)

# --- norms ----------------------------------------------------------------------------------------------------------


def norm_cases(rng):
    """Any number of axes; vectors with nonzero mean; an eps large enough to matter."""
    for name, shape, eps in (
        ("three axes, a large eps", (2, 3, 4), 0.1),
        ("three axes, a small eps", (3, 2, 5), 1e-6),
        ("more patches than numbers", (2, 7, 3), 0.03),
        ("a batch of one", (1, 3, 6), 1.0),
        ("two axes", (4, 3), 0.01),
        ("one axis", (5,), 0.2),
        ("four axes", (2, 3, 5, 4), 0.05),
    ):
        x = random(rng, *shape) * float(rng.uniform(0.5, 3)) + random(rng, *shape[:-1], 1)
        yield Case((x, random(rng, shape[-1]), random(rng, shape[-1]), eps), name)
    constant = torch.from_numpy(rng.integers(1, 9, (2, 3, 1))).float().expand(2, 3, 4).contiguous()
    yield Case((constant, random(rng, 4), random(rng, 4), 1e-6), "vectors of equal numbers, so the variance is 0")
    yield Case((random(rng, 3, 2, 4) / 100, random(rng, 4), random(rng, 4), 1e-6), "small numbers, and a small eps")
    # Mean ± 1 and √(1 + 3) are exact in bfloat16, so every right answer agrees to the last bit.
    x = integers(rng, 2, 3, 1) + torch.tensor([1.0, -1, -1, 1]).bfloat16()
    yield Case((x, integers(rng, 4), integers(rng, 4), 3.0), "bfloat16")


def _standardized(x, eps, dim=-1, unbiased=False):
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, unbiased=unbiased) + eps).sqrt()


LAYER_NORM = Exercise(
    key="03.3",
    reference=siglip.layer_norm,
    cases=norm_cases,
    difficulty=1,
    minutes=8,
    hints=(
        (
            "`standardize` above is nearly this function, without eps, weight and bias. Be careful with the "
            "variance: it divides by D, but torch's `var` and `std` divide by D − 1 unless you tell them "
            "otherwise."
        ),
        (
            "`x.mean(-1, keepdim=True)` and `x.var(-1, keepdim=True, unbiased=False)`. Then eps, square root, "
            "weight and bias, in this order."
        ),
    ),
    mistakes=(
        Mistake(
            "normalizes over the batch (that is batch norm)",
            lambda x, weight, bias, eps: _standardized(x, eps, 0) * weight + bias,
            "Each vector is normalized on its own: take mean and variance over the last axis, `dim=-1`.",
        ),
        Mistake(
            "normalizes over the patches",
            lambda x, weight, bias, eps: _standardized(x, eps, -2) * weight + bias,
            "Take mean and variance over the D values of one vector, the last axis.",
        ),
        Mistake(
            "divides the variance by D − 1",
            lambda x, weight, bias, eps: _standardized(x, eps, unbiased=True) * weight + bias,
            "Use the biased variance, `var(-1, keepdim=True, unbiased=False)`.",
        ),
        Mistake(
            "divides by the variance instead of the standard deviation",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps) * weight + bias
            ),
            "The standard deviation is the square root of the variance.",
        ),
        Mistake(
            "adds eps outside the square root",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False).sqrt() + eps) * weight + bias
            ),
            "eps goes inside the square root: √(variance + eps).",
        ),
        Mistake(
            "does not subtract the mean (that is RMSNorm)",
            lambda x, weight, bias, eps: x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias,
            "SigLIP centers each vector first. Gemma doesn't, as chapter 06 shows.",
        ),
        Mistake(
            "takes mean and variance over all axes at once",
            lambda x, weight, bias, eps: (x - x.mean()) / (x.var(unbiased=False) + eps).sqrt() * weight + bias,
            "Each vector is normalized on its own: pass `-1, keepdim=True`.",
        ),
        Mistake(
            "takes mean and variance over patches and features together",
            lambda x, weight, bias, eps: _standardized(x, eps, (-2, -1)) * weight + bias,
            "Take mean and variance over the D values of one vector, the last axis.",
        ),
        Mistake(
            "forgets eps",
            lambda x, weight, bias, eps: _standardized(x, 0.0) * weight + bias,
            "Add `eps` to the variance, or a vector of equal numbers divides 0 by 0.",
        ),
        Mistake(
            "uses its own eps instead of the argument",
            lambda x, weight, bias, eps: _standardized(x, 1e-5) * weight + bias,
            "Add the argument `eps` to the variance.",
        ),
        Mistake(
            "subtracts eps from the variance",
            lambda x, weight, bias, eps: _standardized(x, -eps) * weight + bias,
            "eps is added.",
        ),
        Mistake(
            "divides by D − 1 and adds eps outside the square root",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps) * weight + bias
            ),
            "Take √(variance + eps), with the biased variance, `var(-1, keepdim=True, unbiased=False)`.",
        ),
        Mistake(
            "subtracts the mean but divides by the root mean square",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias
            ),
            "The variance is the mean of (x − mean)², not of x².",
        ),
        Mistake(
            "multiplies by the standard deviation",
            lambda x, weight, bias, eps: (
                (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt() * weight + bias
            ),
            "Divide, so that the variance becomes 1.",
        ),
        Mistake(
            "only subtracts the mean",
            lambda x, weight, bias, eps: (x - x.mean(-1, keepdim=True)) * weight + bias,
            "Then divide by √(variance + eps).",
        ),
        Mistake(
            "drops the last axis of mean and variance, so they do not line up with the vectors",
            lambda x, weight, bias, eps: (x - x.mean(-1)) / (x.var(-1, unbiased=False) + eps).sqrt() * weight + bias,
            "`keepdim=True` keeps the last axis with length 1.",
        ),
        Mistake(
            "forgets the shift",
            lambda x, weight, bias, eps: _standardized(x, eps) * weight,
            "Add `bias` after you multiply by `weight`.",
        ),
        Mistake(
            "forgets the scale",
            lambda x, weight, bias, eps: _standardized(x, eps) + bias,
            "Multiply the normalized vector by `weight` before you add `bias`.",
        ),
        Mistake(
            "scales by 1 + weight",
            lambda x, weight, bias, eps: _standardized(x, eps) * (1 + weight) + bias,
            "SigLIP scales by `weight` itself. Gemma's norm uses 1 + weight, as chapter 06 shows.",
        ),
        Mistake(
            "scales and shifts before it normalizes",
            lambda x, weight, bias, eps: _standardized(x * weight + bias, eps),
            "First normalize, then multiply by `weight` and add `bias`.",
        ),
        Mistake(
            "forgets the scale and the shift",
            lambda x, weight, bias, eps: _standardized(x, eps),
            "Multiply the normalized vector by `weight`, then add `bias`.",
        ),
        Mistake(
            "adds the shift before it scales",
            lambda x, weight, bias, eps: (_standardized(x, eps) + bias) * weight,
            "First multiply by `weight`, then add `bias`.",
        ),
    ),
)

# --- blocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A stand-in for a norm, attention or an MLP. Any function would do, so this one is simple."""

    scale: float
    shift: float

    def __call__(self, x):
        return torch.tanh(self.scale * x + self.shift)


def block_cases(rng):
    for name, shape in (
        ("two images", (2, 3, 4)),
        ("a batch of one", (1, 4, 5)),
        ("three images", (3, 2, 6)),
        ("more patches than numbers", (4, 7, 2)),
        ("one patch", (2, 1, 3)),
    ):
        yield Case((random(rng, *shape), *_layers(rng)), name)
    yield Case((random(rng, 3, 5, 2).bfloat16(), *_layers(rng)), "bfloat16")


def _layers(rng):
    return [Layer(*map(float, rng.uniform(0.3, 1.5, 2).round(3))) for _ in range(4)]


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


def _norm_after_sublayer(x, norm1, attention, norm2, mlp):
    x = x + norm1(attention(x))
    return x + norm2(mlp(x))


def _from_input(x, norm1, attention, norm2, mlp):
    return x + mlp(norm2(x + attention(norm1(x))))


def _mlp_first(x, norm1, attention, norm2, mlp):
    x = x + mlp(norm2(x))
    return x + attention(norm1(x))


def _block(first, second):
    """Any block that is two updates of the residual stream, each from x and the four functions."""

    def block(x, norm1, attention, norm2, mlp):
        x = first(x, norm1, attention, norm2, mlp)
        return second(x, norm1, attention, norm2, mlp)

    return block


def _attention_step(x, norm1, attention, norm2, mlp):
    return x + attention(norm1(x))


def _mlp_step(x, norm1, attention, norm2, mlp):
    return x + mlp(norm2(x))


def _second_residual_only(x, norm1, attention, norm2, mlp):
    x = attention(norm1(x))
    return x + mlp(norm2(x))


BLOCK = Exercise(
    key="03.4",
    reference=siglip.pre_norm_block,
    cases=block_cases,
    difficulty=2,
    minutes=7,
    hints=(
        "Two lines. The residual stream `x` itself is never normalized.",
        "Both lines have the form `x = x + sublayer(norm(x))`.",
    ),
    mistakes=(
        Mistake(
            "is post-norm",
            _post_norm,
            "The norm is applied to what goes into attention or the MLP, `x + attention(norm1(x))`, never to x itself.",
        ),
        Mistake(
            "forgets the residual connections",
            lambda x, norm1, attention, norm2, mlp: mlp(norm2(attention(norm1(x)))),
            "The outputs of attention and the MLP are *added* to the residual stream.",
        ),
        Mistake(
            "forgets the residual connection of the MLP",
            _first_residual_only,
            "Attention and the MLP both add their output to the residual stream.",
        ),
        Mistake(
            "forgets the residual connection of attention",
            _second_residual_only,
            "Attention and the MLP both add their output to the residual stream.",
        ),
        Mistake(
            "adds the input only at the end",
            lambda x, norm1, attention, norm2, mlp: x + mlp(norm2(attention(norm1(x)))),
            "Attention has a residual connection too: the MLP reads the sum of its input and its output.",
        ),
        Mistake(
            "uses norm1 twice",
            _block(_attention_step, lambda x, norm1, attention, norm2, mlp: x + mlp(norm1(x))),
            "Each norm has its own weights: norm1 for attention, norm2 for the MLP.",
        ),
        Mistake(
            "uses norm2 twice",
            _block(lambda x, norm1, attention, norm2, mlp: x + attention(norm2(x)), _mlp_step),
            "Each norm has its own weights: norm1 for attention, norm2 for the MLP.",
        ),
        Mistake(
            "exchanges the two norms",
            _block(
                lambda x, norm1, attention, norm2, mlp: x + attention(norm2(x)),
                lambda x, norm1, attention, norm2, mlp: x + mlp(norm1(x)),
            ),
            "norm1 belongs to attention, norm2 to the MLP.",
        ),
        Mistake(
            "runs attention twice and never the MLP",
            _block(_attention_step, lambda x, norm1, attention, norm2, mlp: x + attention(norm2(x))),
            "The second line calls `mlp`.",
        ),
        Mistake(
            "leaves out both norms",
            _block(
                lambda x, norm1, attention, norm2, mlp: x + attention(x),
                lambda x, norm1, attention, norm2, mlp: x + mlp(x),
            ),
            "Attention and the MLP each read a normalized copy of x.",
        ),
        Mistake(
            "leaves out norm1",
            _block(lambda x, norm1, attention, norm2, mlp: x + attention(x), _mlp_step),
            "Attention reads `norm1(x)`.",
        ),
        Mistake(
            "leaves out norm2",
            _block(_attention_step, lambda x, norm1, attention, norm2, mlp: x + mlp(x)),
            "The MLP reads `norm2(x)`.",
        ),
        Mistake(
            "leaves out attention",
            _mlp_step,
            "First `x = x + attention(norm1(x))`, then the MLP.",
        ),
        Mistake(
            "leaves out the MLP",
            _attention_step,
            "Then the MLP adds to the residual stream, too.",
        ),
        Mistake(
            "normalizes the result once more",
            _block(_attention_step, lambda x, norm1, attention, norm2, mlp: norm2(x + mlp(norm2(x)))),
            "The residual stream itself is never normalized inside the block.",
        ),
        Mistake(
            "normalizes inputs and outputs of attention and the MLP",
            _block(
                lambda x, norm1, attention, norm2, mlp: x + norm1(attention(norm1(x))),
                lambda x, norm1, attention, norm2, mlp: x + norm2(mlp(norm2(x))),
            ),
            "Only the inputs are normalized.",
        ),
        Mistake(
            "is post-norm and uses norm1 twice",
            lambda x, norm1, attention, norm2, mlp: _post_norm(x, norm1, attention, norm1, mlp),
            "The norm is applied to what goes into attention or the MLP, never to x itself. The MLP has norm2.",
        ),
        Mistake(
            "adds the input twice",
            lambda x, norm1, attention, norm2, mlp: (
                x + _block(_attention_step, _mlp_step)(x, norm1, attention, norm2, mlp)
            ),
            "After the first line, x already contains the input: return `x + mlp(norm2(x))` with this x.",
        ),
        Mistake(
            "adds to the normalized x instead of the residual stream",
            _from_normalized,
            "Leave x unchanged: normalize only what goes into attention or the MLP.",
        ),
        Mistake(
            "feeds attention and the MLP with the same x",
            lambda x, norm1, attention, norm2, mlp: x + attention(norm1(x)) + mlp(norm2(x)),
            "The MLP reads the residual stream after attention has added to it.",
        ),
        Mistake(
            "adds the MLP's output to the original x, so attention's output is lost",
            _from_input,
            "Update x after attention: `x = x + attention(norm1(x))`.",
        ),
        Mistake(
            "runs the MLP before attention",
            _mlp_first,
            "First attention with norm1, then the MLP with norm2.",
        ),
        Mistake(
            "normalizes the outputs of attention and the MLP instead of their inputs",
            _norm_after_sublayer,
            "First the norm, then attention: `x + attention(norm1(x))`.",
        ),
    ),
)

# --- attention ------------------------------------------------------------------------------------------------------


def attention_cases(rng):
    """Axes of different lengths; one head, heads of one number, fewer queries than keys."""
    for name, B, Q, P, heads, d in (
        ("two heads", 3, 5, 5, 2, 4),
        ("more heads than numbers per head", 2, 7, 7, 4, 3),
        ("a batch of one", 1, 5, 5, 3, 2),
        ("one head", 2, 4, 4, 1, 3),
        ("heads of one number", 2, 5, 5, 3, 1),
        ("one query, many keys", 2, 1, 7, 3, 4),
        ("fewer queries than keys", 3, 2, 5, 2, 7),
        ("one patch", 2, 1, 1, 3, 4),
    ):
        D = heads * d
        yield Case((random(rng, B, Q, D) * 1.5, random(rng, B, P, D) * 1.5, random(rng, B, P, D) * 1.5, heads), name)
    # Every query fits one key far better than the others, so that no weight needs rounding in bfloat16.
    B, P, heads, d = 2, 5, 3, 8
    keys = torch.eye(d, dtype=torch.bfloat16)[:P].repeat(B, 1, heads)
    queries = 64 * keys[:, torch.from_numpy(rng.permutation(P))]
    yield Case((queries, keys, integers(rng, B, P, heads * d), heads), "bfloat16")


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
    B, _, D = q.shape
    out = _attend(*(x.reshape(B, heads, -1, D // heads) for x in (q, k, v)), (D // heads) ** -0.5)
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


def _with_heads(attend):
    """Split the heads, call ``attend(q, k, v, d ** -0.5)``, and join the heads."""

    def attention(q, k, v, heads):
        return _merge(attend(*(_split(x, heads) for x in (q, k, v)), (q.shape[-1] // heads) ** -0.5))

    return attention


def _cut_and_joined_by_reshape(q, k, v, heads):
    B, _, D = q.shape
    out = _attend(*(x.reshape(B, heads, -1, D // heads) for x in (q, k, v)), (D // heads) ** -0.5)
    return out.reshape(q.shape)


def _keys_reshaped(q, k, v, scale):
    return (q @ k.reshape(*k.shape[:2], k.shape[3], k.shape[2]) * scale).softmax(-1) @ v


ATTENTION = Exercise(
    key="03.5",
    reference=siglip.bidirectional_attention,
    cases=attention_cases,
    difficulty=3,
    minutes=18,
    points=3,
    hints=(
        (
            "Each head attends as if the others did not exist. Split the vectors into heads, let each take a "
            "softmax over its own scores divided by √d, and join the results."
        ),
        (
            "`x.unflatten(-1, (num_heads, -1))` splits the last axis into N and d. Matrix products work on the "
            "last two axes, so move N before P. `k.transpose(-1, -2)` transposes the keys. At the end, move the "
            "heads back before you flatten them."
        ),
    ),
    mistakes=(
        Mistake(
            "forgets the scale",
            _with(scale=lambda d, D: 1.0),
            "Divide the scores by √d before the softmax, or it becomes too sharp.",
        ),
        Mistake(
            "scales by the hidden size D instead of the head dimension d",
            _with(scale=lambda d, D: D**-0.5),
            "A score is a sum of d products, those of one head: divide by √d with d = D / num_heads.",
        ),
        Mistake(
            "divides by d instead of √d",
            _with(scale=lambda d, D: 1 / d),
            "The standard deviation of a sum of d random products grows like √d: multiply by `d ** -0.5`.",
        ),
        Mistake(
            "multiplies by √d instead of dividing",
            _with(scale=lambda d, D: d**0.5),
            "The scale is `d ** -0.5`, which makes the scores smaller.",
        ),
        Mistake(
            "divides by the square root of the number of heads",
            _with(scale=lambda d, D: (D // d) ** -0.5),
            "The scale depends on the length of one head: divide by √d with d = D / num_heads.",
        ),
        Mistake(
            "divides by √d after the softmax",
            _with_heads(lambda q, k, v, scale: (q @ k.mT).softmax(-1) * scale @ v),
            "Divide the scores by √d before the softmax, so that the weights still sum to 1.",
        ),
        Mistake(
            "forgets the softmax",
            _with_heads(lambda q, k, v, scale: q @ k.mT * scale @ v),
            "Scores become weights by a softmax over the keys.",
        ),
        Mistake(
            "exchanges queries and keys",
            _with_heads(lambda q, k, v, scale: (k @ q.mT * scale).softmax(-1) @ v),
            "Row i of the scores belongs to query i: `q @ k.transpose(-1, -2)`.",
        ),
        Mistake(
            "transposes the weights",
            _with_heads(lambda q, k, v, scale: (q @ k.mT * scale).softmax(-1).mT @ v),
            "The weights are [B, N, query, key], and `weights @ v` sums over the keys.",
        ),
        Mistake(
            "reshapes the keys instead of transposing them",
            _with_heads(_keys_reshaped),
            "`reshape` and `view` keep the order in memory and mix the keys: use `k.transpose(-1, -2)`.",
        ),
        Mistake(
            "takes the softmax over the heads",
            _with(dim=1),
            "Scores are [B, N, query, key]: the weights of a query sum to 1 over the keys, the last axis.",
        ),
        Mistake(
            "uses a sigmoid instead of a softmax",
            _with_heads(lambda q, k, v, scale: (q @ k.mT * scale).sigmoid() @ v),
            "The weights of a query sum to 1 over the keys: `softmax(-1)`.",
        ),
        Mistake(
            "forgets to divide the exponentials by their sum",
            _with_heads(lambda q, k, v, scale: (q @ k.mT * scale).exp() @ v),
            "The weights of a query sum to 1 over the keys: `softmax(-1)`.",
        ),
        Mistake(
            "averages the keys instead of the values",
            _with_heads(lambda q, k, v, scale: (q @ k.mT * scale).softmax(-1) @ k),
            "Keys only decide the weights. The result is the weighted mean of the values v.",
        ),
        Mistake(
            "takes the value of the best key only",
            _with_heads(lambda q, k, v, scale: F.one_hot((q @ k.mT).argmax(-1), k.shape[2]).to(v.dtype) @ v),
            "Every key has a weight: use `softmax`, not `argmax`.",
        ),
        Mistake(
            "adds the queries to the result",
            lambda q, k, v, heads: q + _with()(q, k, v, heads),
            "The residual connection is not part of attention: the block adds it.",
        ),
        Mistake(
            "takes the softmax over the queries",
            _with(dim=-2),
            "Scores are [B, N, query, key]: the weights of a query sum to 1 over the keys, the last axis.",
        ),
        Mistake(
            "is causal",
            _with(causal=True),
            "Patches have no before and after: every patch attends to every other.",
        ),
        Mistake(
            "uses a single head",
            lambda q, k, v, heads: _attend(q, k, v, q.shape[-1] ** -0.5),
            "Split the hidden size into `num_heads` heads, each with its own softmax.",
        ),
        Mistake(
            "uses a single head, but the scale of several",
            lambda q, k, v, heads: _attend(q, k, v, (q.shape[-1] // heads) ** -0.5),
            "Split the hidden size into `num_heads` heads, each with its own softmax.",
        ),
        Mistake(
            "splits the heads across patches and joins them the same way",
            _cut_and_joined_by_reshape,
            "Split the last axis into [N, d] first, then move N: `unflatten(-1, (num_heads, -1)).transpose(1, 2)`.",
        ),
        Mistake(
            "splits the heads across patches",
            _cut_across_patches,
            "Split the last axis into [N, d] first, then move N: `unflatten(-1, (num_heads, -1)).transpose(1, 2)`.",
        ),
        Mistake(
            "joins the heads without moving their axis back",
            _not_moved_back,
            "The heads' output is [B, N, P, d]: `transpose(1, 2)` before `flatten(2)`.",
        ),
        Mistake(
            "lets the heads of one patch attend to each other",
            _heads_to_heads,
            "With [B, P, N, d], the product compares heads: move N before P first.",
        ),
        Mistake(
            "assigns the D features to the heads in turn",
            _interleaved,
            "Head 0 has the first d features, head 1 the next d: `unflatten(-1, (num_heads, -1))`.",
        ),
    ),
)

EXERCISES = [PATCHIFY, EMBED, LAYER_NORM, BLOCK, ATTENTION]
