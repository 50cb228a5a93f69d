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

from minivlm import scenes, training
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor

ROOT = Path(__file__).parent.parent
TINY = training.Recipe(
    image_size=64,
    patch_size=16,
    width=32,
    mlp_width=48,
    tower_layers=1,
    decoder_layers=1,
    heads=2,
    align_scenes=24,
    align_batch=4,
    answer_scenes=24,
    answer_horizon=32,
    answer_batch=4,
    polish_scenes=8,
    finish_scenes=8,
    examples=2,
)
HERE = training.Place(torch.device("cpu"), workers=1)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return training.new_processor(TINY)


def test_patches_show_what_covers_a_quarter_of_them():
    for seed in range(20):
        scene = scenes.make_scene(seed, "train", 64)
        shows = training.patches_show(scene, 16)
        for patch in range(16):
            y, x = patch // 4 * 16, patch % 4 * 16
            expected = set()
            for thing in scene.objects:
                pixels = sum(thing.mask[y + i, x + j] for i in range(16) for j in range(16))
                if pixels >= 64:
                    expected.add(thing.name)
            assert {scenes.OBJECTS[i] for i in np.flatnonzero(shows[patch])} == expected


def test_name_ids_are_three_forms_of_each_name(processor):
    ids = training.AlignSteps(TINY, processor, 4).name_ids()
    texts = processor.batch_decode(ids)
    n = len(scenes.OBJECTS)
    assert texts[:n] == list(scenes.OBJECTS)
    assert texts[n : 2 * n] == [f" {name}" for name in scenes.OBJECTS]
    assert texts[2 * n :] == [f" {scenes.plural(name)}" for name in scenes.OBJECTS]


def test_bag_of_words_is_the_mean_of_its_words(processor):
    alignment = training.Alignment(training.new_model(TINY, processor))
    ids = torch.tensor([[10, 11, 12], [20, 0, 0]])
    table = alignment.model.language_model.model.embed_tokens.weight * 32**0.5
    bags = alignment.names(ids)
    torch.testing.assert_close(bags[0], (table[10] + table[11] + table[12]) / 3)
    torch.testing.assert_close(bags[1], table[20])


def test_answer_batch_holds_the_scenes_own_answers(processor):
    steps = training.AnswerSteps(TINY, processor, 4)
    batch = steps[3]
    assert batch["pixel_values"].shape == (4, 3, 64, 64) and len(batch["input_ids"]) == 8
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        scene = scenes.make_scene(3 * 4 + row // 2, "train", 64)
        text = processor.decode(ids)
        prompt, answer = text.split("\n")
        assert (prompt, answer) in {(e.prompt, e.answers[0]) for e in scene.examples}
        assert processor.decode(labels[labels != -100]) == answer


def test_processes_share_a_step_without_overlap(processor):
    whole = training.AnswerSteps(TINY, processor, 4)[1]["pixel_values"]
    parts = [training.AnswerSteps(TINY, processor, 4, rank, 2)[1]["pixel_values"] for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(ValueError, match="do not divide"):
        training.AnswerSteps(TINY, processor, 4, 0, 3)


def test_examples_are_drawn_by_the_mixture():
    drawn = map(scenes.make_scene, range(99))
    scene = next(s for s in drawn if {e.kind for e in s.examples} == set(training.MIXTURE))
    rng = np.random.default_rng(0)
    drawn = [training.choose_examples(scene, 1, rng, training.MIXTURE)[0].kind for _ in range(4000)]
    total = sum(training.MIXTURE[e.kind] for e in scene.examples)
    for kind, weight in training.MIXTURE.items():
        expected = weight * sum(e.kind == kind for e in scene.examples) / total
        assert abs(drawn.count(kind) / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert len(set(training.choose_examples(scene, 4, rng, training.POLISH))) == 4


def test_learning_rate_rises_then_falls_and_the_tower_lags(processor):
    rates = [training.learning_rate(step, 1000, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=0.01) and max(rates) > 0.97 and rates[-1] < 1e-5
    assert rates.index(max(rates)) == 99
    stage = training.stages(TINY, training.new_model(TINY, processor), processor)[1]
    optimizer = training.new_optimizer(stage.module, 0.1)
    stage.horizon = 1000
    for step, share in ((0, 0.005), (99, 0.5), (199, 1.0), (500, 1.0)):
        stage.set_learning_rate(optimizer, step)
        by_tower = {group["tower"]: group["lr"] for group in optimizer.param_groups}
        assert by_tower[True] / by_tower[False] == pytest.approx(TINY.tower_lr * share)


def test_stage_three_goes_on_with_new_scenes_and_its_own_mixture(processor):
    align, answer, polish, finish = training.stages(TINY, training.new_model(TINY, processor), processor)
    assert (align.steps, answer.steps, answer.horizon, polish.steps, finish.steps) == (6, 6, 8, 2, 2)
    assert answer.module is polish.module and answer.module.model is align.module.model
    assert [scene.seed for scene in polish.batches.scenes(0)] == [24, 25, 26, 27]
    assert polish.batches.mixture is training.POLISH
    assert finish.module is polish.module and finish.batches.mixture is training.FINISH


def test_stage_four_draws_new_scenes_in_proportion_to_what_they_show(processor):
    batches = training.FinishSteps(TINY, processor, 16)
    first = TINY.answer_scenes + TINY.polish_scenes
    drawn = [batches.seeds(step) for step in range(300)]
    for step, seeds in enumerate(drawn):
        window = range(first + 32 * step, first + 32 * (step + 1))
        assert len(set(seeds)) == 16 and set(seeds) <= set(window)
    planned = [scenes.planned_count(seed) for seeds in drawn for seed in seeds]
    everywhere = [scenes.planned_count(seed) for seed in range(first, first + 9600)]
    kept = [planned.count(n) / everywhere.count(n) for n in (1, 2, 3, 4)]
    assert kept == sorted(kept) and kept[0] < 0.35 and kept[3] > 0.6
    two = [training.FinishSteps(TINY, processor, 16, rank, 2).scenes(0) for rank in (0, 1)]
    assert [scene.seed for half in two for scene in half] == drawn[0]


def test_only_matrices_decay(processor):
    module = training.Alignment(training.new_model(TINY, processor))
    name_of = {id(weight): name for name, weight in module.named_parameters()}
    for group in training.new_optimizer(module, 0.1).param_groups:
        for weight in group["params"]:
            name = name_of[id(weight)]
            assert group["tower"] == ("vision_tower" in name)
            assert (group["weight_decay"] > 0) == (weight.ndim > 1 and "embed" not in name), name


def test_loss_falls(tmp_path):
    recipe = replace(TINY, align_scenes=240, answer_scenes=480, answer_horizon=480, answer_lr=5e-3)
    training.train(recipe, tmp_path, HERE)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    module = training.Answering(PaliGemma.from_pretrained(tmp_path / "checkpoint"))
    new = training.Answering(training.new_model(recipe, Processor.from_pretrained(tmp_path / "checkpoint")))
    batch = training.AnswerSteps(recipe, Processor.from_pretrained(tmp_path / "checkpoint"), 8)[1000]
    with torch.no_grad():
        assert float(module(**batch)) < 0.7 * float(new(**batch))
    assert {r["stage"] for r in records} == {0, 1, 2, 3} and (tmp_path / "curve.png").read_bytes().startswith(
        b"\x89PNG"
    )


def train_in_subprocess(out: Path, *options: str, launcher=(sys.executable, "-m", "minivlm")) -> subprocess.Popen:
    recipe = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    command = [*launcher, "train", "--out", str(out), "--device", "cpu", "--save-every", "0", *recipe, *options]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, error


def test_killed_run_goes_on_to_the_same_result(tmp_path):
    """SIGKILL, at no chosen moment, in every stage: same losses, same weights, bit for bit."""
    scenes_of = {"align": 240, "answer": 480, "polish": 480, "finish": 480}
    options = [word for stage, count in scenes_of.items() for word in (f"--{stage}-scenes", str(count))]
    options += ["--answer-horizon", "480"]
    finish(train_in_subprocess(tmp_path / "whole", *options))
    for stage in range(4):
        process = train_in_subprocess(tmp_path / "killed", *options)
        state = tmp_path / "killed" / "state.safetensors"
        deadline = time.monotonic() + 120
        while training.state_position(state) <= (stage, 0) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert training.state_position(state)[0] == stage and not (tmp_path / "killed" / "checkpoint").exists()
    finish(train_in_subprocess(tmp_path / "killed", *options))
    whole, killed = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "killed"))
    for one, other in zip(whole, killed, strict=True):
        one, other = json.loads(one), json.loads(other)
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    names = ("whole", "killed")
    one, other = ((tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in names)
    assert one == other


def test_two_processes_give_the_loss_of_one(tmp_path):
    options = ("--precision", "float32")
    finish(train_in_subprocess(tmp_path / "one", *options))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    finish(train_in_subprocess(tmp_path / "two", *options, launcher=(*launcher, "-m", "minivlm")))
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == 4 and one == pytest.approx(two, rel=1e-5)


def test_bad_runs_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="at least one step"):
        replace(TINY, align_scenes=3)
    with pytest.raises(ValueError, match="precision"):
        replace(TINY, precision="float16")
    training.check_recipe(TINY, tmp_path, HERE)
    with pytest.raises(ValueError, match="another recipe"):
        training.check_recipe(replace(TINY, seed=1), tmp_path, HERE)
    (tmp_path / "state.safetensors").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="no state of a training run"):
        training.train(TINY, tmp_path, HERE)


def test_halves_give_the_loss_and_gradient_of_the_whole(processor):
    one, two = (training.Answering(training.new_model(TINY, processor)) for _ in range(2))
    batch = training.AnswerSteps(TINY, processor, 4)[0]
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
