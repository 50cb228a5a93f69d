"""A report on what is installed and which checkpoints fit into memory, for bug reports. Makes no network requests."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from minivlm import __version__, hub

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow", "jupyterlab")
# Parameters in billions. In bfloat16 each takes two bytes.
HUB_CHECKPOINTS = {
    "google/paligemma-3b-mix-224": 2.923,
    "google/paligemma2-3b-mix-224": 3.03,
    "google/paligemma2-10b-mix-224": 9.66,
    "google/paligemma2-28b-mix-224": 27.65,
}
MEMORY_FACTOR = 1.1  # for weights plus the cache and activations of one image and a short answer, rounded up


def report() -> str:
    """The whole report as Markdown. It contains no user or folder names."""
    memory, gpu = cpu_memory(), find_gpu()
    lines = [
        f"- minivlm {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"- {', '.join(f'{name} {installed_version(name)}' for name in PACKAGES)}",
        f"- CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()}; memory {format_gb(memory)}",
        f"- GPU: {gpu[0]}, memory {format_gb(gpu[1])}" if gpu else "- GPU: none that torch can use",
        f"- embedded checkpoint: {try_embedded()}",
        "",
        "| checkpoint | weights in bfloat16 | CPU | GPU |",
        "|---|---|---|---|",
    ]
    for name, billions in HUB_CHECKPOINTS.items():
        need = billions * 2e9
        columns = (fits(need, memory), fits(need, gpu[1]) if gpu else "none")
        lines.append(f"| {name} | {need / 1e9:.1f} GB | {' | '.join(columns)} |")
    return "\n".join(lines)


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def fits(need: float, memory: float | None) -> str:
    if memory is None:
        return "unknown"
    return "fits" if need * MEMORY_FACTOR <= memory else "too large"


def format_gb(memory: float | None) -> str:
    return "unknown" if memory is None else f"{memory / 1e9:.1f} GB"


def cpu_memory() -> float | None:
    """Bytes of memory, or the container's limit if that is lower. None if the system does not report it."""
    try:
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    try:
        return min(memory, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # not in a container, or the limit is "max"
        return memory


def find_gpu() -> tuple[str, float | None] | None:
    """Name and memory in bytes of the GPU that torch would use, if any."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.name, float(properties.total_memory)
    if torch.backends.mps.is_available():
        return "Apple (mps), which shares the CPU's memory", cpu_memory()
    return None


def try_embedded() -> str:
    """Loads the embedded checkpoint and returns its size, or the error."""
    from minivlm import PaliGemma, Processor

    try:
        model = PaliGemma.from_pretrained()
        Processor.from_pretrained()
    except (OSError, ValueError) as error:
        return redact_paths(str(error))
    count = sum(weight.numel() for weight in model.parameters())
    return f"loads, {count / 1e6:.2f} M parameters in {str(model.dtype).removeprefix('torch.')}"


def redact_paths(text: str) -> str:
    """Shortens the paths in a message, because they can contain the user's name."""
    root = hub.EMBEDDED.parent.parent.parent
    text = text.replace(str(root), ".")
    try:
        return text.replace(str(Path.home()), "~")
    except RuntimeError:  # no HOME, and no entry in passwd
        return text
