"""Few-shot transfer: closed form against a solver, draws, choice of the strength; the command up to a served head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch
from typer.testing import CliRunner

import exporter.cli
from exporter.bundle import Bundle
from tests.vmoe.test_cli import invoke, refused, refused_parameter, train
from tests.vmoe.tiny import CONFIG, PREPROCESSING, data_of, model_of, write_idx
from vmoe.checkpoint import load_checkpoint
from vmoe.data import DataError, IdxImages
from vmoe.fewshot import Features, Head, calibrated, draw, evaluate_shots, extract_features, fit_heads


def shades(count: int, seed: int) -> IdxImages:
    """Six classes in turn of brightness 20, 60 .. 220, noise of up to 10."""
    targets = np.arange(count) % 6
    noise = np.random.default_rng(seed).integers(-10, 11, (count, 8, 8, 1))
    images = 20 + 40 * targets[:, None, None, None] + noise
    return IdxImages(images.astype(np.uint8), targets.astype(np.int64), tuple("012345"))


def random_features(count: int, width: int, classes: int = 3, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, width, generator=generator, dtype=torch.float64) * 3 + 5
    return Features(values, torch.arange(count) % classes)


@pytest.mark.parametrize("count", [4, 40])  # fewer and more images than the 7 unknowns of a class
@pytest.mark.parametrize("strength", [0.5, 64.0])
def test_fit_heads_minimises_the_regularised_squares(count: int, strength: float) -> None:
    features = random_features(count, 6)
    head = fit_heads(features, 3, [1.0, strength])[1]
    # The same problem as ordinary least squares: |X W - Y|^2 + l2 |W|^2 = |[X; sqrt(l2) I] W - [Y; 0]|^2.
    values = features.values.numpy()
    standard = (values - values.mean(0)) / (values.std(0) + 1e-5)
    x = np.concatenate([standard, np.full((count, 1), 100.0)], axis=1)
    y = np.where(features.targets.numpy()[:, None] == np.arange(3), 1.0, -1.0)
    stacked = np.concatenate([x, np.sqrt(strength) * np.eye(7)]), np.concatenate([y, np.zeros((7, 3))])
    expected = np.linalg.lstsq(*stacked, rcond=None)[0]
    np.testing.assert_allclose(head.logits(features.values).numpy(), x @ expected, atol=1e-8)


def test_fit_heads_of_a_feature_that_does_not_vary_stays_finite() -> None:
    features = random_features(12, 4)
    features.values[:, 2] = 7.0
    head = fit_heads(features, 3, [1.0])[0]
    assert torch.isfinite(head.weight).all()
    assert torch.isfinite(head.bias).all()


def test_draws_of_validation_and_shots_are_disjoint_per_class_and_differ_between_seeds() -> None:
    targets: npt.NDArray[np.int64] = np.arange(60) % 3
    draws = draw(targets, 3, shots=5, seeds=2, validation_per_class=4)
    assert np.bincount(targets[draws.validation]).tolist() == [4, 4, 4]
    for rows in draws.shots:
        assert targets[rows].tolist() == [[0] * 5, [1] * 5, [2] * 5]
        assert len({*rows.reshape(-1), *draws.validation}) == 15 + 12
    assert (draws.shots[0] != draws.shots[1]).any()
    again = draw(targets, 3, shots=5, seeds=1, validation_per_class=4)
    np.testing.assert_array_equal(again.shots[0], draws.shots[0])  # a seed does not depend on how many there are


def test_draw_from_a_class_with_too_few_images_names_it() -> None:
    message = "class 1 has 3 training images, 2 shots and 2 images for validation are needed"
    with pytest.raises(DataError, match=message):
        draw(np.array([0, 0, 0, 0, 1, 1, 1]), 2, shots=2, seeds=1, validation_per_class=2)


def test_strength_is_the_best_on_validation_images_and_ties_go_to_the_weaker() -> None:
    train, validation, test = (random_features(30, 5, seed=seed) for seed in range(3))
    shots = [np.arange(30).reshape(10, 3).T, np.arange(30).reshape(10, 3).T[:, ::-1]]
    strengths = (1e-3, 1.0, 1e3)
    result, head = evaluate_shots(train, validation, test, shots, strengths)
    heads = fit_heads(train, 3, strengths)  # the order of the shots makes no difference
    scores = [each.accuracy(validation) for each in heads]
    best = scores.index(max(scores))
    assert (result.shots, result.l2) == (10, strengths[best])
    assert result.accuracies == (pytest.approx(heads[best].accuracy(test)),) * 2
    assert result.deviation == pytest.approx(0.0)
    torch.testing.assert_close(head.weight, heads[best].weight)


def test_calibrated_head_answers_alike_with_probabilities_that_fit() -> None:
    # Logits 1 and -1, right in 9 of 10 images. With an imagined image per class, half right, the best softmax says
    # (9 + 1) / 12 = 0.83.
    head = Head(torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    values = torch.tensor([[1.0, -1.0]] * 10, dtype=torch.float64)
    scaled = calibrated(head, Features(values, torch.tensor([0] * 9 + [1])))
    probability = scaled.logits(values).softmax(-1)[0, 0].item()
    assert probability == pytest.approx(10 / 12, abs=0.01)  # factors come in steps of 12 %


def test_features_are_what_the_head_sees_at_the_given_point() -> None:
    model, data = model_of(), data_of(8)
    point = CONFIG.operating_point
    features = extract_features(model, data, PREPROCESSING, np.arange(8), point, batch_size=3)
    inputs = (torch.from_numpy(data.images).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        logits = model(inputs).logits
    torch.testing.assert_close(model.head(features.values.float()), logits)
    assert features.targets.tolist() == data.targets.tolist()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shades, and a model trained on the first three."""
    root = tmp_path_factory.mktemp("fewshot")
    write_idx(root / "data", "train", shades(240, 0))
    write_idx(root / "data", "t10k", shades(60, 1))
    result = train(root, "--classes", "0-2")
    assert result.exit_code == 0, result.output
    return root


def test_train_with_classes_learns_those_and_evaluate_measures_on_them(root: Path) -> None:
    loaded = load_checkpoint(root / "run" / "checkpoint")
    assert loaded.labels == ("0", "1", "2")
    assert loaded.config.num_classes == 3
    result = invoke("evaluate", root / "run" / "checkpoint", "--data", root / "data", "--point", "1,2")
    assert result.exit_code == 0, result.output
    assert "30 images" in result.output


def test_fewshot_of_held_out_classes_writes_results_a_plot_and_a_head_that_is_served(root: Path) -> None:
    checkpoint, saved = root / "run" / "checkpoint", root / "few"
    result = invoke(
        "fewshot", checkpoint, "--data", root / "data", "--classes", "held-out", "--shots", "5", "--shots", "1",
        "--seeds", "3", "--validation", "10", "--save", saved, "--json", root / "few.json", "--plot", root / "few.png",
        "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((root / "few.json").read_text())
    assert report["classes"] == ["3", "4", "5"]
    one, five = report["results"][str(checkpoint)]
    assert (one["shots"], five["shots"]) == (1, 5)
    assert len(five["accuracies"]) == 3
    assert five["mean"] > 0.9  # shades can be told apart; chance is 1/3
    assert (root / "few.png").read_bytes().startswith(b"\x89PNG")

    exported = CliRunner().invoke(
        exporter.cli.app,
        [str(saved), "--name", "few", "--out", str(root / "repository"), "--images", str(root / "data"),
         "--point", "1,2", "--rounds", "0", "--threads", "1"],
    )  # fmt: skip
    assert exported.exit_code == 0, exported.output
    bundle = Bundle.load(root / "repository" / "few")
    assert bundle.manifest.labels == ("3", "4", "5")
    # The first seed's accuracy, now measured on the graph.
    assert bundle.manifest.points[0].accuracy == pytest.approx(five["accuracies"][0])
    session = ort.InferenceSession(bundle.model_path, providers=["CPUExecutionProvider"])
    images = shades(60, 1).images
    logits = session.run(
        ["logits"],
        {"images": images, "slots": np.full((60, 2), 2), "num_selected_experts": np.full((60, 1), 2)},
    )[0]
    right = logits[3::6].argmax(-1) == 0  # every sixth image from the fourth is of class "3"
    assert right.mean() > 0.8
    probability = torch.from_numpy(logits[3::6]).softmax(-1)[:, 0].mean().item()
    assert probability > 0.7  # uncalibrated, logits 1, -1, -1 would give 0.79 at best and about 0.5 here


def test_fewshot_without_a_choice_tells_all_classes_apart(root: Path) -> None:
    result = invoke(
        "fewshot", root / "run" / "checkpoint", "--data", root / "data", "--shots", "10", "--seeds", "1",
        "--validation", "10", "--limit", "12",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 classes, 12 images" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "4-9"), "class 6 does not exist"),
        (("--shots", "100"), "class 0 has 40 training images, 100 shots and 50 images for validation are needed"),
        (("--point", "1,9", "--validation", "5"), "num_selected_experts must be at most 4"),
    ],
)
def test_fewshot_with_a_wrong_option_says_what_would_be_right(
    root: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = invoke("fewshot", root / "run" / "checkpoint", "--data", root / "data", *arguments)
    assert message in refused(result)


def test_fewshot_of_a_model_that_knows_all_classes_has_nothing_held_out(root: Path, tmp_path: Path) -> None:
    write_idx(tmp_path / "data", "train", shades(30, 0))
    write_idx(tmp_path / "data", "t10k", shades(12, 1))
    assert train(tmp_path, "--classes", "0-5").exit_code == 0
    result = invoke("fewshot", tmp_path / "run" / "checkpoint", "--data", tmp_path / "data", "--classes", "held-out")
    assert "0 classes of the data were held out of training, at least 2 are needed" in refused(result)


def test_fewshot_that_saves_takes_one_checkpoint(root: Path) -> None:
    checkpoint = root / "run" / "checkpoint"
    result = invoke("fewshot", checkpoint, checkpoint, "--data", root / "data", "--save", root / "none")
    assert "--save takes one checkpoint, got 2" in refused_parameter(result)
    assert not (root / "none").exists()


def test_fewshot_that_would_replace_a_checkpoint_is_refused_without_overwrite(root: Path, tmp_path: Path) -> None:
    checkpoint, saved = root / "run" / "checkpoint", tmp_path / "few"
    shutil.copytree(checkpoint, saved)
    arguments = ("--data", root / "data", "--shots", "1", "--seeds", "1", "--validation", "5", "--save", saved)
    assert f"{saved} exists: --overwrite replaces it" in refused(invoke("fewshot", checkpoint, *arguments))
    assert load_checkpoint(saved).labels == ("0", "1", "2")
    result = invoke("fewshot", checkpoint, *arguments, "--overwrite")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(saved).labels == ("0", "1", "2", "3", "4", "5")
