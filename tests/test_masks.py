"""masks.py against the rule written as a loop over every query and key, and against transformers' own masks."""

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
    """Who sees whom: mask[query][key], one pair at a time."""
    S = len(types)
    table = torch.zeros(S, S, dtype=torch.bool)
    for query in range(S):
        for key in range(S):
            starts_between = any(types[i] for i in range(query + 1, key + 1))  # a block begins after the query
            sees = bool(real[key]) and (key <= query or not starts_between)
            too_far = window is not None and query - key >= window and (types[query] or types[key])
            table[query, key] = query == key or (sees and not too_far)
    return table


def as_table(mask: torch.Tensor | None, B: int, T: int, S: int) -> torch.Tensor:
    return torch.ones(B, T, S, dtype=torch.bool) if mask is None else mask.expand(B, T, S)


@st.composite
def sequences(draw):
    """Rows of prefix and suffix, padded left or right, as (types, real), and how many of the tokens are queries."""
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
    # either all tokens are queries, or, with a cache, the last ones, which must be of the suffix
    queries = draw(st.sampled_from(sorted({S, *range(1, S - prefix_end + 1)})))
    return torch.tensor([types for types, _ in rows]), torch.tensor([real for _, real in rows]), queries


@given(sequences(), st.one_of(st.none(), st.integers(1, 10)))
def test_masks_follow_the_rule(sequence, window):
    types, real, queries = sequence
    B, S = types.shape
    full, sliding = masks.attention_masks(real, types, queries, window)
    for mask, window_of_layer in ((full, None), (sliding, window)):
        got = as_table(mask, B, queries, S)
        for row in range(B):
            wanted = rule(types[row].tolist(), real[row].tolist(), window_of_layer)[S - queries :]
            read = real[row, S - queries :].bool()  # what a padding query sees, nobody reads; it must see something
            assert torch.equal(got[row][read], wanted[read])
        assert got.any(-1).all()
        assert mask is None or not mask.all(), "an open mask costs time: it must be None"


@given(st.lists(st.integers(0, 1), min_size=1, max_size=9))
def test_block_mask_follows_the_rule(mask_ar):
    assert torch.equal(masks.block_mask(torch.tensor(mask_ar)), rule(mask_ar, [1] * len(mask_ar), None))


def test_a_mask_that_can_be_read():
    types = torch.tensor([[0, 0, 0, 1, 1]])  # two image tokens, <bos>, two words of the answer
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
def test_masks_are_those_of_transformers(side, window):
    ours = tiny_config(2, sliding_window=window)
    batch = random_batch(ours, [8, 2, 5], [3, 6, 0], side=side)
    real, types = batch["attention_mask"], batch["token_type_ids"]
    B, S = real.shape
    config = transformers.PaliGemmaConfig(**ours.to_dict()).text_config
    config._attn_implementation = "eager"  # the backend that always writes its mask out: 0 or the lowest number
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(B, S, ours.text_config.hidden_size),
        "attention_mask": real,
        "past_key_values": None,
        "position_ids": torch.arange(S)[None],
        "block_sequence_ids": torch.where(types == 0, 0, -1),  # as PaliGemmaModel.forward gives them
    }
    full, sliding = masks.attention_masks(real, types, S, window)
    for mask, create in ((full, create_causal_mask), (sliding, create_sliding_window_causal_mask)):
        theirs = create(**arguments)[:, 0] == 0
        assert torch.equal(as_table(mask, B, S, S)[real.bool()], theirs[real.bool()])
    if window == 2:
        assert not torch.equal(full, sliding)


def test_a_window_is_at_least_one_token():
    with pytest.raises(ValueError, match="at least 1"):
        masks.sliding_window_mask(4, 0)
    assert masks.sliding_window_mask(3, 1).int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_shape_annotations_are_checked_while_the_tests_run():
    with pytest.raises(jaxtyping.TypeCheckError):
        masks.prefix_lm_mask(torch.zeros(4, dtype=torch.long))
