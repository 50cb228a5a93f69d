"""The whole model against transformers: every layer, the loss, every gradient, every generated token.

Errors are relative (largest difference divided by largest value) and at most 1e-5 in float32, ten times the rounding
error of these models. Every batch has token_type_ids: without them transformers is causal in one attention backend and
bidirectional in another.
"""

import copy
import json

import pytest
import torch
import transformers
from conftest import (
    PAIRS,
    in_transformers,
    labels_of,
    random_batch,
    relative_error,
    row_alone,
    their_name,
    tiny_model,
    with_eos,
)

from minivlm import gemma
from minivlm.cache import GrowingCache, StaticCache
from minivlm.config import PaliGemmaConfig
from minivlm.course.viz import decoder_attention, tower_attention
from minivlm.generation import generate_ids
from minivlm.paligemma import PaliGemma

BATCHES = {
    "prompt": dict(prefixes=[7], suffixes=[0]),
    "answer": dict(prefixes=[4, 4], suffixes=[9, 9]),
    "left": dict(prefixes=[8, 2, 5], suffixes=[3, 6, 0], side="left"),
    "right": dict(prefixes=[8, 2, 5], suffixes=[3, 6, 1], side="right"),
}
all_batches = pytest.mark.parametrize("shape", BATCHES.values(), ids=BATCHES.keys())


def outputs(model, names: list[str], **batch) -> dict[str, torch.Tensor]:
    """The outputs of the named modules in one forward pass, and the logits."""
    found, hooks = {}, []
    for name in names:
        hooks.append(
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: found.__setitem__(
                    name, output[0] if isinstance(output, tuple) else output
                )
            )
        )
    with torch.no_grad():
        result = model(**batch)
    for hook in hooks:
        hook.remove()
    return found | {"logits": getattr(result, "logits", result)}


@all_batches
def test_every_layer_is_the_same(pair, shape):
    batch = random_batch(pair.ours.config, **shape)
    tower, decoder = "vision_tower.vision_model.", "language_model.model."
    names = [
        tower + "embeddings",
        *(f"{tower}encoder.layers.{i}" for i in range(3)),
        tower + "post_layernorm",
        "multi_modal_projector",
        *(f"{decoder}layers.{i}" for i in range(4)),
        decoder + "norm",
    ]
    ours = outputs(pair.ours, names, **batch)
    theirs = outputs(pair.theirs, [their_name(name) for name in names], **batch)
    real = batch["attention_mask"].bool()
    for name in [*names, "logits"]:
        a, b = ours[name], theirs["logits" if name == "logits" else their_name(name)]
        if name.startswith(decoder) or name == "logits":  # the output at padding is never used
            a, b = a[real], b[real]
        assert relative_error(a, b) <= 1e-5, name


@all_batches
def test_a_row_of_a_padded_batch_equals_the_row_alone(model, shape):
    batch = random_batch(model.config, **shape)
    with torch.no_grad():
        together = model(**batch)
        for row in range(len(together)):
            alone = model(**row_alone(batch, row))
            assert relative_error(together[row, batch["attention_mask"][row].bool()], alone[0]) <= 1e-5


@pytest.mark.parametrize("kind", ["answer", "left", "right"])
def test_loss_and_every_gradient_are_the_same(pair, kind):
    batch = random_batch(pair.ours.config, **BATCHES[kind])
    labels = labels_of(batch)
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    ours, theirs = pair.ours.loss(labels, **batch), pair.theirs(**batch, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward()
    theirs.backward()
    gradients = {name: weight.grad for name, weight in pair.theirs.named_parameters()}
    for name, weight in pair.ours.named_parameters():
        if name.endswith("k_proj.bias"):  # shifts all scores of a query equally: its gradient is zero up to rounding
            scale = gradients[their_name(name).replace("k_proj", "q_proj")].abs().max()
            assert weight.grad.abs().max() <= 1e-5 * scale, name
        else:
            assert relative_error(weight.grad, gradients[their_name(name)]) <= 1e-5, name
    assert len(gradients) == len(list(pair.ours.parameters()))


def test_loss_is_the_mean_over_suffix_tokens_by_hand(model):
    batch = random_batch(model.config, [5, 2], [2, 6])
    labels = labels_of(batch)
    with torch.no_grad():
        log_probs = model(**batch).log_softmax(-1)
        loss = model.loss(labels, **batch)
    chosen = [
        log_probs[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, labels.shape[1]) if labels[b, t] >= 0
    ]
    assert len(chosen) == 2 + 6
    assert loss.item() == pytest.approx(-torch.stack(chosen).mean().item(), rel=1e-5)


def test_consecutive_rows_share_an_image(model):
    batch = random_batch(model.config, [3, 5, 4, 6], [2, 0, 1, 3], side="left")
    images = batch.pop("pixel_values")[:2]
    with torch.no_grad():
        shared = model(**batch, pixel_values=images)
        repeated = model(**batch, pixel_values=images[[0, 0, 1, 1]])
        swapped = model(**batch, pixel_values=images[[0, 1, 0, 1]])
    assert relative_error(shared, repeated) <= 1e-5
    assert relative_error(shared, swapped) > 1e-3


def test_last_only_returns_the_last_column(model):
    batch = random_batch(model.config, [3, 5], [2, 4], side="left")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, last_only=True), model(**batch)[:, -1:])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_answers_are_the_same_token_for_token(pair, seed):
    batch = random_batch(pair.ours.config, [9, 3, 6, 6], [0, 0, 0, 0], side="left", seed=seed)
    whole = generate_ids(with_eos(pair.ours, -1), batch, max_new_tokens=24).sequences
    assert len(set(whole.flatten().tolist())) > 12, "the answers are too uniform to show a difference"
    stop = int(whole[0, 5])  # a token that is certain to appear serves as <eos>
    theirs = pair.theirs.generate(
        **batch, max_new_tokens=24, do_sample=False, eos_token_id=stop, pad_token_id=0, bos_token_id=2
    )
    ours = generate_ids(with_eos(pair.ours, stop), batch, max_new_tokens=24).sequences
    assert ours.tolist() == theirs[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("version, attention", PAIRS.values(), ids=PAIRS.keys())
def test_the_ends_of_generation_config_win_as_in_transformers(tmp_path, version, attention):
    """Each row ends with the first of two tokens, of which config.json lists none."""
    model = tiny_model(version)
    batch = random_batch(model.config, [9, 3], [0, 0], side="left")
    free = generate_ids(with_eos(model, -1), batch, max_new_tokens=12).sequences.tolist()
    ends = [free[0][5], free[1][6]]
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "pad_token_id": 3}))
    ours = generate_ids(PaliGemma.from_pretrained(tmp_path), batch, max_new_tokens=12)
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    expected = theirs.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert ours.sequences.tolist() == expected.tolist()
    assert ours.finished.all() and ours.sequences.shape[1] < 12
    for end in (1, *ends):  # one of them alone would give other answers
        assert generate_ids(with_eos(model, end), batch, max_new_tokens=12).sequences.tolist() != expected.tolist()


def test_an_image_token_in_the_answer_is_text(pair):
    """And so is an <eos> in the prompt: it does not end the answer."""
    batch = random_batch(pair.ours.config, [9, 3], [0, 0], side="left")
    batch["input_ids"][:, -3] = pair.ours.config.eos_token_id
    free = generate_ids(with_eos(pair.ours, -1), batch, max_new_tokens=12).sequences
    model, theirs = with_eos(pair.ours, -1), copy.copy(pair.theirs)
    token = next(token for token in free[0, 2:].tolist() if not (batch["input_ids"] == token).any())
    ids = batch["input_ids"]
    batch["input_ids"] = ids.masked_fill(ids == model.config.image_token_index, token)
    model.config.image_token_index = token  # a token that is certain to appear serves as <image>
    for cache in ("static", "growing", None):
        assert torch.equal(generate_ids(model, batch, max_new_tokens=12, cache=cache).sequences, free)
    before = pair.theirs.config.image_token_index
    theirs.config.image_token_index = token
    expected = theirs.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs.config.image_token_index = before
    assert expected[:, ids.shape[1] :].tolist() == free.tolist()


GEMMA2_FIELDS = {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20}


@pytest.mark.parametrize(
    "change", [GEMMA2_FIELDS, {"final_logit_softcapping": 3.0}, {"rope_parameters": {"rope_theta": 9}}]
)
def test_odd_files_compute_the_same_as_in_transformers(change):
    """Gemma 1 ignores some of Gemma 2's fields, but not the soft cap of logits. Of two thetas, the nested one wins."""
    model = tiny_model(1)
    values = model.config.to_dict()
    values["text_config"] |= change
    ours = PaliGemma(PaliGemmaConfig.from_dict(values)).eval()
    ours.load_state_dict(model.state_dict())
    model.config.to_dict = lambda: values
    theirs = in_transformers(model)
    batch = random_batch(model.config, [8, 2], [3, 6])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs, plain = ours(**batch)[real], theirs(**batch).logits[real], model(**batch)[real]
    assert relative_error(ours, theirs) <= 1e-5
    assert (relative_error(plain, theirs) <= 1e-5) == (change is GEMMA2_FIELDS)


@pytest.mark.parametrize("version, attention", [(1, "eager"), (1, "sdpa"), (2, "eager")])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(version, attention):
    """Both round, but at different points. Our error against the float32 logits is at most 1.5 times theirs."""
    our_errors, their_errors = [], []
    for seed in range(4):
        ours = tiny_model(version, seed=seed).bfloat16()
        theirs = in_transformers(ours, attention)
        batch = random_batch(ours.config, [8, 2, 5], [3, 6, 1], seed=seed)
        real = batch["attention_mask"].bool()
        rounded = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
        with torch.no_grad():
            a, b = ours(**rounded), theirs(**rounded).logits
            exact = ours.float()(**rounded | {"pixel_values": rounded["pixel_values"].float()})  # the rounded weights
        assert a.dtype == b.dtype == torch.bfloat16
        our_errors.append((a - exact)[real].pow(2).mean())
        their_errors.append((b - exact)[real].pow(2).mean())
    our_error, their_error = (torch.stack(errors).mean().sqrt().item() for errors in (our_errors, their_errors))
    assert 0 < our_error <= 1.5 * their_error
    assert our_error < 0.1  # the logits have a standard deviation of about 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(model, dtype):
    batch = random_batch(model.config, [3, 5], [2, 0], side="left")
    masks = {name: batch[name].to(dtype) for name in ("attention_mask", "token_type_ids")}
    with torch.no_grad():
        assert torch.equal(model(**batch | masks), model(**batch))
    batch = random_batch(model.config, [3, 5], [0, 0], side="left")
    masks = {name: batch[name].to(dtype) for name in masks}
    for cache in ("static", None):
        ours, same = (generate_ids(model, b, max_new_tokens=3, cache=cache) for b in (batch | masks, batch))
        assert torch.equal(ours.sequences, same.sequences)


def test_too_many_tokens_are_refused_before_a_mask_is_built(model, monkeypatch):
    batch = random_batch(model.config, [3, 5], [0, 0], side="left")
    limit = model.config.text_config.max_position_embeddings
    monkeypatch.setattr(gemma.masks, "attention_masks", None)
    many = batch["input_ids"][:, -1:].expand(2, limit + 1)
    with pytest.raises(
        ValueError,
        match="2 rows of 0 cached and 8193 new tokens are not possible: 1 to 8192 .max_position_embeddings. are",
    ):
        model(many, pixel_values=batch["pixel_values"])
    for empty in (many[:, :0], many[:0]):
        with pytest.raises(ValueError, match="are not possible: 1 to 8192"):
            model(empty)
    with pytest.raises(ValueError, match="15 tokens and max_new_tokens=8178 exceed the model's 8192 pos"):
        generate_ids(model, batch, max_new_tokens=limit - 14)


def test_the_last_position_can_be_used():
    model = tiny_model(2, max_position_embeddings=20)
    batch = random_batch(model.config, [5], [0])
    assert generate_ids(with_eos(model, -1), batch, max_new_tokens=5).sequences.shape == (1, 5)
    with pytest.raises(ValueError, match="exceed the model's 20 positions"):
        generate_ids(model, batch, max_new_tokens=6)


@pytest.mark.parametrize("wrong", [120, -1, -100])
def test_ids_beyond_the_table_are_refused(model, wrong):
    batch = random_batch(model.config, [3, 5], [2, 1])
    labels = labels_of(batch)
    broken = batch | {"input_ids": batch["input_ids"].clone()}
    broken["input_ids"][0, 10] = wrong + (wrong == model.config.image_token_index)
    for function in (model, lambda **inputs: model.loss(labels, **inputs)):
        with pytest.raises(ValueError, match="token ids must be from 0 to 119, not from"):
            function(**broken)
    if wrong != -100:
        labels[1, 15] = wrong
        with pytest.raises(ValueError, match="token ids must be from 0 to 119, not from"):
            model.loss(labels, **batch)


def test_errors_name_the_bad_input(model):
    batch = random_batch(model.config, [3, 5], [0, 0], side="left")
    with pytest.raises(ValueError, match=r"pixel_values must have shape \[B, 3, 12, 12\] .*, not \[0, 3, 12, 12\]"):
        model(**batch | {"pixel_values": torch.zeros(0, 3, 12, 12)})
    with pytest.raises(ValueError, match="0 images of 9 tokens do not match 2 rows"):
        model.embed(batch["input_ids"], torch.zeros(0, 9, 32))
    with pytest.raises(ValueError, match=r"pixel_values must have shape \[B, 3, 12, 12\]"):
        model(**batch | {"pixel_values": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(ValueError, match="3 images of 9 tokens do not match 2 rows"):
        model(**batch | {"pixel_values": torch.zeros(3, 3, 12, 12)})
    with pytest.raises(ValueError, match=r"do not match 2 rows with \[8, 9\] <image> tokens"):
        fewer = batch["input_ids"].clone()
        fewer[0, 2] = 5
        model(**batch | {"input_ids": fewer})
    with pytest.raises(ValueError, match="there is no image"):
        model(batch["input_ids"])
    with pytest.raises(ValueError, match="all labels are -100"):
        model.loss(labels_of(batch), **batch)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
    for name in ("attention_mask", "token_type_ids"):
        with pytest.raises(ValueError, match=rf"{name} must be \[2, 15\]"):
            model(**inputs, **{name: torch.ones(2, 4, dtype=torch.long)})


# --- attention weights ----------------------------------------------------------------------------------------------


def test_decoder_attention_equals_that_of_transformers(model):
    batch = random_batch(model.config, [3, 5], [4, 2])
    weights = decoder_attention(model, **batch)
    with torch.no_grad():
        theirs = in_transformers(model)(**batch, output_attentions=True)
    real = batch["attention_mask"].bool()
    assert len(weights) == len(theirs.attentions)
    for ours, other in zip(weights, theirs.attentions, strict=True):
        assert relative_error(ours.transpose(1, 2)[real], other.transpose(1, 2)[real]) < 1e-5


@pytest.mark.parametrize("new_cache", [GrowingCache, None], ids=["growing", "static"])
def test_decoder_attention_of_a_decode_step_is_the_last_row(model, new_cache):
    batch = random_batch(model.config, [3, 5], [4, 2], side="left")
    with torch.no_grad():
        logits = model(**batch)
    whole = decoder_attention(model, **batch)
    T = batch["input_ids"].shape[1]
    cache = new_cache() if new_cache else StaticCache(model.config.text_config, 2, T + 3)
    prompt = {name: ids if name == "pixel_values" else ids[:, : T - 1] for name, ids in batch.items()}
    prefill = decoder_attention(model, **prompt, cache=cache)
    token = {name: batch[name] for name in ("attention_mask", "token_type_ids")}
    step = decoder_attention(model, input_ids=batch["input_ids"][:, -1:], **token, cache=cache)
    assert cache.length == T
    for full, first, last in zip(whole, prefill, step, strict=True):
        assert last.shape == (*full.shape[:2], 1, T)
        assert relative_error(last, full[:, :, -1:]) <= 1e-5
        used = batch["attention_mask"][:, :-1].bool()
        assert relative_error(first.transpose(1, 2)[used], full[:, :, :-1, :-1].transpose(1, 2)[used]) <= 1e-5
    with torch.no_grad():
        assert torch.equal(model(**batch), logits)  # looking changes nothing


@pytest.mark.parametrize("cap", [None, 2.0])
def test_attention_is_the_weights_times_the_values(cap):
    """By hand: one query head at a time, with the key/value head it shares."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, tokens, 6, generator=g) for heads, tokens in ((6, 3), (2, 5), (2, 5)))
    mask = torch.rand(2, 3, 5, generator=g) < 0.5
    mask[..., 0] = True
    weights = gemma.attention_weights(q, k, mask, 0.4, cap)
    out = gemma.grouped_query_attention(q, k, v, mask, 0.4, cap)
    assert not weights.transpose(0, 1)[:, ~mask].any()
    for head in range(6):
        scores = q[:, head] @ k[:, head // 3].transpose(1, 2) * 0.4
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        expected = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        torch.testing.assert_close(weights[:, head], expected)
        torch.testing.assert_close(out[:, head], expected @ v[:, head // 3])


def test_tower_attention_equals_that_of_transformers(model):
    pixels = random_batch(model.config, [1], [1])["pixel_values"]
    weights = tower_attention(model, pixels)
    tower = in_transformers(model).model.vision_tower
    with torch.no_grad():
        theirs = tower(pixels, output_attentions=True).attentions
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(weights, theirs, strict=True))
    assert len(weights) == model.config.vision_config.num_hidden_layers
