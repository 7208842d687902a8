"""What runs here: versions of this package and of its engine, for people and for metrics."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

OWN: Final = "vmoe-serving"
ENGINE: Final = "onnxruntime"


def version_of(package: str) -> str:
    """As installed; empty where it is not, as when the code runs from a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
