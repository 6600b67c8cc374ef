"""Features and images of splits: extraction, the store, and what survives damage, eviction and other processes."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from harness import feature_store, features, image_split
from harness.backbones import FrozenBackbone, resolve_backbone
from harness.contracts import AdgridError, Preprocessing, Sample, SampleKey
from harness.datasets.images import load_image
from harness.feature_store import DamagedShard, FeatureStore, StoreKey
from harness.features import (
    FLOAT16_LIMIT,
    ImageSplit,
    NonFiniteFeatures,
    feature_keys,
    feature_split,
    load_images,
    round_as_stored,
)

PREPROCESSING = Preprocessing(image_size=(64, 64))
LAYERS = ("layer1", "layer2")


@pytest.fixture(scope="module")
def resolved():
    return resolve_backbone("test_resnet", "random")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Seven training images of one category, with ground truth attached."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(7):
        pixels = rng.integers(0, 256, (8, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((60, 80)).save(folder / f"{number}.png")
    return [
        Sample(path=str(path), category="bolt", sample_id=path.stem, split="train", label=0, defect_type="good")
        for path in sorted(folder.iterdir())
    ]


@pytest.fixture(scope="module")
def hashes(samples):
    return {sample.path: hashlib.sha256(Path(sample.path).read_bytes()).hexdigest() for sample in samples}


class Encoder:
    """The frozen toy backbone; counts what it is asked, and may bend the features."""

    def __init__(self, resolved, size=(64, 64)):
        self.resolved, self.size = resolved, size
        self.built, self.images, self.bend = [], 0, lambda levels: levels

    def __call__(self, layers):
        self.built.append(layers)
        self.encoder = FrozenBackbone(self.resolved, layers, image_size=self.size)
        return self

    def encode(self, images):
        self.images += len(images)
        return self.bend(self.encoder.encode(images))


@pytest.fixture
def encoder(resolved):
    return Encoder(resolved)


@pytest.fixture
def make_split(tmp_path, samples, hashes, resolved, encoder):
    """Opens a split of the toy images in a store of this test."""

    def make(chosen=None, *, max_bytes=None, notes=None, cache=None, **changes):
        store = FeatureStore(str(cache or tmp_path / "cache"), max_bytes, None if notes is None else notes.append)
        options = {
            "dataset": "toys",
            "split": "train",
            "resolved": resolved,
            "layers": LAYERS,
            "preprocessing": PREPROCESSING,
            "store": store,
            "encoder_factory": encoder,
            "batch_size": 3,
            **changes,
        }
        return feature_split(samples if chosen is None else chosen, hashes, **options)

    return make


def shards(tmp_path, kind="features"):
    return sorted((tmp_path / "cache" / "features").glob(f"{kind}-*/*.arrow"))


def all_levels(split):
    return [torch.cat(level) for level in zip(*(batch.levels for batch in split), strict=True)]


def direct_levels(resolved, samples, layers=LAYERS):
    encoder = FrozenBackbone(resolved, layers, image_size=(64, 64))
    groups = [samples[start : start + 3] for start in range(0, len(samples), 3)]
    parts = [encoder.encode(load_images(group, PREPROCESSING)) for group in groups]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


# --- images --------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_loader(samples):
    images = load_images(samples, PREPROCESSING)
    assert images.dtype == torch.uint8
    expected = np.stack([load_image(sample.path, PREPROCESSING) for sample in samples])
    assert np.array_equal(images.numpy(), expected)


def test_an_image_split_gives_floats_in_order_without_ground_truth(samples):
    split = ImageSplit(samples, PREPROCESSING, batch_size=3)
    batches = list(split)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert all(type(sample) is SampleKey for batch in batches for sample in batch.samples)
    images = torch.cat([batch.images for batch in batches])
    torch.testing.assert_close(images, load_images(samples, PREPROCESSING).float() / 255)
    taken = split.take(torch.tensor([5, 0, 5]))
    assert torch.equal(taken.images, images[[5, 0, 5]])
    assert [sample.sample_id for sample in taken.samples] == ["5", "0", "5"]
    assert taken.levels is None
    with pytest.raises(IndexError):
        split.take([7])


@pytest.fixture
def count_decoding(monkeypatch):
    decoded = []

    def counting(path, preprocessing):
        decoded.append(path)
        return load_image(path, preprocessing)

    monkeypatch.setattr(image_split, "load_image", counting)
    return decoded


def test_images_are_decoded_once_per_size_for_all_that_read_them(samples, hashes, tmp_path, make_split, count_decoding):
    store = FeatureStore(str(tmp_path / "cache"))
    options = {"hashes": hashes, "dataset": "toys", "store": store}
    progress = []
    split = ImageSplit(samples, PREPROCESSING, batch_size=3, on_progress=lambda *done: progress.append(done), **options)
    assert split.num_decoded == len(count_decoding) == 7
    assert progress == [(3, 7), (6, 7), (7, 7)]
    again = ImageSplit(samples, PREPROCESSING, **options)
    for one, two in zip([split.take(range(7)), *split], [again.take(range(7)), *split], strict=True):
        assert torch.equal(one.images, two.images)
    make_split()
    assert len(count_decoding) == 7
    assert ImageSplit(samples, replace(PREPROCESSING, image_size=(32, 32)), **options).num_decoded == 7
    assert ImageSplit(samples, replace(PREPROCESSING, interpolation="nearest"), **options).num_decoded == 7


def test_without_room_images_are_decoded_at_every_use(samples, hashes, tmp_path, count_decoding):
    store = FeatureStore(str(tmp_path / "cache"), max_bytes=1000)
    split = ImageSplit(samples, PREPROCESSING, hashes=hashes, dataset="toys", store=store)
    assert split.num_decoded == 0
    list(split)
    split.take([0])
    assert len(count_decoding) == 8
    assert not shards(tmp_path, "images")


def test_an_unreadable_image_fails_the_split(samples, hashes, make_split, tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(samples[0].path).read_bytes()[:60])
    bad = [*samples[:4], replace(samples[4], path=str(broken))]
    with pytest.raises(AdgridError, match=r"broken\.png"):
        list(ImageSplit(bad, PREPROCESSING))
    monkeypatch.setitem(hashes, str(broken), "ab" * 32)
    with pytest.raises(AdgridError, match=r"broken\.png"):
        make_split(bad)
    assert make_split(samples[:3]).num_extracted == 0  # what was complete before is kept


# --- extraction ----------------------------------------------------------------------------------------------------


def test_stored_features_are_the_direct_ones_rounded_to_float16(make_split, resolved, samples):
    split = make_split()
    assert not split.streamed
    assert split.extract_seconds > 0
    for stored, direct in zip(all_levels(split), direct_levels(resolved, samples), strict=True):
        assert stored.dtype == torch.float32
        assert torch.equal(stored, round_as_stored(direct))
        torch.testing.assert_close(stored, direct, rtol=2**-11, atol=1e-7)
        assert not torch.equal(stored, direct)


def test_float32_is_kept_exactly_where_it_is_asked_for(make_split, resolved, samples):
    for stored, direct in zip(all_levels(make_split(dtype="float32")), direct_levels(resolved, samples), strict=True):
        assert torch.equal(stored, direct)


def test_a_split_gives_keys_in_order_and_any_rows(make_split, samples):
    split = make_split()
    assert len(split) == 7
    assert split.samples == tuple(sample.key for sample in samples)
    assert all(type(sample) is SampleKey for sample in split.samples)
    batches = list(split)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert batches[0].images is None
    taken = split.take(np.array([6, 1, 6]))
    assert [sample.sample_id for sample in taken.samples] == ["6", "1", "6"]
    for level, whole in zip(taken.levels, all_levels(split), strict=True):
        assert torch.equal(level, whole[[6, 1, 6]])
    with pytest.raises(IndexError):
        split.take([-1])


def test_levels_may_enter_a_computation_with_gradients(make_split):
    for max_bytes in (None, 1):
        (level, _) = make_split(max_bytes=max_bytes).take([0, 1]).levels
        weight = torch.ones(1, requires_grad=True)
        (level * weight).square().sum().backward()
        assert weight.grad > 0


def test_nothing_is_extracted_twice(make_split, encoder, count_decoding):
    first = make_split()
    assert (first.num_extracted, encoder.images, encoder.built) == (7, 7, [LAYERS])
    second = make_split()
    assert (second.num_extracted, encoder.images, encoder.built) == (0, 7, [LAYERS])
    assert second.extract_seconds == 0
    assert all(torch.equal(a, b) for a, b in zip(all_levels(first), all_levels(second), strict=True))
    assert len(count_decoding) == 7


def test_a_new_layer_is_extracted_alone(make_split, encoder, tmp_path, count_decoding, resolved, samples):
    make_split()
    before = {path: path.stat().st_ino for path in shards(tmp_path)}
    split = make_split(layers=("layer3", "layer1"))
    assert split.num_extracted == 7
    assert encoder.built == [LAYERS, ("layer3",)]
    assert len(count_decoding) == 7
    after = {path: path.stat().st_ino for path in shards(tmp_path)}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
    for stored, direct in zip(all_levels(split), direct_levels(resolved, samples, split.layers), strict=True):
        assert torch.equal(stored, round_as_stored(direct))


def test_a_new_image_adds_a_shard_and_nothing_else(make_split, encoder, tmp_path, samples):
    make_split(samples[:5])
    before = {path: path.read_bytes() for path in shards(tmp_path)}
    split = make_split(samples[3:])
    assert split.num_extracted == 2
    assert encoder.images == 7
    after = shards(tmp_path)
    assert len(after) == len(before) + 2
    assert all(path.read_bytes() == content for path, content in before.items())
    assert all(torch.equal(a, b[3:]) for a, b in zip(all_levels(split), all_levels(make_split()), strict=True))
    assert encoder.images == 7


def test_layers_of_other_cells_come_from_the_same_pass(make_split, encoder):
    make_split(layers=("layer1",), also_layers=("layer2", "layer1", "layer3"))
    assert encoder.built == [("layer1", "layer2", "layer3")]
    for layer in ("layer2", "layer3"):
        assert make_split(layers=(layer,)).num_extracted == 0
    assert make_split(layers=("layer1",), also_layers=("layer4",)).num_extracted == 0


def test_images_of_equal_content_are_extracted_once(make_split, samples, hashes, tmp_path, encoder):
    split = make_split([samples[0], samples[1], samples[0]])
    assert split.num_extracted == 2
    (level, _) = split.take([0, 2]).levels
    assert torch.equal(level[0], level[1])


def test_a_split_may_span_categories(make_split, samples, tmp_path, resolved):
    mixed = [replace(sample, category="nut" if i % 2 else "bolt") for i, sample in enumerate(samples)]
    split = make_split(mixed)
    assert split.num_extracted == 7
    for stored, direct in zip(all_levels(split), direct_levels(resolved, samples), strict=True):
        assert torch.equal(stored, round_as_stored(direct))
    folders = {path.parent for path in shards(tmp_path)}
    categories = [json.loads((folder / "key.json").read_text())["category"] for folder in folders]
    assert sorted(categories) == ["bolt", "bolt", "nut", "nut"]
    assert make_split([sample for sample in mixed if sample.category == "nut"]).num_extracted == 0


def test_progress_counts_the_images_to_extract(make_split, samples):
    progress = []
    make_split(samples[:2])
    make_split(on_progress=lambda *done: progress.append(done))
    assert progress == [(3, 5), (5, 5)]


def test_features_are_stored_under_everything_they_depend_on(resolved):
    base = {
        "dataset": "toys",
        "category": "bolt",
        "split": "train",
        "resolved": resolved,
        "layers": ("layer1",),
        "preprocessing": PREPROCESSING,
    }
    changes = [
        {},
        {"dataset": "other"},
        {"category": "nut"},
        {"split": "test"},
        {"layers": ("layer2",)},
        {"resolved": resolve_backbone("test_efficientnet", "random"), "layers": ("blocks.1",)},
        {"resolved": replace(resolved, mean=(0.4, 0.5, 0.6))},
        {"preprocessing": replace(PREPROCESSING, image_size=(64, 96))},
        {"preprocessing": replace(PREPROCESSING, resize=80)},
        {"preprocessing": replace(PREPROCESSING, interpolation="bicubic")},
        {"precision": "bfloat16"},
        {"dtype": "float32"},
    ]
    folders = [key.folder for change in changes for key in feature_keys(**{**base, **change}).values()]
    assert len(set(folders)) == len(changes)


# --- numbers float16 cannot hold -----------------------------------------------------------------------------------


def enlarge(image, factor=1e6):
    """Makes one image of the second batch exceed float16 in the first layer."""
    batches = []

    def bend(levels):
        batches.append(1)
        if len(batches) == 2:
            levels[0][image] *= factor
        return levels

    return bend


@pytest.mark.parametrize("max_bytes", [None, 1])
def test_an_image_beyond_float16_is_kept_in_float32_and_said(make_split, encoder, resolved, samples, max_bytes):
    notes = []
    encoder.bend = enlarge(1)
    split = make_split(notes=notes, max_bytes=max_bytes)
    level, _ = all_levels(split)
    direct, _ = direct_levels(resolved, samples)
    big = direct[4] * 1e6
    assert big.abs().max() > FLOAT16_LIMIT
    assert torch.equal(level[4], big)
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(level[others], round_as_stored(direct)[others])
    assert any("test_resnet layer1: some features exceed float16" in note for note in notes) == (max_bytes is None)
    if max_bytes is None:
        (again, _) = all_levels(make_split())
        assert torch.equal(again, level)
        assert torch.equal(split.take([4, 0]).levels[0], level[[4, 0]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_features_that_are_no_numbers_are_an_error_with_the_image(make_split, encoder, samples, value, max_bytes):
    encoder.bend = enlarge(2, value)
    with pytest.raises(NonFiniteFeatures, match=rf"test_resnet layer layer1 .* for image {samples[5].path}"):
        list(make_split(max_bytes=max_bytes))
    encoder.bend = lambda levels: levels
    assert all(level.isfinite().all() for level in all_levels(make_split()))


def test_rounding_to_float16_is_the_nearest_and_leaves_large_images():
    level = torch.tensor([[1.0 + 2**-12, 3.0], [7e4, 1.0 + 2**-12]]).view(2, 2, 1, 1)
    expected = torch.tensor([[1.0, 3.0], [7e4, 1.0 + 2**-12]]).view(2, 2, 1, 1)
    assert torch.equal(round_as_stored(level), expected)
    assert round_as_stored(level, "float32") is level


# --- a bounded store -----------------------------------------------------------------------------------------------


def test_features_that_do_not_fit_are_streamed_with_the_same_numbers(make_split, encoder, tmp_path):
    stored = all_levels(make_split())
    notes = []
    split = make_split(cache=tmp_path / "small", max_bytes=1000, notes=notes)
    assert split.streamed
    assert split.num_extracted == 0
    assert "do not fit into the cache" in notes[0]
    assert not list((tmp_path / "small").rglob("*.arrow"))
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(all_levels(split), stored, strict=True))
    assert split.num_extracted == 14
    taken = split.take([6, 2, 0, 1, 5])
    for level, whole in zip(taken.levels, stored, strict=True):
        torch.testing.assert_close(level, whole[[6, 2, 0, 1, 5]], rtol=2**-10, atol=1e-6)
    assert [sample.sample_id for sample in taken.samples] == ["6", "2", "0", "1", "5"]


def test_a_cpu_encodes_few_images_together_whatever_the_batch_size(make_split, encoder, tmp_path, monkeypatch):
    def encoded(**options):
        sizes.clear()
        levels = all_levels(make_split(**options))
        return list(sizes), levels

    sizes = []
    encoder.bend = lambda levels: (sizes.append(len(levels[0])), levels)[1]
    together, expected = encoded(cache=tmp_path / "whole batches")
    monkeypatch.setattr(features, "ENCODED_TOGETHER", 2 * 64 * 64 + 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    stored, levels = encoded()
    streamed, again = encoded(cache=tmp_path / "small", max_bytes=1000)
    assert (together, stored, streamed) == ([3, 3, 1], [2, 2, 2, 1], [2, 1, 2, 1, 1])
    for whole, part, anew in zip(expected, levels, again, strict=True):
        torch.testing.assert_close(part, whole, rtol=2**-10, atol=1e-6)
        torch.testing.assert_close(anew, whole, rtol=2**-10, atol=1e-6)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert encoded(cache=tmp_path / "eight threads")[0] == [3, 3, 1]


def test_streaming_keeps_decoded_images_where_they_fit(make_split, count_decoding, tmp_path):
    pixels = 7 * 3 * 64 * 64
    split = make_split(max_bytes=pixels + 5000, layers=("layer1",), also_layers=("layer2",))
    assert split.streamed
    for _ in range(2):
        all_levels(split)
    assert len(count_decoding) == 7
    assert shards(tmp_path, "images")
    assert not shards(tmp_path)


def test_room_for_the_own_layers_is_enough(make_split, encoder, resolved, tmp_path):
    row = feature_keys(
        dataset="toys", category="bolt", split="train", resolved=resolved, layers=LAYERS, preprocessing=PREPROCESSING
    )
    split = make_split(layers=("layer2",), also_layers=("layer1",), max_bytes=7 * row["layer2"].row_bytes + 100)
    assert not split.streamed
    assert encoder.built == [("layer2",)]
    assert not shards(tmp_path, "images")


def toy_key(name, rows=16):
    return StoreKey(
        kind="features", dataset="d", category=name, preprocessing=PREPROCESSING, dtype="float16", shape=(rows, 8)
    )


def digest(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def fill(store, key, numbers):
    with store.writer(key) as writer:
        rows = np.stack([np.full(key.shape, number, key.dtype) for number in numbers])
        writer.add([digest(number) for number in numbers], rows)


def test_the_longest_unused_file_set_goes_first(tmp_path):
    store = FeatureStore(str(tmp_path), max_bytes=45_000)
    for age, name in enumerate(("used", "old", "new")):
        fill(store, toy_key(name), range(40))
        for path in (tmp_path / "features" / toy_key(name).folder).iterdir():
            os.utime(path, (1000 + age, 1000 + age))
    store.open(toy_key("used"))  # reading counts as use, even when nobody holds it any more
    assert store.make_room(10_000)
    assert set(names_in(tmp_path)) == {"used", "new"}
    assert store.num_bytes() < 30_000


def names_in(tmp_path):
    return [json.loads(path.read_text())["category"] for path in (tmp_path / "features").glob("*/key.json")]


def test_what_is_in_use_is_never_evicted(tmp_path):
    store = FeatureStore(str(tmp_path), max_bytes=40_000)
    fill(store, toy_key("held"), range(40))
    fill(store, toy_key("idle"), range(40))
    rows = store.open(toy_key("held"))
    assert FeatureStore(str(tmp_path), max_bytes=40_000).make_room(20_000)
    assert names_in(tmp_path) == ["held"]
    assert not store.make_room(30_000)
    assert rows.row(digest(3))[0, 0] == 3
    with store.writer(toy_key("written")) as writer:
        writer.add([digest(1)], np.zeros((1, 16, 8), np.float16))
        del rows
        assert not store.make_room(39_900)
        assert store.make_room(30_000)
        assert names_in(tmp_path) == ["written"]


def test_nothing_is_evicted_in_vain(tmp_path):
    store = FeatureStore(str(tmp_path), max_bytes=40_000)
    fill(store, toy_key("idle"), range(10))
    assert not store.make_room(50_000)
    assert names_in(tmp_path) == ["idle"]


def test_a_cell_that_needs_room_pushes_out_older_ones(make_split, tmp_path, samples):
    make_split(dataset="old")
    size = FeatureStore(str(tmp_path / "cache")).num_bytes()
    split = make_split(dataset="new", max_bytes=int(1.5 * size))
    assert not split.streamed
    assert FeatureStore(str(tmp_path / "cache")).num_bytes() <= 1.5 * size
    assert make_split(dataset="old", max_bytes=3 * size).num_extracted == 7


# --- the files -----------------------------------------------------------------------------------------------------


def test_rows_are_views_of_the_mapped_file(tmp_path):
    store = FeatureStore(str(tmp_path))
    fill(store, toy_key("a"), range(5))
    rows = store.open(toy_key("a"))
    row = rows.row(digest(4))
    assert (row.shape, row.dtype) == ((16, 8), np.float16)
    assert not row.flags.owndata
    assert not row.flags.writeable
    assert (row == 4).all()
    assert digest(4) in rows
    assert digest(5) not in rows
    with pytest.raises(KeyError):
        rows.row(digest(5))


def test_shards_are_plain_arrow_files_that_describe_themselves(tmp_path):
    store = FeatureStore(str(tmp_path))
    fill(store, toy_key("a"), range(3))
    (path,) = tmp_path.rglob("*.arrow")
    table = pa.ipc.open_file(str(path)).read_all()
    assert table.column_names == ["hash", "checksum", "row"]
    assert [value.hex() for value in table["hash"].to_pylist()] == [digest(n) for n in range(3)]
    assert table["row"].type == pa.list_(pa.float16(), 128)
    assert not list(tmp_path.rglob("*.partial"))
    assert not list(tmp_path.rglob("lease-*"))


def test_long_writes_are_published_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "SHARD_BYTES", 600)
    store = FeatureStore(str(tmp_path))
    with store.writer(toy_key("a")) as writer:
        for number in range(5):
            writer.add([digest(number)], np.full((1, 16, 8), number, np.float16))
        assert len(list(tmp_path.rglob("*.arrow"))) == 1  # what a killed writer would leave
        rows = store.open(toy_key("a"))
        assert [digest(n) in rows for n in range(5)] == [True, True, True, False, False]
    rows = store.open(toy_key("a"))
    assert [int(rows.row(digest(n))[0, 0]) for n in range(5)] == list(range(5))


def test_the_first_row_of_an_image_counts(tmp_path):
    store = FeatureStore(str(tmp_path))
    fill(store, toy_key("a"), [1])
    with store.writer(toy_key("a")) as writer:
        writer.add([digest(1)], np.full((1, 16, 8), 9, np.float16))
    assert store.open(toy_key("a")).row(digest(1))[0, 0] == 1


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        middle = len(content) // 2
        content[middle] ^= 0x10
    elif how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    else:
        content = bytearray(os.urandom(len(content)))
    path.unlink()  # whoever has the old file mapped keeps it
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "random"])
def test_a_damaged_shard_is_made_again(make_split, encoder, tmp_path, how):
    expected = all_levels(make_split())
    damaged = shards(tmp_path)
    for path in damaged:
        damage(path, how)
    for path in shards(tmp_path, "images"):
        damage(path, how)
    notes = []
    split = make_split(notes=notes)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(all_levels(split), expected, strict=True))
    assert encoder.images == 14  # one more pass for both layers
    assert not split.streamed
    assert not any(path.exists() for path in damaged)
    assert any("lost" in note and "extracted again" in note for note in notes) == (how == "flipped")
    assert make_split().num_extracted == 0


def test_damage_met_by_one_split_does_not_stop_another(make_split, tmp_path, samples):
    expected = all_levels(make_split())
    for path in shards(tmp_path):
        damage(path, "flipped")
    one, two = make_split(), make_split(samples[::-1])
    assert all(torch.equal(a, b) for a, b in zip(all_levels(one), expected, strict=True))
    assert all(torch.equal(a, b.flip(0)) for a, b in zip(all_levels(two), expected, strict=True))


def test_a_row_of_another_shape_is_not_taken(tmp_path):
    store = FeatureStore(str(tmp_path))
    fill(store, toy_key("a", rows=8), [1])
    (path,) = tmp_path.rglob("*.arrow")
    other = tmp_path / "features" / toy_key("a").folder
    other.mkdir()
    path.rename(other / path.name)
    assert digest(1) not in store.open(toy_key("a"))


def test_a_checksum_that_is_wrong_removes_the_shard(tmp_path):
    store = FeatureStore(str(tmp_path))
    fill(store, toy_key("a"), range(3))
    (path,) = tmp_path.rglob("*.arrow")
    content = path.read_bytes()
    place = content.index(np.full(128, 2, np.float16).tobytes())
    path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
    rows = store.open(toy_key("a"))
    assert rows.row(digest(1))[0, 0] == 1
    with pytest.raises(DamagedShard):
        rows.row(digest(2))
    assert not path.exists()
    assert digest(1) not in rows


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_costs_time_but_no_numbers(make_split, tmp_path, monkeypatch, failing):
    expected = all_levels(make_split(cache=tmp_path / "good"))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    notes = []
    split = make_split(notes=notes)
    assert split.streamed
    assert any("No space left on device" in note for note in notes)
    assert all(torch.equal(a, b) for a, b in zip(all_levels(split), expected, strict=True))
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_cache_that_cannot_be_made_costs_time_but_no_numbers(make_split, tmp_path):
    (tmp_path / "file").touch()
    notes = []
    split = make_split(cache=tmp_path / "file" / "cache", notes=notes)
    assert split.streamed
    assert any("cannot write the cache" in note for note in notes)
    assert len(all_levels(split)[0]) == 7


# --- several processes ---------------------------------------------------------------------------------------------

WRITER = """
import hashlib, sys, time
import numpy as np
from harness.contracts import Preprocessing
from harness.feature_store import FeatureStore, StoreKey
key = StoreKey(kind="features", dataset="d", category="a", preprocessing=Preprocessing(image_size=(64, 64)),
               dtype="float16", shape=(16, 8))
start, stop, pause = map(int, sys.argv[2:])
with FeatureStore(sys.argv[1]).writer(key) as writer:
    print("writing", flush=True)
    if pause:
        sys.stdin.readline()
    for number in range(start, stop):
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        writer.add([digest], np.full((1, 16, 8), number, np.float16))
    if pause == 2:
        print("written", flush=True)
        sys.stdin.readline()
"""


def start_writer(tmp_path, start, stop, pause):
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(start), str(stop), str(pause)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def finish(process, line="go\n"):
    process.communicate(line)
    return process.returncode


def test_two_processes_may_write_the_same_rows_at_once(tmp_path):
    writers = [start_writer(tmp_path, 0, 20, 1), start_writer(tmp_path, 10, 30, 1)]
    assert [finish(writer) for writer in writers] == [0, 0]
    rows = FeatureStore(str(tmp_path)).open(toy_key("a"))
    assert [int(rows.row(digest(n))[0, 0]) for n in range(30)] == list(range(30))
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


def test_a_killed_writer_leaves_no_row_no_claim_and_no_harm(tmp_path):
    store = FeatureStore(str(tmp_path), max_bytes=10**6)
    assert not store.being_extracted(toy_key("a"))
    writer = start_writer(tmp_path, 0, 20, 2)
    assert store.being_extracted(toy_key("a"))
    writer.stdin.write("go\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "written\n"
    assert store.make_room(10**6 - 1) is False  # what somebody writes is not evicted
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert not store.being_extracted(toy_key("a"))
    (partial,) = tmp_path.rglob("*.partial")
    assert digest(0) not in store.open(toy_key("a"))
    fill(store, toy_key("a"), range(20))
    assert store.open(toy_key("a")).row(digest(7))[0, 0] == 7
    assert partial.exists()
    os.utime(partial, (time.time() - 7200,) * 2)
    store.num_bytes()
    assert not partial.exists()


def test_a_claim_ends_when_its_owner_is_done_or_silent(tmp_path, monkeypatch):
    store = FeatureStore(str(tmp_path))
    writer = start_writer(tmp_path, 0, 1, 1)
    (lease,) = tmp_path.rglob("lease-*")
    os.utime(lease, (time.time() - feature_store.LEASE_SECONDS - 1,) * 2)
    assert not store.being_extracted(toy_key("a"))
    os.utime(lease)
    assert store.being_extracted(toy_key("a"))
    assert finish(writer) == 0
    assert not store.being_extracted(toy_key("a"))
    with store.writer(toy_key("a")):
        assert not store.being_extracted(toy_key("a"))  # one's own claim does not count


def test_a_claim_on_another_host_counts_while_it_is_fresh(tmp_path):
    store = FeatureStore(str(tmp_path))
    folder = tmp_path / "features" / toy_key("a").folder
    folder.mkdir(parents=True)
    (folder / "lease-some-other-host-1").touch()
    assert store.being_extracted(toy_key("a"))


def test_rows_stay_readable_when_another_process_evicts_them(tmp_path):
    store = FeatureStore(str(tmp_path))
    fill(store, toy_key("a"), range(3))
    rows = store.open(toy_key("a"))
    code = (
        "import sys; from harness.feature_store import FeatureStore; "
        "print(FeatureStore(sys.argv[1], max_bytes=100).make_room(100))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
    assert not list(tmp_path.rglob("*.arrow"))
    assert rows.row(digest(2))[0, 0] == 2
    assert digest(2) in store.open(toy_key("a"))
    del rows
    assert digest(2) not in FeatureStore(str(tmp_path)).open(toy_key("a"))
    fill(store, toy_key("a"), range(3))
    assert store.open(toy_key("a")).row(digest(2))[0, 0] == 2
