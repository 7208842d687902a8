"""One server: its endpoint, its connection, and the probes that say whether it is well.

A probe asks whether the model is loaded, and after every outage anew whether it is the bundle's. Batches that are under
way on a server that no longer answers probes end at once, so that they can be tried elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

from exporter.bundle import Manifest
from server.backends.base import GRACE_S, BackendError, Batch, Outputs
from server.backends.triton.contract import ServedModel, check_contract
from server.backends.triton.endpoint import Endpoint
from server.backends.triton.failure import CallFailed, Failure
from server.metrics import BackendMetrics

logger = logging.getLogger(__name__)

# A server that is computing on every core may be slow to answer one probe.
MISSED_PROBES: Final = 2


class Client(Protocol):
    """A connection; every method but `close` raises `CallFailed`, `describe` and `share_memory` also
    `BackendError`.

    Attributes:
        cancellable: the server drops a call that is cancelled before its turn.
    """

    @property
    def cancellable(self) -> bool: ...

    async def is_ready(self) -> bool: ...

    async def describe(self) -> ServedModel: ...

    async def infer(self, batch: Batch, timeout_s: float, queue_timeout_s: float) -> Outputs: ...

    async def share_memory(self, batches: int, *, fresh: bool) -> None:
        """Prepares for so many at once, where memory is shared; `fresh` where the server may have been restarted."""

    async def close(self) -> None: ...


class Link:
    """Arguments:
    endpoint: what is decided by.
    client: its connection.
    title: for logs.
    timeout_s: no batch takes longer.
    probe_s: between probes, and the time for one.
    changed: called when the endpoint's capacity is another because of a probe.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        client: Client,
        manifest: Manifest,
        title: str,
        *,
        timeout_s: float,
        probe_s: float,
        metrics: BackendMetrics,
        changed: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        self._client, self._manifest, self._title = client, manifest, title
        self._timeout_s, self._probe_s = timeout_s, probe_s
        self._metrics, self._changed = metrics, changed
        self._known = False  # the model was found to be the bundle's, and the server has not been away since
        self._missed = 0
        self._trouble = ""  # what was logged last
        self._calls: dict[asyncio.Timeout, float] = {}  # and when each ends
        self._opened = asyncio.Event()

    @property
    def cancellable(self) -> bool:
        return self._client.cancellable

    async def call(self, batch: Batch) -> Outputs:
        """Runs a batch. Raises `CallFailed`."""
        now = asyncio.get_running_loop().time
        started_s = now()
        end_s = min(started_s + self._timeout_s, batch.deadline_s + GRACE_S)
        in_flight = self.endpoint.start()
        try:
            async with asyncio.timeout_at(end_s) as scope:
                self._calls[scope] = end_s
                outputs = await self._client.infer(
                    batch, max(end_s - started_s, 0.0), min(batch.deadline_s - started_s, self._timeout_s)
                )
        except (CallFailed, TimeoutError) as error:
            failure = self._explain(error, now() >= end_s)
            self._failed(failure)
            raise CallFailed(failure.reason, failure.detail) from error
        finally:
            self.endpoint.finish()
            self._calls.pop(scope, None)
        before = self.endpoint.breaker.state
        self.endpoint.answered(now() - started_s, batch.profiled_s, len(batch.images), in_flight)
        self._metrics.answered(self.endpoint.name)
        if before == "half_open":
            self._trouble = ""
            logger.info("%s serves", self._title)
        return outputs

    async def watch(self) -> None:
        """Probes for ever."""
        while True:
            breaker, now = self.endpoint.breaker, asyncio.get_running_loop().time()
            wait_s = breaker.probe_at_s - now if breaker.state == "open" else self._probe_s
            self._opened.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._opened.wait()
            except TimeoutError:
                await self.probe()

    async def probe(self) -> None:
        """Asks the server once and draws the conclusions."""
        before = self.endpoint.capacity
        try:
            async with asyncio.timeout(self._probe_s):
                await self._ask()
        except BackendError as error:
            self._failed(Failure("mismatch", str(error)))
        except CallFailed as error:
            self._failed(error.failure)
        except TimeoutError:
            self._missed += 1
            if self._missed >= MISSED_PROBES or self.endpoint.breaker.state == "open":
                self._failed(Failure("hung", f"no answer to a probe within {self._probe_s:g} s"))
        except Exception:  # the probes must survive whatever the client library throws
            logger.exception("%s: a probe failed", self._title)
            self._failed(Failure("connection", "a probe failed"))
        else:
            self._missed = 0
            self.endpoint.breaker.probe_passed()
            if self.endpoint.capacity != before:
                self._changed()

    async def close(self) -> None:
        await self._client.close()

    async def _ask(self) -> None:
        if not await self._client.is_ready():
            raise CallFailed("not_ready", f"model {self._manifest.name} is not loaded")
        if self._known:
            await self._client.share_memory(self.endpoint.window.most, fresh=False)
            return
        served = await self._client.describe()
        check_contract(self._manifest, served)
        self.endpoint.serves(served.instances)
        await self._client.share_memory(self.endpoint.window.most, fresh=True)
        self._known = True
        logger.info("%s is %s with %d instances of the model", self._title, served.server, served.instances)

    def _explain(self, error: CallFailed | TimeoutError, overdue: bool) -> Failure:
        if isinstance(error, CallFailed):
            return error.failure
        if overdue:
            return Failure("timeout", "no answer to a batch in time")
        return Failure("hung", "the server stopped answering")

    def _failed(self, failure: Failure) -> None:
        endpoint, now = self.endpoint, asyncio.get_running_loop().time()
        self._metrics.failed(endpoint.name, failure.reason)
        before = endpoint.capacity
        endpoint.failed(failure, now)
        if endpoint.breaker.state != "open":
            return
        self._known = False  # whatever comes back may be another
        self._opened.set()
        if failure.reason in ("hung", "timeout"):
            for call in self._calls:
                if not call.expired():
                    call.reschedule(now)
        if self._trouble != failure.reason:
            self._trouble = failure.reason
            level = logging.ERROR if failure.reason == "mismatch" else logging.WARNING
            logger.log(level, "%s gets no batches: %s, %s", self._title, failure.reason, failure.detail)
        if endpoint.capacity != before:
            self._changed()
