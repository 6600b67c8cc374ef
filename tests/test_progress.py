"""What a person sees while trials run."""

import io
import time

import pytest
from rich.console import Console
from runs import SPACE, SmallRun

from harness.progress import ProgressBoard, describe, describe_seconds, find_varied
from harness.rows import unfinished_row


def test_trials_of_one_grid_are_told_apart_by_what_varies(tmp_path, places):
    space = SPACE.replace("[toy_features]", "[{name: toy_features, params: {scale: [1.0, 0.5]}}, toy_tuned]")
    trials = SmallRun(tmp_path, places).plan(space).trials
    varied = find_varied(trials)
    assert varied == {"toy_features": ["scale"]}
    named = {describe(trial, varied) for trial in trials}
    assert "toy_features · toy_resnet · toy_squares · scale 0.5" in named
    assert "toy_tuned · toy_resnet · toy_squares" in named


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (727, "12:07"), (11100, "3:05:00")])
def test_seconds_are_written_as_clocks_do(seconds, text):
    assert describe_seconds(seconds) == text


def test_the_board_shows_what_runs_and_prints_each_row(tmp_path, places):
    run = SmallRun(tmp_path, places)
    plan = run.plan()
    trial, settings = plan.trials[0], run.settings(plan)
    rows = run.run_plan(plan)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with ProgressBoard(console, num_cells=3, num_done=1, num_trials=1) as board:
        board.started(trial)
        board.noted(trial, "small", "extracting test features", 3, 8)
        time.sleep(0.4)
        board.finished(trial, rows["small"])
        board.finished(trial, unfinished_row(trial, trial.cells[1], "failed", ValueError("no such luck"), settings))
        board.ended(trial)
        time.sleep(0.4)
    lines = [line.strip() for line in out.getvalue().replace("\r", "\n").split("\n")]
    shown = "\n".join(lines)
    assert any(line.startswith("▸ toy_features · toy_resnet · toy_squares  small: extracting") for line in lines), shown
    assert "[2/3] ✓ toy_features · toy_resnet · toy_squares · small  image_auroc 100.0%" in shown
    assert "[3/3] ✗ failed toy_features · toy_resnet · toy_squares · middle  ValueError: no such luck" in shown
    assert "cells 3/3 · failed 1 · trials 1/1 done, 0 running" in shown


def test_without_a_terminal_only_rows_are_printed(tmp_path, places):
    run = SmallRun(tmp_path, places)
    plan = run.plan()
    rows = run.run_plan(plan)
    out = io.StringIO()
    with ProgressBoard(Console(file=out, width=100), num_cells=3, num_done=0, num_trials=1) as board:
        board.started(plan.trials[0])
        for row in rows.values():
            board.finished(plan.trials[0], row)
    assert len(out.getvalue().strip().split("\n")) == 3
