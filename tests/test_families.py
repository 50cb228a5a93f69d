"""What defines each of the other families, on tiny random models. VisualBERT is compared with transformers."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import VISION, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from minivlm import emoji, training
from minivlm.emoji import scenes
from minivlm.families import (
    base,
    batches,
    clipcap,
    cm3,
    evaluation,
    flamingo,
    magic,
    recipe,
    simvlm,
    visualbert,
    visualgpt,
)
from minivlm.gemma import GemmaForCausalLM
from minivlm.losses import l2_normalize
from minivlm.processor import Processor
from minivlm.siglip import SiglipVisionModel
from minivlm.training.tokenizer import train_tokenizer

D = tiny_config(1).text_config.hidden_size
SIZE = 48


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(train_tokenizer(scenes.texts(range(60)), vocab_size=1600), SIZE, 9)


def parts(vocab_size: int = 120) -> tuple[GemmaForCausalLM, SiglipVisionModel]:
    model = tiny_model(1, vocab_size=vocab_size)
    return model.language_model, model.vision_tower


def pixels(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, VISION.image_size, VISION.image_size, generator=torch.Generator().manual_seed(seed))


def texts(rows: int = 2, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def text_logits(decoder: GemmaForCausalLM, input_ids: torch.Tensor) -> torch.Tensor:
    ones = torch.ones_like(input_ids)
    return decoder.logits(decoder.model(decoder.model.embed(input_ids), ones, ones))


def captioners() -> dict[str, base.Captioner]:
    return {
        "clipcap frozen": clipcap.ClipCap(*parts(), frozen=True, prefix_length=3, layers=1),
        "clipcap tuned": clipcap.ClipCap(*parts(), frozen=False, prefix_length=3),
        "visualgpt": visualgpt.VisualGPT(*parts(), num_heads=2),
        "simvlm": simvlm.SimVLM(parts()[0], 16),
        "flamingo": flamingo.Flamingo(*parts(), latents=2, layers=1, num_heads=2),
    }


def batch_for(name: str) -> dict[str, torch.Tensor]:
    batch = {"pixel_values": pixels()} | texts()
    if name == "simvlm":
        batch |= {"pixel_values": torch.rand(1, 3, 16, 16), "prefix_lengths": torch.tensor([1, 3])}
    if name == "flamingo":
        batch |= {"pixel_values": pixels(4), "images_before": torch.tensor([[0, 1, 1, 1, 2, 2, 2]] * 2)}
    return batch


@pytest.mark.parametrize("name", captioners())
def test_training_moves_what_is_trained_and_nothing_else(tmp_path, name):
    model = captioners()[name]
    frozen = {
        "clipcap frozen": ("decoder", "tower"),
        "flamingo": ("tower", "decoder.model.embed_tokens", "decoder.model.norm"),
        "simvlm": (),
    }.get(name, ("tower",))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.prepare()
    training.fit(model, [batch_for(name)] * 3, out=tmp_path, steps=3, lr=1e-2)
    model.finish()
    for key, value in model.state_dict().items():
        is_frozen = key.startswith(frozen) or (name == "flamingo" and ".layer." in key)
        assert torch.equal(before[key], value) == is_frozen, key
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", captioners())
def test_writing_with_the_cache_equals_reading_it_all_again(name):
    model = captioners()[name].eval()
    images = torch.rand(2, 3, 16, 16) if name == "simvlm" else pixels()
    ids = torch.full((2, 1), 2)
    with torch.no_grad():
        x, _, types = model.begin(images, ids, torch.ones_like(ids))
        written = base.write(model.decoder, x, types, eos=1, max_new_tokens=5)
        for step in range(written.shape[1]):
            x, mask, types = model.begin(images, ids, torch.ones_like(ids))
            token = model.decoder.logits(model.decoder.model(x, mask, types)[:, -1]).argmax(-1)
            going = (written[:, :step] != 1).all(1)
            assert torch.equal(token[going], written[going, step])
            ids = torch.cat((ids, written[:, step : step + 1]), dim=1)


# --- Flamingo --------------------------------------------------------------------------------------------------------


def test_flamingo_starts_as_exactly_the_language_model():
    decoder, tower = parts()
    ids = texts()["input_ids"]
    before = text_logits(decoder, ids)
    model = flamingo.Flamingo(decoder, tower, latents=2, layers=1, num_heads=2)
    model.look(pixels())
    assert torch.equal(text_logits(decoder, ids), before) and not model.gates.any()
    with torch.no_grad():
        decoder.model.layers[1].alpha += 0.5
    assert not torch.equal(text_logits(decoder, ids), before)


def opened_flamingo() -> flamingo.Flamingo:
    model = flamingo.Flamingo(*parts(), latents=2, layers=1, num_heads=2).eval()
    with torch.no_grad():
        for layer in model.decoder.model.layers:
            layer.alpha += 1
            layer.beta += 1
    return model


def test_a_token_attends_to_the_last_image_before_it():
    mask = flamingo.last_image_mask(torch.tensor([[0, 1, 1, 2, 3]]), images=3, latents=2)[0]
    assert mask.int().tolist() == [
        [0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    model, ids = opened_flamingo(), texts(1, 5)["input_ids"]
    before = torch.tensor([[0, 1, 1, 2, 2]])
    images = pixels(2)

    def logits(changed: int | None = None):
        shown = images.clone()
        if changed is not None:
            shown[changed] = 0
        model.look(shown, before)
        return text_logits(model.decoder, ids)[0]

    with torch.no_grad():
        plain, first, second = logits(), logits(0), logits(1)
    assert torch.equal(plain[:1], first[:1]) and not torch.allclose(plain[1], first[1])
    assert torch.equal(plain[:3], second[:3]) and not torch.allclose(plain[3], second[3])
    # What later tokens know of the first image, they know through the text.
    assert not torch.allclose(plain[4], first[4])


# --- VisualGPT -------------------------------------------------------------------------------------------------------


def test_the_gates_are_the_paper_s_number_by_number():
    h = torch.linspace(-4, 4, 33)
    visual, language = visualgpt.resurrecting_gates(h, 0.2)
    for value, v, w in zip(h.tolist(), visual.tolist(), language.tolist(), strict=True):
        sigma = 1 / (1 + np.exp(-value))
        assert v == pytest.approx(sigma if sigma > 0.2 else 0) and w == pytest.approx(
            1 - sigma if 1 - sigma > 0.2 else 0
        )
    assert bool(((visual > 0) | (language > 0)).all())


def test_visualgpt_without_an_image_is_the_language_model():
    decoder, tower = parts()
    ids = texts()["input_ids"]
    before = text_logits(decoder, ids)
    model = visualgpt.VisualGPT(decoder, tower, num_heads=2)
    assert torch.equal(text_logits(decoder, ids), before)
    model.look(pixels())
    assert not torch.allclose(text_logits(decoder, ids), before)
    assert model.gates.shape == (4, 2, 7, D)
    model.look_away()
    assert torch.equal(text_logits(decoder, ids), before)


# --- ClipCap and SimVLM ----------------------------------------------------------------------------------------------


def test_clipcap_puts_k_vectors_of_one_image_vector_before_the_text():
    for frozen in (True, False):
        model = clipcap.ClipCap(*parts(), frozen=frozen, prefix_length=5, layers=1)
        seen = model.see(pixels())
        assert model.look(pixels()).shape == (2, 5, D)
        shuffled = seen[:, torch.randperm(seen.shape[1], generator=torch.Generator().manual_seed(0))]
        torch.testing.assert_close(model.mapper(seen.mean(1)), model.mapper(shuffled.mean(1)))


def test_simvlm_s_prefix_is_bidirectional_and_its_texts_see_no_image():
    model, batch = simvlm.SimVLM(parts()[0], 16).eval(), batch_for("simvlm")
    images, ids = batch["pixel_values"], batch["input_ids"]

    def loss(images, ids, lengths, rows):
        share = {"input_ids": ids[rows], "attention_mask": torch.ones_like(ids[rows])}
        return model(
            images[: max(0, min(1, rows.stop))] if rows.start == 0 else images[:0],
            **share,
            prefix_lengths=lengths[rows],
        )

    with torch.no_grad():
        both = model(**batch)
        rest = (ids.shape[1] - batch["prefix_lengths"]).float()
        alone = [loss(images, ids, batch["prefix_lengths"], slice(i, i + 1)) for i in (0, 1)]
        torch.testing.assert_close(both, (alone[0] * rest[0] + alone[1] * rest[1]) / rest.sum())
        other = loss(images + 1, ids, batch["prefix_lengths"], slice(1, 2))
        assert torch.equal(other, alone[1])
        # Within the prefix, an earlier token attends to a later one: its hidden state changes with it.
        x, mask, _ = model.begin(images, ids[:1], torch.ones_like(ids[:1]))
        changed = x.clone()
        changed[:, 3] += 1
        for length, sees in ((5, True), (1, False)):
            types = simvlm.after(torch.tensor([1 + length]), mask)
            same = torch.equal(*(model.decoder.model(v, mask, types)[:, 2] for v in (x, changed)))
            assert same != sees


# --- CM3 -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.data())
def test_spans_that_were_cut_out_go_back_to_their_places(ids, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), min_size=2, max_size=6)))
    spans = list(zip(cuts[0::2], cuts[1::2], strict=False))
    sentinels = [100, 101, 102]
    document = cm3.cut_spans(ids, spans, sentinels)
    assert cm3.fill_spans(document, sentinels) == ids
    assert len(document) == len(ids) + 2 * len(spans)


def test_the_document_of_the_paper_s_figure():
    assert cm3.cut_spans([1, 2, 3, 4, 5, 6], [(2, 5)], [100]) == [1, 2, 100, 6, 100, 3, 4, 5]
    with pytest.raises(ValueError, match="in order"):
        cm3.cut_spans([1, 2, 3], [(2, 1)], [9])
    with pytest.raises(ValueError, match="at most 1"):
        cm3.cut_spans([1, 2, 3], [(0, 1), (1, 2)], [9])


def small_cm3(processor: Processor) -> cm3.CM3:
    words = processor.tokenizer.get_vocab_size()
    vae = cm3.ImageVQVAE(codes=16, dim=4, width=8)
    torch.nn.init.normal_(vae._vq_vae._embedding)
    return cm3.CM3(GemmaForCausalLM(tiny_config(1, vocab_size=words + 18).text_config), vae, words)


def test_cm3_reads_writes_and_draws_documents(processor):
    model = small_cm3(processor)
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    loader = batches.DocumentBatches(processor, 6, side=6, begin=model.begin, sentinel=model.sentinel)
    batch = loader[0]
    assert all(torch.equal(value, loader[0][name]) for name, value in batch.items())
    _, ids = model.read(**batch)
    codes = model.words + model.vae.encode(batch["pixel_values"])
    captions = [batches.caption_of(scene) for scene in loader.scenes(0)]
    for row, length, code, caption in zip(
        ids.tolist(), batch["is_token"].sum(1), codes.tolist(), captions, strict=True
    ):
        row = row[: int(length)]
        whole = cm3.fill_spans(row[:-1] if model.sentinel in row else row, [model.sentinel])
        (words,) = processor.encode([caption])
        assert whole == [processor.bos_token_id, *words, model.begin, *code, processor.eos_token_id]
    assert torch.isfinite(model(**batch))
    assert len(model.caption(processor, batch["pixel_values"])) == 6
    drawn = model.draw(processor, "a cat", 2, 6, top_k=4)
    assert drawn.shape == (2, 3, SIZE, SIZE) and drawn.abs().max() <= 1
    assert torch.equal(drawn, model.draw(processor, "a cat", 2, 6, top_k=4))


def test_the_image_vqvae_learns(tmp_path, processor):
    objective = cm3.ImageVQVAEObjective(cm3.ImageVQVAE(codes=16, dim=4, width=8))
    batch = batches.ImageBatches(processor, 4)[0]
    first = float(objective(**batch).detach())
    training.fit(objective, [batch] * 100, out=tmp_path, steps=100, lr=5e-3)
    assert float(objective(**batch).detach()) < 0.85 * first


# --- MAGiC -----------------------------------------------------------------------------------------------------------


def test_magic_writes_what_a_slow_loop_over_candidates_writes(processor):
    V, k, alpha, beta = processor.tokenizer.get_vocab_size(), 5, 0.3, 1.5
    model = tiny_model(1, vocab_size=V)
    decoder = tiny_model(1, seed=1, vocab_size=V).language_model
    images = pixels(2)
    fits = magic.token_similarity(model, images)
    patches = l2_normalize(model.encode_image(images))
    words = l2_normalize(model.language_model.model.embed_tokens.weight)
    torch.testing.assert_close(fits[1, 7], max(p @ words[7] for p in patches[1]))
    expected = []
    for row in range(2):
        ids = [processor.bos_token_id]
        for _ in range(4):
            probabilities, candidates = text_logits(decoder, torch.tensor([ids]))[0, -1].softmax(-1).topk(k)
            image = (magic.SHARPNESS * fits[row, candidates]).softmax(-1)
            scores = []
            for p, candidate, seen in zip(probabilities, candidates.tolist(), image, strict=True):
                longer = torch.tensor([[*ids, candidate]])
                ones = torch.ones_like(longer)
                hidden = l2_normalize(decoder.model(decoder.model.embed(longer), ones, ones)[0])
                scores.append((1 - alpha) * p - alpha * max(hidden[-1] @ h for h in hidden[:-1]) + beta * seen)
            ids.append(candidates[int(torch.stack(scores).argmax())].item())
        expected.append(processor.decode(ids[1:]))
    found = magic.caption(decoder, model, processor, images, k=k, alpha=alpha, beta=beta, max_new_tokens=4)
    assert found == expected


# --- VisualBERT ------------------------------------------------------------------------------------------------------


def test_visualbert_equals_transformers():
    import transformers

    config = visualbert.VisualBertConfig(50, 20, hidden_size=24, intermediate_size=40, num_hidden_layers=3)
    theirs = transformers.VisualBertForPreTraining(
        transformers.VisualBertConfig(**asdict(config), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    ours = visualbert.VisualBert(config)
    weights = theirs.state_dict()
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.missing_keys and all("decoder" in k or "position_ids" in k for k in missing.unexpected_keys)
    ids = torch.randint(50, (2, 6), generator=g)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    regions = torch.randn(2, 5, 20, generator=g)
    with torch.no_grad():
        wanted = theirs(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=torch.zeros_like(ids),
            visual_embeds=regions,
            visual_attention_mask=torch.ones(2, 5, dtype=torch.long),
            visual_token_type_ids=torch.ones(2, 5, dtype=torch.long),
        )
        hidden = ours.hidden_states(ids, mask, regions)
        torch.testing.assert_close(ours.word_logits(hidden), wanted.prediction_logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.match_logits(hidden), wanted.seq_relationship_logits, rtol=1e-5, atol=1e-5)


def test_masked_words_are_words_and_their_labels_are_what_they_were(processor):
    V = processor.tokenizer.get_vocab_size()
    loader = batches.BlankBatches(processor, 64, vocab_size=V)
    batch = loader[0]
    plain, is_target = batch["input_ids"].clone(), batch["labels"] != -100
    plain[is_target] = batch["labels"][is_target]
    special = torch.isin(plain, torch.tensor([processor.bos_token_id, processor.eos_token_id, processor.pad_token_id]))
    assert not (special & is_target).any()
    words = int((batch["attention_mask"].bool() & ~special).sum())
    assert 0.10 < int(is_target.sum()) / words < 0.20
    assert 0.7 < float((batch["input_ids"][is_target] == loader.mask_id).float().mean()) < 0.9
    told = [[texts[0] for texts in scene.captions.values()] for scene in loader.scenes(0)]
    rows = [processor.decode(row) for row in plain]
    for i, (row, other) in enumerate(zip(rows, batch["is_other"].tolist(), strict=True)):
        assert row == told[i][0] + told[i - other][-1] and (not other or told[i][-1] != told[i - 1][-1])
    alone = batches.BlankBatches(processor, 1, vocab_size=V)
    assert not any(alone[step]["is_other"].any() for step in range(8))  # there is no other scene
    assert 0.3 < float(batch["is_other"].float().mean()) < 0.7


def test_visualbert_trains_both_heads(tmp_path, processor):
    V = processor.tokenizer.get_vocab_size()
    config = visualbert.VisualBertConfig(V + 1, VISION.hidden_size, hidden_size=24, intermediate_size=40)
    objective = visualbert.VisualBertObjective(visualbert.VisualBert(config), parts()[1])
    batch = batches.BlankBatches(processor, 8, vocab_size=V)[0]
    batch["pixel_values"] = F.interpolate(batch["pixel_values"], VISION.image_size)
    first = float(objective(**batch).detach())
    objective.prepare()
    training.fit(objective, [batch] * 40, out=tmp_path, steps=40, lr=3e-3)
    assert float(objective(**batch).detach()) < 0.8 * first
    filled = visualbert.fill_blanks(objective.model, torch.zeros(8, 9, VISION.hidden_size), batch["input_ids"], V)
    assert filled.max() < V and torch.equal(filled == batch["input_ids"], batch["input_ids"] != V)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_interleaved_documents_name_two_things_and_count_images(processor):
    loader = batches.InterleavedBatches(processor, 8, world=emoji.World(10, 2))
    batch = loader[0]
    assert all(torch.equal(value, loader[0][name]) for name, value in batch.items())
    assert batch["pixel_values"].shape == (24, 3, SIZE, SIZE)
    for ids, before, mask in zip(*(batch[n] for n in ("input_ids", "images_before", "attention_mask")), strict=True):
        lines = processor.decode(ids).split("\n")
        assert len(lines) == 3
        for number, line in enumerate(lines, start=1):
            chosen = (before == number) & (mask == 1)
            assert processor.decode(ids[chosen]).strip() == line
    shown, captions = loader.naming_document(np.random.default_rng(0))
    names = [scene.objects[0].name for scene in shown]
    assert [len(scene.objects) for scene in shown] == [1, 1, 1] and len(set(names)) == 2
    assert [captions.index(caption) for caption in captions] == [names.index(name) for name in names]
    assert not set(caption.removeprefix("a ") for caption in captions) & set(emoji.OBJECTS)


def test_text_batches_are_documents_without_images(processor):
    batch = batches.TextBatches(processor, 16)[3]
    documents = [processor.decode(ids).split("\n") for ids in batch["input_ids"]]
    assert {len(lines) for lines in documents} == {3}
    known = [all(emoji.parse_caption(line) for line in lines) for lines in documents]
    assert 3 <= sum(known) <= 13
    model = base.TextModel(tiny_model(1, vocab_size=processor.tokenizer.get_vocab_size()).language_model)
    assert torch.isfinite(model(**batch))


def test_prefix_batches_leave_something_to_predict(processor):
    loader = batches.PrefixBatches(processor, 6, texts=["a cat", "a dog and a cat"], text_rows=3)
    batch = loader[1]
    assert len(batch["pixel_values"]) == 6 and len(batch["input_ids"]) == 9
    assert bool((batch["prefix_lengths"] >= 1).all())
    assert bool((batch["prefix_lengths"] < batch["attention_mask"].sum(1)).all())
    assert len(set(batch["prefix_lengths"].tolist())) > 1


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> recipe.Parts:
    return recipe.load_parts(with_text=False)


@pytest.mark.parametrize("name", recipe.NAMES)
def test_a_family_is_built_saved_and_loaded(tmp_path, made, name):
    model = recipe.build(name, made)
    assert torch.equal(*(next(recipe.build(name, made).parameters()).detach() for _ in range(2)))
    own = recipe.own_weights(model)
    assert not any("tower" in key for key in own)
    if name == "flamingo":
        assert not any(".layer." in key or "embed_tokens" in key for key in own)
    with torch.no_grad():
        for value in own.values():
            value.add_(0.01)
    recipe.save_weights(model, tmp_path, name)
    other = recipe.load(name, made, tmp_path)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-2, atol=1e-3)
    with pytest.raises(FileNotFoundError, match=f"families train {name}"):
        recipe.load(name, made, tmp_path / "nothing")
    with pytest.raises(ValueError, match="does not fit"):
        recipe.load_weights(recipe.build("text" if name != "text" else "cm3", made), tmp_path, name)


@pytest.mark.parametrize("name", recipe.NAMES)
def test_the_first_step_of_every_run(made, name):
    for run in recipe.runs(name, recipe.build(name, made), made, steps=0.001):
        run.batches.batch_size = 2
        assert torch.isfinite(run.objective(**run.batches[0])) and 1 <= run.steps < 20


@pytest.mark.slow
def test_a_short_training_from_the_command_line_and_its_row(tmp_path, made, capsys):
    from minivlm.__main__ import main

    arguments = ["--out", str(tmp_path), "--steps", "0.0005"]
    assert main(["families", "train", "flamingo", *arguments, "--weights", str(tmp_path)]) == 2  # nothing is there
    assert "families train text" in capsys.readouterr().err
    assert main(["families", "train", "text", "flamingo", *arguments]) == 0
    weights = ["--weights", str(tmp_path), "--scenes", "6"]
    assert main(["families", "evaluate", "paligemma", "flamingo", "magic", *weights]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[-3:]] == ["| paligemma", "| flamingo", "| magic"]
    before, after = table[-2].split(" | ")[8].split(" → ")
    assert before == after  # the language model has lost nothing
    assert main(["families", "train", "blip", *arguments]) == 2 and "no family 'blip'" in capsys.readouterr().err
    assert main(["families", "evaluate", "visualbert", *weights]) == 2 and "to evaluate" in capsys.readouterr().err
    (tmp_path / "text.safetensors").write_bytes(b"nothing")
    assert main(["families", "evaluate", *weights]) == 2 and "is damaged" in capsys.readouterr().err


def test_names_in_a_text():
    assert evaluation.mentioned("two cats, a dog and a hot dog") == {"cat": 1, "dog": 1} | (
        {"hot dog": 1} if "hot dog" in emoji.OBJECTS else {"dog": 2}
    )
    scenes = [emoji.make_scene(seed, "validation") for seed in range(5)]
    right = [scene.examples[0].answers[0] for scene in scenes]
    assert evaluation.name_rates(right, scenes) == (1.0, 0.0) and evaluation.exact(right, scenes).all()
    recalled, hallucinated = evaluation.name_rates(["a zoba"] * 5, scenes)
    assert (recalled, hallucinated) == (0.0, 1.0)
