"""From uploads to results: decode, schedule, infer, with limits, policy and life-cycle. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from exporter.bundle import Bundle, BundleError
from server.admission import Admission
from server.backends.base import Backend, Batch
from server.deadline_queue import Request
from server.decode import DecodeLimits, Decoder, Upload
from server.engine import Engine
from server.errors import BackendUnavailable, DeadlineExceeded, GatewayError, ImageError, NotReady, ShuttingDown
from server.ladder import Ladder
from server.latency import LatencyModel
from server.metrics import Metrics
from server.policy_file import ActivePolicy, PolicyText
from server.policy_source import PolicySource
from server.query import Ask
from server.scheduler import Limits, Scheduler
from server.settings import Settings
from server.work import Inference, Work
from server.workers.link import Link

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# starting -> ready -> leaving (still serves, for load balancers to notice) -> draining (finishes what is inside)
State = Literal["starting", "ready", "leaving", "draining", "failed"]

# Chosen, not tuned: the first run of each size allocates memory and counts for nothing, two show an unlike machine.
_WARM_UP_RUNS: Final = 3
_RETRY_S: Final = 0.5  # after a warm-up that the backend did not survive; chosen, not tuned
_CLOCK_S: Final = 1e-6  # no measured time is shorter; a latency model needs one above 0


@dataclass(frozen=True)
class Served:
    """An answered image: what came out, and how long it took."""

    inference: Inference
    decode_s: float
    total_s: float


class Gateway:
    """Serves one bundle with one backend.

    Arguments:
        link: to the supervisor, where this is one gateway of several behind a port.

    Attributes:
        bundle: what is served.
        ladder: its operating points.
        policy: in force; `reload_policy`, `restore_policy` and `put_policy` replace it.
        scheduler: to be read, not to be called.
        admission: bounds what is inside.
        state: `ready` and `leaving` admit requests.

    Raises:
        BundleError: the model's answers would depend on batch mates.
        PolicyError: the policy cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        backend: Backend,
        metrics: Metrics,
        models: Sequence[str] = (),
        link: Link | None = None,
    ) -> None:
        manifest = bundle.manifest
        moe = manifest.architecture.moe
        if moe is not None and moe.group_images != 1:
            # A group of several images makes an answer depend on whoever shares the batch.
            raise BundleError(
                f"{bundle.directory} routes groups of {moe.group_images} images; a gateway serves groups of 1: "
                "export with --group-images 1"
            )
        self.bundle = bundle
        self.ladder = Ladder.of(manifest, models)
        self._policies = PolicySource(
            settings.policy, bundle, self.ladder, settings.request_timeout_s, force=settings.force_policy
        )
        self._reloading = asyncio.Lock()
        shared = None if link is None else link.policy
        self.policy: ActivePolicy = (
            self._policies.load() if shared is None else self._policies.parse(shared.text, shared.source)
        )
        self.admission = Admission(settings.max_queue_images, settings.max_queue_bytes, metrics)
        self.state: State = "starting"
        self._backend, self._metrics, self._link = backend, metrics, link
        self._may_go = link is None
        self._changed = asyncio.Event()  # the backend, `state`, or `_may_go`
        self._request_timeout_s = settings.request_timeout_s
        self._max_batch_size = min(settings.max_batch_size, manifest.max_batch_size)
        self._image_shape = (*manifest.preprocessing.image_size, manifest.preprocessing.channels)
        self._image_bytes = math.prod(self._image_shape)
        quantile = self.policy.config.quantile
        profiled = LatencyModel.of(manifest.points, self._max_batch_size, quantile)
        self._profiled = profiled is not None
        self.scheduler = Scheduler(
            self.ladder,
            profiled or self._guess_latency(1.0, 1.0),  # nobody is admitted before the warm-up has measured
            self.policy.build(),
            Limits(self._max_batch_size, backend.num_workers, settings.max_queue_images, settings.max_queue_bytes),
            horizon_s=self.policy.horizon_s,
        )
        self._decoder = Decoder(
            manifest.preprocessing,
            DecodeLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.decode_threads,
        )
        self._engine = Engine(backend, self.scheduler, metrics)

    async def start(self) -> None:
        """Waits for the backend, warms it up, then admits requests.

        A failure leaves the gateway unready, for readiness to tell.
        """
        try:
            await self._backend.start(self._backend_changed)
            while self.state == "starting" and not await self._try_warm_up():
                pass
            if self._link is not None:
                await self._wait_for_siblings(self._link)
        except Exception:  # nobody awaits this; without the log line it would be lost
            logger.exception("warm-up of %s failed, the gateway stays unready", self.bundle.manifest.name)
            self.state = "failed"
            if self._link is not None:
                self._link.failed()
            return
        if self.state == "starting":
            self._engine.start()
            self.state = "ready"
            logger.info(
                "ready: model %s, batches of up to %d, policy %s from %s",
                self.bundle.manifest.name,
                self._max_batch_size,
                self.policy.config.policy,
                self.policy.source,
            )

    def go(self) -> None:
        """Every sibling is warm."""
        self._may_go = True
        self._changed.set()

    def give_up_starting(self) -> None:
        """`start` returns as soon as the batch that it runs is done."""
        self.state = "draining"
        self._changed.set()

    async def reload_policy(self) -> None:
        """Reads the policy again and puts it in force between two decisions. What is admitted keeps its deadline.

        Raises:
            PolicyError: it cannot be used; the old one stays.
        """
        await self._use(self._policies.reload)

    async def restore_policy(self) -> None:
        """As `reload_policy`, back to the policy of the settings, be it a name or a file."""
        await self._use(self._policies.load)

    async def put_policy(self, text: str) -> None:
        """As `reload_policy`, with the text of a policy.toml; in force until another one is."""
        await self._use(lambda: self._policies.parse(text))

    async def follow(self, policy: PolicyText) -> None:
        """As `put_policy`, with what a sibling shared."""
        self._put_in_force(await asyncio.to_thread(self._policies.parse, policy.text, policy.source))

    async def _use(self, read: Callable[[], ActivePolicy]) -> None:
        async with self._reloading:  # of two at once the later one must win
            active = await asyncio.to_thread(read)
            if self._link is None:
                self._put_in_force(active)
            else:
                await self._link.share(active)  # comes back by `follow`, in the order that all siblings see

    def _put_in_force(self, active: ActivePolicy) -> None:
        self.policy = active
        self.scheduler.use(active.build(), active.horizon_s)
        self.scheduler.latency.aim_at(active.config.quantile)
        logger.info("policy %s from %s is in force", active.config.policy, active.source)

    async def drain(self, delay_s: float, timeout_s: float) -> None:
        """Unready at once; after `delay_s` admits nothing more, and finishes what is inside within `timeout_s`."""
        if self.state == "ready":
            self.state = "leaving"
            await asyncio.sleep(delay_s)
        self.give_up_starting()
        logger.info("draining: %d images are inside", self.admission.images)
        try:
            async with asyncio.timeout(timeout_s):
                await self.admission.wait_empty()
        except TimeoutError:
            logger.warning("%d images were still inside after %g s and are refused", self.admission.images, timeout_s)
        await self._engine.close()

    async def close(self) -> None:
        """Fails what is still inside and frees the threads."""
        self.state = "draining"
        await self._engine.close()
        self._decoder.close()
        await self._backend.close()
        logger.info("stopped")

    def check_ready(self) -> None:
        """Raises `Unavailable` where a load balancer should send nothing more."""
        if self.state == "leaving":
            raise ShuttingDown("the gateway is about to shut down")
        self.check_admits()
        if not self._backend.num_workers:
            raise BackendUnavailable("no inference server is available")

    def check_admits(self) -> None:
        """Raises `NotReady` or `ShuttingDown` unless the gateway serves."""
        if self.state == "draining":
            raise ShuttingDown("the gateway is shutting down")
        if self.state not in ("ready", "leaving"):
            raise NotReady(f"the gateway is not ready: {self.state}")

    async def classify(self, uploads: Sequence[Upload], ask: Ask, arrival_s: float) -> list[Served | ImageError]:
        """One result per image, in order; a bad image does not keep the others from being answered.

        Arguments:
            arrival_s: of the headers, on the event loop's clock. The deadline runs from now, the end of the upload: a
                client must not be refused for the slowness of its own network.

        Raises:
            GatewayError: the request as a whole failed.
        """
        uploaded_s = asyncio.get_running_loop().time()
        requests = [self._request(ask, uploaded_s) for _ in uploads]
        self._engine.check(requests)
        work = [
            self._classify_one(upload, request, ask, arrival_s)
            for upload, request in zip(uploads, requests, strict=True)
        ]
        try:
            async with asyncio.timeout_at(uploaded_s + self._request_timeout_s):
                return [await work[0]] if len(work) == 1 else await _all_or_none(work)  # one needs no task
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {self._request_timeout_s:g} s") from error

    def _request(self, ask: Ask, uploaded_s: float) -> Request:
        return Request(
            arrival_s=uploaded_s,
            deadline_s=uploaded_s + ask.deadline_s,
            budget=ask.budget,
            floor=ask.floor,
            ceiling=ask.ceiling,
            size_bytes=self._image_bytes,
            pinned=ask.pinned is not None,
        )

    async def _classify_one(self, upload: Upload, request: Request, ask: Ask, arrival_s: float) -> Served | ImageError:
        now = asyncio.get_running_loop().time
        started_s = now()
        try:
            image = await self._decode(upload)
        except ImageError as error:
            self._metrics.image_refused(error.code)
            return error
        decode_s = now() - started_s
        inference = await self._engine.infer(request, Work(image, ask.explain, ask.pinned))
        served = Served(inference, decode_s, now() - arrival_s)
        self._metrics.stages_done(inference, decode_s, served.total_s)
        return served

    async def _decode(self, upload: Upload) -> npt.NDArray[np.uint8]:
        started_s = time.thread_time()
        if (image := self._decoder.decode_small(upload)) is None:
            return await self._decoder.decode(upload)
        self._metrics.decoded_in_loop(time.thread_time() - started_s)
        return image

    async def _wait_for_siblings(self, link: Link) -> None:
        link.warm(self.policy)
        while self.state == "starting" and not self._may_go:
            self._changed.clear()
            await self._changed.wait()

    def _backend_changed(self) -> None:
        self._changed.set()
        self._engine.wake()

    async def _try_warm_up(self) -> bool:
        """Once there is a backend to warm up; False where that went away meanwhile."""
        while not self._backend.num_workers:
            self._changed.clear()
            await self._changed.wait()
            if self.state != "starting":
                return False
        try:
            await self._warm_up()
        except GatewayError as error:  # of a backend that may recover, and says in its log why
            logger.debug("warm-up: %s", error)
            await asyncio.sleep(_RETRY_S)
            return False
        return True

    async def _warm_up(self) -> None:
        """Runs the cheapest point of every bundle and the full one, alone and in a full batch, and shows the times to
        the latency model."""
        ladder, latency = self.ladder, self.scheduler.latency
        sizes = (1, self._max_batch_size)
        full_s = []
        first = {ladder.rungs[rung].model: rung for rung in reversed(ladder.frontier)}
        for rung in dict.fromkeys((*first.values(), ladder.full)):
            for size in sizes:
                times_s = [await self._time_batch(rung, size) for _ in range(_WARM_UP_RUNS)][1:]
                if self._profiled:
                    for seconds in times_s:
                        latency.observe([rung] * size, seconds)
                full_s.append(median(times_s))
        if not self._profiled:
            self.scheduler.latency = self._guess_latency(*full_s[-2:])

    async def _time_batch(self, rung: int, size: int) -> float:
        point = self.ladder.rungs[rung]
        batch = Batch(
            images=np.zeros((size, *self._image_shape), np.uint8),
            slots=np.tile(np.array(point.slots, np.int64), (size, 1)),
            num_selected_experts=np.full((size, 1), point.num_selected_experts, np.int64),
            explain=False,
            profiled_s=self.scheduler.latency.uniform_s(rung, size),
            models=(point.model,) * size,
        )
        now = asyncio.get_running_loop().time
        started_s = now()
        await self._backend.infer(batch)
        return now() - started_s

    def _guess_latency(self, single_s: float, full_batch_s: float) -> LatencyModel:
        """From the full point alone and in a full batch."""
        costs = [1.0 if rung.measured is None else rung.measured.relative_compute for rung in self.ladder.rungs]
        single_s, full_batch_s = max(single_s, _CLOCK_S), max(full_batch_s, _CLOCK_S)
        return LatencyModel.guess(costs, single_s, full_batch_s, self._max_batch_size, self.policy.config.quantile)


async def _all_or_none(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """At once. The first failure ends the others: they must not go on in the background."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
