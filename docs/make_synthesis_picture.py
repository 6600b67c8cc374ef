"""Draws `docs/synthesis.webp`: what the synthetic anomalies look like on normal images.

    python docs/make_synthesis_picture.py --images DATA_ROOT/mvtec_ad/bottle/train/good

One column per way of making them: a normal image above, the same with its anomaly in the middle, the mask below.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from harness.contracts import derive_seed
from methods.components.augment import augment_texture, draw_uniform
from methods.components.synthesis import blend_texture, cut_paste, open_textures, perlin_mask, seamless_patch

SIDE, GAP, CAPTION = 160, 6, 18
Anomaly = tuple[Tensor, Tensor]


def main() -> None:
    """Reads the arguments and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of normal images, at least two")
    parser.add_argument("--textures", default=None, help="folder of textures such as DTD's; generated ones by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("synthesis.webp"))
    arguments = parser.parse_args()
    paths = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(paths) < 2:
        parser.error(f"--images: {arguments.images} holds {len(paths)} images, two are needed")
    columns = list(make_columns([read(path) for path in paths[:8]], arguments.textures))
    draw_sheet(columns).save(arguments.out, quality=80, method=6)


def make_columns(images: list[Tensor], textures: str | None) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Caption, normal image, image with anomaly and mask, for every column."""
    source = open_textures(textures)

    def perlin(image: Tensor, generator: torch.Generator) -> Anomaly:
        mask = perlin_mask((SIDE, SIDE), generator)
        texture = augment_texture(source.texture((SIDE, SIDE), generator), generator)
        return blend_texture(image, texture, mask, draw_uniform(generator, 0, 0.8)), mask

    ways: list[tuple[str, Callable[[Tensor, torch.Generator], Anomaly]]] = [
        ("Perlin", perlin),
        ("Perlin", perlin),
        ("Perlin", perlin),
        ("CutPaste", cut_paste),
        ("CutPaste scar", lambda image, generator: cut_paste(image, generator, variant="scar")),
        ("seamless", lambda image, generator: seamless_patch(image, images[-1], generator)),
        ("seamless, mixed", lambda image, generator: seamless_patch(image, images[-1], generator, gradients="mixed")),
    ]
    for number, (caption, way) in enumerate(ways):
        image = images[number % (len(images) - 1)]
        yield caption, image, *draw_visible(way, image, number)


def draw_visible(way: Callable[[Tensor, torch.Generator], Anomaly], image: Tensor, number: int) -> Anomaly:
    """The first draw whose mask is large enough to be seen in a small picture."""
    for attempt in range(1000):
        changed, mask = way(image, torch.Generator().manual_seed(derive_seed("synthesis picture", number, attempt)))
        if 0.01 < float(mask.float().mean()) < 0.2:
            break
    return changed, mask


def read(path: Path) -> Tensor:
    """(3, SIDE, SIDE) in [0, 1]."""
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def draw_sheet(columns: list[tuple[str, Tensor, Tensor, Tensor]]) -> Image.Image:
    """All columns side by side."""
    step = SIDE + GAP
    sheet = Image.new("RGB", (len(columns) * step + GAP, 3 * step + CAPTION + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (caption, *pictures, mask) in enumerate(columns):
        left = GAP + number * step
        pen.text((left, 4), caption, fill="black")
        for row, picture in enumerate([*pictures, mask.float().expand(3, SIDE, SIDE)]):
            pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(pixels), (left, CAPTION + GAP + row * step))
    return sheet


if __name__ == "__main__":
    main()
