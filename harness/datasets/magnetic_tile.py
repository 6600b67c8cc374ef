"""Magnetic tiles: 1,344 grey pictures of many sizes, one category, in the layout of the authors' repository.

    <root>/MT_Free/Imgs/exp1_num_10181.jpg                             normal, with an empty mask that is not read
    <root>/MT_{Blowhole,Break,Crack,Fray,Uneven}/Imgs/<name>.jpg       anomalous, <name>.png beside it: its mask

There is no published split. A tile was photographed under up to six exposures (`exp`) in a row, as the frame numbers
(`num`) show: they lie less than 100 apart within a tile and mostly far more between tiles. Here whole runs of frames
are drawn, so that a tile that is tested was not seen in training under other light: those without any defect, ranked
by `derive_seed("magnetic_tile", "split", <first picture>)`, until 70 % of the normal pictures are for training. All
others are for testing.

Four masks of uneven tiles are empty in the published data. These pictures stay anomalous, without a defective pixel.

Made smaller and sorted into train and test, the same pictures are read with `layout: folder`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from harness.contracts import Category, LayoutProblem, Sample, derive_seed
from harness.datasets.base import LayoutDataset, Scan, describe_pairing, pair_masks
from harness.datasets.checks import Counts
from harness.datasets.files import is_folder, list_images

CATEGORY = "magnetic_tile"
DEFECT_TYPES = ("blowhole", "break", "crack", "fray", "uneven")
TRAIN_SHARE = 0.7
"""Share of the normal pictures that is for training; a run is never cut, so a few more may be."""
EMPTY_MASKS = tuple(
    f"MT_Uneven/Imgs/exp{name}.png" for name in ("3_num_45042", "4_num_45057", "4_num_124690", "4_num_352527")
)
"""Masks of pictures with a defect that are published empty."""
MAX_GAP = 100
"""Frames between two pictures of one run, at most."""

_NAME = re.compile(r"exp\d+_num_(\d+)\.\w+", re.IGNORECASE)


class MagneticTile(LayoutDataset):
    """Reads the folders `MT_*`; the split follows from the names of the pictures."""

    summary = "magnetic tiles with five kinds of defect, sizes differ; own split by tile"
    licence = "none stated; the authors welcome use in research with citation"
    home_page = "https://github.com/abin24/Magnetic-tile-defect-datasets."
    citation = "Y. Huang et al., Surface defect saliency of magnetic tile, The Visual Computer 36 (2020)"
    tree = "MT_Free/Imgs"
    unpacked = ("Magnetic-tile-defect-datasets.", "Magnetic-tile-defect-datasets.-master")
    expected = {
        CATEGORY: Counts(
            train=669, good=283, defects={"blowhole": 115, "break": 85, "crack": 57, "fray": 32, "uneven": 103}
        )
    }

    def is_category(self, folder: str) -> bool:
        """Whether a folder holds the pictures of one kind; all of them together are the category."""
        return folder.rpartition("/")[2] in map(_folder_of, ("free", *DEFECT_TYPES)) and is_folder(f"{folder}/Imgs")

    def category_names(self) -> tuple[str, ...]:
        """The one category, where there is a folder of any kind."""
        return (CATEGORY,) if self.root and self._holds_categories(self.root) else ()

    def locate_problem(self) -> LayoutProblem | None:
        """As for every layout; and pictures that somebody has sorted into train and test are of another one."""
        problem = super().locate_problem()
        if problem is None or not is_folder(f"{self.root}/{CATEGORY}/train/good"):
            return problem
        what = f"{self.root} holds pictures in the layout of MVTec AD, not the authors' MT_Free/Imgs"
        return LayoutProblem(category="", what=what, remedy="add `layout: folder` to the dataset")

    def check(self, categories: Sequence[str] | None = None, decode: bool = False) -> list[LayoutProblem]:
        """As for every layout, but that the masks which are published empty may be so."""
        known = tuple(f"the mask {self.root}/{mask} of an anomalous image marks no pixel" for mask in EMPTY_MASKS)
        return [problem for problem in super().check(categories, decode) if problem.what not in known]

    def scan(self, name: str) -> Scan:
        """Lists the pictures, pairs those with a defect with their masks, and splits the normal ones."""
        problems: list[LayoutProblem] = []
        defective: list[Sample] = []
        for kind in DEFECT_TYPES:
            folder = f"{self.root}/{_folder_of(kind)}/Imgs"
            pictures, masks = _list_pictures(folder)
            pairing = pair_masks(pictures, masks)
            problems += describe_pairing(CATEGORY, pairing, folder, folder)
            defective += [self._sample(kind, picture, "test", pairing.mask_of.get(picture)) for picture in pictures]
        normal, _ = _list_pictures(f"{self.root}/{_folder_of('free')}/Imgs")
        if not normal:
            what = f"{self.root}/MT_Free/Imgs has no pictures, so there is nothing to train on"
            problems.append(LayoutProblem(category=CATEGORY, what=what, remedy="copy it again"))
        train = draw_training_pictures(normal, [sample.path.rpartition("/")[2] for sample in defective])
        test = [self._sample("free", picture, "test") for picture in normal if picture not in train]
        category = Category(
            name=CATEGORY,
            train=tuple(self._sample("free", picture, "train") for picture in normal if picture in train),
            test=tuple(sorted([*test, *defective], key=lambda sample: sample.path)),
            has_masks=True,
        )
        return Scan(category=category, problems=tuple(problems))

    def _sample(self, kind: str, picture: str, split: Literal["train", "test"], mask: str | None = None) -> Sample:
        folder = f"{_folder_of(kind)}/Imgs"
        return Sample(
            path=f"{self.root}/{folder}/{picture}",
            category=CATEGORY,
            sample_id=f"{folder}/{picture}",
            split=split,
            label=0 if kind == "free" else 1,
            defect_type="good" if kind == "free" else kind,
            mask_path=None if mask is None else f"{self.root}/{folder}/{mask}",
        )

    def _holds_this_dataset(self, folder: str) -> bool:
        return self._holds_categories(folder)  # the category has no folder of its own name


def draw_training_pictures(normal: list[str], defective: list[str]) -> set[str]:
    """The normal pictures that are for training: whole runs of frames in which no picture has a defect.

    Args:
        normal: file names of the normal pictures. One without a frame number makes a run of its own.
        defective: file names of all others.
    """
    labelled = [(name, True) for name in normal] + [(name, False) for name in defective]
    numbered = sorted((int(match[1]), *item) for item in labelled if (match := _NAME.fullmatch(item[0])))
    runs: list[list[tuple[int, str, bool]]] = []
    for picture in numbered:
        if not runs or picture[0] - runs[-1][-1][0] > MAX_GAP:
            runs.append([])
        runs[-1].append(picture)
    drawable = [[name] for name in normal if not _NAME.fullmatch(name)]
    drawable += [[name for _, name, _ in run] for run in runs if all(is_normal for _, _, is_normal in run)]
    train: set[str] = set()
    for run in sorted(drawable, key=lambda run: derive_seed("magnetic_tile", "split", run[0])):
        if len(train) >= TRAIN_SHARE * len(normal):
            break
        train.update(run)
    return train


def _list_pictures(folder: str) -> tuple[list[str], list[str]]:
    """Names of the pictures and of the masks in a folder, told apart by their format."""
    names = list_images(folder)
    masks = [name for name in names if name.lower().endswith(".png")]
    return [name for name in names if name not in masks], masks


def _folder_of(kind: str) -> str:
    return f"MT_{kind.capitalize()}"


DATASET = MagneticTile
