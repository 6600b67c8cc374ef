"""`adgrid submit`: a search space as a job of a running Ray cluster, whose driver outlives the terminal.

The job is `adgrid run` on the cluster's head. It gets the space, and on request the code of this checkout; data,
weights and results lie where all nodes find them.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from harness.contracts import AdgridError

LOOK_SECONDS = 1.0
"""Between two looks at a job."""
AGENT_SECONDS = 60.0
"""How long a head that has just started may take until it accepts jobs."""
PACKAGES = ("harness", "methods")
"""What `ship_code` sends."""


def submit(
    space: str,
    run_options: Sequence[str],
    dashboard: str,
    ship_code: bool = False,
    python: str = "python",
    environment: Mapping[str, str] | None = None,
) -> tuple[JobSubmissionClient, str]:
    """Starts `adgrid run` as a job and returns the way to the cluster and the job's id.

    Args:
        space: the YAML file here.
        run_options: of `adgrid run` on the cluster; paths are those of its nodes.
        dashboard: address of the cluster's dashboard, such as `http://127.0.0.1:8265`.
        ship_code: send the packages of this checkout, for nodes on which another version or none is installed.
        python: interpreter on the nodes.
        environment: variables of the job.

    Raises:
        AdgridError: no dashboard answers, or this installation cannot talk to one.
    """
    text = Path(space).read_bytes()
    with tempfile.TemporaryDirectory(prefix="adgrid-submit-") as folder:
        (Path(folder) / "space.yaml").write_bytes(text)
        if ship_code:
            for name in PACKAGES:
                source = importlib.util.find_spec(name)
                assert source is not None
                assert source.origin is not None
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(Path(source.origin).parent, Path(folder) / name, ignore=ignored)
        command = [python, "-m", "harness.cli", "run", "space.yaml", "--address", "auto", *run_options]
        runtime_env: dict[str, Any] = {"working_dir": folder, "env_vars": dict(environment or {})}
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                client = JobSubmissionClient(dashboard)
                return client, client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
            except (ConnectionError, RuntimeError, ImportError) as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise AdgridError(_explain(dashboard, error)) from error
            time.sleep(LOOK_SECONDS)


def _explain(dashboard: str, error: Exception) -> str:
    if importlib.util.find_spec("aiohttp_cors") is None or "ray[default]" in str(error):
        return "adgrid submit: needs Ray's dashboard; `pip install 'adgrid[cluster]'` here and on the cluster's head"
    return (
        f"--dashboard {dashboard}: no Ray dashboard answers ({str(error).splitlines()[0]}); start the head with "
        f"`ray start --head` and adgrid[cluster] installed, forward its port with `ray dashboard cluster.yaml`, or "
        f"give its address"
    )


def follow(client: JobSubmissionClient, job: str, tell: Callable[[str], None]) -> bool:
    """Tells a job's output as it comes, until the job has ended; whether it succeeded."""
    told = 0
    while True:
        status = client.get_job_status(job)
        logs = client.get_job_logs(job)
        tell(logs[told:])
        told = max(told, len(logs))
        if status.is_terminal():
            return status == JobStatus.SUCCEEDED
        time.sleep(LOOK_SECONDS)
