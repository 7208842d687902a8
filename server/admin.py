"""What an operator may change while the gateway runs, behind a key. Without one these routes do not exist."""

from __future__ import annotations

import asyncio
import hmac
from typing import Annotated

from fastapi import APIRouter, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from server.answer import describe_policy
from server.errors import InvalidPolicy, Unauthorized
from server.gateway import Gateway
from server.policy_file import PolicyError
from server.problems import problem_responses
from server.schemas import PolicyBody

_BEARER = HTTPBearer(auto_error=False, description="the setting admin_key")


def build_admin_router(gateway: Gateway, key: SecretStr) -> APIRouter:
    """Arguments:
    key: not empty.
    """
    router = APIRouter(prefix="/v1/admin")
    expected = key.get_secret_value().encode()

    @router.post("/policy", responses=problem_responses(Unauthorized, InvalidPolicy), summary="Read policy.toml again")
    async def reload_policy(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
    ) -> PolicyBody:
        """Puts it in force between two batches, and answers like `/v1/policy`. A bad file changes nothing."""
        # Compared in constant time: the time to refuse must not tell how much of a guess was right.
        if credentials is None or not hmac.compare_digest(credentials.credentials.encode(), expected):
            raise Unauthorized("send the admin key as the header Authorization: Bearer KEY")
        try:
            await gateway.reload_policy()
        except PolicyError as error:
            raise InvalidPolicy(f"{error}; the policy in force stays") from error
        return describe_policy(gateway.policy, gateway.scheduler, asyncio.get_running_loop().time())

    return router
