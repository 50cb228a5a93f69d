"""The static figures: that they show the data, describe it in their alt texts, and reject what they cannot draw."""

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
from minivlm.course.chapters import CHAPTERS
from minivlm.course.viz import charts, diagrams, patches, style, text, tokens
from minivlm.course.viz.attention import ALLOWED, make_grid, means
from minivlm.course.viz.style import PALETTE, rgb

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

# One call of every function.
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

# What the alt texts must contain.
ALT = {
    "similarity_matrix": "3 images .* 3 texts .* from 0 to 0.9. In 2 of 3 rows .* image 3: cat",
    "softmax_and_sigmoid": "every row sums to 1.* every column sums to 1.* plus the bias −5",
    "attention_mask": "14 query rows .* 8 image queries attend to: image fully, prefix fully and suffix not at all.* "
    "causally",
    "compare_masks": "2 attention masks.* prefix-LM: 55 cells allowed that causal blocks, 0 blocked",
    "attention_over_mask": "“<eos>”, attends to image 57%, prefix 21% and suffix 21%, most to token 0, “<image>”. "
    "Blocked cells have no weight",
    "token_strip": "14 tokens: 8 × <image>, bos “<bos>”, prefix “caption”, newline “↵”, suffix “a cat”",
    "image_row": "3 images in a row: a scene; a map; in fractions",
    "patch_grid": "112×112 pixels cut into 7×7 patches of 16×16 pixels, numbered 0 to 48",
    "position_similarity": "7×7 heat maps of 7×7 cells.* Neighbors have",
    "attention_on_image": "7×7 patches. one: strongest in row 7, column 7, with 4%; ↵",
    "nearest_words": r"Most often cat \(17\), bird \(16\) and dog \(16\). row 1: cat, dog, bird",
    "codebook": r"21 codes. 20 of them are used, most often 002 .7×., 000 .* 7 are mostly inside, 7 .* 6 between",
    "lines": "Squares. A chart of y against x. a: 1 at 1, 9 at 3.* b: 5 at 1, 5 at 2",
    "cache_growth": "MQA: 18.4 KB per token, 4.72 MB at 224 px, 18.9 MB at 448 px, 75.5 MB at 896 px; MHA: 147 KB",
    "sampling_distribution": "most likely first: ↵ 64%, a 23%, two 8.6%.* 3 tokens of 5 kept. .* rises to 67%",
    "blocks": "resize → normalize, -1 … 1. Then, in the next row: tokens. Highlighted: tokens.",
    "you_are_here": "chapter 05, the prefix-LM mask.* Highlighted: sequence",
    "families": "VisualBERT, SimVLM, CM3 and PaliGemma.* ClipCap.* VisualGPT and Flamingo.* MAGiC",
}


@cache
def drawn(name: str) -> viz.Figure:
    return CALLS[name]()


def pixels(figure: viz.Figure) -> np.ndarray:
    return np.asarray(figure.image).astype(int)


def area_of(figure: viz.Figure, color: str) -> int:
    """How many pixels have exactly this color."""
    return int((pixels(figure) == rgb(color)).all(-1).sum())


# --- every figure --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # such as a letter that the font lacks
@pytest.mark.parametrize("name", CALLS)
def test_every_figure_has_alt_text_and_is_reproducible(name):
    figure, again = drawn(name), CALLS[name]()
    assert isinstance(figure, viz.Figure) and figure.image.mode == "RGB"
    assert 400 <= figure.size[0] <= 800 and 40 <= figure.size[1] <= 800
    assert abs(figure.image.width - 2 * figure.size[0]) <= 1  # sharp on screens with two pixels per CSS pixel
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 4
    assert re.search(ALT[name], figure.alt), figure.alt
    assert figure.png() == again.png()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_cut_off_at_the_edge(name):
    """The outermost pixels are white. Text that is cut off would leave dark ones there."""
    image = pixels(drawn(name))
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge > 250).all()


def test_every_public_function_is_tested_here():
    drawn_elsewhere = {"draw_boxes", "draw_sheet", "from_figure", "read_tokens", "Figure", "Token"}
    drawn_elsewhere |= {"sliders", "rotated_pairs", "decode_step"}  # in tests/test_widgets.py
    assert set(CALLS) == {name for name in viz.__all__ if name not in drawn_elsewhere | set(viz._NEED_TORCH)}


def test_settings_of_a_notebook_have_no_effect(monkeypatch):
    plain = drawn("lines").png()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "figure.facecolor", "black")
    assert CALLS["lines"]().png() == plain
    assert matplotlib.rcParams["font.size"] == 30  # and are unchanged


def test_importing_viz_imports_neither_torch_nor_matplotlib():
    code = "import sys, minivlm.course.viz; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_figure_preserves_size_and_alt_text():
    orange = Figure(figsize=(3, 2), dpi=100, facecolor=PALETTE[0])
    figure = viz.from_figure(orange, "orange")
    assert figure.size == (300, 200) and figure.image.size == (600, 400) and orange.dpi == 100
    assert area_of(figure, PALETTE[0]) == 600 * 400 and figure.alt == "orange"
    with pytest.raises(ValueError, match="alt text is empty"):
        viz.from_figure(orange, " ")


# --- one by one ----------------------------------------------------------------------------------------------------


def test_similarity_frames_the_given_truth():
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
    assert np.corrcoef(rows, columns)[0, 1] < -0.9  # the bright cells go from the lower left to the upper right
    assert (image == darkest).all(-1).sum() > 2 * len(rows)


def test_the_bias_changes_only_the_sigmoid():
    logits = np.array([[2.0, 0.0], [1.0, 3.0]])
    figure, shifted = (viz.softmax_and_sigmoid(logits, bias=b) for b in (0.0, -4.0))
    middle = figure.image.height // 2
    assert (pixels(figure)[:middle] == pixels(shifted)[:middle]).all()
    assert (pixels(figure)[middle:, :400] == pixels(shifted)[middle:, :400]).all()
    assert (pixels(figure)[middle:, 400:] != pixels(shifted)[middle:, 400:]).any()
    assert "rows sum to 1.38 to 1.68" in figure.alt
    assert "nan" not in viz.softmax_and_sigmoid([[1000.0, -1000.0]]).alt


def test_a_mask_fills_as_many_cells_as_it_allows():
    for length in (3, 5):
        everything = area_of(viz.attention_mask(np.ones((length, length))), ALLOWED)
        causal = area_of(viz.attention_mask(masks.causal_mask(length)), ALLOWED)
        legend = 14 * 14
        share = (causal - legend) / (everything - legend)
        assert share == pytest.approx((length + 1) / (2 * length), abs=0.02)


def test_a_blocked_cell_is_drawn_at_its_position():
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


def test_long_runs_of_image_tokens_are_one_cell_that_shows_the_share_of_allowed_pairs():
    assert [run.length for run in tokens.runs(SEQUENCE)] == [8] + [1] * 6
    grid = make_grid((14, 14), SEQUENCE, 0, 0, 600)
    assert means(MASK.numpy(), grid).shape == (7, 7)
    assert means(MASK.numpy(), grid)[0, 0] == 1 and means(masks.causal_mask(14).numpy(), grid)[0, 0] == 36 / 64
    # the queries may start inside the run
    grid = make_grid((12, 14), SEQUENCE, 0, 0, 600)
    assert means(masks.causal_mask(14).numpy()[2:], grid)[0, 0] == (3 + 4 + 5 + 6 + 7 + 8) / 48
    # the 256 image tokens of PaliGemma at 224 pixels
    many = [SEQUENCE[0]] * 256 + SEQUENCE[8:]
    types = torch.tensor([[0] * 259 + [1] * 3])
    assert viz.attention_mask(masks.prefix_lm_mask(types)[0], many).size[1] < 720


def test_a_cell_is_filled_to_the_share_of_its_allowed_pairs():
    def filled(mask, draw):
        """How many lines of pixels are filled."""
        return int((pixels(draw(mask))[:-88] == rgb(ALLOWED)).all(-1).any(1).sum())  # without the legend

    def alone(mask):
        return viz.attention_mask(mask, SEQUENCE[:8])

    def beside(mask):
        return viz.compare_masks({"none": np.zeros((8, 8)), "mask": mask}, SEQUENCE[:8])

    for draw in (alone, beside):
        everything, one_blocked = filled(np.ones((8, 8)), draw), np.ones((8, 8))
        one_blocked[0, 7] = 0
        assert filled(one_blocked, draw) / everything == pytest.approx(63 / 64, abs=0.06)
        assert filled(one_blocked, draw) < everything - 1  # visibly not all, however large the share is
        assert filled(masks.causal_mask(8), draw) / everything == pytest.approx(36 / 64, abs=0.02)
        assert filled(np.eye(8), draw) / everything == pytest.approx(8 / 64, abs=0.02)
        assert 0 < filled(np.eye(8) * (np.arange(8) == 3), draw) < filled(np.eye(8), draw)
    with_note, without = viz.attention_mask(one_blocked, SEQUENCE[:8]), viz.attention_mask(MASK[:8, :8], SEQUENCE[:8])
    assert (pixels(with_note)[-88:] != 255).sum() > (pixels(without)[-88:] != 255).sum()  # the legend explains it


def test_a_decode_step_is_one_row():
    alt = viz.attention_mask(MASK[-1:], SEQUENCE).alt
    assert "1 query row by 14 key columns" in alt and "The suffix query attends to: image fully" in alt


def test_compare_masks_frames_only_cells_that_differ():
    same = viz.compare_masks({"one": MASK, "two": MASK}, SEQUENCE)
    other = MASK.clone()
    other[-1, 0] = False
    different = viz.compare_masks({"one": MASK, "two": other}, SEQUENCE)
    assert area_of(different, style.VERMILION) - area_of(same, style.VERMILION) > 40
    assert "two: 0 cells allowed that one blocks, 1 blocked that it allows" in different.alt


def test_attention_over_mask_shows_a_leak():
    leaking = WEIGHTS.clone()
    leaking[0, -1] = 0.25
    assert "A blocked cell has the weight 0.25" in viz.attention_over_mask(leaking, MASK, SEQUENCE).alt


def test_read_tokens_finds_the_kinds_of_a_batch(tiny_processor):
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
    figure = viz.token_strip(batch, tiny_processor)
    in_loss = sum(token.label >= 0 for token in first)
    assert f"The loss is on {in_loss} tokens. Row 1 of {len(second)} tokens: 9 × <image>" in figure.alt
    unlabeled = {name: value for name, value in batch.items() if name != "labels"}
    assert viz.token_strip(unlabeled, tiny_processor).image.height < figure.image.height
    plain = {"input_ids": batch["input_ids"]}  # without a mask, padding is found by its id
    assert viz.read_tokens(plain, tiny_processor)[0].kind == "padding"


def test_a_long_sequence_takes_several_lines():
    token = [viz.Token("butterfly", "suffix")]
    one, three = viz.token_strip(token * 3), viz.token_strip(token * 24)
    assert three.image.height > 2 * one.image.height and three.image.width == one.image.width


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_of_a_batch_are_aligned(tiny_processor, side):
    """Also where one row has a collapsed run of padding or image tokens and the other has single tokens."""
    prompts = ["caption en", "answer en how many cats and dogs and owls are there?"]
    batch = tiny_processor(prompts, [Image.new("RGB", (12, 12))] * 2, padding_side=side)
    rows = [tokens.runs(viz.read_tokens(batch, tiny_processor, row)) for row in (0, 1)]
    assert any(run.token.kind == "padding" and run.length > 1 for run in rows[0])
    lines = tokens.layout(rows)
    for first, second in lines:
        assert first[-1][2].stop == second[-1][2].stop and first[-1][1] == second[-1][1]
        starts = [{run.start: x0 for x0, _, run in boxes} for boxes in (first, second)]
        common = starts[0].keys() & starts[1].keys()
        assert common and all(starts[0][t] == starts[1][t] for t in common)
    for row, boxes in enumerate(zip(*lines, strict=True)):  # no token is lost, and no box overlaps the next
        drawn = [box for line in boxes for box in line]
        assert [t for _, _, run in drawn for t in range(run.start, run.stop)] == list(range(rows[row][-1].stop))
        assert all(a[1] <= b[0] for line in boxes for a, b in zip(line, line[1:], strict=False))


def test_rows_of_equal_length_end_at_the_same_x():
    rows = [[viz.Token("<pad>", "padding")] * 9 + [viz.Token("<eos>", "eos")], [viz.Token("cat", "prefix")] * 9]
    rows[1].append(viz.Token("<eos>", "eos"))
    eos = (pixels(viz.token_strip(rows)) == rgb(style.VERMILION)).all(-1)
    upper, lower = eos[: len(eos) // 2].any(0).nonzero()[0], eos[len(eos) // 2 :].any(0).nonzero()[0]
    assert len(upper) > 20 and upper.tolist() == lower.tolist()


def test_a_run_that_crosses_a_line_break_is_cut_there():
    rows = [[viz.Token("<image>", "image")] * 40, [viz.Token(f"butterfly {i}", "suffix") for i in range(40)]]
    lines = tokens.layout([tokens.runs(row) for row in rows])
    assert len(lines) > 1 and all(image[0][2].length == len(text) for image, text in lines)


def test_whitespace_and_missing_letters_are_visible():
    assert text.visible(" a\n") == "␣a↵" and text.visible("") == "∅" and text.visible("\U0001f98b中") == "��"
    assert text.fit("butterfly", 30, 13).endswith("…") and text.fit("cat", 200, 13) == "cat"


def test_patches_are_in_reading_order():
    colors = np.zeros((6, 9, 3), dtype=np.uint8)
    colors[2:4, 3:6] = 255
    cut = patches.cut(Image.fromarray(colors[:, :8]), 2)
    assert len(cut) == 12 and np.asarray(cut[0]).max() == 0
    white = [k for k, patch in enumerate(cut) if np.asarray(patch).min() == 255]
    assert white == [6]  # row 1, column 2. Only half of the patch before it is white
    numbered, bare = (viz.patch_grid(SCENE, 16, numbers=flag) for flag in (True, False))
    assert numbered.png() != bare.png()
    many = viz.patch_grid(SCENE, 7)  # 256 patches do not fit into one line
    assert "numbered 0 to 255" in many.alt


def test_axis_labels_of_maps():
    maps = [np.eye(4)] * 2
    labeled = viz.image_row(maps, ["a", "b"], x_label="key →", y_label="← query")
    plain = viz.image_row(maps, ["a", "b"])
    assert labeled.alt == "2 images in a row: a; b. Columns: key. Rows: query."
    assert labeled.image.height > plain.image.height and plain.alt == "2 images in a row: a; b."
    image = pixels(labeled)
    assert (image[:36, 64:] != 255).any() and (image[40:400, :60] != 255).any()


def test_a_skip_passes_above_the_stages_between():
    rows = [["x", "norm", "attention", "+"], ["next"]]
    plain, skipping = viz.blocks(rows), viz.blocks(rows, skips=[("x", "+")])
    assert area_of(plain, style.VERMILION) == 0
    drawn_rows, columns = (pixels(skipping) == rgb(style.VERMILION)).all(-1).nonzero()
    assert columns.max() - columns.min() > 800 and drawn_rows.max() < 80
    assert "An arrow also leads from x to + directly" in skipping.alt


def test_position_similarity_finds_neighbors():
    position = np.stack(np.meshgrid(np.arange(16), np.arange(16), indexing="ij"), -1).reshape(256, 2)
    vectors = np.exp(-((position[:, None] - position[None]) ** 2).sum(-1) / 8)
    alt = viz.position_similarity(vectors).alt
    near, far = re.search(r"Neighbors have (\S+) on average, all others (\S+)\.", alt).groups()
    assert float(near) > 0.9 > 0.2 > float(far)
    assert "8×8 heat maps of 16×16 cells" in alt


def test_attention_on_image_frames_the_strongest_patch():
    weights = np.ones(49)
    weights[24] = 9  # the middle
    figure = viz.attention_on_image(SCENE, weights)
    assert "panel 1: strongest in row 4, column 4, with 16%" in figure.alt
    rows, columns = (pixels(figure) == rgb(style.VERMILION)).all(-1).nonzero()
    assert abs(columns.mean() - 800) < 6 and abs(rows.mean() - 2 * (12 + 190)) < 6


def test_a_codebook_shows_the_shape_of_every_used_code():
    ends = (matplotlib.colormaps["cividis"](end, bytes=True)[:3] for end in (0.0, 1.0))
    outside, inside = ("#" + bytes(color).hex() for color in ends)
    used, never = viz.codebook(SHAPES, [1, 1, 1]), viz.codebook(SHAPES, [1, 1, 0])
    areas = {color: [area_of(figure, color) for figure in (used, never)] for color in (outside, inside)}
    assert areas[inside][0] - areas[inside][1] > 1500 and areas[outside][0] == areas[outside][1]  # 42 × 42
    assert "3 of them are used" in used.alt and "2 of them are used" in never.alt
    assert "used" not in viz.codebook(SHAPES).alt
    assert viz.codebook(5 * SHAPES).png() == viz.codebook(SHAPES).png()  # clipped


def test_lines_differ_without_color():
    looks = [(look["marker"], str(look["linestyle"])) for look in charts.LOOKS]
    assert len({marker for marker, _ in looks}) == len({dashes for _, dashes in looks}) == len(looks)
    straight = {"a": ([1, 10, 100], [1, 10, 100])}
    figures = [viz.lines(straight, "t", "x", "y", log=log) for log in ("", "x", "y", "xy")]
    assert len({figure.png() for figure in figures}) == 4


def test_names_of_curves_are_beside_their_ends():
    """At twice the pixels too: all ink to the right of the axes is at the height at which a curve ends."""
    image = np.asarray(viz.lines({"high": ([1, 2], [5, 9]), "low": ([1, 2], [9, 5])}, "t", "x", "y").image.convert("L"))
    scale = image.shape[0] / 440
    rows = np.flatnonzero((image[:, -round(50 * scale) :] < 128).any(1)) / scale
    bottom, top = 440 - 54, 46
    ends = [bottom - (bottom - top) * y / 9.2 for y in (9, 5)]  # the y axis is from 0 to 9.2
    assert all(np.abs(rows - end).min() < 5 for end in ends)
    assert all(min(abs(row - end) for end in ends) < 12 for row in rows)


def test_names_of_curves_do_not_overlap():
    placed = charts.spread([10, 11, 12, 300], 17, 0, 310)
    assert np.diff(placed).min() >= 17 and placed[-1] <= 310
    assert np.diff(charts.spread([300, 301, 302], 17, 0, 310)).min() >= 17
    assert charts.spread([300, 301, 302], 17, 0, 310)[-1] == 310


def test_tick_labels_of_logarithmic_axes():
    assert [charts.power_of_ten(v, 0) for v in (0.01, 1, 10_000, 1e6, 1e13, 1e-9)] == [
        "0.01",
        "1",
        "10,000",
        "10⁶",
        "10¹³",
        "10⁻⁹",
    ]
    assert [charts.in_bytes(n) for n in (1, 999, 18432, 2.5e9)] == ["1 bytes", "999 bytes", "18.4 KB", "2.5 GB"]


def test_filtered_logits_say_which_tokens_are_kept():
    filtered = generation.top_k_filter(LOGITS[None], 2)[0]
    by_logits = viz.sampling_distribution(LOGITS, VOCABULARY, filtered)
    by_flags = viz.sampling_distribution(LOGITS, VOCABULARY, [True, False, True, False, False])
    assert by_logits.png() == by_flags.png() and "2 tokens of 5 kept" in by_logits.alt
    everything = viz.sampling_distribution(LOGITS, VOCABULARY)
    assert "kept" not in everything.alt and everything.png() != by_logits.png()
    assert area_of(everything, PALETTE[4]) > area_of(by_logits, PALETTE[4])  # cut bars are not filled
    top = viz.sampling_distribution(LOGITS, VOCABULARY, top=2)
    assert "↵ 64% and a 23%" in top.alt


def test_sampling_reads_the_tokens_from_a_processor(tiny_processor):
    logits = torch.zeros(tiny_processor.tokenizer.get_vocab_size())
    logits[tiny_processor.eos_token_id] = 9
    assert "most likely first: <eos>" in viz.sampling_distribution(logits, tiny_processor).alt


def test_every_chapter_has_its_place_on_the_map():
    figures = {chapter: viz.you_are_here(chapter) for chapter in diagrams.HIGHLIGHTED}
    assert set(figures) <= set(CHAPTERS) and len({figure.png() for figure in figures.values()}) == len(figures) == 9
    highlight = style.tint(style.ORANGE, 0.45)
    assert area_of(figures["00"], highlight) == 0
    assert all(area_of(figure, highlight) > 1000 for chapter, figure in figures.items() if chapter != "00")
    assert {part for parts in diagrams.HIGHLIGHTED.values() for part in parts} == set(diagrams.PARTS)


# --- errors --------------------------------------------------------------------------------------------------------

NAN = float("nan")
WRONG = {
    "similarity: one image too few": (lambda: viz.similarity_matrix(TABLE, NAMES[:2], NAMES), "3 rows .* 2 images"),
    "similarity: one word too many": (lambda: viz.similarity_matrix(TABLE, NAMES, NAMES + ["x"]), "3 strings"),
    "similarity: words in one string": (lambda: viz.similarity_matrix(TABLE, NAMES, "cat"), "list of 3 strings"),
    "similarity: truth out of range": (lambda: viz.similarity_matrix(TABLE, NAMES, NAMES, [0, 1, 3]), "from 0 to 2"),
    "similarity: NaN": (lambda: viz.similarity_matrix([[NAN]], ["a"], ["b"]), "finite numbers"),
    "similarity: a vector": (lambda: viz.similarity_matrix([1.0, 2.0], ["a"], ["b"]), "2 dimensions"),
    "similarity: strings": (lambda: viz.similarity_matrix([["x"]], ["a"], ["b"]), "array of numbers"),
    "softmax: too large": (lambda: viz.softmax_and_sigmoid(np.zeros((9, 9))), "at most 8 × 8"),
    "mask: more queries than keys": (lambda: viz.attention_mask(np.ones((3, 2))), "3 queries"),
    "mask: too many cells": (lambda: viz.attention_mask(np.ones((1001, 1001))), "too many to draw"),
    "mask: batch not removed": (lambda: viz.attention_mask(MASK[None], SEQUENCE), "2 dimensions"),
    "mask: tokens missing": (lambda: viz.attention_mask(MASK, SEQUENCE[:-1]), "14 keys and 13 tokens"),
    "compare: only one": (lambda: viz.compare_masks({"a": MASK}), "two to six"),
    "compare: shapes": (lambda: viz.compare_masks({"a": MASK, "b": MASK[:3]}), "different shapes"),
    "weights: shape": (lambda: viz.attention_over_mask(WEIGHTS[:3], MASK), "must have the same shape"),
    "weights: logits": (lambda: viz.attention_over_mask(WEIGHTS - 1, MASK), "after the softmax"),
    "strip: no tokenizer": (lambda: viz.token_strip({"input_ids": [[1]]}), "Pass the processor"),
    "strip: empty": (lambda: viz.token_strip([]), "not empty"),
    "strip: words": (lambda: viz.token_strip(["a", "b"]), "lists of Tokens"),
    "token: unknown kind": (lambda: viz.Token("a", "verb"), "not 'verb'"),
    "row: nothing": (lambda: viz.image_row([]), "at least one image"),
    "row: titles": (lambda: viz.image_row([SCENE], ["a", "b"]), "1 string"),
    "row: columns": (lambda: viz.image_row([SCENE], columns=0), "at least 1"),
    "row: channels first": (lambda: viz.image_row([np.zeros((3, 8, 8))]), "Channels go last"),
    "row: normalized pixels": (lambda: viz.image_row([np.full((8, 8, 3), -1.0)]), "Undo the normalization"),
    "patches: no multiple": (lambda: viz.patch_grid(SCENE, 15), "cannot be cut into patches of 15"),
    "patches: zero": (lambda: viz.patch_grid(SCENE, 0), "cannot be cut"),
    "positions: no square": (
        lambda: viz.position_similarity(np.ones((50, 4))),
        "position_embeddings .* 50 is not a square",
    ),
    "heat: no square": (lambda: viz.attention_on_image(SCENE, np.ones(50)), "weights .* 50 is not a square"),
    "heat: titles": (lambda: viz.attention_on_image(SCENE, np.ones((2, 49)), ["a"]), "2 strings"),
    "words: no square": (lambda: viz.nearest_words(SCENE, WORDS[:-1]), "words .* 48 is not a square"),
    "words: scores": (lambda: viz.nearest_words(SCENE, WORDS, [0.5]), "49 words and 1 scores"),
    "codebook: too many": (lambda: viz.codebook(np.zeros((129, 2, 2))), "129 shapes are too many"),
    "codebook: counts": (lambda: viz.codebook(SHAPES, [1, 2]), "3 shapes and 2 counts"),
    "codebook: one shape": (lambda: viz.codebook(SHAPES[0]), "3 dimensions"),
    "lines: none": (lambda: viz.lines({}, "t", "x", "y"), "one to 7 series"),
    "lines: lengths": (lambda: viz.lines({"a": ([1, 2], [1])}, "t", "x", "y"), "2 x values and 1 y values"),
    "lines: logarithm of 0": (lambda: viz.lines({"a": ([0, 2], [1, 1])}, "t", "x", "y", "x"), "positive values"),
    "lines: unknown axis": (lambda: viz.lines({"a": ([1], [1])}, "t", "x", "y", "z"), "not 'z'"),
    "cache: nothing": (lambda: viz.cache_growth({}), "one to 7 models"),
    "cache: no bytes": (lambda: viz.cache_growth({"a": 0}), "must be positive"),
    "cache: mark too far": (lambda: viz.cache_growth({"a": 1}, longest=1000), "longest sequence, 1000"),
    "sampling: words": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY[:2]), "5 strings"),
    "sampling: kept": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY, [True]), "5 logits and 1 value"),
    "sampling: nothing kept": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY, [False] * 5), "No token is kept"),
    "sampling: all −inf": (lambda: viz.sampling_distribution([-math.inf], ["a"]), "must be finite"),
    "sampling: none shown": (lambda: viz.sampling_distribution(LOGITS, VOCABULARY, top=0), "top must be"),
    "blocks: none": (lambda: viz.blocks([]), "one to six stages"),
    "blocks: unknown highlight": (lambda: viz.blocks([["a"]], "b"), "'b' is not one of the stages"),
    "blocks: skip between rows": (lambda: viz.blocks([["a"], ["b"]], skips=[("a", "b")]), "two stages of one row"),
    "map: no chapter": (lambda: viz.you_are_here("9"), '"00" to "08"'),
    "title: too long": (lambda: viz.token_strip(SEQUENCE, title="word " * 40), "too long for one line"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_raise_a_clear_error(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value) and str(error.value)[-1] in ".]"


def test_a_row_outside_the_batch(tiny_processor):
    with pytest.raises(ValueError, match="no row 3"):
        viz.read_tokens({"input_ids": [[1]]}, tiny_processor, row=3)
