"""A vision transformer written out from its equations, slow and obvious."""

import torch


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight + bias


def quick_gelu(x):
    return x / (1 + torch.exp(-1.702 * x))


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def attention(x, qkv_weight, qkv_bias, out_weight, out_bias, num_heads):
    """Tokens (L, D) to (L, D), one head after the other."""
    width = x.shape[1]
    size = width // num_heads
    parts = [slice(i * width, (i + 1) * width) for i in range(3)]
    query, key, value = (x @ qkv_weight[part].T + qkv_bias[part] for part in parts)
    heads = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        weights = torch.softmax(query[:, part] @ key[:, part].T / size**0.5, dim=1)
        heads.append(weights @ value[:, part])
    return torch.cat(heads, dim=1) @ out_weight.T + out_bias


def embed_patches(image, kernel):
    """(3, H, W) and a bias-free (D, 3, p, p) to (h, w, D), patch by patch."""
    size = kernel.shape[-1]
    rows, columns = image.shape[1] // size, image.shape[2] // size
    grid = torch.empty(rows, columns, len(kernel))
    for row in range(rows):
        for column in range(columns):
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            grid[row, column] = (kernel * patch).sum(dim=(1, 2, 3))
    return grid


def block_outputs(grid, class_token, positions, pre_norm, blocks, num_heads, eps, activation):
    """Patch tokens after each block, (h, w, D), without the class token.

    `pre_norm` and the norms in `blocks` are (weight, bias); a block has norm1, qkv, out, norm2, fc1, fc2.
    """
    h, w, width = grid.shape
    x = torch.cat([class_token.view(1, width), grid.reshape(h * w, width)]) + positions
    x = layer_norm(x, *pre_norm, eps)
    outputs = []
    for block in blocks:
        x = x + attention(layer_norm(x, *block["norm1"], eps), *block["qkv"], *block["out"], num_heads)
        hidden = activation(layer_norm(x, *block["norm2"], eps) @ block["fc1"][0].T + block["fc1"][1])
        x = x + hidden @ block["fc2"][0].T + block["fc2"][1]
        outputs.append(x[1:].reshape(h, w, width))
    return outputs
