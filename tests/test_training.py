"""Training: the batches say what the scenes say, a killed run goes on to the same result, two processes equal one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minivlm import emoji, locations
from minivlm.emoji import evaluation, recipe
from minivlm.generation import generate
from minivlm.hub import EMBEDDED
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.vqvae import MaskVQVAE

ROOT = Path(__file__).parent.parent
TINY = recipe.TrainConfig(
    image_size=64,
    patch_size=16,
    width=32,
    mlp_width=48,
    tower_layers=1,
    decoder_layers=1,
    heads=2,
    masks_scenes=24,
    masks_batch=4,
    align_scenes=24,
    align_batch=4,
    answer_scenes=24,
    answer_horizon=32,
    answer_batch=4,
    polish_scenes=8,
    finish_scenes=8,
    pose_scenes=8,
    pose_batch=4,
    segment_scenes=8,
    redraw_scenes=8,
    redraw_batch=4,
    examples=2,
)
HERE = recipe.DistributedContext(torch.device("cpu"), workers=1)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return recipe.new_processor(TINY)


def test_the_tokenizer_is_that_of_the_embedded_checkpoint(processor):
    """Token for token: whoever trains anew gets a model that reads and writes as the embedded one does."""
    embedded = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(processor.tokenizer.to_str()) == embedded


# --- masks ----------------------------------------------------------------------------------------------------------


def test_mask_batch_holds_the_masks_of_all_things_in_their_boxes(processor):
    masks = recipe.MaskSteps(TINY, processor, 4)[2]["masks"]
    things = [thing for seed in range(8, 12) for thing in emoji.make_scene(seed, "train", 64).objects]
    expected = np.stack([locations.crop_mask(thing.mask, thing.box) for thing in things])
    assert masks.dtype == torch.float32 and np.array_equal(masks.numpy(), expected)
    halves = [recipe.MaskSteps(TINY, processor, 4, rank, 2)[2]["masks"] for rank in range(2)]
    assert torch.equal(masks, torch.cat(halves))


def test_segment_batch_writes_the_codes_of_the_masks(processor):
    steps = recipe.SegmentSteps(TINY, processor, 4)
    steps.vae = MaskVQVAE.from_pretrained()
    coded = 0
    for step in range(6):
        batch, drawn = steps[step], [scene for scene in steps.scenes(step) for _ in range(TINY.examples)]
        for scene, ids, labels in zip(drawn, batch["input_ids"], batch["labels"], strict=True):
            prompt, answer = processor.decode(ids).split("\n")
            (example,) = (e for e in scene.examples if e.prompt == prompt)
            assert processor.decode(labels[labels != -100]) == answer
            if example.kind != "segment":
                assert answer == example.answers[0]
                continue
            parsed = locations.parse_detections(answer, 64, 64)
            assert parsed.problems == []
            things = emoji.select_objects(scene.objects, prompt.removeprefix("segment ").split(" ; "))
            codes = steps.vae.codes_from_masks([thing.mask for thing in things], [thing.box for thing in things])
            assert [(d.label, d.codes) for d in parsed.detections] == list(
                zip([thing.name for thing in things], codes, strict=True)
            )
            coded += len(codes)
    assert coded > 10


def test_losses_of_the_masks_by_hand():
    """Squared error of the drawing made from codebook vectors, and a quarter of the distance to them."""
    torch.manual_seed(0)
    learning = recipe.MaskVQVAEObjective()
    learning.vae._vq_vae._embedding.normal_()
    learning.decay = 1.0  # the averages, and with them the codebook, stay at nothing
    masks = (torch.rand(3, 64, 64) < 0.5).float()
    codes = learning.vae.encode(masks)
    with torch.no_grad():
        found = learning.vae.encoder(2 * masks[:, None] - 1).flatten(2).mT  # [3, 16, 512]
        drawn = learning.vae.decode(codes)
        away = (found - learning.vae._vq_vae._embedding[codes]).square().mean()
    expected = (drawn - (2 * masks - 1)).square().mean() + 0.25 * away
    torch.testing.assert_close(learning(masks), expected, rtol=1e-5, atol=0)


def test_the_encoder_learns_from_the_drawing():
    """The gradient of the drawing passes the codebook as if it were not there, and the codebook itself has none."""
    torch.manual_seed(0)
    learning = recipe.MaskVQVAEObjective()
    learning.commitment = 0.0
    learning.vae._vq_vae._embedding.normal_()
    codebook = learning.vae._vq_vae._embedding.clone()
    masks = torch.rand(2, 64, 64)
    learning(masks).backward()
    grid = codebook[learning_codes(learning, masks, codebook)].mT.unflatten(2, (4, 4)).requires_grad_()
    (learning.vae.decoder(grid)[:, 0] - (2 * masks - 1)).square().mean().backward()
    # the gradient at the grid of vectors is that at the encoder's last bias, summed over places
    torch.testing.assert_close(learning.vae.encoder[10].bias.grad, grid.grad.sum((0, 2, 3)), rtol=1e-4, atol=1e-9)
    assert not learning.vae._vq_vae._embedding.requires_grad


def learning_codes(learning, masks, codebook):
    with torch.no_grad():
        vectors = learning.vae.encoder(2 * masks[:, None] - 1).flatten(2).mT
    return torch.cdist(vectors, codebook).argmin(2)


def test_the_codebook_follows_its_vectors_by_hand():
    """Codes 0 and 1 with averages of size 2 and 3; three vectors come for the first, one for the second."""
    learning = recipe.MaskVQVAEObjective()
    learning.decay = 0.9
    learning.sizes.fill_(2.0)
    learning.sizes[1] = 3.0
    learning.sums[0], learning.sums[1], learning.sums[2] = 20.0, 30.0, 40.0
    vectors = torch.tensor([1.0, 2.0, 6.0, 5.0])[:, None].expand(4, 512)
    learning.follow(vectors, torch.tensor([0, 0, 0, 1]))
    sizes = [0.9 * 2 + 0.1 * 3, 0.9 * 3 + 0.1 * 1, 0.9 * 2]  # 2.1, 2.8, 1.8: none is idle
    sums = [0.9 * 20 + 0.1 * 9, 0.9 * 30 + 0.1 * 5, 0.9 * 40]
    torch.testing.assert_close(learning.sizes[:3], torch.tensor(sizes))
    torch.testing.assert_close(learning.sums[:3, 7], torch.tensor(sums))
    codebook = learning.vae._vq_vae._embedding
    torch.testing.assert_close(codebook[:3, 100], torch.tensor([18.9 / 2.1, 27.5 / 2.8, 36 / 1.8]))
    assert codebook[3:].eq(0).all()


def test_an_idle_code_goes_beside_a_busy_one():
    """Two are idle and two busy; the busiest gives half to the first. One who takes 1 vector or more is left alone."""
    learning = recipe.MaskVQVAEObjective()
    learning.decay = 1.0
    learning.sizes.fill_(2.0)
    learning.sums.fill_(2.0)
    for code, size, place in ((3, 0.5, 9.0), (4, 0.0, 0.0), (10, 8.0, 5.0), (20, 40.0, 7.0)):
        learning.sizes[code], learning.sums[code] = size, size * place
    learning.follow(torch.zeros(1, 512), torch.zeros(1, dtype=torch.long))
    sizes = {3: 20.0, 20: 20.0, 4: 4.0, 10: 4.0, 0: 2.0, 127: 2.0}
    assert {code: float(learning.sizes[code]) for code in sizes} == sizes
    places = {3: 1.01 * 7, 20: 7.0, 4: 1.01 * 5, 10: 5.0, 0: 1.0, 127: 1.0}
    codebook = learning.vae._vq_vae._embedding[:, 33]
    assert {code: float(codebook[code]) for code in places} == pytest.approx(places, rel=1e-6)


def test_an_idle_code_stays_where_nobody_has_work_to_share():
    learning = recipe.MaskVQVAEObjective()
    learning.decay = 1.0
    learning.sizes.fill_(4.0)
    learning.sizes[5] = 0.0
    learning.sums.fill_(4.0)
    learning.follow(torch.zeros(1, 512), torch.zeros(1, dtype=torch.long))
    assert learning.sizes[5] == 0 and learning.sizes[6] == 4


def test_training_the_masks_brings_all_codes_to_work(processor):
    """At the start one code has all the work: after a few steps the codebook has spread, and masks come back."""
    torch.manual_seed(0)
    learning = recipe.MaskVQVAEObjective()
    optimizer = recipe.new_optimizer(learning, 0.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    batch = recipe.MaskSteps(TINY, processor, 8)[0]
    losses = [recipe.train_step(learning, batch, optimizer, 1, "float32") for _ in range(40)]
    assert len(learning.vae.encode(batch["masks"]).unique()) > 10
    assert losses[-1] < 0.6 * losses[0]


def test_redraw_batch_holds_what_the_model_writes_and_what_is_true():
    """Masks written by the embedded model, matched by name and box, and the true ones; scene by scene."""
    model, processor, vae = PaliGemma.from_pretrained(), Processor.from_pretrained(), MaskVQVAE.from_pretrained()
    config = replace(TINY, image_size=112)
    steps = recipe.RedrawSteps(config, processor, 6)
    steps.model, steps.vae = model, vae
    batch, rows, missed = steps[0], 0, 0
    for scene in steps.scenes(0):
        classes = sorted({thing.name for thing in scene.objects}, key=[t.name for t in scene.objects].index)
        answer = generate(model, processor, scene.image, "segment " + " ; ".join(classes), max_new_tokens=120)
        found = locations.parse_detections(answer, 112, 112).detections
        written, true = [], []
        for thing in scene.objects:
            right = [d for d in found if d.label == thing.name and evaluation.box_iou(d.box, thing.box) >= 0.5]
            best = max(right, key=lambda d: evaluation.box_iou(d.box, thing.box), default=None)
            missed += best is None
            if best:
                written.append((best.codes, locations.crop_mask(thing.mask, best.box)))
            mask = locations.crop_mask(thing.mask, thing.box)
            true.append((tuple(vae.encode(torch.tensor(mask)[None])[0].tolist()), mask))
        for (codes, mask), of_model in [*((row, True) for row in written), *((row, False) for row in true)]:
            assert tuple(batch["codes"][rows].tolist()) == codes and bool(batch["written"][rows]) == of_model
            assert np.array_equal(batch["masks"][rows].numpy(), mask)
            rows += 1
    assert rows == len(batch["codes"]) == len(batch["masks"]) == len(batch["written"])
    assert batch["written"].sum() > 5 > missed


def test_redraw_batch_of_a_model_that_finds_nothing_holds_the_true_masks(processor):
    steps = recipe.RedrawSteps(TINY, processor, 4)
    steps.model, steps.vae = recipe.new_model(TINY, processor).eval(), MaskVQVAE.from_pretrained()
    batch = steps[1]
    assert len(batch["codes"]) == sum(len(scene.objects) for scene in steps.scenes(1)) and not batch["written"].any()
    last_of_segment = recipe.SegmentSteps(TINY, processor, 4).seeds(1)[-1]
    assert min(steps.seeds(0)) > last_of_segment


def test_redrawing_scores_by_soft_overlap_and_moves_the_decoder_alone(processor):
    stage = recipe.stages(TINY, recipe.new_model(TINY, processor), processor)[7]
    module = stage.module
    module.vae.load_state_dict(MaskVQVAE.from_pretrained().state_dict())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    batch = {
        "codes": torch.randint(128, (5, 16), generator=generator),
        "masks": torch.rand(5, 64, 64, generator=generator).round(),
        "written": torch.tensor([True, False, True, True, False]),
    }
    expected = 0.0
    for codes, mask, written in zip(*batch.values(), strict=True):
        values = module.vae.decode(codes[None])[0].detach().double()
        likely = 1 / (1 + (-5 * values).exp())
        overlap = (likely * mask).sum() / (likely + mask - likely * mask).sum()
        error = ((values - (2 * mask - 1)) ** 2).mean()
        expected += (1.0 if written else 0.3) * (1 - overlap + 0.2 * error) / 5
    torch.testing.assert_close(module(**batch).double(), expected, rtol=1e-5, atol=0)

    optimizer = recipe.new_optimizer(module, 0.02)
    for step in range(8):
        stage.set_learning_rate(optimizer, min(step, 1))
        loss = recipe.train_step(module, batch, optimizer, 1, "float32")
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("vae.decoder")}
    assert loss < 0.95 * expected


# --- batches of the other stages ------------------------------------------------------------------------------------


def test_patches_show_what_covers_a_quarter_of_them():
    for seed in range(20):
        scene = emoji.make_scene(seed, "train", 64)
        shows = recipe.patches_show(scene, 16)
        for patch in range(16):
            y, x = patch // 4 * 16, patch % 4 * 16
            expected = set()
            for thing in scene.objects:
                pixels = sum(thing.mask[y + i, x + j] for i in range(16) for j in range(16))
                if pixels >= 64:
                    expected.add(thing.name)
            assert {emoji.OBJECTS[i] for i in np.flatnonzero(shows[patch])} == expected


def test_a_patch_belongs_to_what_covers_most_of_it():
    shared = 0
    for seed in range(60):
        scene = emoji.make_scene(seed)
        owners = recipe.owners_of_patches(scene, 16)
        for patch in range(49):
            y, x = patch // 7 * 16, patch % 7 * 16
            pixels = [int(thing.mask[y : y + 16, x : x + 16].sum()) for thing in scene.objects]
            assert owners[patch] == (pixels.index(max(pixels)) if max(pixels) >= 64 else -1)
            shared += sum(n >= 64 for n in pixels) > 1
    assert shared > 3  # or nothing had to be decided


def test_pose_batch_holds_the_pose_of_each_thing(processor):
    steps = recipe.PoseSteps(TINY, processor, 4)
    batch, drawn = steps[1], steps.scenes(1)
    assert [scene.seed for scene in drawn] == recipe.FinishSteps(TINY, processor, 4).seeds(1)
    poses = [(thing.angle / 15, thing.mirrored) for scene in drawn for thing in scene.objects]
    assert batch["poses"].dtype == torch.float32 and batch["poses"].tolist() == torch.tensor(poses).tolist()
    assert batch["owners"].shape == (4, 16)
    first = 0
    for scene, pixels, owners in zip(drawn, batch["pixel_values"], batch["owners"], strict=True):
        assert torch.equal(pixels, processor.preprocess_images([scene.image])[0])
        own = recipe.owners_of_patches(scene, 16)
        assert owners.tolist() == [first + thing if thing >= 0 else -1 for thing in own]
        first += len(scene.objects)


def test_loss_of_the_pose_by_hand(processor):
    """A mean over all patches: of what is misread, where there is something to read, and of what has changed."""
    posing = recipe.PoseObjective(recipe.new_model(TINY, processor))
    batch = recipe.PoseSteps(TINY, processor, 4)[0]
    with torch.no_grad():
        before = posing.model.encode_image(batch["pixel_values"]).double()
        posing.model.multi_modal_projector.linear.bias += 0.5
        features = posing.model.encode_image(batch["pixel_values"])
        read, got = posing.reader(features).double(), posing(**batch).double()
    owners, misread = batch["owners"], 0.0
    assert (owners < 0).any() and (owners >= 0).any()
    for scene, patch in (owners >= 0).nonzero().tolist():
        angle, mirrored = batch["poses"][owners[scene, patch]].double()
        chance = read[scene, patch, 1].sigmoid()  # that it is mirrored
        misread += float((read[scene, patch, 0] - angle) ** 2 - (chance if mirrored else 1 - chance).log())
    changed = (features.double() - before).square().mean()
    assert changed == pytest.approx(0.25)
    torch.testing.assert_close(got, misread / owners.numel() + 0.005 * changed, rtol=1e-6, atol=0)
    posing.begin()
    with torch.no_grad():
        assert float(posing(**batch)) == pytest.approx(misread / owners.numel(), rel=1e-6)


def test_the_pose_is_taught_to_the_tower_alone(processor):
    posing = recipe.PoseObjective(recipe.new_model(TINY, processor))
    posing(**recipe.PoseSteps(TINY, processor, 4)[0]).backward()
    taught = {name.split(".")[1] for name, weight in posing.named_parameters() if weight.grad is not None}
    assert taught == {"vision_tower", "multi_modal_projector", "0", "2"}  # and the reader's two layers


def test_name_ids_are_three_forms_of_each_name(processor):
    ids = recipe.AlignSteps(TINY, processor, 4).name_ids()
    texts = processor.batch_decode(ids)
    n = len(emoji.OBJECTS)
    assert texts[:n] == list(emoji.OBJECTS)
    assert texts[n : 2 * n] == [f" {name}" for name in emoji.OBJECTS]
    assert texts[2 * n :] == [f" {emoji.plural(name)}" for name in emoji.OBJECTS]


def test_bag_of_words_is_the_mean_of_its_words(processor):
    alignment = recipe.AlignmentObjective(recipe.new_model(TINY, processor))
    ids = torch.tensor([[10, 11, 12], [20, 0, 0]])
    table = alignment.model.language_model.model.embed_tokens.weight * 32**0.5
    bags = alignment.names(ids)
    torch.testing.assert_close(bags[0], (table[10] + table[11] + table[12]) / 3)
    torch.testing.assert_close(bags[1], table[20])


def test_answer_batch_holds_the_scenes_own_answers(processor):
    steps = recipe.AnswerSteps(TINY, processor, 4)
    batch = steps[3]
    assert batch["pixel_values"].shape == (4, 3, 64, 64) and len(batch["input_ids"]) == 8
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        scene = emoji.make_scene(3 * 4 + row // 2, "train", 64)
        text = processor.decode(ids)
        prompt, answer = text.split("\n")
        assert (prompt, answer) in {(e.prompt, e.answers[0]) for e in scene.examples}
        assert processor.decode(labels[labels != -100]) == answer


def test_processes_share_a_step_without_overlap(processor):
    whole = recipe.AnswerSteps(TINY, processor, 4)[1]["pixel_values"]
    parts = [recipe.AnswerSteps(TINY, processor, 4, rank, 2)[1]["pixel_values"] for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(ValueError, match="do not divide"):
        recipe.AnswerSteps(TINY, processor, 4, 0, 3)


@pytest.mark.parametrize("mixture", [recipe.MIXTURE, recipe.SEGMENT], ids=["answer", "segment"])
def test_examples_are_drawn_by_the_mixture(mixture):
    """Of all kinds that it names, and of no other: `segment` is asked in stage 6 alone."""
    drawn = map(emoji.make_scene, range(99))
    scene = next(s for s in drawn if {e.kind for e in s.examples} == set(recipe.SEGMENT))
    rng = np.random.default_rng(0)
    drawn = [recipe.choose_examples(scene, 1, rng, mixture)[0].kind for _ in range(4000)]
    assert set(drawn) == set(mixture)
    total = sum(mixture.get(e.kind, 0) for e in scene.examples)
    for kind, weight in mixture.items():
        expected = weight * sum(e.kind == kind for e in scene.examples) / total
        assert abs(drawn.count(kind) / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert len(set(recipe.choose_examples(scene, 4, rng, mixture))) == 4


def test_the_mixtures_of_earlier_stages_know_no_masks():
    assert "segment" in recipe.SEGMENT
    for earlier in (recipe.MIXTURE, recipe.POLISH, recipe.FINISH):
        assert set(earlier) == set(recipe.SEGMENT) - {"segment"}


def test_learning_rate_rises_then_falls_and_the_tower_lags(processor):
    rates = [recipe.learning_rate(step, 1000, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=0.01) and max(rates) > 0.97 and rates[-1] < 1e-5
    assert rates.index(max(rates)) == 99
    stage = recipe.stages(TINY, recipe.new_model(TINY, processor), processor)[2]
    optimizer = recipe.new_optimizer(stage.module, 0.1)
    stage.horizon = 1000
    for step, share in ((0, 0.005), (99, 0.5), (199, 1.0), (500, 1.0)):
        stage.set_learning_rate(optimizer, step)
        by_tower = {group["tower"]: group["lr"] for group in optimizer.param_groups}
        assert by_tower[True] / by_tower[False] == pytest.approx(TINY.tower_lr * share)


def test_stage_three_goes_on_with_new_scenes_and_its_own_mixture(processor):
    plan = recipe.stages(TINY, recipe.new_model(TINY, processor), processor)
    assert [stage.name for stage in plan] == "masks align answer polish finish pose segment redraw".split()
    assert [stage.steps for stage in plan] == [6, 6, 6, 2, 2, 2, 2, 2]
    masks, align, answer, polish, finish, pose, segment, redraw = plan
    assert answer.horizon == 8 and all(stage.horizon == stage.steps for stage in plan if stage is not answer)
    assert isinstance(masks.module, recipe.MaskVQVAEObjective) and isinstance(masks.batches, recipe.MaskSteps)
    assert answer.module is polish.module and answer.module.model is align.module.model
    assert [scene.seed for scene in polish.batches.scenes(0)] == [24, 25, 26, 27]
    assert polish.batches.mixture is recipe.POLISH
    assert finish.module is polish.module is segment.module
    assert isinstance(pose.module, recipe.PoseObjective) and pose.module.model is align.module.model
    assert finish.batches.mixture is recipe.FINISH and segment.batches.mixture is recipe.SEGMENT
    assert isinstance(redraw.module, recipe.MaskDecoderObjective) and redraw.module.model is align.module.model
    assert isinstance(redraw.batches, recipe.RedrawSteps) and redraw.lr == TINY.redraw_lr
    assert segment.lr == TINY.segment_lr and segment.tower_lr == TINY.segment_tower_lr


def test_stage_four_draws_new_scenes_in_proportion_to_what_they_show(processor):
    batches = recipe.FinishSteps(TINY, processor, 16)
    first = TINY.answer_scenes + TINY.polish_scenes
    drawn = [batches.seeds(step) for step in range(300)]
    for step, seeds in enumerate(drawn):
        window = range(first + 32 * step, first + 32 * (step + 1))
        assert len(set(seeds)) == 16 and set(seeds) <= set(window)
    planned = [emoji.planned_count(seed) for seeds in drawn for seed in seeds]
    everywhere = [emoji.planned_count(seed) for seed in range(first, first + 9600)]
    kept = [planned.count(n) / everywhere.count(n) for n in (1, 2, 3, 4)]
    assert kept == sorted(kept) and kept[0] < 0.35 and kept[3] > 0.6
    two = [recipe.FinishSteps(TINY, processor, 16, rank, 2).scenes(0) for rank in (0, 1)]
    assert [scene.seed for half in two for scene in half] == drawn[0]


def test_the_last_stage_draws_the_same_way_from_the_scenes_after_those_of_stage_four(processor):
    finish, segment = (kind(TINY, processor, 4) for kind in (recipe.FinishSteps, recipe.SegmentSteps))
    assert segment.first_seed == finish.first_seed + 2 * TINY.finish_scenes == 24 + 8 + 2 * 8
    last = max(seed for step in range(TINY.finish_scenes // 4) for seed in finish.seeds(step))
    drawn = [segment.seeds(step) for step in range(2)]
    assert last < segment.first_seed <= min(drawn[0]) and max(drawn[0]) < segment.first_seed + 8 <= min(drawn[1])


def test_only_matrices_decay(processor):
    module = recipe.AlignmentObjective(recipe.new_model(TINY, processor))
    name_of = {id(weight): name for name, weight in module.named_parameters()}
    for group in recipe.new_optimizer(module, 0.1).param_groups:
        for weight in group["params"]:
            name = name_of[id(weight)]
            assert group["tower"] == ("vision_tower" in name)
            assert (group["weight_decay"] > 0) == (weight.ndim > 1 and "embed" not in name), name


def test_loss_falls(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "new_processor", lambda recipe: processor)
    config = replace(TINY, masks_scenes=80, align_scenes=240, answer_scenes=480, answer_horizon=480, answer_lr=5e-3)
    recipe.train(config, tmp_path, HERE)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    module = recipe.SuffixObjective(PaliGemma.from_pretrained(tmp_path / "checkpoint"))
    saved = Processor.from_pretrained(tmp_path / "checkpoint")
    new = recipe.SuffixObjective(recipe.new_model(config, saved))
    batch = recipe.AnswerSteps(config, saved, 8)[1000]
    with torch.no_grad():
        assert float(module(**batch)) < 0.7 * float(new(**batch))
    assert {r["stage"] for r in records} == set(range(8))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    vae = MaskVQVAE.from_pretrained(tmp_path / "checkpoint").state_dict()  # its codes are those the model has learned
    of_run = MaskVQVAE.from_pretrained(tmp_path).state_dict()
    assert {name for name, value in vae.items() if not torch.equal(value, of_run[name])} == {
        name for name in vae if name.startswith("decoder")
    }
    assert vae["_vq_vae._embedding"].norm() > 0


def train_in_subprocess(out: Path, *options: str, launcher=(sys.executable, "-m", "minivlm")) -> subprocess.Popen:
    numbers = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    command = [*launcher, "train", "--out", str(out), "--device", "cpu", "--save-every", "0", *numbers, *options]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "TQDM_MININTERVAL": "10",
    }  # or its bars fill the pipe, which nobody reads
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, error


def test_killed_run_goes_on_to_the_same_result(tmp_path):
    """SIGKILL, at no chosen moment, in every stage: same losses, same weights, same codebook, bit for bit."""
    scenes_of = dict.fromkeys(("masks", "align", "answer", "polish", "finish", "pose", "segment"), 240) | {
        "redraw": 480
    }
    options = [word for stage, count in scenes_of.items() for word in (f"--{stage}-scenes", str(count))]
    options += ["--answer-horizon", "240"]
    never_killed = train_in_subprocess(tmp_path / "whole", *options)  # meanwhile
    for stage in range(8):
        process = train_in_subprocess(tmp_path / "killed", *options)
        state = tmp_path / "killed" / "state.safetensors"
        deadline = time.monotonic() + 120
        while recipe.state_position(state) <= (stage, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert recipe.state_position(state)[0] == stage and not (tmp_path / "killed" / "checkpoint").exists()
    finish(train_in_subprocess(tmp_path / "killed", *options))
    finish(never_killed)
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed"))
    for one, other in zip(whole, killed, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    one, other = (
        PaliGemma.from_pretrained(tmp_path / name / "checkpoint").state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    one, other = (
        MaskVQVAE.from_pretrained(tmp_path / name / "checkpoint").state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_two_processes_give_the_loss_of_one(tmp_path):
    options = ("--precision", "float32")
    alone = train_in_subprocess(tmp_path / "one", *options)  # meanwhile
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    finish(train_in_subprocess(tmp_path / "two", *options, launcher=(*launcher, "-m", "minivlm")))
    finish(alone)
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 8 and one == pytest.approx(two, rel=1e-5)


def test_bad_runs_say_what_to_do(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "new_processor", lambda recipe: processor)
    with pytest.raises(ValueError, match="at least one step"):
        replace(TINY, align_scenes=3)
    with pytest.raises(ValueError, match="masks_scenes is 3"):
        replace(TINY, masks_scenes=3)
    with pytest.raises(ValueError, match="precision"):
        replace(TINY, precision="float16")
    recipe.check_recipe(TINY, tmp_path, HERE)
    with pytest.raises(ValueError, match="another recipe"):
        recipe.check_recipe(replace(TINY, seed=1), tmp_path, HERE)
    (tmp_path / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="no state of a training run"):
        recipe.train(TINY, tmp_path, HERE)


def test_halves_give_the_loss_and_gradient_of_the_whole(processor):
    one, two = (recipe.SuffixObjective(recipe.new_model(TINY, processor)) for _ in range(2))
    batch = recipe.AnswerSteps(TINY, processor, 4)[0]
    lengths = batch["attention_mask"].sum(1)
    assert lengths.sort().values[3] < lengths.max()  # the halves differ, or this would test nothing
    whole, halves = one.model.loss(**batch), two(**batch)
    whole.backward()
    halves.backward()
    torch.testing.assert_close(halves, whole, rtol=1e-6, atol=0)
    for (name, weight), other in zip(one.named_parameters(), two.parameters(), strict=True):
        # the tower's key biases shift all scores of a softmax alike: their true gradient is zero
        scale = 1.0 if name.endswith("k_proj.bias") else weight.grad.abs().max()
        assert (other.grad - weight.grad).abs().max() <= 1e-5 * scale, name
