"""The table of a request's layers."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest

from loadtest.images import SAMPLE, load_images
from server.upload import FIELD
from tests.benchmarks.layer_meter import GARBAGE
from tests.benchmarks.request_path import LAYERS, THREADS, Spent, as_forms, markdown, resolve
from tests.server.test_upload import oracle


@pytest.mark.parametrize("target", [target for targets in LAYERS.values() for target in targets])
def test_layers_when_resolved_then_each_is_a_function_of_the_gateways_path(target: str) -> None:
    owner, name = resolve(target)
    assert inspect.isfunction(getattr(owner, name))


def test_markdown_when_layers_overlap_threads_then_rows_add_up_to_each_thread() -> None:
    spent = Spent(
        Counter({("event loop", "body"): 10.0, ("event loop", GARBAGE): 5.0, ("event loop", "all"): 40.0})
        + Counter({("inference", "backend: inference"): 90.0, ("inference", "all"): 100.0}),
        Counter({("event loop", "body"): 1.0, ("event loop", "waits"): 0.25, ("event loop", "preemptions"): 2.0}),
    )
    lines = markdown({"raw body": spent}, {"raw body": 120.0}, "conditions").splitlines()
    assert "| event loop | body | 10 | 1.00 |" in lines
    assert "| event loop | the rest | 25 |  |" in lines  # 40 - 10 - 5
    assert "| inference | the rest | 10 |  |" in lines
    assert "All threads together: 140 us (raw body); without the meter, in the same run: 120 us (raw body)." in lines
    assert "event loop 0.25 and 2.00" in lines[-1]
    assert len(THREADS) == len(set(THREADS))


def test_forms_when_made_then_each_has_its_image() -> None:
    images = load_images(SAMPLE, ("Ankle boot",))
    forms = as_forms(images)
    boundary = forms.media_types[0].partition("boundary=")[2].encode()
    (upload,) = oracle(forms.bodies[0].replace(boundary, b"a b"))
    assert (upload.data, upload.media_type) == (images.bodies[0], images.media_types[0])
    assert f'name="{FIELD}"'.encode() in forms.bodies[0]
