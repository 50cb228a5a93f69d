"""Lab L10: the pieces of an own PaliGemma that the chapters leave to the package."""

import json
import re

import numpy as np

from minivlm.course.exercises.exercise import Case, Exercise, Mistake

# --- L10.1 ----------------------------------------------------------------------------------------------------------

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_tensor(data, name):
    """One tensor of a safetensors file.

    The bytes of the file, uint8 [N], and the name of a tensor → the tensor in float32, in its shape.
    """
    raw = data.tobytes()
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])[name]
    begin, end = entry["data_offsets"]
    start = 8 + size
    values = np.frombuffer(raw[start + begin : start + end], DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32).reshape(entry["shape"])


def tensor_file(tensors):
    """The bytes of a safetensors file: name → (dtype, array)."""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, array) in tensors.items():
        stored = array.astype(np.float32)
        stored = (stored.view(np.uint32) >> 16).astype("<u2") if dtype == "BF16" else stored.astype(DTYPES[dtype])
        offsets = [len(body), len(body) + stored.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        body += stored.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return np.frombuffer(len(text).to_bytes(8, "little") + text + body, np.uint8).copy()


def tensor_cases(rng):
    """Files of three tensors: the wanted one is first, in the middle or last, and has one to four axes."""
    for dtype, shape, place, name in (
        ("F32", (3, 4), 0, "the first tensor"),
        ("F32", (5, 2), 1, "a tensor in the middle"),
        ("F16", (2, 3, 4), 2, "float16"),
        ("BF16", (4, 6), 1, "bfloat16"),
        ("BF16", (7,), 2, "bfloat16, one axis"),
        ("F32", (2, 3, 2, 2), 2, "four axes"),
    ):
        others = [("F32", rng.normal(0, 1, (2, 5))), ("F16", rng.normal(0, 1, (8,)))]
        others.insert(place, (dtype, rng.normal(0, 1, shape)))
        names = [f"layers.{i}.weight" for i in range(3)]
        yield Case((tensor_file(dict(zip(names, others, strict=True))), names[place]), name)


def _read(data, name, start=None, order="C", view=None, swap=False, bf16="shift"):
    """``read_tensor`` with one thing different."""
    raw = data.tobytes()
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])[name]
    begin, end = entry["data_offsets"]
    first = 8 + size if start is None else start(size)
    dtype = DTYPES[entry["dtype"]].replace("<", ">" if swap else "<")
    if bf16 == "half" and entry["dtype"] == "BF16":
        dtype = "<f2"
    values = np.frombuffer(raw[first + begin : first + end], dtype)
    if entry["dtype"] == "BF16" and bf16 != "half":
        wide = values.astype(np.uint32)
        values = (wide << 16).view(np.float32) if bf16 == "shift" else values
        values = wide.view(np.float32) if bf16 == "low" else values
    values = values.astype(np.float32)
    return view(values, entry["shape"]) if view else values.reshape(entry["shape"], order=order)


READ_TENSOR = Exercise(
    key="L10.1",
    reference=read_tensor,
    cases=tensor_cases,
    difficulty=2,
    minutes=20,
    hints=(
        (
            "Three parts: eight bytes with the length of the header, the header in JSON, the data. Offsets in the "
            "header count from the start of the data."
        ),
        (
            "`int.from_bytes(raw[:8], 'little')`, `json.loads`, `np.frombuffer(…, dtype)`. For bfloat16, read uint16, "
            "shift each number by 16 bits to the left in a uint32, and `.view(np.float32)`."
        ),
    ),
    mistakes=(
        Mistake(
            "counts the offsets from the start of the file",
            lambda data, name: _read(data, name, start=lambda size: 0),
            "The data starts after the eight bytes and the header: add `8 + size` to both offsets.",
        ),
        Mistake(
            "forgets the eight bytes before the header when it counts",
            lambda data, name: _read(data, name, start=lambda size: size),
            "The data starts at `8 + size`, not at `size`.",
        ),
        Mistake(
            "forgets the header when it counts",
            lambda data, name: _read(data, name, start=lambda size: 8),
            "The data starts after the header, at `8 + size`.",
        ),
        Mistake(
            "returns the values without their shape",
            lambda data, name: _read(data, name, view=lambda values, shape: values),
            "The header has the shape: `.reshape(entry['shape'])`.",
        ),
        Mistake(
            "fills the shape column by column",
            lambda data, name: _read(data, name, order="F"),
            "Values are stored in row-major order, which is what `reshape` assumes by default.",
        ),
        Mistake(
            "reverses the shape",
            lambda data, name: _read(data, name, view=lambda values, shape: values.reshape(shape[::-1])),
            "The shape in the header is that of the tensor. A linear layer's weight is [out, in].",
        ),
        Mistake(
            "transposes the tensor",
            lambda data, name: _read(data, name).T,
            "The shape in the header is that of the tensor. A linear layer's weight is [out, in].",
        ),
        Mistake(
            "reads bfloat16 as float16",
            lambda data, name: _read(data, name, bf16="half"),
            "They divide 16 bits differently: 8 bits of exponent in bfloat16, 5 in float16.",
        ),
        Mistake(
            "takes the bits of a bfloat16 for an integer",
            lambda data, name: _read(data, name, bf16="integer"),
            "The 16 bits are the upper half of a float32: shift them, then `.view(np.float32)`.",
        ),
        Mistake(
            "puts the bits of a bfloat16 into the lower half of a float32",
            lambda data, name: _read(data, name, bf16="low"),
            "They are the upper half: shift them by 16 to the left first.",
        ),
        Mistake(
            "reads the bytes of every number in reverse order",
            lambda data, name: _read(data, name, swap=True),
            "Numbers are little-endian: dtype '<f4'.",
        ),
        Mistake(
            "returns float64",
            lambda data, name: read_tensor(data, name).astype(np.float64),
            "Convert to float32 at the end: `.astype(np.float32)`.",
        ),
    ),
)


# --- L10.2 ----------------------------------------------------------------------------------------------------------


def own_name(name):
    """One short name for a weight, whichever of the three layouts a file uses. None for a stored output head."""
    if name.removeprefix("model.").removeprefix("language_model.") == "lm_head.weight":
        return None
    name = name.removeprefix("model.")
    if name.startswith("multi_modal_projector.linear."):
        return "projector." + name.removeprefix("multi_modal_projector.linear.")
    if name.startswith("vision_tower."):
        name = name.removeprefix("vision_tower.").removeprefix("vision_model.").removeprefix("encoder.")
        return "vision." + name
    return "text." + name.removeprefix("language_model.").removeprefix("model.")


def name_cases(rng):
    """Every kind of weight in all three layouts, with random layer numbers."""
    n, m = (int(i) for i in rng.integers(0, 40, 2))
    parts = [
        f"layers.{n}.self_attn.q_proj.weight",
        "embed_tokens.weight",
        "norm.weight",
        f"layers.{m}.mlp.up_proj.weight",
    ]
    tower = [f"encoder.layers.{m}.layer_norm1.bias", "embeddings.patch_embedding.weight", "post_layernorm.bias"]
    tower += [f"encoder.layers.{n}.self_attn.out_proj.weight"]
    for text, vision, other, layout in (
        ("language_model.model.", "vision_tower.vision_model.", "", "hub"),
        ("language_model.model.", "vision_tower.", "", "saved by transformers 5"),
        ("model.language_model.", "model.vision_tower.", "model.", "in the memory of transformers 5"),
    ):
        for part in parts:
            yield Case((text + part,), f"{layout}: {text}{part}")
        for part in tower:
            yield Case((vision + part,), f"{layout}: {vision}{part}")
        for part in ("weight", "bias"):
            projector = f"{other}multi_modal_projector.linear.{part}"
            yield Case((projector,), f"{layout}: {projector}")
        head = "lm_head.weight" if other else "language_model.lm_head.weight"
        yield Case((head,), f"{layout}: {head}")


def _renamed(change):
    """The right answer, changed by a function, wherever there is one."""

    def function(name):
        right = own_name(name)
        return None if right is None else change(name, right)

    return function


OWN_NAME = Exercise(
    key="L10.2",
    reference=own_name,
    cases=name_cases,
    difficulty=2,
    minutes=15,
    hints=(
        (
            "Take away what differs between the layouts from the left, piece by piece, and put one of three own "
            "prefixes in front."
        ),
        (
            "`removeprefix` removes a whole prefix or nothing. First the output head, then a leading `model.`, then "
            "one branch for each of projector, tower and text."
        ),
    ),
    mistakes=(
        Mistake(
            "expects the names of the hub's files only",
            _renamed(lambda name, right: f"text.{name}" if name.startswith("model.") else right),
            "In memory, transformers 5 puts `model.` in front of everything.",
        ),
        Mistake(
            "gives the output head a name of its own",
            lambda name: own_name(name) or "text.lm_head.weight",
            "The output head is the embedding table: return None for a stored copy.",
        ),
        Mistake(
            "gives a stored output head the name of the embedding table",
            lambda name: own_name(name) or "text.embed_tokens.weight",
            "Return None: the table itself is in the file, too.",
        ),
        Mistake(
            "keeps `encoder.` in the tower's layers",
            _renamed(lambda name, right: right.replace("vision.layers", "vision.encoder.layers")),
            "The tower's layers are `vision.layers.N…`.",
        ),
        Mistake(
            "keeps `linear.` in the projector's names",
            _renamed(lambda name, right: right.replace("projector.", "projector.linear.")),
            "The projector has one layer: `projector.weight` and `projector.bias`.",
        ),
        Mistake(
            "keeps `vision_model.` where a file has it",
            _renamed(
                lambda name, right: (
                    right.replace("vision.", "vision.vision_model.") if "vision_model" in name else right
                )
            ),
            "Only the hub's files have `vision_model.`: remove it, so that both layouts end in one name.",
        ),
        Mistake(
            "keeps `model.` inside the text's names",
            _renamed(lambda name, right: right.replace("text.", "text.model.") if ".model." in name else right),
            "`language_model.model.` and `model.language_model.` both become `text.`.",
        ),
        Mistake(
            "removes `model.` everywhere, also inside `vision_model.`",
            _renamed(
                lambda name, right: right.replace("vision.", "vision.vision_") if "vision_model." in name else right
            ),
            "`name.replace('model.', '')` also hits `vision_model.`: use `removeprefix`.",
        ),
        Mistake(
            "drops the number of the layer",
            _renamed(lambda name, right: re.sub(r"layers\.\d+\.", "layers.", right)),
            "Every layer has weights of its own: keep `layers.N.`.",
        ),
        Mistake(
            "drops `.weight` and `.bias`",
            _renamed(lambda name, right: right.rpartition(".")[0]),
            "Weight and bias are two tensors: keep the last word.",
        ),
        Mistake(
            "leaves the name as it is",
            lambda name: name,
            "Return one short name, the same for all three layouts.",
        ),
    ),
)

EXERCISES = [READ_TENSOR, OWN_NAME]
