"""MVTec AD: 15 objects and textures, 3,629 training and 1,725 test images, in the layout that carries its name.

    <root>/<category>/train/good/000.png
    <root>/<category>/test/good/000.png
    <root>/<category>/test/<defect type>/000.png
    <root>/<category>/ground_truth/<defect type>/000_mask.png      0 and 255; none for good images

The archive of the whole dataset, `mvtec_anomaly_detection.tar.xz`, and those of single categories unpack to the same
tree. Images of grid, screw and zipper are grey. Counts: tables of the two papers, and file lists of the published data.
"""

from __future__ import annotations

from harness.datasets.base import Counts
from harness.datasets.folder import Folder


class MvtecAd(Folder):
    """The layout `folder` with published categories and counts."""

    summary = "MVTec AD: 15 objects and textures, 3,629 training and 1,725 test images, pixel masks"
    licence = "CC BY-NC-SA 4.0"
    home_page = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    citation = (
        "P. Bergmann et al., MVTec AD - A Comprehensive Real-World Dataset for Unsupervised Anomaly Detection, CVPR "
        "2019, doi:10.1109/CVPR.2019.00982; P. Bergmann et al., The MVTec Anomaly Detection Dataset, International "
        "Journal of Computer Vision 129 (2021), doi:10.1007/s11263-020-01400-4"
    )
    obtain = "download mvtec_anomaly_detection.tar.xz from {home_page} and unpack it"
    unpacked = ("mvtec_anomaly_detection",)
    expected = {
        "bottle": Counts(train=209, good=20, defects={"broken_large": 20, "broken_small": 22, "contamination": 21}),
        "cable": Counts(
            train=224,
            good=58,
            defects={
                "bent_wire": 13,
                "cable_swap": 12,
                "combined": 11,
                "cut_inner_insulation": 14,
                "cut_outer_insulation": 10,
                "missing_cable": 12,
                "missing_wire": 10,
                "poke_insulation": 10,
            },
        ),
        "capsule": Counts(
            train=219,
            good=23,
            defects={"crack": 23, "faulty_imprint": 22, "poke": 21, "scratch": 23, "squeeze": 20},
        ),
        "carpet": Counts(
            train=280,
            good=28,
            defects={"color": 19, "cut": 17, "hole": 17, "metal_contamination": 17, "thread": 19},
        ),
        "grid": Counts(
            train=264,
            good=21,
            defects={"bent": 12, "broken": 12, "glue": 11, "metal_contamination": 11, "thread": 11},
        ),
        "hazelnut": Counts(train=391, good=40, defects={"crack": 18, "cut": 17, "hole": 18, "print": 17}),
        "leather": Counts(train=245, good=32, defects={"color": 19, "cut": 19, "fold": 17, "glue": 19, "poke": 18}),
        "metal_nut": Counts(train=220, good=22, defects={"bent": 25, "color": 22, "flip": 23, "scratch": 23}),
        "pill": Counts(
            train=267,
            good=26,
            defects={
                "color": 25,
                "combined": 17,
                "contamination": 21,
                "crack": 26,
                "faulty_imprint": 19,
                "pill_type": 9,
                "scratch": 24,
            },
        ),
        "screw": Counts(
            train=320,
            good=41,
            defects={
                "manipulated_front": 24,
                "scratch_head": 24,
                "scratch_neck": 25,
                "thread_side": 23,
                "thread_top": 23,
            },
        ),
        "tile": Counts(
            train=230,
            good=33,
            defects={"crack": 17, "glue_strip": 18, "gray_stroke": 16, "oil": 18, "rough": 15},
        ),
        "toothbrush": Counts(train=60, good=12, defects={"defective": 30}),
        "transistor": Counts(
            train=213,
            good=60,
            defects={"bent_lead": 10, "cut_lead": 10, "damaged_case": 10, "misplaced": 10},
        ),
        "wood": Counts(
            train=247,
            good=19,
            defects={"color": 8, "combined": 11, "hole": 10, "liquid": 10, "scratch": 21},
        ),
        "zipper": Counts(
            train=240,
            good=32,
            defects={
                "broken_teeth": 19,
                "combined": 16,
                "fabric_border": 17,
                "fabric_interior": 16,
                "rough": 17,
                "split_teeth": 18,
                "squeezed_teeth": 16,
            },
        ),
    }


DATASET = MvtecAd
