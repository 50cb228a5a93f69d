# %% [markdown]
# # 05 · The prefix-LM mask
#
# **Who may look at whom?**
#
# | | |
# |---|---|
# | time | 80 minutes, 43 of them exercises |
# | know first | what attention does: every token takes a weighted mean over the tokens it may look at |
# | you will build | the mask of PaliGemma, from one rule with a running sum; the loss on the answer alone |
# | runs on | CPU, nothing to download |

# %%
import torch

import minivlm
from minivlm import emoji, masks
from minivlm.course import exercises, viz

viz.you_are_here("05")

# %% [markdown]
# ## Predict first
#
# The model gets a picture and the prompt `caption en`, and is about to write `a cat and two dogs`. Decide, before you go on:
#
# 1. May a patch of the picture look at the word `caption`, which stands *after* it?
# 2. May the word `en` look at the word `cat`?
# 3. May the word `dogs` look at the word `cat`?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. Yes. Picture and prompt are all there from the start, so they may look at each other in both directions.
# 2. No. When the prompt is read, the answer has not been written yet.
# 3. Yes. It was written earlier.
#
# </details>

# %% [markdown]
# ## A toy: two patches, one word, two words of answer
#
# Attention compares every *query* (the token that looks) with every *key* (the token looked at). A mask is a table of
# yes and no, one row a query, one column a key. Big Vision, the code in which PaliGemma was trained, makes it from one
# number a token, `mask_ar`:
#
# * **0**: I belong to the block of the token before me.
# * **1**: I start a new block.
#
# The running sum numbers the blocks. A query sees a key if the key's block is **not later** than its own.

# %%
tokens = ["patch1", "patch2", "caption", "a", "cat"]
mask_ar = torch.tensor([0, 0, 0, 1, 1])  # picture and prompt: one block. Every word of the answer: a block of its own
block = mask_ar.cumsum(0)
for token, ar, number in zip(tokens, mask_ar.tolist(), block.tolist(), strict=True):
    print(f"{token:8} mask_ar {ar}   block {number}")

# %% [markdown]
# By hand: "a" is in block 1. It sees blocks 0 and 1: both patches, "caption", and itself, but not "cat" in block 2.
#
# ### The slow loop
#
# The rule, one cell of the table after the other:

# %%
slow = torch.zeros(5, 5, dtype=torch.bool)
for query in range(5):
    for key in range(5):
        slow[query, key] = block[key] <= block[query]

assert slow[3].tolist() == [True, True, True, True, False]  # the row of "a", as found by hand
viz.attention_mask(slow, tokens, title="Rows look, columns are looked at")

# %% [markdown]
# ### All at once
#
# The same comparison for all cells: keys along the last axis, queries along the one before.

# %%
fast = block[None, :] <= block[:, None]
assert fast.shape == (5, 5)
assert torch.equal(fast, slow)

# %% [markdown]
# ## Exercise 5.1 · The rule ★☆☆ (8 minutes)
#
# Write `block_mask` for a whole batch: `mask_ar` has shape `[B, T]`, the result `[B, T, T]` is indexed
# `[row, query, key]` and holds booleans.
#
# <details><summary>Hint</summary>
#
# `cumsum(-1)` sums along the tokens. `block[..., None, :]` has shape `[B, 1, T]` and `block[..., :, None]` has
# `[B, T, 1]`; comparing them gives `[B, T, T]`.
#
# </details>


# %%
def block_mask(mask_ar):
    """[B, T] of 0 and 1 → [B, T, T] of booleans: may this query see that key?"""
    ### BEGIN SOLUTION
    block = mask_ar.cumsum(-1)
    return block[..., None, :] <= block[..., :, None]
    ### END SOLUTION


# %%
exercises.check(block_mask)
### BEGIN HIDDEN TESTS
exercises.score(block_mask, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# From here on the chapter uses your function if it passed, and the package's if not:

# %%
block_mask = exercises.piece("block_mask")

# %% [markdown]
# ## One rule, three masks
#
# Nothing but `mask_ar` decides which kind of model it is.

# %%
kinds = {"causal": [1, 1, 1, 1, 1], "bidirectional": [0, 0, 0, 0, 0], "prefix-LM": [0, 0, 0, 1, 1]}
three = {name: block_mask(torch.tensor([ar]))[0] for name, ar in kinds.items()}
assert torch.equal(three["causal"], torch.ones(5, 5).tril().bool())
assert three["bidirectional"].all()
viz.compare_masks(three, tokens)

# %% [markdown]
# * **Causal**: GPT and Gemma itself, on text. Each token sees itself and what came before.
# * **Bidirectional**: BERT, and SigLIP's vision tower of chapter 03.
# * **Prefix-LM**: PaliGemma. Picture and prompt read each other freely; the answer is written from left to right.
#
# ## Exercise 5.2 · PaliGemma's mask ★☆☆ (5 minutes)
#
# The processor of chapter 04 says of each token which kind it is: `token_type_ids` is 0 on picture and prompt and 1 on
# the answer, `[B, T]`. Write the mask, `[B, T, T]`. You may call `block_mask`.
#
# <details><summary>Hint</summary>
#
# Compare `token_type_ids` with the `mask_ar` of the toy. There is less to do than you may think.
#
# </details>


# %%
def prefix_lm_mask(token_type_ids):
    """[B, T], 0 on image and prefix, 1 on the suffix → [B, T, T] of booleans."""
    ### BEGIN SOLUTION
    return block_mask(token_type_ids)
    ### END SOLUTION


# %%
exercises.check(prefix_lm_mask)
### BEGIN HIDDEN TESTS
exercises.score(prefix_lm_mask, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## The explorer
#
# Move the sliders; point at a row to light what that token sees, at a column to see who looks at it. The sentence says
# why a cell is open or closed. Try 49 image tokens, which is what our small model has, and 256, which is PaliGemma's
# number. Then press *predict* and fill in a row yourself.

# %%
viz.mask_explorer(image_tokens=4, prefix=3, suffix=3)

# %% [markdown]
# ## Learning from the answer alone
#
# In training the answer is part of the input (*teacher forcing*), and the mask keeps each word from looking at the ones
# that it must predict. Loss is taken on the answer only: picture and prompt are given, there is nothing to learn in
# guessing them. Labels say where: the token itself on the answer, −100 everywhere else.

# %%
model = minivlm.PaliGemma.from_pretrained()
processor = minivlm.Processor.from_pretrained()
scene = emoji.make_scene(5, "validation")
caption = scene.examples[0].answers[0]
batch = processor(text=["caption en"], images=[scene.image], suffix=[caption])
viz.token_strip(batch, processor, title=f"caption en → {caption}")

# %%
labels = batch["labels"]
print("tokens", labels.shape[1], " of which carry a label:", int((labels != -100).sum()))
assert torch.equal(labels != -100, batch["token_type_ids"] == 1)  # exactly the suffix, <eos> included

# %% [markdown]
# ## Exercise 5.3 · The loss on the suffix ★★★ (12 minutes)
#
# `logits` are `[B, T, V]`, `labels` `[B, T]` with −100 where there is nothing to predict. Return the mean cross-entropy
# over all words of all answers. Mind which logits predict which token.
#
# <details><summary>Hint</summary>
#
# The logits at position *t* were computed without token *t + 1*: they are the prediction of it. So the last logits and
# the first label have no partner. `F.cross_entropy` wants `[N, V]` and `[N]`, and knows `ignore_index=-100`.
#
# </details>


# %%
def suffix_loss(logits, labels):
    """[B, T, V], [B, T] → mean loss in nats of the labeled tokens, a tensor without axes."""
    ### BEGIN SOLUTION
    vocabulary = logits.shape[-1]
    predictions = logits[:, :-1].reshape(-1, vocabulary)
    targets = labels[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(predictions, targets, ignore_index=-100)
    ### END SOLUTION


# %%
exercises.check(suffix_loss)
### BEGIN HIDDEN TESTS
exercises.score(suffix_loss, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# The model computes the same number, but sends only the labeled positions through its output head, since the
# vocabulary is by far the widest thing in it:

# %%
suffix_loss = exercises.piece("suffix_loss")
inputs = {name: value for name, value in batch.items() if name != "labels"}
with torch.no_grad():
    by_hand, by_model = suffix_loss(model(**inputs), labels), model.loss(labels, **inputs)
print(f"by hand {by_hand:.6f}   model.loss {by_model:.6f} nats a token")
assert torch.allclose(by_hand, by_model, rtol=1e-5)

# %% [markdown]
# ## Padding
#
# Rows of a batch have one length, so short prompts are filled up with `<pad>`. It carries nothing, and nobody may look
# at it. In training padding stands on the right; for generation on the left, so that every row ends with its last word
# and the next one continues it.

# %%
prompts = ["caption en", "answer en how many objects are there?"]
left = processor(text=prompts, images=[scene.image] * 2, padding_side="left")
print("attention_mask, the first eight of each row:", left["attention_mask"][:, :8].tolist())
viz.token_strip(left, processor, title="Two prompts, padded on the left")

# %% [markdown]
# `token_type_ids` is 0 on padding too, the same as on picture and prompt. The rule of 5.2 alone would let everyone look
# at it. The mask of the keys closes it, whoever asks:

# %%
open_mask = masks.prefix_lm_mask(left["token_type_ids"])
closed = masks.mask_padding(open_mask, left["attention_mask"])
names = viz.read_tokens(left, processor, row=0)
viz.compare_masks({"padding seen (the bug)": open_mask[0], "padding closed": closed[0]}, names)

# %% [markdown]
# Here a row of padding still sees picture and prompt. That is not so under every mask: under a causal one, padding at
# the start of a row has nothing but padding before it. Its row would be empty, and the softmax of nothing is 0/0:

# %%
nothing = torch.full((4,), -torch.inf)
print("softmax of a row without keys:", nothing.softmax(-1).tolist())
assert nothing.softmax(-1).isnan().all()

# %% [markdown]
# So every query is left seeing itself. (That is the triangle in the picture: some pairs are open, here the diagonal
# alone.) Nobody reads what padding computes; it must not be NaN.
#
# ## Exercise 5.4 · Close the padding ★★☆ (10 minutes)
#
# Given `mask` `[B, T, T]` and `attention_mask` `[B, T]` (1 on tokens, 0 on padding), return the mask in which no query
# sees a padding key, except that every query sees itself.
#
# <details><summary>Hint</summary>
#
# `attention_mask.bool()[:, None, :]` has shape `[B, 1, T]` and speaks about keys. `torch.eye(T, dtype=torch.bool)` is
# the diagonal.
#
# </details>


# %%
def mask_padding(mask, attention_mask):
    """[B, T, T], [B, T] → [B, T, T]."""
    ### BEGIN SOLUTION
    T, S = mask.shape[1:]  # S > T when a cache holds earlier keys: the queries are the last T
    itself = torch.eye(S, dtype=torch.bool)[S - T :]
    return (mask & attention_mask.bool()[:, None, :]) | itself
    ### END SOLUTION


# %%
exercises.check(mask_padding)
### BEGIN HIDDEN TESTS
exercises.score(mask_padding, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## Break it: the padding that was seen
#
# Until early 2025 PaliGemma in transformers had this bug in training (issue 35855): since padding has type 0, it was
# opened again together with the prefix. Let us have it, for one forward pass. A prompt alone and the same prompt in a
# padded batch should give the same logits.

# %%
from unittest.mock import patch

alone = processor(text=prompts[:1], images=[scene.image])


def seen(mask, attention_mask):
    return mask.expand(len(attention_mask), -1, -1)


with torch.no_grad():
    truth = model(**alone, last_only=True)[0, -1]
    right = model(**left, last_only=True)[0, -1]
    with patch.object(masks, "mask_padding", seen):
        wrong = model(**left, last_only=True)[0, -1]
print(
    f"largest difference of the logits, padding closed: {(right - truth).abs().max():.1e}, seen: {(wrong - truth).abs().max():.2f}"
)
assert (right - truth).abs().max() < 1e-5 * truth.abs().max() < (wrong - truth).abs().max()

# %% [markdown]
# Nothing crashed, and the answer may even look fine; the batch no longer says what each row alone would say. No single
# answer gives such a bug away; this comparison does.
#
# ## Break it again: a causal PaliGemma
#
# What if picture and prompt were read causally, as a language model reads text? Each patch then sees only the patches
# before it, and the picture never hears the question.

# %%
some = [emoji.make_scene(seed, "validation") for seed in range(12)]


def captions_right() -> int:
    answers = minivlm.generate(model, processor, [s.image for s in some], "caption en")
    return sum(emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(answers, some, strict=True))


def causal(token_type_ids):
    return masks.causal_mask(token_type_ids.shape[1]).expand(len(token_type_ids), -1, -1)


with_prefix_lm = captions_right()
with patch.object(masks, "prefix_lm_mask", causal):
    with_causal = captions_right()
print(f"captions exactly right, of {len(some)}: prefix-LM {with_prefix_lm}, causal {with_causal}")
assert with_causal < with_prefix_lm

# %% [markdown]
# The weights are the same, only the mask changed. A model must be run with the mask that it was trained with.
#
# ## A window: PaliGemma 2
#
# Gemma 2, inside PaliGemma 2, lets every other layer (0, 2, 4, …) look back over 4096 tokens at most: old words fade, and
# the cache of those layers stays short. The window closes keys that are `window` or more steps **behind** the query.
#
# ## Exercise 5.5 · The sliding window ★★☆ (8 minutes)
#
# Return `[length, length]` booleans: True where the key is fewer than `window` steps behind the query. A token is 0 steps
# behind itself. Keys ahead stay True; the prefix-LM mask takes care of them.
#
# <details><summary>Hint</summary>
#
# `position = torch.arange(length)`; steps behind = query position − key position.
#
# </details>


# %%
def sliding_window_mask(length, window):
    """Two integers → [length, length] of booleans."""
    ### BEGIN SOLUTION
    position = torch.arange(length)
    return position[:, None] - position[None, :] < window
    ### END SOLUTION


# %%
exercises.check(sliding_window_mask)
### BEGIN HIDDEN TESTS
exercises.score(sliding_window_mask, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# With picture, prompt and a long answer. The picture's tokens keep seeing each other at any distance, as in
# transformers: a window never cuts inside the prefix.

# %%
types = torch.tensor([[0] * 5 + [1] * 6])
full, sliding = masks.attention_masks(torch.ones_like(types), types, queries=11, window=3)
words = ["img1", "img2", "img3", "caption", "en", "a", "cat", "and", "two", "dogs", "<eos>"]
assert torch.equal(sliding[0, :5, :5], full[0, :5, :5])  # the prefix is untouched
viz.compare_masks({"layers 1, 3, 5 …": full[0], "layers 0, 2, 4 …, window 3": sliding[0]}, words)

# %% [markdown]
# ## The model's own attention, over its mask
#
# A mask says what *may* be looked at. What the trained model looks at is in its attention weights: one table a layer and
# head. Here they are averaged over the heads of the last layer; the forbidden cells are exactly 0.

# %%
weights = viz.decoder_attention(model, **inputs)
mask = masks.prefix_lm_mask(inputs["token_type_ids"])[0]
assert all(w[0, :, ~mask].abs().max() == 0 for w in weights)
assert all(torch.allclose(w.sum(-1), torch.ones_like(w.sum(-1))) for w in weights)
viz.attention_over_mask(weights[-1][0].mean(0), mask, viz.read_tokens(inputs, processor))

# %% [markdown]
# And on the picture: what each position of the answer looks at when it writes the next token, in the layer that looks
# at the picture most. The frame marks the strongest patch.

# %%
P = processor.num_image_tokens
start = int(inputs["token_type_ids"][0].argmax()) - 1  # the newline, which writes the first word
looks = torch.stack([w[0, :, start:, :P].mean(0) for w in weights])
layer = int(looks.sum(-1).mean(1).argmax())
strip = [processor.decode([i]) for i in inputs["input_ids"][0, start + 1 :].tolist()]
titles = [f"→ {word or '<eos>'}" for word in strip] + [""]
viz.attention_on_image(scene.image, looks[layer, :-1], titles=titles[: looks.shape[1] - 1])

# %% [markdown]
# ## It matches
#
# The same checkpoint in transformers, attention weights and logits side by side:

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = minivlm.hub.resolve(None)
theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
    folder, attn_implementation="eager", dtype="float32"
)
with torch.no_grad():
    out = theirs.eval()(**inputs, output_attentions=True)
    logits = model(**inputs)
largest = max(float((a - b).abs().max()) for a, b in zip(weights, out.attentions, strict=True))
difference = float((logits - out.logits).abs().max() / out.logits.abs().max())
print(f"attention weights: largest difference {largest:.1e};  logits: {difference:.1e} relative")
assert largest < 1e-5 and difference < 1e-5
assert torch.equal(out.attentions[0][0, 0] > 0, mask)

# %% [markdown]
# ### A picture that misleads
#
# transformers has an `AttentionMaskVisualizer`. For PaliGemma it shows a **causal** prompt that the picture does not
# see, which is not what the model does: it builds the mask without the block numbers that the model itself passes, then
# paints over the picture's own cells (all but those of its first token). (It also needs the network, for a photo of a
# bee.) Both calls, as in version 5.23:

# %%
from transformers.masking_utils import create_causal_mask

shared = {
    "config": theirs.config.text_config,
    "inputs_embeds": torch.zeros(1, mask.shape[0], model.config.text_config.hidden_size),
    "attention_mask": inputs["attention_mask"],
    "past_key_values": None,
}
shown = create_causal_mask(**shared)[0, 0] == 0
used = (
    create_causal_mask(
        **shared, position_ids=None, block_sequence_ids=torch.where(inputs["token_type_ids"] == 0, 0, -1)
    )[0, 0]
    == 0
)
assert torch.equal(used, mask) and torch.equal(shown, masks.causal_mask(len(mask)))
shown[1:P, 1:P] = True  # what it paints over
viz.compare_masks({"what the model does": used, "what the visualizer shows": shown}, viz.read_tokens(inputs, processor))

# %% [markdown]
# ## Recap
#
# * One number a token, a running sum and `<=` give causal, bidirectional and prefix-LM masks.
# * Picture and prompt see each other fully; the answer is causal and sees all of them.
# * Loss is taken on the answer only, each token predicted by the one before.
# * Padding has type 0: its *columns* must be closed, and every row left with at least one key.
# * PaliGemma 2 adds a window on even layers, never inside the prefix.
#
# **Three questions**
#
# <details><summary>1. What is the mask_ar of a model that writes two answers about one picture, neither seeing the other?</summary>
#
# No mask_ar gives that: blocks are ordered, and a later block sees all earlier ones. It takes two rows of a batch, or a mask
# that is not made by this rule.
#
# </details>
#
# <details><summary>2. Why may the picture see the question in PaliGemma, and what does it cost?</summary>
#
# The patches can then gather what the question asks for. The price: what the decoder computed for the picture cannot be
# reused for another question about it.
#
# </details>
#
# <details><summary>3. In the decode step there is one query. How does its mask look?</summary>
#
# One row: True for every token so far but padding. Without padding it is all True, and the mask can be left out (but
# for the layers with a window, once the text is longer than it).
#
# </details>
#
# **Next:** [06 · The Gemma decoder](06_gemma_decoder.ipynb), which turns what attention gathers into the next word.
