"""The grid of ADPretrain is planned from a machine that has nothing, and from one that has everything."""

import sys
from pathlib import Path

import pytest

from harness.contracts import Places
from harness.plan import make_plan
from harness.space import load_space

sys.path.insert(0, str(Path(__file__).parent / "datasets"))
from published_trees import BUILDERS
from test_real_iad import make_tree

SPACE = Path(__file__).parents[1] / "search_spaces" / "five_by_five.yaml"
BACKBONES = ("dinov2-base", "dinov2-large", "clip-base", "clip-large", "imagebind")
NUM_CATEGORIES = {"mvtec_ad": 15, "visa": 12, "btad": 3, "mvtec_3d_ad": 10, "mpdd": 6}


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """A machine with empty caches of weights."""
    import torch
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


def test_with_nothing_the_plan_says_what_to_obtain_and_where_to_put_it(tmp_path, no_weights):
    places = Places(data_root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    plan = make_plan(load_space(SPACE), places)
    assert plan.trials == ()
    missing = {item.name: item for item in plan.missing}
    assert sorted(missing) == sorted([*NUM_CATEGORIES, *BACKBONES, "real_iad"])
    # Six methods by two representations by five backbones or datasets; the pretrained half needs Real-IAD.
    assert {item.num_trials for name, item in missing.items() if name != "real_iad"} == {6 * 2 * 5}
    assert missing["real_iad"].num_trials == 6 * 5 * 5
    for name, number in NUM_CATEGORIES.items():
        reason = missing[name].reason
        assert f"{tmp_path}/data/{name}/<category>/" in reason
        assert "https://" in reason
        assert f"{number} categories" in reason
    assert "vit_large_patch14_dinov2.lvd142m" in missing["dinov2-large"].reason
    assert "imagebind_huge.pth" in missing["imagebind"].reason
    assert "adgrid backbones fetch imagebind" in missing["imagebind"].reason


def test_with_everything_the_plan_has_all_cells_and_no_complaint(tmp_path):
    for name in NUM_CATEGORIES:
        BUILDERS[name](tmp_path / "data" / name, full=True)
    make_tree(tmp_path / "data" / "real_iad")
    places = Places(data_root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    plan = make_plan(load_space(SPACE), places, random_weights=True)
    assert plan.missing == ()
    assert plan.warnings == ()
    assert len(plan.trials) == 6 * 5 * 5 * 2
    assert len(plan.cell_ids) == len(set(plan.cell_ids)) == 6 * 5 * 46 * 2
    assert [(one.kind, one.backbone) for one in plan.pretrainings] == [("adpretrain", name) for name in BACKBONES]
    assert {trial.trained.artifact_id for trial in plan.trials if trial.trained} == {
        one.trial_id for one in plan.pretrainings
    }
    params = {(trial.method, trial.representation): trial.params for trial in plan.trials}
    assert (params["glass", "plain"]["noise"], params["glass", "adpretrain"]["noise"]) == (0.015, 0.005)
    assert params["padim", "plain"]["combine"] == params["padim", "adpretrain"]["combine"] == "per_level"
    layers = {(trial.method, trial.backbone): trial.layers for trial in plan.trials}
    assert layers["padim", "dinov2-base"] == ("blocks.2", "blocks.5", "blocks.8", "blocks.11")
    assert layers["uniad", "imagebind"] == ("blocks.7", "blocks.15", "blocks.23", "blocks.31")
    assert layers["patchcore", "clip-large"] == ("blocks.11", "blocks.17", "blocks.23")
    assert layers["cflow", "dinov2-large"] == ("blocks.11", "blocks.17", "blocks.23")
    assert layers["glass", "clip-base"] == ("blocks.8", "blocks.11")


def test_half_a_dataset_is_planned_with_a_warning(tmp_path):
    BUILDERS["btad"](tmp_path / "data" / "btad", categories=["01", "03"])
    places = Places(data_root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    plan = make_plan(
        load_space(SPACE, ["datasets=btad", "methods=padim", "representations=plain", "backbones=resnet18"]),
        places,
        True,
    )
    assert len(plan.cell_ids) == 2
    assert any("1 of 3 categories are not there: 02" in text for text in plan.warnings)
    assert any("category '01', train: " in text and "400 are published" in text for text in plan.warnings)


@pytest.mark.parametrize(("name", "cells"), [("adpretrain_realiad", 5 * 9 * 2), ("adpretrain_ablation", 3 * 12 * 5)])
def test_the_pretraining_is_planned_alone_and_for_the_ablation(tmp_path, name, cells):
    for dataset in ("btad", "mpdd", "visa"):
        BUILDERS[dataset](tmp_path / "data" / dataset)
    make_tree(tmp_path / "data" / "real_iad")
    places = Places(data_root=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    space = load_space(SPACE.with_stem(name))
    plan = make_plan(space, places, random_weights=True)
    assert plan.missing == ()
    assert len(plan.cell_ids) == len(set(plan.cell_ids)) == cells
    assert {one.precision for one in plan.pretrainings} == {"bfloat16"}
    if name == "adpretrain_realiad":
        for dataset in ("mvtec_ad", "mvtec_3d_ad"):
            BUILDERS[dataset](tmp_path / "data" / dataset)
        grid = make_plan(load_space(SPACE), places, random_weights=True)
        assert {one.trial_id for one in plan.pretrainings} == {one.trial_id for one in grid.pretrainings}
        assert {one.resources.workers for one in plan.pretrainings} == {4}
