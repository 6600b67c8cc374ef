"""Where a running stage keeps its state, so that a lost worker, node or driver costs at most the last minute."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import torch

from harness.store import Store
from harness.workers import ALONE, Workers


class StoredCheckpoints:
    """One checkpoint per stage in the run storage, replaced at once; whoever starts the stage again goes on from it."""

    def __init__(self, store: Store, artifact_id: str, workers: Workers = ALONE, every_seconds: float = 60.0) -> None:
        """Args: the storage; the artifact the stage becomes; its workers; least time between two checkpoints."""
        self._store, self._key = store, f"checkpoints/{artifact_id}.pt"
        self._workers, self._every = workers, every_seconds
        self._saved_at = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The newest state, on the processor; None where there is none."""
        # The leader reads and tells: a file that appears in between must not split the workers.
        data = None
        if self._workers.leads and self._store.exists(self._key):
            data = self._store.read(self._key)
        data = self._workers.agree(data)
        return None if data is None else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def save(self, make_state: Callable[[], dict[str, Any]], last: bool) -> None:
        """Keeps a state unless one was kept a moment ago, or the stage is done and its artifact follows."""
        if not self._workers.leads or last or time.monotonic() - self._saved_at < self._every:
            return
        buffer = io.BytesIO()
        torch.save(make_state(), buffer)
        self._store.publish(self._key, buffer.getvalue())
        self._saved_at = time.monotonic()

    def discard(self) -> None:
        """Removes the checkpoint: the finished artifact is saved."""
        if self._workers.leads:
            self._store.delete(self._key)
