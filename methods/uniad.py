"""UniAD: You, Cui, Shen, Yang, Lu, Zheng, Le, "A Unified Model for Multi-class Anomaly Detection", NeurIPS 2022,
arXiv 2206.03687.

One transformer for all categories rebuilds the frozen features of normal images from noisy ones, without looking at
the surroundings of the patch it rebuilds, so that it cannot copy. A patch is as anomalous as its features are rebuilt
badly.

Differences from the paper and its code (zhiyuanyou/UniAD):

- Features are resized to the grid of the coarsest level, which is the paper's stride 16 where the levels are its own.
- The official code copies a layer to make several, so that some of their weights start equal; here each is drawn.
- The official code keeps the epoch with the best mean pixel AUROC on the test images and turns round an AUROC below
  0.5; here the protocol's `selection` decides and nothing is turned round.
- The paper's batch is 8 images on each of 8 GPUs, the official code's single-GPU result one of 8; here it is 8 in all.

The noise on the features is drawn for each image, so the result does not depend on the number of workers, but for
dropout: it comes from the global generator, seeded per epoch and worker, and other numbers of workers draw other masks.
With `dropout: 0` the results agree.

Preset `adpretrain` is the form of ADPretrain (arXiv 2511.05245): a wider transformer. It also takes the largest pixel
for the image score, without the mean over 16 x 16 pixels: `score_reduction: max` in the evaluation protocol.

To reach: image AUROC 97.6, pixel AUROC 97.0 (%) on MVTec AD, all categories in one model, with EfficientNet-B4 at 224
pixels on one GPU, 96.7 and 96.8 on eight (official code; best epoch on the test images).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.contracts import AdgridError, Batch, Context, Inputs, LevelChoice, Prediction, Share, Split, Trainable
from methods.components.draws import image_generator

METHOD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of UniAD; the defaults are the paper's."""

    epochs: int = 1000
    """Passes over the training images of all categories, >= 1."""
    batch_size: int = 8
    """Images per step, >= 1."""
    learning_rate: float = 1e-4
    """Of AdamW, > 0."""
    weight_decay: float = 1e-4
    """Of AdamW, >= 0."""
    decay_epochs: int = 800
    """After so many epochs, and again after as many more, the learning rate falls to a tenth, >= 1."""
    clip_norm: float = 0.1
    """Largest norm of the gradient, > 0."""
    hidden_width: int = 256
    """Numbers of a token in the transformer, even and a multiple of `heads`."""
    feedforward_width: int = 1024
    """Hidden numbers of a feed-forward network, >= 1."""
    encoder_layers: int = 4
    """Layers of attention among the noisy tokens, >= 0."""
    decoder_layers: int = 4
    """Layers of learned queries that rebuild the tokens, >= 1."""
    heads: int = 8
    """Of every attention, >= 1."""
    dropout: float = 0.1
    """In [0, 1)."""
    neighbour_size: int = 7
    """Side, in patches, of the neighbourhood that no attention sees, odd; 0 lets it see all."""
    jitter_scale: float = 20.0
    """Strength of the noise on the features in training, >= 0; 0 for none."""

    def __post_init__(self) -> None:
        for name in (
            "epochs", "batch_size", "decay_epochs", "hidden_width", "feedforward_width", "decoder_layers", "heads"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "encoder_layers", "jitter_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.hidden_width % 2 or self.hidden_width % self.heads:
            raise ValueError(
                f"hidden_width must be even and a multiple of heads ({self.heads}), got {self.hidden_width}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.neighbour_size < 0 or (self.neighbour_size and self.neighbour_size % 2 == 0):
            raise ValueError(f"neighbour_size must be odd, or 0 for none, got {self.neighbour_size}")


_Config = Config  # inside the class below, `Config` is its attribute


class UniAD:
    """A transformer that rebuilds features; scores are its errors."""

    summary = "one transformer rebuilds the features of all categories (UniAD, arXiv 2206.03687)"
    scope = "dataset"
    backbone_use = "frozen"
    levels = LevelChoice(strides=(2, 4, 8, 16), taps=(0, 1, 2, 3))
    smoothing = 0.0
    score_reduction = "mean_pool_16"
    Config = Config
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "adpretrain": {"hidden_width": 512, "feedforward_width": 2048}
    }
    """Parameters of published variants."""

    @classmethod
    def inputs(cls, config: _Config) -> Inputs:
        """Features of the frozen backbone."""
        return "features"

    def __init__(self, config: _Config, context: Context) -> None:
        self.config, self.context = config, context
        self.grid = min((height, width) for _, height, width in context.level_shapes)
        """(h, w) of the coarsest level."""
        widths = sum(width for width, _, _ in context.level_shapes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed_of("weights"))
            network = Rebuilder(widths, self.grid, config)
        self.network = network.to(context.device).eval()

    def stages(self) -> list[Trainable]:
        """The training of the transformer."""
        return [_Rebuilding(self)]

    def tokens(self, batch: Batch) -> Tensor:
        """(B, P, D) features of all levels side by side, on the grid of the coarsest (corners aligned)."""
        assert batch.levels is not None, "the method asked for features"
        levels = [level.to(self.context.device, non_blocking=True) for level in batch.levels]
        resized = [F.interpolate(level, self.grid, mode="bilinear", align_corners=True) for level in levels]
        return torch.cat(resized, dim=1).flatten(2).transpose(1, 2)

    def fit(self, train: Split) -> None:
        """Nothing is left to do after the training."""

    @torch.no_grad()
    def predict(self, batch: Batch) -> Prediction:
        """Euclidean norm of the error of each patch, resized to the image (corners aligned); the image score is left
        to the harness."""
        tokens = self.tokens(batch)
        errors = torch.linalg.vector_norm(self.network(tokens) - tokens, dim=2).unflatten(1, self.grid)
        size = self.context.image_size
        return Prediction(anomaly_map=F.interpolate(errors[:, None], size, mode="bilinear", align_corners=True)[:, 0])

    def state_dict(self) -> dict[str, Tensor]:
        """The transformer."""
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a method with the same configuration and level shapes."""
        self.network.load_state_dict(state)


class _Rebuilding(Trainable):
    """Rebuilds features out of noisy ones."""

    name = "transformer"

    def __init__(self, method: UniAD) -> None:
        self.method, self.config, self.module = method, method.config, method.network
        self.epochs, self.batch_size = self.config.epochs, self.config.batch_size
        self.clip_norm = self.config.clip_norm

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW over all parameters."""
        rate, decay = self.config.learning_rate, self.config.weight_decay
        return [torch.optim.AdamW(self.module.parameters(), lr=rate, weight_decay=decay)]

    def lr_factor(self, progress: float) -> float:
        """A tenth after every `decay_epochs` epochs."""
        return 0.1 ** (int(progress) // self.config.decay_epochs)

    def losses(self, batch: Batch, share: Share) -> Iterator[Tensor]:
        """The mean squared error over all numbers of all patches."""
        tokens = self.method.tokens(batch)
        noisy = tokens
        if self.config.jitter_scale:
            noisy = jitter(tokens, self._draw_noise(batch, share.epoch, tokens), self.config.jitter_scale)
        errors = F.mse_loss(self.module(noisy).float(), tokens, reduction="sum")
        yield errors / (share.num_images * tokens[0].numel())

    def _draw_noise(self, batch: Batch, epoch: int, tokens: Tensor) -> Tensor:
        """(B, P, D) standard normal numbers, a draw per image and epoch."""
        draws = [
            torch.randn(tokens.shape[1:], generator=image_generator(self.method.context, "jitter", sample, epoch))
            for sample in batch.samples
        ]
        return torch.stack(draws).to(tokens.device, non_blocking=True)


def jitter(tokens: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Noise in proportion to each token's norm: f + scale * ||f|| / D * noise (section 3.3 of the paper).

    Args:
        tokens: (B, P, D).
        noise: (B, P, D) standard normal numbers.
        scale: >= 0.

    Returns:
        (B, P, D).
    """
    return tokens + noise * (torch.linalg.vector_norm(tokens, dim=2, keepdim=True) * (scale / tokens.shape[2]))


def neighbour_mask(grid: tuple[int, int], size: int) -> Tensor:
    """Which patches an attention must not see: those around the patch itself, and the patch.

    Args:
        grid: (h, w) in patches.
        size: side of the square neighbourhood, odd; 0 for none.

    Returns:
        (P, P) bool, row by row of the grid; True hides the patch of the column from that of the row.

    Raises:
        AdgridError: the grid is so small that some patch would see nothing.
    """
    rows, columns = (torch.arange(length) for length in grid)
    near_rows, near_columns = (2 * (axis[:, None] - axis).abs() < size for axis in (rows, columns))
    hidden = (near_rows[:, None, :, None] & near_columns[None, :, None, :]).flatten(2).flatten(0, 1)
    if hidden.all(dim=1).any():
        raise AdgridError(
            f"uniad: on a grid of {grid[0]} x {grid[1]} patches a neighbourhood of {size} hides everything from some "
            f"patch; make neighbour_size smaller, or use larger images or a layer with a finer grid"
        )
    return hidden


class Rebuilder(nn.Module):
    """The transformer between noisy and rebuilt features."""

    def __init__(self, width: int, grid: tuple[int, int], config: _Config) -> None:
        """Draws all weights from the global generator.

        Args:
            width: numbers of a feature vector.
            grid: (h, w) in patches.
            config: sizes.
        """
        super().__init__()
        height, breadth = grid
        hidden = config.hidden_width
        self.input = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, width)
        self.column_embedding = nn.Parameter(torch.rand(breadth, hidden // 2))
        self.row_embedding = nn.Parameter(torch.rand(height, hidden // 2))
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(height * breadth, config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(hidden)
        self.hidden: Tensor | None
        self.register_buffer(
            "hidden", neighbour_mask(grid, config.neighbour_size) if config.neighbour_size else None, persistent=False
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, _Attention):
                for part in (module.query, module.key, module.value):
                    # The official code draws the three as one matrix, to whose greater height xavier gives this factor.
                    nn.init.xavier_uniform_(part.weight, gain=0.5**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, P, D) features, noisy in training, to (B, P, D) rebuilt ones."""
        height, breadth = len(self.row_embedding), len(self.column_embedding)
        columns = self.column_embedding.expand(height, -1, -1)
        rows = self.row_embedding[:, None].expand(-1, breadth, -1)
        position = torch.cat([columns, rows], dim=2).flatten(0, 1)  # (P, hidden width)
        memory = self.input(tokens)
        for layer in self.encoder:
            memory = layer(memory, position, self.hidden)
        rebuilt = memory
        for layer in self.decoder:
            rebuilt = layer(rebuilt, memory, position, self.hidden)
        return self.output(self.norm(rebuilt))


class EncoderLayer(nn.Module):
    """Attention of the tokens to each other, then a feed-forward network."""

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.attention, self.feedforward = _Attention(config), _FeedForward(config)

    def forward(self, tokens: Tensor, position: Tensor, hidden: Tensor | None) -> Tensor:
        """(B, P, E) tokens, (P, E) positions and a (P, P) mask to (B, P, E)."""
        return self.feedforward(self.attention(tokens, tokens, position, hidden))


class DecoderLayer(nn.Module):
    """A learned query per position looks into the encoder's tokens, then into those of the layer before."""

    def __init__(self, num_patches: int, config: _Config) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(num_patches, config.hidden_width))
        self.to_memory, self.to_previous = _Attention(config), _Attention(config)
        self.feedforward = _FeedForward(config)

    def forward(self, previous: Tensor, memory: Tensor, position: Tensor, hidden: Tensor | None) -> Tensor:
        """(B, P, E) tokens of the layer before and of the encoder, (P, E) positions and a (P, P) mask to (B, P, E)."""
        query = self.query.expand(len(memory), -1, -1)
        tokens = self.to_memory(query, memory, position, hidden)
        return self.feedforward(self.to_previous(tokens, previous, position, hidden))


class _Attention(nn.Module):
    """Attention with positions on queries and keys, added to the tokens and normalised.

    Keys have no bias: it would raise all scores of a query alike and change nothing, but its gradient would be rounding
    errors, out of which Adam makes steps that differ from one number of workers to another.
    """

    def __init__(self, config: _Config) -> None:
        super().__init__()
        width = config.hidden_width
        self.heads, self.score_dropout = config.heads, config.dropout
        self.query, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.dropout, self.norm = nn.Dropout(config.dropout), nn.LayerNorm(width)

    def forward(self, tokens: Tensor, source: Tensor, position: Tensor, hidden: Tensor | None) -> Tensor:
        asked, keys, values = (  # (B, heads, P, E / heads)
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(tokens + position), self.key(source + position), self.value(source))
        )
        seen, dropout = None if hidden is None else ~hidden, self.score_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(asked, keys, values, attn_mask=seen, dropout_p=dropout)
        return self.norm(tokens + self.dropout(self.output(mixed.transpose(1, 2).flatten(2))))


class _FeedForward(nn.Module):
    """Two linear layers, added to the tokens and normalised."""

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(config.hidden_width, config.feedforward_width),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.feedforward_width, config.hidden_width),
            nn.Dropout(config.dropout),
        )
        self.norm = nn.LayerNorm(config.hidden_width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(tokens + self.layers(tokens))


METHOD = UniAD
