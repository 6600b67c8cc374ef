"""The one door to storage: rows, predictions, artifacts, run folders.

A store is a folder or a URI that `pyarrow.fs` opens. Everything in it is content-addressed or replaced as a whole, so
publishing twice is harmless and a reader never sees half a file.

    rows/new/<cell_id>.<status>.parquet      one row each, the moment it exists
    rows/segments/<hash>.parquet             many rows folded together by the driver
    predictions/<prediction_id>.arrow        anomaly maps in three bytes a value, and image scores
    scores/<cell_id>.parquet                 per image: label, defect type, final image score
    details/<cell_id>.json                   curves and small pictures, for the HTML report
    artifacts/<id>.safetensors               trained stages and fitted methods, tensors only
    attempts/<run>/<cell_id>.<n>             a cell was started for the n-th time (finds cells that kill workers)
    claims/<key>.json                        somebody works on a cell right now, see `harness.claims`
    runs/<run_id>/...                        the space, its plan and its reports
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from harness.contracts import AdgridError, ResultRow, RowStatus, Trainable
from harness.quantisation import MapError, QuantisedMaps
from harness.row_files import fold_parquet, rows_from_parquet, rows_to_parquet, table_to_parquet

if TYPE_CHECKING:
    from torch import Tensor

FEW_CELLS = 64
"""For fewer cells than this their rows are looked for one by one, instead of listing all there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredPrediction:
    """Scores of the test images of one cell as the method gave them, maps rounded as they are kept."""

    paths: tuple[str, ...]
    """Absolute paths on the machine that predicted; the order is the category's test order."""
    maps: QuantisedMaps
    """(N, h, w), higher = more anomalous."""
    image_scores: np.ndarray | None
    """(N,) float32, or None where the harness reduces the map."""
    facts: Mapping[str, Any]
    """Costs and provenance of fitting and predicting, for rows that are scored from here later."""

    @property
    def anomaly_maps(self) -> np.ndarray:
        """(N, h, w) float32."""
        return self.maps.restored


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTraining:
    """How the training of an artifact went."""

    curves: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    """A number for every epoch: the mean loss under the stage's name, what else it watched under `stage.name`."""
    warnings: Sequence[str] = ()
    """What a reader of the results must be told."""

    @classmethod
    def of(cls, stage: Trainable, losses: Sequence[float]) -> StoredTraining:
        """The training of a stage that is trained."""
        watched = {f"{stage.name}.{name}": list(values) for name, values in stage.watched.items()}
        return cls(curves={stage.name: list(losses), **watched}, warnings=list(stage.warnings))


class StoreError(AdgridError):
    """The storage fails while a run is under way: full, read-only, gone. What was saved before is safe."""

    exit_code = 1


class Store:
    """Reads and writes one storage root. Every method raises StoreError where the storage itself fails."""

    def __init__(self, root: str) -> None:
        """Opens `root`, a path or URI, and makes it if need be. Raises AdgridError if it cannot be opened."""
        try:
            if re.match(r"^[a-z][a-z0-9+.-]+://", root):
                self._fs, self._base = pyarrow.fs.FileSystem.from_uri(root)
            else:
                self._fs, self._base = pyarrow.fs.LocalFileSystem(), str(Path(root).expanduser().resolve())
            self._fs.create_dir(self._base, recursive=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise AdgridError(
                f"--root {root}: cannot be opened or made ({error}); name a writable folder or URI"
            ) from error
        self.root = root if "://" in root else self._base
        self.is_local = isinstance(self._fs, pyarrow.fs.LocalFileSystem)

    # --- bytes under keys ---

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}"

    def on_object_store(self, key: str) -> tuple[pyarrow.fs.FileSystem, str] | None:
        """The file system of a root that is none of this machine's, and the path of `key` on it; else None."""
        return None if self.is_local else (self._fs, self._path(key))

    def local_path(self, key: str) -> Path | None:
        """Where `key` lies on this machine's file system, or None on an object store."""
        return Path(self._path(key)) if self.is_local else None

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        """Tells what the storage complains of as one error that says what is safe and what to do."""
        try:
            yield
        except OSError as error:
            if what == "read" and isinstance(error, FileNotFoundError):
                raise  # an answer, not a failure
            raise StoreError(
                f"--root {self.root}: cannot be {what} ({error}); every row saved so far is safe: make room or mend "
                f"the storage, and the same command goes on from there"
            ) from error

    def publish(self, key: str, data: bytes, lasting: bool = True) -> None:
        """Writes a whole object under its final key at once; a reader sees the old bytes or the new, never a part.

        What need not outlast a power cut is not waited for (`lasting=False`); that of a killed process stays.
        """
        with self.told("written"):
            self._put(key, data, os.replace, lasting)

    def publish_new(self, key: str, data: bytes) -> bool:
        """Publishes unless something is there, and says whether it did; of several that try at once one succeeds.

        On an object store more than one may, and the last one's bytes stay.
        """
        with self.told("written"):
            try:
                if not self.is_local and self.exists(key):
                    return False
                self._put(key, data, _link, lasting=False)
            except FileExistsError:
                return False
        return True

    def _put(self, key: str, data: bytes, move: Callable[[Path, Path], None], lasting: bool) -> None:
        path = self._path(key)
        if not self.is_local:
            with self._fs.open_output_stream(path) as stream:
                stream.write(data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                if lasting:
                    file.flush()
                    os.fsync(file.fileno())
            move(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, key: str) -> bytes:
        """The bytes under `key`. Raises FileNotFoundError if there are none."""
        with self.told("read"), self._fs.open_input_stream(self._path(key)) as stream:
            return stream.read()

    def exists(self, key: str) -> bool:
        """Whether something was published under `key`."""
        with self.told("read"):
            return self._fs.get_file_info(self._path(key)).type == pyarrow.fs.FileType.File

    def names(self, prefix: str) -> list[str]:
        """Names of the files right below the folder `prefix`, sorted; temporary files are left out."""
        selector = pyarrow.fs.FileSelector(self._path(prefix), allow_not_found=True)
        with self.told("read"):
            found = self._fs.get_file_info(selector)
        files = (info.base_name for info in found if info.type == pyarrow.fs.FileType.File)
        return sorted(name for name in files if not name.startswith("."))

    def folders(self, prefix: str) -> list[str]:
        """Names of the folders right below the folder `prefix`, sorted."""
        selector = pyarrow.fs.FileSelector(self._path(prefix), allow_not_found=True)
        with self.told("read"):
            found = self._fs.get_file_info(selector)
        return sorted(info.base_name for info in found if info.type == pyarrow.fs.FileType.Directory)

    def delete(self, key: str) -> None:
        """Removes `key` if it is there."""
        with self.told("written"), contextlib.suppress(FileNotFoundError):
            self._fs.delete_file(self._path(key))

    # --- rows ---

    def publish_row(self, row: ResultRow) -> None:
        """Saves a row now. A row of another status never overwrites it: `load_rows` decides which one counts."""
        self.publish(f"rows/new/{row.cell_id}.{row.status}.parquet", rows_to_parquet([row]))

    def load_rows(self, cell_ids: Iterable[str] | None = None) -> dict[str, ResultRow]:
        """The row that counts for each cell: a finished one before a stopped, failed or skipped one, then the newest.

        Args:
            cell_ids: only these cells; None for all in the store.
        """
        wanted = None if cell_ids is None else set(cell_ids)
        found: dict[str, ResultRow] = {}
        if wanted is not None and not wanted:
            return found
        for row in self.all_rows(wanted):
            known = found.get(row.cell_id)
            if known is None or _row_rank(row) >= _row_rank(known):
                found[row.cell_id] = row
        return found

    def all_rows(self, wanted: set[str] | None = None) -> Iterator[ResultRow]:
        """Every row that was ever saved, of some cells or of all; `load_rows` says which count."""
        # Singles first: folding publishes the segment before it deletes singles, so no row is missed in between.
        if wanted is not None and len(wanted) <= FEW_CELLS:
            # A trial asks for its own cells alone, while those of all others lie in the same folder.
            names = [f"{cell_id}.{status}.parquet" for cell_id in sorted(wanted) for status in get_args(RowStatus)]
            names = [name for name in names if self.exists(f"rows/new/{name}")]
        else:
            names = [name for name in self.names("rows/new") if wanted is None or name.split(".", 1)[0] in wanted]
        for data in self._read_each("rows/new", names):
            yield from rows_from_parquet(data)
        for data in self._read_each("rows/segments", self.names("rows/segments")):
            yield from rows_from_parquet(data, wanted)

    def _read_each(self, folder: str, names: Sequence[str]) -> Iterator[bytes]:
        """The files of a folder one at a time, but for those that somebody has removed meanwhile."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                yield self.read(f"{folder}/{name}")

    def segments(self) -> list[str]:
        """The segment files as they are now, for `finished_since`."""
        return self.names("rows/segments")

    def finished_since(self, cell_ids: Iterable[str], segments: Sequence[str]) -> set[str]:
        """Which of some cells have a finished row by now, that had none when the segment files were `segments`."""
        wanted = set(cell_ids)
        found = {cell_id for cell_id in wanted if self.exists(f"rows/new/{cell_id}.ok.parquet")}
        if found != wanted and self.segments() != segments:  # somebody has folded rows meanwhile
            rows = self.load_rows(wanted - found)
            found |= {cell_id for cell_id, row in rows.items() if row.status == "ok"}
        return found

    def fold_rows(self, at_least: int = 64) -> int:
        """Folds the single rows into one segment file and returns how many; does nothing for fewer than `at_least`."""
        names = self.names("rows/new")
        if len(names) < at_least:
            return 0
        data, number = fold_parquet(self._read_each("rows/new", names))
        if not number:
            return 0
        self.publish(f"rows/segments/{hashlib.sha256(data).hexdigest()[:32]}.parquet", data)
        for name in names:
            self.delete(f"rows/new/{name}")
        return number

    # --- predictions and scores ---

    def publish_prediction(self, prediction_id: str, prediction: StoredPrediction) -> None:
        """Saves predictions; they come back bit for bit."""
        maps, scores = prediction.maps, prediction.image_scores
        facts = {
            "shape": maps.values.shape[1:],
            "offset": maps.offset,
            "step": maps.step,
            "error": dataclasses.asdict(maps.scaled_error),
            "facts": dict(prediction.facts),
        }
        table = pa.table(
            {
                "path": pa.array(prediction.paths, pa.string()),
                "image_score": pa.array([None] * len(maps.values) if scores is None else scores, pa.float32()),
                "value": pa.array([row.tobytes() for row in maps.values], pa.binary()),
                "remainder": pa.array([row.tobytes() for row in maps.remainder], pa.binary()),
            },
            metadata={name: json.dumps(value) for name, value in facts.items()},
        )
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        self.publish(f"predictions/{prediction_id}.arrow", sink.getvalue())

    def load_prediction(self, prediction_id: str) -> StoredPrediction | None:
        """Stored predictions, or None where they were not kept or cannot be read; they count as just used."""
        key = f"predictions/{prediction_id}.arrow"
        try:
            table = pa.ipc.open_file(pa.BufferReader(self.read(key))).read_all()
            told = {name.decode(): json.loads(value) for name, value in (table.schema.metadata or {}).items()}
            shape, offset, step, error = (told[name] for name in ("shape", "offset", "step", "error"))
        except (FileNotFoundError, pa.ArrowInvalid, KeyError):  # the last: kept by an earlier version
            return None
        if self.is_local:
            with contextlib.suppress(OSError):
                os.utime(self._path(key))
        scores = table["image_score"]
        maps = QuantisedMaps(
            _stack(table["value"], np.float16, shape),
            _stack(table["remainder"], np.int8, shape),
            offset,
            step,
            MapError(**error),
        )
        return StoredPrediction(
            paths=tuple(table["path"].to_pylist()),
            maps=maps,
            image_scores=None if scores.null_count else scores.to_numpy(),
            facts=told["facts"],
        )

    def trim_predictions(self, most_bytes: float) -> int:
        """Removes the predictions that were not used for longest until the others fit; returns how many.

        An object store does not know when an object was read: there those go that were written first.
        """
        selector = pyarrow.fs.FileSelector(self._path("predictions"), allow_not_found=True)
        files = [info for info in self._fs.get_file_info(selector) if info.base_name.endswith(".arrow")]
        room, removed = most_bytes, 0
        for info in sorted(files, key=lambda info: info.mtime_ns or 0, reverse=True):
            room -= info.size
            if room < 0:
                self.delete(f"predictions/{info.base_name}")
                removed += 1
        return removed

    def publish_scores(self, cell_id: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Saves the per-image outcome of a cell; see `harness.evaluate.score_columns`."""
        self.publish(f"scores/{cell_id}.parquet", table_to_parquet(pa.table(dict(columns))))

    def load_scores(self, cell_id: str) -> dict[str, list[Any]] | None:
        """The columns of `publish_scores`, or None."""
        try:
            # Threads of its own would cost more than reading so small a file.
            data = pa.BufferReader(self.read(f"scores/{cell_id}.parquet"))
            return pq.ParquetFile(data).read(use_threads=False).to_pydict()
        except FileNotFoundError:
            return None

    # --- artifacts ---

    def publish_state(self, artifact_id: str, state: Mapping[str, Tensor]) -> None:
        """Saves tensors as safetensors."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        self.publish(f"artifacts/{artifact_id}.safetensors", save(tensors))

    def has_state(self, artifact_id: str) -> bool:
        """Whether an artifact is there."""
        return self.exists(f"artifacts/{artifact_id}.safetensors")

    def publish_failure(self, artifact_id: str, invocation: str, reason: str) -> None:
        """Notes why an artifact could not be made, and in which start of the program."""
        self.publish(f"artifacts/{artifact_id}.failed.json", json.dumps([invocation, reason]).encode())

    def load_failure(self, artifact_id: str) -> tuple[str, str] | None:
        """(invocation, reason) of the last `publish_failure`, or None."""
        try:
            invocation, reason = json.loads(self.read(f"artifacts/{artifact_id}.failed.json"))
        except FileNotFoundError:
            return None
        return invocation, reason

    def load_state(self, artifact_id: str) -> dict[str, Tensor] | None:
        """The tensors of an artifact, or None."""
        from safetensors.torch import load

        try:
            return load(self.read(f"artifacts/{artifact_id}.safetensors"))
        except FileNotFoundError:
            return None

    def publish_training(self, artifact_id: str, training: StoredTraining) -> None:
        """Saves how the training of an artifact went."""
        self.publish(f"artifacts/{artifact_id}.training.json", json.dumps(dataclasses.asdict(training)).encode())

    def load_training(self, artifact_id: str) -> StoredTraining:
        """What `publish_training` saved; nothing where there is none."""
        try:
            return StoredTraining(**json.loads(self.read(f"artifacts/{artifact_id}.training.json")))
        except FileNotFoundError:
            return StoredTraining()

    # --- attempts ---

    def count_attempt(self, run_token: str, cell_id: str) -> int:
        """Notes that a cell is being started and returns which attempt of this run it is, from 1."""
        attempt = 1
        while self.exists(f"attempts/{run_token}/{cell_id}.{attempt}"):
            attempt += 1
        self.publish(f"attempts/{run_token}/{cell_id}.{attempt}", b"", lasting=False)
        return attempt

    def forget_attempts(self, run_token: str) -> None:
        """Removes the notes of a run that has ended."""
        self.delete_folder(f"attempts/{run_token}")

    def delete_folder(self, prefix: str) -> None:
        """Removes everything below `prefix`, if there is anything."""
        with self.told("written"), contextlib.suppress(FileNotFoundError):
            self._fs.delete_dir(self._path(prefix))


def join_root(root: str, *parts: str) -> str:
    """The path or URI of a folder below a root; the options of a URI (`?endpoint_override=...`) stay at its end."""
    address, mark, query = root.partition("?") if "://" in root else (root, "", "")
    return "/".join([address.rstrip("/"), *parts]) + mark + query


def split_run(word: str) -> tuple[str | None, str]:
    """The root in the address of a run's folder (`results/runs/NAME`), or None for a bare name; and the run's name."""
    address, mark, query = word.partition("?") if "://" in word else (word, "", "")
    root, marker, name = address.rstrip("/").rpartition("/runs/")
    return (root + mark + query if marker else None), name


def _link(temporary: Path, target: Path) -> None:
    """Gives a file a second name, which nothing may have. Raises FileExistsError."""
    try:
        os.link(temporary, target)
    except PermissionError:  # a file system without links: as good as an object store
        if target.exists():
            raise FileExistsError(str(target)) from None
        os.replace(temporary, target)


def _row_rank(row: ResultRow) -> tuple[int, str]:
    # Failed, skipped and stopped rows replace one another by age; only a finished row outranks a newer one.
    return (row.status == "ok", row.provenance.get("finished_at", ""))


def _stack(column: pa.ChunkedArray, kind: type, shape: Sequence[int]) -> np.ndarray:
    """(N, *shape) array of binary values."""
    rows: list[np.ndarray] = [np.frombuffer(row.as_buffer(), dtype=kind).reshape(shape) for row in column]
    return np.stack(rows) if rows else np.zeros((0, *shape), kind)
