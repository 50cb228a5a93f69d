"""generation.py: samplers against definitions in plain Python, and the loop against a full forward pass per token.

test_parity.py checks that greedy answers equal those of transformers, token for token.
"""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import labels_of, random_batch, relative_error, row_alone, tiny_model, with_eos
from hypothesis import example, given
from hypothesis import strategies as st

from minivlm import generation
from minivlm.generation import (
    GenerationConfig,
    TextStream,
    apply_temperature,
    generate,
    generate_ids,
    greedy,
    prepare_inputs,
    sample,
    sample_next_token,
    stream_generate,
    top_k_filter,
    top_p_filter,
)

IMAGES = [np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8) for i in range(3)]
PROMPTS = ["caption en", "answer en what is left of the red circle?", "detect cat ; dog"]

# multiples of 1/8, so that no two logits are close enough to have equal probabilities
logit_rows = st.lists(st.integers(-64, 64).map(lambda i: i / 8), min_size=1, max_size=9, unique=True)


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def kept(filtered: torch.Tensor) -> set[int]:
    return {i for i, x in enumerate(filtered.tolist()) if x > -math.inf}


# --- choosing a token ----------------------------------------------------------------------------------------------


@given(logit_rows, st.floats(0.1, 10))
def test_temperature_is_a_power_of_the_probabilities(row, temperature):
    powers = [p ** (1 / temperature) for p in softmax(row)]
    expected = [p / math.fsum(powers) for p in powers]
    got = apply_temperature(torch.tensor([row]), temperature).softmax(-1)[0].tolist()
    assert got == pytest.approx(expected, rel=1e-3, abs=1e-6)


@given(logit_rows, st.integers(1, 12))
def test_top_k_keeps_the_k_largest(row, k):
    filtered = top_k_filter(torch.tensor([row]), k)[0]
    largest = set(sorted(range(len(row)), key=row.__getitem__)[-k:])
    assert kept(filtered) == largest
    assert all(filtered[i] == row[i] for i in largest)


def test_top_k_keeps_ties():
    assert kept(top_k_filter(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), 2)[0]) == {0, 1, 2}


@given(logit_rows, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(row, p):
    probabilities, nucleus = softmax(row), set()
    sums = []
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        if p < 1 and math.fsum(probabilities[j] for j in nucleus) >= p:
            break
        nucleus.add(i)
        sums.append(math.fsum(probabilities[j] for j in nucleus))
    if all(abs(s - p) > 1e-5 for s in sums[:-1]) and (p == 1 or abs(sums[-1] - p) > 1e-5):  # no near ties
        filtered = top_p_filter(torch.tensor([row]), p)[0]
        assert kept(filtered) == nucleus
        assert all(filtered[i] == row[i] for i in nucleus)


def test_top_p_at_its_limits():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert [len(kept(top_p_filter(logits, p)[0])) for p in (1e-9, 0.499, 0.501, 0.749, 0.751)] == [1, 1, 2, 2, 3]
    assert [kept(top_p_filter(logits, p)[0]) for p in (1e-50, 1e-300, 5e-324)] == [{0}] * 3  # 0 in float32
    flat = torch.zeros(1, 50_000)
    flat[0, 0] = 20  # the sum in float32 reaches 1 long before the last token
    assert len(kept(top_p_filter(flat, 1.0)[0])) == 50_000


def test_rows_are_filtered_independently():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 30, generator=g)
    for function, number in ((top_k_filter, 4), (top_p_filter, 0.7)):
        together = function(logits, number)
        assert torch.equal(together, torch.cat([function(row[None], number) for row in logits]))


def test_sample_follows_the_probabilities():
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, -math.inf])
    draws = 40_000
    counts = Counter(sample(logits.expand(draws, -1), torch.Generator().manual_seed(0)).tolist())
    for i, p in enumerate(softmax([2.0, 0.0, 1.0, -1.0]) + [0.0]):
        assert abs(counts[i] - draws * p) <= 4.5 * math.sqrt(draws * p * (1 - p))


def test_options_apply_in_order(monkeypatch):
    """Temperature, then top-k, then top-p of the rest, called through the module so that each can be patched."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    calls = []
    monkeypatch.setattr(generation, "sample", lambda logits, generator: calls.append(logits) or greedy(logits))
    sample_next_token(logits, GenerationConfig(do_sample=True, temperature=2.0, top_k=4, top_p=0.8))
    probabilities = softmax([1.0, 0.5, 0.25, 0.0])  # of all four: 0.41, 0.25, 0.19, 0.15
    assert sum(probabilities[:2]) < 0.8 < sum(probabilities[:3])
    assert kept(calls[0][0]) == {0, 1, 2}
    torch.testing.assert_close(calls[0][0, :3], torch.tensor([1.0, 0.5, 0.25]))
    assert sum(softmax([1.0, 0.5, 0.25, 0.0, -0.5])[:3]) < 0.8  # top-p before top-k would have kept a fourth token
    monkeypatch.setattr(generation, "greedy", lambda logits: logits.argmin(-1))
    assert sample_next_token(logits, GenerationConfig()).tolist() == [4]


# --- the loop ------------------------------------------------------------------------------------------------------


def test_greedy_equals_a_full_forward_pass_per_token(model):
    batch = random_batch(model.config, [7, 7, 7, 7], [0, 0, 0, 0])
    generated = generate_ids(with_eos(model, -1), batch, max_new_tokens=8)
    ids, types = batch["input_ids"], batch["token_type_ids"]
    for token, log_prob in zip(generated.sequences.T, generated.log_probs.T, strict=True):
        with torch.no_grad():
            logits = model(ids, pixel_values=batch["pixel_values"], token_type_ids=types)[:, -1]
        assert torch.equal(token, logits.argmax(-1))
        torch.testing.assert_close(log_prob, logits.log_softmax(-1).amax(-1), atol=1e-5, rtol=1e-5)
        ids = torch.cat((ids, token[:, None]), dim=1)
        types = torch.cat((types, torch.ones_like(types[:, :1])), dim=1)
    assert len(set(generated.sequences.flatten().tolist())) > 4


@pytest.mark.parametrize("do_sample", [False, True])
def test_every_cache_gives_the_same_answers(model, do_sample):
    batch = random_batch(model.config, [7, 2, 5], [0, 0, 0], side="left")
    options = {"do_sample": do_sample, "seed": 3, "max_new_tokens": 10}
    static, growing, none = (generate_ids(model, batch, cache=kind, **options) for kind in ("static", "growing", None))
    for other in (growing, none):
        assert torch.equal(static.sequences, other.sequences)
        torch.testing.assert_close(static.log_probs, other.log_probs, atol=1e-5, rtol=1e-5)


def test_a_row_of_a_batch_equals_the_row_alone(model):
    batch = random_batch(model.config, [7, 2, 5], [0, 0, 0], side="left")
    together = generate_ids(model, batch, max_new_tokens=10)
    for row in range(3):
        alone = generate_ids(model, row_alone(batch, row), max_new_tokens=10)
        assert torch.equal(together.sequences[row], alone.sequences[0])
        torch.testing.assert_close(together.log_probs[row], alone.log_probs[0], atol=1e-5, rtol=1e-5)


def test_each_row_ends_at_its_own_eos(model):
    batch = random_batch(model.config, [7, 2, 5, 4], [0, 0, 0, 0], side="left")
    free = generate_ids(model, batch, max_new_tokens=14)
    rows = free.sequences.tolist()
    ends = {stop: [row.index(stop) if stop in row else None for row in rows] for stop in sum(rows, [])}
    stop = max(ends, key=lambda token: len(set(ends[token])))  # in some rows but not in others, at different positions
    assert len(set(ends[stop])) >= 2
    stopped = generate_ids(with_eos(model, stop), batch, max_new_tokens=14)
    longest = max(14 if end is None else end + 1 for end in ends[stop])
    assert stopped.sequences.shape == stopped.log_probs.shape == (4, longest)
    for row, end in enumerate(ends[stop]):
        length = longest if end is None else end + 1
        assert stopped.sequences[row].tolist() == rows[row][:length] + [0] * (longest - length)
        torch.testing.assert_close(stopped.log_probs[row, :length], free.log_probs[row, :length])
        assert not stopped.log_probs[row, length:].any()
        assert stopped.finished[row] == (end is not None)


def test_generation_stops_when_all_rows_have_ended(model):
    batch = random_batch(model.config, [5], [0])
    rows = generate_ids(model, batch, max_new_tokens=9).sequences[0].tolist()
    stop = rows[4]
    generated = generate_ids(with_eos(model, stop), batch, max_new_tokens=9)
    assert generated.sequences[0].tolist() == rows[: rows.index(stop) + 1]
    assert generated.finished.tolist() == [True]


def test_log_probs_are_the_models_own_with_any_sampling(model):
    batch = random_batch(model.config, [7, 2], [0, 0], side="left")
    options = dict(max_new_tokens=8, do_sample=True, temperature=1.7, top_k=20, top_p=0.9, seed=1)
    generated = generate_ids(with_eos(model, -1), batch, **options)
    whole = batch | {"input_ids": torch.cat((batch["input_ids"], generated.sequences), dim=1)}
    for name in ("attention_mask", "token_type_ids"):
        whole[name] = torch.cat((batch[name], torch.ones_like(generated.sequences)), dim=1)
    with torch.no_grad():
        log_probs = model(**whole)[:, -9:-1].log_softmax(-1)
    expected = log_probs.gather(-1, generated.sequences[..., None])[..., 0]
    torch.testing.assert_close(generated.log_probs, expected, atol=1e-5, rtol=1e-5)


def test_first_tokens_follow_the_models_probabilities(model):
    one = random_batch(model.config, [7], [0])
    with torch.no_grad():
        p = model(**one, last_only=True)[0, 0].softmax(-1)
    rows = {name: value.expand(400, -1) for name, value in one.items() if name != "pixel_values"}
    batch = rows | {"pixel_values": one["pixel_values"]}
    options = {"max_new_tokens": 1, "do_sample": True}
    sampled = torch.cat([generate_ids(model, batch, seed=seed, **options).sequences[:, 0] for seed in range(5)])
    counts = torch.bincount(sampled, minlength=len(p))
    assert ((counts - 2000 * p).abs() <= 4.5 * (2000 * p * (1 - p)).sqrt() + 1).all()


def test_a_seed_is_reproducible_and_leaves_the_global_generator_alone(model):
    batch = random_batch(model.config, [7, 2], [0, 0], side="left")

    def answers(seed):
        return generate_ids(model, batch, max_new_tokens=8, do_sample=True, seed=seed).sequences.tolist()

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert answers(0) == answers(0)
    assert len({str(answers(seed)) for seed in range(4)}) > 1
    assert torch.equal(state, torch.get_rng_state())
    first = answers(None)
    assert not torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert answers(None) == first


def test_top_k_of_one_is_greedy(model):
    batch = random_batch(model.config, [7, 2], [0, 0], side="left")
    sampled = generate_ids(model, batch, max_new_tokens=8, do_sample=True, temperature=3.0, top_k=1, seed=0)
    assert torch.equal(sampled.sequences, generate_ids(model, batch, max_new_tokens=8).sequences)


def test_generation_does_no_unnecessary_work(model, monkeypatch):
    """One call of the tower, one with the whole prompt, then single tokens, and logits of the last position only."""
    tower, decoder, head = [], [], []
    model = with_eos(model, -1)
    hooks = [
        model.vision_tower.register_forward_pre_hook(lambda _, inputs: tower.append(len(inputs[0]))),
        model.language_model.model.register_forward_pre_hook(lambda _, inputs: decoder.append(inputs[0].shape[1])),
    ]
    logits = model.language_model.logits
    monkeypatch.setattr(model.language_model, "logits", lambda hidden: head.append(hidden.shape[1]) or logits(hidden))
    batch = random_batch(model.config, [7, 2, 3, 4], [0, 0, 0, 0], side="left")
    batch["pixel_values"] = batch["pixel_values"][:2]
    for cache, lengths in (("static", [17, 1, 1, 1, 1]), ("growing", [17, 1, 1, 1, 1]), (None, [17, 18, 19, 20, 21])):
        del tower[:], decoder[:], head[:]
        generate_ids(model, batch, max_new_tokens=5, cache=cache)
        assert (tower, decoder, head) == ([2], lengths, [1] * 5)
    for hook in hooks:
        hook.remove()


def test_results_can_be_trained_on(model):
    """They are not inference tensors, which autograd cannot save for backward."""
    batch = random_batch(model.config, [5], [0])
    generated = generate_ids(model, batch, max_new_tokens=3)
    assert not any(t.is_inference() for t in (generated.sequences, generated.log_probs, generated.finished))


def test_bfloat16_generates():
    model = tiny_model(1).bfloat16()
    batch = random_batch(model.config, [5, 3], [0, 0], side="left")
    static, growing = (generate_ids(model, batch, max_new_tokens=8, cache=kind) for kind in ("static", "growing"))
    assert torch.equal(static.sequences, growing.sequences)
    assert static.log_probs.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_produces_the_same_answers(model):
    batch = random_batch(model.config, [7, 2, 5], [0, 0, 0], side="left")
    on_cpu = generate_ids(model, batch, max_new_tokens=10).sequences
    on_gpu = generate_ids(copy.deepcopy(model).cuda(), batch, max_new_tokens=10).sequences
    assert torch.equal(on_cpu, on_gpu.cpu())
    generate_ids(copy.deepcopy(model).cuda(), batch, max_new_tokens=3, do_sample=True, top_k=5, top_p=0.9, seed=0)


# --- text ----------------------------------------------------------------------------------------------------------


def test_lists_in_lists_out(talker, tiny_processor):
    pairs = [generate(talker, tiny_processor, i, p, max_new_tokens=6) for i, p in zip(IMAGES, PROMPTS, strict=True)]
    assert all(isinstance(answer, str) and answer for answer in pairs)
    assert generate(talker, tiny_processor, IMAGES, PROMPTS, max_new_tokens=6) == pairs
    shared = [generate(talker, tiny_processor, IMAGES[1], p, max_new_tokens=6) for p in PROMPTS]
    assert generate(talker, tiny_processor, IMAGES[1], PROMPTS, max_new_tokens=6) == shared
    each = [generate(talker, tiny_processor, i, PROMPTS[0], max_new_tokens=6) for i in IMAGES]
    assert generate(talker, tiny_processor, IMAGES, PROMPTS[0], max_new_tokens=6) == each
    assert generate(talker, tiny_processor, IMAGES[0], PROMPTS[:1], max_new_tokens=6) == pairs[:1]
    assert len({*pairs, *shared, *each}) > 3


def test_one_image_is_encoded_once_for_all_prompts(talker, tiny_processor):
    encoded = []
    hook = talker.vision_tower.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    generate(talker, tiny_processor, IMAGES[0], PROMPTS, max_new_tokens=3)
    hook.remove()
    assert encoded == [1]


def test_one_image_takes_the_memory_of_one_image(talker, tiny_processor):
    """However many prompts ask about it: no copies, not even behind a view."""
    batch = prepare_inputs(tiny_processor, IMAGES[0], (PROMPTS * 171)[:512])
    pixels = batch["pixel_values"]
    assert len(batch["input_ids"]) == 512 and pixels.shape == (1, 3, 12, 12)
    assert pixels.untyped_storage().nbytes() == pixels.nbytes == 3 * 12 * 12 * 4
    pairs = tiny_processor(text=PROMPTS, images=[IMAGES[0]] * 3, padding_side="left")
    assert all(torch.equal(batch[name][:3], pairs[name][: len(batch[name])]) for name in pairs)
    answers = [generate(talker, tiny_processor, IMAGES[0], prompt, max_new_tokens=3) for prompt in PROMPTS]
    assert generate(talker, tiny_processor, IMAGES[0], PROMPTS * 9, max_new_tokens=3) == answers * 9


def test_the_answer_decodes_the_ids_up_to_eos(talker, tiny_processor):
    batch = tiny_processor(text=PROMPTS[1], images=IMAGES[0])
    ids = generate_ids(talker, batch, max_new_tokens=10).sequences[0].tolist()
    stop = ids[6]
    answer = generate(with_eos(talker, stop), tiny_processor, IMAGES[0], PROMPTS[1], max_new_tokens=10)
    assert answer == tiny_processor.decode(ids[: ids.index(stop) + 1])


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 2, "temperature": 2.0}], ids=["greedy", "sampled"])
def test_streamed_pieces_join_to_the_answer(talker, tiny_processor, options):
    options = {"max_new_tokens": 20, **options}
    answer = generate(talker, tiny_processor, IMAGES[0], PROMPTS[0], **options)
    pieces = list(stream_generate(talker, tiny_processor, IMAGES[0], PROMPTS[0], **options))
    assert "".join(pieces) == answer and len(pieces) > 5 and all(pieces)
    streamed = []
    assert generate(talker, tiny_processor, IMAGES[0], PROMPTS[0], stream=streamed.append, **options) == answer
    assert streamed == pieces


def test_pieces_arrive_while_the_answer_is_generated(talker, tiny_processor):
    """The first piece arrives before the last token is computed."""
    calls = []
    hook = talker.language_model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    pieces = stream_generate(talker, tiny_processor, IMAGES[0], PROMPTS[0], max_new_tokens=20)
    next(pieces)
    hook.remove()
    assert len(calls) < 10


@given(st.text(max_size=12).map(lambda text: text.replace("<", "")))  # no special tokens
def test_no_piece_splits_a_character(tiny_processor, text):
    """Most characters are not in the vocabulary, so the tokenizer spells them in bytes."""
    stream = TextStream(tiny_processor)
    pieces = [stream.push(i) for i in tiny_processor.encode([text])[0]] + [stream.end()]
    assert "".join(pieces) == text.replace("▁", " ")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 400), max_size=12))  # special tokens, bytes, letters, some of <loc…>
@example([6, 0, 134])  # a byte, a special token without text, a byte
def test_any_tokens_stream_as_they_decode(tiny_processor, ids):
    stream = TextStream(tiny_processor)
    assert "".join([stream.push(i) for i in ids] + [stream.end()]) == tiny_processor.decode(ids)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0, "do_sample": True}, "temperature must be above 0"),
        ({"temperature": -1.0, "do_sample": True}, "temperature must be above 1e-07 and at most"),
        ({"temperature": math.inf, "do_sample": True}, "temperature must be above"),
        ({"temperature": math.nan, "do_sample": True}, "temperature must be above"),
        ({"temperature": 0.0}, "for the most likely token every time, leave do_sample out"),
        ({"top_p": 0.0, "do_sample": True}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1, "do_sample": True}, "top_p must be above 0 and at most 1"),
        ({"top_p": math.nan, "do_sample": True}, "top_p must be above 0 and at most 1"),
        ({"top_k": 0, "do_sample": True}, "top_k must be an integer from 1 to .*, not 0"),
        ({"top_k": True, "do_sample": True}, "top_k must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer from 1 to .*, not 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": 10**30}, "max_new_tokens must be an integer"),
        ({"temperature": True, "do_sample": True}, "temperature must be above"),
        ({"temperature": "1", "do_sample": True}, "temperature must be above"),
        ({"temperature": 1e-300, "do_sample": True}, "temperature must be above"),
        ({"top_p": True, "do_sample": True}, "top_p must be above 0 and at most 1, not True"),
        ({"top_p": "0.5", "do_sample": True}, "top_p must be above 0 and at most 1, not '0.5'"),
        ({"seed": 2**64, "do_sample": True}, "seed must be an integer"),
        ({"seed": True, "do_sample": True}, "seed must be an integer"),
        ({"seed": 0.5, "do_sample": True}, "seed must be an integer"),
        ({"do_sample": "no"}, "do_sample and compile must be booleans, not 'no' and False"),
        ({"compile": 1}, "do_sample and compile must be booleans, not False and 1"),
        ({"cache": "dynamic"}, "cache must be 'static', 'growing' or None, not 'dynamic'"),
        ({"temperature": 0.5}, "need do_sample=True"),
        ({"top_k": 5}, "need do_sample=True"),
        ({"top_p": 0.5}, "need do_sample=True"),
    ],
)
def test_invalid_options_raise(unchecked, tiny_processor, options, message):
    for function in (generate, lambda *arguments, **options: next(stream_generate(*arguments, **options))):
        with pytest.raises(ValueError, match=message) as error:
            function(tiny_model(1), tiny_processor, IMAGES[0], PROMPTS[0], **options)
        assert "\n" not in str(error.value)


NORMS = ["language_model.model.layers.1.input_layernorm.weight", "language_model.model.norm.weight"]
NORMS += ["vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"]
BIASES = ["vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.bias", "multi_modal_projector.linear.bias"]
MATRICES = [
    "language_model.model.layers.0.mlp.up_proj.weight",
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", NORMS + BIASES + MATRICES)
def test_no_function_computes_with_broken_weights(version, name, value):
    """Soft caps and softmax can turn infinity into finite numbers: those of norms and biases are found all the same."""
    model = tiny_model(version)
    batch = random_batch(model.config, [5, 2], [0, 2])
    features = model.encode_image(batch["pixel_values"]).detach()
    with torch.no_grad():
        model.get_parameter(name)[0] = value
    calls = {
        "forward": lambda: model(**batch),
        "loss": lambda: model.train().loss(labels_of(batch), **batch),
        "generate": lambda: generate_ids(model, batch | {"attention_mask": torch.ones_like(batch["input_ids"])}),
    }
    if name.startswith("language_model"):
        calls["decoder"] = lambda: model(
            **{n: x for n, x in batch.items() if n[:5] != "pixel"}, image_features=features
        )
    else:
        calls["encode_image"] = lambda: model.encode_image(batch["pixel_values"])
    for call in calls.values():
        with pytest.raises(ValueError, match=f"^1 weight holds NaN or infinity .*: {name}.$"):
            call()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", ["language_model.model.norm.weight", "language_model.model.embed_tokens.weight"])
def test_broken_weights_are_named(name, value, do_sample):
    model = tiny_model(1)
    with torch.no_grad():
        model.get_parameter(name)[-1] = value  # for the embeddings: the row of a token that is in no prompt here
    with pytest.raises(ValueError, match=f"^1 weight holds NaN or infinity .*: {name}.$"):
        generate_ids(model, random_batch(model.config, [5, 2], [0, 0], "left"), do_sample=do_sample)


def test_infinite_logits_are_not_blamed_on_finite_weights():
    model = tiny_model(1)
    model.language_model.logits = lambda hidden: torch.full((len(hidden), 1, 300), math.inf)
    with pytest.raises(ValueError, match="but the weights are. Use torch.float32"):
        generate_ids(model, random_batch(model.config, [5, 2], [0, 0], "left"))


def test_without_a_padding_token_rows_are_filled_with_the_end(model):
    batch = random_batch(model.config, [7, 2, 5], [0, 0, 0], side="left")
    free = generate_ids(with_eos(model, -1), batch, max_new_tokens=8).sequences
    model = with_eos(model, [int(free[0, 2]), int(free[1, 3])])
    padded = generate_ids(model, batch, max_new_tokens=8)
    assert padded.finished[:2].all()
    model.config.pad_token_id = -1
    filled = generate_ids(model, batch, max_new_tokens=8)
    after = padded.log_probs == 0
    assert torch.equal(filled.sequences, padded.sequences.masked_fill(after, int(free[0, 2])))
    assert after.any() and not padded.sequences[after].any()


def test_a_model_of_quantized_layers_generates(model):
    """Dynamic quantization replaces every linear layer by one without a weight tensor."""
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    batch = random_batch(model.config, [7, 2], [0, 0], side="left")
    with torch.no_grad():
        error = relative_error(quantized(**batch), model(**batch))
    assert 0 < error < 0.5
    generated = generate_ids(quantized, batch, max_new_tokens=6)
    assert generated.log_probs.isfinite().all() and len(generated.sequences) == 2


def test_mismatched_batches_raise(talker, tiny_processor):
    batch = tiny_processor(text=PROMPTS, images=IMAGES)
    with pytest.raises(ValueError, match="the batch has no token_type_ids, pixel_values. Prepare it"):
        generate_ids(talker, {name: batch[name] for name in ("input_ids", "attention_mask")})
    for images, prompts in (([], []), ([], PROMPTS), (IMAGES, []), ([], PROMPTS[0])):
        with pytest.raises(ValueError) as caught:
            generate(talker, tiny_processor, images, prompts)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="padded on the right"):
        generate_ids(talker, tiny_processor(text=PROMPTS, images=IMAGES, padding_side="right"))
    with pytest.raises(ValueError, match="2 prompts and 3 images"):
        generate(talker, tiny_processor, IMAGES, PROMPTS[:2])
    with pytest.raises(ValueError, match="prompt"):
        generate(talker, tiny_processor, IMAGES[0], [])
    assert len(generate(talker, tiny_processor, IMAGES[0], [PROMPTS[0], " ", ""], max_new_tokens=2)) == 3  # all legal
    for image, prompt in ((IMAGES, PROMPTS), (IMAGES[0], PROMPTS), (IMAGES, PROMPTS[0])):
        with pytest.raises(ValueError, match="one answer can be streamed at a time"):
            generate(talker, tiny_processor, image, prompt, stream=print)
