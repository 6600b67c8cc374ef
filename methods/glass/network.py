"""What GLASS trains: the adaptor of patch features and the discriminator of normal and anomalous ones."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from harness.contracts import Context
from methods.components.collectives import SharedBatchNorm
from methods.glass.settings import Config


class Network(nn.Module):
    """What is trained: the adaptor of patch features, and the discriminator of normal and anomalous ones."""

    def __init__(self, width: int, config: Config, context: Context) -> None:
        """Args: width of the patch features; the configuration; a context for the initial weights."""
        super().__init__()
        self.adaptor = nn.Linear(width, width) if config.adaptor else nn.Identity()
        widths = [width] + [config.hidden_width] * (config.discriminator_layers - 1) + [1]
        linears = [nn.Linear(before, after, bias=False) for before, after in pairwise(widths)]
        self.first = linears[0]
        """The discriminator's first layer by itself: it need not be repeated for features that do not move."""
        rest: list[nn.Module] = []
        for linear in linears[1:]:
            rest += [SharedBatchNorm(config.hidden_width), nn.LeakyReLU(0.2), linear]
        self.rest = nn.Sequential(*rest)
        generator = context.generator("glass weights")
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.xavier_normal_(linear.weight, generator=generator)
            if linear.bias is not None:
                bound = linear.in_features**-0.5
                nn.init.uniform_(linear.bias, -bound, bound, generator=generator)

    def adapt(self, patches: Tensor) -> Tensor:
        """(..., E) patch features to (..., E) features that the discriminator sees, float32."""
        return self.adaptor(patches).float()

    def judge(self, hidden: Tensor) -> Tensor:
        """(B, P, F) outputs of the first layer to (B, P) logits, higher = more anomalous."""
        return self.rest(hidden.flatten(0, 1)).float().view(hidden.shape[:2])
