# %% [markdown]
# # 03 · Patch embedding
#
# **How does a picture become a sequence?**
#
# | | |
# |---|---|
# | time | 100 minutes, 53 of them exercises |
# | know first | matrix products; what a layer with weights is |
# | you will build | the parts of SigLIP's vision tower: patches, their embedding, layer norm, the pre-norm block, attention |
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
# A transformer reads a sequence of vectors. A picture is a square of pixels. Decide, before you go on:
#
# 1. A picture of 224 × 224 pixels is cut into patches of 14 × 14. How many vectors is that, and how many for a picture
#    of twice the side?
# 2. Somebody shuffles the patches. Can a vision tower without position embeddings notice?
# 3. Each block of the tower (attention, MLP) comes with a norm. Does it stand before the block or after it?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. (224 / 14)² = 16² = 256, and four times as many, 1024.
# 2. No. The same vectors come out, shuffled in the same way.
# 3. Before. Many explanations say after; the code and an experiment below say before.
#
# </details>

# %% [markdown]
# ## A toy: sixteen pixels, four patches
#
# `B` pictures of `C` colors, `H` rows and `W` columns are a tensor `[B, C, H, W]`. Here is one picture of one color,
# with 4 × 4 pixels:

# %%
tiny = torch.arange(16.0).reshape(1, 1, 4, 4)
print(tiny[0, 0])

# %% [markdown]
# Cut into patches of 2 × 2 and read as a page is, it becomes the sequence 0 1 4 5, then 2 3 6 7, then 8 9 12 13, then
# 10 11 14 15. Mind that 1 and 4 are neighbors in their patch, but not in memory.
#
# ### The slow loop
#
# Patch after patch, from the top left along the first row. Inside of a patch the order is color, row, column.


# %%
def patchify_slowly(pixel_values, patch_size):
    """[B, C, H, W] → [B, P, C·h·w], one patch after the other."""
    H, W = pixel_values.shape[2:]
    found = []
    for top in range(0, H, patch_size):
        for left in range(0, W, patch_size):
            patch = pixel_values[:, :, top : top + patch_size, left : left + patch_size]
            found.append(patch.flatten(1))
    return torch.stack(found, dim=1)


slow = patchify_slowly(tiny, 2)
print(slow[0].int().tolist())
assert slow[0, 0].tolist() == [0, 1, 4, 5] and slow[0, 2].tolist() == [8, 9, 12, 13]

# %% [markdown]
# ### See it
#
# A scene of our own, 112 × 112 pixels, cut into patches of 16 × 16, as the small model of this course does:

# %%
from minivlm import emoji

many = (emoji.make_scene(seed, "validation") for seed in range(99))
scene = next(s for s in many if len({thing.name for thing in s.objects}) == len(s.objects) == 2)
viz.patch_grid(scene.image, 16)

# %% [markdown]
# ## Exercise 3.1 · Patchify ★★☆ (12 minutes)
#
# The same without a loop. `patch_size` divides `H` and `W`.
#
# <details><summary>Hint</summary>
#
# Split both sides: `reshape(B, C, H // p, p, W // p, p)` has the axes B, C, row of patches, row, column of patches,
# column. `permute` them to B, row of patches, column of patches, C, row, column, then flatten two groups of axes.
#
# </details>


# %%
def patchify(pixel_values, patch_size):
    """[B, C, H, W] → [B, P, C·h·w]: patches row by row from the top left, each laid out as color, row, column."""
    ### BEGIN SOLUTION
    B, C, H, W = pixel_values.shape
    p = patch_size
    cut = pixel_values.reshape(B, C, H // p, p, W // p, p)
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ### END SOLUTION


# %%
exercises.check(patchify)
### BEGIN HIDDEN TESTS
exercises.score(patchify, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# From here on the chapter uses your function if it passed, and the package's if not:

# %%
patchify = exercises.piece("patchify")
assert torch.equal(patchify(tiny, 2), slow)

# %% [markdown]
# torch has it too, under the name *unfold*:

# %%
assert torch.equal(F.unfold(tiny, kernel_size=2, stride=2).transpose(1, 2), slow)

# %% [markdown]
# ## From pixels to vectors: one matrix for all patches
#
# A patch of our model is 3 · 16 · 16 = 768 numbers. A matrix `[D, 768]` and a bias turn it into a vector of the tower's
# width `D`. Every patch meets the same matrix, and each row of the matrix is a *filter*: a small picture that is
# compared with the patch.

# %%
import minivlm

model = minivlm.PaliGemma.from_pretrained().requires_grad_(False)  # nothing is trained here
processor = minivlm.Processor.from_pretrained()
tower = model.vision_tower.vision_model
weight, bias = tower.embeddings.patch_embedding.weight, tower.embeddings.patch_embedding.bias
pixels = processor.preprocess_images([scene.image])  # what this does is told in chapter 04
print("pixels", list(pixels.shape), " weight", list(weight.shape), " bias", list(bias.shape))

# %% [markdown]
# The weights have the shape `[D, C, h, w]` of a convolution. By its definition, with a stride (the step from one place
# to the next) that is the size of the filter:

# %%
by_hand = torch.empty(49, 5)  # the first five filters
for number in range(49):
    top, left = number // 7 * 16, number % 7 * 16
    patch = pixels[0, :, top : top + 16, left : left + 16]
    for k in range(5):
        by_hand[number, k] = (patch * weight[k]).sum() + bias[k]

as_convolution = F.conv2d(pixels, weight, bias, stride=16)
print("convolution:", list(as_convolution.shape))
assert (as_convolution[0, :5].flatten(1).T - by_hand).abs().max() < 1e-5 * by_hand.abs().max()

# %% [markdown]
# ## Exercise 3.2 · The patch embedding ★☆☆ (8 minutes)
#
# Convolution = unfold + one matrix product. Write it that way, with `patchify`, or with `F.conv2d`; the result is
# `[B, P, D]`.
#
# <details><summary>Hint</summary>
#
# `weight.flatten(1)` is `[D, C·h·w]`, each row in the order of `patchify`. `F.linear(x, matrix, bias)` computes
# `x @ matrix.T + bias`. With `F.conv2d` you get `[B, D, rows, columns]`: two axes must be flattened, then moved.
#
# </details>


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
print(f"unfold + matmul {list(patches.shape)}, largest difference to the convolution {difference:.1e}")
assert difference < 1e-5 * patches.abs().max()

# %% [markdown]
# ### How many tokens
#
# 256 = (224 / 14)²: the number of image tokens of PaliGemma. It grows with the square of the picture's side, and the work
# of attention, which compares all with all, grows with its fourth power.

# %%
from minivlm.config import SiglipVisionConfig

for side, patch_size in ((112, 16), (224, 14), (448, 14), (896, 14)):
    tokens = (side // patch_size) ** 2
    assert tokens == SiglipVisionConfig(image_size=side, patch_size=patch_size).num_image_tokens
    print(f"{side} pixels, patches of {patch_size}: {tokens:5} tokens, {tokens**2:11,} pairs in attention")

# %% [markdown]
# ## Break it: a reshape that fits and is wrong
#
# A convolution gives `[B, D, rows, columns]`, the sequence wants `[B, P, D]`. Both of these have the right shape:
#
# * `x.flatten(2).transpose(1, 2)` moves the axes;
# * `x.flatten(2).reshape(B, P, D)` cuts the same memory in another way: every "patch" is now a piece of one filter's
#   answers.
#
# Nothing crashes. What the model says of twelve scenes:

# %%
from unittest.mock import patch as replace

some = [emoji.make_scene(seed, "validation") for seed in range(12)]


def captions_right():
    answers = minivlm.generate(model, processor, [s.image for s in some], "caption en")
    return sum(emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(answers, some, strict=True)), answers[0]


def reshaped(pixel_values, weight, bias):
    x = F.conv2d(pixel_values, weight, bias, stride=16).flatten(2)
    return x.reshape(len(x), -1, len(weight))


# %%
right, answer = captions_right()
with replace.object(siglip, "embed_patches", reshaped):
    wrong, nonsense = captions_right()
print(f"transposed: {right} of {len(some)} captions right, the first: {answer}")
print(f"reshaped:   {wrong} of {len(some)} captions right, the first: {nonsense}")
assert wrong < right

# %% [markdown]
# Fluent, and about nothing. The decoder still writes captions; they no longer depend on the picture in any way that makes
# sense.
#
# ## Where a patch stands: position embeddings
#
# Nothing so far says *where* a patch was. SigLIP learns a table `[P, D]`, one vector a place, and adds it:

# %%
table = tower.embeddings.position_embedding.weight
embedded = tower.embeddings(pixels)
assert table.shape == (49, 192)
assert torch.allclose(embedded, patches + table, rtol=1e-5, atol=1e-5)

# %% [markdown]
# ### What is lost without them, exactly
#
# Attention takes weighted means over patches, and everything else in the tower works on each patch alone. Neither
# knows an order. So without the table, shuffled patches give the same vectors, shuffled; and if a picture is summed up
# in one vector, the mean of all, no trace of the order is left:

# %%
shuffle = torch.randperm(49, generator=torch.Generator().manual_seed(0))
seen, seen_shuffled = tower.encoder(patches), tower.encoder(patches[:, shuffle])
assert (seen[:, shuffle] - seen_shuffled).abs().max() < 1e-5 * seen.abs().max()
same = (seen.mean(1) - seen_shuffled.mean(1)).norm() / seen.mean(1).norm()

placed, placed_shuffled = tower.encoder(patches + table), tower.encoder(patches[:, shuffle] + table)
other = (placed.mean(1) - placed_shuffled.mean(1)).norm() / placed.mean(1).norm()
print("mean vector of a picture and of its shuffled patches, relative difference:")
print(f"without the table {same:.0e}, with it {other:.3f}")
assert same < 1e-5 < other

# %% [markdown]
# ### What is lost without them, in the whole model
#
# PaliGemma does not sum up: all patch vectors go on to the decoder, in reading order, and the decoder has positions of its
# own (RoPE, chapter 06). So it has two sources that tell left from right: the table and the order of the image tokens.
# We take away one, the other, and both, and put questions such as "where is the cat?":

# %%
scenes_asked = [emoji.make_scene(seed, "validation") for seed in range(40)]
SWAP = {"left": "right", "right": "left"}


def mirrored(place):
    return " ".join(SWAP.get(word, word) for word in place.split())


asked = [
    (s, e) for s in scenes_asked for e in s.examples if e.kind == "where" and mirrored(e.answers[0]) != e.answers[0]
]
print(len(asked), "questions, such as:", asked[0][1].prompt, "→", asked[0][1].answers[0])

# %%
learned, encode = table.clone(), model.encode_image


def ask(positions, order):
    """Answers with this position table, the image tokens handed to the decoder in this order."""
    table.data = positions
    with replace.object(model, "encode_image", lambda x: encode(x)[:, order]):
        answers = minivlm.generate(model, processor, [s.image for s, _ in asked], [e.prompt for _, e in asked])
    table.data = learned
    truths = [e.answers[0] for _, e in asked]
    return [sum(a == f(t) for a, t in zip(answers, truths, strict=True)) for f in (str, mirrored)]


# %%
from tqdm.auto import tqdm

reading = torch.arange(49)
orders = {"in order": reading, "mirrored": reading.view(7, 7).flip(1).flatten(), "shuffled": shuffle}
tables = {"learned": learned, "none": torch.zeros_like(learned)}
cases = [(t, o) for o in orders for t in tables]
found = {(t, o): ask(tables[t], orders[o]) for t, o in tqdm(cases, unit="run")}
for (t, o), (true, swapped) in found.items():
    print(f"table {t:8} image tokens {o:9} right {true:2}   right but for left and right {swapped:2}   of {len(asked)}")
assert found["learned", "in order"][0] > found["none", "shuffled"][0]

# %% [markdown]
# Read it like this. Between the first two lines lies what the table alone is worth: if it is little, the decoder has made
# up for the loss, since it still counts its tokens. In the mirrored lines, an answer that is right but for left and right
# says that the decoder believed the order of the tokens. In the last line both sources are gone: the decoder reads the
# places off an order that has nothing to do with the picture, so it is right only by chance.
#
# So the sentence "without position embeddings the model cannot tell left from right" is exact for a tower whose vectors
# are summed up, as SigLIP is trained, and not for PaliGemma as a whole: there the order of the tokens tells the places,
# too.
#
# What did the table learn to tell apart? Each small map compares the embedding of one place with those of all 49. In the
# tables of large towers, neighbors and places of one row or column are alike (arXiv:2010.11929, figure 7). Ours has
# less to do, for the reason above, and learned mainly one thing: the rim of the picture against its inside.

# %%
viz.position_similarity(table, title="Learned positions: which places are alike?")

# %% [markdown]
# ## Norms: keeping numbers in range
#
# Between the blocks of the tower stand norms. Three pictures, four numbers each:

# %%
x = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40], [0, 0, 6, 6]])


def standardise(x, axis):
    return (x - x.mean(axis, keepdim=True)) / x.std(axis, keepdim=True, unbiased=False)


print("layer norm, each row by itself:\n", standardise(x, 1))
print("batch norm, each column by itself:\n", standardise(x, 0))
assert torch.allclose(standardise(x, 1)[0], standardise(x, 1)[1])  # the second row is ten times the first

# %% [markdown]
# By hand, the first row: mean 2.5, variance (1.5² + 0.5² + 0.5² + 1.5²) / 4 = 1.25, so 1 becomes −1.5 / √1.25 = −1.34.
#
# **Layer norm** (arXiv:1607.06450) takes mean and variance over the numbers of one vector. **Batch norm**
# (arXiv:1502.03167) takes them over the batch, one number at a time. So with batch norm, what is computed for a picture
# depends on the company it is in:

# %%
company = x.clone()
company[2] = 100.0  # another third picture
for name, axis in (("layer norm", 1), ("batch norm", 0)):
    before, after = standardise(x, axis)[0], standardise(company, axis)[0]
    print(f"{name}: the first picture changes by at most {(before - after).abs().max():.2f}")
assert torch.equal(standardise(x, 1)[0], standardise(company, 1)[0])

# %% [markdown]
# Batch norm therefore keeps running means for later use, behaves differently in training and in use, and needs large
# batches. Transformers use layer norm or its relatives.
#
# ## Exercise 3.3 · Layer norm ★☆☆ (8 minutes)
#
# Each vector (the last axis) gets mean 0 and variance 1, then each of its D numbers a learned scale, `weight`, and shift,
# `bias`. To spare a division by zero, the variance is increased by a small number, `eps`, before the root.
#
# <details><summary>Hint</summary>
#
# `x.mean(-1, keepdim=True)`, `x.var(-1, keepdim=True, unbiased=False)`: divided by D, not by D − 1.
#
# </details>


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
# Batch norm was invented with this reason: while a network learns, each layer's input keeps changing, because the layers
# before it learn too. Its authors called that *internal covariate shift*. Six small layers learn a function, without a
# norm and with either; we watch the spread of what the sixth one receives. First the network, cut before its sixth layer:


# %%
from torch import nn


def build(norm):
    """256 random inputs; five layers and the norm of the sixth; the sixth and an output layer."""
    torch.manual_seed(0)
    linear = [nn.Linear(32, 32) for _ in range(6)]
    for layer in linear:
        nn.init.kaiming_normal_(layer.weight)
    before = [part for layer in linear[:5] for part in (norm(32), layer, nn.ReLU())]
    last = nn.Sequential(linear[5], nn.ReLU(), nn.Linear(32, 4))
    return torch.randn(256, 32), nn.Sequential(*before, norm(32)), last


# %%
def watch(norm, steps=200):
    """Trains six layers; returns the standard deviation of what the last one receives at each step, and the loss."""
    x, before, last = build(norm)
    optimizer = torch.optim.SGD([*before.parameters(), *last.parameters()], lr=0.05, momentum=0.9)
    spread = []
    for _ in range(steps):
        received = before(x)
        spread.append(received.std().item())
        loss = F.mse_loss(last(received), torch.sin(2 * x[:, :4]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return spread, loss.item()


# %%
norms = {"no norm": nn.Identity, "batch norm": nn.BatchNorm1d, "layer norm": nn.LayerNorm}
watched = {name: watch(norm) for name, norm in tqdm(norms.items(), unit="network")}
for name, (spread, loss) in watched.items():
    print(f"{name:10} smallest spread {min(spread):.2f}, largest {max(spread):.2f}   loss at the end {loss:.4f}")
ratio = {name: max(spread) / min(spread) for name, (spread, _) in watched.items()}
assert ratio["no norm"] > 1.4 and max(ratio["batch norm"], ratio["layer norm"]) < 1.2
curves = {name: (range(len(spread)), spread) for name, (spread, _) in watched.items()}
viz.lines(curves, "Internal covariate shift", "training step", "standard deviation of the input of layer 6")

# %% [markdown]
# The shift is real, norms stop it, and training goes better. Whether it goes better *because* of that is disputed: later
# work (arXiv:1805.11604) put noise behind the norms, so that the shift came back, and training was as good; it credits
# a smoother loss instead.
#
# ## Pre-norm or post-norm?
#
# Around each block runs a *residual connection*: what the block computes is added to the *stream*, the vectors that flow
# through the tower. The norm can stand in two places:
#
# | | the formula | stands in |
# |---|---|---|
# | post-norm | `x = norm(x + block(x))` | the first transformer (arXiv:1706.03762), BERT |
# | pre-norm | `x = x + block(norm(x))` | ViT (arXiv:2010.11929), SigLIP, Gemma |
#
# ## Exercise 3.4 · The pre-norm block ★★☆ (7 minutes)
#
# One layer of the tower: attention, then the MLP, each with a norm of its own. All four are functions that you can call.
#
# <details><summary>Hint</summary>
#
# Two lines. The stream `x` itself never goes through a norm.
#
# </details>


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
# Common explanations of PaliGemma, among them the blog that this course grew from, draw SigLIP as post-norm. The names of
# the weights may be the reason: one of them has "post" in it.

# %%
import re

names = {re.sub(r"\.\d+", ".0", name) for name in model.vision_tower.state_dict() if "norm" in name}
print(*sorted(names), sep="\n")

# %% [markdown]
# That one comes once, after the last layer. The order inside of a layer does not show in names; it shows in the code that
# transformers runs:

# %%
import inspect

from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

source = inspect.getsource(SiglipEncoderLayer.forward)
print(source[source.index("        residual =") :])

# %% [markdown]
# First the norm, then the block, then the sum: pre-norm. And by experiment: one layer of ours in both orders, against the
# same layer in transformers.

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
pieces = (layer.layer_norm1, layer.self_attn, layer.layer_norm2, layer.mlp)
with torch.no_grad():
    truth = their_tower.encoder.layers[0](embedded, attention_mask=None)
pre, post = (
    float((block(embedded, *pieces) - truth).abs().max() / truth.abs().max())
    for block in (pre_norm_block, post_norm_block)
)
print(f"largest relative difference to transformers: pre-norm {pre:.1e}, post-norm {post:.1e}")
assert pre < 1e-5 and post > 0.01

# %% [markdown]
# ### Why it matters: depth
#
# Towers with random weights, from 3 to 48 layers (SigLIP So400m has 27). Of each we take the spread of the stream at the
# end, how much of the input is still in it (the cosine with the input), and the gradient that the last layer's weights get.


# %%
def measure(depth, block):
    """Spread of the stream, its cosine with the input, and the norm of the gradient of the last layer's weights."""
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
kinds = {"pre-norm": pre_norm_block, "post-norm": post_norm_block}
measured = {name: [measure(d, f) for d in tqdm(depths, desc=name, unit="tower")] for name, f in kinds.items()}
for name, rows in measured.items():
    for depth, (spread, cosine, gradient) in zip(depths, rows, strict=True):
        print(f"{name:9} {depth:2} layers: spread {spread:5.2f}   input left {cosine:5.2f}   gradient {gradient:5.2f}")
assert measured["pre-norm"][-1][0] > 3 and abs(measured["post-norm"][-1][0] - 1) < 0.01

# %%
viz.lines(
    {name: (depths, [spread for spread, _, _ in rows]) for name, rows in measured.items()},
    "Spread of the stream behind the last layer",
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
# * **Pre-norm**: every block adds about as much, so the stream grows with the root of the depth, and part of the input
#   reaches the end. The gradient of a layer shrinks with the root of the depth, as the next norm divides the grown
#   stream. No depth makes the first steps too large, so pre-norm can be trained without a warm-up (arXiv:2002.04745).
#   It takes one last norm to bring the stream back to size: that is `post_layernorm`.
# * **Post-norm**: every norm brings the stream back to 1 and thins what was there before, until nothing of the input is
#   left. The last layers' gradient is as large at 48 layers as at 3. That is why post-norm transformers need a careful
#   warm-up of the learning rate (arXiv:2002.04745, which proves both laws of the gradient).
#
# ## Every patch looks at every patch
#
# Attention, for one head: each patch has a *query* (what it looks for), a *key* (what it offers to be found by) and a
# *value* (what it gives). The score of a pair is the dot product of query and key, divided by √d, where d is their width. A
# softmax makes the scores of one query sum to 1; with these weights it takes the mean of the values. Three patches, d = 2,
# one after the other:

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
# There is no mask: attention in the tower is *bidirectional*. Text is written from left to right; a picture is all there
# at once, and its upper left corner may look at its lower right one.
#
# With several *heads*, the D numbers are split into N groups of d = D / N, and each group does this by itself, with weights
# of its own. The results are put side by side again.
#
# ## Exercise 3.5 · Bidirectional attention ★★★ (18 minutes)
#
# `q`, `k` and `v` are `[B, P, D]`; head 0 owns the first d numbers of each, head 1 the next d, and so on.
#
# <details><summary>Hint</summary>
#
# `x.unflatten(-1, (num_heads, -1))` is `[B, P, N, d]`. Matrix products work on the last two axes, so move N before P.
# `k.transpose(-1, -2)` turns the keys. At the end the heads must be moved back before they are flattened.
#
# </details>


# %%
def bidirectional_attention(q, k, v, num_heads):
    """Three [B, P, D] and the number of heads → [B, P, D]."""
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
# ## One vector for a whole picture: three ways
#
# CLIP and SigLIP compare pictures with texts (chapters 01 and 02), so they need *one* vector a picture.
#
# * **[class] token** (BERT, ViT, CLIP): a learned vector goes in front of the patches and through the tower; what comes
#   out in its place stands for the picture.
# * **Mean**: of all patches.
# * **Attention pooling** (SigLIP): a learned query, the *probe*, looks at all patches once, at the end.

# %%
generator = torch.Generator().manual_seed(0)
learned_vector = torch.randn(1, 1, 192, generator=generator)  # stands for what training would find

with_class = torch.cat([learned_vector, embedded], dim=1)  # [1, 1 + 49, 192]
by_class = tower.encoder(with_class)[:, 0]
features = tower(pixels)
by_mean = features.mean(1)
by_attention = bidirectional_attention(learned_vector, features, features, 4)[:, 0]  # one query, 49 keys
assert by_class.shape == by_mean.shape == by_attention.shape == (1, 192)

# %% [markdown]
# SigLIP's own head has matrices for query, key and value, and an MLP behind. The one in transformers, with random weights,
# and its attention done with yours:

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
# **PaliGemma throws this head away** and hands all patch vectors to the decoder. In the files this is the setting
# `vision_use_head: false`, and the tower has no weights of a head. What would be lost with a single vector? We give the
# decoder the mean in every place:

# %%
assert not [name for name in model.vision_tower.state_dict() if "head" in name]


def mean_only(pixel_values):
    features = encode(pixel_values)
    return features.mean(1, keepdim=True).expand_as(features)


with replace.object(model, "encode_image", mean_only):
    pooled_right, _ = captions_right()
print(f"captions right, of {len(some)}: all patches {right}, their mean {pooled_right}")
assert pooled_right < right

# %% [markdown]
# To be fair: this model never learned to live with a mean. But also one that did would have to hold in 192 numbers what now
# stands in 49 × 192.
#
# ## The trained tower, opened
#
# **The filters** of the patch embedding with the largest weights, each stretched to its own range of colors. What do they
# look for?

# %%
largest = weight.flatten(1).norm(dim=1).topk(24).indices
low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
shown = ((weight - low) / (high - low))[largest].permute(0, 2, 3, 1)  # colors last, as pictures have them
viz.image_row(list(shown), columns=8, title="24 of the 192 filters")

# %% [markdown]
# Soft blobs, one color beside its opposite: such a filter answers where the color changes inside of a patch. The fine
# grain is noise that so little training did not smooth away; large towers have cleaner ones (arXiv:2010.11929, figure
# 7).
#
# **What a patch attends to**, in each layer, as the mean of its heads. The patch that looks is the one in the middle of
# the first object; the orange frame marks the patch that it looks at most:

# %%
weights = viz.tower_attention(model, pixels)
assert all(w.shape == (1, 4, 49, 49) and torch.allclose(w.sum(-1), torch.ones(1, 4, 49)) for w in weights)
x, y = scene.objects[0].center
looker = int(y // 16) * 7 + int(x // 16)
by_layer = torch.stack([w[0, :, looker].mean(0) for w in weights])
titles = [f"layer {number}" for number in range(len(weights))]
viz.attention_on_image(scene.image, by_layer, titles, f"What patch {looker} looks at ({scene.objects[0].name})")

# %% [markdown]
# And the four heads of the last layer one by one:

# %%
viz.attention_on_image(
    scene.image, weights[-1][0, :, looker], [f"head {h}" for h in range(4)], "The last layer, head by head"
)

# %% [markdown]
# Weights say where a head took from, not what it took; treat such pictures as a hint. Three numbers are safe: how much
# of its attention a patch spends on itself, its neighbors, and the rest. Spread evenly it would be 2%, 13% and 85%.

# %%
place = torch.stack([torch.arange(49) // 7, torch.arange(49) % 7], dim=1)
distance = (place[:, None] - place[None]).abs().amax(-1)  # 0 itself, 1 the eight around it
for number, w in enumerate(weights):
    mean = w[0].mean(0)
    itself, near, far = (float(mean[mask].sum() / 49) for mask in (distance == 0, distance == 1, distance > 1))
    print(f"layer {number}: itself {itself:4.0%}   neighbors {near:4.0%}   further away {far:4.0%}")

# %% [markdown]
# ## It matches
#
# Your pieces, one after the other, make the whole tower. Against the package, and against transformers:

# %%
layer_norm = exercises.piece("layer_norm")


def norm(module):
    return lambda x: layer_norm(x, module.weight, module.bias, module.eps)


def attention(module):
    return lambda x: module.out_proj(bidirectional_attention(module.q_proj(x), module.k_proj(x), module.v_proj(x), 4))


x = embed_patches(pixels, weight, bias) + table
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
# * A picture becomes P = (side / patch size)² vectors: patches, laid out in one line and multiplied by one matrix. It is
#   a convolution whose stride is its size.
# * A learned table says where each patch stands. Without it the tower is blind to order; PaliGemma's decoder has the order
#   of its tokens besides.
# * Layer norm looks at one vector, batch norm at the batch.
# * SigLIP is pre-norm. The stream grows with depth, and one last norm brings it back.
# * Attention in the tower has no mask. SigLIP pools with a probe; PaliGemma keeps every patch.
#
# **Three questions**
#
# <details><summary>1. A tower was trained on 224 pixels and gets 448. What fits, and what does not?</summary>
#
# The filters, norms, attention and MLPs fit: none of them knows P. The position table does not: it has 256 rows and
# 1024 are needed. It is usually stretched like a picture, and the model trained a little longer.
#
# </details>
#
# <details><summary>2. Why is the patch embedding no worse for having no nonlinearity?</summary>
#
# It only has to bring a patch to the tower's width and keep what matters (here 768 numbers become 192; in SigLIP So400m
# 588 become 1152). The MLPs of the layers that follow bring the nonlinearity.
#
# </details>
#
# <details><summary>3. Layer norm forgets the length of a vector. What can the next block not know?</summary>
#
# Whether the stream was large or small at this patch: the vector and ten times the vector look the same to it. The
# stream itself still holds it, since in a pre-norm layer only the copy is normalized.
#
# </details>
#
# **Next:** [04 · The processor](04_processor.ipynb), which makes the pixels that this chapter took for granted.
