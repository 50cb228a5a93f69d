"""What a run leaves in its folder: state, metrics, curve, and a lock while it lasts.

    state.safetensors   weights, optimizer and step
    metrics.jsonl       one record per line
    curve.png           the loss

Files are written beside their place and then moved there, so a kill leaves the old file or the new one, never half.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minivlm.hub import read_json, write_atomically

try:
    import fcntl
except ImportError:  # Windows has no such locks, so there two runs in one folder are not noticed
    fcntl = None

STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), torch.optim.Muon: ("momentum_buffer",)}


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create a folder and lock it for this process. The lock ends with the process, even if that is killed.

    Raises:
        ValueError: If another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            if fcntl:  # a record lock: unlike flock, not inherited by data workers, which outlive a killed trainer
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"Process {file.read()} is training in {folder}. Wait for it, or choose another folder."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def find_optimizers(
    module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, tuple[nn.Parameter, torch.optim.Optimizer]]:
    """Name of each trained parameter → the parameter and its optimizer."""
    owner = {id(w): optimizer for optimizer in optimizers for group in optimizer.param_groups for w in group["params"]}
    return {name: (w, owner[id(w)]) for name, w in module.named_parameters() if id(w) in owner}


def gather(value: Tensor) -> Tensor:
    """The whole of a tensor that is sharded among the processes (FSDP2). Any other tensor as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """This process's share of a tensor, if ``like`` is sharded; else the tensor, on its device."""
    value = value.to(like.device)
    if not hasattr(like, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # here because it takes half a second to import

    return distribute_tensor(value, like.device_mesh, like.placements)


def save_state(
    path: Path | None, name: str, step: int, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Write everything needed to resume into one file. Without a path, only give others this process's shards."""
    tensors = {f"module.{key}": value for key, value in module.state_dict().items()}
    for key, (weight, optimizer) in find_optimizers(module, optimizers).items():
        tensors |= {f"optimizer.{key}.{entry}": value for entry, value in optimizer.state.get(weight, {}).items()}
    if path is None:
        for value in tensors.values():
            gather(value)
        return
    tensors = {key: gather(value.detach()).to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    with write_atomically(path) as part:
        save_file(tensors, part, metadata={"name": name, "step": str(step)})


def load_state(
    path: Path, name: str, steps: int, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> int:
    """Load the state of the run ``name`` of ``steps`` steps into its module and optimizers.

    Returns:
        How many steps the run has done.

    Raises:
        ValueError: If the file is damaged, or of another run or another module.
    """
    try:
        with safe_open(path, "pt") as file:
            found, step = file.metadata()["name"], int(file.metadata()["step"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the state of a training run ({error}). Delete it to start over.") from error
    if found != name or not 0 < step <= steps:
        raise ValueError(
            f"{path} is the state of {found!r} at step {step}, but this run is {name!r} with {steps} steps. "
            "Choose another folder, or delete the file to start over."
        )
    trained = find_optimizers(module, optimizers)
    trained = {  # without those that never had a gradient
        key: (weight, optimizer, STATE[type(optimizer)])
        for key, (weight, optimizer) in trained.items()
        if f"optimizer.{key}.{STATE[type(optimizer)][0]}" in tensors
    }
    shapes = {f"module.{key}": value.shape for key, value in module.state_dict().items()}
    for key, (weight, _, entries) in trained.items():
        shapes |= {f"optimizer.{key}.{entry}": torch.Size() if entry == "step" else weight.shape for entry in entries}
    unequal = [key for key in {**shapes, **tensors} if key not in tensors or tensors[key].shape != shapes.get(key)]
    if unequal:
        raise ValueError(
            f"{path} is the state of another module: {len(unequal)} tensors differ, first {unequal[0]}. "
            "Choose another folder, or delete the file to start over."
        )
    module.load_state_dict({key: scatter(tensors[f"module.{key}"], like) for key, like in module.state_dict().items()})
    for key, (weight, optimizer, entries) in trained.items():
        moments = {entry: tensors[f"optimizer.{key}.{entry}"] for entry in entries}
        optimizer.state[weight] = {k: scatter(value, weight) if value.ndim else value for k, value in moments.items()}
    return step


def record_settings(path: Path, settings: dict, write: bool = True) -> None:
    """Write down the settings of a run, or check that those that its folder records are the same.

    Args:
        write: Whether this process writes the file.

    Raises:
        ValueError: If the folder has a run with other settings, or the file cannot be read.
    """
    if path.exists():
        recorded = read_json(path)
        if other := [name for name in {**settings, **recorded} if settings.get(name) != recorded.get(name)]:
            name = other[0]
            raise ValueError(
                f"{path} records another run: its {name} is {recorded.get(name)!r}, not {settings.get(name)!r}. "
                "Choose an empty folder, or repeat its options."
            )
    elif write:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as part:
            part.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_metrics(path: Path) -> list[dict]:
    """The records in a metrics file. A line that was cut short, as a power cut leaves it, is skipped."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class MetricsLog:
    """Appends records to a metrics file, each with the seconds trained so far.

    Lines after the saved step are dropped: the resumed run writes them again.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= step]
        with write_atomically(path) as part:
            part.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self.started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)

    def write(self, **record: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record | {"seconds": round(time.monotonic() - self.started, 1)}) + "\n")


def draw_curve(path: Path, curves: dict[str, tuple[list[dict], str]]) -> None:
    """Draw the loss over the steps, one panel per curve: title → (its records, the unit of its loss)."""
    from matplotlib.figure import Figure

    columns = min(4, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(3.5 * columns + 1, 3 * rows), layout="constrained")
    for number, (title, (records, unit)) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], color="#0072B2")
        axes.set(title=title, xlabel="step", ylabel=f"loss ({unit})", yscale="log")
    with write_atomically(path) as part:
        figure.savefig(part, dpi=120, format="png")
