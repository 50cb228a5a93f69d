# %% [markdown]
# # 04 · The processor
#
# **What does the model really receive?**
#
# | | |
# |---|---|
# | time | 80 minutes, 43 of them exercises |
# | know first | chapter 03: a picture becomes P patches, each one token |
# | you will build | the way from a photo and a sentence to the five tensors that PaliGemma takes |
# | runs on | CPU, nothing to download |

# %%
import torch

import minivlm
from minivlm import emoji, hub
from minivlm.course import exercises, viz

viz.you_are_here("04")

# %% [markdown]
# ## Predict first
#
# 1. A photo is twice as wide as it is high; the model takes squares. Is the photo cropped, framed or squashed?
# 2. Our small model cuts a picture into 49 patches. How many tokens does it get for a picture and the prompt `caption en`?
# 3. Somebody forgets the newline at the end of the prompt. Does it crash? Is the caption still right?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. Squashed: everything stays in the picture, circles become ellipses.
# 2. 53: 49 for the picture, then `<bos>`, `caption`, ` en` and the newline.
# 3. Nothing crashes. How the caption suffers you will have counted below.
#
# </details>

# %% [markdown]
# ## A toy: four pixels
#
# A file holds a picture as bytes, 0 to 255, in the order row, column, color: `[H, W, 3]`. SigLIP wants numbers from −1
# to 1 in the order color, row, column: `[3, H, W]`. Four pixels: red and green above, blue and gray below.

# %%
tiny = torch.tensor([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [128, 128, 128]]], dtype=torch.uint8)
viz.image_row([tiny], ["two rows, two columns, three colors"])

# %% [markdown]
# By hand: 255 becomes 255 / 255 = 1, then (1 − 0.5) / 0.5 = 1. 0 becomes −1. 128 becomes 0.004, close to the middle.
#
# ### The slow loop
#
# One number after the other:

# %%
slow = torch.zeros(3, 2, 2)
for row in range(2):
    for column in range(2):
        for color in range(3):
            share = tiny[row, column, color].item() / 255  # 0…1
            slow[color, row, column] = (share - 0.5) / 0.5  # −1…1
print("red:\n", slow[0])
assert slow[0].tolist()[0] == [1, -1] and abs(slow[0, 1, 1].item()) < 0.01

# %% [markdown]
# ## A photo, step by step
#
# **Step 1: RGB.** Three bytes a pixel, red, green and blue. For this file there is nothing to do; others are stranger, as
# you will see.
#
# **Step 2: resize** to a square, 112 × 112 pixels for our model and 224, 448 or 896 for PaliGemma's. New pixels are computed
# from the old ones around them (*bicubic*, as transformers does; Big Vision uses *bilinear*).

# %%
from PIL import Image

processor = minivlm.Processor.from_pretrained()
photo = Image.open(hub.DATA / "images" / "rocket.jpg")
rgb = minivlm.processor.to_rgb(photo)
square = torch.tensor(minivlm.processor.resize(rgb, processor.image_size))
assert square.shape == (112, 112, 3) and square.dtype == torch.uint8
viz.image_row([rgb, square], [f"the file, {rgb.width} × {rgb.height}", "resized, 112 × 112: squashed"])

# %% [markdown]
# **Step 3: rescale**, 0…255 → 0…1. **Step 4: normalize**, (x − mean) / std, with mean 0.5 and std 0.5 in all three channels.
# CLIP and many others use other numbers; the checkpoint's file `preprocessor_config.json` holds them.

# %%
rescaled = minivlm.processor.rescale(square)
normalized = minivlm.processor.normalize(rescaled, processor.mean, processor.std)
for name, x in (("resized", square), ("rescaled", rescaled), ("normalized", normalized)):
    print(f"{name:10} {list(x.shape)} {str(x.dtype):13} from {x.min().item():6.3f} to {x.max().item():5.3f}")
assert normalized.min() >= -1 and normalized.max() <= 1
viz.image_row(
    [rescaled, normalized.clamp(0, 1)],
    ["rescaled", "normalized, seen by a viewer that expects 0…1: all that was dark is black"],
)

# %% [markdown]
# How the numbers are spread, before and after. The shape is the same, the place and the width are not:

# %%
edges = torch.linspace(-1, 1, 41)
middles = ((edges[1:] + edges[:-1]) / 2).tolist()
counts = {
    name: torch.histogram(x.flatten(), edges).hist.tolist()
    for name, x in (("rescaled", rescaled), ("normalized", normalized))
}
viz.lines({name: (middles, c) for name, c in counts.items()}, "The numbers of the photo", "value", "how many")

# %% [markdown]
# ## Exercise 4.1 · Normalize ★☆☆ (6 minutes)
#
# `pixels` is `[H, W, 3]` or `[B, H, W, 3]` in 0…1; `mean` and `std` are lists of three numbers, one a channel.
#
# <details><summary>Hint</summary>
#
# `torch.tensor(mean)` has shape `[3]`, and broadcasting lines it up with the last axis.
#
# </details>


# %%
def normalize(pixels, mean, std):
    """[…, H, W, 3], three numbers, three numbers → […, H, W, 3]."""
    ### BEGIN SOLUTION
    return (pixels - torch.tensor(mean)) / torch.tensor(std)
    ### END SOLUTION


# %%
exercises.check(normalize)
### BEGIN HIDDEN TESTS
exercises.score(normalize, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# From here on the chapter uses your function if it passed, and the package's if not.
#
# **Step 5: channels first.** torch's convolutions want `[3, H, W]`. The three maps of our photo, each drawn by itself:

# %%
normalize = exercises.piece("normalize")
normalized = normalize(rescaled, processor.mean, processor.std)
pixels = minivlm.processor.channels_first(normalized)
assert pixels.shape == (3, 112, 112)
assert torch.equal(pixels[2, 5, 7], normalized[5, 7, 2])  # blue of row 5, column 7
viz.image_row(list(pixels), ["red", "green", "blue"], title="[3, H, W]: bright where there is much of it")

# %% [markdown]
# ## Exercise 4.2 · Channels first ★☆☆ (6 minutes)
#
# `[H, W, 3]` → `[3, H, W]`, and `[B, H, W, 3]` → `[B, 3, H, W]` with the same function.
#
# <details><summary>Hint</summary>
#
# `movedim(from, to)` moves one axis; axes counted from the end, −1, −2, −3, do not mind a batch in front.
#
# </details>


# %%
def channels_first(pixels):
    """[…, H, W, 3] → […, 3, H, W]."""
    ### BEGIN SOLUTION
    return pixels.movedim(-1, -3)
    ### END SOLUTION


# %%
exercises.check(channels_first)
### BEGIN HIDDEN TESTS
exercises.score(channels_first, points=2, seed=1)
### END HIDDEN TESTS

# %%
channels_first = exercises.piece("channels_first")
rescaled_tiny = minivlm.processor.rescale(tiny)
assert torch.allclose(channels_first(normalize(rescaled_tiny, [0.5] * 3, [0.5] * 3)), slow, atol=1e-6)

# %% [markdown]
# ## Break it: pixels
#
# `view` and `reshape` also give `[3, 112, 112]`, without moving a single number. The "red" map now is the top third of the
# picture, all its colors in a line:

# %%
reshaped = normalized.reshape(3, 112, 112)
viz.image_row(list(reshaped), ["“red”", "“green”", "“blue”"], title="After reshape: the right shape, the wrong numbers")

# %% [markdown]
# Nothing crashes in the model either. We count right captions of 24 scenes for this bug and others like it:

# %%
from tqdm.auto import tqdm

from minivlm.generation import generate_ids

model = minivlm.PaliGemma.from_pretrained()
some = [emoji.make_scene(seed, "validation") for seed in range(24)]


def captions(change=lambda batch: batch):
    """How many captions are right when this function has changed the batch, and the first caption."""
    batch = change(processor(text=["caption en"] * len(some), images=[scene.image for scene in some]))
    answers = [processor.decode(ids) for ids in generate_ids(model, batch, max_new_tokens=16).sequences]
    truths = [scene.examples[0].answers[0] for scene in some]
    return sum(map(emoji.same_caption, answers, truths)), answers[0]


# %%
bugs = {
    "as it should be": lambda x: x,
    "reshape instead of permute": lambda x: x.movedim(1, -1).reshape(x.shape),
    "not normalized, 0…1": lambda x: (x + 1) / 2,
    "not rescaled, 0…255": lambda x: (x + 1) * 127.5,
    "blue, green, red": lambda x: x.flip(1),
    "on its side": lambda x: x.transpose(2, 3),
}

# %%
counted = {}
for name, bug in tqdm(bugs.items(), unit="run"):
    counted[name], first = captions(lambda batch, bug=bug: batch | {"pixel_values": bug(batch["pixel_values"])})
    print(f"{name:27} {counted[name]:2} of {len(some)} right, the first: {first[:60]}")
assert counted["as it should be"] > max(counted["reshape instead of permute"], counted["not normalized, 0…1"])

# %% [markdown]
# Nothing crashes in any case. Some answers are plainly broken; others read like good captions and are wrong. The one
# repair is to prepare pictures exactly as in training: look at the numbers (smallest, largest, shape), and draw what
# goes into the model.
#
# ## Odd pictures
#
# Not every file holds three bytes a pixel. PIL's `convert("RGB")` takes most of them, and is wrong about three: what is
# transparent, 16-bit gray, and photos that the camera took upright but wrote lying, with a note (*EXIF orientation*) to turn
# them. We make one file of each kind in memory:

# %%
import io
import warnings

import numpy as np


def as_file(image, **options):
    """Written as a PNG and opened again, as if it came from a disk."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return Image.open(buffer)


# %%
warnings.filterwarnings("ignore", message="Palette images")  # PIL says so, and goes on
sprite = Image.fromarray(emoji.draw_sprite("cat", emoji.TRAIN_ARTISTS[0], 96), "RGBa").convert("RGBA")
turned = Image.Exif()
turned[0x0112] = 6  # the tag "orientation": turn me right by a quarter
ramp = Image.fromarray(np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16))
odd = {
    "gray": as_file(rgb.convert("L")),
    "palette, with a transparent color": as_file(sprite.quantize(16)),
    "RGBA": as_file(sprite),
    "16-bit gray": as_file(ramp),
    "EXIF: turn me": as_file(rgb.rotate(90, expand=True), exif=turned),
}

# %%
plain = [image.convert("RGB") for image in odd.values()]
careful = [minivlm.processor.to_rgb(image) for image in odd.values()]
assert all(image.mode == "RGB" for image in careful)
assert careful[2].getpixel((0, 0)) == (255, 255, 255)  # the corner of the sprite is transparent: white
assert careful[3].getpixel((0, 0)) == (0, 0, 0) and careful[3].getpixel((95, 95)) == (255, 255, 255)
assert careful[4].size == rgb.size
titles = [f"{name}\nmode {image.mode}" for name, image in odd.items()]
viz.image_row(plain + careful, titles + ["to_rgb"] * 5, title='Above: convert("RGB"). Below: our to_rgb')

# %% [markdown]
# Transparency is laid over white, as transformers does. 65535 becomes 255 (PIL cuts off at 255, so nearly all is white).
# The turned photo stands upright. And whatever the file, out comes the same kind of tensor:

# %%
batch = processor.preprocess_images(list(odd.values()))
print(list(batch.shape), batch.dtype, f"from {batch.min():.2f} to {batch.max():.2f}")
assert batch.shape == (5, 3, 112, 112) and batch.min() >= -1 and batch.max() <= 1

# %% [markdown]
# ## Text becomes numbers
#
# A *tokenizer* cuts text into pieces of its vocabulary, each with a number, its *id*. Ours was trained as Gemma's is
# (byte-pair encoding), on the sentences of our scenes, so it is small. `▁` stands for a space, which belongs to the
# word after it:

# %%
for text in ("caption en\n", "answer en how many zebras are there?", "Caption en", "café"):
    encoded = processor.tokenizer.encode(text, add_special_tokens=False)
    print(f"{text!r:40}", list(zip(encoded.tokens, encoded.ids, strict=True)))

# %% [markdown]
# What was rare in training falls into smaller pieces, and what is unknown into bytes, so nothing is impossible to write.
#
# ### 1,024 + 128 + 1 extra tokens
#
# PaliGemma adds words that no text has:
#
# * `<loc0000>` … `<loc1023>`: places along a side of the picture. Four of them are a box.
# * `<seg000>` … `<seg127>`: shapes. Sixteen of them are the mask of a thing (chapter 08 reads them).
#   There are **128**, not 108 as some explanations say: 108 is something else, the id of the newline in Gemma's
#   vocabulary.
# * `<image>`: holds the place of a patch.

# %%
vocabulary = processor.tokenizer.get_vocab()
places = sorted(word for word in vocabulary if word.startswith("<loc"))
shapes = sorted(word for word in vocabulary if word.startswith("<seg"))
print(len(vocabulary), "tokens in all")
print(len(places), "places, from", places[0], "to", places[-1])
print(len(shapes), "shapes, from", shapes[0], "to", shapes[-1])
assert (len(places), len(shapes)) == (1024, 128)

# %% [markdown]
# They follow each other, and `<image>` comes last. Gemma has 256,000 tokens of its own, so in PaliGemma:

# %%
first_place = 256_000
first_shape = first_place + 1024
image = first_shape + 128
print("<loc0000>", first_place, " <seg000>", first_shape, " <image>", image, " rows of the table, padded:", 257_216)
assert image == 257_152 and 257_216 % 64 == 0
ours = [processor.tokenizer.token_to_id(word) for word in ("<loc0000>", "<seg000>", "<image>")]
assert (ours[1] - ours[0], ours[2] - ours[1]) == (1024, 128)

# %% [markdown]
# The order matters. Who adds `<image>` to Gemma's tokenizer before the others gives it the id 256,000, which in the weights
# is a place.
#
# ## The prompt
#
#     <image> … <image> <bos> caption en ↵
#
# One `<image>` for each patch, the beginning of text `<bos>`, the *prefix* (what is asked), and a newline that says: the
# question is over, now answer. The strip shows every token with its id, colored by its kind; repeats of one token are
# drawn as one box, × how many.

# %%
scene = next(s for s in some if len(s.objects) == 2)
batch = processor(text="caption en", images=scene.image)
assert batch["input_ids"].shape == (1, 49 + 4)
viz.token_strip(batch, processor, title="caption en")

# %% [markdown]
# `<image>` is a *placeholder*: the model never looks up what it means, it puts the picture's vectors in these places.

# %%
with torch.no_grad():
    features = model.encode_image(batch["pixel_values"])
    embedded = model.embed(batch["input_ids"], features)
assert torch.equal(embedded[:, :49], features)

# %% [markdown]
# ## Exercise 4.3 · Build the prompt ★☆☆ (6 minutes)
#
# Return the whole prompt as one text.
#
# <details><summary>Hint</summary>
#
# Texts are joined by `+` and repeated by `*`. Nothing stands between the parts, not even a space.
#
# </details>


# %%
def build_prompt(prefix, bos_token, image_token, num_image_tokens):
    """("caption en", "<bos>", "<image>", 2) → "<image><image><bos>caption en" and a newline."""
    ### BEGIN SOLUTION
    return image_token * num_image_tokens + bos_token + prefix + "\n"
    ### END SOLUTION


# %%
exercises.check(build_prompt)
### BEGIN HIDDEN TESTS
exercises.score(build_prompt, points=2, seed=1)
### END HIDDEN TESTS

# %%
build_prompt = exercises.piece("build_prompt")
ids = processor.encode([build_prompt("caption en", "<bos>", "<image>", 49)])
assert ids == batch["input_ids"].tolist()

# %% [markdown]
# ## Break it again: a token too few
#
# A prompt of 53 tokens: 0 to 48 are the picture, 49 is `<bos>`, 50 and 51 the words, 52 the newline. We leave some out or move
# them, and count right captions as before:

# %%
columns = list(range(53))
layouts = {
    "as it should be": columns,
    "no newline": columns[:52],
    "no <bos>": columns[:49] + columns[50:],
    "neither": columns[:49] + columns[50:52],
    "two newlines": columns + [52],
    "<bos> before the picture": [49] + columns[:49] + columns[50:],
    "picture after the text": columns[49:] + columns[:49],
}


def rearranged(batch, order):
    return {name: value if name == "pixel_values" else value[:, order] for name, value in batch.items()}


# %%
counted = {}
for name, order in tqdm(layouts.items(), unit="run"):
    counted[name], first = captions(lambda batch, order=order: rearranged(batch, order))
    print(f"{name:25} {counted[name]:2} of {len(some)} right, the first: {first!r}")
assert counted["as it should be"] > counted["no newline"]

# %% [markdown]
# Each token writes the next one. The newline is the one that writes the first word of the answer, in every example of
# training; without it a word of the prompt has to, which never learned to. `<bos>` is only looked at, so its loss hurts
# less; how much, differs from model to model.
#
# The newline is also easy to double: the processor adds it, so a prompt must not bring its own.
#
# ## Batches and padding
#
# The rows of a tensor have one length. Short prompts are filled up with `<pad>`, and `attention_mask` says what is real: 1
# on tokens, 0 on padding.

# %%
prompts = ["caption en", "answer en how many objects are there?"]
left = processor(text=prompts, images=[scene.image] * 2, padding_side="left")
right = processor(text=prompts, images=[scene.image] * 2, padding_side="right")
print("left: ", left["attention_mask"][0].tolist())
print("right:", right["attention_mask"][0].tolist())
assert torch.equal(left["attention_mask"].sum(1), right["attention_mask"].sum(1))
viz.token_strip(left, processor, title="Padded on the left, for generation: every row ends with its newline")

# %%
viz.token_strip(right, processor, title="Padded on the right, for training")

# %% [markdown]
# To write an answer, the next token is put behind the last column of all rows at once; so padding goes to the left. Chapter
# 05 shows how padding is kept from being looked at.
#
# ## Exercise 4.4 · Pad ★★☆ (10 minutes)
#
# `rows` is a list of lists of integers; return a numpy array `[B, T]` of type `np.int64`, where T is the longest row's
# length, filled with `value` on `side`, `"left"` or `"right"`.
#
# <details><summary>Hint</summary>
#
# Begin with `np.full((len(rows), longest), value, dtype=np.int64)` and write each row into its line: at the start,
# or so that it ends at the end. `line[longest - len(row):]` also works for a row of full length.
#
# </details>


# %%
def pad(rows, value, side):
    """B lists, a number, "left" or "right" → [B, T] of np.int64."""
    ### BEGIN SOLUTION
    longest = max(len(row) for row in rows)
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    for line, row in zip(padded, rows, strict=True):
        start = longest - len(row) if side == "left" else 0
        line[start : start + len(row)] = row
    return padded
    ### END SOLUTION


# %%
exercises.check(pad)
### BEGIN HIDDEN TESTS
exercises.score(pad, points=2, seed=1)
### END HIDDEN TESTS

# %%
pad = exercises.piece("pad")
print(pad([[7, 8, 9], [7]], 0, "left"))
assert pad([[7, 8, 9], [7]], 0, "left").tolist() == [[7, 8, 9], [0, 0, 7]]

# %% [markdown]
# ## An answer to learn from
#
# For training the processor also takes the answer, the *suffix*, and ends it with `<eos>`, the end. Two more tensors say
# what is what:
#
# * `token_type_ids`: 0 on picture and prefix, 1 on the suffix. Chapter 05 makes the mask of it.
# * `labels`: the suffix's own ids, and −100 everywhere else: there is nothing to learn in guessing the question.

# %%
example = next(e for e in scene.examples if e.kind == "detect")
batch = processor(text=example.prompt, images=scene.image, suffix=example.answers[0])
for name in ("input_ids", "token_type_ids", "labels"):
    print(f"{name:15}", batch[name][0, 48:].tolist())
assert torch.equal(batch["labels"] != -100, batch["token_type_ids"] == 1)
viz.token_strip(batch, processor, title=f"{example.prompt}, with its answer")

# %% [markdown]
# On padding types are 0, too, and labels −100 (drawn as a dash). Two rows with their answers:

# %%
training = processor(
    text=["caption en", "answer en how many objects are there?"],
    images=[scene.image] * 2,
    suffix=[scene.examples[0].answers[0], "2"],
    padding_side="right",
)
assert not training["attention_mask"].all()
assert (training["token_type_ids"][training["attention_mask"] == 0] == 0).all()
assert (training["labels"][training["attention_mask"] == 0] == -100).all()
viz.token_strip(training, processor)

# %% [markdown]
# ## Exercise 4.5 · Assemble a batch ★★★ (15 minutes)
#
# `prompts` and `answers` are lists of lists of ids; every answer ends with `<eos>` already. Return four arrays `[B, T]` of
# `np.int64`: `input_ids`, `attention_mask`, `token_type_ids`, `labels`. You may call `pad`.
#
# <details><summary>Hint</summary>
#
# Make three lists of lists before you pad: ids, ones, and zeros and ones. Which value fills each? The labels need no
# padding of their own: `np.where(types == 1, ids, -100)`.
#
# </details>


# %%
def assemble(prompts, answers, pad_id, side):
    """B lists, B lists, a number, "left" or "right" → four arrays [B, T]."""
    ### BEGIN SOLUTION
    pairs = list(zip(prompts, answers, strict=True))
    ids = pad([[*prompt, *answer] for prompt, answer in pairs], pad_id, side)
    seen = pad([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0, side)
    types = pad([[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs], 0, side)
    return ids, seen, types, np.where(types == 1, ids, -100)
    ### END SOLUTION


# %%
exercises.check(assemble)
### BEGIN HIDDEN TESTS
exercises.score(assemble, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## It matches
#
# A batch made of your pieces, against the package:

# %%
assemble = exercises.piece("assemble")
prompts = ["caption en", "answer en where is the cat?", example.prompt]
suffixes = [scene.examples[0].answers[0], "top left", example.answers[0]]
images = [odd["gray"], photo, odd["RGBA"]]

prompt_ids = processor.encode([build_prompt(p, "<bos>", "<image>", 49) for p in prompts])
answer_ids = processor.encode([s + "<eos>" for s in suffixes])
squares = np.stack([minivlm.processor.resize(minivlm.processor.to_rgb(image), 112) for image in images])
names = ("input_ids", "attention_mask", "token_type_ids", "labels")
mine = dict(zip(names, map(torch.from_numpy, assemble(prompt_ids, answer_ids, 0, "left")), strict=True))
mine["pixel_values"] = channels_first(
    normalize(minivlm.processor.rescale(torch.from_numpy(squares)), [0.5] * 3, [0.5] * 3)
)


# %%
def largest_difference(batch, other):
    """Of the pixels; the ids must be equal."""
    assert all(torch.equal(batch[name], other[name]) for name in names)
    return float((batch["pixel_values"] - other["pixel_values"]).abs().max())


package = processor(text=prompts, images=images, suffix=suffixes, padding_side="left")
print("the package: all ids equal, largest difference of a pixel", largest_difference(mine, package))
assert largest_difference(mine, package) < 1e-5

# %% [markdown]
# And against transformers, which opens the same folder:

# %%
import transformers
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

transformers.utils.logging.set_verbosity_error()
folder = minivlm.hub.resolve(None)
tokenizer = transformers.PaliGemmaProcessor.from_pretrained(folder).tokenizer
theirs = transformers.PaliGemmaProcessor(SiglipImageProcessorPil.from_pretrained(folder), tokenizer)

# %%
for side in ("left", "right"):
    reference = theirs(
        text=prompts, images=images, suffix=suffixes, padding=True, padding_side=side, return_tensors="pt"
    )
    package = processor(text=prompts, images=images, suffix=suffixes, padding_side=side)
    difference = largest_difference(package, reference)
    print(f"transformers, padded on the {side}: all ids equal, largest difference of a pixel {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# ## Recap
#
# * Pixels: RGB, squashed to a square, 0…1, −1…1, colors first. Every step can be wrong without a crash.
# * Text: `<image>` × P, `<bos>`, prefix, newline; the answer ends with `<eos>`.
# * 1,024 places, 128 shapes and `<image>` stand behind Gemma's own 256,000 tokens, in this order.
# * A batch: `input_ids`, `attention_mask`, `token_type_ids`, `pixel_values`, and for training `labels`.
# * Padding on the left to generate, on the right to train; never a label on it.
#
# **Three questions**
#
# <details><summary>1. Why is the newline needed, when the prefix ends anyway?</summary>
#
# Prefixes are free text: after "where is the cat" the prefix could go on. The newline is the one token that always means:
# answer now. And it is the token that writes the first word.
#
# </details>
#
# <details><summary>2. Two libraries differ by 0.02 in some pixels and agree on all ids. Where would you look?</summary>
#
# At resizing: bicubic or bilinear, with or without antialiasing, on bytes or on floats. A wrong mean or std would
# shift all pixels, wrong channels would change far more.
#
# </details>
#
# <details><summary>3. Could a picture of 448 pixels be given to a model for 224, if only the placeholders are four times as many?</summary>
#
# The processor could, but the tower has 256 position embeddings and refuses: size, number of placeholders and weights
# belong together. That is why the processor is loaded from the checkpoint's own folder.
#
# </details>
#
# **Next:** [05 · The prefix-LM mask](05_prefix_lm_mask.ipynb): who may look at whom.
