"""`python -m vmoe` end to end on a tiny IDX data set, and how it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from tests.vmoe.tiny import CONFIG, DENSE, assert_same_state, data_of, write_idx
from vmoe.checkpoint import load_checkpoint
from vmoe.cli import app
from vmoe.config import VARIANTS, ModelConfig
from vmoe.train_cli import default_preprocessing

SETTINGS = (
    "--epochs 2 --batch-size 6 --warmup-steps 2 --learning-rate 0.01 --autocast none --adaptive 0 --erase 0 "
    "--device cpu"
)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(root: Path, *more: str | Path, settings: str = SETTINGS, config: ModelConfig = CONFIG) -> Result:
    (root / "config.json").write_text(config.to_json())
    common = ("--data", root / "data", "--config", root / "config.json", "--output", root / "run")
    return invoke("train", *common, *settings.split(), *more)


def refused(result: Result) -> str:
    """The message of a refusal: one line on stderr, exit code 1."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def refused_parameter(result: Result) -> str:
    """The message of a wrong option: click's box and exit code 2, without the box's line breaks."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_idx(tmp_path / "data", "train", data_of(24))
    write_idx(tmp_path / "data", "t10k", data_of(12, seed=1), gz=True)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `data` and a finished run."""
    root = tmp_path_factory.mktemp("trained")
    write_idx(root / "data", "train", data_of(24))
    write_idx(root / "data", "t10k", data_of(12, seed=1))
    result = train(root)
    assert result.exit_code == 0, result.output
    return root


def test_train_then_evaluate_writes_a_checkpoint_a_log_and_the_accuracies(trained: Path) -> None:
    loaded = load_checkpoint(trained / "run" / "checkpoint")
    assert loaded.config == CONFIG
    assert loaded.preprocessing == default_preprocessing(CONFIG)
    lines = [json.loads(line) for line in (trained / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert {"accuracy_(1, 2)", "accuracy_(0.25, 1)"} <= lines[0].keys()

    report = trained / "report.json"
    result = invoke(
        "evaluate", trained / "run" / "checkpoint", "--data", trained / "data", "--json", report, "--device", "cpu",
        "--point", "1.0,2", "--point", "0.25,1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "12 images" in result.output
    found = json.loads(report.read_text())
    assert [(entry["point"]["capacity_factor"], entry["point"]["num_selected_experts"]) for entry in found] == [
        (1.0, 2),
        (0.25, 1),
    ]
    assert [entry["slots"] for entry in found] == [[2, 2], [1, 1]]  # 4 * 2 / 4; 4 * 0.25 / 4, at least 1
    for entry, name in zip(found, ("accuracy_(1, 2)", "accuracy_(0.25, 1)"), strict=True):
        assert entry["num_images"] == 12
        assert entry["accuracy"] == pytest.approx(lines[-1][name])  # the log's last glimpse saw the same weights
        assert all(0 < share <= 1 for share in entry["kept"])


def test_evaluate_without_points_prints_the_ladder(trained: Path) -> None:
    report = trained / "ladder.json"
    result = invoke(
        "evaluate", trained / "run" / "checkpoint", "--data", trained / "data", "--json", report, "--limit", "5"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert len(found) == 12  # 2 values of K, 6 of C
    assert {entry["num_images"] for entry in found} == {5}


def test_train_then_resume_continues_to_the_same_weights(root: Path, trained: Path) -> None:
    assert train(root).exit_code == 0
    log = (root / "run" / "log.jsonl").read_text()
    result = train(root, "--resume")  # finished already: nothing is left to do
    assert result.exit_code == 0, result.output
    assert (root / "run" / "log.jsonl").read_text() == log
    ours, other = (load_checkpoint(each / "run" / "checkpoint").state for each in (root, trained))
    assert all((ours[name] == other[name]).all() for name in other)


def test_train_with_resume_and_no_checkpoint_starts_a_run(root: Path) -> None:
    assert train(root, "--resume", config=DENSE).exit_code == 0
    result = invoke("evaluate", root / "run" / "checkpoint", "--data", root / "data")
    assert result.exit_code == 0, result.output


def test_train_that_starts_from_a_checkpoint_goes_on_with_its_weights(root: Path, trained: Path) -> None:
    # A learning rate of 1e-12 leaves float32 weights where they are: what comes out is what went in.
    start = trained / "run" / "checkpoint"
    settings = "--epochs 1 --batch-size 8 --learning-rate 1e-12 --warmup-steps 1 --autocast none --device cpu"
    assert train(root, "--start-from", start, settings=settings).exit_code == 0
    before, after = load_checkpoint(start).state, load_checkpoint(root / "run" / "checkpoint").state
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-8)


def test_train_that_starts_from_another_architecture_is_refused(root: Path, trained: Path) -> None:
    message = refused(train(root, "--start-from", trained / "run" / "checkpoint", config=DENSE))
    assert "parameter" in message


def test_train_with_resume_and_other_settings_is_refused(trained: Path) -> None:
    settings = SETTINGS.replace("0.01", "0.02")
    assert "was trained with other settings" in refused(train(trained, "--resume", settings=settings))


def test_train_into_the_directory_of_another_run_is_refused_and_leaves_it_alone(root: Path) -> None:
    assert train(root).exit_code == 0
    before = load_checkpoint(root / "run" / "checkpoint").state
    message = refused(train(root, "--seed", "7"))
    assert "exists: --resume continues its run, another --output leaves it alone" in message
    assert_same_state(load_checkpoint(root / "run" / "checkpoint").state, before)


def test_train_killed_while_it_replaced_its_checkpoint_resumes_from_the_old_one(root: Path, trained: Path) -> None:
    # What SIGKILL between the two renames of a save leaves: the old checkpoint set aside, the new one unnamed.
    shutil.copytree(trained / "run", root / "run")
    (root / "run" / "checkpoint").rename(root / "run" / ".checkpoint.old.x1")
    (root / "run" / ".checkpoint.x2").mkdir()
    log = (root / "run" / "log.jsonl").read_text()
    result = train(root, "--resume")
    assert result.exit_code == 0, result.output
    assert (root / "run" / "log.jsonl").read_text() == log  # the run was finished: nothing was trained again
    before = load_checkpoint(trained / "run" / "checkpoint").state
    assert_same_state(load_checkpoint(root / "run" / "checkpoint").state, before)


def test_train_with_vanilla_routing_saves_it_with_the_model(root: Path) -> None:
    assert train(root, "--routing", "vanilla").exit_code == 0
    moe = load_checkpoint(root / "run" / "checkpoint").config.moe
    assert moe is not None
    assert moe.routing == "vanilla"


def test_train_with_a_routing_that_does_not_exist_or_no_experts_is_refused(root: Path) -> None:
    assert "--routing must be bpr or vanilla, got 'best'" in refused(train(root, "--routing", "best"))
    assert "needs a model with experts" in refused(train(root, "--routing", "bpr", config=DENSE))


def test_train_without_data_says_what_is_missing(root: Path) -> None:
    (root / "data" / "train-labels-idx1-ubyte").unlink()
    assert "train-labels-idx1-ubyte[.gz] does not exist" in refused(train(root))


def test_train_of_a_missing_directory_is_refused(tmp_path: Path) -> None:
    assert "data is not a directory" in refused(train(tmp_path))


def test_train_with_an_unknown_variant_lists_the_known_ones(root: Path) -> None:
    result = invoke("train", "--data", root / "data", "--output", root / "run", "--variant", "vmoe_x99")
    message = refused_parameter(result)
    assert "unknown variant 'vmoe_x99'" in message
    assert all(name in message for name in VARIANTS)


def test_train_with_a_bad_configuration_names_the_key(root: Path) -> None:
    (root / "bad.json").write_text('{"hidden": 1}')
    result = invoke("train", "--data", root / "data", "--output", root / "run", "--config", root / "bad.json")
    assert "unknown keys ['hidden']" in refused(result)


def test_train_with_a_missing_configuration_names_the_file(root: Path) -> None:
    result = invoke("train", "--data", root / "data", "--output", root / "run", "--config", root / "no.json")
    assert "no.json" in refused(result)


def test_train_with_a_batch_larger_than_the_data_is_refused(root: Path) -> None:
    settings = SETTINGS.replace("--batch-size 6", "--batch-size 25")
    assert "batch_size 25 is larger than the data set of 24 images" in refused(train(root, settings=settings))


def test_train_of_a_model_for_images_of_another_size_fits_them(root: Path) -> None:
    assert train(root, config=replace(CONFIG, image_size=(12, 12))).exit_code == 0
    assert load_checkpoint(root / "run" / "checkpoint").preprocessing.image_size == (12, 12)


def test_train_of_a_model_with_another_number_of_classes_is_refused(root: Path) -> None:
    assert "the data has 3 classes" in refused(train(root, config=replace(CONFIG, num_classes=10)))


def test_train_that_diverges_is_refused_without_a_traceback(root: Path) -> None:
    settings = SETTINGS.replace("0.01", "inf")
    assert "the gradient is not finite at step 1" in refused(train(root, settings=settings))


@pytest.mark.parametrize("device", ["gpu", "tpu:0"])
def test_train_on_an_unknown_device_is_refused(root: Path, device: str) -> None:
    result = train(root, settings=SETTINGS.replace("--device cpu", f"--device {device}"))
    assert f"device must be auto, cpu, or cuda on a machine with a GPU, got '{device}'" in refused_parameter(result)


@pytest.mark.parametrize("kind", ["missing", "empty", "damaged"])
def test_evaluate_of_no_checkpoint_is_refused(tmp_path: Path, trained: Path, kind: str) -> None:
    directory = tmp_path / "checkpoint"
    if kind != "missing":
        directory.mkdir()
    if kind == "damaged":
        for file in (trained / "run" / "checkpoint").iterdir():
            (directory / file.name).write_bytes(file.read_bytes()[:200])
    assert "is not a readable checkpoint" in refused(invoke("evaluate", directory, "--data", trained / "data"))


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("0.25", "'0.25' is not an operating point, expected C,K such as 0.25,1"),
        ("nan,1", "capacity_factor must be a finite number above 0"),
        ("1.0,5", "num_selected_experts must be at most 4 for experts_per_item routing with 4 experts, got 5"),
    ],
)
def test_evaluate_at_an_impossible_point_says_what_is_possible(trained: Path, point: str, message: str) -> None:
    result = invoke("evaluate", trained / "run" / "checkpoint", "--data", trained / "data", "--point", point)
    # The last is found when the progress bar is up, which is drawn on stdout.
    assert message in refused(result)


def test_evaluate_with_a_limit_of_zero_is_refused(trained: Path) -> None:
    result = invoke("evaluate", trained / "run" / "checkpoint", "--data", trained / "data", "--limit", "0")
    assert "no images to evaluate" in refused(result)


def test_evaluate_to_a_file_that_cannot_be_written_is_refused(trained: Path) -> None:
    result = invoke(
        "evaluate", trained / "run" / "checkpoint", "--data", trained / "data", "--limit", "1",
        "--json", trained / "absent" / "report.json",
    )  # fmt: skip
    assert "report.json" in refused(result)


def test_default_preprocessing_takes_the_statistics_of_the_channels() -> None:
    gray = default_preprocessing(CONFIG)
    assert (gray.image_size, gray.channels, gray.mean, gray.std) == ((8, 8), 1, (0.2860,), (0.3530,))
    colour = default_preprocessing(replace(CONFIG, channels=3))
    assert (colour.channels, colour.mean, colour.std) == (3, (0.5,) * 3, (0.5,) * 3)
