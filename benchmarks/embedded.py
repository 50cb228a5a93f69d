"""The embedded checkpoint next to transformers, same weights: decoding, captions, training, cold start, growth."""

import time
from functools import partial

import torch

import minivlm
from benchmarks import theirs
from benchmarks.measure import Row, Spread, fresh, in_turns, ratio
from minivlm import emoji, generation, training
from minivlm.cache import StaticCache, cache_bytes
from minivlm.emoji import recipe
from minivlm.emoji.batches import SuffixBatches
from minivlm.training.objectives import SuffixObjective
from minivlm.vqvae import MaskVQVAE

TOKENS = 64
ENDLESS = -1  # no token has this id, so an answer never ends


def speed_row(figure: str, contestants: dict, work: float, unit: str, rounds: int, target: str) -> Row:
    """``work`` per second for each contestant, and the speed of the others relative to transformers."""
    seconds = in_turns(contestants, rounds)
    rates = {name: Spread.of([work / s for s in some]) for name, some in seconds.items()}
    others = [name for name in contestants if name != "transformers"]
    return Row(figure, unit, rates, {name: ratio(seconds["transformers"], seconds[name]) for name in others}, target)


def decode(threads: int, rounds: int) -> Row:
    """64 tokens for one image and "caption en", prefill included."""
    torch.set_num_threads(threads)
    model, processor, other = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained(), theirs.load()
    batch = processor(text="caption en", images=emoji.make_scene(0, "validation").image)
    model.config.eos_token_id = ENDLESS

    def ours(compiled: bool) -> torch.Tensor:
        return generation.generate_ids(model, batch, max_new_tokens=TOKENS, compile=compiled).sequences

    contestants = {
        "minivlm": partial(ours, False),
        "minivlm, compiled": partial(ours, True),
        "transformers": partial(theirs.answers, other, batch, TOKENS, None),
    }
    check_equal({name: answer().tolist() for name, answer in contestants.items()})
    title = f"decode, embedded checkpoint, CPU, {threads} thread{'s' * (threads > 1)}"
    return speed_row(title, contestants, TOKENS, "tokens/s", rounds, "≥ 2.5")


def caption(batch_size: int, rounds: int) -> Row:
    """From images to captions as text."""
    torch.set_num_threads(2)
    model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
    images = [emoji.make_scene(seed, "validation").image for seed in range(batch_size)]

    def ours(compiled: bool) -> list[str]:
        return minivlm.generate(model, processor, images, "caption en", compile=compiled)

    contestants = {
        "minivlm": partial(ours, False),
        "minivlm, compiled": partial(ours, True),
        "transformers": partial(theirs.captions, theirs.load(), theirs.processor(), images),
    }
    check_equal({name: answer() for name, answer in contestants.items()})
    title = f"caption end to end, embedded checkpoint, CPU, batch {batch_size}"
    return speed_row(title, contestants, batch_size, "captions/s", rounds, "≥ 2")


def check_equal(answers: dict[str, object]) -> None:
    """A race only counts if all contestants give the same answers."""
    if len({str(answer) for answer in answers.values()}) != 1:
        raise AssertionError(f"the contestants answer differently: {answers}")


def training_step(rounds: int) -> Row:
    """One update of the recipe's last stage: 16 images, 64 rows of text."""
    torch.set_num_threads(2)
    config, processor = recipe.TrainConfig(), minivlm.Processor.from_pretrained()
    options = {"mixture": recipe.MIXTURE, "examples": config.finish_examples, "vae": MaskVQVAE.from_pretrained()}
    batches = SuffixBatches(processor, config.finish_batch, first_seed=1_096_000, crowded=True, **options)
    batches = [batches[i] for i in range(rounds + 1)]
    modules = {
        "minivlm": SuffixObjective(minivlm.PaliGemma.from_pretrained()),
        "transformers": theirs.Loss(theirs.load(dtype=torch.float32)),
    }
    with torch.no_grad():
        one, other = (float(module(**batches[0])) for module in modules.values())
    if abs(one - other) > 1e-5 * other:
        raise AssertionError(f"the losses differ: {one} and {other}")
    contestants = {}
    for name, module in modules.items():
        optimizers, left = training.make_optimizers(module.train(), config.weight_decay), iter(batches)
        contestants[name] = partial(one_update, module, optimizers, left, config)
    return speed_row(
        "training step, embedded recipe, CPU", contestants, config.finish_batch, "images/s", rounds, "≥ 1.3"
    )


def one_update(module, optimizers, batches, config) -> None:
    training.train_step(module, next(batches), optimizers, config.precision)


OUR_START = """
import json, minivlm
model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
print(json.dumps(minivlm.generate(model, processor, "data/images/scenes/validation-0.png", "caption en")))
"""
THEIR_START = """
import json
from PIL import Image
from benchmarks import theirs
image = Image.open("data/images/scenes/validation-0.png")
print(json.dumps(theirs.captions(theirs.load(), theirs.processor(), [image])[0]))
"""


def cold_start(rounds: int) -> Row:
    """A fresh process: import, load, one caption."""
    codes, printed = {"minivlm": OUR_START, "transformers": THEIR_START}, {}

    def start(name: str) -> None:
        printed[name] = fresh(codes[name]).printed

    seconds = in_turns({name: partial(start, name) for name in codes}, rounds)
    check_equal(printed)
    return Row(
        "import and first caption, a cold process, embedded checkpoint, CPU",
        "s",
        {name: Spread.of(some) for name, some in seconds.items()},
        {"minivlm, time": ratio(seconds["minivlm"], seconds["transformers"])},
        "≤ 0.7",
    )


# --- how cost grows -------------------------------------------------------------------------------------------------


def growth(rounds: int, most_tokens: int = 4096, most_rows: int = 32) -> tuple[Row, dict[str, list]]:
    """Time and cache for longer answers and larger batches, and the points of the figure."""
    torch.set_num_threads(1)
    model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
    model.config.eos_token_id = ENDLESS
    model.config.text_config.max_position_embeddings = 2 * most_tokens  # longer than any answer of this model
    image = emoji.make_scene(0, "validation").image
    config = model.config.text_config

    def write(rows: int, tokens: int, marks: set[int]) -> dict[int, float]:
        """Seconds from the first new token to each of ``marks``."""
        batch = processor(text=["caption en"] * rows, images=[image] * rows)
        seen, start = {}, None
        options = generation.GenerationConfig(max_new_tokens=tokens)
        for number, _ in enumerate(generation.generate_tokens(model, batch, options)):
            start = start or time.perf_counter()
            if number in marks:
                seen[number] = time.perf_counter() - start
        return seen

    lengths = [2**i for i in range(6, most_tokens.bit_length())]
    sizes = [2**i for i in range(most_rows.bit_length())]
    write(1, 64, set())
    by_length = [write(1, most_tokens + 1, set(lengths)) for _ in range(max(1, rounds // 3))]
    seconds = {n: Spread.of([run[n] for run in by_length]).median for n in lengths}
    by_size = in_turns({n: partial(write, n, TOKENS, set()) for n in sizes}, rounds)
    batches = {n: Spread.of(some).median for n, some in by_size.items()}
    for tokens, rows in [(n, 1) for n in lengths] + [(TOKENS, n) for n in sizes]:
        cache = StaticCache(config, rows, tokens)
        allocated = sum(memory.nbytes for memory in cache.keys + cache.values)
        if allocated != cache_bytes(config, tokens, rows, torch.float32):
            raise AssertionError(f"the formula of chapter 07 is wrong for {tokens} tokens and {rows} rows")
    points = {
        "tokens": lengths,
        "seconds": list(seconds.values()),
        "bytes": [cache_bytes(config, n, 1, torch.float32) for n in lengths],
        "rows": sizes,
        "seconds of 64 tokens": list(batches.values()),
        "bytes of 64 tokens": [cache_bytes(config, TOKENS, n, torch.float32) for n in sizes],
    }
    exponents = {
        f"time, tokens {lengths[0]} → {lengths[-1]}": exponent(lengths, points["seconds"]),
        "cache bytes, the same": exponent(lengths, points["bytes"]),
        f"time of 64 tokens, batch 1 → {sizes[-1]}": exponent(sizes, points["seconds of 64 tokens"]),
        "cache bytes, the same ": exponent(sizes, points["bytes of 64 tokens"]),
    }
    row = Row(
        "how cost grows, embedded checkpoint, CPU, 1 thread",
        "exponent",
        {name: Spread(value, value, value) for name, value in exponents.items()},
        target="≤ 1",
        note="the formula of chapter 07 gives the cache's bytes exactly, at every point",
    )
    return row, points


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of log y over log x by least squares: 1 means that twice the size costs twice as much."""
    logs = torch.tensor([x, y], dtype=torch.float64).log()
    logs = logs - logs.mean(1, keepdim=True)
    return float((logs[0] * logs[1]).sum() / logs[0].square().sum())


def draw_growth(points: dict[str, list], path) -> None:
    """Time and cache against tokens and against batch size, on logarithmic axes, with fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = (
        ("tokens", "seconds", "bytes", "generated tokens, batch size 1"),
        ("rows", "seconds of 64 tokens", "bytes of 64 tokens", "batch size, 64 tokens each"),
    )
    for number, (along, seconds, bytes_, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        other = axes.twinx()
        for axis, key, color, mark, unit in (
            (axes, seconds, "#0072B2", "o", "time (s)"),
            (other, bytes_, "#D55E00", "s", "KV cache (bytes)"),
        ):
            slope = exponent(points[along], points[key])
            axis.plot(points[along], points[key], mark, color=color, label=f"{unit}, exponent {slope:.2f}")
            logs = torch.tensor([points[along], points[key]], dtype=torch.float64).log()
            line = (logs[1].mean() + slope * (logs[0] - logs[0].mean())).exp()
            axis.plot(points[along], line, "-" if axis is axes else "--", color=color, linewidth=1)
            axis.set(xscale="log", yscale="log", ylabel=unit)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.legend(handles=[axes.lines[0], other.lines[0]], loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)
