"""What a study hears of a sample while it runs, and how a sample ends early."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


class Stopped(BaseException):
    """The study ends this trial; like a keyboard interrupt that is no error of the trial."""


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How closely a trial is watched; a watched trial takes its categories in their order, whatever else runs."""

    objective: str
    """Metric of the looks."""
    by_epochs: bool = False
    """Whether one training covers all categories, so that there is one final score."""
    first_look: int | None = None
    """Epochs of the last stage before the objective is looked at; None looks at finished categories only."""
    factor: float = 2.0
    """The looks after the first are so many times further each."""

    def is_due(self, done: int, epochs: int) -> bool:
        """Whether to look at the objective after so many epochs; never after the last, whose rows come next."""
        if self.first_look is None or not self.first_look <= done < epochs:
            return False
        # The looks come at the rungs of successive halving, rounded up to whole epochs.
        steps = math.log(done / self.first_look) / math.log(self.factor)
        return any(
            math.ceil(self.first_look * self.factor**rung - 1e-9) == done
            for rung in range(int(steps) - 1, int(steps) + 2)
            if rung >= 0
        )


@dataclass(frozen=True, kw_only=True)
class Observer:
    """A watch together with whom to tell; the leader of several workers calls it, and all go by its answer."""

    watch: Watch
    tell: Callable[[int, float], None] = lambda *_: None
    """Told (epochs done, objective) at every look; may raise to end the trial of a process alone."""
    goes_on: Callable[[], bool] = lambda: True
    """Asked after each look and between categories."""
