"""What a plan says before anything runs."""

import dataclasses

import pytest
from PIL import Image
from runs import SPACE, SmallRun

from harness import resolve
from harness.contracts import AdgridError
from harness.plan import measure_progress

GRID = SPACE.replace("[toy_features]", "[toy_features, toy_encoder, toy_pixels]").replace(
    "[toy_resnet]", "[{name: toy_resnet, layers: [layer2]}, {name: test_vit, layers: [blocks.1]}]"
)


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def test_ids_are_the_same_when_planned_again_and_all_differ(run):
    first, second = run.plan(GRID), run.plan(GRID)
    assert first == second
    assert len(set(first.cell_ids)) == len(first.cell_ids) == (2 + 2 + 1) * 3
    assert len({trial.trial_id for trial in first.trials}) == 5


def test_a_method_without_backbone_has_one_trial_whatever_the_backbones(run):
    trials = [trial for trial in run.plan(GRID).trials if trial.method == "toy_pixels"]
    assert [(trial.backbone, trial.layers) for trial in trials] == [(None, ())]


def test_trials_that_share_features_do_not_start_side_by_side(run):
    order = [(trial.method, trial.backbone) for trial in run.plan(GRID).trials if trial.backbone]
    assert order == [
        ("toy_features", "toy_resnet"),
        ("toy_features", "test_vit"),
        ("toy_encoder", "toy_resnet"),
        ("toy_encoder", "test_vit"),
    ]


def test_each_trial_knows_the_layers_that_others_read_from_its_backbone(run):
    space = GRID.replace("toy_encoder,", "{name: toy_encoder, layers: [layer3]},").replace(
        "{name: test_vit, layers: [blocks.1]}", "resnet18"
    )
    layers = {(trial.method, trial.backbone): (trial.layers, trial.also_layers) for trial in run.plan(space).trials}
    assert layers["toy_features", "toy_resnet"] == (("layer2",), ("layer3",))
    assert layers["toy_encoder", "toy_resnet"] == (("layer3",), ("layer2",))


def test_narrowing_keeps_the_ids_of_what_stays(run):
    whole = {trial.trial_id: trial for trial in run.plan(GRID).trials}
    part = run.plan(GRID, overrides=["methods=toy_encoder", "categories=small"]).trials
    assert len(part) == 2
    for trial in part:
        assert trial.cells[0] in whole[trial.trial_id].cells


@pytest.mark.parametrize(
    "change",
    [{"seeds": "[1]"}, {"protocol": "{image_size: 96}"}, {"shots": "[2]"}, {"backbones": "[test_vit]"}],
    ids=lambda change: next(iter(change)),
)
def test_what_decides_a_number_changes_its_id(run, change):
    key, value = next(iter(change.items()))
    lines = [line for line in SPACE.splitlines() if not line.startswith(f"{key}:")]
    changed = run.plan("\n".join([*lines, f"{key}: {value}"]))
    assert not set(changed.cell_ids) & set(run.plan().cell_ids)


def test_progress_tells_what_is_left_and_how_long_it_takes(run):
    plan = run.plan()
    empty = measure_progress(plan, {}, set())
    assert (empty.done, empty.todo, empty.rescore, empty.failed, empty.estimated_seconds) == (0, 3, 0, 0, None)
    run.run_plan(plan)
    rows = run.store.load_rows()
    slow = {
        cell_id: dataclasses.replace(row, costs={"fit_seconds": 4.0, "predict_seconds": 2.0, "peak_rss_mib": 99.0})
        for cell_id, row in rows.items()
    }
    other = run.plan(overrides=["methods.toy_features.params.scale=2.0"])
    assert measure_progress(other, slow, set()).estimated_seconds == 3 * 6.0
    done = measure_progress(plan, rows, set())
    assert (done.done, done.todo, done.estimated_seconds) == (3, 0, 0.0)
    stored = {cell.prediction_id for cell in plan.trials[0].cells}
    again = run.plan(overrides=["protocol.aupro_limit=0.1"])
    assert measure_progress(again, rows, stored).rescore == 3


def test_an_unknown_category_or_layer_is_named(run):
    with pytest.raises(AdgridError, match="unknown category 'smal'; did you mean 'small'"):
        run.plan(SPACE.replace("[toy_squares]", "[{name: toy_squares, categories: [smal]}]"))
    with pytest.raises(AdgridError, match="layer"):
        run.plan(SPACE.replace("[toy_resnet]", "[{name: toy_resnet, layers: [layer22]}]"))


def test_paths_of_a_space_are_absolute_for_workers(run, tmp_path, monkeypatch):
    from test_trial import draw

    for split in ("train/good", "test/good", "test/dent"):
        draw(tmp_path / "images/nut" / split / "0.png")
    monkeypatch.chdir(tmp_path)
    trial = run.plan(SPACE.replace("[toy_squares]", "[{name: parts, layout: folder, root: images}]")).trials[0]
    assert trial.dataset.root == str(tmp_path / "images")


def test_a_space_whose_points_are_all_excluded_is_refused(run):
    with pytest.raises(AdgridError, match="leaves nothing to run"):
        run.plan(SPACE + "exclude: [{method: toy_features}]\n")


def test_grid_points_that_mean_the_same_are_one_trial(run):
    doubled = SPACE.replace("[toy_features]", "[toy_features, {name: toy_features, params: {scale: [1.0, 2.0]}}]")
    plan = run.plan(doubled + "include: [{datasets: [{name: toy_squares, shots: [null]}]}]\n")
    assert len(plan.trials) == 2
    assert len(plan.cell_ids) == len(set(plan.cell_ids)) == 6


def test_one_dataset_name_for_two_places_is_refused(run):
    with pytest.raises(AdgridError, match="two places"):
        run.plan(SPACE + "include: [{datasets: [{name: toy_squares, root: /elsewhere}]}]\n")


def test_a_category_that_no_dataset_has_is_named(run):
    with pytest.raises(AdgridError, match="no dataset of the space has 'smal'; did you mean 'small'"):
        run.plan(SPACE + "categories: [large, smal]\n")


def test_an_image_size_that_does_not_fit_the_backbone_is_found_by_the_plan(run):
    with pytest.raises(AdgridError, match="100"):
        run.plan(SPACE.replace("toy_resnet", "vit_tiny_patch16_224").replace("image_size: 64", "image_size: 100"))


def test_a_parameter_that_is_no_number_is_refused(run):
    with pytest.raises(AdgridError, match="NaN and infinity"):
        run.plan(SPACE.replace("[toy_features]", "[{name: toy_features, params: {scale: .inf}}]"))


def test_folders_count_by_their_images_and_not_by_their_place(run, tmp_path):
    space = SPACE.replace("[toy_features]", "[{name: draem, params: {epochs: 1, textures: FOLDER}}]")
    for name in ("one", "two"):
        (tmp_path / name / "striped").mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name / "striped" / "a.png")

    def ids(name):
        resolve._folder_id.cache_clear()
        return run.plan(space.replace("FOLDER", str(tmp_path / name))).cell_ids

    first = ids("one")
    assert ids("two") == first
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "two" / "striped" / "a.png")
    assert set(ids("two")).isdisjoint(first)
    with pytest.raises(AdgridError, match=r"textures: no images in .*three; name a folder"):
        ids("three")
