"""Puts the parts together: settings, bundle and backend to a server that listens."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp

from exporter.bundle import MANIFEST_FILE, Bundle, BundleError
from server.admin import build_admin_router
from server.backends.base import Backend, BackendError
from server.backends.choice import create_backend
from server.combine import combine
from server.connection import Connection
from server.error_handlers import install_error_handlers
from server.gateway import Gateway
from server.graceful_server import GracefulServer
from server.metrics import Metrics
from server.policy_file import PolicyError
from server.record import Recorder, RecordError
from server.request_context import RequestContext
from server.routes import build_classify, build_router
from server.settings import Settings
from server.short_cut import ShortCut
from server.upload import UploadLimits
from server.workers.link import Link
from server.workers.registry import SharedRegistry

# Once everything is answered, time for the last bytes to leave. Chosen, not tuned.
_CLOSE_TIMEOUT_S: Final = 5

# Of `load_server`; the messages say what is wrong.
LOAD_ERRORS: Final = (BackendError, BundleError, PolicyError, RecordError)


def load_server(settings: Settings, registry: CollectorRegistry, link: Link | None = None) -> GracefulServer:
    """`create_server`, with the bundles and the backend of the settings.

    Raises:
        BackendError, BundleError, PolicyError, RecordError: it must not listen.
    """
    bundle = _load_bundle(settings.model_repository, settings.model)
    others = [_load_bundle(settings.model_repository, name) for name in settings.also_models]
    combined = combine(bundle, others)
    backend = create_backend(settings, bundle, registry, others)
    return create_server(settings, combined.bundle, backend, registry, combined.models, link)


def _load_bundle(repository: Path, name: str) -> Bundle:
    try:
        return Bundle.load(repository / name)
    except BundleError as error:
        if (repository / name).is_dir():
            raise
        found = sorted(path.parent.name for path in repository.glob(f"*/{MANIFEST_FILE}"))
        raise BundleError(f"{error} {repository} has {', '.join(found) or 'none'}") from error


def run_server(server: GracefulServer, sockets: list[socket.socket] | None = None) -> None:
    """Serves until SIGINT, after which it returns, or SIGTERM, which then ends the process."""
    # What is loaded by now stays. A full collection would walk it each time, in the event loop.
    gc.collect()
    gc.freeze()
    with suppress(KeyboardInterrupt):  # raised again by uvicorn, once all is closed
        server.run(sockets)


def create_server(
    settings: Settings,
    bundle: Bundle,
    backend: Backend,
    registry: CollectorRegistry,
    models: Sequence[str] = (),
    link: Link | None = None,
) -> GracefulServer:
    """The server; it warms up in the background once it runs, and drains when it stops.

    Arguments:
        models: see `server.combine`.
        link: to the supervisor of several workers.

    Raises:
        BundleError, PolicyError, RecordError: it must not listen.
    """
    metrics = Metrics(registry, bundle.manifest.architecture.moe)
    metrics.build_is(bundle.manifest.name, bundle.manifest.version)
    gateway = Gateway(settings, bundle, backend, metrics, models, link)
    # Last of all that can fail: it leaves a file behind.
    recorder = None if settings.record is None else Recorder(settings.record, settings.record_max_bytes)
    config = uvicorn.Config(
        _create_app(settings, gateway, metrics, registry, recorder, warm_first=link is not None and link.replaces),
        host=settings.host,
        port=settings.port,
        loop="server.event_loop:EventLoop",
        http=Connection,
        log_config=None,
        access_log=False,  # counting is the metrics' job
        proxy_headers=False,  # nothing depends on who is behind a proxy
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )
    return GracefulServer(config, gateway, settings.shutdown_delay_s, settings.drain_timeout_s, link)


def _create_app(
    settings: Settings,
    gateway: Gateway,
    metrics: Metrics,
    registry: CollectorRegistry,
    recorder: Recorder | None,
    *,
    warm_first: bool,
) -> ASGIApp:
    """Arguments:
    warm_first: listen when the gateway is ready, not before.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if recorder is not None:
            recorder.start()
        warm_up = asyncio.create_task(gateway.start(), name="warm-up")
        if warm_first:
            await warm_up
        fresh = asyncio.create_task(registry.keep_fresh()) if isinstance(registry, SharedRegistry) else None
        try:
            yield
        finally:
            gateway.give_up_starting()
            await warm_up  # a runtime cannot be interrupted in the middle of a batch
            await gateway.close()
            if fresh is not None:
                fresh.cancel()
            if recorder is not None:
                await recorder.close()

    app = FastAPI(
        title="V-MoE serving",
        summary="Image classification with the amount of compute chosen per request.",
        version=gateway.bundle.manifest.version,
        lifespan=lifespan,
    )
    install_error_handlers(app)
    limits = UploadLimits(settings.max_image_bytes, settings.max_body_bytes, settings.max_images_per_request)
    classify = build_classify(gateway, limits, settings.request_timeout_s, recorder)
    app.include_router(build_router(gateway, classify, registry))
    if settings.admin_key.get_secret_value():
        app.include_router(build_admin_router(gateway, settings.admin_key))
    return RequestContext(ShortCut(app, classify), metrics, lambda: gateway.state in ("leaving", "draining"))
