"""The commands that analyse, on tiny checkpoints and IDX data, and how they refuse."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from tests.vmoe.tiny import CONFIG, DENSE, PREPROCESSING, data_of, model_of, write_idx
from vmoe.checkpoint import Checkpoint, save_checkpoint
from vmoe.cli import app
from vmoe.config import ModelConfig

QUICK = ("--capacity-factor", "0.25", "--capacity-factor", "1", "--group-images", "1", "--group-images", "2")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def save(directory: Path, config: ModelConfig, labels: tuple[str, ...] = ("0", "1", "2")) -> Path:
    save_checkpoint(directory, Checkpoint(config, model_of(config).state_dict(), PREPROCESSING, labels))
    return directory


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and runs of a sparse and a dense model."""
    root = tmp_path_factory.mktemp("analysis")
    write_idx(root / "data", "t10k", data_of(16))
    save(root / "sparse" / "checkpoint", CONFIG)
    save(root / "dense" / "checkpoint", DENSE)
    return root


def is_png(path: Path) -> bool:
    with Image.open(path) as picture:
        picture.load()
        return picture.format == "PNG" and path.stat().st_size < 150_000


def test_sweep_writes_a_report_and_a_plot_of_sparse_and_dense_models(root: Path, tmp_path: Path) -> None:
    result = invoke(
        "sweep", root / "sparse" / "checkpoint", root / "dense" / "checkpoint", "--data", root / "data", *QUICK,
        "--json", tmp_path / "sweep.json", "--plot", tmp_path / "sweep.png", "--markdown", tmp_path / "sweep.md",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["models"].keys() == {"sparse", "dense"}
    assert len(report["models"]["sparse"]) == 2 * 4 * 2 * 2  # C, K, queue orders, group sizes
    (dense,) = report["models"]["dense"]
    assert dense["point"] is None
    assert dense["num_images"] == 16
    assert is_png(tmp_path / "sweep.png")
    assert "`sparse`, 2 images per group\n\n| C | bpr, K = 1 |" in (tmp_path / "sweep.md").read_text()
    assert "sparse, 2 image(s) per group, 16 images" in result.output


def test_sweep_names_two_checkpoints_of_one_name_by_their_paths(root: Path, tmp_path: Path) -> None:
    first, second = (save(tmp_path / name / "run", DENSE) for name in ("a", "b"))
    report = tmp_path / "sweep.json"
    result = invoke("sweep", first, second, "--data", root / "data", *QUICK, "--json", report)
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["models"].keys() == {str(first), str(second)}


def test_sweep_of_dense_models_alone_has_no_plot(root: Path, tmp_path: Path) -> None:
    result = invoke(
        "sweep", root / "dense" / "checkpoint", "--data", root / "data", *QUICK, "--plot", tmp_path / "sweep.png"
    )
    assert "needs at least one sparse model" in refused(result)
    assert not (tmp_path / "sweep.png").exists()


def test_sweep_of_an_unknown_queue_order_is_refused(root: Path) -> None:
    result = invoke("sweep", root / "sparse" / "checkpoint", "--data", root / "data", "--routing", "fifo")
    assert result.exit_code == 2
    assert "routing must be bpr or vanilla, got 'fifo'" in result.stderr


def test_show_routing_draws_test_images_and_files(root: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 40, 3), 99, dtype=np.uint8)).save(tmp_path / "grey.jpg")
    result = invoke(
        "show-routing", root / "sparse" / "checkpoint", "--data", root / "data", "--image", "11",
        "--image", tmp_path / "grey.jpg", "--capacity-factor", "4", "--selected-experts", "1", "--layer", "0",
        "--plot", tmp_path / "kept.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "block 0, 2 images" in result.output
    assert "100.0 %" in result.output  # C = E drops nothing
    assert is_png(tmp_path / "kept.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image", "16"), "image 16 does not exist, the data have the images 0 to 15"),
        (("--image", "absent.png"), "absent.png"),
        (("--capacity-factor", "-1"), "capacity_factor must be a finite number above 0"),
        (("--selected-experts", "5"), "num_selected_experts must be at most 4"),
    ],
)
def test_show_routing_of_what_there_is_not_is_refused(
    root: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    common = ("--data", root / "data", "--plot", tmp_path / "kept.png")
    assert message in refused(invoke("show-routing", root / "sparse" / "checkpoint", *common, *arguments))


def test_show_routing_of_a_layer_beyond_the_last_is_refused(root: Path, tmp_path: Path) -> None:
    result = invoke(
        "show-routing", root / "sparse" / "checkpoint", "--data", root / "data", "--plot", tmp_path / "kept.png",
        "--layer", "2",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "--layer must be below 2" in result.stderr


def test_routing_analysis_writes_a_report_and_heat_maps(root: Path, tmp_path: Path) -> None:
    result = invoke(
        "routing-analysis", root / "sparse" / "checkpoint", "--data", root / "data", "--point", "0.25,1",
        "--json", tmp_path / "routing.json", "--plot", tmp_path / "routing.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "routing.json").read_text())
    assert [layer["block"] for layer in report["layers"]] == [0, 1]
    assert np.array(report["layers"][0]["weights"]).shape == (3, 4)
    assert sum(report["layers"][1]["load"]) == pytest.approx(1)
    assert is_png(tmp_path / "routing.png")


@pytest.mark.parametrize("command", ["show-routing", "routing-analysis"])
def test_analysing_the_routing_of_a_dense_model_is_refused(root: Path, tmp_path: Path, command: str) -> None:
    result = invoke(
        command, root / "dense" / "checkpoint", "--data", root / "data", "--plot", tmp_path / "plot.png"
    )  # fmt: skip
    assert "the checkpoint is a dense model" in refused(result)


@pytest.mark.parametrize("command", ["sweep", "show-routing", "routing-analysis"])
@pytest.mark.parametrize("kind", ["missing data", "corrupt data", "missing checkpoint", "another architecture"])
def test_bad_input_is_refused(root: Path, tmp_path: Path, command: str, kind: str) -> None:
    data, checkpoint = root / "data", root / "sparse" / "checkpoint"
    if kind == "missing data":
        data, message = tmp_path / "absent", "absent is not a directory"
    elif kind == "corrupt data":
        write_idx(tmp_path / "data", "t10k", data_of(6))
        data, message = tmp_path / "data", "t10k-images-idx3-ubyte"
        (data / "t10k-images-idx3-ubyte").write_bytes((root / "data" / "t10k-images-idx3-ubyte").read_bytes()[:200])
    elif kind == "missing checkpoint":
        checkpoint, message = tmp_path / "absent", "is not a readable checkpoint"
    else:
        checkpoint, message = save(tmp_path / "other", CONFIG), "parameter blocks.0.mlp.experts.weight_in has shape"
        (checkpoint / "config.json").write_text(replace(CONFIG, mlp_dim=32).to_json())
    assert message in refused(invoke(command, checkpoint, "--data", data, "--plot", tmp_path / "plot.png"))


def test_plot_without_matplotlib_says_what_to_install(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # what an import of an absent module ends with
    result = invoke(
        "routing-analysis", root / "sparse" / "checkpoint", "--data", root / "data", "--plot", tmp_path / "plot.png"
    )
    assert "pip install -c constraints.txt -e '.[export]'" in refused(result)
