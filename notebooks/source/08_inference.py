# %% [markdown]
# # 08 · Full PaliGemma inference
#
# **How does it all answer a question about an image?**
#
# | | |
# |---|---|
# | know first | what the vision tower, mask, decoder and cache are for (chapters 03, 05, 06, 07), without the details |
# | you will build | image-text merging, box decoding, top-p, the generation loop; then you run it all |
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
# 1. The small model that comes with the course splits its image into 7 × 7 patches. With the prompt `caption en`, how
#    many tokens does the decoder read before it generates its first one?
# 2. By mistake, the image features reach the decoder 14 times as long as they should be. Each layer begins by scaling
#    every vector to the same length (RMSNorm, chapter 06). Does the answer change?
# 3. The probabilities of the next token are 0.52, 0.31 and 0.17. Which tokens does top-p keep with *p* = 0.5?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. 53: 49 patches, `<bos>`, `caption`, `en` and the newline.
# 2. Yes, and badly. The norm hides the length from what a layer reads. But what a layer *adds* hardly changes a vector
#    that is too long.
# 3. Only the first. It reaches 0.5 on its own.
#
# </details>

# %% [markdown]
# ## The projector
#
# The vision tower of chapter 03 turns an image into *P* vectors, one per patch, with the tower's own hidden size. The
# decoder can have a different one. In PaliGemma 3B they are 1152 and 2048. In the small model they happen to be equal.
# In between there is a single linear layer: a matrix and a bias.

# %%
model = minivlm.PaliGemma.from_pretrained()
processor = minivlm.Processor.from_pretrained()
scene = emoji.make_scene(0, "validation")
batch = processor(text=["caption en"], images=[scene.image])
projector = model.multi_modal_projector.linear
with torch.no_grad():
    patches = model.vision_tower(batch["pixel_values"])  # [1, P, hidden size of the tower]
    features = model.multi_modal_projector(patches)  # [1, P, hidden size of the decoder]
print("patches", list(patches.shape), "→ features", list(features.shape))
num_parameters = projector.weight.numel() + projector.bias.numel()
print(f"parameters of the projector: {num_parameters:,} here, {1152 * 2048 + 2048:,} in PaliGemma 3B")

# %% [markdown]
# Compute one number of one patch in a loop, then all of them at once:

# %%
with torch.no_grad():
    one = projector.bias[5] + sum(w * v for w, v in zip(projector.weight[5], patches[0, 3], strict=True))
    by_hand = patches @ projector.weight.T + projector.bias
largest = features.abs().max()
assert abs(one - features[0, 3, 5]) < 1e-5 * largest and (by_hand - features).abs().max() < 1e-5 * largest

# %% [markdown]
# From here on, the image is *P* vectors that the decoder treats just like token embeddings. We call them the *image
# features*.
#
# ## Where image and text meet: a toy
#
# The processor of chapter 04 has put *P* placeholders, `<image>`, into the prompt. Text tokens get their vectors from
# the embedding table, multiplied by √D, where D is the hidden size (a Gemma convention). The placeholders get the image
# features instead, exactly as they come out of the projector. With D = 4, √D is 2:

# %%
IMAGE = 9
ids = [IMAGE, IMAGE, 2, 5]  # two patches, <bos>, one text token
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
# Vectorized: look up and scale the text embeddings (the placeholders get any vector, because it is overwritten), mark
# the image positions, and write the features there.

# %%
x = torch.stack([toy_table.get(token, torch.zeros(4)) for token in ids]) * 2
is_image = torch.tensor(ids) == IMAGE
fast = x.clone()
fast[is_image] = toy_features
assert fast.shape == (4, 4) and torch.equal(fast, slow)

# %% [markdown]
# ## Exercise 8.1 · Merge image and text
#
# Now for a whole batch. `x` `[B, T, D]` are the scaled text embeddings. `is_image` `[B, T]` is True at the
# placeholders. `features` `[B, P, D]` are the image features. Every row has exactly P placeholders, but they don't
# always come first: there can be padding before them. Return a new tensor and leave `x` unchanged.


# %%
def merge_image_features(x, is_image, features):
    """[B, T, D], boolean [B, T], [B, P, D] → [B, T, D]."""
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
# With the real prompt: 49 positions for the image, plus the four tokens of the prompt.

# %%
merge_image_features = exercises.piece("merge_image_features")
viz.token_strip(batch, processor, title="What the decoder reads")

# %%
table = model.language_model.model.embed_tokens.weight.detach()
D, P = table.shape[1], features.shape[1]
is_image = batch["input_ids"] == model.config.image_token_index
text_ids = batch["input_ids"].masked_fill(is_image, processor.pad_token_id)  # any id works: it is overwritten
merged = merge_image_features(table[text_ids] * D**0.5, is_image, features)
with torch.no_grad():
    assert torch.allclose(merged, model.embed(batch["input_ids"], features), rtol=1e-5)
print(f"{P} patches + {(~is_image).sum()} tokens = {merged.shape[1]} vectors of size {D}")

# %% [markdown]
# ## Two scaling conventions
#
# Two ways of scaling are in use, and both are right:
#
# * **A** (Big Vision, transformers 5): text × √D, image features unscaled. This is what you have built.
# * **B** (older transformers, and ports derived from it): image features ÷ √D, then merge, then **everything** × √D.

# %%
A = merge_image_features(table[text_ids] * D**0.5, is_image, features)
B = merge_image_features(table[text_ids], is_image, features / D**0.5) * D**0.5
difference = float((A - B).abs().max() / A.abs().max())
print(f"largest relative difference: {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# ### Break it: mix the two
#
# If you take the merge from one codebase and the scaling from the other, the image features end up √D times too long or
# √D times too short. Nothing crashes. Here are a dozen held-out scenes:

# %%
from unittest.mock import patch

scenes = [emoji.make_scene(seed, "validation") for seed in range(12)]
package_merge = paligemma.merge_image_features


def captions_with(factor: float, number: int = 12) -> list[str]:
    def merge_scaled(x, is_image, features):
        return package_merge(x, is_image, features * factor)

    with patch.object(paligemma, "merge_image_features", merge_scaled):
        return minivlm.generate(model, processor, [s.image for s in scenes[:number]], "caption en")


# %%
correct = {}
for name, factor in {"as trained": 1.0, "times √D": D**0.5, "divided by √D": D**-0.5}.items():
    captions = captions_with(factor)
    correct[name] = sum(emoji.same_caption(c, s.captions["caption"][0]) for c, s in zip(captions, scenes, strict=True))
    print(f"{name:14} {correct[name]:2} of {len(scenes)} correct; the first three: {captions[:3]}")
assert correct["times √D"] < correct["as trained"] and correct["divided by √D"] < correct["as trained"]

# %% [markdown]
# And in between? Predict first: does it hurt more if the features are twice as long or half as long? Then move the
# slider in both directions until no caption is left as it was.


# %%
def captions_at(scale=1.0):
    captions = captions_with(scale, number=4)
    return viz.image_row([s.image for s in scenes[:4]], captions, title=f"Image features × {scale:.2g}")


viz.sliders(captions_at, scale=(0.05, 20, "log"))

# %% [markdown]
# With features √D times too long, some names are still right, but the captions are not. With features √D times too
# short, the model can't read the image and starts repeating itself. Why didn't RMSNorm save us? It hides the length
# from what a layer *reads*. But each layer *adds* its output to the vector itself: a vector that is too long hardly
# changes direction, and one that is too short is swamped. The cosine between the image vectors before and after the
# first layer measures how much they change direction; 1 means not at all:


# %%
def cosine_across_layer(factor: float) -> float:
    inputs_and_outputs = []
    layer = model.language_model.model.layers[0]
    hook = layer.register_forward_hook(lambda _, inputs, output: inputs_and_outputs.extend((inputs[0], output)))
    with torch.no_grad():
        model(batch["input_ids"], image_features=features * factor)
    hook.remove()
    before, after = (x[0, :P] for x in inputs_and_outputs)
    return float(torch.cosine_similarity(before, after, dim=-1).mean())


cosine = {factor: cosine_across_layer(factor) for factor in (1.0, D**0.5, D**-0.5)}
print("as trained {:.3f}   times √D {:.3f}   divided by √D {:.3f}".format(*cosine.values()))
assert cosine[D**-0.5] < cosine[1.0] < cosine[D**0.5]

# %% [markdown]
# The fix is to pick one convention and stick with it.
#
# ## What do the patches say?
#
# The image features sit where token embeddings would sit. So for each of them we can ask which row of the embedding
# table points in the most similar direction. Directions are compared by their cosine, the dot product of vectors
# normalized to length 1.
#
# ## Exercise 8.2 · The nearest word
#
# `features` are `[P, D]` and the embedding `table` is `[V, D]`. For each patch, return the index of the table row with
# the largest cosine: integers `[P]`.


# %%
def nearest_word(features, table):
    """[P, D], [V, D] → [P], the row of the table nearest to each patch."""
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
forms = {form for name in emoji.OBJECTS for form in (name, emoji.plural(name))}
shown = sum(o.mask for o in scene.objects).reshape(7, 16, 7, 16).any(axis=(1, 3)).ravel()
of_nothing = [word in forms for word, patch_shows in zip(spelled, shown, strict=True) if not patch_shows]
print(f"{sum(of_nothing)} of {len(of_nothing)} patches that show no object are nearest to the name of one")
assert sum(of_nothing) < 0.3 * len(of_nothing) and cosines.max() < 0.5
viz.nearest_words(scene.image, spelled, cosines, title="The nearest token to each patch, and its cosine")

# %% [markdown]
# On the background the nearest token is mostly a word such as "how" or "from": there is nothing to name. On an object it
# is often the object's name, but not always. At edges and where objects touch, you also find other words or a wrong
# name. All cosines are small. What matters is which token comes out on top. How often is it the right name? We take the patches that are
# at least half covered by an object, in a few scenes, and find the nearest among the hundred object names:

# %%
names = table[[processor.encode([" " + name])[0][0] for name in emoji.OBJECTS]]
hits = []
for s in scenes:
    side = len(s.image) // 7
    with torch.no_grad():
        found = nearest_word(model.encode_image(processor.preprocess_images([s.image]))[0], names)
    for o in s.objects:
        covered = o.mask.reshape(7, side, 7, side).mean(axis=(1, 3)).ravel() >= 0.5
        hits += [emoji.OBJECTS[i] == o.name for i in found[torch.from_numpy(covered)].tolist()]
print(f"{len(hits)} patches; the nearest name is the right one for {sum(hits) / len(hits):.0%} of them (chance: 1%)")
assert sum(hits) / len(hits) > 0.3

# %% [markdown]
# That is far above chance, and for a reason. The training of this model began by pulling each patch toward the name of
# the object it shows, with the sigmoid loss of chapter 02 (`minivlm/emoji/recipe.py`, stage `align`), and the later
# stages have left much of that in place. In PaliGemma's own training ("PaliGemma", arXiv:2407.07726, section 3.2) nothing ties
# a patch to a token of the decoder. Its patches only have to be useful, not close to a name.
#
# ## Answers
#
# You know the rest of the way. The merged sequence goes through the decoder under the prefix-LM mask, the output head
# scores every token, one of them is chosen, and it is appended to the sequence. Only the prompt tells the model what to
# do. `caption en`, `answer en …`, `detect …` and `segment …` are fixed prefixes that PaliGemma was trained with. `en`
# is the language.


# %%
def ask(model, processor, image, prompts) -> list[str]:
    answers = minivlm.generate(model, processor, image, prompts, max_new_tokens=128)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}\n    {answer}")
    return answers


# %%
first, *_, last = [o.name for o in scene.objects]
prompts = ["caption en", f"answer en where is the {last}?"]
prompts += [f"answer en how many {emoji.plural(first)} are there?", "answer en how many objects are there?"]
prompts += [f"detect {' ; '.join(o.name for o in scene.objects)}"]
answers = ask(model, processor, scene.image, prompts)

# %% [markdown]
# A count is an answer like any other: a token, `3` or `1`, that was more likely than all the rest. And a detection is
# text, too.
#
# ## A box in four tokens
#
# The vocabulary has 1,024 location tokens, `<loc0000>` to `<loc1023>`. A coordinate is measured as a fraction of the
# image's side: pixel v becomes bin `round(v / side × 1023)`. Four of them make a box, in the order **y min, x min, y
# max, x max**. Note that y comes first, unlike nearly everywhere else. After the box comes its label.
#
# By hand, the true box of the first object:

# %%
height, width = scene.image.shape[:2]
obj = scene.objects[0]
x0, y0, x1, y1 = obj.box  # pixels
true_text = ""
for value, side in ((y0, height), (x0, width), (y1, height), (x1, width)):
    true_text += f"<loc{round(value / side * 1023):04d}>"
    print(f"{value:3} of {side} pixels → bin {round(value / side * 1023)}")
true_text += f" {obj.name}"
tokens = processor.encode([true_text])[0]
print(true_text, "→", len(tokens), "tokens", tokens)
assert len(tokens) == 5

# %% [markdown]
# ## Exercise 8.3 · Read a box
#
# Now the way back. `bins` are four integers (y min, x min, y max, x max), and the image has `width` × `height` pixels.
# Return the box (x0, y0, x1, y1) in pixels.


# %%
def locations_to_box(bins, width, height):
    """Four bins from 0 to 1023, y before x, and the image's sides in pixels → (x0, y0, x1, y1)."""
    ### BEGIN SOLUTION
    y0, x0, y1, x1 = bins
    return x0 / 1023 * width, y0 / 1023 * height, x1 / 1023 * width, y1 / 1023 * height
    ### END SOLUTION


# %%
exercises.check(locations_to_box)
### BEGIN HIDDEN TESTS
exercises.score(locations_to_box, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# After a round trip, each coordinate is off by at most half a bin. Many demos divide by 1024 instead. Training
# multiplies by 1023 (big_vision, `configs/proj/paligemma`), so their boxes come out slightly too small, and none ever
# reaches the far edge.

# %%
locations_to_box = exercises.piece("locations_to_box")
bins = tuple(int(text[4:8]) for text in true_text.split(">")[:4])
round_trip = locations_to_box(bins, width, height)
error = max(abs(a - b) for a, b in zip(obj.box, round_trip, strict=True))
print(f"{obj.box} → {bins} → off by at most {error:.3f} pixels; half a bin is {max(width, height) / 1023 / 2:.3f}")
assert error <= max(width, height) / 1023 / 2
assert locations.parse_detections(true_text, width, height).detections[0].label == obj.name
print("the far edge of a 640-pixel image:", 1023 / 1023 * 640, "or, if you divide by 1024,", 1023 / 1024 * 640)

# %% [markdown]
# `locations.parse_detections` splits an answer at `;`, parses each item, and reports what it could not parse, because a
# model can write anything. Here are the model's own boxes:

# %%
from PIL import Image

parsed = locations.parse_detections(answers[-1], width, height)
print("could not be parsed:", parsed.problems or "nothing")
viz.draw_boxes(Image.fromarray(scene.image), parsed.detections)

# %% [markdown]
# ### Break it: x before y
#
# If you read the four numbers in the usual order, x first, every box is flipped across the image's diagonal. Nothing
# crashes, and a box on the diagonal looks right. How wrong is it overall? The **IoU** (intersection over union) of two
# boxes is the area they share divided by the area they cover together. It is 1 for identical boxes and 0 for boxes that
# don't overlap.


# %%
def box_iou(a, b):
    """Two boxes (x0, y0, x1, y1) → the area in both, divided by the area in either."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b)]
    return shared / (sum(areas) - shared)


assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == 1 / 3

# %% [markdown]
# Back to the dozen scenes. We ask for all objects in each. Every true box gets the IoU of the best predicted box with
# the same name, or 0 if there is none.


# %%
def prompt_for_all(task, s):
    """A prompt that asks for every object in a scene: `detect cat ; dog`."""
    return f"{task} {' ; '.join(dict.fromkeys(o.name for o in s.objects))}"


def mean_box_iou(texts):
    scores = []
    for s, text in zip(scenes, texts, strict=True):
        boxes = locations.parse_detections(text, width, height).detections
        for o in s.objects:
            scores.append(max((box_iou(o.box, d.box) for d in boxes if d.label == o.name), default=0.0))
    return sum(scores) / len(scores)


# %%
def x_first(bins, width, height):
    x0, y0, x1, y1 = bins  # the bug
    return locations_to_box((y0, x0, y1, x1), width, height)


all_prompts = [prompt_for_all("detect", s) for s in scenes]
detected = minivlm.generate(model, processor, [s.image for s in scenes], all_prompts, max_new_tokens=64)
with patch.object(locations, "locations_to_box", x_first):
    iou_x_first = mean_box_iou(detected)
    flipped = locations.parse_detections(answers[-1], width, height).detections
iou_y_first = mean_box_iou(detected)
print(f"mean IoU with the true boxes: {iou_x_first:.2f} if x is read first, {iou_y_first:.2f} once fixed, with y first")
assert iou_x_first < iou_y_first / 2
viz.draw_boxes(Image.fromarray(scene.image), flipped)

# %% [markdown]
# ### And masks
#
# `segment` asks for a box **and** a mask, the pixels that belong to the object. A mask is text as well: sixteen of the
# 128 segmentation tokens, `<seg000>` to `<seg127>`, between box and label. [Lab L0](labs/L0_masks.ipynb) shows how
# sixteen tokens become a mask.

# %%
(segmented,) = ask(model, processor, scene.image, [prompt_for_all("segment", scene)])
codes = [d.codes for d in locations.parse_detections(segmented, width, height).detections]
assert codes and all(len(sixteen) == 16 for sixteen in codes)

# %% [markdown]
# Here is everything so far in one place: the answer, its boxes, and its masks. Predict first: what happens if you ask
# for an object that is not there? Then move *seed* until a mask is wrong, or upload an image of your own.

# %%
viz.playground(model, processor, prompt=prompt_for_all("segment", scene))

# %% [markdown]
# *This is the middle of the chapter and a good place to take a break. When you come back, run the cells above again: in
# JupyterLab, Run → Run All Above Selected Cell.*
#
# ## Choosing a token
#
# So far we have always taken the most likely token. That is *greedy* decoding, and it is right for answers and boxes.
# When many different texts are good, you can sample instead, and shape the distribution that you sample from. To
# see this, we need a position where the model is unsure. So we let it caption scenes drawn by an artist it has never
# seen, and take the generated token with the lowest probability. (In the bars, ␣ marks a space that is part of a
# token.)

# %%
unfamiliar = [emoji.make_scene(seed, "artist") for seed in range(12)]
inputs = generation.prepare_inputs(processor, [s.image for s in unfamiliar], "caption en")
output = generation.generate_ids(model, inputs, max_new_tokens=16)
probability = output.log_probs.exp()  # [rows, tokens], of each generated token
row, step = divmod(int(probability.argmin()), probability.shape[1])
print(f"least certain at token {step + 1} of: {processor.decode(output.sequences[row])!r}")
chosen = processor.decode(output.sequences[row, step : step + 1])
print(f"it chose {chosen!r} with probability {probability[row, step]:.2f}")

# %%
ids = torch.cat((inputs["input_ids"][row], output.sequences[row, :step]))[None]
types = (torch.arange(ids.shape[1]) >= inputs["input_ids"].shape[1]).long()[None]  # 1 on generated tokens
pixels = inputs["pixel_values"][row : row + 1]
with torch.no_grad():
    logits = model(ids, pixel_values=pixels, token_type_ids=types, last_only=True)[:, -1]
assert abs(logits.log_softmax(-1).max() - output.log_probs[row, step]) < 1e-5 * logits.abs().max()
viz.sampling_distribution(logits[0], processor, title=f"After {processor.decode(output.sequences[row, :step])!r}")

# %% [markdown]
# **Temperature** divides the logits by T. Because softmax takes exponentials, this raises every probability to the
# power 1/T and renormalizes. Below 1, the likely tokens become even more likely. Above 1, the distribution flattens. A
# temperature of 0 would divide by zero. In the limit it is greedy decoding.

# %%
plain = logits.softmax(-1)
for T in (0.5, 1.0, 2.0):
    tempered = generation.apply_temperature(logits, T).softmax(-1)
    print(f"T = {T}: the four most likely tokens have", [f"{v:.2f}" for v in tempered[0].topk(4).values.tolist()])
    assert torch.allclose(tempered, plain ** (1 / T) / (plain ** (1 / T)).sum(), rtol=1e-5)

# %% [markdown]
# **Top-k** keeps the *k* most likely tokens. All others get a logit of −∞, and with it a probability of exp(−∞) = 0.

# %%
slow = torch.full_like(logits, -torch.inf)
for i in logits[0].topk(3).indices.tolist():
    slow[0, i] = logits[0, i]
assert torch.equal(slow, generation.top_k_filter(logits, 3))
viz.sampling_distribution(logits[0], processor, kept=slow[0], top=8, title="Top-k, k = 3")

# %% [markdown]
# But top-k always keeps *k* tokens, however sure the model is. That is too many when one token is certain, and too few
# when many would do. **Top-p**, or nucleus sampling (arXiv:1904.09751), goes through the tokens from most to least
# likely and keeps the smallest set whose probabilities add up to at least *p*. By hand, with p = 0.7: a token is kept
# if the sum of the tokens before it is still below p.

# %%
total = 0.0
for chance, token in sorted(zip([0.15, 0.50, 0.05, 0.30], ["dog", "cat", "owl", "bat"], strict=True), reverse=True):
    print(f"{token} {chance:.2f}   sum before it {total:.2f}   {'kept' if total < 0.7 else 'cut off'}")
    total += chance

# %% [markdown]
# ## Exercise 8.4 · Top-p
#
# `logits` are `[B, V]`, and `p` is a number between 0 and 1. Return `[B, V]`: the logits of the kept tokens, −∞ for all
# others, in the original order of the vocabulary. The most likely token is always kept, and so is the one with which
# the sum reaches p.


# %%
def top_p_filter(logits, p):
    """[B, V] and a number → [B, V], −inf where a token is cut off."""
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


def next_token(T=1.0, k=50, p=0.8):
    tempered = generation.apply_temperature(logits, T)
    kept = top_p_filter(generation.top_k_filter(tempered, k), p)
    return viz.sampling_distribution(tempered[0], processor, kept[0], title=f"T = {T:.2g}, top-k {k}, top-p {p:.2g}")


viz.sliders(next_token, T=(0.1, 10, "log"), k=(1, 50), p=(0.05, 1.0, 0.05))

# %% [markdown]
# Temperature first, then top-k, then top-p, as `generate` applies them. Predict first: at a high temperature, does
# top-p keep more tokens or fewer? Then set T = 1 and move *p* until one token is left. Which *k* does the same?

# %%
few, many = (int((top_p_filter(generation.apply_temperature(logits, T), 0.8) > -torch.inf).sum()) for T in (0.2, 5.0))
print(f"top-p with p = 0.8 keeps {few} at T = 0.2 and {many} at T = 5")
assert few < many

# %% [markdown]
# Now the same p where the model is sure, at the end of its caption of our scene:

# %%
complete = processor(text=["caption en"], images=[scene.image], suffix=[answers[0]])
complete.pop("labels")
with torch.no_grad():
    last_logits = model(**complete)[:, -2]  # what follows the last text token; the very last token is <eos>
kept = {name: int((top_p_filter(z, 0.8) > -torch.inf).sum()) for name, z in (("sure", last_logits), ("unsure", logits))}
print("tokens kept by top-p:", kept, "  by top-k: 3 and 3")
assert kept["sure"] == 1 < kept["unsure"]

# %% [markdown]
# Here are six captions of the unfamiliar scene, first sampled with top-p, then with just a high temperature. The same
# `seed` produces the same samples.

# %%
six_prompts = ["caption en"] * 6  # one image, six rows
for options in ({"top_p": 0.8}, {"temperature": 2.0}):
    options = {"do_sample": True, "seed": 0, "max_new_tokens": 16} | options
    samples = minivlm.generate(model, processor, unfamiliar[row].image, six_prompts, **options)
    print(options, *samples, sep="\n    ")
print("the true caption:", unfamiliar[row].captions["caption"][0])

# %% [markdown]
# ## Exercise 8.5 · The generation loop
#
# What remains is the loop. `next_logits(ids)` takes all tokens so far, `[B, T]`, and returns the logits of the next
# token, `[B, V]`. Decode greedily for a whole batch, until every row has produced `eos` or `max_new_tokens` tokens have
# been generated. Rows end at different times: after its `eos`, a row is filled with `pad`. Return only the new tokens,
# `[B, N]`, including `eos`. N is the length of the longest answer.


# %%
def greedy_loop(next_logits, ids, eos, pad, max_new_tokens):
    """A function [B, T] → [B, V], prompts [B, T], two token ids, an integer → new tokens [B, N]."""
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
# Now run it with the real model. The image is encoded **once**, before the loop. Ports that pass `pixel_values` at
# every step run the whole vision tower again for every token. One inefficiency remains: the prompt is processed again
# for each token. The cache of chapter 07 takes care of that.

# %%
greedy_loop = exercises.piece("greedy_loop")
inputs = generation.prepare_inputs(processor, [s.image for s in scenes], "caption en")
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
for ids, s in list(zip(new, scenes, strict=True))[:4]:
    print(f"{processor.decode(ids):40} (true caption: {s.captions['caption'][0]})")

# %% [markdown]
# ## All of it, step by step
#
# The tensor trace records every tensor of one forward pass, from the pixels to the logits, each with its shape, its
# statistics and a thumbnail. Here the model reads the image, the prompt and its own answer, as in training. Step
# through it and find the parts you have built: the patches (03), the merged embeddings (this chapter), the mask (05),
# the layers with their queries, keys, values and attention weights (06), the logits. Point at a cell to read its
# number, or copy the line of Python above it into a cell of your own. The table below the tensors shows what the model
# would say if it ended after an earlier layer: in which layer does the answer appear?

# %%
trace = viz.trace(model, processor, scene.image, "caption en", suffix=answers[0])
trace

# %% [markdown]
# Two traces find a bug: the first tensor that differs between a right run and a broken one is where it begins. Here are
# the image features that are √D times too long, once more. Predict first: which tensor differs first, and does the
# attention of layer 0 notice? (`viz.trace(…, decode=1)` traces a step with the cache of chapter 07.)


# %%
def merge_too_long(x, is_image, features):
    return package_merge(x, is_image, features * D**0.5)


with patch.object(paligemma, "merge_image_features", merge_too_long):
    broken = viz.trace(model, processor, scene.image, "caption en", suffix=answers[0])
diff = trace.diff(broken)
assert diff.first == "inputs_embeds" and not diff["language_model.model.layers.0.self_attn"].differs
diff

# %% [markdown]
# It does not: the norm hides the length from what a layer reads, so all of its attention is equal. The residual stream,
# to which it adds its output, is not.

# %% [markdown]
# ## Your PaliGemma
#
# Inside `exercises.plugged_in()`, every function of yours that has passed its check, in this and in all earlier
# chapters, replaces the package's own: the same image, the same questions. The proof is that nothing changes:

# %%
sampling = {"do_sample": True, "top_p": 0.8, "seed": 0, "max_new_tokens": 16}
with exercises.plugged_in() as parts:
    mine = ask(model, processor, scene.image, prompts)
    my_detections = locations.parse_detections(mine[-1], width, height).detections
    my_samples = minivlm.generate(model, processor, unfamiliar[row].image, six_prompts, **sampling)
    my_tokens = greedy_loop(next_logits, inputs["input_ids"], processor.eos_token_id, processor.pad_token_id, 20)
print(parts)

# %%
assert mine == answers
assert torch.equal(my_tokens, new)
assert my_samples == minivlm.generate(model, processor, unfamiliar[row].image, six_prompts, **sampling)
assert [d.label for d in my_detections] == [d.label for d in parsed.detections]
my_boxes, expected_boxes = (torch.tensor([d.box for d in found]) for found in (my_detections, parsed.detections))
assert torch.allclose(my_boxes, expected_boxes, rtol=1e-5)
viz.draw_boxes(Image.fromarray(scene.image), my_detections)

# %% [markdown]
# Every function marked as yours replaced the package's. Most of them ran for this image. These did not: `top_p_filter`
# sampled the captions of the other image, `append` belongs to the growing cache, `sliding_window_mask` to PaliGemma 2,
# `code_grid` and `paste_mask` to lab L0, and `cache_bytes` only computes a size. (Not all exercises are in the list:
# the losses and your loops have nowhere to be plugged in.) If a function in the list is still the package's, its
# exercise is waiting for you in its chapter:

# %%
exercises.progress()

# %% [markdown]
# ## It matches
#
# We load the same checkpoint in transformers and compare the projector, the logits, and the text that its own
# `generate` returns.

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = minivlm.hub.resolve(None)
hf = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
with torch.no_grad():
    hf_patches = hf.model.vision_tower(batch["pixel_values"]).last_hidden_state
    pairs = {
        "projector": (features, hf.model.multi_modal_projector(hf_patches)),
        "logits": (model(**batch), hf(**batch).logits),
    }
for name, (ours, theirs) in pairs.items():
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{name}: largest relative difference {difference:.1e}")
    assert difference < 1e-5

# %%
with torch.no_grad():
    hf_ids = hf.generate(**batch, max_new_tokens=20, do_sample=False)[0, batch["input_ids"].shape[1] :]
print("transformers:", processor.decode(hf_ids), "  yours:", mine[0])
assert processor.decode(hf_ids) == mine[0]

# %% [markdown]
# ## Photos, and the real weights
#
# Our small model has never seen anything but emoji. Show it a photo and it answers anyway, in the only words it knows.
# An empty answer to `detect` means that it found nothing:

# %%
photo = hub.DATA / "images" / "cat.jpg"
photo_prompts = ["caption en", "answer en what animal is this?", "detect cat"]
_ = ask(model, processor, photo, photo_prompts)

# %% [markdown]
# The code you have just run is also the code of the 3B model. Only the numbers differ. To load Google's weights:
#
# 1. Open [the model's page](https://huggingface.co/google/paligemma-3b-mix-224), log in, click *Acknowledge license*,
#    and run `hf auth login` once in a terminal.
# 2. Check your memory. 2.9 billion parameters at two bytes each are 5.8 GB, both to download and to load.
#    `python -m minivlm doctor` tells you whether they fit.
# 3. Set `HUB` below to `"google/paligemma-3b-mix-224"` and run the cell. As long as it is `None`, nothing is
#    downloaded.
#
# What to expect: 256 image tokens instead of 49. On a CPU you will need patience, because every token reads all the
# weights once. The *mix* checkpoints were fine-tuned on many tasks at once, so they follow the same prompts and return
# a short English caption, an answer of a word or two, or `<loc…>` boxes. They know photos, not our hundred emoji. There
# are more images in `data/images` (coffee, astronaut, rocket, camera) for you to ask about.

# %%
HUB = None
if HUB:
    big_model = minivlm.PaliGemma.from_pretrained(HUB, revision="bfloat16")
    big_processor = minivlm.Processor.from_pretrained(HUB, revision="bfloat16")
    with exercises.plugged_in() as parts, Image.open(photo) as image:
        big_answers = ask(big_model, big_processor, photo, photo_prompts)
        display(viz.draw_boxes(image, locations.parse_detections(big_answers[-1], *image.size).detections))
    print(parts)

# %% [markdown]
# ## Recap
#
# * The projector is one linear layer. Its outputs replace the `<image>` placeholders among the text embeddings.
# * Text × √D with unscaled image features, or image features ÷ √D and then everything × √D: the result is the same.
#   Mixing the two produces wrong answers and no error.
# * Boxes are text: y min, x min, y max, x max, as bins from 0 to 1023.
# * Greedy decoding takes the most likely token. Otherwise temperature reshapes the distribution, top-k and top-p cut it
#   off, and only then is a token sampled.
# * The loop: choose, pad finished rows, check for `<eos>`, append, repeat. The image is encoded once.
#
# **Three questions**
#
# <details><summary>1. Why don't the image features need a position embedding in the decoder?</summary>
#
# The tower has already added one to each patch (chapter 03). And in the decoder, the queries and keys of every token,
# image or text, are rotated by its position in the sequence (RoPE, chapter 06).
#
# </details>
#
# <details><summary>2. What do top-k with k = 1 and top-p with p close to 0 keep? Does temperature matter?</summary>
#
# In both cases only the most likely token is left, so sampling is greedy. The temperature doesn't matter, because it
# never changes the order.
#
# </details>
#
# <details><summary>3. A detector's boxes are right on square images and wrong on wide ones. What is the bug?</summary>
#
# Width and height are swapped when bins become pixels. (If x and y were swapped, square images would be wrong as well.)
#
# </details>
#
# ## Open problem: beam search
#
# Greedy decoding takes the best *token* at each step, but the best *sequence* may begin with a token that is only
# second best. *Beam search* keeps the `width` most likely beginnings and extends all of them. Write
# `beam_search(next_logits, ids, eos, width, max_new_tokens)`. `ids` is one prompt, `[1, T]`, and `next_logits` is the
# same kind of function as in exercise 8.5. Return the list of new tokens with the highest total log-probability that
# you found. It ends with `eos` or has `max_new_tokens` tokens. There is no stub: write the function in a new cell above
# the tests. With a width of 1 it has to be greedy, and with a huge width it has to find the best sequence of all.
#
# <details><summary>A pointer</summary>
#
# A beam is a pair: a total log-probability and a list of tokens. Log-probabilities are `log_softmax`, and those of a
# sequence add up. What happens to a beam that has ended with `eos`? It cannot be extended, but it still competes.
#
# </details>

# %%
talker = torch.randn(29, 4, generator=torch.Generator().manual_seed(14)) * 2  # a toy language model with four tokens


def toy_logits(ids):
    return talker[(ids * torch.arange(1, ids.shape[1] + 1)).sum(-1) % 29]


def best_of_all(ids, eos, steps):
    """The best continuation and its total log-probability, found by trying all of them."""
    found = []
    for token, log_prob in enumerate(toy_logits(ids).log_softmax(-1)[0].tolist()):
        ends = token == eos or steps == 1
        total, tokens = (0.0, []) if ends else best_of_all(torch.cat((ids, torch.tensor([[token]])), 1), eos, steps - 1)
        found.append((log_prob + total, [token, *tokens]))
    return max(found)


# %%
starts = [torch.tensor([[2, first]]) for first in range(4)]
best = [best_of_all(ids, 1, 4)[1] for ids in starts]
greedy = [greedy_loop(toy_logits, ids, 1, 0, 4)[0].tolist() for ids in starts]
print(f"greedy decoding finds the best sequence in {sum(map(list.__eq__, greedy, best))} of 4 toy cases")
assert greedy != best
if beam_search := globals().get("beam_search"):
    assert [beam_search(toy_logits, ids, 1, 1, 4) for ids in starts] == greedy, "a width of 1 is not greedy yet"
    assert [beam_search(toy_logits, ids, 1, 300, 4) for ids in starts] == best, "a huge width has to find the best"
    prompt = generation.prepare_inputs(processor, [unfamiliar[row].image], "caption en")
    with torch.no_grad():
        encoded = model.encode_image(prompt["pixel_values"])
        for width_of_beam in (1, 4):
            found = beam_search(next_logits, prompt["input_ids"], processor.eos_token_id, width_of_beam, 16)
            print(f"width {width_of_beam}: {processor.decode(found)}")
    print("beam_search passed")
else:
    print("beam_search is not written yet.")

# %% [markdown]
# **You have built PaliGemma.** If anything is still open in the table above, go back to its chapter, starting from
# [00 · Start here](00_start_here.ipynb). How the model draws the outline of an object is the subject of
# [lab L0](labs/L0_masks.ipynb).
