"""LoRA: learn a small change of each weight instead of the weight.

    y = W x + α/r · B A x        W [out, in] frozen · A [r, in] random · B [out, r] zero, so training starts from W

    *B any leading dimensions · r rank

Adapters are files in peft's format, so peft opens ours on transformers' PaliGemma, and its own open here:

    adapter_config.json          r, lora_alpha, and a regular expression for the adapted layers
    adapter_model.safetensors    base_model.model.<layer of transformers>.lora_A.weight and lora_B.weight

Sources: LoRA arXiv:2106.09685, section 4.1; scaling by √r arXiv:2312.03732; peft 0.21, ``tuners/lora``.
"""

import json
import math
import re
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minivlm import checkpoint, hub
from minivlm.paligemma import PaliGemma

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

# The layers that adapters change in each part of the model, as transformers 5 and older versions name them.
LAYERS = {
    "vision_tower": r"vision_tower\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    "multi_modal_projector": r"multi_modal_projector\.linear",
    "language_model": r"language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
}


# --- the layer ------------------------------------------------------------------------------------------------------


def lora_update(
    x: Float[Tensor, "*B in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scale: float
) -> Float[Tensor, "*B out"]:
    """scale · B A x for each vector x: down to r numbers first, then up, so B A is never formed."""
    return scale * (x @ A.T @ B.T)


def merge_weight(
    W: Float[Tensor, "out in"], A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], scale: float
) -> Float[Tensor, "out in"]:
    """The weight of one linear layer that does what W and the adapter do together. W itself stays as it is."""
    return (W + scale * (B.to(A) @ A)).to(W.dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer and the change that it learns, with ``scale`` α/r."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        new = {"dtype": torch.float32, "device": base.weight.device, "bias": False}  # trained in float32, as by peft
        self.lora_A = nn.Linear(base.in_features, rank, **new)
        self.lora_B = nn.Linear(rank, base.out_features, **new)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        y = self.base(x)
        return y + lora_update(x.to(self.lora_A.weight.dtype), self.lora_A.weight, self.lora_B.weight, self.scale).to(y)


# --- in a model -----------------------------------------------------------------------------------------------------


def find_layers(model: PaliGemma, parts: tuple[str, ...]) -> list[str]:
    """The names of the linear layers in these parts, keys of ``LAYERS``."""
    pattern = target_pattern(parts)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(pattern, n)]


def target_pattern(parts: tuple[str, ...]) -> str:
    """The regular expression for peft's ``target_modules``. A list of last names would adapt the tower too."""
    return "|".join(rf".*{LAYERS[part]}" for part in parts)


def add(model: PaliGemma, names: list[str], rank: int, scale: float, seed: int = 0) -> PaliGemma:
    """Put an adapter around each of these linear layers, in place, and freeze everything else."""
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoRALinear(model.get_submodule(name), rank, scale))
    return model


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Name → layer, of all layers with an adapter."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge(model: PaliGemma) -> PaliGemma:
    """Replace each layer with an adapter by one linear layer that does the same, in place.

    Afterwards the model is as fast as before, and ``save_pretrained`` writes a checkpoint that needs no adapter. In
    bfloat16, merging rounds: changes below 1/256 of a weight are lost.
    """
    for name, layer in adapters(model).items():
        merged = merge_weight(layer.base.weight, layer.lora_A.weight, layer.lora_B.weight, layer.scale)
        layer.base.weight = nn.Parameter(merged)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base)
    return model.requires_grad_(True)


# --- peft's files ---------------------------------------------------------------------------------------------------


def name_in_transformers(name: str) -> str:
    """Our name of a layer or weight → its name in the modules of transformers 5."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    return "model." + name.replace("language_model.model.", "language_model.")


def save(model: PaliGemma, folder: Path, parts: tuple[str, ...], alpha: float, base: str) -> None:
    """Write the adapters of a model as peft does.

    Args:
        parts: Where they are, keys of ``LAYERS``.
        alpha: α; the rank is that of the layers.
        base: Folder or hub id of the model without them.

    Raises:
        ValueError: If the model has none, or a weight is not finite.
    """
    found = adapters(model)
    if not found:
        raise ValueError("The model has no adapters to save: call lora.add first.")
    tensors = {
        f"{PREFIX}{name_in_transformers(name)}.{part}.weight": getattr(layer, part).weight.detach().cpu().contiguous()
        for name, layer in found.items()
        for part in ("lora_A", "lora_B")
    }
    if fault := checkpoint.find_nonfinite(tensors):
        raise ValueError(f"Nothing was saved: {fault}")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    config |= {"r": next(iter(found.values())).lora_A.out_features, "lora_alpha": alpha, "lora_dropout": 0.0}
    config |= {"bias": "none", "target_modules": target_pattern(parts), "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    with hub.write_atomically(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with hub.write_atomically(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def load(model: PaliGemma, folder: str | Path) -> PaliGemma:
    """Put the adapters in a folder, ours or peft's, around the layers of a model, in place.

    Raises:
        ValueError: If it has no adapter, a kind that this code would run wrongly, or one of another model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: pass the folder of a LoRA adapter in peft's format.")
    scale, tensors = _read_scale(folder / CONFIG), _read_weights(folder / WEIGHTS)
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    expected = {f"{name}.{part}.weight" for name in layers for part in ("lora_A", "lora_B")}
    if not layers or expected != set(tensors):
        wrong = sorted(expected ^ set(tensors)) or ["no lora_A"]
        raise ValueError(f"{folder / WEIGHTS} is not an adapter of linear layers: {hub.abbreviate(wrong)}.")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name in sorted(layers):
        A, B = (tensors[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        layer, fits = linear.get(name), A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
        if layer is None or not fits or (A.shape[1], B.shape[0]) != (layer.in_features, layer.out_features):
            shapes = f"A {[*A.shape]} and B {[*B.shape]} for {name}"
            raise ValueError(f"The adapter in {folder} is one of another model: it has {shapes}.")
    if not any(bool(tensors[f"{name}.lora_B.weight"].any()) for name in layers):
        raise ValueError(f"The adapter in {folder} changes nothing: every lora_B is zero. Was it trained?")
    for name in sorted(layers):
        A, B = (tensors[f"{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        add(model, [name], len(A), scale(len(A)))
        adapter = model.get_submodule(name)
        adapter.lora_A.weight.copy_(A)
        adapter.lora_B.weight.copy_(B)
    return model


def _read_scale(path: Path):
    """From an adapter_config.json: rank → scale."""
    config = hub.read_json(path)
    usual = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False}
    usual |= dict.fromkeys(("modules_to_save", "alpha_pattern", "trainable_token_indices", "target_parameters"))
    for name, value in usual.items():
        if (found := config.get(name) or value) != value:
            raise ValueError(f"{path} sets {name} to {found!r:.80}, but only plain LoRA of linear layers is supported.")
    alpha = config.get("lora_alpha", 8)  # peft's default
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha in {path} must be a positive number, not {alpha!r:.80}.")
    return lambda rank: alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter in float32, by our names of the layers."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}. Weights in pickle files (.bin) are not opened.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({hub.printable(error)}): {hub.remedy(path)}.") from error
    tensors = {checkpoint.hub_name(name.removeprefix(PREFIX)): value.float() for name, value in tensors.items()}
    if fault := checkpoint.find_nonfinite(tensors):
        raise ValueError(f"{path}: {fault}")
    return tensors
