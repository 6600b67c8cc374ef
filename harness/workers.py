"""Several processes that run one trial together: who is who, and how they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process among those of its trial. All of them call each method below at the same place of their work."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process among those on its node."""
    local_size: int = 1
    """Processes of the trial on this node."""
    group: dist.ProcessGroup | None = None
    """For plain objects, over the network and not the accelerator; None for a process alone."""

    @property
    def leads(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when all have come here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    def agree(self, value: T | None) -> T:
        """The leader's value, on every worker; what the others pass is ignored."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        """All values in the order of the ranks, at the leader; nothing at the others."""
        if self.size == 1:
            return [value]
        values: list[T | None] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []  # type: ignore[return-value]


def is_lost_worker(error: BaseException) -> bool:
    """Whether an error only says that another worker is gone, which is nobody's fault here.

    NCCL's errors have a type of their own; gloo's are told by the place in its sources that they name.
    """
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


ALONE = Workers()
"""A process that runs its trial by itself."""
