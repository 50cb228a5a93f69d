# %% [markdown]
# # 00 · Start here
#
# **What is a VLM, and what will I build?**
#
# | | |
# |---|---|
# | time | 35 minutes, 18 of them exercises |
# | know first | Python: functions, lists, loops. PyTorch is explained as it comes |
# | you will build | three small pieces to warm up with, on shapes, axes and softmax |
# | runs on | CPU, nothing to download |
#
# Welcome. In nine chapters you build PaliGemma, a model that reads a picture and a question and writes an answer, from its
# first patch to its last word. A small one, trained on scenes made of emoji, comes along: every idea is tried on a real
# model, on a laptop. Run each cell with Shift+Enter, from top to bottom.

# %%
import torch

import minivlm
from minivlm import doctor, emoji, hub
from minivlm.course import exercises, viz

viz.you_are_here("00")

# %% [markdown]
# This is the map. Each chapter shows it again, with what it builds lit up.
#
# ## Three lines
#
# A picture, a model, a caption:

# %%
model = minivlm.PaliGemma.from_pretrained()
processor = minivlm.Processor.from_pretrained()
minivlm.generate(model, processor, emoji.make_scene(0, "validation").image, "caption en")

# %% [markdown]
# The picture that it described, and a few more, none of which it saw in training:

# %%
some = [emoji.make_scene(seed, "validation") for seed in range(4)]
captions = minivlm.generate(model, processor, [scene.image for scene in some], "caption en")
viz.image_row([scene.image for scene in some], titles=captions)

# %% [markdown]
# Nothing here is chosen: these are the first four, right or wrong.
#
# ## Predict first
#
# Decide before you go on:
#
# 1. What does this model say about an empty gray square?
# 2. And about a photo of a cat? It has seen nothing but emoji.
# 3. How many vectors does the picture become before the language model reads it: 1, 49 or 12,544 (112 × 112)?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. It names things that are not there. A model that always answers answers this, too.
# 2. It gives the names of emoji. It has no other words for things.
# 3. 49, one for each of 7 × 7 patches.
#
# </details>
#
# ## What is a VLM?
#
# A *language model* reads a text and gives every word of its vocabulary a score: how likely is it to come next? One is
# chosen and added to the text; then the next, until a special word, `<eos>`, ends it. A *vision-language model* (VLM) does
# the same with a picture in front of the text. Everything it does is such writing: captions, answers, and even boxes,
# which are words for places.

# %%
for prompt in ("caption en", "answer en how many objects are there?", "detect panda"):
    print(f"{prompt:40} →", "".join(minivlm.generation.stream_generate(model, processor, some[0].image, prompt)))

# %% [markdown]
# One piece at a time, as it is written:

# %%
print(*minivlm.generation.stream_generate(model, processor, some[0].image, "caption en"), sep=" | ")

# %% [markdown]
# ## Four families
#
# How does a picture get into a language model? One well-known sorting (Lilian Weng, "Generalized Visual Language
# Models", 2022) has four families:

# %%
viz.families()

# %% [markdown]
# | family | who | what is trained |
# |---|---|---|
# | image tokens, trained jointly | VisualBERT (2019, [1908.03557](https://arxiv.org/abs/1908.03557)), SimVLM (2021, [2108.10904](https://arxiv.org/abs/2108.10904)), CM3 (2022, [2201.07520](https://arxiv.org/abs/2201.07520)) | the transformer that reads both |
# | a prefix for a frozen language model | ClipCap (2021, [2111.09734](https://arxiv.org/abs/2111.09734)) | a mapping network (in another variant GPT-2 is trained as well) |
# | cross-attention inside the layers | VisualGPT (2021, [2102.10407](https://arxiv.org/abs/2102.10407)), Flamingo (2022, [2204.14198](https://arxiv.org/abs/2204.14198)) | the cross-attention; in VisualGPT the language model too |
# | no training | MAGiC (2022, [2205.02655](https://arxiv.org/abs/2205.02655)) | nothing on pairs: CLIP steers GPT-2 while it writes |
#
# **PaliGemma** (2024, [2407.07726](https://arxiv.org/abs/2407.07726)) stands in the first. It looks like the second,
# since the picture comes as a prefix, and its two halves, the vision tower SigLIP and the language model Gemma, were trained
# before they met. But then all of it is trained together, with nothing frozen (section 3.2 of the paper).
#
# ## How exercises work
#
# An exercise is a function to fill in. The cell below it checks it on random cases, and where the answer is a mistake
# that is often made, it says which. Here is a wrong answer to the first exercise:

# %%
exercises.check(lambda image_size, patch_size: image_size // patch_size, name="num_image_tokens")

# %% [markdown]
# * An exercise that you leave out stops nothing: the chapter goes on with the package's own piece.
# * What passes is kept in your own folder, `.minivlm/solutions` in your home, and survives a restart. In chapter 08 the real
#   model runs with **your** pieces in place of the package's.
# * `exercises.progress()` shows what is done; `exercises.reset("num_image_tokens")` forgets one, `exercises.reset()` all.
# * Each has a hint to unfold. Stars say how hard it is.
#
# ## Exercise 0.1 · How many image tokens? ★☆☆ (4 minutes)
#
# PaliGemma cuts a square picture into square patches, each of which becomes one token. Given the pixels along a side
# of the picture and of a patch, how many whole patches are there? By hand: 112 pixels hold 7 patches of 16 pixels in a
# row, and there are 7 such rows. A rest at the edge, too small for a patch, is dropped.
#
# <details><summary>Hint</summary>
#
# `7 // 2` is 3: a division that rounds down. `x ** 2` is the square of x.
#
# </details>


# %%
def num_image_tokens(image_size, patch_size):
    """Two integers, in pixels → an integer."""
    ### BEGIN SOLUTION
    return (image_size // patch_size) ** 2
    ### END SOLUTION


# %%
exercises.check(num_image_tokens)
### BEGIN HIDDEN TESTS
exercises.score(num_image_tokens, points=2, seed=1)
### END HIDDEN TESTS

# %%
num_image_tokens = exercises.piece("num_image_tokens")  # yours, if it passed; the package's, if not
for size, patch in ((112, 16), (224, 14), (448, 14), (896, 14)):
    print(f"{size} pixels, patches of {patch}: {num_image_tokens(size, patch):5} image tokens")
assert num_image_tokens(112, 16) == processor.num_image_tokens
viz.patch_grid(some[0].image, 16)

# %% [markdown]
# The first is our small model, the others are PaliGemma's three sizes.
#
# ## Tensors, axes, shapes
#
# Numbers come in *tensors*, tables with any number of axes; the lengths of these are the *shape*. Four color pictures of
# 112 × 112 pixels are `[4, 112, 112, 3]`: which picture, which row, which column, which of red, green and blue. Much
# of what goes wrong in such a model is an operation along the wrong axis. So, a small one to follow by hand:

# %%
images = torch.tensor([[[[1.0, 0, 0], [1, 1, 0]]]])  # one picture, one row, two pixels: red, yellow
print("shape", list(images.shape))
total = torch.zeros(3)
for row in range(images.shape[1]):
    for column in range(images.shape[2]):
        total += images[0, row, column]
slow = total / (images.shape[1] * images.shape[2])
print("mean red, green, blue:", slow.tolist())
assert torch.equal(slow, torch.tensor([1.0, 0.5, 0.0]))

# %% [markdown]
# ## Exercise 0.2 · The mean color ★☆☆ (6 minutes)
#
# For many pictures at once, without a loop: `images` are `[N, H, W, 3]`, numbers from 0 to 1. Return the mean color of
# each, `[N, 3]`.
#
# <details><summary>Hint</summary>
#
# `x.mean(axis)` takes the mean along an axis, which disappears; `x.mean((a, b))` along two. Axes are counted from 0.
#
# </details>


# %%
def mean_color(images):
    """[N, H, W, 3] → [N, 3]."""
    ### BEGIN SOLUTION
    return images.mean((1, 2))
    ### END SOLUTION


# %%
exercises.check(mean_color)
### BEGIN HIDDEN TESTS
exercises.score(mean_color, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# How much of a picture is left in its mean color? In the mean colors of its 49 patches? This is why the model gets one
# vector a patch and not one for all. (Its vectors hold far more than a color: chapter 03.)

# %%
mean_color = exercises.piece("mean_color")
image = torch.from_numpy(some[0].image) / 255  # [112, 112, 3]
patches = image.view(7, 16, 7, 16, 3).transpose(1, 2).reshape(49, 16, 16, 3)
one = mean_color(image[None]).expand(4, 4, 3)  # [1, 3] repeated: a picture of one color
many = mean_color(patches).view(7, 7, 3)
assert torch.allclose(many.mean((0, 1)), one[0, 0], rtol=1e-5)
viz.image_row([image.numpy(), one.numpy(), many.numpy()], titles=["the picture", "one color", "49 colors"])

# %% [markdown]
# ## From scores to a word
#
# At its other end the model has a score for each word. Scores may be any numbers; *softmax* turns them into probabilities,
# which are positive and sum to 1: take the exponential of each, e to that power (e = 2.718…), and divide by the sum of
# all. By hand, for the scores 2, 1 and −1:

# %%
scores = torch.tensor([2.0, 1.0, -1.0])
slow = torch.tensor([2.71828182845905**s for s in scores.tolist()])
slow = slow / slow.sum()
print([round(p, 3) for p in slow.tolist()])
assert torch.allclose(slow, scores.softmax(-1), rtol=1e-5)

# %% [markdown]
# ## Exercise 0.3 · The best words ★★☆ (8 minutes)
#
# `scores` are `[N, V]`: N rows, each with a score for every one of the V `words`, which are a list of strings. Return a list
# with a pair for each row: the likeliest word and its probability, such as `[("cat", 0.7), ("owl", 0.4)]`.
#
# <details><summary>Hint</summary>
#
# `scores.softmax(-1)` works along the last axis, row by row. `p.max(-1)` gives `.values` and `.indices`; `.tolist()` turns
# either into plain numbers, and `words[i]` finds the word.
#
# </details>


# %%
def best_words(scores, words):
    """[N, V] and V strings → N pairs (word, probability)."""
    ### BEGIN SOLUTION
    best = scores.softmax(-1).max(-1)
    return [(words[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    ### END SOLUTION


# %%
exercises.check(best_words)
### BEGIN HIDDEN TESTS
exercises.score(best_words, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# On the real model: its scores for the first word after a question, one row a picture.

# %%
best_words = exercises.piece("best_words")
question = "answer en how many objects are there?"
batch = processor(text=[question] * len(some), images=[scene.image for scene in some])
with torch.no_grad():  # nothing is to be learned, so torch need not remember how it got there
    scores = model(**batch, last_only=True)[:, -1]
vocabulary = [processor.tokenizer.id_to_token(i) or "unused" for i in range(scores.shape[1])]
for (word, probability), scene in zip(best_words(scores, vocabulary), some, strict=True):
    print(f"{word} with {probability:.2f}   (truth: {len(scene.objects)})")

# %% [markdown]
# ### It matches
#
# The whole model is nothing but this, again and again. The word that you chose is the first word of its answer:

# %%
answers = minivlm.generate(model, processor, [scene.image for scene in some], question)
chosen = [word for word, _ in best_words(scores, vocabulary)]
print(answers, chosen)
assert all(answer.startswith(word) for answer, word in zip(answers, chosen, strict=True))
assert model.config.vision_config.num_image_tokens == num_image_tokens(112, 16)

# %% [markdown]
# From chapter 01 on, each chapter also compares its results, number by number, with transformers, the library in which
# PaliGemma is mostly used.
#
# ## Break it: nothing to see
#
# An empty gray square, and a photo. What does the model say?

# %%
gray = torch.full((112, 112, 3), 128, dtype=torch.uint8).numpy()
photo = minivlm.processor.open_image(hub.DATA / "images" / "cat.jpg")
asked = {"gray": gray, "photo": photo}
titles = [f"{name}: {minivlm.generate(model, processor, picture, 'caption en')}" for name, picture in asked.items()]
viz.image_row([gray, photo], titles=titles)

# %% [markdown]
# No error, no "I do not know": a VLM writes what is likeliest, and something always is. Whether it is true has to be
# measured (`python -m minivlm evaluate` does, with an empty picture beside the real ones), and a picture must be of the
# kind that it was trained on. With Google's weights, which chapter 08 shows how to get, the same code reads photos.
#
# ## The map of the course
#
# | chapter | question | module of the package | you build |
# |---|---|---|---|
# | [01 · CLIP loss](01_clip_loss.ipynb) | How do pictures and words come to share a space? | `losses.py` | the contrastive loss, and a small CLIP, trained in a minute |
# | [02 · Safe softmax and the sigmoid loss](02_sigmoid_loss.ipynb) | Why did SigLIP leave softmax? | `losses.py` | a softmax that cannot overflow, SigLIP's loss |
# | [03 · Patch embedding](03_patch_embedding.ipynb) | How does a picture become a sequence? | `siglip.py` | the vision tower |
# | [04 · The processor](04_processor.ipynb) | What does the model really receive? | `processor.py` | pixels and prompts as tensors |
# | [05 · The prefix-LM mask](05_prefix_lm_mask.ipynb) | Who may look at whom? | `masks.py` | the attention mask |
# | [06 · The Gemma decoder](06_gemma_decoder.ipynb) | What turns embeddings into the next word? | `gemma.py` | the language model |
# | [07 · The KV cache](07_kv_cache.ipynb) | Why is the second token cheap? | `cache.py` | the memory of the decoder |
# | [08 · Full PaliGemma inference](08_inference.ipynb) | How does it all answer a question? | `paligemma.py`, `generation.py`, `locations.py` | the whole; it runs with your pieces |
#
# In this order each chapter needs only those before it. In a hurry? 03, 05, 06 and 08 are the spine.
#
# ## Is everything here?

# %%
report = doctor.report()
assert "embedded checkpoint: loads" in report, report
for line in report.splitlines():
    if line.startswith(("- torch", "- embedded")):
        print(line)

# %% [markdown]
# `print(report)`, or `python -m minivlm doctor` in a terminal, shows the rest: your memory, your GPU if there is one, and
# which of Google's checkpoints would fit. It names no people and no folders, so it can go into a question to a teacher or
# a bug report as it is.
#
# ## Recap
#
# * A VLM writes the likeliest next word, with a picture in front of the text.
# * PaliGemma's picture is a prefix of patch tokens; tower, projector and language model are trained together.
# * A shape says what each axis means. Most bugs live along the wrong one.
# * Exercises are checked, kept, and in the end plugged into the model.
#
# **Three questions**
#
# <details><summary>1. How many image tokens does PaliGemma have at 448 pixels, with patches of 14?</summary>
#
# 448 / 14 = 32, and 32² = 1,024.
#
# </details>
#
# <details><summary>2. ClipCap and PaliGemma both put the picture in front of the words. Why are they in different families?</summary>
#
# In ClipCap the language model may stay frozen and only a mapping learns; PaliGemma trains all its parts together.
#
# </details>
#
# <details><summary>3. Can one say from an answer alone whether the model has seen the thing?</summary>
#
# No: it answers about an empty picture as fluently. One has to compare, with the truth or with an empty picture.
#
# </details>
#
# What is done so far:

# %%
exercises.progress()

# %% [markdown]
# **Next:** [01 · CLIP loss](01_clip_loss.ipynb), in which pictures and words come to share a space.
