"""Configurations of methods that fit a test: the paper's with few epochs and narrow networks, as `verify` has them."""

import yaml

from harness.verify import EVERY_METHOD

SMALL_CONFIGS: dict[str, dict[str, object]] = {
    entry["name"]: entry["params"]
    for entry in yaml.safe_load(EVERY_METHOD.read_text())["methods"]
    if isinstance(entry, dict)
}
"""Method name -> parameters; a method that is not here is tested with its defaults."""
