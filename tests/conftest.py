"""Tiny random models, the same models in transformers, and batches for both.

In the tiny configurations, no two values that could be confused are equal: head_dim is not hidden / heads, the query
scale is not head_dim ** -0.5, the sliding window is shorter than the sequences, the soft caps are low enough to matter,
and norm weights and biases are not zero. With the options in pyproject.toml, jaxtyping checks every shape annotation of
the package while the tests run.
"""

import copy
import os
from dataclasses import dataclass

import hypothesis
import jaxtyping
import pytest
import torch

from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training.tokenizer import train_tokenizer

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start, since tests run in parallel
hypothesis.settings.register_profile("patient", deadline=None)  # test machines can be slow or busy
hypothesis.settings.load_profile("patient")

VISION = SiglipVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=12, patch_size=4
)
GEMMA = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 12,
    "rope_theta": 500.0,  # low, so that even the slowest rotations matter within a short sequence
}
GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 6,
}


def tiny_config(version: int, **text) -> PaliGemmaConfig:
    """PaliGemma 1, with the id of <image> beyond the embedding table, or PaliGemma 2, with the id inside it."""
    text = (GEMMA if version == 1 else GEMMA2) | text
    image = text["vocab_size"] if version == 1 else text["vocab_size"] - 9
    return PaliGemmaConfig(vision_config=VISION, text_config=GemmaConfig(**text), image_token_index=image)


def tiny_model(version: int, seed: int = 0, **text) -> PaliGemma:
    """A model with random weights everywhere, including norms and biases.

    Attention is sharp enough to depend on positions. Token embeddings are small enough for the layers to matter:
    otherwise the tied output head predicts every token to repeat.
    """
    model = PaliGemma(tiny_config(version, **text)).init_weights(seed).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=g)
            if "q_proj.weight" in name:
                weight *= 2
        model.language_model.model.embed_tokens.weight *= 0.3
        model.language_model.model.norm.weight += 6
    return model


def their_name(name: str) -> str:
    """The name of our weight in the modules of transformers 5."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    return "model." + name.replace("language_model.model.", "language_model.")


def in_transformers(model: PaliGemma, attention: str = "eager"):
    """The same model in transformers, with copies of the weights. Soft caps only work with "eager" attention."""
    import transformers

    config = transformers.PaliGemmaConfig(**model.config.to_dict())
    theirs = transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    weights = {their_name(name): weight for name, weight in model.state_dict().items()}
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    theirs.load_state_dict(weights, strict=True)
    return theirs.to(model.dtype)


@pytest.fixture
def unchecked():
    """Switches the checker of annotations off, as it is for users: what they see is the package's own error."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@dataclass
class Pair:
    ours: PaliGemma
    theirs: torch.nn.Module
    attention: str


PAIRS = {"PaliGemma 1 eager": (1, "eager"), "PaliGemma 1 sdpa": (1, "sdpa"), "PaliGemma 2 eager": (2, "eager")}


@pytest.fixture(scope="session", params=PAIRS.values(), ids=PAIRS.keys())
def pair(request) -> Pair:
    """The same model in minivlm and in transformers."""
    version, attention = request.param
    ours = tiny_model(version)
    return Pair(ours, in_transformers(ours, attention), attention)


@pytest.fixture(scope="session", params=[1, 2], ids=["PaliGemma 1", "PaliGemma 2"])
def model(request) -> PaliGemma:
    return tiny_model(request.param)


def random_batch(
    config: PaliGemmaConfig, prefixes: list[int], suffixes: list[int], side: str = "right", seed: int = 0
) -> dict[str, torch.Tensor]:
    """A padded batch. Row i: 9 <image>, <bos>, then ``prefixes[i]`` prefix tokens and ``suffixes[i]`` suffix tokens."""
    g = torch.Generator().manual_seed(seed)
    P = config.vision_config.num_image_tokens
    longest = max(p + s for p, s in zip(prefixes, suffixes, strict=True)) + P + 1
    batch = {name: torch.zeros(len(prefixes), longest, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    for row, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        length = P + 1 + prefix + suffix
        start = 0 if side == "right" else longest - length
        ids = torch.randint(3, 110, (length,), generator=g)
        ids[:P], ids[P] = config.image_token_index, config.bos_token_id
        batch["input_ids"][row, start : start + length] = ids
        batch["attention_mask"][row, start : start + length] = 1
        batch["token_type_ids"][row, start + length - suffix : start + length] = 1
    size = config.vision_config.image_size
    batch["pixel_values"] = torch.rand(len(prefixes), 3, size, size, generator=g) * 2 - 1
    return batch


def row_alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch, without its padding."""
    real = batch["attention_mask"][row].bool()
    return {
        name: value[row : row + 1] if name == "pixel_values" else value[row : row + 1, real]
        for name, value in batch.items()
    }


def with_eos(model: PaliGemma, token: int) -> PaliGemma:
    """The same model with ``token`` as its <eos>."""
    model = copy.copy(model)
    model.config = copy.copy(model.config)
    model.config.eos_token_id = token
    return model


def labels_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"].masked_fill(batch["token_type_ids"] == 0, -100)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest absolute difference divided by the largest absolute value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="session")
def tiny_processor() -> Processor:
    """A processor for 12-pixel images of 9 tokens, with a tokenizer trained on a few words."""
    words = ["caption en", "answer en what is left of the red circle?", "detect cat ; dog", "a cat and two dogs"]
    return Processor(train_tokenizer(words, 1600), image_size=12, num_image_tokens=9)


@pytest.fixture(scope="session", params=[1, 2], ids=["PaliGemma 1", "PaliGemma 2"])
def talker(request, tiny_processor) -> PaliGemma:
    """A random model with the vocabulary of ``tiny_processor``."""
    model = tiny_model(request.param, vocab_size=tiny_processor.tokenizer.get_vocab_size())
    model.config.image_token_index = tiny_processor.image_token_id
    return model


def pytest_collection_modifyitems(items):
    """Whatever uses the fixture ``browser`` drives Chromium, and is marked so."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.browser)


def pytest_xdist_make_scheduler(config, log):
    """Like ``--dist loadfile``, but every executed notebook can go to the next free worker."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesAndNotebooks(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if "test_runs_from_top_to_bottom" in nodeid else nodeid.split("::")[0]

    return FilesAndNotebooks(config, log)
