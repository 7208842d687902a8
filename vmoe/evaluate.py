"""Accuracy of a model per operating point.

Axes: N images of a batch, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vmoe.data import LabelledImages
from vmoe.model import ModelOutput, VisionTransformer
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


@dataclass(frozen=True)
class ForwardPass:
    """What one batch answered at one operating point.

    Attributes:
        point: its index among the points.
        indices, targets: (N,) of the images in the data.
        correct: (N,) bool.
    """

    point: int
    indices: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    correct: npt.NDArray[np.bool_]
    output: ModelOutput


@torch.inference_mode()
def forward_passes(
    model: VisionTransformer,
    data: LabelledImages,
    preprocessing: Preprocessing,
    points: Sequence[OperatingPoint | None],
    order: npt.NDArray[np.int64],
    *,
    batch_size: int = 250,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[ForwardPass]:
    """Every point for every batch, with statistics; images are read once.

    Arguments:
        model: in evaluation mode, on any device.
        order: images of `data` in the order in which they form batches and routing groups; whole groups of them.
        batch_size: images per forward pass; rounded down to whole routing groups, at least one.
        advance: called with the number of images done, for a progress bar.
    """
    device = model.head.weight.device
    scale, offset = (torch.from_numpy(a).to(device) for a in scale_and_offset(preprocessing))
    group = 1 if model.config.moe is None else model.config.moe.group_images
    batch_size = max(group, batch_size - batch_size % group)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        images, targets = data.read(indices)
        inputs = torch.from_numpy(images).to(device).float() * scale + offset
        for index, point in enumerate(points):
            tensors = (None, None) if point is None else model.operating_point_tensors(point, len(indices))
            output = model(inputs, *tensors, with_statistics=True)
            correct = output.logits.argmax(-1).cpu().numpy() == targets
            yield ForwardPass(index, indices, targets, correct, output)
            advance(len(indices))


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

    Arguments are those of `forward_passes`; images that fill no routing group are left out.

    Raises:
        ValueError: there is no image, or an image does not fit the model.
    """
    group = 1 if model.config.moe is None else model.config.moe.group_images
    total = len(data) if limit is None else min(limit, len(data))
    total -= total % group
    if total < 1:
        raise ValueError(
            f"no images to evaluate: {len(data)} in the data set, limit {limit}, {group} per routing group"
        )
    correct = np.zeros(len(points), dtype=np.int64)
    kept = [torch.zeros(0)] * len(points)
    for done in forward_passes(
        model, data, preprocessing, points, np.arange(total), batch_size=batch_size, advance=advance
    ):
        correct[done.point] += int(done.correct.sum())
        if done.output.statistics is not None:
            batch_kept = done.output.statistics.kept.double().sum(0).cpu()
            kept[done.point] = batch_kept if done.indices[0] == 0 else kept[done.point] + batch_kept
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
