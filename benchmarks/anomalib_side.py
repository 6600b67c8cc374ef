"""Runs in the interpreter of anomalib: one whole cell through its Engine; see `cell.py`.

    python anomalib_side.py SETTINGS.json

The settings name the method, the images, the weights and the sizes. Progress goes to standard error, the figures to
standard output as one line of JSON.
"""

import json
import random
import resource
import sys
import time
from pathlib import Path


def import_torchvision():
    """Imports torchvision, also where its compiled part does not fit this torch: two operators are missing then."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library  # the operators last as long as this object
    return None


def peak_mib():
    """The largest memory this process has held so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` starts at the size of the parent there
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def make_shrinking():
    """A post-processor that divides scores by 2^14, which changes no order and no rounding.

    anomalib's own rescales them to [0, 1] by statistics of a validation set, by default the test images once more.
    Without that pass scores above 1 cannot stay: torchmetrics takes those for logits, and the sigmoid of most is 1.
    """
    from lightning.pytorch import Callback
    from torch import nn

    class Shrinking(nn.Module, Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, *_):
            outputs.update(pred_score=outputs.pred_score / 2**14, anomaly_map=outputs.anomaly_map / 2**14)

    return Shrinking()


def make_model(settings):
    """The model with the given weights, without pictures."""
    import safetensors.torch
    from anomalib.metrics import AUPRO, AUROC, Evaluator
    from anomalib.models import Padim, Patchcore
    from anomalib.pre_processing import PreProcessor
    from torchvision.transforms.v2 import Compose, InterpolationMode, Normalize, Resize

    size = tuple(settings["image_size"])
    resize = Resize(size, interpolation=InterpolationMode(settings["interpolation"]), antialias=True)
    metrics = [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
    ]
    shared = {
        "backbone": settings["backbone"],
        "layers": settings["layers"],
        "pre_trained": False,
        "pre_processor": PreProcessor(Compose([resize, Normalize(mean=settings["mean"], std=settings["std"])])),
        "post_processor": True if settings["as_shipped"] else make_shrinking(),
        "visualizer": False,
        "evaluator": Evaluator(test_metrics=metrics),
    }
    if settings["method"] == "patchcore":
        model = Patchcore(**shared, coreset_sampling_ratio=settings["coreset_ratio"], num_neighbors=9)
    else:
        model = Padim(**shared, n_features=settings["num_channels"])
    network = model.model.feature_extractor.feature_extractor
    told = network.load_state_dict(safetensors.torch.load_file(settings["weights"]), strict=False)
    if told.missing_keys:
        raise SystemExit(f"weights for {settings['backbone']} lack {told.missing_keys[:3]}")
    return model


def main():
    settings = json.loads(Path(sys.argv[1]).read_text())
    library = import_torchvision()
    import torch
    from anomalib.data import MVTecAD
    from anomalib.engine import Engine

    torch.set_num_threads(settings["threads"])
    random.seed(settings["seed"])
    torch.manual_seed(settings["seed"])
    imported_mib = peak_mib()

    begin, begin_cpu = time.perf_counter(), time.process_time()
    model = make_model(settings)
    data = MVTecAD(
        root=settings["dataset_root"],
        category=settings["category"],
        train_batch_size=settings["batch_size"],
        eval_batch_size=settings["batch_size"],
        num_workers=0,
    )
    # Lean: no checkpoint, no progress bar, and no second pass over the test images as validation.
    lean = {} if settings["as_shipped"] else {"barebones": True, "limit_val_batches": 0}
    engine = Engine(accelerator="cpu", default_root_dir=settings["scratch"], **lean)
    fit_model, stages = model.fit, {}

    def timed_fit():
        start = time.perf_counter()
        stages["read_and_extract_train_seconds"] = start - begin
        print(f"train features done after {start - begin:.1f} s", file=sys.stderr, flush=True)
        fit_model()
        stages["fit_seconds"] = time.perf_counter() - start
        print(f"fitted after {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)

    model.fit = timed_fit
    engine.fit(model=model, datamodule=data)
    fitted = time.perf_counter()
    metrics = engine.test(model=model, datamodule=data, verbose=False)[0]
    done = time.perf_counter()
    stages["test_and_metrics_seconds"] = done - fitted
    del library
    figures = {
        "method": settings["method"],
        "seconds": done - begin,
        "cpu_seconds": time.process_time() - begin_cpu,
        "peak_mib": peak_mib(),
        "imported_mib": imported_mib,
        "train_images": len(data.train_data),
        "test_images": len(data.test_data),
        "image_auroc": metrics["image_AUROC"],
        "pixel_auroc": metrics["pixel_AUROC"],
        "aupro": metrics["pixel_AUPRO"],
        **stages,
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
