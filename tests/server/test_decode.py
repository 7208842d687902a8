"""Files of every kind, made with Pillow; expected pixels follow from how they were made."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from server.decode import DecodeLimits, Decoder, Upload, decode_image
from server.errors import BrokenImage, ImageError, ImageTooLarge, NotAnImage, TooManyPixels, UnsupportedMediaType
from vmoe.preprocess import Preprocessing

SIZE = 8
RGB = Preprocessing((SIZE, SIZE), 3, (0.5,) * 3, (0.5,) * 3)
GRAY = Preprocessing((SIZE, SIZE), 1, (0.5,), (0.5,))
LIMITS = DecodeLimits(max_image_bytes=100_000, max_image_pixels=10_000)


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def decode(data: bytes, preprocessing: Preprocessing = RGB, media_type: str = "image/png") -> np.ndarray:
    return decode_image(Upload(data, media_type), preprocessing, LIMITS)


def first_pixel(data: bytes, preprocessing: Preprocessing = RGB) -> list[int]:
    return decode(data, preprocessing)[0, 0].tolist()


def test_decode_when_gray_png_has_the_models_size_then_pixels_are_untouched() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(SIZE, SIZE)
    assert (decode(encode(Image.fromarray(pixels)), GRAY)[..., 0] == pixels).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_decode_when_format_is_supported_then_colour_survives(image_format: str) -> None:
    red, green, blue = first_pixel(encode(Image.new("RGB", (20, 10), (250, 10, 10)), image_format))
    assert red > 230  # lossy formats come close
    assert max(green, blue) < 30


def test_decode_when_exif_says_rotated_then_image_is_upright() -> None:
    # Stored with white on the left. Orientation 6: turn by 90 degrees clockwise, which brings the left side to the top.
    image = Image.new("L", (SIZE, SIZE), 0)
    image.paste(255, (0, 0, SIZE // 2, SIZE))
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decode(encode(image, "JPEG", exif=exif, quality=100), GRAY)[..., 0]
    assert pixels[0].min() > 200
    assert pixels[-1].max() < 50


def test_decode_when_rgba_is_transparent_then_background_is_white() -> None:
    assert first_pixel(encode(Image.new("RGBA", (SIZE, SIZE), (255, 0, 0, 0)))) == [255, 255, 255]


def test_decode_when_rgba_is_half_transparent_then_colour_is_mixed_with_white() -> None:
    # 0 * 128/255 + 255 * 127/255 = 127
    assert first_pixel(encode(Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 128)))) == [127, 127, 127]


def test_decode_when_la_is_transparent_then_background_is_white() -> None:
    assert first_pixel(encode(Image.new("LA", (SIZE, SIZE), (0, 0))), GRAY) == [255]


def test_decode_when_palette_has_transparency_then_background_is_white() -> None:
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 4, SIZE, SIZE))
    pixels = decode(encode(image, transparency=0))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[-1, 0].tolist() == [200, 100, 50]


def test_decode_when_png_has_16_bits_then_values_are_scaled_not_clipped() -> None:
    # 65535 / 257 = 255, 32768 / 257 = 127.5 -> 128, 1000 / 257 = 3.9 -> 4
    for value, expected in ((65535, 255), (32768, 128), (1000, 4), (0, 0)):
        assert first_pixel(encode(Image.fromarray(np.full((SIZE, SIZE), value, np.uint16))), GRAY) == [expected]


def test_decode_when_16_bit_png_has_a_transparent_grey_then_background_is_white() -> None:
    chunks = _png_chunks(SIZE, SIZE, bit_depth=16, rows=b"\0" + struct.pack(">8H", *[300] * 8))
    assert first_pixel(_png(chunks[0], (b"tRNS", struct.pack(">H", 300)), *chunks[1:]), GRAY) == [255]


def test_decode_when_image_has_1_bit_then_it_is_black_and_white() -> None:
    assert first_pixel(encode(Image.new("1", (SIZE, SIZE), 1)), GRAY) == [255]
    assert first_pixel(encode(Image.new("1", (SIZE, SIZE), 0)), GRAY) == [0]


def test_decode_when_jpeg_is_cmyk_then_colours_are_not_inverted() -> None:
    # Pillow writes what Adobe writes: inverted values and the APP14 marker. Pure yellow has no blue.
    data = encode(Image.new("CMYK", (SIZE, SIZE), (0, 0, 255, 0)), "JPEG", quality=100)
    assert b"Adobe" in data
    red, green, blue = first_pixel(data)
    assert min(red, green) > 240
    assert blue < 15


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG"])
def test_decode_when_image_is_animated_then_first_frame_counts(image_format: str) -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("white", "black", "red")]
    data = encode(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert min(first_pixel(data)) > 250


def test_decode_when_header_announces_huge_image_then_it_is_refused_before_decoding() -> None:
    # 50,000 x 50,000 pixels that do not even exist: only the header can have been read.
    with pytest.raises(TooManyPixels):
        decode(_png(*_png_chunks(50_000, 50_000, bit_depth=8, rows=b"")))


def test_decode_when_image_has_too_many_pixels_then_message_says_how_many() -> None:
    with pytest.raises(TooManyPixels, match="200 x 100 pixels; at most 10000"):
        decode(encode(Image.new("1", (200, 100))))


def test_decode_when_file_has_too_many_bytes_then_it_is_not_opened() -> None:
    with pytest.raises(ImageTooLarge, match="100001 bytes"):
        decode(b"x" * 100_001)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_decode_when_file_is_truncated_then_image_is_broken(image_format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    data = encode(Image.fromarray(noise), image_format)
    with pytest.raises((BrokenImage, NotAnImage)):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"hello, world", b"<svg/>", b"%PDF-1.7"])
def test_decode_when_content_is_no_image_then_it_is_refused(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        decode(data)


def test_decode_when_format_is_known_to_pillow_but_not_served_then_it_is_refused() -> None:
    with pytest.raises(NotAnImage):
        decode(encode(Image.new("L", (SIZE, SIZE)), "TIFF"))


@pytest.mark.parametrize("media_type", ["text/plain", "image/tiff", "application/pdf"])
def test_decode_when_media_type_is_unknown_then_message_lists_the_accepted_ones(media_type: str) -> None:
    with pytest.raises(UnsupportedMediaType, match="image/jpeg"):
        decode(encode(Image.new("L", (SIZE, SIZE))), media_type=media_type)


@settings(max_examples=300, deadline=None)
@given(
    image_format=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]),
    edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 400),
)
def test_decode_when_bytes_are_damaged_then_nothing_but_image_errors_escapes(
    image_format: str, edits: list[tuple[int, int]], cut: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    data = bytearray(encode(Image.fromarray(noise), image_format))
    for position, value in edits:
        data[position % len(data)] = value
    try:
        pixels = decode(bytes(data[: len(data) - cut % len(data)]))
    except ImageError:
        return
    assert pixels.shape == (SIZE, SIZE, 3)


async def decode_with_threads(data: bytes, preprocessing: Preprocessing = RGB) -> tuple[np.ndarray, int]:
    """Pixels, and how many threads the decoder has started for them."""
    decoder = Decoder(preprocessing, LIMITS, threads=1)
    try:
        before = threading.active_count()
        upload = Upload(data, "image/png")
        if (image := decoder.decode_small(upload)) is None:
            image = await decoder.decode(upload)
        return image, threading.active_count() - before
    finally:
        decoder.close()


def test_decoder_when_file_and_image_are_small_then_no_thread_is_started() -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)))
    pixels, threads = asyncio.run(decode_with_threads(data))
    assert threads == 0
    assert (pixels == decode(data)).all()


def test_decoder_when_a_small_file_holds_many_pixels_then_a_thread_decodes_it() -> None:
    data = encode(Image.new("RGB", (65, 64), "red"))  # one column above the limit
    assert len(data) < 4096
    pixels, threads = asyncio.run(decode_with_threads(data))
    assert threads == 1
    assert pixels[0, 0].tolist() == [255, 0, 0]


def test_decoder_when_the_file_is_large_then_a_thread_decodes_it() -> None:
    data = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)))
    assert len(data) > 4096
    assert asyncio.run(decode_with_threads(data))[1] == 1


def test_decoder_when_the_models_input_is_large_then_a_thread_enlarges_the_image() -> None:
    large = Preprocessing((65, 64), 3, (0.5,) * 3, (0.5,) * 3)
    pixels, threads = asyncio.run(decode_with_threads(encode(Image.new("RGB", (8, 8), "red")), large))
    assert (pixels.shape, threads) == ((65, 64, 3), 1)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"hello", NotAnImage),
        (encode(Image.new("L", (8, 8)))[:45], BrokenImage),
        (encode(Image.new("1", (200, 100))), TooManyPixels),
    ],
)
def test_decoder_when_a_small_file_is_refused_then_it_is_for_the_reason_of_a_large_one(
    data: bytes, error: type[ImageError]
) -> None:
    with pytest.raises(error):
        asyncio.run(decode_with_threads(data))


def _png_chunks(width: int, height: int, *, bit_depth: int, rows: bytes) -> list[tuple[bytes, bytes]]:
    """A grey PNG whose every row is `rows`."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0)
    return [(b"IHDR", header), (b"IDAT", zlib.compress(rows * height)), (b"IEND", b"")]


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data
