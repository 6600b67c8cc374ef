"""Every sweep that ships is read, planned on trees like the published ones, and explains each field it searches."""

import re
import sys
from pathlib import Path

import pytest

from harness.contracts import Places
from harness.plan import make_plan
from harness.registry import method_names
from harness.space import load_space

sys.path.insert(0, str(Path(__file__).parent / "datasets"))
from published_trees import BUILDERS

FOLDER = Path(__file__).parents[1] / "search_spaces"
SWEEPS = sorted(FOLDER.glob("*_sweep.yaml"))
ANY_SWEPT = re.compile(r"\{(uniform|loguniform|quniform|randint|choice):")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """MVTec AD as it is unpacked, with few images."""
    folder = tmp_path_factory.mktemp("published")
    BUILDERS["mvtec_ad"](folder / "mvtec_ad")
    return Places(data_root=str(folder), cache_dir=str(folder / "cache"))


def test_every_method_has_a_sweep():
    swept = {entry.name for path in SWEEPS for entry in load_space(path).methods}
    ours = {name for name in method_names() if not name.startswith("toy_")}
    assert swept == ours


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_planned(path, places):
    space = load_space(path)
    overrides = []
    if space.search.tune_on == "synthetic":  # needs more images than the tree has, as they are
        overrides = ["search.tune_on={mvtec_ad: [carpet]}"]
    plan = make_plan(load_space(path, overrides), places, random_weights=True)
    assert plan.missing == ()
    (study,) = plan.studies
    assert len(study.categories) + len(study.reported) == 15
    assert not {name.rpartition("/")[2] for name in study.reported} & set(study.categories)
    assert study.make_trial({field: item.at(0.5) for field, item in study.distributions.items()}).cells
    if space.search.scheduler.name == "asha":
        stages = study.by_epochs or len(study.categories) > 2
        assert stages, "ASHA needs rungs"


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_swept_field_says_why(path):
    lines = [line for line in path.read_text().splitlines() if ANY_SWEPT.search(line)]
    assert lines
    assert all(re.search(r"# \S.{15,}", line) for line in lines), lines
