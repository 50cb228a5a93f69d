"""SimVLM: one prefix-LM on pairs and on text, with images straight from pixels.

    B rows · P = h · w vectors of an image · T tokens · D hidden size

    L = − E Σ_{i ≥ Tp} log p(x_i | x_{[Tp, i]}, x_{< Tp})

The first Tp tokens attend to each other fully, the rest is causal. For a pair, the prefix starts with the image and may
go on into its caption; Tp is drawn at random for every row. Text without an image, mixed into every batch, is trained
with the same loss. No tower was trained before: a *convolution stem*, the first blocks of a ResNet, turns the image
into a grid of vectors.

Nothing is frozen and nothing comes from another model. The paper's model is an encoder for the prefix and a decoder
for the rest; ours is PaliGemma's decoder under the prefix-LM mask, the paper's "decoder only" (VQA 65.2 instead of
67.4). No official code was released. Source: "SimVLM" (arXiv:2108.10904), section 3 and its ablations.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minivlm.families.base import PREFIX, Captioner, next_token_loss
from minivlm.gemma import GemmaForCausalLM
from minivlm.vqvae import ResidualBlock


class ConvStem(nn.Module):
    """Three times half the resolution and a residual block, then half of it once more: 112 px become 7 × 7 vectors,
    each with its position.
    """

    def __init__(self, hidden_size: int, image_size: int, width: int = 24):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((3, width, 2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU(), ResidualBlock(after)]
        self.net = nn.Sequential(*layers, nn.Conv2d(4 * width, hidden_size, 3, stride=2, padding=1))
        self.position_embedding = nn.Embedding((image_size // 16) ** 2, hidden_size)

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B P D"]:
        return self.net(pixel_values).flatten(2).mT + self.position_embedding.weight


class SimVLM(Captioner):
    """Stem → Gemma under the prefix-LM mask."""

    image_type = PREFIX

    def __init__(self, decoder: GemmaForCausalLM, image_size: int):
        super().__init__(decoder)
        self.stem = ConvStem(decoder.config.hidden_size, image_size)

    def look(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B P D"]:
        return self.stem(pixel_values)

    def loss_weight(self, batch: dict[str, Tensor]) -> Tensor:
        rest = batch["attention_mask"] * (after(batch["prefix_lengths"], batch["attention_mask"]))
        return rest.sum()

    def forward(
        self,
        pixel_values: Float[Tensor, "I C H W"],
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        prefix_lengths: Int[Tensor, " B"],
    ) -> Float[Tensor, ""]:
        """The loss on what follows the prefix.

        Args:
            pixel_values: Of the first I rows. The others are text without an image, whose image columns are padding.
            prefix_lengths: How many tokens of each text belong to the prefix: 1, ``<bos>``, or more.
        """
        images, B = len(pixel_values), len(input_ids)
        vectors, text = self.look(pixel_values), self.decoder.model.embed(input_ids)
        P = vectors.shape[1]
        x = torch.cat((torch.cat((vectors, vectors.new_zeros(B - images, *vectors.shape[1:]))), text), dim=1)
        has_image = (torch.arange(B, device=x.device) < images).long()[:, None].expand(B, P)
        is_rest = after(prefix_lengths, attention_mask)
        hidden = self.decoder.model(
            x, torch.cat((has_image, attention_mask), dim=1), torch.cat((torch.zeros_like(has_image), is_rest), dim=1)
        )
        return next_token_loss(self.decoder, hidden[:, P:], input_ids, attention_mask * is_rest)


def after(lengths: Int[Tensor, " B"], like: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """1 from each row's length on, 0 before it."""
    return (torch.arange(like.shape[1], device=like.device) >= lengths[:, None]).long()
