"""Result rows and a study written by hand, for the tests of reports, pictures and the mirror."""

from harness.contracts import ResultRow
from harness.identity import content_id
from harness.study import read_study

PROTOCOL = {
    "image_size": [224, 224],
    "resize": None,
    "interpolation": "backbone",
    "mask_rule": "nearest",
    "cropped_anomaly": "keep",
    "smoothing": "method",
    "score_reduction": "method",
    "aupro_limit": 0.3,
    "selection": "last",
}


def toy_row(value=0.9, method="padim", backbone="resnet18", dataset="parts", category="bolt", *, pixel=None, **changes):
    """A finished row with `value` as image AUROC and `pixel` as pixel AUROC, if any; a failed row for None."""
    axes = {
        "method": method,
        "backbone": backbone,
        "representation": "plain",
        "layers": ("layer2", "layer3") if backbone else (),
        "dataset": dataset,
        "shots": None,
        "seed": 0,
        "params": {"ratio": 0.1},
    }
    axes |= {name: changes.pop(name) for name in list(changes) if name in axes}
    protocol = PROTOCOL | changes.pop("protocol", {})
    prediction_id = content_id([axes, category])
    row = {
        **axes,
        "category": category,
        "prediction_id": prediction_id,
        "cell_id": content_id([prediction_id, protocol]),
        "trial_id": content_id([axes, protocol], 12),
        "status": "failed" if value is None else "ok",
        "protocol": protocol,
        "protocol_id": content_id(protocol, 8),
        "metrics": {
            name: number for name, number in (("image_auroc", value), ("pixel_auroc", pixel)) if number is not None
        },
        "costs": {} if value is None else {"fit_seconds": 2.0, "images_per_second": 40.0, "peak_rss_mib": 700.0},
        "provenance": {"git_commit": "abc1234", "torch_version": "2.13.0"},
        "reason": "ValueError: all features are NaN" if value is None else "",
        "traceback": "Traceback (most recent call last):\n  ValueError" if value is None else "",
    }
    return ResultRow(**{**row, **changes})


def toy_study(picture):
    """A study as its run keeps it: the second sample is the best, the third was stopped; and its picture."""
    rows = [toy_row(score, category="nut", params={"ratio": ratio}) for ratio, score in ((0.1, 0.8), (0.25, 0.9))]
    rows.append(toy_row(None, category="nut", params={"ratio": 0.05}, status="stopped", reason="worse than the others"))
    record = {
        "method": "padim",
        "backbone": "resnet18",
        "search": {"objective": "image_auroc", "searcher": "random"},
        "distributions": {"ratio": {"loguniform": [0.01, 0.5]}},
        "tuned_on": ["parts/nut"],
        "reported": ["parts/bolt"],
        "samples": [
            {"number": number, "params": dict(row.params), "cell_ids": {"nut": row.cell_id}}
            for number, row in enumerate(rows)
        ],
    }
    return record, read_study(record, {row.cell_id: row for row in rows}), picture
