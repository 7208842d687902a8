"""config.pbtxt against the schema that ships in tritonclient, field by field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from exporter.bundle import Bundle, Manifest, Provenance, frontier
from exporter.profiling import make_points
from exporter.triton_config import TritonOptions, triton_config, warmup_files
from tests.exporter.models import SMALL
from vmoe.config import ModelConfig
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing

SHIPPED = Path(__file__).parents[2] / "model_repository" / "vmoe-fashion-mnist"
GRAPH_SHA256 = "ab" * 32


def small_manifest(config: ModelConfig = SMALL, **changes: Any) -> Manifest:
    points = () if config.moe is None else make_points(config, (OperatingPoint(0.3, 1), OperatingPoint(1, 2)))
    manifest = Manifest(
        name="tiny",
        architecture=config,
        preprocessing=Preprocessing(config.image_size, config.channels, (0.5,) * 3, (0.25,) * 3),
        labels=tuple(f"class {index}" for index in range(config.num_classes)),
        input="uint8",
        weights="float32",
        max_selected_experts=2 if points else 0,
        max_batch_size=32,
        points=points,
        provenance=Provenance(checkpoint="c", checkpoint_sha256="0", command="c", date="2026-11-24", versions={}),
        files={"1/model.onnx": GRAPH_SHA256},
    )
    return manifest.model_copy(update=changes)


def parse(manifest: Manifest, options: TritonOptions | None = None) -> Any:
    """The message; unknown fields, wrong types and unknown enum values are errors."""
    return text_format.Parse(triton_config(manifest, options or TritonOptions()), model_config_pb2.ModelConfig())


def tensors(entries: Any) -> list[tuple[str, str, list[int]]]:
    names = model_config_pb2.DataType.Name
    return [(entry.name, names(entry.data_type), list(entry.dims)) for entry in entries]


def parameters(config: Any) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def test_shipped_config_is_what_the_exporter_writes_for_the_shipped_manifest() -> None:
    manifest = Bundle.load(SHIPPED).manifest
    assert (SHIPPED / "config.pbtxt").read_text() == triton_config(manifest, TritonOptions())
    files = {path.name: tuple(np.frombuffer(path.read_bytes(), "<i8")) for path in (SHIPPED / "warmup").iterdir()}
    assert files == warmup_files(manifest)
    config = text_format.Parse((SHIPPED / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert parameters(config)["model_sha256"] == manifest.files["1/model.onnx"]


def test_tensors_of_a_sparse_model() -> None:
    # 12 x 8 pixels in 4 x 4 patches and the class token: S = 7; two MoE layers of 4 experts; K up to 2.
    config = parse(small_manifest())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 32)
    assert list(config.version_policy.specific.versions) == [1]
    assert tensors(config.input) == [
        ("images", "TYPE_UINT8", [12, 8, 3]),
        ("slots", "TYPE_INT64", [2]),
        ("num_selected_experts", "TYPE_INT64", [1]),
    ]
    assert tensors(config.output) == [
        ("logits", "TYPE_FP32", [5]),
        ("kept", "TYPE_FP32", [2]),
        ("expert_load", "TYPE_INT64", [2, 4]),
        ("token_experts", "TYPE_INT64", [2, 7, 2]),
    ]
    assert [entry.label_filename for entry in config.output] == ["labels.txt", "", "", ""]


def test_dense_model_has_images_and_logits_and_warms_up_without_points() -> None:
    config = parse(small_manifest(replace(SMALL, moe=None), input="float32"))
    assert tensors(config.input) == [("images", "TYPE_FP32", [12, 8, 3])]
    assert tensors(config.output) == [("logits", "TYPE_FP32", [5])]
    assert [sample.batch_size for sample in config.model_warmup] == [1, 2, 4, 8, 16, 32]
    assert all(sample.inputs["images"].zero_data for sample in config.model_warmup)  # random bytes include NaN
    assert warmup_files(small_manifest(replace(SMALL, moe=None))) == {}


def test_queue_merges_nothing_and_has_no_policy() -> None:
    batching = parse(small_manifest()).dynamic_batching
    assert list(batching.preferred_batch_size) == [1]
    assert batching.max_queue_delay_microseconds == 0
    assert not batching.HasField("default_queue_policy")


def test_queue_policy_when_asked_for_rejects_after_a_timeout_that_requests_may_lower() -> None:
    batching = parse(small_manifest(), TritonOptions(queue_timeout_s=2.5)).dynamic_batching
    policy = batching.default_queue_policy
    assert (policy.default_timeout_microseconds, policy.allow_timeout_override) == (2_500_000, True)
    assert policy.TimeoutAction.Name(policy.timeout_action) == "REJECT"
    assert list(batching.preferred_batch_size) == [1]


@pytest.mark.parametrize(
    ("options", "kind", "count", "threads", "accelerators"),
    [
        (TritonOptions(), "KIND_CPU", 1, "0", []),
        (TritonOptions(instances=2, threads=3), "KIND_CPU", 2, "3", []),
        (TritonOptions(device="gpu", instances=2), "KIND_GPU", 2, None, ["cuda"]),
        (TritonOptions("python", "gpu"), "KIND_GPU", 1, None, []),
        (TritonOptions("python", "cpu", threads=1), "KIND_CPU", 1, "1", []),
    ],
)
def test_instances_threads_and_accelerators_follow_the_options(
    options: TritonOptions, kind: str, count: int, threads: str | None, accelerators: list[str]
) -> None:
    config = parse(small_manifest(), options)
    assert config.backend == options.backend
    (group,) = config.instance_group
    assert (group.Kind.Name(group.kind), group.count) == (kind, count)
    assert parameters(config).get("intra_op_thread_count") == threads
    found = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [entry.name for entry in found] == accelerators


def test_packed_weights_when_asked_for_are_a_parameter_with_the_directory_as_it_was_given() -> None:
    directory = PurePosixPath('/var/caché of "triton"\\')
    options = TritonOptions("python", instances=2, packed_weights=directory)
    assert parameters(parse(small_manifest(), options))["packed_weights"] == str(directory)
    assert "packed_weights" not in parameters(parse(small_manifest(), TritonOptions("python")))


def test_hash_parameters_are_those_of_the_manifest() -> None:
    files = {"1/model.onnx": GRAPH_SHA256, "1/model.onnx.data": "cd" * 32}
    found = parameters(parse(small_manifest(files=files)))
    assert (found["model_sha256"], found["weights_sha256"]) == (GRAPH_SHA256, "cd" * 32)
    assert "weights_sha256" not in parameters(parse(small_manifest()))


def test_warm_up_runs_every_frontier_point_at_every_profiled_batch_size_with_its_slots() -> None:
    manifest = Bundle.load(SHIPPED).manifest
    samples = parse(manifest).model_warmup
    files = warmup_files(manifest)
    seen = {
        (
            sample.batch_size,
            files[sample.inputs["slots"].input_data_file],
            files[sample.inputs["num_selected_experts"].input_data_file],
        )
        for sample in samples
    }
    expected = {
        (latency.batch_size, point.slots, (point.num_selected_experts,))
        for point in frontier(manifest.points)
        for latency in point.latency
    }
    assert seen == expected
    assert len(samples) == len(expected)
    assert all(sample.inputs["images"].random_data for sample in samples)
    assert list(samples[0].inputs["images"].dims) == [28, 28, 1]
    assert list(samples[0].inputs["slots"].dims) == [4]


def test_warm_up_without_a_profile_takes_whole_routing_groups_up_to_the_largest_batch() -> None:
    assert SMALL.moe is not None
    grouped = replace(SMALL, moe=replace(SMALL.moe, group_images=3))
    samples = parse(small_manifest(grouped, max_batch_size=48)).model_warmup
    # 1, 2, 4, 8, 16 groups of 3; 32 groups would be 96 images.
    assert sorted({sample.batch_size for sample in samples}) == [3, 6, 12, 24, 48]
