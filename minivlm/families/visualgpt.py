"""VisualGPT: cross-attention inside a pretrained language model, mixed in by a gate that can close.

    B rows · P patches · T tokens · E hidden size of the tower · D of the decoder · τ threshold of the gate

Every layer of the language model also attends to the image. Let H be what self-attention says and Z what attention over
the image says. The *self-resurrecting activation unit* decides, number by number, which of them to believe:

    G_vis = σ(H) where σ(H) > τ, else 0          G_lan = 1 − σ(H) where 1 − σ(H) > τ, else 0
    output = G_vis ⊙ Z + G_lan ⊙ H

With 0 < τ < 0.5 a gate of 0 is not the end of its learning: where one of the two is closed the other is open, and what
flows through it moves H, so that the closed one can open again. The language model keeps what it knows of language
while there is little to learn vision from: the paper trains on 0.1 to 1% of COCO.

The tower is frozen, everything else is trained. Source: "VisualGPT" (arXiv:2102.10407), section 3; Vision-CAIR/
VisualGPT, ``gpt_decoder_visualGPT.py``, computes the gate by a linear layer from input and attended together, calls the
weight of the *language* side α, and has τ = 0 as its default where its README says 0.2. Ours is the paper's.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minivlm.families.base import Captioner
from minivlm.families.flamingo import CrossAttention
from minivlm.gemma import GemmaAttention, GemmaForCausalLM
from minivlm.siglip import LayerNorm, SiglipVisionModel


def resurrecting_gates(
    h: Float[Tensor, "*B D"], threshold: float
) -> tuple[Float[Tensor, "*B D"], Float[Tensor, "*B D"]]:
    """G_vis and G_lan: σ(h) and 1 − σ(h), each 0 where it is not above the threshold."""
    visual = h.sigmoid()
    language = 1 - visual
    return visual * (visual > threshold), language * (language > threshold)


class VisualAttention(nn.Module):
    """A layer's self-attention, mixed with attention over the image. Takes the place of the layer's ``self_attn``."""

    def __init__(self, self_attn: GemmaAttention, dim: int, num_heads: int, threshold: float):
        super().__init__()
        self.self_attn, self.threshold = self_attn, threshold
        self.attention = CrossAttention(dim, num_heads)
        self.vectors: Tensor | None = None  # [B, P, D], what the model looks at; None: language alone
        self.visual: Tensor | None = None  # the last G_vis, to look at

    def forward(self, x: Float[Tensor, "B T D"], cos, sin, mask, cache) -> Float[Tensor, "B T D"]:
        h = self.self_attn(x, cos, sin, mask, cache)
        if self.vectors is None:
            return h
        visual, language = resurrecting_gates(h, self.threshold)
        self.visual = visual.detach()
        return visual * self.attention(x, self.vectors) + language * h


class VisualGPT(Captioner):
    """Frozen tower → projection → attention over the image in every layer of a tuned language model."""

    trained = ("decoder", "project", "norm")

    def __init__(self, decoder: GemmaForCausalLM, tower: SiglipVisionModel, threshold: float = 0.2, num_heads: int = 4):
        super().__init__(decoder, tower)
        D = decoder.config.hidden_size
        self.project, self.norm = nn.Linear(tower.config.hidden_size, D), LayerNorm(D)
        for layer in decoder.model.layers:
            layer.self_attn = VisualAttention(layer.self_attn, D, num_heads, threshold)

    @property
    def attentions(self) -> list[VisualAttention]:
        return [layer.self_attn for layer in self.decoder.model.layers]

    @property
    def gates(self) -> Float[Tensor, "L B T D"]:
        """G_vis of each layer in the last forward pass."""
        return torch.stack([attention.visual for attention in self.attentions])

    def look(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 0 D"]:
        """Show the images to the layers. Nothing is put before the text."""
        vectors = self.norm(self.project(self.see(pixel_values)))
        for attention in self.attentions:
            attention.vectors = vectors
        return vectors[:, :0]

    def look_away(self) -> None:
        """Show no image: the decoder is a language model again."""
        for attention in self.attentions:
            attention.vectors = None
