"""The story of a trial: what is computed, what is not computed again, and what a failure leaves behind."""

import dataclasses
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import SPACE, SmallRun

from harness.claims import Claims
from harness.store import Store, StoreError
from harness.trial import find_left, run_trial

BROKEN = SPACE.replace("[toy_features]", "[{name: toy_broken, params: {how: HOW, category: middle, note: NOTE}}]")
FOLDER = SPACE.replace("[toy_squares]", "[{name: parts, layout: folder}]")


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def draw(path, bright=False, size=64, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(90, 110, (size, size, 3), dtype=np.uint8)
    if bright:
        pixels[10:20, 10:20] = 250
    Image.fromarray(pixels).save(path)


@pytest.fixture
def parts(places):
    """Two categories in MVTec AD's layout."""
    root = Path(places.data_root) / "parts"
    for category in ("bolt", "nut"):
        for index in range(4):
            draw(root / category / "train/good" / f"{index}.png")
            draw(root / category / "test/good" / f"{index}.png", seed=1)
            draw(root / category / "test/dent" / f"{index}.png", bright=True, seed=2)
            mask = np.zeros((64, 64), np.uint8)
            mask[10:20, 10:20] = 255
            path = root / category / "ground_truth/dent" / f"{index}_mask.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    return root


def test_a_row_is_complete(run):
    rows = run()
    assert sorted(rows) == ["large", "middle", "small"]
    row = rows["small"]
    assert row.status == "ok"
    assert set(row.metrics) == {
        "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro",
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in row.metrics.values())
    assert row.metric_bounds.keys() == row.metrics.keys()
    assert all(0 <= value <= 1e-3 for value in row.metric_bounds.values())
    assert row.metrics["image_auroc"] == 1.0  # a bright dot on noise is easy
    assert row.costs["fit_seconds"] >= 0
    assert row.costs["peak_rss_mib"] > 10
    assert row.costs["images_per_second"] > 0
    assert row.costs["train_images"] == 6
    assert row.costs["test_images"] == 8
    assert row.stamps == ("random weights",)
    assert row.params == {"scale": 1.0}
    assert row.resolved_protocol["smoothing"] == 0.0
    assert row.resolved_protocol["interpolation"] in ("bilinear", "bicubic")
    wanted = {"git_commit", "torch_version", "weights_fingerprint", "images_fingerprint", "truth_fingerprint", "device"}
    assert wanted <= set(row.provenance)
    assert run.store.load_rows()[row.cell_id] == row
    scores = run.store.load_scores(row.cell_id)
    assert scores["label"] == [0] * 4 + [1] * 4
    assert len(scores["image_score"]) == 8


def test_every_shape_of_method_runs(run):
    names = ["toy_features", "toy_encoder", "toy_pixels", "toy_dataset", "toy_tuned"]
    space = SPACE.replace("[toy_features]", str(names))
    rows = run(space, overrides=["methods.toy_encoder.params.flip=true"])
    assert len(rows) == 5 * 3
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    assert rows["toy_pixels", "small"].backbone is None
    assert rows["toy_pixels", "small"].resolved_protocol["score_reduction"] == "the method's own"
    assert rows["toy_features", "small"].resolved_protocol["score_reduction"] == "max"


def test_a_second_run_computes_nothing(run):
    first = run()
    assert run() == {}
    assert len(first) == 3


def test_another_aupro_limit_scores_again_and_fits_nothing(run, monkeypatch):
    from adgrid_example.methods import FeatureMean

    first = run()
    monkeypatch.setattr(FeatureMean, "fit", lambda self, train: pytest.fail("fitted again"))
    second = run(overrides=["protocol.aupro_limit=0.05"])
    assert sorted(second) == sorted(first)
    for name, row in second.items():
        assert row.stamps == ("random weights", "rescored")
        assert row.prediction_id == first[name].prediction_id
        assert row.cell_id != first[name].cell_id
        assert row.metrics["pixel_auroc"] == first[name].metrics["pixel_auroc"]
        assert row.costs["fit_seconds"] == first[name].costs["fit_seconds"]  # that of the fit behind it
    assert any(row.metrics["aupro"] != first[name].metrics["aupro"] for name, row in second.items())


def test_another_parameter_fits_again_on_stored_features(run):
    first = run()
    assert sum(row.costs["extracted_images"] for row in first.values()) == 3 * 14
    second = run(overrides=["methods.toy_features.params.scale=2.0"])
    assert len(second) == 3
    assert sum(row.costs["extracted_images"] for row in second.values()) == 0
    for name, row in second.items():
        assert row.stamps == ("random weights",)
        assert row.metrics["pixel_auroc"] == pytest.approx(first[name].metrics["pixel_auroc"], abs=1e-6)


def test_one_changed_image_touches_its_category_alone(run, parts):
    first = run(FOLDER)
    assert {row.status for row in first.values()} == {"ok"}
    draw(parts / "nut/test/good/2.png", seed=9)
    second = run(FOLDER)
    assert list(second) == ["nut"]
    assert second["nut"].prediction_id != first["nut"].prediction_id
    assert second["nut"].costs["extracted_images"] == 1


def test_a_changed_mask_scores_its_category_again(run, parts):
    first = run(FOLDER)
    mask = np.zeros((64, 64), np.uint8)
    mask[40:50, 40:50] = 255
    Image.fromarray(mask).save(parts / "bolt/ground_truth/dent/0_mask.png")
    second = run(FOLDER)
    assert list(second) == ["bolt"]
    assert second["bolt"].stamps == ("random weights", "rescored")
    assert second["bolt"].metrics["pixel_auroc"] < first["bolt"].metrics["pixel_auroc"]
    assert second["bolt"].metrics["image_auroc"] == first["bolt"].metrics["image_auroc"]


def test_touching_a_file_changes_nothing(run, parts):
    run(FOLDER)
    (parts / "nut/test/good/2.png").touch()
    assert run(FOLDER) == {}


@pytest.mark.parametrize(
    ("how", "kind"),
    [("fit", "RuntimeError"), ("predict", "RuntimeError"), ("nan", "ScoreError"), ("memory", "MemoryError")],
)
def test_a_failing_category_is_a_row_and_the_others_go_on(run, tmp_path, how, kind):
    space = BROKEN.replace("HOW", how).replace("NOTE", str(tmp_path / "fits"))
    rows = run(space)
    assert {name: row.status for name, row in rows.items()} == {"large": "ok", "middle": "failed", "small": "ok"}
    assert rows["middle"].reason.startswith(kind)
    assert "Traceback" in rows["middle"].traceback
    assert rows["middle"].metrics == {}
    again = run(space)
    assert list(again) == ["middle"]
    # Where memory ran out, each run has fitted once more in smaller batches.
    assert (tmp_path / "fits").read_text().count("fit") == (4 if how == "memory" else 2)


def test_a_corrupt_image_fails_its_category_and_names_the_file(run, parts):
    (parts / "nut/test/good/1.png").write_bytes(b"not an image")
    rows = run(FOLDER)
    assert rows["bolt"].status == "ok"
    assert rows["nut"].status == "failed"
    assert "1.png" in rows["nut"].reason
    draw(parts / "nut/test/good/1.png", seed=1)
    assert {name: row.status for name, row in run(FOLDER).items()} == {"nut": "ok"}


def test_a_mask_of_another_size_fails_its_category_and_names_both_sizes(run, parts):
    Image.new("L", (32, 64), 255).save(parts / "nut/ground_truth/dent/1_mask.png")
    rows = run(FOLDER)
    assert (rows["bolt"].status, rows["nut"].status) == ("ok", "failed")
    assert "1_mask.png" in rows["nut"].reason
    assert "32" in rows["nut"].reason
    assert "64" in rows["nut"].reason


def test_a_test_set_of_one_class_is_a_failed_row(run, parts):
    shutil.rmtree(parts / "nut/test/good")
    rows = run(FOLDER)
    assert (rows["bolt"].status, rows["nut"].status) == ("ok", "failed")
    assert rows["nut"].reason.startswith("MetricError")


def test_without_masks_pixel_metrics_are_absent(run, parts):
    for category in ("bolt", "nut"):
        shutil.rmtree(parts / category / "ground_truth")
    rows = run(FOLDER)
    assert {row.status for row in rows.values()} == {"ok"}
    assert set(rows["nut"].metrics) == {"image_auroc", "image_ap", "image_f1_max"}


def test_images_that_changed_after_planning_are_refused(run, parts):
    plan = run.plan(FOLDER)
    draw(parts / "nut/test/good/2.png", seed=9)
    rows = run.run_plan(plan)
    assert (rows["bolt"].status, rows["nut"].status) == ("ok", "failed")
    assert rows["nut"].reason.startswith("PlanOutdated")


def test_a_dataset_wide_method_is_fitted_once(run, monkeypatch):
    from adgrid_example.methods import DatasetMean

    fits = []
    monkeypatch.setattr(
        DatasetMean, "fit", lambda self, train: (fits.append(len(train)), super(DatasetMean, self).fit(train))
    )
    rows = run(SPACE.replace("toy_features", "toy_dataset"))
    assert fits == [18]
    assert len(rows) == 3


def test_shots_bound_the_training_images(run):
    rows = run(SPACE + "shots: 3\n")
    assert {row.costs["train_images"] for row in rows.values()} == {3}
    assert {row.shots for row in rows.values()} == {3}


def test_a_stage_is_trained_once_and_reloaded(run, monkeypatch):
    from adgrid_example import methods

    steps = []
    losses = methods._Tuning.losses
    monkeypatch.setattr(methods._Tuning, "losses", lambda self, *args: (steps.append(1), losses(self, *args))[1])
    space = SPACE.replace("toy_features", "toy_tuned") + "categories: [small]\n"
    first = run(space)
    assert len(steps) == 2  # six images in batches of four
    run.store.delete(f"predictions/{first['small'].prediction_id}.arrow")
    run.store.delete(f"rows/new/{first['small'].cell_id}.ok.parquet")
    second = run(space)
    assert len(steps) == 2
    assert second["small"].metrics == first["small"].metrics
    assert len(second["small"].curves["tuning"]) == 1
    assert second["small"].curves == first["small"].curves


def test_what_a_stage_warns_of_stands_on_its_rows_when_it_is_loaded_too(run):
    space = SPACE.replace("toy_features", "{name: toy_tuned, params: {learning_rate: 0.6}}") + "categories: [small]\n"
    first = run(space)["small"]
    assert "the rate is high" in first.stamps
    run.store.delete(f"predictions/{first.prediction_id}.arrow")
    run.store.delete(f"rows/new/{first.cell_id}.ok.parquet")
    assert run(space)["small"].stamps == first.stamps


def test_a_fitted_method_is_kept_on_request(run):
    run(save_fitted=True)
    assert len(run.store.names("artifacts")) == 3


def test_large_predictions_are_not_kept_and_fitted_again(run):
    run(prediction_mib=0)
    assert run.store.names("predictions") == []
    second = run(overrides=["protocol.aupro_limit=0.05"])
    assert {row.stamps for row in second.values()} == {("random weights",)}


def test_a_trial_that_cannot_start_is_a_reason_for_each_cell(run):
    plan = run.plan()
    trial = dataclasses.replace(plan.trials[0], method="toy_features", weights="/absent/weights.pth")
    rows = list(run_trial(trial, run.settings(plan)))
    assert [row.status for row in rows] == ["failed"] * 3
    assert "/absent/weights.pth" in rows[0].reason


def test_a_category_that_another_trial_extracts_is_taken_last(run, monkeypatch):
    monkeypatch.setattr("harness.trial.is_being_extracted", lambda resolved, category, settings: category == "large")
    assert list(run()) == ["middle", "small", "large"]
    monkeypatch.setattr("harness.trial.is_being_extracted", lambda resolved, category, settings: True)
    assert list(run(overrides=["methods.toy_features.params.scale=2.0"])) == ["large", "middle", "small"]


def test_masks_are_read_and_labelled_once(run, parts, monkeypatch):
    from harness import truth

    labelled = []
    label_regions = truth.label_regions
    monkeypatch.setattr(truth, "label_regions", lambda mask: (labelled.append(1), label_regions(mask))[1])
    first = run(FOLDER)
    assert len(labelled) == 4  # both categories have the same four masks
    second = run(FOLDER, overrides=["methods.toy_features.params.scale=2.0"])
    assert len(labelled) == 4
    assert second["nut"].metrics["aupro"] == pytest.approx(first["nut"].metrics["aupro"], abs=1e-6)
    for path in (Path(run.places.cache_dir) / "truth").iterdir():
        path.write_bytes(b"damaged")
    third = run(FOLDER, overrides=["protocol.aupro_limit=0.2"])
    assert len(labelled) == 8
    assert third["nut"].status == "ok"


def test_a_grid_over_ratios_and_seeds_costs_one_extraction_and_one_coreset_order_per_seed(run):
    from methods.components.memory_bank import CORESETS

    space = SPACE.replace("[toy_features]", "[padim, {name: patchcore, params: {coreset_ratio: [0.05, 0.2, 0.1]}}]")
    before = CORESETS.num_chosen
    rows = []
    plan = run.plan(space + "seeds: [0, 1]\ncategories: [small]\n")
    settings = run.settings(plan)
    for trial in plan.trials:
        rows += run_trial(trial, settings)
    assert len(rows) == 2 * (1 + 3)
    assert {row.status for row in rows} == {"ok"}, [row.reason for row in rows]
    assert sum(row.costs["extracted_images"] for row in rows) == 14
    num_patches = 6 * 8 * 8  # six training images, 8 x 8 patches at stride 8
    assert CORESETS.num_chosen - before == 2 * int(0.2 * num_patches)


def test_a_trial_that_asks_for_an_accelerator_never_falls_back_silently(run, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    rows = run(SPACE + "resources: {gpu: 1}\n")
    assert {row.status for row in rows.values()} == {"failed"}
    assert "sees no accelerator" in rows["small"].reason


def test_a_picture_that_fails_costs_no_number(run, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("harness.trial.publish_sheet", fail)
    rows = run(pictures=True)
    assert {row.status for row in rows.values()} == {"ok"}
    assert any("no picture: OSError" in stage for _, stage, _, _ in run.notes)


def test_a_restarted_trial_keeps_the_reason_of_what_failed_before(run, tmp_path):
    plan = run.plan(BROKEN.replace("HOW", "fit").replace("NOTE", str(tmp_path / "fits")))
    settings = run.settings(plan)
    for _ in range(4):  # the worker died four times, after the cell had failed
        rows = list(run_trial(plan.trials[0], settings))
    assert rows == []
    (failed,) = [row for row in run.store.load_rows().values() if row.status == "failed"]
    assert failed.reason.startswith("RuntimeError: the fit was told to fail")
    assert (tmp_path / "fits").read_text().count("fit") == 1


def test_what_a_method_draws_without_a_name_depends_on_its_cell_alone(run, monkeypatch):
    import torch
    from adgrid_example.methods import FeatureMean

    fit, drawn = FeatureMean.fit, []
    monkeypatch.setattr(FeatureMean, "fit", lambda self, train: (drawn.append(float(torch.rand(()))), fit(self, train)))
    run()
    torch.rand(17)
    run(overrides=["methods.toy_features.params.scale=2.0"])
    assert drawn[:3] == drawn[3:]
    assert len(set(drawn[:3])) == 3


TUNED = SPACE.replace("[toy_features]", "[{name: toy_tuned, params: {epochs: 4, learning_rate: 0.5}}]")
TUNED += "categories: [small]\n"


def select(run, selection):
    return run(TUNED.replace("image_size: 64", f"image_size: 64, selection: {selection}"))["small"]


def test_a_state_picked_on_test_data_is_said_so_and_is_no_worse(run):
    last, best = select(run, "last"), select(run, "test_best")
    assert best.metrics["image_auroc"] >= last.metrics["image_auroc"]
    assert best.stamps == ("random weights", "state picked on test data")
    assert last.stamps == ("random weights",)
    assert best.prediction_id != last.prediction_id
    assert best.protocol_id != last.protocol_id
    assert best.curves["tuning"] == last.curves["tuning"]


def test_a_state_picked_on_test_data_is_the_best_of_all_epochs(run):
    by_epochs = [run(TUNED.replace("epochs: 4", f"epochs: {epochs}"))["small"] for epochs in (1, 2, 3, 4)]
    best = select(run, "test_best")
    assert best.metrics["image_auroc"] == max(row.metrics["image_auroc"] for row in by_epochs)


def test_the_state_with_the_lowest_loss_is_kept(run):
    lowest = select(run, "lowest_loss")
    epoch = min(range(4), key=lambda number: lowest.curves["tuning"][number]) + 1
    alone = run(TUNED.replace("epochs: 4", f"epochs: {epoch}"))["small"]
    assert lowest.metrics == alone.metrics
    assert lowest.stamps == ("random weights",)


def test_a_trained_stage_serves_every_configuration_that_agrees_in_its_fields(run, monkeypatch):
    from adgrid_example import methods

    steps = []
    losses = methods._Tuning.losses
    monkeypatch.setattr(methods._Tuning, "losses", lambda self, *args: (steps.append(1), losses(self, *args))[1])
    monkeypatch.setattr(methods._Tuning, "fields", ("epochs", "learning_rate"))
    run(TUNED)
    trained = len(steps)
    run(TUNED.replace("epochs: 4", "epochs: 4, scale: 2.0"))
    assert len(steps) == trained
    run(TUNED.replace("epochs: 4", "epochs: 3"))
    assert len(steps) > trained


def test_a_trial_whose_process_ended_goes_on_from_the_last_checkpoint(run, monkeypatch):
    from adgrid_example import methods

    whole = run(TUNED)["small"]
    run.store.delete_folder("artifacts")
    run.store.delete_folder("predictions")
    run.store.delete_folder("rows")
    epochs = []
    losses = methods._Tuning.losses
    monkeypatch.setattr(
        methods._Tuning,
        "losses",
        lambda self, batch, share: (epochs.append(share.epoch), losses(self, batch, share))[1],
    )
    plan = run.plan(TUNED)
    settings = run.settings(plan, checkpoint_seconds=0)

    def pull_the_plug(category, stage, done, total, loss=None):
        if "epoch" in stage and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(run_trial(plan.trials[0], settings, pull_the_plug))
    assert len(run.store.names("checkpoints")) == 1
    assert set(epochs) == {0, 1, 2}
    epochs.clear()
    again = run.run_plan(plan)["small"]
    assert set(epochs) == {2, 3}  # the checkpoint of the second epoch was the last one saved
    assert again.metrics == whole.metrics
    assert again.curves == whole.curves
    assert again.curves["tuning.epoch"] == (0.0, 1.0, 2.0, 3.0)
    assert run.store.names("checkpoints") == []


def test_rows_say_that_a_method_normalised_by_test_images(run):
    params = "rotation_degrees: 0.0, meta_epochs: 1, sub_epochs: 1, coupling_blocks: 1, condition_width: 8"
    space = SPACE.replace(
        "[toy_features]", f"[{{name: cflow, layers: [layer2], params: {{{params}, normalise: HOW}}}}]"
    )
    space += "categories: [small]\n"
    usual, official = (run(space.replace("HOW", how))["small"] for how in ("train_max", "test_max"))
    assert (usual.status, official.status) == ("ok", "ok"), official.reason
    assert "normalised by test images" in official.stamps
    assert "normalised by test images" not in usual.stamps
    assert official.curves == usual.curves
    maps = [run.store.load_prediction(row.prediction_id).anomaly_maps for row in (usual, official)]
    assert maps[1].min() == pytest.approx(-1, abs=0.2)  # the likeliest patch of all test images has a likelihood of one
    assert not np.allclose(maps[0], maps[1])


def test_what_another_run_works_on_is_left_to_it(run):
    plan = run.plan()
    (trial,) = plan.trials
    cells = {cell.category: cell for cell in trial.cells}
    left = {}
    with Claims(run.store, "another run").take(cells["middle"].prediction_id):
        rows = list(run_trial(trial, run.settings(plan), leave=left.update))
    assert {row.category for row in rows} == {"small", "large"}
    assert left == {cells["middle"].cell_id: cells["middle"].prediction_id}
    assert list(run.run_plan(plan)) == ["middle"]
    assert run.store.names("claims") == []


def test_a_dataset_wide_fit_is_one_claim(run):
    plan = run.plan(SPACE.replace("toy_features", "toy_dataset"))
    (trial,) = plan.trials
    left = {}
    with Claims(run.store, "another run").take(trial.cells[0].prediction_id):
        assert list(run_trial(trial, run.settings(plan), leave=left.update)) == []
        assert find_left(trial, run.store, run.settings(plan)) == left
    assert left.keys() == {cell.cell_id for cell in trial.cells}
    assert len(run.run_plan(plan)) == 3
    assert find_left(trial, run.store, run.settings(plan)) == {}


def test_a_cell_that_another_run_finishes_meanwhile_is_not_computed_again(run, monkeypatch):
    plan = run.plan()
    (trial,) = plan.trials
    rows = run_trial(trial, run.settings(plan))
    first = next(rows)
    others = run.run_plan(plan)  # the first is done, and the second run takes the rest
    assert len(others) == 2
    monkeypatch.setattr("harness.trial.FittedMethod", None)
    assert list(rows) == []
    assert {first.category, *others} == {"small", "middle", "large"}


def test_a_full_disk_ends_a_trial_and_loses_no_row(run, monkeypatch):
    plan = run.plan()
    rows = run_trial(plan.trials[0], run.settings(plan))
    saved = next(rows)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(StoreError, match="No space left"):
            list(rows)
    found = run.store.load_rows()
    assert {row.category: row.status for row in found.values()} == {saved.category: "ok"}
    assert len(run.run_plan(plan)) == 2


def test_a_slow_storage_changes_no_number(run, tmp_path, places, monkeypatch):
    monkeypatch.setattr("harness.claims.BEATS", 1000)  # claims are renewed again and again meanwhile

    def slowly(method):
        def call(*args, **options):
            time.sleep(0.03)
            return method(*args, **options)

        return call

    for name in ("_put", "read", "exists", "names"):
        monkeypatch.setattr(Store, name, slowly(getattr(Store, name)))
    slow = run(claim_seconds=1.0)
    monkeypatch.undo()
    fast = SmallRun(tmp_path / "fast", places)()
    assert {name: row.metrics for name, row in slow.items()} == {name: row.metrics for name, row in fast.items()}


def test_a_cache_too_small_for_a_category_changes_no_number(run, tmp_path, places):
    methods = SPACE.replace("[toy_features]", "[toy_features, toy_pixels]")
    rows = run(methods, cache_gib=2e-5)
    whole = SmallRun(tmp_path / "other", dataclasses.replace(places, cache_dir=str(tmp_path / "whole")))(methods)
    assert {key: row.metrics for key, row in rows.items()} == {key: row.metrics for key, row in whole.items()}
    assert any("do not fit" in note[1] for note in run.notes)
    assert sum(file.stat().st_size for file in Path(places.cache_dir).rglob("*.arrow")) < 2e-5 * 2**30
