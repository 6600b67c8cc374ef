"""Small trees in the layout of MVTec AD, made by the tests that read them."""

import numpy as np
from PIL import Image


def save_image(path, value=100, size=(12, 10), mode="L"):
    """A plain picture of (width, height) `size`; the format follows the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(path)


def save_mask(path, size=(12, 10), value=255):
    """A mask whose upper left 4 x 3 pixels are a defect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[:3, :4] = value
    Image.fromarray(mask).save(path)


def make_category(root, name="bottle", masks=True):
    """Makes `<root>/<name>` with 3 training, 2 good and 2 cracked test images and their masks."""
    folder = root / name
    for number in range(3):
        save_image(folder / "train" / "good" / f"{number:03d}.png", 90 + number)
    for number in range(2):
        save_image(folder / "test" / "good" / f"{number:03d}.png", 80 + number)
        save_image(folder / "test" / "crack" / f"{number:03d}.png", 40 + number)
        if masks:
            save_mask(folder / "ground_truth" / "crack" / f"{number:03d}_mask.png")
    return folder
