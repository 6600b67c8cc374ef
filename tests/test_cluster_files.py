"""The files by which clusters are started: what can be said of them without a cluster."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from harness.cli import main
from harness.contracts import Resources
from harness.placement import count_places, read_cluster_limits, worker_bundle

REPO = Path(__file__).parents[1]
(RAY_VERSION,) = re.findall(r"^ray==(\S+)$", (REPO / "constraints.txt").read_text(), flags=re.MULTILINE)


def launcher():
    return yaml.safe_load((REPO / "cluster.yaml").read_text())


@pytest.mark.filterwarnings("ignore")
def test_the_launcher_file_is_valid_by_rays_own_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher()))
    broken = launcher() | {"max_wrokers": 3}
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(broken))


def test_the_launcher_has_spot_workers_with_a_fallback_and_drivers_on_the_head_alone():
    kinds = launcher()["available_node_types"]
    assert kinds["head"]["resources"]["CPU"] == 0
    spot, fallback = kinds["gpu_spot"], kinds["gpu_on_demand"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in fallback["node_config"]
    assert spot["resources"] == fallback["resources"]
    assert spot["min_workers"] == 0 < spot["max_workers"]


def test_every_node_of_the_launcher_gets_the_token_the_project_and_the_mounts():
    config = launcher()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token" in start
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert config["file_mounts"]["/home/ray/dist"] == "./dist"
    assert any("/home/ray/dist/adgrid-*.whl" in command for command in config["setup_commands"])
    mounts = " ".join(config["docker"]["run_options"])
    assert {"/mnt/shared", "/mnt/data", "/mnt/cache"} <= set(re.findall(r"-v (/mnt/\w+):", mounts))


def test_the_limits_of_the_launcher_are_what_admission_reads():
    limits = read_cluster_limits(str(REPO / "cluster.yaml"))
    assert count_places(worker_bundle(Resources(cpu=4, gpu=1, memory_gib=16)), limits) == 120
    assert count_places(worker_bundle(Resources(cpu=4, gpu=1, memory_gib=64)), limits) == 0


def test_images_are_of_the_version_that_the_tests_ran_with():
    image = launcher()["docker"]["image"]
    dockerfile = (REPO / "deploy" / "Dockerfile").read_text()
    assert image.startswith(f"rayproject/ray:{RAY_VERSION}-py311")
    assert f"FROM {image}" in dockerfile
    job = yaml.safe_load((REPO / "deploy" / "kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY_VERSION
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f":{RAY_VERSION}")
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_the_kubernetes_job_has_what_its_operator_needs_and_a_command_that_parses(capsys):
    job = yaml.safe_load((REPO / "deploy" / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        mounted = {mount["name"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group["template"]["spec"]["volumes"]}
    program, *words = spec["entrypoint"].split()
    assert program == "adgrid"
    assert main(words) == 2  # every option is known; only the file is not here
    assert "/mnt/results/space.yaml" in capsys.readouterr().err


def test_the_slurm_script_is_a_script_with_a_token_of_its_own():
    script = REPO / "deploy" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "#SBATCH --signal=B:TERM@120" in text
    assert "RAY_AUTH_MODE=token" in text
    assert "umask 077" in text
    assert text.index("trap finish EXIT") < text.index('srun --nodes=1 --ntasks=1 --nodelist="$head" "${ray_start')


SPACE = "name: s\nmethods: [padim]\nbackbones: [resnet18]\ndatasets: [generated]\n"


def test_a_submitted_run_needs_a_root_that_all_nodes_see(tmp_path, capsys):
    (tmp_path / "space.yaml").write_text(SPACE)
    assert main(["submit", str(tmp_path / "space.yaml")]) == 2
    assert "such as --root /mnt/shared/results" in capsys.readouterr().err


NOWHERE = ("--dashboard", "http://127.0.0.1:9", "--", "--root", "/mnt/shared/r")


def test_a_dashboard_that_does_not_answer_is_one_clear_error(tmp_path, capsys):
    (tmp_path / "space.yaml").write_text(SPACE)
    assert main(["submit", str(tmp_path / "space.yaml"), *NOWHERE]) == 2
    error = capsys.readouterr().err
    assert "adgrid[cluster]" in error
    assert error.count("error:") == 1


def test_without_the_extra_the_error_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("harness.submit.importlib.util.find_spec", lambda name: None)
    (tmp_path / "space.yaml").write_text(SPACE)
    assert main(["submit", str(tmp_path / "space.yaml"), *NOWHERE]) == 2
    error = capsys.readouterr().err
    assert "needs Ray's dashboard; `pip install 'adgrid[cluster]'`" in error
    assert error.count("error:") == 1
