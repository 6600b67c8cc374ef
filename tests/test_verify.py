"""`adgrid verify`: what is compared, what is said, and the CPU in the accelerator's place."""

import json

import pytest
from rich.console import Console

from harness.cli import main
from harness.registry import method_names
from harness.space import load_space
from harness.verify import (
    EVERY_METHOD,
    NUMBERS,
    ON_ACCELERATOR,
    Comparison,
    compare_numbers,
    show_comparisons,
)


@pytest.fixture
def console():
    return Console(record=True, width=150)


def test_every_number_that_is_off_missing_or_new_is_told():
    expected = {"padim tile": {"image_auroc": 0.8, "pixel_auroc": 0.9, "aupro": 0.5}, "draem tile": {"image_auroc": 1}}
    found = {"padim tile": {"image_auroc": 0.81, "pixel_auroc": 0.91, "image_ap": 0.7}}
    assert list(map(str, compare_numbers(expected, found))) == [
        "draem tile: image_auroc is missing",
        "padim tile: aupro is missing",
        "padim tile: image_ap is new",
        "padim tile: pixel_auroc is 0.91000, expected 0.90000 (differs by 0.01000, allowed 0.005)",
    ]
    assert compare_numbers(expected, expected) == []
    assert len(compare_numbers(expected, {**expected, "draem tile": {"image_auroc": float("nan")}})) == 1


def test_every_method_of_ours_is_verified_on_accelerators():
    ours = {name for name in method_names() if not name.startswith("toy_")}
    assert {method.name for method in load_space(EVERY_METHOD).methods} == ours


def test_what_differs_from_the_cpu_is_named(console):
    good = Comparison(method="padim", variant=ON_ACCELERATOR[0], device="X1", workers=1, auroc=0.001, correlation=0.999)
    bad = Comparison(method="draem", variant=ON_ACCELERATOR[1], device="X1", workers=1, auroc=0.3, correlation=0.2)
    unknown = Comparison(
        method="glass", variant=ON_ACCELERATOR[0], device="X1", workers=1, auroc=0, correlation=float("nan")
    )
    show_comparisons([good, bad, unknown], console)
    assert "2 of 3 differ from the CPU: draem in bfloat16, glass in float32" in console.export_text()


def test_without_an_accelerator_one_thing_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert main(["verify", "--gpu", "--root", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "no accelerator on this machine" in told.err
    assert "checks the CPU" in told.err


def test_pinned_numbers_are_rates():
    assert all(0 <= value <= 1 for cell in json.loads(NUMBERS.read_text()).values() for value in cell.values())
