"""The command line: what it prints, what it saves, and how it reports a user's mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image

import minivlm
from minivlm import __main__ as cli
from minivlm import doctor, emoji, generation, hub, locations
from minivlm.__main__ import COMMANDS, find_device, main
from minivlm.vqvae import MaskVQVAE

ROOT = Path(__file__).resolve().parents[1]
CAT = str(ROOT / "data" / "images" / "cat.jpg")
SCENE = str(ROOT / "data" / "images" / "scenes" / "validation-0.png")
SEGMENT = ["generate", "--image", SCENE, "--prompt", "segment panda ; shoe"]
embedded = pytest.mark.skipif(not hub.EMBEDDED.is_dir(), reason="there is no embedded checkpoint")


@pytest.fixture(scope="module")
def folder(tiny_processor, tmp_path_factory) -> str:
    """A checkpoint with random weights, which generates nonsense from its vocabulary."""
    path = tmp_path_factory.mktemp("tiny")
    model = tiny_model(1, vocab_size=tiny_processor.tokenizer.get_vocab_size())
    model.config.image_token_index = tiny_processor.image_token_id
    model.save_pretrained(path)
    tiny_processor.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory) -> Path:
    """The file of a mask VQ-VAE with random weights."""
    torch.manual_seed(0)
    model = MaskVQVAE()
    model._vq_vae._embedding.normal_()
    path = tmp_path_factory.mktemp("vqvae") / "vae-random.npz"
    model.save_pretrained(path.parent, path.name)
    return path


@pytest.fixture
def says(monkeypatch):
    """``says("two cats")`` makes every model answer "two cats"."""

    def fix(*answers: str) -> None:
        def generate(model, processor, image, prompt, stream=None, **options):
            if isinstance(prompt, str):
                stream(answers[0])
                return answers[0]
            return [answers[i % len(answers)] for i in range(len(prompt))]

        monkeypatch.setattr(generation, "generate", generate)

    return fix


def run(*args: str, **options) -> subprocess.CompletedProcess:
    """Runs ``python -m minivlm`` as a user would."""
    command = [sys.executable, "-m", "minivlm", *args]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, **options)


# --- in a new process ----------------------------------------------------------------------------------------------


def test_help_lists_every_command_without_importing_torch():
    code = "import sys, minivlm.__main__ as m\ntry: m.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert all(f"  {name} " in ran.stdout for name in COMMANDS)


def test_the_four_names_of_the_package():
    assert set(minivlm.__all__) <= set(dir(minivlm))
    assert minivlm.PaliGemma.__name__ == "PaliGemma" and minivlm.PaliGemmaConfig().projection_dim == 2048
    assert minivlm.generate is generation.generate and minivlm.Processor.__module__ == "minivlm.processor"
    with pytest.raises(AttributeError, match="no attribute 'Paligemma'"):
        _ = minivlm.Paligemma


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    if command == "evaluate":
        pytest.importorskip("minivlm.emoji.evaluation")
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert COMMANDS[command][0][1:] in " ".join(capsys.readouterr().out.split())


def test_a_mistake_is_one_line_and_exit_code_2():
    ran = run("generate", "--image", "absent.png", "--prompt", "caption en")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "minivlm generate: There is no image file at 'absent.png': check the path.\n"


# --- generate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_console_encoding(encoding):
    code = "import sys; from minivlm import __main__ as m\n"
    code += "m.COMMANDS['doctor'] = ('x', lambda p: None, lambda a: (print('\u00d7\u2192\u4e2d'), m.note('\u2192')))\n"
    code += "sys.exit(m.main(['doctor']))"
    env = os.environ | {"PYTHONIOENCODING": encoding}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=env)
    assert ran.returncode == 0, ran.stderr
    expected = "×→中".encode(encoding, "backslashreplace")
    assert ran.stdout.strip() == expected and ran.stderr.strip() == "→".encode(encoding, "backslashreplace")


@pytest.mark.skipif(os.name != "posix", reason="pipes of another kind")
def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "minivlm", "doctor"]
    ran = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    os.close(write)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "minivlm", "doctor"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and "No space left" in ran.stderr


def test_an_installation_without_data(tmp_path):
    """All help but that of ``train`` works, which is one line."""
    shutil.copytree(ROOT / "minivlm", tmp_path / "minivlm", ignore=shutil.ignore_patterns("__pycache__", "data"))
    for command, code in (("train", 2), ("generate", 0)):
        ran = subprocess.run(
            [sys.executable, "-m", "minivlm", command, "--help"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        assert ran.returncode == code, ran.stderr
        assert ran.stderr.count("\n") == (code == 2) and ("index.json is missing" in ran.stderr) == (code == 2)


def test_generate_prints_what_the_package_returns(folder, capsys):
    assert main(["generate", "--image", CAT, "--prompt", "caption en", "--checkpoint", folder]) == 0
    model, processor = minivlm.PaliGemma.from_pretrained(folder), minivlm.Processor.from_pretrained(folder)
    expected = minivlm.generate(model, processor, CAT, "caption en", max_new_tokens=128)
    assert capsys.readouterr().out.startswith(expected + "\n")


def test_generate_samples_the_same_with_the_same_seed(folder, capsys):
    said = []
    for seed in ("1", "1", "2"):
        main(["generate", "--image", CAT, "--prompt", "caption en", "--checkpoint", folder, "--sample", "--seed", seed])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_generate_prints_boxes_in_pixels_of_the_image(folder, says, capsys):
    width, height = Image.open(CAT).size
    says("<loc0000><loc0000><loc1023><loc1023> cat ; <loc0000><loc0512> dog")
    assert main(["generate", "--image", CAT, "--prompt", "detect cat ; dog", "--checkpoint", folder]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == [f"  cat, x 0 to {width}, y 0 to {height}"]
    assert err == "Item 2 has a box with 2 instead of 4 location tokens: '<loc0000><loc0512> dog'.\n"


def test_generate_answers_several_prompts_and_saves_one_figure(folder, says, capsys, tmp_path):
    says("a cat", "<loc0100><loc0100><loc0900><loc0900> cat")
    saved = tmp_path / "new" / "cat.png"
    argv = ["generate", "--image", CAT, "--prompt", "caption en", "detect cat", "--checkpoint", folder]
    assert main([*argv, "--save", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "caption en: a cat"
    assert err == f"Wrote {saved}.\n"
    with Image.open(saved) as image:
        assert "1 box: cat" in image.info["Description"] and "caption en: a cat" in image.info["Description"]


def segment_answer(codes_from_masks) -> str:
    """The correct answer to ``segment panda ; shoe`` about SCENE."""
    scene = emoji.make_scene(0, "validation")
    return emoji.segment_target(scene.objects, ["panda", "shoe"], scene.size, codes_from_masks)


def some_codes(masks, boxes) -> list[tuple[int, ...]]:
    return [tuple(range(i, i + 16)) for i in range(len(masks))]


def test_generate_decodes_and_draws_masks(folder, says, vqvae, capsys, tmp_path):
    answer, saved = segment_answer(some_codes), tmp_path / "scene.png"
    says(answer)
    assert main([*SEGMENT, "--checkpoint", folder, "--masks", str(vqvae), "--save", str(saved)]) == 0
    out, err = capsys.readouterr()
    found = locations.parse_detections(answer, 112, 112).detections
    masks = MaskVQVAE.from_pretrained(vqvae).masks_from_detections(found, 112, 112)
    counts = [mask.sum() for mask in masks]
    assert min(counts) > 0 and counts[0] != counts[1]
    x0, y0, x1, y1 = (round(v) for v in found[0].box)
    lines = out.splitlines()
    assert lines[0] == answer
    assert lines[1] == f"  panda, x {x0} to {x1}, y {y0} to {y1}, mask of {counts[0]:,} pixels"
    assert lines[2].startswith("  shoe, x ") and lines[2].endswith(f", mask of {counts[1]:,} pixels")
    assert err == f"Wrote {saved}.\n"
    with Image.open(saved) as image:
        alt = image.info["Description"]
        assert "2 boxes and 2 masks: panda" in alt and f"mask of {counts[1]:,} pixels" in alt
        assert "segment panda ; shoe: panda ; shoe" in alt and "<seg" not in alt


def test_generate_uses_the_vqvae_in_the_checkpoints_folder(folder, says, vqvae, capsys, tmp_path):
    for file in (*Path(folder).iterdir(), vqvae):
        (tmp_path / file.name).symlink_to(file)
    says(segment_answer(some_codes))
    main([*SEGMENT, "--checkpoint", str(tmp_path)])
    from_folder = capsys.readouterr()
    main([*SEGMENT, "--checkpoint", folder, "--masks", str(vqvae.parent)])
    assert from_folder == capsys.readouterr() and from_folder.out.count("mask of") == 2


def test_the_embedded_vqvae_decodes_what_it_encoded(says, capsys):
    scene = emoji.make_scene(0, "validation")
    size = {obj.name: int(obj.mask.sum()) for obj in scene.objects}
    says(segment_answer(MaskVQVAE.from_pretrained().codes_from_masks))
    assert main(SEGMENT) == 0
    sizes = [int(line.split()[-2].replace(",", "")) for line in capsys.readouterr().out.splitlines()[1:]]
    assert sizes == pytest.approx([size["panda"], size["shoe"]], rel=0.1)


def test_without_a_vqvae_boxes_are_still_drawn(folder, says, capsys, tmp_path):
    says(segment_answer(some_codes), "a panda", segment_answer(some_codes))
    argv = [*SEGMENT, "caption en", "segment panda", "--checkpoint", folder]
    assert main([*argv, "--save", str(tmp_path / "scene.png")]) == 0
    out, err = capsys.readouterr()
    assert out.count("  panda, x ") == 2 and "mask" not in out
    assert err.startswith(f"Boxes without masks: There is no mask VQ-VAE at {folder}.")
    assert err.count("no mask VQ-VAE") == 1 and "gs://big_vision/paligemma/vae-oid.npz" in err
    assert (tmp_path / "scene.png").is_file()


def test_a_damaged_vqvae_on_the_command_line_is_an_error_before_any_computation(folder, says, vqvae, capsys, tmp_path):
    damaged = tmp_path / "vae-damaged.npz"
    damaged.write_bytes(vqvae.read_bytes()[:-100])
    says(segment_answer(some_codes))
    assert main([*SEGMENT, "--checkpoint", folder, "--masks", str(damaged)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"minivlm generate: {damaged} is not a complete .npz file")


def test_a_damaged_vqvae_in_the_folder_is_reported_and_boxes_are_shown(folder, says, vqvae, capsys, tmp_path):
    for file in Path(folder).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / vqvae.name).write_bytes(vqvae.read_bytes()[:-100])
    says("<loc0100><loc0100><loc0900><loc0900> panda")
    assert main([*SEGMENT, "--checkpoint", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""  # without codes, it is not loaded
    says(segment_answer(some_codes))
    assert main([*SEGMENT, "--checkpoint", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("  panda, x ") == 1 and "mask" not in out
    assert err.startswith("Boxes without masks: ") and "is not a complete .npz file" in err


def test_a_malformed_mask_is_reported_and_its_box_is_shown(folder, says, vqvae, capsys):
    says("<loc0100><loc0100><loc0900><loc0900><seg001> panda")
    assert main([*SEGMENT, "--checkpoint", folder, "--masks", str(vqvae)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["  panda, x 11 to 99, y 11 to 99"]
    assert "has a mask that is not 16 tokens" in err


# --- mistakes ------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such image": (["--image", "absent.jpg"], "no image file at 'absent.jpg'"),
    "a folder as image": (["--image", "."], "no image file at '.'"),
    "not an image": (["--image", __file__], "cannot be read as an image"),
    "<image> in the prompt": (["--prompt", "<image> caption en"], "contains <image>"),
    "no such checkpoint": (["--checkpoint", "no such folder"], "neither a folder nor a hub id"),
    "a folder without a model": (["--checkpoint", str(ROOT / "tests")], "has no config.json"),
    "temperature 0": (["--sample", "--temperature", "0"], "temperature must be above"),
    "top-p 0": (["--sample", "--top-p", "0"], "top_p must be above 0"),
    "top-k 0": (["--sample", "--top-k", "0"], "top_k must be an integer"),
    "temperature alone": (["--temperature", "0.5"], "--temperature cannot be used without --sample"),
    "seed below 0": (["--sample", "--seed", "-1"], "--seed must be"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens must be"),
    "too many tokens": (["--max-new-tokens", "1000000000"], "--max-new-tokens must be at most"),
    "no such device": (["--device", "cuda:99"], "no device 'cuda:99' here"),
    "not a PNG": (["--save", "out.gif"], "must end in .png"),
    "a file as folder": (["--save", f"{__file__}/cat.png"], "is not a folder that can be written to"),
    "temperature NaN": (["--sample", "--temperature", "nan"], "temperature must be above"),
    "an unknown device": (["--device", "tpu"], "no device 'tpu' here"),
    "no such VQ-VAE": (["--masks", "absent.npz"], "no mask VQ-VAE at absent.npz"),
}


@pytest.mark.parametrize("options, message", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_users_mistake(options, message, folder, capsys):
    good = ["generate", "--image", CAT, "--prompt", "caption en", "--checkpoint", folder]
    assert main(good + options) == 2  # if an option is repeated, the last one is used
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err and err.count("\n") == 1 and err.startswith("minivlm generate: ")


@pytest.mark.parametrize(
    "line", ["", "caption", "generate", "generate --image x", "evaluate --scenes", "train --seed x"]
)
def test_mistyped_options(line, capsys):
    with pytest.raises(SystemExit) as left:
        main(line.split())
    assert left.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_debug_shows_where_an_error_was_raised():
    with pytest.raises(ValueError, match="no image file"):
        main(["--debug", "generate", "--image", "absent.jpg", "--prompt", "caption en"])


def test_other_mistakes(capsys):
    assert main(["evaluate", "--scenes", "0"]) == 2
    assert main(["evaluate", "--split", "train"]) == 2
    assert main(["evaluate", "--json", "absent/figures.json"]) == 2
    assert main(["evaluate", "--json", str(ROOT)]) == 2
    assert main(["demo", "--save", str(ROOT)]) == 2
    assert capsys.readouterr().err.count("\n") == 5


def test_interrupting_is_not_an_error(monkeypatch, capsys):
    def interrupt(_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "doctor", ("wait", lambda parser: None, interrupt))
    assert main(["doctor"]) == 130
    monkeypatch.setitem(cli.COMMANDS, "doctor", ("wait", interrupt, interrupt))  # while options are listed
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_prompt_that_is_a_command(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "train", ("x", lambda parser: pytest.fail("listed its options"), None))
    cli.new_parser(["generate", "--image", "x", "--prompt", "train"])


def test_a_full_disk_leaves_the_old_files(folder, says, capsys, monkeypatch, tmp_path):
    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    says("a cat")
    model = minivlm.PaliGemma.from_pretrained(folder)
    before = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="model.safetensors could not be saved .*No space left"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == before
    monkeypatch.setattr(Path, "write_bytes", fail)
    argv = ["generate", "--image", CAT, "--prompt", "caption en", "--checkpoint", folder]
    assert main([*argv, "--save", str(tmp_path / "cat.png")]) == 2
    err = capsys.readouterr().err
    assert "No space left" in err and err.count("\n") == 1


def test_find_device_uses_what_is_available():
    assert find_device("cpu") == "cpu"
    assert find_device(None) in ("cpu", "cuda")


# --- demo ----------------------------------------------------------------------------------------------------------


def test_demo_prints_the_truth_next_to_wrong_answers(folder, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    says("a unicorn")
    assert main(["demo", "--checkpoint", folder]) == 0
    out = capsys.readouterr().out
    assert out.count("caption en: a unicorn  (truth: ") == len(cli.DEMO)
    assert out.count("  segment ") == len(cli.DEMO) == out.count(": (nothing)\n")
    assert "make lab" in out
    with Image.open("out/demo.png") as image:
        assert np.asarray(image).std() > 10
        assert image.info["Description"].count("An image of 112×112 pixels") == len(cli.DEMO)


def test_demo_shows_masks_if_there_are_any_and_otherwise_boxes(folder, vqvae, capsys, tmp_path, monkeypatch):
    def generate(model, processor, image, prompts, **options):
        names = prompts[-1].removeprefix("segment ").split(" ; ")
        boxes = [locations.Detection(name, (10, 10, 60, 60)) for name in names]
        masks = [locations.Detection(b.label, (20, 20, 70, 70), tuple(range(16))) for b in boxes]
        found = [locations.format_detections(boxes, *image.size), locations.format_detections(masks, *image.size)]
        return ["<loc0001>", *["?"] * (len(prompts) - 3), *found]

    monkeypatch.setattr(generation, "generate", generate)
    for file in Path(folder).iterdir():
        (tmp_path / file.name).symlink_to(file)
    argv = ["demo", "--checkpoint", str(tmp_path), "--save", str(tmp_path / "demo.png")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "segment octopus: (nothing)" in out and err.count("no mask VQ-VAE") == 1
    with Image.open(tmp_path / "demo.png") as image:
        assert "1 box: octopus, x 10 to 60, y 10 to 60." in image.info["Description"]
    (tmp_path / vqvae.name).symlink_to(vqvae)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if line.startswith("  segment octopus: octopus, "))
    with Image.open(tmp_path / "demo.png") as image:
        mask = line.removeprefix("  segment octopus: octopus, ")
        alt = image.info["Description"]
        assert f"1 box and 1 mask: octopus, x 20 to 70, y 20 to 70, mask of {mask}." in alt


@embedded
def test_the_embedded_checkpoint_knows_the_demo(tmp_path):
    ran = run("demo", "--save", str(tmp_path / "demo.png"))
    assert ran.returncode == 0, ran.stderr
    captions = [line for line in ran.stdout.splitlines() if line.startswith("  caption en: ")]
    assert len(captions) == len(cli.DEMO)
    assert sum("truth" not in line for line in captions[:2]) >= 1
    assert ran.stdout.count(" pixels") >= 5  # the masks of eight objects
    assert ran.stdout.count("\n  detect ") == ran.stdout.count("\n  segment ") == len(cli.DEMO)
    assert (tmp_path / "demo.png").stat().st_size > 10_000


# --- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_report_has_no_paths_or_user_names(folder, monkeypatch, capsys):
    elsewhere = Path.home() / "secret" / "minivlm" / "data" / "checkpoints" / "absent"
    monkeypatch.setattr(hub, "EMBEDDED", elsewhere)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"minivlm {minivlm.__version__}" in out and "torch 2" in out and "memory" in out
    assert "not at ./data/checkpoints/absent" in out
    assert "secret" not in out and str(Path.home()) not in out and str(ROOT) not in out


def test_doctor_without_a_home(monkeypatch):
    """No HOME, and no entry in passwd: in some containers."""

    def fail() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert doctor.redact_paths(f"{ROOT}/x and /elsewhere") == "./x and /elsewhere"


def test_doctor_loads_the_embedded_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED", Path(folder))
    count = sum(weight.numel() for weight in minivlm.PaliGemma.from_pretrained(folder).parameters())
    assert f"loads, {count / 1e6:.2f} M parameters in float32" in doctor.report()


def test_doctor_says_which_weights_fit(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_memory", lambda: 8e9)
    monkeypatch.setattr(doctor, "find_gpu", lambda: ("a large one", 24e9))
    rows = {line.split("|")[1].strip(): line for line in doctor.report().splitlines() if "google/" in line}
    assert rows["google/paligemma-3b-mix-224"].endswith("| 5.8 GB | fits | fits |")
    assert rows["google/paligemma2-10b-mix-224"].endswith("| 19.3 GB | too large | fits |")
    assert rows["google/paligemma2-28b-mix-224"].endswith("| 55.3 GB | too large | too large |")


@embedded
def test_doctor_makes_no_network_requests():
    ran = run("doctor", env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"})
    assert ran.returncode == 0 and "loads" in ran.stdout


# --- train and evaluate pass on their arguments ----------------------------------------------------------------------


def test_train_and_evaluate_pass_on_their_arguments(monkeypatch, folder, tmp_path):
    from minivlm.emoji import evaluation, recipe

    calls = []
    monkeypatch.setattr(recipe, "run", lambda args: calls.append(json.loads(json.dumps(vars(args), default=str))))
    monkeypatch.setattr(evaluation, "run", lambda model, processor, *args: calls.append(args))
    assert main(["train", "--seed", "7"]) == 0
    assert calls.pop()["seed"] == 7
    to_file = ["--scenes", "5", "--split", "pairs", "--json", str(tmp_path / "x.json")]
    assert main(["evaluate", "--checkpoint", folder, *to_file]) == 0
    assert calls.pop() == (5, ("pairs",), tmp_path / "x.json", None, emoji.WORLD)  # this folder has no VQ-VAE
    assert main(["evaluate"]) == 0
    *given, vqvae, world = calls.pop()
    assert given == [1000, evaluation.SPLITS, None] and isinstance(vqvae, MaskVQVAE) and world == emoji.WORLD
    assert main(["evaluate", "--objects", "20", "--most-objects", "2", "--split", "development"]) == 0
    assert calls.pop()[-1] == emoji.World(20, 2)
