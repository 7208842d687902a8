"""What an entry of `triton_urls` may be."""

from __future__ import annotations

import pytest

from server.backends.triton.address import Address


@pytest.mark.parametrize(
    ("url", "protocol", "location"),
    [
        ("triton:8001", "grpc", "triton:8001"),
        ("grpc://triton:8001", "grpc", "triton:8001"),
        ("http://10.0.0.1:8000", "http", "10.0.0.1:8000"),
        ("[::1]:8001", "grpc", "[::1]:8001"),
    ],
)
def test_address_when_it_names_host_and_port_then_grpc_is_the_default(url: str, protocol: str, location: str) -> None:
    assert Address.parse(url) == Address(protocol, location)  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["triton", "triton:", ":8001", "https://a:8000", "http://a:8000/v2", "http://a", ""])
def test_address_when_it_is_none_then_it_is_refused_and_named(url: str) -> None:
    with pytest.raises(ValueError, match=r"host:port, grpc://host:port or http://host:port, got '"):
        Address.parse(url)
