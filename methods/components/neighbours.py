"""Exact nearest neighbours in a memory bank: faster than one matrix product, as accurate as differences.

|q - m|^2 = |q|^2 + |m|^2 - 2 q.m turns a search into a matrix product, but loses to cancellation the small distances
that matter most. Here a product only screens: it gives lower bounds of all distances, and the few bank rows
whose bound does not exceed a distance already found are measured by their differences.

Lower bounds may be cheap. In the principal axes of the bank the first a coordinates carry nearly all of a distance, and
the rest of a vector counts by its length alone (Cauchy-Schwarz):
|q - m|^2 >= |q_a - m_a|^2 + (|q_rest| - |m_rest|)^2. So the product has a + 2 instead of D + 1 terms.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_FLOATS = 2**21
"""Lower bounds held at once, queries times bank rows; 8 MiB stay in the last cache between the steps."""
GROUP = 32
"""Bank rows whose smallest bound is taken together, to find rows that are surely close."""
PAIR_FLOATS = 2**17
"""Differences held at once, pairs times dimensions; few enough to be read again from the cache."""
AXES_SAMPLE = 4096
"""Bank rows from which the principal axes are computed, at most."""
NUM_PROBES = 64
PAIR_COST = 80
"""Measuring a pair of D coordinates takes as long as this many of its products of D terms."""


def nearest(queries: Tensor, memory_bank: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest rows of a memory bank for every query, by Euclidean distance.

    Exact: the distances are norms of differences in float32 (float64 where an argument is), so a query that is in the
    bank is at distance 0; these distances decide which rows are returned, and the lowest index wins a tie. The result
    for a query does not depend on the other queries.

    Memory besides arguments and results: at most one more copy of the bank and some 100 MiB; never Q * M.

    Args:
        queries: (Q, D) points; Q may be 0.
        memory_bank: (M, D) points to search, M >= k.
        k: number of neighbours, >= 1.

    Returns:
        Distances (Q, k), ascending, >= 0, and the int64 indices (Q, k) of the bank rows.

    Raises:
        ValueError: if shapes do not match, k is not in [1, M], or a value is not finite.
    """
    if queries.ndim != 2:
        raise ValueError(f"queries must be (Q, D), got shape {tuple(queries.shape)}")
    return MemoryIndex(memory_bank, k, num_queries=len(queries)).nearest(queries, k)


class MemoryIndex:
    """A memory bank prepared for searches."""

    @torch.no_grad()
    def __init__(self, memory_bank: Tensor, k: int = 1, num_queries: int | None = None) -> None:
        """Prepares a bank.

        Args:
            memory_bank: (M, D) points, M and D > 0.
            k: how many neighbours will mostly be asked for; others are found as well, only less fast.
            num_queries: how many queries will come in all; None for many. For few, principal axes do not pay.
        """
        if memory_bank.ndim != 2 or 0 in memory_bank.shape:
            raise ValueError(f"memory_bank must be (M, D) with M, D > 0, got shape {tuple(memory_bank.shape)}")
        self.memory_bank = memory_bank if memory_bank.dtype == torch.float64 else memory_bank.float()
        self.num_rows, width = memory_bank.shape
        self.shift = self.memory_bank.mean(dim=0, dtype=torch.float64)  # smaller norms, smaller rounding errors
        if not bool(self.shift.isfinite().all()):
            raise ValueError("memory_bank must be finite, found NaN or infinity")
        self.axes: Tensor | None = None
        """(D, a) orthonormal float64 columns; None for all D coordinates as they are."""
        if width >= 64 and self.num_rows >= 1024 and (num_queries is None or num_queries >= 4 * width):
            self.axes = self._choose_axes(k)

        # Where float32 products may be computed with fewer bits, screen in float64.
        exact_products = torch.get_float32_matmul_precision() == "highest"
        self.dtype = self.memory_bank.dtype if exact_products else torch.float64
        lead, norm = self._screened(self.memory_bank)
        self.largest_norm = norm.max()
        padding = -self.num_rows % GROUP
        lead = F.pad(lead, (0, 0, 0, padding))
        squared = F.pad(norm.square().to(self.dtype), (0, padding), value=torch.inf)
        self.bounds = torch.cat([-2 * lead, squared[:, None]], dim=1)
        """(M, a + 2) rows whose product with (q_a, |q_rest|, 1) is |lower bound|^2 - |q|^2; rows of infinity fill the
        last group."""

    @torch.no_grad()
    def nearest(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """See `nearest`."""
        num_rows, width = self.num_rows, self.memory_bank.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(f"queries must be (Q, {width}) like the memory bank, got shape {tuple(queries.shape)}")
        if not 1 <= k <= num_rows:
            raise ValueError(f"k must be in [1, {num_rows}], the rows of the memory bank, got {k}")
        queries = queries.to(self.memory_bank.dtype)
        distances = torch.empty(len(queries), k, dtype=queries.dtype, device=queries.device)
        indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        rows = max(16, BLOCK_FLOATS // num_rows)
        for begin in range(0, len(queries), rows):
            block = slice(begin, begin + rows)
            distances[block], indices[block] = self._nearest_of_block(queries[block], k)
        return distances, indices

    def _nearest_of_block(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        lead, norm = self._screened(queries)
        if not bool(norm.isfinite().all()):
            raise ValueError("queries must be finite, found NaN or infinity")
        bound = torch.cat([lead, torch.ones_like(lead[:, :1])], dim=1) @ self.bounds.T  # squared, less |q|^2

        group = GROUP if self.num_rows >= GROUP * (k + 1) else 1
        groups = bound.unflatten(1, (-1, group))
        smallest = groups.amin(dim=2)

        # Bank rows that are likely the nearest: the first of each of the best groups. The k-th nearest of these is as
        # far as a wanted row can be.
        num_probed = min(k + 1, self.num_rows)
        # torch sorts partially, three times as fast, only where there are 64 to choose from for each that is wanted.
        padding = max(0, 64 * num_probed - smallest.shape[1])
        probed = F.pad(smallest, (0, padding), value=torch.inf).topk(num_probed, dim=1, largest=False).indices
        inside = groups.gather(1, probed[:, :, None].expand(-1, -1, group)).argmin(dim=2)
        row = torch.arange(len(queries), device=queries.device).repeat_interleave(num_probed)
        reached = self._measure(queries, row, (probed * group + inside).flatten())
        reached = reached.view(-1, num_probed).kthvalue(k, dim=1).values

        # |fl(a.b) - a.b| <= n u |a||b| for n terms and unit roundoff u (Higham 2002, eq. 3.5); rounding of operands and
        # of the limit costs as much as a few terms more. Measured distances are off by no more than (D / 2 + 2) u.
        unit = torch.finfo(self.dtype).eps / 2
        error = 2 * (bound.shape[1] + 8) * unit * (norm + self.largest_norm) ** 2
        reached = reached * (1 + (queries.shape[1] + 8) * torch.finfo(queries.dtype).eps)
        limit = (reached.double().square() - norm.square() + error).to(self.dtype)
        row, near = _find(smallest <= limit[:, None])
        candidates = groups.flatten(0, 1).index_select(0, row * groups.shape[1] + near)
        pair, inside = _find(candidates <= limit[row, None])
        row, column = row[pair], near[pair] * group + inside
        distance = self._measure(queries, row, column)
        kept = (distance <= reached[row]).nonzero()[:, 0]
        row, column, distance = row[kept], column[kept], distance[kept]

        # Sort the pairs by (row, distance, column); they come by (row, column), and the sorts are stable.
        order = distance.argsort(stable=True)
        order = order[row[order].argsort(stable=True)]
        num_pairs = torch.bincount(row, minlength=len(queries))
        first = num_pairs.cumsum(0) - num_pairs
        best = order[first[:, None] + torch.arange(k, device=row.device)]
        return distance[best], column[best]

    def _screened(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """(B, a + 1) coordinates along the axes and length of the rest; and (B,) float64 norms, all after the shift."""
        leads, norms = [], []
        for rows in points.split(max(1, PAIR_FLOATS // points.shape[1])):
            centred = rows.double() - self.shift
            squared = centred.square().sum(dim=1)
            lead = centred if self.axes is None else centred @ self.axes
            rest = (squared - lead.square().sum(dim=1)).clamp_(min=0).sqrt()
            leads.append(torch.cat([lead, rest[:, None]], dim=1).to(self.dtype))
            norms.append(squared.sqrt())
        return torch.cat(leads), torch.cat(norms)

    def _measure(self, queries: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """(pairs,) distances between the paired queries and bank rows, by differences."""
        pairs = max(1, PAIR_FLOATS // queries.shape[1])
        pieces = []
        for some_rows, some_columns in zip(row.split(pairs), column.split(pairs), strict=True):
            difference = self.memory_bank.index_select(0, some_columns)
            difference -= queries.index_select(0, some_rows)
            pieces.append(torch.linalg.vector_norm(difference, dim=1))
        return torch.cat(pieces)

    def _choose_axes(self, k: int) -> Tensor | None:
        """(D, a) principal axes, as many as make searches cheapest, or None for all coordinates as they are.

        Few axes make the product cheap, many make its bounds tight. How many pairs are left to measure is counted for
        some bank rows, as far from their nearest neighbours as queries will be, against a sample of the bank.
        """
        width = self.memory_bank.shape[1]
        sample = self.memory_bank[:: -(-self.num_rows // AXES_SAMPLE)].double() - self.shift
        axes = torch.linalg.eigh(sample.T @ sample).eigenvectors.flip(1)
        some = self.memory_bank[:: -(-self.num_rows // NUM_PROBES)]
        to_neighbour = torch.cdist(some, self.memory_bank).topk(min(k + 1, self.num_rows), largest=False).values[:, -1:]
        probes, sample = (some.double() - self.shift) @ axes, sample @ axes

        costs = {width: float(self.num_rows * width)}
        for num_axes in (width * sixteenths // 16 for sixteenths in range(1, 11)):
            bounds = torch.cdist(_shorten(probes, num_axes), _shorten(sample, num_axes))
            share = float((bounds <= to_neighbour).double().mean())
            costs[num_axes] = self.num_rows * (num_axes + share * PAIR_COST * width)
        cheapest = min(costs, key=lambda num_axes: costs[num_axes])
        return None if cheapest == width else axes[:, :cheapest].contiguous()


def _find(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the true entries of a matrix, row by row."""
    # On a CPU numpy looks through a mask six times as fast.
    flat = torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.is_cpu else mask.flatten().nonzero()[:, 0]
    return flat // mask.shape[1], flat % mask.shape[1]


def _shorten(points: Tensor, num_axes: int) -> Tensor:
    """(B, a + 1) first coordinates, and the length of the rest."""
    return torch.cat([points[:, :num_axes], points[:, num_axes:].norm(dim=1, keepdim=True)], dim=1)
