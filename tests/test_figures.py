import io

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from PIL import Image
from toy_rows import toy_row

from harness.figures import ALERT, ScoredImage, draw_contact_sheet, draw_matrix, pick_extremes
from harness.report import build_matrices, rows_frame
from harness.tables import cell_colour


def drawn(draw, *arguments, **options):
    """The picture as (H, W, 3) integers."""
    stream = io.BytesIO()
    draw(*arguments, stream, **options)
    return np.asarray(Image.open(stream).convert("RGB")).astype(int)


def drawn_matrix(rows):
    (matrix,) = build_matrices(rows_frame(rows), ["image_auroc"])
    return drawn(draw_matrix, matrix), matrix


def count(picture, colour, tolerance=3):
    return int((np.abs(picture - np.array(colour)).max(axis=-1) <= tolerance).sum())


def rgb(text):
    return tuple(bytes.fromhex(text.removeprefix("#")))


# --- matrices ---


def test_every_value_has_a_patch_of_its_colour():
    rows = [toy_row(value, method=f"m{number}") for number, value in enumerate((0.62, 0.75, 0.88, 0.99))]
    picture, matrix = drawn_matrix(rows)
    for value in matrix.numbers:
        assert count(picture, cell_colour(value, matrix.colour_range())) > 2000


def test_a_hole_is_hatched_and_not_coloured():
    full, _ = drawn_matrix([toy_row(0.9), toy_row(0.9, method="b")])
    holed, matrix = drawn_matrix([toy_row(0.9), toy_row(None, method="b")])
    colour = cell_colour(0.9, matrix.colour_range())
    assert count(full, colour) > 1.5 * count(holed, colour) > 0
    # The hatch: many thin grey strokes, which the full picture lacks.
    assert count(holed, rgb("#b7bbc0"), 12) > count(full, rgb("#b7bbc0"), 12) + 300


def test_a_metric_that_is_not_available_is_a_pale_patch():
    rows = [toy_row(0.9, pixel=0.8), toy_row(0.9, dataset="cells", category="mono")]
    (matrix,) = build_matrices(rows_frame(rows), ["pixel_auroc"])
    assert count(drawn(draw_matrix, matrix), rgb("#f1f3f4"), 0) > 2000


def test_the_picture_grows_with_rows_and_columns():
    small, _ = drawn_matrix([toy_row(0.9)])
    tall, _ = drawn_matrix([toy_row(0.9, method=f"m{number}") for number in range(30)])
    wide, _ = drawn_matrix([toy_row(0.9, dataset=f"dataset_{number}") for number in range(12)])
    assert tall.shape[0] > 2.5 * small.shape[0]
    assert wide.shape[1] > 1.8 * small.shape[1]


def test_nothing_is_cut_off_at_the_border():
    long = "a_dataset_with_a_very_long_name_indeed"
    rows = [toy_row(0.9, method="m" * 40, backbone="b" * 60, dataset=f"{long}_{number}") for number in range(3)]
    rows += [toy_row(None, method="x", category="c" * 80, dataset=f"{long}_1", reason="E" * 400)]
    picture, _ = drawn_matrix(rows)
    frame = np.concatenate([picture[:8].reshape(-1, 3), picture[-8:].reshape(-1, 3)])
    sides = np.concatenate([picture[:, :8].reshape(-1, 3), picture[:, -8:].reshape(-1, 3)])
    assert (frame == 255).all()
    assert (sides == 255).all()


def test_a_matrix_of_nothing_but_holes_can_be_drawn():
    picture, _ = drawn_matrix([toy_row(None)])
    assert picture.std() > 0


def test_dollar_signs_are_no_mathematics():
    picture, _ = drawn_matrix([toy_row(0.9, method="$a_{$")])
    assert picture.std() > 0


def test_a_huge_matrix_stays_within_what_formats_allow(monkeypatch):
    monkeypatch.setattr("harness.figures._MAX_SIDE_PX", 900)
    picture, _ = drawn_matrix([toy_row(0.9, params={"ratio": number}) for number in range(40)])
    assert picture.shape[0] == pytest.approx(900, abs=1)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_ending_chooses_the_format(tmp_path, ending):
    (matrix,) = build_matrices(rows_frame([toy_row(0.9)]), ["image_auroc"])
    path = tmp_path / "made" / f"matrix.{ending}"
    draw_matrix(matrix, path)
    assert path.read_bytes()[:64].lstrip().startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[ending])


def test_drawing_leaves_the_global_state_of_matplotlib_alone():
    before = dict(mpl.rcParams)
    drawn_matrix([toy_row(0.9), toy_row(None, method="b")])
    drawn(draw_contact_sheet, [item(0.5, 1)], title="t")
    assert dict(mpl.rcParams) == before
    assert Gcf.get_all_fig_managers() == []


# --- contact sheets ---


def item(score, label=0, size=(60, 80), mask=None, **changes):
    grey = np.full((*size, 3), 120, np.uint8)
    heat = np.zeros((15, 20))
    heat[4:8, 6:12] = score
    fields = {"image": grey, "anomaly_map": heat, "mask": mask, "score": score, "label": label}
    return ScoredImage(**{**fields, "defect_type": "crack" if label else "good", "name": f"{score}.png", **changes})


def test_extremes_are_disjoint_and_start_with_the_most_extreme():
    assert pick_extremes([0.1, 0.9, 0.5, 0.7, 0.3], 2) == ([1, 3], [0, 4])
    assert pick_extremes([0.1, 0.9, 0.5], 6) == ([1, 2], [0])
    assert pick_extremes([0.4], 6) == ([0], [])
    assert pick_extremes(np.ones(5, np.float32), 2) == ([0, 1], [4, 3])


def test_a_right_order_has_no_alert_and_a_wrong_one_has():
    right = [item(0.9, 1), item(0.8, 1), item(0.2), item(0.1)]
    assert count(drawn(draw_contact_sheet, right, title="t"), rgb(ALERT)) == 0
    missed = [item(0.9, 1), item(0.8, 1), item(0.2), item(0.1, 1)]
    alarmed = [item(0.9, 1), item(0.8, 0), item(0.2), item(0.1)]
    both = [item(0.9, 1), item(0.8, 0), item(0.2), item(0.1, 1)]
    counts = [count(drawn(draw_contact_sheet, items, title="t"), rgb(ALERT)) for items in (missed, alarmed, both)]
    assert min(counts) > 1000
    assert counts[2] == pytest.approx(counts[0] + counts[1], rel=0.1)


def test_the_same_heat_has_the_same_colour_on_every_image_of_a_sheet():
    def sheet(*scores):
        return drawn(draw_contact_sheet, [item(score, score > 0.5) for score in scores], title="t", columns=1)

    def hottest_in(picture):
        left = picture[:, : picture.shape[1] // 2]
        return int((left[..., 0] - left[..., 2]).max())

    # Beside a strong map, which fills the scale, a weak one is faint; beside its like it fills the scale itself.
    beside_strong, beside_weak = sheet(1.0, 0.1), sheet(0.1, 0.1)
    half = beside_strong.shape[0] // 2
    assert hottest_in(beside_strong[:half]) > 100
    assert hottest_in(beside_weak[half:]) > 100
    assert hottest_in(beside_strong[half:]) < 50


def test_the_mask_is_outlined_even_at_the_border():
    mask = np.zeros((60, 80), np.uint8)
    mask[:20] = 255
    plain = drawn(draw_contact_sheet, [item(0.5, 1)], title="t")
    outlined = drawn(draw_contact_sheet, [item(0.5, 1, mask=mask)], title="t")
    assert plain.shape == outlined.shape
    changed = np.abs(plain - outlined).max(axis=-1) > 30
    rows = np.flatnonzero(changed.sum(axis=1) > 100)
    # Two pictures, each with an upper and a lower edge.
    assert (np.diff(rows) > 10).sum() == 3


def test_an_empty_mask_and_a_flat_map_are_no_trouble():
    flat = item(0.0, anomaly_map=np.zeros((4, 4)), mask=np.zeros((60, 80), np.uint8))
    assert drawn(draw_contact_sheet, [flat, flat], title="t").std() > 0


def test_images_of_any_shape_keep_their_aspect():
    tall = drawn(draw_contact_sheet, [item(0.5, 1, size=(120, 30))], title="t")
    grey = np.abs(tall - 120).max(axis=-1) <= 1
    grey[:, grey.shape[1] // 2 :] = False
    height, width = np.flatnonzero(grey.any(axis=1)), np.flatnonzero(grey.sum(axis=0) > 40)
    one_picture = (height[-1] - height[0] + 1) / 2
    assert one_picture / (width[-1] - width[0] + 1) == pytest.approx(4, rel=0.12)


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        draw_contact_sheet([], io.BytesIO(), "t")


@pytest.mark.data
def test_a_sheet_of_real_images_marks_their_defects(data_root, tmp_path):
    folder = data_root / "mvtec_ad" / "bottle"
    items = []
    for number, kind in enumerate(("broken_large", "contamination", "good")):
        path = folder / "test" / kind / "000.png"
        image = np.asarray(Image.open(path).convert("RGB"))
        truth = folder / "ground_truth" / kind / "000_mask.png"
        mask = np.asarray(Image.open(truth)) if truth.exists() else None
        heat = np.zeros(image.shape[:2]) if mask is None else (mask > 0).astype(float)
        items.append(
            ScoredImage(
                image=image,
                anomaly_map=heat,
                mask=mask,
                score=3.0 - number,
                label=int(kind != "good"),
                defect_type=kind,
                name=f"{kind}/000.png",
            )
        )
    draw_contact_sheet(items, tmp_path / "sheet.png", "bottle", columns=2)
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    # The hot end of the scale covers the defects of two overlays and of nothing else.
    hot = (picture[..., 0] > 200) & (picture[..., 2] < 150) & (picture[..., 1] > 150)
    assert 2000 < hot.sum() < 0.1 * hot.size
