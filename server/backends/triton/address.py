"""Where a server is and what it speaks: an entry of the setting `triton_urls`. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self, get_args

Protocol = Literal["grpc", "http"]


@dataclass(frozen=True)
class Address:
    """Attributes:
    protocol: of the calls.
    location: host:port.
    """

    protocol: Protocol
    location: str

    @classmethod
    def parse(cls, url: str) -> Self:
        """Reads `host:8001`, `grpc://host:8001` or `http://host:8000`; raises ValueError for anything else."""
        protocol, separator, location = url.partition("://")
        if not separator:
            protocol, location = "grpc", url
        host, _, port = location.rpartition(":")
        for known in get_args(Protocol):
            if protocol == known and host and "/" not in location and port.isdecimal():
                return cls(known, location)
        raise ValueError(
            f"the address of a Triton server must be host:port, grpc://host:port or http://host:port, got {url!r}"
        )
