"""`python -m exporter` on real files: what it leaves behind when it succeeds and when it does not."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import exporter.export
import exporter.profiling
from exporter.bundle import Bundle, BundleError, Target
from exporter.cli import app
from exporter.parity import ParityError, check_parity, model_answers
from exporter.profiling import Effort, default_effort, make_points
from exporter.recover import recover
from exporter.session import open_session, run
from tests.exporter.models import SMALL, graph_of, pixels, random_checkpoint, session_of, with_moe
from vmoe.checkpoint import Checkpoint, save_checkpoint
from vmoe.config import PositionEmbedding
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing
from vmoe.sources import load_source


def export(tmp_path: Path, *arguments: str, checkpoint: str | None = "checkpoint") -> Result:
    source = [] if checkpoint is None else [str(tmp_path / checkpoint)]
    common = ["--name", "tiny", "--out", str(tmp_path / "repository"), "--rounds", "1", "--threads", "1"]
    return CliRunner().invoke(app, [*source, *common, *arguments])


def left_behind(tmp_path: Path) -> list[str]:
    repository = tmp_path / "repository"
    return sorted(path.name for path in repository.iterdir()) if repository.exists() else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Labelled images of the five classes, of another size than the model's."""
    for label in range(5):
        directory = tmp_path / "images" / f"class {label}"
        directory.mkdir(parents=True)
        for index in range(4):
            array = np.random.default_rng(10 * label + index).integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(array).save(directory / f"{index}.png")
    return tmp_path / "images"


def test_export_with_images_writes_accuracy_latency_and_parity_of_every_point(tmp_path: Path, folder: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    result = export(tmp_path, "--images", str(folder), "--point", "0.3,1", "--point", "1,2")
    assert result.exit_code == 0, result.output
    manifest = Bundle.load(tmp_path / "repository" / "tiny").manifest
    assert [str(p.operating_point) for p in manifest.points] == ["(0.3, 1)", "(1, 2)"]
    assert all(p.accuracy is not None and p.kept is not None and len(p.latency) == 6 for p in manifest.points)
    assert manifest.parity is not None
    assert 0 < manifest.parity.max_abs_error < manifest.parity.tolerance
    assert manifest.profile is not None
    assert manifest.profile.num_images == 20
    assert "class 0" in manifest.labels
    assert left_behind(tmp_path) == ["tiny"]
    assert "max_batch_size: 32" in (tmp_path / "repository" / "tiny" / "config.pbtxt").read_text()


@pytest.mark.parametrize("arguments", [("--images", "images"), (), ("--input", "float32"), ("--group-images", "2")])
def test_export_in_int8_records_scales_agreement_and_accuracy(
    tmp_path: Path, folder: Path, arguments: tuple[str, ...]
) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    # A random model has hardly a best class to keep: 0.5.
    options = ("--dtype", "int8", "--calibration-images", str(folder), "--min-agreement", "0.5", "--tolerance", "0.5")
    arguments = tuple(str(folder) if argument == "images" else argument for argument in arguments)
    result = export(tmp_path, *options, *arguments, "--point", "0.3,1", "--point", "1,2")
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(tmp_path / "repository" / "tiny")
    manifest = bundle.manifest
    assert manifest.weights == "int8"
    with pytest.raises(BundleError, match="weights rounded to 8 bits; recover the float32 bundle"):
        recover(bundle)
    assert manifest.quantisation is not None
    # Without other images to compare on, half of the 20 are kept for that.
    assert manifest.quantisation.num_images == (20 if "--images" in arguments else 10)
    assert manifest.quantisation.points == ("(0.3, 1)", "(1, 2)")
    assert manifest.parity is not None
    assert manifest.parity.relative_error is not None
    assert 0 < manifest.parity.relative_error < 0.5
    assert manifest.parity.num_comparisons == (40 if "--images" in arguments else 20)
    assert [p.accuracy is not None for p in manifest.points] == ["--images" in arguments] * 2


@pytest.mark.parametrize(
    ("option", "limit", "message"),
    [
        ("--tolerance", "0.0001", r"of the rounded graph are off by \d\S+ of their spread, allowed is 0\.0001"),
        ("--min-agreement", "1", r"agree on the best class of \d\S+% of the images, at least 100\.00%"),
    ],
)
def test_export_in_int8_beyond_its_limits_leaves_nothing(
    tmp_path: Path, folder: Path, option: str, limit: str, message: str
) -> None:
    checkpoint = random_checkpoint(SMALL)
    state = dict(checkpoint.state)
    for name in ("head.bias", "norm.bias"):  # nothing but the image decides, and 8 bits change some image's best class
        state[name] = state[name] * 0
    save_checkpoint(tmp_path / "checkpoint", replace(checkpoint, state=state))
    options = ["--tolerance", "9", "--min-agreement", "0"]
    options[options.index(option) + 1] = limit
    result = export(tmp_path, "--dtype", "int8", "--calibration-images", str(folder), *options)
    assert result.exit_code == 1
    assert re.search(message, result.output)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("arguments", [("--dtype", "int8"), ("--calibration-images", "images")])
def test_int8_and_calibration_images_go_together(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    result = export(tmp_path, *arguments)
    assert result.exit_code == 2
    assert "--calibration-images go together" in " ".join(result.output.replace("│", " ").split())


def test_one_image_is_too_few_to_calibrate_and_to_compare(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    (tmp_path / "one" / "class 0").mkdir(parents=True)
    Image.new("RGB", (20, 30)).save(tmp_path / "one" / "class 0" / "0.png")
    result = export(tmp_path, "--dtype", "int8", "--calibration-images", str(tmp_path / "one"))
    assert result.exit_code == 1
    assert "one holds 1 images, int8 needs 2 at least" in result.output


@pytest.mark.parametrize("arguments", [("--dtype", "float16"), ("--input", "float32"), ("--group-images", "2")])
def test_export_in_every_form_passes_its_own_parity_check(tmp_path: Path, arguments: tuple[str, str]) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    result = export(tmp_path, *arguments, "--point", "1,2")
    assert result.exit_code == 0, result.output
    Bundle.load(tmp_path / "repository" / "tiny")


def test_preprocessing_given_on_the_command_line_is_the_bundles_and_the_graphs(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(SMALL, moe=None))
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    values = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")
    result = export(tmp_path, *values, "--fit", "center_crop", "--crop-fraction", "0.875")
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(tmp_path / "repository" / "tiny")
    expected = Preprocessing((12, 8), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "center_crop", 0.875)
    assert bundle.manifest.preprocessing == expected
    images = pixels(SMALL, 2)
    found = run(open_session(bundle.model_path, 1), images, None, ["logits"])[0]
    with torch.inference_mode():
        by_hand = (images / 255 - np.array(expected.mean)) / np.array(expected.std)
        logits = checkpoint.model()(torch.from_numpy(by_hand.astype(np.float32))).logits.numpy()
    assert np.abs(found - logits).max() < 1e-5


def test_thousand_numbered_classes_ask_for_names_until_they_get_them(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(replace(SMALL, moe=None, num_classes=1000))
    numbered = checkpoint.with_labels(tuple(map(str, range(1000))))
    save_checkpoint(tmp_path / "checkpoint", numbered)
    assert "--labels imagenet-1k" in " ".join(export(tmp_path).output.split())
    result = export(tmp_path, "--labels", "imagenet-1k")
    assert result.exit_code == 0, result.output
    assert "--labels" not in result.output
    labels = (tmp_path / "repository" / "tiny" / "labels.txt").read_text().splitlines()
    assert (labels[0], labels[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    assert "--labels" not in export(tmp_path).output  # "class 0" is a name


def test_export_of_a_dense_model_has_no_points(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(replace(SMALL, moe=None)))
    result = export(tmp_path)
    assert result.exit_code == 0, result.output
    assert Bundle.load(tmp_path / "repository" / "tiny").manifest.points == ()


def test_parity_above_the_tolerance_fails_and_keeps_the_old_bundle(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    assert export(tmp_path, "--point", "1,2").exit_code == 0
    before = (tmp_path / "repository" / "tiny" / "manifest.json").read_bytes()
    # Two float32 implementations never agree to 1e-12.
    result = export(tmp_path, "--point", "1,2", "--tolerance", "1e-12")
    assert result.exit_code == 1
    assert "differ from the model's" in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "repository" / "tiny" / "manifest.json").read_bytes() == before
    assert left_behind(tmp_path) == ["tiny"]


@pytest.mark.parametrize("position_embedding", ["learned", "sincos2d"])
def test_weights_of_the_model_are_gone_when_the_graph_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, position_embedding: PositionEmbedding
) -> None:
    # The peak of an export is the weights once: PyTorch's must be freed before ONNX Runtime loads its own.
    config = replace(SMALL, position_embedding=position_embedding)
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(config))
    references: list[weakref.ref[npt.NDArray[Any]]] = []
    alive: list[int] = []

    def load(*arguments: Any, **options: Any) -> Checkpoint:
        loaded = load_source(*arguments, **options)
        # A tensor made from an array keeps it as long as anything, tensor or array, shares the memory.
        arrays = {name: value.numpy().copy() for name, value in loaded.state.items()}
        references.extend(map(weakref.ref, arrays.values()))
        return replace(loaded, state={name: torch.from_numpy(array) for name, array in arrays.items()})

    def open_counting(model: Path, threads: int, target: Target) -> ort.InferenceSession:
        alive.append(sum(reference() is not None for reference in references))
        return open_session(model, threads, target)

    monkeypatch.setattr(exporter.export, "load_source", load)
    monkeypatch.setattr(exporter.export, "open_session", open_counting)
    result = export(tmp_path, "--point", "1,2")
    assert result.exit_code == 0, result.output
    assert len(references) > 40
    assert alive == [0]


def test_export_for_cuda_computes_in_float16_and_measures_no_latency_without_a_device(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SMALL)
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    result = export(tmp_path, "--target", "cuda", "--dtype", "float16", "--point", "1,2")
    assert result.exit_code == 0, result.output
    bundle = Bundle.load(tmp_path / "repository" / "tiny")
    manifest = bundle.manifest
    assert (manifest.target, manifest.weights) == ("cuda", "float16")
    assert manifest.parity is not None
    assert manifest.parity.relative_error is not None
    assert 0 < manifest.parity.relative_error <= manifest.parity.tolerance == 0.02
    assert [point.latency for point in manifest.points] == [()]
    assert "latency is not measured" in " ".join(result.output.split())
    with pytest.raises(BundleError, match="was written for cuda; recover the bundle for CPUs"):
        recover(bundle)


def test_export_for_cuda_in_another_type_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    result = export(tmp_path, "--target", "cuda")
    assert result.exit_code == 2
    assert "got --dtype float32: give float16" in " ".join(result.output.replace("│", " ").split())


def test_first_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    assert export(tmp_path, "--point", "1,2", "--tolerance", "1e-12").exit_code == 1
    assert left_behind(tmp_path) == []


def test_profile_only_measures_latency_again_and_keeps_what_does_not_depend_on_the_machine(
    tmp_path: Path, folder: Path
) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    assert export(tmp_path, "--images", str(folder), "--point", "1,2").exit_code == 0
    path = tmp_path / "repository" / "tiny" / "manifest.json"
    before = json.loads(path.read_text())
    before["points"][0]["latency"] = []
    path.write_text(json.dumps(before))
    result = export(tmp_path, "--profile-only", checkpoint=None)
    assert result.exit_code == 0, result.output
    after = json.loads(path.read_text())
    assert len(after["points"][0].pop("latency")) == 6
    assert before["points"][0].pop("latency") == []
    assert after["points"] == before["points"]
    assert after["profile"]["num_images"] == 20
    assert after["files"] == before["files"]


def test_bundles_timed_in_one_run_get_times_of_the_same_machine_and_keep_their_accuracies(
    tmp_path: Path, folder: Path
) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    common = ("--images", str(folder), "--point", "0.3,1", "--point", "1,2", "--rounds", "0")
    assert export(tmp_path, *common).exit_code == 0
    assert export(tmp_path, *common, "--name", "half", "--dtype", "float16").exit_code == 0
    paths = [tmp_path / "repository" / name for name in ("tiny", "half")]
    before = [Bundle.load(path).manifest for path in paths]
    result = export(tmp_path, "--profile-only", "--profile-with", "half", "--rounds", "2", checkpoint=None)
    assert result.exit_code == 0, result.output
    after = [Bundle.load(path).manifest for path in paths]
    for old, new in zip(before, after, strict=True):
        assert [[entry.batch_size for entry in point.latency] for point in new.points] == [[1, 2, 4, 8, 16, 32]] * 2
        assert [point.model_copy(update={"latency": ()}) for point in new.points] == list(old.points)
    assert after[0].profile == after[1].profile
    assert after[0].profile is not None
    assert (after[0].profile.rounds, after[0].profile.threads, after[0].profile.num_images) == (2, 1, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--profile-with", "b"), "--profile-with goes with --profile-only"),
        (("--profile-only", "--profile-with", "b", "--rounds", "0"), "it takes no --images and no --rounds 0"),
        (("--profile-only", "--profile-with", "../b"), "a bundle's name is that of a directory"),
    ],
)
def test_profile_with_what_it_cannot_do_says_so(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = export(tmp_path, *arguments, checkpoint=None)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("name", ["../tiny", "/tmp", "a/b", ".", "..", "", "tiny\n", ".hidden"])
@pytest.mark.parametrize("way", ["export", "--profile-only", "--triton-only"])
def test_name_that_is_not_of_a_directory_is_refused(tmp_path: Path, name: str, way: str) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    before = sorted(tmp_path.rglob("*"))
    arguments = (str(tmp_path / "checkpoint"),) if way == "export" else (way,)
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "repository"), "--name", name])
    assert result.exit_code == 2
    assert "a bundle's name is that of a directory" in " ".join(result.output.replace("│", " ").split())
    assert sorted(tmp_path.rglob("*")) == before


def test_profile_only_without_name_asks_for_it() -> None:
    result = CliRunner().invoke(app, ["--profile-only"])
    assert result.exit_code == 2
    assert "--profile-only needs --name" in result.output


def test_profile_only_without_latency_keeps_the_record_of_where_it_was_measured(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    assert export(tmp_path, "--point", "1,2").exit_code == 0
    path = tmp_path / "repository" / "tiny" / "manifest.json"
    before = json.loads(path.read_text())
    assert before["profile"]["rounds"] == 1
    before["profile"]["machine"] = "another"
    path.write_text(json.dumps(before))
    assert export(tmp_path, "--profile-only", "--rounds", "0", checkpoint=None).exit_code == 0
    assert json.loads(path.read_text()) == before


def test_comparisons_and_rounds_follow_the_size_of_the_model_unless_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # SMALL costs 101,984 multiply-accumulates at the two points together: 1,100,000 pay for 5.4 images in both
    # runtimes; 10,000,000 pay for 98, which is 6 times 1 + 2 + 4 + 8, the first of them to warm up.
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    points = make_points(SMALL, [OperatingPoint(0.3, 1), OperatingPoint(1.0, 2)])
    monkeypatch.setattr(exporter.profiling, "PARITY_MACS", 1_100_000)
    monkeypatch.setattr(exporter.profiling, "LATENCY_MACS", 10_000_000)
    effort = default_effort(SMALL, points)
    assert effort == Effort(5, 5, (1, 2, 4, 8))
    arguments = [str(tmp_path / "checkpoint"), "--out", str(tmp_path), "--threads", "1", "--point", "0.3,1"]
    for name, options in (("chosen", ()), ("given", ("--rounds", "2", "--parity-images", "3"))):
        result = CliRunner().invoke(app, [*arguments, "--point", "1,2", "--name", name, *options])
        assert result.exit_code == 0, result.output
    chosen, given = (Bundle.load(tmp_path / name).manifest for name in ("chosen", "given"))
    assert chosen.parity is not None
    assert chosen.profile is not None
    assert (chosen.parity.num_comparisons, chosen.profile.rounds) == (2 * 5, effort.rounds)
    assert [entry.batch_size for entry in chosen.points[0].latency] == [*effort.batch_sizes]
    assert given.parity is not None
    assert given.profile is not None
    assert (given.parity.num_comparisons, given.profile.rounds) == (2 * 3, 2)
    assert [entry.batch_size for entry in given.points[0].latency] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--point", "1"), "expected C,K such as 0.25,1"),
        (
            ("--point", "1,9"),
            "num_selected_experts must be at most 4 for experts_per_item routing with 4 experts, got 9",
        ),
        (("--images", "/nonexistent"), "/nonexistent is not a directory"),
        (("--labels", "/nonexistent"), "/nonexistent"),
        (("--labels", "imagenet-1k"), "1000 labels were given for a model of 5 classes"),
        (("--mean", "0.485,0.456"), "mean and std need 3 values each, got (0.485, 0.456)"),
        (("--mean", "red"), "'red' is not a number per channel"),
        (("--mean", "nan,0,0"), "mean must be finite"),
        (("--std", "0.2,0,0.2"), "std must be above 0"),
        (("--fit", "center_crop", "--crop-fraction", "1.5"), "crop_fraction must be above 0 and at most 1, got 1.5"),
        (("--crop-fraction", "0.875"), "crop_fraction 0.875 needs fit 'center_crop'"),
    ],
)
def test_bad_option_is_named_and_leaves_nothing(tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    save_checkpoint(tmp_path / "checkpoint", random_checkpoint(SMALL))
    result = export(tmp_path, *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert left_behind(tmp_path) == []


def test_checkpoint_that_is_missing_is_named(tmp_path: Path) -> None:
    result = export(tmp_path, checkpoint="nowhere")
    assert result.exit_code == 1
    assert "nowhere is no checkpoint" in " ".join(result.output.split())


def compare(checkpoint: Checkpoint, session: ort.InferenceSession, point: OperatingPoint, num_images: int) -> None:
    points, images = make_points(SMALL, [point]), pixels(SMALL, num_images)
    answers = model_answers(checkpoint.model(), images, checkpoint.preprocessing, points, max_selected_experts=2)
    check_parity(session, SMALL, images, checkpoint.preprocessing, answers, normalized_input=False)


def test_parity_check_of_a_graph_with_another_queue_order_fails(tmp_path: Path) -> None:
    # The vanilla graph of the same weights: same logits where nothing is dropped, other tokens where slots are few.
    checkpoint = random_checkpoint(SMALL)
    wrong = replace(checkpoint, config=with_moe(routing="vanilla"))
    session = session_of(graph_of(wrong), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"routes .* of the images differently"):
        compare(checkpoint, session, OperatingPoint(0.3, 2), num_images=32)


@pytest.mark.parametrize(("num_images", "rerouted", "passes"), [(8, 1, True), (8, 2, False), (3, 1, False)])
def test_parity_check_lets_one_image_tie_where_others_agree(
    tmp_path: Path, num_images: int, rerouted: int, passes: bool
) -> None:
    # A tie of gates shows at every point, which is more than 1 % of few comparisons; a wrong graph is off in most.
    checkpoint = random_checkpoint(SMALL)
    session = session_of(graph_of(checkpoint), tmp_path / "model.onnx")
    points, images = make_points(SMALL, [OperatingPoint(0.3, 1), OperatingPoint(1.0, 2)]), pixels(SMALL, num_images)
    answers = model_answers(checkpoint.model(), images, checkpoint.preprocessing, points, max_selected_experts=2)
    for answer in answers:
        assert answer.token_experts is not None
        answer.token_experts[:rerouted] = -1
    arguments = (session, SMALL, images, checkpoint.preprocessing, answers)
    if passes:
        assert check_parity(*arguments, normalized_input=False).rerouted == rerouted / num_images
        return
    with pytest.raises(ParityError, match=r"routes .* of the images differently"):
        check_parity(*arguments, normalized_input=False)


def test_parity_check_of_a_graph_with_one_changed_weight_fails(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(SMALL)
    graph = graph_of(checkpoint)
    ir.save(graph, tmp_path / "model.onnx")
    state = dict(checkpoint.state)
    state["head.bias"] = state["head.bias"] + 1e-3
    session = session_of(graph_of(replace(checkpoint, state=state)), tmp_path / "model.onnx")
    with pytest.raises(ParityError, match=r"differ from the model's by 0.001 at operating point \(1, 2\)"):
        compare(checkpoint, session, OperatingPoint(1.0, 2), num_images=8)
