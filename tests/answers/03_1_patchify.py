"""Held-out answers to exercise 03.1."""

import torch
import torch.nn.functional as F


def right_1(pixel_values, patch_size):
    p = patch_size
    rows = []
    for top in range(0, pixel_values.shape[2], p):
        for left in range(0, pixel_values.shape[3], p):
            rows.append(pixel_values[:, :, top : top + p, left : left + p].reshape(len(pixel_values), -1))
    return torch.stack(rows, 1)


def right_2(pixel_values, patch_size):
    B, C, H, W = pixel_values.shape
    windows = pixel_values.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(B, -1, C * patch_size**2)


def right_3(pixel_values, patch_size):
    B, C, H, W = pixel_values.shape
    p = patch_size
    six = pixel_values.view(B, C, H // p, p, W // p, p)
    return torch.einsum("bcrhsw->brschw", six).reshape(B, (H // p) * (W // p), C * p * p)


def wrong_1(pixel_values, patch_size):
    """column by column|reading order|order"""
    p, patches = patch_size, []
    for left in range(0, pixel_values.shape[3], p):
        for top in range(0, pixel_values.shape[2], p):
            patches.append(pixel_values[:, :, top : top + p, left : left + p].flatten(1))
    return torch.stack(patches, 1)


def wrong_2(pixel_values, patch_size):
    """memory|permute|reshape"""
    B, C, H, W = pixel_values.shape
    return pixel_values.contiguous().view(B, H // patch_size * (W // patch_size), C * patch_size**2)


def wrong_3(pixel_values, patch_size):
    """colors? last|color, row, column|channel"""
    p, patches = patch_size, []
    for top in range(0, pixel_values.shape[2], p):
        for left in range(0, pixel_values.shape[3], p):
            patches.append(pixel_values[:, :, top : top + p, left : left + p].permute(0, 2, 3, 1).flatten(1))
    return torch.stack(patches, 1)


def wrong_4(pixel_values, patch_size):
    """colors?|channel|permute|memory"""
    B, C, H, W = pixel_values.shape
    windows = pixel_values.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return windows.reshape(B, -1, C * patch_size**2)


def wrong_5(pixel_values, patch_size):
    """square|invalid for input"""
    B, C, H, W = pixel_values.shape
    n, p = H // patch_size, patch_size
    return pixel_values.reshape(B, C, n, p, n, p).permute(0, 2, 4, 1, 3, 5).reshape(B, n * n, C * p * p)


def wrong_6(pixel_values, patch_size):
    """channel|invalid for input|colors"""
    B, _, H, W = pixel_values.shape
    p = patch_size
    six = pixel_values.reshape(B, 3, H // p, p, W // p, p)
    return six.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, 3 * p * p)


def wrong_7(pixel_values, patch_size):
    """batch of one|shape"""
    return F.unfold(pixel_values, patch_size, stride=patch_size).transpose(1, 2).squeeze()


def wrong_8(pixel_values, patch_size):
    """transpose"""
    p, patches = patch_size, []
    for top in range(0, pixel_values.shape[2], p):
        for left in range(0, pixel_values.shape[3], p):
            patches.append(pixel_values[:, :, top : top + p, left : left + p].mT.flatten(1))
    return torch.stack(patches, 1)


def wrong_9(pixel_values, patch_size):
    """shape"""
    B, C, H, W = pixel_values.shape
    p = patch_size
    return pixel_values.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def wrong_10(pixel_values, patch_size):
    """dtype"""
    B, C, H, W = pixel_values.shape
    p = patch_size
    out = torch.zeros(B, (H // p) * (W // p), C * p * p)
    for r in range(H // p):
        for c in range(W // p):
            patch = pixel_values[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p]
            out[:, r * (W // p) + c] = patch.flatten(1)
    return out
