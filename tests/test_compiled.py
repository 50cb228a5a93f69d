"""The decode step whose shapes never change gives what the model gives, and compiled it gives it still."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_batch, relative_error

from minivlm import compiled
from minivlm.cache import StaticCache
from minivlm.generation import GenerationConfig

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++", "cl"))), reason="needs a C++ compiler"
)

# In a process of its own: torch cannot compile functions whose shapes are checked while they run.
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


def test_a_step_gives_the_logits_of_the_model(model):
    """Whatever is in slots that are not filled yet, in padded rows, and beyond the window of Gemma 2."""
    batch = random_batch(model.config, [8, 2, 5], [9, 9, 9], side="left")
    T = batch["input_ids"].shape[1]
    start = T - 9
    cache = StaticCache(model.config.text_config, 3, T + 5)
    for memory in cache.keys + cache.values:
        memory.normal_()
    ones = torch.ones(3, T + 5 - start, dtype=torch.long)
    real = torch.cat((batch["attention_mask"][:, :start], ones), dim=1).bool()
    with torch.no_grad():
        whole = model(**batch)
        prompt = {name: ids[:, :start] for name, ids in batch.items() if name != "pixel_values"}
        model(**prompt, pixel_values=batch["pixel_values"], cache=cache)
        for slot in range(start, T):
            token = batch["input_ids"][:, slot]
            got = compiled.decode_step(model, token, torch.tensor([slot]), real, cache.keys, cache.values)
            assert relative_error(got, whole[:, slot]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 300), (1, 300), (2, 1, 300)])
def test_products_of_one_row(dtype, shape):
    """Against float64, only the rounding of the result is left; with two rows, the product is torch's own."""
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


@needs_compiler
def test_compiled_answers_are_those_of_transformers_token_for_token():
    lines = [json.loads(line) for line in run(COMPARE)]
    assert len(lines) == 9
    for same, error, words in lines:
        assert same and error <= 1e-5
        assert words > 3, "answers too dull to tell anything"


@needs_compiler
def test_the_parity_of_greedy_answers_holds_with_compile_as_the_default():
    assert " passed" in run(PARITY)[-1]


def test_without_a_compiler_it_says_what_to_do(tmp_path):
    (message,) = run(COMPLAIN, CXX="/no/such/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    assert "install a C++ compiler, or leave compile out" in message


@pytest.mark.parametrize("cache", ["growing", None])
def test_only_a_static_cache_can_be_compiled_for(cache):
    with pytest.raises(ValueError, match="compile needs cache='static'"):
        GenerationConfig(compile=True, cache=cache)


def test_room_comes_in_steps():
    assert [compiled.padded_length(n) for n in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, 192]
