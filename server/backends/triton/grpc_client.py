"""A Triton server over gRPC: the channel, and what its messages say of the served model.

An image is copied once on its way into the message, which the client library does not let one avoid; shared memory is
the way around the message.
"""

from __future__ import annotations

from typing import Final

import tritonclient.grpc.aio as grpc_aio
from tritonclient.grpc import InferInput, InferRequestedOutput

from exporter.bundle import Manifest
from server.backends.triton.contract import ServedModel, ServedTensor
from server.backends.triton.wire import WireClient

_CHANNEL: Final = [
    # A batch of 32 images of 384 x 384 has 14 MB; gRPC's own limit is 4.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Probes decide when a server is asked again; gRPC's own backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Despite its name, how long a connection may take at least (MIN_CONNECT_TIMEOUT in gRPC's connection-backoff.md):
    # as long as a probe.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]


class GrpcClient(WireClient):
    """Arguments:
    location: host:port.
    manifest, shared_images: see `WireClient`.
    """

    def __init__(self, location: str, manifest: Manifest, shared_images: int = 0) -> None:
        client = grpc_aio.InferenceServerClient(location, channel_args=_CHANNEL)
        super().__init__(client, InferInput, InferRequestedOutput, manifest, shared_images)
        # Triton 2.51 has crashed in tests that cancelled calls whose images it was to read from shared memory.
        self.cancellable = not self._sharing

    async def describe(self) -> ServedModel:
        server = await self.translated(self._client.get_server_metadata())
        self._check_version(server.version)
        metadata = await self.translated(self._client.get_model_metadata(self._name, self._version))
        config = (await self.translated(self._client.get_model_config(self._name, self._version))).config
        return ServedModel(
            inputs={each.name: ServedTensor(each.datatype, tuple(each.shape)) for each in metadata.inputs},
            outputs={each.name: ServedTensor(each.datatype, tuple(each.shape)) for each in metadata.outputs},
            max_batch_size=config.max_batch_size,
            instances=max(sum(group.count * max(len(group.gpus), 1) for group in config.instance_group), 1),
            parameters={key: value.string_value for key, value in config.parameters.items()},
            server=f"{server.name} {server.version}",
        )

    def time_limit(self, timeout_s: float) -> dict[str, float]:
        return {"client_timeout": timeout_s}
