"""masks.py against the rule as a slow loop over every query and key, and against transformers' own masks."""

import jaxtyping
import pytest
import torch
import transformers
from conftest import random_batch, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from minivlm import masks


def rule(types: list[int], real: list[int], window: int | None) -> torch.Tensor:
    """Which query attends to which key, one pair at a time: mask[query, key]."""
    S = len(types)
    mask = torch.zeros(S, S, dtype=torch.bool)
    for query in range(S):
        for key in range(S):
            is_later_block = any(types[i] for i in range(query + 1, key + 1))
            is_allowed = bool(real[key]) and (key <= query or not is_later_block)
            is_too_far = window is not None and query - key >= window and (types[query] or types[key])
            mask[query, key] = query == key or (is_allowed and not is_too_far)
    return mask


def expanded(mask: torch.Tensor | None, B: int, T: int, S: int) -> torch.Tensor:
    return torch.ones(B, T, S, dtype=torch.bool) if mask is None else mask.expand(B, T, S)


@st.composite
def sequences(draw):
    """Rows of prefix and suffix, padded left or right, as (types, real), and the number of queries."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=3))
    S = max(prefix + suffix for prefix, suffix in lengths) + draw(st.integers(0, 1))
    rows, prefix_end = [], 0
    for prefix, suffix in lengths:
        padding = S - prefix - suffix
        left = draw(st.sampled_from([0, padding]))
        types = [0] * (left + prefix) + [1] * suffix
        real = [0] * left + [1] * (prefix + suffix)
        rows.append((types + [0] * (S - len(types)), real + [0] * (S - len(real))))
        prefix_end = max(prefix_end, left + prefix)
    # the queries are all tokens or, with a cache, only the last ones, which must be suffix tokens
    queries = draw(st.sampled_from(sorted({S, *range(1, S - prefix_end + 1)})))
    return torch.tensor([types for types, _ in rows]), torch.tensor([real for _, real in rows]), queries


@given(sequences(), st.one_of(st.none(), st.integers(1, 10)))
def test_masks_follow_the_rule(sequence, window):
    types, real, queries = sequence
    B, S = types.shape
    full, sliding = masks.attention_masks(real, types, queries, window)
    for mask, window_of_layer in ((full, None), (sliding, window)):
        got = expanded(mask, B, queries, S)
        for row in range(B):
            expected = rule(types[row].tolist(), real[row].tolist(), window_of_layer)[S - queries :]
            is_used = real[row, S - queries :].bool()  # the output of a padding query is never used
            assert torch.equal(got[row][is_used], expected[is_used])
        assert got.any(-1).all()  # but a padding query must have a key, too
        assert mask is None or not mask.all(), "a mask that blocks nothing costs time: it must be None"


@given(st.lists(st.integers(0, 1), min_size=1, max_size=9))
def test_block_mask_follows_the_rule(mask_ar):
    assert torch.equal(masks.block_mask(torch.tensor(mask_ar)), rule(mask_ar, [1] * len(mask_ar), None))


def test_small_masks_by_hand():
    types = torch.tensor([[0, 0, 0, 1, 1]])  # two image tokens, <bos>, two tokens of the answer
    assert masks.prefix_lm_mask(types)[0].int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert masks.causal_mask(3).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert masks.bidirectional_mask(2).int().tolist() == [[1, 1], [1, 1]]
    assert masks.sliding_window_mask(4, 2).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    assert masks.padding_mask(torch.tensor([[0, 1, 1]])).int().tolist() == [[[0, 1, 1]]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window", [2, 6, 11, 40])
def test_masks_equal_those_of_transformers(side, window):
    ours = tiny_config(2, sliding_window=window)
    batch = random_batch(ours, [8, 2, 5], [3, 6, 0], side=side)
    real, types = batch["attention_mask"], batch["token_type_ids"]
    B, S = real.shape
    config = transformers.PaliGemmaConfig(**ours.to_dict()).text_config
    config._attn_implementation = "eager"  # this backend always builds the mask: 0 or the lowest number
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(B, S, ours.text_config.hidden_size),
        "attention_mask": real,
        "past_key_values": None,
        "position_ids": torch.arange(S)[None],
        "block_sequence_ids": torch.where(types == 0, 0, -1),  # as in PaliGemmaModel.forward
    }
    full, sliding = masks.attention_masks(real, types, S, window)
    for mask, create in ((full, create_causal_mask), (sliding, create_sliding_window_causal_mask)):
        theirs = create(**arguments)[:, 0] == 0
        assert torch.equal(expanded(mask, B, S, S)[real.bool()], theirs[real.bool()])
    if window == 2:
        assert not torch.equal(full, sliding)


def test_the_window_must_be_at_least_one_token():
    with pytest.raises(ValueError, match="at least 1"):
        masks.sliding_window_mask(4, 0)
    assert masks.sliding_window_mask(3, 1).int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_shape_annotations_are_checked_while_the_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        masks.prefix_lm_mask(torch.zeros(4, dtype=torch.long))
