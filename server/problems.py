"""Failures as RFC 9457 problem details, for answers and for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from server.errors import GatewayError
from server.schemas import Problem

MEDIA_TYPE = "application/problem+json"


def describe_error(error: GatewayError, request_id: str) -> Problem:
    return build_problem(error.status, error.code, error.title, str(error), request_id)


def build_problem(status: int, code: str, title: str, detail: str, request_id: str) -> Problem:
    return Problem(
        type=f"urn:vmoe-serving:problem:{code}",
        title=title,
        status=status,
        detail=detail,
        code=code,
        request_id=request_id,
    )


def respond(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    return Response(problem.model_dump_json(), problem.status, headers, MEDIA_TYPE)


def problem_responses(*errors: type[GatewayError]) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for OpenAPI, with an example per error."""
    responses: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        response = responses.setdefault(
            error.status,
            {
                "description": HTTPStatus(error.status).phrase,
                "content": {MEDIA_TYPE: {"schema": Problem.model_json_schema(), "examples": {}}},
            },
        )
        example = describe_error(error("what was wrong, the value seen, and what would be right"), "6f1c…")
        response["content"][MEDIA_TYPE]["examples"][error.code] = {"value": example.model_dump()}
        if error.retry_after_s is not None:
            response["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return responses
