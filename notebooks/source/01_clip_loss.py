# %% [markdown]
# # 01 · CLIP loss
#
# **How do images and text come to share one embedding space?**
#
# | | |
# |---|---|
# | know first | vectors and the matrix product; what a neural network and a gradient are |
# | you will build | the loss that CLIP was trained with, and a small CLIP, trained here on emoji and their names |
# | runs on | CPU, nothing to download |

# %%
import numpy as np
import torch
import torch.nn.functional as F

from minivlm import emoji, losses
from minivlm.course import exercises, viz

viz.you_are_here("01")

# %% [markdown]
# ## Predict first
#
# A model gets four images and their four captions, shuffled, and has to match them up. Write down your guesses before
# you go on:
#
# 1. There are 16 ways to combine one image with one caption. How many of them are wrong?
# 2. You double every number in the embedding of an image. Should the image now match its caption better?
# 3. A model that knows nothing chooses among 100 captions. Its loss is −log(the probability of the right one). How
#    large is that?
#
# <details><summary>Answers (open them at the end of the chapter)</summary>
#
# 1. Twelve: n² − n.
# 2. No. Only the direction of a vector matters, because we divide by its length.
# 3. The right caption has probability 1/100, so the loss is log 100 = 4.6. All logarithms in this course are natural,
#    and the unit of such a loss is the *nat*.
#
# </details>

# %% [markdown]
# ## Two encoders, one space
#
# An image is an array of pixels. A caption is a sequence of words. Two networks turn both into the same kind of object:
# a vector of fixed length, the *embedding*. An image and a caption that belong together should end up pointing in the
# same direction. That is all of CLIP (Radford et al. 2021, arXiv:2103.00020): two encoders and a loss. This chapter
# builds them.
#
# ```
# image ────▶ image encoder ──▶ x ──┐
#                                   ├──▶ same direction?
# caption ──▶ text encoder ───▶ y ──┘
# ```
#
# ## A toy: two images, two captions
#
# We start with embeddings of only two numbers each, so you can follow everything by hand. Row *i* of `images` and row
# *i* of `texts` belong together.

# %%
names = ["a cat", "a moon"]
images = np.array([[3.0, 4.0], [2.0, 0.0]])  # what an image encoder might output
texts = np.array([[0.0, 1.0], [10.0, 0.0]])  # what a text encoder might output

# %% [markdown]
# The *dot product* multiplies two vectors coordinate by coordinate and adds up the results. For the image of the cat
# and the text "a cat", it is 3·0 + 4·1 = 4. For the same image and "a moon", it is 3·10 + 4·0 = 30. One matrix product
# computes all four dot products:

# %%
dots = images @ texts.T
print(dots)
assert dots[0].tolist() == [4, 30]

# %% [markdown]
# So does the cat match "a moon" better? Only because that embedding has length ten. The *L2 norm* ‖x‖ is the length of
# a vector by Pythagoras: the square root of the sum of the squares. The image of the cat has norm √(3² + 4²) = 5. If
# you divide a vector by its norm, its direction stays the same and its length becomes 1. The dot product of two such
# vectors is the cosine of the angle between them: 1 for the same direction, 0 for a right angle, −1 for opposite
# directions.

# %%
x = images / np.sqrt((images**2).sum(axis=1, keepdims=True))  # [2, 2] / [2, 1]: one length per row
y = texts / np.sqrt((texts**2).sum(axis=1, keepdims=True))
cosines = x @ y.T
assert np.allclose(cosines, [[0.8, 0.6], [0.0, 1.0]])  # 4/(5·1), 30/(5·10), 0, 20/(2·10)
viz.similarity_matrix(cosines, [f"image of {name}" for name in names], names, title="Cosines of the toy embeddings")

# %% [markdown]
# Here are the same vectors as arrows. On the left are the embeddings. On the right are their directions, which all end
# on the circle of radius 1.

# %%
from matplotlib.figure import Figure

LABELS = {  # the offset from the tip in points, the alignment and the color of each label
    "image of a cat": ((4, 2), "left", "#0072B2"),
    "image of a moon": ((0, -12), "left", "#0072B2"),
    "text: a cat": ((-4, -3), "right", "#D55E00"),
    "text: a moon": ((2, 4), "left", "#D55E00"),
}


def draw_arrows(axes, points):
    for (label, (offset, side, color)), tip in zip(LABELS.items(), points, strict=True):
        style = {"color": color, "linestyle": "--" if "text" in label else "-", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "linewidth": 2} | style)
        axes.annotate(label, tip, offset, textcoords="offset points", ha=side, color=color, fontsize=8)


# %%
figure = Figure(figsize=(8, 3))
for axes, points, name in zip(
    figure.subplots(1, 2), [(images, texts), (x, y)], ["embeddings", "directions"], strict=True
):
    size = np.abs(points).max()
    axes.set(title=name, xlim=(-0.7 * size, 2.0 * size), ylim=(-0.2 * size, 1.1 * size), aspect="equal")
    draw_arrows(axes, np.concatenate(points))
viz.from_figure(
    figure,
    "Two images and two texts as arrows. Among the embeddings, the text a moon is by far the longest. "
    "Among the directions, each text is closest to its own image.",
)

# %% [markdown]
# ## Exercise 1.1 · Directions
#
# Write `l2_normalize` in torch: divide each row of `x` by its L2 norm.


# %%
def l2_normalize(x):
    """[N, D] → [N, D], every row of length 1."""
    ### BEGIN SOLUTION
    return x / x.norm(dim=-1, keepdim=True)
    ### END SOLUTION


# %%
exercises.check(l2_normalize)
### BEGIN HIDDEN TESTS
exercises.score(l2_normalize, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# From here on, the chapter uses your function if it passed, and the package's function otherwise:

# %%
l2_normalize = exercises.piece("l2_normalize")

# %% [markdown]
# ## From cosines to choices
#
# An image chooses among the captions with a *softmax*: take the exponential of each of its scores and divide by their
# sum, so the results are positive and add up to 1. With cosines as scores, the choice is never confident, because
# cosines lie between −1 and 1. Multiplying them by a factor, the *temperature* exp(t), makes it sharper:


# %%
def softmax(row):
    return np.exp(row) / np.exp(row).sum()


for temperature in (1, 10, 100):
    print(f"exp(t) = {temperature:3}: p('a cat' | image of a cat) = {softmax(temperature * cosines[0])[0]:.4f}")

# %% [markdown]
# How much does the temperature matter? Take 100 pairs and the best possible model. Its cosines are 1 for matching pairs
# and −1/99 for all others. (100 directions cannot all be opposite. This is as far apart as they can be.) Its loss, −log
# of the probability of the right caption, is log(1 + 99 · exp(−100/99 · exp(t))):

# %%
temperatures = np.geomspace(0.5, 20, 40)
best = np.log(1 + 99 * np.exp(-100 / 99 * temperatures))
at_one = np.log(1 + 99 * np.exp(-100 / 99))
print(f"guessing: {np.log(100):.2f} nats, the best possible model at exp(t) = 1: {at_one:.2f} nats")
assert at_one > 3 / 4 * np.log(100)
curves = {"best possible": (temperatures, best), "guessing": (temperatures, np.full(40, np.log(100)))}
viz.lines(curves, "Loss when choosing among 100 captions", "temperature exp(t)", "loss in nats", log="x")

# %% [markdown]
# Without a temperature, even a perfect model would still pay more than three quarters of what guessing costs. CLIP
# learns t together with the weights. The exponential keeps the factor positive, and a step in t changes the factor by a
# percentage rather than by a fixed amount. exp(t) starts at 1/0.07 ≈ 14 and is clipped at 100 (section 2.5 of the
# paper).
#
# **Careful with the term.** In physics, in the sampling of chapter 08 and where the paper writes τ = 0.07, you *divide*
# by the temperature: high means soft. In CLIP's code, in SigLIP's and in this course, you *multiply* by exp(t) = 1/τ:
# high means sharp.
#
# ## Exercise 1.2 · The table of logits
#
# The inputs of a softmax are called *logits*. Compute a whole table of them: temperature × cosine, for every image with
# every text. `log_temperature` is t, a scalar tensor. You can call `l2_normalize`.


# %%
def clip_logits(images, texts, log_temperature):
    """[N, D], [M, D], a number → [N, M]."""
    ### BEGIN SOLUTION
    return log_temperature.exp() * (l2_normalize(images) @ l2_normalize(texts).T)
    ### END SOLUTION


# %%
exercises.check(clip_logits)
### BEGIN HIDDEN TESTS
exercises.score(clip_logits, points=2, seed=1)
### END HIDDEN TESTS

# %%
clip_logits = exercises.piece("clip_logits")

# %% [markdown]
# ## The loss, by hand
#
# At exp(t) = 10, the logits of our toy are
#
# | | "a cat" | "a moon" |
# |---|---|---|
# | image of a cat | **8** | 6 |
# | image of a moon | 0 | **10** |
#
# Each *image* chooses within its row. The image of the cat costs −log(e⁸ / (e⁸ + e⁶)) = log(1 + e⁻²) = 0.1269. The
# image of the moon costs log(1 + e⁻¹⁰) = 0.0000. The mean is 0.0635.
#
# Each *text* chooses within its column. "a cat" costs log(1 + e⁻⁸) = 0.0003 and "a moon" log(1 + e⁻⁴) = 0.0181. The
# mean is 0.0092.
#
# The loss is the mean of both: **0.0364**. Rows and columns ask different questions. The 6 hurts the image of the cat,
# because it is close to 8. It hurts "a moon" much less, because it is far from 10. (You often read that CLIP takes *a*
# softmax over the table. It takes two, and neither of them normalizes over the whole table.)
#
# ### The slow loop

# %%
logits = 10 * cosines
n = len(logits)
image_loss = text_loss = 0.0
for i in range(n):
    image_loss -= np.log(np.exp(logits[i, i]) / sum(np.exp(logits[i, j]) for j in range(n))) / n
    text_loss -= np.log(np.exp(logits[i, i]) / sum(np.exp(logits[j, i]) for j in range(n))) / n
by_loop = (image_loss + text_loss) / 2
print(f"images {image_loss:.4f}, texts {text_loss:.4f}, loss {by_loop:.4f}")
assert round(by_loop, 4) == 0.0364

# %% [markdown]
# ### In numpy, all at once
#
# The right answers are on the diagonal: image *i* and text *i* meet at (i, i).


# %%
def log_softmax(table, axis):
    return table - np.log(np.exp(table).sum(axis=axis, keepdims=True))


over_texts, over_images = log_softmax(logits, axis=1), log_softmax(logits, axis=0)
in_numpy = -(np.diag(over_texts).mean() + np.diag(over_images).mean()) / 2
assert np.allclose(np.exp(over_texts).sum(1), 1) and np.allclose(np.exp(over_images).sum(0), 1)
assert np.isclose(in_numpy, by_loop)

# %% [markdown]
# ### In torch
#
# `F.cross_entropy` computes −log of the softmax at the right answer. It takes the logits `[N, C]` and, for each row,
# the index of the right column, the *target*. For row *i* the target is *i*. For the texts, transpose the table.

# %%
table, targets = torch.from_numpy(logits), torch.arange(n)
in_torch = (F.cross_entropy(table, targets) + F.cross_entropy(table.T, targets)) / 2
assert np.isclose(in_torch.item(), by_loop)

# %% [markdown]
# ## Exercise 1.3 · CLIP's loss
#
# Now write the whole path from embeddings to the loss. You can call `clip_logits` and `F.cross_entropy`.


# %%
def clip_loss(image_embeddings, text_embeddings, log_temperature):
    """[N, D], [N, D], a number → the mean loss of both directions in nats, a scalar tensor."""
    ### BEGIN SOLUTION
    logits = clip_logits(image_embeddings, text_embeddings, log_temperature)
    targets = torch.arange(len(logits))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    ### END SOLUTION


# %%
exercises.check(clip_loss)
### BEGIN HIDDEN TESTS
exercises.score(clip_loss, points=3, seed=1)
### END HIDDEN TESTS

# %%
clip_loss = exercises.piece("clip_loss")
toy = torch.from_numpy(images), torch.from_numpy(texts), torch.tensor(10.0).log()
assert np.isclose(clip_loss(*toy).item(), by_loop)

# %% [markdown]
# ## The wrong pairs
#
# You do not need labels for wrong pairs. They come for free: a batch of n pairs has n² combinations. n of them are
# right, and n² − n are wrong.

# %%
for n, where in ((2, "our toy"), (100, "our training"), (32_768, "CLIP's training (section 2.5 of the paper)")):
    print(f"n = {n:6,}: {n**2 - n:13,} wrong pairs, guessing costs {np.log(n):5.2f} nats   {where}")

# %% [markdown]
# This is why CLIP uses large batches. The more wrong pairs there are, the harder the question becomes, and the more
# likely it is that some wrong caption nearly fits. But there is a price: the loss treats every other caption as wrong,
# even one that fits. Here are four pairs, two of which are identical. The embeddings could not be better, and still the
# loss is not 0:

# %%
four = torch.eye(4)
twins = four[[0, 0, 1, 2]]  # the first two pairs are identical
hot = torch.tensor(100.0).log()
print(f"all different: {clip_loss(four, four, hot):.4f}   two identical: {clip_loss(twins, twins, hot):.4f}")
assert torch.isclose(clip_loss(twins, twins, hot), torch.tensor(2.0).log() / 2)  # half of the pairs toss a coin: log 2

# %% [markdown]
# So each of our training batches will contain every name only once.
#
# ## Training on emoji
#
# The course's data set has 100 kinds of objects, drawn by nine artists. We take three of them, train on two and save the
# third for the test. Each drawing is centered on a canvas of 32 × 32 pixels. Its fourth channel is the opacity.


# %%
def draw(name, artist, angle=0, mirror=False):
    """[4, 32, 32] in 0…1: red, green and blue multiplied by the opacity, and the opacity."""
    sprite = emoji.draw_sprite(name, artist, 28, angle, mirror)
    height, width, _ = sprite.shape
    top, left = (32 - height) // 2, (32 - width) // 2
    canvas = np.zeros((32, 32, 4), np.uint8)
    canvas[top : top + height, left : left + width] = sprite
    return torch.from_numpy(canvas).permute(2, 0, 1) / 255


def on_background(drawings, colors):
    """Drawings [N, 4, 32, 32] on plain colors [N, 3, 1, 1] → images [N, 3, 32, 32] in −1…1."""
    return 2 * (drawings[:, :3] + (1 - drawings[:, 3:]) * colors) - 1


# %% [markdown]
# For training, we render every object by both artists at five angles, each one also mirrored:

# %%
from itertools import product

from tqdm.auto import tqdm

seen_artists, held_out_artist = ("noto", "fluent"), "twemoji"
variants = list(product(seen_artists, (-16, -8, 0, 8, 16), (False, True)))  # artist, angle in degrees, mirrored
drawings = torch.stack([torch.stack([draw(name, *v) for name in emoji.OBJECTS]) for v in tqdm(variants, "rendering")])
held_out = torch.stack([draw(name, held_out_artist) for name in emoji.OBJECTS])
print("training", list(drawings.shape), "  held-out artist", list(held_out.shape))


# %%
def for_display(images):
    return [image.permute(1, 2, 0) / 2 + 0.5 for image in images]


examples = list(product(("owl", "carrot", "tractor", "castle"), (*seen_artists, held_out_artist)))
example_images = on_background(torch.stack([draw(*example) for example in examples]), torch.ones(12, 3, 1, 1))
titles = [", ".join(example) for example in examples]
viz.image_row(for_display(example_images), titles, columns=6, title="Four objects by three artists")

# %% [markdown]
# ### A bag of words
#
# The captions are the names of the objects in a few phrasings. Our text encoder is as simple as it gets: it averages
# one learned vector per word. To do that, count how often each word of the vocabulary occurs and divide by the number
# of words in the caption. A linear layer on these frequencies computes exactly that average. The order of the words is
# lost, which is why this is called a *bag* of words.

# %%
templates = ["{}", "an image of {}", "here is {}"]
captions = [[template.format(emoji.with_article(name)) for name in emoji.OBJECTS] for template in templates]
vocabulary = sorted({word for row in captions for caption in row for word in caption.split()})


def bag(captions):
    """N texts → [N, V]: how frequent each word is. Words outside the vocabulary are ignored."""
    counts = torch.tensor([[caption.split().count(word) for word in vocabulary] for caption in captions])
    return counts / counts.sum(1, keepdim=True)


bags = torch.stack([bag(row) for row in captions])
nonzero = {word: round(f.item(), 2) for word, f in zip(vocabulary, bags[1, 10], strict=True) if f}
print(len(vocabulary), "words;", captions[1][10], "→", nonzero)

# %% [markdown]
# ### The two encoders
#
# The image encoder has three convolutions, each of which halves the resolution, and a linear layer that turns the
# result into one vector. (`GroupNorm` keeps the numbers in range. Chapter 03 is about norms.) Both encoders output 64
# numbers.

# %%
from torch import nn

torch.manual_seed(0)
layers = []
for channels, wider in ((3, 32), (32, 64), (64, 128)):
    layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1), nn.GroupNorm(8, wider), nn.ReLU()]
image_encoder = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, 64))
text_encoder = nn.Linear(len(vocabulary), 64, bias=False)
log_temperature = nn.Parameter(torch.tensor(1 / 0.07).log())

# %% [markdown]
# Before training, image embeddings and text embeddings have nothing to do with each other. We compute the cosines of
# twelve objects by the held-out artist with their twelve names, and save them for later:

# %%
test_images = on_background(held_out, torch.ones(100, 3, 1, 1))


def cosines_of(images, bags):
    with torch.no_grad():
        return clip_logits(image_encoder(images), text_encoder(bags), torch.tensor(0.0))


twelve = slice(0, 96, 8)
before = cosines_of(test_images[twelve], bags[0, twelve])
own = (before.argmax(1) == torch.arange(12)).sum()
print(f"images that are closest to their own name: {own} of 12; guessing gets 1 of 12 on average")
assert own < 6

# %% [markdown]
# ### The training loop
#
# A batch contains all 100 objects. Each is shown in one of its 20 variants, on a random background color, with one of
# its three captions. The whole batch is shifted by the same few pixels.


# %%
def sample_batch():
    variant, template = torch.randint(len(variants), (100,)), torch.randint(len(templates), (100,))
    images = on_background(drawings[variant, torch.arange(100)], torch.rand(100, 3, 1, 1))
    shift = torch.randint(-3, 4, (2,)).tolist()
    return images.roll(shift, dims=(2, 3)), bags[template, torch.arange(100)]


# %%
steps = 500
weights = [*image_encoder.parameters(), *text_encoder.parameters(), log_temperature]
optimizer = torch.optim.AdamW(weights)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)  # up, then down to almost 0

# %%
history = []
for _ in tqdm(range(steps), "training"):
    batch_images, batch_bags = sample_batch()
    loss = clip_loss(image_encoder(batch_images), text_encoder(batch_bags), log_temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    history.append(loss.item())

# %%
print(f"loss of the first batch {history[0]:.2f}, mean of the last ten {np.mean(history[-10:]):.2f}")
print(f"exp(t) started at 14.3 and is now {log_temperature.exp():.1f}")
assert np.mean(history[-10:]) < 1 < history[0]
curves = {"loss": (range(steps), history), "guessing": (range(steps), [np.log(100)] * steps)}
viz.lines(curves, "Training loss: which of these 100?", "step", "loss in nats")

# %% [markdown]
# Here are the same twelve objects again, before training in the upper half and after it in the lower half, on one color
# scale. The model has never seen a drawing by this artist:

# %%
after = cosines_of(test_images[twelve], bags[0, twelve])
thumbnails, words = for_display(test_images[twelve]), list(emoji.OBJECTS[twelve])
viz.similarity_matrix(
    torch.cat([before, after]),
    thumbnails * 2,
    words,
    truth=[*range(12)] * 2,
    title="Cosines: twelve images before training, the same twelve after it",
)

# %%
own = (after.argmax(1) == torch.arange(12)).sum()
print(f"images that are closest to their own name: {own} of 12")
assert own > 8

# %% [markdown]
# What does the temperature make of these cosines? Each row below is a softmax over the twelve names. Predict first: at
# temperature 1, how likely is the right name? Then move the slider until the loss is lowest. Is that as hot as it gets?


# %%
def choices(temperature=1.0):
    probabilities = (temperature * after).softmax(1)
    loss = F.cross_entropy(temperature * after, torch.arange(12))
    title = f"exp(t) = {temperature:.3g}: probability of each name, loss {loss:.2f} nats"
    return viz.similarity_matrix(probabilities, thumbnails, words, title=title)


viz.sliders(choices, temperature=(0.1, 100, "log"))

# %%
losses_at = {10**k: F.cross_entropy(10**k * after, torch.arange(12)).item() for k in (-1, 0, 1, 2)}
print({t: round(loss, 2) for t, loss in losses_at.items()}, "  guessing:", round(np.log(12), 2))
assert losses_at[10] < losses_at[1] < losses_at[0.1] and abs(losses_at[0.1] - np.log(12)) < 0.2

# %% [markdown]
# Too cold, and every name is equally likely, as if the model were guessing. Too hot, and one wrong name that is a
# little closer takes all the probability, which costs a lot.
#
# Nearly every image is closest to its own name. Before you celebrate: each of them chose among twelve names only, and
# this is just one set of twelve. The next section lets the images choose among all 100.

# %% [markdown]
# ## A classifier that you never trained
#
# We have not trained a classifier with 100 outputs. But a list of classes is a list of texts, and so any such list *is*
# a classifier: for each image, pick the text with the largest cosine. CLIP calls this **zero-shot** classification.
#
# The term is misleading. It does not mean that the model has never seen such an object. Ours has seen owls by two other
# artists, together with the word. It means that no image from *this* test set, here from this artist, was used in
# training (section 3.1 of the paper).
#
# ## Exercise 1.4 · Zero-shot
#
# You get the embeddings of N images and of C texts, one per class. Return the index of the predicted class for each
# image.


# %%
def zero_shot(images, class_texts):
    """[N, D], [C, D] → [N] integers from 0 to C − 1."""
    ### BEGIN SOLUTION
    return (l2_normalize(images) @ l2_normalize(class_texts).T).argmax(1)
    ### END SOLUTION


# %%
exercises.check(zero_shot)
### BEGIN HIDDEN TESTS
exercises.score(zero_shot, points=2, seed=1)
### END HIDDEN TESTS

# %%
zero_shot = exercises.piece("zero_shot")
targets = torch.arange(100)


def accuracy(predictions):
    return (predictions == targets).float().mean().item()


with torch.no_grad():
    image_embeddings, class_embeddings = image_encoder(test_images), text_encoder(bags[1])
predictions = zero_shot(image_embeddings, class_embeddings)
print(f"held-out artist: {accuracy(predictions):.0%} correct, chance {1 / 100:.0%}")
assert accuracy(predictions) > 0.2

# %% [markdown]
# The matrix above looked much better. It is the same model and the same images, but a different question: which of 12,
# not which of 100? We take all eight sets of twelve that can be picked like the one above, and all three wordings of
# the captions:

# %%
print("correct among          12 (mean of 8 sets)   12 (the set above)   100")
for template, wording in enumerate(templates):
    with torch.no_grad():
        class_texts = text_encoder(bags[template])
    sets = [torch.arange(first, 96, 8) for first in range(8)]
    choices = [zero_shot(image_embeddings[chosen], class_texts[chosen]) for chosen in sets]
    of_twelve = [(choice == torch.arange(12)).float().mean().item() for choice in choices]
    of_hundred = accuracy(zero_shot(image_embeddings, class_texts))
    print(f"{wording:22} {np.mean(of_twelve):18.0%}   {of_twelve[0]:18.0%}   {of_hundred:4.0%}")
    assert of_hundred < np.mean(of_twelve)

# %% [markdown]
# Among twelve, about four in five are correct, and the set in the matrix is one of the luckier ones. With 100 names
# there are more wrong ones that can win, so fewer answers are correct. The wording changes little, because the model
# was trained on all three. An accuracy means nothing without the number of candidates.
#
# ## The gap
#
# The training loss ended near 0.1. How does that fit with so many errors? We compare the three artists, all of them
# upright and on a white background:

# %%
white = torch.ones(100, 3, 1, 1)
by_artist = {artist: drawings[variants.index((artist, 0, False))] for artist in seen_artists}
by_artist |= {f"{held_out_artist}, held out": held_out}
artist_losses = {}
for artist, drawn in by_artist.items():
    with torch.no_grad():
        embeddings = image_encoder(on_background(drawn, white))
        artist_losses[artist] = clip_loss(embeddings, class_embeddings, log_temperature).item()
    correct = accuracy(zero_shot(embeddings, class_embeddings))
    print(f"{artist:18} {correct:4.0%} correct, loss {artist_losses[artist]:.2f} nats")
*seen, unseen = artist_losses.values()
assert max(seen) < 0.5 < 1 < unseen < np.log(100)

# %% [markdown]
# On drawings from training, nearly everything is correct and the loss is low. On the held-out artist, the loss is many
# times as high. It is still far below guessing, log 100 = 4.6 nats. The gap between the two is what the model learned
# about *these* drawings and not about the objects: two drawings per object can be told apart by a few colors, and the
# loss asks for no more. Rotating, mirroring and new backgrounds do not change how an artist draws an owl. More artists
# would. CLIP was trained on 400 million pairs of image and text. The training loss alone cannot show such a gap. It
# takes held-out data to see it.

# %%
shown = range(3, 100, 8)
titles = [emoji.OBJECTS[predictions[i]] + ("" if predictions[i] == i else f"\n(is: {emoji.OBJECTS[i]})") for i in shown]
viz.image_row(for_display(test_images[3::8]), titles, columns=7, title="Predictions, held-out artist")

# %% [markdown]
# The classifier is made of words, so you can swap it for another one in no time. Here are four classes, in a phrasing
# that training never used. (The bag ignores unknown words.)

# %%
classes = ["cat", "octopus", "sailboat", "rainbow"]
chosen = [emoji.OBJECTS.index(name) for name in classes]
with torch.no_grad():
    answers = zero_shot(image_embeddings[chosen], text_encoder(bag([f"now look at this {name}" for name in classes])))
print({name: classes[answer] for name, answer in zip(classes, answers, strict=True)})

# %% [markdown]
# ## The other direction: find the image
#
# *Retrieval* starts from a text and ranks the images. The usual metric is *recall at k*: the fraction of texts whose
# own image is among the first k.
#
# ## Exercise 1.5 · Ranks
#
# `similarity` is `[N, N]`, indexed [image, text], and image *j* belongs to text *j*. For each text, return the rank of
# its own image among all images: 1 if no image is more similar, N if all others are. Do not use a loop.


# %%
def retrieval_ranks(similarity):
    """[N, N] → [N] integers from 1 to N."""
    ### BEGIN SOLUTION
    return (similarity > similarity.diagonal()).sum(0) + 1
    ### END SOLUTION


# %%
exercises.check(retrieval_ranks)
### BEGIN HIDDEN TESTS
exercises.score(retrieval_ranks, points=3, seed=1)
### END HIDDEN TESTS

# %%
retrieval_ranks = exercises.piece("retrieval_ranks")
similarity = cosines_of(test_images, bags[0])
ranks = retrieval_ranks(similarity)
for k in (1, 5, 10):
    print(f"recall at {k:2}: {(ranks <= k).float().mean():.0%}, chance {k / 100:.0%}")
print(f"median rank {int(ranks.median())}, chance about 50")
assert (ranks <= 5).float().mean() > 0.3

# %% [markdown]
# Recall at 1 is also a choice among 100, and yet it differs from the accuracy of the classifier. The classifier finds
# the largest value in each row of the table, retrieval in each column. These are two different questions, as in the
# loss:

# %%
with torch.no_grad():
    class_texts = text_encoder(bags[0])
in_rows = accuracy(zero_shot(image_embeddings, class_texts))
in_columns = (ranks == 1).float().mean().item()
print(f"the same table, wording {templates[0]!r}: {in_rows:.0%} correct in the rows, {in_columns:.0%} in the columns")
assert in_columns == accuracy(zero_shot(class_texts, image_embeddings))  # retrieval with the roles swapped

# %%
titles, found = [], []
for j in [emoji.OBJECTS.index(name) for name in ("penguin", "pizza", "bicycle")]:
    top_six = similarity[:, j].topk(6).indices.tolist()
    titles += [f"{emoji.OBJECTS[j]}? {k}: {emoji.OBJECTS[i]}" for k, i in enumerate(top_six, start=1)]
    found += top_six
viz.image_row(for_display(test_images[found]), titles, columns=6, title="The six images closest to a word")

# %% [markdown]
# Look at the other results. They often have a similar color. We can measure that: take the mean color of each image
# (chapter 00), and compare a word's own image with the five others that are ranked highest.

# %%
colors = test_images.mean((2, 3))  # [100, 3]
apart = torch.cdist(colors, colors)
others = similarity.clone().fill_diagonal_(-1).T.topk(5).indices  # [100, 5], for each word
near, usual = apart.gather(1, others).mean(), apart.sum() / (100 * 99)
print(f"distance between mean colors: among the top results {near:.2f}, between any two images {usual:.2f}")
assert near < 0.9 * usual

# %% [markdown]
# We never told the model which objects look alike. It came out of learning to tell 100 objects apart.
#
# ## Break it: the batch axis
#
# The most common mistake in this chapter is one character: `dim=0` instead of `dim=-1`. Then every *column* of the
# batch gets length 1. The shapes are the same as before, and nothing crashes.


# %%
def normalize_over_batch(x):
    return x / x.norm(dim=0, keepdim=True)


directions = l2_normalize(class_embeddings)
together = (normalize_over_batch(image_embeddings) @ directions.T).argmax(1)
alone = torch.cat([(normalize_over_batch(image[None]) @ directions.T).argmax(1) for image in image_embeddings])
print(f"correct: {accuracy(predictions):.0%}")
print(f"broken:  {accuracy(together):.0%} as one batch, {accuracy(alone):.0%} one by one")
assert abs(accuracy(together) - accuracy(predictions)) < 0.12 and accuracy(alone) < accuracy(predictions)

# %% [markdown]
# As one batch, the accuracy hardly changes, so a test of this number alone would not find the bug. But now an answer
# depends on which other images are in the batch. An image that comes alone is divided by itself: every value becomes 1
# or −1, and much of its information is lost.

# %%
assert set(normalize_over_batch(image_embeddings[:1]).flatten().tolist()) == {-1.0, 1.0}
assert not torch.equal(together, alone)
fixed = torch.cat([zero_shot(image[None], class_embeddings) for image in image_embeddings])
assert torch.equal(fixed, predictions)  # normalized by rows, an image gets the same answer in any batch
print(f"answers that depend on the batch: broken {(together != alone).sum()}, fixed {(fixed != predictions).sum()}")

# %% [markdown]
# **How to find such a bug:** run one image alone and as part of a batch. The answers must be the same.
#
# ## Break it again: softmax twice
#
# `F.cross_entropy` expects logits. If you pass probabilities, it takes the softmax of numbers between 0 and 1. Then
# even a perfect answer, 1 for the right class and 0 for all others, still costs −log(e / (e + 99)):

# %%
with torch.no_grad():
    batch_images, batch_bags = sample_batch()
    logits = clip_logits(image_encoder(batch_images), text_encoder(batch_bags), log_temperature)
once, twice = F.cross_entropy(logits, targets), F.cross_entropy(logits.softmax(1), targets)
least = np.log(1 + 99 / np.e)
print(f"one softmax: {once:.2f};  two: {twice:.2f}, and never less than {least:.2f}")
assert once < 1 and twice > least - 1e-4

# %% [markdown]
# A loss that gets stuck at 3.62, when guessing costs 4.61, looks like a model that hardly learns. But the model is
# fine, and the loss is wrong. Know what your loss should be at the start and at best, and compare. At best it is 0. At
# the start it is near log n. (Ours started above that, because a temperature of 14 turns even random cosines into
# confident choices.)
#
# ## It matches
#
# We compare your functions, or the package's if you skipped some, with the package and with CLIP in transformers, on
# random weights:

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
torch.manual_seed(0)
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
text_config, vision_config = small | {"vocab_size": 60}, small | {"image_size": 8, "patch_size": 4}
config = transformers.CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=12)
reference = transformers.CLIPModel(config).eval()
inputs = {"input_ids": torch.randint(3, 60, (7, 5)), "pixel_values": torch.randn(7, 3, 8, 8)}
with torch.no_grad():
    output = reference(**inputs, return_loss=True)
    x = reference.get_image_features(inputs["pixel_values"]).pooler_output  # not normalized yet
    y = reference.get_text_features(inputs["input_ids"]).pooler_output


# %%
def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


t = reference.logit_scale.detach()
differences = {
    "logits, transformers": relative(clip_logits(x, y, t), output.logits_per_image),
    "loss, transformers": relative(clip_loss(x, y, t), output.loss),
    "loss, the package": relative(clip_loss(x, y, t), losses.clip_loss(x, y, t)),
}
for name, difference in differences.items():
    print(f"{name:21} relative difference {difference:.1e}")
assert max(differences.values()) < 1e-5

# %% [markdown]
# ## Recap
#
# * Two encoders, one space: an image and a text that belong together should point in the same direction.
# * Normalize, multiply, scale: logits = exp(t) · cosine, with a learned t.
# * Each image chooses among the texts (rows), and each text among the images (columns). The loss is the mean of these
#   two cross-entropies, with the right answers on the diagonal.
# * n pairs come with n² − n wrong pairs for free, and some of those are not really wrong.
# * A list of texts is a classifier. A single text is a search query.
#
# **Three questions**
#
# <details><summary>1. Can our model tell "a cat on a box" from "a box on a cat"?</summary>
#
# No. Both are the same bag of words, so they have the same embedding. CLIP's text encoder is a transformer that knows
# the word order. But a model need not learn what the loss does not require, and the wrong captions in a batch rarely
# differ in word order alone.
#
# </details>
#
# <details><summary>2. The loss starts at log 100 and does not go down. What do you check first?</summary>
#
# Whether images and captions still belong together: shuffled pairs produce exactly this. Then whether gradients reach
# both encoders.
#
# </details>
#
# <details><summary>3. 256 machines share a batch of 32,768 pairs. Why can't a machine compute its part of the loss from
# its own 128 pairs?</summary>
#
# The softmax of a row divides by the sum over *all* 32,768 texts, and the softmax of a column by the sum over all
# images. So every machine needs the embeddings of all the others. What that costs, and how SigLIP gets around it, is
# the next chapter.
#
# </details>
#
# ## For the bold: hard batches
#
# An open problem, with tests but without a stub. Our batches contain all 100 objects. With a million objects, they
# could not, and a random batch rarely contains two that are hard to tell apart. Write `hard_batches(embeddings,
# batch_size)`. It gets the embeddings of N objects `[N, D]`, where N is a multiple of `batch_size`, and sorts the
# objects into batches of similar ones: integers `[N / batch_size, batch_size]`, each object exactly once. Use a new
# cell above the tests:


# %%
def closeness(batches):
    """The mean cosine between two different objects of the same batch."""
    x = l2_normalize(class_embeddings)[batches]  # [batches, batch size, D]
    cosines = x @ x.transpose(1, 2)
    size = batches.shape[1]
    return ((cosines.sum((1, 2)) - size) / (size * (size - 1))).mean().item()


def loss_in(batches):
    """The loss on the held-out artist, computed within each batch."""
    with torch.no_grad():
        parts = [clip_loss(image_embeddings[batch], class_embeddings[batch], log_temperature) for batch in batches]
    return float(torch.stack(parts).mean())


random_batches = torch.randperm(100, generator=torch.Generator().manual_seed(0)).view(10, 10)
print(f"random batches of 10: closeness {closeness(random_batches):.3f}, loss {loss_in(random_batches):.2f}")
if "hard_batches" in globals():
    batches = torch.as_tensor(hard_batches(class_embeddings, 10))
    assert batches.shape == (10, 10) and sorted(batches.flatten().tolist()) == list(range(100))
    assert hard_batches(class_embeddings[:6], 3).shape == (2, 3)
    print(f"yours:                closeness {closeness(batches):.3f}, loss {loss_in(batches):.2f}")
    assert closeness(batches) > closeness(random_batches) + 0.05
    print("hard_batches passes.")
else:
    print("hard_batches is not written yet.")

# %% [markdown]
# <details><summary>Discussion</summary>
#
# The simplest solution takes the first object that is left, adds the most similar ones that are left, and starts again.
# Its last batches consist of leftovers, which are hardly similar. Better ones cluster first, or swap objects between
# batches as long as that helps.
#
# Do such batches teach more? Train on them and measure on the held-out artist, because the training loss goes up by
# construction. Wrong captions that almost fit teach the most (Robinson et al. 2020,
# [2010.04592](https://arxiv.org/abs/2010.04592)). But the closer you look for them, the more of them are not wrong at
# all, like the twins of this chapter.
#
# </details>
#
# **Next:** [02 · Safe softmax and the sigmoid loss](02_sigmoid_loss.ipynb), in which exp overflows and a sigmoid
# replaces the softmax.
