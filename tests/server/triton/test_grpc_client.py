"""The gRPC channel against a server that is far away. `tests/triton` has the calls, against real ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from server.backends.triton.failure import CallFailed
from server.backends.triton.grpc_client import GrpcClient
from tests.server.conftest import small_manifest

DELAY_S = 0.3  # of a round trip around the world


@asynccontextmanager
async def distant(port: int) -> AsyncIterator[int]:
    """The port of a way to a server on this machine on which a connection takes its time."""
    connections: list[asyncio.Task[None]] = []

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connections.append(task)
        await asyncio.sleep(DELAY_S)
        onward, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, back), copy(onward, writer))

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as way:
        yield way.sockets[0].getsockname()[1]
    await asyncio.gather(*connections, return_exceptions=True)


def test_call_when_the_server_is_far_away_then_the_connection_is_waited_for() -> None:
    async def main() -> str:
        server = grpc.aio.server()  # without a service
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with distant(port) as nearest:
            client = GrpcClient(f"127.0.0.1:{nearest}", small_manifest())
            try:
                with pytest.raises(CallFailed) as caught:
                    await client.is_ready()
            finally:
                await client.close()
                await server.stop(None)
        return caught.value.failure.detail

    assert "Method not found" in asyncio.run(main())  # an answer of that server
