"""One whole cell, fit + test + metrics, against anomalib's Engine: images on disk to AUROCs and AUPRO.

    python benchmarks/cell.py --data-root DATA --method padim|patchcore --anomalib-python PYTHON [--json FILE]

Both sides read the same images and masks from `DATA/mvtec_ad/bottle`, use the same weights, layers, size, resizing,
normalisation, coreset ratio, smoothing and number of torch threads, and start with nothing computed: every round is a
new process, ours with an empty cache and store. Importing libraries is not timed. Ours runs in two forms: `ours`, with
the options that make it the same method as anomalib's, and `ours_default`, as the papers' code is set.

Left to each side is what belongs to it: the neighbours' and the coreset's algorithms, anomalib's sparse projection to
more dimensions than the features have, its nearest-neighbour enlargement of PatchCore's maps, and the pixels of regions
in AUPRO. Pictures are off on both sides. anomalib runs lean, `anomalib`: without checkpoint, progress bar and the
validation pass over the test images by which it rescales scores; and, for PaDiM, also with these as its Engine is set,
`anomalib_shipped`. Our decoding runs in threads of its own beside the forward pass, so CPU seconds of all threads are
given as well; they also suffer less from other work on the machine.

anomalib's PatchCore takes most of an hour and runs once, lean; `--anomalib-json` reuses what an earlier run wrote.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from anomalib_side import peak_mib

HERE = Path(__file__).parent
IMAGE_SIZE = (224, 224)
STRIDES = {"patchcore": (8, 16), "padim": (4, 8, 16)}
"""Levels that the papers read."""
EQUAL_PARAMS = {
    "patchcore": {"aggregation": "concat", "distance": "euclidean", "reweighting": True, "projection": None},
    "padim": {"num_channels": "all"},
}
"""Options under which ours is the method that anomalib implements."""
SHOWN = ("seconds", "cpu_seconds", "peak_mib", "image_auroc", "pixel_auroc", "aupro")


def run_ours(settings):
    """Plans and runs the cell in this process, without Ray; its figures."""
    import pandas as pd  # noqa: F401  # pyarrow imports it at first use
    import torch
    import yaml

    from harness.backbones import import_timm
    from harness.contracts import Places, RunSettings
    from harness.plan import make_plan
    from harness.space import parse_space
    from harness.trial import run_trial

    torch.set_num_threads(settings["threads"])
    import_timm()
    imported_mib = peak_mib()
    space = {
        "name": "cell",
        "methods": [{"name": settings["method"], "layers": settings["layers"], "params": settings["params"]}],
        "backbones": [{"name": settings["backbone"], "weights": settings["weights"]}],
        "datasets": [{"name": "mvtec_ad", "layout": "folder", "categories": [settings["category"]]}],
        "protocol": {"image_size": settings["image_size"], "smoothing": 4.0},
        "seeds": [settings["seed"]],
    }
    scratch = settings["scratch"]
    places = Places(data_root=settings["data_root"], cache_dir=f"{scratch}/cache")

    begin, begin_cpu = time.perf_counter(), time.process_time()
    plan = make_plan(parse_space(yaml.safe_dump(space)), places)
    if not plan.trials:
        raise SystemExit("; ".join(f"{lack.name}: {lack.reason}" for lack in plan.missing))
    run = RunSettings(
        root=f"{scratch}/store", places=places, run_id=plan.run_id, command="benchmark", invocation="1", pictures=False
    )
    (row,) = run_trial(plan.trials[0], run)
    done, done_cpu = time.perf_counter(), time.process_time()
    if row.status != "ok":
        raise SystemExit(f"the cell failed: {row.reason}")
    return {
        "seconds": done - begin,
        "cpu_seconds": done_cpu - begin_cpu,
        "peak_mib": peak_mib(),
        "imported_mib": imported_mib,
        **{name: row.metrics[name] for name in ("image_auroc", "pixel_auroc", "aupro")},
        **row.costs,
    }


def describe_cell(options, folder):
    """What both sides are told. Writes the weights under timm's names, without classifier, into the folder."""
    import safetensors.torch

    from harness.backbones import choose_layers, import_timm, level_shapes, resolve_backbone
    from harness.contracts import LevelChoice
    from harness.weights import load_weights

    resolved = resolve_backbone(options.backbone, options.weights)
    layers = choose_layers(resolved, LevelChoice(strides=STRIDES[options.method]))
    network = import_timm().create_model(resolved.architecture, pretrained=False, num_classes=0)
    load_weights(network, resolved)
    converted = str(Path(folder) / "weights.safetensors")
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, converted)
    shared = {
        "method": options.method,
        "category": options.category,
        "layers": layers,
        "image_size": IMAGE_SIZE,
        "threads": options.threads,
        "seed": 0,
    }
    ours = {
        **shared,
        "backbone": options.backbone,
        "weights": options.weights,
        "data_root": str(Path(options.data_root).resolve()),
    }
    anomalib = {
        **shared,
        "backbone": resolved.architecture.split(".")[0],
        "weights": converted,
        "mean": resolved.mean,
        "std": resolved.std,
        "interpolation": resolved.interpolation,
        "dataset_root": str(Path(options.data_root).resolve() / "mvtec_ad"),
        "batch_size": 32,
        "coreset_ratio": 0.1,
        "num_channels": sum(width for width, _, _ in level_shapes(resolved, layers, IMAGE_SIZE)),
    }
    return {
        "ours": {**ours, "params": EQUAL_PARAMS[options.method]},
        "ours_default": {**ours, "params": {}},
        "anomalib": {**anomalib, "as_shipped": False},
        "anomalib_shipped": {**anomalib, "as_shipped": True},
    }


def run_round(name, settings, python):
    """One cell on one side in a process of its own, with folders of its own; its figures."""
    threads = str(settings["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "settings.json"
        told.write_text(json.dumps({**settings, "scratch": scratch}))
        script = [str(HERE / "anomalib_side.py")] if name.startswith("anomalib") else [__file__, "--serve"]
        answer = subprocess.run([python, *script, str(told)], stdout=subprocess.PIPE, text=True, env=environment)
    if answer.returncode:
        raise SystemExit(f"the side {name!r} failed; its messages stand above")
    figures = {**json.loads(answer.stdout.splitlines()[-1]), "load_average": os.getloadavg()[0]}
    print(
        f"{name}: {figures['seconds']:.1f} s, load average {figures['load_average']:.1f}", file=sys.stderr, flush=True
    )
    return figures


def read_recorded(path, method):
    """Side -> rounds of anomalib, from the --json of an earlier run or from the line that anomalib_side.py printed."""
    recorded = json.loads(Path(path).read_text())
    if recorded["method"] != method:
        raise SystemExit(f"{path} is a record of {recorded['method']}, not of {method}; give the right file")
    sides = recorded.get("sides", {"anomalib": [recorded]})
    return {name: rounds for name, rounds in sides.items() if name.startswith("anomalib")}


def summarise(sides):
    """Medians of every side, and how many times longer anomalib took; a single run of it stands against all rounds."""
    summary = {"median": {name: {key: median_of(rounds, key) for key in SHOWN} for name, rounds in sides.items()}}
    summary["times_faster"] = {}
    for theirs in (name for name in sides if name.startswith("anomalib")):
        for ours in ("ours", "ours_default"):
            for key in ("seconds", "cpu_seconds"):
                pairs = zip(itertools.cycle(sides[theirs]), sides[ours], strict=False)
                ratios = [t[key] / o[key] for t, o in pairs]
                summary["times_faster"][f"{ours} than {theirs}, {key}"] = {
                    "median": statistics.median(ratios),
                    "range": [min(ratios), max(ratios)],
                }
    return summary


def median_of(rounds, key):
    return statistics.median(figures[key] for figures in rounds)


def print_summary(summary):
    print(f"{'side':18}" + "".join(f"{key:>13}" for key in SHOWN))
    for name, medians in summary["median"].items():
        print(f"{name:18}" + "".join(f"{medians[key]:13.{1 if key in SHOWN[:3] else 5}f}" for key in SHOWN))
    for name, ratio in summary["times_faster"].items():
        low, high = ratio["range"]
        print(f"times faster, {name}: {ratio['median']:.2f} ({low:.2f} to {high:.2f})")


def main():
    if sys.argv[1:2] == ["--serve"]:
        print(json.dumps(run_ours(json.loads(Path(sys.argv[2]).read_text()))), flush=True)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder with mvtec_ad in the layout of MVTec AD")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--method", required=True, choices=sorted(STRIDES))
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="a network with levels of several strides")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--anomalib-python", help="interpreter with anomalib installed; none: only ours runs")
    parser.add_argument("--anomalib-json", help="anomalib's figures of an earlier run, instead of running it")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()

    pythons = dict.fromkeys(("ours", "ours_default"), sys.executable)
    if options.anomalib_python and not options.anomalib_json:
        names = ("anomalib", "anomalib_shipped") if options.method == "padim" else ("anomalib",)
        pythons |= dict.fromkeys(names, options.anomalib_python)
    sides = {name: [] for name in pythons}
    if options.anomalib_json:
        sides |= read_recorded(options.anomalib_json, options.method)
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        settings = describe_cell(options, folder)
        for number in range(options.rounds):
            for name, python in pythons.items():
                if number == 0 or options.method == "padim" or not name.startswith("anomalib"):
                    sides[name].append(run_round(name, settings[name], python))
    for name, rounds in sides.items():
        images = {(figures["train_images"], figures["test_images"]) for figures in rounds}
        if images != {(sides["ours"][0]["train_images"], sides["ours"][0]["test_images"])}:
            raise SystemExit(f"the side {name!r} saw other images than ours (train, test): {sorted(images)}")
    summary = summarise(sides)
    print_summary(summary)
    print(f"load average {before[0]:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} processors")
    if options.json:
        about = {"method": options.method, "category": options.category, "threads": options.threads}
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps({**about, **summary, "sides": sides}, indent=1) + "\n")


if __name__ == "__main__":
    main()
