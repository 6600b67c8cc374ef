"""Runs, detectors or backbones against each other: differences with intervals, verdicts and average ranks.

Every difference is judged with two kinds of chance in mind, the draw of the test images and the seeds; see
`harness.intervals`. Holm's correction keeps the chance of even one false verdict at 5 % among all of one metric and one
level (categories, datasets, everything).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from harness.contracts import AdgridError, ResultRow
from harness.estimates import Estimator, LoadScores, Scores
from harness.identity import content_id
from harness.intervals import Estimate, add_variances, holm
from harness.matching import Matches, Pair, Place, Unmatched, match_rows
from harness.matrices import show_value
from harness.metrics import METRICS
from harness.ranks import AverageRanks, average_ranks
from harness.registry import suggest

Level = Literal["category", "dataset", "everything"]
Verdict = Literal["better", "worse", "not distinguishable"]

_LEVELS: tuple[Level, ...] = ("category", "dataset", "everything")


@dataclass(frozen=True, kw_only=True)
class Delta:
    """How much a candidate is above the baseline, on one category or in the mean."""

    metric: str
    level: Level
    candidate: str
    baseline: str
    line: str
    """The axes that are equal on both sides, such as method and backbone; empty at the level `everything`."""
    dataset: str
    """Empty at the level `everything`."""
    category: str
    """Empty but for the level `category`."""
    num_places: int
    """Categories behind the number, counted for every line."""
    num_missing: int
    """Categories of this mean that were run on one side alone, and so are not in it."""
    num_seeds: tuple[int, int]
    """Of the candidate and of the baseline."""
    candidate_value: float
    """Rate in [0, 1], mean over seeds."""
    baseline_value: float
    value: float
    """Candidate less baseline."""
    over_images: Estimate
    over_seeds: Estimate
    total: Estimate
    """Both sources of chance together; what the verdict rests on."""
    adjusted_p: float | None = None
    """By Holm, among all deltas of the metric and level."""
    verdict: Verdict = "not distinguishable"
    note: str = ""
    """`no interval`: neither images nor seeds tell. `seeds alone`: the interval leaves the images out."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that a comparison found."""

    matches: Matches
    metrics: tuple[str, ...]
    deltas: tuple[Delta, ...]
    ranks: Mapping[str, AverageRanks]
    """By metric; absent where fewer than two categories have every contestant."""
    confidence: float

    def select(self, metric: str, level: Level) -> list[Delta]:
        """Deltas of one metric and level, in order."""
        return [delta for delta in self.deltas if (delta.metric, delta.level) == (metric, level)]


def compare_rows(
    sides: Mapping[str, Sequence[ResultRow]],
    load_scores: LoadScores,
    *,
    axis: str = "run",
    baseline: str | None = None,
    ignore: Sequence[str] = (),
    metrics: Sequence[str] = ("image_auroc",),
    interval: Literal["delong", "bootstrap"] = "delong",
    confidence: float = 0.95,
) -> Comparison:
    """Compares the values of an axis with one of them; see `harness.matching.match_rows` for what is compared.

    Args:
        sides: rows by the name of the run.
        load_scores: image scores of a cell, for intervals over images.
        axis: the axis compared.
        baseline: the value that others are compared with; None for the first.
        ignore: fields that may differ as well.
        metrics: names in `METRICS`.
        interval: how intervals of AUROC over images are made; other metrics of image scores are bootstrapped anyway.
        confidence: of every interval; verdicts use its complement as their level.

    Raises:
        AdgridError: an unknown name, or nothing that can be compared.
    """
    for name in metrics:
        if name not in METRICS:
            raise AdgridError(f"--metric {name}: unknown metric{suggest(name, METRICS)}")
    matches = match_rows(sides, axis, baseline, ignore)
    if not matches.pairs:
        reasons = dict.fromkeys(item.reason for item in matches.unmatched)
        raise AdgridError(
            f"nothing can be compared: no rows agree in all but {axis!r}. {'; '.join(list(reasons)[:4])}. Name another "
            f"--axis, allow what may differ with --ignore FIELD, or narrow the rows with --where"
        )
    scores = Scores(load_scores)
    deltas: list[Delta] = []
    for metric in metrics:
        pairs = [pair for pair in matches.pairs if _has_metric(pair, metric)]
        if not pairs:
            known = dict.fromkeys(name for pair in matches.pairs for row in pair.candidate_rows for name in row.metrics)
            raise AdgridError(f"--metric {metric}: no pair of rows has it; they have {', '.join(known)}")
        estimator = Estimator(metric, interval, scores)
        for level in _LEVELS:
            found = [
                _make_delta(estimator, level, line, group, matches) for line, group in _gather(pairs, level, matches)
            ]
            deltas += _judge(found, confidence)
    return Comparison(
        matches=matches,
        metrics=tuple(metrics),
        deltas=tuple(deltas),
        ranks={name: ranks for name in metrics if (ranks := _rank(matches, name, confidence)) is not None},
        confidence=confidence,
    )


def _has_metric(pair: Pair, metric: str) -> bool:
    return all(metric in row.metrics for row in (*pair.candidate_rows, *pair.baseline_rows))


# --- from pairs to deltas ----------------------------------------------------------------------------------------


def _gather(pairs: Sequence[Pair], level: Level, matches: Matches) -> list[tuple[str, list[Pair]]]:
    """Pairs that make one number together, with the text of their line; a hole leaves no number."""
    texts = line_texts([pair.place for pair in matches.pairs])
    failed = {
        (item.candidate, _line_key(item.place), item.place.dataset) for item in matches.unmatched if item.has_failed
    }
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        line = _line_key(pair.place)
        where = {
            "category": (line, pair.place.dataset, pair.place.category),
            "dataset": (line, pair.place.dataset),
            "everything": (),
        }[level]
        groups.setdefault((pair.candidate, *where), []).append(pair)
    gathered = []
    for members in groups.values():
        first = members[0]
        holed = {(pair.candidate, _line_key(pair.place), pair.place.dataset) for pair in members} & failed
        if level == "everything":
            holed = {key for key in failed if key[0] == first.candidate}
        if level == "category" or not holed:
            gathered.append(("" if level == "everything" else texts[_line_key(first.place)], members))
    datasets = list(dict.fromkeys(pair.place.dataset for pair in pairs))
    candidates = list(matches.candidates)

    def order(item: tuple[str, list[Pair]]) -> tuple[object, ...]:
        line, (first, *_) = item
        return candidates.index(first.candidate), line, datasets.index(first.place.dataset), first.place.category

    return sorted(gathered, key=order)


def _line_key(place: Place) -> Place:
    return dataclasses.replace(place, dataset="", category="")


def line_texts(places: Iterable[Place]) -> dict[Place, str]:
    """What a line is called: its fields that are not freed, settings only where they vary."""
    known = list(places)
    lines = list(dict.fromkeys(_line_key(place) for place in known))
    params = {line: json.loads(line.params or "{}") for line in lines}
    varying = {
        (line.method, name)
        for line in lines
        for name, value in params[line].items()
        if any(other.method == line.method and params[other].get(name, value) != value for other in lines)
    }
    per_backbone = {(line.method, line.backbone, line.layers) for line in lines}
    per_dataset = {(place.dataset, place.shots) for place in known}
    shown = {
        "representation": len({line.representation for line in lines}) > 1,
        "layers": len(per_backbone) > len({key[:2] for key in per_backbone}),
        "shots": len(per_dataset) > len({dataset for dataset, _ in per_dataset}),
        "protocol": len({line.protocol for line in lines}) > 1,
    }
    texts = {}
    for line in lines:
        parts = [line.method, line.backbone]
        parts += [line.representation] * shown["representation"] + [line.layers] * shown["layers"]
        parts += ["all images" if line.shots == "all" else f"{line.shots} shots"] * shown["shots"]
        parts += [f"protocol {content_id(json.loads(line.protocol), 8)}"] * shown["protocol"]
        parts += [
            f"{name}={show_value(value)}" for name, value in params[line].items() if (line.method, name) in varying
        ]
        texts[line] = " · ".join(part for part in parts if part)
    return texts


def _make_delta(estimator: Estimator, level: Level, line: str, pairs: Sequence[Pair], matches: Matches) -> Delta:
    first = pairs[0]
    weights = _pair_weights(pairs)
    missing = _count_missing(level, pairs, matches)
    metric = estimator.metric
    candidate = sum(weight * _mean(pair.candidate_rows, metric) for weight, pair in zip(weights, pairs, strict=True))
    baseline = sum(weight * _mean(pair.baseline_rows, metric) for weight, pair in zip(weights, pairs, strict=True))
    over_images, over_seeds = estimator.over_images(pairs, weights), estimator.over_seeds(pairs, weights)
    return Delta(
        metric=metric,
        level=level,
        candidate=first.candidate,
        baseline=first.baseline,
        line=line,
        dataset="" if level == "everything" else first.place.dataset,
        category=first.place.category if level == "category" else "",
        num_places=len(pairs),
        num_missing=missing,
        num_seeds=(len(first.candidate_rows), len(first.baseline_rows)),
        candidate_value=candidate,
        baseline_value=baseline,
        value=candidate - baseline,
        over_images=over_images,
        over_seeds=over_seeds,
        total=add_variances(candidate - baseline, (over_images, over_seeds)),
        note=_explain(over_images, over_seeds),
    )


def _pair_weights(pairs: Sequence[Pair]) -> list[float]:
    """Mean over the categories of a dataset, then over lines and datasets."""
    counts: dict[tuple[Place, str], int] = {}
    for pair in pairs:
        key = (_line_key(pair.place), pair.place.dataset)
        counts[key] = counts.get(key, 0) + 1
    return [1 / len(counts) / counts[_line_key(pair.place), pair.place.dataset] for pair in pairs]


def _count_missing(level: Level, pairs: Sequence[Pair], matches: Matches) -> int:
    if level == "category":
        return 0
    keys = {(_line_key(pair.place), pair.place.dataset) for pair in pairs}
    return sum(
        item.candidate == pairs[0].candidate
        and (level == "everything" or (_line_key(item.place), item.place.dataset) in keys)
        for item in matches.unmatched
    )


def _mean(rows: Sequence[ResultRow], metric: str) -> float:
    return float(np.mean([row.metrics[metric] for row in rows]))


def _explain(over_images: Estimate, over_seeds: Estimate) -> str:
    if over_images.variance is not None:
        return ""
    return "no interval" if over_seeds.variance is None else "seeds alone"


def _judge(deltas: Sequence[Delta], confidence: float) -> list[Delta]:
    adjusted = holm([delta.total.p_value() for delta in deltas])
    judged = []
    for delta, p in zip(deltas, adjusted, strict=True):
        verdict: Verdict = "not distinguishable"
        if p is not None and p < 1 - confidence:
            verdict = "better" if delta.value > 0 else "worse"
        judged.append(dataclasses.replace(delta, adjusted_p=p, verdict=verdict))
    return judged


# --- ranks -----------------------------------------------------------------------------------------------------


def _rank(matches: Matches, metric: str, confidence: float) -> AverageRanks | None:
    """Ranks on every category that has all contestants, each by its mean over seeds and over lines that all have.

    One category is one test set however many lines there are, since those share its images.
    """
    names = (matches.baseline, *matches.candidates)
    found: dict[Place, dict[str, float]] = {}
    for pair in matches.pairs:
        if _has_metric(pair, metric):
            at = found.setdefault(pair.place, {})
            at[pair.candidate] = _mean(pair.candidate_rows, metric)
            at[pair.baseline] = _mean(pair.baseline_rows, metric)
    tests: dict[tuple[str, str], list[list[float]]] = {}
    for place, values in found.items():
        if len(values) == len(names):
            tests.setdefault((place.dataset, place.category), []).append([values[name] for name in names])
    if len(tests) < 2:
        return None
    return average_ranks(names, np.array([np.mean(values, axis=0) for values in tests.values()]), confidence)


# --- the gate --------------------------------------------------------------------------------------------------


def find_regressions(comparison: Comparison, margin: float) -> list[str]:
    """Why a gate fails: means over a dataset that lost more than `margin`, and baseline numbers without counterpart.

    The mean itself counts and not its verdict: a gate repeats the same images and seeds, so what is lost there is lost,
    and a small test set must not hide it.

    Args:
        comparison: what was found.
        margin: rate in [0, 1] that a mean may lose.
    """
    reasons = [
        f"{delta.metric}, {_name(delta)}: {100 * delta.value:+.2f} points ({delta.verdict})"
        for delta in comparison.deltas
        if delta.level == "dataset" and delta.value < -margin - 1e-12
    ]
    lost: dict[tuple[str, str], list[Unmatched]] = {}
    for item in comparison.matches.unmatched:
        if item.has_baseline:
            lost.setdefault((item.candidate, item.reason), []).append(item)
    reasons += [
        f"{candidate}: {len(items)} numbers of {comparison.matches.baseline} have no counterpart: {reason}"
        for (candidate, reason), items in lost.items()
    ]
    return reasons


def _name(delta: Delta) -> str:
    return " · ".join(filter(None, [delta.candidate, delta.line, delta.dataset, delta.category]))
