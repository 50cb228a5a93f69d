"""What PaliGemma and its mask VQ-VAE are trained on: modules that return a loss for a batch.

    I images · E rows of text per image · B = I · E rows · P patches · M names of L tokens · T tokens · D hidden size
    O objects of a batch · C codes · N vectors · L tokens of packed texts · S = P + L

Sources: sigmoid loss arXiv:2303.15343; the VQ-VAE's losses and moving averages arXiv:1711.00937, equation 3 and
appendix A.1.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm import losses
from minivlm.paligemma import PaliGemma
from minivlm.processor import IGNORE_INDEX
from minivlm.vqvae import MaskVQVAE, code_grid


class Objective(nn.Module):
    """A loss, and which parameters learn from it. Training happens between ``prepare`` and ``finish``."""

    trained: tuple[str, ...] = ("",)  # what the names of those parameters start with

    def loss_weight(self, batch: dict[str, Tensor]) -> float | Tensor:
        """How many items the loss of a batch is the mean over. The default makes all processes contribute equally."""
        return 1.0

    def prepare(self) -> None:
        """Freeze the parameters that are not trained."""
        named = self.named_parameters()
        self.frozen = [p for name, p in named if p.requires_grad and not name.startswith(self.trained)]
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def finish(self) -> None:
        """Unfreeze them."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)


class VQVAEObjective(Objective):
    """What the losses of a VQ-VAE share. A code's vector is the moving average of the encoder's vectors with that code.

    Args:
        vae: With ``encoder``, ``decoder`` and a codebook ``_vq_vae``.
    """

    decay = 0.99  # of the averages, per step
    commitment = 0.25  # weight of the encoder's distance to the codebook

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae
        codebook = vae._vq_vae._embedding
        self.register_buffer("sizes", torch.zeros(len(codebook)))  # vectors per step with a code, on average
        self.register_buffer("sums", torch.zeros_like(codebook))  # of those vectors

    def quantize(self, inputs: Float[Tensor, "B c H W"]) -> tuple[Tensor, Tensor, Tensor]:
        """The encoder's vectors [B, D, h, w], the nearest of the codebook, and their codes [B, h·w]."""
        vectors = self.vae.encoder(inputs).float()
        codes = self.vae._vq_vae.nearest(vectors.detach())
        return vectors, code_grid(codes, self.vae._vq_vae._embedding), codes

    def finish_step(
        self, vectors: Float[Tensor, "B D h w"], nearest: Float[Tensor, "B D h w"], codes: Int[Tensor, "B n"]
    ) -> Float[Tensor, ""]:
        """The commitment loss. Updates the codebook."""
        self.update_codebook(vectors.detach().flatten(2).mT.flatten(0, 1), codes.flatten())
        return self.commitment * F.mse_loss(vectors, nearest)

    @torch.no_grad()
    def update_codebook(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, " N"]) -> None:
        """Update the averages. An idle code moves beside a busy one, and each gets half of the vectors."""
        assigned = F.one_hot(codes, len(self.sizes)).to(vectors)
        new = torch.cat([assigned.sum(0)[:, None], assigned.T @ vectors], dim=1)
        if dist.is_initialized():
            dist.all_reduce(new)
        self.sizes.lerp_(new[:, 0], 1 - self.decay)
        self.sums.lerp_(new[:, 1:], 1 - self.decay)
        idle = (self.sizes < 1).nonzero()[:, 0]
        busy = self.sizes.topk(len(idle)).indices
        idle, busy = (some[self.sizes[busy] > 4] for some in (idle, busy))
        for average in (self.sizes, self.sums):
            average[busy] /= 2
            average[idle] = average[busy]
        self.sums[idle] *= 1.01  # if both had the same vector, the second would never be the nearest
        self.vae._vq_vae._embedding.copy_(self.sums / self.sizes.clamp_min(1e-5)[:, None])


class MaskVQVAEObjective(VQVAEObjective):
    """The losses of the mask VQ-VAE.

    The language model will write some codes wrong, so the decoder also learns to draw a mask of which some were
    misread: from a codebook vector that another mask has in the same cell.
    """

    def __init__(self):
        super().__init__(MaskVQVAE())

    def loss_weight(self, batch: dict[str, Tensor]) -> int:
        return len(batch["masks"])

    def forward(self, masks: Float[Tensor, "O 64 64"], misread: Bool[Tensor, "O 16"]) -> Float[Tensor, ""]:
        vectors, nearest, codes = self.quantize(2 * masks[:, None] - 1)
        # Straight-through: the decoder gets codebook vectors, the encoder gets their gradient as if it had made them.
        read = vectors + (nearest - vectors).detach()
        wrong = misread.unflatten(1, nearest.shape[2:])[:, None]
        decoded = self.vae.decoder(torch.where(wrong, nearest.roll(1, dims=0), read))[:, 0].float()
        return F.mse_loss(decoded, 2 * masks - 1) + self.finish_step(vectors, nearest, codes)


class AlignmentObjective(Objective):
    """Teaches each patch what it shows, and where and how.

    What: every patch is scored against every name with the sigmoid loss: true if the patch shows what the name says.
    The text encoder is a bag of words, the mean of the decoder's own embeddings, so what a patch learns to say is the
    token that the decoder will write. Where and how: a linear layer reads the box of the object from the patch, its
    tilt, and whether it is mirrored. That layer is thrown away; what it can read, the decoder can read too.
    """

    box_weight = 4.0  # of the absolute error of the box, as a fraction of the image's side
    pose_weight = 0.25  # of the squared error of the tilt plus the cross-entropy of the mirroring

    trained = (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.model.embed_tokens",
        "reader",
        "log_temperature",
        "bias",
    )

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model
        self.reader = nn.Linear(model.config.text_config.hidden_size, 6)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def embed_names(self, name_ids: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """The mean embedding of each row's tokens, without padding (id 0)."""
        embeddings = self.model.language_model.model.embed(name_ids)
        is_token = (name_ids != 0)[..., None]
        return (embeddings * is_token).sum(1) / is_token.sum(1)

    def forward(
        self,
        pixel_values: Float[Tensor, "I 3 H W"],
        name_ids: Int[Tensor, "M L"],
        shows: Bool[Tensor, "I P M"],
        owners: Int[Tensor, "I P"],
        poses: Float[Tensor, "O 6"],
    ) -> Float[Tensor, ""]:
        """The sigmoid loss plus the errors of what is read, a mean over all patches; 0 where a patch shows nothing.

        Args:
            owners: Which object each patch shows most of, -1 for none.
            poses: (x0, y0, x1, y1 as fractions of the image's side, angle as a fraction of the largest, mirrored or
                not) of each object.
        """
        patches, names = self.model.encode_image(pixel_values), self.embed_names(name_ids)
        owned = owners >= 0
        read, pose = self.reader(patches[owned]).float(), poses[owners[owned]]
        error = self.box_weight * F.l1_loss(read[:, :4], pose[:, :4])
        mirroring = F.binary_cross_entropy_with_logits(read[:, 5], pose[:, 5])
        error = error + self.pose_weight * (F.mse_loss(read[:, 4], pose[:, 4]) + mirroring)
        with torch.autocast(patches.device.type, enabled=False):  # the scores in float32
            scores = patches.flatten(0, 1), names, self.log_temperature, self.bias, shows.flatten(0, 1)
            return losses.sigmoid_loss(*scores) + error * owned.float().mean()


class SuffixObjective(Objective):
    """Cross-entropy of the suffix, as PaliGemma runs: each row has its own copy of the image tokens.

    Short and long rows go through the decoder apart, to save padding.
    """

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model

    def loss_weight(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    def forward(
        self, pixel_values: Float[Tensor, "I 3 H W"], labels: Int[Tensor, "B T"], **text: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""]:
        features = self.model.encode_image(pixel_values).repeat_interleave(len(labels) // len(pixel_values), dim=0)
        lengths = text["attention_mask"].sum(1)  # padding is on the right
        loss, tokens = 0.0, (labels[:, 1:] != IGNORE_INDEX).sum()
        for rows in lengths.argsort(stable=True).chunk(2):
            end = int(lengths[rows].max())
            inputs = {name: ids[rows, :end] for name, ids in text.items()}
            part = labels[rows, :end]
            share = (part[:, 1:] != IGNORE_INDEX).sum() / tokens
            loss = loss + share * self.model.loss(part, image_features=features[rows], **inputs)
        return loss


class PackedSuffixObjective(SuffixObjective):
    """The same loss, with the texts about an image packed behind one copy of its tokens.

    That is half the work or less, since most tokens of a row are image tokens. The price is one difference: here image
    tokens attend to image tokens only, since they cannot belong to several prompts at once.
    """

    def forward(
        self,
        pixel_values: Float[Tensor, "I 3 H W"],
        labels: Int[Tensor, "B T"],
        input_ids: Int[Tensor, "B T"],
        attention_mask: Int[Tensor, "B T"],
        token_type_ids: Int[Tensor, "B T"],
    ) -> Float[Tensor, ""]:
        decoder, features = self.model.language_model, self.model.encode_image(pixel_values)
        images, P = features.shape[:2]
        (B, T), E = labels.shape, len(labels) // images
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # of each token, the next one
        example = torch.arange(B, device=labels.device)[:, None].expand(B, T) % E
        positions = torch.arange(T, device=labels.device).expand(B, T)
        # The texts of an image one after the other, without their image tokens, then all the padding.
        columns = input_ids, targets, example, positions, token_type_ids, attention_mask
        columns = torch.stack([column[:, P:].reshape(images, -1) for column in columns])
        kept = columns[-1].argsort(dim=1, descending=True, stable=True)[:, : int(columns[-1].sum(1).max())]
        ids, targets, example, positions, is_suffix, is_token = columns.gather(2, kept.expand(len(columns), -1, -1))
        x = decoder.model.embed(ids)
        x = torch.cat((features.to(x.dtype), x), dim=1)
        hidden = decoder.model.run_layers(
            x,
            torch.cat((torch.arange(P, device=x.device).expand(images, P), positions), dim=1),
            *[packed_mask(P, example.masked_fill(is_token == 0, -1), positions, is_suffix)] * 2,
            cache=None,
        )
        is_target = targets != IGNORE_INDEX
        return F.cross_entropy(decoder.logits(hidden[:, P:][is_target]).float(), targets[is_target])


def packed_mask(
    image_tokens: int, example: Int[Tensor, "I L"], positions: Int[Tensor, "I L"], is_suffix: Int[Tensor, "I L"]
) -> Bool[Tensor, "I S S"]:
    """Who attends to whom among the image tokens and the L text tokens of packed examples: True where attention is on.

    All attend to the image. Text attends to the prefix of its own example and, if it is suffix, to what precedes it
    there. Padding, example -1, is an example of its own.
    """
    images, L = example.shape
    same = example[:, :, None] == example[:, None, :]
    seen = (is_suffix[:, None, :] == 0) | (positions[:, None, :] <= positions[:, :, None])
    mask = torch.zeros(images, image_tokens + L, image_tokens + L, dtype=torch.bool, device=example.device)
    mask[:, :, :image_tokens] = True
    mask[:, image_tokens:, image_tokens:] = same & seen
    return mask
