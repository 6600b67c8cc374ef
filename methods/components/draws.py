"""Random numbers of a training that do not depend on how many workers share it.

A draw belongs either to one image in one epoch or to one step of all workers; its generator is seeded by just that.
"""

from __future__ import annotations

import torch

from harness.contracts import Context, SampleKey, Share


def image_generator(context: Context, name: str, image: SampleKey, epoch: int) -> torch.Generator:
    """A fresh CPU generator for what is drawn for one image in one epoch, such as its noise or its painted defect.

    Args:
        context: the method's.
        name: of the draw.
        image: whose; told apart by category, sample and view, not by where its file lies.
        epoch: counted from 0.
    """
    return context.generator("\x1f".join((name, str(epoch), image.category, image.sample_id, image.view)))


def step_generator(context: Context, name: str, share: Share) -> torch.Generator:
    """A fresh CPU generator for what all workers draw alike in one step, such as an order of the whole batch."""
    return context.generator("\x1f".join((name, str(share.epoch), str(share.step))))
