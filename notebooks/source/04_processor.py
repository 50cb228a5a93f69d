# %% [markdown]
# # 04 · The processor
#
# **What does the model actually receive?**
#
# | | |
# |---|---|
# | know first | chapter 03: an image becomes P patches, one token each |
# | you will build | every step from a photo and a sentence to the five tensors that PaliGemma takes |
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
# 1. A photo is twice as wide as it is high, but the model takes squares. Is the photo cropped, padded or squashed?
# 2. Our small model cuts an image into 49 patches. How many tokens does it receive for an image and the prompt
#    `caption en`?
# 3. You forget the newline at the end of the prompt. Does the model crash? Is the caption still correct?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. Squashed: everything stays in the image, and circles become ellipses.
# 2. 53: 49 for the image, then `<bos>`, `caption`, ` en` and the newline.
# 3. Nothing crashes, but the captions suffer. Below you will count how many are still correct.
#
# </details>

# %% [markdown]
# ## A toy example: four pixels
#
# An image file stores bytes from 0 to 255 in the order row, column, color: `[H, W, 3]`. SigLIP expects numbers from −1
# to 1 in the order color, row, column: `[3, H, W]`. Here are four pixels: red and green in the first row, blue and gray
# in the second.

# %%
tiny = torch.tensor([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [128, 128, 128]]], dtype=torch.uint8)
viz.image_row([tiny], ["two rows, two columns, three channels"])

# %% [markdown]
# By hand: 255 becomes 255 / 255 = 1, then (1 − 0.5) / 0.5 = 1. 0 becomes −1. 128 becomes 0.004, close to the middle.
#
# ### The slow loop
#
# One number at a time:

# %%
slow = torch.zeros(3, 2, 2)
for row in range(2):
    for column in range(2):
        for color in range(3):
            value = tiny[row, column, color].item() / 255  # 0…1
            slow[color, row, column] = (value - 0.5) / 0.5  # −1…1
print("red:\n", slow[0])
assert slow[0].tolist()[0] == [1, -1] and abs(slow[0, 1, 1].item()) < 0.01

# %% [markdown]
# ## A photo, step by step
#
# **Step 1: RGB.** Three bytes per pixel: red, green and blue. This file needs no conversion. Others do, as you will
# see.
#
# **Step 2: resize** to a square, 112 × 112 pixels for our model and 224, 448 or 896 for PaliGemma's. Each new pixel is
# computed from the old ones around it (*bicubic*, as in transformers; big_vision uses *bilinear*).

# %%
from PIL import Image

processor = minivlm.Processor.from_pretrained()
photo = Image.open(hub.DATA / "images" / "rocket.jpg")
rgb = minivlm.processor.to_rgb(photo)
square = torch.tensor(minivlm.processor.resize(rgb, processor.image_size))
assert square.shape == (112, 112, 3) and square.dtype == torch.uint8
viz.image_row([rgb, square], [f"the file, {rgb.width} × {rgb.height}", "resized, 112 × 112: squashed"])

# %% [markdown]
# **Step 3: rescale**, 0…255 → 0…1. **Step 4: normalize**, (x − mean) / std, with mean 0.5 and std 0.5 in all three
# channels. CLIP and many other models use other numbers. The checkpoint's `preprocessor_config.json` says which.

# %%
rescaled = minivlm.processor.rescale(square)
normalized = minivlm.processor.normalize(rescaled, processor.mean, processor.std)
for name, x in (("resized", square), ("rescaled", rescaled), ("normalized", normalized)):
    print(f"{name:10} {list(x.shape)} {str(x.dtype):13} from {x.min().item():6.3f} to {x.max().item():5.3f}")
assert normalized.min() >= -1 and normalized.max() <= 1
viz.image_row(
    [rescaled, normalized.clamp(0, 1)],
    ["rescaled", "normalized, plotted as if it were 0…1: everything dark turns black"],
)

# %% [markdown]
# With these numbers, x becomes 2x − 1. Here is the distribution of the values before and after. It is shifted and
# stretched, but its shape stays the same:

# %%
assert torch.allclose(normalized, 2 * rescaled - 1, atol=1e-6)
edges = torch.linspace(-1, 1, 41)
centers = ((edges[1:] + edges[:-1]) / 2).tolist()
counts = {
    name: torch.histogram(x.flatten(), edges).hist.tolist()
    for name, x in (("rescaled", rescaled), ("normalized", normalized))
}
viz.lines({name: (centers, c) for name, c in counts.items()}, "The photo's pixel values", "value", "count")

# %% [markdown]
# ## Exercise 4.1 · Normalize
#
# `pixels` is `[H, W, 3]` or `[B, H, W, 3]` in 0…1. `mean` and `std` are lists of three numbers, one per channel.


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
# From here on, the chapter uses your function if it passed, and the package's if it did not.
#
# **Step 5: channels first.** torch's convolutions expect `[3, H, W]`. Here are the three channels of our photo, one at
# a time:

# %%
normalize = exercises.piece("normalize")
normalized = normalize(rescaled, processor.mean, processor.std)
pixels = minivlm.processor.channels_first(normalized)
assert pixels.shape == (3, 112, 112)
assert torch.equal(pixels[2, 5, 7], normalized[5, 7, 2])  # blue of row 5, column 7
viz.image_row(list(pixels), ["red", "green", "blue"], title="[3, H, W]: the brighter, the more of that color")

# %% [markdown]
# ## Exercise 4.2 · Channels first
#
# `[H, W, 3]` → `[3, H, W]`, and `[B, H, W, 3]` → `[B, 3, H, W]` with the same function.


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
# ## Break it: the pixels
#
# `view` and `reshape` also return `[3, 112, 112]`, but they do not move a single number. The "red" channel is now the
# top third of the image, with red, green and blue interleaved:

# %%
reshaped = normalized.reshape(3, 112, 112)
viz.image_row(list(reshaped), ["“red”", "“green”", "“blue”"], title="After reshape: the right shape, the wrong numbers")

# %% [markdown]
# We try this bug and others like it on the model, and count the correct captions for 24 scenes:

# %%
from tqdm.auto import tqdm

from minivlm.generation import generate_ids

model = minivlm.PaliGemma.from_pretrained()
scenes = [emoji.make_scene(seed, "validation") for seed in range(24)]


def count_correct_captions(change=lambda batch: batch):
    """How many captions are correct after this function has changed the batch, and the first caption."""
    batch = change(processor(text=["caption en"] * len(scenes), images=[scene.image for scene in scenes]))
    answers = [processor.decode(ids) for ids in generate_ids(model, batch, max_new_tokens=16).sequences]
    truths = [scene.examples[0].answers[0] for scene in scenes]
    return sum(map(emoji.same_caption, answers, truths)), answers[0]


# %%
bugs = {
    "no bug": lambda x: x,
    "reshape instead of permute": lambda x: x.movedim(1, -1).reshape(x.shape),
    "not normalized, 0…1": lambda x: (x + 1) / 2,
    "not rescaled, 0…255": lambda x: (x + 1) * 127.5,
    "blue, green, red": lambda x: x.flip(1),
    "rows and columns swapped": lambda x: x.transpose(2, 3),
}

# %%
correct = {}
for name, bug in tqdm(bugs.items(), unit="run"):
    correct[name], first = count_correct_captions(
        lambda batch, bug=bug: batch | {"pixel_values": bug(batch["pixel_values"])}
    )
    print(f"{name:27} {correct[name]:2} of {len(scenes)} correct, the first: {first[:60]}")
assert correct["no bug"] > max(correct["reshape instead of permute"], correct["not normalized, 0…1"])

# %% [markdown]
# None of these bugs crashes. Some answers are plainly broken. Others read like good captions and are wrong. The only
# fix is to prepare images exactly as in training. Check the numbers (minimum, maximum, shape), and plot what goes into
# the model.
#
# ## Unusual images
#
# Not every file stores three bytes per pixel. PIL's `convert("RGB")` handles most of them and gets three wrong:
# transparency, 16-bit gray, and photos that were taken upright but stored sideways, with a note (*EXIF orientation*)
# that says how to rotate them. We create one file of each kind in memory:

# %%
import io
import warnings

import numpy as np


def as_file(image, **options):
    """Save as PNG and open again, as if it came from a disk."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return Image.open(buffer)


# %%
warnings.filterwarnings("ignore", message="Palette images")  # PIL only warns; we look at the result below
sprite = Image.fromarray(emoji.draw_sprite("cat", "noto", 96), "RGBA").convert("RGBA")
exif = Image.Exif()
exif[0x0112] = 6  # the tag "orientation": rotate by 90° clockwise
ramp = Image.fromarray(np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16))
unusual = {
    "gray": as_file(rgb.convert("L")),
    "palette, with a transparent color": as_file(sprite.quantize(16)),
    "RGBA": as_file(sprite),
    "16-bit gray": as_file(ramp),
    "EXIF: rotate me": as_file(rgb.rotate(90, expand=True), exif=exif),
}

# %%
by_pil = [image.convert("RGB") for image in unusual.values()]
by_us = [minivlm.processor.to_rgb(image) for image in unusual.values()]
assert all(image.mode == "RGB" for image in by_us)
assert by_us[2].getpixel((0, 0)) == (255, 255, 255) != by_pil[2].getpixel((0, 0))  # the sprite's corner is transparent
assert by_us[3].getpixel((0, 0)) == (0, 0, 0) and by_us[3].getpixel((95, 95)) == (255, 255, 255)
assert (np.asarray(by_pil[3]) == 255).mean() > 0.95  # nearly everything is white
assert by_us[4].size == rgb.size == by_pil[4].size[::-1]
titles = [f"{name}\nmode {image.mode}" for name, image in unusual.items()]
viz.image_row(by_pil + by_us, titles + ["to_rgb"] * 5, title='Above: convert("RGB"). Below: our to_rgb')

# %% [markdown]
# Our `to_rgb` puts a white background behind transparent pixels, as transformers does. It scales 16-bit gray, so 65535
# becomes 255 (PIL clips at 255, so nearly everything turns white). The sideways photo is upright. And whatever the
# file, the result is the same kind of tensor:

# %%
batch = processor.preprocess_images(list(unusual.values()))
print(list(batch.shape), batch.dtype, f"from {batch.min():.2f} to {batch.max():.2f}")
assert batch.shape == (5, 3, 112, 112) and batch.min() >= -1 and batch.max() <= 1

# %% [markdown]
# ## Text becomes token ids
#
# A *tokenizer* splits text into tokens from its vocabulary. Each token has a number, its *id*. Ours was trained like
# Gemma's (byte-pair encoding), but on the sentences of our scenes, so its vocabulary is small. `▁` stands for a space,
# which belongs to the token after it:

# %%
for text in ("caption en\n", "answer en how many zebras are there?", "Caption en", "café"):
    encoded = processor.tokenizer.encode(text, add_special_tokens=False)
    print(f"{text!r:40}", list(zip(encoded.tokens, encoded.ids, strict=True)))

# %% [markdown]
# Words that were rare in training are split into several tokens, and unknown characters into bytes, so any text can be
# encoded, and decoded again:

# %%
rare = "the 🦄 ate crème brûlée in 東京"
ids = processor.encode([rare])[0]
print(len(rare), "characters,", len(ids), "tokens:", [processor.tokenizer.id_to_token(i) for i in ids][:12], "…")
assert processor.decode(ids) == rare

# %% [markdown]
#
# ### 1,024 + 128 + 1 extra tokens
#
# PaliGemma adds tokens that no ordinary text contains:
#
# * `<loc0000>` … `<loc1023>`: positions along one side of the image. Four of them describe a box.
# * `<seg000>` … `<seg127>`: codes for shapes. Sixteen of them describe the mask of an object (lab L0 decodes them).
#   There are **128**, not 108 as some explanations say. 108 is something else: the id of the newline in Gemma's
#   vocabulary.
# * `<image>`: a placeholder for one patch.

# %%
vocabulary = processor.tokenizer.get_vocab()
locations = sorted(token for token in vocabulary if token.startswith("<loc"))
shapes = sorted(token for token in vocabulary if token.startswith("<seg"))
print(len(vocabulary), "tokens in all")
print(len(locations), "location tokens, from", locations[0], "to", locations[-1])
print(len(shapes), "shape tokens, from", shapes[0], "to", shapes[-1])
assert (len(locations), len(shapes)) == (1024, 128)

# %% [markdown]
# Their ids are consecutive, and `<image>` comes last. Gemma has 256,000 tokens of its own, so in PaliGemma:

# %%
loc_id = 256_000
seg_id = loc_id + 1024
image_id = seg_id + 128
print("<loc0000>", loc_id, " <seg000>", seg_id, " <image>", image_id, " rows of the embedding table, padded:", 257_216)
assert image_id == 257_152 and 257_216 % 64 == 0
ours = [processor.tokenizer.token_to_id(token) for token in ("<loc0000>", "<seg000>", "<image>")]
assert (ours[1] - ours[0], ours[2] - ours[1]) == (1024, 128)

# %% [markdown]
# The order matters. If you add `<image>` to Gemma's tokenizer first, it gets the id 256,000, which in the weights is a
# location token.
#
# ## The prompt
#
#     <image> … <image> <bos> caption en ↵
#
# There is one `<image>` per patch, then `<bos>`, which marks the beginning of the text, then the *prefix* (the task or
# the question), and a newline that says: the question is over, now answer. The strip shows every token with its id,
# colored by kind. A run of equal tokens is drawn as one box with a count.

# %%
scene = next(s for s in scenes if len(s.objects) == 2)
batch = processor(text="caption en", images=scene.image)
assert batch["input_ids"].shape == (1, 49 + 4)
viz.token_strip(batch, processor, title="caption en")

# %% [markdown]
# `<image>` is only a *placeholder*. The model never uses its embedding; it puts the vectors of the image in these
# positions.

# %%
with torch.no_grad():
    features = model.encode_image(batch["pixel_values"])
    embedded = model.embed(batch["input_ids"], features)
assert torch.equal(embedded[:, :49], features)

# %% [markdown]
# ## Exercise 4.3 · Build the prompt
#
# Return the whole prompt as one string.


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
# ## Break it again: the prompt
#
# The prompt has 53 tokens: 0 to 48 are the image, 49 is `<bos>`, 50 and 51 are the prefix and 52 is the newline. We
# drop, repeat or move some of them and count correct captions as before:

# %%
positions = list(range(53))
layouts = {
    "as in training": positions,
    "no newline": positions[:52],
    "no <bos>": positions[:49] + positions[50:],
    "neither": positions[:49] + positions[50:52],
    "two newlines": positions + [52],
    "<bos> before the image": [49] + positions[:49] + positions[50:],
    "image after the text": positions[49:] + positions[:49],
}


def rearrange(batch, order):
    return {name: value if name == "pixel_values" else value[:, order] for name, value in batch.items()}


# %%
correct = {}
for name, order in tqdm(layouts.items(), unit="run"):
    correct[name], first = count_correct_captions(lambda batch, order=order: rearrange(batch, order))
    print(f"{name:25} {correct[name]:2} of {len(scenes)} correct, the first: {first!r}")
assert correct["as in training"] >= correct["no <bos>"] > correct["no newline"] + 10

# %% [markdown]
# Each token predicts the next one. In every training example, the newline predicted the first token of the answer.
# Without the newline, the last token of the prefix has to do that, and it never learned to: the caption above lacks its
# first word. `<bos>` is only attended to, so losing it hurts less. This model hardly notices; another may.
#
# A newline is also easy to double. The processor adds one, so leave it out of your prompts.
#
# ## Batches and padding
#
# All rows of a tensor have the same length. Short prompts are filled up with `<pad>`, and `attention_mask` says which
# tokens are real: 1 on tokens, 0 on padding.

# %%
prompts = ["caption en", "answer en how many objects are there?"]
left = processor(text=prompts, images=[scene.image] * 2, padding_side="left")
right = processor(text=prompts, images=[scene.image] * 2, padding_side="right")
print("left: ", left["attention_mask"][0].tolist())
print("right:", right["attention_mask"][0].tolist())
assert torch.equal(left["attention_mask"].sum(1), right["attention_mask"].sum(1))
viz.token_strip(left, processor, title="Padded on the left, for generation: every row ends with its newline")

# %%
newline = processor.tokenizer.token_to_id("\n")
assert (left["input_ids"][:, -1] == newline).all() and not (right["input_ids"][:, -1] == newline).all()
viz.token_strip(right, processor, title="Padded on the right, for training")

# %% [markdown]
# Both figures show the columns of the batch: what is in one column is at the same place in both rows. During
# generation, the next token is appended after the last column, in all rows at once. So padding goes on the left.
# Chapter 05 shows how the mask keeps tokens from attending to padding.
#
# ## Exercise 4.4 · Pad
#
# `rows` is a list of lists of integers. Return a numpy array `[B, T]` of dtype `np.int64`, where T is the length of the
# longest row. Shorter rows are filled up with `value` on `side`, which is `"left"` or `"right"`.


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
# ## Training: the prompt with its answer
#
# For training, the processor also takes the answer, the *suffix*, and appends `<eos>`, the end-of-sequence token. Two
# more tensors tell the parts apart:
#
# * `token_type_ids`: 0 on image and prefix, 1 on the suffix. Chapter 05 builds the mask from it.
# * `labels`: the suffix's own ids, and −100 everywhere else. There is nothing to learn from predicting the question.

# %%
example = next(e for e in scene.examples if e.kind == "detect")
batch = processor(text=example.prompt, images=scene.image, suffix=example.answers[0])
for name in ("input_ids", "token_type_ids", "labels"):
    print(f"{name:15}", batch[name][0, 48:].tolist())
assert torch.equal(batch["labels"] != -100, batch["token_type_ids"] == 1)
viz.token_strip(batch, processor, title=f"{example.prompt}, with its answer")

# %% [markdown]
# On padding, too, the type is 0 and the label −100 (drawn as a dash). Two rows with their answers:

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
# ## Exercise 4.5 · Assemble a batch
#
# `prompts` and `answers` are lists of lists of ids. Every answer already ends with `<eos>`. Return four arrays `[B, T]`
# of dtype `np.int64`: `input_ids`, `attention_mask`, `token_type_ids`, `labels`. You can call `pad`.


# %%
def assemble(prompts, answers, pad_id, side):
    """B lists, B lists, a number, "left" or "right" → four arrays [B, T]."""
    ### BEGIN SOLUTION
    pairs = list(zip(prompts, answers, strict=True))
    ids = pad([[*prompt, *answer] for prompt, answer in pairs], pad_id, side)
    mask = pad([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0, side)
    types = pad([[0] * len(prompt) + [1] * len(answer) for prompt, answer in pairs], 0, side)
    return ids, mask, types, np.where(types == 1, ids, -100)
    ### END SOLUTION


# %%
exercises.check(assemble)
### BEGIN HIDDEN TESTS
exercises.score(assemble, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## It matches
#
# We make a batch with your functions and compare it with the package's:

# %%
assemble = exercises.piece("assemble")
prompts = ["caption en", "answer en where is the cat?", example.prompt]
suffixes = [scene.examples[0].answers[0], "top left", example.answers[0]]
images = [unusual["gray"], photo, unusual["RGBA"]]

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
    """Between the pixels; the integer tensors must be equal."""
    assert all(torch.equal(batch[name], other[name]) for name in names)
    return float((batch["pixel_values"] - other["pixel_values"]).abs().max())


package = processor(text=prompts, images=images, suffix=suffixes, padding_side="left")
difference = largest_difference(mine, package)
print(f"the package: all ids equal, largest difference between pixels {difference:.1e}")
assert difference < 1e-5

# %% [markdown]
# Then we compare the package with transformers, which opens the same folder:

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
    print(f"transformers, padded on the {side}: all ids equal, largest difference between pixels {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# ## Recap
#
# * Pixels: RGB, squashed to a square, 0…1, −1…1, channels first. Every step can go wrong without a crash.
# * Text: `<image>` × P, `<bos>`, prefix, newline. The answer ends with `<eos>`.
# * 1,024 location tokens, 128 shape tokens and `<image>` follow Gemma's own 256,000 tokens, in this order.
# * A batch: `input_ids`, `attention_mask`, `token_type_ids`, `pixel_values`, and `labels` for training.
# * Pad on the left to generate and on the right to train. Padding never has a label.
#
# **Three questions**
#
# <details><summary>1. The prefix ends anyway. Why is the newline needed?</summary>
#
# Prefixes are free text: after "where is the cat" the prefix could go on. The newline is the one token that always
# means "answer now". It is also the token that predicts the first token of the answer.
#
# </details>
#
# <details><summary>2. Two libraries differ by 0.02 in some pixels and agree on all ids. Where would you look?</summary>
#
# At resizing: bicubic or bilinear, with or without antialiasing, on bytes or on floats. A wrong mean or std would shift
# all pixels, and wrong channels would change far more.
#
# </details>
#
# <details><summary>3. A model takes 224 pixels. Can you give it 448, with four times as many placeholders?</summary>
#
# The processor could do it, but the tower has 256 position embeddings and raises an error. Image size, number of
# placeholders and weights belong together. That is why the processor is loaded from the checkpoint's own folder.
#
# </details>
#
# ## Open problem: batches that waste little
#
# Every row of a batch is padded to its longest row, and the model computes the padding too. Given the lengths of many
# prompts and a budget of tokens, rows × longest row, divide the prompts into batches. Write
# `make_batches(lengths, budget)`, which returns a list of batches, each a list of indices into `lengths`. Every index
# occurs exactly once, no batch exceeds the budget, less than 5% of all tokens are padding, and there are at most 15%
# more batches than the tokens alone would fill. This time there is no stub: write the function in a new cell above the
# tests.
#
# <details><summary>A pointer</summary>
#
# Which prompts should share a batch? Ask yourself what a batch wastes if it contains one long prompt and many short
# ones. Once they are in a good order, one pass is enough.
#
# </details>

# %%
lengths = np.random.default_rng(4).integers(20, 400, 500).tolist()
budget = 4096


def cost(batch):
    """Tokens of the padded batch."""
    return len(batch) * max(lengths[i] for i in batch)


in_order = [list(range(i, min(i + 10, 500))) for i in range(0, 500, 10)]  # ten at a time, as they come
print(f"ten at a time: {1 - sum(lengths) / sum(map(cost, in_order)):.0%} of the tokens are padding")
if make_batches := globals().get("make_batches"):
    batches = [list(batch) for batch in make_batches(lengths, budget)]
    assert sorted(i for batch in batches for i in batch) == list(range(500)), "each prompt exactly once"
    assert max(map(cost, batches)) <= budget, "a batch exceeds the budget"
    waste = 1 - sum(lengths) / sum(map(cost, batches))
    assert waste < 0.05, f"{waste:.0%} of the tokens are padding"
    assert len(batches) <= 1.15 * sum(lengths) / budget, f"{len(batches)} batches are too many"
    print(f"make_batches passed: {len(batches)} batches, {waste:.1%} padding")
else:
    print("make_batches is not written yet.")

# %% [markdown]
# **Next:** [05 · The prefix-LM mask](05_prefix_lm_mask.ipynb): which token attends to which.
