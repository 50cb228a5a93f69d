# %% [markdown]
# # 02 · Safe softmax and the sigmoid loss
#
# **Why did SigLIP replace softmax with a sigmoid?**
#
# | | |
# |---|---|
# | know first | chapter 01: cosines, temperature, the table of pairs, CLIP's loss |
# | you will build | a softmax that never overflows; the loss that PaliGemma's vision tower was trained with, in one go, in chunks and across several processes |
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
# 1. exp(89) is about 4.5 · 10³⁸. What does a computer return in float32?
# 2. You add 1000 to every logit in a row. What happens to the softmax of that row?
# 3. 256 machines hold 4,096 pairs each. How much of the table of all pairs can one machine compute without hearing from
#    the others?
#
# <details><summary>Answers (open them at the end of the chapter)</summary>
#
# 1. Infinity. The largest number in float32 is 3.4 · 10³⁸.
# 2. On paper nothing: the factor exp(1000) cancels. In a computer the result is NaN, unless you take care.
# 3. One of 256 × 256 blocks: its own images with its own texts, which is 1/65,536 of the table.
#
# </details>

# %% [markdown]
# ## Where exp overflows
#
# A softmax takes exponentials, and these outgrow every floating-point format:

# %%
import math

for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
    largest = torch.finfo(dtype).max
    limit = int(torch.tensor(largest, dtype=torch.float64).log())
    below, above = torch.tensor([limit - 1, limit + 2], dtype=dtype).exp().tolist()
    print(f"{str(dtype)[6:]:8} largest {largest:8.3g}   exp({limit - 1}) = {below:9.3g}   exp({limit + 2}) = {above}")
    assert below < float("inf") == above
assert math.exp(88.7) < torch.finfo(torch.float32).max < math.exp(89)  # about 4.5 · 10³⁸

# %% [markdown]
# Past that limit, exp returns ∞ and the softmax becomes ∞/∞, which is NaN, "not a number":


# %%
def softmax(x, dim=-1):
    """The definition, literally."""
    return x.exp() / x.exp().sum(dim, keepdim=True)


print("float32", softmax(torch.tensor([100.0, 0.0])).tolist())
print("float16", softmax(torch.tensor([14.3, 0.0], dtype=torch.float16)).tolist())
assert softmax(torch.tensor([100.0, 0.0]))[0].isnan() and softmax(torch.tensor([14.3, 0.0]).half())[0].isnan()

# %% [markdown]
# These are not exotic numbers. CLIP's temperature can grow to 100 and a cosine to 1, and exp(100) overflows float32. In
# float16, even the temperature that CLIP *starts* with, 14.3, is enough. At the other end every exponential underflows
# to 0, and the softmax is 0/0:

# %%
print(softmax(torch.tensor([-200.0, -201.0])).tolist())
weight = torch.tensor([100.0, 0.0], requires_grad=True)
softmax(weight)[1].backward()
print("gradient", weight.grad.tolist())
assert softmax(torch.tensor([-200.0, -201.0])).isnan().all() and weight.grad.isnan().all()

# %% [markdown]
# A NaN in the loss makes every gradient NaN and, after the next step, every weight. Nothing raises an error.
#
# ## A shift that changes nothing
#
# For any number m
#
# $$\frac{e^{x_i - m}}{\sum_j e^{x_j - m}} = \frac{e^{-m}\, e^{x_i}}{e^{-m} \sum_j e^{x_j}} = \frac{e^{x_i}}{\sum_j e^{x_j}}$$
#
# On paper, any m works. With m = max(x), the largest exponent is 0. Then no exponential is above 1, so nothing
# overflows. And one exponential *is* 1, so the sum is at least 1 and never 0. Some exponentials may underflow to 0, but
# only those whose probability is too small for the format anyway.
#
# ### The slow loop


# %%
def slow_softmax(row):
    maximum = max(row)
    exponentials = [math.exp(x - maximum) for x in row]
    return [e / sum(exponentials) for e in exponentials]


print(slow_softmax([1000.0, 999.0, 0.0]))
assert math.isclose(slow_softmax([1000.0, 999.0])[0], 1 / (1 + math.exp(-1)))
assert slow_softmax([1000.0, 999.0]) == slow_softmax([0.0, -1.0])  # the shift changes nothing

# %% [markdown]
# ## Exercise 2.1 · The safe softmax
#
# Write it for tensors, along any axis `dim`. There is one more case to handle. Masks (chapter 05) write −∞ where a
# choice is forbidden. If *every* choice in a row is forbidden, the maximum is −∞, and −∞ − (−∞) is NaN. Return zeros
# for such a row.


# %%
def safe_softmax(x, dim=-1):
    """Any shape → the same shape. The values along `dim` are probabilities and sum to 1, or they are all 0."""
    ### BEGIN SOLUTION
    maximum = x.amax(dim, keepdim=True)
    exponentials = (x - torch.where(maximum.isfinite(), maximum, 0)).exp()
    total = exponentials.sum(dim, keepdim=True)
    return exponentials / torch.where(total == 0, 1, total)
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
# A loss needs −log of a probability. But the logarithm of a safe softmax is not safe. If the probability has
# underflowed to 0, −log 0 is ∞, even if the true value is only 200:

# %%
row = torch.tensor([0.0, 200.0])  # the right answer is the first one
print("-log(softmax):", -safe_softmax(row).log()[0].item())
assert safe_softmax(row).log()[0] == -torch.inf

# %% [markdown]
# The solution is never to compute the quotient. If the right answer is at index *i*,
#
# $$-\log\frac{e^{x_i}}{\sum_j e^{x_j}} = \log \sum_j e^{x_j} - x_i \qquad\text{and}\qquad \log \sum_j e^{x_j} = m + \log \sum_j e^{x_j - m}$$
#
# ## Exercise 2.2 · Log-sum-exp
#
# Write the second formula for tensors. The result no longer has the axis `dim`. For a row that contains only −∞, return
# −∞, the logarithm of an empty sum.


# %%
def log_sum_exp(x, dim=-1):
    """Any shape → the shape without `dim`."""
    ### BEGIN SOLUTION
    maximum = x.amax(dim, keepdim=True)
    total = (x - torch.where(maximum.isfinite(), maximum, 0)).exp().sum(dim)
    return x.amax(dim) + torch.where(total == 0, 1, total).log()
    ### END SOLUTION


# %%
exercises.check(log_sum_exp)
### BEGIN HIDDEN TESTS
exercises.score(log_sum_exp, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# This is what `F.cross_entropy` computes. And the gradient of log-sum-exp is the softmax: if you raise a logit by a
# small amount, the log-sum-exp rises by that amount times the logit's probability.

# %%
log_sum_exp = exercises.piece("log_sum_exp")
print("log-sum-exp − logit of the right answer:", (log_sum_exp(row) - row[0]).item())
assert torch.isclose(log_sum_exp(row) - row[0], F.cross_entropy(row[None], torch.tensor([0])))
z = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
log_sum_exp(z).backward()
assert torch.allclose(z.grad, safe_softmax(z), rtol=1e-5)

# %% [markdown]
# ## Break it: softmax in half precision
#
# The embedded PaliGemma is about to write the first token of a caption. We sample at a low temperature. (Here the word
# has its usual meaning: divide the logits by 0.1.) We do it in float16, with softmax exactly as defined:

# %%
import minivlm
from minivlm import emoji

model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
batch = processor(text=["caption en"], images=[emoji.make_scene(0, "validation").image])
with torch.no_grad():
    logits = model(**batch, last_only=True)[0, -1]
sharp = (logits / 0.1).half()
naive, safe = softmax(sharp), safe_softmax(sharp)
print(f"largest logit {logits.max():.1f}, divided by 0.1: {sharp.max():.0f}")
print(f"NaN among the probabilities: naive {naive.isnan().sum()}, safe {safe.isnan().sum()}")
assert naive.isnan().any() and not safe.isnan().any()

# %%
for name, probabilities in (("naive", naive), ("safe", safe)):
    try:
        token = processor.decode([torch.multinomial(probabilities.float(), 1).item()])
        print(f"{name}: {token!r}")
    except RuntimeError as error:
        print(f"{name}: {type(error).__name__}: {error}")

# %% [markdown]
# The most likely tokens are exactly the ones that become NaN. With the safe softmax, the model writes as before.
# Subtracting the maximum was all it took.
#
# ## What a softmax needs
#
# So softmax can be made safe. Why replace it? Look at what CLIP's loss needs. Here are four images and their texts. The
# last two pairs are almost the same:

# %%
cosines = torch.tensor([[0.9, 0.1, 0.0, 0.2], [0.5, 0.6, 0.3, 0.1], [0.0, 0.2, 0.9, 0.8], [0.3, 0.0, 0.7, 0.9]])
table = 10 * cosines
viz.softmax_and_sigmoid(table, bias=-5, title="Three ways to turn one table into probabilities")

# %% [markdown]
# * Softmax over a **row**: which text belongs to this image? Every row sums to 1, the columns do not. It needs the
#   maximum and the sum of the whole row, so it needs **all texts**.
# * Softmax over a **column**: which image belongs to this text? It needs **all images**.
# * **Sigmoid**, σ(x) = 1 / (1 + exp(−x)): do these two match? Every cell is its own question and needs no other cell.
#
# Compare the third and the fourth pair. With softmax, the two have to share the probability. With sigmoids, both can
# get a yes.
#
# If you replace one text, the softmax changes in every row. The sigmoid changes in one column only:

# %%
new_table = table.clone()
new_table[:, 3] = torch.tensor([3.0, 3.0, 3.0, 8.0])
changed = {
    "softmax over rows": (new_table.softmax(1) - table.softmax(1)).abs() > 1e-12,
    "sigmoid": (new_table.sigmoid() - table.sigmoid()).abs() > 1e-12,
}
print({name: f"{int(cells.sum())} of 16 cells change" for name, cells in changed.items()})
assert changed["softmax over rows"].all() and not changed["sigmoid"][:, :3].any()

# %% [markdown]
# ### The two gathers
#
# Now put two pairs on each of two machines. Machine 0 can compute the upper left block of the table, machine 1 the
# lower right block. But every row spans both halves, and so does every column. To normalize its rows, a machine has to
# *gather* all texts. To normalize the columns, it has to gather all images. That makes **two gathers**, and every
# machine ends up with the embeddings of the whole batch. If you leave the gathers out, you get a different loss, for an
# easier question:

# %%
g = torch.Generator().manual_seed(0)
x = torch.randn(8, 16, generator=g)
y = x + torch.randn(8, 16, generator=g)
log_t = torch.tensor(10.0).log()
whole = losses.clip_loss(x, y, log_t)
halves = (losses.clip_loss(x[:4], y[:4], log_t) + losses.clip_loss(x[4:], y[4:], log_t)) / 2
print(f"CLIP's loss for 8 pairs {whole:.4f}, mean over two halves {halves:.4f}")
assert halves < whole

# %% [markdown]
# ## The sigmoid loss
#
# SigLIP (Zhai et al. 2023, arXiv:2303.15343) uses the last of the three: every pair is its own question. The logit of a
# pair is exp(t) · cosine + **bias**. With z = 1 if image and text belong together and z = −1 otherwise, the pair costs
#
# $$-\log \sigma(z \cdot \text{logit})$$
#
# The loss is the sum over the whole table, divided by the number of images N. For the toy of chapter 01, with
# temperature 10 and bias −10, the logits are
#
# | | "a cat" | "a moon" |
# |---|---|---|
# | image of a cat | 8 − 10 = **−2** | 6 − 10 = −4 |
# | image of a moon | 0 − 10 = −10 | 10 − 10 = **0** |
#
# The matches cost −log σ(−2) = log(1 + e²) = 2.1269 and −log σ(0) = log 2 = 0.6931. For the other two pairs the sign
# flips: log(1 + e⁻⁴) = 0.0181 and log(1 + e⁻¹⁰) = 0.0000. The sum, computed without rounding, is 2.8383. Divided by 2
# images, the loss is **1.4191**.
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
# `F.logsigmoid` computes log σ without overflow.

# %%
z = 2 * torch.eye(2) - 1  # 1 on the diagonal, −1 elsewhere
assert math.isclose(-F.logsigmoid(z * toy).sum().item() / 2, by_loop, rel_tol=1e-5)

# %% [markdown]
# ## Exercise 2.3 · The sigmoid loss
#
# Write the whole path from embeddings to the loss. `labels` is `[N, M]` and True where image and text belong together.
# So an image can have two matching texts, or none. Without labels, image *i* belongs to text *i*.


# %%
def sigmoid_loss(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """[N, D], [M, D], two numbers, booleans [N, M] or None → nats per image, a scalar tensor."""
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
# Remember the twins of chapter 01, two identical pairs. Each of them costs CLIP log 2, however good the model is.
# Sigmoids with labels have no such floor. With the diagonal alone, the twins cost even more here, because each is
# wrongly called a mismatch for the other. (SigLIP does exactly that and accepts a few wrong labels. The recipe of our
# embedded model, `emoji/recipe.py`, passes labels, because one patch can show several objects.)

# %%
sigmoid_loss = exercises.piece("sigmoid_loss")
twins = torch.eye(4)[[0, 0, 1, 2]]
labels = twins @ twins.T > 0
hot, bias = torch.tensor(100.0).log(), torch.tensor(-50.0)
print(f"CLIP                   {losses.clip_loss(twins, twins, hot):.4f}")
print(f"sigmoid, diagonal only {sigmoid_loss(twins, twins, hot, bias):.4f}")
print(f"sigmoid, with labels   {sigmoid_loss(twins, twins, hot, bias, labels):.4f}")
assert sigmoid_loss(twins, twins, hot, bias, labels) < 1e-4

# %% [markdown]
# ## Why −10 and log 10
#
# Before training, embeddings point in random directions. In many dimensions that means cosines near 0, and so logits
# near the bias. Each image then pays log(1 + exp(−bias)) for its match and (N − 1) · log(1 + exp(bias)) for the N − 1
# mismatches.


# %%
def initial_loss(N, bias):
    bias = torch.as_tensor(bias, dtype=torch.float64)
    return F.softplus(-bias) + (N - 1) * F.softplus(bias)


for N in (100, 32_768):
    best = -math.log(N - 1)
    at_zero, at_minus_ten = initial_loss(N, 0.0), initial_loss(N, -10.0)
    print(f"N = {N:6,}: {at_zero:7.1f} nats per image at bias 0, {at_minus_ten:.1f} at −10; best bias {best:.1f}")
    assert initial_loss(N, best) <= min(initial_loss(N, best + d) for d in (-0.1, 0.1))

# %%
biases = torch.linspace(-20, 0, 41)
curves = {f"N = {N:,}": (biases, initial_loss(N, biases)) for N in (100, 1024, 32_768)}
viz.lines(curves, "Loss before the model has learned anything", "bias", "nats per image", log="y")

# %% [markdown]
# With bias 0, the model starts by saying "maybe" to everything. It is wrong N − 1 times per image, and all it does in
# the first steps is learn to say no, violently: the derivative of the loss with respect to the bias is (N − 1)/2 − 1/2.
# The best constant answer is the true fraction of matches, 1 in N. That corresponds to a bias of −log(N − 1), which is
# −10.4 for 32,768 pairs. So for batches of that size, **−10** is close to the truth from the first step (section 3.2 of
# the paper).
#
# A temperature of exp(**log 10**) = 10 goes with it. A cosine of 1 then has the logit 10 − 10 = 0, "maybe", and a
# cosine of 0 has −10, "no". With a smaller factor, no pair could reach "maybe". From there, both numbers are learned.


# %%
def slope_in_bias(N, start):
    bias = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    initial_loss(N, bias).backward()
    return bias.grad.item()


print(f"derivative at bias 0: {slope_in_bias(32_768, 0.0):,.0f}, at −10: {slope_in_bias(32_768, -10.0):.2f}")
assert slope_in_bias(32_768, 0.0) == 32_767 / 2 - 1 / 2

# %% [markdown]
# Now be the optimizer, for the four pairs from "What a softmax needs". Predict first: which of the four tables does the
# bias change? Then move both sliders until the loss is lowest.


# %%
def with_both(temperature=10.0, bias=-10.0):
    scaled = temperature * cosines
    loss = -F.logsigmoid((2 * torch.eye(4) - 1) * (scaled + bias)).sum() / 4
    title = f"temperature {temperature:.3g}, bias {bias:.3g}: loss {loss:.2f}"
    return viz.softmax_and_sigmoid(scaled, bias, title=title)


viz.sliders(with_both, temperature=(1, 100, "log"), bias=(-40, 0, 0.5))

# %%
assert torch.allclose((table - 10).softmax(1), table.softmax(1), rtol=1e-5)  # the bias cancels in a softmax
for temperature in (2, 5, 10, 20, 50):
    tried = torch.arange(-50, 0.5, 0.5)
    logits = (2 * torch.eye(4) - 1) * (temperature * cosines + tried[:, None, None])
    by_bias = -F.logsigmoid(logits).sum((1, 2)) / 4
    print(f"temperature {temperature:2}: lowest loss {by_bias.min():.2f} at bias {tried[by_bias.argmin()]:.1f}")

# %% [markdown]
# The bias changes the sigmoids alone. The best bias follows the temperature: about −0.75 times as large, so that a pair
# with a cosine of 0.75 gets a "maybe". And the best temperature is near 10, not as hot as possible. The third image has
# a cosine of 0.8 with the wrong text, the second only 0.6 with the right one. No bias can say no to the first and yes to
# the second, and the hotter it is, the more that costs.

# %% [markdown]
# ## A sum can be split anywhere
#
# Since the pairs are independent, you can split the table into parts and sum them in any order. Here are columns 0 to 2
# and columns 3 to 7 of the eight pairs above, each part with its slice of the labels:

# %%
bias, eye = torch.tensor(-10.0), torch.eye(8, dtype=torch.bool)
parts = [sigmoid_loss(x, y[chunk], log_t, bias, eye[:, chunk]) for chunk in (slice(0, 3), slice(3, 8))]
print(f"{parts[0]:.4f} + {parts[1]:.4f} = {sum(parts):.4f}; whole table {sigmoid_loss(x, y, log_t, bias):.4f}")
assert torch.isclose(sum(parts), sigmoid_loss(x, y, log_t, bias), rtol=1e-5)

# %% [markdown]
# ## Exercise 2.4 · In chunks
#
# A table of labels has as many entries as the table of logits, so it has to go, too. Compute the loss of N pairs
# without ever computing more than N × `chunk_size` logits at a time: all images with one chunk of the texts, then all
# images with the next chunk, and so on. (The check compares only the loss. Below we measure how much memory your
# function needs, and the result may surprise you.)


# %%
def chunked_sigmoid_loss(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """[N, D], [N, D], two numbers, an integer → nats per image, a scalar tensor."""
    ### BEGIN SOLUTION
    from minivlm.losses import l2_normalize

    x, y, N = l2_normalize(image_embeddings), l2_normalize(text_embeddings), len(image_embeddings)
    total = 0
    for first in range(0, N, chunk_size):
        logits = log_temperature.exp() * (x @ y[first : first + chunk_size].T) + bias
        matches = logits.diagonal(-first)
        total = total - F.logsigmoid(-logits).sum() + F.logsigmoid(-matches).sum() - F.logsigmoid(matches).sum()
    return total / N
    ### END SOLUTION


# %%
exercises.check(chunked_sigmoid_loss)
### BEGIN HIDDEN TESTS
exercises.score(chunked_sigmoid_loss, points=4, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## Where the memory goes
#
# The chapter's own version of the sum over chunks, in two functions. The backward pass is left to autograd:

# %%
CHUNK = 256  # texts per chunk


def one_chunk(images, texts, log_t, bias, first):
    """The loss of all images with the texts from `first` on, summed over these pairs."""
    x, y = losses.l2_normalize(images), losses.l2_normalize(texts[first : first + CHUNK])
    logits = log_t.exp() * (x @ y.T) + bias
    labels = torch.zeros_like(logits, dtype=torch.bool)
    labels.diagonal(-first).fill_(True)
    return -F.logsigmoid(torch.where(labels, logits, -logits)).sum()


def by_chunks(images, texts, log_t, bias):
    return sum(one_chunk(images, texts, log_t, bias, first) for first in range(0, len(texts), CHUNK)) / len(images)


# %% [markdown]
# While the loss is computed, autograd saves what the backward pass will need. torch lets us watch it do so. How many
# bytes does it save?


# %%
def saved_bytes(loss, inputs):
    """What autograd saves during the forward pass. Two tensors that share their memory count once."""
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(*inputs)
    return sum(found.values())


def random_pairs(N):
    generator = torch.Generator().manual_seed(0)
    embeddings = [torch.randn(N, 64, generator=generator).requires_grad_() for _ in range(2)]
    return [*embeddings, torch.tensor(10.0).log().requires_grad_(), torch.tensor(-10.0).requires_grad_()]


inputs = random_pairs(2048)
table_bytes = 4 * 2048**2
for name, loss in (("whole table", losses.sigmoid_loss), ("chunks", by_chunks)):
    saved = saved_bytes(loss, inputs)
    print(f"{name:11} saves {saved / 2**20:5.1f} MiB; one table of logits is {table_bytes / 2**20:.0f} MiB")
    assert saved > table_bytes

# %% [markdown]
# **Chunks alone do not save much.** You often read that splitting the sum is enough. But autograd saves the logits of
# every chunk, so at the end of the forward pass all of them are in memory. There are two ways out.
#
# ### Way 1: compute it again
#
# `checkpoint(f, …)` saves only the inputs of f. The backward pass calls f a second time to get the intermediate results
# back, for one chunk at a time. The price is that every logit is computed twice.

# %%
from torch.utils.checkpoint import checkpoint


def by_recomputing(images, texts, log_t, bias):
    chunks = range(0, len(texts), CHUNK)
    parts = [checkpoint(one_chunk, images, texts, log_t, bias, first, use_reentrant=False) for first in chunks]
    return sum(parts) / len(images)


saved = saved_bytes(by_recomputing, inputs)
print(f"recomputing saves {saved / 2**20:.1f} MiB")
assert saved < table_bytes / 8 and torch.isclose(by_recomputing(*inputs), losses.sigmoid_loss(*inputs), rtol=1e-5)

# %% [markdown]
# ### Way 2: take the gradient early
#
# The loss is a sum over chunks, so its gradient is the sum of the chunks' gradients. And nothing comes after the loss
# that could still change them. So we compute the gradient of a chunk as soon as we have the chunk, add it to the total,
# and forget the logits. What remains is as large as the embeddings:


# %%
def loss_and_gradients(*inputs):
    """The loss, and its gradient for each of the four inputs. Only one chunk is in memory at a time."""
    total, gradients = 0.0, [torch.zeros_like(tensor) for tensor in inputs]
    for first in range(0, len(inputs[1]), CHUNK):
        part = one_chunk(*inputs, first)
        for gradient, more in zip(gradients, torch.autograd.grad(part, inputs), strict=True):
            gradient += more
        total += part.item()
    return total / len(inputs[0]), [gradient / len(inputs[0]) for gradient in gradients]


early_loss, early_gradients = loss_and_gradients(*inputs)
reference = losses.sigmoid_loss(*inputs)
assert abs(early_loss - reference.item()) < 1e-5 * reference.item()
for early, late in zip(early_gradients, torch.autograd.grad(reference, inputs), strict=True):
    assert (early - late).abs().max() < 1e-5 * late.abs().max()

# %% [markdown]
# One step is missing. The embeddings come from two encoders, and these need their gradients too. So the early gradients
# have to wait until the backward pass arrives, and are then passed on to the encoders. A function with a backward pass
# written by hand does that:


# %%
class EarlyGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():  # torch records nothing in here otherwise
            loss, gradients = loss_and_gradients(*leaves)
        ctx.save_for_backward(*gradients)
        return inputs[0].new_tensor(loss)

    @staticmethod
    def backward(ctx, upstream):  # the gradient of whatever was made of the loss, such as 2 for twice the loss
        return tuple(upstream * gradient for gradient in ctx.saved_tensors)


for early, late in zip(torch.autograd.grad(2 * EarlyGradients.apply(*inputs), inputs), early_gradients, strict=True):
    assert torch.allclose(early, 2 * late)

# %% [markdown]
# The package's `chunked_sigmoid_loss` works this way. It does not even need autograd for a chunk, because it knows the
# derivative of −log σ(z · logit) with respect to the logit: −z · σ(−z · logit). Let us check that formula:

# %%
logit = torch.linspace(-5, 5, 11, requires_grad=True)
for z in (1, -1):
    derivative = torch.autograd.grad(-F.logsigmoid(z * logit).sum(), logit)[0]
    assert torch.allclose(derivative, -z * torch.sigmoid(-z * logit), rtol=1e-5)

# %% [markdown]
# ## Memory, measured
#
# What matters in the end is the peak of the memory during forward and backward. `processes.peak_bytes` reads it from
# torch's profiler. We measure all of these functions, and **yours** from exercise 2.4:

# %%
from tqdm.auto import tqdm

from minivlm.course import processes

yours = exercises.piece("chunked_sigmoid_loss")
is_yours = yours is not losses.chunked_sigmoid_loss
if not yours(*inputs, CHUNK).requires_grad:
    print("Your loss has no gradient. Is there an .item() or .detach() in it? We measure the package's instead.")
    yours, is_yours = losses.chunked_sigmoid_loss, False
methods = {
    "whole table": losses.sigmoid_loss,
    "chunks": by_chunks,
    "recomputing": by_recomputing,
    "early gradients": EarlyGradients.apply,
    "the package": lambda *inputs: losses.chunked_sigmoid_loss(*inputs, CHUNK),
    "yours": lambda *inputs: yours(*inputs, CHUNK),
}
if not is_yours:
    del methods["yours"]

# %%
sizes = [256, 512, 1024, 2048, 4096]
peaks = {name: [] for name in methods}
for N in tqdm(sizes):
    for name, loss in methods.items():
        peaks[name].append(processes.peak_bytes(loss, *random_pairs(N)) / 2**20)
curves = {name: (sizes, values) for name, values in peaks.items()}
viz.lines(curves, "Peak memory, measured", "pairs N", "MiB", log="xy")

# %%
for name, values in peaks.items():
    print(f"{name:15}", "  ".join(f"{N:,}: {peak:5.1f} MiB" for N, peak in zip(sizes, values, strict=True)))
table_size = 4 * sizes[-1] ** 2 / 2**20
print(f"one table of {sizes[-1]:,} × {sizes[-1]:,} in float32: {table_size:.0f} MiB")
largest = {name: values[-1] for name, values in peaks.items()}
assert largest["whole table"] > 3 * table_size and largest["chunks"] > table_size
growth = {name: values[-1] / values[-2] for name, values in peaks.items()}  # for twice as many pairs
assert min(growth["whole table"], growth["chunks"]) > 3.5
for name in ("recomputing", "early gradients", "the package"):
    assert largest[name] < largest["whole table"] / 8 and growth[name] < 2.5

# %% [markdown]
# At 4,096 pairs, the whole table peaks at more than three times the size of the table of logits, and the chunks that
# are left to autograd still peak above one table. Both curves grow with N². Recomputing and early gradients need less
# than an eighth of the whole table's peak. Their curves grow with N, since a chunk is N × 256. And your function?

# %%
if is_yours:
    print(f"Yours peaks at {largest['yours']:.1f} MiB for {sizes[-1]:,} pairs.")
    print(f"That is {largest['yours'] / largest['whole table']:.0%} of the whole table's peak, and")
    print(f"{largest['yours'] / largest['the package']:.1f} times the package's.")
    if largest["yours"] > table_size:
        print("Your loss is right, but autograd saves the logits of all chunks. Try one of the two ways.")
    else:
        print("It does not hold the logits of all chunks at once.")
else:
    print("Pass exercise 2.4 and run this section again: it will then measure your function too.")

# %% [markdown]
# ## A ring of machines
#
# Now there are several processes, each with its own shard of the pairs. Each process keeps its images, and the shards
# of texts travel around a ring. In every step, a process computes one block, its own images with the texts it currently
# holds, and then passes the texts on to its neighbor. After as many steps as there are processes, all images have met
# all texts, and no process has ever held more than one shard of each (figure 1 of the paper).
#
# First a simulation of four processes inside this one:

# %%
W = 4
image_shards, text_shards = x.chunk(W), y.chunk(W)  # two pairs each
held, totals = list(range(W)), [0.0] * W  # the index of the text shard that each process holds; its loss so far
for step in range(W):
    print(f"step {step}: processes 0 to 3 hold the text shards", held)
    for rank in range(W):
        labels = torch.eye(2, dtype=torch.bool) & (held[rank] == rank)  # matches are only in a process's own shard
        totals[rank] += sigmoid_loss(image_shards[rank], text_shards[held[rank]], log_t, bias, labels)
    held = held[-1:] + held[:-1]  # every process passes its shard on to the next one
assert torch.isclose(sum(totals) / W, sigmoid_loss(x, y, log_t, bias), rtol=1e-5)

# %% [markdown]
# ### Real processes
#
# Now we use `torch.distributed` with its *gloo* backend, which works on any CPU. The ring loss comes from the package.
# This is the function that sends the texts on. The gradient for these texts travels with them, and after a full round
# both are back at the process they belong to.

# %%
import inspect

print(inspect.getsource(losses.ring_shift))

# %% [markdown]
# Here are 512 pairs, to be shared by several processes, and what each process does with its shard. First the ring. We
# count the bytes that a process passes on:

# %%
import torch.distributed as dist

g = torch.Generator().manual_seed(0)
all_images = torch.randn(512, 64, generator=g)
all_texts = all_images + torch.randn(512, 64, generator=g)
log_t, bias = torch.tensor(10.0).log(), torch.tensor(-10.0)


def by_ring(*inputs):
    """One process: the ring loss of its shard, the gradients, and how many bytes it sent."""
    sent, ring_shift = [], losses.ring_shift

    def counting_ring_shift(shard, *rest):
        sent.append(shard.nbytes)
        return ring_shift(shard, *rest)

    losses.ring_shift = counting_ring_shift
    loss = losses.ring_sigmoid_loss(*inputs)
    return {"loss": loss, "gradients": torch.autograd.grad(loss, inputs), "sent": sum(sent)}


# %% [markdown]
# Then CLIP's loss with its two gathers. Every process sends its shard to the W − 1 others and computes the whole table.
# Gathered tensors carry no gradient. So each process replaces the gathered copy of its own shard by the original, and
# the gradient for that shard is correct.


# %%
def by_gathers(x, y, log_t):
    """One process: CLIP's loss of the whole batch, the gradients of its shard, and how many bytes it sent."""
    gathered, sent = [], 0
    for own in (x, y):
        shards = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, own.detach())
        sent += own.nbytes * (len(shards) - 1)
        shards[dist.get_rank()] = own
        gathered.append(torch.cat(shards))
    loss = losses.clip_loss(*gathered, log_t)
    return {"loss": loss, "gradients": torch.autograd.grad(loss, (x, y)), "sent": sent}


# %% [markdown]
# `processes.run` starts one new Python per shard, connects them, and returns what each of them returns. (A new process
# cannot import from a notebook, so the functions travel as source code. `minivlm/course/processes.py` shows how.)


# %%
def both(*shard):
    inputs = [tensor.clone().requires_grad_() for tensor in shard]
    return {"ring": by_ring(*inputs), "gathers": by_gathers(*inputs[:3])}


runs = {}
for W in tqdm((2, 4)):
    shards = [(*pair, log_t, bias) for pair in zip(all_images.chunk(W), all_texts.chunk(W), strict=True)]
    runs[W] = processes.run(both, shards, helpers=[by_ring, by_gathers])
    print(f"{W} processes, ring loss of each:", "  ".join(f"{result['ring']['loss']:.5f}" for result in runs[W]))

# %% [markdown]
# Each process has the loss of its own images. The mean over processes should equal the loss of all 512 pairs in one
# process, and so should the gradients. (The ring returns the gradients of the *sum* of all processes' losses, so we
# divide them by W. The docstring of `ring_sigmoid_loss` explains why.)


# %%
def relative(ours, reference):
    """The largest difference, relative to the largest reference value."""
    ours, reference = ours.detach(), reference.detach()
    return float((ours - reference).abs().max() / reference.abs().max())


def assemble(parts):
    """The loss and the gradients of all pairs, from those of the processes."""
    W = len(parts)
    gradients = list(zip(*(part["gradients"] for part in parts), strict=True))
    mean = [sum(shares) / W for shares in gradients[2:]]  # of log_t and bias, where there are any
    return [sum(part["loss"] for part in parts) / W, torch.cat(gradients[0]), torch.cat(gradients[1]), *mean]


pairs = [tensor.requires_grad_() for tensor in (all_images, all_texts, log_t, bias)]
one_process = {}
for name, loss, inputs in (("ring", losses.sigmoid_loss, pairs), ("gathers", losses.clip_loss, pairs[:3])):
    value = loss(*inputs)
    one_process[name] = [value, *torch.autograd.grad(value, inputs)]

# %%
for W, results in runs.items():
    loss, images, texts, *scalars = assemble([result["ring"] for result in results])
    ring = max(map(relative, [loss, images / W, texts / W, *scalars], one_process["ring"]))
    gathers = max(map(relative, assemble([result["gathers"] for result in results]), one_process["gathers"]))
    print(f"{W} processes and one: ring differs by {ring:.1e}, gathers by {gathers:.1e} (relative)")
    assert ring < 1e-5 and gathers < 1e-5

# %% [markdown]
# ## What each design sends and holds
#
# Take W processes with n = N / W pairs each, and embeddings of D numbers with 4 bytes each:
#
# | | logits held at a time | bytes sent by each process per step |
# |---|---|---|
# | softmax, whole table in every process (what we ran) | N² | 2 · (W − 1) · n · D · 4 |
# | softmax, own rows and own columns | 2 · n · N | 4 · (W − 1) · n · D · 4, because gradients have to travel back |
# | sigmoid, ring | n² | 2 · W · n · D · 4, for texts and their gradients |


# %%
def designs(N, W, D):
    """Name → (bytes of logits held at a time, bytes sent by each process)."""
    n = N // W
    shard = n * D * 4
    return {
        "softmax, whole table": (4 * N * N, 2 * (W - 1) * shard),
        "softmax, rows + columns": (8 * n * N, 4 * (W - 1) * shard),
        "sigmoid, ring": (4 * n * n, 2 * W * shard),
    }


for W, results in runs.items():
    computed = designs(512, W, 64)
    assert {result["ring"]["sent"] for result in results} == {computed["sigmoid, ring"][1]}  # what was counted
    assert {result["gathers"]["sent"] for result in results} == {computed["softmax, whole table"][1]}
    print(W, "processes:", {name: f"{sent:,} bytes sent" for name, (_, sent) in computed.items()})

# %% [markdown]
# **Be careful what you compare.** You often read that SigLIP sends less. With many processes, the ring sends half as
# much as the softmax that splits the work by rows and columns. But it sends about as much as the softmax that computes
# the whole table in every process. With only two processes, it sends as much as the first and twice as much as the
# second. What really disappears is the large table. For n pairs per process, the number of logits held at a time no
# longer grows with the number of processes.

# %%
for W in (2, 256):
    (_, whole), (_, split), (_, ring) = designs(2**20, W, 1152).values()
    print(f"{W:3} processes, bytes of the ring: {ring / split:.2f} × rows + columns, {ring / whole:.2f} × whole table")
    assert ring == split if W == 2 else abs(ring / split - 0.5) < 0.01 and abs(ring / whole - 1) < 0.01
    assert W > 2 or ring == 2 * whole
assert designs(2 * 4096, 2, 1152)["sigmoid, ring"][0] == designs(256 * 4096, 256, 1152)["sigmoid, ring"][0]

# %% [markdown]
# Here are batches of up to a million pairs, on 256 processes, with embeddings as wide as those of PaliGemma's vision
# tower, D = 1152:

# %%
batch_sizes = [2**k for k in range(10, 21)]
costs = [designs(N, 256, 1152) for N in batch_sizes]
curves = {name: (batch_sizes, [cost[name][0] / 2**30 for cost in costs]) for name in costs[0]}
viz.lines(curves, "Logits held by each process", "batch size N", "GiB", log="xy")

# %%
curves = {name: (batch_sizes, [cost[name][1] / 2**30 for cost in costs]) for name in costs[0]}
viz.lines(curves, "Sent by each process per step", "batch size N", "GiB", log="xy")

# %%
for name, (held, sent) in designs(2**20, 256, 1152).items():
    print(f"a million pairs, {name:24} logits {held / 2**30:10,.3f} GiB   sent {sent / 2**30:5.1f} GiB")
assert designs(2**20, 256, 1152)["sigmoid, ring"][0] == 64 * 2**20  # 4096 × 4096 × 4 bytes

# %% [markdown]
# A batch of a million pairs is feasible. The paper trained with such batches and found that 32 thousand pairs are
# nearly as good. So large batches are not the main advantage of the sigmoid loss. It is simpler, and it works better at
# small batch sizes (section 4).
#
# ## It matches
#
# We compare with the package, with torch, and with SigLIP in transformers, on random weights:

# %%
import transformers

transformers.utils.logging.set_verbosity_error()
torch.manual_seed(0)
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
text_config, vision_config = small | {"vocab_size": 60}, small | {"image_size": 8, "patch_size": 4}
config = transformers.SiglipConfig(text_config=text_config, vision_config=vision_config)
reference = transformers.SiglipModel(config).eval()
reference.logit_scale.data.fill_(math.log(10))
reference.logit_bias.data.fill_(-10)
inputs = {"input_ids": torch.randint(3, 60, (7, 5)), "pixel_values": torch.randn(7, 3, 8, 8)}
with torch.no_grad():
    output = reference(**inputs, return_loss=True)
    x = reference.get_image_features(inputs["pixel_values"]).pooler_output
    y = reference.get_text_features(inputs["input_ids"]).pooler_output

# %%
chunked_sigmoid_loss = exercises.piece("chunked_sigmoid_loss")
logits = torch.randn(20, 30) * 300
t, b = reference.logit_scale.detach()[0], reference.logit_bias.detach()[0]
loss, package_loss = sigmoid_loss(x, y, t, b), losses.sigmoid_loss(x, y, t, b)
differences = {
    "safe softmax, torch": relative(safe_softmax(logits), logits.softmax(-1)),
    "log-sum-exp, torch": relative(log_sum_exp(logits), logits.logsumexp(-1)),
    "sigmoid loss, transformers": relative(loss, output.loss),
    "sigmoid loss, the package": relative(loss, package_loss),
    "in chunks, the package": relative(chunked_sigmoid_loss(x, y, t, b, 3), package_loss),
}
print("\n".join(f"{name:27} relative difference {d:.1e}" for name, d in differences.items()))
assert max(differences.values()) < 1e-5

# %% [markdown]
# ## Recap
#
# * exp overflows above 88.7 in float32 and above 11.1 in float16, and logits of that size are normal. Subtract the
#   maximum.
# * Losses compute log-sum-exp − the logit of the right answer, never the logarithm of a probability.
# * CLIP's two softmaxes need the whole row and the whole column: two gathers, and a table that grows with the batch.
# * The sigmoid loss asks one question per pair. Its sum can be split into chunks, or sent around a ring.
# * Chunks save memory only if autograd does not save their logits: compute them again in the backward pass, or take
#   their gradients early.
# * A bias of −10 says "no" to nearly everything, which is nearly always true. exp(log 10) lets a perfect pair reach
#   "maybe".
#
# **Three questions**
#
# <details><summary>1. bfloat16 has half the bits of float32. Does a softmax overflow earlier in it?</summary>
#
# No. It has the same range of exponents as float32 and fewer digits, so exp also overflows near 88. float16 has more
# digits and a smaller range.
#
# </details>
#
# <details><summary>2. You train with 64 pairs per batch. Is −10 still a good initial bias?</summary>
#
# −log 63 = −4.1 would be closer to the truth. With −10, the one match costs 10 nats at first and the 63 mismatches
# almost nothing. The loss starts high, but only the bias has to move.
#
# </details>
#
# <details><summary>3. Why do the texts travel around the ring, and not the images?</summary>
#
# Either would work. The table is the same, and the embeddings have the same width. But one side has to stay. If both
# traveled together, each process would meet the same pairs again and again.
#
# </details>
#
# ## For the bold: CLIP's loss in chunks
#
# An open problem, with tests but without a stub. This chapter says that a softmax needs whole rows and whole columns.
# Does CLIP's loss therefore need the whole table? Write `chunked_clip_loss(images, texts, log_t, chunk_size)`. It has
# the value and the gradients of `losses.clip_loss`, but never holds more than N × `chunk_size` logits, neither in the
# forward nor in the backward pass. Use a new cell above the tests:

# %%
if "chunked_clip_loss" in globals():
    for factor in (10, 100):
        inputs = [*random_pairs(8)[:2], torch.tensor(float(factor)).log().requires_grad_()]
        reference = losses.clip_loss(*inputs)
        gradients = torch.autograd.grad(reference, inputs)
        for chunk_size in (1, 3, 8, 20):
            loss = chunked_clip_loss(*inputs, chunk_size)
            assert relative(loss, reference) < 1e-5
            assert max(map(relative, torch.autograd.grad(loss, inputs), gradients)) < 1e-4
    dense = processes.peak_bytes(losses.clip_loss, *random_pairs(2048)[:3])
    lean = processes.peak_bytes(lambda *inputs: chunked_clip_loss(*inputs, 128), *random_pairs(2048)[:3])
    print(f"peak memory: whole table {dense / 2**20:.1f} MiB, in chunks {lean / 2**20:.1f} MiB")
    assert lean < dense / 6
    print("chunked_clip_loss passes.")
else:
    print("chunked_clip_loss is not written yet.")

# %% [markdown]
# <details><summary>Discussion</summary>
#
# A chunk of texts contains whole columns, so those are easy. Of each row it contains a part. But the log-sum-exp of a
# row is the log-sum-exp of the log-sum-exps of its parts, so one number per row and chunk is enough. This is the online
# softmax ([1805.02867](https://arxiv.org/abs/1805.02867)). FlashAttention computes attention with it
# ([2205.14135](https://arxiv.org/abs/2205.14135)), and Inf-CL trains CLIP with it, in chunks and around a ring
# ([2410.17243](https://arxiv.org/abs/2410.17243)).
#
# If your value is right but the memory is not: a diagonal is a view, and a view keeps the whole chunk of logits alive.
# `clone` it.
#
# So the large table can disappear from CLIP's loss too. What remains is that a row's gradient depends on all its parts:
# the early gradients of way 2 have to wait for the second pass, because the first one computes the sums. The sigmoid
# needs one pass.
#
# </details>
#
# **Next:** [03 · Patch embedding](03_patch_embedding.ipynb), in which an image becomes a sequence.
