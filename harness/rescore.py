"""New numbers from stored predictions, without a model: another protocol, or backbones that vote together.

What was read, resized and cropped is settled when a method predicts; smoothing, reduction to image scores and metrics
come after, and can be had again from the maps. The rows are those that a run under the new protocol would make.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import ValidationError

from harness.contracts import AdgridError, EvaluationProtocol, ResultRow
from harness.details import publish_details, score_again
from harness.evaluate import score_columns, stored_samples
from harness.identity import canonical_json, content_id, protocol_id
from harness.maps import full_resolution
from harness.metrics import METRIC_VERSION, MetricError
from harness.quantisation import MapError, quantise
from harness.registry import load_method
from harness.resolve import resolve_protocol
from harness.rows import scored_row
from harness.run_folder import RunRecord
from harness.space import ProtocolEntry
from harness.store import Store, StoredPrediction

CHANGEABLE = ("smoothing", "score_reduction", "aupro_limit", "cropped_anomaly")
"""Fields of a protocol that come after the prediction."""
ENSEMBLE_VERSION = 1
"""Raised when the maps of an ensemble move."""
_TO_SIGMA = 1.4826  # of a normal distribution: standard deviation over median absolute deviation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescored:
    """A run made from another by scoring it again."""

    run_id: str
    num_scored: int
    """Rows computed now; the others were in the store."""
    notes: tuple[str, ...]
    """Why a row has no number."""


def rescore_run(
    store: Store, record: RunRecord, overrides: Sequence[str], ensemble: bool, cache_dir: str, command: str
) -> Rescored:
    """Scores the rows of a run again and keeps the outcome as a run of its own.

    Args:
        store: holds the run and its predictions.
        record: the run.
        overrides: `protocol.field=value` texts.
        ensemble: add, for every setting that several backbones share, their mean.
        cache_dir: node-local cache, for masks.
        command: what remakes this, for provenance.

    Raises:
        AdgridError: a field that cannot be changed without predicting again, or a value it cannot have.
    """
    if not record.rows:
        raise AdgridError(f"run {record.run_id} has no rows yet; run its space first")
    changes = dict(map(_parse_change, overrides))
    run_id = f"{record.name}-{content_id([record.run_id, changes, ensemble], 8)}"
    made: list[ResultRow] = []
    notes: list[str] = []
    known = store.load_rows()
    num_scored = 0
    for row in record.rows:
        new, is_new = _rescore_row(store, row, changes, known, cache_dir, command, run_id)
        made.append(dataclasses.replace(new, trial_id=row.trial_id, tuned=row.tuned))
        num_scored += is_new
        if new.status != "ok":
            notes.append(f"{row.method} on {row.dataset}/{row.category}: {new.reason}")
    if ensemble:
        groups = _group_backbones(made)
        if not groups:
            raise AdgridError(f"run {record.run_id}: no setting has predictions of several backbones, nothing to join")
        for members in groups:
            try:
                made.append(_join(store, members, cache_dir, command, run_id))
                num_scored += 1
            except (AdgridError, MetricError, OSError) as error:
                notes.append(f"no ensemble on {members[0].dataset}/{members[0].category}: {error}")
    _keep_run(store, record, run_id, made, command)
    return Rescored(run_id=run_id, num_scored=num_scored, notes=tuple(notes))


def _parse_change(override: str) -> tuple[str, Any]:
    field, sign, text = override.partition("=")
    name = field.removeprefix("protocol.")
    if not sign or name == field:
        raise AdgridError(f"--set {override}: write protocol.FIELD=VALUE, such as protocol.aupro_limit=0.05")
    if name not in CHANGEABLE:
        known = ", ".join(f"protocol.{one}" for one in CHANGEABLE)
        raise AdgridError(
            f"--set {override}: stored predictions can be scored anew with other values of {known}; for "
            f"anything else `adgrid run` the space with the same --set"
        )
    try:
        return name, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AdgridError(f"--set {override}: {text!r} is not a value") from error


def change_protocol(protocol: Mapping[str, Any], changes: Mapping[str, Any]) -> EvaluationProtocol:
    """A row's protocol with some fields replaced, checked as a search space is."""
    try:
        return ProtocolEntry.model_validate({**protocol, **changes}).resolved()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdgridError(f"--set protocol.{where}={first['input']}: {first['msg']}") from None
    except ValueError as error:
        raise AdgridError(f"--set protocol: {error}") from None


def _rescore_row(
    store: Store,
    row: ResultRow,
    changes: Mapping[str, Any],
    known: Mapping[str, ResultRow],
    cache_dir: str,
    command: str,
    run_id: str,
) -> tuple[ResultRow, bool]:
    """The row under the changed protocol, and whether it was computed now."""
    asked = change_protocol(row.protocol, changes)
    if row.status != "ok":
        reason = row.reason or f"{row.status} in the run that is scored again"
        return _without_number(store, row, asked, reason, command, run_id), False
    fixed = dataclasses.replace(asked, interpolation=row.resolved_protocol["interpolation"])
    resolved = resolve_protocol(fixed, load_method(row.method), None)
    own_score, truth_id = asked.score_reduction == "method", row.provenance["truth_fingerprint"]
    cell_id = content_id([row.prediction_id, dataclasses.asdict(resolved), own_score, METRIC_VERSION, truth_id])
    found = known.get(cell_id)
    if found is not None and found.status == "ok":
        return found, False
    prediction, columns = store.load_prediction(row.prediction_id), store.load_scores(row.cell_id)
    if prediction is None or columns is None:
        reason = "its predictions were not kept (too large, or removed to make room); run the space again"
        return _without_number(store, row, asked, reason, command, run_id), False
    try:
        new = _score(store, row, cell_id, prediction, columns, asked, resolved, cache_dir, command, run_id)
    except (AdgridError, MetricError, OSError) as error:
        return _without_number(store, row, asked, f"{type(error).__name__}: {error}", command, run_id), False
    return new, True


def _score(
    store: Store,
    row: ResultRow,
    cell_id: str,
    prediction: StoredPrediction,
    columns: Mapping[str, Sequence[Any]],
    asked: EvaluationProtocol,
    resolved: EvaluationProtocol,
    cache_dir: str,
    command: str,
    run_id: str,
) -> ResultRow:
    start = time.perf_counter()
    test = stored_samples(columns, row.category)
    row = dataclasses.replace(row, protocol=dataclasses.asdict(asked))
    result = score_again(row, prediction, test, resolved, cache_dir)
    costs = {**row.costs, "evaluate_seconds": round(time.perf_counter() - start, 4)}
    new = scored_row(row, cell_id, result, prediction.facts, asked, resolved, costs, command, run_id)
    store.publish_scores(cell_id, score_columns(test, result))
    store.publish_row(new)
    try:
        publish_details(store, new, prediction, test, result, with_pictures=True)
    except (AdgridError, OSError):  # images are elsewhere; a picture is no reason to lose a number
        publish_details(store, new, prediction, test, result, with_pictures=False)
    return new


def _without_number(
    store: Store, row: ResultRow, asked: EvaluationProtocol, reason: str, command: str, run_id: str
) -> ResultRow:
    new = dataclasses.replace(
        row,
        cell_id=content_id(["no number", row.cell_id, asked]),
        status="skipped",
        protocol=json.loads(canonical_json(asked)),
        protocol_id=protocol_id(asked),
        metrics={},
        metric_bounds={},
        reason=reason,
        provenance={**row.provenance, "command": command, "run_id": run_id},
    )
    store.publish_row(new)
    return new


# --- backbones together ----------------------------------------------------------------------------------------


def _group_backbones(rows: Sequence[ResultRow]) -> list[list[ResultRow]]:
    """Finished rows that differ in their backbone alone, where there are several."""
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        if row.status == "ok" and row.backbone is not None:
            axes = [row.method, row.representation, row.dataset, row.category, row.shots, row.seed, row.params]
            groups.setdefault(canonical_json([*axes, row.protocol]), []).append(row)
    return [members for members in groups.values() if len({row.backbone for row in members}) > 1]


def _join(store: Store, members: Sequence[ResultRow], cache_dir: str, command: str, run_id: str) -> ResultRow:
    """The row of several backbones together, from the mean of their maps."""
    first = members[0]
    predictions = [store.load_prediction(row.prediction_id) for row in members]
    columns = store.load_scores(first.cell_id)
    found = [prediction for prediction in predictions if prediction is not None]
    if columns is None or len(found) < len(members):
        raise AdgridError("the predictions of some backbone were not kept")
    if len({prediction.paths for prediction in found}) > 1:
        raise AdgridError("the backbones did not see the same images")
    joined = join_predictions(found)
    names = [str(row.backbone) for row in members]
    row = dataclasses.replace(
        first,
        prediction_id=content_id(["ensemble", ENSEMBLE_VERSION, sorted(row.prediction_id for row in members)]),
        trial_id=content_id(["ensemble", sorted(row.trial_id for row in members)]),
        backbone=f"ensemble of {len(members)}",
        layers=tuple(f"{row.backbone}:{layer}" for row in members for layer in row.layers),
        costs=_join_costs([row.costs for row in members]),
        stamps=tuple(
            dict.fromkeys(
                [
                    *(stamp for row in members for stamp in row.stamps),
                    f"mean of the maps of {', '.join(names)}, each on the scale of its median test pixel",
                    "normalised by test images",
                ]
            )
        ),
        provenance={
            **first.provenance,
            "weights_fingerprint": " + ".join(row.provenance.get("weights_fingerprint", "") for row in members),
            "ensemble_of": " + ".join(row.prediction_id for row in members),
        },
    )
    asked = change_protocol(row.protocol, {})
    fixed = dataclasses.replace(asked, interpolation=row.resolved_protocol["interpolation"])
    resolved = resolve_protocol(fixed, load_method(row.method), None)
    cell_id = content_id([row.prediction_id, dataclasses.asdict(resolved), row.protocol["score_reduction"]])
    store.publish_prediction(row.prediction_id, joined)
    return _score(store, row, cell_id, joined, columns, asked, resolved, cache_dir, command, run_id)


def join_predictions(members: Sequence[StoredPrediction]) -> StoredPrediction:
    """The mean of several predictions of the same images, each brought to a common scale.

    The scale is the median and the median absolute deviation of all pixels of a member's test maps: most pixels are
    normal, so this is about what is normal, and no label is seen; but test images are. Scores of their own are averaged
    alike, by median and deviation of the member's test scores; where a member has none, the mean map is
    reduced. Maps of different sizes are sampled up to the largest.

    Raises:
        AdgridError: a member whose maps are flat.
    """
    size = max((prediction.maps.values.shape[1:] for prediction in members), key=lambda shape: shape[0] * shape[1])
    total = np.zeros((len(members[0].paths), *size))
    offset = relative = absolute = 0.0
    for prediction in members:
        maps, error = prediction.anomaly_maps, prediction.maps.error
        middle, spread = _scale(maps)
        total += full_resolution(torch.from_numpy(maps), (size[0], size[1]), 0.0).numpy() / spread
        total -= middle / spread
        offset += (error.offset - middle) / spread
        relative, absolute = max(relative, error.relative), absolute + error.absolute / spread
    mean = (total / len(members)).astype(np.float32)
    earlier = MapError(offset / len(members), relative, absolute / len(members))
    scores = None
    if all(prediction.image_scores is not None for prediction in members):
        own = [np.asarray(prediction.image_scores, dtype=np.float64) for prediction in members]
        scaled = [(values - middle) / spread for values in own for middle, spread in [_scale(values)]]
        scores = np.mean(scaled, axis=0).astype(np.float32)
    facts = {**members[0].facts, "own_image_score": scores is not None, "curves": {}}
    return StoredPrediction(paths=members[0].paths, maps=quantise(mean, earlier), image_scores=scores, facts=facts)


def _scale(values: np.ndarray) -> tuple[float, float]:
    middle = float(np.median(values))
    spread = _TO_SIGMA * float(np.median(np.abs(values - middle))) or float(np.std(values))
    if not spread:
        raise AdgridError("the maps of a backbone are flat: they cannot be brought to a common scale")
    return middle, spread


def _join_costs(members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds add up, peaks are those of the largest, and images pass all members one after another."""
    shared = [name for name in members[0] if all(name in costs for costs in members)]
    joined = {}
    for name in shared:
        values = [costs[name] for costs in members]
        if name == "images_per_second":
            joined[name] = round(1 / sum(1 / max(value, 1e-9) for value in values), 2)
        else:
            joined[name] = sum(values) if name.endswith("_seconds") else max(values)
    return joined


def _keep_run(store: Store, record: RunRecord, run_id: str, rows: Sequence[ResultRow], command: str) -> None:
    trials: dict[str, list[ResultRow]] = {}
    for row in rows:
        trials.setdefault(row.trial_id, []).append(row)
    plan = {
        "name": record.name,
        "run_id": run_id,
        "command": command,
        "num_expected": len(rows) + record.num_expected - len(record.rows),
        "trials": [
            {
                "trial_id": trial_id,
                "tuned": dict(members[0].tuned) or None,
                "cell_ids": [row.cell_id for row in members],
            }
            for trial_id, members in trials.items()
        ],
        "samples": [],
        "studies": [],
    }
    store.publish(f"runs/{run_id}/plan.json", canonical_json(plan).encode())
