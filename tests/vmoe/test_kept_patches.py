"""Which patches survive: by hand where every token asks the same experts, and the picture of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vmoe.tiny import CONFIG, DENSE, MOE, PREPROCESSING, data_of, model_of
from vmoe.checkpoint import Checkpoint
from vmoe.config import ModelConfig
from vmoe.kept_patches import DROPPED_BRIGHTNESS, darkened, kept_patches, save_patches_figure
from vmoe.operating_point import OperatingPoint

DATA = data_of(6)
IMAGES = DATA.images[:2]


def checkpoint_of(config: ModelConfig = CONFIG) -> Checkpoint:
    """All gates equal: ties go to the lower expert and to the earlier token."""
    state = model_of(config).state_dict()
    equal = {
        name: torch.zeros_like(value) if name.endswith("router.weight") else value for name, value in state.items()
    }
    return Checkpoint(config, equal, PREPROCESSING, DATA.labels)


def test_kept_patches_are_the_first_in_the_queue_of_the_one_expert_that_all_ask() -> None:
    # 4 tokens, 4 experts, K = 1: C slots.
    points = [OperatingPoint(c, 1) for c in (1.0, 2.0, 4.0)]
    kept = kept_patches(checkpoint_of(), IMAGES, points)
    assert kept.shape == (3, 2, 2, 2, 2)  # points, layers, images, rows, columns
    for index, count in enumerate((1, 2, 4)):
        expected = np.arange(4).reshape(2, 2) < count
        assert (kept[index] == expected).all()


def test_kept_patches_of_a_model_with_a_class_token_leave_that_out() -> None:
    # 5 tokens, the class token first: with 2 slots it and the first patch are served.
    config = replace(CONFIG, classifier="token", position_embedding="learned")
    kept = kept_patches(checkpoint_of(config), IMAGES, [OperatingPoint(1.5, 1)])
    assert config.slots(OperatingPoint(1.5, 1)) == (2, 2)
    assert (kept == np.array([[True, False], [False, False]])).all()


def test_kept_patches_of_an_image_do_not_depend_on_others() -> None:
    loaded = Checkpoint(CONFIG, model_of().state_dict(), PREPROCESSING, DATA.labels)
    grouped = replace(loaded, config=replace(CONFIG, moe=replace(MOE, group_images=2)))
    points = [OperatingPoint(0.25, 2)]
    together = kept_patches(grouped, DATA.images, points)
    alone = [kept_patches(grouped, DATA.images[i : i + 1], points) for i in range(6)]
    assert (together == np.concatenate(alone, axis=2)).all()


def test_kept_patches_of_a_dense_model_are_refused() -> None:
    with pytest.raises(ValueError, match="a dense model, which drops no patch"):
        kept_patches(Checkpoint(DENSE, model_of(DENSE).state_dict(), PREPROCESSING, DATA.labels), IMAGES, [])


def test_darkened_leaves_kept_patches_and_dims_the_others() -> None:
    image = np.full((4, 6, 1), 200, dtype=np.uint8)
    kept = np.array([[True, False, True], [False, True, True]])
    found = darkened(image, kept)
    assert found.shape == (4, 6, 3)
    assert (found[:2, :2] == 200).all()
    assert (found[2:, 2:] == 200).all()
    dimmed = 200 * DROPPED_BRIGHTNESS
    assert (found[:2, 2:4] == [dimmed + 20, dimmed + 30, dimmed + 90]).all()
    assert (found[2:, :2] == [dimmed + 20, dimmed + 30, dimmed + 90]).all()


def test_patches_figure_is_an_image(tmp_path: Path) -> None:
    points = [OperatingPoint(0.25, 2), OperatingPoint(1.0, 2)]
    kept = kept_patches(checkpoint_of(), IMAGES, points)
    save_patches_figure(tmp_path / "patches.png", IMAGES, kept[:, -1], points)
    with Image.open(tmp_path / "patches.png") as picture:
        assert min(picture.size) > 100
