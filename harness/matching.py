"""Which rows may be compared with which: equal in everything but the axis that is compared.

Rows that differ in more are never matched in silence: what differs is named, field by field.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.contracts import AdgridError, ResultRow
from harness.matrices import NO_BACKBONE, show_value
from harness.registry import suggest

AXES = ("run", "method", "backbone", "representation", "layers", "shots", "seed")
"""Axes that can be compared; `params.<field>` is one too, and several joined by `+` are compared as one."""

_FREED = {"method": ("method", "params", "layers"), "backbone": ("backbone", "layers")}
"""Fields that follow from the axis compared; other axes free themselves alone."""
_BLOCKING_FACTS = {"truth_fingerprint": "ground truth of the test images", "metric_version": "version of the metrics"}
_TOLD_FACTS = {
    "weights_fingerprint": "weights of the backbone",
    "method_version": "version of the method",
    "representation_artifact": "trained representation",
    "images_fingerprint": "images",
    "git_commit": "commit of adgrid",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a number stands in the grid, the axis compared and the seed left out; freed fields are None."""

    dataset: str
    category: str
    method: str | None
    backbone: str | None
    representation: str | None
    layers: str | None
    """Joined by `+`."""
    shots: int | str | None
    """A number or `all`."""
    params: str | None
    """JSON."""
    protocol: str
    """JSON."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Finished rows of a candidate and of the baseline at one place, one per seed each."""

    candidate: str
    baseline: str
    place: Place
    candidate_rows: tuple[ResultRow, ...]
    baseline_rows: tuple[ResultRow, ...]


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """Rows at a place that were not compared."""

    candidate: str
    place: Place
    reason: str
    has_failed: bool = False
    """A row of either side ended without a number, so the place leaves a hole in every mean over it."""
    has_baseline: bool = True
    """The baseline has a number there."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """All rows, sorted into what can be compared and what cannot."""

    axis: str
    baseline: str
    candidates: tuple[str, ...]
    pairs: tuple[Pair, ...]
    unmatched: tuple[Unmatched, ...]
    notes: tuple[str, ...]
    """What else differs between rows that are compared."""


Group = dict[int, ResultRow]
"""Rows of one side at one place by seed."""


def match_rows(
    sides: Mapping[str, Sequence[ResultRow]], axis: str, baseline: str | None = None, ignore: Sequence[str] = ()
) -> Matches:
    """Pairs the rows of every value of an axis with those of one value, the baseline.

    Args:
        sides: rows by the name of the run. With the axis `run` the runs are compared; with another axis their rows are
            taken together.
        axis: one of `AXES` or `params.<field>`, or several of them joined by `+`, such as `method+backbone`.
        baseline: the value that others are compared with; None for the first.
        ignore: fields that may differ as well: `layers`, `shots`, `params` or `params.<field>`.

    Raises:
        AdgridError: an unknown axis, field or baseline, a single value, or two rows for the same thing.
    """
    _check_names(axis, ignore)
    groups = _group(sides, axis, ignore)
    values = list(groups)
    if baseline is not None and baseline not in values:
        raise AdgridError(f"--baseline {baseline}: axis {axis!r} has no such value{suggest(baseline, values)}")
    if len(values) < 2:
        found = f"only {values[0]!r}" if values else "none"
        hint = "name a second run, or an axis with several values" if axis == "run" else "name another --axis"
        raise AdgridError(f"--axis {axis}: comparing takes two values at least, the rows have {found}; {hint}")
    first = baseline or values[0]
    candidates = tuple(value for value in values if value != first)
    pairs: list[Pair] = []
    unmatched: list[Unmatched] = []
    for candidate in candidates:
        ours, theirs = groups[candidate], groups[first]
        for place in theirs:
            if place in ours:
                outcome = _match(place, candidate, first, ours[place], theirs[place], axis)
                if isinstance(outcome, Pair):
                    pairs.append(outcome)
                else:
                    unmatched.append(outcome)
        unmatched += _match_lone(candidate, first, ours, theirs)
    return Matches(
        axis=axis,
        baseline=first,
        candidates=candidates,
        pairs=tuple(pairs),
        unmatched=tuple(unmatched),
        notes=tuple(_tell_ignored(ignore) + _tell_facts(pairs, axis)),
    )


def _check_names(axis: str, ignore: Sequence[str]) -> None:
    for name in axis.split("+"):
        if name not in AXES and not name.startswith("params."):
            raise AdgridError(f"--axis {axis}: unknown axis {name!r}{suggest(name, (*AXES, 'params.<field>'))}")
    for field in ignore:
        if field not in ("layers", "shots", "params") and not field.startswith("params."):
            known = ("layers", "shots", "params", "params.<field>")
            raise AdgridError(f"--ignore {field}: this must be equal{suggest(field, known)}")


# --- groups ----------------------------------------------------------------------------------------------------


def _group(sides: Mapping[str, Sequence[ResultRow]], axis: str, ignore: Sequence[str]) -> dict[str, dict[Place, Group]]:
    """Value of the axis -> place -> seed -> row, in order of appearance."""
    axes = axis.split("+")
    freed = {field for name in axes for field in _FREED.get(name, (name,))} | set(ignore)
    groups: dict[str, dict[Place, Group]] = {name: {} for name in sides} if axis == "run" else {}
    for name, rows in sides.items():
        for row in rows:
            values = [name if each == "run" else axis_value(row, each) for each in axes]
            known_values = [value for value in values if value is not None]
            if not known_values:
                continue
            group = groups.setdefault(" · ".join(known_values), {}).setdefault(_place(row, freed), {})
            known = group.get(row.seed)
            group[row.seed] = row if known is None else _choose(known, row)
    if "method" in axes and "backbone" not in axes:
        _spread_without_backbone(groups)
    return groups


def axis_value(row: ResultRow, axis: str) -> str | None:
    """What stands on an axis, as text; None for a method without backbone on an axis that it lacks."""
    if row.backbone is None and axis in ("backbone", "representation", "layers"):
        return None
    if axis.startswith("params."):
        name = axis.removeprefix("params.")
        return show_value(row.params[name]) if name in row.params else None
    if axis == "layers":
        return "+".join(row.layers)
    if axis == "shots":
        return "all" if row.shots is None else str(row.shots)
    return str(getattr(row, axis))


def _place(row: ResultRow, freed: set[str]) -> Place:
    params = {name: value for name, value in row.params.items() if f"params.{name}" not in freed}
    everything: dict[str, Any] = {
        "method": row.method,
        "backbone": row.backbone or NO_BACKBONE,
        "representation": row.representation,
        "layers": "+".join(row.layers),
        "shots": "all" if row.shots is None else row.shots,
        "params": json.dumps(params, sort_keys=True),
    }
    return Place(
        dataset=row.dataset,
        category=row.category,
        protocol=json.dumps(dict(row.protocol), sort_keys=True),
        **{field: None if field in freed else value for field, value in everything.items()},
    )


def _choose(known: ResultRow, row: ResultRow) -> ResultRow:
    """The row that counts of two for one thing; two finished ones with different predictions are an error."""
    if known.status == row.status == "ok" and known.prediction_id != row.prediction_id:
        fields = ("method", "backbone", "representation", "layers", "shots", "seed", "params", "provenance")
        differing = [name for name in fields if getattr(known, name) != getattr(row, name)]
        what = " · ".join([row.method, row.backbone or NO_BACKBONE, row.dataset, row.category, f"seed {row.seed}"])
        raise AdgridError(
            f"two finished rows for {what}, which differ in {', '.join(differing) or 'their predictions'}; keep "
            f"one with --where AXIS=VALUE, or compare runs with --axis run"
        )
    if (known.status == "ok") != (row.status == "ok"):
        return known if known.status == "ok" else row
    return max(known, row, key=lambda each: each.provenance.get("finished_at", ""))


def _spread_without_backbone(groups: dict[str, dict[Place, Group]]) -> None:
    """A method without backbone stands beside every backbone of the others, as in the matrices."""
    taken = {
        (place.dataset, place.category, place.shots, place.protocol, place.backbone, place.representation)
        for by_place in groups.values()
        for place in by_place
        if place.backbone != NO_BACKBONE
    }
    for value, by_place in groups.items():
        spread: dict[Place, Group] = {}
        for place, group in by_place.items():
            own = (place.dataset, place.category, place.shots, place.protocol)
            beside = [key[4:] for key in sorted(taken, key=repr) if key[:4] == own]
            if place.backbone != NO_BACKBONE or not beside:
                spread[place] = group
            else:
                for backbone, representation in beside:
                    spread[dataclasses.replace(place, backbone=backbone, representation=representation)] = group
        groups[value] = spread


# --- pairs -----------------------------------------------------------------------------------------------------


def _match(place: Place, candidate: str, baseline: str, ours: Group, theirs: Group, axis: str) -> Pair | Unmatched:
    for name, group in ((candidate, ours), (baseline, theirs)):
        for row in group.values():
            if row.status != "ok":
                text = row.reason.splitlines()[0] if row.reason else "no reason given"
                reason = f"{name}, seed {row.seed}: {row.status}: {text}"
                return Unmatched(
                    candidate=candidate, place=place, reason=reason, has_failed=True, has_baseline=_has_number(theirs)
                )
    pair = Pair(
        candidate=candidate,
        baseline=baseline,
        place=place,
        candidate_rows=tuple(ours[seed] for seed in sorted(ours)),
        baseline_rows=tuple(theirs[seed] for seed in sorted(theirs)),
    )
    differences = _find_differences(pair, axis)
    if differences:
        return Unmatched(candidate=candidate, place=place, reason="; ".join(differences))
    return pair


def _find_differences(pair: Pair, axis: str) -> list[str]:
    """What keeps the rows of a pair from being compared though they stand at the same place."""
    baseline, candidate = pair.baseline_rows[0], pair.candidate_rows[0]
    axes = axis.split("+")
    found = []
    for name in dict.fromkeys([*baseline.resolved_protocol, *candidate.resolved_protocol]):
        values = [row.resolved_protocol.get(name) for row in (baseline, candidate)]
        # What the protocol leaves to the axis compared may differ: that is how the paper or the weights want it.
        if values[0] != values[1] and baseline.protocol.get(name) not in axes:
            found.append(_tell(f"protocol.{name}", *values))
    for key, title in _BLOCKING_FACTS.items():
        known = _fact(pair.baseline_rows, key), _fact(pair.candidate_rows, key)
        if all(known) and known[0] != known[1]:
            found.append(f"{title}: not the same")
    random = ["random weights" in row.stamps for row in (baseline, candidate)]
    if random[0] != random[1]:
        found.append(_tell("weights", *("random" if flag else "trained" for flag in random)))
    return found


def _match_lone(
    candidate: str, baseline: str, ours: Mapping[Place, Group], theirs: Mapping[Place, Group]
) -> list[Unmatched]:
    """Places of one side alone, and in which fields they differ from their like on the other."""
    same = ("dataset", "category", "method", "backbone", "representation")
    lone = {place: None for place in ours if place not in theirs}
    alike: dict[tuple[Any, ...], list[Place]] = {}
    for place in lone:
        alike.setdefault(tuple(getattr(place, name) for name in same), []).append(place)
    found, told = [], set()
    for place, group in theirs.items():
        if place in ours:
            continue
        others = alike.get(tuple(getattr(place, name) for name in same), [])
        reason = f"only in {baseline}"
        if others:
            nearest = min(others, key=lambda other: len(_place_differences(place, other)))
            reason = "; ".join(_place_differences(place, nearest))
            told.add(nearest)
        found.append(Unmatched(candidate=candidate, place=place, reason=reason, has_baseline=_has_number(group)))
    for place in lone:
        if place not in told:
            reason = f"only in {candidate}"
            found.append(Unmatched(candidate=candidate, place=place, reason=reason, has_baseline=False))
    return found


def _has_number(group: Group) -> bool:
    return all(row.status == "ok" for row in group.values())


def _place_differences(place: Place, other: Place) -> list[str]:
    """Field by field, `place` first."""
    found = [
        _tell(name, getattr(place, name), getattr(other, name))
        for name in ("layers", "shots")
        if getattr(place, name) != getattr(other, name)
    ]
    for prefix in ("params", "protocol"):
        mine, theirs = (json.loads(getattr(each, prefix) or "{}") for each in (place, other))
        found += [
            _tell(f"{prefix}.{name}", mine.get(name), theirs.get(name))
            for name in dict.fromkeys([*mine, *theirs])
            if mine.get(name) != theirs.get(name)
        ]
    return found


def _tell(field: str, first: Any, second: Any) -> str:
    return f"{field}: {show_value(first)} against {show_value(second)}"


def _fact(rows: Iterable[ResultRow], key: str) -> set[str]:
    return {row.provenance[key] for row in rows if row.provenance.get(key)}


# --- what else differs -----------------------------------------------------------------------------------------


def _tell_ignored(ignore: Sequence[str]) -> list[str]:
    return [f"{field} may differ between the rows compared (--ignore {field})" for field in ignore]


def _tell_facts(pairs: Sequence[Pair], axis: str) -> list[str]:
    """Facts outside the axis in which compared rows differ, with the number of pairs."""
    follows = {
        "method": {"method_version"},
        "backbone": {"weights_fingerprint", "representation_artifact"},
        "representation": {"representation_artifact"},
        "shots": {"images_fingerprint"},
    }
    skipped = {key for name in axis.split("+") for key in follows.get(name, ())}
    notes = []
    for key, title in _TOLD_FACTS.items():
        if key in skipped:
            continue
        differing = 0
        for pair in pairs:
            if key == "images_fingerprint" and not _reads_the_same_images(pair):
                continue
            known = _fact(pair.baseline_rows, key), _fact(pair.candidate_rows, key)
            differing += bool(known[0] and known[1] and known[0] != known[1])
        if differing:
            notes.append(f"{title}: not the same in {differing} of {len(pairs)} pairs")
    stamps: dict[str, int] = {}
    for pair in pairs:
        ours, theirs = (
            {stamp for row in rows for stamp in row.stamps} - {"rescored"}
            for rows in (pair.candidate_rows, pair.baseline_rows)
        )
        for stamp in sorted(ours ^ theirs):
            stamps[stamp] = stamps.get(stamp, 0) + 1
    notes += [f"{stamp}: said of one side alone in {number} of {len(pairs)} pairs" for stamp, number in stamps.items()]
    seeds = sum(_seeds(pair.baseline_rows) != _seeds(pair.candidate_rows) for pair in pairs)
    if seeds and "seed" not in axis.split("+"):
        notes.append(f"seeds: not the same in {seeds} of {len(pairs)} pairs, so they are not paired by seed")
    return notes


def _reads_the_same_images(pair: Pair) -> bool:
    """Whether the draw of training images is the same, so that other images mean other data."""
    is_whole = all(row.shots is None for row in (*pair.baseline_rows, *pair.candidate_rows))
    return is_whole or _seeds(pair.baseline_rows) == _seeds(pair.candidate_rows)


def _seeds(rows: Iterable[ResultRow]) -> list[int]:
    return [row.seed for row in rows]
