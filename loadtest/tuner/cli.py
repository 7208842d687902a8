"""`python -m loadtest tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loadtest.errors import LoadtestError
from loadtest.terminal import clear_errors
from loadtest.tuner import objective as tuning
from vmoe.console import open_console
from vmoe.extras import needs_extra


def tune(
    bundle: Annotated[Path, typer.Option(help="Directory of an exported model with a latency profile.")],
    trace: Annotated[Path, typer.Option(help="As for `simulate`; a recording of your own traffic serves best.")],
    out: Annotated[Path, typer.Option(help="policy.toml to write.")],
    p99_ms: Annotated[float, typer.Option(help="Limit of the 99th percentile of latency.")] = 100.0,
    max_shed: Annotated[float, typer.Option(help="Limit of the share that is refused.")] = 0.001,
    maximise: Annotated[
        tuning.Goal, typer.Option(help="docs/tuning.md says what each means.")
    ] = tuning.Goal.effective_accuracy,
    load: Annotated[str, typer.Option(help="Arrival rates over the trace's, separated by commas.")] = "1",
    trials: Annotated[int, typer.Option(min=1, help="Policies to try.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The same one gives the same file.")] = 0,
    noise_seeds: Annotated[int, typer.Option(min=1, help="Runs of each trial at each load.")] = 2,
    held_out: Annotated[float, typer.Option(help="Share of the trace that is not searched.")] = 0.3,
    policy: Annotated[
        str | None, typer.Option(help="policy.toml whose budgets are kept. Default: the bundle's, if it has one.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Batches that run at once.")] = 1,
    max_batch_size: Annotated[int | None, typer.Option(min=1, help="Default: the bundle's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that simulate; the result does not depend on it.")] = 1,
    url: Annotated[str | None, typer.Option(help="Gateway at which the best few are confirmed.")] = None,
    admin_key: Annotated[str, typer.Option(envvar="VMOE_ADMIN_KEY", help="Of that gateway.")] = "",
    grace_ms: Annotated[float, typer.Option(min=0, help="As for `run`, in the confirmation.")] = 0.0,
    images: Annotated[Path | None, typer.Option(help="As for `run`, in the confirmation.")] = None,
    plot: Annotated[Path | None, typer.Option(help="HTML page of the Pareto front to write.")] = None,
    best_effort: Annotated[
        bool, typer.Option("--best-effort", help="Write the nearest where the objective is out of reach.")
    ] = False,
) -> None:
    """Searches the policies and their parameters in the simulator, and writes the best one.

    Ctrl-C ends the search early and goes on with the best so far; a second one ends everything and writes nothing.
    """
    with clear_errors():
        with needs_extra("loadtest", "tuning"):
            from loadtest.tuner import command  # needs optuna
        try:
            loads = tuple(float(each) for each in load.split(","))
        except ValueError as error:
            raise LoadtestError(f"--load must be numbers above 0, separated by commas, got {load!r}") from error
        # What gives the same file again; neither a key nor where things were written.
        asked = {
            "bundle": bundle, "trace": trace, "p99-ms": f"{p99_ms:g}", "max-shed": f"{max_shed:g}",
            "maximise": maximise, "load": load, "trials": trials, "seed": seed, "noise-seeds": noise_seeds,
            "held-out": f"{held_out:g}", "policy": policy, "workers": workers, "max-batch-size": max_batch_size,
            "url": url,
        }  # fmt: skip
        words = [word for name, value in asked.items() if value is not None for word in (f"--{name}", str(value))]
        words += ["--best-effort"] if best_effort else []
        command.tune(
            command.Options(
                bundle=bundle,
                trace=trace,
                objective=tuning.Objective(maximise, p99_ms, max_shed),
                loads=loads,
                trials=trials,
                seed=seed,
                noise_seeds=noise_seeds,
                held_out=held_out,
                workers=workers,
                max_batch_size=max_batch_size,
                jobs=jobs,
                policy=policy,
                out=out,
                plot=plot,
                best_effort=best_effort,
                gateway=None if url is None else command.Gateway(url, admin_key, grace_ms, images),
                command=("python", "-m", "loadtest", "tune", *words),
            ),
            open_console(),
        )
