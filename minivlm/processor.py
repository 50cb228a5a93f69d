"""Images and prompts → tensors: what PaliGemma sees of the world.

A picture becomes a square of numbers in [-1, 1]; a prompt becomes token ids, with one `<image>` token for every patch
of the picture in front of it:

    <image> <image> … <image> <bos> caption en \\n        a cat <eos>
    └───── P of them ───────┘ └─── prefix ──────┘        └─ suffix ─┘

Sources: big_vision (configs/proj/paligemma) for the layout; transformers 5.23, whose batches this file reproduces:
ids exactly (models/paligemma/processing_paligemma.py), pixels to 1e-6 (models/siglip/image_processing_pil_siglip.py).

Letters: B batch, T tokens of a sequence, P patches = image tokens, H height, W width, V vocabulary.
"""

import json
import os.path
import struct
import warnings
from collections.abc import Sequence
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor

from minivlm import hub
from minivlm.tokenizer import BOS, EOS, IMAGE, MASK, PAD, UNK, add_paligemma_tokens, read_tokenizer, token_id

BICUBIC = Image.Resampling.BICUBIC
BROKEN_EXIF = (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, OSError, EOFError, struct.error)
IGNORE_INDEX = -100  # the label that torch's cross entropy skips


# --- a picture, step by step ---------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Image.Image:
    """Read a picture file: an upright RGB PIL image, 8 bits a channel.

    Raises ValueError where there is no such file, or it is no picture, cut short, empty, or larger than PIL's limit
    against decompression bombs (`Image.MAX_IMAGE_PIXELS`).
    """
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have
        raise ValueError(f"There is no picture file at {str(path)!r}; check the path.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # PIL only warns up to twice its limit
        try:
            with Image.open(path) as image:
                return to_rgb(image)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"The picture {str(path)!r} is too large to open safely: {error}") from error
        except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error, EOFError and more
            raise ValueError(f"The file {str(path)!r} cannot be read as a picture: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image → RGB, 8 bits a channel, upright.

    Turned as its EXIF tag says; 16-bit gray scaled to 8 bits; transparency laid over white, as transformers 5.23 does
    (image_transforms.convert_to_rgb). Raises ValueError for an empty or unreadable image, and for the modes F and I
    where the range of the values is unknown.
    """
    if min(image.size) == 0:
        raise ValueError(
            f"The picture is empty ({image.width}×{image.height} pixels); give one with at least one pixel."
        )
    try:
        image.load()  # PIL reads lazily: a file cut short shows only here
    except Exception as error:
        raise ValueError(f"The picture cannot be read to its end: {error}") from error
    image = gray16_to_grey8(upright(image))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turn or mirror the image as the camera's EXIF orientation tag asks; without a readable tag, leave it."""
    try:
        return ImageOps.exif_transpose(image)
    except BROKEN_EXIF:  # says nothing about the pixels, which are fine
        return image


def gray16_to_grey8(image: Image.Image) -> Image.Image:
    """16-bit gray (modes I;16 and I) → 8-bit: 65535 becomes 255. PIL's own conversion clips all above 255 to white."""
    if image.mode == "F":
        raise ValueError("The picture holds floats (mode F), whose range is unknown; convert it to 8 bits first.")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("The picture holds 32-bit values beyond 0…65535; scale it to 8 bits first.")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def resize(image: Image.Image, size: int, resample: int = BICUBIC) -> UInt8[np.ndarray, "H W 3"]:
    """Squash an RGB image to size × size, whatever its shape: the model sees the whole picture, not its proportions."""
    if image.size != (size, size):
        image = image.resize((size, size), resample)
    return np.asarray(image)


def rescale(pixels: UInt8[Tensor, "*B H W 3"]) -> Float[Tensor, "*B H W 3"]:
    """0…255 → 0…1, float32."""
    return pixels.to(torch.float32) / 255


def normalize(
    pixels: Float[Tensor, "*B H W 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*B H W 3"]:
    """(x − mean) / std in each channel; with 0.5 and 0.5, [0, 1] becomes [-1, 1]."""
    return (pixels - torch.tensor(mean)) / torch.tensor(std)


def channels_first(pixels: Float[Tensor, "*B H W 3"]) -> Float[Tensor, "*B 3 H W"]:
    """The color axis moves from last, where files have it, to first, where torch's convolutions want it."""
    return pixels.movedim(-1, -3).contiguous()


# --- a prompt, step by step ----------------------------------------------------------------------------------------


def build_prompt(prefix: str, bos_token: str = BOS, image_token: str = IMAGE, num_image_tokens: int = 256) -> str:
    """`<image>`×P + `<bos>` + prefix + newline. The newline tells the model that the question ends here."""
    return image_token * num_image_tokens + bos_token + prefix + "\n"


def build_suffix(suffix: str, eos_token: str = EOS) -> str:
    """The answer to learn, and the token that ends it."""
    return suffix + eos_token


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Int64[np.ndarray, "B T"]:
    """Rows of different lengths → one array, filled with `value` on the given side, "left" or "right"."""
    longest = max(map(len, rows))
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        start = 0 if side == "right" else longest - len(row)
        line[start : start + len(row)] = row
    return padded


def assemble(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int, side: str
) -> tuple[Int64[np.ndarray, "B T"], Int64[np.ndarray, "B T"], Int64[np.ndarray, "B T"], Int64[np.ndarray, "B T"]]:
    """Ids of prompts and answers, row by row → input_ids, attention_mask, token_type_ids and labels.

    attention_mask: 1 on tokens, 0 on padding. token_type_ids: 1 on the answer, 0 elsewhere. labels: the answer's own
    ids, -100 elsewhere; the loss does the shift by one.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    types = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids, types = pad(rows, pad_id, side), pad(types, 0, side)
    return ids, pad([[1] * len(row) for row in rows], 0, side), types, np.where(types == 1, ids, IGNORE_INDEX)


# --- both together -------------------------------------------------------------------------------------------------


class Processor:
    """A tokenizer, and how pictures are prepared for one model.

    `image_size` is the side of the square in pixels; `num_image_tokens` is P, the number of patches the tower makes of
    it. `<loc…>`, `<seg…>` and `<image>` are added to a tokenizer that lacks them, in the hub's order.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_size: int = 224,
        num_image_tokens: int = 256,
        image_token: str = IMAGE,
        resample: int = BICUBIC,
        mean: Real | Sequence[Real] = 0.5,
        std: Real | Sequence[Real] = 0.5,
        padding_side: str = "left",
    ):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        add_paligemma_tokens(tokenizer, image_token)
        self.tokenizer = tokenizer
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.image_token, self.resample = image_token, int(resample)
        self.mean, self.std = check_channels("mean", mean), check_channels("std", std)
        if min(self.std) <= 0:
            raise ValueError(f"The std of the channels is {std}; it must be positive.")
        self.padding_side = check_padding_side(padding_side)
        self.pad_token_id, self.eos_token_id, self.bos_token_id, self.image_token_id = (
            token_id(tokenizer, token) for token in (PAD, EOS, BOS, image_token)
        )

    def __call__(self, text, images, suffix=None, padding_side: str | None = None) -> dict[str, Tensor]:
        """Prompts and pictures, one to one, → the tensors that the model takes.

        text: a prompt or a list of B prompts, without `<image>`.
        images: one picture or a list of B: a PIL image, a path, or a uint8 array [H, W, 3] in RGB.
        suffix: for training, the answer or a list of B answers; "" asks for `<eos>` alone.
        padding_side: "left" or "right"; the tokenizer's own where not given (Gemma's: left, so that every
        row ends with its last token and generation can go on from the last column).

        Returns input_ids, attention_mask (1 = a real token) and token_type_ids (0 = image, prefix and padding,
        1 = suffix), all int64 [B, T]; pixel_values float32 [B, 3, H, W]; and, where a suffix is given, labels [B, T]:
        the ids of the suffix, -100 elsewhere. Raises ValueError for anything that does not fit together.
        """
        prefixes, images, suffixes = check_batch(text, images, suffix, self.image_token)
        batch = self.tokenize(prefixes, suffixes, check_padding_side(padding_side or self.padding_side))
        batch["pixel_values"] = self.preprocess_images(images)
        return batch

    def tokenize(self, prefixes: list[str], suffixes: list[str] | None, padding_side: str) -> dict[str, Tensor]:
        """Checked prompts, and answers or None → everything of the batch but the pixels."""
        # The tokenizer would cut each <image> out of the prompt first: P copies of its id say the same, much faster.
        image = [self.image_token_id] * self.num_image_tokens
        prompts = [image + text for text in self.encode([build_prompt(p, BOS, self.image_token, 0) for p in prefixes])]
        answers = [[]] * len(prompts) if suffixes is None else self.encode([build_suffix(s, EOS) for s in suffixes])
        names = ("input_ids", "attention_mask", "token_type_ids") + ("labels",) * (suffixes is not None)
        arrays = assemble(prompts, answers, self.pad_token_id, padding_side)
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=False)}

    def preprocess_images(self, images: list) -> Float[Tensor, "B 3 H W"]:
        """Pictures of any shapes → one float32 tensor, by the five steps above."""
        squares = [self.load_and_resize(image) for image in images]
        return channels_first(normalize(rescale(torch.from_numpy(np.stack(squares))), self.mean, self.std))

    def load_and_resize(self, image) -> UInt8[np.ndarray, "H W 3"]:
        """One picture in any accepted form → size × size RGB bytes. An array that already is that passes untouched."""
        if isinstance(image, (str, Path)):
            image = open_image(image)
        elif isinstance(image, Image.Image):
            image = to_rgb(image)
        else:
            check_array(image)
            if image.shape[:2] == (self.image_size, self.image_size):
                return image
            image = Image.fromarray(image)
        return resize(image, self.image_size, self.resample)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Texts → token ids, with no token added before or after."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """Token ids (a list or a tensor [T]) → text. `<loc…>` and `<seg…>` are not special: they stay."""
        ids = [int(i) for i in ids]
        if any(i < 0 for i in ids):
            raise ValueError("Token ids must not be negative; leave out the labels of -100 before decoding.")
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows, skip_special_tokens: bool = True) -> list[str]:
        """Rows of token ids (lists or a tensor [B, T]) → texts."""
        return [self.decode(ids, skip_special_tokens) for ids in rows]

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, revision: str | None = None) -> "Processor":
        """From a folder in the hub's format, a hub id (at a revision), or nothing (the embedded checkpoint).

        Reads tokenizer.json, tokenizer_config.json (padding_side), preprocessor_config.json or the "image_processor"
        part of processor_config.json, and config.json; only the first must be there. Raises ValueError where these
        contradict each other.
        """
        folder = hub.resolve(path, revision, weights=False)
        settings = image_settings(folder)
        padding_side = read_json(folder / "tokenizer_config.json").get("padding_side", "left")
        processor = cls(read_tokenizer(folder / "tokenizer.json"), padding_side=padding_side, **settings)
        config = read_json(folder / "config.json")
        expected = config.get("image_token_id", config.get("image_token_index"))
        if expected not in (None, processor.image_token_id):
            raise ValueError(
                f"The tokenizer gives {processor.image_token} the id {processor.image_token_id}, but config.json "
                f"says {expected}; tokenizer.json belongs to another model."
            )
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that `from_pretrained`, and transformers' AutoProcessor, read back."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        tokenizer_config = {
            "tokenizer_class": "GemmaTokenizer",
            "processor_class": "PaliGemmaProcessor",
            "padding_side": self.padding_side,
            "pad_token": PAD,
            "eos_token": EOS,
            "bos_token": BOS,
            "unk_token": UNK,
            "mask_token": MASK,
            "additional_special_tokens": [self.image_token],
        }
        preprocessor_config = {
            "image_processor_type": "SiglipImageProcessor",
            "processor_class": "PaliGemmaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": self.image_size, "width": self.image_size},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
            "image_seq_length": self.num_image_tokens,
        }
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        write_json(folder / "preprocessor_config.json", preprocessor_config)


# --- what must hold before anything is computed --------------------------------------------------------------------


def check_batch(text, images, suffix, image_token: str) -> tuple[list[str], list, list[str] | None]:
    """One or many of each → lists of equal length; ValueError says what does not fit."""
    prefixes = check_texts("prompt", text, image_token)
    for prefix in prefixes:
        if not prefix.strip():
            raise ValueError("A prompt is empty; write what the model shall do, for example 'caption en'.")
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if len(images) != len(prefixes):
        raise ValueError(f"There are {len(prefixes)} prompts and {len(images)} pictures; give one picture per prompt.")
    if suffix is None:
        return prefixes, images, None
    suffixes = check_texts("suffix", suffix, image_token)
    if len(suffixes) != len(prefixes):
        raise ValueError(f"There are {len(prefixes)} prompts and {len(suffixes)} suffixes; give one suffix per prompt.")
    return prefixes, images, suffixes


def check_texts(name: str, texts, image_token: str) -> list[str]:
    """A string or a list of strings → a list, not empty, that a tokenizer can take."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The {name} must be a string or a list of strings.")
    if not texts:
        raise ValueError(f"The list holds no {name}; give at least one.")
    for text in texts:
        if image_token in text:
            raise ValueError(f"A {name} contains {image_token}; leave it out, the processor puts it in.")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"A {name} contains half a surrogate pair, which is no character; decode the text again.")
    return list(texts)


def check_array(image) -> None:
    """Arrays must be RGB bytes: floats leave open whether 1 or 255 is white."""
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        found = f"an array of {image.dtype} with shape {list(image.shape)}" if is_array else f"a {type(image).__name__}"
        raise ValueError(
            f"A picture is {found}; it must be a PIL image, a path, or a uint8 array [H, W, 3] that is not empty. "
            "Give several pictures as a list."
        )


def check_channels(name: str, value) -> list[float]:
    """One number for all channels, or one for each → three floats."""
    values = [float(v) for v in np.broadcast_to(value, 3)] if np.size(value) in (1, 3) else []
    if len(values) != 3 or not np.isfinite(values).all():
        raise ValueError(f"The {name} of the channels is {value}; it must be one number or three.")
    return values


def check_padding_side(side: str) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}; it must be 'left' or 'right'.")
    return side


# --- files ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A JSON object, or {} where the file is absent."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file {str(path)!r} is not valid JSON: {error}") from error
    if type(content) is not dict:
        raise ValueError(f"The file {str(path)!r} must hold a JSON object.")
    return content


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def image_settings(folder: Path) -> dict:
    """How a hub folder wants its pictures; what its files leave out comes from config.json, then from PaliGemma."""
    nested = read_json(folder / "processor_config.json").get("image_processor") or {}  # where transformers 5 puts it
    found = {**read_json(folder / "preprocessor_config.json"), **nested}
    found = {name: value for name, value in found.items() if value is not None}
    vision = read_json(folder / "config.json").get("vision_config") or {}
    size = found.get("size", vision.get("image_size", 224))
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if height != width or not isinstance(height, int):
        raise ValueError(
            f"{str(folder)!r} asks for pictures of size {size}; only a height equal to the width is known."
        )
    if vision.get("image_size", height) != height:
        raise ValueError(
            f"{str(folder)!r} prepares {height}-pixel pictures for a tower of {vision['image_size']} pixels."
        )
    patches = (height // vision.get("patch_size", 14)) ** 2
    num_image_tokens = found.get("image_seq_length", patches)
    if vision and num_image_tokens != patches:
        raise ValueError(f"{str(folder)!r} sets {num_image_tokens} image tokens for a tower of {patches} patches.")
    if not all(found.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize")):
        raise ValueError(f"{str(folder)!r} switches off resizing, rescaling or normalizing, which is not supported.")
    return {
        "image_size": height,
        "num_image_tokens": num_image_tokens,
        "resample": found.get("resample", BICUBIC),
        "mean": found.get("image_mean", 0.5),
        "std": found.get("image_std", 0.5),
    }
