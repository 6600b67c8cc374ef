"""Pictures of comparisons: differences with their intervals, and average ranks with their critical difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from harness.compare import Comparison, Delta
from harness.figures import GREY, HATCH, INK, PALE, Canvas, text_width
from harness.metrics import METRICS
from harness.ranks import AverageRanks

BETTER, WORSE = "#0072b2", "#d55e00"
"""Blue and vermillion of the Okabe-Ito palette; the verdict stands beside each in words."""

_COLOURS = {"better": BETTER, "worse": WORSE, "not distinguishable": GREY}
_MARGIN = 0.3
_MAX_ROWS = 120


# --- differences -------------------------------------------------------------------------------------------------


def draw_deltas(comparison: Comparison, metric: str, target: str | Path | BinaryIO, dpi: float = 160) -> None:
    """Draws every difference of a metric as a point with its interval, means first.

    Rows beyond 120 are left out, which the picture says.

    Args:
        comparison: what was found.
        metric: one of its metrics.
        target: file name whose ending chooses the format, or a binary stream for PNG.
        dpi: dots per inch of pixel formats.
    """
    everything = [
        delta for level in ("everything", "dataset", "category") for delta in comparison.select(metric, level)
    ]
    deltas = everything[:_MAX_ROWS]
    labels = [_label(delta, len(comparison.matches.candidates) > 1) for delta in deltas]
    left = (
        _MARGIN
        + max(text_width(label, 8.5, delta.level != "category") for label, delta in zip(labels, deltas, strict=True))
        + 0.2
    )
    plot, right, row_height, top = 3.6, 1.75, 0.24, 0.95
    title = f"{METRICS[metric].title}: difference in percentage points"
    subject = f"{', '.join(comparison.matches.candidates)} against {comparison.matches.baseline}"
    width = max(left + plot + right, text_width(title, 12, True) + 2 * _MARGIN, text_width(subject, 9) + 2 * _MARGIN)
    bottom = top + row_height * len(deltas)
    canvas = Canvas(width, bottom + 0.75)
    canvas.text(_MARGIN, 0.32, title, 12, bold=True)
    canvas.text(_MARGIN, 0.57, subject, 9, colour=GREY)

    intervals = [delta.total.interval(comparison.confidence) for delta in deltas]
    ends_shown = [delta.value for delta in deltas] + [end for found in intervals if found for end in found]
    low, high = min([0.0, *ends_shown]), max([0.0, *ends_shown])
    step = _nice_step(high - low or 0.01)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last += first == last

    def place(value: float) -> float:
        return left + plot * (value / step - first) / (last - first)

    for number in range(first, last + 1):
        x = place(number * step)
        canvas.box(x - 0.004, top, 0.008, bottom - top, facecolor=PALE if number else INK, linewidth=0)
        tick = f"{100 * number * step:+.4g}" if number else "0"
        canvas.text(x, bottom + 0.14, tick, 8, colour=GREY, across="center")
    for number, (delta, label, ends) in enumerate(zip(deltas, labels, intervals, strict=True)):
        y = top + (number + 0.5) * row_height
        colour, is_mean = _COLOURS[delta.verdict], delta.level != "category"
        canvas.text(_MARGIN, y, label, 8.5, bold=is_mean)
        if ends is not None:
            canvas.box(place(ends[0]), y - 0.011, place(ends[1]) - place(ends[0]), 0.022, facecolor=colour, linewidth=0)
        half = 0.055 if is_mean else 0.04
        hollow = ends is None
        canvas.box(
            place(delta.value) - half, y - half, 2 * half, 2 * half,
            facecolor="white" if hollow else colour, edgecolor=colour, linewidth=1.0,
        )  # fmt: skip
        canvas.text(left + plot + 0.12, y, f"{100 * delta.value:+.2f}  {delta.verdict}", 8, colour=colour)
    note = f"Lines: {100 * comparison.confidence:g} % intervals over images and seeds. Verdicts after Holm."
    note += " Hollow: no interval." if None in intervals else ""
    if len(everything) > len(deltas):
        note += f" {len(everything) - len(deltas)} more rows are in differences.csv."
    canvas.text(_MARGIN, bottom + 0.48, note, 7.5, colour=GREY)
    canvas.save(target, dpi)


def _label(delta: Delta, has_several: bool) -> str:
    where = delta.category if delta.level == "category" else ("mean" if delta.dataset else "everything")
    return " · ".join(filter(None, [delta.candidate if has_several else "", delta.line, delta.dataset, where]))


def _nice_step(length: float) -> float:
    """Distance of ticks: 1, 2 or 5 times a power of ten, at most eight of them along the axis."""
    power = 10.0 ** math.floor(math.log10(length / 8))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= length / 8)


# --- ranks -------------------------------------------------------------------------------------------------------


def draw_ranks(ranks: AverageRanks, title: str, target: str | Path | BinaryIO, dpi: float = 160) -> None:
    """Draws the diagram of critical differences of Demšar (2006): contestants joined by a bar do not differ.

    Args:
        ranks: average ranks, best first.
        title: what was ranked.
        target: file name whose ending chooses the format, or a binary stream for PNG.
        dpi: dots per inch of pixel formats.
    """
    number, size, plot = len(ranks.names), 9.0, 4.4
    labels = [f"{name}  {rank:.2f}" for name, rank in zip(ranks.names, ranks.ranks, strict=True)]
    half = (number + 1) // 2
    sides = (labels[:half], labels[half:])
    widths = [max((text_width(label, size) for label in side), default=0.0) + 0.25 for side in sides]
    left = _MARGIN + widths[0]
    notes = _rank_notes(ranks)
    heading = f"{title}: average rank over {ranks.num_tests} categories"
    text_room = max(text_width(heading, 12, True), *(text_width(note, 7.5) for note in notes)) + 2 * _MARGIN
    width = max(left + plot + widths[1] + _MARGIN, text_room)
    axis, bars = 1.3, _stack(ranks.groups)
    first_label = axis + 0.28 + 0.13 * (max(bars, default=-1) + 1)
    bottom = first_label + 0.26 * half
    canvas = Canvas(width, bottom + 0.18 * len(notes) + 0.15)
    canvas.text(_MARGIN, 0.32, heading, 12, bold=True)

    def place(rank: float) -> float:
        return left + plot * (rank - 1) / (number - 1)

    shown = min(ranks.critical_difference, number - 1)
    cut = " (longer than the axis)" if ranks.critical_difference > number - 1 else ""
    canvas.box(left, 0.87, place(1 + shown) - left, 0.02, facecolor=INK, linewidth=0)
    for x in (left, place(1 + shown)):
        canvas.box(x - 0.006, 0.82, 0.012, 0.12, facecolor=INK, linewidth=0)
    canvas.text(left, 0.7, f"critical difference {ranks.critical_difference:.2f}{cut}", 8, colour=GREY)

    canvas.box(left, axis - 0.008, plot, 0.016, facecolor=INK, linewidth=0)
    for rank in range(1, number + 1):
        canvas.box(place(rank) - 0.006, axis - 0.07, 0.012, 0.07, facecolor=INK, linewidth=0)
        canvas.text(place(rank), axis - 0.15, str(rank), 8, colour=GREY, across="center")
    for (first, last), level in zip(ranks.groups, bars, strict=True):
        start, stop = place(ranks.ranks[first]) - 0.04, place(ranks.ranks[last]) + 0.04
        canvas.box(start, axis + 0.12 + 0.13 * level, stop - start, 0.055, facecolor=HATCH, linewidth=0)
    for position, label in enumerate(labels):
        is_left = position < half
        # Outermost ranks hang highest, so that no line crosses another.
        y = first_label + 0.26 * (position if is_left else number - 1 - position)
        x = place(ranks.ranks[position])
        canvas.box(x - 0.005, axis, 0.01, y - axis, facecolor=INK, linewidth=0)
        end = left - 0.1 if is_left else left + plot + 0.1
        canvas.box(min(x, end), y - 0.005, abs(x - end), 0.01, facecolor=INK, linewidth=0)
        canvas.text(end + (-0.06 if is_left else 0.06), y, label, size, across="right" if is_left else "left")
    for line, note in enumerate(notes):
        canvas.text(_MARGIN, bottom + 0.05 + 0.18 * line, note, 7.5, colour=GREY)
    canvas.save(target, dpi)


def _rank_notes(ranks: AverageRanks) -> list[str]:
    test = "Wilcoxon" if len(ranks.names) == 2 else "Friedman"
    p = "< 0.001" if ranks.p_value < 0.001 else f"= {ranks.p_value:.3f}"
    joined = (
        "Joined by a bar: not distinguishable" if ranks.groups else "No two are closer than the critical difference"
    )
    return [
        f"1 is best. {joined} ({100 * ranks.confidence:g} %, Nemenyi).",
        f'{test}\'s test of "all are alike": p {p}.',
    ]


def _stack(groups: Sequence[tuple[int, int]]) -> list[int]:
    """Level of each bar, so that bars which overlap lie below one another."""
    levels: list[int] = []
    for number, (first, _) in enumerate(groups):
        taken = {levels[other] for other in range(number) if groups[other][1] >= first}
        levels.append(next(level for level in range(len(groups)) if level not in taken))
    return levels
