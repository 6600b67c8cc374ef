"""The ids by which results are found again.

`prediction_id` hashes everything that the scores of a cell depend on, `cell_id` adds everything that turns scores
into metrics. Sizes and modification times never enter: the same bytes give the same id on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness.contracts import EvaluationProtocol, Sample


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, dataclasses and tuples as plain JSON. NaN is refused."""

    def plain(item: Any) -> Any:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        raise TypeError(f"cannot put {type(item).__name__} into an id")

    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain, allow_nan=False)


def content_id(value: Any, length: int = 32) -> str:
    """Hexadecimal SHA-256 of the canonical JSON, cut to `length` characters (32 = 128 bits)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def protocol_id(protocol: EvaluationProtocol | Mapping[str, Any]) -> str:
    """Short id of a protocol as the search space says it; rows with different ones are never averaged."""
    return content_id(protocol, length=8)


def images_fingerprint(samples: Sequence[Sample], hashes: Mapping[str, str]) -> str:
    """Content of the images in order, with the names a method may see; not their labels."""
    return content_id([[sample.category, sample.sample_id, sample.view, hashes[sample.path]] for sample in samples])


def truth_fingerprint(samples: Sequence[Sample], hashes: Mapping[str, str], has_masks: bool) -> str:
    """Labels and mask contents of the test images in order, and the images whose size a mask must have."""
    truth = [
        [sample.label, [hashes[sample.mask_path], hashes[sample.path]] if sample.mask_path else ""]
        for sample in samples
    ]
    return content_id([truth, has_masks])
