"""Fine-tuning: adapters that peft opens, data as people have it, errors that name the line, runs that resume."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_transformers, random_batch, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import minivlm
from minivlm import locations, training
from minivlm.__main__ import main
from minivlm.emoji import recipe
from minivlm.generation import generate_ids
from minivlm.hub import EMBEDDED
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training import finetune, lora, memory
from minivlm.training.examples import DataError, ExampleBatches, read_examples
from minivlm.training.finetune import FineTuneConfig

ROOT = Path(__file__).parent.parent
HERE = training.DistributedContext(torch.device("cpu"))
SIZES = recipe.TrainConfig(image_size=64, width=32, mlp_width=48, tower_layers=2, decoder_layers=2, heads=2)
ALL = tuple(lora.LAYERS)
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A small random PaliGemma with the tokenizer of the embedded checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    processor = Processor(Processor.from_pretrained(EMBEDDED).tokenizer, image_size=64, num_image_tokens=16)
    recipe.make_model(SIZES, processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    """Plain images of four colors with a box each: what they show, and where."""
    for split in ("train", "valid"):
        folder, rows = tmp_path / "data" / split, []
        folder.mkdir(parents=True)
        for i, (name, color) in enumerate(COLORS.items()):
            image = Image.new("RGB", (60, 40), color)
            image.save(folder / f"{name}.png")
            box = locations.Detection("dog", (5 * i, 0, 30, 20 + 5 * i))
            rows.append({"image": f"{name}.png", "prefix": "caption en", "suffix": f"{i + 1} dogs"})
            rows.append(rows[-1] | {"prefix": "detect dog", "suffix": locations.format_detections([box], 60, 40)})
        write(folder / "annotations.jsonl", rows)
    return tmp_path / "data"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_adapters(version: int = 1, parts: tuple[str, ...] = ALL, rank: int = 4) -> tuple[PaliGemma, PaliGemma]:
    """A tiny model, and the same with adapters that change it."""
    base = tiny_model(version)
    model = copy.deepcopy(base)
    lora.add(model, lora.find_layers(model, parts), rank, 2.0)
    torch.manual_seed(1)
    for layer in lora.adapters(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    return base, model


def assert_same(one: PaliGemma, other, changed: PaliGemma | None = None) -> None:
    """The logits of two models agree, and differ from those of a third."""
    batch = random_batch(one.config, [3, 5], [2, 4])
    is_token = batch["attention_mask"].bool()
    with torch.no_grad():
        a, b = (getattr(m(**batch), "logits", m(**batch))[is_token] for m in (one, other))
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        if changed is not None:
            assert (changed(**batch)[is_token] - b).abs().max() > 0.05 * b.abs().max()


def assert_same_tokens(ours: PaliGemma, theirs) -> None:
    batch = random_batch(ours.config, [4, 4], [0, 0])
    tokens = generate_ids(ours, batch, max_new_tokens=8).sequences
    end = {"eos_token_id": ours.config.eos_token_ids, "pad_token_id": 0}
    generated = theirs.generate(**batch, max_new_tokens=8, do_sample=False, **end)[:, batch["input_ids"].shape[1] :]
    assert torch.equal(tokens, generated) and len(set(tokens.flatten().tolist())) > 3


# --- LoRA -----------------------------------------------------------------------------------------------------------


def test_update_and_merge_by_hand():
    W, A, B = torch.eye(2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert lora.lora_update(x, A, B, 0.5).tolist() == [[4.5, 6.0], [3.0, 4.0]]
    assert lora.merge_weight(W, A, B, 0.5).tolist() == [[2.5, 3.0], [2.0, 5.0]]


def test_an_adapter_changes_nothing_at_first_and_only_it_learns():
    base = tiny_model(1)
    model = copy.deepcopy(base)
    names = lora.find_layers(model, ("language_model",))
    lora.add(model, names, 4, 2.0)
    assert len(names) == 4 * 7 and set(lora.adapters(model)) == set(names)
    assert_same(model, base)
    learns = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(learns) == 2 * len(names) and all(".lora_" in name for name in learns)
    batch = random_batch(model.config, [3], [4])
    labels = batch["input_ids"].masked_fill(batch["token_type_ids"] == 0, -100)
    model.loss(labels, **batch).backward()
    assert all(weight.grad is None for name, weight in model.named_parameters() if ".lora_" not in name)
    assert all(layer.lora_B.weight.grad.any() for layer in lora.adapters(model).values())


def test_merged_weights_do_what_the_adapter_did():
    base, model = with_adapters()
    before = copy.deepcopy(model)
    lora.merge(model)
    assert not lora.adapters(model) and list(model.state_dict()) == list(base.state_dict())
    assert_same(model, before, changed=base)


def test_a_frozen_weight_in_bfloat16_has_an_adapter_in_float32(tmp_path):
    model = tiny_model(1).to(torch.bfloat16)
    lora.add(model, lora.find_layers(model, ALL), 2, 1.0)
    assert {w.dtype for w in model.parameters() if w.requires_grad} == {torch.float32}
    batch = random_batch(model.config, [3], [4])
    assert model(**batch).dtype == torch.bfloat16
    lora.merge(model)
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("parts", [ALL, ("language_model",)], ids=["all parts", "decoder"])
@pytest.mark.parametrize("version", [1, 2])
def test_peft_opens_our_adapters(tmp_path, version, parts):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    base, model = with_adapters(version, parts)
    lora.save(model, tmp_path, parts, 8.0, "somewhere")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        theirs = peft.PeftModel.from_pretrained(in_transformers(base), tmp_path)
    changes = [weight for name, weight in theirs.named_parameters() if "lora_B" in name]
    assert len(changes) == len(lora.adapters(model)) and all(weight.any() for weight in changes)
    assert_same(model, theirs, changed=base)
    assert_same_tokens(model, theirs)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "v_proj"]}])
def test_adapters_of_peft_open_here(tmp_path, options):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    base = tiny_model(1)
    targets = ".*language_model.*(q_proj|down_proj)"
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **{"target_modules": targets} | options)
    theirs = peft.get_peft_model(in_transformers(base), config).eval()
    torch.manual_seed(2)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = lora.load(copy.deepcopy(base), tmp_path)
    assert_same(ours, theirs, changed=base)
    assert_same_tokens(lora.merge(ours), theirs)


@pytest.mark.parametrize("layout", ["language_model.model.layers", "model.language_model.layers"])
def test_names_of_older_versions_are_understood(tmp_path, layout):
    base, model = with_adapters(parts=("language_model",))
    lora.save(model, tmp_path, ("language_model",), 8.0, "somewhere")
    tensors = load_file(tmp_path / lora.WEIGHTS)
    renamed = {name.replace("model.language_model.layers", layout): value for name, value in tensors.items()}
    save_file(renamed, tmp_path / lora.WEIGHTS)
    assert_same(lora.load(copy.deepcopy(base), tmp_path), model)


def spoil(folder: Path, how: str) -> None:
    config, tensors = json.loads((folder / lora.CONFIG).read_text()), load_file(folder / lora.WEIGHTS)
    first = next(iter(tensors))
    if how == "zero":
        tensors = {name: value * (0 if "lora_B" in name else 1) for name, value in tensors.items()}
    elif how == "NaN":
        tensors[first] = tensors[first] * torch.nan
    elif how == "half":
        del tensors[first]
    elif how == "shape":
        tensors[first] = torch.ones(7, 7)
    elif how == "name":
        tensors = {name.replace("layers.0", "layers.99"): value for name, value in tensors.items()}
    elif how == "embedding":
        tensors["base_model.model.model.language_model.embed_tokens.lora_embedding_A"] = torch.ones(2, 2)
    else:
        config |= json.loads(how)
    (folder / lora.CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / lora.WEIGHTS)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("zero", "changes nothing"),
        ("NaN", "NaN or infinity"),
        ("half", "not an adapter of linear layers"),
        ("shape", "one of another model"),
        ("name", "one of another model"),
        ("embedding", "not an adapter of linear layers"),
        ('{"use_dora": true}', "sets use_dora to True"),
        ('{"peft_type": "IA3"}', "sets peft_type to 'IA3'"),
        ('{"bias": "all"}', "sets bias to 'all'"),
        ('{"modules_to_save": ["lm_head"]}', "sets modules_to_save"),
        ('{"alpha_pattern": {"q_proj": 4}}', "sets alpha_pattern"),
        ('{"lora_alpha": "many"}', "lora_alpha in .* must be a positive number"),
    ],
)
def test_adapters_that_would_run_wrongly_are_refused(tmp_path, how, message):
    base, model = with_adapters()
    lora.save(model, tmp_path, ALL, 8.0, "somewhere")
    spoil(tmp_path, how)
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=message):
        lora.load(base, tmp_path)
    assert list(base.state_dict()) == list(before), "a refused adapter leaves the model as it was"


def test_folders_without_an_adapter_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        lora.load(tiny_model(1), tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        lora.save(tiny_model(1), tmp_path, ALL, 8.0, "somewhere")
    (tmp_path / lora.CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError, match="pickle"):
        lora.load(tiny_model(1), tmp_path)
    (tmp_path / lora.WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        lora.load(tiny_model(1), tmp_path)


# --- data -----------------------------------------------------------------------------------------------------------


def test_a_folder_of_jsonl_has_its_splits(data):
    splits = read_examples(data)
    assert {split: len(found) for split, found in splits.items()} == {"train": 8, "valid": 8}
    first = splits["train"][0]
    assert (first.image, first.prefix, first.suffix) == (data / "train" / "red.png", "caption en", "1 dogs")
    assert first.source == f"{data / 'train' / 'annotations.jsonl'}, line 1" and first.task == "caption"
    assert read_examples(data / "train" / "annotations.jsonl")["train"] == splits["train"]
    (data / "valid").rename(data / "val")
    assert len(read_examples(data)["valid"]) == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ('["a", "b"]', "must be an object with image, prefix, suffix"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ('{"image": "red.png", "prefix": "a"}', "has no 'suffix'"),
        ('{"image": "red.png", "prefix": "a", "suffix": "b", "sufix": "c"}', "has the unknown key 'sufix'"),
        ('{"image": "red.png", "prefix": "a", "suffix": "  "}', "suffix is empty"),
        ('{"image": "", "prefix": "a", "suffix": "b"}', "image is empty"),
        ('{"image": "red.png", "prefix": 3, "suffix": "b"}', "prefix must be a text"),
        ('{"image": "red.png", "prefix": "<image>a", "suffix": "b"}', "the processor adds"),
        ('{"image": "red.png", "prefix": "a", "suffix": "\\ud800"}', "half a character"),
        ('{"image": "none.png", "prefix": "a", "suffix": "b"}', "there is no image '.*none.png'"),
        ('{"image": "annotations.jsonl", "prefix": "a", "suffix": "b"}', "cannot be read as an image"),
        ('{"image": "red.png", "prefix": "detect a", "suffix": "<loc0001><loc0002><loc1024><loc0004> a"}', "boxes in"),
        ('{"image": "red.png", "prefix": "detect a", "suffix": "<loc0900><loc0002><loc0100><loc0004> a"}', "boxes in"),
    ],
)
def test_errors_name_the_line(data, line, message, capsys):
    file = data / "train" / "annotations.jsonl"
    with file.open("ab") as end:
        end.write(b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(DataError, match=message) as error:
        read_examples(data)
    assert str(error.value).startswith(f"{file}, line 10: ") and "\n" not in str(error.value)
    assert main(["finetune", str(data), "--out", str(data / "out")]) == 2
    assert f"minivlm finetune: {error.value}\n" == capsys.readouterr().err
    assert not (data / "out").exists()


def test_data_that_is_not_there(tmp_path, data):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            read_examples(path)
    with pytest.raises(DataError, match="no folder"):
        read_examples(data, images=tmp_path / "none")
    (data / "train" / "annotations.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="has no examples"):
        read_examples(data)


BOX = {"id": 9, "image_id": 7, "category_id": 1, "bbox": [9, 0, 5, 5]}


def coco(folder: Path, **changes) -> Path:
    """Two images of 100 × 50 with boxes of two classes, and one without."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (100, 50)).save(folder / f"{name}.jpg")
    content = {
        "images": [{"id": i, "file_name": f"{n}.jpg", "width": 100, "height": 50} for i, n in enumerate("abc", 7)],
        "categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [50, 10, 25, 20], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 3, "bbox": [10, 0, 90.4, 50], "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [0, 0, 10, 10]},
            {"id": 4, "image_id": 8, "category_id": 1, "bbox": [0, 0, 100, 50], "iscrowd": 1},
            {"id": 5, "image_id": 8, "category_id": 3, "bbox": [0, 25, 50, 25]},
        ],
    }
    file = folder / "_annotations.coco.json"
    file.write_text(json.dumps(content | changes))
    return file


def test_coco_becomes_detect_examples(tmp_path):
    file = coco(tmp_path / "train")
    for path in (tmp_path, file):
        first, second = read_examples(path)["train"]
        assert first.prefix == "detect dog ; cat" and second.prefix == "detect dog"
        assert first.image == tmp_path / "train" / "a.jpg"
        found = locations.parse_detections(first.suffix, 100, 50).detections
        assert [d.label for d in found] == ["dog", "cat", "cat"]
        boxes = [(10, 0, 100, 50), (0, 0, 10, 10), (50, 10, 75, 30)]  # the dog's is clipped
        assert np.allclose([d.box for d in found], boxes, atol=0.06)
        assert second.suffix == "<loc0512><loc0000><loc1023><loc0512> dog"
    moved = (tmp_path / "train" / "_annotations.coco.json").rename(tmp_path / "instances.json")
    with pytest.raises(DataError, match="there is no image"):
        read_examples(moved)
    assert len(read_examples(moved, images=tmp_path / "train")["train"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"annotations": [BOX | {"bbox": [90, 0, 20, 5]}]}, "annotation 9: the box"),
        ({"annotations": [BOX | {"bbox": [9, 0, 0, 5]}]}, "annotation 9: the box"),
        ({"annotations": [BOX | {"bbox": [9, 0, 5]}]}, "annotation 9: "),
        ({"annotations": [BOX | {"image_id": 1}]}, "annotation 9: its image_id"),
        ({"annotations": []}, "no examples"),
        ({"annotations": None}, "is not a COCO file"),
        ({"categories": [{"id": 1}]}, "is not a COCO file"),
        ({"categories": [{"id": 1, "name": "a;b"}, {"id": 3, "name": "c"}]}, "must not contain ';'"),
    ],
)
def test_errors_of_coco_name_the_annotation(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as error:
        read_examples(coco(tmp_path, **changes))
    assert "_annotations.coco.json" in str(error.value)


def yolo(folder: Path, line: str = "", names: str = "[cat, dog]") -> Path:
    for split in ("train", "valid"):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (100, 50)).save(folder / split / "images" / f"{name}.jpg")
        (folder / split / "labels" / "a.txt").write_text(f"1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.2 0.4\n{line}\n")
    (folder / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\nnames: {names}\n")
    return folder / "data.yaml"


def test_yolo_becomes_detect_examples(tmp_path):
    file = yolo(tmp_path, line="1 0.5 0.5 0.6 0.5 0.6 0.75")  # an outline
    for path in (tmp_path, file):
        splits = read_examples(path)
        assert list(splits) == ["train", "valid"] and len(splits["train"]) == 1  # b has no boxes
        (example,) = splits["train"]
        assert example.prefix == "detect cat ; dog" and example.image.name == "a.jpg"
        found = locations.parse_detections(example.suffix, 1, 1).detections
        boxes = [(0, 0, 0.2, 0.4), (0.4, 0.3, 0.6, 0.7), (0.5, 0.5, 0.6, 0.75)]
        assert [d.label for d in found] == ["cat", "dog", "dog"]
        assert np.allclose([d.box for d in found], boxes, atol=1e-3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 0.9 0.5 0.4 0.1", "line 4: the box"),
        ("2 0.5 0.5 0.1 0.1", "line 4: its class 2"),
        ("1 0.5 0.5 0.1", "line 4: it must have 4 numbers"),
        ("1 0.5 x 0.1 0.1", "line 4: it must be a class and numbers"),
        ("1 nan 0.5 0.1 0.1", "line 4: the box"),
    ],
)
def test_errors_of_yolo_name_the_line(tmp_path, line, message):
    with pytest.raises(DataError, match=f"a.txt, {message}"):
        read_examples(yolo(tmp_path, line))


def test_a_yaml_without_names_or_folders_is_refused(tmp_path):
    file = yolo(tmp_path / "data", names="3")
    with pytest.raises(DataError, match="not a YOLO data.yaml"):
        read_examples(file)
    file.write_text("train: elsewhere/images\nnames: [cat]\n")
    with pytest.raises(DataError, match="no folder 'elsewhere/images'"):
        read_examples(file)


# --- batches --------------------------------------------------------------------------------------------------------


def test_each_epoch_shows_every_example_once_and_processes_share_a_step(checkpoint, data):
    processor, train = Processor.from_pretrained(checkpoint), read_examples(data)["train"]
    batches = ExampleBatches(processor, train, 4)
    first, second = ([batches.pick(i) for i in range(start, start + 8)] for start in (0, 8))
    assert set(first) == set(second) == set(train) and first != second
    whole = batches[3]
    assert whole["pixel_values"].shape == (4, 3, 64, 64) and (whole["labels"] != -100).any(1).all()
    halves = [ExampleBatches(processor, train, 4, rank=rank, world_size=2)[3] for rank in (0, 1)]
    assert torch.equal(torch.cat([half["pixel_values"] for half in halves]), whole["pixel_values"])
    assert sum(len(half["labels"]) for half in halves) == 4
    with pytest.raises(ValueError, match="cannot share"):
        ExampleBatches(processor, train, 3, world_size=2)


def test_images_are_read_when_they_are_needed(checkpoint, tmp_path):
    """Twenty images of 12 MB each in memory: what the process holds grows by less than five of them."""
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    image = Image.new("RGB", (2000, 2000))
    for path in paths:
        image.save(path, compress_level=1)
    rows = [{"image": path.name, "prefix": "caption en", "suffix": "a dog"} for path in paths]
    train = read_examples(write(tmp_path / "a.jsonl", rows))["train"]
    batches = ExampleBatches(Processor.from_pretrained(checkpoint), train, 1)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to read the memory from")
    batches[0]
    before = resident()
    grown = [resident() - before for step in range(1, 20) if batches[step]]
    assert max(grown) < 60e6


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_ends_early_is_named(checkpoint, data, tmp_path, workers):
    file = data / "train" / "blue.png"
    Image.effect_noise((60, 40), 50).save(file)
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"annotations.jsonl, line \d: The .*image.*truncated") as error:
        run(checkpoint, data, tmp_path / "out", workers=workers)
    assert "\n" not in str(error.value)


# --- a run ----------------------------------------------------------------------------------------------------------


def run(checkpoint: Path, data: Path, out: Path, workers: int = 0, **numbers):
    config = FineTuneConfig(**{"steps": 12, "lr": 3e-3, "batch_size": 4} | numbers)
    context = training.DistributedContext(torch.device("cpu"), workers=workers)
    return finetune.finetune(config, read_examples(data), str(checkpoint), out, context)


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_the_command_learns_and_measures(checkpoint, data, tmp_path, capsys, full):
    """Eight examples by heart: every caption and every box is right, and what was saved says the same."""
    out, how = tmp_path / "out", ["--full"] if full else ["--rank", "16", "--freeze"]
    command = ["finetune", str(data), "--checkpoint", str(checkpoint), "--out", str(out), "--batch-size", "8"]
    command += ["--steps", "150", "--lr", "0.01", "--workers", "0", "--warmup", "0.1", *how]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "| caption, exact match | 100.0" in printed.out and "| detect AP at IoU 0.5 | 100.0" in printed.out
    written = json.loads((out / "evaluation.json").read_text())["valid"]
    assert written["caption, exact match"]["count"] == 4
    before = (out / "state.safetensors").stat().st_mtime_ns
    saved = ["--checkpoint", str(out / "checkpoint")] if full else ["--checkpoint", str(checkpoint)]
    saved += [] if full else ["--adapter", str(out / "adapter")]
    assert main(["evaluate", "--data", str(data), *saved, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["valid"] == written
    assert main(command) == 0, "a finished run is only measured again"
    assert (out / "state.safetensors").stat().st_mtime_ns == before
    image = str(data / "valid" / "green.png")
    assert main(["generate", "--image", image, "--prompt", "caption en", *saved]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 dogs"


def test_frozen_parts_stay_as_they_were(checkpoint, data, tmp_path):
    before = PaliGemma.from_pretrained(checkpoint).state_dict()
    model, _ = run(checkpoint, data, tmp_path / "out", full=True, freeze=("vision_tower", "embed_tokens"))
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == {name for name in before if name.startswith(("vision_tower.", "language_model.model.embed_tokens."))}
    model, _ = run(checkpoint, data, tmp_path / "lora", freeze=("language_model",))
    assert all(not name.startswith("language_model.") for name in lora.adapters(model)) and lora.adapters(model)


class Stop(ExampleBatches):
    """Breaks off at step 8."""

    def __getitem__(self, step):
        if step == 8:
            raise KeyboardInterrupt
        return super().__getitem__(step)


@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_an_interrupted_run_resumes_to_the_same_result(checkpoint, data, tmp_path, monkeypatch, full):
    monkeypatch.setattr(finetune, "LOG_EVERY", 3)
    whole, _ = run(checkpoint, data, tmp_path / "whole", full=full)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "ExampleBatches", Stop)
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(
                FineTuneConfig(steps=12, lr=3e-3, batch_size=4, full=full),
                read_examples(data),
                str(checkpoint),
                tmp_path / "out",
                HERE,
                save_every=0.0,
            )
    resumed, _ = run(checkpoint, data, tmp_path / "out", full=full)
    others = whole.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in resumed.state_dict().items())
    state = load_file(tmp_path / "out" / "state.safetensors")
    assert full or not [name for name in state if name.startswith("module.") and ".lora_" not in name]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"rank": 4}, "its rank is 8, not 4"),
        ({"lr": 1e-3}, "its lr is 0.003, not 0.001"),
        ({"data": "other"}, "its data is"),
    ],
)
def test_a_folder_has_one_run(checkpoint, data, tmp_path, numbers, message):
    run(checkpoint, data, tmp_path / "out", steps=1)
    if numbers.pop("data", None):
        rows = [{"image": "red.png", "prefix": "caption en", "suffix": "another"}]
        write(data / "train" / "annotations.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        run(checkpoint, data, tmp_path / "out", **{"steps": 1} | numbers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "rank must be at least 1"),
        (["--epochs", "0"], "epochs must be above 0"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--freeze", *ALL], "Everything is frozen"),
        (["--lr", "nan"], "lr must be at least 0"),
        (["--checkpoint", "nowhere"], "neither a folder nor a hub id"),
        (["--valid", "nowhere"], "There is no data at 'nowhere'"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(data, tmp_path, capsys, options, message):
    assert main(["finetune", str(data), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_text_that_is_too_long_is_named(checkpoint, data, tmp_path):
    rows = [{"image": "red.png", "prefix": "caption en", "suffix": "dog " * 600}]
    write(data / "valid" / "annotations.jsonl", rows)
    with pytest.raises(DataError, match=r"line 1: it has 6\d\d tokens with its image, but the model takes 512"):
        run(checkpoint, data, tmp_path / "out")


def test_metrics_by_task(checkpoint, data, monkeypatch):
    """The answers are given: half of the captions are right, and one of four boxes is missing."""
    processor, valid = Processor.from_pretrained(checkpoint), read_examples(data)["valid"]

    def answer(model, processor, images, prompts, order, max_new_tokens, batch_size):
        wrong = {"red.png": " ", "blue.png": "  "}  # spaces at the end do not matter
        captions = [e.suffix + (" and a cat" if e.image.name in wrong else " ") for e in valid]
        boxes = [[] if e.image.name == "red.png" else [(e.suffix, 0.9)] for e in valid]
        return [(caption, items) for caption, items in zip(captions, boxes, strict=True)]

    monkeypatch.setattr(finetune, "answer_prompts", answer)
    table = finetune.evaluate(PaliGemma.from_pretrained(checkpoint), processor, valid)
    assert [m.count for m in table.values()] == [4, 4, 4]
    assert [m.value for m in table.values()] == pytest.approx([0.5, 76 / 101, 76 / 101])  # recall 0, 0.01 … 0.75


# --- memory ---------------------------------------------------------------------------------------------------------


def kept_by_autograd(model: PaliGemma, batch: dict, labels: torch.Tensor, half: bool) -> int:
    """Bytes that the forward pass keeps for the backward pass, apart from the weights and autocast's copies of them."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    shapes = {frozenset(weight.shape) for weight in model.parameters() if weight.ndim == 2}
    kept: dict[int, tuple] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage, is_copy = x.untyped_storage(), x.dtype == torch.bfloat16 and frozenset(x.shape) in shapes
        if storage.data_ptr() not in weights and not is_copy:
            kept[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model.loss(labels, **batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_activations_are_counted_as_autograd_keeps_them(full, half):
    config = recipe.TrainConfig(width=192, mlp_width=700, tower_layers=3, decoder_layers=4)
    processor = Processor.from_pretrained(EMBEDDED)
    model = finetune.prepare(recipe.make_model(config, processor), FineTuneConfig(full=full))
    texts, suffixes = ["caption en", "detect a ; b"], ["a cat", "two dogs and a cat"]
    batch = processor(texts, [Image.new("RGB", (112, 112))] * 2, suffixes, padding_side="right")
    labels = batch.pop("labels")
    text_tokens, targets = labels.shape[1] - 49, int((labels[:, 1:] != -100).sum())
    counted = memory.activation_bytes(model.config, 2, text_tokens, targets, half, full)
    assert counted == pytest.approx(kept_by_autograd(model, batch, labels, half), rel=0.05)


def test_weights_are_counted_without_memory():
    """PaliGemma 3B has 2.92 billion weights; rank 8 in the decoder's seven projections adds 11 million."""
    config = minivlm.config.PaliGemmaConfig()
    trained, frozen = memory.count_weights(config, lambda model: finetune.prepare(model, FineTuneConfig(full=True)))
    assert (trained, frozen) == (2_923_466_480, 0)
    learns, base = memory.count_weights(config, lambda model: finetune.prepare(model, FineTuneConfig()))
    assert base == trained
    per_layer = 8 * ((2048 + 2048) * 2 + (2048 + 256) * 2 + (2048 + 16384) * 3)
    assert learns == 18 * per_layer
    assert memory.state_bytes(100, 50, 4, 2) == (1600 + 200) / 2


# --- several processes ----------------------------------------------------------------------------------------------


def start(checkpoint: Path, data: Path, out: Path, *options: str, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "minivlm", "finetune", str(data)]
    command += ["--checkpoint", str(checkpoint), "--out", str(out), "--batch-size", "4", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--lr", "0.001", "--workers", "0", *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen) -> None:
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 0, error


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in training.read_metrics(out / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["adapters", "full"])
def test_two_processes_have_the_result_of_one(checkpoint, data, tmp_path, full):
    """Adapters by DDP, whole weights by FSDP2, of which each process has a half."""
    options = ["--steps", "20", *(["--full", "--freeze", "embed_tokens"] if full else [])]
    alone = start(checkpoint, data, tmp_path / "one", *options)
    wait(start(checkpoint, data, tmp_path / "two", *options, processes=2))
    wait(alone)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 2 and one[1] < one[0] and two == pytest.approx(one, rel=1e-5)
    name = "checkpoint/model.safetensors" if full else "adapter/adapter_model.safetensors"
    one, two = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
    moved = max(float((one[key] - value).abs().max()) for key, value in start_weights(checkpoint, one).items())
    assert all((one[key] - two[key]).abs().max() < 0.02 * moved for key in one)


def start_weights(checkpoint: Path, like: dict) -> dict:
    """What the weights of a result were before: those of the checkpoint; adapters by what lora_B was, zero."""
    before = load_file(checkpoint / "model.safetensors")
    return {key: before.get(key, torch.zeros_like(value)) for key, value in like.items() if "lora_A" not in key}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2], ids=["one process", "sharded"])
def test_a_killed_run_resumes_to_the_same_result(checkpoint, data, tmp_path, processes):
    """SIGKILL to all of its processes, at whatever step they are."""
    options, out = ["--steps", "100", "--full", "--save-every", "0"], tmp_path / "killed"
    process = start(checkpoint, data, out, *options, processes=processes)
    deadline = time.monotonic() + 120
    while len(losses(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for child in descendants(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()
    assert 2 <= len(losses(out)) < 10 and not (out / "checkpoint").exists()
    wait(start(checkpoint, data, out, *options, processes=processes))
    wait(start(checkpoint, data, tmp_path / "whole", *options, processes=processes))
    assert losses(out) == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in other)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [found for child in map(int, listed) for found in (child, *descendants(child))]
