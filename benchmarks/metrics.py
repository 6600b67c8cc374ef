"""Times the four pixel metrics against scikit-learn's exact sort and anomalib's AUROC and AUPRO.

    python benchmarks/metrics.py [--data-root DATA] [--anomalib-python PYTHON] [--json FILE]

Every contender is a process of its own with one thread, holds the same maps, and is asked in turn, so that a busy
machine slows all of them alike. Reported are the median of the ratios, the peak memory on top of the maps, and how
far the values are from an exact sort and from the official AUPRO with every threshold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RANKED = ("pixel_auroc", "pixel_ap", "pixel_f1_max")
BATCH = 16


def make_maps(num_maps: int, size: int, data_root: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Smooth maps as a patch-based method makes them, (N, H, W) float32, and masks (N, H, W) uint8.

    The masks are those found under `data_root` (MVTec AD layout), spread over its folders, or random ellipses; four in
    ten images are normal. The maps are a coarse grid of noise, raised over the defects by an amount that differs from
    image to image, upsampled and smoothed.
    """
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    from harness.maps import full_resolution

    rng = np.random.default_rng(0)
    num_anomalous = num_maps * 6 // 10
    paths = sorted(data_root.glob("**/ground_truth/*/*.png")) if data_root else []
    masks = np.zeros((num_maps, size, size), dtype=np.uint8)
    rows, columns = np.mgrid[:size, :size] / size
    for index in range(num_anomalous):
        if paths:
            image = Image.open(paths[index * len(paths) // num_anomalous]).convert("L")
            masks[index] = np.asarray(image.resize((size, size), Image.Resampling.NEAREST)) > 0
            continue
        for _ in range(rng.integers(1, 4)):
            y, x, height, width = *rng.uniform(0.1, 0.9, 2), *rng.uniform(0.02, 0.2, 2)
            masks[index] |= ((rows - y) / height) ** 2 + ((columns - x) / width) ** 2 < 1
    grid = size // 8
    small = masks.reshape(num_maps, grid, 8, grid, 8).mean(axis=(2, 4))
    noise = rng.standard_normal((2, *small.shape))
    contrast = rng.lognormal(0, 0.6, (num_maps, 1, 1)) * rng.uniform(0.5, 1.5, small.shape)
    coarse = 1.5 + 0.5 * gaussian_filter(noise[0], (0, 1, 1)) + 0.1 * noise[1] ** 2 + small * contrast
    return full_resolution(coarse, (size, size), sigma=4 * size / 224).numpy(), masks


def batches(*arrays: np.ndarray):
    for start in range(0, len(arrays[0]), BATCH):
        yield tuple(array[start : start + BATCH] for array in arrays)


def run_ours(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Both passes; each labels the regions of the masks anew."""
    from harness.metrics import PixelMetrics

    metrics = PixelMetrics()
    for batch in batches(maps, masks):
        metrics.update(*batch)
    return metrics.compute(replay=lambda: batches(maps, masks))


def run_ours_one_pass(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Without replay: the bounds are larger."""
    from harness.metrics import PixelMetrics

    metrics = PixelMetrics()
    for batch in batches(maps, masks):
        metrics.update(*batch)
    return metrics.compute()


def run_sklearn(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """AUROC, AP and F1-max by sorting all pixels; scikit-learn has no AUPRO."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    scores, truth = maps.ravel(), masks.ravel()
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    values = roc_auc_score(truth, scores), average_precision_score(truth, scores), f1.max()
    return dict(zip(RANKED, map(float, values), strict=True))


def run_anomalib(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """AUROC and AUPRO of anomalib, updated batch by batch."""
    import torch
    from anomalib.metrics.aupro import _AUPRO
    from anomalib.metrics.auroc import _AUROC

    auroc, aupro = _AUROC(), _AUPRO(fpr_limit=0.3)
    for scores, truth in batches(torch.from_numpy(maps), torch.from_numpy(masks).int()):
        auroc.update(scores.flatten(), truth.flatten())
        aupro.update(scores, truth)
    return {"pixel_auroc": float(auroc.compute()), "aupro": float(aupro.compute())}


CONTENDERS = {
    "ours": run_ours,
    "ours_one_pass": run_ours_one_pass,
    "sklearn": run_sklearn,
    "anomalib": run_anomalib,
}


def prepare_anomalib() -> Any:
    """Where torchvision does not fit torch, defines the two operators it misses; they live as long as the result."""
    import torch

    torch.set_num_threads(1)
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def peak_mib() -> float:
    """Largest resident memory of this process so far (Linux). getrusage would tell that of the parent if larger."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def serve(name: str, folder: Path) -> None:
    """Runs one contender each time a line comes in; answers with one line of JSON."""
    kept = prepare_anomalib() if name == "anomalib" else None
    maps, masks = np.load(folder / "maps.npy"), np.load(folder / "masks.npy")
    CONTENDERS[name](maps[:2], masks[:2])  # imports and first calls
    base = peak_mib()
    for _ in sys.stdin:
        start, cpu_start = time.perf_counter(), time.process_time()
        values = CONTENDERS[name](maps, masks)
        answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        print(json.dumps(answer | {"mib": peak_mib() - base, "values": values}), flush=True)
    del kept


def measure(pythons: dict[str, str], folder: Path, rounds: int) -> dict[str, list[dict]]:
    """Answers of every contender, asked in turn, once a round."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {
        name: subprocess.Popen([python, __file__, "--serve", name, str(folder)], env=quiet, **pipes)
        for name, python in pythons.items()
    }
    answers: dict[str, list[dict]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                raise SystemExit(f"{name} failed in {pythons[name]}; its own message is above")
            answers[name].append(json.loads(line))
    for worker in workers.values():
        worker.communicate()
    return answers


def summarise(answers: dict[str, list[dict]], exact: dict[str, float]) -> dict:
    """Medians over the rounds; CPU seconds too, since on a busy machine they tell more."""
    contenders = {}
    for name, runs in answers.items():
        values = runs[-1]["values"]
        contenders[name] = {
            "peak_mib_over_maps": runs[-1]["mib"],
            "values": values,
            "error": {key: abs(values[key] - exact[key]) for key in exact if key in values},
            "bound": {key: values[f"{key}_bound"] for key in exact if f"{key}_bound" in values},
        }
        for clock in ("seconds", "cpu_seconds"):
            ratios = [run[clock] / own[clock] for run, own in zip(runs, answers["ours"], strict=True)]
            contenders[name][clock] = statistics.median(run[clock] for run in runs)
            contenders[name][f"ratio_of_{clock}"] = statistics.median(ratios)
            contenders[name][f"ratio_of_{clock}_range"] = [min(ratios), max(ratios)]
    return {"exact": exact, "contenders": contenders}


def print_summary(summary: dict) -> None:
    """One line per contender; x is the median ratio to ours."""
    print(f"{'contender':14s} {'seconds':>8s} {'x':>5s} {'CPU s':>7s} {'x':>5s} {'MiB':>5s}   error (bound)")
    for name, row in summary["contenders"].items():
        errors = ", ".join(
            f"{key} {error:.0e}" + (f" ({row['bound'][key]:.0e})" if key in row["bound"] else "")
            for key, error in row["error"].items()
        )
        wall, cpu = (
            f"{row[clock]:.3f} {row[f'ratio_of_{clock}']:5.1f}".rjust(13) for clock in ("seconds", "cpu_seconds")
        )
        print(f"{name:14s} {wall:>14s} {cpu} {row['peak_mib_over_maps']:5.0f}   {errors}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root", type=Path, help="folder with masks in the MVTec AD layout; none: random ellipses"
    )
    parser.add_argument("--anomalib-python", help="interpreter that can import anomalib; none: it is left out")
    parser.add_argument("--maps", type=int, default=100)
    parser.add_argument("--size", type=int, default=256, help="pixels per side, a multiple of 8")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], Path(options.serve[1]))
        return
    sys.path.insert(0, str(ROOT / "tests"))
    from reference.aupro import official_aupro

    maps, masks = make_maps(options.maps, options.size, options.data_root)
    exact = run_sklearn(maps, masks) | {"aupro": official_aupro(maps, masks, limit=0.3)}
    pythons = dict.fromkeys(("ours", "ours_one_pass", "sklearn"), sys.executable)
    if options.anomalib_python:
        pythons["anomalib"] = options.anomalib_python
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "maps.npy"), maps)
        np.save(Path(folder, "masks.npy"), masks)
        answers = measure(pythons, Path(folder), options.rounds)
    summary = {
        "maps": options.maps,
        "size": options.size,
        "defective_share": float(masks.mean()),
        "masks": "real" if options.data_root else "ellipses",
    } | summarise(answers, exact)
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")
    share = f"{summary['defective_share']:.1%} defective"
    print(f"{options.maps} maps of {options.size} x {options.size}, {share}, one thread, {options.rounds} rounds")
    print_summary(summary)


if __name__ == "__main__":
    main()
