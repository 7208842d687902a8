"""Results of the gateway to the bodies of `schemas`. Axis letters: L MoE layers, E experts, S tokens, K choices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from exporter.bundle import Manifest, Point
from server.gateway import Served
from server.policy import Decision, FixedPolicy
from server.schemas import (
    BudgetPoint,
    ExpertExplanation,
    Explanation,
    LatencyBody,
    LayerExplanation,
    Model,
    ModelPoint,
    OperatingPointBody,
    Prediction,
    Result,
    Times,
)
from vmoe.config import ModelConfig


def describe_result(served: Served, manifest: Manifest, top: int) -> Result:
    inference = served.inference
    return Result(
        predictions=_predictions(inference.logits, manifest.labels, top),
        operating_point=None if served.decision is None else _operating_point(served.decision),
        kept=[round(float(share), 6) for share in inference.kept],
        times=Times(
            decode_ms=_milliseconds(served.decode_s),
            queue_ms=_milliseconds(inference.queue_s),
            inference_ms=_milliseconds(inference.inference_s),
            total_ms=_milliseconds(served.total_s),
        ),
        explanation=(
            None if inference.token_experts is None else explain_tokens(inference.token_experts, manifest.architecture)
        ),
    )


def explain_tokens(token_experts: npt.NDArray[np.int64], architecture: ModelConfig) -> Explanation:
    """Turns `token_experts` (L, S, K), -1 where no expert processed the choice, into patches per layer and expert."""
    assert architecture.moe is not None, "a dense model has no token_experts"
    rows, columns = architecture.grid
    has_class_token = architecture.classifier == "token"
    layers = []
    for layer, choices in zip(architecture.moe.layers, token_experts, strict=True):
        experts = []
        for expert in range(architecture.moe.num_experts):
            processed = (choices == expert).any(axis=-1)  # (S,)
            patches = np.flatnonzero(processed[1:] if has_class_token else processed)
            experts.append(
                ExpertExplanation(
                    expert=expert,
                    patches=[divmod(int(patch), columns) for patch in patches],
                    class_token=bool(processed[0]) if has_class_token else None,
                )
            )
        layers.append(LayerExplanation(layer=layer, experts=experts))
    return Explanation(grid=(rows, columns), layers=layers)


def describe_model(manifest: Manifest, policy: FixedPolicy) -> Model:
    moe, preprocessing = manifest.architecture.moe, manifest.preprocessing
    return Model(
        name=manifest.name,
        version=manifest.version,
        labels=list(manifest.labels),
        image_size=preprocessing.image_size,
        channels=preprocessing.channels,
        max_selected_experts=manifest.max_selected_experts,
        max_capacity_factor=None if moe is None else float(moe.num_experts),
        points=[_model_point(point) for point in manifest.points],
        budgets={
            budget: None
            if decision is None
            else BudgetPoint(
                capacity_factor=decision.point.capacity_factor,
                num_selected_experts=decision.point.num_selected_experts,
            )
            for budget, decision in policy.budgets.items()
        },
    )


def _predictions(logits: npt.NDArray[np.float32], labels: tuple[str, ...], top: int) -> list[Prediction]:
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max())
    probabilities = weights / weights.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [Prediction(index=int(i), label=labels[i], probability=float(probabilities[i])) for i in best]


def _operating_point(decision: Decision) -> OperatingPointBody:
    measured = decision.measured
    return OperatingPointBody(
        capacity_factor=decision.point.capacity_factor,
        num_selected_experts=decision.point.num_selected_experts,
        slots=list(decision.slots),
        accuracy=None if measured is None else measured.accuracy,
        relative_compute=None if measured is None else measured.relative_compute,
    )


def _model_point(point: Point) -> ModelPoint:
    return ModelPoint(
        capacity_factor=point.capacity_factor,
        num_selected_experts=point.num_selected_experts,
        slots=list(point.slots),
        accuracy=point.accuracy,
        relative_compute=point.relative_compute,
        dominated=point.dominated,
        latency=[
            LatencyBody(
                batch_size=latency.batch_size,
                median_ms=_milliseconds(latency.median_s),
                p99_ms=_milliseconds(latency.p99_s),
            )
            for latency in point.latency
        ],
    )


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
