"""Searchers and schedulers of studies, without a Ray: each knows its own study alone, and what was found before."""

import dataclasses

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from runs import SPACE, SmallRun

from harness.studies import _Studies, _StudyScheduler, _StudySearcher
from harness.study import Ledger
from harness.study_track import Track

STUDY = SPACE.replace("[toy_features]", "[{name: toy_spoiled, params: {spoil: {uniform: [0, 1]}}}]") + (
    "search: {num_samples: 6, tune_on: {toy_squares: [large, middle]}, HOW}\n"
)
ASHA = STUDY.replace("HOW", "scheduler: asha")
TWO = ASHA.replace("[toy_resnet]", "[toy_resnet, {name: test_vit, layers: [blocks.1]}]")
OPTUNA = STUDY.replace("HOW", "searcher: optuna, max_concurrent: 6")


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


class TuneTrial:
    """What Tune's schedulers look at."""

    def __init__(self, trial_id):
        self.trial_id, self.config = trial_id, None


class Tuner:
    """What Tune does with a searcher and a scheduler, one trial at a time."""

    def __init__(self, studies, store, room=None):
        self.tracks = [Track(study, store) for study in studies]
        self.studies = _Studies(self.tracks, room)
        self.searcher, self.scheduler = _StudySearcher(self.studies), _StudyScheduler(self.studies)
        self.started = []

    def start(self):
        """A new trial of Tune, or what the searcher says instead."""
        trial = TuneTrial(f"t{len(self.started)}")
        trial.config = self.searcher.suggest(trial.trial_id)
        if trial.config in (None, Searcher.FINISHED):
            return trial.config
        self.started.append(trial)
        self.scheduler.on_trial_add(None, trial)
        return trial

    def report(self, trial, time, score):
        return self.scheduler.on_trial_result(None, trial, {"time": time, "score": score, "row": ""})

    def end(self, trial, error=False):
        if not error:
            self.scheduler.on_trial_complete(None, trial, {"ended": True})
        self.searcher.on_trial_complete(trial.trial_id, error=error)

    def run(self, score_of):
        """All trials in turn; (study id, params, whether it was stopped) of each."""
        outcomes = []
        while (trial := self.start()) not in (None, Searcher.FINISHED):
            decisions = []
            for time in (1, 2):
                decisions.append(self.report(trial, time, score_of(trial.config["sample"])))
                if decisions[-1] == TrialScheduler.STOP:
                    break
            self.end(trial)
            sample = trial.config["sample"]
            outcomes.append((sample.trial.tuned.study_id, sample.params["spoil"], TrialScheduler.STOP in decisions))
        return outcomes


def save_rows(run, sample, row, stopped=False):
    """Rows of a sample as its worker or its scheduler would have saved them."""
    for place, cell in enumerate(sample.trial.cells):
        status = "stopped" if stopped and place else "ok"
        run.store.publish_row(dataclasses.replace(row, cell_id=cell.cell_id, category=cell.category, status=status))


@pytest.fixture
def row(run):
    return run()["large"]


def test_asha_stops_what_is_worse_than_the_best_half_so_far(run):
    (study,) = run.plan(ASHA).studies
    outcomes = Tuner([study], run.store).run(lambda sample: 1 - sample.params["spoil"])
    # By hand: a sample passes the rung if it is not below the median of those that came to it before.
    seen, expected = [], []
    for _, spoil, _ in outcomes:
        middle = sorted(seen)[len(seen) // 2] if len(seen) % 2 else sum(sorted(seen)[len(seen) // 2 - 1 :][:2]) / 2
        expected.append(bool(seen) and 1 - spoil < middle)
        seen.append(1 - spoil)
    assert [stopped for _, _, stopped in outcomes] == expected
    assert any(expected)
    assert not all(expected)


def test_median_stopping_waits_for_three_others_and_never_pauses(run):
    (study,) = run.plan(STUDY.replace("HOW", "scheduler: median")).studies
    scores = iter([0.9, 0.8, 0.7, 0.1, 0.95, 0.6])
    given = {sample.trial.trial_id: next(scores) for sample in study.samples}
    outcomes = Tuner([study], run.store).run(lambda sample: given[sample.trial.trial_id])
    assert [stopped for _, _, stopped in outcomes] == [False, False, False, True, False, True]


def test_studies_of_one_run_never_compare_their_trials(run):
    first, second = run.plan(TWO).studies
    tuner = Tuner([first, second], run.store)

    def score_of(sample):
        # All of the first study are better than any of the second, and within a study all are alike.
        return 0.9 if sample.trial.tuned.study_id == first.study_id else 0.1

    outcomes = tuner.run(score_of)
    assert [study for study, _, _ in outcomes[:4]] in (
        [first.study_id, second.study_id] * 2, [second.study_id, first.study_id] * 2
    )  # fmt: skip
    assert len(outcomes) == 12
    assert not any(stopped for _, _, stopped in outcomes)
    for track in tuner.tracks:
        ((_, recorded),) = [rung for rung in track.scheduler._brackets[0]._rungs if rung[0] == 1]
        own = {
            trial.trial_id
            for trial in tuner.started
            if trial.config["sample"].trial.tuned.study_id == track.study.study_id
        }
        assert set(recorded) == own


def test_a_new_start_compares_with_what_was_found_before(run, row):
    (study,) = run.plan(ASHA).studies
    ledger = Ledger(study, run.store)
    for sample, score in zip(study.samples[:4], (0.9, 0.8, 0.2, 0.85), strict=True):
        stopped = score < 0.5
        ledger.write(sample, [(1, score)] if stopped else [(1, score), (2, score)])
        save_rows(run, sample, row, stopped)
    tuner = Tuner([study], run.store)
    outcomes = tuner.run(lambda sample: 0.7)
    assert [spoil for _, spoil, _ in outcomes] == [sample.params["spoil"] for sample in study.samples[4:]]
    assert [stopped for _, _, stopped in outcomes] == [True, True]  # below the median of 0.9, 0.8, 0.2 and 0.85


def test_a_report_that_is_repeated_counts_once(run):
    (study,) = run.plan(ASHA).studies
    tuner = Tuner([study], run.store)
    trial = tuner.start()
    assert tuner.report(trial, 1, 0.9) == TrialScheduler.CONTINUE
    assert tuner.report(trial, 1, 0.9) == TrialScheduler.CONTINUE
    assert Ledger(study, run.store).reports(trial.config["sample"]) == [(1, 0.9)]
    assert tuner.scheduler.on_trial_result(None, trial, {"note": ["large", "fitting", 0, 1]}) == "CONTINUE"


def test_optuna_proposes_as_many_different_samples_as_wanted(run):
    (study,) = run.plan(OPTUNA).studies
    outcomes = Tuner([study], run.store).run(lambda sample: 1 - sample.params["spoil"])
    assert len({spoil for _, spoil, _ in outcomes}) == 6
    samples = Ledger(study, run.store).samples()
    assert [sample.params["spoil"] for sample in samples] == [spoil for _, spoil, _ in outcomes]
    again = SmallRun(run.store.local_path("again"), run.places)
    assert Tuner([study], again.store).run(lambda sample: 1 - sample.params["spoil"]) == outcomes


def test_optuna_learns_where_the_best_values_are(run):
    text = OPTUNA.replace("num_samples: 6", "num_samples: 40").replace("max_concurrent: 6", "max_concurrent: 1")
    (study,) = run.plan(text).studies
    outcomes = Tuner([study], run.store).run(lambda sample: -abs(sample.params["spoil"] - 0.3))
    late = sorted(abs(spoil - 0.3) for _, spoil, _ in outcomes[20:])
    assert late[len(late) // 2] < 0.15


def test_on_a_new_start_optuna_is_told_what_was_found_and_it_counts(run, row):
    (study,) = run.plan(OPTUNA).studies
    ledger = Ledger(study, run.store)
    proposals = [study.sample(number, {"spoil": spoil}) for number, spoil in enumerate((0.5, 0.25, 0.75, 0.125))]
    for sample, score in zip(proposals[:2], (0.6, 0.8), strict=True):
        ledger.write(sample, [(1, score), (2, score)])
        save_rows(run, sample, row)
    ledger.write(proposals[2], [(1, 0.1)])
    save_rows(run, proposals[2], row, stopped=True)
    ledger.write(proposals[3])  # its driver was killed while it ran
    tuner = Tuner([study], run.store)
    told = tuner.tracks[0]._optuna._ot_study.trials
    assert [(trial.params["spoil"], trial.value) for trial in told] == [(0.5, 0.6), (0.25, 0.8), (0.75, 0.1)]
    outcomes = tuner.run(lambda sample: 0.5)
    assert next(spoil for _, spoil, _ in outcomes) == 0.125
    assert len(outcomes) == 3  # the one that was interrupted, and two new ones
    assert len(Ledger(study, run.store).samples()) == 6
    values = {trial.params["spoil"]: trial.value for trial in tuner.tracks[0]._optuna._ot_study.trials}
    assert values[0.125] == 0.5
    assert len(values) == 6


def test_a_failed_sample_is_a_failed_trial_for_optuna_and_tried_again_by_the_next_start(run):
    (study,) = run.plan(OPTUNA).studies
    tuner = Tuner([study], run.store)
    trial = tuner.start()
    tuner.end(trial, error=True)
    (told,) = tuner.tracks[0]._optuna._ot_study.trials
    assert told.state.name == "FAIL"
    again = Tuner([study], run.store)
    assert again.start().config["sample"] == trial.config["sample"]


def test_optuna_ends_when_a_small_space_is_exhausted(run):
    text = OPTUNA.replace("{uniform: [0, 1]}", "{choice: [0.0, 0.5, 1.0]}")
    (study,) = run.plan(text).studies
    outcomes = Tuner([study], run.store).run(lambda sample: 1 - sample.params["spoil"])
    assert sorted(spoil for _, spoil, _ in outcomes) == [0.0, 0.5, 1.0]


def test_no_more_samples_are_proposed_than_there_is_room_for(run):
    text = OPTUNA.replace("max_concurrent: 6", "max_concurrent: 2")
    (study,) = run.plan(text).studies
    tuner = Tuner([study], run.store)
    first, second = tuner.start(), tuner.start()
    assert tuner.start() is None
    tuner.end(first)
    assert tuner.start().config["sample"].number == 2
    assert tuner.start() is None
    tuner.end(second)
    narrow = Tuner(run.plan(OPTUNA).studies, SmallRun(run.store.local_path("other"), run.places).store, room=1)
    assert narrow.start() is not None
    assert narrow.start() is None


def test_numbers_of_every_kind_reach_the_configuration_as_they_should(run):
    kinds = "{spoil: {quniform: [0, 1, 0.25]}, spare: {randint: [0, 3]}, scale: {loguniform: [0.1, 10]}}"
    text = OPTUNA.replace("{spoil: {uniform: [0, 1]}}", kinds)
    (study,) = run.plan(text).studies
    tuner = Tuner([study], run.store)
    for _ in range(6):
        params = tuner.start().config["sample"].trial.params
        assert params["spoil"] in (0, 0.25, 0.5, 0.75, 1)
        assert params["spare"] in (0, 1, 2)
        assert 0.1 <= params["scale"] <= 10
        assert params["scale"] == float(f"{params['scale']:.4g}")
