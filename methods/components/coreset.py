"""Greedy k-centre coreset: the patch features that represent all others best, exact and fast.

Farthest-first traversal (Gonzalez 1985, doi 10.1016/0304-3975(85)90224-5; used for memory banks by PatchCore,
arXiv 2106.08265, algorithm 1) repeatedly chooses the point farthest from the centres chosen so far. The usual loop
touches all N points for each centre. This one touches a point only while it is a candidate:

- A distance to the nearest of *some* centres is an upper bound of the distance to the nearest of *all* centres.
  So every point keeps its last known distance and the number of centres that distance has seen.
- A round takes the points with the largest bounds, compares them with the centres they have not seen by one
  matrix product, and chooses among them as long as the farthest beats every bound outside. The winner is then the
  farthest of all points, without a look at the others.

The order is nested: the first m indices are the coreset of size m. A sweep over ratios needs one call at the largest.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATE_FLOATS = 2**19
"""Size of a round's candidates, points times dimensions: what one core holds in its cache as float64."""
SMALLEST_ROUND = 512
"""Candidates at least, however many dimensions they have."""
SCREEN_FLOATS = 2**20
"""Largest block of screened distances; bounds memory and stays in cache."""


@torch.no_grad()
def greedy_coreset(
    features: Tensor,
    num: int,
    start: int | Tensor = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Indices of `num` features in farthest-first order by Euclidean distance.

    Every choice is the exact argmax: distances that decide are float64, float32 products only rule points out, by
    their proven rounding error. Distances that agree to 1e-12 of the largest squared norm count as equal and the
    lowest index wins. No index is returned twice.

    Args:
        features: (N, D) finite points.
        num: how many to choose, in [1, N].
        start: index of the first choice; or an (S,) tensor of indices which are not chosen themselves but whose mean
            distance stands in for the distance to the first centre, as in PatchCore's official code
            (`ApproximateGreedyCoresetSampler`, S = 10).
        progress: called as `progress(done, num)` after every round, last with `done == num`.

    Returns:
        (num,) int64 indices in order of choice, on the device of `features`. Its prefix of length m equals the
        result for `num = m`.

    Raises:
        ValueError: if `num`, `start` or the shape of `features` is out of range, or a feature is not finite.
    """
    return extend_coreset(features, num, start, None, progress).order


@dataclass(frozen=True)
class CoresetState:
    """How far a traversal has come; it can be taken further without doing anything again."""

    order: Tensor
    """(m,) int64 indices chosen so far."""
    bound: Tensor
    """(N,) float64 squared distance to the nearest of the first `num_seen` centres; -1 for the chosen."""
    num_seen: Tensor
    """(N,) int64."""


@torch.no_grad()
def extend_coreset(
    features: Tensor,
    num: int,
    start: int | Tensor = 0,
    state: CoresetState | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CoresetState:
    """`greedy_coreset` in instalments: from the state of an earlier call with the same features and start to `num`.

    Args and errors as for `greedy_coreset`. A `state` of None starts afresh; one with `num` choices or more is
    returned as it is.
    """
    start = start if isinstance(start, Tensor) else int(start)
    _check(features, num, start)
    if state is not None and len(state.order) >= num:
        return state
    selection = _Selection(features, num, start, state)
    while selection.num_chosen < num:
        selection.choose_round()
        if progress is not None:
            progress(selection.num_chosen, num)
    return CoresetState(selection.order, selection.bound, selection.num_seen)


class CoresetCache:
    """Keeps the latest traversals, so that a sweep over ratios pays for its largest ratio alone.

    Traversals are found by the content of the features and the start. One holds 16 bytes per feature.
    """

    def __init__(self, capacity: int = 4) -> None:
        self.capacity = capacity
        self.num_chosen = 0
        """Choices made so far over all calls, those answered from the cache not counted."""
        self._states: OrderedDict[str, CoresetState] = OrderedDict()

    def select(self, features: Tensor, num: int, start: int | Tensor = 0) -> Tensor:
        """The same as `greedy_coreset(features, num, start)`."""
        key = _fingerprint(features, torch.as_tensor(start))
        known = self._states.pop(key, None)
        state = extend_coreset(features, num, start, known)
        self.num_chosen += len(state.order) - (0 if known is None else len(known.order))
        self._states[key] = state
        while len(self._states) > self.capacity:
            self._states.popitem(last=False)
        return state.order[:num]


class _Selection:
    """One traversal: bounds of all points, centres so far."""

    def __init__(self, points: Tensor, num: int, start: int | Tensor, state: CoresetState | None) -> None:
        num_points, width = points.shape
        self.points = points
        self.order = torch.empty(num, dtype=torch.int64, device=points.device)
        self.num_chosen = 0
        self.num_candidates = min(num_points, max(SMALLEST_ROUND, CANDIDATE_FLOATS // width))

        # Centring makes norms, and with them rounding errors of the products, as small as they can be. bfloat16 keeps
        # a shift of a few bits, so that points on a grid stay on one and their ties stay exact.
        self.shift = points.mean(dim=0, dtype=torch.float64).bfloat16().double()
        self.screen_dtype = _screen_dtype(points)
        self.centres = torch.empty(num, width + 1, dtype=self.screen_dtype, device=points.device)
        norms = torch.cat([self._centred(rows).square().sum(dim=1) for rows in points.split(_rows_at_once(width))])
        self.largest_norm = norms.max().sqrt()
        if not bool(self.largest_norm.isfinite()):
            raise ValueError("features must be finite, found NaN or infinity")
        self.tie = 1e-12 * float(self.largest_norm) ** 2

        if state is not None:
            self.bound, self.num_seen = state.bound.clone(), state.num_seen.clone()
            for index in state.order.to(points.device):
                self._append(index, self._centred(points[index]))
            return
        self.bound = self._starting_bound(start)
        self.num_seen = torch.zeros(num_points, dtype=torch.int64, device=points.device)
        if isinstance(start, int):
            self._append(torch.tensor(start, device=points.device), self._centred(points[start]))
            self.num_seen += 1
            self.bound[start] = -1.0

    def _centred(self, rows: Tensor) -> Tensor:
        """(..., D) rows as float64, minus the shift; exact."""
        return rows.double() - self.shift

    def _starting_bound(self, start: int | Tensor) -> Tensor:
        """(N,) squared distance to the first centre, or squared mean distance to the starting points."""
        first = torch.as_tensor(start, device=self.points.device).reshape(-1)
        centres = self._centred(self.points[first])
        pieces = [
            torch.stack([(self._centred(rows) - centre).square().sum(dim=1).sqrt() for centre in centres]).mean(dim=0)
            for rows in self.points.split(_rows_at_once(self.points.shape[1]))
        ]
        return torch.cat(pieces).square()

    def _append(self, index: Tensor, centre: Tensor) -> None:
        """Makes a point the next centre. `centre` is its (D,) centred float64 row."""
        self.order[self.num_chosen] = index
        self.centres[self.num_chosen, :-1] = -2 * centre
        self.centres[self.num_chosen, -1] = centre.square().sum()
        self.num_chosen += 1

    def choose_round(self) -> None:
        """Refreshes the points with the largest bounds and chooses among them while that is certain to be right."""
        num_points, num = len(self.points), len(self.order)
        everyone = self.num_candidates == num_points
        largest = self.bound.topk(min(num_points, self.num_candidates + 1))
        outside = -1.0 if everyone else float(largest.values[-1])
        indices = largest.indices[: self.num_candidates].sort().values  # the lowest index is the first row
        rows = self._centred(self.points.index_select(0, indices))
        bound = self._refresh(rows, self.bound[indices], self.num_seen[indices])

        norms = rows.square().sum(dim=1)
        num_before = self.num_chosen
        while self.num_chosen < num:
            farthest = bound.max()
            if not everyone and float(farthest) <= outside + self.tie:  # someone outside may be as far
                break
            chosen = (bound >= farthest - self.tie).byte().argmax()
            centre = rows[chosen]
            self._append(indices[chosen], centre)
            distance = torch.addmv(norms + norms[chosen], rows, centre, alpha=-2).clamp_(min=0)
            bound = torch.where(bound < 0, bound, torch.minimum(bound, distance))
            bound[chosen] = -1.0
        self.bound[indices] = bound
        self.num_seen[indices] = self.num_chosen
        if self.num_chosen == num_before and bool((self.bound[indices] >= outside).all()):
            # More equally far points than candidates: only a larger round can tell which has the lowest index.
            self.num_candidates = min(num_points, 2 * self.num_candidates)

    def _refresh(self, rows: Tensor, bound: Tensor, num_seen: Tensor) -> Tensor:
        """(K,) squared distances to the nearest of all centres, from those to the nearest of the first `num_seen`.

        Products in float32 rule out the centres that cannot be the nearest; what is left, about one per improved
        row, is measured exactly.
        """
        ones = torch.ones_like(rows[:, :1])
        queries = torch.cat([rows, ones], dim=1).to(self.screen_dtype)
        norms = rows.square().sum(dim=1)
        # |fl(a.b) - a.b| <= n u |a||b| for n terms and unit roundoff u (Higham 2002, eq. 3.5), and rounding the
        # operands costs as much as a few terms more.
        unit = torch.finfo(self.screen_dtype).eps / 2
        error = (2 * (rows.shape[1] + 4) * unit) * (norms.sqrt() + self.largest_norm) ** 2
        bound = bound.clone()
        by_age = num_seen.argsort()  # rows that missed the same centres side by side
        for some in by_age.split(max(1, min(512, SCREEN_FLOATS // max(1, self.num_chosen)))):
            oldest = int(num_seen[some[0]])
            if oldest == self.num_chosen:
                continue
            screened = queries[some] @ self.centres[oldest : self.num_chosen].T  # |c|^2 - 2 x.c
            smallest = screened.amin(dim=1) + norms[some]
            improved = smallest < bound[some] + error[some]
            if not bool(improved.any()):
                continue
            some, screened = some[improved], screened[improved]
            limit = smallest[improved] + 2 * error[some] - norms[some]
            row, centre = (screened <= limit[:, None]).nonzero(as_tuple=True)
            for r, c in zip(row.split(4096), centre.split(4096), strict=True):
                centres = self._centred(self.points.index_select(0, self.order[oldest + c]))
                exact = (rows.index_select(0, some[r]) - centres).square().sum(dim=1)
                bound.scatter_reduce_(0, some[r], exact, "amin")
        return bound


def random_projection(features: Tensor, dim: int | None, generator: torch.Generator) -> Tensor:
    """Features in fewer dimensions, for the distances of a coreset.

    PatchCore's official code maps features through a fresh `nn.Linear(D, 128, bias=False)`: weights uniform in
    [-1 / sqrt(D), 1 / sqrt(D)]. The scale does not matter to farthest-first choices.

    Args:
        features: (N, D) points.
        dim: dimensions wanted; None, or `dim >= D`, leaves the features as they are, since a map to as many or more
            dimensions would only blur distances.
        generator: CPU generator of the draw.

    Returns:
        (N, dim) projected features, or `features` itself.
    """
    if dim is None or dim >= features.shape[1]:
        return features
    return features @ draw_projection(features.shape[1], dim, generator).to(features)


def draw_projection(width: int, dim: int, generator: torch.Generator) -> Tensor:
    """(width, dim) float32 matrix of a random projection, drawn on the CPU so that it is equal on every device."""
    return (torch.rand(width, dim, generator=generator) * 2 - 1) / width**0.5


def _screen_dtype(points: Tensor) -> torch.dtype:
    """float32 where its products are computed as such; float64 where the user allowed TF32 or bfloat16 for them."""
    full_precision = torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if full_precision and points.dtype != torch.float64 else torch.float64


def _fingerprint(*tensors: Tensor) -> str:
    """Hash of shapes, dtypes and contents."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _rows_at_once(width: int) -> int:
    return max(1, SCREEN_FLOATS // width)


def _check(features: Tensor, num: int, start: int | Tensor) -> None:
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"features must be (N, D) with D > 0, got shape {tuple(features.shape)}")
    if not 1 <= num <= len(features):
        raise ValueError(f"num must be in [1, {len(features)}], the number of features, got {num}")
    starts = torch.as_tensor(start).reshape(-1)
    if len(starts) == 0 or int(starts.min()) < 0 or int(starts.max()) >= len(features):
        raise ValueError(f"start must be indices in [0, {len(features)}), got {start}")
