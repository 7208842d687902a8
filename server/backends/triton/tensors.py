"""A batch as the tensors of a request, and the tensors of an answer as outputs, over either protocol. No I/O."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter.bundle import Manifest
from server.backends.base import Batch, Outputs
from server.backends.triton.failure import CallFailed
from server.backends.triton.shared_memory import Region
from vmoe.preprocess import normalize


def request_inputs(kind: Callable[..., Any], manifest: Manifest, batch: Batch, region: Region | None) -> list[Any]:
    """Arguments:
    kind: the `InferInput` of the protocol.
    region: gets the images, which the message then only points to.
    """
    inputs = []
    for name, array, datatype in _input_tensors(manifest, batch):
        inputs.append(kind(name, array.shape, datatype))
        if name == "images" and region is not None and region.holds(array):
            region.write(array)
            inputs[-1].set_shared_memory(region.name, array.nbytes)
        else:
            inputs[-1].set_data_from_numpy(array)
    return inputs


def images_bytes(manifest: Manifest, images: int) -> int:
    """What so many take as a tensor."""
    pixels = math.prod(manifest.preprocessing.image_size) * manifest.preprocessing.channels
    return images * pixels * (1 if manifest.input == "uint8" else 4)


def _input_tensors(manifest: Manifest, batch: Batch) -> Iterator[tuple[str, npt.NDArray[Any], str]]:
    """Name, values and Triton's name of the type."""
    if manifest.input == "uint8":
        yield "images", batch.images, "UINT8"
    else:
        yield "images", normalize(batch.images, manifest.preprocessing), "FP32"
    if manifest.architecture.moe is not None:
        yield "slots", batch.slots, "INT64"
        yield "num_selected_experts", batch.num_selected_experts, "INT64"


def output_names(manifest: Manifest, *, explain: bool) -> list[str]:
    """Only what is named is computed and sent."""
    if manifest.architecture.moe is None:
        return ["logits"]
    return ["logits", "kept", "expert_load"] + ["token_experts"] * explain


def read_outputs(manifest: Manifest, batch: Batch, result: Any) -> Outputs:
    """Arguments:
        result: of `tritonclient`, with `as_numpy`.

    Raises:
        CallFailed: an output is missing, or has not a row per image.
    """
    rows = len(batch.images)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for name in output_names(manifest, explain=batch.explain):
        array = result.as_numpy(name)
        if array is None or array.shape[:1] != (rows,):
            found = None if array is None else array.shape
            raise CallFailed("model", f"output {name} for {rows} images came back as {found}")
        arrays[name] = array
    if manifest.architecture.moe is None:
        arrays |= {"kept": np.zeros((rows, 0), np.float32), "expert_load": np.zeros((rows, 0, 0), np.int64)}
    return Outputs(arrays["logits"], arrays["kept"], arrays["expert_load"], arrays.get("token_experts"))
