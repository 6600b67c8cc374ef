"""The usual greedy k-centre loop, slow and obvious."""

import torch


def plain_coreset(features, num, start=0):
    """(num,) indices, farthest first; all points are touched for every centre, in float64."""
    points = features.double()
    if isinstance(start, int):
        chosen = [start]
        distance = (points - points[start]).square().sum(dim=1).sqrt()
    else:
        chosen = []
        distance = torch.stack([(points - points[i]).square().sum(dim=1).sqrt() for i in start]).mean(dim=0)
    available = torch.ones(len(points), dtype=torch.bool)
    available[chosen] = False
    while len(chosen) < num:
        farthest = int(torch.where(available, distance, -1.0).argmax())
        chosen.append(farthest)
        available[farthest] = False
        distance = torch.minimum(distance, (points - points[farthest]).square().sum(dim=1).sqrt())
    return torch.tensor(chosen)
