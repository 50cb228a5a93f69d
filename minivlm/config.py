"""The numbers that make a PaliGemma: read from, and written to, the hub's ``config.json``.

Files on the hub are sparse: what a file leaves out has the default given here. Which defaults those are depends on the
model type, since a sparse ``gemma2`` file means other numbers than a sparse ``gemma`` one.

Sources: transformers ``models/{paligemma,gemma,gemma2,siglip}/configuration_*.py``; google-research/big_vision
``models/vit.py`` for So400m/14.
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


@dataclass
class SiglipVisionConfig:
    """The vision tower. The defaults are SigLIP So400m/14 at 224 pixels, the tower of every PaliGemma."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        _check_positive(self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        _check_positive(self, "num_channels", "image_size", "patch_size")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}: "
                f"choose {self.image_size // self.patch_size * self.patch_size or self.patch_size} or another multiple."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads.")

    @property
    def num_image_tokens(self) -> int:
        """Patches of a picture, each one token: (image_size / patch_size)²."""
        return (self.image_size // self.patch_size) ** 2


@dataclass
class GemmaConfig:
    """The decoder: Gemma 1 (``model_type="gemma"``) or Gemma 2 (``"gemma2"``), told apart by these numbers alone.

    The defaults are the decoder of PaliGemma 3B. A ``None`` for a soft cap or the window means that there is none.
    """

    model_type: str = "gemma"
    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    query_pre_attn_scalar: int | float | None = None  # the query scale is this ** -0.5; None means head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None

    def __post_init__(self):
        if self.model_type not in ("gemma", "gemma2"):
            raise ValueError(f"text model_type {self.model_type!r} is not known: it must be 'gemma' or 'gemma2'.")
        _check_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _check_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key/value heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embeddings turn its dimensions in pairs.")
        if self.query_pre_attn_scalar is None:
            self.query_pre_attn_scalar = self.head_dim

    @property
    def four_norms(self) -> bool:
        """Gemma 2 normalizes before and after both blocks of a layer, Gemma 1 only before."""
        return self.model_type == "gemma2"

    def window(self, layer: int) -> int | None:
        """How many keys back layer ``layer`` looks, itself counted; ``None``: all. Gemma 2 slides on even layers."""
        return self.sliding_window if layer % 2 == 0 else None


# What a config.json of each type means where it is silent. PaliGemma's own files leave out head_dim, theta and eps.
GEMMA2_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}


@dataclass
class PaliGemmaConfig:
    """Tower, decoder and the ids that join them. ``projection_dim``, the projector's output, is the decoder's width."""

    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text_config: GemmaConfig = field(default_factory=GemmaConfig)
    image_token_index: int = 257152
    pad_token_id: int = 0
    eos_token_id: int = 1
    bos_token_id: int = 2

    @property
    def projection_dim(self) -> int:
        return self.text_config.hidden_size

    @classmethod
    def from_dict(cls, values: dict) -> "PaliGemmaConfig":
        """Reads the content of a hub ``config.json``, sparse or whole, of transformers 4 or 5.

        Raises:
            ValueError: the file describes no PaliGemma, or one that this code would run wrongly.
        """
        if (kind := values.get("model_type")) != "paligemma":
            raise ValueError(f"config.json describes a {kind!r} model, not 'paligemma': give a PaliGemma folder.")
        values = _stated(values)
        text, vision = _stated(values.get("text_config", {})), _stated(values.get("vision_config", {}))
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"config.json asks for rope type {rope}: only the default rotary embedding is known here.")
        text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        _refuse_unknown_variants(text, vision)
        if text.get("model_type", "gemma") == "gemma2":
            text = GEMMA2_DEFAULTS | text
        projection = values.get("projection_dim") or vision.get("projection_dim")
        config = cls(
            vision_config=SiglipVisionConfig(**_known(SiglipVisionConfig, vision)),
            text_config=GemmaConfig(**_known(GemmaConfig, text)),
            image_token_index=values.get("image_token_index", values.get("image_token_id", 257152)),
            **{name: values[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id") if name in values},
        )
        if projection not in (None, config.projection_dim):
            raise ValueError(
                f"config.json projects pictures to {projection} dimensions but the decoder has {config.projection_dim}."
            )
        return config

    @classmethod
    def from_json(cls, path: str | Path) -> "PaliGemmaConfig":
        """Reads the file ``path``. Raises ValueError where it is no JSON or no PaliGemma."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not readable as JSON ({error}): fetch it again.") from error
        return cls.from_dict(_stated(values))

    def to_dict(self) -> dict:
        """The content of a hub ``config.json`` that transformers opens as this very model."""
        text = asdict(self.text_config)
        activation = {"hidden_act": "gelu_pytorch_tanh"}
        if self.text_config.four_norms:
            activation = {"hidden_activation": "gelu_pytorch_tanh"}
        else:  # Gemma 1 has none of these, and its scale is always head_dim ** -0.5
            for name in ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"):
                if text.pop(name) is not None:
                    raise ValueError(f"Gemma 1 has no {name}: set model_type to 'gemma2'.")
            if text.pop("query_pre_attn_scalar") != self.text_config.head_dim:
                raise ValueError("Gemma 1 scales queries by head_dim ** -0.5: set model_type to 'gemma2'.")
        ids = {name: getattr(self, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": self.image_token_index,
            **ids,
            "hidden_size": self.projection_dim,
            "projection_dim": self.projection_dim,
            "tie_word_embeddings": True,
            "text_config": text | activation | ids | {"tie_word_embeddings": True},
            "vision_config": asdict(self.vision_config)
            | {
                "model_type": "siglip_vision_model",
                "hidden_act": "gelu_pytorch_tanh",
                "projection_dim": self.projection_dim,
                "vision_use_head": False,
            },
        }


def _stated(values) -> dict:
    """What a file really says: null stands for "left out", except where None is a value of its own."""
    if not isinstance(values, dict):
        raise ValueError(f"config.json has a {type(values).__name__} where names and values belong: fetch it again.")
    optional = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    return {name: value for name, value in values.items() if value is not None or name in optional}


def _known(kind: type, values: dict) -> dict:
    """The entries of ``values`` that the dataclass ``kind`` has a field for. JSON does not tell 10000 from 10000.0."""
    types = {entry.name: entry.type for entry in fields(kind)}
    found = {name: value for name, value in values.items() if name in types}
    return {n: float(v) if type(v) is int and types[n] in (float, float | None) else v for n, v in found.items()}


def _refuse_unknown_variants(text: dict, vision: dict) -> None:
    """Some settings would change the arithmetic: better to stop than to compute something else."""
    if text.get("attention_bias"):
        raise ValueError("config.json asks for biases in the decoder's attention: Gemma has none.")
    if text.get("tie_word_embeddings") is False:
        raise ValueError("config.json unties the output head from the embedding: PaliGemma's are one matrix.")
    layers = text.get("layer_types")
    expected = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(len(layers or ()))]
    if layers and text.get("model_type") == "gemma2" and layers != expected:
        raise ValueError("config.json gives layer_types in another order than Gemma 2's sliding, full, sliding, full …")
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise ValueError(f"vision model_type {vision['model_type']!r} is not known: it must be 'siglip_vision_model'.")
    tanh = "gelu_pytorch_tanh"
    acts = [text.get("hidden_activation", tanh), vision.get("hidden_act", tanh)]
    if text.get("hidden_act") != "gelu":  # early Gemma files say "gelu" and mean tanh
        acts.append(text.get("hidden_act", tanh))
    if wrong := [act for act in acts if act != tanh]:
        raise ValueError(f"config.json asks for the activation {wrong[0]!r}: PaliGemma uses tanh-approximated GELU.")


def _check_positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")
