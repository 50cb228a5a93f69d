"""Masks from outside the explorer: a learner's function, or what a model of transformers does.

T queries · S keys, which are all tokens
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from minivlm import masks
from minivlm.course.viz.text import listed
from minivlm.course.viz.tokens import Token


class Seen(Exception):
    """Ends a forward pass as soon as a layer has received its mask."""


def arguments(tokens: list[Token], window: int) -> dict[str, Any]:
    """What a mask function can ask for, by the names of its parameters. Tensors are [1, T] and [1, T, T]."""
    kinds = [token.kind for token in tokens]
    types = torch.tensor([[kind == "suffix" for kind in kinds]]).long()
    return {
        "token_type_ids": types,
        "mask_ar": types.clone(),
        "attention_mask": torch.tensor([[kind != "padding" for kind in kinds]]).long(),
        "is_image": torch.tensor([[kind == "image" for kind in kinds]]).long(),
        "mask": masks.prefix_lm_mask(types),
        "length": len(kinds),
        "window": window,
    }


def parameters_of(function: Callable) -> dict[str, str]:
    """The parameters that a function needs, and for each the argument that it gets.

    Raises:
        ValueError: If it needs an argument that the explorer does not have.
    """
    known = arguments([Token("", "prefix")], 1)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = [p for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    needed = {p.name: p.name for p in found if p.name in known or p.default is inspect.Parameter.empty}
    if len(needed) == 1 and not needed.keys() & known.keys():
        return dict.fromkeys(needed, "token_type_ids")
    if unknown := [name for name in needed if name not in known]:
        raise ValueError(
            f"{name_of(function)} has the parameter {unknown[0]!r}, which the explorer cannot fill. "
            f"Name it one of {listed(known)}."
        )
    return needed


def name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def reference_mode(function: Callable) -> str:
    """The mode of the explorer that the mask is compared with."""
    try:
        return "sliding" if "window" in parameters_of(function).values() else "prefix-lm"
    except ValueError:  # call_mask says what is wrong
        return "prefix-lm"


def call_mask(function: Callable, tokens: list[Token], window: int) -> Bool[Tensor, "T T"]:
    """The mask that the model would use if the function were its own.

    A function that knows only the window is combined with the prefix-LM mask, and one that does not know the padding
    with ``mask_padding``, as ``masks.attention_masks`` does.

    Raises:
        ValueError: If the function raises anything or returns something else than a mask. One sentence says which.
    """
    name, wanted, given = name_of(function), parameters_of(function), arguments(tokens, window)
    values = {name: given[argument] for name, argument in wanted.items()}
    values = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
    try:
        mask = function(*values.values())
    except NotImplementedError:
        raise ValueError(f"{name} is not written yet.") from None
    except Exception as error:  # of any kind: it is the learner's code
        details = (str(error).strip() or "no details").split("\n")[0]
        raise ValueError(f"{name} stopped with {type(error).__name__}: {details}") from error
    mask = check_result(name, mask, len(tokens))
    if not {"token_type_ids", "mask_ar", "mask"} & set(wanted.values()):
        prefix = given["token_type_ids"][0] == 0
        mask = given["mask"][0] & (mask | (prefix[:, None] & prefix))
    if "attention_mask" not in wanted.values():
        mask = masks.mask_padding(mask[None], given["attention_mask"])[0]
    return mask


def check_result(name: str, mask: Any, length: int) -> Bool[Tensor, "T T"]:
    """What a mask function returned, without its batch axis, if it is a mask."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name} returned a {type(mask).__name__}, not a tensor.")
    if mask.shape not in ((1, length, length), (length, length)):
        raise ValueError(f"{name} returned the shape {list(mask.shape)}, not [1, {length}, {length}].")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} returned {mask.dtype}, not booleans: a comparison makes some.")
    return mask.detach().cpu().reshape(length, length)


def transformers_mask(model, layer: int = 0) -> Callable[..., Bool[Tensor, "1 T T"]]:
    """A mask function that asks a model of transformers which mask one of its decoder layers receives.

    The model's own forward pass builds it, up to that layer, from token types and padding. No token is embedded.

    Args:
        model: Any model with a decoder whose layers call their attention ``self_attn``.
        layer: Counted from 0. Matters if layers differ, as in Gemma 2 and 3.

    Raises:
        ValueError: If the model has no such layer.
    """
    layers = [m for name, m in model.named_modules() if name.endswith("self_attn") and "vision" not in name]
    if not 0 <= layer < len(layers):
        raise ValueError(f"{type(model).__name__} has {len(layers)} layers with self_attn: there is no layer {layer}.")
    text = model.config.get_text_config()

    def ask(token_type_ids, attention_mask, is_image):
        seen = []

        def stop(module, positional, keywords):
            seen.append(keywords.get("attention_mask"))
            raise Seen

        embeddings = torch.zeros(*attention_mask.shape, text.hidden_size, dtype=model.dtype, device=model.device)
        inputs = {"inputs_embeds": embeddings, "attention_mask": attention_mask.to(model.device), "use_cache": False}
        if "token_type_ids" in inspect.signature(model.forward).parameters:  # in Gemma 3, images are of type 1
            types = is_image if model.config.model_type.startswith("gemma3") else token_type_ids
            inputs["token_type_ids"] = types.to(model.device)
        run_until_seen(model, layers[layer], stop, inputs)
        if not seen or not isinstance(seen[0], Tensor):
            raise ValueError(f"layer {layer} of {type(model).__name__} received no mask as a tensor")
        mask = seen[0][:, 0]
        return mask if mask.dtype == torch.bool else mask == 0  # otherwise it is added to the scores

    ask.__name__ = type(model).__name__
    return ask


@torch.no_grad()
def run_until_seen(model, attention, hook: Callable, inputs: Mapping[str, Tensor]) -> None:
    """Runs the model with eager attention, which always has a mask, until the hook raises ``Seen``."""
    text = model.config.get_text_config()
    before, text._attn_implementation = text._attn_implementation, "eager"
    handle = attention.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(**inputs)
    except Seen:
        pass
    finally:
        handle.remove()
        text._attn_implementation = before
