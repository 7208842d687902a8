"""Command line: `python -m server --model-repository model_repository --model vmoe-fashion-mnist`.

The options are the fields of `Settings`; pydantic-settings derives them, so no setting can lack one.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry
from pydantic import ValidationError
from pydantic_settings import CliApp

from exporter.bundle import Bundle, BundleError
from server.app import create_server
from server.backends.base import BackendError
from server.backends.choice import create_backend
from server.combine import combine
from server.policy_file import PolicyError
from server.record import RecordError
from server.settings import Settings

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Exits with 2 on a bad setting, with 1 on anything else that is bad."""
    try:
        settings = CliApp.run(Settings, cli_args=None if arguments is None else list(arguments))
    except ValidationError as error:
        sys.exit(_report(error))
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        bundle = Bundle.load(settings.model_repository / settings.model)
        registry = CollectorRegistry()
        others = [Bundle.load(settings.model_repository / name) for name in settings.also_models]
        combined = combine(bundle, others)
        backend = create_backend(settings, bundle, registry, others)
        server = create_server(settings, combined.bundle, backend, registry, combined.models)
    except (BackendError, BundleError, PolicyError, RecordError) as error:
        logger.error("%s", error)
        sys.exit(1)
    # What is loaded by now stays. A full collection would walk it each time, in the event loop.
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):  # raised again by uvicorn, once all is closed
        server.run()
    if not server.started:
        sys.exit(1)  # the address is taken; uvicorn has said so


def _report(error: ValidationError) -> int:
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        print(f"setting {name}: {item['msg']}, got {item['input']!r}" if name else item["msg"], file=sys.stderr)
    return 2
