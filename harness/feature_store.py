"""The node-local store of features and decoded images: Arrow files, memory-mapped, bounded in size.

    <cache_dir>/features/<kind>-<id of the key>/
        key.json                       what the rows have in common; its time says when the key was last used
        <unique name>.arrow            append-only shards: hash of the image, checksum, row
        <unique name>.partial          a shard being written; published by renaming it
        lease-<host>-<process>         somebody writes here; kept fresh while they do

A row is one image, found by the hash of its file's content. Shards appear whole or not at all, so a reader never waits
and a killed writer leaves nothing but a partial file. Two writers of the same rows are harmless: the first row found
counts. Every row is checked against its checksum when it is first read; a damaged shard is removed and made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import socket
import time
import uuid
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from harness.contracts import Preprocessing
from harness.identity import content_id

FEATURES_VERSION = 1
"""Raised when decoding, resizing or extraction moves the numbers; stored rows of other versions are not read."""
SHARD_BYTES = 64 * 2**20
"""A shard is published when it has grown to this size: what a killed writer can lose."""
LEASE_SECONDS = 600.0
"""A lease that was not renewed for so long has lost its owner."""
_PARTIAL_SECONDS = 3600.0
"""A partial file that did not grow for so long has lost its writer."""


class DamagedShard(Exception):
    """A row does not match its checksum. Its shard was removed; the rows are missing now and can be made again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreKey:
    """What all rows of one file set have in common."""

    kind: Literal["features", "images"]
    dataset: str
    category: str
    split: str = ""
    """`train` or `test`; empty for decoded images."""
    preprocessing: Preprocessing
    backbone: str = ""
    """Fingerprint of network, weights and precision."""
    layer: str = ""
    dtype: Literal["float16", "float32", "uint8"]
    """float16 file sets may hold rows in float32, where an image exceeds the range of float16."""
    shape: tuple[int, ...]
    """Shape of one row: (h, w, D) features or (3, H, W) pixels."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def folder(self) -> str:
        """Name of the file set's folder."""
        return f"{self.kind}-{content_id([FEATURES_VERSION, self])}"


class _Block:
    """One record batch of a shard: a view of its rows in the memory map."""

    def __init__(self, path: Path, batch: pa.RecordBatch, shape: tuple[int, ...]) -> None:
        column = batch.column("row")
        if column.type.list_size != math.prod(shape):
            raise ValueError(f"{path} holds rows of {column.type.list_size} numbers, not {shape}")
        values = column.values
        flat = np.frombuffer(values.buffers()[1], dtype=values.type.to_pandas_dtype())
        self.path = path
        self.rows = flat[: batch.num_rows * math.prod(shape)].reshape(batch.num_rows, *shape)
        self.checksums: list[int] = batch.column("checksum").to_pylist()
        self.checked = [False] * batch.num_rows


class StoredRows:
    """The rows of one key that this process knows of, memory-mapped."""

    def __init__(self, folder: Path, key: StoreKey) -> None:
        """Args: folder of the key, which need not exist yet; the key."""
        self.key = key
        self._folder = folder
        self._index: dict[str, tuple[_Block, int]] = {}
        self._known: set[str] = set()

    def refresh(self) -> None:
        """Takes in shards published since the last call; one that cannot be read is removed."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(".arrow"))
        except OSError:  # nothing stored, or nowhere to store it
            return
        for name in names:
            if name not in self._known:
                path = self._folder / name
                try:
                    self._add_shard(path)
                except (OSError, KeyError, ValueError, pa.ArrowException) as error:
                    # A number is the system's complaint (evicted meanwhile, too many open files); without one the
                    # content is wrong.
                    if getattr(error, "errno", None) is not None:
                        continue
                    path.unlink(missing_ok=True)
                self._known.add(name)

    def _add_shard(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        blocks = []
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            blocks.append((_Block(path, batch, self.key.shape), batch.column("hash").to_pylist()))
        for block, hashes in blocks:
            for position, digest in enumerate(hashes):
                self._index.setdefault(digest.hex(), (block, position))

    def __contains__(self, digest: str) -> bool:
        return digest in self._index

    def row(self, digest: str) -> np.ndarray:
        """The row of an image: a read-only view of the file, in the dtype it was stored in.

        Raises:
            KeyError: there is none.
            DamagedShard: its bytes changed since they were written.
        """
        block, position = self._index[digest]
        row = block.rows[position]
        if not block.checked[position]:
            if zlib.crc32(row) != block.checksums[position]:
                block.path.unlink(missing_ok=True)
                self._index = {key: place for key, place in self._index.items() if place[0].path != block.path}
                raise DamagedShard(f"{block.path} was damaged and is removed")
            block.checked[position] = True
        return row


class ShardWriter:
    """Appends rows to a key. Leaving the `with` block publishes them, whatever ended it: each row is complete."""

    def __init__(self, folder: Path, key: StoreKey, note: Callable[[str], None]) -> None:
        """Takes a lease on the key. Args: folder of the key; the key; told why when nothing can be written."""
        self.failed = False
        """Whether rows were lost because the cache could not be written."""
        self._folder, self._key, self._note = folder, key, note
        self._lease = folder / f"lease-{socket.gethostname()}-{os.getpid()}"
        self._open: dict[str, _OpenShard] = {}
        self._guarded(self._prepare)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._guarded(self._publish)
        with contextlib.suppress(OSError):
            self._lease.unlink(missing_ok=True)

    def add(self, hashes: Sequence[str], rows: np.ndarray) -> None:
        """Appends rows and renews the lease.

        Args:
            hashes: content hash of each image.
            rows: (n, *key.shape), C-contiguous, in the key's dtype or a wider one.
        """
        if len(hashes) and not self.failed:
            self._guarded(lambda: self._append(hashes, rows))

    def _prepare(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lease.touch()
        description = self._folder / "key.json"
        if not description.exists():
            partial = self._folder / f"{uuid.uuid4().hex}.partial"
            try:
                partial.write_text(json.dumps(dataclasses.asdict(self._key), indent=1), encoding="utf-8")
                os.replace(partial, description)
            finally:
                partial.unlink(missing_ok=True)

    def _append(self, hashes: Sequence[str], rows: np.ndarray) -> None:
        self._lease.touch()
        name = rows.dtype.name
        if name not in self._open:
            self._open[name] = _OpenShard(self._folder, self._key, rows.dtype)
        self._open[name].write(hashes, rows)
        if self._open[name].num_bytes >= SHARD_BYTES:
            self._open.pop(name).publish()

    def _publish(self) -> None:
        while self._open:
            self._open.popitem()[1].publish()

    def _guarded(self, action: Callable[[], None]) -> None:
        """A cache that cannot be written (full, read-only, removed meanwhile) is no reason to fail."""
        try:
            action()
        except OSError as error:
            self.failed = True
            for shard in self._open.values():
                shard.discard()
            self._open.clear()
            self._note(f"cannot write the cache {self._folder.parent} ({error}); features are computed again each time")


class _OpenShard:
    """A shard being written under a temporary name."""

    def __init__(self, folder: Path, key: StoreKey, dtype: np.dtype[Any]) -> None:
        self._final = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.arrow"
        self._partial = self._final.with_suffix(".partial")
        self._size = math.prod(key.shape)
        self.num_bytes = 0
        schema = pa.schema(
            [
                ("hash", pa.binary(32)),
                ("checksum", pa.uint32()),
                ("row", pa.list_(pa.from_numpy_dtype(dtype), self._size)),
            ]
        )
        self._schema = schema
        self._file = open(self._partial, "xb")  # noqa: SIM115  # closed by publish or discard
        self._writer = pa.ipc.new_file(self._file, schema)

    def write(self, hashes: Sequence[str], rows: np.ndarray) -> None:
        columns = [
            pa.array([bytes.fromhex(digest) for digest in hashes], pa.binary(32)),
            pa.array([zlib.crc32(row) for row in rows], pa.uint32()),
            pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), self._size),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self.num_bytes += rows.nbytes

    def publish(self) -> None:
        try:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._partial, self._final)
        except OSError:
            self.discard()
            raise

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)


_OPEN_ROWS: weakref.WeakValueDictionary[Path, StoredRows] = weakref.WeakValueDictionary()
"""File sets in use by this process: shared between readers, and never evicted by it."""


class FeatureStore:
    """Features and decoded images of one node, by key."""

    def __init__(
        self,
        cache_dir: str,
        max_bytes: int | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        """Opens the store; nothing is made until something is written.

        Args:
            cache_dir: folder on a local disk; several processes may share it.
            max_bytes: bound on the size of all file sets together; None for none.
            on_note: told what a user may want to know, such as a layer that needs float32.
        """
        self._root = Path(cache_dir).expanduser().absolute() / "features"
        self._max_bytes = max_bytes
        self._on_note = on_note
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        """Passes a message on, each once."""
        if self._on_note is not None and text not in self._said:
            self._said.add(text)
            self._on_note(text)

    def open(self, key: StoreKey) -> StoredRows:
        """The rows of a key as they are now; the key counts as used, and is not evicted while the result lives."""
        folder = self._root / key.folder
        rows = _OPEN_ROWS.get(folder)
        if rows is None:
            rows = _OPEN_ROWS[folder] = StoredRows(folder, key)
        with contextlib.suppress(OSError):
            os.utime(folder / "key.json")
        rows.refresh()
        return rows

    def writer(self, key: StoreKey) -> ShardWriter:
        """Appends rows to a key; others see `being_extracted` meanwhile."""
        return ShardWriter(self._root / key.folder, key, self.note)

    def being_extracted(self, key: StoreKey) -> bool:
        """Whether another process writes rows of this key now."""
        return any(owner != (socket.gethostname(), os.getpid()) for owner in _lease_owners(self._root / key.folder))

    def num_bytes(self) -> int:
        """Bytes of all file sets."""
        return sum(size for size, _ in self._file_sets().values())

    def make_room(self, num_bytes: int) -> bool:
        """Evicts the longest unused file sets until so many bytes fit.

        Never evicts what this process uses or anybody writes.

        Returns:
            False, with nothing evicted, if they cannot fit.
        """
        if self._max_bytes is None:
            return True
        sets = self._file_sets()
        total = sum(size for size, _ in sets.values()) + num_bytes
        if total <= self._max_bytes:
            return True
        idle = {
            folder: size
            for folder, (size, _) in sorted(sets.items(), key=lambda item: item[1][1])
            if folder not in _OPEN_ROWS and not any(_lease_owners(folder))
        }
        if total - sum(idle.values()) > self._max_bytes:
            return False
        for folder, size in idle.items():
            _remove_folder(folder)
            total -= size
            if total <= self._max_bytes:
                break
        return True

    def _file_sets(self) -> dict[Path, tuple[int, float]]:
        """Folder -> (bytes, time of last use); removes what killed writers left."""
        sets = {}
        for folder in _scan(self._root):
            size, used = 0, 0.0
            for entry in _scan(folder.path):
                try:
                    stat = entry.stat()
                except OSError:  # removed since it was listed
                    continue
                abandoned = entry.name.endswith(".partial") and time.time() - stat.st_mtime > _PARTIAL_SECONDS
                if abandoned:
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                size += stat.st_size
                used = max(used, stat.st_mtime)
            sets[Path(folder.path)] = (size, used)
        return sets


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _lease_owners(folder: Path) -> Iterable[tuple[str, int]]:
    """(host, process) of everybody who writes to a folder now."""
    for entry in _scan(folder):
        kind, _, owner = entry.name.partition("-")
        host, _, process = owner.rpartition("-")
        if kind != "lease" or not process.isdigit():
            continue
        try:
            fresh = time.time() - entry.stat().st_mtime < LEASE_SECONDS
        except OSError:
            continue
        if fresh and (host != socket.gethostname() or _is_alive(int(process))):
            yield host, int(process)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # exists, but is somebody else's
        return True
    return True


def _remove_folder(folder: Path) -> None:
    # Renamed first, so that no reader finds half a file set; those who have its files mapped keep them.
    condemned = folder.with_name(f"removed-{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        os.replace(folder, condemned)
        shutil.rmtree(condemned, ignore_errors=True)
