"""VisA: 12 objects, 9,621 normal and 1,200 anomalous images, as published or as its authors' script rearranges it.

    <root>/<category>/Data/Images/{Normal,Anomaly}/0000.JPG         published; which image is for what, the lists say
    <root>/<category>/Data/Masks/Anomaly/000.png
    <root>/split_csv/{1cls,2cls_highshot,2cls_fewshot}.csv

    <root>/<category>/train/good/0000.JPG                           made by prepare_data.py for one of the lists
    <root>/<category>/test/{good,bad}/000.JPG
    <root>/<category>/ground_truth/bad/000.png                      (2cls: ground_truth/test/bad)

Each category is read as what it is found to be, and an image has the same sample id in both trees, so shots and splits
are the same. Pixels of published masks are small class ids (1, 2, ...), nearly black to the eye; the script makes
them 255. Both count as defect. Extensions are in upper case, and images are not square.

`1cls` is the split for anomaly detection. The `2cls` lists were made for supervised classification: part of the
anomalous images is in their `train`. Those are left out here, since methods are fitted to normal images.

Counts: the lists themselves.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from harness.contracts import AdgridError, Category, LayoutProblem, Places, Sample
from harness.datasets.base import Counts, Scan, join_first, unify_name
from harness.datasets.files import is_folder, list_images, open_file
from harness.datasets.folder import Folder, in_order

_COLUMNS = ("object", "split", "label", "image", "mask")


def _table(bad: int, counts: Mapping[str, tuple[int, int]]) -> dict[str, Counts]:
    return {name: Counts(train=train, good=good, defects={"bad": bad}) for name, (train, good) in counts.items()}


COUNTS = {
    "1cls": _table(
        100,
        {
            "candle": (900, 100),
            "capsules": (542, 60),
            "cashew": (450, 50),
            "chewinggum": (453, 50),
            "fryum": (450, 50),
            "macaroni1": (900, 100),
            "macaroni2": (900, 100),
            "pcb1": (904, 100),
            "pcb2": (901, 100),
            "pcb3": (905, 101),
            "pcb4": (904, 101),
            "pipe_fryum": (450, 50),
        },
    ),
    "2cls_highshot": _table(
        40,
        {
            "candle": (600, 400),
            "capsules": (361, 241),
            "cashew": (300, 200),
            "chewinggum": (302, 201),
            "fryum": (300, 200),
            "macaroni1": (600, 400),
            "macaroni2": (600, 400),
            "pcb1": (602, 402),
            "pcb2": (601, 400),
            "pcb3": (604, 402),
            "pcb4": (603, 402),
            "pipe_fryum": (300, 200),
        },
    ),
    "2cls_fewshot": _table(
        80,
        {
            "candle": (200, 800),
            "capsules": (120, 482),
            "cashew": (100, 400),
            "chewinggum": (101, 402),
            "fryum": (100, 400),
            "macaroni1": (200, 800),
            "macaroni2": (200, 800),
            "pcb1": (201, 803),
            "pcb2": (200, 801),
            "pcb3": (201, 805),
            "pcb4": (201, 804),
            "pipe_fryum": (100, 400),
        },
    ),
}
"""Normal training and normal test images per list and category, without the anomalous training images."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of a list; paths are relative to the root."""

    split: Literal["train", "test"]
    is_normal: bool
    image: str
    mask: str


class Visa(Folder):
    """Reads the published tree by its lists, and a prepared tree as the layout `folder`."""

    summary = "VisA: 12 objects, 8,659 training and 2,162 test images, pixel masks; raw or prepared tree"
    licence = "CC BY 4.0"
    home_page = "https://github.com/amazon-science/spot-diff"
    citation = (
        "Y. Zou, J. Jeong, L. Pemula, D. Zhang, O. Dabeer, SPot-the-Difference Self-Supervised Pre-training for "
        "Anomaly Detection and Segmentation, ECCV 2022, arXiv:2207.14315"
    )
    tree = "<category>/Data/Images"
    obtain = (
        "download https://amazon-visual-anomaly.s3.us-west-2.amazonaws.com/VisA_20220922.tar (see {home_page}) and "
        "unpack it, split_csv included"
    )
    variants = {
        "1cls": "the split for anomaly detection",
        "2cls_highshot": "60 % of the normal images for training; the list's anomalous training images are left out",
        "2cls_fewshot": "20 % of the normal images for training; the list's anomalous training images are left out",
    }
    expected = COUNTS["1cls"]

    def __init__(self, name: str, root: str | None, places: Places, variant: str | None = None) -> None:
        super().__init__(name, root, places, variant)
        self.unpacked = ("VisA_20220922", "VisA", f"VisA_pytorch/{self.variant}", "visa_pytorch", f"{self.variant}")
        if self.variant != "1cls":
            self.masks_in = "ground_truth/test/{kind}"

    def published_counts(self) -> Mapping[str, Counts]:
        """What the list of the variant holds."""
        return COUNTS[str(self.variant)]

    def is_category(self, folder: str) -> bool:
        """A category has the published folder of images, or a prepared one of normal training images."""
        return _is_raw(folder) or super().is_category(folder)

    def locate_problem(self) -> LayoutProblem | None:
        """Also whether the list of the variant is there and can be read, where the published tree needs it."""
        problem = super().locate_problem()
        if problem is None and any(_is_raw(self.category_folder(name)) for name in self.category_names()):
            try:
                self._rows  # noqa: B018 (read and checked once, kept for `scan`)
            except AdgridError as error:
                remedy = f"copy split_csv again from {self.home_page}"
                return LayoutProblem(category="", what=str(error), remedy=remedy)
        return problem

    def scan(self, name: str) -> Scan:
        """Lists one category by the list of the variant, or by its prepared folders."""
        folder = self.category_folder(name)
        if _is_raw(folder):
            return self._scan_raw(unify_name(name))
        scan = super().scan(name)
        is_two_class = is_folder(f"{folder}/train/bad")
        named = self.root.rpartition("/")[2]
        if is_two_class == (self.variant != "1cls") and (named == self.variant or named not in self.variants):
            return scan
        return Scan(
            category=scan.category,
            problems=(
                LayoutProblem(
                    category=name,
                    what=f"{folder} was prepared for another split than variant {self.variant!r}",
                    remedy=f"name the folder that prepare_data.py made with --split-type {self.variant}, or the "
                    "published tree, as its root",
                ),
            ),
        )

    def _scan_raw(self, name: str) -> Scan:
        rows = [row for row in self._rows.get(name, ()) if row.split == "test" or row.is_normal]
        masks = [row.mask for row in rows if not row.is_normal]
        found = self._find_files([*(row.image for row in rows), *masks])
        problems = []
        if not rows:
            what = f"{self._list_path} names no image of category {name!r}"
            problems.append(LayoutProblem(category=name, what=what, remedy="take the category out of the root"))
        absent = [path for path in (*(row.image for row in rows), *masks) if path not in found]
        if absent:
            what = f"{len(absent)} files that {self._list_path} names are not there: {join_first(absent)}"
            remedy = "unpack VisA_20220922.tar again, or copy these files again"
            problems.append(LayoutProblem(category=name, what=what, remedy=remedy))
        samples = [
            Sample(
                path=f"{self.root}/{found[row.image]}",
                category=name,
                sample_id=unify_name(f"{row.split}/{kind}/{_file_name(row.image)}"),
                split=row.split,
                label=0 if row.is_normal else 1,
                defect_type=kind,
                mask_path=f"{self.root}/{found[row.mask]}" if not row.is_normal and row.mask in found else None,
            )
            for row in rows
            for kind in ("good" if row.is_normal else "bad",)
            if row.image in found
        ]
        category = Category(
            name=name,
            train=in_order([sample for sample in samples if sample.split == "train"]),
            test=in_order([sample for sample in samples if sample.split == "test"]),
            has_masks=True,
        )
        return Scan(category=category, problems=tuple(problems), notes=tuple(self._find_unlisted(name)))

    def _find_files(self, paths: Iterable[str]) -> dict[str, str]:
        """Listed path to the path on disk, for those that are there; a copy may have changed the case of names."""
        folders: dict[str, dict[str, str]] = {}
        found = {}
        for path in paths:
            folder, _, name = path.rpartition("/")
            if folder not in folders:
                names = list_images(f"{self.root}/{folder}")
                folders[folder] = {unify_name(other).lower(): other for other in names}
            other = folders[folder].get(unify_name(name).lower())
            if other is not None:
                found[path] = f"{folder}/{other}"
        return found

    def _find_unlisted(self, name: str) -> list[LayoutProblem]:
        """A complaint about images and masks beside the listed ones; nothing reads them."""
        listed = {unify_name(path).lower() for row in self._rows.get(name, ()) for path in (row.image, row.mask)}
        unlisted = [
            f"{name}/Data/{folder}/{image}"
            for folder in ("Images/Anomaly", "Images/Normal", "Masks/Anomaly")
            for image in list_images(f"{self.root}/{name}/Data/{folder}")
            if unify_name(f"{name}/Data/{folder}/{image}").lower() not in listed
        ]
        if not unlisted:
            return []
        what = f"{len(unlisted)} files are not named in {self._list_path} and not used: {join_first(unlisted)}"
        return [LayoutProblem(category=name, what=what, remedy="remove those that are extra")]

    @property
    def _list_path(self) -> str:
        return f"{self.root}/split_csv/{self.variant}.csv"

    @cached_property
    def _rows(self) -> dict[str, list[_Row]]:
        """Category to the lines of the variant's list. Raises AdgridError where it is missing or broken."""
        try:
            with open_file(self._list_path) as file:
                return _parse_list(file.read().decode("utf-8-sig"), self._list_path)
        except FileNotFoundError:
            raise AdgridError(f"the list {self._list_path} is missing") from None
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise AdgridError(f"cannot read the list {self._list_path}: {error}") from error


def _parse_list(text: str, path: str) -> dict[str, list[_Row]]:
    """Reads a list whose columns may stand in any order.

    Raises:
        AdgridError: a column or value is missing or unknown, or an image occurs twice; names the file and line.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    header = [(name or "").strip().lower() for name in reader.fieldnames or ()]
    reader.fieldnames = header
    absent = [name for name in _COLUMNS if name not in header]
    if absent:
        raise AdgridError(f"{path} has no column {', '.join(absent)} (its first line is {','.join(header)!r})")
    rows: dict[str, list[_Row]] = {}
    seen: dict[str, int] = {}
    for line in reader:
        where = f"{path}, line {reader.line_num}"
        values = {name: (line[name] or "").strip() for name in _COLUMNS}
        split, label = values["split"].lower(), values["label"].lower()
        image, mask = (_check_path(values[name], where) for name in ("image", "mask"))
        if split not in ("train", "test") or label not in ("normal", "anomaly"):
            raise AdgridError(
                f"{where}: split must be train or test and label normal or anomaly, got {split!r} and {label!r}"
            )
        if not values["object"] or not image or (label == "anomaly" and not mask):
            raise AdgridError(f"{where}: the object, the image, or the mask of an anomalous image is empty")
        if image in seen:
            raise AdgridError(f"{where}: {image} is also in line {seen[image]}")
        seen[image] = reader.line_num
        row = _Row(split="train" if split == "train" else "test", is_normal=label == "normal", image=image, mask=mask)
        rows.setdefault(unify_name(values["object"]), []).append(row)
    return rows


def _check_path(path: str, where: str) -> str:
    """A path of a list with forward slashes. Raises AdgridError if it leads out of the dataset."""
    path = path.replace("\\", "/").removeprefix("./")
    if path.startswith("/") or ":" in path or ".." in path.split("/"):
        raise AdgridError(f"{where}: {path} leads out of the dataset")
    return path


def _is_raw(folder: str) -> bool:
    return is_folder(f"{folder}/Data/Images")


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


DATASET = Visa
