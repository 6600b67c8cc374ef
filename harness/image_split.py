"""Images of a split: decoded in threads ahead of use, kept as pixels in the store so that they are decoded once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import torch
from torch import Tensor

from harness.contracts import Batch, Preprocessing, Sample, SampleKey
from harness.datasets.images import load_image
from harness.feature_store import DamagedShard, FeatureStore, ShardWriter, StoredRows, StoreKey

OnProgress = Callable[[int, int], None]
"""(images done, images in all)."""
_AHEAD = 2
"""Batches that are decoded ahead of the one in use."""


def load_images(samples: Sequence[SampleKey], preprocessing: Preprocessing, num_threads: int | None = None) -> Tensor:
    """Decodes images at the size of the preprocessing.

    Args:
        samples: the images.
        preprocessing: size, crop and interpolation.
        num_threads: threads that decode; None for as many as torch uses, two at least.

    Returns:
        (B, 3, H, W) uint8 RGB.

    Raises:
        AdgridError: an image cannot be read.
    """
    return Pixels(samples, preprocessing, num_threads=num_threads).take(range(len(samples)))


class ImageSplit:
    """Images in a fixed order as batches of pixels; satisfies `harness.contracts.Split`."""

    def __init__(
        self,
        samples: Sequence[SampleKey],
        preprocessing: Preprocessing,
        *,
        batch_size: int = 32,
        hashes: Mapping[str, str] | None = None,
        dataset: str = "",
        store: FeatureStore | None = None,
        num_threads: int | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Opens a split. With `hashes` and `store` its images are decoded once, now, and memory-mapped from then on.

        Args:
            samples: the images; ground truth is left behind.
            preprocessing: size, crop and interpolation.
            batch_size: images per batch.
            hashes: absolute path to content hash.
            dataset: name of the dataset, part of the store's key.
            store: keeps decoded images; None, or no room in it, decodes them at every use.
            num_threads: threads that decode; None for as many as torch uses, two at least.
            on_progress: told about the decoding.

        Raises:
            AdgridError: an image cannot be read.
        """
        self.samples = keys_of(samples)
        self._batch_size = batch_size
        self._pixels = Pixels(
            self.samples, preprocessing, hashes=hashes, dataset=dataset, store=store, num_threads=num_threads
        )
        self.num_decoded = self._pixels.fill(batch_size, on_progress)
        """Images that were decoded for the store."""

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Batch]:
        groups = chunks(range(len(self)), self._batch_size)
        with closing(self._pixels.batches(groups)) as batches:
            for group, pixels in zip(groups, batches, strict=True):
                yield self._batch(group, pixels)

    def take(self, indices: Sequence[int]) -> Batch:
        """The images at these positions as one batch, (B, 3, H, W) float32 in [0, 1]."""
        positions = check_positions(indices, len(self))
        return self._batch(positions, self._pixels.take(positions))

    def _batch(self, group: Sequence[int], pixels: Tensor) -> Batch:
        # In numpy: torch would wake threads of its own, which then spin for a while on the cores of those that decode.
        images = torch.from_numpy(np.divide(pixels.numpy(), np.float32(255), dtype=np.float32))
        return Batch(samples=tuple(self.samples[i] for i in group), images=images)


class Pixels:
    """Decoded images by position: out of the store where they are, otherwise decoded in threads."""

    def __init__(
        self,
        samples: Sequence[SampleKey],
        preprocessing: Preprocessing,
        *,
        hashes: Mapping[str, str] | None = None,
        dataset: str = "",
        store: FeatureStore | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._samples, self._preprocessing, self._store = samples, preprocessing, store
        self._digests = [] if hashes is None else [hashes[sample.path] for sample in samples]
        # Two at least: while the first batch is decoded nobody else has work.
        self._num_threads = num_threads or max(2, torch.get_num_threads())
        self._rows: dict[str, StoredRows] = {}
        if store is not None and hashes is not None:
            for category in dict.fromkeys(sample.category for sample in samples):
                key = StoreKey(
                    kind="images",
                    dataset=dataset,
                    category=category,
                    preprocessing=preprocessing,
                    dtype="uint8",
                    shape=(3, *preprocessing.image_size),
                )
                self._rows[category] = store.open(key)

    def missing(self) -> list[int]:
        """Positions of images that a store should have and has not, one per content."""
        first: dict[tuple[str, str], int] = {}
        for i, (sample, digest) in enumerate(zip(self._samples, self._digests, strict=False)):
            if sample.category in self._rows and digest not in self._rows[sample.category]:
                first.setdefault((sample.category, digest), i)
        return list(first.values())

    def missing_bytes(self) -> int:
        """What the store would grow by if all images were kept."""
        return len(self.missing()) * 3 * self._preprocessing.image_size[0] * self._preprocessing.image_size[1]

    def batches(self, groups: Iterable[Sequence[int]], keep: bool = False) -> Generator[Tensor, None, None]:
        """(B, 3, H, W) uint8 for each group of positions, decoded ahead of use.

        Args:
            groups: positions of the images of each batch.
            keep: add what had to be decoded to the store.
        """
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")
        ahead: deque[tuple[Sequence[int], np.ndarray, dict[int, Future[None]]]] = deque()
        with ExitStack() as stack:
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
            writers = {
                category: stack.enter_context(self._store.writer(rows.key))
                for category, rows in self._rows.items()
                if keep and self._store is not None
            }
            for group in groups:
                ahead.append((group, *self._start(group, pool)))
                if len(ahead) > _AHEAD:
                    yield self._finish(*ahead.popleft(), writers)
            while ahead:
                yield self._finish(*ahead.popleft(), writers)
        for rows in self._rows.values():
            rows.refresh()

    def fill(self, batch_size: int, on_progress: OnProgress | None = None) -> int:
        """Decodes what the store lacks, if it has room for all of it; the number of images decoded."""
        missing, done = self.missing(), 0
        if missing and self._store is not None and self._store.make_room(self.missing_bytes()):
            for pixels in self.batches(chunks(missing, batch_size), keep=True):
                done += len(pixels)
                if on_progress is not None:
                    on_progress(done, len(missing))
        return done

    def take(self, positions: Sequence[int]) -> Tensor:
        """(B, 3, H, W) uint8 of the images at these positions."""
        (pixels,) = self.batches([positions])
        return pixels

    def _start(self, group: Sequence[int], pool: ThreadPoolExecutor) -> tuple[np.ndarray, dict[int, Future[None]]]:
        pixels = np.empty((len(group), 3, *self._preprocessing.image_size), np.uint8)
        decoding = {}
        for place, position in enumerate(group):
            stored = self._stored(position)
            if stored is None:
                decoding[place] = pool.submit(self._decode, position, pixels[place])
            else:
                pixels[place] = stored
        return pixels, decoding

    def _stored(self, position: int) -> np.ndarray | None:
        rows = self._rows.get(self._samples[position].category)
        try:
            return None if rows is None else rows.row(self._digests[position])
        except (KeyError, DamagedShard):
            return None

    def _decode(self, position: int, into: np.ndarray) -> None:
        into[:] = load_image(self._samples[position].path, self._preprocessing)

    def _finish(
        self,
        group: Sequence[int],
        pixels: np.ndarray,
        decoding: Mapping[int, Future[None]],
        writers: Mapping[str, ShardWriter],
    ) -> Tensor:
        for place, future in decoding.items():
            future.result()
            writer = writers.get(self._samples[group[place]].category)
            if writer is not None:
                writer.add([self._digests[group[place]]], pixels[place : place + 1])
        return torch.from_numpy(pixels)


def keys_of(samples: Sequence[SampleKey]) -> tuple[SampleKey, ...]:
    """The samples without their ground truth."""
    return tuple(sample.key if isinstance(sample, Sample) else sample for sample in samples)


def chunks(positions: Sequence[int], size: int) -> list[Sequence[int]]:
    """The positions in order, so many at a time."""
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def check_positions(indices: Sequence[int], length: int) -> list[int]:
    """The indices as plain integers. Raises IndexError unless all are in [0, length)."""
    positions = [int(index) for index in indices]
    if not all(0 <= position < length for position in positions):
        raise IndexError(f"positions must be in [0, {length}), got {positions}")
    return positions
