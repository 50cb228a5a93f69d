"""The KV cache: keys and values already computed by each layer, so a decode step only computes those of the new token.

    B batch size · K key/value heads · S tokens stored · T new tokens · M slots of the cache · d head dimension

A token's keys and values never change once computed, because no later token influences an earlier one: image and prefix
are complete before the first answer token, and the answer is causal. Two kinds of cache share one interface:

    keys, values = cache.update(layer, k, v)     # stores the new ones, returns all S + T
    cache.length                                  # number of tokens stored
    cache.reset()                                 # forgets them, before another image or prompt

``GrowingCache`` concatenates, which is simple but copies everything for every token. ``StaticCache`` allocates once and
writes in place. ``SlotCache`` writes into the tensors of a static cache for compiled.py. Size in bytes: 2 (keys and
values) × layers × K × d × tokens × bytes per value.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minivlm.config import GemmaConfig

Pair = tuple[Float[Tensor, "B K S d"], Float[Tensor, "B K S d"]]


def append(old: Float[Tensor, "B K S d"], new: Float[Tensor, "B K T d"]) -> Float[Tensor, "B K S+T d"]:
    """The old tokens followed by the new ones, in a new tensor."""
    return torch.cat((old, new), dim=2)


def write_in_place(
    buffer: Float[Tensor, "B K M d"], new: Float[Tensor, "B K T d"], start: int
) -> Float[Tensor, "B K _ d"]:
    """Write the new tokens into the buffer, starting at slot ``start``, and return a view of the filled slots."""
    end = start + new.shape[2]
    buffer[:, :, start:end] = new
    return buffer[:, :, :end]


class GrowingCache:
    """One tensor of keys and one of values per layer. Every update replaces them by longer ones."""

    def __init__(self):
        self.layers: list[Pair] = []

    def reset(self) -> None:
        self.layers.clear()

    @property
    def length(self) -> int:
        """Number of tokens in the last layer. Only during a forward pass do earlier layers hold more."""
        return self.layers[-1][0].shape[2] if self.layers else 0

    def update(self, layer: int, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"]) -> Pair:
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            keys, values = self.layers[layer]
            _check_rows(keys, k)
            self.layers[layer] = (append(keys, k), append(values, v))
        return self.layers[layer]


class StaticCache:
    """Preallocates ``max_length`` slots. ``update`` writes in place and returns a view of the filled slots."""

    def __init__(self, config: GemmaConfig, batch_size: int, max_length: int, dtype=torch.float32, device="cpu"):
        self.max_length, layers = max_length, range(config.num_hidden_layers)
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        # zeros, because a NaN in a masked slot would still reach the output: 0 · NaN is NaN
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in layers] for _ in range(2))
        self.reset()

    def reset(self) -> None:
        self.filled = [0 for _ in self.keys]

    @property
    def length(self) -> int:
        return self.filled[-1]

    def update(self, layer: int, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"]) -> Pair:
        start, end = self.filled[layer], self.filled[layer] + k.shape[2]
        _check_rows(self.keys[layer], k)
        if end > self.max_length:  # torch would silently drop a single token that does not fit
            raise ValueError(f"the cache has {self.max_length} slots but {end} are needed. Increase max_length.")
        self.filled[layer] = end
        return write_in_place(self.keys[layer], k, start), write_in_place(self.values[layer], v, start)


def _check_rows(stored: Float[Tensor, "B K S d"], new: Float[Tensor, "R K T d"]) -> None:
    if (rows := stored.shape[0], stored.dtype) != (new.shape[0], new.dtype):  # torch would silently broadcast or cast
        raise ValueError(f"the cache is for {rows} rows of {stored.dtype}, not {len(new)} of {new.dtype}.")


class SlotCache:
    """Writes the keys and values of one token into slot ``slot`` and returns all M slots, filled or not."""

    def __init__(
        self, keys: list[Float[Tensor, "B K M d"]], values: list[Float[Tensor, "B K M d"]], slot: Int[Tensor, "1"]
    ):
        self.keys, self.values, self.slot = keys, values, slot

    def update(self, layer: int, k: Float[Tensor, "B K 1 d"], v: Float[Tensor, "B K 1 d"]) -> Pair:
        return self.keys[layer].index_copy_(2, self.slot, k), self.values[layer].index_copy_(2, self.slot, v)


Cache = GrowingCache | StaticCache | SlotCache


def cache_bytes(config: GemmaConfig, tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """Size of a full cache in bytes. Per token in bfloat16: 18 KB for PaliGemma 3B, 106 KB for PaliGemma 2 3B."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return per_token * tokens * batch_size
