"""The decode step as one compiled program: the same layers, with shapes that never change.

    B rows · M slots of the cache · K key/value heads · d head dimension · V vocabulary size

A decode step is hundreds of small operations. On a small model or a fast GPU, each costs more to launch than to
compute. torch can compile them into a few, provided that every step runs the same program. So the slot to fill is a
value in a tensor, attention reads all M slots of a static cache, and the mask blocks the slots that are not filled yet.

What remains is reading the weights once per token. With a single row, matrix multiplication in the usual libraries does
not reach the memory's bandwidth, so a product with one row is written as a sum, which is compiled like everything else.
"""

import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minivlm import gemma, masks
from minivlm.cache import SlotCache, StaticCache
from minivlm.paligemma import PaliGemma

SLOT_STEP = 64  # caches have a multiple of this many slots, so a slightly longer prompt needs no new program


def decode_step(
    model: PaliGemma,
    token: Int[Tensor, " B"],
    slot: Int[Tensor, "1"],
    is_token: Bool[Tensor, "B M"],
    keys: list[Float[Tensor, "B K M d"]],
    values: list[Float[Tensor, "B K M d"]],
) -> Float[Tensor, "B V"]:
    """Logits after ``token``, which goes into slot ``slot``. ``is_token`` is False where a slot holds padding."""
    decoder = model.language_model
    attention_mask = (is_token & (torch.arange(is_token.shape[1], device=slot.device) <= slot)).long()
    full, sliding = masks.newest_token_masks(attention_mask, slot, decoder.config.sliding_window)
    with SingleRowLinear():
        x = decoder.model.embed(token[:, None])
        positions = gemma.token_positions(attention_mask, 1)  # slots after this one count as padding
        hidden = decoder.model.run_layers(x, positions, full, sliding, SlotCache(keys, values, slot))
        return decoder.logits(hidden)[:, 0]


class SingleRowLinear(TorchFunctionMode):
    """On a CPU, computes x · Wᵀ + b for a single row x as (W · x).sum(-1) + b, summed in float32 or better."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (self.linear if func is F.linear else func)(*args, **(kwargs or {}))

    @staticmethod
    def linear(input, weight, bias=None):
        if input.device.type != "cpu" or input.shape[:-1].numel() != 1:
            return F.linear(input, weight, bias)
        exact = torch.promote_types(input.dtype, torch.float32)
        product = (weight.to(exact) * input.flatten().to(exact)).sum(-1)
        product = product if bias is None else product + bias.to(exact)
        return product.to(input.dtype).view(*input.shape[:-1], -1)


@functools.cache
def compiler(device: str):
    """``decode_step``, compiled on its first call. On a GPU it is recorded and replayed as one CUDA graph."""
    if device == "cpu":
        return torch.compile(decode_step, fullgraph=True, options={"cpp_wrapper": True})  # kernels launched from C++
    return torch.compile(decode_step, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)


class CompiledStep:
    """Runs compiled decode steps one after another. The first call expects the T prompt tokens in ``cache``.

    Raises:
        ValueError: On the first call, if torch cannot compile on this machine.
    """

    def __init__(self, model: PaliGemma, cache: StaticCache, attention_mask: Int[Tensor, "B T"]):
        self.model, self.cache, self.slot = model, cache, attention_mask.shape[1]
        self.is_token = F.pad(attention_mask, (0, cache.max_length - self.slot), value=1).bool()
        for memory in cache.keys + cache.values:
            torch._dynamo.mark_static_address(memory)  # so that a recorded graph can write into it

    def __call__(self, token: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        slot = torch.tensor([self.slot], device=token.device)
        self.slot += 1
        step = compiler(token.device.type)
        try:
            logits = step(self.model, token, slot, self.is_token, self.cache.keys, self.cache.values)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            why = str(error).strip().splitlines()[0]
            raise ValueError(
                f"torch cannot compile the decode step here ({why}). Install a C++ compiler, or leave compile out."
            ) from error
        return self.model.check_finite(logits)


def padded_length(length: int) -> int:
    """Number of slots of a cache for ``length`` tokens: the next multiple of ``SLOT_STEP``."""
    return math.ceil(length / SLOT_STEP) * SLOT_STEP
