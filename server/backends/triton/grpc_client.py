"""A Triton server over gRPC: arrays to messages and back, errors of `tritonclient` to `CallFailed`.

An image is copied once on its way into the message, which the client library does not let one avoid; shared memory is
the way around the message.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Final, TypeVar

import tritonclient.grpc.aio as grpc_aio
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from exporter.bundle import Manifest
from server.backends.base import Batch, Outputs
from server.backends.triton.contract import ServedModel, ServedTensor
from server.backends.triton.failure import CallFailed, classify
from server.backends.triton.shared_memory import SharedImages, check_version
from server.backends.triton.tensors import images_bytes, output_names, read_outputs, request_inputs

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
        location: host:port.
        manifest: of the model.
        shared_images: as many as may run together are passed in shared memory; 0 puts them into the message.
    """

    def __init__(self, location: str, manifest: Manifest, shared_images: int = 0) -> None:
        self._client = grpc_aio.InferenceServerClient(location, channel_args=_CHANNEL)
        self._manifest = manifest
        self._name, self._version = manifest.name, manifest.version
        self._sharing = shared_images > 0
        # Triton 2.51 has crashed in tests that cancelled calls whose images it was to read from shared memory.
        self.cancellable = not self._sharing
        self._regions = SharedImages(self, images_bytes(manifest, shared_images))

    async def is_ready(self) -> bool:
        """Is the model loaded? Raises `CallFailed`."""
        return bool(await _translated(self._client.is_model_ready(self._name, self._version)))

    async def describe(self) -> ServedModel:
        """Raises `CallFailed`, and `BackendError` where the server is too old for the settings."""
        server = await _translated(self._client.get_server_metadata())
        if self._sharing:
            check_version(server.version)
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
        outputs = [InferRequestedOutput(name) for name in output_names(self._manifest, explain=batch.explain)]
        with self._regions.lend() as region:
            result = await _translated(
                self._client.infer(
                    self._name,
                    request_inputs(InferInput, self._manifest, batch, region),
                    model_version=self._version,
                    outputs=outputs,
                    timeout=max(round(1e6 * queue_timeout_s), 1),
                    client_timeout=timeout_s,
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
