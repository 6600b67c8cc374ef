"""Fitting PaDiM's Gaussians and scoring test images, on real features, against anomalib.

    python benchmarks/padim.py --data-root DATA [--anomalib-python PYTHON] [--json FILE]

Both sides get the same channels. With `--anomalib-python`, an interpreter that has anomalib, the other side is its
MultiVariateGaussian and its anomaly map generator; otherwise the same steps written here: a loop over positions for
the covariances, an explicit inverse, a product per image. Errors are against a float64 solution at some positions.
"""

import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from _compare import OtherSide, compare, encode_folder, interleave, make_parser, peak_mib, report

from methods.components.gaussian import fit_gaussians

EPSILON = 0.01


def usual_fit(train):
    """(P, D) means and (P, D, D) inverses from (N, D, P)."""
    width, num_positions = train.shape[1:]
    covariance = torch.zeros(width, width, num_positions)
    for position in range(num_positions):
        covariance[:, :, position] = torch.cov(train[:, :, position].T) + EPSILON * torch.eye(width)
    return train.mean(dim=0).T, torch.linalg.inv(covariance.permute(2, 0, 1))


def usual_distances(test, mean, inverse):
    """(B, P) from (B, D, P)."""
    delta = test.permute(2, 0, 1) - mean[:, None]
    return ((delta @ inverse) * delta).sum(dim=2).clamp(min=0).sqrt().T


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--anomalib-python", help="interpreter with anomalib installed")
    parser.add_argument("--channels", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    train = encode_folder(options, options.images, strides=(4, 8, 16))
    test = encode_folder(options, options.test_images, strides=(4, 8, 16))
    widths = [level.shape[1] for level in train]
    drawn = torch.randperm(sum(widths), generator=torch.Generator().manual_seed(0))[: options.channels].sort().values
    ends = np.cumsum(widths)
    channels = [drawn[(drawn >= e - w) & (drawn < e)] - (e - w) for w, e in zip(widths, ends, strict=True)]
    train, test = ([m[:, some].contiguous() for m, some in zip(maps, channels, strict=True)] for maps in (train, test))
    size = train[0].shape[2:]
    aligned_train, aligned_test = (
        torch.cat([F.interpolate(m, size=size) for m in maps], dim=1) for maps in (train, test)
    )
    parts = {"ours": ([], []), "theirs": ([], [])}
    found = {}

    def ours():
        begin = time.perf_counter()
        gaussians = fit_gaussians(train, EPSILON)
        fitted = time.perf_counter()
        batches = zip(*(level.split(32) for level in test), strict=True)
        found["ours"] = torch.cat([gaussians.distances(batch) for batch in batches]).flatten(1)
        parts["ours"][0].append(fitted - begin)
        parts["ours"][1].append(time.perf_counter() - fitted)

    def usual():
        begin = time.perf_counter()
        mean, inverse = usual_fit(aligned_train.flatten(2))
        fitted = time.perf_counter()
        distances = [usual_distances(batch, mean, inverse) for batch in aligned_test.flatten(2).split(32)]
        found["theirs"] = torch.cat(distances)
        parts["theirs"][0].append(fitted - begin)
        parts["theirs"][1].append(time.perf_counter() - fitted)

    with tempfile.TemporaryDirectory() as folder:
        if options.anomalib_python:
            np.save(f"{folder}/train.npy", aligned_train.numpy())
            np.save(f"{folder}/test.npy", aligned_test.numpy())
            other = OtherSide(options.anomalib_python, options.threads, folder)

            def theirs():
                answer = other.ask("padim", train="train", test="test")
                parts["theirs"][0].append(answer["fit_seconds"])
                parts["theirs"][1].append(answer["predict_seconds"])
                return answer["fit_seconds"] + answer["predict_seconds"]
        else:
            theirs = usual

        _, grown = peak_mib(ours)
        seconds = interleave({"ours": ours, "theirs": theirs}, options.rounds)
        if options.anomalib_python:
            other.close()
            found["theirs"] = torch.from_numpy(np.load(f"{folder}/distances.npy")).flatten(1)

    errors = dict.fromkeys(found, 0.0)
    for position in range(0, found["ours"].shape[1], 97):
        normal, images = (maps.flatten(2)[:, :, position].double() for maps in (aligned_train, aligned_test))
        covariance = torch.cov(normal.T) + EPSILON * torch.eye(options.channels, dtype=torch.float64)
        delta = images - normal.mean(dim=0)
        exact = (delta * torch.linalg.solve(covariance, delta.T).T).sum(dim=1).sqrt()
        for name, distances in found.items():
            errors[name] = max(errors[name], float((distances[:, position] / exact - 1).abs().max()))
    report(
        {
            "images": [len(aligned_train), len(aligned_test)],
            "positions": found["ours"].shape[1],
            "channels": options.channels,
            "threads": options.threads,
            "other": "anomalib" if options.anomalib_python else "re-implemented",
            **compare(seconds, "ours", "theirs"),
            "fit_times_faster": float(np.median(np.divide(parts["theirs"][0], parts["ours"][0][1:]))),
            "predict_times_faster": float(np.median(np.divide(parts["theirs"][1], parts["ours"][1][1:]))),
            "ours_grew_by_mib": grown,
            "ours_relative_error": errors["ours"],
            "theirs_relative_error": errors["theirs"],
        },
        options.json,
    )


if __name__ == "__main__":
    main()
