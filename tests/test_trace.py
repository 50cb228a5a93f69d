"""The tensor trace: it records what the model computes, and each of its forms can be read and stepped through."""

import base64
import copy
import io
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from browser import PATIENCE, chromium, exported, jupyterlab, notebook_with, quiet_page
from conftest import tiny_model, with_eos
from PIL import Image

import minivlm
from minivlm import masks, paligemma
from minivlm.course import viz
from minivlm.course.viz import trace_figures
from minivlm.course.viz.style import VERMILION, rgb
from minivlm.course.viz.text import number
from minivlm.course.viz.tokens import token_text
from minivlm.course.viz.trace_data import Statistics
from minivlm.course.viz.trace_steps import MERGED, PARTS, steps
from minivlm.course.viz.tracing import Trace
from minivlm.generation import generate_ids, prepare_inputs

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))
LAYERS = "language_model.model.layers."


@pytest.fixture(scope="module")
def traced(talker, tiny_processor) -> Trace:
    return viz.trace(talker, tiny_processor, IMAGE, "caption en", "a cat and two dogs")


@pytest.fixture(scope="module")
def batch(tiny_processor) -> dict[str, torch.Tensor]:
    batch = tiny_processor(["caption en"], [IMAGE], ["a cat and two dogs"])
    batch.pop("labels")
    return batch


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# --- what is recorded ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_tensors_equal_those_of_the_model(talker, traced, batch):
    tower, decoder = talker.vision_tower.vision_model, talker.language_model.model
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    features = talker.encode_image(pixels)
    merged = talker.embed(ids, features)
    text = ids.masked_fill(ids == talker.config.image_token_index, 0)
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # as a convolution
    torch.testing.assert_close(traced.tensor("vision_tower.vision_model.embeddings.patch_embedding"), patches)
    expected = {
        "pixel_values": pixels,
        "vision_tower.vision_model.embeddings": tower.embeddings(pixels),
        "vision_tower.vision_model.post_layernorm": talker.vision_tower(pixels),
        "multi_modal_projector": features,
        "language_model.model.embed_tokens": decoder.embed_tokens(text),
        "language_model.model.embed": decoder.embed(text),
        "inputs_embeds": merged,
        "language_model.model.norm": decoder(merged, batch["attention_mask"], batch["token_type_ids"]),
        "logits": talker(**batch),
    }
    for name, tensor in expected.items():
        assert torch.equal(traced.tensor(name), tensor), name


def test_every_layer_adds_up(talker, traced):
    """The residual stream after a layer is the one before it plus the outputs of the two blocks."""
    parts = ("post_attention_layernorm", "post_feedforward_layernorm")
    before = "inputs_embeds"
    for i in range(4):
        blocks = parts if talker.config.text_config.has_post_norms else ("self_attn", "mlp")
        total = traced.tensor(before) + sum(traced.tensor(f"{LAYERS}{i}.{block}") for block in blocks)
        torch.testing.assert_close(total, traced.tensor(f"{LAYERS}{i}"), rtol=1e-5, atol=1e-5)
        before = f"{LAYERS}{i}"


@torch.no_grad()
def test_attention_is_what_the_model_computes(talker, traced):
    """Weights times values, through the output projection, is the output of the module."""
    for step in steps(talker):
        if step.label == "self_attn":
            q, k, v, weights = (traced.tensor(f"{step.name}.{part}") for part in PARTS)
            attention = talker.get_submodule(step.name)
            mixed = weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            project = attention.out_proj if step.stage == "Vision tower" else attention.o_proj
            output = project(mixed.transpose(1, 2).flatten(2))
            torch.testing.assert_close(output, traced.tensor(step.name), rtol=1e-5, atol=1e-5)
            if step.stage == "Decoder":
                window = talker.config.text_config.window(step.layer)
                allowed = traced.tensor("mask" if window is None else "sliding_mask")
                assert (weights[0] > 0).any(0).logical_and(~allowed[0]).sum() == 0
                assert k.shape == v.shape == (1, attention.config.num_key_value_heads, q.shape[2], q.shape[3])


def test_the_residual_stream_between_attention_and_mlp(talker, traced):
    for step in steps(talker):
        if step.layer is not None and step.label == "output":
            tower = step.stage == "Vision tower"
            mlp = "mlp" if tower or not talker.config.text_config.has_post_norms else "post_feedforward_layernorm"
            total = traced.tensor(f"{step.name}.residual") + traced.tensor(f"{step.name}.{mlp}")
            assert torch.equal(total, traced.tensor(step.name))


def test_the_masks_equal_those_of_the_masks_module(talker, traced, batch):
    window = talker.config.text_config.sliding_window
    T = batch["input_ids"].shape[1]
    full, sliding = masks.attention_masks(batch["attention_mask"], batch["token_type_ids"], T, window)
    assert torch.equal(traced.tensor("mask"), full)
    assert ("sliding_mask" in traced) == (window is not None)
    if window is not None:
        assert torch.equal(traced.tensor("sliding_mask"), sliding) and not torch.equal(full, sliding)


def test_a_mask_that_blocks_nothing_is_recorded_too(talker, tiny_processor):
    traced = viz.trace(talker, tiny_processor, IMAGE, "caption en")
    assert traced.tensor("mask").all() and traced["mask"].shape == (1, *[traced["logits"].shape[1]] * 2)


def test_every_tensor_is_recorded_in_the_order_of_computation(talker, traced):
    modules = [step.name for step in steps(talker)]
    assert [name for name in traced.names if name in modules] == modules
    for first, second in (
        ("pixel_values", "vision_tower.vision_model.embeddings.patch_embedding"),
        ("vision_tower.vision_model.embeddings.patch_embedding", "vision_tower.vision_model.embeddings"),
        ("language_model.model.embed_tokens", "language_model.model.embed"),
        ("language_model.model.embed", "inputs_embeds"),
        ("inputs_embeds", "mask"),
        (f"{LAYERS}0.input_layernorm", f"{LAYERS}0.self_attn.q"),
        (f"{LAYERS}0.self_attn.weights", f"{LAYERS}0.self_attn"),
        (f"{LAYERS}0.self_attn", f"{LAYERS}0.residual"),
        (f"{LAYERS}0.residual", f"{LAYERS}0.mlp"),
        ("language_model.model.norm", "logits"),
    ):
        assert traced.names.index(first) < traced.names.index(second)
    mask = 2 if "sliding_mask" in traced else 1
    per_layer = 12 if talker.config.text_config.has_post_norms else 10
    assert len(traced) == 1 + (2 + 3 * 10 + 1) + 1 + 3 + mask + (4 * per_layer + 1) + 1 == len(set(traced.names))


def test_shapes_dtypes_and_statistics_match_the_tensors(traced):
    letters = {}
    for entry in traced:
        tensor, values = entry.tensor, entry.tensor.double()
        assert entry.shape == tuple(tensor.shape) and entry.dtype == ("bool" if "mask" in entry.name else "float32")
        stats = (entry.stats.min, entry.stats.max, entry.stats.mean, entry.stats.std)
        expected = (values.min(), values.max(), values.mean(), values.std(correction=0))
        assert stats == pytest.approx([v.item() for v in expected], rel=1e-5, abs=1e-6)
        assert entry.stats.broken == 0 and not tensor.requires_grad
        for letter, size in zip(entry.step.letters.split(), entry.shape, strict=True):
            part = {"Image": "image", "Vision tower": "tower"}.get(entry.step.stage, "decoder")
            letters.setdefault((letter, part), set()).add(size)
    assert all(len(sizes) == 1 for sizes in letters.values()), letters
    assert letters["P", "tower"] == {9} and letters["D", "tower"] == {24} and letters["D", "decoder"] == {32}
    assert letters["H", "decoder"] == {4} and letters["N", "tower"] == {2} and letters["d", "tower"] == {12}


def test_titles_are_short(traced):
    assert all(entry.title and len(entry.title.split()) <= 12 for entry in traced)


def test_statistics_ignore_nan_and_infinity():
    stats = Statistics.of(torch.tensor([1.0, 3.0, float("nan"), float("-inf")]))
    assert (stats.min, stats.max, stats.mean, stats.std, stats.broken) == (1, 3, 2, 1, 0.5)
    nothing = Statistics.of(torch.full((2,), float("nan")))
    assert np.isnan(nothing.mean) and nothing.broken == 1


def test_nan_is_visible_and_reported(tiny_processor):
    model = tiny_model(1, vocab_size=tiny_processor.tokenizer.get_vocab_size())
    model.config.image_token_index = tiny_processor.image_token_id
    with torch.no_grad():
        model.vision_tower.vision_model.post_layernorm.weight[5] = float("nan")
    traced = viz.trace(model, tiny_processor, IMAGE, "caption en")
    entry = traced["vision_tower.vision_model.post_layernorm"]
    assert entry.stats.broken == pytest.approx(1 / 24)
    assert "NaN" in entry.figure.alt and "NaN" in entry.caption and "4.2% NaN or infinite" in str(traced)
    assert not traced.next_tokens and "NaN" in traced["logits"].figure.alt and "NaN" in traced.overview.alt
    column = np.asarray(entry.figure.image)[:, 5]
    assert (column == rgb(VERMILION)).all()


def test_bfloat16_is_not_converted(tiny_processor):
    model = tiny_model(2, vocab_size=tiny_processor.tokenizer.get_vocab_size()).bfloat16()
    model.config.image_token_index = tiny_processor.image_token_id
    traced = viz.trace(model, tiny_processor, IMAGE, "caption en")
    assert traced["logits"].dtype == "bfloat16" and traced["pixel_values"].dtype == "float32"


def test_the_model_is_unchanged(talker, tiny_processor, monkeypatch):
    before = {name: value.clone() for name, value in talker.state_dict().items()}
    viz.trace(talker, tiny_processor, IMAGE, "caption en")
    assert hooks(talker) == 0
    assert all(torch.equal(value, before[name]) for name, value in talker.state_dict().items())

    def fail(*args):
        assert hooks(talker) > 0
        raise RuntimeError("in the middle")

    monkeypatch.setattr(masks, "attention_masks", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        viz.trace(talker, tiny_processor, IMAGE, "caption en")
    assert hooks(talker) == 0


def test_a_trace_is_a_sequence_with_names(traced):
    assert traced[0].name == "pixel_values" and traced[-1] is traced["logits"] is list(traced)[-1]
    assert "logits" in traced and "logit" not in traced and len(traced[:3]) == 3
    assert traced.tensor(f"{LAYERS}0.self_attn") is traced[f"{LAYERS}0.self_attn"].tensor


def test_a_wrong_name_raises_an_error_with_similar_names(traced):
    with pytest.raises(ValueError, match=r"'layers.2.self_atn'. Similar names: .*layers\.2\.self_attn"):
        traced["layers.2.self_atn"]
    with pytest.raises(ValueError, match="'image'. Similar names: "):
        traced.tensor("image")


def test_errors_of_the_processor_are_raised(talker, tiny_processor):
    with pytest.raises(ValueError, match="prompt"):
        viz.trace(talker, tiny_processor, IMAGE, "<image> caption en")


def test_the_next_tokens_follow_the_prompt(talker, traced, batch, tiny_processor):
    last = int((batch["token_type_ids"][0] == 0).sum()) - 1
    p, ids = talker(**batch)[0, last].softmax(-1).topk(5)
    assert [chance for _, chance in traced.next_tokens] == pytest.approx(p.tolist())
    names = [tiny_processor.tokenizer.id_to_token(i) for i in ids.tolist()]
    assert [token.replace(" ", "▁").replace("↵", "\n") for token, _ in traced.next_tokens] == names
    assert traced.next_tokens[0][0] in traced["logits"].figure.alt


# --- next words, decode steps ---------------------------------------------------------------------------------------


def test_the_next_words_of_the_last_layer_are_the_models(traced):
    assert traced.next_words() == traced.next_tokens
    for position in (0, 5, len(traced.sequence) - 1):
        p, _ = traced.tensor("logits")[0, position].softmax(-1).topk(3)
        assert [chance for _, chance in traced.next_words(position=position, k=3)] == pytest.approx(
            p.tolist(), rel=1e-4
        )


@torch.no_grad()
def test_the_next_words_of_a_layer_are_read_through_norm_and_head(talker, traced, tiny_processor):
    decoder = talker.language_model
    hidden = decoder.model.norm(traced.tensor(f"{LAYERS}1")[0])
    for position in (3, 12):
        p, token = decoder.logits(hidden[position]).softmax(-1).max(-1)
        text = tiny_processor.tokenizer.id_to_token(int(token)).replace("▁", " ").replace("\n", "↵")
        assert traced.next_words(layer=1, position=position, k=1) == [(text, pytest.approx(float(p)))]
    rows = re.findall(r"<tr><th>layer (\d)</th>(.*?)</tr>", traced.html(Path.cwd()))
    assert [number for number, _ in rows] == list("3210")
    assert all(row.count("<td>") == len(traced.sequence) - 9 for _, row in rows)


def test_layers_and_positions_that_do_not_exist(traced):
    with pytest.raises(ValueError, match="layer must be from 0 to 3, not 4"):
        traced.next_words(layer=4)
    with pytest.raises(ValueError, match="position must be from 0 to"):
        traced.next_words(position=-1)


def test_a_decode_step_and_its_cache(talker, tiny_processor):
    prefill = viz.trace(talker, tiny_processor, IMAGE, "caption en")
    step = viz.trace(talker, tiny_processor, IMAGE, "caption en", decode=2)
    S = prefill["mask"].shape[2] + 2
    assert "pixel_values" not in step and step.past == step.position == S - 1 and len(step.sequence) == S
    ids = generate_ids(talker, prepare_inputs(tiny_processor, IMAGE, "caption en"), max_new_tokens=2).sequences[0]
    assert step.sequence[: S - 2] == prefill.sequence
    assert step.sequence[S - 2 :] == [token_text(i, tiny_processor).replace("\n", "↵") for i in ids.tolist()]
    inputs = tiny_processor(["caption en"], [IMAGE])
    inputs["input_ids"] = torch.cat((inputs["input_ids"], ids[None]), dim=1)
    inputs["token_type_ids"] = (torch.arange(S) >= S - 2).long()[None]
    inputs.pop("attention_mask")
    with torch.no_grad():
        whole = talker(**inputs)
    torch.testing.assert_close(step.tensor("logits")[0, 0], whole[0, -1], rtol=1e-4, atol=1e-5)
    assert step.next_tokens == step.next_words(position=S - 1)
    for part in ("k", "v"):
        name = f"{LAYERS}3.self_attn.{part}"
        stored = step.tensor(name)
        assert stored.shape[2] == S and torch.equal(stored[:, :, : S - 2], prefill.tensor(name))
    assert step[f"{LAYERS}0.self_attn.weights"].shape == (1, 4, 1, S)
    assert f"slot {S - 1}" in step.html(Path.cwd()) and str(step).startswith("9 × <image> <bos>caption en↵")


def test_decode_steps_that_do_not_exist(talker, tiny_processor):
    with pytest.raises(ValueError, match="Leave the suffix out"):
        viz.trace(talker, tiny_processor, IMAGE, "caption en", suffix="a cat", decode=1)
    first = generate_ids(talker, prepare_inputs(tiny_processor, IMAGE, "caption en"), max_new_tokens=1).sequences[0, 0]
    with pytest.raises(ValueError, match="ends after 0 tokens, so there is no decode step 1"):
        viz.trace(with_eos(talker, int(first)), tiny_processor, IMAGE, "caption en", decode=1)


# --- the difference of two traces -----------------------------------------------------------------------------------


@pytest.fixture
def again(talker, tiny_processor):
    """Traces the same image, prompt and suffix once more."""
    return lambda: viz.trace(talker, tiny_processor, IMAGE, "caption en", "a cat and two dogs")


def causal(token_type_ids):
    return masks.block_mask(torch.ones_like(token_type_ids))


def test_equal_runs_are_said_to_be_equal(traced, again):
    diff = traced.diff(again())
    assert diff.first is None and diff.message.startswith(f"The two runs are equal in all {len(traced)} tensors")
    assert not any(pair.differs for pair in diff) and "≠" not in diff.html(Path.cwd())


def test_a_causal_mask_is_the_first_difference(traced, again, monkeypatch):
    monkeypatch.setattr(masks, "prefix_lm_mask", causal)
    broken = again()
    diff = traced.diff(broken)
    changed = traced.tensor("mask") ^ broken.tensor("mask")
    assert diff.first == "mask" and torch.equal(diff.tensor("mask"), changed)
    assert f"The first tensor that differs is mask: it differs in {int(changed.sum())} pairs" in diff.message
    apart = (traced.tensor("logits") - broken.tensor("logits")).abs()
    assert torch.equal(diff.tensor("logits"), apart) and diff["logits"].largest == apart.max()
    assert not diff["inputs_embeds"].differs and diff[f"{LAYERS}0.self_attn"].differs
    assert [heading for heading, _ in diff["mask"].drawings] == ["this run", "other run", "difference"]
    assert diff["mask"].sentence in diff["mask"].figure.alt and diff.message in diff.overview.alt
    data, metadata = diff._repr_mimebundle_()
    assert diff.message in data["text/html"] and str(diff).startswith(diff.message) and metadata["image/png"]["alt"]


@pytest.mark.parametrize("fault", ["scale", "merge"])
def test_the_first_difference_is_where_the_bug_is(talker, traced, again, monkeypatch, fault):
    if fault == "scale":
        monkeypatch.setattr(talker.language_model.model.layers[2].self_attn, "scale", 1.0)
    else:
        merge = paligemma.merge_image_features
        monkeypatch.setattr(paligemma, "merge_image_features", lambda x, where, features: merge(x, where, 3 * features))
    diff = traced.diff(again())
    assert diff.first == {"scale": f"{LAYERS}2.self_attn.weights", "merge": "inputs_embeds"}[fault]
    pair = diff[diff.first]
    assert f"by up to {number(float(diff.tensor(diff.first).max()))}" in pair.sentence
    this, other = (drawing for _, drawing in pair.drawings[:2])
    assert this.cells["knots"] == other.cells["knots"]  # the same colors mean the same numbers


def test_a_missing_newline_is_a_different_shape(traced, again, monkeypatch):
    build = minivlm.processor.build_prompt
    monkeypatch.setattr(minivlm.processor, "build_prompt", lambda *args: build(*args).removesuffix("\n"))
    diff = traced.diff(again())
    shapes = "1 × 19 × 32 in this run and 1 × 18 × 32"
    assert diff.first == "language_model.model.embed_tokens" and shapes in diff.message
    assert "compare prompts with equally many tokens" in diff.message and diff.html(Path.cwd())
    with pytest.raises(ValueError, match="has the shape .* so there is no difference"):
        diff.tensor("logits")


def test_rounding_is_no_difference_but_nan_is(traced):
    def changed(by: float) -> Trace:
        entries = [replace(entry, tensor=entry.tensor.clone()) for entry in traced]
        entries[3].tensor[0, 0, 0] += by
        other = copy.copy(traced)
        other.entries = entries
        return other

    largest = float(traced[3].tensor.abs().max())
    assert traced.diff(changed(5e-6 * largest)).first is None
    assert traced.diff(changed(5e-6 * largest), tolerance=1e-6).first == traced[3].name
    assert "NaN or infinity in one run only" in traced.diff(changed(float("nan"))).message
    both = changed(float("nan"))
    assert both.diff(both).first is None
    assert both.diff(both).html(Path.cwd())


# --- figures -------------------------------------------------------------------------------------------------------


def test_figures_are_small_and_have_alt_text(traced):
    for entry in traced:
        width, height = entry.figure.image.size
        assert entry.name == "logits" or (width <= 256 and height <= 64)
        assert len(entry.figure.alt) > 20 and entry.caption
    assert traced["mask"].figure.image.size == traced["mask"].shape[1:]


def test_the_pixels_are_the_image(traced):
    assert (np.asarray(traced["pixel_values"].figure.image) == np.asarray(IMAGE)).all()


def test_a_mask_is_light_where_attention_is_allowed(traced):
    brightness = np.asarray(traced["mask"].figure.image).sum(-1)
    allowed = traced.tensor("mask")[0].numpy()
    assert brightness[allowed].min() > brightness[~allowed].max()


def test_heat_maps_sample_evenly_and_larger_numbers_are_lighter():
    table = torch.arange(300.0)[None, None].repeat(1, 200, 1)
    drawing = trace_figures.heat_map(MERGED, table)
    pixels = np.asarray(drawing.figure.image).astype(int).sum(-1)
    assert pixels.shape == (64, 64) and (pixels == pixels[0]).all() and (np.diff(pixels[0]) >= 0).all()
    assert "64 × 64 of them" in drawing.caption and "200 tokens by 300 dimensions" in drawing.figure.alt
    assert trace_figures.heat_map(MERGED, torch.zeros(1, 3, 4)).figure.image.size == (4, 3)


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(-3, 5, 400),
        torch.cat((torch.zeros(396), torch.tensor([0.2, 0.4, 0.8, 9.0]))),  # like attention weights
        torch.cat((torch.linspace(-1, 1, 390), torch.linspace(-900, 900, 10))),  # massive activations
        torch.full((400,), 2.5),
    ],
    ids=["even", "mostly 0", "a few huge", "constant"],
)
def test_the_numbers_can_be_read_back_from_the_colors(values):
    """A color is right within 1/140 of the middle 96%, or 1/30 of the range beyond."""
    drawing = trace_figures.heat_map(MERGED, values.view(1, 20, 20))
    low, q02, q98, high = knots = drawing.cells["knots"]
    colors = {tuple(color): level for level, color in enumerate(trace_figures.COLORS.tolist())}
    levels = [colors[tuple(color)] for color in np.asarray(drawing.figure.image).reshape(-1, 3).tolist()]
    read = np.interp(levels, trace_figures.LEVELS, knots)
    errors = np.abs(read - values.numpy())
    middle = (values.numpy() >= q02) & (values.numpy() <= q98)
    assert (errors[middle] <= (q98 - q02) / 140 + 1e-4).all()
    assert (errors <= max(q02 - low, high - q98, q98 - q02) / 30 + 1e-4).all()


def test_a_page_has_the_exact_colors(traced):
    html = traced.html(Path.cwd())
    sources = re.findall(r'<figure[^>]*>.*?src="data:image/png;base64,([^"]+)"', html)
    assert len(sources) == len(traced)
    for entry, source in zip(traced, sources, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(source))) as image:
            assert entry.name == "logits" or (np.asarray(image.convert("RGB")) == np.asarray(entry.figure.image)).all()


# --- forms ---------------------------------------------------------------------------------------------------------


def test_plain_text_lists_every_tensor_once(traced):
    text = str(traced)
    assert text.startswith("9 × <image> <bos>caption en↵a cat and two dogs<eos>")
    assert len(re.findall(r"\w = \d", text)) == len(traced)
    for word in ("Vision tower", "layer 3", "self_attn", "B T V = 1 × "):
        assert word in text


def test_a_notebook_gets_all_forms(traced):
    data, metadata = traced._repr_mimebundle_()
    assert set(data) == {"text/html", "image/png", "text/plain"}
    alt = metadata["image/png"]["alt"]
    assert "Vision tower" in alt and traced.next_tokens[0][0] in alt
    with Image.open(io.BytesIO(base64.b64decode(data["image/png"]))) as shown:
        assert shown.info["Description"] == alt and shown.width > 600
    assert traced._repr_mimebundle_() == (data, metadata)  # nothing is random: two builds are equal
    data, metadata = traced["mask"]._repr_mimebundle_()
    assert data["text/plain"] == repr(traced["mask"]) and metadata["image/png"]["alt"] == traced["mask"].figure.alt


def test_links_lead_to_the_chapter_and_the_module(traced):
    root = Path(minivlm.__file__).parents[1]
    for folder in (root / "notebooks", root / "notebooks" / "solutions", root):
        links = set(re.findall(r'<a href="([^"]+)"', traced.html(folder)))
        assert len(links) == 5 + 5 and all((folder / link).is_file() for link in links), folder
    assert "06_gemma_decoder.ipynb" in re.findall(r'<a href="([^"]+)"', traced.html(root / "notebooks" / "solutions"))


def test_save_html_creates_the_folder(traced, tmp_path):
    traced.save_html(tmp_path / "new" / "trace.html")
    assert (tmp_path / "new" / "trace.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(ValueError, match="must end in .html"):
        traced.save_html(tmp_path / "trace.png")


one_model = pytest.mark.parametrize("talker", [1], indirect=True, ids=["PaliGemma 1"])


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page_url(traced, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("trace") / "trace.html"
    traced.save_html(path)
    return path.as_uri()


def current(page) -> str:
    """The dotted name in the pane. Exactly one row of the tree is marked."""
    assert page.locator("summary[aria-current]").count() == 1
    return page.locator(".pane .line").get_attribute("data-line").split('"')[1]


@one_model
def test_buttons_keys_and_clicks_step_through_everything(browser, page_url, traced):
    names = traced.names
    with quiet_page(browser, viewport={"width": 1000, "height": 700}) as page:
        page.goto(page_url)
        assert current(page) == names[0] and page.get_by_text("← Previous").is_disabled()
        for expected in names[1:4]:
            page.get_by_text("Next →").click()
            assert current(page) == expected
        for expected in names[4:]:
            page.keyboard.press("ArrowRight")
            assert current(page) == expected
            assert page.locator("summary[aria-current]").is_visible()
        page.keyboard.press("ArrowDown")  # the last one
        assert current(page) == names[-1] and page.get_by_text("Next →").is_disabled()
        assert page.locator(".steps output").inner_text() == f"{len(names)} of {len(names)}"
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowUp")
        assert current(page) == names[-3]
        page.keyboard.press("Home")
        assert current(page) == names[0]
        page.locator(".steps button", has_text="Decoder").click()
        assert current(page) == f"{LAYERS}0.input_layernorm"
        page.locator(".layer > summary", has_text="layer 2").last.click()
        page.locator(".layer", has_text="layer 2").last.locator("summary span").get_by_text("mlp", exact=True).click()
        assert current(page) == f"{LAYERS}2.mlp"
        assert page.locator(".pane img").get_attribute("alt") == traced[f"{LAYERS}2.mlp"].figure.alt
        assert page.locator(".pane td").first.inner_text() == traced[f"{LAYERS}2.mlp"].shape_text


@one_model
def test_the_numbers_behind_an_image_are_read_by_mouse_and_by_keys(browser, page_url, traced):
    def shown(page) -> tuple[torch.Tensor, float]:
        """The number in the tensor at the index in the line of Python, and the number in words."""
        name, index = re.fullmatch(r'trace.tensor\("(.*)"\)\[(.*)\]', page.locator(".pane .line").inner_text()).groups()
        words = page.locator(".pane .cell").inner_text().rsplit("≈ ", 1)[1].replace("−", "-")
        return traced.tensor(name)[tuple(map(int, index.split(", ")))], float(words)

    with quiet_page(browser, viewport={"width": 390, "height": 800}, color_scheme="dark") as page:
        page.goto(page_url)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        colors = "({ color, backgroundColor }) => [color, backgroundColor].map((c) => Number(c.match(/\\d+/)[0]))"
        ink, paper = page.locator(".minivlm-trace").evaluate(f"(root) => ({colors})(getComputedStyle(root))")
        assert ink > 200 and paper < 60
        page.evaluate("document.body.dataset.jpThemeLight = 'true'")  # JupyterLab is light, though the system is dark
        ink, paper = page.locator(".minivlm-trace").evaluate(f"(root) => ({colors})(getComputedStyle(root))")
        assert ink < 60 and paper > 200
        page.get_by_label("Search tensors").fill("weights of nothing")
        assert page.locator(".entry > summary:visible").count() == 0 == page.locator(".stage:visible").count()
        page.get_by_label("Search tensors").fill("layers.2 weights")
        page.keyboard.press("Enter")
        page.get_by_text("Next →").click()
        assert current(page) == f"{LAYERS}2.self_attn.weights"
        assert page.locator(".steps output").inner_text() == "2 of 2"
        entry = traced[current(page)]
        cells, (w, h) = page.locator(".pane .cells"), entry.figure.image.size
        box = cells.bounding_box()
        cells.hover(position={"x": box["width"] * (19 * 2 + 3.5) / w, "y": box["height"] * 12.5 / h})
        assert page.locator(".pane .cell").inner_text().startswith("head 2, token 12 “↵”, key 3 “<image>”: ")
        value, read = shown(page)
        assert value == entry.tensor[0, 2, 12, 3] and read == pytest.approx(float(value), abs=0.01)
        page.keyboard.press("Tab")
        cells.focus()
        for key in ("Shift+ArrowDown", "ArrowUp", "ArrowLeft", "ArrowLeft"):
            page.keyboard.press(key)
        value, read = shown(page)
        assert value == entry.tensor[0, 2, 17, 1] and read == pytest.approx(float(value), abs=0.01)
        assert current(page) == entry.name  # the arrow keys did not turn the page
        page.get_by_label("Search tensors").fill("")
        page.locator(".steps button", has_text="Image").click()
        page.locator(".pane .cells").hover(position={"x": 2, "y": 2})
        red = round((IMAGE.getpixel((0, 0))[0] / 255 - 0.5) / 0.5, 3)
        assert f"red ≈ {red:.3g}".replace("-", "−") in page.locator(".pane .cell").inner_text()


@one_model
def test_a_diff_opens_at_the_first_difference(browser, traced, again, monkeypatch, tmp_path):
    monkeypatch.setattr(masks, "prefix_lm_mask", causal)
    traced.diff(again()).save_html(tmp_path / "diff.html")
    with quiet_page(browser) as page:
        page.goto((tmp_path / "diff.html").as_uri())
        assert page.locator(".pane .line").inner_text() == 'diff.tensor("mask")'
        page.locator(".pane .cells").last.focus()
        page.keyboard.press("ArrowRight")
        words = "token 0 “<image>”, key 1 “<image>”: this run True; other run False; difference True"
        assert page.locator(".pane .cell").inner_text() == words


@one_model
def test_rows_can_be_selected_with_the_keyboard(browser, page_url, traced):
    with quiet_page(browser) as page:
        page.goto(page_url)
        page.locator(".entry > summary").nth(1).focus()
        page.keyboard.press("Enter")
        assert current(page) == traced.names[1]
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.hasAttribute('aria-current')")


@one_model
def test_without_a_script_the_tree_unfolds_and_shows_figures(browser, page_url, traced):
    with quiet_page(browser, java_script_enabled=False) as page:
        page.goto(page_url)
        overview = page.locator(".overview img")
        assert overview.is_visible() and overview.get_attribute("alt") == traced.overview.alt
        assert not page.locator("button").count()
        entry = page.locator(".entry").first
        assert entry.locator("table").is_hidden()
        entry.locator("summary").click()
        assert entry.locator("table").is_visible() and entry.locator("img").is_visible()
        assert page.locator(".words table").is_visible()


@one_model
def test_sanitized_html_has_the_same_content(browser, traced, tmp_path):
    """JupyterLab removes scripts and styles from a notebook that it does not trust (JupyterLab 4.6, Sanitizer)."""
    html = re.sub(r"<(script|style).*?</\1>", "", traced._repr_mimebundle_()[0]["text/html"], flags=re.DOTALL)
    (tmp_path / "left.html").write_text(f'<meta charset="utf-8">{html}', encoding="utf-8")
    with quiet_page(browser) as page:
        page.goto((tmp_path / "left.html").as_uri())
        assert page.locator(".overview img").is_visible() and page.locator(".entry").count() == len(traced)
        assert not page.locator("button").count()


@one_model
def test_two_traces_on_a_page_are_independent_and_prompts_are_escaped(browser, talker, tiny_processor, tmp_path):
    traced = viz.trace(talker, tiny_processor, IMAGE, '</script><img src=x onerror="boom()"> &amp; caption')
    html = traced._repr_mimebundle_()[0]["text/html"]
    (tmp_path / "two.html").write_text(f'<meta charset="utf-8"><div>{html}</div><div>{html}</div>', encoding="utf-8")
    with quiet_page(browser) as page:
        page.goto((tmp_path / "two.html").as_uri())
        assert "<img src=x" in page.locator(".minivlm-trace > p > .muted").first.inner_text()
        page.get_by_text("Next →").last.focus()
        page.keyboard.press("ArrowRight")
        shown = page.locator(".pane .line").all_inner_texts()
        assert shown == [f'trace.tensor("{name}")' for name in traced.names[:2]]


@one_model
def test_the_trace_works_in_an_exported_notebook(browser, traced, tmp_path):
    (tmp_path / "notebook.html").write_text(exported(traced), encoding="utf-8")
    with quiet_page(browser) as page:
        page.goto((tmp_path / "notebook.html").as_uri())
        page.get_by_text("Next →").click()
        assert current(page) == traced.names[1]


@one_model
def test_the_trace_works_in_jupyterlab(browser, traced, tmp_path):
    source = "import minivlm\nfrom minivlm import emoji\nfrom minivlm.course import viz\n"
    source += "model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()\n"
    source += 'viz.trace(model, processor, emoji.make_scene(0).image, "caption en")'
    nbformat.write(notebook_with(source, traced), tmp_path / "trace.ipynb")
    with jupyterlab(tmp_path) as (url, token):
        allowed = (url, url.replace("http", "ws", 1), "data:", "blob:", "about:")
        with quiet_page(browser, allowed, viewport={"width": 1400, "height": 1100}) as page:
            page.set_default_timeout(3 * PATIENCE)
            page.goto(f"{url}/lab/tree/trace.ipynb?token={token}")
            page.locator(".jp-OutputArea-output .overview img").wait_for()  # untrusted: no script
            assert page.get_by_text("Next →").count() == 0
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
            page.locator(".jp-Notebook .jp-InputArea-editor").first.click()
            page.locator(".jp-Notebook .cm-content:focus").press("Shift+Enter")
            page.get_by_text("Next →").click()
            assert page.locator(".steps output").inner_text().startswith("2 of ")
            page.keyboard.press("ArrowRight")  # goes to the trace only, not to JupyterLab
            assert page.locator(".steps output").inner_text().startswith("3 of ")
