"""MVTec 3D-AD, its colour images: ten products, 2,656 training, 294 validation and 1,197 test images.

    <root>/<category>/train/good/rgb/000.png
    <root>/<category>/validation/good/rgb/000.png
    <root>/<category>/test/{good,<defect type>}/rgb/000.png
    <root>/<category>/test/{good,<defect type>}/gt/000.png      all zero for good images

The scans in `xyz/*.tiff` beside `rgb` are not read. Masks lie beside the images, also for good images, where they are
not read: a normal image has no defect.

What is done with the normal images in `validation` differs in the literature: ADPretrain (arXiv:2511.05245) leaves
them out, ADer (arXiv:2406.03262) trains on them. Both are variants here.

Counts: Table 1 of the paper. It gives no numbers per defect type, so none are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from harness.contracts import Places
from harness.datasets.base import Counts
from harness.datasets.folder import Folder

NUM_VALIDATION = {
    "bagel": 22,
    "cable_gland": 23,
    "carrot": 29,
    "cookie": 22,
    "dowel": 34,
    "foam": 27,
    "peach": 42,
    "potato": 33,
    "rope": 33,
    "tire": 29,
}
"""Published number of images in `validation`, all normal."""


class Mvtec3dAd(Folder):
    """The layout `folder` with images in `rgb` and masks in `gt` beside them."""

    summary = "MVTec 3D-AD, colour images: ten products, 2,656 training and 1,197 test images, pixel masks"
    licence = "CC BY-NC-SA 4.0"
    home_page = "https://www.mvtec.com/company/research/datasets/mvtec-3d-ad"
    citation = (
        "P. Bergmann, X. Jin, D. Sattlegger, C. Steger, The MVTec 3D-AD Dataset for Unsupervised 3D Anomaly Detection "
        "and Localization, VISAPP 2022, doi:10.5220/0010865000003124, arXiv:2112.09045"
    )
    tree = "<category>/train/good/rgb"
    obtain = "download mvtec_3d_anomaly_detection.tar.xz from {home_page} and unpack it"
    unpacked = ("mvtec_3d_anomaly_detection",)
    images_in = "{split}/{kind}/rgb"
    masks_in = "test/{kind}/gt"
    variants = {
        "train": "training images alone, as ADPretrain",
        "train_validation": "training and validation images, as ADer",
    }
    expected = {
        "bagel": Counts(train=244, good=22, anomalous=88),
        "cable_gland": Counts(train=223, good=21, anomalous=87),
        "carrot": Counts(train=286, good=27, anomalous=132),
        "cookie": Counts(train=210, good=28, anomalous=103),
        "dowel": Counts(train=288, good=26, anomalous=104),
        "foam": Counts(train=236, good=20, anomalous=80),
        "peach": Counts(train=361, good=26, anomalous=106),
        "potato": Counts(train=300, good=22, anomalous=92),
        "rope": Counts(train=298, good=32, anomalous=69),
        "tire": Counts(train=210, good=25, anomalous=87),
    }

    def __init__(self, name: str, root: str | None, places: Places, variant: str | None = None) -> None:
        super().__init__(name, root, places, variant)
        if self.variant == "train_validation":
            self.train_splits = ("train", "validation")

    def published_counts(self) -> Mapping[str, Counts]:
        """The table of the paper, with the validation images among those for training where the variant has them so."""
        if self.variant == "train":
            return self.expected
        return {
            name: replace(counts, train=(counts.train or 0) + NUM_VALIDATION[name])
            for name, counts in self.expected.items()
        }


DATASET = Mvtec3dAd
