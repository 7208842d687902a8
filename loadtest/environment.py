"""The machine and the versions that a report was made with: of this process, also where the gateway is elsewhere."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final, Self

from pydantic import BaseModel, ConfigDict

from exporter.machine import processor

OWN: Final = "vmoe-serving"
_PACKAGES: Final = (OWN, "numpy", "hdrhistogram", "aiohttp")  # what decides, counts and sends


class Environment(BaseModel):
    """Where a run was made.

    Attributes:
        cores: that this process may use.
        versions: of packages; one that is not installed is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    cpu: str
    cores: int
    platform: str
    python: str
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Self:
        """This process's."""
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        return cls(
            cpu=processor(),
            cores=len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
            platform=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            versions=_versions(),
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == OWN:
                found[name] = "source tree"
    return found
