"""Whether trials fit a cluster, and how many at once: plain arithmetic over bundles and nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.contracts import AdgridError, Job, Pretraining, Resources

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


def check_placement(trials: Sequence[Job], nodes: Sequence[Amounts]) -> None:
    """Raises AdgridError if a trial could not be placed on the empty cluster: it would wait for ever."""
    for resources, trial in {trial.resources: trial for trial in trials}.items():
        bundle = worker_bundle(resources)
        for name, wanted in bundle.items():
            largest = max((node.get(name, 0.0) for node in nodes), default=0.0)
            if wanted > largest:
                unit = 2.0**30 if name == "memory" else 1.0
                raise AdgridError(
                    f"resources.{_FIELDS[name]}: a worker of {job_name(trial)!r} asks for {wanted / unit:g} {name}"
                    f"{' GiB' if name == 'memory' else ''}, and the largest node has {largest / unit:g}; lower "
                    f"resources.{_FIELDS[name]} or add nodes"
                )
        needed = resources.min_workers or resources.workers
        places = count_places(bundle, nodes)
        if places < needed:
            # Named is what would run out first if the nodes were one.
            scarce = min(bundle, key=lambda name: sum(node.get(name, 0.0) for node in nodes) / bundle[name])
            raise AdgridError(
                f"resources.workers: {job_name(trial)!r} needs {needed} workers of {bundle[scarce]:g} {scarce} each, "
                f"and the cluster has places for {places}; lower resources.workers or add nodes"
            )


def max_in_flight(trials: Sequence[Job], nodes: Sequence[Amounts]) -> int:
    """How many trials the nodes hold at once, their workers included.

    Trials of one process: if all were as small as the smallest, since Ray keeps the others waiting. Groups of workers:
    if all were as large as the largest, since a group that waits for places gives up after a while.
    """
    sizes = [count_places(worker_bundle(trial.resources), nodes) // trial.resources.workers for trial in trials]
    grouped = any(trial.resources.workers > 1 for trial in trials)
    return max(1, min(sizes) if grouped else max(sizes))
