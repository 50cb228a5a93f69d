"""What PaliGemma and its mask VQ-VAE are trained on: modules that return a loss for a batch.

    I images · E rows of text per image · B = I · E rows · P patches · M names of L tokens · T tokens · D hidden size
    O objects of a batch · C codes · N vectors

Sources: sigmoid loss arXiv:2303.15343; the VQ-VAE's losses and moving averages arXiv:1711.00937, equation 3 and
appendix A.1; soft IoU Rahman and Wang 2016, doi:10.1007/978-3-319-50835-1_22.
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm import losses
from minivlm.locations import CODES
from minivlm.paligemma import PaliGemma
from minivlm.processor import IGNORE_INDEX
from minivlm.vqvae import CODE_DIM, MaskVQVAE, code_grid


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


class MaskVQVAEObjective(Objective):
    """The losses of the mask VQ-VAE. A code's vector is the moving average of the encoder's vectors with that code."""

    decay = 0.99  # of the averages, per step
    commitment = 0.25  # weight of the encoder's distance to the codebook

    def __init__(self):
        super().__init__()
        self.vae = MaskVQVAE()
        self.register_buffer("sizes", torch.zeros(CODES))  # vectors per step with a code, on average
        self.register_buffer("sums", torch.zeros(CODES, CODE_DIM))  # of those vectors

    def loss_weight(self, batch: dict[str, Tensor]) -> int:
        return len(batch["masks"])

    def forward(self, masks: Float[Tensor, "O 64 64"]) -> Float[Tensor, ""]:
        vectors = self.vae.encoder(2 * masks[:, None] - 1).float()  # [O, D, 4, 4]
        codes = self.vae._vq_vae.nearest(vectors.detach())
        nearest = code_grid(codes, self.vae._vq_vae._embedding)
        # Straight-through: the decoder gets codebook vectors, the encoder gets their gradient as if it had made them.
        decoded = self.vae.decoder(vectors + (nearest - vectors).detach())[:, 0].float()
        self.update_codebook(vectors.detach().flatten(2).mT.flatten(0, 1), codes.flatten())
        return F.mse_loss(decoded, 2 * masks - 1) + self.commitment * F.mse_loss(vectors, nearest)

    @torch.no_grad()
    def update_codebook(self, vectors: Float[Tensor, "N D"], codes: Int[Tensor, " N"]) -> None:
        """Update the averages. An idle code moves beside a busy one, and each gets half of the vectors."""
        assigned = F.one_hot(codes, CODES).to(vectors)
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


class AlignmentObjective(Objective):
    """Scores every patch against every name with the sigmoid loss: true if the patch shows what the name says.

    The text encoder is a bag of words, the mean of the decoder's own embeddings, so what a patch learns to say is the
    token that the decoder will write.
    """

    trained = (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.model.embed_tokens",
        "log_temperature",
        "bias",
    )

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def embed_names(self, name_ids: Int[Tensor, "M L"]) -> Float[Tensor, "M D"]:
        """The mean embedding of each row's tokens, without padding (id 0)."""
        embeddings = self.model.language_model.model.embed(name_ids)
        is_token = (name_ids != 0)[..., None]
        return (embeddings * is_token).sum(1) / is_token.sum(1)

    def forward(
        self, pixel_values: Float[Tensor, "I 3 H W"], name_ids: Int[Tensor, "M L"], shows: Bool[Tensor, "I P M"]
    ) -> Float[Tensor, ""]:
        patches, names = self.model.encode_image(pixel_values).flatten(0, 1), self.embed_names(name_ids)
        with torch.autocast(patches.device.type, enabled=False):  # the scores in float32
            return losses.sigmoid_loss(patches, names, self.log_temperature, self.bias, shows.flatten(0, 1))


class PoseObjective(Objective):
    """Teaches each patch how the object that it shows is tilted and mirrored, read off by a small MLP.

    The decoder already understands the image features, so these must hardly change.
    """

    trained = ("model.vision_tower", "model.multi_modal_projector", "reader")
    change_weight = 0.005  # of the squared change of the features

    def __init__(self, model: PaliGemma):
        super().__init__()
        self.model = model
        self.before = copy.deepcopy(nn.Sequential(model.vision_tower, model.multi_modal_projector))
        self.before.requires_grad_(False)
        hidden_size = model.config.text_config.hidden_size
        self.reader = nn.Sequential(nn.Linear(hidden_size, 512), nn.GELU(), nn.Linear(512, 2))

    def prepare(self) -> None:
        """Remember the features as they are now, too."""
        super().prepare()
        now = nn.Sequential(self.model.vision_tower, self.model.multi_modal_projector)
        self.before.load_state_dict(now.state_dict())

    def forward(
        self, pixel_values: Float[Tensor, "I 3 H W"], owners: Int[Tensor, "I P"], poses: Float[Tensor, "O 2"]
    ) -> Float[Tensor, ""]:
        """Squared error of the angle plus cross-entropy of the mirroring, a mean over all patches.

        Args:
            owners: Which object each patch shows, -1 for none.
            poses: (angle as a fraction of the largest, mirrored or not) of each object.
        """
        features = self.model.encode_image(pixel_values)
        shows = owners >= 0
        (angle, mirrored), pose = self.reader(features[shows]).float().unbind(1), poses[owners[shows]]
        error = F.mse_loss(angle, pose[:, 0]) + F.binary_cross_entropy_with_logits(mirrored, pose[:, 1])
        change = F.mse_loss(features.float(), self.before(pixel_values).float())
        return error * shows.float().mean() + self.change_weight * change


class SuffixObjective(Objective):
    """Cross-entropy of the suffix. Short and long rows go through the decoder apart, to save padding."""

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


class MaskDecoderObjective(Objective):
    """The decoder of the mask VQ-VAE alone. Encoder and codebook stay, and so does the meaning of a code."""

    trained = ("vae.decoder",)
    steepness = 5.0  # of the sigmoid that turns decoded values, about -1 to 1, into the probability of inside
    squared_error_weight = 0.2  # keeps the values near -1 and 1
    true_codes_weight = 0.3  # of the codes of true masks, relative to those that a model wrote

    def __init__(self):
        super().__init__()
        self.vae = MaskVQVAE()

    def loss_weight(self, batch: dict[str, Tensor]) -> int:
        return len(batch["masks"])

    def forward(
        self, codes: Int[Tensor, "O 16"], masks: Float[Tensor, "O 64 64"], written: Bool[Tensor, " O"]
    ) -> Float[Tensor, ""]:
        """1 - soft IoU (intersection over union of probabilities) plus a little squared error, a mean over all masks.

        Args:
            written: Whether a model wrote the codes; if not, they are those of the true mask.
        """
        decoded = self.vae.decode(codes).float()
        inside = torch.sigmoid(self.steepness * decoded)
        intersection = (inside * masks).sum((1, 2))
        union = (inside + masks).sum((1, 2)) - intersection
        squared_error = (decoded - (2 * masks - 1)).square().mean((1, 2))
        loss = 1 - intersection / union + self.squared_error_weight * squared_error
        return (loss * torch.where(written, 1.0, self.true_codes_weight)).mean()
