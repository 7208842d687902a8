"""A Triton server over gRPC: arrays to messages and back, errors of `tritonclient` to `CallFailed`.

An image is copied once on its way into the message, which the client library does not let one avoid.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import tritonclient.grpc.aio as grpc_aio
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from exporter.bundle import Manifest
from server.backends.base import Batch, Outputs
from server.backends.triton.contract import ServedModel, ServedTensor
from server.backends.triton.failure import CallFailed, classify
from vmoe.preprocess import normalize

_T = TypeVar("_T")

_CHANNEL: Final = [
    # A batch of 32 images of 384 x 384 has 14 MB; gRPC's own limit is 4.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Probes decide when a server is asked again; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]


class GrpcClient:
    """One server's model. Belongs to the event loop in which it was made.

    Arguments:
        url: host:port.
        manifest: of the model.
    """

    def __init__(self, url: str, manifest: Manifest) -> None:
        self._client = grpc_aio.InferenceServerClient(url, channel_args=_CHANNEL)
        self._manifest = manifest
        self._name, self._version = manifest.name, manifest.version
        dense = manifest.architecture.moe is None
        self._outputs = [InferRequestedOutput("logits")]
        if not dense:
            self._outputs += [InferRequestedOutput("kept"), InferRequestedOutput("expert_load")]
        self._all_outputs = self._outputs + ([] if dense else [InferRequestedOutput("token_experts")])

    async def is_ready(self) -> bool:
        """Is the model loaded? Raises `CallFailed`."""
        return bool(await _translated(self._client.is_model_ready(self._name, self._version)))

    async def describe(self) -> ServedModel:
        """Raises `CallFailed`."""
        server = await _translated(self._client.get_server_metadata())
        metadata = await _translated(self._client.get_model_metadata(self._name, self._version))
        config = (await _translated(self._client.get_model_config(self._name, self._version))).config
        return ServedModel(
            inputs={each.name: ServedTensor(each.datatype, tuple(each.shape)) for each in metadata.inputs},
            outputs={each.name: ServedTensor(each.datatype, tuple(each.shape)) for each in metadata.outputs},
            max_batch_size=config.max_batch_size,
            instances=max(sum(group.count * max(len(group.gpus), 1) for group in config.instance_group), 1),
            parameters={key: value.string_value for key, value in config.parameters.items()},
            server=f"{server.name} {server.version}",
        )

    async def infer(self, batch: Batch, timeout_s: float, queue_timeout_s: float) -> Outputs:
        """Runs a batch; cancelling takes it out of the server's queue.

        Arguments:
            queue_timeout_s: the server need not begin after that.

        Raises:
            CallFailed
        """
        sparse = self._manifest.architecture.moe is not None
        result = await _translated(
            self._client.infer(
                self._name,
                self._inputs(batch),
                model_version=self._version,
                outputs=self._all_outputs if batch.explain else self._outputs,
                timeout=max(round(1e6 * queue_timeout_s), 1),
                client_timeout=timeout_s,
            )
        )
        rows = len(batch.images)
        logits = _array(result, "logits", rows)
        if not sparse:
            return Outputs(logits, np.zeros((rows, 0), np.float32), np.zeros((rows, 0, 0), np.int64), None)
        return Outputs(
            logits=logits,
            kept=_array(result, "kept", rows),
            expert_load=_array(result, "expert_load", rows),
            token_experts=_array(result, "token_experts", rows) if batch.explain else None,
        )

    async def close(self) -> None:
        await self._client.close()

    def _inputs(self, batch: Batch) -> list[InferInput]:
        if self._manifest.input == "uint8":
            inputs = [_input("images", batch.images, "UINT8")]
        else:
            inputs = [_input("images", normalize(batch.images, self._manifest.preprocessing), "FP32")]
        if self._manifest.architecture.moe is not None:
            inputs.append(_input("slots", batch.slots, "INT64"))
            inputs.append(_input("num_selected_experts", batch.num_selected_experts, "INT64"))
        return inputs


def _input(name: str, array: npt.NDArray[Any], datatype: str) -> InferInput:
    tensor = InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def _array(result: Any, name: str, rows: int) -> npt.NDArray[Any]:
    """An output, which the server must have sent with a row per image."""
    array: npt.NDArray[Any] | None = result.as_numpy(name)
    if array is None or array.shape[:1] != (rows,):
        found = None if array is None else array.shape
        raise CallFailed("model", f"output {name} for {rows} images came back as {found}")
    return array


async def _translated(call: Awaitable[_T]) -> _T:
    try:
        return await call
    except InferenceServerException as error:
        message = str(error.message())
        raise CallFailed(classify(error.status(), message), message) from error
