"""Runs a function in two processes that share a training, as a test of what they must agree on."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_two_workers(function, folder):
    """`function(rank)` in two processes of one group over the loopback interface; what each returned, by rank.

    Args:
        function: of a module, returns what `torch.save` takes.
        folder: an empty one.
    """
    mp.spawn(_work, (function, Path(folder)), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


def _work(rank, function, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    try:
        torch.save(function(rank), folder / f"{rank}.pt")
        dist.barrier()  # whoever leaves first would break the connection under the other
    finally:
        dist.destroy_process_group()
