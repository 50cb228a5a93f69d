"""Held-out answers to exercise 02.1."""

import torch


def right_1(x, dim=-1):
    top = torch.max(x, dim=dim, keepdim=True).values
    top[top == -torch.inf] = 0
    e = torch.exp(x - top)
    s = e.sum(dim=dim, keepdim=True)
    s[s == 0] = 1
    return e / s


def right_2(x, dim=-1):
    return torch.nan_to_num(torch.softmax(x, dim=dim), nan=0.0)


def right_3(x, dim=-1):
    moved = x.movedim(dim, -1)
    rows = moved.reshape(-1, moved.shape[-1])
    out = torch.zeros(rows.shape, dtype=x.dtype)
    for i, row in enumerate(rows):
        if row.max() > -torch.inf:
            out[i] = (row - row.max()).exp() / (row - row.max()).exp().sum()
    return out.reshape(moved.shape).movedim(-1, dim)


def wrong_1(x, dim=-1):
    """overflow|maximum|inf"""
    e = torch.exp(x)
    s = e.sum(dim, keepdim=True)
    return torch.where(s == 0, 0.0, e / torch.where(s == 0, 1.0, s))


def wrong_2(x, dim=-1):
    """NaN"""
    return torch.softmax(x, dim)


def wrong_3(x, dim=-1):
    """dim"""
    top = x.amax(1, keepdim=True).clamp(min=-1e30)
    e = (x - top).exp()
    return e / e.sum(1, keepdim=True).clamp(min=1e-30)


def wrong_4(x, dim=-1):
    """whole table|every row|its own"""
    e = (x - x.max()).exp()
    s = e.sum(dim, keepdim=True)
    return e / torch.where(s == 0, 1.0, s)


def wrong_5(x, dim=-1):
    """keepdim|reduced axis|axis"""
    top = x.max(dim).values
    e = (x - top).exp()
    return e / e.sum(dim)


def wrong_6(x, dim=-1):
    """overflow|maximum|small"""
    e = (x.clamp(max=80)).exp()
    s = e.sum(dim, keepdim=True)
    return e / torch.where(s == 0, 1.0, s)


def wrong_7(x, dim=-1):
    """zeros|equal probabilities|nothing to choose"""
    return torch.softmax(x.clamp(min=torch.finfo(x.dtype).min), dim)


def wrong_8(x, dim=-1):
    """small|eps|sum|1e-"""
    top = x.amax(dim, keepdim=True)
    e = (x - torch.where(top.isfinite(), top, 0)).exp()
    return e / (e.sum(dim, keepdim=True) + 1e-2)


def wrong_9(x, dim=-1):
    """in place"""
    top = x.amax(dim, keepdim=True)
    x -= torch.where(top.isfinite(), top, 0)
    e = x.exp()
    s = e.sum(dim, keepdim=True)
    return e / torch.where(s == 0, 1, s)


def wrong_10(x, dim=-1):
    """logarithm|log"""
    out = torch.log_softmax(x, dim)
    return torch.where(out.isnan(), 0.0, out)
