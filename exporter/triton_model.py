"""Triton's Python backend runs this file: the graph beside it through ONNX Runtime, for servers without that backend.

The exporter copies it to `1/model.py`, and `packed_weights.py` beside it. Together they stand alone: the server's
Python needs numpy and onnxruntime, nothing of this project. Tensors, batching and labels are those of the ONNX Runtime
backend, and so are the answers.

Axes: B images over all requests of a call.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils
from packed_weights import packed_model  # the backend looks in the version directory, too

# File of the model's version directory by the parameter of config.pbtxt that has its SHA-256.
FILES = {"model_sha256": "model.onnx", "weights_sha256": "model.onnx.data"}

# What DLPack calls a capsule whose tensor has been taken over. A constant: Python keeps the pointer, not the text.
_USED = ctypes.c_char_p(b"used_dltensor")
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes, _set_capsule_name.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_int


class TritonPythonModel:
    """An instance of the model; Triton calls its methods from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the graph on the device of this instance; refuses files that config.pbtxt was not written for.

        With the parameter `packed_weights`, a directory, instances on the CPU map the weights from there.
        """
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        directory = Path(args["model_repository"]) / args["model_version"]
        hashes = {name: parameters[key] for key, name in FILES.items() if key in parameters}
        for name, expected in hashes.items():
            _check_digest(directory / name, expected)
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", 0))
        providers: list[Any] = ["CPUExecutionProvider"]
        path = directory / "model.onnx"
        if args["model_instance_kind"] == "GPU":
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]}))
        if packed := parameters.get("packed_weights"):
            if len(providers) > 1:
                raise pb_utils.TritonModelException("packed_weights is for instances of KIND_CPU, this one is on a GPU")
            path = packed_model(path, args["model_name"], list(hashes.values()), Path(packed))
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers all requests by one run, as the ONNX Runtime backend does; they fail or succeed together.

        The configuration has Triton merge no requests, but a warm-up sample of B images comes as B requests. No image's
        answer depends on another's, nor on who asked for which outputs.
        """
        try:
            return self._answers(requests)
        except Exception as error:  # the boundary to ONNX Runtime, whose errors have no common class; see its message
            failure = pb_utils.TritonError(f"{type(error).__name__}: {error}")
            return [pb_utils.InferenceResponse(error=failure) for _ in requests]

    def _answers(self, requests: list[Any]) -> list[Any]:
        # Tensors come and go by DLPack. `as_numpy` and the constructor of Tensor know numpy's structs; a stub that was
        # built for numpy 1 (2.51 is) then gives an array of numpy 2 its first element everywhere, and takes it for
        # empty, both without an error.
        feeds = {}
        for name in self._inputs:
            parts = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for request in requests]
            feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
            sizes = [len(part) for part in parts]
        wanted = [set(request.requested_output_names()) for request in requests]
        names = [name for name in self._outputs if any(name in some for some in wanted)]
        results = dict(zip(names, self._session.run(names, feeds), strict=True))
        responses, start = [], 0
        for size, some in zip(sizes, wanted, strict=True):
            rows = slice(start, start + size)
            tensors = [_output(name, results[name][rows]) for name in names if name in some]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
            start += size
        return responses


def _output(name: str, array: np.ndarray) -> Any:
    """Hands an array over. Triton 2.51 gives the capsule a name of its own, at which numpy, when it frees the capsule,
    prints a traceback for every tensor; the name of the standard tells it that the tensor is not its to free.
    """
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    _set_capsule_name(capsule, _USED)
    return tensor


def _check_digest(path: Path, expected: str) -> None:
    digest = hashlib.sha256()  # not hashlib.file_digest: images up to 24.10 have Python 3.10
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if (found := digest.hexdigest()) != expected:
        raise pb_utils.TritonModelException(f"{path} has SHA-256 {found}, but config.pbtxt was written for {expected}")
