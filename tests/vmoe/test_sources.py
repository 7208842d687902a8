"""Models from every kind of checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import struct
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from tests.vmoe.upstream import CASES, DIRECTORY, Case
from vmoe.architecture import Hints, parse_image_size
from vmoe.checkpoint import Checkpoint, save_checkpoint
from vmoe.config import ConfigError
from vmoe.errors import CheckpointError
from vmoe.flax import read_parameters
from vmoe.npz import npz_shapes, read_npz
from vmoe.orbax import find_orbax, orbax_shapes, read_orbax
from vmoe.sources import find_source, load_source, read_architecture

ORBAX = DIRECTORY / "token_k2_orbax"


def load_case(name: str, hints: Hints | None = None) -> tuple[Case, Checkpoint]:
    case = Case(name)
    return case, load_source(case.prefix, hints or Hints(), config_path=case.directory / "config.json")


def states_equal(one: Checkpoint, other: Checkpoint) -> bool:
    return one.state.keys() == other.state.keys() and all(torch.equal(v, other.state[k]) for k, v in one.state.items())


# The reference's files


@pytest.mark.parametrize("name", [name for name in CASES if name != "dense_vit"])
@torch.inference_mode()
def test_checkpoint_with_configuration_file_answers_as_configured(name: str) -> None:
    case, checkpoint = load_case(name)
    golden = np.load(case.directory / "golden_logits.npz")["as_configured"]
    logits = checkpoint.model()(torch.from_numpy(case.inputs)).logits.numpy()
    assert np.abs(logits - golden).max() < 1e-4


def test_checkpoint_without_configuration_file_has_the_same_weights() -> None:
    case, configured = load_case("gap_k1_prelogits")
    inferred = load_source(case.prefix.with_suffix(".index"), Hints(num_selected_experts=1))
    assert states_equal(inferred, configured)
    assert inferred.preprocessing == configured.preprocessing
    assert (inferred.preprocessing.mean, inferred.preprocessing.fit) == ((0.5, 0.5, 0.5), "stretch")
    assert inferred.labels == tuple("0123456789"[: inferred.config.num_classes])


def test_bare_constructor_arguments_leave_the_image_size_to_the_table(tmp_path: Path) -> None:
    case = Case("token_k2")
    bare = tmp_path / "model.json"
    bare.write_text(json.dumps(case.load_json("config.json")["model"]))
    assert load_source(case.prefix, config_path=bare).config == case.config


def test_overrides_change_single_values_of_a_configuration_file() -> None:
    case, checkpoint = load_case("token_k2", Hints(num_selected_experts=1, routing="bpr"))
    assert case.config.moe is not None
    assert checkpoint.config.moe == replace(case.config.moe, num_selected_experts=1, routing="bpr")


def test_other_image_size_interpolates_the_positions() -> None:
    _, checkpoint = load_case("token_k2", Hints(image_size=(48, 32)))
    _, original = load_case("token_k2")
    table, old = checkpoint.state["position_embedding"], original.state["position_embedding"]
    assert table.shape == (1, 1 + 6 * 4, 40)
    assert checkpoint.preprocessing.image_size == (48, 32)
    assert torch.equal(table[0, [0, 1, 4, 21, 24]], old[0, [0, 1, 4, 13, 16]])  # class token and corners
    # Row 1 of 6 lies at 3/5 between rows 0 and 1 of 4.
    torch.testing.assert_close(table[0, 5:9], 0.4 * old[0, 1:5] + 0.6 * old[0, 5:9])
    checkpoint.model()


def test_mismatch_names_parameter_and_both_shapes(tmp_path: Path) -> None:
    case = Case("token_k2")
    values = case.load_json("config.json")
    values["model"]["encoder"]["mlp_dim"] = 100
    (tmp_path / "config.json").write_text(json.dumps(values))
    expected = r"encoderblock_0/Mlp/Dense_0/kernel has shape \(40, 96\), expected \(40, 100\)"
    with pytest.raises(ConfigError, match=expected):
        load_source(case.prefix, config_path=tmp_path / "config.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("encoder", "rotary"), True, "unknown key 'rotary' in encoder"),
        (("encoder", "moe", "router", "deterministic"), False, "draws noise at inference"),
        (("encoder", "moe", "router", "name"), "SoftRouter", "router 'SoftRouter' is not supported"),
        (("encoder", "moe", "router", "dispatcher", "capacity"), 3, "fixes the slots"),
        (("encoder", "moe", "group_size"), 18, "whole images"),
        (("encoder",), 3, "config.json"),
        (("classifier",), "0", "classifier '0' is not supported"),
    ],
)
def test_configuration_that_means_another_model_is_refused(
    tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    case = Case("token_k2")
    values: dict[str, Any] = case.load_json("config.json")
    target = values["model"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message):
        load_source(case.prefix, config_path=tmp_path / "config.json")


def test_progress_adds_up_to_the_parameters() -> None:
    case = Case("token_k2")
    calls: list[tuple[int, int]] = []
    load_source(case.prefix, progress=lambda read, total: calls.append((read, total)))
    assert {total for _, total in calls} == {sum(read for read, _ in calls)}


def test_path_that_is_no_checkpoint_says_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no checkpoint: .*ckpt\.index.*Orbax folder.*\.npz"):
        find_source(tmp_path / "ckpt")


@pytest.mark.parametrize(("text", "size"), [("384", (384, 384)), ("224x320", (224, 320))])
def test_image_size_is_one_number_or_two(text: str, size: tuple[int, int]) -> None:
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "12x", "0", "-3x4", "1x2x3"])
def test_image_size_that_is_none_is_refused(text: str) -> None:
    if text == "12x":
        assert parse_image_size(text) == (12, 12)
        return
    with pytest.raises(ConfigError, match="image size"):
        parse_image_size(text)


# Orbax


def test_orbax_folder_holds_the_weights_of_its_twin_to_the_byte() -> None:
    pytest.importorskip("tensorstore")
    folder = find_orbax(ORBAX / "checkpoint")
    assert folder == ORBAX / "checkpoint" / "1000" / "state"
    digests = json.loads((ORBAX / "params_sha256.json").read_text())
    parameters = read_orbax(folder)
    assert parameters.keys() == digests.keys()
    for name, values in parameters.items():
        assert hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest() == digests[name]["sha256"], name
    twin = Case("token_k2_unknown_trainstate")
    assert states_equal(load_source(ORBAX / "checkpoint"), load_source(twin.prefix))


def test_damaged_orbax_folder_is_named(tmp_path: Path) -> None:
    pytest.importorskip("tensorstore")
    source = ORBAX / "checkpoint" / "1000" / "state"
    for file in (p for p in source.rglob("*") if p.is_file()):
        copy = tmp_path / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        data = file.read_bytes()
        copy.write_bytes(data[: len(data) // 2] if file.parent.name == "d" else data)
    with pytest.raises(CheckpointError, match="is not a readable Orbax folder"):
        load_source(tmp_path)


def test_missing_chunk_of_an_orbax_array_is_no_array_of_zeros(tmp_path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    metadata = {"shape": [4], "chunks": [2], "dtype": "<f4"}
    store = {"driver": "file", "path": str(tmp_path / "params.a.b")}
    array = tensorstore.open({"driver": "zarr", "kvstore": store, "metadata": metadata}, create=True).result()
    array.write(np.arange(1, 5, dtype=np.float32)).result()
    assert read_orbax(tmp_path)["a/b"].tolist() == [1, 2, 3, 4]
    (tmp_path / "params.a.b" / "1").unlink()
    with pytest.raises(CheckpointError, match="is not a readable Orbax folder"):
        read_orbax(tmp_path)


def test_orbax_chunk_of_absurd_size_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    tensorstore = pytest.importorskip("tensorstore")
    metadata = {"shape": [4], "chunks": [2**33], "dtype": "<f4"}  # 32 GB of zeros fit into a few compressed megabytes
    store = {"driver": "file", "path": str(tmp_path / "params.a.b")}
    tensorstore.open({"driver": "zarr", "kvstore": store, "metadata": metadata}, create=True).result()
    with pytest.raises(CheckpointError, match=r"a/b of shape \(4,\) has chunks of shape \(8589934592,\)"):
        orbax_shapes(tmp_path)


def no_values(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("values were read")


@pytest.mark.parametrize("kind", ["orbax", "npz"])
def test_mismatch_is_found_before_values_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    pytest.importorskip("tensorstore")
    path = ORBAX / "checkpoint"
    if kind == "npz":
        path = tmp_path / "vit.npz"
        np.savez(path, **read_parameters(Case("token_k2_unknown_trainstate").prefix))  # type: ignore[arg-type]
    monkeypatch.setattr("vmoe.sources.read_orbax", no_values)
    monkeypatch.setattr("vmoe.sources.read_npz", no_values)
    expected = r"embedding/kernel has shape \(8, 8, 3, 24\), expected \(8, 8, 3, 40\)"
    with pytest.raises(ConfigError, match=expected):
        load_source(path, config_path=Case("token_k2").directory / "config.json")
    assert read_architecture(path) == load_source(Case("token_k2_unknown_trainstate").prefix).config


# npz


def as_big_vision(name: str) -> str:
    for theirs, ours in (
        ("Encoder/posembed_input/", ""),
        ("Encoder/", "Transformer/"),
        ("SelfAttention/", "MultiHeadDotProductAttention_0/"),
        ("/Mlp/", "/MlpBlock_0/"),
    ):
        name = name.replace(theirs, ours)
    return f"params/{name}"


def as_vision_transformer(name: str) -> str:
    for theirs, ours in (
        ("Encoder/", "Transformer/"),
        ("SelfAttention/", "MultiHeadDotProductAttention_1/"),
        ("/Mlp/", "/MlpBlock_3/"),
        ("LayerNorm_1", "LayerNorm_2"),
    ):
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("style", ["plain", "vision_transformer", "big_vision"])
def test_npz_of_every_style_gives_the_same_model(tmp_path: Path, style: str) -> None:
    case = Case("dense_vit")
    parameters = read_parameters(case.prefix)
    if style == "big_vision":  # its class token has no position
        table = "Encoder/posembed_input/pos_embedding"
        parameters["cls"] = parameters["cls"] + parameters[table][:, :1]
        parameters[table] = parameters[table][:, 1:]
    rename = {"plain": str, "vision_transformer": as_vision_transformer, "big_vision": as_big_vision}[style]
    path = tmp_path / "vit.npz"
    extra = {"opt/mu": np.zeros(3)} if style == "big_vision" else {}
    np.savez(path, **{rename(k): v for k, v in parameters.items()}, **extra)  # type: ignore[arg-type]
    assert npz_shapes(path) == {name: values.shape for name, values in read_npz(path).items()}
    with torch.inference_mode():
        logits = load_source(path).model()(torch.from_numpy(case.inputs)).logits.numpy()
    golden = np.load(case.directory / "golden_logits.npz")["dense"]
    assert np.abs(logits - golden).max() < 1e-4


def test_npz_stores_bfloat16_as_two_raw_bytes(tmp_path: Path) -> None:
    # 1.5 is 0x3fc00000 in float32; bfloat16 is the upper half.
    np.savez(tmp_path / "a.npz", x=np.array([0x3FC0, 0xBFC0], "<u2").view("V2"))
    assert read_npz(tmp_path / "a.npz")["x"].tolist() == [1.5, -1.5]


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_npz_stores_floats_of_any_width_and_order(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[1.5, -2], [0.25, 3]], dtype, order="F"))
    values = read_npz(tmp_path / "a.npz")["x"]
    assert (values.dtype, values.tolist()) == (np.float32, [[1.5, -2], [0.25, 3]])


def corrupt(values: npt.NDArray[Any], path: Path) -> bytes:
    np.savez(path, x=values)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([1.0, np.nan]), "parameter x has values that are not finite"),
        (np.array([object()]), "parameter x has dtype object"),
        (np.array([1, 2]), "parameter x has dtype int64"),
    ],
)
def test_npz_of_something_else_than_finite_floats_is_refused(
    tmp_path: Path, values: npt.NDArray[Any], message: str
) -> None:
    corrupt(values, tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match=message):
        read_npz(tmp_path / "a.npz")


def test_npz_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    corrupt(np.zeros(7, np.float32), tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        data = archive.read("x.npy")
    grown = data.replace(b"(7,), }           ", b"(70000000000,), } ")  # the header keeps its length
    assert grown != data
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", grown)
    with pytest.raises(CheckpointError, match=r"x of shape .*70000000000.* does not fit"):
        read_npz(tmp_path / "a.npz")


def write_header(path: Path, header: bytes) -> None:
    """An npz file of one array `x`, of version 2.0, where the length of the header has four bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header + bytes(28))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("(-7,)", r"x has shape \(-7,\), every axis should be at least 1"),
        ("(0, 10000000000000000000000000)", "every axis should be at least 1"),
        ("(7.0,)", "x is not an array"),
        ("(" * 3000 + ")" * 3000, "x is not an array"),
        ("(" + "9" * 5000 + ",)", "x is not an array"),
        ("(4,)}", "x is not an array"),
    ],
    ids=["negative", "empty", "fraction", "nested", "digits", "syntax"],
)
def test_npz_header_that_makes_no_sense_is_refused(tmp_path: Path, shape: str, message: str) -> None:
    write_header(tmp_path / "a.npz", f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode())
    for read in (npz_shapes, read_npz):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path / "a.npz")


def test_npz_header_of_absurd_length_costs_no_memory(tmp_path: Path) -> None:
    # 200 MB of spaces deflate to 0.2 MB, and NumPy would read all of a header before it finds it too long.
    write_header(tmp_path / "a.npz", b" " * 200_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="x is not an array"):
            read_npz(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_npz_is_read_within_its_parameters_and_a_margin(tmp_path: Path) -> None:
    values = np.ones((4, 2**20), np.float32)
    np.savez(tmp_path / "a.npz", x=values, y=values)
    tracemalloc.start()
    try:
        read_npz(tmp_path / "a.npz")
        # One byte per value while they are checked for being finite, and a piece of the file.
        assert tracemalloc.get_traced_memory()[1] < 1.3 * 2 * values.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required additional header parsing")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_npz_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones((3, 4), np.float32), y=np.ones(5, np.float16))
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        read_npz(path)


def test_truncated_npz_is_refused(tmp_path: Path) -> None:
    data = corrupt(np.zeros(700, np.float32), tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"a\.npz is not a readable npz file"):
        read_npz(tmp_path / "a.npz")


# State dicts


def test_state_dict_beside_its_configuration_is_the_model(tmp_path: Path) -> None:
    _, checkpoint = load_case("map_head")
    save_checkpoint(tmp_path / "directory", checkpoint)
    (tmp_path / "config.json").write_text(checkpoint.config.to_json())
    torch.save({"state_dict": checkpoint.state}, tmp_path / "model.pt")
    save_file({k: v.contiguous() for k, v in checkpoint.state.items()}, tmp_path / "weights.safetensors")
    for path in ("directory", "model.pt", "weights.safetensors"):
        loaded = load_source(tmp_path / path)
        assert loaded.config == checkpoint.config
        assert states_equal(loaded, checkpoint)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((7,), float("nan")), "head.bias should be finite, found 7 values that are not"),
        (torch.zeros(7, dtype=torch.int64), "head.bias should be floating-point numbers, found torch.int64"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_named_in_every_kind_of_state(
    tmp_path: Path, value: Tensor, message: str
) -> None:
    _, checkpoint = load_case("map_head")
    damaged = replace(checkpoint, state=checkpoint.state | {"head.bias": value})
    save_checkpoint(tmp_path / "directory", damaged)
    (tmp_path / "config.json").write_text(checkpoint.config.to_json())
    torch.save(damaged.state, tmp_path / "model.pt")
    for path in (tmp_path / "directory", tmp_path / "model.pt"):
        with pytest.raises(CheckpointError, match=f"{path}: parameter {message}"):
            load_source(path)


def test_state_dict_without_configuration_asks_for_it(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"does not tell its architecture.*--config"):
        load_source(tmp_path / "model.pt")


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    torch.save({"head.weight": Touch(tmp_path / "ran")}, tmp_path / "model.pt")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Touch(tmp_path / "ran"), protocol=2))
    for name in ("model.pt", "bare.pth"):
        with pytest.raises(CheckpointError, match="is not a readable state dict"):
            load_source(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def timm_state(generator: torch.Generator) -> dict[str, Tensor]:
    """A ViT of 2 blocks, 2 heads of 64, 4 x 4 patches of 8 x 8, MLP width 96 and 5 classes."""
    shapes = {"cls_token": (1, 1, 128), "pos_embed": (1, 17, 128), "patch_embed.proj.weight": (128, 3, 8, 8)}
    shapes |= {"patch_embed.proj.bias": (128,), "head.weight": (5, 128), "head.bias": (5,)}
    shapes |= {f"norm.{part}": (128,) for part in ("weight", "bias")}
    for block in ("blocks.0", "blocks.1"):
        for name, out, inputs in (
            ("attn.qkv", 384, 128),
            ("attn.proj", 128, 128),
            ("mlp.fc1", 96, 128),
            ("mlp.fc2", 128, 96),
        ):
            shapes |= {f"{block}.{name}.weight": (out, inputs), f"{block}.{name}.bias": (out,)}
        shapes |= {f"{block}.norm{n}.{part}": (128,) for n in (1, 2) for part in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def timm_forward(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """timm's VisionTransformer written out; images (B, 3, H, W)."""

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (128,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    x = functional.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + state["pos_embed"]
    for block in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(len(x), 17, 3, 2, 64)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = ((query @ key.transpose(-1, -2)) / 8).softmax(-1) @ value
        x = x + linear(mixed.transpose(1, 2).reshape(len(x), 17, 128), f"{block}.attn.proj")
        hidden = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


@torch.inference_mode()
def test_timm_state_answers_as_timm_with_exact_gelu(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = timm_state(generator)
    save_file(state, tmp_path / "vit.safetensors")
    loaded = load_source(tmp_path / "vit.safetensors")
    assert (loaded.config.image_size, loaded.config.num_heads) == ((32, 32), 2)
    images = torch.randn(3, 32, 32, 3, generator=generator)
    logits = loaded.model()(images).logits
    torch.testing.assert_close(logits, timm_forward(state, images.permute(0, 3, 1, 2)), atol=1e-5, rtol=1e-5)


def test_timm_state_with_parameters_that_have_no_place_is_refused(tmp_path: Path) -> None:
    state = timm_state(torch.Generator().manual_seed(0)) | {"blocks.0.ls1.gamma": torch.ones(128)}
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"parameter blocks\.0\.ls1\.gamma has no place"):
        load_source(tmp_path / "vit.pth")
