"""A trial that a study watches: in order, with looks at the right epochs, and ended when the study says so."""

import pytest
from runs import SPACE, SmallRun

from harness.trial import run_trial
from harness.watch import Observer, Stopped, Watch

TUNED = SPACE.replace("[toy_features]", "[{name: toy_tuned, params: {epochs: 9, learning_rate: 0.1}}]")


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def observe(run, text, watch, say=lambda *_: None, goes_on=lambda: True):
    """Rows by category of the only trial, and the looks."""
    plan = run.plan(text)
    looks, rows = [], {}

    def tell(done, value):
        looks.append((done, value))
        say(done, value)

    observer = Observer(watch=watch, tell=tell, goes_on=goes_on)
    try:
        for row in run_trial(plan.trials[0], run.settings(plan), observer=observer):
            rows[row.category] = row
    except Stopped:
        return rows, [*looks, "stopped"]
    return rows, looks


@pytest.mark.parametrize(
    ("first", "factor", "expected"),
    [
        (1, 2, [1, 2, 4, 8, 16]),
        (3, 2, [3, 6, 12]),
        (2, 3, [2, 6, 18]),
        (1, 1.5, [1, 2, 3, 4, 6, 8, 12, 18]),
        (20, 2, []),
    ],
)
def test_looks_come_at_the_rungs_and_never_after_the_last_epoch(first, factor, expected):
    watch = Watch(objective="image_auroc", by_epochs=True, first_look=first, factor=factor)
    assert [done for done in range(1, 21) if watch.is_due(done, 20)] == expected


def test_without_a_first_look_nothing_is_looked_at():
    assert not any(Watch(objective="image_auroc").is_due(done, 20) for done in range(1, 21))


def test_looks_tell_the_objective_and_change_no_number(run, tmp_path, places):
    text = TUNED + "categories: [small]\n"
    watch = Watch(objective="pixel_auroc", by_epochs=True, first_look=2)
    rows, looks = observe(run, text, watch)
    assert [done for done, _ in looks] == [2, 4, 8]
    assert all(0 <= value <= 1 for _, value in looks)
    plain = SmallRun(tmp_path / "plain", places)(text)
    assert rows["small"].metrics == plain["small"].metrics
    assert rows["small"].curves == plain["small"].curves


def test_a_look_is_what_a_shorter_training_would_be_scored_with(run):
    watch = Watch(objective="image_auroc", by_epochs=True, first_look=4)
    _, looks = observe(run, TUNED + "categories: [small]\n", watch)
    short = run(TUNED.replace("epochs: 9", "epochs: 4") + "categories: [small]\n")
    assert looks[0] == (4, short["small"].metrics["image_auroc"])


def test_a_trial_ends_at_a_look_and_leaves_no_row(run):
    answers = iter([True, False])
    watch = Watch(objective="image_auroc", by_epochs=True, first_look=2)
    rows, looks = observe(run, TUNED + "categories: [small]\n", watch, goes_on=lambda: next(answers))
    assert (rows, len(looks), looks[-1]) == ({}, 3, "stopped")
    assert run.store.load_rows() == {}


def test_a_trial_ends_between_categories_and_keeps_what_is_done(run):
    answers = iter([True, False])
    rows, looks = observe(run, SPACE, Watch(objective="image_auroc"), goes_on=lambda: next(answers))
    assert list(rows) == ["large", "middle"]
    assert looks == ["stopped"]
    assert {row.category for row in run.store.load_rows().values()} == {"large", "middle"}


def test_a_watched_trial_keeps_the_order_of_its_categories(run, monkeypatch):
    from harness import trial

    monkeypatch.setattr(trial, "is_being_extracted", lambda resolved, category, settings: category == "large")
    rows, _ = observe(run, SPACE, Watch(objective="image_auroc"))
    assert list(rows) == ["large", "middle", "small"]
    other = run.plan(SPACE + "seeds: [1]\n")
    order = [row.category for row in run_trial(other.trials[0], run.settings(other))]
    assert order == ["middle", "small", "large"]


def test_an_exception_of_a_look_ends_a_process_alone(run):
    def say(done, value):
        raise SystemExit

    watch = Watch(objective="image_auroc", by_epochs=True, first_look=2)
    with pytest.raises(SystemExit):
        observe(run, TUNED + "categories: [small]\n", watch, say=say)
    assert run.store.load_rows() == {}
