# %% [markdown]
# # 03 · Patch embedding
#
# **How does an image become a sequence?**
#
# | | |
# |---|---|
# | know first | matrix products; what a layer with weights is |
# | you will build | the parts of SigLIP's vision tower: patch embedding, layer norm, pre-norm block, attention |
# | runs on | CPU, nothing to download |

# %%
import torch
import torch.nn.functional as F

from minivlm import siglip
from minivlm.course import exercises, viz

viz.you_are_here("03")

# %% [markdown]
# ## Predict first
#
# A transformer takes a sequence of vectors. An image is a grid of pixels. Before you go on, decide:
#
# 1. An image of 224 × 224 pixels is cut into patches of 14 × 14. How many vectors is that? How many for an image twice
#    as wide and twice as high?
# 2. You shuffle the patches. Can a vision tower without position embeddings notice?
# 3. Attention and MLP each come with a norm. Is the norm applied before them or after them?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. (224 / 14)² = 16² = 256, and four times as many, 1024.
# 2. No. The same vectors come out, shuffled in the same way.
# 3. Before. Many explanations say after. The code and an experiment below show that it is before.
#
# </details>

# %% [markdown]
# ## A toy example: sixteen pixels, four patches
#
# A batch of `B` images with `C` color channels, `H` rows and `W` columns is a tensor `[B, C, H, W]`. Here is one image
# with one channel and 4 × 4 pixels:

# %%
tiny = torch.arange(16.0).reshape(1, 1, 4, 4)
print(tiny[0, 0])

# %% [markdown]
# Cut it into patches of 2 × 2 and read them like a page, left to right and top to bottom. You get the patches 0 1 4 5,
# then 2 3 6 7, then 8 9 12 13, then 10 11 14 15. Note that 1 and 4 are neighbors in their patch, but not in memory.
#
# ### The slow loop
#
# Take one patch at a time, row by row from the top left. Inside a patch the order is color, row, column.


# %%
def patchify_slowly(pixel_values, patch_size):
    """[B, C, H, W] → [B, P, C·h·w], one patch at a time."""
    H, W = pixel_values.shape[2:]
    patches = []
    for top in range(0, H, patch_size):
        for left in range(0, W, patch_size):
            patch = pixel_values[:, :, top : top + patch_size, left : left + patch_size]
            patches.append(patch.flatten(1))
    return torch.stack(patches, dim=1)


slow = patchify_slowly(tiny, 2)
print(slow[0].int().tolist())
assert slow[0, 0].tolist() == [0, 1, 4, 5] and slow[0, 2].tolist() == [8, 9, 12, 13]

# %% [markdown]
# ### See it
#
# One of our emoji scenes, 112 × 112 pixels, cut into patches of 16 × 16. That is the patch size of the small model in
# this course.

# %%
from minivlm import emoji

candidates = (emoji.make_scene(seed, "validation") for seed in range(99))
scene = next(s for s in candidates if len({obj.name for obj in s.objects}) == len(s.objects) == 2)
viz.patch_grid(scene.image, 16)

# %% [markdown]
# ## Exercise 3.1 · Patchify
#
# Do the same without a loop. `H` and `W` are multiples of `patch_size`.


# %%
def patchify(pixel_values, patch_size):
    """[B, C, H, W] → [B, P, C·h·w]: patches row by row from the top left, each laid out as color, row, column."""
    ### BEGIN SOLUTION
    B, C, H, W = pixel_values.shape
    p = patch_size
    split = pixel_values.reshape(B, C, H // p, p, W // p, p)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ### END SOLUTION


# %%
exercises.check(patchify)
### BEGIN HIDDEN TESTS
exercises.score(patchify, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# From here on, the chapter uses your function if it passed, and the package's if it did not:

# %%
patchify = exercises.piece("patchify")
assert torch.equal(patchify(tiny, 2), slow)

# %% [markdown]
# torch can do this too. It calls the operation *unfold*:

# %%
assert torch.equal(F.unfold(tiny, kernel_size=2, stride=2).transpose(1, 2), slow)

# %% [markdown]
# ## From pixels to vectors: one matrix for all patches
#
# A patch of our model is 3 · 16 · 16 = 768 numbers. A matrix `[D, 768]` and a bias turn it into a vector of the tower's
# hidden size `D`. All patches share the same matrix. Each row of the matrix is a *filter*: a small image that is
# compared with the patch.

# %%
import minivlm

model = minivlm.PaliGemma.from_pretrained().requires_grad_(False)  # this chapter does not train the model
processor = minivlm.Processor.from_pretrained()
tower = model.vision_tower.vision_model
weight, bias = tower.embeddings.patch_embedding.weight, tower.embeddings.patch_embedding.bias
pixels = processor.preprocess_images([scene.image])  # chapter 04 explains this step
print("pixels", list(pixels.shape), " weight", list(weight.shape), " bias", list(bias.shape))

# %% [markdown]
# The weights have the shape `[D, C, h, w]` of a convolution. Its stride, the step from one position to the next, equals
# the size of the filter. Written out from the definition:

# %%
by_hand = torch.empty(49, 5)  # the first five filters
for index in range(49):
    top, left = index // 7 * 16, index % 7 * 16
    patch = pixels[0, :, top : top + 16, left : left + 16]
    for d in range(5):
        by_hand[index, d] = (patch * weight[d]).sum() + bias[d]

as_convolution = F.conv2d(pixels, weight, bias, stride=16)
print("convolution:", list(as_convolution.shape))
assert (as_convolution[0, :5].flatten(1).T - by_hand).abs().max() < 1e-5 * by_hand.abs().max()

# %% [markdown]
# ## Exercise 3.2 · The patch embedding
#
# A convolution is unfold plus one matrix product. Write it that way, with `patchify`, or use `F.conv2d`. The result is
# `[B, P, D]`.


# %%
def embed_patches(pixel_values, weight, bias):
    """[B, C, H, W], [D, C, h, w], [D] → [B, P, D]."""
    ### BEGIN SOLUTION
    return patchify(pixel_values, weight.shape[-1]) @ weight.flatten(1).T + bias
    ### END SOLUTION


# %%
exercises.check(embed_patches)
### BEGIN HIDDEN TESTS
exercises.score(embed_patches, points=2, seed=1)
### END HIDDEN TESTS

# %%
embed_patches = exercises.piece("embed_patches")
patches = embed_patches(pixels, weight, bias)
difference = (patches - as_convolution.flatten(2).transpose(1, 2)).abs().max()
print(f"unfold + matmul {list(patches.shape)}, largest difference from the convolution {difference:.1e}")
assert difference < 1e-5 * patches.abs().max()

# %% [markdown]
# ### How many tokens
#
# PaliGemma has 256 = (224 / 14)² image tokens. The number of tokens grows with the square of the image's side.
# Attention compares all tokens with all tokens, so its cost grows with the fourth power.

# %%
from minivlm.config import SiglipVisionConfig

for side, patch_size in ((112, 16), (224, 14), (448, 14), (896, 14)):
    tokens = (side // patch_size) ** 2
    assert tokens == SiglipVisionConfig(image_size=side, patch_size=patch_size).num_image_tokens
    print(f"{side} pixels, patches of {patch_size}: {tokens:5} tokens, {tokens**2:11,} pairs in attention")

# %% [markdown]
# What if the patch size does not divide the image? A convolution moves in whole steps, so it drops what is left at the
# right and at the bottom. Predict first: which patch size from 14 to 56 wastes the most of an image of 112 pixels? Then
# move the sliders until more than half of the image is dropped.

# %%
from PIL import Image


def cut(image_size=112, patch_size=16):
    image = Image.fromarray(scene.image).resize((image_size, image_size))
    side = image_size // patch_size
    used = (side * patch_size / image_size) ** 2
    title = f"{side**2} tokens, {side**4:,} pairs, {1 - used:.0%} of the pixels dropped"
    return viz.patch_grid(image, patch_size, title=title, drop_edge=True)


viz.sliders(cut, image_size=(64, 224, 16), patch_size=(14, 56))

# %%
dropped = {size: 1 - (112 // size * size / 112) ** 2 for size in range(14, 57)}
assert not any(dropped[size] for size in (14, 16, 28, 56)) and max(dropped, key=dropped.get) == 38
assert 1 - (80 // 56 * 56 / 80) ** 2 > 0.5  # one patch of 56 pixels in an image of 80

# %% [markdown]
# ## Break it: a reshape that fits and is wrong
#
# A convolution returns `[B, D, rows, columns]`, but the sequence has to be `[B, P, D]`. Both of these have the right
# shape:
#
# * `x.flatten(2).transpose(1, 2)` moves the axes.
# * `x.flatten(2).reshape(B, P, D)` cuts the same memory in a different way. Every "patch" is now a stretch of one
#   filter's outputs.
#
# Neither crashes. Here is what each does to the model's captions of twelve scenes:

# %%
from unittest.mock import patch as replace

scenes = [emoji.make_scene(seed, "validation") for seed in range(12)]


def count_correct_captions():
    """How many captions are correct, and the first caption."""
    answers = minivlm.generate(model, processor, [s.image for s in scenes], "caption en")
    correct = [emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(answers, scenes, strict=True)]
    return sum(correct), answers[0]


def reshaped(pixel_values, weight, bias):
    x = F.conv2d(pixel_values, weight, bias, stride=16).flatten(2)
    return x.reshape(len(x), -1, len(weight))


# %%
correct, first = count_correct_captions()
with replace.object(siglip, "embed_patches", reshaped):
    correct_reshaped, nonsense = count_correct_captions()
print(f"transposed: {correct} of {len(scenes)} captions correct, the first: {first}")
print(f"reshaped:   {correct_reshaped} of {len(scenes)} captions correct, the first: {nonsense}")
assert correct_reshaped < correct

# %% [markdown]
# No error, no warning, and nonsense instead of captions. The decoder still gets 49 vectors of the right size, but none
# of them describes a patch.
#
# ## Where each patch is: position embeddings
#
# So far nothing says *where* in the image a patch was. SigLIP learns a table `[P, D]`, one vector per position, and
# adds it:

# %%
position_table = tower.embeddings.position_embedding.weight
embedded = tower.embeddings(pixels)
assert position_table.shape == (49, 192)
assert torch.allclose(embedded, patches + position_table, rtol=1e-5, atol=1e-5)

# %% [markdown]
# ### What the tower loses without them
#
# Attention takes weighted means over the patches, and everything else in the tower works on each patch separately.
# Neither depends on the order of the patches. So without the table, shuffled patches produce the same vectors,
# shuffled. If we then average them into one vector for the whole image, no trace of the order is left:

# %%
shuffle = torch.randperm(49, generator=torch.Generator().manual_seed(0))
out, out_shuffled = tower.encoder(patches), tower.encoder(patches[:, shuffle])
assert (out[:, shuffle] - out_shuffled).abs().max() < 1e-5 * out.abs().max()
without_table = (out.mean(1) - out_shuffled.mean(1)).norm() / out.mean(1).norm()

out, out_shuffled = tower.encoder(patches + position_table), tower.encoder(patches[:, shuffle] + position_table)
with_table = (out.mean(1) - out_shuffled.mean(1)).norm() / out.mean(1).norm()
print("relative difference between the mean vectors of an image and of its shuffled patches:")
print(f"without the table {without_table:.0e}, with it {with_table:.3f}")
assert without_table < 1e-5 < with_table

# %% [markdown]
# ### What the whole model loses without them
#
# PaliGemma does not average. All patch vectors go on to the decoder in reading order, and the decoder has positions of
# its own (RoPE, chapter 06). So two sources tell left from right: the table and the order of the image tokens. We
# remove the table, change the order, do both, and ask questions such as "where is the cat?":

# %%
SWAP = {"left": "right", "right": "left"}


def swap_left_right(answer):
    return " ".join(SWAP.get(word, word) for word in answer.split())


questions = [
    (s, e)
    for s in (emoji.make_scene(seed, "validation") for seed in range(40))
    for e in s.examples
    if e.kind == "where" and swap_left_right(e.answers[0]) != e.answers[0]
]
print(len(questions), "questions, such as:", questions[0][1].prompt, "→", questions[0][1].answers[0])

# %%
learned, encode = position_table.clone(), model.encode_image


def count_correct_answers(table, order):
    """With this position table and this order of the image tokens: correct answers, and those with left ↔ right."""
    position_table.data = table
    with replace.object(model, "encode_image", lambda x: encode(x)[:, order]):
        answers = minivlm.generate(model, processor, [s.image for s, _ in questions], [e.prompt for _, e in questions])
    position_table.data = learned
    truths = [e.answers[0] for _, e in questions]
    return [sum(a == f(t) for a, t in zip(answers, truths, strict=True)) for f in (str, swap_left_right)]


# %%
from tqdm.auto import tqdm

reading = torch.arange(49)
orders = {"in order": reading, "mirrored": reading.view(7, 7).flip(1).flatten(), "shuffled": shuffle}
tables = {"learned": learned, "none": torch.zeros_like(learned)}
cases = [(t, o) for o in orders for t in tables]
results = {(t, o): count_correct_answers(tables[t], orders[o]) for t, o in tqdm(cases, unit="run")}
for (t, o), (right, swapped) in results.items():
    print(f"table {t:8} image tokens {o:9} correct {right:2}, left and right swapped {swapped:2}, of {len(questions)}")

# %%
truths = [e.answers[0] for _, e in questions]
by_chance = sum(truths.count(truth) for truth in truths) / len(truths)
print(f"the right answers, dealt to the questions at random: {by_chance:.1f} of {len(truths)} correct on average")
for o in orders:
    (right, swapped), (without, _) = results["learned", o], results["none", o]
    assert right > 2 / 3 * len(truths) and swapped < 0.1 * len(truths) and without < by_chance

# %% [markdown]
# * **With the table**, nearly all answers are correct in order, and most of them stay correct in any other order. The
#   decoder believes what the table has written into each vector, even against the order of the tokens. Mirrored, no
#   answer follows the order to the other side.
# * **Without the table**, no answer is correct, in order either, although the decoder still knows the order of its
#   tokens.
#
# It need not be so. The order of the tokens carries the positions just as well, and a model could read them from there. This
# one was taught otherwise: at the beginning of its training, each patch vector had to tell the box of the object that it
# shows (`minivlm/emoji/recipe.py`, stage `align`), without a decoder. Only the table can say where the patch is, so the
# tower learned to keep the position in the vector, and the decoder learned to read it there.
#
# What did the table learn to tell apart? Each small map compares the embedding of one position with all 49. In large
# towers, the embeddings of neighbors and of positions in the same row or column are similar (arXiv:2010.11929,
# figure 7). So they are here, and the further apart two positions are, the less similar.

# %%
viz.position_similarity(position_table, title="Learned positions: which ones are similar?")

# %%
row, column = reading // 7, reading % 7
cosines = F.cosine_similarity(position_table[:, None], position_table[None], dim=-1)
steps = (row[:, None] - row).abs() + (column[:, None] - column).abs()  # up, down, left or right, between two positions
by_steps = [cosines[steps == n].mean().item() for n in range(5)]
print("mean cosine of two positions", ", ".join(f"{n} steps apart {cosine:.2f}" for n, cosine in enumerate(by_steps)))
assert by_steps == sorted(by_steps, reverse=True) and by_steps[1] > 0.7 and by_steps[4] < 0.2

# %% [markdown]
# ## Norms: keeping numbers in range
#
# The tower normalizes its vectors again and again. Here is a batch of three images, four numbers each:

# %%
x = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [0, 0, 6, 6]])


def standardize(x, axis):
    return (x - x.mean(axis, keepdim=True)) / x.std(axis, keepdim=True, unbiased=False)


print("layer norm, each row separately:\n", standardize(x, 1))
print("batch norm, each column separately:\n", standardize(x, 0))
assert torch.allclose(standardize(x, 1)[0], standardize(x, 1)[1])  # the second row is ten times the first

# %% [markdown]
# By hand, the first row: the mean is 2.5 and the variance (1.5² + 0.5² + 0.5² + 1.5²) / 4 = 1.25, so 1 becomes
# −1.5 / √1.25 = −1.34.
#
# **Layer norm** (arXiv:1607.06450) takes mean and variance over the numbers of one vector. **Batch norm**
# (arXiv:1502.03167) takes them over the batch, separately for each feature. So with batch norm, the result for
# one image depends on the other images in its batch:

# %%
other_batch = x.clone()
other_batch[2] = 100.0  # a different third image
for name, axis in (("layer norm", 1), ("batch norm", 0)):
    before, after = standardize(x, axis)[0], standardize(other_batch, axis)[0]
    print(f"{name}: the numbers of the first image change by at most {(before - after).abs().max():.2f}")
assert torch.equal(standardize(x, 1)[0], standardize(other_batch, 1)[0])

# %% [markdown]
# That is why batch norm keeps running statistics for inference, behaves differently in training and inference, and
# needs large batches. Transformers use layer norm or a relative of it.
#
# ## Exercise 3.3 · Layer norm
#
# Each vector (the last axis) gets mean 0 and variance 1. Then each of its D numbers gets a learned scale, `weight`, and
# a learned shift, `bias`. To avoid a division by zero, add a small number, `eps`, to the variance before you take the
# square root.


# %%
def layer_norm(x, weight, bias, eps):
    """[…, D], [D], [D], a number → […, D]."""
    ### BEGIN SOLUTION
    mean = x.mean(-1, keepdim=True)
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * weight + bias
    ### END SOLUTION


# %%
exercises.check(layer_norm)
### BEGIN HIDDEN TESTS
exercises.score(layer_norm, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ### Internal covariate shift
#
# Batch norm was invented for this reason: while a network trains, the input of each layer keeps changing, because the
# layers before it train too. The authors called that *internal covariate shift*. We train a network of six small layers
# three times, with no norm, with batch norm and with layer norm, and track the spread of the input of layer 6. First
# the network, split before layer 6:


# %%
from torch import nn


def build(norm):
    """256 random inputs; layers 1 to 5 and the norm of layer 6; layer 6 and an output layer."""
    torch.manual_seed(0)
    linear = [nn.Linear(32, 32) for _ in range(6)]
    for layer in linear:
        nn.init.kaiming_normal_(layer.weight)
    before = [part for layer in linear[:5] for part in (norm(32), layer, nn.ReLU())]
    last = nn.Sequential(linear[5], nn.ReLU(), nn.Linear(32, 4))
    return torch.randn(256, 32), nn.Sequential(*before, norm(32)), last


# %%
def train(norm, steps=200):
    """Train the network; return the standard deviation of layer 6's input at each step, and the final loss."""
    x, before, last = build(norm)
    optimizer = torch.optim.SGD([*before.parameters(), *last.parameters()], lr=0.05, momentum=0.9)
    spread = []
    for _ in range(steps):
        hidden = before(x)
        spread.append(hidden.std().item())
        loss = F.mse_loss(last(hidden), torch.sin(2 * x[:, :4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return spread, loss.item()


# %%
norms = {"no norm": nn.Identity, "batch norm": nn.BatchNorm1d, "layer norm": nn.LayerNorm}
runs = {name: train(norm) for name, norm in tqdm(norms.items(), unit="network")}
for name, (spread, loss) in runs.items():
    print(f"{name:10} smallest spread {min(spread):.2f}, largest {max(spread):.2f}   final loss {loss:.4f}")
ratio = {name: max(spread) / min(spread) for name, (spread, _) in runs.items()}
assert ratio["no norm"] > 1.4 and max(ratio["batch norm"], ratio["layer norm"]) < 1.2
assert max(runs["batch norm"][1], runs["layer norm"][1]) < runs["no norm"][1] / 5
curves = {name: (range(len(spread)), spread) for name, (spread, _) in runs.items()}
viz.lines(curves, "Internal covariate shift", "training step", "standard deviation of the input of layer 6")

# %% [markdown]
# The shift is real, both norms stop it, and the loss ends up lower. Whether it is lower *because* the shift stopped is
# disputed. Later work (arXiv:1805.11604) added noise after the norms so that the shift came back, and training went
# just as well. The authors credit a smoother loss landscape instead.
#
# ## Pre-norm or post-norm?
#
# Attention and MLP are the two *sublayers* of a layer. Each has a *residual connection*: its output is added to the
# *residual stream*, the vectors that flow through the tower. There are two places for the norm:
#
# | | formula | used in |
# |---|---|---|
# | post-norm | `x = norm(x + sublayer(x))` | the first transformer (arXiv:1706.03762), BERT |
# | pre-norm | `x = x + sublayer(norm(x))` | ViT (arXiv:2010.11929), SigLIP, Gemma |
#
# ## Exercise 3.4 · The pre-norm block
#
# Write one layer of the tower: attention, then the MLP, each with its own norm. `norm1`, `attention`, `norm2` and `mlp`
# are functions that you can call.


# %%
def pre_norm_block(x, norm1, attention, norm2, mlp):
    """[B, P, D] and four functions of such tensors → [B, P, D]."""
    ### BEGIN SOLUTION
    x = x + attention(norm1(x))
    return x + mlp(norm2(x))
    ### END SOLUTION


# %%
exercises.check(pre_norm_block)
### BEGIN HIDDEN TESTS
exercises.score(pre_norm_block, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ### Which one is SigLIP?
#
# Common explanations of PaliGemma, among them the blog that this course grew from, draw SigLIP as post-norm. The reason
# may be the names of the weights: one of them contains "post".

# %%
import re

names = {re.sub(r"\.\d+", ".0", name) for name in model.vision_tower.state_dict() if "norm" in name}
print(*sorted(names), sep="\n")

# %% [markdown]
# That one exists only once, after the last layer. Names do not show the order inside a layer. The code in transformers
# does:

# %%
import inspect

from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

source = inspect.getsource(SiglipEncoderLayer.forward)
print(source[source.index("        residual =") :])

# %% [markdown]
# First the norm, then the sublayer, then the sum: pre-norm. Now the experiment: we run one of our layers in both orders
# and compare with the same layer in transformers.

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
folder = minivlm.hub.resolve(None)
theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
their_tower = theirs.model.vision_tower

# %%
pre_norm_block = exercises.piece("pre_norm_block")


def post_norm_block(x, norm1, attention, norm2, mlp):
    x = norm1(x + attention(x))
    return norm2(x + mlp(x))


layer = tower.encoder.layers[0]
parts = (layer.layer_norm1, layer.self_attn, layer.layer_norm2, layer.mlp)
with torch.no_grad():
    reference = their_tower.encoder.layers[0](embedded, attention_mask=None)
pre, post = (
    float((block(embedded, *parts) - reference).abs().max() / reference.abs().max())
    for block in (pre_norm_block, post_norm_block)
)
print(f"largest relative difference from transformers: pre-norm {pre:.1e}, post-norm {post:.1e}")
assert pre < 1e-5 and post > 0.01

# %% [markdown]
# ### Why it matters: depth
#
# We build towers with random weights and 3 to 48 layers (SigLIP So400m has 27). For each one we measure the spread of
# the residual stream at the end, how much of the input is left in it (its cosine with the input), and the gradient of
# the last layer's weights.


# %%
def measure(depth, block):
    """Spread of the residual stream, its cosine with the input, and the gradient norm of the last layer's weights."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(hidden_size=64, intermediate_size=256, num_hidden_layers=depth, num_attention_heads=4)
    encoder = siglip.SiglipEncoder(config).apply(siglip.init_linear)
    x, target = torch.randn(2, 4, 16, 64)
    with replace.object(siglip, "pre_norm_block", block):
        out = encoder(x)
    (F.layer_norm(out, (64,)) * target).sum(-1).mean().backward()
    cosine = F.cosine_similarity(x, out, dim=-1).mean()
    return out.std().item(), cosine.item(), encoder.layers[-1].mlp.fc2.weight.grad.norm().item()


# %%
depths = [3, 6, 12, 24, 48]
blocks = {"pre-norm": pre_norm_block, "post-norm": post_norm_block}
measured = {name: [measure(d, f) for d in tqdm(depths, desc=name, unit="tower")] for name, f in blocks.items()}
for name, rows in measured.items():
    for depth, (spread, cosine, gradient) in zip(depths, rows, strict=True):
        print(f"{name:9} {depth:2} layers: spread {spread:5.2f}   cosine {cosine:5.2f}   gradient {gradient:5.2f}")

# %%
pre, post = (torch.tensor(measured[name]) for name in blocks)  # [depths, 3]
print(f"from 3 to 48 layers, 16 times as many, pre-norm: spread × {pre[-1, 0] / pre[0, 0]:.1f}, ", end="")
print(f"gradient ÷ {pre[0, 2] / pre[-1, 2]:.1f}; post-norm: gradient × {post[-1, 2] / post[0, 2]:.1f}")
assert 3 < pre[-1, 0] / pre[0, 0] < 5.5 and 3 < pre[0, 2] / pre[-1, 2] < 5.5  # the square root of 16 is 4
assert 0.7 < post[-1, 2] / post[0, 2] < 1.4 and (post[:, 0] - 1).abs().max() < 0.01
assert pre[-1, 1] > 0.05 > post[-1, 1].abs()  # the cosine with the input

# %%
viz.lines(
    {name: (depths, [spread for spread, _, _ in rows]) for name, rows in measured.items()},
    "Spread of the residual stream after the last layer",
    "layers",
    "standard deviation",
)

# %%
viz.lines(
    {name: (depths, [gradient for _, _, gradient in rows]) for name, rows in measured.items()},
    "Gradient of the last layer's weights",
    "layers",
    "norm of the gradient",
)

# %% [markdown]
# * **Pre-norm**: every sublayer adds about the same amount, so the residual stream grows with the square root of the
#   depth, and part of the input reaches the end. The last norm divides by that larger stream, so the gradient of the
#   last layer shrinks with the square root of the depth. Early updates do not get too large at any depth, so pre-norm
#   trains without a warm-up (arXiv:2002.04745). It needs one last norm to bring the stream back to size:
#   `post_layernorm`.
# * **Post-norm**: every norm brings the stream back to size 1 and shrinks what was there before, until nothing of the
#   input is left. The gradient of the last layer is about as large at 48 layers as at 3. That is why post-norm
#   transformers need a careful warm-up of the learning rate (arXiv:2002.04745 proves both gradient laws).
#
# ## Every patch attends to every patch
#
# Start with one attention head. Each patch has a *query* (what it is looking for), a *key* (what queries are matched
# against) and a *value* (what it passes on). The score of a pair is the dot product of query and key, divided by √d,
# where d is their dimension. For each query, a softmax turns its scores into weights that sum to 1, and the output is
# the weighted mean of the values. Three patches, d = 2, one at a time:

# %%
import math

q, k, v = torch.tensor([[1.0, 0], [0, 1], [2, 2]]), torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.eye(3)[:, :2]
slow, weights = torch.zeros(3, 2), torch.zeros(3, 3)
for query in range(3):
    scores = [float(q[query] @ k[key]) / math.sqrt(2) for key in range(3)]
    total = sum(math.exp(score) for score in scores)
    for key in range(3):
        weights[query, key] = math.exp(scores[key]) / total
        slow[query] += weights[query, key] * v[key]
print(weights.round(decimals=2))
assert torch.allclose(slow, (q @ k.T / math.sqrt(2)).softmax(-1) @ v, rtol=1e-5)

# %% [markdown]
# There is no mask: attention in the tower is *bidirectional*. Text is written from left to right, but an image is there
# all at once, and its top left corner can attend to its bottom right corner.
#
# With several *heads*, the D numbers are split into N groups of d = D / N. Each group does this on its own, with its
# own attention weights, and the results are concatenated.
#
# ## Exercise 3.5 · Bidirectional attention
#
# `q` is `[B, Q, D]`, `k` and `v` are `[B, P, D]`. In the tower every patch is a query, so Q = P. Below, one single
# query will attend to all patches. Head 0 has the first d numbers of each vector, head 1 the next d, and so on.


# %%
def bidirectional_attention(q, k, v, num_heads):
    """[B, Q, D], twice [B, P, D] and the number of heads → [B, Q, D]."""
    ### BEGIN SOLUTION
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    ### END SOLUTION


# %%
exercises.check(bidirectional_attention)
### BEGIN HIDDEN TESTS
exercises.score(bidirectional_attention, points=3, seed=1)
### END HIDDEN TESTS

# %%
bidirectional_attention = exercises.piece("bidirectional_attention")
assert torch.allclose(bidirectional_attention(q[None], k[None], v[None], 1)[0], slow, rtol=1e-5)

# %% [markdown]
# ## One vector for a whole image: three ways
#
# CLIP and SigLIP compare images with texts (chapters 01 and 02), so they need *one* vector per image.
#
# * **[class] token** (BERT, ViT, CLIP): put a learned vector in front of the patches. Its output represents the image.
# * **Mean**: average all patch vectors.
# * **Attention pooling** (SigLIP): a learned query, the *probe*, attends to all patches once, at the end. This is
#   `bidirectional_attention` with one query and 49 keys: Q = 1, P = 49.

# %%
generator = torch.Generator().manual_seed(0)
learned_vector = torch.randn(1, 1, 192, generator=generator)  # random here; training would learn it

with_class = torch.cat([learned_vector, embedded], dim=1)  # [1, 1 + 49, 192]
by_class = tower.encoder(with_class)[:, 0]
features = tower(pixels)
by_mean = features.mean(1)
by_attention = bidirectional_attention(learned_vector, features, features, 4)[:, 0]  # one query, 49 keys
assert by_class.shape == by_mean.shape == by_attention.shape == (1, 192)
no_preference = torch.zeros_like(learned_vector)  # this query gives all patches the same weight
assert torch.allclose(bidirectional_attention(no_preference, features, features, 4)[:, 0], by_mean, atol=1e-5)

# %% [markdown]
# The last line shows how the second and the third are related: the mean is attention pooling with a query that has no
# preference. A learned probe can look for something.

# %% [markdown]
# SigLIP's own head also has matrices for query, key and value, and an MLP at the end. Here is the one from
# transformers, with random weights, and your function doing its attention:

# %%
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

torch.manual_seed(0)
head = SiglipMultiheadAttentionPoolingHead(their_tower.config).requires_grad_(False)
(wq, wk, wv), (bq, bk, bv) = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
q, k, v = F.linear(head.probe, wq, bq), F.linear(features, wk, bk), F.linear(features, wv, bv)
pooled = head.attention.out_proj(bidirectional_attention(q, k, v, 4))
pooled = pooled + head.mlp(head.layernorm(pooled))
print("SigLIP's head:", list(features.shape), "→", list(pooled[:, 0].shape))
assert (pooled[:, 0] - head(features)).abs().max() < 1e-5 * pooled.abs().max()

# %% [markdown]
# **PaliGemma drops this head** and passes all patch vectors to the decoder. In the config this is the setting
# `vision_use_head: false`, and the tower has no weights for a head. What would a single vector lose? We give the
# decoder the mean at every position:

# %%
assert not [name for name in model.vision_tower.state_dict() if "head" in name]


def encode_to_mean(pixel_values):
    features = encode(pixel_values)
    return features.mean(1, keepdim=True).expand_as(features)


with replace.object(model, "encode_image", encode_to_mean):
    correct_pooled, _ = count_correct_captions()
print(f"correct captions, of {len(scenes)}: all patches {correct}, their mean {correct_pooled}")
assert correct_pooled < correct

# %% [markdown]
# To be fair, this model was never trained on a mean. But even a model that was would have to fit into 192 numbers what
# now takes 49 × 192.
#
# ## Inside the trained tower
#
# **The filters** of the patch embedding. These are the ones with the largest weights, each stretched to the full color
# range. What do they respond to?

# %%
largest = weight.flatten(1).norm(dim=1).topk(24).indices
low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
shown = ((weight - low) / (high - low))[largest].permute(0, 2, 3, 1)  # channels last, for plotting
viz.image_row(list(shown), columns=8, title="24 of the 192 filters")

# %% [markdown]
# Many are soft blobs with one color next to its opposite. Such a filter responds where the color changes inside a
# patch. The fine grain is noise: the training was too short to smooth it away. Large towers have cleaner filters
# (arXiv:2010.11929, figure 7).
#
# **What a patch attends to** in each layer, averaged over the heads. The query is the patch at the center of the first
# object. The orange frame marks the patch that gets the most weight:

# %%
weights = viz.tower_attention(model, pixels)
assert all(w.shape == (1, 4, 49, 49) and torch.allclose(w.sum(-1), torch.ones(1, 4, 49)) for w in weights)
x, y = scene.objects[0].center
query = int(y // 16) * 7 + int(x // 16)
by_layer = torch.stack([w[0, :, query].mean(0) for w in weights])
titles = [f"layer {number}" for number in range(len(weights))]
viz.attention_on_image(scene.image, by_layer, titles, f"What patch {query} attends to ({scene.objects[0].name})")

# %% [markdown]
# And the four heads, one at a time. The cross marks the patch that attends, 0 at the top left to 48 at the bottom
# right. Predict first: does a patch of plain background attend to the objects? Then move *layer* and *patch* until you
# have found the head that gives the most to a single patch.


# %%
def heads_of(layer=3, patch=24):
    titles = [f"head {head}" for head in range(4)]
    title = f"What patch {patch} attends to in layer {layer}, head by head"
    return viz.attention_on_image(scene.image, weights[layer][0, :, patch], titles, title, query=patch)


viz.sliders(heads_of, layer=(0, 3), patch=(0, 48))

# %% [markdown]
# In both figures, each map has its own color scale, so compare the percentages, not the colors. The weights show where
# a head reads from, not what it reads, so treat such figures as a hint. Three numbers are safe to read: how much of its
# attention a patch spends on itself, on its neighbors and on all other patches, averaged over all patches and heads.

# %%
row_and_column = torch.stack([torch.arange(49) // 7, torch.arange(49) % 7], dim=1)
distance = (row_and_column[:, None] - row_and_column[None]).abs().amax(-1)  # 0 itself, 1 the eight around it
masks = distance == 0, distance == 1, distance > 1
by_layer = {f"layer {number}": w[0].mean(0) for number, w in enumerate(weights)} | {
    "uniform": torch.full((49, 49), 1 / 49)
}
shares = {name: [float(mean[mask].sum() / 49) for mask in masks] for name, mean in by_layer.items()}
for name, (itself, near, far) in shares.items():
    print(f"{name}: itself {itself:4.0%}   neighbors {near:4.0%}   farther away {far:4.0%}")
*layers, uniform = shares.values()
assert layers[0][2] > 0.6 and all(far < 0.5 for _, _, far in layers[1:])
assert all(itself > 2 * uniform[0] and near > 1.5 * uniform[1] for itself, near, _ in layers)

# %% [markdown]
# Every layer prefers what is near. A patch gives itself at least twice as much weight as uniform attention would, and its
# neighbors at least one and a half times as much. In the first layer, most of the attention still goes farther away. In
# the others it stays within one step: the objects here are two to three patches wide.

# %% [markdown]
# ## It matches
#
# Your functions, one after the other, make up the whole tower. We compare it with the package and with transformers:

# %%
layer_norm = exercises.piece("layer_norm")


def norm(module):
    return lambda x: layer_norm(x, module.weight, module.bias, module.eps)


def attention(module):
    return lambda x: module.out_proj(bidirectional_attention(module.q_proj(x), module.k_proj(x), module.v_proj(x), 4))


x = embed_patches(pixels, weight, bias) + position_table
for layer in tower.encoder.layers:
    x = pre_norm_block(x, norm(layer.layer_norm1), attention(layer.self_attn), norm(layer.layer_norm2), layer.mlp)
mine = norm(tower.post_layernorm)(x)

# %%
with torch.no_grad():
    reference = their_tower(pixels).last_hidden_state
for name, other in (("the package", tower(pixels)), ("transformers", reference)):
    difference = float((mine - other).abs().max() / other.abs().max())
    print(f"{name}: largest relative difference {difference:.1e}")
    assert difference < 1e-5

# %% [markdown]
# ## Recap
#
# * An image becomes P = (side / patch size)² vectors: each patch is flattened and multiplied by the same matrix. This
#   is a convolution whose stride equals its kernel size.
# * A learned table says where each patch is. Without it the tower cannot know the order of the patches. PaliGemma's
#   decoder also has the order of its tokens; ours has learned to rely on the table.
# * Layer norm works on one vector, batch norm on the batch.
# * SigLIP is pre-norm. The residual stream grows with depth, and one last norm brings it back.
# * Attention in the tower has no mask. SigLIP pools with a probe; PaliGemma uses every patch.
#
# **Three questions**
#
# <details><summary>1. A tower was trained on 224 pixels and gets 448. Which weights fit, and which do not?</summary>
#
# The filters, norms, attention and MLPs fit: none of them depends on P. The position table does not: it has 256 rows,
# and 1024 are needed. It is usually interpolated like an image, and the model is trained a little longer.
#
# </details>
#
# <details><summary>2. Why is it fine that the patch embedding has no nonlinearity?</summary>
#
# It only has to bring a patch to the tower's hidden size and preserve what matters (here 768 numbers become 192; in
# SigLIP So400m 588 become 1152). The MLPs of the following layers bring the nonlinearity.
#
# </details>
#
# <details><summary>3. Layer norm discards the length of a vector. What does the next sublayer not know?</summary>
#
# Whether the residual stream was large or small at this patch: a vector and ten times that vector look the same to it.
# The stream itself still has its size, because in a pre-norm layer only the copy is normalized.
#
# </details>
#
# ## For the bold: a larger image
#
# An open problem, with tests but without a stub. Question 1 says that a tower needs a larger position table for larger
# images. Write `resize_positions(table, rows, columns)`. The table `[P, D]` belongs to a square grid of patches. Return
# one for `rows` × `columns` patches that cover the same area, `[rows · columns, D]`: between two old positions, the new
# ones change gradually from one vector to the other. Use a new cell above the tests:


# %%
def neighbor_distances(table, rows, columns):
    """The distance between the embeddings of each two patches that are side by side or one above the other."""
    grid = table.view(rows, columns, -1)
    vertical, horizontal = grid[1:] - grid[:-1], grid[:, 1:] - grid[:, :-1]
    return torch.cat([vertical.norm(dim=-1).flatten(), horizontal.norm(dim=-1).flatten()])


if "resize_positions" in globals():
    assert torch.allclose(resize_positions(position_table, 7, 7), position_table, atol=1e-5)  # nothing to do
    double = resize_positions(position_table, 14, 14)
    assert double.shape == (196, 192)
    before, after = neighbor_distances(position_table, 7, 7), neighbor_distances(double, 14, 14)
    print(f"largest distance between neighbors: {before.max():.2f} before, {after.max():.2f} after")
    assert after.max() < 0.75 * before.max()  # neighbors are closer together now
    heights = resize_positions(row.float()[:, None], 14, 7).view(14, 7)  # a table that only knows the row
    assert (heights - heights[:, :1]).abs().max() < 1e-4 and (heights[1:] > heights[:-1]).all()
    columns_only = resize_positions(column.float()[:, None], 14, 7).view(14, 7)
    assert (columns_only - torch.arange(7)).abs().max() < 1e-4  # twice as many rows do not change the columns
    print("resize_positions passes.")
else:
    print("resize_positions is not written yet.")

# %% [markdown]
# <details><summary>Discussion</summary>
#
# Treat the table as an image with D channels and 7 × 7 pixels, and resize it like one. ViT (arXiv:2010.11929,
# section 3.2) and the code of SigLIP do exactly that. The usual bugs are a `view` where the axes have to be moved, rows
# and columns swapped (invisible as long as both are square), and copying the nearest old vector: then neighbors are
# identical within a pair, and as far apart as before between pairs.
#
# The tower then runs on larger images, but it was never trained on patches that show a smaller part of an object. So a
# short training at the new size follows. PaliGemma was trained at 224 pixels first and then at 448 and 896, for much
# less time (stage 2 in section 3.2 of the paper).
#
# </details>
#
# **Next:** [04 · The processor](04_processor.ipynb), which produces the pixels that this chapter took for granted.
