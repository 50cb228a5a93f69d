"""Answers to exercise 5.3, written from its text. A wrong one's docstring is a pattern its message must match."""

import math

import torch
import torch.nn.functional as F


def right_1(logits, labels):
    total, count = 0.0, 0
    for b in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[b, t] != -100:
                total = total - logits[b, t - 1].log_softmax(-1)[labels[b, t]]
                count += 1
    return total / count


def right_2(logits, labels):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def right_3(logits, labels):
    labeled = labels[:, 1:] != -100
    scores, targets = logits[:, :-1][labeled], labels[:, 1:][labeled]
    return (scores.logsumexp(-1) - scores.gather(-1, targets[:, None])[:, 0]).mean()


def wrong_1(logits, labels):
    """from itself|shift|token before|t \\+ 1"""
    labeled = labels != -100
    return -logits.log_softmax(-1)[labeled].gather(-1, labels[labeled][:, None]).mean()


def wrong_2(logits, labels):
    """previous|wrong way|shift"""
    losses = []
    for b in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            if labels[b, t] != -100:
                losses.append(-logits[b, t + 1].log_softmax(-1)[labels[b, t]])
    return torch.stack(losses).mean()


def wrong_3(logits, labels):
    """transpose|flatten|\\[N, V\\]|vocabulary axis"""
    return F.cross_entropy(logits[:, :-1], labels[:, 1:])


def wrong_4(logits, labels):
    """reshape|view|scrambl|transpose|mixes"""
    B, T, V = logits.shape
    return F.cross_entropy(logits[:, :-1].reshape(B, V, T - 1), labels[:, 1:])


def wrong_5(logits, labels):
    """each row|short answers|per row"""
    total = 0
    for row, target in zip(logits, labels, strict=True):
        total = total + F.cross_entropy(row[:-1], target[1:])
    return total / len(logits)


def wrong_6(logits, labels):
    """number|float|item|tensor"""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


def wrong_7(logits, labels):
    """factor|times|constant|bits"""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) / math.log(2)


def wrong_8(logits, labels):
    """softmax|already|twice|probabilit"""
    return F.cross_entropy(logits[:, :-1].softmax(-1).flatten(0, 1), labels[:, 1:].flatten())


def wrong_9(logits, labels):
    """sign|negative|minus"""
    targets = labels[:, 1:]
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return log_p[targets != -100].mean()


def wrong_10(logits, labels):
    """all tokens|number of|divid|averag"""
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return losses.mean()
