# %% [markdown]
# # 01 · CLIP loss
#
# **How do pictures and words come to share a space?**
#
# | | |
# |---|---|
# | time | 85 minutes, 43 of them exercises |
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
# A model gets four pictures and their four captions, shuffled, and has to say what belongs together. Decide, before you
# go on:
#
# 1. There are 16 ways to put one picture and one caption together. How many of them are wrong?
# 2. All numbers that describe a picture are doubled. Should the picture now fit its caption better?
# 3. A model that knows nothing chooses among 100 captions. It pays −log(the probability of the right one). How much?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. Twelve: n² − n.
# 2. No. Only the direction of a vector counts, its length is divided out.
# 3. The right one has probability 1/100, so log 100 = 4.6. All logarithms of this course are natural ones; the unit of
#    such a loss is the *nat*.
#
# </details>

# %% [markdown]
# ## Two encoders, one space
#
# A picture is an array of pixels, a caption a row of words. Two networks turn both into the same kind of thing: a list of
# so many numbers, the *embedding*. What belongs together should come to lie in the same direction. That is
# all of CLIP (Radford and others 2021, arXiv:2103.00020): two encoders and a loss, which this chapter builds.
#
# ```
# picture ──▶ image encoder ──▶ x ──┐
#                                   ├──▶ same direction?
# caption ──▶ text encoder ───▶ y ──┘
# ```
#
# ## A toy: two pictures, two captions
#
# Embeddings with two numbers each, so that everything can be followed by hand. Row *i* of `pictures` and row *i* of
# `texts` belong together.

# %%
names = ["a cat", "a moon"]
pictures = np.array([[3.0, 4.0], [2.0, 0.0]])  # what an image encoder might say
texts = np.array([[0.0, 1.0], [10.0, 0.0]])  # what a text encoder might say

# %% [markdown]
# The *dot product* multiplies coordinate by coordinate and adds: the picture of the cat with "a cat" gives
# 3·0 + 4·1 = 4, with "a moon" 3·10 + 4·0 = 30. One matrix product makes all four.

# %%
dots = pictures @ texts.T
print(dots)
assert dots[0].tolist() == [4, 30]

# %% [markdown]
# So the cat fits "a moon" better? Only because that embedding is ten long. The *L2 norm* ‖x‖ is the length of a vector,
# by Pythagoras: the root of the sum of the squares. The picture of the cat has √(3² + 4²) = 5. Dividing each vector by
# its norm leaves the direction alone, and the dot product of two directions is the cosine of the angle between them:
# 1 for the same direction, 0 for a right angle, −1 for opposite ones.

# %%
x = pictures / np.sqrt((pictures**2).sum(axis=1, keepdims=True))  # [2, 2]: one length a row
y = texts / np.sqrt((texts**2).sum(axis=1, keepdims=True))
cosines = x @ y.T
assert np.allclose(cosines, [[0.8, 0.6], [0.0, 1.0]])  # 4/(5·1), 30/(5·10), 0, 20/(2·10)
viz.similarity_matrix(cosines, [f"picture of {n}" for n in names], names, title="The cosines of the toy")

# %% [markdown]
# As arrows: on the left the embeddings, on the right their directions, which all end on the circle of radius 1.

# %%
from matplotlib.figure import Figure

LABELS = {  # each with its place beside the tip, in points, and its color
    "picture of a cat": ((4, 2), "left", "#0072B2"),
    "picture of a moon": ((0, -12), "left", "#0072B2"),
    "text: a cat": ((-4, -3), "right", "#D55E00"),
    "text: a moon": ((2, 4), "left", "#D55E00"),
}


def draw_arrows(axes, points):
    for (label, (shift, side, color)), tip in zip(LABELS.items(), points, strict=True):
        style = {"color": color, "linestyle": "--" if "text" in label else "-", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "linewidth": 2} | style)
        axes.annotate(label, tip, shift, textcoords="offset points", ha=side, color=color, fontsize=8)


# %%
figure = Figure(figsize=(8, 3))
for axes, points, name in zip(
    figure.subplots(1, 2), [(pictures, texts), (x, y)], ["embeddings", "directions"], strict=True
):
    size = np.abs(points).max()
    axes.set(title=name, xlim=(-0.7 * size, 2.0 * size), ylim=(-0.2 * size, 1.1 * size), aspect="equal")
    draw_arrows(axes, np.concatenate(points))
viz.from_figure(
    figure,
    "Two pictures and two texts as arrows. As embeddings, a moon is by far the longest. As directions, each text is nearest to its own picture.",
)

# %% [markdown]
# ## Exercise 1.1 · Directions ★☆☆ (5 minutes)
#
# Write `l2_normalize` in torch: each row of `x` divided by its L2 norm.
#
# <details><summary>Hint</summary>
#
# `x.norm(dim=-1, keepdim=True)` has one length a row and the shape `[N, 1]`, which divides `[N, D]` row by row.
#
# </details>


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
# From here on the chapter uses your function if it passed, and the package's if not:

# %%
l2_normalize = exercises.piece("l2_normalize")

# %% [markdown]
# ## From cosines to choices
#
# A picture chooses among the captions with a *softmax*: the exponentials of its numbers, divided by their sum, so that
# they are positive and add up to 1. Straight from cosines the choice is dull, since these lie between −1 and 1. A
# factor, the *temperature* exp(t), makes it sharper:


# %%
def softmax(row):
    return np.exp(row) / np.exp(row).sum()


for temperature in (1, 10, 100):
    print(f"exp(t) = {temperature:3}: the cat is 'a cat' with {softmax(temperature * cosines[0])[0]:.4f}")

# %% [markdown]
# How much does it matter? Take 100 pairs and the best model there could be: cosine 1 for what belongs together and −1/99
# for everything else (100 directions cannot all be opposite; this is as far apart as they can be). Its loss, −log of the
# probability of the right caption, is log(1 + 99 · exp(−100/99 · exp(t))):

# %%
factors = np.geomspace(0.5, 20, 40)
best = np.log(1 + 99 * np.exp(-100 / 99 * factors))
at_one = np.log(1 + 99 * np.exp(-100 / 99))
print(f"guessing {np.log(100):.2f} nats, the best model at exp(t) = 1: {at_one:.2f}")
assert at_one > 3 / 4 * np.log(100)
curves = {"best possible": (factors, best), "guessing": (factors, np.full(40, np.log(100)))}
viz.lines(curves, "Loss of a choice among 100", "temperature exp(t)", "loss in nats", log="x")

# %% [markdown]
# Without a temperature even a perfect model would pay more than three quarters of what guessing costs. CLIP learns t together
# with the weights. The exponential keeps the factor positive, and a step of t changes it by a percentage, not by an
# amount. It starts at exp(t) = 1/0.07 ≈ 14 and is kept at 100 or less (section 2.5 of the paper).
#
# **Mind the word.** In physics, in the sampling of chapter 08 and where the paper writes τ = 0.07, a temperature
# *divides*: high means soft. In CLIP's code, in SigLIP's and in this course, exp(t) = 1/τ *multiplies*: high means sharp.
#
# ## Exercise 1.2 · The table ★☆☆ (8 minutes)
#
# Numbers that go into a softmax are called *logits*. Write the table of them: temperature × cosine of every picture
# with every text. `log_temperature` is t, a tensor without axes. You may call `l2_normalize`.
#
# <details><summary>Hint</summary>
#
# `x @ y.T` of two tables of directions holds all cosines, pictures down, texts across. `log_temperature.exp()`.
#
# </details>


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
# The toy at exp(t) = 10 has the logits
#
# | | "a cat" | "a moon" |
# |---|---|---|
# | picture of a cat | **8** | 6 |
# | picture of a moon | 0 | **10** |
#
# Each *picture* chooses in its row. The cat pays −log(e⁸ / (e⁸ + e⁶)) = log(1 + e⁻²) = 0.1269, the moon
# log(1 + e⁻¹⁰) = 0.0000. Mean: 0.0635.
#
# Each *text* chooses in its column. "a cat" pays log(1 + e⁻⁸) = 0.0003, "a moon" log(1 + e⁻⁴) = 0.0181. Mean: 0.0092.
#
# The loss is the mean of both: **0.0364**. Rows and columns are different questions: 6 hurts the cat, since it is near 8,
# and hurts "a moon" much less, since it is far from 10. (It is often said that CLIP takes *a* softmax over the table.
# It takes two, and no entry is normalized over the whole table.)
#
# ### The slow loop

# %%
logits = 10 * cosines
n = len(logits)
rows = columns = 0.0
for i in range(n):
    rows -= np.log(np.exp(logits[i, i]) / sum(np.exp(logits[i, j]) for j in range(n)))
    columns -= np.log(np.exp(logits[i, i]) / sum(np.exp(logits[j, i]) for j in range(n)))
by_loop = (rows / n + columns / n) / 2
print(f"pictures {rows / n:.4f}, texts {columns / n:.4f}, loss {by_loop:.4f}")
assert round(by_loop, 4) == 0.0364

# %% [markdown]
# ### In numpy, all at once
#
# The right answers stand on the diagonal: picture *i* and text *i* at (i, i).


# %%
def log_softmax(table, axis):
    return table - np.log(np.exp(table).sum(axis=axis, keepdims=True))


over_texts, over_pictures = log_softmax(logits, axis=1), log_softmax(logits, axis=0)
in_numpy = -(np.diag(over_texts).mean() + np.diag(over_pictures).mean()) / 2
assert np.allclose(np.exp(over_texts).sum(1), 1) and np.allclose(np.exp(over_pictures).sum(0), 1)
assert np.isclose(in_numpy, by_loop)

# %% [markdown]
# ### In torch
#
# −log of the softmax at the right answer is what `F.cross_entropy` computes, given logits `[N, C]` and, for each row,
# the number of the right column. The right column of row *i* is *i*. For the texts, transpose.

# %%
table, own = torch.from_numpy(logits), torch.arange(n)
in_torch = (F.cross_entropy(table, own) + F.cross_entropy(table.T, own)) / 2
assert np.isclose(in_torch.item(), by_loop)

# %% [markdown]
# ## Exercise 1.3 · CLIP's loss ★★☆ (10 minutes)
#
# From embeddings to the loss. You may call `clip_logits`, and `F.cross_entropy`.
#
# <details><summary>Hint</summary>
#
# The logits once as they are and once transposed, against `torch.arange(len(logits))`; then the mean of the two.
#
# </details>


# %%
def clip_loss(image_embeddings, text_embeddings, log_temperature):
    """[N, D], [N, D], a number → the mean loss of both directions, in nats, a tensor without axes."""
    ### BEGIN SOLUTION
    logits = clip_logits(image_embeddings, text_embeddings, log_temperature)
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    ### END SOLUTION


# %%
exercises.check(clip_loss)
### BEGIN HIDDEN TESTS
exercises.score(clip_loss, points=3, seed=1)
### END HIDDEN TESTS

# %%
clip_loss = exercises.piece("clip_loss")
toy = torch.from_numpy(pictures), torch.from_numpy(texts), torch.tensor(10.0).log()
assert np.isclose(clip_loss(*toy).item(), by_loop)

# %% [markdown]
# ## The wrong pairs
#
# Nobody labels wrong pairs. They come for free: a batch of n pairs has n right entries and n² − n wrong ones.

# %%
for n, where in ((2, "the toy"), (100, "our training"), (32_768, "CLIP's training (section 2.5 of the paper)")):
    print(f"n = {n:6,}: {n**2 - n:13,} wrong pairs, guessing costs {np.log(n):5.2f} nats   {where}")

# %% [markdown]
# That is why batches are large: more wrong pairs, a harder question, and the wrong ones that look alike are rarely
# missed. It also has a price. The loss calls every other caption wrong, even where it fits. Here four pairs, two of them the
# same thing; the embeddings could not be better, and yet:

# %%
four = torch.eye(4)
twice = four[[0, 0, 1, 2]]  # the first two pairs are equal
hot = torch.tensor(100.0).log()
print(f"all different: {clip_loss(four, four, hot):.4f}   two alike: {clip_loss(twice, twice, hot):.4f}")
assert torch.isclose(clip_loss(twice, twice, hot), torch.tensor(2.0).log() / 2)  # half of the pairs toss a coin: log 2

# %% [markdown]
# So our batches will hold each name once.
#
# ## Training on emoji
#
# The data set of this course has 100 things, drawn by three artists. Two are for training; the third is kept for the
# test. Each drawing is put in the middle of 32 × 32 pixels; its fourth channel says how opaque it is.


# %%
def draw(name, artist, angle=0, mirror=False):
    """[4, 32, 32] in 0…1: red, green and blue times the opacity, and the opacity."""
    sprite = emoji.draw_sprite(name, artist, 28, angle, mirror)
    height, width, _ = sprite.shape
    top, left = (32 - height) // 2, (32 - width) // 2
    canvas = np.zeros((32, 32, 4), np.uint8)
    canvas[top : top + height, left : left + width] = sprite
    return torch.from_numpy(canvas).permute(2, 0, 1) / 255


def on_background(drawings, colors):
    """[N, 4, 32, 32] on plain colors [N, 3, 1, 1] → pictures [N, 3, 32, 32] in −1…1."""
    return 2 * (drawings[:, :3] + (1 - drawings[:, 3:]) * colors) - 1


# %% [markdown]
# For training every thing is drawn by both artists, upright and turned a little, and mirrored:

# %%
from itertools import product

from tqdm.auto import tqdm

ways = list(product(emoji.TRAIN_ARTISTS, (-16, -8, 0, 8, 16), (False, True)))  # artist, angle in degrees, mirrored
drawings = torch.stack([torch.stack([draw(name, *way) for name in emoji.OBJECTS]) for way in tqdm(ways, "drawing")])
unseen = torch.stack([draw(name, emoji.UNSEEN_ARTISTS[0]) for name in emoji.OBJECTS])
print("to train on", list(drawings.shape), "  of the unseen artist", list(unseen.shape))


# %%
def to_show(pictures):
    return [p.permute(1, 2, 0) / 2 + 0.5 for p in pictures]


some = list(product(("owl", "carrot", "tractor", "castle"), emoji.TRAIN_ARTISTS + emoji.UNSEEN_ARTISTS))
shown = on_background(torch.stack([draw(*pair) for pair in some]), torch.ones(12, 3, 1, 1))
viz.image_row(to_show(shown), [", ".join(pair) for pair in some], columns=6, title="Four things by three artists")

# %% [markdown]
# ### A bag of words
#
# The captions are real names in a few wordings. The text encoder is the plainest there is: take the mean of the words'
# vectors. Count each word of the vocabulary and divide by the number of words: a linear layer on these shares does
# exactly that. The order of the words is lost: hence *bag*.

# %%
wordings = ["{}", "a picture of {}", "here is {}"]
captions = [[wording.format(emoji.with_article(name)) for name in emoji.OBJECTS] for wording in wordings]
vocabulary = sorted({word for row in captions for caption in row for word in caption.split()})


def bag(captions):
    """N texts → [N, V]: the share of each word. Words that are not in the vocabulary are left out."""
    counts = torch.tensor([[caption.split().count(word) for word in vocabulary] for caption in captions])
    return counts / counts.sum(1, keepdim=True)


bags = torch.stack([bag(row) for row in captions])
shares = {word: round(share.item(), 2) for word, share in zip(vocabulary, bags[1, 10], strict=True) if share}
print(len(vocabulary), "words;", captions[1][10], "→", shares)

# %% [markdown]
# ### The two encoders
#
# The image encoder halves the picture three times and makes one vector of what is left. (`GroupNorm` keeps the numbers
# in range; chapter 03 is about norms.) Both end with 64 numbers.

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
# Before training, pictures and words have nothing to do with each other. Twelve things of the unseen artist:

# %%
test_pictures = on_background(unseen, torch.ones(100, 3, 1, 1))


def cosines_of(pictures, counts):
    with torch.no_grad():
        return clip_logits(image_encoder(pictures), text_encoder(counts), torch.tensor(0.0))


twelve = slice(0, 96, 8)
faces, words = to_show(test_pictures[twelve]), list(emoji.OBJECTS[twelve])
viz.similarity_matrix(cosines_of(test_pictures[twelve], bags[0, twelve]), faces, words, title="Cosines before training")

# %% [markdown]
# ### The loop
#
# A batch: all 100 things, each drawn in one of its ways, on a background of any color, and each with one of its
# captions; the whole batch is moved by the same few pixels.


# %%
def batch():
    way, wording = torch.randint(len(ways), (100,)), torch.randint(len(wordings), (100,))
    pictures = on_background(drawings[way, torch.arange(100)], torch.rand(100, 3, 1, 1))
    shift = torch.randint(-3, 4, (2,)).tolist()
    return pictures.roll(shift, dims=(2, 3)), bags[wording, torch.arange(100)]


# %%
steps = 500
weights = [*image_encoder.parameters(), *text_encoder.parameters(), log_temperature]
optimizer = torch.optim.AdamW(weights)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)  # up, then down to nothing

# %%
history = []
for _ in tqdm(range(steps), "training"):
    pictures, counts = batch()
    loss = clip_loss(image_encoder(pictures), text_encoder(counts), log_temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    history.append(loss.item())

# %%
print(f"the first batch {history[0]:.2f}, the last ten {np.mean(history[-10:]):.2f}")
print(f"exp(t) was 14.3 and is {log_temperature.exp():.1f}")
assert np.mean(history[-10:]) < 1 < history[0]
curves = {"loss": (range(steps), history), "guessing": (range(steps), [np.log(100)] * steps)}
viz.lines(curves, "Training: which of these 100?", "step", "loss in nats")

# %% [markdown]
# The same twelve things, which this model has never seen drawn by this hand:

# %%
viz.similarity_matrix(
    cosines_of(test_pictures[twelve], bags[0, twelve]), faces, words, title="Cosines after training, artist unseen"
)

# %% [markdown]
# ## A classifier without training one
#
# Nobody has trained a classifier with 100 outputs. But a list of classes is a list of texts, and so every such list
# *makes* a classifier: for each picture, take the text with the largest cosine. CLIP calls this **zero-shot**
# classification.
#
# The word misleads. It does not mean that the model has never seen such a thing: ours has seen owls, by two other artists,
# with their word. It means that no picture of *this* test, here of this artist, was ever used for training (section 3.1
# of the paper).
#
# ## Exercise 1.4 · Zero-shot ★★☆ (8 minutes)
#
# Given embeddings of N pictures and of C texts, one a class, return the number of the class of each picture.
#
# <details><summary>Hint</summary>
#
# The table of cosines, and of each row the place of the largest number: `argmax`. Which of the two norms could you leave
# out, and which not?
#
# </details>


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
own = torch.arange(100)
with torch.no_grad():
    images, class_texts = image_encoder(test_pictures), text_encoder(bags[1])
guess = zero_shot(images, class_texts)
right = (guess == own).float().mean().item()
print(f"the unseen artist: {right:.0%} right, chance {1 / 100:.0%}")
assert right > 0.2

# %%
places = range(3, 100, 8)
titles = [emoji.OBJECTS[guess[i]] + ("" if guess[i] == i else f"\n(is: {emoji.OBJECTS[i]})") for i in places]
viz.image_row(to_show(test_pictures[3::8]), titles, columns=7, title="What the model says, artist unseen")

# %% [markdown]
# The classifier is made of words, so it can be another one in a moment. Four classes, in a wording that training never
# used (unknown words are left out of the bag):

# %%
classes = ["cat", "octopus", "sailboat", "rainbow"]
asked = [emoji.OBJECTS.index(name) for name in classes]
with torch.no_grad():
    answers = zero_shot(images[asked], text_encoder(bag([f"now look at this {name}" for name in classes])))
print({name: classes[answer] for name, answer in zip(classes, answers, strict=True)})

# %% [markdown]
# ## The other way: find the picture
#
# *Retrieval* starts from a text and ranks the pictures. The usual number is *recall at k*: of how many texts is the right
# picture among the first k.
#
# ## Exercise 1.5 · Ranks ★★★ (12 minutes)
#
# `similarity` is `[N, N]`, indexed [picture, text], and picture *j* belongs to text *j*. Return for each text the rank of
# its own picture among all pictures: 1 if no picture is more similar, N if all others are. No loop.
#
# <details><summary>Hint</summary>
#
# The rank is 1 plus the number of pictures in the column that are more similar than the own one. The own ones are
# `similarity.diagonal()`, one a column.
#
# </details>


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
similarity = cosines_of(test_pictures, bags[0])
ranks = retrieval_ranks(similarity)
for k in (1, 5, 10):
    print(f"recall at {k:2}: {(ranks <= k).float().mean():.0%}, chance {k / 100:.0%}")
print(f"median rank {int(ranks.median())}, chance about 50")
assert (ranks <= 5).float().mean() > 0.3

# %%
titles, found = [], []
for j in [emoji.OBJECTS.index(name) for name in ("penguin", "pizza", "bicycle")]:
    six = similarity[:, j].topk(6).indices.tolist()
    titles += [f"{emoji.OBJECTS[j]}? {k}: {emoji.OBJECTS[i]}" for k, i in enumerate(six, start=1)]
    found += six
viz.image_row(to_show(test_pictures[found]), titles, columns=6, title="The six pictures nearest to a word")

# %% [markdown]
# Look at what else is found: often things of the same color or outline. Nobody told the model what is alike; it follows
# from what helped to tell 100 things apart.
#
# ## Break it: the batch axis
#
# The most common slip of this chapter is one character: `dim=0` for `dim=-1`. Every *column* of the batch then gets length
# 1, and the shapes are as before. Nothing crashes.


# %%
def over_the_batch(x):
    return x / x.norm(dim=0, keepdim=True)


def accuracy(answers):
    return (answers == own).float().mean().item()


directions = l2_normalize(class_texts)
together = (over_the_batch(images) @ directions.T).argmax(1)
alone = torch.cat([(over_the_batch(image[None]) @ directions.T).argmax(1) for image in images])
print(f"right: {right:.0%};  broken: {accuracy(together):.0%} together, {accuracy(alone):.0%} one by one")

# %% [markdown]
# Together the share hardly changes, and may even rise, so a test that looks at this number would not find it. But now
# an answer depends on which other pictures are in the batch. A picture that comes alone is divided by itself: every
# number becomes 1 or −1, and much of what it said is gone.

# %%
assert set(over_the_batch(images[:1]).flatten().tolist()) == {-1.0, 1.0}
assert not torch.equal(together, alone)
repaired = torch.cat([zero_shot(image[None], class_texts) for image in images])
assert torch.equal(repaired, guess)  # normalized by rows, a picture's answer is its own
print(f"answers that depend on the company: {(together != alone).sum()} before, {(repaired != guess).sum()} after")

# %% [markdown]
# **How to find such a bug:** ask for one picture alone and in a batch. The answers must be the same.
#
# ## Break it again: the softmax, twice
#
# `F.cross_entropy` wants logits. Who gives it probabilities takes the softmax of numbers between 0 and 1, and the best
# there is, 1 for the right answer and 0 for all others, still costs −log(e / (e + 99)):

# %%
with torch.no_grad():
    pictures, counts = batch()
    logits = clip_logits(image_encoder(pictures), text_encoder(counts), log_temperature)
once, twice = F.cross_entropy(logits, own), F.cross_entropy(logits.softmax(1), own)
least = np.log(1 + 99 / np.e)
print(f"one softmax {once:.2f};  two {twice:.2f}, and never less than {least:.2f}")
assert once < 1 and twice > least - 1e-4

# %% [markdown]
# A loss that stops at 3.62 where guessing costs 4.61 looks like a model that learns badly. It is a good model, badly
# asked. Know what your loss should be at the start (near log n; ours began a little above, since a factor of 14 makes
# even random cosines into confident choices) and at best (0), and compare.
#
# ## It matches
#
# Your pieces, or the package's, against the package and against CLIP in transformers, with random weights:

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
torch.manual_seed(0)
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
text, vision = small | {"vocab_size": 60}, small | {"image_size": 8, "patch_size": 4}
theirs = transformers.CLIPModel(
    transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
).eval()
inputs = {"input_ids": torch.randint(3, 60, (7, 5)), "pixel_values": torch.randn(7, 3, 8, 8)}
with torch.no_grad():
    out = theirs(**inputs, return_loss=True)
    x = theirs.get_image_features(inputs["pixel_values"]).pooler_output  # before they are normalized
    y = theirs.get_text_features(inputs["input_ids"]).pooler_output


# %%
def relative(ours, reference):
    return float((ours - reference).abs().max() / reference.abs().max())


t = theirs.logit_scale.detach()
differences = {
    "logits, transformers": relative(clip_logits(x, y, t), out.logits_per_image),
    "loss, transformers": relative(clip_loss(x, y, t), out.loss),
    "loss, the package": relative(clip_loss(x, y, t), losses.clip_loss(x, y, t)),
}
for what, difference in differences.items():
    print(f"{what:21} relative difference {difference:.1e}")
assert max(differences.values()) < 1e-5

# %% [markdown]
# ## Recap
#
# * Two encoders, one space: what belongs together should lie in the same direction.
# * Normalize, multiply, scale: logits = exp(t) · cosine, with t learned.
# * Each picture chooses among the texts (rows) and each text among the pictures (columns): two cross-entropies, their
#   mean, the right answers on the diagonal.
# * n pairs bring n² − n wrong ones for free, some of which are not wrong.
# * A list of texts is a classifier; a text is a search.
#
# **Three questions**
#
# <details><summary>1. Can our model tell "a cat on a box" from "a box on a cat"?</summary>
#
# No. Both are the same bag of words, so they have the same embedding. CLIP's text encoder is a transformer that knows
# the order; but what the loss does not ask for, it need not learn: wrong captions in a batch rarely differ by their
# order alone.
#
# </details>
#
# <details><summary>2. The loss is log 100 at the start of training and does not move. What do you look at first?</summary>
#
# Whether rows and captions still belong together: shuffled labels give exactly this. Then whether gradients reach both
# encoders.
#
# </details>
#
# <details><summary>3. A batch of 32,768 pairs is spread over 256 machines. Why can none of them compute its part of the
# loss from its own 128 pairs?</summary>
#
# The softmax of a row divides by the sum over *all* 32,768 texts, and that of a column over all pictures. Every machine
# needs what all others have. What that costs, and how SigLIP got rid of it, is the next chapter.
#
# </details>
#
# **Next:** [02 · Safe softmax and the sigmoid loss](02_sigmoid_loss.ipynb), in which exp overflows, and the softmax goes.
