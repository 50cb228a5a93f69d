# %% [markdown]
# # 06 · The Gemma decoder
#
# **What turns embeddings into the next word?**
#
# | | |
# |---|---|
# | time | 120 minutes, 68 of them exercises |
# | know first | what a linear layer and a softmax are; who may look at whom (chapter 05) |
# | you will build | RMSNorm, rotary positions, grouped-query attention, GeGLU, and of them a whole layer of Gemma |
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
# 1. A layer of PaliGemma's decoder holds an attention block and a feed-forward block. Which has more weights, and by how
#    much?
# 2. Every token has a position. If all positions of picture, prompt and answer grew by 100, what would change?
# 3. In the end a vector of 2,048 numbers becomes scores for 257,216 words. How many weights does that step have of its
#    own?
#
# <details><summary>Answers, to open at the end of the chapter</summary>
#
# 1. The feed-forward block, by more than ten times.
# 2. Nothing but rounding: only the distance between two tokens counts.
# 3. None. The table of embeddings is used a second time.
#
# </details>

# %% [markdown]
# ## The way through a layer
#
# Embeddings go through a pile of equal layers: 18 in PaliGemma 3B, 4 in the small model that comes with this course. Each
# layer has two blocks, and each block **adds** to what came in:

# %%
way = [["x", "RMSNorm", "attention\ntokens look at\neach other", "x + …"]]
way += [["RMSNorm ", "GeGLU\neach token\nby itself", "x + … ", "next layer"]]
viz.blocks(way, title="One layer of Gemma 1")

# %% [markdown]
# The letters of this chapter: **B** rows of a batch, **T** tokens, **D** width of the model (2,048), **H** query heads,
# **K** key heads, **d** width of a head.
#
# ## RMSNorm: forget the length, keep the direction
#
# A toy vector, (3, 4). The mean of its squares is (9 + 16) / 2 = 12.5, the root of that 3.54: this is the *root mean
# square*, RMS. Divided by it the vector becomes (0.85, 1.13), whose own RMS is 1. Then each number is multiplied by
# **1 + w**, where w is learned, one a dimension. The slow loop:

# %%
rows, w, eps = [[3.0, 4.0], [30.0, 40.0], [-1.0, 1.0]], [0.0, 1.0], 1e-6
slow = []
for row in rows:
    rms = (sum(number**2 for number in row) / len(row) + eps) ** 0.5  # eps: a row of zeros must not divide by 0
    slow.append([number / rms * (1 + weight) for number, weight in zip(row, w, strict=True)])
    print(row, "→", [round(number, 3) for number in slow[-1]])

# %% [markdown]
# The first two rows point the same way and come out the same. Three things to know about Gemma's RMSNorm
# ([transformers](https://github.com/huggingface/transformers) `models/gemma/modeling_gemma.py`):
#
# * It does **not** subtract the mean and has no bias. LayerNorm, in the vision tower of chapter 03, does both.
# * It multiplies by 1 + w. A stored w of 0 means "leave it".
# * It computes in float32, whatever type the model has, and casts **last**.
#
# ## Exercise 6.1 · RMSNorm ★☆☆ (10 minutes)
#
# `x` has any number of axes, the last one of width D; `weight` has shape `[D]`. Return the same shape and type as `x`.
#
# <details><summary>Hint</summary>
#
# Begin with `x.float()`, end with `.type_as(x)`, and take `weight.float()` in between. `.mean(-1, keepdim=True)` leaves
# an axis of length 1, so that each vector is divided by its own number.
#
# </details>


# %%
def rms_norm(x, weight, eps):
    """x / √(mean(x²) + eps) · (1 + weight), over the last axis, computed in float32, returned in the type of x."""
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
# From here on the chapter uses your function if it passed, and the package's if not. It gives what the loop gave:

# %%
rms_norm = exercises.piece("rms_norm")
fast = rms_norm(torch.tensor(rows), torch.tensor(w), eps)
assert fast.shape == (3, 2) and torch.allclose(fast, torch.tensor(slow))

# %% [markdown]
# Why float32? bfloat16, the type in which large models run, keeps eight bits of a number, two to three decimal digits.
# Each step rounds again. How far from the truth does the same norm come out, with every step in bfloat16 and with one
# rounding at the end?

# %%
g = torch.Generator().manual_seed(0)
x, weight = torch.randn(64, 2048, generator=g).bfloat16(), (torch.randn(2048, generator=g) / 4).bfloat16()
truth = rms_norm(x.float(), weight.float(), eps)
careful = rms_norm(x, weight, eps)
careless = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight)
off = {"cast last": careful, "all in bfloat16": careless}
off = {name: float((y.float() - truth).abs().mean() / truth.abs().mean()) for name, y in off.items()}
print({name: f"{error:.2%}" for name, error in off.items()})
assert off["cast last"] < off["all in bfloat16"]

# %% [markdown]
# A large model has dozens of norms, one after the other.
#
# ## Where does a token stand?
#
# Attention compares a query with a key by their dot product, q·k, and q and k are made from the tokens alone. Shuffle
# the tokens and every query finds the same keys with the same scores:

# %%
from torch.nn.functional import scaled_dot_product_attention

q, k, v = torch.randn(3, 1, 1, 5, 8, generator=g)
shuffled = torch.tensor([3, 0, 4, 2, 1])
plain = scaled_dot_product_attention(q, k, v)
assert torch.allclose(plain, scaled_dot_product_attention(q, k[..., shuffled, :], v[..., shuffled, :]), atol=1e-6)

# %% [markdown]
# "Dog bites man" and "man bites dog" would be the same wherever all tokens see each other, as in the prompt. (Where
# each sees only what came before, the mask alone betrays a little of the order.) *Rotary positions* (RoPE,
# arXiv:2104.09864) put the order into the dot product itself. A toy: q and k of two numbers each are arrows in a plane.
# Turn each arrow by as many radians as the number of its position, then take the dot product.

# %%
import math


def turn(arrow, angle):
    x, y = arrow
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def score(query_position, key_position, query=(1.0, 0.0), key=(0.6, 0.8)):
    a, b = turn(query, query_position), turn(key, key_position)
    return a[0] * b[0] + a[1] * b[1]


for places in ((5, 3), (105, 103), (3, 5), (4, 4)):
    print("query at {:3}, key at {:3}: q·k = {:+.3f}".format(*places, score(*places)))
assert math.isclose(score(5, 3), score(105, 103)) and not math.isclose(score(5, 3), score(3, 5))

# %% [markdown]
# Two arrows that turn by the same angle keep the angle between them. So positions 5 and 3 give what 105 and 103 give:
# the score knows the **distance**, with its sign, and nothing else. That is the relative property.
#
# ### Fast and slow hands
#
# A head has more than two numbers. They are taken as d/2 pairs, and every pair turns at a speed of its own, as the hands
# of a clock do: pair i by θ^(−2i/d) radians a token, with θ = 10,000 in Gemma.

# %%
d, theta = 8, 10_000.0
for i in range(d // 2):
    speed = theta ** (-2 * i / d)
    print(f"pair {i}: {speed:.3f} radians a token, once round in {2 * math.pi / speed:6,.0f} tokens")

# %% [markdown]
# Which two numbers make a pair? Often one reads "neighbors: (0, 1), (2, 3), …", and so it stands in the RoPE paper
# (section 3.2.2). In Gemma's weights, as transformers runs them, it is **not** so: pair i is made of the numbers **i and
# i + d/2**, one from each half of the head. The slow loop, for a single vector at position 3:

# %%
x = torch.randn(d, generator=g)
slow = torch.empty(d)
for i in range(d // 2):
    pair = (float(x[i]), float(x[i + d // 2]))
    slow[i], slow[i + d // 2] = turn(pair, 3 * theta ** (-2 * i / d))

# %% [markdown]
# To do it for all at once the package first makes two tables, the cosine and the sine of every position's angles. Each
# angle stands there twice, once for either half, so that the tables are as wide as a head:

# %%
cos, sin = gemma.rotary_table(torch.tensor([[3]]), d, theta)  # positions [B, T]
assert cos.shape == sin.shape == (1, 1, d)
assert torch.equal(cos[..., : d // 2], cos[..., d // 2 :])

# %% [markdown]
# ## Exercise 6.2 · Rotate ★★☆ (12 minutes)
#
# `x` is `[B, H, T, d]`, `cos` and `sin` are `[B, T, d]`, the same for all heads. Call the halves of a head *first* and
# *second*. After the turn the first half is first·cos − second·sin, the second half is second·cos + first·sin.
#
# <details><summary>Hint</summary>
#
# `first, second = x.chunk(2, dim=-1)`. With `turned = torch.cat((-second, first), dim=-1)` it is one line. `cos[:, None]`
# has shape `[B, 1, T, d]`.
#
# </details>


# %%
def apply_rotary(x, cos, sin):
    """[B, H, T, d], tables [B, T, d] → [B, H, T, d]: each pair (i, i + d/2) turned by its angle."""
    ### BEGIN SOLUTION
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]
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
# One query and one key, put at every pair of positions from 0 to 31: each map has the query's position downwards and the
# key's to the right, bright for a high score. All three are made of diagonal stripes: the same distance, the same score.


# %%
def scores_at(q, k, positions):
    """q and k, [d] each, at every pair of positions [T] → scores [T, T]."""
    cos, sin = gemma.rotary_table(positions[None], len(q), theta)
    places = [x.expand(1, 1, len(positions), -1) for x in (q, k)]
    q, k = (apply_rotary(x, cos, sin)[0, 0] for x in places)
    return q @ k.T


positions = torch.arange(32)
q, k = torch.randn(2, 64, generator=g)
fast, slow = (torch.arange(64) % 32 == pair for pair in (0, 8))  # the numbers of one pair
maps = [scores_at(q * chosen, k * chosen, positions) for chosen in (fast, slow, fast | ~fast)]
viz.image_row(maps, ["the fastest pair", "a slower pair", "all 32 pairs"])

# %%
whole = maps[-1]
assert (whole[1:, 1:] - whole[:-1, :-1]).abs().max() < 1e-5 * whole.abs().max()  # constant along every diagonal
shifted = scores_at(q, k, positions + 1000)
change = (shifted - whole).abs().max()
print(f"all positions 1,000 further on: scores up to {whole.abs().max():.1f} change by {change:.4f}")
assert change < 1e-3 * whole.abs().max()

# %% [markdown]
# What little changes is rounding: an angle of 1,000 radians has fewer digits left behind the point.
#
# That is also why the table is computed in float32. In bfloat16 not even the position itself would survive: of numbers
# above 256 only every second one exists. A picture of 224 pixels takes positions 1 to 256, so its text begins at 257.

# %%
assert torch.tensor(257.0).bfloat16() == torch.tensor(256.0).bfloat16()

# %% [markdown]
# ### Are neighbors wrong?
#
# Not in themselves. With its numbers in another order, a head rotated by neighbors gives the same scores. But released
# weights have one order, and with the other they are garbage, as "Break it" will show. So: a checkpoint and the code
# must agree, and Gemma's say halves.


# %%
def by_neighbors(x, cos, sin):
    """The pairs (0, 1), (2, 3), …: wrong for Gemma."""
    cos, sin = (table[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1)[:, None] for table in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


x = torch.randn(1, 1, 4, 8, generator=g)
cos, sin = gemma.rotary_table(torch.arange(4)[None], 8, theta)
order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # the partners i and i + 4 become neighbors
assert torch.allclose(by_neighbors(x[..., order], cos, sin), apply_rotary(x, cos, sin)[..., order], atol=1e-6)
assert not torch.allclose(by_neighbors(x, cos, sin), apply_rotary(x, cos, sin), atol=0.1)

# %% [markdown]
# ## Many queries, few keys
#
# Attention runs in H heads side by side. In *multi-head attention* (MHA) each query head has keys and values of its own.
# But keys and values of all tokens must be kept while an answer is written (chapter 07), and that memory is dear. So
# heads may share them: *multi-query attention* (MQA, arXiv:1911.02150) has one set for all, *grouped-query attention*
# (GQA, arXiv:2305.13245) one for each group of neighboring heads.

# %%
models = {"PaliGemma 3B": (8, 1, 256), "PaliGemma 2 3B": (8, 4, 256), "10B": (16, 8, 256), "28B": (32, 16, 128)}
for name, (H, K, d) in models.items():
    now, with_all = (2 * heads * d * 2 for heads in (K, H))  # keys and values, two bytes a number
    print(f"{name:14} {H // K} query heads share keys: {now:5,} bytes a token and layer, multi-head {with_all:6,}")

# %% [markdown]
# A toy with four query heads on two key heads: heads 0 and 1 read keys 0, heads 2 and 3 read keys 1. For each query: its
# scores with all keys, a softmax over them, and the mean of the values with these weights.

# %%
H, K, T, d, scale = 4, 2, 3, 6, 0.4
q, k, v = (torch.randn(1, heads, T, d, generator=g) for heads in (H, K, K))
mask = torch.ones(1, T, T, dtype=torch.bool).tril()
slow = torch.empty(1, H, T, d)
for head in range(H):
    shared = head // (H // K)
    for query in range(T):
        scores = torch.stack([q[0, head, query] @ k[0, shared, key] * scale for key in range(T)])
        scores[~mask[0, query]] = -torch.inf
        slow[0, head, query] = scores.softmax(0) @ v[0, shared]

# %% [markdown]
# The **scale** is 1/√d in Gemma 1: a sum of d products spreads √d times as wide as one of them, and a softmax over wide
# scores looks at one key only.
#
# ### A soft cap
#
# Gemma 2 (arXiv:2408.00118) bends scores that grow too large: *s* becomes cap · tanh(*s* / cap), close to *s* while
# small, and never beyond ±cap. The cap is 50 for the scores of attention, and 30 for the scores of words at the end.

# %%
s = torch.linspace(-120, 120, 49)
curves = {"no cap": (s, s)} | {f"cap {cap:.0f}": (s, gemma.soft_cap(s, cap)) for cap in (50.0, 30.0)}
viz.lines(curves, "cap · tanh(score / cap)", "score", "what the softmax gets")

# %% [markdown]
# The cap comes **before** the mask. The other way round, the −∞ of a hidden key becomes −cap, and is no longer hidden. At
# 50 nobody would notice, which is the danger of it; the lower the cap, the more shows through:

# %%
scores, visible = torch.tensor([2.0, 1.0, 3.0]), torch.tensor([True, True, False])
for cap in (50.0, 5.0, 1.0):
    right = gemma.soft_cap(scores, cap).masked_fill(~visible, -torch.inf).softmax(0)
    wrong = gemma.soft_cap(scores.masked_fill(~visible, -torch.inf), cap).softmax(0)
    print(f"cap {cap:2.0f}: attention to the hidden key {right[2]:.0f}, masked first {wrong[2]:.1e}")
assert right[2] == 0 < wrong[2]

# %% [markdown]
# ## Exercise 6.3 · Grouped-query attention ★★★ (20 minutes)
#
# `q` is `[B, H, T, d]`, `k` and `v` are `[B, K, S, d]` with S keys, `mask` is `[B, T, S]` of booleans (1 row may stand
# for all B) or None: all visible. `cap` is a number or None. In this order: q·k times `scale`, cap, mask, softmax over
# the keys, mean of the values.
#
# <details><summary>Hint</summary>
#
# `k.repeat_interleave(H // K, dim=1)` copies each key head for its group: 0 0 1 1. `q @ k.transpose(2, 3)` has shape
# `[B, H, T, S]`, and `mask[:, None]` fits it. `masked_fill(~mask, -torch.inf)` hides.
#
# </details>


# %%
def grouped_query_attention(q, k, v, mask, scale, cap=None):
    """[B, H, T, d] queries, [B, K, S, d] keys and values → [B, H, T, d]."""
    ### BEGIN SOLUTION
    shared_by = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared_by, dim=1), v.repeat_interleave(shared_by, dim=1)
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
# Sharing is nothing new, then: it is multi-head attention in which some heads happen to have the same keys. Written out
# with repeated heads it gives the same; the package lays the queries of a group one behind the other instead, and never
# copies a key.

# %%
repeated = [x.repeat_interleave(H // K, dim=1) for x in (k, v)]
multi_head = grouped_query_attention(q, *repeated, mask, scale)  # K = H: plain multi-head attention
package = gemma.grouped_query_attention(q, k, v, mask, scale)
assert torch.allclose(multi_head, fast, atol=1e-6) and torch.allclose(package, fast, atol=1e-6)
print("numbers kept for multi-head:", sum(x.numel() for x in repeated), " grouped:", k.numel() + v.numel())

# %% [markdown]
# ### See it
#
# The small model has four query heads and one set of keys. The queries still differ, so the heads look at different
# places. Here is what each looks at from the last token of the prompt, in the layer that looks at the picture most:

# %%
model, processor = minivlm.PaliGemma.from_pretrained(), minivlm.Processor.from_pretrained()
scene = emoji.make_scene(0, "validation")
prompt = processor(text=["caption en"], images=[scene.image])
weights = torch.stack(viz.decoder_attention(model, **prompt))[:, 0]  # [layers, H, T, T]
looks = weights[:, :, -1, : processor.num_image_tokens]
layer = int(looks.sum(-1).mean(1).argmax())
titles = [f"head {head}: {share:.0%}" for head, share in enumerate(looks[layer].sum(-1))]  # of its attention
viz.attention_on_image(scene.image, looks[layer], titles, title=f"Layer {layer}: four queries, one set of keys")

# %% [markdown]
# ## GeGLU: a gate
#
# The other block looks at each token by itself. The vision tower's is wide, GELU, narrow. Gemma's goes up **twice**: one
# projection, the *gate*, passes through GELU, and is multiplied with the other, *up* (GeGLU, arXiv:2002.05202). Then
# *down* makes the result narrow again.
#
# GELU lets positive numbers pass and shuts for negative ones. Exactly, it is x times the probability that a normal random
# number is below x; Gemma was trained with an approximation by tanh. The approximation, written out for one number, and
# how far it is from the exact one:


# %%
def gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


x = torch.linspace(-4, 4, 161)
tanh_gelu, exact = torch.nn.functional.gelu(x, approximate="tanh"), torch.nn.functional.gelu(x)
assert torch.allclose(tanh_gelu, torch.tensor([gelu(float(number)) for number in x]), atol=1e-6)
print(f"tanh and exact differ by at most {(tanh_gelu - exact).abs().max():.1e}")
for gate, up in ((-3.0, 2.0), (0.0, 2.0), (3.0, 2.0), (3.0, -2.0)):
    print(f"gate {gate:4}  up {up:4}  →  {gelu(gate) * up:+.3f}")

# %%
curves = {"GELU (Gemma)": (x, tanh_gelu), "SiLU (Llama)": (x, x * x.sigmoid()), "ReLU": (x, x.relu())}
viz.lines(curves, "What the gate lets through", "gate", "factor on up")

# %% [markdown]
# ## Exercise 6.4 · GeGLU ★☆☆ (6 minutes)
#
# `gate` and `up` have the same shape. Return their GeGLU.
#
# <details><summary>Hint</summary>
#
# `torch.nn.functional.gelu` has an argument `approximate`.
#
# </details>


# %%
def geglu(gate, up):
    """Two tensors of one shape → one: up, opened and shut by the gate."""
    ### BEGIN SOLUTION
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
    ### END SOLUTION


# %%
exercises.check(geglu)
### BEGIN HIDDEN TESTS
exercises.score(geglu, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# Where are the weights of a layer? Counted for PaliGemma 3B, whose feed-forward block is 16,384 wide inside:

# %%
geglu = exercises.piece("geglu")
big = minivlm.PaliGemmaConfig().text_config
D, H, K, d = big.hidden_size, big.num_attention_heads, big.num_key_value_heads, big.head_dim
attention = D * H * d + 2 * D * K * d + H * d * D  # q; k and v; o, which joins the heads
feed_forward = 3 * D * big.intermediate_size  # gate, up, down
print(f"attention {attention / 1e6:.1f} million weights, feed-forward {feed_forward / 1e6:.1f} million")
assert feed_forward > 10 * attention

# %% [markdown]
# ## Exercise 6.5 · The whole layer ★★★ (20 minutes)
#
# Put your four pieces together, as in the picture at the top. `weights` has the fields `attention_norm` `[D]`, `q`, `k`,
# `v`, `o`, `mlp_norm` `[D]`, `gate`, `up` and `down`. The matrices are `[out, in]`, as `nn.Linear` keeps them, so a
# projection is `x @ weights.q.T`. eps is 1e-6, the scale `head_dim ** -0.5`, and there is no cap.
#
# <details><summary>Hint</summary>
#
# `y @ weights.q.T` is `[B, T, H·d]`; `.view(B, T, -1, head_dim).transpose(1, 2)` makes `[B, H, T, d]` of it, and
# `.transpose(1, 2).reshape(B, T, -1)` leads back. Queries and keys are rotated, values are not.
#
# </details>


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
# With the weights of the trained model, layer after layer, it takes the embeddings where the package takes them:

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
        gates = [getattr(mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj")]
        norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        x = decoder_layer(x, LayerWeights(norms[0], *projections, norms[1], *gates), cos, sin, None, head_dim)

# %% [markdown]
# (All of the prompt sees all of it, so the mask is None. And a trap for those who read the hub's files: Gemma 1 calls the
# norm *before* the feed-forward block `post_attention_layernorm`.)
#
# ## From vector to word
#
# One more norm, and then the scores of all words, the *logits*: the dot product of the vector with **every row of the
# embedding table**. Input and output are *tied*, one matrix.

# %%
table = decoder.embed_tokens.weight  # [V, D], V words
with torch.no_grad():
    logits = rms_norm(x, decoder.norm.weight, 1e-6) @ table.T
    package = model(**prompt)
print(f"largest difference to the package: {(logits - package).abs().max() / package.abs().max():.1e} relative")
assert (logits - package).abs().max() < 1e-5 * package.abs().max()
viz.sampling_distribution(logits[0, -1], processor, top=5, title="The first word of the caption")

# %% [markdown]
# What does tying save? A second table of V × D numbers. The real PaliGemma 3B, built without memory for its weights
# (torch's device "meta" keeps shapes only), to be counted:

# %%
with torch.device("meta"):
    real = minivlm.PaliGemma(minivlm.PaliGemmaConfig())
total, tied = sum(p.numel() for p in real.parameters()), real.language_model.model.embed_tokens.weight.numel()
print(f"PaliGemma 3B: {total:,} weights, {tied:,} of them in the table ({tied / total:.0%})")
print(f"a second table would take {tied * 2 / 1e9:.2f} GB more in bfloat16")
assert tied == 257_216 * 2_048

# %% [markdown]
# Tying has a price. As the output head the rows should be short, or the logits get out of hand; as the input they should be
# long enough to count beside the picture's vectors. So Gemma multiplies what it looks up by **√D**, and what comes from
# the picture not (chapter 08 says more about these two scales).

# %%
with torch.no_grad():
    looked_up, scaled = decoder.embed_tokens(prompt["input_ids"][:, -4:]), decoder.embed(prompt["input_ids"][:, -4:])
print(f"√{model.config.text_config.hidden_size} = {scaled.norm() / looked_up.norm():.3f}")
assert torch.allclose(scaled, looked_up * model.config.text_config.hidden_size**0.5)

# %% [markdown]
# ### Logits in float32
#
# bfloat16 has eight bits for a number, whatever its size. Between 16 and 32 that leaves steps of 1/8: words closer than
# that may get the **same** score, and the winner is whoever stands first in the table. The logits of the prompt's last
# token, rounded:

# %%
row = logits[0, -1]
rounded = row.bfloat16()
print(f"{len(row)} words: {len(row.unique())} different scores in float32, {len(rounded.unique())} in bfloat16")
assert len(rounded.unique()) < len(row.unique())
close = torch.tensor([20.00, 20.05, 20.06])
print("20.00, 20.05, 20.06 in bfloat16:", close.bfloat16().tolist(), " best:", int(close.bfloat16().argmax()))
assert close.argmax() == 2 and close.bfloat16().argmax() == 0

# %% [markdown]
# And the loss? The rounded logits have changed it already, and a loss that is kept in bfloat16 can, between 1 and 2,
# only be a multiple of 1/128. With PaliGemma's vocabulary, the loss of the third word above:

# %%
many = torch.full((257_216,), 3.0)
many[:3] = close
exact = -many.double().log_softmax(0)[2]
cast, low = -many.bfloat16().double().log_softmax(0)[2], -many.bfloat16().log_softmax(0)[2]
print(f"loss {exact:.4f}; of logits rounded to bfloat16 {cast:.4f}; all in bfloat16 {float(low):.4f}")
assert abs(cast - exact) > 0.01 and float(low) * 128 == round(float(low) * 128)

# %% [markdown]
# So the package casts logits to float32 before any softmax (`generation.py`, `PaliGemma.loss`), as transformers does for
# its loss. What a model in bfloat16 has rounded by then is lost; what follows is not.
#
# ## Break it
#
# Four bugs, each a line long, in the trained model; and one difference that is none. None of them raises an error.

# %%
from unittest.mock import patch

from tqdm.auto import tqdm

bugs = {
    "as it should be": (gemma, "geglu", gemma.geglu),
    "w instead of 1 + w": (gemma, "rms_norm", lambda x, weight, eps, norm=gemma.rms_norm: norm(x, weight - 1, eps)),
    "neighbors rotated": (gemma, "apply_rotary", by_neighbors),
    "no positions at all": (gemma, "apply_rotary", lambda x, cos, sin: x),
    "embeddings without √D": (gemma.GemmaModel, "embed", lambda self, ids: self.embed_tokens(ids)),
    "exact GELU for tanh": (gemma, "geglu", lambda gate, up: torch.nn.functional.gelu(gate) * up),
}

# %%
some = [emoji.make_scene(seed, "validation") for seed in range(12)]
right = {}
for bug, (place, name, function) in tqdm(bugs.items()):
    with patch.object(place, name, function):
        answers = minivlm.generate(model, processor, [s.image for s in some], "caption en")
    right[bug] = sum(emoji.same_caption(a, s.examples[0].answers[0]) for a, s in zip(answers, some, strict=True))
    print(f"{bug:22} {right[bug]:2} of {len(some)} captions right; the first: {answers[0]!r}")

# %%
assert all(right[bug] < right["as it should be"] for bug in list(bugs)[1:5])

# %% [markdown]
# Repairing is taking the line back. Finding it is the work, and what finds it is a comparison with numbers known to be
# right, layer by layer, as below.
#
# ## Gemma 2: four norms, two caps
#
# PaliGemma 2 has Gemma 2 for its decoder. It normalizes what each block **returns** as well, before it is added: x +
# norm(attention(norm(x))). A tiny one, with random weights, beside a tiny Gemma 1:

# %%
from minivlm.config import GemmaConfig, SiglipVisionConfig

tower = SiglipVisionConfig(24, 40, 2, 2, image_size=12, patch_size=4)
sizes = {"vocab_size": 120, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "head_dim": 12}
caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 6, "query_pre_attn_scalar": 20}
one = GemmaConfig(**sizes, num_attention_heads=4)
two = GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, model_type="gemma2", **caps)


# %%
def tiny(text_config):
    """A PaliGemma with random weights, those of the norms too."""
    config = minivlm.PaliGemmaConfig(tower, text_config, image_token_index=119)
    tiny_model = minivlm.PaliGemma(config).init_weights(seed=6).eval()
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if parameter.ndim == 1:
                parameter += torch.randn(parameter.shape, generator=g) / 3
            if "q_proj.weight" in name:
                parameter *= 2  # scores large enough for the cap to bite
    return tiny_model


tiny_models = {"Gemma 1": tiny(one), "Gemma 2": tiny(two)}
for name, tiny_model in tiny_models.items():
    norms = [n for n, _ in tiny_model.language_model.model.layers[0].named_children() if "norm" in n]
    print(name, len(norms), "norms a layer:", ", ".join(norms))

# %% [markdown]
# Here `post_attention_layernorm` really stands behind attention. What the caps do to the scores, before the softmax and
# at the end:

# %%
ids, types = torch.tensor([[119] * 9 + [2, 7, 8, 9, 10, 11, 12]]), torch.tensor([[0] * 12 + [1] * 4])
batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types}
batch["pixel_values"] = torch.rand(1, 3, 12, 12, generator=g) * 2 - 1
seen = {}


def watching(x, cap, soft_cap=gemma.soft_cap):
    seen["logits" if x.shape[-1] == 120 else "attention"] = (x.abs().max(), soft_cap(x, cap).abs().max(), cap)
    return soft_cap(x, cap)


with torch.no_grad(), patch.object(gemma, "soft_cap", watching):
    tiny_models["Gemma 2"](**batch)
for where, (before, after, cap) in seen.items():
    print(f"{where:9} largest score {before:.2f}, capped at {cap}: {after:.2f}")
    assert after < cap and after < before

# %% [markdown]
# And a number that is easily taken for another: the scale of the queries. It is d^−½ nearly everywhere, but PaliGemma 2
# 28B has heads of 128 and a scale of **144**^−½, since 144 is its width divided by its heads: 4608 / 32.

# %%
assert 4608 // 32 == 144 != 128
print("scale of the tiny Gemma 2: 20 ** -0.5 =", round(20**-0.5, 3), " and not 12 ** -0.5 =", round(12**-0.5, 3))

# %% [markdown]
# ## It matches
#
# Both tiny models, written to a folder in the hub's format, opened by transformers, and compared after every layer:

# %%
import tempfile

import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def in_transformers(ours):
    """The same weights in transformers; soft caps need its "eager" attention."""
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        load = transformers.PaliGemmaForConditionalGeneration.from_pretrained
        return load(folder, attn_implementation="eager", dtype="float32").eval()


# %%
for name, ours in tiny_models.items():
    states, hooks = [], []
    for layer in [*ours.language_model.model.layers[:-1], ours.language_model.model.norm]:
        hooks.append(layer.register_forward_hook(lambda *call, states=states: states.append(call[-1])))
    with torch.no_grad():
        logits, out = ours(**batch), in_transformers(ours)(**batch, output_hidden_states=True)
    pairs = zip([*states, logits], [*out.hidden_states[1:], out.logits], strict=True)
    off = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    print(f"{name}: after each layer and for the logits, relative:", " ".join(f"{error:.0e}" for error in off))
    assert len(off) == 5 and max(off) < 1e-5

# %% [markdown]
# ## Recap
#
# * A layer adds twice to x: what attention gathers, and what the gated feed-forward block makes of it.
# * RMSNorm divides by the root mean square, multiplies by 1 + w, in float32.
# * RoPE turns pairs (i, i + d/2) of queries and keys; a score depends on the distance of two tokens alone.
# * Grouped queries share keys: the same attention, less to keep. PaliGemma 3B shares one set among all eight heads.
# * Input and output are one table: looked up it is multiplied by √D; as a head it gives logits, best kept in float32.
# * Gemma 2 adds two norms a layer and two soft caps, each applied before the mask or the softmax.
#
# **Three questions**
#
# <details><summary>1. All weights w of all norms are 0. What does the norm do, and what would it do in Llama?</summary>
#
# In Gemma it divides by the root mean square and leaves the rest. Llama multiplies by w itself: everything would be 0.
#
# </details>
#
# <details><summary>2. Why are values not rotated?</summary>
#
# Rotation is there to make the score depend on the distance. Values are what is fetched once it is decided how much to
# look; turned by their positions they would say different things at different places, and nothing would turn them back.
#
# </details>
#
# <details><summary>3. A friend loads PaliGemma and gets fluent nonsense, with no error. What do you look at first?</summary>
#
# The details of this chapter: 1 + w, halves or neighbors, √D on the text and not on the picture, the scale; each is one
# line, and each keeps all shapes. Compare with transformers after every layer: the first layer that differs has it.
#
# </details>
#
# **Next:** [07 · The KV cache](07_kv_cache.ipynb): why the second token is cheap.
