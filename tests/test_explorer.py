"""The mask explorer in Chromium: its masks against minivlm.masks, cell by cell, and everything a learner can do."""

import base64
import io
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict

import nbformat
import pytest
import torch
from browser import PATIENCE, chromium, exported, jupyterlab, notebook_with, quiet_page
from PIL import Image

from minivlm import masks
from minivlm.course.viz import Figure, explore
from minivlm.course.viz.explorer import LIMITS, MODES, WIDGET, Settings, explorer_mask, explorer_tokens, module

SIZES = {"image": (0, 1, 4, 9, 12, 13, 40), "prefix": (1, 2, 5), "suffix": (0, 1, 2, 7), "padding": (0, 1, 3, 13)}


def random_settings(seed: int) -> Settings:
    """Random settings. Every tenth has 256 image tokens."""
    rng = random.Random(seed)
    sizes = {name: rng.choice(choices) for name, choices in SIZES.items()}
    if seed % 10 == 0:
        sizes["image"] = 256
    call = rng.choice(["prefill", "decode"])
    sizes["suffix"] = max(sizes["suffix"], int(call == "decode"))
    window = rng.choice([1, 2, 3, 5, 8, sum(sizes.values()) - 1, sum(sizes.values()), 1000])
    mode = list(MODES)[seed % len(MODES)]
    return Settings(**sizes, side=rng.choice(["left", "right"]), window=max(1, window), mode=mode, call=call)


SETTINGS = [random_settings(seed) for seed in range(200)]


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser):
    with quiet_page(browser, viewport={"width": 940, "height": 1000}) as page:
        yield page


@pytest.fixture
def show(page, tmp_path):
    """Opens the explorer's own page."""

    def show(**how):
        path = tmp_path / "explorer.html"
        explore(**how).save_html(path)
        page.goto(path.as_uri())
        page.wait_for_selector(".grid svg")

    return show


def call_module(page, function: str, arguments: list):
    """Evaluates a JavaScript expression of the module ``m`` and an argument ``a``, for every argument."""
    script = """async ([source, arguments_]) => {
        const m = await import("data:text/javascript;charset=utf-8," + encodeURIComponent(source));
        return arguments_.map((a) => FUNCTION);
    }"""
    return page.evaluate(script.replace("FUNCTION", function), [module(), arguments])


def as_lines(mask: torch.Tensor) -> list[str]:
    return ["".join(map(str, row)) for row in mask.int().tolist()]


def sentence(page) -> str:
    return page.locator(".sentence").inner_text()


def hover(page, query: int | None = None, key: int | None = None) -> None:
    """Points at a query's label, at a key's label or, with both, at their cell."""
    if query is not None and key is not None:
        row = page.locator(f'[data-query="{query}"]').bounding_box()
        column = page.locator(f'[data-key="{key}"]').first.bounding_box()
        page.mouse.move(column["x"] + column["width"] / 2, row["y"] + row["height"] / 2)
        return
    name = f'[data-query="{query}"]' if key is None else f'[data-key="{key}"]'
    page.locator(name).first.hover()


def slide(page, name: str, value: int) -> None:
    page.get_by_role("slider", name=name, exact=True).fill(str(value))


def choose(page, name: str) -> None:
    page.get_by_role("radio", name=name, exact=True).check(force=True)  # the label covers it


# --- the masks ------------------------------------------------------------------------------------------------------


def test_masks_and_tokens_in_the_browser_equal_those_of_the_package(page):
    assert {(s.mode, s.side, s.call) for s in SETTINGS} == {
        (mode, side, call) for mode in MODES for side in ("left", "right") for call in ("prefill", "decode")
    }
    arguments = [asdict(settings) for settings in SETTINGS]
    theirs = call_module(page, "m.mask(a).map((row) => row.join(''))", arguments)
    for settings, table in zip(SETTINGS, theirs, strict=True):
        assert table == as_lines(explorer_mask(settings)), settings
    theirs = call_module(page, "m.tokens(a).map(({ label, kind }) => [label, kind])", arguments)
    for settings, tokens in zip(SETTINGS, theirs, strict=True):
        assert tokens == [[token.text, token.kind] for token in explorer_tokens(settings)], settings


def test_names_and_limits_in_the_browser_equal_those_of_the_package(page):
    names, limits = call_module(page, "[Object.entries(m.MODES), m.LIMITS]", [None])[0]
    assert {key: mode["name"] for key, mode in names} == MODES
    assert {key: tuple(limit) for key, limit in limits.items()} == LIMITS


def test_without_padding_the_modes_equal_the_masks_of_their_names():
    def of(mode, window=4):
        return explorer_mask(Settings(image=5, prefix=3, suffix=4, mode=mode, window=window))

    types = torch.tensor([[0] * 8 + [1] * 4])
    assert torch.equal(of("causal"), masks.causal_mask(12))
    assert torch.equal(of("bidirectional"), masks.bidirectional_mask(12))
    assert torch.equal(of("prefix-lm"), masks.prefix_lm_mask(types)[0])
    near = masks.sliding_window_mask(12, 4)
    near[:8, :8] = True
    assert torch.equal(of("sliding"), masks.prefix_lm_mask(types)[0] & near)
    assert torch.equal(of("sliding", window=12), of("prefix-lm"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_except_in_the_mode_with_the_bug(side):
    settings = {"image": 2, "prefix": 2, "suffix": 2, "padding": 2, "side": side}
    padding = torch.tensor([token.kind == "padding" for token in explorer_tokens(Settings(**settings))])
    for mode in set(MODES) - {"unmasked-padding"}:
        mask = explorer_mask(Settings(**settings, mode=mode))
        assert torch.equal(mask[:, padding], torch.eye(8, dtype=torch.bool)[:, padding]), "only itself"
    assert explorer_mask(Settings(**settings, mode="unmasked-padding"))[~padding][:, padding].any()


def test_a_decode_step_is_the_last_row_and_its_padding_is_before_the_answer():
    settings = Settings(image=3, prefix=2, suffix=3, padding=2, side="right", mode="sliding", window=6, call="decode")
    assert as_lines(explorer_mask(settings)) == ["0000100111"]
    assert [token.kind for token in explorer_tokens(settings)][5:7] == ["padding"] * 2
    left = Settings(image=3, prefix=2, suffix=3, padding=2, side="left", mode="sliding", window=4)
    step = Settings(**(asdict(left) | {"call": "decode"}))
    assert torch.equal(explorer_mask(step)[0], explorer_mask(left)[-1])


def test_every_sentence_agrees_with_its_cell(page):
    few = [s for s in SETTINGS if len(explorer_tokens(s)) < 40]
    script = """(() => {
        const first = a.call === "decode" ? m.tokens(a).length - 1 : 0, table = m.mask(a), wrong = [];
        for (const row of m.items(a, first)) for (const col of m.items(a)) {
            let allowed = 0;
            for (let q = row.from; q < row.from + row.n; q++)
                for (let k = col.from; k < col.from + col.n; k++) allowed += table[q - first][k];
            const words = m.explain(a, row, col), all = row.n * col.n;
            const good = allowed === 0
                ? / cannot attend to keys? .*: .*(later|padding, which is masked|steps behind|attends to blocks)/
                : allowed === all
                    ? / can attend to keys? .*: .*(itself|earlier|every|fully|distance|suffix attends|bug|to blocks)/
                    : new RegExp(`${allowed} of .*: (each attends|padding is masked|the others)`);
            if (!good.test(words) || /undefined|NaN|Infinity/.test(words)) wrong.push(words);
        }
        return wrong;
    })()"""
    assert len(few) > 80
    assert call_module(page, script, [asdict(s) for s in few]) == [[]] * len(few)


@pytest.mark.parametrize(
    ("how", "query", "key", "words"),
    [
        ({}, 5, 6, "query 5 'suf 1' cannot attend to key 6 'suf 2': it comes later, and the suffix is causal."),
        ({}, 6, 5, "query 6 'suf 2' can attend to key 5 'suf 1': it comes earlier in the suffix."),
        ({}, 6, 6, "query 6 'suf 2' can attend to key 6 'suf 2': every token attends to itself."),
        ({}, 0, 4, r"query 0 '<image>' can attend to key 4 '\n': image and prefix attend to each other fully."),
        ({}, 0, 5, "query 0 '<image>' cannot attend to key 5 'suf 1': it comes later, and image and prefix do not "
         "attend to the suffix."),
        ({}, 5, 0, "query 5 'suf 1' can attend to key 0 '<image>': the suffix attends to image and prefix."),
        ({}, 2, 8, "query 2 '<bos>' cannot attend to key 8 '<pad>': it is padding, which is masked."),
        ({}, 8, 8, "query 8 '<pad>' can attend to key 8 '<pad>': a padding token attends to itself, because "
         "softmax needs at least one key."),
        ({}, 8, 0, "query 8 '<pad>' can attend to key 0 '<image>': block 3 attends to blocks up to 3, and it is in "
         "block 0. The output of a padding token is not used."),
        ({"mode": "causal"}, 0, 1, "query 0 '<image>' cannot attend to key 1 '<image>': it comes later."),
        ({"mode": "causal"}, 1, 0, "query 1 '<image>' can attend to key 0 '<image>': it comes earlier."),
        ({"mode": "bidirectional"}, 0, 7, "query 0 '<image>' can attend to key 7 'suf 3': every token attends "
         "to every token."),
        ({"mode": "sliding"}, 6, 3, "query 6 'suf 2' cannot attend to key 3 'pre 1': it is 3 steps behind, and a "
         "window of 3 reaches 2."),
        ({"mode": "sliding"}, 6, 4, r"query 6 'suf 2' can attend to key 4 '\n': the suffix attends to image and "
         "prefix, 2 steps behind and so inside the window."),
        ({"mode": "sliding"}, 4, 0, r"query 4 '\n' can attend to key 0 '<image>': image and prefix attend to each "
         "other at any distance, because the window does not cut there."),
        ({"mode": "unmasked-padding"}, 7, 8, "query 7 'suf 3' can attend to key 8 '<pad>': padding is not masked, "
         "which is the bug."),
        ({"mode": "unmasked-padding"}, 0, 8, "query 0 '<image>' cannot attend to key 8 '<pad>': it comes later, in the "
         "block of the last suffix token."),
        ({"image": 256, "mode": "sliding", "window": 100}, 260, 0, "query 260 'suf 2' can attend to 95 of the 256 keys "
         "0–255 '<image>': the others are outside the window of 100."),
        ({"image": 256, "mode": "causal"}, 0, 0, "queries 0–255 '<image>' attend to keys 0–255 '<image>' in 32,896 "
         "of 65,536 pairs: each attends to itself and to earlier tokens."),
        ({"image": 256}, 259, 0, "query 259 'suf 1' can attend to keys 0–255 '<image>': the suffix attends to image "
         "and prefix."),
    ],
)  # fmt: skip
def test_sentences_give_the_reason(page, how, query, key, words):
    settings = asdict(Settings(**({"image": 2, "prefix": 3, "suffix": 3, "padding": 1, "window": 3} | how)))
    item = "m.items(a).find((item) => item.from <= {0} && {0} < item.from + item.n)"
    found = call_module(page, f"m.explain(a, {item.format(query)}, {item.format(key)})", [settings])
    assert found == [words]


# --- in the page --------------------------------------------------------------------------------------------------


def drawn_mask(page) -> list[str]:
    """The mask as it is drawn, from the corners of the filled cells."""
    d = page.locator('[data-cells="allowed"]').first.get_attribute("d")
    corners = [tuple(map(float, corner)) for corner in re.findall(r"M([\d.]+) ([\d.]+)h", d)]
    columns, rows = (sorted({corner[i] for corner in corners}) for i in (0, 1))
    return ["".join(str(int((x, y) in corners)) for x in columns) for y in rows]


@pytest.mark.parametrize("mode", MODES)
def test_cells_are_drawn_where_the_mask_allows(page, show, mode):
    show(mode=mode, padding=2, padding_side="left", window=3)
    settings = Settings(mode=mode, padding=2, side="left", window=3)
    assert drawn_mask(page) == as_lines(explorer_mask(settings))


def test_controls_change_the_mask(page, show):
    show()
    choose(page, "sliding window")
    for name, value in {"image tokens": 6, "prefix": 3, "suffix": 5, "padding": 2, "window": 2}.items():
        slide(page, name, value)
    choose(page, "left")
    wanted = Settings(image=6, prefix=3, suffix=5, padding=2, window=2, mode="sliding", side="left")
    assert drawn_mask(page) == as_lines(explorer_mask(wanted))
    choose(page, "one decode step")
    assert page.locator("[data-query]").count() == 1
    slide(page, "suffix", 1)  # the minimum for a decode step
    assert page.get_by_role("slider", name="suffix").get_attribute("min") == "1"


def test_hovering_highlights_and_explains(page, show):
    show(image_tokens=2, prefix=3)
    hover(page, query=5)
    assert sentence(page) == "Query 5 'suf 1' attends to 6 of 8 keys: 2 of 2 image, 3 of 3 prefix, 1 of 3 suffix."
    bold = page.locator("[data-key][font-weight='600']")
    assert [bold.nth(i).get_attribute("data-key") for i in range(bold.count())] == ["0", "1", "2", "3", "4", "5"]
    hover(page, key=6)
    assert (
        sentence(page) == "Key 6 'suf 2' is attended to by 2 of 8 queries: 0 of 2 image, 0 of 3 prefix, 2 of 3 suffix."
    )
    assert page.locator("[data-query][font-weight='600']").count() == 2
    hover(page, query=5, key=6)
    assert sentence(page) == "Query 5 'suf 1' cannot attend to key 6 'suf 2': it comes later, and the suffix is causal."
    hover(page, query=7, key=6)
    assert sentence(page) == "Query 7 'suf 3' can attend to key 6 'suf 2': it comes earlier in the suffix."
    page.mouse.move(5, 5)
    assert "Click to pin" in sentence(page)


def test_clicks_pin_several_and_unpin(page, show):
    show()
    pins = page.locator(".pins li")
    for query in (2, 8):
        page.locator(f'[data-query="{query}"]').click()
    page.locator('[data-key="9"]').click()
    hover(page, query=4, key=5)
    page.mouse.down()
    page.mouse.up()
    assert pins.count() == 4
    assert "Query 8 'suf 1' attends to 9 of 11 keys" in pins.nth(1).inner_text()
    choose(page, "causal")  # the tokens are the same: the pins stay, their sentences change
    assert "Query 2 '<image>' attends to 3 of 11 keys" in pins.nth(0).inner_text()
    page.locator('[data-query="8"]').click()
    page.get_by_role("button", name="Remove pin 1").click()
    assert [pins.nth(i).inner_text()[:5] for i in range(pins.count())] == ["1\nKey", "2\nQue"]
    slide(page, "image tokens", 5)  # the tokens differ: the pins disappear
    assert pins.count() == 0


def test_keyboard_reaches_everything(page, show):
    show(image_tokens=2, prefix=3)
    page.locator("select").focus()
    page.keyboard.press("Tab")  # the mask comes next
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert sentence(page).startswith("Query 1 '<image>' can attend to key 2 '<bos>'")
    page.keyboard.press("Enter")
    for _ in range(5):
        page.keyboard.press("ArrowLeft")  # stops at the labels
    assert sentence(page).startswith("Query 1 '<image>' attends to 5 of 8 keys")
    page.keyboard.press("Space")
    assert page.locator(".pins li").count() == 2
    page.keyboard.press("ArrowRight")
    for _ in range(9):
        page.keyboard.press("ArrowUp")
    assert sentence(page).startswith("Key 0 '<image>' is attended to by 8 of 8 queries")
    page.keyboard.press("ArrowLeft")  # the corner is empty
    assert sentence(page).startswith("Key 0")
    page.keyboard.press("Escape")
    assert page.locator(".pins li").count() == 0


def start_round(page) -> int:
    page.get_by_role("button", name="Predict a row").click()
    return int(re.search(r"query (\d+) ", sentence(page))[1])


def test_predict_then_reveal_scores_the_marked_cells(page, show):
    show(padding=2, mode="sliding")
    row = explorer_mask(Settings(padding=2, mode="sliding"))[start_round(page)].tolist()
    assert page.locator('[data-cells="allowed"]').count() == 0, "the answer must not be on the page"
    page.locator(".grid").focus()
    page.keyboard.press("ArrowRight")
    for key, allowed in enumerate(row):
        assert f"Key {key} " in sentence(page) and "your prediction is blocked" in sentence(page)
        if allowed != (key in (1, 4)):  # two mistakes
            page.keyboard.press("Enter")
        page.keyboard.press("ArrowRight")
    page.get_by_role("button", name="Reveal").click()
    assert sentence(page).startswith(f"{len(row) - 2} of {len(row)} right.")
    assert len(sentence(page).split(" attend to key ")) == 3  # one reason for each mistake
    assert page.locator('[data-mark="wrong"]').count() == 2
    assert page.locator('[data-mark="right"]').count() == len(row) - 2
    page.get_by_role("button", name="Next row").click()
    row = explorer_mask(Settings(padding=2, mode="sliding"))[int(re.search(r"query (\d+) ", sentence(page))[1])]
    for key, allowed in enumerate(row.tolist()):
        if allowed:
            page.locator(f'[data-key="{key}"]').click()
    page.get_by_role("button", name="Reveal").click()
    assert sentence(page).startswith("13 of 13 right: the whole row. In 2 rounds: 24 of 26.")
    page.get_by_role("button", name="Back to the mask").click()
    assert drawn_mask(page) == as_lines(explorer_mask(Settings(padding=2, mode="sliding")))


def test_two_masks_and_their_difference(page, show):
    show(compare="causal", padding=1)
    ours, other = (explorer_mask(Settings(mode=mode, padding=1)) for mode in ("prefix-lm", "causal"))
    assert page.locator("[data-panel]").count() == 3
    cells = {name: (page.locator(f'[data-cells="{name}"]').count() and page.locator(f'[data-cells="{name}"]')
                    .get_attribute("d").count("M")) for name in ("only-a", "only-b")}  # fmt: skip
    assert cells == {"only-a": int((ours & ~other).sum()), "only-b": int((other & ~ours).sum())}
    assert f"difference: {int((ours != other).sum())} pairs" in page.locator(".grid svg").inner_html()
    hover(page, query=0, key=3)
    assert sentence(page).split("\n\n") == [
        "Prefix-LM: query 0 '<image>' can attend to key 3 '<image>': image and prefix attend to each other fully.",
        "Causal: query 0 '<image>' cannot attend to key 3 '<image>': it comes later.",
    ]
    page.locator("select").select_option("sliding")
    slide(page, "window", 2)
    other = explorer_mask(Settings(mode="sliding", padding=1, window=2))
    assert f"difference: {int((ours != other).sum())} pairs" in page.locator(".grid svg").inner_html()
    page.locator("select").select_option("")
    assert page.locator("[data-panel]").count() == 1


@pytest.mark.parametrize("how", [{}, {"compare": "causal", "image_tokens": 256, "padding": 3}])
def test_figures_are_saved(page, show, how):
    show(**how)
    page.locator('[data-query="1"]').click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save SVG").click()
    root = ElementTree.parse(download.value.path()).getroot()
    assert root.tag.endswith("svg") and "Attention mask, prefix-LM" in root[0].text
    with page.expect_download() as download:
        page.get_by_role("button", name="Save PNG").click()
    with Image.open(download.value.path()) as image:
        assert image.size == (2 * int(root.get("width")), 2 * int(root.get("height")))
        assert (0, 114, 178) in {color[:3] for _, color in image.convert("RGB").getcolors(1 << 24)}


@pytest.mark.parametrize("compare", [None, "causal"])
def test_256_image_tokens_are_drawn_as_one_cell(page, show, compare):
    show(image_tokens=255, prefix=16, suffix=16, padding=16, mode="sliding", window=100, compare=compare)
    page.get_by_role("slider", name="image tokens").press("ArrowRight")
    assert page.locator('[data-query="0"]').count() == 0 or "0–255" in page.locator('[data-query="0"]').text_content()
    assert page.locator(".grid svg *").count() < 700
    choose(page, "causal")
    length = page.locator('[data-cells="allowed"]').first.get_attribute("d")
    assert len(length) < 100_000


# --- where it is shown --------------------------------------------------------------------------------------------


def test_the_mime_bundle_contains_every_form():
    explorer = explore(image_tokens=256, compare="causal")
    data, metadata = explorer._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain", "text/html", WIDGET}
    assert isinstance(explorer.figure(), Figure)
    assert metadata["image/png"]["alt"] == data["text/plain"] == explorer.figure().alt
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width > 300
    assert data[WIDGET]["model_id"] == explorer.widget.model_id
    assert explorer.widget.settings == asdict(explorer.settings)


def test_an_exported_notebook_contains_the_explorer(page, tmp_path):
    (tmp_path / "notebook.html").write_text(exported(explore(compare="causal")), encoding="utf-8")
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe[data-mask-explorer]")
    frame.locator('[data-query="8"]').hover()
    assert "Query 8 'suf 1'" in frame.locator(".sentence").inner_text().replace("query", "Query")
    assert not page.locator("img[alt^='2 attention masks']").is_visible()
    height = frame.locator("body").evaluate("(body) => [body.offsetHeight, window.innerHeight]")
    assert height[0] == height[1] > 300


def test_without_scripts_the_figure_stays(browser, tmp_path):
    (tmp_path / "notebook.html").write_text(exported(explore()), encoding="utf-8")
    with quiet_page(browser, java_script_enabled=False) as page:
        page.goto((tmp_path / "notebook.html").as_uri())
        image = page.get_by_role("img", name="An attention mask of 11 query rows by 11 key columns")
        assert image.is_visible() and image.bounding_box()["width"] > 300
        assert page.locator("iframe").bounding_box()["height"] == 0


def test_save_html_creates_the_folder(tmp_path):
    explore().save_html(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == explore().html()
    with pytest.raises(ValueError, match="end in .html"):
        explore().save_html(tmp_path / "page.png")
    assert "</script" not in module() and "http" not in module().replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"image_tokens": 257}, "0 to 256"),
        ({"prefix": 0}, "1 to 16"),
        ({"padding": -1}, "0 to 16"),
        ({"window": 0}, "at least 1"),
        ({"mode": "prefix"}, "'prefix-lm'"),
        ({"compare": "none"}, "'none'"),
        ({"padding_side": "top"}, "'left' and 'right'"),
        ({"call": "train"}, "'prefill' and 'decode'"),
        ({"call": "decode", "suffix": 0}, "suffix=1 or more"),
    ],
)
def test_wrong_settings_raise_an_error(how, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        explore(**how)


# --- in JupyterLab ------------------------------------------------------------------------------------------------
def test_in_jupyterlab_a_saved_figure_becomes_a_widget(browser, tmp_path):
    source = "from minivlm.course.viz import explore\nmask_explorer()"
    notebook = notebook_with(source, explore())
    del notebook.cells[0].outputs[0].data[WIDGET]  # as in a saved notebook
    notebook.cells.append(nbformat.v4.new_code_cell("1 + 1"))
    nbformat.write(notebook, tmp_path / "explorer.ipynb")
    with jupyterlab(tmp_path) as (url, token):
        allowed = (url, url.replace("http", "ws", 1), "data:", "blob:", "about:")
        with quiet_page(browser, allowed, viewport={"width": 1400, "height": 1100}) as page:
            page.set_default_timeout(3 * PATIENCE)
            page.goto(f"{url}/lab/tree/explorer.ipynb?token={token}")
            image = page.locator(".jp-OutputArea-output img[alt^='An attention mask']")
            image.first.wait_for()  # an untrusted notebook: no frame, no script
            assert page.locator("iframe[data-mask-explorer]").count() == 0
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
            page.locator(".jp-Notebook .jp-InputArea-editor").first.click()
            page.locator(".jp-Notebook .cm-content:focus").press("Shift+Enter")
            grid = page.locator(".jp-OutputArea-output .grid")
            grid.locator("svg").wait_for()
            grid.locator('[data-query="8"]').hover()
            assert "Query 8 'suf 1' attends to 9 of 11 keys" in sentence(page)
            grid.focus()
            for key in ("ArrowDown", "Enter", "ArrowDown"):
                page.keyboard.press(key)  # goes to the explorer only, not to JupyterLab
            assert page.locator(".pins li").count() == 1
            assert page.locator(".jp-Cell.jp-mod-active").get_attribute("data-windowed-list-index") == "0"
            assert page.locator(".jp-Notebook.jp-mod-editMode").count() == 0
            slide(page, "image tokens", 256)
            assert "0–255" in grid.locator('[data-query="0"]').text_content()


def test_settings_are_plain_data():
    assert json.loads(json.dumps(asdict(Settings()))) == asdict(Settings())
