"""A Triton server over HTTP: arrays to bodies and back, errors of `tritonclient` and aiohttp to `CallFailed`.

Of `tritonclient.http` only the asyncio client is used, which runs on aiohttp. It has no time limits here: whoever calls
sets them by cancelling, which closes the connection. Triton does not see that until it has answered
(https://github.com/triton-inference-server/server/issues/7077), so what is given up here still runs there.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

import aiohttp
import tritonclient.http.aio as http_aio
from tritonclient.http import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from exporter.bundle import Manifest
from server.backends.base import Batch, Outputs
from server.backends.triton.contract import ServedModel, ServedTensor
from server.backends.triton.failure import CallFailed, classify
from server.backends.triton.shared_memory import SharedImages, check_version
from server.backends.triton.tensors import images_bytes, output_names, read_outputs, request_inputs

_T = TypeVar("_T")


class HttpClient:
    """One server's model. Belongs to the event loop in which it was made.

    Arguments:
        location: host:port.
        manifest: of the model.
        shared_images: as many as may run together are passed in shared memory; 0 puts them into the message.
    """

    cancellable = False

    def __init__(self, location: str, manifest: Manifest, shared_images: int = 0) -> None:
        # No limit of connections: windows bound the batches, and a probe must not wait behind them.
        self._client = http_aio.InferenceServerClient(location, conn_limit=0, conn_timeout=None)
        self._manifest = manifest
        self._name, self._version = manifest.name, manifest.version
        self._sharing = shared_images > 0
        self._regions = SharedImages(self, images_bytes(manifest, shared_images))

    async def is_ready(self) -> bool:
        """Is the model loaded? Raises `CallFailed`."""
        return bool(await _translated(self._client.is_model_ready(self._name, self._version)))

    async def describe(self) -> ServedModel:
        """Raises `CallFailed`, and `BackendError` where the server is too old for the settings."""
        server = await _translated(self._client.get_server_metadata())
        if self._sharing:
            check_version(server["version"])
        metadata = await _translated(self._client.get_model_metadata(self._name, self._version))
        config = await _translated(self._client.get_model_config(self._name, self._version))
        inputs, outputs = (
            {each["name"]: ServedTensor(each["datatype"], tuple(map(int, each["shape"]))) for each in metadata[kind]}
            for kind in ("inputs", "outputs")
        )
        groups = config.get("instance_group", [])
        return ServedModel(
            inputs=inputs,
            outputs=outputs,
            max_batch_size=config["max_batch_size"],
            instances=max(sum(group["count"] * max(len(group["gpus"]), 1) for group in groups), 1),
            parameters={key: value["string_value"] for key, value in config.get("parameters", {}).items()},
            server=f"{server['name']} {server['version']}",
        )

    async def infer(self, batch: Batch, timeout_s: float, queue_timeout_s: float) -> Outputs:
        """Runs a batch; cancelling leaves it in the server's queue.

        Arguments:
            timeout_s: for the whole call; the caller's to keep.
            queue_timeout_s: the server need not begin after that.

        Raises:
            CallFailed
        """
        outputs = [InferRequestedOutput(name) for name in output_names(self._manifest, explain=batch.explain)]
        with self._regions.lend() as region:
            result = await _translated(
                self._client.infer(
                    self._name,
                    request_inputs(InferInput, self._manifest, batch, region),
                    model_version=self._version,
                    outputs=outputs,
                    timeout=max(round(1e6 * queue_timeout_s), 1),
                )
            )
            return read_outputs(self._manifest, batch, result)

    async def share_memory(self, batches: int, *, fresh: bool) -> None:
        """See `SharedImages.refill`."""
        await self._regions.refill(batches, fresh=fresh)

    async def register(self, name: str, size_bytes: int) -> None:
        await _translated(self._client.register_system_shared_memory(name, f"/{name}", size_bytes))

    async def unregister(self, name: str) -> None:
        await _translated(self._client.unregister_system_shared_memory(name))

    async def close(self) -> None:
        try:
            await self._regions.close()
        finally:
            await self._client.close()


async def _translated(call: Awaitable[_T]) -> _T:
    try:
        return await call
    except InferenceServerException as error:
        message = str(error.message())
        raise CallFailed(classify(error.status(), message), message) from error
    except aiohttp.ClientConnectorError as error:
        raise CallFailed("refused", str(error)) from error
    except aiohttp.ClientError as error:
        raise CallFailed("connection", f"{type(error).__name__}: {error}") from error
