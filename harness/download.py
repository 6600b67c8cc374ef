"""Files from the internet: the hub of published models, and plain addresses.

An address that cannot be reached is an error within seconds. A connection that breaks is taken up where it broke. A
file gets its name only when it is complete.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness.contracts import AdgridError

TIMEOUT_SECONDS = 15.0
"""Longest silence of a server."""
_CHUNK = 1 << 20

OnBytes = Callable[[int, int | None], None]
"""Told (bytes so far, bytes in all or None)."""


class _Dropped(Exception):
    """The connection ended before the file did."""


def published_hash(file_name: str) -> str | None:
    """The start of the SHA-256 that a published file carries in its name, as in `resnet18-5c106cde.pth`."""
    found = re.search(r"-([0-9a-f]{8,64})\.[a-z]+$", file_name)
    return found.group(1) if found else None


def download_url(url: str, target: Path, notify: OnBytes = lambda *_: None) -> None:
    """Fetches a file into `target`, which appears when it is complete.

    Args:
        url: an http or https address.
        target: where it goes; its folder exists.
        notify: told about progress.

    Raises:
        AdgridError: the address is no such file or cannot be reached, the connection broke again and again without a
            byte, or the disk is full.
    """
    partial = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.partial{target.suffix}")
    try:
        done = -1
        while True:
            before, done = done, partial.stat().st_size if partial.exists() else 0
            if done <= before:
                raise AdgridError(f"{url}: the connection broke {done} bytes into the file; run the command again")
            try:
                _receive(url, partial, done, notify)
                break
            except _Dropped:
                continue
        os.replace(partial, target)
    except urllib.error.HTTPError as error:
        raise AdgridError(f"{url}: the server says {error.code} {error.reason}; check the address") from error
    except (OSError, ValueError, http.client.HTTPException) as error:  # no such host, refused, silent, disk full, ...
        reason = getattr(error, "reason", error)
        raise AdgridError(f"{url} cannot be fetched into {target.parent}: {reason}; check network and disk") from error
    finally:
        partial.unlink(missing_ok=True)


def _receive(url: str, partial: Path, offset: int, notify: OnBytes) -> None:
    """Appends the rest of a file to what is there. Raises _Dropped when the connection ends too early."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if offset and response.status != 206:  # the server sends the whole file again
            offset = 0
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        with open(partial, "ab" if offset else "wb") as file:
            done = offset
            while True:
                try:
                    chunk = response.read(_CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _Dropped from error
                if not chunk:
                    break
                file.write(chunk)
                done += len(chunk)
                notify(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and done < total:
        raise _Dropped


def download_from_hub(
    repository: str, files: Sequence[str], revision: str | None, folder: Path | None = None
) -> tuple[str, str | None]:
    """Fetches the first of some files that a repository of the hub has.

    The hub's own client tries an unreachable server again for most of a minute, so the server is asked first.

    Args:
        repository: such as `timm/resnet18.tv_in1k`.
        files: names in the order of preference.
        revision: branch, tag or commit; None for the main branch.
        folder: put the file there, and take up a broken download there; None for the hub's cache.

    Returns:
        Path of the file, and the SHA-256 that the hub has for it (None for small files, which have another kind).

    Raises:
        AdgridError: the hub cannot be reached, has none of the files or does not give them.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    problem: Exception | None = None
    for file in files:
        try:
            address = huggingface_hub.hf_hub_url(repository, file, revision=revision)
            etag = huggingface_hub.get_hf_file_metadata(address, timeout=TIMEOUT_SECONDS).etag or ""
            placed: dict[str, Any] = {"local_dir": folder} if folder else {}
            path = huggingface_hub.hf_hub_download(repository, file, revision=revision, **placed)
            return str(path), etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
        except EntryNotFoundError as error:
            problem = error
        except Exception as error:  # what is raised depends on the network library below the client
            problem = error
            break
    told = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    raise AdgridError(f"{files[0]} of {repository} cannot be fetched from the hub: {told}; check network and access")
