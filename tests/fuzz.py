"""A fuzzer: damages files, images, prompts and command lines, and checks what comes of it.

    python tests/fuzz.py --cases 5000 --seed 0 --only weights images

Each case must end in one of these ways:

    same     it works, and the answer is that of the undamaged original
    other    it works, and the answer is another one, which is right if the damage is a legitimate value
    refused  one ValueError or OSError whose message is one line

Which of them are right, the case says: ``SAME`` must work and change nothing; ``REFUSED`` must be refused; ``UNREAD``
is the same answer or a refusal, because the damaged part means nothing or is not used; ``OTHER`` may be any of the
three, but an answer must be finite. Legitimate are other numbers (a norm's epsilon, an image's mean, a flipped bit in
the data of a weight), flags, defaults of what is missing, other pixels, prompts and options.

Anything else is a finding: another exception, a message of several lines, a wrong or infinite answer, or no answer
after ten seconds. The line below a finding is what to run to see it again.
"""

import argparse
import contextlib
import io
import json
import math
import random
import signal
import struct
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from conftest import tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file

from minivlm.__main__ import main as command_line
from minivlm.generation import generate_ids
from minivlm.locations import parse_detections
from minivlm.paligemma import PaliGemma
from minivlm.processor import Processor
from minivlm.training.tokenizer import train_tokenizer
from minivlm.vqvae import MaskVQVAE

SAME, REFUSED, UNREAD, OTHER = "same", "refused", "unread", "other"
RIGHT = {SAME: {"same"}, REFUSED: {"refused"}, UNREAD: {"same", "refused"}, OTHER: {"same", "other", "refused"}}
TIME_LIMIT = 10  # seconds per case
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
EMBEDDING = "language_model.model.embed_tokens.weight"


@dataclass
class Case:
    """One input: what was damaged and how, which outcomes are right, and how to get the answer."""

    damage: str
    expected: str
    answer: Callable[[], object]
    original: object = None  # the answer without damage; unequal to every answer if there is none


class Hang(BaseException):
    """Raised by the timer. Not an Exception, so that no handler in the package catches it."""


class Bench:
    """The undamaged files in a folder, and their answers."""

    def __init__(self, folder: Path):
        words = ["caption en", "answer en what is left of the red circle?", "detect cat ; dog", "a cat and two dogs"]
        self.processor = Processor(train_tokenizer(words, 1600), image_size=12, num_image_tokens=9)
        model = tiny_model(2, vocab_size=self.processor.tokenizer.get_vocab_size())
        model.config.image_token_index = self.processor.image_token_id
        self.folder, self.damaged = folder / "whole", folder / "damaged"
        self.damaged.mkdir()
        model.save_pretrained(self.folder)
        self.processor.save_pretrained(self.folder)
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
        self.image.save(folder / "image.png")
        self.files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        self.weights = load_file(self.folder / "model.safetensors")
        torch.manual_seed(0)
        vqvae = MaskVQVAE()
        vqvae._vq_vae._embedding.normal_()
        vqvae.save_pretrained(folder)
        self.vqvae = (folder / "vae-emoji.npz").read_bytes()
        self.arrays = dict(np.load(folder / "vae-emoji.npz"))
        self.image_path = folder / "image.png"
        self.answers = {"model": self.ask(self.folder), "masks": self.decode(folder / "vae-emoji.npz")}

    def write(self, files: dict[str, bytes | None]) -> None:
        """Puts the checkpoint into ``damaged``, with some files replaced, and without those that are None."""
        for file in self.damaged.iterdir():
            file.unlink()
        for name, content in (self.files | files).items():
            if content is not None:
                (self.damaged / name).write_bytes(content)

    def ask(self, folder: Path) -> torch.Tensor:
        """Two new tokens and their log-probabilities."""
        model, processor = PaliGemma.from_pretrained(folder), Processor.from_pretrained(folder)
        found = generate_ids(model, processor("caption en", self.image), max_new_tokens=2)
        return torch.cat((found.sequences.float(), found.log_probs))

    def decode(self, path: Path) -> torch.Tensor:
        with torch.no_grad():
            return MaskVQVAE.from_pretrained(path).decode(torch.arange(16)[None])

    def checkpoint_case(self, damage: str, expected: str, files: dict[str, bytes | None]) -> Case:
        def answer():
            self.write(files)
            return self.ask(self.damaged)

        return Case(damage, expected, answer, self.answers["model"])

    def masks_case(self, damage: str, expected: str, content: bytes) -> Case:
        def answer():
            (self.damaged / "vae-odd.npz").write_bytes(content)
            return self.decode(self.damaged / "vae-odd.npz")

        return Case(damage, expected, answer, self.answers["masks"])


def damaged_bytes(rng: random.Random, content: bytes, start: int = 0, end: int | None = None) -> tuple[str, bytes]:
    """One to three bytes between ``start`` and ``end`` changed."""
    changed = bytearray(content)
    positions = [rng.randrange(start, end or len(content)) for _ in range(rng.randint(1, 3))]
    for position in positions:
        changed[position] ^= rng.randrange(1, 256)
    return f"bytes {positions} changed", bytes(changed)


# --- configs -------------------------------------------------------------------------------------------------------

NONSENSE = ["x", "1", "", [], [1], ["a"], {}, {"a": 1}, True, False, math.nan, math.inf, -math.inf, -1, -0.5, 10**30]
NUMBERS = [0, 1, 2, 3, 0.5, 1e-9, 1e9, 10**9, 100_000, 1e308, 1e-300, 256, 12.0]
RAW = [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"9" * 5000, POINTER, b"\0" * 100]


def paths(values: dict, prefix: tuple = ()) -> list[tuple]:
    """The keys of nested objects, as paths."""
    found = [(*prefix, key) for key in values]
    return found + [p for key, value in values.items() if isinstance(value, dict) for p in paths(value, (*prefix, key))]


def configs(rng: random.Random, bench: Bench) -> Case:
    """JSON files: config.json, preprocessor_config.json, tokenizer_config.json."""
    name = rng.choice(["config.json", "config.json", "preprocessor_config.json", "tokenizer_config.json"])
    values = json.loads(bench.files[name])
    kind = rng.choice(["raw"] + ["nonsense"] * 6 + ["number"] * 4 + ["missing", "null", "unknown", "shuffled"])
    if kind == "raw":
        content = rng.choice(RAW)
        return bench.checkpoint_case(f"{name} is {content[:20]!r}", REFUSED, {name: content})
    if kind in ("unknown", "shuffled"):
        more = {"x" * rng.randint(1, 9): rng.choice(NONSENSE)} if kind == "unknown" else {}
        keys = rng.sample(list(values), len(values))
        content = json.dumps({key: values[key] for key in keys} | more, indent=rng.choice([None, 3])).encode()
        return bench.checkpoint_case(f"{name}, {kind} keys", SAME, {name: content})
    path = rng.choice(paths(values))
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    if kind == "missing":
        del parent[path[-1]]
        value = "missing"
    else:
        value = parent[path[-1]] = rng.choice({"nonsense": NONSENSE, "number": NUMBERS, "null": [None]}[kind])
    # false and 1 are values of flags, and every string is one of free text
    legitimate = kind != "nonsense" or value in (True, False) or (isinstance(value, int) and path[-1] == "dtype")
    legitimate |= isinstance(value, int | float) and path[-1] == "image_mean"  # any number
    return bench.checkpoint_case(
        f"{name}, {'.'.join(path)}: {value!r}", OTHER if legitimate else UNREAD, {name: json.dumps(values).encode()}
    )


# --- weights -------------------------------------------------------------------------------------------------------


def safetensors(weights: dict[str, torch.Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, f"{folder}/x")
        return Path(folder, "x").read_bytes()


def weights(rng: random.Random, bench: Bench) -> Case:
    """model.safetensors: its bytes, header and tensors."""
    file, whole = "model.safetensors", bench.files["model.safetensors"]
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    tensors = {name: tensor.clone() for name, tensor in bench.weights.items()}
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    expected, content = REFUSED, None
    kind = rng.choice(
        ["truncated", "header", "header", "data", "zeros", "raw", "nan", "inf", "rename", "drop", "extra", "shape"]
        + ["integer", "escape", "twice", "half", "head", "other head", "layout", "shards", "lost shard", "index"]
    )
    if kind == "truncated":
        content = whole[: rng.randrange(len(whole))]
    elif kind == "header":
        damage, content = damaged_bytes(rng, whole, 0, header)
        kind, expected = f"header, {damage}", UNREAD
    elif kind == "data":
        damage, content = damaged_bytes(rng, whole, header)
        kind, expected = f"data, {damage}", OTHER
    elif kind == "zeros":
        size = rng.randrange(len(whole) // 10, len(whole) - header)
        content = whole[:-size] + bytes(size)
    elif kind == "raw":
        content = rng.choice([b"", POINTER, b"\xff" * 100, bytes(1000), b"PK\x03\x04", struct.pack("<Q", 2**60)])
    elif kind in ("nan", "inf"):
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([1, -1]) * float(kind)
        expected = REFUSED
    elif kind == "rename":
        tensors[rng.choice([name + "x", "x." + name, name.upper(), name.replace("weight", "bias") + "2"])] = tensor
        del tensors[name]
    elif kind == "drop":
        del tensors[name]
    elif kind == "extra":
        tensors["language_model.model.layers.9.input_layernorm.weight"] = torch.ones(3)
    elif kind == "shape":
        tensors[name] = tensor[None] if rng.random() < 0.5 else torch.cat((tensor, tensor))
    elif kind == "integer":
        tensors[name] = tensor.to(rng.choice([torch.int8, torch.int64, torch.bool]))
    elif kind == "escape":
        tensors["\x1b[31m\n\u202e" * rng.randint(1, 1000)] = torch.ones(1)
    elif kind == "twice":
        tensors[f"model.{name}"] = tensor.clone()
    elif kind == "half":
        expected, tensors = OTHER, {key: value.bfloat16() for key, value in tensors.items()}
    elif kind == "head":
        expected = SAME
        tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        if rng.random() < 0.5:
            del tensors[EMBEDDING]
    elif kind == "other head":
        tensors["lm_head.weight"] = tensors[EMBEDDING] + 1
    elif kind == "layout":
        expected = SAME
        tensors = {"model." + key.replace("language_model.model.", "language_model."): x for key, x in tensors.items()}
    elif kind in ("shards", "lost shard", "index"):
        keys = rng.sample(list(tensors), len(tensors))
        parts = [keys[i :: rng.randint(1, 4)] for i in range(4)] if kind == "lost shard" else [keys[::2], keys[1::2]]
        files = {f"m{i}.safetensors": safetensors({key: tensors[key] for key in part}) for i, part in enumerate(parts)}
        index = {"weight_map": {key: f"m{i}.safetensors" for i, part in enumerate(parts) for key in part}}
        index = json.dumps(index).encode()
        if kind == "lost shard":
            files["m0.safetensors"] = None
        if kind == "index":
            index = rng.choice([*RAW, index.replace(b"m0", b"../m0"), index.replace(b"m0.safe", b"m0\\n")])
        files |= {file: None, "model.safetensors.index.json": index}
        return bench.checkpoint_case(kind, SAME if kind == "shards" else REFUSED, files)
    if content is None:
        kind, content = f"{kind} ({name})", safetensors(tensors)
    return bench.checkpoint_case(kind, expected, {file: content})


# --- masks ---------------------------------------------------------------------------------------------------------


def npz(arrays: dict[str, np.ndarray], **raw: bytes) -> bytes:
    """A .npz file. ``raw`` is content of further entries, or of these arrays in place of their own."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED if raw else zipfile.ZIP_STORED) as file:
        for name in {**arrays, **raw}:
            entry = io.BytesIO()
            if name not in raw:
                np.save(entry, arrays[name])
            file.writestr(f"{name}.npy", raw.get(name, entry.getvalue()))
    return content.getvalue()


def masks(rng: random.Random, bench: Bench) -> Case:
    """The .npz file of the mask VQ-VAE: its bytes, headers and arrays."""
    whole, arrays = bench.vqvae, dict(bench.arrays)
    name = rng.choice(list(arrays))
    expected, content = REFUSED, None
    kind = rng.choice(["truncated", "bytes", "bytes", "nan", "inf", "rename", "drop", "extra", "shape", "integer"] * 2
                      + ["raw", "double", "bomb", "huge", "object", "header"])  # fmt: skip
    if kind == "truncated":
        content = whole[: rng.randrange(len(whole))]
    elif kind == "bytes":
        near_end = rng.random() < 0.5  # where the zip's directory is
        damage, content = damaged_bytes(rng, whole, len(whole) - 4000 if near_end else 0)
        kind, expected = damage, UNREAD
    elif kind == "raw":
        content = rng.choice([b"", POINTER, b"PK\x03\x04", b"\x93NUMPY\x01\x00", bytes(1000)])
    elif kind in ("nan", "inf"):
        arrays[name] = arrays[name].copy()
        arrays[name].flat[rng.randrange(arrays[name].size)] = float(kind)
    elif kind == "rename":
        arrays[name + "\n\x1b[31m"] = arrays.pop(name)
    elif kind == "drop":
        del arrays[name]
    elif kind == "extra":
        arrays["more"] = np.zeros(3, np.float16)
    elif kind == "shape":
        arrays[name] = arrays[name][None]
    elif kind == "integer":
        arrays[name] = arrays[name].astype(rng.choice([np.int8, np.int64, np.bool_, np.complex64]))
    elif kind == "double":
        expected, arrays[name] = SAME, arrays[name].astype(rng.choice([np.float64, np.float32, ">f4"]))
    elif kind == "bomb":
        content = npz(arrays, **{rng.choice([name, "bomb"]): bytes(20_000_000)})
    elif kind == "object":
        arrays[name] = np.array([{}] * 3, dtype=object)
    else:
        entry = io.BytesIO()
        np.save(entry, arrays[name])
        entry = entry.getvalue()
        entry = damaged_bytes(rng, entry, 0, 118)[1] if kind == "header" else entry.replace(b"(", b"(999999999999, ", 1)
        expected, content = UNREAD if kind == "header" else REFUSED, npz(arrays, **{name: entry})
    return bench.masks_case(f"{kind} ({name})", expected, npz(arrays) if content is None else content)


# --- images --------------------------------------------------------------------------------------------------------


def images(rng: random.Random, bench: Bench) -> Case:
    """Image files: truncated, with changed bytes, of odd modes and sizes; and arrays."""
    mode = rng.choice(
        ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "I", "F", "I;16", "RGBX"]
    )
    size = rng.choice([(1, 1), (30, 20), (1, 300), (300, 1), (12, 12), (0, 5), (7, 0)])
    kind = rng.choice(["truncated", "bytes", "bytes", "mode", "array", "raw"])
    if kind == "mode":
        values = np.random.default_rng(rng.randrange(999)).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        image = Image.fromarray(values).convert("L").convert(mode) if mode[0] in "IF" else Image.fromarray(values)
        with contextlib.suppress(ValueError):  # conversions that PIL does not have
            image = image.convert(mode)
        return Case(f"mode {mode}, {size}", OTHER, lambda: bench.processor.preprocess_images([image]))
    if kind == "array":
        shape = rng.choice([(), (3,), (5, 5), (5, 5, 3), (5, 5, 4), (3, 5, 5), (0, 5, 3), (1, 5, 5, 3)])
        array = np.ones(shape, rng.choice([np.uint8, np.float32, np.int64, np.bool_]))
        is_right = array.dtype == np.uint8 and shape == (5, 5, 3)
        expected = OTHER if is_right else REFUSED
        return Case(f"{array.dtype} {shape}", expected, lambda: bench.processor.preprocess_images([array]))
    format = rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"])
    content = io.BytesIO()
    bench.image.save(content, format)
    whole, damage = content.getvalue(), kind
    path = bench.damaged.parent / f"image.{format.lower()}"
    path.write_bytes(whole)
    original = bench.processor.preprocess_images([path])
    if kind == "truncated":
        whole = whole[: rng.randrange(len(whole))]
    elif kind == "bytes":
        damage, whole = damaged_bytes(rng, whole)
    else:
        whole = rng.choice([b"", POINTER, b"<svg/>", bytes(100), bytes(4) + b"ftypheic", whole[:4] * 100])
    path.write_bytes(whole)
    expected = REFUSED if kind == "raw" else OTHER
    return Case(f"{format}, {damage}", expected, lambda: bench.processor.preprocess_images([path]), original)


# --- prompts -------------------------------------------------------------------------------------------------------

FRAGMENTS = ["caption en", "\n", " ", "\t", "<bos>", "<eos>", "<pad>", "<loc0001>", "<seg001>", "<loc9999>", "<", "é"]
FRAGMENTS += ["日本", "🐱‍👤", "\u202e", "\x00", "\x1b[31m", "a" * 500, ";", "cat", "<0x41>", "\u2028", "▁"]


def prompts(rng: random.Random, bench: Bench) -> Case:
    """Prompts, suffixes and answers of models: any text, and values that are no text."""
    text = "".join(rng.choices(FRAGMENTS, k=rng.randint(0, 12)))
    kind = rng.choice(
        ["text", "text", "suffix", "answer", "answer", "image token", "surrogate", "type", "pairs", "ids"]
    )
    process, image = bench.processor, bench.image
    if kind in ("text", "suffix"):
        suffix = {"suffix": text} if kind == "suffix" else {}

        def ids():
            batch = process(text, image, **suffix)
            assert batch["input_ids"].shape == batch["attention_mask"].shape
            return process.decode(batch["input_ids"][0, 10:], skip_special_tokens=False)

        is_plain = "▁" not in text and "<0x" not in text  # which mean a space and a byte
        expected = text + "\n" + (text + "<eos>" if suffix else "")
        return Case(f"{kind} {text!r}", SAME if is_plain else OTHER, ids, expected)
    if kind == "answer":
        locs = "".join(f"<loc{rng.randrange(1100):04d}>" for _ in range(rng.choice([3, 4, 4, 4, 5, 8])))
        text = "".join(rng.choices([*FRAGMENTS, locs, locs, " ; ", "<seg001>" * 16], k=rng.randint(0, 12)))
        return Case(f"answer {text!r}", OTHER, lambda: str(parse_detections(text, 64, 48)))
    if kind == "ids":
        wrong = rng.choice([-1, -100, 2**32, 2**70])
        return Case(f"ids {wrong}", REFUSED, lambda: process.decode([5, wrong]))
    arguments = {
        "image token": (text + "<image>", image),
        "surrogate": (text + "\ud800", image),
        "type": (rng.choice([None, 3, b"caption", ["a", 3], [], {}, [None]]), image),
        "pairs": ([text] * rng.choice([0, 2, 3]), rng.choice([image, [image], []])),
    }[kind]
    return Case(f"{kind} {arguments[0]!r}", REFUSED, lambda: process(*arguments))


# --- commands ------------------------------------------------------------------------------------------------------

OPTIONS = {
    "--image": ["absent.png", ".", "", "/dev/null", "\x00", "x" * 5000],
    "--prompt": ["", " ", "<image>", "a\udc80", "detect cat ; dog", "train", "\x1b[31m"],
    "--checkpoint": ["absent", ".", "", "/dev/null", "a/b/c", "../x"],
    "--device": ["tpu", "cuda:99", "", "cpu:0", "cpu"],
    "--dtype": ["int8", "float32", "bfloat16", "float64"],
    "--max-new-tokens": ["0", "-1", "1", "1e3", "nan", "9" * 30, "2"],
    "--temperature": ["0", "nan", "inf", "-1", "1e-50", "1e50", "0.5", "x"],
    "--top-k": ["0", "-1", "1", "9" * 30, "1.5"],
    "--top-p": ["0", "1", "1e-50", "nan", "-1", "2", "0.5"],
    "--seed": ["-1", "0", str(2**64), "x", "7"],
    "--masks": ["absent.npz", "", "/dev/null", "."],
    "--save": ["x.gif", "/dev/null/x.png", ".png", ""],
    "--revision": ["", "main"],
    "--nonsense": ["1"],
}
OTHERS = [[], ["--help"], ["x"], ["--version"], ["generate"], ["evaluate", "--scenes", "0"], ["train", "--seed"]]
OTHERS += [["evaluate", "--split", "x"], ["evaluate", "--json", "/dev/null/x"], ["demo", "--save", "x.gif"]]
OTHERS += [["grade", "/absent"], ["train", "--nonsense"], ["doctor", "--help"], ["--debug"], ["generate", "--help"]]


def commands(rng: random.Random, bench: Bench) -> Case:
    """Command lines. Their answer is what they print; an error of argparse is a refusal."""
    line = ["generate", "--image", str(bench.image_path), "--prompt", "caption en", "--checkpoint", str(bench.folder)]
    line += ["--max-new-tokens", "2", "--device", "cpu"]
    for option in rng.sample(list(OPTIONS), rng.randint(1, 3)):
        line += [option, rng.choice(OPTIONS[option])]
    line += ["--sample"] if rng.random() < 0.5 else []
    line = rng.choice(OTHERS) if rng.random() < 0.1 else line

    def answer():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = command_line(line)
            except SystemExit as left:
                code = left.code
                if code == 2:
                    raise ValueError(err.getvalue().strip().splitlines()[-1].replace("error: ", "")) from left
        if code == 2:
            raise ValueError(err.getvalue().strip().rpartition("minivlm ")[2])  # after the notes
        assert code == 0, f"exit code {code}"
        return out.getvalue()

    return Case(" ".join(line[9:] if line[:1] == ["generate"] else line), OTHER, answer)


# --- running them --------------------------------------------------------------------------------------------------

KINDS = {f.__name__: f for f in (configs, weights, masks, images, prompts, commands)}


def outcome(case: Case) -> str:
    """Runs a case. Returns "same", "other" or "refused", or else a description of what is wrong."""

    def stop(*_):
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT)
    try:
        answer = case.answer()
    except (ValueError, OSError) as error:
        if type(error) is not ValueError and not isinstance(error, OSError):
            return f"a {type(error).__name__}: {error}"
        text = str(error)
        return "refused" if text.strip() and text.isprintable() and len(text) < 12_000 else f"not one line: {text!r}"
    except Hang:
        return f"no answer after {TIME_LIMIT} seconds"
    except BaseException as error:
        return f"a {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(answer, torch.Tensor):
        if not bool(answer.isfinite().all()):
            return "an answer that is not finite"
        is_same = case.original is not None and torch.equal(answer, case.original)
    else:
        is_same = answer == case.original
    return "same" if is_same else "other"


def run(bench: Bench, kind: str, seed: int, number: int) -> tuple[str, str | None]:
    """Runs one case. Returns its outcome, and a description if that is a finding."""
    case = KINDS[kind](random.Random(f"{seed} {kind} {number}"), bench)
    found = outcome(case)
    if found in RIGHT[case.expected]:
        return found, None
    return "finding", f"{kind} {number}: {case.damage[:200]}: expected {case.expected}, but got {found[:400]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Damages inputs and checks what comes of it.")
    parser.add_argument("--cases", type=int, default=1000, help="cases of each kind; default: 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds; default: all")
    parser.add_argument("--number", type=int, help="run this case alone, with its traceback")
    args = parser.parse_args()
    outcomes, total = ("same", "other", "refused", "finding"), 0
    print(f"| kind | {' | '.join(outcomes)} |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for kind in args.only:
            if args.number is not None:
                print(KINDS[kind](random.Random(f"{args.seed} {kind} {args.number}"), bench).answer())
                continue
            counts = Counter()
            for number in range(args.cases):
                found, finding = run(bench, kind, args.seed, number)
                counts[found] += 1
                if finding:
                    print(
                        f"{finding}\n  python tests/fuzz.py --seed {args.seed} --only {kind} --number {number}",
                        flush=True,
                    )
            print(f"| {kind} | {' | '.join(str(counts[name]) for name in outcomes)} |", flush=True)
            total += counts["finding"]
    return min(total, 1)


if __name__ == "__main__":
    sys.exit(main())
