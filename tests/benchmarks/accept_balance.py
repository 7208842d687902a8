"""Who gets the connections of a port that two event loops serve: `python -m tests.benchmarks.accept_balance`.

32 clients connect, one after the other or at once, 20 times, to two processes with uvloop: with one listening socket
that both inherit, and with a socket each (SO_REUSEPORT). Prints how many of the 32 the busier process gets. Linux; ten
seconds.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from server.workers.listening import bind

CONNECTIONS, TRIALS, BACKLOG = 32, 20, 2048
PAUSE_S = 0.002  # between two that come one after the other
SETTLE_S = 0.1
FREE = (socket.AF_INET, ("127.0.0.1", 0))


class Counting(asyncio.Protocol):
    """Counts connections of a process, and says nothing."""

    accepted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Counting.accepted += 1


def serve(listener: socket.socket, pipe: Connection) -> None:
    """Main function of a process: answers each message with the connections since the last."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await loop.create_server(Counting, sock=listener, backlog=BACKLOG)
        while await loop.run_in_executor(None, pipe.recv):
            pipe.send(Counting.accepted)
            Counting.accepted = 0

    uvloop.run(main())


@contextmanager
def servers(shared: bool) -> Iterator[tuple[tuple[str, int], list[Connection]]]:
    """The address, and a pipe to each."""
    context = get_context("fork")  # before there are threads; sockets are inherited
    reserved = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) if shared else bind([FREE])[0]
    pipes, processes = [], []
    with reserved:
        address = reserved.getsockname()
        for _ in range(2):
            ours, theirs = context.Pipe()
            listener = reserved if shared else bind([(socket.AF_INET, address)])[0]
            processes.append(context.Process(target=serve, args=(listener, theirs)))
            processes[-1].start()
            pipes.append(ours)
            if not shared:
                listener.close()
        for pipe in pipes:
            taken(pipe)
        yield address, pipes
        for pipe in pipes:
            pipe.send(False)
        for process in processes:
            process.join()


def taken(pipe: Connection) -> int:
    pipe.send(True)
    return int(pipe.recv())


def busier(address: tuple[str, int], pipes: list[Connection], at_once: bool) -> int:
    """One trial."""
    clients = [socket.socket() for _ in range(CONNECTIONS)]
    for client in clients:
        if at_once:
            client.setblocking(False)
            client.connect_ex(address)
        else:
            client.connect(address)
            time.sleep(PAUSE_S)
    time.sleep(SETTLE_S)
    found = [taken(pipe) for pipe in pipes]
    assert sum(found) == CONNECTIONS, found
    for client in clients:
        client.close()
    return max(found)


def main() -> None:
    table = Table("listening socket", "clients connect", "median", "90th percentile", "most")
    for shared in (True, False):
        with servers(shared) as (address, pipes):
            for at_once in (False, True):
                found = [busier(address, pipes, at_once) for _ in range(TRIALS)]
                way, when = "one for both" if shared else "one each", "at once" if at_once else "one by one"
                table.add_row(way, when, *(f"{value:g}" for value in np.quantile(found, (0.5, 0.9, 1.0))))
    Console().print(table)


if __name__ == "__main__":
    main()
