"""The sizes and settings that define a PaliGemma, read from and written to the hub's ``config.json``.

Hub files are sparse: a field that a file leaves out gets its default from here. The defaults depend on the model type,
since a sparse ``gemma2`` file leaves out other values than a sparse ``gemma`` file.

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
                f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}, "
                f"for example {self.image_size // self.patch_size * self.patch_size or self.patch_size}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by {self.num_attention_heads} heads.")

    @property
    def num_image_tokens(self) -> int:
        """Number of patches per image, (image_size / patch_size)². Each patch becomes one token."""
        return (self.image_size // self.patch_size) ** 2


@dataclass
class GemmaConfig:
    """The decoder: Gemma 1 (``model_type="gemma"``) or Gemma 2 (``"gemma2"``). They differ only in these values.

    The defaults are the decoder of PaliGemma 3B. ``None`` for a soft cap or for the window means that there is none.
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
    query_pre_attn_scalar: int | float | None = None  # queries are scaled by this ** -0.5; None means head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None

    def __post_init__(self):
        if self.model_type not in ("gemma", "gemma2"):
            raise ValueError(f"text model_type must be 'gemma' or 'gemma2', not {self.model_type!r}.")
        _check_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _check_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {shared}.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}: RoPE rotates its dimensions in pairs.")
        if self.query_pre_attn_scalar is None:
            self.query_pre_attn_scalar = self.head_dim

    @property
    def has_post_norms(self) -> bool:
        """Gemma 2 normalizes before and after attention and MLP, Gemma 1 only before."""
        return self.model_type == "gemma2"

    def window(self, layer: int) -> int | None:
        """Window of layer ``layer`` in tokens, the query included; None if there is none. Gemma 2: on even layers."""
        return self.sliding_window if layer % 2 == 0 else None


# Values that a sparse gemma2 config.json leaves out. PaliGemma's own files also leave out head_dim, theta and eps.
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
    """Vision tower, decoder and special token ids. ``projection_dim`` always equals the decoder's hidden size."""

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
        """Read the content of a hub ``config.json``, sparse or full, written by transformers 4 or 5.

        Raises:
            ValueError: If it does not describe a PaliGemma, or describes a variant that this code would run wrongly.
        """
        if (kind := values.get("model_type")) != "paligemma":
            raise ValueError(f"config.json describes a {kind!r} model, not 'paligemma'. Use a PaliGemma folder.")
        values = _without_nulls(values)
        text, vision = _without_nulls(values.get("text_config", {})), _without_nulls(values.get("vision_config", {}))
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"config.json sets rope type {rope}, but only the default RoPE is supported.")
        text.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        _check_supported(text, vision)
        if text.get("model_type", "gemma") == "gemma2":
            text = GEMMA2_DEFAULTS | text
        projection = values.get("projection_dim") or vision.get("projection_dim")
        config = cls(
            vision_config=SiglipVisionConfig(**_fields_of(SiglipVisionConfig, vision)),
            text_config=GemmaConfig(**_fields_of(GemmaConfig, text)),
            image_token_index=values.get("image_token_index", values.get("image_token_id", 257152)),
            **{name: values[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id") if name in values},
        )
        if projection not in (None, config.projection_dim):
            raise ValueError(
                f"projection_dim in config.json is {projection}, but the decoder needs {config.projection_dim}."
            )
        return config

    @classmethod
    def from_json(cls, path: str | Path) -> "PaliGemmaConfig":
        """Read the file ``path``. Raises ValueError if it is not valid JSON or does not describe a PaliGemma."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}). Download the file again.") from error
        return cls.from_dict(_without_nulls(values))

    def to_dict(self) -> dict:
        """The content of a hub ``config.json`` from which transformers builds the same model."""
        text = asdict(self.text_config)
        activation = {"hidden_act": "gelu_pytorch_tanh"}
        if self.text_config.has_post_norms:
            activation = {"hidden_activation": "gelu_pytorch_tanh"}
        else:  # Gemma 1 has none of these, and its query scale is always head_dim ** -0.5
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


def _without_nulls(values) -> dict:
    """The entries that a file really sets. Null means "left out", except in the fields where None is a valid value."""
    if not isinstance(values, dict):
        found = type(values).__name__
        raise ValueError(f"config.json contains a {found} where an object is expected. Download the file again.")
    optional = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    return {name: value for name, value in values.items() if value is not None or name in optional}


def _fields_of(config: type, values: dict) -> dict:
    """The entries that are fields of the dataclass ``config``. Integers become floats where the field is a float."""
    types = {entry.name: entry.type for entry in fields(config)}
    found = {name: value for name, value in values.items() if name in types}
    return {n: float(v) if type(v) is int and types[n] in (float, float | None) else v for n, v in found.items()}


def _check_supported(text: dict, vision: dict) -> None:
    """Raise ValueError for settings that would change the computation: an error is better than wrong results."""
    if text.get("attention_bias"):
        raise ValueError("config.json sets attention_bias, but Gemma's attention has no biases.")
    if text.get("tie_word_embeddings") is False:
        raise ValueError("tie_word_embeddings must be true: PaliGemma's output head is its embedding table.")
    layers = text.get("layer_types")
    expected = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(len(layers or ()))]
    if layers and text.get("model_type") == "gemma2" and layers != expected:
        raise ValueError("layer_types in config.json must follow Gemma 2's order: sliding, full, sliding, full …")
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise ValueError(f"vision model_type must be 'siglip_vision_model', not {vision['model_type']!r}.")
    tanh = "gelu_pytorch_tanh"
    acts = [text.get("hidden_activation", tanh), vision.get("hidden_act", tanh)]
    if text.get("hidden_act") != "gelu":  # early Gemma files say "gelu" but mean tanh
        acts.append(text.get("hidden_act", tanh))
    if wrong := [act for act in acts if act != tanh]:
        raise ValueError(f"config.json sets the activation {wrong[0]!r}, but PaliGemma uses tanh-approximated GELU.")


def _check_positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")
