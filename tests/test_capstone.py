"""The capstone accepts a PaliGemma in another style, and names what is first wrong in one with a planted bug.

``capstone/functional.py`` is written for these tests, in functional numpy. A bug is a replacement in its text.
"""

import re
import time
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from minivlm.__main__ import main
from minivlm.course import capstone
from minivlm.course.capstone import template, worker
from minivlm.course.capstone.process import RETURNS
from minivlm.course.capstone.reference import small_config

RIGHT = Path(__file__).parent / "capstone" / "functional.py"
SOURCE = RIGHT.read_text(encoding="utf-8")

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
        '        y = x + linear(gelu(linear(x, w, at + "mlp.fc1")), w, at + "mlp.fc2")\n'
        '        x = layer_norm(y, w, at + "layer_norm2", eps)\n',
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
        "    scores, cache = step(model, cache, scores.argmax(-1))\n"
        "    for _ in range(max_new_tokens):\n        tokens",
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


def wrong_in(folder: Path, source: str, **options) -> capstone.Step:
    wrong = check(folder, source, **options).first_wrong
    assert wrong is not None
    return wrong


@pytest.mark.parametrize("name", IN_CI)
def test_a_planted_bug_is_named(tmp_path, name):
    finds_bug(tmp_path, name)


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(BUGS.keys() - set(IN_CI)))
def test_every_planted_bug_is_named(tmp_path, name):
    finds_bug(tmp_path, name)


def test_another_style_passes_all_steps_and_gets_a_certificate(tmp_path, capsys):
    """Through the command line, as a learner runs it."""
    path, page = tmp_path / "my_paligemma.py", tmp_path / "out" / "page.html"
    path.write_text(SOURCE, encoding="utf-8")
    assert main(["capstone", str(path), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.count(capstone.PASSED) == 12 and "12 of 12 steps passed." in out
    html = page.read_text(encoding="utf-8")
    images = re.findall(r"<img ([^>]*)>", html)
    assert len(images) == 1 and len(re.search(r'alt="([^"]*)"', images[0])[1]) > 200
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html
    assert "prefers-color-scheme: dark" in html
    for system in ("my_paligemma.py", "minivlm", "transformers"):
        assert re.search(rf"{system}</span></td><td>[1-9][\d,]*</td>", html), system


def test_steps_can_pass_before_others_are_written(tmp_path):
    """Only the mask is there: nothing is wrong, and every other step says what it needs."""
    source = SOURCE[SOURCE.index("def prefix_lm_mask") : SOURCE.index("def window_mask")]
    report = check(tmp_path, "import numpy as np\n\n" + source)
    assert [step.mark for step in report.steps].count(capstone.MISSING) == 11
    assert report.steps[3].mark == capstone.PASSED and not report.passed
    assert "`read_config` is not written yet" in report.steps[0].message
    assert "`load` is not written yet" in report.steps[1].message


def test_the_empty_file_is_not_written_yet(tmp_path, capsys):
    path = tmp_path / "new" / "my_paligemma.py"
    assert main(["capstone", str(path), "--start"]) == 0
    report = capstone.check(path)
    assert all(step.mark == capstone.MISSING for step in report.steps)
    path.write_text("mine")
    assert main(["capstone", str(path), "--start"]) == 2
    assert path.read_text() == "mine" and "already" in capsys.readouterr().err


def test_after_the_first_wrong_step_no_other_runs(tmp_path):
    step, old, new, _ = BUGS["causal prefix"]
    report = check(tmp_path, planted(old, new))
    assert [s.mark for s in report.steps] == [capstone.PASSED] * 3 + [capstone.WRONG] + [capstone.WAITING] * 8
    assert "step 4 comes first" in report.steps[-1].message


MASK = "def prefix_lm_mask(attention_mask, token_type_ids):\n    "
BROKEN = {
    "an endless loop": (MASK + "while True: pass", "took longer than 2 seconds"),
    "a loop that catches everything": (
        MASK + "while True:\n        try:\n            1 / 0\n        except BaseException:\n            pass",
        "took longer than 2 seconds",
    ),
    "a crash": ("import ctypes\n" + MASK + "ctypes.string_at(0)", "ended the Python process .*SIGSEGV"),
    "an exit": ("import os\n" + MASK + "os._exit(3)", "ended the Python process .*exit code 3"),
    "an error": (MASK + "return attention_mask @ nothing", r"raises NameError on line 2, `return .*`: .*nothing"),
    "sys.exit": ("import sys\n" + MASK + "sys.exit(1)", "raises SystemExit"),
    "None": (MASK + "pass", "returns None: is there a `return`"),
    "a string": (MASK + "return 'mask'", "returns a str, which is not an array|dtype"),
    "another shape": (MASK + "return attention_mask == 1", r"shape \[1, 14\], expected \[1, 14, 14\]"),
    "numbers": (MASK + "return (attention_mask[:, None] * attention_mask[..., None]) * 1.0", "dtype"),
    "too few parameters": ("def prefix_lm_mask(mask):\n    return mask", "raises TypeError"),
    "a syntax error": ("def prefix_lm_mask(:\n", "raises SyntaxError on line 1"),
    "an error at import": ("1 / 0\n", "raises ZeroDivisionError on line 1"),
    "an endless import": ("while True: pass\n", "importing it took longer than 2 seconds"),
    "the package itself": ("import minivlm\n", "imports minivlm, but has to stand on its own"),
    "transformers": (MASK + "from transformers import AutoModel", "imports transformers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_breaks_costs_one_sentence(tmp_path, name, capfd):
    source, pattern = BROKEN[name]
    began = time.monotonic()
    wrong = wrong_in(tmp_path, source, limit=2)
    assert re.search(pattern, "\n".join((wrong.message, *wrong.notes))), wrong
    assert "Traceback" not in str(wrong) + capfd.readouterr().err
    assert time.monotonic() - began < 30


def test_what_the_file_prints_does_not_reach_the_answers(tmp_path):
    mask = SOURCE[SOURCE.index("def prefix_lm_mask") : SOURCE.index("def window_mask")]
    report = check(tmp_path, 'import numpy as np\nprint("{}")\n' + mask.replace(":\n", ':\n    print("hello")\n', 1))
    assert report.steps[3].mark == capstone.PASSED


def test_results_can_come_from_any_framework(tmp_path):
    """The same mask from torch, from an object that only has __array__, and as lists, in turns."""
    source = """
from itertools import cycle
import torch

class Box:
    def __init__(self, array): self.array = array
    def __array__(self, dtype=None, copy=None): return self.array

forms = cycle([lambda x: x, lambda x: Box(x.numpy()), lambda x: x.tolist()])

def prefix_lm_mask(attention_mask, token_type_ids):
    block = torch.from_numpy(token_type_ids).cumsum(1)
    mask = (block[:, None] <= block[:, :, None]) & torch.from_numpy(attention_mask).bool()[:, None]
    return next(forms)(mask)
"""
    assert check(tmp_path, source).steps[3].mark == capstone.PASSED


def test_numbers_of_torch_become_float32():
    x = torch.linspace(-1, 1, 6, requires_grad=True)
    for value in (x, x.bfloat16().detach(), x.detach().double()):
        array = worker.to_array(value, "f")
        assert array.dtype == np.float32 and abs(array - x.detach().numpy()).max() < 1e-2
    with pytest.raises(worker.Problem, match="list of token ids"):
        worker.to_tokens([[1.5]], "generate")
    assert worker.to_tokens(torch.tensor([[1, 2]]), "generate") == [[1, 2]]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "my_paligemma.py"
    assert main(["capstone", str(path)]) == 2 and "--start" in capsys.readouterr().err
    path.write_text(MASK + "return attention_mask == 1")
    assert main(["capstone", str(path), "--out", str(tmp_path / "page.txt")]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["capstone", str(path)])
    assert ended.value.code == 1 and not list(tmp_path.glob("*.html"))


def test_the_template_lists_the_functions_that_the_steps_call():
    functions = re.findall(r"^def (\w+)", Path(template.__file__).read_text(encoding="utf-8"), re.MULTILINE)
    assert set(RETURNS) < set(functions) and len(functions) == 10
    assert set(re.findall(r"^def (\w+)", SOURCE, re.MULTILINE)) >= set(functions)


@pytest.mark.parametrize("version", [1, 2])
def test_no_two_numbers_of_a_small_checkpoint_can_be_confused(version):
    config = small_config(version)
    text, vision = config.text_config, config.vision_config
    sizes = [text.hidden_size, text.head_dim, text.intermediate_size, text.num_attention_heads * text.head_dim]
    sizes += [text.num_key_value_heads * text.head_dim, vision.intermediate_size, text.vocab_size]
    assert len(set(sizes)) == len(sizes)
    assert text.hidden_size // text.num_attention_heads != text.head_dim
    assert text.rms_norm_eps != vision.layer_norm_eps and text.num_key_value_heads not in (1, text.num_attention_heads)
    assert version == 1 or text.query_pre_attn_scalar != text.head_dim
