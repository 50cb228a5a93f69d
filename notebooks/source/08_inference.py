# %% [markdown]
# # 08 · Full PaliGemma inference
#
# **How does it all answer a question about a picture?**
#
# | | |
# |---|---|
# | time | 150 minutes, 88 of them exercises; the middle, before the masks, is a good place to pause |
# | know first | what tower, mask, decoder and cache are for (chapters 03, 05, 06, 07); their details are not needed |
# | you will build | the place where picture and text meet, the choice of a word, the loop that writes, the reading of boxes and masks; then you run PaliGemma with your own pieces |
# | runs on | CPU, nothing to download |

# %%
import torch

import minivlm
from minivlm import emoji, generation, hub, locations, paligemma
from minivlm.course import exercises, viz

viz.you_are_here("08")

# %% [markdown]
# ## Predict first
#
# 1. The small model that comes with the course cuts its picture into 7 × 7 patches. With the prompt `caption en`, how many
#    tokens does the decoder read before it writes its first word?
# 2. By mistake the picture's vectors reach the decoder 14 times as long as they should be. Each layer begins by bringing
#    every vector to one length (RMSNorm, chapter 06). Does the answer change?
# 3. The model gives its next word the probabilities 0.52, 0.31, 0.17. Which words does top-p with *p* = 0.5 leave to draw
#    from?
# 4. The model can also answer with a *mask*, which pixels are the thing's: sixteen words of 128 kinds, each for one place
#    of a 4 × 4 grid, row by row. Someone fills the grid column by column. What comes out: an error, noise, or a shape?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. 49 patches, `<bos>`, `caption`, `en` and the newline: 53.
# 2. It does, and badly. The norm hides the length from what a layer reads, but what the layers *add* to a vector that is
#    too long hardly moves it.
# 3. The first alone: it reaches 0.5 by itself.
# 4. A shape, and no error: nearly the right one, turned over along its diagonal. On a round thing it looks right.
#
# </details>

# %% [markdown]
# ## The projector
#
# The tower of chapter 03 turns a picture into *P* vectors, one a patch, of its own width. The decoder may have another
# width: in PaliGemma 3B they are 1152 and 2048; in the small model both happen to be the same. Between them stands one
# linear layer: a matrix, a bias, nothing else.

# %%
model = minivlm.PaliGemma.from_pretrained()
processor = minivlm.Processor.from_pretrained()
scene = emoji.make_scene(0, "validation")
batch = processor(text=["caption en"], images=[scene.image])
projector = model.multi_modal_projector.linear
with torch.no_grad():
    patches = model.vision_tower(batch["pixel_values"])  # [1, P, width of the tower]
    features = model.multi_modal_projector(patches)  # [1, P, width of the decoder]
print("patches", list(patches.shape), "→ features", list(features.shape))
print(
    f"parameters of the projector: here {projector.weight.numel() + projector.bias.numel():,}, in 3B {1152 * 2048 + 2048:,}"
)

# %% [markdown]
# One number of one patch, as a loop would compute it, then all of them at once:

# %%
with torch.no_grad():
    one = projector.bias[5] + sum(w * v for w, v in zip(projector.weight[5], patches[0, 3], strict=True))
    by_hand = patches @ projector.weight.T + projector.bias
largest = features.abs().max()
assert abs(one - features[0, 3, 5]) < 1e-5 * largest and (by_hand - features).abs().max() < 1e-5 * largest

# %% [markdown]
# From here on the picture is *P* vectors that look, to the decoder, like embeddings of words.
#
# ## Where picture and text meet: a toy
#
# The processor of chapter 04 has left *P* placeholders, `<image>`, in the prompt. Text gets its vectors from the embedding
# table, times √D, where D is the width (Gemma's own habit). The placeholders get the picture's vectors instead, as they
# come from the projector. With D = 4, √D is 2:

# %%
IMAGE = 9
ids = [IMAGE, IMAGE, 2, 5]  # two patches, <bos>, one word
toy_table = {2: torch.tensor([1.0, 0, 0, 0]), 5: torch.tensor([0.0, 3, 0, 1])}
toy_features = torch.tensor([[7.0, 7, 7, 7], [8.0, 8, 8, 8]])

slow, patches_used = torch.zeros(4, 4), 0
for t, token in enumerate(ids):
    if token == IMAGE:
        slow[t] = toy_features[patches_used]
        patches_used += 1
    else:
        slow[t] = toy_table[token] * 2
print(slow)

# %% [markdown]
# All at once: look up and scale the text (any row does for the placeholders, it is overwritten), mark the places, put the
# features in.

# %%
x = torch.stack([toy_table.get(token, torch.zeros(4)) for token in ids]) * 2
is_image = torch.tensor(ids) == IMAGE
fast = x.clone()
fast[is_image] = toy_features
assert fast.shape == (4, 4) and torch.equal(fast, slow)

# %% [markdown]
# ## Exercise 8.1 · Merge picture and text ★★☆ (12 minutes)
#
# For a whole batch: `x` `[B, T, D]` are the text's embeddings, scaled; `is_image` `[B, T]` is True at the placeholders;
# `features` `[B, P, D]` are the pictures' vectors. Every row has exactly P placeholders, but not always in front: there
# may be padding before them. Return a new tensor; `x` itself must stay as it was.
#
# <details><summary>Hint</summary>
#
# Either a copy and an assignment, `y[is_image] = …`, where the right side has the shape `[B · P, D]`; or
# `x.masked_scatter(mask, source)`, whose mask may be `[B, T, 1]`.
#
# </details>


# %%
def merge_image_features(x, is_image, features):
    """[B, T, D], [B, T] of booleans, [B, P, D] → [B, T, D]."""
    ### BEGIN SOLUTION
    y = x.clone()
    y[is_image] = features.reshape(-1, features.shape[-1])
    return y
    ### END SOLUTION


# %%
exercises.check(merge_image_features)
### BEGIN HIDDEN TESTS
exercises.score(merge_image_features, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# With the real prompt: 49 places for the picture, and the four tokens of the question.

# %%
merge_image_features = exercises.piece("merge_image_features")
viz.token_strip(batch, processor, title="What the decoder reads")

# %%
table = model.language_model.model.embed_tokens.weight.detach()
D, P = table.shape[1], features.shape[1]
is_image = batch["input_ids"] == model.config.image_token_index
words = batch["input_ids"].masked_fill(is_image, processor.pad_token_id)  # any id does: it is overwritten
merged = merge_image_features(table[words] * D**0.5, is_image, features)
with torch.no_grad():
    assert torch.allclose(merged, model.embed(batch["input_ids"], features), rtol=1e-5)
print(f"{P} patches + {(~is_image).sum()} tokens = {merged.shape[1]}, each of width {D}")

# %% [markdown]
# ## Two conventions, and what happens between them
#
# Two ways to scale are in use, and both are right:
#
# * **A** (Big Vision, transformers 5): text × √D; the picture's vectors unscaled. This is what you have built.
# * **B** (older transformers, and ports made from it): the picture's vectors ÷ √D; merge; then **everything** × √D.

# %%
A = merge_image_features(table[words] * D**0.5, is_image, features)
B = merge_image_features(table[words], is_image, features / D**0.5) * D**0.5
difference = float((A - B).abs().max() / A.abs().max())
print(f"largest difference, relative: {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ### Break it: half of each
#
# Who takes the merge from one code and the scaling from the other gets picture vectors that are √D too long or √D too
# short. Nothing crashes. On a dozen scenes that training never showed:

# %%
from unittest.mock import patch

some = [emoji.make_scene(seed, "validation") for seed in range(12)]
package_merge = paligemma.merge_image_features


def captions_with(factor: float) -> list[str]:
    def scaled(x, is_image, features):
        return package_merge(x, is_image, features * factor)

    with patch.object(paligemma, "merge_image_features", scaled):
        return minivlm.generate(model, processor, [s.image for s in some], "caption en")


# %%
right = {}
for name, factor in {"as trained": 1.0, "times √D": D**0.5, "divided by √D": D**-0.5}.items():
    captions = captions_with(factor)
    right[name] = sum(emoji.same_caption(c, s.captions["caption"][0]) for c, s in zip(captions, some, strict=True))
    print(f"{name:14} {right[name]:2} of {len(some)} right; the first three: {captions[:3]}")
assert right["times √D"] < right["as trained"] and right["divided by √D"] < right["as trained"]

# %% [markdown]
# Times √D some names are still right, but the answers are not. Divided by √D the picture is too faint to be read, and
# the model falls to repeating itself. Why did RMSNorm not save us? It hides the length from what a layer *reads*. But
# each layer *adds* its result to the vector itself: one that is too long hardly turns, one that is too short is
# drowned. The cosine between the picture's vectors before and after the first layer says how far they turn; 1 is not at
# all:


# %%
def cosine_across_layer(factor: float) -> float:
    seen = []
    layer = model.language_model.model.layers[0]
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad():
        model(batch["input_ids"], image_features=features * factor)
    hook.remove()
    before, after = (x[0, :P] for x in seen)
    return float(torch.cosine_similarity(before, after, dim=-1).mean())


cosine = {factor: cosine_across_layer(factor) for factor in (1.0, D**0.5, D**-0.5)}
print("as trained {:.3f}   times √D {:.3f}   divided by √D {:.3f}".format(*cosine.values()))
assert cosine[D**-0.5] < cosine[1.0] < cosine[D**0.5]

# %% [markdown]
# The repair: settle on one convention, and stay with it.
#
# ## What do the patches say?
#
# The picture's vectors stand where words stand. So we may ask of each: which row of the embedding table points most
# nearly in its direction? Directions are compared by the cosine, the dot product of vectors brought to length 1.
#
# ## Exercise 8.2 · The nearest word ★☆☆ (8 minutes)
#
# `features` are `[P, D]`, the embedding `table` is `[V, D]`. Return, for each patch, the row of the table with the largest
# cosine: integers `[P]`.
#
# <details><summary>Hint</summary>
#
# `torch.nn.functional.normalize(x, dim=-1)` brings every row to length 1. All cosines are then one matrix product, of shape
# `[P, V]`, and `argmax` finds the largest.
#
# </details>


# %%
def nearest_word(features, table):
    """[P, D], [V, D] → [P], the row of the table that is nearest to each patch."""
    ### BEGIN SOLUTION
    features = torch.nn.functional.normalize(features, dim=-1)
    table = torch.nn.functional.normalize(table, dim=-1)
    return (features @ table.T).argmax(-1)
    ### END SOLUTION


# %%
exercises.check(nearest_word)
### BEGIN HIDDEN TESTS
exercises.score(nearest_word, points=2, seed=1)
### END HIDDEN TESTS

# %%
nearest_word = exercises.piece("nearest_word")
nearest = nearest_word(features[0], table)
cosines = torch.cosine_similarity(features[0], table[nearest], dim=-1)
spelled = [processor.decode([i], skip_special_tokens=False).strip() or "␣" for i in nearest.tolist()]
viz.nearest_words(scene.image, spelled, cosines, title="The nearest of all tokens, and its cosine")

# %% [markdown]
# On the background the nearest token is one and the same, the bare space ␣: nothing to name. On an object it is often
# the thing's name, but not always: at edges, and where two things meet, stand other names, and now and then a place.
# All cosines are small; it is the direction that tells. How often is it the right name? We take the patches that an
# object covers at least half of, in a few scenes, and ask for the nearest of the hundred names:

# %%
names = table[[processor.encode([" " + name])[0][0] for name in emoji.OBJECTS]]
hits = []
for s in some:
    side = len(s.image) // 7
    with torch.no_grad():
        found = nearest_word(model.encode_image(processor.preprocess_images([s.image]))[0], names)
    for thing in s.objects:
        covered = thing.mask.reshape(7, side, 7, side).mean(axis=(1, 3)).ravel() >= 0.5
        hits += [emoji.OBJECTS[i] == thing.name for i in found[torch.from_numpy(covered)].tolist()]
print(f"{len(hits)} patches, of which the nearest name is the right one: {sum(hits) / len(hits):.0%}; by chance 1%")
assert sum(hits) / len(hits) > 0.3

# %% [markdown]
# Often, then, and not always. The training of this model began by pulling each patch towards the name of what it shows,
# with the sigmoid loss of chapter 02 (`minivlm/training.py`, stage 1), and the later stages, which ask for answers alone,
# left that in place. In PaliGemma's own training ("PaliGemma", arXiv:2407.07726, section 3.2) nothing ties a patch to a word
# of the decoder: its patches need only be useful, not near a name.
#
# ## Answers
#
# The rest of the way is known: the merged sequence goes through the decoder under the prefix-LM mask, the output head
# scores every word, one is chosen, and it joins the sequence. What is asked is told by the prompt alone. `caption en`,
# `answer en …`, `detect …` and `segment …` are fixed openings that PaliGemma was trained with; `en` is the language.


# %%
def ask(model, processor, image, prompts) -> list[str]:
    answers = minivlm.generate(model, processor, image, prompts, max_new_tokens=128)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}\n    {answer}")
    return answers


# %%
first, *_, last = [thing.name for thing in scene.objects]
prompts = ["caption en", f"answer en where is the {last}?"]
prompts += [f"answer en how many {emoji.plural(first)} are there?", "answer en how many objects are there?"]
prompts += [f"detect {' ; '.join(thing.name for thing in scene.objects)}"]
answers = ask(model, processor, scene.image, prompts)

# %% [markdown]
# Counting is an answer like any other: a word, `3` or `1`, that was likelier than all the rest. And detection is text, too.
#
# ## A box in four words
#
# The vocabulary has 1,024 words for places, `<loc0000>` to `<loc1023>`. A place is a fraction of a side of the picture:
# `round(v / side × 1023)`. Four of them are a box, in the order **y min, x min, y max, x max**: y first, unlike nearly
# everywhere else. Then comes what is in it. (There are 128 words more, `<seg000>` to `<seg127>`, not 108 as some
# articles have it; sixteen of them spell the mask of the thing. They come after the boxes.)
#
# By hand, the true box of the first object:

# %%
height, width = scene.image.shape[:2]
thing = scene.objects[0]
x0, y0, x1, y1 = thing.box  # pixels
written = ""
for value, side in ((y0, height), (x0, width), (y1, height), (x1, width)):
    written += f"<loc{round(value / side * 1023):04d}>"
    print(f"{value:3} of {side} pixels → bin {round(value / side * 1023)}")
written += f" {thing.name}"
tokens = processor.encode([written])[0]
print(written, "→", len(tokens), "tokens", tokens)
assert len(tokens) == 5

# %% [markdown]
# ## Exercise 8.3 · Read a box ★☆☆ (8 minutes)
#
# The way back: `places` are four bins, (y min, x min, y max, x max); the picture has `width` × `height` pixels. Return the
# box (x0, y0, x1, y1) in pixels.
#
# <details><summary>Hint</summary>
#
# Unpack the four, `y0, x0, y1, x1 = places`. A bin of 1023 is the far edge of the picture.
#
# </details>


# %%
def locations_to_box(places, width, height):
    """Four bins 0…1023, y before x, and two sides in pixels → (x0, y0, x1, y1)."""
    ### BEGIN SOLUTION
    y0, x0, y1, x1 = places
    return x0 / 1023 * width, y0 / 1023 * height, x1 / 1023 * width, y1 / 1023 * height
    ### END SOLUTION


# %%
exercises.check(locations_to_box)
### BEGIN HIDDEN TESTS
exercises.score(locations_to_box, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# There and back, a box moves by half a bin at most. Many demos divide by 1024 instead: training multiplies by 1023
# (big_vision, `configs/proj/paligemma`), so such boxes come out a little too small, and none ever reaches the far edge.

# %%
locations_to_box = exercises.piece("locations_to_box")
places = tuple(int(text[4:8]) for text in written.split(">")[:4])
there_and_back = locations_to_box(places, width, height)
moved = max(abs(a - b) for a, b in zip(thing.box, there_and_back, strict=True))
print(f"{thing.box} → {places} → moved by {moved:.3f} pixels, half a bin is {max(width, height) / 1023 / 2:.3f}")
assert moved <= max(width, height) / 1023 / 2
assert locations.parse_detections(written, width, height).detections[0].label == thing.name
print("the far edge of a 640-pixel picture:", 1023 / 1023 * 640, "or, divided by 1024,", 1023 / 1024 * 640)

# %% [markdown]
# `locations.parse_detections` cuts an answer at `;`, reads each item, and says what it could not read: a model may write anything.
# The model's own boxes:

# %%
from PIL import Image

found = locations.parse_detections(answers[-1], width, height)
print("could not be read:", found.problems or "nothing")
viz.draw_boxes(Image.fromarray(scene.image), found.detections)

# %% [markdown]
# ### Break it: x before y
#
# Who reads the four in the usual order, x first, gets every box turned over along the picture's diagonal. Nothing
# crashes, and a box that lies on the diagonal looks right. How wrong is it? The **IoU** (intersection over union) of two
# boxes is the area that they share over the area that they cover together: 1 for the same box, 0 for two that do not touch.


# %%
def box_iou(a, b):
    """Two boxes (x0, y0, x1, y1) → the area in both over the area in either."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return shared / (sum(areas) - shared)


assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == 1 / 3

# %% [markdown]
# The dozen scenes once more: all their objects are asked for, and each true box is compared with the best of the model's
# that has its name, or counted as 0 where there is none.


# %%
def asks_for(task, s):
    """A prompt that asks for everything in a scene: `detect cat ; dog`."""
    return f"{task} {' ; '.join(dict.fromkeys(thing.name for thing in s.objects))}"


def mean_box_iou(texts):
    scores = []
    for s, text in zip(some, texts, strict=True):
        boxes = locations.parse_detections(text, width, height).detections
        for o in s.objects:
            scores.append(max((box_iou(o.box, d.box) for d in boxes if d.label == o.name), default=0.0))
    return sum(scores) / len(scores)


# %%
def x_first(places, width, height):
    x0, y0, x1, y1 = places  # the bug
    return locations_to_box((y0, x0, y1, x1), width, height)


all_prompts = [asks_for("detect", s) for s in some]
detected = minivlm.generate(model, processor, [s.image for s in some], all_prompts, max_new_tokens=64)
with patch.object(locations, "locations_to_box", x_first):
    turned = mean_box_iou(detected)
    picture = viz.draw_boxes(Image.fromarray(scene.image), locations.parse_detections(answers[-1], width, height).detections)
repaired = mean_box_iou(detected)
print(f"mean IoU with the truth, x read first: {turned:.2f}; repaired, y first: {repaired:.2f}")
assert turned < repaired / 2
picture

# %% [markdown]
# *This is the middle of the chapter, and a good place to pause. Afterwards, run the cells above again: in JupyterLab with
# Run → Run All Above Selected Cell.*
#
# ## A mask in sixteen words
#
# A box says where a thing is; its **mask** says which pixels are the thing's: True on it, False elsewhere. But a
# vocabulary has words, not pixels. So PaliGemma has a second, small model at its side that spells shapes, a **VQ-VAE**
# (arXiv:1711.00937; for masks, arXiv:2301.02229):
#
# 1. The mask is cut to its box and squashed to 64×64 numbers, 0 outside, 1 inside.
# 2. An *encoder*, a stack of convolutions, halves it four times, 64 → 4. Each of the 4×4 places gets a vector of width 512.
# 3. Each vector is replaced by the nearest of 128 that were learned, the *codebook*. The number of that one, 0 to 127, is the
#    **code** of the place, and `<seg000>` to `<seg127>` are the words for it.
# 4. A *decoder* goes the way back. It looks the sixteen vectors up, doubles their grid four times, 4 → 64, and gives
#    64×64 values, about −1 outside and 1 inside.
#
# The VQ-VAE is trained by itself, on masks alone. The language model needs it in training only, to know which words to
# write; whoever reads the answer needs its decoder. Sixteen words of 128 kinds are 16 × 7 = 112 bits, for 4,096 pixels.
#
# By hand, the object from before:

# %%
import numpy as np

from minivlm.vqvae import MaskVQVAE

vae = MaskVQVAE.from_pretrained()
codebook = vae._vq_vae._embedding  # [128, 512]; it is called so in Google's file, too
cut = torch.tensor(locations.crop_mask(thing.mask, thing.box))  # [64, 64]
with torch.no_grad():
    grid = vae.encoder(2 * cut[None, None] - 1)  # it reads values from −1 to 1
print(f"mask {list(thing.mask.shape)} → in its box {list(cut.shape)} → grid {list(grid.shape)}")
assert grid.shape == (1, 512, 4, 4) and codebook.shape == (128, 512)

# %% [markdown]
# The nearest vector is the one at the smallest squared distance. For one place, row 1 and column 2, as a slow loop; then all
# sixteen as the package finds them:

# %%
vector = grid[0, :, 1, 2].tolist()
distances = []
for entry in codebook.tolist():
    distances.append(sum((v - e) ** 2 for v, e in zip(vector, entry, strict=True)))
nearest_code = distances.index(min(distances))
codes = vae.encode(cut[None])[0].tolist()
print(f"row 1, column 2: code {nearest_code}; all sixteen, row by row: {codes}")
assert len(codes) == 16 and nearest_code == codes[4 * 1 + 2]

# %%
viz.nearest_words(cut, [f"{code:03d}" for code in codes], title=f"The mask of the {thing.name}, and its sixteen codes")

# %% [markdown]
# As text, the codes stand between box and label:

# %%
box_text, label = written.split(" ", 1)
with_mask = box_text + "".join(f"<seg{code:03d}>" for code in codes) + f" {label}"
tokens = processor.encode([with_mask])[0]
print(with_mask, "→", len(tokens), "tokens")
assert len(tokens) == 4 + 16 + len(processor.encode([f" {label}"])[0])
assert locations.parse_detections(with_mask, width, height).detections[0].codes == tuple(codes)

# %% [markdown]
# And back. Masks have an IoU as boxes do: the pixels in both over the pixels in either.


# %%
def mask_iou(a, b):
    """Two masks of one shape → the pixels in both over the pixels in either."""
    return float((a & b).sum() / (a | b).sum())


with torch.no_grad():
    decoded = vae.decode(torch.tensor([codes]))[0]  # [64, 64]
print(f"values from {decoded.min():.2f} to {decoded.max():.2f}")
print(f"IoU with the mask: {mask_iou(cut > 0.5, decoded > 0):.2f}; of the whole box: {(cut > 0.5).float().mean():.2f}")
assert mask_iou(cut > 0.5, decoded > 0) > 0.8
steps = ["in its box", "its mask", "decoded from 16 codes", "above 0"]
viz.image_row([scene.image[y0:y1, x0:x1], cut, decoded, decoded > 0], steps)

# %% [markdown]
# The shape is there; thin parts and sharp corners are what sixteen words cannot hold.
#
# ## The codebook as a picture
#
# What does each of the 128 codes look like? We encode the masks of all objects in 150 scenes and decode them again. In a
# decoded mask every place has a cell of 16×16 values of its own. For each code, we average the cells where it stands:

# %%
things = [o for seed in range(150) for o in emoji.make_scene(seed, "validation").objects]
used = torch.tensor(vae.codes_from_masks([o.mask for o in things], [o.box for o in things]))  # [N, 16]
with torch.no_grad():
    values = vae.decode(used)  # [N, 64, 64]
cells = values.reshape(-1, 4, 16, 4, 16).transpose(2, 3).reshape(-1, 16, 16)  # one for each code written
counts = torch.bincount(used.flatten(), minlength=128)
shapes = torch.zeros(128, 16, 16).index_add(0, used.flatten(), cells) / counts.clamp(min=1)[:, None, None]
print(f"{len(things)} masks; {(counts > 0).sum()} of 128 codes are used")
print("the most used:", ", ".join(f"{k:03d} ({counts[k]}×)" for k in counts.argsort(descending=True)[:5].tolist()))
viz.codebook(shapes, counts, title="The 128 codes: what stands where each is used, on average")

# %% [markdown]
# Insides, outsides, and pieces of outline in all directions: an alphabet of shapes that nobody drew. But many cells are
# blurred. In them the code stands for one thing here and for another there: unlike a letter, a code has no shape of its own,
# it has one among its neighbors, because the decoder's convolutions look at several places at once. Below, one code,
# that of the fullest cell, in different company: at all places; then alone among copies of the emptiest, at three places.

# %%
full, empty = int(shapes.mean((1, 2)).argmax()), int(shapes.mean((1, 2)).argmin())
company = torch.full((4, 16), empty)
company[0], company[1, 0], company[2, 5], company[3, 15] = full, full, full, full
with torch.no_grad():
    four = vae.decode(company)
corner, inner = four[1, :16, :16], four[2, 16:32, 16:32]  # the cell of the code itself
print(f"its own cell, in the corner and further in: up to {(corner - inner).abs().max():.1f} apart")
assert (corner - inner).abs().max() > 0.5
viz.image_row(list(four), [f"{full:03d} everywhere", "top left", "row 1, column 1", "bottom right"])

# %% [markdown]
# How far does one code reach? In each of the masks we put another mask's code into row 1, column 1, and look where the
# values change.

# %%
changed = used.clone()
changed[:, 5] = used.roll(1, dims=0)[:, 5]
with torch.no_grad():
    change = (vae.decode(changed) - values).abs().mean(0)  # [64, 64]
own = float(change[16:32, 16:32].sum() / change.sum())
print(f"of all that changes, {own:.0%} is in the cell of that code, 1/16 of the area")
assert 1 / 16 < own < 0.6
viz.image_row([change], ["where the values change, on average"])

# %% [markdown]
# ## Exercise 8.4 · From codes to a grid ★★☆ (10 minutes)
#
# The decoder is made of convolutions, so it wants something like a picture: `[B, D, 4, 4]`, the width D in front of rows and
# columns. `codes` are integers `[B, 16]`, `codebook` is `[C, D]`. The codes go **row by row**: the first four are the
# top row, from left to right. Return the vector of each code at its place.
#
# <details><summary>Hint</summary>
#
# `codebook[codes]` is `[B, 16, D]`. First bring D in front of the 16 (`transpose`), then split the 16 into 4 × 4 (`unflatten`
# or `reshape`). The other way round, `reshape` alone, gives the right shape and mixes everything.
#
# </details>


# %%
def code_grid(codes, codebook):
    """[B, 16] integers, [C, D] → [B, D, 4, 4]."""
    ### BEGIN SOLUTION
    return codebook[codes].transpose(1, 2).unflatten(2, (4, 4))
    ### END SOLUTION


# %%
exercises.check(code_grid)
### BEGIN HIDDEN TESTS
exercises.score(code_grid, points=2, seed=1)
### END HIDDEN TESTS

# %%
code_grid = exercises.piece("code_grid")
with torch.no_grad():
    from_grid = vae.decoder(code_grid(torch.tensor([codes]), codebook))[0, 0]
assert (from_grid - decoded).abs().max() <= 1e-5 * decoded.abs().max()

# %% [markdown]
# ## Exercise 8.5 · Into the picture ★★☆ (15 minutes)
#
# `values` are the decoder's 64×64 numbers, a numpy array of float32. `box` is (x0, y0, x1, y1) in pixels, `width` and `height`
# are those of the picture. Return the mask of the whole picture: booleans `[height, width]`, True where the values,
# **stretched into the box, are above 0**, and False everywhere outside of the box.
#
# Boxes end between pixels. `pixel_box(box, width, height)`, which you may call, gives whole ones: it rounds each corner to the
# nearest pixel, keeps it inside the picture, and leaves at least one pixel each way. (big_vision cuts the fractions
# off; rounding is nearer.) PIL stretches arrays of numbers, too, blending neighbors:
# `Image.fromarray(values).resize((wide, high), Image.Resampling.BILINEAR)`.
#
# <details><summary>Hint</summary>
#
# `x0, y0, x1, y1 = pixel_box(…)`. PIL's sizes are (width, height), numpy's shapes (rows, columns): the part has y1 − y0 rows, and
# it belongs into `mask[y0:y1, x0:x1]`. Stretch first, then compare.
#
# </details>


# %%
def paste_mask(values, box, width, height):
    """[64, 64] float32, a box and two sides in pixels → [height, width] booleans."""
    from PIL import Image

    from minivlm.locations import pixel_box

    ### BEGIN SOLUTION
    x0, y0, x1, y1 = pixel_box(box, width, height)
    part = Image.fromarray(values).resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR)
    mask = np.zeros((height, width), dtype=bool)
    mask[y0:y1, x0:x1] = np.asarray(part) > 0
    return mask
    ### END SOLUTION


# %%
exercises.check(paste_mask)
### BEGIN HIDDEN TESTS
exercises.score(paste_mask, points=2, seed=1)
### END HIDDEN TESTS

# %%
paste_mask = exercises.piece("paste_mask")
pasted = paste_mask(decoded.numpy(), thing.box, width, height)
print(f"{pasted.shape}, IoU with the true mask {mask_iou(pasted, thing.mask):.2f}")
assert pasted.shape == thing.mask.shape and mask_iou(pasted, thing.mask) > 0.8

# %% [markdown]
# ## The model's own masks
#
# `segment` asks for boxes with masks. As with `detect`, ` ; ` joins several classes, and the answer takes them in that order.
# The dozen scenes, each with all its objects asked for at once:

# %%
all_prompts = [asks_for("segment", s) for s in some]
segmented = minivlm.generate(model, processor, [s.image for s in some], all_prompts, max_new_tokens=128)
print(all_prompts[0], segmented[0], sep="\n    ")
read = [locations.parse_detections(text, width, height).detections for text in segmented]
in_order = [
    list(dict.fromkeys(d.label for d in r)) == list(dict.fromkeys(o.name for o in s.objects))
    for s, r in zip(some, read, strict=True)
]
print(f"the classes asked for, all of them and in their order: in {sum(in_order)} of {len(some)} scenes")
assert sum(in_order) > len(some) / 2

# %% [markdown]
# Are these the codes that the encoder gives the true masks? For every object whose box is right:

# %%
right = [
    (o, d)
    for s, detections in zip(some, read, strict=True)
    for o in s.objects
    for d in detections
    if d.codes and d.label == o.name and box_iou(o.box, d.box) >= 0.5
]
true_codes = vae.codes_from_masks([o.mask for o, _ in right], [o.box for o, _ in right])
same = np.mean(
    [a == b for (_, d), row in zip(right, true_codes, strict=True) for a, b in zip(d.codes, row, strict=True)]
)
print(f"{len(right)} objects; {same:.0%} of their codes are those of the encoder")
assert same < 0.5

# %% [markdown]
# Most are not. The masks can be good all the same, as the figures below show: last of all in its training, this decoder
# learned to draw the true masks from codes that the model had written (`minivlm/training.py`, stage 7).
#
# Now your two pieces, with the decoder between them. Two options break it on purpose: the codes column by column, and
# another threshold (to take 1 from all values is to compare them with 1 in place of 0).


# %%
def masks_from_detections(detections, column_by_column=False, threshold=0.0):
    """Detections → the mask of each that has codes, and the detection."""
    detections = [d for d in detections if d.codes]
    codes = torch.tensor([d.codes for d in detections], dtype=torch.long).reshape(-1, 16)
    if column_by_column:
        codes = codes.unflatten(1, (4, 4)).mT.flatten(1)
    with torch.no_grad():
        values = vae.decoder(code_grid(codes, codebook))[:, 0].numpy() - threshold
    return [(d, paste_mask(v, d.box, width, height)) for d, v in zip(detections, values, strict=True)]


# %%
found, masks = zip(*masks_from_detections(read[0]), strict=True)
viz.draw_boxes(Image.fromarray(scene.image), found, masks)


# %%
def mean_mask_iou(**broken):
    """Over all objects: the IoU with the best mask of its name, 0 where there is none."""
    scores = []
    for s, detections in zip(some, read, strict=True):
        pairs = masks_from_detections(detections, **broken)
        for o in s.objects:
            scores.append(max((mask_iou(o.mask, m) for d, m in pairs if d.label == o.name), default=0.0))
    return sum(scores) / len(scores)


# %%
mask_ious = {
    "row by row, above 0": mean_mask_iou(),
    "column by column": mean_mask_iou(column_by_column=True),
    "above 0.5": mean_mask_iou(threshold=0.5),
    "above 1": mean_mask_iou(threshold=1.0),
}
for name, iou in mask_ious.items():
    print(f"{name:20} mean IoU {iou:.2f}")
best = mask_ious["row by row, above 0"]
assert best > 0.6 and max(mask_ious["column by column"], mask_ious["above 1"]) < best - 0.05

# %% [markdown]
# ### Break it: what each bug looks like
#
# Column by column the shape is turned over along the diagonal of its box: round things hide it. A threshold of 0.5 thins
# the mask a little, since the values rise steeply at the outline: that bug hides as well. Above 1 a shrunken rest with gaps
# is left. None of the three raises an error; a comparison with the truth shows them all. The repair: row by row, and above 0.

# %%
broken = {"as it should be": {}, "column by column": {"column_by_column": True}, "above 1": {"threshold": 1.0}}
viz.image_row([np.any([m for _, m in masks_from_detections(read[0], **how)], axis=0) for how in broken.values()], list(broken))

# %% [markdown]
# ## Choosing a word
#
# So far each word was the likeliest: *greedy*. That is right for answers, boxes and masks. Where many texts are good, one may
# draw at random instead, and shape what is drawn from. To see it we need a place where the model is unsure: in captions of
# scenes by an artist whose hand it has never seen, the word that it wrote with the least probability. (In the bars, ␣ is
# the space that belongs to a word.)

# %%
strange = [emoji.make_scene(seed, "artist") for seed in range(12)]
inputs = generation.prepare_inputs(processor, [s.image for s in strange], "caption en")
guessed = generation.generate_ids(model, inputs, max_new_tokens=16)
probability = guessed.log_probs.exp()  # [rows, tokens], of each token written
row, step = divmod(int(probability.argmin()), probability.shape[1])
print(f"least sure at word {step + 1} of: {processor.decode(guessed.sequences[row])!r}")
print(f"it took {processor.decode(guessed.sequences[row, step : step + 1])!r} with {probability[row, step]:.2f}")

# %%
sequence = torch.cat((inputs["input_ids"][row], guessed.sequences[row, :step]))[None]
types = (torch.arange(sequence.shape[1]) >= inputs["input_ids"].shape[1]).long()[None]  # 1 on what was written
with torch.no_grad():
    logits = model(sequence, pixel_values=inputs["pixel_values"][row : row + 1], token_type_ids=types, last_only=True)[
        :, -1
    ]
assert abs(logits.log_softmax(-1).max() - guessed.log_probs[row, step]) < 1e-5 * logits.abs().max()
viz.sampling_distribution(logits[0], processor, title=f"After {processor.decode(guessed.sequences[row, :step])!r}")

# %% [markdown]
# **Temperature** divides the logits by T. Since softmax takes exponentials, that raises every probability to the power 1/T:
# below 1 the likely get likelier, above 1 all come closer. T = 0 would divide by zero; its limit is greedy.

# %%
plain = logits.softmax(-1)
for T in (0.5, 1.0, 2.0):
    warm = generation.apply_temperature(logits, T).softmax(-1)
    print(f"T = {T}: the four likeliest have", [f"{v:.2f}" for v in warm[0].topk(4).values.tolist()])
    assert torch.allclose(warm, plain ** (1 / T) / (plain ** (1 / T)).sum(), rtol=1e-5)

# %% [markdown]
# **Top-k** leaves the *k* likeliest. What is cut off gets the logit −∞, whose probability is exp(−∞) = 0.

# %%
slow = torch.full_like(logits, -torch.inf)
for i in logits[0].topk(3).indices.tolist():
    slow[0, i] = logits[0, i]
assert torch.equal(slow, generation.top_k_filter(logits, 3))
viz.sampling_distribution(logits[0], processor, kept=slow[0], top=8, title="Top-k, k = 3")

# %% [markdown]
# Three words, however sure the model is: too many where one is certain, too few where many fit. **Top-p**, or nucleus
# sampling (arXiv:1904.09751), leaves the fewest words, likeliest first, whose probabilities reach *p* together. By
# hand, with p = 0.7; a word is kept if the words before it do not reach p yet:

# %%
total = 0.0
for chance, word in sorted(zip([0.15, 0.50, 0.05, 0.30], ["dog", "cat", "owl", "bat"], strict=True), reverse=True):
    print(f"{word} {chance:.2f}   before it {total:.2f}   {'kept' if total < 0.7 else 'cut off'}")
    total += chance

# %% [markdown]
# ## Exercise 8.6 · Top-p ★★☆ (15 minutes)
#
# `logits` are `[B, V]`, `p` is a number between 0 and 1. Return `[B, V]`: the logits of the words kept, −∞ for the others,
# in the order of the vocabulary. The likeliest word is always kept, and so is the one with which the sum reaches p.
#
# <details><summary>Hint</summary>
#
# `values, order = probabilities.sort(-1, descending=True)`. The sum before each word is the running sum, `cumsum(-1)`,
# without its own. `torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, dropped)` puts a mask of the sorted words
# back to where the words were.
#
# </details>


# %%
def top_p_filter(logits, p):
    """[B, V] and a number → [B, V], −inf where a word is cut off."""
    ### BEGIN SOLUTION
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -torch.inf)
    ### END SOLUTION


# %%
exercises.check(top_p_filter)
### BEGIN HIDDEN TESTS
exercises.score(top_p_filter, points=2, seed=1)
### END HIDDEN TESTS

# %%
top_p_filter = exercises.piece("top_p_filter")
viz.sampling_distribution(logits[0], processor, kept=top_p_filter(logits, 0.8)[0], title="Top-p, p = 0.8")

# %% [markdown]
# The same p where the model is sure, at the end of its caption of our scene:

# %%
sure = processor(text=["caption en"], images=[scene.image], suffix=[answers[0]])
sure.pop("labels")
with torch.no_grad():
    last_logits = model(**sure)[:, -2]  # of what follows the last word: the last token itself is <eos>
kept = {
    name: int((top_p_filter(z, 0.8) > -torch.inf).sum()) for name, z in {"sure": last_logits, "unsure": logits}.items()
}
print("words kept by top-p:", kept, "  by top-k: 3 and 3")
assert kept["sure"] == 1 < kept["unsure"]

# %% [markdown]
# Six captions of the strange scene, drawn with top-p and then with a high temperature alone. The same `seed` draws the
# same texts.

# %%
rows = ["caption en"] * 6  # one picture, six rows
for how in ({"top_p": 0.8}, {"temperature": 2.0}):
    drawn = minivlm.generate(
        model, processor, strange[row].image, rows, do_sample=True, seed=0, max_new_tokens=16, **how
    )
    print(how, *drawn, sep="\n    ")
print("the truth:", strange[row].captions["caption"][0])

# %% [markdown]
# ## Exercise 8.7 · The loop that writes ★★★ (20 minutes)
#
# All that is left is to go round. `next_logits(ids)` takes all tokens so far, `[B, T]`, and gives the scores of the next,
# `[B, V]`. Write greedily for a whole batch, until every row has written `eos` or `max_new_tokens` are written. Rows end at
# different times: after its `eos` a row is filled with `pad`. Return the new tokens alone, `[B, N]`, `eos` included; N is
# the length of the longest answer.
#
# <details><summary>Hint</summary>
#
# Keep `finished`, booleans `[B]`. Each round: choose; pad where finished; store; `finished = finished | (token == eos)`;
# leave if `finished.all()`; append with `torch.cat((ids, token[:, None]), dim=1)`. The order of these matters.
#
# </details>


# %%
def greedy_loop(next_logits, ids, eos, pad, max_new_tokens):
    """A function [B, T] → [B, V], prompts [B, T], two ids, a number → new tokens [B, N]."""
    ### BEGIN SOLUTION
    new, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(max_new_tokens):
        token = next_logits(ids).argmax(-1).masked_fill(finished, pad)
        new.append(token)
        finished = finished | (token == eos)
        if finished.all():
            break
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.stack(new, dim=1)
    ### END SOLUTION


# %%
exercises.check(greedy_loop)
### BEGIN HIDDEN TESTS
exercises.score(greedy_loop, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# Around the real model. The picture is encoded **once**, before the loop; ports that give `pixel_values` at every step run
# the whole tower again for every word. What is still wasteful here, the prompt read anew for each token, is what the
# cache of chapter 07 removes.

# %%
greedy_loop = exercises.piece("greedy_loop")
inputs = generation.prepare_inputs(processor, [s.image for s in some], "caption en")
start = inputs["input_ids"].shape[1]
with torch.no_grad():
    encoded = model.encode_image(inputs["pixel_values"])


@torch.no_grad()
def next_logits(ids):
    types = (torch.arange(ids.shape[1]) >= start).long().expand(len(ids), -1)  # the answer is the suffix
    return model(ids, image_features=encoded, token_type_ids=types, last_only=True)[:, -1]


# %%
new = greedy_loop(next_logits, inputs["input_ids"], processor.eos_token_id, processor.pad_token_id, 20)
assert torch.equal(new, generation.generate_ids(model, inputs, max_new_tokens=20).sequences)
for ids, s in list(zip(new, some, strict=True))[:4]:
    print(f"{processor.decode(ids):40} (truth: {s.captions['caption'][0]})")

# %% [markdown]
# ## All of it, step by step
#
# The tensor trace records every named tensor of one forward pass, from the pixels to the logits, each with its shape, its
# statistics and a small picture. Here the model reads picture, prompt and its own answer, as in training. Step through it and find the places where you have built something: the patches (03), the
# merged embeddings, the mask (05), the layers (06), the logits.

# %%
viz.trace(model, processor, scene.image, "caption en", suffix=answers[0])

# %% [markdown]
# ## Your PaliGemma
#
# Inside `exercises.plugged_in()` the package runs with every piece that has passed its check, in this and in all
# earlier chapters, in place of its own. The last of the prompts is a segmentation: the model writes, your pieces read the
# boxes and make the masks. The proof is that nothing changes:

# %%
with exercises.plugged_in() as parts:
    mine = ask(model, processor, scene.image, [*prompts, asks_for("segment", scene)])
    my_things = locations.parse_detections(mine[-1], width, height).detections
    my_masks = vae.masks_from_detections(my_things, width, height)
    my_draws = minivlm.generate(
        model, processor, strange[row].image, rows, do_sample=True, top_p=0.8, seed=0, max_new_tokens=16
    )
    my_loop = greedy_loop(next_logits, inputs["input_ids"], processor.eos_token_id, processor.pad_token_id, 20)
print(parts)

# %%
theirs = locations.parse_detections(segmented[0], width, height).detections
assert mine == [*answers, segmented[0]]
assert torch.equal(my_loop, new)
assert my_draws == minivlm.generate(
    model, processor, strange[row].image, rows, do_sample=True, top_p=0.8, seed=0, max_new_tokens=16
)
assert [(d.label, d.codes) for d in my_things] == [(d.label, d.codes) for d in theirs]
assert torch.allclose(torch.tensor([d.box for d in my_things]), torch.tensor([d.box for d in theirs]), rtol=1e-5)
assert all(map(np.array_equal, my_masks, vae.masks_from_detections(theirs, width, height)))
viz.draw_boxes(Image.fromarray(scene.image), my_things, my_masks)

# %% [markdown]
# Every piece marked as yours stood in the package's place. Most of them worked on this picture; four had nothing to do
# for it: `top_p_filter` drew the captions, `append` belongs to the growing cache, `sliding_window_mask` to PaliGemma 2,
# and `cache_bytes` only counts. (Not all exercises are in the list: the losses and your loops have no place to be
# plugged in.) A piece that is still the package's awaits you in its chapter:

# %%
exercises.progress()

# %% [markdown]
# ## It matches
#
# The same checkpoint in transformers: projector, logits, and the text that its own `generate` writes.

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = minivlm.hub.resolve(None)
hf = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
with torch.no_grad():
    tower = hf.model.vision_tower(batch["pixel_values"]).last_hidden_state
    pairs = {
        "projector": (features, hf.model.multi_modal_projector(tower)),
        "logits": (model(**batch), hf(**batch).logits),
    }
for name, (ours, other) in pairs.items():
    difference = float((ours - other).abs().max() / other.abs().max())
    print(f"{name}: largest difference {difference:.1e} relative")
    assert difference < 1e-5

# %%
with torch.no_grad():
    out = hf.generate(**batch, max_new_tokens=20, do_sample=False)[0, batch["input_ids"].shape[1] :]
print("transformers:", processor.decode(out), "  yours:", mine[0])
assert processor.decode(out) == mine[0]

# %% [markdown]
# Masks have no counterpart there: transformers gives back the text and leaves boxes and masks to you. So we hold your
# grid and the decoder against the bare layers of `torch.nn.functional`, called with the weights by their names in the
# file, the same as in Google's (big_vision, `evaluators/proj/paligemma/transfers/segmentation.py`):

# %%
import torch.nn.functional as F

w = vae.state_dict()


def conv(x, name, padding=0):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=padding)


# %%
x = torch.zeros(1, 512, 4, 4)
for i, code in enumerate(codes):
    x[0, :, i // 4, i % 4] = codebook[code]
x = conv(x, "decoder.0").relu()
for block in ("decoder.2.net", "decoder.3.net"):
    x = x + conv(conv(conv(x, f"{block}.0", 1).relu(), f"{block}.2", 1).relu(), f"{block}.4")
for i in (4, 6, 8, 10):
    x = F.conv_transpose2d(x, w[f"decoder.{i}.weight"], w[f"decoder.{i}.bias"], stride=2, padding=1).relu()
bare = conv(x, "decoder.12")

# %%
with torch.no_grad():
    ours = vae.decoder(code_grid(torch.tensor([codes]), codebook))
difference = float((ours - bare).abs().max() / bare.abs().max())
print(f"mask decoder: largest difference {difference:.1e} relative")
assert difference < 1e-5

# %% [markdown]
# ## Photos, and the real weights
#
# Our small model has seen nothing but emoji. Shown a photo, it answers all the same, in the only words it has; an empty answer
# to `detect` means that it found none:

# %%
photo = hub.DATA / "images" / "cat.jpg"
asked = ["caption en", "answer en what animal is this?", "detect cat"]
_ = ask(model, processor, photo, asked)

# %% [markdown]
# The code that you have just run is also that of the 3B model; only the numbers differ. To put Google's weights into it:
#
# 1. Open [the model's page](https://huggingface.co/google/paligemma-3b-mix-224), log in, click *Acknowledge license*, and
#    run `hf auth login` once in a terminal.
# 2. Check the memory. 2.9 billion parameters of two bytes are 5.8 GB, to download and to hold; `python -m minivlm doctor`
#    says whether they fit.
# 3. Set `HUB` below to `"google/paligemma-3b-mix-224"` and run the cell. While it is `None`, nothing is downloaded.
# 4. Masks need one more file, Google's own VQ-VAE, `gs://big_vision/paligemma/vae-oid.npz`: fetch it
#    (`gsutil cp gs://big_vision/paligemma/vae-oid.npz .`) and set `MASKS` to where it lies.
#    `MaskVQVAE.from_pretrained(path)` reads it. The one you have used was trained on emoji and has a codebook of its own:
#    to it, the codes of Google's model are another language.
#
# What to expect: 256 image tokens in place of 49, and on a CPU patience, since each word reads all the weights once.
# The *mix* checkpoints were trained further, on many tasks at once, so they follow the same prompts: a short English
# caption, a word or two as an answer, `<loc…>` boxes, `<seg…>` masks. They know photos, not our hundred emoji. The other pictures in
# `data/images` (coffee, astronaut, rocket, camera) are for you to ask about.

# %%
HUB, MASKS = None, None
if HUB:
    big = minivlm.PaliGemma.from_pretrained(HUB, revision="bfloat16")
    big_processor = minivlm.Processor.from_pretrained(HUB, revision="bfloat16")
    with exercises.plugged_in() as parts, Image.open(photo) as picture:
        big_answers = ask(big, big_processor, photo, [*asked, "segment cat"])
        cats = locations.parse_detections(big_answers[-1], *picture.size).detections
        big_masks = MaskVQVAE.from_pretrained(MASKS).masks_from_detections(cats, *picture.size) if MASKS else ()
        display(viz.draw_boxes(picture, cats, big_masks))
    print(parts)

# %% [markdown]
# ## Recap
#
# * The projector is one linear layer; its vectors take the places of `<image>` in the text's embeddings.
# * Text × √D and picture as it is, or picture ÷ √D and then all × √D: the same. Half of each: wrong answers, and no
#   error.
# * Boxes are text: y min, x min, y max, x max, in bins of 0 to 1023.
# * Masks are text: sixteen codes, the numbers of vectors in a codebook, laid out row by row; a decoder makes 64×64 values
#   of them; these are stretched into the box, and what is above 0 is inside.
# * Greedy takes the likeliest word. Temperature reshapes, top-k and top-p cut off, and only then is one drawn.
# * The loop: choose, pad what has ended, look for `<eos>`, append, again. The picture is encoded once.
#
# **Four questions**
#
# <details><summary>1. Why do the picture's vectors need no position embedding in the decoder?</summary>
#
# The tower has added one for each patch already (chapter 03), and in the decoder every token, patch or word, is turned by
# its place in the sequence (RoPE, chapter 06).
#
# </details>
#
# <details><summary>2. Top-k with k = 1 and top-p with p close to 0: what is left, and at what temperature does it matter?</summary>
#
# The likeliest word alone in both cases, so drawing is greedy. The temperature does not matter: it never changes the order.
#
# </details>
#
# <details><summary>3. A detector gives right boxes for square pictures and wrong ones for wide ones. Which bug do you look for?</summary>
#
# Width and height taken for each other when bins become pixels. (x and y swapped would be wrong in square pictures
# as well.)
#
# </details>
#
# <details><summary>4. A mask that the model wrote has one wrong code of its sixteen. Which part of the mask is wrong?</summary>
#
# Mostly the cell of that code and what borders on it; in part the whole mask, since the decoder's convolutions look at
# neighbors. The box is not touched: its four words are others.
#
# </details>
#
# **You have built PaliGemma.** What is left of the table above leads back to its chapters, from
# [00 · Start here](00_start_here.ipynb) on.
