"""Compute, ladder and dominated points; latency's form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vmoe.moe
from exporter.bundle import Point
from exporter.profiling import (
    Effort,
    Measured,
    Timed,
    default_effort,
    default_points,
    images_per_batch,
    macs_per_image,
    make_points,
    measure_accuracy,
    measure_latency,
    with_accuracy,
)
from tests.exporter.models import SMALL, graph_of, pixels, random_checkpoint, session_of
from vmoe.config import VARIANTS, ModelConfig
from vmoe.data import IdxImages
from vmoe.evaluate import evaluate
from vmoe.operating_point import OperatingPoint


@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, classifier="map"), replace(SMALL, classifier="gap", representation_size=6)],
    ids=["token", "map", "pre_logits"],
)
@torch.no_grad()
def test_compute_of_a_forward_pass_equals_torchs_own_count(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vmoe.moe, "ROWS_MULTIPLE", 1)  # padding rows are a cost of the PyTorch form only
    model = random_checkpoint(config).model().requires_grad_(False)
    # The counter knows the attention of the math backend, not the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(torch.zeros(1, *config.image_size, 3), with_statistics=True)
    assert output.statistics is not None
    kept = output.statistics.expert_load.sum(-1)[0].tolist()
    assert 2 * macs_per_image(config, kept) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def test_default_ladder_of_the_shipped_model_runs_from_an_eighth_to_full() -> None:
    config = VARIANTS["vmoe_fashion_mnist"]
    ladder = make_points(config, default_points(config))
    # 49 tokens, 8 experts: K=1 gives 0.77, 1.5, 3.1, 4.6, 6.1 slots, rounded up; K=2 gives 1.5, 3.1, 6.1, 9.2, 12.25.
    assert sorted((p.num_selected_experts, p.slots[0]) for p in ladder) == [
        (1, 1), (1, 2), (1, 4), (1, 5), (1, 7), (2, 2), (2, 4), (2, 7), (2, 10), (2, 13),
    ]  # fmt: skip
    assert [p.relative_compute for p in ladder] == sorted(p.relative_compute for p in ladder)
    assert ladder[-1].operating_point == config.operating_point
    assert ladder[-1].relative_compute == 1


def effort_of(name: str, image_size: int | None = None, **moe: object) -> Effort:
    config = VARIANTS[name]
    if image_size is not None:
        config = replace(config, image_size=(image_size, image_size))
    if moe:
        assert config.moe is not None
        config = replace(config, moe=replace(config.moe, **moe))  # type: ignore[arg-type]
    return default_effort(config, make_points(config, default_points(config)) if config.moe is not None else ())


@pytest.mark.parametrize("name", ["vmoe_fashion_mnist", "fashion_mnist"])
def test_default_effort_of_a_small_model_is_everything(name: str) -> None:
    assert effort_of(name) == Effort(256, 100, (1, 2, 4, 8, 16, 32))


def test_default_effort_of_a_large_model_shrinks_rounds_then_batch_sizes() -> None:
    # 0.522e12 multiply-accumulates per image over the ten points: 1e13 pay for 9.6 images twice; 2e13 for 38, that is
    # 12 times 1 + 2, the first of them to warm up. With a batch of 4 it would be 5 times.
    assert effort_of("vmoe_b16_every2_e8", 384) == Effort(9, 11, (1, 2))
    # 1.67e12 per image: 1e13 pay for 3.0 images twice, fewer than the fewest; 2e13 for 12 with batch 1.
    assert effort_of("vmoe_h14_last2_e32") == Effort(4, 11, (1,))


@pytest.mark.parametrize(
    ("row", "name", "image_size"),
    [
        ("shipped model", "vmoe_fashion_mnist", None),
        ("S/32, 8 experts", "vmoe_s32_last2_e8", None),
        ("B/16, 8 experts in 6 blocks", "vmoe_b16_every2_e8", None),
        ("B/16 at 384 pixels", "vmoe_b16_every2_e8", 384),
        ("L/16, 32 experts in 2 blocks", "vmoe_l16_last2_e32", None),
        ("H/14, 32 experts in 2 blocks", "vmoe_h14_last2_e32", None),
    ],
)
def test_default_effort_is_the_one_in_the_documentation(row: str, name: str, image_size: int | None) -> None:
    effort = effort_of(name, image_size)
    largest = effort.batch_sizes[-1]
    batches = {1: "1", 2: "1, 2"}.get(largest, f"1 to {largest}")
    documentation = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    assert f"| {row} | {effort.parity_images} | {effort.rounds} | {batches} |\n" in documentation


def test_default_effort_never_ends_at_nothing() -> None:
    assert effort_of("vmoe_h14_last2_e32", 1400) == Effort(4, 5, (1,))


def test_default_effort_counts_the_images_of_a_routing_group() -> None:
    # Batch sizes are in groups: eight images each, so that a round costs eight times as much.
    one, eight = effort_of("vmoe_b32_last2_e8"), effort_of("vmoe_b32_last2_e8", group_images=8)
    assert sum(eight.batch_sizes) < sum(one.batch_sizes)


def test_free_batches_fill_whole_groups_and_stay_small_beside_large_weights() -> None:
    assert images_per_batch(VARIANTS["vmoe_fashion_mnist"]) == 64
    b16 = replace(VARIANTS["vmoe_b16_every2_e8"], image_size=(384, 384))
    # 577 tokens * (6 * 768 + 4 * 3072 + 2 * 12 * 577) floats are 71 MB for one image.
    assert images_per_batch(b16) == 1
    assert b16.moe is not None
    assert images_per_batch(replace(b16, moe=replace(b16.moe, group_images=8))) == 8


def test_points_with_equal_slots_and_choices_are_one_point() -> None:
    # S = 7, K = 1, E = 4: 7 * 0.6 / 4 = 1.05 and 7 * 1 / 4 = 1.75 both give 2 slots.
    assert len(make_points(SMALL, [OperatingPoint(0.6, 1), OperatingPoint(1.0, 1)])) == 1


def test_dominated_points_are_those_that_another_beats_but_never_the_full_one() -> None:
    points = make_points(SMALL, [OperatingPoint(0.3, 1), OperatingPoint(1.0, 1), OperatingPoint(1.0, 2)])
    # Kept share decides the compute: here 1/4, 1/2 and 1 of K assignments.
    measured = [Measured(0.8, (0.25, 0.25)), Measured(0.7, (0.5, 0.5)), Measured(0.75, (1.0, 1.0))]
    marked = with_accuracy(SMALL, points, measured)
    assert [(p.accuracy, p.dominated) for p in marked] == [(0.8, False), (0.7, True), (0.75, False)]


@torch.inference_mode()
def test_accuracy_of_the_graph_equals_the_models(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SMALL)
    targets = np.random.default_rng(0).integers(0, 5, 50).astype(np.int64)
    data = IdxImages(pixels(SMALL, 50), targets, checkpoint.labels)
    points = make_points(SMALL, [OperatingPoint(0.3, 1), OperatingPoint(1.0, 2)])
    session = session_of(graph_of(checkpoint), tmp_path / "model.onnx")
    found = measure_accuracy(session, data, lambda images: images, points, batch_size=8)
    expected = evaluate(checkpoint.model(), data, checkpoint.preprocessing, [p.operating_point for p in points])
    assert [m.accuracy for m in found] == [e.accuracy for e in expected]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.kept, theirs.kept, rtol=1e-6)


def test_latency_is_measured_for_every_point_and_batch_size(tmp_path: Path) -> None:
    points: tuple[Point, ...] = make_points(SMALL, [OperatingPoint(0.3, 1), OperatingPoint(1.0, 2)])
    session = session_of(graph_of(random_checkpoint(SMALL)), tmp_path / "model.onnx")
    runs = 0

    def count(done: int) -> None:
        nonlocal runs
        runs += done

    graph = Timed(session, pixels(SMALL, 4), points)
    (timed,) = measure_latency([graph], batch_sizes=(1, 4), rounds=5, advance=count)
    assert runs == 5 * 2 * 2
    for point in timed:
        assert [entry.batch_size for entry in point.latency] == [1, 4]
        assert all(0 < entry.median_s <= entry.p99_s for entry in point.latency)
