"""Chapter 04: what the model actually receives."""

import numpy as np
import torch

from minivlm import processor
from minivlm.course.exercises.exercise import Case, Exercise, Mistake

# --- pixels ---------------------------------------------------------------------------------------------------------


SHAPES = {
    "two images": (2, 4, 5, 3),
    "one image without a batch axis": (5, 6, 3),
    "a batch of one": (1, 2, 4, 3),
    "one image that is higher than wide": (7, 2, 3),
    "images of one row": (4, 1, 2, 3),
    "many images": (6, 5, 2, 3),
}


def color_cases(rng):
    """Images in 0…1, alone and in batches, with different means and stds per channel."""
    for name, shape in SHAPES.items():
        pixels = torch.from_numpy(rng.random(shape)).float()
        yield Case((pixels, *(rng.uniform(low, low + 0.4, 3).round(2).tolist() for low in (0.3, 0.2))), name)
    pixels = torch.from_numpy(rng.random((2, 4, 1, 3))).float()
    yield Case((pixels, [0.5] * 3, [0.5] * 3), "PaliGemma's mean and std")
    pixels = torch.from_numpy(rng.random((2, 5, 3))).float()
    yield Case((pixels, [0.4814, 0.4578, 0.4082], [0.2686, 0.2613, 0.2757]), "CLIP's mean and std")


def _channels(values):
    return torch.tensor(values)


NORMALIZE = Exercise(
    key="04.1",
    reference=processor.normalize,
    cases=color_cases,
    difficulty=1,
    minutes=6,
    hints=(
        (
            "Broadcasting lines up the last axes of two tensors. A list is not a tensor yet. Check what your "
            "function makes of the four pixels of the toy example."
        ),
        ("`torch.tensor(mean)` has the shape `[3]`, so it lines up with the channels. The same goes for `std`."),
    ),
    mistakes=(
        Mistake(
            "multiplies by std",
            lambda pixels, mean, std: (pixels - _channels(mean)) * _channels(std),
            "Divide: std is below 1, and dividing by it spreads the values out.",
        ),
        Mistake(
            "swaps mean and std",
            lambda pixels, mean, std: (pixels - _channels(std)) / _channels(mean),
            "First subtract the mean, then divide by std.",
        ),
        Mistake(
            "forgets to divide by std",
            lambda pixels, mean, std: pixels - _channels(mean),
            "Subtracting a mean of 0.5 leaves −0.5…0.5, only half the range the values should have.",
        ),
        Mistake(
            "divides only the mean because parentheses are missing",
            lambda pixels, mean, std: pixels - _channels(mean) / _channels(std),
            "Division binds tighter than subtraction: `(pixels - mean) / std`.",
        ),
        Mistake(
            "divides the pixels before it subtracts the mean",
            lambda pixels, mean, std: pixels / _channels(std) - _channels(mean),
            "The mean is that of the original pixels: subtract it first.",
        ),
        Mistake(
            "divides by the variance",
            lambda pixels, mean, std: (pixels - _channels(mean)) / _channels(std) ** 2,
            "std is already the standard deviation: no square, no root.",
        ),
        Mistake(
            "uses the mean and std of red for all channels",
            lambda pixels, mean, std: (pixels - mean[0]) / std[0],
            "There is one mean and one std per channel, and the channels are the last axis, so they broadcast.",
        ),
        Mistake(
            "uses the average mean and the average std for all channels",
            lambda pixels, mean, std: (pixels - sum(mean) / 3) / (sum(std) / 3),
            "There is one mean and one std per channel, and the channels are the last axis, so they broadcast.",
        ),
        Mistake(
            "adds the mean",
            lambda pixels, mean, std: (pixels + _channels(mean)) / _channels(std),
            "Subtract the mean, so that the values are centered on 0.",
        ),
        Mistake(
            "forgets to subtract the mean",
            lambda pixels, mean, std: pixels / _channels(std),
            "First subtract the mean, then divide by std.",
        ),
        Mistake(
            "subtracts in the wrong order",
            lambda pixels, mean, std: (_channels(mean) - pixels) / _channels(std),
            "It is pixels − mean: a bright pixel should stay above a dark one.",
        ),
        Mistake(
            "aligns mean and std with the first axis, as if the channels came first",
            lambda pixels, mean, std: (pixels - _channels(mean)[:, None, None]) / _channels(std)[:, None, None],
            "Here the channels are the last axis: a tensor of shape [3] broadcasts as it is.",
        ),
        Mistake(
            "reverses the order of the channels in mean and std",
            lambda pixels, mean, std: (pixels - _channels(mean[::-1])) / _channels(std[::-1]),
            "The first number belongs to red, in the pixels as in the lists.",
        ),
        Mistake(
            "clamps the result to 0…1",
            lambda pixels, mean, std: ((pixels - _channels(mean)) / _channels(std)).clamp(0, 1),
            "The values should be negative where a pixel is darker than the mean: do not clamp.",
        ),
        Mistake(
            "clamps the result to −1…1",
            lambda pixels, mean, std: ((pixels - _channels(mean)) / _channels(std)).clamp(-1, 1),
            "With other means and stds, values leave −1…1: do not clamp.",
        ),
        Mistake(
            "takes the square root of std",
            lambda pixels, mean, std: (pixels - _channels(mean)) / _channels(std).sqrt(),
            "std is already the standard deviation: no square, no root.",
        ),
        Mistake(
            "always uses 0.5",
            lambda pixels, mean, std: pixels * 2 - 1,
            "Use the arguments `mean` and `std`: other models have other values.",
        ),
        Mistake(
            "divides by 255 again",
            lambda pixels, mean, std: (pixels / 255 - _channels(mean)) / _channels(std),
            "The step before, `rescale`, already did that: these pixels are in 0…1.",
        ),
        Mistake(
            "computes mean and std from the images",
            lambda pixels, mean, std: (
                (pixels - pixels.mean(tuple(range(pixels.ndim - 1)))) / pixels.std(tuple(range(pixels.ndim - 1)))
            ),
            "The same color must map to the same value in every image: use the two arguments.",
        ),
    ),
)


def image_cases(rng):
    """Images that are not square, alone and in batches."""
    for name, shape in SHAPES.items():
        yield Case((torch.from_numpy(rng.random(shape)).float(),), name)


CHANNELS_FIRST = Exercise(
    key="04.2",
    reference=processor.channels_first,
    cases=image_cases,
    difficulty=1,
    minutes=6,
    hints=(
        (
            "One axis moves, and the others keep their order. torch has a function for exactly that. If you "
            "count axes from the end, −1, −2, −3, a batch in front makes no difference."
        ),
        "`pixels.movedim(source, destination)`: the channels are at −1. Where do they go?",
    ),
    mistakes=(
        Mistake(
            "reshapes instead of permuting",
            lambda pixels: pixels.reshape(*pixels.shape[:-3], 3, *pixels.shape[-3:-1]),
            "`reshape` and `view` keep the memory order. Move axes with `permute`, `movedim` or `transpose`.",
        ),
        Mistake(
            "swaps color and row, which transposes the image",
            lambda pixels: pixels.transpose(-1, -3),
            "One swap is not enough: rows must stay before columns, [H, W, 3] → [3, H, W].",
        ),
        Mistake(
            "puts the colors between rows and columns",
            lambda pixels: pixels.movedim(-1, -2),
            "The color axis goes before the rows, to position −3.",
        ),
        Mistake(
            "puts the colors before the batch",
            lambda pixels: pixels.movedim(-1, 0),
            "The batch axis stays in front: count axes from the end, so that one image and a batch both work.",
        ),
        Mistake(
            "reverses red, green, blue",
            lambda pixels: pixels.movedim(-1, -3).flip(-3),
            "Only the axis moves; the order red, green, blue stays.",
        ),
        Mistake(
            "works for a batch only, because it counts axes from the front",
            lambda pixels: pixels.permute(0, 3, 1, 2),
            "One image has no batch axis. Count axes from the end: `movedim(-1, -3)`.",
        ),
        Mistake(
            "works for a single image only, because it counts axes from the front",
            lambda pixels: pixels.permute(2, 0, 1),
            "A batch has one axis more. Count axes from the end: `movedim(-1, -3)`.",
        ),
        Mistake(
            "moves axis 2 to the front, which in a batch is the columns",
            lambda pixels: pixels.movedim(2, 0),
            "Count axes from the end: `movedim(-1, -3)` is right with and without a batch.",
        ),
        Mistake(
            "reverses the order of all axes",
            lambda pixels: pixels.permute(*range(pixels.ndim - 1, -1, -1)),
            "`.T` of an image is [3, W, H]. Move one axis only, so that rows stay before columns.",
        ),
        Mistake(
            "adds a batch axis to a single image",
            lambda pixels: (pixels if pixels.ndim == 4 else pixels[None]).movedim(-1, -3),
            "[H, W, 3] becomes [3, H, W]: the number of axes stays the same.",
        ),
        Mistake(
            "moves the rows to the end, which puts the columns first",
            lambda pixels: pixels.movedim(-3, -1),
            "Move the colors, the last axis, to position −3.",
        ),
        Mistake(
            "flips the image vertically",
            lambda pixels: pixels.movedim(-1, -3).flip(-2),
            "Row 0 stays the top row.",
        ),
    ),
)

# --- a prompt -------------------------------------------------------------------------------------------------------

PREFIXES = ("caption en", "answer en how many cats are there?", "detect dog ; cat", "cap en", "describe en")
PROMPTS = {
    "the tokens of PaliGemma": (None, "<bos>", "<image>", None),
    "the tokens of another model": (None, "<s>", "[IMG]", None),
    "one image token": (None, "<bos>", "<image>", 1),
    "no image token": (None, "<s>", "<image>", 0),
    "as many image tokens as PaliGemma has": (None, "<bos>", "<img>", 256),
    "an empty prefix": ("", "<bos>", "<image>", None),
    "a prefix with spaces around it": (" what is this? ", "<bos>", "<image>", None),
    "letters with accents": ("Où est l’étoile ?", "<|begin|>", "<image>", None),
}


def prompt_cases(rng):
    prefixes = rng.permutation(PREFIXES).tolist()
    for i, (name, (prefix, bos, image, count)) in enumerate(PROMPTS.items()):
        prefix = prefixes[i % len(prefixes)] if prefix is None else prefix
        yield Case((prefix, bos, image, int(rng.integers(2, 9)) if count is None else count), name)


BUILD_PROMPT = Exercise(
    key="04.3",
    reference=processor.build_prompt,
    cases=prompt_cases,
    difficulty=1,
    minutes=6,
    hints=(
        (
            "Read the layout above from left to right: four parts, one of them repeated. Nothing goes between "
            "them, not even a space."
        ),
        'A string times an integer repeats it, and `+` joins strings. The last part is a newline, `"\\n"`.',
    ),
    mistakes=(
        Mistake(
            "forgets the newline",
            lambda prefix, bos, image, n: image * n + bos + prefix,
            "The prompt ends with a newline, which marks the end of the question.",
        ),
        Mistake(
            "writes a backslash and an n instead of a newline",
            lambda prefix, bos, image, n: image * n + bos + prefix + r"\n",
            'A newline is one character, written "\\n" in Python, without an r before the quotes.',
        ),
        Mistake(
            "forgets <bos>",
            lambda prefix, bos, image, n: image * n + prefix + "\n",
            "<bos>, beginning of sequence, goes between the image tokens and the prefix.",
        ),
        Mistake(
            "puts <bos> before the image",
            lambda prefix, bos, image, n: bos + image * n + prefix + "\n",
            "PaliGemma puts the image first: image tokens, then <bos>, then the prefix.",
        ),
        Mistake(
            "puts the image after the text",
            lambda prefix, bos, image, n: bos + prefix + "\n" + image * n,
            "The image tokens come first.",
        ),
        Mistake(
            "adds a space between <bos> and the prefix",
            lambda prefix, bos, image, n: image * n + bos + " " + prefix + "\n",
            "A space changes the first word's token: join the parts without spaces.",
        ),
        Mistake(
            "adds a space before the newline",
            lambda prefix, bos, image, n: image * n + bos + prefix + " \n",
            "The newline follows the last letter: a space would be an extra token.",
        ),
        Mistake(
            "puts the newline before the prefix",
            lambda prefix, bos, image, n: image * n + bos + "\n" + prefix,
            "The newline ends the prompt.",
        ),
        Mistake(
            "writes <bos> and <image> instead of the arguments",
            lambda prefix, bos, image, n: "<image>" * n + "<bos>" + prefix + "\n",
            "Other models have other tokens: use `bos_token` and `image_token`.",
        ),
        Mistake(
            "writes one image token too many",
            lambda prefix, bos, image, n: image * (n + 1) + bos + prefix + "\n",
            "There are exactly `num_image_tokens` of them, one per patch.",
        ),
        Mistake(
            "writes one image token too few",
            lambda prefix, bos, image, n: image * (n - 1) + bos + prefix + "\n",
            "There are exactly `num_image_tokens` of them, one per patch.",
        ),
        Mistake(
            "puts spaces between the image tokens",
            lambda prefix, bos, image, n: " ".join([image] * n) + bos + prefix + "\n",
            "Nothing goes between the tokens: repeat the string with `*`.",
        ),
        Mistake(
            "puts spaces between all parts",
            lambda prefix, bos, image, n: " ".join([*[image] * n, bos, prefix]) + "\n",
            "Nothing goes between the parts, not even a space.",
        ),
        Mistake(
            "puts a space between the image tokens and <bos>",
            lambda prefix, bos, image, n: image * n + " " + bos + prefix + "\n",
            "Nothing goes between the parts, not even a space.",
        ),
        Mistake(
            "puts a newline between the image tokens and <bos>",
            lambda prefix, bos, image, n: image * n + "\n" + bos + prefix + "\n",
            "There is only one newline, at the end.",
        ),
        Mistake(
            "puts a newline between all parts",
            lambda prefix, bos, image, n: "\n".join([image * n, bos, prefix]) + "\n",
            "There is only one newline, at the end.",
        ),
        Mistake(
            "ends the prompt with two newlines",
            lambda prefix, bos, image, n: image * n + bos + prefix + "\n\n",
            "One newline is enough: two are another token.",
        ),
        Mistake(
            "strips spaces from the prefix",
            lambda prefix, bos, image, n: image * n + bos + prefix.strip() + "\n",
            "Use the prefix as it is.",
        ),
        Mistake(
            "changes the prefix to lower case",
            lambda prefix, bos, image, n: image * n + bos + prefix.lower() + "\n",
            "Use the prefix as it is.",
        ),
        Mistake(
            "leaves out the prefix",
            lambda prefix, bos, image, n: image * n + bos + "\n",
            "The prefix goes between <bos> and the newline.",
        ),
        Mistake(
            "leaves out the image tokens",
            lambda prefix, bos, image, n: bos + prefix + "\n",
            "The prompt starts with `num_image_tokens` image tokens.",
        ),
        Mistake(
            "repeats <bos> for every image token",
            lambda prefix, bos, image, n: (image + bos) * n + prefix + "\n",
            "Only the image token is repeated: `image_token * num_image_tokens + bos_token`.",
        ),
        Mistake(
            "returns a list of the parts",
            lambda prefix, bos, image, n: [image] * n + [bos, prefix, "\n"],
            "Return one string: join the parts with `+`.",
        ),
        Mistake(
            "uses a single image token",
            lambda prefix, bos, image, n: image + bos + prefix + "\n",
            "Every patch needs its own position in the sequence: `image_token * num_image_tokens`.",
        ),
        Mistake(
            "ends the prompt with <eos>",
            lambda prefix, bos, image, n: image * n + bos + prefix + "\n<eos>",
            "<eos> ends the answer, and after the prompt the answer is still to come.",
        ),
    ),
)

# --- batches --------------------------------------------------------------------------------------------------------


def row_cases(rng):
    """Rows of different lengths, padded on both sides with a value that is not always 0."""
    for name, lengths, side, value in (
        ("the first row is shorter", (2, 5), "left", None),
        ("the longest row comes first", (4, 1, 3), "right", None),
        ("the longest row is in the middle", (3, 6, 2, 5), "left", None),
        ("the first row is longer", (5, 3), "right", None),
        ("two rows of the longest length", (4, 4, 1), "left", None),
        ("the last row is the longest", (2, 3, 6, 7), "right", None),
        ("an empty row, padded on the left", (3, 0, 2, 4), "left", None),
        ("an empty row, padded on the right", (0, 2, 4), "right", None),
        ("one row", (3,), "left", None),
        ("rows of equal length", (4, 4), "right", None),
        ("labels, padded with −100", (2, 4, 1), "right", -100),
        ("padded with 0", (1, 5, 3), "left", 0),
    ):
        rows = [rng.integers(10, 99, length).tolist() for length in lengths]
        yield Case((rows, int(rng.integers(1, 9)) if value is None else value, side), name)


def _pad(rows, value, side, length=max):
    width = length(map(len, rows))
    rows = [row[:width] for row in rows]
    empty = [[value] * (width - len(row)) for row in rows]
    both = [e + row if side == "left" else row + e for row, e in zip(rows, empty, strict=True)]
    return np.array(both, dtype=np.int64)


def _pad_last(rows, value, side):
    """Every row is padded with its own last token."""
    width = max(map(len, rows))
    return np.concatenate([_pad([row, [0] * width], row[-1], side)[:1] for row in rows])


def _pad_both_sides(rows, value, side):
    """Half of the padding on each side."""
    width = max(map(len, rows))
    missing = [width - len(row) for row in rows]
    padded = [[value] * (n // 2) + row + [value] * (n - n // 2) for row, n in zip(rows, missing, strict=True)]
    return np.array(padded, dtype=np.int64)


def _length_of_the_first(lengths):
    return next(iter(lengths))


PAD = Exercise(
    key="04.4",
    reference=processor.pad,
    cases=row_cases,
    difficulty=2,
    minutes=10,
    hints=(
        (
            "Make an array that contains only padding, and write the rows into it. Where a row starts depends "
            "on the side."
        ),
        (
            "Start with `np.full((len(rows), longest), value, dtype=np.int64)` and write each row into its line "
            "of the array, at the start or at the end. `line[longest - len(row):]` also works for a row of full "
            "length."
        ),
    ),
    mistakes=(
        Mistake(
            "swaps left and right",
            lambda rows, value, side: _pad(rows, value, "right" if side == "left" else "left"),
            '`side` says where the *padding* goes: "left" puts it in front of the row.',
        ),
        Mistake(
            "always pads on the right",
            lambda rows, value, side: _pad(rows, value, "right"),
            'With side "left", the padding goes in front, so that all rows end in the last column.',
        ),
        Mistake(
            "always pads on the left",
            lambda rows, value, side: _pad(rows, value, "left"),
            'With side "right", the padding goes after the row.',
        ),
        Mistake(
            "pads with 0",
            lambda rows, value, side: _pad(rows, 0, side),
            "Pad with `value`: 0 is the id of <pad>, but labels, for example, are padded with −100.",
        ),
        Mistake(
            "truncates all rows to the shortest",
            lambda rows, value, side: _pad(rows, value, side, length=min),
            "No token should be lost: pad to the length of the longest row.",
        ),
        Mistake(
            "takes the length of the first row instead of the longest",
            lambda rows, value, side: _pad(rows, value, side, length=_length_of_the_first),
            "Any row can be the longest: `max(len(row) for row in rows)`.",
        ),
        Mistake(
            "takes the length of the last row instead of the longest",
            lambda rows, value, side: _pad(rows, value, side, length=lambda lengths: list(lengths)[-1]),
            "Any row can be the longest: `max(len(row) for row in rows)`.",
        ),
        Mistake(
            "makes all rows as long as all rows together",
            lambda rows, value, side: _pad(rows, value, side, length=sum),
            "The array is as wide as the longest row: use `max`, not `sum`.",
        ),
        Mistake(
            "reverses the rows that it pads on the left",
            lambda rows, value, side: (
                _pad(rows, value, "right")[:, ::-1] if side == "left" else _pad(rows, value, "right")
            ),
            "To pad on the left by flipping, flip twice: each row before you pad it on the right, and the result.",
        ),
        Mistake(
            "puts half of the padding on each side",
            _pad_both_sides,
            "All of the padding goes to one side, `side`.",
        ),
        Mistake(
            "returns one column per row",
            lambda rows, value, side: _pad(rows, value, side).T,
            "The result is [B, T]: one line of the array per row.",
        ),
        Mistake(
            "makes all rows one longer than the longest",
            lambda rows, value, side: _pad(rows, value, side, length=lambda lengths: max(lengths) + 1),
            "The longest row needs no padding.",
        ),
        Mistake(
            "returns floating-point numbers",
            lambda rows, value, side: _pad(rows, value, side).astype(np.float64),
            "Token ids are integers: `np.full(shape, value, dtype=np.int64)`.",
        ),
        Mistake(
            "pads with the last token of each row",
            _pad_last,
            "Pad with `value`.",
        ),
    ),
)


def answer_cases(rng):
    """Prompts and answers of different lengths, also empty ones; both padding sides, any pad id; <eos> is 1."""
    for name, lengths, side, pad_id in (  # lengths of prompt and answer, without <eos>; None is no answer at all
        ("two rows of different length", ((3, 2), (4, 5)), "right", None),
        ("three rows, padded on the left", ((5, 1), (2, 3), (3, 4)), "left", None),
        ("a longer prompt in the last row", ((2, 4), (7, 1)), "right", None),
        ("four rows, padded on the left", ((4, 2), (2, 2), (3, 6), (5, 1)), "left", None),
        ("an answer that is only <eos>", ((3, 2), (4, 0), (6, 1)), "right", None),
        ("an empty answer", ((4, 3), (2, None), (5, 2)), "left", None),
        ("no answers, as for generation", ((3, None), (5, None)), "left", 0),
        ("one row", ((4, 2),), "right", 0),
        ("no padding", ((2, 3), (4, 1)), "left", None),
        ("an empty prompt", ((0, 2), (3, 4)), "right", None),
    ):
        prompts = [rng.integers(10, 99, p).tolist() for p, _ in lengths]
        answers = [[] if a is None else [*rng.integers(10, 99, a).tolist(), 1] for _, a in lengths]
        yield Case((prompts, answers, int(rng.integers(2, 9)) if pad_id is None else pad_id, side), name)


def _assemble(prompts, answers, pad_id, side):
    pairs = list(zip(prompts, answers, strict=True))
    ids = _pad([p + a for p, a in pairs], pad_id, side)
    real = _pad([[1] * len(p + a) for p, a in pairs], 0, side)
    types = _pad([[0] * len(p) + [1] * len(a) for p, a in pairs], 0, side)
    return ids, real, types, np.where(types == 1, ids, -100)


def _shifted(prompts, answers, pad_id, side):
    ids, real, types, labels = _assemble(prompts, answers, pad_id, side)
    moved = np.full_like(labels, -100)
    moved[:, :-1] = labels[:, 1:]
    return ids, real, types, moved


def _without_eos(prompts, answers, pad_id, side):
    ids, real, types, labels = _assemble(prompts, answers, pad_id, side)
    return ids, real, types, np.where(ids == 1, -100, labels)


def _padding_is_answer(prompts, answers, pad_id, side):
    ids, real, types, labels = _assemble(prompts, answers, pad_id, side)
    return ids, real, np.where(real == 0, 1, types), labels


def _padding_has_labels(prompts, answers, pad_id, side):
    ids, real, types, labels = _assemble(prompts, answers, pad_id, side)
    return ids, real, types, np.where((types == 1) | (real == 0), ids, -100)


def _separately(prompts, answers, pad_id, side):
    """Pads prompts and answers on their own, then puts them side by side."""
    rows = ((prompts, 0), (answers, 1))
    ids = np.concatenate([_pad(part, pad_id, side) for part, _ in rows], 1)
    real = np.concatenate([_pad([[1] * len(row) for row in part], 0, side) for part, _ in rows], 1)
    types = np.concatenate([_pad([[kind] * len(row) for row in part], 0, side) for part, kind in rows], 1)
    return ids, real, types, np.where(types == 1, ids, -100)


def _last_columns_are_answer(prompts, answers, pad_id, side):
    """Marks the last columns as the answer, although padding can follow it."""
    ids, real, types, _ = _assemble(prompts, answers, pad_id, side)
    types = np.zeros_like(types)
    for row, answer in zip(types, answers, strict=True):
        row[len(row) - len(answer) :] = 1
    return ids, real, types, np.where(types == 1, ids, -100)


def _first_columns_are_prompt(prompts, answers, pad_id, side):
    """Marks everything behind the first columns as the answer, although padding can come before and after."""
    ids, real, types, _ = _assemble(prompts, answers, pad_id, side)
    types = np.ones_like(types)
    for row, prompt in zip(types, prompts, strict=True):
        row[: len(prompt)] = 0
    return ids, real, types, np.where(types == 1, ids, -100)


def _all_answer_if_empty(prompts, answers, pad_id, side):
    """What ``row[-len(answer) :] = 1`` does with an empty answer: −0 is 0."""
    pairs = list(zip(prompts, answers, strict=True))
    ids, real, types, _ = _assemble(prompts, answers, pad_id, side)
    types = _pad([[0] * len(p) + [1] * len(a) if a else [1] * len(p) for p, a in pairs], 0, side)
    return ids, real, types, np.where(types == 1, ids, -100)


def _filled(types_value, real_value):
    """Token types and attention mask padded with other values: functions of pad_id."""

    def assemble(prompts, answers, pad_id, side):
        ids, real, types, labels = _assemble(prompts, answers, pad_id, side)
        types = np.where(real == 0, types_value(pad_id), types)
        return ids, np.where(real == 0, real_value(pad_id), real), types, labels

    return assemble


def _zero(pad_id):
    return 0


def _same(pad_id):
    return pad_id


def _with_answers(change):
    """The right arrays of other answers."""
    return lambda prompts, answers, pad_id, side: _assemble(prompts, [change(a) for a in answers], pad_id, side)


def _changed(change):
    """The four right arrays, changed by a function."""
    return lambda prompts, answers, pad_id, side: change(*_assemble(prompts, answers, pad_id, side))


ASSEMBLE = Exercise(
    key="04.5",
    reference=processor.assemble,
    cases=answer_cases,
    outputs=("input_ids", "attention_mask", "token_type_ids", "labels"),
    difficulty=3,
    minutes=15,
    points=3,
    hints=(
        (
            "All four arrays describe the same tokens: which they are, whether they are real, of which type, "
            "and what to predict. So all four are padded on the same side."
        ),
        (
            "Make three lists of lists before you pad: the ids, all ones, and zeros followed by ones. Which "
            "value pads each of them? The labels need no padding of their own: `np.where(types == 1, ids, "
            "-100)`."
        ),
    ),
    mistakes=(
        Mistake(
            "gives the prompt labels too",
            _changed(lambda ids, real, types, labels: (ids, real, types, np.where(real == 1, ids, -100))),
            "The model should not learn to predict the prompt: its labels are −100.",
        ),
        Mistake(
            "copies all ids into the labels",
            _changed(lambda ids, real, types, labels: (ids, real, types, ids.copy())),
            "Only the answer has labels. They are −100 on the prompt and on padding.",
        ),
        Mistake(
            "gives the prompt labels instead of the answer",
            _changed(lambda ids, real, types, labels: (ids, real, types, np.where(real > types, ids, -100))),
            "The labels are the ids of the answer, where token_type_ids is 1.",
        ),
        Mistake(
            "gives labels to the prompt and padding instead of the answer",
            _changed(lambda ids, real, types, labels: (ids, real, types, np.where(types == 0, ids, -100))),
            "The labels are the ids where token_type_ids is 1: swap the last two arguments of `np.where`.",
        ),
        Mistake(
            "fills the labels with −1 instead of −100",
            _changed(lambda ids, real, types, labels: (ids, real, types, np.where(types == 1, ids, -1))),
            "The loss ignores −100, not −1.",
        ),
        Mistake(
            "pads prompts and answers separately, so there is padding between them",
            _separately,
            "Join each prompt with its answer first, then pad the joined rows.",
        ),
        Mistake(
            "marks the last columns as the answer, although padding can follow it",
            _last_columns_are_answer,
            "Build zeros and ones of the same length as the row before you pad: token_type_ids is 0 on padding.",
        ),
        Mistake(
            "marks everything after the prompt's length as the answer, padding included",
            _first_columns_are_prompt,
            "Build zeros and ones of the same length as the row before you pad: token_type_ids is 0 on padding.",
        ),
        Mistake(
            "marks the whole prompt as the answer if the answer is empty",
            _all_answer_if_empty,
            "`row[-len(answer):]` is the whole row if the answer is empty, because −0 is 0. Count from the front.",
        ),
        Mistake(
            "pads token_type_ids with pad_id",
            _filled(_same, _zero),
            "pad_id is for input_ids only: pad token_type_ids with 0.",
        ),
        Mistake(
            "pads attention_mask with pad_id",
            _filled(_zero, _same),
            "pad_id is for input_ids only: pad attention_mask with 0.",
        ),
        Mistake(
            "pads token_type_ids and attention_mask with pad_id",
            _filled(_same, _same),
            "pad_id is for input_ids only: pad the other two with 0.",
        ),
        Mistake(
            "appends another <eos> to every answer",
            _with_answers(lambda answer: [*answer, 1]),
            "Every answer already ends with <eos>.",
        ),
        Mistake(
            "drops the last token of every answer",
            _with_answers(lambda answer: answer[:-1]),
            "The last token is <eos>, and the model must learn to write it.",
        ),
        Mistake(
            "puts the answer before the prompt",
            lambda prompts, answers, pad_id, side: _changed(
                lambda ids, real, types, labels: (ids, real, real - types, np.where(real > types, ids, -100))
            )(answers, prompts, pad_id, side),
            "The model reads from left to right: first the prompt, then the answer.",
        ),
        Mistake(
            "always pads on the right",
            lambda prompts, answers, pad_id, side: _assemble(prompts, answers, pad_id, "right"),
            'With side "left", the padding goes in front: pass `side` on to `pad`.',
        ),
        Mistake(
            "always pads on the left",
            lambda prompts, answers, pad_id, side: _assemble(prompts, answers, pad_id, "left"),
            'With side "right", the padding goes after the row: pass `side` on to `pad`.',
        ),
        Mistake(
            "swaps left and right",
            lambda prompts, answers, pad_id, side: _assemble(
                prompts, answers, pad_id, "right" if side == "left" else "left"
            ),
            '`side` says where the *padding* goes: "left" puts it in front of the row.',
        ),
        Mistake(
            "leaves out the answers",
            lambda prompts, answers, pad_id, side: _assemble(prompts, [[]] * len(prompts), pad_id, side),
            "Each row is a prompt followed by its answer.",
        ),
        Mistake(
            "returns token_type_ids before attention_mask",
            _changed(lambda ids, real, types, labels: (ids, types, real, labels)),
            "The order is input_ids, attention_mask, token_type_ids, labels.",
        ),
        Mistake(
            "returns labels before token_type_ids",
            _changed(lambda ids, real, types, labels: (ids, real, labels, types)),
            "The order is input_ids, attention_mask, token_type_ids, labels.",
        ),
        Mistake(
            "gives padding labels",
            _padding_has_labels,
            "Padding is not part of the answer: its labels are −100, not the id of <pad>.",
        ),
        Mistake(
            "fills the labels with 0 instead of −100",
            _changed(lambda ids, real, types, labels: (ids, real, types, np.where(types == 1, ids, 0))),
            "0 is a token id that the model would learn. The loss ignores −100.",
        ),
        Mistake(
            "shifts the labels by one",
            _shifted,
            "Here a label is at the position of its own token. The loss does the shift later.",
        ),
        Mistake(
            "leaves <eos> out of the labels",
            _without_eos,
            "A model that never learns to stop keeps generating: the last token of the answer has a label too.",
        ),
        Mistake(
            "gives padding the token type of the answer",
            _padding_is_answer,
            "token_type_ids are 1 for the answer only, and 0 for the prompt and padding.",
        ),
        Mistake(
            "swaps the token types",
            _changed(lambda ids, real, types, labels: (ids, real, np.where(real == 1, 1 - types, 0), labels)),
            "0 is the prompt, 1 is the answer.",
        ),
        Mistake(
            "sets attention_mask to 1 on padding",
            _changed(lambda ids, real, types, labels: (ids, np.ones_like(real), types, labels)),
            "attention_mask is 1 for tokens and 0 for padding.",
        ),
        Mistake(
            "sets attention_mask to 0 on the answer",
            _changed(lambda ids, real, types, labels: (ids, np.where(types == 1, 0, real), types, labels)),
            "attention_mask marks only padding. The token types make the answer causal.",
        ),
        Mistake(
            "uses the first row's attention mask for all rows",
            _changed(lambda ids, real, types, labels: (ids, np.repeat(real[:1], len(real), 0), types, labels)),
            "Each row has its own length: build its ones and zeros before padding.",
        ),
    ),
)

EXERCISES = [NORMALIZE, CHANNELS_FIRST, BUILD_PROMPT, PAD, ASSEMBLE]
