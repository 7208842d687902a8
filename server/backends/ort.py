"""ONNX Runtime in this process: one session, one worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from exporter.bundle import Bundle, BundleError
from exporter.packed_weights import PackedWeightsError, packed_model
from exporter.session import session_options
from exporter.tensors import TensorType, graph_inputs, graph_outputs
from server.backends.base import BackendError, Batch, Outputs
from vmoe.preprocess import normalize

# In order of preference; the CUDA one exists only where onnxruntime-gpu is installed.
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
_LOAD_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
_TYPES: dict[TensorType, str] = {"uint8": "tensor(uint8)", "float32": "tensor(float)", "int64": "tensor(int64)"}


class OrtBackend:
    """Runs a bundle's graph, one batch at a time: a second one would only fight the first for the cores.

    Arguments:
        bundle: its files were verified against the manifest.
        threads: of one inference; 0 lets ONNX Runtime choose.
        packed_weights: directory of `exporter.packed_weights`; None packs in memory.
        spinning, alone: see `exporter.session.session_options`.

    Raises:
        BundleError: ONNX Runtime cannot load the graph, or its tensors are not those of the manifest.
        BackendError: `packed_weights` cannot be written, or not on this hardware.
    """

    num_workers = 1
    floors_only = False
    cancellable = False

    def __init__(
        self,
        bundle: Bundle,
        threads: int,
        packed_weights: Path | None = None,
        *,
        spinning: bool = True,
        alone: bool = True,
    ) -> None:
        self._manifest = bundle.manifest
        path = bundle.model_path
        if packed_weights is not None:
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                raise BackendError("packed_weights is for processors; leave it out where onnxruntime-gpu is installed")
            path = _packed(bundle, packed_weights)
        self._session = _open(path, session_options(threads, spinning=spinning, alone=alone))
        _check_tensors(self._session, bundle)
        self._worker = ThreadPoolExecutor(self.num_workers, thread_name_prefix="onnxruntime")

    async def start(self, changed: Callable[[], None]) -> None:
        pass  # the session is loaded

    async def infer(self, batch: Batch) -> Outputs:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._run, batch)

    async def close(self) -> None:
        self._worker.shutdown()

    def _run(self, batch: Batch) -> Outputs:
        images = batch.images
        feeds: dict[str, npt.NDArray[np.generic]] = {
            "images": images if self._manifest.input == "uint8" else normalize(images, self._manifest.preprocessing)
        }
        if self._manifest.architecture.moe is None:
            (logits,) = self._session.run(["logits"], feeds)
            rows = len(images)
            return Outputs(logits, np.zeros((rows, 0), np.float32), np.zeros((rows, 0, 0), np.int64), None)
        feeds |= {"slots": batch.slots, "num_selected_experts": batch.num_selected_experts}
        names = ["logits", "kept", "expert_load"] + ["token_experts"] * batch.explain
        logits, kept, expert_load, *rest = self._session.run(names, feeds)
        return Outputs(logits, kept, expert_load, rest[0] if rest else None)


def _open(path: Path, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    available = onnxruntime.get_available_providers()
    providers = [provider for provider in _PROVIDERS if provider in available]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except _LOAD_ERRORS as error:
        raise BundleError(f"ONNX Runtime cannot load {path}: {error}") from error


def _packed(bundle: Bundle, directory: Path) -> Path:
    hashes = [digest for _, digest in sorted(bundle.manifest.files.items())]
    try:
        return packed_model(bundle.model_path, bundle.manifest.name, hashes, directory)
    except PackedWeightsError as error:
        raise BackendError(str(error)) from error
    except _LOAD_ERRORS as error:
        raise BundleError(f"ONNX Runtime cannot load {bundle.model_path}: {error}") from error


def _check_tensors(session: onnxruntime.InferenceSession, bundle: Bundle) -> None:
    """Refuses a graph whose inputs or outputs differ from the manifest's in name, type or any fixed dimension."""
    for kind, expected, found in (
        ("inputs", graph_inputs(bundle.manifest), {node.name: node for node in session.get_inputs()}),
        ("outputs", graph_outputs(bundle.manifest), {node.name: node for node in session.get_outputs()}),
    ):
        names = sorted(tensor.name for tensor in expected)
        if names != sorted(found):
            raise BundleError(f"{bundle.model_path} has the {kind} {sorted(found)}, expected {names}")
        for tensor in expected:
            node, dtype = found[tensor.name], _TYPES[tensor.dtype]
            # Names stand for dimensions that ONNX Runtime could not infer; only numbers can contradict.
            agree = len(node.shape) == 1 + len(tensor.dims) and all(
                seen == size for seen, size in zip(node.shape[1:], tensor.dims, strict=True) if isinstance(seen, int)
            )
            if node.type != dtype or not agree:
                raise BundleError(
                    f"{bundle.model_path}: {tensor.name} is {node.type} {node.shape}, expected {dtype} "
                    f"{['B', *tensor.dims]}"
                )
