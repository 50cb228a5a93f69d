"""Answers to exercise 7.4, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(attention_mask, queries):
    rows = []
    for row in attention_mask.tolist():
        position, positions = 0, []
        for real in row:
            position += real
            positions.append(position)
        rows.append(positions[len(row) - queries :])
    return torch.tensor(rows)


def right_2(attention_mask, queries):
    S = attention_mask.shape[1]
    triangle = torch.ones(S, S, dtype=torch.long).triu()
    return (attention_mask @ triangle)[:, S - queries :]


def right_3(attention_mask, queries):
    positions = torch.cumsum(attention_mask, dim=1)
    return positions.narrow(1, attention_mask.size(1) - queries, queries)


def wrong_1(attention_mask, queries):
    """slice|one token too early|last position|newest|shift|one .*early"""
    positions = attention_mask.cumsum(1)
    S = attention_mask.shape[1]
    return torch.nn.functional.pad(positions, (1, 0))[:, S - queries : S]


def wrong_2(attention_mask, queries):
    """padding"""
    B, S = attention_mask.shape
    return torch.arange(1, S + 1)[S - queries :].expand(B, queries)


def wrong_3(attention_mask, queries):
    """cumsum|last position|own position|same position"""
    total = attention_mask.sum(1)
    return torch.stack([total] * queries, dim=1)


def wrong_4(attention_mask, queries):
    """from 0|position 1|offset|one too (low|small)|differs by 1|constant"""
    return (torch.cumsum(attention_mask, 1) - 1)[:, -queries:]


def wrong_5(attention_mask, queries):
    """again|cached|whole row|slice|before the"""
    return torch.cumsum(attention_mask[:, attention_mask.shape[1] - queries :], 1)


def wrong_6(attention_mask, queries):
    """batch|axis|along a row|rows"""
    return torch.cumsum(attention_mask, 0)[:, -queries:]


def wrong_7(attention_mask, queries):
    """shape|queries|all positions|last"""
    return attention_mask.cumsum(-1)


def wrong_8(attention_mask, queries):
    """dtype|integer|float"""
    return attention_mask.float().cumsum(-1)[:, -queries:]


def wrong_9(attention_mask, queries):
    """shape|axis|dimension"""
    return attention_mask.cumsum(-1)[:, -queries]


def wrong_10(attention_mask, queries):
    """end of|first tokens|padding on the right|from the right|counts back|revers|\\bend\\b|gap|right"""
    total = attention_mask.sum(-1, keepdim=True)
    return total - torch.arange(queries - 1, -1, -1)
