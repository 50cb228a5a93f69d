"""Answers to exercise 6.5, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch
import torch.nn.functional as F

from minivlm.gemma import apply_rotary, geglu, grouped_query_attention, rms_norm


def right_1(x, weights, cos, sin, mask, head_dim):
    def split(y):
        return torch.stack(y.split(head_dim, dim=-1), dim=1)

    y = rms_norm(x, weights.attention_norm, 1e-6)
    q = apply_rotary(split(F.linear(y, weights.q)), cos, sin)
    k = apply_rotary(split(F.linear(y, weights.k)), cos, sin)
    heads = grouped_query_attention(q, k, split(F.linear(y, weights.v)), mask, head_dim**-0.5)
    x = x + F.linear(torch.cat(heads.unbind(1), dim=-1), weights.o)
    y = rms_norm(x, weights.mlp_norm, 1e-6)
    return x + F.linear(geglu(F.linear(y, weights.gate), F.linear(y, weights.up)), weights.down)


def right_2(x, weights, cos, sin, mask, head_dim):
    residual, D = x, x.shape[-1]
    x = rms_norm(x, weights.attention_norm, eps=1e-6)
    q = torch.einsum("btd,hed->bhte", x, weights.q.view(-1, head_dim, D))
    k = torch.einsum("btd,hed->bhte", x, weights.k.view(-1, head_dim, D))
    v = torch.einsum("btd,hed->bhte", x, weights.v.view(-1, head_dim, D))
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    out = grouped_query_attention(q, k, v, mask, scale=1 / head_dim**0.5)
    x = residual + torch.einsum("bhte,dhe->btd", out, weights.o.view(D, -1, head_dim))
    residual = x
    x = rms_norm(x, weights.mlp_norm, eps=1e-6)
    return residual + geglu(x @ weights.gate.mT, x @ weights.up.mT) @ weights.down.mT


def right_3(x, weights, cos, sin, mask, head_dim):
    rows = []
    for b in range(len(x)):
        y = rms_norm(x[b], weights.attention_norm, 1e-6)
        q, k, v = ((w @ y.T).unflatten(0, (-1, head_dim)).mT[None] for w in (weights.q, weights.k, weights.v))
        q, k = apply_rotary(q, cos[b : b + 1], sin[b : b + 1]), apply_rotary(k, cos[b : b + 1], sin[b : b + 1])
        heads = grouped_query_attention(q, k, v, None if mask is None else mask[b : b + 1], head_dim**-0.5)[0]
        z = x[b] + heads.permute(1, 0, 2).flatten(1) @ weights.o.T
        y = rms_norm(z, weights.mlp_norm, 1e-6)
        rows.append(z + geglu(y @ weights.gate.T, y @ weights.up.T) @ weights.down.T)
    return torch.stack(rows)


def _heads(y, w, d):
    return (y @ w.T).unflatten(-1, (-1, d)).transpose(1, 2)


def wrong_1(x, w, cos, sin, mask, head_dim):
    """mask"""
    y = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = _heads(y, w.q, head_dim), _heads(y, w.k, head_dim), _heads(y, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, None, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x, w.mlp_norm, 1e-6)
    return x + geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T


def wrong_2(x, w, cos, sin, mask, head_dim):
    """gate|up"""
    y = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = _heads(y, w.q, head_dim), _heads(y, w.k, head_dim), _heads(y, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x, w.mlp_norm, 1e-6)
    return x + geglu(y @ w.up.T, y @ w.gate.T) @ w.down.T


def wrong_3(x, w, cos, sin, mask, head_dim):
    """norm"""
    y = rms_norm(x, w.mlp_norm, 1e-6)
    q, k, v = _heads(y, w.q, head_dim), _heads(y, w.k, head_dim), _heads(y, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x, w.attention_norm, 1e-6)
    return x + geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T


def wrong_4(x, w, cos, sin, mask, head_dim):
    """transpose|heads and tokens|view"""
    B, T, D = x.shape
    y = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = (
        (y @ w.q.T).view(B, -1, T, head_dim),
        (y @ w.k.T).view(B, -1, T, head_dim),
        (y @ w.v.T).view(B, -1, T, head_dim),
    )
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x, w.mlp_norm, 1e-6)
    return x + geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T


def wrong_5(x, w, cos, sin, mask, head_dim):
    """normaliz.*attention|first norm|attention_norm"""
    q, k, v = _heads(x, w.q, head_dim), _heads(x, w.k, head_dim), _heads(x, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x, w.mlp_norm, 1e-6)
    return x + geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T


def wrong_6(x, w, cos, sin, mask, head_dim):
    """in place|argument"""
    y = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = _heads(y, w.q, head_dim), _heads(y, w.k, head_dim), _heads(y, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x += grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x, w.mlp_norm, 1e-6)
    x += geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T
    return x


def wrong_7(x, w, cos, sin, mask, head_dim):
    """scale|head dimension|head_dim"""
    y = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = _heads(y, w.q, head_dim), _heads(y, w.k, head_dim), _heads(y, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, mask, head_dim).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x, w.mlp_norm, 1e-6)
    return x + geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T


def wrong_8(x, w, cos, sin, mask, head_dim):
    """normalized x|residual|x itself"""
    x = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = _heads(x, w.q, head_dim), _heads(x, w.k, head_dim), _heads(x, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    x = rms_norm(x, w.mlp_norm, 1e-6)
    return x + geglu(x @ w.gate.T, x @ w.up.T) @ w.down.T


def wrong_9(x, w, cos, sin, mask, head_dim):
    """second norm|mlp_norm|MLP"""
    y = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = _heads(y, w.q, head_dim), _heads(y, w.k, head_dim), _heads(y, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    x = x + grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    return x + geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T


def wrong_10(x, w, cos, sin, mask, head_dim):
    """residual|x = x \\+|added to x|around the MLP"""
    y = rms_norm(x, w.attention_norm, 1e-6)
    q, k, v = _heads(y, w.q, head_dim), _heads(y, w.k, head_dim), _heads(y, w.v, head_dim)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    attended = grouped_query_attention(q, k, v, mask, head_dim**-0.5).transpose(1, 2).flatten(2) @ w.o.T
    y = rms_norm(x + attended, w.mlp_norm, 1e-6)
    return x + geglu(y @ w.gate.T, y @ w.up.T) @ w.down.T
