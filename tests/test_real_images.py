"""Known results on real photographs: bottle of MVTec AD and metal_plate of MPDD, read in the `folder` layout."""

import pytest
from runs import SmallRun

pytestmark = [pytest.mark.data, pytest.mark.slow]

SPACE = """
name: real
methods: [{{name: patchcore, params: {{coreset_ratio: 0.1}}}}]
backbones: [{{name: tf_efficientnet_lite0, layers: [blocks.2, blocks.4]}}]
datasets: [{{name: {name}, layout: folder, root: {root}}}]
"""


@pytest.mark.parametrize(
    ("name", "category", "image_auroc", "pixel_auroc"),
    [("mvtec_ad", "bottle", 0.99, 0.97), ("mpdd", "metal_plate", 0.98, 0.97)],
)
def test_patchcore_finds_real_defects(tmp_path, places, data_root, name, category, image_auroc, pixel_auroc):
    run = SmallRun(tmp_path, places)
    plan = run.plan(SPACE.format(name=name, root=data_root / name), random_weights=False)
    row = run.run_plan(plan)[category]
    assert row.status == "ok", row.reason
    assert row.stamps == ()
    assert row.metrics["image_auroc"] >= image_auroc
    assert row.metrics["pixel_auroc"] >= pixel_auroc
    assert run.run_plan(plan) == {}
