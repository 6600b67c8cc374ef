"""What the side-by-side benchmarks share: real features, interleaved rounds, peak memory, the other side's process."""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch

from harness.backbones import FrozenBackbone, choose_layers, resolve_backbone
from harness.contracts import LevelChoice, Preprocessing, SampleKey
from harness.image_split import load_images

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


def make_parser(text):
    """Options that every comparison takes; `text` is the module's docstring."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True, help="folder with data sets; see --images")
    parser.add_argument("--images", default="mvtec_ad/bottle/train/good", help="normal images below the data root")
    parser.add_argument("--test-images", default="mvtec_ad/bottle/test", help="test images below the data root")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on both sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures to this file")
    return parser


def encode_folder(options, folder, strides, image_size=(224, 224)):
    """Feature maps (N, D_l, h_l, w_l) per level of all images below a folder."""
    root = Path(options.data_root) / folder
    paths = sorted(str(path.resolve()) for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise SystemExit(f"no images below {root}; name their folder with --data-root and --images")
    resolved = resolve_backbone(options.backbone, options.weights)
    layers = choose_layers(resolved, LevelChoice(strides=strides))
    encoder = FrozenBackbone(resolved, layers, "cpu", "float32", image_size)
    preprocessing = Preprocessing(image_size=image_size, interpolation=resolved.interpolation)
    samples = [SampleKey(path=path, category="benchmark", sample_id=path) for path in paths]
    with torch.inference_mode():
        batches = [encoder.encode(batch) for batch in load_images(samples, preprocessing).split(16)]
    return [torch.cat(level).clone() for level in zip(*batches, strict=True)]


def interleave(sides, rounds):
    """Runs every side once a round, in turn, so that a busy machine slows all of them.

    Args:
        sides: name -> function; it returns its seconds, or None to have its call timed.

    Returns:
        Name -> seconds per round.
    """
    seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            told = run()
            seconds[name].append(time.perf_counter() - start if told is None else told)
    return seconds


def compare(seconds, ours, theirs):
    """Median seconds of both sides and the median, smallest and largest ratio theirs / ours over the rounds."""
    ratios = [t / o for t, o in zip(seconds[theirs], seconds[ours], strict=True)]
    return {
        f"{ours}_seconds": statistics.median(seconds[ours]),
        f"{theirs}_seconds": statistics.median(seconds[theirs]),
        "times_faster": statistics.median(ratios),
        "times_faster_range": [min(ratios), max(ratios)],
    }


def peak_mib(function):
    """Result of a call, and by how many MiB the process grew at most meanwhile (sampled every 2 ms)."""
    if sys.platform == "linux":  # give freed memory back first, or the call grows into it unseen
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    process = psutil.Process()
    before = process.memory_info().rss
    peak, done = before, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = function()
    finally:
        done.set()
        watcher.join()
    return result, (peak - before) / 2**20


class OtherSide:
    """A library in an interpreter of its own, asked over pipes so that rounds can be interleaved."""

    def __init__(self, python, threads, folder):
        """Args: path of the interpreter; torch or faiss threads; folder through which arrays are passed as files."""
        script = Path(__file__).with_name("_other_side.py")
        self.process = subprocess.Popen(
            [python, str(script), str(threads), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, task, **settings):
        """Sends a task; returns the answer, a dict."""
        self.process.stdin.write(json.dumps({"task": task, **settings}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the other interpreter failed at {task}; its messages stand above")
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def report(figures, path):
    """Prints the figures and writes them as JSON where a path is given."""
    for name, value in figures.items():
        print(f"{name:36} {_short(value)}")
    if path:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def _short(value):
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
