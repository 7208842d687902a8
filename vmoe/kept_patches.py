"""Which patches of an image are still processed when C goes down: the picture of section 4 of the paper.

Axes: B images, P operating points, L MoE layers, S tokens of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from vmoe.checkpoint import Checkpoint
from vmoe.figure import new_figure
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import normalize

DROPPED_BRIGHTNESS = 0.25  # of a patch that no expert processed; chosen, not tuned


def kept_patches(
    loaded: Checkpoint, images: npt.NDArray[np.uint8], points: Sequence[OperatingPoint]
) -> npt.NDArray[np.bool_]:
    """Whether at least one expert processed a patch: (P, L, B, rows, columns). Every image is a routing group.

    Arguments:
        images: (B, H, W, C) as `preprocess.fit` makes them.

    Raises:
        ValueError: the model is dense, or has no such operating point.
    """
    if loaded.config.moe is None:
        raise ValueError("the checkpoint is a dense model, which drops no patch: a sparse one is needed")
    model = loaded.with_group_images(1).model()
    inputs = torch.from_numpy(normalize(images, loaded.preprocessing))
    return np.stack([_processed(model, inputs, point) for point in points])


def save_patches_figure(
    path: Path, images: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_], points: Sequence[OperatingPoint]
) -> None:
    """A row per image: the image, then the image with the dropped patches darkened, per operating point.

    Arguments:
        images: (B, H, W, C) uint8.
        kept: (P, B, rows, columns) of one MoE layer.

    Raises:
        ValueError: the suffix of the path is no format, or matplotlib is not installed.
    """
    figure = new_figure((1.1 * (1 + len(points)), 1.15 * len(images) + 0.25))
    panels = figure.subplots(len(images), 1 + len(points), squeeze=False)
    for index, (row, image) in enumerate(zip(panels, images, strict=True)):
        _show(row[0], image)
        for axes, point, mask in zip(row[1:], points, kept[:, index], strict=True):
            _show(axes, darkened(image, mask))
            axes.set_xlabel(f"{100 * mask.mean():.0f} % kept", fontsize=7, labelpad=1)
            if index == 0:
                axes.set_title(f"C {point.capacity_factor:g}, K {point.num_selected_experts}", fontsize=8)
    figure.savefig(path, dpi=90)


def darkened(image: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """(H, W, C) with the patches that were not kept, (rows, columns), at `DROPPED_BRIGHTNESS`; RGB, tinted blue.

    The tint tells a dropped patch from one that is black anyway.
    """
    height, width = image.shape[0] // kept.shape[0], image.shape[1] // kept.shape[1]
    mask = kept.repeat(height, axis=0).repeat(width, axis=1)[..., None]
    colour = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float64)
    dropped = DROPPED_BRIGHTNESS * colour + np.array([20.0, 30.0, 90.0])
    result: npt.NDArray[np.uint8] = np.where(mask, colour, dropped).astype(np.uint8)
    return result


@torch.inference_mode()
def _processed(model: VisionTransformer, inputs: torch.Tensor, point: OperatingPoint) -> npt.NDArray[np.bool_]:
    """(L, B, rows, columns)."""
    output = model(inputs, *model.operating_point_tensors(point, len(inputs)), with_statistics=True)
    assert output.statistics is not None
    tokens = output.statistics.processed.transpose(0, 1)  # (L, B, S)
    patches = tokens[..., 1:] if model.config.classifier == "token" else tokens
    result: npt.NDArray[np.bool_] = (patches.reshape(*patches.shape[:2], *model.config.grid) > 0).numpy()
    return result


def _show(axes, image: npt.NDArray[np.uint8]) -> None:  # type: ignore[no-untyped-def]  # matplotlib's, imported lazily
    axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
