"""Trained representations: planned, pretrained once, and read by methods in place of plain features."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SmallRun

import harness.pretraining
from harness import reference_source
from harness.auxiliary import JoinedSplit, LabelledImages, read_labelled
from harness.backbones import FrozenBackbone, resolve_backbone
from harness.contracts import AdgridError, DatasetRef, Preprocessing
from harness.datasets.fingerprint import draw_shots
from harness.datasets.images import load_mask
from harness.features import round_as_stored
from harness.image_split import ImageSplit, load_images
from harness.pretraining import run_pretraining
from harness.reference_source import choose_source
from harness.registry import build_dataset, representation_kinds
from harness.represented import load_representation_state
from methods.adpretrain import Config, Projector, export_checkpoint

PART = "{name: toy_squares, categories: [small]}"
TRAINED = f"""
name: trained
methods: [toy_features]
backbones: [{{name: toy_resnet, layers: [layer2]}}]
datasets: [{{name: toy_squares, categories: [middle, large]}}]
representations:
  - plain
  - name: scaled
    kind: toy_scaled
    data: [{PART}]
    reference: {{shots: 2}}
protocol: {{image_size: 64}}
"""
ADPRETRAIN = TRAINED.replace(
    "name: scaled\n    kind: toy_scaled",
    "name: adpretrain\n    layers: [layer1, layer2]\n"
    "    params: {epochs: 2, batch_size: 4, num_references: 8, reference_counts: [1, 2], learning_rate: 1.0e-3}",
).replace("[toy_features]", "[{name: feature_norm, layers: [layer2]}]")
SIZE = Preprocessing(image_size=(64, 64), resize=None, interpolation="bilinear")


@pytest.fixture
def run(tmp_path, places):
    return SmallRun(tmp_path, places)


def only(space):
    return space.replace("  - plain\n", "")


# --- the plan ----------------------------------------------------------------------------------------------------


def test_adpretrain_and_the_toy_of_a_package_are_known():
    assert {"adpretrain", "toy_scaled"} <= set(representation_kinds())


def test_a_plan_trains_each_representation_once_for_each_backbone(run):
    plan = run.plan(TRAINED.replace("[toy_features]", "[toy_features, {name: feature_norm, layers: [layer2]}]"))
    (pretraining,) = plan.pretrainings
    assert (pretraining.kind, pretraining.backbone, pretraining.num_images) == ("toy_scaled", "toy_resnet", 14)
    assert pretraining.num_references == 10  # six for training, four of the test images
    assert [(trial.method, trial.representation) for trial in plan.trials if trial.trained] == [
        ("toy_features", "scaled"),
        ("feature_norm", "scaled"),
    ]
    assert {trial.trained.artifact_id for trial in plan.trials if trial.trained} == {pretraining.trial_id}
    both = TRAINED.replace("layers: [layer2]}]", "layers: [layer2]}, {name: resnet18, layers: [layer2]}]", 1)
    assert len({one.trial_id for one in run.plan(both).pretrainings}) == 2


def test_plain_cells_keep_their_ids_beside_a_representation(run):
    alone = run.plan(TRAINED.split("representations:")[0] + "protocol: {image_size: 64}\n")
    assert set(alone.cell_ids) < set(run.plan(TRAINED).cell_ids)


def test_ids_follow_what_a_representation_is_and_not_what_it_is_called(run):
    def ids(space):
        plan = run.plan(only(space))
        return plan.pretrainings[0].trial_id, frozenset(plan.cell_ids)

    artifact, cells = ids(TRAINED)
    assert ids(TRAINED.replace("name: scaled", "name: other")) == (artifact, cells)
    other_references = ids(TRAINED.replace("shots: 2", "shots: 3"))
    assert other_references[0] == artifact
    assert other_references[1].isdisjoint(cells)
    for change in ("params: {epochs: 1}", "seed: 1", "pool: 2", "image_size: 32"):
        changed = ids(TRAINED.replace("kind: toy_scaled", f"kind: toy_scaled\n    {change}"))
        assert changed[0] != artifact
        assert changed[1].isdisjoint(cells)
    assert ids(TRAINED.replace("kind: toy_scaled", "kind: toy_scaled\n    reference_source: encode"))[0] == artifact


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("kind: toy_scaled", "kind: toy_scald"), ["unknown representation 'toy_scald'", "'toy_scaled'", "line 8"]),
        (("data: [", "data: [{name: nothing}, "), ["unknown dataset layout 'nothing'", "data[0]"]),
        (("    data:", "    params: {epoch: 1}\n    data:"), ["no parameter 'epoch'", "'epochs'"]),
        (("shots: 2", "shot: 2"), ["unknown key 'shot'", "'shots'"]),
        (("shots: 2", "mode: files"), ["needs the folder of the images as `path`"]),
        (("shots: 2", "shots: 2, path: x"), ["`mode: shots` draws its images and has no `path`"]),
        (("shots: 2", "mode: aligned, exclude_from_fit: true"), ["for drawn references"]),
        (("    data:", "    selection: heldout_categories\n    data:"), ["names the datasets it picks by"]),
        (("- plain", "- {name: plain, seed: 1}"), ["'plain' is the features as they are", "rename it"]),
        (("[toy_features]", "[{name: toy_features, representations: [skaled]}]"), ["no representation 'skaled'"]),
        (("categories: [small]}", "categories: [smal]}"), ["unknown category 'smal'", "'small'"]),
        (("[toy_features]", "[{name: toy_features, layers: [layer3]}]"), ["trained on the layers layer2", "'layer3'"]),
        (("[toy_features]", "[toy_tuned]"), ["changes the backbone itself", "representations: [plain]"]),
        (("    data:", "    checkpoint: x.pth\n    params: {epochs: 1}\n    data:"), ["is not trained"]),
    ],
)
def test_what_is_wrong_is_named(run, change, expected):
    text = TRAINED.replace(*change, 1)
    assert text != TRAINED
    with pytest.raises(AdgridError) as error:
        run.plan(text)
    for part in expected:
        assert part in str(error.value)


def test_a_method_reads_the_representations_it_names(run):
    text = TRAINED.replace(
        "[toy_features]",
        "[{name: toy_features, representations: [plain]}, {name: toy_encoder, representations: [scaled]}]",
    )
    assert [(trial.method, trial.representation) for trial in run.plan(text).trials] == [
        ("toy_features", "plain"),
        ("toy_encoder", "scaled"),
    ]


def test_missing_auxiliary_data_and_checkpoints_are_listed(run, tmp_path):
    text = only(TRAINED).replace(PART, "{name: mvtec_ad, categories: [bottle]}")
    assert [(item.kind, item.name) for item in run.plan(text).missing] == [("dataset", "mvtec_ad")]
    given = only(TRAINED).replace(f"data: [{PART}]", f"checkpoint: {tmp_path}/{{backbone}}.txt")
    assert [(item.kind, item.name) for item in run.plan(given).missing] == [
        ("checkpoint", f"{tmp_path}/toy_resnet.txt")
    ]


def test_anomalous_images_without_masks_are_refused(run, monkeypatch):
    dataset = build_dataset(DatasetRef(name="toy_squares", layout="toy_squares"), run.places)
    dataset.prepare()
    whole = dataset.category("small")
    bare = dataclasses.replace(whole.test[-1], mask_path=None)
    changed = dataclasses.replace(whole, test=(*whole.test[:-1], bare))
    monkeypatch.setattr(type(dataset), "category", lambda self, name: changed)
    with pytest.raises(AdgridError, match=r"needs masks of all anomalous images, and 1 have none, first .*13\.png"):
        read_labelled(dataset, "small", run.places.cache_dir)


# --- images and references -----------------------------------------------------------------------------------------


def labelled(run, name="small"):
    dataset = build_dataset(DatasetRef(name="toy_squares", layout="toy_squares"), run.places)
    dataset.prepare()
    return read_labelled(dataset, name, run.places.cache_dir)


def test_labelled_images_carry_labels_and_masks(run):
    one = labelled(run)
    images = LabelledImages(one.samples, ImageSplit(one.samples, SIZE, batch_size=5), SIZE)
    taken = images.take([13, 0, 11])
    assert taken.labels.tolist() == [1, 0, 1]
    for place, mask in zip([13, 0, 11], taken.masks, strict=True):
        assert np.array_equal(mask.numpy(), load_mask(one.samples[place], SIZE))
    batches = list(images)
    assert [len(batch) for batch in batches] == [5, 5, 4]
    assert torch.equal(torch.cat([batch.masks for batch in batches])[[13, 0, 11]], taken.masks)
    assert torch.equal(torch.cat([batch.images for batch in batches])[[13, 0, 11]], taken.images)


def test_joined_datasets_keep_order_and_tell_equal_categories_apart(run):
    parts = [("a", labelled(run)), ("b", labelled(run)), ("b", labelled(run, "large"))]
    joined = JoinedSplit([(name, ImageSplit(one.samples, SIZE)) for name, one in parts])
    assert [joined.samples[place].category for place in (0, 14, 28)] == ["a/small", "b/small", "b/large"]
    places = [30, 2, 15, 41, 2]
    batch = joined.take(places)
    expected = load_images([sample.key for _, one in parts for sample in one.samples], SIZE)[places]
    assert torch.equal(batch.images, expected.float() / 255)
    assert [sample.category for sample in batch.samples] == ["b/large", "a/small", "b/small", "b/large", "a/small"]
    assert [sample.category for part in joined for sample in part.samples] == [s.category for s in joined.samples]


def slow_features(run, samples, layers=("layer2",)):
    """Plain features as the store would give them, encoded here."""
    backbone = FrozenBackbone(
        resolve_backbone("toy_resnet", "random", run.places.cache_dir), layers, "cpu", image_size=(64, 64)
    )
    return [round_as_stored(level) for level in backbone.encode(load_images([s.key for s in samples], SIZE))]


def test_methods_read_features_changed_by_the_trained_state(run):
    plan = run.plan(only(TRAINED))
    rows = run.run_plan(plan, save_fitted=True)
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]
    assert {row.representation for row in rows.values()} == {"scaled"}
    assert all(len(row.curves["scaling"]) == 2 for row in rows.values())
    assert {row.provenance["representation_artifact"] for row in rows.values()} == {plan.pretrainings[0].trial_id}
    factor = run.store.load_state(plan.pretrainings[0].trial_id)["factor"]
    assert factor != 1
    dataset = build_dataset(DatasetRef(name="toy_squares", layout="toy_squares"), run.places)
    for cell in plan.trials[0].cells:
        category = dataset.category(cell.category)
        references = draw_shots("toy_squares", category, 2, 0)
        mean = slow_features(run, references)[0].mean(dim=(0, 2, 3)).view(1, -1, 1, 1)
        train, test = (
            round_as_stored((slow_features(run, samples)[0] - mean) * factor)
            for samples in (category.train, category.test)
        )
        expected = (test - train.mean(dim=0)).norm(dim=1)
        stored = run.store.load_prediction(cell.prediction_id).anomaly_maps
        assert stored == pytest.approx(expected.numpy(), rel=2e-3, abs=1e-4)


def test_methods_that_encode_images_get_changed_features_too(run):
    stored = run(only(TRAINED).replace("toy_features", "toy_encoder"))
    encoded = run(only(TRAINED).replace("[toy_features]", "[{name: toy_encoder, params: {flip: true}}]"))
    assert {row.status for row in (*stored.values(), *encoded.values())} == {"ok"}
    # The mirrored image is another one, but its level of scores is that of changed features, not of plain ones.
    plain = run(
        TRAINED.split("representations:")[0].replace("toy_features", "toy_encoder") + "protocol: {image_size: 64}\n"
    )
    assert {row.representation for row in plain.values()} == {"plain"}

    def level(row):
        return float(run.store.load_prediction(row.prediction_id).anomaly_maps.mean())

    for category, row in encoded.items():
        assert abs(np.log(level(row) / level(stored[category]))) < abs(
            np.log(level(plain[category]) / level(stored[category]))
        )


def test_changed_features_are_computed_once_and_equal_when_there_is_no_room(run, monkeypatch):
    space = only(TRAINED).replace("[toy_features]", "[toy_features, {name: toy_features, params: {scale: 2.0}}]")
    plan = run.plan(space)
    calls = []
    kind = type(load_representation_state_of(run, plan))
    apply = kind.apply
    monkeypatch.setattr(
        kind, "apply", lambda self, levels, reference: calls.append(len(levels[0])) or apply(self, levels, reference)
    )
    rows = run.run_plan(plan)
    assert sum(calls) == 2 * 14  # two categories, each image once, though two trials read them
    assert len(rows) == 2
    first = {
        cell.cell_id: run.store.load_rows([cell.cell_id])[cell.cell_id].metrics
        for trial in plan.trials
        for cell in trial.cells
    }
    other = SmallRun(Path(run.root).parent / "second", run.places)
    streamed = other.run_plan(plan, cache_gib=1e-6)
    assert {row.cell_id: row.metrics for row in streamed.values()}.items() <= first.items()


def load_representation_state_of(run, plan):
    settings = run.settings(plan)
    run_pretraining(plan.pretrainings[0], settings)
    trial = plan.trials[0]
    return load_representation_state(trial.trained, trial.layers, run.store)


def test_references_can_be_kept_out_of_the_fit(run):
    rows = run(only(TRAINED).replace("shots: 2", "shots: 2, exclude_from_fit: true"))
    assert {row.costs["train_images"] for row in rows.values()} == {4}
    assert {row.costs["train_images"] for row in run(only(TRAINED)).values()} == {6}
    failed = run(only(TRAINED).replace("shots: 2", "shots: 8, exclude_from_fit: true"))
    assert all("leaves no image to fit to" in row.reason for row in failed.values())


def test_given_files_are_the_references_and_count_by_content(run, tmp_path):
    drawn = run.plan(only(TRAINED))
    rows = run.run_plan(drawn)
    dataset = build_dataset(DatasetRef(name="toy_squares", layout="toy_squares"), run.places)
    for name in ("middle", "large"):
        for layout in ("one/toy_squares", "two"):
            folder = tmp_path / layout / name / "train" / "good"
            folder.mkdir(parents=True)
            for sample in draw_shots("toy_squares", dataset.category(name), 2, 0):
                shutil.copy(sample.path, folder)
    plans = [
        run.plan(only(TRAINED).replace("shots: 2", f"mode: files, path: {tmp_path}/{way}")) for way in ("one", "two")
    ]
    assert plans[0].cell_ids == plans[1].cell_ids != drawn.cell_ids
    given = run.run_plan(plans[0])
    assert {name: row.metrics for name, row in given.items()} == {name: row.metrics for name, row in rows.items()}
    shutil.copy(sample.path, tmp_path / "two" / "large" / "train" / "good" / "more.png")
    assert (
        run.plan(only(TRAINED).replace("shots: 2", f"mode: files, path: {tmp_path}/two")).cell_ids != plans[0].cell_ids
    )
    (missing,) = run.plan(only(TRAINED).replace("shots: 2", f"mode: files, path: {tmp_path}/three")).missing
    assert "no images of category" in missing.reason
    assert str(tmp_path / "three") in missing.reason


def test_aligned_references_are_the_training_images_most_like_each_image(run):
    plan = run.plan(only(TRAINED).replace("shots: 2", "mode: aligned, k: 2"))
    rows = run.run_plan(plan)
    assert {row.stamps for row in rows.values()} == {("random weights", "references like each test image")}
    factor = run.store.load_state(plan.pretrainings[0].trial_id)["factor"]
    dataset = build_dataset(DatasetRef(name="toy_squares", layout="toy_squares"), run.places)
    category = dataset.category("middle")
    train, test = (slow_features(run, samples)[0] for samples in (category.train, category.test))

    def change(level, others):
        likeness = torch.cosine_similarity(others.mean(dim=(2, 3)), level.mean(dim=(1, 2))[None])
        nearest = others[likeness.argsort(descending=True)[:2]]
        return (level - nearest.mean(dim=(0, 2, 3)).view(-1, 1, 1)) * factor

    changed_train = [change(level, train[[j for j in range(6) if j != i]]) for i, level in enumerate(train)]
    mean = round_as_stored(torch.stack(changed_train)).mean(dim=0)
    expected = (round_as_stored(torch.stack([change(level, train) for level in test])) - mean).norm(dim=1)
    cell = next(cell for cell in plan.trials[0].cells if cell.category == "middle")
    stored = run.store.load_prediction(cell.prediction_id).anomaly_maps
    assert stored == pytest.approx(expected.numpy(), rel=2e-3, abs=1e-4)


def toy_category(run, name):
    return build_dataset(DatasetRef(name="toy_squares", layout="toy_squares"), run.places).category(name)


def write_lists(folder, category, lists):
    """Lists as ADPretrain's authors give them: paths are those of another machine."""
    folder.mkdir(parents=True, exist_ok=True)

    def elsewhere(path):
        return f"/data/theirs/{category.name}/{path.rpartition(f'/{category.name}/')[2]}"

    content = {elsewhere(path): [elsewhere(one.path) for one in named] for path, named in lists.items()}
    (folder / f"{category.name}.json").write_text(json.dumps(content))


def test_given_lists_name_the_references_of_each_test_image(run, tmp_path):
    space = only(TRAINED).replace("[middle, large]", "[middle]")
    found = run.plan(space.replace("shots: 2", "mode: aligned, k: 2"))
    category = toy_category(run, "middle")
    order = {sample.path: [category.train[(place + step) % 6] for step in range(3)]
             for place, sample in enumerate(category.test)}  # fmt: skip
    for layout in ("one/toy_squares", "two"):
        write_lists(tmp_path / layout, category, order)
    plans = [
        run.plan(space.replace("shots: 2", f"mode: aligned, k: 2, path: {tmp_path}/{way}")) for way in ("one", "two")
    ]
    assert plans[0].cell_ids == plans[1].cell_ids != found.cell_ids
    (row,) = run.run_plan(plans[0]).values()
    assert row.stamps == ("random weights", "references like each test image, from given lists")
    stored = run.store.load_prediction(row.prediction_id).anomaly_maps
    factor = run.store.load_state(plans[0].pretrainings[0].trial_id)["factor"]
    train, test = (slow_features(run, samples)[0] for samples in (category.train, category.test))

    def change(level, places):
        return (level - train[places].mean(dim=(0, 2, 3)).view(-1, 1, 1)) * factor

    likeness = torch.cosine_similarity(train.mean(dim=(2, 3))[:, None], train.mean(dim=(2, 3))[None], dim=2)
    likeness.fill_diagonal_(-2)  # training images have no list and find those most like them
    mean = round_as_stored(torch.stack([change(level, likeness[i].topk(2).indices) for i, level in enumerate(train)]))
    changed = torch.stack([change(level, [place % 6, (place + 1) % 6]) for place, level in enumerate(test)])
    expected = (round_as_stored(changed) - mean.mean(dim=0)).norm(dim=1)
    assert stored == pytest.approx(expected.numpy(), rel=2e-3, abs=1e-4)
    # With few training images, lists still name all of them.
    few = f"shots: [2]\n{space}".replace("shots: 2}", f"mode: aligned, k: 2, path: {tmp_path}/two}}")
    (row,) = run(few).values()
    assert row.status == "ok", row.reason
    write_lists(tmp_path / "two", category, {path: named[::-1] for path, named in order.items()})
    assert run.plan(space.replace("shots: 2", f"mode: aligned, k: 2, path: {tmp_path}/two")).cell_ids != found.cell_ids


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda lists, test, train: None, ["no list of category 'middle' of dataset 'toy_squares'", "put it there"]),
        (lambda lists, test, train: lists.pop(test[3].path), ["no training images are listed for", "test"]),
        (lambda lists, test, train: lists.update({test[0].path: [test[1]]}), ["is no training image of"]),
        (lambda lists, test, train: "[1", ["cannot be read as JSON"]),
        (lambda lists, test, train: "[1]", ["is no list of references"]),
    ],
)
def test_lists_that_do_not_fit_are_named_by_the_plan(run, tmp_path, change, expected):
    category = toy_category(run, "middle")
    lists = {sample.path: list(category.train[:2]) for sample in category.test}
    text = change(lists, category.test, category.train)
    if expected[0].startswith("no list"):
        tmp_path.joinpath("lists").mkdir()
    else:
        write_lists(tmp_path / "lists", category, lists)
    if isinstance(text, str):
        (tmp_path / "lists" / "middle.json").write_text(text)
    space = only(TRAINED).replace("[middle, large]", "[middle]")
    (missing,) = run.plan(space.replace("shots: 2", f"mode: aligned, path: {tmp_path}/lists")).missing
    for part in expected:
        assert part in missing.reason


# --- the pretraining -----------------------------------------------------------------------------------------------


def test_a_given_checkpoint_is_not_trained_and_counts_by_content(run, tmp_path):
    given = only(TRAINED).replace(f"data: [{PART}]", f"checkpoint: {tmp_path}/{{backbone}}.txt")
    (tmp_path / "toy_resnet.txt").write_text("2.0")
    plan = run.plan(given)
    assert plan.pretrainings == ()
    rows = run.run_plan(plan)
    assert {row.status for row in rows.values()} == {"ok"}
    (tmp_path / "toy_resnet.txt").write_text("2.5")
    assert set(run.plan(given).cell_ids).isdisjoint(plan.cell_ids)


def test_adpretrain_loads_a_projector_of_the_official_layout(run, tmp_path):
    file = tmp_path / "projector.pth"
    head, tail = only(ADPRETRAIN).split("    params: {epochs")
    space = head + tail.split("\n", 1)[1].replace(f"data: [{PART}]", f"checkpoint: {file}")
    widths = [level.shape[1] for level in slow_features(run, labelled(run).samples[:1], ("layer1", "layer2"))]
    export_checkpoint(Projector(widths, num_references=8), file)
    rows = run(space)
    assert {row.status for row in rows.values()} == {"ok"}, [row.reason for row in rows.values()]


def test_adpretrain_trains_end_to_end_and_marks_anomalies_by_size(run):
    space = ADPRETRAIN.replace("epochs: 2", "epochs: 12").replace("learning_rate: 1.0e-3", "learning_rate: 3.0e-3")
    plan = run.plan(space)
    run.run_plan(plan)
    rows = run.store.load_rows(plan.cell_ids).values()
    aurocs = {
        kind: np.mean([r.metrics["pixel_auroc"] for r in rows if r.representation == kind])
        for kind in ("plain", "adpretrain")
    }
    assert aurocs["adpretrain"] > 0.95, aurocs


def test_references_from_the_store_and_from_the_backbone_train_the_same_state(run, tmp_path):
    states = []
    for source in ("store", "encode"):
        one = SmallRun(tmp_path / source, dataclasses.replace(run.places, cache_dir=str(tmp_path / source / "cache")))
        plan = one.plan(only(ADPRETRAIN).replace("    data:", f"    reference_source: {source}\n    data:"))
        run_pretraining(plan.pretrainings[0], one.settings(plan), lambda *note, one=one: one.notes.append(note))
        assert any(f"references: {source}" in note[1] for note in one.notes)
        states.append(one.store.load_state(plan.pretrainings[0].trial_id))
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_source_is_chosen_by_room_and_measured_speed(run, monkeypatch):
    pretraining = run.plan(TRAINED).pretrainings[0]
    backbone = resolve_backbone("toy_resnet", "random", run.places.cache_dir)

    def choose(cache_gib=1.0, **changes):
        return choose_source(
            dataclasses.replace(pretraining, **changes), backbone, run.places.cache_dir, cache_gib, torch.device("cpu")
        )

    assert reference_source.measure_storage(run.places.cache_dir) > 0
    assert reference_source.measure_encoding(pretraining, backbone, torch.device("cpu")) > 0
    monkeypatch.setattr(reference_source, "measure_encoding", lambda *_: 100.0)
    monkeypatch.setattr(reference_source, "measure_storage", lambda *_: 1e9)
    assert choose().source == "store"
    monkeypatch.setattr(reference_source, "measure_storage", lambda *_: 1.0)
    assert choose().source == "encode"
    assert "more than the cache's bound" in choose(cache_gib=1e-9).reason
    assert choose(reference_source="store").source == "store"
    pooled = run.plan(TRAINED.replace("kind: toy_scaled", "kind: toy_scaled\n    pool: 2")).pretrainings[0]
    assert pooled.num_references == 2  # of ten in one category, which has one view
    monkeypatch.setattr(reference_source, "measure_storage", lambda *_: 1e9)
    assert choose(pool=2, num_references=2).source == "encode"
    assert choose(pool=2, num_references=2).reason.startswith("references: a pool of 2, each encoded once")


def test_a_pretraining_that_fails_says_why_and_is_tried_again_by_the_next_start(run):
    plan = run.plan(only(TRAINED).replace("kind: toy_scaled", "kind: toy_scaled\n    params: {trouble: raise}"))
    settings = run.settings(plan)
    run_pretraining(plan.pretrainings[0], settings)
    assert run.store.load_failure(plan.pretrainings[0].trial_id) == (
        settings.invocation,
        "ValueError: the pretraining has a problem",
    )
    assert harness.pretraining.find_settled(plan.pretrainings[0], run.store, settings)
    assert not harness.pretraining.find_settled(plan.pretrainings[0], run.store, run.settings(plan))
    rows = run.run_plan(plan)
    assert all("run the whole space, which trains it first" in row.reason for row in rows.values())


def test_changed_images_are_not_trained_on_unseen(run):
    plan = run.plan(only(TRAINED))
    path = labelled(run).samples[0].path
    with open(path, "ab") as file:
        file.write(b"changed")
    settings = run.settings(plan)
    run_pretraining(plan.pretrainings[0], settings)
    assert "not those that were planned" in run.store.load_failure(plan.pretrainings[0].trial_id)[1]


# --- honesty -------------------------------------------------------------------------------------------------------

SELECTED = (
    only(ADPRETRAIN)
    .replace(
        "    data:",
        "    selection: heldout_categories\n    select_on: [{name: toy_squares, categories: [large]}]\n    data:",
    )
    .replace("[middle, large]", "[middle]")
)


def test_rows_say_that_a_representation_has_seen_their_test_images(run):
    rows = run(only(TRAINED).replace("categories: [small]", "categories: [small, middle]"))
    stamp = "representation trained on test images"
    assert all(stamp in row.stamps for row in rows.values())
    assert not any(stamp in row.stamps for row in run(only(TRAINED)).values())


def test_a_state_is_picked_on_categories_that_are_neither_trained_on_nor_reported(run):
    with pytest.raises(AdgridError, match=r"'large' of 'toy_squares', which the space reports on.*test_best"):
        run.plan(SELECTED.replace("[middle]", "[middle, large]"))
    with pytest.raises(AdgridError, match="'large' of 'toy_squares' is trained on and in `select_on`"):
        run.plan(SELECTED.replace("categories: [small]", "categories: [small, large]"))
    assert run.plan(SELECTED).pretrainings[0].trial_id != run.plan(only(ADPRETRAIN)).pretrainings[0].trial_id


def test_the_best_epoch_is_the_one_that_the_detector_then_scores(run, monkeypatch):
    judged = []
    evaluate = harness.pretraining.evaluate

    def spy(*arguments, **named):
        result = evaluate(*arguments, **named)
        judged.append(result.metrics["image_auroc"])
        return result

    monkeypatch.setattr(harness.pretraining, "evaluate", spy)
    space = (
        SELECTED.replace("heldout_categories", "test_best")
        .replace("[middle]", "[large]")
        .replace("epochs: 2", "epochs: 4")
        .replace("[{name: feature_norm, layers: [layer2]}]", "[{name: feature_norm, layers: [layer1, layer2]}]")
    )
    space = space.replace("layers: [layer2]}]", "layers: [layer1, layer2]}]")
    rows = run(space)
    assert len(judged) == 4
    assert rows["large"].metrics["image_auroc"] == pytest.approx(max(judged), abs=1e-9)
    assert "representation picked on test data" in rows["large"].stamps


def test_config_of_adpretrain_is_that_of_the_paper():
    assert Config() == Config(num_references=2048, features="residual", angle_weight=1.0, norm_weight=1.0, epochs=10)
    with pytest.raises(ValueError, match="nothing to learn"):
        Config(angle_weight=0.0, norm_weight=0.0)
