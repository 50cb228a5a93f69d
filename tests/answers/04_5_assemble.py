"""Held-out answers to exercise 04.5."""

import numpy as np
import torch


def _rows(rows, value, side):
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return np.array([f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)], dtype=np.int64)


def right_1(prompts, answers, pad_id, side):
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    shape = (len(prompts), longest)
    ids, labels = np.full(shape, pad_id, dtype=np.int64), np.full(shape, -100, dtype=np.int64)
    mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = 0 if side == "right" else longest - len(prompt) - len(answer)
        middle, end = start + len(prompt), start + len(prompt) + len(answer)
        ids[b, start:end] = list(prompt) + list(answer)
        mask[b, start:end] = 1
        types[b, middle:end] = 1
        labels[b, middle:end] = answer
    return ids, mask, types, labels


def right_2(prompts, answers, pad_id, side):
    pairs = list(zip(prompts, answers, strict=True))
    return (
        _rows([p + a for p, a in pairs], pad_id, side),
        _rows([[1] * len(p + a) for p, a in pairs], 0, side),
        _rows([[0] * len(p) + [1] * len(a) for p, a in pairs], 0, side),
        _rows([[-100] * len(p) + a for p, a in pairs], -100, side),
    )


def right_3(prompts, answers, pad_id, side):
    lengths = np.array([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)])
    column = np.arange(lengths.max())[None]
    start = (lengths.max() - lengths if side == "left" else 0 * lengths)[:, None]
    middle = start + np.array([len(p) for p in prompts])[:, None]
    mask = ((column >= start) & (column < start + lengths[:, None])).astype(np.int64)
    types = mask * (column >= middle)
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask == 1] = [token for p, a in zip(prompts, answers, strict=True) for token in [*p, *a]]
    return [ids, mask, types, np.where(types, ids, -100)]


def wrong_1(prompts, answers, pad_id, side):
    """prompt.*label|labels?.*prompt"""
    ids, mask, types, _ = right_2(prompts, answers, pad_id, side)
    labels = ids.copy()
    labels[ids == pad_id] = -100
    return ids, mask, types, labels


def wrong_2(prompts, answers, pad_id, side):
    """token_type_ids|token types?|padding"""
    ids, mask, types, _ = right_2(prompts, answers, pad_id, side)
    types = np.zeros_like(ids)
    for b, answer in enumerate(answers):
        types[b, ids.shape[1] - len(answer) :] = 1
    return ids, mask, types, np.where(types == 1, ids, -100)


def wrong_3(prompts, answers, pad_id, side):
    """dict"""
    names = ("input_ids", "attention_mask", "token_type_ids", "labels")
    return dict(zip(names, right_2(prompts, answers, pad_id, side), strict=True))


def wrong_4(prompts, answers, pad_id, side):
    """order|exchang|swap"""
    ids, mask, types, labels = right_2(prompts, answers, pad_id, side)
    return ids, types, mask, labels


def wrong_5(prompts, answers, pad_id, side):
    """labels?.*(pad|-100|−100)"""
    ids, mask, types, _ = right_2(prompts, answers, pad_id, side)
    labels = _rows([[-100] * len(p) + a for p, a in zip(prompts, answers, strict=True)], pad_id, side)
    return ids, mask, types, labels


def wrong_6(prompts, answers, pad_id, side):
    """between|separate|shape|middle"""
    p, a = _rows(prompts, pad_id, side), _rows(answers, pad_id, side)
    ids = np.concatenate([p, a], axis=1)
    mask = np.concatenate([_rows([[1] * len(r) for r in rows], 0, side) for rows in (prompts, answers)], axis=1)
    types = np.concatenate([np.zeros_like(p), _rows([[1] * len(r) for r in answers], 0, side)], axis=1)
    return ids, mask, types, np.where(types == 1, ids, -100)


def wrong_7(prompts, answers, pad_id, side):
    """eos|one more|longer|shape"""
    return right_2(prompts, [answer + [1] for answer in answers], pad_id, side)


def wrong_8(prompts, answers, pad_id, side):
    """attention_mask.*bool"""
    ids, mask, types, labels = right_2(prompts, answers, pad_id, side)
    return ids, mask.astype(bool), types, labels


def wrong_9(prompts, answers, pad_id, side):
    """empty|token_type_ids"""
    pairs = list(zip(prompts, answers, strict=True))
    ids = _rows([p + a for p, a in pairs], pad_id, side)
    mask = _rows([[1] * len(p + a) for p, a in pairs], 0, side)
    rows = [np.zeros(len(p) + len(a), dtype=int) for p, a in pairs]
    for row, answer in zip(rows, answers, strict=True):
        row[-len(answer) :] = 1
    types = _rows([row.tolist() for row in rows], 0, side)
    return ids, mask, types, np.where(types == 1, ids, -100)


def wrong_10(prompts, answers, pad_id, side):
    """tensor|numpy"""
    return tuple(torch.tensor(array) for array in right_2(prompts, answers, pad_id, side))
