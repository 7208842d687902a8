"""What both protocols have in common: arrays to requests and back, errors of `tritonclient` to `CallFailed`.

`tritonclient` has an asyncio client for each protocol, with the same calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from typing import Any, TypeVar

from tritonclient.utils import InferenceServerException

from exporter.bundle import Manifest
from server.backends.base import Batch, Outputs
from server.backends.triton.contract import ServedModel
from server.backends.triton.failure import CallFailed, classify
from server.backends.triton.shared_memory import SharedImages, check_version
from server.backends.triton.tensors import images_bytes, output_names, read_outputs, request_inputs

T = TypeVar("T")


class WireClient(ABC):
    """One server's model, a `link.Client`. Belongs to the event loop in which it was made.

    Arguments:
        client: of `tritonclient`, for one protocol.
        input_class, output_class: of the same protocol.
        manifest: of the model.
        shared_images: as many as may run together are passed in shared memory; 0 puts them into the message.
    """

    cancellable = False

    def __init__(
        self, client: Any, input_class: Any, output_class: Any, manifest: Manifest, shared_images: int
    ) -> None:
        self._client, self._input_class, self._output_class = client, input_class, output_class
        self._manifest = manifest
        self._name, self._version = manifest.name, manifest.version
        self._sharing = shared_images > 0
        self._regions = SharedImages(self, images_bytes(manifest, shared_images))

    @abstractmethod
    async def describe(self) -> ServedModel:
        """Raises `CallFailed`, and `BackendError` where the server is too old for the settings."""

    async def translated(self, call: Awaitable[T]) -> T:
        """Awaits a call; errors of `tritonclient` become `CallFailed`."""
        try:
            return await call
        except InferenceServerException as error:
            message = str(error.message())
            raise CallFailed(classify(error.status(), message), message) from error

    def time_limit(self, timeout_s: float) -> dict[str, float]:
        """Of a whole call, as the client's `infer` takes it; nothing where it is the caller's to keep."""
        return {}

    async def is_ready(self) -> bool:
        """Is the model loaded? Raises `CallFailed`."""
        return bool(await self.translated(self._client.is_model_ready(self._name, self._version)))

    async def infer(self, batch: Batch, timeout_s: float, queue_timeout_s: float) -> Outputs:
        """Runs a batch. Cancelling takes it out of the server's queue where the client is `cancellable`.

        Arguments:
            timeout_s: for the whole call.
            queue_timeout_s: the server need not begin after that.

        Raises:
            CallFailed
        """
        outputs = [self._output_class(name) for name in output_names(self._manifest, explain=batch.explain)]
        with self._regions.lend() as region:
            result = await self.translated(
                self._client.infer(
                    self._name,
                    request_inputs(self._input_class, self._manifest, batch, region),
                    model_version=self._version,
                    outputs=outputs,
                    timeout=max(round(1e6 * queue_timeout_s), 1),
                    **self.time_limit(timeout_s),
                )
            )
            return read_outputs(self._manifest, batch, result)

    async def share_memory(self, batches: int, *, fresh: bool) -> None:
        """See `SharedImages.refill`."""
        await self._regions.refill(batches, fresh=fresh)

    async def register(self, name: str, size_bytes: int) -> None:
        await self.translated(self._client.register_system_shared_memory(name, f"/{name}", size_bytes))

    async def unregister(self, name: str) -> None:
        await self.translated(self._client.unregister_system_shared_memory(name))

    async def close(self) -> None:
        try:
            await self._regions.close()
        finally:
            await self._client.close()

    def _check_version(self, version: str) -> None:
        if self._sharing:
            check_version(version)
