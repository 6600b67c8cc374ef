"""The types at the borders of the harness: what a method, a backbone, a dataset and a row look like.

Nothing here computes. A method imports this module and `methods.components`, nothing else of ours; every other
module of the harness may import it. torch is needed for annotations only, so a process that moves rows about
does not pay for importing it.

Letters in shapes: `B` batch, `N` images, `H W` pixels, `h w` patch grid, `P = h * w`, `D` feature width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RowStatus = Literal["ok", "failed", "skipped", "stopped"]
ScoreReduction = Literal["max", "mean_pool_16", "mean_pool_21"]
Scope = Literal["category", "dataset"]
BackboneUse = Literal["none", "frozen", "trained"]
Inputs = Literal["features", "images"]


class AdgridError(Exception):
    """Bad input, told to the user in one message that names the file, the field and the remedy.

    The command line prints it without a traceback and exits with its code.
    """

    exit_code = 2


def derive_seed(*parts: str | int | None) -> int:
    """Seed of a named draw: equal on every machine, changed by any part.

    Args:
        parts: what the draw may depend on, such as `"shots", dataset, category, shots, seed`.

    Returns:
        An integer in [0, 2**63), fit for `torch.Generator.manual_seed` and `numpy.random.default_rng`.
    """
    text = "\x1f".join(repr(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


# --- images and datasets ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleKey:
    """What a method may know of an image: where it is, not whether it is defective."""

    path: str
    """Absolute path of the image."""
    category: str
    sample_id: str
    """The physical object; several views share one. Unique within the category."""
    view: str = ""
    """Camera name in multi-view data, otherwise empty."""


@dataclass(frozen=True, kw_only=True)
class Sample(SampleKey):
    """One image of a dataset with its ground truth."""

    split: Literal["train", "test"]
    label: Literal[0, 1]
    """0 normal, 1 anomalous."""
    defect_type: str
    """Name of the defect folder or class; `good` for normal images."""
    mask_path: str | None = None
    """Ground-truth mask; None on a normal image, or where the dataset has no masks."""

    @property
    def key(self) -> SampleKey:
        """The same image without its ground truth."""
        return SampleKey(path=self.path, category=self.category, sample_id=self.sample_id, view=self.view)


@dataclass(frozen=True, kw_only=True)
class Category:
    """All images of one category, in one fixed order (by path)."""

    name: str
    train: tuple[Sample, ...]
    """Normal images for fitting."""
    test: tuple[Sample, ...]
    has_masks: bool
    """False: pixel metrics are not available for this category."""


@dataclass(frozen=True, kw_only=True)
class LayoutProblem:
    """One complaint of a layout check."""

    category: str
    what: str
    """What is wrong, with the path."""
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where data may live on this machine."""

    data_root: str | None = None
    """Folder with one subfolder per dataset (`--data-root`)."""
    cache_dir: str
    """Node-local cache for features, decoded images, hashes and generated data (`--cache-dir`)."""


class Dataset(Protocol):
    """One dataset in one on-disk layout. A plug-in file ends with `DATASET = ItsClass`."""

    summary: ClassVar[str]
    """One line for `adgrid datasets`."""
    licence: ClassVar[str]
    home_page: ClassVar[str]
    citation: ClassVar[str]

    name: str
    root: str

    def __init__(self, name: str, root: str | None, places: Places) -> None:
        """Args: name as used in rows; root folder, or None for the default place of this dataset.

        A layout that is published with several splits names them in a class attribute `variants` (name -> one line,
        the default first) and takes one as a fourth argument `variant`.
        """

    def missing(self) -> str | None:
        """Why the data is not here and how to get it, or None when it is. Reads no image."""

    def prepare(self) -> None:
        """Makes what can be made (generated data). Safe to call from several processes at once."""

    def category_names(self) -> tuple[str, ...]:
        """All categories, sorted."""

    def category(self, name: str) -> Category:
        """Lists one category. Raises AdgridError if its layout is broken."""

    def check(self, categories: Sequence[str] | None = None) -> list[LayoutProblem]:
        """Every complaint about the requested categories; empty when all is well."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a decoded RGB image becomes pixels of a fixed size. Masks follow with nearest neighbour."""

    image_size: tuple[int, int] = (224, 224)
    """(H, W) that the backbone sees."""
    resize: int | None = None
    """Length of the shorter side before a centre crop to `image_size`; None resizes straight to `image_size`."""
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """Everything about an evaluation that is not the method. Rows of different protocols are never averaged.

    `"backbone"` and `"method"` leave a value to the pretrained configuration or to the method's paper;
    the row then records what it was.
    """

    image_size: tuple[int, int] = (224, 224)
    resize: int | None = None
    interpolation: Literal["backbone", "bilinear", "bicubic", "nearest"] = "backbone"
    mask_rule: Literal["nearest"] = "nearest"
    """Masks: non-zero is defect, resized with nearest neighbour, non-zero again (PAPERS 5.3, pitfall 1)."""
    cropped_anomaly: Literal["keep", "normal"] = "keep"
    """What an anomalous image is at image level whose defect the crop cut away: still anomalous, or normal."""
    smoothing: Literal["method"] | float = "method"
    """Sigma in pixels of the Gaussian over the anomaly map at `image_size`; 0 for none."""
    score_reduction: Literal["method"] | ScoreReduction = "method"
    """How a map becomes an image score where the method gives none of its own."""
    aupro_limit: float = 0.3
    """False-positive rate up to which AUPRO integrates, in (0, 1]."""
    selection: Literal["last", "lowest_loss", "test_best"] = "last"
    """Which state of a trained method is scored: of the last epoch, of the one with the lowest mean training loss, or
    of the one with the best image AUROC on the test images, which every row and matrix then says."""


# --- batches ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images, as pixels or as features of a frozen backbone."""

    samples: tuple[SampleKey, ...]
    levels: tuple[Tensor, ...] | None = None
    """Feature maps, one (B, D_l, h_l, w_l) float32 per level; None when the method asked for images."""
    images: Tensor | None = None
    """(B, 3, H, W) float32 RGB in [0, 1], not normalised; None when the method asked for features."""

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(Batch):
    """A batch of auxiliary data with ground truth; the training images of a cell never come as this."""

    labels: Tensor
    """(B,) int64, 1 = anomalous."""
    masks: Tensor
    """(B, H, W) uint8, 1 = defect."""


class Split(Protocol):
    """Images in a fixed order. Iterating yields batches; `take` gives any rows, for shuffled training.

    `take` is called from a thread while the main one trains, so it must leave the global random generators alone.
    """

    samples: tuple[SampleKey, ...]

    def __len__(self) -> int:
        """Number of images."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order."""

    def take(self, indices: Sequence[int]) -> Batch:
        """The images at these positions as one batch."""


InputScale = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each of the three channels of images in [0, 1]."""


class LabelledSplit(Split, Protocol):
    """A split of auxiliary data whose batches carry labels and masks."""

    def __iter__(self) -> Iterator[LabelledBatch]: ...

    def take(self, indices: Sequence[int]) -> LabelledBatch: ...


# --- methods ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a method says about a batch."""

    anomaly_map: Tensor
    """(B, h, w) float32, raw, any h and w; higher = more anomalous."""
    image_score: Tensor | None = None
    """(B,) float32, higher = more anomalous; None lets the harness reduce the smoothed map."""


@dataclass(frozen=True, kw_only=True)
class LevelChoice:
    """Which levels of a backbone a method reads when the search space names no layers."""

    strides: tuple[int, ...] = (4, 8, 16)
    """Pyramid backbones: the last layer at each of these strides."""
    taps: tuple[int, ...] = (0, 1, 2, 3)
    """Plain ViTs: positions in the backbone's four canonical taps, shallow to deep; negative counts from the end."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What surrounds a method while it is fitted: shapes, device, named random draws, the backbone."""

    level_shapes: tuple[tuple[int, int, int], ...]
    """(D, h, w) per level after the representation; empty when the method uses no backbone."""
    image_size: tuple[int, int]
    categories: tuple[str, ...]
    device: torch.device
    seed_of: Callable[[str], int]
    """Seed of a named draw; depends on dataset, categories, shots and seed, never on the configuration."""
    resize: int | None = None
    """Shorter side of an image before `image_size` is cropped from its centre; None resizes straight to it."""
    encode: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    """(B, 3, H, W) images in [0, 1] to levels, through the frozen backbone and the representation."""
    make_backbone: Callable[[], nn.Module] | None = None
    """Builds a private copy of the backbone that may be trained: (B, 3, H, W) images in [0, 1] to levels."""

    def generator(self, name: str) -> torch.Generator:
        """A fresh CPU generator for the draw called `name`; the same name always gives the same numbers."""
        import torch

        return torch.Generator().manual_seed(self.seed_of(name))

    @cached_property
    def backbone(self) -> nn.Module:
        """The private, trainable copy of the backbone. Raises AdgridError where the method declared no use of one."""
        if self.make_backbone is None:
            raise AdgridError("this method's backbone_use is not 'trained', so it has no backbone of its own")
        return self.make_backbone()


@runtime_checkable
class Method(Protocol):
    """An anomaly detector. A plug-in file holds `METHOD_VERSION`, `Config` and ends with `METHOD = ItsClass`.

    `Config` is a frozen dataclass whose defaults are the paper's. `METHOD_VERSION` is raised when the numbers move.

    A class may also have `presets`, named configurations: name -> fields; and `folders`, the configuration fields that
    hold folders of images or None, which enter ids by their contents and not by their place; and
    `fit_bytes(config, level_shapes, num_images)`, what fitting so many images holds in memory at most, for admission.
    """

    summary: ClassVar[str]
    """One line for `adgrid methods`, with the paper."""
    scope: ClassVar[Scope]
    """`category`: one fit per category. `dataset`: one fit for all, still one row per category."""
    backbone_use: ClassVar[BackboneUse]
    levels: ClassVar[LevelChoice]
    smoothing: ClassVar[float]
    """The paper's Gaussian sigma at 224 pixels; 0 for none."""
    score_reduction: ClassVar[ScoreReduction]
    Config: ClassVar[type]

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        """Whether batches carry features or images; may depend on the configuration."""

    def __init__(self, config: Any, context: Context) -> None: ...

    def fit(self, train: Split) -> None:
        """Fits to normal images. Sees no test image, label or statistic."""

    def predict(self, batch: Batch) -> Prediction:
        """Scores a batch; the result for an image does not depend on the others in the batch."""

    def state_dict(self) -> dict[str, Tensor]:
        """The fitted method as tensors alone."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict()`; afterwards `predict` gives the same numbers."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which part of a training step this worker computes. With one worker it is all of it."""

    epoch: int
    """Counted from 0."""
    step: int
    """Number of the batch within the epoch, from 0; the same on every worker."""
    num_images: int
    """Images of the whole batch, over all workers."""
    positions: tuple[int, ...]
    """Places of this worker's images in the whole batch, each in [0, num_images); never empty."""


class Trainable(Protocol):
    """A stage with gradients, run by `training.py` on any number of workers; a stage derives from this class.

    It holds the mathematics alone: no devices but the context's, no loops over epochs, no distribution, no precision,
    no checkpoints. Its numbers must not depend on the number of workers: what it draws is drawn for the whole batch or
    for one image (`methods.components.draws`), and what it yields is its share of the batch's loss.
    """

    name: str
    epochs: int
    batch_size: int
    """Images per step over all workers together."""
    module: nn.Module
    """Holds every parameter that is trained, and no other that needs a gradient."""
    clip_norm: float | None = None
    """Largest norm of all gradients together; None leaves them as they are."""
    max_images_per_epoch: int | None = None
    """An epoch is a random part of the images, of this size; None for all of them."""
    fields: tuple[str, ...] | None = None
    """Configuration fields that the trained stage depends on, those of the stages before it included; a trained stage
    serves every configuration that agrees in them. None for all."""
    watched: Mapping[str, list[float]] = MappingProxyType({})
    """What else a reader may want to see grow or fall: a number for every epoch so far."""
    warnings: Sequence[str] = ()
    """What a reader of the results must be told, such as that features collapse."""

    def configure_optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Fresh optimisers over the parameters of `module`, with the rates that a schedule factor of 1 stands for."""
        raise NotImplementedError

    def lr_factor(self, progress: float) -> float:
        """Learning rate as a factor, at a point of the training given in epochs: 2.5 is the middle of the third."""
        return 1.0

    def begin_epoch(self, train: Split, epoch: int) -> None:
        """Prepares an epoch, with all training images at hand (the same on every worker); nothing by default."""
        return

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        """Yields scalars; an optimiser step follows each.

        The step's loss is the sum over workers of what they yield, so a mean over images is their sum divided by
        `share.num_images`. Every worker yields equally often. Batches of an epoch differ by one image at most in size.

        Args:
            batch: this worker's images.
            share: which part of the whole batch they are.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What the trained stage is: the module's state, and whatever else it has learned."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict()`."""
        self.module.load_state_dict(state)


@runtime_checkable
class GradientMethod(Method, Protocol):
    """A method with stages that are trained before `fit`."""

    def stages(self) -> list[Trainable]:
        """The stages in the order they are trained; each its own content-addressed artifact."""


@runtime_checkable
class TransductiveMethod(Method, Protocol):
    """A method that can normalise by statistics of all test images, as some papers do; its rows then say so."""

    def observes_test(self) -> bool:
        """Whether its configuration asks for it."""

    def observe_test(self, test: Split) -> None:
        """Sees the test images of a category, never their labels, before they are predicted."""


class Representation(Protocol):
    """A change of the frozen features between backbone and method, such as ADPretrain's projected residuals.

    A plug-in file holds `REPRESENTATION_VERSION` and ends with `REPRESENTATION = ItsClass`.
    """

    summary: ClassVar[str]
    levels: ClassVar[LevelChoice]
    """Which levels it is trained on when the search space names no layers; methods read any of them."""
    Config: ClassVar[type]
    """Settings of its training."""

    @classmethod
    def pretraining(
        cls, config: Any, context: Context, references: Split, input_scale: InputScale, pool: int | None = None
    ) -> Trainable:
        """The stage that trains it on a `LabelledSplit`.

        Args:
            config: its settings.
            context: its `encode` is the plain frozen backbone; `level_shapes` are those of the trained levels.
            references: normal images of every category and view, as images or as features.
            input_scale: mean and standard deviation that `encode` applies to images in [0, 1].
            pool: so many references of each category and view, kept in memory; None for all of them.
        """

    @classmethod
    def from_state(cls, config: Any, state: Mapping[str, Tensor], levels: Sequence[int], where: str) -> Representation:
        """The trained representation of some of its levels, on the processor.

        Args:
            config: the settings of its training.
            state: of the stage, or what `read_checkpoint` gave.
            levels: numbers of the levels that will be given, from 0, among those it was trained on.
            where: begins the message of an AdgridError, if the state does not fit.
        """

    @classmethod
    def read_checkpoint(cls, path: str) -> Mapping[str, Tensor]:
        """The state in a file that others have trained. Raises AdgridError if there is none."""

    def to(self, device: torch.device) -> Representation:
        """Moves it to where the features are."""

    def apply(self, levels: tuple[Tensor, ...], reference: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """Levels (B, D, h, w) to levels of the same shapes; `reference` are (R, D) tokens of normal images.

        The result for an image does not depend on the others in the batch.
        """


class Backbone(Protocol):
    """A feature extractor with named layers."""

    layers: tuple[str, ...]
    level_shapes: tuple[tuple[int, int, int], ...]

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) float32 or uint8 RGB, in [0, 1] or [0, 255], to one (B, D, h, w) float32 map per layer."""


# --- what is planned and what comes back -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial asks of the cluster: so much for each of its workers."""

    cpu: float = 1.0
    gpu: float = 0.0
    memory_gib: float = 0.0
    """Planning puts what a trial is expected to take where a space says nothing."""
    workers: int = 1
    """Processes that train one trial together; 1 for methods without training."""
    min_workers: int | None = None
    """Go on with as few when nodes are lost, and with more again when they are back; None for all or nothing."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a trial is expected to take; see `harness.footprint`."""

    feature_bytes: int
    """Of its stored features, all categories together; 0 where it reads images."""
    parts: Mapping[str, int]
    """What its process holds at its largest fit, in bytes, by what it is for."""

    @property
    def memory_gib(self) -> float:
        """Of its process in all, upwards to a tenth."""
        return math.ceil(sum(self.parts.values()) / 2**30 * 10) / 10

    @property
    def largest(self) -> str:
        """The largest part and its size, such as `what the method keeps 3.1 GiB`."""
        name = max(self.parts, key=lambda part: self.parts[part])
        return f"{name} {self.parts[name] / 2**30:.1f} GiB"


@dataclass(frozen=True, kw_only=True)
class DatasetRef:
    """A dataset as a search space names it."""

    name: str
    layout: str
    root: str | None = None
    """None: the default place of the layout under the data root."""
    variant: str | None = None
    """Which of the layout's published splits; None for its default."""
    held_out: bool = False
    """Held-out training images, half of them with painted defects, stand for the test images."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a trial has to do with a study, for its rows to say so."""

    study_id: str
    fields: tuple[str, ...]
    """Parameters that were searched."""
    cells: tuple[str, ...]
    """`dataset/category` of every cell that they were tuned on."""
    on_test: bool = False
    """Cells that are reported may be among them: the space said `allow_test_tuning`."""
    is_sample: bool = False
    """One of the configurations that were tried; else the best of them, on what is reported."""


@dataclass(frozen=True, kw_only=True)
class ReferenceChoice:
    """Which normal images of a category the features of its images are compared with."""

    mode: Literal["shots", "files", "aligned"] = "shots"
    """`shots`: drawn training images, the same for every image. `files`: given images, likewise. `aligned`: for each
    image the training images most like it, itself excluded, which every row says; given lists name them for test
    images."""
    shots: int = 8
    """How many are drawn, or all where a category has fewer."""
    seed: int = 0
    """Of the draw, which is that of a k-shot run with the same seed."""
    k: int = 10
    """How many training images `aligned` gives each image."""
    path: str | None = None
    """`files`: folder of the images, CATEGORY/train/good or DATASET/CATEGORY/train/good below it. `aligned`: folder of
    lists, CATEGORY.json or DATASET/CATEGORY.json below it; see `harness.given_references`."""
    exclude_from_fit: bool = False
    """Keep drawn references out of the images that the method is fitted to; the paper does not."""


@dataclass(frozen=True, kw_only=True)
class RepresentationRef:
    """A trained representation as a trial uses it."""

    kind: str
    """Name of the plug-in."""
    params: Mapping[str, Any]
    """The resolved configuration of its training, every field."""
    artifact_id: str
    """Of the trained state, or of the content of the given checkpoint."""
    checkpoint: str | None
    """File with the state; None for the artifact of that id."""
    layers: tuple[str, ...]
    """Layers it was trained on."""
    reference: ReferenceChoice
    stamps: tuple[str, ...] = ()
    """What every row says of it."""


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """Some categories of a dataset."""

    dataset: DatasetRef
    categories: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The training of a representation on labelled auxiliary images: once, before the trials that use it."""

    trial_id: str
    """Id of the artifact it becomes: by everything its numbers depend on."""
    kind: str
    """Name of the plug-in."""
    params: Mapping[str, Any]
    """The resolved configuration, every field."""
    backbone: str
    weights: str
    layers: tuple[str, ...]
    data: tuple[DataChoice, ...]
    """Training and test images alike, with their labels and masks."""
    select_on: tuple[DataChoice, ...]
    """Categories by whose image AUROC the best epoch is picked; none for the last epoch."""
    reference: ReferenceChoice
    """Of the categories in `select_on`."""
    protocol: EvaluationProtocol
    seed: int
    precision: Literal["float32", "bfloat16"]
    resources: Resources
    reference_source: Literal["auto", "store", "encode"]
    """Features of the references from the store, or from the backbone at every use; the numbers are the same."""
    pool: int | None
    """So many references of each category and view, kept in memory; None for all."""
    num_images: int
    num_references: int
    """Normal images among them that references are drawn from: those of the pool where there is one."""
    cells: tuple[Cell, ...] = ()
    """None: it is scored by the trials that use it."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """All categories of one (method, backbone, representation, dataset, shots, seed, params)."""

    trial_id: str
    method: str
    params: Mapping[str, Any]
    """The resolved configuration of the method, every field."""
    backbone: str | None
    """None for a method without backbone."""
    layers: tuple[str, ...]
    also_layers: tuple[str, ...] = ()
    """Layers that other trials of the run read from the same backbone: extracted in the same forward pass."""
    weights: str
    """`auto`, a path, or `random` (stamped on every row)."""
    representation: str
    """As the search space calls it; `plain` for the features as they are."""
    trained: RepresentationRef | None = None
    """What `representation` stands for; None for `plain`."""
    dataset: DatasetRef
    categories: tuple[str, ...]
    shots: int | None
    """Training images per category, or None for all."""
    seed: int
    protocol: EvaluationProtocol
    resources: Resources
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes of a training."""
    cells: tuple[Cell, ...] = ()
    tuned: Tuned | None = None
    """None for a configuration that the search space names."""
    footprint: Footprint | None = None
    """What it is expected to take, where it was planned."""


Job = Trial | Pretraining
"""What is given to a process, or to a group of workers, as a whole."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One category of a trial: one row of results."""

    category: str
    prediction_id: str
    """Hash of everything the scores depend on."""
    cell_id: str
    """Hash of the prediction id, the evaluation protocol, the metric version and the ground truth."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run is told that does not change its numbers: where things lie and how much room they may take."""

    root: str
    """Storage root, a path or URI shared by all nodes."""
    places: Places
    run_id: str
    command: str
    """The command that remakes the run, for provenance."""
    invocation: str
    """Unique to one start of the program; attempts at a cell are counted within it."""
    cache_gib: float = 50.0
    """Bound of the node-local feature cache."""
    prediction_mib: float = 256.0
    """Raw predictions of a cell above this size are not kept, and a changed metric fits such a cell again."""
    pictures: bool = True
    """Draw a contact sheet for every cell."""
    save_fitted: bool = False
    """Keep the fitted state of every method as an artifact."""
    batch_size: int = 32
    """Images per forward pass outside training."""
    checkpoint_seconds: float = 60.0
    """Least time between two checkpoints of a training."""
    claim_seconds: float = 60.0
    """How long a killed worker on another machine may keep others from taking over its cell."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """The outcome of one cell, complete in itself: what was run, on what, with which numbers and at what cost."""

    cell_id: str
    prediction_id: str
    trial_id: str
    status: RowStatus
    method: str
    backbone: str | None
    layers: tuple[str, ...]
    representation: str
    dataset: str
    category: str
    shots: int | None
    seed: int
    params: Mapping[str, Any]
    protocol: Mapping[str, Any]
    """The evaluation protocol as the search space says it."""
    protocol_id: str
    """Short hash of `protocol`; matrices keep different values apart."""
    resolved_protocol: Mapping[str, Any] = field(default_factory=dict)
    """The same with `method` and `backbone` replaced by their values."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Rates in [0, 1]; a metric that is not available has no key."""
    metric_bounds: Mapping[str, float] = field(default_factory=dict)
    """Largest possible numerical error of a metric, where one is known."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """Seconds per stage (`fit_seconds`, ...), `images_per_second`, `peak_rss_mib`, `peak_gpu_mib`, counts."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Versions, commit, fingerprints, device, host, time."""
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Mean loss of every epoch, per trained stage."""
    stamps: tuple[str, ...] = ()
    """What a reader must be told beside the number, such as `random weights` or `rescored`."""
    tuned: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `Tuned`; empty for a configuration that the search space names."""
    reason: str = ""
    """Why a row is not ok: error class and message."""
    traceback: str = ""
