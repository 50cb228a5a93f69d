"""The right answers: small checkpoints with random weights, and minivlm and transformers as functions on numpy arrays.

In the small checkpoints, no two numbers that could be confused are equal: head_dim is not width / heads, the query
scale is not head_dim ** -0.5, the window is shorter than the sequences, the soft caps are low enough to matter, both
eps are large, and no norm weight or bias is zero. A model that only works at the sizes of one checkpoint fails.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlm import masks
from minivlm.cache import GrowingCache, StaticCache
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.course.viz import trace_steps
from minivlm.course.viz.weights import decoder_parts, tower_parts
from minivlm.gemma import GemmaAttention
from minivlm.generation import generate_ids
from minivlm.paligemma import PaliGemma
from minivlm.siglip import SiglipAttention

VISION = SiglipVisionConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=12,
    patch_size=4,
    layer_norm_eps=0.02,
)
GEMMA = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "rms_norm_eps": 0.03,
    "rope_theta": 500.0,  # low, so that even the slowest rotations matter within a short sequence
}
GEMMA2 = GEMMA | {
    "model_type": "gemma2",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 6,
}
IMAGE_TOKEN = 111  # in the small checkpoints
TEXT_TOKENS = (3, 110)  # the range from which random prompts are drawn

# What transformers has in a PaliGemma file on the hub, which leaves out every number that has a default.
SPARSE = {
    "PaliGemma 3B": {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "text_config": {
            "model_type": "gemma",
            "vocab_size": 257216,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
    },
    "PaliGemma 2 10B": {
        "model_type": "paligemma",
        "image_token_index": 257152,
        "eos_token_id": 1,
        "text_config": {
            "model_type": "gemma2",
            "vocab_size": 257216,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 448,
        },
    },
    "a file by transformers 5": {
        "model_type": "paligemma",
        "image_token_id": 111,
        "eos_token_id": [1, 107],
        "text_config": GEMMA | {"model_type": "gemma", "rope_theta": None, "rope_parameters": {"rope_theta": 500.0}},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 40}
        | {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 12, "patch_size": 4, "layer_norm_eps": 0.02},
    },
}


@dataclass
class Checkpoint:
    """A folder in the hub's format, and the model in it.

    Attributes:
        name: Completes "on …".
    """

    name: str
    folder: Path
    model: PaliGemma

    @property
    def config(self) -> PaliGemmaConfig:
        return self.model.config


def small_config(version: int) -> PaliGemmaConfig:
    text = GemmaConfig(**(GEMMA if version == 1 else GEMMA2))
    eos = 1 if version == 1 else [1, 107]
    return PaliGemmaConfig(replace(VISION), text, image_token_index=IMAGE_TOKEN, eos_token_id=eos)


def small_model(version: int, seed: int = 0) -> PaliGemma:
    """Random weights everywhere. Attention is sharp, and embeddings are small enough for the layers to matter."""
    model = PaliGemma(small_config(version)).init_weights(seed).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=g)
        if "q_proj.weight" in name:
            weight *= 2
    model.language_model.model.embed_tokens.weight *= 0.3
    model.language_model.model.norm.weight += 6
    return model


def save_small(folder: Path, version: int, name: str) -> Checkpoint:
    model = small_model(version)
    model.save_pretrained(folder)
    return Checkpoint(name, folder, model)


def with_end(checkpoint: Checkpoint, folder: Path, eos: int | list[int]) -> Checkpoint:
    """The same weights in another folder, with other end tokens in config.json."""
    model = PaliGemma(replace(checkpoint.config, eos_token_id=eos)).eval().requires_grad_(False)
    model.load_state_dict(checkpoint.model.state_dict())
    model.save_pretrained(folder)
    return Checkpoint(checkpoint.name, folder, model)


def random_batch(
    config: PaliGemmaConfig, prompts: list[int], answers: list[int], side: str = "right", seed: int = 0
) -> dict[str, np.ndarray]:
    """A padded batch. Row i: the image, <bos>, ``prompts[i]`` random tokens, ``answers[i]`` random tokens."""
    rng, patches = np.random.default_rng(seed), config.vision_config.num_image_tokens
    sizes = [patches + 1 + p + a for p, a in zip(prompts, answers, strict=True)]
    batch = {n: np.zeros((len(sizes), max(sizes)), np.int64) for n in ("input_ids", "attention_mask", "token_type_ids")}
    for row, (size, answer) in enumerate(zip(sizes, answers, strict=True)):
        start = 0 if side == "right" else max(sizes) - size
        ids = rng.integers(*TEXT_TOKENS, size)
        ids[:patches], ids[patches] = config.image_token_index, config.bos_token_id
        batch["input_ids"][row, start : start + size] = ids
        batch["attention_mask"][row, start : start + size] = 1
        batch["token_type_ids"][row, start + size - answer : start + size] = 1
    side_length = config.vision_config.image_size
    pixels = rng.uniform(-1, 1, (len(sizes), 3, side_length, side_length)).astype(np.float32)
    return batch | {"pixel_values": pixels}


def arguments(batch: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """The arrays of a batch in the order of the learner's functions."""
    return tuple(batch[name] for name in ("input_ids", "pixel_values", "attention_mask", "token_type_ids"))


def config_values(config: PaliGemmaConfig) -> dict[str, Any]:
    """The numbers that ``read_config`` has to return, by their path: "text_config.head_dim"."""
    text, vision = config.text_config, config.vision_config
    found = {"image_token_index": config.image_token_index, "eos_token_id": config.eos_token_id}
    found |= {f"vision_config.{name}": getattr(vision, name) for name in vision.__annotations__}
    found |= {f"text_config.{name}": getattr(text, name) for name in text.__annotations__}
    unused = ["vision_config.num_channels", "text_config.max_position_embeddings"]
    if not text.has_post_norms:
        unused += ["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window"]
    return {name: value for name, value in found.items() if not name.endswith(tuple(unused))}


class Reference:
    """minivlm's functions with the arguments and results of the learner's: numpy arrays.

    Attributes:
        cache: The kind of cache that ``steps`` uses, "growing" or "static". Some mistakes are possible in one only.
    """

    def __init__(self, model: PaliGemma):
        self.model, self.cache = model, "growing"

    @torch.no_grad()
    def encode_image(self, pixel_values):
        return self.model.vision_tower(to_torch(pixel_values)).numpy()

    @torch.no_grad()
    def project(self, features):
        return self.model.multi_modal_projector(to_torch(features)).numpy()

    @staticmethod
    def prefix_lm_mask(attention_mask, token_type_ids):
        mask = masks.prefix_lm_mask(to_torch(token_type_ids))
        return masks.mask_padding(mask, to_torch(attention_mask)).numpy()

    @torch.no_grad()
    def decode(self, embeddings, attention_mask, token_type_ids):
        inputs = map(to_torch, (embeddings, attention_mask, token_type_ids))
        return self.model.language_model.model(*inputs).numpy()

    @torch.no_grad()
    def logits(self, input_ids, pixel_values, attention_mask, token_type_ids):
        inputs = map(to_torch, (input_ids, pixel_values, attention_mask, token_type_ids))
        names = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")
        return self.model(**dict(zip(names, inputs, strict=True))).numpy()

    @torch.no_grad()
    def steps(self, input_ids, pixel_values, attention_mask, token_type_ids, answer):
        """The scores after the prompt and after each token of a given answer, [B, 1 + N, V], with a cache."""
        ids, pixels, attention, types, answer = map(
            to_torch, (input_ids, pixel_values, attention_mask, token_type_ids, answer)
        )
        room = ids.shape[1] + answer.shape[1]
        config = self.model.config.text_config
        kept = GrowingCache() if self.cache == "growing" else StaticCache(config, len(ids), room)
        inputs = {"input_ids": ids, "pixel_values": pixels, "attention_mask": attention, "token_type_ids": types}
        scores = [self.model(**inputs, cache=kept, last_only=True)]
        for token in answer.T:
            attention = torch.cat((attention, attention.new_ones(len(ids), 1)), 1)
            scores.append(self.model(input_ids=token[:, None], attention_mask=attention, cache=kept))
        return torch.cat(scores, 1).numpy()

    @torch.no_grad()
    def generate(self, input_ids, pixel_values, attention_mask, token_type_ids, max_new_tokens):
        """Rows of new tokens, without the end token."""
        names = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")
        values = map(to_torch, (input_ids, pixel_values, attention_mask, token_type_ids))
        found = generate_ids(self.model, dict(zip(names, values, strict=True)), max_new_tokens=int(max_new_tokens))
        return [until_end(row, self.model.config.eos_token_ids) for row in found.sequences.tolist()]

    def inner(self, name: str, *inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The intermediate values of ``encode_image`` or ``decode``, in the order in which they are computed."""
        found: dict[str, Tensor] = {}
        with inner_hooks(self.model, name == "encode_image", found):
            getattr(self, name)(*inputs)
        return {key: value.numpy() for key, value in found.items()}


def to_torch(array: Any) -> Tensor:
    return array if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def until_end(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]


@contextlib.contextmanager
def inner_hooks(model: PaliGemma, is_tower: bool, found: dict[str, Tensor]) -> Iterator[None]:
    """Records the outputs of the tower's or the decoder's modules, and what attention computes inside."""
    prefix = trace_steps.TOWER if is_tower else trace_steps.DECODER
    names = [step.name for step in trace_steps.steps(model) if step.name.startswith(prefix)]

    def record(name, module, inputs, output):
        if isinstance(module, GemmaAttention | SiglipAttention):
            parts = decoder_parts if isinstance(module, GemmaAttention) else tower_parts
            found.update({f"{name}.{part}": value for part, value in parts(module, inputs).items()})
        found[name] = output.clone()

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(record, short(name))).remove)
        yield


def short(name: str) -> str:
    """The name of an intermediate value without what its model's part is called: "layers.2.self_attn.q"."""
    return re.sub(r"^(model\.|vision_tower\.|vision_model\.|encoder\.|language_model\.)+", "", name)


class Judge:
    """transformers on the same checkpoint."""

    def __init__(self, folder: Path):
        import transformers  # takes seconds, and the first steps do not need it

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        load = transformers.PaliGemmaForConditionalGeneration.from_pretrained
        self.model = load(folder, attn_implementation="eager", dtype=torch.float32).eval().requires_grad_(False)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.ends = values["eos_token_id"] if isinstance(values["eos_token_id"], list) else [values["eos_token_id"]]

    @torch.inference_mode()
    def logits(self, input_ids, pixel_values, attention_mask, token_type_ids):
        return self.model(**self.inputs(input_ids, pixel_values, attention_mask, token_type_ids)).logits.numpy()

    @torch.inference_mode()
    def generate(self, input_ids, pixel_values, attention_mask, token_type_ids, max_new_tokens):
        inputs = self.inputs(input_ids, pixel_values, attention_mask, token_type_ids)
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": self.ends}
        found = self.model.generate(**inputs, max_new_tokens=int(max_new_tokens), **options)
        return [until_end(row, self.ends) for row in found[:, input_ids.shape[1] :].tolist()]

    @staticmethod
    def inputs(*values) -> dict[str, Tensor]:
        names = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")
        return dict(zip(names, map(to_torch, values), strict=True))
