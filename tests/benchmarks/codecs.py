"""JPEG photographs to the input of a 224-pixel model, by codec: `python -m tests.benchmarks.codecs`.

    pillow            as the gateway does it: decode at full size, one resampling
    pillow, draft     libjpeg scales by 1/2, 1/4 or 1/8 while it decodes, as far as the model's scale allows
    simplejpeg        libjpeg-turbo by another way, Pillow's resampling
    opencv            its decoder at full size, Pillow's resampling
    opencv, area      its decoder and its own resampling
    pyvips            its thumbnails, which scale while they decode

Codecs that are not installed are left out: `pip install simplejpeg opencv-python-headless 'pyvips[binary]'`. The
photographs are synthetic: noise with the spectrum of natural images (amplitude 1/f), and shapes with edges. Processor
time per image is the median of the runs, in which codecs take turns. Writes docs/bench/codecs.md.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
import typer
from PIL import Image, ImageDraw, features
from rich.console import Console

from server.decode import DecodeLimits, Upload, decode_image
from tests.benchmarks.live_gateway import OUT, machine
from vmoe.preprocess import Preprocessing, fit

Pixels = npt.NDArray[np.uint8]
SIZES: Final = ((500, 375), (1920, 1080), (4000, 3000))
MODEL: Final = Preprocessing((224, 224), 3, (0.5,) * 3, (0.5,) * 3, "center_crop", 0.875)
SHORT_SIDE: Final = 256  # 224 / 0.875: what the shorter side is scaled to before the crop
_LIMITS: Final = DecodeLimits(1 << 30, 1 << 30)


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 85, colour at half resolution, as cameras and web sites write them."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # the mean is set below
    planes = []
    for contrast in (50, 25, 25):  # luminance, and two of colour
        phases = np.exp(2j * np.pi * rng.random(frequency.shape))
        plane = np.fft.irfft2(phases / frequency, (height, width))
        planes.append(128 + contrast * plane / plane.std())
    image = Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB")
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = rng.uniform(0, width), rng.uniform(0, height)
        box = (left, top, left + rng.uniform(0.02, 0.4) * width, top + rng.uniform(0.02, 0.4) * height)
        colour = tuple(rng.integers(0, 256, 3).tolist())
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, outline=colour, width=max(1, width // 200))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def with_pillow(data: bytes) -> Pixels:
    return decode_image(Upload(data, "image/jpeg"), MODEL, _LIMITS)


def with_draft(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as image:
        scale = SHORT_SIDE / min(image.size)
        image.draft("RGB", (int(image.width * scale), int(image.height * scale)))
        return fit(image, MODEL)


def with_simplejpeg(data: bytes, simplejpeg: Any) -> Pixels:
    return fit(Image.fromarray(simplejpeg.decode_jpeg(data, "RGB")), MODEL)


def with_opencv(data: bytes, cv2: Any) -> Pixels:
    return fit(Image.fromarray(_decode(data, cv2)), MODEL)


def with_opencv_area(data: bytes, cv2: Any) -> Pixels:
    image = _decode(data, cv2)
    height, width = image.shape[:2]
    side = round(min(width, height) * MODEL.crop_fraction)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = image[top : top + side, left : left + side]
    resized: Pixels = cv2.resize(cropped, MODEL.image_size, interpolation=cv2.INTER_AREA)
    return resized


def with_pyvips(data: bytes, pyvips: Any) -> Pixels:
    image = pyvips.Image.thumbnail_buffer(data, 10**6, height=SHORT_SIDE)
    if image.width < SHORT_SIDE:
        image = pyvips.Image.thumbnail_buffer(data, SHORT_SIDE, height=10**6)
    height, width = MODEL.image_size
    cropped: Pixels = image.crop((image.width - width) // 2, (image.height - height) // 2, width, height).numpy()
    return cropped


def _decode(data: bytes, cv2: Any) -> Pixels:
    decoded: Pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    return decoded


# Name, distribution and module of each codec, and how it is used.
OTHERS: Final[tuple[tuple[str, str, str, Callable[[bytes, Any], Pixels]], ...]] = (
    ("simplejpeg", "simplejpeg", "simplejpeg", with_simplejpeg),
    ("opencv", "opencv-python-headless", "cv2", with_opencv),
    ("opencv, area", "opencv-python-headless", "cv2", with_opencv_area),
    ("pyvips", "pyvips", "pyvips", with_pyvips),
)


def installed() -> tuple[dict[str, Callable[[bytes], Pixels]], list[str]]:
    """Codecs by name, and their versions; one thread each."""
    codecs: dict[str, Callable[[bytes], Pixels]] = {"pillow": with_pillow, "pillow, draft": with_draft}
    versions = [f"pillow {version('pillow')} with libjpeg-turbo {features.version('libjpeg_turbo')}"]
    for name, distribution, module, use in OTHERS:
        try:
            versions.append(f"{distribution} {version(distribution)}")
            library = import_module(module)
        except (PackageNotFoundError, ImportError):
            continue
        if module == "cv2":
            library.setNumThreads(1)
        codecs[name] = lambda data, use=use, library=library: use(data, library)  # type: ignore[misc]
    return codecs, list(dict.fromkeys(versions))


def processor_ms(codec: Callable[[bytes], Pixels], data: bytes) -> float:
    """Of the whole process: some codecs bring threads."""
    start_s = time.process_time()
    codec(data)
    return 1000 * (time.process_time() - start_s)


def rows(width: int, height: int, codecs: Mapping[str, Callable[[bytes], Pixels]], runs: int) -> list[str]:
    """Of a table, for one photograph."""
    data = photograph(width, height, seed=width)
    reference = with_pillow(data).astype(np.int64)
    times_ms: dict[str, list[float]] = {name: [] for name in codecs}
    found = {name: codec(data) for name, codec in codecs.items()}  # loads what is loaded late
    for _ in range(runs):
        for name, codec in codecs.items():
            times_ms[name].append(processor_ms(codec, data))
    medians_ms = {name: float(np.median(each)) for name, each in times_ms.items()}
    differences = {name: np.abs(pixels.astype(np.int64) - reference) for name, pixels in found.items()}
    return [
        f"| {width} x {height}, {len(data) // 1000} kB | {name} | {medians_ms[name]:.1f} | "
        f"{medians_ms[name] / medians_ms['pillow']:.2f} | {difference.mean():.2f} | {difference.max()} |"
        for name, difference in differences.items()
    ]


def main(
    runs: Annotated[int, typer.Option(min=1, help="Of each codec on each photograph.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = OUT,
) -> None:
    """Prints a table and writes it to codecs.md; took half a minute."""
    codecs, versions = installed()
    lines = [
        "# JPEG photographs to the input of a 224-pixel model, by codec\n",
        f"{date.today().isoformat()}, `python -m tests.benchmarks.codecs --runs {runs}` on {machine()} (load average "
        f"{os.getloadavg()[0]:.1f}); {', '.join(versions)}. Differences to Pillow's pixels, of 255.\n",
        "| photograph | codec | processor ms | over pillow | mean difference | largest |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for width, height in SIZES:
        lines += rows(width, height, codecs, runs)
    text = "\n".join(lines) + "\n"
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
    (out / "codecs.md").write_text(text)


if __name__ == "__main__":
    typer.run(main)
