"""Data sets restricted to some classes: numbering, choice by text, match by label."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.vmoe.tiny import PREPROCESSING, data_of
from vmoe.class_subset import ClassSubset, choose_classes, match_classes, parse_classes
from vmoe.data import DataError, IdxImages, ImageFolder


def test_subset_holds_the_images_of_its_classes_numbered_in_its_order() -> None:
    data = data_of(9)  # classes 0 1 2 0 1 2 0 1 2
    subset = ClassSubset(data, (2, 0))
    assert subset.labels == ("bright", "dark")
    assert len(subset) == 6
    assert subset.targets.tolist() == [1, 0, 1, 0, 1, 0]
    images, targets = subset.read(np.array([3, 0]))
    np.testing.assert_array_equal(images, data.images[[5, 0]])  # rows 0 2 3 5 6 8 of the whole
    assert targets.tolist() == [0, 1]


def test_subset_of_a_folder_reads_only_its_own_files(tmp_path: Path) -> None:
    for number, name in enumerate(("ant", "bee", "cat")):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8), 10 * number).save(tmp_path / name / "0.png")
    (tmp_path / "ant" / "0.png").write_bytes(b"no image")
    images, targets = ClassSubset(ImageFolder(tmp_path, PREPROCESSING), (1, 2)).read(np.array([0, 1]))
    assert images[:, 0, 0, 0].tolist() == [10, 20]
    assert targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "expected"), [("0-2", (0, 1, 2)), ("2,0", (0, 2)), ("0, 5-7", (0, 5, 6, 7)), ("1-2,2", (1, 2))]
)
def test_parse_classes_reads_numbers_and_ranges(text: str, expected: tuple[int, ...]) -> None:
    assert parse_classes(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a-b", "'a-b' is not a list of classes, expected numbers such as 0-4"),
        ("-1", "is not a list of classes"),
        ("", "is not a list of classes"),
        ("3", "'3' names 1 classes, a classifier needs at least 2"),
        ("4-2", "names 0 classes"),
    ],
)
def test_parse_classes_of_anything_else_says_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_classes(text)


def test_choose_classes_without_a_choice_takes_the_data_as_they_are() -> None:
    data = data_of(6)
    assert choose_classes(data, None) is data


def test_choose_classes_that_do_not_exist_or_are_empty_is_refused() -> None:
    with pytest.raises(DataError, match="class 3 does not exist, the data have the classes 0 to 2"):
        choose_classes(data_of(6), "1-4")
    empty = IdxImages(data_of(2).images, np.array([0, 2]), ("a", "b", "c"))
    with pytest.raises(DataError, match="the data hold no image of class 1"):
        choose_classes(empty, "0-1")


def test_match_classes_takes_the_part_that_the_model_knows_in_its_order() -> None:
    found = match_classes(data_of(6), ("bright", "dark"))
    assert found.labels == ("bright", "dark")
    assert found.targets.tolist() == [1, 0, 1, 0]


def test_match_classes_of_other_names_trusts_the_numbers_only_when_there_are_as_many() -> None:
    data = data_of(6)
    assert match_classes(data, ("x", "y", "z")) is data
    with pytest.raises(DataError, match="the data have 3 classes, the model has 2"):
        match_classes(data, ("x", "dark"))
