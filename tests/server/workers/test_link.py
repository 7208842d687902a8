"""A gateway with a supervisor at the other end of its pipe: the test."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import pytest

from exporter.bundle import Bundle, Manifest
from server.policy_file import PolicyText
from server.policy_source import POSTED
from server.workers.link import Link
from server.workers.messages import Applied, Apply, Failed, Go, Reload, Share, Shared, Stop, Warm
from tests.server.conftest import serving, wait_ready
from tests.server.test_stop import IMAGE

LIMIT_S = 30.0
KEY = "secret"
DEFAULT = PolicyText('policy = "foresight"\n', "default (foresight)")
FIXED = PolicyText('policy = "fixed"\n', POSTED)


@contextmanager
def worker(
    manifest: Manifest, backend: Any, policy: PolicyText | None = None, setting: str = ""
) -> Iterator[tuple[Connection, httpx.Client]]:
    """The supervisor's end, and a client.

    Arguments:
        policy: of siblings.
        setting: the worker's own.
    """
    ours, theirs = Pipe()
    link = Link(theirs, policy, replaces=False)
    bundle = Bundle(Path("nowhere"), manifest)
    with (
        ours,
        theirs,
        serving(bundle, backend, wait=False, link=link, admin_key=KEY, policy=setting) as client,
    ):
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield ours, client


def receive(pipe: Connection) -> object:
    assert pipe.poll(LIMIT_S), "no message"
    return pipe.recv()


def test_ready_when_warm_but_siblings_are_not_then_only_at_the_word_of_the_supervisor(
    manifest: Manifest, backend: Any
) -> None:
    with worker(manifest, backend) as (pipe, client):
        assert receive(pipe) == Warm(DEFAULT)
        assert client.get("/readyz").json()["code"] == "not_ready"
        pipe.send(Go())
        wait_ready(client)


def test_warm_up_when_it_fails_then_the_supervisor_hears(manifest: Manifest, backend: Any) -> None:
    backend.failure = RuntimeError("no device")
    with worker(manifest, backend) as (pipe, _):
        assert receive(pipe) == Failed()


def test_start_when_siblings_have_a_policy_then_it_is_in_force_and_not_that_of_the_settings(
    manifest: Manifest, backend: Any
) -> None:
    with worker(manifest, backend, FIXED, setting="aimd") as (pipe, client):
        assert receive(pipe) == Warm(FIXED)
        assert client.get("/v1/policy").json()["policy"] == "fixed"
        assert client.get("/v1/policy").json()["source"] == POSTED


def test_post_when_the_policy_is_good_then_it_is_answered_once_the_supervisor_says_that_all_have_it(
    manifest: Manifest, backend: Any
) -> None:
    answers: list[httpx.Response] = []
    with worker(manifest, backend) as (pipe, client):
        receive(pipe)
        url, headers = f"{client.base_url}/v1/admin/policy", client.headers
        post = threading.Thread(target=lambda: answers.append(httpx.post(url, content=FIXED.text, headers=headers)))
        post.start()
        share = receive(pipe)
        assert share == Share(0, FIXED)
        assert client.get("/v1/policy").json()["policy"] == "foresight"  # until told, as all the others
        pipe.send(Apply(7, FIXED))
        assert receive(pipe) == Applied(7)
        assert client.get("/v1/policy").json()["policy"] == "fixed"
        assert answers == []
        pipe.send(Shared(0))
        post.join(timeout=LIMIT_S)
        assert answers[0].json()["policy"] == "fixed"


def test_post_when_the_policy_is_bad_then_nobody_else_hears_of_it(manifest: Manifest, backend: Any) -> None:
    with worker(manifest, backend) as (pipe, client):
        receive(pipe)
        assert client.post("/v1/admin/policy", content="quantile = 7").status_code == 422
        assert not pipe.poll()


def test_apply_when_it_does_not_suit_this_worker_then_the_old_one_stays_and_nobody_waits(
    manifest: Manifest, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with worker(manifest, backend) as (pipe, client):
        receive(pipe)
        pipe.send(Apply(1, PolicyText('[budgets.auto]\nfloor = "9,9"', "a sibling")))
        assert receive(pipe) == Applied(1)
        assert client.get("/v1/policy").json()["policy"] == "foresight"
    assert "a sibling, line 1: floor" in caplog.text
    assert "the policy in force stays in this worker" in caplog.text


def test_reload_when_the_supervisor_asks_then_the_file_is_read_and_shared(
    manifest: Manifest, backend: Any, tmp_path: Path
) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(DEFAULT.text)
    with worker(manifest, backend, setting=str(path)) as (pipe, _):
        assert receive(pipe) == Warm(PolicyText(DEFAULT.text, str(path)))
        path.write_text(FIXED.text)
        pipe.send(Reload())
        assert receive(pipe) == Share(0, PolicyText(FIXED.text, str(path)))
        pipe.send(Shared(0))


def test_stop_when_it_comes_twice_then_what_is_inside_is_answered_all_the_same(
    manifest: Manifest, backend: Any
) -> None:
    answers: list[httpx.Response] = []
    with worker(manifest, backend) as (pipe, client):
        receive(pipe)
        pipe.send(Go())
        wait_ready(client)
        backend.gate.clear()
        url = f"{client.base_url}/classify?deadline_ms=9000"
        ask = threading.Thread(target=lambda: answers.append(httpx.post(url, **IMAGE, timeout=LIMIT_S)))
        ask.start()
        while "vmoe_running_batches 1.0" not in client.get("/metrics").text:
            os.sched_yield()
        for _ in range(2):
            pipe.send(Stop())
        pipe.send(Apply(1, FIXED))
        assert receive(pipe) == Applied(1)  # so that both have been read
        backend.gate.set()
        ask.join(timeout=LIMIT_S)
        assert answers[0].status_code == 200


def test_supervisor_when_it_is_gone_then_the_gateway_drains(manifest: Manifest, backend: Any) -> None:
    with worker(manifest, backend) as (pipe, client):
        receive(pipe)
        pipe.send(Go())
        wait_ready(client)
        pipe.close()
        with pytest.raises(httpx.HTTPError):  # refused in the end, or cut
            ask_for_ever(client)


def ask_for_ever(client: httpx.Client) -> None:
    while True:
        client.get("/readyz")
