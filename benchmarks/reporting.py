"""Times the report of a run of 1,000 rows, part by part.

    python benchmarks/reporting.py [--rows 1000] [--images 150] [--json FILE]

Rows are five detectors by four backbones by fifty categories of five datasets, with image scores, curves and twelve
pictures a cell as a run leaves them. Timed apart, in CPU seconds: reading the run, tables with their figures, the two
files that travel, and the page.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from comparing import timed

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

NUM_PICTURES, PHOTO_BYTES, HEAT_BYTES = 12, 5000, 1200


def make_run(root: str, num_rows: int, num_images: int) -> None:
    """A finished run in a store, `run`."""
    from toy_rows import toy_row

    from harness.metrics import image_metrics
    from harness.row_files import rows_to_parquet, table_to_parquet

    def write(key: str, data: bytes) -> None:  # without waiting for the disk, as a store does for every file
        (Path(root) / key).parent.mkdir(parents=True, exist_ok=True)
        (Path(root) / key).write_bytes(data)

    rows = []
    axes = itertools.product([f"method{n}" for n in range(5)], [f"backbone{n}" for n in range(4)])
    label = (np.arange(num_images) < num_images * 6 // 10).astype(int)
    paths = [f"/data/test/{'bad' if flag else 'good'}/{place:04}.png" for place, flag in enumerate(label)]
    rate = np.linspace(0, 1, 80)
    curves = {
        "false_positive_rate": rate.round(5).tolist(),
        "true_positive_rate": (rate**0.2).round(5).tolist(),
        "region_overlap": (rate**0.3).round(5).tolist(),
    }
    for number, (method, backbone) in enumerate(axes):
        for category in range(num_rows // 20):
            generator = np.random.default_rng([number, category])
            score = generator.normal(size=num_images) + label
            row = toy_row(0.5, method, backbone, f"dataset{category // 10}", f"category{category}")
            metrics = {
                **image_metrics(score, label),
                "pixel_auroc": 0.9,
                "pixel_ap": 0.4,
                "pixel_f1_max": 0.5,
                "aupro": 0.8,
            }
            costs = {"images_per_second": 20.0 + number, "peak_rss_mib": 900.0 + 10 * number, "fit_seconds": 1.0}
            row = type(row)(**{**vars(row), "metrics": metrics, "costs": costs})
            columns = {
                "path": paths,
                "mask_path": [None] * num_images,
                "label": label.tolist(),
                "defect_type": ["dent"] * num_images,
                "image_score": score.tolist(),
            }
            write(f"scores/{row.cell_id}.parquet", table_to_parquet(pa.table(columns)))
            pictures = [
                {
                    "name": f"{place}.png",
                    "label": place % 2,
                    "defect": "dent",
                    "score": 1.0,
                    "id": f"{category}-{place}",
                    "photo": base64.b64encode(generator.bytes(PHOTO_BYTES)).decode(),
                    "heat": base64.b64encode(generator.bytes(HEAT_BYTES)).decode(),
                }
                for place in range(NUM_PICTURES)
            ]
            write(f"details/{row.cell_id}.json", json.dumps({"curves": curves, "pictures": pictures}).encode())
            rows.append(row)
    write("rows/segments/run.parquet", rows_to_parquet(rows))
    trial = {"trial_id": "t", "tuned": None, "cell_ids": [row.cell_id for row in rows]}
    plan = {"name": "run", "command": "", "num_expected": len(rows), "trials": [trial], "samples": [], "studies": []}
    write("runs/run/plan.json", json.dumps(plan).encode())


def time_report(num_rows: int, num_images: int) -> dict[str, float]:
    from harness.bundle import write_bundle
    from harness.report import Tabulated, write_report
    from harness.run_folder import read_run
    from harness.run_report import write_page
    from harness.store import Store

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as root:
        make_run(root, num_rows, num_images)
        store, folder = Store(root), Path(root) / "runs/run/report"
        with timed("read", seconds):
            record = read_run(store, "run")
        with timed("tables and figures", seconds):
            tabulated = Tabulated(record.rows)
            write_report(folder, tabulated, title="run", command="")
        with timed("files that travel, first time", seconds):
            write_bundle(store, "run", record.rows, folder)
        with timed("files that travel, again", seconds):
            write_bundle(store, "run", record.rows, folder)
        with timed("page", seconds):
            page = write_page(store, record, folder, tabulated)
        seconds["page MiB"] = page.stat().st_size / 2**20
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--images", type=int, default=150, help="test images of a category")
    parser.add_argument("--json", help="file for the numbers")
    options = parser.parse_args()
    found = time_report(options.rows, options.images)
    for name, value in found.items():
        print(f"{name:32} {value:6.2f}" + ("" if "MiB" in name else " s of CPU"))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
