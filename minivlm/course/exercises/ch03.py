"""Chapter 03: how an image becomes a sequence."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minivlm import siglip
from minivlm.course.exercises.exercise import Exercise, Mistake


def random(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- patches --------------------------------------------------------------------------------------------------------

IMAGES = ((2, 3, 4, 6, 2), (1, 3, 6, 4, 2), (2, 3, 6, 9, 3), (3, 1, 8, 4, 4), (1, 2, 8, 8, 2))  # B, C, H, W, patch


def patch_cases(rng):
    """Images that are not square, with patches of two pixels or more."""
    for *shape, patch_size in IMAGES:
        yield random(rng, *shape), patch_size


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
            "moves by half a patch, so patches overlap",
            lambda pixels, size: F.unfold(pixels, size, stride=max(1, size // 2)).transpose(1, 2),
            "The stride is the patch size, so every pixel belongs to exactly one patch.",
        ),
    ),
)


def embedding_cases(rng):
    for width, (B, C, H, W, size) in zip((5, 3, 4, 2, 7), IMAGES, strict=True):
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
    """Vectors with nonzero mean, and an eps large enough to matter."""
    for shape, eps in (((2, 3, 4), 0.1), ((3, 2, 5), 1e-6), ((2, 4, 3), 0.03), ((1, 3, 6), 1.0), ((4, 3), 0.01)):
        x = random(rng, *shape) * float(rng.uniform(0.5, 3)) + random(rng, *shape[:-1], 1)
        yield x, random(rng, shape[-1]), random(rng, shape[-1]), eps


def _standardized(x, eps, dim=-1, unbiased=False):
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, keepdim=True, unbiased=unbiased) + eps).sqrt()


LAYER_NORM = Exercise(
    key="03.3",
    reference=siglip.layer_norm,
    cases=norm_cases,
    difficulty=1,
    minutes=8,
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


def _norm_after_sublayer(x, norm1, attention, norm2, mlp):
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
    """At least two heads of dimension two or more, and sizes that keep the axes apart."""
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
