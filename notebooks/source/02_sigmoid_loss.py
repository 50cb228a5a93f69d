# %% [markdown]
# # 02 · Safe softmax and the sigmoid loss
#
# **Why did SigLIP leave softmax?**
#
# | | |
# |---|---|
# | time | 90 minutes, 45 of them exercises |
# | know first | chapter 01: cosines, temperature, the table of pairs, CLIP's loss |
# | you will build | a softmax that never overflows; the loss with which PaliGemma's vision tower was taught, whole, in chunks and in several processes |
# | runs on | CPU, nothing to download |

# %%
import torch
import torch.nn.functional as F

from minivlm import losses
from minivlm.course import exercises, viz

viz.you_are_here("02")

# %% [markdown]
# ## Predict first
#
# 1. exp(89) is about 4.5 · 10³⁸. What does a computer say in float32?
# 2. All logits of a row are raised by 1000. What happens to their softmax?
# 3. 256 machines hold 4,096 pairs each. How much of the table of all pairs can a machine fill without hearing from the
#    others?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. Infinity: the largest number of float32 is 3.4 · 10³⁸.
# 2. On paper nothing: the factor exp(1000) cancels. In a computer it becomes NaN, unless one takes care.
# 3. One of 256 × 256 blocks: its own pictures with its own texts, 1/65,536 of the table.
#
# </details>

# %% [markdown]
# ## Where exp ends
#
# A softmax takes exponentials, and these outgrow every floating-point format:

# %%
for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    most = torch.finfo(dtype).max
    last = int(torch.tensor(most, dtype=torch.float64).log())
    below, above = torch.tensor([last - 1, last + 2], dtype=dtype).exp().tolist()
    print(f"{str(dtype)[6:]:8} largest {most:8.3g}   exp({last - 1}) = {below:9.3g}   exp({last + 2}) = {above}")
    assert below < float("inf") == above

# %% [markdown]
# Beyond that exp is ∞, and the softmax is ∞/∞, which is NaN, "not a number":


# %%
def softmax(x, dim=-1):
    """As the definition says."""
    return x.exp() / x.exp().sum(dim, keepdim=True)


print("float32", softmax(torch.tensor([100.0, 0.0])).tolist())
print("float16", softmax(torch.tensor([14.3, 0.0], dtype=torch.float16)).tolist())
assert softmax(torch.tensor([100.0, 0.0]))[0].isnan() and softmax(torch.tensor([14.3, 0.0]).half())[0].isnan()

# %% [markdown]
# These are not exotic numbers. CLIP's temperature may grow to 100, and a cosine to 1: exp(100) is beyond float32. In
# float16 the temperature that CLIP *starts* with, 14.3, is enough. At the other end everything vanishes, and the
# softmax is 0/0:

# %%
print(softmax(torch.tensor([-200.0, -201.0])).tolist())
weight = torch.tensor([100.0, 0.0], requires_grad=True)
softmax(weight)[1].backward()
print("gradient", weight.grad.tolist())
assert softmax(torch.tensor([-200.0, -201.0])).isnan().all() and weight.grad.isnan().all()

# %% [markdown]
# One NaN in a loss makes every gradient NaN, and after the next step every weight. Nothing raises an error.
#
# ## The shift that changes nothing
#
# For any number m
#
# $$\frac{e^{x_i - m}}{\sum_j e^{x_j - m}} = \frac{e^{-m}\, e^{x_i}}{e^{-m} \sum_j e^{x_j}} = \frac{e^{x_i}}{\sum_j e^{x_j}}$$
#
# On paper every m will do. With m = max(x) the largest exponent is 0: no exponential is above 1, nothing
# overflows. And one of them *is* 1, so the sum is at least 1: no 0/0. What underflows to 0 is a probability too small
# for the format, which is right.
#
# ### The slow loop

# %%
import math


def slow_softmax(row):
    top = max(row)
    exponentials = [math.exp(number - top) for number in row]
    return [e / sum(exponentials) for e in exponentials]


print(slow_softmax([1000.0, 999.0, 0.0]))
assert math.isclose(slow_softmax([1000.0, 999.0])[0], 1 / (1 + math.exp(-1)))
assert slow_softmax([1000.0, 999.0]) == slow_softmax([0.0, -1.0])  # the shift changes nothing

# %% [markdown]
# ## Exercise 2.1 · The safe softmax ★★☆ (10 minutes)
#
# For tensors, along any axis `dim`. One thing more: masks (chapter 05) write −∞ where a choice is forbidden. Where
# *every* choice of a row is forbidden the maximum is −∞, and −∞ − (−∞) is NaN. Return zeros for such a row.
#
# <details><summary>Hint</summary>
#
# `x.amax(dim, keepdim=True)` keeps the axis with length 1, so that it subtracts row by row. `torch.where(top.isfinite(),
# top, 0)` repairs the shift, and `torch.where(total == 0, 1, total)` the division.
#
# </details>


# %%
def safe_softmax(x, dim=-1):
    """Any shape → the same shape; the numbers along `dim` are positive and sum to 1, or are all 0."""
    ### BEGIN SOLUTION
    top = x.amax(dim, keepdim=True)
    e = (x - torch.where(top.isfinite(), top, 0)).exp()
    total = e.sum(dim, keepdim=True)
    return e / torch.where(total == 0, 1, total)
    ### END SOLUTION


# %%
exercises.check(safe_softmax)
### BEGIN HIDDEN TESTS
exercises.score(safe_softmax, points=2, seed=1)
### END HIDDEN TESTS

# %%
safe_softmax = exercises.piece("safe_softmax")
x = torch.tensor([[100.0, 0.0, -300.0], [-torch.inf] * 3])
print(safe_softmax(x).tolist())
assert safe_softmax(x).isfinite().all()

# %% [markdown]
# ## Log-sum-exp
#
# A loss needs −log of a probability. The logarithm of a safe softmax is not safe: a probability that has become 0 costs
# −log 0 = ∞, where the truth may be 200.

# %%
row = torch.tensor([0.0, 200.0])  # the right answer is the first
print("-log(softmax):", -safe_softmax(row).log()[0].item())
assert safe_softmax(row).log()[0] == -torch.inf

# %% [markdown]
# The way out is never to form the quotient. With the right answer at *i*
#
# $$-\log\frac{e^{x_i}}{\sum_j e^{x_j}} = \log \sum_j e^{x_j} - x_i \qquad\text{and}\qquad \log \sum_j e^{x_j} = m + \log \sum_j e^{x_j - m}$$
#
# ## Exercise 2.2 · Log-sum-exp ★★☆ (8 minutes)
#
# Write the second formula for tensors: `dim` disappears. A row of nothing but −∞ gives −∞, the logarithm of an empty sum.
#
# <details><summary>Hint</summary>
#
# As in 2.1; but the maximum that is added at the end has no axis `dim` any more: `x.amax(dim)`.
#
# </details>


# %%
def log_sum_exp(x, dim=-1):
    """Any shape → the shape without `dim`."""
    ### BEGIN SOLUTION
    top = x.amax(dim, keepdim=True)
    total = (x - torch.where(top.isfinite(), top, 0)).exp().sum(dim)
    return x.amax(dim) + torch.where(total == 0, 1, total).log()
    ### END SOLUTION


# %%
exercises.check(log_sum_exp)
### BEGIN HIDDEN TESTS
exercises.score(log_sum_exp, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# `F.cross_entropy` is this. And the slope of log-sum-exp is the softmax: raising a logit a little raises the logarithm
# of the sum by that much times its share.

# %%
log_sum_exp = exercises.piece("log_sum_exp")
print("log-sum-exp − own:", (log_sum_exp(row) - row[0]).item())
assert torch.isclose(log_sum_exp(row) - row[0], F.cross_entropy(row[None], torch.tensor([0])))
z = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
log_sum_exp(z).backward()
assert torch.allclose(z.grad, safe_softmax(z), rtol=1e-5)

# %% [markdown]
# ## Break it: a softmax in half precision
#
# The embedded PaliGemma is about to write the first word of a caption. We sample at a low temperature, here in the usual
# sense: logits divided by 0.1. In float16, with the softmax of the definition:

# %%
import minivlm
from minivlm import emoji

model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
batch = processor(text=["caption en"], images=[emoji.make_scene(0, "validation").image])
with torch.no_grad():
    logits = model(**batch, last_only=True)[0, -1]
sharp = (logits / 0.1).half()
naive, safe = softmax(sharp), safe_softmax(sharp)
print(
    f"largest logit {logits.max():.1f}, divided {sharp.max():.0f};  NaN: naive {naive.isnan().sum()}, safe {safe.isnan().sum()}"
)
assert naive.isnan().any() and not safe.isnan().any()

# %%
for name, probabilities in (("naive", naive), ("safe", safe)):
    try:
        word = processor.decode([torch.multinomial(probabilities.float(), 1).item()])
        print(f"{name}: {word!r}")
    except RuntimeError as error:
        print(f"{name}: {type(error).__name__}: {error}")

# %% [markdown]
# The likeliest words are exactly those that become NaN. Repaired, the model writes as before. (Adding −max was all.)
#
# ## What a softmax asks for
#
# So a softmax can be had safely. Why leave it? Look at what CLIP's loss needs. Four pictures and their texts, the last
# two nearly the same thing:

# %%
cosines = torch.tensor([[0.9, 0.1, 0.0, 0.2], [0.5, 0.6, 0.3, 0.1], [0.0, 0.2, 0.9, 0.8], [0.3, 0.0, 0.7, 0.9]])
table = 10 * cosines
viz.softmax_and_sigmoid(table, bias=-5, title="Three ways to turn one table into probabilities")

# %% [markdown]
# * Over a **row**: which text for this picture? Every row sums to 1, columns do not. It needs the maximum and the sum
#   of the whole row, so **all texts**.
# * Over a **column**: which picture for this text? It needs **all pictures**.
# * **Sigmoid**, σ(x) = 1 / (1 + exp(−x)): do these two match? Every cell is a question of its own, and needs nothing else.
#
# The third and fourth pair: in a softmax the twins must share. Sigmoids may say yes to both.
#
# A change of one text changes the softmax of every row. Of the sigmoids it changes one column:

# %%
other = table.clone()
other[:, 3] = torch.tensor([3.0, 3.0, 3.0, 8.0])
changed = {
    "softmax over rows": (other.softmax(1) - table.softmax(1)).abs() > 1e-12,
    "sigmoid": (other.sigmoid() - table.sigmoid()).abs() > 1e-12,
}
print({name: f"{int(cells.sum())} of 16 cells change" for name, cells in changed.items()})
assert changed["softmax over rows"].all() and not changed["sigmoid"][:, :3].any()

# %% [markdown]
# ### The two gathers
#
# Now let two machines hold two pairs each. Machine 0 can fill the upper left block of the table, machine 1 the lower
# right one. A row runs through both halves; so does a column. To normalize its rows a machine must *gather* all texts,
# to normalize the columns all pictures: **two gathers**, and the embeddings of the whole batch in every machine. Leaving
# them out gives another loss, that of an easier question:

# %%
g = torch.Generator().manual_seed(0)
x = torch.randn(8, 16, generator=g)
y = x + torch.randn(8, 16, generator=g)
log_t = torch.tensor(10.0).log()
whole = losses.clip_loss(x, y, log_t)
alone = (losses.clip_loss(x[:4], y[:4], log_t) + losses.clip_loss(x[4:], y[4:], log_t)) / 2
print(f"CLIP's loss of 8 pairs {whole:.4f}, mean of two halves {alone:.4f}")
assert alone < whole

# %% [markdown]
# ## The sigmoid loss
#
# SigLIP (Zhai and others 2023, arXiv:2303.15343) keeps the last of the three: every pair is a question of its own. With
# the logit = exp(t) · cosine + **bias**, and z = 1 for what belongs together, −1 for all else, a pair costs
#
# $$-\log \sigma(z \cdot \text{logit})$$
#
# The loss is the sum over the whole table, divided by the number of pictures, N. The toy of chapter 01 at exp(t) = 10,
# bias −10:
#
# | | "a cat" | "a moon" |
# |---|---|---|
# | picture of a cat | 8 − 10 = **−2** | 6 − 10 = −4 |
# | picture of a moon | 0 − 10 = −10 | 10 − 10 = **0** |
#
# Matches: −log σ(−2) = log(1 + e²) = 2.1269 and −log σ(0) = log 2 = 0.6931. The others have their sign turned: log(1 + e⁻⁴)
# = 0.0181 and log(1 + e⁻¹⁰) = 0.0000. Sum, with all digits: 2.8383; divided by 2 pictures: **1.4191**.
#
# ### The slow loop

# %%
toy = 10 * torch.tensor([[0.8, 0.6], [0.0, 1.0]]) - 10
total = 0.0
for i in range(2):
    for j in range(2):
        z = 1 if i == j else -1
        total -= math.log(1 / (1 + math.exp(-z * toy[i, j])))
by_loop = total / 2
print(f"{by_loop:.4f}")
assert round(by_loop, 4) == 1.4191

# %% [markdown]
# ### All at once
#
# `F.logsigmoid` is log σ without overflow.

# %%
z = 2 * torch.eye(2) - 1  # 1 on the diagonal, −1 elsewhere
assert math.isclose(-F.logsigmoid(z * toy).sum().item() / 2, by_loop, rel_tol=1e-5)

# %% [markdown]
# ## Exercise 2.3 · The sigmoid loss ★★☆ (12 minutes)
#
# From embeddings to the loss. `labels` is `[N, M]`, True where picture and text belong together; so a picture may have two
# right texts, or none. Without labels picture *i* belongs to text *i*.
#
# <details><summary>Hint</summary>
#
# `losses.l2_normalize` makes directions. `torch.eye(N, dtype=torch.bool)` are the labels when there are none given, and
# `torch.where(labels, 1.0, -1.0)` is z.
#
# </details>


# %%
def sigmoid_loss(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """[N, D], [M, D], two numbers, [N, M] of booleans or None → nats per picture, a tensor without axes."""
    ### BEGIN SOLUTION
    from minivlm.losses import l2_normalize

    N = len(image_embeddings)
    if labels is None:
        labels = torch.eye(N, dtype=torch.bool)
    logits = log_temperature.exp() * (l2_normalize(image_embeddings) @ l2_normalize(text_embeddings).T) + bias
    return -F.logsigmoid(torch.where(labels, 1.0, -1.0) * logits).sum() / N
    ### END SOLUTION


# %%
exercises.check(sigmoid_loss)
### BEGIN HIDDEN TESTS
exercises.score(sigmoid_loss, points=3, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# The twins of chapter 01, two pairs that are equal, cost CLIP log 2 each, however good the model. Sigmoids with labels
# have no such floor. With the diagonal alone the twins cost even more here, since each is called wrong in its own right.
# (That is what SigLIP does, and it lives with some wrong −1. The training of our embedded model, `training.py`, gives
# labels: a patch may show several things.)

# %%
sigmoid_loss = exercises.piece("sigmoid_loss")
twice = torch.eye(4)[[0, 0, 1, 2]]
labels = twice @ twice.T > 0
hot, bias = torch.tensor(100.0).log(), torch.tensor(-50.0)
print(f"CLIP {losses.clip_loss(twice, twice, hot):.4f}", end="   ")
print(
    f"sigmoid, diagonal {sigmoid_loss(twice, twice, hot, bias):.2f}, with labels {sigmoid_loss(twice, twice, hot, bias, labels):.4f}"
)
assert sigmoid_loss(twice, twice, hot, bias, labels) < 1e-4

# %% [markdown]
# ## Why −10 and log 10
#
# Before training, embeddings point anywhere: in many dimensions that means cosines near 0, and logits near the bias.
# A picture then pays for one match and N − 1 others: log(1 + exp(−bias)) + (N − 1) · log(1 + exp(bias)).


# %%
def at_the_start(N, bias):
    bias = torch.as_tensor(bias, dtype=torch.float64)
    return F.softplus(-bias) + (N - 1) * F.softplus(bias)


for N in (100, 32_768):
    best = -math.log(N - 1)
    print(
        f"N = {N:6,}: bias 0 costs {at_the_start(N, 0.0):8.1f}, bias −10 costs {at_the_start(N, -10.0):5.1f} nats a picture; best bias {best:.1f}"
    )
    assert at_the_start(N, best) <= min(at_the_start(N, best + d) for d in (-0.1, 0.1))

# %%
steps = torch.linspace(-20, 0, 41)
curves = {f"N = {N:,}": (steps, at_the_start(N, steps)) for N in (100, 1024, 32_768)}
viz.lines(curves, "The loss before anything is learned", "bias", "nats a picture", log="y")

# %% [markdown]
# With bias 0 the model begins by saying "maybe" to everything, is wrong N − 1 times a picture, and the first steps do
# nothing but learn to say no, violently: the slope of the loss in the bias is (N − 1)/2 − 1/2. The best constant answer is
# the true share of matches, 1 in N: bias = −log(N − 1), which is −10.4 for 32,768 pairs. So **−10** is close to the truth
# from the first step (section 3.2 of the paper), for batches of that size.
#
# A temperature of exp(**log 10**) = 10 goes with it: a cosine of 1 gives 10 − 10 = 0, "maybe", a cosine of 0 gives −10, "no".
# A smaller factor could not lift any pair to "maybe". Both numbers are learned from there.


# %%
def slope_in_bias(N, start):
    bias = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    at_the_start(N, bias).backward()
    return bias.grad.item()


print(f"slope at bias 0: {slope_in_bias(32_768, 0.0):,.0f}, at −10: {slope_in_bias(32_768, -10.0):.2f}")
assert slope_in_bias(32_768, 0.0) == 32_767 / 2 - 1 / 2

# %% [markdown]
# ## Sums may be cut anywhere
#
# Since the pairs are independent, the table may be worked off in pieces, in any order. Columns 0 to 2 and 3 to 7 of the
# eight pairs above, by their labels:

# %%
bias, eye = torch.tensor(-10.0), torch.eye(8, dtype=torch.bool)
parts = [sigmoid_loss(x, y[cut], log_t, bias, eye[:, cut]) for cut in (slice(0, 3), slice(3, 8))]
print(f"{parts[0]:.4f} + {parts[1]:.4f} = {sum(parts):.4f}; whole {sigmoid_loss(x, y, log_t, bias):.4f}")
assert torch.isclose(sum(parts), sigmoid_loss(x, y, log_t, bias), rtol=1e-5)

# %% [markdown]
# ## Exercise 2.4 · In chunks ★★★ (15 minutes)
#
# A table of labels is as large as the table of logits, so it has to go, too. Write the loss of N pairs so that it never
# computes more than N × `chunk_size` logits at a time: all pictures with a chunk of the texts, then with the next. (The
# check compares the loss only. What stays in memory is measured below, and will surprise.)
#
# <details><summary>Hint</summary>
#
# `for first in range(0, N, chunk_size)`: text *j* of the chunk belongs to picture `first + j`. In the table of the
# chunk, `[N, C]`, that is `logits.diagonal(-first)`. The sum of −log σ(−logit) over everything is a start; the
# matches need another sign.
#
# </details>


# %%
def chunked_sigmoid_loss(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """[N, D], [N, D], two numbers, an integer → nats per picture, a tensor without axes."""
    ### BEGIN SOLUTION
    from minivlm.losses import l2_normalize

    x, y, N = l2_normalize(image_embeddings), l2_normalize(text_embeddings), len(image_embeddings)
    total = 0
    for first in range(0, N, chunk_size):
        logits = log_temperature.exp() * (x @ y[first : first + chunk_size].T) + bias
        own = logits.diagonal(-first)
        total = total - F.logsigmoid(-logits).sum() + F.logsigmoid(-own).sum() - F.logsigmoid(own).sum()
    return total / N
    ### END SOLUTION


# %%
exercises.check(chunked_sigmoid_loss)
### BEGIN HIDDEN TESTS
exercises.score(chunked_sigmoid_loss, points=4, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## Memory, measured
#
# torch's profiler writes down every piece of memory that is taken and given back; the highest water mark is what we want.

# %%
import json
import tempfile
from itertools import accumulate
from pathlib import Path


def peak_bytes(loss, *inputs):
    """The most that torch held at a time, in forward and backward, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(*inputs).backward()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate(size for _, size in changes))


# %% [markdown]
# Three ways to the same number: the whole table; the sum over chunks of 256 texts, as above, left to autograd; and the
# package's `chunked_sigmoid_loss`.


# %%
def summed(x, y, log_t, bias):
    eye = torch.eye(len(x), dtype=torch.bool)
    cuts = [slice(first, first + 256) for first in range(0, len(y), 256)]
    return sum(losses.sigmoid_loss(x, y[cut], log_t, bias, eye[:, cut]) for cut in cuts)


def in_chunks(x, y, log_t, bias):
    return losses.chunked_sigmoid_loss(x, y, log_t, bias, chunk_size=256)


ways = {"whole table": losses.sigmoid_loss, "chunks, autograd": summed, "chunks, package": in_chunks}

# %%
from tqdm.auto import tqdm

sizes = [256, 512, 1024, 2048, 4096]
measured = {name: [] for name in ways}
for N in tqdm(sizes):
    pairs = [
        torch.randn(N, 64).requires_grad_(),
        torch.randn(N, 64).requires_grad_(),
        log_t.clone().requires_grad_(),
        bias,
    ]
    for name, loss in ways.items():
        measured[name].append(peak_bytes(loss, *pairs) / 2**20)
viz.lines(
    {name: (sizes, peaks) for name, peaks in measured.items()}, "Peak memory, measured", "pairs N", "MiB", log="xy"
)

# %%
for name, peaks in measured.items():
    print(f"{name:17}", "  ".join(f"{N:,}: {peak:5.1f} MiB" for N, peak in zip(sizes, peaks, strict=True)))
table_size = 4 * sizes[-1] ** 2 / 2**20
print(f"one table of {sizes[-1]:,} × {sizes[-1]:,} in float32: {table_size:.0f} MiB")
assert measured["whole table"][-1] > 3 * table_size and measured["chunks, autograd"][-1] > table_size
assert measured["chunks, package"][-1] < measured["whole table"][-1] / 8

# %% [markdown]
# **Chunks alone do not save much.** It is often said that cutting the sum is all; but autograd keeps every chunk's
# logits for the backward pass, and in the end all of them are there. The package uses that the loss is one number: the
# slope of −log σ(z · logit) in the logit is −z · σ(−z · logit), known as soon as the chunk is. So it sums the gradients
# in the forward pass, chunk by chunk, and keeps no logits (`_BlockwiseSigmoidLoss` in `losses.py`). The formula, checked:

# %%
logit = torch.linspace(-5, 5, 11, requires_grad=True)
for z in (1, -1):
    slope = torch.autograd.grad(-F.logsigmoid(z * logit).sum(), logit)[0]
    assert torch.allclose(slope, -z * torch.sigmoid(-z * logit), rtol=1e-5)

# %% [markdown]
# ## A ring of machines
#
# Several processes, each with its shard of the pairs. Each keeps its pictures. The shards of texts go round: in every step
# a process works off one block, its pictures with the texts that it holds, and hands the texts to its neighbor. After as
# many steps as there are processes everybody has met everything, and nobody ever held more than one shard (figure 1 of
# the paper).
#
# First as a play with four actors in one process:

# %%
W = 4
my_x, shards = x.chunk(W), y.chunk(W)  # two pairs each
holds, total = list(range(W)), [0.0] * W
for step in range(W):
    print(f"step {step}: processes 0 to 3 hold the texts of", holds)
    for rank in range(W):
        labels = torch.eye(2, dtype=torch.bool) & (holds[rank] == rank)  # matches are among one's own texts
        total[rank] += sigmoid_loss(my_x[rank], shards[holds[rank]], log_t, bias, labels)
    holds = holds[-1:] + holds[:-1]  # everybody hands on to the next
assert torch.isclose(sum(total) / W, sigmoid_loss(x, y, log_t, bias), rtol=1e-5)

# %% [markdown]
# ### Real processes
#
# Now with `torch.distributed` and its backend *gloo*, which works on any CPU. The ring loss is the package's; this is
# the line of it that sends. With the texts travels the gradient that the processes have for them; it is home when
# they are.

# %%
import inspect

print(inspect.getsource(losses.ring_shift))

# %% [markdown]
# What each process will do. Everybody makes the same 512 pairs from a seed and takes its share. First the ring, counting
# the bytes that are handed on:


# %%
def make_pairs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=g)
    y = x + torch.randn(512, 64, generator=g)
    return [tensor.requires_grad_() for tensor in (x, y, torch.tensor(10.0).log(), torch.tensor(-10.0))]


def by_ring(x, y, log_t, bias):
    sent, ring_shift = [], losses.ring_shift

    def counted(shard, *where):
        sent.append(shard.nbytes)
        return ring_shift(shard, *where)

    losses.ring_shift = counted
    loss = losses.ring_sigmoid_loss(x, y, log_t, bias)
    return loss, torch.autograd.grad(loss, (x, y, log_t, bias)), sum(sent)


# %% [markdown]
# Then CLIP's loss with its two gathers. Every process sends its shard to the W − 1 others, and fills the whole table. What
# comes from others carries no gradient; one's own part is put back in its place, so that one's own gradient is right.


# %%
def by_gathers(x, y, log_t):
    everything, sent = [], 0
    for own in (x, y):
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.detach())
        sent += own.nbytes * (len(parts) - 1)
        parts[dist.get_rank()] = own
        everything.append(torch.cat(parts))
    loss = losses.clip_loss(*everything, log_t)
    return loss, torch.autograd.grad(loss, (x, y)), sent


# %%
def work(rank, world, folder):
    """One process: its shard, both designs, and what came out, in a file."""
    meeting = Path(folder, "meeting").as_uri()  # a file in which the processes find each other
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(minutes=4))
    x, y, log_t, bias = make_pairs()
    x, y = x.detach().chunk(world)[rank].requires_grad_(), y.detach().chunk(world)[rank].requires_grad_()
    results = {}
    for design, (loss, gradients, sent) in {
        "ring": by_ring(x, y, log_t, bias),
        "gathers": by_gathers(x, y, log_t),
    }.items():
        results |= {f"{design} loss": loss.item(), f"{design} sent": sent}
        results |= {f"{design} {k}": gradient.numpy() for k, gradient in enumerate(gradients)}
    np.savez(f"{folder}/{rank}.npz", **results)
    dist.destroy_process_group()


# %% [markdown]
# A notebook cannot be imported by another process, but its functions can be sent as text. Each process is a new Python
# that runs this source; one that hangs is ended after five minutes.

# %%
import subprocess
import sys

import numpy as np

IMPORTS = "import numpy as np, sys, torch\nimport torch.distributed as dist\nfrom datetime import timedelta\n"
IMPORTS += "from pathlib import Path\nfrom minivlm import losses\n"


def start(world):
    """Runs `work` in that many processes → what each of them wrote."""
    source = IMPORTS + "\n".join(map(inspect.getsource, (make_pairs, by_ring, by_gathers, work)))
    with tempfile.TemporaryDirectory() as folder:
        codes = [f"{source}\nwork({rank}, {world}, {folder!r})" for rank in range(world)]
        processes = [subprocess.Popen([sys.executable, "-c", c], stderr=subprocess.PIPE, text=True) for c in codes]
        try:
            errors = [process.communicate(timeout=300)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(process.returncode for process in processes), errors
        return [dict(np.load(f"{folder}/{rank}.npz")) for rank in range(world)]


# %%
runs = {world: start(world) for world in tqdm((2, 4))}
for world, results in runs.items():
    print(f"{world} processes, the loss of each:", "  ".join(f"{r['ring loss']:.5f}" for r in results))

# %% [markdown]
# Each has the loss of its own pictures. Their mean should be the loss of all 512 pairs in one process, and so should the
# gradients. (The ring's gradients are those of the *sum* of all processes' losses, so they are divided by W; see the
# docstring of `ring_sigmoid_loss`.)


# %%
def largest(ours, truth):
    """The largest difference, relative to the largest number."""
    return float(np.abs(ours - truth.detach().numpy()).max() / truth.detach().abs().max())


pairs = make_pairs()
one, clip = losses.sigmoid_loss(*pairs), losses.clip_loss(*pairs[:3])
truth, clip_truth = torch.autograd.grad(one, pairs), torch.autograd.grad(clip, pairs[:2])
for world, results in runs.items():
    off = [largest(np.mean([r["ring loss"] for r in results]), one)]
    off += [largest(np.concatenate([r[f"ring {k}"] for r in results]) / world, truth[k]) for k in (0, 1)]
    off += [largest(np.mean([r[f"ring {k}"] for r in results], axis=0), truth[k]) for k in (2, 3)]
    clips = [largest(r["gathers loss"], clip) for r in results]
    clips += [largest(np.concatenate([r[f"gathers {k}"] for r in results]), clip_truth[k]) for k in (0, 1)]
    print(f"{world} processes against one: ring {max(off):.1e}, gathers {max(clips):.1e} relative, loss and gradients")
    assert max(off) < 1e-5 and max(clips) < 1e-5

# %% [markdown]
# ## What each design sends and holds
#
# With W processes, n = N / W pairs each, embeddings of D numbers with 4 bytes:
#
# | | logits at a time | bytes sent by each process, a step |
# |---|---|---|
# | softmax, whole table everywhere (what we ran) | N² | 2 · (W − 1) · n · D · 4 |
# | softmax, own rows and own columns | 2 · n · N | 4 · (W − 1) · n · D · 4, since gradients must travel back |
# | sigmoid, ring | n² | 2 · W · n · D · 4, texts and their gradients |


# %%
def designs(N, W, D):
    """Name → (bytes of logits at a time, bytes sent by a process)."""
    n, shard = N // W, N // W * D * 4
    return {
        "softmax, whole table": (4 * N * N, 2 * (W - 1) * shard),
        "softmax, rows + columns": (8 * n * N, 4 * (W - 1) * shard),
        "sigmoid, ring": (4 * n * n, 2 * W * shard),
    }


for world, results in runs.items():
    computed = designs(512, world, 64)
    assert {int(r["ring sent"]) for r in results} == {computed["sigmoid, ring"][1]}
    assert {int(r["gathers sent"]) for r in results} == {computed["softmax, whole table"][1]}
    print(world, "processes:", {name: f"{sent:,} bytes sent" for name, (_, sent) in computed.items()})

# %% [markdown]
# **Mind what is compared.** SigLIP is often said to send less. With many processes it sends half of what the softmax sends
# that shares the work, and as much as the one in which every process fills the whole table; with two processes it
# saves nothing. What is gone for good is the large table: for n pairs a process, the logits at a time no longer grow with
# the number of processes.
#
# Up to a batch of a million, on 256 processes with embeddings as wide as those of PaliGemma's tower, 1152:

# %%
batches = [2**k for k in range(10, 21)]
million = [designs(N, 256, 1152) for N in batches]
curves = {name: (batches, [one[name][0] / 2**30 for one in million]) for name in million[0]}
viz.lines(curves, "Logits held by each process", "batch N", "GiB", log="xy")

# %%
curves = {name: (batches, [one[name][1] / 2**30 for one in million]) for name in million[0]}
viz.lines(curves, "Sent by each process, every step", "batch N", "GiB", log="xy")

# %%
for name, (held, sent) in designs(2**20, 256, 1152).items():
    print(f"a million pairs, {name:24} logits {held / 2**30:10,.3f} GiB   sent {sent / 2**30:5.1f} GiB")
assert designs(2**20, 256, 1152)["sigmoid, ring"][0] == 64 * 2**20  # 4096 × 4096 × 4 bytes

# %% [markdown]
# Batches of a million can be had. The paper trained with them, and found that a batch of 32 thousand is nearly as good:
# so the sigmoid loss won less by size than by being simple, and better at small batches (section 4).
#
# ## It matches
#
# Against the package, against torch, and against SigLIP in transformers, with random weights:

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
torch.manual_seed(0)
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
text, vision = small | {"vocab_size": 60}, small | {"image_size": 8, "patch_size": 4}
theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()
theirs.logit_scale.data.fill_(math.log(10))
theirs.logit_bias.data.fill_(-10)
inputs = {"input_ids": torch.randint(3, 60, (7, 5)), "pixel_values": torch.randn(7, 3, 8, 8)}
with torch.no_grad():
    out = theirs(**inputs, return_loss=True)
    x = theirs.get_image_features(inputs["pixel_values"]).pooler_output
    y = theirs.get_text_features(inputs["input_ids"]).pooler_output

# %%
chunked_sigmoid_loss = exercises.piece("chunked_sigmoid_loss")
scores = torch.randn(20, 30) * 300
t, b = theirs.logit_scale.detach()[0], theirs.logit_bias.detach()[0]
differences = {
    "safe softmax, torch": largest(safe_softmax(scores).numpy(), scores.softmax(-1)),
    "log-sum-exp, torch": largest(log_sum_exp(scores).numpy(), scores.logsumexp(-1)),
    "sigmoid loss, transformers": largest(sigmoid_loss(x, y, t, b).numpy(), out.loss),
    "sigmoid loss, the package": largest(sigmoid_loss(x, y, t, b).numpy(), losses.sigmoid_loss(x, y, t, b)),
    "in chunks, the package": largest(chunked_sigmoid_loss(x, y, t, b, 3).numpy(), losses.sigmoid_loss(x, y, t, b)),
}
print("\n".join(f"{name:27} relative difference {d:.1e}" for name, d in differences.items()))
assert max(differences.values()) < 1e-5

# %% [markdown]
# ## Recap
#
# * exp overflows beyond 88.7 in float32 and beyond 11.1 in float16; logits of that size are normal. Subtract the
#   maximum.
# * Losses use log-sum-exp − own, never the logarithm of a probability.
# * CLIP's two softmaxes need the whole row and the whole column: two gathers and a table that grows with the batch.
# * The sigmoid loss asks one question a pair. Its sum may be cut into chunks, and sent round a ring.
# * bias −10 says "no" to nearly everything, as the truth does; exp(log 10) lets a perfect pair climb to "maybe".
#
# **Three questions**
#
# <details><summary>1. bfloat16 has half the bits of float32. Does a softmax in it overflow earlier?</summary>
#
# No: it has the exponents of float32 and fewer digits, so exp ends near 88 as well. float16 has more digits and fewer
# exponents.
#
# </details>
#
# <details><summary>2. You train with 64 pairs a batch. Is −10 still a good bias to start with?</summary>
#
# −log 63 = −4.1 would be nearer to the truth. With −10 the one match costs 10 nats at first and the 63 others nothing: the
# loss starts high, but only the bias has to move.
#
# </details>
#
# <details><summary>3. Why do the texts go round the ring and not the pictures?</summary>
#
# Either would do: the table is the same, and embeddings have the same width. One side must stay: if both went round
# together, each process would meet the same pairs again and again.
#
# </details>
#
# **Next:** [03 · Patch embedding](03_patch_embedding.ipynb), in which a picture becomes a sequence.
