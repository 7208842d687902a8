"""Every Prometheus series of the gateway. Labels come from small fixed sets: points of clients are `custom`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from server.backends.base import Outputs
from server.policy import Decision
from server.queue import Inference
from vmoe.config import MoeConfig

# Up to the default request timeout of 10 s; fine around the few milliseconds that a small model takes.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_CAPACITY_FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.05, 1.5, 2.0, 4.0)
_SELECTED_EXPERTS = (1, 2, 3, 4, 6, 8)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)

INVALID = "invalid"  # label `budget` of a request whose parameters were refused
CUSTOM = "custom"  # label `budget` of a request with its own point, label `operating_point` of an unmeasured one
DENSE = "dense"  # label `operating_point` of a model without experts
STAGES = ("decode", "queue", "inference", "total")


class Metrics:
    """The series of one model, in the registry that is passed in.

    Arguments:
        registry: where the series are registered.
        moe: layers and experts that get series; None for a dense model.
    """

    def __init__(self, registry: CollectorRegistry, moe: MoeConfig | None) -> None:
        # prometheus_client appends _total to the names of counters.
        self._requests = Counter("vmoe_requests", "Requests to /classify.", ("budget", "status"), registry=registry)
        self._request_seconds = Histogram(
            "vmoe_request_seconds", "From headers to answer.", ("budget",), buckets=_SECONDS, registry=registry
        )
        self._in_flight = Gauge("vmoe_in_flight_requests", "Requests to /classify under way.", registry=registry)
        self._image_errors = Counter(
            "vmoe_image_errors", "Images refused, by code of the problem.", ("code",), registry=registry
        )
        self._batch_size = Histogram("vmoe_batch_size", "Images per batch.", buckets=_BATCH_SIZES, registry=registry)
        self._served = Counter(
            "vmoe_served_images", "Images answered, by operating point.", ("operating_point",), registry=registry
        )
        self._capacity_factor = Histogram(
            "vmoe_capacity_factor", "Capacity factor of images answered.", buckets=_CAPACITY_FACTORS, registry=registry
        )
        self._num_selected_experts = Histogram(
            "vmoe_num_selected_experts", "K of images answered.", buckets=_SELECTED_EXPERTS, registry=registry
        )
        stage_seconds = Histogram(
            "vmoe_stage_seconds", "Time of one image in a stage.", ("stage",), buckets=_SECONDS, registry=registry
        )
        kept = Histogram(
            "vmoe_kept_ratio", "Share of assignments processed.", ("layer",), buckets=_SHARES, registry=registry
        )
        tokens = Counter("vmoe_expert_tokens", "Tokens processed by an expert.", ("layer", "expert"), registry=registry)
        # Looked up once, not per image: a label lookup costs about as much as the count itself.
        self._stage_seconds = [stage_seconds.labels(stage) for stage in STAGES]
        layers, num_experts = ((), 0) if moe is None else (moe.layers, moe.num_experts)
        self._kept = [kept.labels(str(layer)) for layer in layers]
        self._expert_tokens = [[tokens.labels(str(layer), str(e)) for e in range(num_experts)] for layer in layers]

    @contextmanager
    def request_in_flight(self) -> Iterator[None]:
        with self._in_flight.track_inprogress():
            yield

    def request_done(self, budget: str, status: int, seconds: float) -> None:
        self._requests.labels(budget, str(status)).inc()
        self._request_seconds.labels(budget).observe(seconds)

    def image_refused(self, code: str) -> None:
        self._image_errors.labels(code).inc()

    def batch_done(self, outputs: Outputs) -> None:
        self._batch_size.observe(len(outputs.logits))
        for counters, loads in zip(self._expert_tokens, outputs.expert_load.sum(axis=0), strict=True):
            for counter, load in zip(counters, loads, strict=True):
                counter.inc(int(load))

    def image_served(self, decision: Decision | None, inference: Inference, decode_s: float, total_s: float) -> None:
        times = (decode_s, inference.queue_s, inference.inference_s, total_s)
        for series, seconds in zip(self._stage_seconds, times, strict=True):
            series.observe(seconds)
        if decision is None:
            self._served.labels(DENSE).inc()
            return
        measured = decision.measured
        self._served.labels(CUSTOM if measured is None else str(measured.operating_point)).inc()
        self._capacity_factor.observe(decision.point.capacity_factor)
        self._num_selected_experts.observe(decision.point.num_selected_experts)
        for kept, share in zip(self._kept, inference.kept, strict=True):
            kept.observe(float(share))
