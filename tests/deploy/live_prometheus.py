"""A real Prometheus with the shipped configuration, on a free port, scraping targets of the test."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.triton_server import free_port

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
_READY_LIMIT_S = 30.0  # it takes half a second on a quiet machine


@dataclass(frozen=True)
class Prometheus:
    """Its HTTP API."""

    client: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an instant query: a vector, each element with `metric` and `value`.

        Raises:
            AssertionError: Prometheus refuses the expression.
        """
        answer = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{answer.get('error')}: {expression}"
        assert answer["data"]["resultType"] == "vector", expression
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with the health of its last evaluation."""
        groups = self.client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def running_prometheus(directory: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """Starts it, and stops it at the end.

    Arguments:
        directory: for its files.
        targets: by job, in place of what the shipped configuration discovers; jobs without one get none.
    """
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    assert targets.keys() <= jobs.keys()
    port = free_port()
    for name, job in jobs.items():
        job.pop("dns_sd_configs", None)
        mine = [f"127.0.0.1:{port}"] if name == "prometheus" else targets.get(name, ())
        job["static_configs"] = [{"targets": list(mine)}]
    # The one other difference: a test has no time for intervals of seconds.
    config["global"] = {"scrape_interval": "250ms", "evaluation_interval": "250ms"}
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    (directory / "rules.yml").write_text((DEPLOY / "rules.yml").read_text())
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:

            def ready() -> bool:
                assert process.poll() is None, f"Prometheus ended:\n{(directory / 'log').read_text()}"
                try:
                    return client.get("/-/ready").status_code == 200
                except httpx.ConnectError:
                    return False

            wait_until(ready, _READY_LIMIT_S, "Prometheus is ready")
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_until(holds: Callable[[], bool], limit_s: float, what: str) -> None:
    """Asks again and again; each question is a round trip to a server, so this does not spin."""
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {limit_s:g} s: {what}"
