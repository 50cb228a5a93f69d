"""PaliGemma in functional numpy: a dictionary of weights, functions of arrays, no class and no framework.

Written for the tests of the capstone, in another style than the package.
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

seen = {}

# --- files ---------------------------------------------------------------------------------------------------------

VISION = {"image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6}
TEXT = {"head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
TEXT2 = {
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}
DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}


def read_config(path):
    raw = json.loads(Path(path, "config.json").read_text())
    text = {k: v for k, v in raw["text_config"].items() if v is not None}
    text |= text.get("rope_parameters") or {}
    text = TEXT | (TEXT2 if text["model_type"] == "gemma2" else {}) | text
    return {
        "image_token_index": raw.get("image_token_index", raw.get("image_token_id")),
        "eos_token_id": raw.get("eos_token_id", 1),
        "vision_config": VISION | raw["vision_config"],
        "text_config": text,
    }


def read_safetensors(file):
    data = Path(file).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        found[name] = array.reshape(entry["shape"]).astype(np.float32)
    return found


def rename(name):
    name = name.removeprefix("model.")
    name = name.replace("vision_tower.vision_model.", "vision_tower.").replace("vision_tower.", "v.")
    name = name.replace("language_model.model.", "language_model.").replace("language_model.", "t.")
    return name.replace("v.encoder.", "v.").replace("multi_modal_projector.linear.", "p.")


def expected_shapes(c):
    v, t = c["vision_config"], c["text_config"]
    e, d, f = v["hidden_size"], t["hidden_size"], t["intermediate_size"]
    h, k, p = t["num_attention_heads"] * t["head_dim"], t["num_key_value_heads"] * t["head_dim"], v["patch_size"]
    shapes = {
        "v.embeddings.patch_embedding.weight": (e, 3, p, p),
        "v.embeddings.patch_embedding.bias": (e,),
        "v.embeddings.position_embedding.weight": ((v["image_size"] // p) ** 2, e),
        "v.post_layernorm.weight": (e,),
        "v.post_layernorm.bias": (e,),
        "p.weight": (d, e),
        "p.bias": (d,),
        "t.embed_tokens.weight": (t["vocab_size"], d),
        "t.norm.weight": (d,),
    }
    for i in range(v["num_hidden_layers"]):
        at = f"v.layers.{i}."
        sizes = {f"self_attn.{x}": (e, e) for x in ("q_proj", "k_proj", "v_proj", "out_proj")}
        sizes |= {"mlp.fc1": (v["intermediate_size"], e), "mlp.fc2": (e, v["intermediate_size"])}
        for name, size in sizes.items():
            shapes[f"{at}{name}.weight"], shapes[f"{at}{name}.bias"] = size, size[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            shapes[f"{at}{norm}.weight"] = shapes[f"{at}{norm}.bias"] = (e,)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if t["model_type"] == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(t["num_hidden_layers"]):
        at = f"t.layers.{i}."
        shapes |= {f"{at}self_attn.q_proj.weight": (h, d), f"{at}self_attn.o_proj.weight": (d, h)}
        shapes |= {f"{at}self_attn.{x}_proj.weight": (k, d) for x in "kv"}
        shapes |= {f"{at}mlp.gate_proj.weight": (f, d), f"{at}mlp.up_proj.weight": (f, d)}
        shapes |= {f"{at}mlp.down_proj.weight": (d, f)} | {f"{at}{norm}.weight": (d,) for norm in norms}
    return shapes


def load(path):
    config, weights = read_config(path), {}
    for file in sorted(Path(path).glob("model*.safetensors")):
        weights |= {rename(name): array for name, array in read_safetensors(file).items()}
    for head in ("lm_head.weight", "t.lm_head.weight"):
        weights.pop(head, None)
    shapes = expected_shapes(config)
    if weights.keys() != shapes.keys():
        raise ValueError(f"names differ: {sorted(weights.keys() ^ shapes.keys())}")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise ValueError(f"{name} has shape {weights[name].shape}, not {shape}")
    return config, weights


# --- small pieces --------------------------------------------------------------------------------------------------


def linear(x, w, name):
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x, w, name, eps):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + eps)
    return scaled * w[name + ".weight"] + w[name + ".bias"]


def rms_norm(x, w, name, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (1 + w[name + ".weight"])


def heads(x, count):
    return x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2)


def joined(x):
    return x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)


# --- vision --------------------------------------------------------------------------------------------------------


def encode_image(model, pixel_values):
    config, w = model
    c = config["vision_config"]
    n, p, eps = c["num_attention_heads"], c["patch_size"], c["layer_norm_eps"]
    side = c["image_size"] // p
    grid = pixel_values.reshape(-1, 3, side, p, side, p).transpose(0, 2, 4, 1, 3, 5)
    patches = grid.reshape(len(pixel_values), side * side, -1)
    kernel = w["v.embeddings.patch_embedding.weight"]
    x = patches @ kernel.reshape(len(kernel), -1).T + w["v.embeddings.patch_embedding.bias"]
    x = x + w["v.embeddings.position_embedding.weight"]
    seen["embeddings"] = x
    for i in range(c["num_hidden_layers"]):
        at = f"v.layers.{i}."
        y = layer_norm(x, w, at + "layer_norm1", eps)
        q, k, v = (heads(linear(y, w, f"{at}self_attn.{name}_proj"), n) for name in "qkv")
        out = softmax(q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5) @ v
        x = x + linear(joined(out), w, at + "self_attn.out_proj")
        y = layer_norm(x, w, at + "layer_norm2", eps)
        x = x + linear(gelu(linear(y, w, at + "mlp.fc1")), w, at + "mlp.fc2")
        seen[f"layers.{i}"] = x
    return layer_norm(x, w, "v.post_layernorm", eps)


def project(model, features):
    return linear(features, model[1], "p")


# --- masks and positions -------------------------------------------------------------------------------------------


def prefix_lm_mask(attention_mask, token_type_ids):
    block = np.cumsum(token_type_ids, 1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & (attention_mask == 1)[:, None, :] | np.eye(attention_mask.shape[1], dtype=bool)


def window_mask(config, attention_mask, token_type_ids):
    size = config["text_config"].get("sliding_window")
    mask = prefix_lm_mask(attention_mask, token_type_ids)
    if config["text_config"]["model_type"] != "gemma2" or size is None:
        return mask
    at = np.arange(attention_mask.shape[1])
    near = at[:, None] - at[None, :] < size
    prompt = token_type_ids == 0
    return mask & (near | prompt[:, :, None] & prompt[:, None, :])


def positions(attention_mask):
    return np.cumsum(attention_mask, 1)


# --- decoder -------------------------------------------------------------------------------------------------------


def rotate(x, at, theta):
    half = x.shape[-1] // 2
    angle = at[:, None, :, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def attend(q, k, v, mask, scale, cap):
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = capped(q @ k.swapaxes(2, 3) * scale, cap)
    return softmax(np.where(mask[:, None], scores, -1e30)) @ v


def run_decoder(model, x, at, full, sliding, past=None):
    """x [B, T, D], positions [B, T], masks [B, T, S], earlier keys and values → hidden states, keys and values."""
    config, w = model
    c = config["text_config"]
    eps, two, kept = c["rms_norm_eps"], c["model_type"] == "gemma2", []
    scale = (c["query_pre_attn_scalar"] if two else c["head_dim"]) ** -0.5
    cap = c["attn_logit_softcapping"] if two else None
    for i in range(c["num_hidden_layers"]):
        name = f"t.layers.{i}."
        y = rms_norm(x, w, name + "input_layernorm", eps)
        q = heads(linear(y, w, name + "self_attn.q_proj"), c["num_attention_heads"])
        k = heads(linear(y, w, name + "self_attn.k_proj"), c["num_key_value_heads"])
        v = heads(linear(y, w, name + "self_attn.v_proj"), c["num_key_value_heads"])
        q, k = rotate(q, at, c["rope_theta"]), rotate(k, at, c["rope_theta"])
        if past:
            k, v = np.concatenate([past[i][0], k], 2), np.concatenate([past[i][1], v], 2)
        kept.append((k, v))
        seen[f"layers.{i}.self_attn.q"], seen[f"layers.{i}.self_attn.k"] = q, k
        mask = sliding if two and i % 2 == 0 else full
        out = linear(joined(attend(q, k, v, mask, scale, cap)), w, name + "self_attn.o_proj")
        before_mlp = "pre_feedforward_layernorm" if two else "post_attention_layernorm"
        x = x + (rms_norm(out, w, name + "post_attention_layernorm", eps) if two else out)
        y = rms_norm(x, w, name + before_mlp, eps)
        out = gelu(linear(y, w, name + "mlp.gate_proj")) * linear(y, w, name + "mlp.up_proj")
        out = linear(out, w, name + "mlp.down_proj")
        x = x + (rms_norm(out, w, name + "post_feedforward_layernorm", eps) if two else out)
        seen[f"layers.{i}"] = x
    return rms_norm(x, w, "t.norm", eps), kept


def decode(model, embeddings, attention_mask, token_type_ids):
    full = prefix_lm_mask(attention_mask, token_type_ids)
    sliding = window_mask(model[0], attention_mask, token_type_ids)
    return run_decoder(model, embeddings, positions(attention_mask), full, sliding)[0]


# --- the whole model -----------------------------------------------------------------------------------------------


def embed(model, input_ids):
    config, w = model
    return w["t.embed_tokens.weight"][input_ids] * np.float32(config["text_config"]["hidden_size"] ** 0.5)


def merged(model, input_ids, pixel_values):
    x = embed(model, input_ids)
    image = input_ids == model[0]["image_token_index"]
    x[image] = project(model, encode_image(model, pixel_values)).reshape(-1, x.shape[-1])
    return x


def scores_of(model, hidden):
    config, w = model
    cap = config["text_config"].get("final_logit_softcapping")
    return capped(hidden @ w["t.embed_tokens.weight"].T, cap)


def logits(model, input_ids, pixel_values, attention_mask, token_type_ids):
    x = merged(model, input_ids, pixel_values)
    return scores_of(model, decode(model, x, attention_mask, token_type_ids))


def prefill(model, input_ids, pixel_values, attention_mask, token_type_ids, room):
    x = merged(model, input_ids, pixel_values)
    full = prefix_lm_mask(attention_mask, token_type_ids)
    sliding = window_mask(model[0], attention_mask, token_type_ids)
    hidden, kept = run_decoder(model, x, positions(attention_mask), full, sliding)
    return scores_of(model, hidden[:, -1]), (attention_mask, kept)


def step(model, cache, tokens):
    attention_mask, kept = cache
    attention_mask = np.concatenate([attention_mask, np.ones_like(attention_mask[:, :1])], 1)
    full = (attention_mask == 1)[:, None, :]
    age = np.arange(full.shape[2])[::-1]
    sliding = full & (age < (model[0]["text_config"].get("sliding_window") or len(age)))
    at = attention_mask.sum(1, keepdims=True)
    hidden, kept = run_decoder(model, embed(model, tokens[:, None]), at, full, sliding, kept)
    return scores_of(model, hidden[:, -1]), (attention_mask, kept)


def generate(model, input_ids, pixel_values, attention_mask, token_type_ids, max_new_tokens):
    ends = model[0]["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    rows = [[] for _ in input_ids]
    scores, cache = prefill(model, input_ids, pixel_values, attention_mask, token_type_ids, max_new_tokens)
    for _ in range(max_new_tokens):
        tokens = scores.argmax(-1)
        for row, token in zip(rows, tokens, strict=True):
            if not row or row[-1] not in ends:
                row.append(int(token))
        if all(row[-1] in ends for row in rows):
            break
        scores, cache = step(model, cache, tokens)
    return rows
