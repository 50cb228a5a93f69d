"""PaliGemma 3B's shapes with random bfloat16 weights, next to transformers and hkproj/pytorch-paligemma.

Random weights generate nonsense, and when two tokens are almost equally likely, rounding decides. So answers are not
compared; the amount of work does not depend on them.
"""

import json
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

import minivlm
from benchmarks import theirs
from benchmarks.measure import Row, Spread, fresh, in_turns, ratio, read_bandwidth
from minivlm import generation
from minivlm.cache import cache_bytes
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

TOKENS = 32
CAPTION_EN, NEWLINE = (21209, 659), 108  # ids

OUR_LOAD = """
import json, sys, time
from minivlm import PaliGemma
start = time.perf_counter()
model = PaliGemma.from_pretrained(sys.argv[1])
print(json.dumps(time.perf_counter() - start))
"""
THEIR_LOAD = """
import json, sys, time
import torch
from benchmarks import theirs
start = time.perf_counter()
model = theirs.load(sys.argv[1], dtype=torch.bfloat16)
print(json.dumps(time.perf_counter() - start))
"""


def config_of(image_size: int) -> PaliGemmaConfig:
    """google/paligemma-3b-pt-224 and -448."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
    )
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    return PaliGemmaConfig(vision_config=vision, text_config=GemmaConfig(), image_token_index=257_152, **ids)


def make_checkpoint(folder: Path, image_size: int) -> Path:
    """Writes random weights, 5.8 GB, to ``folder/random-3b-SIZE`` unless they are already there."""
    path = folder / f"random-3b-{image_size}"
    if not (path / "config.json").exists():  # written last
        with torch.device("meta"):
            model = minivlm.PaliGemma(config_of(image_size)).bfloat16()
        model = model.to_empty(device="cpu").requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.zero_()
        model.save_pretrained(path)
    return path


def prompt(config: PaliGemmaConfig, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A random image and the prompt "caption en", in the form that the processor returns."""
    generator = torch.Generator().manual_seed(0)
    size, P = config.vision_config.image_size, config.vision_config.num_image_tokens
    ids = torch.tensor([[config.image_token_index] * P + [config.bos_token_id, *CAPTION_EN, NEWLINE]])
    pixels = torch.rand(1, 3, size, size, generator=generator) * 2 - 1
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": pixels.bfloat16(),
    }
    return {name: value.to(device) for name, value in batch.items()}


def ours_on(path: Path, device: str) -> minivlm.PaliGemma:
    model = minivlm.PaliGemma.from_pretrained(path, device=device)
    model.config.eos_token_id = -1  # no token has this id, so an answer never ends
    return model


def write(model, batch: dict, tokens: int, compiled: bool = False) -> torch.Tensor:
    """Generates ``tokens`` tokens greedily."""
    return generation.generate_ids(model, batch, max_new_tokens=tokens, compile=compiled).sequences


def per_token_bytes(model, tokens: int) -> int:
    """Bytes that one decode step after ``tokens`` tokens must read: the decoder's weights once, and the cache."""
    decoder = model.language_model
    weights = sum(weight.nbytes for weight in decoder.parameters())
    return weights + cache_bytes(decoder.config, tokens, 1, torch.bfloat16)


def bound_row(figure: str, model, batch, ways: dict, rounds: int, device: str, what: str) -> Row:
    """Bytes read per second while decoding, next to the memory bandwidth measured before and after (the larger)."""
    read = per_token_bytes(model, batch["input_ids"].shape[1] + TOKENS // 2)
    counts = {f"{name} {n}": partial(run, tokens=n) for name, run in ways.items() for n in (1, TOKENS)}
    before = read_bandwidth(device)
    seconds = in_turns(counts, rounds)
    bandwidth = max(before, read_bandwidth(device))
    rates = {}
    for name in ways:
        pairs = zip(seconds[f"{name} {TOKENS}"], seconds[f"{name} 1"], strict=True)
        rates[name] = [read * (TOKENS - 1) / (many - one) for many, one in pairs]
    measured = {name: Spread.of([rate / 1e9 for rate in some]) for name, some in rates.items()}
    measured[what] = Spread(*[bandwidth / 1e9] * 3)
    shares = {f"{name}, share of the bound": Spread.of([r / bandwidth for r in some]) for name, some in rates.items()}
    return Row(figure, "GB/s", measured, shares, "≥ 0.8", f"{read / 1e9:.2f} GB per token")


# --- on a CPU -------------------------------------------------------------------------------------------------------


def on_cpu(folder: Path, hkproj: Path | None, rounds: int, compiled: bool = True) -> list[Row]:
    """The rows of the real size on a CPU, with and without a compiled decode step."""
    path = make_checkpoint(folder, 224)
    rows = loading(path, rounds)
    config, model = config_of(224), ours_on(path, "cpu")
    batch, other = prompt(config), theirs.load(path, dtype=torch.bfloat16)
    ways = {"minivlm": partial(write, model, batch)}
    if compiled:
        ways["minivlm, compiled"] = partial(write, model, batch, compiled=True)
    ours = {name: partial(run, tokens=TOKENS) for name, run in ways.items()}
    seconds = in_turns(ours | {"transformers": partial(theirs.answers, other, batch, TOKENS, None)}, rounds)
    measured = {name: Spread.of(some) for name, some in seconds.items()}
    ratios = {f"{name}, to transformers": ratio(seconds["transformers"], seconds[name]) for name in ways}
    title = "real size, CPU: bytes read per second while decoding"
    bound = bound_row(title, model, batch, ways, rounds, "cpu", "memory, summing 1 GiB")
    if hkproj is None:
        measured["hkproj"] = "absent: name its checkout with --hkproj"
    else:
        del other
        run = write_as_hkproj(*load_hkproj(hkproj, path), batch)
        beside = in_turns(ours | {"hkproj": run}, min(rounds, 2), warmups=0)
        measured["hkproj"] = Spread.of(beside["hkproj"])
        ratios |= {f"{name}, to hkproj": ratio(beside["hkproj"], beside[name]) for name in ways}
    title = f"real size, CPU: {TOKENS} tokens for one 224 px image"
    return [*rows, Row(title, "s", measured, ratios, "≥ 1.0 and ≥ 8"), bound]


def loading(path: Path, rounds: int) -> list[Row]:
    """Seconds and peak memory of loading, each time in a fresh process, with the file in the page cache."""
    size = (path / "model.safetensors").stat().st_size
    codes, took = {"minivlm": OUR_LOAD, "transformers": THEIR_LOAD}, {"minivlm": [], "transformers": []}
    in_turns({n: lambda n=n: took[n].append(fresh(codes[n], str(path))) for n in codes}, rounds)
    took = {name: some[-rounds:] for name, some in took.items()}  # without the warm-up
    seconds = {name: [one.printed for one in some] for name, some in took.items()}
    peaks = {name: [one.peak / size for one in some] for name, some in took.items()}
    return [
        Row(
            "real size, CPU: loading",
            "s",
            {name: Spread.of(some) for name, some in seconds.items()},
            {"minivlm, time": ratio(seconds["minivlm"], seconds["transformers"])},
            "≤ 1.0",
        ),
        Row(
            "real size, CPU: peak memory of loading, relative to the file's size",
            "× file",
            {name: Spread.of(some) for name, some in peaks.items()},
            {"minivlm, to the file": Spread.of(peaks["minivlm"])},
            "≤ 1.1",
            f"the file has {size / 1e9:.2f} GB",
        ),
    ]


# --- hkproj/pytorch-paligemma, from a checkout ----------------------------------------------------------------------


def write_as_hkproj(module, model, batch: dict) -> Callable[[], list[int]]:
    """Generation with a model of hkproj/pytorch-paligemma, in the loop of its inference.py."""

    @torch.inference_mode()
    def run() -> list[int]:
        ids, attention, cache, tokens = batch["input_ids"], batch["attention_mask"], module.KVCache(), []
        pixels = batch["pixel_values"].float()
        for _ in range(TOKENS):
            out = model(input_ids=ids, pixel_values=pixels, attention_mask=attention, kv_cache=cache)
            ids = out["logits"][:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
            attention = torch.cat([attention, torch.ones_like(ids)], dim=-1)
        return tokens

    return run


def load_hkproj(checkout: Path, path: Path) -> tuple:
    """hkproj's module and model with the file's weights, in float32, as its own loader has them.

    Its loader does not accept today's config.json, which contains pad_token_id twice.
    """
    sys.path.insert(0, str(checkout))
    try:
        import modeling_gemma
    finally:
        sys.path.remove(str(checkout))
    config = json.loads((path / "config.json").read_text())
    config["text_config"].pop("pad_token_id", None)
    with left_uninitialized():
        model = modeling_gemma.PaliGemmaForConditionalGeneration(modeling_gemma.PaliGemmaConfig(**config)).eval()
    missing = model.load_state_dict(load_file(path / "model.safetensors"), strict=False)
    model.tie_weights()
    if set(missing.missing_keys) - {"language_model.lm_head.weight"} or missing.unexpected_keys:
        raise RuntimeError(f"the checkout at {checkout} is not hkproj/pytorch-paligemma as we know it: {missing}")
    return modeling_gemma, model


@contextmanager
def left_uninitialized():
    """Skips the random initialization of layers whose weights are replaced anyway."""
    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d)
    originals = [kind.reset_parameters for kind in kinds]
    try:
        for kind in kinds:
            kind.reset_parameters = lambda self: None
        yield
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.reset_parameters = original


# --- on a GPU -------------------------------------------------------------------------------------------------------


def on_gpu(folder: Path, rounds: int) -> list[Row]:
    """The rows of the real size on a CUDA GPU."""
    path = make_checkpoint(folder, 224)
    model, other = ours_on(path, "cuda"), theirs.load(path, dtype=torch.bfloat16).cuda()
    batch = prompt(config_of(224), "cuda")
    tokens = 128

    def timed(run):
        def call():
            run()
            torch.cuda.synchronize()

        return call

    contestants = {
        "minivlm": timed(partial(write, model, batch, tokens)),
        "minivlm, compiled": timed(partial(write, model, batch, tokens, True)),
        "transformers": timed(partial(theirs.answers, other, batch, tokens, None)),
        "transformers, static cache": timed(
            partial(theirs.answers, other, batch, tokens, None, cache_implementation="static")
        ),
    }
    seconds = in_turns(contestants, rounds, warmups=3)  # compiling, recording
    rates = {name: Spread.of([tokens / s for s in some]) for name, some in seconds.items()}
    ratios = {f"to {n}": ratio(seconds[n], seconds["minivlm, compiled"]) for n in seconds if n.startswith("trans")}
    rows = [Row("real size, GPU: decode, batch 1", "tokens/s", rates, ratios, "≥ 3")]
    ways = {
        "minivlm": lambda tokens: timed(partial(write, model, batch, tokens))(),
        "minivlm, compiled": lambda tokens: timed(partial(write, model, batch, tokens, True))(),
    }
    title = "real size, GPU: bytes read per second while decoding"
    rows.append(bound_row(title, model, batch, ways, rounds, "cuda", "memory, copying 1 GiB"))
    for image_size in (224, 448):
        if image_size == 448:
            del model, other
            path = make_checkpoint(folder, 448)
            model, other = ours_on(path, "cuda"), theirs.load(path, dtype=torch.bfloat16).cuda()
        batch = prompt(config_of(image_size), "cuda")
        first = {
            "minivlm": timed(partial(write, model, batch, 1)),
            "transformers": timed(partial(theirs.answers, other, batch, 1, None)),
        }
        seconds = in_turns(first, rounds, warmups=2)
        measured = {name: Spread.of(some) for name, some in seconds.items()}
        ratios = {"minivlm, time": ratio(seconds["minivlm"], seconds["transformers"])}
        rows.append(Row(f"real size, GPU: first token, {image_size} px", "s", measured, ratios, "≤ 1.0"))
    return rows
