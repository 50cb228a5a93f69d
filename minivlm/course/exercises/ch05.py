"""Chapter 05: which token attends to which."""

import torch
import torch.nn.functional as F

from minivlm import masks
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def random_ids(rng, rows, length, high=2):
    return torch.from_numpy(rng.integers(0, high, (rows, length)))


def block_cases(rng):
    """Rows and tokens differ in number, so that the axes cannot be confused."""
    for rows, length, name in (
        (2, 5, "two rows"),
        (1, 7, "a batch of one"),
        (4, 3, "more rows than tokens"),
        (3, 6, "a causal and a bidirectional row"),
    ):
        mask_ar = random_ids(rng, rows, length)
        mask_ar[0, 1:3], mask_ar[-1, -1] = torch.tensor([0, 1]), 1
        if name.startswith("a causal"):
            mask_ar[1], mask_ar[2] = 1, 0
        yield Case((mask_ar,), name)


def _compare(block, relation):
    return relation(block[..., None, :], block[..., :, None])


BLOCK = Exercise(
    key="05.1",
    reference=masks.block_mask,
    cases=block_cases,
    difficulty=1,
    minutes=8,
    hints=(
        (
            "A running sum along the last axis, then one comparison, as in *All at once*. With a batch in "
            "front, index from the end: `...` stands for all axes before the ones you name. Which of the two "
            "factors needs its new axis before the tokens, and which after them?"
        ),
        (
            "With `block = mask_ar.cumsum(-1)`, the keys are `block[..., None, :]` and the queries `block[..., "
            ":, None]`. Which may be at most as large as the other?"
        ),
    ),
    mistakes=(
        Mistake(
            "swaps queries and keys",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.ge),
            "The result is indexed [query, key]: the key's block runs along the last axis, `block[..., None, :]`.",
        ),
        Mistake(
            "blocks a token's own block",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.lt),
            "The rule is `<=`: tokens in one block attend to each other and to themselves.",
        ),
        Mistake(
            "lets a token attend only to its own block",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.eq),
            "Earlier blocks are visible too: the rule is `<=`, not `==`.",
        ),
        Mistake(
            "compares mask_ar itself instead of its cumulative sum",
            lambda mask_ar: _compare(mask_ar, torch.le),
            "Every 1 starts a new block: `mask_ar.cumsum(-1)` numbers the blocks.",
        ),
        Mistake(
            "sums over the batch axis",
            lambda mask_ar: _compare(mask_ar.cumsum(0), torch.le),
            "Count blocks along the tokens, the last axis: `cumsum(-1)`.",
        ),
        Mistake(
            "is causal whatever mask_ar is",
            lambda mask_ar: _compare(torch.arange(mask_ar.shape[-1]).expand_as(mask_ar), torch.le),
            "Tokens in one block attend to each other in both directions: compare blocks, not positions.",
        ),
        Mistake(
            "returns integers instead of booleans",
            lambda mask_ar: _compare(mask_ar.cumsum(-1), torch.le).long(),
            "The comparison `<=` already returns booleans.",
        ),
    ),
)


def type_cases(rng):
    """Image and prefix first, then the suffix, mostly of at least two tokens."""
    for rows, length, name in (
        (2, 6, "two rows"),
        (1, 8, "a batch of one"),
        (3, 7, "a prompt without an answer"),
        (4, 5, "an answer of one token"),
    ):
        ids = torch.zeros(rows, length, dtype=torch.long)
        for row in ids:
            row[-int(rng.integers(2, length - 1)) :] = 1
        if name.startswith("a prompt"):
            ids[1] = 0
        if name.startswith("an answer"):
            ids[2, :-1], ids[2, -1] = 0, 1
        yield Case((ids,), name)


def _square(ids, mask):
    return mask.expand(len(ids), *mask.shape[-2:]).clone()


PREFIX_LM = Exercise(
    key="05.2",
    reference=masks.prefix_lm_mask,
    cases=type_cases,
    difficulty=1,
    minutes=5,
    hints=(
        ("Compare `token_type_ids` with the `mask_ar` of the toy example. There is less to do than you might think."),
        (
            "In `mask_ar`, 1 starts a new block and 0 continues the one before. The token types already say "
            "exactly that."
        ),
    ),
    mistakes=(
        Mistake(
            "is causal everywhere",
            lambda ids: _square(ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()),
            "Image and prefix tokens (type 0) attend to each other in both directions; only the suffix is causal.",
        ),
        Mistake(
            "lets every token attend to every token",
            lambda ids: _square(ids, torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)),
            "A suffix token must not attend to later suffix tokens: it has to predict them.",
        ),
        Mistake(
            "lets suffix tokens attend to later suffix tokens",
            lambda ids: ids[:, None, :] <= ids[:, :, None],
            "Put every suffix token into its own block: the cumulative sum of the types does that.",
        ),
        Mistake(
            "lets image and prefix attend to the suffix",
            lambda ids: masks.bidirectional_mask(ids.shape[1]) & ((ids == 0)[:, :, None] | masks.block_mask(ids)),
            "At inference the answer does not exist yet during prefill: type 0 attends only to type 0.",
        ),
        Mistake(
            "blocks the prefix for the suffix",
            lambda ids: masks.block_mask(ids) & (ids[:, None, :] == ids[:, :, None]),
            "Every suffix token attends to the whole image and prefix: the answer depends on them.",
        ),
        Mistake(
            "swaps queries and keys",
            lambda ids: masks.block_mask(ids).transpose(1, 2),
            "The result is indexed [query, key].",
        ),
    ),
)


def padding_cases(rng):
    """Padding on either side or none; the rows of a batch differ. Under a causal mask, padding in front has no key."""
    for rows, length, side, kind, name in (
        (2, 6, "right", "prefix", "padded on the right"),
        (3, 8, "left", "prefix", "padded on the left"),
        (2, 7, "left", "causal", "a causal mask with padding in front"),
        (1, 6, "left", "prefix", "a batch of one"),
        (3, 5, "", "prefix", "no padding"),
        (4, 9, "right", "window", "a sliding window"),
    ):
        ids, real = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)
        for row, suffix in enumerate(rng.permutation(length - 2)[:rows] + 1):
            ids[row, -suffix:] = 1
        for row, padding in enumerate(rng.permutation(length - 2)[:rows] + 1):
            if side:
                real[row, slice(0, padding) if side == "left" else slice(length - padding, length)] = 0
        mask = masks.prefix_lm_mask(ids if kind == "prefix" else torch.ones_like(ids))
        if kind == "window":
            mask &= masks.sliding_window_mask(length, int(rng.integers(2, 5)))
        yield Case((mask, real), name)


def _diagonal(mask):
    return torch.eye(mask.shape[-1], dtype=torch.bool)


def _only_empty_rows(mask, attention_mask):
    mask = mask & attention_mask.bool()[:, None, :]
    return mask | (_diagonal(mask) & ~mask.any(-1, keepdim=True))


PADDING = Exercise(
    key="05.4",
    reference=masks.mask_padding,
    cases=padding_cases,
    difficulty=2,
    minutes=10,
    points=3,
    hints=(
        (
            "Padding is about keys: it blocks columns, the same ones for every query of a row. The diagonal is "
            "the exception."
        ),
        (
            "`attention_mask.bool()[:, None, :]` has shape `[B, 1, T]` and says which keys are real. "
            "`torch.eye(T, dtype=torch.bool)` is the diagonal."
        ),
    ),
    mistakes=(
        Mistake(
            "leaves padding visible",
            lambda mask, attention_mask: mask.clone(),
            "If attention_mask is 0 for a key, mask its column for all other queries.",
        ),
        Mistake(
            "masks the rows of padding instead of its columns",
            lambda mask, attention_mask: (mask & attention_mask.bool()[:, :, None]) | _diagonal(mask),
            "No query should attend *to* padding: mask the keys, the last axis.",
        ),
        Mistake(
            "masks the rows of padding instead of its columns, and leaves them without any key",
            lambda mask, attention_mask: mask & attention_mask.bool()[:, :, None],
            "No query should attend *to* padding: mask the keys, the last axis. And every query attends to itself.",
        ),
        Mistake(
            "masks the rows of padding as well as its columns",
            lambda mask, attention_mask: (
                (mask & attention_mask.bool()[:, :, None] & attention_mask.bool()[:, None, :]) | _diagonal(mask)
            ),
            "Only the keys matter, the last axis: what a padding query attends to is never used.",
        ),
        Mistake(
            "does not let padding attend to itself",
            lambda mask, attention_mask: mask & attention_mask.bool()[:, None, :],
            "Every query attends to itself, even padding: the first query of a causal mask has no other key.",
        ),
        Mistake(
            "lets padding attend to itself only in rows that would be empty",
            _only_empty_rows,
            "Every query attends to itself, whether or not it has other keys: the whole diagonal is True.",
        ),
        Mistake(
            "masks the tokens instead of the padding",
            lambda mask, attention_mask: (mask & (attention_mask == 0)[:, None, :]) | _diagonal(mask),
            "attention_mask is 1 for tokens and 0 for padding.",
        ),
        Mistake(
            "allows every real key, even where the mask blocks it",
            lambda mask, attention_mask: mask | attention_mask.bool()[:, None, :] | _diagonal(mask),
            "Padding can only block more: combine with `&`.",
        ),
        Mistake(
            "ignores the mask",
            lambda mask, attention_mask: attention_mask.bool()[:, None, :] | _diagonal(mask),
            "What the mask blocks stays blocked, except for the diagonal: combine mask and padding with `&`.",
        ),
        Mistake(
            "uses the first row's padding for all rows",
            lambda mask, attention_mask: (mask & attention_mask[:1].bool()[:, None, :]) | _diagonal(mask),
            "Each row of the batch has its own padding: keep the batch axis, `attention_mask[:, None, :]`.",
        ),
    ),
)


def window_cases(rng):
    for length, name in ((7, ""), (9, ""), (6, "a window of 1"), (5, "a window as long as the sequence"), (8, "")):
        window = int(rng.integers(2, length - 1))
        window = 1 if name == "a window of 1" else length if name else window
        yield Case((length, window), name or f"{length} tokens, a window of {window}")


def _steps_back(length):
    position = torch.arange(length)
    return position[:, None] - position[None, :]


WINDOW = Exercise(
    key="05.5",
    reference=masks.sliding_window_mask,
    cases=window_cases,
    difficulty=2,
    minutes=8,
    hints=(
        "With `position = torch.arange(length)`, the steps behind are query position − key position.",
        (
            "`position[:, None] - position[None, :]` is the table of steps. Which comparison is True for 0 to "
            "`window` − 1, and for every negative number?"
        ),
    ),
    mistakes=(
        Mistake(
            "allows one key too many",
            lambda length, window: _steps_back(length) <= window,
            "The token itself is included, at distance 0. A window of 1 is only the token itself, so use `<`.",
        ),
        Mistake(
            "allows one key too few",
            lambda length, window: _steps_back(length) < window - 1,
            "Keys at distance 0, 1, …, window − 1 are allowed.",
        ),
        Mistake(
            "also blocks later keys",
            lambda length, window: _steps_back(length).abs() < window,
            "The window only limits how far back a query attends. The prefix-LM mask handles later keys.",
        ),
        Mistake(
            "is also causal",
            lambda length, window: (_steps_back(length) < window) & (_steps_back(length) >= 0),
            "The two masks are combined with `&` later. On its own, the window allows every later key.",
        ),
        Mistake(
            "limits later keys instead of earlier ones",
            lambda length, window: -_steps_back(length) < window,
            "The distance is query − key, which is positive for earlier keys.",
        ),
        Mistake(
            "is causal and has no window",
            lambda length, window: _steps_back(length) >= 0,
            "It blocks only keys that are `window` or more steps behind the query. Later keys stay True.",
        ),
        Mistake(
            "blocks near keys and allows far ones",
            lambda length, window: _steps_back(length) >= window,
            "True means visible: near keys are True.",
        ),
    ),
)


def suffix_loss(logits, labels):
    """Mean cross-entropy of the suffix tokens, each predicted by the token before it; all other labels are −100."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def loss_cases(rng):
    """Suffixes of different length, so that the mean over rows is not the mean over tokens. V is never T − 1."""
    for rows, length, vocabulary, name in (
        (2, 6, 9, "two answers of different length"),
        (3, 7, 4, "three answers of different length"),
        (1, 8, 5, "a batch of one"),
        (4, 9, 6, "a row without an answer"),
        (2, 7, 11, "padded on the right"),
    ):
        labels = torch.full((rows, length), -100)
        for row, suffix in enumerate(rng.permutation(rows)):
            end = length - row if name.startswith("padded") else length
            labels[row, end - 2 - int(suffix) % (length - 3) : end] = 1
        labels = torch.where(labels == 1, random_ids(rng, rows, length, vocabulary), labels)
        if name.startswith("a row"):
            labels[1] = -100
        yield Case((torch.from_numpy(rng.normal(0, 2, (rows, length, vocabulary))).float(), labels), name)


def _row_means(logits, labels):
    rows = [suffix_loss(a[None], b[None]) for a, b in zip(logits, labels, strict=True)]
    return torch.stack(rows).nanmean()


def _row_means_with_nan(logits, labels):
    rows = [suffix_loss(a[None], b[None]) for a, b in zip(logits, labels, strict=True)]
    return torch.stack(rows).mean()


def _sum(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def _reshaped(logits, labels):
    B, T, V = logits.shape
    return F.cross_entropy(logits[:, :-1].reshape(B, V, T - 1), labels[:, 1:])


SUFFIX_LOSS = Exercise(
    key="05.3",
    reference=suffix_loss,
    cases=loss_cases,
    difficulty=3,
    minutes=12,
    points=3,
    hints=(
        (
            "Logits and labels are one step apart. Shift one against the other, and what remains is an ordinary "
            "cross-entropy over the labels that count."
        ),
        (
            "The logits at position *t* were computed without token *t + 1*: they predict it. So the last "
            "logits and the first label have no partner. `F.cross_entropy` takes `[N, V]` and `[N]`, and has an "
            "argument `ignore_index=-100`."
        ),
    ),
    mistakes=(
        Mistake(
            "predicts each token from itself instead of from the token before",
            lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100),
            "The logits at position t predict the token at t + 1: drop the last logits and the first label.",
        ),
        Mistake(
            "predicts the previous token instead of the next one",
            lambda logits, labels: F.cross_entropy(
                logits[:, 1:].flatten(0, 1), labels[:, :-1].flatten(), ignore_index=-100
            ),
            "The shift goes the wrong way: compare `logits[:, :-1]` with `labels[:, 1:]`.",
        ),
        Mistake(
            "divides by the number of all tokens instead of suffix tokens",
            lambda logits, labels: _sum(logits, labels) / labels[:, 1:].numel(),
            "Average over positions whose label is not −100.",
        ),
        Mistake(
            "divides by the number of all positions instead of suffix tokens",
            lambda logits, labels: _sum(logits, labels) / labels.numel(),
            "Average over positions whose label is not −100.",
        ),
        Mistake(
            "divides by the batch size instead of the number of suffix tokens",
            lambda logits, labels: _sum(logits, labels) / len(labels),
            "Average over all positions of the batch whose label is not −100.",
        ),
        Mistake(
            "sums instead of averaging",
            _sum,
            "With the mean over tokens, losses of long and short answers are comparable.",
        ),
        Mistake(
            "averages each row first, so tokens of short answers weigh more",
            _row_means,
            "Average over all suffix tokens of the batch at once.",
        ),
        Mistake(
            "averages each row first, which is NaN for a row without an answer",
            _row_means_with_nan,
            "Average over all suffix tokens of the batch at once: a row can have none.",
        ),
        Mistake(
            "returns one loss per position instead of their mean",
            lambda logits, labels: F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
            ),
            "Return a scalar, the mean over the positions whose label is not −100.",
        ),
        Mistake(
            "leaves the vocabulary as the last axis of a tensor with three axes",
            lambda logits, labels: F.cross_entropy(logits[:, :-1], labels[:, 1:]),
            "`F.cross_entropy` expects the vocabulary on axis 1: flatten to [N, V] and [N], or transpose.",
        ),
        Mistake(
            "reshapes instead of transposing, which mixes positions and vocabulary",
            _reshaped,
            "`reshape` keeps the memory order, so scores of different positions mix: flatten to [N, V] and [N].",
        ),
        Mistake(
            "takes the softmax twice",
            lambda logits, labels: suffix_loss(logits.softmax(-1), labels),
            "`F.cross_entropy` takes logits: it computes the log-softmax itself.",
        ),
        Mistake(
            "passes log-probabilities without selecting the label's",
            lambda logits, labels: -logits[:, :-1].log_softmax(-1)[labels[:, 1:] != -100].mean(),
            "Cross-entropy is minus the log-probability of the one token that the label names.",
        ),
        Mistake(
            "includes the prefix, as if its labels were token 0",
            lambda logits, labels: F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].clamp(min=0).flatten(), ignore_index=-100
            ),
            "−100 means no loss at this position. `F.cross_entropy` ignores these labels by default.",
        ),
    ),
)

EXERCISES = [BLOCK, PREFIX_LM, SUFFIX_LOSS, PADDING, WINDOW]
