"""Held-out answers to exercise 02.3."""

import torch
import torch.nn.functional as F


def right_1(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    x, y = F.normalize(image_embeddings, dim=-1), F.normalize(text_embeddings, dim=-1)
    total = torch.zeros(())
    for i in range(len(x)):
        for j in range(len(y)):
            logit = log_temperature.exp() * x[i].dot(y[j]) + bias
            match = i == j if labels is None else bool(labels[i, j])
            total = total + F.softplus(-logit if match else logit)
    return total / len(x)


def right_2(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    x = image_embeddings / image_embeddings.norm(dim=1, keepdim=True)
    y = text_embeddings / text_embeddings.norm(dim=1, keepdim=True)
    logits = log_temperature.exp() * (x @ y.t()) + bias
    target = torch.eye(len(x), len(y)) if labels is None else labels.float()
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / x.shape[0]


def right_3(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = torch.einsum("id,jd->ij", x, y) * torch.exp(log_temperature) + bias
    i, j = torch.arange(len(x)), torch.arange(len(y))
    z = (i[:, None] == j).float() if labels is None else labels.float()
    signed = (2 * z - 1) * logits
    return torch.logaddexp(torch.zeros_like(signed), -signed).sum(1).mean()


def wrong_1(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """labels"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    z = 2 * torch.eye(len(x), len(y)) - 1
    return -F.logsigmoid(z * logits).sum() / len(x)


def wrong_2(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """overflow|underflow|log ?σ|logsigmoid|infinit"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    if labels is None:
        labels = torch.eye(len(x), dtype=torch.bool)
    z = torch.where(labels, 1.0, -1.0)
    return -torch.log(1 / (1 + torch.exp(-z * logits))).sum() / len(x)


def wrong_3(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """number of match|matches|divides by"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    if labels is None:
        labels = torch.eye(len(x), dtype=torch.bool)
    z = torch.where(labels, 1.0, -1.0)
    return -F.logsigmoid(z * logits).sum() / labels.sum()


def wrong_4(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """number of (texts|images)|texts instead"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    if labels is None:
        labels = torch.eye(len(x), dtype=torch.bool)
    return -F.logsigmoid(torch.where(labels, logits, -logits)).sum(0).mean()


def wrong_5(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """mean over all|number of images|divide"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    target = torch.eye(len(x)) if labels is None else labels.float()
    return F.binary_cross_entropy_with_logits(logits, target)


def wrong_6(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """gradient"""
    with torch.no_grad():
        return right_2(image_embeddings, text_embeddings, log_temperature, bias, labels)


def wrong_7(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """bias|whole logit"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    if labels is None:
        labels = torch.eye(len(x), dtype=torch.bool)
    z = labels.float() * 2 - 1
    return -F.logsigmoid(z * log_temperature.exp() * (x @ y.T) + bias).sum() / len(x)


def wrong_8(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """only .*match|mismatch|non-match|do not belong"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    if labels is None:
        labels = torch.eye(len(x), dtype=torch.bool)
    return -F.logsigmoid(logits[labels]).sum() / len(x)


def wrong_9(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """several|two match|more than one|one match|no match|labels"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    own = torch.arange(len(x)) if labels is None else labels.int().argmax(1)
    z = -torch.ones_like(logits)
    z[torch.arange(len(x)), own] = 1.0
    return -F.logsigmoid(z * logits).sum() / len(x)


def wrong_10(image_embeddings, text_embeddings, log_temperature, bias, labels=None):
    """ambiguous|is None"""
    x, y = F.normalize(image_embeddings), F.normalize(text_embeddings)
    logits = log_temperature.exp() * x @ y.T + bias
    labels = labels or torch.eye(len(x), dtype=torch.bool)
    return -F.logsigmoid(torch.where(labels, logits, -logits)).sum() / len(x)
