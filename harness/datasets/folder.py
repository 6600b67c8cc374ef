"""Any data in the layout of MVTec AD: one folder per category, one subfolder per defect type.

    <root>/<category>/train/good/000.png
    <root>/<category>/test/good/000.png
    <root>/<category>/test/<defect type>/000.png
    <root>/<category>/ground_truth/<defect type>/000_mask.png      (or 000.png)

Images and masks may be PNG, JPEG, BMP, TIFF or WebP, each in its own format. A mask belongs to the image with its
stem. A category without a `ground_truth` folder has no pixel metrics; one with it must have a mask for every anomalous
image. Masks of normal images (`ground_truth/good`) are not read: a normal image has no defect.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from harness.contracts import Category, LayoutProblem, Sample
from harness.datasets.base import LayoutDataset, Scan, describe_pairing, pair_masks, unify_name
from harness.datasets.files import is_folder, list_folder, list_folders, list_images


class Folder(LayoutDataset):
    """Categories in the layout of MVTec AD; other layouts of the same shape derive from this."""

    summary = "your own images in the layout of MVTec AD (train/good, test/<defect>, ground_truth/<defect>)"
    licence = "that of your data"
    home_page = "layout as in https://www.mvtec.com/company/research/datasets/mvtec-ad"
    citation = "layout: P. Bergmann et al., MVTec AD, CVPR 2019"
    tree = "<category>/train/good"

    normal_folder: ClassVar[str] = "good"
    """Name of the folders with normal images."""

    def is_category(self, folder: str) -> bool:
        """A category has a folder of normal training images."""
        return is_folder(f"{folder}/train/{self.normal_folder}")

    def scan(self, name: str) -> Scan:
        """Lists the images of a category and pairs them with their masks."""
        folder = self.category_folder(name)
        problems: list[LayoutProblem] = []
        train = self._list_samples(name, folder, "train", self.normal_folder)
        problems += self._explain_empty(name, f"{folder}/train/{self.normal_folder}", bool(train), "training")
        has_masks = is_folder(f"{folder}/ground_truth")
        test: list[Sample] = []
        test_folders = list_folders(f"{folder}/test")
        for defect in test_folders:
            images = f"{folder}/test/{defect}"
            samples = self._list_samples(name, folder, "test", defect)
            problems += self._explain_empty(name, images, bool(samples), "test")
            if has_masks and samples and defect != self.normal_folder:
                masks = f"{folder}/ground_truth/{defect}"
                pairing = pair_masks([_file_name(sample.path) for sample in samples], list_images(masks))
                problems += describe_pairing(name, pairing, images, masks)
                samples = [
                    _with_mask(sample, pairing.mask_of.get(_file_name(sample.path)), masks) for sample in samples
                ]
            test += samples
        if not test_folders:
            problems.append(
                LayoutProblem(
                    category=name,
                    what=f"{folder}/test has no folders, so there are no test images",
                    remedy=f"copy test/{self.normal_folder} and test/<defect type> again",
                )
            )
        problems += self._find_stray_masks(name, folder, test_folders)
        category = Category(name=name, train=tuple(_in_order(train)), test=tuple(_in_order(test)), has_masks=has_masks)
        return Scan(category=category, problems=tuple(problems))

    def _list_samples(self, category: str, folder: str, split: str, kind: str) -> list[Sample]:
        normal = kind == self.normal_folder
        return [
            Sample(
                path=f"{folder}/{split}/{kind}/{image}",
                category=category,
                sample_id=unify_name(f"{split}/{kind}/{image}"),
                split="train" if split == "train" else "test",
                label=0 if normal else 1,
                defect_type="good" if normal else unify_name(kind),
            )
            for image in list_images(f"{folder}/{split}/{kind}")
        ]

    def _explain_empty(self, category: str, folder: str, has_images: bool, use: str) -> list[LayoutProblem]:
        """A complaint about a folder without images, with what it holds instead."""
        if has_images:
            return []
        inside = list_folder(folder)
        held = f"; it holds {', '.join(entry.name for entry in inside[:3])}" if inside else "; it is empty"
        return [
            LayoutProblem(
                category=category,
                what=f"{folder} has no {use} images{held}",
                remedy="copy its images again, directly into it, or remove the folder",
            )
        ]

    def _find_stray_masks(self, category: str, folder: str, test_folders: list[str]) -> list[LayoutProblem]:
        """Complaints about mask folders that no test folder answers to."""
        known = {unify_name(name) for name in test_folders} | {self.normal_folder}
        return [
            LayoutProblem(
                category=category,
                what=f"the masks in {folder}/ground_truth/{defect} have no images in {folder}/test/{defect}",
                remedy="copy the missing images, or remove these masks",
            )
            for defect in list_folders(f"{folder}/ground_truth")
            if unify_name(defect) not in known and list_images(f"{folder}/ground_truth/{defect}")
        ]


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _with_mask(sample: Sample, mask: str | None, folder: str) -> Sample:
    return replace(sample, mask_path=f"{folder}/{mask}") if mask else sample


def _in_order(samples: list[Sample]) -> list[Sample]:
    """By name within the category, so in the same order wherever the data lie."""
    return sorted(samples, key=lambda sample: sample.sample_id)


DATASET = Folder
