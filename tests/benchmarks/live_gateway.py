"""A real gateway for benchmarks: on all cores but the last, which the generator keeps to itself.

Both compete for whatever else runs on the machine. One gateway serves every policy in turn: it is put in force over
`POST /v1/admin/policy`, when nothing is inside. What the gateway has learned about the machine's latency stays, as it
would in production; what a policy remembers does not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import platform
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from loadtest import arrivals
from loadtest.calibration import Calibration, calibrate, probe
from loadtest.client import Answered, Client, connect
from loadtest.generator import Plan, measure
from loadtest.images import SAMPLE, Images, load_images
from loadtest.live_results import Terms
from loadtest.prediction import Predictor
from loadtest.report import Report
from loadtest.subject import Subject
from loadtest.surroundings import Surroundings
from loadtest.trace import Trace
from server.admin import TOML
from server.policy_file import parse_policy
from vmoe.data import FASHION_MNIST_DIRECTORY

BUNDLE = Path("model_repository/vmoe-fashion-mnist")
OUT = Path("docs/bench")
MAX_BATCH_SIZE = 16  # the gateway's default
# Chosen, not tuned. Three times the default deadline: HTTP on the core of inference makes the machine slower than the
# profiled one. The grace is for HTTP there and back, which the gateway's deadline leaves out.
DEADLINE_MS, GRACE_S = 300.0, 0.05
WARMUP_S, TIMEOUT_S = 1.0, 5.0
CORES = sorted(os.sched_getaffinity(0))  # Linux
SERVER_CORES = CORES[:-1] or CORES
USERS, SATURATE_S = 32, 3.0
_KEY = "benchmark"  # of a gateway that listens on the loopback interface alone

_BUDGET = "[budgets.auto]\ndeadline_ms = {deadline_ms}\n"
_FIXED = 'policy = "fixed"\n' + _BUDGET + 'floor = "{point}"\nceiling = "{point}"\n'
POLICIES = {
    name: f'policy = "{name}"\n{_BUDGET.format(deadline_ms=DEADLINE_MS)}' for name in ("foresight", "slackfit", "aimd")
} | {f"fixed {point}": _FIXED.format(deadline_ms=DEADLINE_MS, point=point) for point in ("full", "cheapest")}
TERMS = Terms(WARMUP_S, TIMEOUT_S, GRACE_S)


def pin() -> None:
    """Takes the last core for this process; exits where there is no other one for the gateway."""
    if len(CORES) < 2:
        raise SystemExit("gateway and generator need a core each; this process may use one")
    os.sched_setaffinity(0, CORES[-1:])


def read_images(subject: Subject) -> Images:
    """The test set where it is installed, else the sample."""
    data = FASHION_MNIST_DIRECTORY
    return load_images(data if data.is_dir() else SAMPLE, subject.manifest.labels)


@contextmanager
def gateway(policy: str, *module: str, tree: Path | None = None, threads: int = 1) -> Iterator[tuple[str, int]]:
    """URL and process id of `python -m server`, or of another module that takes its options, ready.

    Arguments:
        policy: as the setting.
        tree: another checkout of this project, whose code is run.
        threads: of one inference; with more than one, the gateway has all cores.
    """
    port = free_port()
    cores = CORES if threads > 1 else SERVER_CORES
    arguments = ("--port", str(port), "--threads", str(threads), "--policy", policy, "--log-level", "warning")
    with serving(
        f"http://127.0.0.1:{port}", "/readyz", *(module or ("server",)), *arguments, tree=tree, cores=cores
    ) as pid:
        yield f"http://127.0.0.1:{port}", pid


@contextmanager
def serving(
    url: str, ready: str, *module: str, tree: Path | None = None, cores: Sequence[int] | None = None
) -> Iterator[int]:
    """Process id of `python -m MODULE ...` once `url` answers 200 on the path `ready`; by default on `SERVER_CORES`."""
    environment = os.environ | {"VMOE_ADMIN_KEY": _KEY} | ({} if tree is None else {"PYTHONPATH": str(tree)})
    # Set before Python starts: a thread keeps the affinity that it was started with.
    listed = ",".join(map(str, cores or SERVER_CORES))
    process = subprocess.Popen(
        ["taskset", "--cpu-list", listed, sys.executable, "-m", *module], env=environment, cwd=tree
    )
    try:
        deadline_s = time.monotonic() + 60
        while not _answers(url + ready):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"{module[0]} did not get ready")
            time.sleep(0.1)
        yield process.pid  # taskset has become the server
    finally:
        process.terminate()
        process.wait(timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def put_policy(url: str, text: str) -> None:
    """Waits until nothing is inside, then puts this policy.toml in force."""
    while any(_get(url, "/v1/policy")["state"][name] for name in ("waiting_images", "running_batches")):
        time.sleep(0.01)
    headers = {"Authorization": f"Bearer {_KEY}", "Content-Type": TOML}
    request = urllib.request.Request(f"{url}/v1/admin/policy", text.encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as response:
        assert response.status == 200


async def saturate(url: str, images: Images) -> tuple[float, int]:
    """Answers per second to `USERS` who each send the next image when they have the last answer; and all answers."""
    async with connect(url, TIMEOUT_S) as client:
        return await closed_loop(client, images, USERS, SATURATE_S)


async def closed_loop(client: Client, images: Images, users: int, duration_s: float) -> tuple[float, int]:
    """As `saturate`, with a client."""
    answers = total = 0

    async def user(number: int, end_s: float) -> None:
        nonlocal answers, total
        address = client.address("auto", 1000 * TIMEOUT_S)
        for place in itertools.count(number, users):
            if time.monotonic() >= end_s:
                return
            image = place % len(images)
            headers = {"Content-Type": images.media_types[image]}
            reply = await client.classify(address, images.bodies[image], headers)
            answers += isinstance(reply, Answered)  # after the wait: others count too
            total += isinstance(reply, Answered)

    for seconds in (1.0, duration_s):  # the first is warm-up
        answers, start_s = 0, time.monotonic()
        await asyncio.gather(*(user(number, start_s + seconds) for number in range(users)))
        rate_hz = answers / (time.monotonic() - start_s)
    return rate_hz, total


def probed(url: str, subject: Subject, images: Images) -> Calibration:
    """One probe at the full point."""
    put_policy(url, POLICIES["fixed full"])

    async def seen() -> Calibration:
        async with connect(url, TIMEOUT_S) as client:
            return calibrate(await probe(client, images), subject, MAX_BATCH_SIZE)

    return asyncio.run(seen())


def run_live(url: str, plan: Plan, images: Images) -> Report:
    return asyncio.run(measure(url, plan, lambda labels: images, lambda recorder: None))


def median_of(calibrations: Sequence[Calibration]) -> Calibration:
    """Figure by figure, of several probes; the batches are those of the last."""
    surroundings = {
        each.name: float(np.median([getattr(found.surroundings, each.name) for found in calibrations]))
        for each in fields(Surroundings)
    }
    slowdown, noise, crowd_hz = np.median([(each.slowdown, each.noise, each.crowd_hz) for each in calibrations], axis=0)
    return Calibration(
        Surroundings(**surroundings), float(slowdown), float(noise), float(crowd_hz), calibrations[-1].batches
    )


def predictor(subject: Subject, policy: str, probes: Sequence[Calibration]) -> Predictor:
    """Of one of `POLICIES`, on the machine that the probes saw."""
    active = parse_policy(POLICIES[policy], subject.manifest, subject.ladder, policy)
    return Predictor(subject, active, median_of(probes), MAX_BATCH_SIZE, 1)


def draw(load: float, on_off: bool, capacity_hz: float, duration_s: float, seed: Sequence[int]) -> Trace:
    """Poisson, or bursts of 0.5 s at five times the rate of the 2.5 s before each; `load` is the mean over capacity."""
    generator = np.random.default_rng(seed)
    process = arrivals.on_off if on_off else arrivals.poisson
    return Trace.of(process(load * capacity_hz, duration_s, generator))


@dataclass(frozen=True)
class Conditions:
    """What stands above the figures."""

    command: str
    probes: Sequence[Calibration]
    lag_p99_s: Sequence[float]
    failures: int

    def markdown(self) -> str:
        lag_ms = np.array(self.lag_p99_s) * 1000
        found = median_of(self.probes)
        costs_us = {
            name: f"{1e6 * getattr(found.surroundings, name):.0f}"
            for name in ("front_s", "decode_s", "batch_s", "answer_s", "refuse_s", "way_s")
        }
        rates = ", ".join(f"{each.crowd_hz:.0f}" for each in self.probes)
        return (
            f"{date.today().isoformat()}, `{self.command}` on {machine()} (load average at the end "
            f"{os.getloadavg()[0]:.1f}); Python {platform.python_version()}, ONNX Runtime {_version('onnxruntime')}, "
            f"float32, `{BUNDLE.name}`, batches of up to {MAX_BATCH_SIZE}, `--threads 1`, deadline {DEADLINE_MS:g} ms "
            f"from the end of the upload, grace {1000 * GRACE_S:g} ms for the client (live and simulated). One gateway "
            f"process on core {', '.join(map(str, CORES[:-1]))}, the generator alone on core {CORES[-1]}.\n\n"
            f"Capacity: {found.crowd_hz:.0f} images/s at the full point to 32 users, the median of {len(self.probes)} "
            f"probes ({rates}). The simulated machine is calibrated by these probes alone: {found.slowdown:.2f} times "
            f"slower than the profile, contention {found.surroundings.contention:.2f}, noise {found.noise:.1f} times "
            f"the profile's; event loop, us: {costs_us['front_s']} before admission, {costs_us['decode_s']} decoding, "
            f"{costs_us['answer_s']} per answer, {costs_us['refuse_s']} per refusal, {costs_us['batch_s']} per batch; "
            f"{costs_us['way_s']} on the way.\n\n"
            f"p99 of the generator's send lag, per run: median {np.median(lag_ms):.1f} ms, at most {lag_ms.max():.1f}; "
            f"above 10 ms in {(lag_ms > 10).sum()} of {len(lag_ms)} runs. {self.failures} requests failed.\n\n"
        )

    def document(self) -> dict[str, Any]:
        found = median_of(self.probes)
        return {
            "command": self.command,
            "machine": machine(),
            "date": date.today().isoformat(),
            "capacity_hz": [each.crowd_hz for each in self.probes],
            "slowdown": found.slowdown,
            "noise": found.noise,
            "surroundings": vars(found.surroundings),
        }


def machine() -> str:
    """Processor and cores."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(CORES)} cores"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _get(url: str, path: str) -> Mapping[str, Any]:
    with urllib.request.urlopen(url + path, timeout=10) as response:
        found: Mapping[str, Any] = json.loads(response.read())
    return found


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False
