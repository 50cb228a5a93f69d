"""Training: ``fit`` resumes to the same weights and refuses what it cannot do; objectives, batches and the recipe."""

import itertools
import json
import math
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
from torch import nn
from torch.utils.data import DataLoader

from minivlm import emoji, locations, losses, training
from minivlm.__main__ import main
from minivlm.emoji import batches, recipe
from minivlm.hub import EMBEDDED
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training import objectives
from minivlm.vqvae import MaskVQVAE

ROOT = Path(__file__).parent.parent
STAGES = "masks align answer finish".split()
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
    answer_batch=4,
    answer_examples=3,
    finish_scenes=8,
    finish_batch=4,
    finish_examples=2,
)
HERE = training.DistributedContext(torch.device("cpu"))


@pytest.fixture(scope="module")
def processor() -> Processor:
    """With the tokenizer of the embedded checkpoint, which is that of the recipe."""
    return Processor(Processor.from_pretrained(EMBEDDED).tokenizer, image_size=64, num_image_tokens=16)


@pytest.fixture
def model(processor) -> PaliGemma:
    return recipe.make_model(TINY, processor)


@pytest.fixture
def plan(processor, model, tmp_path) -> list[recipe.Stage]:
    return recipe.stages(TINY, model, processor, tmp_path, HERE)


def suffix_batches(processor, **options) -> batches.SuffixBatches:
    mixture = {kind: weight for kind, weight in recipe.MIXTURE.items() if kind != "segment"}
    return batches.SuffixBatches(processor, 4, **{"mixture": mixture, "examples": 2} | options)


# --- fit ------------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """y = a · x + b."""

    def __init__(self, size: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(size, 1)
        self.embed = nn.Embedding(2, size)

    def forward(self, x, y):
        return (self.linear(x + self.embed.weight[0]) - y).square().mean()


class Points:
    """The batch of step i depends on i alone. Step ``stop`` is where the run breaks off."""

    def __init__(self, stop: int = -1):
        self.stop, self.read = stop, []

    def __getitem__(self, step):
        if step == self.stop:
            raise KeyboardInterrupt
        self.read.append(step)
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(step))
        return {"x": x, "y": x.sum(1, keepdim=True)}


def fit_line(out: Path, points, **options) -> nn.Module:
    line, defaults = Line(), {"steps": 20, "lr": 0.1, "context": HERE, "log_every": 3}
    training.fit(line, points, out=out, **defaults | options)
    return line


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    others = other.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in one.state_dict().items())


def metrics(folder: Path) -> list[dict]:
    """Without the seconds."""
    return [{**record, "seconds": 0} for record in training.read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
@pytest.mark.parametrize("as_iterable", [False, True])
def test_an_interrupted_run_resumes_to_the_same_result(tmp_path, as_iterable, optimizer):
    def points(stop: int = -1):
        return (Points(stop)[i] for i in itertools.count()) if as_iterable else Points(stop)

    whole = fit_line(tmp_path / "whole", points(), optimizer=optimizer)
    for stop in (1, 8, 19):
        with pytest.raises(KeyboardInterrupt):
            fit_line(tmp_path / "parts", points(stop), save_every=0.0, optimizer=optimizer)
    resumed = Points()
    left = (resumed[i] for i in itertools.count()) if as_iterable else resumed
    parts = fit_line(tmp_path / "parts", left, optimizer=optimizer)
    assert resumed.read == list(range(0 if as_iterable else 18, 20))  # an iterable is skipped by reading it
    assert_equal_weights(whole, parts)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert [r["step"] for r in metrics(tmp_path / "parts")] == [3, 6, 9, 12, 15, 18, 20]


def test_workers_prepare_the_same_batches(tmp_path):
    alone = fit_line(tmp_path / "alone", Points())
    helped = fit_line(tmp_path / "helped", Points(), context=replace(HERE, workers=2))
    assert_equal_weights(alone, helped)


def test_a_finished_run_is_only_loaded(tmp_path):
    first = fit_line(tmp_path, Points())
    assert metrics(tmp_path)[-1]["loss"] < 0.5 * metrics(tmp_path)[0]["loss"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    again = Points()
    assert_equal_weights(first, fit_line(tmp_path, again))
    assert again.read == []


def test_a_list_and_a_loader_are_batches_too(tmp_path):
    points = [Points()[i] for i in range(20)]
    whole = fit_line(tmp_path / "a", Points())
    assert_equal_weights(whole, fit_line(tmp_path / "b", points))
    assert_equal_weights(whole, fit_line(tmp_path / "c", DataLoader(points, batch_size=None)))


def test_too_few_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There are 7 batches, fewer than the 20 steps of train"):
        fit_line(tmp_path / "a", [Points()[i] for i in range(7)])
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="The batches ended after 7 of the 20 steps"):
        fit_line(tmp_path / "b", (Points()[i] for i in range(7)))


def test_only_parameters_with_requires_grad_are_trained(tmp_path):
    line = Line()
    line.linear.bias.requires_grad_(False)
    before = line.linear.bias.clone()
    line.linear.bias.grad = torch.ones(1) * 1e9  # left over from elsewhere: no part of the norm that is clipped
    training.fit(line, Points(), steps=20, lr=0.1, out=tmp_path / "a", context=HERE)
    assert torch.equal(line.linear.bias, before)
    alone = Line()
    alone.linear.bias.requires_grad_(False)
    training.fit(alone, Points(), steps=20, lr=0.1, out=tmp_path / "b", context=HERE)
    assert_equal_weights(line, alone)
    training.fit(alone, Points(), steps=20, lr=0.1, out=tmp_path / "b", context=HERE)  # its state has no more than that


def test_a_parameter_without_gradient_does_not_hinder_saving_and_resuming(tmp_path):
    def line():
        module = Line()
        module.unused = nn.Linear(2, 2)
        return module

    whole, parts = line(), line()
    options = {"steps": 6, "lr": 0.1, "context": HERE, "log_every": 2, "save_every": 0.0}
    training.fit(whole, Points(), out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        training.fit(line(), Points(stop=5), out=tmp_path / "parts", **options)
    training.fit(parts, Points(), out=tmp_path / "parts", **options)
    assert_equal_weights(whole, parts)


def test_a_module_with_shared_weights_is_saved(tmp_path):
    class Tied(Line):
        def __init__(self):
            super().__init__()
            self.again = self.linear

    training.fit(Tied(), Points(), steps=3, lr=0.1, out=tmp_path, context=HERE)
    training.fit(Tied(), Points(), steps=3, lr=0.1, out=tmp_path, context=HERE)


def test_clipping_bounds_the_gradient():
    line, batch = Line(), Points()[0]
    optimizers = training.make_optimizers(line)
    training.train_step(line, batch, optimizers, clip=math.inf)
    norm = torch.cat([p.grad.flatten() for p in line.parameters()]).norm()
    training.train_step(line, batch, optimizers, clip=float(norm) / 2)
    assert torch.cat([p.grad.flatten() for p in line.parameters()]).norm() == pytest.approx(float(norm) / 2, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="The loss is nan at step 3 of train. Lower the learning rate"):
        fit_line(tmp_path, [{"x": torch.ones(4, 3), "y": torch.full((4, 1), math.nan)}] * 20)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("torn", ['{"step": 18, "lo', '{"step"', "\0\0\0\0", "\ufffd"])
def test_half_a_line_of_the_metrics_is_dropped(tmp_path, torn):
    """As a power cut leaves it, together with lines after the saved step."""
    whole = fit_line(tmp_path / "whole", Points())
    with pytest.raises(KeyboardInterrupt):
        fit_line(tmp_path / "torn", Points(stop=14), save_every=0.0)
    with (tmp_path / "torn" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "loss": 1e9, "seconds": 3.0}\n' + torn)
    assert_equal_weights(whole, fit_line(tmp_path / "torn", Points()))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "torn")


def test_seconds_go_on_where_they_were(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 100.0}\n{"step": 2, "seconds": 200.0}\n')
    log = training.MetricsLog(path, 1)
    log.write(step=2)
    assert [r["step"] for r in training.read_metrics(path)] == [1, 2]
    assert 100 <= training.read_metrics(path)[1]["seconds"] < 150


def test_a_state_of_another_run_is_refused(tmp_path):
    fit_line(tmp_path, Points())
    state = str(tmp_path / "state.safetensors")
    for options, message in (
        ({"name": "other"}, "is the state of 'train' at step 20, but this run is 'other' with 20 steps"),
        ({"steps": 10}, "is the state of 'train' at step 20, but this run is 'train' with 10 steps"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            fit_line(tmp_path, Points(), **options)
        assert str(error.value).startswith(state)
    with pytest.raises(ValueError, match="another module: .* tensors differ"):
        fit_line(tmp_path, Points(), optimizer="muon")
    for module in (Line(size=4), nn.Sequential(Line())):
        with pytest.raises(ValueError, match="is the state of another module: .* tensors differ, first") as error:
            training.fit(module, Points(), steps=20, lr=0.1, out=tmp_path, context=HERE)
        assert str(error.value).startswith(state)
    frozen = Line()
    frozen.embed.requires_grad_(False)
    with pytest.raises(ValueError, match="another module: 3 tensors differ, first optimizer.embed.weight"):
        training.fit(frozen, Points(), steps=20, lr=0.1, out=tmp_path, context=HERE)


@pytest.mark.parametrize("content", [b"", b"not a state", b"\x00" * 100])
def test_a_damaged_state_is_refused(tmp_path, content):
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="state.safetensors is not the state of a training run .* Delete it"):
        fit_line(tmp_path, Points())


def test_other_weights_are_no_state(tmp_path):
    (tmp_path / "state.safetensors").write_bytes((EMBEDDED / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="is not the state of a training run"):
        fit_line(tmp_path, Points())


def test_one_trainer_per_folder(tmp_path, processor, monkeypatch):
    """A second one is refused. A killed process does not keep the lock, though its workers live a little longer."""
    code = f"""
import time
from minivlm.training.files import lock_folder
from pathlib import Path
import multiprocessing
with lock_folder(Path({str(tmp_path)!r})):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    worker = int(process.stdout.readline())
    try:
        message = f"Process {process.pid} is training in .*. Wait for it, or choose another folder"
        with pytest.raises(ValueError, match=message):
            fit_line(tmp_path, Points())
        monkeypatch.setattr(recipe, "make_processor", lambda config: processor)
        with pytest.raises(ValueError, match=message):
            recipe.train(TINY, tmp_path, HERE)
        assert {path.name for path in tmp_path.iterdir()} == {".lock"}
        process.kill()
        process.wait()
        fit_line(tmp_path, Points())
    finally:
        process.kill()
        os.kill(worker, signal.SIGKILL)
    fit_line(tmp_path, Points())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"lr": -0.1}, "lr must be at least 0, not -0.1"),
        ({"lr": math.nan}, "lr must be at least 0, not nan"),
        ({"horizon": 0}, "horizon must be at least 1, not 0"),
        ({"warmup": 1.5}, "warmup must be from 0 to 1, not 1.5"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, not 'float16'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, not 'sgd'"),
        ({"save_every": -1.0}, "save_every must be at least 0"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"groups": (training.ParameterGroup("tower"),)}, "No trained parameter has 'tower' in its name"),
    ],
)
def test_bad_numbers_are_refused(tmp_path, numbers, message):
    with pytest.raises(ValueError, match=message):
        fit_line(tmp_path / "out", Points(), **numbers)
    assert not (tmp_path / "out").exists()


def test_a_context_needs_a_device_and_workers():
    for name in ("nonsense", "cuda:99", "meta"):
        with pytest.raises(ValueError, match=f"There is no device '{name}' to train on"):
            training.find_distributed_context(name)
    with pytest.raises(ValueError, match="workers must be at least 0, not -1"):
        training.find_distributed_context("cpu", -1)
    assert training.find_distributed_context("cpu", 3) == replace(HERE, workers=3)


def test_learning_rate_rises_then_falls():
    rates = [training.lr_schedule(step, 1000, 0.1) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=0.01) and max(rates) > 0.97 and rates[-1] < 1e-5
    assert rates.index(max(rates)) == 99
    assert training.lr_schedule(2000, 1000, 0.1) == 0


def test_the_tower_lags_by_its_own_warmup(model):
    """At first it has 1/200 of its share; after a fifth of the horizon all of it."""
    tower = training.ParameterGroup("vision_tower", lr_scale=0.3, warmup=0.2)
    config = training.FitConfig(steps=600, lr=2.0, horizon=1000, groups=(tower,))
    optimizers = training.make_optimizers(model, 0.1, config.groups, "muon")
    for step, share in ((0, 0.005), (99, 0.5), (199, 1.0), (500, 1.0)):
        training.set_learning_rate(optimizers, step, config)
        (adamw, muon) = ({g["group"].match: g["lr"] for g in o.param_groups} for o in optimizers)
        rates = adamw
        assert adamw == muon
        assert rates["vision_tower"] / rates[""] == pytest.approx(0.3 * share)
        assert rates[""] == 2.0 * training.lr_schedule(step, 1000, config.warmup)


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_only_matrices_decay_and_only_they_have_muon(model, optimizer):
    module = objectives.AlignmentObjective(model)
    name_of = {id(weight): name for name, weight in module.named_parameters()}
    tower, seen = training.ParameterGroup("vision_tower", 0.5), 0
    optimizers = training.make_optimizers(module, 0.1, [tower], optimizer)
    for owner, group in ((o, group) for o in optimizers for group in o.param_groups):
        for weight in group["params"]:
            name, seen = name_of[id(weight)], seen + 1
            assert (group["group"] == tower) == ("vision_tower" in name)
            assert (group["weight_decay"] > 0) == (weight.ndim > 1 and "embed" not in name), name
            has_muon = optimizer == "muon" and weight.ndim == 2 and "embed" not in name
            assert type(owner) is (torch.optim.Muon if has_muon else torch.optim.AdamW), name
    assert seen == len(name_of)


def test_muon_moves_all_directions_alike():
    """Its first update is the gradient with singular values near 1, scaled to the size of AdamW's steps."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 40, bias=False)
    before = layer.weight.detach().clone()
    (muon,) = training.make_optimizers(layer, optimizer="muon")
    training.set_learning_rate([muon], 0, training.FitConfig(1, 0.1, warmup=0.0))
    layer.weight.grad = torch.randn(40, 2) @ torch.randn(2, 6) + 0.01 * torch.randn(40, 6)  # two strong directions
    muon.step()
    moved = torch.linalg.svdvals(before - layer.weight.detach()) / (0.1 * 0.2 * 40**0.5)
    assert moved.min() > 0.5 and moved.max() < 1.3, moved


# --- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(4), ids=STAGES)
def test_an_objective_trains_what_it_says_and_all_of_it(plan, number):
    """Between ``prepare`` and ``finish`` a parameter has ``requires_grad`` exactly if it gets a gradient."""
    objective = plan[number].objective
    before = {name: p.requires_grad for name, p in objective.named_parameters()}
    objective.prepare()
    objective(**plan[number].batches[0]).backward()
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in objective.named_parameters() if p.grad is not None}
    objective.finish()
    assert before == {name: p.requires_grad for name, p in objective.named_parameters()}
    parts = {name.removeprefix("model.").split(".")[0] for name in trained}
    of_model = {"vision_tower", "multi_modal_projector", "language_model"}
    assert parts == {
        "masks": {"vae"},
        "align": of_model | {"reader", "log_temperature", "bias"},
    }.get(STAGES[number], of_model)


def test_a_loss_is_weighted_by_its_items(plan):
    """The mean over processes is one over suffix tokens, or over masks; batches of images have equal sizes."""
    weights = {stage.name: float(stage.objective.loss_weight(stage.batches[0])) for stage in plan}
    batch = {stage.name: stage.batches[0] for stage in plan}
    for name in ("answer", "finish"):
        assert weights[name] == (batch[name]["labels"] != -100).sum() > 8
    assert weights["masks"] == len(batch["masks"]["masks"]) > 4
    assert weights["align"] == 1


def test_losses_of_the_masks_by_hand():
    """Squared error of the mask decoded from codebook vectors, and a quarter of the distance to them."""
    torch.manual_seed(0)
    objective = objectives.MaskVQVAEObjective()
    codebook = objective.vae._vq_vae._embedding.normal_().clone()
    objective.decay = 1.0  # the averages stay at zero, and after the first batch so does the codebook
    masks = (torch.rand(3, 64, 64) < 0.5).float()
    codes = objective.vae.encode(masks)
    with torch.no_grad():
        vectors = objective.vae.encoder(2 * masks[:, None] - 1).flatten(2).mT  # [3, 16, 512]
        decoded = objective.vae.decode(codes)
        distance = (vectors - objective.vae._vq_vae._embedding[codes]).square().mean()
    expected = (decoded - (2 * masks - 1)).square().mean() + 0.25 * distance
    none = torch.zeros(3, 16, dtype=torch.bool)
    torch.testing.assert_close(objective(masks, none), expected, rtol=1e-5, atol=0)
    misread = torch.rand(3, 16) < 0.3
    objective.vae._vq_vae._embedding.copy_(codebook)
    with torch.no_grad():
        decoded = objective.vae.decode(torch.where(misread, codes.roll(1, dims=0), codes))
    expected = (decoded - (2 * masks - 1)).square().mean() + 0.25 * distance
    torch.testing.assert_close(objective(masks, misread), expected, rtol=1e-5, atol=0)


def test_the_encoder_learns_from_the_decoded_mask():
    """The gradient passes the codebook as if it were not there, and the codebook itself has none."""
    torch.manual_seed(0)
    objective = objectives.MaskVQVAEObjective()
    objective.commitment = 0.0
    objective.vae._vq_vae._embedding.normal_()
    codebook = objective.vae._vq_vae._embedding.clone()
    masks = torch.rand(2, 64, 64)
    objective(masks, torch.zeros(2, 16, dtype=torch.bool)).backward()
    with torch.no_grad():
        vectors = objective.vae.encoder(2 * masks[:, None] - 1).flatten(2).mT
    codes = torch.cdist(vectors, codebook).argmin(2)
    grid = codebook[codes].mT.unflatten(2, (4, 4)).requires_grad_()
    (objective.vae.decoder(grid)[:, 0] - (2 * masks - 1)).square().mean().backward()
    # the gradient at the grid of vectors is that at the encoder's last bias, summed over positions
    torch.testing.assert_close(objective.vae.encoder[10].bias.grad, grid.grad.sum((0, 2, 3)), rtol=1e-4, atol=1e-9)
    assert not objective.vae._vq_vae._embedding.requires_grad


def test_the_codebook_follows_its_vectors_by_hand():
    """Codes 0 and 1 with averages of size 2 and 3; three new vectors for the first, one for the second."""
    objective = objectives.MaskVQVAEObjective()
    objective.decay = 0.9
    objective.sizes.fill_(2.0)
    objective.sizes[1] = 3.0
    objective.sums[0], objective.sums[1], objective.sums[2] = 20.0, 30.0, 40.0
    vectors = torch.tensor([1.0, 2.0, 6.0, 5.0])[:, None].expand(4, 512)
    objective.update_codebook(vectors, torch.tensor([0, 0, 0, 1]))
    sizes = [0.9 * 2 + 0.1 * 3, 0.9 * 3 + 0.1 * 1, 0.9 * 2]  # 2.1, 2.8, 1.8: none is idle
    sums = [0.9 * 20 + 0.1 * 9, 0.9 * 30 + 0.1 * 5, 0.9 * 40]
    torch.testing.assert_close(objective.sizes[:3], torch.tensor(sizes))
    torch.testing.assert_close(objective.sums[:3, 7], torch.tensor(sums))
    codebook = objective.vae._vq_vae._embedding
    torch.testing.assert_close(codebook[:3, 100], torch.tensor([18.9 / 2.1, 27.5 / 2.8, 36 / 1.8]))
    assert codebook[3:].eq(0).all()


def test_an_idle_code_moves_beside_a_busy_one():
    """Two are idle and two busy. The busiest gives half to the first. A code with 1 vector or more stays."""
    objective = objectives.MaskVQVAEObjective()
    objective.decay = 1.0
    objective.sizes.fill_(2.0)
    objective.sums.fill_(2.0)
    for code, size, vector in ((3, 0.5, 9.0), (4, 0.0, 0.0), (10, 8.0, 5.0), (20, 40.0, 7.0)):
        objective.sizes[code], objective.sums[code] = size, size * vector
    objective.update_codebook(torch.zeros(1, 512), torch.zeros(1, dtype=torch.long))
    sizes = {3: 20.0, 20: 20.0, 4: 4.0, 10: 4.0, 0: 2.0, 127: 2.0}
    assert {code: float(objective.sizes[code]) for code in sizes} == sizes
    vectors = {3: 1.01 * 7, 20: 7.0, 4: 1.01 * 5, 10: 5.0, 0: 1.0, 127: 1.0}
    codebook = objective.vae._vq_vae._embedding[:, 33]
    assert {code: float(codebook[code]) for code in vectors} == pytest.approx(vectors, rel=1e-6)


def test_an_idle_code_stays_if_no_code_is_busy():
    objective = objectives.MaskVQVAEObjective()
    objective.decay = 1.0
    objective.sizes.fill_(4.0)
    objective.sizes[5] = 0.0
    objective.sums.fill_(4.0)
    objective.update_codebook(torch.zeros(1, 512), torch.zeros(1, dtype=torch.long))
    assert objective.sizes[5] == 0 and objective.sizes[6] == 4


def test_training_spreads_the_codebook(processor):
    """At the start all vectors have one code. After a few steps many codes are in use, and masks come back."""
    torch.manual_seed(0)
    objective = objectives.MaskVQVAEObjective()
    optimizers = training.make_optimizers(objective)
    for group in optimizers[0].param_groups:
        group["lr"] = 1e-3
    batch = batches.MaskBatches(processor, 8, misread=0.15)[0]
    course = [training.train_step(objective, batch, optimizers) for _ in range(40)]
    assert len(objective.vae.encode(batch["masks"]).unique()) > 10
    assert course[-1] < 0.6 * course[0]


def test_embedding_of_a_name_is_the_mean_of_its_tokens(model):
    alignment = objectives.AlignmentObjective(model)
    ids = torch.tensor([[10, 11, 12], [20, 0, 0]])
    table = model.language_model.model.embed_tokens.weight * 32**0.5
    names = alignment.embed_names(ids)
    torch.testing.assert_close(names[0], (table[10] + table[11] + table[12]) / 3)
    torch.testing.assert_close(names[1], table[20])


def test_loss_of_alignment_by_hand(processor, model):
    """The sigmoid loss plus a mean over all patches: of the errors where a patch shows an object, 0 elsewhere."""
    objective = objectives.AlignmentObjective(model)
    batch = batches.AlignmentBatches(processor, 4)[0]
    with torch.no_grad():
        features, loss = model.encode_image(batch["pixel_values"]), objective(**batch).double()
        names = objective.embed_names(batch["name_ids"])
        pairs = features.flatten(0, 1), names, objective.log_temperature, objective.bias, batch["shows"].flatten(0, 1)
        expected, read = losses.sigmoid_loss(*pairs).double(), objective.reader(features).double()
    owners = batch["owners"]
    assert (owners < 0).any() and (owners >= 0).any()
    for image, patch in (owners >= 0).nonzero().tolist():
        *box, angle, mirrored = read[image, patch]
        pose = batch["poses"][owners[image, patch]].double()
        error = 4.0 * sum((v - w).abs() for v, w in zip(box, pose[:4], strict=True)) / 4
        p = mirrored.sigmoid()  # that it is mirrored
        error += 0.25 * ((angle - pose[4]) ** 2 - (p if pose[5] else 1 - p).log())
        expected += error / owners.numel()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_halves_have_the_loss_and_gradient_of_the_whole(processor):
    one, two = (objectives.SuffixObjective(recipe.make_model(TINY, processor)) for _ in range(2))
    batch = suffix_batches(processor)[0]
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


def test_packed_texts_have_the_loss_and_gradient_of_rows(processor):
    """With one layer: there image tokens that see the prompt cannot pass on what they saw, so both are the same."""
    config = replace(TINY, decoder_layers=1)
    rows = objectives.SuffixObjective(recipe.make_model(config, processor))
    packed = objectives.PackedSuffixObjective(recipe.make_model(config, processor))
    batch = suffix_batches(processor, mixture=recipe.MIXTURE, examples=3, vae=MaskVQVAE.from_pretrained())[0]
    assert batch["attention_mask"].sum(1).unique().numel() > 3  # rows of several lengths
    loss, other = rows(**batch), packed(**batch)
    loss.backward()
    other.backward()
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    for (name, weight), packed_weight in zip(rows.named_parameters(), packed.parameters(), strict=True):
        scale = 1.0 if name.endswith("k_proj.bias") else weight.grad.abs().max()  # as above
        assert (packed_weight.grad - weight.grad).abs().max() <= 1e-5 * scale, name


def test_packed_texts_do_not_see_each_other(processor):
    """With several layers, the loss of three packed texts is the mean over their tokens of the loss of each alone."""
    packed = objectives.PackedSuffixObjective(recipe.make_model(replace(TINY, decoder_layers=3), processor))
    batch = suffix_batches(processor, examples=3)[0]
    with torch.no_grad():
        whole, total, tokens = packed(**batch), 0.0, 0
        for row in range(len(batch["labels"])):
            alone = {name: value[row : row + 1] for name, value in batch.items() if name != "pixel_values"}
            count = float(packed.loss_weight(alone))
            total += count * packed(batch["pixel_values"][row // 3 : row // 3 + 1], **alone)
            tokens += count
    torch.testing.assert_close(whole, total / tokens, rtol=1e-5, atol=0)


def test_mask_of_packed_texts_cell_by_cell():
    """Two image tokens; a text of prefix, prefix, suffix, suffix; one of prefix, suffix; padding."""
    example = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    positions = torch.tensor([[2, 3, 4, 5, 2, 3, 4]])
    is_suffix = torch.tensor([[0, 0, 1, 1, 0, 1, 0]])
    expected = """
        11.......
        11.......
        1111.....
        1111.....
        11111....
        111111...
        11....1..
        11....11.
        11......1"""
    expected = [[cell == "1" for cell in row.strip()] for row in expected.split()]
    assert objectives.packed_mask(2, example, positions, is_suffix)[0].tolist() == expected


# --- batches --------------------------------------------------------------------------------------------------------


def test_mask_batch_has_the_masks_of_all_objects_in_their_boxes(processor):
    masks = batches.MaskBatches(processor, 4, misread=0.2)[2]["masks"]
    objects = [o for seed in range(8, 12) for o in emoji.make_scene(seed, "train", 64).objects]
    expected = np.stack([locations.crop_mask(o.mask, o.box) for o in objects])
    assert masks.dtype == torch.float32 and np.array_equal(masks.numpy(), expected)
    options = {"misread": 0.2, "world_size": 2}
    halves = [batches.MaskBatches(processor, 4, rank=rank, **options)[2] for rank in range(2)]
    assert torch.equal(masks, torch.cat([half["masks"] for half in halves]))
    misread = torch.cat([batches.MaskBatches(processor, 32, misread=0.2)[step]["misread"] for step in range(4)])
    assert misread.shape[1] == 16 and abs(misread.float().mean() - 0.2) < 0.03
    assert torch.equal(
        misread[: len(misread) // 8], batches.MaskBatches(processor, 32, misread=0.2)[0]["misread"][: len(misread) // 8]
    )


def test_patches_show_what_covers_a_quarter_of_them():
    for seed in range(20):
        scene = emoji.make_scene(seed, "train", 64)
        shows = batches.names_in_patches(scene, 16)
        for patch in range(16):
            y, x = patch // 4 * 16, patch % 4 * 16
            expected = set()
            for o in scene.objects:
                pixels = sum(o.mask[y + i, x + j] for i in range(16) for j in range(16))
                if pixels >= 64:
                    expected.add(o.name)
            assert {emoji.OBJECTS[i] for i in np.flatnonzero(shows[patch])} == expected


def test_a_patch_belongs_to_the_object_that_covers_most_of_it():
    shared = 0
    for seed in range(60):
        scene = emoji.make_scene(seed)
        owners = batches.patch_owners(scene, 16)
        for patch in range(49):
            y, x = patch // 7 * 16, patch % 7 * 16
            pixels = [int(o.mask[y : y + 16, x : x + 16].sum()) for o in scene.objects]
            assert owners[patch] == (pixels.index(max(pixels)) if max(pixels) >= 64 else -1)
            shared += sum(n >= 64 for n in pixels) > 1
    assert shared > 3  # or there was nothing to decide


def test_alignment_batch_says_which_patch_shows_which_name(processor):
    alignment = batches.AlignmentBatches(processor, 4)
    batch, scenes = alignment[1], alignment.scenes(1)
    assert torch.equal(batch["pixel_values"], processor.preprocess_images([scene.image for scene in scenes]))
    expected = np.stack([batches.names_in_patches(scene, 16) for scene in scenes])
    for third in batch["shows"].chunk(3, dim=2):
        assert np.array_equal(third.numpy(), expected)
    texts, n = processor.batch_decode(batch["name_ids"]), len(emoji.OBJECTS)
    assert texts[:n] == list(emoji.OBJECTS)
    assert texts[n : 2 * n] == [f" {name}" for name in emoji.OBJECTS]
    assert texts[2 * n :] == [f" {emoji.plural(name)}" for name in emoji.OBJECTS]
    poses = [[*(v / 64 for v in o.box), o.angle / 15, o.mirrored] for scene in scenes for o in scene.objects]
    assert batch["poses"].dtype == torch.float32 and torch.equal(batch["poses"], torch.tensor(poses))
    first = 0
    for scene, owners in zip(scenes, batch["owners"], strict=True):
        of_scene = batches.patch_owners(scene, 16)
        assert owners.tolist() == [first + index if index >= 0 else -1 for index in of_scene]
        first += len(scene.objects)


def test_suffix_batch_has_the_answers_of_its_scenes(processor):
    batch = suffix_batches(processor)[3]
    assert batch["pixel_values"].shape == (4, 3, 64, 64) and len(batch["input_ids"]) == 8
    for row, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        scene = emoji.make_scene(3 * 4 + row // 2, "train", 64)
        prompt, answer = processor.decode(ids).split("\n")
        assert (prompt, answer) in {(e.prompt, e.answers[0]) for e in scene.examples}
        assert processor.decode(labels[labels != -100]) == answer


def test_segment_batch_has_the_codes_of_the_masks(processor):
    vae = MaskVQVAE.from_pretrained()
    segment = suffix_batches(processor, mixture=recipe.MIXTURE, first_seed=48, crowded=True, vae=vae)
    coded = 0
    for step in range(6):
        batch, scenes = segment[step], [scene for scene in segment.scenes(step) for _ in range(2)]
        for scene, ids, labels in zip(scenes, batch["input_ids"], batch["labels"], strict=True):
            prompt, answer = processor.decode(ids).split("\n")
            (example,) = (e for e in scene.examples if e.prompt == prompt)
            assert processor.decode(labels[labels != -100]) == answer
            if example.kind != "segment":
                assert answer == example.answers[0]
                continue
            parsed = locations.parse_detections(answer, 64, 64)
            assert parsed.problems == []
            objects = emoji.select_objects(scene.objects, prompt.removeprefix("segment ").split(" ; "))
            codes = vae.codes_from_masks([o.mask for o in objects], [o.box for o in objects])
            expected = list(zip([o.name for o in objects], codes, strict=True))
            assert [(d.label, d.codes) for d in parsed.detections] == expected
            coded += len(codes)
    assert coded > 10


def test_processes_share_a_step_without_overlap(processor):
    whole = suffix_batches(processor)[1]["pixel_values"]
    parts = [suffix_batches(processor, rank=rank, world_size=2)[1]["pixel_values"] for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(ValueError, match="3 processes cannot share 4 scenes per step equally"):
        suffix_batches(processor, rank=0, world_size=3)


def test_crowded_batches_have_new_scenes_in_proportion_to_their_objects(processor):
    crowded = batches.SceneBatches(processor, 16, first_seed=32, crowded=True)
    seeds_of = [crowded.scene_seeds(step) for step in range(300)]
    for step, seeds in enumerate(seeds_of):
        window = range(32 + 32 * step, 32 + 32 * (step + 1))
        assert len(set(seeds)) == 16 and set(seeds) <= set(window)
    planned = [len(emoji.planned_names(seed)) for seeds in seeds_of for seed in seeds]
    offered = [len(emoji.planned_names(seed)) for seed in range(32, 32 + 9600)]
    kept = [planned.count(n) / offered.count(n) for n in (1, 2, 3, 4)]
    assert kept == sorted(kept) and kept[0] < 0.35 and kept[3] > 0.6
    options = {"first_seed": 32, "crowded": True, "world_size": 2}
    halves = [batches.SceneBatches(processor, 16, rank=rank, **options).scenes(0) for rank in (0, 1)]
    assert [scene.seed for half in halves for scene in half] == seeds_of[0]


@pytest.mark.parametrize("left_out", [None, "segment"])
def test_examples_are_sampled_by_the_mixture(left_out):
    """All kinds in the mixture and no other."""
    mixture = {kind: weight for kind, weight in recipe.MIXTURE.items() if kind != left_out}
    scenes = map(emoji.make_scene, range(99))
    scene = next(s for s in scenes if {e.kind for e in s.examples} == set(recipe.MIXTURE))
    rng = np.random.default_rng(0)
    kinds = [batches.sample_examples(scene, 1, rng, mixture)[0].kind for _ in range(4000)]
    assert set(kinds) == set(mixture)
    total = sum(mixture.get(e.kind, 0) for e in scene.examples)
    for kind, weight in mixture.items():
        expected = weight * sum(e.kind == kind for e in scene.examples) / total
        assert abs(kinds.count(kind) / 4000 - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert len(set(batches.sample_examples(scene, 4, rng, mixture))) == 4


def test_batches_show_the_world_and_the_changes_that_they_are_given(processor):
    world, augment = emoji.World(20, 2), emoji.AUGMENTATIONS
    small = batches.AlignmentBatches(processor, 16, world=world, augment=augment)
    scenes = small.scenes(0)
    assert {o.name for scene in scenes for o in scene.objects} <= set(world.names)
    assert max(len(scene.objects) for scene in scenes) == 2
    assert small[0]["shows"].shape[2] == len(small[0]["name_ids"]) == 60
    plain = batches.AlignmentBatches(processor, 16, world=world).scenes(0)
    assert [[o.name for o in s.objects] for s in scenes] == [[o.name for o in s.objects] for s in plain]
    assert sum(not np.array_equal(a.image, b.image) for a, b in zip(scenes, plain, strict=True)) > 10


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tokenizer_is_that_of_the_embedded_checkpoint():
    """Token for token: a model trained from scratch reads and writes as the embedded one does."""
    embedded = json.loads((EMBEDDED / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(recipe.make_processor(TINY).tokenizer.to_str()) == embedded


def test_the_stages(plan, model):
    assert [stage.name for stage in plan] == STAGES
    assert [stage.config.steps for stage in plan] == [6, 6, 6, 2]
    _, align, answer, finish = plan
    assert [(type(stage.objective), type(stage.batches)) for stage in plan] == [
        (objectives.MaskVQVAEObjective, batches.MaskBatches),
        (objectives.AlignmentObjective, batches.AlignmentBatches),
        (objectives.PackedSuffixObjective, batches.SuffixBatches),
        (objectives.SuffixObjective, batches.SuffixBatches),
    ]
    assert all(stage.objective.model is model for stage in plan[1:])
    for stage in plan:
        assert stage.config.lr == getattr(TINY, f"{stage.name}_lr") and stage.config.horizon is None
        assert stage.config.optimizer == "muon" and stage.config.precision == "bfloat16"
        assert stage.batches.augment == emoji.AUGMENTATIONS and stage.batches.world == emoji.WORLD
    assert answer.batches.mixture is recipe.MIXTURE and finish.batches.mixture is recipe.MIXTURE
    assert align.config.groups == ()
    assert answer.config.groups == (training.ParameterGroup("vision_tower", TINY.tower_lr, TINY.tower_warmup),)
    assert finish.config.groups == (training.ParameterGroup("vision_tower", TINY.tower_lr),)
    last = max(seed for step in range(answer.config.steps) for seed in answer.batches.scene_seeds(step))
    assert last < min(finish.batches.scene_seeds(0))  # new scenes


def test_the_small_recipe_is_a_smaller_world():
    assert recipe.SMALL.world == emoji.World(20, 2)
    assert len(recipe.SMALL.world.names) == len(set(recipe.SMALL.world.names)) == 20
    assert replace(recipe.SMALL, augment="none").augmentations == ()
    assert replace(recipe.SMALL, augment="color,blur").augmentations == ("color", "blur")


def test_a_whole_run(processor, tmp_path, monkeypatch):
    """All stages, their files, and a checkpoint; the same call again only loads them."""
    monkeypatch.setattr(recipe, "make_processor", lambda config: processor)
    recipe.train(TINY, tmp_path, HERE)
    assert json.loads((tmp_path / "recipe.json").read_text()) == vars(TINY)
    for stage, steps in zip(STAGES, (6, 6, 6, 2), strict=True):
        assert [record["step"] for record in metrics(tmp_path / stage)] == [steps]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = tmp_path / "checkpoint"
    assert Processor.from_pretrained(checkpoint).tokenizer.to_str() == processor.tokenizer.to_str()
    assert MaskVQVAE.from_pretrained(checkpoint).state_dict()["_vq_vae._embedding"].norm() > 0
    before = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").unlink()
    recipe.train(TINY, tmp_path, HERE)
    assert (checkpoint / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_loss_falls(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "make_processor", lambda config: processor)
    config = replace(TINY, masks_scenes=80, align_scenes=240, answer_scenes=480, answer_lr=5e-3)
    recipe.train(config, tmp_path, HERE)
    trained = objectives.SuffixObjective(PaliGemma.from_pretrained(tmp_path / "checkpoint"))
    new = objectives.SuffixObjective(recipe.make_model(config, processor))
    batch = suffix_batches(Processor.from_pretrained(tmp_path / "checkpoint"))[1000]
    with torch.no_grad():
        assert float(trained(**batch)) < 0.7 * float(new(**batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--masks-scenes 3", "masks_scenes must be at least masks_batch, 64, for one step, not 3"),
        ("--finish-scenes 15", "finish_scenes must be at least finish_batch, 48"),
        ("--recipe small --objects 5", "A world has 10 to 100 objects, of which a scene shows 1 to 4, not 5 and 2"),
        ("--most-objects 5", "A world has 10 to 100 objects, of which a scene shows 1 to 4, not 100 and 5"),
        ("--augment color,glow", 'augment must be "all", "none" or some of stretch,'),
        ("--optimizer sgd", "optimizer must be one of adamw, muon, not 'sgd'"),
        ("--misread 1.5", "misread must be from 0 to 1, not 1.5"),
        ("--align-batch -4", "align_batch must be at least 1, not -4"),
        ("--answer-examples 0", "answer_examples must be at least 1, not 0"),
        ("--patch-size 0", "patch_size must be at least 1, not 0"),
        ("--patch-size 15", "image_size must be a multiple of patch_size 15, not 112"),
        ("--image-size 32", "image_size must be from 48 to 896, not 32"),
        ("--heads 5", "width must be a multiple of the number of heads, 5, not 192"),
        ("--heads 64", "head_dim must be even"),
        ("--seed -1", "seed must be at least 0, not -1"),
        ("--answer-lr -0.001", "answer_lr must be at least 0, not -0.001"),
        ("--finish-lr nan", "finish_lr must be at least 0, not nan"),
        ("--warmup 2", "warmup must be from 0 to 1, not 2.0"),
        ("--tower-warmup 2", "warmup must be from 0 to 1, not 2.0"),
        ("--precision float16", "precision must be one of float32, bfloat16, not 'float16'"),
        ("--workers -1", "workers must be at least 0, not -1"),
        ("--save-every -1", "save_every must be at least 0, not -1.0"),
        ("--device cuda:99", "There is no device 'cuda:99' to train on"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path, processor, monkeypatch, capsys, options, message):
    monkeypatch.setattr(recipe, "make_processor", lambda config: processor)
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--device", "cpu", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


def test_a_folder_has_one_recipe(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(recipe, "make_processor", lambda config: processor)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(vars(TINY)))
    recipe.check_recipe(TINY, path)
    with pytest.raises(ValueError, match="recipe.json records another recipe"):
        recipe.train(replace(TINY, seed=1), tmp_path, HERE)
    for content in (b"", b'{"seed": 0', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="recipe.json is not valid JSON .* Delete it, or choose another folder"):
            recipe.train(TINY, tmp_path, HERE)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.json"]


def test_a_state_of_another_stage_is_refused(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(recipe, "make_processor", lambda config: processor)
    masks = tmp_path / "masks"
    training.fit(Line(), Points(), steps=6, lr=0.1, out=masks, context=HERE, name="align")
    with pytest.raises(ValueError, match="masks/state.safetensors is the state of 'align' at step 6"):
        recipe.train(TINY, tmp_path, HERE)
    assert not (tmp_path / "checkpoint").exists()


# --- runs in processes of their own ---------------------------------------------------------------------------------


def train_in_subprocess(out: Path, *options: str, launcher=(sys.executable, "-m", "minivlm")) -> subprocess.Popen:
    numbers = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    command = [*launcher, "train", "--out", str(out), "--device", "cpu", "--save-every", "0", *numbers, *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}  # or progress bars fill the pipe
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=600)[1].decode()
    assert process.returncode == 0, error


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_run_resumes_to_the_same_result(tmp_path):
    """SIGKILL at an arbitrary moment of every stage: same losses, same weights, same codebook, bit for bit."""
    options = [word for stage in STAGES for word in (f"--{stage}-scenes", "240")]
    never_killed = train_in_subprocess(tmp_path / "whole", *options)  # meanwhile
    killed = tmp_path / "killed"
    for number, stage in enumerate(STAGES):
        process = train_in_subprocess(killed, *options)
        deadline = time.monotonic() + 300
        while not (killed / stage / "state.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = [name for name in STAGES if (killed / name / "state.safetensors").exists()]
        assert reached == STAGES[: number + 1] and not (killed / "checkpoint" / "model.safetensors").exists()
    finish(train_in_subprocess(killed, *options))
    finish(never_killed)
    for stage in STAGES:
        assert metrics(killed / stage) == metrics(tmp_path / "whole" / stage)
    for cls in (PaliGemma, MaskVQVAE):
        one, other = (cls.from_pretrained(tmp_path / name / "checkpoint") for name in ("whole", "killed"))
        assert_equal_weights(one, other)


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one(tmp_path):
    # A VQ-VAE that differs in the last bit can choose another code for a mask. With this seed it does not.
    options = ("--precision", "float32", "--seed", "1")
    alone = train_in_subprocess(tmp_path / "one", *options)  # meanwhile
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    finish(train_in_subprocess(tmp_path / "two", *options, launcher=(*launcher, "-m", "minivlm")))
    finish(alone)
    one, two = ([metrics(tmp_path / name / stage)[0]["loss"] for stage in STAGES] for name in ("one", "two"))
    assert len(one) == 4 and one == pytest.approx(two, rel=5e-5)  # rounding of all the steps before adds up
