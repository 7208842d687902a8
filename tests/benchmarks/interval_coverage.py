"""How often the intervals of `loadtest compare` hold a known difference; prints the table of docs/reports.md.

python -m tests.benchmarks.interval_coverage

Pure arithmetic from fixed seeds: the same on every machine. Takes half a minute.
"""

from __future__ import annotations

import numpy as np

from tests.loadtest.test_bootstrap import Runs

TRIALS = 400  # one standard error of a share of 0.95 is 0.011


def covered(limits: list[tuple[float, float]]) -> float:
    return 100 * float(np.mean([low <= Runs.truth <= high for low, high in limits]))


def main() -> None:
    print("| bins | correlation | paired % | not paired % | as if independent, not paired % |")
    print("| --: | --: | --: | --: | --: |")
    for bins in (12, 30, 60, 120):
        for correlation in (0.0, 0.4, 0.7):
            shares = []
            for paired in (True, False):
                runs = [Runs(seed, paired=paired, bins=bins, correlation=correlation) for seed in range(TRIALS)]
                shares.append(covered([run.interval(paired=paired) for run in runs]))
            shares.append(covered([run.of_single_requests() for run in runs]))
            print(f"| {bins} | {correlation:g} | " + " | ".join(f"{share:.0f}" for share in shares) + " |")


if __name__ == "__main__":
    main()
