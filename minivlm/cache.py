"""The KV cache: what every layer has already computed for the tokens behind the one being written.

    B batch · K key/value heads · S tokens so far · T new tokens · M tokens that there is room for · d width of a head

Keys and values of a token never change once computed, since no later token may alter an earlier one: image and prefix
are complete before the first word is written, and the words are causal. Two kinds with one interface:

    keys, values = cache.update(layer, k, v)     # stores the new ones, returns all S + T
    cache.length                                  # tokens stored

``GrowingCache`` concatenates: simple, and copies everything for every token. ``StaticCache`` allocates once and
writes in place; ``SlotCache`` writes into one too, for compiled.py. Sizes in bytes: 2 (keys and values) × layers × K ×
d × tokens × bytes per number.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minivlm.config import GemmaConfig

Pair = tuple[Float[Tensor, "B K S d"], Float[Tensor, "B K S d"]]


def append(old: Float[Tensor, "B K S d"], new: Float[Tensor, "B K T d"]) -> Float[Tensor, "B K S+T d"]:
    """The new tokens behind the old ones, in a new tensor."""
    return torch.cat((old, new), dim=2)


def write_in_place(
    buffer: Float[Tensor, "B K M d"], new: Float[Tensor, "B K T d"], start: int
) -> Float[Tensor, "B K _ d"]:
    """Writes the new tokens into the buffer, the first at slot ``start``; returns a view of all filled slots."""
    end = start + new.shape[2]
    buffer[:, :, start:end] = new
    return buffer[:, :, :end]


class GrowingCache:
    """One tensor of keys and one of values per layer, longer after every update."""

    def __init__(self):
        self.layers: list[Pair] = []

    @property
    def length(self) -> int:
        """Tokens that the last layer has stored: the others are ahead of it only during a forward pass."""
        return self.layers[-1][0].shape[2] if self.layers else 0

    def update(self, layer: int, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"]) -> Pair:
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            keys, values = self.layers[layer]
            self.layers[layer] = (append(keys, k), append(values, v))
        return self.layers[layer]


class StaticCache:
    """Room for ``max_length`` tokens, allocated once; an update writes into it and returns a view of what is filled."""

    def __init__(self, config: GemmaConfig, batch_size: int, max_length: int, dtype=torch.float32, device="cpu"):
        self.max_length, layers = max_length, range(config.num_hidden_layers)
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        # zeros: no NaN where attention is told not to look
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in layers] for _ in range(2))
        self.filled = [0 for _ in layers]

    @property
    def length(self) -> int:
        return self.filled[-1]

    def update(self, layer: int, k: Float[Tensor, "B K T d"], v: Float[Tensor, "B K T d"]) -> Pair:
        start, end = self.filled[layer], self.filled[layer] + k.shape[2]
        if end > self.max_length:  # torch would drop a single token that does not fit, and say nothing
            raise ValueError(f"the cache holds {self.max_length} tokens and {end} are needed: make it longer.")
        self.filled[layer] = end
        return write_in_place(self.keys[layer], k, start), write_in_place(self.values[layer], v, start)


class SlotCache:
    """Writes one token's keys and values into slot ``slot`` and returns all M slots, filled or not."""

    def __init__(
        self, keys: list[Float[Tensor, "B K M d"]], values: list[Float[Tensor, "B K M d"]], slot: Int[Tensor, "1"]
    ):
        self.keys, self.values, self.slot = keys, values, slot

    def update(self, layer: int, k: Float[Tensor, "B K 1 d"], v: Float[Tensor, "B K 1 d"]) -> Pair:
        return self.keys[layer].index_copy_(2, self.slot, k), self.values[layer].index_copy_(2, self.slot, v)


Cache = GrowingCache | StaticCache | SlotCache


def cache_bytes(config: GemmaConfig, tokens: int, batch_size: int = 1, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a cache of ``tokens`` tokens: 18 KB a token for PaliGemma 3B in bfloat16, 106 KB for PaliGemma 2 3B."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return per_token * tokens * batch_size
