"""Encoded bytes to the model's uint8 array, for every kind of file that people send.

Bytes and pixels are checked before any pixel is decoded, from the length and the header, so that a small file cannot
unfold into gigabytes. Of animations the first frame counts. What the pixels mean is `vmoe.preprocess`'s to say, as in
training.
"""

from __future__ import annotations

import asyncio
import math
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from server.errors import BrokenImage, ImageError, ImageTooLarge, NotAnImage, TooManyPixels, UnsupportedMediaType
from vmoe.preprocess import Preprocessing, fit

# Pillow's other formats are left out: they are rarely needed and much less tested against hostile files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp")
_ALIASES = ("image/jpg", "image/pjpeg", "image/x-png", "image/apng", "image/x-ms-bmp", "image/x-bmp")

# What is within these is decoded in the event loop: 0.14 to 0.19 ms, where a thread takes 0.3 ms for it and 0.15 ms of
# the loop (28 x 28 pixels, AMD EPYC, Pillow 13.0). The worst hostile files that we made take 8 ms (a PNG with three
# compressed texts that reach Pillow's limit of 1 MiB) and 2 ms (a JPEG of 322 scans). Formats whose canvas is allocated
# when they are opened are left out.
_SMALL_BYTES, _SMALL_PIXELS = 4096, 64 * 64
_SMALL_FORMATS = ("JPEG", "PNG")

# What Pillow raises on damaged files; it documents no common base class. Chosen by judgement; the tests mutate files.
_PILLOW_ERRORS = (EOFError, IndexError, OSError, OverflowError, SyntaxError, ValueError, struct.error, zlib.error)


@dataclass(frozen=True)
class Upload:
    """One image as it was sent.

    Attributes:
        data: the encoded file.
        media_type: as declared, without parameters; empty when the client declared none.
    """

    data: bytes
    media_type: str


@dataclass(frozen=True)
class DecodeLimits:
    """What one image may cost: size of the encoded file, and width times height."""

    max_image_bytes: int
    max_image_pixels: int


class Decoder:
    """Decodes in a pool of threads, so that the event loop never waits for a large image, and small ones at once."""

    def __init__(self, preprocessing: Preprocessing, limits: DecodeLimits, threads: int) -> None:
        self._preprocessing, self._limits = preprocessing, limits
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._small: DecodeLimits | None = None
        if takes_small_images(preprocessing):
            self._small = DecodeLimits(
                min(_SMALL_BYTES, limits.max_image_bytes), min(_SMALL_PIXELS, limits.max_image_pixels)
            )

    async def decode(self, upload: Upload) -> npt.NDArray[np.uint8]:
        """See `decode_image`."""
        if self._small is not None and len(upload.data) <= self._small.max_image_bytes:
            # Whatever is wrong with it: a thread decodes it, or says so.
            with suppress(ImageError):
                return decode_image(upload, self._preprocessing, self._small, _SMALL_FORMATS)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, decode_image, upload, self._preprocessing, self._limits)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def is_image_type(media_type: str) -> bool:
    return media_type in MEDIA_TYPES or media_type in _ALIASES


def takes_small_images(preprocessing: Preprocessing) -> bool:
    """Whether the event loop decodes small images for this model. Scaling to more pixels takes longer than a thread."""
    return math.prod(preprocessing.image_size) <= _SMALL_PIXELS


def is_small(data: bytes) -> bool:
    """Whether the event loop decodes this file, if it is in order and the model takes small images."""
    if len(data) > _SMALL_BYTES:
        return False
    try:
        with Image.open(BytesIO(data), formats=_SMALL_FORMATS) as image:
            return math.prod(image.size) <= _SMALL_PIXELS
    except (*_PILLOW_ERRORS, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


def decode_image(
    upload: Upload, preprocessing: Preprocessing, limits: DecodeLimits, formats: tuple[str, ...] = FORMATS
) -> npt.NDArray[np.uint8]:
    """(height, width, channels) uint8 of the model's size.

    The content decides the format; the declared media type only has to be one of ours, or none at all.

    Raises:
        ImageError: the file is too large, of another type, no image, or damaged.
    """
    if len(upload.data) > limits.max_image_bytes:
        raise ImageTooLarge(f"the image has {len(upload.data)} bytes; at most {limits.max_image_bytes} are accepted")
    # curl and others declare octet-stream for a file name that they do not know.
    if upload.media_type not in ("", "application/octet-stream") and not is_image_type(upload.media_type):
        raise UnsupportedMediaType(f"{upload.media_type!r} is not accepted; send one of {', '.join(MEDIA_TYPES)}")
    try:
        with Image.open(BytesIO(upload.data), formats=formats) as image:
            width, height = image.size
            if width * height > limits.max_image_pixels:
                raise TooManyPixels(
                    f"the image has {width} x {height} pixels; at most {limits.max_image_pixels} are accepted"
                )
            image.load()
            return fit(image, preprocessing)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow has a limit of its own, above ours by default, and applies it when it reads the header.
        raise TooManyPixels(f"the image has too many pixels; at most {limits.max_image_pixels} are accepted") from error
    except UnidentifiedImageError as error:
        raise NotAnImage(f"the content is none of {', '.join(formats)}") from error
    except _PILLOW_ERRORS as error:
        raise BrokenImage("the image is truncated or damaged and cannot be decoded") from error
