"""Greedy coreset of real patch features against the usual loop.

    python benchmarks/coreset.py --data-root DATA [--anomalib-python PYTHON] [--json FILE]

Both sides choose from the same projected features with the same start. The loop touches every point at every step, so
it is timed over some hundred steps a round and multiplied. With `--anomalib-python`, an interpreter that has anomalib,
it is anomalib's KCenterGreedy, otherwise the same loop written here. The whole order of ours is certified in float64:
at no step is any point farther from the centres chosen before than the point that was chosen.
"""

import tempfile
import time

import numpy as np
import torch
from _compare import OtherSide, compare, encode_folder, interleave, make_parser, peak_mib, report

from methods.components.coreset import greedy_coreset, random_projection
from methods.components.patches import average_and_concatenate


def usual_loop(points, start, num):
    """Choices of `num` steps; every step measures all points."""
    index, chosen = torch.tensor(start), [start]
    distance = torch.full((len(points), 1), torch.inf)
    for _ in range(num):
        new = torch.linalg.norm(points - points[index], dim=1, keepdim=True)
        distance = torch.minimum(distance, new)
        index = distance.argmax()
        distance[index] = 0
        chosen.append(int(index))
    return chosen


def largest_gap(points, order, rows=1024):
    """By how much the farthest point exceeds the chosen one, at the worst step, in float64 distances."""
    points = points.double() - points.double().mean(dim=0)
    centres = points[order]
    squares = centres.square().sum(dim=1)
    step = torch.full((len(points),), len(order))
    step[order] = torch.arange(len(order))
    farthest, chosen = torch.zeros(len(order), dtype=torch.float64), torch.zeros(len(order), dtype=torch.float64)
    for begin in range(0, len(points), rows):
        block, steps = points[begin : begin + rows], step[begin : begin + rows]
        squared = torch.addmm(squares, block, centres.T, alpha=-2) + block.square().sum(dim=1, keepdim=True)
        before = squared.clamp_(min=0).cummin(dim=1).values[:, :-1].sqrt()  # column i: before choice i + 1
        own = ((steps > 0) & (steps < len(order))).nonzero()[:, 0]
        chosen[steps[own]] = before[own, steps[own] - 1]
        later = torch.arange(1, len(order)) <= steps[:, None]  # what is chosen already is at distance 0
        farthest[1:] = torch.maximum(farthest[1:], torch.where(later, before, 0).amax(dim=0))
    return float((farthest - chosen)[1:].max())


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--anomalib-python", help="interpreter with anomalib installed")
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--projection", type=int, default=128, help="0 for none; as many as features or more for none")
    parser.add_argument("--steps", type=int, default=200, help="of the usual loop, per round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    levels = encode_folder(options, options.images, strides=(8, 16))
    features = average_and_concatenate([level.shape[1] for level in levels], 3)(levels).flatten(0, 2)
    if options.projection > features.shape[1]:  # as anomalib projects, to more dimensions than there are
        matrix = torch.randn(features.shape[1], options.projection, generator=torch.Generator().manual_seed(0))
        features = features @ matrix / options.projection**0.5
    else:
        features = random_projection(features, options.projection or None, torch.Generator().manual_seed(0))
    num = int(len(features) * options.ratio)
    theirs_first = []

    with tempfile.TemporaryDirectory() as folder:
        if options.anomalib_python:
            np.save(f"{folder}/features.npy", features.numpy())
            other = OtherSide(options.anomalib_python, options.threads, folder)

            def theirs():
                answer = other.ask("coreset", features="features", start=0, num=options.steps)
                theirs_first[:] = answer["chosen"]
                return answer["seconds"] / options.steps * num
        else:

            def theirs():
                begin = time.perf_counter()
                theirs_first[:] = usual_loop(features, 0, options.steps)
                return (time.perf_counter() - begin) / options.steps * num

        def ours():
            greedy_coreset(features, num)

        order, grown = peak_mib(lambda: greedy_coreset(features, num))
        seconds = interleave({"ours": ours, "loop": theirs}, options.rounds)
        if options.anomalib_python:
            other.close()

    same = sum(a == b for a, b in zip(order.tolist(), theirs_first, strict=False))
    report(
        {
            "points": len(features),
            "dimensions": features.shape[1],
            "centres": num,
            "threads": options.threads,
            "loop": "anomalib KCenterGreedy" if options.anomalib_python else "re-implemented",
            **compare(seconds, "ours", "loop"),
            "ours_grew_by_mib": grown,
            "features_mib": features.nbytes / 2**20,
            "same_choices_of_the_first": [same, len(theirs_first)],
            "largest_gap_float64": largest_gap(features, order),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
