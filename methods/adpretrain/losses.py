"""The two contrastive losses of ADPretrain (arXiv 2511.05245), as in its official code.

Both look at the tokens of all images of a batch together. With several workers they return this worker's share, and the
shares of all workers add up to the loss of the whole batch. They are computed in float32 whatever the precision around
them, or in float64 for arguments of that type.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from methods.adpretrain.sharing import from_each_worker, gather_rows
from methods.components.collectives import sum_over_workers

NormForm = Literal["root", "pseudo_huber"]

BLOCK_FLOATS = 2**23
"""Similarities held at once, normal times anomalous tokens; a few temporaries of this size (32 MiB) come on top."""
RADIUS = 0.4
"""r: largest size of normal tokens that the norm loss leaves alone."""
MARGIN = 0.75
"""How far anomalous tokens are pushed beyond r_max."""
LARGEST_EXPONENT = 60.0
"""The weights of the norm loss grow exponentially; beyond this they would leave float32, as large pseudo-Huber sizes
do. Sizes of the root form do not come near it."""


def angle_loss(
    view1: Tensor,
    view2: Tensor,
    patch_label: Tensor,
    center: Tensor | None,
    temperature: float = 0.15,
    *,
    gathered: bool = True,
) -> Tensor:
    """Draws the two views of a token together in angle about a centre, and normal and anomalous tokens apart.

    With z = (e - c) / |e - c| for the 2 N tokens of both views, the loss of an anchor a with positive p is
    log sum_b exp(z_a.z_b / t) - z_a.z_p / t, where b runs over all tokens of the other label. The positive is not
    among the negatives (arXiv 2110.06848), so that the loss may be negative. The result is the mean over all anchors.

    Exact, without the matrix of all similarities: memory besides copies of the tokens is some `BLOCK_FLOATS` floats.

    Args:
        view1: (N, C) projected tokens of the first view.
        view2: (N, C) those of the second view, the same places in the same order.
        patch_label: (N,) 1 = anomalous, 0 = normal.
        center: (C,) centre c of normal tokens, a constant; None for the origin.
        temperature: t, > 0.
        gathered: whether the tokens of all workers are negatives of each other; otherwise each worker's loss is that
            of its own tokens, weighted by their share of all.

    Returns:
        () this worker's share of the loss; zero times the sum of the tokens where a label does not occur.
    """
    with torch.autocast(view1.device.type, enabled=False):
        first, second = (_at_least_float32(view) for view in (view1, view2))
        anomalous = patch_label.to(first.device) == 1
        here = torch.stack([(~anomalous).sum(), anomalous.sum()]).float()
        everywhere = sum_over_workers(here)
        if not bool((everywhere if gathered else here).all()):
            return 0 * (first.sum() + second.sum())
        if center is not None:
            middle = center.detach().to(first)
            first, second = first - middle, second - middle
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        normal, other = (torch.cat([first[rows], second[rows]]) for rows in (~anomalous, anomalous))
        others, own = gather_rows(other) if gathered else (other, slice(0, len(other)))
        of_normal, of_others = _log_sums(normal, others, temperature)
        if gathered:
            of_others = from_each_worker(of_others).logsumexp(dim=0)
        negatives = of_normal.sum() + of_others[own].sum()
        positives = 2 * (first * second).sum() / temperature
        return (negatives - positives) / (2 * everywhere.sum()).to(first)


def norm_loss(features: Tensor, patch_label: Tensor, *, form: NormForm = "root", gathered: bool = True) -> Tensor:
    """Draws the sizes of normal tokens onto a thin shell and pushes anomalous tokens beyond it.

    With A the size of a token, r_max = min(0.9 * smallest anomalous A, 0.4), r_min = 0.99 r_max and b = r_max + 0.75,
    each token beyond its bound by x > 0 costs exp(x) softplus(x), where exp(x) is a weight without gradient. Normal
    tokens above r_max, normal ones below r_min and anomalous ones below b are three sets; the result is the sum of
    their means, an empty set counting 0. (Log-barrier form of ResAD, arXiv 2410.20047.)

    Args:
        features: (N, C) projected tokens.
        patch_label: (N,) 1 = anomalous, 0 = normal.
        form: `root` has A = sqrt(|e| + 1) - 1, as the official code; `pseudo_huber` A = sqrt(|e|^2 + 1) - 1, as the
            paper writes.
        gathered: whether r_max and the means are those over all workers; otherwise each worker's loss is that of its
            own tokens, weighted by their share of all.

    Returns:
        () this worker's share of the loss, >= 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        tokens = _at_least_float32(features)
        anomalous = patch_label.to(tokens.device) == 1
        norm = torch.linalg.vector_norm(tokens, dim=1)
        size = (norm.square() if form == "pseudo_huber" else norm).add(1).sqrt() - 1  # A
        smallest = size.detach().masked_fill(~anomalous, torch.inf).amin()
        if gathered:
            smallest = from_each_worker(smallest).amin()
        r_max = (0.9 * smallest).clamp(max=RADIUS)
        beyond = torch.stack([size - r_max, 0.99 * r_max - size, r_max + MARGIN - size])  # (3, N)
        members = torch.stack([~anomalous, ~anomalous, anomalous]) & (beyond > 0)
        beyond = beyond.masked_fill(~members, 0)
        weights = beyond.detach().clamp(max=LARGEST_EXPONENT).exp()
        sums = (weights * F.softplus(beyond)).masked_fill(~members, 0).sum(dim=1)
        numbers = members.sum(dim=1).to(sums.dtype)
        if gathered:
            numbers = sum_over_workers(numbers)
        loss = (sums / numbers.clamp(min=1)).sum()
        here = tokens.new_full((), len(tokens))
        return loss if gathered else loss * here / sum_over_workers(here)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _log_sums(rows: Tensor, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log sum exp(x.y / t) over the y for every x (n,), and over the x for every y (m,)."""
    return _LogSums.apply(rows, columns, temperature)


class _LogSums(torch.autograd.Function):
    """Sums of both directions from one pass over blocks of similarities, which the backward pass computes again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        of_rows = rows.new_empty(len(rows))
        of_columns = columns.new_full((len(columns),), -torch.inf)
        for block in _blocks(rows, columns):
            scaled = (rows[block] / temperature) @ columns.T
            of_rows[block] = scaled.logsumexp(dim=1)
            of_columns = torch.logaddexp(of_columns, scaled.logsumexp(dim=0))
        ctx.temperature = temperature
        ctx.save_for_backward(rows, columns, of_rows, of_columns)
        return of_rows, of_columns

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_rows: Tensor, to_columns: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, columns, of_rows, of_columns = ctx.saved_tensors
        rows_gradient, columns_gradient = torch.empty_like(rows), torch.zeros_like(columns)
        with torch.autocast(rows.device.type, enabled=False):
            for block in _blocks(rows, columns):
                scaled = (rows[block] / ctx.temperature) @ columns.T
                slope = (scaled - of_rows[block, None]).exp_().mul_(to_rows[block, None])  # softmax of each row
                slope += scaled.sub_(of_columns).exp_().mul_(to_columns)  # and of each column
                slope /= ctx.temperature
                rows_gradient[block] = slope @ columns
                columns_gradient.addmm_(slope.T, rows[block])
        return rows_gradient, columns_gradient, None


def _blocks(rows: Tensor, columns: Tensor) -> list[slice]:
    step = max(1, BLOCK_FLOATS // max(1, len(columns)))
    return [slice(begin, begin + step) for begin in range(0, len(rows), step)]
