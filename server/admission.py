"""A permit before work: bounds what is in the gateway at any time, in images and in bytes.

A request takes its permit before its body is read and gives it back when it is answered, so uploads, decoding and the
queue together stay within the limits. What does not fit is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import QueueFull


class Admission:
    """Counts what is admitted.

    Attributes:
        images: admitted and not yet answered.
        size_bytes: held by their uploads.
    """

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self._max_images, self._max_bytes = max_images, max_bytes
        self.images = 0
        self.size_bytes = 0

    @contextmanager
    def permit(self) -> Iterator[Permit]:
        """Lasts from the first byte of the body to the answer.

        Raises:
            QueueFull: no image more fits.
        """
        permit = Permit(self)
        permit.add(images=1)
        try:
            yield permit
        finally:
            permit.release()

    def take(self, images: int, size_bytes: int) -> None:
        """Raises `QueueFull`, and takes nothing, where that does not fit."""
        if self.images + images > self._max_images:
            raise QueueFull(f"{self.images} images are waiting, {images} more do not fit: at most {self._max_images}")
        if self.size_bytes + size_bytes > self._max_bytes:
            raise QueueFull(f"{self.size_bytes} bytes are waiting, the limit is {self._max_bytes}")
        self.images += images
        self.size_bytes += size_bytes

    def give_back(self, images: int, size_bytes: int) -> None:
        self.images -= images
        self.size_bytes -= size_bytes


class Permit:
    """The share of one request: one image from the start, more images and bytes as they turn up."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._images = 0
        self._size_bytes = 0

    def add(self, images: int = 0, size_bytes: int = 0) -> None:
        """Raises `QueueFull` where that does not fit; what was admitted before stays so."""
        self._admission.take(images, size_bytes)
        self._images += images
        self._size_bytes += size_bytes

    def release(self) -> None:
        self._admission.give_back(self._images, self._size_bytes)
        self._images = self._size_bytes = 0
