"""Pictures: matrices as heat maps, and contact sheets of the most and least anomalous images of a cell.

The one home of matplotlib. Figures are built from objects alone, so drawing neither opens a window nor touches the
global state of pyplot. Colours are perceptually uniform and safe for colour-blind readers; nothing is told by colour
alone.
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image

from harness.matrices import Matrix, MatrixCell
from harness.tables import cell_colour, describe_matrix, format_percent, is_dark

INK, GREY, PALE = "#1a1a1a", "#5f6368", "#f1f3f4"
HATCH = "#b7bbc0"
ALERT = "#d55e00"
"""Vermillion of the Okabe-Ito palette, distinct from the heat scale for all common kinds of colour blindness."""

_MARGIN = 0.3
_MAX_SIDE_PX = 30_000
_MAX_REASONS = 8
PNG_LEVEL = 3
"""Of zlib: half the time of its default for files that are a tenth larger."""


# --- a canvas in inches ----------------------------------------------------------------------------------------


class Canvas:
    """A blank picture in which every length is in inches and y points down."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.agg = FigureCanvasAgg(self.figure)
        self.axes: Axes = self.figure.add_axes((0.0, 0.0, 1.0, 1.0))
        self.axes.set_axis_off()
        self._fix_limits()

    def _fix_limits(self) -> None:
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(self.height, 0)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        *,
        colour: str = INK,
        bold: bool = False,
        across: Literal["left", "center", "right"] = "left",
        down: Literal["center_baseline", "baseline"] = "center_baseline",
        angle: float = 0.0,
    ) -> None:
        # Artists of the figure, unlike those of axes, are not clipped, which would take longer than drawing them.
        self.figure.text(
            x,
            y,
            text,
            transform=self.axes.transData,
            fontsize=size,
            color=colour,
            fontweight="bold" if bold else "normal",
            ha=across,
            va=down,
            rotation=angle,
            rotation_mode="anchor",
            linespacing=1.35,
            parse_math=False,
        )

    def box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        self.figure.add_artist(Rectangle((x, y), width, height, transform=self.axes.transData, **style))

    def image(self, x: float, y: float, width: float, height: float, pixels: np.ndarray) -> None:
        self.axes.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="none", aspect="auto")
        self._fix_limits()

    def save(self, target: str | Path | BinaryIO, dpi: float) -> None:
        if isinstance(target, (str, Path)):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        kind = Path(target).suffix if isinstance(target, (str, Path)) else ".png"
        options: dict[str, Any] = {"pil_kwargs": {"compress_level": PNG_LEVEL}} if kind == ".png" else {}
        # Text stays text in an SVG, and the same figure gives the same file on another day.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "adgrid"}):
            self.agg.print_figure(
                target,
                dpi=min(dpi, _MAX_SIDE_PX / max(self.width, self.height)),
                metadata={".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(kind),
                **options,
            )


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float, bold: bool = False) -> float:
    """Inches that a line of text takes."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    width, _, _ = _MEASURE.get_text_width_height_descent(text, font, ismath=False)
    return width / 72


_MEASURE = FigureCanvasAgg(Figure(dpi=72)).get_renderer()


def _wrap(texts: Iterable[str], size: float, width: float) -> list[str]:
    # The mean advance of a letter of the default font is about 0.55 of its size.
    letters = max(int(width * 72 / (0.55 * size)), 20)
    return [line for text in texts for line in textwrap.wrap(text, letters)]


# --- matrices --------------------------------------------------------------------------------------------------


def draw_matrix(matrix: Matrix, *targets: str | Path | BinaryIO, dpi: float = 160) -> None:
    """Draws a matrix as a heat map whose size follows its rows and columns.

    Values stand in the cells in percent, the best of each column underlined and bold. Holes are hatched, with their
    count in the cell and their first reasons below.

    Args:
        matrix: what to draw.
        targets: file names whose endings choose the format (png, pdf, svg, jpg, webp), or binary streams for PNG.
        dpi: dots per inch of pixel formats; lowered where a side would pass 30,000 pixels.
    """
    labels, cells = 9.0, 9.5
    cell_texts = [[_cell_lines(cell) for cell in row.cells] for row in matrix.rows]
    row_height = 0.46 if any(cell.std is not None for row in matrix.rows for cell in row.cells) else 0.38
    cell_width = max(
        [0.95] + [text_width(text, cells, bold=True) + 0.22 for line in cell_texts for cell in line for text in cell]
    )
    label_widths = [
        max(text_width(text, labels, bold=True) for text in (name, *(row.labels[number] for row in matrix.rows))) + 0.22
        for number, name in enumerate(matrix.header)
    ]
    heading_width = max((text_width(name, labels, bold=True) for name in matrix.columns), default=0.0)
    slanted = heading_width > cell_width - 0.1
    heading_height = 0.2 + (heading_width * 0.5 if slanted else 0.0)
    left = _MARGIN + sum(label_widths)
    grid_width, grid_height = cell_width * len(matrix.columns), row_height * max(len(matrix.rows), 1)
    overhang = heading_width * 0.87 - cell_width / 2 if slanted else 0.0
    title_width = text_width(f"{matrix.title} [%]", 13, bold=True) + text_width(f"  {matrix.subject}", 10)
    width = max(left + grid_width + max(1.05, overhang + 0.1), title_width + 2 * _MARGIN, 5.4)
    ranks = matrix.ranks()
    marked = ["Best of each column underlined."] if any("best" in line for line in ranks) else []
    notes = _wrap([*describe_matrix(matrix), *marked, *_hole_reasons(matrix)], 7.5, width - 2 * _MARGIN)
    top = 0.75 + heading_height
    canvas = Canvas(width, top + grid_height + 0.25 + 0.16 * len(notes) + 0.1)

    canvas.text(_MARGIN, 0.36, f"{matrix.title} [%]", 13, bold=True)
    start = _MARGIN + text_width(f"{matrix.title} [%]", 13, bold=True)
    canvas.text(start, 0.37, f"  {matrix.subject}", 10, colour=GREY)
    for number, name in enumerate(matrix.header):
        canvas.text(_MARGIN + sum(label_widths[:number]), top - 0.1, name, labels, colour=GREY, down="baseline")
    for number, name in enumerate(matrix.columns):
        middle = left + (number + 0.5) * cell_width
        if slanted:
            canvas.text(middle - 0.05, top - 0.1, name, labels, bold=True, down="baseline", angle=30)
        else:
            canvas.text(middle, top - 0.1, name, labels, bold=True, across="center", down="baseline")

    bounds, previous = matrix.colour_range(), ""
    for line, row in enumerate(matrix.rows):
        y = top + line * row_height
        for number, text in enumerate(row.labels):
            is_repeated = number == 0 and text == previous
            x = _MARGIN + sum(label_widths[:number])
            if not is_repeated:
                canvas.text(x, y + row_height / 2, text, labels, bold=number == 0)
        if line and row.labels[0] != previous:
            canvas.box(_MARGIN, y - 0.004, left - _MARGIN - 0.08, 0.008, facecolor=HATCH, linewidth=0)
        previous = row.labels[0]
        for number, cell in enumerate(row.cells):
            box = (left + number * cell_width, y, cell_width, row_height)
            marks = "".join(mark for stamp, mark in matrix.marks.items() if stamp in cell.stamps)
            _draw_cell(canvas, cell, cell_texts[line][number], marks, ranks[line][number] == "best", bounds, box)
    if matrix.numbers:
        _draw_scale(canvas, left + grid_width + 0.22, top, min(grid_height, 2.6), bounds)
    for number, text in enumerate(notes):
        canvas.text(_MARGIN, top + grid_height + 0.25 + 0.16 * number, text, 7.5, colour=GREY)
    for target in targets:
        canvas.save(target, dpi)


def _cell_lines(cell: MatrixCell) -> list[str]:
    if cell.state == "hole":
        return ["—", cell.note]
    value, _, spread = format_percent(cell).partition(" ± ")
    return [value, f"± {spread}"] if spread else [value]


def _draw_cell(
    canvas: Canvas,
    cell: MatrixCell,
    lines: Sequence[str],
    marks: str,
    is_best: bool,
    bounds: tuple[float, float],
    box: tuple[float, float, float, float],
) -> None:
    x, y, width, height = box
    centre = (x + width / 2, y + height / 2)
    frame: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.6}
    if cell.value is None:
        if cell.state == "hole":
            canvas.box(*box, facecolor="white", edgecolor=HATCH, linewidth=0, hatch="////")
            canvas.box(*box, facecolor="none", **frame)
            room = text_width(lines[1], 7.5) + 0.1
            canvas.box(centre[0] - room / 2, centre[1] - 0.08, room, 0.16, facecolor="white", linewidth=0)
            canvas.text(*centre, lines[1], 7.5, across="center")
        else:
            canvas.box(*box, facecolor=PALE, **frame)
            canvas.text(*centre, lines[0], 8.5, colour=GREY, across="center")
        return
    colour = cell_colour(cell.value, bounds)
    front = "white" if is_dark(colour) else "black"
    canvas.box(*box, facecolor=[part / 255 for part in colour], **frame)
    lift = 0.075 if len(lines) > 1 else 0.0
    half = text_width(lines[0], 9.5, bold=is_best) / 2
    canvas.text(centre[0], centre[1] - lift, lines[0], 9.5, colour=front, bold=is_best, across="center")
    canvas.text(centre[0] + half + 0.02, centre[1] - lift - 0.035, marks, 7, colour=front)
    if is_best:
        canvas.box(centre[0] - half, centre[1] - lift + 0.083, 2 * half, 0.012, facecolor=front, linewidth=0)
    if len(lines) > 1:
        canvas.text(centre[0], centre[1] + 0.105, lines[1], 7, colour=front, across="center")


def _draw_scale(canvas: Canvas, x: float, y: float, height: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    steps = [cell_colour(high - (high - low) * step / 255, bounds) for step in range(256)]
    canvas.image(x, y, 0.12, height, np.array(steps, dtype=np.uint8)[:, None, :])
    # The ends are multiples of 5 %; so are the ticks, at most six of them, and the low end is always told.
    spacing = 0.05 * max(math.ceil(round((high - low) / 0.05) / (5 if height > 1.2 else 2)), 1)
    ticks = [high - spacing * number for number in range(int((high - low) / spacing + 1e-9) + 1)]
    if ticks[-1] - low > spacing / 4:
        ticks = [*(tick for tick in ticks if tick - low > spacing * 0.4), low]
    for tick in ticks:
        canvas.text(x + 0.19, y + height * (high - tick) / (high - low), f"{100 * tick:.4g}", 7.5, colour=GREY)


def _hole_reasons(matrix: Matrix) -> list[str]:
    """The first reasons behind the holes, one line each."""
    told = [
        f"— {' · '.join(row.labels)}, {column}: {textwrap.shorten(cell.reason, 140, placeholder=' …')}"
        for row, column, cell in matrix.holes
        if cell.reason
    ]
    return told[:_MAX_REASONS] + ([f"— and {len(told) - _MAX_REASONS} more holes"] if len(told) > _MAX_REASONS else [])


# --- contact sheets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoredImage:
    """One test image with what a method said of it."""

    image: np.ndarray
    """(H, W, 3) uint8 RGB."""
    anomaly_map: np.ndarray
    """(h, w) float, any size of the same aspect, higher = more anomalous."""
    mask: np.ndarray | None
    """(H, W), non-zero is defect; None where there is no mask or no defect."""
    score: float
    """Image score, higher = more anomalous."""
    label: int
    """0 normal, 1 anomalous."""
    defect_type: str
    name: str
    """What the image is called, such as its file name."""


def pick_extremes(scores: Sequence[float] | np.ndarray, num: int) -> tuple[list[int], list[int]]:
    """Positions of the highest and of the lowest scores, the most extreme first; no image is in both.

    Args:
        scores: (N,) image scores.
        num: how many of each at most; fewer where N < 2 * num.
    """
    order = [int(position) for position in np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")]
    high = order[: min(num, (len(order) + 1) // 2)]
    low = order[len(high) :][::-1][:num]
    return high, low


def draw_contact_sheet(
    items: Sequence[ScoredImage], target: str | Path | BinaryIO, title: str, columns: int = 6, dpi: float = 130
) -> None:
    """Draws the test images with the highest and with the lowest scores, each with its heat map.

    The upper picture of a pair is the image with the outline of its mask, the lower one the same image in grey under
    its anomaly map. All maps share one colour scale. A normal image among the highest and an anomalous one among the
    lowest get a frame and a cross.

    Args:
        items: at least one; either all test images or those of `pick_extremes`.
        target: file name whose ending chooses the format (png, jpg, webp, pdf), or a binary stream for PNG.
        title: what was run on what.
        columns: images per row.
        dpi: dots per inch; a picture of a pair is 1.5 inches wide.
    """
    if not items:
        raise ValueError("a contact sheet needs at least one image")
    high, low = pick_extremes([item.score for item in items], columns)
    bands = [("Highest scores", "should be anomalous", high, 1), ("Lowest scores", "should be normal", low, 0)]
    bands = [band for band in bands if band[2]]
    side, gap, text_height = 1.5, 0.09, 0.42
    band_height = 0.38 + 2 * side + 0.05 + text_height
    shown = max(len(band[2]) for band in bands)
    width = max(2 * _MARGIN + shown * (side + gap) - gap + 0.75, 4.6)
    titles = _wrap([title], 12, width - 2 * _MARGIN)
    top = 0.3 + 0.24 * len(titles)
    canvas = Canvas(width, top + band_height * len(bands) + 0.36)
    for number, line in enumerate(titles):
        canvas.text(_MARGIN, 0.33 + 0.24 * number, line, 12, bold=True)

    limits = heat_limits([items[position].anomaly_map for band in bands for position in band[2]])
    for number, (name, hope, positions, expected) in enumerate(bands):
        y = top + number * band_height
        canvas.text(_MARGIN, y + 0.2, name, 10, bold=True)
        canvas.text(_MARGIN + text_width(name, 10, bold=True) + 0.1, y + 0.205, hope, 8.5, colour=GREY)
        for column, position in enumerate(positions):
            x = _MARGIN + column * (side + gap)
            _draw_pair(canvas, items[position], (x, y + 0.38), side, limits, expected, round(side * dpi))
    grid = _MARGIN + shown * (side + gap) - gap
    _draw_heat_scale(canvas, grid + 0.15, top + 0.38, 2 * side + 0.05, limits)
    legend = "Outline: ground-truth mask. Lower pictures: anomaly map over the grey image, one colour scale for all."
    if any(items[position].label != expected for _, _, positions, expected in bands for position in positions):
        legend += " Frame and ✗: on the wrong side."
    for number, line in enumerate(_wrap([legend], 7.5, width - 2 * _MARGIN)):
        canvas.text(_MARGIN, canvas.height - 0.28 + 0.15 * number, line, 7.5, colour=GREY)
    canvas.save(target, dpi)


def heat_limits(maps: Sequence[np.ndarray]) -> tuple[float, float]:
    """Ends of the colour scale: the middle of all shown pixels, which are mostly normal, and almost their maximum."""
    values = np.concatenate([np.asarray(item, dtype=np.float64).ravel() for item in maps])
    low, high = float(np.quantile(values, 0.5)), float(np.quantile(values, 0.999))
    return (low, high) if high > low else (low, low + 1.0)


def _draw_pair(
    canvas: Canvas,
    item: ScoredImage,
    corner: tuple[float, float],
    side: float,
    limits: tuple[float, float],
    expected: int,
    pixels: int,
) -> None:
    x, y = corner
    height, width = item.image.shape[:2]
    scale = side / max(height, width)
    shown = (x + (side - width * scale) / 2, width * scale, height * scale)
    size = (max(round(width * scale / side * pixels), 1), max(round(height * scale / side * pixels), 1))
    photo = np.asarray(Image.fromarray(item.image).resize(size, Image.Resampling.LANCZOS))
    for number, picture in enumerate((photo, _overlay(photo, item.anomaly_map, limits))):
        upper = y + number * (side + 0.05) + (side - shown[2]) / 2
        canvas.image(shown[0], upper, shown[1], shown[2], picture)
        _draw_outline(canvas, item.mask, (shown[0], upper, shown[1], shown[2]))
    is_wrong = item.label != expected
    bottom = y + 2 * side + 0.05
    if is_wrong:
        canvas.box(x - 0.02, y - 0.02, side + 0.04, 2 * side + 0.09, facecolor="none", edgecolor=ALERT, linewidth=2.2)
    kind = "normal" if item.label == 0 else item.defect_type
    kind = textwrap.shorten(kind.replace("_", " "), 20, placeholder="…")
    canvas.text(x, bottom + 0.12, f"✗ {kind}" if is_wrong else kind, 8, bold=True, colour=ALERT if is_wrong else INK)
    canvas.text(x + side, bottom + 0.12, f"{item.score:#.4g}".rstrip("."), 8, across="right")
    canvas.text(x, bottom + 0.27, textwrap.shorten(item.name, 26, placeholder="…"), 6.5, colour=GREY)


def heat_layer(anomaly_map: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """(h, w, 4) uint8 RGBA: the heat colours of a map, to be laid over a grey photo; clear where all is normal.

    Args:
        anomaly_map: (h, w), higher = more anomalous.
        limits: the values at the two ends of the colour scale, as `heat_limits` gives them.
    """
    low, high = limits
    place = np.clip((np.asarray(anomaly_map, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return (255 * np.dstack([_heat_colours(place), _opacity(place)])).astype(np.uint8)


def _overlay(photo: np.ndarray, anomaly_map: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """(H, W, 3) uint8: the grey photo where all is normal, the heat colour where it is not."""
    low, high = limits
    heat = Image.fromarray(np.asarray(anomaly_map, dtype=np.float32))
    resized = np.asarray(heat.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BILINEAR))
    place = np.clip((resized - low) / (high - low), 0.0, 1.0)
    grey = photo @ np.array([0.299, 0.587, 0.114]) / 255
    opacity = _opacity(place)[..., None]
    mixed = (1 - opacity) * grey[..., None] + opacity * _heat_colours(place)
    return (255 * mixed.clip(0, 1)).astype(np.uint8)


def _opacity(place: np.ndarray) -> np.ndarray:
    # Smooth at both ends, so that the noise of normal pixels stays faint.
    ramp = np.clip(place / 0.6, 0.0, 1.0)
    return 0.85 * ramp * ramp * (3 - 2 * ramp)


def _heat_colours(place: np.ndarray) -> np.ndarray:
    # The darkest quarter of inferno would look like shadow on a photo.
    return colormaps["inferno"](0.25 + 0.73 * place)[..., :3]


def _draw_outline(canvas: Canvas, mask: np.ndarray | None, box: tuple[float, float, float, float]) -> None:
    if mask is None or not np.any(mask):
        return
    x, y, width, height = box
    # A frame of zeros closes the outline of a defect that touches the border.
    padded = np.pad(np.asarray(mask) != 0, 1).astype(np.float32)
    rows, columns = padded.shape[0] - 2, padded.shape[1] - 2
    across = x + (np.arange(-1, columns + 1) + 0.5) * width / columns
    down = y + (np.arange(-1, rows + 1) + 0.5) * height / rows
    lines = canvas.axes.contour(
        np.clip(across, x, x + width),
        np.clip(down, y, y + height),
        padded,
        levels=[0.5],
        colors="white",
        linewidths=0.9,
    )
    lines.set_path_effects([withStroke(linewidth=2.0, foreground="#000000b0")])


def _draw_heat_scale(canvas: Canvas, x: float, y: float, height: float, limits: tuple[float, float]) -> None:
    place = np.linspace(1, 0, 256)
    opacity = _opacity(place)[:, None]
    canvas.image(x, y, 0.11, height, ((1 - opacity) * 0.6 + opacity * _heat_colours(place))[:, None, :])
    low, high = limits
    for step in range(5):
        sign = {0: "≥ ", 4: "≤ "}.get(step, "")
        canvas.text(x + 0.16, y + height * step / 4, f"{sign}{high - (high - low) * step / 4:.3g}", 7, colour=GREY)
