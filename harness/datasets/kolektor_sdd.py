"""KolektorSDD: 50 electrical commutators, each seen from eight sides, one category.

    <root>/kos01/Part0.jpg, <root>/kos01/Part0_label.bmp, ... <root>/kos50/Part7.jpg

399 grey images, 500 pixels wide and about 1250 high. Every image has a mask; it is normal when its mask marks nothing,
so masks are read to know the labels. The release with boxes instead of fine masks has the same layout.

There is no published split for anomaly detection. Here 70 % of the items (`derive_seed("kolektor_sdd", "split", item)`
ranks them) give their normal images for training, and all other images are for testing, so that no tested normal image
shows an item of the training. Some pictures occur twice: one that is tested is never trained on, under whatever name.

The views of an item share its sample id. Every item has a defect somewhere, so there is no AUROC of whole items.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

from harness.contracts import AdgridError, Category, LayoutProblem, Places, Sample, derive_seed
from harness.datasets.base import LayoutDataset, Scan, pair_masks
from harness.datasets.checks import Counts
from harness.datasets.files import is_folder, list_folders, list_images
from harness.datasets.fingerprint import content_hashes
from harness.datasets.images import ImageProblem, read_mask

CATEGORY = "kolektor_sdd"
TRAIN_SHARE = 0.7
"""Share of the items whose normal images are for training."""
NUM_ITEMS = 50
NUM_NORMAL = 347
"""Normal images in all, trained on and tested."""

_ITEM = re.compile(r"kos\d+", re.IGNORECASE)


class KolektorSdd(LayoutDataset):
    """Reads the folders of the items; labels come from the masks, the split from the names of the items."""

    summary = "50 commutators seen from eight sides, fine cracks; own split by item"
    licence = "CC BY-NC-SA 4.0"
    home_page = "https://www.vicos.si/resources/kolektorsdd/"
    citation = "D. Tabernik et al., Journal of Intelligent Manufacturing 31 (2020), doi 10.1007/s10845-019-01476-x"
    tree = "kos01/Part0.jpg"
    unpacked = ("KolektorSDD", "KolektorSDD-boxes")
    expected = {CATEGORY: Counts(defects={"defective": 52})}

    def __init__(self, name: str, root: str | None, places: Places, variant: str | None = None) -> None:
        super().__init__(name, root, places, variant)
        self._cache_dir = places.cache_dir

    def is_category(self, folder: str) -> bool:
        """Whether a folder is one of the items; all of them together are the category."""
        return _ITEM.fullmatch(folder.rpartition("/")[2]) is not None and is_folder(folder)

    def category_names(self) -> tuple[str, ...]:
        """The one category, where there is an item."""
        return (CATEGORY,) if self.root and self._holds_categories(self.root) else ()

    def scan(self, name: str) -> Scan:
        """Reads the masks to know the labels, and splits by item."""
        items = [item for item in list_folders(self.root) if _ITEM.fullmatch(item)]
        with ThreadPoolExecutor(8, thread_name_prefix="masks") as pool:
            found = list(pool.map(_list_item, [f"{self.root}/{item}" for item in items]))
        samples = list(chain.from_iterable(samples for samples, _ in found))
        problems = list(chain.from_iterable(problems for _, problems in found))
        try:
            hashes = content_hashes([sample.path for sample in samples], self._cache_dir)
        except AdgridError as error:
            what, _, remedy = str(error).rpartition("; ")
            problems.append(LayoutProblem(category=CATEGORY, what=what, remedy=remedy))
            hashes = {sample.path: sample.path for sample in samples}
        category = _split(samples, items, hashes)
        return Scan(category=category, problems=tuple(problems), notes=tuple(_compare_totals(samples, len(items))))

    def _holds_this_dataset(self, folder: str) -> bool:
        return self._holds_categories(folder)  # the category has no folder of its own name


def _list_item(folder: str) -> tuple[list[Sample], list[LayoutProblem]]:
    """All images of one item, as test images, and what is wrong with their masks."""
    names = list_images(folder)
    masks = [name for name in names if name.rpartition(".")[0].lower().endswith("_label")]
    pairing = pair_masks([name for name in names if name not in masks], masks, suffix="_label")
    faults = [
        (pairing.without_mask, "images without a mask (_label.bmp), so that nobody knows whether they are normal"),
        (pairing.without_image, "masks without an image"),
        (pairing.ambiguous, "images that share a mask or have two"),
    ]
    problems = [
        LayoutProblem(
            category=CATEGORY, what=f"{folder} has {len(names)} {fault}: {', '.join(names)}", remedy="unpack it again"
        )
        for names, fault in faults
        if names
    ]
    samples = []
    for image, mask in pairing.mask_of.items():
        path = f"{folder}/{mask}"
        try:
            defective = read_mask(path).any()
        except ImageProblem as problem:
            problems.append(LayoutProblem(category=CATEGORY, what=problem.what, remedy=problem.remedy))
            continue
        sample = Sample(
            path=f"{folder}/{image}",
            category=CATEGORY,
            sample_id=folder.rpartition("/")[2],
            view=image.rpartition(".")[0],
            split="test",
            label=1 if defective else 0,
            defect_type="defective" if defective else "good",
            mask_path=path if defective else None,
        )
        samples.append(sample)
    return samples, problems


def _split(samples: list[Sample], items: list[str], hashes: dict[str, str]) -> Category:
    """Normal images of the training items for training, but for those that are tested under another name."""
    ranked = sorted(items, key=lambda item: derive_seed("kolektor_sdd", "split", item))
    train_items = set(ranked[: round(TRAIN_SHARE * len(items))])
    offered = [sample.label == 0 and sample.sample_id in train_items for sample in samples]
    tested = {hashes[sample.path] for sample, is_offered in zip(samples, offered, strict=True) if not is_offered}
    train = [sample for sample in samples if hashes[sample.path] not in tested]
    test = [sample for sample in samples if hashes[sample.path] in tested]
    return Category(
        name=CATEGORY, train=tuple(replace(sample, split="train") for sample in train), test=tuple(test), has_masks=True
    )


def _compare_totals(samples: list[Sample], num_items: int) -> list[LayoutProblem]:
    """Complaints where items or normal images are not as many as published."""
    num_normal = sum(sample.label == 0 for sample in samples)
    return [
        LayoutProblem(
            category=CATEGORY,
            what=f"{found} {things} where {published} are published",
            remedy="unpack it again" if found < published else "remove those that are extra",
        )
        for found, published, things in (
            (num_items, NUM_ITEMS, "items"),
            (num_normal, NUM_NORMAL, "normal images, trained on and tested,"),
        )
        if found != published
    ]


DATASET = KolektorSdd
