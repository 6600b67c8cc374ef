"""GLASS: Chen et al., "A Unified Anomaly Synthesis Strategy with Gradient Ascent for Industrial Anomaly Detection and
Localization", ECCV 2024, arXiv 2407.09359.

A small network tells features of normal patches from synthetic anomalies, and its output is the score. Global anomalies
are normal features with noise, moved towards where the network takes them for normal and held at a distance from
normality; local anomalies are features of images with textures painted in.

`Config()` is what the official code (cqylunlun/GLASS, `run-mvtec.sh`) runs but for its foreground masks: PatchCore's
patch features of two levels in 1536 numbers. Its hypothesis on where normal features lie comes from a table per
category that the code made by judging the spectrum of the mean training image; `distribution: auto` does that anew.

Differences from the paper and its code:

- The state after the last epoch is kept unless the protocol says otherwise; theirs is the epoch with the best image
  plus pixel AUROC on the test set.
- No foreground masks unless a folder is given; the code's runs paint on published masks of the objects.
- Normal images are encoded once, as their features never change. The adaptor is linear, so the class centre of an epoch
  is the adapted mean feature; it is a mean over images where theirs is one over batches, the last of them smaller.
- Losses are computed from logits: no saturated sigmoid, and no labels smoothed by 1e-5 in the focal loss.
- The discriminator's layers have no bias: the batch norms after them would take it away, and the last has none.
- Backbones with levels too narrow to fill 1536 numbers average patches and lay levels end to end, as `patchcore` does.
- Painted textures are changed by DRAEM's ten operations; the code has nine others of like kinds from torchvision.
- An image for which many Perlin masks in a row were empty is left unpainted; theirs draws without end.
- Quantiles and batch statistics are those of the whole batch, however many workers share it.

To reach: image AUROC 99.9, pixel AUROC 99.3 (%) on MVTec AD with WideResNet50, layers 2 and 3, at 288 pixels (`wood`
and `toothbrush` resized to 329 and cropped), with foreground masks and the epoch picked on test data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.contracts import Batch, Context, Inputs, LevelChoice, Prediction, Split, Trainable
from methods.glass.encoder import PatchEncoder
from methods.glass.network import Network
from methods.glass.settings import Config
from methods.glass.stage import GlassStage

METHOD_VERSION = 1

_Config = Config  # inside the class below, `Config` is its attribute


class Glass:
    """A discriminator of patch features, trained on normal images and anomalies made of them."""

    summary = "discriminator trained with global and local synthetic anomalies (GLASS, arXiv 2407.09359)"
    scope = "category"
    backbone_use = "frozen"
    levels = LevelChoice(strides=(8, 16), taps=(-2, -1))
    smoothing = 4.0 * 224 / 288  # 4 pixels at the paper's 288
    score_reduction = "max"
    folders = ("textures", "foreground_masks")
    Config = Config
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "adpretrain_plain": {"distribution": "hypersphere", "adaptor": True, "noise": 0.015},
        "adpretrain_projected": {"distribution": "hypersphere", "adaptor": False, "noise": 0.005},
    }
    """What ADPretrain (arXiv 2511.05245) changes for plain features and for those of its projector, at 224 pixels."""

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Images, as anomalies are painted into them."""
        return "images"

    def __init__(self, config: _Config, context: Context) -> None:
        self.config, self.context = config, context
        self.encoder = PatchEncoder(config, context)
        self.network = Network(self.encoder.width, config, context).to(context.device)

    def stages(self) -> list[Trainable]:
        """The one stage, which trains the network."""
        return [GlassStage(self.network, self.encoder, self.config, self.context)]

    def fit(self, train: Split) -> None:
        """Nothing is left to do after training."""

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """How anomalous the discriminator finds every patch, in [0, 1]; the image score is the largest of them."""
        assert batch.images is not None, "the method asked for images"
        network = self.network.eval()
        features = network.adapt(self.encoder.patches(self.encoder.levels(batch.images)))
        scores = network.judge(network.first(features)).sigmoid()
        return Prediction(anomaly_map=scores.unflatten(1, self.encoder.grid), image_score=scores.amax(dim=1))

    def state_dict(self) -> dict[str, Tensor]:
        """The trained network."""
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the network of a method with the same configuration and level shapes."""
        self.network.load_state_dict(state)


METHOD = Glass
