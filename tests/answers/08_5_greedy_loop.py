"""Answers to exercise 8.7, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(next_logits, ids, eos, pad, max_new_tokens):
    start = ids.shape[1]
    while ids.shape[1] < start + max_new_tokens:
        token = next_logits(ids).argmax(-1, keepdim=True)
        ended = (ids[:, start:] == eos).any(-1, keepdim=True)
        ids = torch.cat((ids, torch.where(ended, pad, token)), dim=1)
        if (ids[:, start:] == eos).any(-1).all():
            break
    return ids[:, start:]


def right_2(next_logits, ids, eos, pad, max_new_tokens):
    answers, rows = [[] for _ in ids], ids.tolist()
    for _ in range(max_new_tokens):
        if all(answer and answer[-1] in (eos, None) for answer in answers):
            break
        best = next_logits(torch.tensor(rows)).argmax(-1).tolist()
        for answer, row, token in zip(answers, rows, best, strict=True):
            done = bool(answer) and answer[-1] in (eos, None)
            answer.append(None if done else token)
            row.append(pad if done else token)
    return torch.tensor([[pad if token is None else token for token in answer] for answer in answers])


def right_3(next_logits, ids, eos, pad, max_new_tokens):
    active, out = torch.ones(ids.shape[0], dtype=torch.long), ids.new_empty((ids.shape[0], 0))
    for _ in range(max_new_tokens):
        token = next_logits(torch.hstack((ids, out))).max(-1).indices
        token = token * active + pad * (1 - active)
        out = torch.hstack((out, token.unsqueeze(1)))
        active = active * (token != eos)
        if active.sum() == 0:
            return out
    return out


def wrong_1(next_logits, ids, eos, pad, max_new_tokens):
    """after|pad|keeps generating|ended|finished"""
    new = []
    done = [False] * len(ids)
    for _ in range(max_new_tokens):
        token = next_logits(ids).argmax(-1)
        new.append(token)
        done = [d or t == eos for d, t in zip(done, token.tolist(), strict=True)]
        if all(done):
            break
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.stack(new, 1)


def wrong_2(next_logits, ids, eos, pad, max_new_tokens):
    """limit|max_new_tokens|too long|seconds|endless"""
    start, finished = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool)
    while not finished.all():
        token = next_logits(ids).argmax(-1).masked_fill(finished, pad)
        finished = finished | (token == eos)
        ids = torch.cat((ids, token[:, None]), dim=1)
    return ids[:, start:]


def wrong_3(next_logits, ids, eos, pad, max_new_tokens):
    """prompt"""
    start = ids.shape[1]
    for _ in range(max_new_tokens):
        finished = (ids == eos).any(-1)
        if finished.all():
            break
        token = next_logits(ids).argmax(-1).masked_fill(finished, pad)
        ids = torch.cat((ids, token[:, None]), dim=1)
    return ids[:, start:]


def wrong_4(next_logits, ids, eos, pad, max_new_tokens):
    """batch|row|raises|one row|several"""
    new = []
    for _ in range(max_new_tokens):
        token = next_logits(ids)[0].argmax()
        new.append(int(token))
        if int(token) == eos:
            break
        ids = torch.cat((ids, token.expand(len(ids), 1)), dim=1)
    return torch.tensor([new] * len(ids))


def wrong_5(next_logits, ids, eos, pad, max_new_tokens):
    """all|any|other rows|one row"""
    new, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    while len(new) < max_new_tokens and not finished.any():
        token = next_logits(ids).argmax(-1)
        new.append(token[:, None])
        finished |= token == eos
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.cat(new, 1)


def wrong_6(next_logits, ids, eos, pad, max_new_tokens):
    """eos"""
    new, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(max_new_tokens):
        token = next_logits(ids).argmax(-1)
        finished |= token == eos
        if finished.all():
            break
        token[finished] = pad
        new.append(token)
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.stack(new, 1) if new else ids[:, :0]


def wrong_7(next_logits, ids, eos, pad, max_new_tokens):
    """too many|one token|max_new_tokens"""
    new, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    while not finished.all() and len(new) <= max_new_tokens:
        token = next_logits(ids).argmax(-1).masked_fill(finished, pad)
        new.append(token)
        finished = finished | (token == eos)
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.stack(new, 1)


def wrong_8(next_logits, ids, eos, pad, max_new_tokens):
    """pad"""
    new, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(max_new_tokens):
        token = next_logits(ids).argmax(-1) * ~finished
        new.append(token)
        finished = finished | (token == eos)
        if finished.all():
            break
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.stack(new, 1)


def wrong_9(next_logits, ids, eos, pad, max_new_tokens):
    """transpos|axis|shape|dim=1"""
    new, finished = [], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(max_new_tokens):
        token = next_logits(ids).argmax(-1).masked_fill(finished, pad)
        new.append(token)
        finished = finished | (token == eos)
        if finished.all():
            break
        ids = torch.cat((ids, token[:, None]), dim=1)
    return torch.stack(new)


def wrong_10(next_logits, ids, eos, pad, max_new_tokens):
    """after|pad|continues|max_new_tokens|all rows"""
    start = ids.shape[1]
    for _ in range(max_new_tokens):
        ids = torch.cat((ids, next_logits(ids).argmax(-1)[:, None]), dim=1)
    new = ids[:, start:].clone()
    for row in new:
        ends = (row == eos).nonzero()
        if len(ends):
            row[int(ends[0]) + 1 :] = pad
    return new
