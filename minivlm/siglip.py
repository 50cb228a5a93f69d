"""SigLIP's vision tower: a picture becomes a sequence of patch vectors.

    B batch · C colors · H, W pixels · h, w pixels of a patch · P patches · D width · N heads · d width of a head

A picture is cut into square patches; each is projected to a vector and told where it stands; then every patch looks at
every other, layer by layer. The layers are *pre-norm*: each block reads a normalized copy of the stream and adds its
result to the stream itself. (Only the very last LayerNorm has "post" in its name.) There is no [class] token and no
pooling: PaliGemma's decoder receives all P vectors.

Sources: "Sigmoid Loss for Language Image Pre-Training" (arXiv:2303.15343); big_vision ``models/vit.py``; parameter
names as in transformers ``models/siglip/modeling_siglip.py``.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minivlm.config import SiglipVisionConfig

# --- the pieces ----------------------------------------------------------------------------------------------------


def patchify(pixel_values: Float[Tensor, "B C H W"], patch_size: int) -> Float[Tensor, "B P Chw"]:
    """Cut into square patches, row by row from the top left, each laid out in one line: color, row, column."""
    return F.unfold(pixel_values, patch_size, stride=patch_size).transpose(1, 2)


def embed_patches(
    pixel_values: Float[Tensor, "B C H W"], weight: Float[Tensor, "D C h w"], bias: Float[Tensor, " D"]
) -> Float[Tensor, "B P D"]:
    """Every patch times the same matrix, plus a bias. It is the convolution whose stride is the size of its kernel."""
    return F.linear(patchify(pixel_values, weight.shape[-1]), weight.flatten(1), bias)


def layer_norm(
    x: Float[Tensor, "*B D"], weight: Float[Tensor, " D"], bias: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*B D"]:
    """Each vector to mean 0 and variance 1 (divided by D), then a scale and a shift of each of its D numbers."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def bidirectional_attention(
    q: Float[Tensor, "B Q D"], k: Float[Tensor, "B P D"], v: Float[Tensor, "B P D"], num_heads: int
) -> Float[Tensor, "B Q D"]:
    """Every query takes a weighted mean over all P patches, in each head of d = D / N numbers its own: no mask."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B, N, Q or P, d]
    out = F.scaled_dot_product_attention(q, k, v)  # scale d ** -0.5
    return out.transpose(1, 2).flatten(2)


def pre_norm_block(
    x: Float[Tensor, "B P D"], norm1: Callable, attention: Callable, norm2: Callable, mlp: Callable
) -> Float[Tensor, "B P D"]:
    """Twice the same: what a normalized copy of the stream gives is added to the stream itself."""
    x = x + attention(norm1(x))
    return x + mlp(norm2(x))


# --- the tower -----------------------------------------------------------------------------------------------------


class SiglipVisionEmbeddings(nn.Module):
    """Pixels → patch vectors + learned positions."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(config.num_image_tokens, config.hidden_size)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P D"]:
        size, channels = self.config.image_size, self.config.num_channels
        if tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"pixel_values must be [B, {channels}, {size}, {size}] for this tower, not {list(pixel_values.shape)}: "
                "let the processor of the same checkpoint prepare the pictures."
            )
        patches = embed_patches(pixel_values, self.patch_embedding.weight, self.patch_embedding.bias)
        return patches + self.position_embedding.weight


class SiglipAttention(nn.Module):
    """Every patch looks at every patch: no mask."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        return self.out_proj(bidirectional_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads))


class LayerNorm(nn.LayerNorm):
    """torch's, as the function above."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return layer_norm(x, self.weight, self.bias, self.eps)


class SiglipMLP(nn.Module):
    """Two biased layers with a tanh-approximated GELU between them."""

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
    """The tower as the hub's files name it: everything under ``vision_model``."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = SiglipVisionTransformer(config)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P D"]:
        """Patch vectors, row by row from the top left.

        Args:
            pixel_values: pictures in [-1, 1], channels first, ``image_size`` pixels square.

        Raises:
            ValueError: the pictures have another size than the tower was built for.
        """
        return self.vision_model(pixel_values)


def init_linear(module: nn.Module) -> None:
    """Random start for a layer: weights that keep the variance of their input, biases zero."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
