"""Flamingo: a frozen language model that looks at images through gates that start closed.

    B rows · I images per row · P patches · R latents · T tokens · E hidden size of the tower · D of the decoder
    S = I · R visual vectors per row

A *Perceiver resampler* turns the patches of each image into R vectors: learned latents attend to patches and latents.
Before every frozen layer of the language model stands a *gated cross-attention* block (figure 4):

    y ← y + tanh(α) · attention(q = y, kv = image)          α = β = 0 at the start,
    y ← y + tanh(β) · ffw(y)                                so training starts from exactly the language model

Text and images are interleaved in one document. A token attends to the R vectors of the last image before it only,
and to none before the first; what it knows of earlier images it knows through the text's own self-attention. That is
what lets a document of examples teach a task without any training: in-context learning.

Tower and language model are frozen. Source: "Flamingo" (arXiv:2204.14198), sections 2.1 to 2.4, appendix A.1. The paper
has 64 latents, and a block before every layer, every fourth or every seventh, depending on size. mlfoundations/
open_flamingo, ``helpers.py`` and ``factory.py``, also trains the input embeddings, since its documents have new tokens
for images. Here a tensor says where the images are, so no token is needed.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm.families.base import TEXT, Captioner, next_token_loss
from minivlm.gemma import GemmaDecoderLayer, GemmaForCausalLM
from minivlm.processor import Processor
from minivlm.siglip import LayerNorm, SiglipVisionModel, split_heads


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence over another. A query without keys gets zeros."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(
        self, x: Float[Tensor, "B T D"], seen: Float[Tensor, "B S D"], mask: Bool[Tensor, "B T S"] | None = None
    ) -> Float[Tensor, "B T D"]:
        q, k, v = (
            split_heads(proj(y), self.num_heads)
            for proj, y in ((self.q_proj, x), (self.k_proj, seen), (self.v_proj, seen))
        )
        if mask is None:
            return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        is_blind = ~mask.any(-1)  # before the first image; it attends to all, so that no softmax is empty, for nothing
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=(mask | is_blind[..., None])[:, None])
        return self.out_proj(out.transpose(1, 2).flatten(2)).masked_fill(is_blind[..., None], 0.0)


def feed_forward(dim: int) -> nn.Sequential:
    """LayerNorm, then two linear layers with twice as many units between them; the paper has four times as many."""
    return nn.Sequential(
        LayerNorm(dim), nn.Linear(dim, 2 * dim, bias=False), nn.GELU(), nn.Linear(2 * dim, dim, bias=False)
    )


class Resampler(nn.Module):
    """P patches → R vectors: the latents attend to the patches and to themselves, layer by layer."""

    def __init__(self, image_dim: int, dim: int, latents: int, layers: int, num_heads: int):
        super().__init__()
        self.project = nn.Linear(image_dim, dim)
        self.latents = nn.Parameter(torch.randn(latents, dim) * dim**-0.5)
        self.layers = nn.ModuleList(
            nn.ModuleList([LayerNorm(dim), LayerNorm(dim), CrossAttention(dim, num_heads), feed_forward(dim)])
            for _ in range(layers)
        )
        self.norm = LayerNorm(dim)

    def forward(self, patches: Float[Tensor, "N P E"]) -> Float[Tensor, "N R D"]:
        patches = self.project(patches)
        x = self.latents.expand(len(patches), -1, -1)
        for norm_patches, norm_latents, attention, ffw in self.layers:
            q = norm_latents(x)
            x = x + attention(q, torch.cat((norm_patches(patches), q), dim=1))
            x = x + ffw(x)
        return self.norm(x)


class GatedLayer(nn.Module):
    """A gated cross-attention block, then the frozen layer. Called like that layer, by ``GemmaModel.run_layers``."""

    def __init__(self, layer: GemmaDecoderLayer, dim: int, num_heads: int):
        super().__init__()
        self.norm, self.attention, self.ffw = LayerNorm(dim), CrossAttention(dim, num_heads), feed_forward(dim)
        self.alpha, self.beta = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.layer = layer
        self.vectors: Tensor | None = None  # [B, S, D], what the model looks at; None: language alone
        self.mask: Tensor | None = None  # [B, T, S], or [B, 1, S] for all tokens

    def forward(self, x: Float[Tensor, "B T D"], cos, sin, mask, cache) -> Float[Tensor, "B T D"]:
        if self.vectors is not None:
            T = x.shape[1]
            look = self.mask[:, -T:].expand(-1, T, -1)  # a decode step looks as the last token of the prompt did
            x = x + self.alpha.tanh() * self.attention(self.norm(x), self.vectors, look)
            x = x + self.beta.tanh() * self.ffw(x)
        return self.layer(x, cos, sin, mask, cache)


def last_image_mask(images_before: Int[Tensor, "B T"], images: int, latents: int) -> Bool[Tensor, "B T S"]:
    """Which of the I · R vectors each token attends to: those of the last image before it.

    Args:
        images_before: How many images come before each token, 0 to I.
    """
    image = torch.arange(images, device=images_before.device).repeat_interleave(latents)
    return image == images_before[..., None] - 1


class Flamingo(Captioner):
    """Frozen tower → resampler → gated blocks between the frozen layers of the language model."""

    def __init__(
        self,
        decoder: GemmaForCausalLM,
        tower: SiglipVisionModel,
        latents: int = 16,
        layers: int = 1,
        num_heads: int = 4,
    ):
        super().__init__(decoder, tower)
        D = decoder.config.hidden_size
        self.latents = latents
        self.resampler = Resampler(tower.config.hidden_size, D, latents, layers, num_heads)
        decoder.model.layers = nn.ModuleList(GatedLayer(layer, D, num_heads) for layer in decoder.model.layers)

    def prepare(self) -> None:
        """Freeze tower, embeddings and the layers inside the gated ones."""
        self.frozen = [*self.tower.parameters(), *self.decoder.model.embed_tokens.parameters()]
        self.frozen += [p for gated in self.decoder.model.layers for p in gated.layer.parameters()]
        self.frozen += list(self.decoder.model.norm.parameters())
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    @property
    def gates(self) -> Float[Tensor, "L 2"]:
        """tanh(α) and tanh(β) of each layer."""
        return torch.stack([torch.cat((layer.alpha, layer.beta)).tanh() for layer in self.decoder.model.layers])

    def look(
        self, pixel_values: Float[Tensor, "N C H W"], images_before: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B 0 D"]:
        """Show the images of B documents, N = B · I, to the gated layers. Nothing is put before the text.

        Args:
            images_before: How many images come before each token. Default: one image, before all text.
        """
        rows = len(pixel_values) if images_before is None else len(images_before)
        vectors = self.resampler(self.see(pixel_values)).unflatten(0, (rows, -1))
        if images_before is None:
            images_before = torch.ones(rows, 1, dtype=torch.long, device=vectors.device)
        images, latents = vectors.shape[1:3]
        for layer in self.decoder.model.layers:
            layer.vectors, layer.mask = vectors.flatten(1, 2), last_image_mask(images_before, images, latents)
        return vectors.new_zeros(rows, 0, vectors.shape[-1])

    def caption(self, processor: Processor, pixel_values: Float[Tensor, "B C H W"], **options) -> list[str]:
        """A caption for each image: the first line of the document that the model would write."""
        return [text.split("\n")[0] for text in super().caption(processor, pixel_values, **options)]

    def look_away(self) -> None:
        """Show no image: the decoder is the language model again."""
        for layer in self.decoder.model.layers:
            layer.vectors = None

    def forward(
        self,
        pixel_values: Float[Tensor, "N C H W"],
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        images_before: Int[Tensor, "B T"],
    ) -> Float[Tensor, ""]:
        """The mean loss per token of interleaved documents."""
        self.look(pixel_values, images_before)
        x = self.decoder.model.embed(input_ids)
        hidden = self.decoder.model(x, attention_mask, torch.full_like(attention_mask, TEXT))
        return next_token_loss(self.decoder, hidden, input_ids, attention_mask)
