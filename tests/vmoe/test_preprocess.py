"""Pixels to model input, on images whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from vmoe.preprocess import Preprocessing, fit, normalize, parse_channel_values, scale_and_offset

GRAY = Preprocessing((4, 4), 1, (0.5,), (0.5,))
COLOUR = Preprocessing((4, 4), 3, (0.5,) * 3, (0.5,) * 3)
# 16 columns, 4 rows; the value of a pixel is ten times its column.
RAMP = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 10, (4, 1)))


def changed(**changes: Any) -> Preprocessing:
    return Preprocessing(**({"image_size": (4, 4), "channels": 1, "mean": (0.5,), "std": (0.5,)} | changes))


def test_fit_of_an_image_of_the_right_size_passes_it_through_byte_for_byte() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    np.testing.assert_array_equal(fit(Image.fromarray(pixels), COLOUR), pixels)
    np.testing.assert_array_equal(fit(Image.fromarray(pixels[..., 0]), GRAY), pixels[..., :1])


def test_fit_when_stretching_shows_the_whole_image() -> None:
    # Each output column stands for 4 input columns, centred at 5.5 and 9.5 for the inner two. A symmetric filter of a
    # ramp gives the value at its centre: 55 and 95.
    found = fit(RAMP, GRAY)
    assert found.shape == (4, 4, 1)
    assert found[0, 1:3, 0].tolist() == [55, 95]
    assert found[0, 0, 0] < 25  # the left edge is there
    assert found[0, 3, 0] > 125  # and the right one


def test_fit_when_cropping_takes_the_middle() -> None:
    # The largest centred square of 16 x 4 is columns 6 to 9, at the model's size already.
    found = fit(RAMP, changed(fit="center_crop"))
    assert found[..., 0].tolist() == [[60, 70, 80, 90]] * 4


def test_fit_when_cropping_a_tall_image_takes_the_middle_rows() -> None:
    found = fit(RAMP.transpose(Image.Transpose.TRANSPOSE), changed(fit="center_crop"))
    assert found[:, 0, 0].tolist() == [60, 70, 80, 90]


def test_fit_with_a_crop_fraction_cuts_the_border_off() -> None:
    # Half of 8 x 8 is the inner 4 x 4 at full resolution: rows and columns 2 to 5.
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8), np.uint8)
    found = fit(Image.fromarray(pixels), changed(fit="center_crop", crop_fraction=0.5))
    np.testing.assert_array_equal(found[..., 0], pixels[2:6, 2:6])


def test_fit_when_cropping_to_a_wide_model_keeps_its_aspect_ratio() -> None:
    # Model 2 x 4 of an image 4 x 4: the middle two rows, all columns, untouched.
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    found = fit(Image.fromarray(pixels), changed(image_size=(2, 4), fit="center_crop"))
    np.testing.assert_array_equal(found[..., 0], pixels[1:3])


def test_fit_of_a_wide_size_is_height_by_width() -> None:
    assert fit(RAMP, changed(image_size=(2, 6))).shape == (2, 6, 1)


def test_fit_of_a_colour_image_for_a_gray_model_is_luminance() -> None:
    # ITU-R 601: 0.299 * 255 = 76.2 for pure red.
    assert fit(Image.new("RGB", (9, 9), (255, 0, 0)), GRAY).ravel().tolist() == [76] * 16


def test_fit_of_a_gray_image_for_a_colour_model_repeats_the_channel() -> None:
    assert fit(Image.new("L", (9, 9), 100), COLOUR).ravel().tolist() == [100] * 48


def test_fit_keeps_the_order_of_the_channels() -> None:
    assert fit(Image.new("RGB", (9, 9), (10, 20, 30)), COLOUR)[2, 3].tolist() == [10, 20, 30]


@pytest.mark.parametrize("orientation", range(10))  # 1 to 8 are EXIF's; others mean nothing
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("preprocessing", [GRAY, COLOUR], ids=["gray", "colour"])
def test_fit_of_any_mode_and_orientation_equals_pillows_own_steps(
    preprocessing: Preprocessing, mode: str, orientation: int
) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (6, 9, 4), np.uint8))
    image = noise.convert("RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(noise.getchannel("A"))
    image.getexif()[ExifTags.Base.Orientation] = orientation
    before = image.tobytes()
    upright = ImageOps.exif_transpose(image)
    if mode in ("LA", "RGBA"):
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        upright = upright.convert("RGB")
    expected = upright.convert("L" if preprocessing is GRAY else "RGB").resize((4, 4), Image.Resampling.BILINEAR)
    found = fit(image, preprocessing)
    np.testing.assert_array_equal(found, np.asarray(expected).reshape(found.shape))
    assert (image.tobytes(), image.getexif()[ExifTags.Base.Orientation]) == (before, orientation)


def test_normalize_of_every_pixel_value_equals_the_formula_per_channel() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    preprocessing = Preprocessing((4, 4), 3, mean, std)
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    found = normalize(pixels, preprocessing)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # float32 rounding of values up to 2.7


def test_normalize_with_a_half_and_a_half_gives_minus_one_to_one() -> None:
    np.testing.assert_allclose(normalize(np.array([[0], [255]], np.uint8), GRAY)[:, 0], [-1, 1], atol=1e-6)


def test_scale_and_offset_are_float32_per_channel() -> None:
    scale, offset = scale_and_offset(Preprocessing((4, 4), 1, (0.25,), (0.5,)))
    assert (scale.dtype, offset.dtype) == (np.float32, np.float32)
    assert scale.tolist() == [np.float32(2 / 255)]  # 1 / (255 * 0.5)
    assert offset.tolist() == [-0.5]  # -0.25 / 0.5


def test_preprocessing_from_the_lists_of_a_json_file_equals_the_one_from_tuples() -> None:
    assert changed(image_size=[4, 4], mean=[0.5], std=[0.5]) == GRAY


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"mean": (0.5, 0.5)}, "mean and std need 1 values each"),
        ({"std": ()}, "mean and std need 1 values each"),
        ({"std": (0.0,)}, r"std must be above 0 and finite, got \(0.0,\)"),
        ({"mean": (float("nan"),)}, r"mean must be finite, got \(nan,\)"),
        ({"std": (float("nan"),)}, "std must be above 0 and finite"),
        ({"std": (float("inf"),)}, "std must be above 0 and finite"),
        ({"fit": "crop"}, "fit must be 'stretch' or 'center_crop', got 'crop'"),
        ({"crop_fraction": 0.0}, "crop_fraction must be above 0 and at most 1, got 0.0"),
        ({"crop_fraction": 1.1}, "crop_fraction must be above 0 and at most 1, got 1.1"),
    ],
)
def test_preprocessing_with_a_bad_value_says_what_would_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**changes)


def test_overridden_changes_what_is_given_and_keeps_the_rest() -> None:
    cropped = COLOUR.overridden(fit="center_crop", crop_fraction=0.875)
    assert cropped == Preprocessing((4, 4), 3, (0.5,) * 3, (0.5,) * 3, "center_crop", 0.875)
    other = cropped.overridden(mean=(0.1, 0.2, 0.3))
    assert (other.mean, other.std, other.fit, other.crop_fraction) == (
        (0.1, 0.2, 0.3),
        (0.5,) * 3,
        "center_crop",
        0.875,
    )
    assert cropped.overridden(fit="stretch") == COLOUR  # nothing is cut off any more
    assert cropped.overridden() == cropped


def test_crop_fraction_of_stretched_images_is_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_fraction 0\.875 needs fit 'center_crop', the fit is 'stretch'"):
        COLOUR.overridden(crop_fraction=0.875)


def test_channel_values_are_numbers_between_commas() -> None:
    assert parse_channel_values("0.485, 0.456,0.406") == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("text", ["", "a", "0.5;0.5", "0.5,,0.5"])
def test_channel_values_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a number per channel, expected such as 0\.485,0\.456,0\.406"):
        parse_channel_values(text)
