"""Does the exported graph answer as the PyTorch model does? Checked at every operating point before a bundle appears.

Axes: B images, L MoE layers, S tokens per image, K choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch.nn import functional

from exporter.bundle import Parity, Point
from exporter.profiling import images_per_batch
from exporter.session import run
from vmoe.config import ModelConfig
from vmoe.model import RoutingStatistics, VisionTransformer
from vmoe.preprocess import Preprocessing, normalize

# Gates closer than float32 rounding may be ranked either way. Over 256 images and 10 points none of the shipped model's
# 2,560 comparisons is affected, 1 of an earlier model's was; a graph that routes wrongly is off in most of them.
MAX_REROUTED = 0.01
# The same 1 % for the shipped model's 196 decisions per image (49 tokens in 4 layers): larger models have more to tie.
MAX_REROUTED_PER_DECISION = 5e-5
# One tie may show at every point. With fewer images than these it proves nothing, and none may differ.
FEWEST_IMAGES_WITH_A_TIE = 4


class ParityError(ValueError):
    """The graph and the model disagree; nothing gets exported."""


@dataclass(frozen=True)
class Answers:
    """What the model says of some images at one operating point, kept so that the model itself need not be.

    Attributes:
        point: None for a dense model.
        logits: (B, num_classes) float32.
        token_experts: (B, L, S, K) int16, the graph's output of that name; None for a dense model.
    """

    point: Point | None
    logits: npt.NDArray[np.float32]
    token_experts: npt.NDArray[np.int16] | None


@torch.inference_mode()
def model_answers(
    model: VisionTransformer,
    images: npt.NDArray[np.uint8],
    preprocessing: Preprocessing,
    points: Sequence[Point],
    *,
    max_selected_experts: int,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Answers, ...]:
    """Runs the model at every point, or once when it is dense and has no points.

    Arguments:
        images: (B, H, W, channels); a rest that fills no routing group is left out.
        max_selected_experts: the graph's.
        advance: called with the number of answers done.
    """
    cases: list[Point | None] = [*points] or [None]
    logits: list[list[npt.NDArray[np.float32]]] = [[] for _ in cases]
    served: list[list[npt.NDArray[np.int16]]] = [[] for _ in cases]
    moe = model.config.moe
    choices = 0 if moe is None else moe.choices_per_token(max_selected_experts)
    for batch in _batches(model.config, len(images)):
        inputs = torch.from_numpy(normalize(images[batch], preprocessing))
        for index, point in enumerate(cases):
            tensors = (
                (None, None) if point is None else model.operating_point_tensors(point.operating_point, len(inputs))
            )
            output = model(inputs, *tensors, with_statistics=point is not None)
            logits[index].append(output.logits.numpy())
            if output.statistics is not None:
                served[index].append(token_experts(output.statistics, choices).numpy().astype(np.int16))
            advance(len(inputs))
    return tuple(
        Answers(point, np.concatenate(logits[index]), np.concatenate(served[index]) if served[index] else None)
        for index, point in enumerate(cases)
    )


def check_parity(
    session: ort.InferenceSession,
    config: ModelConfig,
    images: npt.NDArray[np.uint8],
    preprocessing: Preprocessing,
    answers: Sequence[Answers],
    *,
    normalized_input: bool,
    tolerance: float = 1e-4,
    min_agreement: float | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Parity:
    """Compares logits and routing of the graph with the model's answers. Needs no torch, and so no second copy of the
    weights.

    Arguments:
        images: those that the model answered: (B, H, W, channels).
        normalized_input: the graph takes float32 images that are normalised already.
        tolerance: see `exporter.bundle.Parity`.
        min_agreement: given for products in fewer than 32 bits. Their errors are judged on average, for they turn
            single decisions of a router, and whatever follows from these.
        advance: called with the number of comparisons done.

    Raises:
        ParityError: names the point with the worst error.
    """
    worst, worst_point, agreed, rerouted, count = 0.0, answers[0].point, 0, 0, 0
    squares = 0.0
    for batch in _batches(config, len(images)):
        inputs = normalize(images[batch], preprocessing) if normalized_input else images[batch]
        for expected in answers:
            names = ["logits"] if expected.token_experts is None else ["logits", "token_experts"]
            outputs = run(session, inputs, expected.point, names)
            logits, found = expected.logits[batch], np.asarray(outputs[0], np.float32)
            same = np.ones(len(inputs), dtype=bool)
            if expected.token_experts is not None:
                same = (expected.token_experts[batch] == outputs[1]).all(axis=(1, 2, 3))
            error = float(np.abs(logits - found)[same].max(initial=0))
            if not np.isfinite(found).all():
                error = float("inf")
            if error > worst:
                worst, worst_point = error, expected.point
            squares += float(np.square(logits - found, dtype=np.float64).sum())
            agreed += int((logits.argmax(-1) == found.argmax(-1)).sum())
            rerouted += int((~same).sum())
            count += len(inputs)
            advance(len(inputs))
    spread = float(np.std([each.logits for each in answers]))
    parity = Parity(
        max_abs_error=worst,
        top1_agreement=agreed / count,
        rerouted=rerouted / count,
        tolerance=tolerance,
        num_comparisons=count,
        relative_error=(squares / (count * config.num_classes)) ** 0.5 / spread,
        min_agreement=min_agreement,
    )
    if min_agreement is not None:
        _check_rounded(parity, min_agreement)
        return parity
    if worst > tolerance:
        where = "" if worst_point is None else f" at operating point {worst_point.operating_point}"
        raise ParityError(
            f"logits of the graph differ from the model's by {worst:.3g}{where}, allowed is {tolerance:g}"
        )
    if parity.rerouted > (explained := _explained_by_rounding(config, len(answers), count)):
        raise ParityError(
            f"the graph routes {parity.rerouted:.2%} of the images differently from the model, "
            f"rounding explains at most {explained:.0%}"
        )
    return parity


def _check_rounded(parity: Parity, min_agreement: float) -> None:
    error = parity.relative_error
    if error is None or not error <= parity.tolerance:  # also not a number
        raise ParityError(
            f"logits of the rounded graph are off by {error:.3g} of their spread, allowed is {parity.tolerance:g}"
        )
    if parity.top1_agreement < min_agreement:
        raise ParityError(
            f"rounded graph and model agree on the best class of {parity.top1_agreement:.2%} of the images, "
            f"at least {min_agreement:.2%} is asked for"
        )


def _explained_by_rounding(config: ModelConfig, num_points: int, num_comparisons: int) -> float:
    """Share of the comparisons that may be rerouted by ties: of decisions, and of one image or group at all points."""
    if config.moe is None:
        return 0.0
    share = max(MAX_REROUTED, MAX_REROUTED_PER_DECISION * config.tokens_per_image * len(config.moe.layers))
    groups = num_comparisons // (num_points * config.moe.group_images)
    return max(share, 1 / groups) if groups >= FEWEST_IMAGES_WITH_A_TIE else share


def _batches(config: ModelConfig, num_images: int) -> Iterator[slice]:
    """Batches of whole routing groups; a rest that fills no group is left out."""
    group = 1 if config.moe is None else config.moe.group_images
    size, total = images_per_batch(config), num_images - num_images % group
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def token_experts(statistics: RoutingStatistics, max_selected_experts: int) -> torch.Tensor:
    """The graph's output of that name from the model's statistics: (B, L, S, K) int64, -1 where nobody served."""
    layers = []
    for layer in statistics.layers:
        served = layer.assignment.expert_index.where(layer.assignment.kept, torch.tensor(-1))
        served = served.reshape(statistics.kept.shape[0], -1, served.shape[-1])
        layers.append(functional.pad(served, (0, max_selected_experts - served.shape[-1]), value=-1))
    return torch.stack(layers, dim=1)
