"""One worker process: the gateway, whole, on a listening socket of its own."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from server.app import LOAD_ERRORS, load_server, run_server
from server.policy_file import PolicyText
from server.settings import Settings
from server.workers.link import Link
from server.workers.listening import Address, ListenError, bind
from server.workers.registry import SharedRegistry

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a worker begins with.

    Attributes:
        number: from 1; of the one that it replaces, if it does.
        directory: of all workers, for `SharedRegistry`.
        policy, replaces: see `Link`.
    """

    settings: Settings
    number: int
    addresses: Sequence[Address]
    directory: Path
    policy: PolicyText | None
    replaces: bool


def work(start: Start, pipe: Connection) -> None:
    """Main function of the process. Exits with 1 where it cannot serve, after saying why."""
    os.setpgrp()  # the terminal's Ctrl-C comes by way of the supervisor, once
    settings = start.settings
    log_format = f"%(asctime)s %(levelname)s worker {start.number} %(name)s: %(message)s"
    logging.basicConfig(level=settings.log_level.upper(), format=log_format)
    try:
        registry = SharedRegistry(start.directory, start.number)
        link = Link(pipe, start.policy, replaces=start.replaces)
        server = load_server(settings, registry, link)
        sockets = bind(start.addresses)
    except (*LOAD_ERRORS, ListenError) as error:
        logger.error("%s", error)
        sys.exit(1)
    run_server(server, sockets)
    if link.lost:
        shutil.rmtree(start.directory, ignore_errors=True)  # else the supervisor does
