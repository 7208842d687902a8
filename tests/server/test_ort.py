"""ONNX Runtime on small graphs made here; the shipped graph is served in `test_classify`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from prometheus_client import CollectorRegistry
from pydantic_settings import CliApp

from exporter.bundle import Bundle, BundleError, Manifest
from server.backends.base import Batch
from server.backends.choice import create_backend
from server.backends.ort import OrtBackend
from server.backends.several import SeveralBackends
from server.settings import Settings

IMAGES = ("images", TensorProto.UINT8, ["B", 8, 8, 1])
LOGITS = ("logits", TensorProto.FLOAT, ["B", 4])


def write_graph(directory: Path, *, images: tuple = IMAGES, logits: tuple = LOGITS) -> None:
    """logits[c] = the pixel (0, c), for a model of 8 x 8 pixels and 4 classes."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"], axis=1),
        helper.make_node("Slice", ["flat", "zero", "four", "one"], [logits[0]]),
    ]
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in (("zero", 0), ("four", 4), ("one", 1))
    ]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info(*images)], [helper.make_tensor_value_info(*logits)], constants
    )
    (directory / "1").mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, directory / "1" / "model.onnx")


def dense_batch(images: np.ndarray) -> Batch:
    rows = len(images)
    return Batch(images, np.zeros((rows, 0), np.int64), np.zeros((rows, 1), np.int64), explain=True)


def test_backend_when_model_is_dense_then_logits_come_back_and_routing_is_empty(
    tmp_path: Path, dense_manifest: Manifest
) -> None:
    write_graph(tmp_path)
    backend = OrtBackend(Bundle(tmp_path, dense_manifest), threads=1)
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    outputs = asyncio.run(backend.infer(dense_batch(images)))
    asyncio.run(backend.close())
    assert outputs.logits.tolist() == [[0, 1, 2, 3], [64, 65, 66, 67]]
    assert (outputs.kept.shape, outputs.expert_load.shape, outputs.token_experts) == ((2, 0), (2, 0, 0), None)


def test_backend_when_graph_takes_floats_then_pixels_arrive_normalised(
    tmp_path: Path, dense_manifest: Manifest
) -> None:
    write_graph(tmp_path, images=("images", TensorProto.FLOAT, ["B", 8, 8, 1]))
    manifest = dense_manifest.model_copy(update={"input": "float32"})
    backend = OrtBackend(Bundle(tmp_path, manifest), threads=1)
    outputs = asyncio.run(backend.infer(dense_batch(np.full((1, 8, 8, 1), 255, np.uint8))))
    asyncio.run(backend.close())
    # mean and std 0.5: white is (1 - 0.5) / 0.5 = 1
    np.testing.assert_allclose(outputs.logits, 1, atol=1e-6)


def test_backend_when_graph_lacks_the_tensors_of_a_sparse_model_then_it_is_refused(
    tmp_path: Path, manifest: Manifest
) -> None:
    write_graph(tmp_path)
    with pytest.raises(
        BundleError, match=r"inputs \['images'\], expected \['images', 'num_selected_experts', 'slots'\]"
    ):
        OrtBackend(Bundle(tmp_path, manifest), threads=1)


def test_backend_when_a_tensor_has_another_shape_then_it_is_refused(tmp_path: Path, dense_manifest: Manifest) -> None:
    write_graph(tmp_path, images=("images", TensorProto.UINT8, ["B", 16, 16, 1]))
    with pytest.raises(BundleError, match="images is"):
        OrtBackend(Bundle(tmp_path, dense_manifest), threads=1)


def test_backend_when_a_tensor_has_another_type_then_it_is_refused(tmp_path: Path, dense_manifest: Manifest) -> None:
    write_graph(tmp_path, images=("images", TensorProto.FLOAT, ["B", 8, 8, 1]))
    with pytest.raises(BundleError, match=r"tensor\(float\).*expected tensor\(uint8\)"):
        OrtBackend(Bundle(tmp_path, dense_manifest), threads=1)


def test_backend_when_file_is_no_graph_then_it_is_refused(tmp_path: Path, dense_manifest: Manifest) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="cannot load"):
        OrtBackend(Bundle(tmp_path, dense_manifest), threads=1)


@pytest.mark.parametrize(("arguments", "spins"), [([], True), (["--no-spinning"], False)])
def test_threads_spin_unless_the_setting_says_otherwise(
    tmp_path: Path, dense_manifest: Manifest, arguments: list[str], spins: bool
) -> None:
    write_graph(tmp_path)
    settings = CliApp.run(Settings, cli_args=arguments)
    backend = create_backend(settings, Bundle(tmp_path, dense_manifest), CollectorRegistry())
    assert isinstance(backend, OrtBackend)
    options = backend._session.get_session_options()
    try:
        entry = options.get_session_config_entry("session.intra_op.allow_spinning")
    except RuntimeError:  # not set: ONNX Runtime's default
        entry = "1"
    assert entry == str(int(spins))


def test_sessions_that_run_in_turn_stop_spinning_between_their_runs(tmp_path: Path, dense_manifest: Manifest) -> None:
    write_graph(tmp_path)
    served = Bundle(tmp_path, dense_manifest)
    other = Bundle(tmp_path, dense_manifest.model_copy(update={"name": "other"}))
    several = create_backend(Settings(), served, CollectorRegistry(), [other])
    assert isinstance(several, SeveralBackends)
    for backend in several._backends.values():
        assert isinstance(backend, OrtBackend)
        options = backend._session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    alone = create_backend(Settings(), served, CollectorRegistry())
    assert isinstance(alone, OrtBackend)
    with pytest.raises(RuntimeError, match="force_spinning_stop"):  # not set
        alone._session.get_session_options().get_session_config_entry("session.force_spinning_stop")
