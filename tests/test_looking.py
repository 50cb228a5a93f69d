"""What lab L7 measures, on the embedded checkpoint and on a few hand-made tensors."""

import numpy as np
import pytest
import torch

import minivlm
from minivlm import emoji
from minivlm.course import looking


@pytest.fixture(scope="module")
def embedded():
    return minivlm.PaliGemma.from_pretrained(dtype=torch.float32), minivlm.Processor.from_pretrained()


@pytest.fixture(scope="module")
def scene():
    return emoji.make_scene(0, "validation")


def test_yes_no_metrics_by_hand_and_for_a_model_that_never_says_yes():
    said = torch.tensor([True, True, True, True, False, False])
    truth = torch.tensor([True, True, False, False, True, False])
    want = {"accuracy": 1 / 2, "precision": 1 / 2, "recall": 2 / 3, "f1": 4 / 7, "yes": 2 / 3}
    assert looking.yes_no_metrics(said, truth) == pytest.approx(want)
    never = looking.yes_no_metrics(torch.zeros_like(truth), truth)
    assert never == {"accuracy": 0.5, "precision": 0, "recall": 0, "f1": 0, "yes": 0}


def test_negatives_are_absent_and_ranked():
    present = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
    assert looking.popular_negatives(present, 1)[:, 0].tolist() == [4, 4, 1, 0]
    assert looking.adversarial_negatives(present, 1)[:, 0].tolist() == [4, 2, 1, 0]
    random = looking.random_negatives(present, 2, torch.Generator().manual_seed(0))
    assert not present.gather(1, random).any() and (random[:, 0] != random[:, 1]).all()


def test_occlusion_hides_one_patch_or_several():
    pixels = torch.randn(3, 4, 6)
    copies = looking.occlude_patches(pixels, 2)
    assert copies.shape == (6, 3, 4, 6)
    assert torch.equal(copies[4], looking.occlude(pixels, [4], 2)) and (copies[4][:, 2:, 2:4] == 0).all()
    assert ((copies != pixels).sum((1, 2, 3)) == 12).all() and (pixels != 0).all()
    both = looking.occlude(pixels, [0, 5], 2)
    assert torch.equal(both == 0, (copies[0] == 0) | (copies[5] == 0))


def test_contrast_with_alpha_0_changes_nothing_and_the_most_likely_token_stays():
    logits, blind = torch.randn(5, 9), torch.randn(5, 9)
    assert torch.allclose(looking.contrastive_logits(logits, blind, 0.0, 0.0), logits)
    strict = looking.contrastive_logits(logits, blind, 3.0, 1.0)
    assert torch.equal(strict.argmax(-1), logits.argmax(-1)) and (strict.isfinite().sum(1) == 1).all()


def test_next_logits_are_those_of_the_model(embedded, scene):
    model, processor = embedded
    prompts = [looking.is_there(scene.objects[0].name), looking.is_there("dax"), "caption en"]
    assert prompts[1] == "answer en is there a dax?"
    together = looking.next_logits(model, processor, [scene.image] * 3, prompts)  # of different lengths
    for prompt, logits in zip(prompts, together, strict=True):
        pixels = processor.preprocess_images([scene.image])
        alone = looking.logits_of_pixels(model, processor, pixels, prompt)[0]
        assert (alone - logits).abs().max() < 1e-4 * alone.abs().max()
    said = minivlm.generate(model, processor, scene.image, prompts[0], max_new_tokens=2)
    assert (said == "yes") == bool(looking.yes_margin(together[:1], processor) > 0)


def test_a_blocked_model_is_blind_and_an_unblocked_one_is_as_before(embedded, scene):
    model, processor = embedded
    images = [scene.image, emoji.make_scene(1, "validation").image]
    batch = processor(text=["caption en"] * 2, images=images)
    with torch.no_grad():
        before = model(**batch)[:, -1]
        with looking.blocked(model, range(len(model.language_model.model.layers)), processor.num_image_tokens):
            blind = model(**batch)[:, -1]
        assert torch.equal(model(**batch)[:, -1], before)
    assert (blind[0] - blind[1]).abs().max() < 1e-5 * blind.abs().max()
    assert (before[0] - before[1]).abs().max() > 1e-2 * before.abs().max()


def test_blocking_with_a_cache_gets_a_sentence(embedded, scene):
    with looking.blocked(embedded[0], [0], 49), pytest.raises(ValueError, match="Pass cache=None"):
        minivlm.generate(*embedded, scene.image, "caption en", max_new_tokens=2)


def test_the_lens_ends_in_the_models_own_logits(embedded, scene):
    model, processor = embedded
    batch = processor(text=["caption en"], images=[scene.image])
    lens = looking.logit_lens(model, **batch)
    with torch.no_grad():
        assert torch.equal(lens[-1], model(**batch))
    assert len(lens) == len(model.language_model.model.layers) + 1 and not torch.equal(lens[-2], lens[-1])


def test_scenes_and_batches_of_the_new_words(embedded):
    _, processor = embedded
    pair, world = ("avocado", "sunflower"), emoji.World(10, most=3)
    found = looking.new_word_scenes(pair, world, ("both", "second"), 3)
    assert sorted(shown for _, shown in found) == [(False, True)] * 3 + [(True, True)] * 3
    for scene, shown in found:
        assert shown == tuple(name in {o.name for o in scene.objects} for name in pair)
    batches = looking.NewWords(processor, found, batch_size=4)
    batch = batches[0]
    assert batch["pixel_values"].shape[0] == 4 and batch["input_ids"].shape[0] == 8
    assert all(np.array_equal(batch[key], batches[0][key]) for key in batch)
    first = (batch["labels"] != -100).long().argmax(1, keepdim=True)
    assert set(processor.decode(row.tolist()) for row in batch["labels"].gather(1, first)) <= {"yes", "no"}


def test_teaching_lowers_the_loss_and_leaves_the_tower(embedded, tmp_path):
    model, processor = minivlm.PaliGemma.from_pretrained(dtype=torch.float32), embedded[1]
    lessons = looking.new_word_scenes(("avocado", "sunflower"), emoji.World(10, most=3), ("both", "neither"), 4)
    batch = looking.NewWords(processor, lessons)[0]
    labels = batch.pop("labels")
    batch["pixel_values"] = batch["pixel_values"].repeat_interleave(2, dim=0)
    tower = embedded[0].vision_tower.state_dict()
    with torch.no_grad():
        before = float(model.loss(labels, **batch))
    looking.teach_words(model, processor, lessons, tmp_path, steps=4)
    with torch.no_grad():
        assert float(model.loss(labels, **batch)) < before - 0.05
    assert all(torch.equal(value, tower[name]) for name, value in model.vision_tower.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
