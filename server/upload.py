"""The body of a request to its images, with every limit applied while the bytes arrive.

Either a raw body with an image media type, or multipart/form-data with one or several files in the field `image`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from server.admission import Permit
from server.decode import MEDIA_TYPES, Upload, is_image_type
from server.errors import BodyTooLarge, ClientGone, ImageTooLarge, MalformedBody, NoImage, UnsupportedMediaType

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
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if media_type == "multipart/form-data":
            return await _read_multipart(request, limits, permit)
        if is_image_type(media_type):
            return [Upload(await _read_raw(request, limits, permit), media_type)]
    except ClientDisconnect as error:
        raise ClientGone("the client closed the connection during the upload") from error
    raise UnsupportedMediaType(
        f"{media_type or 'a body without media type'!r} is not accepted; send multipart/form-data with the field "
        f"{FIELD!r}, or a body of one of the types {', '.join(MEDIA_TYPES)}"
    )


async def _read_raw(request: Request, limits: UploadLimits, permit: Permit) -> bytes:
    limit = limits.max_image_bytes
    too_large = ImageTooLarge(f"the image has too many bytes; at most {limit} are accepted")
    data = b"".join([chunk async for chunk in _limited(request, limit, too_large, permit)])
    if not data:
        raise NoImage("the body is empty; send an image")
    return data


async def _read_multipart(request: Request, limits: UploadLimits, permit: Permit) -> list[Upload]:
    limit = limits.max_body_bytes
    too_large = BodyTooLarge(f"the body has too many bytes; at most {limit} are accepted")
    stream = _limited(request, limit, too_large, permit)
    try:
        # Form fields without a file name are refused below; one is let through to be named in the message.
        form = await MultiPartParser(request.headers, stream, max_files=limits.max_images, max_fields=1).parse()
    except MultiPartException as error:
        raise MalformedBody(
            f"{error.message} (at most {limits.max_images} files, all in the field {FIELD!r})"
        ) from error
    try:
        uploads = [await _read_part(name, part) for name, part in form.multi_items()]
    finally:
        await form.close()
    if not uploads:
        raise NoImage(f"the form has no file; send one or several in the field {FIELD!r}")
    permit.add(images=len(uploads) - 1)  # the permit began with one
    return uploads


async def _read_part(name: str, part: UploadFile | str) -> Upload:
    if name != FIELD:
        raise MalformedBody(f"unexpected form field {name[:40]!r}; send files in the field {FIELD!r}")
    if isinstance(part, str):
        raise MalformedBody(f"the field {FIELD!r} must be a file, with a file name")
    media_type = (part.content_type or "").partition(";")[0].strip().lower()
    return Upload(await part.read(), media_type)


async def _limited(
    request: Request, limit: int, too_large: BodyTooLarge | ImageTooLarge, permit: Permit
) -> AsyncGenerator[bytes, None]:
    """The body in pieces; stops with `too_large` at the first byte above the limit, or before the first one when the
    client announces more."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    size_bytes = 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes > limit:
            raise too_large
        permit.add(size_bytes=len(chunk))
        yield chunk
