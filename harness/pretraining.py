"""The story of one pretraining: read labelled images, train the representation, keep it as an artifact.

Like a trial, it runs in a plain process or in several workers together; Ray only decides where and when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from harness.auxiliary import JoinedSplit, LabelledCategory, LabelledImages, read_labelled
from harness.backbones import FrozenBackbone, ResolvedBackbone, level_shapes, resolve_backbone
from harness.checkpoints import StoredCheckpoints
from harness.claims import Claims
from harness.contracts import (
    Batch,
    Context,
    DataChoice,
    Method,
    Preprocessing,
    Pretraining,
    RepresentationRef,
    RunSettings,
    Sample,
    Trainable,
    derive_seed,
)
from harness.evaluate import evaluate
from harness.feature_store import FeatureStore
from harness.features import FeatureSplit, feature_split
from harness.fitting import draw_curve, interleave, pick_device
from harness.image_split import ImageSplit
from harness.notes import Loss, Notify
from harness.quantisation import quantise
from harness.reference_source import choose_source
from harness.registry import build_config, load_method, load_representation
from harness.represented import RepresentedFeatures
from harness.resolve import (
    CategoryData,
    open_dataset,
    pretraining_id,
    resolve_preprocessing,
    resolve_protocol,
)
from harness.stages import Judge, seed_everything, train_stage
from harness.store import Store, StoredPrediction, StoredTraining, StoreError
from harness.workers import ALONE, Workers, is_lost_worker

PICKED_BY = "feature_norm"
"""The detector by whose image AUROC the best state is picked: it has nothing to fit."""
MAX_FAILURES = 10
"""How often the workers of a pretraining may be lost; each start goes on from the last checkpoint."""


class PretrainingOutdated(RuntimeError):
    """Images, masks or weights on this node are not the ones that were planned."""


def run_pretraining(
    pretraining: Pretraining, settings: RunSettings, notify: Notify = lambda *_: None, workers: Workers = ALONE
) -> bool:
    """Trains a representation unless the store has it; what goes wrong is kept in the store as the reason.

    Args:
        pretraining: what to train.
        settings: where things lie.
        notify: told about progress.
        workers: the processes that train together; all of them call this.

    Returns:
        False, with nothing done, where another run is training it at this moment.

    Raises:
        Exception: with several workers, whatever went wrong at one of them: the others wait for it in vain.
    """
    store = Store(settings.root)
    claims = Claims(store, f"{settings.invocation}/{pretraining.trial_id}", settings.claim_seconds)
    claim = claims.take(pretraining.trial_id) if workers.leads else None
    if not workers.agree(claim is not None):
        return False
    with claim or nullcontext():
        if workers.agree(find_settled(pretraining, store, settings) if workers.leads else None):
            return True
        try:
            _train(pretraining, store, settings, notify, workers)
        except Exception as error:
            if isinstance(error, StoreError):
                raise
            if not is_lost_worker(error):
                store.publish_failure(pretraining.trial_id, settings.invocation, f"{type(error).__name__}: {error}")
            if workers.size > 1 or is_lost_worker(error):
                raise
    return True


def find_settled(pretraining: Pretraining, store: Store, settings: RunSettings) -> bool:
    """Whether it is done, or has failed since the program was started."""
    failure = store.load_failure(pretraining.trial_id)
    return store.has_state(pretraining.trial_id) or (failure is not None and failure[0] == settings.invocation)


def _train(pretraining: Pretraining, store: Store, settings: RunSettings, notify: Notify, workers: Workers) -> None:
    backbone = resolve_backbone(pretraining.backbone, pretraining.weights, settings.places.cache_dir)
    preprocessing = resolve_preprocessing(pretraining.protocol, backbone)
    kind = load_representation(pretraining.kind)
    config = build_config(kind, pretraining.params)
    device = pick_device(pretraining.resources)
    name = ", ".join(choice.dataset.name for choice in pretraining.data)

    def tell(stage: str, done: int, total: int) -> None:
        notify(name, stage, done, total)

    tell("reading images", 0, 1)
    data = _read(pretraining.data, settings)
    picked_by = _read(pretraining.select_on, settings)
    if pretraining_id(pretraining, backbone, data, picked_by) != pretraining.trial_id:
        raise PretrainingOutdated(
            f"representation {pretraining.kind!r}: images, masks or weights are not those that were planned (changed "
            f"since, or another copy on this node); run the same command again"
        )
    images = _Images(pretraining, backbone, preprocessing, device, settings, tell)
    context = Context(
        level_shapes=level_shapes(backbone, pretraining.layers, preprocessing.image_size),
        image_size=preprocessing.image_size,
        resize=preprocessing.resize,
        categories=tuple(f"{one.dataset}/{one.category}" for one in data),
        device=device,
        seed_of=lambda draw: derive_seed(draw, "pretraining", pretraining.seed),
        encode=images.encoder(pretraining.layers).encode,
    )
    references = _find_references(pretraining, backbone, data, images, settings, workers, tell)
    train = images.labelled(data)
    seed_everything(context.seed_of("everything else"))
    stage = kind.pretraining(config, context, references, (backbone.mean, backbone.std), pretraining.pool)
    losses: list[float] = []

    def report(done: int, total: int, loss: float) -> None:
        losses.append(loss)
        point = Loss(context.categories, stage.name, done, loss)
        notify(name, f"pretraining {draw_curve(losses)} loss {loss:.4g}, epoch", done, total, point)

    checkpoints = StoredCheckpoints(store, pretraining.trial_id, workers, settings.checkpoint_seconds)
    curve = train_stage(
        stage,
        train,
        context.seed_of("epoch order"),
        workers=workers,
        device=device,
        precision=pretraining.precision,
        checkpoints=checkpoints,
        judge=_judge(pretraining, stage, context, picked_by, images, workers),
        report=report,
    )
    if workers.leads:
        store.publish_training(pretraining.trial_id, StoredTraining.of(stage, curve))
        store.publish_state(pretraining.trial_id, stage.state_dict())
    checkpoints.discard()


class _Images:
    """The images of a pretraining, as features and as pixels."""

    def __init__(
        self,
        pretraining: Pretraining,
        backbone: ResolvedBackbone,
        preprocessing: Preprocessing,
        device: torch.device,
        settings: RunSettings,
        tell: Callable[[str, int, int], None],
    ) -> None:
        self._layers, self._backbone, self.preprocessing = pretraining.layers, backbone, preprocessing
        self._device, self._settings, self._tell = device, settings, tell
        self._cache = FeatureStore(
            settings.places.cache_dir, int(settings.cache_gib * 2**30), on_note=lambda text: tell(text, 0, 1)
        )

    def encoder(self, layers: tuple[str, ...]) -> FrozenBackbone:
        return FrozenBackbone(self._backbone, layers, self._device, image_size=self.preprocessing.image_size)

    def features(
        self, dataset: str, samples: Sequence[Sample], hashes: Mapping[str, str], split: str, stream: bool = False
    ) -> FeatureSplit:
        """Features of one dataset's images, under the same keys as those of trials."""
        return feature_split(
            samples,
            hashes,
            dataset=dataset,
            split=split,
            resolved=self._backbone,
            layers=self._layers,
            preprocessing=self.preprocessing,
            store=self._cache,
            encoder_factory=self.encoder,
            batch_size=self._settings.batch_size,
            device=self._device,
            stream=stream,
            on_progress=lambda done, total: self._tell(f"extracting features of {dataset}", done, total),
        )

    def labelled(self, data: Sequence[LabelledCategory]) -> LabelledImages:
        """All images with their truth."""
        samples: list[Sample] = []
        parts: list[tuple[str, ImageSplit]] = []
        for dataset, own in _by_dataset(data).items():
            images = [sample for one in own for sample in one.samples]
            split = ImageSplit(
                images,
                self.preprocessing,
                batch_size=self._settings.batch_size,
                hashes=_hashes(own),
                dataset=dataset,
                store=self._cache,
                on_progress=partial(self._tell, f"decoding {dataset}"),
            )
            samples += images
            parts.append((dataset, split))
        return LabelledImages(samples, JoinedSplit(parts), self.preprocessing)


def _find_references(
    pretraining: Pretraining,
    backbone: ResolvedBackbone,
    data: Sequence[LabelledCategory],
    images: _Images,
    settings: RunSettings,
    workers: Workers,
    tell: Callable[[str, int, int], None],
) -> JoinedSplit:
    """Normal images of all categories, as features from the store or from the backbone at every use."""
    normal = [(one, sample) for one in data for sample in one.normal]
    choice = None
    if workers.leads:
        device = pick_device(pretraining.resources)
        choice = choose_source(pretraining, backbone, settings.places.cache_dir, settings.cache_gib, device)
        tell(choice.reason, 0, 1)
    stream = workers.agree(choice).source == "encode"
    groups: dict[tuple[str, str], list[Sample]] = {}
    for one, sample in normal:
        groups.setdefault((one.dataset, sample.split), []).append(sample)
    own = {dataset: _hashes(categories) for dataset, categories in _by_dataset(data).items()}
    if not stream and workers.local_size > 1:  # those of one node compute a share each
        for (dataset, split), samples in groups.items():
            images.features(dataset, samples[workers.local_rank :: workers.local_size], own[dataset], split)
        workers.wait()
    return JoinedSplit(
        [
            (dataset, images.features(dataset, samples, own[dataset], split, stream))
            for (dataset, split), samples in groups.items()
        ]
    )


def _judge(
    pretraining: Pretraining,
    stage: Trainable,
    context: Context,
    picked_by: Sequence[LabelledCategory],
    images: _Images,
    workers: Workers,
) -> Judge | None:
    """How the kept state is picked: by the image AUROC on categories of their own; None for the last state."""
    if not picked_by:
        return None
    kind, config = (
        load_representation(pretraining.kind),
        build_config(load_representation(pretraining.kind), pretraining.params),
    )
    ref = RepresentationRef(
        kind=pretraining.kind,
        params=pretraining.params,
        artifact_id="",
        checkpoint=None,
        layers=pretraining.layers,
        reference=pretraining.reference,
    )
    detector = load_method(PICKED_BY)
    scorer = detector(detector.Config(), context)
    protocol = resolve_protocol(pretraining.protocol, detector, None)

    def image_auroc(one: LabelledCategory) -> float | None:
        data = _as_category(one)
        representation = kind.from_state(config, stage.state_dict(), range(len(pretraining.layers)), "the stage")
        represented = RepresentedFeatures(
            ref,
            representation.to(context.device),
            one.dataset,
            {one.category: data},
            lambda samples, split: images.features(one.dataset, samples, one.hashes, split),
        )
        own = data.test[workers.rank :: workers.size]
        maps = np.empty((0, *context.image_size), np.float32)
        if own:
            batches = images.features(one.dataset, own, one.hashes, "test")
            maps = np.concatenate([_score(scorer, represented, batch) for batch in batches])
        shares = workers.collect(maps)
        if not workers.leads:
            return None
        prediction = StoredPrediction(paths=(), maps=quantise(interleave(shares)), image_scores=None, facts={})
        labels = [sample.label for sample in data.test]
        return evaluate(prediction, labels, None, protocol, own_score=False).metrics["image_auroc"]

    def judge(done: int, loss: float) -> float:
        aurocs = [image_auroc(one) for one in picked_by]
        return workers.agree(float(np.mean(aurocs)) if workers.leads else None)  # type: ignore[arg-type]

    return judge


def _score(scorer: Method, represented: RepresentedFeatures, batch: Batch) -> np.ndarray:
    levels = represented.change(batch)
    return scorer.predict(dataclasses.replace(batch, levels=levels)).anomaly_map.float().cpu().numpy()


def _as_category(one: LabelledCategory) -> CategoryData:
    """The images of a category as a trial sees them."""
    return CategoryData(
        category=one.category,
        train=tuple(sample for sample in one.samples if sample.split == "train"),
        test=tuple(sample for sample in one.samples if sample.split == "test"),
        has_masks=True,
        hashes=one.hashes,
        images_id="",
        truth_id="",
    )


def _by_dataset(data: Sequence[LabelledCategory]) -> dict[str, list[LabelledCategory]]:
    groups: dict[str, list[LabelledCategory]] = {}
    for one in data:
        groups.setdefault(one.dataset, []).append(one)
    return groups


def _hashes(data: Sequence[LabelledCategory]) -> dict[str, str]:
    return {path: digest for one in data for path, digest in one.hashes.items()}


def _read(choices: Sequence[DataChoice], settings: RunSettings) -> list[LabelledCategory]:
    read = []
    for choice in choices:
        dataset = open_dataset(choice.dataset, settings.places)
        read += [read_labelled(dataset, name, settings.places.cache_dir) for name in choice.categories]
    return read
