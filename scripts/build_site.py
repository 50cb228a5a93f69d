"""Build the course as a static site: every chapter and lab from its executed notebook, the documents and the API.

    python scripts/build_site.py                  # build/site
    python scripts/build_site.py --out /tmp/site

Sphinx reads a folder that is laid out like the repository, so links between documents keep working. A link to a file
that has no page goes to the repository, whose address ``pyproject.toml`` declares. Nothing is executed and nothing is
loaded from the network, neither here nor by the pages.
"""

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from minivlm import hub
from minivlm.course.chapters import CHAPTERS, Chapter

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "docs" / "site"
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
DATA_URI = re.compile(r'(<img[^>]*? src=")data:image/(png|webp|jpeg|gif);base64,([\w+/=]+)"')
KNOW_FIRST = re.compile(r"^\| know first \| (.*) \|$", re.MULTILINE)
PAGES = {  # the sections of the site, and the documents in each; those that match nothing are left out
    "docs": ("Teaching", ["docs/teaching.md", "docs/jupyterhub.md"]),
    "measured": ("Measured", ["data/checkpoints/*/README.md", "benchmarks/README.md", "docs/families.md"]),
    "package": (
        "The package",
        ["docs/architecture.md", "CONTRIBUTING.md", "data/README.md", "docs/upstream-*.md", "CHANGELOG.md"],
    ),
}
AS_IS = ["docs/worksheets.html"]  # pages of their own, copied
API = {
    "The model": "minivlm/*.py",
    "Training": "minivlm/training/*.py",
    "Emoji scenes": "minivlm/emoji/*.py",
    "Other families": "minivlm/families/*.py",
    "Figures": "minivlm/course/viz/*.py",
    "Exercises": "minivlm/course/exercises/__init__.py",
}


def build(out: Path) -> None:
    """Write the site. An earlier one is replaced when the new one is complete.

    Raises:
        ValueError: If Sphinx is not installed, finds a fault, or ``out`` is a folder with something else in it.
    """
    if missing := [name for name in ("sphinx", "myst_nb", "pydata_sphinx_theme") if not importlib.util.find_spec(name)]:
        raise ValueError(
            f'{missing[0]} is not installed: run `make site`, or pip install -c constraints.txt -e ".[site]".'
        )
    if out.exists() and any(out.iterdir()) and not (out / "searchindex.js").is_file():
        raise ValueError(f"{out} contains something other than a site: choose another folder.")
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "source", Path(folder) / "site"
        write_sources(source)
        options = ["-c", str(source), "--jobs", str(os.cpu_count()), "--fail-on-warning", "--keep-going", "--quiet"]
        if build_main([*options, str(source), str(made)]):
            raise ValueError("Sphinx found the faults above; the site was not written.")
        for unneeded in (".doctrees", ".buildinfo", "objects.inv", "_sources"):
            remove(made / unneeded)
        remove(out)
        shutil.copytree(made, out)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def write_sources(source: Path) -> None:
    """Everything that Sphinx reads."""
    shutil.copytree(SETTINGS, source, ignore=shutil.ignore_patterns("__pycache__"))
    extra = source / "_extra"
    for name in AS_IS:
        copy(ROOT / name, extra / name)
    documents = {key: [path for pattern in patterns for path in find(pattern)] for key, (_, patterns) in PAGES.items()}
    pages = {path for paths in documents.values() for path in paths} | set(notebooks())
    for path in pages:
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            target.write_text(notebook_page(path, pages, source), encoding="utf-8")
        else:
            target.write_text(with_links(path.read_text(encoding="utf-8"), path, pages, source), encoding="utf-8")
    write_sections(source, documents)
    write_start_page(source, extra)


def find(pattern: str) -> list[Path]:
    return sorted(ROOT.glob(pattern))


def notebooks() -> list[Path]:
    """Of all chapters and labs, the learner's and the solved ones."""
    return [
        path for folder in ("", "labs/", "solutions/", "solutions/labs/") for path in find(f"notebooks/{folder}*.ipynb")
    ]


def copy(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


# --- pages ----------------------------------------------------------------------------------------------------------


def with_links(text: str, path: Path, pages: set[Path], source: Path) -> str:
    """The Markdown of a document, whose links to files without a page lead to the repository. Images are copied."""

    def replace(found: re.Match) -> str:
        is_image, label, link = found.groups()
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(path.parent / file))
        if not file or ":" in file or not target.is_relative_to(ROOT) or not target.exists():
            return found[0]
        name = target.relative_to(ROOT).as_posix()
        if is_image:
            copy(target, source / name)
            return found[0]
        if name in AS_IS:
            return f'<a href="{link}">{label}</a>'  # Sphinx would take it for a download
        if name == "README.md":
            home = posixpath.relpath("index.md", path.parent.relative_to(ROOT).as_posix())
            return f"[{label}]({home})"
        if target in pages:
            return found[0]
        kind = "tree" if target.is_dir() else "blob"
        return f"[{label}]({REPOSITORY}/{kind}/main/{name}{'#' * bool(anchor)}{anchor})"

    return LINK.sub(replace, text)


def notebook_page(path: Path, pages: set[Path], source: Path) -> str:
    """The notebook as Sphinx should read it: images are files, which the two versions of a chapter share."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    folder = path.parent.relative_to(ROOT)
    figures = posixpath.relpath("_static/figures", folder.as_posix())

    def to_file(found: re.Match) -> str:
        image = base64.b64decode(found[3])
        name = f"{hashlib.sha256(image).hexdigest()[:16]}.{found[2]}"
        (source / "_static" / "figures").mkdir(exist_ok=True)
        (source / "_static" / "figures" / name).write_bytes(image)
        return f'{found[1]}{figures}/{name}"'

    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = with_links("".join(cell["source"]), path, pages, source)
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output["data"] = {"text/html": DATA_URI.sub(to_file, "".join(output["data"]["text/html"]))}
    first = notebook["cells"][0]
    if "solutions" in folder.parts:
        notebook["metadata"]["nosearch"] = True
        learners = posixpath.relpath(folder.as_posix().replace("/solutions", ""), folder.as_posix())
        first["source"] += f"\n\nThis is the solved notebook. [Back to the exercises]({learners}/{path.name})"
    else:
        solved = posixpath.relpath(folder.as_posix().replace("notebooks", "notebooks/solutions", 1), folder.as_posix())
        file = f"{REPOSITORY}/blob/main/{path.relative_to(ROOT).as_posix()}"
        first["source"] += f"\n\n[The notebook]({file}) · [solved]({solved}/{path.name})"
    return json.dumps(notebook)


def card_of(chapter: Chapter) -> tuple[Path, str]:
    """The notebook of a chapter, and what its card says one should know first."""
    (path,) = [
        path for path in notebooks() if path.name.startswith(f"{chapter.number}_") and "solutions" not in path.parts
    ]
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    return path, KNOW_FIRST.search(first)[1]


def hours(minutes: int) -> str:
    """To the quarter: 100 → "1¾ h"."""
    whole, quarters = divmod(max(round(minutes / 15), 1), 4)
    return f"{whole or ''}{('', '¼', '½', '¾')[quarters]} h"


# --- the start page and the sections --------------------------------------------------------------------------------


def chapter_table(chapters: list[Chapter], folder: str) -> str:
    """Chapter, question, what to know first and hours, with links from a page in ``folder``."""
    rows = ["| chapter | its question | know first | time |", "|---|---|---|---|"]
    for chapter in chapters:
        path, known = card_of(chapter)
        link = posixpath.relpath(path.relative_to(ROOT).as_posix(), folder)
        rows.append(
            f"| [{chapter.number} {chapter.title}]({link}) | {chapter.question} | {known} | {hours(chapter.minutes)} |"
        )
    return "\n".join(rows)


def parted() -> tuple[list[Chapter], list[Chapter]]:
    """The chapters and the labs."""
    labs = [chapter for chapter in CHAPTERS.values() if chapter.number.startswith("L")]
    return [chapter for chapter in CHAPTERS.values() if chapter not in labs], labs


def toctree(entries: list[str], hidden: bool = True) -> str:
    return "\n".join(["```{toctree}", *[":hidden:"] * hidden, *[":maxdepth: 1"] * (not hidden), "", *entries, "```"])


def write_sections(source: Path, documents: dict[str, list[Path]]) -> None:
    """A page for each section: chapters, labs, solutions, those of ``PAGES``, and the API."""
    chapters, labs = parted()
    for name, title, part in (("notebooks", "Chapters", chapters), ("notebooks/labs", "Labs", labs)):
        names = [f"/{card_of(chapter)[0].relative_to(ROOT).with_suffix('').as_posix()}" for chapter in part]
        write(source / name / "index.md", f"# {title}\n\n{chapter_table(part, name)}\n\n{toctree(names)}")
    solved = [path for path in notebooks() if "solutions" in path.parts]
    names = [f"/{path.relative_to(ROOT).with_suffix('').as_posix()}" for path in solved]
    text = "---\nnosearch: true\n---\n# Solutions\n\nThe same notebooks, solved. Try first: a check names your mistake."
    write(source / "notebooks" / "solutions" / "index.md", f"{text}\n\n{toctree(names, hidden=False)}")
    for key, (title, _) in PAGES.items():
        names = [f"/{path.relative_to(ROOT).with_suffix('').as_posix()}" for path in documents[key]]
        names += ["/api/index"] * (key == "package")
        sheets = "\n\n[Worksheets](worksheets.html) to print" if key == "docs" else ""
        sheets = re.sub(LINK, r'<a href="\3">\2</a>', sheets)
        write(source / key / "index.md", f"# {title}\n\n{toctree(names, hidden=False)}{sheets}")
    write_api(source / "api")


def write_api(folder: Path) -> None:
    """One page per module, from its docstrings."""
    text = (
        "# API\n\nFrom the docstrings. Names in capitals in a shape are dimensions: `B` batch, `T` tokens, `D` width."
    )
    for title, pattern in API.items():
        modules = [module_of(path) for path in find(pattern) if path.name != "__main__.py"]
        for module in modules:
            body = f"```{{eval-rst}}\n.. automodule:: {module}\n   :ignore-module-all:\n```"
            write(folder / f"{module}.md", f"# {module}\n\n{body}")
        text += f"\n\n## {title}\n\n{toctree(modules, hidden=False)}"
    write(folder / "index.md", text)


def module_of(path: Path) -> str:
    """``minivlm/emoji/__init__.py`` → "minivlm.emoji"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def write_start_page(source: Path, extra: Path) -> None:
    """The start page, with the live model in a frame once there is one."""
    live = ""
    if (ROOT / "web" / "index.html").is_file():
        shutil.copytree(ROOT / "web", extra / "web")
        shutil.copytree(
            hub.EMBEDDED, extra / hub.EMBEDDED.relative_to(ROOT), ignore=shutil.ignore_patterns("*.md", "*.png")
        )
        live = '<iframe class="live" src="web/index.html?embed" title="PaliGemma, live"></iframe>'
    else:
        copy(ROOT / "docs" / "demo.png", source / "demo.png")
        live = (
            "![Four emoji scenes with the boxes and masks that the model found, and its caption and answers](demo.png)"
        )
    chapters, labs = parted()
    text = (SETTINGS / "index.md").read_text(encoding="utf-8")
    facts = {
        "live": live,
        "chapters": chapter_table(chapters, "."),
        "labs": chapter_table(labs, "."),
        "hours": str(round(sum(chapter.minutes for chapter in chapters) / 60)),
        "number": str(len(chapters)),
        "repository": REPOSITORY,
    }
    for name, fact in facts.items():
        text = text.replace(f"{{{{{name}}}}}", fact)
    write(source / "index.md", text)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "site", metavar="FOLDER", help="default: build/site"
    )
    args = parser.parse_args(argv)
    try:
        build(args.out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"Wrote {size / 1e6:.0f} MB. To see it: python -m http.server --directory {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
