"""The command line: what it prints and the codes it exits with."""

import pytest
from runs import SPACE

from harness.cli import main


@pytest.fixture
def call(tmp_path, places, capsys, monkeypatch):
    """Runs a command in this process: (exit code, what it printed, its errors)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        root = [] if words[0] == "--version" else ["--root", str(tmp_path / "root"), "--cache-dir", places.cache_dir]
        code = main([*words, *root])
        shown = capsys.readouterr()
        return code, " ".join(shown.out.split()), " ".join(shown.err.split())

    return run


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return str(path)


def test_listings_name_what_is_known_and_whether_it_is_here(call):
    code, out, _ = call("methods")
    assert code == 0
    assert "padim" in out
    assert "patchcore" in out
    code, out, _ = call("datasets")
    assert code == 0
    assert "elpv" in out
    assert "generated" in out
    code, out, _ = call("backbones")
    assert code == 0
    assert "tf_efficientnet_lite0" in out
    assert "toy_resnet" in out


def test_plan_counts_without_computing(call, space, tmp_path):
    code, out, _ = call("plan", space, "--random-weights")
    assert code == 0
    assert "1 trials, 3 cells" in out
    assert "done 0 · to do 3" in out
    assert "unknown, no earlier rows" in out
    assert not list((tmp_path / "root").rglob("*.parquet"))


def test_plan_names_missing_weights_and_data(call, space, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(SPACE.replace("[toy_squares]", "[toy_squares, {name: parts, layout: folder}]"))
    code, out, _ = call("plan", str(path), "--set", "backbones=wide_resnet50_2", "--data-root", str(tmp_path))
    assert code == 1
    assert "missing on this machine, 2 things" in out
    assert "weights wide_resnet50_2 (2 trials wait for it)" in out
    assert "dataset parts (1 trial waits for it)" in out
    code, _, errors = call("run", str(path), "--random-weights", "--data-root", str(tmp_path))
    assert code == 2
    assert "--skip-missing" in errors


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "absent.yaml"], "cannot be read"),
        (["plan", "SPACE", "--set", "methods=padin"], "did you mean 'padim'"),
        (["plan", "SPACE", "--set", "categories=huge"], "leave nothing"),
        (["plan", "SPACE", "--set", "backbones=resnet1888"], "resnet1888"),
        (["plan", "SPACE", "--random-weights", "--set", "shots=100"], "100"),
        (["report", "absent"], "no such folder; name the storage root"),
        (["datasets", "check"], "name a dataset"),
        (["datasets", "show"], "name a dataset"),
        (["datasets", "check", "flder"], "did you mean 'folder'"),
        (["datasets", "show", "visa", "--variant", "3cls"], "has no variant '3cls'"),
    ],
)
def test_bad_input_is_one_message_and_code_2(call, space, words, expected):
    code, out, errors = call(*[space if word == "SPACE" else word for word in words])
    assert expected in out + errors
    assert "Traceback" not in out + errors
    assert code == 2 or (code == 1 and "missing" in out)


def test_check_compares_files_with_the_layout(call, tmp_path):
    from test_trial import draw

    for index in range(2):
        draw(tmp_path / "parts/nut/train/good" / f"{index}.png")
        draw(tmp_path / "parts/nut/test/good" / f"{index}.png")
        draw(tmp_path / "parts/nut/test/dent" / f"{index}.png")
    words = ["datasets", "check", "parts", "--layout", "folder", "--dataset-root", str(tmp_path / "parts")]
    code, out, _ = call(*words)
    assert code == 0, out
    assert "pixel metrics are not available" in out
    assert call(*words, "--decode", "--categories", "nut")[0] == 0
    (tmp_path / "parts/nut/test/dent/1.png").write_bytes(b"")
    code, out, _ = call(*words)
    assert code == 1
    assert "cannot read image nut/test/dent/1.png: the file has zero bytes → copy it again" in out
    code, out, _ = call(*words, "--categories", "bolt")
    assert code == 1
    assert "there is no category 'bolt'" in out


def test_check_of_missing_data_and_show_say_how_to_get_them(call, tmp_path):
    code, out, _ = call("datasets", "check", "mvtec_ad", "--data-root", str(tmp_path))
    assert code == 1
    assert f"there is no folder {tmp_path}/mvtec_ad" in out
    for words in (["check", "mvtec_ad", "--data-root", str(tmp_path)], ["show", "mvtec_ad"]):
        _, out, _ = call("datasets", *words)
        assert "https://www.mvtec.com/company/research/datasets/mvtec-ad" in out
        assert "CC BY-NC-SA 4.0" in out
    assert "3,629" in out


@pytest.mark.ray
def test_run_then_report_then_run_again(call, space, tmp_path):
    code, out, _ = call("run", space, "--random-weights", "--num-cpus", "1")
    assert code == 0, out
    assert "Image AUROC" in out
    assert "Pixel AUROC" in out
    assert "3 cells: 3 computed now, 0 from earlier runs" in out
    assert "mlflow ui" in out or "mlflow server" in out
    run_id = next((tmp_path / "root/runs").iterdir()).name
    folder = tmp_path / "root/runs" / run_id / "report"
    assert (folder / "report.md").exists()
    assert (folder / "matrices/image_auroc.png").stat().st_size > 5000
    sheets = list((tmp_path / "root/sheets").glob("*.webp"))
    assert len(sheets) == 3
    assert all(f"../../../sheets/{sheet.name}" in (folder / "report.md").read_text() for sheet in sheets)
    (folder / "report.md").unlink()
    sheets[0].unlink()
    code, out, _ = call("report", run_id)
    assert code == 0
    assert (folder / "report.md").exists()
    assert sheets[0].exists()
    code, out, _ = call("run", space, "--random-weights")
    assert code == 0
    assert "3 cells: 0 computed now, 3 from earlier runs" in out
    code, out, _ = call("plan", space, "--random-weights", "--set", "protocol.aupro_limit=0.05")
    assert "of these 3 only scored again" in out
