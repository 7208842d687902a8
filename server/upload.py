"""The body of a request to its images, with every limit applied while the bytes arrive.

Either a raw body with an image media type, or multipart/form-data with one or several files in the field `image`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from server.admission import Permit
from server.decode import MEDIA_TYPES, Upload, is_accepted
from server.errors import BodyTooLarge, ClientGone, ImageTooLarge, MalformedBody, NoImage, UnsupportedMediaType

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FIELD = "image"


@dataclass(frozen=True)
class UploadLimits:
    """Bytes of a raw body, bytes of a multipart body, and images in the latter."""

    max_image_bytes: int
    max_body_bytes: int
    max_images: int


async def read_uploads(request: Request, limits: UploadLimits, permit: Permit) -> list[Upload]:
    """At least one image; more than one only from a multipart body. The permit grows with what is read.

    Raises:
        GatewayError: see `errors`; the rest of the body stays unread.
    """
    media_type = _without_parameters(request.headers.get("content-type", ""))
    if media_type == "multipart/form-data":
        return await _read_multipart(request, limits, permit)
    if is_accepted(media_type):
        return [Upload(await _read_raw(request, limits, permit), media_type)]
    raise UnsupportedMediaType(
        f"{media_type or 'a body without media type'!r} is not accepted; send multipart/form-data with the field "
        f"{FIELD!r}, or a body of one of the types {', '.join(MEDIA_TYPES)}"
    )


async def _read_raw(request: Request, limits: UploadLimits, permit: Permit) -> bytes:
    pieces = _limited(request, limits.max_image_bytes, ImageTooLarge, "image", permit)
    data = b"".join([piece async for piece in pieces])
    if not data:
        raise NoImage("the body is empty; send an image")
    return data


async def _read_multipart(request: Request, limits: UploadLimits, permit: Permit) -> list[Upload]:
    _, options = parse_options_header(request.headers["content-type"])
    if (boundary := options.get(b"boundary")) is None:
        raise MalformedBody("the media type multipart/form-data has no boundary")
    form = _Form(limits.max_images)
    try:
        parser = MultipartParser(boundary, form.callbacks)
        async with aclosing(_limited(request, limits.max_body_bytes, BodyTooLarge, "body", permit)) as pieces:
            async for piece in pieces:
                parser.write(piece)
    except FormParserError as error:
        raise MalformedBody("the body is no multipart/form-data with the boundary that its media type names") from error
    if not form.complete:  # the parser's `finalize` does not look
        raise MalformedBody(
            "the form ends before its last boundary; send it whole, with that boundary and '--' behind it"
        )
    if not form.uploads:
        raise NoImage(f"the form has no file; send one or several in the field {FIELD!r}")
    permit.add(images=len(form.uploads) - 1)  # the permit began with one
    return form.uploads


class _Form:
    """Takes the files out of a form while it is parsed. They stay in memory, where the permit counts them.

    Attributes:
        uploads: files that are complete.
        complete: the last boundary has come.
        callbacks: for the parser, which may deliver headers and files in pieces; they raise `MalformedBody`.
    """

    def __init__(self, max_images: int) -> None:
        self.uploads: list[Upload] = []
        self.complete = False
        self._max_images = max_images
        self.callbacks: MultipartCallbacks = {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._name, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode(errors="replace")
        if name != FIELD:
            raise MalformedBody(f"unexpected form field {name[:40]!r}; send files in the field {FIELD!r}")
        if b"filename" not in options:
            raise MalformedBody(f"the field {FIELD!r} must be a file, with a file name")
        if len(self.uploads) == self._max_images:
            raise MalformedBody(f"the form has too many files; at most {self._max_images} are accepted")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _part_end(self) -> None:
        media_type = self._headers.get(b"content-type", b"").decode("latin-1")
        self.uploads.append(Upload(b"".join(self._pieces), _without_parameters(media_type)))

    def _end(self) -> None:
        self.complete = True


def _without_parameters(media_type: str) -> str:
    return media_type.partition(";")[0].strip().lower()


async def _limited(
    request: Request, limit: int, error: type[BodyTooLarge | ImageTooLarge], what: str, permit: Permit
) -> AsyncGenerator[bytes, None]:
    """The body in pieces; stops with `error` at the first byte above the limit, or before the first one when the
    client announces more."""
    too_large = f"the {what} has too many bytes; at most {limit} are accepted"
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise error(too_large)
    size_bytes, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection during the upload")
        piece, more = message.get("body", b""), message.get("more_body", False)
        size_bytes += len(piece)
        if size_bytes > limit:
            raise error(too_large)
        permit.add(size_bytes=len(piece))
        yield piece
