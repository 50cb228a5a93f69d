# %% [markdown]
# # 05 · The prefix-LM mask
#
# **Which token attends to which?**
#
# | | |
# |---|---|
# | know first | what attention does: every token takes a weighted mean over the tokens it can attend to |
# | you will build | PaliGemma's mask, from one rule with a running sum; the loss on the answer only |
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
# The model gets an image and the prompt `caption en`, and is about to write `a cat and two dogs`. Before you go on,
# decide:
#
# 1. Can an image patch attend to the token `caption`, which comes *after* it?
# 2. Can the token `en` attend to the token `cat`?
# 3. Can the token `dogs` attend to the token `cat`?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. Yes. Image and prompt are complete from the start, so their tokens can attend to each other in both directions.
# 2. No. When the prompt is processed, the answer does not exist yet.
# 3. Yes. It was written earlier.
#
# </details>

# %% [markdown]
# ## A toy example: two patches, a prompt of one token, an answer of two
#
# Attention compares every *query* (the token that attends) with every *key* (the token it attends to). A mask is a
# table of yes and no, with one row per query and one column per key. big_vision, the code that PaliGemma was trained
# with, builds it from one number per token, `mask_ar`:
#
# * **0**: this token belongs to the same block as the token before it.
# * **1**: this token starts a new block.
#
# A running sum of `mask_ar` numbers the blocks. A query can attend to a key if the key's block is **not later** than
# its own.

# %%
tokens = ["patch1", "patch2", "caption", "a", "cat"]
mask_ar = torch.tensor([0, 0, 0, 1, 1])  # image and prompt are one block; each answer token is a block of its own
block = mask_ar.cumsum(0)
for token, ar, number in zip(tokens, mask_ar.tolist(), block.tolist(), strict=True):
    print(f"{token:8} mask_ar {ar}   block {number}")

# %% [markdown]
# By hand: "a" is in block 1. It can attend to blocks 0 and 1: both patches, "caption" and itself, but not "cat" in
# block 2.
#
# ### The slow loop
#
# Apply the rule to one cell of the table at a time:

# %%
slow = torch.zeros(5, 5, dtype=torch.bool)
for query in range(5):
    for key in range(5):
        slow[query, key] = block[key] <= block[query]

assert slow[3].tolist() == [True, True, True, True, False]  # the row of "a", as we found by hand
viz.attention_mask(slow, tokens, title="One row per query, one column per key")

# %% [markdown]
# ### All at once
#
# The same comparison for all cells: keys along the last axis, queries along the one before it.

# %%
fast = block[None, :] <= block[:, None]
assert fast.shape == (5, 5)
assert torch.equal(fast, slow)

# %% [markdown]
# ## Exercise 5.1 · The rule
#
# Write `block_mask` for a whole batch. `mask_ar` has shape `[B, T]`. The result is boolean, has shape `[B, T, T]` and
# is indexed `[row, query, key]`.


# %%
def block_mask(mask_ar):
    """[B, T] of 0 and 1 → [B, T, T] of booleans: can this query attend to that key?"""
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
# From here on, the chapter uses your function if it passed, and the package's if it did not:

# %%
block_mask = exercises.piece("block_mask")

# %% [markdown]
# ## One rule, three masks
#
# `mask_ar` alone decides what kind of model this is.

# %%
kinds = {"causal": [1, 1, 1, 1, 1], "bidirectional": [0, 0, 0, 0, 0], "prefix-LM": [0, 0, 0, 1, 1]}
three = {name: block_mask(torch.tensor([ar]))[0] for name, ar in kinds.items()}
assert torch.equal(three["causal"], torch.ones(5, 5).tril().bool())
assert three["bidirectional"].all()
viz.compare_masks(three, tokens)

# %% [markdown]
# * **Causal**: GPT, and Gemma itself, on text. Each token attends to itself and to what came before.
# * **Bidirectional**: BERT, and SigLIP's vision tower from chapter 03. Every token attends to every token.
# * **Prefix-LM**: PaliGemma. Image and prompt attend to each other freely, and the answer is causal.
#
# ## Exercise 5.2 · PaliGemma's mask
#
# The processor of chapter 04 tells you the type of each token: `token_type_ids`, `[B, T]`, is 0 on image and prompt and
# 1 on the answer. Write the mask, `[B, T, T]`. You can call `block_mask`.


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
# Here is the mask that **your function** returns for the sequence of the first question. A cell is crossed where it
# differs from PaliGemma's. Point at a row to see which keys that token attends to, at a column to see which tokens attend
# to it, and at a cell to see why it is allowed or blocked. Try the other masks. Then press *Predict a row* and fill in a
# row yourself.

# %%
processor = minivlm.Processor.from_pretrained()
scene = emoji.make_scene(5, "validation")
viz.explore(processor, scene.image, "caption en", suffix="a cat and two dogs", mask=prefix_lm_mask)

# %% [markdown]
# ## Learning from the answer only
#
# In training, the answer is part of the input (*teacher forcing*), and the mask keeps each token from attending to the
# tokens it has to predict. The loss is computed on the answer only. Image and prompt are given, so there is nothing to
# learn from predicting them. The labels say where the loss applies: they are the token ids on the answer and −100
# everywhere else.

# %%
model = minivlm.PaliGemma.from_pretrained()
caption = scene.examples[0].answers[0]
batch = processor(text=["caption en"], images=[scene.image], suffix=[caption])
viz.token_strip(batch, processor, title=f"caption en → {caption}")

# %%
labels = batch["labels"]
print("tokens:", labels.shape[1], "  with a label:", int((labels != -100).sum()))
assert torch.equal(labels != -100, batch["token_type_ids"] == 1)  # exactly the suffix, including <eos>

# %% [markdown]
# ## Exercise 5.3 · The loss on the suffix
#
# `logits` is `[B, T, V]`, and `labels` is `[B, T]` with −100 where there is nothing to predict. Return the mean
# cross-entropy over all labeled tokens in the batch. Watch out for which logits predict which token.


# %%
def suffix_loss(logits, labels):
    """[B, T, V], [B, T] → mean loss of the labeled tokens in nats, a scalar tensor."""
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
# The model computes the same number, but it sends only the labeled positions through its output head, because the
# vocabulary is by far its largest dimension:

# %%
suffix_loss = exercises.piece("suffix_loss")
inputs = {name: value for name, value in batch.items() if name != "labels"}
with torch.no_grad():
    by_hand, by_model = suffix_loss(model(**inputs), labels), model.loss(labels, **inputs)
print(f"by hand {by_hand:.6f}   model.loss {by_model:.6f} nats per token")
assert torch.allclose(by_hand, by_model, rtol=1e-5)

# %% [markdown]
# ## Padding
#
# All rows of a batch have the same length, so short prompts are filled up with `<pad>`. Padding carries no information,
# and no token should attend to it. In training, padding is on the right. For generation it is on the left, so that
# every row ends with its last real token and the next token can follow.

# %%
prompts = ["caption en", "answer en how many objects are there?"]
left = processor(text=prompts, images=[scene.image] * 2, padding_side="left")
print("attention_mask, the first eight of each row:", left["attention_mask"][:, :8].tolist())
viz.token_strip(left, processor, title="Two prompts, padded on the left")

# %% [markdown]
# `token_type_ids` is 0 on padding too, just as on image and prompt. So with the rule of 5.2 alone, every token can
# attend to padding. `attention_mask` fixes that: it blocks padding as a key, for every query.

# %%
unpadded = masks.prefix_lm_mask(left["token_type_ids"])
padded = masks.mask_padding(unpadded, left["attention_mask"])
names = viz.read_tokens(left, processor, row=0)
viz.compare_masks({"padding visible (the bug)": unpadded[0], "padding blocked": padded[0]}, names)

# %% [markdown]
# Here a padding query still attends to image and prompt. With other masks it may have no key at all. In a causal mask,
# padding at the start of a row has only padding before it, and all of that is blocked. The softmax of an empty row is
# 0/0:

# %%
no_keys = torch.full((4,), -torch.inf)
print("softmax of a row without keys:", no_keys.softmax(-1).tolist())
assert no_keys.softmax(-1).isnan().all()

# %% [markdown]
# So every query can still attend to itself. (In the figure, the cell of padding and padding is filled to one sixth: of
# the 6 × 6 pairs, the 6 on the diagonal are allowed.) No real token uses what padding computes, but it must not be NaN,
# because even 0 times NaN is NaN.

# %%
assert torch.equal(padded[0, :6, :6], torch.eye(6, dtype=torch.bool))
assert (0 * no_keys.softmax(-1)).isnan().all()

# %% [markdown]
# ## Exercise 5.4 · Mask the padding
#
# `mask` is `[B, T, T]` and `attention_mask` is `[B, T]` (1 on tokens, 0 on padding). Return the mask in which no query
# attends to a padding key, except that every query attends to itself.


# %%
def mask_padding(mask, attention_mask):
    """[B, T, T], [B, T] → [B, T, T]."""
    ### BEGIN SOLUTION
    T, S = mask.shape[1:]  # S > T if a cache holds earlier keys: the queries are the last T tokens
    itself = torch.eye(S, dtype=torch.bool)[S - T :]
    return (mask & attention_mask.bool()[:, None, :]) | itself
    ### END SOLUTION


# %%
exercises.check(mask_padding)
### BEGIN HIDDEN TESTS
exercises.score(mask_padding, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## Break it: visible padding
#
# Until early 2025, PaliGemma in transformers had this bug in training (issue 35855): padding has type 0, so it became
# visible again together with the prefix. Let's bring the bug back for one forward pass. A prompt on its own and the
# same prompt in a padded batch should have the same logits.

# %%
from unittest.mock import patch

alone = processor(text=prompts[:1], images=[scene.image])


def leave_padding_visible(mask, attention_mask):
    return mask.expand(len(attention_mask), -1, -1)


with torch.no_grad():
    truth = model(**alone, last_only=True)[0, -1]
    blocked = model(**left, last_only=True)[0, -1]
    with patch.object(masks, "mask_padding", leave_padding_visible):
        visible = model(**left, last_only=True)[0, -1]
print("largest difference between the logits:")
print(f"padding blocked {(blocked - truth).abs().max():.1e}, padding visible {(visible - truth).abs().max():.2f}")
assert (blocked - truth).abs().max() < 1e-5 * truth.abs().max() < (visible - truth).abs().max()

# %% [markdown]
# Nothing crashed, and the answer may even look fine. But a row in the batch no longer has the same result as the row on
# its own. You cannot find such a bug by reading answers. You find it with this comparison.
#
# ## Break it again: a causal PaliGemma
#
# What if image and prompt were processed causally, as a language model processes text? Then each patch attends only to
# the patches before it, and no patch attends to the question.

# %%
scenes = [emoji.make_scene(seed, "validation") for seed in range(12)]


def count_correct_captions() -> int:
    answers = minivlm.generate(model, processor, [s.image for s in scenes], "caption en")
    return sum(emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(answers, scenes, strict=True))


def causal(token_type_ids):
    return masks.causal_mask(token_type_ids.shape[1]).expand(len(token_type_ids), -1, -1)


with_prefix_lm = count_correct_captions()
with patch.object(masks, "prefix_lm_mask", causal):
    with_causal = count_correct_captions()
print(f"correct captions, of {len(scenes)}: prefix-LM {with_prefix_lm}, causal {with_causal}")
assert with_causal < with_prefix_lm

# %% [markdown]
# The weights are the same. Only the mask changed. Run a model with the mask it was trained with.
#
# ## A window: PaliGemma 2
#
# Gemma 2, the decoder of PaliGemma 2, limits every other layer (0, 2, 4, …) to the last 4096 tokens. In those layers
# old tokens are out of reach, and the KV cache stays short. The window blocks keys that are `window` or more steps
# **behind** the query.
#
# ## Exercise 5.5 · The sliding window
#
# Return `[length, length]` booleans: True where the key is fewer than `window` steps behind the query. A token is 0
# steps behind itself. Keys ahead of the query stay True, because the prefix-LM mask takes care of them.


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
# Here it is with an image, a prompt and a longer answer. Image and prompt tokens still attend to each other at any
# distance, as in transformers: the window never applies inside the prefix.

# %%
types = torch.tensor([[0] * 5 + [1] * 6])
full, sliding = masks.attention_masks(torch.ones_like(types), types, queries=11, window=3)
names = ["img1", "img2", "img3", "caption", "en", "a", "cat", "and", "two", "dogs", "<eos>"]
assert torch.equal(sliding[0, :5, :5], full[0, :5, :5])  # the prefix is unchanged
viz.compare_masks({"layers 1, 3, 5 …": full[0], "layers 0, 2, 4 …, window 3": sliding[0]}, names)

# %% [markdown]
# ## Attention weights over the mask
#
# A mask says which tokens a query *can* attend to. The attention weights say which ones it does attend to. There is one
# table of weights per layer and head. Blocked cells are exactly 0.

# %%
weights = viz.decoder_attention(model, **inputs)
mask = masks.prefix_lm_mask(inputs["token_type_ids"])[0]
assert all(w[0, :, ~mask].abs().max() == 0 for w in weights)
assert all(torch.allclose(w.sum(-1), torch.ones_like(w.sum(-1))) for w in weights)

# %% [markdown]
# Predict first: how much of its attention does the newline, token 52, give to the image? Point at its row, where it
# meets the image. Then go through layers and heads until you have found the one that looks at the image least.

# %%
viz.explore(processor, scene.image, "caption en", suffix=caption, model=model, layer=3)

# %% [markdown]
# And over the image: what each position attends to when it predicts the next token, in the layer that attends to the
# image most. The frame marks the patch with the largest weight.

# %%
P = processor.num_image_tokens
start = int(inputs["token_type_ids"][0].argmax()) - 1  # the newline, which predicts the first token of the answer
on_image = torch.stack([w[0, :, start:-1, :P].mean(0) for w in weights])  # <eos>, the last token, predicts nothing
layer = int(on_image.sum(-1).mean(1).argmax())
predicted = [processor.decode([i]) or "<eos>" for i in inputs["input_ids"][0, start + 1 :].tolist()]
viz.attention_on_image(scene.image, on_image[layer], titles=[f"→ {token}" for token in predicted])

# %% [markdown]
# ## It matches
#
# We load the same checkpoint into transformers and compare attention weights and logits:

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
print(f"attention weights: largest difference {largest:.1e}   logits: largest relative difference {difference:.1e}")
assert largest < 1e-5 and difference < 1e-5
assert torch.equal(out.attentions[0][0, 0] > 0, mask)

# %% [markdown]
# ### A misleading figure
#
# transformers has an `AttentionMaskVisualizer`. For PaliGemma it shows a **causal** prompt that the image cannot attend
# to, but that is not what the model does. We follow its code, version 5.23, in three steps. (The visualizer itself
# needs the network, to fetch a photo of a bee.)
#
# **1. The model.** transformers builds a causal mask and lifts it inside of blocks. The model passes one block number
# per token: 0 on image and prefix, and −1, which means no block, on the suffix.

# %%
from transformers.masking_utils import create_causal_mask

arguments = {
    "config": theirs.config.text_config,
    "inputs_embeds": torch.zeros(1, len(mask), model.config.text_config.hidden_size),
    "attention_mask": inputs["attention_mask"],
    "past_key_values": None,
}
block_ids = torch.where(inputs["token_type_ids"] == 0, 0, -1)
used = create_causal_mask(**arguments, position_ids=None, block_sequence_ids=block_ids)[0, 0] == 0
assert torch.equal(used, mask)  # our mask

# %% [markdown]
# **2. The visualizer** calls the same function, but without the block numbers. What is left is causal:

# %%
shown = create_causal_mask(**arguments)[0, 0] == 0
assert torch.equal(shown, masks.causal_mask(len(mask)))

# %% [markdown]
# **3. The paint.** Then it colors the cells between image tokens as allowed, except those of the first image token:

# %%
shown[1:P, 1:P] = True
assert not shown[:P, P:].any() and used[:P, P].all()  # from image to prompt: nothing is shown, but all is allowed
viz.compare_masks({"what the model does": used, "what the visualizer shows": shown}, viz.read_tokens(inputs, processor))

# %% [markdown]
# `viz.explore` asks the model itself: it runs the forward pass up to the first layer and draws the mask that arrives
# there. This works with other models of transformers too. `docs/upstream-mask-visualizer.md` reports the bug.

# %%
viz.explore(processor, scene.image, "caption en", suffix=caption, model=theirs)

# %% [markdown]
# ## Recap
#
# * One number per token, a running sum and `<=` are enough for causal, bidirectional and prefix-LM masks.
# * Image and prompt attend to each other fully. The answer is causal and attends to all of them.
# * The loss is computed on the answer only. Each token is predicted by the one before it.
# * Padding has type 0. Its *columns* must be blocked, and every row must keep at least one key.
# * PaliGemma 2 adds a window in the even layers, but never inside the prefix.
#
# **Three questions**
#
# <details><summary>1. Two answers about one image must not attend to each other. Which mask_ar does that?</summary>
#
# None: blocks are ordered, and a later block attends to all earlier ones. You need two rows of a batch, or a
# mask that does not follow this rule.
#
# </details>
#
# <details><summary>2. In PaliGemma, why does the image attend to the question, and what does it cost?</summary>
#
# The patches can then collect what the question is about. The price: the keys and values of the image cannot be reused
# for another question about it.
#
# </details>
#
# <details><summary>3. A decode step has only one query. What does its mask look like?</summary>
#
# One row: True for every token so far, except padding. Without padding it is all True, and you can leave the mask out
# (except in the layers with a window, once the sequence is longer than the window).
#
# </details>
#
# ## Open problem: two answers in one row
#
# The first question above says that `mask_ar` cannot keep two answers about one image apart. A mask that you build
# yourself can. Put image, prompt and several answers into **one** row, one after another, so that the image and the
# prompt are computed only once. Write `shared_prefix(prefix_length, answer_lengths)`, which returns a boolean mask
# `[T, T]` and the positions `[T]` (integers from 1), such that each answer has the same logits as in a row of its own.
# There is no stub: write the function in a new cell above the tests. The second test runs the trained model with your
# mask and your positions.
#
# <details><summary>A pointer</summary>
#
# Number the tokens by part: 0 for the prefix, then 1, 2, … for the answers. When can a query attend to a key, in terms
# of parts and order? And at which position would the second answer begin if the first were not there?
#
# </details>

# %%
from minivlm import gemma

if shared_prefix := globals().get("shared_prefix"):
    small, positions = shared_prefix(2, [1, 2])
    assert positions.tolist() == [1, 2, 3, 3, 4], "every answer begins after the prefix"
    expected = [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]
    assert small.tolist() == torch.tensor(expected).bool().tolist(), "the small mask is not right yet"

    answers = [caption, "two cats and a dog"]
    rows = [processor(text=["caption en"], images=[scene.image], suffix=[answer]) for answer in answers]
    start = int(rows[0]["token_type_ids"].argmax())
    suffixes = [row["input_ids"][:, start:] for row in rows]
    together = {"input_ids": torch.cat([rows[0]["input_ids"][:, :start], *suffixes], 1)}
    together |= {"attention_mask": torch.ones_like(together["input_ids"]), "pixel_values": rows[0]["pixel_values"]}
    together["token_type_ids"] = (torch.arange(together["input_ids"].shape[1]) >= start).long()[None]
    own_mask, positions = shared_prefix(start, [s.shape[1] for s in suffixes])
    own_mask, positions = own_mask[None], positions[None]
    with (
        torch.no_grad(),
        patch.object(masks, "prefix_lm_mask", lambda types: own_mask),
        patch.object(gemma, "token_positions", lambda attention_mask, queries: positions),
    ):
        logits = model(**together)[0, start:].split([s.shape[1] for s in suffixes])
    for row, part in zip(rows, logits, strict=True):
        row.pop("labels")
        with torch.no_grad():
            alone = model(**row)[0, start:]
        assert (part - alone).abs().max() < 1e-4 * alone.abs().max(), "an answer differs from the same answer alone"
    print("shared_prefix passed: two answers in one row, the same logits as in two rows")
else:
    print("shared_prefix is not written yet.")

# %% [markdown]
# **Next:** [06 · The Gemma decoder](06_gemma_decoder.ipynb), which turns what attention gathers into the next token.
