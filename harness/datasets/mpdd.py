"""MPDD: six kinds of painted metal parts, 888 training and 458 test images, in the layout of MVTec AD.

    <root>/<category>/train/good/000.png
    <root>/<category>/test/{good,<defect type>}/000.png
    <root>/<category>/ground_truth/<defect type>/000_mask.png

Parts lie in any direction and place, unlike those of MVTec AD. Counts: file lists of the published data.
"""

from __future__ import annotations

from harness.datasets.base import Counts
from harness.datasets.folder import Folder


class Mpdd(Folder):
    """The layout `folder` with published categories and counts."""

    summary = "MPDD: six kinds of painted metal parts, 888 training and 458 test images, pixel masks"
    licence = "CC BY-NC-SA 4.0"
    home_page = "https://github.com/stepanje/MPDD"
    citation = (
        "S. Jezek, M. Jonak, R. Burget, P. Dvorak, M. Skotak, Deep learning-based defect detection of metal parts: "
        "evaluating current methods in complex conditions, ICUMT 2021, doi:10.1109/ICUMT54235.2021.9631567"
    )
    obtain = "download MPDD by the link at {home_page} and unpack it"
    unpacked = ("MPDD",)
    expected = {
        "bracket_black": Counts(train=289, good=32, defects={"hole": 12, "scratches": 35}),
        "bracket_brown": Counts(train=185, good=26, defects={"bend_and_parts_mismatch": 17, "parts_mismatch": 34}),
        "bracket_white": Counts(train=110, good=30, defects={"defective_painting": 13, "scratches": 17}),
        "connector": Counts(train=128, good=30, defects={"parts_mismatch": 14}),
        "metal_plate": Counts(train=54, good=26, defects={"major_rust": 14, "scratches": 34, "total_rust": 23}),
        "tubes": Counts(train=122, good=32, defects={"anomalous": 69}),
    }


DATASET = Mpdd
