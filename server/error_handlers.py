"""Exceptions to responses: our own errors, those of starlette (unknown path, wrong method), FastAPI's parameter checks.

What nobody expected is caught in `request_context`, and says nothing about itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.errors import BodyTooLarge, GatewayError, ImageTooLarge, InvalidParameter, Unauthorized, UploadTimeout
from server.problems import build_problem, describe_error, respond
from server.query import ClassifyQuery
from server.request_context import request_id_of


def install_error_handlers(app: FastAPI) -> None:
    for kind in (GatewayError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)


async def handle(request: Request, error: Exception) -> Response:
    """The answer to one of the errors below."""
    request_id = request_id_of(request.scope)
    if isinstance(error, RequestValidationError):
        error = invalid_parameters(error.errors())
    if isinstance(error, GatewayError):
        return respond(describe_error(error, request_id), _headers(error))
    assert isinstance(error, HTTPException), "registered for these three only"
    status = HTTPStatus(error.status_code)
    detail = f"{request.method} {request.url.path}: {error.detail}"
    problem = build_problem(status, status.name.lower(), status.phrase, detail, request_id)
    return respond(problem, error.headers)


def invalid_parameters(findings: Sequence[Mapping[str, Any]]) -> InvalidParameter:
    """From what pydantic found, each with the name of the parameter at the end of `loc`."""
    return InvalidParameter("; ".join(_explain(item) for item in findings))


def _headers(error: GatewayError) -> dict[str, str]:
    if isinstance(error, (UploadTimeout, BodyTooLarge, ImageTooLarge)):
        return {"Connection": "close"}  # the rest of the body is not wanted
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    return {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}


def _explain(item: Mapping[str, Any]) -> str:
    """One finding of pydantic in words: the parameter, what is wrong with it, and the value seen."""
    name = str(item["loc"][-1])
    if item["type"] == "extra_forbidden":
        return f"unknown parameter {name[:40]!r}; allowed are {', '.join(ClassifyQuery.model_fields)}"
    return f"{name}: {item['msg']}, got {str(item['input'])[:40]!r}"
