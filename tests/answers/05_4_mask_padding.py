"""Answers to exercise 5.4, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(mask, attention_mask):
    result = mask.clone()
    for b in range(len(mask)):
        for key in range(mask.shape[2]):
            if attention_mask[b, key] == 0:
                for query in range(mask.shape[1]):
                    result[b, query, key] = query == key
    return result


def right_2(mask, attention_mask):
    masked = mask.masked_fill(attention_mask[:, None, :] == 0, False)
    masked.diagonal(dim1=1, dim2=2).fill_(True)
    return masked


def right_3(mask, attention_mask):
    itself = torch.eye(mask.shape[-1]) > 0
    return torch.where(itself, True, mask & (attention_mask.unsqueeze(1) != 0))


def wrong_1(mask, attention_mask):
    """rows|columns|queries|keys, the last axis|transpose"""
    T = mask.shape[1]
    return mask.masked_fill(attention_mask[:, :, None] == 0, False) | torch.eye(T, dtype=torch.bool)


def wrong_2(mask, attention_mask):
    """itself"""
    return torch.logical_and(mask, attention_mask.unsqueeze(1))


def wrong_3(mask, attention_mask):
    """row|padding quer|both|column"""
    real = attention_mask.bool()
    both = real[:, None, :] & real[:, :, None]
    return (mask & both) | torch.eye(mask.shape[1], dtype=torch.bool)


def wrong_4(mask, attention_mask):
    """in place|argument"""
    mask &= attention_mask.bool()[:, None, :]
    mask |= torch.eye(mask.shape[1], dtype=torch.bool)
    return mask


def wrong_5(mask, attention_mask):
    """dtype|bool|integer"""
    return (mask * attention_mask[:, None, :]).maximum(torch.eye(mask.shape[1], dtype=torch.long))


def wrong_6(mask, attention_mask):
    """itself"""
    T, result = mask.shape[1], mask.clone()
    for b in range(len(mask)):
        result[b, :, attention_mask[b] == 0] = False
        for t in range(T):
            if not result[b, t].any():
                result[b, t, t] = True
    return result


def wrong_7(mask, attention_mask):
    """first row|each row|every row|other rows|row 0"""
    return (mask & attention_mask[0].bool()) | torch.eye(mask.shape[1], dtype=torch.bool)


def wrong_8(mask, attention_mask):
    """size|shape|raises|other case"""
    return (mask & attention_mask.bool()[:, None, :]) | torch.eye(6, dtype=torch.bool)


def wrong_9(mask, attention_mask):
    """visible|1 for tokens|inver|masks the tokens|padding"""
    return mask & ~(attention_mask.bool()[:, None, :]) | torch.eye(mask.shape[1], dtype=torch.bool)


def wrong_10(mask, attention_mask):
    """mask|ignor|blocks it|causal"""
    return attention_mask.bool()[:, None, :] | torch.eye(mask.shape[1], dtype=torch.bool)
