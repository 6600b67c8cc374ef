"""Are the weights of backbones here, whole and the right ones; and bringing them to where there is no internet.

`check_weights` reads a file's names, shapes and hash. `fetch_weights` puts a file into a folder that a space names as
`weights: DIR`, with its hash beside it as `sha256sum` writes it, so that a copy of the folder can be checked as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Literal

from harness.backbones import (
    ResolvedBackbone,
    check_weights_fit,
    num_parameters,
    published_sources,
    published_stem,
    resolve_backbone,
)
from harness.contracts import AdgridError
from harness.download import OnBytes, published_hash
from harness.weights import WeightSource, weights_fingerprint

Verified = Literal["hash", "shapes", "nothing"]
HASH_SUFFIX = ".sha256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsCheck:
    """What is known of a backbone's weights on this machine."""

    name: str
    sources: tuple[str, ...]
    """Where they are published or were asked for, in the order in which they are looked for."""
    path: str | None
    """The file here; None when there is none, or none is needed."""
    num_bytes: int
    """Size of the file here; otherwise an estimate of the download, four bytes for each number of the architecture."""
    is_estimate: bool
    verified: Verified
    """What was compared with the network (shapes) and with the publisher's file (hash), and was right."""
    problem: str | None
    """What is wrong and what to do; None when the backbone can be used."""
    can_be_fetched: bool
    """Whether `fetch_weights` knows an address."""


def check_weights(name: str, weights: str = "auto", cache_dir: str | None = None) -> WeightsCheck:
    """Looks for the weights of a backbone and into them; uses no network.

    Args:
        name: a named backbone or any model of timm.
        weights: as in a search space: `auto`, a file, a folder, or `random`.
        cache_dir: where hashes of files are remembered.

    Raises:
        AdgridError: an unknown name; weights that are not here or do not fit are told in the answer.
    """
    sources = published_sources(name)  # raises for an unknown name
    path, problem = None, None
    verified: Verified = "nothing"
    try:
        resolved = resolve_backbone(name, weights, cache_dir)
        path = resolved.weights_path
        if path is not None:
            verified = _verify(resolved, sources)
    except AdgridError as error:
        problem = str(error)
    return WeightsCheck(
        name=name,
        sources=tuple(source.describe() for source in sources) if weights == "auto" else (weights,),
        path=path,
        num_bytes=4 * num_parameters(name) if path is None else os.path.getsize(path),
        is_estimate=path is None,
        verified=verified,
        problem=problem,
        can_be_fetched=any(source.kind != "package" for source in sources),
    )


def _verify(resolved: ResolvedBackbone, sources: tuple[WeightSource, ...], known_hash: str | None = None) -> Verified:
    """Raises AdgridError if the file is damaged or another one; the hash is compared where there is one."""
    check_weights_fit(resolved)
    known_hash = known_hash or known_hash_of(resolved, sources)
    if known_hash is None:
        return "shapes"
    found = weights_fingerprint(resolved)
    if not found.startswith(known_hash):
        raise AdgridError(
            f"weights {resolved.weights_path} of backbone {resolved.name!r} are damaged or not the published ones: "
            f"their SHA-256 is {found[:16]}..., not {known_hash[:16]}...; fetch or copy the file again"
        )
    return "hash"


def known_hash_of(resolved: ResolvedBackbone, sources: tuple[WeightSource, ...]) -> str | None:
    """The SHA-256 that a weight file should have, or the start of it, where it is known.

    It is in the file that `fetch_weights` writes beside it, in the name that the hub's cache gives to the contents, or
    in the published name, as in `resnet18-5c106cde.pth`; a file of the user's own may be called `run-20240101.pth`.

    Raises:
        AdgridError: the file beside it holds no hash.
    """
    path = Path(str(resolved.weights_path))
    beside = Path(f"{path}{HASH_SUFFIX}")
    if beside.is_file():
        words = beside.read_text(encoding="utf-8", errors="replace").split()
        if not words or not re.fullmatch("[0-9a-f]{64}", words[0]):
            raise AdgridError(f"{beside}: holds no SHA-256; remove it, or fetch the weights again")
        return words[0]
    target = path.resolve()
    if target.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", target.name):
        return target.name
    published = resolved.source == "package" or any(path.name in source.files for source in sources)
    return published_hash(path.name) if published else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """What `fetch_weights` did."""

    name: str
    path: str
    action: Literal["there already", "copied", "downloaded"]
    num_bytes: int
    replaced: str | None = None
    """What was wrong with the file that was there before."""


def fetch_weights(
    name: str, into: str | Path, weights: str = "auto", cache_dir: str | None = None, notify: OnBytes = lambda *_: None
) -> Fetched:
    """Puts the weights of a backbone into a folder, from this machine where they are here, otherwise from the internet.

    A complete file is left alone and a damaged one replaced. A file gets its name when it is whole and fits, so nodes
    that read the folder meanwhile see no half of it.

    Args:
        name: a named backbone or any model of timm.
        into: the folder; made if it is not there.
        weights: as in a search space; a path that exists is copied from.
        cache_dir: where hashes of files are remembered.
        notify: told (bytes so far, bytes in all or None) of downloads from plain addresses.

    Raises:
        AdgridError: an unknown name, weights that cannot be had, or a source that is damaged.
    """
    sources = published_sources(name)
    folder = Path(into).expanduser().absolute()
    replaced = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        present = check_weights(name, str(folder), cache_dir)
        if present.path is not None:
            if present.problem is None:
                return Fetched(name=name, path=present.path, action="there already", num_bytes=present.num_bytes)
            replaced = present.problem
        local = _find_local(name, weights, folder, cache_dir, sources)
        if isinstance(local, ResolvedBackbone):
            path = _copy(local, folder)
        else:
            path = _download(name, folder, sources, cache_dir, notify, local)
    except OSError as error:
        raise AdgridError(f"weights of backbone {name!r} cannot be put into {folder}: {error}; check --into") from error
    if present.path is not None and present.path != str(path):
        for stale in (present.path, present.path + HASH_SUFFIX):
            Path(stale).unlink(missing_ok=True)
    return Fetched(
        name=name,
        path=str(path),
        action="copied" if isinstance(local, ResolvedBackbone) else "downloaded",
        num_bytes=path.stat().st_size,
        replaced=replaced,
    )


def _find_local(
    name: str, weights: str, folder: Path, cache_dir: str | None, sources: tuple[WeightSource, ...]
) -> ResolvedBackbone | list[str]:
    """The weights on this machine, checked; or, when they must be downloaded, what is wrong with those that are here.

    Raises:
        AdgridError: a file that the user named is not there or unfit.
    """
    asked = Path(weights).expanduser().absolute()
    if weights not in ("auto", "random") and asked != folder:
        resolved = resolve_backbone(name, weights, cache_dir)
        _verify(resolved, sources)
        return resolved
    problems = []
    if any(source.path for source in sources):
        try:
            resolved = resolve_backbone(name, "auto", cache_dir)
            _verify(resolved, sources)
            return resolved
        except AdgridError as error:
            problems.append(str(error))
    return problems


def _copy(source: ResolvedBackbone, folder: Path) -> Path:
    path = Path(str(source.weights_path))
    stem = source.name if source.source == "file" else published_stem(source.name)
    partial = _partial(folder, stem, path.suffix)
    try:
        shutil.copyfile(path, partial)
        if _hash(partial) != weights_fingerprint(source):
            raise AdgridError(f"{path} changed while it was copied into {folder}; run the command again")
        return _put_in_place(partial, folder / f"{stem}{path.suffix}")
    finally:
        partial.unlink(missing_ok=True)


def _download(
    name: str,
    folder: Path,
    sources: tuple[WeightSource, ...],
    cache_dir: str | None,
    notify: OnBytes,
    problems: list[str],
) -> Path:
    if not sources:
        resolve_backbone(name, "auto", cache_dir)  # says that nobody has published any
    problems = list(problems)
    for source in sources:
        # The hub's client takes up a broken download in the folder that it was begun in.
        work = folder / f".fetching-{name}"
        try:
            path, known_hash = source.download(work, notify)
            resolved = resolve_backbone(name, path, cache_dir)
            try:
                _verify(dataclasses.replace(resolved, cache_dir=None), sources, known_hash)
            except AdgridError:
                shutil.rmtree(work, ignore_errors=True)  # a damaged file must not be taken up again
                raise
            final = _put_in_place(Path(path), folder / f"{published_stem(name)}{Path(path).suffix}")
        except AdgridError as error:
            problems.append(str(error))
            if work.is_dir() and not any(work.iterdir()):
                work.rmdir()
        else:
            shutil.rmtree(work, ignore_errors=True)
            return final
    raise AdgridError(
        f"weights of backbone {name!r} cannot be fetched: {'; '.join(problems)}; put a file called "
        f"{published_stem(name)}.safetensors or .pth into {folder} by hand, or run this where there is internet"
    )


def _partial(folder: Path, stem: str, suffix: str) -> Path:
    return folder / f".{stem}.{uuid.uuid4().hex[:8]}.partial{suffix}"


def _put_in_place(partial: Path, final: Path) -> Path:
    """Gives a whole file its name, its hash first: what stops in between is found to be damaged, not trusted."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    digest = _hash(partial)
    beside = _partial(final.parent, final.stem, HASH_SUFFIX)
    beside.write_text(f"{digest}  {final.name}\n", encoding="utf-8")
    os.replace(beside, str(final) + HASH_SUFFIX)
    os.replace(partial, final)
    return final


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
