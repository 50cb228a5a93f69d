"""processor.py against transformers' PaliGemmaProcessor, and against bad input.

The comparison with the real Gemma tokenizer needs its tokenizer.json next to the repository and is skipped without it.
"""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer

from minivlm import processor as module
from minivlm.processor import Processor, open_image, to_rgb
from minivlm.tokenizer import IMAGE, LOC_TOKENS, SEG_TOKENS
from minivlm.training.tokenizer import train_tokenizer

GEMMA = Path(__file__).resolve().parents[2] / "shared" / "gemma_tokenizer" / "tokenizer.json"
P = 4  # few image tokens, so that a failing comparison stays readable

TEXTS = [
    "a cat and two dogs",
    "cat",
    "caption en",
    "answer en where is the dog?",
    "detect umbrella ; cat",
    "the umbrella is left of the cat",
    "<loc0012><loc0001><loc0100><loc0300> umbrella ; <loc0000><loc0600><loc0400><loc1023> dog",
]
WORDS = sorted({word for text in TEXTS[:6] for word in text.replace("?", " ").replace(";", " ").split()})


# --- fixtures ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma_path():
    if not GEMMA.is_file():
        pytest.skip("the real Gemma tokenizer is not next to this repository")
    return GEMMA


@pytest.fixture(scope="module")
def ours(gemma_path):
    return Processor(Tokenizer.from_file(str(gemma_path)), image_size=28, num_image_tokens=P)


@pytest.fixture(scope="module")
def theirs(gemma_path):
    from transformers import GemmaTokenizer, PaliGemmaProcessor

    tokenizer = GemmaTokenizer.from_pretrained(gemma_path.parent)
    tokenizer.add_tokens(LOC_TOKENS + SEG_TOKENS)
    return PaliGemmaProcessor(siglip(28), tokenizer)


def siglip(size):
    """transformers' image preprocessing, with PIL."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    reference = SiglipImageProcessorPil(size={"height": size, "width": size})
    reference.image_seq_length = P
    return reference


@pytest.fixture(scope="module")
def small_tokenizer():
    return train_tokenizer(TEXTS, vocab_size=2400)


@pytest.fixture
def small(small_tokenizer):
    return Processor(Tokenizer.from_str(small_tokenizer.to_str()), image_size=32, num_image_tokens=P)


def noise(mode, size=(37, 23), seed=0):
    """A random image of the given PIL mode, whose edges make bicubic interpolation overshoot."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.merge(mode, [Image.fromarray(values[:, :, c]) for c in range(channels)])


def random_image(seed=0):
    return noise("RGB", seed=seed)


def assert_same_batch(ours, theirs, names):
    for name in names:
        assert torch.equal(ours[name], theirs[name]), f"{name}:\n{ours[name]}\n{theirs[name]}"
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=1e-6, rtol=0)


# --- tokens against transformers -----------------------------------------------------------------------------------

PROMPTS = [
    "caption en",
    "answer en where is the cat that sits on the mat?",
    "detect a cat ; two dogs",
    " a space in front, and one behind ",
    "a newline at the end\n",
    "two\nlines\n\n",
    "naïve 日本語 🐱‍👤 \u2028 \t tab",
    "<loc0012><seg101> and <bos>, <eos> in a prompt",
    "x",
    "",  # pretrained checkpoints are prompted with it
    " ",
    "\n",
]
SUFFIXES = [
    "a cat",
    "",
    "<loc0001><loc0002><loc0003><loc0004> cat ; <loc1023><loc1023><loc1023><loc1023> dog",
    " leading",
    "trailing \n",
    "\n",
    "été ▁",
    "<seg000><seg127>",
    "<eos>",
    "an answer to an empty prompt",
    "▁",
    "\n\n",
]


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("with_suffix", [True, False])
def test_batch_equals_transformers(ours, theirs, side, with_suffix):
    images = [random_image(seed) for seed in range(len(PROMPTS))]
    more = {"suffix": SUFFIXES} if with_suffix else {}
    expected = theirs(
        text=PROMPTS,
        images=images,
        padding=True,
        return_tensors="pt",
        **more,
        **({"padding_side": side} if side else {}),
    )
    batch = ours(text=PROMPTS, images=images, padding_side=side, **more)
    names = ["input_ids", "attention_mask", "token_type_ids"] + ["labels"] * with_suffix
    assert set(batch) == {*names, "pixel_values"}
    assert_same_batch(batch, expected, names)


@pytest.mark.parametrize("prompt, suffix", [*zip(PROMPTS, SUFFIXES, strict=True)])
def test_single_prompt_equals_transformers(ours, theirs, prompt, suffix):
    expected = theirs(text=prompt, images=random_image(), suffix=suffix, return_tensors="pt")
    batch = ours(text=prompt, images=random_image(), suffix=suffix)
    assert_same_batch(batch, expected, ["input_ids", "attention_mask", "token_type_ids", "labels"])


def test_known_ids(ours):
    batch = ours("caption en", random_image())
    assert batch["input_ids"].tolist() == [[257152] * P + [2, 21209, 659, 108]]
    assert [ours.tokenizer.token_to_id(t) for t in ("<loc0000>", "<loc1023>", "<seg000>", "<seg127>")] == [
        256000,
        257023,
        257024,
        257151,
    ]


def test_whole_prompt_tokenizes_to_the_same_ids(ours):
    """The processor adds the ids of <image> itself. Tokenizing the whole string must give the same ids."""
    prompt = module.build_prompt("caption en", num_image_tokens=P)
    assert prompt == "<image><image><image><image><bos>caption en\n"
    assert ours.encode([prompt]) == ours("caption en", random_image())["input_ids"].tolist()


@pytest.mark.parametrize("skip", [True, False])
def test_decode_equals_transformers(ours, theirs, skip):
    ids = ours(PROMPTS, [random_image()] * len(PROMPTS), suffix=SUFFIXES)["input_ids"]
    assert ours.batch_decode(ids, skip) == theirs.batch_decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids[2].tolist(), skip) == theirs.decode(ids[2], skip_special_tokens=skip)


def test_decode_keeps_location_tokens_and_drops_special_tokens(small):
    text = TEXTS[6]
    ids = small("caption en", random_image(), suffix=text)["input_ids"][0]
    assert small.decode(ids) == "caption en\n" + text
    assert small.decode([10_000_000, 5]) == "\n"  # an id of the padded embedding table without a token
    for wrong in (-100, 2**32, 2**70):
        with pytest.raises(ValueError, match="Token ids must be from 0 to"):
            small.decode([wrong, 5])


# --- pixels against transformers -----------------------------------------------------------------------------------

MODES = {
    "RGB": lambda: noise("RGB"),
    "gray": lambda: noise("L"),
    "RGBA": lambda: noise("RGBA"),
    "gray with alpha": lambda: noise("LA"),
    "CMYK": lambda: noise("CMYK"),
    "YCbCr": lambda: noise("YCbCr"),
    "black and white": lambda: noise("L").convert("1"),
    "palette": lambda: noise("RGB").quantize(17),
    "one row": lambda: noise("RGB", (301, 1)),
    "one pixel": lambda: noise("RGB", (1, 1)),
    "tall": lambda: noise("RGB", (3, 255)),
    "large": lambda: noise("RGB", (641, 479)),
    "exact size": lambda: noise("RGB", (28, 28)),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("size", [28, 224])
def test_pixels_equal_transformers(name, size, small_tokenizer):
    image = MODES[name]()
    expected = siglip(size)(image, return_tensors="pt")["pixel_values"]
    pixels = Processor(small_tokenizer, image_size=size).preprocess_images([image])
    assert pixels.dtype == torch.float32 and pixels.shape == (1, 3, size, size)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_palette_with_transparency_equals_transformers(small, tmp_path):
    image = noise("RGB").quantize(17)
    image.save(tmp_path / "transparent.png", transparency=3)
    opened = Image.open(tmp_path / "transparent.png")
    assert opened.mode == "P" and "transparency" in opened.info
    expected = siglip(32)(opened, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(small.preprocess_images([tmp_path / "transparent.png"]), expected, atol=1e-6, rtol=0)


def test_transparent_is_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_16_bit_gray_is_scaled_not_clipped(small, tmp_path):
    values = np.array([[0, 257, 32896], [65535, 128, 129]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode == "I;16"
    image = open_image(tmp_path / "deep.png")
    assert np.asarray(image)[:, :, 0].tolist() == [[0, 1, 128], [255, 0, 1]]
    assert to_rgb(Image.fromarray(values.astype(np.int32))).tobytes() == image.tobytes()
    dark = Image.fromarray(np.minimum(values, 200))  # I;16 has 16 bits, however small its values
    assert dark.mode == "I;16" and np.asarray(to_rgb(dark)).max() == 1
    expected = siglip(32)(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(small.preprocess_images([tmp_path / "deep.png"]), expected, atol=1e-6, rtol=0)


def test_8_bit_values_in_mode_i_equal_transformers(small):
    """Mode I does not say how many bits it uses. If no value is above 255, they are read as PIL reads them."""
    values = noise("L")
    wide = Image.fromarray(np.asarray(values).astype(np.int32))
    assert (
        wide.mode == "I" and to_rgb(wide).tobytes() == values.convert("RGB").tobytes() == wide.convert("RGB").tobytes()
    )
    expected = siglip(32)(wide, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(small.preprocess_images([wide]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0], upright[0, -1], upright[-1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # what a camera stores: rotating or mirroring it as the tag says restores the upright image
    rotated = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(rotated)).save(tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "rotated.png")), upright)
    assert np.array_equal(np.asarray(to_rgb(Image.open(tmp_path / "rotated.png"))), upright)


def test_broken_exif_is_ignored(tmp_path):
    random_image().save(tmp_path / "a.png", exif=b"Exif\x00\x00nonsense")
    assert open_image(tmp_path / "a.png").tobytes() == random_image().tobytes()


def test_path_image_and_array_agree(small, tmp_path):
    for size in [(32, 32), (50, 20)]:  # 32 × 32 arrays skip PIL
        image = noise("RGB", size)
        image.save(tmp_path / "a.png")
        first, *others = small.preprocess_images(
            [image, str(tmp_path / "a.png"), tmp_path / "a.png", np.asarray(image)]
        )
        assert all(torch.equal(first, other) for other in others)
    array = np.asarray(noise("RGB", (32, 32)))
    assert small.load_and_resize(array) is array


def test_the_steps_can_be_patched(small, monkeypatch):
    before = small.preprocess_images([random_image()])
    monkeypatch.setattr(module, "rescale", lambda pixels: pixels.float())  # the classic bug: no / 255
    assert small.preprocess_images([random_image()]).max() > 100 > before.max()
    monkeypatch.setattr(module, "build_prompt", lambda prefix, *_, **__: "<bos>" + prefix)  # … and no newline
    assert small("caption en", random_image())["input_ids"][0, -1] == small.tokenizer.token_to_id("▁en")


# --- bad input: one clear message ----------------------------------------------------------------------------------


def png(tmp_path, image=None):
    path = tmp_path / "image.png"
    (image or noise("RGB", (64, 64))).save(path)
    return path


def bomb(tmp_path, side):
    """A PNG whose header promises side × side pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    return path


def write(tmp_path, content):
    path = tmp_path / "file.png"
    path.write_bytes(content)
    return path


BAD_FILES = {
    "missing": (lambda d: d / "none.png", "no image file"),
    "a name too long for a file": (lambda d: "x" * 5000, "no image file"),
    "a folder": (lambda d: d, "no image file"),
    "text": (lambda d: write(d, b"hello"), "cannot be read .*: convert it to PNG or JPEG, or download it again"),
    "a Git LFS pointer": (lambda d: write(d, b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "SVG": (lambda d: write(d, b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "convert it to PNG or JPEG"),
    "HEIC": (lambda d: write(d, b"\0\0\0\x18ftypheic" + bytes(99)), "convert it to PNG or JPEG"),
    "empty": (lambda d: write(d, b""), "cannot be read"),
    "truncated": (lambda d: write(d, png(d).read_bytes()[:3000]), "cannot be read"),
    "truncated in its header": (lambda d: write(d, png(d).read_bytes()[:20]), "cannot be read"),
    "bomb": (lambda d: bomb(d, 60000), "too large .* raise PIL.Image.MAX_IMAGE_PIXELS"),
    "half a bomb": (lambda d: bomb(d, 11000), "too large"),  # for which PIL only warns
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, small, tmp_path):
    make, message = BAD_FILES[name]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        small("caption en", path)
    assert "\n" not in str(caught.value)


def test_bad_pil_images(small, tmp_path):
    lazy = Image.open(write(tmp_path, png(tmp_path).read_bytes()[:3000]))
    for image, message in [
        (lazy, "truncated or damaged"),
        (Image.new("RGB", (0, 5)), "empty"),
        (Image.new("F", (5, 5)), "mode F"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "32-bit"),
    ]:
        with pytest.raises(ValueError, match=message):
            small("caption en", image)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4), np.uint8), r"\[4, 4\]"),
        (np.zeros((3, 4, 4), np.uint8), r"\[3, 4, 4\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), "as a list"),
        (np.zeros((0, 4, 3), np.uint8), "non-empty"),
        (torch.zeros(4, 4, 3), "Tensor"),
        (None, "NoneType"),
        (7, "int"),
    ],
)
def test_bad_arrays(array, message, small):
    with pytest.raises(ValueError, match=message):
        small("caption en", array)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"text": []}, "no prompt"),
        ({"text": ["a"], "images": []}, "1 prompts and 0 images"),
        ({"text": ["a", "b"]}, "2 prompts and 1 images"),
        ({"text": "a", "images": [random_image()] * 2}, "1 prompts and 2 images"),
        ({"text": "<image>a"}, "contains <image>"),
        ({"suffix": "<image>"}, "contains <image>"),
        ({"suffix": ["a", "b"]}, "1 prompts and 2 suffixes"),
        ({"suffix": []}, "no suffix"),
        ({"suffix": [1]}, "suffix must be a string"),
        ({"text": 3}, "prompt must be a string"),
        ({"text": None}, "prompt must be a string"),
        ({"text": "a\ud800"}, "surrogate"),
        ({"padding_side": "top"}, "'left' or 'right'"),
    ],
)
def test_bad_batches(arguments, message, small):
    with pytest.raises(ValueError, match=message):
        small(**({"text": "caption en", "images": random_image()} | arguments))


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_loads_what_we_save(side, small_tokenizer, tmp_path):
    from transformers import PaliGemmaProcessor

    saved = Processor(
        small_tokenizer, 32, P, resample=Image.Resampling.BILINEAR, mean=[0.1, 0.2, 0.3], padding_side=side
    )
    saved.save_pretrained(tmp_path)
    theirs = PaliGemmaProcessor.from_pretrained(tmp_path)
    arguments = {"text": TEXTS[1:], "images": [random_image()] * 6, "suffix": TEXTS[:-1]}
    expected = theirs(**arguments, padding=True, return_tensors="pt")
    names = ["input_ids", "attention_mask", "token_type_ids", "labels"]
    assert len(theirs.tokenizer) == small_tokenizer.get_vocab_size()  # no token was added after <image>
    assert_same_batch(saved(**arguments), expected, names)
    assert_same_batch(Processor.from_pretrained(tmp_path)(**arguments), expected, names)
    ids = expected["input_ids"]
    assert saved.batch_decode(ids) == theirs.batch_decode(ids, skip_special_tokens=True)


def test_auto_processor_and_what_transformers_saves(small, tmp_path):
    from transformers import AutoProcessor

    small.save_pretrained(tmp_path / "ours")
    AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert not (tmp_path / "theirs" / "preprocessor_config.json").exists()  # 5.x nests it in the other file
    back = Processor.from_pretrained(tmp_path / "theirs")
    assert (back.image_size, back.num_image_tokens, back.padding_side) == (32, P, "left")
    one, two = small(TEXTS[:6], [random_image()] * 6, TEXTS[1:]), back(TEXTS[:6], [random_image()] * 6, TEXTS[1:])
    assert all(torch.equal(one[name], two[name]) for name in one)


def folder_with(tmp_path, small_tokenizer, **files):
    small_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, (224, 256, 3, [0.5] * 3)),
        ({"config": {"vision_config": {"image_size": 448, "patch_size": 14}}}, (448, 1024, 3, [0.5] * 3)),
        ({"config": {"vision_config": {"image_size": 64, "patch_size": 8}}}, (64, 64, 3, [0.5] * 3)),
        (
            {"preprocessor_config": {"size": {"height": 448, "width": 448}, "image_seq_length": 1024}},
            (448, 1024, 3, [0.5] * 3),
        ),
        ({"preprocessor_config": {"do_convert_rgb": None, "resample": None, "size": None}}, (224, 256, 3, [0.5] * 3)),
        (
            {"preprocessor_config": {"size": 56, "resample": 0, "image_mean": [0.0, 0.1, 0.2]}},
            (56, 16, 0, [0.0, 0.1, 0.2]),
        ),
        ({"processor_config": {"image_processor": {"size": {"height": 28, "width": 28}}}}, (28, 4, 3, [0.5] * 3)),
    ],
)
def test_sparse_folders(files, expected, small_tokenizer, tmp_path):
    found = Processor.from_pretrained(folder_with(tmp_path, small_tokenizer, **files))
    assert (found.image_size, found.num_image_tokens, found.resample, found.mean) == expected


@pytest.mark.parametrize(
    "files, message",
    [
        ({"config": {"image_token_index": 257152}}, "another model"),
        ({"config": {"vision_config": {"image_size": 448}}, "preprocessor_config": {"size": 224}}, "448"),
        ({"config": {"image_token_id": 5}}, "another model"),
        (
            {"config": {"vision_config": {"patch_size": 16}}, "preprocessor_config": {"image_seq_length": 256}},
            "196 patches",
        ),
        ({"preprocessor_config": {"image_mean": [0.5, 0.5]}}, "one number or three"),
        ({"preprocessor_config": {"image_std": [0.5, 0.5, 0]}}, "positive"),
        ({"preprocessor_config": {"size": {"height": 224, "width": 112}}}, "only square images"),
        ({"preprocessor_config": {"size": {"shortest_edge": 224}}}, "only square images"),
        ({"preprocessor_config": {"do_resize": False}}, "sets do_resize to False, but only True"),
        ({"preprocessor_config": {"do_rescale": False}}, "sets do_rescale to False"),
        ({"preprocessor_config": {"do_normalize": False}}, "sets do_normalize to False"),
        ({"preprocessor_config": {"rescale_factor": 1 / 127.5}}, "sets rescale_factor to 0.0078"),
        ({"preprocessor_config": {"rescale_factor": "1/255"}}, "sets rescale_factor to '1/255'"),
        ({"preprocessor_config": {"do_center_crop": True}}, "sets do_center_crop to True"),
        ({"preprocessor_config": {"image_seq_length": 256.0}}, "image_seq_length must be an integer .*, not 256.0"),
        ({"preprocessor_config": {"image_seq_length": "256"}}, "image_seq_length must be an integer .*, not '256'"),
        ({"preprocessor_config": {"size": 224.0}}, "image size .* must be an integer .*, not 224.0"),
        ({"preprocessor_config": {"size": "224"}}, "image size .* must be an integer .*, not '224'"),
        ({"preprocessor_config": {"size": {"height": -28, "width": -28}}}, "image size .* not -28"),
        ({"preprocessor_config": {"size": 10**9}}, "image size .* from 1 to 8192, not 1000000000"),
        ({"preprocessor_config": {"size": True}}, "image size .* not True"),
        ({"config": {"vision_config": {"patch_size": 0}}}, "patch_size .* from 1 to 224, not 0"),
        ({"config": {"vision_config": {"patch_size": [14]}}}, r"patch_size .* not \[14\]"),
        ({"config": {"vision_config": {"image_size": "224"}}}, "image size .* not '224'"),
        ({"config": {"vision_config": [1]}}, "vision_config in .*config.json must be a JSON object"),
        ({"processor_config": {"image_processor": "siglip"}}, "image_processor in .* must be a JSON object"),
        ({"preprocessor_config": {"resample": "bicubic"}}, "'bicubic' is not a valid Resampling"),
        ({"preprocessor_config": {"image_mean": "gray"}}, "mean must be one number or three"),
        ({"preprocessor_config": {"image_mean": "1"}}, "mean must be one number or three"),
        ({"preprocessor_config": {"image_mean": ["0.5"] * 3}}, "mean must be one number or three"),
        ({"preprocessor_config": {"image_mean": {"r": 0.5}}}, "mean must be one number or three"),
        ({"preprocessor_config": {"image_mean": [[0.5], 1, 2]}}, "mean must be one number or three"),
        ({"preprocessor_config": {"image_std": [0.5, 0.5, 10**400]}}, "std must be one number or three"),
        ({"tokenizer_config": {"padding_side": ["left"]}}, "padding_side must be"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json is not valid JSON"),
        ({"preprocessor_config": "version https://git-lfs.github.com/spec/v1\noid"}, "preprocessor.*git lfs pull"),
        ({"config": "version https://git-lfs.github.com/spec/v1\noid"}, "config.json is not valid JSON .*git lfs pull"),
        ({"tokenizer": "version https://git-lfs.github.com/spec/v1\noid"}, "not a tokenizer .*git lfs pull"),
        ({"preprocessor_config": "{"}, "not valid JSON"),
        ({"config": "[]"}, "JSON object"),
        ({"tokenizer": "{}"}, "not a tokenizer"),
    ],
)
def test_contradictory_folders(files, message, small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users of the package
    with pytest.raises(ValueError, match=message) as caught:
        Processor.from_pretrained(folder_with(tmp_path, small_tokenizer, **files))
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_files(small, tmp_path, monkeypatch):
    small.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def half(path, text, encoding):
        path.open("w").write(text[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="tokenizer.json could not be saved .*No space left"):
        small.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Processor.from_pretrained(tmp_path)


# --- the small tokenizer -------------------------------------------------------------------------------------------


def test_ids_of_the_small_tokenizer(small_tokenizer):
    size, find = small_tokenizer.get_vocab_size(), small_tokenizer.token_to_id
    assert [find(t) for t in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\n", "<0x00>", "<0xFF>")] == [
        *(0, 1, 2, 3, 4, 5, 6, 261),
    ]
    assert [find(token) for token in [*LOC_TOKENS, *SEG_TOKENS, IMAGE]] == list(range(size - 1153, size))
    assert sorted(small_tokenizer.get_vocab().values()) == list(range(size))  # no gaps
    assert size <= 2400


def test_words_are_single_tokens(small_tokenizer):
    split = [w for word in WORDS for w in (word, " " + word) if len(small_tokenizer.encode(w).ids) != 1]
    assert not split
    assert small_tokenizer.encode("a cat ; 42 dogs?").tokens == ["a", "▁cat", "▁;", "▁", "4", "2", "▁dogs", "?"]


def test_training_a_tokenizer_is_deterministic():
    assert train_tokenizer(TEXTS, 2000).to_str() == train_tokenizer(iter(TEXTS), 2000).to_str()
    assert train_tokenizer(TEXTS, 1520).get_vocab_size() == 1520
    assert train_tokenizer([], 1510 + 500).get_vocab_size() == 1510
    with pytest.raises(ValueError, match="at least 1510"):
        train_tokenizer(TEXTS, 1509)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_any_text_round_trips(small_tokenizer, text):
    """ "▁" means a space and is decoded as one, as in Gemma. All other text is unchanged."""
    ids = small_tokenizer.encode(text, add_special_tokens=False).ids
    assert small_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 3 not in ids or "<unk>" in text


def test_importing_does_not_import_transformers():
    code = "import sys, minivlm.processor; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
