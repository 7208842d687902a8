"""Images in shared memory, with real servers: the same answers, and nothing left behind by anybody's end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from exporter.bundle import Bundle
from server.backends.triton.connect import connect
from server.backends.triton.failure import CallFailed
from server.backends.triton.link import Client
from server.backends.triton.shared_memory import SEGMENTS
from tests.server.conftest import serving
from tests.triton.conftest import PROTOCOLS, SHIPPED, url_of
from tests.triton.test_clients import batch
from tests.triton.test_gateway import IMAGES, PNG, PROBES, QUERY, Load, assert_books_balance, gateway, series, until
from tests.triton_server import TritonServer

BUNDLE = Bundle.load(SHIPPED)
MANIFEST = BUNDLE.manifest
OUTPUTS = ("logits", "kept", "expert_load")
# Those of this process: others may be testing, too.
PREFIX = f"vmoe_gateway_{os.getpid()}_"

over_both = pytest.mark.parametrize("protocol", PROTOCOLS)


def segments() -> list[str]:
    return [path.name for path in SEGMENTS.glob(f"{PREFIX}*")]


def registered(server: TritonServer) -> set[str]:
    """Names of this process's regions that a server has mapped.

    By HTTP, with its limit of 5 s: a blocking gRPC call beside the asyncio client has hung.
    """
    found = httpx.get(f"http://127.0.0.1:{server.http_port}/v2/systemsharedmemory/status").raise_for_status().json()
    return {each["name"] for each in found if each["name"].startswith(PREFIX)}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert segments() == []


async def sharing(url: str, regions: int) -> Client:
    client = connect(url, MANIFEST, shared_images=32)
    await client.share_memory(regions, fresh=True)
    return client


@over_both
@pytest.mark.parametrize("rows", [1, 5, 32])
def test_answers_when_images_are_shared_then_they_are_the_same_bit_by_bit(
    triton: TritonServer, protocol: str, rows: int
) -> None:
    async def main() -> None:
        url = url_of(triton, protocol)
        plain, shared = connect(url, MANIFEST), await sharing(url, 1)
        try:
            for seed in range(3):  # the second and third write into a region that was written before
                asked = batch(rows, seed=seed)
                expected, found = await plain.infer(asked, 30.0, 30.0), await shared.infer(asked, 30.0, 30.0)
                for name in OUTPUTS:
                    np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
            assert len(registered(triton)) == 1
        finally:
            await plain.close()
            await shared.close()

    asyncio.run(main())
    assert registered(triton) == set()


@over_both
def test_call_when_the_server_has_lost_the_region_then_it_fails_as_not_ready_and_new_ones_heal(
    triton: TritonServer, protocol: str
) -> None:
    async def main() -> None:
        client = await sharing(url_of(triton, protocol), 1)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{triton.http_port}") as operator:
                for name in registered(triton):
                    answer = await operator.post(f"/v2/systemsharedmemory/region/{name}/unregister")
                    answer.raise_for_status()
            # It shows, too, that the images were in no message.
            with pytest.raises(CallFailed, match=r"not_ready: .*Unable to find shared memory region"):
                await client.infer(batch(1), 30.0, 30.0)
            await client.share_memory(1, fresh=True)
            await client.infer(batch(1), 30.0, 30.0)
        finally:
            await client.close()

    asyncio.run(main())


def test_calls_when_cancelled_while_the_server_reads_then_their_regions_are_replaced_and_let_go(
    triton: TritonServer,
) -> None:
    """Over HTTP: over gRPC, such a test has crashed Triton 2.51, rarely."""

    async def main() -> None:
        client = await sharing(url_of(triton, "http"), 8)
        try:
            before = registered(triton)
            calls = [asyncio.create_task(client.infer(batch(32), 30.0, 30.0)) for _ in range(8)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)  # all have been sent by now
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await client.infer(batch(1), 30.0, 30.0)  # behind those that run on
            while len(before & registered(triton)) > 1 or len(registered(triton)) < 8:
                await client.share_memory(8, fresh=False)
            # That of the call that was answered has stayed. The others are new.
            assert len(before & registered(triton)) == 1
            assert len(registered(triton)) == 8
        finally:
            await client.close()

    async def with_limit() -> None:
        async with asyncio.timeout(30):
            await main()

    asyncio.run(with_limit())
    assert registered(triton) == set()


@over_both
@pytest.mark.parametrize("shared_images", [0, 32])
def test_calls_when_grpc_carries_the_images_then_alone_the_gateway_cancels_them(
    protocol: str, shared_images: int
) -> None:
    async def main() -> None:
        client = connect(f"{protocol}://127.0.0.1:1", MANIFEST, shared_images)
        try:
            assert client.cancellable is (protocol == "grpc" and not shared_images)
        finally:
            await client.close()

    asyncio.run(main())


@over_both
def test_kill_when_images_are_shared_then_every_request_is_answered_and_a_restart_registers_new_regions(
    victim: TritonServer, protocol: str
) -> None:
    with (
        gateway(victim, protocol=protocol, triton_shared_memory=True) as client,
        Load(str(client.base_url)) as load,
    ):
        load.wait_for(200, count=50)
        before = registered(victim)
        assert len(before) == 2  # the window of one instance grows to two batches
        victim.kill()
        load.wait_for(503, "backend_unavailable", count=20)
        assert segments() == []
        victim.start()
        victim.wait_ready()
        load.wait_for(200, count=50)
        assert len(registered(victim)) == 2
        assert not before & registered(victim)
        load.__exit__()
        assert set(load.counts()) <= {
            (200, ""),
            (503, "backend_unavailable"),
            (503, "overloaded"),
            (504, "deadline_exceeded"),
        }
        assert_books_balance(client, load)
    assert registered(victim) == set()


def test_hang_when_images_are_shared_then_it_heals_and_the_old_regions_go(victim: TritonServer) -> None:
    with gateway(victim, triton_shared_memory=True) as client, Load(str(client.base_url)) as load:
        load.wait_for(200, count=50)
        before = registered(victim)
        victim.pause()
        load.wait_for(503, "backend_unavailable", count=20)
        victim.resume()
        load.wait_for(200, count=50)
        until(lambda: not before & registered(victim))
        load.__exit__()
        assert_books_balance(client, load)
    assert registered(victim) == set()


def test_start_when_the_server_is_on_another_host_then_the_error_names_endpoint_and_setting(
    triton_repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with TritonServer(triton_repository, elsewhere=True) as server:
        values = {"backend": "triton", "triton_urls": server.grpc_url, "triton_shared_memory": True, **PROBES}
        with caplog.at_level(logging.ERROR), serving(BUNDLE, wait=False, **values) as client:
            until(lambda: series(client).get('vmoe_endpoint_failures_total{endpoint="0",reason="mismatch"}', 0) >= 3)
            assert client.get("/readyz").status_code == 503
        (line,) = [record.getMessage() for record in caplog.records if "gets no batches" in record.getMessage()]
        assert f"Triton endpoint 0 ({server.grpc_url})" in line
        assert "triton_shared_memory is on" in line
        assert "must run on this host" in line
        assert segments() == []
        # The same server serves without.
        with gateway(server) as client:
            assert client.post(QUERY, content=IMAGES[0], headers=PNG).status_code == 200
