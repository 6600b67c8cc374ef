"""The chaos run: the same small space again and again, while its processes are killed at random moments.

A cluster of simulated nodes, an MLflow server and `adgrid run` are started as a user would start them. Then trials,
Train workers, whole nodes, the driver and the server get SIGKILL, in an order and at moments drawn from a seed; nodes,
server and driver are started again by the same commands. What is left must be what an undisturbed run leaves.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from harness.audit import compare_runs, count_finished
from harness.contracts import AdgridError
from harness.mirrored import find_doubles
from harness.options import RunOptions
from harness.store import Store
from harness.verify import GOLDEN

SPACE = GOLDEN / "chaos.yaml"
KINDS = ("trial", "worker", "node", "driver", "server")
"""What is killed: a trial's process, a Train worker, a simulated node, `adgrid run`, the MLflow server."""
PAUSE_SECONDS = (1.0, 12.0)
"""Least and most time between two kills, while there is something to kill."""
DOWN_SECONDS = (0.5, 6.0)
"""How long a killed node or server is missing before it is started again."""
NUM_NODES = 3
"""Simulated nodes of one core each, beside the head."""
MAX_STARTS = 4
"""How often the command is given in a round beyond once for each kill; a run that needs more does not end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill."""

    kind: str
    round: int
    seconds: float
    """Since the chaos run began."""
    victim: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChaosOutcome:
    """What was killed and what came of it."""

    kills: tuple[Kill, ...]
    rounds: int
    """How often the whole space was computed."""
    starts: int
    """How often `adgrid run` was given in all rounds."""
    cells: int
    """Of one round."""
    seconds: float
    problems: tuple[str, ...]
    """In which the outcome is not that of an undisturbed run; empty if all is well."""

    def count(self, kind: str) -> int:
        """Kills of one kind."""
        return sum(kill.kind == kind for kill in self.kills)


def run_chaos(
    num_kills: int,
    seed: int,
    options: RunOptions,
    console: Console,
    space: str | Path = SPACE,
    kinds: Sequence[str] = KINDS,
    rounds: int = 2,
) -> ChaosOutcome:
    """Kills so many processes and compares every round with an undisturbed run.

    Args:
        num_kills: how many in all; each kind gets its share.
        seed: of the order, the victims and the moments.
        options: `root` and `cache_dir` hold the folders that it works in; both must be on this machine.
        console: told what happens.
        space: what is computed.
        kinds: what is killed.
        rounds: how often the space is computed under kills, of which each gets an equal part; in every second round a
            group of workers goes on with one where others are lost.
    """
    if Store(options.root).local_path("") is None:
        raise AdgridError("--chaos simulates nodes on this machine; name a local folder with --root")
    start = time.monotonic()
    folder = Path(options.root).resolve() / f"chaos-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir(parents=True)
        server = stack.enter_context(_Server(folder))
        cluster = stack.enter_context(_Nodes())
        console.print("an undisturbed run, to compare with", soft_wrap=True)
        calm = _Driver(str(space), folder / "calm", folder / "cache-calm", cluster, server, options)
        calm.run_to_its_end()
        storm = _Storm(num_kills, random.Random(seed), cluster, server, console, kinds)
        problems: list[str] = []
        number = starts = 0
        while storm.deck or not number:
            number += 1
            root, elastic = folder / f"round-{number}", number % 2 == 0
            driver = _Driver(str(space), root, folder / f"cache-{number}", cluster, server, options, elastic)
            before = len(storm.kills)
            storm.blow(driver, number, math.ceil(num_kills / rounds), start)
            # Whatever was missing at the end, a node or the server, is back; the same command once more makes it whole.
            cluster.complete()
            server.start()
            driver.run_to_its_end()
            starts += driver.starts
            found = _judge(folder / "calm", root, server.uri, elastic)
            problems += [f"round {number}: {problem}" for problem in found]
            killed = len(storm.kills) - before
            verdict = "[red]differs[/]" if found else "[green]as undisturbed[/]"
            how = " with elastic groups" * elastic
            console.print(f"round {number}{how}: {killed} kills, {driver.starts} starts, {verdict}")
            shutil.rmtree(folder / f"cache-{number}", ignore_errors=True)
        cells = len(Store(str(folder / "calm")).load_rows())
        if problems:  # what went wrong is kept
            stack.pop_all()
    return ChaosOutcome(
        kills=tuple(storm.kills),
        rounds=number,
        starts=starts,
        cells=cells,
        seconds=time.monotonic() - start,
        problems=tuple(problems),
    )


def show_chaos(outcome: ChaosOutcome, console: Console) -> None:
    """What was killed how often, and every problem."""
    table = Table("killed", "times")
    for kind, number in collections.Counter(kill.kind for kill in outcome.kills).most_common():
        table.add_row(kind, str(number))
    console.print(table)
    console.print(
        f"{len(outcome.kills)} kills in {outcome.seconds:.0f} s, {outcome.rounds} times {outcome.cells} cells, "
        f"`adgrid run` given {outcome.starts} times",
        soft_wrap=True,
    )
    for problem in outcome.problems:
        console.print(f"[red]{problem}[/]", soft_wrap=True)
    if not outcome.problems:
        console.print(
            "[green]every matrix is complete, no row is lost or doubled, all numbers are the undisturbed ones[/]"
        )


def _judge(calm: Path, root: Path, tracking_uri: str, elastic: bool) -> list[str]:
    store = Store(str(root))
    (run_id,) = store.folders("runs")
    problems = compare_runs(Store(str(calm)), store, elastic)
    problems += [
        f"{cell_id} has {number} finished rows" for cell_id, number in count_finished(store).items() if number != 1
    ]
    return problems + find_doubles(tracking_uri, root.name, run_id)


class _Storm:
    """Draws what is killed when, and does it."""

    def __init__(
        self,
        num_kills: int,
        draw: random.Random,
        cluster: _Nodes,
        server: _Server,
        console: Console,
        kinds: Sequence[str],
    ) -> None:
        self._draw, self._cluster, self._server, self._console = draw, cluster, server, console
        whole = [*kinds] * (num_kills // len(kinds) + 1)
        self.deck = whole[:num_kills]
        draw.shuffle(self.deck)
        self.kills: list[Kill] = []

    def blow(self, driver: _Driver, number: int, most_kills: int, start: float) -> None:
        """Gives the command until it has come to its end, and kills things meanwhile."""
        left = len(self.deck) - most_kills
        driver.start()
        due = time.monotonic() + self._draw.uniform(*PAUSE_SECONDS)
        back: list[tuple[float, str]] = []
        most = driver.starts + most_kills + MAX_STARTS
        while True:
            now = time.monotonic()
            for item in [item for item in back if item[0] <= now]:
                back.remove(item)
                self._cluster.complete() if item[1] == "node" else self._server.start()
            code = driver.poll()
            if code == 0:
                break
            if code is not None:
                if driver.starts >= most:
                    raise AdgridError(f"the run does not come to an end: {driver.output()}")
                driver.start()
            if len(self.deck) > max(left, 0) and now >= due and driver.is_at_work():
                kind, victim = self._kill_one(driver)
                if victim is not None:
                    self.deck.remove(kind)
                    self.kills.append(Kill(kind=kind, round=number, seconds=now - start, victim=victim))
                    self._console.print(f"  {now - start:6.1f} s  kill -9 {kind}: {victim}")
                    due = now + self._draw.uniform(*PAUSE_SECONDS)
                    if kind in ("node", "server"):
                        back.append((now + self._draw.uniform(*DOWN_SECONDS), kind))
            time.sleep(0.1)

    def _kill_one(self, driver: _Driver) -> tuple[str, str | None]:
        """The first kind of the deck that has a victim now, so that the order is the drawn one where it can be."""
        for kind in dict.fromkeys(self.deck):
            if kind == "driver":
                victim = driver.kill()
            elif kind == "server":
                victim = self._server.kill()
            elif kind == "node":
                victim = self._cluster.kill_node(self._draw)
            else:
                victim = self._cluster.kill_process(kind, self._draw)
            if victim is not None:
                return kind, victim
        return "", None


class _Nodes:
    """A cluster of simulated nodes: a head without cores and some of one core each."""

    def __enter__(self) -> _Nodes:
        # Ray's processes read these when they start. Without a token nobody but this machine must reach them.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DISABLE_DOCKER_CPU_WARNING", "1")
        from ray.cluster_utils import Cluster

        logging.getLogger("ray").setLevel(logging.ERROR)
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        self.complete()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()

    @property
    def address(self) -> str:
        """What `--address` takes."""
        return self._cluster.address

    def complete(self) -> None:
        """Starts a node for each that is missing."""
        while len(self._cluster.worker_nodes) < NUM_NODES:
            self._cluster.add_node(num_cpus=1)

    def kill_node(self, draw: random.Random) -> str | None:
        """Kills all processes of a node on which something runs."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.unique_id)
        if len(nodes) < NUM_NODES:  # one is down already
            return None
        workers = {node: [process.name() for process in self._workers([node])] for node in nodes}
        busy = [node for node in nodes if workers[node]]
        if not busy:
            return None
        node = draw.choice(busy)
        self._cluster.remove_node(node, allow_graceful=False)
        return f"{node.node_id[:8]} with {', '.join(sorted(workers[node]))}"

    def kill_process(self, kind: str, draw: random.Random) -> str | None:
        """Kills the process of a trial or a Train worker."""
        title = {"trial": "ray::ImplicitFunc", "worker": "ray::RayTrainWorker"}[kind]
        nodes = [self._cluster.head_node, *self._cluster.worker_nodes]
        found = [process for process in self._workers(nodes) if process.name().startswith(title)]
        if not found:
            return None
        process = draw.choice(sorted(found, key=lambda process: process.pid))
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            return f"{process.pid} {title}"
        return None

    def _workers(self, nodes: Sequence[Any]) -> list[_Process]:
        found = []
        for node in nodes:
            for raylet in node.all_processes.get("raylet", ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(raylet.process.pid).children(recursive=True):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            title = " ".join(child.cmdline()).split(".")[0].split("(")[0].strip()
                            if title.startswith(("ray::ImplicitFunc", "ray::RayTrainWorker")):
                                found.append(_Process(child, title))
        return found


class _Process:
    """A process under the title that Ray gives it."""

    def __init__(self, process: psutil.Process, title: str) -> None:
        self._process, self._title, self.pid = process, title, process.pid

    def name(self) -> str:
        return self._title

    def kill(self) -> None:
        self._process.kill()


class _Server:
    """A real MLflow server on the loopback interface."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Starts it if it does not run, and returns when it answers."""
        if self._process is None:
            quiet = subprocess.DEVNULL
            self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet, start_new_session=True)
            _wait_until(self._answers, 300, "the MLflow server does not answer")

    def _answers(self) -> bool:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{self.uri}/health") as reply:
            return reply.status == 200
        return False

    def kill(self) -> str | None:
        """Kills it and the processes that it has started."""
        if self._process is None:
            return None
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return str(process.pid)


class _Driver:
    """`adgrid run` of a space, given as often as need be."""

    def __init__(
        self,
        space: str,
        root: Path,
        cache: Path,
        cluster: _Nodes,
        server: _Server,
        options: RunOptions,
        elastic: bool = False,
    ) -> None:
        self._command = [
            *(sys.executable, "-m", "harness.cli", "run", space, "--root", str(root), "--cache-dir", str(cache)),
            *("--address", cluster.address, "--tracking-uri", server.uri, "--experiment", root.name),
            *("--checkpoint-seconds", "0.2", "--no-pictures"),
            *(["--random-weights"] if options.random_weights else []),
            *(word for override in options.overrides for word in ("--set", override)),
            *(["--set", "resources.min_workers=1"] if elastic else []),
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = root.with_suffix(".log")
        self._root = root
        self.starts = 0

    def start(self) -> None:
        """Gives the command."""
        self.starts += 1
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def is_at_work(self) -> bool:
        """Whether its run has begun: before that there is nothing to be lost."""
        return self.poll() is None and (self._root / "runs").is_dir()

    def kill(self) -> str | None:
        """Kills it."""
        if self._process is None or self._process.poll() is not None:
            return None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return str(self._process.pid)

    def run_to_its_end(self) -> None:
        """Gives the command once and waits. Raises AdgridError if it fails."""
        self.start()
        assert self._process is not None
        try:
            if self._process.wait() != 0:
                raise AdgridError(f"`adgrid run` failed with nothing killed:\n{self.output()}")
        except KeyboardInterrupt:
            self.kill()
            raise

    def output(self) -> str:
        """The last lines of what it has said."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])


def _wait_until(happens: Any, seconds: float, problem: str) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > deadline:
            raise AdgridError(problem)
        time.sleep(0.2)
