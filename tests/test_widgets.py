"""Sliders above figures: each control changes the figure, also in JupyterLab, and without a kernel the figure stays."""

import base64
import html
import io
import re
from datetime import datetime

import nbformat
import numpy as np
import pytest
from browser import PATIENCE, chromium, exported, jupyterlab, notebook_with, quiet_page
from ipywidgets.widgets.widget import _instances
from PIL import Image

from minivlm import PaliGemma, Processor, emoji
from minivlm.course import viz
from minivlm.course.viz import play
from minivlm.course.viz.widgets import WIDGET

SCENE = emoji.make_scene(5, "validation").image


def bars(height=10, temperature=1.0, color="blue", mirrored=False, title="Bars", own=None):
    """A figure whose alt text has all the values. At height 3 it fails."""
    values = [1.0, 2.0, 3.0 / (height - 3)]
    size = "none" if own is None else own.size
    name = f"{title} {height} {temperature:.3g} {color} {mirrored} {size}"
    return viz.lines({"bars": (values, values)}, name, "x", "y")


ALL = {"height": (0, 20), "temperature": (0.1, 100, "log"), "color": ["blue", "green"], "mirrored": bool, "title": str}


def controls_of(sliders) -> dict:
    """The widgets by their labels."""
    return {control.description: control for control in sliders.widget.children[0].children}


def alt(sliders) -> str:
    return re.search('<img alt="([^"]*)"', sliders.widget.children[1].value)[1]


def problem(sliders) -> str:
    return html.unescape(re.sub("<.*?>", "", sliders.widget.children[2].value))


# --- the helper ---------------------------------------------------------------------------------------------------


def test_the_mime_bundle_has_the_widget_and_the_static_figure():
    sliders = viz.sliders(bars, **ALL)
    data, metadata = sliders._repr_mimebundle_()
    assert {WIDGET, "text/html", "image/png", "text/plain"} <= set(data)
    assert data["text/plain"] == metadata["image/png"]["alt"] == sliders.figure.alt
    assert f'alt="{sliders.figure.alt}"' in data["text/html"] and "<script" not in data["text/html"]
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width >= 800
    assert data[WIDGET]["model_id"] == sliders.widget.model_id


def test_no_widget_exists_before_it_is_displayed():
    before = set(_instances)
    sliders = viz.sliders(bars, height=(0, 20))
    assert set(_instances) == before
    sliders._repr_mimebundle_()
    assert sliders.widget.model_id in set(_instances) - before


@pytest.mark.parametrize(
    ("label", "value", "words"),
    [
        ("height", 7, "Bars 7 1"),
        ("temperature", 10.0, "Bars 10 10 blue"),
        ("color", "green", "1 green"),
        ("mirrored", True, "blue True"),
        ("title", "Columns", "Columns 10"),
    ],
)
def test_every_control_changes_the_figure(label, value, words):
    sliders = viz.sliders(bars, **ALL)
    first = alt(sliders)
    controls_of(sliders)[label].value = value
    assert words in alt(sliders) != first


def test_controls_are_labeled_and_wait_for_the_release():
    controls = controls_of(viz.sliders(lambda key_position=5: bars(key_position), key_position=(0, 20)))
    (slider,) = controls.values()
    assert slider.description == "key position" and not slider.continuous_update
    assert (slider.min, slider.max, slider.step, slider.value) == (0, 20, 1, 5)


def test_a_menu_can_have_names_and_a_slider_steps():
    sliders = viz.sliders(bars, color={"sky": "blue", "grass": "green"}, height=(0, 20, 5), temperature=(0, 2, 0.5))
    controls = controls_of(sliders)
    assert [options[0] for options in controls["color"].options.items()] == ["sky", "grass"]
    assert controls["height"].step == 5 and controls["temperature"].step == 0.5


def test_an_error_is_one_sentence_and_the_last_figure_stays():
    sliders = viz.sliders(bars, height=(0, 20))
    slider, first = controls_of(sliders)["height"], alt(sliders)
    slider.value = 3
    assert alt(sliders) == first and problem(sliders) == "ZeroDivisionError: float division by zero"
    slider.value = 4
    assert alt(sliders) != first and problem(sliders) == ""


def test_html_in_an_error_is_text():
    def angry(n=0):
        if n:
            raise ValueError("<b>no</b>\nand more")
        return bars()

    sliders = viz.sliders(angry, n=(0, 1))
    controls_of(sliders)["n"].value = 1
    assert "&lt;b&gt;no&lt;/b&gt;</b></p>" in sliders.widget.children[2].value


def test_an_upload_is_an_image_and_a_bad_file_one_sentence():
    sliders = viz.sliders(bars, own=Image.Image)
    upload = controls_of(sliders)["own"]
    first = alt(sliders)
    upload.value = [file("broken.png", b"not an image")]
    assert alt(sliders) == first
    assert problem(sliders).startswith("The file 'broken.png' cannot be read as an image")
    png = io.BytesIO()
    Image.new("RGBA", (30, 20)).save(png, "PNG")
    upload.value = [file("../../fine.png", png.getvalue())]
    assert "(30, 20)" in alt(sliders) and problem(sliders) == ""


def file(name: str, content: bytes) -> dict:
    """What FileUpload reports."""
    how = {"type": "", "last_modified": datetime.now()}
    return {"name": name, "size": len(content), "content": memoryview(content), **how}


@pytest.mark.parametrize(
    ("controls", "words"),
    [
        ({}, "at least one control"),
        ({"width": (0, 1)}, "parameter 'width' with a default"),
        ({"height": (20, 30)}, "starts at 10, outside 20 to 30"),
        ({"height": (20, 0)}, "must be (low, high)"),
        ({"height": (0,)}, "must be (low, high)"),
        ({"temperature": (0, 10, "log")}, "must be (low, high)"),
        ({"color": ["red"]}, "not among its choices, ['red']"),
        ({"color": []}, "not among its choices, []"),
        ({"height": int}, "a range, a list, bool, str or PIL.Image.Image"),
        ({"height": 3}, "a range, a list"),
    ],
)
def test_wrong_controls_raise_an_error(controls, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        viz.sliders(bars, **controls)


def test_a_wrong_figure_function_fails_where_it_is_called():
    with pytest.raises(ValueError, match="must return a figure of viz, not a str"):
        viz.sliders(lambda n=1: "text", n=(0, 2))
    with pytest.raises(ZeroDivisionError):
        viz.sliders(lambda n=0: 1 / n, n=(0, 2))


# --- the playground -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def playground():
    return viz.playground(PaliGemma.from_pretrained(), Processor.from_pretrained())


def test_the_playground_shows_what_changed_last(playground):
    controls = controls_of(playground)
    truth = emoji.make_scene(0, "validation").captions["caption"][0]
    assert "caption en →" in alt(playground) and f"true caption: {truth}" in alt(playground)
    png = io.BytesIO()
    Image.fromarray(SCENE).resize((1200, 600)).save(png, "PNG")
    controls["your own image"].value = [file("own.png", png.getvalue())]
    assert "An image of 896×448 pixels" in alt(playground) and "true caption" not in alt(playground)
    controls["prompt"].value = "detect panda"
    assert "896×448" in alt(playground) and "detect panda →" in alt(playground)
    controls["seed"].value = 3
    assert "112×112" in alt(playground) and "true caption" in alt(playground)
    controls["objects"].value, controls["split"].value = 1, "pairs"
    assert problem(playground).startswith("A scene with a pair has at least two objects")


@pytest.mark.parametrize(("split", "objects"), [("validation", 1), ("artist", 4), ("pairs", 2)])
def test_the_number_of_objects_chooses_the_seeds(split, objects):
    scenes = [play.find_scene(seed, split, objects) for seed in range(5)]
    assert len({scene.seed for scene in scenes}) == 5
    assert all(len(emoji.planned_names(scene.seed, split)) == objects for scene in scenes)
    assert play.find_scene(7, split, play.ANY) == emoji.make_scene(7, split)


def test_masks_are_drawn_and_their_codes_shortened():
    codes = "".join(f"<seg{code:03d}>" for code in range(16))
    answer = f"<loc0100><loc0100><loc0600><loc0600>{codes} cat"
    vqvae = play.MaskVQVAE.from_pretrained()
    figure, lines = play.draw_answer(Image.fromarray(SCENE), "segment cat", answer, vqvae, "")
    assert "1 box and 1 mask: cat" in figure.alt
    assert lines == "segment cat → <loc0100><loc0100><loc0600><loc0600><seg000>…<seg015> cat"
    assert play.draw_answer(Image.fromarray(SCENE), "p", "", vqvae, "")[1] == "p → (nothing)"


# --- figures that the chapters move ---------------------------------------------------------------------------------


def test_shifting_both_tokens_turns_the_dials_and_keeps_the_score():
    q, k = np.random.default_rng(0).normal(size=(2, 8))
    near, far, other = (viz.rotated_pairs(q, k, *at) for at in ((5, 3), (105, 103), (6, 3)))
    score = [re.search(r"q·k = (\S+)\.", figure.alt)[1] for figure in (near, far, other)]
    assert score[0] == score[1] != score[2]
    assert near.image != far.image
    shares = re.findall(r"pair \d (−?)([\d.]+\d)", near.alt)
    total = sum(float(f"{'-' * bool(sign)}{value}") for sign, value in shares)
    assert abs(total - float(score[0].replace("−", "-"))) < 0.03


TEXTS = {"<bos>": "bos", "\n": "newline", "a": "suffix", " cat": "suffix", "<eos>": "eos"}
TOKENS = [viz.Token("<image>", "image")] * 49 + [viz.Token(text, kind) for text, kind in TEXTS.items()]


def test_a_decode_step_computes_one_token_and_reads_the_others():
    prefill, first, last = (viz.decode_step(TOKENS, 51, step).alt for step in range(3))
    assert "computed for 51 tokens, read from the cache for 0" in prefill and "next token is “a”" in prefill
    assert "computed for 1 token, read from the cache for 51. Without a cache: computed for 52" in first
    assert "next token is “<eos>”" in last and "␣cat" in last
    with pytest.raises(ValueError, match="from 0 .the prefill. to 2, not 3"):
        viz.decode_step(TOKENS, 51, 3)
    with pytest.raises(ValueError, match="too many to read"):
        viz.decode_step([viz.Token(str(i), "text") for i in range(30)], 3, 0)


def test_wrong_pairs_raise_an_error():
    for q, k in (([1, 2], [1, 2, 3, 4]), ([1, 2, 3], [1, 2, 3]), (np.ones(12), np.ones(12))):
        with pytest.raises(ValueError, match="the same even length up to 10"):
            viz.rotated_pairs(q, k, 0, 0)


def test_the_edge_that_a_convolution_drops():
    figure = viz.patch_grid(SCENE[:, :100], 16, drop_edge=True)
    assert "7×6" in figure.alt.replace("7 rows of 6", "7×6") and "numbered 0 to 41" in figure.alt
    assert "Dropped: 4 pixels on the right." in figure.alt
    assert "3 pixels on the right and 3 pixels at the bottom" in viz.patch_grid(SCENE[:99, :99], 16, drop_edge=True).alt
    assert "Dropped" not in viz.patch_grid(SCENE, 16, drop_edge=True).alt
    with pytest.raises(ValueError, match="cannot be cut"):
        viz.patch_grid(SCENE, 113, drop_edge=True)


def test_the_query_is_marked_and_named():
    on_image = viz.attention_on_image(SCENE, np.ones(49), query=10)
    assert "attends is in row 2, column 4" in on_image.alt
    assert on_image.image != viz.attention_on_image(SCENE, np.ones(49)).image
    weights = np.eye(54)[-3:]
    over_mask = viz.attention_over_mask(weights, np.ones((3, 54)), TOKENS, query=1)
    assert "query in row 2, “␣cat”, attends to" in over_mask.alt and "most to token 52, “␣cat”" in over_mask.alt
    assert over_mask.image != viz.attention_over_mask(weights, np.ones((3, 54)), TOKENS).image
    with pytest.raises(ValueError, match="from 0 to 48"):
        viz.attention_on_image(SCENE, np.ones(49), query=49)
    with pytest.raises(ValueError, match="from 0 to 2"):
        viz.attention_over_mask(weights, np.ones((3, 54)), TOKENS, query=3)


# --- in the browser -----------------------------------------------------------------------------------------------

CELL = """from minivlm.course import viz
def draw(n=4, kind="line"):
    if n == 6:
        raise ValueError("Six is too many.")
    return viz.lines({kind: ([0, n], [0, n])}, f"up to {n}, a {kind}", "x", "y")
viz.sliders(draw, n=(0, 9), kind=["line", "curve"])"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.mark.browser
def test_an_exported_page_shows_the_static_figure(browser, tmp_path):
    (tmp_path / "page.html").write_text(exported(viz.sliders(bars, height=(0, 20))), encoding="utf-8")
    with quiet_page(browser, java_script_enabled=False) as page:
        page.goto((tmp_path / "page.html").as_uri())
        image = page.get_by_role("img", name="Bars 10 1 blue")
        assert image.is_visible() and image.bounding_box()["width"] > 300
        assert "widget" not in page.locator("body").inner_text().lower()


@pytest.mark.browser
@pytest.mark.slow
def test_in_jupyterlab_mouse_and_keys_move_the_figure(browser, tmp_path):
    scope = {}
    exec(CELL.replace("\nviz.sliders", "\nshown = viz.sliders"), scope)
    notebook = notebook_with(CELL, scope["shown"])
    del notebook.cells[0].outputs[0].data[WIDGET]  # as in a saved notebook
    notebook.cells.append(nbformat.v4.new_code_cell("1 + 1"))
    nbformat.write(notebook, tmp_path / "sliders.ipynb")
    with jupyterlab(tmp_path) as (url, token):
        allowed = (url, url.replace("http", "ws", 1), "data:", "blob:", "about:")
        with quiet_page(browser, allowed, viewport={"width": 1400, "height": 1100}) as page:
            page.set_default_timeout(3 * PATIENCE)
            page.goto(f"{url}/lab/tree/sliders.ipynb?token={token}")
            page.locator(".jp-OutputArea-output img[alt^='up to 4, a line']").wait_for()  # untrusted, nothing has run
            assert page.locator(".widget-slider").count() == 0
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
            page.locator(".jp-Notebook .jp-InputArea-editor").first.click()
            page.locator(".jp-Notebook .cm-content:focus").press("Shift+Enter")
            handle = page.get_by_role("slider")
            handle.focus()
            handle.press("ArrowRight")
            page.locator(".widget-html img[alt^='up to 5, a line']").wait_for()
            handle.press("ArrowRight")
            page.get_by_role("alert").get_by_text("Six is too many.").wait_for()
            track = page.locator(".widget-slider .noUi-target").bounding_box()
            page.mouse.click(track["x"] + track["width"] - 2, track["y"] + track["height"] / 2)
            page.locator(".widget-html img[alt^='up to 9, a line']").wait_for()
            page.get_by_role("alert").get_by_text("Six is too many.").wait_for(state="detached")
            page.get_by_label("kind").select_option("curve")
            page.locator(".widget-html img[alt^='up to 9, a curve']").wait_for()
