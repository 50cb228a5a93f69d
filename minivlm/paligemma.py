"""PaliGemma: tower → projector → decoder.

    B rows of text · I pictures · P patches of a picture · T tokens · S tokens with those in the cache
    D width · V vocabulary

The tower turns a picture into P vectors; one linear layer gives them the decoder's width; they take the places of the
``<image>`` tokens in the text's embeddings, unscaled (text is multiplied by √D, see gemma.py); the decoder does the
rest.

Sources: "PaliGemma" (arXiv:2407.07726), "PaliGemma 2" (arXiv:2412.03555); big_vision ``models/proj/paligemma``;
transformers ``models/paligemma/modeling_paligemma.py``.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm import checkpoint
from minivlm.cache import Cache
from minivlm.config import PaliGemmaConfig
from minivlm.gemma import GemmaForCausalLM
from minivlm.siglip import SiglipVisionModel, init_linear


def merge_image_features(
    x: Float[Tensor, "B T D"], is_image: Bool[Tensor, "B T"], features: Float[Tensor, "B P D"]
) -> Float[Tensor, "B T D"]:
    """Each row's P image vectors in the places of its P ``<image>`` tokens, in order; all else stays as it is."""
    return x.masked_scatter(is_image[..., None], features)


class PaliGemmaMultiModalProjector(nn.Module):
    """One linear layer from the tower's width to the decoder's."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.projection_dim)

    def forward(self, x: Float[Tensor, "I P W"]) -> Float[Tensor, "I P D"]:
        return self.linear(x)


class PaliGemma(nn.Module):
    """The whole model. ``from_pretrained()`` loads the embedded checkpoint, a folder or a hub id."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.config = config
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = PaliGemmaMultiModalProjector(config)
        self.language_model = GemmaForCausalLM(config.text_config)

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, *, revision: str | None = None, dtype=None, device="cpu"
    ) -> "PaliGemma":
        """Loads hub-format weights: a folder, a hub id, or nothing for the embedded checkpoint.

        Args:
            revision: the hub commit, branch or tag to pin.
            dtype: numbers to hold the weights in; what config.json says when not given, or else as stored.

        Raises:
            ValueError: the files are not a PaliGemma, or a weight is missing, extra, misshapen or of a wrong type.
            OSError: the hub repository is gated, absent or out of reach.
        """
        return checkpoint.load(cls, path, revision=revision, dtype=dtype, device=device)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors``, which transformers and ``from_pretrained`` both open.

        ``dtype`` is the type to store the weights in: the model's own when not given.
        """
        checkpoint.save(self, path, dtype)

    def init_weights(self, seed: int) -> "PaliGemma":
        """Random weights, reproducible from ``seed``."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            self.apply(init_linear)
        return self

    def encode_image(self, pixel_values: Float[Tensor, "I C H W"]) -> Float[Tensor, "I P D"]:
        """Pictures → embeddings for the decoder. Once a picture: every answer about it can share the result."""
        return self.multi_modal_projector(self.vision_tower(pixel_values.to(self.dtype)))

    @property
    def dtype(self) -> torch.dtype:
        return self.multi_modal_projector.linear.weight.dtype

    def embed(
        self, input_ids: Int[Tensor, "B T"], image_features: Float[Tensor, "I P D"] | None
    ) -> Float[Tensor, "B T D"]:
        """Text embeddings with the pictures' vectors in the places of the ``<image>`` tokens, in order.

        Fewer pictures than rows means that B / I consecutive rows share a picture.
        """
        if image_features is None:
            return self.language_model.model.embed(input_ids)
        is_image = input_ids == self.config.image_token_index
        # <image> may lie beyond the embedding table: look up any row, it is replaced
        x = self.language_model.model.embed(input_ids.masked_fill(is_image, self.config.pad_token_id))
        B, (pictures, P) = len(input_ids), image_features.shape[:2]
        if B % pictures or not bool((is_image.sum(1) == P).all()):
            raise ValueError(
                f"{pictures} pictures of {P} tokens do not fit {B} rows with {is_image.sum(1).tolist()} <image> "
                "tokens: let the processor build both."
            )
        shared = image_features.repeat_interleave(B // pictures, dim=0).to(x.dtype)
        return merge_image_features(x, is_image, shared)

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "I C H W"] | None = None,
        attention_mask: Int[Tensor, "B S"] | None = None,
        token_type_ids: Int[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        image_features: Float[Tensor, "I P D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What ``forward`` turns into logits; arguments as there."""
        (B, T), past = input_ids.shape, cache.length if cache is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones((B, past + T))
        types_given = token_type_ids is not None
        if not types_given:  # the first call is image and prefix, everything after it suffix
            token_type_ids = input_ids.new_zeros((B, past + T))
            token_type_ids[:, past or T :] = 1
        for name, ids in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if ids.shape != (B, past + T):
                raise ValueError(
                    f"{name} must be [{B}, {past + T}], for {past} cached tokens and {T} new, not {list(ids.shape)}."
                )
        if past and types_given and bool(((token_type_ids == 0) & attention_mask.bool())[:, past:].any()):
            raise ValueError(
                "the prefix cannot be split: tokens in the cache would have to see the new prefix tokens. "
                "Give image and prefix in one call, then the suffix in as many as you like."
            )
        if pixel_values is not None:
            image_features = self.encode_image(pixel_values)
        elif image_features is None and not past and bool((input_ids == self.config.image_token_index).any()):
            raise ValueError("input_ids hold <image> tokens but there is no picture: give pixel_values.")
        x = self.embed(input_ids, image_features)
        return self.language_model.model(x, attention_mask, token_type_ids, cache)

    def forward(self, input_ids: Int[Tensor, "B T"], last_only: bool = False, **inputs) -> Float[Tensor, "B _ V"]:
        """Logits for every token, or for the last one alone: all that generation needs, and 1/T of the work.

        Args:
            input_ids: token ids with P ``<image>`` tokens a row.
            pixel_values: pictures in [-1, 1]. With fewer pictures than rows, consecutive rows share one.
            attention_mask: 1 on tokens, 0 on padding, those in the cache included; all ones when not given.
            token_type_ids: 0 on image and prefix, 1 on the suffix. When not given: no suffix, or, with a filled cache,
                nothing but suffix.
            cache: a KV cache, extended in place.
            image_features: what ``encode_image`` gave, instead of ``pixel_values``.

        Raises:
            ValueError: shapes that do not fit, or prefix tokens after a filled cache.
        """
        hidden = self.hidden_states(input_ids, **inputs)
        return self.language_model.logits(hidden[:, -1:] if last_only else hidden)

    def loss(self, labels: Int[Tensor, "B T"], **inputs) -> Float[Tensor, ""]:
        """Mean cross-entropy of the suffix: token t + 1 from hidden state t, where its label is not -100.

        Only the labeled positions go through the output head. Other arguments as for ``forward``.
        """
        hidden = self.hidden_states(**inputs)
        wanted = labels[:, 1:] != -100
        targets = labels[:, 1:][wanted]
        if not len(targets):
            raise ValueError("all labels are -100, so there is nothing to learn: give the processor suffixes.")
        return F.cross_entropy(self.language_model.logits(hidden[:, :-1][wanted]).float(), targets)
