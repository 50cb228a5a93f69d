"""PaliGemma: vision tower → projector → decoder.

    B text rows · I images · P patches per image · T tokens · S tokens including those in the cache
    C, H, W channels, height, width of an image · E hidden size of the tower · D of the decoder · V vocabulary size

The tower turns an image into P vectors. One linear layer projects them to the decoder's hidden size. They replace the
embeddings of the ``<image>`` tokens. Text embeddings are multiplied by √D (see gemma.py), image vectors are not.

Sources: "PaliGemma" (arXiv:2407.07726), "PaliGemma 2" (arXiv:2412.03555); big_vision ``models/proj/paligemma``;
transformers ``models/paligemma/modeling_paligemma.py``.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from minivlm import checkpoint, masks
from minivlm.cache import Cache
from minivlm.config import PaliGemmaConfig
from minivlm.gemma import GemmaForCausalLM, check_ids
from minivlm.siglip import SiglipVisionModel, init_linear


def merge_image_features(
    x: Float[Tensor, "B T D"], is_image: Bool[Tensor, "B T"], features: Float[Tensor, "B P D"]
) -> Float[Tensor, "B T D"]:
    """Replace the embeddings of each row's P ``<image>`` tokens by its P image vectors, in order."""
    return x.masked_scatter(is_image[..., None], features)


class PaliGemmaMultiModalProjector(nn.Module):
    """One linear layer from the tower's hidden size to the decoder's."""

    def __init__(self, config: PaliGemmaConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.projection_dim)

    def forward(self, x: Float[Tensor, "I P E"]) -> Float[Tensor, "I P D"]:
        return self.linear(x)


class PaliGemma(nn.Module):
    """The whole model."""

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
        """Load weights in the hub's format.

        Args:
            path: A folder or a hub id. Default: the embedded checkpoint.
            revision: Commit, branch or tag on the hub.
            dtype: Dtype of the loaded weights. Default: the one in config.json, or else the one they are stored in.

        Raises:
            ValueError: If the files are not a PaliGemma, or a weight is missing, extra, or of a wrong shape or dtype.
            OSError: If the hub repository is gated, does not exist or cannot be reached.
        """
        return checkpoint.load(cls, path, revision=revision, dtype=dtype, device=device)

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the hub's format, by default in the model's own dtype."""
        checkpoint.save(self, path, dtype)

    def init_weights(self, seed: int) -> "PaliGemma":
        """Initialize all weights randomly, reproducibly from ``seed``."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            self.apply(init_linear)
        return self

    def encode_image(self, pixel_values: Float[Tensor, "I C H W"]) -> Float[Tensor, "I P D"]:
        """Images → embeddings for the decoder. Encode an image once: all prompts about it can share the result."""
        features = self.multi_modal_projector(self.vision_tower(pixel_values.to(self.dtype)))
        return self.check_finite(features, self.vision_tower, self.multi_modal_projector)

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.model.embed_tokens.weight.dtype

    def check_finite(self, output: Float[Tensor, "*S"], *parts: nn.Module) -> Float[Tensor, "*S"]:
        """Return ``output``, or raise ValueError if it, or a norm or bias of ``parts`` hidden in it, is not finite."""
        vectors = [weight.detach() for part in parts for weight in part.parameters() if weight.ndim == 1]
        vectors = [w.to_local() if hasattr(w, "to_local") else w for w in vectors]  # FSDP: this process's shards
        if masks.is_any(~torch.cat([torch.stack(output.detach().aminmax()), *vectors]).isfinite()):
            fault = checkpoint.find_nonfinite(dict(self.named_parameters()))
            raise ValueError(
                fault or "the output is not finite, but the weights are. Use torch.float32, or train with a lower lr."
            )
        return output

    def embed(
        self,
        input_ids: Int[Tensor, "B T"],
        image_features: Float[Tensor, "I P D"] | None,
        is_image: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Text embeddings in which the image vectors replace the ``<image>`` tokens, in order.

        With fewer images than rows, B / I consecutive rows share an image. ``is_image`` can leave out ``<image>``
        tokens that the model generated: these are text.
        """
        if image_features is None:
            return self.language_model.model.embed(input_ids)
        is_image = input_ids == self.config.image_token_index if is_image is None else is_image
        # the id of <image> can be beyond the embedding table, so look up another id: its embedding is replaced anyway
        x = self.language_model.model.embed(input_ids.masked_fill(is_image, 0))
        B, (images, P) = input_ids.shape[0], image_features.shape[:2]
        if not images or B % images or masks.is_any(is_image.sum(1) != P):
            raise ValueError(
                f"{images} images of {P} tokens do not match {B} rows with {is_image.sum(1).tolist()} <image> tokens. "
                "Prepare both with the processor."
            )
        shared = image_features.repeat_interleave(B // images, dim=0).to(x.dtype)
        return merge_image_features(x, is_image, shared)

    def hidden_states(
        self,
        input_ids: Int[Tensor, "B T"],
        pixel_values: Float[Tensor, "I C H W"] | None = None,
        attention_mask: Shaped[Tensor, "B S"] | None = None,
        token_type_ids: Shaped[Tensor, "B S"] | None = None,
        cache: Cache | None = None,
        image_features: Float[Tensor, "I P D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The decoder's output before the output head. Arguments as for ``forward``."""
        (B, T), past = input_ids.shape, cache.length if cache is not None else 0
        limit, sizes = self.config.text_config.max_position_embeddings, f"{past} cached and {T} new tokens"
        if not B or not T or past + T > limit:
            raise ValueError(f"{B} rows of {sizes} are not possible: 1 to {limit} (max_position_embeddings) are.")
        if attention_mask is None:
            attention_mask = input_ids.new_ones((B, past + T))
        has_types = token_type_ids is not None
        if not has_types:  # the first call contains image and prefix, later calls only suffix
            token_type_ids = input_ids.new_zeros((B, past + T))
            token_type_ids[:, past or T :] = 1
        for name, ids in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if ids.shape != (B, past + T):
                raise ValueError(f"{name} must be [{B}, {past + T}] for {sizes}, not {list(ids.shape)}.")
        attention_mask, token_type_ids = (attention_mask != 0).long(), (token_type_ids != 0).long()
        is_image = input_ids == self.config.image_token_index
        if past and (pixel_values is not None or image_features is not None or (T > 1 and masks.is_any(is_image))):
            raise ValueError("the cache holds another image and prompt. Call its reset(), or pass a new cache.")
        if past and has_types and masks.is_any((attention_mask > token_type_ids)[:, past:]):
            raise ValueError(
                "the prefix cannot be split: the tokens in the cache would have to attend to the new prefix tokens. "
                "Pass image and prefix in one call, then the suffix in any number of calls."
            )
        if pixel_values is not None:
            image_features = self.encode_image(pixel_values)
        is_image &= token_type_ids[:, past:] == 0
        if image_features is None and masks.is_any(is_image):
            raise ValueError("input_ids contain <image> tokens but there is no image. Pass pixel_values.")
        x = self.embed(input_ids, image_features, is_image)
        return self.language_model.model(x, attention_mask, token_type_ids, cache)

    def forward(self, input_ids: Int[Tensor, "B T"], last_only: bool = False, **inputs) -> Float[Tensor, "B _ V"]:
        """Logits for every token.

        Args:
            input_ids: Token ids with P ``<image>`` tokens per row.
            last_only: Return logits for the last token only, which is all that generation needs and 1/T of the work.
            pixel_values: Images with values in [-1, 1]. With fewer images than rows, consecutive rows share one.
            attention_mask: 1 on tokens, 0 on padding, including the tokens in the cache. Default: all ones.
            token_type_ids: 0 on image and prefix, 1 on the suffix, including the tokens in the cache. Default: no
                suffix, or, if the cache is filled, all new tokens are suffix.
            cache: A KV cache, extended in place.
            image_features: The result of ``encode_image``, instead of ``pixel_values``.

        Raises:
            ValueError: If shapes do not match, prefix tokens follow a filled cache, or the logits are not finite.
        """
        hidden = self.hidden_states(input_ids, **inputs)
        parts = [self.language_model] if input_ids.shape[1] > 1 else []  # once per answer, not for every token
        return self.check_finite(self.language_model.logits(hidden[:, -1:] if last_only else hidden), *parts)

    def loss(self, labels: Int[Tensor, "B T"], **inputs) -> Float[Tensor, ""]:
        """Mean cross-entropy of the suffix: hidden state t predicts token t + 1 wherever its label is not -100.

        Only these positions go through the output head. Other arguments as for ``forward``.
        """
        hidden = self.hidden_states(**inputs)
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels must be {list(hidden.shape[:2])} like input_ids, not {list(labels.shape)}.")
        is_target = labels[:, 1:] != -100
        targets = labels[:, 1:][is_target]
        if not len(targets):
            raise ValueError("all labels are -100, so there is nothing to learn. Pass suffixes to the processor.")
        check_ids(targets, self.config.text_config.vocab_size)
        logits = self.check_finite(self.language_model.logits(hidden[:, :-1][is_target]), self.language_model)
        return F.cross_entropy(logits.float(), targets)
