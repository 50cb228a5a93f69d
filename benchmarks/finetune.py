"""``python -m benchmarks.finetune``: what fine-tuning gives, what it forgets, and what memory a step takes.

    lab      the embedded checkpoint learns from 200 negatives; measured before and after, on new ones and on old scenes
    memory   the memory of a step: computed for PaliGemma 3B, and computed and measured for a small model

The new artist paints in negative: scenes with every value of every pixel inverted. What is there stays as it was.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import machine
from minivlm import emoji, hub, training
from minivlm.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from minivlm.emoji import batches
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training import finetune, memory
from minivlm.training.examples import read_examples
from minivlm.training.finetune import FineTuneConfig

KINDS = ("caption", "what", "is there", "where", "detect")  # of the examples
SEEDS = {"train": range(200), "valid": range(100)}  # of the scenes, in their splits train and validation
TOWER = ("multi_modal_projector",)
RUNS = {
    "adapters in the decoder": {},
    "adapters in tower and decoder": {"freeze": TOWER},
    "the same, half old scenes": {"freeze": TOWER, "replay": True},
    "in full": {"full": True, "lr": 5e-4},
}
LR = 4e-3  # of adapters: a small model takes a larger rate than PaliGemma


def save_data(folder: Path) -> None:
    """The data: negatives to learn from and new ones to measure on, and scenes as before to see what is forgotten."""
    for split, seeds in SEEDS.items():
        scenes = [emoji.make_scene(seed, "train" if split == "train" else "validation") for seed in seeds]
        inverted = [replace(scene, image=255 - scene.image) for scene in scenes]
        batches.save_examples(inverted, folder / "negatives" / split, KINDS)
        batches.save_examples(scenes, folder / "scenes" / split, KINDS)


def values(metrics: dict) -> dict[str, float]:
    return {name: round(metric.value, 4) for name, metric in metrics.items()}


def lab(args: argparse.Namespace) -> None:
    """Each run with each seed, from the embedded checkpoint."""
    torch.set_num_threads(1)
    context = training.DistributedContext(torch.device("cpu"))
    weights = hashlib.sha256((hub.EMBEDDED / "model.safetensors").read_bytes()).hexdigest()[:12]
    result = {"command": " ".join(["python -m benchmarks.finetune", *sys.argv[1:]]), "checkpoint": weights}
    result |= {"machine": machine(), "steps": args.steps, "batch_size": 16, "runs": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_data(folder)
        negatives, scenes = read_examples(folder / "negatives"), read_examples(folder / "scenes")
        model, processor = PaliGemma.from_pretrained(dtype=torch.float32), Processor.from_pretrained()

        def measure(model: PaliGemma) -> dict[str, dict[str, float]]:
            return {
                "negatives": values(finetune.evaluate(model, processor, negatives["valid"])),
                "scenes": values(finetune.evaluate(model, processor, scenes["valid"])),
            }

        result["before"] = measure(model)
        for run, options in RUNS.items():
            if run not in args.only:
                continue
            options = {"lr": LR, "batch_size": 16, "warmup": 0.1} | options
            train = negatives["train"] + (scenes["train"] if options.pop("replay", False) else [])
            after, curves = [], []
            for seed in range(args.seeds):
                config = FineTuneConfig(steps=args.steps, seed=seed, dtype="float32", **options)
                out = folder / f"{run} {seed}"
                tuned, _ = finetune.finetune(config, {"train": train}, None, out, context)
                after.append(measure(tuned))
                curves.append([(r["step"], round(r["loss"], 4)) for r in training.read_metrics(out / "metrics.jsonl")])
                seconds = training.read_metrics(out / "metrics.jsonl")[-1]["seconds"]
            trained = sum(weight.numel() for weight in tuned.parameters() if weight.requires_grad)
            result["runs"][run] = {"trained": trained, "seconds": seconds, "after": after, "curve": curves[0]}
            for data in ("negatives", "scenes"):
                rows = {name: [a[data][name] for a in after] for name in after[0][data]}
                cells = [f"{name} {result['before'][data][name]:.3f} → {np.mean(v):.3f}" for name, v in rows.items()]
                print(f"{run}, {data}: " + "; ".join(cells), flush=True)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


# --- memory ---------------------------------------------------------------------------------------------------------

SMALL = PaliGemmaConfig(
    SiglipVisionConfig(384, 1536, 8, 6, image_size=224, patch_size=14),
    GemmaConfig(vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8),
    image_token_index=8191,
)
GB = 1e9
OUT = Path("out/finetune.json")


def computed(config: PaliGemmaConfig, full: bool, rows: int, text: int, targets: int, half: bool) -> dict[str, float]:
    """Bytes of a step."""
    tuning = FineTuneConfig(full=full)
    trained, frozen = memory.count_weights(config, lambda model: finetune.prepare(model, tuning))
    state = memory.state_bytes(trained, frozen, 2 if half else 4)
    activations = memory.activation_bytes(config, rows, text, targets, half, full)
    return {"trained": trained, "state": state, "activations": activations}


def measured(full: bool, rows: int, text: int) -> float:
    """Peak of the resident memory of two steps of ``SMALL``, minus what the process takes without them, in bytes."""
    command = [sys.executable, "-m", "benchmarks.finetune", "step", str(int(full)), str(rows), str(text)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    options = {"capture_output": True, "check": True, "env": environment}
    peaks = [int(subprocess.run([*command, str(n)], **options).stdout) for n in (0, 2)]
    return peaks[1] - peaks[0]


def step(full: int, rows: int, text: int, steps: int) -> None:
    """Print the peak resident memory of this process after so many steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = torch.zeros(rows if steps else 1, 3, 224, 224)
    if steps:
        model = finetune.prepare(PaliGemma(SMALL).init_weights(0), FineTuneConfig(full=bool(full)))
        objective, P = finetune.FineTuneObjective(model), SMALL.vision_config.num_image_tokens
        ids = torch.full((rows, P + text), 5)
        ids[:, :P] = SMALL.image_token_index
        types = torch.zeros_like(ids)
        types[:, -text // 2 :] = 1
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
        batch["attention_mask"][0, -1] = 0  # padding, so that there is a mask
        batch |= {"labels": ids.masked_fill(types == 0, -100), "pixel_values": pixels}
        optimizers = training.make_optimizers(objective)
        for _ in range(steps):  # not train_step, which uses plain attention on a CPU: here it is fused, as on a GPU
            objective(**batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def show_memory(args: argparse.Namespace) -> None:
    """Two tables: PaliGemma 3B computed, and the small model computed and measured."""
    big, rows, text = PaliGemmaConfig(), args.rows, 32
    print(f"PaliGemma 3B, {rows} rows of 256 + {text} tokens, half of the text is answer, bfloat16 arithmetic:\n")
    print("| | weights that learn | weights, gradients, moments | activations | peak |\n|---|---|---|---|---|")
    settings = (("adapters, one GPU", 0, 1), ("in full, one GPU", 1, 1), ("in full, eight GPUs", 1, 8))
    for name, full, processes in settings:
        c = computed(big, bool(full), rows, text, rows * text // 2, half=True)
        state = c["state"] / processes
        peak = memory.peak_bytes(state, c["activations"], c["trained"], processes)
        cells = f"{c['trained'] / 1e6:,.0f} M", *(f"{b / GB:.1f} GB" for b in (state, c["activations"], peak))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\nA model of {memory.count_weights(SMALL, lambda m: m)[0] / 1e6:.0f} M weights, in float32:\n")
    print("| | rows | computed | measured | ratio |\n|---|---|---|---|---|")
    for name, full in (("adapters", False), ("in full", True)):
        for rows in (2, 8):
            c = computed(SMALL, full, rows, text, rows * text // 2, half=False)
            expected = c["state"] + c["activations"]  # the CPU's AdamW makes no further copy
            found = measured(full, rows, text)
            print(f"| {name} | {rows} | {expected / GB:.2f} GB | {found / GB:.2f} GB | {found / expected:.2f} |")


def main() -> None:
    if sys.argv[1:2] == ["step"]:  # a process of ``measured``
        return step(*map(int, sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__.replace("``", ""))
    parser.add_argument("what", choices=("lab", "memory"))
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="lab: runs of each kind; default 2")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="lab: of each run; default 300")
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=RUNS, default=list(RUNS), help="lab: some runs")
    parser.add_argument("--json", type=Path, default=OUT, help=f"lab: default {OUT}")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="memory: of a batch at 3B; default 8")
    args = parser.parse_args()
    (lab if args.what == "lab" else show_memory)(args)


if __name__ == "__main__":
    main()
