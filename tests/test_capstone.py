"""The capstone accepts a PaliGemma in another style, and names what is first wrong in one with a planted bug.

``capstone/functional.py`` is written for these tests, in functional numpy. A bug is a replacement in its text.
"""

import re
from pathlib import Path

import jaxtyping
import pytest

from minivlm.course import capstone
from minivlm.course.capstone.steps import STEPS

RIGHT = Path(__file__).parent / "capstone" / "functional.py"
SOURCE = RIGHT.read_text(encoding="utf-8")
NAMES = [name for name, _ in STEPS]

# name → the step that has to fail, the text to replace and its replacement, and what the report has to say
BUGS = {
    "head_dim is width / heads": ("config", '"head_dim": 256, ', "", "text_config.head_dim.* is missing, expected 256"),
    "default of the query scale": (
        "config",
        '"query_pre_attn_scalar": 256,',
        '"query_pre_attn_scalar": 224,',
        "query_pre_attn_scalar.* is 224, expected 256",
    ),
    "exact gelu in the tower": (
        "tower",
        'linear(gelu(linear(y, w, at + "mlp.fc1")), w',
        'linear(exact(linear(y, w, at + "mlp.fc1")), w',
        "MLP uses the exact GELU",
    ),
    "patches column by column": (
        "tower",
        "transpose(0, 2, 4, 1, 3, 5)",
        "transpose(0, 4, 2, 1, 3, 5)",
        "patches column by column",
    ),
    "no position embeddings": (
        "tower",
        '    x = x + w["v.embeddings.position_embedding.weight"]\n',
        "",
        r"(?s)forgets the position embeddings.*first intermediate value that differs is embeddings",
    ),
    "post-norm in the tower": (
        "tower",
        '        y = layer_norm(x, w, at + "layer_norm2", eps)\n'
        '        x = x + linear(gelu(linear(y, w, at + "mlp.fc1")), w, at + "mlp.fc2")\n',
        '        x = layer_norm(x, w, at + "layer_norm1", eps)\n'
        '        x = layer_norm(x + linear(gelu(linear(x, w, at + "mlp.fc1")), w, at + "mlp.fc2"), w, at + "layer_norm2", '
        "eps)\n",
        r"first intermediate value that differs is layers\.0 ",
    ),
    "no projector bias": (
        "projector",
        'return linear(features, model[1], "p")',
        'return features @ model[1]["p.weight"].T',
        "projector forgets the bias",
    ),
    "projector scale of old code": (
        "projector",
        'return linear(features, model[1], "p")',
        'return linear(features, model[1], "p") / np.float32(model[0]["text_config"]["hidden_size"] ** 0.5)',
        "projector divides by √D",
    ),
    "causal prefix": (
        "masks",
        "block = np.cumsum(token_type_ids, 1)",
        "block = np.cumsum(np.ones_like(token_type_ids), 1)",
        "is causal",
    ),
    "padding is visible": (
        "masks",
        "return visible & (attention_mask == 1)[:, None, :] | np.eye(attention_mask.shape[1], dtype=bool)",
        "return visible",
        "(ignores|leaves) padding|padding visible|`attention_mask` were 1 everywhere",
    ),
    "no + 1 in RMSNorm": (
        "decoder",
        '* (1 + w[name + ".weight"])',
        '* w[name + ".weight"]',
        "RMSNorm multiplies by w instead of 1 \\+ w",
    ),
    "eps of RMSNorm": ("decoder", 'c["rms_norm_eps"], c["model', '1e-6, c["model', "RMSNorm always uses a small eps"),
    "interleaved RoPE": (
        "decoder",
        "    a, b = x[..., :half], x[..., half:]\n"
        "    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)\n",
        "    a, b = x[..., 0::2], x[..., 1::2]\n"
        "    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)\n",
        r"(?s)RoPE rotates pairs of neighboring.*differs is layers\.0\.self_attn\.q",
    ),
    "theta": ("decoder", 'c["rope_theta"])', "10000.0)", "RoPE always uses a theta of 10000"),
    "exact gelu in the decoder": (
        "decoder",
        'gelu(linear(y, w, name + "mlp.gate_proj"))',
        'exact(linear(y, w, name + "mlp.gate_proj"))',
        "GeGLU uses the exact GELU",
    ),
    "key heads in turn": (
        "decoder",
        "k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)",
        "k, v = np.tile(k, (1, group, 1, 1)), np.tile(v, (1, group, 1, 1))",
        "repeats the key heads in turn",
    ),
    "gate and up exchanged": (
        "decoder",
        'gelu(linear(y, w, name + "mlp.gate_proj")) * linear(y, w, name + "mlp.up_proj")',
        'gelu(linear(y, w, name + "mlp.up_proj")) * linear(y, w, name + "mlp.gate_proj")',
        "applies GELU to `up` instead of `gate`|exchanges gate and up",
    ),
    "decoder's last norm": ("decoder", 'rms_norm(x, w, "t.norm", eps), kept', "x, kept", "forgets its last norm"),
    "loads what does not fit": (
        "loading",
        "if weights.keys() != shapes.keys():",
        "if shapes.keys() - weights.keys():",
        "one weight too many.* without an error",
    ),
    "one name too few": ("loading", '    name = name.removeprefix("model.")\n', "", "raises ValueError on line"),
    "bfloat16 as float16": ("loading", '"BF16": np.uint16', '"BF16": np.float16', "raises|weights in bfloat16"),
    "no √D": (
        "logits",
        ' * np.float32(config["text_config"]["hidden_size"] ** 0.5)',
        "",
        "text embeddings are not multiplied by √D",
    ),
    "√D for the image too": (
        "logits",
        "    return x\n\n\ndef scores_of",
        '    x[image] *= np.float32(model[0]["text_config"]["hidden_size"] ** 0.5)\n    return x\n\n\ndef scores_of',
        "image vectors are multiplied by √D too",
    ),
    "steps one position too low": (
        "cache",
        "at = attention_mask.sum(1, keepdims=True)",
        "at = attention_mask.sum(1, keepdims=True) - 1",
        "every new token has a position one too low",
    ),
    "steps from position 0": (
        "cache",
        "at = attention_mask.sum(1, keepdims=True)",
        "at = attention_mask.sum(1, keepdims=True) * 0",
        "every new token has position 0",
    ),
    "the prompt's first scores": (
        "cache",
        "scores_of(model, hidden[:, -1]), (att",
        "scores_of(model, hidden[:, 0]), (att",
        "`prefill` returns other scores",
    ),
    "keys twice": (
        "cache",
        "np.concatenate([past[i][0], k], 2)",
        "np.concatenate([past[i][0][:, :, 1:], k, k], 2)",
        "first position along axis 1 is right",
    ),
    "eos is always 1": (
        "greedy",
        '    ends = model[0]["eos_token_id"]\n',
        "    ends = 1\n",
        "goes on after an end token",
    ),
    "first token lost": (
        "greedy",
        "    for _ in range(max_new_tokens):\n        tokens",
        "    scores, cache = step(model, cache, scores.argmax(-1))\n    for _ in range(max_new_tokens):\n        tokens",
        "the first one, which the prompt predicts, is lost",
    ),
    "generation ignores padding": (
        "batch",
        "    scores, cache = prefill(model, input_ids",
        "    attention_mask = np.ones_like(attention_mask)\n    scores, cache = prefill(model, input_ids",
        "as if there were no padding",
    ),
    "stops with the first row": (
        "batch",
        "if all(row[-1] in ends for row in rows)",
        "if any(row[-1] in ends for row in rows)",
        "ends after",
    ),
    "no cap in attention": (
        "PaliGemma 2",
        'cap = c["attn_logit_softcapping"] if two else None',
        "cap = None",
        "forgets the soft cap|ignores the cap",
    ),
    "no final cap": (
        "PaliGemma 2",
        'cap = config["text_config"].get("final_logit_softcapping")',
        "cap = None",
        "logits are not capped",
    ),
    "query scale of Gemma 1": (
        "PaliGemma 2",
        '(c["query_pre_attn_scalar"] if two else c["head_dim"])',
        'c["head_dim"]',
        "attention scales by head_dim",
    ),
    "window in odd layers": ("PaliGemma 2", "two and i % 2 == 0", "two and i % 2 == 1", "window is in odd layers"),
    "window one too wide": (
        "PaliGemma 2",
        "at[:, None] - at[None, :] < size",
        "at[:, None] - at[None, :] <= size",
        "window is one token too wide|allows one key too many",
    ),
    "window limits the prompt": (
        "PaliGemma 2",
        "mask & (near | prompt[:, :, None] & prompt[:, None, :])",
        "mask & near",
        "window also limits the prefix",
    ),
    "steps without window": (
        "PaliGemma 2",
        'sliding = full & (age < (model[0]["text_config"].get("sliding_window") or len(age)))',
        "sliding = full",
        "steps ignore the sliding window",
    ),
    "no norms after": (
        "PaliGemma 2",
        'x + (rms_norm(out, w, name + "post_feedforward_layernorm", eps) if two else out)',
        "x + out",
        "forgets `post_feedforward_layernorm`",
    ),
}
EXACT = "\n\ndef exact(x):\n    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))).astype(np.float32)\n"
IN_CI = (
    "exact gelu in the tower",
    "no + 1 in RMSNorm",
    "interleaved RoPE",
    "causal prefix",
    "head_dim is width / heads",
)


@pytest.fixture(autouse=True)
def no_shape_checker(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def planted(old: str, new: str) -> str:
    assert SOURCE.count(old) >= 1, old
    return SOURCE.replace(old, new) + EXACT


def check(folder: Path, source: str, **options) -> capstone.Report:
    path = folder / "my_paligemma.py"
    path.write_text(source, encoding="utf-8")
    return capstone.check(path, **options)


def finds_bug(folder: Path, name: str) -> None:
    step, old, new, pattern = BUGS[name]
    report = check(folder, planted(old, new))
    wrong = report.first_wrong
    assert wrong is not None, f"{name}: nothing found\n{report}"
    assert wrong.name == step, f"{name}: {report}"
    assert re.search(pattern, "\n".join((wrong.message, *wrong.notes)), re.IGNORECASE), f"{name}: {wrong}"
    assert all(s.mark == capstone.PASSED for s in report.steps[: wrong.number - 1])


@pytest.mark.parametrize("name", IN_CI)
def test_a_planted_bug_is_named(tmp_path, name):
    finds_bug(tmp_path, name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(BUGS.keys() - set(IN_CI)))
def test_every_planted_bug_is_named(tmp_path, name):
    finds_bug(tmp_path, name)
