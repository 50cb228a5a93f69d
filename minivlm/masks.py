"""Who may look at whom: attention masks as tables of booleans, ``mask[query, key]``, True where the query sees the key.

    B batch · T tokens (queries) · S tokens (keys)

PaliGemma's rule is one line (big_vision ``models/proj/paligemma/paligemma.py``, ``make_attn_mask``). Give every token a
``mask_ar``: 0 where it joins the block of the token before it, 1 where it starts a new one. Then

    query sees key   ⟺   cumsum(mask_ar)[key] <= cumsum(mask_ar)[query]   and the key is no padding.

All zeros: everyone sees everyone. All ones: causal. Zeros on image and prefix, ones on the suffix: prefix-LM.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def block_mask(mask_ar: Int[Tensor, "*B T"]) -> Bool[Tensor, "*B T T"]:
    """The cumulative-sum rule. ``mask_ar`` is 0 or 1 per token; the result is indexed [query, key]."""
    block = mask_ar.cumsum(-1)
    return block[..., None, :] <= block[..., :, None]


def causal_mask(length: int) -> Bool[Tensor, "T T"]:
    """Each token sees itself and what came before."""
    return block_mask(torch.ones(length, dtype=torch.long))


def bidirectional_mask(length: int) -> Bool[Tensor, "T T"]:
    """Everyone sees everyone."""
    return block_mask(torch.zeros(length, dtype=torch.long))


def prefix_lm_mask(token_type_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T T"]:
    """Image and prefix (type 0) see each other fully; the suffix (type 1) is causal and sees all of the prefix."""
    return block_mask(token_type_ids)


def padding_mask(attention_mask: Int[Tensor, "B S"]) -> Bool[Tensor, "B 1 S"]:
    """Nobody looks at padding. ``attention_mask`` is 1 on tokens, 0 on padding; any query broadcasts over it."""
    return attention_mask.bool()[:, None, :]


def sliding_window_mask(length: int, window: int) -> Bool[Tensor, "T T"]:
    """Keys fewer than ``window`` steps behind the query (itself is 0 steps), and every key ahead of it."""
    if window < 1:
        raise ValueError(f"window must be at least 1 (the token itself), not {window}.")
    position = torch.arange(length)
    return position[:, None] - position[None, :] < window


def mask_padding(mask: Bool[Tensor, "#B T S"], attention_mask: Int[Tensor, "B S"]) -> Bool[Tensor, "B T S"]:
    """The mask with every padding key closed, except that the last T tokens, which are the queries, see themselves.

    Without that exception a padding query could see nothing (in a causal mask, with padding in front): the softmax of
    nothing is NaN.
    """
    T, S = mask.shape[1:]
    key = torch.arange(S, device=mask.device)
    itself = key[S - T :, None] == key
    return (mask & padding_mask(attention_mask)) | itself


def attention_masks(
    attention_mask: Int[Tensor, "B S"],
    token_type_ids: Int[Tensor, "B S"],
    queries: int,
    window: int | None,
) -> tuple[Bool[Tensor, "#B T S"] | None, Bool[Tensor, "#B T S"] | None]:
    """The masks of one forward pass: (for full layers, for sliding layers), for the last ``queries`` of the S tokens.

    ``None`` stands for "everything is visible", which lets attention skip the mask. A window never cuts inside the
    prefix: as in transformers' ``create_sliding_window_causal_mask``, prefix tokens keep seeing each other at any
    distance. A padding query, which nobody reads, is left seeing itself: a row with no key has no softmax.
    """
    if queries == 1:
        return _newest_token_masks(attention_mask, window)
    S, device = attention_mask.shape[1], attention_mask.device
    visible = prefix_lm_mask(token_type_ids)[:, S - queries :]
    full = mask_padding(visible, attention_mask)
    if window is None or window >= S:
        return _none_if_open(full), _none_if_open(full)
    near = sliding_window_mask(S, window).to(device)[S - queries :]
    prefix = token_type_ids == 0
    both_prefix = prefix[:, S - queries :, None] & prefix[:, None, :]
    sliding = mask_padding(visible & (near | both_prefix), attention_mask)
    return _none_if_open(full), _none_if_open(sliding)


def _newest_token_masks(
    attention_mask: Int[Tensor, "B S"], window: int | None
) -> tuple[Bool[Tensor, "B 1 S"] | None, Bool[Tensor, "B 1 S"] | None]:
    """The same for the newest token of a suffix alone: all the others are before it, so no S × S table is needed."""
    full = (attention_mask != 0)[:, None]
    full[..., -1] = True
    if window is None or window >= full.shape[-1]:
        return (_none_if_open(full),) * 2
    sliding = full.clone()
    sliding[..., :-window] = False
    return _none_if_open(full), sliding


def _none_if_open(mask: Bool[Tensor, "B T S"]) -> Bool[Tensor, "B T S"] | None:
    return None if bool(mask.all()) else mask
