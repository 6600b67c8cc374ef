"""ADPretrain written out plainly: losses over whole matrices or one token at a time, residuals, projector, a step."""

import math

import torch
import torch.nn.functional as F


def plain_angle_loss(view1, view2, patch_label, center, temperature=0.15):
    """Exponentials, sums and logarithms as the paper writes them, with both whole matrices of similarities."""
    if center is not None:
        view1, view2 = view1 - center, view2 - center
    view1, view2 = F.normalize(view1, dim=1), F.normalize(view2, dim=1)
    tokens, labels = torch.cat([view1, view2]), torch.cat([patch_label, patch_label]) == 1
    positive = ((view1 * view2).sum(dim=1) / temperature).exp().repeat(2)
    normal, anomalous = tokens[~labels], tokens[labels]
    negative_of_normal = (normal @ anomalous.T / temperature).exp().sum(dim=1)
    negative_of_anomalous = (anomalous @ normal.T / temperature).exp().sum(dim=1)
    losses = [
        -(positive[~labels] / negative_of_normal).log(),
        -(positive[labels] / negative_of_anomalous).log(),
    ]
    return torch.cat(losses).mean()


def plain_norm_loss(features, patch_label, form="root"):
    """One token at a time."""
    sizes = []
    for token in features:
        norm = token.norm()
        sizes.append(torch.sqrt((norm if form == "root" else norm**2) + 1) - 1)
    anomalous = [size for size, label in zip(sizes, patch_label, strict=True) if label]
    normal = [size for size, label in zip(sizes, patch_label, strict=True) if not label]
    r_max = min([0.4] + [0.9 * size.item() for size in anomalous])
    r_min, bound = 0.99 * r_max, r_max + 0.75
    sets = [
        [size - r_max for size in normal if size > r_max],
        [r_min - size for size in normal if size < r_min],
        [bound - size for size in anomalous if size < bound],
    ]
    total = 0.0 * features.sum()
    for beyond in sets:
        for x in beyond:
            total = total + math.exp(x.item()) * torch.log1p(torch.exp(x)) / len(beyond)
    return total


def plain_residual(features, reference):
    """One token at a time."""
    rest = torch.empty_like(features)
    for image in range(features.shape[0]):
        for row in range(features.shape[2]):
            for column in range(features.shape[3]):
                token = features[image, :, row, column]
                nearest = reference[F.cosine_similarity(token[None], reference).argmax()]
                rest[image, :, row, column] = token - nearest
    return rest


def plain_projection(level, features):
    """One level's projector, one image at a time, with torch's attention and convolution.

    Args:
        level: a `LevelProjector`.
        features: (B, C, h, w).
    """
    (layer,) = level.layers
    results = []
    for image in features:
        tokens = image.flatten(1).T[None]  # (1, P, C)
        reference = level.ref_proj.project(level.x_ref.transpose(1, 2)).transpose(1, 2)
        attended, _ = layer.cross_attn(tokens, reference, reference)
        tokens = tokens - attended
        hidden = layer.mlp.fc1(tokens)
        gate = torch.sigmoid(layer.mlp.se.fc2(torch.relu(layer.mlp.se.fc1(hidden.mean(dim=1)))))
        tokens = tokens + layer.mlp.fc2(F.gelu(hidden * gate[:, None]))
        results.append(tokens[0].T.reshape(image.shape))
    return torch.stack(results)


def plain_label_by_count(masks, grid):
    """Counts pixel by pixel; the patches divide the image evenly."""
    batch, height, width = masks.shape
    rows, columns = height // grid[0], width // grid[1]
    labels = torch.zeros(batch, *grid, dtype=torch.bool)
    for image in range(batch):
        for row in range(grid[0]):
            for column in range(grid[1]):
                patch = masks[image, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
                labels[image, row, column] = int((patch != 0).sum()) > min(32, rows * columns / 6)
    return labels


def plain_step(projector, first, second, references, masks, centre, temperature=0.15):
    """Loss of one step.

    Args:
        projector: of ours; only its weights are used.
        first, second: (B, C, h, w) features per level of the two views.
        references: for each image, (R, C) tokens per level.
        masks: (B, H, W), 1 = defect.
        centre: (C,) per level.
    """
    total = 0.0
    for number in range(len(first)):
        level = getattr(projector, f"l{number + 1}_proj")
        views = []
        for features in (first[number], second[number]):
            rest = [plain_residual(image[None], own[number]) for image, own in zip(features, references, strict=True)]
            views.append(plain_projection(level, torch.cat(rest)))
        grid = views[0].shape[2:]
        by_count = plain_label_by_count(masks, grid).flatten()
        by_nearest = F.interpolate(masks.float()[:, None], size=grid, mode="nearest").flatten()
        tokens = [view.permute(0, 2, 3, 1).reshape(-1, view.shape[1]) for view in views]
        if by_count.any() and not by_count.all():
            total = total + plain_angle_loss(*tokens, by_count, centre[number], temperature)
        for view in tokens:
            total = total + plain_norm_loss(view, by_nearest)
    return total
