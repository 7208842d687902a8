"""Pixels to model input: the one definition, used by training, evaluation, export and the gateway. Torch-free.

Two steps, split where the data gets small: `fit` turns an opened image of any size and mode into the uint8 array that
the model expects; `normalize` maps that array to floats. The exported graph holds the second step: the gateway ships
bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

Fit = Literal["stretch", "center_crop"]

_BACKGROUND = (255, 255, 255, 255)  # under transparent pixels: white, as a browser shows them


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of one model.

    Attributes:
        image_size: (height, width) in pixels.
        channels: 1 (luminance) or 3 (RGB).
        mean, std: per channel, for pixels scaled to 0..1; 0.5 and 0.5 give the value range -1..1 of the reference.
        fit: `stretch` to the exact size, or `center_crop`: scale, then cut out the middle.
        crop_fraction: with `center_crop`, side of the crop over the scaled shorter side (224 / 256 = 0.875 is usual).
    """

    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Fit = "stretch"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, got {self.mean} and {self.std}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must be finite, got {self.mean}")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std must be above 0 and finite, got {self.std}")
        if self.fit not in ("stretch", "center_crop"):
            raise ValueError(f"fit must be 'stretch' or 'center_crop', got {self.fit!r}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be above 0 and at most 1, got {self.crop_fraction}")

    def overridden(
        self,
        *,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        fit: Fit | None = None,
        crop_fraction: float | None = None,
    ) -> Preprocessing:
        """The same with the values that are given.

        Raises:
            ValueError: a value is out of range, or a crop fraction is given for images that are stretched.
        """
        fit = fit or self.fit
        if fit == "stretch":
            if crop_fraction is not None:
                raise ValueError(f"crop_fraction {crop_fraction} needs fit 'center_crop', the fit is 'stretch'")
            crop_fraction = 1.0
        return replace(
            self,
            mean=self.mean if mean is None else mean,
            std=self.std if std is None else std,
            fit=fit,
            crop_fraction=self.crop_fraction if crop_fraction is None else crop_fraction,
        )


def parse_channel_values(text: str) -> tuple[float, ...]:
    """A number per channel from `0.485,0.456,0.406`.

    Raises:
        ValueError: names the text and the form expected.
    """
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a number per channel, expected such as 0.485,0.456,0.406 or 0.5") from error


def fit(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """An opened image of any mode as the model's pixels: (height, width, channels) uint8.

    EXIF orientation is applied, transparent pixels are laid over white, 16-bit values are scaled to 8 bits, colour
    profiles are ignored. An image that already has the right size and mode passes through untouched, byte for byte.

    Raises:
        OSError: the file behind the image is damaged (Pillow reads pixels lazily and has other errors for this, too).
    """
    height, width = preprocessing.image_size
    image = _flatten(_upright(image))
    mode = "L" if preprocessing.channels == 1 else "RGB"
    if image.mode != mode:  # Pillow would copy
        image = image.convert(mode)
    if image.size != (width, height):
        box = None if preprocessing.fit == "stretch" else _crop_box(image.size, preprocessing)
        # One resampling from the source box: cutting first or after gives the same pixels up to rounding, at less work.
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, preprocessing.channels)


def normalize(images: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """(..., channels) uint8 -> float32, `(pixel / 255 - mean) / std` as `pixel * scale + offset`."""
    scale, offset = scale_and_offset(preprocessing)
    return images.astype(np.float32) * scale + offset


def scale_and_offset(preprocessing: Preprocessing) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Per-channel factors (channels,) of `normalize`, computed in double precision."""
    mean, std = np.asarray(preprocessing.mean), np.asarray(preprocessing.std)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _upright(image: Image.Image) -> Image.Image:
    """As its EXIF orientation says. The image itself where there is nothing to turn: Pillow would copy it."""
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to an opaque 8-bit image that Pillow converts to L or RGB without losing meaning."""
    if image.mode.startswith("I"):
        return _to_8_bit(image)
    if image.has_transparency_data:
        foreground = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, _BACKGROUND), foreground).convert("RGB")
    if image.mode == "CMYK":
        # Pillow has inverted the values already: it takes every CMYK JPEG for one of Adobe's, and so do we.
        return image.convert("RGB")
    return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Sixteen-bit luminance (modes I;16 and I) to mode L, rounded. Pillow's own conversion clips instead."""
    wide = np.asarray(image).clip(0, 65535).astype(np.uint32)
    narrow = ((wide + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257
    if (key := image.info.get("transparency")) is None:
        return Image.fromarray(narrow)
    opaque = np.where(wide == key, np.uint8(_BACKGROUND[0]), narrow)  # PNG: one grey value may mean "transparent"
    return Image.fromarray(opaque)


def _crop_box(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[float, float, float, float]:
    """Largest centred box of the model's aspect ratio, shrunk by `crop_fraction`: (left, top, right, bottom)."""
    width, height = size
    model_height, model_width = preprocessing.image_size
    scale = min(width / model_width, height / model_height) * preprocessing.crop_fraction
    half_width, half_height = model_width * scale / 2, model_height * scale / 2
    return width / 2 - half_width, height / 2 - half_height, width / 2 + half_width, height / 2 + half_height
