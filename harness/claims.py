"""Who works on what, where several runs share one store: claims that are kept fresh while their holder lives.

A claim spares two runs the same work at the same time. Nothing is wrong where one fails: work is done twice then, under
the same ids and with the same numbers. A holder that is killed keeps a claim for at most its time to live; on its own
machine it is missed at once. Clocks of machines are taken to agree within that time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from types import TracebackType

import psutil

from harness.store import Store, StoreError

BEATS = 4
"""How often a claim is renewed within its time to live."""
LOOK_SECONDS = 1.0
"""How long somebody who waits for a claim lets pass between two looks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record:
    """What a claim says."""

    owner: str
    host: str
    process: int
    born: float
    """When the process was started, in seconds since 1970: its number may be given to another one."""
    until: float
    """When the claim ends unless it is renewed, in seconds since 1970."""

    def is_live(self) -> bool:
        return time.time() < self.until and (self.host != socket.gethostname() or self._process_lives())

    def _process_lives(self) -> bool:
        try:
            return abs(psutil.Process(self.process).create_time() - self.born) < 1.0
        except psutil.Error:
            return False


class Claims:
    """The claims of one owner in a store."""

    def __init__(self, store: Store, owner: str, ttl: float = 60.0) -> None:
        """Args: where claims are kept; who asks, whom no claim of its own stops; seconds a silent claim lasts."""
        self._store, self._owner, self._ttl = store, owner, ttl

    def take(self, key: str) -> Claim | None:
        """The claim on `key`, kept fresh until it is released; None where somebody else holds it.

        Raises:
            StoreError: the store cannot be written.
        """
        found = self._read(key)
        if found is not None:
            if found.owner != self._owner and found.is_live():
                return None
            self._store.delete(_path(key))
        if not self._store.publish_new(_path(key), self._record()):
            return None
        # An object store lets both of two writers pass, and keeps the last.
        holder = self._read(key)
        return Claim(self, key) if holder is not None and holder.owner == self._owner else None

    def wait_for(self, key: str) -> Claim:
        """The claim on `key`, as soon as nobody else holds it."""
        while True:
            claim = self.take(key)
            if claim is not None:
                return claim
            time.sleep(LOOK_SECONDS)

    def held_by_others(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys on which somebody else has a live claim."""
        names = set(self._store.names("claims"))
        found = {key: self._read(key) for key in keys if _name(key) in names}
        return {
            key
            for key, record in found.items()
            if record is not None and record.owner != self._owner and record.is_live()
        }

    def renew(self, key: str) -> bool:
        """Lets a claim last its full time again; False where it is somebody else's by now."""
        found = self._read(key)
        if found is None or found.owner != self._owner:
            return False
        self._store.publish(_path(key), self._record())
        return True

    def release(self, key: str) -> None:
        """Gives a claim up, if it is still the owner's."""
        found = self._read(key)
        if found is not None and found.owner == self._owner:
            self._store.delete(_path(key))

    def _record(self) -> bytes:
        process = psutil.Process()
        record = _Record(
            owner=self._owner,
            host=socket.gethostname(),
            process=os.getpid(),
            born=process.create_time(),
            until=time.time() + self._ttl,
        )
        return json.dumps(dataclasses.asdict(record)).encode()

    def _read(self, key: str) -> _Record | None:
        try:
            return _Record(**json.loads(self._store.read(_path(key))))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # damaged, or of another version: nobody's
            return _Record(owner="", host="", process=0, born=0.0, until=0.0)

    @property
    def seconds_between_beats(self) -> float:
        """How often a claim is renewed."""
        return self._ttl / BEATS


class Claim:
    """A claim that is held; leaving its `with` block releases it."""

    def __init__(self, claims: Claims, key: str) -> None:
        self._claims, self._key = claims, key
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"claim {key}", daemon=True)
        self._heart.start()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Stops renewing the claim and gives it up."""
        self._released.set()
        self._heart.join()
        with contextlib.suppress(StoreError):  # it ends by itself
            self._claims.release(self._key)

    def _beat(self) -> None:
        while not self._released.wait(self._claims.seconds_between_beats):
            with contextlib.suppress(StoreError):  # the next beat may come through; if none does, others take over
                if not self._claims.renew(self._key):
                    return


def _name(key: str) -> str:
    return f"{key}.json"


def _path(key: str) -> str:
    return f"claims/{_name(key)}"
