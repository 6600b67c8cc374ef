"""Exact nearest neighbours in a memory bank: as fast as matrix products, as accurate as differences.

|q - m|^2 = |q|^2 + |m|^2 - 2 q.m turns a search into one matrix product, but loses the small distances that matter most
to cancellation. Here the product only screens: every bank row whose screened distance is within the proven rounding
error of the k-th smallest stays, a handful per query, and those are measured by their differences.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_FLOATS = 2**21
"""Screened distances held at once, queries times bank rows."""
GROUP = 64
"""Bank rows whose smallest screened distance is taken together to bound the k-th smallest."""
PAIR_FLOATS = 2**22
"""Differences held at once, pairs times dimensions."""


@torch.no_grad()
def nearest(queries: Tensor, memory_bank: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest rows of a memory bank for every query, by Euclidean distance.

    Exact: the distances are norms of differences in the dtype of the queries (float32 or float64; half precision is
    computed as float32), so a query that is in the bank is at distance 0; which rows are returned is decided by these
    distances, and the lowest index wins a tie. The result for a query does not depend on the other queries beyond the
    rounding of one norm.

    Memory besides the arguments and results: one centred copy of the bank and of a block of queries, and some
    50 MiB; never Q * M.

    Args:
        queries: (Q, D) points; Q may be 0.
        memory_bank: (M, D) points to search, M >= k.
        k: number of neighbours, >= 1.

    Returns:
        Distances (Q, k), ascending, >= 0, and the int64 indices (Q, k) of the bank rows.

    Raises:
        ValueError: if shapes do not match, k is not in [1, M], or a value is not finite.
    """
    _check(queries, memory_bank, k)
    dtype = torch.float64 if torch.float64 in (queries.dtype, memory_bank.dtype) else torch.float32
    queries, memory_bank = queries.to(dtype), memory_bank.to(dtype)
    search = _Search(memory_bank, k)
    distances = torch.empty(len(queries), k, dtype=dtype, device=queries.device)
    indices = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    rows = max(16, BLOCK_FLOATS // len(memory_bank))
    for begin in range(0, len(queries), rows):
        block = slice(begin, begin + rows)
        distances[block], indices[block] = search.nearest(queries[block])
    return distances, indices


class _Search:
    """A memory bank prepared for screening."""

    def __init__(self, memory_bank: Tensor, k: int) -> None:
        self.memory_bank, self.k = memory_bank, k
        # Where float32 products may be computed with fewer bits, screen in float64.
        exact_products = torch.get_float32_matmul_precision() == "highest"
        self.dtype = memory_bank.dtype if exact_products else torch.float64
        self.shift = memory_bank.mean(dim=0)  # smaller norms, smaller rounding errors
        centred = memory_bank - self.shift
        norms = centred.square().sum(dim=1)
        self.largest_norm = norms.max().sqrt()
        if not bool(self.largest_norm.isfinite()):
            raise ValueError("memory_bank must be finite, found NaN or infinity")
        self.screen = torch.cat([centred.mul_(-2), norms[:, None]], dim=1).to(self.dtype)

        # The k-th smallest of at least k group minima bounds the k-th smallest of all.
        num_rows = len(memory_bank)
        self.group = GROUP if num_rows >= GROUP * k else 1

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(B, k) distances and indices for a (B, D) block of queries."""
        centred = queries - self.shift
        norms = torch.linalg.vector_norm(centred, dim=1)
        if not bool(norms.isfinite().all()):
            raise ValueError("queries must be finite, found NaN or infinity")
        ones = torch.ones_like(centred[:, :1])
        screened = torch.cat([centred, ones], dim=1).to(self.dtype) @ self.screen.T  # |m|^2 - 2 q.m
        # |fl(a.b) - a.b| <= n u |a||b| for n terms and unit roundoff u (Higham 2002, eq. 3.5), for the product and for
        # |m|^2; rounded operands cost as much as a few terms more. It counts twice below, since both the bound and the
        # row that is compared with it may be off.
        unit = torch.finfo(queries.dtype).eps / 2
        error = (2 * (queries.shape[1] + 6) * unit) * (norms + self.largest_norm) ** 2
        limit = self._kth_smallest_bound(screened) + 2 * error
        row, column = (screened <= limit[:, None]).nonzero(as_tuple=True)
        distance = self._distances(queries, row, column)

        # Sort the pairs by (row, distance, column); `nonzero` gives them by (row, column) and the sorts are stable.
        order = distance.argsort(stable=True)
        order = order[row[order].argsort(stable=True)]
        num_pairs = torch.bincount(row, minlength=len(queries))
        first = num_pairs.cumsum(0) - num_pairs
        best = order[first[:, None] + torch.arange(self.k, device=row.device)]
        return distance[best], column[best]

    def _kth_smallest_bound(self, screened: Tensor) -> Tensor:
        """(B,) values that at least k entries of each row of (B, M) do not exceed."""
        num_rows = screened.shape[1]
        whole = num_rows - num_rows % self.group
        minima = screened[:, :whole].unflatten(1, (-1, self.group)).amin(dim=2) if self.group > 1 else screened
        return minima.amin(dim=1) if self.k == 1 else minima.kthvalue(self.k, dim=1).values

    def _distances(self, queries: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """(pairs,) distances between the paired queries and bank rows."""
        pairs = max(1, PAIR_FLOATS // queries.shape[1])
        pieces = [
            torch.linalg.vector_norm(queries[r] - self.memory_bank[c], dim=1)
            for r, c in zip(row.split(pairs), column.split(pairs), strict=True)
        ]
        return torch.cat(pieces)


def _check(queries: Tensor, memory_bank: Tensor, k: int) -> None:
    if queries.ndim != 2 or memory_bank.ndim != 2 or queries.shape[1] != memory_bank.shape[1] or not queries.shape[1]:
        raise ValueError(
            f"queries (Q, D) and memory_bank (M, D) must agree in D > 0, "
            f"got shapes {tuple(queries.shape)} and {tuple(memory_bank.shape)}"
        )
    if not 1 <= k <= len(memory_bank):
        raise ValueError(f"k must be in [1, {len(memory_bank)}], the rows of the memory bank, got {k}")
