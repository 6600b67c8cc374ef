"""ToCoAD: Liang et al., "ToCoAD: Two-Stage Contrastive Learning for Industrial Anomaly Detection", IEEE Transactions on
Instrumentation and Measurement 2025, arXiv 2407.01312.

A discriminative network learns to segment synthetic anomalies (stage I). It then guides the tuning of the backbone by
contrastive learning: views of a normal image shall agree, anomalies that the network sees shall not (stage II). Patch
features of the tuned backbone are scored by their distance to a memory bank of normal ones.

No official code is known, and the abstract and second-hand summaries were what could be read of the paper. These state:

- two stages and their order; the backbone WideResNet50, pretrained on ImageNet; a discriminative network that is the
  backbone inverted, trained on synthetic anomalies and frozen in stage II, where it gives the negatives;
- anomalies by Perlin noise (the best), CutPaste or seamless patches; focal loss with alpha 0.5 and gamma 2, better than
  cross-entropy;
- a loss like SimSiam's as the best form of bootstrap contrastive learning, on levels 3 and 4 of the backbone;
- a coreset memory bank, nearest neighbours, maps and image scores from the tuned backbone.

Everything else is ours, not the paper's, and a field of `Config` where it can be chosen:

- Stage I reads the frozen pretrained backbone; only the decoder learns. It has the backbone's widths and grids in
  reverse, bottleneck blocks, bilinear enlargement, and skips from every level; where the backbone's finest grid is
  coarser than 4 pixels (plain ViTs), it goes on to that. Its logits are enlarged to the image for the loss.
- Perlin anomalies are DRAEM's, on half of the images in stage I; on grey images their textures are grey. Stage II gives
  every image one.
- Views differ in colour and noise only, so that features are compared place by place.
- The term of the guide is max(0, cos(p_a, sg z) - margin), averaged over places with the guide's probability, averaged
  over the area of a place, as weight: p_a predicted from the anomalous view, z of the other, normal view at the same
  place. Both terms are means over levels.
- Backbone and heads have learning rates of their own, AdamW, half a cosine; batch norms of the backbone stay frozen.
- The memory bank is PatchCore's, on its levels 2 and 3 with its settings; with `stages: none` it is PatchCore.
- Image size, crop and smoothing (sigma 4 at 224 pixels) are PatchCore's too, and part of the protocol.

Stage I never depends on settings of stage II. All draws are made per image and epoch, and batch norms see the whole
batch, so that it does not matter how many workers share a training.

To reach: pixel AUROC 98.21, 98.43, 97.70 (%) on MVTec AD, VisA and BTAD, image AUROC 99.10 and 95.35 on the first two:
`search_spaces/tocoad_paper.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from harness.contracts import AdgridError, Batch, Context, Inputs, LevelChoice, Prediction, Split, Trainable
from methods.components.levels import collect_levels
from methods.components.memory_bank import MemoryBank
from methods.tocoad.contrastive import ContrastiveStage, ContrastNetwork
from methods.tocoad.discriminative import DiscriminativeNetwork, DiscriminativeStage, Guide
from methods.tocoad.norms import share_batch_norms
from methods.tocoad.settings import Config, choose_levels

METHOD_VERSION = 2

_Config = Config  # inside the class below, `Config` is its attribute


class ToCoAD:
    """A memory bank of features that were tuned away from synthetic anomalies."""

    summary = "memory bank of a backbone tuned against synthetic anomalies (ToCoAD, arXiv 2407.01312)"
    scope = "category"
    backbone_use = "trained"
    levels = LevelChoice(strides=(4, 8, 16, 32), taps=(0, 1, 2, 3))
    smoothing = 4.0
    score_reduction = "max"
    folders = ("textures",)
    Config = Config

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Images, unless nothing is trained."""
        return "features" if config.stages == "none" else "images"

    def __init__(self, config: _Config, context: Context) -> None:
        """Raises AdgridError if the levels that are read hold none of those to compare or remember."""
        self.config, self.context = config, context
        widths = [width for width, _, _ in context.level_shapes]
        self.guide: Guide | None = None
        """Judges images by the discriminative network; None without stage I."""
        self.network: ContrastNetwork | None = None
        """Holds the tuned backbone; None without stage II."""
        self.memory_levels = _some_levels("memory_levels", config.memory_levels, len(widths))
        self.memory = MemoryBank([widths[index] for index in self.memory_levels], config, context)
        if config.guided:
            assert context.encode is not None, "the backbone's use is declared"
            with _seeded(context, "decoder weights"):
                decoder = DiscriminativeNetwork(config, context)
            decoder = decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.guide = Guide(decoder.to(context.device).eval(), context.encode)
        if config.tuned:
            compared = _some_levels("contrast_levels", config.contrast_levels, len(widths))
            backbone = context.backbone
            if not config.freeze_batch_norm:
                share_batch_norms(backbone)
            with _seeded(context, "head weights"):
                network = ContrastNetwork(backbone, [widths[index] for index in compared], compared, config)
            self.network = network.to(context.device).eval()
        self._stages: list[Trainable] = []

    def stages(self) -> list[Trainable]:
        """Those that the configuration names. Raises AdgridError if the folder of textures is missing or empty."""
        if not self._stages:
            config, context = self.config, self.context
            if self.guide is not None:
                self._stages.append(DiscriminativeStage(self.guide.network, config, context))
            if self.network is not None:
                guide = self.guide if config.negative_weight > 0 else None
                self._stages.append(ContrastiveStage(self.network, guide, config, context))
        return list(self._stages)

    def fit(self, train: Split) -> None:
        """Fills the memory bank with features of the normal images."""
        if self.config.stages != "I":
            self.memory.fit(collect_levels(_Encoded(train, self)))

    @torch.no_grad()
    def encode(self, batch: Batch) -> tuple[Tensor, ...]:
        """The (B, D_l, h_l, w_l) levels of the memory bank, from the tuned backbone if there is one."""
        levels = batch.levels
        if levels is None:
            assert batch.images is not None, "the method asked for images"
            assert self.network is not None, "without stage II the method asks for features"
            levels = self.network.eval().backbone(batch.images.to(self.context.device))
        return tuple(levels[index] for index in self.memory_levels)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Distances to the memory bank; with stage I alone the discriminative network's probability at every pixel."""
        probability = None
        if self.guide is not None and (self.config.stages == "I" or self.config.guide_score > 0):
            assert batch.images is not None, "the method asked for images"
            probability = self.guide(batch.images.to(self.context.device))
        if self.config.stages == "I":
            assert probability is not None
            return Prediction(anomaly_map=probability)
        factor = None if probability is None else 1 + self.config.guide_score * probability
        anomaly_map, image_score = self.memory.score(self.encode(batch), factor)
        return Prediction(anomaly_map=anomaly_map, image_score=image_score)

    def state_dict(self) -> dict[str, Tensor]:
        """Whatever predictions are made from: memory bank, tuned backbone, discriminative network."""
        state = {} if self.config.stages == "I" else {"memory_bank": self.memory.entries}
        for part, module in self._parts().items():
            state |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the state of a method with the same configuration and level shapes."""
        for part, module in self._parts().items():
            prefix = f"{part}."
            own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            module.load_state_dict(own)
        if self.config.stages != "I":
            self.memory.restore(state["memory_bank"])

    def _parts(self) -> dict[str, nn.Module]:
        """The networks that predictions need."""
        parts: dict[str, nn.Module] = {}
        if self.network is not None:
            parts["backbone"] = self.network.backbone
        if self.guide is not None and (self.config.stages == "I" or self.config.guide_score > 0):
            parts["discriminative"] = self.guide.network
        return parts


class _Encoded:
    """A split as the levels of the memory bank."""

    def __init__(self, split: Split, method: ToCoAD) -> None:
        self._split, self._method = split, method
        self.samples = split.samples

    def __len__(self) -> int:
        return len(self._split)

    def __iter__(self) -> Iterator[Batch]:
        return map(self._encode, self._split)

    def take(self, indices: Sequence[int]) -> Batch:
        return self._encode(self._split.take(indices))

    def _encode(self, batch: Batch) -> Batch:
        return Batch(samples=batch.samples, levels=self._method.encode(batch))


def _some_levels(field: str, positions: tuple[int, ...], num_levels: int) -> list[int]:
    """Indices of the wanted levels that are there. Raises AdgridError if there are none."""
    chosen = choose_levels(positions, num_levels)
    if not chosen:
        raise AdgridError(
            f"tocoad: {field} {list(positions)} names none of the {num_levels} levels that are read; "
            f"name positions from 1 to {num_levels}, or from -1 backwards"
        )
    return chosen


@contextmanager
def _seeded(context: Context, name: str) -> Iterator[None]:
    """First weights that depend on the name of the draw alone, and leave all other draws as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed_of(f"tocoad {name}"))
        yield


METHOD = ToCoAD
