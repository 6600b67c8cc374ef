import pytest
import torch
from small_splits import LevelSplit, normal_maps, painted, toy_context

from harness.contracts import Batch, SampleKey
from methods.feature_norm import Config, FeatureNorm


def predict(levels, **changes):
    method = FeatureNorm(Config(**changes), toy_context())
    samples = tuple(SampleKey(path=f"/{i}.png", category="toy", sample_id=str(i)) for i in range(len(levels[0])))
    return method.predict(Batch(samples=samples, levels=tuple(levels)))


@pytest.mark.parametrize(("form", "expected"), [("root", (1.0, 2.0)), ("pseudo_huber", (10**0.5 - 1, 65**0.5 - 1))])
def test_sizes_by_hand_are_averaged_over_levels(form, expected):
    first, second = torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 2, 2)
    first[:, 1] = -3.0  # sqrt(3 + 1) - 1 = 1
    second[:, 0] = 8.0  # sqrt(8 + 1) - 1 = 2
    prediction = predict([first, second], form=form)
    assert prediction.anomaly_map.shape == (1, 32, 32)
    torch.testing.assert_close(prediction.anomaly_map, torch.full((1, 32, 32), sum(expected) / 2))
    assert prediction.image_score is None


def test_corners_of_a_level_are_corners_of_the_map():
    level = torch.zeros(1, 1, 2, 2)
    level[0, 0] = torch.tensor([[0.0, 3.0], [8.0, 15.0]])  # sizes 0, 1, 2, 3
    found = predict([level]).anomaly_map[0]
    torch.testing.assert_close(found[[0, 0, -1, -1], [0, -1, 0, -1]], torch.tensor([0.0, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(found[0], torch.linspace(0, 1, 32))


def test_a_defect_of_larger_features_stands_out_without_fitting():
    levels = [0.1 * level for level in normal_maps(3, seed=0)]
    method = FeatureNorm(Config(), toy_context())
    method.fit(LevelSplit(levels))
    assert method.state_dict() == {}
    before, after = predict(levels).anomaly_map, predict(painted(levels)).anomaly_map
    assert (after.amax(dim=(1, 2)) > 2 * before.amax(dim=(1, 2))).all()
    row, column = divmod(int(after[0].argmax()), 32)
    assert 6 <= row <= 18
    assert 6 <= column <= 18


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form"):
        Config(form="square")
