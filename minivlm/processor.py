"""Images and prompts → tensors: the model's whole input.

An image becomes a square of values in [-1, 1]. A prompt becomes token ids, preceded by one ``<image>`` token for every
patch of the image:

    <image> <image> … <image> <bos> caption en \\n        a cat <eos>
    └────── P of them ──────┘ └──── prefix ────┘        └─ suffix ─┘

    B batch · T sequence length · P image tokens, one per patch · H, W height and width of the square image

Sources: big_vision (configs/proj/paligemma) for the layout; transformers 5.23, whose batches this file reproduces:
ids exactly (models/paligemma/processing_paligemma.py), pixels to 1e-6 (models/siglip/image_processing_pil_siglip.py).
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
EXIF_ERRORS = (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, OSError, EOFError, struct.error)
IGNORE_INDEX = -100  # the label that torch's cross-entropy skips
MAX_IMAGE_SIZE = 8192  # PaliGemma's largest is 896


# --- an image, step by step ----------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Image.Image:
    """Reads an image file as an upright RGB image with 8 bits per channel.

    Raises:
        ValueError: If there is no such file, or it is not an image, truncated, empty, or larger than PIL's limit
            against decompression bombs (``Image.MAX_IMAGE_PIXELS``).
    """
    if not os.path.isfile(path):  # unlike Path.is_file, returns False if the name is too long for a file
        raise ValueError(f"There is no image file at {str(path)!r}: check the path.")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # PIL only warns up to twice its limit
        try:
            with Image.open(path) as image:
                return to_rgb(image)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            advice = "shrink it or, if you trust it, raise PIL.Image.MAX_IMAGE_PIXELS"
            raise ValueError(f"The image {str(path)!r} is too large to open safely: {advice}.") from error
        except Exception as error:  # PIL's readers raise OSError, SyntaxError, struct.error, EOFError and more
            fault = f"The file {str(path)!r} cannot be read as an image ({hub.printable(error)})"
            raise ValueError(f"{fault}: convert it to PNG or JPEG, or {hub.remedy(path)}.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any PIL image to upright RGB with 8 bits per channel.

    Applies the EXIF orientation, scales 16-bit gray to 8 bits, and composites transparency over white, as transformers
    5.23 does (image_transforms.convert_to_rgb).

    Raises:
        ValueError: If the image is empty or damaged, or its mode (F or I) leaves the range of its values unknown.
    """
    if min(image.size) == 0:
        raise ValueError(f"The image is empty ({image.width}×{image.height} pixels): it needs at least one pixel.")
    try:
        image.load()  # PIL reads lazily: only this shows that a file is truncated
    except Exception as error:
        raise ValueError(f"The image is truncated or damaged: {error}") from error
    image = gray16_to_gray8(apply_exif_orientation(image))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def apply_exif_orientation(image: Image.Image) -> Image.Image:
    """Rotates or mirrors an image as its EXIF orientation tag says. Without a readable tag, it stays as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except EXIF_ERRORS:  # a broken tag does not mean broken pixels
        return image


def gray16_to_gray8(image: Image.Image) -> Image.Image:
    """16-bit gray → 8-bit: 65535 becomes 255, where PIL clips. Mode I has 8-bit values if none is above 255."""
    if image.mode == "F":
        raise ValueError("The image has floating-point values (mode F) of unknown range: convert it to 8 bits first.")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("The image has 32-bit values outside 0…65535: scale it to 8 bits first.")
    if image.mode != "I" or values.max() > 255:
        values = (values * 255 + 32767) // 65535
    return Image.fromarray(values.astype(np.uint8))


def resize(image: Image.Image, size: int, resample: int = BICUBIC) -> UInt8[np.ndarray, "H W 3"]:
    """Resizes an RGB image to size × size. The model gets the whole image, but not its aspect ratio."""
    if image.size != (size, size):
        image = image.resize((size, size), resample)
    return np.asarray(image)


def rescale(pixels: UInt8[Tensor, "*B H W 3"]) -> Float[Tensor, "*B H W 3"]:
    """0…255 → 0…1, float32."""
    return pixels.to(torch.float32) / 255


def normalize(
    pixels: Float[Tensor, "*B H W 3"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*B H W 3"]:
    """(x − mean) / std in each channel. With 0.5 and 0.5, [0, 1] becomes [-1, 1]."""
    return (pixels - torch.tensor(mean)) / torch.tensor(std)


def channels_first(pixels: Float[Tensor, "*B H W 3"]) -> Float[Tensor, "*B 3 H W"]:
    """Moves the channels from the last axis, where image files have them, to where torch's convolutions expect them."""
    return pixels.movedim(-1, -3).contiguous()


# --- a prompt, step by step ----------------------------------------------------------------------------------------


def build_prompt(prefix: str, bos_token: str = BOS, image_token: str = IMAGE, num_image_tokens: int = 256) -> str:
    """P times ``<image>``, then ``<bos>``, prefix and newline. The newline marks the end of the prompt."""
    return image_token * num_image_tokens + bos_token + prefix + "\n"


def build_suffix(suffix: str, eos_token: str = EOS) -> str:
    """The target answer and the token that ends it."""
    return suffix + eos_token


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> Int64[np.ndarray, "B T"]:
    """Rows of different lengths → one array, padded with ``value`` on the given side, "left" or "right"."""
    longest = max(map(len, rows))
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    for target, row in zip(padded, rows, strict=True):
        start = 0 if side == "right" else longest - len(row)
        target[start : start + len(row)] = row
    return padded


def assemble(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int, side: str
) -> tuple[Int64[np.ndarray, "B T"], Int64[np.ndarray, "B T"], Int64[np.ndarray, "B T"], Int64[np.ndarray, "B T"]]:
    """Builds input_ids, attention_mask, token_type_ids and labels from the ids of prompts and answers.

    attention_mask is 1 on tokens and 0 on padding. token_type_ids is 1 on the answer and 0 elsewhere. labels has the
    ids of the answer, and -100 elsewhere. It is not shifted by one: the loss does that.
    """
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    types = [[0] * len(prompt) + [1] * len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids, types = pad(rows, pad_id, side), pad(types, 0, side)
    return ids, pad([[1] * len(row) for row in rows], 0, side), types, np.where(types == 1, ids, IGNORE_INDEX)


class Processor:
    """A tokenizer and the image preprocessing of one model.

    Args:
        tokenizer: From the Gemma family. Missing ``<loc…>``, ``<seg…>`` and ``<image>`` are added in the hub's order.
        image_size: Side of the square image in pixels.
        num_image_tokens: P, the number of patches that the vision tower makes of it.
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
        self.image_size = check_integer("image_size", image_size, MAX_IMAGE_SIZE)
        self.num_image_tokens = check_integer("num_image_tokens", num_image_tokens, image_size**2)
        self.image_token, self.resample = image_token, int(Image.Resampling(resample))
        self.mean, self.std = check_channels("mean", mean), check_channels("std", std)
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {std}.")
        self.padding_side = check_padding_side(padding_side)
        self.pad_token_id, self.eos_token_id, self.bos_token_id, self.image_token_id = (
            token_id(tokenizer, token) for token in (PAD, EOS, BOS, image_token)
        )

    def __call__(self, text, images, suffix=None, padding_side: str | None = None) -> dict[str, Tensor]:
        """Turns prompts and images, one image per prompt, into the tensors that the model takes.

        Args:
            text: A prompt or a list of B prompts, without ``<image>``.
            images: An image or a list of B. Each is a PIL image, a path, or a uint8 array [H, W, 3] in RGB.
            suffix: For training: the answer or a list of B answers. "" is the answer that is only ``<eos>``.
            padding_side: "left" or "right". The default is the tokenizer's: for Gemma left, so that every row ends with
                its last token and generation can continue in the next column.

        Returns:
            input_ids, attention_mask (1 on tokens, 0 on padding), token_type_ids (1 on the suffix, 0 elsewhere) and, if
            there is a suffix, labels (its ids, -100 elsewhere), all int64 [B, T]; pixel_values, float32 [B, 3, H, W].
        """
        prefixes, images, suffixes = check_batch(text, images, suffix, self.image_token)
        batch = self.tokenize(prefixes, suffixes, check_padding_side(padding_side or self.padding_side))
        batch["pixel_values"] = self.preprocess_images(images)
        return batch

    def tokenize(self, prefixes: list[str], suffixes: list[str] | None, padding_side: str) -> dict[str, Tensor]:
        """Checked prompts, with answers or None → the batch without the pixels."""
        # Prepending P copies of the id is much faster than having the tokenizer split P <image> off the prompt.
        image = [self.image_token_id] * self.num_image_tokens
        prompts = [image + text for text in self.encode([build_prompt(p, BOS, self.image_token, 0) for p in prefixes])]
        answers = [[]] * len(prompts) if suffixes is None else self.encode([build_suffix(s, EOS) for s in suffixes])
        names = ("input_ids", "attention_mask", "token_type_ids") + ("labels",) * (suffixes is not None)
        arrays = assemble(prompts, answers, self.pad_token_id, padding_side)
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=False)}

    def preprocess_images(self, images: list) -> Float[Tensor, "B 3 H W"]:
        """Images of any size → one float32 tensor, by the five steps above."""
        pixels = torch.from_numpy(np.stack([self.load_and_resize(image) for image in images]))
        return channels_first(normalize(rescale(pixels), self.mean, self.std))

    def load_and_resize(self, image) -> UInt8[np.ndarray, "H W 3"]:
        """One image in any accepted form → size × size RGB bytes. An array of that size is returned as it is."""
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
        """Texts → token ids, without adding special tokens."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """Token ids (a list or a tensor [T]) → text. ``<loc…>`` and ``<seg…>`` are not special, so they stay."""
        ids = [int(i) for i in ids]  # ids without a token, of rows that pad the embedding table, decode to nothing
        if not all(0 <= i < 2**32 for i in ids):
            raise ValueError(f"Token ids must be from 0 to 2³² − 1, not negative: remove labels of {IGNORE_INDEX}.")
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows, skip_special_tokens: bool = True) -> list[str]:
        """Rows of token ids (lists or a tensor [B, T]) → texts."""
        return [self.decode(ids, skip_special_tokens) for ids in rows]

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, revision: str | None = None) -> "Processor":
        """Loads a folder in the hub's format, a hub id (at a revision), or by default the embedded checkpoint.

        Reads tokenizer.json, tokenizer_config.json (padding_side), preprocessor_config.json or the "image_processor"
        part of processor_config.json, and config.json. Only the first is required.

        Raises:
            ValueError: If there is no such checkpoint, or one of its files is invalid or contradicts another.
        """
        folder = hub.resolve(path, revision, weights=False)
        settings = read_image_settings(folder)
        padding_side = read_settings(folder / "tokenizer_config.json").get("padding_side", "left")
        processor = cls(read_tokenizer(folder / "tokenizer.json"), padding_side=padding_side, **settings)
        config = read_settings(folder / "config.json")
        expected = config.get("image_token_id", config.get("image_token_index"))
        if expected not in (None, processor.image_token_id):
            ids = f"has id {processor.image_token_id} in tokenizer.json but {expected!r} in config.json"
            raise ValueError(f"{processor.image_token} {ids}: tokenizer.json belongs to another model.")
        return processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the files that ``from_pretrained``, and transformers' AutoProcessor, can load."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor"}
        config |= {"padding_side": self.padding_side, "additional_special_tokens": [self.image_token]}
        config |= {"pad_token": PAD, "eos_token": EOS, "bos_token": BOS, "unk_token": UNK, "mask_token": MASK}
        files = {
            "tokenizer.json": self.tokenizer.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }
        config = {"image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor"}
        config |= dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True)
        config |= {"size": {"height": self.image_size, "width": self.image_size}, "resample": self.resample}
        config |= {"rescale_factor": 1 / 255, "image_mean": self.mean, "image_std": self.std}
        files["preprocessor_config.json"] = json.dumps(config | {"image_seq_length": self.num_image_tokens}, indent=2)
        for name, text in files.items():
            with hub.write_atomically(folder / name) as part:
                part.write_text(text + "\n", encoding="utf-8")


# --- checks --------------------------------------------------------------------------------------------------------


def check_batch(text, images, suffix, image_token: str) -> tuple[list[str], list, list[str] | None]:
    """One or several prompts, images and suffixes (or ``None``) → lists of equal length."""
    prefixes = check_texts("prompt", text, image_token)
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if len(images) != len(prefixes):
        raise ValueError(f"There are {len(prefixes)} prompts and {len(images)} images: pass one image per prompt.")
    suffixes = None if suffix is None else check_texts("suffix", suffix, image_token)
    if suffixes is not None and len(suffixes) != len(prefixes):
        raise ValueError(f"There are {len(prefixes)} prompts and {len(suffixes)} suffixes: pass one suffix per prompt.")
    return prefixes, images, suffixes


def check_texts(name: str, texts, image_token: str) -> list[str]:
    """A string or a list of strings → a list of at least one string that a tokenizer can encode."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"The {name} must be a string or a list of strings.")
    if not texts:
        raise ValueError(f"The list contains no {name}: pass at least one.")
    for text in texts:
        if image_token in text:
            raise ValueError(f"A {name} contains {image_token}: leave it out, the processor adds it.")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"A {name} contains a lone surrogate, which is not a character: decode the text again.")
    return list(texts)


def check_array(image) -> None:
    """Arrays must be RGB bytes: with floats, white could be 1 or 255."""
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        found = f"an array of {image.dtype} with shape {list(image.shape)}" if is_array else f"a {type(image).__name__}"
        expected = "a PIL image, a path, or a non-empty uint8 array [H, W, 3]"
        raise ValueError(f"An image must be {expected}, but got {found}. Pass several images as a list.")


def check_channels(name: str, value) -> list[float]:
    """One number for all channels, or one per channel → three floats."""
    values = [value] * 3 if isinstance(value, Real) else value
    is_list = isinstance(values, (list, tuple, np.ndarray)) and len(values) == 3
    if not is_list or not all(isinstance(v, Real) and abs(v) < 1e30 for v in values):  # neither NaN nor infinity
        raise ValueError(f"{name} must be one number or three, one per channel, not {value!r}.")
    return [float(v) for v in values]


def check_integer(name: str, value, largest: int) -> int:
    if type(value) is not int or not 1 <= value <= largest:
        raise ValueError(f"{name} must be an integer from 1 to {largest}, not {value!r}.")
    return value


def check_padding_side(side: str) -> str:
    if side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {side!r}.")
    return side


def read_settings(path: Path, part: str | None = None) -> dict:
    """The JSON object in a file, or in a part of it, without its nulls. {} if there is no such file or part."""
    found = hub.read_json(path) if path.is_file() else {}
    found = found if part is None else found.get(part) or {}
    if type(found) is not dict:
        raise ValueError(f"{part} in {path} must be a JSON object, not {found!r}.")
    return {name: value for name, value in found.items() if value is not None}


def read_image_settings(folder: Path) -> dict:
    """The arguments of ``Processor`` for images. Sizes that the preprocessor's files omit come from config.json."""
    nested = read_settings(folder / "processor_config.json", "image_processor")  # the layout of transformers 5
    found = read_settings(folder / "preprocessor_config.json") | nested
    vision = read_settings(folder / "config.json", "vision_config")
    size = found.get("size", vision.get("image_size", 224))
    height, width = (size.get("height"), size.get("width")) if isinstance(size, dict) else (size, size)
    if height != width or height is None:
        raise ValueError(f"{folder} has images of size {size}, but only square images are supported.")
    check_integer(f"The image size of {folder}", height, MAX_IMAGE_SIZE)
    if (expected := vision.get("image_size", height)) != height:
        raise ValueError(f"{folder} resizes images to {height} pixels, but its vision tower expects {expected!r}.")
    patches = (height // check_integer(f"The patch_size of {folder}", vision.get("patch_size", 14), height)) ** 2
    num_image_tokens = check_integer("image_seq_length", found.get("image_seq_length", patches), height**2)
    if vision and num_image_tokens != patches:
        raise ValueError(f"{folder} has {num_image_tokens} image tokens for a tower with {patches} patches.")
    usual = {"rescale_factor": 1 / 255, "do_center_crop": False, "do_pad": False}
    usual |= dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True)
    for name, value in usual.items():
        if found.get(name, value) != value:
            raise ValueError(f"{folder} sets {name} to {found[name]!r}, but only {value} is supported.")
    names = {"resample": "resample", "image_mean": "mean", "image_std": "std"}
    settings = {ours: found[theirs] for theirs, ours in names.items() if theirs in found}
    return settings | {"image_size": height, "num_image_tokens": num_image_tokens}
