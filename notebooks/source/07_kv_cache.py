# %% [markdown]
# # 07 · The KV cache
#
# **Why is the second token cheap?**
#
# | | |
# |---|---|
# | know first | the mask (chapter 05); queries, keys, values and positions (chapter 06) |
# | you will build | a growing and a static cache, their size in bytes, positions for decoding, and the greedy loop |
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
# PaliGemma generates one token, appends it, and runs again. An image of 224 pixels plus a short prompt is 260 tokens.
# Suppose the answer has 20.
#
# 1. If every step reads the whole sequence again, how many tokens go through the decoder in total? And how many if each
#    token is read only once?
# 2. A new token attends to the old ones. Which of their queries, keys and values does it need?
# 3. With an image of 896 pixels, is the memory for everything we store closest to 1 MB, 100 MB or 10 GB?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. If every step reads everything: 260 + 261 + … + 279 = 5,390. If each token is read once: 279, because the last
#    token is generated but never read. That is about nineteen times fewer.
# 2. Their keys and values. Their queries are no longer needed.
# 3. 100 MB. The 4,096 image tokens take 18 KB each, 75 MB in total, and the text adds little.
#
# </details>

# %%
without_cache, with_cache = sum(range(260, 280)), 260 + 19
print(f"{without_cache} tokens without a cache, {with_cache} with one: a factor of {without_cache / with_cache:.1f}")
assert (without_cache, with_cache) == (5390, 279)

# %% [markdown]
# ## A toy: three tokens, one after another
#
# We use one head, with two numbers per query, key and value. Each token attends to itself and to the tokens before it.
# Without a cache, every step computes everything:

# %%
queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
keys = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])


def attention_from_scratch(n):
    """Attention outputs of the first n tokens, all recomputed."""
    scores = (queries[:n] @ keys[:n].T).masked_fill(~masks.causal_mask(n), -torch.inf)
    return scores.softmax(-1) @ values[:n]


for n in (1, 2, 3):
    print(f"step {n}:", [[round(x, 2) for x in row] for row in attention_from_scratch(n).tolist()])

# %% [markdown]
# Each step repeats all the rows of the step before. An old token never attends to a new one, so its output can't
# change. Only the last row is new, and computing it takes the newest query plus all keys and values:

# %%
for n in (2, 3):
    assert torch.equal(attention_from_scratch(n)[:-1], attention_from_scratch(n - 1))
    newest = (queries[n - 1] @ keys[:n].T).softmax(-1) @ values[:n]
    assert torch.allclose(newest, attention_from_scratch(n)[-1])

# %% [markdown]
# So store the keys and values of every layer, and feed the model only the new token. This is the *KV cache*. There is
# no need to store queries, because an old query is never used again.
#
# ## The same keys, over and over
#
# Now let the trained model write a caption. A hook on the key projection of the last layer records its output in every
# forward pass:

# %%
model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
scene = emoji.make_scene(0, "validation")


def caption_and_keys(kind):
    """The caption, and the keys [T, K·d] that each forward pass computed in the last layer."""
    computed_keys = []
    projection = model.language_model.model.layers[-1].self_attn.k_proj
    hook = projection.register_forward_hook(lambda module, inputs, output: computed_keys.append(output[0]))
    caption = minivlm.generate(model, processor, scene.image, "caption en", cache=kind)
    hook.remove()
    return caption, computed_keys


# %%
caption, uncached = caption_and_keys(None)
cached_caption, cached = caption_and_keys("static")
assert caption == cached_caption
print("caption:", caption)
print("tokens per forward pass, without a cache:", [len(k) for k in uncached])
print("                         with a cache:   ", [len(k) for k in cached])

# %%
prompt_length, passes = len(uncached[0]), len(uncached)
assert [len(k) for k in uncached] == [prompt_length + i for i in range(passes)]
assert [len(k) for k in cached] == [prompt_length] + [1] * (passes - 1)
first, last = uncached[0], uncached[-1][:prompt_length]
print(f"the prompt's keys in pass 1 and pass {passes}: largest difference {(first - last).abs().max():.0e}")
assert (first - last).abs().max() <= 1e-5 * first.abs().max()
all_cached = torch.cat(cached)
assert (all_cached - uncached[-1]).abs().max() <= 1e-5 * all_cached.abs().max()
print("keys computed:", sum(map(len, uncached)), "without a cache,", len(all_cached), "with one, and they are the same")

# %% [markdown]
# ## Prefill and decode
#
# With a cache there are two kinds of forward pass. The *prefill* processes image and prompt at once: many tokens, large
# matrix products. Each *decode step* processes a single token. It has to read all the weights from memory for just one
# vector, and on a large model that is where most of the time goes. By hand:

# %%
prompt = processor(text=["caption en"], images=[scene.image])
growing_cache, caption_ids = cache.GrowingCache(), []
with torch.no_grad():
    logits = model(**prompt, cache=growing_cache, last_only=True)  # prefill
    while len(caption_ids) < 32:
        token = logits[:, -1:].argmax(-1)
        caption_ids.append(int(token))
        print(f"{growing_cache.length} tokens in the cache, next: {processor.decode([int(token)]) or '<eos>'!r}")
        if caption_ids[-1] == model.config.eos_token_id:
            break
        logits = model(token, cache=growing_cache, last_only=True)  # decode step
assert processor.decode(caption_ids) == caption

# %% [markdown]
# Step through it. Predict first: how many tokens go in at step 3, and how many keys does it read? Then move *step* until
# `<eos>` comes out. Which slot stays empty?

# %%
complete = processor(text=["caption en"], images=[scene.image], suffix=[caption])
sequence = viz.read_tokens(complete, processor)
assert [token.id for token in sequence[prompt_length:]] == caption_ids


def one_step(step=0):
    return viz.decode_step(sequence, prompt_length, step)


viz.sliders(one_step, step=(0, len(caption_ids) - 1))

# %% [markdown]
# ## Exercise 7.1 · Grow
#
# The simplest cache: `old` holds the keys (or values) so far, `[B, K, S, d]`, and `new` those of the newest tokens,
# `[B, K, T, d]`. Return all of them, `[B, K, S + T, d]`. The letters are those of chapter 06: B batch size, K key
# heads, d the dimension of a head. S is the number of old tokens, T the number of new ones.


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
# ## A cache that stays in place
#
# The growing cache has a cost: every step allocates a new tensor and copies all the old keys and values into it. How
# many bytes does that write for the caption above, and how many of them are new?

# %%
from unittest.mock import patch

append = exercises.piece("append")
bytes_written = []


def recording_append(old, new):
    result = append(old, new)
    bytes_written.append(result.nbytes)
    return result


with patch.object(cache, "append", recording_append):
    assert caption_and_keys("growing")[0] == caption
new_bytes = cache.cache_bytes(model.config.text_config, len(cached) - 1, dtype=torch.float32)
print(f"the decode steps wrote {sum(bytes_written):,} bytes, of which {new_bytes:,} were new")
assert sum(bytes_written) > 10 * new_bytes

# %% [markdown]
# The *static* cache allocates all its memory once, as a buffer with M slots, and writes into it. The slots after the
# last token have not been written yet and can hold anything, so attention only gets the filled part.
#
# ## Exercise 7.2 · Write in place
#
# `buffer` is `[B, K, M, d]`, and its slots 0 … `start` − 1 are filled. Write `new`, `[B, K, T, d]`, into the slots that
# follow, and return all filled slots, `[B, K, start + T, d]`, as a slice of the buffer. In this exercise, for once, you
# **should** modify an argument.


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
# We feed the caption to the same model token by token, three times: recomputing the whole sequence, with a growing
# cache, and with a static cache. `append` and `write_in_place` are yours if they passed.


# %%
def step_by_step(kv_cache):
    """Logits [N, V] after the prompt and after each token of the caption."""
    ids, types = prompt["input_ids"], prompt["token_type_ids"]
    image = {"pixel_values": prompt["pixel_values"]}
    rows = [model(ids, token_type_ids=types, cache=kv_cache, last_only=True, **image)[0, -1]]
    for token_id in caption_ids[:-1]:
        token = torch.tensor([[token_id]])
        ids, types = torch.cat((ids, token), 1), torch.cat((types, torch.ones_like(token)), 1)
        inputs = {"input_ids": ids, "token_type_ids": types, **image} if kv_cache is None else {"input_ids": token}
        rows.append(model(**inputs, cache=kv_cache, last_only=True)[0, -1])
    return torch.stack(rows)


# %%
max_length = prompt_length + len(caption_ids)
with torch.no_grad(), patch.multiple(cache, append=append, write_in_place=write_in_place):
    expected = step_by_step(None)
    growing = step_by_step(cache.GrowingCache())
    static = step_by_step(cache.StaticCache(model.config.text_config, 1, max_length))
for name, logits in {"growing": growing, "static": static}.items():
    error = float((logits - expected).abs().max() / expected.abs().max())
    print(f"{name}: largest relative difference from no cache over {len(caption_ids)} steps: {error:.0e}")
    assert error < 1e-5

# %% [markdown]
# ## What it costs
#
# For every token, a cache stores two vectors (a key and a value) in each layer for each **key** head. The length of
# each vector is the head dimension.
#
# ## Exercise 7.3 · Bytes
#
# `config` has the fields `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim` and
# `hidden_size`. Not all of them matter. `dtype.itemsize` is the number of bytes per number. Return the size of the
# whole cache in bytes.


# %%
def cache_bytes(config, tokens, batch_size=1, dtype=torch.bfloat16):
    """A GemmaConfig and the number of tokens per row → bytes, an integer."""
    ### BEGIN SOLUTION
    numbers_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers_per_token * dtype.itemsize * tokens * batch_size
    ### END SOLUTION


# %%
exercises.check(cache_bytes)
### BEGIN HIDDEN TESTS
exercises.score(cache_bytes, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# In PaliGemma 3B, eight query heads share one set of keys and values (multi-query attention, MQA). What if each head
# had its own (multi-head attention, MHA)? PaliGemma 2 3B is in between, with four sets. Here are three image sizes, in
# bfloat16:

# %%
from dataclasses import replace

from minivlm.config import GEMMA2_DEFAULTS, GemmaConfig

cache_bytes = exercises.piece("cache_bytes")
paligemma = GemmaConfig()
paligemma2 = GemmaConfig(model_type="gemma2", **GEMMA2_DEFAULTS)
models = {"PaliGemma 3B (MQA)": paligemma, "PaliGemma 2 3B (GQA)": paligemma2}
models["PaliGemma 3B if it were MHA"] = replace(paligemma, num_key_value_heads=8)
for name, config in models.items():
    sizes = {f"{side} px": cache_bytes(config, (side // 14) ** 2) / 1e6 for side in (224, 448, 896)}
    per_token = cache_bytes(config, 1)
    print(f"{name:27} {per_token:7,} bytes per token;", ", ".join(f"{px} {mb:.1f} MB" for px, mb in sizes.items()))
assert cache_bytes(paligemma, 1) == 18_432 and cache_bytes(paligemma2, 1) == 106_496
assert 75e6 < cache_bytes(paligemma, 4096) < 76e6  # the answer to the third question at the top

# %%
viz.cache_growth({name: cache_bytes(config, 1) for name, config in models.items()})

# %% [markdown]
# Now build your own. Predict first: which halves the cache, half the layers or half the *query* heads? Then find a
# setting in which the cache of a single row is larger than PaliGemma's weights, 5.8 GB.


# %%
def your_cache(tokens=4096, key_heads=4, layers=18, dtype="bfloat16"):
    config = replace(paligemma, num_key_value_heads=key_heads, num_hidden_layers=layers)
    per_token = {"yours": cache_bytes(config, 1, dtype=getattr(torch, dtype))}
    marks = {f"{tokens:,} tokens": tokens}
    return viz.cache_growth(per_token | {"PaliGemma 3B": cache_bytes(paligemma, 1)}, 16_384, marks)


dtypes = ["float32", "bfloat16", "float8_e4m3fn"]
viz.sliders(your_cache, tokens=(256, 16_384, 256), key_heads=[1, 2, 4, 8], layers=(1, 64), dtype=dtypes)

# %%
largest = replace(paligemma, num_key_value_heads=8, num_hidden_layers=64)
assert cache_bytes(largest, 16_384, dtype=torch.float32) > 5.8e9 > cache_bytes(paligemma, 16_384)
assert cache_bytes(replace(paligemma, num_attention_heads=4), 1) == cache_bytes(paligemma, 1)  # queries are not stored

# %% [markdown]
# (1 KB = 1,000 bytes.) And all of this is **per row**: a server with 64 conversations keeps 64 caches. At 896 pixels
# that is 4.8 GB with shared keys and values, nearly as much as the 5.8 GB of the model's weights, and eight times as
# much without sharing.

# %%
for_64 = {name: cache_bytes(config, 4096, batch_size=64) / 1e9 for name, config in models.items()}
print("64 rows at 896 px:", ", ".join(f"{name} {gigabytes:.1f} GB" for name, gigabytes in for_64.items()))
assert 4.8 < for_64["PaliGemma 3B (MQA)"] < 2.92 * 2
assert for_64["PaliGemma 3B if it were MHA"] == 8 * for_64["PaliGemma 3B (MQA)"]

# %% [markdown]
# Half of PaliGemma 2's layers attend only to the last 4,096 tokens, so they could drop older ones. Our cache keeps them
# all.
#
# ## How long does one token take?
#
# Let's measure it on your machine. We run a decoder of the small model's size on random embeddings and increase the
# sequence length. Then we time one more token, once by recomputing the whole sequence and once with a cache.

# %%
import time

from tqdm.auto import tqdm

decoder = model.language_model.model
lengths = [64, 128, 256, 512, 1024, 2048]


def timed_pass(x, length, kv_cache=None):
    """Seconds for x, the last tokens of a sequence of this length, and for how many tokens layer 0 computed keys."""
    mask, types, num_keys = torch.ones(1, length, dtype=torch.long), torch.zeros(1, length, dtype=torch.long), []
    types[:, -1] = 1
    hook = decoder.layers[0].self_attn.k_proj.register_forward_hook(lambda *call: num_keys.append(call[1][0].shape[1]))
    start = time.perf_counter()
    decoder(x, mask, types, kv_cache)
    hook.remove()
    return time.perf_counter() - start, num_keys[0]


# %%
seconds = {"no cache": [], "cache": []}
with torch.inference_mode():
    for S in tqdm(lengths):
        x = torch.randn(1, S + 3, decoder.config.hidden_size)
        static_cache = cache.StaticCache(decoder.config, 1, S + 3)
        timed_pass(x[:, :S], S, static_cache)  # prefill
        for name, kv_cache in {"no cache": None, "cache": static_cache}.items():
            steps = [timed_pass(x[:, n if kv_cache else 0 : n + 1], n + 1, kv_cache) for n in range(S, S + 3)]
            seconds[name].append(min(time for time, _ in steps))
            assert [num_keys for _, num_keys in steps] == ([1, 1, 1] if kv_cache else [S + 1, S + 2, S + 3])

# %%
print("tokens so far          ", *(f"{S:7}" for S in lengths))
for name, times in seconds.items():
    print(f"ms per token, {name:8} ", *(f"{1000 * t:7.1f}" for t in times))
curves = {name: (lengths, [1000 * t for t in times]) for name, times in seconds.items()}
viz.lines(curves, "Time for one more token", "tokens so far", "milliseconds", log="xy")

# %% [markdown]
# Without a cache, the time grows with the sequence length. It grows faster than linearly once attention dominates,
# because every token attends to every other. With a cache it stays nearly flat: the matrix products of one token, plus
# one pass over the cache. (Both axes are logarithmic: each grid line is ten times the one before. On a busy machine the
# times are noisy. The token counts, which the cell above asserts, are exact.)
#
# ## What is the new token's position?
#
# The rotary positions of chapter 06 have to continue where the prompt ended. When the model is called with a single
# token, only the mask says where that is. `attention_mask` covers all S tokens, including those in the cache, and is 0
# on padding. A token's position is its index in its own row, counted from 1 and **not counting padding**. That way a
# prompt gets the same positions alone and in a batch.
#
# ## Exercise 7.4 · Positions
#
# From `attention_mask` `[B, S]`, return the positions of the last `queries` tokens, `[B, queries]`. The first token of
# a row has position 1. On padding, return whatever the running sum is there. No query attends to padding, so it doesn't
# matter.


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
assert token_positions(two_rows, 1).tolist() == [[4], [6]]  # one decode step: each row has its own position

# %% [markdown]
# ## Break it: off by one
#
# This bug is easy to introduce in any inference code: the prefill positions are right, but those of the decode steps
# are one too small or too large, or start again at 1. RoPE only depends on distances. So shifting *all* positions is
# harmless, but shifting only the new tokens puts them at the wrong distance from the image and the prompt.


# %%
def shifted(everything=0, new=0):
    """Token positions, with all of them shifted, or only those of decode steps."""
    return lambda mask, queries: token_positions(mask, queries) + everything + (new if queries == 1 else 0)


bugs = {"correct": shifted(), "everything by +100": shifted(100)}
bugs |= {f"new tokens by {by:+}": shifted(new=by) for by in (-1, 1, 5, 20)}
bugs["every call starts at 1"] = lambda mask, queries: token_positions(mask[:, -queries:], queries)

# %%
scenes = [emoji.make_scene(seed, "validation") for seed in range(12)]
answers, decode_logits = {}, {}
for bug, function in tqdm(bugs.items()):
    with patch.object(gemma, "token_positions", function), torch.no_grad():
        answers[bug] = minivlm.generate(model, processor, [s.image for s in scenes], "caption en")
        decode_logits[bug] = step_by_step(cache.GrowingCache())[1:]

# %%
expected, correct = decode_logits["correct"], {}
for bug, texts in answers.items():
    correct[bug] = sum(emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(texts, scenes, strict=True))
    error = float((decode_logits[bug] - expected).abs().max())
    print(f"{bug:22} logits off by up to {error:7.4f}, {correct[bug]:2} of {len(scenes)} captions correct,", end=" ")
    print(f"the first: {texts[0]!r}")
    assert error < 1e-3 * expected.abs().max() if bug in ("correct", "everything by +100") else error > 1e-2

# %%
assert answers["everything by +100"] == answers["correct"]
assert correct["every call starts at 1"] < correct["correct"]

# %% [markdown]
# The small errors are the nasty ones. With an offset of one, the logits are clearly wrong, and yet just as many
# captions can come out right. If you only read the answers, you may never find this bug. A comparison with the model
# without a cache finds it at once.
#
# ## Break it again: a full cache
#
# PyTorch is too forgiving here. A slice past the end of a buffer is empty, and **one** token fits into an empty slice
# by broadcasting. The write does nothing and raises no error:

# %%
full = torch.zeros(1, 1, 4, 2)
full[:, :, 4:5] = torch.ones(1, 1, 1, 2)  # slot 4 of slots 0 to 3
assert full.sum() == 0  # the token is gone

# %% [markdown]
# From then on, the model would not attend to the tokens it has just written. So the package checks first:

# %%
small = cache.StaticCache(model.config.text_config, 1, prompt_length + 1)
try:
    with torch.no_grad():
        step_by_step(small)
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## Why you can reuse a prefix but not extend it
#
# From chapter 05: in PaliGemma, image and prompt attend to each other in both directions. Once they have been
# processed, nothing that follows can change their keys, because the answer is causal. But the **image's** keys depend
# on the **prompt**:

# %%
prompts = ["caption en", "detect panda"]
caches = [cache.GrowingCache(), cache.GrowingCache()]
P = processor.num_image_tokens
with torch.no_grad():
    for kv_cache, text in zip(caches, prompts, strict=True):
        model(**processor(text=[text], images=[scene.image]), cache=kv_cache)
change = [float((a[0] - b[0])[:, :, :P].abs().max()) for a, b in zip(caches[0].layers, caches[1].layers, strict=True)]
print("largest change in the image's keys, layer by layer:", " ".join(f"{x:.3f}" for x in change))
assert change[0] < 1e-5 < min(change[1:])
with torch.no_grad():  # the tower's output can be reused
    reused = model.encode_image(prompt["pixel_values"])
    ids = {name: value for name, value in prompt.items() if name != "pixel_values"}
    assert torch.equal(model(**prompt, last_only=True), model(**ids, image_features=reused, last_only=True))

# %% [markdown]
# In the first layer, a key is computed from its own token alone. From the second layer on, the image tokens have
# already attended to the prompt. So a second question about the same image needs a new prefill. (The vision tower never
# gets the prompt, so its output can be reused: `encode_image`.) Models that read images causally can reuse more. The
# price is that their image tokens never know what was asked.
#
# For the same reason you can't extend a cached prefix: the tokens in the cache would have had to attend to the new
# ones. If you split `caption en` in two, the model refuses. If you force it to continue, as if the second half were
# part of the answer, it computes something else:

# %%
split = prompt_length - 2
head = {name: value if name == "pixel_values" else value[:, :split] for name, value in prompt.items()}
tail, kv_cache = prompt["input_ids"][:, split:], cache.GrowingCache()
with torch.no_grad():
    expected = model(**prompt, last_only=True)
    model(**head, cache=kv_cache)
    try:
        model(tail, token_type_ids=prompt["token_type_ids"], cache=kv_cache)
    except ValueError as error:
        print("ValueError:", error)
    forced = model(tail, cache=kv_cache, last_only=True)
print(f"forced: logits off by up to {(forced - expected).abs().max():.2f}")
assert (forced - expected).abs().max() > 1e-2

# %% [markdown]
# ## Exercise 7.5 · The loop
#
# Write the greedy loop. `decoder(tokens, cache)` takes a list of token ids and returns scores `[T, V]`, where V is the
# size of its vocabulary. Each row scores what comes after one token. `cache` is a list, initially `[]`, in which the
# decoder stores what it needs. Return a list of `new_tokens` token ids that continue the prompt, each the one with the
# highest score. The decoder counts the tokens you feed it and raises an error if you feed more than the prompt and each
# new token once.


# %%
def greedy_with_cache(decoder, prompt, new_tokens):
    """A decoder, a list of token ids, an integer → a list of new_tokens token ids."""
    ### BEGIN SOLUTION
    cache, generated = [], []
    tokens = prompt
    for _ in range(new_tokens):
        scores = decoder(tokens, cache)
        tokens = [int(scores[-1].argmax())]
        generated += tokens
    return generated
    ### END SOLUTION


# %%
exercises.check(greedy_with_cache)
### BEGIN HIDDEN TESTS
exercises.score(greedy_with_cache, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# The same loop also drives the real model, if you wrap it as such a decoder:

# %%
greedy_with_cache = exercises.piece("greedy_with_cache")


def real_decoder(tokens, kv_caches):
    """The trained model. The list holds one GrowingCache."""
    ids = torch.tensor([tokens])
    image = {} if kv_caches else {"pixel_values": prompt["pixel_values"]}
    if not kv_caches:
        kv_caches.append(cache.GrowingCache())
    with torch.no_grad():
        return model(ids, cache=kv_caches[0], **image)[0]


assert greedy_with_cache(real_decoder, prompt["input_ids"][0].tolist(), len(caption_ids)) == caption_ids
print(processor.decode(caption_ids))

# %% [markdown]
# ## It matches
#
# We compare with transformers, which loads the same checkpoint and uses its own cache (`past_key_values`): first the
# keys and values after the prefill, then the logits of every decode step. On our side, your functions are plugged in.

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
load = transformers.PaliGemmaForConditionalGeneration.from_pretrained
theirs = load(minivlm.hub.resolve(None), attn_implementation="eager", dtype="float32").eval()

# %%
kv_cache = cache.GrowingCache()
with torch.no_grad(), patch.object(gemma, "token_positions", token_positions):
    model(**prompt, cache=kv_cache)
    out = theirs(**prompt, use_cache=True)
error = 0.0
for ours, layer in zip(kv_cache.layers, out.past_key_values.layers, strict=True):
    for a, b in zip(ours, (layer.keys, layer.values), strict=True):
        error = max(error, float((a - b).abs().max() / b.abs().max()))
print(f"keys and values of {len(kv_cache.layers)} layers: largest relative difference {error:.0e}")
assert error < 1e-5

# %%
rows, mask = [out.logits[0, -1]], prompt["attention_mask"]
with torch.no_grad():
    for token_id in caption_ids[:-1]:
        mask = torch.cat((mask, torch.ones(1, 1, dtype=torch.long)), dim=1)
        step = {"input_ids": torch.tensor([[token_id]]), "token_type_ids": torch.ones(1, 1, dtype=torch.long)}
        out = theirs(**step, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0, -1])
expected = torch.stack(rows)
pieces = {"append": append, "write_in_place": write_in_place}
config = model.config.text_config
with torch.no_grad(), patch.object(gemma, "token_positions", token_positions), patch.multiple(cache, **pieces):
    ours = [step_by_step(cache.GrowingCache()), step_by_step(cache.StaticCache(config, 1, max_length))]
error = max(float((logits - expected).abs().max() / expected.abs().max()) for logits in ours)
print(f"logits of {len(rows)} steps: largest relative difference {error:.0e}")
assert error < 1e-5

# %% [markdown]
# ## Recap
#
# * Old tokens never attend to new ones, so their keys and values can be stored. Each token goes through the decoder
#   once.
# * The prefill processes image and prompt in one call. A decode step processes one token.
# * A growing cache copies everything at every step. A static cache allocates once and has to know how much of it is
#   filled.
# * Bytes: 2 × layers × key heads × head dimension × bytes per number × tokens × rows. Sharing keys and values keeps the
#   cache small.
# * Positions continue where the prompt ended, not counting padding. Shifting all of them changes nothing. Shifting only
#   the new ones does.
# * A prefix has to be processed in one call, because image and prompt attend to each other.
#
# **Three questions**
#
# <details><summary>1. Could you store queries and keys, and recompute the values?</summary>
#
# You could, but it would save nothing. Values are computed from the hidden states of each layer. To get those for the
# old tokens, you would have to run them through all layers again, which is exactly what the cache avoids. And the
# queries of old tokens are never needed.
#
# </details>
#
# <details><summary>2. Suppose a model's answer were bidirectional too. What could its cache store?</summary>
#
# Nothing that stays valid, except in the first layer. From the second layer on, each new token would change the hidden
# states of all tokens, and with them their keys and values.
#
# </details>
#
# <details><summary>3. Why does a batch of 64 decode nearly as fast as a batch of one on a large machine?</summary>
#
# A decode step reads all weights from memory and uses each of them for one vector per row. With 64 rows, the same read
# serves 64 vectors. What does grow with the batch is the cache, and its memory sets the limit.
#
# </details>
#
# ## Open problem: a cache that forgets
#
# Half of PaliGemma 2's layers attend only to the last 4,096 tokens, but our cache keeps all of them. A *ring buffer*
# has only W slots. Once they are full, the newest token overwrites the oldest. Write `write_ring(buffer, new, start)`,
# with `buffer` `[B, K, W, d]`, `new` `[B, K, T, d]` (T can be larger than W) and `start`, the number of tokens written
# before. It writes in place and returns the slots that are filled, at most W of them, in any order. There is no stub:
# write the function in a new cell above the tests. The last test shows why the order does not matter.
#
# <details><summary>A pointer</summary>
#
# Token t always goes to the same slot. Python's `%` finds it. Of a `new` that is longer than the buffer, only the last
# W tokens survive.
#
# </details>

# %%
if write_ring := globals().get("write_ring"):
    g, W = torch.Generator().manual_seed(7), 4
    stored, everything = torch.full((2, 3, W, 5), torch.nan), torch.randn(2, 3, 30, 5, generator=g)
    start = 0
    for T in (3, 1, 1, 2, 1, 1, 6, 1, 3, 5, 1, 1):
        filled = write_ring(stored, everything[:, :, start : start + T], start)
        start += T
        last = everything[:, :, max(0, start - W) : start]
        assert filled.shape == last.shape, f"{min(start, W)} slots are filled, but got the shape {list(filled.shape)}"
        assert torch.equal(filled.sort(2).values, last.sort(2).values), f"after {start} tokens, not the last ones"
        assert filled.data_ptr() == stored.data_ptr(), "a view of the buffer, not a copy"
        query = torch.randn(2, 3, 1, 5, generator=g)
        attend = torch.nn.functional.scaled_dot_product_attention
        assert torch.allclose(attend(query, filled, filled), attend(query, last, last), atol=1e-6)
    print(f"write_ring passed: {start} tokens went through {W} slots, and attention did not notice")
else:
    print("write_ring is not written yet.")

# %% [markdown]
# **Next:** [08 · Full PaliGemma inference](08_inference.ipynb), where everything comes together.
