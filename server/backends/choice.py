"""Settings to backend. The only place that knows all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from prometheus_client import CollectorRegistry

from exporter.bundle import Bundle
from server.backends.base import Backend, BackendError
from server.backends.fallback import FallbackBackend
from server.backends.ort import OrtBackend
from server.backends.several import SeveralBackends
from server.backends.triton.address import Address
from server.metrics import BackendMetrics
from server.settings import Settings
from vmoe.extras import install_command


def create_backend(
    settings: Settings, bundle: Bundle, registry: CollectorRegistry, others: Sequence[Bundle] = ()
) -> Backend:
    """Arguments:
        others: further bundles of the model, for the embedded engine.

    Raises:
    BundleError: the embedded engine cannot run the bundle.
    BackendError: a library is missing, or `packed_weights` cannot be written.
    """
    if settings.backend == "embedded":
        named = {"": bundle} | {other.manifest.name: other for other in others}
        embedded = {name: _embedded(each, settings, alone=not others) for name, each in named.items()}
        return SeveralBackends(embedded) if others else embedded[""]
    try:
        from server.backends.triton.backend import TritonBackend  # an optional dependency
        from server.backends.triton.connect import connect

        if any(Address.parse(url).protocol == "http" for url in settings.triton_endpoints):
            import server.backends.triton.http_client  # noqa: F401  # another one, better missed here than in a probe
    except (ModuleNotFoundError, RuntimeError) as error:  # tritonclient makes the second of the first
        raise BackendError(f"backend triton lacks a library: {error}; {install_command('triton')}") from error
    metrics = BackendMetrics(registry)
    batch_size = min(settings.max_batch_size, bundle.manifest.max_batch_size)
    shared_images = batch_size if settings.triton_shared_memory else 0
    triton = TritonBackend(
        bundle.manifest,
        settings.triton_endpoints,
        timeout_s=settings.triton_timeout_s,
        probe_s=settings.triton_probe_s,
        metrics=metrics,
        connect=partial(connect, shared_images=shared_images),
    )
    if settings.fallback == "none":
        return triton
    return FallbackBackend(triton, _embedded(bundle, settings), metrics)


def _embedded(bundle: Bundle, settings: Settings, *, alone: bool = True) -> OrtBackend:
    return OrtBackend(bundle, settings.threads, settings.packed_weights, spinning=settings.spinning, alone=alone)
