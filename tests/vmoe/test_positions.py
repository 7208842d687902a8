"""Resized positions, worked out by hand. Sizes of the released models were compared with scipy.ndimage.zoom once."""

from __future__ import annotations

import numpy as np

from vmoe.positions import resize_positions


def test_positions_are_interpolated_between_aligned_corners_and_the_class_token_is_kept() -> None:
    # Row 0: 0 2, row 1: 4 6, from 2 x 2 to 3 x 3: corners stay, the others are means of their neighbours.
    table = np.array([9, 0, 2, 4, 6], np.float32).reshape(1, 5, 1)
    expected = [9, 0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert resize_positions(table, (2, 2), (3, 3)).ravel().tolist() == expected


def test_positions_without_class_token_may_change_their_aspect() -> None:
    # Columns at 0, 1/2, 1 and rows dropped to the first: a single output row lies at 0.
    table = np.array([0, 2, 4, 6], np.float32).reshape(1, 4, 1)
    assert resize_positions(table, (2, 2), (1, 3)).ravel().tolist() == [0, 1, 2]


def test_last_row_survives_where_rounding_leads_past_it() -> None:
    # 25 * (7 / 25) is 7.000000000000001: SciPy fills such a row with zeros, we take the last one.
    table = np.arange(8, dtype=np.float32).reshape(1, 8, 1)
    assert resize_positions(table, (8, 1), (26, 1))[0, -1, 0] == 7


def test_same_grid_changes_nothing() -> None:
    table = np.random.default_rng(0).normal(size=(1, 17, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(table, (4, 4), (4, 4)), table)
