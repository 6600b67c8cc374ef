"""Scoring stored predictions again: the rows that a run gives, without a model; ensembles; what cannot be changed."""

import dataclasses

import numpy as np
import pytest
from runs import SmallRun

from harness import cli
from harness.contracts import AdgridError
from harness.maps import full_resolution
from harness.metrics import image_metrics
from harness.quantisation import quantise
from harness.rescore import join_predictions, rescore_run
from harness.run_folder import keep_plan, read_run
from harness.store import StoredPrediction

TWO_BACKBONES = """
name: toys
methods: [toy_features]
backbones: [toy_resnet, test_efficientnet.r160_in1k]
datasets: [{name: toy_squares, categories: [small, middle]}]
protocol: {image_size: 64}
"""


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def start(run, *arguments):
    """A finished run as its folder tells it."""
    plan = run.plan(*arguments)
    rows = run.run_plan(plan)
    keep_plan(run.store, plan, "test", [])
    return rows, read_run(run.store, plan.run_id)


def rescore(run, record, *overrides, ensemble=False):
    outcome = rescore_run(run.store, record, overrides, ensemble, run.places.cache_dir, "adgrid rescore")
    return outcome, read_run(run.store, outcome.run_id).rows


def no_model(monkeypatch):
    from adgrid_example.methods import FeatureMean

    for name in ("fit", "predict"):
        monkeypatch.setattr(FeatureMean, name, lambda self, batch: pytest.fail("a model was used"))


CHANGES = ["protocol.aupro_limit=0.05", "protocol.smoothing=3", "protocol.score_reduction=mean_pool_16"]


def test_a_rescored_row_is_that_of_a_run_under_the_protocol(run, tmp_path, places, monkeypatch):
    _, record = start(run)
    direct = SmallRun(tmp_path / "fresh", places)(overrides=CHANGES)  # fits, predicts and scores for itself
    no_model(monkeypatch)
    outcome, rows = rescore(run, record, *CHANGES)
    assert (outcome.num_scored, outcome.notes) == (3, ())
    for row in rows:
        other = direct[row.category]
        assert row.cell_id == other.cell_id
        assert row.metrics == other.metrics
        assert row.metric_bounds == other.metric_bounds
        assert row.metric_bounds.keys() == row.metrics.keys()
        assert row.resolved_protocol == other.resolved_protocol
        assert row.protocol_id == other.protocol_id
        assert (row.stamps, other.stamps) == (("random weights", "rescored"), ("random weights",))
        assert run.store.load_scores(row.cell_id)["image_score"] == pytest.approx(
            SmallRun(tmp_path / "fresh", places).store.load_scores(row.cell_id)["image_score"], abs=0
        )


def test_a_rescored_run_is_there_the_next_time(run):
    _, record = start(run)
    rescore(run, record, CHANGES[0])
    outcome, rows = rescore(run, record, CHANGES[0])
    assert (outcome.num_scored, len(rows)) == (0, 3)
    assert run(overrides=CHANGES[:1]) == {}


def test_removed_predictions_and_failed_cells_are_holes_with_a_reason(run, monkeypatch):
    rows, record = start(run)
    run.store.delete(f"predictions/{rows['small'].prediction_id}.arrow")
    failed = dataclasses.replace(rows["large"], status="failed", reason="ValueError: no", metrics={})
    record = dataclasses.replace(record, rows=(rows["small"], rows["middle"], failed))
    outcome, rows = rescore(run, record, CHANGES[0])
    assert outcome.num_scored == 1
    assert len(outcome.notes) == 2
    found = {row.category: (row.status, row.reason) for row in rows}
    assert found["middle"] == ("ok", "")
    assert found["large"] == ("skipped", "ValueError: no")
    assert found["small"][0] == "skipped"
    assert "not kept" in found["small"][1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("protocol.image_size=128", "stored predictions can be scored anew with other values of protocol.smoothing"),
        ("methods=padim", r"write protocol.FIELD=VALUE"),
        ("protocol.aupro_limit=2", r"--set protocol.aupro_limit=2: Input should be less than or equal to 1"),
        ("protocol.smoothing=[", r"'\[' is not a value"),
    ],
)
def test_what_cannot_be_changed_is_told(run, override, message):
    _, record = start(run, TWO_BACKBONES.replace(", test_efficientnet.r160_in1k", "").replace(", middle", ""))
    with pytest.raises(AdgridError, match=message):
        rescore(run, record, override)
    if override.startswith("methods"):
        with pytest.raises(AdgridError, match="nothing to join"):
            rescore(run, record, ensemble=True)


# --- ensembles ---


def prediction(maps, scores=None):
    maps = np.asarray(maps, np.float32)
    paths = tuple(f"{place}.png" for place in range(len(maps)))
    return StoredPrediction(paths=paths, maps=quantise(maps), image_scores=scores, facts={"costs": {}})


def test_an_ensemble_is_the_mean_of_maps_on_a_common_scale():
    generator = np.random.default_rng(0)
    one, other = generator.normal(5, 2, (6, 8, 8)), generator.normal(-300, 50, (6, 4, 4))
    joined = join_predictions([prediction(one), prediction(other)])

    def scaled(maps):
        middle = np.median(maps)
        return (maps - middle) / (1.4826 * np.median(np.abs(maps - middle)))

    small = scaled(other)  # the scale is that of the map as predicted
    expected = (scaled(one) + full_resolution(small.astype(np.float32), (8, 8), 0).numpy()) / 2
    np.testing.assert_allclose(joined.anomaly_maps, expected, atol=1e-4)
    error = joined.maps.error
    assert (np.abs(joined.anomaly_maps - expected) <= error.relative * (expected - error.offset) + 1e-5).all()
    assert error.relative > prediction(one).maps.error.relative
    assert joined.image_scores is None


def test_an_ensemble_does_not_depend_on_units_or_order():
    generator = np.random.default_rng(1)
    one, other = generator.normal(size=(2, 5, 6, 6))
    scores = generator.normal(size=(2, 5)).astype(np.float32)
    first = join_predictions([prediction(one, scores[0]), prediction(other, scores[1])])
    second = join_predictions([prediction(1000 * other - 7, 20 * scores[1] + 3), prediction(one, scores[0])])
    np.testing.assert_allclose(first.anomaly_maps, second.anomaly_maps, atol=1e-4)
    np.testing.assert_allclose(first.image_scores, second.image_scores, atol=1e-4)


def test_flat_maps_cannot_be_joined():
    with pytest.raises(AdgridError, match="flat"):
        join_predictions([prediction(np.ones((2, 4, 4))), prediction(np.random.default_rng(0).normal(size=(2, 4, 4)))])


def test_backbones_vote_together(run, monkeypatch):
    _, record = start(run, TWO_BACKBONES)
    no_model(monkeypatch)
    outcome, rows = rescore(run, record, ensemble=True)
    joined = {row.category: row for row in rows if row.backbone == "ensemble of 2"}
    assert sorted(joined) == ["middle", "small"]
    assert (len(rows), outcome.num_scored) == (6, 2)
    for category, row in joined.items():
        own = [other for other in rows if other.category == category and other is not row]
        assert "normalised by test images" in row.stamps
        assert any("toy_resnet, test_efficientnet.r160_in1k" in stamp for stamp in row.stamps)
        assert row.costs["fit_seconds"] == pytest.approx(sum(other.costs["fit_seconds"] for other in own))
        predicted = run.store.load_prediction(row.prediction_id)
        columns = run.store.load_scores(row.cell_id)
        maps = full_resolution(predicted.anomaly_maps, (64, 64), row.resolved_protocol["smoothing"])
        expected = image_metrics(maps.amax(dim=(1, 2)), np.array(columns["label"]))
        assert row.metrics["image_auroc"] == expected["image_auroc"]


def test_the_command_shows_and_keeps_the_new_run(run, capsys):
    _, record = start(run)
    places = ["--root", run.root, "--cache-dir", run.places.cache_dir]
    assert cli.main(["rescore", record.run_id, *places]) == 2
    assert "say what to change" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["rescore", record.run_id, "--set", CHANGES[0], *places]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "3 cells: 3 scored now from stored predictions, no model was used" in told
    assert "AUPRO up to FPR 0.05" in told
    (folder,) = {name for name in (run.store.local_path("runs")).iterdir() if name.name != record.run_id}
    assert (folder / "report" / "report.md").is_file()
