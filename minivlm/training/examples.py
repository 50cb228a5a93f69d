"""Examples to fine-tune on, from the files that people have. Images stay on disk until a batch needs them.

    annotations.jsonl     {"image": "cat.jpg", "prefix": "caption en", "suffix": "a cat"} on each line
    a folder              train/annotations.jsonl and, if there are, valid/ and test/
    COCO                  a .json file, or a folder with train/_annotations.coco.json
    YOLO                  a data.yaml, or the folder with one: labels/cat.txt beside images/cat.jpg

Images of JSONL and COCO are named relative to their file. Each image with boxes of COCO or YOLO becomes one example,
``detect a ; b`` with all classes that it shows, as PaliGemma is trained (locations.py).

Sources: COCO https://cocodataset.org/#format-data; YOLO https://docs.ultralytics.com/datasets/detect.
"""

import json
import os.path
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minivlm import hub, locations
from minivlm.locations import Detection
from minivlm.processor import Processor

SPLITS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}  # name → names of its folder
KEYS = {"image", "prefix", "suffix"}
IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SLACK = 1.0  # pixels by which the rounded box of another tool may be outside the image


class DataError(ValueError):
    """What is wrong with the data, in one sentence.

    An error in a DataLoader's worker arrives here as a whole traceback. Only its last line is kept.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().rpartition(f"{__name__}.DataError: ")[2])


@dataclass(frozen=True)
class Example:
    """An image, what is asked about it, and the answer to learn.

    Attributes:
        source: Where it is written, such as "train/annotations.jsonl, line 3".
    """

    image: Path
    prefix: str
    suffix: str
    source: str

    @property
    def task(self) -> str:
        """The first word of the prompt: "caption", "answer", "detect" …"""
        return self.prefix.split(" ")[0] or "(no prompt)"


def read_examples(data: str | Path, images: str | Path | None = None) -> dict[str, list[Example]]:
    """Split ("train", "valid", "test") → its examples.

    Args:
        data: A file or folder as above. A single .jsonl or .json file is "train".
        images: Folder of the images, if they are not beside their file.

    Raises:
        DataError: If something in it is not as it should be. The message names the file and the line.
    """
    data, images = Path(data), Path(images) if images is not None else None
    if images is not None and not images.is_dir():
        raise DataError(f"There is no folder {str(images)!r} with images: check the path.")
    files = find_files(data)
    if not files:
        known = "a .jsonl file, a COCO .json file, a YOLO data.yaml, or a folder with train/annotations.jsonl"
        raise DataError(f"{str(data)!r} is not {known}." if data.exists() else f"There is no data at {str(data)!r}.")
    found = {}
    for split, file in files.items():
        read = {".jsonl": read_jsonl, ".json": read_coco}.get(file.suffix)
        examples = list(read(file, images or file.parent) if read else read_yolo(file, split))
        if not examples:
            raise DataError(f"{file} has no examples for {split!r}: it has no lines, or no image in it has a box.")
        found[split] = examples
    check_images([example for examples in found.values() for example in examples])
    return found


def find_files(data: Path) -> dict[str, Path]:
    """Split → the file that describes it. Empty if there are none."""
    if data.is_file():
        if data.suffix in (".yaml", ".yml"):
            return dict.fromkeys(yolo_splits(data), data)
        return {"train": data} if data.suffix in (".jsonl", ".json") else {}
    files = {}
    for split, names in SPLITS.items():
        offered = [data / n / file for n in names for file in ("annotations.jsonl", "_annotations.coco.json")]
        if there := [file for file in offered if file.is_file()]:
            files[split] = there[0]
    if files:
        return files
    if (data / "data.yaml").is_file():
        return find_files(data / "data.yaml")
    return {"train": data / "annotations.jsonl"} if (data / "annotations.jsonl").is_file() else {}


def check_images(examples: Sequence[Example]) -> None:
    """Check that every image is there and begins like one. Its pixels are read when they are needed."""
    checked = set()
    for example in examples:
        if example.image in checked:
            continue
        checked.add(example.image)
        if not os.path.isfile(example.image):
            raise DataError(f"{example.source}: there is no image {str(example.image)!r}.")
        try:
            with Image.open(example.image):
                pass
        except Exception as error:  # PIL's readers raise errors of many kinds
            unreadable = f"{str(example.image)!r} cannot be read as an image"
            raise DataError(f"{example.source}: {unreadable} ({hub.printable(error)}).") from error


# --- JSONL ----------------------------------------------------------------------------------------------------------


def read_jsonl(file: Path, images: Path) -> Iterator[Example]:
    """One example per line. Empty lines are skipped."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                yield parse_line(line, images, f"{file}, line {number}")
            except ValueError as error:
                raise DataError(f"{file}, line {number}: {error}") from error


def parse_line(line: bytes, images: Path, source: str) -> Example:
    """One line of JSONL.

    Raises:
        ValueError: If it is not an object with the three texts, or its suffix cannot be learned.
    """
    try:
        values = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({hub.printable(error)}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"it must be an object with {', '.join(sorted(KEYS))}, not {hub.printable(values, 40)}.")
    for problem, keys in (("has no", KEYS - set(values)), ("has the unknown key", set(values) - KEYS)):
        if keys:
            raise ValueError(f"it {problem} {hub.printable(min(keys), 40)!r}: expected {', '.join(sorted(KEYS))}.")
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, not {hub.printable(value, 40)}.")
        if "<image>" in value or not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{name} contains <image>, which the processor adds, or half a character.")
    for name in ("image", "suffix"):
        if not values[name].strip():
            raise ValueError(f"{name} is empty.")
    if "<loc" in values["suffix"] and (problems := locations.parse_detections(values["suffix"], 1, 1).problems):
        raise ValueError(f"the boxes in its suffix cannot be read. {problems[0]}")
    return Example(images / values["image"], values["prefix"], values["suffix"], source)


# --- boxes ----------------------------------------------------------------------------------------------------------


def detect_example(
    image: Path, boxes: Sequence[Detection], width: Real, height: Real, names: Sequence[str], source: str
) -> Example:
    """``detect a ; b`` with the classes that an image shows, in the order of ``names``, each from left to right."""
    order = {name: i for i, name in enumerate(names)}
    boxes = sorted(boxes, key=lambda d: (order[d.label], d.box[0], d.box[1]))
    classes = list(dict.fromkeys(d.label for d in boxes))
    suffix = locations.format_detections(boxes, width, height)
    return Example(image, f"detect {locations.SEPARATOR.join(classes)}", suffix, source)


def clip_box(box: Sequence[Real], width: Real, height: Real, slack: Real) -> tuple[Real, Real, Real, Real]:
    """A box (x0, y0, x1, y1) without what rounding put outside the image.

    Raises:
        ValueError: If more of it than that is outside, or it is empty.
    """
    x0, y0, x1, y1 = box
    if not (-slack <= x0 < x1 <= width + slack and -slack <= y0 < y1 <= height + slack):  # NaN fails too
        corners = ", ".join(f"{v:g}" for v in box)
        raise ValueError(f"the box from ({corners}) is empty or outside the image of {width:g} × {height:g}.")
    return max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)


def read_coco(file: Path, images: Path) -> Iterator[Example]:
    """The images of a COCO file that have boxes. Crowds, which are not single objects, are left out."""
    content = hub.read_json(file)
    try:
        names = {entry["id"]: str(entry["name"]).strip() for entry in content["categories"]}
        entries = {entry["id"]: entry for entry in content["images"]}
        boxes: dict = {key: [] for key in entries}
        for annotation in content["annotations"]:
            if annotation.get("iscrowd"):
                continue
            source = f"{file}, annotation {annotation.get('id')}"
            if annotation["image_id"] not in entries or annotation["category_id"] not in names:
                raise DataError(f"{source}: its image_id or category_id is not in the file.")
            entry = entries[annotation["image_id"]]
            try:
                x, y, w, h = map(float, annotation["bbox"])
                box = clip_box((x, y, x + w, y + h), entry["width"], entry["height"], SLACK)
            except ValueError as error:
                raise DataError(f"{source}: {error}") from error
            boxes[entry["id"]].append(Detection(names[annotation["category_id"]], box))
        for key, found in boxes.items():
            entry, source = entries[key], f"{file}, image {key}"
            if found:
                size = entry["width"], entry["height"]
                yield detect_example(images / entry["file_name"], found, *size, [*names.values()], source)
    except (LookupError, TypeError, AttributeError) as error:
        missing = "images (id, file_name, width, height), categories (id, name) and annotations (image_id, bbox …)"
        raise DataError(f"{file} is not a COCO file: it needs {missing} ({hub.printable(repr(error))}).") from error
    except ValueError as error:
        raise DataError(str(error) if isinstance(error, DataError) else f"{file}: {error}") from error


def read_yaml(file: Path) -> dict:
    """The content of a data.yaml."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        names = content["names"]
        names = names if isinstance(names, dict) else dict(enumerate(names))
        return content | {"names": {int(key): str(name).strip() for key, name in names.items()}}
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError) as error:
        raise DataError(f"{file} is not a YOLO data.yaml with names ({hub.printable(error)}).") from error


def yolo_splits(file: Path) -> list[str]:
    """Which splits a data.yaml has."""
    content = read_yaml(file)
    return [split for split, names in SPLITS.items() if any(content.get(name) for name in names)]


def yolo_folder(file: Path, content: dict, split: str) -> Path:
    """The folder with the images of a split. Exports that say ``../train/images`` mean ``train/images``."""
    given = next(str(content[name]) for name in SPLITS[split] if content.get(name))
    root = file.parent / str(content.get("path") or "")
    root = root if root.is_dir() else file.parent
    folder = next((f for f in (root / given, root / given.removeprefix("../")) if f.is_dir()), None)
    if folder is None:
        raise DataError(f"{file}: there is no folder {given!r} with the images of {split!r}.")
    return folder / "images" if (folder / "images").is_dir() else folder


def read_yolo(file: Path, split: str) -> Iterator[Example]:
    """The images of a YOLO data set that have boxes: lines "class x y width height", as fractions of the sides."""
    content = read_yaml(file)
    folder, names = yolo_folder(file, content, split), content["names"]
    for image in sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS):
        head, _, tail = str(image).rpartition(f"{os.sep}images{os.sep}")
        labels = Path(head or image.parent, "labels", tail or image.name).with_suffix(".txt")
        lines = labels.read_text(encoding="utf-8", errors="replace").splitlines() if labels.is_file() else []
        boxes = []
        for number, line in enumerate(lines, start=1):
            try:
                if line.strip():
                    boxes.append(parse_yolo(line, names))
            except ValueError as error:
                raise DataError(f"{labels}, line {number}: {error}") from error
        if boxes:
            try:
                yield detect_example(image, boxes, 1, 1, list(names.values()), str(labels))
            except ValueError as error:
                raise DataError(f"{labels}: {error}") from error


def parse_yolo(line: str, names: dict[int, str]) -> Detection:
    """One line of YOLO labels → a box as fractions of the image's sides. An outline's points become its box."""
    try:
        number, *values = line.split()
        number, values = int(number), [float(value) for value in values]
    except ValueError as error:
        raise ValueError(f"it must be a class and numbers, not {hub.printable(line, 40)!r}.") from error
    if number not in names:
        raise ValueError(f"its class {number} is not among the {len(names)} names of data.yaml.")
    if len(values) == 4:
        box = yolo_box(*values)
    elif len(values) >= 6 and len(values) % 2 == 0:
        box = min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])
    else:
        raise ValueError(f"it must have 4 numbers after the class, or the points of an outline, not {len(values)}.")
    return Detection(names[number], clip_box(box, 1, 1, 1e-2))


def yolo_box(x: Real, y: Real, width: Real, height: Real) -> tuple[Real, Real, Real, Real]:
    """Center and size → corners (x0, y0, x1, y1)."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


# --- batches --------------------------------------------------------------------------------------------------------


class ExampleBatches(Dataset):
    """Item ``i`` is the batch of step ``i``: all examples in random order, then again in another, without an end.

    Args:
        batch_size: Examples per step, of all processes together.
        seed: Of the order.
        rank: Of this process.
        world_size: How many processes share each step.

    Raises:
        ValueError: If the processes cannot share the examples equally.
    """

    def __init__(
        self,
        processor: Processor,
        examples: Sequence[Example],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size % world_size:
            raise ValueError(
                f"{world_size} processes cannot share a batch of {batch_size} equally. Change one of the numbers."
            )
        self.processor, self.examples, self.batch_size, self.seed = processor, examples, batch_size, seed
        self.share = range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._epoch, self._order = -1, np.arange(0)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        examples = [self.pick(step * self.batch_size + i) for i in self.share]
        prefixes, suffixes = [e.prefix for e in examples], [e.suffix for e in examples]
        return self.processor.tokenize(prefixes, suffixes, "right") | {
            "pixel_values": self.processor.preprocess_images([self.open(e) for e in examples])
        }

    def pick(self, position: int) -> Example:
        """The example at a position in the endless order."""
        epoch, index = divmod(position, len(self.examples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.examples))
        return self.examples[self._order[index]]

    def open(self, example: Example) -> np.ndarray:
        """The image of an example at the model's size, H × W × 3 bytes."""
        try:
            return self.processor.load_and_resize(example.image)
        except ValueError as error:
            raise DataError(f"{example.source}: {error}") from error
