"""From predictions to metrics: whole objects by their views, and defects that a crop has cut away."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import SmallRun
from toy_rows import toy_row

from harness.contracts import EvaluationProtocol, Preprocessing, Sample
from harness.evaluate import count_labels, evaluate, sample_scores
from harness.maps import full_resolution, reduce_maps
from harness.metrics import METRICS, MetricError, image_metrics
from harness.quantisation import quantise
from harness.report import build_matrices, rows_frame
from harness.store import StoredPrediction
from harness.truth import Truth, load_truth

SIDE = 8
PROTOCOL = EvaluationProtocol(image_size=(SIDE, SIDE), resize=16, smoothing=0.0, score_reduction="max")
CROPPED_IS_NORMAL = dataclasses.replace(PROTOCOL, cropped_anomaly="normal")


def prediction(scores):
    """Maps that are flat at the scores."""
    maps = np.ones((len(scores), SIDE, SIDE), dtype=np.float32) * np.array(scores, dtype=np.float32)[:, None, None]
    return StoredPrediction(paths=(), maps=quantise(maps), image_scores=np.array(scores, dtype=np.float32), facts={})


def truth_of(num_pixels):
    """One region of so many pixels per image, in its upper left."""
    counts = np.array(num_pixels)
    pixels = np.concatenate([np.arange(count) for count in counts])
    return Truth((SIDE, SIDE), np.concatenate([[0], np.cumsum(counts)]), pixels, np.ones(len(pixels), np.int32))


# Three objects seen twice. By hand: bolt is normal with maximum 0.6, nut anomalous by its first view with maximum 0.9,
# cap anomalous by its second with maximum 0.5. Of the two pairs one is in order: 0.9 > 0.6, but 0.5 < 0.6.
SCORES = [0.6, 0.1, 0.2, 0.9, 0.5, 0.3]
LABELS = [0, 0, 1, 0, 0, 1]
OBJECTS = ["bolt", "bolt", "nut", "nut", "cap", "cap"]


def test_an_object_scores_by_its_highest_view_and_is_anomalous_by_any():
    metrics = evaluate(prediction(SCORES), LABELS, None, PROTOCOL, True, OBJECTS).metrics
    assert metrics["sample_auroc"] == 0.5
    assert metrics["image_auroc"] == 2 / 8
    assert list(metrics) == ["image_auroc", "image_ap", "image_f1_max", "sample_auroc"]


def test_objects_may_have_different_numbers_of_views_in_any_order():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=60).astype(np.float32), generator.integers(0, 2, 60) * (np.arange(60) > 30)
    objects = [f"part {number}" for number in generator.integers(0, 25, 60)]
    views = {name: [n for n in range(60) if objects[n] == name] for name in objects}
    best = {name: max(scores[n] for n in rows) for name, rows in views.items()}
    bad = {name for name, rows in views.items() if any(labels[n] for n in rows)}
    pairs = [(best[a], best[b]) for a in bad for b in views.keys() - bad]
    expected = sum((high > low) + (high == low) / 2 for high, low in pairs) / len(pairs)
    assert image_metrics(*sample_scores(scores, labels, objects))["image_auroc"] == pytest.approx(expected, abs=1e-12)


def test_negative_scores_keep_their_order():
    scores = np.array([-5, -4, -3, -2], dtype=np.float32)
    assert image_metrics(*sample_scores(scores, np.array([0, 0, 0, 1]), ["a", "a", "b", "b"]))["image_auroc"] == 1.0


def test_without_objects_of_several_views_there_is_no_such_metric():
    for objects in (None, ["a", "b", "c", "d", "e", "f"]):
        assert "sample_auroc" not in evaluate(prediction(SCORES), LABELS, None, PROTOCOL, True, objects).metrics


def test_where_every_object_has_a_defect_there_is_no_such_metric_but_all_others():
    metrics = evaluate(
        prediction(SCORES), LABELS, None, PROTOCOL, True, ["nut", "nut", "nut", "cap", "cap", "cap"]
    ).metrics
    assert "sample_auroc" not in metrics
    assert metrics["image_auroc"] == 2 / 8


def test_objects_are_scored_by_the_reduced_map_where_the_method_has_no_score():
    stored = dataclasses.replace(prediction([0.0] * 6), maps=prediction(SCORES).maps)
    smooth = dataclasses.replace(PROTOCOL, smoothing=2.0, score_reduction="max")
    result = evaluate(stored, LABELS, None, smooth, False, OBJECTS)
    reduced = reduce_maps(full_resolution(torch.from_numpy(stored.anomaly_maps), (SIDE, SIDE), 2.0), "max").numpy()
    np.testing.assert_array_equal(result.image_scores, reduced)
    assert result.metrics["sample_auroc"] == 0.5


def test_the_metric_stands_with_the_others_in_matrices_and_tables():
    assert METRICS["sample_auroc"].kind == "sample"
    row = dataclasses.replace(toy_row(0.9), metrics={"image_auroc": 0.9, "sample_auroc": 0.75, "aupro": 0.5})
    frame = rows_frame([row, toy_row(0.8, category="other")])
    assert frame["sample_auroc"].iloc[0] == 0.75
    matrices = {matrix.metric: matrix for matrix in build_matrices(frame)}
    assert list(matrices) == ["image_auroc", "sample_auroc", "aupro"]
    assert matrices["sample_auroc"].title == "Sample AUROC"


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (PROTOCOL, [0, 1, 1]),
        (CROPPED_IS_NORMAL, [0, 0, 1]),
        (dataclasses.replace(CROPPED_IS_NORMAL, resize=None), [0, 1, 1]),  # nothing is cropped
    ],
)
def test_an_anomaly_that_the_crop_cut_away_is_normal_where_the_protocol_says_so(protocol, expected):
    # The second image is anomalous and nothing of its mask is left.
    result = evaluate(prediction([0.1, 0.2, 0.9]), [0, 1, 1], truth_of([0, 0, 5]), protocol, True)
    assert result.label.tolist() == expected
    assert result.metrics["image_auroc"] == 1.0
    worst = evaluate(prediction([0.2, 0.1, 0.9]), [0, 1, 1], truth_of([0, 0, 5]), protocol, True)
    assert worst.metrics["image_auroc"] == (1.0 if expected[1] == 0 else 0.5)


def test_without_masks_nothing_is_known_to_be_cut_away():
    assert count_labels([0, 1], None, CROPPED_IS_NORMAL).tolist() == [0, 1]


def test_pixel_metrics_are_the_same_under_both_rules():
    truth, scores = truth_of([0, 0, 5]), [0.1, 0.2, 0.9]
    kept, cut = (evaluate(prediction(scores), [0, 1, 1], truth, p, True) for p in (PROTOCOL, CROPPED_IS_NORMAL))
    for name in ("pixel_auroc", "pixel_ap", "aupro"):
        assert kept.metrics[name] == cut.metrics[name]


def test_objects_follow_the_counted_labels():
    arguments = (prediction([0.1, 0.2, 0.9, 0.8]), [0, 1, 1, 0], truth_of([0, 0, 5, 0]))
    objects = ["a", "a", "b", "b"]
    assert "sample_auroc" not in evaluate(*arguments, PROTOCOL, True, objects).metrics
    assert evaluate(*arguments, CROPPED_IS_NORMAL, True, objects).metrics["sample_auroc"] == 1.0


def test_a_test_set_that_the_crop_made_normal_has_no_image_metrics():
    with pytest.raises(MetricError, match="no anomalous image"):
        evaluate(prediction([0.1, 0.2]), [0, 1], truth_of([0, 0]), CROPPED_IS_NORMAL, True)


@pytest.mark.parametrize(("at", "expected"), [(slice(0, 4), 0), (slice(14, 18), 1)])
def test_a_defect_at_the_border_of_a_wide_image_is_cut_away_and_one_in_its_middle_is_not(tmp_path, at, expected):
    mask = np.zeros((16, 32), dtype=np.uint8)
    mask[6:10, at] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask).save(tmp_path / "image.png")
    samples = [
        Sample(path=f"{tmp_path}/image.png", category="c", sample_id=name, split="test", label=label,
               defect_type="crack" if label else "good", mask_path=f"{tmp_path}/mask.png" if label else None)
        for name, label in (("good", 0), ("crack", 1))
    ]  # fmt: skip
    preprocessing = Preprocessing(image_size=(SIDE, SIDE), resize=16)
    truth = load_truth(samples, f"at {at}", preprocessing, str(tmp_path / "cache"))
    assert count_labels([0, 1], truth, CROPPED_IS_NORMAL).tolist() == [0, expected]
    assert count_labels([0, 1], truth, PROTOCOL).tolist() == [0, 1]


def make_real_iad(root):
    """One category of Real-IAD: two objects of three views to train on, four to test, two of them with a defect."""
    generator = np.random.default_rng(0)
    parts = {"train": [], "test": []}
    for number in range(1, 7):
        for view in range(1, 4):
            code = "HS" if number > 4 else None
            kind = "OK" if code is None else f"NG_{code}"
            name = f"mint_{number:04d}_{kind}_C{view}_20231021120000"
            path = f"{kind.replace('_', '/')}/S{number:04d}/{name}.jpg"
            pixels = generator.integers(90, 110, (64, 64), dtype=np.uint8)
            mask = np.zeros((64, 64), dtype=np.uint8)
            if code and view == 1:
                pixels[20:40, 20:40], mask[20:40, 20:40] = 255, 255
            image = root / "realiad_256" / "mint" / path
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(image, quality=95)
            if mask.any():
                Image.fromarray(mask).save(image.with_suffix(".png"))
            mask_path = path.replace(".jpg", ".png") if mask.any() else None
            entry = {"category": "mint", "anomaly_class": code or "OK", "image_path": path, "mask_path": mask_path}
            parts["train" if number <= 2 else "test"].append(entry)
    (root / "realiad_jsons").mkdir()
    meta = {"meta": {"prefix": "mint/", "normal_class": "OK"}}
    (root / "realiad_jsons" / "mint.json").write_text(json.dumps({**meta, **parts}))


def test_a_row_of_multi_view_data_has_the_metric(tmp_path, places):
    make_real_iad(tmp_path / "data" / "real_iad")
    space = """
    name: views
    methods: [toy_features]
    backbones: [toy_resnet]
    datasets: [real_iad]
    protocol: {image_size: 64}
    """
    row = SmallRun(tmp_path, places)(space)["mint"]
    assert row.status == "ok", row.reason
    assert row.metrics["sample_auroc"] == row.metrics["image_auroc"] == 1.0  # a bright square on noise is easy
    assert row.metrics["pixel_auroc"] > 0.9
