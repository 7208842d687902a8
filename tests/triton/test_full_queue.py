"""Real servers whose queue is full: their UNAVAILABLE is a second try elsewhere or 503, and opens no breaker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tritonclient.grpc as triton_client
from tritonclient.utils import InferenceServerException

from exporter.triton_config import TritonOptions
from server.backends.base import Outputs
from server.backends.triton.connect import connect
from server.backends.triton.failure import CallFailed, Failure
from tests.triton.conftest import PROTOCOLS, SHIPPED, url_of
from tests.triton.test_clients import MANIFEST, batch
from tests.triton.test_gateway import IMAGES, PNG, Load, assert_books_balance, gateway, series, total
from tests.triton_server import TritonServer, python_repository

FULL = "Exceeds maximum queue size"
# So long that nobody's time is over while a queue is full: with a queue policy, 2.51 leaves requests lying for 0.5 s.
PATIENT = "/classify?deadline_ms=9000"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server that lets one request wait and refuses the next. The exporter writes no such limit."""
    options = TritonOptions("python", threads=1, queue_timeout_s=20.0)
    repository = python_repository(SHIPPED, tmp_path_factory.mktemp("narrow"), options)
    config = repository / MANIFEST.name / "config.pbtxt"
    unlimited = config.read_text()
    config.write_text(unlimited.replace("timeout_action: REJECT", "timeout_action: REJECT max_queue_size: 1"))
    assert config.read_text() != unlimited
    with TritonServer(repository) as server:
        yield server


@contextmanager
def crowd(server: TritonServer, clients: int = 4) -> Iterator[None]:
    """Other clients of a server, who send it more than it takes: it was full before this yields."""
    stop, refused = threading.Event(), threading.Event()

    def press() -> None:
        with triton_client.InferenceServerClient(server.grpc_url) as client:
            inputs = []
            for name, values in (
                ("images", batch(32).images),
                ("slots", batch(32).slots),
                ("num_selected_experts", batch(32).num_selected_experts),
            ):
                inputs.append(triton_client.InferInput(name, values.shape, {1: "UINT8", 8: "INT64"}[values.itemsize]))
                inputs[-1].set_data_from_numpy(values)
            while not stop.is_set():
                try:
                    client.infer(MANIFEST.name, inputs)
                except InferenceServerException as error:
                    if FULL not in str(error):
                        raise
                    refused.set()
                    stop.wait(0.002)  # asking again at once would take the core from the server

    threads = [threading.Thread(target=press) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        assert refused.wait(30), "the queue was never full"
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calls_when_the_queue_is_full_then_they_fail_at_once_with_that_reason(
    narrow: TritonServer, protocol: str
) -> None:
    async def main() -> list[Outputs | BaseException]:
        client = connect(url_of(narrow, protocol), MANIFEST)
        try:
            return await asyncio.gather(
                *(client.infer(batch(32), 30.0, 30.0) for _ in range(16)), return_exceptions=True
            )
        finally:
            await client.close()

    outcomes = asyncio.run(main())
    failures: list[Failure] = [outcome.failure for outcome in outcomes if isinstance(outcome, CallFailed)]
    assert len(failures) + sum(isinstance(outcome, Outputs) for outcome in outcomes) == 16
    # One runs, at most one is about to, and one waits.
    assert 16 - 3 <= len(failures) < 16
    assert {failure.reason for failure in failures} == {"queue_full"}
    assert all(FULL in failure.detail for failure in failures)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_full_queue_when_there_is_no_other_server_then_503_while_it_lasts_and_the_breaker_stays_closed(
    narrow: TritonServer, protocol: str
) -> None:
    with gateway(narrow, protocol=protocol) as client, Load(str(client.base_url), query=PATIENT) as load:
        with crowd(narrow):
            load.wait_for(503, "backend_unavailable", count=10)
            assert client.get("/readyz").status_code == 200
            while (answer := client.post(PATIENT, content=IMAGES[0], headers=PNG)).status_code == 200:
                pass  # a place was free at that moment
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert "(queue_full)" in answer.json()["detail"]
            assert series(client)['vmoe_endpoint_state{endpoint="0",state="closed"}'] == 1
        load.wait_for(200, count=50)
        load.__exit__()
        samples = series(client)
        # Not one of another kind, so nothing has ever opened the breaker.
        full = samples['vmoe_endpoint_failures_total{endpoint="0",reason="queue_full"}']
        assert full == total(samples, "vmoe_endpoint_failures_total") >= 10
        assert set(load.counts()) <= {(200, ""), (503, "backend_unavailable"), (503, "overloaded")}


def test_full_queue_when_there_is_another_server_then_that_answers_and_nobody_notices(
    triton: TritonServer, narrow: TritonServer
) -> None:
    with gateway(narrow, triton) as client, crowd(narrow), Load(str(client.base_url), query=PATIENT) as load:
        load.wait_for(200, count=100)
        load.__exit__()
        samples = assert_books_balance(client, load)
        assert set(load.counts()) <= {(200, ""), (503, "overloaded")}
        full = samples['vmoe_endpoint_failures_total{endpoint="0",reason="queue_full"}']
        assert full == total(samples, "vmoe_endpoint_failures_total") > 0
        # Each went to the other server, once; its queue has no limit.
        assert samples['vmoe_endpoint_retries_total{endpoint="1"}'] == total(samples, "vmoe_endpoint_retries_total")
        assert samples['vmoe_endpoint_retries_total{endpoint="1"}'] == full
        assert all(samples[f'vmoe_endpoint_state{{endpoint="{each}",state="closed"}}'] == 1 for each in (0, 1))
