"""A method that goes wrong on purpose, in one category, in each way that a harness must survive."""

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from adgrid_example.methods import FeatureMean
from harness.contracts import Prediction

METHOD_VERSION = 1


def fill_disk():
    """From now on this process can rename no file, as on a disk that is full."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.replace = full


class Broken(FeatureMean):
    """The mean method, until it reads the unlucky category."""

    summary = "toy: goes wrong in one category"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        how: Literal["fit", "predict", "nan", "kill", "kill_once", "slow", "memory", "count", "full_once"] = "fit"
        category: str = ""
        """Category in which it goes wrong; `any` for all of them."""
        note: str = ""
        """File that remembers how often it was fitted there."""
        seconds: float = 60.0
        """How long a slow fit takes."""
        scale: float = 1.0

    @property
    def is_unlucky(self):
        return self.config.category == "any" or self.context.categories == (self.config.category,)

    def fit(self, train):
        super().fit(train)
        if not self.is_unlucky:
            return
        if self.config.note:
            with Path(self.config.note).open("a") as file:
                file.write(f"fit with {torch.get_num_threads()} threads\n")
        if self.config.how == "fit":
            raise RuntimeError("the fit was told to fail")
        if self.config.how == "memory":
            raise MemoryError("cannot allocate")
        first = self.config.note and Path(self.config.note).read_text().count("fit") == 1
        if self.config.how == "kill" or (self.config.how == "kill_once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.config.how == "slow":
            time.sleep(self.config.seconds)
        if self.config.how == "full_once" and first:
            fill_disk()

    def predict(self, batch):
        prediction = super().predict(batch)
        if not self.is_unlucky:
            return prediction
        if self.config.how == "predict":
            raise RuntimeError("the prediction was told to fail")
        if self.config.how == "nan":
            return Prediction(anomaly_map=torch.full_like(prediction.anomaly_map, float("nan")))
        return prediction
