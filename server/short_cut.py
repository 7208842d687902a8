"""POST /classify past the framework: the same endpoint, parameters and errors, without the layers in between.

FastAPI's middlewares, routing and dependency injection take about as long as everything that we do for a small image
(`python -m tests.benchmarks.gateway_overhead`). It keeps every other path, and the description of this one.
"""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import parse_qsl

from pydantic import ValidationError
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.error_handlers import handle, invalid_parameters
from server.errors import GatewayError
from server.query import ClassifyQuery
from server.request_context import CLASSIFY_PATH
from server.routes import ClassifyEndpoint

_QUERIES = 256  # clients send few different ones; longer than any real list of budgets and deadlines


class ShortCut:
    """ASGI middleware in front of the framework, behind `RequestContext`."""

    def __init__(self, app: ASGIApp, classify: ClassifyEndpoint) -> None:
        self._app, self._classify = app, classify

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != CLASSIFY_PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await self._classify(request, _parse(scope["query_string"]))
        except GatewayError as error:
            response = await handle(request, error)
        await response(scope, receive, send)


@lru_cache(_QUERIES)
def _parse(query_string: bytes) -> ClassifyQuery:
    """Of a parameter that is given twice the last value counts, as everywhere in FastAPI.

    Raises:
        InvalidParameter: one is unknown or of another type.
    """
    values = dict(parse_qsl(query_string.decode("latin-1"), keep_blank_values=True))
    try:
        return ClassifyQuery.model_validate(values)
    except ValidationError as error:
        raise invalid_parameters(error.errors()) from error
