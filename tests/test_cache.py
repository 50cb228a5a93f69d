"""cache.py: with any cache, and however the sequence is split, the logits equal those of one pass without a cache."""

import pytest
import torch
from conftest import random_batch, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from minivlm.cache import GrowingCache, StaticCache, cache_bytes
from minivlm.config import GEMMA2_DEFAULTS, GemmaConfig

CACHES = {
    "growing": lambda config, batch_size, length: GrowingCache(),
    "static": lambda config, batch_size, length: StaticCache(config, batch_size, length),
    "static with spare slots": lambda config, batch_size, length: StaticCache(config, batch_size, length + 7),
}
all_caches = pytest.mark.parametrize("new_cache", CACHES.values(), ids=CACHES.keys())


def in_pieces(model, batch, cache, cuts: list[int]) -> torch.Tensor:
    """Logits of a batch that goes through the model in several calls, split at ``cuts``."""
    T = batch["input_ids"].shape[1]
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, T], strict=True):
        assert cache.length == start
        inputs = {"pixel_values": batch["pixel_values"]} if start == 0 else {}
        for name in ("attention_mask", "token_type_ids"):
            inputs[name] = batch[name][:, :end]
        pieces.append(model(batch["input_ids"][:, start:end], cache=cache, **inputs))
    assert cache.length == T
    return torch.cat(pieces, dim=1)


@all_caches
@given(data=st.data())
@settings(max_examples=12)
def test_splitting_the_suffix_changes_nothing(model, new_cache, data):
    side = data.draw(st.sampled_from(["left", "right"]), label="side")
    prefixes, suffixes = data.draw(st.sampled_from([([4], [9]), ([8, 2, 5], [3, 9, 8])]), label="prefixes, suffixes")
    batch = random_batch(model.config, prefixes, suffixes, side, seed=data.draw(st.integers(0, 99)))
    prefix = (batch["attention_mask"] * (1 - batch["token_type_ids"])).nonzero()[:, 1].max().item() + 1
    T = batch["input_ids"].shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(prefix, T - 1)), label="cuts"))
    with torch.no_grad():
        whole = model(**batch)
        pieces = in_pieces(model, batch, new_cache(model.config.text_config, len(prefixes), T), cuts)
    real = batch["attention_mask"].bool()
    assert relative_error(pieces[real], whole[real]) <= 1e-5


@all_caches
def test_masks_and_types_are_optional(model, new_cache):
    """As in generation: the prompt, then single tokens, without any other input."""
    batch = random_batch(model.config, [6, 6], [5, 5])
    with torch.no_grad():
        whole = model(**batch)
        cache = new_cache(model.config.text_config, 2, whole.shape[1])
        pieces = [model(batch["input_ids"][:, :16], pixel_values=batch["pixel_values"], cache=cache)]
        pieces += [model(token, cache=cache) for token in batch["input_ids"][:, 16:].split(1, dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), whole) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_cannot_be_split(model, side):
    batch = random_batch(model.config, [6, 4], [3, 5], side)
    for cut in range(10, 15):  # after <bos>, in the longest prefix
        with pytest.raises(ValueError, match="the prefix cannot be split"), torch.no_grad():
            in_pieces(model, batch, GrowingCache(), [cut])


@all_caches
def test_a_used_cache_takes_no_other_image(model, new_cache):
    """Not as pixels, not as features, not as a prompt whose <image> tokens would get none. After a reset it does."""
    first, second = (random_batch(model.config, [6, 4], [2, 2], "left", seed=seed) for seed in range(2))
    with torch.no_grad():
        expected = model(**second)
        cache = new_cache(model.config.text_config, 2, 2 * expected.shape[1])
        model(**first, cache=cache)
        filled = cache.length
        features = {"image_features": model.encode_image(second["pixel_values"])}
        for inputs in (second, {"input_ids": second["input_ids"]}, {"input_ids": second["input_ids"]} | features):
            inputs = {name: value for name, value in inputs.items() if name in ("input_ids", "pixel_values", *features)}
            with pytest.raises(ValueError, match=r"the cache holds another image and prompt. Call its reset\(\)"):
                model(**inputs, cache=cache)
        assert cache.length == filled
        cache.reset()
        assert cache.length == 0
        assert torch.equal(model(**second, cache=cache), expected)


def test_a_static_cache_is_reset_in_place(model):
    cache = StaticCache(model.config.text_config, 2, 30)
    addresses = [memory.data_ptr() for memory in cache.keys + cache.values]
    with torch.no_grad():
        model(**random_batch(model.config, [6, 4], [2, 2]), cache=cache)
    cache.reset()
    assert cache.length == 0 and addresses == [memory.data_ptr() for memory in cache.keys + cache.values]


@all_caches
@pytest.mark.parametrize("rows, dtype", [(2, torch.float32), (1, torch.bfloat16)])
def test_a_cache_of_another_batch_or_dtype_raises(unchecked, model, new_cache, rows, dtype):
    """torch would copy one row into all, and cast."""
    config = model.config.text_config
    cache = new_cache(config, 2, 40)
    with torch.no_grad():
        model(**random_batch(model.config, [6, 4], [2, 2]), cache=cache)
    new = torch.zeros(3 - rows, config.num_key_value_heads, 1, config.head_dim, dtype=dtype)
    with pytest.raises(ValueError, match="the cache is for 2 rows of torch.float32, not "):
        cache.update(0, new, new)


def test_a_full_cache_raises(model):
    batch = random_batch(model.config, [6], [4])
    cache = StaticCache(model.config.text_config, 1, 19)
    with pytest.raises(ValueError, match="the cache has 19 slots but 20 are needed"), torch.no_grad():
        in_pieces(model, batch, cache, [16, 19])
    assert cache.length == 19


@all_caches
def test_update_returns_everything_stored(model, new_cache):
    config = model.config.text_config
    cache = new_cache(config, 2, 8)
    g = torch.Generator().manual_seed(0)
    shape = (config.num_hidden_layers, 2, config.num_key_value_heads, 8, config.head_dim)
    k, v = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    for start, end in ((0, 5), (5, 6), (6, 8)):
        for layer in range(config.num_hidden_layers):
            keys, values = cache.update(layer, k[layer, :, :, start:end], v[layer, :, :, start:end])
            assert torch.equal(keys, k[layer, :, :, :end]) and torch.equal(values, v[layer, :, :, :end])
        assert cache.length == end


def test_a_static_cache_is_allocated_once(model):
    """Every later pass writes into the same memory."""
    batch = random_batch(model.config, [6], [4])
    cache = StaticCache(model.config.text_config, 1, 20)
    addresses = [memory.data_ptr() for memory in cache.keys + cache.values]
    with torch.no_grad():
        in_pieces(model, batch, cache, [16, 17, 18, 19])
    assert addresses == [memory.data_ptr() for memory in cache.keys + cache.values]
    keys, _ = cache.update(0, *[torch.zeros(1, model.config.text_config.num_key_value_heads, 0, 12)] * 2)
    assert keys.untyped_storage().data_ptr() == addresses[0]  # a view, not a copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cache_bytes_match_the_tensors(model, dtype):
    config = model.config.text_config
    static = StaticCache(config, 3, 17, dtype=dtype)
    growing = GrowingCache()
    for layer in range(config.num_hidden_layers):
        growing.update(layer, static.keys[layer], static.values[layer])
    stored = {
        "static": sum(tensor.nbytes for tensor in static.keys + static.values),
        "growing": sum(tensor.nbytes for pair in growing.layers for tensor in pair),
    }
    assert set(stored.values()) == {cache_bytes(config, 17, batch_size=3, dtype=dtype)}


def test_kilobytes_per_token_of_the_real_models():
    assert cache_bytes(GemmaConfig(), 1) == 18_432  # PaliGemma 3B
    assert cache_bytes(GemmaConfig(model_type="gemma2", **GEMMA2_DEFAULTS), 1) == 106_496  # PaliGemma 2 3B
