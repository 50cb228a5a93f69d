"""Gemma: embeddings in, the next word out. Gemma 1 and Gemma 2 are one code, told apart by their configuration.

    B batch · T tokens (queries) · S tokens (keys) · D width · F width of the feed-forward block · V vocabulary
    H heads · K key/value heads · d width of a head

What is Gemma's own: RMSNorm multiplies by (1 + w); token embeddings are multiplied by √D; the feed-forward block is a
GELU gate; positions are rotations of queries and keys; a few key/value heads serve many query heads; the output head
is the embedding table itself. Gemma 2 adds soft caps, a second norm after each block, and a sliding window on even
layers.

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
    """x / √(mean(x²) + eps) · (1 + weight), computed in float32 and only then cast back."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.float())).type_as(x)


class GemmaRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))  # 0 means "times 1"

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return rms_norm(x, self.weight, self.eps)


def token_positions(attention_mask: Int[Tensor, "B S"], queries: int) -> Int[Tensor, "B _"]:
    """Positions of the last ``queries`` tokens: each one's number in its row, from 1, padding not counted.

    ``attention_mask`` is 1 on tokens, 0 on padding, for the tokens in the cache too.
    """
    return attention_mask.cumsum(-1)[:, -queries:]


def rotary_table(
    positions: Int[Tensor, "B T"], head_dim: int, theta: float
) -> tuple[Float[Tensor, "B T d"], Float[Tensor, "B T d"]]:
    """Cosine and sine of every position's angles. Pair i of a head turns by position · theta^(-2i/d), in float32.

    The pairs are (i, i + d/2), the two halves of the head, so each angle stands twice: once for either half.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions[..., None].float() * (1.0 / theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(
    x: Float[Tensor, "B H T d"], cos: Float[Tensor, "#B T d"], sin: Float[Tensor, "#B T d"]
) -> Float[Tensor, "B H T d"]:
    """Turns each pair (x_i, x_{i+d/2}) by its angle: the halves are split, not interleaved."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def soft_cap(x: Float[Tensor, "*S"], cap: float | None) -> Float[Tensor, "*S"]:
    """cap · tanh(x / cap): close to x while small, never beyond ±cap. ``None``: x as it is."""
    return x if cap is None else cap * torch.tanh(x / cap)


def grouped_query_attention(
    q: Float[Tensor, "B H T d"],
    k: Float[Tensor, "B K S d"],
    v: Float[Tensor, "B K S d"],
    mask: Bool[Tensor, "#B T S"] | None,
    scale: float,
    cap: float | None = None,
) -> Float[Tensor, "B H T d"]:
    """Softmax(cap(q·k · scale), where the mask allows) · v, each key/value head serving H/K consecutive query heads.

    The heads that share keys are laid one after another along the query axis, so that keys and values are never copied.
    The softmax runs in float32. Without a cap it is torch's fused attention, which never stores the scores.
    """
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    q = q.reshape(B, K, H // K * T, d)
    if mask is not None:
        mask = mask[:, None].repeat(1, 1, H // K, 1)  # [B, 1, H/K·T, S]
    if cap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = soft_cap(q @ k.transpose(2, 3) * scale, cap)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        out = scores.softmax(-1, dtype=torch.float32).type_as(q) @ v
    return out.view(B, H, T, d)


class GemmaAttention(nn.Module):
    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(D, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, D, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        cos: Float[Tensor, "#B T d"],
        sin: Float[Tensor, "#B T d"],
        mask: Bool[Tensor, "#B T S"] | None,
        cache: Cache | None,
    ) -> Float[Tensor, "B T D"]:
        B, T, _ = x.shape
        q, k, v = (
            proj(x).view(B, T, -1, self.config.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = cos.type_as(q), sin.type_as(q)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        scale = self.config.query_pre_attn_scalar**-0.5
        out = grouped_query_attention(q, k, v, mask, scale, self.config.attn_logit_softcapping)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


def geglu(gate: Float[Tensor, "*B F"], up: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
    """One projection, passed through tanh-approximated GELU, opens and closes the other."""
    return F.gelu(gate, approximate="tanh") * up


class GemmaMLP(nn.Module):
    """The feed-forward block: two projections to F numbers, joined by GeGLU, and one back."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class GemmaDecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); in Gemma 2 each result is normalized once more before it is added.

    The hub's names mislead: ``post_attention_layernorm`` stands before the MLP in Gemma 1, after attention in Gemma 2.
    """

    def __init__(self, config: GemmaConfig, layer: int):
        super().__init__()
        self.four_norms = config.four_norms
        self.self_attn = GemmaAttention(config, layer)
        self.mlp = GemmaMLP(config)
        names = ["input_layernorm", "post_attention_layernorm"]
        if config.four_norms:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for name in names:
            self.add_module(name, GemmaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: Float[Tensor, "B T D"], cos, sin, mask, cache: Cache | None) -> Float[Tensor, "B T D"]:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        if not self.four_norms:
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
        """Token embeddings × √D. The factor is rounded to the weights' type: in bfloat16, √2048 is 45.25."""
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
            x: embeddings of the T newest tokens.
            attention_mask: 1 on tokens, 0 on padding, for the newest tokens and those in the cache, S in all.
            token_type_ids: 0 on image and prefix, 1 on the suffix, likewise.
            cache: extended in place by T tokens.
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
        """The same, once it is known where each token stands and what it may see, in full and in sliding layers."""
        cos, sin = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, full if self.config.window(i) is None else sliding, cache)
        return self.norm(x)


class GemmaForCausalLM(nn.Module):
    """The decoder with its output head, which is the embedding table used a second time."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.model = GemmaModel(config)

    def logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Scores of every word of the vocabulary; Gemma 2 caps them."""
        return soft_cap(F.linear(hidden, self.model.embed_tokens.weight), self.config.final_logit_softcapping)
