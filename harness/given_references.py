"""Reference images that a space gives: a folder of images for a category, or a list of training images per image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from harness.contracts import AdgridError, Category, ReferenceChoice, Sample
from harness.datasets.files import list_folder, open_file, resolve_path

PUBLISHED_FOLDERS = {"mvtec_ad": "mvtec", "mvtec_3d_ad": "mvtec3d"}
"""What the folder of a dataset is called in the lists that come with ADPretrain (arXiv 2511.05245)."""


def list_given_references(dataset: str, category: str, choice: ReferenceChoice) -> tuple[Sample, ...]:
    """The images in the folder that a space gives for a category; none where it gives no images.

    Raises:
        AdgridError: the folder holds no image of the category.
    """
    if choice.mode != "files":
        return ()
    assert choice.path is not None, "a space that gives references names their folder"
    folders = [f"{resolve_path(choice.path)}/{inner}{category}/train/good" for inner in (f"{dataset}/", "")]
    for folder in folders:
        names = [entry.name for entry in list_folder(folder) if entry.is_image]
        if names:
            return tuple(
                Sample(
                    path=f"{folder}/{name}",
                    category=category,
                    sample_id=f"reference/{name}",
                    split="train",
                    label=0,
                    defect_type="good",
                )
                for name in names
            )
    raise AdgridError(
        f"reference.path: no images of category {category!r} of dataset {dataset!r} in {' or '.join(folders)}; "
        f"put them there"
    )


def read_alike_lists(
    dataset: str, listing: Category, choice: ReferenceChoice
) -> Mapping[str, tuple[Sample, ...]] | None:
    """The training images that a space's lists name for each test image; None where it gives no lists.

    A list is a JSON object in a file `CATEGORY.json`: path of an image -> paths of training images, the most alike
    first. Paths are those of whoever made the list; what they have from the folder of the category on is compared.

    Args:
        dataset: name of the dataset, a folder below that of the lists, or as `PUBLISHED_FOLDERS` has it.
        listing: all images of the category.
        choice: `path` is the folder of the lists, `k` how many images of a list are used.

    Returns:
        Path of a test image -> the first k training images of its list, all where it has fewer.

    Raises:
        AdgridError: no such file; it is no such list; a test image has no list, or a list names what is not there.
    """
    if choice.mode != "aligned" or choice.path is None:
        return None
    file, lists = _find_list(dataset, listing.name, choice.path)
    train = {_tail(sample.path, listing.name): sample for sample in listing.train}
    alike = {}
    for sample in listing.test:
        named = lists.get(_tail(sample.path, listing.name))
        if not named:
            raise AdgridError(
                f"reference.path, {file}: no training images are listed for {sample.path}; give lists made for the "
                f"layout of this dataset, or take `path` out, which finds the most alike itself"
            )
        chosen = [_tail(path, listing.name) for path in named[: choice.k]]
        unknown = [path for path in chosen if path not in train]
        if unknown:
            raise AdgridError(
                f"reference.path, {file}: {unknown[0]} is listed for {sample.path} and is no training image of "
                f"category {listing.name!r}, dataset {dataset!r}; give lists made for the layout of this dataset"
            )
        alike[sample.path] = tuple(train[path] for path in chosen)
    return alike


def _find_list(dataset: str, category: str, folder: str) -> tuple[str, dict[str, list[str]]]:
    """The file, and its lists by the tails of paths."""
    places = dict.fromkeys((f"{dataset}/", f"{PUBLISHED_FOLDERS.get(dataset, dataset)}/", ""))
    files = [f"{resolve_path(folder)}/{inner}{category}.json" for inner in places]
    for file in files:
        try:
            with open_file(file) as stream:
                content = json.load(stream)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise AdgridError(f"reference.path: {file} cannot be read as JSON: {error}; copy it again") from error
        if not _is_list(content):
            raise AdgridError(
                f"reference.path: {file} is no list of references; it must be a JSON object of paths of images, each "
                f"with the paths of its training images"
            )
        return file, {_tail(path, category): named for path, named in content.items()}
    raise AdgridError(
        f"reference.path: no list of category {category!r} of dataset {dataset!r} at {' or '.join(files)}; put it there"
    )


def _is_list(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(named, list) and all(isinstance(path, str) for path in named) for named in content.values()
    )


def _tail(path: str, category: str) -> str:
    """What a path has below the folder of the category."""
    return path.replace("\\", "/").rpartition(f"/{category}/")[2]
