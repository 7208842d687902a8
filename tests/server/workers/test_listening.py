"""Real sockets of this process, which stands for several."""

from __future__ import annotations

import select
import socket
from contextlib import ExitStack

import pytest

from server.workers.listening import ListenError, bind, reserved


def test_bind_when_several_do_then_each_gets_connections_and_the_rest_go_to_whoever_is_left() -> None:
    with reserved("127.0.0.1", 0) as addresses, ExitStack() as stack:
        ((_, address),) = addresses
        first, second = (stack.enter_context(bind(addresses)[0]) for _ in range(2))
        with pytest.raises(ConnectionRefusedError):  # bound, but nobody listens
            socket.create_connection((str(address[0]), int(address[1])))
        for listener in (first, second):
            listener.listen()
        # One of them alone gets all 64 in 2 of 2^64 cases.
        clients = [socket.create_connection((str(address[0]), int(address[1]))) for _ in range(64)]
        assert set(select.select([first, second], [], [], 0)[0]) == {first, second}
        first.close()  # as when its process dies: connections that nobody has accepted are reset
        for client in clients:
            client.setblocking(False)
        states = [_state(client) for client in clients]
        assert set(states) == {"reset", "waits"}
        late = [socket.create_connection((str(address[0]), int(address[1]))) for _ in range(64)]
        for client in clients + late:
            client.close()
        second.setblocking(False)
        accepted = 0
        while select.select([second], [], [], 0)[0]:
            second.accept()[0].close()
            accepted += 1
        assert accepted == states.count("waits") + 64


def _state(client: socket.socket) -> str:
    try:
        client.recv(1)
    except BlockingIOError:
        return "waits"
    except ConnectionResetError:
        return "reset"
    return "closed"


def test_reserved_when_others_listen_there_then_it_is_refused_though_they_share() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            reserved("127.0.0.1", port),
        ):
            pass


def test_reserved_when_others_have_done_so_then_it_is_refused_though_nobody_listens_yet() -> None:
    with reserved("127.0.0.1", 0) as addresses:
        port = int(addresses[0][1][1])
        with (
            pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"),
            reserved("127.0.0.1", port),
        ):
            pass
    with reserved("127.0.0.1", port) as again:  # given back
        assert again == addresses


def test_reserved_when_the_host_is_unknown_then_the_message_names_it() -> None:
    with pytest.raises(ListenError, match=r"cannot listen on nowhere\.invalid:80"), reserved("nowhere.invalid", 80):
        pass
