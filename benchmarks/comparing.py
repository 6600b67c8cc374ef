"""Times a comparison of two runs of 1,000 rows each, and the coverage of its intervals where theory is least kind.

    python benchmarks/comparing.py [--rows 1000] [--images 150] [--json FILE]

Rows are five detectors by four backbones by fifty categories, in two runs, with image scores in a store as a run
leaves them. Timed apart, in CPU seconds: reading rows and scores, comparing one metric and all three of image scores,
writing tables and pictures. Coverage is the share of simulated test sets whose 95 % interval of a difference of two
AUROCs, or of its mean over 15 categories, holds the true one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from scipy.stats import norm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

METRICS = ["image_auroc", "image_ap", "image_f1_max"]


@contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.process_time()
    yield
    seconds[name] = time.process_time() - start


def make_run(root: str, run_id: str, shift: float, num_rows: int, num_images: int) -> None:
    """A finished run in a store: rows, image scores, plan and the bundle in its report folder."""
    from toy_rows import toy_row

    from harness.bundle import write_bundle
    from harness.metrics import image_metrics
    from harness.row_files import rows_to_parquet
    from harness.store import Store

    store, rows = Store(root), []
    axes = itertools.product([f"method{n}" for n in range(5)], [f"backbone{n}" for n in range(4)])
    per_line = num_rows // 20
    label = (np.arange(num_images) < num_images * 6 // 10).astype(int)
    paths = [f"/data/test/{'bad' if flag else 'good'}/{place:04}.png" for place, flag in enumerate(label)]
    for number, (method, backbone) in enumerate(axes):
        for category in range(per_line):
            generator = np.random.default_rng([number, category])
            score = generator.normal(size=num_images) + (1 + shift) * label
            score += 0.5 * np.random.default_rng([number, category, len(run_id)]).normal(size=num_images)
            row = toy_row(0.5, method, backbone, f"dataset{category // 10}", f"category{category}")
            changed = {"cell_id": f"{run_id}-{row.cell_id}", "prediction_id": f"{run_id}-{row.prediction_id}"}
            row = type(row)(**{**vars(row), **changed, "metrics": image_metrics(score, label)})
            store.publish_scores(row.cell_id, {"path": paths, "label": label.tolist(), "image_score": score.tolist()})
            rows.append(row)
    store.publish(f"rows/segments/{run_id}.parquet", rows_to_parquet(rows))
    trials = [{"trial_id": row.trial_id, "tuned": None, "cell_ids": [row.cell_id]} for row in rows]
    plan = {"name": run_id, "command": "", "num_expected": len(rows), "trials": trials, "samples": [], "studies": []}
    store.publish(f"runs/{run_id}/plan.json", json.dumps(plan).encode())
    write_bundle(store, run_id, rows, Path(root) / f"runs/{run_id}/report")


def time_comparison(num_rows: int, num_images: int) -> dict[str, float]:
    from harness.compare import compare_rows
    from harness.comparison_tables import write_comparison
    from harness.leaderboard import build_boards, newest_rows
    from harness.sources import load_any_scores, open_run

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        make_run(root, "old", 0.0, num_rows, num_images)
        make_run(root, "newer", 0.1, num_rows, num_images)
        with timed("read", seconds):
            sources = [open_run(name, root) for name in ("old", "newer")]
        sides = {source.name: source.rows for source in sources}
        for name, metrics in (("image AUROC", METRICS[:1]), ("all three metrics", METRICS)):
            with timed(f"compare, {name}", seconds):
                comparison = compare_rows(sides, lambda cell_id: load_any_scores(sources, cell_id), metrics=metrics)
            with timed(f"tables and pictures, {name}", seconds):
                write_comparison(comparison, Path(root) / "out", "benchmark")
        with timed("leaderboard", seconds):
            build_boards(newest_rows([row for source in sources for row in source.rows]), "image_auroc")
    return seconds


def measure_coverage(
    shifts: tuple[float, float], num_anomalous: int, num_normal: int, num_categories: int = 1, rounds: int = 2000
) -> float:
    from harness.intervals import add_variances, delong

    generator = np.random.default_rng(0)
    label = np.repeat([1, 0], [num_anomalous, num_normal])
    truth = norm.cdf(shifts[0] / 2**0.5) - norm.cdf(shifts[1] / 2**0.5)
    covered = 0
    for _ in range(rounds):
        parts = []
        for _ in range(num_categories):
            shared, own = generator.normal(size=label.size), generator.normal(size=(2, label.size))
            scores = np.sqrt(0.5) * shared + np.sqrt(0.5) * own + np.outer(shifts, label)
            parts.append(delong(scores, label, np.array([1.0, -1.0]) / num_categories))
        ends = add_variances(sum(part.value for part in parts), parts).interval()
        covered += ends is not None and ends[0] <= truth <= ends[1]
    return covered / rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000, help="of each of the two runs")
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    seconds = time_comparison(parsed.rows, parsed.images)
    for name, value in seconds.items():
        print(f"{value:7.2f} CPU s  {name}")
    coverage = {}
    for shifts, anomalous, normal, categories, rounds in (
        ((1.2, 1.8), 60, 20, 1, 2000),
        ((1.2, 1.2), 15, 15, 1, 2000),
        ((2.5, 3.0), 63, 20, 1, 2000),
        ((2.5, 3.0), 60, 60, 1, 2000),
        ((3.5, 3.0), 63, 20, 1, 2000),
        ((2.5, 3.0), 63, 20, 15, 1000),
        ((3.5, 3.0), 63, 20, 15, 1000),
    ):
        areas = tuple(float(norm.cdf(shift / 2**0.5)) for shift in shifts)
        name = f"AUROC {areas[0]:.3f} and {areas[1]:.3f}, {anomalous} anomalous, {normal} normal"
        name += f", mean of {categories} categories" * (categories > 1)
        coverage[name] = measure_coverage(shifts, anomalous, normal, categories, rounds)
        print(f"{100 * coverage[name]:6.1f} %  covered: {name}")
    if parsed.json:
        parsed.json.write_text(json.dumps({"rows": parsed.rows, "seconds": seconds, "coverage": coverage}, indent=2))


if __name__ == "__main__":
    main()
