"""Pinned numbers: a change that moves them must say so.

They are remade with `python -m pytest tests/test_golden.py --remake-golden`.
"""

import json

import pytest
from runs import SmallRun

from harness.verify import CELLS, NUMBERS

pytestmark = pytest.mark.slow


def test_numbers_are_the_pinned_ones(tmp_path, places, request):
    run = SmallRun(tmp_path, places)
    rows = run.run_plan(run.plan(CELLS.read_text(), random_weights=False))
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    found = {
        " ".join(cell): {name: round(row.metrics[name], 5) for name in sorted(row.metrics)}
        for cell, row in rows.items()
    }
    if request.config.getoption("--remake-golden"):
        NUMBERS.write_text(json.dumps(found, indent=1) + "\n")
    pinned = json.loads(NUMBERS.read_text())
    assert found.keys() == pinned.keys()
    for cell, metrics in pinned.items():
        for name, value in metrics.items():
            # Other processors round convolutions differently: a pair of the 48 images may change places.
            allowed = 2e-2 if name.startswith("image") else 5e-3
            assert found[cell][name] == pytest.approx(value, abs=allowed), (cell, name)
