"""A tiny dataset of its own layout: grey squares on noise, defects are bright dots."""

from pathlib import Path

import numpy as np
from PIL import Image

from harness.contracts import AdgridError, Category, Sample


class Squares:
    """Three categories, six training and eight test images of 64 pixels each, made on first use."""

    summary = "toy: grey squares with bright dots"
    licence = "Apache-2.0"
    home_page = "none"
    citation = "none"

    def __init__(self, name, root, places):
        self.name = name
        self.root = root or str(Path(places.cache_dir) / "toy_squares")

    def missing(self):
        return None

    def prepare(self):
        for number, category in enumerate(self.category_names()):
            for index in range(14):
                path = self._path(category, index)
                if not path.exists():
                    image, mask = self._draw(number, index)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(path.with_suffix(".mask.png"))
                    temporary = path.with_suffix(f".{number}.tmp.png")
                    Image.fromarray(image).save(temporary)
                    temporary.replace(path)

    def category_names(self):
        return ("large", "middle", "small")

    def category(self, name):
        if name not in self.category_names():
            raise AdgridError(f"toy_squares has no category {name!r}")
        samples = [self._sample(name, index) for index in range(14)]
        return Category(name=name, train=tuple(samples[:6]), test=tuple(samples[6:]), has_masks=True)

    def check(self, categories=None, decode=False):
        return []

    def _path(self, category, index):
        return Path(self.root) / category / f"{index:02d}.png"

    def _sample(self, category, index):
        path, label = self._path(category, index), int(index >= 10)
        return Sample(
            path=str(path),
            category=category,
            sample_id=f"{index:02d}",
            split="train" if index < 6 else "test",
            label=label,
            defect_type="dot" if label else "good",
            mask_path=str(path.with_suffix(".mask.png")) if label else None,
        )

    @staticmethod
    def _draw(number, index):
        rng = np.random.default_rng([number, index])
        image = rng.integers(90, 110, (64, 64, 3), dtype=np.uint8)
        side = 16 + 8 * number
        image[20 : 20 + side, 20 : 20 + side] = 160
        mask = np.zeros((64, 64), np.uint8)
        if index >= 10:
            y, x = rng.integers(8, 50, 2)
            image[y : y + 8, x : x + 8] = 255
            mask[y : y + 8, x : x + 8] = 255
        return image, mask
