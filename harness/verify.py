"""Does this machine compute what others compute? Golden cells against pinned numbers, an accelerator against the CPU.

Everything here runs through the main job, as any search space does, so that Ray, workers and storage are tried too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from harness.contracts import AdgridError, ResultRow
from harness.options import RunOptions
from harness.registry import method_names
from harness.run import execute
from harness.store import Store, join_root

GOLDEN = Path(__file__).parent / "golden"
CELLS, EVERY_METHOD, NUMBERS = GOLDEN / "cells.yaml", GOLDEN / "every_method.yaml", GOLDEN / "numbers.json"

Numbers = Mapping[str, Mapping[str, float]]
"""Cell (`method category`) to metric to value in [0, 1]."""


def golden_tolerance(metric: str) -> float:
    """How far a pinned number may be missed.

    Other processors round convolutions differently: a pair of the 48 images may change places.
    """
    return 2e-2 if metric.startswith("image") else 5e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """A number that is not what it should be."""

    cell: str
    metric: str
    expected: float | None
    found: float | None
    allowed: float

    def __str__(self) -> str:
        if self.found is None or self.expected is None:
            return f"{self.cell}: {self.metric} is {'missing' if self.found is None else 'new'}"
        return (
            f"{self.cell}: {self.metric} is {self.found:.5f}, expected {self.expected:.5f} "
            f"(differs by {abs(self.found - self.expected):.5f}, allowed {self.allowed:g})"
        )


def compare_numbers(expected: Numbers, found: Numbers) -> list[Difference]:
    """Everything in which two sets of numbers differ by more than `golden_tolerance`, or that only one of them has."""
    differences = []
    for cell in expected.keys() | found.keys():
        ours, theirs = found.get(cell, {}), expected.get(cell, {})
        for metric in ours.keys() | theirs.keys():
            value, pinned, allowed = ours.get(metric), theirs.get(metric), golden_tolerance(metric)
            if value is None or pinned is None or not abs(value - pinned) <= allowed:
                difference = Difference(cell=cell, metric=metric, expected=pinned, found=value, allowed=allowed)
                differences.append(difference)
    return sorted(differences, key=lambda difference: (difference.cell, difference.metric))


def verify_golden(options: RunOptions, console: Console, command: str, remake: bool = False) -> bool:
    """Runs the golden cells anew, compares them with the pinned numbers and says what differs.

    Args:
        options: where to run; results go into a folder of their own under its root and are removed afterwards.
        console: told the outcome.
        command: for provenance.
        remake: pins what is found instead of comparing.

    Returns:
        Whether every number is the pinned one.
    """
    with _fresh_places(options) as fresh:
        rows = execute(str(CELLS), fresh("golden"), console, command).rows
    check_finished(rows)
    found = {
        f"{row.method} {row.category}": {name: round(row.metrics[name], 5) for name in sorted(row.metrics)}
        for row in rows
    }
    if remake:
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(NUMBERS.read_text(encoding="utf-8"))
    differences = compare_numbers(expected, found)
    for difference in differences:
        console.print(f"[red]{difference}[/]", soft_wrap=True)
    if not differences:
        largest = max(abs(found[cell][name] - value) for cell, row in expected.items() for name, value in row.items())
        count = sum(map(len, expected.values()))
        console.print(
            f"[green]verified[/]: {count} numbers of {len(expected)} cells are the pinned ones, the largest difference "
            f"is {largest:.5f} (allowed: {golden_tolerance('image_auroc'):g} of image metrics, "
            f"{golden_tolerance('pixel_auroc'):g} of pixel metrics)",
            soft_wrap=True,
        )
    return not differences


def check_finished(rows: Sequence[ResultRow]) -> None:
    """Raises AdgridError if a cell has no number: there is nothing to compare then."""
    failed = [row for row in rows if row.status != "ok"]
    if failed:
        reasons = "\n".join(f"  {row.method} {row.category}: {row.reason}" for row in failed)
        raise AdgridError(f"{len(failed)} of {len(rows)} cells could not be computed on this machine:\n{reasons}")


# --- the same on other devices -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Another way to compute what the CPU has computed, and how far it may be off."""

    name: str
    overrides: tuple[str, ...]
    auroc: float
    """Largest difference of any AUROC and of AUPRO."""
    correlation: float
    """Smallest correlation of the pixels of all anomaly maps."""


# Rounding that differs moves a training's numbers more than a fit's; bfloat16 keeps 8 bits. Two workers sum gradients
# in another order. The bounds are estimates: they were not yet measured on an accelerator.
ON_ACCELERATOR = (
    Variant(name="float32", overrides=("resources.gpu=1",), auroc=0.05, correlation=0.95),
    Variant(name="bfloat16", overrides=("resources.gpu=1", "precision=bfloat16"), auroc=0.1, correlation=0.9),
)
ON_TWO = Variant(name="two workers", overrides=("resources.gpu=1", "resources.workers=2"), auroc=0.05, correlation=0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method, computed in another way."""

    method: str
    variant: Variant
    device: str
    workers: int
    auroc: float
    """Largest difference of the AUROCs and AUPRO."""
    correlation: float

    @property
    def agrees(self) -> bool:
        """Whether it is within the variant's bounds."""
        return self.auroc <= self.variant.auroc and self.correlation >= self.variant.correlation


def verify_accelerator(options: RunOptions, console: Console, command: str) -> bool:
    """Runs every method on the accelerator, alone, in bfloat16 and by two workers, and compares with the CPU's numbers.

    Args:
        options: where to run; with an address, on that cluster.
        console: told the outcome.
        command: for provenance.

    Raises:
        AdgridError: there is no accelerator.
    """
    from harness.sweep import connect, list_nodes

    if options.address is None and not torch.accelerator.is_available():
        raise AdgridError(
            f"--gpu: torch {torch.__version__} sees no accelerator on this machine; install a build of torch for it, "
            f"or join a cluster with --address. `adgrid verify` without --gpu checks the CPU"
        )
    with connect(options.address, options.num_cpus):
        devices = sum(node.get("GPU", 0.0) for node in list_nodes())
        if devices < 1:
            raise AdgridError(
                "--gpu: Ray sees no accelerator on any node; start nodes with GPUs, or tell Ray of them "
                "(`ray start --num-gpus N`). `adgrid verify` without --gpu checks the CPU"
            )
        variants = [*ON_ACCELERATOR, *([ON_TWO] if devices >= 2 else [])]
        comparisons = compare_variants(variants, options, console, command)
    show_comparisons(comparisons, console)
    if devices < 2:
        console.print("two workers over NCCL were left out: there is one device")
    left_out = set(method_names()) - {comparison.method for comparison in comparisons}
    if left_out:
        console.print(f"not among the methods that are run: {', '.join(sorted(left_out))}")
    return all(comparison.agrees for comparison in comparisons)


def compare_variants(
    variants: Sequence[Variant],
    options: RunOptions,
    console: Console,
    command: str,
    space: str | Path = EVERY_METHOD,
) -> list[Comparison]:
    """Runs a space on the CPU and then in other ways, each from nothing, and compares rows and anomaly maps."""
    comparisons = []
    with _fresh_places(options) as fresh:
        reference = fresh("cpu")
        expected = {(row.method, row.category): row for row in _run(space, reference, console, command)}
        for variant in variants:
            places = fresh(variant.name.replace(" ", "_"), variant.overrides)
            for row in _run(space, places, console, command):
                pinned = expected[row.method, row.category]
                maps = [_load_maps(one, place) for one, place in ((pinned, reference.root), (row, places.root))]
                comparisons.append(
                    Comparison(
                        method=row.method,
                        variant=variant,
                        device=row.provenance.get("device_name", ""),
                        workers=int(row.costs.get("workers", 1)),
                        auroc=max(
                            abs(row.metrics[name] - value)
                            for name, value in pinned.metrics.items()
                            if name.endswith(("auroc", "aupro"))
                        ),
                        correlation=float(np.corrcoef(maps[0].ravel(), maps[1].ravel())[0, 1]),
                    )
                )
    return comparisons


def show_comparisons(comparisons: Sequence[Comparison], console: Console) -> None:
    """A table with a line per method and way, worst cases told last."""
    table = Table("method", "computed in", "on", "workers", "AUROC off by", "maps correlate", "")
    for one in comparisons:
        verdict = "[green]agrees[/]" if one.agrees else "[bold red]differs[/]"
        bounds = one.variant
        table.add_row(
            one.method,
            bounds.name,
            one.device,
            str(one.workers),
            f"{one.auroc:.4f} (≤ {bounds.auroc:g})",
            f"{one.correlation:.4f} (≥ {bounds.correlation:g})",
            verdict,
        )
    console.print(table)
    bad = [one for one in comparisons if not one.agrees]
    if bad:
        names = ", ".join(f"{one.method} in {one.variant.name}" for one in bad)
        console.print(f"[red]{len(bad)} of {len(comparisons)} differ from the CPU: {names}[/]", soft_wrap=True)
    else:
        console.print(f"[green]verified[/]: all {len(comparisons)} agree with the CPU")


def _run(space: str | Path, options: RunOptions, console: Console, command: str) -> tuple[ResultRow, ...]:
    rows = execute(str(space), options, console, command).rows
    check_finished(rows)
    return rows


def _load_maps(row: ResultRow, root: str) -> np.ndarray:
    prediction = Store(root).load_prediction(row.prediction_id)
    assert prediction is not None, f"{row.method} keeps its small maps"
    return prediction.maps.restored


class _Fresh:
    """Options whose root and cache nobody has used, so that everything is computed."""

    def __init__(self, options: RunOptions) -> None:
        self._options, self.name = options, f"verify-{uuid.uuid4().hex[:12]}"
        self.cache = Path(options.places.cache_dir) / self.name

    def __call__(self, part: str, overrides: Sequence[str] = ()) -> RunOptions:
        return dataclasses.replace(
            self._options,
            root=join_root(self._options.root, self.name, part),
            cache_dir=str(self.cache / part),
            overrides=(*self._options.overrides, *overrides),
            tracking_uri="off",
            pictures=False,
        )


@contextlib.contextmanager
def _fresh_places(options: RunOptions) -> Iterator[_Fresh]:
    fresh = _Fresh(options)
    try:
        yield fresh
    finally:
        Store(options.root).delete_folder(fresh.name)
        shutil.rmtree(fresh.cache, ignore_errors=True)
