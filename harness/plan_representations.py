"""The part of a plan that is about trained representations: which are trained first, on what, and who uses them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.auxiliary import LabelledCategory
from harness.backbones import check_layers, choose_layers, level_shapes, resolve_backbone
from harness.contracts import (
    AdgridError,
    DataChoice,
    Dataset,
    EvaluationProtocol,
    Places,
    Pretraining,
    RepresentationRef,
)
from harness.datasets.fingerprint import content_hashes
from harness.registry import check_representation_params, load_representation, suggest
from harness.resolve import pretraining_id
from harness.space import PLAIN, BackboneEntry, DatasetEntry, RepresentationEntry, Space

FindDataset = Callable[[DatasetEntry], Dataset | str]
"""The dataset of an entry, or why it is not here."""
FindLabelled = Callable[[Dataset, str], LabelledCategory]


class RepresentationPlanner:
    """Resolves the representations of a space, each with each backbone once."""

    def __init__(self, space: Space, places: Places, find_dataset: FindDataset, find_labelled: FindLabelled) -> None:
        """Args: the space; where things lie; how datasets and their images are found."""
        self._space, self._places = space, places
        self._find_dataset, self._find_labelled = find_dataset, find_labelled
        self._refs: dict[str, RepresentationRef] = {}
        self._trained_on: dict[str, frozenset[str]] = {}
        self.pretrainings: dict[str, Pretraining] = {}
        """What has to be trained before the trials, by id."""

    def lacks(self, entry: RepresentationEntry, backbone: BackboneEntry) -> dict[tuple[str, str], str]:
        """What is not here: (kind, name) -> reason."""
        if entry.name == PLAIN:
            return {}
        if entry.checkpoint is not None:
            path = _checkpoint_path(entry, backbone)
            return {} if Path(path).is_file() else {("checkpoint", path): "no such file; put the trained state there"}
        lacks = {}
        for dataset in (*entry.data, *entry.select_on):
            found = self._find_dataset(dataset)
            if isinstance(found, str):
                lacks["dataset", dataset.name] = found
                continue
            for name in _chosen_categories(dataset, found):
                try:
                    self._find_labelled(found, name)
                except AdgridError as error:
                    lacks["dataset", dataset.name] = str(error)
        return lacks

    def resolve(
        self, entry: RepresentationEntry, backbone: BackboneEntry, layers: Sequence[str], weights: str
    ) -> RepresentationRef | None:
        """The representation as a trial uses it; its training, if it needs one, is planned.

        Args:
            entry: the representation.
            backbone: whose features it changes; nothing that either needs is missing.
            layers: those that the trial's method reads.
            weights: of the backbone, as the trial has them.

        Raises:
            AdgridError: the method reads a layer that the representation is not trained on; wrong settings.
        """
        if entry.name == PLAIN:
            return None
        key = repr((entry, backbone))
        if key not in self._refs:
            self._refs[key] = self._make(entry, backbone, weights)
        ref = self._refs[key]
        for layer in layers:
            if layer not in ref.layers:
                raise AdgridError(
                    f"representations, {entry.name!r}: it is trained on the layers {', '.join(ref.layers)} of "
                    f"{backbone.name!r}, and a method reads {layer!r}; name `layers` of one of them"
                )
        return ref

    def stamps(self, ref: RepresentationRef, test_hashes: Iterable[str]) -> tuple[str, ...]:
        """What rows with these test images say: that the representation was trained on some of them."""
        seen = self._trained_on.get(ref.artifact_id, frozenset())
        return ("representation trained on test images",) if any(digest in seen for digest in test_hashes) else ()

    def _make(self, entry: RepresentationEntry, backbone: BackboneEntry, weights: str) -> RepresentationRef:
        where = f"representations, {entry.name!r}"
        params = check_representation_params(entry.kind_name, entry.params, f"{where}: params")
        reference = entry.reference.resolved()
        if reference.path is not None:
            reference = dataclasses.replace(reference, path=str(_absolute(reference.path)))
        resolved = resolve_backbone(backbone.name, weights, self._places.cache_dir)
        wanted = load_representation(entry.kind_name).levels
        layers = check_layers(resolved, entry.layers) if entry.layers else choose_layers(resolved, wanted)
        stamps = []
        if reference.mode == "aligned":
            stamps.append("references like each test image" + ("" if reference.path is None else ", from given lists"))
        checkpoint = None
        if entry.checkpoint is not None:
            checkpoint = _checkpoint_path(entry, backbone)
            artifact = content_hashes([checkpoint], self._places.cache_dir)[checkpoint]
        else:
            if entry.pool is not None:
                stamps.append(f"pretrained with {entry.pool} references of each category and view")
            if entry.selection == "test_best":
                stamps.append("representation picked on test data")
            artifact = self._plan_training(entry, backbone, weights, params, layers)
        return RepresentationRef(
            kind=entry.kind_name,
            params=params,
            artifact_id=artifact,
            checkpoint=checkpoint,
            layers=layers,
            reference=reference,
            stamps=tuple(stamps),
        )

    def _plan_training(
        self,
        entry: RepresentationEntry,
        backbone: BackboneEntry,
        weights: str,
        params: Mapping[str, Any],
        layers: tuple[str, ...],
    ) -> str:
        data, labelled = self._choose(entry.data)
        select_on, picked_by = self._choose(entry.select_on)
        trained_on = {digest for one in labelled for digest in _image_hashes(one)}
        for one in picked_by:
            if not trained_on.isdisjoint(_image_hashes(one)):
                raise AdgridError(
                    f"representations, {entry.name!r}: category {one.category!r} of {one.dataset!r} is trained on and "
                    f"in `select_on`; the best state is picked on held-out categories, so leave it out of one"
                )
        pretraining = Pretraining(
            trial_id="",
            kind=entry.kind_name,
            params=params,
            backbone=backbone.name,
            weights=weights,
            layers=layers,
            data=data,
            select_on=select_on,
            reference=dataclasses.replace(entry.reference.resolved(), mode="shots", path=None, exclude_from_fit=False),
            protocol=self._protocol(entry),
            seed=entry.seed,
            precision=entry.precision or self._space.precision,
            resources=(entry.resources or self._space.resources).resolved(),
            reference_source=entry.reference_source,
            pool=entry.pool,
            num_images=sum(len(one.samples) for one in labelled),
            num_references=_count_references(labelled, entry.pool),
        )
        resolved = resolve_backbone(backbone.name, weights, self._places.cache_dir)
        level_shapes(resolved, layers, pretraining.protocol.image_size)  # refuses a size that does not fit
        artifact = pretraining_id(pretraining, resolved, labelled, picked_by)
        self.pretrainings[artifact] = dataclasses.replace(pretraining, trial_id=artifact)
        self._trained_on[artifact] = frozenset(trained_on)
        return artifact

    def check_selection(self, reported: Mapping[tuple[str, str], frozenset[str]]) -> None:
        """Raises AdgridError if a state is picked on reported images and the space does not say `test_best`.

        Args:
            reported: hashes of the test images by (dataset, category).
        """
        for entry in self._entries():
            if entry.selection != "heldout_categories":
                continue
            for one in self._choose(entry.select_on)[1]:
                hashes = frozenset(_image_hashes(one))
                for (dataset, category), images in reported.items():
                    if not hashes.isdisjoint(images):
                        raise AdgridError(
                            f"representations, {entry.name!r}: its state would be picked on category {category!r} of "
                            f"{dataset!r}, which the space reports on; take it out of `select_on`, or say "
                            f"`selection: test_best`, which every row then says"
                        )

    def _entries(self) -> Iterator[RepresentationEntry]:
        yield from self._space.representations
        for grid in self._space.include:
            yield from grid.representations or ()

    def _choose(self, entries: Sequence[DatasetEntry]) -> tuple[tuple[DataChoice, ...], list[LabelledCategory]]:
        choices, labelled = [], []
        for entry in entries:
            dataset = self._find_dataset(entry)
            if isinstance(dataset, str):
                continue  # listed as missing
            own = [self._find_labelled(dataset, name) for name in _chosen_categories(entry, dataset)]
            labelled += own
            ref = entry.ref()
            root = None if ref.root is None else str(_absolute(ref.root))
            choices.append(
                DataChoice(dataset=dataclasses.replace(ref, root=root), categories=tuple(one.category for one in own))
            )
        return tuple(choices), labelled

    def _protocol(self, entry: RepresentationEntry) -> EvaluationProtocol:
        """The space's, at the training's own size; nothing of it but size, crop and interpolation counts."""
        protocol = self._space.protocol.resolved()
        if entry.image_size is not None:
            protocol = dataclasses.replace(protocol, image_size=entry.image_size, resize=None)
        return protocol if entry.resize is None else dataclasses.replace(protocol, resize=entry.resize)


def _chosen_categories(entry: DatasetEntry, dataset: Dataset) -> tuple[str, ...]:
    known = dataset.category_names()
    for name in entry.categories or ():
        if name not in known:
            raise AdgridError(f"representations, data, {entry.name!r}: unknown category {name!r}{suggest(name, known)}")
    return entry.categories or known


def _count_references(labelled: Sequence[LabelledCategory], pool: int | None) -> int:
    """Normal images, or as many of each category and view as a pool keeps."""
    groups = Counter((one.dataset, one.category, sample.view) for one in labelled for sample in one.normal)
    return sum(number if pool is None else min(pool, number) for number in groups.values())


def _image_hashes(one: LabelledCategory) -> Iterator[str]:
    return (one.hashes[sample.path] for sample in one.samples)


def _checkpoint_path(entry: RepresentationEntry, backbone: BackboneEntry) -> str:
    assert entry.checkpoint is not None, "asked for the path of a given checkpoint"
    return str(_absolute(entry.checkpoint.replace("{backbone}", backbone.name)))


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()
