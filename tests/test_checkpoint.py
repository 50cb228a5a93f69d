"""Checkpoints: every known layout loads, transformers loads what we save, and nothing is read leniently."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from minivlm import checkpoint, hub
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.paligemma import PaliGemma

EMBED = "language_model.model.embed_tokens.weight"
NORM = "language_model.model.norm.weight"
REPO = "google/paligemma-3b-pt-224"


def tiny_config(kind: str) -> PaliGemmaConfig:
    text = dict(vocab_size=300, hidden_size=48, intermediate_size=96, num_hidden_layers=3, head_dim=16)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, rope_theta=500.0)
    if kind == "gemma2":
        caps = dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
        text |= caps | dict(model_type="gemma2", query_pre_attn_scalar=24, sliding_window=6)
    return PaliGemmaConfig(
        SiglipVisionConfig(32, 64, num_hidden_layers=2, num_attention_heads=2, image_size=28),
        GemmaConfig(**text),
        image_token_index=299,
    )


def tiny_model(kind: str = "gemma") -> PaliGemma:
    return PaliGemma(tiny_config(kind)).init_weights(seed=1).eval()


@pytest.fixture
def folder(tmp_path):
    """A checkpoint for tests to damage."""
    tiny_model().save_pretrained(tmp_path / "ok")
    return tmp_path / "ok"


def rewrite(folder: Path, change) -> None:
    """Applies ``change`` to the weights of ``folder``: a function that edits the dict or returns another."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights) or weights, folder / "changed", metadata={"format": "pt"})
    os.replace(folder / "changed", folder / "model.safetensors")  # the old file can still be mapped


def set_config_dtype(folder: Path, **entries) -> None:
    """Replaces everything that ``config.json`` says about the dtype by ``entries``."""
    values = json.loads((folder / "config.json").read_text())
    values.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(values | entries))


def load_error(folder, **arguments) -> str:
    with pytest.raises(ValueError) as caught:
        PaliGemma.from_pretrained(folder, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def inputs(dtype) -> dict:
    ids = torch.tensor([[299] * 4 + [2, 5, 6, 108, 9, 10, 1], [299] * 4 + [2, 15, 16, 108, 19, 20, 21]])
    types = torch.tensor([[0] * 8 + [1] * 3] * 2)
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2 - 1
    return dict(input_ids=ids, pixel_values=pixels.to(dtype), attention_mask=torch.ones_like(ids), token_type_ids=types)


# --- both ways with transformers ---


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_what_we_save_and_we_load_what_it_saves(kind, dtype, tmp_path):
    from transformers import PaliGemmaForConditionalGeneration

    ours = tiny_model(kind).to(dtype)
    ours.save_pretrained(tmp_path / "ours")
    theirs, report = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.dtype == dtype
    with torch.no_grad():
        expected, actual = theirs.eval()(**inputs(dtype)).logits, ours(**inputs(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()

    theirs.save_pretrained(tmp_path / "single")
    assert_same_weights(PaliGemma.from_pretrained(tmp_path / "single"), ours)
    assert PaliGemma.from_pretrained(tmp_path / "single").config == ours.config
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert_same_weights(PaliGemma.from_pretrained(tmp_path / "sharded"), ours)

    in_memory = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert "lm_head.weight" in in_memory
    rewrite(tmp_path / "ours", lambda weights: in_memory)
    assert_same_weights(PaliGemma.from_pretrained(tmp_path / "ours"), ours)


# --- names ---

LAYOUTS = {
    "hub files": {},
    "saved by transformers 5": {"vision_tower.vision_model.": "vision_tower."},
    "transformers 5 in memory": {
        "language_model.model.": "model.language_model.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "no model. anywhere": {"language_model.model.": "language_model.", "vision_tower.vision_model.": "vision_tower."},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_name_layouts(layout, folder):
    def rename(weights):
        renamed = {}
        for name, tensor in weights.items():
            old = next((old for old in LAYOUTS[layout] if name.startswith(old)), "")
            renamed[LAYOUTS[layout].get(old, "") + name.removeprefix(old)] = tensor
        return renamed

    rewrite(folder, rename)
    assert_same_weights(PaliGemma.from_pretrained(folder), tiny_model())


def test_saved_names_are_hub_names(folder):
    names = set(load_file(folder / "model.safetensors"))
    some = {EMBED, "multi_modal_projector.linear.bias", "vision_tower.vision_model.encoder.layers.1.mlp.fc2.bias"}
    assert some | {"language_model.model.layers.2.self_attn.q_proj.weight"} <= names
    assert not [name for name in names if "lm_head" in name]
    assert {checkpoint.hub_name(name) for name in names} == names


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_output_head_must_be_the_embedding(name, folder):
    rewrite(folder, lambda weights: weights | {name: weights[EMBED].clone()})
    assert_same_weights(PaliGemma.from_pretrained(folder), tiny_model())
    rewrite(folder, lambda weights: weights | {name: weights[EMBED] + 1e-3})
    message = load_error(folder)
    assert name in message and "embedding" in message
    assert name in load_error(folder, dtype=torch.bfloat16)
    rewrite(folder, lambda weights: weights | {name: weights[EMBED].bfloat16()})
    assert name in load_error(folder, dtype=torch.bfloat16)


def test_output_head_without_the_embedding(folder, tmp_path):
    """``save_model`` of safetensors writes one of two tied weights. Of transformers' model, that is the output head."""
    from conftest import in_transformers
    from safetensors.torch import save_model

    theirs = in_transformers(tiny_model())
    theirs.tie_weights()
    save_model(theirs, str(folder / "model.safetensors"))
    assert [name for name in load_file(folder / "model.safetensors") if "head" in name or "embed_tokens" in name] == [
        "lm_head.weight"
    ]
    for dtype in (None, torch.bfloat16):
        assert_same_weights(PaliGemma.from_pretrained(folder, dtype=dtype), tiny_model().to(dtype))


def test_buffers_of_old_files_are_ignored(folder):
    rotary = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    ids = "vision_tower.vision_model.embeddings.position_ids"
    rewrite(folder, lambda weights: weights | {rotary: torch.ones(8), ids: torch.arange(4)[None]})
    assert_same_weights(PaliGemma.from_pretrained(folder), tiny_model())


# --- strictness ---


def test_one_error_lists_all_faults(folder):
    missing, misshapen = "multi_modal_projector.linear.bias", NORM
    integer = "language_model.model.layers.1.mlp.up_proj.weight"

    def damage(weights):
        del weights[missing]
        weights[misshapen] = torch.zeros(49)
        weights[integer] = weights[integer].to(torch.int8)
        weights["language_model.model.layers.7.input_layernorm.weight"] = torch.zeros(48)
        weights["vision_tower.vision_model.head.probe"] = torch.zeros(1, 1, 32)

    rewrite(folder, damage)
    message = load_error(folder)
    assert f"1 missing: {missing};" in message
    assert "2 unexpected: " in message and "layers.7.input_layernorm" in message and "head.probe" in message
    assert f"1 of the wrong shape: {misshapen} [49] instead of [48];" in message
    assert f"1 of an unsupported dtype: {integer} I8" in message


def test_long_lists_are_abbreviated(folder):
    rewrite(
        folder, lambda weights: {name: x for name, x in weights.items() if name == EMBED or "q_proj.weight" in name}
    )
    message = load_error(folder)
    assert " missing: " in message and "… and " in message and message.count("weight,") <= 8 and len(message) < 900


def test_one_weight_under_two_names(folder):
    rewrite(folder, lambda weights: weights | {"model.language_model.norm.weight": weights[NORM] + 1})
    assert "1 unexpected: " in load_error(folder)


def test_gemma2_file_with_gemma_config(tmp_path):
    tiny_model("gemma2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["model_type"] = "gemma"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "pre_feedforward_layernorm" in load_error(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value, folder):
    """Detected on loading in vectors, and on conversion in all. For mapped matrices, the first answer detects them."""
    rewrite(folder, lambda weights: weights[EMBED][7, 3:4].fill_(value) and None)
    assert not PaliGemma.from_pretrained(folder).get_parameter(EMBED).isfinite().all()  # as in test_generation.py
    bias = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias"

    def damage(weights):
        weights[NORM][-1] = value
        weights[bias][0] = value

    rewrite(folder, damage)
    message = load_error(folder)
    assert message.startswith("2 weights hold NaN or infinity") and bias in message and NORM in message
    message = load_error(folder, dtype=torch.bfloat16)
    assert message.startswith("3 weights hold NaN or infinity") and EMBED in message and NORM in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(value, folder):
    before = (folder / "model.safetensors").read_bytes()
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(EMBED)[7, 3] = value
    with pytest.raises(ValueError, match=f"Nothing was saved: 1 weight holds NaN or infinity.*{EMBED}"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    large = tiny_model()
    with torch.no_grad():
        large.get_parameter(NORM)[0] = 1e5
    with pytest.raises(ValueError, match=f"float16.*{NORM}"):  # beyond its largest number, 65504
        large.save_pretrained(folder / "new", dtype=torch.float16)
    assert not (folder / "new").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_are_only_saved_in_a_supported_dtype(dtype, folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="dtype must be one of .*torch.bfloat16"):
        tiny_model().save_pretrained(folder, dtype=dtype)
    assert (folder / "model.safetensors").read_bytes() == before


def test_overflow_on_conversion(folder):
    rewrite(folder, lambda weights: weights | {NORM: weights[NORM] + 1e5})
    PaliGemma.from_pretrained(folder)
    message = load_error(folder, dtype=torch.float16)
    assert NORM in message and "float16" in message


def test_mixed_dtypes_need_a_choice(folder):
    rewrite(folder, lambda weights: weights | {NORM: weights[NORM].bfloat16()})
    assert {p.dtype for p in PaliGemma.from_pretrained(folder).parameters()} == {torch.float32}  # as in config.json
    set_config_dtype(folder)
    assert "dtype=torch.float32" in load_error(folder)
    assert {p.dtype for p in PaliGemma.from_pretrained(folder, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_unsupported_dtypes(dtype, folder):
    assert "torch.bfloat16" in load_error(folder, dtype=dtype)


# --- damaged folders ---


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in load_error(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(keep, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = load_error(folder)
    assert "model.safetensors is damaged, truncated or not a safetensors file" in message
    assert "download it again" in message


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_lfs_pointer(name, folder):
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(POINTER)
    message = load_error(folder)
    assert f"{name} is " in message and "git lfs pull" in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_lora_adapter_is_not_a_checkpoint(name, folder):
    (folder / name).write_text("{}")
    PaliGemma.from_pretrained(folder)  # a whole model with an adapter beside it
    (folder / "model.safetensors").unlink()
    assert "LoRA adapter" in load_error(folder) and "merge_and_unload" in load_error(folder)
    (folder / "config.json").unlink()
    assert "LoRA adapter" in load_error(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, b"\xff\xfe{}", "[1]", "9" * 5000, "", "null", '{"a": }'])
def test_files_that_are_not_json_objects(content, folder):
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(content)
    message = load_error(folder)
    assert "config.json" in message and "download it again" in message and len(message) < 600
    shard(folder)
    tiny_model().save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "config.json", folder)
    (folder / "model.safetensors.index.json").write_bytes(content)
    assert "index.json is not JSON with a weight_map" in load_error(folder)


def set_config(folder: Path, part: str, **entries) -> None:
    values = json.loads((folder / "config.json").read_text())
    values[part] |= entries
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("part, stored", [("text", 3), ("vision", 2)])
@pytest.mark.parametrize("stated", [1, 100_000, 10**9, 10**30])
def test_the_number_of_layers_is_compared_with_the_header(part, stored, stated, folder, monkeypatch):
    set_config(folder, f"{part}_config", num_hidden_layers=stated)
    monkeypatch.setattr(PaliGemma, "__init__", lambda *_: pytest.fail("built a model"))
    message = load_error(folder)
    assert f" says {stated} {part} layers, the weights have {stored}." in message or "num_hidden" in message


@pytest.mark.parametrize("size", [10**6, 10**18, 10**30])
@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "vocab_size", "head_dim"])
def test_absurd_sizes_take_no_memory(name, size, folder):
    set_config(folder, "text_config", **{name: size})
    message = load_error(folder)
    assert "config.json" in message or name in message


def test_a_file_that_ends_in_zeros(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for zeros in (len(whole) // 10, len(whole) // 3, 40_000):
        file.write_bytes(whole[:-zeros] + bytes(zeros))
        assert "ends in zeros, so its download was probably not finished" in load_error(folder)
    file.write_bytes(whole)
    last = "vision_tower.vision_model.post_layernorm.weight"
    zero = [last, last.replace("weight", "bias")]
    rewrite(folder, lambda weights: weights | {name: torch.zeros_like(weights[name]) for name in zero})
    PaliGemma.from_pretrained(folder)  # vectors of zeros are no evidence, nor are rows that pad the embedding table
    index = shard(folder)
    save_file({EMBED: torch.zeros(300, 48)}, folder / "model-9.safetensors")
    for name in set(index["weight_map"].values()):
        weights = load_file(folder / name)
        weights.pop(EMBED, None)
        save_file(weights, folder / name)
    write_index(folder, index | {"weight_map": index["weight_map"] | {EMBED: "model-9.safetensors"}})
    assert not PaliGemma.from_pretrained(folder).get_parameter(EMBED).any()


def test_names_and_headers_reach_the_terminal_without_control_characters(folder):
    rewrite(folder, lambda weights: weights | {"a\n\x1b[31mred" + "x" * 10_000: torch.ones(1)})
    message = load_error(folder)
    assert "1 unexpected: a\\n\\x1b[31mredx" in message and message.isprintable() and len(message) < 600
    header = b'{"a": {"dtype": "\\n\\u001b[31m", "shape": [1], "data_offsets": [0, 4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert load_error(folder).isprintable()


def test_a_file_that_changes_between_header_and_weights(folder, monkeypatch):
    read_header = checkpoint._read_header

    def then_replace(file):
        entries = read_header(file)
        os.replace(shutil.copy(file, file.with_name("copy")), file.with_name("old"))
        save_file({"other": torch.ones(3)}, file.with_name("new"))
        os.replace(file.with_name("new"), file)
        return entries

    monkeypatch.setattr(checkpoint, "_read_header", then_replace)
    assert "is damaged" in load_error(folder)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickles_are_not_opened(folder, tmp_path):
    os.replace(folder / "model.safetensors", tmp_path / "aside")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    shutil.copy(folder / "pytorch_model.bin", folder / "model.pt")
    message = load_error(folder)
    assert "safetensors" in message and "pickle" in message
    assert not (tmp_path / "exploded").exists()
    shutil.copy(folder / "model.pt", folder / "model.safetensors")  # not under another name either
    assert "damaged" in load_error(folder)
    assert not (tmp_path / "exploded").exists()


def shard(folder: Path) -> dict:
    """Splits the weights of ``folder`` into shards by hand and returns the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {}}
    for i in range(3):
        part = dict(list(weights.items())[i::3])
        save_file(part, folder / f"model-{i}.safetensors")
        index["weight_map"] |= dict.fromkeys(part, f"model-{i}.safetensors")
    write_index(folder, index)
    return index


def write_index(folder: Path, index) -> None:
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


def test_shards(folder):
    index = shard(folder)
    assert_same_weights(PaliGemma.from_pretrained(folder), tiny_model())
    (folder / "model-1.safetensors").rename(folder / "aside")
    assert "lacks model-1.safetensors" in load_error(folder)
    lost = [name for name, file in index["weight_map"].items() if file == "model-1.safetensors"]
    index["weight_map"] |= dict.fromkeys(lost, "model-2.safetensors")  # an index that lists too much
    write_index(folder, index)
    assert f"{len(lost)} missing: " in load_error(folder)


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/stolen.safetensors", "a/../../b.safetensors",
                                  "..\\b.safetensors", "C:b.safetensors", "model.bin", "..", 5])  # fmt: skip
def test_index_that_refers_outside_its_folder(name, folder):
    index = shard(folder)
    shutil.copy(folder / "model-1.safetensors", folder.parent / "stolen.safetensors")
    index["weight_map"][NORM] = name
    write_index(folder, index)
    message = load_error(folder)
    assert ("refers to" in message and repr(name) in message) or (name == 5 and "weight_map" in message)


@pytest.mark.parametrize("index", ["<html>", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}'])
def test_invalid_index(index, folder):
    shard(folder)
    write_index(folder, index)
    assert "index.json is not JSON with a weight_map" in load_error(folder)


# --- what loading returns ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion(dtype, folder):
    loaded = PaliGemma.from_pretrained(folder, dtype=dtype)
    assert not loaded.training
    assert_same_weights(loaded, tiny_model().to(dtype))


@pytest.mark.parametrize(
    "entries, expected",
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, torch.bfloat16),
        ({}, torch.float32),
        ({"dtype": None, "torch_dtype": ["?"]}, torch.float32),
    ],
)
def test_dtype_is_that_of_the_config_or_as_stored(entries, expected, folder):
    set_config_dtype(folder, **entries)
    assert_same_weights(PaliGemma.from_pretrained(folder), tiny_model().to(expected))
    assert_same_weights(PaliGemma.from_pretrained(folder, dtype=torch.float64), tiny_model().double())


def test_stored_in_half_the_space(folder, tmp_path):
    """bfloat16 in the file, float32 in memory, here and in transformers."""
    from transformers import PaliGemmaForConditionalGeneration

    tiny_model().save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "half", folder)]
    assert sizes[0] < 0.55 * sizes[1]
    assert_same_weights(PaliGemma.from_pretrained(tmp_path / "half"), tiny_model().bfloat16().float())
    assert PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "half").dtype == torch.float32


def test_training_never_touches_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = PaliGemma.from_pretrained(folder)
    assert all(parameter.requires_grad for parameter in model.parameters())
    batch = inputs(torch.float32)
    model.loss(labels=batch["input_ids"], **batch).backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert (folder / "model.safetensors").read_bytes() == before
    assert not torch.equal(model.state_dict()[EMBED], tiny_model().state_dict()[EMBED])
    model.save_pretrained(folder)  # over the file that the weights are mapped from
    assert_same_weights(PaliGemma.from_pretrained(folder), model)


MEASURE = """
import os, sys
import torch
from minivlm.checkpoint import find_nonfinite
from minivlm.paligemma import PaliGemma
def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
before, size = memory("VmRSS"), os.path.getsize(sys.argv[1] + "/model.safetensors")
model = PaliGemma.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2], None))
print((memory("VmHWM") - before) / size)
assert find_nonfinite(model.state_dict()) is None
print((memory("VmHWM") - before) / size)
assert not {"huggingface_hub", "transformers"} & set(sys.modules), "unnecessary imports"
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """About 200 MB of float32."""
    folder = tmp_path_factory.mktemp("big")
    text = GemmaConfig(vocab_size=12000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, head_dim=32)
    config = PaliGemmaConfig(tiny_config("gemma").vision_config, text)
    with torch.device("meta"):
        shapes = PaliGemma(config).state_dict()
    save_file({name: torch.ones(shape.shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    assert 180e6 < (folder / "model.safetensors").stat().st_size < 220e6
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("dtype, loaded, read", [("None", (0, 0.1), (0.9, 1.1)), ("bfloat16", (0.4, 1.1), (0.4, 1.1))])
def test_peak_memory_of_loading(dtype, loaded, read, big):
    """In multiples of the file's size. Mapped weights take no memory until they are read, then as much as the file."""
    command = [sys.executable, "-c", MEASURE, str(big), dtype]
    root = Path(checkpoint.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for peak, (least, most) in zip(map(float, done.stdout.split()), (loaded, read), strict=True):
        assert least < peak <= most


# --- saving ---


def test_saved_files(folder):
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    with checkpoint.safe_open(folder / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    tiny_model().bfloat16().save_pretrained(folder / "new" / "deep")
    assert {p.dtype for p in PaliGemma.from_pretrained(folder / "new" / "deep").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("stop", [OSError, checkpoint.SafetensorError, KeyboardInterrupt])
def test_interrupted_saving_leaves_the_old_file(stop, folder, monkeypatch):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half a file")
        raise stop("disk full")

    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(stop if stop is KeyboardInterrupt else OSError, match="disk full"):
        tiny_model("gemma2").save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(stop if stop is KeyboardInterrupt else OSError, match="disk full"):
        tiny_model().save_pretrained(folder / "new")
    assert not list((folder / "new").iterdir())


def test_saving_into_a_file_or_an_impossible_config(folder, tmp_path):
    with pytest.raises(ValueError, match="is a file"):
        tiny_model().save_pretrained(folder / "config.json")
    model = tiny_model()
    model.config.text_config.attn_logit_softcapping = 50.0  # no Gemma 1 in transformers has one
    with pytest.raises(ValueError, match="gemma2"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()


# --- finding checkpoints ---


def test_embedded_checkpoint_is_the_default(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "EMBEDDED", folder)
    assert hub.resolve(None) == folder
    assert_same_weights(PaliGemma.from_pretrained(), tiny_model())
    monkeypatch.setattr(hub, "EMBEDDED", tmp_path / "absent")
    with pytest.raises(OSError, match="embedded checkpoint is not at .*absent: install minivlm from a clone"):
        PaliGemma.from_pretrained()


def test_a_folder_is_never_a_hub_id(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert hub.resolve(name) == Path(name)
    assert hub.resolve(str(folder)) == folder and hub.resolve(folder) == folder


@pytest.mark.parametrize("path", ["absent", "./absent/x", "/absent/x", "a/b/c", "owner/", "a b/c", "../x", "a/b--c",
                                  "https://huggingface.co/google/paligemma-3b-pt-224", Path("owner/name")])  # fmt: skip
def test_neither_folder_nor_hub_id(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("contacted the hub"))
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        hub.resolve(path)


def test_a_file_is_not_a_checkpoint(folder):
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        hub.resolve(folder / "model.safetensors")


@pytest.mark.parametrize("weights", [True, False])
def test_download_is_pinned_and_takes_only_what_is_needed(weights, folder, monkeypatch):
    asked = {}

    def download(repo_id, **arguments):
        asked.update(arguments, repo_id=repo_id)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve(REPO, revision="35e4f46", weights=weights) == folder
    assert asked["repo_id"] == REPO and asked["revision"] == "35e4f46"
    wanted = ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]
    if weights:
        wanted += ["model-00001-of-00003.safetensors", "model.safetensors", "model.safetensors.index.json"]
    unwanted = ["pytorch_model.bin", "model.py", "README.md", "optimizer.pt", "training_args.bin", "tokenizer.model"]
    heavy = [] if weights else ["model.safetensors", "model.safetensors.index.json"]
    offered = wanted + unwanted + heavy
    assert list(filter_repo_objects(offered, allow_patterns=asked["allow_patterns"])) == wanted


def response(status: int):
    return SimpleNamespace(headers={}, request=None, status_code=status)


def http(kind, status: int):
    return kind(f"{status} Client Error.\n\nSee elsewhere.", response=response(status))


def not_cached(cause: Exception):
    error = errors.LocalEntryNotFoundError("An error happened.\nSo it did.")
    error.__cause__ = cause
    return error


GATED = ["https://huggingface.co/" + REPO, "Acknowledge license", "hf auth login"]
FAILURES = {
    "gated": (http(errors.GatedRepoError, 403), GATED),
    "not logged in": (http(errors.GatedRepoError, 401), GATED),
    "bad token": (http(errors.HfHubHTTPError, 401), GATED),
    "forbidden": (http(errors.HfHubHTTPError, 403), GATED),
    "forbidden, hidden": (not_cached(http(errors.HfHubHTTPError, 403)), GATED),
    "absent": (http(errors.RepositoryNotFoundError, 404), ["no folder", "no public repository", "check the spelling"]),
    "no such revision": (http(errors.RevisionNotFoundError, 404), ["no revision 'v9'"]),
    "hub down": (not_cached(http(errors.HfHubHTTPError, 503)), ["could not be downloaded", "503", "network"]),
    "offline mode": (not_cached(errors.OfflineModeIsEnabled("offline mode is enabled")), ["offline mode", "network"]),
    "disk full": (OSError(28, "No space left on device"), ["No space left"]),
    "timeout": (TimeoutError(), ["TimeoutError", "network"]),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_downloads_are_explained_in_one_line(failure, monkeypatch):
    error, expected = FAILURES[failure]

    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(OSError) as caught:
        PaliGemma.from_pretrained(REPO, revision="v9")
    message = str(caught.value)
    assert [part for part in expected if part not in message] == []
    assert "\n" not in message and "embedded checkpoint" in message
    assert ("Acknowledge" in message) == (expected is GATED)


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    with pytest.raises(OSError, match="could not be downloaded and is not in the local cache .*check the network"):
        hub.resolve(REPO)


def test_cached_repository_opens_without_network(monkeypatch, tmp_path, folder):
    repo, commit = tmp_path / "models--google--paligemma-3b-pt-224", "35e4f46485b4d07967e7e9935bc3786aad50687c"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / commit).mkdir(parents=True)
    for i, file in enumerate(folder.iterdir()):  # as in the hub's cache: links to blobs outside the snapshot
        shutil.copy(file, repo / "blobs" / str(i))
        (repo / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / str(i))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_same_weights(PaliGemma.from_pretrained(REPO, revision=commit), tiny_model())
    with pytest.raises(OSError, match="could not be downloaded"):
        PaliGemma.from_pretrained(REPO)  # no branch is in the cache
