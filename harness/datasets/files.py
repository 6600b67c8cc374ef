"""Listing, opening and dating the files of a dataset: in a local folder, or at a URI.

Local paths go straight to the operating system. Anything with a scheme (`s3://bucket/data`, `gs://...`) is opened by
pyarrow.fs, and by fsspec for the schemes that pyarrow does not know itself.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from harness.contracts import AdgridError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
"""Extensions that count as images, in lower case; files are matched whatever their case."""

_CLUTTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file or folder inside a folder."""

    name: str
    is_folder: bool
    """Links are followed; a link that leads nowhere or to itself counts as a file, so that reading it says so."""

    @property
    def is_image(self) -> bool:
        """Whether the name ends like an image; says nothing about the content."""
        return not self.is_folder and os.path.splitext(self.name)[1].lower() in IMAGE_EXTENSIONS


def is_uri(path: str) -> bool:
    """Whether a path names a scheme, such as `s3://bucket/data`."""
    return "://" in path


def resolve_path(path: str) -> str:
    """Absolute form of what a user wrote: `~` expanded, `file://` made local, no slash at the end; links are kept.

    Raises:
        AdgridError: a URI with options, which could not be told from the names of files below it.
    """
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    if is_uri(path):
        if "?" in path:
            raise AdgridError(
                f"{path}: a URI of data takes no options after '?'; set them where pyarrow finds them, such as the "
                "endpoint in AWS_ENDPOINT_URL"
            )
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is clutter of an operating system: `.DS_Store`, `._000.png`, `Thumbs.db`, `__MACOSX`."""
    return name.startswith(".") or name.lower() in _CLUTTER


def list_folder(path: str) -> list[Entry]:
    """Files and folders in a folder, sorted by name, without hidden ones; empty when there is no such folder.

    Raises:
        AdgridError: the folder exists but may not be listed.
    """
    try:
        entries = _list_uri(path) if is_uri(path) else _list_local(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise AdgridError(
            f"cannot list the folder {path}: {error}; check its permissions and the connection"
        ) from error
    return sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)


def list_images(path: str) -> list[str]:
    """Names of the images in a folder, sorted; empty when there is no such folder."""
    return [entry.name for entry in list_folder(path) if entry.is_image]


def list_folders(path: str) -> list[str]:
    """Names of the folders in a folder, sorted; empty when there is no such folder."""
    return [entry.name for entry in list_folder(path) if entry.is_folder]


def is_folder(path: str) -> bool:
    """Whether a folder is there; for an object store, whether anything lies under the prefix."""
    if not is_uri(path):
        return os.path.isdir(path)
    from pyarrow.fs import FileType

    filesystem, inner = _open_filesystem(path)
    return bool(filesystem.get_file_info(inner).type == FileType.Directory)


def open_file(path: str) -> IO[bytes]:
    """Opens a file for reading; one at a URI is read whole. Raises OSError."""
    if not is_uri(path):
        return open(path, "rb")
    filesystem, inner = _open_filesystem(path)
    with filesystem.open_input_file(inner) as stream:
        return io.BytesIO(stream.read())


def stat_file(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns of a file (0 where a store keeps no time).

    Raises:
        AdgridError: the file is not there.
    """
    if is_uri(path):
        return _stat_uri(path)
    try:
        found = os.stat(path)
    except OSError as error:
        raise AdgridError(f"cannot read {path}: {error.strerror}; copy the file again from its source") from error
    return found.st_size, found.st_mtime_ns


def _list_local(path: str) -> list[Entry]:
    with os.scandir(path) as entries:
        return [Entry(name=entry.name, is_folder=_leads_to_folder(entry)) for entry in entries]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle; one of them must not hide the whole folder
        return False


def _list_uri(path: str) -> list[Entry]:
    from pyarrow.fs import FileSelector, FileType

    filesystem, inner = _open_filesystem(path)
    infos = filesystem.get_file_info(FileSelector(inner, allow_not_found=True))
    return [Entry(name=info.base_name, is_folder=info.type == FileType.Directory) for info in infos]


def _stat_uri(path: str) -> tuple[int, int]:
    from pyarrow.fs import FileType

    filesystem, inner = _open_filesystem(path)
    info = filesystem.get_file_info(inner)
    if info.type != FileType.File:
        raise AdgridError(f"cannot read {path}: no such file; copy the file again from its source")
    return info.size, info.mtime_ns or 0


def _open_filesystem(uri: str) -> tuple[FileSystem, str]:
    """The file system of a URI and the path inside it."""
    scheme, rest = uri.split("://", 1)
    authority, _, tail = rest.partition("/")
    filesystem, prefix = _connect(scheme, authority)
    return filesystem, f"{prefix.rstrip('/')}/{tail}" if tail else prefix


@lru_cache(maxsize=16)
def _connect(scheme: str, authority: str) -> tuple[FileSystem, str]:
    """One connection per bucket or host, shared by all its files, and the path of its top folder."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    address = f"{scheme}://{authority}"
    try:
        return FileSystem.from_uri(address)
    except pa.ArrowInvalid:
        pass  # a scheme that pyarrow does not know; fsspec may
    except OSError as error:
        raise AdgridError(f"cannot open {address}: {error}; check the name, the network and the credentials") from error
    import fsspec

    try:
        filesystem, prefix = fsspec.core.url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise AdgridError(f"cannot open {address}: {error}; use a local path or a URI that pyarrow.fs opens") from error
    return PyFileSystem(FSSpecHandler(filesystem)), prefix
