"""BTAD, the beanTech anomaly detection dataset: three products, 1,799 training and 741 test images.

    <root>/<category>/train/ok/0000.bmp
    <root>/<category>/test/{ok,ko}/0000.bmp
    <root>/<category>/ground_truth/ko/0000.png      the stem of its image, no _mask

The normal folder is `ok`, and formats are mixed: images of 01 are BMP with PNG masks, 02 is PNG throughout, 03 is BMP
throughout. Masks belong to images by stem. Images are 1600 x 1600 (01), 600 x 600 (02) and 800 x 600 (03) pixels. The
archive unpacks to `BTech_Dataset_transformed`.

Counts: file lists of the published data. The authors' README gives the numbers of training images of 02 and 03 the
other way round. Licence: as the authors' repository states it; some libraries name CC BY-NC-SA 4.0 instead.
"""

from __future__ import annotations

from harness.datasets.base import Counts
from harness.datasets.folder import Folder


class Btad(Folder):
    """The layout `folder` with normal images in `ok`."""

    summary = "BTAD: three industrial products, 1,799 training and 741 test images, pixel masks"
    licence = "CC BY-SA 4.0"
    home_page = "https://github.com/pankajmishra000/VT-ADL"
    citation = (
        "P. Mishra, R. Verk, D. Fornasier, C. Piciarelli, G. L. Foresti, VT-ADL: A Vision Transformer Network for "
        "Image Anomaly Detection and Localization, ISIE 2021, arXiv:2104.10036"
    )
    tree = "<category>/train/ok"
    obtain = "download btad.zip (https://avires.dimi.uniud.it/papers/btad/btad.zip, see {home_page}) and unpack it"
    normal_folder = "ok"
    unpacked = ("BTech_Dataset_transformed",)
    expected = {
        "01": Counts(train=400, good=21, defects={"ko": 49}),
        "02": Counts(train=399, good=30, defects={"ko": 200}),
        "03": Counts(train=1000, good=400, defects={"ko": 41}),
    }


DATASET = Btad
