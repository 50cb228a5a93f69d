# %% [markdown]
# # 08 · Full PaliGemma inference
#
# **How does it all answer a question about a picture?**
#
# | | |
# |---|---|
# | time | 110 minutes, 63 of them exercises |
# | know first | what tower, mask, decoder and cache are for (chapters 03, 05, 06, 07); their details are not needed |
# | you will build | the place where picture and text meet, the choice of a word, the loop that writes, the reading of boxes; then you run PaliGemma with your own pieces |
# | runs on | CPU, nothing to download |

# %%
import torch

import minivlm
from minivlm import exercises, generation, locations, paligemma, scenes, viz

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
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. 49 patches, `<bos>`, `caption`, `en` and the newline: 53.
# 2. It does, and badly. The norm hides the length from what a layer reads, but what the layers *add* to a vector that is
#    too long hardly moves it.
# 3. The first alone: it reaches 0.5 by itself.
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
scene = scenes.make_scene(0, "validation")
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

some = [scenes.make_scene(seed, "validation") for seed in range(12)]
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
    right[name] = sum(scenes.same_caption(c, s.captions["caption"][0]) for c, s in zip(captions, some, strict=True))
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
# cosine: whole numbers `[P]`.
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
spelt = [processor.decode([i], skip_special_tokens=False).strip() or "␣" for i in nearest.tolist()]
viz.nearest_words(scene.image, spelt, cosines, title="The nearest of all tokens, and its cosine")

# %% [markdown]
# On the background the nearest token is one and the same, the bare space ␣: nothing to name. On an object it is often
# the thing's name, but not always: at edges, and where two things meet, stand other names, and now and then a place.
# All cosines are small; it is the direction that tells. How often is it the right name? We take the patches that an
# object covers at least half of, in a few scenes, and ask for the nearest of the hundred names:

# %%
names = table[[processor.encode([" " + name])[0][0] for name in scenes.OBJECTS]]
hits = []
for s in some:
    side = len(s.image) // 7
    with torch.no_grad():
        found = nearest_word(model.encode_image(processor.pixels([s.image]))[0], names)
    for thing in s.objects:
        covered = thing.mask.reshape(7, side, 7, side).mean(axis=(1, 3)).ravel() >= 0.5
        hits += [scenes.OBJECTS[i] == thing.name for i in found[torch.from_numpy(covered)].tolist()]
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
# `answer en …` and `detect …` are fixed openings that PaliGemma was trained with; `en` is the language.


# %%
def ask(model, processor, image, prompts) -> list[str]:
    answers = minivlm.generate(model, processor, image, prompts, max_new_tokens=64)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(f"{prompt}\n    {answer}")
    return answers


# %%
first, *_, last = [thing.name for thing in scene.objects]
prompts = ["caption en", f"answer en where is the {last}?"]
prompts += [f"answer en how many {scenes.plural(first)} are there?", "answer en how many objects are there?"]
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
# articles have it; sixteen of them spell the mask of the thing. A later part of the course reads these.)
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
def places_to_box(places, width, height):
    """Four bins 0…1023, y before x, and two sides in pixels → (x0, y0, x1, y1)."""
    ### BEGIN SOLUTION
    y0, x0, y1, x1 = places
    return x0 / 1023 * width, y0 / 1023 * height, x1 / 1023 * width, y1 / 1023 * height
    ### END SOLUTION


# %%
exercises.check(places_to_box)
### BEGIN HIDDEN TESTS
exercises.score(places_to_box, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# There and back, a box moves by half a bin at most. Many demos divide by 1024 instead: training multiplies by 1023
# (big_vision, `configs/proj/paligemma`), so such boxes come out a little too small, and none ever reaches the far edge.

# %%
places_to_box = exercises.piece("places_to_box")
places = tuple(int(text[4:8]) for text in written.split(">")[:4])
there_and_back = places_to_box(places, width, height)
moved = max(abs(a - b) for a, b in zip(thing.box, there_and_back, strict=True))
print(f"{thing.box} → {places} → moved by {moved:.3f} pixels, half a bin is {max(width, height) / 1023 / 2:.3f}")
assert moved <= max(width, height) / 1023 / 2
assert locations.parse(written, width, height).detections[0].label == thing.name
print("the far edge of a 640-pixel picture:", 1023 / 1023 * 640, "or, divided by 1024,", 1023 / 1024 * 640)

# %% [markdown]
# `locations.parse` cuts an answer at `;`, reads each item, and says what it could not read: a model may write anything.
# The model's own boxes:

# %%
from PIL import Image

found = locations.parse(answers[-1], width, height)
print("could not be read:", found.problems or "nothing")
viz.draw_boxes(Image.fromarray(scene.image), found.detections)

# %% [markdown]
# ## Choosing a word
#
# So far each word was the likeliest: *greedy*. That is right for answers and boxes. Where many texts are good, one may
# draw at random instead, and shape what is drawn from. To see it we need a place where the model is unsure: in captions of
# scenes by an artist whose hand it has never seen, the word that it wrote with the least probability. (In the bars, ␣ is
# the space that belongs to a word.)

# %%
strange = [scenes.make_scene(seed, "artist") for seed in range(12)]
inputs = generation.prepare(processor, [s.image for s in strange], "caption en")
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
# ## Exercise 8.4 · Top-p ★★☆ (15 minutes)
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
# ## Exercise 8.5 · The loop that writes ★★★ (20 minutes)
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
inputs = generation.prepare(processor, [s.image for s in some], "caption en")
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
# earlier chapters, in place of its own. The proof is that nothing changes:

# %%
with exercises.plugged_in() as parts:
    mine = ask(model, processor, scene.image, prompts)
    my_boxes = locations.parse(mine[-1], width, height).detections
    my_draws = minivlm.generate(
        model, processor, strange[row].image, rows, do_sample=True, top_p=0.8, seed=0, max_new_tokens=16
    )
    my_loop = greedy_loop(next_logits, inputs["input_ids"], processor.eos_token_id, processor.pad_token_id, 20)
print(parts)

# %%
theirs = locations.parse(answers[-1], width, height).detections
assert mine == answers
assert torch.equal(my_loop, new)
assert my_draws == minivlm.generate(
    model, processor, strange[row].image, rows, do_sample=True, top_p=0.8, seed=0, max_new_tokens=16
)
assert [d.label for d in my_boxes] == [d.label for d in theirs]
assert torch.allclose(torch.tensor([d.box for d in my_boxes]), torch.tensor([d.box for d in theirs]), rtol=1e-5)
viz.draw_boxes(Image.fromarray(scene.image), my_boxes)

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
folder = minivlm.checkpoint.resolve(None)
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
# ## Photos, and the real weights
#
# Our small model has seen nothing but emoji. Shown a photo, it answers all the same, in the only words it has; an empty answer
# to `detect` means that it found none:

# %%
photo = scenes.DATA / "images" / "cat.jpg"
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
#
# What to expect: 256 image tokens in place of 49, and on a CPU patience, since each word reads all the weights once.
# The *mix* checkpoints were trained further, on many tasks at once, so they follow the same prompts: a short English
# caption, a word or two as an answer, `<loc…>` boxes. They know photos, not our hundred emoji. The other pictures in
# `data/images` (coffee, astronaut, rocket, camera) are for you to ask about.

# %%
HUB = None
if HUB:
    big = minivlm.PaliGemma.from_pretrained(HUB, revision="bfloat16")
    big_processor = minivlm.Processor.from_pretrained(HUB, revision="bfloat16")
    with exercises.plugged_in() as parts:
        big_answers = ask(big, big_processor, photo, asked)
    print(parts)
    with Image.open(photo) as picture:
        display(viz.draw_boxes(picture, locations.parse(big_answers[-1], *picture.size).detections))

# %% [markdown]
# ## Recap
#
# * The projector is one linear layer; its vectors take the places of `<image>` in the text's embeddings.
# * Text × √D and picture as it is, or picture ÷ √D and then all × √D: the same. Half of each: wrong answers, and no
#   error.
# * Boxes are text: y min, x min, y max, x max, in bins of 0 to 1023.
# * Greedy takes the likeliest word. Temperature reshapes, top-k and top-p cut off, and only then is one drawn.
# * The loop: choose, pad what has ended, look for `<eos>`, append, again. The picture is encoded once.
#
# **Three questions**
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
# **You have built PaliGemma.** What is left of the table above leads back to its chapters, from
# [00 · Start here](00_start_here.ipynb) on.
