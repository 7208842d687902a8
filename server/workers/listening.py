"""One port for several processes: the kernel spreads connections over their listening sockets (SO_REUSEPORT).

With one socket for all, an event loop that wakes up takes every connection that waits, so that one worker may get
nearly all of those that stay open; and a worker cannot stay away from it until it is warm. The price: connections that
wait, unaccepted, for a worker that dies are reset, where siblings could have taken them.

Of 32 connections at once to two processes with uvloop, the busier one gets 28 of one socket (median of 20 trials; 32 at
the 90th percentile), and 17 (21) with a socket each: `python -m tests.benchmarks.accept_balance`, 2026-11-28, Linux
6.18.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

Address = tuple[socket.AddressFamily, tuple[str | int, ...]]


class ListenError(Exception):
    """The address cannot be listened on; the message names it."""


@contextmanager
def reserved(host: str, port: int) -> Iterator[list[Address]]:
    """The addresses of a host, with the port that was taken if it is 0; no other gateway with workers gets them
    meanwhile.

    Raises:
        ListenError: the host is unknown, somebody listens there, or another gateway with workers is about to.
    """
    if sys.platform != "linux":
        raise ListenError(f"several workers need Linux, which spreads connections, this is {sys.platform}; start one")
    addresses: list[Address] = []
    with ExitStack() as stack:
        try:
            found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in dict.fromkeys(found):
                # Without SO_REUSEPORT: another gateway that listens there would not be noticed with it.
                bound = stack.enter_context(_socket(family, kind, protocol))
                bound.bind((address[0], port, *address[2:]))
                port = bound.getsockname()[1]
                # Until workers listen, others can bind the port as well: the price of SO_REUSEADDR, without which
                # a restart would wait a minute. This name is of the network namespace, as ports are, and goes with us.
                name = stack.enter_context(socket.socket(socket.AF_UNIX))
                name.bind(f"\0vmoe-gateway {address[0]}:{port}")
                addresses.append((family, bound.getsockname()))
        except OSError as error:
            raise ListenError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        yield addresses


def bind(addresses: Sequence[Address]) -> list[socket.socket]:
    """Sockets of this process, bound; connections come from `listen` on.

    Raises:
        ListenError: one is taken by a process of another user, or in another way.
    """
    sockets: list[socket.socket] = []
    for family, address in addresses:
        bound = _socket(family, socket.SOCK_STREAM, 0)
        sockets.append(bound)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            bound.bind(address)
        except OSError as error:
            for each in sockets:
                each.close()
            raise ListenError(f"cannot listen on {address[0]}:{address[1]}: {error.strerror}") from error
    return sockets


def _socket(family: int, kind: int, protocol: int) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections that linger after the last run
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as asyncio does: IPv4 has a socket of its own
    return made
