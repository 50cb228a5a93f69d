"""With a screen reader, a keyboard, a phone or a dark theme: exported pages, JupyterLab, Markdown.

axe-core, which checks pages for accessibility, comes with axe-playwright-python; its tests are skipped without it.
"""

import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import nbformat
import pytest
from browser import PATIENCE, chromium, jupyterlab, notebook_with, quiet_page
from nbconvert import HTMLExporter, MarkdownExporter
from PIL import Image
from test_notebooks import SOURCES, committed

from minivlm.course import exercises
from minivlm.course.grading.grader import write_results
from minivlm.course.grading.report import Mark, Report
from minivlm.course.viz import draw_boxes, explore, lines, trace
from minivlm.locations import Detection

WORKSHEETS = Path(__file__).resolve().parents[1] / "docs" / "worksheets.html"
TEMPLATES = ("lab", "classic")
NOTHING = {f"{name}_url": "data:text/javascript," for name in ("jquery", "require_js", "mathjax")}
NOTHING["mermaid_js_url"] = "data:text/javascript,export default { initialize() {} }"  # a module
WIDTHS = {"a phone": 390, "a tablet": 800, "a desk": 1280}
# nbconvert's own style sheets: the colors of prompts, code, and links in striped tables, and links without underlines.
NOT_OURS = [".jp-InputPrompt", ".jp-OutputPrompt", ".prompt", ".highlight", ".rendered_html td a"]
AXE = """async (excluded) => (await axe.run(
    { exclude: excluded.map((selector) => [selector]) },
    { resultTypes: ["violations"], rules: { "link-in-text-block": { enabled: false } } },
)).violations.filter(({ impact }) => ["serious", "critical"].includes(impact))
    .map(({ id, nodes }) => `${id}, ${nodes.length}×: ${nodes[0].html.slice(0, 200)}`)"""
BOXES = draw_boxes(Image.new("RGB", (112, 112), "gray"), [Detection("cat", (20, 20, 90, 90))])


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def axe() -> str:
    pytest.importorskip("axe_playwright_python", reason="no axe-core: pip install axe-playwright-python")
    return (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


def page_of(notebook, template: str, theme: str = "light") -> str:
    """The notebook as nbconvert exports it, with empty scripts instead of those that it would link to."""
    return HTMLExporter(template_name=template, theme=theme, **NOTHING).from_notebook_node(notebook)[0]


class Tags(HTMLParser):
    """The attributes of all images of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.images: list[dict] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))


def described(page: str) -> list[str]:
    """The alt texts of all images of a page, which must say something."""
    alts = [image.get("alt") or "" for image in Tags(page).images]
    assert all(len(alt) > 10 and "No description" not in alt for alt in alts), alts
    return alts


# --- alt text -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stem", SOURCES)
def test_alt_text_reaches_the_reader_of_pages_and_markdown(stem):
    notebook = committed(stem, "learner")
    figures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert figures
    markdown, _ = MarkdownExporter().from_notebook_node(notebook)
    assert not re.search(r"!\[(png|jpeg|svg|\s*)\]", markdown)
    for page in (*(page_of(notebook, template) for template in TEMPLATES), markdown):
        assert len(described(page)) >= len(figures)


@pytest.mark.browser
def test_in_jupyterlab_figures_have_alt_text_and_are_sharp_trusted_or_not(browser, tmp_path):
    """A notebook from elsewhere is not trusted, and JupyterLab sanitizes its HTML. After a run, it is trusted."""
    curve = {"loss": ([1, 2, 3], [3, 2, 1])}
    source = f"from minivlm.course.viz import lines\nlines({curve}, 'Loss, again', 'step', 'nats')"
    notebook = notebook_with(source, lines(curve, "Loss, stored", "step", "nats"))
    notebook.cells.append(notebook_with("1", BOXES).cells[0])
    nbformat.write(notebook, tmp_path / "figures.ipynb")
    with jupyterlab(tmp_path) as (url, token):
        allowed = (url, url.replace("http", "ws", 1), "data:", "blob:", "about:")
        with quiet_page(browser, allowed, viewport={"width": 1400, "height": 1100}) as page:
            page.set_default_timeout(3 * PATIENCE)
            page.goto(f"{url}/lab/tree/figures.ipynb?token={token}")
            for title in ("Loss, stored", "Loss, again"):
                image = page.locator(".jp-OutputArea-output").get_by_role("img", name=f"{title}. A chart of nats")
                if title == "Loss, again":
                    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
                    page.locator(".jp-Notebook .jp-InputArea-editor").first.click()
                    page.locator(".jp-Notebook .cm-content:focus").press("Shift+Enter")
                image.wait_for()
                assert image.bounding_box()["width"] == 800
                assert image.evaluate("(img) => img.naturalWidth") == 1600
                assert page.locator(".jp-OutputArea-output").get_by_role("img", name=BOXES.alt).count() == 1


# --- light and dark, narrow and wide ------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_figure_fits_the_page_and_is_an_opaque_card(browser, tmp_path, theme, width):
    (tmp_path / "page.html").write_text(page_of(notebook_with("", BOXES), "lab", theme), encoding="utf-8")
    with quiet_page(browser, viewport={"width": width, "height": 900}, device_scale_factor=2) as page:
        page.goto((tmp_path / "page.html").as_uri())
        image = page.get_by_role("img", name=BOXES.alt)
        box = image.bounding_box()
        assert 0 <= box["x"] and box["x"] + box["width"] <= width
        assert box["width"] == box["height"] and box["width"] >= min(448, width - 130)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert image.evaluate("(img) => getComputedStyle(img).backgroundColor") == "rgb(255, 255, 255)"
        assert image.evaluate("(img) => img.naturalWidth") >= 2 * box["width"]


# --- keyboard -----------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_keyboard_focus_survives_predict_and_reveal(browser, tmp_path):
    explore().save_html(tmp_path / "explorer.html")
    inner = "document.activeElement.shadowRoot.activeElement"
    focused = f"{inner}?.dataset.do ?? {inner}.className"
    with quiet_page(browser, viewport={"width": 940, "height": 1000}) as page:
        page.goto((tmp_path / "explorer.html").as_uri())
        page.get_by_role("button", name="Predict a row").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == "grid"  # where the learner marks the row with the arrow keys
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Reveal").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == "next"
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == "grid"
        page.get_by_role("button", name="Back to the mask").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == "predict"
        page.locator(".grid").focus()
        for key in ("ArrowRight", "Enter"):
            page.keyboard.press(key)
        page.get_by_role("button", name="Remove pin 1").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(focused) == "grid"


# --- axe ----------------------------------------------------------------------------------------------------------


def run_axe(page, axe: str) -> list[str]:
    """What axe calls serious or critical on a page and in its frames."""
    for frame in page.frames:
        frame.evaluate(axe)
    return page.evaluate(AXE, NOT_OURS)


@pytest.mark.browser
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("stem", SOURCES)
def test_axe_finds_nothing_serious(browser, axe, tmp_path, stem, template):
    (tmp_path / "page.html").write_text(page_of(committed(stem, "learner"), template), encoding="utf-8")
    # on a phone, the classic template has frames that scroll but that the keyboard cannot reach
    for width in (WIDTHS["a desk"], WIDTHS["a phone"])[: 1 if template == "classic" else 2]:
        with quiet_page(browser, viewport={"width": width, "height": 900}) as page:
            page.goto((tmp_path / "page.html").as_uri())
            for frame in page.frames[1:]:
                frame.wait_for_selector("svg")
            found = run_axe(page, axe)
            assert not found, f"at {width} px: {found}"


@pytest.mark.browser
@pytest.mark.parametrize("talker", [1], indirect=True, ids=["PaliGemma 1"])
def test_axe_finds_nothing_serious_in_a_dark_trace(browser, axe, talker, tiny_processor, tmp_path):
    gray, white = (
        trace(talker, tiny_processor, Image.new("RGB", (12, 12), c), "caption en") for c in ("gray", "white")
    )
    for shown in (gray, gray.diff(white)):
        shown.save_html(tmp_path / "page.html")
        with quiet_page(browser, viewport={"width": WIDTHS["a phone"], "height": 900}, color_scheme="dark") as page:
            page.goto((tmp_path / "page.html").as_uri())
            page.locator(".pane .cells").first.focus()
            page.keyboard.press("ArrowRight")
            assert not run_axe(page, axe)
            assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS["a phone"]


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_explorer(browser, axe, tmp_path, theme):
    explore(mask=lambda token_type_ids: token_type_ids, compare="causal").save_html(tmp_path / "explorer.html")
    with quiet_page(browser, color_scheme=theme, viewport={"width": WIDTHS["a phone"], "height": 900}) as page:
        page.goto((tmp_path / "explorer.html").as_uri())
        page.wait_for_selector(".grid svg")
        assert run_axe(page, axe) == []


@pytest.mark.browser
def test_axe_finds_what_is_wrong(browser, axe):
    with quiet_page(browser) as page:
        image = '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">'
        page.set_content(f'<html lang="en"><title>t</title><main><h1>h</h1>{image}</main></html>')
        assert ["image-alt, 1×" in line for line in run_axe(page, axe)] == [True]


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024])
def test_the_grader_s_pages_fit_a_phone_and_axe_finds_nothing_in_them(browser, axe, tmp_path, theme, width):
    mistakes = {e.name: e.mistakes[0] for e in exercises.in_chapter("05") + exercises.in_chapter("07")}
    marks = {name: Mark(0.5, f"not yet: it {m.name}.", m.name, (m.hint,)) for name, m in mistakes.items()}
    report = Report({"05", "07"}, marks, ["cell 3 fails"], {"05"}, ["05.ipynb changed too late."])
    write_results(tmp_path / "grades.csv", None, {"x" * 80: report}, ["dan.zip was not graded."], "")
    names = sorted((tmp_path / "grades.pages").iterdir())
    assert len(names) == 2
    for path in (*names, WORKSHEETS):
        with quiet_page(browser, color_scheme=theme, viewport={"width": width, "height": 800}) as page:
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert run_axe(page, axe) == []
