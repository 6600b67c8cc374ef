"""Real-IAD: 30 categories of parts, each object seen by five cameras, in the layout of its release.

    <root>/realiad_1024/<category>/OK/S0001/<category>_0001_OK_C1_<time>.jpg         (or 512, 256, raw)
    <root>/realiad_1024/<category>/NG/<code>/S0001/<category>_0001_NG_<code>_C1_<time>.jpg, .png beside it: its mask
    <root>/realiad_jsons/<category>.json, <root>/realiad_jsons_sv/<category>.json, ...

The root may also be a folder of images itself, with the lists beside it; of several resolutions the first of
`IMAGE_FOLDERS` is read, another one by naming it as the root. The codes are AK pit, BX deformation, CH abrasion, HS
scratch, PS damage, QS missing part, YW foreign object and ZW contamination.

Each variant but one is a published split, told by one JSON file per category: `meta.prefix` leads from the images to
those of the category, and an entry of `train` or `test` names an image and its mask. As in the authors' loader, an
image is normal when it has no mask or when its class is the normal one: a defect is visible to some cameras only. In
the variants `fuiad_*` (fully unsupervised) some of the training images are anomalous. They keep their true label, which
no method sees.

The variant `folders` reads no lists: every image in the folders, labelled by whether a mask lies beside it. That is no
split, so all of it is training data and there is nothing to score. It is what ADPretrain (arXiv 2511.05245) learns
from. Normal views of defective objects have `_NG_` in their sample id.

Samples are named as by the authors' evaluation (the file name before `_C1_`), so that the views of an object make up
one sample.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from harness.contracts import Category, LayoutProblem, Sample
from harness.datasets.base import LayoutDataset, Scan
from harness.datasets.checks import Counts, compare_counts
from harness.datasets.files import Entry, is_folder, list_folder, list_folders, open_file

Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")

# fmt: off
CATEGORIES = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "mounts", "pcb",
    "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll", "regulator", "rolled_strip_base",
    "sim_card_set", "switch", "tape", "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1", "u_block",
    "usb", "usb_adaptor", "vcpill", "wooden_beads", "woodstick", "zipper",
)
# fmt: on
IMAGE_FOLDERS = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")
"""Releases of the images; the first is the one of the authors' experiments."""
LIST_FOLDERS = {
    "multi_view": "realiad_jsons",
    "single_view": "realiad_jsons_sv",
    **{f"fuiad_{noise}": f"realiad_jsons_fuiad_{noise}" for noise in ("0.0", "0.1", "0.2", "0.4")},
}
"""Folder with the lists of each variant but `folders`."""
CLEAN_VARIANTS = ("multi_view", "single_view", "fuiad_0.0")
"""Splits whose training images are all normal."""
TOTALS = {
    "multi_view": Counts(train=36_465, good=63_256, anomalous=51_329),
    "folders": Counts(train=151_050),
}
"""Published numbers of images of all categories together (arXiv 2403.12580); none are published per category."""

_SAMPLE_AND_VIEW = re.compile(r"([a-zA-Z][a-zA-Z0-9_]*_[0-9]{4}_[A-Z][A-Z_]*[A-Z])_(C[1-5])_")
"""The pattern of the authors' evaluation, for file names."""
_ABSENT = "name files that are not there"
_COPY_IMAGES = "unpack the images of this category again"
_UNPACK_LISTS = "unpack realiad_jsons.zip again"


class RealIad(LayoutDataset):
    """Reads the images in the folders of one resolution, split as the lists of the variant say."""

    summary = "30 categories of parts seen by five cameras; single-view, multi-view and noisy splits, folders"
    licence = "CC BY-NC-SA 4.0, by request"
    home_page = "https://realiad4ad.github.io/Real-IAD/"
    citation = "C. Wang et al., Real-IAD, CVPR 2024 (arXiv 2403.12580)"
    tree = "realiad_1024/<category>/OK (with realiad_jsons/<category>.json)"
    obtain = "ask for access at {home_page}, unpack realiad_jsons.zip and the images of one resolution"
    expected = dict.fromkeys(CATEGORIES, Counts())
    variants = {
        "multi_view": "all five cameras",
        "single_view": "the camera above (C1) alone",
        **{
            f"fuiad_{noise}": f"all five cameras, training images with a noise ratio of {noise}"
            for noise in (0.0, 0.1, 0.2, 0.4)
        },
        "folders": "every image as labelled training data for a pretraining; nothing to score",
    }

    def is_category(self, folder: str) -> bool:
        """A category has a folder of normal objects."""
        return is_folder(f"{folder}/OK")

    def category_names(self) -> tuple[str, ...]:
        """Categories that have images and, but for `folders`, a list."""
        images = self._image_folder()
        names = {name for name in list_folders(images) if self.is_category(f"{images}/{name}")} if images else set()
        return tuple(sorted(names if self.variant == "folders" else names & self._listed()))

    def locate_problem(self) -> LayoutProblem | None:
        """As for every layout; and where there are images, whether the lists of the variant are beside them."""
        images = self._image_folder()
        if not images or self.category_names():
            return super().locate_problem()
        lists = f"{self._top_folder()}/{LIST_FOLDERS[str(self.variant)]}"
        other = "of other categories alone" if self._listed() else "missing"
        return LayoutProblem(
            category="",
            what=f"there are images in {images}, but the lists of variant {self.variant!r} in {lists} are {other}",
            remedy=f"unpack realiad_jsons.zip from {self.home_page}, so that {lists}/<category>.json exists, or choose "
            f"another variant: {', '.join(self.variants)}",
        )

    def check(self, categories: Sequence[str] | None = None, decode: bool = False) -> list[LayoutProblem]:
        """As for every layout; and the published totals, where all 30 categories are asked for and there."""
        problems = super().check(categories, decode)
        asked = self.category_names() if categories is None else categories
        if not self.missing_categories() and set(CATEGORIES) <= set(asked):
            each = [self.scan(name).category for name in CATEGORIES]
            together = Category(
                name="all categories",
                train=tuple(sample for category in each for sample in category.train),
                test=tuple(sample for category in each for sample in category.test),
                has_masks=True,
            )
            problems += compare_counts(together, TOTALS.get(str(self.variant)))
        return problems

    def scan(self, name: str) -> Scan:
        """Reads the list of a category, or walks its folders."""
        images = self._image_folder()
        if self.variant == "folders":
            return _walk_folders(name, f"{images}/{name}")
        path = f"{self._list_folder()}/{name}.json"
        entries, problems = _read_list(path, name, str(self.variant), images)
        samples: dict[Part, list[Sample]] = {part: [] for part in PARTS}
        for entry in entries:
            sample = Sample(
                path=f"{images}/{entry.image}",
                category=name,
                sample_id=entry.sample_id,
                view=entry.view,
                split=entry.part,
                label=0 if entry.mask is None else 1,
                defect_type="good" if entry.mask is None else entry.anomaly_class,
                mask_path=None if entry.mask is None else f"{images}/{entry.mask}",
            )
            samples[entry.part].append(sample)
        category = Category(
            name=name, train=_in_order(samples["train"]), test=_in_order(samples["test"]), has_masks=True
        )
        return Scan(category=category, problems=problems)

    def _image_folder(self) -> str:
        """The root, or the first folder of images in it; empty when there is none."""
        folders = (self.root, *(f"{self.root}/{name}" for name in IMAGE_FOLDERS)) if self.root else ()
        return next((folder for folder in folders if self._holds_categories(folder)), "")

    def _top_folder(self) -> str:
        """The folder with the lists: the root, or the one above a root that is a folder of images."""
        return _parent(self.root) if self._image_folder() == self.root else self.root

    def _list_folder(self) -> str:
        """Where the lists of the variant are: beside the images, or in the folder that their archive unpacks to."""
        plain = f"{self._top_folder()}/{LIST_FOLDERS[str(self.variant)]}"
        nested = f"{self._top_folder()}/realiad_jsons/{LIST_FOLDERS[str(self.variant)]}"
        return nested if is_folder(nested) else plain

    def _listed(self) -> set[str]:
        files = [entry.name for entry in list_folder(self._list_folder()) if not entry.is_folder]
        return {name.removesuffix(".json") for name in files if name.endswith(".json")}


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """One entry of a list, checked; paths are below the folder of images."""

    where: str
    """Place in the list, such as `test[3]`."""
    part: Part
    image: str
    mask: str | None
    """None on a normal image."""
    anomaly_class: str
    sample_id: str
    view: str


class _BadEntry(Exception):
    """An entry that cannot be used: kind of fault, and where."""


def _read_list(path: str, category: str, variant: str, images: str) -> tuple[list[_Listed], tuple[LayoutProblem, ...]]:
    """The usable entries of one JSON file and what is wrong with the others; nothing in the file is trusted.

    Faults are folded: one complaint per kind, however many entries have it.
    """
    try:
        with open_file(path) as file:
            content = json.loads(file.read())
        prefix, normal_class = _read_meta(content)
    except (OSError, ValueError, RecursionError) as error:  # bad JSON, bad UTF-8 and a bad `meta` are ValueErrors
        what = f"cannot use {path}: {error}"
        return [], (LayoutProblem(category=category, what=what, remedy=_UNPACK_LISTS),)
    entries: list[_Listed] = []
    faults: dict[str, list[str]] = defaultdict(list)
    for part in PARTS:
        for number, entry in enumerate(content[part]):
            try:
                entries.append(_read_entry(entry, part, f"{part}[{number}]", category, prefix, normal_class))
            except _BadEntry as fault:
                kind, detail = fault.args
                faults[kind].append(detail)
    for kind, detail in _find_repetitions(entries, variant):
        faults[kind].append(detail)
    absent = _find_absent(entries, images)
    if absent:
        faults[_ABSENT] = [detail for details in absent.values() for detail in details]
        entries = [entry for entry in entries if entry.where not in absent]
    problems = []
    for kind, details in faults.items():
        more = f" and {len(details) - 3} more" if len(details) > 3 else ""
        problems.append(
            LayoutProblem(
                category=category,
                what=f"{path}: {len(details)} entries {kind}: {', '.join(details[:3])}{more}",
                remedy=_COPY_IMAGES if kind == _ABSENT else _UNPACK_LISTS,
            )
        )
    return entries, tuple(problems)


def _read_meta(content: Any) -> tuple[str, str]:
    """`prefix` and `normal_class` of a list. Raises ValueError with the field that is wrong."""
    if not isinstance(content, dict):
        raise ValueError(f"must be an object with meta, train and test, not a {type(content).__name__}")
    meta = content.get("meta")
    if not isinstance(meta, dict):
        raise ValueError("the field meta is missing or no object")
    for field in ("prefix", "normal_class"):
        if not isinstance(meta.get(field), str):
            raise ValueError(f"the field meta.{field} is missing or no text")
    if _join_inside(meta["prefix"], "file") is None:
        raise ValueError(f"the field meta.prefix {_shorten(meta['prefix'])} leaves the folder of images")
    for part in ("train", "test"):
        if not isinstance(content.get(part), list):
            raise ValueError(f"the field {part} is missing or no list")
    return meta["prefix"], meta["normal_class"]


def _read_entry(entry: Any, part: Part, where: str, category: str, prefix: str, normal_class: str) -> _Listed:
    if not isinstance(entry, dict):
        raise _BadEntry("are no objects", where)
    for field in ("category", "anomaly_class", "image_path", "mask_path"):
        if field not in entry:
            raise _BadEntry("lack a field", f"{where}.{field}")
        if not isinstance(entry[field], str) and not (field == "mask_path" and entry[field] is None):
            raise _BadEntry("have a field that is no text", f"{where}.{field}")
    if entry["category"] != category:
        raise _BadEntry("are of another category", f"{where}.category {_shorten(entry['category'])}")
    paths = {}
    for field in ("image_path", "mask_path"):
        paths[field] = None if entry[field] is None else _join_inside(prefix, entry[field])
        if entry[field] is not None and paths[field] is None:
            raise _BadEntry("leave the folder of images", f"{where}.{field} {_shorten(entry[field])}")
    image, normal = paths["image_path"], entry["anomaly_class"] == normal_class
    named = _SAMPLE_AND_VIEW.search(os.path.basename(image or ""))
    if image is None or named is None:
        raise _BadEntry(
            "do not name sample and view (..._0001_OK_C1_...)", f"{where}.image_path {_shorten(str(image))}"
        )
    return _Listed(
        where=where,
        part=part,
        image=image,
        mask=None if normal else paths["mask_path"],
        anomaly_class=entry["anomaly_class"],
        sample_id=named[1],
        view=named[2],
    )


def _find_repetitions(entries: Iterable[_Listed], variant: str) -> Iterator[tuple[str, str]]:
    """Images listed twice, and what must not be in a training set without noise: kind of fault, and where."""
    clean = variant in CLEAN_VARIANTS
    seen: dict[tuple[str, str], str] = {}
    for entry in entries:
        # A noisy split is read as it was published, whether or not its noise is tested too.
        first = seen.setdefault((entry.image, "" if clean else entry.part), entry.where)
        if first != entry.where:
            yield "are listed before", f"{entry.where}.image_path is that of {first}"
        if clean and entry.part == "train" and entry.mask is not None:
            yield f"are anomalous training images, which variant {variant!r} has not", f"{entry.where}.anomaly_class"


def _find_absent(entries: Sequence[_Listed], images: str) -> dict[str, list[str]]:
    """Entries whose image or mask is not in the folders: place in the list -> which."""
    named = [
        (entry.where, field, f"{images}/{path}")
        for entry in entries
        for field, path in (("image_path", entry.image), ("mask_path", entry.mask))
        if path is not None
    ]
    listings = _list_folders_at_once({_parent(path) for _, _, path in named})
    present = {f"{folder}/{entry.name}" for folder, listing in listings.items() for entry in listing}
    absent: dict[str, list[str]] = defaultdict(list)
    for where, field, path in named:
        if path not in present:
            absent[where].append(f"{where}.{field} {path}")
    return absent


def _walk_folders(category: str, folder: str) -> Scan:
    """Every image in the folders of a category, as labelled training data."""
    codes = [f"{folder}/NG/{code}" for code in list_folders(f"{folder}/NG")]
    kinds = [f"{folder}/OK", *codes]
    present = _list_folders_at_once({f"{kind}/{sample}" for kind in kinds for sample in list_folders(kind)})
    samples: list[Sample] = []
    nameless: list[str] = []
    lonely: list[str] = []
    for place, entries in present.items():
        images = [entry.name for entry in entries if entry.is_image and not entry.name.lower().endswith(".png")]
        mask_of = {
            os.path.splitext(e.name)[0]: e.name for e in entries if e.is_image and e.name.lower().endswith(".png")
        }
        for image in images:
            named = _SAMPLE_AND_VIEW.search(image)
            mask = mask_of.pop(os.path.splitext(image)[0], None)
            if named is None:
                nameless.append(f"{place}/{image}")
                continue
            sample = Sample(
                path=f"{place}/{image}",
                category=category,
                sample_id=named[1],
                view=named[2],
                split="train",
                label=0 if mask is None else 1,
                defect_type="good" if place.split("/")[-2] == "OK" else place.split("/")[-2],
                mask_path=None if mask is None else f"{place}/{mask}",
            )
            samples.append(sample)
        lonely += [f"{place}/{mask}" for mask in mask_of.values()]
    faults = [
        (nameless, "images do not name sample and view (..._0001_OK_C1_...)", "give them their published names again"),
        (lonely, "masks belong to no image", "copy the missing images again"),
    ]
    problems = [
        LayoutProblem(category=category, what=f"{len(paths)} {fault}, such as {min(paths)}", remedy=remedy)
        for paths, fault, remedy in faults
        if paths
    ]
    if not samples:
        problems.append(
            LayoutProblem(category=category, what=f"{folder} has no images", remedy="copy its images again")
        )
    category_read = Category(name=category, train=_in_order(samples), test=(), has_masks=True)
    return Scan(category=category_read, problems=tuple(problems))


def _list_folders_at_once(folders: Iterable[str]) -> dict[str, list[Entry]]:
    """What lies in each folder. There is one per object, so a store far away is asked for several at a time."""
    ordered = sorted(folders)
    with ThreadPoolExecutor(8, thread_name_prefix="list") as pool:
        return dict(zip(ordered, pool.map(list_folder, ordered), strict=True))


def _join_inside(prefix: str, path: str) -> str | None:
    """The path below the folder of images; None when it would lead out of it."""
    steps = [step for step in f"{prefix}/{path}".split("/") if step not in ("", ".")]
    leaves = prefix.startswith("/") or path.startswith("/") or ".." in steps or "\\" in prefix + path
    return None if leaves or not path or "\0" in prefix + path else "/".join(steps)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _shorten(value: str) -> str:
    return repr(value if len(value) <= 80 else f"{value[:80]}...")


def _in_order(samples: list[Sample]) -> tuple[Sample, ...]:
    return tuple(sorted(samples, key=lambda sample: sample.path))


DATASET = RealIad
