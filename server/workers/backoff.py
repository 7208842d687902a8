"""When a worker that has died is replaced: at once, then later and later while its successors die young."""

from __future__ import annotations

from typing import Final

# Chosen, not tuned: a crash now and then costs nobody a wait, and a machine that cannot hold a worker is asked twice a
# minute. A worker that lived for a minute did not die of its start.
_FIRST_S: Final = 1.0
_LONGEST_S: Final = 30.0
_YOUNG_S: Final = 60.0


class Backoff:
    """Of one place in the line of workers."""

    def __init__(self) -> None:
        self._young_deaths = 0

    def died(self, lived_s: float) -> float:
        """Seconds to wait: 0, 1, 2, 4, ... 30 for deaths in a row within a minute of the start."""
        self._young_deaths = self._young_deaths + 1 if lived_s < _YOUNG_S else 1
        if self._young_deaths == 1:
            return 0.0
        return float(min(_LONGEST_S, _FIRST_S * 2.0 ** min(self._young_deaths - 2, 16)))
