"""The attention weights that a model really used, which its fused attention never stores.

B rows · H heads · T queries · S keys · P patches · D width · N heads of the tower
"""

from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from minivlm import gemma
from minivlm.paligemma import PaliGemma


@torch.no_grad()
def decoder_attention(model: PaliGemma, **inputs: Tensor) -> list[Float[Tensor, "B H T S"]]:
    """Weights of every decoder layer for one forward pass: rows of probabilities, 0 where the mask forbids.

    ``inputs`` are those of ``model(...)``: input_ids, pixel_values, attention_mask, token_type_ids.
    """
    weights = []
    attend = gemma.grouped_query_attention

    def recording(q, k, v, mask, scale, cap=None):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = gemma.soft_cap(q @ keys.transpose(2, 3) * scale, cap)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        weights.append(scores.softmax(-1, dtype=torch.float32))
        return attend(q, k, v, mask, scale, cap)

    with patch.object(gemma, "grouped_query_attention", recording):
        model.hidden_states(**inputs)
    return weights


@torch.no_grad()
def tower_attention(model: PaliGemma, pixel_values: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B N P P"]]:
    """Weights of every layer of the vision tower: how much each patch (query) takes from each patch (key)."""
    weights = []

    def record(attention, inputs, _):
        (x,) = inputs
        B, P, D = x.shape
        heads = (B, P, attention.num_heads, D // attention.num_heads)
        q, k = (project(x).view(heads).transpose(1, 2) for project in (attention.q_proj, attention.k_proj))
        weights.append((q @ k.transpose(2, 3) * heads[-1] ** -0.5).softmax(-1, dtype=torch.float32))

    layers = model.vision_tower.vision_model.encoder.layers
    hooks = [layer.self_attn.register_forward_hook(record) for layer in layers]
    try:
        model.vision_tower(pixel_values.to(model.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return weights
