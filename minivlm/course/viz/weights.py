"""The attention weights of a forward pass, which the model's fused attention never stores.

    B batch size · H heads · K key/value heads · T queries · S keys · P patches · N heads of the vision tower
    d head dimension

Forward hooks read the inputs of each attention layer and compute queries, keys, values and weights from them with the
model's own functions.
"""

from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from minivlm import gemma, siglip
from minivlm.cache import Cache
from minivlm.paligemma import PaliGemma


def decoder_parts(attention: gemma.GemmaAttention, inputs: tuple) -> dict[str, Tensor]:
    """What a layer that has just run used: q [B, H, T, d], k and v [B, K, S, d], weights [B, H, T, S].

    ``inputs`` are those of its ``forward``. With a cache, keys and values are all that it holds.
    """
    x, cos, sin, mask, cache = inputs
    q, k, v = attention.project(x, cos, sin)
    if cache is not None:  # the layer has stored k and v already: adding no token returns all
        k, v = cache.update(attention.layer, k[:, :, :0], v[:, :, :0])
    weights = gemma.attention_weights(q, k, mask, attention.scale, attention.config.attn_logit_softcapping)
    return {"q": q, "k": k, "v": v, "weights": weights}


def tower_parts(attention: siglip.SiglipAttention, inputs: tuple) -> dict[str, Tensor]:
    """What a layer of the vision tower used: q, k, v [B, N, P, d], weights [B, N, P, P]."""
    (x,) = inputs
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (siglip.split_heads(projection(x), attention.num_heads) for projection in projections)
    return {"q": q, "k": k, "v": v, "weights": gemma.attention_weights(q, k, None, q.shape[-1] ** -0.5)}


@torch.no_grad()
def decoder_attention(model: PaliGemma, **inputs: Tensor | Cache) -> list[Float[Tensor, "B H T S"]]:
    """Weights of every decoder layer: each row sums to 1 and is 0 where the mask blocks.

    ``inputs`` are those of ``model(...)``. A ``cache`` is extended as usual. The queries are then the new tokens, and
    the keys are all tokens.
    """
    weights = []

    def record(attention, arguments, output):
        weights.append(decoder_parts(attention, arguments)["weights"])

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
        weights.append(tower_parts(attention, arguments)["weights"])

    with ExitStack() as hooks:
        for layer in model.vision_tower.vision_model.encoder.layers:
            hooks.callback(layer.self_attn.register_forward_hook(record).remove)
        model.vision_tower(pixel_values.to(model.dtype))
    return weights
