"""Chapter 05: who may look at whom."""

import torch
import torch.nn.functional as F

from minivlm import masks
from minivlm.course.exercises.exercise import Exercise, Mistake


def random_ids(rng, rows, length, high=2):
    return torch.from_numpy(rng.integers(0, high, (rows, length)))


def block_cases(rng):
    """A few rows, the first case longer than wide so that no axis can be taken for another."""
    for rows, length in ((2, 5), (1, 7), (3, 4), (2, 6), (4, 3)):
        mask_ar = random_ids(rng, rows, length)
        mask_ar[0, 1:3], mask_ar[-1, -1] = torch.tensor([0, 1]), 1
        yield (mask_ar,)


def _compare(block, relation):
    return relation(block[..., None, :], block[..., :, None])


BLOCK = Exercise(
    key="05.1",
    reference=masks.block_mask,
    cases=block_cases,
    difficulty=1,
    minutes=8,
    mistakes=(
        Mistake(
            "has queries and keys swapped",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.ge),
            "The result is indexed [query, key]: the key's block is along the last axis, `block[..., None, :]`.",
        ),
        Mistake(
            "forbids a token its own block",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.lt),
            "The rule is `<=`: tokens of one block see each other, and each token itself.",
        ),
        Mistake(
            "lets a token see its own block alone",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.eq),
            "Earlier blocks are visible too: the rule is `<=`, not `==`.",
        ),
        Mistake(
            "compares mask_ar itself instead of its running sum",
            lambda mask_ar: _compare(mask_ar, torch.le),
            "Every 1 starts a new block: `mask_ar.cumsum(-1)` numbers them.",
        ),
        Mistake(
            "sums over the batch axis",
            lambda mask_ar: _compare(mask_ar.cumsum(0), torch.le),
            "Blocks are counted along the tokens, the last axis: `cumsum(-1)`.",
        ),
        Mistake(
            "gives numbers where True and False are wanted",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.le).long(),
            "The comparison `<=` already gives booleans.",
        ),
    ),
)


def type_cases(rng):
    """Image and prefix first, then a suffix of 2 or more."""
    for rows, length in ((2, 6), (1, 8), (3, 5), (2, 7), (1, 4)):
        ids = torch.zeros(rows, length, dtype=torch.long)
        for row in ids:
            row[-int(rng.integers(2, length - 1)) :] = 1
        yield (ids,)


def _square(ids, mask):
    return mask.expand(len(ids), *mask.shape[-2:]).clone()


PREFIX_LM = Exercise(
    key="05.2",
    reference=masks.prefix_lm_mask,
    cases=type_cases,
    difficulty=1,
    minutes=5,
    mistakes=(
        Mistake(
            "is causal everywhere",
            lambda ids: _square(ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()),
            "Image and prefix tokens (type 0) see each other in both directions; only the suffix is causal.",
        ),
        Mistake(
            "lets everyone see everyone",
            lambda ids: _square(ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)),
            "A suffix token must not see the suffix tokens after it: they are what it has to predict.",
        ),
        Mistake(
            "lets the suffix see its own future",
            lambda ids: ids[:, None, :] <= ids[:, :, None],
            "Give every suffix token a block of its own: the running sum of the types does that.",
        ),
        Mistake(
            "lets image and prefix see the suffix",
            lambda ids: masks.bidirectional_mask(ids.shape[1]) & ((ids == 0)[:, :, None] | masks.block_mask(ids)),
            "The answer is not there yet when image and prefix are read: type 0 sees type 0 only.",
        ),
        Mistake(
            "hides the prefix from the suffix",
            lambda ids: masks.block_mask(ids) & (ids[:, None, :] == ids[:, :, None]),
            "Every suffix token sees all of image and prefix: that is what it answers about.",
        ),
        Mistake(
            "has queries and keys swapped",
            lambda ids: masks.block_mask(ids).transpose(1, 2),
            "The result is indexed [query, key].",
        ),
    ),
)


def padding_cases(rng):
    """Prefix-LM masks with padding on either side, all rows of one batch different."""
    for rows, length, side in ((2, 6, "right"), (2, 6, "left"), (3, 5, "right"), (1, 7, "left"), (3, 8, "left")):
        ids, real = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        for row in range(rows):
            empty = int(rng.integers(1, length - 2))
            ids[row, -2:] = 1
            real[row, : empty if side == "left" else 0] = 0
            if side == "right":
                real[row, length - empty :] = 0
        yield masks.prefix_lm_mask(ids), real


def _diagonal(mask):
    return torch.eye(mask.shape[-1], dtype=torch.bool)


PADDING = Exercise(
    key="05.4",
    reference=masks.mask_padding,
    cases=padding_cases,
    difficulty=2,
    minutes=10,
    points=3,
    mistakes=(
        Mistake(
            "leaves padding visible",
            lambda mask, attention_mask: mask.clone(),
            "Where attention_mask is 0, that key's column must be closed to everyone else.",
        ),
        Mistake(
            "closes the rows of padding instead of its columns",
            lambda mask, attention_mask: (mask & attention_mask.bool()[:, :, None]) | _diagonal(mask),
            "What matters is who looks *at* padding: the keys, the last axis.",
        ),
        Mistake(
            "leaves a padding query without any key",
            lambda mask, attention_mask: mask & attention_mask.bool()[:, None, :],
            "Every query sees itself, padding too: in a causal mask its row could be empty. `| torch.eye(T).bool()`.",
        ),
        Mistake(
            "closes the words and leaves the padding",
            lambda mask, attention_mask: (mask & (attention_mask == 0)[:, None, :]) | _diagonal(mask),
            "attention_mask is 1 on tokens and 0 on padding.",
        ),
        Mistake(
            "opens every real key, also where the mask forbids it",
            lambda mask, attention_mask: mask | attention_mask.bool()[:, None, :] | _diagonal(mask),
            "Padding only takes away: combine with `&`.",
        ),
        Mistake(
            "takes every row's padding from the first row",
            lambda mask, attention_mask: (mask & attention_mask[:1].bool()[:, None, :]) | _diagonal(mask),
            "Each row of the batch has its own padding: keep the batch axis, `attention_mask[:, None, :]`.",
        ),
    ),
)


def window_cases(rng):
    for length in (4, 5, 6, 7, 9):
        yield length, int(rng.integers(1, length - 1))


def _steps_back(length):
    position = torch.arange(length)
    return position[:, None] - position[None, :]


WINDOW = Exercise(
    key="05.5",
    reference=masks.sliding_window_mask,
    cases=window_cases,
    difficulty=2,
    minutes=8,
    mistakes=(
        Mistake(
            "sees one key too many",
            lambda length, window: _steps_back(length) <= window,
            "The token itself is 0 steps back and counts: a window of 1 is the token alone, so `<`.",
        ),
        Mistake(
            "sees one key too few",
            lambda length, window: _steps_back(length) < window - 1,
            "Keys 0, 1, …, window − 1 steps back are inside.",
        ),
        Mistake(
            "closes the keys ahead as well",
            lambda length, window: _steps_back(length).abs() < window,
            "The window looks backwards only; what lies ahead is the business of the prefix-LM mask.",
        ),
        Mistake(
            "is causal as well",
            lambda length, window: (_steps_back(length) < window) & (_steps_back(length) >= 0),
            "The two are combined with `&` later; alone, the window leaves every key ahead open.",
        ),
        Mistake(
            "looks ahead where it should look back",
            lambda length, window: -_steps_back(length) < window,
            "Distance is query − key: positive for keys behind the query.",
        ),
        Mistake(
            "closes what is near and opens what is far",
            lambda length, window: _steps_back(length) >= window,
            "True means visible: near keys are True.",
        ),
    ),
)


def suffix_loss(logits, labels):
    """Mean cross-entropy of the words of the suffix, each predicted by the token before it; -100 marks all others."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def loss_cases(rng):
    """Suffixes of different length, so that a mean of rows is not the mean of words."""
    for rows, length, vocabulary in ((2, 6, 5), (3, 7, 4), (2, 8, 9), (4, 5, 6)):
        labels = torch.full((rows, length), -100)
        for row, suffix in enumerate(rng.permutation(rows)):
            labels[row, -(2 + int(suffix) % (length - 2)) :] = 1
        labels = torch.where(labels == 1, random_ids(rng, rows, length, vocabulary), labels)
        yield torch.from_numpy(rng.normal(0, 2, (rows, length, vocabulary))).float(), labels


def _row_means(logits, labels):
    rows = [suffix_loss(a[None], b[None]) for a, b in zip(logits, labels, strict=True)]
    return torch.stack(rows).mean()


SUFFIX_LOSS = Exercise(
    key="05.3",
    reference=suffix_loss,
    cases=loss_cases,
    difficulty=3,
    minutes=12,
    points=3,
    mistakes=(
        Mistake(
            "asks each token for itself instead of for the next one",
            lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100),
            "The logits at position t predict the token at t + 1: drop the last logits and the first label.",
        ),
        Mistake(
            "asks each token for the one before",
            lambda logits, labels: F.cross_entropy(
                logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten(), ignore_index=-100
            ),
            "Shifted the wrong way: `logits[:, :-1]` against `labels[:, 1:]`.",
        ),
        Mistake(
            "divides by all tokens, not by those of the suffix",
            lambda logits, labels: (
                F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
                )
                / labels[:, 1:].numel()
            ),
            "The mean is over positions whose label is not -100.",
        ),
        Mistake(
            "sums where it should average",
            lambda logits, labels: F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ),
            "The mean over words keeps long and short answers comparable.",
        ),
        Mistake(
            "averages each row first, so that short answers weigh more",
            _row_means,
            "Take the mean over all words of the batch at once.",
        ),
        Mistake(
            "counts the prefix too, as if its label were token 0",
            lambda logits, labels: F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten(), ignore_index=-100
            ),
            "-100 means: no loss here. F.cross_entropy leaves such labels out by itself.",
        ),
    ),
)

EXERCISES = [BLOCK, PREFIX_LM, SUFFIX_LOSS, PADDING, WINDOW]
