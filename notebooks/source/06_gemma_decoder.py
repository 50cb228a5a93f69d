# %% [markdown]
# # 06 · The Gemma decoder
#
# **How does the decoder turn embeddings into the next token?**
#
# | | |
# |---|---|
# | know first | what a linear layer and a softmax are; which token can attend to which (chapter 05) |
# | you will build | RMSNorm, rotary positions, grouped-query attention, GeGLU, and from them a complete Gemma layer |
# | runs on | CPU, nothing to download |

# %%
import torch

import minivlm
from minivlm import emoji, gemma
from minivlm.course import exercises, viz

viz.you_are_here("06")

# %% [markdown]
# ## Predict first
#
# 1. Each layer of PaliGemma's decoder has an attention block and an MLP. Which one has more weights, and by how much?
# 2. Every token has a position. If you add 100 to every position in image, prompt and answer, what changes?
# 3. At the very end, a vector of 2,048 numbers becomes logits for 257,216 tokens. How many additional weights does that
#    step need?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. The MLP, by more than a factor of ten.
# 2. Nothing, apart from rounding: only the distance between two tokens matters.
# 3. None. The embedding table is used a second time.
#
# </details>

# %% [markdown]
# ## One layer, start to finish
#
# Embeddings pass through a stack of identical layers: 18 in PaliGemma 3B, 4 in the small model that comes with this
# course. The vectors that travel through the stack are called the *residual stream*. Each layer has two blocks, and
# each block reads the residual stream and **adds** its output to it. The orange arrows are these *residual
# connections*:

# %%
stages = [["x", "RMSNorm", "attention\ntokens attend to\neach other", "+"]]
stages += [["x ", "RMSNorm ", "GeGLU MLP\neach token\non its own", "+ ", "next layer"]]
viz.blocks(stages, title="One layer of Gemma 1", skips=[("x", "+"), ("x ", "+ ")])

# %% [markdown]
# Why add? A block only has to compute a *change*. What it does not change is still there for all later layers. And the
# network can be trained: the derivative of x + f(x) is 1 + f′(x). Thanks to the 1, the gradient reaches the first
# layer, however many layers are in between. Without it, the gradient is a product of one factor per layer, and a
# product of many factors vanishes or explodes. Here are 18 toy layers, as many as in PaliGemma 3B, with and without the
# addition:

# %%
g = torch.Generator().manual_seed(0)
toy_layers, toy_input = torch.randn(18, 64, 64, generator=g) / 16, torch.randn(64, generator=g)


def gradient_at_input(residual):
    """The length of the gradient that reaches the input of all layers."""
    x = start = toy_input.clone().requires_grad_()
    for layer in toy_layers:
        x = (x if residual else 0) + torch.tanh(layer @ x)
    x.sum().backward()
    return float(start.grad.norm())


with_addition, without_addition = gradient_at_input(True), gradient_at_input(False)
print(f"gradient at the input: {with_addition:.0f} with residual connections, {without_addition:.0e} without")
assert with_addition > 1 > 1000 * without_addition

# %% [markdown]
# Shape letters in this chapter: **B** batch size, **T** tokens, **D** hidden size (2,048), **H** query heads, **K** key
# heads (one per set of keys and values), **d** the dimension of one head.
#
# ## RMSNorm: drop the length, keep the direction
#
# Take a toy vector, (3, 4). The mean of its squares is (9 + 16) / 2 = 12.5, and the square root of that is 3.54. This
# is the *root mean square*, RMS. Divide the vector by it and you get (0.85, 1.13), whose RMS is 1. Then each number is
# multiplied by **1 + w**, where w is learned, one value per dimension. As a slow loop:

# %%
rows, w, eps = [[3.0, 4.0], [30.0, 40.0], [-1.0, 1.0]], [0.0, 1.0], 1e-6
slow = []
for row in rows:
    rms = (sum(value**2 for value in row) / len(row) + eps) ** 0.5  # eps: a row of zeros must not divide by 0
    slow.append([value / rms * (1 + weight) for value, weight in zip(row, w, strict=True)])
    print(row, "→", [round(value, 3) for value in slow[-1]])

# %% [markdown]
# The first two rows point in the same direction, so they come out the same. Three things to know about Gemma's RMSNorm
# ([transformers](https://github.com/huggingface/transformers) `models/gemma/modeling_gemma.py`):
#
# * It does **not** subtract the mean and has no bias. LayerNorm, which the vision tower in chapter 03 uses, does both.
# * It multiplies by 1 + w. A stored w of 0 means "leave it alone", so training can start from zeros. Whatever pulls
#   weights toward 0, such as weight decay, then pulls the norm toward doing nothing. If it multiplied by w, it would be
#   pulled toward erasing its input. And small changes survive in bfloat16, which has finer steps near 0 than near 1.
# * It computes in float32, whatever the model's dtype, and casts back at the **very end**.

# %%
factor = torch.tensor(1.001)
print(f"1.001 stored as w: {factor.bfloat16():.5f}; stored as 1 + w: {1 + (factor - 1).bfloat16().float():.5f}")
assert factor.bfloat16() == 1 and abs(1 + (factor - 1).bfloat16().float() - factor) < 1e-5

# %% [markdown]
# ## Exercise 6.1 · RMSNorm
#
# `x` has any number of axes; the last one has size D. `weight` has shape `[D]`. Return a tensor with the shape and
# dtype of `x`.


# %%
def rms_norm(x, weight, eps):
    """x / √(mean(x²) + eps) · (1 + weight) over the last axis, computed in float32, returned in the dtype of x."""
    ### BEGIN SOLUTION
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1 + weight.float())).type_as(x)
    ### END SOLUTION


# %%
exercises.check(rms_norm)
### BEGIN HIDDEN TESTS
exercises.score(rms_norm, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# From here on the chapter uses your function if it passed the check, and the package's otherwise. It agrees with the
# loop:

# %%
rms_norm = exercises.piece("rms_norm")
fast = rms_norm(torch.tensor(rows), torch.tensor(w), eps)
assert fast.shape == (3, 2) and torch.allclose(fast, torch.tensor(slow))

# %% [markdown]
# Why float32? Large models usually run in bfloat16, which has eight significant bits: two to three decimal digits.
# Every operation rounds again. How large is the error of the same norm if every operation runs in bfloat16, and if we
# round only once, at the end?

# %%
g = torch.Generator().manual_seed(0)
x, weight = torch.randn(64, 2048, generator=g).bfloat16(), (torch.randn(2048, generator=g) / 4).bfloat16()
exact = rms_norm(x.float(), weight.float(), eps)
cast_last = rms_norm(x, weight, eps)
all_bfloat16 = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)
errors = {"cast last": cast_last, "all in bfloat16": all_bfloat16}
errors = {name: float((y.float() - exact).abs().mean() / exact.abs().mean()) for name, y in errors.items()}
print({name: f"{error:.2%}" for name, error in errors.items()})
assert errors["cast last"] < errors["all in bfloat16"]

# %% [markdown]
# A large model runs dozens of norms one after another, so these errors accumulate.
#
# ## How does a token know its position?
#
# Attention compares a query with a key through their dot product, q·k, and both q and k are computed from the token
# alone. Shuffle the tokens and every query finds the same keys with the same scores:

# %%
from torch.nn.functional import scaled_dot_product_attention

q, k, v = torch.randn(3, 1, 1, 5, 8, generator=g)
shuffled = torch.tensor([3, 0, 4, 2, 1])
in_order = scaled_dot_product_attention(q, k, v)
assert torch.allclose(in_order, scaled_dot_product_attention(q, k[..., shuffled, :], v[..., shuffled, :]), atol=1e-6)

# %% [markdown]
# So "dog bites man" and "man bites dog" would be the same wherever all tokens attend to each other, as they do in the
# prompt. (Under a causal mask, the mask itself leaks some information about the order.) *Rotary position embeddings*
# (RoPE, arXiv:2104.09864) put the order into the dot product itself. Toy version: q and k have two numbers each, so
# they are arrows in a plane. Rotate each arrow by its position, in radians, then take the dot product.

# %%
import math


def rotate(arrow, angle):
    x, y = arrow
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def score(query_position, key_position, query=(1.0, 0.0), key=(0.6, 0.8)):
    a, b = rotate(query, query_position), rotate(key, key_position)
    return a[0] * b[0] + a[1] * b[1]


for pair in ((5, 3), (105, 103), (3, 5), (4, 4)):
    print("query at {:3}, key at {:3}: q·k = {:+.3f}".format(*pair, score(*pair)))
assert math.isclose(score(5, 3), score(105, 103)) and not math.isclose(score(5, 3), score(3, 5))

# %% [markdown]
# If you rotate two arrows by the same angle, the angle between them doesn't change. So positions 5 and 3 give the same
# score as 105 and 103. The positions affect the score only through their signed **distance**. That is why RoPE is
# called a *relative* position encoding.
#
# ### Fast and slow clock hands
#
# A real head has more than two numbers. They are grouped into d/2 pairs, and each pair rotates at its own speed, like
# the hands of a clock. Pair i rotates by θ^(−2i/d) radians per token. In Gemma, θ = 10,000.

# %%
d, theta = 8, 10_000.0
for i in range(d // 2):
    speed = theta ** (-2 * i / d)
    print(f"pair {i}: {speed:.3f} radians per token, a full turn every {2 * math.pi / speed:6,.0f} tokens")

# %% [markdown]
# Which two numbers form a pair? Many descriptions, including the RoPE paper (section 3.2.2), pair neighbors: (0, 1),
# (2, 3), … Gemma's weights, as transformers runs them, do **not**. There, pair i consists of numbers **i and i + d/2**,
# one from each half of the head. The slow loop, for a single vector at position 3:

# %%
x = torch.randn(d, generator=g)
slow = torch.empty(d)
for i in range(d // 2):
    pair = (float(x[i]), float(x[i + d // 2]))
    slow[i], slow[i + d // 2] = rotate(pair, 3 * theta ** (-2 * i / d))

# %% [markdown]
# To vectorize this, the package first builds two tables with the cosine and sine of every position's angles. Each angle
# appears twice, once for each half, so the tables are as wide as a head:

# %%
cos, sin = gemma.rotary_table(torch.tensor([[3]]), d, theta)  # positions [B, T]
assert cos.shape == sin.shape == (1, 1, d)
assert torch.equal(cos[..., : d // 2], cos[..., d // 2 :])

# %% [markdown]
# ## Exercise 6.2 · Rotate
#
# `x` is `[B, H, T, d]`. `cos` and `sin` are `[B, T, d]`, the same for all heads. Call the two halves of a head *first*
# and *second*. After the rotation, the first half is first·cos − second·sin, and the second half is second·cos +
# first·sin.


# %%
def apply_rotary(x, cos, sin):
    """[B, H, T, d], tables [B, T, d] → [B, H, T, d]: each pair (i, i + d/2) rotated by its angle."""
    ### BEGIN SOLUTION
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + swapped * sin[:, None]
    ### END SOLUTION


# %%
exercises.check(apply_rotary)
### BEGIN HIDDEN TESTS
exercises.score(apply_rotary, points=2, seed=1)
### END HIDDEN TESTS

# %%
apply_rotary = exercises.piece("apply_rotary")
assert torch.allclose(apply_rotary(x.view(1, 1, 1, d), cos, sin).flatten(), slow, atol=1e-6)

# %% [markdown]
# ### See it
#
# We place one query and one key at every pair of positions from 0 to 31. Bright means a high score. All three maps
# consist of diagonal stripes: same distance, same score.


# %%
def scores_at(q, k, positions):
    """q and k, [d] each, at every pair of positions [T] → scores [T, T]."""
    cos, sin = gemma.rotary_table(positions[None], len(q), theta)
    q, k = (apply_rotary(x.expand(1, 1, len(positions), -1), cos, sin)[0, 0] for x in (q, k))
    return q @ k.T


positions = torch.arange(32)
q, k = torch.randn(2, 64, generator=g)
fast_pair, slow_pair = (torch.arange(64) % 32 == pair for pair in (0, 8))  # both numbers of one pair
all_pairs = torch.ones(64, dtype=torch.bool)
maps = [scores_at(q * chosen, k * chosen, positions) for chosen in (fast_pair, slow_pair, all_pairs)]
names = ["the fastest pair", "a slower pair", "all 32 pairs"]
viz.image_row(maps, names, x_label="key position, 0 to 31 →", y_label="← query position, 0 to 31")

# %%
scores = maps[-1]
assert (scores[1:, 1:] - scores[:-1, :-1]).abs().max() < 1e-5 * scores.abs().max()  # constant along every diagonal
shifted = scores_at(q, k, positions + 1000)
change = (shifted - scores).abs().max()
print(f"all positions shifted by 1,000: scores up to {scores.abs().max():.1f} change by {change:.4f}")
assert change < 1e-3 * scores.abs().max()

# %% [markdown]
# The small change is rounding: at an angle of 1,000 radians, float32 has fewer digits left after the decimal point.
#
# This is also why the table is computed in float32. In bfloat16 not even the position itself would survive: above 256
# only every other integer can be represented. An image of 224 pixels takes positions 1 to 256, so its text starts at
# 257.

# %%
assert torch.tensor(257.0).bfloat16() == torch.tensor(256.0).bfloat16()

# %% [markdown]
# Here are the dials themselves, for a query and a key with d = 8, so four pairs. The pale hands are the pairs before
# they were turned. Predict first: you shift both tokens by 100 positions. Which hands turn, and what happens to q·k?
# Then move the key alone until q·k is negative. Which pair made the difference?

# %%
q8, k8 = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))


def dials(query_position=5, key_position=3, shift_both=0):
    return viz.rotated_pairs(q8, k8, query_position + shift_both, key_position + shift_both, theta)


viz.sliders(dials, query_position=(0, 50), key_position=(0, 50), shift_both=(0, 100))

# %%
near, far = (scores_at(q8, k8, torch.arange(105))[pair] for pair in ((5, 3), (104, 102)))
assert torch.isclose(near, far, rtol=1e-4)

# %% [markdown]
# ### Is pairing neighbors wrong?
#
# Not in itself. A head that pairs neighbors returns the same scores if you reorder its numbers accordingly. But
# released weights come in one order, and run with the other order they produce garbage, as "Break it" will show.
# Checkpoint and code must agree, and Gemma's checkpoints pair the halves.


# %%
def rotate_neighbors(x, cos, sin):
    """Rotates the pairs (0, 1), (2, 3), …: wrong for Gemma."""
    cos, sin = (table[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1)[:, None] for table in (cos, sin))
    swapped = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + swapped * sin


x = torch.randn(1, 1, 4, 8, generator=g)
cos, sin = gemma.rotary_table(torch.arange(4)[None], 8, theta)
order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # puts the partners i and i + 4 next to each other
assert torch.allclose(rotate_neighbors(x[..., order], cos, sin), apply_rotary(x, cos, sin)[..., order], atol=1e-6)
assert not torch.allclose(rotate_neighbors(x, cos, sin), apply_rotary(x, cos, sin), atol=0.1)

# %% [markdown]
# ## Many queries, few keys
#
# Attention runs in H heads in parallel. In *multi-head attention* (MHA), each query head has its own keys and values.
# But while the model generates an answer, the keys and values of all tokens have to stay in memory (chapter 07), and
# that memory is expensive. So heads can share them. In *multi-query attention* (MQA, arXiv:1911.02150) all heads share
# one set. In *grouped-query attention* (GQA, arXiv:2305.13245) each group of neighboring heads shares one.

# %%
models = {"PaliGemma 3B": (8, 1, 256), "PaliGemma 2 3B": (8, 4, 256), "10B": (16, 8, 256), "28B": (32, 16, 128)}
for name, (H, K, d) in models.items():
    shared, unshared = (2 * heads * d * 2 for heads in (K, H))  # keys and values, two bytes per number
    print(f"{name:14} {H // K} query heads per key head: {shared:5,} bytes per token and layer; MHA: {unshared:6,}")

# %% [markdown]
# A toy with four query heads and two key heads: query heads 0 and 1 use key head 0, query heads 2 and 3 use key head 1.
# For each query, compute its scores with all keys, apply a softmax, and average the values with the resulting weights.

# %%
H, K, T, d, scale = 4, 2, 3, 6, 0.4
q, k, v = (torch.randn(1, heads, T, d, generator=g) for heads in (H, K, K))
mask = torch.ones(1, T, T, dtype=torch.bool).tril()
slow = torch.empty(1, H, T, d)
for head in range(H):
    key_head = head // (H // K)
    for query in range(T):
        scores = torch.stack([q[0, head, query] @ k[0, key_head, key] * scale for key in range(T)])
        scores[~mask[0, query]] = -torch.inf
        slow[0, head, query] = scores.softmax(0) @ v[0, key_head]

# %% [markdown]
# In Gemma 1 the **scale** is 1/√d. A sum of d products has √d times the spread of a single product, and with scores
# that far apart the softmax would put nearly all the weight on one key. Here are random queries and keys with d = 256:

# %%
some_queries, some_keys = torch.randn(2, 200, 256, generator=g)
unscaled = some_queries @ some_keys.T
print(f"spread of one product {(some_queries * some_keys).std():.1f}, of the sum of 256 {unscaled.std():.1f}")
largest_weight = {name: float(s.softmax(-1).amax(-1).mean()) for name, s in (("", unscaled), ("· 1/√d", unscaled / 16))}
print("the largest of 200 weights, on average:", {f"q·k {name}": f"{w:.2f}" for name, w in largest_weight.items()})
assert abs(unscaled.std() - 16) < 1 and largest_weight[""] > 0.8 > 0.1 > largest_weight["· 1/√d"]

# %% [markdown]
# ### Soft capping
#
# Scores can still grow during training, because nothing limits the lengths of queries and keys. Then one key gets all
# the weight, and the gradient of the softmax, p · (1 − p), is nearly 0. The layer can no longer correct itself. Gemma 2
# (arXiv:2408.00118) limits scores that grow too large. A score *s* becomes cap · tanh(*s* / cap). That is close to *s*
# while *s* is small and never exceeds ±cap. The cap is 50 for attention scores and 30 for the final logits.

# %%
pair = torch.tensor([100.0, 80.0])  # two keys with large scores
for name, values in {"no cap": pair, "cap 50": gemma.soft_cap(pair, 50.0)}.items():
    p = float(values.double().softmax(0)[1])
    capped = [round(value, 1) for value in values.tolist()]
    print(f"{name:6} scores {capped}, weight of the second {p:.0e}, p · (1 − p) = {p * (1 - p):.0e}")
    assert (p * (1 - p) < 1e-8) if name == "no cap" else (p * (1 - p) > 0.05)

# %%
s = torch.linspace(-120, 120, 49)
curves = {"no cap": (s, s)} | {f"cap {cap:.0f}": (s, gemma.soft_cap(s, cap)) for cap in (50.0, 30.0)}
viz.lines(curves, "cap · tanh(score / cap)", "score", "capped score")

# %% [markdown]
# The cap is applied **before** the mask. In the opposite order, the −∞ of a masked key becomes −cap, and the key is no
# longer masked. With a cap of 50 you would never notice, which makes the bug dangerous. The lower the cap, the more
# attention leaks through:

# %%
scores, visible, leaked = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([True, True, False]), []
for cap in (50.0, 5.0, 1.0):
    cap_first = gemma.soft_cap(scores, cap).masked_fill(~visible, -torch.inf).softmax(0)
    mask_first = gemma.soft_cap(scores.masked_fill(~visible, -torch.inf), cap).softmax(0)
    leaks = f"{cap_first[2]:.0f} if the cap comes first, {mask_first[2]:.1e} if the mask comes first"
    print(f"cap {cap:2.0f}: attention to the masked key is {leaks}")
    leaked.append(float(mask_first[2]))
    assert cap_first[2] == 0 < mask_first[2]
assert leaked[0] < 1e-12 and leaked == sorted(leaked)

# %% [markdown]
# The same for six tokens under a causal mask. Predict first: at which cap can you *see* the leak if the mask comes
# first? Then choose that order, and lower the cap until a tenth of the attention is where it must not be.

# %%
six_scores = 4 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)


def capped(cap=5.0, order="cap, then mask"):
    scores = six_scores if order == "cap, then mask" else six_scores.masked_fill(hidden, -torch.inf)
    capped_scores = gemma.soft_cap(scores, cap)
    p = (capped_scores.masked_fill(hidden, -torch.inf) if order == "cap, then mask" else capped_scores).softmax(-1)
    title = f"{order}, cap {cap:.3g}: {p[hidden].sum() / 6:.1%} of the attention leaks"
    return viz.similarity_matrix(p, [f"query {i}" for i in range(6)], [f"key {i}" for i in range(6)], [], title)


viz.sliders(capped, cap=(0.5, 50, "log"), order=["cap, then mask", "mask, then cap"])

# %% [markdown]
# ## Exercise 6.3 · Grouped-query attention
#
# `q` is `[B, H, T, d]`. `k` and `v` are `[B, K, S, d]`, with S keys. `mask` is a boolean `[B, T, S]` (its first axis
# may be 1 and then applies to the whole batch), or None if every query can attend to every key. `cap` is a number or
# None. Apply the steps in this order: q·k times `scale`, cap, mask, softmax over the keys, weighted mean of the values.


# %%
def grouped_query_attention(q, k, v, mask, scale, cap=None):
    """[B, H, T, d] queries, [B, K, S, d] keys and values → [B, H, T, d]."""
    ### BEGIN SOLUTION
    group_size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).type_as(v) @ v
    ### END SOLUTION


# %%
exercises.check(grouped_query_attention)
### BEGIN HIDDEN TESTS
exercises.score(grouped_query_attention, points=3, seed=1)
### END HIDDEN TESTS

# %%
grouped_query_attention = exercises.piece("grouped_query_attention")
fast = grouped_query_attention(q, k, v, mask, scale)
assert fast.shape == (1, H, T, d) and torch.allclose(fast, slow, atol=1e-6)

# %% [markdown]
# So sharing adds no new mechanism: it is multi-head attention in which some heads happen to have the same keys and
# values. With the key heads written out repeatedly, the result is the same. The package instead lines up the queries of
# a group one after another, so it never copies a key.

# %%
repeated = [x.repeat_interleave(H // K, dim=1) for x in (k, v)]
multi_head = grouped_query_attention(q, *repeated, mask, scale)  # K = H: plain multi-head attention
package = gemma.grouped_query_attention(q, k, v, mask, scale)
assert torch.allclose(multi_head, fast, atol=1e-6) and torch.allclose(package, fast, atol=1e-6)
print("numbers stored: multi-head", sum(x.numel() for x in repeated), " grouped", k.numel() + v.numel())

# %% [markdown]
# ### See it
#
# The small model has four query heads and one set of keys and values. The queries still differ, so the heads can attend
# to different patches. The figure starts with the last token of the prompt, the newline. Above each head is how much of
# its attention goes to the image. Predict first: which token of the prompt needs the image most, and in which layer?
# Then move the controls until the four heads look at four different places.

# %%
model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
scene = emoji.make_scene(0, "validation")
prompt = processor(text=["caption en"], images=[scene.image])
weights = torch.stack(viz.decoder_attention(model, **prompt))[:, 0]  # [layers, H, T, T]
P = processor.num_image_tokens
prompt_tokens = {f"{i} {t.text!r}": i for i, t in enumerate(viz.read_tokens(prompt, processor)) if i >= P}


def heads_of(layer=3, token=52):
    to_image = weights[layer, :, token, :P]
    titles = [f"head {head}: {share:.0%}" for head, share in enumerate(to_image.sum(-1))]
    return viz.attention_on_image(scene.image, to_image, titles, f"Layer {layer}: four query heads, one key head")


# %%
viz.sliders(heads_of, layer=(0, 3), token=prompt_tokens)

# %% [markdown]
# ## GeGLU: an MLP with a gate
#
# The second block, the MLP, processes each token on its own. The vision tower's MLP projects up, applies GELU, and
# projects down. Gemma's projects up **twice**: one projection, the *gate*, goes through GELU and is then multiplied by
# the other, *up* (GeGLU, arXiv:2002.05202). Then *down* projects the product back to the hidden size.
#
# What does the gate bring? Without it, a number inside the MLP is a function of one projection of x. With it, one
# projection decides how much of another one passes, so the MLP can **multiply** two features: pass *up* on only if
# *gate* applies. Two gated numbers even multiply exactly, because GELU(a) − GELU(−a) = a. A plain MLP can only
# approximate a product. The paper measured better perplexity for the same number of weights, and about the reason it
# says: "we attribute their success, as all else, to divine benevolence".
#
# GELU lets positive numbers through and nearly blocks negative ones. Exact GELU is x times the probability that a
# standard normal random variable is below x. Gemma was trained with a tanh approximation. Here it is, written out for a
# single number, with its distance from the exact version:


# %%
def gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


x = torch.linspace(-4, 4, 161)
tanh_gelu, exact_gelu = torch.nn.functional.gelu(x, approximate="tanh"), torch.nn.functional.gelu(x)
assert torch.allclose(tanh_gelu, torch.tensor([gelu(float(value)) for value in x]), atol=1e-6)
print(f"the tanh version differs from the exact one by at most {(tanh_gelu - exact_gelu).abs().max():.1e}")
for gate, up in ((-3.0, 2.0), (0.0, 2.0), (3.0, 2.0), (3.0, -2.0)):
    print(f"gate {gate:4}  up {up:4}  →  {gelu(gate) * up:+.3f}")
for a, b in ((1.5, -2.0), (-0.3, 0.7), (-4.0, -1.0)):
    assert math.isclose(gelu(a) * b + gelu(-a) * -b, a * b)  # two gated numbers, one product

# %%
curves = {"GELU (Gemma)": (x, tanh_gelu), "SiLU (Llama)": (x, x * x.sigmoid()), "ReLU": (x, x.relu())}
viz.lines(curves, "What the gate lets through", "gate", "factor on up")

# %% [markdown]
# ## Exercise 6.4 · GeGLU
#
# `gate` and `up` have the same shape. Return their GeGLU.


# %%
def geglu(gate, up):
    """Two tensors of the same shape → one: GELU(gate) · up."""
    ### BEGIN SOLUTION
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
    ### END SOLUTION


# %%
exercises.check(geglu)
### BEGIN HIDDEN TESTS
exercises.score(geglu, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# Where are a layer's weights? Here is the count for PaliGemma 3B, whose MLP has an intermediate size of 16,384:

# %%
geglu = exercises.piece("geglu")
config_3b = minivlm.PaliGemmaConfig().text_config
D, H, K, d = config_3b.hidden_size, config_3b.num_attention_heads, config_3b.num_key_value_heads, config_3b.head_dim
attention = D * H * d + 2 * D * K * d + H * d * D  # q; k and v; o, which combines the heads
mlp = 3 * D * config_3b.intermediate_size  # gate, up, down
print(f"attention {attention / 1e6:.1f} million weights, MLP {mlp / 1e6:.1f} million")
assert mlp > 10 * attention

# %% [markdown]
# ## Exercise 6.5 · The whole layer
#
# Put your four functions together, following the diagram at the top. `weights` has the fields `attention_norm` `[D]`,
# `q`, `k`, `v`, `o`, `mlp_norm` `[D]`, `gate`, `up` and `down`. The matrices are `[out, in]`, as in `nn.Linear`, so a
# projection is `x @ weights.q.T`. Use eps = 1e-6, scale = `head_dim ** -0.5`, and no cap.


# %%
def decoder_layer(x, weights, cos, sin, mask, head_dim):
    """x [B, T, D], cos and sin [B, T, d], mask [B, T, T] or None → [B, T, D]."""
    ### BEGIN SOLUTION
    B, T, _ = x.shape
    y = rms_norm(x, weights.attention_norm, 1e-6)
    q, k, v = ((y @ w.T).view(B, T, -1, head_dim).transpose(1, 2) for w in (weights.q, weights.k, weights.v))
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    heads = grouped_query_attention(q, k, v, mask, head_dim**-0.5)
    x = x + heads.transpose(1, 2).reshape(B, T, -1) @ weights.o.T
    y = rms_norm(x, weights.mlp_norm, 1e-6)
    return x + geglu(y @ weights.gate.T, y @ weights.up.T) @ weights.down.T
    ### END SOLUTION


# %%
exercises.check(decoder_layer)
### BEGIN HIDDEN TESTS
exercises.score(decoder_layer, points=4, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# Now run your layer with the weights of the trained model, one layer after another, from the same embeddings that the
# package uses:

# %%
from minivlm.course.exercises.ch06 import LayerWeights

decoder_layer = exercises.piece("decoder_layer")
decoder, head_dim = model.language_model.model, model.config.text_config.head_dim
with torch.no_grad():
    x = model.embed(prompt["input_ids"], model.encode_image(prompt["pixel_values"]))
    cos, sin = gemma.rotary_table(gemma.token_positions(prompt["attention_mask"], x.shape[1]), head_dim, theta)
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        mlp_weights = [getattr(mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")]
        norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        x = decoder_layer(x, LayerWeights(norms[0], *projections, norms[1], *mlp_weights), cos, sin, None, head_dim)

# %% [markdown]
# (Every prompt token can attend to every other, so the mask is None. And beware when you read the hub's files: Gemma 1
# calls the norm *before* the MLP `post_attention_layernorm`.)
#
# ## From vector to token
#
# After one more norm come the scores of all tokens, the *logits*: the dot product of the vector with **every row of the
# embedding table**. The input embedding and the output head are *tied*: they are the same matrix.

# %%
table = decoder.embed_tokens.weight  # [V, D], V tokens in the vocabulary
with torch.no_grad():
    logits = rms_norm(x, decoder.norm.weight, 1e-6) @ table.T
    package = model(**prompt)
print(f"largest relative difference from the package: {(logits - package).abs().max() / package.abs().max():.1e}")
assert (logits - package).abs().max() < 1e-5 * package.abs().max()
viz.sampling_distribution(logits[0, -1], processor, top=5, title="The first token of the caption")

# %% [markdown]
# How much does tying save? A second table of V × D numbers. To count them, we build the real PaliGemma 3B without
# allocating memory for its weights. (Tensors on torch's "meta" device have a shape but no data.)

# %%
with torch.device("meta"):
    paligemma_3b = minivlm.PaliGemma(minivlm.PaliGemmaConfig())
total = sum(p.numel() for p in paligemma_3b.parameters())
tied = paligemma_3b.language_model.model.embed_tokens.weight.numel()
print(f"PaliGemma 3B: {total:,} weights, {tied:,} of them in the embedding table ({tied / total:.0%})")
print(f"a second table would take another {tied * 2 / 1e9:.2f} GB in bfloat16")
assert tied == 257_216 * 2_048

# %% [markdown]
# Tying has a catch, because the same rows have to serve two purposes at two scales. As the **output head**, a row of
# length about 1 is right: the final norm makes every number of x about 1, so a logit, x · row, is about 1 too, which is
# a good place to start training. That is how the table is initialized. As **input**, the same row is too small: spread
# over D numbers, a length of 1 means numbers of about 1/√D. The blocks add numbers of about 1, and the token would be
# lost among them. So Gemma multiplies the embeddings it looks up by **√D**, as the first transformer did
# ("Attention Is All You Need", arXiv:1706.03762, section 3.4). Here is a table as it is before training:

# %%
fresh = minivlm.PaliGemma(model.config).init_weights(seed=6).language_model.model.embed_tokens.weight.detach()
D = fresh.shape[1]
x_final = rms_norm(torch.randn(100, D, generator=g), torch.zeros(D), 1e-6)
numbers = {"length of a row": fresh.norm(dim=1).mean(), "spread of the logits": (x_final @ fresh.T).std()}
numbers |= {"numbers of a row": fresh.std(), "numbers of a row times √D": (fresh * D**0.5).std()}
print(", ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
assert all(0.9 < numbers[name] < 1.1 for name in numbers if name != "numbers of a row")
assert numbers["numbers of a row"] < 0.1

# %% [markdown]
# Image features are not multiplied. They come from the projector of chapter 08, which has its own weights and learns
# the scale it needs. In the trained model:

# %%
with torch.no_grad():
    looked_up, scaled = decoder.embed_tokens(prompt["input_ids"][:, -4:]), decoder.embed(prompt["input_ids"][:, -4:])
print(f"√{model.config.text_config.hidden_size} = {scaled.norm() / looked_up.norm():.3f}")
assert torch.allclose(scaled, looked_up * model.config.text_config.hidden_size**0.5)

# %% [markdown]
# ### Logits in float32
#
# A bfloat16 number has eight significant bits, however large it is. Between 16 and 32 that means steps of 1/8. Tokens
# whose logits are closer than that can get the **same** score, and then argmax picks the one with the lowest id. Here
# are the logits of the prompt's last token, rounded:

# %%
row = logits[0, -1]
rounded = row.bfloat16()
print(f"{len(row)} tokens: {len(row.unique())} distinct logits in float32, {len(rounded.unique())} in bfloat16")
assert len(rounded.unique()) < len(row.unique())
assert torch.tensor([20.0, 20.125, 20.0624]).bfloat16().tolist() == [20, 20.125, 20]  # steps of 1/8
close = torch.tensor([20.00, 20.05, 20.06])
print("20.00, 20.05, 20.06 in bfloat16:", close.bfloat16().tolist(), " argmax:", int(close.bfloat16().argmax()))
assert close.argmax() == 2 and close.bfloat16().argmax() == 0

# %% [markdown]
# And the loss? Rounding the logits already changes it. On top of that, a loss stored in bfloat16 can only be a multiple
# of 1/128 when it is between 1 and 2. With PaliGemma's vocabulary, the loss of the third token above:

# %%
many = torch.full((257_216,), 3.0)
many[:3] = close
exact = -many.double().log_softmax(0)[2]
rounded_logits, all_bfloat16 = -many.bfloat16().double().log_softmax(0)[2], -many.bfloat16().log_softmax(0)[2]
print(f"loss {exact:.4f}; with logits rounded to bfloat16 {rounded_logits:.4f}; all in bfloat16 {all_bfloat16:.4f}")
assert abs(rounded_logits - exact) > 0.01 and float(all_bfloat16) * 128 == round(float(all_bfloat16) * 128)

# %% [markdown]
# So the package casts logits to float32 before any softmax (`generation.py`, `PaliGemma.loss`), as transformers does
# for its loss. That can't restore what a bfloat16 model has already rounded away, but it prevents further loss of
# precision.
#
# ## Break it
#
# We put four one-line bugs into the trained model, plus one difference that turns out to be harmless. None of them
# raises an error.

# %%
from unittest.mock import patch

from tqdm.auto import tqdm

bugs = {
    "correct": (gemma, "geglu", gemma.geglu),
    "w instead of 1 + w": (gemma, "rms_norm", lambda x, weight, eps, norm=gemma.rms_norm: norm(x, weight - 1, eps)),
    "neighbors rotated": (gemma, "apply_rotary", rotate_neighbors),
    "no positions at all": (gemma, "apply_rotary", lambda x, cos, sin: x),
    "embeddings without √D": (gemma.GemmaModel, "embed", lambda self, ids: self.embed_tokens(ids)),
    "exact GELU, not tanh": (gemma, "geglu", lambda gate, up: torch.nn.functional.gelu(gate) * up),
}

# %%
scenes = [emoji.make_scene(seed, "validation") for seed in range(12)]
correct = {}
for bug, (owner, name, function) in tqdm(bugs.items()):
    with patch.object(owner, name, function):
        answers = minivlm.generate(model, processor, [s.image for s in scenes], "caption en")
    correct[bug] = sum(emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(answers, scenes, strict=True))
    print(f"{bug:22} {correct[bug]:2} of {len(scenes)} captions correct; the first: {answers[0]!r}")

# %%
assert all(correct[bug] < correct["correct"] for bug in list(bugs)[1:5])
assert abs(correct["exact GELU, not tanh"] - correct["correct"]) <= 1  # the harmless one

# %% [markdown]
# Fixing such a bug means reverting one line. The hard part is finding it. The way to find it is a layer-by-layer
# comparison with numbers known to be right, as at the end of this chapter.
#
# ## Gemma 2: four norms, two caps
#
# PaliGemma 2 uses Gemma 2 as its decoder, which also normalizes what each block **returns**, before adding it to x:
# `x + norm(attention(norm(x)))`. Let's build a tiny Gemma 2 with random weights, next to a tiny Gemma 1:

# %%
from minivlm.config import GemmaConfig, SiglipVisionConfig

vision_config = SiglipVisionConfig(24, 40, 2, 2, image_size=12, patch_size=4)
sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "head_dim": 12}
caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 6, "query_pre_attn_scalar": 20}
gemma1 = GemmaConfig(**sizes, num_attention_heads=4)
gemma2 = GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, model_type="gemma2", **caps)


# %%
def tiny(text_config):
    """A PaliGemma with random weights, including those of the norms."""
    config = minivlm.PaliGemmaConfig(vision_config, text_config, image_token_index=119)
    tiny_model = minivlm.PaliGemma(config).init_weights(seed=6).eval()
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape, generator=g) / 3
            if "q_proj.weight" in name:
                parameter *= 2  # makes the scores large enough for the cap to matter
    return tiny_model


tiny_models = {"Gemma 1": tiny(gemma1), "Gemma 2": tiny(gemma2)}
for name, tiny_model in tiny_models.items():
    norms = [n for n, _ in tiny_model.language_model.model.layers[0].named_children() if "norm" in n]
    print(name, len(norms), "norms per layer:", ", ".join(norms))

# %% [markdown]
# In Gemma 2, `post_attention_layernorm` really does come after attention. Now see what the caps do to the attention
# scores and to the final logits:

# %%
ids, types = torch.tensor([[119] * 9 + [2, 7, 8, 9, 10, 11, 12]]), torch.tensor([[0] * 12 + [1] * 4])
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
batch["pixel_values"] = torch.rand(1, 3, 12, 12, generator=g) * 2 - 1
recorded = {}


def recording_soft_cap(x, cap, soft_cap=gemma.soft_cap):
    recorded["logits" if x.shape[-1] == 120 else "attention"] = (x.abs().max(), soft_cap(x, cap).abs().max(), cap)
    return soft_cap(x, cap)


with torch.no_grad(), patch.object(gemma, "soft_cap", recording_soft_cap):
    tiny_models["Gemma 2"](**batch)
for where, (before, after, cap) in recorded.items():
    print(f"{where:9} largest score {before:.2f}, with cap {cap}: {after:.2f}")
    assert after < cap and after < before

# %% [markdown]
# One more number that is easy to get wrong is the query scale. It is d^−½ nearly everywhere, but PaliGemma 2 28B has
# heads of dimension 128 and a scale of **144**^−½. 144 is its hidden size divided by its number of heads: 4608 / 32.

# %%
assert 4608 // 32 == 144 != 128
print("scale of the tiny Gemma 2: 20 ** -0.5 =", round(20**-0.5, 3), " not 12 ** -0.5 =", round(12**-0.5, 3))

# %% [markdown]
# ## It matches
#
# We save both tiny models in the hub's format, load them in transformers, and compare after every layer:

# %%
import tempfile

import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def in_transformers(ours):
    """The same weights in transformers. Soft capping needs its "eager" attention."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        load = transformers.PaliGemmaForConditionalGeneration.from_pretrained
        return load(folder, attn_implementation="eager", dtype="float32").eval()


# %%
for name, ours in tiny_models.items():
    states = []
    for layer in [*ours.language_model.model.layers[:-1], ours.language_model.model.norm]:
        layer.register_forward_hook(lambda *call, states=states: states.append(call[-1]))
    with torch.no_grad():
        logits, theirs = ours(**batch), in_transformers(ours)(**batch, output_hidden_states=True)
    pairs = zip([*states, logits], [*theirs.hidden_states[1:], theirs.logits], strict=True)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    print(f"{name}: relative difference after each layer and of the logits:", " ".join(f"{e:.0e}" for e in errors))
    assert len(errors) == 5 and max(errors) < 1e-5

# %% [markdown]
# ## Recap
#
# * A layer adds to the residual stream twice: the output of attention, then the output of the gated MLP. Adding lets
#   gradients reach the first layer.
# * RMSNorm divides by the root mean square and multiplies by 1 + w, in float32.
# * RoPE rotates the pairs (i, i + d/2) of queries and keys, so positions affect a score only through their distance.
# * Grouped queries share keys and values: the same attention with less to store. In PaliGemma 3B all eight query heads
#   share one set.
# * The embedding table is also the output head. Its rows have a length of about 1 before training, which suits the
#   logits. On the way in they are multiplied by √D, to the scale of the residual stream. Keep the logits in float32.
# * Gemma 2 adds two norms per layer and two soft caps: one on the attention scores, before the mask, and one on the
#   final logits.
#
# **Three questions**
#
# <details><summary>1. If the weights w of all norms are 0, what does a norm do? And in Llama?</summary>
#
# In Gemma it divides by the root mean square and changes nothing else. Llama multiplies by w itself, so everything
# would become 0.
#
# </details>
#
# <details><summary>2. Why are values not rotated?</summary>
#
# Rotation makes the score depend on the distance. Values are averaged after the scores are settled. If they were
# rotated by their positions, the same content would mean different things at different positions, and nothing would
# rotate it back.
#
# </details>
#
# <details><summary>3. A friend's PaliGemma writes fluent nonsense, with no error. What do you check first?</summary>
#
# The details of this chapter: 1 + w, halves or neighbors, √D on the text but not on the image, the query scale. Each is
# a single line, and getting it wrong changes no shape. Compare with transformers after every layer: the bug is in the
# first layer that differs.
#
# </details>
#
# ## Open problem: convert a checkpoint
#
# "Is pairing neighbors wrong?" said that a head which pairs neighbors returns the same scores if its numbers are
# reordered. So you can convert a checkpoint whose code pairs neighbors (Llama's original weights do) for code that
# pairs halves, without touching the code: reorder the rows of the query and key projections. Write
# `halves_from_neighbors(weight, num_heads)`: a matrix `[H·d, D]`, as in `nn.Linear`, → the same rows in another order.
# There is no stub: write the function in a new cell above the tests.
#
# <details><summary>A pointer</summary>
#
# `order` in that section reorders one head, in the other direction. Split the rows into heads, pairs, and the two
# members of a pair. Which two of these axes change places?
#
# </details>

# %%
if halves_from_neighbors := globals().get("halves_from_neighbors"):
    generator, (T, D, d) = torch.Generator().manual_seed(6), (7, 24, 8)
    x, (H, K) = torch.randn(1, T, D, generator=generator), (3, 1)
    w_q, w_k = (torch.randn(heads * d, D, generator=generator) for heads in (H, K))
    cos, sin = gemma.rotary_table(torch.arange(T)[None], d, theta)

    def scores_with(rotary, w_q, w_k):
        q, k = (rotary((x @ w.T).view(1, T, -1, d).transpose(1, 2), cos, sin) for w in (w_q, w_k))
        return q @ k.transpose(2, 3)

    converted = [halves_from_neighbors(w_q, H), halves_from_neighbors(w_k, K)]
    for before, after in zip((w_q, w_k), converted, strict=True):
        assert after.shape == before.shape, f"the shape changed to {list(after.shape)}"
        assert torch.equal(before.sort(0).values, after.sort(0).values), "the rows themselves must not change"
    expected, got = scores_with(rotate_neighbors, w_q, w_k), scores_with(gemma.apply_rotary, *converted)
    assert torch.allclose(got, expected, atol=1e-4), f"scores differ by up to {(got - expected).abs().max():.2f}"
    print("halves_from_neighbors passed: the same scores")
else:
    print("halves_from_neighbors is not written yet.")

# %% [markdown]
# **Next:** [07 · The KV cache](07_kv_cache.ipynb): why the second token is cheap.
