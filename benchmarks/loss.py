"""The chunked sigmoid loss next to its dense form: time and memory of one forward and backward pass.

Each runs in a fresh process that is limited to the free memory: the logits of 32,768 images and texts take 4.3 GB, and
the dense form needs several such tables.
"""

import sys
from functools import partial
from pathlib import Path

from benchmarks.measure import Row, Spread, fresh, in_turns, ratio

PAIRS, WIDTH = 32_768, 768

CODE = """
import json, sys
from benchmarks.loss import one_pass
print(json.dumps(one_pass(*sys.argv[1:])))
"""


def one_pass(which: str, pairs: str, open_clip: str) -> dict[str, float]:
    """Seconds and bytes of one forward and backward pass in this process, and the loss."""
    import time

    import torch

    from benchmarks.measure import own_peak
    from minivlm import losses

    limit_memory()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(int(pairs), WIDTH), dim=-1) for _ in range(2))
    scale, bias = torch.tensor(10.0).log(), torch.tensor(-10.0)
    leaves = [x.requires_grad_() for x in (images, texts, scale, bias)]
    if which == "open_clip":
        loss_of = partial(sig_lip_loss(open_clip), *leaves[:2], leaves[2].exp(), leaves[3])
    else:
        loss_of = partial(getattr(losses, which), *leaves)
    before, start = own_peak(), time.perf_counter()
    loss = loss_of()
    loss.backward()
    return {"seconds": time.perf_counter() - start, "bytes": own_peak() - before, "loss": loss.item()}


def limit_memory() -> None:
    """Makes running out of memory an error instead of a kill. Only Linux tells how much is free."""
    free = Path("/proc/meminfo")
    if free.exists():
        import resource

        kilobytes = next(int(x.split()[1]) for x in free.read_text().splitlines() if x.startswith("MemAvailable"))
        status = Path("/proc/self/status").read_text().splitlines()
        used = next(int(x.split()[1]) for x in status if x.startswith("VmSize"))
        limit = (used + int(0.9 * kilobytes)) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def sig_lip_loss(path: str):
    """``SigLipLoss`` from the file ``open_clip/loss.py``, which does not need the rest of its package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.SigLipLoss()


def sigmoid_loss(rounds: int, open_clip: Path | None, pairs: int = PAIRS) -> list[Row]:
    """Two rows: seconds, and the memory that a pass takes beyond the embeddings.

    While the dense form does not fit into memory, two more rows with half as many pairs.
    """
    contestants = {"chunked": "chunked_sigmoid_loss", "dense": "sigmoid_loss"}
    missing = {}
    if open_clip is None:
        missing["open_clip"] = "absent: name its file loss.py with --open-clip"
    else:
        contestants["open_clip"] = "open_clip"
    took: dict[str, list[dict]] = {name: [] for name in contestants}

    def run(name: str) -> None:
        if name not in missing:
            try:
                took[name].append(fresh(CODE, contestants[name], str(pairs), str(open_clip or "")).printed)
            except RuntimeError as error:
                missing[name] = f"did not run: {error}"

    in_turns({name: partial(run, name) for name in contestants}, rounds, warmups=0)
    done = {name: some for name, some in took.items() if name not in missing}
    check_losses(done)
    rows = []
    for key, unit, target in (("seconds", "s", "≤ 1.2"), ("bytes", "MiB", "≤ 1/16")):
        scale = 1 if key == "seconds" else 2**20
        values = {name: [one[key] / scale for one in some] for name, some in done.items()}
        measured = {name: Spread.of(some) for name, some in values.items()}
        others = [name for name in values if name != "chunked"]
        what = "time" if key == "seconds" else "peak"
        ratios = {f"chunked to {name}, {what}": ratio(values["chunked"], values[name]) for name in others}
        title = f"sigmoid loss, {pairs:,} pairs, embedding size {WIDTH}, CPU, forward and backward: {what}"
        rows.append(Row(title, unit, measured | missing, ratios, target))
    if "dense" in missing and pairs > 1024:  # compare at a size where both fit
        rows += sigmoid_loss(rounds, open_clip, pairs // 2)
    return rows


def check_losses(done: dict[str, list[dict]]) -> None:
    """All contestants must have computed the same loss."""
    losses = [one["loss"] for some in done.values() for one in some]
    if max(losses) - min(losses) > 1e-5 * max(losses):
        raise AssertionError(f"the losses differ: {done}")
