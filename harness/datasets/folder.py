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

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from harness.contracts import Category, LayoutProblem, Sample
from harness.datasets.base import LayoutDataset, Scan, describe_pairing, pair_masks, unify_name
from harness.datasets.files import is_folder, list_folder, list_folders, list_images


class Folder(LayoutDataset):
    """Categories in the layout of MVTec AD; other layouts of the same shape derive from this."""

    summary = "your own images in the layout of MVTec AD (train/good, test/<defect>, ground_truth/<defect>)"
    licence = "that of your data"
    home_page = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
    citation = "layout: P. Bergmann et al., MVTec AD, CVPR 2019"
    tree = "<category>/train/good"
    obtain = "bring your images into the layout of MVTec AD ({home_page})"

    normal_folder: ClassVar[str] = "good"
    """Name of the folders with normal images."""
    images_in: ClassVar[str] = "{split}/{kind}"
    """Where the images of a split and a kind (`good`, or a defect type) lie in a category."""
    masks_in: str = "ground_truth/{kind}"
    """Where the masks of a kind lie in a category, below a folder that is there if the category has masks at all."""
    train_splits: Sequence[str] = ("train",)
    """Splits whose normal images are for fitting."""

    def is_category(self, folder: str) -> bool:
        """A category has a folder of normal training images."""
        return is_folder(f"{folder}/{self._images_in('train', self.normal_folder)}")

    def scan(self, name: str) -> Scan:
        """Lists the images of a category and pairs them with their masks."""
        folder = self.category_folder(name)
        truth, _, inside = self.masks_in.partition("/{kind}")
        truth = f"{folder}/{truth}"
        mask_folders = {unify_name(kind): f"{truth}/{kind}{inside}" for kind in list_folders(truth)}
        has_masks = is_folder(truth)
        problems: list[LayoutProblem] = []

        train: list[Sample] = []
        for split in self.train_splits:
            samples = self._list_samples(name, folder, split, self.normal_folder)
            if not samples:
                images = f"{folder}/{self._images_in(split, self.normal_folder)}"
                problems.append(_complain_empty(name, images, "training"))
            train += samples
        test: list[Sample] = []
        test_folders = list_folders(f"{folder}/test")
        if not test_folders:
            problems.append(_complain_empty(name, f"{folder}/test", "test"))
        for kind in test_folders:
            images = f"{folder}/{self._images_in('test', kind)}"
            samples = self._list_samples(name, folder, "test", kind)
            if not samples:
                problems.append(_complain_empty(name, images, "test"))
            elif has_masks and kind != self.normal_folder:
                masks = mask_folders.get(unify_name(kind), f"{truth}/{kind}{inside}")
                pairing = pair_masks([_file_name(sample.path) for sample in samples], list_images(masks))
                problems += describe_pairing(name, pairing, images, masks)
                mask_of = {image: f"{masks}/{mask}" for image, mask in pairing.mask_of.items()}
                samples = [replace(sample, mask_path=mask_of.get(_file_name(sample.path))) for sample in samples]
            test += samples

        strays = mask_folders.keys() - {unify_name(kind) for kind in test_folders} - {self.normal_folder}
        for kind in sorted(strays):
            pairing = pair_masks([], list_images(mask_folders[kind]))
            problems += describe_pairing(name, pairing, f"{folder}/{self._images_in('test', kind)}", mask_folders[kind])
        category = Category(name=unify_name(name), train=in_order(train), test=in_order(test), has_masks=has_masks)
        return Scan(category=category, problems=tuple(problems))

    def _images_in(self, split: str, kind: str) -> str:
        return self.images_in.format(split=split, kind=kind)

    def _list_samples(self, category: str, folder: str, split: str, kind: str) -> list[Sample]:
        normal = kind == self.normal_folder
        images = f"{folder}/{self._images_in(split, kind)}"
        return [
            Sample(
                path=f"{images}/{image}",
                category=unify_name(category),
                sample_id=unify_name(f"{split}/{kind}/{image}"),
                split="test" if split == "test" else "train",
                label=0 if normal else 1,
                defect_type="good" if normal else unify_name(kind),
            )
            for image in list_images(images)
        ]


def _complain_empty(category: str, folder: str, use: str) -> LayoutProblem:
    """A complaint about a folder without images, with what it holds instead."""
    inside = ", ".join(entry.name for entry in list_folder(folder)[:3])
    return LayoutProblem(
        category=category,
        what=f"{folder} has no {use} images ({f'it holds {inside}' if inside else 'it is empty or missing'})",
        remedy="copy its images again, directly into it, or remove it",
    )


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def in_order(samples: list[Sample]) -> tuple[Sample, ...]:
    """By name within the category, so in the same order wherever the data lie."""
    return tuple(sorted(samples, key=lambda sample: sample.sample_id))


DATASET = Folder
