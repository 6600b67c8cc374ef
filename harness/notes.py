"""What one trial tells whoever listens: its rows, notes of progress now and then, and every loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from harness.contracts import ResultRow
from harness.row_files import row_from_text, row_to_text

NOTE_SECONDS = 1.0
"""Least time between two notes of progress from one trial."""


class Loss(NamedTuple):
    """The mean loss of an epoch, as a point of a curve."""

    categories: tuple[str, ...]
    """Whose images are trained on."""
    stage: str
    epoch: int
    """From 1."""
    value: float


class Notify(Protocol):
    """Told about progress inside a cell."""

    def __call__(self, category: str, what: str, done: int, total: int, loss: Loss | None = None, /) -> None:
        """What is being done for a category, and how far; after an epoch of training, its loss."""


class Notes:
    """A `Notify` that tells at most one note a second and forgets no loss but those after the last note, whose curve
    comes with the row."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Args: told `{"note": [category, what, done, total], "losses": [fields of a Loss, ...]}`."""
        self._tell, self._last, self._losses = tell, 0.0, list[Loss]()

    def __call__(self, category: str, what: str, done: int, total: int, loss: Loss | None = None, /) -> None:
        if loss is not None:
            self._losses.append(loss)
        if time.monotonic() - self._last >= NOTE_SECONDS:
            self._last = time.monotonic()
            self._tell({"note": [category, what, done, total], "losses": self._losses})
            self._losses = []


def row_message(row: ResultRow) -> dict[str, Any]:
    """`{"row": ...}`, which says nothing to Ray Tune: of every number that it can read it would keep statistics."""
    return {"row": row_to_text(row)}


def read_row(message: Mapping[str, Any]) -> ResultRow:
    """The row in a message that has one."""
    return row_from_text(message["row"])


def read_losses(message: Sequence[Sequence[Any]]) -> list[Loss]:
    """The losses of a message; on their way they may have become plain lists."""
    return [Loss(tuple(categories), stage, epoch, value) for categories, stage, epoch, value in message]
