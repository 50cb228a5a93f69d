"""The static pictures: that they show the data they are given, say it in words, and refuse what they cannot draw."""

import math
import re
import subprocess
import sys
from functools import cache

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from minivlm import emoji, generation, masks
from minivlm.course import viz
from minivlm.course.viz import charts, diagrams, patches, style, tokens
from minivlm.course.viz.attention import SEEN, make_grid, means
from minivlm.course.viz.boxes import PALETTE

SCENE = emoji.make_scene(5, "validation").image
TABLE = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.0], [0.7, 0.2, 0.4]])
NAMES = ["cat", "dog", "bird"]
KINDS = ["image"] * 8 + ["bos", "prefix", "newline", "suffix", "suffix", "eos"]
TEXTS = ["<image>"] * 8 + ["<bos>", "caption", "\n", "a", " cat", "<eos>"]
SEQUENCE = [viz.Token(text, kind) for text, kind in zip(TEXTS, KINDS, strict=True)]
TYPES = torch.tensor([[0] * 11 + [1] * 3])
MASK = masks.prefix_lm_mask(TYPES)[0]
WEIGHTS = torch.where(MASK, 1.0, 0.0) / MASK.sum(1, keepdim=True)
LOGITS = torch.tensor([2.0, 1.0, 3.0, -1.0, 0.0])
VOCABULARY = ["a", " two", "\n", "cat", "dog"]
WORDS = [NAMES[i % 3] for i in range(49)]
SHAPES = np.stack([np.full((8, 8), -1.0), np.tri(8) * 2 - 1, np.ones((8, 8))])

# One call of every function, each a picture with something in it.
CALLS = {
    "similarity_matrix": lambda: viz.similarity_matrix(TABLE, [SCENE] * 3, NAMES, title="Cosines"),
    "softmax_and_sigmoid": lambda: viz.softmax_and_sigmoid(torch.tensor(TABLE) * 10, bias=-5),
    "attention_mask": lambda: viz.attention_mask(MASK, SEQUENCE, "Prefix-LM"),
    "compare_masks": lambda: viz.compare_masks({"causal": masks.causal_mask(14), "prefix-LM": MASK}, SEQUENCE),
    "attention_over_mask": lambda: viz.attention_over_mask(WEIGHTS, MASK, SEQUENCE),
    "token_strip": lambda: viz.token_strip(SEQUENCE),
    "image_row": lambda: viz.image_row([SCENE, TABLE, SCENE / 255], ["a scene", "a map", "in fractions"]),
    "patch_grid": lambda: viz.patch_grid(SCENE, 16),
    "position_similarity": lambda: viz.position_similarity(np.eye(49, 8)),
    "attention_on_image": lambda: viz.attention_on_image(SCENE, np.arange(98.0).reshape(2, 49), ["one", "\n"]),
    "nearest_words": lambda: viz.nearest_words(SCENE, WORDS, np.linspace(0, 1, 49)),
    "codebook": lambda: viz.codebook(np.tile(SHAPES, (7, 1, 1)), [5, 0, 7] + [1, 2, 3] * 6, "A codebook"),
    "lines": lambda: viz.lines({"a": ([1, 2, 3], [1, 4, 9]), "b": ([1, 2], [5, 5])}, "Squares", "x", "y"),
    "cache_growth": lambda: viz.cache_growth({"MQA": 18432, "MHA": 147456}),
    "sampling_distribution": lambda: viz.sampling_distribution(LOGITS, VOCABULARY, LOGITS > 0),
    "blocks": lambda: viz.blocks([["resize", "normalize\n-1 … 1"], ["tokens"]], "tokens"),
    "you_are_here": lambda: viz.you_are_here("05"),
    "families": viz.families,
}

# What the words must say.
ALT = {
    "similarity_matrix": "3 pictures .* 3 texts .* from 0 to 0.9. In 2 of 3 rows .* picture 3: cat",
    "softmax_and_sigmoid": "every row sums to 1.* every column sums to 1.* plus the bias −5",
    "attention_mask": "14 query rows .* 8 image queries see image fully, prefix fully and suffix not at all.* causally",
    "compare_masks": "2 attention masks.* prefix-LM: 55 cells allowed that causal blocks, 0 blocked",
    "attention_over_mask": "“<eos>”, looks at: image 57%, prefix 21% and suffix 21%.* Blocked cells get nothing",
    "token_strip": "14 tokens: 8 × <image>, bos “<bos>”, prefix “caption”, newline “↵”, suffix “a cat”",
    "image_row": "3 pictures in a row: a scene; a map; in fractions",
    "patch_grid": "112×112 pixels cut into 7×7 patches of 16×16 pixels, numbered 0 to 48",
    "position_similarity": "7×7 maps of 7×7 cells.* Neighbors have",
    "attention_on_image": "7×7 patches. one: strongest in row 7, column 7, with 4%; ↵",
    "nearest_words": r"Most often cat \(17\), bird \(16\) and dog \(16\). row 1: cat, dog, bird",
    "codebook": r"21 codes. 20 of them are used, most often 002 .7×., 000 .* 7 are mostly inside, 7 .* 6 between",
    "lines": "Squares. A chart of y against x. a: 1 at 1, 9 at 3.* b: 5 at 1, 5 at 2",
    "cache_growth": "MQA: 18.4 KB a token, 4.72 MB at 224 px, 18.9 MB at 448 px, 75.5 MB at 896 px; MHA: 147 KB",
    "sampling_distribution": "likeliest first: ↵ 64%, a 23%, two 8.6%.* 3 tokens of 5 kept; .* rises to 67%",
    "blocks": "resize → normalize, -1 … 1 Then, in the next row: tokens. Highlighted: tokens",
    "you_are_here": "chapter 05, the prefix-LM mask.* Lit up: the sequence",
    "families": "VisualBERT, SimVLM, CM3 and PaliGemma.* ClipCap.* VisualGPT and Flamingo.* MAGiC",
}


@cache
def drawn(name: str) -> viz.Figure:
    return CALLS[name]()


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def pixels(picture: viz.Figure) -> np.ndarray:
    return np.asarray(picture.image).astype(int)


def area_of(picture: viz.Figure, color: str) -> int:
    """How many pixels have exactly this color."""
    return int((pixels(picture) == rgb(color)).all(-1).sum())


# --- every picture -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # such as a letter that the font lacks
@pytest.mark.parametrize("name", CALLS)
def test_every_picture_is_drawn_described_and_the_same_twice(name):
    picture, again = drawn(name), CALLS[name]()
    assert isinstance(picture, viz.Figure) and picture.image.mode == "RGB"
    assert 400 <= picture.image.width <= 800 and 40 <= picture.image.height <= 800
    assert len(np.unique(pixels(picture).reshape(-1, 3), axis=0)) > 4
    assert re.search(ALT[name], picture.alt), picture.alt
    assert picture.png() == again.png()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_drawn_over_the_edge(name):
    """The outermost pixels are paper: a text that is cut off would leave ink there."""
    image = pixels(drawn(name))
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge > 250).all()


def test_every_function_of_the_package_is_tried_here():
    drawn_elsewhere = {"draw_boxes", "draw_sheet", "from_figure", "read_tokens", "Figure", "Token"}
    assert set(CALLS) == {name for name in viz.__all__ if name not in drawn_elsewhere | set(viz._NEED_TORCH)}


def test_a_notebooks_settings_change_nothing(monkeypatch):
    plain = drawn("lines").png()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "black")
    assert CALLS["lines"]().png() == plain
    assert matplotlib.rcParams["font.size"] == 30  # and are left as they were


def test_importing_viz_waits_for_neither_torch_nor_matplotlib():
    code = "import sys, minivlm.course.viz; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_figure_keeps_size_and_words():
    figure = Figure(figsize=(3, 2), dpi=100, facecolor=PALETTE[0])
    picture = viz.from_figure(figure, "orange")
    assert picture.image.size == (300, 200) and area_of(picture, PALETTE[0]) == 60000 and picture.alt == "orange"
    with pytest.raises(ValueError, match="alt text is empty"):
        viz.from_figure(figure, " ")


# --- one by one ----------------------------------------------------------------------------------------------------


def test_similarity_frames_the_truth_that_is_given():
    diagonal, shifted, none = (
        viz.similarity_matrix(TABLE, NAMES, NAMES, truth=truth) for truth in (None, [1, 2, 0], [])
    )
    frame = style.VERMILION
    assert area_of(diagonal, frame) > 500 < area_of(shifted, frame) and area_of(none, frame) == 0
    assert diagonal.png() != shifted.png()
    assert (
        "In 1 of 3 rows" in shifted.alt and "dog: cat; " not in none.alt and "Largest in its row: cat: cat" in none.alt
    )


def test_similarity_colors_follow_the_values():
    darkest, brightest = (255 * style.cividis(np.array([0.0, 1.0]), 0, 1)).astype(int)  # as matplotlib rounds
    image = pixels(viz.similarity_matrix(np.eye(4)[::-1], list("abcd"), list("wxyz"), truth=[]))
    rows, columns = (image == brightest).all(-1).nonzero()
    assert np.corrcoef(rows, columns)[0, 1] < -0.9  # the bright cells run from the lower left to the upper right
    assert (image == darkest).all(-1).sum() > 2 * len(rows)


def test_softmax_and_sigmoid_ask_three_different_questions():
    logits = np.array([[2.0, 0.0], [1.0, 3.0]])
    picture, shifted = (viz.softmax_and_sigmoid(logits, bias=b) for b in (0.0, -4.0))
    middle = picture.image.height // 2
    assert (pixels(picture)[:middle] == pixels(shifted)[:middle]).all()  # no softmax notices the bias
    assert (pixels(picture)[middle:, :400] == pixels(shifted)[middle:, :400]).all()
    assert (pixels(picture)[middle:, 400:] != pixels(shifted)[middle:, 400:]).any()
    assert "rows sum to 1.38 to 1.68" in picture.alt
    assert "nan" not in viz.softmax_and_sigmoid([[1000.0, -1000.0]]).alt


def test_a_mask_fills_as_many_cells_as_it_allows():
    for length in (3, 5):
        open_cells = area_of(viz.attention_mask(np.ones((length, length))), SEEN)
        causal = area_of(viz.attention_mask(masks.causal_mask(length)), SEEN)
        legend = 14 * 14
        share = (causal - legend) / (open_cells - legend)
        assert share == pytest.approx((length + 1) / (2 * length), abs=0.02)


def test_one_blocked_cell_is_seen_where_it_is():
    mask = np.ones((4, 4), dtype=bool)
    mask[1, 2] = False
    changed = (pixels(viz.attention_mask(np.ones((4, 4)))) != pixels(viz.attention_mask(mask))).any(-1)
    rows, columns = changed.nonzero()
    left, top = rows.min(), columns.min()
    assert (changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]).mean() > 0.8
    mask = np.ones((4, 4), dtype=bool)
    mask[2, 1] = False
    rows, columns = (pixels(viz.attention_mask(np.ones((4, 4)))) != pixels(viz.attention_mask(mask))).any(-1).nonzero()
    assert rows.min() > left and columns.min() < top  # a row lower, a column further left


def test_long_runs_of_image_tokens_are_one_cell_that_shows_whether_all_or_some_are_seen():
    assert [run.length for run in tokens.runs(SEQUENCE)] == [8] + [1] * 6
    _, _, grid = make_grid((14, 14), SEQUENCE, 0, 0, 600)
    assert means(MASK.numpy(), grid).shape == (7, 7)
    assert means(MASK.numpy(), grid)[0, 0] == 1 and means(masks.causal_mask(14).numpy(), grid)[0, 0] == 36 / 64
    # the queries of a step may begin inside the run
    _, _, grid = make_grid((12, 14), SEQUENCE, 0, 0, 600)
    assert means(masks.causal_mask(14).numpy()[2:], grid)[0, 0] == (3 + 4 + 5 + 6 + 7 + 8) / 48
    # as many cells as a 224-pixel PaliGemma has are collapsed as well
    many = [SEQUENCE[0]] * 256 + SEQUENCE[8:]
    types = torch.tensor([[0] * 259 + [1] * 3])
    assert viz.attention_mask(masks.prefix_lm_mask(types)[0], many).image.height < 720


def test_a_decode_step_is_one_row():
    picture = viz.attention_mask(MASK[-1:], SEQUENCE)
    assert "1 query row by 14 key columns" in picture.alt and "The suffix query sees image fully" in picture.alt


def test_compare_masks_frames_only_what_differs():
    same = viz.compare_masks({"one": MASK, "two": MASK}, SEQUENCE)
    other = MASK.clone()
    other[-1, 0] = False
    different = viz.compare_masks({"one": MASK, "two": other}, SEQUENCE)
    assert area_of(different, style.VERMILION) - area_of(same, style.VERMILION) > 40
    assert "two: 0 cells allowed that one blocks, 1 blocked that it allows" in different.alt


def test_attention_over_mask_shows_a_leak():
    leaking = WEIGHTS.clone()
    leaking[0, -1] = 0.25
    assert "A blocked cell gets 0.25" in viz.attention_over_mask(leaking, MASK, SEQUENCE).alt


def test_read_tokens_knows_the_kinds_of_a_batch(tiny_processor):
    image = Image.new("RGB", (12, 12))
    texts = ["caption en", "detect cat ; dog"]
    batch = tiny_processor(texts, [image] * 2, suffix=["a cat", "<loc0001><loc0002><loc0003><seg004> dog"])
    first, second = (viz.read_tokens(batch, tiny_processor, row) for row in (0, 1))
    kinds = list(dict.fromkeys(token.kind for token in first))
    assert kinds == ["padding", "image", "bos", "prefix", "newline", "suffix", "eos"]
    assert sum(token.kind == "image" for token in second) == 9
    assert [t.text for t in second if t.kind in ("loc", "seg")] == ["<loc0001>", "<loc0002>", "<loc0003>", "<seg004>"]
    assert "".join(t.text for t in first if t.kind == "prefix") == "caption en"
    assert all(token.label == (token.id if token.kind in ("suffix", "eos") else -100) for token in first)
    picture = viz.token_strip(batch, tiny_processor)
    learned = sum(token.label >= 0 for token in first)
    assert f"The loss is on {learned} tokens. Row 1 of {len(second)} tokens: 9 × <image>" in picture.alt
    labels = {name: value for name, value in batch.items() if name != "labels"}
    assert viz.token_strip(labels, tiny_processor).image.height < picture.image.height
    plain = {"input_ids": batch["input_ids"]}  # without a mask, padding is told by its id
    assert viz.read_tokens(plain, tiny_processor)[0].kind == "padding"


def test_a_long_sequence_is_broken_into_lines():
    word = [viz.Token("butterfly", "suffix")]
    one, three = viz.token_strip(word * 3), viz.token_strip(word * 24)
    assert three.image.height > 2 * one.image.height and three.image.width == one.image.width


def test_whitespace_and_foreign_letters_are_seen():
    assert style.visible(" a\n") == "␣a↵" and style.visible("") == "∅" and style.visible("\U0001f98b中") == "��"
    assert style.fit("butterfly", 30, 13).endswith("…") and style.fit("cat", 200, 13) == "cat"


def test_patches_lie_in_reading_order():
    colors = np.zeros((6, 9, 3), dtype=np.uint8)
    colors[2:4, 3:6] = 255
    cut = patches.cut(Image.fromarray(colors[:, :8]), 2)
    assert len(cut) == 12 and np.asarray(cut[0]).max() == 0
    white = [k for k, patch in enumerate(cut) if np.asarray(patch).min() == 255]
    assert white == [6]  # row 1, column 2: columns 3 and 6 hold half of the white square
    numbered, bare = (viz.patch_grid(SCENE, 16, numbers=flag) for flag in (True, False))
    assert numbered.png() != bare.png()
    many = viz.patch_grid(SCENE, 7)  # 256 patches do not fit into one line
    assert "numbered 0 to 255" in many.alt


def test_position_similarity_finds_neighbors():
    place = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(256, 2)
    alike = np.exp(-((place[:, None] - place[None]) ** 2).sum(-1) / 8)
    alt = viz.position_similarity(alike).alt
    near, far = re.search(r"Neighbors have (\S+) on average, all others (\S+)\.", alt).groups()
    assert float(near) > 0.9 > 0.2 > float(far)
    assert "8×8 maps of 16×16 cells" in alt


def test_attention_on_picture_frames_the_strongest_patch():
    weights = np.ones(49)
    weights[24] = 9  # the middle
    picture = viz.attention_on_image(SCENE, weights)
    assert "panel 1: strongest in row 4, column 4, with 16%" in picture.alt
    rows, columns = (pixels(picture) == rgb(style.VERMILION)).all(-1).nonzero()
    assert abs(columns.mean() - 400) < 3 and abs(rows.mean() - (12 + 190)) < 3


def test_a_codebook_shows_the_shape_of_every_code_that_is_used():
    ends = (matplotlib.colormaps["cividis"](end, bytes=True)[:3] for end in (0.0, 1.0))
    outside, inside = ("#" + bytes(color).hex() for color in ends)
    used, never = viz.codebook(SHAPES, [1, 1, 1]), viz.codebook(SHAPES, [1, 1, 0])
    areas = {color: [area_of(picture, color) for picture in (used, never)] for color in (outside, inside)}
    assert areas[inside][0] - areas[inside][1] > 1500 and areas[outside][0] == areas[outside][1]  # 42 × 42
    assert "3 of them are used" in used.alt and "2 of them are used" in never.alt
    assert "used" not in viz.codebook(SHAPES).alt
    assert viz.codebook(5 * SHAPES).png() == viz.codebook(SHAPES).png()  # clipped


def test_lines_are_told_apart_without_color():
    looks = [(look["marker"], str(look["linestyle"])) for look in charts.LOOKS]
    assert len({marker for marker, _ in looks}) == len({dashes for _, dashes in looks}) == len(looks)
    straight = {"a": ([1, 10, 100], [1, 10, 100])}
    pictures = [viz.lines(straight, "t", "x", "y", log=log) for log in ("", "x", "y", "xy")]
    assert len({picture.png() for picture in pictures}) == 4


def test_names_of_curves_do_not_overlap():
    placed = charts.spread([10, 11, 12, 300], 17, 0, 310)
    assert np.diff(placed).min() >= 17 and placed[-1] <= 310
    assert np.diff(charts.spread([300, 301, 302], 17, 0, 310)).min() >= 17
    assert charts.spread([300, 301, 302], 17, 0, 310)[-1] == 310


def test_ticks_of_logarithmic_axes_are_written_out():
    assert [charts.power_of_ten(v, 0) for v in (0.01, 1, 10_000, 1e6, 1e13, 1e-9)] == [
        "0.01",
        "1",
        "10,000",
        "10⁶",
        "10¹³",
        "10⁻⁹",
    ]
    assert [charts.in_bytes(n) for n in (1, 999, 18432, 2.5e9)] == ["1 bytes", "999 bytes", "18.4 KB", "2.5 GB"]


def test_sampling_takes_filtered_logits_as_what_is_kept():
    filtered = generation.top_k_filter(LOGITS[None], 2)[0]
    by_logits = viz.sampling_distribution(LOGITS, VOCABULARY, filtered)
    by_flags = viz.sampling_distribution(LOGITS, VOCABULARY, [True, False, True, False, False])
    assert by_logits.png() == by_flags.png() and "2 tokens of 5 kept" in by_logits.alt
    everything = viz.sampling_distribution(LOGITS, VOCABULARY)
    assert "kept" not in everything.alt and everything.png() != by_logits.png()
    assert area_of(everything, PALETTE[4]) > area_of(by_logits, PALETTE[4])  # cut bars are not filled
    top = viz.sampling_distribution(LOGITS, VOCABULARY, top=2)
    assert "↵ 64% and a 23%" in top.alt


def test_sampling_reads_the_words_from_a_processor(tiny_processor):
    logits = torch.zeros(tiny_processor.tokenizer.get_vocab_size())
    logits[tiny_processor.eos_token_id] = 9
    assert "likeliest first: <eos>" in viz.sampling_distribution(logits, tiny_processor).alt


def test_every_chapter_has_its_place_on_the_map():
    pictures = {chapter: viz.you_are_here(chapter) for chapter in diagrams.CHAPTERS}
    assert list(pictures) == [f"0{i}" for i in range(9)] and len({p.png() for p in pictures.values()}) == 9
    lit = style.tint(style.ORANGE, 0.45)
    assert area_of(pictures["00"], lit) == 0
    assert all(area_of(picture, lit) > 1000 for chapter, picture in pictures.items() if chapter != "00")
    assert {part for parts in diagrams.LIT.values() for part in parts} == set(diagrams.PARTS)  # none is never lit


# --- what they refuse ----------------------------------------------------------------------------------------------

NAN = float("nan")
REFUSED = {
    "similarity: one picture too few": (lambda: viz.similarity_matrix(TABLE, NAMES[:2], NAMES), "3 rows .* 2 pictures"),
    "similarity: one word too many": (lambda: viz.similarity_matrix(TABLE, NAMES, NAMES + ["x"]), "3 strings"),
    "similarity: words in one string": (lambda: viz.similarity_matrix(TABLE, NAMES, "cat"), "list of 3 strings"),
    "similarity: truth out of range": (lambda: viz.similarity_matrix(TABLE, NAMES, NAMES, [0, 1, 3]), "from 0 to 2"),
    "similarity: NaN": (lambda: viz.similarity_matrix([[NAN]], ["a"], ["b"]), "finite numbers"),
    "similarity: a vector": (lambda: viz.similarity_matrix([1.0, 2.0], ["a"], ["b"]), "2 dimensions"),
    "similarity: words": (lambda: viz.similarity_matrix([["x"]], ["a"], ["b"]), "must be numbers"),
    "softmax: too large": (lambda: viz.softmax_and_sigmoid(np.zeros((9, 9))), "at most 8 × 8"),
    "mask: more queries than keys": (lambda: viz.attention_mask(np.ones((3, 2))), "3 queries"),
    "mask: too many cells": (lambda: viz.attention_mask(np.ones((1001, 1001))), "too many to see"),
    "mask: batch not removed": (lambda: viz.attention_mask(MASK[None], SEQUENCE), "2 dimensions"),
    "mask: tokens missing": (lambda: viz.attention_mask(MASK, SEQUENCE[:-1]), "14 keys and 13 tokens"),
    "compare: only one": (lambda: viz.compare_masks({"a": MASK}), "Two to six"),
    "compare: shapes": (lambda: viz.compare_masks({"a": MASK, "b": MASK[:3]}), "different shapes"),
    "weights: shape": (lambda: viz.attention_over_mask(WEIGHTS[:3], MASK), "must agree"),
    "weights: logits": (lambda: viz.attention_over_mask(WEIGHTS - 1, MASK), "after the softmax"),
    "strip: no tokenizer": (lambda: viz.token_strip({"input_ids": [[1]]}), "give the processor"),
    "strip: empty": (lambda: viz.token_strip([]), "not empty"),
    "strip: words": (lambda: viz.token_strip(["a", "b"]), "lists of Tokens"),
    "token: unknown kind": (lambda: viz.Token("a", "verb"), "kind of a token is 'verb'"),
    "row: nothing": (lambda: viz.image_row([]), "at least one picture"),
    "row: titles": (lambda: viz.image_row([SCENE], ["a", "b"]), "1 string"),
    "row: columns": (lambda: viz.image_row([SCENE], columns=0), "at least 1"),
    "row: channels first": (lambda: viz.image_row([np.zeros((3, 8, 8))]), "channels to the end"),
    "row: normalized pixels": (lambda: viz.image_row([np.full((8, 8, 3), -1.0)]), "undo the normalization"),
    "patches: no multiple": (lambda: viz.patch_grid(SCENE, 15), "cannot be cut into patches of 15"),
    "patches: zero": (lambda: viz.patch_grid(SCENE, 0), "cannot be cut"),
    "positions: no square": (lambda: viz.position_similarity(np.ones((50, 4))), "50 positions form no square"),
    "heat: no square": (lambda: viz.attention_on_image(SCENE, np.ones(50)), "not 50"),
    "heat: titles": (lambda: viz.attention_on_image(SCENE, np.ones((2, 49)), ["a"]), "2 strings"),
    "words: no square": (lambda: viz.nearest_words(SCENE, WORDS[:-1]), "48 words"),
    "words: scores": (lambda: viz.nearest_words(SCENE, WORDS, [0.5]), "49 words and 1 scores"),
    "codebook: too many": (lambda: viz.codebook(np.zeros((129, 2, 2))), "129 shapes are too many"),
    "codebook: counts": (lambda: viz.codebook(SHAPES, [1, 2]), "3 shapes and 2 counts"),
    "codebook: one shape": (lambda: viz.codebook(SHAPES[0]), "3 dimensions"),
    "lines: none": (lambda: viz.lines({}, "t", "x", "y"), "one to 7 series"),
    "lines: lengths": (lambda: viz.lines({"a": ([1, 2], [1])}, "t", "x", "y"), "2 x values and 1 y values"),
    "lines: logarithm of 0": (lambda: viz.lines({"a": ([0, 2], [1, 1])}, "t", "x", "y", "x"), "no logarithm"),
    "lines: unknown axis": (lambda: viz.lines({"a": ([1], [1])}, "t", "x", "y", "z"), "not 'z'"),
    "cache: nothing": (lambda: viz.cache_growth({}), "one to 7 models"),
    "cache: no bytes": (lambda: viz.cache_growth({"a": 0}), "must be positive"),
    "cache: mark too far": (lambda: viz.cache_growth({"a": 1}, longest=1000), "longest sequence, 1000"),
    "sampling: words": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY[:2]), "5 strings"),
    "sampling: kept": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY, [True]), "5 logits and 1 values"),
    "sampling: nothing kept": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY, [False] * 5), "No token is kept"),
    "sampling: all −inf": (lambda: viz.sampling_distribution([-math.inf], ["a"]), "finite largest"),
    "sampling: none shown": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY, top=0), "top must be"),
    "blocks: none": (lambda: viz.blocks([]), "one to six stages"),
    "blocks: unknown highlight": (lambda: viz.blocks([["a"]], "b"), "'b' is none of the stages"),
    "map: no chapter": (lambda: viz.you_are_here("9"), '"00" to "08"'),
    "title: too long": (lambda: viz.token_strip(SEQUENCE, title="word " * 40), "too long for one line"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_inputs_get_one_clear_sentence(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value)[-1] in ".]"


def test_a_row_that_the_batch_lacks(tiny_processor):
    with pytest.raises(ValueError, match="no row 3"):
        viz.read_tokens({"input_ids": [[1]]}, tiny_processor, row=3)
