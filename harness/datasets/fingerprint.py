"""What a dataset's content is, whatever its place and age: hashes of the files, and the k-shot draw.

A hash covers a file's bytes. Size and modification time only tell whether a remembered hash is stale; they and the
absolute path never enter an id, so every node and every copy of the data gets the same ids. Where a store keeps no
times nothing is remembered: a size alone cannot tell two BMP images apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.contracts import AdgridError, Category, Sample, derive_seed
from harness.datasets.files import is_uri, open_file, stat_file

_SETTLED_NS = 2_000_000_000
"""A file younger than this when it was hashed may be written again within the same clock tick of its file system, so
its hash is not remembered (two seconds is the tick of FAT, the coarsest in use)."""

_Remembered = dict[str, tuple[int, int, str]]
"""File name to size, modification time in ns, hash."""


def content_hashes(
    paths: Iterable[str], cache_dir: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """SHA-256 of the bytes of every file, remembered between calls and processes.

    There is one memory file per folder under `<cache_dir>/hashes`, replaced as a whole: a reader never sees half a
    file, and when two processes write at once the loser's entries are merely computed again some day.

    Args:
        paths: absolute paths or URIs; one that occurs twice is read once.
        cache_dir: folder on this node.
        progress: called in this thread with (files done, files in all) after each file that had to be read.

    Returns:
        Path to hexadecimal hash, in the order of `paths`.

    Raises:
        AdgridError: a file is missing or cannot be read.
    """
    paths = list(dict.fromkeys(paths))
    by_folder: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        by_folder[path.rpartition("/")[0]].append(path)
    memories = {folder: _read_memory(cache_dir, folder) for folder in by_folder}

    def look_up(path: str) -> tuple[int, int, str | None]:
        folder, _, name = path.rpartition("/")
        size, mtime_ns = stat_file(path)
        remembered = memories[folder].get(name)
        return size, mtime_ns, remembered[2] if remembered and remembered[:2] == (size, mtime_ns) else None

    hashes: dict[str, str] = {}
    fresh: dict[str, _Remembered] = defaultdict(dict)
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1)), thread_name_prefix="hash") as pool:
        # Far away, `stat` is worth asking for in parallel; nearby, the threads would cost more than they save.
        look_up_all = pool.map if any(is_uri(folder) for folder in by_folder) else map
        found = dict(zip(paths, look_up_all(look_up, paths), strict=True))
        stale = [path for path, (_, _, digest) in found.items() if digest is None]
        started_ns = time.time_ns()
        done = len(paths) - len(stale)
        for path, digest in zip(stale, pool.map(_hash_file, stale), strict=True):
            size, mtime_ns, _ = found[path]
            hashes[path] = digest
            if mtime_ns and started_ns - mtime_ns > _SETTLED_NS:
                folder, _, name = path.rpartition("/")
                fresh[folder][name] = (size, mtime_ns, digest)
            done += 1
            if progress is not None:
                progress(done, len(paths))
    for folder, entries in fresh.items():
        _write_memory(cache_dir, folder, _read_memory(cache_dir, folder) | entries)
    return {path: hashes.get(path) or found[path][2] or "" for path in paths}


def draw_shots(dataset_name: str, category: Category, shots: int | None, seed: int) -> tuple[Sample, ...]:
    """The normal training images of a k-shot run: the same for every method and backbone.

    Images are ranked by a hash of their name under the draw's seed and the first k taken, so a smaller draw is part
    of a larger one with the same seed, and no random generator's version matters.

    Args:
        dataset_name: name of the dataset as in the rows.
        category: the images to draw from.
        shots: how many, or None for all.
        seed: seed of the trial.

    Returns:
        The drawn images in the category's order.

    Raises:
        AdgridError: `shots` is not positive, or more than there are.
    """
    if shots is None:
        return category.train
    available = len(category.train)
    if not 1 <= shots <= available:
        raise AdgridError(
            f"cannot draw shots={shots} from category '{category.name}' of dataset '{dataset_name}', which has "
            f"{available} normal training images; choose shots from 1 to {available}, or null for all"
        )
    draw = derive_seed("shots", dataset_name, category.name, seed)
    ranked = sorted(category.train, key=lambda sample: derive_seed(draw, sample.sample_id, sample.view))
    drawn = {sample.path for sample in ranked[:shots]}
    return tuple(sample for sample in category.train if sample.path in drawn)


def _hash_file(path: str) -> str:
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise AdgridError(f"cannot read {path}: {error}; check its permissions or copy it again") from error


def _memory_path(cache_dir: str, folder: str) -> Path:
    return Path(cache_dir, "hashes", hashlib.sha256(folder.encode()).hexdigest()[:32] + ".json")


def _read_memory(cache_dir: str, folder: str) -> _Remembered:
    """What is remembered of a folder's files; a damaged memory is forgotten."""
    try:
        stored = json.loads(_memory_path(cache_dir, folder).read_bytes())
        return {name: (int(size), int(mtime), str(digest)) for name, (size, mtime, digest) in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_memory(cache_dir: str, folder: str, entries: _Remembered) -> None:
    """Replaces a folder's memory as a whole; a cache that cannot be written is done without."""
    path = _memory_path(cache_dir, folder)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp")
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"folder": folder, "files": entries}, file)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
