"""Chapter 07: why the second token is cheap."""

from dataclasses import dataclass, field

import torch

from minivlm import cache, gemma
from minivlm.config import GemmaConfig
from minivlm.course.exercises.exercise import Case, Exercise, Mistake


def random(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- the growing cache ----------------------------------------------------------------------------------------------


def append_cases(rng):
    """Mostly one new token, as in decoding; also several, and as many as there are old ones."""
    for B, K, S, T, d, name in (
        (2, 3, 4, 1, 5, "one new token"),
        (1, 3, 5, 2, 4, "a batch of one"),
        (2, 1, 5, 3, 6, "a single key head"),
        (4, 2, 3, 3, 5, "as many new tokens as old ones"),
        (3, 2, 1, 6, 4, "more new tokens than old ones"),
    ):
        yield Case((random(rng, B, K, S, d), random(rng, B, K, T, d)), name)
    yield Case((random(rng, 3, 2, 5, 4).bfloat16(), random(rng, 3, 2, 1, 4).bfloat16()), "bfloat16")


APPEND = Exercise(
    key="07.1",
    reference=cache.append,
    cases=append_cases,
    difficulty=1,
    minutes=5,
    hints=(
        (
            "Which of the four axes counts the tokens? torch has one function that joins tensors along an axis "
            "they already have, and one that makes a new axis."
        ),
        ("`torch.cat` takes a tuple of tensors and `dim`. The axes are 0 batch, 1 heads, 2 tokens, 3 head dimension."),
    ),
    mistakes=(
        Mistake(
            "concatenates along the heads instead of the tokens",
            lambda old, new: torch.cat((old, new), dim=1),
            "The axes are [B, K, S, d]: tokens are axis 2.",
        ),
        Mistake(
            "concatenates along the batch instead of the tokens",
            lambda old, new: torch.cat((old, new), dim=0),
            "`torch.cat` concatenates along axis 0 by default; tokens are axis 2.",
        ),
        Mistake(
            "concatenates along the head dimension",
            lambda old, new: torch.cat((old, new), dim=-1),
            "The last axis is the head dimension; tokens are axis 2.",
        ),
        Mistake(
            "puts the new tokens first",
            lambda old, new: torch.cat((new, old), dim=2),
            "Masks rely on the order of the tokens: first the old ones, then the new.",
        ),
        Mistake(
            "forgets the old tokens",
            lambda old, new: new.clone(),
            "The new query also needs the keys of all earlier tokens.",
        ),
        Mistake(
            "forgets the new tokens",
            lambda old, new: old.clone(),
            "A token attends to itself, so its own key and value must be in the cache before attention runs.",
        ),
        Mistake(
            "drops the oldest tokens",
            lambda old, new: torch.cat((old[:, :, new.shape[2] :], new), dim=2),
            "The cache grows: S old tokens and T new ones make S + T.",
        ),
        Mistake(
            "adds the new tokens to the old ones",
            lambda old, new: old + new,
            "Adding changes the values of old tokens: `torch.cat` puts tensors one after the other.",
        ),
        Mistake(
            "stacks the two on a new axis",
            lambda old, new: torch.stack((old, new)),
            "`torch.stack` adds an axis. `torch.cat` concatenates along one that exists.",
        ),
        Mistake(
            "adds only the first of the new tokens",
            lambda old, new: torch.cat((old, new[:, :, :1]), dim=2),
            "There can be several new tokens, T of them: S old and T new ones make S + T.",
        ),
        Mistake(
            "adds only the last of the new tokens",
            lambda old, new: torch.cat((old, new[:, :, -1:]), dim=2),
            "There can be several new tokens, T of them: S old and T new ones make S + T.",
        ),
        Mistake(
            "overwrites the newest of the old tokens",
            lambda old, new: torch.cat((old[:, :, : -new.shape[2]], new), dim=2),
            "Nothing is replaced: S old tokens and T new ones make S + T.",
        ),
    ),
)


# --- the static cache -----------------------------------------------------------------------------------------------


def write_cases(rng):
    """Into the middle, into an empty buffer, several tokens, and up to the last slot."""
    for B, K, M, d, T, start, name in (
        (2, 3, 7, 4, 1, 3, "one token"),
        (1, 2, 7, 5, 4, 0, "an empty buffer, a batch of one"),
        (3, 1, 8, 5, 2, 3, "several tokens, a single key head"),
        (2, 3, 6, 4, 1, 5, "the last slot"),
        (3, 2, 5, 6, 4, 1, "tokens that fill the buffer"),
    ):
        yield Case((random(rng, B, K, M, d), random(rng, B, K, T, d), start), name)
    yield Case((random(rng, 2, 3, 8, 5).bfloat16(), random(rng, 2, 3, 1, 5).bfloat16(), 4), "bfloat16")


def _write(buffer, new, start, end):
    """Write at ``start`` and return the slots up to ``end``."""
    buffer[:, :, start : start + new.shape[2]] = new[:, :, : max(0, buffer.shape[2] - start)]
    return buffer[:, :, :end]


def _write_first_only(buffer, new, start):
    buffer[:, :, start] = new[:, :, 0]
    return buffer[:, :, : start + 1]


def _write_sum(buffer, new, start):
    buffer[:, :, start : start + new.shape[2]] += new
    return buffer[:, :, : start + new.shape[2]]


def _write_heads(buffer, new, start):
    end = start + new.shape[1]
    buffer[:, start:end] = new
    return buffer[:, :end]


WRITE = Exercise(
    key="07.2",
    reference=cache.write_in_place,
    cases=write_cases,
    difficulty=2,
    minutes=10,
    hints=(
        "The new tokens fill one slot each, from `start` on. What you return ends where they end.",
        (
            "Assigning to a slice writes into the tensor: `buffer[:, :, start:end] = new`. A slice is a view. "
            "It copies nothing."
        ),
    ),
    mistakes=(
        Mistake(
            "writes at the start of the buffer",
            lambda buffer, new, start: _write(buffer, new, 0, start + new.shape[2]),
            "Slots 0 to start − 1 are fed: the first new token goes to slot `start`.",
        ),
        Mistake(
            "starts one slot too late",
            lambda buffer, new, start: _write(buffer, new, start + 1, start + 1 + new.shape[2]),
            "With `start` tokens stored, slots 0 to start − 1 are fed and slot `start` is the first free one.",
        ),
        Mistake(
            "starts one slot too early",
            lambda buffer, new, start: _write(buffer, new, max(start - 1, 0), start + new.shape[2]),
            "Slot start − 1 contains the newest old token: the first free slot is `start`.",
        ),
        Mistake(
            "returns the whole buffer",
            lambda buffer, new, start: _write(buffer, new, start, buffer.shape[2]),
            "Slots after the last token are not filled, so no query should attend to them: `buffer[:, :, :end]`.",
        ),
        Mistake(
            "returns only the new tokens",
            lambda buffer, new, start: _write(buffer, new, start, None)[:, :, start : start + new.shape[2]],
            "Attention needs all tokens so far, the old ones too.",
        ),
        Mistake(
            "returns only the old tokens",
            lambda buffer, new, start: _write(buffer, new, start, start),
            "The new tokens are filled slots too: the end is `start + new.shape[2]`.",
        ),
        Mistake(
            "writes only the first of the new tokens",
            _write_first_only,
            "`new` holds T tokens: they fill the slots from `start` to start + T − 1.",
        ),
        Mistake(
            "adds to what is in the slots",
            _write_sum,
            "Free slots can hold anything: overwrite them, `buffer[:, :, start:end] = new`.",
        ),
        Mistake(
            "writes along the heads instead of the tokens",
            _write_heads,
            "The axes are [B, K, M, d]: slots are axis 2.",
        ),
        Mistake(
            "always writes at the end of the buffer",
            lambda buffer, new, start: _write(buffer, new, buffer.shape[2] - new.shape[2], start + new.shape[2]),
            "The first free slot is `start`.",
        ),
        Mistake(
            "leaves the buffer unchanged",
            lambda buffer, new, start: torch.cat((buffer[:, :, :start], new), dim=2),
            "The next call expects these tokens in the buffer: assign to a slice, `buffer[:, :, start:end] = new`.",
        ),
    ),
)


# --- its size -------------------------------------------------------------------------------------------------------


def size_cases(rng):
    """No two sizes that could be mixed up are equal. Without batch size and dtype, it is one row in bfloat16."""
    for layers, K, group, d, dtype, name in (
        (3, 2, 4, 6, torch.float32, "float32"),
        (5, 1, 8, 16, torch.bfloat16, "bfloat16"),
        (4, 3, 2, 10, torch.float64, "float64"),
        (7, 4, 1, 18, torch.bfloat16, "as many key heads as query heads"),
        (6, 3, 4, 14, None, "no batch size, no dtype"),
        (2, 5, 3, 12, torch.float32, "dtype by keyword"),
    ):
        config = GemmaConfig(
            hidden_size=int(rng.integers(100, 900)),
            num_hidden_layers=layers,
            num_attention_heads=K * group,
            num_key_value_heads=K,
            head_dim=d,
        )
        tokens, batch_size = int(rng.integers(20, 5000)), int(rng.integers(2, 9))
        if dtype is None:
            yield Case((config, tokens), name)
        elif name == "dtype by keyword":
            yield Case((config, tokens), name, {"dtype": dtype})
        else:
            yield Case((config, tokens, batch_size, dtype), name)


def _bytes(c, tokens, batch_size, dtype, both=2, heads=None, layers=None, width=None, itemsize=None):
    heads, layers = heads or c.num_key_value_heads, layers or c.num_hidden_layers
    return both * layers * heads * (width or c.head_dim) * tokens * batch_size * (itemsize or dtype.itemsize)


def _sized(**how):
    """``cache_bytes`` with one wrong factor, a number or a function of the configuration."""

    def cache_bytes(config, tokens, batch_size=1, dtype=torch.bfloat16):
        wrong = {name: value(config) if callable(value) else value for name, value in how.items()}
        return _bytes(config, tokens, batch_size, dtype, **wrong)

    return cache_bytes


SIZE = Exercise(
    key="07.3",
    reference=cache.cache_bytes,
    cases=size_cases,
    difficulty=1,
    minutes=8,
    hints=(
        (
            "The paragraph above lists everything that is stored for one token. Which head count in `config` is "
            "the one of the keys? Do not forget the rows of the batch."
        ),
        (
            "A token has 2 (key and value) × layers × key heads × head dimension numbers. Then come tokens, "
            "rows, and bytes per number."
        ),
    ),
    mistakes=(
        Mistake(
            "counts the keys but not the values",
            _sized(both=1),
            "Each token stores a key and a value: twice as much.",
        ),
        Mistake(
            "uses the number of query heads instead of key heads",
            _sized(heads=lambda c: c.num_attention_heads),
            "Queries are not stored. Keys and values have `num_key_value_heads` heads.",
        ),
        Mistake(
            "uses the hidden size as the size of a key",
            _sized(heads=1, width=lambda c: c.hidden_size),
            "A key has `num_key_value_heads * head_dim` values, whatever the hidden size is.",
        ),
        Mistake(
            "uses the hidden size as the head dimension",
            _sized(width=lambda c: c.hidden_size),
            "The head dimension is `head_dim`.",
        ),
        Mistake(
            "forgets the layers",
            _sized(layers=1),
            "Every layer has its own keys and values: `num_hidden_layers` times as much.",
        ),
        Mistake(
            "forgets the batch",
            lambda config, tokens, batch_size=1, dtype=torch.bfloat16: _bytes(config, tokens, 1, dtype),
            "Every row of the batch has its own tokens: `batch_size` times as much.",
        ),
        Mistake(
            "forgets the key heads",
            _sized(heads=1),
            "Each of the `num_key_value_heads` heads has its own keys and values.",
        ),
        Mistake(
            "forgets the head dimension",
            _sized(width=1),
            "A key has `head_dim` values for each head.",
        ),
        Mistake(
            "forgets the tokens",
            lambda config, tokens, batch_size=1, dtype=torch.bfloat16: _bytes(config, 1, batch_size, dtype),
            "Every token of a row is stored: `tokens` times as much.",
        ),
        Mistake(
            "derives the head dimension from the hidden size",
            _sized(width=lambda c: c.hidden_size // c.num_attention_heads),
            "In Gemma, a head need not have hidden_size / num_attention_heads values: use `head_dim`.",
        ),
        Mistake(
            "counts the queries too",
            _sized(both=3),
            "Only keys and values are stored: an old query is never used again.",
        ),
        Mistake(
            "counts bits instead of bytes",
            lambda config, tokens, batch_size=1, dtype=torch.bfloat16: 8 * _bytes(config, tokens, batch_size, dtype),
            "`dtype.itemsize` is already in bytes.",
        ),
        Mistake(
            "returns megabytes instead of bytes",
            lambda config, tokens, batch_size=1, dtype=torch.bfloat16: _bytes(config, tokens, batch_size, dtype) / 1e6,
            "Return bytes, an integer.",
        ),
        Mistake(
            "counts two bytes per value whatever the dtype",
            _sized(itemsize=2),
            "`dtype.itemsize` is the number of bytes per value.",
        ),
        Mistake(
            "counts four bytes per value whatever the dtype",
            _sized(itemsize=4),
            "`dtype.itemsize` is the number of bytes per value; for bfloat16 it is two.",
        ),
        Mistake(
            "counts values instead of bytes",
            _sized(itemsize=1),
            "Each value takes `dtype.itemsize` bytes.",
        ),
    ),
)


# --- positions ------------------------------------------------------------------------------------------------------


def position_cases(rng):
    """Padding on either side, in between, or none; the whole prompt, one new token, and a few."""
    for B, S, queries, side, name in (
        (3, 6, 6, "left", "a whole prompt, padded on the left"),
        (3, 7, 1, "left", "one new token, padded on the left"),
        (2, 5, 5, "right", "a whole prompt, padded on the right"),
        (2, 8, 3, "left", "three new tokens, padded on the left"),
        (2, 6, 3, "", "no padding"),
        (1, 7, 2, "left", "a batch of one"),
        (2, 9, 4, "between", "padding between prompt and answer"),
        (3, 5, 4, "empty", "a row of padding only"),
    ):
        mask = torch.ones(B, S, dtype=torch.long)
        for row, padding in enumerate(rng.permutation(3)[:B] + 1):
            if side == "between":
                mask[row, S - 2 - padding : S - 2] = 0
            elif side:
                mask[row, slice(S - padding, S) if side == "right" else slice(0, padding)] = 0
        if side == "empty":
            mask[1] = 0
        yield Case((mask, queries), name)


def _at_slots(mask, queries):
    return torch.arange(1, mask.shape[1] + 1)[-queries:].repeat(len(mask), 1)


def _one_token_early(mask, queries):
    return torch.nn.functional.pad(mask.cumsum(-1), (1, 0))[:, -queries - 1 : -1]


def _back_from_the_last(mask, queries):
    return mask.sum(-1, keepdim=True) - torch.arange(queries - 1, -1, -1)


POSITIONS = Exercise(
    key="07.4",
    reference=gemma.token_positions,
    cases=position_cases,
    difficulty=2,
    minutes=10,
    hints=(
        "The position of a token is the number of real tokens up to and including it.",
        "First `cumsum` along each row, then take the last `queries` columns. The order matters.",
    ),
    mistakes=(
        Mistake(
            "counts padding too",
            _at_slots,
            "A row needs the same positions as without padding: take the cumulative sum of attention_mask.",
        ),
        Mistake(
            "starts again at 1 in every call",
            lambda mask, queries: mask[:, -queries:].cumsum(-1),
            "The new token comes after all cached ones: sum over the whole row, then take the last positions.",
        ),
        Mistake(
            "counts from 0",
            lambda mask, queries: mask.cumsum(-1)[:, -queries:] - 1,
            "Here, as in transformers, the first token of a row has position 1.",
        ),
        Mistake(
            "counts padding too, and from 0",
            lambda mask, queries: _at_slots(mask, queries) - 1,
            "A row needs the same positions as without padding, from 1 on: take the cumulative sum of attention_mask.",
        ),
        Mistake(
            "returns the positions one slot too early",
            _one_token_early,
            "The newest token is in the last column: take the last `queries` columns, including that one.",
        ),
        Mistake(
            "counts back from the last token, through the padding",
            _back_from_the_last,
            "Padding can be among the queries, and the sum does not grow there: slice the cumulative sum instead.",
        ),
        Mistake(
            "returns the positions of all tokens",
            lambda mask, queries: mask.cumsum(-1),
            "Only the last `queries` tokens go through the decoder: `[:, -queries:]`.",
        ),
        Mistake(
            "loses the axis of the queries",
            lambda mask, queries: mask.cumsum(-1)[:, -queries],
            "An index removes the axis, a slice keeps it: `[:, -queries:]`.",
        ),
        Mistake(
            "returns the mask instead of its sum",
            lambda mask, queries: mask[:, -queries:].clone(),
            "A position counts the tokens up to and including this one: take the cumulative sum, `cumsum(-1)`.",
        ),
        Mistake(
            "sets the positions of padding to 0",
            lambda mask, queries: (mask.cumsum(-1) * mask)[:, -queries:],
            "On padding, return whatever the running sum is there.",
        ),
        Mistake(
            "sets the positions of padding to 1",
            lambda mask, queries: mask.cumsum(-1).masked_fill(mask == 0, 1)[:, -queries:],
            "transformers does this, and no query attends to padding. Here, return the running sum itself.",
        ),
        Mistake(
            "is one position too high",
            lambda mask, queries: mask.cumsum(-1)[:, -queries:] + 1,
            "The cumulative sum already includes the token itself: add nothing.",
        ),
        Mistake(
            "returns the positions of the first tokens instead of the newest",
            lambda mask, queries: mask.cumsum(-1)[:, :queries],
            "The queries are the last tokens of the row: `[:, -queries:]`.",
        ),
        Mistake(
            "gives all new tokens the last position",
            lambda mask, queries: mask.sum(-1, keepdim=True).repeat(1, queries),
            "The cumulative sum, `cumsum`, gives each token its own position.",
        ),
        Mistake(
            "sums over the batch",
            lambda mask, queries: mask.cumsum(0)[:, -queries:],
            "Count tokens along a row, the last axis: `cumsum(-1)`.",
        ),
        Mistake(
            "counts padding instead of tokens",
            lambda mask, queries: (1 - mask).cumsum(-1)[:, -queries:],
            "attention_mask is 1 for tokens and 0 for padding: sum it without inverting it.",
        ),
    ),
)


# --- the loop -------------------------------------------------------------------------------------------------------

VOCAB_SIZE, HIDDEN_SIZE, MAX_TOKENS = 31, 8, 64


@dataclass(frozen=True)
class ToyDecoder:
    """One attention layer with random weights. ``decoder(tokens, cache)`` → logits [T, V] for the next token.

    ``cache`` is a list, empty at first, to which each token appends its key and value. The decoder accepts at most
    ``limit`` tokens in total.
    """

    seed: int
    limit: int
    fed: list[int] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, tokens: list[int], cache: list) -> torch.Tensor:
        self.fed.append(len(tokens))
        if sum(self.fed) > self.limit:
            raise ValueError(
                f"the decoder got {sum(self.fed)} tokens but {self.limit} are enough; the last call had {len(tokens)} "
                f"tokens and {len(cache)} in the cache. Feed the prompt once, then each new token once."
            )
        g = torch.Generator().manual_seed(self.seed)
        embeddings, positions = (torch.randn(n, HIDDEN_SIZE, generator=g) for n in (VOCAB_SIZE, MAX_TOKENS))
        to_q, to_k, to_v = torch.randn(3, HIDDEN_SIZE, HIDDEN_SIZE, generator=g) / 2
        logits = []
        for token in tokens:
            x = embeddings[token] + positions[len(cache)]
            cache.append((to_k @ x, to_v @ x))
            keys, values = map(torch.stack, zip(*cache, strict=True))
            logits.append(embeddings.roll(1, 0) @ (x + 2 * (keys @ (to_q @ x)).softmax(0) @ values))
        return torch.stack(logits)


def greedy_with_cache(decoder, prompt, new_tokens):
    """The ``new_tokens`` tokens after the prompt, a list of ids, always the most likely: prefill, then decode steps."""
    cache, generated, tokens = [], [], prompt
    for _ in range(new_tokens):
        logits = decoder(tokens, cache)
        tokens = [int(logits[-1].argmax())]
        generated += tokens
    return generated


def loop_cases(rng):
    """Prompts shorter and longer than the answer, also of one token, and an answer of one token."""
    for prompt, new_tokens, name in (
        (5, 6, "a prompt of 5 tokens"),
        (3, 8, "a prompt of 3 tokens"),
        (6, 1, "one new token"),
        (1, 5, "a prompt of one token"),
        (7, 4, "a prompt of 7 tokens"),
    ):
        decoder = ToyDecoder(int(rng.integers(10_000)), limit=prompt + new_tokens)
        yield Case((decoder, rng.integers(0, VOCAB_SIZE, prompt).tolist(), new_tokens), name)


def _best(logits, row=-1):
    return int(logits[row].argmax())


def _everything_again(decoder, prompt, new_tokens):
    text = list(prompt)
    for _ in range(new_tokens):
        text.append(_best(decoder(text, [])))
    return text[len(prompt) :]


def _everything_into_the_cache(decoder, prompt, new_tokens):
    text, cache = list(prompt), []
    for _ in range(new_tokens):
        text.append(_best(decoder(text, cache)))
    return text[len(prompt) :]


def _loop(decoder, prompt, new_tokens, fresh=False, row=-1, feed=None, best=torch.argmax):
    """The right loop with one change: a fresh cache per step, another row of logits, another token to feed or take."""
    cache, generated, tokens = [], [], prompt
    for _ in range(new_tokens):
        generated.append(int(best(decoder(tokens, cache)[row])))
        cache = [] if fresh else cache
        tokens = [generated[-1] if feed is None else feed(generated)]
    return generated


def _every_answer(decoder, prompt, new_tokens):
    cache, generated = [], []
    for token in prompt:
        generated.append(_best(decoder([token], cache)))
    while len(generated) < new_tokens:
        generated.append(_best(decoder(generated[-1:], cache)))
    return generated[:new_tokens]


def _last_token_twice(decoder, prompt, new_tokens):
    cache, generated, token = [], [], prompt[-1]
    decoder(prompt, cache)
    for _ in range(new_tokens):
        token = _best(decoder([token], cache))
        generated.append(token)
    return generated


LOOP = Exercise(
    key="07.5",
    reference=greedy_with_cache,
    cases=loop_cases,
    difficulty=3,
    minutes=15,
    points=3,
    hints=(
        (
            "The scores after the prompt give the first new token. From then on the cache contains everything "
            "but the newest token, so that is all you feed."
        ),
        (
            "The first call takes the prompt, every later call a list with one token. "
            "`int(scores[-1].argmax())` is the next token."
        ),
    ),
    mistakes=(
        Mistake(
            "feeds the whole sequence again for every token",
            _everything_again,
            "That is right but slow. Use one cache, and after the prompt feed only the newest token.",
        ),
        Mistake(
            "feeds the whole sequence again into a cache that already contains it",
            _everything_into_the_cache,
            "The cache already contains the earlier tokens: after the prompt, feed only the newest token.",
        ),
        Mistake(
            "starts with an empty cache for every token",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens, fresh=True),
            "Create the cache once, before the loop: the new token must attend to the prompt.",
        ),
        Mistake(
            "feeds the last token of the prompt twice",
            _last_token_twice,
            "The call with the prompt already returns the logits for the first new token, in its last row.",
        ),
        Mistake(
            "uses the logits of the first token instead of the last",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens, row=0),
            "Each row of logits predicts what follows one token: what follows the prompt is in the last row, `[-1]`.",
        ),
        Mistake(
            "feeds the first new token over and over",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens, feed=lambda generated: generated[0]),
            "Feed the newest token, so update the variable in every iteration.",
        ),
        Mistake(
            "drops the token that the prompt predicts",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens + 1)[1:],
            "The logits after the prompt already predict the first new token: it is part of the answer.",
        ),
        Mistake(
            "returns the prompt too",
            lambda decoder, prompt, new_tokens: prompt + _loop(decoder, prompt, new_tokens),
            "Return only the new tokens.",
        ),
        Mistake(
            "generates one token too few",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens - 1),
            "The prompt predicts the first new token, each token you feed one more: `new_tokens` calls in all.",
        ),
        Mistake(
            "takes the least likely token",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens, best=torch.argmin),
            "The next token is the one with the highest score: `argmax`.",
        ),
        Mistake(
            "feeds the prompt one token at a time and keeps every answer",
            _every_answer,
            "While the prompt is fed, only the scores after its last token count.",
        ),
        Mistake(
            "ignores the prompt after the first token",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt[:1], new_tokens),
            "The first call, the prefill, takes the whole prompt.",
        ),
        Mistake(
            "generates one token too many",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens + 1),
            "The prompt predicts the first new token, each token you feed one more: `new_tokens` calls in all.",
        ),
        Mistake(
            "feeds only the last token of the prompt",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt[-1:], new_tokens),
            "The first call, the prefill, takes the whole prompt: its keys and values must be in the cache.",
        ),
    ),
)

EXERCISES = [APPEND, WRITE, SIZE, POSITIONS, LOOP]
