# %% [markdown]
# # 00 · Start here
#
# **What is a VLM, and what will I build?**
#
# | | |
# |---|---|
# | know first | Python: functions, lists, loops. PyTorch is explained as we go |
# | you will build | three small functions to warm up, on shapes, axes and softmax |
# | runs on | CPU, nothing to download |
#
# Welcome. In nine chapters you build PaliGemma, a model that takes an image and a question and writes an answer. You
# build all of it, from the first patch to the last token. A small PaliGemma, trained on scenes made of emoji, comes
# with the course, so you can try every idea on a real model, on a laptop. Run the cells from top to bottom with
# Shift+Enter.

# %%
import torch

import minivlm
from minivlm import doctor, emoji, hub
from minivlm.course import exercises, viz

viz.you_are_here("00")

# %% [markdown]
# This is a map of PaliGemma. Every chapter shows it again and highlights what you build there.
#
# ## Three lines
#
# A model, a processor, and a caption for an image:

# %%
model = minivlm.PaliGemma.from_pretrained()
processor = minivlm.Processor.from_pretrained()
minivlm.generate(model, processor, emoji.make_scene(0, "validation").image, "caption en")

# %% [markdown]
# Here is that image, along with three more. The model saw none of them in training.

# %%
scenes = [emoji.make_scene(seed, "validation") for seed in range(4)]
images = [scene.image for scene in scenes]
captions = minivlm.generate(model, processor, images, "caption en")
viz.image_row(images, titles=captions)

# %% [markdown]
# These are not cherry-picked. They are the first four validation scenes. Since we know which objects were drawn, we can
# check the captions. The order of the objects does not matter:

# %%
truths = [emoji.count_caption(obj.name for obj in scene.objects) for scene in scenes]
correct = [emoji.same_caption(caption, truth) for caption, truth in zip(captions, truths, strict=True)]
print(f"{sum(correct)} of {len(correct)} captions are correct")
assert sum(correct) >= 3

# %% [markdown]
# ## Predict first
#
# Write down your guesses before you go on:
#
# 1. What does this model say about a blank gray square?
# 2. What does it say about a photo of a cat? It has never seen anything but emoji.
# 3. The language model receives the image as a sequence of vectors. How many: 1, 49 or 12,544 (112 × 112)?
#
# <details><summary>Answers (open them at the end of the chapter)</summary>
#
# 1. Asked for a caption, it writes "a a a a a a". There is nothing to describe, but it always answers something.
# 2. "Four three snakes". It names emoji, because those are the only objects it has names for.
# 3. 49: one for each of the 7 × 7 patches.
#
# </details>
#
# ## What is a VLM?
#
# A language model has a vocabulary of *tokens*, which are words or parts of words. It reads a text and assigns a score
# to every token: how likely is it to come next? One token is picked and appended to the text, then the model picks the
# next, until the special token `<eos>` ends the answer. A *vision-language model* (VLM) does the same with an image in
# front of the text. Everything it does is written this way: captions, answers, and even boxes, because some tokens
# stand for coordinates.

# %%
for prompt in ("caption en", "answer en how many objects are there?", "detect panda"):
    answer = minivlm.generation.stream_generate(model, processor, images[0], prompt)
    print(f"{prompt:40} →", "".join(answer))

# %% [markdown]
# `stream_generate` yields the answer piece by piece, while the model writes it:

# %%
print(*minivlm.generation.stream_generate(model, processor, images[0], "caption en"), sep=" | ")

# %% [markdown]
# ### Ask it yourself
#
# This figure has controls above it. They work while the notebook's kernel is running; where none is, you see the figure
# as it starts. Click a slider or reach it with Tab, then use the mouse or the arrow keys. Prompts to try: `caption en`,
# `answer en how many objects are there?`, `detect cat ; dog`, `segment octopus`.
#
# Predict first: does the model make more errors on new scenes or on those of an unseen artist? Then move *seed* until
# the caption is wrong, choose the other *split*, and count. Below, under "Break it", is a photo: you can also upload
# one of your own.

# %%
viz.playground(model, processor)

# %% [markdown]
# ## Four families
#
# How do you get an image into a language model? Lilian Weng's well-known survey ("Generalized Visual Language Models",
# 2022) sorts the answers into four families:

# %%
viz.families()

# %% [markdown]
# | family | models | what is trained |
# |---|---|---|
# | image tokens, trained jointly | VisualBERT (2019, [1908.03557](https://arxiv.org/abs/1908.03557)), SimVLM (2021, [2108.10904](https://arxiv.org/abs/2108.10904)), CM3 (2022, [2201.07520](https://arxiv.org/abs/2201.07520)) | the transformer that reads both |
# | a prefix for a frozen language model | ClipCap (2021, [2111.09734](https://arxiv.org/abs/2111.09734)) | a mapping network (in one variant GPT-2 as well) |
# | cross-attention inside the layers | VisualGPT (2021, [2102.10407](https://arxiv.org/abs/2102.10407)), Flamingo (2022, [2204.14198](https://arxiv.org/abs/2204.14198)) | the cross-attention; in VisualGPT the language model too |
# | no training | MAGiC (2022, [2205.02655](https://arxiv.org/abs/2205.02655)) | nothing on image–text pairs: CLIP steers GPT-2 while it writes |
#
# **PaliGemma** (2024, [2407.07726](https://arxiv.org/abs/2407.07726)) belongs to the first family. It resembles the
# second, because the image is a prefix, and because its two halves, the vision tower SigLIP and the language model
# Gemma, were trained separately at first. But then the whole model is trained together, with nothing frozen (section
# 3.2 of the paper).
#
# ## How exercises work
#
# In an exercise you fill in a function. The cell below it checks your function on random cases. If you make a common
# mistake, the check tells you which one. Here is a wrong answer to the first exercise:

# %%
exercises.check(lambda image_size, patch_size: image_size // patch_size, name="num_image_tokens")

# %% [markdown]
# * You can skip any exercise. The chapter then continues with the package's own function.
# * A solution that passes is saved in `.minivlm/solutions` in your home folder and survives a restart. In chapter 08
#   the real model runs with **your** functions instead of the package's.
# * `exercises.progress()` shows what you have done. `exercises.reset("num_image_tokens")` deletes one saved solution,
#   and `exercises.reset()` deletes all of them.
# * Each exercise has two hints that you can unfold: first the idea, then how to write it. Stars show how hard it is.
#
# ## Exercise 0.1 · How many image tokens?
#
# PaliGemma cuts a square image into square patches, and each patch becomes one token. Given the side of the image and
# the side of a patch in pixels, how many whole patches are there? By hand: 7 patches of 16 pixels fit into 112 pixels,
# so a row has 7 patches, and there are 7 rows. Leftover pixels at the edge, too few for another patch, are dropped.


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
num_image_tokens = exercises.piece("num_image_tokens")  # yours if it passed, otherwise the package's
for image_size, patch_size in ((112, 16), (224, 14), (448, 14), (896, 14)):
    count = num_image_tokens(image_size, patch_size)
    print(f"{image_size} pixels, patches of {patch_size}: {count:5} image tokens")
assert num_image_tokens(112, 16) == processor.num_image_tokens
viz.patch_grid(images[0], 16)

# %% [markdown]
# The first size is that of our small model. The others are the three sizes of PaliGemma.
#
# ## Tensors, axes, shapes
#
# A *tensor* is a table of numbers with any number of axes. The lengths of its axes are its *shape*. A batch of four
# color images of 112 × 112 pixels has the shape `[4, 112, 112, 3]`: which image, which row, which column, and which of
# red, green and blue. Many bugs in a model like this come from an operation along the wrong axis. So let us follow a
# small example by hand:

# %%
tiny = torch.tensor([[[[1.0, 0, 0], [1, 1, 0]]]])  # one image, one row, two pixels: red and yellow
print("shape", list(tiny.shape))
total = torch.zeros(3)
for row in range(tiny.shape[1]):
    for column in range(tiny.shape[2]):
        total += tiny[0, row, column]
by_loop = total / (tiny.shape[1] * tiny.shape[2])
print("mean red, green, blue:", by_loop.tolist())
assert torch.equal(by_loop, torch.tensor([1.0, 0.5, 0.0]))

# %% [markdown]
# ## Exercise 0.2 · The mean color
#
# Now do this for many images at once, without a loop. `images` is `[N, H, W, 3]`, with values from 0 to 1. Return the
# mean color of each image, `[N, 3]`.


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
# How much of an image survives in its mean color? And how much in the mean colors of its 49 patches? The difference is
# why the model gets one vector per patch rather than one for the whole image. (Its vectors hold far more than a color,
# as you will see in chapter 03.)

# %%
mean_color = exercises.piece("mean_color")
image = torch.from_numpy(images[0]) / 255  # [112, 112, 3]
patches = image.view(7, 16, 7, 16, 3).transpose(1, 2).reshape(49, 16, 16, 3)
one_color = mean_color(image[None]).expand(4, 4, 3)  # [1, 3], repeated: a square of a single color
patch_colors = mean_color(patches).view(7, 7, 3)
assert torch.allclose(patch_colors.mean((0, 1)), one_color[0, 0], rtol=1e-5)
mosaic = patch_colors.repeat_interleave(16, 0).repeat_interleave(16, 1)  # each color on its 16 × 16 pixels
errors = [float((image - view).abs().mean()) for view in (one_color[0, 0], mosaic)]
print(f"mean error per value: one color {errors[0]:.3f}, 49 colors {errors[1]:.3f}")
assert errors[1] < errors[0]
viz.image_row([image.numpy(), one_color.numpy(), patch_colors.numpy()], titles=["the image", "one color", "49 colors"])

# %% [markdown]
# ## From scores to a token
#
# At its other end, the model outputs a score for each token. Scores can be any numbers. *Softmax* turns them into
# probabilities, which are positive and sum to 1: raise e = 2.718… to the power of each score, then divide by the sum of
# the results. By hand, for the scores 2, 1 and −1:

# %%
scores = torch.tensor([2.0, 1.0, -1.0])
powers = torch.tensor([2.71828182845905**score for score in scores.tolist()])
by_hand = powers / powers.sum()
print([round(p, 3) for p in by_hand.tolist()])
assert torch.allclose(by_hand, scores.softmax(-1), rtol=1e-5)

# %% [markdown]
# ## Exercise 0.3 · The best words
#
# `scores` is `[N, V]`: N rows, each with one score for every entry of the vocabulary. `words` is that vocabulary, a
# list of V strings. Return a list with one pair per row: the most likely word and its probability. For N = 2 it could
# be `[("cat", 0.7), ("owl", 0.4)]`.


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
# Now try it on the real model. We ask a question about each of the four images and take the scores for the first token
# of the answer: one row per image.

# %%
best_words = exercises.piece("best_words")
question = "answer en how many objects are there?"
batch = processor(text=[question] * len(images), images=images)
with torch.no_grad():  # we are not training, so torch does not need to record what it computes
    scores = model(**batch, last_only=True)[:, -1]
vocabulary = [processor.tokenizer.id_to_token(i) or "unused" for i in range(scores.shape[1])]
best = best_words(scores, vocabulary)
for (word, probability), scene in zip(best, scenes, strict=True):
    print(f"{word} with {probability:.2f}   (truth: {len(scene.objects)})")

# %% [markdown]
# ### It matches
#
# To write an answer, the model repeats this step for every token. So the token that you picked is the first token of
# its answer:

# %%
answers = minivlm.generate(model, processor, images, question)
picked = [word for word, _ in best]
print(answers, picked)
assert all(answer.startswith(word) for answer, word in zip(answers, picked, strict=True))
assert model.config.vision_config.num_image_tokens == num_image_tokens(112, 16)

# %% [markdown]
# From chapter 01 on, each chapter also compares its results, number by number, with transformers, the library that most
# people run PaliGemma with.
#
# ## Break it: nothing to see
#
# What does the model say about a blank gray square, and about a photo?

# %%
gray = torch.full((112, 112, 3), 128, dtype=torch.uint8).numpy()
photo = minivlm.processor.open_image(hub.DATA / "images" / "cat.jpg")
captions = minivlm.generate(model, processor, [gray, photo], "caption en")
forms = [form for name in emoji.OBJECTS for form in (name, emoji.plural(name))]
assert emoji.parse_caption(captions[0]) is None and any(form in captions[1] for form in forms)
names = ["a gray square", "a photo"]
titles = [f'caption of {name}: "{caption}"' for name, caption in zip(names, captions, strict=True)]
viz.image_row([gray, photo], titles)

# %% [markdown]
# There is no error, and no "I don't know". A VLM writes what is most likely, and something always is. Nearly every caption
# of its training starts with "a", so the gray square gets an "a", and as there is no object whose name could follow,
# another. Whether an answer is true has to be measured. (`python -m minivlm evaluate` does that, and asks the same
# questions about a blank image for comparison.)
# And a model can only be trusted on the kind of image it was trained on. With Google's weights, the same code handles
# photos. Chapter 08 shows how to get them.
#
# ## Map of the course
#
# | chapter | question | module of the package | you build |
# |---|---|---|---|
# | [01 · CLIP loss](01_clip_loss.ipynb) | How do images and text come to share one embedding space? | `losses.py` | the contrastive loss, and a small CLIP that trains in a minute |
# | [02 · Safe softmax and the sigmoid loss](02_sigmoid_loss.ipynb) | Why did SigLIP replace softmax with a sigmoid? | `losses.py` | a softmax that cannot overflow, and SigLIP's loss |
# | [03 · Patch embedding](03_patch_embedding.ipynb) | How does an image become a sequence? | `siglip.py` | the vision tower |
# | [04 · The processor](04_processor.ipynb) | What does the model actually receive? | `processor.py` | tensors from pixels and prompts |
# | [05 · The prefix-LM mask](05_prefix_lm_mask.ipynb) | Which token attends to which? | `masks.py` | the attention mask |
# | [06 · The Gemma decoder](06_gemma_decoder.ipynb) | How does the decoder turn embeddings into the next token? | `gemma.py` | the language model |
# | [07 · The KV cache](07_kv_cache.ipynb) | Why is the second token cheap? | `cache.py` | the decoder's cache |
# | [08 · Full PaliGemma inference](08_inference.ipynb) | How does it all answer a question about an image? | `paligemma.py`, `generation.py`, `locations.py` | the whole model, running with your own functions |
#
# In this order, each chapter needs only the ones before it. In a hurry? The core is 03, 05, 06 and 08.
#
# ## Is everything installed?

# %%
report = doctor.report()
assert "embedded checkpoint: loads" in report, report
for line in report.splitlines():
    if line.startswith(("- torch", "- embedded")):
        print(line)

# %% [markdown]
# `print(report)`, or `python -m minivlm doctor` in a terminal, shows the rest: your memory, your GPU if you have one,
# and which of Google's checkpoints would fit. The report contains no names of people or folders, so you can paste it
# into a bug report or a question to your teacher as it is.
#
# ## Recap
#
# * A VLM writes the most likely next token, again and again, with an image in front of the text.
# * In PaliGemma, the image is a prefix of patch tokens. Vision tower, projector and language model are trained
#   together.
# * A shape says what each axis means. Many bugs are operations along the wrong axis.
# * Exercises are checked and saved, and in the last chapter they are plugged into the model.
#
# **Three questions**
#
# <details><summary>1. How many image tokens does PaliGemma have at 448 pixels, with patches of 14?</summary>
#
# 448 / 14 = 32, and 32² = 1,024.
#
# </details>
#
# <details><summary>2. ClipCap and PaliGemma both put the image first. Why are they in different families?</summary>
#
# In ClipCap the language model can stay frozen, and only a mapping network learns. PaliGemma trains all its parts
# together.
#
# </details>
#
# <details><summary>3. Can you tell from the answer alone whether the model has really seen an object?</summary>
#
# No. It answers questions about a blank image, too. Compare its answer with the ground truth, or with its answer about
# a blank image.
#
# </details>
#
# ## For the bold: which patch matters?
#
# An open problem, with tests but without a stub. Every chapter ends with one. It is harder than the exercises, and you
# can skip it.
#
# Write `patch_importance(image, prompt)`. The model answers the prompt. Take the probability of its most likely first
# token. Then hide one patch of 16 × 16 pixels after the other and measure how much that probability drops. Return the
# 49 drops as a tensor `[7, 7]`. Hide a patch by painting it in the color of the background, `image[0, 0]`. (A gray
# square on a purple background would be one more object to count.) Use a new cell above the tests:

# %%
if "patch_importance" in globals():
    empty = patch_importance(gray, question)
    assert empty.shape == (7, 7) and empty.abs().max() < 1e-4  # gray painted over gray hides nothing
    scene = emoji.make_scene(7, "validation")
    importance = patch_importance(scene.image, question)
    assert importance.max() > 0.5  # without this patch, the model counts differently
    y, x = divmod(int(importance.argmax()), 7)  # row and column of that patch
    boxes = [obj.box for obj in scene.objects]
    assert any(x0 <= 16 * x + 8 <= x1 and y0 <= 16 * y + 8 <= y1 for x0, y0, x1, y1 in boxes)  # it shows an object
    print("patch_importance passes.")
else:
    print("patch_importance is not written yet.")

# %% [markdown]
# <details><summary>Discussion</summary>
#
# This is an *occlusion map* (Zeiler and Fergus 2013, [1311.2901](https://arxiv.org/abs/1311.2901)). All 50 images, the
# original and one for each hidden patch, fit into one batch. Remember the original's most likely token: its probability
# is the one to track, even where another token wins.
#
# Look at the map of a few scenes with `viz.attention_on_image(image, importance.clamp(min=0).flatten())`. Most drops
# are close to 0, even on objects: the model recognizes a shoe from the other half of the shoe. And try another fill
# color. What you measure is the difference between two images, and both of them count.
#
# </details>
#
# Your progress so far:

# %%
exercises.progress()

# %% [markdown]
# **Next:** [01 · CLIP loss](01_clip_loss.ipynb), in which images and text come to share one embedding space.
