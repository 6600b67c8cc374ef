"""The picture of a study: a line per configuration across its parameters, and how well it did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from harness.search import Distribution
from harness.study import SampleResult, find_best

INK, GREY, PALE = "#1a1a1a", "#5f6368", "#c4c7cb"
_COLOURS = colormaps["viridis"]


def draw_parallel_coordinates(
    distributions: Mapping[str, Distribution],
    results: Sequence[SampleResult],
    objective: str,
    title: str,
    target: Path,
) -> None:
    """Draws the samples of a study in parallel coordinates.

    Finished samples are coloured by their score, the best one is thick and labelled; stopped and failed ones are dashed
    and end before the last axis, as they have no score that compares.

    Args:
        distributions: the searched fields, in the order of the axes.
        results: the samples.
        objective: title of the metric.
        title: headline.
        target: PNG file.
    """
    names = [*distributions, objective]
    finished = [result for result in results if result.score is not None]
    scores = [result.score for result in finished if result.score is not None]
    low, high = (min(scores), max(scores)) if scores else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.005, high + 0.005
    figure = Figure(figsize=(max(6.4, 1.75 * len(names) + 1.2), 4.4), facecolor="white")
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_axes((0.11, 0.12, 0.77, 0.66))
    axes.set(xlim=(0, len(names) - 1), ylim=(-0.04, 1.04))
    axes.set_axis_off()
    best = find_best(results)
    order = sorted(results, key=lambda result: -1.0 if result.score is None else result.score)
    for result in order:
        heights = [distribution.place(result.params[field]) for field, distribution in distributions.items()]
        if result.score is None:
            axes.plot(range(len(heights)), heights, color=PALE, linewidth=1.1, linestyle=(0, (3, 2)), zorder=1)
            continue
        share = (result.score - low) / (high - low)
        width, alpha = (3.2, 1.0) if result is best else (1.5, 0.85)
        axes.plot(
            range(len(names)), [*heights, share], color=_COLOURS(0.08 + 0.84 * share), linewidth=width, alpha=alpha,
            solid_joinstyle="round", marker="o", markersize=width + 1.2, zorder=2 + share, clip_on=False,
        )  # fmt: skip
    for place, (field, distribution) in enumerate(distributions.items()):
        _draw_axis(axes, place, field, _ticks(distribution))
    marks = [(share, f"{low + share * (high - low):.1%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    _draw_axis(axes, len(names) - 1, objective, marks if scores else [], right=True)
    counts = [f"{len(finished)} finished"]
    for status in ("stopped", "failed", "open"):
        number = sum(result.status == status for result in results)
        counts += [f"{number} {status} (dashed)"] * bool(number)
    figure.text(0.02, 0.945, title, fontsize=12, color=INK, fontweight="bold", parse_math=False)
    subtitle = f"{len(results)} configurations: {', '.join(counts)}"
    if best is not None and best.score is not None:
        values = ", ".join(f"{field} {_show(value)}" for field, value in best.params.items())
        subtitle += f"\nbest, {best.score:.1%}: {values}"
    figure.text(0.02, 0.925, subtitle, fontsize=8.5, color=GREY, va="top", linespacing=1.5, parse_math=False, wrap=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160)


def _draw_axis(axes: Axes, place: int, name: str, marks: Sequence[tuple[float, str]], right: bool = False) -> None:
    axes.plot([place, place], [0, 1], color=INK, linewidth=1.0, zorder=3, clip_on=False)
    axes.text(place, -0.07, name, ha="center", va="top", fontsize=9, color=INK, fontweight="bold", parse_math=False)
    for height, text in marks:
        axes.plot([place - 0.012, place + 0.012], [height, height], color=INK, linewidth=1.0, zorder=3, clip_on=False)
        shift = 0.03 if right else -0.03
        axes.text(
            place + shift, height, text, ha="left" if right else "right", va="center", fontsize=8, color=INK,
            parse_math=False, zorder=6, bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip


def _ticks(distribution: Distribution) -> list[tuple[float, str]]:
    """Places on the axis with the values that stand there."""
    if distribution.kind == "choice":
        return [(distribution.place(value), _show(value)) for value in distribution.values]
    low, high = float(distribution.at(0.0)), float(distribution.at(math.nextafter(1.0, 0.0)))
    locator = (
        LogLocator(subs=(1.0, 2.0, 5.0))
        if distribution.kind == "loguniform"
        else MaxNLocator(5, integer=distribution.kind == "randint")
    )
    inner = [value for value in map(float, locator.tick_values(low, high)) if low <= value <= high]
    values = {low, high, *inner}
    marks: list[tuple[float, str]] = []
    for value in sorted(values, key=lambda value: (value not in (low, high), value)):
        height = distribution.place(value)
        if all(abs(height - other) > 0.08 for other, _ in marks):
            marks.append((height, _show(value)))
    return marks


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
