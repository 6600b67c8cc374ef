"""Loading images: our loader against a bare loop of Pillow on the same files.

    python benchmarks/decoding.py --data-root DATA [--json FILE]

Both decode, convert to RGB and resize the same PNG files (256 pixels to 224 unless said otherwise) in the same number
of threads, and their pixels are compared first. Ways to get them, in interleaved rounds:

- bare: open, convert, resize, numpy; each image is dropped once it is an array;
- loader: `Pixels`, which adds the checks of every image (EXIF, bit depth, palettes, size), the order of channels, and
  batches in one piece of memory;
- split: `ImageSplit`, what a method iterates over; adds the conversion to float32 in [0, 1];
- storing: the same with an empty cache, which keeps the pixels; the writing is part of it;
- stored: the same with the pixels in the cache.

Throughput is images per second of CPU time, over all threads, and of wall time; ratios are ours / bare.
"""

import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _compare
import numpy as np
import torch
from PIL import Image

from harness.contracts import Preprocessing, SampleKey
from harness.datasets.fingerprint import content_hashes
from harness.feature_store import FeatureStore
from harness.image_split import ImageSplit, Pixels, chunks

BATCH_SIZE = 32


def main():
    parser = _compare.make_parser(__doc__)
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(options.data_root) / options.images
    paths = sorted(str(path.resolve()) for path in folder.glob("*.png"))
    if not paths:
        raise SystemExit(f"no PNG images in {folder}; name their folder with --data-root and --images")
    work = Path(tempfile.mkdtemp(prefix="decoding-"))
    try:
        _compare.report(measure(options, paths, work), options.json)
    finally:
        shutil.rmtree(work)


def measure(options, paths, work):
    size = (options.image_size, options.image_size)
    preprocessing = Preprocessing(image_size=size)
    samples = [SampleKey(path=path, category="benchmark", sample_id=path) for path in paths]
    hashes = content_hashes(paths, str(work))
    groups = chunks(range(len(paths)), BATCH_SIZE)
    store = FeatureStore(str(work / "cache"))

    def decode(path):
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))

    def bare():
        with ThreadPoolExecutor(options.threads) as pool:
            for _ in pool.map(decode, paths):
                pass

    def loader():
        for _ in Pixels(samples, preprocessing, num_threads=options.threads).batches(groups):
            pass

    def split(store=None):
        given = {"hashes": hashes, "dataset": "benchmark", "store": store} if store else {}
        loaded = ImageSplit(samples, preprocessing, batch_size=BATCH_SIZE, num_threads=options.threads, **given)
        for _ in loaded:
            pass
        return loaded.num_decoded

    def storing():
        shutil.rmtree(work / "cache", ignore_errors=True)
        assert split(store) == len(paths)

    def stored():
        assert split(store) == 0

    for batch, group in zip(Pixels(samples, preprocessing).batches(groups), groups, strict=True):
        bare_batch = np.stack([decode(paths[i]) for i in group]).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(batch.numpy(), bare_batch)

    sides = {"bare": bare, "loader": loader, "split": split, "storing": storing, "stored": stored}
    cpu_seconds = {name: [] for name in sides}

    def timed(name, run):
        def both():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            cpu_seconds[name].append(time.process_time() - cpu_start)
            return time.perf_counter() - start

        return both

    seconds = _compare.interleave({name: timed(name, run) for name, run in sides.items()}, options.rounds)
    figures = {
        "images": len(paths),
        "stored_size": list(Image.open(paths[0]).size),
        "image_size": options.image_size,
        "threads": options.threads,
        "rounds": options.rounds,
        "bare_images_per_second": len(paths) / statistics.median(seconds["bare"]),
        "bare_images_per_cpu_second": len(paths) / statistics.median(cpu_seconds["bare"]),
    }
    for name in list(sides)[1:]:
        for kind, measured in (("", seconds), ("cpu_", cpu_seconds)):
            told = _compare.compare(measured, name, "bare")
            figures[f"{name}_{kind}throughput_of_bare"] = told["times_faster"]
            figures[f"{name}_{kind}range"] = told["times_faster_range"]
    return figures


if __name__ == "__main__":
    main()
