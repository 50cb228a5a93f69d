"""Answers to exercise 7.2, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(buffer, new, start):
    for i in range(new.shape[2]):
        buffer[:, :, start + i] = new[:, :, i]
    return buffer[:, :, : start + new.shape[2]]


def right_2(buffer, new, start):
    buffer.narrow(2, start, new.shape[2]).copy_(new)
    return buffer.narrow(2, 0, start + new.size(2))


def right_3(buffer, new, start):
    slots = torch.arange(start, start + new.shape[2])
    buffer.index_copy_(2, slots, new)
    return buffer[..., : start + len(slots), :]


def wrong_1(buffer, new, start):
    """copy|view|slice|share|memory"""
    buffer[:, :, start : start + new.shape[2]] = new
    return buffer[:, :, : start + new.shape[2]].clone()


def wrong_2(buffer, new, start):
    """copy|view|slice|share|memory|in place"""
    end = start + new.shape[2]
    buffer[:, :, start:end] = new
    return torch.cat((buffer[:, :, :start], new), dim=2)


def wrong_3(buffer, new, start):
    """unchanged|in place|write into"""
    buffer = buffer.clone()
    buffer[:, :, start : start + new.shape[2]] = new
    return buffer[:, :, : start + new.shape[2]]


def wrong_4(buffer, new, start):
    """whole buffer|filled|length|shape"""
    buffer[:, :, start : start + new.shape[2]] = new
    return buffer


def wrong_5(buffer, new, start):
    """one slot|one token|several|last|only|start \\+ T|returns shape"""
    buffer[:, :, start] = new[:, :, 0]
    return buffer[:, :, : start + 1]


def wrong_6(buffer, new, start):
    """None|return"""
    buffer[:, :, start : start + new.shape[2]] = new


def wrong_7(buffer, new, start):
    """late|slot|shift|start"""
    end = start + new.shape[2] + 1
    for i in range(new.shape[2]):
        if start + 1 + i < buffer.shape[2]:
            buffer[:, :, start + 1 + i] = new[:, :, i]
    return buffer[:, :, :end]


def wrong_8(buffer, new, start):
    """axis|axes|tokens|dimension|raises|axis 2"""
    end = start + new.shape[1]
    buffer[:, start:end] = new
    return buffer[:, :end]


def wrong_9(buffer, new, start):
    """first row|row|batch"""
    end = start + new.shape[2]
    buffer[0, :, start:end] = new[0]
    return buffer[:, :, :end]


def wrong_10(buffer, new, start):
    """add|replac|constant|contain"""
    end = start + new.shape[2]
    buffer[:, :, start:end] += new
    return buffer[:, :, :end]
