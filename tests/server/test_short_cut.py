"""The short cut and the framework are two ways to one endpoint: what a client sees must not depend on the way."""

from __future__ import annotations

import asyncio
from typing import Annotated
from urllib.parse import urlencode

import httpx
import pytest
from fastapi import FastAPI, Query
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from server.error_handlers import install_error_handlers
from server.errors import Overloaded
from server.metrics import Metrics
from server.query import ClassifyQuery
from server.request_context import CLASSIFY_PATH, RequestContext
from server.routes import build_router
from server.short_cut import ShortCut
from tests.server.conftest import Serve

NAMES = [*ClassifyQuery.model_fields, "bugdet", ""]
VALUES = ["", "low", "1", "0", "-1", "1e400", "nan", "true", "0.5", "0x10", " 2", "[", "\u00e9", "%", "a b"]


async def echo(request: Request, query: Annotated[ClassifyQuery, Query()]) -> Response:
    """Says how the query was understood; a budget of `low` is refused."""
    if query.budget == "low":
        raise Overloaded("no time", 3.5)
    return Response(repr(query))


def build(*, short: bool) -> ASGIApp:
    app = FastAPI()
    install_error_handlers(app)
    app.include_router(build_router(None, echo, CollectorRegistry()))  # type: ignore[arg-type]  # echo needs no gateway
    return RequestContext(ShortCut(app, echo) if short else app, Metrics(CollectorRegistry(), None), lambda: False)


SHORT, LONG = build(short=True), build(short=False)


def ask(app: ASGIApp, query: str, method: str = "POST") -> tuple[int, dict[str, str], str]:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, f"{CLASSIFY_PATH}?{query}", headers={"X-Request-ID": "one"})

    response = asyncio.run(send())
    return response.status_code, dict(response.headers), response.text


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=4))
def test_short_cut_when_asked_anything_then_it_answers_as_the_framework_does(pairs: list[tuple[str, str]]) -> None:
    query = urlencode(pairs)
    assert ask(SHORT, query) == ask(LONG, query)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_short_cut_when_the_method_is_another_then_the_framework_refuses_it(method: str) -> None:
    assert ask(SHORT, "", method) == ask(LONG, "", method)
    assert ask(SHORT, "", method)[0] == 405


def test_openapi_when_classify_takes_the_short_cut_then_it_is_still_described(serve_fake: Serve) -> None:
    with serve_fake() as client:
        operation = client.get("/openapi.json").json()["paths"][CLASSIFY_PATH]["post"]
    assert [each["name"] for each in operation["parameters"]] == list(ClassifyQuery.model_fields)
    assert {"200", "422", "503"} <= operation["responses"].keys()
