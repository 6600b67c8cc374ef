"""adgrid: a distributed benchmark harness for industrial image anomaly detection.

from harness import run_space
rows = run_space("search_spaces/quickstart.yaml")   # a pandas DataFrame, one row per cell
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["__version__", "run_space"]
__version__ = "0.1.0"


def run_space(space: str, **options: Any) -> pd.DataFrame:
    """Runs a search space as `adgrid run` does and returns one row per cell.

    Args:
        space: path of the YAML file.
        options: the keyword arguments of `harness.run.run_space`.
    """
    from harness.run import run_space as run

    return run(space, **options)
