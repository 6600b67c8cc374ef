"""ELPV: electroluminescence pictures of solar cells, from the package `elpv-dataset`.

2,624 grey 300 x 300 PNG images of cells cut from 44 modules, each graded by experts with a defect probability of 0,
1/3, 2/3 or 1 and the type of its module. The types are the categories `mono` and `poly`. Probability 0 is normal, 1 is
anomalous, and the two grades between, on which the experts were unsure, are left out: 401 of the 2,624 images.

There is no published split for anomaly detection. Here 70 % of the normal cells of each category are for training,
chosen by a hash of the file name, so the split is the same everywhere and for ever. The module a cell was cut from is
not published, so cells of one module may stand on both sides. There are image labels only, hence no pixel metrics.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from harness.contracts import Category, LayoutProblem, Places, Sample, derive_seed
from harness.datasets.base import Counts, LayoutDataset, Scan
from harness.datasets.files import list_images, open_file, resolve_path

TRAIN_SHARE = 0.7
"""Share of the normal images of a category that is for training."""


class Elpv(LayoutDataset):
    """Reads `labels.csv` and `images/` as the package installs them, or as its repository holds them."""

    summary = "solar cells in electroluminescence (mono, poly); image labels only, unsure grades left out, own split"
    licence = "CC BY-NC-SA 4.0"
    home_page = "https://github.com/zae-bayern/elpv-dataset"
    citation = (
        "C. Buerhop-Lutz et al., A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence "
        "Imagery, EU PVSEC 2018; S. Deitsch et al., Solar Energy 185 (2019); S. Deitsch et al., Machine Vision and "
        "Applications 32 (2021)"
    )
    tree = "labels.csv"
    expected = {
        "mono": Counts(train=412, good=176, defects={"defective": 313}),
        "poly": Counts(train=644, good=276, defects={"defective": 402}),
    }

    def find_root(self, root: str | None, places: Places) -> str:
        """The given folder with `labels.csv`, or the one inside the installed package, which is not imported."""
        if root is not None:
            return resolve_path(root)
        spec = importlib.util.find_spec("elpv_dataset")
        folders = (spec.submodule_search_locations or []) if spec else []
        return f"{folders[0]}/data" if folders else ""

    def locate_problem(self) -> LayoutProblem | None:
        """Whether the package is installed, or the given root holds its files."""
        if not self.root:
            return LayoutProblem(
                category="",
                what="the package elpv-dataset, which brings its images, is not installed",
                remedy='run: pip install "adgrid[quickstart]"',
            )
        if self._read_labels():
            return None
        return LayoutProblem(
            category="",
            what=f"{self.root} has no readable labels.csv",
            remedy='name the folder with labels.csv and images/ as its root, or run: pip install "adgrid[quickstart]"',
        )

    def category_names(self) -> tuple[str, ...]:
        """The types of modules."""
        return tuple(sorted({kind for _, _, kind in self._read_labels()}))

    def scan(self, name: str) -> Scan:
        """Splits the graded images of one type of module."""
        grade_of = {path: grade for path, grade, kind in self._read_labels() if kind == name}
        normal = [path for path, grade in grade_of.items() if grade == 0.0]
        anomalous = [path for path, grade in grade_of.items() if grade == 1.0]
        ranked = sorted(normal, key=lambda path: derive_seed("elpv", "split", os.path.basename(path)))
        num_train = round(TRAIN_SHARE * len(normal))

        def sample(path: str, split: Literal["train", "test"]) -> Sample:
            defective = grade_of[path] == 1.0
            return Sample(
                path=f"{self.root}/{path}",
                category=name,
                sample_id=path,
                split=split,
                label=1 if defective else 0,
                defect_type="defective" if defective else "good",
            )

        category = Category(
            name=name,
            train=tuple(sample(path, "train") for path in sorted(ranked[:num_train])),
            test=tuple(sample(path, "test") for path in sorted(ranked[num_train:] + anomalous)),
            has_masks=False,
        )
        return Scan(category=category, problems=tuple(self._find_absent(name, normal + anomalous)))

    def _find_absent(self, category: str, paths: list[str]) -> list[LayoutProblem]:
        present = {f"images/{image}" for image in list_images(f"{self.root}/images")}
        absent = [path for path in paths if path not in present]
        if not absent:
            return []
        return [
            LayoutProblem(
                category=category,
                what=f"{len(absent)} images that labels.csv names are not in {self.root}/images, such as {absent[0]}",
                remedy="run: pip install --force-reinstall elpv-dataset, or copy the folder again",
            )
        ]

    def _read_labels(self) -> list[tuple[str, float, str]]:
        """Path, defect probability and type per line, separated by blanks; empty where the file cannot be read."""
        if not self.root:
            return []
        try:
            with open_file(f"{self.root}/labels.csv") as file:
                rows = [line.split() for line in file.read().decode().splitlines() if line.strip()]
            return [(path, float(grade), kind) for path, grade, kind in rows]
        except (OSError, ValueError):
            return []


DATASET = Elpv
