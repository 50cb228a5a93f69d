"""VisualBERT: words and image regions as one sequence in a bidirectional transformer, trained to fill in blanks.

    B rows · T tokens of text · P regions (patches) · D hidden size · E size of a region's features · N heads
    V vocabulary size · M masked tokens

    a word's vector = word + position + segment        a region's = projection of its features + position + segment

Layer normalization, then post-norm transformer layers in which everything attends to everything. Two objectives:
*masked language modeling with the image* (15% of the words are hidden, regions never are) and *sentence-image
prediction*: of two captions, the second belongs to another image half of the time, and the first token says whether.
There is no way to write: a word is only ever predicted with what follows it in view.

The regions are the frozen tower's patches. As in the paper, whose detector gives no order, all regions share one
position; where they are is in their features. The paper starts from BERT; ours from nothing, since the scenes' language
is small. Sources: "VisualBERT" (arXiv:1908.03557), section 3; uclanlp/visualbert, ``modeling.py``; parameter names as
in transformers ``models/visual_bert/modeling_visual_bert.py``, so that the same weights run in both.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm.processor import IGNORE_INDEX
from minivlm.siglip import LayerNorm, SiglipVisionModel, split_heads
from minivlm.training.objectives import Objective

WORDS, REGIONS = 0, 1  # segments


@dataclass(frozen=True)
class VisualBertConfig:
    """Sizes, under the hub's names."""

    vocab_size: int
    visual_embedding_dim: int
    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 64
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class Embeddings(nn.Module):
    def __init__(self, config: VisualBertConfig):
        super().__init__()
        D, types = config.hidden_size, config.type_vocab_size
        self.word_embeddings = nn.Embedding(config.vocab_size, D)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.token_type_embeddings = nn.Embedding(types, D)
        self.visual_position_embeddings = nn.Embedding(config.max_position_embeddings, D)
        self.visual_token_type_embeddings = nn.Embedding(types, D)
        self.visual_projection = nn.Linear(config.visual_embedding_dim, D)
        self.LayerNorm = LayerNorm(D, eps=config.layer_norm_eps)

    def forward(self, input_ids: Int[Tensor, "B T"], regions: Float[Tensor, "B P E"]) -> Float[Tensor, "B T+P D"]:
        words = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[WORDS]
        words = words + self.position_embeddings.weight[: input_ids.shape[1]]
        image = self.visual_projection(regions) + self.visual_token_type_embeddings.weight[REGIONS]
        image = image + self.visual_position_embeddings.weight[0]
        return self.LayerNorm(torch.cat((words, image), dim=1))


def dense_and_norm(inputs: int, outputs: int, eps: float) -> nn.ModuleDict:
    """The end of a sublayer: a linear layer, and the norm of its result plus the residual."""
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs), "LayerNorm": LayerNorm(outputs, eps=eps)})


class Layer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)): post-norm, unlike SigLIP and Gemma."""

    def __init__(self, config: VisualBertConfig):
        super().__init__()
        D, F_, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.num_heads = config.num_attention_heads
        projections = nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": dense_and_norm(D, D, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, F_)})
        self.output = dense_and_norm(F_, D, eps)

    def forward(self, x: Float[Tensor, "B S D"], mask: Bool[Tensor, "B 1 1 S"]) -> Float[Tensor, "B S D"]:
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in self.attention["self"].values())
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        output = self.attention["output"]
        x = output["LayerNorm"](x + output["dense"](attended))
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


class VisualBert(nn.Module):
    """The transformer with both of its heads: logits for every word, and for "belongs" and "does not"."""

    def __init__(self, config: VisualBertConfig):
        super().__init__()
        self.config, D = config, config.hidden_size
        self.visual_bert = nn.ModuleDict(
            {
                "embeddings": Embeddings(config),
                "encoder": nn.ModuleDict(
                    {"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))}
                ),
                "pooler": nn.ModuleDict({"dense": nn.Linear(D, D)}),
            }
        )
        self.cls = nn.ModuleDict(
            {
                "predictions": nn.ModuleDict({"transform": dense_and_norm(D, D, config.layer_norm_eps)}),
                "seq_relationship": nn.Linear(D, 2),
            }
        )
        self.cls["predictions"].register_parameter("bias", nn.Parameter(torch.zeros(config.vocab_size)))

    def hidden_states(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"], regions: Float[Tensor, "B P E"]
    ) -> Float[Tensor, "B T+P D"]:
        x = self.visual_bert["embeddings"](input_ids, regions)
        mask = torch.cat((attention_mask.bool(), attention_mask.new_ones(regions.shape[:2]).bool()), dim=1)
        for layer in self.visual_bert["encoder"]["layer"]:
            x = layer(x, mask[:, None, None])
        return x

    def word_logits(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """The output head reuses the table of word embeddings."""
        head = self.cls["predictions"]
        x = head["transform"]["LayerNorm"](F.gelu(head["transform"]["dense"](hidden)))
        return F.linear(x, self.visual_bert["embeddings"].word_embeddings.weight, head.bias)

    def match_logits(self, hidden: Float[Tensor, "B S D"]) -> Float[Tensor, "B 2"]:
        """From the first token: 0 says that both captions belong to the image, 1 that the second does not."""
        return self.cls["seq_relationship"](self.visual_bert["pooler"]["dense"](hidden[:, 0]).tanh())


class VisualBertObjective(Objective):
    """Both objectives, added up. The tower is frozen."""

    trained = ("model",)

    def __init__(self, model: VisualBert, tower: SiglipVisionModel):
        super().__init__()
        self.model, self.tower = model, tower

    def forward(
        self,
        pixel_values: Float[Tensor, "B C H W"],
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        is_other: Int[Tensor, " B"],
    ) -> Float[Tensor, ""]:
        """The loss.

        Args:
            input_ids: With words masked.
            labels: The words at masked places, -100 elsewhere.
            is_other: 1 where the second caption belongs to another image.
        """
        with torch.no_grad():
            regions = self.tower(pixel_values)
        hidden = self.model.hidden_states(input_ids, attention_mask, regions)
        is_target = labels != IGNORE_INDEX
        words = self.model.word_logits(hidden[:, : input_ids.shape[1]][is_target])
        matching = F.cross_entropy(self.model.match_logits(hidden).float(), is_other)
        return F.cross_entropy(words.float(), labels[is_target]) + matching


@torch.no_grad()
def fill_blanks(
    model: VisualBert, regions: Float[Tensor, "B P E"], input_ids: Int[Tensor, "B T"], mask_id: int
) -> Int[Tensor, "B T"]:
    """The most likely word in every blank, each as if it were the only one that is decided."""
    hidden = model.hidden_states(input_ids, torch.ones_like(input_ids), regions)[:, : input_ids.shape[1]]
    return torch.where(input_ids == mask_id, model.word_logits(hidden)[..., :mask_id].argmax(-1), input_ids)
