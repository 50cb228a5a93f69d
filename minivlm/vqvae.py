"""Masks ↔ sixteen tokens: the VQ-VAE behind PaliGemma's ``<seg…>`` tokens.

    B masks · 64 × 64 values of a mask, relative to its box · 16 codes = 4 × 4, row by row · C = 128 vectors · D = 512

The encoder halves the resolution of a mask four times, 64 → 4, and produces one vector for each of the 16 cells. The
quantizer replaces each vector by the nearest one in its codebook of 128 vectors. The index of that one is the code. The
decoder turns codes into a mask again.

Architecture and parameter names are those of the released weights, ``vae-oid.npz``, so that they load here. Sources:
big_vision, pp/proj/paligemma/segmentation.py (encoder) and evaluators/proj/paligemma/transfers/segmentation.py
(decoder); the paper behind both, arXiv:2301.02229; VQ-VAE arXiv:1711.00937, with the moving averages of its appendix.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minivlm import checkpoint, hub, locations
from minivlm.locations import CODES, Box, Detection

CODE_DIM = 512  # size of a codebook vector
TRAINING_ONLY = ("_vq_vae._ema_cluster_size", "_vq_vae._ema_w")  # arrays of a file that only training needs


class ResidualBlock(nn.Module):
    """x + 1×1(ReLU(3×3(ReLU(3×3(x))))), with the same number of channels throughout."""

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        return x + self.net(x)


class VectorQuantizer(nn.Module):
    """The codebook: C vectors, the nearest of which replaces any other vector."""

    def __init__(self, codes: int = CODES, dim: int = CODE_DIM):
        super().__init__()
        self.register_buffer("_embedding", torch.zeros(codes, dim))  # trained by moving averages, not gradients

    def nearest(self, grid: Float[Tensor, "B D h w"]) -> Int[Tensor, "B h*w"]:
        """The code of each vector: argmin of ‖v − e‖² = ‖v‖² − 2 v·e + ‖e‖², where ‖v‖² is the same for every code."""
        vectors = grid.flatten(2).mT  # [B, h·w, D], row by row
        return (self._embedding.square().sum(1) - 2 * vectors @ self._embedding.T).argmin(2)


def code_grid(codes: Int[Tensor, "B n"], codebook: Float[Tensor, "C D"]) -> Float[Tensor, "B D s s"]:
    """The vector of each code. The codes fill a square grid row by row; channels come first, as a conv expects."""
    side = math.isqrt(codes.shape[1])
    return codebook[codes].mT.unflatten(2, (side, side))


class MaskVQVAE(nn.Module):
    """Encodes 64×64 masks as 16 codes each, and decodes them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 4, 2, padding=1), nn.ReLU()),  # 64 → 32
            *(nn.Conv2d(16, 32, 4, 2, padding=1), nn.ReLU()),  # → 16
            *(nn.Conv2d(32, 64, 4, 2, padding=1), nn.ReLU()),  # → 8
            *(nn.Conv2d(64, 128, 4, 2, padding=1), nn.ReLU()),  # → 4
            *(ResidualBlock(128), ResidualBlock(128)),
            nn.Conv2d(128, CODE_DIM, 1),
        )
        self._vq_vae = VectorQuantizer()
        self.decoder = nn.Sequential(
            *(nn.Conv2d(CODE_DIM, 128, 1), nn.ReLU()),
            *(ResidualBlock(128), ResidualBlock(128)),
            *(nn.ConvTranspose2d(128, 128, 4, 2, padding=1), nn.ReLU()),  # 4 → 8
            *(nn.ConvTranspose2d(128, 64, 4, 2, padding=1), nn.ReLU()),  # → 16
            *(nn.ConvTranspose2d(64, 32, 4, 2, padding=1), nn.ReLU()),  # → 32
            *(nn.ConvTranspose2d(32, 16, 4, 2, padding=1), nn.ReLU()),  # → 64
            nn.Conv2d(16, 1, 1),
        )

    def encode(self, masks: Float[Tensor, "B 64 64"]) -> Int[Tensor, "B 16"]:
        """Masks with values in [0, 1] → codes, row by row."""
        return self._vq_vae.nearest(self.encoder(2 * masks[:, None] - 1))

    def decode(self, codes: Int[Tensor, "B 16"]) -> Float[Tensor, "B 64 64"]:
        """Codes → masks with values in about [-1, 1], where above 0 is inside.

        Raises:
            ValueError: If a code is not in the codebook.
        """
        if codes.numel() and not (0 <= codes.min() and codes.max() < CODES):
            raise ValueError(f"Codes must be from 0 to {CODES - 1}, not from {int(codes.min())} to {int(codes.max())}.")
        return self.decoder(code_grid(codes, self._vq_vae._embedding))[:, 0]

    @torch.no_grad()
    def codes_from_masks(self, masks: Sequence[Bool[np.ndarray, "H W"]], boxes: Sequence[Box]) -> list[tuple[int, ...]]:
        """Masks of an image, each with its box in pixels → the 16 codes of each, as in ``Detection.codes``."""
        if not masks:
            return []
        crops = np.stack([locations.crop_mask(mask, box) for mask, box in zip(masks, boxes, strict=True)])
        return [tuple(codes) for codes in self.encode(torch.from_numpy(crops)).tolist()]

    @torch.no_grad()
    def masks_from_detections(
        self, detections: Sequence[Detection], width: int, height: int
    ) -> list[Bool[np.ndarray, "H W"] | None]:
        """Detections in an image of width × height pixels → the mask of each, or None if it has no codes."""
        codes = [detection.codes for detection in detections if detection.codes]
        if not codes:
            return [None] * len(detections)
        values = iter(self.decode(torch.tensor(codes)).numpy())
        return [locations.paste_mask(next(values), d.box, width, height) if d.codes else None for d in detections]

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> "MaskVQVAE":
        """Loads a ``.npz`` file, the one file ``vae-*.npz`` in a folder, or by default the embedded weights.

        Raises:
            FileNotFoundError: If there is no such file. big_vision's is ``vae-oid.npz``.
            ValueError: If the file is damaged, contains pickles or NaN, or does not fit this architecture.
        """
        path, model = find_npz(Path(path or hub.EMBEDDED)), cls()
        arrays = read_npz_arrays(path, {name: tuple(value.shape) for name, value in model.state_dict().items()})
        weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
        if fault := checkpoint.find_nonfinite(weights):
            raise ValueError(f"{path} cannot be used: {fault}")
        model.load_state_dict(weights)
        return model.eval()

    def save_pretrained(self, folder: str | Path, name: str = "vae-emoji.npz") -> None:
        """Saves ``folder/name`` in float16, half the size, with the names of big_vision's ``vae-oid.npz``."""
        weights = {key: value.cpu().half() for key, value in self.state_dict().items()}
        if fault := checkpoint.find_nonfinite(weights):
            raise ValueError(f"Nothing was saved: {fault}")
        content = io.BytesIO()
        np.savez_compressed(content, **{key: value.numpy() for key, value in weights.items()})
        with hub.write_atomically(Path(folder) / name) as part:
            part.write_bytes(content.getvalue())


def find_npz(path: Path) -> Path:
    """The file itself, or the ``vae-*.npz`` in a folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("vae-*.npz"))
    if len(found) > 1:
        raise ValueError(f"{path} contains {' and '.join(file.name for file in found)}: pass the path of one of them.")
    if not found:
        raise FileNotFoundError(
            f"There is no mask VQ-VAE at {path}. For Google's models, download "
            "gs://big_vision/paligemma/vae-oid.npz and pass its path, or put it into the checkpoint's folder. For a "
            "model of `minivlm train`, do the same with the vae-emoji.npz of its run."
        )
    return found[0]


def read_npz_arrays(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads the named arrays of a ``.npz`` file, a zip of ``.npy`` files. Nothing is unpickled.

    Names, shapes and dtypes are checked first, in the headers, so no file can take more memory than these arrays. Then
    each is read to its end, so that zip verifies its checksum. One ValueError lists everything that is wrong.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as file:
            entries = {entry.removesuffix(".npy"): entry for entry in file.namelist()}
            problems = [f"{name} is unexpected" for name in entries if name not in (*shapes, *TRAINING_ONLY)]
            problems += [f"{name} is missing" for name in shapes if name not in entries]
            for name in (name for name in shapes if name in entries):
                with file.open(entries[name]) as stream:
                    if np.lib.format.read_magic(stream) != (1, 0):  # later versions are for headers above 64 KB
                        raise ValueError(f"{name} has a header of another version than 1.0")
                    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
                if shape != shapes[name]:
                    problems.append(f"{name} has shape {shape} instead of {shapes[name]}")
                elif not np.issubdtype(dtype, np.floating):
                    problems.append(f"{name} has dtype {dtype}, which is not floating point")
            for name in () if problems else shapes:
                with file.open(entries[name]) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
                    if stream.read(1):
                        raise ValueError(f"{name} is longer than its header says")
    except Exception as error:  # zipfile, zlib and numpy's parser of headers raise errors of their own
        fault = f"{path} is not a complete .npz file of plain arrays ({hub.printable(error)})"
        raise ValueError(f"{fault}: {hub.remedy(path)}.") from error
    if problems:
        raise ValueError(f"{path} is not PaliGemma's mask VQ-VAE: {hub.abbreviate(problems, '; ')}.")
    return arrays
