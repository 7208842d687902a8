"""From an address to a connection that speaks its protocol."""

from __future__ import annotations

from exporter.bundle import Manifest
from server.backends.triton.address import Address
from server.backends.triton.grpc_client import GrpcClient
from server.backends.triton.link import Client


def connect(url: str, manifest: Manifest, shared_images: int = 0) -> Client:
    """In the event loop that will use it; nothing is sent yet.

    Arguments:
        shared_images: as many as may run together are passed in shared memory; 0 puts them into the message.
    """
    address = Address.parse(url)
    if address.protocol == "grpc":
        return GrpcClient(address.location, manifest, shared_images)
    # Not before it is needed: the package of the asyncio client imports gevent, for its other client.
    from server.backends.triton.http_client import HttpClient

    return HttpClient(address.location, manifest, shared_images)
