"""The feature projector of ADPretrain (arXiv 2511.05245): attention to learned references, then a gated MLP, per level.

    R' = Conv1x1(R)                      R: 2048 learned tokens
    x1 = x - MultiheadAttention(x, R', R')
    y  = x1 + W2 GELU(SE(W1 x1))         SE(u) = u * sigmoid(F2 ReLU(F1 mean of u over the tokens of the image))

No layer norm, no position embedding, no dropout. As the gate sees the mean over all tokens of an image, a token's
projection depends on the rest of its image, but not on other images. Modules are named as in the official code, so that
its checkpoints fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_REFERENCES = 2048
MAX_HEADS = 16


class Projector(nn.Module):
    """One independent projector for each level: `l1_proj`, `l2_proj` and so on."""

    def __init__(self, channels: Sequence[int], *, num_references: int = NUM_REFERENCES, seed: int = 0) -> None:
        """Draws the initial weights.

        Args:
            channels: C of every level. The 16 heads of the paper need a multiple of 16; other widths have as many
                heads as the largest power of two, up to 16, that divides them.
            num_references: learned tokens per level, >= 1.
            seed: of the initial weights, which do not depend on what was drawn before.
        """
        super().__init__()
        if not channels or min(channels) < 1 or num_references < 1:
            raise ValueError(f"a projector needs levels and references, got {list(channels)} and {num_references}")
        self.channels = tuple(channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for number, width in enumerate(channels, start=1):
                self.add_module(f"l{number}_proj", LevelProjector(width, num_references))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Level maps (B, C, h, w), one for each level, to maps of the same shapes."""
        return [project(level) for project, level in zip(self.children(), levels, strict=True)]


class LevelProjector(nn.Module):
    """The projector of one level."""

    def __init__(self, width: int, num_references: int = NUM_REFERENCES) -> None:
        """Args: C; number of learned tokens."""
        super().__init__()
        self.layers = nn.ModuleList([Layer(width)])
        self.x_ref = nn.Parameter(torch.randn(1, num_references, width))
        self.ref_proj = ReferenceProjection(width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) to the same shape."""
        tokens = features.flatten(2).transpose(1, 2)  # (B, P, C)
        reference = self.ref_proj(self.x_ref[0])
        for layer in self.layers:
            tokens = layer(tokens, reference)
        return tokens.transpose(1, 2).reshape(features.shape)


class ReferenceProjection(nn.Module):
    """A 1 x 1 convolution of the learned tokens."""

    def __init__(self, width: int) -> None:
        """Args: C."""
        super().__init__()
        self.project = nn.Conv1d(width, width, kernel_size=1)
        nn.init.kaiming_normal_(self.project.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, reference: Tensor) -> Tensor:
        """(R, C) to (R, C)."""
        return F.linear(reference, self.project.weight[:, :, 0], self.project.bias)


class Layer(nn.Module):
    """Subtracted cross-attention, then the gated MLP."""

    def __init__(self, width: int) -> None:
        """Args: C."""
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(width, math.gcd(width, MAX_HEADS), batch_first=True)
        self.mlp = GatedMlp(width)

    def forward(self, tokens: Tensor, reference: Tensor) -> Tensor:
        """Tokens (B, P, C) and references (R, C) to (B, P, C)."""
        rest = tokens - self.attend(tokens, reference)
        return rest + self.mlp(rest)

    def attend(self, tokens: Tensor, reference: Tensor) -> Tensor:
        """What `cross_attn` gives for these queries, with the references as keys and values of every image.

        The references are the same for all images, so their keys and values are computed once, and the queries of all
        images are those of one long sequence.

        Args:
            tokens: (B, P, C) queries.
            reference: (R, C) keys and values.

        Returns:
            (B, P, C).
        """
        attention, width = self.cross_attn, tokens.shape[2]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        queries = F.linear(tokens.flatten(0, 1), weight[:width], bias[:width])
        keys, values = F.linear(reference, weight[width:], bias[width:]).chunk(2, dim=1)
        heads = [rows.unflatten(1, (attention.num_heads, -1)).transpose(0, 1)[None] for rows in (queries, keys, values)]
        mixed = F.scaled_dot_product_attention(*heads)  # (1, heads, B * P, C / heads)
        return attention.out_proj(mixed[0].transpose(0, 1).flatten(1)).view_as(tokens)


class GatedMlp(nn.Module):
    """Two linear layers with a gate on the channels in between."""

    def __init__(self, width: int) -> None:
        """Args: C; hidden are 4 C."""
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.se = ChannelGate(4 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P, C) to (B, P, C)."""
        return self.fc2(F.gelu(self.se(self.fc1(tokens))))


class ChannelGate(nn.Module):
    """Squeeze and excitation (arXiv 1709.01507) over the tokens of an image."""

    def __init__(self, width: int) -> None:
        """Args: number of channels; the hidden layer has a 16th of them, to the nearest multiple of 8."""
        super().__init__()
        hidden = max(8, int(width / 16 + 4) // 8 * 8)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P, D) to the same, each image's channels scaled by factors in (0, 1)."""
        squeezed = tokens.mean(dim=1, keepdim=True)
        return tokens * self.fc2(F.relu(self.fc1(squeezed))).sigmoid()
