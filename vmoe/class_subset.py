"""A data set restricted to some of its classes: those of pre-training, or those held out of it. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vmoe.data import DataError, LabelledImages


@dataclass(frozen=True)
class ClassSubset:
    """Images of some classes, numbered from 0.

    Attributes:
        classes: numbers in `images`; class i here is classes[i] there.
    """

    images: LabelledImages
    classes: tuple[int, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.images.labels[index] for index in self.classes)

    @cached_property
    def targets(self) -> npt.NDArray[np.int64]:
        """Class of every image: (N,)."""
        return self._new_number[self.images.targets[self._indices]]

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        images, targets = self.images.read(self._indices[indices])
        return images, self._new_number[targets]

    @cached_property
    def _indices(self) -> npt.NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.images.targets, self.classes))

    @cached_property
    def _new_number(self) -> npt.NDArray[np.int64]:
        """Class here of every class there, -1 for one that was left out."""
        numbers = np.full(len(self.images.labels), -1, dtype=np.int64)
        numbers[list(self.classes)] = np.arange(len(self.classes))
        return numbers


def choose_classes(images: LabelledImages, text: str | None) -> LabelledImages:
    """The classes that `text` names by number, such as `0-4` or `0,2,5-7`; None takes all.

    Raises:
        DataError: the text is no list of numbers, or the data have no such class or no image of it.
    """
    if text is None:
        return images
    classes = parse_classes(text)
    if unknown := [index for index in classes if index >= len(images.labels)]:
        raise DataError(f"class {unknown[0]} does not exist, the data have the classes 0 to {len(images.labels) - 1}")
    subset = ClassSubset(images, classes)
    if missing := set(range(len(classes))) - set(subset.targets.tolist()):
        raise DataError(f"the data hold no image of class {classes[min(missing)]}")
    return subset


def parse_classes(text: str) -> tuple[int, ...]:
    """Class numbers, ascending and each once.

    Raises:
        DataError: names the text and the form expected.
    """
    numbers: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers.update(range(int(first), int(last if dash else first) + 1))
    except ValueError as error:
        raise DataError(f"{text!r} is not a list of classes, expected numbers such as 0-4 or 0,2,5-7") from error
    if len(numbers) < 2:
        raise DataError(f"{text!r} names {len(numbers)} classes, a classifier needs at least 2")
    return tuple(sorted(numbers))


def match_classes(images: LabelledImages, labels: tuple[str, ...]) -> LabelledImages:
    """The part of the data that a model with these labels can be measured on, numbered as the model does.

    Where the data know every label by name, the others are left out. Where the names differ but their number is the
    same, the numbers are taken to mean the same.

    Raises:
        DataError: neither is the case: class numbers would mean something else.
    """
    if images.labels == labels:
        return images
    if set(labels) <= set(images.labels):
        return ClassSubset(images, tuple(images.labels.index(label) for label in labels))
    if len(images.labels) == len(labels):
        return images
    raise DataError(
        f"the data have {len(images.labels)} classes, the model has {len(labels)}; a folder must hold a sub-folder for "
        "every class of the model"
    )
