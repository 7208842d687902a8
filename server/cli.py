"""Command line: `python -m server --model-repository model_repository --model vmoe-fashion-mnist`.

The options are the fields of `Settings`; pydantic-settings derives them, so no setting can lack one.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from pydantic_settings import CliApp

from server.app import LOAD_ERRORS, load_server, run_server
from server.settings import Settings
from server.workers.supervisor import supervise

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Exits with 2 on a bad setting, with 1 on anything else that is bad."""
    try:
        settings = CliApp.run(Settings, cli_args=None if arguments is None else list(arguments))
    except ValidationError as error:
        sys.exit(_report(error))
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.workers > 1:
        sys.exit(supervise(settings))
    try:
        server = load_server(settings, CollectorRegistry())
    except LOAD_ERRORS as error:
        logger.error("%s", error)
        sys.exit(1)
    run_server(server)
    if not server.started:
        sys.exit(1)  # the address is taken; uvicorn has said so


def _report(error: ValidationError) -> int:
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        print(f"setting {name}: {item['msg']}, got {item['input']!r}" if name else item["msg"], file=sys.stderr)
    return 2
