"""Results of the gateway to the bodies of `schemas`. Axis letters: L MoE layers, E experts, S tokens, K choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.bundle import Manifest, Point
from server.gateway import Served
from server.ladder import Ladder, Rung
from server.policy_file import ActivePolicy
from server.query import Ask
from server.scheduler import Scheduler
from server.schemas import (
    BudgetBody,
    BudgetPoint,
    Classification,
    ExpertExplanation,
    Explanation,
    LatencyBody,
    LayerExplanation,
    Model,
    ModelPoint,
    OperatingPointBody,
    PolicyBody,
    QueueState,
    Result,
    Times,
)
from server.work import Inference
from vmoe.config import ModelConfig


def describe_answer(served: Served, manifest: Manifest, ask: Ask, request_id: str) -> Classification:
    """To a request with one image."""
    fields = _result_fields(served, manifest, ask)
    return Classification(request_id=request_id, model=manifest.name, version=manifest.version, **fields)


def describe_result(served: Served, manifest: Manifest, ask: Ask) -> Result:
    """Of one image among several."""
    return Result(**_result_fields(served, manifest, ask))


def _result_fields(served: Served, manifest: Manifest, ask: Ask) -> dict[str, Any]:
    """Of `Result`. Both bodies are built of them at once: pydantic checks what it is given, each time."""
    inference = served.inference
    return {
        "predictions": _predictions(inference, manifest.labels, ask.top),
        "operating_point": _operating_point(inference.rung),
        "budget": ask.budget.name,
        "degraded": inference.degraded,
        "reason": inference.reason,
        "deadline_ms": _milliseconds(ask.deadline_s),
        "deadline_met": inference.deadline_met,
        "kept": [round(share, 6) for share in inference.kept],
        "times": Times(
            decode_ms=_milliseconds(served.decode_s),
            queue_ms=_milliseconds(inference.queue_s),
            inference_ms=_milliseconds(inference.inference_s),
            total_ms=_milliseconds(served.total_s),
        ),
        "explanation": (
            None if inference.token_experts is None else explain_tokens(inference.token_experts, manifest.architecture)
        ),
    }


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


def server_timing(results: Sequence[Result]) -> str:
    """The header `Server-Timing`: stages of the slowest image."""
    times = max((result.times for result in results), key=lambda times: times.total_ms)
    return (
        f"decode;dur={times.decode_ms:g}, queue;dur={times.queue_ms:g}, "
        f"inference;dur={times.inference_ms:g}, total;dur={times.total_ms:g}"
    )


def describe_model(manifest: Manifest, policy: ActivePolicy, ladder: Ladder) -> Model:
    moe, preprocessing = manifest.architecture.moe, manifest.preprocessing
    return Model(
        name=manifest.name,
        version=manifest.version,
        labels=list(manifest.labels),
        image_size=preprocessing.image_size,
        channels=preprocessing.channels,
        max_selected_experts=manifest.max_selected_experts,
        max_capacity_factor=None if moe is None else float(moe.num_experts),
        points=[_model_point(rung.measured, rung.model) for rung in ladder.rungs if rung.measured],
        budgets=_budgets(policy, ladder),
    )


def describe_policy(policy: ActivePolicy, scheduler: Scheduler, now: float) -> PolicyBody:
    """Arguments:
    now: on the scheduler's clock.
    """
    queue = scheduler.queue
    return PolicyBody(
        policy=policy.config.policy,
        parameters=policy.parameters,
        quantile=policy.config.quantile,
        source=policy.source,
        max_batch_size=scheduler.limits.max_batch_size,
        workers=scheduler.workers,
        budgets=_budgets(policy, scheduler.ladder),
        provenance=policy.config.provenance,
        state=QueueState(
            waiting_images=len(queue),
            waiting_bytes=queue.size_bytes,
            oldest_ms=_milliseconds(scheduler.oldest_age_s(now)),
            running_batches=len(scheduler.running),
            arrival_rate_hz=round(scheduler.arrival_rate_hz(now), 3),
            latency_scale=round(scheduler.latency.scale, 4),
        ),
    )


def _budgets(policy: ActivePolicy, ladder: Ladder) -> dict[str, BudgetBody]:
    return {
        name: BudgetBody(
            floor=_budget_point(ladder.rungs[budget.floor]),
            ceiling=_budget_point(ladder.rungs[budget.ceiling]),
            deadline_ms=_milliseconds(budget.deadline_s),
            weight=budget.weight,
        )
        for name, budget in policy.budgets.items()
    }


def _budget_point(rung: Rung) -> BudgetPoint | None:
    if rung.point is None:
        return None
    return BudgetPoint(
        capacity_factor=rung.point.capacity_factor,
        num_selected_experts=rung.num_selected_experts,
        accuracy=rung.accuracy,
    )


def _predictions(inference: Inference, labels: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """Of `Prediction`, which pydantic makes of them faster than we could."""
    found = zip(inference.classes[:top].tolist(), inference.probabilities[:top].tolist(), strict=True)
    return [{"index": index, "label": labels[index], "probability": probability} for index, probability in found]


def _operating_point(rung: Rung) -> OperatingPointBody | None:
    if rung.point is None:
        return None
    return OperatingPointBody(
        capacity_factor=rung.point.capacity_factor,
        num_selected_experts=rung.num_selected_experts,
        slots=list(rung.slots),
        accuracy=rung.accuracy,
        relative_compute=None if rung.measured is None else rung.measured.relative_compute,
        bundle=rung.model or None,
    )


def _model_point(point: Point, model: str) -> ModelPoint:
    return ModelPoint(
        capacity_factor=point.capacity_factor,
        num_selected_experts=point.num_selected_experts,
        slots=list(point.slots),
        accuracy=point.accuracy,
        relative_compute=point.relative_compute,
        bundle=model or None,
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
