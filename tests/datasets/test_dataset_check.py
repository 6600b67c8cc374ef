"""What `adgrid datasets` prints: counts side by side, every complaint in its place, at any width."""

import io
import shutil

import pytest
from rich.console import Console
from trees import make_category, save_image, save_mask

from harness.contracts import AdgridError, DatasetRef, LayoutProblem, Places
from harness.dataset_check import KINDS, check_dataset, describe_dataset, kind_of, list_datasets
from harness.datasets.checks import Counts
from harness.datasets.folder import Folder
from harness.registry import build_dataset, dataset_layouts


def on_screen(width=80, terminal=True):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)


def printed(console):
    return console.file.getvalue()


@pytest.fixture
def check(tmp_path):
    """Checks the folder `mine` of this test: (whether all is well, what was printed without line breaks)."""

    def run(layout="folder", name="mine", categories=None, decode=False, console=None):
        console = console or on_screen(terminal=False)
        places = Places(data_root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
        well = check_dataset(DatasetRef(name=name, layout=layout), places, categories, decode, console)
        return well, printed(console)

    return run


def break_everything(folder):
    """Leaves one complaint of each kind that a category without published counts can have."""
    (folder / "train/good/001.png").write_bytes(b"")
    (folder / "train/good/lost.png").symlink_to(folder / "gone.png")
    save_image(folder / "test/crack/007.png")
    save_mask(folder / "ground_truth/crack/000_mask.png", size=(11, 10))
    save_mask(folder / "ground_truth/crack/001_mask.png", value=0)


def test_every_kind_of_complaint_is_recognised_by_the_words_of_the_layouts(tmp_path):
    class Published(Folder):
        expected = {"bottle": Counts(train=9, good=1, defects={"crack": 3}), "cable": Counts()}

    break_everything(make_category(tmp_path, "bottle"))
    shutil.rmtree(make_category(tmp_path, "nut") / "test/good")
    problems = Published("mine", str(tmp_path), Places(cache_dir="unused")).check(decode=True)
    found = {kind: sorted(p.what for p in problems if kind_of(p) == kind) for kind in KINDS}
    assert len(found["missing"]) == 3
    assert any("lost.png: no such file" in what for what in found["missing"])
    assert any("'cable'" in what for what in found["missing"])
    assert any("train: 4 images where 9 are published" in what for what in found["missing"])
    assert found["extra"] == ["test, normal: 2 images where 1 are published"]
    assert "001.png: the file has zero bytes" in found["unreadable"][0]
    assert "007.png" in found["unpaired"][0]
    assert "000_mask.png is 10 x 11" in found["wrong size"][0]
    assert "001_mask.png of an anomalous image marks no pixel" in found["empty mask"][0]
    assert found["layout"] == ["all 2 test images are anomalous, so there is no AUROC"]
    assert sum(map(len, found.values())) == len(problems) == 9


def test_a_path_that_sounds_like_a_complaint_does_not_change_its_kind():
    for name in ("missing_cable", "extra", "no mask"):
        problem = LayoutProblem(
            category="c", what=f"cannot read image test/{name}/0.png: the file has zero bytes", remedy="copy it again"
        )
        assert kind_of(problem) == "unreadable"


def test_found_and_published_numbers_stand_side_by_side(tmp_path, check):
    make_category(tmp_path / "mvtec_ad", "bottle")
    well, told = check("mvtec_ad", "mvtec_ad", ["bottle"])
    assert not well
    lines = [line.replace("│", "").split() for line in told.splitlines()]
    assert ["bottle", "3", "/", "209", "2", "/", "20", "2", "/", "63", "missing,", "extra"] in lines
    # Defect types are told where they differ.
    for kind, numbers in (("broken_large", "0 / 20"), ("contamination", "0 / 21"), ("crack", "2 / 0")):
        assert [kind, *numbers.split()] in lines
    assert "cable" not in told
    assert told.rstrip().endswith("6 complaints: 5 missing, 1 extra")


def test_absent_categories_share_one_remedy(tmp_path, check):
    make_category(tmp_path / "mvtec_ad", "bottle")
    _, told = check("mvtec_ad", "mvtec_ad")
    assert told.count("│ absent ") == 14
    assert "missing (14)" in told
    assert told.count("download mvtec_anomaly_detection") == 1


def test_complaints_stand_below_their_category_kind_and_remedy(tmp_path, check):
    break_everything(make_category(tmp_path / "mine", "bottle"))
    (tmp_path / "mine/bottle/train/good/002.png").write_bytes(b"")
    make_category(tmp_path / "mine", "cable")
    well, told = check(decode=True)
    assert not well
    body = told[told.index("\nbottle\n") : told.index("6 complaints")]
    assert [line.strip() for line in body.splitlines() if line.startswith("  ") and line[2] != " "] == [
        "missing (1)",
        "unreadable (2)",
        "unpaired (1)",
        "wrong size (1)",
        "empty mask (1)",
    ]
    block = body[body.index("unreadable") : body.index("unpaired")].splitlines()
    assert [line.strip() for line in block[1:4]] == [
        "cannot read image bottle/train/good/001.png: the file has zero bytes",
        "cannot read image bottle/train/good/002.png: the file has zero bytes",
        "→ copy it again from its source, or remove it",
    ]
    assert "cable" not in body


def test_a_whole_dataset_passes_and_says_how_deep_it_was_looked_into(tmp_path, check):
    make_category(tmp_path / "mine", "bottle")
    make_category(tmp_path / "mine", "nut", masks=False)
    well, told = check()
    assert well
    assert "--decode reads every pixel" in told
    assert "pixel metrics are not available: nut" in told
    well, told = check(decode=True)
    assert well
    assert "--decode" not in told


def test_only_the_requested_categories_are_counted(tmp_path, check):
    make_category(tmp_path / "mine", "bottle")
    shutil.rmtree(make_category(tmp_path / "mine", "cable") / "test")
    assert check(categories=["bottle", "bottle"])[0]
    well, told = check(categories=["cabel"])
    assert not well
    assert "did you mean 'cable'" in told


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_wider_than_the_terminal_and_no_word_is_lost(tmp_path, check, width):
    break_everything(make_category(tmp_path / "mine", "bottle"))
    make_category(tmp_path / "mine", "nut", masks=False)
    _, plain = check(decode=True)
    console = on_screen(width)
    _, wrapped = check(decode=True, console=console)
    wrapped = wrapped[wrapped.index("mine in layout") :]  # what stands before is the progress bar, taken back
    body = wrapped[wrapped.index("\nbottle\n") :]
    assert max(map(len, body.splitlines())) <= width
    assert max(len(line) for line in wrapped.splitlines() if line[:1] in "│┃┡└┏") <= width
    assert body.split() == plain[plain.index("\nbottle\n") :].split()
    assert any(len(line) > 120 for line in plain.splitlines())  # elsewhere a complaint keeps its line


def test_a_missing_dataset_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, check):
    well, told = check("mvtec_ad", "mvtec_ad")
    assert not well
    assert "mvtec_ad: not here" in told
    assert f"there is no folder {tmp_path}/mvtec_ad" in told
    assert "https://www.mvtec.com" in told
    assert "CC BY-NC-SA 4.0" in told
    assert "15 categories, 5,354 images" in told


def test_a_dataset_of_another_package_is_checked_too(check):
    well, told = check("toy_squares", "toy_squares")
    assert well, told
    with pytest.raises(AdgridError, match="leave out --decode"):
        check("toy_squares", "toy_squares", decode=True)


def test_the_list_names_every_layout_with_its_licence(tmp_path):
    make_category(tmp_path / "mvtec_ad", "bottle")
    places = Places(data_root=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    names = dataset_layouts()
    console = on_screen(200, terminal=False)
    console.print(list_datasets({name: build_dataset(DatasetRef(name=name, layout=name), places) for name in names}))
    rows = {line.split("│")[1].strip(): line for line in printed(console).splitlines() if line.count("│") == 6}
    assert set(names) <= set(rows)
    assert "CC BY-NC-SA 4.0" in rows["mvtec_ad"]
    assert rows["mvtec_ad"].split("│")[4:6] == ["         15 ", " 1 of 15 "]
    assert rows["generated"].split("│")[4:6] == ["          4 ", " yes     "]
    assert rows["folder"].split("│")[4:6] == ["            ", " no      "]


@pytest.mark.parametrize("layout", dataset_layouts())
def test_every_layout_describes_itself(layout):
    console = on_screen(terminal=False)
    dataset = build_dataset(DatasetRef(name=layout, layout=layout), Places(cache_dir="unused"))
    describe_dataset(dataset, layout, console)
    told = printed(console)
    for text in (dataset.licence, dataset.home_page, dataset.citation, *getattr(dataset, "variants", ())):
        assert text in told


def test_totals_are_those_of_the_paper():
    console = on_screen(terminal=False)
    describe_dataset(
        build_dataset(DatasetRef(name="mvtec_ad", layout="mvtec_ad"), Places(cache_dir="unused")), "mvtec_ad", console
    )
    # 15 categories, 3,629 training and 1,725 test images (Bergmann et al. 2019, table 2)
    (footer,) = [line for line in printed(console).splitlines() if "15 categories" in line]
    assert footer.replace("│", "").split() == ["15", "categories", "3,629", "467", "1,258"]
