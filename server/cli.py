"""Command line: `python -m server --model-repository model_repository --model vmoe-fashion-mnist`.

The options are the fields of `Settings`; pydantic-settings derives them, so no setting can lack one.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from pydantic_settings import CliApp

from server.app import LOAD_ERRORS, load_server, run_server
from server.settings import Settings
from server.versions import OWN, version_of
from server.workers.listening import ListenError, listen_alone
from server.workers.supervisor import supervise

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Exits with 2 on a bad setting, with 1 on anything else that is bad."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in given:
        print(OWN, version_of(OWN) or "(not installed)")
        return
    try:
        settings = CliApp.run(Settings, cli_args=given)
    except ValidationError as error:
        sys.exit(_report(error))
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    _warn(settings)
    if settings.workers > 1:
        sys.exit(supervise(settings))
    try:
        server = load_server(settings, CollectorRegistry())
        sockets = listen_alone(settings.host, settings.port)
    except (*LOAD_ERRORS, ListenError) as error:
        logger.error("%s", error)
        sys.exit(1)
    run_server(server, sockets)


def _warn(settings: Settings) -> None:
    """Of what is allowed and hardly meant."""
    if ignored := settings.without_effect:
        options = ", ".join("--" + name.replace("_", "-") for name in ignored)
        logger.warning("%s: ignored, for the backend is %s; give --backend triton, too", options, settings.backend)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if settings.workers > cores:
        logger.warning(
            "%d workers share %d cores, and slow each other down: give at most %d", settings.workers, cores, cores
        )


def _report(error: ValidationError) -> int:
    for item in error.errors():
        name, message = ".".join(str(part) for part in item["loc"]), item["msg"].removeprefix("Value error, ")
        got = "" if name in ("", "admin_key") else f", got {item['input']!r}"  # a key is for nobody's log
        print(f"setting {name}: {message}{got}" if name else message, file=sys.stderr)
    return 2
