"""Accuracy of a model per operating point.

Axes: N images of a batch, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vmoe.data import LabelledImages
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing, scale_and_offset


@dataclass(frozen=True)
class PointAccuracy:
    """Attributes:
    point: None for a dense model.
    accuracy: top-1, between 0 and 1.
    kept: mean share of assignments processed, per MoE layer.
    """

    point: OperatingPoint | None
    slots: tuple[int, ...]
    accuracy: float
    kept: tuple[float, ...]
    num_images: int


@torch.inference_mode()
def evaluate(
    model: VisionTransformer,
    data: LabelledImages,
    preprocessing: Preprocessing,
    points: Sequence[OperatingPoint | None],
    *,
    batch_size: int = 250,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[PointAccuracy]:
    """Top-1 accuracy at each operating point, over the first `limit` images (all when None).

    Arguments:
        model: in evaluation mode, on any device.
        batch_size: images per forward pass; rounded down to whole routing groups, a rest that fills none is left out.
        advance: called with the number of images done, for a progress bar.

    Raises:
        ValueError: there is no image, or an image does not fit the model.
    """
    device = model.head.weight.device
    scale, offset = (torch.from_numpy(a).to(device) for a in scale_and_offset(preprocessing))
    group = 1 if model.config.moe is None else model.config.moe.group_images
    batch_size = max(group, batch_size - batch_size % group)
    total = len(data) if limit is None else min(limit, len(data))
    total -= total % group
    if total < 1:
        raise ValueError(
            f"no images to evaluate: {len(data)} in the data set, limit {limit}, {group} per routing group"
        )
    correct = np.zeros(len(points), dtype=np.int64)
    kept = [torch.zeros(0)] * len(points)
    for start in range(0, total, batch_size):
        indices = np.arange(start, min(start + batch_size, total))
        images, targets = data.read(indices)
        inputs = torch.from_numpy(images).to(device).float() * scale + offset
        for index, point in enumerate(points):
            tensors = (None, None) if point is None else model.operating_point_tensors(point, len(indices))
            output = model(inputs, *tensors, with_statistics=True)
            correct[index] += int((output.logits.argmax(-1).cpu().numpy() == targets).sum())
            if output.statistics is not None:
                batch_kept = output.statistics.kept.double().sum(0).cpu()
                kept[index] = batch_kept if start == 0 else kept[index] + batch_kept
            advance(len(indices))
    return [
        PointAccuracy(
            point,
            () if point is None else model.config.slots(point),
            int(correct[index]) / total,
            tuple((kept[index] / total).tolist()),
            total,
        )
        for index, point in enumerate(points)
    ]
