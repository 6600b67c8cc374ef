"""From names to things: what a trial needs, resolved on the machine that asks.

The plan and the worker call the same functions. A worker whose images, masks or weights differ from those that were
planned gets other ids, and its cell fails with that reason instead of giving a number for something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.auxiliary import LabelledCategory
from harness.backbones import ResolvedBackbone, backbone_fingerprint, resolve_backbone
from harness.contracts import (
    AdgridError,
    Cell,
    Dataset,
    DatasetRef,
    EvaluationProtocol,
    Places,
    Preprocessing,
    Pretraining,
    ReferenceChoice,
    Sample,
    Trial,
)
from harness.datasets.files import IMAGE_EXTENSIONS
from harness.datasets.fingerprint import content_hashes, draw_shots
from harness.feature_store import FEATURES_VERSION
from harness.given_references import list_given_references, read_alike_lists
from harness.identity import content_id, images_fingerprint, truth_fingerprint
from harness.metrics import METRIC_VERSION
from harness.registry import build_config, build_dataset, load_method, method_version, representation_version

PAPER_IMAGE_SIDE = 224
"""Pixels at which the methods' smoothing sigmas are given."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategoryData:
    """The images that a cell reads, with the hashes of their contents."""

    category: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    has_masks: bool
    hashes: Mapping[str, str]
    """Absolute path -> SHA-256 of the file, masks included."""
    references: tuple[Sample, ...] = ()
    """Given images that features are compared with."""
    alike: Mapping[str, tuple[Sample, ...]] | None = None
    """Path of a test image -> given training images most like it; None where they are to be found."""
    images_id: str
    truth_id: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedTrial:
    """A trial with its names replaced by what they stand for here."""

    trial: Trial
    dataset: Dataset
    method: Any
    config: Any
    backbone: ResolvedBackbone | None
    weights_id: str
    preprocessing: Preprocessing
    protocol: EvaluationProtocol
    """With `method` and `backbone` replaced by their values."""
    folder_ids: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Content of each folder that the configuration names, by field: what counts, wherever the folder is."""


def open_dataset(ref: DatasetRef, places: Places) -> Dataset:
    """The dataset behind a reference, generated first if it can be. Raises AdgridError if it is not here."""
    dataset = build_dataset(ref, places)
    reason = dataset.missing()
    if reason:
        raise AdgridError(f"dataset {ref.name!r}: {reason}")
    dataset.prepare()
    return dataset


def read_category(
    dataset: Dataset,
    category: str,
    shots: int | None,
    seed: int,
    cache_dir: str,
    reference: ReferenceChoice | None = None,
) -> CategoryData:
    """Lists a category, draws its shots, finds given references and hashes every file that a cell would read."""
    listing = dataset.category(category)
    if not listing.test:
        raise AdgridError(
            f"dataset {dataset.name!r}, category {category!r} has no test images, training data alone; choose another "
            f"variant of the dataset, or leave it out"
        )
    train = draw_shots(dataset.name, listing, shots, seed)
    references = () if reference is None else list_given_references(dataset.name, category, reference)
    alike = None if reference is None else read_alike_lists(dataset.name, listing, reference)
    listed = {sample.path: sample for samples in (alike or {}).values() for sample in samples}
    files = [sample.path for sample in (*train, *listing.test, *references, *listed.values())]
    files += [sample.mask_path for sample in listing.test if sample.mask_path]
    hashes = content_hashes(files, cache_dir)
    images_id = images_fingerprint((*train, *listing.test, *references), hashes)
    if alike is not None:
        images_id = content_id([images_id, [images_fingerprint(samples, hashes) for samples in alike.values()]])
    return CategoryData(
        category=category,
        train=train,
        test=listing.test,
        has_masks=listing.has_masks,
        hashes=hashes,
        references=references,
        alike=alike,
        images_id=images_id,
        truth_id=truth_fingerprint(listing.test, hashes, listing.has_masks),
    )


def resolve_trial(trial: Trial, dataset: Dataset, cache_dir: str) -> ResolvedTrial:
    """Method class, configuration, backbone, preprocessing and protocol of a trial."""
    method = load_method(trial.method)
    folders = {name: trial.params[name] for name in getattr(method, "folders", ()) if trial.params[name] is not None}
    backbone = None if trial.backbone is None else resolve_backbone(trial.backbone, trial.weights, cache_dir)
    return ResolvedTrial(
        trial=trial,
        dataset=dataset,
        method=method,
        config=build_config(method, trial.params),
        backbone=backbone,
        weights_id="" if backbone is None else backbone_fingerprint(backbone),
        preprocessing=resolve_preprocessing(trial.protocol, backbone),
        protocol=resolve_protocol(trial.protocol, method, backbone),
        folder_ids={name: _folder_id(name, path, cache_dir) for name, path in folders.items()},
    )


@lru_cache(maxsize=64)
def _folder_id(field: str, folder: str, cache_dir: str) -> str:
    """Names and contents of all images below a folder; read once in a process."""
    paths = sorted(
        str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS and path.is_file()
    )
    if not paths:
        raise AdgridError(f"{field}: no images in {folder}; name a folder of images, or leave the parameter out")
    hashes = content_hashes(paths, cache_dir)
    return content_id([[str(Path(path).relative_to(folder)), hashes[path]] for path in paths])


def resolve_preprocessing(protocol: EvaluationProtocol, backbone: ResolvedBackbone | None) -> Preprocessing:
    """Size, crop and interpolation; bilinear where neither the protocol nor a backbone says otherwise."""
    interpolation: Any = protocol.interpolation
    if interpolation == "backbone":
        interpolation = "bilinear" if backbone is None else backbone.interpolation
    return Preprocessing(image_size=protocol.image_size, resize=protocol.resize, interpolation=interpolation)


def resolve_protocol(
    protocol: EvaluationProtocol, method: Any, backbone: ResolvedBackbone | None
) -> EvaluationProtocol:
    """Replaces `method` and `backbone` by values; a paper's sigma at 224 pixels keeps its ratio to the image."""
    smoothing, reduction = protocol.smoothing, protocol.score_reduction
    if smoothing == "method":
        smoothing = method.smoothing * min(protocol.image_size) / PAPER_IMAGE_SIDE
    if reduction == "method":
        reduction = method.score_reduction
    interpolation = resolve_preprocessing(protocol, backbone).interpolation
    return dataclasses.replace(
        protocol, smoothing=float(smoothing), score_reduction=reduction, interpolation=interpolation
    )


def pretraining_id(
    pretraining: Pretraining,
    backbone: ResolvedBackbone,
    data: Sequence[LabelledCategory],
    select_on: Sequence[LabelledCategory],
) -> str:
    """Id of the artifact that a pretraining becomes, whatever the number of workers."""
    facts: list[Any] = [
        "pretraining",
        pretraining.kind,
        representation_version(pretraining.kind),
        pretraining.params,
        backbone_fingerprint(backbone),
        pretraining.layers,
        resolve_preprocessing(pretraining.protocol, backbone),
        FEATURES_VERSION,
        [one.fingerprint for one in data],
        pretraining.seed,
        pretraining.precision,
        pretraining.pool,
    ]
    if select_on:
        facts.append([[one.fingerprint for one in select_on], dataclasses.asdict(pretraining.reference)])
    return content_id(facts)


def identify_cells(resolved: ResolvedTrial, data: Mapping[str, CategoryData]) -> tuple[Cell, ...]:
    """The ids of a trial's cells.

    Args:
        resolved: the trial.
        data: category -> its images; a dataset-wide method needs all categories of the trial.
    """
    trial = resolved.trial
    facts = prediction_facts(resolved, trial.params)
    whole = resolved.method.scope == "dataset"
    everything = [data[category].images_id for category in trial.categories] if whole else []
    protocol = dataclasses.asdict(resolved.protocol)
    own_score = trial.protocol.score_reduction == "method"
    cells = []
    for category in trial.categories if whole else [name for name in trial.categories if name in data]:
        images = everything if whole else data[category].images_id
        prediction_id = content_id([facts, category, images])
        cell_id = content_id([prediction_id, protocol, own_score, METRIC_VERSION, data[category].truth_id])
        cells.append(Cell(category=category, prediction_id=prediction_id, cell_id=cell_id))
    return tuple(cells)


def _representation_facts(trial: Trial) -> Any:
    """What the features that a method reads depend on besides the backbone's; never how the space calls it."""
    trained = trial.trained
    if trained is None:
        return trial.representation
    choice = dataclasses.asdict(trained.reference) | {"path": None}  # contents count, not their place
    version = representation_version(trained.kind)
    return [trained.kind, version, trained.params, trained.artifact_id, trained.layers, choice]


def prediction_facts(resolved: ResolvedTrial, params: Mapping[str, Any]) -> dict[str, Any]:
    """What raw predictions depend on besides the images: method, configuration, backbone, preprocessing, draws.

    Args:
        resolved: the trial.
        params: the configuration, or the part of it that matters.
    """
    trial = resolved.trial
    facts = {
        "method": trial.method,
        "method_version": method_version(trial.method),
        "params": {key: resolved.folder_ids.get(key, value) for key, value in params.items()},
        "backbone": trial.backbone,
        "weights": resolved.weights_id,
        "layers": trial.layers,
        "representation": _representation_facts(trial),
        "preprocessing": resolved.preprocessing,
        "features_version": FEATURES_VERSION,
        "dataset": trial.dataset.name,
        "shots": trial.shots,
        "seed": trial.seed,
    }
    # Of training alone, and only where it is not as usual, so that other ids stay what they are.
    if hasattr(resolved.method, "stages"):
        facts |= {"selection": trial.protocol.selection} if trial.protocol.selection != "last" else {}
        facts |= {"precision": trial.precision} if trial.precision != "float32" else {}
    return facts
