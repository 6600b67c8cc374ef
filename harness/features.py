"""Features and images of a split: taken from the store, computed once where they are missing.

Whatever is missing of any layer comes from one forward pass, while threads decode the next images. Numbers do not
depend on whether they were stored: features that are computed for each use are rounded in the same way.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from harness.backbones import Precision, ResolvedBackbone, backbone_fingerprint, level_shapes
from harness.contracts import Backbone, Batch, Preprocessing, SampleKey
from harness.feature_store import DamagedShard, FeatureStore, ShardWriter, StoredRows, StoreKey
from harness.image_split import ImageSplit, OnProgress, Pixels, check_positions, chunks, keys_of, load_images

__all__ = [
    "FeatureSplit",
    "FeatureStore",
    "ImageSplit",
    "NonFiniteFeatures",
    "derive_split",
    "feature_keys",
    "feature_split",
    "load_images",
    "num_encoded_together",
    "round_as_stored",
]

ENCODED_TOGETHER = 4 * 224**2
"""Pixels in one forward pass on a CPU, for every four threads: the maps inside a network then stay in the cache, and
below `REUSED_BYTES`. Larger batches of EfficientNet-Lite0 take twice as long per image."""
REUSED_BYTES = 2**25 - 2**16
"""The largest blocks of memory that glibc uses again, see `_reuse_memory`."""
FLOAT16_LIMIT = 6e4
"""Images with a feature beyond this are kept in float32; float16 ends at 65,504."""

EncoderFactory = Callable[[tuple[str, ...]], Backbone]
"""Layers to an encoder of those layers; called only when something has to be computed."""


class NonFiniteFeatures(ValueError):
    """The backbone itself gave NaN or infinite features."""


def round_as_stored(level: Tensor, dtype: Literal["float16", "float32"] = "float16") -> Tensor:
    """What a level becomes on its way through the store: (B, D, h, w) float32 in, the same shape out.

    float16 rounds to 11 significant bits; an image with a value beyond `FLOAT16_LIMIT` stays as it is.
    """
    if dtype == "float32":
        return level
    rounded = level.half().float()
    wide = torch.linalg.vector_norm(level, torch.inf, dim=(1, 2, 3)) > FLOAT16_LIMIT
    return torch.where(wide.view(-1, 1, 1, 1), level, rounded) if wide.any() else rounded


def num_encoded_together(image_size: tuple[int, int], device: torch.device) -> int:
    """Images in one forward pass, at most: the fewer, the less memory a CPU goes through; an accelerator takes all."""
    if device.type != "cpu":
        return sys.maxsize
    return max(1, ENCODED_TOGETHER * max(1, torch.get_num_threads() // 4) // (image_size[0] * image_size[1]))


def feature_keys(
    *,
    dataset: str,
    category: str,
    split: str,
    resolved: ResolvedBackbone,
    layers: Sequence[str],
    preprocessing: Preprocessing,
    precision: Precision = "float32",
    dtype: Literal["float16", "float32"] = "float16",
) -> dict[str, StoreKey]:
    """Layer -> key under which its features are stored; `FeatureStore.being_extracted` takes one."""
    shapes = level_shapes(resolved, layers, preprocessing.image_size)
    fingerprint = backbone_fingerprint(resolved, precision)
    return {
        layer: StoreKey(
            kind="features",
            dataset=dataset,
            category=category,
            split=split,
            preprocessing=preprocessing,
            backbone=fingerprint,
            layer=layer,
            dtype=dtype,
            shape=(height, width, channels),  # patch vectors contiguous, as channels-last networks give them
        )
        for layer, (channels, height, width) in zip(layers, shapes, strict=True)
    }


def feature_split(
    samples: Sequence[SampleKey],
    hashes: Mapping[str, str],
    *,
    dataset: str,
    split: str,
    resolved: ResolvedBackbone,
    layers: Sequence[str],
    preprocessing: Preprocessing,
    store: FeatureStore,
    encoder_factory: EncoderFactory,
    also_layers: Sequence[str] = (),
    batch_size: int = 32,
    precision: Precision = "float32",
    dtype: Literal["float16", "float32"] = "float16",
    device: torch.device | str = "cpu",
    num_threads: int | None = None,
    stream: bool = False,
    on_progress: OnProgress | None = None,
) -> FeatureSplit:
    """Features of some images, complete: what the store lacks is extracted before this returns.

    Args:
        samples: the images, of one or several categories; ground truth is left behind.
        hashes: absolute path to content hash.
        dataset: name of the dataset.
        split: `train` or `test`.
        resolved: the backbone.
        layers: the layers wanted, in the order of the levels.
        preprocessing: size, crop and interpolation.
        store: where features and decoded images are kept. What does not fit is computed at every use instead.
        encoder_factory: gives the frozen backbone when something has to be computed.
        also_layers: further layers to store from a forward pass that is made anyway.
        batch_size: images per batch, and at most per forward pass.
        precision: precision of the encoder that the factory makes; part of the store's key.
        dtype: what the store keeps; float16 halves the size at a relative error of 5e-4.
        device: where batches are wanted.
        num_threads: threads that decode; None for as many as torch uses, two at least.
        stream: store no features, compute them at every use.
        on_progress: told about the extraction.

    Raises:
        AdgridError: an image or the weights cannot be read.
        NonFiniteFeatures: the backbone gave NaN or infinite features.
    """
    wanted = tuple(dict.fromkeys([*layers, *also_layers]))
    rows = {
        (layer, category): store.open(key)
        for category in dict.fromkeys(sample.category for sample in samples)
        for layer, key in feature_keys(
            dataset=dataset,
            category=category,
            split=split,
            resolved=resolved,
            layers=wanted,
            preprocessing=preprocessing,
            precision=precision,
            dtype=dtype,
        ).items()
    }
    keys = keys_of(samples)
    pixels = Pixels(keys, preprocessing, hashes=hashes, dataset=dataset, store=store, num_threads=num_threads)
    together = min(batch_size, num_encoded_together(preprocessing.image_size, torch.device(device)))
    features = FeatureSplit(
        samples=keys,
        digests=tuple(hashes[sample.path] for sample in keys),
        name=resolved.name,
        layers=tuple(layers),
        also_layers=tuple(also_layers),
        rows=rows,
        source=pixels,
        store=store,
        encoder_factory=lambda layers: _Parts(encoder_factory(layers), together),
        batch_size=batch_size,
        num_together=together,
        dtype=dtype,
        device=torch.device(device),
    )
    if stream:
        features.stream()
    else:
        features.complete(on_progress)
    return features


def derive_split(
    plain: FeatureSplit,
    ids: Mapping[str, str],
    change: Callable[[Batch], tuple[Tensor, ...]],
    on_progress: OnProgress | None = None,
) -> FeatureSplit:
    """Features of the same images after a change of them, stored under keys of their own.

    Args:
        plain: the features as they are.
        ids: category to an id of the change, which becomes part of the keys.
        change: a batch to its new levels, one of the same shape for each; for an image it is the same in any batch.
        on_progress: told about what is computed.
    """
    rows = {}
    for (layer, category), stored in plain._rows.items():
        if layer in plain.layers:
            key = dataclasses.replace(stored.key, backbone=f"{stored.key.backbone}+{ids[category]}")
            rows[layer, category] = plain._store.open(key)
    derived = FeatureSplit(
        samples=plain.samples,
        digests=plain._digests,
        name=plain._name,
        layers=plain.layers,
        also_layers=(),
        rows=rows,
        source=_Levels(plain),
        store=plain._store,
        encoder_factory=lambda layers: _Changed(change, plain.layers, layers),
        batch_size=plain._batch_size,
        num_together=plain._batch_size,
        dtype=plain._dtype,
        device=plain._device,
    )
    derived.complete(on_progress)
    return derived


class _Source(Protocol):
    """What features are computed from."""

    def batches(self, groups: Sequence[Sequence[int]], keep: bool = False) -> Generator[Any, None, None]:
        """What the encoder takes, for each group of positions; `keep` stores what was made for it."""

    def missing_bytes(self) -> int:
        """What `keep` would store."""

    def fill(self, batch_size: int) -> int:
        """Prepares for being asked again and again."""


class _Encoder(Protocol):
    def encode(self, inputs: Any) -> tuple[Tensor, ...]:
        """What the source gives, to one (B, D, h, w) map per layer."""


class _Parts:
    """A backbone that is given few images at a time."""

    def __init__(self, backbone: Backbone, size: int) -> None:
        self._backbone, self._size = backbone, size

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        parts = [self._backbone.encode(part) for part in images.split(self._size)]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


class _Levels:
    """Plain features as the source of changed ones."""

    def __init__(self, plain: FeatureSplit) -> None:
        self._plain = plain

    def batches(self, groups: Sequence[Sequence[int]], keep: bool = False) -> Generator[Batch, None, None]:
        for group in groups:
            yield self._plain.take(group)

    def missing_bytes(self) -> int:
        return 0

    def fill(self, batch_size: int) -> int:
        return 0


class _Changed:
    """A change of features, for some of the layers."""

    def __init__(
        self, change: Callable[[Batch], tuple[Tensor, ...]], given: Sequence[str], wanted: Sequence[str]
    ) -> None:
        self._change, self._places = change, [given.index(layer) for layer in wanted]

    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        levels = self._change(batch)
        return tuple(levels[place] for place in self._places)


class FeatureSplit:
    """Features of images in a fixed order; satisfies `harness.contracts.Split`. Made by `feature_split`."""

    def __init__(
        self,
        *,
        samples: tuple[SampleKey, ...],
        digests: tuple[str, ...],
        name: str,
        layers: tuple[str, ...],
        also_layers: tuple[str, ...],
        rows: Mapping[tuple[str, str], StoredRows],
        source: _Source,
        store: FeatureStore,
        encoder_factory: Callable[[tuple[str, ...]], _Encoder],
        batch_size: int,
        num_together: int,
        dtype: Literal["float16", "float32"],
        device: torch.device,
    ) -> None:
        """Args: what `feature_split` found; `rows` by (layer, category); images per batch and per computation."""
        self.samples = samples
        self.layers = layers
        self.streamed = False
        """Whether features are computed at every use, because the store has no room for them."""
        self.num_extracted = 0
        """Images that went through the backbone, for the store or for a batch."""
        self.extract_seconds = 0.0
        """Wall time of filling the store, decoding included."""
        self._digests, self._name, self._also_layers = digests, name, also_layers
        self._rows, self._source, self._store = rows, source, store
        self._encoder_factory, self._dtype, self._device = encoder_factory, dtype, device
        self._batch_size, self._num_together = batch_size, num_together
        self._encoder: _Encoder | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Batch]:
        groups = chunks(range(len(self)), self._batch_size)
        if self.streamed:
            yield from self._stream(groups)
        else:
            yield from map(self._read, groups)

    def take(self, indices: Sequence[int]) -> Batch:
        """The images at these positions as one batch, one (B, D, h, w) float32 map per layer."""
        positions = check_positions(indices, len(self))
        if not self.streamed:
            return self._read(positions)
        batches = list(self._stream(chunks(positions, self._batch_size)))
        levels = zip(*(batch.levels or () for batch in batches), strict=True)
        return Batch(
            samples=tuple(self.samples[i] for i in positions), levels=tuple(torch.cat(parts) for parts in levels)
        )

    def complete(self, on_progress: OnProgress | None = None) -> None:
        """Extracts what the store lacks, in one forward pass per image; streams from now on if there is no room."""
        todo = self._lacking()
        if not todo:
            return
        start = time.perf_counter()
        layers, keep_pixels = self._what_fits(todo)
        if layers:
            self._extract(todo, layers, keep_pixels, on_progress)
        if self._lacking():
            self.stream()
        self.extract_seconds += time.perf_counter() - start

    def stream(self) -> None:
        """Computes features at every use from now on."""
        self.streamed = True
        self._source.fill(self._batch_size)

    def _lacking(self) -> list[int]:
        """Positions of images without a row in some layer, one per content."""
        first: dict[tuple[str, str], int] = {}
        for i, (sample, digest) in enumerate(zip(self.samples, self._digests, strict=True)):
            if any(digest not in self._rows[layer, sample.category] for layer in self.layers):
                first.setdefault((sample.category, digest), i)
        return list(first.values())

    def _lacks(self, layer: str, position: int) -> bool:
        return self._digests[position] not in self._rows[layer, self.samples[position].category]

    def _what_fits(self, todo: Sequence[int]) -> tuple[tuple[str, ...], bool]:
        """The layers to extract (none if there is no room) and whether decoded images are kept as well."""
        everything = tuple(dict.fromkeys(self.layers + self._also_layers))
        pixels = self._source.missing_bytes()
        for layers, keep_pixels in ((everything, True), (everything, False), (self.layers, False)):
            category = self.samples[0].category
            needed = {
                layer: sum(self._lacks(layer, i) for i in todo) * self._rows[layer, category].key.row_bytes
                for layer in layers
            }
            if self._store.make_room(sum(needed.values()) + (pixels if keep_pixels else 0)):
                return tuple(layer for layer, num_bytes in needed.items() if num_bytes), keep_pixels
        self._store.note(
            f"features of {len(self)} images ({self._name}: {', '.join(self.layers)}) do not fit into the cache; "
            "they are computed at every use (a larger cache keeps them)"
        )
        return (), False

    def _extract(
        self, todo: list[int], layers: tuple[str, ...], keep_pixels: bool, on_progress: OnProgress | None
    ) -> None:
        _reuse_memory()
        encoder = self._encoder_factory(layers)
        groups = chunks(todo, self._num_together)
        done = 0
        with ExitStack() as stack:
            writers = {
                place: stack.enter_context(self._store.writer(rows.key))
                for place, rows in self._rows.items()
                if place[0] in layers
            }
            # A batch is written while the next is encoded; what is complete is kept when a later image cannot be read.
            pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="write"))
            batches = stack.enter_context(closing(self._source.batches(groups, keep_pixels)))
            writing: Future[None] | None = None
            for group, inputs in zip(groups, batches, strict=True):
                with torch.inference_mode():
                    levels = encoder.encode(inputs)
                    rows = [self._to_rows(level, layer, group) for layer, level in zip(layers, levels, strict=True)]
                if writing is not None:
                    writing.result()
                writing = pool.submit(self._write, group, layers, rows, writers)
                done += len(group)
                if on_progress is not None:
                    on_progress(done, len(todo))
            if writing is not None:
                writing.result()
        self.num_extracted += done
        for stored in self._rows.values():
            stored.refresh()

    def _to_rows(self, level: Tensor, layer: str, group: Sequence[int]) -> tuple[np.ndarray, list[bool]]:
        """(B, h, w, D) rows in host memory, and which of them need float32 whatever the store's dtype."""
        peaks = self._check_finite(level, layer, group)
        wide = (peaks > FLOAT16_LIMIT).tolist()
        rows = level.permute(0, 2, 3, 1)  # (B, D, h, w) -> (B, h, w, D)
        if self._dtype == "float16" and not any(wide):
            rows = rows.half()
        return rows.contiguous().cpu().numpy(), wide

    def _check_finite(self, level: Tensor, layer: str, group: Sequence[int]) -> Tensor:
        """(B,) largest magnitude of each image. Raises NonFiniteFeatures."""
        values = level.permute(0, 2, 3, 1).flatten(1)  # a view of channels-last maps
        peaks = torch.maximum(values.amax(dim=1), -values.amin(dim=1)).cpu()  # NaN if any value is
        for position, finite in zip(group, peaks.isfinite().tolist(), strict=True):
            if not finite:
                raise NonFiniteFeatures(
                    f"backbone {self._name} layer {layer} gave non-finite features for image "
                    f"{self.samples[position].path}"
                )
        return peaks

    def _write(
        self,
        group: Sequence[int],
        layers: Sequence[str],
        levels: Sequence[tuple[np.ndarray, list[bool]]],
        writers: Mapping[tuple[str, str], ShardWriter],
    ) -> None:
        for layer, (rows, wide) in zip(layers, levels, strict=True):
            batches: dict[tuple[str, str], list[int]] = defaultdict(list)
            for place, position in enumerate(group):
                if self._lacks(layer, position):
                    dtype: str = "float32" if wide[place] else self._dtype
                    batches[self.samples[position].category, dtype].append(place)
            for (category, dtype), places in batches.items():
                chosen = rows if len(places) == len(group) else rows[places]
                digests = [self._digests[group[place]] for place in places]
                writers[layer, category].add(digests, chosen.astype(dtype, copy=False))
            if any(wide) and self._dtype == "float16":
                self._store.note(f"{self._name} {layer}: some features exceed float16 and are stored in float32")

    def _read(self, group: Sequence[int]) -> Batch:
        try:
            return self._stored(group)
        except (DamagedShard, KeyError) as error:  # KeyError: another split has met the damage first
            self._store.note(f"stored features of {self._name} are lost ({error}) and extracted again")
        # Whatever else is damaged is found now, so that one forward pass makes all of it again.
        for (layer, category), rows in self._rows.items():
            for sample, digest in zip(self.samples, self._digests, strict=True):
                if layer in self.layers and sample.category == category:
                    with suppress(DamagedShard, KeyError):
                        rows.row(digest)
        self.complete()
        return next(self._stream([group])) if self.streamed else self._stored(group)

    def _stored(self, group: Sequence[int]) -> Batch:
        samples = tuple(self.samples[i] for i in group)
        levels = []
        for layer in self.layers:
            views = [
                self._rows[layer, sample.category].row(self._digests[i])
                for i, sample in zip(group, samples, strict=True)
            ]
            rows = torch.from_numpy(np.stack(views)).to(self._device).float()
            levels.append(rows.permute(0, 3, 1, 2))  # (B, h, w, D) -> (B, D, h, w)
        return Batch(samples=samples, levels=tuple(levels))

    def _stream(self, groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Batches computed anew, with the numbers that the store would have given."""
        if self._encoder is None:
            _reuse_memory()
            self._encoder = self._encoder_factory(self.layers)
        with closing(self._source.batches(groups)) as batches:
            for group, inputs in zip(groups, batches, strict=True):
                levels = []
                for layer, level in zip(self.layers, self._encoder.encode(inputs), strict=True):
                    self._check_finite(level, layer, group)
                    levels.append(round_as_stored(level.detach(), self._dtype).to(self._device))
                self.num_extracted += len(group)
                yield Batch(samples=tuple(self.samples[i] for i in group), levels=tuple(levels))


def _reuse_memory() -> None:
    """Lets glibc keep blocks of up to 32 MiB that are freed, instead of asking the system for new ones each time.

    It asks for every block above a threshold, and filling the new pages with zeros takes as long as computing the maps
    of a network that go there. The threshold, 128 KiB at first, rises to the size of any such block that is freed, but
    not beyond 32 MiB (mallopt(3), M_MMAP_THRESHOLD). On other systems this does nothing.
    """
    torch.empty(REUSED_BYTES, dtype=torch.uint8)
