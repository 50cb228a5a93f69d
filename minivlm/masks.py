"""Which token attends to which: boolean attention masks ``mask[query, key]``, True where the query attends to the key.

    B batch size · T tokens (queries) · S tokens (keys)

PaliGemma needs one rule (big_vision ``models/proj/paligemma/paligemma.py``, ``make_attn_mask``). Every token has a
``mask_ar``: 0 if it joins the block of the previous token, 1 if it starts a new block. Then

    query attends to key   ⟺   cumsum(mask_ar)[key] <= cumsum(mask_ar)[query]   and the key is not padding.

All zeros: bidirectional. All ones: causal. Zeros on image and prefix, ones on the suffix: prefix-LM.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def block_mask(mask_ar: Int[Tensor, "*B T"]) -> Bool[Tensor, "*B T T"]:
    """The cumulative-sum rule. ``mask_ar`` is 0 or 1 per token; the result is indexed [query, key]."""
    block = mask_ar.cumsum(-1)
    return block[..., None, :] <= block[..., :, None]


def causal_mask(length: int) -> Bool[Tensor, "T T"]:
    """Each token attends to itself and to earlier tokens."""
    return block_mask(torch.ones(length, dtype=torch.long))


def bidirectional_mask(length: int) -> Bool[Tensor, "T T"]:
    """Every token attends to every token."""
    return block_mask(torch.zeros(length, dtype=torch.long))


def prefix_lm_mask(token_type_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T T"]:
    """Image and prefix (type 0) are bidirectional. The suffix (type 1) is causal and attends to the whole prefix."""
    return block_mask(token_type_ids)


def padding_mask(attention_mask: Int[Tensor, "B S"]) -> Bool[Tensor, "B 1 S"]:
    """No query attends to padding. ``attention_mask`` is 1 on tokens, 0 on padding. Broadcasts over the queries."""
    return attention_mask.bool()[:, None, :]


def sliding_window_mask(length: int, window: int) -> Bool[Tensor, "T T"]:
    """Allows keys fewer than ``window`` steps before the query (the query itself is 0 steps) and all keys after it."""
    if window < 1:
        raise ValueError(f"window must be at least 1 (the token itself), not {window}.")
    position = torch.arange(length)
    return position[:, None] - position[None, :] < window


def mask_padding(mask: Bool[Tensor, "#B T S"], attention_mask: Int[Tensor, "B S"]) -> Bool[Tensor, "B T S"]:
    """Block all padding keys, except that each of the T queries, which are the last T tokens, still attends to itself.

    Without this exception a padding query could have no key at all, for example under a causal mask with left padding,
    and the softmax over no keys is NaN.
    """
    T, S = mask.shape[1:]
    key = torch.arange(S, device=mask.device)
    is_self = key[S - T :, None] == key
    return (mask & padding_mask(attention_mask)) | is_self


def attention_masks(
    attention_mask: Int[Tensor, "B S"], token_type_ids: Int[Tensor, "B S"], queries: int, window: int | None
) -> tuple[Bool[Tensor, "#B T S"] | None, Bool[Tensor, "#B T S"] | None]:
    """The masks of one forward pass, for full and for sliding layers. The queries are the last ``queries`` of S tokens.

    ``None`` means that no key is blocked, so attention can skip the mask. The window never applies within the prefix:
    as in transformers' ``create_sliding_window_causal_mask``, prefix tokens attend to each other at any distance.
    A padding query attends to itself, since a row without keys has no softmax. Its output is never used.
    """
    S, device = attention_mask.shape[1], attention_mask.device
    if queries == 1:  # every other token is before it: no S × S mask is needed
        return _none_if_all_visible(*newest_token_masks(attention_mask, S - 1, window))
    visible = prefix_lm_mask(token_type_ids)[:, S - queries :]
    full = mask_padding(visible, attention_mask)
    if window is None or window >= S:
        return _none_if_all_visible(full, full)
    near = sliding_window_mask(S, window).to(device)[S - queries :]
    prefix = token_type_ids == 0
    both_prefix = prefix[:, S - queries :, None] & prefix[:, None, :]
    sliding = mask_padding(visible & (near | both_prefix), attention_mask)
    return _none_if_all_visible(full, sliding)


def newest_token_masks(
    attention_mask: Int[Tensor, "B S"], slot: int | Int[Tensor, "1"], window: int | None
) -> tuple[Bool[Tensor, "B 1 S"], Bool[Tensor, "B 1 S"]]:
    """The masks of a decode step, for full and for sliding layers: one query, the token in slot ``slot`` of S.

    Both the eager and the compiled decode step call this. ``attention_mask`` must be 0 after ``slot``.
    """
    S = attention_mask.shape[1]
    key = torch.arange(S, device=attention_mask.device)
    full = padding_mask(attention_mask) | (key == slot)
    return full, full if window is None or window >= S else full & (slot - key < window)


def is_any(condition: Bool[Tensor, "*S"]) -> bool:
    """True if any value is. False while torch exports or compiles, since a graph cannot depend on values."""
    return not torch.compiler.is_compiling() and bool(condition.any())


def _none_if_all_visible(full: Bool[Tensor, "B T S"], sliding: Bool[Tensor, "B T S"]) -> tuple[Tensor | None, ...]:
    if torch.compiler.is_compiling() or is_any(
        ~full
    ):  # then the sliding mask, which allows no more, blocks something too
        return full, sliding
    return None, sliding if is_any(~sliding) else None
