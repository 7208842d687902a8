"""What the programs say where the libraries of an extra are missing, and that what they say can be typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = {
    "export": ("matplotlib", "ml_dtypes", "onnx_ir", "safetensors", "torch"),
    "loadtest": ("aiohttp", "hdrh", "optuna", "plotly", "tomli_w"),
}
SHIPPED = "model_repository/vmoe-fashion-mnist"


def without(libraries: tuple[str, ...], *command: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m command` in a process in which `libraries` cannot be imported."""
    blocked = "import runpy, sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(','))); del sys.argv[:2]; "
    blocked += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    program = [sys.executable, "-c", blocked, ",".join(libraries), *command]
    return subprocess.run(program, cwd=ROOT, check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("export", "vmoe --help"),
        ("export", "vmoe sizes"),
        ("export", "exporter checkpoint"),
        ("export", "exporter --dry-run checkpoint"),
        ("export", f"exporter recover {SHIPPED} --output OUTPUT"),
        ("loadtest", "loadtest --help"),
    ],
)
def test_program_without_the_libraries_of_its_extra_names_it_in_one_line(
    extra: str, command: str, tmp_path: Path
) -> None:
    done = without(EXTRAS[extra], *command.replace("OUTPUT", str(tmp_path / "output")).split())
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.partition(" needs ")[2].partition(".")[0].partition(":")[0] in EXTRAS[extra]
    assert line.endswith(f": pip install -c constraints.txt -e '.[{extra}]'")
    assert not done.stdout


@pytest.mark.parametrize(
    ("library", "command", "who"),
    [
        ("aiohttp", "run --url http://127.0.0.1:9 --closed 1 --duration 1", "a live run"),
        ("optuna", f"tune --bundle {SHIPPED} --trace trace.csv --p99-ms 50 --out policy.toml", "tuning"),
    ],
)
def test_load_test_that_needs_more_than_simulating_names_the_extra(library: str, command: str, who: str) -> None:
    done = without((library,), "loadtest", *command.split())
    said = f"error: {who} needs {library}: pip install -c constraints.txt -e '.[loadtest]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.mark.parametrize("command", ["exporter --help", "exporter export --help"])
def test_exporter_without_torch_still_explains_itself(command: str) -> None:
    done = without(EXTRAS["export"], *command.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert "recover" in done.stdout or "--profile-only" in done.stdout


def test_module_of_our_own_that_is_missing_is_no_matter_of_extras() -> None:
    program = "from vmoe.extras import needs_extra\nwith needs_extra('export', 'vmoe'): import vmoe.absent"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'vmoe.absent'"


def test_package_is_nowhere_said_to_be_on_an_index() -> None:
    places = ("vmoe", "exporter", "server", "loadtest", "docs", "examples", "deploy", "tests")
    files = [*ROOT.glob("*.md"), *(file for place in places for file in (ROOT / place).rglob("*.[mp][dy]"))]
    index = "vmoe-serving" + "["
    found = [str(file) for file in files if index in file.read_text()]
    assert len(files) > 300
    assert not found, f"{found} name an index that has no such package"
