"""A method that does nothing and images of a few pixels, so that only the harness costs time; see `scale.py`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.contracts import Category, Prediction, Sample

METHOD_VERSION = 1
NUM_CATEGORIES = 10


class Noop:
    """Learns nothing; the score of an image is its brightness."""

    summary = "benchmark: does nothing"
    scope = "category"
    backbone_use = "none"
    smoothing = 0.0
    score_reduction = "max"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        number: int = 0
        """Changes the id and nothing else."""

    @classmethod
    def inputs(cls, config):
        return "images"

    def __init__(self, config, context):
        self.config = config

    def fit(self, train):
        pass

    def predict(self, batch):
        return Prediction(anomaly_map=batch.images.mean(dim=1))

    def state_dict(self):
        return {"nothing": torch.zeros(1)}

    def load_state_dict(self, state):
        pass


class Specks:
    """Ten categories of one training and two test images of 16 pixels."""

    summary = "benchmark: specks"
    licence = "Apache-2.0"
    home_page = "none"
    citation = "none"

    def __init__(self, name, root, places):
        self.name = name
        self.root = Path(places.cache_dir) / "specks" / name

    def missing(self):
        return None

    def prepare(self):
        for name in self.category_names():
            if not (self.root / name / "mask.png").exists():
                (self.root / name).mkdir(parents=True, exist_ok=True)
                rng = np.random.default_rng([*self.name.encode(), *name.encode()])
                pixels = rng.integers(0, 100, (3, 16, 16, 3), dtype=np.uint8)
                mask = np.zeros((16, 16), np.uint8)
                mask[2:4, 2:4] = 255
                pixels[2, 2:4, 2:4] = 255
                for kind, image in zip(("train", "good", "speck", "mask"), (*pixels, mask), strict=True):
                    Image.fromarray(image).save(self.root / name / f"{kind}.png")

    def category_names(self):
        return tuple(f"c{number}" for number in range(NUM_CATEGORIES))

    def category(self, name):
        def sample(kind):
            return Sample(
                path=str(self.root / name / f"{kind}.png"),
                category=name,
                sample_id=kind,
                split="train" if kind == "train" else "test",
                label=int(kind == "speck"),
                defect_type=kind,
                mask_path=str(self.root / name / "mask.png") if kind == "speck" else None,
            )

        return Category(name=name, train=(sample("train"),), test=(sample("good"), sample("speck")), has_masks=True)

    def check(self, categories=None, decode=False):
        return []
