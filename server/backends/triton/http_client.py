"""A Triton server over HTTP: what its bodies say of the served model, errors of aiohttp to `CallFailed`.

Of `tritonclient.http` only the asyncio client is used, which runs on aiohttp. It has no time limits here: whoever calls
sets them by cancelling, which closes the connection. Triton does not see that until it has answered
(https://github.com/triton-inference-server/server/issues/7077), so what is given up here still runs there.
"""

from __future__ import annotations

from collections.abc import Awaitable

import aiohttp
import tritonclient.http.aio as http_aio
from tritonclient.http import InferInput, InferRequestedOutput

from exporter.bundle import Manifest
from server.backends.triton.contract import ServedModel, ServedTensor
from server.backends.triton.failure import CallFailed
from server.backends.triton.wire import T, WireClient


class HttpClient(WireClient):
    """Arguments:
    location: host:port.
    manifest, shared_images: see `WireClient`.
    """

    def __init__(self, location: str, manifest: Manifest, shared_images: int = 0) -> None:
        # No limit of connections: windows bound the batches, and a probe must not wait behind them.
        client = http_aio.InferenceServerClient(location, conn_limit=0, conn_timeout=None)
        super().__init__(client, InferInput, InferRequestedOutput, manifest, shared_images)

    async def describe(self) -> ServedModel:
        server = await self.translated(self._client.get_server_metadata())
        self._check_version(server["version"])
        metadata = await self.translated(self._client.get_model_metadata(self._name, self._version))
        config = await self.translated(self._client.get_model_config(self._name, self._version))
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

    async def translated(self, call: Awaitable[T]) -> T:
        try:
            return await super().translated(call)
        except aiohttp.ClientConnectorError as error:
            raise CallFailed("refused", str(error)) from error
        except aiohttp.ClientError as error:
            raise CallFailed("connection", f"{type(error).__name__}: {error}") from error
