"""The decode step as one compiled program: the same layers, of which no shape ever changes.

    B rows · M slots of the cache · K key/value heads · d width of a head · V vocabulary

A decode step is hundreds of small operations. Each costs more to start than to compute, on a small model or a fast GPU.
torch can compile them into a few, if every step is the same program: so the slot to fill is a number in a tensor,
attention reads all M slots of a static cache, and the mask closes those that are not filled yet.

What is left is reading the weights, once a token. For one row, the products of the libraries do not read as fast as the
memory gives; so a product with one row is written as a sum, which is compiled like all the rest.
"""

import functools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minivlm.cache import SlotCache, StaticCache
from minivlm.paligemma import PaliGemma

ROOM = 64  # slots of a cache are a multiple of this: a prompt a little longer needs no other program


def decode_step(
    model: PaliGemma,
    token: Int[Tensor, " B"],
    slot: Int[Tensor, "1"],
    real: Bool[Tensor, "B M"],
    keys: list[Float[Tensor, "B K M d"]],
    values: list[Float[Tensor, "B K M d"]],
) -> Float[Tensor, "B V"]:
    """Logits after ``token``, which is the one of slot ``slot``. ``real`` is False where a slot holds padding."""
    decoder, slots = model.language_model, torch.arange(real.shape[1], device=real.device)
    full = real & (slots <= slot)
    window = decoder.config.sliding_window
    sliding = full if window is None else full & (slot - slots < window)
    with SingleRowLinear():
        hidden = decoder.model.run_layers(
            decoder.model.embed(token[:, None]),
            full.sum(1, keepdim=True),  # the position: its number among the row's tokens, from 1
            full[:, None],
            sliding[:, None],
            SlotCache(keys, values, slot),
        )
        return decoder.logits(hidden)[:, 0]


class SingleRowLinear(TorchFunctionMode):
    """On a CPU, x · Wᵀ for a single row x is (W · x).sum(-1), added up in float32 or better."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[0].device.type == "cpu" and args[0].shape[:-1].numel() == 1:
            x, weight = args[:2]  # the decoder's layers have no bias
            exact = torch.promote_types(x.dtype, torch.float32)
            product = (weight.to(exact) * x.flatten().to(exact)).sum(-1)
            return product.to(x.dtype).view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


@functools.cache
def compiler(device: str):
    """``decode_step``, compiled when it is first called; on a GPU replayed as one recorded graph."""
    if device == "cpu":
        return torch.compile(decode_step, fullgraph=True, options={"cpp_wrapper": True})  # calls its loops from C++
    return torch.compile(decode_step, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)


class CompiledStep:
    """Logits of one token after another, behind a prompt of T tokens that ``cache`` will hold when it is first called.

    Raises:
        ValueError: torch cannot compile here.
    """

    def __init__(self, model: PaliGemma, cache: StaticCache, attention_mask: Int[Tensor, "B T"]):
        self.model, self.cache, self.slot = model, cache, attention_mask.shape[1]
        self.real = F.pad(attention_mask, (0, cache.max_length - self.slot), value=1).bool()
        for memory in cache.keys + cache.values:
            torch._dynamo.mark_static_address(memory)  # so that a recorded graph may write into it

    def __call__(self, token: Int[Tensor, " B"]) -> Float[Tensor, "B V"]:
        slot = torch.tensor([self.slot], device=token.device)
        self.slot += 1
        step = compiler(token.device.type)
        try:
            return step(self.model, token, slot, self.real, self.cache.keys, self.cache.values)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            why = str(error).strip().splitlines()[0]
            raise ValueError(
                f"torch cannot compile the decode step here ({why}): install a C++ compiler, or leave compile out."
            ) from error


def padded_length(length: int) -> int:
    """The slots of a cache that is to hold ``length`` tokens."""
    return math.ceil(length / ROOM) * ROOM
