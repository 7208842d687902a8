"""ONNX Runtime over an exported graph, for parity check, profiler and gateway alike. Torch-free.

Axes: B images, L MoE layers, E experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from exporter.bundle import Point, Target


def has_cuda() -> bool:
    """Whether this ONNX Runtime has a provider for CUDA devices."""
    return "CUDAExecutionProvider" in ort.get_available_providers()


def session_options(threads: int = 0, *, spinning: bool = True, alone: bool = True) -> ort.SessionOptions:
    """Those of the gateway's sessions by default, so that profiled times are those of serving.

    Arguments:
        threads: of one inference; 0 lets ONNX Runtime take every core.
        spinning: threads that wait for each other between two operators keep their cores. Without it two threads on two
            quiet cores can be slower than one; where others need the cores, it is the other way round.
        alone: no other session runs in turn with this one. The threads of one that does would spin on for a while and
            take the other's cores: two in turn took about twice the time of each alone (float32 and int8 bundle, 8
            images, 2 threads on 2 cores of an AMD EPYC, onnxruntime 1.32.0, 2026-11-27).
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not alone:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_session(model: Path, threads: int = 0, target: Target = "cpu", *, alone: bool = True) -> ort.InferenceSession:
    """Loads a graph, on the CPU unless it was written for a CUDA device and there is a provider for these.

    Arguments:
        threads: of the CPU; 0 lets ONNX Runtime take every core.
        alone: see `session_options`.
    """
    options = session_options(threads, alone=alone)
    providers = ["CUDAExecutionProvider"] if target == "cuda" and has_cuda() else []
    return ort.InferenceSession(str(model), options, providers=[*providers, "CPUExecutionProvider"])


def run(
    session: ort.InferenceSession,
    images: npt.NDArray[np.generic],
    point: Point | None,
    outputs: list[str],
) -> list[npt.NDArray[np.generic]]:
    """Runs a batch, every image at the same operating point; None for a dense model.

    Arguments:
        images: (B, H, W, channels) in the graph's input type.
        outputs: names of those to return.
    """
    feeds: dict[str, npt.NDArray[np.generic]] = {"images": images}
    if point is not None:
        feeds["slots"] = np.tile(np.array(point.slots, np.int64), (len(images), 1))
        feeds["num_selected_experts"] = np.full((len(images), 1), point.num_selected_experts, np.int64)
    return session.run(outputs, feeds)  # type: ignore[no-any-return]
