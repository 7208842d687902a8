"""Puts the parts together: settings, bundle and backend to an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from exporter.bundle import Bundle
from server.backends.base import Backend
from server.error_handlers import install_error_handlers
from server.gateway import Gateway
from server.metrics import Metrics
from server.request_context import RequestContext
from server.routes import build_router
from server.settings import Settings
from server.upload import UploadLimits


def create_app(settings: Settings, bundle: Bundle, backend: Backend, registry: CollectorRegistry) -> FastAPI:
    """The application; it warms up in the background once it runs, and drains when it stops."""
    metrics = Metrics(registry, bundle.manifest.architecture.moe)
    gateway = Gateway(settings, bundle, backend, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        warm_up = asyncio.create_task(gateway.start(), name="warm-up")
        try:
            yield
        finally:
            await warm_up  # a runtime cannot be interrupted in the middle of a batch
            await gateway.close(settings.drain_timeout_s)

    app = FastAPI(
        title="V-MoE serving",
        summary="Image classification with the amount of compute chosen per request.",
        version=bundle.manifest.version,
        lifespan=lifespan,
    )
    app.add_middleware(RequestContext, metrics=metrics)
    install_error_handlers(app)
    limits = UploadLimits(settings.max_image_bytes, settings.max_body_bytes, settings.max_images_per_request)
    app.include_router(build_router(gateway, limits, settings.request_timeout_s, registry))
    return app
