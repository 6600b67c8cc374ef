"""One training step of ADPretrain: references from the feature store against encoding them anew; and its memory.

    python benchmarks/adpretrain.py --data-root DATA [--json FILE]

A step is everything from decoded images to changed parameters: two views, backbone, references, residuals, projector,
losses, backward pass, Adam. Sides take turns, with the same images, views, references and initial weights, and their
losses are compared before anything is timed:

- store: ours, references from the feature store, each of a batch read once;
- pool: ours, references kept in memory;
- encode: ours, each reference of a batch encoded once, from pixels in the store;
- reencode: ours, but the references of each image encoded for it alone, as the official code does;
- official: the official code's way in all: references as in `reencode`, views encoded and projected one after the
  other, torch's attention with the references repeated for every image, losses over whole matrices of similarities.

The last two get their reference pixels from memory; the official code decodes files each time. A round has one step for
each number of references the paper draws from (1, 4, 8), so that a sum over a round is the mean step.

Memory: bytes that a step keeps for its backward pass, counted, and by how much the process grows, at small scales,
against the law they follow; and that law at the paper's scale: 32 images, 256 tokens, 4 levels, 1024 channels.
"""

import copy
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import _compare
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from harness.backbones import FrozenBackbone, choose_layers, level_shapes, resolve_backbone
from harness.contracts import Context, LabelledBatch, LevelChoice, Preprocessing, SampleKey, Share, derive_seed
from harness.datasets.fingerprint import content_hashes
from harness.feature_store import FeatureStore
from harness.features import feature_split
from harness.image_split import ImageSplit, load_images
from methods.adpretrain import Config, Pretraining, Projector, ReferencePool, SplitReferences, angle_loss, norm_loss
from methods.adpretrain.labels import label_by_count, label_by_nearest
from methods.adpretrain.losses import BLOCK_FLOATS
from methods.components.draws import image_generator

SIDES = ("store", "pool", "encode", "reencode", "official")
COUNTS = (1, 4, 8)
VIT_L_PARAMETERS = 304_000_000
PAPER = {"images": 32, "places": 256, "widths": (1024,) * 4}


def main():
    parser = _compare.make_parser(__doc__)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--strides", type=int, nargs="+", default=[8, 16, 32])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Path(tempfile.mkdtemp(prefix="adpretrain-"))
    try:
        figures = measure_speed(options, work)
    finally:
        shutil.rmtree(work)
    _compare.report(figures | measure_memory(), options.json)


# --- speed ----------------------------------------------------------------------------------------------------------


class TimedEncoder:
    """A frozen backbone that knows how long it has computed."""

    def __init__(self, backbone):
        self.backbone, self.seconds = backbone, 0.0

    def __call__(self, images):
        start = time.process_time()
        levels = self.backbone.encode(images)
        self.seconds += time.process_time() - start
        return levels


class OwnReferences:
    """References encoded for each image that asks, from pixels in memory."""

    def __init__(self, references, pixels, encode):
        self.places, self._pixels, self._encode = references.places, pixels, encode

    def levels(self, places):
        return list(self._encode(self._pixels[list(places)]))


class Reencoding(Pretraining):
    """Ours, but for references that are encoded anew for every image."""

    def residuals(self, batch, share):
        parts = [super(Reencoding, self).residuals(one_image(batch, row), share) for row in range(len(batch))]
        # Each part has the two views of one image.
        return [torch.stack(level, dim=1).flatten(0, 1) for level in zip(*parts, strict=True)]


def one_image(batch, row):
    return LabelledBatch(
        samples=batch.samples[row : row + 1],
        images=batch.images[row : row + 1],
        labels=batch.labels[row : row + 1],
        masks=batch.masks[row : row + 1],
    )


class Official(Pretraining):
    """The step as the official code makes it, in our words; its views, references and weights are those of ours."""

    def losses(self, batch, share):
        images = self._two_views(batch.images, batch.samples, share.epoch)
        with torch.no_grad():
            views = [self._encode(view) for view in images.split(len(batch))]
            own = []
            for sample in batch.samples:
                known = self._references.places(sample.category, sample.view)
                generator = image_generator(self._context, "adpretrain references", sample, share.epoch)
                picks = torch.randint(len(known), (self._config.reference_counts[0],), generator=generator).tolist()
                maps = self._references.levels([known[pick] for pick in picks])
                own.append([level.flatten(2).transpose(1, 2).flatten(0, 1) for level in maps])
            rests = [subtract_plainly(view, own) for view in views]
        total = 0.0
        for number, project in enumerate(self.module.children()):
            first, second = (project_plainly(project, rest[number]) for rest in rests)
            grid = first.shape[2:]
            tokens = [view.permute(0, 2, 3, 1).flatten(0, 2) for view in (first, second)]
            labels = label_by_count(batch.masks, grid).flatten()
            total = total + whole_angle_loss(*tokens, labels, self.centre[number])
            for view in tokens:
                total = total + norm_loss(view, label_by_nearest(batch.masks, grid).flatten())
        yield total


def subtract_plainly(levels, own):
    result = []
    for number, level in enumerate(levels):
        rests = []
        for image, references in zip(level, own, strict=True):
            tokens, reference = image.flatten(1).T, references[number]
            nearest = (F.normalize(tokens, dim=1) @ F.normalize(reference, dim=1).T).argmax(dim=1)
            rests.append((tokens - reference[nearest]).T.view_as(image))
        result.append(torch.stack(rests))
    return result


def project_plainly(project, features):
    (layer,) = project.layers
    tokens = features.flatten(2).transpose(1, 2)
    repeated = project.x_ref.expand(len(features), -1, -1)
    reference = project.ref_proj.project(repeated.transpose(1, 2)).transpose(1, 2)
    tokens = tokens - layer.cross_attn(tokens, reference, reference)[0]
    return (tokens + layer.mlp(tokens)).transpose(1, 2).reshape(features.shape)


def whole_angle_loss(first, second, label, centre, temperature=0.15):
    first, second = F.normalize(first - centre, dim=1), F.normalize(second - centre, dim=1)
    tokens, labels = torch.cat([first, second]), torch.cat([label, label])
    positive = ((first * second).sum(dim=1) / temperature).exp().repeat(2)
    normal, anomalous = tokens[~labels], tokens[labels]
    of_normal = (normal @ anomalous.T / temperature).exp().sum(dim=1)
    of_anomalous = (anomalous @ normal.T / temperature).exp().sum(dim=1)
    both = torch.cat([(positive[~labels] / of_normal).log(), (positive[labels] / of_anomalous).log()])
    loss = -both.mean()
    return loss if bool(loss.isfinite()) else torch.zeros(())


def load_labelled(options, preprocessing):
    """A batch of test images, half of them normal, spread over the kinds of defects."""
    root = Path(options.data_root) / options.test_images
    kinds = {folder.name: sorted(folder.iterdir()) for folder in sorted(root.iterdir()) if folder.is_dir()}
    normal = kinds.pop("good", [])
    half = options.batch_size // 2
    defective = [path for group in zip(*kinds.values(), strict=False) for path in group][: options.batch_size - half]
    paths = defective + normal[:half]
    if len(paths) < options.batch_size or not defective:
        raise SystemExit(f"{root} has too few images for a batch of {options.batch_size}")
    masks = [read_mask(root.parent, path, preprocessing.image_size) for path in paths]
    samples = tuple(SampleKey(path=str(path), category="benchmark", sample_id=path.stem + str(path)) for path in paths)
    labels = torch.tensor([1] * len(defective) + [0] * half)
    pixels = load_images(samples, preprocessing).float() / 255
    return LabelledBatch(samples=samples, images=pixels, labels=labels, masks=torch.stack(masks))


def read_mask(root, path, size):
    mask = root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
    if not mask.exists():
        return torch.zeros(size, dtype=torch.uint8)
    pixels = Image.open(mask).convert("L").resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy((np.asarray(pixels) != 0).astype(np.uint8))


def measure_speed(options, work):
    size = (options.image_size, options.image_size)
    resolved = resolve_backbone(options.backbone, options.weights)
    layers = choose_layers(resolved, LevelChoice(strides=tuple(options.strides)))
    preprocessing = Preprocessing(image_size=size, interpolation=resolved.interpolation)
    encode = TimedEncoder(FrozenBackbone(resolved, layers, "cpu", "float32", size))
    shapes = level_shapes(resolved, layers, size)
    context = Context(
        level_shapes=shapes,
        image_size=size,
        categories=("benchmark",),
        device=torch.device("cpu"),
        seed_of=lambda name: derive_seed(name, "benchmark"),
        encode=encode,
    )
    paths = sorted(str(path.resolve()) for path in (Path(options.data_root) / options.images).glob("*.png"))
    if not paths:
        raise SystemExit(f"no PNG images in {Path(options.data_root) / options.images}; see --images")
    samples = [SampleKey(path=path, category="benchmark", sample_id=path) for path in paths]
    hashes = content_hashes(paths, str(work))
    store = FeatureStore(str(work / "cache"))
    about = {"dataset": "benchmark", "preprocessing": preprocessing, "store": store}
    features = feature_split(
        samples, hashes, split="train", resolved=resolved, layers=layers, encoder_factory=lambda _: encode.backbone,
        **about,
    )  # fmt: skip
    split = ImageSplit(samples, hashes=hashes, **about)
    stored, encoded = SplitReferences(features, context), SplitReferences(split, context)
    own = OwnReferences(stored, load_images(samples, preprocessing), encode)
    pool = ReferencePool(stored, len(paths), context)
    sources = {"store": stored, "pool": pool, "encode": encoded, "reencode": own, "official": own}
    kinds = {"reencode": Reencoding, "official": Official}
    batch = load_labelled(options, preprocessing)
    share = Share(epoch=0, step=0, num_images=len(batch), positions=tuple(range(len(batch))))
    projector = Projector([width for width, _, _ in shapes])
    centre = [0.01 * torch.randn(width, generator=torch.Generator().manual_seed(0)) for width, _, _ in shapes]

    steps = {}
    for side in SIDES:
        module = copy.deepcopy(projector)
        for count in COUNTS:
            config = Config(reference_counts=(count,))
            stage = kinds.get(side, Pretraining)(module, config, context, sources[side], (resolved.mean, resolved.std))
            stage.centre = centre
            steps[side, count] = stage, *stage.configure_optimizers()

    for count in COUNTS:  # fills the pool and warms up, too
        losses = [float(next(steps[side, count][0].losses(batch, share)).detach()) for side in SIDES]
        if max(losses) - min(losses) > 0.01 * abs(losses[0]):
            raise SystemExit(f"the sides disagree on the loss with {count} references: {losses}")

    cpu = {(side, count): [] for side in SIDES for count in COUNTS}
    wall, backbone = copy.deepcopy(cpu), copy.deepcopy(cpu)
    for number in range(options.rounds):
        share = Share(epoch=number, step=0, num_images=len(batch), positions=tuple(range(len(batch))))
        for count in COUNTS:
            for side in SIDES:
                stage, optimizer = steps[side, count]
                encode.seconds, start, begin = 0.0, time.process_time(), time.perf_counter()
                (loss,) = stage.losses(batch, share)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                cpu[side, count].append(time.process_time() - start)
                wall[side, count].append(time.perf_counter() - begin)
                backbone[side, count].append(encode.seconds)

    figures = {
        "backbone": options.backbone,
        "level_shapes": [list(shape) for shape in shapes],
        "batch_size": len(batch),
        "reference_images": len(paths),
        "rounds": options.rounds,
        "threads": options.threads,
    }
    rounds = {side: [sum(cpu[side, count][i] for count in COUNTS) for i in range(options.rounds)] for side in SIDES}
    walls = {side: [sum(wall[side, count][i] for count in COUNTS) for i in range(options.rounds)] for side in SIDES}
    for side in SIDES:
        spent = sum(sum(backbone[side, count]) for count in COUNTS)
        figures[f"{side}_images_per_cpu_second"] = len(COUNTS) * len(batch) / statistics.median(rounds[side])
        figures[f"{side}_images_per_second"] = len(COUNTS) * len(batch) / statistics.median(walls[side])
        figures[f"{side}_share_of_backbone"] = spent / sum(rounds[side])
    for base in SIDES[1:]:
        compared = _compare.compare(rounds, "store", base)
        figures[f"store_times_faster_than_{base}"] = compared["times_faster"]
        figures[f"store_times_faster_than_{base}_range"] = compared["times_faster_range"]
        figures[f"store_times_faster_than_{base}_with_1_4_8_references"] = [
            statistics.median(cpu[base, count]) / statistics.median(cpu["store", count]) for count in COUNTS
        ]
    return figures


# --- memory ---------------------------------------------------------------------------------------------------------


def predict_bytes(images, places, widths, precision, num_references=2048):
    """What a step holds on its device, by part; nothing grows faster than images * places * C.

    With T = 2 * images * places tokens of both views, C channels and a bytes for a number in the precision of the
    forward pass, each level keeps for the backward pass, of T C numbers:

    - projector: inputs, queries, attention and inputs of the MLP, and three times the 4 C numbers within the MLP, in a
      bytes; the sums of the attention's heads; the projected learned tokens, keys and values;
    - losses: projected tokens, their differences to the centre, unit vectors, those sorted by label, in float32.

    The backward pass adds gradients of one level. Parameters have gradients and two moments in float32. References,
    residuals and the activations of the backbone, a ViT-L here, come before all this and are gone by then, so that the
    sum of all parts is an upper bound.

    Args:
        images: of the batch on this worker.
        places: tokens of a map.
        widths: channels of every level.
        precision: float32 or bfloat16.
        num_references: learned tokens of a level.
    """
    number, lower = {"float32": (4, 0), "bfloat16": (2, 1)}[precision]
    tokens = 2 * images * places
    parts = {
        "projector": sum(
            tokens * width * 16 * number + tokens * math.gcd(width, 16) * 4
            + num_references * width * number * (3 + lower)
            for width in widths
        ),
        "losses": sum(tokens * width * 4 * 4 for width in widths),
        "backward": tokens * max(widths) * 3 * 4 * number + 3 * 4 * BLOCK_FLOATS,
        "parameters": 0,
        "residuals": sum(tokens * width * 4 for width in widths),
        "references": sum(max(COUNTS) * images * places * width * 4 for width in widths),
        "backbone": 4 * VIT_L_PARAMETERS + tokens * max(widths) * (2 * 4 * number + 4 * 4),
    }  # fmt: skip
    for width in widths:
        hidden = max(8, int(width / 4 + 4) // 8 * 8)
        numbers = num_references * width + width * width * (1 + 4 + 8) + 8 * width * hidden
        parts["parameters"] += numbers * (16 + number * lower)
    return parts


def forward(projector, rests, images, label, precision, whole):
    total = 0.0
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        for level in projector(rests):
            first, second = (view.flatten(2).transpose(1, 2).flatten(0, 1) for view in level.float().split(images))
            centre = torch.full((level.shape[1],), 0.01)
            angle = whole_angle_loss if whole else angle_loss
            total = total + angle(first, second, label, centre) + norm_loss(first, label) + norm_loss(second, label)
    return total


def count_bytes(images, side, widths, precision, whole=False):
    """Bytes of the tensors kept for the backward pass, each storage once and no parameter; and growth of the process.

    Half of the tokens are anomalous, the worst case for whole matrices.
    """
    projector = Projector(widths)
    projector([torch.zeros(2, width, side, side) for width in widths])[0].sum().backward()  # makes gradients
    parameters = {parameter.untyped_storage().data_ptr() for parameter in projector.parameters()}
    generator = torch.Generator().manual_seed(0)
    rests = [torch.randn(2 * images, width, side, side, generator=generator) for width in widths]
    label = torch.rand(images * side * side, generator=generator) < 0.5
    kept = {}

    def keep(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that its place is not used again
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        forward(projector, rests, images, label, precision, whole)
    counted = sum(storage.nbytes() for storage in kept.values())
    kept.clear()
    _, grown = _compare.peak_mib(lambda: forward(projector, rests, images, label, precision, whole).backward())
    return counted, grown * 2**20


def measure_memory():
    figures = {}
    for precision in ("float32", "bfloat16"):
        for images in (2, 4, 8):
            parts = predict_bytes(images, 256, (128, 128), precision)
            law = parts["projector"] + parts["losses"], parts["backward"]
            ours = count_bytes(images, 16, (128, 128), precision)
            whole = count_bytes(images, 16, (128, 128), precision, whole=True)
            figures[f"{precision}_{images}_images_kept_mib"] = ours[0] / 2**20
            figures[f"{precision}_{images}_images_kept_mib_by_the_law"] = law[0] / 2**20
            figures[f"{precision}_{images}_images_kept_mib_with_whole_matrices"] = whole[0] / 2**20
            figures[f"{precision}_{images}_images_growth_mib"] = ours[1] / 2**20
            figures[f"{precision}_{images}_images_growth_mib_by_the_law"] = sum(law) / 2**20
            figures[f"{precision}_{images}_images_growth_mib_with_whole_matrices"] = whole[1] / 2**20
        parts = predict_bytes(**PAPER, precision=precision)
        figures[f"paper_scale_{precision}_gib"] = sum(parts.values()) / 2**30
        figures |= {f"paper_scale_{precision}_{name}_gib": part / 2**30 for name, part in parts.items()}
    for workers in (1, 8):
        # Kept of a level: the exponentials of both orders. In blocks: none, however many workers gather their tokens.
        tokens = 2 * PAPER["images"] * PAPER["places"] * workers
        whole = 2 * len(PAPER["widths"]) * (tokens / 2) ** 2 * 4
        figures[f"paper_scale_whole_matrices_kept_with_{workers}x32_images_gib"] = whole / 2**30
    return figures


if __name__ == "__main__":
    main()
