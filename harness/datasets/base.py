"""What every layout shares: where its root is, its category list, and the check of found against expected.

A layout derives from `LayoutDataset`, says in `is_category` how a category is recognised and in `scan` how one is
read; published counts are data (`expected`). Everything a user can get wrong about a folder is told here, once.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

from harness.contracts import AdgridError, Category, LayoutProblem, Places, Sample
from harness.datasets.files import is_folder, list_folders, resolve_path
from harness.datasets.images import ImageProblem, match_sizes, read_image, read_mask, read_size

_FOLDERS_LOOKED_INTO = 200
"""How many folders the search for a misplaced root looks into, so that a wrong root on a big disk answers at once."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Published number of images of one category."""

    train: int
    good: int
    """Normal test images."""
    defects: Mapping[str, int]
    """Anomalous test images per defect type."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What the files of one category say: its images, and every complaint that makes them untrustworthy."""

    category: Category
    problems: tuple[LayoutProblem, ...] = ()


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
        root: absolute path or URI; empty when none was given and there is no data root.
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
    """Published counts per category; empty where there are none to compare with."""

    variants: ClassVar[Mapping[str, str]] = {}
    """Published splits of the same images: name -> one line, the default first; empty where there is one alone."""

    def __init__(self, name: str, root: str | None, places: Places, variant: str | None = None) -> None:
        self.name = name
        self.variant = variant or next(iter(self.variants), None)
        self.root = self.find_root(root, places)

    def find_root(self, root: str | None, places: Places) -> str:
        """The given root, or the default place `<data root>/<name>`; empty when neither is known."""
        if root is not None:
            return resolve_path(root)
        return f"{resolve_path(places.data_root)}/{self.name}" if places.data_root else ""

    def is_category(self, folder: str) -> bool:
        """Whether a folder looks like a category of this layout; never, where categories are not folders."""
        return False

    @abstractmethod
    def scan(self, name: str) -> Scan:
        """Reads the file list of one existing category."""

    def prepare(self) -> None:  # noqa: B027 (most layouts have nothing to do here)
        """Nothing to make: the data must be obtained."""

    def locate_problem(self) -> LayoutProblem | None:
        """Why no category can be found under the root, or None when at least one is there."""
        target = self.root or f"DATA/{self.name}"
        place = f"{self.obtain.format(home_page=self.home_page)}, so that {target}/{self.tree} exists"
        if not self.root:
            remedy = f"pass --data-root DATA or give the dataset a root; {place}"
            return LayoutProblem(category="", what="nobody named its folder", remedy=remedy)
        if self.category_names():
            return None
        better = self._find_better_root()
        if better is not None:
            level = "low" if self.root.startswith(f"{better}/") else "high"
            or_parent = f", or {_parent(better)} as --data-root" if _base_name(better) == self.name else ""
            return LayoutProblem(
                category="",
                what=f"its root {self.root} is too {level} in the tree: the categories lie in {better}",
                remedy=f"name {better} as its root{or_parent}",
            )
        if not is_folder(self.root):
            return LayoutProblem(category="", what=f"there is no folder {self.root}", remedy=place)
        folders = list_folders(self.root)
        seen = f"its folders are {_join_first(folders)}" if folders else "it has no folders"
        return LayoutProblem(
            category="", what=f"{self.root} has no category (looked for {self.tree}; {seen})", remedy=place
        )

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
            problems += scan.problems
            problems += compare_counts(scan.category, self.expected.get(name))
            problems += check_classes(scan.category)
            problems += check_files(scan.category, decode)
        return problems

    def _name_problem(self, name: str) -> LayoutProblem | None:
        known = self.category_names()
        if unify_name(name) in known:
            return None
        near = difflib.get_close_matches(name.lower(), [other.lower() for other in known], n=1, cutoff=0.5)
        nearest = [other for other in known if near and other.lower() == near[0]]
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        return LayoutProblem(
            category=name,
            what=f"there is no category {name!r} in {self.root} (looked for {self.tree})",
            remedy=f"{hint}Found: {_join_first(known)}",
        )

    def _find_better_root(self) -> str | None:
        """The folder a few levels above or below the root that does hold categories."""
        folder = self.root
        for _ in range(3):
            parent = _parent(folder)
            if not parent:
                break
            if self.is_category(folder) or (_base_name(parent) == self.name and self._holds_categories(parent)):
                return parent
            folder = parent
        # Any folder below a root that exists will do, best one with the dataset's name; beside a missing root only
        # a folder with that name.
        exists = is_folder(self.root)
        level = [self.root if exists else _parent(self.root)]
        found: list[str] = []
        looked_into = 0
        for _ in range(2):
            level = [f"{folder}/{name}" for folder in level if folder for name in list_folders(folder)]
            level = level[: _FOLDERS_LOOKED_INTO - looked_into]
            looked_into += len(level)
            found += [folder for folder in level if self._holds_categories(folder)]
        named = [folder for folder in found if _base_name(folder) == self.name]
        return next(iter(named or (found if exists else ())), None)

    def _holds_categories(self, folder: str) -> bool:
        return any(self.is_category(f"{folder}/{name}") for name in list_folders(folder))


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
    if pairing.without_mask:
        problems.append(
            LayoutProblem(
                category=category,
                what=f"{len(pairing.without_mask)} anomalous images in {image_folder} have no mask in {mask_folder}: "
                f"{_join_first(pairing.without_mask)}",
                remedy="copy the missing masks (same stem, or with _mask); a category without any masks has no "
                "ground_truth folder at all",
            )
        )
    if pairing.without_image:
        problems.append(
            LayoutProblem(
                category=category,
                what=f"{len(pairing.without_image)} masks in {mask_folder} belong to no image in {image_folder}: "
                f"{_join_first(pairing.without_image)}",
                remedy="copy the missing images, or remove these masks",
            )
        )
    if pairing.ambiguous:
        problems.append(
            LayoutProblem(
                category=category,
                what=f"{len(pairing.ambiguous)} images in {image_folder} and their masks in {mask_folder} are not one "
                f"to one: {_join_first(pairing.ambiguous)}",
                remedy="keep one image and one mask per stem",
            )
        )
    return problems


def compare_counts(category: Category, expected: Counts | None) -> list[LayoutProblem]:
    """Complaints where the number of images is not the published one; none where no counts are published."""
    if expected is None:
        return []
    found = Counter(f"test/{sample.defect_type}" for sample in category.test if sample.label == 1)
    found["train"] = len(category.train)
    found["test, normal"] = sum(sample.label == 0 for sample in category.test)
    wanted = Counter({f"test/{name}": count for name, count in expected.defects.items()})
    wanted["train"], wanted["test, normal"] = expected.train, expected.good
    return [
        LayoutProblem(
            category=category.name,
            what=f"{part}: {found[part]} images where {wanted[part]} are published",
            remedy="copy the missing images again" if found[part] < wanted[part] else "remove those that are extra",
        )
        for part in sorted(found.keys() | wanted.keys())
        if found[part] != wanted[part]
    ]


def check_classes(category: Category) -> list[LayoutProblem]:
    """A complaint where the test images are all normal or all anomalous, so that no AUROC exists."""
    labels = {sample.label for sample in category.test}
    if len(labels) != 1:
        return []
    kind = "anomalous" if labels == {1} else "normal"
    return [
        LayoutProblem(
            category=category.name,
            what=f"all {len(category.test)} test images are {kind}, so there is no AUROC",
            remedy="add test images of the other kind",
        )
    ]


def check_files(category: Category, decode: bool) -> list[LayoutProblem]:
    """Complaints about files that cannot be read and masks of another size than their image.

    Args:
        category: the images and masks to open.
        decode: decode every pixel instead of reading headers alone.
    """
    samples = (*category.train, *category.test)
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1)), thread_name_prefix="check") as pool:
        return list(chain.from_iterable(pool.map(lambda sample: _check_sample(sample, decode), samples)))


def _check_sample(sample: Sample, decode: bool) -> list[LayoutProblem]:
    """Opens one image and its mask."""
    found: list[ImageProblem] = []
    size = mask_size = None
    try:
        size = read_image(sample.path).size[::-1] if decode else read_size(sample.path)
    except ImageProblem as problem:
        found.append(problem)
    if sample.mask_path is not None:
        try:
            if decode:
                mask = read_mask(sample.mask_path)
                mask_size = mask.shape
                if sample.label == 1 and not mask.any():
                    raise ImageProblem(
                        f"the mask {sample.mask_path} of an anomalous image marks no pixel",
                        "paint the defect in any colour but black",
                    )
            else:
                mask_size = read_size(sample.mask_path, "mask")
            if size is not None:
                match_sizes(sample, size, mask_size)
        except ImageProblem as problem:
            found.append(problem)
    return [LayoutProblem(category=sample.category, what=problem.what, remedy=problem.remedy) for problem in found]


def _parent(path: str) -> str:
    """The folder that holds a path; empty at the top of a disk or a bucket."""
    parent = path.rpartition("/")[0]
    return "" if parent.endswith(":/") else parent


def _base_name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(name: str) -> str:
    return unify_name(os.path.splitext(name)[0])


def _join_first(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
