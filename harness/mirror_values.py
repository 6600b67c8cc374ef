"""What MLflow is told of rows: names, parameters, tags, numbers, curves and inputs. How it gets there is not said here.

Names are part of what people rely on; docs/mlflow.md lists them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.contracts import ResultRow, Trial
from harness.identity import content_id
from harness.matrices import NO_BACKBONE, show_value
from harness.metrics import METRICS
from harness.report import build_matrices, rows_frame

_MAX_KEY = 250

Point = tuple[str, int, float]
"""Key, step and value of one point of a curve."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """The images of a trial, as MLflow describes datasets."""

    name: str
    digest: str
    """Changes with any image, mask or label that the trial reads."""
    facts: Mapping[str, Mapping[str, str]]
    """Category -> fingerprints of its images and of its ground truth."""


@functools.lru_cache(maxsize=65536)
def metric_key(name: str) -> str:
    """A name that MLflow takes for a metric or parameter: letters, digits and `_ - . : / space`, 250 at most."""
    # MLflow reads a key as a path and refuses one that another path could mean.
    parts = [re.sub(r"[^\w.: -]", "_", part.replace("=", ":")) for part in name.split("/")]
    key = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    return key if len(key) <= _MAX_KEY else f"{key[: _MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# --- of a trial ------------------------------------------------------------------------------------------------


def child_name(of: ResultRow | Trial, dataset: str, searched: Sequence[str]) -> str:
    """`patchcore · resnet18 · mvtec_ad · seed 0`, with representation, shots and searched values if there are any."""
    shots = [] if of.shots is None else [f"{of.shots} shots"]
    representation = [] if of.representation == "plain" else [of.representation]
    return " · ".join(
        [of.method, of.backbone or "no backbone", *representation, dataset, *shots, f"seed {of.seed}", *searched]
    )


def describe_searched(tuned: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """The values of searched fields, or that they are the best ones."""
    if not tuned:
        return []
    values = [f"{field} {show_value(params[field])}" for field in tuned["fields"]]
    return [", ".join(values)] if tuned["is_sample"] else ["tuned"]


def child_params(row: ResultRow) -> dict[str, object]:
    """Every axis, `param.<field>` of the method and `protocol.<field>` of the evaluation."""
    axes: dict[str, object] = {
        "method": row.method,
        "backbone": row.backbone,
        "layers": "+".join(row.layers),
        "representation": row.representation,
        "dataset": row.dataset,
        "shots": "all" if row.shots is None else row.shots,
        "seed": row.seed,
        "protocol_id": row.protocol_id,
    }
    own = {f"param.{name}": value for name, value in row.params.items()}
    return {**axes, **own, **{f"protocol.{name}": value for name, value in row.protocol.items()}}


def child_tags(row: ResultRow) -> dict[str, str]:
    """What tells a trial from others of an experiment."""
    return {
        "kind": "sample" if row.tuned.get("is_sample") else "trial",
        "method": row.method,
        "backbone": row.backbone or "none",
        "representation": row.representation,
        "dataset": row.dataset,
        "shots": "all" if row.shots is None else str(row.shots),
        "seed": str(row.seed),
        "protocol_id": row.protocol_id,
    }


def child_numbers(rows: Iterable[ResultRow]) -> dict[str, float]:
    """`<metric>/<category>` and `<cost>/<category>`."""
    return {
        f"{name}/{row.category}": value for row in rows for name, value in (*row.metrics.items(), *row.costs.items())
    }


def child_curves(rows: Iterable[ResultRow]) -> dict[str, Sequence[float]]:
    """`loss/<stage>/<category>`, and `<stage>/<what it watched>/<category>`; a value per epoch."""
    return {
        curve_name(name, row.category): values
        for row in rows
        if row.status == "ok"
        for name, values in row.curves.items()
    }


def curve_name(curve: str, category: str) -> str:
    """Of a stage's loss, or of something else that it watched."""
    return f"{curve.replace('.', '/') if '.' in curve else f'loss/{curve}'}/{category}"


def curves_over_categories(
    rows: Iterable[ResultRow], cells: Mapping[str, str], known: Mapping[str, float]
) -> list[Point]:
    """`running_mean/<metric>`, the mean over the categories so far, and `system/peak_...` of each category.

    Args:
        rows: new ones; a step follows for each category that had no finished row, in the order in which they finished.
        cells: category -> status of the rows mirrored earlier.
        known: their numbers, by `metric_key` of `<metric>/<category>`.
    """
    numbers, points = dict(known), []
    done = [category for category, status in cells.items() if status == "ok"]
    for row in sorted(rows, key=lambda row: row.provenance.get("finished_at", "")):
        if row.status != "ok" or row.category in done:
            continue
        done.append(row.category)
        numbers |= {metric_key(name): value for name, value in child_numbers([row]).items()}
        for name in METRICS:
            values = [numbers.get(metric_key(f"{name}/{category}")) for category in done]
            if name in row.metrics and None not in values:
                points.append((f"running_mean/{name}", len(done), statistics.fmean(v for v in values if v is not None)))
        peaks = {name: value for name, value in row.costs.items() if name.startswith("peak_")}
        points += [(f"system/{name}", len(done), value) for name, value in peaks.items()]
    return points


def summarise(numbers: Mapping[str, float], categories: Sequence[str]) -> dict[str, float]:
    """Over all categories of a trial: means of metrics and speeds, sums of seconds, largest peaks.

    What one of them does not have is left out.
    """
    names = [metric_key(name) for name in categories]
    suffix = f"/{names[0]}"
    summaries = {}
    for name in [key.removesuffix(suffix) for key in numbers if key.endswith(suffix)]:
        keys = [f"{name}/{category}" for category in names]
        if not all(key in numbers for key in keys):
            continue
        values = [numbers[key] for key in keys]
        if name.endswith("_seconds"):
            summaries[name] = sum(values)
        elif name.startswith("peak_"):
            summaries[name] = max(values)
        elif name in METRICS or name.endswith("_per_second"):
            summaries[name] = statistics.fmean(values)
    return summaries


def describe_input(rows: Sequence[ResultRow]) -> Input | None:
    """The images that finished rows of one trial have read; None where one of them does not tell."""
    facts = {
        row.category: {
            "images": row.provenance.get("images_fingerprint", ""),
            "ground_truth": row.provenance.get("truth_fingerprint", ""),
        }
        for row in sorted(rows, key=lambda row: row.category)
        if row.status == "ok"
    }
    if not facts or any(not fact["images"] for fact in facts.values()):
        return None
    return Input(name=rows[0].dataset, digest=content_id(facts, 16), facts=facts)


def input_profile(found: Input) -> str:
    """What MLflow shows of an input."""
    return json.dumps({"categories": len(found.facts)})


# --- of a run --------------------------------------------------------------------------------------------------


def run_means(rows: Sequence[ResultRow]) -> dict[str, float]:
    """`<metric>/<dataset> <method> <backbone> <representation>`, and what else varies, for every number of a matrix.

    The first five parts are always there, so that runs of different spaces share their columns. There is one slash, as
    MLflow's charts take what stands before the last one for a heading.
    """
    matrices = build_matrices(rows_frame(rows))
    several = len({matrix.protocol_id for matrix in matrices}) > 1
    means = {}
    for matrix in matrices:
        members = [row for row in rows if row.protocol_id == matrix.protocol_id and row.backbone is not None]
        only = members[0].representation if members else "plain"
        for line in matrix.rows:
            labels = dict(zip(matrix.header, line.labels, strict=True))
            is_alone = labels["backbone"] == NO_BACKBONE
            labels["backbone"] = "none" if is_alone else labels["backbone"]
            labels["representation"] = "none" if is_alone else labels.get("representation", only)
            first = [labels.pop(name) for name in ("method", "backbone", "representation")]
            if "shots" in labels:
                labels["shots"] = f"{labels['shots']} shots"
            others = [text.replace(", ", " ") for text in labels.values() if text]
            for column, cell in zip(matrix.columns, line.cells, strict=True):
                if cell.value is not None:
                    protocol = [f"protocol {matrix.protocol_id}"] * several
                    place = " ".join([*protocol, column, *first, *others]).replace("/", ":")
                    means[f"{matrix.metric}/{place}"] = cell.value
    return means
