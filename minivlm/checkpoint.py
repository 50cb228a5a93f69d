"""Checkpoints: the hub's ``config.json`` and ``*.safetensors``, read strictly and written whole.

Every weight must be there, in its shape, under one of the three names it has in the wild; anything else is an error
that lists the names. Loading leniently instead turns a file of another model into silent garbage. Pickles are never
opened: unpickling runs whatever code the file brings along.

A model is built on the meta device, where it has shapes but no memory, and then its weights are mapped from the file:
the file's pages *are* the weights, so loading takes no second copy of them.

Sources: the safetensors format (github.com/huggingface/safetensors); names as written by transformers 4 and 5.
"""

import functools
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minivlm.config import PaliGemmaConfig
from minivlm.hub import resolve

# --- loading ---


@dataclass
class Stored:
    """A weight as a file's header describes it: where it is and what to expect, without reading it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def load(
    cls: type[nn.Module],
    path: str | Path | None = None,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A ``cls`` with the configuration and weights of a checkpoint, in eval mode.

    On the CPU and in the stored type the weights are the file itself, mapped copy-on-write: memory stays within the
    file's size, and training changes the copy, never the file. None is read before it is used, so a 6 GB file opens in
    a fraction of a second; should one hold NaN or infinity, the first answer says so. Otherwise they are converted one
    at a time, and looked at then.

    Args:
        cls: the class to build from a ``PaliGemmaConfig``.
        path, revision: as for ``resolve``.
        dtype: floating-point type of the weights; what config.json says when not given, or else as stored.

    Raises:
        ValueError: no folder or hub id, no PaliGemma, a damaged file, or a weight that is missing, extra, misshapen, of
            a wrong type or, where weights are converted, not finite.
        OSError: the checkpoint cannot be had; see ``resolve``.
    """
    if dtype not in (None, *FLOATS.values()):
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS.values()))} or None, not {dtype!r}.")
    folder = resolve(path, revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a PaliGemma checkpoint.")
    config = PaliGemmaConfig.from_json(folder / "config.json")
    with torch.device("meta"), SkipInit():
        model = cls(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = _match([entry for file in _weight_files(folder) for entry in _header(file)], shapes, folder)
    dtype = dtype or _working_type(folder / "config.json")
    if dtype is None and len(types := sorted({entry.dtype for entry in weights.values()})) > 1:
        raise ValueError(f"{folder} mixes weights of types {', '.join(types)}: choose one, e.g. dtype=torch.float32.")
    model.load_state_dict(_read(weights, dtype, device), assign=True)
    return model.eval()


def _working_type(config: Path) -> torch.dtype | None:
    """The type that a configuration names (``dtype`` since transformers 5, ``torch_dtype`` before), if any."""
    values = json.loads(config.read_text(encoding="utf-8"))
    name = values.get("dtype") or values.get("torch_dtype")
    return {str(kind).removeprefix("torch."): kind for kind in FLOATS.values()}.get(str(name))


class SkipInit(TorchFunctionMode):
    """Leaves new weights undrawn. To draw numbers for tensors without memory, torch would import 70 MB in 3 seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the shards that ``model.safetensors.index.json`` names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{folder} has no model.safetensors and no index of shards: convert the checkpoint to safetensors; "
            "pickled weights (.bin, .pt, .ckpt) are not opened, since unpickling can run any code."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is no JSON with a weight_map of names to files: fetch it again.") from error
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name)):
            raise ValueError(f"{index} names the file {name!r}: only .safetensors files beside the index are opened.")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {_some(absent)}, which its index names: fetch the missing files.")
    return [folder / name for name in names]


def _open(file: Path):
    """Maps a safetensors file."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        with file.open("rb") as content:
            is_pointer = content.read(8) == b"version "
        remedy = "it is a Git LFS pointer, run `git lfs pull`" if is_pointer else "fetch it again"
        raise ValueError(f"{file} is damaged, cut short or no safetensors file ({error}): {remedy}.") from error


def _header(file: Path) -> list[Stored]:
    opened = _open(file)
    slices = {name: opened.get_slice(name) for name in opened.keys()}
    return [Stored(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]


def hub_name(name: str) -> str:
    """The name that the hub's files give a weight, whichever of the three layouts ``name`` comes from.

    Hub files:                ``language_model.model.layers.0…``, ``vision_tower.vision_model.encoder…``
    saved by transformers 5:  ``language_model.model.layers.0…``, ``vision_tower.encoder…``
    transformers 5 in memory: ``model.language_model.layers.0…``, ``model.vision_tower.encoder…``, ``lm_head…``
    """
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # buffers that old versions of transformers saved
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _match(entries: list[Stored], shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, Stored]:
    """Our name → stored weight, for exactly the names and shapes wanted (and the output head, where one is stored)."""
    shapes = shapes | {HEAD: shapes[EMBEDDING]}
    found, extra = {}, []
    for entry in entries:
        name = hub_name(entry.name)
        if name in shapes and name not in found:
            found[name] = entry
        elif not name.endswith(RECOMPUTED):
            extra.append(entry.name)
    misshapen = [(entry, shapes[name]) for name, entry in found.items() if entry.shape != shapes[name]]
    faults = {
        "missing": [name for name in shapes if name not in found and name != HEAD],
        "extra": extra,
        "misshapen": [f"{entry.name} {list(entry.shape)} instead of {list(shape)}" for entry, shape in misshapen],
        f"of a type other than {', '.join(FLOATS)}": [
            f"{e.name} {e.dtype}" for e in found.values() if e.dtype not in FLOATS
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"The weights in {folder} do not fit its config.json: {listed}.")
    return found


def _read(weights: dict[str, Stored], dtype: torch.dtype | None, device: str | torch.device) -> dict[str, Tensor]:
    """The tensors themselves; an output head must repeat the embedding and is dropped."""
    as_stored = {FLOATS[entry.dtype] for entry in weights.values()} == {dtype} or dtype is None
    in_place = as_stored and torch.device(device).type == "cpu"
    # A mapping lives as long as its tensors. Weights that are converted get one each, which is gone when they are done.
    source = functools.cache(_open) if in_place else _open
    if head := weights.pop(HEAD, None):
        table = weights[EMBEDDING]
        same = head.dtype == table.dtype and torch.equal(
            source(head.file).get_tensor(head.name), source(table.file).get_tensor(table.name)
        )
        if not same:
            raise ValueError(
                f"{head.name} in {head.file} differs from the embedding: PaliGemma's output head is its embedding."
            )
    tensors = {}
    for name, entry in weights.items():
        tensors[name] = source(entry.file).get_tensor(entry.name).to(device=device, dtype=dtype)
    if not in_place and (fault := find_nonfinite({weights[name].name: tensor for name, tensor in tensors.items()})):
        raise ValueError(fault)
    return tensors


def find_nonfinite(weights: dict[str, Tensor]) -> str | None:
    """A sentence on the weights that hold NaN or infinity, or None where there are none.

    Both show in the smallest and the largest value, which take one pass and no memory.
    """
    broken = [name for name, x in weights.items() if not all(bool(bound.isfinite()) for bound in x.aminmax())]
    if not broken:
        return None
    what = "1 weight holds" if len(broken) == 1 else f"{len(broken)} weights hold"
    kind = weights[broken[0]].dtype
    return f"{what} NaN or infinity ({kind}), so no answer would be right: {_some(broken)}."


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" … and {len(names) - most} more" if len(names) > most else "")


# --- saving ---


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes ``config.json`` and ``model.safetensors`` into the folder ``path``, with the hub's names.

    ``dtype`` is the type to store, the model's own when not given; the configuration records the model's, which is what
    loading gives back: a float32 model stored in bfloat16 takes half the room and runs in float32.

    Each file appears whole or not at all, and the configuration last: a folder that has one is complete. A model may be
    saved over the files that it was loaded from.

    Raises:
        ValueError: the configuration cannot be expressed in the hub's format, or ``path`` is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder to save into.")
    working = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = json.dumps(model.config.to_dict() | {"torch_dtype": working}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(dtype=dtype).contiguous() for name, tensor in model.state_dict().items()}
    _write(folder / "model.safetensors", lambda part: save_file(tensors, part, metadata={"format": "pt"}))
    _write(folder / "config.json", lambda part: part.write_text(config, encoding="utf-8"))


def _write(target: Path, write) -> None:
    """``write`` fills a file beside ``target``, which then takes its place in one step."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
