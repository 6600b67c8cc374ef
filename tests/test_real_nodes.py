"""A cluster of real `ray start` processes on the loopback interface, joined by the command line."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from runs import SPACE, SmallRun

from harness.cli import main

pytestmark = pytest.mark.ray
TUNED = SPACE.replace("[toy_features]", "[toy_features, {name: toy_tuned, params: {epochs: 2}}]")
TUNED += "resources: {cpu: 1, workers: 2}\n"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def real_nodes(*head_options, num_workers=2, own_folders=False):
    """Address of a head without cores and nodes of one core each, every one a process of its own, and a way to start
    again a node that has ended."""
    address = f"127.0.0.1:{free_port()}"
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    head = ["--head", f"--port={address.split(':')[1]}", "--num-cpus=0", *head_options]
    place = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}

    def start(*options):
        return subprocess.Popen([*ray, *options, *place], **quiet)

    nodes = [start(*head)]
    try:
        wait_for(address)
        worker = f"--address={address}", "--num-cpus=1"
        if own_folders:
            worker += (f"--temp-dir={tempfile.mkdtemp(prefix='ray-', dir='/tmp')}",)
        nodes += [start(*worker) for _ in range(num_workers)]

        def revive():
            """Nodes that start side by side on one machine may choose the same port, which ends one of them."""
            for number, node in enumerate(nodes):
                if number > 0 and node.poll() is not None:
                    nodes[number] = start(*worker)

        yield address, revive
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            try:
                node.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()


def wait_for(address, seconds=60):
    """Until something listens there."""
    host, port = address.split(":")
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def address():
    with real_nodes("--include-dashboard=false") as cluster:
        yield cluster


def test_the_command_line_runs_groups_of_workers_on_real_nodes(tmp_path, places, address):
    address, revive = address
    run = SmallRun(tmp_path, places)
    space = tmp_path / "space.yaml"
    space.write_text(TUNED)
    command = [sys.executable, "-m", "harness.cli", "run", str(space), "--root", run.root, "--random-weights"]
    command += ["--cache-dir", places.cache_dir, "--data-root", places.data_root, "--tracking-uri", "off"]
    command += ["--no-pictures", "--address", address]
    deadline = time.monotonic() + 180
    while True:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        # The nodes need a while to join; until then the plan is refused with what is missing.
        if done.returncode != 2 or time.monotonic() > deadline:
            break
        revive()
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = run.store.load_rows().values()
    assert {(row.method, row.category, row.status) for row in rows} == {
        (method, category, "ok")
        for method in ("toy_features", "toy_tuned")
        for category in ("small", "middle", "large")
    }
    assert {row.costs["workers"] for row in rows if row.method == "toy_tuned"} == {2}


@pytest.mark.slow
def test_a_space_is_submitted_as_a_job_and_its_rows_and_output_come_back(tmp_path, places, capfd):
    run = SmallRun(tmp_path, places)
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    dashboard = f"127.0.0.1:{free_port()}"
    options = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard.split(':')[1]}"]
    told = ["--root", run.root, "--random-weights", "--cache-dir", places.cache_dir, "--tracking-uri", "off"]
    # Nodes of one machine that share a folder clear away the files of a job that another one runs.
    with real_nodes(*options, num_workers=1, own_folders=True) as (_, revive):
        wait_for(dashboard, 120)
        revive()
        time.sleep(5)
        arguments = ["submit", str(space), "--dashboard", f"http://{dashboard}", "--python", sys.executable]
        assert main([*arguments, "--", *told, "--no-pictures"]) == 0
    output = capfd.readouterr().out
    assert "3 cells: 3 computed now" in output
    assert {row.status for row in run.store.load_rows().values()} == {"ok"}
    assert len(run.store.load_rows()) == 3
