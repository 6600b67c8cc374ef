"""Small labelled images, an encoder, a projector and tokens for the tests of ADPretrain."""

import torch
import torch.nn.functional as F

from harness.contracts import Context, LabelledBatch, SampleKey, derive_seed
from methods.adpretrain import Projector

SIZE = (32, 32)
SHAPES = ((16, 8, 8), (24, 4, 4))
NUM = 5


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(num, width, anomalous, seed=0, dtype=torch.float32):
    """Two views that resemble each other, labels with that many anomalous, a centre."""
    view = draw(num, width, seed=seed, dtype=dtype)
    other = view + 0.3 * draw(num, width, seed=seed + 1, dtype=dtype)
    labels = torch.zeros(num, dtype=torch.int64)
    labels[torch.randperm(num, generator=torch.Generator().manual_seed(seed))[:anomalous]] = 1
    return view, other, labels, 0.2 * draw(width, seed=seed + 2, dtype=dtype)


def small_projector(seed=0):
    return Projector([16, 24], num_references=20, seed=seed)


class Images:
    """Grey images with noise of two categories and two views; every second has a striped square as its defect."""

    def __init__(self, num=NUM, features=None, seed=0, normal=False):
        pixels = 0.4 + 0.2 * torch.rand(num, 3, *SIZE, generator=torch.Generator().manual_seed(seed))
        self.masks = torch.zeros(num, *SIZE, dtype=torch.uint8)
        if not normal:
            self.masks[1::2, 8:24, 4:20] = 1
        self.labels = self.masks.flatten(1).amax(dim=1).long()
        stripes = torch.arange(SIZE[1]) // 2 % 2
        self.pixels = torch.where(self.masks[:, None] == 1, 0.2 * pixels + 0.8 * stripes, pixels)
        self.features = features
        self.samples = tuple(
            SampleKey(path=f"/{i}.png", category="ab"[i // 2 % 2], sample_id=str(i), view="C1" if i % 3 else "C2")
            for i in range(num)
        )
        self.taken = []

    def __len__(self):
        return len(self.samples)

    def take(self, indices):
        rows = list(indices)
        self.taken += rows
        what = {"images": self.pixels[rows]} if self.features is None else {"levels": self.features(self.pixels[rows])}
        samples = tuple(self.samples[i] for i in rows)
        return LabelledBatch(samples=samples, labels=self.labels[rows], masks=self.masks[rows], **what)

    def __iter__(self):
        for begin in range(0, len(self), 3):
            yield self.take(range(begin, min(begin + 3, len(self))))


class Encoder:
    """Two levels of random convolutions, with a count of the images they have seen."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.kernels = [torch.randn(width, 3, 32 // side, 32 // side, generator=generator) for width, side, _ in SHAPES]
        self.num_images = 0

    def __call__(self, images):
        self.num_images += len(images)
        return tuple(0.3 * F.conv2d(images, kernel, stride=kernel.shape[2]) for kernel in self.kernels)


def make_context(encode=None):
    return Context(
        level_shapes=SHAPES,
        image_size=SIZE,
        categories=("a", "b"),
        device=torch.device("cpu"),
        seed_of=lambda name: derive_seed(name, "toy", 0),
        encode=encode or Encoder(),
    )


def normal_images(**changes):
    return Images(**{"num": 12, "seed": 1, "normal": True, **changes})
