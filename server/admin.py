"""What an operator may change while the gateway runs, behind a key. Without one these routes do not exist.

POST    with the text of a policy.toml as body: that policy, until another one is put in force or the gateway restarts
POST    without a body: policy.toml is read again
DELETE  back to the policy of the settings
GET     the text that gives the policy in force again
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from server.answer import describe_policy
from server.errors import BodyTooLarge, ClientGone, InvalidPolicy, Unauthorized
from server.gateway import Gateway
from server.policy_file import PolicyError
from server.problems import problem_responses
from server.schemas import PolicyBody

TOML: Final = "application/toml"
_MAX_BYTES: Final = 1 << 16  # 16 budgets and a provenance take 3 KB; chosen, not tuned
_BEARER = HTTPBearer(auto_error=False, description="the setting admin_key")
_TEXT: Final[dict[str, Any]] = {TOML: {"schema": {"type": "string", "description": "a policy.toml"}}}


def build_admin_router(gateway: Gateway, key: SecretStr) -> APIRouter:
    """Arguments:
    key: not empty.
    """
    expected = key.get_secret_value().encode()

    def check_key(credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]) -> None:
        # Compared in constant time: the time to refuse must not tell how much of a guess was right.
        if credentials is None or not hmac.compare_digest(credentials.credentials.encode(), expected):
            raise Unauthorized("send the admin key as the header Authorization: Bearer KEY")

    router = APIRouter(prefix="/v1/admin", dependencies=[Depends(check_key)])

    async def put_in_force(policy: Awaitable[None]) -> PolicyBody:
        try:
            await policy
        except PolicyError as error:
            raise InvalidPolicy(f"{error}; the policy in force stays") from error
        return describe_policy(gateway.policy, gateway.scheduler, asyncio.get_running_loop().time())

    @router.post(
        "/policy",
        openapi_extra={"requestBody": {"required": False, "content": _TEXT}},
        responses=problem_responses(Unauthorized, BodyTooLarge, InvalidPolicy),
        summary="Put a policy in force, or read policy.toml again",
    )
    async def post_policy(request: Request) -> PolicyBody:
        """With a body: the policy that it describes, until another one is put in force. Without: policy.toml is read
        again. Takes effect between two batches, and answers like `/v1/policy`. A bad policy changes nothing."""
        body = await _read(request)
        if not body:
            return await put_in_force(gateway.reload_policy())
        try:
            text = body.decode()
        except UnicodeDecodeError as error:
            raise InvalidPolicy(f"the body must be UTF-8, byte {error.start} is not; nothing changes") from error
        return await put_in_force(gateway.put_policy(text))

    @router.delete(
        "/policy",
        responses=problem_responses(Unauthorized, InvalidPolicy),
        summary="Back to the policy of the settings",
    )
    async def delete_policy() -> PolicyBody:
        """Reads its file, where it has one. Answers like `/v1/policy`."""
        return await put_in_force(gateway.restore_policy())

    @router.get(
        "/policy",
        response_class=Response,
        responses={**problem_responses(Unauthorized), 200: {"content": _TEXT}},
        summary="The text that gives the policy in force again",
    )
    async def get_policy() -> Response:
        return Response(gateway.policy.text, media_type=TOML)

    return router


async def _read(request: Request) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MAX_BYTES:
                raise BodyTooLarge(f"the policy has too many bytes; at most {_MAX_BYTES} are accepted")
    except ClientDisconnect as error:
        raise ClientGone("the client closed the connection during the upload") from error
    return bytes(body)
