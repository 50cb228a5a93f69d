"""compiled.py: the decode step with fixed shapes computes the same as the model, eager and compiled."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_batch, relative_error, tiny_model

from minivlm import compiled, gemma, masks
from minivlm.cache import GrowingCache, StaticCache
from minivlm.generation import GenerationConfig

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))), reason="needs a C++ compiler"
)

# Runs in a separate process: torch cannot compile functions whose shapes are checked at run time.
COMPARE = """
import json, sys
sys.path.insert(0, "tests")
from conftest import PAIRS, in_transformers, random_batch, relative_error, tiny_model, with_eos
from minivlm.generation import generate_ids

for version, attention in PAIRS.values():
    model = tiny_model(version)
    theirs = in_transformers(model, attention)
    for prefixes in ([9, 3, 6, 6], [5, 2, 8, 1], [7]):
        batch = random_batch(model.config, prefixes, [0] * len(prefixes), side="left")
        fast, slow = (generate_ids(with_eos(model, -1), batch, max_new_tokens=24, compile=c) for c in (True, False))
        reference = theirs.generate(**batch, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        new = reference[:, batch["input_ids"].shape[1] :]
        same = fast.sequences.tolist() == slow.sequences.tolist() == new.tolist()
        print(json.dumps([same, relative_error(fast.log_probs, slow.log_probs), len(new.unique()) / len(new)]))
"""
PARITY = """
import pytest
from minivlm.generation import GenerationConfig

GenerationConfig.__init__.__defaults__ = (*GenerationConfig.__init__.__defaults__[:-1], True)
assert GenerationConfig().compile
raise SystemExit(pytest.main("-q -o addopts= -p no:cacheprovider tests/test_parity.py -k greedy".split()))
"""
COMPLAIN = """
import minivlm
model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
try:
    minivlm.generate(model, processor, "data/images/scenes/validation-0.png", "caption en", compile=True)
except ValueError as error:
    print(error)
"""


def run(code: str, **environment: str) -> list[str]:
    env, root = os.environ | {"OMP_NUM_THREADS": "1"} | environment, Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def decode(model, batch: dict[str, torch.Tensor], is_eager: bool) -> torch.Tensor:
    """Logits of the last 9 tokens, which go through the decode step one by one. Unfilled slots hold random values."""
    T, B = batch["input_ids"].shape[1], len(batch["input_ids"])
    start, logits = T - 9, []
    cache = StaticCache(model.config.text_config, B, T + 5)
    for memory in cache.keys + cache.values:
        memory.normal_()
    is_token = torch.nn.functional.pad(batch["attention_mask"][:, :start], (0, T + 5 - start), value=1).bool()
    prompt = {name: ids if name == "pixel_values" else ids[:, :start] for name, ids in batch.items()}
    with torch.no_grad():
        model(**prompt, cache=cache)
        for slot in range(start, T):
            token = batch["input_ids"][:, slot]
            if is_eager:
                mask = is_token[:, : slot + 1].long()
                logits.append(model(token[:, None], attention_mask=mask, cache=cache)[:, 0])
            else:
                step = (model, token, torch.tensor([slot]), is_token, cache.keys, cache.values)
                logits.append(compiled.decode_step(*step))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("is_eager", [True, False], ids=["eager", "fixed shapes"])
def test_a_step_computes_the_logits_of_the_model(model, is_eager):
    """With padded rows, and beyond the window of Gemma 2."""
    batch = random_batch(model.config, [8, 2, 5], [9, 9, 9], side="left")
    with torch.no_grad():
        whole = model(**batch)
    assert relative_error(decode(model, batch, is_eager), whole[:, -9:]) <= 1e-5


def two_newest(attention_mask, slot, window):
    """Another rule: the query attends only to itself and to the token before it."""
    key = torch.arange(attention_mask.shape[1])
    mask = ((slot - key >= 0) & (slot - key < 2)).expand(len(attention_mask), 1, -1)
    return mask, mask


RULES = {
    "masks": (masks, "newest_token_masks", two_newest),
    "positions": (gemma, "token_positions", lambda mask, queries: 2 * mask.cumsum(-1)[:, -queries:]),
}


@pytest.mark.parametrize("module, name, changed", RULES.values(), ids=RULES.keys())
def test_eager_and_compiled_decoding_share_their_rules(model, monkeypatch, module, name, changed):
    """A change of the one function changes both kinds of decode step, and in the same way."""
    batch = random_batch(model.config, [8, 2, 5], [9, 9, 9], side="left")
    before = decode(model, batch, is_eager=True)
    monkeypatch.setattr(module, name, changed)
    eager, fixed = decode(model, batch, is_eager=True), decode(model, batch, is_eager=False)
    assert relative_error(eager, before) > 1e-3
    assert relative_error(fixed, eager) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 300), (1, 300), (2, 1, 300)])
def test_products_of_one_row(dtype, shape):
    """Compared with float64, only the rounding of the result remains. With two rows, torch computes the product."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*size, generator=generator).to(dtype) for size in (shape, (70, 300)))
    with compiled.SingleRowLinear():
        product = torch.nn.functional.linear(x, weight)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    assert product.dtype == dtype and product.shape == exact.shape
    if shape[0] == 2:
        assert torch.equal(product, torch.nn.functional.linear(x, weight))
    else:
        assert relative_error(product.double(), exact) <= {8: 1e-15, 4: 2e-7, 2: 2**-9}[dtype.itemsize]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_bias_is_added(rows):
    layer = torch.nn.Linear(300, 70)
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0))
    positional, keyword = (layer.weight, layer.bias), {"weight": layer.weight, "bias": layer.bias}
    with compiled.SingleRowLinear(), torch.no_grad():
        products = [layer(x), torch.nn.functional.linear(x, *positional), torch.nn.functional.linear(x, **keyword)]
    for product in products:
        assert relative_error(product, layer(x)) <= 1e-6


class Prefill(torch.nn.Module):
    """Logits of a prompt, and the keys and values of every layer."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids, pixel_values):
        cache = GrowingCache()
        return self.model(
            input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            cache=cache,
        ), cache.layers


class Step(Prefill):
    """Logits after one more token."""

    def forward(self, token, attention_mask, layers):
        cache = GrowingCache()
        cache.layers = list(layers)
        return self.model(token, attention_mask=attention_mask, cache=cache), cache.layers


@pytest.mark.parametrize("version", [1, 2])
def test_prefill_and_decode_steps_can_be_exported(version, unchecked):
    """One program for every batch size and length, except that the prefill of Gemma 2 has a fixed length."""
    model = tiny_model(version, num_hidden_layers=2)
    small = random_batch(model.config, [4, 3], [2, 1], side="left")
    large = random_batch(model.config, [6, 3, 4], [3, 1, 0], side="left")
    is_fixed, auto = model.config.text_config.has_post_norms, torch.export.Dim.AUTO
    rows, tokens = torch.export.Dim("rows", max=64), torch.export.Dim("tokens", min=2, max=100)
    shapes = dict.fromkeys(small, {0: rows} if is_fixed else {0: rows, 1: tokens}) | {"pixel_values": {0: rows}}
    with torch.no_grad():
        prefill = torch.export.export(Prefill(model), (), small, dynamic_shapes=shapes).module()
    shapes = {"token": {0: auto}, "attention_mask": {0: auto, 1: auto}, "layers": [({0: auto, 2: auto},) * 2] * 2}

    def next_token(batch):
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        return torch.arange(5, 5 + len(mask))[:, None], mask, Prefill(model)(**batch)[1]

    with torch.no_grad():
        step = torch.export.export(Step(model), next_token(small), dynamic_shapes=shapes).module()
        for batch in (small, large):
            real = batch["attention_mask"].bool()
            if batch is small or not is_fixed:
                assert relative_error(prefill(**batch)[0][real], model(**batch)[real]) <= 1e-5
            inputs = next_token(batch)
            (logits, layers), (expected, expected_layers) = step(*inputs), Step(model)(*inputs)
            assert relative_error(logits, expected) <= 1e-5
            assert relative_error(layers[1][1], expected_layers[1][1]) <= 1e-5
        rolled = {name: value.roll(1, dims=0) for name, value in small.items()}  # values are not part of the program
        assert relative_error(prefill(**rolled)[0], model(**rolled)) <= 1e-5


def test_broken_weights_are_named_by_a_compiled_step_too(model, monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda device: lambda *inputs: torch.tensor([[0.0, torch.nan]]))
    step = compiled.CompiledStep(
        model, StaticCache(model.config.text_config, 1, 20), torch.ones(1, 15, dtype=torch.long)
    )
    with pytest.raises(ValueError, match="the output is not finite, but the weights are"):
        step(torch.tensor([5]))


@pytest.mark.slow
@needs_compiler
def test_compiled_answers_equal_those_of_transformers_token_for_token():
    lines = [json.loads(line) for line in run(COMPARE)]
    assert len(lines) == 9
    for same, error, variety in lines:
        assert same and error <= 1e-5
        assert variety > 3, "the answers are too uniform to show a difference"


@pytest.mark.slow
@needs_compiler
def test_greedy_parity_holds_with_compile_as_the_default():
    assert " passed" in run(PARITY)[-1]


@pytest.mark.slow
def test_the_error_without_a_compiler_says_what_to_do(tmp_path):
    (message,) = run(COMPLAIN, CXX="/no/such/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "Install a C++ compiler, or leave compile out" in message


@pytest.mark.parametrize("cache", ["growing", None])
def test_compile_needs_a_static_cache(cache):
    with pytest.raises(ValueError, match="compile needs cache='static'"):
        GenerationConfig(compile=True, cache=cache)


def test_slots_come_in_multiples_of_64():
    assert [compiled.padded_length(n) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 192]
