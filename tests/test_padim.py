import pytest
import torch
import torch.nn.functional as F
from small_splits import SHAPES, LevelSplit, normal_maps, painted, toy_context

from methods.padim import Config, Padim, count_channels


def fitted(config=None, num=30, context=None):
    method = Padim(config or Config(), context or toy_context())
    method.fit(LevelSplit(normal_maps(num, seed=1)))
    return method


def all_of(levels):
    return LevelSplit(levels).take(range(len(levels[0])))


CONFIGS = [
    Config(),
    Config(num_channels=5),
    Config(num_channels="all"),
    Config(num_channels="all", combine="per_level"),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num", [3, 30])
def test_a_painted_defect_scores_highest_where_it_is(config, num):
    method = fitted(config, num)
    normal = normal_maps(4, seed=2)
    without = method.predict(all_of(normal)).anomaly_map
    within = method.predict(all_of(painted(normal))).anomaly_map
    size = (8, 8) if config.combine == "concat" else (32, 32)
    assert within.shape == (4, *size)
    assert within.dtype == torch.float32
    assert (within.amax(dim=(1, 2)) > 2 * without.amax(dim=(1, 2))).all()
    row, column = divmod(int(within.mean(dim=0).argmax()), size[1])
    assert size[0] // 4 <= row < size[0] // 2
    assert size[1] // 4 <= column < size[1] // 2


@pytest.mark.parametrize("config", CONFIGS)
def test_prediction_of_an_image_does_not_depend_on_its_batch(config):
    method, test = fitted(config), LevelSplit(painted(normal_maps(5, seed=2)))
    together = method.predict(test.take(range(5))).anomaly_map
    alone = torch.cat([method.predict(test.take([i])).anomaly_map for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num", [3, 30])
def test_state_restores_the_predictions(config, num):
    method, test = fitted(config, num), all_of(normal_maps(2, seed=2))
    state = method.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    restored = Padim(config, toy_context(seed=7))  # other draws: the channels come from the state
    restored.load_state_dict(state)
    assert torch.equal(restored.predict(test).anomaly_map, method.predict(test).anomaly_map)


def test_per_level_is_the_mean_of_the_levels_resized_to_the_image():
    config = Config(num_channels="all", combine="per_level")
    train, test = normal_maps(30, seed=1), normal_maps(2, seed=2)
    maps = []
    for level, shape in enumerate(SHAPES):
        single = Padim(Config(num_channels="all"), toy_context(shapes=[shape]))
        single.fit(LevelSplit([train[level]]))
        one = single.predict(all_of([test[level]])).anomaly_map
        maps.append(F.interpolate(one[:, None], size=(32, 32), mode="bilinear", align_corners=True)[:, 0])
    found = fitted(config).predict(all_of(test)).anomaly_map
    torch.testing.assert_close(found, (maps[0] + maps[1]) / 2)


def test_per_level_leaves_out_a_level_without_channels():
    method = fitted(Config(num_channels=1, combine="per_level"))
    assert sorted(len(some) for some in method.channels) == [0, 1]
    assert method.predict(all_of(normal_maps(1, seed=2))).anomaly_map.shape == (1, 32, 32)


def test_fewer_channels_are_some_of_more_and_depend_on_the_seed():
    def chosen(num, seed=0):
        first, second = Padim(Config(num_channels=num), toy_context(seed=seed)).channels
        return set(first.tolist()) | {6 + channel for channel in second.tolist()}

    assert chosen(4) < chosen(9) < chosen(16) == set(range(16))
    assert chosen(8) != chosen(8, seed=1)


@pytest.mark.parametrize(
    ("available", "expected"), [(448, 100), (1792, 550), (1120, 325), (176, 100), (60, 60), (4096, 550)]
)
def test_number_of_channels_follows_the_paper(available, expected):
    assert count_channels(Config(), available) == expected


@pytest.mark.parametrize(
    "settings",
    [{"num_channels": 0}, {"num_channels": "some"}, {"epsilon": 0.0}, {"combine": "sum"}],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


def test_more_channels_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="the levels have 16 channels"):
        Padim(Config(num_channels=17), toy_context())


def test_an_incomplete_split_is_noticed():
    class Short(LevelSplit):
        def __iter__(self):
            yield self.take([0])

    with pytest.raises(ValueError, match="holds 5 images but gave 1"):
        Padim(Config(), toy_context()).fit(Short(normal_maps(5, seed=1)))
