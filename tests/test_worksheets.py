"""The printed worksheets: the key says what the package computes, and every sheet fits on one page."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import chromium, quiet_page

from minivlm.config import GemmaConfig
from minivlm.course.exercises import EXERCISES
from minivlm.masks import mask_padding, prefix_lm_mask

SHEETS = Path(__file__).resolve().parents[1] / "docs" / "worksheets.html"


class Reader(HTMLParser):
    """The cells of every table that has an id, by row, without the header of the columns; and marked words."""

    def __init__(self, text: str):
        super().__init__()
        self.found: dict[str, list] = {}
        self.id, self.cell = None, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        name = dict(attributes).get("id")
        if tag in ("table", "strong"):
            self.id = name
            self.found[name] = []
        elif tag == "tr":
            self.found[self.id].append([])
        elif tag == "td":
            self.found[self.id][-1].append("")
        self.cell = tag

    def handle_data(self, data):
        if self.cell == "td":
            self.found[self.id][-1][-1] += data
        elif self.cell == "strong":
            self.found[self.id] = data

    def handle_endtag(self, tag):
        self.cell = None


@pytest.fixture(scope="module")
def key() -> dict[str, list]:
    return Reader(SHEETS.read_text(encoding="utf-8")).found


def reference(name: str):
    return EXERCISES[name].reference


def numbers(rows: list[list[str]]) -> list[list[int]]:
    return [[int(cell.replace(",", "")) for cell in row] for row in rows]


def test_chapter_00(key):
    for image, patch, side, tokens in numbers(key["key-tokens"][1:]):
        assert reference("num_image_tokens")(image, patch) == tokens == side**2
    *pixels, mean = ([float(cell) for cell in row] for row in key["key-color"][1:])
    image = torch.tensor(pixels).view(1, 2, 2, 3)
    assert reference("mean_color")(image)[0].tolist() == mean
    exponentials, probabilities = ([float(cell) for cell in row] for row in key["key-words"][1:])
    scores = torch.tensor(exponentials[:-1]).log()[None]
    assert torch.allclose(scores.softmax(-1)[0], torch.tensor(probabilities[:-1]))
    assert sum(exponentials[:-1]) == exponentials[-1] and probabilities[-1] == 1
    assert reference("best_words")(scores, ["cat", "dog", "owl"])[0][0] == key["key-best"]


def test_chapter_05(key):
    types = torch.tensor(numbers(key["key-row"][1:2]))
    labels = key["key-row"][2]
    assert [label != "−100" for label in labels] == types.bool()[0].tolist()
    assert numbers(key["key-mask"][1:]) == prefix_lm_mask(types)[0].int().tolist()
    logits = torch.zeros(1, 6, 7)
    logits[0, int(key["key-predicts"]) - 1, 5] = 99.0  # this token is sure that “cat”, number 5, follows
    wanted = torch.full((1, 6), -100)
    wanted[0, labels.index("cat")] = 5
    assert reference("suffix_loss")(logits, wanted) < 1e-3
    types, real = torch.tensor([[0, 0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1, 1]])
    assert numbers(key["key-padding"][1:]) == mask_padding(prefix_lm_mask(types), real)[0].int().tolist()


def test_chapter_07(key):
    without, cached = numbers(key["key-fed"][1:])
    assert without == [4, 5, 6, 15]
    fed = []
    reference("greedy_with_cache")(lambda tokens, cache: fed.append(len(tokens)) or torch.eye(1), [1, 2, 3, 4], 3)
    assert cached == [*fed, sum(fed)]
    for layers, heads, key_heads, dimension, dtype, tokens, rows, size in key["key-bytes"][1:]:
        config = GemmaConfig(
            num_hidden_layers=int(layers),
            num_attention_heads=int(heads),
            num_key_value_heads=int(key_heads),
            head_dim=int(dimension),
        )
        got = reference("cache_bytes")(config, int(tokens), int(rows), getattr(torch, dtype))
        assert got == int(size.replace(",", ""))
    mask, positions = numbers(key["key-positions"][1:])
    assert reference("token_positions")(torch.tensor([mask]), 6)[0].tolist() == positions


def test_the_sheets_do_not_contain_the_key():
    sheet = SHEETS.read_text(encoding="utf-8").partition('id="key-00"')[0]
    assert "key-" not in sheet and "<td></td>" in sheet


@pytest.mark.browser
@pytest.mark.parametrize("paper", ["A4", "Letter"])
def test_every_sheet_and_every_key_is_one_printed_page(paper):
    with chromium() as browser, quiet_page(browser) as page:
        page.goto(SHEETS.as_uri())
        margin = dict.fromkeys(("top", "right", "bottom", "left"), "1.5cm")
        assert page.pdf(format=paper, margin=margin).count(b"/Type /Page\n") == 6
