"""Answers to exercise 8.6, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(logits, p):
    filtered = torch.full_like(logits, float("-inf"))
    for b, row in enumerate(logits):
        total = 0.0
        for i in row.argsort(descending=True).tolist():
            if total >= p:
                break
            filtered[b, i] = row[i]
            total += float(row.softmax(0)[i])
    return filtered


def right_2(logits, p):
    order = logits.argsort(dim=-1, descending=True)
    probabilities = logits.softmax(-1).gather(-1, order)
    keep = torch.nn.functional.pad(probabilities.cumsum(-1) < p, (1, -1), value=True)
    kept = torch.zeros_like(keep).scatter_(-1, order, keep)
    return torch.where(kept, logits, -torch.inf)


def right_3(logits, p):
    probabilities = logits.softmax(-1)
    larger = probabilities[:, None, :] > probabilities[:, :, None]
    before = (larger * probabilities[:, None, :]).sum(-1)
    return logits.masked_fill(before >= p, -torch.inf)


def _sorted(logits):
    probabilities, order = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True)
    return probabilities, order, torch.cumsum(probabilities, -1)


def wrong_1(logits, p):
    """gather|scatter|order|rank"""
    probabilities, order, total = _sorted(logits)
    dropped = (total - probabilities >= p).gather(-1, order)
    return logits.masked_fill(dropped, -torch.inf)


def wrong_2(logits, p):
    """reach|before|cross"""
    probabilities, order, total = _sorted(logits)
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, total <= p)
    return torch.where(kept, logits, -torch.inf)


def wrong_3(logits, p):
    """reach|before|most likely"""
    probabilities, order, total = _sorted(logits)
    keep = total < p
    keep[:, 0] = True
    return torch.where(torch.zeros_like(keep).scatter(-1, order, keep), logits, -torch.inf)


def wrong_4(logits, p):
    """too many|one token|before"""
    probabilities, order, total = _sorted(logits)
    dropped = torch.cat((torch.zeros(len(logits), 2, dtype=torch.bool), (total >= p)[:, :-2]), 1)
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def wrong_5(logits, p):
    """softmax|probabilit"""
    values, order = logits.sort(-1, descending=True)
    dropped = values.cumsum(-1) - values >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def wrong_6(logits, p):
    """row|batch|axis"""
    probabilities, order, total = _sorted(logits)
    dropped = torch.zeros_like(logits, dtype=torch.bool)
    dropped[:, order[0][(total - probabilities >= p)[0]]] = True
    return logits.masked_fill(dropped, -torch.inf)


def wrong_7(logits, p):
    """in place|argument"""
    probabilities, order, total = _sorted(logits)
    for row, ids, before in zip(logits, order, total - probabilities, strict=True):
        row[ids[before >= p]] = -torch.inf
    return logits


def wrong_8(logits, p):
    """−∞|-inf|infinit"""
    probabilities, order, total = _sorted(logits)
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, total - probabilities >= p)
    return logits.masked_fill(dropped, -1e9)


def wrong_9(logits, p):
    """ascending|descending|least likely|smallest|most likely"""
    probabilities, order = logits.softmax(-1).sort(-1)
    before = probabilities.cumsum(-1) - probabilities
    return logits.masked_fill(torch.zeros_like(logits).bool().scatter(-1, order, before >= p), -torch.inf)


def wrong_10(logits, p):
    """top-k|largest probability|own|cumul|each probability"""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)
