"""Bodies in whatever pieces they arrive. Starlette's parser says what is in a form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.types import Message

from server.admission import Admission
from server.decode import Upload
from server.errors import BodyTooLarge, ClientGone, GatewayError, ImageTooLarge, MalformedBody, NoImage, QueueFull
from server.metrics import Metrics
from server.upload import UploadLimits, read_uploads

FORM = b'multipart/form-data; boundary="a b"'
LIMITS = UploadLimits(max_image_bytes=5_000_000, max_body_bytes=6_000_000, max_images=3)


def part(content: bytes, headers: str = 'Content-Disposition: form-data; name="image"; filename="x"') -> bytes:
    return b"--a b\r\n" + headers.replace("\n", "\r\n").encode() + b"\r\n\r\n" + content + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--a b--\r\n"


def read(
    pieces: Sequence[bytes], media_type: bytes = FORM, limits: UploadLimits = LIMITS, *, ends: bool = True
) -> tuple[list[Upload], tuple[int, int]]:
    """Uploads, and images and bytes that were admitted for them.

    Without `ends` the client closes the connection behind the pieces.
    """
    messages: list[Message] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages += [{"type": "http.request", "body": b"", "more_body": False} if ends else {"type": "http.disconnect"}]
    queue = iter(messages)

    async def receive() -> Message:
        return next(queue)

    async def main() -> tuple[list[Upload], tuple[int, int]]:
        admission = Admission(10, 20_000_000, Metrics(CollectorRegistry(), None))
        request = Request({"type": "http", "headers": [(b"content-type", media_type)]}, receive)
        with admission.permit("auto") as permit:
            uploads = await read_uploads(request, limits, permit)
            taken = admission.images, admission.size_bytes
        assert (admission.images, admission.size_bytes) == (0, 0)
        return uploads, taken

    return asyncio.run(main())


def oracle(body: bytes) -> list[Upload]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    async def main() -> list[Upload]:
        found = await MultiPartParser(Headers(raw=[(b"content-type", FORM)]), stream()).parse()
        uploads = [each for _, each in found.multi_items() if isinstance(each, UploadFile)]
        try:
            return [Upload(await each.read(), each.content_type or "") for each in uploads]
        finally:
            await found.close()

    return asyncio.run(main())


# Contents that look like the ends of parts.
contents = st.lists(st.sampled_from([b"\r\n", b"--a b", b"--", b"\r", b"\n", b"\0", b"a", b"--a b--x"]), max_size=12)


@settings(deadline=None)
@given(files=st.lists(contents, min_size=1, max_size=3), cuts=st.lists(st.integers(0, 600), max_size=8))
def test_form_when_it_arrives_in_any_pieces_then_its_files_are_those_that_starlette_finds(
    files: list[list[bytes]], cuts: list[int]
) -> None:
    headers = 'Content-Disposition: form-data; name="image"; filename="x"\nContent-Type: image/png'
    body = form(*(part(b"".join(each).replace(b"\r\n--a b", b""), headers) for each in files))
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[start:end] for start, end in pairwise(places)]
    uploads, taken = read(pieces)
    assert uploads == oracle(body)
    assert taken == (len(files), len(body))


@pytest.mark.parametrize(
    ("headers", "media_type"),
    [
        ('content-disposition: form-data; filename="x"; name=image', ""),
        ('CONTENT-TYPE: Image/PNG; q=1\nContent-Disposition: form-data; name="image"; filename=""', "image/png"),
        ('Content-Disposition: form-data; name="image"; filename="a;b\\"c"\nX-Other: 1', ""),
    ],
)
def test_form_when_headers_are_written_otherwise_then_the_file_is_found(headers: str, media_type: str) -> None:
    assert read([form(part(b"data", headers))])[0] == [Upload(b"data", media_type)]


def test_form_when_a_file_has_megabytes_then_it_comes_whole() -> None:
    content = bytes(range(256)) * 8192  # 2 MiB
    body = form(part(content))
    uploads, taken = read([body[start : start + 65536] for start in range(0, len(body), 65536)])
    assert uploads == [Upload(content, "")]
    assert taken == (1, len(body))


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (form(), NoImage, "the form has no file"),
        (b"garbage", MalformedBody, "no multipart/form-data"),
        (form(part(b"", "Content-Disposition: form-data")), MalformedBody, "unexpected form field ''"),
        (form(part(b"", "X: 1")), MalformedBody, "unexpected form field ''"),
        (form(part(b"", "Content-Disposition: form-data; name=picture")), MalformedBody, "'picture'"),
        (form(part(b"", "Content-Disposition: form-data; name=image")), MalformedBody, "with a file name"),
        (form(*[part(b"x")] * 4), MalformedBody, "at most 3"),
        (form(part(b"x", "X: " + "y" * 10_000)), MalformedBody, "no multipart/form-data"),
        (form(part(b"x", "\n".join(f"X-{i}: y" for i in range(1000)))), MalformedBody, "no multipart/form-data"),
    ],
)
def test_form_when_it_is_wrong_then_the_message_says_how(body: bytes, error: type[GatewayError], message: str) -> None:
    with pytest.raises(error, match=message):
        read([body])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        part(b"x")[:-10],
        part(b"x"),
        part(b"x") + part(b"y")[:-10],
        part(b"x") + b"--a b\r\n",
        part(b"x") + b"--a b-",
    ],
)
def test_form_when_it_ends_before_its_last_boundary_then_no_file_of_it_is_served(body: bytes) -> None:
    with pytest.raises(MalformedBody, match="the form ends before its last boundary"):
        read([body])


@pytest.mark.parametrize("line", [b"X: " + b"y" * 600, b"X" * 600, b"X: y\r\n" * 3])
def test_form_when_the_headers_of_a_part_do_not_end_then_nothing_more_is_read(line: bytes) -> None:
    with pytest.raises(MalformedBody, match="no multipart/form-data"):
        read([b"--a b\r\n", *[line] * 10], ends=False)  # to read on would be ClientGone


def test_form_when_its_media_type_has_no_boundary_then_the_message_says_so() -> None:
    with pytest.raises(MalformedBody, match="no boundary"):
        read([form(part(b"x"))], b"multipart/form-data")


@pytest.mark.parametrize(
    ("media_type", "head", "error"), [(FORM, part(b"")[:-2], BodyTooLarge), (b"image/png", b"", ImageTooLarge)]
)
def test_body_when_it_passes_the_limit_then_nothing_more_is_read(
    media_type: bytes, head: bytes, error: type[GatewayError]
) -> None:
    limits = UploadLimits(max_image_bytes=1000, max_body_bytes=1000, max_images=3)
    with pytest.raises(error, match="at most 1000"):
        read([head, b"x" * 1001], media_type, limits, ends=False)  # to read on would be ClientGone


def test_body_when_the_queue_has_no_room_for_it_then_it_is_refused_while_it_arrives() -> None:
    limits = UploadLimits(max_image_bytes=50_000_000, max_body_bytes=50_000_000, max_images=3)
    with pytest.raises(QueueFull, match="20000000"):
        read([bytes(1_000_000)] * 21, b"image/png", limits, ends=False)


@pytest.mark.parametrize("media_type", [FORM, b"image/png"])
def test_body_when_the_client_leaves_in_between_then_it_is_gone(media_type: bytes) -> None:
    with pytest.raises(ClientGone):
        read([part(b"x")], media_type, ends=False)


@pytest.mark.parametrize("media_type", [b"image/PNG", b"application/octet-stream"])
def test_raw_body_when_it_arrives_in_pieces_then_they_are_joined(media_type: bytes) -> None:
    uploads, taken = read([b"a", b"", b"bc"], media_type + b"; x=y")
    assert uploads == [Upload(b"abc", media_type.decode().lower())]
    assert taken == (1, 3)
