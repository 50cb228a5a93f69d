"""ClipCap: one image vector becomes k prefix vectors for a language model.

    B rows · P patches · E hidden size of the tower · D of the decoder · k prefix vectors · c vectors of the image

    p_1 … p_k = F(x)          and then text as always:   Σ log p(t_i | p_1 … p_k, t_1 … t_{i-1})

x is a single vector, CLIP's of the whole image. Ours is the mean of the tower's patch vectors. The paper has two forms:

- ``MLPMapper``, and the language model is tuned with it;
- ``TransformerMapper``, and the language model stays frozen. Learned constants attend to the image vector, and what
  they become is the prefix.

The tower is frozen in both. Sources: "ClipCap" (arXiv:2111.09734), section 3; its code, rmokady/CLIP_prefix_caption
``train.py``: k = 10 with the MLP, 40 with the transformer of 8 layers and 8 heads; the transformer there gets c vectors
projected from the image, where the paper writes of one.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minivlm.config import SiglipVisionConfig
from minivlm.families.base import Captioner
from minivlm.gemma import GemmaForCausalLM
from minivlm.siglip import SiglipEncoder, SiglipVisionModel


class MLPMapper(nn.Module):
    """E → k·D / 2 → tanh → k·D, cut into k vectors."""

    def __init__(self, image_dim: int, text_dim: int, prefix_length: int):
        super().__init__()
        self.prefix_length, middle = prefix_length, prefix_length * text_dim // 2
        self.net = nn.Sequential(nn.Linear(image_dim, middle), nn.Tanh(), nn.Linear(middle, prefix_length * text_dim))

    def forward(self, image: Float[Tensor, "B E"]) -> Float[Tensor, "B k D"]:
        return self.net(image).unflatten(1, (self.prefix_length, -1))


class TransformerMapper(nn.Module):
    """The image as c vectors, and k learned constants after them, through a transformer: the constants' results."""

    def __init__(self, image_dim: int, config: SiglipVisionConfig, prefix_length: int, image_length: int = 4):
        super().__init__()
        self.image_length, D = image_length, config.hidden_size
        self.linear = nn.Linear(image_dim, image_length * D)
        self.constants = nn.Parameter(torch.randn(prefix_length, D) * D**-0.5)
        self.encoder = SiglipEncoder(config)

    def forward(self, image: Float[Tensor, "B E"]) -> Float[Tensor, "B k D"]:
        image = self.linear(image).unflatten(1, (self.image_length, -1))
        constants = self.constants.expand(len(image), -1, -1)
        return self.encoder(torch.cat((image, constants), dim=1))[:, self.image_length :]


class ClipCap(Captioner):
    """Frozen tower → mean patch → mapper → prefix of the decoder.

    Args:
        frozen: Keep the language model as it is, and map with a transformer; otherwise tune it, and map with an MLP.
        prefix_length: k.
        layers: Of the transformer.
    """

    def __init__(
        self,
        decoder: GemmaForCausalLM,
        tower: SiglipVisionModel,
        frozen: bool = True,
        prefix_length: int = 10,
        layers: int = 2,
    ):
        super().__init__(decoder, tower)
        E, D = tower.config.hidden_size, decoder.config.hidden_size
        if frozen:
            config = replace(tower.config, hidden_size=D, num_hidden_layers=layers)
            self.mapper = TransformerMapper(E, config, prefix_length)
        else:
            self.mapper = MLPMapper(E, D, prefix_length)
        self.trained = ("mapper",) if frozen else ("mapper", "decoder")

    def look(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B k D"]:
        return self.mapper(self.see(pixel_values).mean(1))
