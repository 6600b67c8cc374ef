"""Conditional normalising flows over vectors: invertible maps with an exact log-determinant.

A block couples the two halves of a vector: the first half and the condition say how the second is scaled and shifted.
Then every number is scaled and shifted by its own learned constants, and a fixed random rotation mixes the halves. This
is the "all-in-one" block of FrEIA (github.com/vislearn/FrEIA) with softplus scaling and soft permutation, as CFLOW-AD
(arXiv 2107.12571) uses it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DAMPING = 0.1
"""Factor on what a sub-network says, so that a fresh block is near to a rotation."""


class CouplingBlock(nn.Module):
    """One affine coupling with a condition, a learned scaling of every number, and a fixed rotation."""

    def __init__(self, width: int, condition_width: int, clamp: float, generator: torch.Generator) -> None:
        """Draws the rotation; the sub-network starts as torch's layers do, from the global generator.

        Args:
            width: numbers of a vector, at least 2.
            condition_width: numbers of a condition.
            clamp: bound of the logarithm of the coupling's scale, > 0.
            generator: for the rotation.
        """
        super().__init__()
        self.clamp = clamp
        self.num_kept, self.num_changed = width - width // 2, width // 2
        inputs = self.num_kept + condition_width
        self.subnet = nn.Sequential(
            nn.Linear(inputs, 2 * inputs), nn.ReLU(), nn.Linear(2 * inputs, 2 * self.num_changed)
        )
        # The softplus below turns this into a scale of 1.
        self.global_scale = nn.Parameter(torch.full((width,), 2 * math.log(math.exp(5) - 1)))
        self.global_offset = nn.Parameter(torch.zeros(width))
        self.rotation: Tensor
        self.register_buffer("rotation", draw_rotation(width, generator))

    def forward(self, vectors: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """One step from features towards the normal distribution.

        Args:
            vectors: (R, D).
            condition: (R, condition width).

        Returns:
            (R, D) vectors and the (R,) logarithm of the absolute determinant of the Jacobian, both in the precision of
            `vectors` whatever autocast says: only the sub-network runs in a lower one.
        """
        kept, changed = vectors.split([self.num_kept, self.num_changed], dim=1)
        coupling = _DAMPING * self.subnet(torch.cat([kept, condition], dim=1)).to(vectors.dtype)
        log_scale = self.clamp * torch.tanh(coupling[:, : self.num_changed])
        changed = changed * log_scale.exp() + coupling[:, self.num_changed :]
        scale = 0.1 * F.softplus(self.global_scale, beta=0.5)
        vectors = torch.cat([kept, changed], dim=1) * scale + self.global_offset
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors @ self.rotation
        return vectors, log_scale.sum(dim=1) + scale.log().sum()


class ConditionalFlow(nn.Module):
    """Coupling blocks in a row, and the density that they give to a vector."""

    def __init__(
        self, width: int, condition_width: int, num_blocks: int, clamp: float, generator: torch.Generator
    ) -> None:
        """See `CouplingBlock`; `num_blocks` of them."""
        super().__init__()
        self.width = width
        self.blocks = nn.ModuleList(CouplingBlock(width, condition_width, clamp, generator) for _ in range(num_blocks))

    def forward(self, vectors: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(R, D) vectors and (R, condition width) conditions to (R, D) latent vectors and (R,) log-determinants."""
        log_determinant = vectors.new_zeros(len(vectors))
        for block in self.blocks:
            vectors, step = block(vectors, condition)
            log_determinant = log_determinant + step
        return vectors, log_determinant

    def log_likelihood(self, vectors: Tensor, condition: Tensor) -> Tensor:
        """(R,) natural logarithm of the density at (R, D) vectors, given (R, condition width) conditions."""
        latent, log_determinant = self(vectors, condition)
        return log_determinant - 0.5 * latent.square().sum(dim=1) - 0.5 * self.width * math.log(2 * math.pi)


def draw_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A (width, width) float32 orthogonal matrix from the uniform (Haar) distribution.

    Mirrored ones are among them: a density does not tell them apart.
    """
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float().contiguous()
