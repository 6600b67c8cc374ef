"""A cluster of real `ray start` processes on the loopback interface, joined by the command line."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from runs import SPACE, SmallRun

pytestmark = pytest.mark.ray
TUNED = SPACE.replace("[toy_features]", "[toy_features, {name: toy_tuned, params: {epochs: 2}}]")
TUNED += "resources: {cpu: 1, workers: 2}\n"


@pytest.fixture
def address():
    """Address of a head without cores and two nodes of one core each, every one a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    head = ["--head", f"--port={address.split(':')[1]}", "--num-cpus=0", "--include-dashboard=false"]
    place = ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}

    def start(*options):
        return subprocess.Popen([*ray, *options, *place], **quiet)

    nodes = [start(*head)]
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.split(":")[1]))) == 0:
                break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    worker = f"--address={address}", "--num-cpus=1"
    nodes += [start(*worker), start(*worker)]

    def revive():
        """Nodes that start side by side on one machine may choose the same port, which ends one of them."""
        for number, node in enumerate(nodes):
            if number > 0 and node.poll() is not None:
                nodes[number] = start(*worker)

    yield address, revive
    for node in nodes:
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGTERM)
    for node in nodes:
        try:
            node.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)
            node.wait()


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
