"""Patch features step by step, as the official code of PatchCore describes them."""

import torch
import torch.nn.functional as F


def official_patches(levels, patch_size, embed_width, target_width):
    """(B, h, w, target_width): unfold, resize, pool each level, lay end to end, pool again."""
    height, width = levels[0].shape[2:]
    pooled = []
    for level in levels:
        batch, channels, h, w = level.shape
        patches = F.unfold(level, patch_size, padding=patch_size // 2).reshape(batch, -1, h, w)
        patches = F.interpolate(patches, size=(height, width), mode="bilinear", align_corners=False)
        flat = patches.permute(0, 2, 3, 1).reshape(-1, 1, channels * patch_size**2)
        pooled.append(F.adaptive_avg_pool1d(flat, embed_width))
    together = F.adaptive_avg_pool1d(torch.cat(pooled, dim=2), target_width)
    return together.reshape(-1, height, width, target_width)


def averaged_patches(levels, patch_size):
    """(B, h, w, D): mean over the neighbourhood, resize, lay end to end."""
    size = levels[0].shape[2:]
    means = [F.avg_pool2d(level, patch_size, stride=1, padding=patch_size // 2) for level in levels]
    means = [F.interpolate(mean, size=size, mode="bilinear", align_corners=False) for mean in means]
    return torch.cat(means, dim=1).permute(0, 2, 3, 1)
