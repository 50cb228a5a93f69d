"""The mask explorer in Chromium: its masks against minivlm.masks, cell by cell, and everything a learner can do."""

import base64
import io
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest
import torch
import transformers
from browser import PATIENCE, chromium, exported, jupyterlab, notebook_with, quiet_page
from conftest import in_transformers, tiny_model
from PIL import Image

from minivlm import masks
from minivlm.course import viz
from minivlm.course.exercises import ch05
from minivlm.course.viz import Figure, explore
from minivlm.course.viz.explorer import (
    LIMITS,
    MODES,
    WIDGET,
    MaskExplorer,
    Settings,
    explorer_mask,
    explorer_tokens,
    module,
)
from minivlm.course.viz.own_mask import transformers_mask

ROOT = Path(__file__).resolve().parents[1]
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
        page.locator(".more").evaluate("(details) => (details.open = true)")

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
    page.locator("select[name=compare]").focus()
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
    page.locator("select[name=compare]").select_option("sliding")
    slide(page, "window", 2)
    other = explorer_mask(Settings(mode="sliding", padding=1, window=2))
    assert f"difference: {int((ours != other).sum())} pairs" in page.locator(".grid svg").inner_html()
    page.locator("select[name=compare]").select_option("")
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


# --- real tokens and a model's attention --------------------------------------------------------------------------

IMAGE = Image.new("RGB", (12, 12), "red")
PROMPT = {"prefix": "caption en", "suffix": "a cat and two dogs"}


def test_real_tokens_are_those_of_the_processor(page, show, tiny_processor):
    batch = tiny_processor(text=[PROMPT["prefix"]], images=[IMAGE], suffix=[PROMPT["suffix"]])
    wanted = [viz.tokens.visible(token.text) for token in viz.read_tokens(batch, tiny_processor)]
    explorer = explore(tiny_processor, IMAGE, **PROMPT)
    assert [token.text for token in explorer_tokens(explorer.settings)] == wanted
    assert explorer.settings.suffix == int(batch["token_type_ids"].sum())
    show(processor=tiny_processor, image=IMAGE, **PROMPT)
    labels = page.locator("[data-query]").all_text_contents()
    assert labels == [f"{i} {text}" for i, text in enumerate(wanted)]
    sliders = page.get_by_role("slider")
    assert [sliders.nth(i).get_attribute("name") for i in range(sliders.count())] == ["image", "padding", "window"]
    slide(page, "image tokens", 3)
    changed = Settings(**(asdict(explorer.settings) | {"image": 3}))
    assert drawn_mask(page) == as_lines(explorer_mask(changed))


def test_a_prompt_alone_has_no_suffix(tiny_processor):
    settings = explore(tiny_processor, IMAGE, "caption en").settings
    assert settings.suffix == 0 and settings.texts[0][0] == "<bos>" and settings.texts[0][-1] == "↵"


@torch.no_grad()
def test_attention_lies_over_the_mask_of_its_layer(page, show, talker, tiny_processor):
    explorer = explore(tiny_processor, IMAGE, **PROMPT, model=talker, layer=1)
    show(processor=tiny_processor, image=IMAGE, **PROMPT, model=talker)
    menus = {name: page.get_by_role("combobox", name=name, exact=True) for name in ("attention of", "head")}
    menus["attention of"].focus()
    page.keyboard.press("ArrowDown")  # from layer 0 to layer 1
    menus["head"].select_option("head 2")
    table = explorer.attention.table(1, 2)
    cells = page.locator("[data-weight]")
    drawn = cells.evaluate_all("(all) => all.map((c) => [c.dataset.weight, Number(c.getAttribute('opacity'))])")
    assert len(drawn) == int(explorer_mask(explorer.settings).sum())
    for at, opacity in drawn:
        query, key = map(int, at.split())
        assert opacity**2 == pytest.approx(float(table[query, key] / table.max()), abs=0.02)
    hover(page, query=12, key=3)
    found = re.search(r"weight in layer 1, head 2 is ([\d.]+)%", sentence(page))
    assert float(found[1]) / 100 == pytest.approx(float(table[12, 3]), abs=0.0026)
    menus["attention of"].select_option("none, only the mask")
    assert cells.count() == 0 and drawn_mask(page) == as_lines(explorer_mask(explorer.settings))


def test_long_runs_share_their_attention(talker, tiny_processor):
    attention = explore(tiny_processor, IMAGE, **PROMPT, model=talker).attention
    S = attention.weights.shape[-1]
    coarse = viz.explorer.Attention(attention.weights, attention.windows, [(0, 9), *((i, i + 1) for i in range(9, S))])
    L, H = coarse.weights.shape[:2]
    table = torch.frombuffer(bytearray(base64.b64decode(coarse.plain()["values"])), dtype=torch.uint8) / 255
    table = table.view(L, H, S - 8, S - 8)
    assert torch.allclose(table[:, :, 0, 0], attention.weights[:, :, :9, :9].sum(-1).mean(-1), atol=1 / 255)
    assert torch.allclose(table[:, :, 3, 2], attention.weights[:, :, 11, 10], atol=1 / 255)


# --- a function of the learner's ----------------------------------------------------------------------------------

EXERCISES = (ch05.BLOCK, ch05.PREFIX_LM, ch05.PADDING, ch05.WINDOW)
FUNCTIONS = [exercise.reference for exercise in EXERCISES] + [m.function for e in EXERCISES for m in e.mistakes]


def few_tokens(seed: int) -> Settings:
    settings = asdict(SETTINGS[seed])
    return Settings(**(settings | {name: min(settings[name], 9) for name in ("image", "padding")} | {"mode": "own"}))


def cells_of(paths: dict[str, str], name: str) -> set[tuple[int, int]]:
    """Queries and keys of the drawn cells, by the lines of the grid."""
    xs = [float(x) for x in re.findall(r"M([\d.]+) [\d.]+v", paths["lines"])]
    ys = [float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h", paths["lines"])]
    found = re.findall(r"M([\d.]+) ([\d.]+)h", paths[name])
    return {(sum(line < float(y) for line in ys) - 1, sum(line < float(x) for line in xs) - 1) for x, y in found}


def test_wrong_masks_are_drawn_and_crossed_cell_by_cell(page):
    explorers = [MaskExplorer(few_tokens(i), FUNCTIONS[i % len(FUNCTIONS)]) for i in range(40)]
    explorers = [e for e in explorers if e.data()["own"]["rows"]]
    assert len(explorers) >= 30
    script = """(() => {
        const element = document.body.appendChild(document.createElement("div"));
        m.mount(element, a[0], a[1]);
        const d = (selector) => element.shadowRoot.querySelector(selector)?.getAttribute("d") ?? "";
        const rule = element.shadowRoot.querySelector(".rule").textContent, lines = d('[stroke="#DEDEDE"]');
        const [allowed, extra, missing] = ["allowed", "extra", "missing"].map((name) => d(`[data-cells=${name}]`));
        return { allowed, extra, missing, lines, rule };
    })()"""
    for explorer, drawn in zip(
        explorers, call_module(page, script, [[asdict(e.settings), e.data()] for e in explorers]), strict=True
    ):
        settings = explorer.settings
        own = explorer_mask(settings, explorer.mask)
        reference = explorer_mask(Settings(**(asdict(settings) | {"mode": explorer.data()["own"]["reference"]})))
        wanted = {"allowed": own, "extra": own & ~reference, "missing": ~own & reference}
        for name, table in wanted.items():
            assert cells_of(drawn, name) == {tuple(at) for at in table.nonzero().tolist()}, (name, settings)
        wrong = int((own != reference).sum())
        assert (
            f"differs from PaliGemma's mask in {wrong:,} pairs" in drawn["rule"] if wrong else "equals" in drawn["rule"]
        )


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_right_functions_draw_the_masks_of_the_package(exercise):
    for settings in map(few_tokens, range(40)):
        explorer = MaskExplorer(settings, exercise.reference)
        mode = explorer.data()["own"]["reference"]
        reference = explorer_mask(Settings(**(asdict(settings) | {"mode": mode})))
        assert torch.equal(explorer_mask(settings, explorer.mask), reference), settings


def causal(token_type_ids):
    return masks.causal_mask(token_type_ids.shape[1])[None]


def test_a_wrong_cell_has_its_reason(page, show):
    show(mask=causal, image_tokens=2, prefix=3)
    assert "causal" in page.get_by_role("radio", name="causal", exact=True).first.locator("..").inner_text()
    hover(page, query=0, key=3)
    assert sentence(page) == (
        "Query 0 '<image>' cannot attend to key 3 'pre 1' in causal. "
        "PaliGemma allows this: image and prefix attend to each other fully."
    )
    hover(page, query=7, key=6)
    assert sentence(page) == "Query 7 'suf 3' can attend to key 6 'suf 2': it comes earlier in the suffix."
    assert page.get_by_role("slider", name="image tokens").is_disabled()
    assert "Without a kernel" in page.locator(".rule").inner_text()
    choose(page, "prefix-LM")
    slide(page, "image tokens", 5)
    page.locator("input[value=own]").check(force=True)  # back to the sequence that the function was called with
    assert drawn_mask(page) == as_lines(masks.causal_mask(8))


def unwritten(token_type_ids):
    raise NotImplementedError("write your solution here")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (unwritten, "unwritten is not written yet."),
        (lambda ids: ids[99], "<lambda> stopped with IndexError: index 99 is out of bounds"),
        (lambda ids: None, "<lambda> returned a NoneType, not a tensor."),
        (lambda ids: ids.bool(), "<lambda> returned the shape [1, 11], not [1, 11, 11]."),
        (lambda ids: causal(ids).float(), "<lambda> returned torch.float32, not booleans"),
        (lambda types, window: types, "<lambda> has the parameter 'types', which the explorer cannot fill."),
    ],
)  # fmt: skip
def test_a_function_that_returns_no_mask_gives_a_sentence(page, show, unchecked, function, words):
    explorer = explore(mask=function)
    assert words in explorer.call_own(explorer.settings)["error"]
    assert explorer.figure().alt.startswith(f"PaliGemma's mask, because {words}"[:60])
    if function is unwritten:
        show(mask=function)
        assert page.locator(".rule").inner_text().startswith(f"{words} This is PaliGemma's mask.")
        assert drawn_mask(page) == as_lines(explorer_mask(Settings()))


def test_the_kernel_calls_the_function_again():
    explorer = explore(mask=causal)
    explorer.widget.settings = asdict(explorer.settings) | {"image": 6}
    assert len(explorer.widget.own["rows"]) == 13 and explorer.widget.own["of"]["image"] == 6


# --- models of transformers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_of_a_transformers_model_is_the_one_it_uses(unchecked, side):
    model = in_transformers(tiny_model(2))
    settings = Settings(image=9, padding=2, side=side, window=6, mode="own")
    real = torch.tensor([token.kind != "padding" for token in explorer_tokens(settings)])
    for layer, mode in enumerate(("sliding", "prefix-lm")):
        mask = explorer_mask(settings, transformers_mask(model, layer))
        wanted = explorer_mask(Settings(**(asdict(settings) | {"mode": mode})))
        assert torch.equal(mask[real], wanted[real])
    assert explore(model=model, layer=1).settings.mode == "own"
    with pytest.raises(ValueError, match="4 layers with self_attn: there is no layer 4"):
        transformers_mask(model, 4)


def test_a_causal_model_of_transformers_is_drawn_causal(unchecked):
    config = transformers.GemmaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
    )
    model = transformers.GemmaForCausalLM(config)
    before = model.config._attn_implementation
    explorer = explore(model=model)
    assert torch.equal(explorer_mask(explorer.settings, explorer.mask), masks.causal_mask(11))
    assert model.config._attn_implementation == before


# --- the state as text --------------------------------------------------------------------------------------------


def test_the_line_of_python_recreates_the_state(page, tiny_processor):
    started = [explore(), explore(mask=causal), explore(tiny_processor, IMAGE, 'say "a\\b"', "a cat", mask=causal)]
    names = {"viz": viz, "processor": tiny_processor, "image": IMAGE, "causal": causal}
    states = []
    for i, settings in enumerate(SETTINGS[:60]):
        start = started[i % 3]
        fixed = {"texts": start.settings.texts}
        if start.settings.texts:
            fixed |= {"prefix": start.settings.prefix, "suffix": start.settings.suffix}
        states.append((start, Settings(**(asdict(settings) | fixed | {"compare": (None, "causal")[i % 2]}))))
    arguments = [[asdict(state) | {"own": start.data()["own"]}, start.data()] for start, state in states]
    for (_, state), line in zip(states, call_module(page, "m.python(a[0], a[1])", arguments), strict=True):
        assert "\n" not in line and eval(line, names).settings == state, line


def test_the_address_keeps_the_state_and_ignores_nonsense(page, show, tmp_path):
    first = asdict(Settings())
    arguments = [[asdict(settings), first] for settings in SETTINGS]
    back = call_module(page, "m.normalize(m.fromHash(m.toHash(a[0], a[1]), a[1]))", arguments)
    assert back == [asdict(settings) for settings in SETTINGS]
    nonsense = [
        "#",
        "#image=99999&mode=x&side=top&call=&padding=-1&suffix=1.5&window=0",
        "#%%%&layer=0&head=&own=1&texts=a",
    ]
    assert call_module(page, "m.fromHash(a[0], a[1])", [[hash, first] for hash in nonsense]) == [first] * 3
    show()
    slide(page, "image tokens", 6)
    choose(page, "sliding window")
    assert page.url.endswith("#image=6&mode=sliding")
    page.reload()
    assert drawn_mask(page) == as_lines(explorer_mask(Settings(image=6, mode="sliding")))
    page.get_by_role("button", name="Copy as Python").click()
    assert page.locator("output").inner_text() == 'viz.explore(image_tokens=6, mode="sliding")'


# --- simple at first, in both themes ------------------------------------------------------------------------------


def test_it_starts_with_two_sliders_and_unfolds(page, tmp_path):
    explore().save_html(tmp_path / "explorer.html")
    page.goto((tmp_path / "explorer.html").as_uri())
    visible = page.get_by_role("slider").and_(page.locator(":visible"))
    assert visible.count() == 2 and "its block" in page.locator(".note").inner_text()
    choose(page, "unmasked padding")
    assert "There is no padding now" in page.locator(".rule").inner_text()
    assert visible.count() == 5
    slide(page, "padding", 1)
    assert "no padding" not in page.locator(".rule").inner_text()


@pytest.mark.parametrize(
    ("scheme", "jupyter", "dark"),
    [("light", None, False), ("dark", None, True), ("light", "false", True), ("dark", "true", False)],
)
def test_the_theme_is_that_of_jupyterlab_or_of_the_system(browser, tmp_path, scheme, jupyter, dark):
    explore(mask=causal, compare="sliding").save_html(tmp_path / "explorer.html")
    with quiet_page(browser, color_scheme=scheme, viewport={"width": 390, "height": 800}) as page:
        page.goto((tmp_path / "explorer.html").as_uri())
        if jupyter:
            page.evaluate(f"document.body.dataset.jpThemeLight = {jupyter!r}")
        page.wait_for_selector(f'.grid svg > rect[fill="{"#1B1E23" if dark else "#FFFFFF"}"]')
        assert page.locator(".card.dark").count() == int(dark)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


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
        ({"image_tokens": 1025}, "0 to 1024"),
        ({"prefix": 0}, "1 to 16"),
        ({"padding": -1}, "0 to 16"),
        ({"window": 0}, "at least 1"),
        ({"mode": "prefix"}, "'prefix-lm'"),
        ({"compare": "none"}, "'none'"),
        ({"mode": "own"}, "needs a function"),
        ({"mask": torch.ones(3)}, "not a Tensor"),
        ({"prefix": "caption en"}, "Only a processor"),
        ({"model": tiny_model(1)}, "needs a processor"),
        ({"padding_side": "top"}, "'left' and 'right'"),
        ({"call": "train"}, "'prefill' and 'decode'"),
        ({"call": "decode", "suffix": 0}, "Use a suffix"),
    ],
)
def test_wrong_settings_raise_an_error(unchecked, how, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        explore(**how)


# --- in JupyterLab ------------------------------------------------------------------------------------------------
def test_in_jupyterlab_a_saved_figure_becomes_a_widget(browser, tmp_path):
    own = "def own(token_type_ids):\n    return masks.causal_mask(token_type_ids.shape[1])\n\n"
    source = f"from minivlm import masks\nfrom minivlm.course.viz import explore\n\n{own}explore(mask=own)"
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
            crossed = grid.locator('[data-cells="missing"]')
            assert crossed.get_attribute("d").count("M") == 28  # 8 × 7 / 2 pairs of image and prefix
            slide(page, "image tokens", 6)  # the kernel calls the function again
            grid.locator('[data-query="12"]').wait_for()
            assert crossed.get_attribute("d").count("M") == 45


def test_settings_are_plain_data():
    assert json.loads(json.dumps(asdict(Settings()))) == asdict(Settings())


def test_the_report_for_transformers_runs():
    report = (ROOT / "docs" / "upstream-mask-visualizer.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", report, re.MULTILINE | re.DOTALL)
    exec(compile(code, "upstream-mask-visualizer.md", "exec"), {})
