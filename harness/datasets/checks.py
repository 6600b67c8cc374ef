"""What a layout check looks at: numbers of images, classes of the test set, readable files, sizes of masks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from harness.contracts import Category, LayoutProblem, Sample
from harness.datasets.images import ImageProblem, match_sizes, read_image, read_mask, read_size


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Published number of images of one category. None: not published, so not compared."""

    train: int | None = None
    good: int | None = None
    """Normal test images."""
    defects: Mapping[str, int] | None = None
    """Anomalous test images per defect type; types that are not named here are extra."""
    anomalous: int | None = None
    """Anomalous test images in all; only where `defects` is not known."""


def compare_counts(category: Category, expected: Counts | None) -> list[LayoutProblem]:
    """Complaints where the number of images is not the published one; none where no number is published."""
    if expected is None:
        return []
    anomalous = [sample.defect_type for sample in category.test if sample.label == 1]
    found = {"train": len(category.train), "test, normal": len(category.test) - len(anomalous)}
    wanted = {"train": expected.train, "test, normal": expected.good}
    if expected.defects is None:
        found["test, anomalous"], wanted["test, anomalous"] = len(anomalous), expected.anomalous
    else:
        per_type = Counter(anomalous)
        for name in expected.defects.keys() | per_type.keys():
            found[f"test/{name}"], wanted[f"test/{name}"] = per_type[name], expected.defects.get(name, 0)
    return [
        LayoutProblem(
            category=category.name,
            what=f"{part}: {found[part]} images where {count} are published",
            remedy="copy the missing images again" if found[part] < count else "remove those that are extra",
        )
        for part, count in sorted(wanted.items())
        if count is not None and found[part] != count
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
