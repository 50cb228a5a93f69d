"""What the seven systems share: captions to learn from, the loss on them, and the loop that writes them.

    B rows · P vectors of an image · T tokens of text · N new tokens · D hidden size · V vocabulary size

All of them see with the tower of the embedded checkpoint, except those whose paper learns from pixels, and write with
Gemma's layers. What differs is how the image gets into the language model: that is each family's own file.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minivlm.cache import GrowingCache
from minivlm.gemma import GemmaForCausalLM
from minivlm.generation import greedy
from minivlm.processor import Processor
from minivlm.siglip import SiglipVisionModel
from minivlm.training.objectives import Objective

PREFIX, TEXT = 0, 1  # token types: a bidirectional block, and causal text


def encode_texts(processor: Processor, texts: Sequence[str]) -> dict[str, Int[Tensor, "B T"]]:
    """``<bos>`` text ``<eos>`` of each: ``input_ids`` and ``attention_mask``, padded on the right."""
    bos, eos, pad = processor.bos_token_id, processor.eos_token_id, processor.pad_token_id
    rows = [torch.tensor([bos, *ids, eos]) for ids in processor.encode(list(texts))]
    ids, mask = (
        nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler)
        for values, filler in ((rows, pad), ([torch.ones_like(row) for row in rows], 0))
    )
    return {"input_ids": ids, "attention_mask": mask}


def next_token_loss(
    decoder: GemmaForCausalLM,
    hidden: Float[Tensor, "B T D"],
    input_ids: Int[Tensor, "B T"],
    is_target: Int[Tensor, "B T"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy over the tokens with ``is_target`` 1, each predicted from the token before it."""
    wanted = is_target[:, 1:].bool()
    return F.cross_entropy(decoder.logits(hidden[:, :-1][wanted]).float(), input_ids[:, 1:][wanted])


@torch.inference_mode()
def write(
    decoder: GemmaForCausalLM,
    x: Float[Tensor, "B T D"],
    token_type_ids: Int[Tensor, "B T"],
    eos: int,
    max_new_tokens: int = 32,
    choose: Callable[[Tensor], Tensor] = greedy,
) -> Int[Tensor, "B N"]:
    """Continue embeddings with tokens, by a KV cache. After ``eos``, a row repeats it.

    Args:
        x: Of everything before the new tokens, without padding.
        token_type_ids: 0 for the bidirectional block at the start, 1 after it.
        choose: From the logits of a step to its tokens.
    """
    cache, new = GrowingCache(), []
    finished = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _ in range(max_new_tokens):
        attention_mask = torch.ones_like(token_type_ids)
        hidden = decoder.model(x, attention_mask, token_type_ids, cache)
        token = choose(decoder.logits(hidden[:, -1])).masked_fill(finished, eos)
        new.append(token)
        finished |= token == eos
        if finished.all():
            break
        x = decoder.model.embed(token[:, None])
        token_type_ids = torch.cat((token_type_ids, torch.full_like(token[:, None], TEXT)), dim=1)
    return torch.stack(new, dim=1)


class Captioner(Objective):
    """A system that writes captions with a Gemma decoder.

    A family says what its decoder gets to see: ``look`` returns vectors to put before the text, or none if the image
    enters the layers.
    """

    image_type = TEXT  # of the vectors before the text: causal, as all text is

    def __init__(self, decoder: GemmaForCausalLM, tower: SiglipVisionModel | None = None):
        super().__init__()
        self.decoder, self.tower = decoder, tower

    @torch.no_grad()
    def see(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P E"]:
        """The patch vectors of the tower, which is frozen in every family."""
        return self.tower(pixel_values)

    def look(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P D"]:
        """The vectors before the text."""
        raise NotImplementedError

    def look_away(self) -> None:
        """Show no image. Only families whose image enters the layers remember one."""

    def begin(
        self, pixel_values: Float[Tensor, "B C H W"], input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
    ) -> tuple[Float[Tensor, "B S D"], Int[Tensor, "B S"], Int[Tensor, "B S"]]:
        """Embeddings, attention mask and token types of image and text."""
        image, text = self.look(pixel_values), self.decoder.model.embed(input_ids)
        ones = attention_mask.new_ones(image.shape[:2])
        types = torch.cat((self.image_type * ones, torch.full_like(attention_mask, TEXT)), dim=1)
        return torch.cat((image.to(text.dtype), text), dim=1), torch.cat((ones, attention_mask), dim=1), types

    def loss_weight(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["attention_mask"][:, 1:].sum()

    def forward(
        self, pixel_values: Float[Tensor, "B C H W"], input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """The mean loss per token of the captions."""
        hidden = self.decoder.model(*self.begin(pixel_values, input_ids, attention_mask))
        return next_token_loss(self.decoder, hidden[:, -input_ids.shape[1] :], input_ids, attention_mask)

    def caption(self, processor: Processor, pixel_values: Float[Tensor, "B C H W"], **options) -> list[str]:
        """A caption for each image. Options as for ``write``."""
        bos = torch.full((len(pixel_values), 1), processor.bos_token_id)
        with torch.inference_mode():
            x, _, types = self.begin(pixel_values, bos, torch.ones_like(bos))
        return processor.batch_decode(write(self.decoder, x, types, processor.eos_token_id, **options))


class TextModel(Objective):
    """A Gemma that reads text only: what a frozen language model knows before it sees anything."""

    def __init__(self, decoder: GemmaForCausalLM):
        super().__init__()
        self.decoder = decoder

    def forward(self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        x = self.decoder.model.embed(input_ids)
        hidden = self.decoder.model(x, attention_mask, torch.full_like(attention_mask, TEXT))
        return next_token_loss(self.decoder, hidden, input_ids, attention_mask)
