"""From uploads to results: decode, queue, infer, with limits and life-cycle. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exporter.bundle import Bundle, BundleError, frontier
from server.admission import Admission
from server.backends.base import Backend, Batch
from server.decode import DecodeLimits, Decoder, Upload
from server.engine import Engine
from server.errors import DeadlineExceeded, ImageError, NotReady, ShuttingDown
from server.metrics import Metrics
from server.policy import Decision, FixedPolicy
from server.query import Ask
from server.queue import BatchQueue, Inference, Work
from server.settings import Settings

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "failed"]


@dataclass(frozen=True)
class Served:
    """An answered image: where it was processed, what came out, and how long it took."""

    decision: Decision | None
    inference: Inference
    decode_s: float
    total_s: float


class Gateway:
    """Serves one bundle with one backend.

    Attributes:
        bundle: what is served.
        policy: chooses operating points.
        admission: bounds what is inside.
        state: only `ready` admits requests.

    Raises:
        BundleError: the model's answers would depend on batch mates.
    """

    def __init__(self, settings: Settings, bundle: Bundle, backend: Backend, metrics: Metrics) -> None:
        manifest = bundle.manifest
        moe = manifest.architecture.moe
        if moe is not None and moe.group_images != 1:
            # A group of several images makes an answer depend on whoever shares the batch.
            raise BundleError(
                f"{bundle.directory} routes groups of {moe.group_images} images; a gateway serves groups of 1: "
                "export with --group-images 1"
            )
        self.bundle = bundle
        self.policy = FixedPolicy(manifest)
        self.admission = Admission(settings.max_queue_images, settings.max_queue_bytes)
        self.state: State = "starting"
        self._backend, self._metrics = backend, metrics
        self._max_batch_size = min(settings.max_batch_size, manifest.max_batch_size)
        self._decoder = Decoder(
            manifest.preprocessing,
            DecodeLimits(settings.max_image_bytes, settings.max_image_pixels),
            settings.decode_threads,
        )
        self._engine = Engine(backend, BatchQueue(self._max_batch_size, settings.max_wait_s), metrics)

    async def start(self) -> None:
        """Warms the backend up, then admits requests. A failure leaves the gateway unready, for readiness to tell."""
        try:
            await self._warm_up()
        except Exception:  # nobody awaits this; without the log line it would be lost
            logger.exception("warm-up of %s failed, the gateway stays unready", self.bundle.manifest.name)
            self.state = "failed"
            return
        if self.state == "starting":
            self._engine.start()
            self.state = "ready"
            logger.info("ready: model %s, batches of up to %d", self.bundle.manifest.name, self._max_batch_size)

    async def close(self, drain_timeout_s: float) -> None:
        """Admits nothing more, finishes what is inside within the limit, then frees the threads."""
        self.state = "draining"
        logger.info("draining: %d images are waiting", self.admission.images)
        await self._engine.close(drain_timeout_s)
        self._decoder.close()
        self._backend.close()
        logger.info("stopped")

    def check_admits(self) -> None:
        """Raises `NotReady` or `ShuttingDown` unless the gateway is ready."""
        if self.state == "draining":
            raise ShuttingDown("the gateway is shutting down")
        if self.state != "ready":
            raise NotReady(f"the gateway is not ready: {self.state}")

    async def classify(
        self, uploads: Sequence[Upload], ask: Ask, arrival_s: float, deadline_s: float
    ) -> list[Served | ImageError]:
        """One result per image, in order; a bad image does not keep the others from being answered.

        Times are on the event loop's clock.

        Raises:
            GatewayError: the request as a whole failed.
        """
        tasks = [asyncio.create_task(self._classify_one(upload, ask, arrival_s)) for upload in uploads]
        try:
            async with asyncio.timeout_at(deadline_s):
                return await asyncio.gather(*tasks)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {deadline_s - arrival_s:g} s") from error
        finally:
            # The first failure ends the request; its other images must not go on in the background.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _classify_one(self, upload: Upload, ask: Ask, arrival_s: float) -> Served | ImageError:
        now = asyncio.get_running_loop().time
        started_s = now()
        try:
            image = await self._decoder.decode(upload)
        except ImageError as error:
            self._metrics.image_refused(error.code)
            return error
        decode_s = now() - started_s
        decision = ask.decision
        slots, num_selected_experts = (
            ((), 0) if decision is None else (decision.slots, decision.point.num_selected_experts)
        )
        inference = await self._engine.infer(Work(image, slots, num_selected_experts, ask.explain))
        served = Served(decision, inference, decode_s, now() - arrival_s)
        self._metrics.image_served(decision, inference, decode_s, served.total_s)
        return served

    async def _warm_up(self) -> None:
        """The first run of each size allocates memory: the cheapest and the full point, alone and in a full batch."""
        manifest = self.bundle.manifest
        shape = (*manifest.preprocessing.image_size, manifest.preprocessing.channels)
        points = frontier(manifest.points)
        ends = [(point.slots, point.num_selected_experts) for point in (*points[:1], *points[-1:])] or [((), 0)]
        for slots, num_selected_experts in ends:
            for size in (1, self._max_batch_size):
                await self._backend.infer(
                    Batch(
                        images=np.zeros((size, *shape), np.uint8),
                        slots=np.tile(np.array(slots, np.int64), (size, 1)),
                        num_selected_experts=np.full((size, 1), num_selected_experts, np.int64),
                        explain=True,
                    )
                )
