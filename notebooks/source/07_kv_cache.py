# %% [markdown]
# # 07 · The KV cache
#
# **Why is the second token cheap?**
#
# | | |
# |---|---|
# | time | 100 minutes, 48 of them exercises |
# | know first | the mask of chapter 05; queries, keys, values and positions of chapter 06 |
# | you will build | a growing and a static cache, their size in bytes, positions while decoding, and the loop that uses it all |
# | runs on | CPU, nothing to download |

# %%
import torch

import minivlm
from minivlm import cache, emoji, gemma, masks
from minivlm.course import exercises, viz

viz.you_are_here("07")

# %% [markdown]
# ## Predict first
#
# PaliGemma writes one token, appends it, and runs again. A picture of 224 pixels and a short prompt are 260 tokens, and
# the answer shall have 20.
#
# 1. If every run reads the whole text so far, how many tokens go through the decoder? And if each token is read once?
# 2. A new token looks at the old ones. Which of their queries, keys and values does it need?
# 3. The memory for what is kept, for a picture of 896 pixels: nearer to 1 MB, 100 MB or 10 GB?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. 260 + 261 + … + 279 = 5,390, and 279 (the last word is written but never read): about nineteen times less.
# 2. Keys and values. An old query has done its work.
# 3. 100 MB for a whole conversation about it: 4,096 tokens of 18 KB each are 75 MB.
#
# </details>

# %%
without, once = sum(range(260, 280)), 260 + 19
print(without, "tokens without a cache,", once, "with one:", round(without / once, 1), "times less")
assert (without, once) == (5390, 279)

# %% [markdown]
# ## A toy: three words, one after the other
#
# One head, two numbers a query, key and value. Each word sees itself and what came before. Without a memory, each step
# computes everything:

# %%
queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])


def everything(n):
    """What the first n words gather, all computed anew."""
    scores = (queries[:n] @ keys[:n].T).masked_fill(~masks.causal_mask(n), -torch.inf)
    return scores.softmax(-1) @ values[:n]


for n in (1, 2, 3):
    print(f"step {n}:", [[round(x, 2) for x in row] for row in everything(n).tolist()])

# %% [markdown]
# Each step repeats all rows of the step before: an old word never sees a new one, so nothing about it can change. Only
# the last row is new, and it takes the newest query, and all keys and values:

# %%
for n in (2, 3):
    assert torch.equal(everything(n)[:-1], everything(n - 1))
    newest = (queries[n - 1] @ keys[:n].T).softmax(-1) @ values[:n]
    assert torch.allclose(newest, everything(n)[-1])

# %% [markdown]
# So keep the keys and values of every layer, and feed the new word alone. This is the *KV cache*. Queries need not be
# kept: old ones are never asked again.
#
# ## The same keys, again and again
#
# Now the trained model, writing a caption. A hook on the key projection of the last layer looks at what goes in and out:

# %%
model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
scene = emoji.make_scene(0, "validation")


def watched(kind):
    """The caption, and the keys [T, K·d] that each pass computed in the last layer."""
    seen = []
    projection = model.language_model.model.layers[-1].self_attn.k_proj
    hook = projection.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    caption = minivlm.generate(model, processor, scene.image, "caption en", cache=kind)
    hook.remove()
    return caption, seen


# %%
caption, anew = watched(None)
cached_caption, once = watched("static")
assert caption == cached_caption
print("caption:", caption)
print("tokens in each pass, without a cache:", [len(k) for k in anew])
print("                     with a cache:   ", [len(k) for k in once])

# %%
prompt_length, passes = len(anew[0]), len(anew)
assert [len(k) for k in anew] == [prompt_length + i for i in range(passes)]
assert [len(k) for k in once] == [prompt_length] + [1] * (passes - 1)
first, last = anew[0], anew[-1][:prompt_length]
print(f"the prompt's keys, in pass 1 and pass {passes}: largest difference {(first - last).abs().max():.0e}")
assert (first - last).abs().max() <= 1e-5 * first.abs().max()
kept = torch.cat(once)
assert (kept - anew[-1]).abs().max() <= 1e-5 * kept.abs().max()
print("computed", sum(map(len, anew)), "keys without a cache and", len(kept), "with: the same ones")

# %% [markdown]
# ## Prefill and decode
#
# With a cache there are two kinds of calls. The *prefill* reads picture and prompt at once: many tokens, large matrix
# products. Each *decode* step reads one token: the weights are fetched from memory for a single vector, and that is what
# its time goes into. By hand:

# %%
prompt = processor(text=["caption en"], images=[scene.image])
memory, words = cache.GrowingCache(), []
with torch.no_grad():
    logits = model(**prompt, cache=memory, last_only=True)  # prefill
    while len(words) < 32:
        token = logits[:, -1:].argmax(-1)
        words.append(int(token))
        print(f"{memory.length} tokens in the cache, next: {processor.decode([int(token)]) or '<eos>'!r}")
        if words[-1] == model.config.eos_token_id:
            break
        logits = model(token, cache=memory, last_only=True)  # decode
assert processor.decode(words) == caption

# %% [markdown]
# ## Exercise 7.1 · Grow ★☆☆ (5 minutes)
#
# The simplest cache: `old` holds the keys (or the values) so far, `[B, K, S, d]`, `new` those of the newest tokens,
# `[B, K, T, d]`. Return all of them, `[B, K, S + T, d]`. Letters as in chapter 06: B rows, K key heads, d width of a head.
#
# <details><summary>Hint</summary>
#
# `torch.cat` takes a tuple of tensors and the axis along which to join them.
#
# </details>


# %%
def append(old, new):
    """[B, K, S, d], [B, K, T, d] → [B, K, S + T, d]."""
    ### BEGIN SOLUTION
    return torch.cat((old, new), dim=2)
    ### END SOLUTION


# %%
exercises.check(append)
### BEGIN HIDDEN TESTS
exercises.score(append, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## A cache that does not move
#
# Growing has a price: every step makes a new tensor and copies all old keys and values into it. How many bytes does the
# caption above write, and how many are new?

# %%
from unittest.mock import patch

append = exercises.piece("append")
written = []


def counting(old, new):
    grown = append(old, new)
    written.append(grown.nbytes)
    return grown


with patch.object(cache, "append", counting):
    assert watched("growing")[0] == caption
new = cache.cache_bytes(model.config.text_config, len(once) - 1, dtype=torch.float32)
print(f"decoding wrote {sum(written):,} bytes, of which {new:,} were new")
assert sum(written) > 10 * new

# %% [markdown]
# The *static* cache takes all its memory once, a buffer with room for M tokens, and writes into it. What lies behind the
# last token has never been written and holds anything at all, so attention gets only the part that is filled.
#
# ## Exercise 7.2 · Write in place ★★☆ (10 minutes)
#
# `buffer` is `[B, K, M, d]`, and its slots 0 … `start` − 1 are filled. Write `new`, `[B, K, T, d]`, into the slots behind
# them, and return all filled slots, `[B, K, start + T, d]`, as a slice of the buffer. Here, for once, an argument **is**
# to be changed.
#
# <details><summary>Hint</summary>
#
# Assigning to a slice writes into the tensor: `buffer[:, :, start:end] = new`. A slice is a view: it copies nothing.
#
# </details>


# %%
def write_in_place(buffer, new, start):
    """[B, K, M, d], [B, K, T, d], the number of filled slots → [B, K, start + T, d]."""
    ### BEGIN SOLUTION
    end = start + new.shape[2]
    buffer[:, :, start:end] = new
    return buffer[:, :, :end]
    ### END SOLUTION


# %%
exercises.check(write_in_place)
### BEGIN HIDDEN TESTS
exercises.score(write_in_place, points=2, seed=1)
### END HIDDEN TESTS

# %%
write_in_place = exercises.piece("write_in_place")
buffer = torch.full((1, 1, 8, 2), 99.0)
filled = write_in_place(buffer, torch.zeros(1, 1, 3, 2), 0)
filled = write_in_place(buffer, torch.ones(1, 1, 1, 2), 3)
print(buffer[0, 0, :, 0].tolist(), "→", filled[0, 0, :, 0].tolist())
assert filled.shape == (1, 1, 4, 2) and filled.data_ptr() == buffer.data_ptr()  # a view, not a copy

# %% [markdown]
# ### No cache, growing, static: the same logits
#
# The caption's words are fed one at a time, to the same model three times: with the whole text anew, with a growing and
# with a static cache. `append` and `write_in_place` are yours if they passed.


# %%
def step_by_step(memory):
    """Logits [N, V] after the prompt and after each word of the caption."""
    ids, types = prompt["input_ids"], prompt["token_type_ids"]
    picture = {"pixel_values": prompt["pixel_values"]}
    rows = [model(ids, token_type_ids=types, cache=memory, last_only=True, **picture)[0, -1]]
    for word in words[:-1]:
        token = torch.tensor([[word]])
        ids, types = torch.cat((ids, token), 1), torch.cat((types, torch.ones_like(token)), 1)
        again = {"input_ids": ids, "token_type_ids": types, **picture} if memory is None else {"input_ids": token}
        rows.append(model(**again, cache=memory, last_only=True)[0, -1])
    return torch.stack(rows)


# %%
room = prompt_length + len(words)
with torch.no_grad(), patch.multiple(cache, append=append, write_in_place=write_in_place):
    truth = step_by_step(None)
    growing = step_by_step(cache.GrowingCache())
    static = step_by_step(cache.StaticCache(model.config.text_config, 1, room))
for name, logits in {"growing": growing, "static": static}.items():
    off = float((logits - truth).abs().max() / truth.abs().max())
    print(f"{name}: largest difference to no cache, over {len(words)} steps: {off:.0e} relative")
    assert off < 1e-5

# %% [markdown]
# ## What it takes
#
# A cache holds, for every token: two tensors (keys and values), in each layer, for each **key** head, as many numbers as
# a head is wide.
#
# ## Exercise 7.3 · Bytes ★☆☆ (8 minutes)
#
# `config` has the fields `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim` and `hidden_size`;
# not all of them matter. `dtype.itemsize` is the number of bytes of one number. Return the bytes of the whole cache.
#
# <details><summary>Hint</summary>
#
# Six factors and the number 2.
#
# </details>


# %%
def cache_bytes(config, tokens, batch_size=1, dtype=torch.bfloat16):
    """A GemmaConfig and the number of tokens a row → bytes, an integer."""
    ### BEGIN SOLUTION
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * dtype.itemsize * tokens * batch_size
    ### END SOLUTION


# %%
exercises.check(cache_bytes)
### BEGIN HIDDEN TESTS
exercises.score(cache_bytes, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# PaliGemma 3B shares one set of keys among eight heads (multi-query attention, MQA). What if each head had its own
# (multi-head attention, MHA)? PaliGemma 2 3B stands between, with four sets. Three sizes of picture, in bfloat16:

# %%
from dataclasses import replace

from minivlm.config import GEMMA2_DEFAULTS, GemmaConfig

cache_bytes = exercises.piece("cache_bytes")
shared = GemmaConfig()
second = GemmaConfig(model_type="gemma2", **GEMMA2_DEFAULTS)
models = {"PaliGemma 3B (MQA)": shared, "PaliGemma 2 3B": second}
models["PaliGemma 3B, were it MHA"] = replace(shared, num_key_value_heads=8)
for name, config in models.items():
    sizes = {f"{side} px": cache_bytes(config, (side // 14) ** 2) / 1e6 for side in (224, 448, 896)}
    a_token = cache_bytes(config, 1)
    print(f"{name:26} {a_token:7,} bytes a token;", ", ".join(f"{px} {mb:.1f} MB" for px, mb in sizes.items()))
assert cache_bytes(shared, 1) == 18_432 and cache_bytes(second, 1) == 106_496

# %%
viz.cache_growth({name: cache_bytes(config, 1) for name, config in models.items()})

# %% [markdown]
# (1 KB = 1,000 bytes.) And all this **per row**: a server with 64 conversations keeps 64 caches. At 896 pixels that is
# 4.8 GB for the shared keys, nearly as much as the model's weights, and eight times as much without sharing.
#
# Half of PaliGemma 2's layers look back 4,096 tokens at most, so they could forget older ones; our cache keeps all.
#
# ## How long does a token take?
#
# Measured here, on your machine: a decoder of the small model's size, with random embeddings, after texts of growing
# length. One more token, with the whole text read anew, and with a cache.

# %%
import time

from tqdm.auto import tqdm

decoder = model.language_model.model
lengths = [64, 128, 256, 512, 1024, 2048]


def read(x, length, memory=None):
    """Seconds for x, the last tokens of a text of this length, and how many tokens the first layer's keys were made of."""
    ones, types, made = torch.ones(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long), []
    types[:, -1] = 1
    hook = decoder.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: made.append(call[1][0].shape[1]))
    start = time.perf_counter()
    decoder(x, ones, types, memory)
    hook.remove()
    return time.perf_counter() - start, made[0]


# %%
seconds = {"no cache": [], "cache": []}
with torch.inference_mode():
    for S in tqdm(lengths):
        x = torch.randn(1, S + 3, decoder.config.hidden_size)
        memory = cache.StaticCache(decoder.config, 1, S + 3)
        read(x[:, :S], S, memory)  # prefill
        for name, kept in {"no cache": None, "cache": memory}.items():
            steps = [read(x[:, n if kept else 0 : n + 1], n + 1, kept) for n in range(S, S + 3)]
            seconds[name].append(min(time for time, _ in steps))
            assert [made for _, made in steps] == ([1, 1, 1] if kept else [S + 1, S + 2, S + 3])

# %%
print("tokens so far       ", *(f"{S:7}" for S in lengths))
for name, times in seconds.items():
    print(f"ms a token, {name:8}", *(f"{1000 * t:7.1f}" for t in times))
curves = {name: (lengths, [1000 * t for t in times]) for name, times in seconds.items()}
viz.lines(curves, "Time for one more token", "tokens so far", "milliseconds", log="xy")

# %% [markdown]
# Without a cache the time grows with the text, and faster than it once attention, in which everyone looks at everyone,
# takes over. With one it stays nearly flat: one token's matrix products, and a look at the cache. (Both axes are
# logarithmic: each line of the grid is ten times the one before. A busy machine makes bumps; the counts, which the cell
# above asserts, have none.)
#
# ## Where does the new token stand?
#
# The rotary positions of chapter 06 must go on where the prompt ended. In a call with a single token nothing says where
# that is, but the mask: `attention_mask` covers all S tokens, those in the cache too, with 0 on padding. A token's
# position is its number in its own row, **padding not counted**, so that a prompt means the same alone and in a batch.
#
# ## Exercise 7.4 · Positions ★★☆ (10 minutes)
#
# From `attention_mask` `[B, S]` return the positions of the last `queries` tokens, `[B, queries]`. The first token of a
# row has position 1. Padding gets what the running sum gives there; nobody reads it.
#
# <details><summary>Hint</summary>
#
# `cumsum` along the row, then the last ones. In this order.
#
# </details>


# %%
def token_positions(attention_mask, queries):
    """[B, S] of 0 and 1, an integer → [B, queries]."""
    ### BEGIN SOLUTION
    return attention_mask.cumsum(-1)[:, -queries:]
    ### END SOLUTION


# %%
exercises.check(token_positions)
### BEGIN HIDDEN TESTS
exercises.score(token_positions, points=2, seed=1)
### END HIDDEN TESTS

# %%
token_positions = exercises.piece("token_positions")
two_rows = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
assert token_positions(two_rows, 6)[0].tolist() == [0, 0, 1, 2, 3, 4]
assert token_positions(two_rows, 1).tolist() == [[4], [6]]  # one decode step: each row at its own place

# %% [markdown]
# ## Break it: off by one
#
# A bug that is easily made wherever such models are run: the prefill's positions are right, and those of decoding are
# one too small or too large, or begin again at 1. RoPE only knows distances. So moving *everything* is no bug at all,
# while moving the new tokens alone puts them at a wrong distance from the picture and the prompt.


# %%
def moved(everything=0, new=0):
    """Token positions with all, or those of decode steps alone, moved."""
    return lambda mask, queries: token_positions(mask, queries) + everything + (new if queries == 1 else 0)


bugs = {"as it should be": moved(), "everything 100 further": moved(100)}
bugs |= {f"new tokens {by:+}": moved(new=by) for by in (-1, 1, 5, 20)}
bugs["each call begins at 1"] = lambda mask, queries: token_positions(mask[:, -queries:], queries)

# %%
some = [emoji.make_scene(seed, "validation") for seed in range(12)]
answers, second_word = {}, {}
for bug, function in tqdm(bugs.items()):
    with patch.object(gemma, "token_positions", function), torch.no_grad():
        answers[bug] = minivlm.generate(model, processor, [s.image for s in some], "caption en")
        second_word[bug] = step_by_step(cache.GrowingCache())[1:]

# %%
truth, right = second_word["as it should be"], {}
for bug, texts in answers.items():
    right[bug] = sum(emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(texts, some, strict=True))
    off = float((second_word[bug] - truth).abs().max())
    print(f"{bug:23} logits off by up to {off:7.4f}, {right[bug]:2} of {len(some)} captions right; first: {texts[0]!r}")
    assert off < 1e-3 * truth.abs().max() if bug.startswith(("as", "every")) else off > 1e-2

# %%
assert answers["everything 100 further"] == answers["as it should be"]
assert right["each call begins at 1"] < right["as it should be"]

# %% [markdown]
# The small errors are the nasty ones. By one, the logits are wrong in every step, and as many captions may be right as
# before: nobody who only reads answers will find it. A comparison with the model without a cache finds it at once.
#
# ## Break it again: a full cache
#
# PyTorch forgives too much here. A slice beyond the end of a buffer is empty, and **one** token fits into an empty slice
# by broadcasting. The write does nothing, and says nothing:

# %%
full = torch.zeros(1, 1, 4, 2)
full[:, :, 4:5] = torch.ones(1, 1, 1, 2)  # slot 4 of slots 0 to 3
assert full.sum() == 0  # the token is gone

# %% [markdown]
# From then on the model would not see what it has just written. So the package looks first:

# %%
small = cache.StaticCache(model.config.text_config, 1, prompt_length + 1)
try:
    with torch.no_grad():
        step_by_step(small)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## Why the prefix can be kept, and not lengthened
#
# Chapter 05: in PaliGemma picture and prompt see each other fully. Once they are complete, nothing that follows can
# change their keys, since the answer is causal. But the **picture's** keys depend on the **prompt**:

# %%
prompts = ["caption en", "detect panda"]
both = [cache.GrowingCache(), cache.GrowingCache()]
P = processor.num_image_tokens
with torch.no_grad():
    for memory, text in zip(both, prompts, strict=True):
        model(**processor(text=[text], images=[scene.image]), cache=memory)
change = [float((a[0] - b[0])[:, :, :P].abs().max()) for a, b in zip(both[0].layers, both[1].layers, strict=True)]
print("largest change of the picture's keys, layer by layer:", " ".join(f"{x:.3f}" for x in change))
assert change[0] < 1e-5 < min(change[1:])

# %% [markdown]
# In the first layer keys are made of a token alone; from the second on, the picture has heard the question. A second
# question about the same picture needs a new prefill. (What can be kept is the vision tower's output, which never sees
# the prompt: `encode_image`.) Models that read pictures causally can keep more, and pay with pictures that do not know
# what is asked.
#
# For the same reason a cached prefix cannot be lengthened: the tokens in the cache would have to see the new ones. Cut
# `caption en` in two, and the model refuses. Made to go on, as if the rest were part of an answer, it computes something else:

# %%
cut = prompt_length - 2
head = {name: value if name == "pixel_values" else value[:, :cut] for name, value in prompt.items()}
tail, memory = prompt["input_ids"][:, cut:], cache.GrowingCache()
with torch.no_grad():
    whole = model(**prompt, last_only=True)
    model(**head, cache=memory)
    try:
        model(tail, token_type_ids=prompt["token_type_ids"], cache=memory)
    except ValueError as error:
        print("ValueError:", error)
    forced = model(tail, cache=memory, last_only=True)
print(f"forced: logits off by up to {(forced - whole).abs().max():.2f}")
assert (forced - whole).abs().max() > 1e-2

# %% [markdown]
# ## Exercise 7.5 · The loop ★★★ (15 minutes)
#
# Write the greedy loop. `decoder(tokens, cache)` takes a list of token numbers and returns scores `[T, words]`, one row a
# token: what comes after it. `cache` is a list, `[]` at first, in which the decoder keeps what it needs. Return the
# `new_tokens` words after the prompt, a list of numbers: each the best one. The decoder counts: whoever feeds it more than
# the prompt and each new word once is stopped.
#
# <details><summary>Hint</summary>
#
# The first call takes the prompt, every later one a list of one token. `int(scores[-1].argmax())` is the next word.
#
# </details>


# %%
def greedy_with_cache(decoder, prompt, new_tokens):
    """A decoder, a list of tokens, an integer → a list of new_tokens tokens."""
    ### BEGIN SOLUTION
    cache, written = [], []
    tokens = prompt
    for _ in range(new_tokens):
        scores = decoder(tokens, cache)
        tokens = [int(scores[-1].argmax())]
        written += tokens
    return written
    ### END SOLUTION


# %%
exercises.check(greedy_with_cache)
### BEGIN HIDDEN TESTS
exercises.score(greedy_with_cache, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# The same loop drives the real model, given a decoder that wraps it:

# %%
greedy_with_cache = exercises.piece("greedy_with_cache")


def real_decoder(tokens, memory):
    """The trained model; the list holds one GrowingCache."""
    ids = torch.tensor([tokens])
    picture = {} if memory else {"pixel_values": prompt["pixel_values"]}
    if not memory:
        memory.append(cache.GrowingCache())
    with torch.no_grad():
        return model(ids, cache=memory[0], **picture)[0]


assert greedy_with_cache(real_decoder, prompt["input_ids"][0].tolist(), len(words)) == words
print(processor.decode(words))

# %% [markdown]
# ## It matches
#
# transformers, with the same checkpoint and its own cache (`past_key_values`): the keys and values after the prefill, and
# the logits of every decode step, with your pieces in ours.

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
load = transformers.PaliGemmaForConditionalGeneration.from_pretrained
theirs = load(minivlm.hub.resolve(None), attn_implementation="eager", dtype="float32").eval()

# %%
memory = cache.GrowingCache()
with torch.no_grad(), patch.object(gemma, "token_positions", token_positions):
    model(**prompt, cache=memory)
    out = theirs(**prompt, use_cache=True)
off = 0.0
for ours, layer in zip(memory.layers, out.past_key_values.layers, strict=True):
    for a, b in zip(ours, (layer.keys, layer.values), strict=True):
        off = max(off, float((a - b).abs().max() / b.abs().max()))
print(f"keys and values of {len(memory.layers)} layers: largest difference {off:.0e} relative")
assert off < 1e-5

# %%
rows, mask = [out.logits[0, -1]], prompt["attention_mask"]
with torch.no_grad():
    for word in words[:-1]:
        mask = torch.cat((mask, torch.ones(1, 1, dtype=torch.long)), dim=1)
        step = {"input_ids": torch.tensor([[word]]), "token_type_ids": torch.ones(1, 1, dtype=torch.long)}
        out = theirs(**step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
theirs_logits = torch.stack(rows)
pieces = {"append": append, "write_in_place": write_in_place}
config = model.config.text_config
with torch.no_grad(), patch.object(gemma, "token_positions", token_positions), patch.multiple(cache, **pieces):
    ours = [step_by_step(cache.GrowingCache()), step_by_step(cache.StaticCache(config, 1, room))]
off = max(float((logits - theirs_logits).abs().max() / theirs_logits.abs().max()) for logits in ours)
print(f"logits of {len(rows)} steps: largest difference {off:.0e} relative")
assert off < 1e-5

# %% [markdown]
# ## Recap
#
# * Old tokens never see new ones, so their keys and values can be kept: each token goes through the decoder once.
# * Prefill reads picture and prompt in one call; a decode step reads one token.
# * Growing copies everything each time; static takes its memory once and must know how much of it is filled.
# * Bytes: 2 × layers × key heads × head width × bytes a number × tokens × rows. Sharing keys is what makes it small.
# * Positions go on where the prompt ended, padding not counted. Moving all changes nothing; moving the new ones does.
# * A prefix is read in one piece: picture and prompt see each other.
#
# **Three questions**
#
# <details><summary>1. Could one keep queries and keys, and compute values anew?</summary>
#
# That would help nobody. Values are made from the hidden states of each layer, and to have these for old tokens one
# would have to run them through all layers again, which is what the cache avoids. Queries of old tokens are not needed.
#
# </details>
#
# <details><summary>2. A model whose answer is bidirectional too: what would its cache hold?</summary>
#
# Nothing that lasts. Each new word would change the hidden states of all words from the second layer on, and their keys
# and values with them.
#
# </details>
#
# <details><summary>3. Why does a batch of 64 decode nearly as fast as a batch of one, on a large machine?</summary>
#
# A decode step fetches all weights from memory to use each for one vector a row. With 64 rows the same fetch serves 64
# vectors. What grows with the batch is the cache, and its memory sets the limit.
#
# </details>
#
# **Next:** [08 · Full PaliGemma inference](08_inference.ipynb), where all pieces come together.
