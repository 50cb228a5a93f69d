# %% [markdown]
# # L10 · The empty file
#
# **Can I write PaliGemma from nothing but its facts?**
#
# | | |
# |---|---|
# | know first | chapters 03 to 08 |
# | you will build | all of it: about 250 lines, in any framework, with no line of the package |
# | runs on | CPU, nothing to download |

# %%
import re
import struct
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import minivlm
from minivlm import emoji, gemma, hub
from minivlm.course import capstone, exercises, viz

# %% [markdown]
# ## Predict first
#
# In the chapters, you wrote functions into our skeleton: the classes, the loading and the loops were there. Now you
# start with an empty file. A command checks it in twelve steps and says what is wrong first.
#
# 1. Which takes more lines: the vision tower, the decoder, or everything around them (files, names, cache, generation)?
# 2. You load the weights, and the captions are nonsense. Every shape is right. Name three mistakes that do this.
# 3. You forget the 1 in RMSNorm's (1 + w). Does PaliGemma fail with an error, write noise, or nearly the same text?
#
# <details><summary>Answers, to open at the end of the lab</summary>
#
# 1. Everything around them. In the file that our tests use, tower and decoder take 90 of 245 lines.
# 2. RoPE pairs neighbors instead of halves; key heads are shared in turn instead of in groups; text embeddings are not
#    multiplied by √D. There are many more: a model has hundreds of places where another choice has the same shape.
# 3. It writes noise. A stored weight near 0 means “times 1”, so without the 1 nearly everything is multiplied by 0.
#
# </details>

# %% [markdown]
# ## A toy: a file of two tensors
#
# Your model begins with a file of weights, so this is the first thing to read without a library. A **safetensors** file
# has three parts (github.com/huggingface/safetensors):
#
# 1. 8 bytes: the length of the header, N, an unsigned integer, little-endian (lowest byte first)
# 2. N bytes: the header, a JSON object. For each tensor: `dtype`, `shape`, and `data_offsets`, the first byte and the
#    one after the last, **counted from the start of part 3**. `__metadata__` is no tensor.
# 3. the data: the numbers of all tensors, little-endian, row by row
#
# Here is a whole file, written by hand:

# %%
header = b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, '
header += b'"b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]}}'
toy_file = struct.pack("<Q", len(header)) + header
toy_file += struct.pack("<4f", 1.0, 2.0, 3.0, 4.0) + struct.pack("<3H", 0x3F80, 0xC000, 0x4049)
print(len(header), "bytes of header,", len(toy_file), "bytes in all; the first eight are", list(toy_file[:8]))
assert int.from_bytes(toy_file[:8], "little") == len(header)

# %% [markdown]
# Tensor `a` is easy to follow: its data starts at 8 + N + 0. First a slow loop, number by number. Then numpy reads all
# of them at once:

# %%
start = 8 + len(header)
slow = []
for i in range(4):
    (number,) = struct.unpack("<f", toy_file[start + 4 * i : start + 4 * i + 4])
    slow.append(number)
fast = np.frombuffer(toy_file[start : start + 16], "<f4").reshape(2, 2)
print(slow, fast.tolist())
assert slow == fast.ravel().tolist() == [1.0, 2.0, 3.0, 4.0]

# %% [markdown]
# Tensor `b` is in **bfloat16**, the dtype of most published weights, which numpy does not have. It is the upper half of
# a float32: the sign, all 8 bits of the exponent, and only 7 bits of the fraction. So 0x3F80 becomes 0x3F800000:

# %%
bits = np.frombuffer(toy_file[start + 16 : start + 22], "<u2")
b = (bits.astype(np.uint32) << 16).view(np.float32)
print([f"{x:04x}" for x in bits], "→", b.tolist())
assert b.tolist() == torch.tensor(bits.astype(np.int16)).view(torch.bfloat16).float().tolist() == [1.0, -2.0, 3.140625]

# %% [markdown]
# ## See it
#
# Each row is one number with its bits, dark 0 and bright 1: π as float32, as bfloat16, and as float16, which divides its
# 16 bits differently. The first bit is the sign. The exponent follows, with 8, 8 and 5 bits. If you read bfloat16 as
# float16, every number is wrong, and nothing complains.

# %%
pi = np.float32(np.pi)
as_float32 = int(pi.view(np.uint32))
as_float16 = int(np.float16(pi).view(np.uint16))
rows = [f"{as_float32:032b}", f"{as_float32 >> 16:016b}" + " " * 16, f"{as_float16:016b}" + " " * 16]
pixels = np.array([[{"0": 0.0, "1": 1.0, " ": np.nan}[bit] for bit in row] for row in rows])
misread = np.array([as_float32 >> 16], np.uint16).view(np.float16)[0]
print(f"π in bfloat16, read as float16: {misread:.4f}")
assert rows[0][:16] == rows[1][:16] and abs(misread - np.pi) > 0.5
titles = ["π in float32", "in bfloat16: the upper half", "in float16"]
viz.image_row([np.nan_to_num(row[None, : 32 if i == 0 else 16]) for i, row in enumerate(pixels)], titles, columns=1)

# %% [markdown]
# ## Exercise L10.1 · Read a tensor from a file
#
# `data` are the bytes of a whole file as a uint8 array. `name` is a tensor in it. Return that tensor as a float32 array in
# its shape. Three dtypes occur: `F32`, `F16` and `BF16`.


# %%
def read_tensor(data, name):
    """uint8 [N], the name of a tensor → that tensor in float32."""
    import json

    import numpy as np

    ### BEGIN SOLUTION
    raw = data.tobytes()
    size = int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8 : 8 + size])[name]
    first, end = (8 + size + offset for offset in entry["data_offsets"])
    dtype = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
    values = np.frombuffer(raw[first:end], dtype)
    if entry["dtype"] == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32).reshape(entry["shape"])
    ### END SOLUTION


# %%
exercises.check(read_tensor)
### BEGIN HIDDEN TESTS
exercises.score(read_tensor, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## Exercise L10.2 · One name for every weight
#
# The same weight has three names, depending on who wrote the file:
#
# | layout | text | vision |
# |---|---|---|
# | [files on the hub](https://huggingface.co/google/paligemma-3b-pt-224/tree/main) | `language_model.model.layers.0…` | `vision_tower.vision_model.encoder.layers.0…` |
# | saved by transformers 5 | `language_model.model.layers.0…` | `vision_tower.encoder.layers.0…` |
# | in the memory of transformers 5 | `model.language_model.layers.0…` | `model.vision_tower.encoder.layers.0…` |
#
# Write a function that maps all of them to one short name of your own:
#
# | weights | your name |
# |---|---|
# | decoder | `text.layers.0.mlp.up_proj.weight`, `text.embed_tokens.weight`, `text.norm.weight` |
# | tower | `vision.layers.0.mlp.fc1.bias`, `vision.embeddings.patch_embedding.weight`, `vision.post_layernorm.bias` |
# | projector, `multi_modal_projector.linear.…` in all layouts, with or without `model.` | `projector.weight`, `projector.bias` |
# | output head, `lm_head.weight` or `language_model.lm_head.weight` | None: it equals the embedding table |


# %%
def own_name(name):
    """A name in any of the three layouts → your own name, or None for the output head."""
    ### BEGIN SOLUTION
    if name in ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"):
        return None
    name = name.removeprefix("model.")
    if name.startswith("multi_modal_projector.linear."):
        return name.replace("multi_modal_projector.linear.", "projector.")
    if name.startswith("vision_tower."):
        inner = name.removeprefix("vision_tower.").removeprefix("vision_model.")
        return "vision." + inner.removeprefix("encoder.")
    return "text." + name.removeprefix("language_model.").removeprefix("model.")
    ### END SOLUTION


# %%
exercises.check(own_name)
### BEGIN HIDDEN TESTS
exercises.score(own_name, points=2, seed=1)
### END HIDDEN TESTS

# %% [markdown]
# ## It matches
#
# With your two functions, or ours where one is missing, the embedded checkpoint is read to the last bit as the package
# reads it:

# %%
read_tensor, own_name = exercises.piece("read_tensor"), exercises.piece("own_name")
model = minivlm.PaliGemma.from_pretrained(dtype=torch.float32)
data = np.frombuffer((hub.EMBEDDED / "model.safetensors").read_bytes(), np.uint8)
weights = model.state_dict()
difference = max(float(np.abs(read_tensor(data, name) - weights[name].numpy()).max()) for name in list(weights)[::9])
short_names = {own_name(name) for name in weights}
print(f"{len(weights)} weights, {len(short_names)} names, maximum difference {difference}")
assert model.config.text_config.num_key_value_heads == 1  # remember this for the third question at the end
assert difference == 0 and len(short_names) == len(weights)

# %% [markdown]
# ## The facts
#
# Everything else that the file needs. D is the width of the decoder, d is `head_dim`, H and K are the numbers of query
# and key heads, E is the width of the tower.
#
# **Numbers.** `config.json` has them, but files on the hub leave some out. Then these apply (transformers,
# `configuration_*.py`):
#
# | in | name | default |
# |---|---|---|
# | vision_config | image_size, patch_size, layer_norm_eps | 224, 14, 1e-6 |
# | text_config | head_dim, rms_norm_eps, rope_theta | 256, 1e-6, 10000 |
# | text_config of gemma2 | query_pre_attn_scalar, attn_logit_softcapping, final_logit_softcapping, sliding_window | 256, 50, 30, 4096 |
# | the top level | eos_token_id | 1; a list of several is possible |
#
# transformers 5 writes `rope_parameters: {"rope_theta": …}` in place of `rope_theta`, and `image_token_id` can stand for
# `image_token_index`.
#
# **The tower** (SigLIP, [arXiv:2303.15343](https://arxiv.org/abs/2303.15343); big_vision, `models/vit.py`)
#
# | piece | fact |
# |---|---|
# | patches | row by row; each flattened as channel, row, column; × weight [E, 3·p·p] + bias + position embedding |
# | layer | x + attention(norm1(x)), then x + mlp(norm2(x)); every linear layer has a bias |
# | LayerNorm | (x − mean) / √(variance + eps) · weight + bias; the variance divides by E |
# | attention | no mask; scale (E / heads) ** −½ |
# | mlp | fc2(gelu(fc1(x))), gelu(x) = 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))) |
# | end | `post_layernorm` once, after the last layer; no pooling, no class token |
#
# **Projector** (arXiv:2407.07726): one linear layer with a bias, E → D. Nothing is scaled.
#
# **The decoder** (Gemma, [arXiv:2403.08295](https://arxiv.org/abs/2403.08295); RoPE, [arXiv:2104.09864](https://arxiv.org/abs/2104.09864))
#
# | piece | fact |
# |---|---|
# | input | row of the embedding table · √D for text; image vectors replace the image tokens, unscaled |
# | RMSNorm | x / √(mean(x²) + eps) · (1 + weight) |
# | layer | x + attention(`input_layernorm`(x)), then x + mlp(`post_attention_layernorm`(x)); no biases |
# | RoPE | pair (i, i + d/2) rotates by position · theta ** (−2i/d); only queries and keys; padding has no position |
# | attention | scale d ** −½; query head h reads key head ⌊h · K / H⌋ |
# | mask | block = cumulative sum of token types; a query attends to a key if block[key] ≤ block[query] and it is no padding |
# | mlp | down(gelu(gate(x)) · up(x)), the same gelu |
# | output | RMSNorm `norm`, then × the embedding table, transposed |
#
# **PaliGemma 2** (arXiv:2412.03555, Gemma 2: arXiv:2408.00118) has the same tower and projector. In the decoder:
#
# | piece | fact |
# |---|---|
# | norms | x + `post_attention_layernorm`(attention(`input_layernorm`(x))), then x + `post_feedforward_layernorm`(mlp(`pre_feedforward_layernorm`(x))) |
# | scale | `query_pre_attn_scalar` ** −½ |
# | soft caps | scores → cap · tanh(scores / cap) before the mask; the same for logits with the other cap |
# | window | layers 0, 2, 4 …: a key is at most `sliding_window` − 1 tokens before the query; image and prompt ignore it among themselves |
#
# **The prompt** is prepared for you: P image tokens, `<bos>`, the prompt, a newline.
#
# ## The adapter
#
# The command has to know what to call. Ten functions connect your code, whatever it looks like. They can be written in
# any order, and a step whose functions are missing is left out:

# %%
template = Path(capstone.__file__).with_name("template.py").read_text(encoding="utf-8")
functions = re.findall(r'^def (\w+\(.*?\)):\n    """(.*)', template, re.MULTILINE)
for signature, line in functions:
    print(signature, line.removesuffix('"""'), sep="\n    ")
assert len(functions) == 10

# %% [markdown]
# `python -m minivlm capstone my_paligemma.py --start` writes a file with these functions, empty, and all that they have
# to return. A good order:
#
# | functions | steps that can pass then |
# |---|---|
# | `read_config` | 1 config |
# | `load`, `encode_image`, `project` | 2 tower, 3 projector |
# | `prefix_lm_mask` | 4 masks |
# | `decode` | 5 decoder, 6 loading |
# | `logits` | 7 logits |
# | `prefill`, `step` | 8 cache |
# | `generate` | 9 greedy, 10 batch, 12 speed |
# | once more `decode`, for gemma2 | 11 PaliGemma 2 |
#
# ## A first run
#
# A file with a single function, in numpy. Your file runs in a process of its own, with a time limit for each call:

# %%
first_lines = """
import numpy as np

def prefix_lm_mask(attention_mask, token_type_ids):
    block = np.cumsum(token_type_ids, axis=1)
    return (block[:, None, :] <= block[:, :, None]) & (attention_mask == 1)[:, None, :]
"""
folder = tempfile.TemporaryDirectory()
path = Path(folder.name, "my_paligemma.py")
path.write_text(first_lines, encoding="utf-8")
report = capstone.check(path)
print(report)
assert [step.name for step in report.steps if step.mark == capstone.PASSED] == ["masks"] and not report.first_wrong

# %% [markdown]
# ## Break it
#
# Which tokens may the prompt see? Suppose that you build a causal mask, as for any other language model. Predict what
# the report says, then run the cell:

# %%
path.write_text(first_lines.replace("np.cumsum(token_type_ids", "np.cumsum(np.ones_like(token_type_ids)"))
report = capstone.check(path)
print(report.first_wrong)
assert report.first_wrong.name == "masks" and "causal" in report.first_wrong.message

# %% [markdown]
# A causal mask is easy to see in a mask. Most mistakes are not: their shapes are right, and the model answers. Here is the
# third question from above, in the package's own model, for one forward pass with the 1 and one without:

# %%
scene = emoji.make_scene(0, "validation")
processor = minivlm.Processor.from_pretrained()
caption = minivlm.generate(model, processor, scene.image, "caption en")
without_one = lambda x, weight, eps: weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)  # noqa: E731
with mock.patch.object(gemma, "rms_norm", without_one):
    broken = minivlm.generate(model, processor, scene.image, "caption en")
print(f"with 1 + w: {caption}\nwith w: {broken!r}")
assert broken != caption and not set(scene.captions["caption"]) & {broken}

# %% [markdown]
# The report names the mistake because it knows what the package answers with each of the mistakes of the exercises in
# it. If none fits, it says how your answer is related to the right one. For tower and decoder it can do more: put
# intermediate values into a dictionary `seen`, such as `seen["layers.2.self_attn.q"] = q`, and the report names the first
# of them that is wrong.
#
# A crash or an endless loop costs one sentence, not the notebook:

# %%
path.write_text("def prefix_lm_mask(attention_mask, token_type_ids):\n    while True:\n        pass\n")
report = capstone.check(path, limit=3)
print(report.first_wrong)
assert "took longer than 3 seconds" in report.first_wrong.message

# %% [markdown]
# ## Your turn
#
# Write `my_paligemma.py` beside this notebook, and run this cell as often as you like, or the command in a terminal.
# When all twelve steps pass, you get a page with your model's own answers and its speed beside ours and that of
# transformers.

# %%
mine = Path("my_paligemma.py")
if mine.exists():
    print(capstone.check(mine, mine.with_suffix(".html")))
else:
    print("my_paligemma.py is not here yet: capstone.start('my_paligemma.py') writes the empty file.")

# %% [markdown]
# At the end, it looks like this (`python -m minivlm capstone tests/capstone/functional.py`, which is 245 lines of numpy;
# two cores of a shared machine, one of them used):
#
# ```
# ✓  1 config       5 files
# ✓  2 tower        2 batches on a small PaliGemma with random weights
# ✓  3 projector    on a small PaliGemma with random weights
# ✓  4 masks        4 kinds of batches
# ✓  5 decoder      2 batches on a small PaliGemma with random weights
# ✓  6 loading      4 layouts are read, 3 damaged files are refused
# ✓  7 logits       within 1.2e-06 of transformers, relative to the largest
# ✓  8 cache        12 steps on a small PaliGemma with random weights
# ✓  9 greedy       3 prompts, token for token, and captions of 2 scenes
# ✓ 10 batch        every row as if it were alone
# ✓ 11 PaliGemma 2  decoder, logits (within 1.7e-06 of transformers), cache and a padded batch on a small PaliGemma 2 with random weights
# ✓ 12 speed        tokens per second on one thread: functional.py 245, minivlm 278, transformers 218
# 12 of 12 steps passed.
# ```
#
# ## Recap
#
# * A safetensors file is a length, a header in JSON, and data. Offsets count from the start of the data.
# * bfloat16 is the upper half of a float32.
# * One weight has three names. A loader that ignores names which do not fit turns another model into nonsense.
# * Most mistakes have the right shape. Compare values with a reference, part by part, in the order of computation.
# * Test at sizes at which no two numbers are equal: most checkpoints hide some mistakes.
#
# **Three questions**
#
# <details><summary>1. Why is a tensor not at <code>data_offsets</code> in the file?</summary>
#
# The offsets count from the start of the data, which follows the eight bytes and the header. So the header can be written
# before its own length is known.
#
# </details>
#
# <details><summary>2. Positions that start at 0 instead of 1 pass every step. Why?</summary>
#
# RoPE rotates queries and keys, and their product only depends on the difference of two positions. A shift of all
# positions changes nothing but rounding. It matters as soon as only some are shifted, such as those of the cache.
#
# </details>
#
# <details><summary>3. The embedded checkpoint has one key head. Which mistake does that hide?</summary>
#
# Sharing key heads in turn (0 1 0 1) instead of in groups (0 0 1 1): with a single head, both are 0 0 0 0. That is why the
# steps use small checkpoints with random weights and two key heads.
#
# </details>
#
# ## Open problem: half of it
#
# Write a second file, `my_short_paligemma.py`, that passes all twelve steps with at most 150 lines that are neither empty
# nor comments, none of them longer than 120 characters.
#
# <details><summary>A pointer</summary>
#
# Tower and decoder are the same loop with other norms, activations and masks. `prefill` and `step` are the same function
# with and without a cache, and `logits` is the first of them.
#
# </details>

# %%
shorter = Path("my_short_paligemma.py")
if shorter.exists():
    lines = [line for line in shorter.read_text(encoding="utf-8").splitlines() if not re.match(r"\s*(#|$)", line)]
    assert len(lines) <= 150 and max(map(len, lines)) <= 120, f"{len(lines)} lines"
    report = capstone.check(shorter)
    print(report)
    assert report.passed
else:
    print("my_short_paligemma.py is not written yet.")

# %% [markdown]
# **Back to** [08 · Full PaliGemma inference](../08_inference.ipynb).
