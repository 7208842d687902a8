"""`python -m server --workers 2`: one gateway to its clients, whatever becomes of the processes behind."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks import process_tree
from tests.deploy.conftest import tool
from tests.server.conftest import ignores
from tests.triton_server import free_port

ROOT = Path(__file__).parents[2]
PNG = (ROOT / "examples/ankle_boot.png").read_bytes()
LIMIT_S = 60.0  # a start takes two seconds on a quiet machine
KEY = "secret"
DRAINING = tuple(f"worker {number} server.gateway: draining" for number in (1, 2))
FIXED, AIMD = 'policy = "fixed"\n', 'policy = "aimd"\n'


@dataclass(frozen=True)
class Reply:
    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass
class Fleet:
    """A supervisor with two workers.

    Attributes:
        directory: in which the supervisor makes its own.
    """

    process: subprocess.Popen[str]
    port: int
    directory: Path
    _lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def read_log(self) -> None:
        """Until its end: of the last process that writes there."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()

    @property
    def log(self) -> str:
        with self._changed:
            return "".join(self._lines)

    def wait_for_log(self, *texts: str, since: int = 0) -> None:
        """Until each text was in a line, from line `since` on."""

        def missing() -> list[str]:
            return [text for text in texts if not any(text in line for line in self._lines[since:])]

        with self._changed:
            assert self._changed.wait_for(lambda: not missing(), LIMIT_S), f"{missing()}:\n{''.join(self._lines)}"

    @property
    def lines(self) -> int:
        with self._changed:
            return len(self._lines)

    def private(self) -> list[Path]:
        """Directories of supervisors; ONNX Runtime leaves a file beside them."""
        return list(self.directory.glob("vmoe-workers-*"))

    def workers(self) -> list[int]:
        """Process ids: of those with a process group of their own."""
        found = [pid for pid in process_tree.members(self.process.pid) if os.getpgid(pid) == pid]
        return [pid for pid in found if pid != self.process.pid]

    def ask(self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Reply:
        """On a connection of its own."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, response.read().decode())
        finally:
            connection.close()

    def classify(self) -> int:
        """The status of an answer."""
        return self.ask("POST", "/classify?budget=low&deadline_ms=9000", PNG, {"Content-Type": "image/png"}).status

    def answered(self) -> dict[int, float]:
        """By worker, as it counts for itself."""
        return self._values("counter", "vmoe_requests_total")

    def in_flight(self) -> dict[int, float]:
        return self._values("gauge_livesum", "vmoe_in_flight_requests")

    def _values(self, kind: str, series: str) -> dict[int, float]:
        (directory,) = self.private()
        found = {}
        for path in directory.glob(f"{kind}_*.db"):
            values = MmapedDict.read_all_values_from_file(str(path))
            found[int(path.stem.rpartition("_")[2])] = sum(value for key, value, *_ in values if f'"{series}"' in key)
        return found

    def policies(self) -> set[str]:
        """In force, as sixteen connections see it: one worker alone has all of them in 2 of 65,536 cases."""
        return {self.ask("GET", "/v1/policy").json()["policy"] for _ in range(16)}

    def admin(self, method: str, text: str = "") -> Reply:
        return self.ask(method, "/v1/admin/policy", text.encode(), {"Authorization": f"Bearer {KEY}"})


@contextmanager
def running(directory: Path, *arguments: str) -> Iterator[Fleet]:
    """Killed with all its processes at the end, unless it has ended."""
    directory.mkdir(exist_ok=True)
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "--workers", "2", "--port", str(port), *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(directory), "VMOE_ADMIN_KEY": KEY},
        stderr=subprocess.PIPE,
        text=True,
    )
    fleet = Fleet(process, port, directory)
    reader = threading.Thread(target=fleet.read_log)
    reader.start()
    try:
        yield fleet
    finally:
        process_tree.send(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(timeout=LIMIT_S)
        assert process.stderr is not None
        process.stderr.close()


@contextmanager
def serving(directory: Path, *arguments: str) -> Iterator[Fleet]:
    """Ready."""
    with running(directory, *arguments) as fleet:
        fleet.wait_for_log(*(f"worker {number} server.gateway: ready" for number in (1, 2)))
        yield fleet


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text(FIXED)
    return path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, policy_file: Path) -> Iterator[Fleet]:
    with serving(tmp_path_factory.mktemp("fleet"), "--policy", str(policy_file)) as fleet:
        yield fleet
        pids = fleet.workers()
        fleet.process.send_signal(signal.SIGINT)
        assert fleet.process.wait(timeout=LIMIT_S) == 0  # as with one worker
        assert fleet.private() == []
        assert_ended(pids)
        assert "Traceback" not in fleet.log


def until(holds: Callable[[], bool], act: Callable[[], object]) -> int:
    """Acts until it holds; how often that was."""
    deadline_s, acts = time.monotonic() + LIMIT_S, 0
    while not holds():
        assert time.monotonic() < deadline_s
        act()
        acts += 1
    return acts


def assert_ended(pids: Sequence[int]) -> None:
    """Or do so soon."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(1000 * LIMIT_S), f"process {pid} lives on"
        os.close(descriptor)


def scrape(fleet: Fleet) -> dict[str, float]:
    """Sum of each series over its labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(fleet.ask("GET", "/metrics").text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def answer_in_both(fleet: Fleet) -> int:
    """Sends until both workers have answered; how often."""
    before = fleet.answered()

    def answered_in_both() -> bool:
        return all(fleet.answered().get(number, 0) > before.get(number, 0) for number in (1, 2))

    def ask() -> None:
        assert fleet.classify() == 200

    return until(answered_in_both, ask)


def enter_both(fleet: Fleet) -> list[socket.socket]:
    """Connections with a request whose body has begun; each worker has some of them."""
    head = (
        "POST /classify?budget=low&deadline_ms=9000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: image/png\r\nContent-Length: {len(PNG)}\r\n\r\n"
    ).encode()
    inside: list[socket.socket] = []

    def enter() -> None:
        inside.append(socket.create_connection(("127.0.0.1", fleet.port)))
        inside[-1].sendall(head + PNG[:20])
        until(lambda: sum(fleet.in_flight().values()) == len(inside), os.sched_yield)

    until(lambda: len(inside) > 2 and all(fleet.in_flight().values()), enter)
    return inside


def test_metrics_of_any_worker_are_the_sum_over_both(fleet: Fleet) -> None:
    before = scrape(fleet).get("vmoe_requests_total", 0.0)
    sent = answer_in_both(fleet)
    until(lambda: sum(fleet.answered().values()) == before + sent, os.sched_yield)  # an answer counts once it is sent
    for _ in range(8):
        found = scrape(fleet)
        assert found["vmoe_requests_total"] == before + sent
        assert found["vmoe_request_seconds_count"] == before + sent
        assert found["vmoe_in_flight_requests"] == found["vmoe_queue_images"] == found["vmoe_running_batches"] == 0
        # Wherever both have a share: at most what two threads can have had since their start.
        assert 0 < found["vmoe_event_loop_cpu_seconds_total"] < process_tree.cpu_s(fleet.process.pid)
    text = fleet.ask("GET", "/metrics").text
    documented = set(re.findall(r"`(vmoe_[a-z_]+)`", (ROOT / "docs/metrics.md").read_text()))
    rare = {
        "vmoe_image_errors_total",
        "vmoe_shed_images_total",
        "vmoe_failed_images_total",
        "vmoe_fallback_batches_total",
    }
    expected = {name for name in documented - rare if "endpoint" not in name}
    assert len(expected) > 25
    assert expected <= set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    checked = subprocess.run(
        [tool("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_policy_when_posted_to_one_worker_then_it_is_in_force_in_both_when_the_answer_comes(fleet: Fleet) -> None:
    for text, name in ((AIMD, "aimd"), (FIXED, "fixed"), ('policy = "slackfit"', "slackfit")):
        assert fleet.admin("POST", text).json()["policy"] == name
        assert fleet.policies() == {name}
    refused = fleet.admin("POST", 'policy = "fixed"\nquantile = 7')
    assert (refused.status, refused.json()["code"]) == (422, "invalid_policy")
    assert fleet.policies() == {"slackfit"}
    assert fleet.admin("DELETE").json()["policy"] == "fixed"
    assert fleet.policies() == {"fixed"}


def test_sighup_when_the_file_is_good_then_both_have_it_and_when_it_is_bad_neither(
    fleet: Fleet, policy_file: Path
) -> None:
    since = fleet.lines
    policy_file.write_text(AIMD)
    fleet.process.send_signal(signal.SIGHUP)
    fleet.wait_for_log(*(f"worker {each} server.gateway: policy aimd" for each in (1, 2)), since=since)
    assert fleet.policies() == {"aimd"}
    policy_file.write_text("quantile = 7")
    fleet.process.send_signal(signal.SIGHUP)
    fleet.wait_for_log("policy.toml, line 1: quantile", since=since)
    assert fleet.policies() == {"aimd"}
    policy_file.write_text(FIXED)


def test_worker_when_killed_then_the_other_answers_and_a_new_one_has_the_policy_and_the_counts(fleet: Fleet) -> None:
    answer_in_both(fleet)
    assert fleet.admin("POST", AIMD).status == 200
    counted, since = scrape(fleet)["vmoe_requests_total"], fleet.lines
    killed = fleet.workers()[0]
    os.kill(killed, signal.SIGKILL)
    fleet.wait_for_log("ended with exit code -9", since=since)
    for _ in range(8):
        assert fleet.classify() == 200
    fleet.wait_for_log("server.gateway: ready", "Application startup complete", since=since)
    log = "".join(fleet.log.splitlines(keepends=True)[since:])
    assert log.index("server.gateway: ready") < log.index("Application startup complete")  # warm before it listens
    sent = 8 + answer_in_both(fleet)
    assert scrape(fleet)["vmoe_requests_total"] == counted + sent
    assert fleet.policies() == {"aimd"}
    pids = fleet.workers()
    assert len(pids) == 2
    assert killed not in pids


def test_sigterm_when_both_have_requests_inside_then_all_are_answered_and_nothing_is_left(tmp_path: Path) -> None:
    with serving(tmp_path / "fleet") as fleet:
        inside = enter_both(fleet)
        pids, since = fleet.workers(), fleet.lines
        fleet.process.terminate()
        fleet.wait_for_log(*DRAINING, since=since)
        for connection in inside:
            connection.sendall(PNG[20:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.close()
        assert fleet.process.wait(timeout=LIMIT_S) == -signal.SIGTERM  # as with one worker
        assert fleet.private() == []
        assert_ended(pids)


def test_sigterm_when_sent_twice_then_nobody_waits_for_what_is_inside(tmp_path: Path) -> None:
    with serving(tmp_path / "fleet", "--drain-timeout-s", "600") as fleet:
        inside, pids, since = enter_both(fleet), fleet.workers(), fleet.lines
        fleet.process.terminate()
        fleet.wait_for_log(*DRAINING, since=since)
        fleet.process.terminate()
        assert fleet.process.wait(timeout=LIMIT_S) == -signal.SIGTERM
        assert fleet.private() == []
        assert_ended(pids)
        for connection in inside:
            connection.close()


@pytest.mark.parametrize("signals", [1, 2])
def test_sigterm_when_a_worker_hangs_then_it_is_killed_soon_after_its_time_or_at_the_second_one(
    tmp_path: Path, signals: int
) -> None:
    limit_s = {1: 0, 2: 600}[signals]
    with serving(tmp_path / "fleet", "--drain-timeout-s", str(limit_s)) as fleet:
        pids = fleet.workers()
        os.kill(pids[0], signal.SIGSTOP)
        for number in range(signals):
            fleet.process.terminate()
            until(lambda seen=number + 1: fleet.log.count("stopping") == seen, os.sched_yield)  # type: ignore[misc]
        assert fleet.process.wait(timeout=LIMIT_S) == -signal.SIGTERM
        assert fleet.log.count("has not ended in time: killing it") >= 1
        assert fleet.private() == []
        assert_ended(pids)


def test_sighup_when_the_gateway_starts_then_it_starts_nevertheless(tmp_path: Path) -> None:
    with running(tmp_path / "fleet") as fleet:
        until(lambda: ignores(fleet.process.pid, signal.SIGHUP), os.sched_yield)
        fleet.process.send_signal(signal.SIGHUP)
        fleet.wait_for_log("2 workers, ")
        fleet.process.send_signal(signal.SIGHUP)
        fleet.wait_for_log(*(f"worker {number} server.gateway: ready" for number in (1, 2)))


def test_supervisor_when_killed_then_no_worker_is_left(tmp_path: Path) -> None:
    with serving(tmp_path / "fleet") as fleet:
        pids = fleet.workers()
        assert len(pids) == 2
        fleet.process.kill()
        assert_ended(pids)
        assert fleet.private() == []


def test_start_when_a_worker_cannot_then_all_end_with_its_message(tmp_path: Path) -> None:
    with running(tmp_path / "fleet", "--policy", "nowhere.toml") as fleet:
        assert fleet.process.wait(timeout=LIMIT_S) == 1
        assert "policy 'nowhere.toml' is neither a file nor a policy" in fleet.log
        assert "has never been ready" in fleet.log
        assert "is replaced" not in fleet.log
        assert fleet.private() == []


def test_start_when_the_port_is_taken_then_it_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    with running(tmp_path / "fleet", "--port", str(fleet.port)) as second:
        assert second.process.wait(timeout=LIMIT_S) == 1
        assert f"cannot listen on 127.0.0.1:{fleet.port}: Address already in use" in second.log


def test_start_when_two_do_at_once_then_one_of_them_is_refused(tmp_path: Path) -> None:
    with running(tmp_path / "first") as first, running(tmp_path / "second", "--port", str(first.port)) as second:
        both = [first, second]
        until(lambda: any(each.process.poll() is not None for each in both), os.sched_yield)
        refused, other = both if first.process.poll() is not None else reversed(both)
        assert refused.process.wait() == 1
        refused.wait_for_log(f"cannot listen on 127.0.0.1:{first.port}: Address already in use")
        other.wait_for_log(*(f"worker {number} server.gateway: ready" for number in (1, 2)))
