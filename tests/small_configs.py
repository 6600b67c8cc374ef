"""Configurations of trained methods that fit a test: the paper's with few epochs and narrow networks."""

SMALL_CONFIGS: dict[str, dict[str, object]] = {}
"""Method name -> parameters; a method that is not here is tested with its defaults."""
