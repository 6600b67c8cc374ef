"""Methods that are as bad as they are told to be, for tests of sweeps: the larger `spoil`, the lower every AUROC."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from adgrid_example.methods import FeatureMean, TunedMean
from harness.contracts import Prediction, derive_seed

METHOD_VERSION = 1


class _Spoiled:
    """Turns the scores of a share of the images round."""

    def fit(self, train):
        if self.config.fit_note:
            with Path(self.config.fit_note).open("a") as file:
                file.write(f"{self.config.spoil} {','.join(self.context.categories)}\n")
        time.sleep(self.config.seconds)
        super().fit(train)

    def predict(self, batch):
        anomaly_map = super().predict(batch).anomaly_map
        turned = [derive_seed(sample.sample_id) < self.config.spoil * 2**63 for sample in batch.samples]
        anomaly_map = torch.where(torch.tensor(turned)[:, None, None], -anomaly_map, anomaly_map)
        return Prediction(anomaly_map=anomaly_map, image_score=anomaly_map.flatten(1).mean(dim=1))


class Spoiled(_Spoiled, FeatureMean):
    """Of the mean normal features."""

    summary = "toy: as bad as it is told to be"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        spoil: float = 0.0
        """Share of the images whose scores are turned round, in [0, 1]."""
        spare: int = 0
        """Changes the id and nothing else."""
        scale: float = 1.0
        seconds: float = 0.0
        """A fit takes so much longer."""
        fit_note: str = ""
        """File that remembers every fit."""

        def __post_init__(self):
            if not 0 <= self.spoil <= 1:
                raise ValueError(f"spoil must be in [0, 1], got {self.spoil}")


class SpoiledTuned(_Spoiled, TunedMean):
    """The same with a stage of training before the fit."""

    summary = "toy: as bad as it is told to be, after a training"

    @dataclass(frozen=True, kw_only=True)
    class Config(TunedMean.Config):
        spoil: float = 0.0
        seconds: float = 0.0
        fit_note: str = ""
