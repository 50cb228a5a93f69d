"""The attention weights of a forward pass, which the model's fused attention never stores.

    B batch size · H heads · T queries · S keys · P patches · N heads of the vision tower

Forward hooks read the inputs of each attention layer and compute its weights from them with the model's own functions.
"""

from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from minivlm.cache import Cache
from minivlm.gemma import attention_weights
from minivlm.paligemma import PaliGemma
from minivlm.siglip import split_heads


@torch.no_grad()
def decoder_attention(model: PaliGemma, **inputs: Tensor | Cache) -> list[Float[Tensor, "B H T S"]]:
    """Weights of every decoder layer: each row sums to 1 and is 0 where the mask blocks.

    ``inputs`` are those of ``model(...)``. A ``cache`` is extended as usual. The queries are then the new tokens, and
    the keys are all tokens.
    """
    weights = []

    def record(attention, arguments, output):
        x, cos, sin, mask, cache = arguments
        q, k, v = attention.project(x, cos, sin)
        if cache is not None:  # the layer has stored k and v already: adding no token returns all keys
            k, _ = cache.update(attention.layer, k[:, :, :0], v[:, :, :0])
        weights.append(attention_weights(q, k, mask, attention.scale, attention.config.attn_logit_softcapping))

    with ExitStack() as hooks:
        for layer in model.language_model.model.layers:
            hooks.callback(layer.self_attn.register_forward_hook(record).remove)
        model.hidden_states(**inputs)
    return weights


@torch.no_grad()
def tower_attention(model: PaliGemma, pixel_values: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B N P P"]]:
    """Weights of every layer of the vision tower: how much each patch (query) takes from each patch (key)."""
    weights = []

    def record(attention, arguments, output):
        (x,) = arguments
        q, k = (split_heads(proj(x), attention.num_heads) for proj in (attention.q_proj, attention.k_proj))
        weights.append(attention_weights(q, k, None, q.shape[-1] ** -0.5))

    with ExitStack() as hooks:
        for layer in model.vision_tower.vision_model.encoder.layers:
            hooks.callback(layer.self_attn.register_forward_hook(record).remove)
        model.vision_tower(pixel_values.to(model.dtype))
    return weights
