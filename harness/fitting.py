"""A method together with its data: builds it, trains and fits it, predicts test images, and measures the cost."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch

from harness.backbones import FrozenBackbone, level_shapes, trainable_backbone
from harness.checkpoints import StoredCheckpoints
from harness.contracts import (
    Cell,
    Context,
    Resources,
    RunSettings,
    Sample,
    SampleKey,
    Split,
    Trainable,
    TransductiveMethod,
    derive_seed,
)
from harness.evaluate import evaluate
from harness.feature_store import FeatureStore
from harness.features import FeatureSplit, feature_keys, feature_split
from harness.identity import content_id
from harness.image_split import ImageSplit
from harness.measure import Meter
from harness.metrics import METRICS
from harness.notes import Loss, Notify
from harness.quantisation import quantise
from harness.represented import RepresentedFeatures, load_representation_state
from harness.resolve import CategoryData, ResolvedTrial, prediction_facts
from harness.stages import Judge, seed_everything, train_stage
from harness.store import Store, StoredPrediction, StoredTraining
from harness.truth import load_truth
from harness.watch import Observer, Stopped
from harness.workers import ALONE, Workers

MAX_TEST_EVALUATIONS = 100
"""How often at most a state picked on test data is looked for in one training."""
_BARS = "▁▂▃▄▅▆▇█"


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
        workers: Workers = ALONE,
        observer: Observer | None = None,
    ) -> None:
        """Builds the method, trains its stages if it has any, and fits it.

        Args:
            resolved: the trial.
            data: the images of each category of the group.
            store: where trained stages are kept.
            settings: caches and sizes.
            notify: told about progress.
            workers: the processes that do this together; each ends with the same fitted method.
            observer: looks at the objective while the last stage is trained, and may end the trial.
        """
        trial = resolved.trial
        self._resolved, self._data, self._store, self._settings = resolved, data, store, settings
        self._workers, self._observer = workers, observer
        self.curves: dict[str, Sequence[float]] = {}
        """Mean loss of every epoch, per trained stage, and what else the stages watched."""
        self.warnings: list[str] = []
        """What the trained stages say that a reader must be told."""
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
            resize=resolved.preprocessing.resize,
            categories=tuple(data),
            device=self._device,
            seed_of=lambda name: derive_seed(name, *seeded),
            encode=None if backbone is None else self._encode,
            make_backbone=self._trainable if resolved.method.backbone_use == "trained" else None,
        )
        self._represented = self._load_representation()
        samples = [sample for category in data.values() for sample in category.train]
        if self._represented is not None:
            samples = self._represented.fit_images(samples)
        train = self._shared_split(samples, "train")
        self._notify("fitting", 0, 1)
        with self._meter.timed("fit_seconds"):
            seed_everything(context.seed_of("everything else"))
            self._method = resolved.method(resolved.config, context)
            if hasattr(self._method, "stages"):
                self._train_stages(train, context.seed_of("epoch order"))
            seed_everything(context.seed_of("fit"))
            self._method.fit(train)
        self._num_train = len(train)
        if settings.save_fitted and workers.leads:
            store.publish_state(self.artifact_id("fitted"), self._method.state_dict())

    def artifact_id(self, name: str, fields: Sequence[str] | None = None) -> str:
        """Where the fitted method (`fitted`) or a trained stage is kept: by everything its numbers depend on.

        Args:
            name: of the stage.
            fields: the configuration fields it depends on; None for all.
        """
        trial = self._resolved.trial
        params = {key: value for key, value in trial.params.items() if fields is None or key in fields}
        images = [data.images_id for data in self._data.values()]
        return content_id([name, prediction_facts(self._resolved, params), list(self._data), images])

    def predict(self, cell: Cell) -> StoredPrediction | None:
        """Raw predictions for the test images of one category, saved unless they are too large.

        Each worker predicts its share of the images; the leader has all of them, the others get None.
        """
        meter = self._meter.copy()
        samples, workers = self._data[cell.category].test, self._workers
        warnings = list(self.warnings)
        if self._observe_test(samples, meter):
            warnings.append("normalised by test images")
        maps, scores = self._predict_together(samples, meter)
        if not workers.leads:
            return None
        costs = meter.costs()
        costs["images_per_second"] = round(len(maps) / max(costs["predict_seconds"] + costs["read_seconds"], 1e-9), 2)
        costs |= {
            "train_images": self._num_train,
            "test_images": len(maps),
            "extracted_images": self._extracted,
            "workers": workers.size,
        }
        _check_finite(samples, maps, scores, self._resolved.trial.method)
        result = StoredPrediction(
            paths=tuple(sample.path for sample in samples),
            maps=quantise(maps),
            image_scores=scores,
            facts={
                "costs": costs,
                "own_image_score": scores is not None,
                "curves": self.curves,
                "warnings": warnings,
                **self._machine(),
            },
        )
        if result.maps.nbytes <= self._settings.prediction_mib * 2**20:
            self._store.publish_prediction(cell.prediction_id, result)
        return result

    def _observe_test(self, samples: Sequence[Sample], meter: Meter) -> bool:
        """Shows a method all test images of a category, if it normalises by them; whether it did."""
        method = self._method
        if not isinstance(method, TransductiveMethod) or not method.observes_test():
            return False
        test = self._split(samples, "test", meter)
        with meter.timed("predict_seconds"):
            method.observe_test(test)
        return True

    def _predict_together(self, samples: Sequence[Sample], meter: Meter) -> tuple[np.ndarray, np.ndarray | None]:
        """Maps (N, h, w) and scores (N,), if the method gives any, of all images at the leader; nothing at others."""
        rank, size = self._workers.rank, self._workers.size
        shares = self._workers.collect(self._predict_share(samples[rank::size], meter) if rank < len(samples) else None)
        told = [share for share in shares if share is not None]
        scores = [scores for _, scores in told if scores is not None]
        return interleave([maps for maps, _ in told]), interleave(scores) if scores else None

    def _predict_share(self, samples: Sequence[Sample], meter: Meter) -> tuple[np.ndarray, np.ndarray | None]:
        """The same for this worker's images."""
        test = self._split(samples, "test", meter)
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
        return np.concatenate(maps), np.concatenate(scores) if scores else None

    def _shared_split(self, samples: Sequence[Sample], split: str) -> Split:
        """The images, on every worker; those of one node first compute the features of a share each."""
        if self._workers.local_size > 1:
            self._split(samples[self._workers.local_rank :: self._workers.local_size], split, self._meter)
            self._workers.wait()
        return self._split(samples, split, self._meter)

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
            features = self._plain_split(samples, split)
        self._extracted += features.num_extracted
        if self._represented is None:
            return features
        with meter.timed("represent_seconds"):
            return self._represented.split(
                features, lambda done, total: self._notify(f"{trial.representation} of {split} features", done, total)
            )

    def _plain_split(self, samples: Sequence[Sample], split: str) -> FeatureSplit:
        resolved, trial = self._resolved, self._resolved.trial
        assert resolved.backbone is not None, "features come from a backbone"
        return feature_split(
            samples,
            {path: digest for category in self._data.values() for path, digest in category.hashes.items()},
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

    def _load_representation(self) -> RepresentedFeatures | None:
        trial = self._resolved.trial
        if trial.trained is None:
            return None
        trained = load_representation_state(trial.trained, trial.layers, self._store).to(self._device)
        self._remember(self._store.load_training(trial.trained.artifact_id))
        return RepresentedFeatures(trial.trained, trained, trial.dataset.name, self._data, self._plain_split)

    def _encoder_of(self, layers: tuple[str, ...]) -> FrozenBackbone:
        assert self._resolved.backbone is not None
        return FrozenBackbone(
            self._resolved.backbone, layers, self._device, image_size=self._resolved.preprocessing.image_size
        )

    def _encode(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Built when a method first encodes an image itself: most read stored features and never need it.
        if self._encoder is None:
            self._encoder = self._encoder_of(self._resolved.trial.layers)
        levels = self._encoder.encode(images)
        return levels if self._represented is None else self._represented.apply(levels)

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
        stages = self._method.stages()
        for number, stage in enumerate(stages):
            artifact = self.artifact_id(stage.name, stage.fields)
            state = self._workers.agree(self._store.load_state(artifact) if self._workers.leads else None)
            if state is not None:
                stage.load_state_dict(state)
                self._remember(self._store.load_training(artifact))
                continue
            losses: list[float] = []

            def report(
                done: int, total: int, loss: float, name: str = stage.name, losses: list[float] = losses
            ) -> None:
                losses.append(loss)
                point = Loss(tuple(self._data), name, done, loss)
                self._notify(f"{name} {draw_curve(losses)} loss {loss:.4g}, epoch", done, total, point)

            checkpoints = StoredCheckpoints(self._store, artifact, self._workers, self._settings.checkpoint_seconds)
            seed_everything(derive_seed(seed, stage.name))
            curve = train_stage(
                stage,
                train,
                seed,
                workers=self._workers,
                device=self._device,
                precision=self._resolved.trial.precision,
                checkpoints=checkpoints,
                judge=self._watched(train, stages) if number == len(stages) - 1 else None,
                report=report,
            )
            training = StoredTraining.of(stage, curve)
            self._remember(training)
            if self._workers.leads:
                self._store.publish_training(artifact, training)
                self._store.publish_state(artifact, stage.state_dict())
            checkpoints.discard()

    def _remember(self, training: StoredTraining) -> None:
        self.curves |= training.curves
        for warning in training.warnings:
            self.warnings.append(warning)
            self._notify(warning, 0, 1)

    def _watched(self, train: Split, stages: Sequence[Trainable]) -> Judge | None:
        """How the state of the last stage is picked, with the looks of a study at the right epochs."""
        judge, observer = self._judge(train, stages), self._observer
        if observer is None or observer.watch.first_look is None:
            return judge

        def look_and_judge(done: int, loss: float) -> float | None:
            if observer.watch.is_due(done, stages[-1].epochs):
                value = self._test_metric(train, stages, observer.watch.objective)
                if self._workers.leads:
                    observer.tell(done, value)
                if not self._workers.agree(observer.goes_on() if self._workers.leads else None):
                    raise Stopped
            return None if judge is None else judge(done, loss)

        return look_and_judge

    def _judge(self, train: Split, stages: Sequence[Trainable]) -> Judge | None:
        """How the state of the last stage is picked, as the protocol says; None for the last one."""
        selection = self._resolved.protocol.selection
        if selection == "last":
            return None
        if selection == "lowest_loss":
            return lambda done, loss: -loss
        epochs = stages[-1].epochs
        every = math.ceil(epochs / MAX_TEST_EVALUATIONS)
        return lambda done, loss: None if done % every and done != epochs else self._test_metric(train, stages)

    def _test_metric(self, train: Split, stages: Sequence[Trainable], metric: str = "image_auroc") -> float:
        """Mean of a metric over the test images of the group's categories.

        Image AUROC is what `selection: test_best` picks by; a study looks at its objective on its tuning categories.
        """
        for stage in stages:
            stage.module.eval()
        self._method.fit(train)
        values = []
        for data in self._data.values():
            self._observe_test(data.test, self._meter.copy())
            maps, scores = self._predict_together(data.test, self._meter.copy())
            if self._workers.leads:
                prediction = StoredPrediction(paths=(), maps=quantise(maps), image_scores=scores, facts={})
                own_score = self._resolved.trial.protocol.score_reduction == "method"
                labels = [sample.label for sample in data.test]
                truth = None
                if METRICS[metric].kind == "pixel":
                    preprocessing, cache = self._resolved.preprocessing, self._settings.places.cache_dir
                    truth = load_truth(data.test, data.truth_id, preprocessing, cache)
                ids = [sample.sample_id for sample in data.test]
                result = evaluate(prediction, labels, truth, self._resolved.protocol, own_score, ids)
                values.append(result.metrics[metric])
        return self._workers.agree(float(np.mean(values)) if self._workers.leads else None)

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
    # With its number: other threads have a current device of their own.
    return torch.device(device.type, torch.accelerator.current_device_index())


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


def draw_curve(values: Sequence[float], width: int = 16) -> str:
    """The last values as a row of bars, lowest to highest: `█▆▄▃▂▁`."""
    shown = [value for value in values[-width:] if math.isfinite(value)]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in shown)


def interleave(shares: Sequence[np.ndarray]) -> np.ndarray:
    """Rows that were dealt out one by one, back in their order; nothing for no shares."""
    if not shares:
        return np.empty(0, np.float32)
    whole = np.empty((sum(map(len, shares)), *shares[0].shape[1:]), shares[0].dtype)
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


def _check_finite(samples: Sequence[SampleKey], maps: np.ndarray, scores: np.ndarray | None, method: str) -> None:
    finite = np.isfinite(maps).all(axis=(1, 2))
    if scores is not None:
        finite &= np.isfinite(scores)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ScoreError(f"{method} gave NaN or infinite scores for {len(bad)} images, first {samples[bad[0]].path}")
