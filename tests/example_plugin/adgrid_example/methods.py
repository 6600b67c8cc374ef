"""The smallest methods of each shape: the distance of an image to the mean normal image."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
import torch

from harness.contracts import LevelChoice, Prediction, Trainable

METHOD_VERSION = 1


class _Mean:
    """What the toys share: a mean map of normal images; the anomaly map is the distance to it."""

    summary = "toy: distance to the mean normal image"
    scope = "category"
    backbone_use = "frozen"
    levels = LevelChoice(strides=(8,), taps=(1,))
    smoothing = 0.0
    score_reduction = "max"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        scale: float = 1.0
        """Factor on every distance, above 0."""

        def __post_init__(self):
            if self.scale <= 0:
                raise ValueError(f"scale must be above 0, got {self.scale}")

    @classmethod
    def inputs(cls, config):
        return "features"

    def __init__(self, config, context):
        self.config, self.context = config, context
        self.mean = torch.zeros(0)

    def maps(self, batch):
        return batch.levels[0].to(self.context.device)

    def fit(self, train):
        total = sum(self.maps(batch).sum(dim=0) for batch in train)
        self.mean = total / len(train)

    def predict(self, batch):
        distance = (self.maps(batch) - self.mean).norm(dim=1) * self.config.scale
        return Prediction(anomaly_map=distance)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class FeatureMean(_Mean):
    """Features, one fit per category, no image score of its own."""


class PixelMean(_Mean):
    """Images, no backbone, an image score of its own."""

    backbone_use = "none"

    @classmethod
    def inputs(cls, config):
        return "images"

    def maps(self, batch):
        return batch.images.to(self.context.device)

    def predict(self, batch):
        anomaly_map = super().predict(batch).anomaly_map
        return Prediction(anomaly_map=anomaly_map, image_score=anomaly_map.flatten(1).mean(dim=1))


class EncodedMean(_Mean):
    """Features or images that it encodes itself, by configuration."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        flip: bool = False
        """Also reads each image mirrored, so that it must encode images itself."""
        scale: float = 1.0

    @classmethod
    def inputs(cls, config):
        return "images" if config.flip else "features"

    def maps(self, batch):
        if batch.levels is not None:
            return super().maps(batch)
        images = batch.images.to(self.context.device)
        return (self.context.encode(images)[0] + self.context.encode(images.flip(-1))[0].flip(-1)) / 2


class DatasetMean(_Mean):
    """One fit for all categories of a dataset."""

    scope = "dataset"


class TunedMean(_Mean):
    """A private backbone, trained in a stage before the fit."""

    backbone_use = "trained"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        epochs: int = 1
        learning_rate: float = 1e-3
        scale: float = 1.0
        trouble: Literal["", "kill_once", "pause_once", "raise"] = ""
        """What befalls the second of two workers in the second epoch."""
        category: str = "middle"
        note: str = ""
        """File that remembers that it has happened."""

    @classmethod
    def inputs(cls, config):
        return "images"

    def stages(self):
        return [_Tuning(self.context, self.config)]

    def maps(self, batch):
        with torch.no_grad():
            return self.context.backbone(batch.images.to(self.context.device))[0]

    def state_dict(self):
        return {"mean": self.mean, **{f"backbone.{k}": v for k, v in self.context.backbone.state_dict().items()}}

    def load_state_dict(self, state):
        self.mean = state["mean"]
        prefix = "backbone."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.context.backbone.load_state_dict(own)


class _Tuning(Trainable):
    """Makes the features smaller."""

    name = "tuning"
    batch_size = 4

    def __init__(self, context, config):
        self.module, self.config, self.epochs = context.backbone, config, config.epochs
        self.in_trouble = config.category in context.categories
        self.watched, self.warnings = {"epoch": []}, ["the rate is high"] * (config.learning_rate > 0.5)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.module.parameters(), lr=self.config.learning_rate)]

    def begin_epoch(self, train, epoch):
        self.watched["epoch"].append(float(epoch))

    def losses(self, batch, share):
        if self.in_trouble and share.epoch == 1 and 0 not in share.positions:
            self.make_trouble()
        features = self.module(batch.images.to(next(self.module.parameters()).device))[0]
        yield features.square().flatten(1).mean(dim=1).sum() / share.num_images

    def make_trouble(self):
        if self.config.trouble == "raise":
            raise ValueError("the second worker has a problem of its own")
        if self.config.trouble.endswith("once") and not Path(self.config.note).exists():
            Path(self.config.note).write_text(ray.get_runtime_context().get_node_id())
            if self.config.trouble == "kill_once":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(120)
