"""Random changes of training images, drawn for a whole batch at once.

Axes: N images, H and W pixels, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from vmoe.parallel import WHOLE, Shard


def augment(
    images: Tensor,
    generator: torch.Generator,
    *,
    flip: float,
    shift: float,
    scale: float,
    erase: float,
    shard: Shard = WHOLE,
) -> Tensor:
    """Random flip, shift, zoom and erasure of a batch, the same on every device for the same generator state.

    Arguments:
        images: (N, H, W, C) float, normalised.
        generator: a CPU generator.
        flip: probability that an image is mirrored left to right.
        shift: largest shift, as a share of the side; the border is repeated.
        scale: largest zoom in or out, as a ratio minus 1.
        erase: probability that a rectangle of 2 to 20 % of the area is set to the mean (random erasing, 1708.04896).
        shard: which part of the batch these images are; the numbers of the whole are drawn.
    """
    count, height, width, _ = images.shape
    rows = shard.rows(count * shard.count)
    uniform = torch.rand(8, count * shard.count, generator=generator)[:, rows].to(images.device)
    chance = torch.rand(count * shard.count, generator=generator)[rows].to(images.device)
    mirror = torch.where(uniform[0] < flip, -1.0, 1.0)
    zoom = (uniform[1] * 2 - 1) * scale + 1
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = mirror * zoom, zoom
    theta[:, 0, 2], theta[:, 1, 2] = (uniform[2] * 2 - 1) * 2 * shift, (uniform[3] * 2 - 1) * 2 * shift
    grid = functional.affine_grid(theta, [count, 1, height, width], align_corners=False)
    moved = functional.grid_sample(images.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)

    area = 0.02 + 0.18 * uniform[4]
    aspect = torch.exp((uniform[5] * 2 - 1) * math.log(3.0))
    half_height, half_width = (area * aspect).sqrt() / 2 * height, (area / aspect).sqrt() / 2 * width
    y = torch.arange(height, device=images.device) - uniform[6, :, None] * height
    x = torch.arange(width, device=images.device) - uniform[7, :, None] * width
    hole = (y.abs() < half_height[:, None])[:, :, None] & (x.abs() < half_width[:, None])[:, None, :]
    erased = (chance < erase)[:, None, None] & hole
    return moved.permute(0, 2, 3, 1).masked_fill(erased[..., None], 0.0)
