"""Letting the batch norms of a pretrained backbone learn along, on any number of workers."""

from __future__ import annotations

from torch import Tensor, nn

from harness.contracts import AdgridError
from methods.components.collectives import SharedBatchNorm


def share_batch_norms(backbone: nn.Module) -> None:
    """Makes the statistics of every batch norm those of the whole batch over all workers; changes the module in place.

    Names and values of parameters and buffers stay. In training the norms use and follow the batch from now on.

    Raises:
        AdgridError: the backbone has a norm of a kind that is not known.
    """
    for name, module in list(backbone.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SharedBatchNorm):
            backbone.set_submodule(name, _shared(name, module))
    if hasattr(backbone, "freeze_batch_norm"):
        setattr(backbone, "freeze_batch_norm", False)  # noqa: B010 (the harness's wrapper has it, any other may not)
    backbone.train(backbone.training)


class _NormAndActivation(SharedBatchNorm):
    """A batch norm that carries what follows it, as those of EfficientNets and others in timm do."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = norm.get_submodule("act")

    def forward(self, values: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(values)))


def _shared(name: str, norm: nn.modules.batchnorm._BatchNorm) -> SharedBatchNorm:
    kind = type(norm)
    known = kind is nn.BatchNorm2d or kind.__name__ == "BatchNormAct2d"
    if not (known and norm.affine and norm.track_running_stats):
        raise AdgridError(
            f"freeze_batch_norm: the backbone's norm {name!r} ({kind.__name__}) cannot be shared between workers; "
            f"set freeze_batch_norm to true"
        )
    plain = kind is nn.BatchNorm2d
    shared = SharedBatchNorm(norm.num_features, norm.eps, norm.momentum) if plain else _NormAndActivation(norm)
    shared.weight, shared.bias = norm.weight, norm.bias
    shared.running_mean, shared.running_var = norm.running_mean, norm.running_var
    shared.num_batches_tracked = norm.num_batches_tracked
    return shared.train(norm.training)
