"""Studies: how grid points become them, what they may be tuned on, and what is read from their rows."""

import dataclasses
import shutil

import pytest
from runs import SPACE, SmallRun
from test_trial import parts  # noqa: F401

from harness import search
from harness.contracts import AdgridError
from harness.plan import measure_progress
from harness.rows import show_row
from harness.run_folder import foresee_studies
from harness.store import Store
from harness.study import Ledger, describe_study, find_best, read_study, running_means

SWEPT = SPACE.replace("[toy_features]", "[{name: toy_spoiled, params: {spoil: {uniform: [0, 1]}}}]") + (
    "search: {num_samples: 4, tune_on: {toy_squares: [large]}}\n"
)
OTHER = SWEPT.replace("[toy_squares]", "[toy_squares, {name: parts, layout: folder}]")


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def study_of(run, text=SWEPT, **changes):
    (study,) = run.plan(text, **changes).studies
    return study


def replaced(text, **entries):
    """The space with other entries in its `search`."""
    inside = text.rpartition("search: {")[2].rpartition("}")[0]
    return text.replace(inside, ", ".join([inside, *(f"{name}: {value}" for name, value in entries.items())]))


# --- planning --------------------------------------------------------------------------------------------------


def test_a_random_search_is_known_when_it_is_planned_and_planned_again(run):
    plan = run.plan(SWEPT)
    (study,) = plan.studies
    assert plan.trials == ()
    assert plan.num_reported == study.num_reported == 2
    assert [sample.number for sample in study.samples] == [0, 1, 2, 3]
    assert len({sample.trial.trial_id for sample in study.samples}) == 4
    assert study.tuned_on == ("toy_squares/large",)
    assert study.reported == ("toy_squares/middle", "toy_squares/small")
    again = study_of(run)
    assert again.study_id == study.study_id
    assert again.samples == study.samples


def test_more_samples_keep_the_first_ones_and_the_study(run):
    few, many = study_of(run), study_of(run, SWEPT.replace("num_samples: 4", "num_samples: 6"))
    assert many.study_id == few.study_id
    assert many.samples[:4] == few.samples


def test_the_cells_of_a_sample_are_those_of_the_same_configuration_in_a_grid(run):
    sample = study_of(run).samples[0]
    grid = SPACE.replace("[toy_features]", f"[{{name: toy_spoiled, params: {{spoil: {sample.params['spoil']}}}}}]")
    (trial,) = run.plan(grid).trials
    assert sample.trial.cells == tuple(cell for cell in trial.cells if cell.category == "large")
    assert sample.trial.trial_id != trial.trial_id  # of other categories, so its means are others
    assert trial.tuned is None


def test_a_small_space_is_exhausted_before_its_samples_are(run):
    text = SWEPT.replace("{uniform: [0, 1]}", "{choice: [0, 0.5, 1]}").replace("num_samples: 4", "num_samples: 20")
    assert sorted(sample.params["spoil"] for sample in study_of(run, text).samples) == [0, 0.5, 1]


def test_grid_points_have_a_study_each_and_seeds_share_one(run):
    text = SWEPT.replace("[toy_resnet]", "[toy_resnet, {name: test_vit, layers: [blocks.1]}]") + "seeds: [3, 4]\n"
    text = text.replace("{spoil:", "{spare: [1, 2], spoil:")
    studies = run.plan(text).studies
    assert len(studies) == 2 * 2
    assert len({study.study_id for study in studies}) == len({study.name for study in studies}) == 4
    assert {study.template.seed for study in studies} == {3}
    for study in studies:
        trials = study.make_reported({"spoil": 0.5})
        assert [(trial.seed, trial.categories) for trial in trials] == [
            (3, ("middle", "small")), (4, ("middle", "small"))
        ]  # fmt: skip
        assert study.num_reported == 4


def test_the_same_configurations_are_tried_on_every_backbone(run):
    text = SWEPT.replace("[toy_resnet]", "[toy_resnet, {name: test_vit, layers: [blocks.1]}]")
    first, second = run.plan(text).studies
    assert [sample.params for sample in first.samples] == [sample.params for sample in second.samples]


@pytest.mark.usefixtures("parts")
def test_a_dataset_that_is_not_tuned_on_takes_what_the_only_tuned_one_found(run):
    study = study_of(run, OTHER)
    trials = study.make_reported({"spoil": 0.25})
    assert [(trial.dataset.name, trial.categories) for trial in trials] == [
        ("toy_squares", ("middle", "small")), ("parts", ("bolt", "nut"))
    ]  # fmt: skip
    assert {trial.params["spoil"] for trial in trials} == {0.25}


@pytest.mark.usefixtures("parts")
def test_it_must_be_clear_which_dataset_another_one_is_tuned_on(run):
    text = OTHER.replace("{toy_squares: [large]}", "{toy_squares: [large], generated: [granite]}")
    with pytest.raises(AdgridError, match="nothing of dataset 'parts' and several others"):
        run.plan(text)


@pytest.mark.usefixtures("parts")
def test_a_dataset_may_be_tuned_on_without_being_reported(run):
    text = OTHER.replace("[toy_squares, {name", "[{name").replace("[large]", "[large, small]")
    study = study_of(run, text)
    assert study.tuned_on == ("toy_squares/large", "toy_squares/small")
    assert study.reported == ("parts/bolt", "parts/nut")


def test_narrowing_the_reported_categories_leaves_the_tuning_alone(run):
    whole, part = study_of(run), study_of(run, SWEPT, overrides=["categories=small"])
    assert part.study_id == whole.study_id
    assert part.reported == ("toy_squares/small",)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        (SWEPT.replace("[toy_squares]", "[{name: toy_squares, categories: [large, small]}]"), []),
        (SWEPT, ["categories=large,small"]),
    ],
)
def test_a_reported_cell_is_never_tuned_on(run, text, overrides):
    with pytest.raises(AdgridError, match="toy_squares/large is tuned on and reported") as caught:
        run.plan(text, overrides=overrides)
    assert "allow_test_tuning" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_images_under_another_name_are_found(run):
    text = SWEPT.replace("[toy_squares]", "[toy_squares, {name: others, layout: toy_squares}]")
    with pytest.raises(AdgridError, match=r"8 of the 8 test images of others/large.*are test images of toy_squares/"):
        run.plan(text)
    assert study_of(run, replaced(text, allow_test_tuning="true"))


def test_nothing_left_to_report_is_refused(run):
    with pytest.raises(AdgridError, match="leaves no category of toy_squares to report"):
        run.plan(SWEPT.replace("[large]", "all"))


def test_tuning_on_test_cells_can_be_allowed_and_is_stamped(run):
    text = replaced(SWEPT.replace("[large]", "all"), allow_test_tuning="true")
    study = study_of(run, text)
    assert study.reported == ("toy_squares/large", "toy_squares/middle", "toy_squares/small")
    (trial,) = study.make_reported({"spoil": 0.0})
    assert trial.tuned.on_test
    rows = run.run_plan(dataclasses.replace(run.plan(text), trials=(trial, study.samples[0].trial)))
    assert rows
    for row in rows.values():
        assert row.stamps[-1] == "TUNED ON TEST DATA: toy_squares/large, toy_squares/middle, toy_squares/small"


def test_an_objective_that_the_tuning_cells_cannot_give_is_refused(run, parts):  # noqa: F811
    text = replaced(OTHER.replace("{toy_squares: [large]}", "{parts: [bolt]}"), objective="pixel_auroc")
    shutil.rmtree(parts / "bolt/ground_truth")
    with pytest.raises(AdgridError, match="pixel_auroc needs masks, and parts/bolt has none"):
        run.plan(text)


def test_a_scheduler_needs_categories_to_compare_after(run):
    with pytest.raises(AdgridError, match="asha compares trials of 'toy_spoiled' after 1 or more of their categories"):
        run.plan(replaced(SWEPT, scheduler="asha"))
    assert not study_of(run, replaced(SWEPT.replace("[large]", "[large, small]"), scheduler="asha")).by_epochs
    assert study_of(run, replaced(SWEPT.replace("toy_spoiled", "toy_spoiled_tuned"), scheduler="asha")).by_epochs


def test_without_optuna_there_is_one_clear_error(run, monkeypatch):
    find = search.importlib.util.find_spec
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name))
    with pytest.raises(AdgridError, match=r"optuna is not installed; `pip install 'adgrid\[search\]'`"):
        run.plan(replaced(SWEPT, searcher="optuna"))
    run.plan(SWEPT)


def test_synthetic_tuning_touches_no_test_image(run):
    study = study_of(run, SWEPT.replace("{toy_squares: [large]}", "synthetic"))
    assert study.template.dataset.name == "toy_squares-held-out"
    assert study.tuned_on == tuple(f"toy_squares-held-out/{name}" for name in ("large", "middle", "small"))
    assert study.reported == ("toy_squares/large", "toy_squares/middle", "toy_squares/small")


# --- results ---------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(run):
    """A study of three samples on two categories: one finished, one that a scheduler stopped, one failed."""
    study = study_of(run, SWEPT.replace("[large]", "[large, small]").replace("num_samples: 4", "num_samples: 3"))
    rows = run.run_plan(dataclasses.replace(run.plan(), trials=(study.samples[0].trial,)))
    row = rows["large"]
    for sample, status in zip(study.samples[1:], ("stopped", "failed"), strict=True):
        first, second = sample.trial.cells
        run.store.publish_row(dataclasses.replace(row, cell_id=first.cell_id))
        run.store.publish_row(
            dataclasses.replace(row, cell_id=second.cell_id, category="small", status=status, metrics={}, reason="why")
        )
    return study


def test_the_status_of_a_sample_is_read_from_its_rows(run, searched):
    results = Ledger(searched, run.store).results()
    assert [result.status for result in results] == ["finished", "stopped", "failed"]
    assert [len(result.scores) for result in results] == [2, 1, 1]
    assert results[0].score == pytest.approx(sum(row.metrics["image_auroc"] for row in results[0].rows.values()) / 2)
    assert results[1].score is None
    assert find_best(results) is results[0]
    assert find_best(results[1:]) is None


def test_of_equal_samples_the_first_is_the_best(run, searched):
    (result, *_) = Ledger(searched, run.store).results()
    twins = [dataclasses.replace(result, number=number) for number in (2, 0, 1)]
    assert find_best(twins).number == 0


def test_a_score_without_a_gap_follows_the_study_order():
    def row(value):
        return dataclasses.make_dataclass("Row", ["status", "metrics"])("ok", {"image_auroc": value})

    rows = {"a": row(1.0), "b": row(0.5), "c": row(0.0)}
    assert running_means(rows, ("a", "b", "c"), "image_auroc") == [1.0, 0.75, 0.5]
    assert running_means({"a": rows["a"], "c": rows["c"]}, ("a", "b", "c"), "image_auroc") == [1.0]
    assert running_means(rows, ("a", "b", "c"), "aupro") == []


def test_a_run_folder_tells_a_study_as_its_plan_does(run, searched):
    results = Ledger(searched, run.store).results()
    record = describe_study(searched, results)
    rows = run.store.load_rows()
    again = read_study(record, rows)
    assert [(result.number, result.params, result.status, result.score) for result in again] == [
        (result.number, result.params, result.status, result.score) for result in results
    ]


def test_a_ledger_keeps_what_was_proposed_and_heard(run):
    study = study_of(run, replaced(SWEPT, searcher="optuna"))
    assert study.samples == ()
    store = Store(run.root)
    ledger = Ledger(study, store)
    assert ledger.samples() == []
    second, first = study.sample(1, {"spoil": 0.75}), study.sample(0, {"spoil": 0.5})
    ledger.write(second)
    ledger.write(first, [(1, 0.5), (2, 0.25)])
    assert Ledger(study, store).samples() == [first, second]
    assert ledger.reports(first) == [(1, 0.5), (2, 0.25)]
    assert ledger.reports(second) == []


def test_the_plan_counts_what_a_searcher_will_still_propose(run):
    plan = run.plan(replaced(SWEPT, searcher="optuna"))
    (study,) = plan.studies
    known, unknown = foresee_studies(plan.studies, run.store)
    assert measure_progress(plan, {}, set(), known, unknown).todo == 4 * 1 + 2
    Ledger(study, run.store).write(study.sample(0, {"spoil": 0.5}))
    run.run_plan(dataclasses.replace(plan, trials=(study.make_trial({"spoil": 0.5}),)))
    known, unknown = foresee_studies(plan.studies, run.store)
    progress = measure_progress(plan, run.store.load_rows(), set(), known, unknown)
    assert (progress.done, progress.todo) == (1, 3 + 2)


def test_a_row_is_shown_as_part_of_the_run_that_shows_it(run):
    study = study_of(run)
    (trial,) = study.make_reported({"spoil": 0.0})
    rows = run.run_plan(dataclasses.replace(run.plan(), trials=(trial,)))
    row = run.store.load_rows()[rows["small"].cell_id]
    assert row.stamps == ("random weights", "tuned on toy_squares/large")
    assert row.tuned["cells"] == ["toy_squares/large"]
    plain = show_row(row, "grid", None)
    assert (plain.trial_id, plain.stamps, plain.tuned) == ("grid", ("random weights",), {})
    back = show_row(plain, trial.trial_id, trial.tuned)
    assert dataclasses.replace(back, stamps=row.stamps) == row
    assert set(back.stamps) == set(row.stamps)
