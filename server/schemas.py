"""Bodies of the answers, as they appear in the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from server.provenance import Provenance


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True)


class Problem(_Body):
    """RFC 9457 problem details."""

    type: str = Field(description="URI that identifies the kind of problem")
    title: str = Field(description="the kind of problem in words")
    status: int = Field(description="HTTP status")
    detail: str = Field(description="what was wrong, the value seen, and what would be right")
    code: str = Field(description="stable name of the kind of problem, for programs")
    request_id: str = Field(description="as in the header X-Request-ID")


class Prediction(_Body):
    index: int = Field(description="class index")
    label: str = Field(description="class name")
    probability: float = Field(description="softmax of the logits")


class OperatingPointBody(_Body):
    """Where the image was processed, and what was measured there."""

    capacity_factor: float = Field(description="C: buffer slots over assignments")
    num_selected_experts: int = Field(description="K: experts per token")
    slots: list[int] = Field(description="buffer slots per expert, for each MoE layer")
    accuracy: float | None = Field(description="measured top-1 accuracy; null where nothing was measured")
    relative_compute: float | None = Field(
        description="multiply-accumulates over those of the full point, time over its time where several bundles are "
        "served; null where the manifest has no such point"
    )
    bundle: str | None = Field(
        default=None,
        exclude_if=lambda name: name is None,
        description="of several bundles the one that ran it, where that is not the one of `model`; else left out",
    )


class Times(_Body):
    """Stage times in milliseconds."""

    decode_ms: float = Field(description="waiting for a decoder and decoding")
    queue_ms: float = Field(description="waiting for the model")
    inference_ms: float = Field(description="the whole batch in the model")
    total_ms: float = Field(description="from the request's headers to this result, upload included")


class ExpertExplanation(_Body):
    expert: int = Field(description="number of the expert, from 0")
    patches: list[tuple[int, int]] = Field(
        description="(row, column) of each patch processed, from the top left; row r starts at pixel r * patch height"
    )
    class_token: bool | None = Field(
        description="whether the class token was processed too; null for a model without one"
    )


class LayerExplanation(_Body):
    layer: int = Field(description="index of the transformer block")
    experts: list[ExpertExplanation] = Field(description="every expert, in order")


class Explanation(_Body):
    """Which patches the experts processed. A patch may occur under up to K experts, or under none: then the layer left
    it as it was. The model's tokens are the class token, where it has one, then the patches row by row: patch (row,
    column) is token row * columns + column, one more behind a class token."""

    grid: tuple[int, int] = Field(description="(rows, columns) of patches")
    layers: list[LayerExplanation] = Field(description="every MoE layer, in order")


class Result(_Body):
    """The answer to one image."""

    predictions: list[Prediction] = Field(description="most probable first")
    operating_point: OperatingPointBody | None = Field(description="null for a dense model")
    budget: str = Field(description="the budget under which it counted; `custom` for a point of the client's own")
    degraded: bool = Field(description="served below the best point that the request allowed")
    reason: Literal["ceiling", "slack", "load", "pinned", "fallback"] = Field(
        description="`ceiling`: served at the best point allowed; `slack`: the deadline left no time for it; `load`: "
        "others needed the time; `pinned`: the client chose the point; `fallback`: the inference servers are "
        "away, and the gateway computes by itself"
    )
    deadline_ms: float = Field(description="when the answer was due, from the end of the upload")
    deadline_met: bool = Field(description="the model was done by then")
    kept: list[float] = Field(description="share of the token-to-expert assignments processed, for each MoE layer")
    times: Times = Field(description="how long each stage took")
    explanation: Explanation | None = Field(default=None, description="only with explain=true")


class ImageFailure(_Body):
    """Stands in the list for an image that got no answer."""

    error: Problem = Field(description="why")


class _Answer(_Body):
    request_id: str = Field(description="as in the header X-Request-ID")
    model: str = Field(description="name of the bundle that the gateway serves")
    version: str = Field(description="its version in the model repository")


class Classification(_Answer, Result):
    """The answer to a request with one image."""


class Classifications(_Answer):
    """The answer to a request with several images."""

    results: list[Result | ImageFailure] = Field(description="one entry per image, in the order of the request")


class Health(_Body):
    status: str = Field(description="`ok`; of /readyz: `starting`, `ready`, `leaving`, `draining`, `failed`")


class LatencyBody(_Body):
    batch_size: int = Field(description="images in the batch")
    median_ms: float = Field(description="median of the whole batch")
    p99_ms: float = Field(description="99th percentile of the whole batch")


class ModelPoint(OperatingPointBody):
    """An operating point of the manifest."""

    dominated: bool = Field(description="another point is at least as accurate at no more compute; budgets skip it")
    latency: list[LatencyBody] = Field(description="measured per batch size where the bundle was profiled")


class BudgetPoint(_Body):
    capacity_factor: float = Field(description="C: buffer slots over assignments")
    num_selected_experts: int = Field(description="K: experts per token")
    accuracy: float | None = Field(description="measured top-1 accuracy; null where nothing was measured")


class BudgetBody(_Body):
    """A class of requests."""

    floor: BudgetPoint | None = Field(description="cheapest point it may be degraded to; null for a dense model")
    ceiling: BudgetPoint | None = Field(description="best point it may use; null for a dense model")
    deadline_ms: float = Field(description="default of `deadline_ms`, from the end of the upload")
    weight: float = Field(description="share of the machine under contention, relative to the other budgets")


class Model(_Body):
    """Summary of a manifest."""

    name: str = Field(description="of the bundle")
    version: str = Field(description="in the model repository")
    labels: list[str] = Field(description="class names, in the order of `index`")
    image_size: tuple[int, int] = Field(description="(height, width) that images are resized to")
    channels: int = Field(description="of an image: 1 is grey, 3 is RGB")
    max_selected_experts: int = Field(description="largest num_selected_experts; 0 for a dense model")
    max_capacity_factor: float | None = Field(description="largest capacity_factor at K = 1; divide by K for others")
    points: list[ModelPoint] = Field(description="from the cheapest to the full one; empty for a dense model")
    budgets: dict[str, BudgetBody] = Field(description="what `budget=` may name")


class Models(_Body):
    models: list[Model] = Field(description="the one that the gateway serves")


class QueueState(_Body):
    """Now."""

    waiting_images: int = Field(description="admitted and not yet in a batch")
    waiting_bytes: int = Field(description="of the images that wait")
    oldest_ms: float = Field(description="age of the image that has waited longest")
    running_batches: int = Field(description="in the model")
    arrival_rate_hz: float = Field(description="images offered per second lately, refused ones included")
    latency_scale: float = Field(description="this machine's time for a batch over the profile's")


class PolicyBody(_Body):
    """The policy in force."""

    policy: str = Field(description="name of the policy")
    parameters: dict[str, float] = Field(description="of that policy, by name; empty for one that has none")
    quantile: float = Field(description="of predicted latency, on which admission relies")
    source: str = Field(description="the file, or the default that it came from")
    max_batch_size: int = Field(description="images per batch")
    workers: int = Field(description="batches that this process may run at once, now; not the setting workers")
    budgets: dict[str, BudgetBody] = Field(description="what `budget=` may name")
    provenance: Provenance | None = Field(default=None, description="of a tuned policy; null for any other")
    state: QueueState = Field(description="of the queue")
