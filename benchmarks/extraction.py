"""Feature extraction against a bare forward loop over tensors that are in memory already.

    python benchmarks/extraction.py [--data-root DATA] [--json FILE]

Five ways to get the same features of the same images, in interleaved rounds:

- bare: the frozen network alone, over preloaded uint8 tensors; nothing decoded, nothing kept;
- parted: the same in batches as small as the harness takes on a CPU, where that is faster;
- unfolded: the same as timm builds it, with batch norms of their own;
- cold: the harness with an empty cache: decoding, forward pass, writing features and pixels;
- warm pixels: the same with the pixels in the cache already, as for the second backbone of a grid.

Throughput is by wall time; decoding and writing run beside the forward pass where a core is free. `cpu_ratio` is by the
CPU time of all threads: what is left of the throughput where every core computes.

Without `--data-root`, photographs are replaced by textured PNG files of 256 pixels.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.backbones import FrozenBackbone, choose_layers, resolve_backbone, trainable_backbone
from harness.contracts import LevelChoice, Preprocessing, SampleKey
from harness.datasets.fingerprint import content_hashes
from harness.features import FeatureStore, feature_split, load_images, num_encoded_together


def find_images(data_root, num_images, folder):
    """Absolute paths of the training images of MVTec AD's bottle, or of generated ones."""
    if data_root:
        paths = sorted((Path(data_root) / "mvtec_ad" / "bottle" / "train" / "good").glob("*.png"))
        if not paths:
            raise SystemExit(f"no images in {data_root}/mvtec_ad/bottle/train/good")
        return [str(path.resolve()) for path in paths[:num_images]]
    rng = np.random.default_rng(0)
    for number in range(num_images):
        smooth = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((256, 256))
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(-8, 9, (256, 256, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return [str(path) for path in sorted(folder.glob("*.png"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder with mvtec_ad/bottle")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--layers", nargs="*", help="layer names; default: strides 8 and 16")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    work = Path(tempfile.mkdtemp(prefix="extraction-"))
    try:
        figures = measure(options, work)
    finally:
        shutil.rmtree(work)
    for name, value in figures.items():
        print(f"{name:40} {value}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


def measure(options, work):
    images = work / "images"
    images.mkdir()
    paths = find_images(options.data_root, options.images, images)
    samples = [SampleKey(path=path, category="bottle", sample_id=Path(path).stem) for path in paths]
    hashes = content_hashes(paths, str(work / "hashes"))
    resolved = resolve_backbone(options.backbone, options.weights)
    layers = tuple(options.layers or choose_layers(resolved, LevelChoice(strides=(8, 16), taps=(1, 2))))
    size = (options.image_size, options.image_size)
    preprocessing = Preprocessing(image_size=size, interpolation=resolved.interpolation)
    encoder = FrozenBackbone(resolved, layers, options.device, options.precision, size)
    preloaded = load_images(samples, preprocessing).split(options.batch_size)

    def bare(_):
        with torch.inference_mode():
            for batch in preloaded:
                encoder.encode(batch)
        if options.device != "cpu":
            torch.cuda.synchronize()

    def parted(_):
        with torch.inference_mode():
            for batch in preloaded:
                for part in batch.split(num_encoded_together(size, torch.device(options.device))):
                    encoder.encode(part)
        if options.device != "cpu":
            torch.cuda.synchronize()

    plain = trainable_backbone(resolved, layers, options.device, size).eval()

    def unfolded(_):
        with torch.inference_mode():
            for batch in preloaded:
                plain(batch.contiguous(memory_format=torch.channels_last))
        if options.device != "cpu":
            torch.cuda.synchronize()

    def extract(cache):
        split = feature_split(
            samples,
            hashes,
            dataset="benchmark",
            split="train",
            resolved=resolved,
            layers=layers,
            preprocessing=preprocessing,
            store=FeatureStore(str(cache)),
            encoder_factory=lambda wanted: encoder,
            batch_size=options.batch_size,
            precision=options.precision,
        )
        assert split.num_extracted == len(samples)

    def drop_features(cache):
        for folder in (cache / "features").glob("features-*"):
            shutil.rmtree(folder)

    rounds = {"bare": bare, "parted": parted, "unfolded": unfolded, "cold": extract, "warm_pixels": extract}
    seconds, cpu_seconds = ({name: [] for name in rounds} for _ in range(2))
    bare(None)  # the first pass also chooses kernels
    for number in range(options.rounds):
        cache = work / f"cache{number}"
        for name, run in rounds.items():
            if name == "warm_pixels":
                drop_features(cache)
            start, start_cpu = time.perf_counter(), time.process_time()
            run(cache)
            seconds[name].append(time.perf_counter() - start)
            cpu_seconds[name].append(time.process_time() - start_cpu)
        shutil.rmtree(cache)
    figures = {
        "backbone": options.backbone,
        "layers": list(layers),
        "images": len(samples),
        "batch_size": options.batch_size,
        "threads": options.threads,
        "device": options.device,
        "precision": options.precision,
        "bare_images_per_second": round(len(samples) / statistics.median(seconds["bare"]), 1),
    }
    for name in ("cold", "warm_pixels"):
        for base in ("bare", "parted", "unfolded"):
            for what, clock in (("throughput", seconds), ("cpu_ratio", cpu_seconds)):
                ratios = [theirs / ours for theirs, ours in zip(clock[base], clock[name], strict=True)]
                figures[f"{name}_{what}_of_{base}"] = round(statistics.median(ratios), 3)
                figures[f"{name}_{what}_rounds_of_{base}"] = [round(ratio, 3) for ratio in ratios]
    return figures


if __name__ == "__main__":
    main()
