"""Small or full-sized trees in the published layouts of five datasets, with every quirk of the real ones.

A small tree has a handful of different pictures per folder, so a test may change any of them. A full tree has exactly
the published number of files; those of one kind are hard links to one tiny file, so never write into them.
"""

import os
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from harness.datasets.btad import Btad
from harness.datasets.mpdd import Mpdd
from harness.datasets.mvtec_3d_ad import NUM_VALIDATION, Mvtec3dAd
from harness.datasets.mvtec_ad import MvtecAd
from harness.datasets.visa import COUNTS as VISA_COUNTS

SIZE = (20, 16)
"""Width and height of every picture: not square, as VisA and BTAD 03."""
DEFECT_PIXELS = 12
"""Pixels of a mask that are a defect."""
FEW = {"train": 3, "validation": 2, "good": 2, "defect": 2}
"""Pictures per folder of a small tree."""
MVTEC_3D_DEFECTS = {
    "bagel": ("combined", "contamination", "crack", "hole"),
    "cable_gland": ("bent", "cut", "hole", "thread"),
    "carrot": ("combined", "contamination", "crack", "cut", "hole"),
    "cookie": ("combined", "contamination", "crack", "hole"),
    "dowel": ("bent", "combined", "contamination", "cut"),
    "foam": ("color", "combined", "contamination", "cut"),
    "peach": ("combined", "contamination", "cut", "hole"),
    "potato": ("combined", "contamination", "cut", "hole"),
    "rope": ("contamination", "cut", "open"),
    "tire": ("combined", "contamination", "cut", "hole"),
}
BTAD_FORMATS = {"01": ("bmp", "png"), "02": ("png", "png"), "03": ("bmp", "bmp")}
"""Formats of images and of masks."""


class Writer:
    """Writes pictures below a root, each its own file, or all of one kind as links to the first."""

    def __init__(self, root, full):
        self.root = Path(root)
        self.full = full
        self._first = {}
        self._shade = count()

    def image(self, path, mode="RGB"):
        self._write(path, ("image", mode), lambda: Image.new("L", SIZE, 40 + next(self._shade) % 180).convert(mode))

    def mask(self, path, value=255):
        """A mask whose upper left corner has this value; 0 for the empty mask of a good image."""
        pixels = np.zeros(SIZE[::-1], dtype=np.uint8)
        pixels[:3, :4] = value
        self._write(path, ("mask", value), lambda: Image.fromarray(pixels))

    def text(self, path, content="clutter"):
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)

    def _write(self, path, kind, draw):
        target = self.root / path
        key = (*kind, target.suffix)
        if self.full and key in self._first:
            try:
                os.link(self._first[key], target)
            except FileNotFoundError:
                target.parent.mkdir(parents=True)
                os.link(self._first[key], target)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        draw().save(target)
        self._first[key] = target


def build_mvtec_ad(root, categories=None, full=False):
    """`<root>/<category>/...` of MVTec AD, with the texts that lie beside the images and three grey categories."""
    writer = Writer(root, full)
    writer.text("license.txt")
    for name in categories or MvtecAd.expected:
        writer.text(f"{name}/readme.txt")
        mode = "L" if name in ("grid", "screw", "zipper") else "RGB"
        _build_mvtec_like(writer, name, MvtecAd.expected[name], mode=mode)
    return Path(root)


def build_mpdd(root, categories=None, full=False):
    """`<root>/<category>/...` of MPDD."""
    writer = Writer(root, full)
    for name in categories or Mpdd.expected:
        _build_mvtec_like(writer, name, Mpdd.expected[name])
    return Path(root)


def build_btad(root, categories=None, full=False):
    """`<root>/<category>/...` of BTAD: ok and ko, BMP and PNG. Give a root that ends in BTech_Dataset_transformed."""
    writer = Writer(root, full)
    for name in categories or Btad.expected:
        counts, (image, mask) = Btad.expected[name], BTAD_FORMATS[name]
        for number in range(counts.train if full else FEW["train"]):
            writer.image(f"{name}/train/ok/{number:04d}.{image}")
        for number in range(counts.good if full else FEW["good"]):
            writer.image(f"{name}/test/ok/{number:04d}.{image}")
        for number in range(counts.defects["ko"] if full else FEW["defect"]):
            writer.image(f"{name}/test/ko/{number:04d}.{image}")
            writer.mask(f"{name}/ground_truth/ko/{number:04d}.{mask}")
    return Path(root)


def build_mvtec_3d_ad(root, categories=None, full=False):
    """`<root>/<category>/...` of MVTec 3D-AD: rgb, xyz and gt side by side; the gt of good images is all zero."""
    writer = Writer(root, full)
    for name in categories or Mvtec3dAd.expected:
        counts, kinds = Mvtec3dAd.expected[name], MVTEC_3D_DEFECTS[name]
        numbers = {
            "train/good": counts.train if full else FEW["train"],
            "validation/good": NUM_VALIDATION[name] if full else FEW["validation"],
            "test/good": counts.good if full else FEW["good"],
        }
        for position, kind in enumerate(kinds):  # the numbers per type are not published; here they are nearly equal
            share = counts.anomalous // len(kinds) + (position < counts.anomalous % len(kinds))
            numbers[f"test/{kind}"] = share if full else FEW["defect"]
        for folder, number_of_images in numbers.items():
            for number in range(number_of_images):
                writer.image(f"{name}/{folder}/rgb/{number:03d}.png")
                writer.image(f"{name}/{folder}/xyz/{number:03d}.tiff", mode="F")
                if folder.startswith("test/"):
                    writer.mask(f"{name}/{folder}/gt/{number:03d}.png", value=0 if folder == "test/good" else 255)
    return Path(root)


def build_visa_raw(root, categories=None, full=False):
    """`<root>/<category>/Data/...` of VisA with its three lists: .JPG images, masks with small ids."""
    writer = Writer(root, full)
    lists = {variant: ["object,split,label,image,mask"] for variant in VISA_COUNTS}
    for name in categories or VISA_COUNTS["1cls"]:
        one_class = VISA_COUNTS["1cls"][name]
        num_normal = one_class.train + one_class.good if full else 5
        num_anomalous = 100 if full else 4
        normal = [f"{name}/Data/Images/Normal/{number:04d}.JPG" for number in range(num_normal)]
        anomalous = [
            (f"{name}/Data/Images/Anomaly/{number:03d}.JPG", f"{name}/Data/Masks/Anomaly/{number:03d}.png")
            for number in range(num_anomalous)
        ]
        writer.text(f"{name}/image_anno.csv", "image,label,mask\n")
        for image in normal:
            writer.image(image)
        for number, (image, mask) in enumerate(anomalous):
            writer.image(image)
            writer.mask(mask, value=1 + number % 3)
        for variant, lines in lists.items():
            counts = VISA_COUNTS[variant][name]
            num_train = counts.train if full else 3
            num_test_bad = counts.defects["bad"] if full else (4 if variant == "1cls" else 2)
            lines += [
                f"{name},{'train' if i < num_train else 'test'},normal,{image}," for i, image in enumerate(normal)
            ]
            lines += [
                f"{name},{'test' if i < num_test_bad else 'train'},anomaly,{image},{mask}"
                for i, (image, mask) in enumerate(anomalous)
            ]
    for variant, lines in lists.items():
        writer.text(f"split_csv/{variant}.csv", "\r\n".join(lines) + "\r\n")
    return Path(root)


def build_visa_1cls(root, categories=None, full=False):
    """`<root>/<category>/...` of VisA as prepare_data.py makes it from 1cls.csv: no _mask, masks of 0 and 255."""
    writer = Writer(root, full)
    for name in categories or VISA_COUNTS["1cls"]:
        _build_mvtec_like(writer, name, VISA_COUNTS["1cls"][name], extension="JPG", suffix="")
    return Path(root)


def build_visa_2cls(root, variant, categories=None):
    """`<root>/<category>/...` of VisA as prepare_data.py makes it from a 2cls list; small."""
    writer = Writer(root, full=False)
    for name in categories or VISA_COUNTS[variant]:
        for split in ("train", "test"):
            for number in range(2):
                writer.image(f"{name}/{split}/good/{split}{number:03d}.JPG")
                writer.image(f"{name}/{split}/bad/{split}{number:03d}.JPG")
                writer.mask(f"{name}/ground_truth/{split}/bad/{split}{number:03d}.png")
    return Path(root)


BUILDERS = {
    "mvtec_ad": build_mvtec_ad,
    "visa": build_visa_raw,
    "btad": build_btad,
    "mvtec_3d_ad": build_mvtec_3d_ad,
    "mpdd": build_mpdd,
}
"""Layout to the builder of its published tree."""


def _build_mvtec_like(writer, name, counts, mode="RGB", extension="png", suffix="_mask"):
    for number in range(counts.train if writer.full else FEW["train"]):
        writer.image(f"{name}/train/good/{number:03d}.{extension}", mode)
    for number in range(counts.good if writer.full else FEW["good"]):
        writer.image(f"{name}/test/good/{number:03d}.{extension}", mode)
    for kind, published in counts.defects.items():
        for number in range(published if writer.full else FEW["defect"]):
            writer.image(f"{name}/test/{kind}/{number:03d}.{extension}", mode)
            writer.mask(f"{name}/ground_truth/{kind}/{number:03d}{suffix}.png")
