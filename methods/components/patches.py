"""Patch features from feature maps: what PatchCore (arXiv 2106.08265, section 3.1) stores and compares.

The official code (amazon-science/patchcore-inspection, `PatchMaker`, `Preprocessing`, `Aggregator`) flattens the
p x p neighbourhood of every position to a vector ordered (channel, row, column), average-pools it adaptively to
`embed_width` numbers, resizes deeper levels bilinearly to the grid of the first, lays the levels of a patch end to end
and pools them once more to `target_width`.

Pooling acts on channels and the resize on space, both linearly, so the whole is one fixed convolution per level, a
resize and a sum. That is how it is computed here; a projection of the result folds into the convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 32
"""Output channels convolved together; pooled channels depend on few input channels, and only those are read."""


class PatchEmbedding:
    """A linear map from feature maps to one vector per position of the first level's grid."""

    def __init__(self, kernels: Sequence[Tensor], offsets: Sequence[int]) -> None:
        """Args: kernels (E_l, D_l, p, p) per level with odd p; and the output channel where each level's E_l begin."""
        self.kernels, self.offsets = [kernel.float() for kernel in kernels], list(offsets)
        self.width = max(offset + len(kernel) for kernel, offset in zip(kernels, offsets, strict=True))
        """E: numbers per patch."""
        self._parts = [[_trim(rows) for rows in kernel.split(ROWS_AT_ONCE)] for kernel in self.kernels]

    def __call__(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, D_l, h_l, w_l) maps to (B, h, w, E) patch features on the grid of the first level."""
        batch, _, height, width = levels[0].shape
        patches = levels[0].new_zeros(batch, self.width, height, width)
        for level, parts, offset in zip(levels, self._parts, self.offsets, strict=True):
            outputs = [
                F.conv2d(level[:, channels], rows, padding=rows.shape[-1] // 2)  # zeros outside the map
                for channels, rows in parts
            ]
            features = torch.cat(outputs, dim=1)
            if features.shape[2:] != (height, width):
                features = F.interpolate(features, size=(height, width), mode="bilinear", align_corners=False)
            patches[:, offset : offset + features.shape[1]] += features
        return patches.permute(0, 2, 3, 1).contiguous()

    def to(self, device: torch.device) -> PatchEmbedding:
        """The same embedding for maps on another device."""
        return PatchEmbedding([kernel.to(device) for kernel in self.kernels], self.offsets)

    def project(self, matrix: Tensor) -> PatchEmbedding:
        """The embedding followed by a linear map (E, F), in one step."""
        kernels = [
            torch.einsum("edpq,ef->fdpq", kernel, matrix[offset : offset + len(kernel)])
            for kernel, offset in zip(self.kernels, self.offsets, strict=True)
        ]
        return PatchEmbedding(kernels, [0] * len(kernels))


def average_and_concatenate(widths: Sequence[int], patch_size: int) -> PatchEmbedding:
    """Mean over the p x p neighbourhood of each level (zeros outside the map), levels end to end: anomalib's form.

    Args:
        widths: D_l per level.
        patch_size: p, odd.
    """
    box = torch.full((1, 1, patch_size, patch_size), 1 / patch_size**2)
    offsets = [sum(widths[:level]) for level in range(len(widths))]
    return PatchEmbedding([torch.eye(width)[:, :, None, None] * box for width in widths], offsets)


def pool_patches(widths: Sequence[int], patch_size: int, embed_width: int, target_width: int) -> PatchEmbedding:
    """The official code's patch features, up to a rotation that keeps all distances.

    A level whose patches have fewer numbers (D_l p^2) than the channels they are pooled to cannot fill them: its map is
    replaced by the R of its QR decomposition, which gives the same distances in D_l p^2 channels. It
    is done where no channel mixes two levels, which holds whenever `target_width` is a multiple of the levels.

    Args:
        widths: D_l per level.
        patch_size: p, odd.
        embed_width: numbers each level is pooled to; 1024 in the official commands (`pretrain_embed_dimension`).
        target_width: numbers the levels together are pooled to; 1024 as well (`target_embed_dimension`).
    """
    last = _pooling_matrix(embed_width * len(widths), target_width)
    matrices, offsets = [], []
    for level, width in enumerate(widths):
        part = last[:, level * embed_width : (level + 1) * embed_width]
        rows = part.any(dim=1).nonzero()[:, 0]
        matrices.append(torch.sparse.mm(part[rows].to_sparse(), _pooling_matrix(width * patch_size**2, embed_width)))
        offsets.append(int(rows[0]))
    if sum(len(matrix) for matrix in matrices) == target_width:  # no channel mixes two levels
        matrices = [torch.linalg.qr(m).R if m.shape[0] > m.shape[1] else m for m in matrices]
        offsets = [sum(len(matrix) for matrix in matrices[:level]) for level in range(len(widths))]
    kernels = [m.unflatten(1, (width, patch_size, patch_size)) for m, width in zip(matrices, widths, strict=True)]
    return PatchEmbedding(kernels, offsets)


def _pooling_matrix(num_in: int, num_out: int) -> Tensor:
    """(num_out, num_in) float64 matrix of `torch.nn.functional.adaptive_avg_pool1d`."""
    out = torch.arange(num_out)[:, None]
    first, end = out * num_in // num_out, -((out + 1) * num_in // -num_out)
    column = torch.arange(num_in)
    return ((first <= column) & (column < end)).double() / (end - first)


def _trim(kernel: Tensor) -> tuple[slice, Tensor]:
    """The input channels from the first to the last with a weight, and the kernel (E, D, p, p) on them alone."""
    used = kernel.any(dim=3).any(dim=2).any(dim=0).nonzero()[:, 0]
    channels = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
    return channels, kernel[:, channels].contiguous()
