"""Several Triton servers as one backend: the least loaded gets the batch, another one the second try."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from exporter.bundle import Manifest
from server.backends.base import Batch, Outputs
from server.backends.triton.connect import connect
from server.backends.triton.endpoint import Endpoint, choose
from server.backends.triton.failure import CallFailed, may_retry
from server.backends.triton.link import Client, Link
from server.errors import BackendUnavailable, DeadlineExceeded, GatewayError, InferenceFailed
from server.metrics import BackendMetrics


class TritonBackend:
    """Runs a model where it is served.

    Arguments:
        manifest: of what the servers must serve.
        urls: as `address` reads them, one of each server. Metrics have their position.
        timeout_s: no batch takes longer, whatever its deadline.
        probe_s: between probes of a server, and the time for one.
        connect: to a URL, for a manifest; called in the event loop.

    Attributes:
        endpoints: to be read.
    """

    floors_only = False

    def __init__(
        self,
        manifest: Manifest,
        urls: Sequence[str],
        *,
        timeout_s: float,
        probe_s: float,
        metrics: BackendMetrics,
        connect: Callable[[str, Manifest], Client] = connect,
    ) -> None:
        self.endpoints = [Endpoint(str(position), probe_s) for position in range(len(urls))]
        self._manifest, self._urls, self._metrics, self._connect = manifest, urls, metrics, connect
        self._timeout_s, self._probe_s = timeout_s, probe_s
        self._links: dict[Endpoint, Link] = {}
        self._probes: list[asyncio.Task[None]] = []
        metrics.watch(self.endpoints)

    @property
    def num_workers(self) -> int:
        return sum(endpoint.capacity for endpoint in self.endpoints)

    @property
    def cancellable(self) -> bool:
        """One server that runs on with what nobody waits for is enough: the window must know what it is busy with."""
        return all(link.cancellable for link in self._links.values())

    async def start(self, changed: Callable[[], None]) -> None:
        for endpoint, url in zip(self.endpoints, self._urls, strict=True):
            self._links[endpoint] = Link(
                endpoint,
                self._connect(url, self._manifest),
                self._manifest,
                f"Triton endpoint {endpoint.name} ({url})",
                timeout_s=self._timeout_s,
                probe_s=self._probe_s,
                metrics=self._metrics,
                changed=changed,
            )
        await asyncio.gather(*(link.probe() for link in self._links.values()))
        self._probes = [asyncio.create_task(link.watch(), name="probes") for link in self._links.values()]

    async def infer(self, batch: Batch) -> Outputs:
        endpoint = choose(self.endpoints)
        if endpoint is None:
            raise BackendUnavailable("no inference server is available")
        try:
            return await self._links[endpoint].call(batch)
        except CallFailed as error:
            now = asyncio.get_running_loop().time()
            other = choose(self.endpoints, avoid=endpoint)
            if other is None or not may_retry(error.failure, now, batch.deadline_s, other.expected_s(batch.profiled_s)):
                raise _answer(error, now, batch) from error
        self._metrics.retried(other.name)
        try:
            return await self._links[other].call(batch)
        except CallFailed as error:
            raise _answer(error, asyncio.get_running_loop().time(), batch) from error

    async def close(self) -> None:
        """Lets go of the connections, too. FastAPI's caches keep the application, and all that it refers to, until the
        interpreter ends, where gRPC 1.67 cannot free a channel without an error (https://github.com/grpc/grpc/issues/38679).
        """
        probes, links = self._probes, list(self._links.values())
        self._probes, self._links = [], {}
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in links))


def _answer(error: CallFailed, now: float, batch: Batch) -> GatewayError:
    """What the clients of the batch are told; nothing of hosts."""
    reason = error.failure.reason
    if reason == "model":
        return InferenceFailed("the model failed on this batch")
    if now >= batch.deadline_s:
        return DeadlineExceeded("the inference server did not answer in time")
    return BackendUnavailable(f"the inference server failed ({reason}) and there was no other to ask in time")
