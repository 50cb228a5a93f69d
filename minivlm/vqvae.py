"""Masks ↔ sixteen words: the VQ-VAE behind PaliGemma's `<seg…>` tokens.

    B masks · 64 × 64 values of a mask, as seen in its box · 16 codes = 4 × 4, row by row · 128 vectors of width 512

The encoder halves a mask four times, 64 → 4, and gives each of the 16 places a vector; the quantizer replaces each by
the nearest of the 128 vectors of its codebook, and that vector's number is the code; the decoder goes the way back.

Architecture and parameter names are those of the released weights, `vae-oid.npz`, so that they load here. Sources:
big_vision, pp/proj/paligemma/segmentation.py (encoder) and evaluators/proj/paligemma/transfers/segmentation.py
(decoder); the paper behind both, arXiv:2301.02229; VQ-VAE arXiv:1711.00937, with the moving averages of its appendix.
"""

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm import hub, locations
from minivlm.locations import CODES, Box, Detection

WIDTH = 512  # of a codebook vector
GRID = 4  # codes along each side of a mask
TRAINING_ONLY = ("_vq_vae._ema_cluster_size", "_vq_vae._ema_w")  # of a file; only the training that wrote it needs them


class ResidualBlock(nn.Module):
    """x + 1×1(ReLU(3×3(ReLU(3×3(x))))), all of one width."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return x + self.net(x)


class VectorQuantizer(nn.Module):
    """The codebook: 128 vectors, the nearest of which stands for any other."""

    def __init__(self):
        super().__init__()
        self.register_buffer("_embedding", torch.zeros(CODES, WIDTH))  # training moves it by averages, not by gradients

    def nearest(self, grid: Float[Tensor, "B D 4 4"]) -> Int[Tensor, "B 16"]:
        """argmin over the codebook of ‖v − e‖² = ‖v‖² − 2 v·e + ‖e‖², of which ‖v‖² changes nothing."""
        vectors = grid.flatten(2).mT  # [B, 16, D], row by row
        return (self._embedding.square().sum(1) - 2 * vectors @ self._embedding.T).argmin(2)


def code_grid(codes: Int[Tensor, "B 16"], codebook: Float[Tensor, "C D"]) -> Float[Tensor, "B D 4 4"]:
    """The vector of each code at its place: 16 codes fill the 4 × 4 grid row by row; the width in front, for a conv."""
    return codebook[codes].mT.unflatten(2, (GRID, GRID))


class MaskVQVAE(nn.Module):
    """Masks of 64×64 → 16 codes, and back."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 4, 2, padding=1), nn.ReLU()),  # 64 → 32
            *(nn.Conv2d(16, 32, 4, 2, padding=1), nn.ReLU()),  # → 16
            *(nn.Conv2d(32, 64, 4, 2, padding=1), nn.ReLU()),  # → 8
            *(nn.Conv2d(64, 128, 4, 2, padding=1), nn.ReLU()),  # → 4
            *(ResidualBlock(128), ResidualBlock(128)),
            nn.Conv2d(128, WIDTH, 1),
        )
        self._vq_vae = VectorQuantizer()
        self.decoder = nn.Sequential(
            *(nn.Conv2d(WIDTH, 128, 1), nn.ReLU()),
            *(ResidualBlock(128), ResidualBlock(128)),
            *(nn.ConvTranspose2d(128, 128, 4, 2, padding=1), nn.ReLU()),  # 4 → 8
            *(nn.ConvTranspose2d(128, 64, 4, 2, padding=1), nn.ReLU()),  # → 16
            *(nn.ConvTranspose2d(64, 32, 4, 2, padding=1), nn.ReLU()),  # → 32
            *(nn.ConvTranspose2d(32, 16, 4, 2, padding=1), nn.ReLU()),  # → 64
            nn.Conv2d(16, 1, 1),
        )

    def encode(self, masks: Float[Tensor, "B 64 64"]) -> Int[Tensor, "B 16"]:
        """Masks with values in [0, 1] → codes 0…127, row by row."""
        return self._vq_vae.nearest(self.encoder(2 * masks[:, None] - 1))

    def decode(self, codes: Int[Tensor, "B 16"]) -> Float[Tensor, "B 64 64"]:
        """Codes → masks with values in about [-1, 1]: above 0 is inside.

        Raises:
            ValueError: a code is not one of 0…127.
        """
        if codes.numel() and not (0 <= codes.min() and codes.max() < CODES):
            raise ValueError(f"Codes go from 0 to {CODES - 1}; these, from {int(codes.min())} to {int(codes.max())}.")
        return self.decoder(code_grid(codes, self._vq_vae._embedding))[:, 0]

    # --- masks of pictures ---

    @torch.no_grad()
    def codes_from_masks(self, masks: Sequence[Bool[np.ndarray, "H W"]], boxes: Sequence[Box]) -> list[tuple[int, ...]]:
        """Masks of a picture, each with its box in pixels → the 16 codes of each, as `Detection` holds them."""
        if not masks:
            return []
        cut = np.stack([locations.crop_mask(mask, box) for mask, box in zip(masks, boxes, strict=True)])
        return [tuple(codes) for codes in self.encode(torch.from_numpy(cut)).tolist()]

    @torch.no_grad()
    def masks_from_detections(
        self, detections: Sequence[Detection], width: int, height: int
    ) -> list[Bool[np.ndarray, "H W"] | None]:
        """What was detected in a picture of width × height pixels → the mask of each; None where it has no codes."""
        coded = [detection for detection in detections if detection.codes]
        if not coded:
            return [None] * len(detections)
        values = iter(self.decode(torch.tensor([detection.codes for detection in coded])).numpy())
        return [locations.paste_mask(next(values), d.box, width, height) if d.codes else None for d in detections]

    # --- files ---

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> "MaskVQVAE":
        """The weights in a `.npz` file, or in the one file `vae-*.npz` of a folder; the embedded ones without a path.

        Raises:
            FileNotFoundError: there is no such file; big_vision's is `vae-oid.npz`.
            ValueError: it is damaged, holds pickled objects, or its arrays are not those of this architecture.
        """
        path = find_file(Path(path or hub.EMBEDDED))
        model = cls()
        arrays = read_arrays(path)
        check_arrays(path, arrays, {name: tuple(value.shape) for name, value in model.state_dict().items()})
        model.load_state_dict({name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()})
        return model.eval()

    def save_pretrained(self, folder: str | Path, name: str = "vae-emoji.npz") -> None:
        """Writes `folder/name` in float16, half the size, with the names of big_vision's `vae-oid.npz`."""
        arrays = {key: value.cpu().numpy().astype(np.float16) for key, value in self.state_dict().items()}
        np.savez_compressed(Path(folder) / name, **arrays)


def find_file(path: Path) -> Path:
    """The file itself, or the `vae-*.npz` in a folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("vae-*.npz"))
    if len(found) > 1:
        raise ValueError(f"{path} holds {' and '.join(file.name for file in found)}: name the file you mean.")
    if not found:
        raise FileNotFoundError(
            f"{path} holds no mask VQ-VAE. That of Google's models is gs://big_vision/paligemma/vae-oid.npz: "
            "download it, and name the file, or put it into the checkpoint's folder."
        )
    return found[0]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a `.npz` file but those that only training needs. Nothing is ever unpickled.

    A `.npz` file is a zip of `.npy` files. Each is read to its end, where zip compares a checksum.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as file:
            for entry in file.namelist():
                name = entry.removesuffix(".npy")
                if name not in TRAINING_ONLY:
                    arrays[name] = np.lib.format.read_array(io.BytesIO(file.read(entry)), allow_pickle=False)
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is no whole .npz file of plain arrays ({error}): download it again.") from error
    return arrays


def check_arrays(path: Path, arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
    """Every name there, none besides, each of its shape and of floating type; or one ValueError that lists them all."""
    problems = [f"{name} is missing" for name in shapes if name not in arrays]
    problems += [f"{name} is not part of it" for name in arrays if name not in shapes]
    for name, shape in shapes.items():
        if name in arrays and arrays[name].shape != shape:
            problems.append(f"{name} is {arrays[name].shape}, not {shape}")
        elif name in arrays and not np.issubdtype(arrays[name].dtype, np.floating):
            problems.append(f"{name} holds {arrays[name].dtype}, not floating-point numbers")
    if problems:
        raise ValueError(f"{path} is not the mask VQ-VAE of PaliGemma: {'; '.join(problems)}.")
