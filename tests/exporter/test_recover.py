"""Bundles turned back into checkpoints: the inverse of the export, bit for bit where nothing was rounded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from typer.testing import CliRunner, Result

import exporter.export
from exporter.bundle import MODEL_FILE, Bundle, BundleError, sha256, write_manifest
from exporter.cli import app
from exporter.recover import recover
from exporter.session import open_session, run
from tests.exporter.models import SMALL, graph_of, pixels, random_checkpoint, with_moe
from vmoe.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from vmoe.preprocess import normalize

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"
EXPERTS = "blocks.1.mlp.experts.weight_in"
# Heads of SMALL are 8 wide: 1 / sqrt(8) is no power of two, so queries are rounded on the way.
CONFIGS = {
    "class token": SMALL,
    "dense": replace(SMALL, moe=None),
    "dense last block": with_moe(layers=(0, 1)),
    "dense last block, qk-norm": replace(with_moe(layers=(0, 1)), qk_norm=True),
    "average pooling, fixed positions": replace(SMALL, classifier="gap", position_embedding="sincos2d"),
    "attention pooling": replace(SMALL, classifier="map"),
    "attention pooling, qk-norm": replace(SMALL, classifier="map", qk_norm=True),
    "no positions, pre_logits": replace(SMALL, position_embedding="none", representation_size=6),
    "groups, vanilla, normalised weights": with_moe(group_images=2, routing="vanilla", normalize_weights=True),
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "1000"})


def exported(tmp_path: Path, checkpoint: Checkpoint, *arguments: str) -> Bundle:
    """The bundle that the command line makes of a checkpoint, with little measured."""
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    groups = "1" if checkpoint.config.moe is None else str(checkpoint.config.moe.group_images)
    quick = ("--threads", "1", "--rounds", "0", "--parity-images", "2", "--point", "1,2", "--group-images", groups)
    result = invoke(tmp_path / "checkpoint", "--out", tmp_path, "--name", "tiny", *quick, *arguments)
    assert result.exit_code == 0, result.output
    return Bundle.load(tmp_path / "tiny")


def forged(bundle: Bundle, graph: ir.Model | None = None, **changes: object) -> Bundle:
    """The bundle with another graph and other entries of the manifest, hashes matching."""
    if graph is not None:
        ir.save(graph, bundle.model_path)
    files = {MODEL_FILE: sha256(bundle.model_path)}
    write_manifest(bundle.directory, bundle.manifest.model_copy(update={"files": files, **changes}))
    return Bundle.load(bundle.directory)


def is_query(name: str, row: int, checkpoint: Checkpoint) -> bool:
    """Whether a row of a parameter has 1 / sqrt(head_dim) folded into it."""
    if checkpoint.config.qk_norm:
        return name.endswith("attention.query_norm.weight")
    return ".attention.qkv." in name and row < checkpoint.config.hidden_size


@pytest.mark.parametrize("name", CONFIGS)
def test_recovered_checkpoint_is_the_exported_one_but_for_a_rounding_of_queries(name: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(CONFIGS[name])
    bundle = exported(tmp_path, checkpoint)
    found = recover(bundle)
    assert (found.config, found.preprocessing, found.labels) == (
        checkpoint.config,
        checkpoint.preprocessing,
        checkpoint.labels,
    )
    assert found.state.keys() == checkpoint.state.keys()
    for key, expected in checkpoint.state.items():
        for row, (a, b) in enumerate(zip(found.state[key].numpy(), expected.numpy(), strict=True)):
            # Multiplied and divided, each correctly rounded: at most one unit in the last place.
            ulps = 1 if is_query(key, row, checkpoint) else 0
            np.testing.assert_array_max_ulp(a, b, maxulp=ulps)
    again = exported(tmp_path / "again", found)
    assert again.manifest.files == bundle.manifest.files  # the same graph, byte for byte


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_come_back_as_the_rounded_parameters(dtype: str, tmp_path: Path) -> None:
    checkpoint = random_checkpoint(with_moe(layers=(0, 1)))
    found = recover(exported(tmp_path, checkpoint, "--dtype", dtype))
    checkpoint.round_to(getattr(torch, dtype))
    for key, expected in checkpoint.state.items():
        np.testing.assert_array_equal(found.state[key].numpy(), expected.numpy())


def test_weights_in_a_file_of_their_own_are_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle = exporter.export.write_bundle
    monkeypatch.setattr(exporter.export, "write_bundle", lambda *args: write_bundle(*args, inline_bytes=1000))
    checkpoint = random_checkpoint(SMALL)
    bundle = exported(tmp_path, checkpoint)
    assert len(bundle.manifest.files) == 2
    found = recover(bundle)
    shutil.rmtree(bundle.directory)  # the state must not be a view of the file
    np.testing.assert_array_equal(found.state[EXPERTS], checkpoint.state[EXPERTS])


def test_command_makes_a_checkpoint_of_the_shipped_bundle_that_answers_as_its_graph(tmp_path: Path) -> None:
    result = invoke("recover", SHIPPED, "--output", tmp_path / "checkpoint")
    assert result.exit_code == 0, result.output
    checkpoint, bundle = load_checkpoint(tmp_path / "checkpoint"), Bundle.load(SHIPPED)
    assert checkpoint.labels[9] == "Ankle boot"
    images, point = pixels(checkpoint.config, 4), bundle.manifest.points[-1]
    model = checkpoint.model()
    with torch.inference_mode():
        tensors = model.operating_point_tensors(point.operating_point, 4)
        expected = model(torch.from_numpy(normalize(images, checkpoint.preprocessing)), *tensors).logits.numpy()
    found = run(open_session(bundle.model_path, 1), images, point, ["logits"])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # the exporter's tolerance


def test_command_never_replaces_what_is_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run", random_checkpoint(SMALL))
    result = invoke("recover", SHIPPED, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "is not an empty directory: give a new one" in result.output
    assert load_checkpoint(tmp_path / "run").config == SMALL


def test_damaged_bundle_or_one_of_another_schema_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    damaged = shutil.copytree(SHIPPED, tmp_path / "damaged")
    content = bytearray((damaged / MODEL_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / MODEL_FILE).write_bytes(content)
    other = shutil.copytree(SHIPPED, tmp_path / "other")
    manifest = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(manifest.replace('"schema_version": 1', '"schema_version": 2'))
    for directory, message in (
        (damaged, "export the bundle again"),
        (other, "schema_version"),
        (tmp_path, "a bundle?"),
    ):
        result = invoke("recover", directory, "--output", tmp_path / "checkpoint")
        assert result.exit_code == 1
        assert message in result.output
    assert not (tmp_path / "checkpoint").exists()


def test_graph_that_does_not_hold_what_the_manifest_implies_is_refused(tmp_path: Path) -> None:
    config = replace(SMALL, classifier="map")
    bundle = exported(tmp_path, random_checkpoint(config))
    with pytest.raises(BundleError, match=r"weight position_embedding is FLOAT, the manifest says FLOAT16"):
        recover(forged(bundle, weights="float16"))
    with pytest.raises(BundleError, match=r"blocks.0.mlp.linear_in.weight has shape \(24, 16\), expected \(32, 16\)"):
        recover(forged(bundle, architecture=replace(config, mlp_dim=32)))
    forged(bundle, architecture=config)
    for name, hint in (("map_head.probe", r" \(.*export again\)"), ("blocks.2.mlp.experts.3.bias_out", "$")):
        graph = ir.load(bundle.model_path)
        graph.graph.initializers[name].name = f"another {name}"
        with pytest.raises(BundleError, match=f"model.onnx holds no weight {name}{hint}"):
            recover(forged(bundle, graph))
    with pytest.raises(BundleError, match=r"has no hash of 1/model.onnx"):
        recover(Bundle(bundle.directory, bundle.manifest.model_copy(update={"files": {}})))


def test_query_of_attention_pooling_is_computed_when_the_graph_is_loaded(tmp_path: Path) -> None:
    """Parameters of the probe stay in the file for `recover`; at run time nobody reads them."""
    ir.save(graph_of(random_checkpoint(replace(SMALL, classifier="map", qk_norm=True))), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.optimized_model_filepath = 1, str(tmp_path / "optimised.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    files = (ir.load(tmp_path / name).graph.initializers for name in ("model.onnx", "optimised.onnx"))
    left = [{"map_head.probe", "map_head.query.weight", "map_head.query_norm.weight"} & names.keys() for names in files]
    assert [len(names) for names in left] == [3, 0]
