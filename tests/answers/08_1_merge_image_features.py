"""Answers to exercise 8.1, written from its text. A wrong one's docstring is a pattern its message must match."""

import torch


def right_1(x, is_image, features):
    merged = x.clone()
    for b in range(len(x)):
        p = 0
        for t in range(x.shape[1]):
            if is_image[b, t]:
                merged[b, t] = features[b, p]
                p += 1
    return merged


def right_2(x, is_image, features):
    merged = x.clone()
    merged[is_image] = features.reshape(-1, features.shape[-1])
    return merged


def right_3(x, is_image, features):
    slot = (is_image.long().cumsum(1) - 1).clamp(min=0)
    spread = features.gather(1, slot[..., None].expand(-1, -1, features.shape[-1]))
    return torch.where(is_image.unsqueeze(-1), spread, x)


def wrong_1(x, is_image, features):
    """in place|argument"""
    x[is_image] = features.flatten(0, 1)
    return x


def wrong_2(x, is_image, features):
    """next to each other|contiguous|not a slice|marks each position"""
    merged = x.clone()
    for b in range(len(x)):
        first = int(is_image[b].long().argmax())
        merged[b, first : first + features.shape[1]] = features[b]
    return merged


def wrong_3(x, is_image, features):
    """first image|features\\[b\\]|each row|first row|row 0"""
    merged = x.clone()
    for b in range(len(x)):
        merged[b, is_image[b]] = features[0]
    return merged


def wrong_4(x, is_image, features):
    """first row|each row|every row|row by row|row 0"""
    merged = x.clone()
    merged[:, is_image[0]] = features
    return merged


def wrong_5(x, is_image, features):
    """√D|scale|unscaled|factor"""
    merged = x.clone()
    merged[is_image] = (features * x.shape[-1] ** 0.5).reshape(-1, x.shape[-1])
    return merged


def wrong_6(x, is_image, features):
    """reshape|order|transpos|mix|permut|column"""
    merged = x.clone()
    merged[is_image] = features.transpose(0, 1).reshape(-1, x.shape[-1])
    return merged


def wrong_7(x, is_image, features):
    """raises|mask|broadcast|\\[B, T, 1\\]|shape"""
    return x.masked_scatter(is_image, features)


def wrong_8(x, is_image, features):
    """text|unchanged|zeros|False"""
    merged = torch.zeros_like(x)
    merged[is_image] = features.flatten(0, 1)
    return merged


def wrong_9(x, is_image, features):
    """opposite|swap|False|inver|True at|instead of the placeholders"""
    merged = x.clone()
    source = features.flatten(0, 1)
    merged[~is_image] = source[torch.arange(int((~is_image).sum())) % len(source)]
    return merged


def wrong_10(x, is_image, features):
    """scale|√D|text|factor|multipl|divid"""
    merged = x * x.shape[-1] ** 0.5
    merged[is_image] = features.flatten(0, 1)
    return merged
