"""Chapter 04: what the model actually receives."""

import numpy as np
import torch

from minivlm import processor
from minivlm.course.exercises.exercise import Exercise, Mistake

# --- pixels ---------------------------------------------------------------------------------------------------------


def color_cases(rng):
    """Images in 0…1, alone and in batches, with different means and stds per channel."""
    for shape in ((2, 4, 5, 3), (3, 6, 3), (1, 2, 4, 3), (4, 4, 3), (2, 3, 2, 3)):
        pixels = torch.from_numpy(rng.random(shape)).float()
        yield pixels, *(rng.uniform(low, low + 0.4, 3).round(2).tolist() for low in (0.3, 0.2))


def _channels(values):
    return torch.tensor(values)


NORMALIZE = Exercise(
    key="04.1",
    reference=processor.normalize,
    cases=color_cases,
    difficulty=1,
    minutes=6,
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
    for shape in ((2, 4, 5, 3), (4, 6, 3), (3, 2, 4, 3), (5, 3, 3), (2, 6, 3, 3)):
        yield (torch.from_numpy(rng.random(shape)).float(),)


CHANNELS_FIRST = Exercise(
    key="04.2",
    reference=processor.channels_first,
    cases=image_cases,
    difficulty=1,
    minutes=6,
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
            "flips the image vertically",
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
    """Rows of different lengths, padded with a value that is not always 0."""
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
    """Every row is padded with its own last token."""
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
    """Prompts and answers of different lengths; <eos> = 1 ends every answer; both padding sides, any pad id."""
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


def _changed(change):
    """The four right arrays, changed by a function."""
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
            "gives the prompt labels too",
            _changed(lambda ids, real, types, labels: (ids, real, types, np.where(real == 1, ids, -100))),
            "The model should not learn to predict the prompt: its labels are −100.",
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
