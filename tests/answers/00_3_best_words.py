"""Held-out answers to exercise 00.3."""

import math

import torch


def right_1(scores, words):
    result = []
    for row in scores.tolist():
        total = sum(math.exp(score) for score in row)
        probabilities = [math.exp(score) / total for score in row]
        i = max(range(len(row)), key=lambda i: probabilities[i])
        result.append((words[i], probabilities[i]))
    return result


def right_2(scores, words):
    e = scores.numpy().astype("float64")
    e = 2.718281828459045**e
    p = e / e.sum(axis=1, keepdims=True)
    return [(words[i], float(row[i])) for i, row in zip(p.argmax(axis=1), p, strict=True)]


def right_3(scores, words):
    values, indices = torch.softmax(scores, dim=1).topk(1, dim=1)
    return [(words[int(i)], float(v)) for v, i in zip(values[:, 0], indices[:, 0], strict=True)]


def wrong_1(scores, words):
    """over the rows|wrong axis"""
    p = torch.softmax(scores, dim=0)
    return [(words[int(row.argmax())], float(row.max())) for row in p]


def wrong_2(scores, words):
    """length 1, expected|only the first row|first row only"""
    p = scores.softmax(-1)
    for row in p:
        return [(words[int(row.argmax())], float(row.max()))]


def wrong_3(scores, words):
    """sigmoid"""
    p = torch.sigmoid(scores)
    best = p.max(-1)
    return [(words[i], v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def wrong_4(scores, words):
    """expected a str|order|swap|exchange"""
    best = scores.softmax(-1).max(-1)
    return [(v, words[i]) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def wrong_5(scores, words):
    """column|axis"""
    p = scores.softmax(-1)
    chosen = scores.argmax(0)
    return [(words[int(chosen[n])], float(p[n].max())) for n in range(len(scores))]


def wrong_6(scores, words):
    """logarithm|log.probabilit|exponential"""
    best = scores.log_softmax(-1).max(-1)
    return [(words[i], v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def wrong_7(scores, words):
    """round|precision"""
    best = scores.softmax(-1).max(-1)
    return [(words[i], round(v, 2)) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def wrong_8(scores, words):
    """dict"""
    best = scores.softmax(-1).max(-1)
    return {words[i]: v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)}


def wrong_9(scores, words):
    """index|off by one|shift|neighbor"""
    best = scores.softmax(-1).max(-1)
    return [(words[i - 1], v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def wrong_10(scores, words):
    """sum"""
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    best = (e / e.max(-1, keepdim=True).values).max(-1)
    return [(words[i], v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
