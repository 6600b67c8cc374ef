"""A method together with its data: builds it, trains and fits it, predicts test images, and measures the cost."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from harness.backbones import FrozenBackbone, level_shapes, trainable_backbone
from harness.contracts import Cell, Context, Resources, RunSettings, Sample, SampleKey, Split, derive_seed
from harness.feature_store import FeatureStore
from harness.features import feature_keys, feature_split
from harness.identity import content_id
from harness.image_split import ImageSplit
from harness.measure import Meter
from harness.resolve import CategoryData, ResolvedTrial
from harness.stages import seed_everything, train_stage
from harness.store import Store, StoredPrediction

Notify = Callable[[str, str, int, int], None]
"""Progress inside a cell: (category, what is being done, done, in all)."""


class ScoreError(ValueError):
    """A method gave scores that are not finite numbers."""


class FittedMethod:
    """A method fitted to the training images of a group of cells, ready to predict their test images."""

    def __init__(
        self,
        resolved: ResolvedTrial,
        data: Mapping[str, CategoryData],
        store: Store,
        settings: RunSettings,
        notify: Notify,
    ) -> None:
        """Builds the method, trains its stages if it has any, and fits it.

        Args:
            resolved: the trial.
            data: the images of each category of the group.
            store: where trained stages are kept.
            settings: caches and sizes.
            notify: told about progress.
        """
        trial = resolved.trial
        self._resolved, self._data, self._store, self._settings = resolved, data, store, settings
        self._notify = partial(notify, ", ".join(data) if len(data) < 3 else f"{len(data)} categories")
        self._device = pick_device(trial.resources)
        self._encoder: FrozenBackbone | None = None
        self._meter = Meter(self._device)
        self._extracted = 0
        self._features = FeatureStore(
            settings.places.cache_dir, int(settings.cache_gib * 2**30), on_note=lambda text: self._notify(text, 0, 1)
        )
        seeded = (trial.dataset.name, *data, trial.shots, trial.seed)
        backbone, size = resolved.backbone, resolved.preprocessing.image_size
        context = Context(
            level_shapes=() if backbone is None else level_shapes(backbone, trial.layers, size),
            image_size=size,
            categories=tuple(data),
            device=self._device,
            seed_of=lambda name: derive_seed(name, *seeded),
            encode=None if backbone is None else self._encode,
            make_backbone=self._trainable if resolved.method.backbone_use == "trained" else None,
        )
        samples = [sample for category in data.values() for sample in category.train]
        train = self._split(samples, "train", self._meter)
        self._notify("fitting", 0, 1)
        with self._meter.timed("fit_seconds"):
            seed_everything(context.seed_of("everything else"))
            self._method = resolved.method(resolved.config, context)
            if hasattr(self._method, "stages"):
                self._train_stages(train, context.seed_of("epoch order"))
            seed_everything(context.seed_of("fit"))
            self._method.fit(train)
        self._num_train = len(train)
        if settings.save_fitted:
            store.publish_state(self.artifact_id("fitted"), self._method.state_dict())

    def artifact_id(self, name: str) -> str:
        """Where the fitted method (`fitted`) or a trained stage is kept: by everything its numbers depend on."""
        cells = [cell for cell in self._resolved.trial.cells if cell.category in self._data]
        return content_id([name, [cell.prediction_id for cell in cells]])

    def predict(self, cell: Cell) -> StoredPrediction:
        """Raw predictions for the test images of one category, saved unless they are too large."""
        meter = self._meter.copy()
        test = self._split(self._data[cell.category].test, "test", meter)
        maps: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        done, batches = 0, iter(test)
        while True:
            with meter.timed("read_seconds"):
                batch = next(batches, None)
            if batch is None:
                break
            with meter.timed("predict_seconds"), torch.inference_mode():
                prediction = self._method.predict(batch)
                maps.append(prediction.anomaly_map.float().cpu().numpy())
                if prediction.image_score is not None:
                    scores.append(prediction.image_score.float().cpu().numpy())
            done += len(batch)
            self._notify("predicting", done, len(test))
        costs = meter.costs()
        costs["images_per_second"] = round(done / max(costs["predict_seconds"] + costs["read_seconds"], 1e-9), 2)
        costs |= {"train_images": self._num_train, "test_images": done, "extracted_images": self._extracted}
        _check_finite(test.samples, maps, scores, self._resolved.trial.method)
        result = StoredPrediction(
            paths=tuple(sample.path for sample in test.samples),
            anomaly_maps=np.concatenate(maps),
            image_scores=np.concatenate(scores) if scores else None,
            facts={"costs": costs, "own_image_score": bool(scores), **self._machine()},
        )
        if result.anomaly_maps.nbytes <= self._settings.prediction_mib * 2**20:
            self._store.publish_prediction(cell.prediction_id, result)
        return result

    def _split(self, samples: Sequence[Sample], split: str, meter: Meter) -> Split:
        """The images as this method wants them; features come from the store and are extracted once if missing."""
        resolved, trial = self._resolved, self._resolved.trial
        hashes = {path: digest for category in self._data.values() for path, digest in category.hashes.items()}
        if resolved.backbone is None or resolved.method.inputs(resolved.config) == "images":
            with meter.timed("decode_seconds"):
                return ImageSplit(
                    samples,
                    resolved.preprocessing,
                    batch_size=self._settings.batch_size,
                    hashes=hashes,
                    dataset=trial.dataset.name,
                    store=self._features,
                    on_progress=lambda done, total: self._notify(f"decoding {split} images", done, total),
                )
        with meter.timed("extract_seconds"):
            features = feature_split(
                samples,
                hashes,
                dataset=trial.dataset.name,
                split=split,
                resolved=resolved.backbone,
                layers=trial.layers,
                also_layers=trial.also_layers,
                preprocessing=resolved.preprocessing,
                store=self._features,
                encoder_factory=self._encoder_of,
                batch_size=self._settings.batch_size,
                device=self._device,
                on_progress=lambda done, total: self._notify(f"extracting {split} features", done, total),
            )
        self._extracted += features.num_extracted
        return features

    def _encoder_of(self, layers: tuple[str, ...]) -> FrozenBackbone:
        assert self._resolved.backbone is not None
        return FrozenBackbone(
            self._resolved.backbone, layers, self._device, image_size=self._resolved.preprocessing.image_size
        )

    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Built when a method first encodes an image itself: most read stored features and never need it.
        if self._encoder is None:
            self._encoder = self._encoder_of(self._resolved.trial.layers)
        return self._encoder.encode(images)

    def _trainable(self) -> torch.nn.Module:
        assert self._resolved.backbone is not None
        return trainable_backbone(
            self._resolved.backbone,
            self._resolved.trial.layers,
            self._device,
            image_size=self._resolved.preprocessing.image_size,
        )

    def _train_stages(self, train: Split, seed: int) -> None:
        """Trains the stages in order; one that was trained before on the same data is loaded instead."""
        for stage in self._method.stages():
            artifact = self.artifact_id(stage.name)
            state = self._store.load_state(artifact)
            if state is not None:
                stage.load_state_dict(state)
                continue

            def report(done: int, total: int, loss: float, name: str = stage.name) -> None:
                self._notify(f"{name}, loss {loss:.4g}, epoch", done, total)

            seed_everything(derive_seed(seed, stage.name))
            train_stage(stage, train, seed, device=self._device, report=report)
            self._store.publish_state(artifact, stage.state_dict())

    def _machine(self) -> dict[str, str]:
        name = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else platform.machine()
        return {"device": self._device.type, "device_name": name}


def pick_device(resources: Resources) -> torch.device:
    """The accelerator where a trial asks for one, else the processor. Raises RuntimeError if torch sees none."""
    if resources.gpu == 0:
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        raise RuntimeError(
            f"resources.gpu is {resources.gpu:g} but torch {torch.__version__} sees no accelerator on this node; "
            f"install a build of torch for it, or set resources.gpu to 0"
        )
    return device


def is_being_extracted(resolved: ResolvedTrial, category: str, settings: RunSettings) -> bool:
    """Whether another process of this node extracts the features of a category at this moment."""
    if resolved.backbone is None or resolved.method.inputs(resolved.config) == "images":
        return False
    store = FeatureStore(settings.places.cache_dir)
    keys = [
        key
        for split in ("train", "test")
        for key in feature_keys(
            dataset=resolved.trial.dataset.name,
            category=category,
            split=split,
            resolved=resolved.backbone,
            layers=resolved.trial.layers,
            preprocessing=resolved.preprocessing,
        ).values()
    ]
    return any(store.being_extracted(key) for key in keys)


def _check_finite(
    samples: Sequence[SampleKey], maps: Sequence[np.ndarray], scores: Sequence[np.ndarray], method: str
) -> None:
    finite = np.concatenate([np.isfinite(rows).all(axis=(1, 2)) for rows in maps])
    if scores:
        finite &= np.isfinite(np.concatenate(scores))
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ScoreError(f"{method} gave NaN or infinite scores for {len(bad)} images, first {samples[bad[0]].path}")
