"""``python -m benchmarks.ablations``: what augmentation and Muon give, in the world of the small recipe.

Each variant trains the tower from nothing on the same scenes, with the stage ``align``. Its measure is the share of
patches whose nearest name is right, among the patches that an object covers by half or more: on new scenes by the
training artists, and by the artist of ``development``, whom training never shows.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import machine
from minivlm import emoji, training
from minivlm.emoji import batches, recipe
from minivlm.losses import l2_normalize
from minivlm.training.objectives import AlignmentObjective

SPLITS = ("validation", "development")
VARIANTS = {
    "no augmentation": {"augment": "none"},
    **{f"only {name}": {"augment": name} for name in emoji.AUGMENTATIONS},
    "all": {},
    "all, with AdamW": {"optimizer": "adamw", "align_lr": 1.5e-3},
}


@torch.no_grad()
def patch_accuracy(objective: AlignmentObjective, alignment: batches.AlignmentBatches, split: str, count: int) -> float:
    """The share of patches whose nearest name is right, in the first scenes of a split."""
    model, processor, world = objective.model, alignment.processor, alignment.world
    names = l2_normalize(objective.embed_names(alignment.name_ids()))
    right: list[Tensor] = []
    for seed in range(count):
        scene = emoji.make_scene(seed, split, processor.image_size, world)
        patches = l2_normalize(model.encode_image(processor.preprocess_images([scene.image]))[0])
        nearest = (patches @ names.T).argmax(1) % len(world.names)  # names come three times: "cat", " cat", " cats"
        for o, covered in zip(scene.objects, batches.patch_coverage(scene, alignment.patch_size), strict=True):
            right.append(nearest[torch.from_numpy(covered >= 0.5)] == world.names.index(o.name))
    return float(torch.cat(right).float().mean())


def measure(config: recipe.TrainConfig, count: int) -> dict[str, float]:
    """Train the stage ``align`` of a recipe, and measure it on ``count`` scenes of each split."""
    torch.manual_seed(config.seed)
    processor = recipe.make_processor(config)
    context = training.find_distributed_context("cpu", workers=1)
    with tempfile.TemporaryDirectory() as folder:
        plan = recipe.stages(config, recipe.make_model(config, processor), processor, Path(folder), context)
        align = next(stage for stage in plan if stage.name == "align")
        align.run(Path(folder), context)
    return {split: patch_accuracy(align.objective.eval(), align.batches, split, count) for split in SPLITS}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablations", description=__doc__.replace("``", ""))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs per variant; default 3")
    parser.add_argument("--scenes", type=int, default=300, metavar="N", help="per split, to measure on; default 300")
    parser.add_argument("--align-scenes", type=int, default=recipe.SMALL.align_scenes, help="to train on")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, default=Path("out/ablations.json"), help="default out/ablations.json")
    args = parser.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, float]]] = {}
    print("| % of patches | " + " | ".join(SPLITS) + " |\n|---|---|---|")
    for variant in args.only:
        config = replace(recipe.SMALL, align_scenes=args.align_scenes, **VARIANTS[variant])
        results[variant] = [measure(replace(config, seed=seed), args.scenes) for seed in range(args.seeds)]
        cells = [100 * np.array([result[split] for result in results[variant]]) for split in SPLITS]
        print(f"| {variant} | " + " | ".join(f"{c.mean():.1f} ({c.min():.1f}…{c.max():.1f})" for c in cells) + " |")
        content = {"machine": machine(), "seeds": args.seeds, "recipe": vars(recipe.SMALL), "results": results}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
