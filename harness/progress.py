"""What a person sees while trials run: a live board in a terminal, one line per cell anywhere else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from harness.contracts import Job, Pretraining, ResultRow, Trial
from harness.matrices import varied_params
from harness.notes import Loss


def find_varied(trials: Iterable[Job]) -> dict[str, list[str]]:
    """By method, the parameters that have several values, but for those that are searched: these tell themselves."""
    configurations = []
    for trial in trials:
        if isinstance(trial, Trial):
            searched = () if trial.tuned is None else trial.tuned.fields
            configurations.append((trial.method, {key: trial.params[key] for key in trial.params.keys() - searched}))
    varied: dict[str, list[str]] = {}
    for method, name in sorted(varied_params(configurations)):
        varied.setdefault(method, []).append(name)
    return varied


def describe(trial: Job, varied: Mapping[str, Sequence[str]] | None = None) -> str:
    """`patchcore · tf_efficientnet_lite0 · elpv`, with shots, seed and searched values where there are any.

    Args:
        trial: what is described.
        varied: see `find_varied`; their values tell trials of one method apart.
    """
    if isinstance(trial, Pretraining):
        return " · ".join([trial.kind, trial.backbone, *(choice.dataset.name for choice in trial.data)])
    parts = [trial.method, trial.backbone or "no backbone", trial.dataset.name]
    if trial.representation != "plain":
        parts.insert(2, trial.representation)
    if trial.shots is not None:
        parts.append(f"{trial.shots} shots")
    if trial.seed:
        parts.append(f"seed {trial.seed}")
    parts += [f"{name} {_show(trial.params[name])}" for name in (varied or {}).get(trial.method, ())]
    if trial.tuned is not None:
        values = [f"{field} {_show(trial.params[field])}" for field in trial.tuned.fields]
        parts += [", ".join(values)] if trial.tuned.is_sample else ["tuned"]
    return " · ".join(parts)


def _show(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_seconds(seconds: float) -> str:
    """`0:42`, `12:07` or `3:05:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Listener:
    """Told what happens while trials run, in the driver's own thread; subclasses override what they care for."""

    def started(self, trial: Job) -> None:
        """A trial or a pretraining got its worker."""

    def noted(self, trial: Job, category: str, stage: str, done: int, total: int) -> None:
        """Progress inside a cell or a pretraining."""

    def trained(self, trial: Job, losses: Sequence[Loss]) -> None:
        """New points of the curves of a trial or a pretraining, in order."""

    def finished(self, trial: Trial, row: ResultRow) -> None:
        """A row was saved."""

    def ended(self, trial: Job) -> None:
        """A trial has no more cells to run, or a pretraining has ended."""


class ProgressBoard(Listener):
    """Trials and cells done, running and failed, what each running trial is doing, and the time left."""

    def __init__(
        self,
        console: Console,
        num_cells: int,
        num_done: int,
        num_trials: int,
        varied: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Args: where to draw; cells of the plan and how many rows exist already; trials that will run; what tells
        them apart, see `find_varied`."""
        self._varied = varied
        self._console = console
        self._num_cells, self._num_kept, self._num_trials = num_cells, num_done, num_trials
        self._counts: Counter[str] = Counter()
        self._running: dict[str, tuple[Job, str]] = {}
        self._ended: set[str] = set()
        self._start = time.monotonic()
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> ProgressBoard:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def started(self, trial: Job) -> None:
        self._running[trial.trial_id] = (trial, "starting")

    def noted(self, trial: Job, category: str, stage: str, done: int, total: int) -> None:
        share = f" {done}/{total}" if total > 1 else ""
        self._running[trial.trial_id] = (trial, f"{category}: {stage}{share}")

    def finished(self, trial: Trial, row: ResultRow) -> None:
        self._counts[row.status] += 1
        named = describe(trial, self._varied)
        if row.status == "ok":
            shown = [
                f"{name} {row.metrics[name]:.1%}" for name in ("image_auroc", "pixel_auroc") if name in row.metrics
            ]
            text = Text.assemble(("✓ ", "green"), f"{named} · {row.category}  ", ("  ".join(shown), "bold"))
        elif row.status == "stopped":
            text = Text(f"◦ {named} · {row.category}  {row.reason}", style="dim")
        else:
            text = Text.assemble(
                (f"✗ {row.status} ", "red"), f"{named} · {row.category}  ", (row.reason.split("\n")[0], "red")
            )
        count = Text(f"[{self._num_kept + self._counts.total()}/{self._num_cells}] ", style="dim")
        self._console.print(count + text, soft_wrap=True, highlight=False)

    def ended(self, trial: Job) -> None:
        self._running.pop(trial.trial_id, None)
        self._ended.add(trial.trial_id)

    def _draw(self) -> RenderableType:
        done = self._num_kept + self._counts.total()
        elapsed = time.monotonic() - self._start
        left = "estimating"
        if self._counts.total():
            left = describe_seconds(elapsed / self._counts.total() * (self._num_cells - done))
        head = Text.assemble(
            ("cells ", "dim"),
            (f"{done}/{self._num_cells}", "bold"),
            (" · failed ", "dim"),
            (str(self._counts["failed"]), "bold red" if self._counts["failed"] else "bold"),
            (" · trials ", "dim"),
            (f"{len(self._ended)}/{self._num_trials}", "bold"),
            (f" done, {len(self._running)} running · {describe_seconds(elapsed)} so far · left ", "dim"),
            (left, "bold"),
        )
        table = Table.grid(padding=(0, 2))
        for trial, doing in self._running.values():
            table.add_row(Text("  ▸ " + describe(trial, self._varied), style="cyan"), Text(doing))
        board = Table.grid()  # a bar ends no line of its own, a row does
        for part in (head, ProgressBar(total=max(self._num_cells, 1), completed=done, width=72), table):
            board.add_row(part)
        return board
