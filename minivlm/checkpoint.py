"""Checkpoints: the hub's ``config.json`` and ``*.safetensors``, read strictly and written atomically.

Every weight must be there, with its shape, under one of the three names in use. Anything else is an error that lists
the names: loading leniently would turn a file of another model into silent garbage. Pickles are never opened, because
unpickling can run arbitrary code.

A model is built on the meta device, where it has shapes but no memory. Its weights are then mapped from the file: the
file's pages *are* the weights, so loading makes no second copy of them.

Sources: the safetensors format (github.com/huggingface/safetensors); names as written by transformers 4 and 5.
"""

import contextlib
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minivlm.config import PaliGemmaConfig
from minivlm.hub import abbreviate, printable, read_json, remedy, resolve, write_atomically

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
RECOMPUTED = ("rotary_emb.inv_freq", "embeddings.position_ids")  # buffers that old versions of transformers saved
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class StoredTensor:
    """A weight as the header of its file describes it, not read yet."""

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
    """Builds a ``cls`` with the configuration and weights of a checkpoint, in eval mode.

    On the CPU and in the stored dtype, the weights are the file itself, mapped copy-on-write: memory stays within the
    file's size, and training changes the copy, never the file. No matrix is read before it is used, so a 6 GB file
    opens in a fraction of a second. If one contains NaN or infinity, the first generated answer reports it. On another
    device or in another dtype, the weights are converted one at a time and checked right away.

    While mapped weights are in use, their file must not be truncated, which would kill the process, or overwritten in
    place, which would change the answers. Replacing it, as ``save`` does, is safe. To be independent of the file, pass
    another device or dtype, or use ``copy.deepcopy(model)``.

    Args:
        cls: The class to build from a ``PaliGemmaConfig``.
        path: A checkpoint (and its ``revision``), as for ``hub.resolve``.
        dtype: Floating-point dtype of the weights. The default is the one in config.json, or else the stored one.

    Raises:
        ValueError: If ``path`` is not a PaliGemma checkpoint, a file is damaged, or a weight is missing, unexpected, of
            the wrong shape or dtype or, if it is a vector or is converted, not finite.
        OSError: If the checkpoint is not available; see ``hub.resolve``.
    """
    _check_dtype(dtype)
    folder = resolve(path, revision)
    if list(folder.glob("adapter_*")) and not list(folder.glob("model*.safetensors*")):
        advice = "merge it with peft (`merge_and_unload`, then `save_pretrained`), or pass its base model"
        raise ValueError(f"{folder} contains a LoRA adapter, not a whole model: {advice}.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: pass the folder of a PaliGemma checkpoint.")
    values, generation = read_json(folder / "config.json"), folder / "generation_config.json"
    config = PaliGemmaConfig.from_dict(values, read_json(generation) if generation.is_file() else {})
    entries = [entry for file in _weight_files(folder) for entry in _read_header(file)]
    names = " ".join(hub_name(entry.name) for entry in entries)
    for part, layers in (("text", "model.layers"), ("vision", "encoder.layers")):  # building a billion takes forever
        stored = len(set(re.findall(rf"{layers}\.\d+\.(?=self_attn\.q_proj\.weight)", names)))
        if stored != (stated := getattr(config, f"{part}_config").num_hidden_layers):
            raise ValueError(f"config.json in {folder} says {stated} {part} layers, the weights have {stored}.")
    try:
        with torch.device("meta"), SkipInit():
            model = cls(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # no memory is taken, but sizes are 64-bit integers
        raise ValueError(f"config.json in {folder} has sizes that no tensor can have: download it again.") from error
    weights = _match_names(entries, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, folder)
    dtype = dtype or _config_dtype(values)
    if dtype is None and len(dtypes := sorted({entry.dtype for entry in weights.values()})) > 1:
        raise ValueError(f"{folder} mixes the dtypes {', '.join(dtypes)}: pass one, such as dtype=torch.float32.")
    model.load_state_dict(_read_tensors(weights, dtype, device), assign=True)
    return model.eval()


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, *FLOAT_DTYPES.values()):
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOAT_DTYPES.values()))} or None, not {dtype!r}.")


def _config_dtype(values: dict) -> torch.dtype | None:
    """The dtype in a config.json (``dtype`` since transformers 5, ``torch_dtype`` before), if any."""
    name = values.get("dtype") or values.get("torch_dtype")
    return {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES.values()}.get(str(name))


class SkipInit(TorchFunctionMode):
    """Skips random initialization, for which torch would import 70 MB in 3 seconds on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _weight_files(folder: Path) -> list[Path]:
    """``model.safetensors``, or the shards listed in ``model.safetensors.index.json``."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{folder} has no model.safetensors and no index of shards: convert the checkpoint to safetensors. Weights "
            "in pickle files (.bin, .pt, .ckpt) are not opened, because unpickling can run arbitrary code."
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not JSON with a weight_map from names to files: {remedy(index)}.") from error
    for name in names:
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(name)):
            raise ValueError(f"{index} refers to {name!r}, but only .safetensors files in its own folder are opened.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {abbreviate(missing)}, listed in its index: download what is missing.")
    return [folder / name for name in names]


@contextlib.contextmanager
def _explain_errors(file: Path):
    try:
        yield
    except SafetensorError as error:  # which is neither an OSError nor a ValueError
        fault = f"damaged, truncated or not a safetensors file ({printable(error)})"
        raise ValueError(f"{file} is {fault}: {remedy(file)}.") from error


def _open(file: Path):
    """Maps a safetensors file into memory."""
    with _explain_errors(file):
        return safe_open(file, framework="pt")


def _read_header(file: Path) -> list[StoredTensor]:
    opened = _open(file)
    slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
    entries = [StoredTensor(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    # An unfinished download can have its full size and zeros at the end. A zero bias proves nothing, so check the last
    # rows of the last matrix and the vectors after it. The embedding table can end in zeros: rows that pad it.
    for entry in reversed(entries):
        is_other = math.prod(entry.shape) < 2 or entry.dtype not in FLOAT_DTYPES
        if is_other or hub_name(entry.name) in (HEAD, EMBEDDING) or bool(slices[entry.name][-8:].any()):
            break
        if len(entry.shape) > 1:
            raise ValueError(f"{file} ends in zeros, so its download was probably not finished: download it again.")
    return entries


def hub_name(name: str) -> str:
    """The name of a weight in the hub's files, from any of the three layouts.

    Hub files:                ``language_model.model.layers.0…``, ``vision_tower.vision_model.encoder…``
    saved by transformers 5:  ``language_model.model.layers.0…``, ``vision_tower.encoder…``
    transformers 5 in memory: ``model.language_model.layers.0…``, ``model.vision_tower.encoder…``, ``lm_head…``
    """
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.)", "", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^lm_head\.", "language_model.lm_head.", name)


def _match_names(entries: list[StoredTensor], shapes: dict[str, tuple], folder: Path) -> dict[str, StoredTensor]:
    """Our name → stored weight, for exactly the names and shapes of the model (and the output head, if stored)."""
    shapes = shapes | {HEAD: shapes[EMBEDDING]}
    found, unexpected = {}, []
    for entry in entries:
        name = hub_name(entry.name)
        if name in shapes and name not in found:
            found[name] = entry
        elif not name.endswith(RECOMPUTED):
            unexpected.append(entry.name)
    if HEAD in found and EMBEDDING not in found:  # safetensors' save_model keeps one name of tied weights
        found[EMBEDDING] = found.pop(HEAD)
    misshapen = [f"{e.name} {[*e.shape]} instead of {[*shapes[n]]}" for n, e in found.items() if e.shape != shapes[n]]
    faults = {
        "missing": [name for name in shapes if name not in found and name != HEAD],
        "unexpected": unexpected,
        "of the wrong shape": misshapen,
        "of an unsupported dtype": [f"{e.name} {e.dtype}" for e in found.values() if e.dtype not in FLOAT_DTYPES],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {abbreviate(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"The weights in {folder} do not fit its config.json: {listed}.")
    return found


def _read_tensors(weights: dict[str, StoredTensor], dtype: torch.dtype | None, device) -> dict[str, Tensor]:
    """Reads the weights. A stored output head must equal the embedding table and is dropped."""
    is_stored_dtype = dtype is None or {FLOAT_DTYPES[entry.dtype] for entry in weights.values()} == {dtype}
    is_mapped = is_stored_dtype and torch.device(device).type == "cpu"
    # A mapping lives as long as its tensors. Each converted weight gets its own, which is released after conversion.
    open_file = functools.cache(_open) if is_mapped else _open

    def read(entry: StoredTensor) -> Tensor:
        with _explain_errors(entry.file):
            return open_file(entry.file).get_tensor(entry.name)

    if head := weights.pop(HEAD, None):
        table = weights[EMBEDDING]
        if head.dtype != table.dtype or not torch.equal(read(head), read(table)):
            raise ValueError(f"{head.name} in {head.file} differs from the embedding, but PaliGemma ties the two.")
    tensors = {name: read(entry).to(device=device, dtype=dtype) for name, entry in weights.items()}
    if fault := find_nonfinite({weights[n].name: x for n, x in tensors.items() if x.ndim < 2 or not is_mapped}):
        raise ValueError(fault)
    return tensors


def find_nonfinite(weights: dict[str, Tensor]) -> str | None:
    """A sentence that names the weights with NaN or infinity, or None if all are finite.

    Either shows up in the minimum or maximum, which takes one pass and no extra memory.
    """
    broken = [name for name, x in weights.items() if not all(bool(bound.isfinite()) for bound in x.aminmax())]
    if not broken:
        return None
    subject = "1 weight holds" if len(broken) == 1 else f"{len(broken)} weights hold"
    return f"{subject} NaN or infinity ({weights[broken[0]].dtype}), so no answer can be right: {abbreviate(broken)}."


def save(model: nn.Module, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Saves ``config.json`` and ``model.safetensors`` into the folder ``path``, with the hub's names.

    Each file is written atomically, and the configuration last, so a folder that has one is complete. A model can be
    saved over the files that it was loaded from.

    Args:
        dtype: The dtype to store, by default the model's. The configuration always records the model's, which loading
            restores: a float32 model stored in bfloat16 takes half the space and still runs in float32.

    Raises:
        ValueError: If the configuration cannot be expressed in the hub's format, ``path`` is a file, or a weight is not
            finite in ``dtype``.
        OSError: If a file cannot be written. The old one is unchanged then.
    """
    _check_dtype(dtype)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: pass a folder to save into.")
    model_dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config = json.dumps(model.config.to_dict() | {"torch_dtype": model_dtype}, indent=2) + "\n"
    tensors = {name: tensor.detach().to(dtype=dtype).contiguous() for name, tensor in model.state_dict().items()}
    if fault := find_nonfinite(tensors):
        raise ValueError(f"Nothing was saved: {fault}")
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(folder / "model.safetensors") as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with write_atomically(folder / "config.json") as part:
        part.write_text(config, encoding="utf-8")
