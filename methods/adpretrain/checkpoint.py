"""Projector checkpoints in the layout of ADPretrain's official code, and from the state of a trained stage."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.contracts import AdgridError
from methods.adpretrain.projector import Projector

FIELD = "projectors"
METRICS = ("img_auc", "pix_auc", "pix_pro")
_NUMPY_SCALARS: list[Any] = [
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
]
"""The official code saves its metrics as numbers of numpy, whose types torch must be told to trust."""


def load_checkpoint(path: str | os.PathLike[str]) -> Projector:
    """A projector from a file of the official code or of `export_checkpoint`; nothing in the file is executed.

    Widths and number of references are those of the file. Weights in bfloat16, as the official code trains them,
    become float32.

    Args:
        path: of the file.

    Raises:
        AdgridError: the file cannot be read, or does not hold a projector; names keys and shapes that do not fit.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AdgridError(f"checkpoint {path}: no such file; give the path of a projector of ADPretrain") from None
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise AdgridError(
            f"checkpoint {path} cannot be read as tensors alone ({type(error).__name__}: {reason}); "
            "give a file written by torch.save that holds a projector of ADPretrain"
        ) from error
    if not isinstance(content, Mapping) or not isinstance(content.get(FIELD), Mapping):
        found = ", ".join(sorted(map(str, content))) if isinstance(content, Mapping) else type(content).__name__
        raise AdgridError(
            f"checkpoint {path}: field {FIELD!r} is missing, found {found or 'nothing'}; "
            "give a checkpoint of ADPretrain's projector"
        )
    return projector_from_state(content[FIELD], f"checkpoint {path}, field {FIELD!r}")


def export_checkpoint(
    projector: Projector,
    path: str | os.PathLike[str],
    *,
    img_auc: float = math.nan,
    pix_auc: float = math.nan,
    pix_pro: float = math.nan,
) -> None:
    """Writes a projector in the layout of the official code.

    Args:
        projector: on any device; written in float32.
        path: of the file, which appears only once it is complete.
        img_auc: image AUROC in [0, 1] to note in the file; NaN where it was not measured.
        pix_auc: pixel AUROC, likewise.
        pix_pro: AUPRO, likewise.
    """
    state = {key: value.detach().cpu().float() for key, value in projector.state_dict().items()}
    target = Path(path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        torch.save({FIELD: state, **dict(zip(METRICS, (img_auc, pix_auc, pix_pro), strict=True))}, unfinished)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def projector_from_state(state: Mapping[str, Any], where: str) -> Projector:
    """A projector from its state dict, or from that of the stage that trained it; in evaluation mode.

    Args:
        state: keys as in the official code; the centre of a stage is left out.
        where: begins the error message.

    Raises:
        AdgridError: keys or shapes are not those of a projector.
    """
    state = {key: value for key, value in state.items() if not re.fullmatch(r"centre\.\d+", key)}
    references: list[Tensor] = []
    while isinstance(tokens := state.get(f"l{len(references) + 1}_proj.x_ref"), Tensor) and tokens.ndim == 3:
        references.append(tokens)
    if not references:
        raise AdgridError(
            f"{where}: no tensor l1_proj.x_ref of shape (1, references, width); "
            f"found {_some(state) or 'nothing'}; give a projector of ADPretrain"
        )
    with torch.device("meta"):  # shapes alone; the weights come from the file
        projector = Projector([tokens.shape[2] for tokens in references], num_references=references[0].shape[1])
    wanted = {key: tuple(value.shape) for key, value in projector.state_dict().items()}
    found = {key: tuple(value.shape) if isinstance(value, Tensor) else None for key, value in state.items()}
    problems = []
    if missing := wanted.keys() - found.keys():
        problems.append(f"missing {_some(missing)}")
    if extra := found.keys() - wanted.keys():
        problems.append(f"not known {_some(extra)}")
    wrong = [key for key in wanted if key in found and found[key] != wanted[key]]
    problems += [f"{key} has shape {found[key]} instead of {wanted[key]}" for key in wrong[:3]]
    if problems:
        raise AdgridError(f"{where}: {'; '.join(problems)}; give a projector of ADPretrain of {len(references)} levels")
    projector.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return projector.requires_grad_().eval()


def _some(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
