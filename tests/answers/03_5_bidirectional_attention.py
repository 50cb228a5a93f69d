"""Held-out answers to exercise 03.5."""

import math

import torch


def right_1(q, k, v, num_heads):
    d = q.shape[-1] // num_heads
    outputs = []
    for h in range(num_heads):
        part = slice(h * d, (h + 1) * d)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(d)
        outputs.append(scores.softmax(dim=-1) @ v[..., part])
    return torch.cat(outputs, dim=-1)


def right_2(q, k, v, num_heads):
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q, k, v))
    weights = torch.softmax(torch.einsum("bqnd,bknd->bnqk", q, k) / q.shape[-1] ** 0.5, dim=3)
    return torch.einsum("bnqk,bknd->bqnd", weights, v).flatten(2)


def right_3(q, k, v, num_heads):
    B, Q, D = q.shape
    P, d = k.shape[1], D // num_heads
    q = q.view(B, Q, num_heads, d).permute(0, 2, 1, 3).reshape(B * num_heads, Q, d)
    k = k.view(B, P, num_heads, d).permute(0, 2, 3, 1).reshape(B * num_heads, d, P)
    v = v.view(B, P, num_heads, d).permute(0, 2, 1, 3).reshape(B * num_heads, P, d)
    weights = (torch.bmm(q, k) * d**-0.5).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.bmm(weights, v).view(B, num_heads, Q, d).permute(0, 2, 1, 3).reshape(B, Q, D)


def wrong_1(q, k, v, num_heads):
    """exchang|swap"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = k @ q.mT / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def wrong_2(q, k, v, num_heads):
    """softmax"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT / q.shape[-1] ** 0.5 @ v).transpose(1, 2).flatten(2)


def wrong_3(q, k, v, num_heads):
    """softmax over|over the keys|last axis"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores.softmax(1) @ v).transpose(1, 2).flatten(2)


def wrong_4(q, k, v, num_heads):
    """hidden size|head dimension|√d"""
    scale = q.size(2) ** 0.5
    q, k, v = (torch.stack(x.chunk(num_heads, dim=-1), dim=1) for x in (q, k, v))
    out = torch.softmax(q @ k.mT / scale, -1) @ v
    return torch.cat(out.unbind(1), -1)


def wrong_5(q, k, v, num_heads):
    """across patches|last axis first|transpose|unflatten"""
    B, _, D = q.shape
    d = D // num_heads
    q, k, v = (x.reshape(B, num_heads, -1, d) for x in (q, k, v))
    out = torch.softmax(q @ k.mT / math.sqrt(d), -1) @ v
    return out.reshape(B, -1, D)


def wrong_6(q, k, v, num_heads):
    """moving|transpose\\(1, 2\\)|move the heads back"""
    B, Q, D = q.shape
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    out = torch.softmax(torch.einsum("bnqd,bnkd->bnqk", q, k) / q.shape[-1] ** 0.5, -1) @ v
    return out.contiguous().view(B, Q, D)


def wrong_7(q, k, v, num_heads):
    """number of heads|√d|scale"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / num_heads**0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def wrong_8(q, k, v, num_heads):
    """num_heads|number of heads"""
    q, k, v = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def wrong_9(q, k, v, num_heads):
    """\\bv\\b|values"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ k).transpose(1, 2).flatten(2)


def wrong_10(q, k, v, num_heads):
    """before the softmax|after the softmax|scale"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.mT).softmax(-1) / q.shape[-1] ** 0.5
    return (weights @ v).transpose(1, 2).flatten(2)
