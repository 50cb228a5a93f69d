"""A learner's own copy of the notebooks: what is copied, what is never overwritten, and JupyterLab on chapter 00."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import nbformat
import pytest
from browser import wait_for

from minivlm.__main__ import main
from minivlm.course import lab


def write(path, *cells: str, output: str = "") -> None:
    outputs = [nbformat.v4.new_output("stream", text=output)] if output else []
    code = [nbformat.v4.new_code_cell(text, id=f"c{i}", outputs=outputs) for i, text in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=code), path)


@pytest.fixture
def upstream(tmp_path):
    folder = tmp_path / "notebooks"
    for name in (lab.FIRST, "05_mask.ipynb", "labs/L0_masks.ipynb", "solutions/05_mask.ipynb"):
        write(folder / name, "stub", output="old")
    return folder


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.ipynb"))


def test_the_copy_has_the_chapters_and_labs_but_no_solutions(tmp_path, upstream):
    work = tmp_path / "work"
    assert lab.copy_notebooks(work, upstream) == []
    assert files(work) == [lab.FIRST, "05_mask.ipynb", "labs/L0_masks.ipynb"]
    assert all((work / name).read_bytes() == (upstream / name).read_bytes() for name in files(work))


def test_nothing_of_the_learners_is_overwritten(tmp_path, upstream):
    work, mine = tmp_path / "work", tmp_path / "work" / "05_mask.ipynb"
    lab.copy_notebooks(work, upstream)
    write(mine, "my solution")
    (work / "labs" / "L0_masks.ipynb").write_text("broken")
    write(work / "my notes.ipynb", "a note")
    before = {name: (work / name).read_bytes() for name in files(work)}
    assert lab.copy_notebooks(work, upstream) == []  # nothing has changed upstream
    write(upstream / "05_mask.ipynb", "stub", output="new")
    assert lab.copy_notebooks(work, upstream) == []  # only outputs have
    for version, name in (("a better stub", "05_mask.updated.ipynb"), ("the best stub", "05_mask.updated-2.ipynb")):
        write(upstream / "05_mask.ipynb", version)
        (told,) = lab.copy_notebooks(work, upstream)
        assert told.startswith("05_mask.ipynb has been updated") and told.endswith(f"{name}.")
        assert (work / name).read_bytes() == (upstream / "05_mask.ipynb").read_bytes()
        assert lab.copy_notebooks(work, upstream) == []  # said once
    write(upstream / "labs" / "L0_masks.ipynb", "a better stub")
    (told,) = lab.copy_notebooks(work, upstream)
    assert told.endswith("L0_masks.updated.ipynb.")
    assert {name: (work / name).read_bytes() for name in before} == before


def test_an_untouched_copy_is_updated_and_a_deleted_one_returns(tmp_path, upstream):
    work = tmp_path / "work"
    lab.copy_notebooks(work, upstream)
    write(upstream / "05_mask.ipynb", "a better stub")
    assert lab.copy_notebooks(work, upstream) == []
    (work / lab.FIRST).unlink()
    assert lab.copy_notebooks(work, upstream) == []
    assert all((work / name).read_bytes() == (upstream / name).read_bytes() for name in files(work))


def test_a_folder_that_was_filled_by_hand_is_kept(tmp_path, upstream):
    work = tmp_path / "work"
    write(work / "05_mask.ipynb", "my solution")
    before = (work / "05_mask.ipynb").read_bytes()
    assert lab.copy_notebooks(work, upstream) == [] and (work / "05_mask.ipynb").read_bytes() == before
    assert len(files(work)) == 3


def test_errors_are_one_sentence(tmp_path, upstream, capsys, monkeypatch):
    with pytest.raises(ValueError, match="run this command in a clone"):
        lab.copy_notebooks(tmp_path / "work", tmp_path / "nothing")
    with pytest.raises(ValueError, match="cannot be inside .*: choose another folder"):
        lab.copy_notebooks(upstream / "labs", upstream)
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "--copy", "--work", str(lab.NOTEBOOKS / "mine")]) == 2
    assert "choose another folder" in capsys.readouterr().err and not (lab.NOTEBOOKS / "mine").exists()


def test_links_between_the_notebooks_work_in_the_copy(tmp_path, capsys):
    assert main(["lab", "--copy", "--work", str(tmp_path)]) == 0
    assert f"begin with {tmp_path / lab.FIRST}" in capsys.readouterr().out
    found = 0
    for path in tmp_path.rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", text):
            assert (path.parent / target).resolve().is_file(), f"{path.name} links to {target}"
            assert (path.parent / target).resolve().is_relative_to(tmp_path)
            found += 1
    assert found > 15


@pytest.mark.slow
def test_jupyterlab_opens_on_chapter_00_of_the_copy(tmp_path):
    """As whoever runs the tests: in a container that is root, whom JupyterLab refuses without an option."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    homes = {f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    options = ["--no-browser", f"--port={port}", "--IdentityProvider.token=token", "--ServerApp.port_retries=0"]
    command = [sys.executable, "-m", "minivlm", "lab", "--work", str(tmp_path / "work"), "--", *options]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | homes, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/api/status?token=token", server)
            with urllib.request.urlopen(f"{url}/?token=token", timeout=60) as answer:
                assert answer.url.split("?")[0].endswith(f"/lab/tree/{lab.FIRST}")
            with urllib.request.urlopen(f"{url}/api/contents?token=token", timeout=60) as answer:
                names = {item["name"] for item in json.load(answer)["content"]}
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    assert {lab.FIRST, "08_inference.ipynb", "labs"} <= names and "solutions" not in names
    assert f"/lab/tree/{lab.FIRST}?token=" in (tmp_path / "log").read_text()  # what a terminal without a browser shows
