"""What all tests share: where data lie, a quiet environment, an installed example plug-in, one local Ray."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Ray and MLflow read these when they are imported or started, so they are set before any test module is.
os.environ.update(
    {
        "RAY_AUTH_MODE": "disabled",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",
    }
)

import pytest

from harness.contracts import Places

PLUGIN = Path(__file__).parent / "example_plugin"


def pytest_configure(config):
    """Installs the example plug-in beside the environment, as pip does, so that its entry points are found."""
    sources = sorted([PLUGIN / "pyproject.toml", *(PLUGIN / "adgrid_example").glob("*.py")])
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    target = Path(config.cache.mkdir("example_plugin")) / version
    if not target.exists():
        build = target.with_suffix(".build")
        shutil.rmtree(build, ignore_errors=True)
        shutil.copytree(PLUGIN, build / "source")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*pip, "--target", str(build / "site"), str(build / "source")], check=True)
        (build / "site").rename(target)
        shutil.rmtree(build)
    sys.path.insert(0, str(target))
    # Ray's workers and subprocesses find it the same way.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), os.environ.get("PYTHONPATH")]))


def pytest_addoption(parser):
    parser.addoption(
        "--data-root",
        default=str(Path(__file__).parents[2] / "shared" / "data"),
        help="folder with real images for the tests marked `data` (default: shared/data beside the checkout)",
    )
    parser.addoption("--remake-golden", action="store_true", help="write the pinned numbers of harness/golden anew")


@pytest.fixture(scope="session")
def data_root(request):
    """Folder with real images; the test is skipped where it is not there."""
    folder = Path(request.config.getoption("--data-root"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; name their folder with --data-root")
    return folder


@pytest.fixture
def places(tmp_path):
    """Empty data and cache folders of one test's own."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    cache.mkdir()
    return Places(data_root=str(data), cache_dir=str(cache))
