"""Chapter 04: what the model really receives."""

import numpy as np
import torch

from minivlm import processor
from minivlm.course.exercises.exercise import Exercise, Mistake

# --- pixels ---------------------------------------------------------------------------------------------------------


def color_cases(rng):
    """Pictures in 0…1, alone and in batches, whose channels want different means and stds."""
    for shape in ((2, 4, 5, 3), (3, 6, 3), (1, 2, 4, 3), (4, 4, 3), (2, 3, 2, 3)):
        pixels = torch.from_numpy(rng.random(shape)).float()
        yield pixels, *(rng.uniform(low, low + 0.4, 3).round(2).tolist() for low in (0.3, 0.2))


def _channels(values):
    return torch.tensor(values)


NORMALISE = Exercise(
    key="04.1",
    reference=processor.normalize,
    cases=color_cases,
    difficulty=1,
    minutes=6,
    mistakes=(
        Mistake(
            "multiplies by std",
            lambda pixels, mean, std: (pixels - _channels(mean)) * _channels(std),
            "Less spread out numbers must become more spread out: divide.",
        ),
        Mistake(
            "swaps mean and std",
            lambda pixels, mean, std: (pixels - _channels(std)) / _channels(mean),
            "First subtract the mean, then divide by std.",
        ),
        Mistake(
            "forgets to divide by std",
            lambda pixels, mean, std: pixels - _channels(mean),
            "With a mean of 0.5 alone the numbers lie in −0.5…0.5, half as far out as they should.",
        ),
        Mistake(
            "forgets the brackets: it divides only the mean",
            lambda pixels, mean, std: pixels - _channels(mean) / _channels(std),
            "Division comes before subtraction: `(pixels - mean) / std`.",
        ),
        Mistake(
            "divides the pixels before it subtracts the mean",
            lambda pixels, mean, std: pixels / _channels(std) - _channels(mean),
            "The mean is that of the pixels as they are: subtract it first.",
        ),
        Mistake(
            "divides by the variance",
            lambda pixels, mean, std: (pixels - _channels(mean)) / _channels(std) ** 2,
            "std is the standard deviation already: no square, no root.",
        ),
        Mistake(
            "uses the numbers of red for all channels",
            lambda pixels, mean, std: (pixels - mean[0]) / std[0],
            "There is one mean and one std a channel, and the channels are the last axis: broadcasting fits by itself.",
        ),
        Mistake(
            "always uses 0.5",
            lambda pixels, mean, std: pixels * 2 - 1,
            "Use the mean and std that are given: other models have others.",
        ),
        Mistake(
            "divides by 255 once more",
            lambda pixels, mean, std: (pixels / 255 - _channels(mean)) / _channels(std),
            "The step before, `rescale`, has done that: these pixels lie in 0…1.",
        ),
        Mistake(
            "takes mean and std from the pictures themselves",
            lambda pixels, mean, std: (
                (pixels - pixels.mean(tuple(range(pixels.ndim - 1)))) / pixels.std(tuple(range(pixels.ndim - 1)))
            ),
            "The same color must become the same number in every picture: use the two arguments.",
        ),
    ),
)


def picture_cases(rng):
    """Pictures that are not square, alone and in batches."""
    for shape in ((2, 4, 5, 3), (4, 6, 3), (3, 2, 4, 3), (5, 3, 3), (2, 6, 3, 3)):
        yield (torch.from_numpy(rng.random(shape)).float(),)


CHANNELS_FIRST = Exercise(
    key="04.2",
    reference=processor.channels_first,
    cases=picture_cases,
    difficulty=1,
    minutes=6,
    mistakes=(
        Mistake(
            "reads the same memory in a new shape",
            lambda pixels: pixels.reshape(*pixels.shape[:-3], 3, *pixels.shape[-3:-1]),
            "`reshape` and `view` never move a number. Axes are moved by `permute`, `movedim` or `transpose`.",
        ),
        Mistake(
            "swaps color and row, and so lays the picture on its side",
            lambda pixels: pixels.transpose(-1, -3),
            "One swap is not enough: rows must stay before columns, [H, W, 3] → [3, H, W].",
        ),
        Mistake(
            "puts the colors between rows and columns",
            lambda pixels: pixels.movedim(-1, -2),
            "The color axis goes before the rows, to place −3.",
        ),
        Mistake(
            "puts the colors before the batch",
            lambda pixels: pixels.movedim(-1, 0),
            "A batch stays in front: count the axes from the end, so that one picture and a batch both work.",
        ),
        Mistake(
            "turns red, green, blue round",
            lambda pixels: pixels.movedim(-1, -3).flip(-3),
            "Only the axis moves; the order red, green, blue stays.",
        ),
        Mistake(
            "turns the picture upside down",
            lambda pixels: pixels.movedim(-1, -3).flip(-2),
            "Row 0 stays the top row.",
        ),
    ),
)

# --- a prompt -------------------------------------------------------------------------------------------------------

PREFIXES = ("caption en", "answer en how many cats are there?", "detect dog ; cat", "cap en", "describe en")


def prompt_cases(rng):
    for prefix in rng.permutation(PREFIXES).tolist():
        yield prefix, "<bos>", "<image>", int(rng.integers(2, 9))


BUILD_PROMPT = Exercise(
    key="04.3",
    reference=processor.build_prompt,
    cases=prompt_cases,
    difficulty=1,
    minutes=6,
    mistakes=(
        Mistake(
            "forgets the newline",
            lambda prefix, bos, image, n: image * n + bos + prefix,
            "The prompt ends with a newline: it says that the question is over.",
        ),
        Mistake(
            "writes a backslash and an n instead of a newline",
            lambda prefix, bos, image, n: image * n + bos + prefix + r"\n",
            'One character, written "\\n" in Python, without an r before the quotes.',
        ),
        Mistake(
            "forgets <bos>",
            lambda prefix, bos, image, n: image * n + prefix + "\n",
            "<bos>, the beginning of the text, stands between the picture and the prefix.",
        ),
        Mistake(
            "puts <bos> before the picture",
            lambda prefix, bos, image, n: bos + image * n + prefix + "\n",
            "PaliGemma puts the picture first: image tokens, then <bos>, then the prefix.",
        ),
        Mistake(
            "puts the picture behind the text",
            lambda prefix, bos, image, n: bos + prefix + "\n" + image * n,
            "The image tokens come first.",
        ),
        Mistake(
            "has a space between <bos> and the prefix",
            lambda prefix, bos, image, n: image * n + bos + " " + prefix + "\n",
            "A space makes another token of the first word: nothing stands between the parts.",
        ),
        Mistake(
            "has a space before the newline",
            lambda prefix, bos, image, n: image * n + bos + prefix + " \n",
            "The newline follows the last letter: a space would be a token of its own.",
        ),
        Mistake(
            "puts the newline before the prefix",
            lambda prefix, bos, image, n: image * n + bos + "\n" + prefix,
            "The newline ends the prompt.",
        ),
        Mistake(
            "has a single image token",
            lambda prefix, bos, image, n: image + bos + prefix + "\n",
            "Every patch needs a place of its own in the sequence: `image_token * num_image_tokens`.",
        ),
        Mistake(
            "ends the prompt with <eos>",
            lambda prefix, bos, image, n: image * n + bos + prefix + "\n<eos>",
            "<eos> ends the answer. After the prompt the answer is still to come.",
        ),
    ),
)

# --- batches --------------------------------------------------------------------------------------------------------


def row_cases(rng):
    """Rows of different lengths, filled up with a value that is not always 0."""
    for lengths, side in (
        ((2, 5), "left"),
        ((4, 1, 3), "right"),
        ((3, 6, 2), "left"),
        ((5, 2), "right"),
        ((4, 4, 1), "left"),
    ):
        rows = [rng.integers(10, 99, length).tolist() for length in lengths]
        yield rows, int(rng.integers(1, 9)), side


def _pad(rows, value, side, length=max):
    width = length(map(len, rows))
    rows = [row[:width] for row in rows]
    empty = [[value] * (width - len(row)) for row in rows]
    both = [e + row if side == "left" else row + e for row, e in zip(rows, empty, strict=True)]
    return np.array(both, dtype=np.int64)


def _pad_last(rows, value, side):
    """Every row takes its missing numbers from its own last one."""
    width = max(map(len, rows))
    return np.concatenate([_pad([row, [0] * width], row[-1], side)[:1] for row in rows])


PAD = Exercise(
    key="04.4",
    reference=processor.pad,
    cases=row_cases,
    difficulty=2,
    minutes=10,
    mistakes=(
        Mistake(
            "swaps left and right",
            lambda rows, value, side: _pad(rows, value, "right" if side == "left" else "left"),
            'side says where the *padding* goes: "left" puts it in front of the row.',
        ),
        Mistake(
            "always pads on the right",
            lambda rows, value, side: _pad(rows, value, "right"),
            'With side "left" the padding goes in front, so that all rows end in the last column.',
        ),
        Mistake(
            "always pads on the left",
            lambda rows, value, side: _pad(rows, value, "left"),
            'With side "right" the padding goes behind the row.',
        ),
        Mistake(
            "fills with 0",
            lambda rows, value, side: _pad(rows, 0, side),
            "Fill with `value`: 0 is the id of <pad>, but labels, for one, are filled with −100.",
        ),
        Mistake(
            "cuts all rows to the shortest",
            lambda rows, value, side: _pad(rows, value, side, length=min),
            "Nothing may be lost: the length is that of the longest row.",
        ),
        Mistake(
            "makes the rows one longer than the longest",
            lambda rows, value, side: _pad(rows, value, side, length=lambda lengths: max(lengths) + 1),
            "The longest row needs no padding at all.",
        ),
        Mistake(
            "gives floating-point numbers",
            lambda rows, value, side: _pad(rows, value, side).astype(np.float64),
            "Ids are integers: `np.full(shape, value, dtype=np.int64)`.",
        ),
        Mistake(
            "repeats the last token of each row",
            _pad_last,
            "Fill with `value`, which nobody takes for a word.",
        ),
    ),
)


def answer_cases(rng):
    """Prompts and answers of different lengths; <eos> = 1 ends every answer; both sides; any id of padding."""
    for lengths, side in (
        (((3, 2), (4, 4)), "right"),
        (((5, 1), (2, 3), (3, 3)), "left"),
        (((2, 4), (4, 1)), "right"),
        (((4, 2), (2, 2), (3, 5)), "left"),
    ):
        prompts = [rng.integers(10, 99, p).tolist() for p, _ in lengths]
        answers = [[*rng.integers(10, 99, a).tolist(), 1] for _, a in lengths]
        yield prompts, answers, int(rng.integers(2, 9)), side


def _assemble(prompts, answers, pad_id, side):
    pairs = list(zip(prompts, answers, strict=True))
    ids = _pad([p + a for p, a in pairs], pad_id, side)
    seen = _pad([[1] * len(p + a) for p, a in pairs], 0, side)
    types = _pad([[0] * len(p) + [1] * len(a) for p, a in pairs], 0, side)
    return ids, seen, types, np.where(types == 1, ids, -100)


def _shifted(prompts, answers, pad_id, side):
    ids, seen, types, labels = _assemble(prompts, answers, pad_id, side)
    moved = np.full_like(labels, -100)
    moved[:, :-1] = labels[:, 1:]
    return ids, seen, types, moved


def _without_eos(prompts, answers, pad_id, side):
    ids, seen, types, labels = _assemble(prompts, answers, pad_id, side)
    return ids, seen, types, np.where(ids == 1, -100, labels)


def _padding_is_answer(prompts, answers, pad_id, side):
    ids, seen, types, labels = _assemble(prompts, answers, pad_id, side)
    return ids, seen, np.where(seen == 0, 1, types), labels


def _padding_is_learnt(prompts, answers, pad_id, side):
    ids, seen, types, labels = _assemble(prompts, answers, pad_id, side)
    return ids, seen, types, np.where((types == 1) | (seen == 0), ids, -100)


def _changed(change):
    """The right four, changed by a function of them."""
    return lambda prompts, answers, pad_id, side: change(*_assemble(prompts, answers, pad_id, side))


ASSEMBLE = Exercise(
    key="04.5",
    reference=processor.assemble,
    cases=answer_cases,
    difficulty=3,
    minutes=15,
    points=3,
    mistakes=(
        Mistake(
            "learns the prompt as well",
            _changed(lambda ids, seen, types, labels: (ids, seen, types, np.where(seen == 1, ids, -100))),
            "The prompt is given, there is nothing to learn in guessing it: its labels are −100.",
        ),
        Mistake(
            "learns to write padding",
            _padding_is_learnt,
            "Padding is no part of the answer: its labels are −100, not the id of <pad>.",
        ),
        Mistake(
            "fills the labels with 0 instead of −100",
            _changed(lambda ids, seen, types, labels: (ids, seen, types, np.where(types == 1, ids, 0))),
            "0 is a token that could be learned. −100 is the number that the loss leaves out.",
        ),
        Mistake(
            "shifts the labels by one",
            _shifted,
            "A label stands at its own token here; the loss does the shift. Twice would be one too many.",
        ),
        Mistake(
            "leaves <eos> out of the labels",
            _without_eos,
            "A model that never learns to end goes on talking: the last token of the answer has a label, too.",
        ),
        Mistake(
            "gives padding the type of the answer",
            _padding_is_answer,
            "token_type_ids are 1 on the answer only, and 0 on prompt and padding.",
        ),
        Mistake(
            "has the types turned round",
            _changed(lambda ids, seen, types, labels: (ids, seen, np.where(seen == 1, 1 - types, 0), labels)),
            "0 is the prompt, 1 is the answer.",
        ),
        Mistake(
            "sees padding",
            _changed(lambda ids, seen, types, labels: (ids, np.ones_like(seen), types, labels)),
            "attention_mask is 1 on tokens and 0 on padding.",
        ),
        Mistake(
            "hides the answer in attention_mask",
            _changed(lambda ids, seen, types, labels: (ids, np.where(types == 1, 0, seen), types, labels)),
            "attention_mask speaks of padding alone. That the answer is read causally follows from the types.",
        ),
        Mistake(
            "takes the masks of all rows from the first",
            _changed(lambda ids, seen, types, labels: (ids, np.repeat(seen[:1], len(seen), 0), types, labels)),
            "Each row has its own length: make its ones and zeros before padding.",
        ),
    ),
)

EXERCISES = [NORMALISE, CHANNELS_FIRST, BUILD_PROMPT, PAD, ASSEMBLE]
