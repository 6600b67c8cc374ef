"""Result rows with image scores behind them, for the tests of comparisons."""

import dataclasses

import numpy as np
from toy_rows import toy_row

from harness.bundle import ImageScores
from harness.contracts import derive_seed
from harness.metrics import image_metrics

NUM_NORMAL, NUM_ANOMALOUS = 40, 60


class Scored:
    """Draws image scores for rows and keeps them by cell id, as a store does."""

    def __init__(self):
        self.scores = {}

    def __call__(self, shift=1.0, run="a", noise=0.3, category="bolt", **changes):
        """A finished row whose anomalous images lie `shift` above the normal ones.

        Rows share what is hard about an image; `noise` is a row's own, drawn for its run, axes and seed.
        """
        label = np.repeat([1, 0], [NUM_ANOMALOUS, NUM_NORMAL])
        row = toy_row(0.5, category=category, **changes)
        shared = np.random.default_rng(derive_seed(row.dataset, category)).normal(size=label.size)
        own = np.random.default_rng(derive_seed(run, row.cell_id)).normal(size=label.size)
        score = shared + noise * own + shift * label
        row = dataclasses.replace(
            row,
            cell_id=f"{run}-{row.cell_id}",
            prediction_id=f"{run}-{row.prediction_id}",
            metrics=image_metrics(score, label),
        )
        images = tuple(f"{'bad' if flag else 'good'}/{place:03}.png" for place, flag in enumerate(label))
        self.scores[row.cell_id] = ImageScores(images, label, score)
        return row

    def load(self, cell_id):
        return self.scores.get(cell_id)
