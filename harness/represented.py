"""A trained representation at work: features of a trial's images are changed once, and stored like any others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.auxiliary import JoinedSplit
from harness.contracts import AdgridError, Batch, Category, Representation, RepresentationRef, Sample, SampleKey, Split
from harness.datasets.fingerprint import draw_shots
from harness.features import FeatureSplit, derive_split
from harness.identity import content_id
from harness.image_split import OnProgress
from harness.registry import build_config, load_representation, representation_version
from harness.resolve import CategoryData
from harness.store import Store

PlainSplit = Callable[[Sequence[Sample], str], FeatureSplit]
"""Plain features of some images, by the name of their split."""


def load_representation_state(ref: RepresentationRef, layers: Sequence[str], store: Store) -> Representation:
    """The trained representation for the levels of a method.

    Raises:
        AdgridError: it is not in the store, or what is there does not fit.
    """
    kind = load_representation(ref.kind)
    where = f"representation {ref.kind!r}, artifact {ref.artifact_id}"
    if ref.checkpoint is not None:
        where = f"checkpoint {ref.checkpoint}"
        state = kind.read_checkpoint(ref.checkpoint)
    else:
        state = store.load_state(ref.artifact_id)
        if state is None:
            raise AdgridError(f"{where}: it is not under {store.root}; run the whole space, which trains it first")
    return kind.from_state(build_config(kind, ref.params), state, [ref.layers.index(layer) for layer in layers], where)


def draw_references(dataset: str, data: CategoryData, ref: RepresentationRef) -> tuple[Sample, ...]:
    """The normal images that features of a category are compared with; none where each image has its own."""
    choice = ref.reference
    if choice.mode == "aligned":
        return ()
    if choice.mode == "files":
        return data.references
    drawn_from = Category(name=data.category, train=data.train, test=(), has_masks=False)
    return draw_shots(dataset, drawn_from, min(choice.shots, len(data.train)), choice.seed)


class RepresentedFeatures:
    """Changes the features of the categories of one fit."""

    def __init__(
        self,
        ref: RepresentationRef,
        representation: Representation,
        dataset: str,
        data: Mapping[str, CategoryData],
        plain_split: PlainSplit,
    ) -> None:
        """Reads nothing yet.

        Args:
            ref: what the space says of it.
            representation: the trained one, on the device of the features.
            dataset: name of the dataset, for the draw of the references.
            data: the images of each category.
            plain_split: gives plain features, from the store where they are.
        """
        self._ref, self._representation, self._data, self._plain_split = ref, representation, data, plain_split
        self.references = {name: draw_references(dataset, one, ref) for name, one in data.items()}
        """By category; empty where each image has references of its own."""
        self._tokens: dict[str, tuple[Tensor, ...]] = {}
        self._alike: dict[str, _AlikeImages] = {}

    def split(self, plain: FeatureSplit, on_progress: OnProgress | None = None) -> FeatureSplit:
        """The same images with changed features, stored under an id of their own."""
        return derive_split(plain, {name: self._id(name) for name in self._data}, self.change, on_progress)

    def apply(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Changes levels (B, D, h, w) of images of the only category, which need not be in any split."""
        (category,) = self._data
        return self._apply(category, levels, None)

    def fit_images(self, samples: Sequence[Sample]) -> list[Sample]:
        """The training images that a method is fitted to."""
        if not self._ref.reference.exclude_from_fit:
            return list(samples)
        drawn = {sample.path for references in self.references.values() for sample in references}
        kept = [sample for sample in samples if sample.path not in drawn]
        if not kept:
            raise AdgridError(
                f"reference.exclude_from_fit leaves no image to fit to: all {len(samples)} training images are "
                f"references; lower reference.shots, raise shots, or take it out"
            )
        return kept

    def _id(self, category: str) -> str:
        data, choice = self._data[category], dataclasses.asdict(self._ref.reference)
        images = self.references[category] or data.train
        facts = [self._ref.kind, representation_version(self._ref.kind), self._ref.params, self._ref.artifact_id]
        facts += [self._ref.layers, choice["mode"], choice["k"], [data.hashes[sample.path] for sample in images]]
        if data.alike is not None:
            facts.append({data.hashes[path]: [data.hashes[s.path] for s in own] for path, own in data.alike.items()})
        return content_id(facts)

    def change(self, batch: Batch) -> tuple[Tensor, ...]:
        """The changed levels of images whose categories are known."""
        assert batch.levels is not None, "a representation changes features"
        categories = [sample.category for sample in batch.samples]
        if len(set(categories)) == 1:
            return self._apply(categories[0], batch.levels, batch.samples)
        result = tuple(torch.empty_like(level, dtype=torch.float32) for level in batch.levels)
        for category in dict.fromkeys(categories):
            rows = [row for row, name in enumerate(categories) if name == category]
            samples = [batch.samples[row] for row in rows]
            changed = self._apply(category, tuple(level[rows] for level in batch.levels), samples)
            for whole, part in zip(result, changed, strict=True):
                whole[rows] = part
        return result

    def _apply(
        self, category: str, levels: tuple[Tensor, ...], samples: Sequence[SampleKey] | None
    ) -> tuple[Tensor, ...]:
        if self._ref.reference.mode != "aligned":
            return self._representation.apply(levels, self._reference_tokens(category))
        alike, lists = self._alike_images(category), self._data[category].alike or {}
        changed = []
        for row in range(len(levels[0])):
            image = tuple(level[row : row + 1] for level in levels)
            own = None if samples is None else samples[row]
            listed = lists.get(own.path) if own is not None else None
            places = alike.find(image, own) if listed is None else alike.positions(listed)
            changed.append(self._representation.apply(image, alike.tokens(places)))
        return tuple(torch.cat(parts) for parts in zip(*changed, strict=True))

    def _alike_images(self, category: str) -> _AlikeImages:
        if category not in self._alike:
            data = self._data[category]
            train = self._plain_split(data.train, "train")
            # Lists are made from all training images, and a k-shot run fits to a few of them.
            listed = {sample.path: sample for samples in (data.alike or {}).values() for sample in samples}
            others = [sample for path, sample in listed.items() if path not in {one.path for one in data.train}]
            parts = [train, *([self._plain_split(others, "train")] if others else [])]
            self._alike[category] = _AlikeImages(parts, self._ref.reference.k)
        return self._alike[category]

    def _reference_tokens(self, category: str) -> tuple[Tensor, ...]:
        """(R, D) per level."""
        if category not in self._tokens:
            references = self.references[category]
            # Drawn references are training images, whose features are stored; given ones are a split of their own.
            name = "reference" if self._ref.reference.mode == "files" else "train"
            batch = self._plain_split(references, name).take(range(len(references)))
            assert batch.levels is not None, "plain features were asked for"
            self._tokens[category] = tuple(_tokens_of(level) for level in batch.levels)
        return self._tokens[category]


class _AlikeImages:
    """Training images by their likeness: cosine of the mean of the deepest level."""

    def __init__(self, parts: Sequence[Split], num: int) -> None:
        """Args: the images that are compared, then those that only lists name; how many each image gets."""
        self._images, self._num = JoinedSplit([("", part) for part in parts]), num
        self._position = {sample.path: place for place, sample in enumerate(self._images.samples)}
        self._directions = torch.cat([_direction(batch.levels[-1]) for batch in parts[0] if batch.levels])  # (N, D)

    def find(self, image: tuple[Tensor, ...], sample: SampleKey | None) -> list[int]:
        """The training images most like one image (1, D, h, w) per level, itself excluded."""
        likeness = self._directions @ _direction(image[-1])[0]
        own = None if sample is None else self._position.get(sample.path)
        if own is not None and len(likeness) > 1:
            likeness[own] = -torch.inf
        available = len(likeness) - (own is not None and len(likeness) > 1)
        return likeness.topk(min(self._num, available)).indices.sort().values.tolist()

    def positions(self, samples: Sequence[Sample]) -> list[int]:
        """Where these images are."""
        return [self._position[sample.path] for sample in samples]

    def tokens(self, places: Sequence[int]) -> tuple[Tensor, ...]:
        """(R, D) per level of the images at these positions."""
        batch = self._images.take(places)
        assert batch.levels is not None, "plain features were asked for"
        return tuple(_tokens_of(level) for level in batch.levels)


def _direction(level: Tensor) -> Tensor:
    """(B, D, h, w) to unit vectors (B, D)."""
    return F.normalize(level.float().mean(dim=(2, 3)), dim=1)


def _tokens_of(level: Tensor) -> Tensor:
    """(B, D, h, w) to (B * h * w, D)."""
    return level.flatten(2).transpose(1, 2).flatten(0, 1).contiguous()
