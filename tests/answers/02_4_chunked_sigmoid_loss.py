"""Held-out answers to exercise 02.4."""

import torch
import torch.nn.functional as F


def right_1(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    total, i = 0, torch.arange(len(x))[:, None]
    for first in range(0, len(x), chunk_size):
        part = y[first : first + chunk_size]
        j = first + torch.arange(len(part))
        logits = log_temperature.exp() * x @ part.T + bias
        total = total - F.logsigmoid(torch.where(i == j, logits, -logits)).sum()
    return total / len(x)


def right_2(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    x = image_embeddings / image_embeddings.norm(dim=1, keepdim=True)
    y = text_embeddings / text_embeddings.norm(dim=1, keepdim=True)
    losses = []
    labels = torch.eye(len(x)).split(chunk_size, dim=1)
    for part, target in zip(y.split(chunk_size), labels, strict=True):
        logits = log_temperature.exp() * x @ part.T + bias
        losses.append(F.binary_cross_entropy_with_logits(logits, target, reduction="sum"))
    return torch.stack(losses).sum() / len(x)


def right_3(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    N, first, total = image_embeddings.shape[0], 0, torch.tensor(0.0)
    images = F.normalize(image_embeddings, dim=1)
    while first < N:
        last = min(first + chunk_size, N)
        texts = F.normalize(text_embeddings[first:last], dim=1)
        logits = torch.einsum("nd,cd->nc", images, texts) * log_temperature.exp() + bias
        z = -torch.ones(N, last - first)
        for j in range(last - first):
            z[first + j, j] = 1
        total = total + F.softplus(-z * logits).sum()
        first = last
    return total / N


def wrong_1(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """last chunk|not full"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    total, labels = 0, torch.eye(len(x), dtype=torch.bool)
    for k in range(len(x) // chunk_size):
        part = slice(k * chunk_size, (k + 1) * chunk_size)
        logits = log_temperature.exp() * x @ y[part].T + bias
        total = total - F.logsigmoid(torch.where(labels[:, part], logits, -logits)).sum()
    return total / len(x)


def wrong_2(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """second|too long|endless|never (ends|returns)|does not (finish|end|return)"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    total, first = 0, 0
    while first < len(x):
        logits = log_temperature.exp() * x @ y[first : first + chunk_size].T + bias
        total = total - F.logsigmoid(-logits).sum()
    return total / len(x)


def wrong_3(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """diagonal|belongs to image|first \\+ j"""
    x, y, N = F.normalize(image_embeddings), F.normalize(text_embeddings), len(image_embeddings)
    total = 0
    for first in range(0, N, chunk_size):
        logits = log_temperature.exp() * x @ y[first : first + chunk_size].T + bias
        match = logits.diagonal(first)
        total = total - F.logsigmoid(-logits).sum() + F.logsigmoid(-match).sum() - F.logsigmoid(match).sum()
    return total / N


def wrong_4(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """diagonal|belongs to image|first \\+ j"""
    x, y, N = F.normalize(image_embeddings), F.normalize(text_embeddings), len(image_embeddings)
    total = 0
    for part in y.split(chunk_size):
        logits = log_temperature.exp() * x @ part.T + bias
        z = 2 * torch.eye(*logits.shape) - 1
        total = total - F.logsigmoid(z * logits).sum()
    return total / N


def wrong_5(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """number of chunks|averages|mean|divide"""
    x, y, N = F.normalize(image_embeddings), F.normalize(text_embeddings), len(image_embeddings)
    losses = []
    for first in range(0, N, chunk_size):
        logits = log_temperature.exp() * x @ y[first : first + chunk_size].T + bias
        z = torch.full_like(logits, -1)
        z.diagonal(-first).fill_(1)
        losses.append(-F.logsigmoid(z * logits).sum() / N)
    return sum(losses) / len(losses)


def wrong_6(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """all\\*? images|across chunks|splits the images"""
    total, N = 0, len(image_embeddings)
    for first in range(0, N, chunk_size):
        x = F.normalize(image_embeddings[first : first + chunk_size])
        y = F.normalize(text_embeddings[first : first + chunk_size])
        logits = log_temperature.exp() * x @ y.T + bias
        total = total - F.logsigmoid((2 * torch.eye(len(x)) - 1) * logits).sum()
    return total / N


def wrong_7(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """only the last chunk|last chunk only|overwrit|add"""
    x, y, N = F.normalize(image_embeddings), F.normalize(text_embeddings), len(image_embeddings)
    for first in range(0, N, chunk_size):
        logits = log_temperature.exp() * x @ y[first : first + chunk_size].T + bias
        z = torch.full_like(logits, -1)
        z.diagonal(-first).fill_(1)
        total = -F.logsigmoid(z * logits).sum()
    return total / N


def wrong_8(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """last text|one text|misses|leaves out|skips"""
    x, y, N = F.normalize(image_embeddings), F.normalize(text_embeddings), len(image_embeddings)
    labels, total = torch.eye(N), 0
    for first in range(0, N, chunk_size):
        part = slice(first, first + chunk_size - 1)
        logits = log_temperature.exp() * x @ y[part].T + bias
        total = total + F.binary_cross_entropy_with_logits(logits, labels[:, part], reduction="sum")
    return total / N


def wrong_9(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """first chunk|only one chunk|other chunks"""
    x, y, N = F.normalize(image_embeddings), F.normalize(text_embeddings), len(image_embeddings)
    total = 0
    for first in range(0, N, chunk_size):
        logits = log_temperature.exp() * x @ y[first : first + chunk_size].T + bias
        z = torch.full_like(logits, -1)
        z.diagonal(-first).fill_(1)
        total = total - F.logsigmoid(z * logits).sum()
        return total / N


def wrong_10(image_embeddings, text_embeddings, log_temperature, bias, chunk_size=1024):
    """gradient"""
    x, y, N = F.normalize(image_embeddings), F.normalize(text_embeddings), len(image_embeddings)
    total = 0.0
    for first in range(0, N, chunk_size):
        logits = log_temperature.exp() * x @ y[first : first + chunk_size].T + bias
        z = torch.full_like(logits, -1)
        z.diagonal(-first).fill_(1)
        total -= F.logsigmoid(z * logits).sum().item()
    return torch.tensor(total / N)
