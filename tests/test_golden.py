"""Pinned numbers: a change that moves them must say so.

They are remade with `python -m pytest tests/test_golden.py --remake-golden`.
"""

import json
from pathlib import Path

import pytest
from runs import SmallRun

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent / "golden" / "generated.json"
SPACE = """
name: golden
methods: [padim, patchcore]
backbones: [tf_efficientnet_lite0]
datasets: [{name: generated, categories: [printed_tile, woven_fabric]}]
shots: [16]
"""


def test_numbers_are_the_pinned_ones(tmp_path, places, request):
    run = SmallRun(tmp_path, places)
    rows = run.run_plan(run.plan(SPACE, random_weights=False))
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    found = {
        " ".join(cell): {name: round(row.metrics[name], 5) for name in sorted(row.metrics)}
        for cell, row in rows.items()
    }
    if request.config.getoption("--remake-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    pinned = json.loads(GOLDEN.read_text())
    assert found.keys() == pinned.keys()
    for cell, metrics in pinned.items():
        for name, value in metrics.items():
            # Other processors round convolutions differently: a pair of the 48 images may change places.
            allowed = 2e-2 if name.startswith("image") else 5e-3
            assert found[cell][name] == pytest.approx(value, abs=allowed), (cell, name)
