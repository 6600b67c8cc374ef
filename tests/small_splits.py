"""Normal and defective feature maps, as splits of a category, without any backbone."""

import torch

from harness.contracts import Batch, Context, SampleKey, derive_seed

SHAPES = ((6, 8, 8), (10, 4, 4))


class LevelSplit:
    """A split over (N, D_l, h_l, w_l) feature maps in memory."""

    def __init__(self, levels, batch_size=4):
        self.levels, self.batch_size = levels, batch_size
        self.samples = tuple(
            SampleKey(path=f"/{i}.png", category="toy", sample_id=str(i)) for i in range(len(levels[0]))
        )

    def __len__(self):
        return len(self.samples)

    def take(self, indices):
        rows = list(indices)
        return Batch(samples=tuple(self.samples[i] for i in rows), levels=tuple(level[rows] for level in self.levels))

    def __iter__(self):
        for begin in range(0, len(self), self.batch_size):
            yield self.take(range(begin, min(begin + self.batch_size, len(self))))


def normal_maps(num, seed, shapes=SHAPES):
    """Smooth gradients that differ little from image to image."""
    generator = torch.Generator().manual_seed(seed)
    levels = []
    for width, height, breadth in shapes:
        ramp = torch.linspace(0, 4, height)[:, None] + torch.linspace(0, 2, breadth)
        weight = torch.linspace(-1, 1, width)[:, None, None]
        levels.append(ramp * weight + 0.2 * torch.randn(num, width, height, breadth, generator=generator))
    return levels


def painted(levels):
    """The maps with a defect in the top left corner: rows and columns 2 and 3 of 8."""
    changed = [level.clone() for level in levels]
    for level in changed:
        scale = level.shape[2] // 4
        level[:, :, scale : 2 * scale, scale : 2 * scale] += 3.0
    return changed


def toy_context(shapes=SHAPES, seed=0, **changes):
    """Draws that depend on the seed alone."""
    settings = {
        "level_shapes": tuple(shapes),
        "image_size": (32, 32),
        "categories": ("toy",),
        "device": torch.device("cpu"),
        "seed_of": lambda name: derive_seed(name, "toy", seed),
    }
    return Context(**(settings | changes))
