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
from dataclasses import dataclass
from io import BytesIO
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from server.errors import BrokenImage, ImageTooLarge, NotAnImage, TooManyPixels, UnsupportedMediaType
from vmoe.preprocess import Preprocessing, fit

# Pillow's other formats are left out: they are rarely needed and much less tested against hostile files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MEDIA_TYPES = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp")
_ALIASES = ("image/jpg", "image/pjpeg", "image/x-png", "image/apng", "image/x-ms-bmp", "image/x-bmp")
# What curl and others declare for a file name that they do not know.
_UNKNOWN = "application/octet-stream"

# Up to this size of file, image and model input, decoding costs 0.1 to 0.3 ms, and a thread would add about half of
# that for the way there and back (docs/request-path.md). A few bytes may hold many pixels, hence all three.
_SMALL_BYTES: Final = 4096
_SMALL_PIXELS: Final = 64 * 64

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
    """Decodes small images at once and others in a pool of threads, so that the event loop never waits for long."""

    def __init__(self, preprocessing: Preprocessing, limits: DecodeLimits, threads: int) -> None:
        self._preprocessing, self._limits = preprocessing, limits
        self._small_bytes = _SMALL_BYTES if math.prod(preprocessing.image_size) <= _SMALL_PIXELS else 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode_small(self, upload: Upload) -> npt.NDArray[np.uint8] | None:
        """As `decode`, at once; None where that could take long."""
        if len(upload.data) > self._small_bytes:
            return None
        return _decode(upload, self._preprocessing, self._limits, _SMALL_PIXELS)

    async def decode(self, upload: Upload) -> npt.NDArray[np.uint8]:
        """See `decode_image`; in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, decode_image, upload, self._preprocessing, self._limits)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def is_accepted(media_type: str) -> bool:
    return media_type in MEDIA_TYPES or media_type in _ALIASES or media_type == _UNKNOWN


def decode_image(upload: Upload, preprocessing: Preprocessing, limits: DecodeLimits) -> npt.NDArray[np.uint8]:
    """(height, width, channels) uint8 of the model's size.

    The content decides the format; the declared media type only has to be one of ours, or none at all.

    Raises:
        ImageError: the file is too large, of another type, no image, or damaged.
    """
    image = _decode(upload, preprocessing, limits, limits.max_image_pixels)
    assert image is not None, "an image of more pixels was refused"
    return image


def _decode(
    upload: Upload, preprocessing: Preprocessing, limits: DecodeLimits, at_most_pixels: int
) -> npt.NDArray[np.uint8] | None:
    """As `decode_image`; None, and no pixel is decoded, where the header announces more than `at_most_pixels`."""
    if len(upload.data) > limits.max_image_bytes:
        raise ImageTooLarge(f"the image has {len(upload.data)} bytes; at most {limits.max_image_bytes} are accepted")
    if upload.media_type and not is_accepted(upload.media_type):
        raise UnsupportedMediaType(f"{upload.media_type!r} is not accepted; send one of {', '.join(MEDIA_TYPES)}")
    try:
        with Image.open(BytesIO(upload.data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_image_pixels:
                raise TooManyPixels(
                    f"the image has {width} x {height} pixels; at most {limits.max_image_pixels} are accepted"
                )
            if width * height > at_most_pixels:
                return None
            image.load()
            return fit(image, preprocessing)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow has a limit of its own, above ours by default, and applies it when it reads the header.
        raise TooManyPixels(f"the image has too many pixels; at most {limits.max_image_pixels} are accepted") from error
    except UnidentifiedImageError as error:
        raise NotAnImage(f"the content is none of {', '.join(FORMATS)}") from error
    except _PILLOW_ERRORS as error:
        raise BrokenImage("the image is truncated or damaged and cannot be decoded") from error
