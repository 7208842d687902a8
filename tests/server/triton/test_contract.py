"""Every way in which a server's model can differ from the manifest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporter.bundle import Manifest
from server.backends.base import BackendError
from server.backends.triton.contract import ServedModel, ServedTensor, check_contract
from tests.server.conftest import small_manifest

HASH = "a" * 64
MANIFEST = small_manifest().model_copy(update={"files": {"1/model.onnx": HASH}})


def served() -> ServedModel:
    """What a server says that serves `small_manifest`: 8 x 8 pixels, 4 classes, L = 1, E = 4, S = 5, K = 2."""
    return ServedModel(
        inputs={
            "images": ServedTensor("UINT8", (-1, 8, 8, 1)),
            "slots": ServedTensor("INT64", (-1, 1)),
            "num_selected_experts": ServedTensor("INT64", (-1, 1)),
        },
        outputs={
            "logits": ServedTensor("FP32", (-1, 4)),
            "kept": ServedTensor("FP32", (-1, 1)),
            "expert_load": ServedTensor("INT64", (-1, 1, 4)),
            "token_experts": ServedTensor("INT64", (-1, 1, 5, 2)),
        },
        max_batch_size=8,
        instances=1,
        parameters={"model_sha256": HASH},
        server="triton 2.51.0",
    )


def test_contract_when_everything_agrees_then_nothing_happens() -> None:
    check_contract(MANIFEST, served())


def test_contract_when_the_server_allows_more_than_needed_then_nothing_happens() -> None:
    free = served().inputs | {"images": ServedTensor("UINT8", (-1, -1, -1, 1))}
    check_contract(MANIFEST, replace(served(), inputs=free, max_batch_size=64, parameters={}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {"x": ServedTensor("FP32", (-1, 3))}}, r"inputs are \['x'\], expected \['images'"),
        (
            {"inputs": served().inputs | {"images": ServedTensor("FP32", (-1, 8, 8, 1))}},
            r"input images is FP32 \[-1, 8, 8, 1\], expected UINT8 \[-1, 8, 8, 1\]",
        ),
        (
            {"outputs": served().outputs | {"logits": ServedTensor("FP32", (-1, 1000))}},
            r"output logits is FP32 \[-1, 1000\], expected FP32 \[-1, 4\]",
        ),
        (
            {"outputs": served().outputs | {"logits": ServedTensor("FP32", (-1,))}},
            r"output logits is FP32 \[-1\], expected",
        ),
        ({"max_batch_size": 4}, "max_batch_size is 4, expected 8 or more"),
        (
            {"parameters": {"model_sha256": "b" * 64}},
            "model_sha256 is bbbb.*, expected aaaa.*: it serves another export",
        ),
    ],
)
def test_contract_when_something_differs_then_it_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        check_contract(MANIFEST, replace(served(), **change))  # type: ignore[arg-type]


def test_contract_when_several_things_differ_then_all_are_named() -> None:
    with pytest.raises(BackendError, match=r"output logits is .*; max_batch_size is 1"):
        check_contract(
            MANIFEST,
            replace(served(), outputs=served().outputs | {"logits": ServedTensor("INT64", (-1, 4))}, max_batch_size=1),
        )


def test_contract_when_the_model_is_dense_then_it_has_images_and_logits_alone() -> None:
    dense: Manifest = small_manifest(dense=True)
    model = served()
    with pytest.raises(BackendError, match=r"expected \['images'\].*expected \['logits'\]"):
        check_contract(dense, model)
    check_contract(
        dense, replace(model, inputs={"images": model.inputs["images"]}, outputs={"logits": model.outputs["logits"]})
    )
