"""One Gaussian per position of a feature map, and Mahalanobis distances to it: the model of PaDiM (arXiv 2011.08785).

At each position of the finest grid the features of all levels, coarser ones repeated to their nearest neighbours,
have mean mu and covariance Sigma = sample covariance + epsilon I. The distance of y is
sqrt((y - mu)^T Sigma^-1 (y - mu)). No inverse is formed; there are two forms, equal but in cost:

- `CholeskyGaussians`: Sigma = L L^T, distance |L^-1 (y - mu)|. Coarse features are the same at all fine positions that
  repeat them. With the coarse features first, the leading rows of L belong to the coarse position alone, so they are
  computed, stored and solved there once: the chain rule p(coarse) p(fine | coarse) of the Gaussian.
- `SampleGaussians`, for fewer images than dimensions: with the training deviations X (D, N),
  Sigma^-1 = (I - X (X^T X + c I)^-1 X^T) / epsilon and c = epsilon (N - 1) (Woodbury), so that only N x N systems
  are solved. Written as the ridge regression of y on X it is a sum of squares, free of cancellation:
  d^2 = (|y - X w|^2 + c |w|^2) / epsilon, w = (X^T X + c I)^-1 X^T y.

Everything is computed in float64 in chunks of positions; results agree with a direct float64 solution to 1e-8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Grid = tuple[int, int]

CHUNK_FLOATS = 2**19
"""float64 numbers per temporary array; chunks of positions are as large as that allows."""


def fit_gaussians(levels: Sequence[Tensor], epsilon: float) -> CholeskyGaussians | SampleGaussians:
    """Fits a Gaussian to every position, in the form that has fewer numbers to go through for a prediction.

    Args:
        levels: (N, D_l, h_l, w_l) training features per level, finest grid first; N >= 1. One image has no spread,
            its sample covariance counts as zero.
        epsilon: added to the diagonal of each covariance, > 0.
    """
    num_images, widths = len(levels[0]), [level.shape[1] for level in levels]
    layout = Layout([level_grid(level) for level in levels], levels[0].device)
    touched = layout.counts[0] * num_images * (num_images + sum(widths))
    if num_images < sum(widths) and touched < CholeskyGaussians.count_floats(layout, widths):
        return SampleGaussians.fit(levels, epsilon)
    return CholeskyGaussians.fit(levels, epsilon)


def load_gaussians(
    state: Mapping[str, Tensor], grids: Sequence[Grid], epsilon: float
) -> CholeskyGaussians | SampleGaussians:
    """Restores what `state_dict()` of either form gave; grids are (h_l, w_l), finest first."""
    form = SampleGaussians if "level.0" in state else CholeskyGaussians
    return form.from_state(state, grids, epsilon)


def level_grid(level: Tensor) -> Grid:
    """(h, w) of a (B, D, h, w) map."""
    return level.shape[2], level.shape[3]


def nearest_positions(fine: Grid, coarse: Grid, device: torch.device | None = None) -> Tensor:
    """(h * w,) flat index of the coarse position that nearest replication puts at each fine position."""
    rows = torch.arange(fine[0], device=device) * coarse[0] // fine[0]
    columns = torch.arange(fine[1], device=device) * coarse[1] // fine[1]
    return (rows[:, None] * coarse[1] + columns).flatten()


class Layout:
    """Which coarse position lies under which fine ones, and chunks of positions that share nothing with each other."""

    def __init__(self, grids: Sequence[Grid], device: torch.device) -> None:
        finest = grids[0]
        self.to_level = [nearest_positions(finest, grid, device) for grid in grids]
        """Per level: (P_0,) index into the level's own positions for every position of the finest grid."""
        # Every coarse position must repeat under equally many fine ones, as it does when sizes divide each other.
        # Otherwise all levels are first expanded to the finest grid.
        divides = all(fine[0] % coarse[0] == 0 and fine[1] % coarse[1] == 0 for fine, coarse in pairwise(grids))
        every = [torch.arange(h * w, device=device) for h, w in grids]
        self.source = every if divides else self.to_level
        """Per level: (P_l,) index into the level's own positions."""
        self.counts = [len(source) for source in self.source]
        """Positions P_l per level."""
        parents = (
            [nearest_positions(*pair, device) for pair in pairwise(grids)] if divides else every[:1] * (len(grids) - 1)
        )
        self.children = [
            parent.argsort(stable=True).view(count, -1) for parent, count in zip(parents, self.counts[1:], strict=True)
        ]
        """Per level but the coarsest: (P_coarser, r) positions under each position of the next coarser level."""

    def chunks(self, floats_per_position: int) -> Iterator[list[Tensor]]:
        """Positions per level, in chunks that hold all positions above and below their own; siblings are neighbours."""
        repeats = self.counts[0] // self.counts[-1]
        size = max(1, CHUNK_FLOATS // max(1, floats_per_position * repeats))
        for coarsest in torch.arange(self.counts[-1], device=self.source[0].device).split(size):
            positions = [coarsest]
            for children in reversed(self.children):
                positions.insert(0, children[positions[0]].flatten())
            yield positions


class CholeskyGaussians:
    """Lower Cholesky factors in blocks: `factor` (P_l, D_l, D_l) of a level given the coarser ones, and `cross`
    (P_l, D_l, D_coarser), its rows in the columns of all coarser levels, the coarsest first."""

    def __init__(
        self, grids: Sequence[Grid], mean: Sequence[Tensor], factor: Sequence[Tensor], cross: Sequence[Tensor]
    ) -> None:
        self.grids, self.layout = grids, Layout(grids, factor[0].device)
        self.mean, self.factor, self.cross = mean, factor, cross

    @staticmethod
    def count_floats(layout: Layout, widths: Sequence[int]) -> int:
        """Numbers stored for a layout and (D_l) dimensions per level."""
        num_rows = [count * width for count, width in zip(layout.counts, widths, strict=True)]
        return sum(rows * sum(widths[level:]) for level, rows in enumerate(num_rows))

    @classmethod
    def fit(cls, levels: Sequence[Tensor], epsilon: float) -> CholeskyGaussians:
        """Fits to (N, D_l, h_l, w_l) training features."""
        num_images, device = len(levels[0]), levels[0].device
        grids, widths = [level_grid(level) for level in levels], [level.shape[1] for level in levels]
        layout = Layout(grids, device)
        mean = [_empty(level.shape[1], h * w, device=device) for level, (h, w) in zip(levels, grids, strict=True)]
        num_coarser = [sum(widths[level + 1 :]) for level in range(len(levels))]
        sizes = list(zip(layout.counts, widths, num_coarser, strict=True))
        factor = [_empty(count, width, width, device=device) for count, width, _ in sizes]
        cross = [_empty(count, width, above, device=device) for count, width, above in sizes]
        scale = 1 / max(1, num_images - 1)
        for positions in layout.chunks(sum(widths) * (num_images + max(widths))):
            # (P, E, N) rows of L^-1 X for all coarser levels, on the next coarser grid.
            above = _empty(len(positions[-1]), 0, num_images, device=device)
            for level in reversed(range(len(levels))):
                at = positions[level]
                source = layout.source[level][at]
                deviation = _features(levels[level], source)
                centre = deviation.mean(dim=2)
                deviation -= centre[:, :, None]
                mean[level][:, source] = centre.T
                block_cross = scale * torch.bmm(_siblings(deviation, above), above.mT)
                block_cross = block_cross.view(len(at), widths[level], above.shape[1])
                covariance = torch.bmm(deviation, deviation.mT) * scale
                covariance.diagonal(dim1=1, dim2=2).add_(epsilon)
                covariance.baddbmm_(block_cross, block_cross.mT, alpha=-1)  # Schur complement
                factor[level][at], cross[level][at] = torch.linalg.cholesky(covariance), block_cross
                if level > 0:
                    own = _whiten(deviation, above, factor[level][at], block_cross)
                    above = torch.cat([_repeat(above, len(at)), own], dim=1)
        return cls(grids, mean, factor, cross)

    def distances(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, h, w) float64 Mahalanobis distances, >= 0, of (B, D_l, h_l, w_l) features on the finest grid."""
        layout, batch = self.layout, len(levels[0])
        squared = _empty(layout.counts[0], batch, device=self.factor[0].device)
        widths = [level.shape[1] for level in levels]
        for positions in layout.chunks(sum(widths) * (batch + widths[0])):
            above = _empty(len(positions[-1]), 0, batch, device=squared.device)
            total = above.sum(dim=1)  # (P, B) squared distances over all coarser levels
            for level in reversed(range(len(levels))):
                at = positions[level]
                deviation = _deviation(levels[level], self.mean[level], layout.source[level][at])
                own = _whiten(deviation, above, self.factor[level][at], self.cross[level][at])
                total = _repeat(total, len(at)) + own.square().sum(dim=1)
                if level > 0:
                    above = torch.cat([_repeat(above, len(at)), own], dim=1)
            squared[positions[0]] = total
        return squared.sqrt().T.unflatten(1, self.grids[0])

    def state_dict(self) -> dict[str, Tensor]:
        """Means and blocks, as tensors."""
        parts = {"mean": self.mean, "factor": self.factor, "cross": self.cross}
        return {f"{name}.{level}": part[level] for name, part in parts.items() for level in range(len(part))}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], grids: Sequence[Grid], epsilon: float) -> CholeskyGaussians:
        """Restores `state_dict()`. epsilon is part of the factors already."""
        return cls(grids, *([state[f"{name}.{i}"] for i in range(len(grids))] for name in ("mean", "factor", "cross")))


class SampleGaussians:
    """The training features themselves, and per position the (N, N) Cholesky factor of X^T X + c I."""

    def __init__(
        self, grids: Sequence[Grid], epsilon: float, mean: Sequence[Tensor], levels: Sequence[Tensor], factor: Tensor
    ) -> None:
        self.grids, self.layout, self.epsilon = grids, Layout(grids[:1], factor.device), epsilon
        self.to_level = Layout(grids, factor.device).to_level
        self.mean, self.levels, self.factor = mean, levels, factor

    @classmethod
    def fit(cls, levels: Sequence[Tensor], epsilon: float) -> SampleGaussians:
        """Fits to (N, D_l, h_l, w_l) training features."""
        grids, num_images = [level_grid(level) for level in levels], len(levels[0])
        num_positions = grids[0][0] * grids[0][1]
        factor = _empty(num_positions, num_images, num_images, device=levels[0].device)
        gaussians = cls(grids, epsilon, [_mean(level) for level in levels], [level.float() for level in levels], factor)
        for at in gaussians._chunks(num_images):
            deviation = gaussians._deviation(gaussians.levels, at)
            gram = torch.bmm(deviation.mT, deviation)
            gram.diagonal(dim1=1, dim2=2).add_(gaussians._ridge)
            factor[at] = torch.linalg.cholesky(gram)
        return gaussians

    def distances(self, levels: Sequence[Tensor]) -> Tensor:
        """(B, h, w) float64 Mahalanobis distances, >= 0, of (B, D_l, h_l, w_l) features on the finest grid."""
        squared = _empty(self.layout.counts[0], len(levels[0]), device=self.factor.device)
        for at in self._chunks(len(levels[0])):
            samples, deviation = self._deviation(self.levels, at), self._deviation(levels, at)
            weights = torch.cholesky_solve(torch.bmm(samples.mT, deviation), self.factor[at])
            residual = torch.baddbmm(deviation, samples, weights, alpha=-1)
            squared[at] = residual.square().sum(dim=1) + self._ridge * weights.square().sum(dim=1)
        return (squared / self.epsilon).sqrt().T.unflatten(1, self.grids[0])

    @property
    def _ridge(self) -> float:
        """c = epsilon (N - 1)."""
        return self.epsilon * max(1, len(self.levels[0]) - 1)

    def _chunks(self, batch: int) -> Iterator[Tensor]:
        """Positions of the finest grid in chunks fit for `batch` images."""
        num_images, width = len(self.levels[0]), sum(level.shape[1] for level in self.levels)
        return (positions[0] for positions in self.layout.chunks((width + num_images) * (num_images + batch)))

    def _deviation(self, levels: Sequence[Tensor], at: Tensor) -> Tensor:
        """(P, D, B) features minus mean at some positions of the finest grid, all levels."""
        parts = zip(levels, self.mean, self.to_level, strict=True)
        return torch.cat([_deviation(level, mean, to_level[at]) for level, mean, to_level in parts], dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Means, training features and factors, as tensors."""
        state = {f"mean.{i}": mean for i, mean in enumerate(self.mean)}
        return state | {f"level.{i}": level for i, level in enumerate(self.levels)} | {"factor": self.factor}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], grids: Sequence[Grid], epsilon: float) -> SampleGaussians:
        """Restores `state_dict()` of Gaussians fitted with this epsilon."""
        mean, levels = ([state[f"{name}.{i}"] for i in range(len(grids))] for name in ("mean", "level"))
        return cls(grids, epsilon, mean, levels, state["factor"])


def _whiten(deviation: Tensor, above: Tensor, factor: Tensor, cross: Tensor) -> Tensor:
    """(P, D, B) rows of L^-1 y for one level, from y (P, D, B) and the rows of all coarser levels (P_coarser, E, B)."""
    explained = torch.bmm(_siblings(cross, above), above).view_as(deviation)
    return torch.linalg.solve_triangular(factor, deviation - explained, upper=False)


def _siblings(rows: Tensor, above: Tensor) -> Tensor:
    """(P, D, C) rows per position as (P_coarser, r D, C): what lies under one coarse position, one below the other."""
    return rows.view(len(above), rows.shape[0] * rows.shape[1] // len(above), rows.shape[2])


def _repeat(coarser: Tensor, num_positions: int) -> Tensor:
    """Values per coarse position, repeated for the positions under it."""
    return coarser.repeat_interleave(num_positions // len(coarser), dim=0)


def _mean(level: Tensor) -> Tensor:
    """(D, P) float64 mean over images."""
    return level.flatten(2).mean(dim=0, dtype=torch.float64)


def _deviation(level: Tensor, mean: Tensor, at: Tensor) -> Tensor:
    """(P, D, B) float64 features minus mean at some positions of a (B, D, h, w) level."""
    deviation = _features(level, at)
    deviation -= mean[:, at].T[:, :, None]
    return deviation


def _features(level: Tensor, at: Tensor) -> Tensor:
    """(P, D, B) float64 features at some positions of a (B, D, h, w) level."""
    rows = level.permute(2, 3, 0, 1).flatten(0, 1).index_select(0, at)  # (P, B, D), in this order the fastest to read
    return _empty(*rows.mT.shape, device=level.device).copy_(rows.mT)


def _empty(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=device)
