"""Data sets from real files, and augmentation by its properties."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.vmoe.tiny import PREPROCESSING, data_of, idx_bytes, write_idx
from vmoe.augment import augment
from vmoe.data import FASHION_MNIST_LABELS, DataError, IdxImages, ImageFolder, load_idx, load_images
from vmoe.preprocess import Preprocessing

COLOUR = Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3)


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


@pytest.mark.parametrize("gz", [False, True])
def test_load_idx_of_written_files_gives_back_images_and_targets(tmp_path: Path, gz: bool) -> None:
    data = data_of(7)
    write_idx(tmp_path, "train", data, gz=gz)
    found = load_idx(tmp_path, "train")
    assert len(found) == 7
    images, targets = found.read(np.array([5, 0]))
    np.testing.assert_array_equal(images, data.images[[5, 0]])
    assert targets.tolist() == [2, 0]  # classes in turn
    assert targets.dtype == np.int64
    assert found.labels == ("0", "1", "2")


def test_load_idx_of_ten_classes_names_them_after_fashion_mnist(tmp_path: Path) -> None:
    data = data_of(10)
    write_idx(tmp_path, "train", IdxImages(data.images, np.arange(10), ()))
    assert load_idx(tmp_path, "train").labels == FASHION_MNIST_LABELS


def test_load_images_of_an_idx_data_set_of_another_size_fits_every_image(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", data_of(7))
    found = load_images(tmp_path, Preprocessing((12, 16), 3, (0.5,) * 3, (0.5,) * 3), train=True)
    images, targets = found.read(np.array([5, 0]))
    assert images.shape == (2, 12, 16, 3)
    assert targets.tolist() == found.targets[[5, 0]].tolist() == [2, 0]
    assert len(found) == 7
    # The classes are 216 and 40 bright, noise of up to 20 averages out.
    assert images.mean((1, 2, 3)) == pytest.approx([216, 40], abs=8)


def test_load_idx_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\[.gz\] does not exist; for Fashion-MNIST install"):
        load_idx(tmp_path, "t10k")


def test_load_idx_without_the_labels_names_their_file(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", data_of(3))
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\[.gz\] does not exist"):
        load_idx(tmp_path, "train")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is truncated: 0 bytes, the header alone has 16"),
        (idx_bytes(np.zeros((3, 8, 8), np.uint8))[:-1], r"shape \[3, 8, 8\] needs 192 bytes of data, found 191"),
        (idx_bytes(np.zeros((3, 8, 8), np.uint8)) + b"x", r"needs 192 bytes of data, found 193"),
        (b"PK\x03\x04" + b"\0" * 40, "is not an IDX file of uint8 with 3 dimensions"),
        (b"\0\0\x0d\x03" + b"\0" * 40, "is not an IDX file of uint8"),  # type 13 is float32
        (idx_bytes(np.zeros((2, 2, 2, 2), np.uint8)), "with 3 dimensions"),
    ],
)
def test_load_idx_of_a_damaged_file_says_what_is_wrong(tmp_path: Path, raw: bytes, message: str) -> None:
    write_idx(tmp_path, "train", data_of(3))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(raw)
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte.*{message}"):
        load_idx(tmp_path, "train")


def damaged_gzip(kind: str) -> bytes:
    whole = gzip.compress(idx_bytes(np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)))
    if kind == "no gzip":
        return b"not gzip at all"
    if kind == "truncated":
        return whole[: len(whole) // 2]
    if kind == "checksum":
        return whole[:-8] + b"\0" * 8
    return whole[:10] + b"\xff" * (len(whole) - 10)  # the header stands, the deflate stream is nonsense


@pytest.mark.parametrize("kind", ["no gzip", "truncated", "checksum", "nonsense"])
def test_load_idx_of_a_damaged_gzip_names_the_file(tmp_path: Path, kind: str) -> None:
    write_idx(tmp_path, "train", data_of(3), gz=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged_gzip(kind))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        load_idx(tmp_path, "train")


def test_load_idx_when_images_and_labels_differ_in_number_says_both(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", data_of(3))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(2, np.uint8)))
    with pytest.raises(DataError, match="3 images but 2 labels in split 'train'"):
        load_idx(tmp_path, "train")


def test_load_images_of_an_idx_directory_takes_the_split_asked_for(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", data_of(6))
    write_idx(tmp_path, "t10k", data_of(3), gz=True)
    assert len(load_images(tmp_path, PREPROCESSING, train=True)) == 6
    assert len(load_images(tmp_path, PREPROCESSING, train=False)) == 3


def test_load_images_of_an_idx_directory_without_the_split_says_which_file_is_missing(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", data_of(6))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\[.gz\] does not exist"):
        load_images(tmp_path, PREPROCESSING, train=False)


def test_image_folder_numbers_classes_alphabetically_and_skips_what_is_no_image(tmp_path: Path) -> None:
    write_image(tmp_path / "dog" / "a.png", 30)
    write_image(tmp_path / "cat" / "b.PNG", 20)
    write_image(tmp_path / "cat" / "nested" / "c.bmp", 25)
    write_image(tmp_path / ".cache" / "hidden.png", 1)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    folder = ImageFolder(tmp_path, PREPROCESSING)
    assert folder.labels == ("cat", "dog")
    images, targets = folder.read(np.arange(len(folder)))
    assert images.shape == (3, 8, 8, 1)
    assert images[:, 0, 0, 0].tolist() == [20, 25, 30]
    assert targets.tolist() == [0, 0, 1]


def test_image_folder_read_out_of_order_keeps_images_with_their_targets(tmp_path: Path) -> None:
    for index in range(12):
        write_image(tmp_path / f"class{index % 3}" / f"{index:02}.png", index)
    folder = ImageFolder(tmp_path, PREPROCESSING)
    images, targets = folder.read(np.random.default_rng(0).permutation(12))
    assert (images[:, 0, 0, 0] % 3).tolist() == targets.tolist()


def test_image_folder_converts_and_resizes_to_the_model(tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    Image.new("RGB", (20, 30), (250, 10, 20)).save(tmp_path / "red" / "large.png")
    images, _ = ImageFolder(tmp_path, COLOUR).read(np.array([0]))
    assert images.shape == (1, 8, 8, 3)
    assert (images == [250, 10, 20]).all()


def test_load_images_of_a_folder_with_splits_reads_train_and_val(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for index in range(count):
            write_image(tmp_path / split / "cat" / f"{index}.png", index)
    assert len(load_images(tmp_path, PREPROCESSING, train=True)) == 3
    assert len(load_images(tmp_path, PREPROCESSING, train=False)) == 2
    (tmp_path / "val").rename(tmp_path / "test")
    held_out = load_images(tmp_path, PREPROCESSING, train=False)
    assert len(held_out) == 2
    assert held_out.labels == ("cat",)


def test_load_images_of_a_folder_without_splits_reads_its_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "a.png", 1)
    write_image(tmp_path / "dog" / "a.png", 1)
    for train in (True, False):
        assert load_images(tmp_path, PREPROCESSING, train=train).labels == ("cat", "dog")


@pytest.mark.parametrize(("present", "train"), [("train", False), ("val", True)])
def test_load_images_when_only_the_other_split_exists_does_not_take_the_split_for_a_class(
    tmp_path: Path, present: str, train: bool
) -> None:
    write_image(tmp_path / present / "cat" / "a.png", 1)
    with pytest.raises(DataError, match=f"has a split '{present}' but no"):
        load_images(tmp_path, PREPROCESSING, train=train)


def test_image_folder_of_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent is not a directory"):
        load_images(tmp_path / "absent", PREPROCESSING, train=True)


def test_image_folder_without_classes_says_what_is_expected(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", 1)
    with pytest.raises(DataError, match="expected one per class"):
        ImageFolder(tmp_path, PREPROCESSING)


def test_image_folder_without_images_lists_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"holds no images; known suffixes are .*\.png"):
        ImageFolder(tmp_path, PREPROCESSING)


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "directory"])
def test_image_folder_with_an_undecodable_file_names_it(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "cat" / "bad.png"
    write_image(file, 1)
    if kind == "directory":
        file.unlink()
        file.mkdir()
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(file)
        whole = file.read_bytes()
        file.write_bytes({"text": b"hello", "empty": b"", "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(DataError, match=r"bad\.png cannot be decoded"):
        ImageFolder(tmp_path, PREPROCESSING).read(np.array([0]))


def augmented(
    images: Tensor, seed: int = 0, *, flip: float = 0.5, shift: float = 0.0, scale: float = 0.0, erase: float = 0.0
) -> Tensor:
    return augment(images, torch.Generator().manual_seed(seed), flip=flip, shift=shift, scale=scale, erase=erase)


def test_augment_with_the_same_seed_is_equal_and_with_another_is_not() -> None:
    images = torch.rand(6, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    strengths = {"shift": 0.1, "scale": 0.1, "erase": 0.5}
    first = augmented(images, 1, **strengths)
    assert first.shape == images.shape
    assert torch.equal(first, augmented(images, 1, **strengths))
    assert not torch.equal(first, augmented(images, 2, **strengths))


def test_augment_with_zero_strengths_only_flips_left_and_right() -> None:
    images = torch.rand(32, 8, 12, 1, generator=torch.Generator().manual_seed(0))
    found = augmented(images)
    # 1e-5: the identity grid hits pixel centres up to float32 rounding.
    same = (found - images).abs().amax((1, 2, 3)) < 1e-5
    mirrored = (found - images.flip(2)).abs().amax((1, 2, 3)) < 1e-5
    assert (same ^ mirrored).all()
    assert 8 <= same.sum() <= 24  # a fair coin, 32 times: within 2.8 standard deviations of 16


@pytest.mark.parametrize(("flip", "expected"), [(0.0, lambda images: images), (1.0, lambda images: images.flip(2))])
def test_augment_with_a_certain_flip_mirrors_all_or_none(flip: float, expected: Callable[[Tensor], Tensor]) -> None:
    images = torch.rand(8, 8, 12, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augmented(images, flip=flip), expected(images), rtol=0, atol=1e-5)


def test_augment_of_a_ramp_moves_it_by_at_most_the_shift() -> None:
    # Value = column of 16. A shift of 0.125 is at most 2 pixels; the inner columns do not see the border.
    images = torch.arange(16.0).expand(64, 16, 16)[..., None]
    found = augmented(images, shift=0.125)[:, 8, 2:14, 0]
    flipped = found[:, 0] > found[:, -1]
    moved = torch.where(flipped[:, None], found.flip(1), found) - torch.arange(2.0, 14.0)
    assert moved.abs().max() <= 2 + 1e-4
    assert moved.abs().max() > 1.5
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-4)  # moved as a whole


def test_augment_of_a_ramp_zooms_it_by_at_most_the_scale() -> None:
    # Slope 1 per column becomes the zoom, between 0.75 and 1.25.
    images = torch.arange(16.0).expand(64, 16, 16)[..., None]
    found = augmented(images, scale=0.25)[:, 8, :, 0]
    slope = (found[:, 8] - found[:, 7]).abs()
    assert slope.min() >= 0.75 - 1e-4
    assert slope.max() <= 1.25 + 1e-4
    assert slope.max() - slope.min() > 0.4


def test_augment_when_erasing_sets_a_rectangle_to_the_mean_of_normalised_images() -> None:
    found = augmented(torch.full((64, 28, 28, 2), 5.0), erase=1.0)
    hole = (found == 0).all(-1)
    assert torch.equal(hole[..., None].expand_as(found), found == 0)  # both channels together
    torch.testing.assert_close(found[~hole], torch.full_like(found[~hole], 5.0))
    share = hole.float().mean((1, 2))
    assert (share > 0).all()
    assert (share <= 0.25).all()  # at most 20 % of the area, plus the rounding of its sides to whole pixels
    # A rectangle: as many pixels as its rows times its columns.
    assert torch.equal(hole.sum((1, 2)), hole.any(2).sum(1) * hole.any(1).sum(1))


def test_augment_with_an_erase_probability_erases_that_share_of_the_images() -> None:
    found = augmented(torch.full((400, 8, 8, 1), 5.0), erase=0.25)
    erased = (found == 0).any(3).any(2).any(1).float().mean().item()
    assert 0.18 < erased < 0.32  # 0.25 within 3 standard deviations


def test_augment_never_leaves_the_range_of_its_input() -> None:
    images = torch.rand(32, 8, 8, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = augmented(images, shift=0.3, scale=0.3, erase=0.5)
    assert found.abs().max() <= 1 + 1e-6
