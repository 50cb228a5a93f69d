"""Gemma: embeddings in, logits of the next token out. One code for Gemma 1 and Gemma 2; the config selects which.

    B batch size · T tokens (queries) · S tokens (keys) · D hidden size · F intermediate size of the MLP
    V vocabulary size · H query heads · K key/value heads · d head dimension

Specific to Gemma: RMSNorm multiplies by (1 + w). Token embeddings are multiplied by √D. The MLP is gated by a GELU.
Positions enter as rotations of queries and keys. Many query heads share a few key/value heads. The output head is the
embedding table. Gemma 2 adds soft caps, a second norm after attention and MLP, and a sliding window on even layers.

Sources: "Gemma" (arXiv:2403.08295), "Gemma 2" (arXiv:2408.00118); RoPE arXiv:2104.09864; multi-query attention
arXiv:1911.02150; GeGLU arXiv:2002.05202. Parameter names as in transformers ``models/gemma*/modeling_gemma*.py``.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm import masks
from minivlm.cache import Cache
from minivlm.config import GemmaConfig


def rms_norm(x: Float[Tensor, "*B D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "*B D"]:
    """x / √(mean(x²) + eps) · (1 + weight), computed in float32, then cast back to the dtype of x."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).type_as(x)


def check_ids(ids: Int[Tensor, "*B"], vocab_size: int) -> None:
    """Raise ValueError for an id that has no row in the embedding table."""
    if masks.is_any((ids < 0) | (ids >= vocab_size)):
        raise ValueError(f"token ids must be from 0 to {vocab_size - 1}, not from {ids.min()} to {ids.max()}.")


class GemmaRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))  # 0 means "times 1"

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return rms_norm(x, self.weight, self.eps)


def token_positions(attention_mask: Int[Tensor, "B S"], queries: int) -> Int[Tensor, "B _"]:
    """Positions of the last ``queries`` tokens. Each row counts its tokens from 1 and skips padding.

    ``attention_mask`` is 1 on tokens, 0 on padding, and includes the tokens in the cache.
    """
    return attention_mask.cumsum(-1)[:, -queries:]


def rotary_table(
    positions: Int[Tensor, "B T"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T d"]]:
    """Cosine and sine of the RoPE angles, in float32. Pair i of a head rotates by position · theta^(-2i/d).

    A pair is (i, i + d/2), one dimension from each half of the head, so every angle appears twice.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(
    x: Float[Tensor, "B H T d"], cos: Float[Tensor, "#B T d"], sin: Float[Tensor, "#B T d"]
) -> Float[Tensor, "B H T d"]:
    """Rotate each pair (x_i, x_{i+d/2}) by its angle. The halves are split, not interleaved."""
    first, second = x.chunk(2, dim=-1)
    quarter_turn = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + quarter_turn * sin[:, None]


def soft_cap(x: Float[Tensor, "*S"], cap: float | None) -> Float[Tensor, "*S"]:
    """cap · tanh(x / cap): close to x for small x, never beyond ±cap. ``None`` returns x unchanged."""
    return x if cap is None else cap * torch.tanh(x / cap)


def attention_weights(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    mask: Bool[Tensor, "#B T S"] | None,
    scale: float,
    cap: float | None = None,
) -> Float[Tensor, "B H T S"]:
    """Softmax of cap(q·k · scale) over the keys, computed in float32. Weights are 0 where the mask blocks.

    Each key head serves H/K consecutive query heads. They are laid out along the query axis, so keys are never copied.
    """
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    scores = soft_cap(q.reshape(B, K, H // K * T, d) @ k.transpose(2, 3) * scale, cap).view(B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32)


def grouped_query_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S d"],
    mask: Bool[Tensor, "#B T S"] | None,
    scale: float,
    cap: float | None = None,
) -> Float[Tensor, "B H T d"]:
    """``attention_weights`` times v. Each key/value head serves H/K consecutive query heads.

    Without a cap this is torch's fused attention, which never stores the weights. Keys and values are never copied.
    """
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    if cap is not None:
        weights = attention_weights(q, k, mask, scale, cap).type_as(q)
        return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, d)
    if mask is not None:
        mask = mask[:, None].repeat(1, 1, H // K, 1)  # [B, 1, H/K·T, S]
    q = q.reshape(B, K, H // K * T, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).view(B, H, T, d)


class GemmaAttention(nn.Module):
    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.config, self.layer, self.scale = config, layer, config.query_pre_attn_scalar**-0.5
        D, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, D, bias=False)

    def project(self, x: Float[Tensor, "B T D"], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, d], keys and values [B, K, T, d]. Queries and keys are rotated."""
        q, k, v = (
            proj(x).view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = cos.type_as(q), sin.type_as(q)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        cos: Float[Tensor, "#B T d"],
        sin: Float[Tensor, "#B T d"],
        mask: Bool[Tensor, "#B T S"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        q, k, v = self.project(x, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        out = grouped_query_attention(q, k, v, mask, self.scale, self.config.attn_logit_softcapping)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def geglu(gate: Float[Tensor, "*B F"], up: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
    """GELU(gate) · up, with the tanh approximation of GELU: one projection gates the other."""
    return F.gelu(gate, approximate="tanh") * up


class GemmaMLP(nn.Module):
    """Two projections to the intermediate size F, combined by GeGLU, and one projection back to D."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class GemmaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Gemma 2 also normalizes each result before adding it.

    Misleading hub names: ``post_attention_layernorm`` is before the MLP in Gemma 1, after attention in Gemma 2.
    """

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.has_post_norms = config.has_post_norms
        self.self_attn = GemmaAttention(config, layer)
        self.mlp = GemmaMLP(config)
        names = ["input_layernorm", "post_attention_layernorm"]
        if config.has_post_norms:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            self.add_module(name, GemmaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Float[Tensor, "B T D"], cos, sin, mask, cache: Cache | None) -> Float[Tensor, "B T D"]:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        if not self.has_post_norms:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaModel(nn.Module):
    """The decoder without its output head: embeddings in, hidden states out."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GemmaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = GemmaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """Token embeddings × √D. The factor is rounded to the dtype of the weights: in bfloat16, √2048 is 45.25."""
        check_ids(input_ids, self.config.vocab_size)
        x = self.embed_tokens(input_ids)
        return x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        attention_mask: Int[Tensor, "B S"],
        token_type_ids: Int[Tensor, "B S"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm.

        Args:
            x: Embeddings of the T newest tokens.
            attention_mask: 1 on tokens, 0 on padding, for all S tokens: those in the cache, then the newest.
            token_type_ids: 0 on image and prefix, 1 on the suffix, for the same S tokens.
            cache: Extended in place by T tokens.
        """
        T = x.shape[1]
        full, sliding = masks.attention_masks(attention_mask, token_type_ids, T, self.config.sliding_window)
        return self.run_layers(x, token_positions(attention_mask, T), full, sliding, cache)

    def run_layers(
        self,
        x: Float[Tensor, "B T D"],
        positions: Int[Tensor, "B T"],
        full: Bool[Tensor, "#B T S"] | None,
        sliding: Bool[Tensor, "#B T S"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        """The rest of ``forward``, given the positions and the masks of full and of sliding layers."""
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, full if self.config.window(i) is None else sliding, cache)
        return self.norm(x)


class GemmaForCausalLM(nn.Module):
    """The decoder with its output head, which reuses the embedding table."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)

    def logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """One logit per vocabulary entry. Gemma 2 caps them."""
        scores, cap = F.linear(hidden, self.model.embed_tokens.weight), self.config.final_logit_softcapping
        return scores if cap is None else soft_cap(scores, cap) + 0 * scores.detach().mean()  # or a cap hides infinity
