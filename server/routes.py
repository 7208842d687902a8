"""The HTTP interface. Follows one request: parameters, permit, body, classification, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from server import errors
from server.answer import describe_answer, describe_model, describe_policy, describe_result, server_timing
from server.connection import when_client_leaves
from server.decode import MEDIA_TYPES
from server.gateway import Gateway
from server.problems import describe_error, problem_responses
from server.query import ClassifyQuery, interpret
from server.record import Recorder
from server.request_context import CLASSIFY_PATH, request_id_of, set_budget
from server.schemas import Classification, Classifications, Health, ImageFailure, Models, PolicyBody, Result
from server.upload import FIELD, UploadLimits, read_uploads

_T = TypeVar("_T")

_FILE = {"type": "string", "format": "binary"}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "array", "items": _FILE, "description": "one or several files"}},
                }
            }
        }
        | {media_type: {"schema": _FILE} for media_type in MEDIA_TYPES},
    }
}
_CLASSIFY_ERRORS = (
    errors.NotAnImage,
    errors.BrokenImage,
    errors.MalformedBody,
    errors.NoImage,
    errors.UploadTimeout,
    errors.ImageTooLarge,
    errors.TooManyPixels,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
    errors.InvalidParameter,
    errors.InferenceFailed,
    errors.NotReady,
    errors.Overloaded,
    errors.OverShare,
    errors.QueueFull,
    errors.BackendUnavailable,
    errors.ShuttingDown,
    errors.DeadlineExceeded,
)


ClassifyEndpoint = Callable[[Request, ClassifyQuery], Awaitable[Response]]


def build_classify(
    gateway: Gateway, limits: UploadLimits, request_timeout_s: float, recorder: Recorder | None
) -> ClassifyEndpoint:
    """The endpoint of `CLASSIFY_PATH`; raises `GatewayError`."""
    manifest = gateway.bundle.manifest

    async def classify(request: Request, query: Annotated[ClassifyQuery, Query()]) -> Response:
        """Send a file as the body, with its media type, or one or several in the multipart field `image`.

        One image is answered with a `Classification`, several with `Classifications`, where a bad image has a problem
        in its place. `budget` says between which operating points an image may be served, and how soon (see
        `/v1/policy`); `capacity_factor` with `num_selected_experts` sets one point by hand. The deadline runs from the
        end of the upload. What cannot meet it behind those that wait is refused at once, with `Retry-After`, forms as a
        whole; 504 where an idle gateway could not either, or decoding took too long. An image that turns out late by up
        to 50 ms is answered all the same, with `deadline_met` false, and one that would be later gets 504.
        """
        loop = asyncio.get_running_loop()
        arrival_s = loop.time()
        ask = interpret(query, gateway.policy, manifest, gateway.ladder, request_timeout_s)
        set_budget(request.scope, ask.budget.name)
        gateway.check_admits()
        note = nullcontext() if recorder is None else recorder.arrival(arrival_s, ask.budget.name, query.deadline_ms)
        with note as arrival, gateway.admission.permit(ask.budget.name) as permit:
            try:
                async with asyncio.timeout_at(arrival_s + request_timeout_s):
                    uploads = await read_uploads(request, limits, permit)
            except TimeoutError as error:
                raise errors.UploadTimeout(f"the body did not arrive within {request_timeout_s:g} s") from error
            if arrival is not None:
                arrival.uploaded(len(uploads))
            outcomes = await _while_connected(request, gateway.classify(uploads, ask, arrival_s))
        request_id = request_id_of(request.scope)
        if len(outcomes) == 1:
            if isinstance(outcomes[0], errors.ImageError):
                raise outcomes[0]
            answer = describe_answer(outcomes[0], manifest, ask, request_id)
            return _json(answer, [answer])
        results: list[Result | ImageFailure] = [
            ImageFailure(error=describe_error(outcome, request_id))
            if isinstance(outcome, errors.ImageError)
            else describe_result(outcome, manifest, ask)
            for outcome in outcomes
        ]
        return _json(
            Classifications(request_id=request_id, model=manifest.name, version=manifest.version, results=results),
            [result for result in results if isinstance(result, Result)],
        )

    return classify


def build_router(gateway: Gateway, classify: ClassifyEndpoint, registry: CollectorRegistry) -> APIRouter:
    """Routes that serve `gateway`."""
    router = APIRouter()
    router.post(
        CLASSIFY_PATH,
        response_model=Classification | Classifications,
        openapi_extra=_REQUEST_BODY,
        responses=problem_responses(*_CLASSIFY_ERRORS),
        summary="Classify one or several images",
    )(classify)

    @router.get("/healthz", summary="The process lives")
    async def healthz() -> Health:
        return Health(status="ok")

    @router.get(
        "/readyz",
        responses=problem_responses(errors.NotReady, errors.BackendUnavailable, errors.ShuttingDown),
        summary="The model is warm and requests are admitted",
    )
    async def readyz() -> Health:
        gateway.check_ready()
        return Health(status=gateway.state)

    @router.get("/v1/models", summary="The model, its operating points and budgets")
    async def models() -> Models:
        return Models(models=[describe_model(gateway.bundle.manifest, gateway.policy, gateway.ladder)])

    @router.get("/v1/policy", summary="The policy in force, its budgets, and the state of the queue")
    async def policy() -> PolicyBody:
        return describe_policy(gateway.policy, gateway.scheduler, asyncio.get_running_loop().time())

    @router.get("/metrics", response_class=Response, summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


def _json(body: BaseModel, results: Sequence[Result]) -> Response:
    """Skips FastAPI's second validation of a body that we have just built."""
    headers = {"Server-Timing": server_timing(results)} if results else None
    return Response(body.model_dump_json(), headers=headers, media_type="application/json")


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs `work`, and cancels it when the client goes away, so that nobody computes for a closed connection.

    The body must have been read.
    """
    mine = asyncio.current_task()
    assert mine is not None, "a coroutine runs in a task"
    left = False

    def leave() -> None:
        nonlocal left
        left = True
        mine.cancel()

    when_client_leaves(request.scope, leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and not mine.uncancel():  # by us, and by nobody else as well
            raise errors.ClientGone("the client closed the connection before the answer") from None
        raise
    finally:
        when_client_leaves(request.scope, None)
