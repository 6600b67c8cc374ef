"""What every layout shares: where its root is, its category list, and the pairing of masks with images.

A layout derives from `LayoutDataset`, says in `is_category` how a category is recognised and in `scan` how one is
read; published counts are data (`expected`). Everything a user can get wrong about a folder is told here, once.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from harness.contracts import AdgridError, Category, LayoutProblem, Places
from harness.datasets.checks import Counts, check_classes, check_files, compare_counts
from harness.datasets.files import is_folder, list_folders, resolve_path

_FOLDERS_LOOKED_INTO = 200
"""How many folders the search for a misplaced root looks into, so that a wrong root on a big disk answers at once."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What the files of one category say."""

    category: Category
    problems: tuple[LayoutProblem, ...] = ()
    """Complaints that make the images untrustworthy: the category is refused."""
    notes: tuple[LayoutProblem, ...] = ()
    """Complaints of the check alone: the category can be used as it is."""


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Masks matched to images by stem."""

    mask_of: Mapping[str, str]
    """Image name to mask name."""
    without_mask: tuple[str, ...]
    """Images that no mask belongs to."""
    without_image: tuple[str, ...]
    """Masks that belong to no image."""
    ambiguous: tuple[str, ...]
    """Images with two masks, or that share a stem, and with it a mask, with another image."""


class LayoutDataset(ABC):
    """A dataset that lies in folders, one category each; the base of all layouts.

    Attributes:
        name: as in the rows; independent of the layout.
        variant: which of the published splits; None where there is one alone.
    """

    summary: ClassVar[str]
    licence: ClassVar[str]
    home_page: ClassVar[str]
    citation: ClassVar[str]
    tree: ClassVar[str]
    """Path below the root by which a category is known, such as `<category>/train/good`."""
    obtain: ClassVar[str] = "download it from {home_page} and unpack it"
    """What to do to have the data; `{home_page}` is filled in."""
    expected: ClassVar[Mapping[str, Counts]] = {}
    """Published categories and their counts; empty where there are none to compare with."""
    unpacked: Sequence[str] = ()
    """Folders that the published archives unpack to; one of them below the root is taken for the root."""

    variants: ClassVar[Mapping[str, str]] = {}
    """Published splits of the same images: name -> one line, the default first; empty where there is one alone."""

    def __init__(self, name: str, root: str | None, places: Places, variant: str | None = None) -> None:
        self.name = name
        self.variant = variant or next(iter(self.variants), None)
        self._named_root = self.find_root(root, places)

    @cached_property
    def root(self) -> str:
        """Absolute path or URI of the categories' folder; empty when none was given and there is no data root."""
        if self.unpacked and self._named_root and not self._holds_categories(self._named_root):
            below = [f"{self._named_root}/{folder}" for folder in self.unpacked]
            return next((folder for folder in below if self._holds_categories(folder)), self._named_root)
        return self._named_root

    def find_root(self, root: str | None, places: Places) -> str:
        """The given root, or the default place `<data root>/<name>`; empty when neither is known. Reads nothing."""
        if root is not None:
            return resolve_path(root)
        return f"{resolve_path(places.data_root)}/{self.name}" if places.data_root else ""

    def is_category(self, folder: str) -> bool:
        """Whether a folder looks like a category of this layout; never, where categories are not folders."""
        return False

    def published_counts(self) -> Mapping[str, Counts]:
        """Published counts of the variant in use; overridden where the variants differ."""
        return self.expected

    @abstractmethod
    def scan(self, name: str) -> Scan:
        """Reads the file list of one existing category."""

    def prepare(self) -> None:  # noqa: B027 (most layouts have nothing to do here)
        """Nothing to make: the data must be obtained."""

    def locate_problem(self) -> LayoutProblem | None:
        """Why no category can be found under the root, or None when at least one is there."""
        target = self.root or f"DATA/{self.name}"
        place = f"{self.obtain.format(home_page=self.home_page)}, so that {target}/{self.tree} exists"
        if self.expected:
            place += f" for its {len(self.expected)} categories ({join_first(self.expected)})"
        if not self.root:
            remedy = f"pass --data-root DATA or give the dataset a root; {place}"
            return LayoutProblem(category="", what="nobody named its folder", remedy=remedy)
        if self.category_names():
            return None
        better = self._find_better_root()
        if better is not None:
            return self._point_to(better)
        if not is_folder(self.root):
            return LayoutProblem(category="", what=f"there is no folder {self.root}", remedy=place)
        folders = list_folders(self.root)
        seen = f"its folders are {join_first(folders)}" if folders else "it has no folders"
        return LayoutProblem(
            category="", what=f"{self.root} has no category (looked for {self.tree}; {seen})", remedy=place
        )

    def _point_to(self, better: str) -> LayoutProblem:
        """The complaint about a root that is not where the categories are."""
        remedy = f"name {better} as its root"
        if better.startswith(f"{self.root}/") or self.root.startswith(f"{better}/") or _base_name(better) == self.name:
            level = "low" if self.root.startswith(f"{better}/") else "high"
            what = f"its root {self.root} is too {level} in the tree: the categories lie in {better}"
            if _base_name(better) == self.name:
                remedy += f", or {_parent(better)} as --data-root"
        else:
            what = f"there is no folder {self.root}, but the categories lie in {better}"
            remedy += f", or move it to {self.root}"
        return LayoutProblem(category="", what=what, remedy=remedy)

    def missing(self) -> str | None:
        """Why the data is not here and how to get it, or None when it is."""
        problem = self.locate_problem()
        return None if problem is None else f"{problem.what}; {problem.remedy}"

    def category_names(self) -> tuple[str, ...]:
        """All categories under the root, sorted; empty when the data is missing."""
        if not self.root:
            return ()
        folders = [name for name in list_folders(self.root) if self.is_category(f"{self.root}/{name}")]
        return tuple(sorted(unify_name(name) for name in folders))

    def missing_categories(self) -> tuple[str, ...]:
        """Published categories that are not under the root, sorted."""
        return tuple(sorted(self.expected.keys() - set(self.category_names())))

    def category_folder(self, name: str) -> str:
        """Path of a category, whose folder may spell an accent another way than the search space does."""
        for folder in list_folders(self.root):
            if unify_name(folder) == unify_name(name):
                return f"{self.root}/{folder}"
        return f"{self.root}/{name}"

    def category(self, name: str) -> Category:
        """Lists one category, from file names alone.

        Raises:
            AdgridError: the data is missing, the category unknown, or its layout broken; says what to do.
        """
        problem = self.locate_problem() or self._name_problem(name)
        if problem is not None:
            raise AdgridError(f"dataset {self.name!r}: {problem.what}; {problem.remedy}")
        scan = self.scan(name)
        if scan.problems:
            told = "; ".join(f"{problem.what}: {problem.remedy}" for problem in scan.problems[:3])
            more = f"; and {len(scan.problems) - 3} more problems" if len(scan.problems) > 3 else ""
            raise AdgridError(f"dataset {self.name!r}, category {name!r}: {told}{more}")
        return scan.category

    def check(self, categories: Sequence[str] | None = None, decode: bool = False) -> list[LayoutProblem]:
        """Every complaint about the requested categories: names, counts, pairs, readable files, sizes of masks.

        Args:
            categories: which to check; None for all that are there or published.
            decode: also decode every image and mask, which finds truncated files and masks without a defect;
                otherwise only their headers are read.
        """
        problem = self.locate_problem()
        if problem is not None:
            return [problem]
        problems = []
        for name in sorted({*self.category_names(), *self.expected}) if categories is None else categories:
            unknown = self._name_problem(name)
            if unknown is not None:
                problems.append(unknown)
                continue
            scan = self.scan(name)
            problems += (*scan.problems, *scan.notes)
            problems += compare_counts(scan.category, self.published_counts().get(name))
            problems += check_classes(scan.category)
            problems += check_files(scan.category, decode)
        return problems

    def _name_problem(self, name: str) -> LayoutProblem | None:
        known = self.category_names()
        if unify_name(name) in known:
            return None
        if name in self.expected:
            return LayoutProblem(
                category=name,
                what=f"the published category {name!r} is not in {self.root} (looked for {self.tree})",
                remedy=f"{self.obtain.format(home_page=self.home_page)}, or name only categories that are there: "
                f"{join_first(known)}",
            )
        near = difflib.get_close_matches(name.lower(), [other.lower() for other in known], n=1, cutoff=0.5)
        nearest = [other for other in known if near and other.lower() == near[0]]
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        return LayoutProblem(
            category=name,
            what=f"there is no category {name!r} in {self.root} (looked for {self.tree})",
            remedy=f"{hint}Found: {join_first(known)}",
        )

    def _find_better_root(self) -> str | None:
        """The folder a few levels above, below or beside the root that does hold categories."""
        folder = self.root
        for _ in range(5):
            parent = _parent(folder)
            if not parent:
                break
            if self.is_category(folder) or self._holds_this_dataset(parent):
                return parent
            folder = parent
        # Below a root that exists, or beside one that does not. Any dataset of one's own will do below the root; for
        # the rest only a folder that goes by the dataset's name or holds its published categories.
        exists = is_folder(self.root)
        level = [self.root if exists else _parent(self.root)]
        found: list[str] = []
        looked_into = 0
        for _ in range(2):
            level = [f"{folder}/{name}" for folder in level if folder for name in list_folders(folder)]
            level = level[: _FOLDERS_LOOKED_INTO - looked_into]
            looked_into += len(level)
            found += [folder for folder in level if self._holds_categories(folder)]
        ours = [folder for folder in found if self._holds_this_dataset(folder)]
        ours.sort(key=lambda folder: _base_name(folder) != self.name)
        return next(iter(ours or (found if exists and not self.expected else ())), None)

    def _holds_categories(self, folder: str) -> bool:
        return any(self.is_category(f"{folder}/{name}") for name in list_folders(folder))

    def _holds_this_dataset(self, folder: str) -> bool:
        """Whether a folder holds categories and goes by the dataset's name, or holds a published category."""
        if _base_name(folder) == self.name:
            return self._holds_categories(folder)
        return any(self.is_category(f"{folder}/{name}") for name in self.expected)


def unify_name(name: str) -> str:
    """One spelling per name: file systems and editors store accents in one or in two characters (NFC here)."""
    return unicodedata.normalize("NFC", name)


def pair_masks(images: Sequence[str], masks: Sequence[str], suffix: str = "_mask") -> Pairing:
    """Matches masks to images by stem, with or without a suffix; never by order.

    Args:
        images: file names of the images of one folder.
        masks: file names of the masks that belong to them; extensions may differ.
        suffix: what a mask's stem may have more than its image's; a stem that is equal comes first.
    """
    image_of_stem: dict[str, list[str]] = defaultdict(list)
    for image in images:
        image_of_stem[_stem(image)].append(image)
    masks_of: dict[str, list[str]] = defaultdict(list)
    without_image = []
    for mask in masks:
        stem = _stem(mask)
        shortened = stem[: -len(suffix)] if stem.lower().endswith(suffix) else stem
        owners = image_of_stem.get(stem) or image_of_stem.get(shortened)
        if not owners:
            without_image.append(mask)
        for owner in owners or ():
            masks_of[owner].append(mask)
    return Pairing(
        mask_of={image: found[0] for image, found in masks_of.items()},
        without_mask=tuple(image for image in images if image not in masks_of),
        without_image=tuple(without_image),
        ambiguous=tuple(
            image for image, found in masks_of.items() if len(found) > 1 or len(image_of_stem[_stem(image)]) > 1
        ),
    )


def describe_pairing(category: str, pairing: Pairing, image_folder: str, mask_folder: str) -> list[LayoutProblem]:
    """The complaints of a pairing, one per kind, each with the number and the first few names."""
    problems = []
    is_optional = "/ground_truth/" in mask_folder
    if pairing.without_mask:
        problems.append(
            LayoutProblem(
                category=category,
                what=f"{len(pairing.without_mask)} anomalous images in {image_folder} have no mask in {mask_folder}: "
                f"{join_first(pairing.without_mask)}",
                remedy="copy the missing masks (same stem, or with _mask)"
                + ("; a category without any masks has no ground_truth folder at all" if is_optional else ""),
            )
        )
    if pairing.without_image:
        problems.append(
            LayoutProblem(
                category=category,
                what=f"{len(pairing.without_image)} masks in {mask_folder} belong to no image in {image_folder}: "
                f"{join_first(pairing.without_image)}",
                remedy="copy the missing images, or remove these masks",
            )
        )
    if pairing.ambiguous:
        problems.append(
            LayoutProblem(
                category=category,
                what=f"{len(pairing.ambiguous)} images in {image_folder} and their masks in {mask_folder} are not one "
                f"to one: {join_first(pairing.ambiguous)}",
                remedy="keep one image and one mask per stem",
            )
        )
    return problems


def _parent(path: str) -> str:
    """The folder that holds a path; empty at the top of a disk or a bucket."""
    parent = path.rpartition("/")[0]
    return "" if parent.endswith(":/") else parent


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(name: str) -> str:
    return unify_name(os.path.splitext(name)[0])


def join_first(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
