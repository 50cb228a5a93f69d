"""The JavaScript PaliGemma in web/ gives the answers of the package, in node and in Chromium."""

import base64
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm
from minivlm import generation, locations, masks
from minivlm.emoji import make_scene
from minivlm.hub import EMBEDDED
from minivlm.processor import to_rgb
from minivlm.vqvae import MaskVQVAE

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "tests" / "web" / "run.mjs"
TASKS = ("caption en", "answer en", "detect", "segment")
TEXTS = [
    "caption en", "answer en what is left of the cat?", "detect cat ; dog", "a  b\n\n c", "", "<bos>x<eos><pad>",
    "naïve 🐱🦩 日本 \x00", "<loc0001><loc00><seg127> <image>", "▁ ▁", "unhappiness", "CAT", "<0x41>", "\u200d👩‍🚀",
]  # fmt: skip
ANSWERS = [
    "", ";", "<loc0001><loc0002><loc0300><loc0400> cat ; <loc0000><loc0600><loc0400><loc1023> dog;",
    "<loc0001><loc0002><loc0300> cat", "no box", "x <loc0001><loc0002><loc0300><loc0400> cat",
    "<loc0001><loc0002><loc0300><loc0400>" + "".join(f"<seg{i:03d}>" for i in range(16)) + " cat",
    "<loc0001><loc0002><loc0300><loc0400><seg001> cat", "<loc0400><loc0002><loc0300><loc0400> cat",
    "<loc0001><loc0002><loc0300><loc2000> cat",
    "<loc0001><loc0002><loc0300><loc0400> <loc0005><loc0002><loc0300><loc0400> a <loc0001><loc0002><loc0300><loc0400>b",
    "<loc0001><loc0002><loc0300><loc0400> ca<t ; <loc0001><loc0002><loc0300><loc0400> ca",
]  # fmt: skip


def image_of(array: np.ndarray) -> dict:
    return {"data": base64.b64encode(array.tobytes()).decode(), "width": array.shape[1], "height": array.shape[0]}


def in_node(tmp_path: Path, jobs: list[dict], timeout: int = 120) -> list:
    """What node prints for the jobs, one object per job."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node: install Node.js 18 or newer")
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [node, RUN, EMBEDDED, tmp_path / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def package():
    return minivlm.PaliGemma.from_pretrained(dtype=torch.float32), minivlm.Processor.from_pretrained()


def prompts_of(scene) -> list[str]:
    """One prompt for each task."""
    return [next(e.prompt for e in scene.examples if e.prompt.startswith(task)) for task in TASKS]


def expected(package, scene) -> dict:
    """What the package answers, as tests/web/cases.js returns it."""
    model, processor = package
    answers = []
    for prompt in prompts_of(scene):
        batch = generation.prepare_inputs(processor, scene.image, prompt)
        ids = generation.generate_ids(model, batch, max_new_tokens=96).sequences
        with torch.no_grad():
            whole = torch.cat((batch["input_ids"], ids[:, :-1]), 1)
            types = torch.zeros_like(whole)
            types[:, batch["input_ids"].shape[1] :] = 1
            logits = model(whole, pixel_values=batch["pixel_values"], token_type_ids=types)[0]
        first = batch["input_ids"].shape[1] - 1
        answers.append({"tokens": ids[0].tolist(), "text": processor.decode(ids[0]), "logits": logits[[first, -1]]})
    return {"answers": answers, "pixels": processor.preprocess_images([scene.image])[0]}


def check_scene(ours: dict, theirs: dict) -> None:
    assert np.abs(np.array(ours["pixels"]) - theirs["pixels"].numpy().ravel()).max() < 1e-6
    for a, b in zip(ours["answers"], theirs["answers"], strict=True):
        assert (a["tokens"], a["text"]) == (b["tokens"], b["text"])
        assert np.abs(np.array(a["logits"]) - b["logits"].numpy()).max() < 1e-4


def check_scenes(package, tmp_path, seeds, split="validation") -> None:
    scenes = [make_scene(seed, split) for seed in seeds]
    jobs = [{"scene": {"image": image_of(scene.image), "prompts": prompts_of(scene)}} for scene in scenes]
    for ours, scene in zip(in_node(tmp_path, jobs, timeout=3000), scenes, strict=True):
        check_scene(ours, expected(package, scene))


@pytest.mark.slow
def test_node_answers_as_the_package_does(package, tmp_path):
    check_scenes(package, tmp_path, range(6))
    check_scenes(package, tmp_path, range(2), "artist")


@pytest.mark.long
def test_node_answers_as_the_package_does_on_200_scenes(package, tmp_path):
    check_scenes(package, tmp_path, range(1000, 1200))


def test_tokenizer(package, tmp_path):
    tokenizer, processor = package[1].tokenizer, package[1]
    rng = np.random.default_rng(0)
    texts = [*TEXTS, *(e.prompt + e.answers[0] for e in make_scene(3, "validation").examples)]
    rows = [rng.integers(0, tokenizer.get_vocab_size() + 20, 12).tolist() for _ in range(50)]
    rows += [rng.integers(6, 262, 6).tolist() for _ in range(50)]  # bytes
    rows += [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    encoded, decoded = in_node(tmp_path, [{"encode": texts}, {"decode": rows}])
    assert encoded == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert decoded == [processor.decode(ids) for ids in rows]


@pytest.mark.parametrize("filter", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_resize_gives_the_bytes_of_pil(tmp_path, filter):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    sizes = [(112, 112), (16, 16), (53, 20), (7, 37), (1, 1)]
    (found,) = in_node(tmp_path, [{"resize": {"image": image_of(pixels), "sizes": sizes, "filter": int(filter)}}])
    for values, size in zip(found, sizes, strict=True):
        assert values == np.asarray(Image.fromarray(pixels[..., :3]).resize(size, filter)).ravel().tolist()


def test_transparency_becomes_white(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    (found,) = in_node(tmp_path, [{"resize": {"image": image_of(pixels), "sizes": [(64, 64)], "filter": 3}}])
    expected = np.asarray(to_rgb(Image.fromarray(pixels)))
    assert np.abs(np.array(found[0]) - expected.ravel().astype(int)).max() <= 1  # PIL rounds twice


def test_boxes_and_problems(tmp_path):
    (found,) = in_node(tmp_path, [{"parse": ANSWERS}])
    for ours, text in zip(found, ANSWERS, strict=True):
        theirs = locations.parse_detections(text, 112, 112)
        assert len(ours["problems"]) == len(theirs.problems), text
        for a, b in zip(ours["problems"], theirs.problems, strict=True):
            assert a.split(":")[0] == b.split(":")[0]
        assert [(d["label"], tuple(d["box"]), tuple(d["codes"])) for d in ours["detections"]] == [
            (d.label, pytest.approx(d.box), d.codes) for d in theirs.detections
        ]


def test_masks(tmp_path):
    codes = np.random.default_rng(0).integers(0, 128, (3, 16)).tolist()
    boxes = [(10.2, 20.7, 60.1, 90.9), (0, 0, 112, 112), (100.3, 3, 130, 4)]
    jobs = [{"mask": {"codes": c, "box": b}} for c, b in zip(codes, boxes, strict=True)]
    vae = MaskVQVAE.from_pretrained()
    with torch.no_grad():
        values = vae.decode(torch.tensor(codes)).numpy()
    for found, box, value in zip(in_node(tmp_path, jobs), boxes, values, strict=True):
        assert np.abs(np.array(found["values"]) - value.ravel()).max() < 1e-4
        theirs = locations.paste_mask(value, box, 112, 112)
        assert np.count_nonzero(np.array(found["mask"]) != theirs.ravel()) <= 2  # values at the very edge


def test_sampling_and_mask(tmp_path):
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 3
    options = [{"temperature": t, "topP": p} for t in (0.3, 1.0, 2.0) for p in (0.0, 0.5, 0.9, 1.0)]
    types = [0] * 5 + [1] * 3
    jobs = [{"distribution": {"logits": logits[0].tolist(), "options": options}}, {"prefixLm": types}]
    found, mask = in_node(tmp_path, jobs)
    for ours, option in zip(found, options, strict=True):
        scaled = generation.apply_temperature(logits, option["temperature"])
        theirs = generation.top_p_filter(scaled, option["topP"]).softmax(-1)[0]
        assert np.abs(np.array(ours) - theirs.numpy()).max() < 1e-5
    assert mask == masks.prefix_lm_mask(torch.tensor([types]))[0].int().flatten().tolist()
