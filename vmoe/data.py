"""Labelled images: IDX files (Fashion-MNIST, MNIST) and folders of images, one class per sub-folder. Torch-free.

Axes: N images, H and W pixels, C channels. Images stay uint8 until the model's normalisation.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from vmoe.preprocess import Preprocessing, fit

# Debian's package dataset-fashion-mnist puts the files here.
FASHION_MNIST_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Mean and standard deviation of the 60,000 training images, pixels scaled to 0..1.
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)

_IDX_UINT8 = 0x08  # type code in the third byte of an IDX file
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


class DataError(ValueError):
    """A data set that is missing or malformed; the message names the file and what was expected."""


class LabelledImages(Protocol):
    """A data set of which any part can be read as arrays."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        """Class of every image: (N,)."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Images (N, H, W, C) and class indices (N,)."""
        ...


@dataclass(frozen=True)
class IdxImages:
    """An IDX data set, held in memory. Build it with `load_idx`."""

    images: npt.NDArray[np.uint8]
    targets: npt.NDArray[np.int64]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        return self.images[indices], self.targets[indices]


@dataclass(frozen=True)
class FittedImages:
    """An IDX data set whose images get another size, or colour, when they are read."""

    source: IdxImages
    preprocessing: Preprocessing

    @property
    def labels(self) -> tuple[str, ...]:
        return self.source.labels

    @property
    def targets(self) -> npt.NDArray[np.int64]:
        return self.source.targets

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        images, targets = self.source.read(indices)
        fitted = [fit(Image.fromarray(image[..., 0]), self.preprocessing) for image in images]
        return np.stack(fitted), targets


class ImageFolder:
    """`root/<class name>/<image file>`; classes are numbered in alphabetical order. Files are decoded when read."""

    def __init__(self, root: Path, preprocessing: Preprocessing, threads: int = 8) -> None:
        if not root.is_dir():
            raise DataError(f"{root} is not a directory")
        classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not classes:
            raise DataError(f"{root} holds no sub-folders; expected one per class: {root}/<class name>/<image file>")
        self.labels = tuple(path.name for path in classes)
        found = [
            (file, index)
            for index, folder in enumerate(classes)
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in _IMAGE_SUFFIXES
        ]
        if not found:
            raise DataError(f"{root} holds no images; known suffixes are {sorted(_IMAGE_SUFFIXES)}")
        self._files = [file for file, _ in found]
        self.targets = np.array([index for _, index in found], dtype=np.int64)
        self._preprocessing = preprocessing
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        images = np.stack(list(self._pool.map(self._decode, [self._files[index] for index in indices])))
        return images, self.targets[indices]

    def _decode(self, file: Path) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(file) as image:
                return fit(image, self._preprocessing)
        except OSError as error:
            raise DataError(f"{file} cannot be decoded: {error}") from error


def load_idx(directory: Path, split: str) -> IdxImages:
    """Reads `<split>-images-idx3-ubyte` and `<split>-labels-idx1-ubyte`, plain or gzipped.

    Arguments:
        directory: holds the files.
        split: `train` or `t10k`.

    Raises:
        DataError: a file is missing, is not IDX, or images and labels do not match.
    """
    images = _read_idx(directory, f"{split}-images-idx3-ubyte", dimensions=3)[..., None]
    targets = _read_idx(directory, f"{split}-labels-idx1-ubyte", dimensions=1).astype(np.int64)
    if len(images) != len(targets):
        raise DataError(f"{directory}: {len(images)} images but {len(targets)} labels in split {split!r}")
    num_classes = int(targets.max(initial=0)) + 1
    labels = FASHION_MNIST_LABELS if num_classes == len(FASHION_MNIST_LABELS) else tuple(map(str, range(num_classes)))
    return IdxImages(images, targets, labels)


def load_images(path: Path, preprocessing: Preprocessing, *, train: bool) -> LabelledImages:
    """A data set from a path: a directory of IDX files, or a folder with one sub-folder per class.

    A folder may hold the splits `train` and `val` (or `test`), each with the classes. Images of another size than the
    model's are fitted.
    """
    split = "train" if train else "t10k"
    if any(path.glob("*-images-idx3-ubyte*")):
        images = load_idx(path, split)
        fits = images.images.shape[1:] == (*preprocessing.image_size, preprocessing.channels)
        return images if fits else FittedImages(images, preprocessing)
    for name in ("train",) if train else ("val", "test"):
        if (path / name).is_dir():
            return ImageFolder(path / name, preprocessing)
    other = path / ("val" if train else "train")
    if other.is_dir() and any(child.is_dir() for child in other.iterdir()):
        raise DataError(f"{path} has a split {other.name!r} but no {'train' if train else 'val or test'}")
    return ImageFolder(path, preprocessing)


def _read_idx(directory: Path, name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    path = next((p for p in (directory / name, directory / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(
            f"{directory / name}[.gz] does not exist; for Fashion-MNIST install Debian's package dataset-fashion-mnist "
            "or give the directory that holds the four IDX files"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    header = struct.Struct(f">HBB{dimensions}I")
    if len(raw) < header.size:
        raise DataError(f"{path} is truncated: {len(raw)} bytes, the header alone has {header.size}")
    zero, kind, found, *shape = header.unpack_from(raw)
    if zero != 0 or kind != _IDX_UINT8 or found != dimensions:
        raise DataError(f"{path} is not an IDX file of uint8 with {dimensions} dimensions")
    if len(raw) - header.size != math.prod(shape):
        raise DataError(f"{path}: shape {shape} needs {math.prod(shape)} bytes of data, found {len(raw) - header.size}")
    return np.frombuffer(raw, np.uint8, offset=header.size).reshape(shape)
