"""Every Prometheus series of the gateway; docs/metrics.md explains them.

Labels come from small fixed sets: the points of the manifest, the budgets of policy.toml, and `custom` for points of
clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from server.backends.base import Outputs
from server.backends.triton.breaker import BREAKER_STATES, BreakerState
from server.backends.triton.endpoint import Endpoint
from server.backends.triton.failure import REASONS, Reason
from server.decision import Batch, ShedReason
from server.scheduler import Scheduler
from server.versions import ENGINE, OWN, version_of
from server.work import Inference
from server.workers.registry import SharedRegistry
from vmoe.config import MoeConfig

# Up to the default request timeout of 10 s; fine around the few milliseconds that a small model takes.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_CAPACITY_FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.05, 1.5, 2.0, 4.0)
_SELECTED_EXPERTS = (1, 2, 3, 4, 6, 8)
_SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
# A decision should take less than 200 microseconds.
_DECISION_SECONDS = (10e-6, 25e-6, 50e-6, 100e-6, 200e-6, 400e-6, 0.001, 0.0025, 0.005, 0.01, 0.05)

INVALID = "invalid"  # label `budget` of a request whose parameters were refused
CUSTOM = "custom"  # label `budget` of a request with its own point, label `operating_point` of an unmeasured one
DENSE = "dense"  # label `operating_point` of a model without experts
_LOOP_TIME = "vmoe_event_loop_cpu_seconds"
_LOOP_TIME_TEXT = "Processor time of the event loop: all but inference and what threads decode."
_Mode = Literal["livesum", "livemax"]  # how the gauges of several workers become one; dead ones do not count
STAGES = ("decode", "queue", "inference", "total")


@dataclass(frozen=True)
class _BudgetSeries:
    """The series of one budget, looked up once: a label lookup costs about as much as the count itself."""

    offered: Counter
    admitted: Counter
    cancelled: Counter
    met: Counter
    missed: Counter
    degraded: Counter
    effective_accuracy: Counter
    served: dict[str, Counter]


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
        self._done: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._in_flight = Gauge(
            "vmoe_in_flight_requests",
            "Requests to /classify under way.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._image_errors = Counter(
            "vmoe_image_errors", "Images refused, by code of the problem.", ("code",), registry=registry
        )
        self._loop_decode = Counter(
            "vmoe_event_loop_decode_cpu_seconds", "Of the event loop's time, decoding small images.", registry=registry
        )
        self._batch_size = Histogram("vmoe_batch_size", "Images per batch.", buckets=_BATCH_SIZES, registry=registry)
        self._served = Counter(
            "vmoe_served_images", "Images answered.", ("operating_point", "budget"), registry=registry
        )
        self._registry = registry
        self._budgets: dict[str, _BudgetSeries] = {}
        by_budget = ("budget",)
        self._offered = Counter("vmoe_offered_images", "Images admitted or shed.", by_budget, registry=registry)
        self._admitted = Counter("vmoe_admitted_images", "Images admitted.", by_budget, registry=registry)
        self._shed = Counter("vmoe_shed_images", "Images refused, by reason.", ("budget", "reason"), registry=registry)
        self._cancelled = Counter(
            "vmoe_cancelled_images", "Images given up before their deadline.", by_budget, registry=registry
        )
        self._failed = Counter(
            "vmoe_failed_images", "Admitted images that got an error.", ("budget", "code"), registry=registry
        )
        self._deadlines = Counter(
            "vmoe_deadline_images", "Admitted images by deadline.", ("budget", "outcome"), registry=registry
        )
        self._degraded = Counter(
            "vmoe_degraded_images", "Images answered below their ceiling.", by_budget, registry=registry
        )
        self._effective_accuracy = Counter(
            "vmoe_effective_accuracy", "Sum of the accuracy of answers in time.", by_budget, registry=registry
        )
        self._batch_seconds = Histogram(
            "vmoe_batch_seconds", "Time of a batch, measured.", buckets=_SECONDS, registry=registry
        )
        self._predicted_seconds = Histogram(
            "vmoe_batch_predicted_seconds", "Time of a batch, predicted median.", buckets=_SECONDS, registry=registry
        )
        self._latency_ratio = Histogram(
            "vmoe_batch_latency_ratio", "Measured over predicted time of a batch.", buckets=_RATIOS, registry=registry
        )
        self._decision_seconds = Histogram(
            "vmoe_decision_seconds", "Time to choose a batch.", buckets=_DECISION_SECONDS, registry=registry
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
        self._stage_seconds = [stage_seconds.labels(stage) for stage in STAGES]
        layers, num_experts = ((), 0) if moe is None else (moe.layers, moe.num_experts)
        self._kept = [kept.labels(str(layer)) for layer in layers]
        self._expert_tokens = [[tokens.labels(str(layer), str(e)) for e in range(num_experts)] for layer in layers]

    def build_is(self, model: str, model_version: str) -> None:
        """Says what is served, and by what."""
        labels = {"version": version_of(OWN), "model": model, "model_version": model_version}
        labels["onnxruntime"] = version_of(ENGINE)
        Gauge("vmoe_build_info", "1; what runs.", labels, registry=self._registry, multiprocess_mode="livemax").labels(
            **labels
        ).set(1)

    def request_in_flight(self) -> AbstractContextManager[None]:
        return self._in_flight.track_inprogress()

    def request_done(self, budget: str, status: int, seconds: float) -> None:
        if (series := self._done.get((budget, status))) is None:
            series = self._requests.labels(budget, str(status)), self._request_seconds.labels(budget)
            self._done[budget, status] = series
        count, duration = series
        count.inc()
        duration.observe(seconds)

    def image_refused(self, code: str) -> None:
        self._image_errors.labels(code).inc()

    def decoded_in_loop(self, seconds: float) -> None:
        """Of processor time."""
        self._loop_decode.inc(seconds)

    def watch(self, scheduler: Scheduler, now: Callable[[], float]) -> None:
        """Adds gauges that are read from the scheduler at each scrape, in the thread of the event loop."""
        queue, latency = scheduler.queue, "This machine's time over the profile's."
        gauges: tuple[tuple[str, str, _Mode, Callable[[], float]], ...] = (
            ("vmoe_queue_images", "Images that wait.", "livesum", lambda: len(queue)),
            ("vmoe_queue_bytes", "Bytes that they hold.", "livesum", lambda: queue.size_bytes),
            ("vmoe_queue_oldest_seconds", "Age of the oldest.", "livemax", lambda: scheduler.oldest_age_s(now())),
            ("vmoe_running_batches", "Batches in the backend.", "livesum", lambda: len(scheduler.running)),
            ("vmoe_arrival_rate_hertz", "Images offered lately.", "livesum", lambda: scheduler.arrival_rate_hz(now())),
            ("vmoe_latency_scale_ratio", latency, "livemax", lambda: scheduler.latency.scale),
        )
        for name, text, mode, value in gauges:
            _read(Gauge(name, text, registry=self._registry, multiprocess_mode=mode), value, self._registry)
        _read_loop_time(self._registry)

    def admitted(self, budget: str) -> None:
        series = self._of(budget)
        series.offered.inc()
        series.admitted.inc()

    def shed(self, budget: str, reason: ShedReason, images: int = 1) -> None:
        self._of(budget).offered.inc(images)
        self._shed.labels(budget, reason).inc(images)

    def cancelled(self, budget: str) -> None:
        self._of(budget).cancelled.inc()

    def failed(self, budget: str, code: str) -> None:
        """An admitted image got an error that is not its deadline's."""
        self._failed.labels(budget, code).inc()

    def deadline_missed(self, budget: str) -> None:
        """Of an image without an answer; `answered` counts the others."""
        self._of(budget).missed.inc()

    def decided(self, batch: Batch, seconds: float) -> None:
        self._decision_seconds.observe(seconds)
        self._predicted_seconds.observe(batch.median_s)

    def batch_done(self, batch: Batch, outputs: Outputs, seconds: float) -> None:
        self._batch_seconds.observe(seconds)
        self._latency_ratio.observe(seconds / batch.median_s)
        self._batch_size.observe(len(outputs.logits))
        for counters, loads in zip(self._expert_tokens, outputs.expert_load.sum(axis=0), strict=True):
            for counter, load in zip(counters, loads, strict=True):
                counter.inc(int(load))

    def answered(self, budget: str, inference: Inference) -> None:
        series, rung = self._of(budget), inference.rung
        if inference.deadline_met:
            series.met.inc()
            series.effective_accuracy.inc(rung.value)
        else:
            series.missed.inc()
        if inference.degraded:
            series.degraded.inc()
        name = DENSE if rung.point is None else CUSTOM if rung.measured is None else rung.name
        if (served := series.served.get(name)) is None:
            served = series.served[name] = self._served.labels(name, budget)
        served.inc()
        if rung.point is None:
            return
        self._capacity_factor.observe(rung.point.capacity_factor)
        self._num_selected_experts.observe(rung.num_selected_experts)
        for kept, share in zip(self._kept, inference.kept, strict=True):
            kept.observe(share)

    def stages_done(self, inference: Inference, decode_s: float, total_s: float) -> None:
        times = (decode_s, inference.queue_s, inference.inference_s, total_s)
        for series, seconds in zip(self._stage_seconds, times, strict=True):
            series.observe(seconds)

    def _of(self, budget: str) -> _BudgetSeries:
        """Budgets are known by their first image: a reload may add some."""
        if (series := self._budgets.get(budget)) is None:
            series = self._budgets[budget] = _BudgetSeries(
                offered=self._offered.labels(budget),
                admitted=self._admitted.labels(budget),
                cancelled=self._cancelled.labels(budget),
                met=self._deadlines.labels(budget, "met"),
                missed=self._deadlines.labels(budget, "missed"),
                degraded=self._degraded.labels(budget),
                effective_accuracy=self._effective_accuracy.labels(budget),
                served={},
            )
        return series


class BackendMetrics:
    """The series of inference servers, in the registry that is passed in.

    Arguments:
        registry: where the series are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        endpoint = ("endpoint",)
        self._failures = Counter(
            "vmoe_endpoint_failures", "Batches and probes that failed.", ("endpoint", "reason"), registry=registry
        )
        self._batches = Counter("vmoe_endpoint_batches", "Batches answered.", endpoint, registry=registry)
        self._retries = Counter(
            "vmoe_endpoint_retries", "Batches sent here after another endpoint failed.", endpoint, registry=registry
        )
        self._fallback = Counter("vmoe_fallback_batches", "Batches run by the embedded engine.", registry=registry)

    def watch(self, endpoints: Sequence[Endpoint]) -> None:
        """Adds gauges that are read at each scrape, in the thread of the event loop."""
        registry = self._registry
        gauges: tuple[tuple[str, str, Callable[[Endpoint], float]], ...] = (
            ("in_flight_batches", "Batches under way.", lambda each: each.in_flight),
            ("window_batches", "Batches that it may have under way.", lambda each: each.capacity),
        )
        for name, text, value in gauges:
            gauge = Gauge(f"vmoe_endpoint_{name}", text, ("endpoint",), registry=registry, multiprocess_mode="livesum")
            for endpoint in endpoints:
                _read(gauge.labels(endpoint.name), partial(value, endpoint), registry)
        state = Gauge(
            "vmoe_endpoint_state",
            "1 for the breaker's.",
            ("endpoint", "state"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        for endpoint in endpoints:
            self._retries.labels(endpoint.name)
            self._batches.labels(endpoint.name)
            for reason in REASONS:
                self._failures.labels(endpoint.name, reason)
            for each in BREAKER_STATES:
                _read(state.labels(endpoint.name, each), partial(_is_in, endpoint, each), registry)

    def answered(self, endpoint: str) -> None:
        self._batches.labels(endpoint).inc()

    def failed(self, endpoint: str, reason: Reason) -> None:
        self._failures.labels(endpoint, reason).inc()

    def retried(self, endpoint: str) -> None:
        self._retries.labels(endpoint).inc()

    def fell_back(self) -> None:
        self._fallback.inc()


def _read(gauge: Gauge, value: Callable[[], float], registry: CollectorRegistry) -> None:
    """At each scrape; where several workers have one, also before the scrapes of the others."""
    if isinstance(registry, SharedRegistry):
        registry.on_refresh(lambda: gauge.set(value()))
    else:
        gauge.set_function(value)


def _read_loop_time(registry: CollectorRegistry) -> None:
    if not isinstance(registry, SharedRegistry):
        registry.register(_LoopTime())
        return
    counter = Counter(_LOOP_TIME, _LOOP_TIME_TEXT, registry=registry)
    counted_s = 0.0

    def count() -> None:
        nonlocal counted_s
        now_s = time.thread_time()
        counter.inc(now_s - counted_s)
        counted_s = now_s

    registry.on_refresh(count)


class _LoopTime(Collector):
    """Processor time of the thread that scrapes: the event loop's. The loop is one thread, so 1 s per second is all."""

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(_LOOP_TIME, _LOOP_TIME_TEXT, value=time.thread_time())

    def describe(self) -> Iterator[CounterMetricFamily]:
        return self.collect()


def _is_in(endpoint: Endpoint, state: BreakerState) -> float:
    return endpoint.breaker.state == state
