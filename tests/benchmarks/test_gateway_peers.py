"""The comparison of servers: its peers run, and its table says what was measured."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from loadtest.client import Answered, Reply, connect
from loadtest.images import SAMPLE
from tests.benchmarks import process_tree
from tests.benchmarks.gateway_peer_figures import markdown
from tests.benchmarks.gateway_peers import Turn
from tests.benchmarks.peers.running import Server, alone, peer, target_of

ANKLE_BOOT = 9  # the class of the sample


@pytest.mark.parametrize("name", ["fastapi", "litserve"])
def test_peer_when_asked_by_the_generator_then_the_class_is_right(name: str) -> None:
    arguments = ()
    if name == "litserve":
        pytest.importorskip("litserve", reason="in the extra `bench` alone")
        arguments = ("1",)
    with peer(name, *arguments) as server:
        assert isinstance(reply := asyncio.run(_ask(server)), Answered)
        assert reply.index == ANKLE_BOOT
        assert process_tree.cpu_s(server.pid) > 0
    assert process_tree.members(server.pid) == []


def test_tree_when_a_child_works_then_its_time_counts_until_and_after_it_ends() -> None:
    # The child says when it has used 0.1 s; its parent then waits for it and so inherits its time.
    child = "import time\nwhile time.process_time() < 0.1: pass\nprint('done', flush=True)\ninput()"
    parent = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\nprint('over', flush=True)\ninput()"
    )
    command = [sys.executable, "-c", parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for said, size in (("done\n", 2), ("over\n", 1)):
            assert process.stdout.readline() == said
            assert len(process_tree.members(process.pid)) == size
            assert process_tree.cpu_s(process.pid) >= 0.1
            process.stdin.write("\n")
            process.stdin.flush()
    assert process_tree.cpu_s(process.pid) == 0


def test_memory_when_a_process_fills_pages_then_they_are_private() -> None:
    fill = "pages = b'1' * 2**25\nprint('full', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", fill], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"full\n"
        memory = process_tree.memory(process.pid)
        process.kill()
    assert 2**25 < memory.private < memory.proportional < memory.total < 2**26
    assert memory.shared == memory.total - memory.private


def test_turn_when_it_is_one_server_s_then_only_the_other_is_stopped_and_goes_on_after_it() -> None:
    command = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as first,
        subprocess.Popen(command, stdin=subprocess.PIPE) as second,
    ):
        servers = [Server("first", "", first.pid), Server("second", "", second.pid)]
        with alone(servers[0], servers):
            assert os.waitid(os.P_PID, second.pid, os.WSTOPPED) is not None
            assert os.waitid(os.P_PID, first.pid, os.WSTOPPED | os.WNOHANG) is None
        assert os.waitid(os.P_PID, second.pid, os.WCONTINUED) is not None
        for process in (first, second):
            process.kill()


def test_table_when_ours_is_twice_as_fast_in_one_round_and_equal_in_the_other_then_the_ratio_is_their_median() -> None:
    def turn(server: str, throughput_hz: float, cpu_s: float, failed: int) -> Turn:
        return Turn(server, {16: throughput_hz}, {16: cpu_s}, 70.0, [0.01, 0.02, 0.03], failed, 0.002)

    slow = turn("slow", 100, 0.009, 0)
    turns = [turn("ours", 200, 0.004, 1), slow, turn("ours", 100, 0.006, 1), slow]
    text = markdown(turns, {8: 0.003}, {2.0: 99.0}, "conditions")
    # Medians of 200 and 100, and of 4 and 6 ms; of six latencies the middle two are 20, the last two 30 ms.
    assert "| ours | 150 | 5.00 | 20.0 | 30.0 | 2 |" in text
    assert "Throughput of ours over slow with 16 users: 1.50, by round 2.00, 1.00." in text
    assert "3.00 ms in batches of 8" in text
    assert "2 ms 99/s" in text
    assert "late by 2.0 ms" in text


async def _ask(server: Server) -> Reply:
    async with connect(server.url, 30.0, target_of(server)) as client:
        return await client.classify(client.address("auto", None), SAMPLE.read_bytes(), {"Content-Type": "image/png"})
