"""Held-out answers to exercise 01.3."""

import math

import torch
import torch.nn.functional as F


def right_1(image_embeddings, text_embeddings, log_temperature):
    x = F.normalize(image_embeddings, dim=1)
    y = F.normalize(text_embeddings, dim=1)
    logits = torch.exp(log_temperature) * x @ y.T
    rows = -torch.diag(torch.log_softmax(logits, dim=1)).mean()
    columns = -torch.diag(torch.log_softmax(logits, dim=0)).mean()
    return 0.5 * (rows + columns)


def right_2(image_embeddings, text_embeddings, log_temperature):
    x = image_embeddings / image_embeddings.norm(dim=-1, keepdim=True)
    y = text_embeddings / text_embeddings.norm(dim=-1, keepdim=True)
    t, n = log_temperature.exp(), len(x)
    total = 0.0
    for i in range(n):
        own = t * x[i].dot(y[i])
        total = total + torch.logsumexp(torch.stack([t * x[i].dot(y[j]) for j in range(n)]), 0) - own
        total = total + torch.logsumexp(torch.stack([t * x[j].dot(y[i]) for j in range(n)]), 0) - own
    return total / (2 * n)


def right_3(image_embeddings, text_embeddings, log_temperature):
    lengths = image_embeddings.square().sum(1).sqrt()[:, None] * text_embeddings.square().sum(1).sqrt()[None]
    logits = torch.einsum("nd,md->nm", image_embeddings, text_embeddings) / lengths * log_temperature.exp()
    target = torch.eye(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) * 0.5


def wrong_1(image_embeddings, text_embeddings, log_temperature):
    """target|diagonal|\\(i, i\\)|first (text|pair|column)"""
    logits = log_temperature.exp() * F.normalize(image_embeddings, dim=1) @ F.normalize(text_embeddings, dim=1).T
    target = torch.zeros(len(logits), dtype=torch.long)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def wrong_2(image_embeddings, text_embeddings, log_temperature):
    """only the loss over rows|from images to texts|one direction"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    total = 0
    for i in range(len(x)):
        scores = log_temperature.exp() * (y @ x[i])
        total = total + scores.logsumexp(0) - scores[i]
    return total / len(x)


def wrong_3(image_embeddings, text_embeddings, log_temperature):
    """sigmoid|each pair|binary"""
    logits = log_temperature.exp() * F.normalize(image_embeddings, dim=1) @ F.normalize(text_embeddings, dim=1).T
    return F.binary_cross_entropy_with_logits(logits, torch.eye(len(logits)))


def wrong_4(image_embeddings, text_embeddings, log_temperature):
    """divides by the temperature|multipl"""
    logits = F.normalize(image_embeddings, dim=1) @ F.normalize(text_embeddings, dim=1).T / log_temperature.exp()
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def wrong_5(image_embeddings, text_embeddings, log_temperature):
    """returns a float, expected a tensor|item"""
    return right_1(image_embeddings, text_embeddings, log_temperature).item()


def wrong_6(image_embeddings, text_embeddings, log_temperature):
    """sign|minus|negative"""
    logits = log_temperature.exp() * F.normalize(image_embeddings, dim=1) @ F.normalize(text_embeddings, dim=1).T
    rows, columns = logits.log_softmax(1).diagonal(), logits.log_softmax(0).diagonal()
    return (rows + columns).mean() / 2


def wrong_7(image_embeddings, text_embeddings, log_temperature):
    """whole table|all entries|each row"""
    logits = log_temperature.exp() * F.normalize(image_embeddings, dim=1) @ F.normalize(text_embeddings, dim=1).T
    return -logits.flatten().log_softmax(0).view_as(logits).diagonal().mean()


def wrong_8(image_embeddings, text_embeddings, log_temperature):
    """normaliz"""
    logits = log_temperature.exp() * F.normalize(image_embeddings, dim=0) @ F.normalize(text_embeddings, dim=0).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def wrong_9(image_embeddings, text_embeddings, log_temperature):
    """in place"""
    image_embeddings /= image_embeddings.norm(dim=-1, keepdim=True)
    text_embeddings /= text_embeddings.norm(dim=-1, keepdim=True)
    logits = log_temperature.exp() * image_embeddings @ text_embeddings.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def wrong_10(image_embeddings, text_embeddings, log_temperature):
    """gradient"""
    factor = math.exp(float(log_temperature))
    logits = factor * F.normalize(image_embeddings, dim=1) @ F.normalize(text_embeddings, dim=1).T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
