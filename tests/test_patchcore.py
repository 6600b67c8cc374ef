import pytest
import torch
from reference.coreset import plain_coreset
from reference.patches import averaged_patches, official_patches
from small_splits import LevelSplit, normal_maps, painted, toy_context

from methods.components import memory_bank
from methods.components.coreset import CoresetCache
from methods.patchcore import Config, PatchCore


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    cache = CoresetCache()
    monkeypatch.setattr(memory_bank, "CORESETS", cache)
    return cache


def fitted(config=None, seed=0, num=6):
    method = PatchCore(config or Config(), toy_context(seed=seed))
    method.fit(LevelSplit(normal_maps(num, seed=1)))
    return method


def all_of(levels):
    return LevelSplit(levels).take(range(len(levels[0])))


CONFIGS = [
    Config(),
    Config(aggregation="official"),
    Config(aggregation="concat", distance="euclidean"),
    Config(num_neighbours=3, patch_size=5, coreset_ratio=0.5),
    Config(reweighting=True, projection=None, coreset_ratio=0.5),
    Config(projection=4, embed_width=20, target_width=20, num_starting_points=1),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_painted_defect_scores_highest_where_it_is(config):
    method, normal = fitted(config), normal_maps(4, seed=2)
    without, within = method.predict(all_of(normal)), method.predict(all_of(painted(normal)))
    assert within.anomaly_map.shape == (4, 8, 8)
    assert (within.image_score > without.image_score).all()
    row, column = divmod(int(within.anomaly_map.mean(dim=0).argmax()), 8)
    assert 1 <= row <= 4
    assert 1 <= column <= 4


@pytest.mark.parametrize("config", CONFIGS)
def test_training_images_score_zero_against_a_full_memory_bank(config):
    settings = {**vars(config), "coreset_ratio": 1.0, "num_neighbours": 1}
    prediction = fitted(Config(**settings)).predict(all_of(normal_maps(6, seed=1)))
    assert prediction.anomaly_map.max() < 1e-4
    assert prediction.image_score.max() < 1e-4


@pytest.mark.parametrize("config", CONFIGS)
def test_prediction_of_an_image_does_not_depend_on_its_batch(config):
    method, test = fitted(config), LevelSplit(painted(normal_maps(5, seed=2)))
    together = method.predict(test.take(range(5)))
    alone = [method.predict(test.take([i])) for i in range(5)]
    torch.testing.assert_close(together.anomaly_map, torch.cat([p.anomaly_map for p in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.image_score, torch.cat([p.image_score for p in alone]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_state_restores_the_predictions(config):
    method, test = fitted(config), all_of(normal_maps(2, seed=2))
    restored = PatchCore(config, toy_context(seed=7))
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.predict(test).anomaly_map, method.predict(test).anomaly_map)
    assert torch.equal(restored.predict(test).image_score, method.predict(test).image_score)


def test_official_form_equals_its_steps_one_by_one():
    config = Config(coreset_ratio=0.2, projection=None, embed_width=40, target_width=40, num_neighbours=2)
    context, train, test = toy_context(), normal_maps(5, seed=1), normal_maps(2, seed=2)
    patches = official_patches(train, 3, 40, 40).reshape(-1, 40)
    starts = torch.randperm(320, generator=context.generator("coreset"))[:10]
    bank = patches[plain_coreset(patches, 64, start=starts)]
    squared = torch.cdist(official_patches(test, 3, 40, 40).reshape(-1, 40).double(), bank.double()).square()
    expected = squared.topk(2, largest=False).values.mean(dim=1).reshape(2, 8, 8)

    method = PatchCore(config, context)
    method.fit(LevelSplit(train))
    prediction = method.predict(all_of(test))
    torch.testing.assert_close(method.state_dict()["memory_bank"], bank, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prediction.anomaly_map.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prediction.image_score.double(), expected.amax(dim=(1, 2)), rtol=1e-4, atol=1e-5)


def test_narrow_levels_are_averaged_and_wide_ones_pooled():
    def embedding_width(config, widths):
        return PatchCore(config, toy_context(shapes=[(width, 4, 4) for width in widths])).bank.embedding.width

    assert embedding_width(Config(), (40, 114)) == 154  # 40 * 9 numbers would be stretched to 1024
    assert embedding_width(Config(), (114, 128)) == 1024
    assert embedding_width(Config(embed_width=64, target_width=48), (8, 8)) == 48
    assert embedding_width(Config(aggregation="concat"), (114, 128)) == 242


def test_reweighting_equals_equation_7_written_out():
    config = Config(aggregation="concat", distance="euclidean", reweighting=True, num_reweighting_neighbours=3)
    method, test = fitted(config), normal_maps(3, seed=2)
    bank = method.state_dict()["memory_bank"]
    scores = method.predict(all_of(test)).image_score
    for image, score in enumerate(scores):
        queries = averaged_patches([level[image : image + 1] for level in test], 3).reshape(-1, 16)
        distances = torch.cdist(queries, bank, compute_mode="donot_use_mm_for_euclid_dist")
        worst = distances.amin(dim=1).argmax()
        entry = distances[worst].argmin()
        crowd = (bank - bank[entry]).norm(dim=1).argsort()[:3]
        exponents = distances[worst][crowd].exp()
        weight = 1 - exponents[crowd == entry] / exponents.sum()
        torch.testing.assert_close(score, (weight * distances[worst, entry])[0], rtol=1e-4, atol=1e-5)


def test_reweighting_copes_with_equal_entries():
    method = PatchCore(Config(reweighting=True, aggregation="concat"), toy_context())
    row = torch.arange(16.0)
    method.load_state_dict({"memory_bank": torch.stack([row, row, row + 1, row])})
    weight = memory_bank.rarity(method.bank.index, row[None] + 0.5, torch.tensor([3]), 9)
    distances = torch.tensor([2.0, 2.0, 2.0, 2.0])  # half a unit in 16 dimensions, to every entry
    torch.testing.assert_close(weight, 1 - distances.softmax(0)[:1])


def test_squared_scores_are_squares_of_plain_ones():
    test = all_of(normal_maps(2, seed=2))
    squared, plain = (fitted(Config(distance=d)).predict(test) for d in ("squared", "euclidean"))
    torch.testing.assert_close(squared.anomaly_map, plain.anomaly_map.square())


def test_a_smaller_ratio_of_the_same_seed_is_a_prefix_and_costs_nothing(own_cache):
    large, small = (fitted(Config(coreset_ratio=ratio)).state_dict()["memory_bank"] for ratio in (0.25, 0.1))
    assert len(large) == 96  # of 6 * 64
    assert torch.equal(small, large[:38])
    fitted(Config(coreset_ratio=0.25, num_neighbours=5, distance="euclidean"))
    assert own_cache.num_chosen == 96
    other = fitted(Config(coreset_ratio=0.1), seed=1).state_dict()["memory_bank"]
    assert own_cache.num_chosen == 96 + 38
    assert not torch.equal(other, small)


def test_at_least_one_patch_is_kept():
    assert len(fitted(Config(coreset_ratio=1e-6)).state_dict()["memory_bank"]) == 1


def test_predicting_before_fitting_is_an_error():
    with pytest.raises(RuntimeError, match="fit the method"):
        PatchCore(Config(), toy_context()).predict(all_of(normal_maps(1, seed=2)))


@pytest.mark.parametrize(
    "settings",
    [
        {"coreset_ratio": 0.0},
        {"coreset_ratio": 1.5},
        {"projection": 0},
        {"num_starting_points": 0},
        {"aggregation": "sum"},
        {"patch_size": 2},
        {"embed_width": 0},
        {"num_neighbours": 0},
        {"distance": "cosine"},
        {"num_reweighting_neighbours": 1},
    ],
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)
