import pytest

from harness.contracts import AdgridError
from harness.space import grid_points, load_space, parse_space

SPACE = """
name: small
methods:
  - padim
  - {name: patchcore, params: {coreset_ratio: [0.01, 0.1]}}
backbones: [tf_efficientnet_lite0, tf_efficientnet_lite1]
datasets:
  - generated
  - {name: elpv, shots: 4}
seeds: [0, 1]
"""


def test_a_list_is_a_grid_axis():
    points = grid_points(parse_space(SPACE))
    # (padim + 2 ratios) x 2 backbones x 2 datasets x 2 seeds
    assert len(points) == 3 * 2 * 2 * 2
    assert {point.params.get("coreset_ratio") for point in points} == {None, 0.01, 0.1}
    assert {(point.dataset.name, point.shots) for point in points} == {("generated", None), ("elpv", 4)}


def test_exclude_removes_what_matches_all_of_a_rule():
    text = SPACE + "exclude:\n  - {method: padim, backbone: [tf_efficientnet_lite1]}\n  - {params.coreset_ratio: 0.1}\n"
    points = grid_points(parse_space(text))
    assert len(points) == (2 * 2 * 2) * 2 - 2 * 2
    assert not [p for p in points if p.method.name == "padim" and p.backbone.name == "tf_efficientnet_lite1"]
    assert {p.params.get("coreset_ratio") for p in points} == {None, 0.01}


def test_exclude_knows_the_defaults_of_parameters():
    text = SPACE.replace("{coreset_ratio: [0.01, 0.1]}", "{num_neighbours: [1, 3]}")
    assert {p.method.name for p in grid_points(parse_space(text + "exclude: [{params.coreset_ratio: 0.1}]\n"))} == {
        "padim"
    }


def test_include_adds_a_grid_and_no_doubles():
    text = SPACE + "include:\n  - {methods: [padim], seeds: [0, 7], datasets: [generated]}\n"
    points = grid_points(parse_space(text))
    extra = [p for p in points if p.seed == 7]
    assert len(points) == 24 + 2
    assert {p.backbone.name for p in extra} == {"tf_efficientnet_lite0", "tf_efficientnet_lite1"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("name: small", "nam: small"), ["unknown key 'nam'", "did you mean 'name'", "line 2"]),
        (("- padim", "- padin"), ["unknown method 'padin'", "did you mean 'padim'", "line 4", "methods[0]"]),
        (("coreset_ratio", "coreset_ration"), ["coreset_ration", "did you mean 'coreset_ratio'", "line 5"]),
        (("[0.01, 0.1]", "[0.01, 1.5]"), ["coreset_ratio", "(0, 1]", "line 5"]),
        (("[0.01, 0.1]", "[]"), ["coreset_ratio", "empty list"]),
        (("[0.01, 0.1]", "{ratio: 0.1}"), ["coreset_ratio", "unknown distribution 'ratio'", "{uniform: [low, high]}"]),
        (("[0.01, 0.1]", "{loguniform: [0.01, 1]}"), ["line 3, methods", "distribution", "add `search:"]),
        (("- generated", "- generatd"), ["unknown dataset layout 'generatd'", "generated", "layout: folder", "line 8"]),
        (("shots: 4", "shot: 4"), ["unknown key 'shot'", "'shots'", "line 9"]),
        (("shots: 4", "shots: none"), ["datasets[1].shots", "line 9", "'none'"]),
        (("seeds: [0, 1]", "seeds: [-1]"), ["seeds[0]", "line 10", "-1"]),
        (("seeds: [0, 1]", "protocol: {aupro_limit: 30}"), ["protocol.aupro_limit", "30", "line 10"]),
        (("seeds: [0, 1]", "protocol: {smooth: 4}"), ["unknown key 'smooth'", "smoothing", "line 10"]),
        (
            ("seeds: [0, 1]", "representations: [adpretrian]"),
            ["unknown representation 'adpretrian'", "'adpretrain'", "line 10"],
        ),
        (("seeds: [0, 1]", "exclude: [{methd: padim}]"), ["unknown axis 'methd'", "'method'", "line 10"]),
        (("seeds: [0, 1]", "resources: {cpu: 0}"), ["cpu or gpu"]),
        (("seeds: [0, 1]", "protocol: {image_size: 224, resize: 200}"), ["resize 200", "224"]),
        (("[tf_efficientnet_lite0, tf_efficientnet_lite1]", "[resnet18, resnet18]"), ["'resnet18' stands there twice"]),
        (("methods:", "methods: ["), ["not valid YAML"]),
        (("name: small", "name: small\ndescription: 2024-13-01"), ["not valid YAML", "month"]),
        (("seeds: [0, 1]", "seeds: [0]\nname: other"), ["line 11", "'name'", "line 2"]),
        (("seeds: [0, 1]", "protocol: {smoothing: .inf}"), ["smoothing", "line 10"]),
        (("seeds: [0, 1]", "representations: []"), ["representations", "line 10"]),
        (("seeds: [0, 1]", "exclude: [{method: padimm}]"), ["unknown method 'padimm'", "'padim'", "line 10"]),
    ],
)
def test_what_is_wrong_is_named_with_its_place(change, expected):
    text = SPACE.replace(*change, 1)
    assert text != SPACE
    with pytest.raises(AdgridError) as error:
        grid_points(parse_space(text, "space.yaml"))
    for part in expected:
        assert part in str(error.value), str(error.value)


def test_a_space_that_is_no_mapping_or_no_file_is_refused(tmp_path):
    with pytest.raises(AdgridError, match="mapping"):
        parse_space("- padim", "list.yaml")
    with pytest.raises(AdgridError, match="cannot be read"):
        load_space(tmp_path / "absent.yaml")


def test_set_narrows_an_axis_and_keeps_the_entries_settings():
    space = parse_space(SPACE, overrides=["methods=patchcore", "datasets=elpv", "seeds=3"])
    points = grid_points(space)
    assert {(p.method.name, p.dataset.name, p.shots, p.seed) for p in points} == {("patchcore", "elpv", 4, 3)}
    assert {p.params["coreset_ratio"] for p in points} == {0.01, 0.1}


def test_set_reaches_into_entries_and_protocol():
    space = parse_space(SPACE, overrides=["methods.patchcore.params.coreset_ratio=0.5", "protocol.aupro_limit=0.05"])
    assert space.protocol.aupro_limit == 0.05
    assert space.methods[1].params == {"coreset_ratio": 0.5}
    assert parse_space(SPACE, overrides=["backbones=resnet18,resnet50"]).backbones[1].name == "resnet50"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeds", "axis=value"),
        ("methods.padin.params.epsilon=1", "did you mean 'padim'"),
        ("protocol.aupro_limit=7", "--set protocol.aupro_limit=7"),
        ("seeds.0=1", "no entry"),
        ("colour=red", "unknown key 'colour'"),
    ],
)
def test_a_wrong_override_is_named(override, expected):
    with pytest.raises(AdgridError) as error:
        parse_space(SPACE, overrides=[override])
    assert expected in str(error.value)


def test_every_shipped_space_is_valid():
    from pathlib import Path

    files = sorted((Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))
    assert files
    for file in files:
        assert grid_points(load_space(file))


@pytest.mark.parametrize(
    ("entry", "cpu"),
    [("{}", 1), ("{gpu: 0}", 1), ("{gpu: 1}", 4), ("{gpu: 0.25}", 1), ("{gpu: 0.5}", 2), ("{gpu: 2, cpu: 3}", 3)],
)
def test_cores_that_decode_are_reserved_beside_gpus_unless_a_space_says_how_many(entry, cpu):
    space = parse_space(SPACE + f"resources: {entry}\n", "small.yaml", ())
    assert space.resources.resolved().cpu == cpu
    with pytest.raises(AdgridError, match=r"resources\.gpu"):
        parse_space(SPACE + "resources: {gpu: many}\n", "small.yaml", ())
