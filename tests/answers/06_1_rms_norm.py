"""Answers to exercise 6.1, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(x, weight, eps):
    values = x.to(torch.float32)
    rms = torch.sqrt(torch.mean(values**2, dim=-1, keepdim=True) + eps)
    return ((values / rms) * (1 + weight.to(torch.float32))).to(x.dtype)


def right_2(x, weight, eps):
    flat, D = x.float().reshape(-1, x.shape[-1]), x.shape[-1]
    rows = [row / (row.dot(row) / D + eps) ** 0.5 * (weight.float() + 1) for row in flat]
    return torch.stack(rows).reshape(x.shape).to(x.dtype)


def right_3(x, weight, eps):
    y = x.float()
    norm = torch.einsum("...d,...d->...", y, y)[..., None] / y.shape[-1]
    return torch.addcmul(y * (norm + eps).rsqrt(), y * (norm + eps).rsqrt(), weight.float()).type_as(x)


def wrong_1(x, weight, eps):
    """1 \\+ w|weight"""
    y = x.float()
    return torch.nn.functional.rms_norm(y, y.shape[-1:], weight.float(), eps).type_as(x)


def wrong_2(x, weight, eps):
    """mean first|LayerNorm|center"""
    y = x.float()
    return (
        ((y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt())
        .mul(1 + weight.float())
        .type_as(x)
    )


def wrong_3(x, weight, eps):
    """mean|averag|sum|factor"""
    y = x.float()
    return (y / (y.norm(dim=-1, keepdim=True) ** 2 + eps).sqrt() * (1 + weight.float())).type_as(x)


def wrong_4(x, weight, eps):
    """eps"""
    y = x.float()
    return (y / (y.square().mean(-1, keepdim=True).sqrt() + eps) * (1 + weight.float())).type_as(x)


def wrong_5(x, weight, eps):
    """float32|precision|bfloat16|dtype of x"""
    rms = x.square().mean(-1, keepdim=True).add(eps).sqrt()
    return x / rms * (weight + 1)


def wrong_6(x, weight, eps):
    """axis|last|whole|keepdim|own"""
    y = x.float()
    return (y / (y.square().mean() + eps).sqrt() * (1 + weight.float())).type_as(x)


def wrong_7(x, weight, eps):
    """dtype|type_as|float32"""
    y = x.float()
    return y * torch.rsqrt(y.pow(2).mean(dim=-1, keepdim=True) + eps) * (1 + weight.float())


def wrong_8(x, weight, eps):
    """axes|keepdim|shape|batch|rank|raises"""
    y = x.float()
    B, T, D = y.shape
    return (y / (y.square().mean(2, keepdim=True) + eps).sqrt() * (1 + weight.float())).type_as(x)


def wrong_9(x, weight, eps):
    """eps"""
    y = x.float()
    return (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.float())).type_as(x)


def wrong_10(x, weight, eps):
    """keepdim|size|shape|raises"""
    y = x.float()
    return (y / (y.square().mean(-1) + eps).sqrt() * (1 + weight.float())).type_as(x)
