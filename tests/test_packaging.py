"""What pip installs: a wheel works from any folder without the repository, and the source archive can rebuild it."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from minivlm import hub

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The folder into which the wheel is installed; pure Python wheels are unpacked."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(archives[0]) as wheel:
        wheel.extractall(folder)
    return folder


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """Python's output in another folder, where ``minivlm`` is the installed one."""
    env = os.environ | {"PYTHONPATH": str(installed), "MINIVLM_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-P", *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_installed_wheel_captions_an_image(installed, tmp_path):
    code = """if True:
        import minivlm
        from minivlm import emoji
        model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
        scene = emoji.make_scene(0, "validation")
        caption = minivlm.generate(model, processor, scene.image, "caption en")
        print(minivlm.__file__, emoji.same_caption(caption, scene.captions["caption"][0]))
    """
    where, right = run(installed, tmp_path, "-c", code).split()
    assert Path(where).is_relative_to(installed) and right == "True"


def test_an_installed_wheel_has_the_course_and_the_recipe(installed, tmp_path):
    code = """if True:
        from minivlm.course import exercises
        from minivlm.course.viz import explorer
        print(len(explorer.module()) > 10_000, len(exercises.EXERCISES) > 40)
    """
    assert run(installed, tmp_path, "-c", code).split() == ["True", "True"]
    assert "--seed" in run(installed, tmp_path, "-m", "minivlm", "train", "--help")


def test_the_wheel_holds_all_data_and_scripts_and_nothing_else(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    data = {f"minivlm/{path.relative_to(ROOT)}" for path in hub.DATA.rglob("*") if path.is_file()}
    code = {
        str(path.relative_to(ROOT)) for kind in ("py", "js", "css") for path in (ROOT / "minivlm").rglob(f"*.{kind}")
    }
    assert names == data | code


def test_the_source_archive_has_tests_and_notebooks(archives):
    with tarfile.open(archives[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"tests/conftest.py", "notebooks/source/05_prefix_lm_mask.py", "data/emoji/index.json", "README.md"} <= names
