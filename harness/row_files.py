"""Rows as Parquet files and as messages, and back; what many rows have in common is kept once."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from harness.contracts import ResultRow

SEGMENT_GROUP = 256
"""Rows of a file that are read together; those of one trial lie side by side."""
_JSON_FIELDS = (
    "params", "protocol", "resolved_protocol", "metrics", "metric_bounds", "costs", "curves", "provenance", "tuned"
)  # fmt: skip
_ALIKE = ("params", "protocol", "resolved_protocol", "metric_bounds", "tuned")
"""Those of which few different ones come."""
_LISTS = ("layers", "stamps")


def row_to_text(row: ResultRow) -> str:
    """A row as JSON, complete."""
    return json.dumps(_record(row))


def row_from_text(text: str) -> ResultRow:
    """The row of `row_to_text`."""
    return _row(json.loads(text))


def rows_to_parquet(rows: Sequence[ResultRow]) -> bytes:
    """Rows as the bytes of a Parquet file, complete."""
    schema = _schema()
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        for start in range(0, max(len(rows), 1), SEGMENT_GROUP):
            records = [_record(row) for row in rows[start : start + SEGMENT_GROUP]]
            writer.write_table(pa.Table.from_pylist(records, schema=schema))
    return sink.getvalue()


def rows_from_parquet(data: bytes, wanted: set[str] | None = None) -> list[ResultRow]:
    """The rows of `rows_to_parquet`, or those of the cells `wanted`."""
    file = pq.ParquetFile(pa.BufferReader(data))
    return [_row(record) for table in _read_groups(file, wanted) for record in table.to_pylist()]


def fold_parquet(files: Iterable[bytes]) -> tuple[bytes, int]:
    """Many files of `rows_to_parquet` as one, whose rows of a trial lie side by side; and how many rows they are."""
    tables, few = [], []
    for data in files:
        few.append(pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False))
        if len(few) == SEGMENT_GROUP:  # a table of one row takes as much room as one of a hundred
            tables.append(_join(few))
            few = []
    table = _join([*tables, *few]) if tables or few else _schema().empty_table()
    order = pc.sort_indices(table, [("trial_id", "ascending"), ("cell_id", "ascending")])
    return table_to_parquet(table.take(order), SEGMENT_GROUP), table.num_rows


def _join(tables: Sequence[pa.Table]) -> pa.Table:
    # Rows of earlier versions lack a column.
    return pa.concat_tables(tables, promote_options="default").combine_chunks()


def table_to_parquet(table: pa.Table, group: int | None = None) -> bytes:
    """The bytes of a Parquet file, whose readers may read `group` rows alone."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group)
    return sink.getvalue()


def _record(row: ResultRow) -> dict[str, Any]:
    """A row by columns: whatever has parts of its own is text."""
    record = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    record |= {name: json.dumps(dict(record[name]), sort_keys=True) for name in _JSON_FIELDS}
    return record | {name: list(record[name]) for name in _LISTS}


def _row(record: Mapping[str, Any]) -> ResultRow:
    parts = {name: _parse(name, record.get(name) or "{}") for name in _JSON_FIELDS}
    return ResultRow(**{**record, **parts, **{name: tuple(record[name]) for name in _LISTS}})


def _parse(name: str, text: str) -> Mapping[str, Any]:
    # Ten thousand rows would hold the same words ten thousand times.
    if name in _ALIKE:
        return _parse_alike(text)
    return {
        sys.intern(key): sys.intern(value) if isinstance(value, str) else value
        for key, value in json.loads(text).items()
    }


@functools.lru_cache(maxsize=4096)
def _parse_alike(text: str) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def _read_groups(file: pq.ParquetFile, wanted: set[str] | None) -> Iterator[pa.Table]:
    """All rows group by group, or those of some cells, of which no other group of rows is unpacked."""
    if wanted is None:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, use_threads=False)
        return
    ids, start = file.read(columns=["cell_id"], use_threads=False)["cell_id"].to_pylist(), 0
    chosen = pa.array(sorted(wanted), pa.string())
    for number in range(file.num_row_groups):
        stop = start + file.metadata.row_group(number).num_rows
        if not wanted.isdisjoint(ids[start:stop]):
            table = file.read_row_group(number, use_threads=False)
            yield table.filter(pc.is_in(table["cell_id"], chosen))
        start = stop


def _schema() -> pa.Schema:
    return pa.schema([(field.name, _row_type(field.name)) for field in dataclasses.fields(ResultRow)])


def _row_type(name: str) -> pa.DataType:
    if name in _LISTS:
        return pa.list_(pa.string())
    return pa.int64() if name in ("shots", "seed") else pa.string()
