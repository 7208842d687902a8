from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loadtest.errors import LoadtestError
from loadtest.images import SAMPLE, load_images
from loadtest.trace import Trace, read_trace

LABELS = ("T-shirt/top", "Ankle boot")


def write_png(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), 7).save(path)


def test_images_when_folders_are_named_after_classes_then_labels_are_the_models(tmp_path: Path) -> None:
    for name in ("ankle_boot/1.png", "t-shirt top/2.png", "unknown/3.png"):
        write_png(tmp_path / name)
    images = load_images(tmp_path, LABELS)
    assert list(images.names) == ["ankle_boot/1.png", "t-shirt top/2.png", "unknown/3.png"]
    assert images.labels.tolist() == [1, 0, -1]
    assert images.bodies[0] == (tmp_path / "ankle_boot/1.png").read_bytes()


def test_images_when_there_is_an_idx_data_set_then_they_are_encoded_with_its_labels(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8)
    files = {
        "t10k-images-idx3-ubyte.gz": struct.pack(">HBBIII", 0, 8, 3, 2, 3, 3) + pixels.tobytes(),
        "t10k-labels-idx1-ubyte.gz": struct.pack(">HBBI", 0, 8, 1, 2) + bytes([1, 0]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
    images = load_images(tmp_path, LABELS)
    assert images.labels.tolist() == [1, 0]
    assert images.bodies[0].startswith(b"\x89PNG")


def test_images_when_it_is_the_sample_then_its_label_is_known() -> None:
    assert load_images(SAMPLE, LABELS).labels.tolist() == [1]


def test_choice_when_the_trace_names_images_then_those_are_sent_and_others_follow_the_seed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write_png(tmp_path / name)
    (tmp_path / "trace.csv").write_text("arrival_s,image\n0,c.png\n1,\n2,a.png\n")
    images, trace = load_images(tmp_path, LABELS), read_trace(tmp_path / "trace.csv")
    chosen = images.choose(trace, 0)
    assert (chosen[0], chosen[2]) == (2, 0)
    assert chosen.tolist() == images.choose(trace, 0).tolist()
    assert len(set(images.choose(Trace.of(np.arange(100.0)), 0).tolist())) == 3


def test_choice_when_a_named_image_is_missing_then_it_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png")
    (tmp_path / "trace.csv").write_text("arrival_s,image\n0,z.png\n")
    with pytest.raises(LoadtestError, match=r"'z\.png'"):
        load_images(tmp_path, LABELS).choose(read_trace(tmp_path / "trace.csv"), 0)


def test_images_when_there_are_none_then_the_suffixes_are_listed(tmp_path: Path) -> None:
    with pytest.raises(LoadtestError, match="known suffixes"):
        load_images(tmp_path, LABELS)
