"""Whether trials fit a cluster, and how many at once: plain arithmetic over bundles and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.contracts import AdgridError, Job, Pretraining, Resources, Trial

Amounts = Mapping[str, float]
"""Resource name to amount, as Ray has it: `CPU`, `GPU`, `memory` in bytes."""
_FIELDS = {"CPU": "cpu", "GPU": "gpu", "memory": "memory_gib"}


def worker_bundle(resources: Resources) -> dict[str, float]:
    """What one worker of a trial asks of a node; what it does not need has no key."""
    bundle = {"CPU": resources.cpu, "GPU": resources.gpu, "memory": resources.memory_gib * 2**30}
    return {name: amount for name, amount in bundle.items() if amount}


def count_places(bundle: Amounts, nodes: Sequence[Amounts]) -> int:
    """How many such bundles fit the empty nodes at once."""
    return sum(min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items()) for node in nodes)


def job_name(job: Job) -> str:
    """The method of a trial, or what a pretraining trains."""
    return job.kind if isinstance(job, Pretraining) else job.method


def read_cluster_limits(path: str) -> list[dict[str, float]]:
    """What each node has that the Ray autoscaler may start at most, by a file of the Ray cluster launcher.

    Raises:
        AdgridError: no such file, or it does not say what its nodes have.
    """
    try:
        described = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise AdgridError(
            f"--cluster-config {path}: cannot be read ({error}); name the file given to `ray up`"
        ) from None
    types = described.get("available_node_types") if isinstance(described, dict) else None
    if not types:
        raise AdgridError(
            f"--cluster-config {path}: has no available_node_types, so nothing says what may be added; leave the "
            f"option out for a cluster of fixed nodes"
        )
    total = int(described.get("max_workers", 2))
    limits: list[dict[str, float]] = []
    for name, kind in types.items():
        resources: dict[str, Any] = kind.get("resources") or {}
        for needed in ("CPU", "memory"):
            if needed not in resources:
                raise AdgridError(
                    f"--cluster-config {path}, available_node_types.{name}.resources: has no {needed}, by which "
                    f"trials are placed; add it{' in bytes' if needed == 'memory' else ''}"
                )
        is_head = name == described.get("head_node_type")
        most = 1 if is_head else min(int(kind.get("max_workers", total)), total)
        limits += [{key: float(amount) for key, amount in resources.items()}] * most
    return limits


def check_placement(trials: Sequence[Job], nodes: Sequence[Amounts], more: str = "add nodes") -> None:
    """Raises AdgridError if a trial could not be placed on the empty cluster: it would wait for ever.

    Args:
        trials: what is to run.
        nodes: what each node has that is there or may be added.
        more: how to get more nodes, for the error.
    """
    for resources, trial in {trial.resources: trial for trial in trials}.items():
        bundle = worker_bundle(resources)
        for name, wanted in bundle.items():
            largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if wanted > largest:
                if name == "memory":
                    raise AdgridError(_too_large(trial, largest, more))
                raise AdgridError(
                    f"resources.{_FIELDS[name]}: a worker of {job_name(trial)!r} asks for {wanted:g} {name}, and the "
                    f"largest node has {largest:g}; lower resources.{_FIELDS[name]} or {more}"
                )
        needed = resources.min_workers or resources.workers
        places = count_places(bundle, nodes)
        if places < needed:
            # Named is what would run out first if the nodes were one.
            scarce = min(bundle, key=lambda name: sum(node.get(name, 0.0) for node in nodes) / bundle[name])
            raise AdgridError(
                f"resources.workers: {job_name(trial)!r} needs {needed} workers of {bundle[scarce]:g} {scarce} each, "
                f"and the cluster has places for {places}; lower resources.workers or {more}"
            )


def _too_large(trial: Job, largest: float, more: str) -> str:
    """Why the memory of no node is enough for a trial, and what to do."""
    wanted, has = trial.resources.memory_gib, f"the largest node has {largest / 2**30:.1f} GiB for Ray"
    footprint = trial.footprint if isinstance(trial, Trial) else None
    if footprint is None or wanted != footprint.memory_gib:
        return (
            f"resources.memory_gib: a worker of {job_name(trial)!r} asks for {wanted:g} GiB of memory, and {has}; "
            + (f"lower resources.memory_gib or {more}")
        )
    assert isinstance(trial, Trial)
    return (
        f"{trial.method} · {trial.backbone or 'no backbone'} · {trial.dataset.name} is expected to need {wanted:g} GiB "
        f"of memory ({footprint.largest}), and {has}; reduce it (shots, a smaller protocol.image_size, backbone or "
        f"coreset_ratio), {more}, or set resources.memory_gib if you know better"
    )


def max_in_flight(trials: Sequence[Job], nodes: Sequence[Amounts]) -> int:
    """How many trials the nodes hold at once, their workers included.

    Trials of one process: if all were as small as the smallest, since Ray keeps the others waiting. Groups of workers:
    if all were as large as the largest, since a group that waits for places gives up after a while.
    """
    sizes = [count_places(worker_bundle(trial.resources), nodes) // trial.resources.workers for trial in trials]
    grouped = any(trial.resources.workers > 1 for trial in trials)
    return max(1, min(sizes) if grouped else max(sizes))
