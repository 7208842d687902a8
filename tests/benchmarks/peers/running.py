"""The servers of `gateway_peers`, as processes that run."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtest.client import Target
from tests.benchmarks import process_tree
from tests.benchmarks.live_gateway import BUNDLE, POLICIES, TIMEOUT_S, free_port, gateway, put_policy, serving
from tests.benchmarks.peers.classifier import HOST


@dataclass(frozen=True)
class Server:
    """Under test; `pid` is the first of its processes."""

    name: str
    url: str
    pid: int


@contextmanager
def ours(name: str, tree: Path | None = None, threads: int = 1) -> Iterator[Server]:
    """Arguments:
    tree: another checkout.
    threads: see `gateway`.
    """
    with gateway("fixed", tree=tree, threads=threads) as (url, pid):
        put_policy(url, POLICIES["fixed full"])
        yield Server(name, url, pid)


@contextmanager
def peer(name: str, *arguments: str) -> Iterator[Server]:
    """A module of `peers`."""
    port = free_port()
    url = f"http://{HOST}:{port}"
    with serving(url, "/health", f"tests.benchmarks.peers.{name}_peer", str(port), *arguments) as pid:
        try:
            yield Server(name, url, pid)
        finally:
            process_tree.send(pid, signal.SIGKILL)  # LitServe's first process would leave others behind


@contextmanager
def alone(server: Server, servers: Sequence[Server]) -> Iterator[None]:
    """Stops the others."""
    others = [each for each in servers if each is not server]
    for each in others:
        process_tree.send(each.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in others:
            process_tree.send(each.pid, signal.SIGCONT)


def target_of(server: Server) -> Target:
    """What a peer would not know to say of itself."""
    return Target(server.url, BUNDLE.name, (), "fixed", "", {"auto": TIMEOUT_S}, None, None)
