"""Does the exported graph answer as the PyTorch model does? Checked at every operating point before a bundle appears.

Axes: B images, L MoE layers, S tokens per image, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch.nn import functional

from exporter.bundle import Parity, Point
from exporter.session import run
from vmoe.model import RoutingStatistics, VisionTransformer
from vmoe.preprocess import Preprocessing, normalize

# Gates closer than float32 rounding may be ranked either way. Over 256 images and 10 points none of the shipped model's
# 2,560 comparisons is affected, 1 of an earlier model's was; a graph that routes wrongly is off in most of them.
MAX_REROUTED = 0.01


class ParityError(ValueError):
    """The graph and the model disagree; nothing gets exported."""


@torch.inference_mode()
def check_parity(
    model: VisionTransformer,
    session: ort.InferenceSession,
    images: npt.NDArray[np.uint8],
    preprocessing: Preprocessing,
    points: Sequence[Point | None],
    *,
    normalized_input: bool,
    tolerance: float = 1e-4,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> Parity:
    """Compares logits and routing of both on the same images at every point.

    Arguments:
        images: (B, H, W, channels); a rest that fills no routing group is left out.
        normalized_input: the graph takes float32 images that are normalised already.
        advance: called with the number of comparisons done.

    Raises:
        ParityError: names the point with the worst error.
    """
    group = 1 if model.config.moe is None else model.config.moe.group_images
    batch_size = max(group, batch_size - batch_size % group)
    total = len(images) - len(images) % group
    worst, worst_point, agreed, rerouted = 0.0, points[0], 0, 0
    for start in range(0, total, batch_size):
        batch = images[start : min(start + batch_size, total)]
        inputs = normalize(batch, preprocessing)
        for point in points:
            names = ["logits"] if point is None else ["logits", "token_experts"]
            found = run(session, inputs if normalized_input else batch, point, names)
            tensors = (
                (None, None) if point is None else model.operating_point_tensors(point.operating_point, len(batch))
            )
            expected = model(torch.from_numpy(inputs), *tensors, with_statistics=point is not None)
            logits = expected.logits.numpy()
            same = np.ones(len(batch), dtype=bool)
            if expected.statistics is not None:
                mine = token_experts(expected.statistics, found[1].shape[-1]).numpy()
                same = (mine == found[1]).all(axis=(1, 2, 3))
            error = float(np.abs(logits - found[0])[same].max(initial=0))
            if not np.isfinite(found[0]).all():
                error = float("inf")
            if error > worst:
                worst, worst_point = error, point
            agreed += int((logits.argmax(-1) == found[0].argmax(-1)).sum())
            rerouted += int((~same).sum())
            advance(len(batch))
    count = total * len(points)
    parity = Parity(
        max_abs_error=worst,
        top1_agreement=agreed / count,
        rerouted=rerouted / count,
        tolerance=tolerance,
        num_comparisons=count,
    )
    if worst > tolerance:
        where = "" if worst_point is None else f" at operating point {worst_point.operating_point}"
        raise ParityError(
            f"logits of the graph differ from the model's by {worst:.3g}{where}, allowed is {tolerance:g}"
        )
    if parity.rerouted > MAX_REROUTED:
        raise ParityError(
            f"the graph routes {parity.rerouted:.2%} of the images differently from the model, "
            f"rounding explains at most {MAX_REROUTED:.0%}"
        )
    return parity


def token_experts(statistics: RoutingStatistics, max_selected_experts: int) -> torch.Tensor:
    """The graph's output of that name from the model's statistics: (B, L, S, K) int64, -1 where nobody served."""
    layers = []
    for layer in statistics.layers:
        served = layer.assignment.expert_index.where(layer.assignment.kept, torch.tensor(-1))
        served = served.reshape(statistics.kept.shape[0], -1, served.shape[-1])
        layers.append(functional.pad(served, (0, max_selected_experts - served.shape[-1]), value=-1))
    return torch.stack(layers, dim=1)
