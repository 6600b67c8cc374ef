"""A trained representation: features less the mean token of the references, times a factor that is learnt."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
import torch
from torch import nn

from harness.contracts import LevelChoice, Trainable

REPRESENTATION_VERSION = 1


class Scaled:
    """Learns a factor that makes labelled anomalies as large as it is told."""

    summary = "toy: features less a mean, times a factor"
    levels = LevelChoice(strides=(8,), taps=(1,))

    @dataclass(frozen=True, kw_only=True)
    class Config:
        epochs: int = 2
        learning_rate: float = 0.1
        trouble: Literal["", "kill_once", "pause_once", "raise"] = ""
        """What befalls a worker in the second epoch: the second of several, or the only one."""
        note: str = ""
        """File that remembers that it has happened."""

    def __init__(self, factor):
        self.factor = factor

    @classmethod
    def pretraining(cls, config, context, references, input_scale, pool=None):
        return _Scaling(config, context, references)

    @classmethod
    def from_state(cls, config, state, levels, where):
        return cls(state["factor"])

    @classmethod
    def read_checkpoint(cls, path):
        return {"factor": torch.tensor(float(Path(path).read_text()))}

    def to(self, device):
        return self

    def apply(self, levels, reference):
        return tuple(
            (level - tokens.mean(dim=0).view(1, -1, 1, 1)) * self.factor
            for level, tokens in zip(levels, reference, strict=True)
        )


class _Scaling(Trainable):
    name = "scaling"
    batch_size = 4

    def __init__(self, config, context, references):
        self.config, self.context, self.epochs = config, context, config.epochs
        self.module = nn.ParameterDict({"factor": nn.Parameter(torch.ones(()))})
        mean = sum(references.take([place]).levels[0].mean() for place in range(len(references))) / len(references)
        self.mean = mean.item()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.module.parameters(), lr=self.config.learning_rate)]

    def losses(self, batch, share):
        if share.epoch == 1 and (0 not in share.positions or share.num_images == len(share.positions)):
            self.make_trouble()
        sizes = (self.context.encode(batch.images)[0] - self.mean).flatten(1).norm(dim=1)
        wanted = 1 + batch.labels + batch.masks.flatten(1).float().mean(dim=1)
        yield (self.module["factor"] * sizes - wanted).square().sum() / share.num_images

    def make_trouble(self):
        if self.config.trouble == "raise":
            raise ValueError("the pretraining has a problem")
        if self.config.trouble.endswith("once") and not Path(self.config.note).exists():
            Path(self.config.note).write_text(ray.get_runtime_context().get_node_id())
            if self.config.trouble == "kill_once":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(120)
