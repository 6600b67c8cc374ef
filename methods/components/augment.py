"""Random changes of colour and shape, for (3, H, W) float32 images in [0, 1].

`augment_texture` applies three of the ten that DRAEM (arXiv 2108.07610, official code) draws from. Their ranges are
those of the imgaug operations named there. Everything is computed where the image is, from numbers drawn on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.components.warp import rotate_image

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in brightness, ITU-R BT.601."""
NUM_LEVELS = 256
"""Grey levels of the histograms, those of an 8-bit image."""


def draw_uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A number drawn evenly from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def augment_texture(texture: Tensor, generator: torch.Generator, num_changes: int = 3) -> Tensor:
    """Changes a texture by some of the ten `AUGMENTERS`, drawn without repetition, in a drawn order.

    Args:
        texture: (3, H, W) in [0, 1].
        generator: draws the changes and their strengths.
        num_changes: how many, in [0, 10].

    Returns:
        (3, H, W) in [0, 1].
    """
    order = torch.randperm(len(AUGMENTERS), generator=generator)[:num_changes]
    for index in order.tolist():
        texture = AUGMENTERS[index](texture, generator).clamp(0, 1)
    return texture


def jitter_colour(image: Tensor, generator: torch.Generator, amount: float) -> Tensor:
    """Changes brightness, contrast and saturation by factors in [1 - amount, 1 + amount), and hue by up to `amount`
    turns of the colour circle."""
    brightness, contrast, saturation = (draw_uniform(generator, 1 - amount, 1 + amount) for _ in range(3))
    image = (image * brightness).clamp(0, 1)
    image = torch.lerp(_luma(image).mean().expand_as(image), image, contrast).clamp(0, 1)
    image = torch.lerp(_luma(image).expand_as(image), image, saturation).clamp(0, 1)
    hue, own_saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(hue + draw_uniform(generator, -amount, amount), own_saturation, value)


def change_gamma(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Raises each channel to a power in [0.5, 2)."""
    powers = 0.5 + 1.5 * torch.rand(3, generator=generator)
    return texture ** powers.to(texture.device)[:, None, None]


def change_brightness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Multiplies brightness by a factor in [0.8, 1.2) and adds up to 30 of 255; colour differences stay."""
    factor, offset = draw_uniform(generator, 0.8, 1.2), draw_uniform(generator, -30, 30) / 255
    return texture + (factor - 1) * _luma(texture) + offset


def change_sharpness(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Between smoothed (0) and as far beyond the texture as that is before it (2)."""
    around = F.avg_pool2d(F.pad(texture[None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    smooth = (9 * around + 4 * texture) / 13  # a 3 x 3 window with weight 5 in its middle and 1 elsewhere
    return torch.lerp(smooth, texture, draw_uniform(generator, 0, 2))


def shift_hue_and_saturation(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Moves the hue by up to 50 of 255 turns and the saturation by up to 50 of 255, each for itself."""
    hue, saturation, value = rgb_to_hsv(texture)
    hue = hue + draw_uniform(generator, -50, 50) / 255
    saturation = saturation + draw_uniform(generator, -50, 50) / 255
    return hsv_to_rgb(hue, saturation.clamp(0, 1), value)


def solarise(texture: Tensor, generator: torch.Generator) -> Tensor:
    """In every second draw inverts what is brighter than a threshold in [32, 128) of 255."""
    threshold = draw_uniform(generator, 32, 128) / 255
    if draw_uniform(generator, 0, 1) < 0.5:
        return texture
    return torch.where(texture >= threshold, 1 - texture, texture)


def posterise(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Keeps the highest 1 to 8 bits of each 8-bit value."""
    step = 2 ** int(torch.randint(8, (), generator=generator))
    return (texture * 255 / step).floor() * step / 255


def invert(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Dark to bright and back."""
    return 1 - texture


def stretch_contrast(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Stretches each channel to [0, 1] after cutting off up to a fifth of its pixels at both ends."""
    share = draw_uniform(generator, 0, 0.2)
    shares = _histogram(texture).cumsum(dim=1)
    shares = shares / shares[:, -1:]
    # Grey level of the first pixel that is not cut off, from below and from above.
    low = (shares <= share).sum(dim=1)[:, None, None] / (NUM_LEVELS - 1)
    high = (shares < 1 - share).sum(dim=1)[:, None, None] / (NUM_LEVELS - 1)
    return torch.where(high > low, (texture - low) / (high - low), texture)


def equalise(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Maps each channel so that its grey levels become about equally frequent; a flat channel stays."""
    counts = _histogram(texture)
    below = counts.cumsum(dim=1)
    lowest = counts.gather(1, (counts > 0).int().argmax(dim=1, keepdim=True))
    rest = below[:, -1:] - lowest
    table = (below - lowest) / rest.clamp(min=1)
    equal = table.gather(1, _grey_levels(texture).flatten(1)).view_as(texture)
    return torch.where(rest[:, :, None] > 0, equal, texture)


def turn(texture: Tensor, generator: torch.Generator) -> Tensor:
    """Turns by up to 45 degrees; what comes from outside is black."""
    return rotate_image(texture, draw_uniform(generator, -45, 45))


AUGMENTERS = (
    change_gamma,
    change_brightness,
    change_sharpness,
    shift_hue_and_saturation,
    solarise,
    posterise,
    invert,
    stretch_contrast,
    equalise,
    turn,
)
"""What `augment_texture` draws from."""


def rgb_to_hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns [0, 1), saturation and value in [0, 1], each (H, W), of a (3, H, W) image; grey has hue 0."""
    value, largest = image.max(dim=0)
    spread = value - image.amin(dim=0)
    red, green, blue = image / torch.where(spread > 0, spread, 1)
    sector = torch.where(largest == 0, green - blue, torch.where(largest == 1, blue - red + 2, red - green + 4))
    saturation = spread / torch.where(value > 0, value, 1)
    return torch.where(spread > 0, sector / 6 % 1, 0), saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """(3, H, W) of hue in turns, any number, and saturation and value in [0, 1], each (H, W)."""
    channels = []
    for start in (5, 3, 1):  # red, green, blue: how far each lies along the circle of six sectors
        place = (start + hue * 6) % 6
        channels.append(value * (1 - saturation * torch.minimum(place, 4 - place).clamp(0, 1)))
    return torch.stack(channels)


def _luma(image: Tensor) -> Tensor:
    """(1, H, W) brightness."""
    red, green, blue = LUMA
    return red * image[:1] + green * image[1:2] + blue * image[2:]


def _grey_levels(image: Tensor) -> Tensor:
    """int64 levels in [0, 255]."""
    return (image * (NUM_LEVELS - 1)).round().long()


def _histogram(image: Tensor) -> Tensor:
    """(3, 256) float32 counts; unlike `torch.bincount` it does not wait for a device."""
    levels = _grey_levels(image).flatten(1)
    counts = torch.zeros(3, NUM_LEVELS, device=image.device)
    return counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=counts.dtype))
