"""CM3: images as tokens too, in one causal model that captions, fills in and draws.

    B rows · T tokens · n = s · s codes of an image · C codes in the codebook · D size of a codebook vector

An image is n codes of a VQ-VAE, each a token of the vocabulary like any word. A document is ``<bos>`` caption
``<begin>`` codes ``<eos>``. The model is causal, but in a *causally masked* document some spans have been cut out, each
replaced by a sentinel, and follow at the end, each after its sentinel again (figure 1):

    a b c d e f   →   a b <mask:0> f <mask:0> c d e

So a span is written from left to right as all text is, and yet with everything around it in view. Cut out the caption,
and writing it is captioning; cut out nothing, and writing what follows the caption is drawing.

Nothing is frozen and nothing comes from another model, except that the VQ-VAE is trained first. The paper's documents
are web pages, its images 256 codes of VQGAN, and the number of spans is Poisson with mean 1; ours are captioned scenes
with at most one span. Sources: "CM3" (arXiv:2201.07520), sections 2 and 3; facebookresearch/metaseq,
``cm3_dataset.py``; VQ-VAE arXiv:1711.00937.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minivlm.families.base import TEXT, next_token_loss, write
from minivlm.gemma import GemmaForCausalLM
from minivlm.processor import Processor
from minivlm.training.objectives import Objective, VQVAEObjective
from minivlm.vqvae import ResidualBlock, VectorQuantizer, code_grid


class ImageVQVAE(nn.Module):
    """Images ↔ codes. Three times half the resolution: 112 px are 14 × 14 codes, each for 8 × 8 px."""

    def __init__(self, codes: int = 512, dim: int = 32, width: int = 48):
        super().__init__()
        sizes = (width // 4, width // 2, width)
        down = [(nn.Conv2d(a, b, 4, 2, padding=1), nn.ReLU()) for a, b in pairwise((3, *sizes))]
        up = [(nn.ConvTranspose2d(a, b, 4, 2, padding=1), nn.ReLU()) for a, b in pairwise((*reversed(sizes), 3))]
        blocks = [ResidualBlock(width) for _ in range(4)]
        self.encoder = nn.Sequential(*(x for pair in down for x in pair), *blocks[:2], nn.Conv2d(width, dim, 1))
        self._vq_vae = VectorQuantizer(codes, dim)
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 1), *blocks[2:], *[x for pair in up for x in pair][:-1])

    @torch.no_grad()
    def encode(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B n"]:
        """Pixels in [-1, 1] → codes, row by row."""
        return self._vq_vae.nearest(self.encoder(pixel_values).float())

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B n"]) -> Float[Tensor, "B 3 H W"]:
        """Codes → pixels in [-1, 1]."""
        return self.decoder(code_grid(codes, self._vq_vae._embedding)).clamp(-1, 1)


class ImageVQVAEObjective(VQVAEObjective):
    """The losses of the image VQ-VAE."""

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        vectors, nearest, codes = self.quantize(pixel_values)
        decoded = self.vae.decoder(vectors + (nearest - vectors).detach()).float()
        return F.l1_loss(decoded, pixel_values) + self.finish_step(vectors, nearest, codes)


def cut_spans(ids: Sequence[int], spans: Sequence[tuple[int, int]], sentinels: Sequence[int]) -> list[int]:
    """Move the spans [start, end) to the end of a document, in order, with a sentinel in their place and before each.

    Raises:
        ValueError: If spans overlap, are not in order, or are more than the sentinels.
    """
    ends = [0, *(v for span in spans for v in span), len(ids)]
    if ends != sorted(ends) or len(spans) > len(sentinels):
        raise ValueError(
            f"The spans {list(spans)} must be in order, within {len(ids)} tokens, at most {len(sentinels)}."
        )
    kept, moved, done = [], [], 0
    for (start, end), sentinel in zip(spans, sentinels, strict=False):
        kept += [*ids[done:start], sentinel]
        moved += [sentinel, *ids[start:end]]
        done = end
    return [*kept, *ids[done:], *moved]


def fill_spans(ids: Sequence[int], sentinels: Sequence[int]) -> list[int]:
    """The inverse of ``cut_spans``: every span back in its place."""
    used = [s for s in sentinels if s in ids]
    if not used:
        return list(ids)
    ids, spans = list(ids), {}
    for sentinel in reversed(used):
        last = len(ids) - 1 - ids[::-1].index(sentinel)
        spans[sentinel], ids = ids[last + 1 :], ids[:last]
    return [token for i in ids for token in spans.get(i, [i])]


class CM3(Objective):
    """One causal Gemma over words, codes and sentinels. Their ids come after the words': codes, then the others.

    Args:
        decoder: With ``words + codes + 2`` or more rows of embeddings.
        words: Size of the tokenizer's vocabulary.
    """

    trained = ("decoder",)

    def __init__(self, decoder: GemmaForCausalLM, vae: ImageVQVAE, words: int):
        super().__init__()
        self.decoder, self.vae, self.words = decoder, vae, words
        self.codes = len(vae._vq_vae._embedding)
        self.begin, self.sentinel = words + self.codes, words + self.codes + 1

    def loss_weight(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["is_token"][:, 1:].sum()

    def forward(
        self, pixel_values: Float[Tensor, "B C H W"], slots: Int[Tensor, "B T"], is_token: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        """The mean loss per token of documents.

        Args:
            slots: Their tokens, where −1 − i stands for code i of the row's image.
            is_token: 0 on padding.
        """
        return next_token_loss(self.decoder, *self.read(pixel_values, slots, is_token), is_token)

    def read(self, pixel_values, slots, is_token) -> tuple[Float[Tensor, "B T D"], Int[Tensor, "B T"]]:
        """Hidden states and ids of documents, with the codes filled in."""
        codes = self.words + self.vae.encode(pixel_values)
        ids = torch.where(slots < 0, codes.gather(1, (-1 - slots).clamp_min(0)), slots)
        x = self.decoder.model.embed(ids)
        return self.decoder.model(x, is_token, torch.full_like(is_token, TEXT)), ids

    def continue_(self, prompts: Int[Tensor, "B T"], eos: int, **options) -> Int[Tensor, "B N"]:
        """What the model writes after prompts of equal length."""
        x = self.decoder.model.embed(prompts)
        return write(self.decoder, x, torch.full_like(prompts, TEXT), eos, **options)

    def caption(self, processor: Processor, pixel_values: Float[Tensor, "B C H W"]) -> list[str]:
        """Fill in the caption that was cut out of each image's document."""
        codes = self.words + self.vae.encode(pixel_values)
        one, eos = torch.ones_like(codes[:, :1]), processor.eos_token_id
        around = [
            one * processor.bos_token_id,
            one * self.sentinel,
            one * self.begin,
            codes,
            one * eos,
            one * self.sentinel,
        ]
        return processor.batch_decode(self.continue_(torch.cat(around, dim=1), eos))

    def draw(
        self, processor: Processor, caption: str, count: int, side: int, seed: int = 0, top_k: int = 32
    ) -> Float[Tensor, "N 3 H W"]:
        """Sample images of a caption, ``side`` × ``side`` codes each."""
        g = torch.Generator().manual_seed(seed)
        first, last = self.words, self.words + self.codes

        def choose(logits: Tensor) -> Tensor:
            values, codes = logits[:, first:last].topk(top_k)
            return first + codes.gather(1, torch.multinomial(values.softmax(-1), 1, generator=g))[:, 0]

        (ids,) = processor.encode([caption])
        prompt = torch.tensor([[processor.bos_token_id, *ids, self.begin]] * count)
        codes = self.continue_(prompt, processor.eos_token_id, max_new_tokens=side * side, choose=choose) - first
        return self.vae.decode(codes)
