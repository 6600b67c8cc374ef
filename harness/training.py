"""The home of Ray Train: starts the workers that run one trial together, and starts them again when one is lost.

Each worker executes `harness.trial.run_job` as a process alone does. Rows and checkpoints go to the run storage by
their own hands, so a group that is started again reads there what is left to do, and Ray carries messages alone.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray._private import state as ray_state
from ray.core.generated import gcs_pb2
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer, get_device
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness.contracts import Job, Resources, RunSettings
from harness.notes import Notes, row_message
from harness.placement import worker_bundle
from harness.store import Store, StoreError
from harness.trial import most_failures, run_job
from harness.watch import Observer, Stopped, Watch
from harness.workers import Workers

_train: Any = ray.train
"""Its annotations are those of its first version, whose options were others."""
_GroupData: Any = gcs_pb2.__dict__["PlacementGroupTableData"]
"""What Ray's control service tells of a placement group; the module makes its classes when it is imported."""
START_SECONDS = 60
"""How long a group waits for all its places before it asks for as many as the cluster has by then: after a lost node
Ray first goes on asking for those that were there."""
PATIENCE_SECONDS = 1800
"""How long a group may wait in vain, over all its starts, before its trial fails, where Ray would try for ever: time
for an autoscaler to add nodes."""

ORPHAN_SECONDS = 10.0
"""How long nothing is heard of a group until it is looked whether others hold its places that are no more."""


def run_with_workers(
    trial: Job, settings: RunSettings, watch: Watch | None = None
) -> Generator[dict[str, Any], None, None]:
    """Runs a trial or a pretraining in a group of Ray Train workers, from a process that does nothing else.

    A lost worker or node, and an error that only some of the workers met, ends the group; it starts again, with fewer
    workers if the trial allows it, and goes on from the rows and checkpoints in the storage.

    Args:
        trial: what to run; `trial.resources` are those of each worker.
        settings: where things lie.
        watch: how closely a study watches. The group then waits after each row and look until the next message is
            asked for, and ends when this generator is closed instead.

    Yields:
        For each finished cell its `row_message`, `{"note": ..., "losses": ...}` (see `Notes`) and
        `{"look": [epochs done, objective]}`.

    Raises:
        ray.train.TrainingFailedError: the group failed more often than its cells may be tried.
    """
    start_seconds = float(os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS)))
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # On this node: what ends with this process is no use to others, and what it outlives cannot take it along.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    verdicts = None if watch is None else Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    store = Store(settings.root)
    # Ray Train takes a file system as it is, since the options of a URI (an endpoint) cannot stand in its path.
    file_system, storage_path = store.on_object_store("ray_train") or (None, f"{settings.root}/ray_train")
    # A new name each time: under an old one Ray Train would take the run for finished.
    name = f"{trial.trial_id}-{settings.invocation[:8]}-{time.time_ns()}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "trial": trial,
            "settings": settings,
            "messages": messages,
            "watch": watch,
            "verdicts": verdicts,
        },
        scaling_config=_scaling(trial.resources),
        run_config=_train.RunConfig(
            name=name,
            storage_path=storage_path,
            storage_filesystem=file_system,
            failure_config=_train.FailureConfig(
                max_failures=most_failures(trial),
                controller_failure_limit=math.ceil(PATIENCE_SECONDS / start_seconds),
            ),
            logging_config=_train.LoggingConfig(log_level="ERROR"),
        ),
    )
    with ThreadPoolExecutor(1, thread_name_prefix="train") as pool:
        try:
            group = pool.submit(trainer.fit)
            heard = time.monotonic() - ORPHAN_SECONDS
            while not group.done() or not messages.empty():
                if time.monotonic() - heard >= ORPHAN_SECONDS:
                    remove_orphans()
                    heard = time.monotonic()
                try:
                    message = messages.get(timeout=0.5)
                except Empty:
                    continue
                heard = time.monotonic()
                yield message
                if verdicts is not None and "note" not in message:
                    verdicts.put(True)
            group.result()
        except GeneratorExit:
            if verdicts is not None:
                verdicts.put(False)
                with suppress(Exception):  # how it ends is of no interest any more
                    group.result()
            raise
        finally:
            if verdicts is not None:
                verdicts.shutdown()
            messages.shutdown()
            store.delete_folder(f"ray_train/{name}")


def remove_orphans() -> int:
    """Frees the places of groups whose controller was killed, and returns how many groups that were.

    Ray keeps a placement group of a dead actor until the job ends, and after a killed driver sometimes for ever. Ray
    Train's own cleaner knows groups that have started, and only where Ray's dashboard tells it which actors live. Other
    groups would wait in vain for their places. What Ray knows of creators is in no public interface.
    """
    orphans = 0
    for data in ray_state.state._connect_and_get_accessor().get_placement_group_table():
        group = _GroupData.FromString(data)
        if group.is_detached or group.state == _GroupData.REMOVED:
            continue
        creator = ray_state.actors(group.creator_actor_id.hex())
        if creator and creator["ActorClassName"] == "TrainController" and creator["State"] == "DEAD":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            orphans += 1
    return orphans


def _scaling(resources: Resources) -> Any:
    elastic = resources.min_workers is not None and resources.min_workers < resources.workers
    return _train.ScalingConfig(
        num_workers=(resources.min_workers, resources.workers) if elastic else resources.workers,
        use_gpu=resources.gpu > 0,
        resources_per_worker=worker_bundle(resources),
    )


def _work(config: dict[str, Any]) -> None:
    """What each worker executes."""
    trial, settings, messages = config["trial"], config["settings"], config["messages"]
    watch, verdicts = config["watch"], config["verdicts"]
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    torch.set_num_threads(max(1, int(trial.resources.cpu)))
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = _train.get_context()
    workers = Workers(
        rank=place.get_world_rank(),
        size=place.get_world_size(),
        local_rank=place.get_local_rank(),
        local_size=place.get_local_world_size(),
        group=dist.new_group(backend="gloo") if place.get_world_size() > 1 else None,
    )

    def tell(message: dict[str, Any]) -> None:
        # Rows are saved already; a listener that is gone must not turn finished work into a failure.
        with suppress(RayError):
            if workers.leads:
                messages.put(message)

    owed = 0  # verdicts on what was told since the last one was asked for

    def goes_on() -> bool:
        nonlocal owed
        while owed:
            owed -= 1
            if not verdicts.get():
                return False
        return True

    def look(done: int, value: float) -> None:
        nonlocal owed
        tell({"look": [done, value]})
        owed += 1

    observer = None if watch is None else Observer(watch=watch, tell=look, goes_on=goes_on)
    try:
        for row in run_job(trial, settings, Notes(tell), workers, observer, lambda left: tell({"left": left})):
            tell(row_message(row))
            owed += 1
    except Stopped:
        pass
    except StoreError as error:
        tell({"broken": str(error)})  # the run ends; until then the group may start again in vain
        raise
