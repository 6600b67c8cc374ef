import dataclasses
import re
from pathlib import Path

import pytest
from rich.console import Console
from toy_rows import toy_row

from harness.contracts import AdgridError
from harness.metrics import METRICS
from harness.published import EVIDENCE, NUM_CATEGORIES, load_published, published_names
from harness.registry import load_dataset_class, scope_of_method
from harness.reproduction import (
    find_shortfalls,
    judge_numbers,
    judgements_csv,
    judgements_markdown,
    terminal_judgements,
    write_judgements,
)

CROP = {"image_size": [224, 224], "resize": 256}
HEADER = "method,backbone,dataset,image_auroc\n"


def paper(tmp_path, lines, header=HEADER):
    path = tmp_path / "paper.csv"
    path.write_text(header + lines, encoding="utf-8")
    return load_published(str(path))


def rows(value=0.99, *, dataset="btad", names=("01", "02", "03"), spread=0.0, **changes):
    changes = {"method": "patchcore", "backbone": "wide_resnet50_2", **changes}
    return [
        toy_row(value + spread * place, dataset=dataset, category=name, **changes) for place, name in enumerate(names)
    ]


def judge(table, ours, scope_of=scope_of_method):
    judgements, absent = judge_numbers({"run": ours}, [table], scope_of)
    return judgements, absent


def only(table, ours):
    (judgement,), _ = judge(table, ours)
    return judgement


# --- what is shipped ---


def test_every_shipped_table_loads_and_tells_its_source():
    assert {"adpretrain", "tocoad", "patchcore", "padim", "cflow", "uniad", "glass", "draem"} <= set(published_names())
    for name in published_names():
        table = load_published(name)
        assert table.numbers, name
        for number in table.numbers:
            assert number.metric in METRICS
            assert number.evidence in EVIDENCE
            assert number.source
            assert 0.005 <= number.tolerance <= 0.05


def find(table, **fields):
    numbers = load_published(table).numbers
    return [number.value for number in numbers if all(getattr(number, name) == value for name, value in fields.items())]


def test_some_numbers_are_those_of_the_papers():
    assert find("patchcore", metric="aupro", params={"coreset_ratio": 0.1, "patch_size": 3, "num_neighbours": 1}) == [
        0.944
    ]
    assert find("padim", metric="pixel_auroc", backbone="resnet18", evidence="paper") == [0.967]
    assert find("tocoad", metric="pixel_auroc", dataset="btad") == [0.9770]
    assert find("adpretrain", metric="aupro", method="uniad", dataset="mpdd", against="plain") == [0.427]
    assert find("adpretrain", metric="image_auroc", method="padim", representation="adpretrain", against=None) == [
        0.954
    ]
    assert find("ader", metric="aupro", method="draem", dataset="real_iad") == [0.136]
    assert find("im_iad", metric="image_auroc", method="padim", dataset="btad", category="02") == [0.902]
    assert {number.evidence for number in load_published("adpretrain").numbers} == {"second-hand"}


def test_counts_of_categories_are_those_of_the_layouts():
    for dataset, count in NUM_CATEGORIES.items():
        expected = getattr(load_dataset_class(dataset), "expected", {})
        assert len(expected) in (0, count), dataset


# --- verdicts on constructed cases ---


def test_a_mean_within_the_tolerance_is_reproduced(tmp_path):
    table = paper(tmp_path, "patchcore,wide_resnet50_2,btad,0.99\n")
    found = only(table, rows(0.981, spread=0.001))
    assert (found.verdict, found.ours) == ("reproduced", pytest.approx(0.982))
    assert found.difference == pytest.approx(-0.008)
    assert found.unknown == ("image_size", "resize")
    off = only(table, rows(0.97))
    assert (off.verdict, off.reasons) == ("not reproduced", ("2.00 points below, tolerance 1",))
    assert only(table, rows(1.0)).verdict == "reproduced"
    wide = paper(
        tmp_path, "patchcore,wide_resnet50_2,btad,0.99,0.025\n", HEADER.replace("image_auroc", "image_auroc,tolerance")
    )
    assert only(wide, rows(0.97)).verdict == "reproduced"


def test_a_mean_is_over_categories_and_seeds(tmp_path):
    table = paper(tmp_path, "patchcore,wide_resnet50_2,btad,0.95\n")
    ours = [*rows(0.94, seed=0), *rows(0.96, seed=1)]
    assert only(table, ours).ours == pytest.approx(0.95)
    assert only(table, ours[:-1]).reasons == ("not every seed has every category",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"stamps": ("random weights",)}, "our weights are random"),
        ({"names": ("01", "02")}, "2 of 3 categories"),
        ({"shots": 8}, "shots: all published, 8 here"),
        ({"backbone": "resnet18"}, "backbone: wide_resnet50_2 published, resnet18 here"),
        ({"params": {"coreset_ratio": 0.01}}, "params.coreset_ratio: 0.1 published, 0.01 here"),
        ({"protocol": {"image_size": [256, 256]}}, "protocol.image_size: [224, 224] published, [256, 256] here"),
        ({"protocol": {"selection": "test_best"}}, "protocol.selection: last published, test_best here"),
        ({"representation": "adpretrain"}, "representation: plain published, adpretrain here"),
    ],
)
def test_what_is_not_comparable_says_why(tmp_path, changes, expected):
    header = "method,backbone,dataset,image_auroc,image_size,selection,params.coreset_ratio\n"
    table = paper(tmp_path, "patchcore,wide_resnet50_2,btad,0.99,224,last,0.1\n", header)
    same = {"params": {"coreset_ratio": 0.1, "num_neighbours": 1}}
    assert only(table, rows(0.99, **same)).verdict == "reproduced"
    found = only(table, rows(0.99, **{**same, **changes}))
    assert (found.verdict, found.reasons) == ("not comparable", (expected,))


def test_failed_rows_and_missing_metrics_are_not_comparable(tmp_path):
    table = paper(tmp_path, "patchcore,wide_resnet50_2,btad,0.99\n")
    broken = [*rows(names=("01", "02")), toy_row(None, "patchcore", "wide_resnet50_2", "btad", "03")]
    assert only(table, broken).reasons == ("no number for 03",)
    pixels = paper(tmp_path, "patchcore,wide_resnet50_2,btad,0.99\n", HEADER.replace("image_auroc", "pixel_auroc"))
    assert only(pixels, rows()).reasons == ("Pixel AUROC is not available",)


def test_one_model_for_all_categories_is_not_one_for_each(tmp_path):
    table = paper(
        tmp_path, "patchcore,wide_resnet50_2,btad,0.99,dataset\n", HEADER.replace("image_auroc", "image_auroc,scope")
    )
    assert only(table, rows()).reasons == (
        "scope: one model for all categories published, one model per category here",
    )
    (unknown,), _ = judge(table, rows(), lambda name: None)
    assert unknown.verdict == "reproduced"


def test_a_caveat_or_an_unknown_backbone_is_not_comparable(tmp_path):
    table = paper(tmp_path, "patchcore,,btad,0.99,inflated\n", HEADER.replace("image_auroc", "image_auroc,caveat"))
    assert only(table, rows()).reasons == ("inflated", "the source does not tell the backbone")


def test_a_gain_is_the_difference_of_two_representations(tmp_path):
    header = "method,backbone,dataset,representation,against,image_auroc\n"
    table = paper(tmp_path, "patchcore,wide_resnet50_2,btad,adpretrain,plain,0.05\n", header)
    ours = [*rows(0.90), *rows(0.945, representation="adpretrain")]
    found = only(table, ours)
    assert (found.verdict, found.ours) == ("reproduced", pytest.approx(0.045))
    assert only(table, ours[3:]).reasons == ("a gain over plain, which was not run with the same settings",)
    assert only(table, ours[1:]).reasons == ("plain: 2 of 3 categories",)
    other = [dataclasses.replace(row, protocol_id="other") for row in ours[:3]]
    assert only(table, [*other, *ours[3:]]).verdict == "not comparable"


def test_a_category_is_compared_alone(tmp_path):
    table = paper(
        tmp_path, "patchcore,wide_resnet50_2,btad,0.85,02\n", HEADER.replace("image_auroc", "image_auroc,category")
    )
    assert only(table, rows(0.845, names=("02",))).verdict == "reproduced"
    assert only(table, rows(0.845, names=("01",))).reasons == ("category 02 was not run",)


def test_every_comparable_line_is_judged_but_only_the_nearest_other(tmp_path):
    table = paper(tmp_path, "patchcore,wide_resnet50_2,btad,0.99\n")
    lines = [*rows(0.99), *rows(0.9, params={"ratio": 0.5}), *rows(0.99, backbone="resnet18")]
    judgements, _ = judge(table, lines)
    assert [judgement.verdict for judgement in judgements] == ["reproduced", "not reproduced"]
    far = [*rows(0.9, backbone="resnet18", shots=4), *rows(0.9, backbone="resnet18")]
    assert only(table, far).reasons == ("backbone: wide_resnet50_2 published, resnet18 here",)


def test_the_shipped_table_of_patchcore_is_met_by_its_protocol():
    names = tuple("abcdefghijklmno")
    ours = rows(
        0.991,
        dataset="mvtec_ad",
        names=names,
        protocol=CROP,
        params={"coreset_ratio": 0.1, "patch_size": 3, "num_neighbours": 1},
    )
    judgements, absent = judge(load_published("patchcore"), ours)
    by_size = {(judgement.number.value, judgement.number.metric): judgement for judgement in judgements}
    assert by_size[0.992, "image_auroc"].verdict == "reproduced"
    assert by_size[0.981, "pixel_auroc"].reasons == ("Pixel AUROC is not available",)
    assert "protocol.resize: 366 published, 256 here" in by_size[0.993, "image_auroc"].reasons
    assert absent == 0
    assert judge(load_published("uniad"), ours) == ([], 4)


def test_verdicts_are_written_for_people_and_programs(tmp_path):
    table = paper(tmp_path, "patchcore,wide_resnet50_2,btad,0.99\npadim,resnet18,btad,0.9\n")
    judgements, absent = judge(table, rows(0.97))
    text = judgements_markdown(judgements, absent, "adgrid compare")
    assert "| not reproduced | 2.00 points below, tolerance 1; not told: image_size, resize |" in text
    assert "1 more published numbers" in text
    header, line = judgements_csv(judgements).splitlines()
    assert dict(zip(header.split(","), line.split(","), strict=False))["verdict"] == "not reproduced"
    (shown,) = terminal_judgements(judgements, True)
    assert shown.row_count == 1
    console = Console(record=True, width=150)
    for part in terminal_judgements(judge(table, rows(0.97, shots=4))[0], True):
        console.print(part)
    text = console.export_text()
    assert re.search(
        r"paper \(paper\) +\n +run +patchcore · wide_resnet50_2 · plain +btad +Image AUROC +99.00 +97.00 +1", text
    )
    assert "   1 shots: all published, 4 here" in text
    assert {file.name for file in write_judgements(judgements, absent, tmp_path / "out", "c")} == {
        "published.md",
        "published.csv",
    }
    assert find_shortfalls(judgements, 0.005) == [
        "paper, Image AUROC of patchcore · wide_resnet50_2 · plain on btad: -2.00 points"
    ]
    assert find_shortfalls(judgements, 0.03) == []
    assert find_shortfalls([], 0.03) == ["no published number can be compared"]


# --- bad files ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("method,dataset\npadim,btad\n", "line 1: there is no metric; name at least one of image_auroc"),
        ("dataset,image_auroc\nbtad,0.9\n", "line 1: there is no column 'method'"),
        ("method,dataset,image_auc\n", "line 1: unknown column 'image_auc'; did you mean 'image_auroc'"),
        ("method,dataset,image_auroc,image_auroc\n", "line 1: the column 'image_auroc' stands there twice"),
        ("method,dataset,image_auroc\npadim,btad\n", "line 2: 2 fields, the header has 3"),
        (
            "method,dataset,image_auroc\npadim,btad,98.1\n",
            "line 2, image_auroc: 98.1 is no rate in [0, 1]; divide percent",
        ),
        ("method,dataset,image_auroc\n\npadim,btad,high\n", "line 3, image_auroc: 'high' is no number"),
        ("method,dataset,image_auroc\npadim,btad,[0.9\n", "line 2, column 'image_auroc': '[0.9' is no value"),
        ("method,dataset,image_auroc\npadim,,0.9\n", "line 2: 'dataset' is missing"),
        ("method,dataset,image_auroc\npadim,btad,\n", "line 2: no number"),
        ("method,dataset,image_auroc,evidence\npadim,btad,0.9,rumour\n", "evidence: unknown value 'rumour'"),
        ("method,dataset,image_auroc,scope\npadim,btad,0.9,all\n", "scope: 'all' is neither"),
        ("method,dataset,image_auroc,shots\npadim,btad,0.9,few\n", "shots: 'few' is no number"),
        ("method,dataset,image_auroc,image_size\npadim,btad,0.9,big\n", "image_size: 'big' is no size"),
        ("method,dataset,image_auroc\n", "no line has a number"),
        ("", "line 1: there is no column 'method'"),
    ],
)
def test_a_bad_csv_is_one_error_with_its_place(tmp_path, text, expected):
    path = tmp_path / "paper.csv"
    path.write_text(text)
    with pytest.raises(AdgridError) as caught:
        load_published(str(path))
    assert str(caught.value).startswith(f"{path}")
    assert expected in str(caught.value)


def test_a_spreadsheet_of_another_program_is_read(tmp_path):
    path = tmp_path / "paper.csv"
    path.write_bytes(
        '\ufeffmethod,dataset,backbone,image_auroc,note\r\n"padim",btad,none,0.9,"a, b"\r\n,,,,\r\n'.encode()
    )
    (number,) = load_published(str(path)).numbers
    assert (number.method, number.backbone, number.value, number.note) == ("padim", "none", 0.9, "a, b")


def test_unknown_names_and_files_that_are_not_there(tmp_path):
    with pytest.raises(AdgridError, match=r"did you mean 'patchcore'.*or name a \.csv"):
        load_published("patchcor")
    with pytest.raises(AdgridError, match="cannot be read"):
        load_published(str(tmp_path / "absent.csv"))
    bad = tmp_path / "bad.yaml"
    for text, expected in (
        ("title: x", "a list `numbers`"),
        ("numbers: [", "not valid YAML"),
        ("numbers: []\nprotocl: {}", "did you mean 'protocol'"),
        ("numbers: [3]", r"numbers\[0\]: a row is a mapping"),
        ("numbers: [{method: padim, dataset: btad, image_auroc: 0.9, resise: 3}]", "did you mean 'resize'"),
    ):
        bad.write_text(text)
        with pytest.raises(AdgridError, match=expected):
            load_published(str(bad))


def test_the_example_of_the_documentation_is_read_and_judged():
    docs = Path(__file__).parents[1] / "docs"
    text = (docs / "published_example.csv").read_text()
    assert f"```csv\n{text}```" in (docs / "comparing.md").read_text()
    table = load_published(str(docs / "published_example.csv"))
    by_metric = {number.metric: number for number in table.numbers if number.dataset == "mvtec_ad"}
    assert (by_metric["image_auroc"].params, by_metric["image_auroc"].backbone) == ({}, "none")
    ours = rows(0.99, dataset="mvtec_ad", names=tuple("abcdefghijklmno"), protocol=CROP, params={"coreset_ratio": 0.1})
    judgements, absent = judge(table, [*ours, *rows(0.84, names=("02",))])
    assert [(judgement.number.dataset, judgement.verdict) for judgement in judgements if judgement.ours] == [
        ("mvtec_ad", "reproduced"),
        ("btad", "not comparable"),
    ]
    assert absent == 2
