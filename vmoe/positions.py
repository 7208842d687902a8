"""Learned positions for another image size, as the reference makes them when it fine-tunes. Torch-free.

The reference's rule `vit_zoom` (vmoe/initialization/rules.py) is `scipy.ndimage.zoom(grid, order=1)`: linear
interpolation with the corners of both grids aligned; output row i of n lies at i * (m - 1) / (n - 1) of m input rows.
The class token's position is kept. Axes: D hidden.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def resize_positions(
    table: npt.NDArray[np.float32], old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """A table of positions for another grid of patches.

    Arguments:
        table: (1, tokens, D); a token that precedes the patches of `old_grid` is the class token.
        old_grid, new_grid: (rows, columns).
    """
    num_extra = table.shape[1] - old_grid[0] * old_grid[1]
    extra, patches = table[:, :num_extra], table[0, num_extra:].reshape(*old_grid, -1)
    rows, columns = (_weights(old, new) for old, new in zip(old_grid, new_grid, strict=True))
    # Double precision, as in SciPy: the result is the float32 number next to the exact one.
    resized = np.einsum("yi,xj,ijd->yxd", rows, columns, patches.astype(np.float64), optimize=True)
    return np.concatenate([extra, resized.reshape(1, -1, table.shape[2]).astype(np.float32)], axis=1)


def _weights(old: int, new: int) -> npt.NDArray[np.float64]:
    """Interpolation along one axis as a matrix (new, old)."""
    position = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 1.0)
    lower = np.minimum(position.astype(int), max(old - 2, 0))
    fraction = np.minimum(position - lower, 1)  # rounding may lead past the last row
    weights = np.zeros((new, old))
    weights[np.arange(new), lower] = 1 - fraction
    if old > 1:
        weights[np.arange(new), lower + 1] += fraction
    return weights
