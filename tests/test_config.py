"""config.py: sparse files get the right values, full files survive a round trip, unsupported ones are refused."""

import json
import math
from dataclasses import fields

import pytest
import torch

from minivlm.checkpoint import SkipInit
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.paligemma import PaliGemma

# as sparse as the hub's config.json: head_dim, theta, eps, image_size and more are left out
VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "num_image_tokens": 256,
    "patch_size": 14,
    "projector_hidden_act": "gelu_fast",
    "torch_dtype": "float32",
    "vision_use_head": False,
}
TOP_LEVEL = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "bos_token_id": 2,
    "eos_token_id": 1,
    "ignore_index": -100,
    "image_token_index": 257152,
    "model_type": "paligemma",
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
GEMMA = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_image_tokens": 256,
    "num_key_value_heads": 1,
    "torch_dtype": "float32",
    "vocab_size": 257216,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "num_image_tokens": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "vocab_size": 257216,
}


def sparse(text: dict, **vision) -> dict:
    size = text.get("hidden_size", 2304)
    vision = VISION | {"projection_dim": size} | vision
    return TOP_LEVEL | {"hidden_size": 2048, "projection_dim": size, "text_config": text, "vision_config": vision}


def gemma2(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, **more) -> dict:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
    return sparse(GEMMA2 | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads} | more)


FILES = {
    "PaliGemma 3B": sparse(GEMMA),
    "PaliGemma 2 3B": gemma2(2304, 26, 9216, 8, 4),
    "PaliGemma 2 10B": gemma2(3584, 42, 14336, 16, 8),
    "PaliGemma 2 28B": gemma2(4608, 46, 36864, 32, 16, head_dim=128, query_pre_attn_scalar=144),
}
# hidden size, layers, intermediate size, heads, KV heads, head_dim, query scale ** -2, soft cap of attention and of
# logits, window; billions of parameters
SIZES = {
    "PaliGemma 3B": (2048, 18, 16384, 8, 1, 256, 256, None, None, None, 2.923),
    "PaliGemma 2 3B": (2304, 26, 9216, 8, 4, 256, 256, 50.0, 30.0, 4096, 3.03),
    "PaliGemma 2 10B": (3584, 42, 14336, 16, 8, 256, 256, 50.0, 30.0, 4096, 9.66),
    "PaliGemma 2 28B": (4608, 46, 36864, 32, 16, 128, 144, 50.0, 30.0, 4096, 27.65),
}


@pytest.mark.parametrize("name", FILES)
def test_sparse_hub_files_have_the_published_sizes(name):
    config = PaliGemmaConfig.from_dict(FILES[name])
    t, v = config.text_config, config.vision_config
    text = (t.hidden_size, t.num_hidden_layers, t.intermediate_size, t.num_attention_heads, t.num_key_value_heads)
    text += (t.head_dim, t.query_pre_attn_scalar, t.attn_logit_softcapping, t.final_logit_softcapping, t.sliding_window)
    *expected, billions = SIZES[name]
    assert text == tuple(expected)
    assert (t.rms_norm_eps, t.rope_theta, t.vocab_size) == (1e-6, 10000.0, 257216)
    assert v == SiglipVisionConfig(1152, 4304, 27, 16, 3, 224, 14, 1e-6) and v.num_image_tokens == 256
    ids = (config.image_token_index, config.pad_token_id, config.eos_token_id, config.bos_token_id)
    assert ids == (257152, 0, 1, 2) and config.projection_dim == t.hidden_size
    with torch.device("meta"), SkipInit():
        parameters = sum(weight.numel() for weight in PaliGemma(config).parameters())
    assert round(parameters / 1e9, 3 if billions == 2.923 else 2) == billions


def test_even_sparser_files():
    """The defaults of a Gemma 2 file are not those of a Gemma 1 file."""
    top_level = {"model_type": "paligemma"}
    assert PaliGemmaConfig.from_dict(top_level) == PaliGemmaConfig() == PaliGemmaConfig.from_dict(FILES["PaliGemma 3B"])
    second = PaliGemmaConfig.from_dict(top_level | {"text_config": {"model_type": "gemma2"}})
    assert second == PaliGemmaConfig.from_dict(FILES["PaliGemma 2 3B"])
    assert [second.text_config.window(layer) for layer in range(3)] == [4096, None, 4096]
    assert [PaliGemmaConfig().text_config.window(layer) for layer in range(2)] == [None, None]
    assert second.text_config.has_post_norms and not PaliGemmaConfig().text_config.has_post_norms


@pytest.mark.parametrize("size, tokens", [(224, 256), (448, 1024), (896, 4096)])
def test_resolutions(size, tokens):
    assert PaliGemmaConfig.from_dict(sparse(GEMMA, image_size=size)).vision_config.num_image_tokens == tokens


@pytest.mark.parametrize("name", FILES)
def test_transformers_reads_the_same_values(name):
    """The sparse file, the file that transformers would save, and ours: all describe the same configuration."""
    from transformers import PaliGemmaConfig as Reference

    ours = PaliGemmaConfig.from_dict(FILES[name])
    theirs = Reference(**FILES[name])
    for reading in (theirs, Reference(**ours.to_dict())):
        assert reading.image_token_id == 257152
        for mine, other in ((ours.text_config, reading.text_config), (ours.vision_config, reading.vision_config)):
            values = vars(mine) | {"rope_theta": None}
            for field in values.keys() - {"rope_theta"}:
                absent = None if field != "query_pre_attn_scalar" else other.head_dim  # Gemma 1 has no such field
                assert getattr(other, field, absent) == values[field], field
        assert reading.text_config.rope_parameters["rope_theta"] == ours.text_config.rope_theta
    assert PaliGemmaConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False))) == ours
    assert PaliGemmaConfig.from_dict(json.loads(theirs.to_json_string(use_diff=True))) == ours


@pytest.mark.parametrize("eos", [106, [1, 106]])
@pytest.mark.parametrize("name", FILES)
def test_round_trip(name, eos):
    config = PaliGemmaConfig.from_dict(FILES[name])
    config.text_config.rope_theta, config.vision_config.layer_norm_eps, config.eos_token_id = 500.0, 1e-5, eos
    assert PaliGemmaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "text",
    [
        {"rope_theta": 500},
        {"rope_theta": 500.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 500}},
        {"rope_theta": 77.0, "rope_parameters": {"rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {"type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_parameters": {"full_attention": {"rope_theta": 77.0}}},
    ],
)
def test_theta_of_transformers_4_and_5(text):
    """Also where two entries contradict each other: the same one wins."""
    from transformers import PaliGemmaConfig as Reference

    theta = PaliGemmaConfig.from_dict(sparse(GEMMA | text)).text_config.rope_theta
    assert theta == 500.0 and type(theta) is float
    if "rope_theta" not in text or text["rope_theta"] is not None:  # transformers 5 does not read this null
        assert Reference(**sparse(GEMMA | text)).text_config.rope_parameters["rope_theta"] == theta


def test_null_means_left_out_except_where_none_is_a_value():
    nulls = {"head_dim": None, "rms_norm_eps": None, "hidden_size": None, "query_pre_attn_scalar": None}
    values = FILES["PaliGemma 2 3B"] | {"image_token_index": None, "pad_token_id": None}
    config = PaliGemmaConfig.from_dict(values | {"text_config": GEMMA2 | nulls | {"final_logit_softcapping": None}})
    expected = PaliGemmaConfig.from_dict(FILES["PaliGemma 2 3B"])
    expected.text_config.final_logit_softcapping = None
    assert config == expected


def test_query_scale_defaults_to_head_dim():
    assert GemmaConfig(head_dim=64).query_pre_attn_scalar == 64


def test_early_gemma_files_say_gelu():
    config = PaliGemmaConfig.from_dict(sparse(GEMMA | {"hidden_act": "gelu", "hidden_activation": None}))
    assert config == PaliGemmaConfig.from_dict(FILES["PaliGemma 3B"])


LAYERS = ["full_attention", "sliding_attention"] * 13
REFUSED = {
    "another model": (TOP_LEVEL | {"model_type": "llava"}, "'llava' model, not 'paligemma'"),
    "no model type": ({"text_config": GEMMA}, "None model, not 'paligemma'"),
    "another decoder": (sparse(GEMMA | {"model_type": "llama"}), "must be 'gemma' or 'gemma2', not 'llama'"),
    "another tower": (
        sparse(GEMMA, model_type="clip_vision_model"),
        "must be 'siglip_vision_model', not 'clip_vision_model'",
    ),
    "scaled rope": (
        sparse(GEMMA | {"rope_scaling": {"type": "linear", "factor": 2}}),
        "rope_type in config.json must be 'default', not 'linear'",
    ),
    "biases": (sparse(GEMMA | {"attention_bias": True}), "attention_bias in config.json must be False, not True"),
    "untied head": (
        sparse(GEMMA | {"tie_word_embeddings": False}),
        "tie_word_embeddings in config.json must be True, not False",
    ),
    "order of layers": (sparse(GEMMA2 | {"layer_types": LAYERS}), "layer_types"),
    "relu": (sparse(GEMMA | {"hidden_act": "relu"}), "'relu'"),
    "exact gelu, text": (sparse(GEMMA2 | {"hidden_activation": "gelu"}), "'gelu'"),
    "exact gelu, vision": (sparse(GEMMA, hidden_act="gelu"), "'gelu'"),
    "projection": (
        FILES["PaliGemma 3B"] | {"projection_dim": 2304},
        "projection_dim in config.json must be 2048, not 2304",
    ),
    "patches": (sparse(GEMMA, image_size=230), "image_size 230 must be a multiple of patch_size 14"),
    "tower heads": (sparse(GEMMA, num_attention_heads=7), "7 heads"),
    "decoder heads": (sparse(GEMMA | {"num_key_value_heads": 3}), "8 must be a multiple of num_key_value_heads 3"),
    "odd head": (sparse(GEMMA | {"head_dim": 15}), "head_dim must be even, not 15"),
    "no layers": (sparse(GEMMA | {"num_hidden_layers": 0}), "num_hidden_layers must be"),
    "not an object": (TOP_LEVEL | {"text_config": "gemma"}, "contains a str where an object is expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    values, reason = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        PaliGemmaConfig.from_dict(values)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


# For every field: values of another type, and numbers that no model has.
WRONG = ["1", True, [1.0], {"a": 1}, math.inf, math.nan, -2, 10**30, 0]
PARTS = {"vision_config": SiglipVisionConfig, "text_config": GemmaConfig}
NUMBERS = [(part, field.name) for part, config in PARTS.items() for field in fields(config) if field.type is not str]
IDS = ["image_token_index", "pad_token_id", "bos_token_id", "eos_token_id"]
MORE = {"layer_norm_eps": [1e9], "rms_norm_eps": [1e9], "rope_theta": [1e9], "num_hidden_layers": [100_000, 10**9]}
MORE |= {"hidden_size": [2048.0], "sliding_window": [1.5], "pad_token_id": [257216], "bos_token_id": [257216, -1]}
MORE |= {"eos_token_id": [[], [1, "2"], [1, True], [[1]], [1, 257216], 257216, -1], "image_token_index": [-1]}


@pytest.mark.parametrize("part, name", NUMBERS + [(None, name) for name in IDS])
def test_every_field_is_checked(unchecked, part, name):
    """In a file and in Python: one sentence that names the field, what it must be, and what it is."""
    values = FILES["PaliGemma 2 3B"]
    for wrong in WRONG[: -1 if part is None else None] + MORE.get(name, []):
        changed = values | ({name: wrong} if part is None else {part: values[part] | {name: wrong}})
        with pytest.raises(ValueError, match=f"^{name} must be .*, not .{{1,60}}\\.$"):
            PaliGemmaConfig.from_dict(changed)
        with pytest.raises(ValueError, match=f"^{name} must be "):
            (PARTS[part] if part else PaliGemmaConfig)(**{name: wrong})


@pytest.mark.parametrize("wrong", ["linear", 5, [1], True])
def test_what_must_be_an_object_or_a_known_value(unchecked, wrong):
    known = ("layer_types", "hidden_act", "hidden_activation", "tie_word_embeddings", "model_type")
    changes = [
        {"text_config": GEMMA2 | {name: wrong}} for name in known if (name, wrong) != ("tie_word_embeddings", True)
    ]
    changes += [{"text_config": GEMMA2 | {name: wrong}} for name in ("rope_scaling", "rope_parameters")]
    changes += [{"text_config": GEMMA2 | {"rope_scaling": {"rope_type": wrong}}}, {"projection_dim": str(wrong)}]
    changes += [{"vision_config": VISION | {name: wrong}} for name in ("hidden_act", "model_type")]
    changes += [{name: wrong} for name in ("vision_config", "text_config", "model_type")]
    for change in changes:
        with pytest.raises(ValueError) as caught:
            PaliGemmaConfig.from_dict(FILES["PaliGemma 2 3B"] | change)
        assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


def test_layer_types():
    """The order of Gemma 2, or none of Gemma 1's layers sliding."""
    layers = ["sliding_attention", "full_attention"] * 13
    assert PaliGemmaConfig.from_dict(sparse(GEMMA2 | {"layer_types": layers})).text_config.window(0) == 4096
    PaliGemmaConfig.from_dict(sparse(GEMMA | {"layer_types": ["full_attention"] * 18}))
    for text in (
        GEMMA2 | {"layer_types": layers[:-2]},
        GEMMA | {"layer_types": layers[:18]},
        GEMMA2 | {"layer_types": []},
    ):
        with pytest.raises(ValueError, match="layer_types in config.json must be"):
            PaliGemmaConfig.from_dict(sparse(text))


def test_special_tokens():
    """No padding token is -1, as in transformers. The end can be one token or several."""
    config = PaliGemmaConfig(pad_token_id=-1, eos_token_id=[1, 107], image_token_index=300_000)
    assert config.eos_token_ids == [1, 107] and PaliGemmaConfig().eos_token_ids == [1]
    assert PaliGemmaConfig.from_dict(config.to_dict()) == config
    text = GEMMA2 | {"bos_token_id": 5, "pad_token_id": 3}
    config = PaliGemmaConfig.from_dict({"model_type": "paligemma", "text_config": text, "pad_token_id": 4})
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ([1, 107], 5, 4)


def test_changed_values_are_checked_before_they_are_saved():
    config = PaliGemmaConfig()
    config.text_config.rope_theta = math.nan
    with pytest.raises(ValueError, match="rope_theta must be above 0"):
        config.to_dict()


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff\xfe", b"[1, 2]", b"null", b"[" * 10**5, b"1" * 5000, b'{"a":' * 10**5]
)
def test_a_file_that_is_not_a_configuration(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json .*download it again"):
        PaliGemma.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change", [{"sliding_window": 4096}, {"attn_logit_softcapping": 50.0}, {"query_pre_attn_scalar": 144}]
)
def test_gemma_2_values_cannot_be_saved_as_gemma_1(change):
    with pytest.raises(ValueError, match="gemma2"):
        PaliGemmaConfig(text_config=GemmaConfig(**change)).to_dict()
