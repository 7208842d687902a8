"""The processor that a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """Its model name, as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.is_file() else []
    if names:
        return names[0].partition(":")[2].strip()
    return platform.processor() or "unknown processor"
