"""What a live run sends: encoded images, with labels where they are known.

    an IDX data set   DIR/t10k-images-idx3-ubyte[.gz]; image "17" is the eighteenth; labels from the set
    a folder          DIR/CLASS/FILE; the label is CLASS where the model has a class of that name
    loose files       DIR/FILE or one file; the label is the file's name where the model has a class of that name

Names are compared without case and punctuation: ankle_boot.png shows an `Ankle boot`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from loadtest.errors import LoadtestError
from loadtest.trace import Trace
from vmoe.data import DataError, load_idx

SAMPLE = Path(__file__).parents[1] / "examples" / "ankle_boot.png"
MEDIA_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".bmp": "image/bmp",
    ".gif": "image/gif",
}
# Chosen, not tuned: the size of a usual test set. All are held in memory, so that no disk is read during the run.
_MOST_IMAGES = 10_000


@dataclass(frozen=True, eq=False)
class Images:
    """N images.

    Attributes:
        bodies: encoded.
        media_types: of each.
        names: as a trace may call them.
        labels: (N,) class index of the model; -1 where it is unknown.
    """

    bodies: Sequence[bytes]
    media_types: Sequence[str]
    names: Sequence[str]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bodies)

    def choose(self, trace: Trace, seed: int) -> npt.NDArray[np.int64]:
        """(N,) the image of each request: the one that the trace names, else one by chance.

        Raises:
            LoadtestError: the trace names an image that is not here.
        """
        places = {name: place for place, name in enumerate(self.names)}
        if unknown := [name for name in trace.images if name not in places]:
            raise LoadtestError(f"the trace names an image {unknown[0]!r} that --images does not hold")
        named = np.array([places[name] for name in trace.images] + [0])  # image -1 reads the last, and is replaced
        # A stream of its own: the arrivals of a seed stay the same with other images.
        chance = np.random.default_rng([seed, 1]).integers(0, len(self), len(trace))
        return np.where(trace.image < 0, chance, named[trace.image])


def load_images(path: Path, labels: Sequence[str]) -> Images:
    """Reads images for a model with these class names.

    Raises:
        LoadtestError: there are none.
    """
    try:
        if any(path.glob("t10k-images-idx3-ubyte*")):
            return _idx(path)
        return _files(path, labels)
    except (OSError, DataError) as error:
        raise LoadtestError(f"cannot read images from {path}: {error}") from error


def _idx(path: Path) -> Images:
    data = load_idx(path, "t10k")
    pixels, targets = data.images[:_MOST_IMAGES], data.targets[:_MOST_IMAGES]
    bodies = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0]).save(buffer, "PNG", compress_level=1)
        bodies.append(buffer.getvalue())
    return Images(bodies, ["image/png"] * len(bodies), [str(index) for index in range(len(bodies))], targets)


def _files(path: Path, labels: Sequence[str]) -> Images:
    known = {_plain(label): index for index, label in enumerate(labels)}
    root = path if path.is_dir() else path.parent
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in MEDIA_TYPES) if path.is_dir() else [path]
    if not files or any(file.suffix.lower() not in MEDIA_TYPES for file in files):
        raise LoadtestError(f"{path} holds no images; known suffixes are {', '.join(MEDIA_TYPES)}")
    step = -(-len(files) // _MOST_IMAGES)  # evenly from every class
    files = files[::step]
    classes = [file.stem if file.parent == root else file.relative_to(root).parts[0] for file in files]
    return Images(
        [file.read_bytes() for file in files],
        [MEDIA_TYPES[file.suffix.lower()] for file in files],
        [file.relative_to(root).as_posix() for file in files],
        np.array([known.get(_plain(name), -1) for name in classes], np.int64),
    )


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
