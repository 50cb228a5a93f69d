"""Answers to exercise 6.3, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(q, k, v, mask, scale, cap=None):
    B, H, T, d = q.shape
    K, out = k.shape[1], torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h // (H // K)], v[b, h // (H // K)]
            for t in range(T):
                scores = keys @ q[b, h, t] * scale
                if cap is not None:
                    scores = cap * (scores / cap).tanh()
                if mask is not None:
                    allowed = mask[b if len(mask) > 1 else 0, t]
                    scores = torch.where(allowed, scores, torch.tensor(-torch.inf).type_as(scores))
                out[b, h, t] = scores.softmax(0) @ values
    return out


def right_2(q, k, v, mask, scale, cap=None):
    B, H, T, d = q.shape
    K = k.shape[1]
    grouped = q.reshape(B, K, H // K, T, d)
    scores = torch.einsum("bkgtd,bksd->bkgts", grouped, k) * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    return torch.einsum("bkgts,bksd->bkgtd", scores.softmax(-1), v).reshape(B, H, T, d)


def right_3(q, k, v, mask, scale, cap=None):
    group = torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1])
    scores = (q.float() * scale) @ k.float()[:, group].mT
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + torch.zeros(mask.shape).masked_fill(mask.logical_not(), -torch.inf).unsqueeze(1)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return (weights @ v.float()[:, group]).type_as(q)


def _attend(q, k, v, mask, scale, cap, **how):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], how.get("fill", -torch.inf))
    return torch.softmax(scores, how.get("axis", -1)) @ v


def wrong_1(q, k, v, mask, scale, cap=None):
    """groups|in turn|interleave|neighboring"""
    B, H, T, d = q.shape
    scores = torch.einsum("bgktd,bksd->bgkts", q.reshape(B, -1, k.shape[1], T, d), k) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
    return torch.einsum("bgkts,bksd->bgktd", scores.softmax(-1), v).reshape(B, H, T, d)


def wrong_2(q, k, v, mask, scale, cap=None):
    """scale"""
    return _attend(q / q.shape[-1] ** 0.5, k, v, mask, 1.0, cap)


def wrong_3(q, k, v, mask, scale, cap=None):
    """−∞|inf|masked scores|1e-9|masked"""
    return _attend(q, k, v, mask, scale, cap, fill=1e-9)


def wrong_4(q, k, v, mask, scale, cap=None):
    """over the queries|axis|sum to 1|keys, the last"""
    return _attend(q, k, v, mask, scale, cap, axis=2)


def wrong_5(q, k, v, mask, scale, cap=None):
    """cap"""
    return _attend(q, k, v, mask, scale, None)


def wrong_6(q, k, v, mask, scale, cap=None):
    """no mask|None"""
    return _attend(q, k, v, mask.bool(), scale, cap)


def wrong_7(q, k, v, mask, scale, cap=None):
    """cap"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = q @ k.mT * scale
    if mask is not None:
        scores = torch.where(mask[:, None], scores, -1e9)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    return scores.softmax(-1) @ v


def wrong_8(q, k, v, mask, scale, cap=None):
    """mask"""
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None]
    return _attend(q, k, v, causal, scale, cap)


def wrong_9(q, k, v, mask, scale, cap=None):
    """tanh|cap"""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    scores = q @ k.mT * scale
    scores = scores if cap is None else torch.tanh(scores / cap)
    scores = scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(-1) @ v


def wrong_10(q, k, v, mask, scale, cap=None):
    """head|repeat|group|raises"""
    scores = q @ k.mT * scale
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    scores = scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.softmax(-1) @ v
