"""Chapter 07: why the second token is cheap."""

from dataclasses import dataclass, field

import torch

from minivlm import cache, gemma
from minivlm.config import GemmaConfig
from minivlm.course.exercises.exercise import Exercise, Mistake


def random(rng, *shape):
    return torch.from_numpy(rng.normal(0, 1, shape)).float()


# --- the growing cache ----------------------------------------------------------------------------------------------


def append_cases(rng):
    """One new token mostly, as in decoding; more than one; as many as there are."""
    for B, K, S, T, d in ((2, 3, 4, 1, 5), (1, 2, 3, 1, 4), (2, 1, 5, 3, 6), (3, 2, 2, 2, 4)):
        yield random(rng, B, K, S, d), random(rng, B, K, T, d)


APPEND = Exercise(
    key="07.1",
    reference=cache.append,
    cases=append_cases,
    difficulty=1,
    minutes=5,
    mistakes=(
        Mistake(
            "joins along the heads instead of the tokens",
            lambda old, new: torch.cat((old, new), dim=1),
            "The axes are [B, K, S, d]: tokens are axis 2.",
        ),
        Mistake(
            "joins along the rows instead of the tokens",
            lambda old, new: torch.cat((old, new), dim=0),
            "`torch.cat` joins along axis 0 when it is not told: tokens are axis 2.",
        ),
        Mistake(
            "joins along the width of a head",
            lambda old, new: torch.cat((old, new), dim=-1),
            "The last axis is the width of a head; tokens are the one before, axis 2.",
        ),
        Mistake(
            "puts the new tokens in front",
            lambda old, new: torch.cat((new, old), dim=2),
            "Masks count on the order of the text: first the old, then the new.",
        ),
        Mistake(
            "forgets the old tokens",
            lambda old, new: new.clone(),
            "The new query needs the keys of all tokens before it, too.",
        ),
        Mistake(
            "forgets the new tokens",
            lambda old, new: old.clone(),
            "A token sees itself: its own key and value belong into the cache before attention runs.",
        ),
        Mistake(
            "pushes the oldest tokens out",
            lambda old, new: torch.cat((old[:, :, new.shape[2] :], new), dim=2),
            "The cache grows: S old tokens and T new ones make S + T.",
        ),
        Mistake(
            "writes over the newest of the old tokens",
            lambda old, new: torch.cat((old[:, :, : -new.shape[2]], new), dim=2),
            "Nothing is replaced: S old tokens and T new ones make S + T.",
        ),
    ),
)


# --- the static cache -----------------------------------------------------------------------------------------------


def write_cases(rng):
    """In the middle, an empty buffer, several tokens, and the very last slot."""
    for B, K, M, d, T, start in ((2, 3, 7, 4, 1, 3), (1, 2, 6, 4, 3, 0), (2, 1, 6, 5, 2, 2), (1, 3, 5, 2, 1, 4)):
        yield random(rng, B, K, M, d), random(rng, B, K, T, d), start


def _write(buffer, new, start, end):
    """Writes at ``start`` and returns the slots up to ``end``."""
    buffer[:, :, start : start + new.shape[2]] = new[:, :, : max(0, buffer.shape[2] - start)]
    return buffer[:, :, :end]


WRITE = Exercise(
    key="07.2",
    reference=cache.write_in_place,
    cases=write_cases,
    difficulty=2,
    minutes=10,
    mistakes=(
        Mistake(
            "writes at the front of the buffer",
            lambda buffer, new, start: _write(buffer, new, 0, start + new.shape[2]),
            "Slots 0 to start − 1 are taken: the first new token goes to slot `start`.",
        ),
        Mistake(
            "begins one slot too late",
            lambda buffer, new, start: _write(buffer, new, start + 1, start + 1 + new.shape[2]),
            "With `start` tokens stored, slots 0 to start − 1 are taken and slot `start` is the first free one.",
        ),
        Mistake(
            "begins one slot too early",
            lambda buffer, new, start: _write(buffer, new, max(start - 1, 0), start + new.shape[2]),
            "Slot start − 1 holds the newest old token: the first free one is `start`.",
        ),
        Mistake(
            "returns the whole buffer",
            lambda buffer, new, start: _write(buffer, new, start, buffer.shape[2]),
            "What lies behind the last token was never written, and nobody may look at it: `buffer[:, :, :end]`.",
        ),
        Mistake(
            "returns the new tokens alone",
            lambda buffer, new, start: _write(buffer, new, start, None)[:, :, start : start + new.shape[2]],
            "Attention needs all tokens so far, the old ones too.",
        ),
        Mistake(
            "returns the tokens that were there before",
            lambda buffer, new, start: _write(buffer, new, start, start),
            "The new tokens are part of what is filled: the end is `start + new.shape[2]`.",
        ),
        Mistake(
            "leaves the buffer as it was",
            lambda buffer, new, start: torch.cat((buffer[:, :, :start], new), dim=2),
            "The next call looks for these tokens in the buffer: assign to a slice, `buffer[:, :, start:end] = new`.",
        ),
    ),
)


# --- its size -------------------------------------------------------------------------------------------------------


def size_cases(rng):
    """No two numbers that could be mixed up are equal."""
    for layers, K, group, d, dtype in (
        (3, 2, 4, 6, torch.float32),
        (5, 1, 8, 16, torch.bfloat16),
        (4, 3, 2, 10, torch.float64),
        (7, 4, 1, 8, torch.bfloat16),
    ):
        config = GemmaConfig(
            hidden_size=int(rng.integers(100, 900)),
            num_hidden_layers=layers,
            num_attention_heads=K * group,
            num_key_value_heads=K,
            head_dim=d,
        )
        yield config, int(rng.integers(20, 5000)), int(rng.integers(2, 9)), dtype


def _bytes(c, tokens, batch_size, dtype, both=2, heads=None, layers=None, width=None, itemsize=None):
    heads, layers = heads or c.num_key_value_heads, layers or c.num_hidden_layers
    return both * layers * heads * (width or c.head_dim) * tokens * batch_size * (itemsize or dtype.itemsize)


def _sized(**how):
    """``cache_bytes`` with one factor got wrong; what is callable is asked with the configuration."""

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
    mistakes=(
        Mistake(
            "counts keys and forgets values",
            _sized(both=1),
            "Each token leaves a key and a value: twice as much.",
        ),
        Mistake(
            "counts query heads where key heads are stored",
            _sized(heads=lambda c: c.num_attention_heads),
            "Queries are not kept. What is stored has `num_key_value_heads` heads.",
        ),
        Mistake(
            "takes the width of the model for the width of the keys",
            _sized(heads=1, width=lambda c: c.hidden_size),
            "A key has `num_key_value_heads * head_dim` numbers, whatever the width of the model is.",
        ),
        Mistake(
            "takes the width of the model for the width of a head",
            _sized(width=lambda c: c.hidden_size),
            "The width of a head is `head_dim`.",
        ),
        Mistake(
            "forgets the layers",
            _sized(layers=1),
            "Every layer has keys and values of its own: `num_hidden_layers` times as much.",
        ),
        Mistake(
            "forgets the batch",
            lambda config, tokens, batch_size=1, dtype=torch.bfloat16: _bytes(config, tokens, 1, dtype),
            "Every row of the batch has its own tokens: `batch_size` times as much.",
        ),
        Mistake(
            "counts two bytes a number whatever the type",
            _sized(itemsize=2),
            "`dtype.itemsize` says how many bytes a number takes.",
        ),
        Mistake(
            "counts four bytes a number whatever the type",
            _sized(itemsize=4),
            "`dtype.itemsize` says how many bytes a number takes; in bfloat16 it is two.",
        ),
        Mistake(
            "counts numbers, not bytes",
            _sized(itemsize=1),
            "Each number takes `dtype.itemsize` bytes.",
        ),
    ),
)


# --- positions ------------------------------------------------------------------------------------------------------


def position_cases(rng):
    """Padding left, right and none; the whole prompt, one new token, and a few."""
    for B, S, queries, side in (
        (3, 6, 6, "left"),
        (2, 7, 1, "left"),
        (2, 5, 5, "right"),
        (3, 8, 2, "left"),
        (2, 6, 3, ""),
    ):
        mask = torch.ones(B, S, dtype=torch.long)
        for row, empty in enumerate(rng.permutation(3)[:B] + 1):
            if side:
                mask[row, slice(0, empty) if side == "left" else slice(S - empty, S)] = 0
        yield mask, queries


POSITIONS = Exercise(
    key="07.4",
    reference=gemma.token_positions,
    cases=position_cases,
    difficulty=2,
    minutes=10,
    mistakes=(
        Mistake(
            "counts padding as well",
            lambda mask, queries: torch.ones_like(mask).cumsum(-1)[:, -queries:],
            "A row must get the positions that it has alone, without padding: sum up attention_mask.",
        ),
        Mistake(
            "begins again at 1 in every call",
            lambda mask, queries: mask[:, -queries:].cumsum(-1),
            "The new token stands behind all those in the cache: sum over the whole row, then take the last ones.",
        ),
        Mistake(
            "counts from 0",
            lambda mask, queries: mask.cumsum(-1)[:, -queries:] - 1,
            "The first token of a row has position 1 here, as in transformers.",
        ),
        Mistake(
            "is one too far",
            lambda mask, queries: mask.cumsum(-1)[:, -queries:] + 1,
            "A token counts itself once: the running sum as it is.",
        ),
        Mistake(
            "gives the positions of the first tokens, not of the newest",
            lambda mask, queries: mask.cumsum(-1)[:, :queries],
            "The queries are the last tokens of the row: `[:, -queries:]`.",
        ),
        Mistake(
            "gives all new tokens the position of the last",
            lambda mask, queries: mask.sum(-1, keepdim=True).repeat(1, queries),
            "The running sum, `cumsum`, gives each token its own number.",
        ),
        Mistake(
            "sums over the batch",
            lambda mask, queries: mask.cumsum(0)[:, -queries:],
            "Tokens are counted along a row, the last axis: `cumsum(-1)`.",
        ),
        Mistake(
            "counts padding instead of tokens",
            lambda mask, queries: (1 - mask).cumsum(-1)[:, -queries:],
            "attention_mask is 1 on tokens and 0 on padding: sum it up as it is.",
        ),
    ),
)


# --- the loop -------------------------------------------------------------------------------------------------------

WORDS, WIDTH, MAX_ANSWER_TOKENS = 31, 8, 64


@dataclass(frozen=True)
class ToyDecoder:
    """One layer of attention with random weights. ``decoder(tokens, cache)`` → scores [T, words] of what comes next.

    ``cache`` is a list, at first empty; each token leaves its key and value there. It takes ``limit`` tokens in all.
    """

    seed: int
    limit: int
    taken: list[int] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, tokens: list[int], cache: list) -> torch.Tensor:
        self.taken.append(len(tokens))
        if sum(self.taken) > self.limit:
            raise ValueError(
                f"the decoder was fed {sum(self.taken)} tokens where {self.limit} are enough, the last {len(tokens)} "
                f"with {len(cache)} in the cache: feed the prompt once, then each new word once."
            )
        g = torch.Generator().manual_seed(self.seed)
        words, places = (torch.randn(n, WIDTH, generator=g) for n in (WORDS, MAX_ANSWER_TOKENS))
        to_q, to_k, to_v = torch.randn(3, WIDTH, WIDTH, generator=g) / 2
        scores = []
        for token in tokens:
            x = words[token] + places[len(cache)]
            cache.append((to_k @ x, to_v @ x))
            keys, values = map(torch.stack, zip(*cache, strict=True))
            scores.append(words.roll(1, 0) @ (x + 2 * (keys @ (to_q @ x)).softmax(0) @ values))
        return torch.stack(scores)


def greedy_with_cache(decoder, prompt, new_tokens):
    """The ``new_tokens`` likeliest words after the prompt, a list of numbers: prefill, then one word at a time."""
    cache, written, tokens = [], [], prompt
    for _ in range(new_tokens):
        scores = decoder(tokens, cache)
        tokens = [int(scores[-1].argmax())]
        written += tokens
    return written


def loop_cases(rng):
    for prompt, new_tokens in ((5, 6), (3, 8), (4, 4), (6, 1), (2, 7)):
        decoder = ToyDecoder(int(rng.integers(10_000)), limit=prompt + new_tokens)
        yield decoder, rng.integers(0, WORDS, prompt).tolist(), new_tokens


def _best(scores, row=-1):
    return int(scores[row].argmax())


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


def _loop(decoder, prompt, new_tokens, fresh=False, row=-1, feed=None):
    """The right loop, but for what is asked: a fresh cache a step, another row of scores, another token to feed."""
    cache, written, tokens = [], [], prompt
    for _ in range(new_tokens):
        written.append(_best(decoder(tokens, cache), row))
        cache = [] if fresh else cache
        tokens = [written[-1] if feed is None else feed(written)]
    return written


def _last_word_twice(decoder, prompt, new_tokens):
    cache, written, token = [], [], prompt[-1]
    decoder(prompt, cache)
    for _ in range(new_tokens):
        token = _best(decoder([token], cache))
        written.append(token)
    return written


LOOP = Exercise(
    key="07.5",
    reference=greedy_with_cache,
    cases=loop_cases,
    difficulty=3,
    minutes=15,
    points=3,
    mistakes=(
        Mistake(
            "feeds the whole text again for every word",
            _everything_again,
            "That is right but slow. Keep one cache, and after the prompt feed only the word that was written last.",
        ),
        Mistake(
            "feeds the whole text again into a cache that already holds it",
            _everything_into_the_cache,
            "The cache remembers what was fed: after the prompt, feed only the word that was written last.",
        ),
        Mistake(
            "starts with an empty cache for every word",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens, fresh=True),
            "Make the cache once, before the loop: the new word must see the prompt.",
        ),
        Mistake(
            "feeds the last word of the prompt twice",
            _last_word_twice,
            "The call with the prompt already gives the scores of the first new word, in its last row.",
        ),
        Mistake(
            "reads the scores of the first token instead of the last",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens, row=0),
            "Each row of the scores tells what follows one token: what follows the prompt is in `scores[-1]`.",
        ),
        Mistake(
            "feeds the first new word over and over",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens, feed=lambda written: written[0]),
            "Feed the word that was written last, so the variable must change in every round.",
        ),
        Mistake(
            "drops the word that the prompt predicts",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens + 1)[1:],
            "The scores after the prompt already give the first new word: it belongs to the answer.",
        ),
        Mistake(
            "gives back the prompt too",
            lambda decoder, prompt, new_tokens: prompt + _loop(decoder, prompt, new_tokens),
            "Return the new words only.",
        ),
        Mistake(
            "writes one word too few",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt, new_tokens - 1),
            "The prompt gives the first new word, and every word that is fed gives one more: new_tokens calls in all.",
        ),
        Mistake(
            "feeds the last word of the prompt and leaves out the rest",
            lambda decoder, prompt, new_tokens: _loop(decoder, prompt[-1:], new_tokens),
            "The first call, the prefill, takes the whole prompt: its keys and values must be in the cache.",
        ),
    ),
)

EXERCISES = [APPEND, WRITE, SIZE, POSITIONS, LOOP]
