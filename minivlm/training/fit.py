"""One training loop for everything here: it resumes, shows progress and leaves a record.

    from minivlm import training
    training.fit(module, batches, steps=1000, lr=1e-3, out="runs/mine")

``module(**batch)`` returns the loss, a mean over the batch. Every parameter with ``requires_grad`` is trained. The
folder ``out`` holds the run's state, metrics and curve (files.py). The same call on the same folder resumes from the
state, or only loads it if the run was finished.

If ``batches[i]`` depends on ``i`` alone, a run that was killed and resumed ends with the same weights, bit for bit, as
one that was not. Under ``torchrun`` each process computes its share of every step and gradients are averaged (DDP). If
the model is too large for that, each process also keeps only its share of weights, gradients and moments (FSDP2).

Sources: AdamW arXiv:1711.05101; Muon https://kellerjordan.github.io/posts/muon, scaled to AdamW's step size as in
arXiv:2502.16982, section 2.2; cosine schedule arXiv:1608.03983, equation 5.
"""

import contextlib
import gc
import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # noqa: F401  if first imported after init_process_group, it keeps the group's threads alive
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from minivlm.training.files import MetricsLog, draw_curve, load_state, lock_folder, read_metrics, save_state

PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")


def check_range(config: object, names: str, low: Real, high: Real = math.inf) -> None:
    """Check that each of these numbers is finite and from ``low`` to ``high``.

    Raises:
        ValueError: If one is not.
    """
    for name in names.split():
        value = getattr(config, name)
        if not (math.isfinite(value) and low <= value <= high):
            wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be {wanted}, not {value}.")


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters whose name contains ``match`` learn at ``lr_scale`` times the rate.

    Attributes:
        warmup: A linear rise of their own over this fraction of the horizon, on top of that of the run.
    """

    match: str
    lr_scale: float = 1.0
    warmup: float = 0.0

    def __post_init__(self):
        check_range(self, "lr_scale", 0)
        check_range(self, "warmup", 0, 1)


@dataclass(frozen=True)
class FitConfig:
    """The numbers of a run.

    Attributes:
        horizon: Steps until the learning rate reaches zero: ``steps`` if omitted. A larger one stops before that.
        warmup: Fraction of the horizon over which the learning rate rises linearly.
        weight_decay: Of matrices only. Biases, scales and embeddings ("embed" in the name) do not decay.
        clip: Largest norm of the gradient of all parameters together.
        precision: Of the arithmetic, by autocast. Weights and optimizer keep their own dtype.
        optimizer: "adamw", or "muon" for matrices, with AdamW for everything else.
        groups: Parameters with a learning rate of their own. The first group that matches a name has it.
        save_every: Seconds between saved states.
        log_every: Steps per record of the metrics. States are saved at these steps only.
    """

    steps: int
    lr: float
    horizon: int | None = None
    warmup: float = 0.01
    weight_decay: float = 0.02
    clip: float = 1.0
    precision: str = "float32"
    optimizer: str = "adamw"
    groups: tuple[ParameterGroup, ...] = ()
    save_every: float = 180.0
    log_every: int = 50

    def __post_init__(self):
        check_range(self, "steps log_every", 1)
        check_range(self, "lr weight_decay save_every", 0)
        check_range(self, "warmup", 0, 1)
        if self.horizon is not None:
            check_range(self, "horizon", 1)
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, not {self.clip}; use math.inf for no clipping.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {self.optimizer!r}.")


@dataclass(frozen=True)
class DistributedContext:
    """Where and how a run happens: the device of this process, how many processes share the run, its data workers."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    workers: int = 0  # DataLoader processes that prepare batches; 0: this process does
    compile: bool = False  # the layers, by torch: a minute to start with, then fewer and larger operations
    shard: bool = False  # several processes: each keeps only its share of every weight (FSDP2)

    def __post_init__(self):
        check_range(self, "workers", 0)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        return self.shard and self.world_size > 1

    def agree(self, answer: bool) -> bool:
        """What the main process answers, in all processes."""
        if self.world_size > 1:
            decided = torch.tensor(float(answer), device=self.device)
            dist.broadcast(decided, 0)
            return bool(decided)
        return answer

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1:
            gc.collect()  # DistributedDataParallel is a cycle; freed after its group, it waits for the threads forever
            dist.destroy_process_group()


def find_distributed_context(
    device: str | None = None, workers: int = 0, compile: bool = False, shard: bool = False
) -> DistributedContext:
    """The given device, or a GPU if there is one; one process, or as many as ``torchrun`` started.

    Raises:
        ValueError: If there is no such device or ``workers`` is negative.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and world_size > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"There is no device {device!r} to train on ({str(error).splitlines()[0]}).") from error
    context = DistributedContext(torch.device(device), rank, world_size, workers, compile, shard)
    if world_size > 1 and not dist.is_initialized():
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return context


# --- one step -------------------------------------------------------------------------------------------------------


def lr_schedule(step: int, horizon: int, warmup: float) -> float:
    """Factor of the learning rate: a linear rise over ``warmup`` of the horizon, times half a cosine down to zero."""
    rise = max(1, round(warmup * horizon))
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / horizon)))


def make_optimizers(
    module: nn.Module, weight_decay: float = 0.0, groups: Sequence[ParameterGroup] = (), optimizer: str = "adamw"
) -> list[torch.optim.Optimizer]:
    """AdamW over the parameters with ``requires_grad``; or Muon over their matrices, and AdamW over the others.

    Muon makes all singular values of a matrix's momentum about equal, so that no direction is left behind. That makes
    no sense for an embedding, whose rows are looked up one by one, or for a scale. ``set_learning_rate`` sets the
    rates before each step. Muon's updates are scaled so that both can share one rate.

    Raises:
        ValueError: If a group matches no parameter.
    """
    named = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    for group in groups:
        if not any(group.match in name for name in named):
            raise ValueError(f"No trained parameter has {group.match!r} in its name, as a parameter group expects.")
    buckets: dict[str, dict[tuple[ParameterGroup, bool], list[nn.Parameter]]] = {name: {} for name in OPTIMIZERS}
    for name, weight in named.items():
        group = next((group for group in groups if group.match in name), ParameterGroup(""))
        decays = weight.ndim > 1 and "embed" not in name
        kind = "muon" if optimizer == "muon" and decays and weight.ndim == 2 else "adamw"
        buckets[kind].setdefault((group, decays), []).append(weight)
    adamw, muon = (
        [{"params": p, "group": group, "weight_decay": weight_decay * decays} for (group, decays), p in found.items()]
        for found in buckets.values()
    )
    optimizers: list[torch.optim.Optimizer] = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, lr=0.0, betas=(0.9, 0.98)))
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], step: int, config: FitConfig) -> None:
    """Set the learning rate of each parameter group for a step."""
    horizon = config.horizon or config.steps
    for settings in (settings for optimizer in optimizers for settings in optimizer.param_groups):
        group = settings["group"]
        rise = min(1.0, (step + 1) / max(1, round(group.warmup * horizon)))
        settings["lr"] = config.lr * lr_schedule(step, horizon, config.warmup) * (group.lr_scale * rise)


def compile_layers(module: nn.Module) -> None:
    """Compile each block of each ``nn.ModuleList``, for sequences of any length. Blocks of a kind share a program."""
    for blocks in (part for part in module.modules() if isinstance(part, nn.ModuleList)):
        for block in blocks:
            block.compile(dynamic=True)


def shard_layers(module: nn.Module, precision: str) -> None:
    """Split every weight among the processes, in place. A layer's own are gathered only while it runs.

    In bfloat16, what is gathered is a copy in bfloat16: it takes half the memory, and autocast would keep its copies.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here because it takes a second to import

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bfloat16" else MixedPrecisionPolicy()
    for blocks in [part for part in module.modules() if isinstance(part, nn.ModuleList)]:
        for block in blocks:
            fully_shard(block, mp_policy=policy)
    fully_shard(module, mp_policy=policy)  # everything else


@contextlib.contextmanager
def plain_attention(device: torch.device) -> Iterator[None]:
    """On a CPU, torch's fused attention in bfloat16 takes twice as long, forward and backward, as plain products."""
    if device.type != "cpu":
        yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name, for the CPU too
    with sdpa_kernel(SDPBackend.MATH):
        yield


def loss_share(module: nn.Module, batch: dict[str, Tensor]) -> float:
    """Weight of this process's loss in the mean over all processes, on average 1.

    Each loss is a mean over ``module.loss_weight(batch)`` items, a number that may differ among processes. A module
    without that method has the same number of items everywhere.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1 or not hasattr(module, "loss_weight"):
        return 1.0
    count = torch.as_tensor(module.loss_weight(batch)).to(next(module.parameters()).device, torch.float32)
    total = count.clone()
    dist.all_reduce(total)
    return float(count * world_size / total)


def train_step(
    module: nn.Module,
    batch: dict[str, Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    precision: str = "float32",
    clip: float = 1.0,
) -> float:
    """One update of the weights.

    Returns:
        The loss over the batches of all processes.
    """
    device = next(module.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    share = loss_share(module.module if isinstance(module, DistributedDataParallel) else module, batch)
    with plain_attention(device), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        loss = module(**batch) * share
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([weight for weight in module.parameters() if weight.requires_grad], clip)
    for optimizer in optimizers:
        optimizer.step()
    loss = loss.detach().clone()
    if not dist.is_initialized():
        return float(loss)
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


# --- a run ----------------------------------------------------------------------------------------------------------


def iterate(batches: Any, start: int, steps: int, workers: int) -> Iterable[dict[str, Tensor]]:
    """The batches of steps ``start`` to ``steps``: ``batches[i]``, prepared ahead by workers, or the next of them."""
    if hasattr(batches, "__getitem__") and not isinstance(batches, IterableDataset):
        ahead = {"num_workers": workers, "prefetch_factor": 4 if workers else None}
        return DataLoader(batches, batch_size=None, sampler=range(start, steps), **ahead)
    return itertools.islice(batches, start, steps)


def fit(
    module: nn.Module,
    batches: Any,
    *,
    out: str | Path,
    context: DistributedContext | None = None,
    name: str = "train",
    loss_unit: str = "nats",
    **config: Any,
) -> None:
    """Train a module, or resume training it.

    Args:
        module: ``module(**batch)`` returns the loss. It ends on the context's device, in training mode.
        batches: ``batches[i]`` is the batch of step ``i``, a dictionary of tensors; or any iterable of batches, of
            which a resumed run skips those that it has seen.
        out: Folder of the run.
        context: ``find_distributed_context()`` if omitted.
        name: Of the run, for its state, progress bar and curve.
        loss_unit: For the curve.
        config: Fields of ``FitConfig``: ``steps`` and ``lr`` at least.

    Raises:
        ValueError: If a number is out of range, there are fewer batches than steps, the folder is in use or has the
            state of another run, or the loss is not finite.
    """
    config, out = FitConfig(**config), Path(out)
    steps = config.steps
    if hasattr(batches, "__len__") and len(batches) < steps:
        raise ValueError(f"There are {len(batches)} batches, fewer than the {steps} steps of {name}.")
    context = context or find_distributed_context()
    module.to(context.device).train()
    if context.compile:
        compile_layers(module)
    precision = config.precision
    if context.is_sharded:
        if config.optimizer == "muon":
            raise ValueError("Muon needs whole matrices, so it cannot train a sharded module. Use AdamW.")
        shard_layers(module, precision)
        precision = "float32"  # of what autocast has left to do
    optimizers = make_optimizers(module, config.weight_decay, config.groups, config.optimizer)
    with lock_folder(out) if context.is_main else contextlib.nullcontext():
        state, metrics = out / "state.safetensors", out / "metrics.jsonl"
        done = load_state(state, name, steps, module, optimizers) if state.exists() else 0
        if done == steps:
            return
        is_replicated = context.world_size > 1 and not context.is_sharded
        wrapped = DistributedDataParallel(module) if is_replicated else module
        log = MetricsLog(metrics, done) if context.is_main else None
        recent, saved = [], time.monotonic()
        with tqdm(total=steps, initial=done, unit="step", desc=name, disable=not context.is_main) as bar:
            for batch in iterate(batches, done, steps, context.workers):
                set_learning_rate(optimizers, done, config)
                try:
                    recent.append(train_step(wrapped, batch, optimizers, precision, config.clip))
                except ValueError as error:  # such as weights that have become infinite
                    raise ValueError(f"Step {done + 1} of {name}: {error}") from error
                done += 1
                bar.update()
                if done % config.log_every and done < steps:
                    continue
                loss = sum(recent) / len(recent)
                recent = []
                bar.set_postfix(loss=f"{loss:.4f}")
                if not math.isfinite(loss):
                    raise ValueError(f"The loss is {loss} at step {done} of {name}. Lower the learning rate.")
                if log:
                    log.write(step=done, loss=loss)
                if context.agree(done == steps or time.monotonic() - saved > config.save_every):
                    save_state(state if log else None, name, done, module, optimizers)  # all have their share to give
                    if log:
                        draw_curve(out / "curve.png", {name: (read_metrics(metrics), loss_unit)})
                    saved = time.monotonic()
        if done < steps:
            raise ValueError(f"The batches ended after {done} of the {steps} steps of {name}.")
