"""The connections of the gateway and a real server: both protocols say the same, and only one of them cancels."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable, Iterator

import numpy as np
import pytest
import tritonclient.grpc as triton_client

from exporter.bundle import Bundle
from exporter.triton_config import TritonOptions
from server.backends.base import Batch, Outputs
from server.backends.triton.connect import connect
from server.backends.triton.contract import check_contract
from server.backends.triton.failure import CallFailed, Failure
from server.backends.triton.link import Client
from tests.triton.conftest import PROTOCOLS, SHIPPED, url_of
from tests.triton_server import TritonServer, free_port, python_repository

MANIFEST = Bundle.load(SHIPPED).manifest


def using(url: str, scenario: Callable[[Client], Awaitable[None]]) -> None:
    """Runs a scenario on a connection and checks that nothing is left of it."""

    async def main() -> None:
        client = connect(url, MANIFEST)
        try:
            await scenario(client)
        finally:
            await client.close()

    asyncio.run(main())


def batch(rows: int, *, explain: bool = False, seed: int = 0) -> Batch:
    point = MANIFEST.points[-1]
    return Batch(
        np.random.default_rng(seed).integers(0, 256, (rows, 28, 28, 1), np.uint8),
        np.array([point.slots] * rows, np.int64),
        np.full((rows, 1), point.num_selected_experts, np.int64),
        explain,
    )


def test_description_when_asked_over_both_protocols_then_it_is_the_same_and_the_bundles(triton: TritonServer) -> None:
    found = []

    async def scenario(client: Client) -> None:
        assert await client.is_ready()
        found.append(await client.describe())

    for protocol in PROTOCOLS:
        using(url_of(triton, protocol), scenario)
    assert found[0] == found[1]
    assert found[0].parameters["model_sha256"] == MANIFEST.files["1/model.onnx"]
    check_contract(MANIFEST, found[0])


@pytest.mark.parametrize("explain", [False, True])
def test_answers_when_asked_over_both_protocols_then_they_are_equal(triton: TritonServer, explain: bool) -> None:
    found = []

    async def scenario(client: Client) -> None:
        found.append(await client.infer(batch(3, explain=explain), 30.0, 30.0))

    for protocol in PROTOCOLS:
        using(url_of(triton, protocol), scenario)
    for name in ("logits", "kept", "expert_load", "token_experts")[: 3 + explain]:
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    assert (found[0].token_experts is None, found[1].token_experts is None) == (not explain, not explain)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_failures_when_translated_then_each_has_its_reason(triton: TritonServer, protocol: str) -> None:
    async def asks_too_much(client: Client) -> None:
        with pytest.raises(CallFailed) as failed:
            await client.infer(batch(MANIFEST.max_batch_size + 1), 30.0, 30.0)
        assert failed.value.failure.reason == "model"
        assert "must be <= 32" in failed.value.failure.detail

    async def finds_nobody(client: Client) -> None:
        for call in (client.is_ready(), client.describe(), client.infer(batch(1), 30.0, 30.0)):
            with pytest.raises(CallFailed) as failed:
                await call
            assert failed.value.failure.reason == "refused"

    using(url_of(triton, protocol), asks_too_much)
    scheme = {"grpc": "grpc://", "http": "http://"}[protocol]
    using(f"{scheme}127.0.0.1:{free_port()}", finds_nobody)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calls_when_cancelled_while_they_wait_in_the_server_then_grpc_spares_them_and_http_does_not(
    triton: TritonServer, protocol: str
) -> None:
    def executions() -> int:
        with triton_client.InferenceServerClient(triton.grpc_url) as statistics:
            (model,) = statistics.get_inference_statistics(MANIFEST.name).model_stats
            return int(model.execution_count)

    before = executions()

    async def scenario(client: Client) -> None:
        calls = [asyncio.create_task(client.infer(batch(32), 30.0, 30.0)) for _ in range(16)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)  # all have been sent by now
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await client.infer(batch(1), 30.0, 30.0)  # behind all of them
        assert client.cancellable == (protocol == "grpc")
        # Of 17 calls gRPC ran 2 to 4 and HTTP all; between the two is room for a busy machine.
        assert client.cancellable == (executions() - before <= 10)

    using(url_of(triton, protocol), scenario)


@pytest.fixture(scope="module")
def timing_out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server whose configuration has a queue policy."""
    options = TritonOptions("python", threads=1, queue_timeout_s=20.0)
    with TritonServer(python_repository(SHIPPED, tmp_path_factory.mktemp("policy"), options)) as server:
        yield server


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_request_timeout_when_the_server_has_a_queue_policy_then_it_does_not_begin_after_that(
    timing_out: TritonServer, protocol: str
) -> None:
    failures: list[Failure] = []

    async def scenario(client: Client) -> None:
        # One of these takes more than 30 ms, and the first need not wait.
        calls = (client.infer(batch(32), 30.0, 0.1) for _ in range(16))
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        failures.extend(outcome.failure for outcome in outcomes if isinstance(outcome, CallFailed))
        assert len(failures) + sum(isinstance(outcome, Outputs) for outcome in outcomes) == 16

    using(url_of(timing_out, protocol), scenario)
    assert 0 < len(failures) < 16
    assert {failure.reason for failure in failures} == {"timeout"}
    assert all("Request timeout expired" in failure.detail for failure in failures)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calls_when_cancelled_at_any_time_and_the_server_is_killed_among_them_then_nothing_is_printed(
    victim: TritonServer, protocol: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    complaints: list[dict[str, object]] = []  # such as exceptions of tasks that nobody retrieved
    outcomes: list[str] = []
    chance = random.Random(0)

    async def scenario(client: Client) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

        async def call(cancel_after_s: float) -> None:
            try:
                async with asyncio.timeout(cancel_after_s):
                    await client.infer(batch(8), 30.0, 30.0)
            except TimeoutError:
                outcomes.append("cancelled")
            except CallFailed as error:
                outcomes.append(error.failure.reason)
            else:
                outcomes.append("answered")

        # One instance needs 20 ms for one of them: most wait in the server when their time is over.
        await asyncio.gather(*(call(chance.uniform(0.0, 0.5)) for _ in range(60)))
        caught = [asyncio.create_task(call(30.0)) for _ in range(40)]
        await asyncio.wait(caught, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(victim.kill)
        await asyncio.gather(*caught)

    using(url_of(victim, protocol), scenario)
    gc.collect()  # unretrieved exceptions are reported when their task is freed
    victim.start()
    victim.wait_ready()
    assert (
        {"answered", "cancelled", "connection"} <= set(outcomes) <= {"answered", "cancelled", "connection", "refused"}
    )
    assert complaints == []
    assert [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"] == []
    assert capfd.readouterr().err == ""
