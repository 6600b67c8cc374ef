"""How to run, as the command line says it; imports next to nothing, so that a listing does not wait for torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from harness.contracts import Places

EXPERIMENT = "adgrid"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Nothing here changes a number but `random_weights`, which is stamped."""

    root: str = "results"
    """Storage root, a path or URI."""
    data_root: str | None = None
    """Folder with one subfolder per dataset."""
    cache_dir: str | None = None
    """Node-local cache; None for the user's cache folder."""
    overrides: Sequence[str] = ()
    """`axis=value` texts."""
    address: str | None = None
    """Ray cluster to join; None starts one here."""
    cluster_config: str | None = None
    """File of the Ray cluster launcher, which says what its autoscaler may add."""
    num_cpus: int | None = None
    """Cores of a Ray started here; None for all."""
    tracking_uri: str | None = None
    """MLflow tracking URI; None for a SQLite file under a local root, `off` for none."""
    experiment: str = EXPERIMENT
    """MLflow experiment."""
    random_weights: bool = False
    """Random instead of pretrained weights, to test the plumbing."""
    download: bool = False
    """Fetch weights that are not here from the hub."""
    skip_missing: bool = False
    """Run what can run although datasets or weights are missing."""
    save_fitted: bool = False
    """Keep every fitted method."""
    pictures: bool = True
    """Draw a contact sheet for every cell."""
    cache_gib: float = 50.0
    """Bound of the node-local cache."""
    prediction_gib: float = 20.0
    """Bound of the stored anomaly maps; those that were not used for longest make room."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints of a training."""

    @property
    def places(self) -> Places:
        """Where data and caches lie on this machine."""
        cache = self.cache_dir or platformdirs.user_cache_dir("adgrid", appauthor=False)
        data = (
            str(Path(self.data_root).expanduser().resolve()) if self.data_root and "://" not in self.data_root else None
        )
        return Places(data_root=data or self.data_root, cache_dir=str(Path(cache).expanduser().resolve()))
