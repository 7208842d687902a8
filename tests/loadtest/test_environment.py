from __future__ import annotations

import platform

import numpy as np

from loadtest.environment import Environment


def test_environment_when_asked_then_it_names_processor_cores_and_versions() -> None:
    here = Environment.here()
    assert here.cpu
    assert here.cores >= 1
    assert here.python == platform.python_version()
    assert here.versions["numpy"] == np.__version__
    assert "vmoe-serving" in here.versions
