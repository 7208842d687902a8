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
from server.backends.triton.tensors import input_tensors, output_names, read_outputs

_T = TypeVar("_T")


class HttpClient:
    """One server's model. Belongs to the event loop in which it was made.

    Arguments:
        location: host:port.
        manifest: of the model.
    """

    cancellable = False

    def __init__(self, location: str, manifest: Manifest) -> None:
        # No limit of connections: windows bound the batches, and a probe must not wait behind them.
        self._client = http_aio.InferenceServerClient(location, conn_limit=0, conn_timeout=None)
        self._manifest = manifest
        self._name, self._version = manifest.name, manifest.version

    async def is_ready(self) -> bool:
        """Is the model loaded? Raises `CallFailed`."""
        return bool(await _translated(self._client.is_model_ready(self._name, self._version)))

    async def describe(self) -> ServedModel:
        """Raises `CallFailed`."""
        server = await _translated(self._client.get_server_metadata())
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
        inputs = []
        for name, array, datatype in input_tensors(self._manifest, batch):
            inputs.append(InferInput(name, array.shape, datatype))
            inputs[-1].set_data_from_numpy(array)
        outputs = [InferRequestedOutput(name) for name in output_names(self._manifest, explain=batch.explain)]
        result = await _translated(
            self._client.infer(
                self._name,
                inputs,
                model_version=self._version,
                outputs=outputs,
                timeout=max(round(1e6 * queue_timeout_s), 1),
            )
        )
        return read_outputs(self._manifest, batch, result)

    async def close(self) -> None:
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
