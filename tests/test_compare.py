import dataclasses

import numpy as np
import pytest
from scored_rows import Scored
from toy_rows import toy_row

from harness.bundle import ImageScores
from harness.compare import compare_rows, find_regressions
from harness.contracts import AdgridError

CATEGORIES = ("bolt", "nut", "screw")


@pytest.fixture
def scored():
    return Scored()


def grid(scored, shift=1.0, run="a", methods=("padim", "patchcore"), seeds=(0,), **changes):
    return [
        scored(shift, run, category=category, method=method, seed=seed, **changes)
        for method in methods
        for category in CATEGORIES
        for seed in seeds
    ]


def compare(scored, sides, **options):
    return compare_rows(sides, scored.load, **options)


def mean(comparison, level="everything", metric="image_auroc"):
    (delta,) = comparison.select(metric, level)
    return delta


# --- verdicts on constructed cases ---


@pytest.mark.parametrize("metric", ["image_auroc", "image_ap", "image_f1_max"])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_identical_runs_never_differ(scored, metric, seeds):
    rows = grid(scored, seeds=seeds)
    twins = [dataclasses.replace(row, cell_id=f"b-{row.cell_id}") for row in rows]
    scored.scores |= {twin.cell_id: scored.scores[row.cell_id] for twin, row in zip(twins, rows, strict=True)}
    for other in (rows, twins):
        found = compare(scored, {"a": rows, "b": other}, metrics=[metric])
        assert {(delta.value, delta.adjusted_p, delta.verdict) for delta in found.deltas} == {
            (0.0, 1.0, "not distinguishable")
        }
        assert find_regressions(found, 0.0) == []


def test_a_shifted_run_is_found_at_its_size(scored):
    found = compare(scored, {"old": grid(scored, 1.0), "new": grid(scored, 1.6, "b")})
    everything = mean(found)
    rows = {name: grid(scored, shift, run) for name, shift, run in (("old", 1.0, "a"), ("new", 1.6, "b"))}
    by_hand = [np.mean([row.metrics["image_auroc"] for row in rows[name]]) for name in ("new", "old")]
    assert (everything.candidate_value, everything.baseline_value) == pytest.approx(tuple(by_hand))
    assert everything.value == pytest.approx(by_hand[0] - by_hand[1])
    low, high = everything.total.interval()
    assert 0 < low < everything.value < high < 2 * everything.value
    assert everything.verdict == "better"
    assert {delta.verdict for delta in found.select("image_auroc", "dataset")} == {"better"}
    back = compare(scored, {"new": rows["new"], "old": rows["old"]})
    assert mean(back).value == pytest.approx(-everything.value)
    assert mean(back).verdict == "worse"


def test_noise_alone_is_rarely_called_a_difference(scored):
    called = 0
    for trial in range(60):
        sides = {"a": grid(scored, run=f"a{trial}"), "b": grid(scored, run=f"b{trial}")}
        found = compare(scored, sides)
        called += any(delta.verdict != "not distinguishable" for delta in found.select("image_auroc", "category"))
    assert called <= 9  # 5 % expected over all six categories together, thanks to Holm


def test_holm_counts_every_row_of_a_level(scored):
    found = compare(scored, {"a": grid(scored), "b": grid(scored, 1.3, "b")})
    deltas = found.select("image_auroc", "category")
    p_values = sorted(delta.total.p_value() for delta in deltas)
    assert len(deltas) == 6
    assert min(delta.adjusted_p for delta in deltas) == pytest.approx(min(1, 6 * p_values[0]))


# --- seeds ---


def test_seeds_widen_the_interval_by_what_they_scatter(scored):
    sides = {
        "a": [scored(1.0 + step, seed=seed) for seed, step in enumerate((0.0, 0.3, -0.3))],
        "b": [scored(1.2 + step, "b", seed=seed) for seed, step in enumerate((0.3, -0.3, 0.0))],
    }
    delta = mean(compare(scored, sides), "category")
    per_seed = [b.metrics["image_auroc"] - a.metrics["image_auroc"] for a, b in zip(*sides.values(), strict=True)]
    assert delta.num_seeds == (3, 3)
    assert delta.over_seeds.value == pytest.approx(np.mean(per_seed))
    assert delta.over_seeds.variance == pytest.approx(np.var(per_seed, ddof=1) / 3)
    assert delta.total.variance == pytest.approx(delta.over_seeds.variance + delta.over_images.variance)


def test_runs_with_other_seeds_are_compared_unpaired_and_it_is_said(scored):
    sides = {"a": grid(scored, seeds=(0, 1)), "b": grid(scored, 1.6, "b", seeds=(2, 3))}
    found = compare(scored, sides)
    assert mean(found).verdict == "better"
    assert mean(found).over_seeds.variance is not None
    assert any("seeds: not the same in 6 of 6 pairs" in note for note in found.matches.notes)
    single = compare(scored, {"a": grid(scored), "b": grid(scored, 1.6, "b", seeds=(7,))})
    assert mean(single).verdict == "better"
    assert mean(single).over_seeds.variance is None


def test_the_axis_seed_compares_seeds(scored):
    found = compare(scored, {"a": grid(scored, seeds=(0, 1))}, axis="seed")
    assert (found.matches.baseline, found.matches.candidates) == ("0", ("1",))
    assert mean(found).verdict == "not distinguishable"


# --- intervals that cannot be made ---


def test_without_image_scores_a_single_seed_has_no_interval(scored):
    sides = {"a": grid(scored), "b": grid(scored, 2.0, "b")}
    delta = mean(compare_rows(sides, lambda cell_id: None))
    assert (delta.total.interval(), delta.adjusted_p, delta.verdict) == (None, None, "not distinguishable")
    assert delta.note == "no interval"
    assert delta.value > 0.1


def test_scores_that_are_not_those_of_the_row_are_not_used(scored):
    sides = {"a": grid(scored), "b": grid(scored, 2.0, "b")}
    broken = scored.scores[sides["b"][0].cell_id]
    scored.scores[sides["b"][0].cell_id] = ImageScores(broken.images, broken.label, -broken.score)
    found = compare(scored, sides)
    categories = found.select("image_auroc", "category")
    assert [delta.note for delta in categories].count("no interval") == 1
    assert mean(found).note == "no interval"


def test_images_are_paired_by_name_and_not_by_place(scored):
    sides = {"a": [scored()], "b": [scored(1.5, "b")]}
    before = mean(compare(scored, sides))
    cell = sides["b"][0].cell_id
    mixed, order = scored.scores[cell], np.random.default_rng(0).permutation(100)
    scored.scores[cell] = ImageScores(
        tuple(mixed.images[place] for place in order), mixed.label[order], mixed.score[order]
    )
    assert mean(compare(scored, sides)) == before
    scored.scores[cell] = ImageScores(tuple(f"other{place}" for place in range(100)), mixed.label, mixed.score)
    assert mean(compare(scored, sides)).note == "no interval"


def test_pixel_metrics_are_judged_by_seeds_alone():
    sides = {
        name: [
            toy_row(0.9, pixel=value + step, seed=seed, cell_id=f"{name}{seed}")
            for seed, step in enumerate((0, 1e-3, 2e-3))
        ]
        for name, value in (("a", 0.90), ("b", 0.95))
    }
    delta = mean(compare_rows(sides, lambda cell_id: None, metrics=["pixel_auroc"]), metric="pixel_auroc")
    # Every seed has the same difference: that says nothing of chance.
    assert (delta.total.variance, delta.verdict) == (None, "not distinguishable")
    sides["b"][0] = toy_row(0.9, pixel=0.9505, cell_id="b0")
    delta = mean(compare_rows(sides, lambda cell_id: None, metrics=["pixel_auroc"]), metric="pixel_auroc")
    assert (delta.note, delta.verdict) == ("seeds alone", "better")


# --- means, lines, ranks ---


def test_a_failed_category_leaves_a_hole_in_every_mean_over_it(scored):
    broken = grid(scored, 1.5, "b")
    broken[1] = toy_row(None, category="nut")
    found = compare(scored, {"a": grid(scored), "b": broken})
    assert [delta.line for delta in found.select("image_auroc", "dataset")] == ["patchcore · resnet18"]
    assert found.select("image_auroc", "everything") == []
    assert len(found.select("image_auroc", "category")) == 5
    assert "b, seed 0: failed: ValueError: all features are NaN" in found.matches.unmatched[0].reason


def test_a_category_that_only_one_side_ran_is_counted_beside_the_mean(scored):
    found = compare(scored, {"a": grid(scored), "b": grid(scored, 1.5, "b")[:5]})
    by_line = {delta.line: delta for delta in found.select("image_auroc", "dataset")}
    assert [(delta.num_places, delta.num_missing) for delta in by_line.values()] == [(3, 0), (2, 1)]
    assert mean(found).num_missing == 1


def test_ranks_take_one_vote_per_category(scored):
    rows = [
        row
        for shift, method in ((0.5, "weak"), (2.0, "strong"), (1.0, "middle"))
        for backbone in ("r18", "r50")
        for row in grid(scored, shift, methods=(method,), backbone=backbone)
    ]
    found = compare(scored, {"a": rows}, axis="method", baseline="middle")
    ranks = found.ranks["image_auroc"]
    assert (ranks.names, ranks.ranks, ranks.num_tests) == (("strong", "middle", "weak"), (1.0, 2.0, 3.0), 3)
    assert [delta.candidate for delta in found.select("image_auroc", "everything")] == ["weak", "strong"]
    assert {delta.line for delta in found.select("image_auroc", "dataset")} == {"r18", "r50"}


def test_rows_on_the_same_images_count_jointly(scored):
    # Two lines with the very same scores know no more than one of them.
    once = {"a": [scored(method="padim")], "b": [scored(1.3, "b", method="padim")]}
    twice = {name: [*rows] for name, rows in once.items()}
    for name, rows in once.items():
        twin = dataclasses.replace(rows[0], method="twin", cell_id=f"twin-{name}")
        scored.scores[twin.cell_id] = scored.scores[rows[0].cell_id]
        twice[name].append(twin)
    alone, joint = mean(compare(scored, once)), mean(compare(scored, twice))
    assert joint.value == pytest.approx(alone.value)
    assert joint.total.variance == pytest.approx(alone.total.variance)


# --- the gate ---


def test_the_gate_closes_on_a_mean_that_lost_more_than_the_margin(scored):
    old, new = grid(scored, 1.5), grid(scored, 1.4, "b")
    found = compare(scored, {"old": old, "new": new})
    worst = min(delta.value for delta in found.select("image_auroc", "dataset"))
    assert worst < 0
    assert find_regressions(found, -worst + 1e-6) == []
    (reason, *_) = find_regressions(found, -worst - 1e-6)
    assert reason.startswith("image_auroc, new · p")
    assert find_regressions(compare(scored, {"new": new, "old": old}), 0.0) == []


def test_the_gate_closes_on_numbers_that_are_gone(scored):
    old = grid(scored)
    broken = grid(scored, 2.0, "b")
    broken[0] = toy_row(None)
    for new, expected in ((broken, "failed"), (broken[1:], "only in old")):
        (reason,) = find_regressions(compare(scored, {"old": old, "new": new}), 0.005)
        assert reason.startswith("new: 1 numbers of old have no counterpart")
        assert expected in reason
    more = compare(scored, {"old": old[:4], "new": grid(scored, 2.0, "b")})
    assert find_regressions(more, 0.005) == []


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"metrics": ["image_auc"]}, "did you mean 'image_auroc'"),
        ({"metrics": ["aupro"]}, "no pair of rows has it; they have image_auroc"),
        ({"axis": "methods"}, "did you mean 'method'"),
        ({"axis": "backbone"}, "two finished rows for padim · resnet18 · parts · bolt"),
        ({"baseline": "c"}, "axis 'run' has no such value"),
        ({"ignore": ["protocol"]}, "this must be equal"),
    ],
)
def test_bad_input_is_told_with_a_remedy(scored, options, expected):
    with pytest.raises(AdgridError, match=expected):
        compare(scored, {"a": grid(scored), "b": grid(scored, 1.5, "b")}, **options)


def test_runs_that_share_nothing_are_an_error_that_names_why(scored):
    with pytest.raises(AdgridError, match=r"protocol.aupro_limit: 0.3 against 0.05.*--ignore"):
        compare(scored, {"a": grid(scored), "b": grid(scored, 1.0, "b", protocol={"aupro_limit": 0.05})})


def test_an_axis_with_one_value_is_an_error(scored):
    with pytest.raises(AdgridError, match="the rows have only 'resnet18'; name another --axis"):
        compare(scored, {"a": grid(scored)}, axis="backbone")
    with pytest.raises(AdgridError, match="name a second run"):
        compare(scored, {"a": grid(scored)})
