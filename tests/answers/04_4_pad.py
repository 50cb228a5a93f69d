"""Held-out answers to exercise 04.4."""

import itertools

import numpy as np
import torch


def right_1(rows, value, side):
    longest = max(len(row) for row in rows)
    padded = []
    for row in rows:
        filler = [value] * (longest - len(row))
        padded.append(filler + list(row) if side == "left" else list(row) + filler)
    return np.asarray(padded, dtype=np.int64)


def right_2(rows, value, side):
    longest = max(map(len, rows))
    width = lambda row: (longest - len(row), 0) if side == "left" else (0, longest - len(row))  # noqa: E731
    filled = [np.pad(np.array(row, dtype=np.int64), width(row), constant_values=value) for row in rows]
    return np.stack(filled)


def right_3(rows, value, side):
    if side == "left":
        return right_3([row[::-1] for row in rows], value, "right")[:, ::-1]
    return np.array(list(zip(*itertools.zip_longest(*rows, fillvalue=value), strict=True)), dtype=np.int64)


def wrong_1(rows, value, side):
    """always pads on the right|side.*ignored|ignores.*side|left"""
    longest = max(map(len, rows))
    return np.array(
        [[value] * (longest - len(r)) + r if side == "Left" else r + [value] * (longest - len(r)) for r in rows]
    )


def wrong_2(rows, value, side):
    """float"""
    out = np.zeros((len(rows), max(map(len, rows)))) + value
    for i, row in enumerate(rows):
        for j, token in enumerate(row):
            out[i, j if side == "right" else out.shape[1] - len(row) + j] = token
    return out


def wrong_3(rows, value, side):
    """in place|chang(es|ed) (an argument|its argument|`?rows)"""
    longest = max(map(len, rows))
    for row in rows:
        while len(row) < longest:
            row.insert(0 if side == "left" else len(row), value)
    return np.array(rows, dtype=np.int64)


def wrong_4(rows, value, side):
    """returns a list, expected a numpy array"""
    return right_1(rows, value, side).tolist()


def wrong_5(rows, value, side):
    """returns a tensor|numpy"""
    return torch.from_numpy(right_1(rows, value, side))


def wrong_6(rows, value, side):
    """longest|first row|broadcast|out of bounds"""
    longest = len(rows[0])
    out = np.full((len(rows), longest), value, dtype=np.int64)
    for line, row in zip(out, rows, strict=True):
        row = row[:longest]
        start = longest - len(row) if side == "left" else 0
        line[start : start + len(row)] = row
    return out


def wrong_7(rows, value, side):
    """empty|broadcast|-0|no tokens"""
    out = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        if side == "right":
            out[i, : len(row)] = row
        else:
            out[i, -len(row) :] = row
    return out


def wrong_8(rows, value, side):
    """revers|flip|order"""
    longest = max(map(len, rows))
    padded = [list(row) + [value] * (longest - len(row)) for row in rows]
    if side == "left":
        padded = [row[::-1] for row in padded]
    return np.array(padded, dtype=np.int64)


def wrong_9(rows, value, side):
    """left|right|side|both"""
    longest, out = max(map(len, rows)), []
    for row in rows:
        missing = longest - len(row)
        out.append([value] * (missing // 2) + list(row) + [value] * (missing - missing // 2))
    return np.array(out, dtype=np.int64)


def wrong_10(rows, value, side):
    """int32"""
    return right_1(rows, value, side).astype(np.int32)
