"""Does a server serve the model of the manifest? No I/O."""

from __future__ import annotations

from dataclasses import dataclass

from exporter.bundle import MODEL_FILE, WEIGHTS_FILE, Manifest
from exporter.tensors import Tensor, graph_inputs, graph_outputs
from server.backends.base import BackendError

# Parameters of config.pbtxt, by the file whose SHA-256 they hold.
_HASHES = {MODEL_FILE: "model_sha256", WEIGHTS_FILE: "weights_sha256"}
_TYPES = {"uint8": "UINT8", "float32": "FP32", "int64": "INT64"}


@dataclass(frozen=True)
class ServedTensor:
    """As the server's metadata have it.

    Attributes:
        shape: with the batch axis; -1 where any size will do.
    """

    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ServedModel:
    """What a server says about its model.

    Attributes:
        inputs, outputs: by name.
        max_batch_size: of one request.
        instances: batches that run at once.
        parameters: of config.pbtxt.
        server: name and version, for the log.
    """

    inputs: dict[str, ServedTensor]
    outputs: dict[str, ServedTensor]
    max_batch_size: int
    instances: int
    parameters: dict[str, str]
    server: str


def check_contract(manifest: Manifest, served: ServedModel) -> None:
    """Raises `BackendError`, with everything that differs, where the gateway must send the server nothing."""
    differences = [
        *_compare("input", graph_inputs(manifest), served.inputs),
        *_compare("output", graph_outputs(manifest), served.outputs),
    ]
    if served.max_batch_size < manifest.max_batch_size:
        differences.append(f"max_batch_size is {served.max_batch_size}, expected {manifest.max_batch_size} or more")
    for file, key in _HASHES.items():
        expected, found = manifest.files.get(file), served.parameters.get(key)
        if expected is not None and found is not None and found != expected:
            differences.append(f"{key} is {found}, expected {expected}: it serves another export")
    if differences:
        raise BackendError(f"the server's model {manifest.name} is not the bundle's: {'; '.join(differences)}")


def _compare(kind: str, expected: tuple[Tensor, ...], found: dict[str, ServedTensor]) -> list[str]:
    names = {tensor.name for tensor in expected}
    if names != found.keys():
        return [f"{kind}s are {sorted(found)}, expected {sorted(names)}"]
    differences = []
    for tensor in expected:
        seen, shape = found[tensor.name], (-1, *tensor.dims)
        agree = len(seen.shape) == len(shape) and all(
            size in (-1, dim) for size, dim in zip(seen.shape[1:], tensor.dims, strict=True)
        )
        if seen.datatype != _TYPES[tensor.dtype] or not agree:
            right = f"{_TYPES[tensor.dtype]} {list(shape)}"
            differences.append(f"{kind} {tensor.name} is {seen.datatype} {list(seen.shape)}, expected {right}")
    return differences
