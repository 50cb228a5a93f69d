"""SigLIP's vision tower: an image becomes a sequence of patch vectors.

    B batch size · C color channels · H, W image height and width · h, w patch height and width, all in pixels
    P patches · D hidden size · N attention heads · d head dimension

The image is cut into square patches. Each patch is projected to a vector and gets a learned position embedding. Then
every patch attends to every patch, layer by layer. The layers are *pre-norm*: attention and MLP each read a normalized
copy of the residual stream and add their result to the stream itself. (Only the very last LayerNorm has "post" in its
name.) There is no [class] token and no pooling: PaliGemma's decoder receives all P vectors.

Sources: "Sigmoid Loss for Language Image Pre-Training" (arXiv:2303.15343); big_vision ``models/vit.py``; parameter
names as in transformers ``models/siglip/modeling_siglip.py``.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minivlm.config import SiglipVisionConfig


def patchify(pixel_values: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B P Chw"]:
    """Cut into square patches, row by row from the top left. Each is flattened in the order channel, row, column."""
    return F.unfold(pixel_values, patch_size, stride=patch_size).transpose(1, 2)


def embed_patches(
    pixel_values: Float[Tensor, "B C H W"], weight: Float[Tensor, "D C h w"], bias: Float[Tensor, " D"]
) -> Float[Tensor, "B P D"]:
    """Multiply every patch by the same matrix and add a bias: a convolution whose stride equals its kernel size."""
    return F.linear(patchify(pixel_values, weight.shape[-1]), weight.flatten(1), bias)


def layer_norm(
    x: Float[Tensor, "*B D"], weight: Float[Tensor, " D"], bias: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*B D"]:
    """Normalize each vector to mean 0 and variance 1 (divided by D), then scale and shift each dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def split_heads(x: Float[Tensor, "B P D"], num_heads: int) -> Float[Tensor, "B N P d"]:
    """Cut each vector into N consecutive slices of d = D / N dimensions, one per head."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def bidirectional_attention(
    q: Float[Tensor, "B Q D"], k: Float[Tensor, "B P D"], v: Float[Tensor, "B P D"], num_heads: int
) -> Float[Tensor, "B Q D"]:
    """Multi-head attention without a mask: in each head, every query takes a weighted mean over all P patches."""
    q, k, v = (split_heads(x, num_heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)  # scale d ** -0.5
    return out.transpose(1, 2).flatten(2)


def pre_norm_block(
    x: Float[Tensor, "B P D"], norm1: Callable, attention: Callable, norm2: Callable, mlp: Callable
) -> Float[Tensor, "B P D"]:
    """Attention, then MLP: each reads a normalized copy of the residual stream and adds its result to the stream."""
    x = x + attention(norm1(x))
    return x + mlp(norm2(x))


class SiglipVisionEmbeddings(nn.Module):
    """Pixels → patch vectors plus learned position embeddings."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)
        self.position_embedding = nn.Embedding(config.num_image_tokens, config.hidden_size)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P D"]:
        size, channels = self.config.image_size, self.config.num_channels
        if pixel_values.shape[0] == 0 or tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"pixel_values must have shape [B, {channels}, {size}, {size}] for this vision tower, not "
                f"{list(pixel_values.shape)}. Prepare the images with the processor of the same checkpoint."
            )
        patches = embed_patches(pixel_values, self.patch_embedding.weight, self.patch_embedding.bias)
        return patches + self.position_embedding.weight


class SiglipAttention(nn.Module):
    """Every patch attends to every patch: there is no mask."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        # torch's CPU attention returns finite values for a row whose scores are all NaN: let NaN and infinity show.
        broken = 0 * (q.detach().mean() + k.detach().mean())
        return self.out_proj(bidirectional_attention(q, k, v, self.num_heads) + broken)


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, computed by the function above."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return layer_norm(x, self.weight, self.bias, self.eps)


class SiglipMLP(nn.Module):
    """Two linear layers with biases and a tanh-approximated GELU between them."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiglipEncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        return pre_norm_block(x, self.layer_norm1, self.self_attn, self.layer_norm2, self.mlp)


class SiglipEncoder(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        for layer in self.layers:
            x = layer(x)
        return x


class SiglipVisionTransformer(nn.Module):
    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.embeddings = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P D"]:
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class SiglipVisionModel(nn.Module):
    """The tower under the names of the hub's files, where every weight is under ``vision_model``."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P D"]:
        """Patch vectors, row by row from the top left, of images with values in [-1, 1] and ``image_size`` pixels."""
        return self.vision_model(pixel_values)


def init_linear(module: nn.Module) -> None:
    """Initialize a layer randomly: weights that preserve the variance of the input, and zero biases."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
