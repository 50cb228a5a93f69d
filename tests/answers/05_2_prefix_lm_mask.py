"""Held-out answers to exercise 05.2."""

import torch


def right_1(token_type_ids):
    block = torch.cumsum(token_type_ids, dim=1)
    return block.unsqueeze(1) <= block.unsqueeze(2)


def right_2(token_type_ids):
    B, T = token_type_ids.shape
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    return causal | (token_type_ids == 0)[:, None, :].expand(B, T, T)


def right_3(token_type_ids):
    B, T = token_type_ids.shape
    mask = torch.zeros(B, T, T, dtype=torch.bool)
    for row in range(B):
        for query in range(T):
            for key in range(T):
                mask[row, query, key] = bool(token_type_ids[row, key] == 0) or key <= query
    return mask


def wrong_1(token_type_ids):
    """causal everywhere"""
    T = token_type_ids.shape[1]
    i = torch.arange(T)
    return (i[None, :] <= i[:, None]).repeat(len(token_type_ids), 1, 1)


def wrong_2(token_type_ids):
    """swaps queries and keys|transposed"""
    block = token_type_ids.cumsum(1)
    return block[:, :, None] <= block[:, None, :]


def wrong_3(token_type_ids):
    """dtype torch.int64"""
    block = token_type_ids.cumsum(1)
    return (block[:, None, :] <= block[:, :, None]).long()


def wrong_4(token_type_ids):
    """first .*(row|batch)"""
    block = token_type_ids[:1].cumsum(1)
    return (block[:, None, :] <= block[:, :, None]).repeat(len(token_type_ids), 1, 1)


def wrong_5(token_type_ids):
    """inverted|True and False"""
    block = token_type_ids.cumsum(1)
    return block[:, None, :] > block[:, :, None]


def wrong_6(token_type_ids):
    """cumsum_|in place"""
    block = token_type_ids.cumsum_(1)
    return block[:, None, :] <= block[:, :, None]
