"""The sizes and settings that define a PaliGemma, read from and written to the hub's ``config.json``.

Hub files are sparse: a field that a file leaves out gets its default from here. The defaults depend on the model type,
since a sparse ``gemma2`` file leaves out other values than a sparse ``gemma`` file. Every field is checked when a
configuration is created: its type, its range, and how it fits the others.

Sources: transformers ``models/{paligemma,gemma,gemma2,siglip}/configuration_*.py``; google-research/big_vision
``models/vit.py`` for So400m/14.
"""

from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import get_args

LARGEST_SIZE = 2**24  # of every field that is not in this table
LARGEST = {"num_hidden_layers": 1000, "layer_norm_eps": 1, "rms_norm_eps": 1, "rope_theta": 10**8}
LARGEST |= dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), 10**6)
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


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
    layer_norm_eps: int | float = 1e-6

    def __post_init__(self):
        _check_numbers(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}.")
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
    Gemma 1 has no window and no soft cap of attention, and its queries are always scaled by head_dim ** -0.5.
    """

    model_type: str = "gemma"
    vocab_size: int = 257216
    hidden_size: int = 2048
    intermediate_size: int = 16384
    num_hidden_layers: int = 18
    num_attention_heads: int = 8
    num_key_value_heads: int = 1
    head_dim: int = 256
    rms_norm_eps: int | float = 1e-6
    rope_theta: int | float = 10000.0
    max_position_embeddings: int = 8192
    query_pre_attn_scalar: int | float | None = None  # queries are scaled by this ** -0.5; None means head_dim
    attn_logit_softcapping: int | float | None = None
    final_logit_softcapping: int | float | None = None
    sliding_window: int | None = None

    def __post_init__(self):
        if self.model_type not in ("gemma", "gemma2"):
            raise ValueError(f"text model_type must be 'gemma' or 'gemma2', not {_show(self.model_type)}.")
        _check_numbers(self)
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(f"num_attention_heads {heads} must be a multiple of num_key_value_heads {shared}.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, not {self.head_dim}: RoPE rotates its dimensions in pairs.")
        if self.query_pre_attn_scalar is None:
            self.query_pre_attn_scalar = self.head_dim
        values = [getattr(self, name) for name in GEMMA2_ONLY]
        if self.model_type == "gemma" and values != [self.head_dim, None, None]:
            raise ValueError(f"Gemma 1 has no {', '.join(GEMMA2_ONLY)}: set model_type to 'gemma2'.")

    @property
    def has_post_norms(self) -> bool:
        """Gemma 2 normalizes before and after attention and MLP, Gemma 1 only before."""
        return self.model_type == "gemma2"

    def window(self, layer: int) -> int | None:
        """Window of layer ``layer`` in tokens, the query included; None if there is none. Gemma 2: on even layers."""
        return self.sliding_window if layer % 2 == 0 else None


# Values that a sparse gemma2 config.json leaves out. PaliGemma's own files also leave out head_dim, theta and eps.
GEMMA2_DEFAULTS = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_key_value_heads": 4}
GEMMA2_DEFAULTS |= {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA2_DEFAULTS |= {"sliding_window": 4096}
GEMMA2_ONLY = ("query_pre_attn_scalar", "attn_logit_softcapping", "sliding_window")


@dataclass
class PaliGemmaConfig:
    """Vision tower, decoder and special token ids. ``projection_dim`` always equals the decoder's hidden size.

    ``eos_token_id`` can be a list: any of them ends an answer. A ``pad_token_id`` of -1 means that there is none.
    """

    vision_config: SiglipVisionConfig = field(default_factory=SiglipVisionConfig)
    text_config: GemmaConfig = field(default_factory=GemmaConfig)
    image_token_index: int = 257152
    pad_token_id: int = 0
    eos_token_id: int | list[int] = 1
    bos_token_id: int = 2

    def __post_init__(self):
        last = self.text_config.vocab_size - 1
        check_number("image_token_index", self.image_token_index, 0, LARGEST_SIZE)
        check_number("pad_token_id", self.pad_token_id, -1, last)
        for name, value in [("bos_token_id", self.bos_token_id)] + [("eos_token_id", i) for i in self.eos_token_ids]:
            check_number(name, value, 0, last)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an answer."""
        return (self.eos_token_id or [None]) if isinstance(self.eos_token_id, list) else [self.eos_token_id]

    @property
    def projection_dim(self) -> int:
        return self.text_config.hidden_size

    @classmethod
    def from_dict(cls, values: dict, generation: dict | None = None) -> "PaliGemmaConfig":
        """Read the content of a hub ``config.json``, sparse or full, written by transformers 4 or 5.

        As in transformers, the ids in ``generation``, the content of ``generation_config.json``, take precedence.

        Raises:
            ValueError: If it does not describe a PaliGemma, or describes a variant that this code would run wrongly.
        """
        values = _without_nulls(values)
        if (kind := values.get("model_type")) != "paligemma":
            raise ValueError(f"config.json describes a {_show(kind)} model, not 'paligemma'. Use a PaliGemma folder.")
        text, vision = _without_nulls(values.get("text_config", {})), _without_nulls(values.get("vision_config", {}))
        rope = _without_nulls(text.get("rope_scaling") or text.get("rope_parameters") or {})
        rope = {"rope_theta": text.get("rope_theta", 10000.0), "rope_type": rope.get("type", "default")} | rope
        text["rope_theta"] = rope["rope_theta"]
        if text.get("model_type") == "gemma2":
            text = GEMMA2_DEFAULTS | text
        else:  # transformers ignores these in a Gemma 1 file
            text = {name: value for name, value in text.items() if name not in GEMMA2_ONLY}
        config = cls(
            SiglipVisionConfig(**{name: vision[name] for name in SiglipVisionConfig.__annotations__ if name in vision}),
            GemmaConfig(**{name: text[name] for name in GemmaConfig.__annotations__ if name in text}),
            values.get("image_token_index", values.get("image_token_id", 257152)),
            **{name: value for name, value in (text | values).items() if name in TOKEN_IDS},
        )
        # Other values of these would change the computation: an error is better than wrong results.
        kinds = ("sliding_attention" if config.text_config.has_post_norms else "full_attention", "full_attention")
        layers, tanh = [kinds[i % 2] for i in range(config.text_config.num_hidden_layers)], "gelu_pytorch_tanh"
        legacy = "gelu" if text.get("hidden_act") == "gelu" else tanh  # early Gemma files say "gelu" but mean tanh
        checks = [(rope, "rope_type", "default"), (text, "attention_bias", False), (text, "tie_word_embeddings", True)]
        checks += [(text, "layer_types", layers), (text, "hidden_activation", tanh), (text, "hidden_act", legacy)]
        checks += [(vision, "model_type", "siglip_vision_model"), (vision, "hidden_act", tanh)]
        for part, name, supported in [*checks, (vision | values, "projection_dim", config.projection_dim)]:
            if part.get(name, supported) != supported:
                raise ValueError(f"{name} in config.json must be {supported!r:.90}, not {_show(part[name])}.")
        ids = _without_nulls(generation or {})
        return replace(config, **{name: ids[name] for name in TOKEN_IDS if name in ids})

    def to_dict(self) -> dict:
        """The content of a hub ``config.json`` from which transformers builds the same model."""
        text, vision = asdict(replace(self.text_config)), asdict(replace(self.vision_config))  # checks them again
        text |= {"hidden_activation" if self.text_config.has_post_norms else "hidden_act": "gelu_pytorch_tanh"}
        if not self.text_config.has_post_norms:
            text = {name: value for name, value in text.items() if name not in GEMMA2_ONLY}
        ids = {name: getattr(self, name) for name in TOKEN_IDS}
        vision |= {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": self.image_token_index,
            **ids,
            "hidden_size": self.projection_dim,
            "projection_dim": self.projection_dim,
            "tie_word_embeddings": True,
            "text_config": text | ids | {"tie_word_embeddings": True},
            "vision_config": vision | {"projection_dim": self.projection_dim},
        }


def _without_nulls(values) -> dict:
    """The entries that a file really sets. Null means "left out", except in the fields where None is a valid value."""
    if not isinstance(values, dict):
        raise ValueError(f"config.json contains a {type(values).__name__} where an object is expected.")
    optional = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    return {name: value for name, value in values.items() if value is not None or name in optional}


def _check_numbers(config) -> None:
    """Check every numeric field. An integer becomes a float where transformers has a float."""
    for name, annotation in config.__annotations__.items():
        value, types = getattr(config, name), get_args(annotation) or (annotation,)
        if str not in types and (value is not None or type(None) not in types):
            is_float = float in types
            check_number(name, value, 1 - is_float, LARGEST.get(name, LARGEST_SIZE), is_float)
            if is_float and name != "query_pre_attn_scalar":
                setattr(config, name, float(value))


def check_number(name: str, value, low, high, is_float: bool = False) -> None:
    """Raise ValueError unless ``value`` is an integer from low to high, or a number above low and at most high."""
    is_number = isinstance(value, Real if is_float else int) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (is_float and value == low):
        limits = f"above {low:,} and at most {high:,}" if is_float else f"an integer from {low:,} to {high:,}"
        raise ValueError(f"{name} must be {limits}, not {_show(value)}.")


def _show(value) -> str:
    """A value in a message: short, and without the content of nested objects."""
    return repr(value)[:60] if isinstance(value, str | Real | None) else f"a {type(value).__name__}"
