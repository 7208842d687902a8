"""Our own checkpoints and the directories that hold them: whole or not at all, never unpickled."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.vmoe.tiny import CONFIG, DENSE, MOE, PREPROCESSING, assert_same_state, images_of, model_of
from vmoe.atomic_directory import replaced_directory
from vmoe.checkpoint import Checkpoint, load_checkpoint, load_training_state, save_checkpoint
from vmoe.config import ModelConfig
from vmoe.errors import CheckpointError

LABELS = ("T-shirt/top", "ein Schuh", "靴")


def checkpoint_of(config: ModelConfig = CONFIG, seed: int = 0) -> Checkpoint:
    return Checkpoint(config, model_of(config, seed).state_dict(), PREPROCESSING, LABELS)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        DENSE,
        replace(DENSE, position_embedding="learned", classifier="token", qk_norm=True),
        replace(CONFIG, position_embedding="none", classifier="map", representation_size=6),
    ],
    ids=["moe", "dense-sincos", "dense-token-qk-norm", "moe-map-pre-logits"],
)
def test_checkpoint_when_saved_and_loaded_is_bit_equal_and_gives_the_same_logits(
    tmp_path: Path, config: ModelConfig
) -> None:
    saved = checkpoint_of(config)
    save_checkpoint(tmp_path / "run" / "checkpoint", saved)
    loaded = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert (loaded.config, loaded.preprocessing, loaded.labels) == (config, PREPROCESSING, LABELS)
    assert_same_state(loaded.state, saved.state)
    images = images_of(config, 2)
    model = loaded.model()
    assert not model.training
    # The weights are equal to the bit, but lie at other addresses in memory: the kernels sum in another order.
    torch.testing.assert_close(model(images).logits, model_of(config)(images).logits, rtol=0, atol=1e-6)


def test_checkpoint_of_tensors_that_are_not_contiguous_is_saved(tmp_path: Path) -> None:
    saved = checkpoint_of()
    strided = saved.state["head.weight"].t().contiguous().t()
    assert not strided.is_contiguous()
    save_checkpoint(tmp_path / "checkpoint", replace(saved, state=saved.state | {"head.weight": strided}))
    assert_same_state(load_checkpoint(tmp_path / "checkpoint").state, saved.state)


def test_save_checkpoint_over_an_old_one_replaces_all_of_it(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, checkpoint_of(seed=0), {"step": torch.tensor(3)}, {"step": 3})
    save_checkpoint(directory, checkpoint_of(seed=1))
    assert_same_state(load_checkpoint(directory).state, checkpoint_of(seed=1).state)
    with pytest.raises(CheckpointError, match="holds no training state"):
        load_training_state(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_training_state_when_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    state = {
        "model.a": torch.randn(3, generator=torch.Generator().manual_seed(0)),
        "optimizer.0.step": torch.tensor(7.0),
    }
    save_checkpoint(tmp_path / "checkpoint", checkpoint_of(), state, {"step": 7})
    found, progress = load_training_state(tmp_path / "checkpoint")
    assert_same_state(found, state)
    assert progress == {"step": 7}


def test_model_with_a_missing_parameter_names_it_and_its_shape() -> None:
    saved = checkpoint_of()
    state = {name: value for name, value in saved.state.items() if name != "blocks.1.mlp.router.weight"}
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.router.weight of shape \(4, 8\) is missing"):
        replace(saved, state=state).model()


def test_model_with_a_parameter_of_the_wrong_shape_names_it_and_both_shapes() -> None:
    saved = checkpoint_of()
    state = saved.state | {"head.weight": torch.zeros(3, 9)}
    with pytest.raises(CheckpointError, match=r"head.weight has shape \(3, 9\), expected \(3, 8\)"):
        replace(saved, state=state).model()


def test_model_with_a_superfluous_parameter_names_it() -> None:
    saved = checkpoint_of()
    with pytest.raises(CheckpointError, match=r"parameter pre_logits\.bias has no place"):
        replace(saved, state=saved.state | {"pre_logits.bias": torch.zeros(3)}).model()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessing.json", "labels.txt"])
def test_load_checkpoint_without_one_of_its_files_is_refused(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, checkpoint_of())
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"checkpoint is not a readable checkpoint.*{name}"):
        load_checkpoint(directory)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_load_checkpoint_with_truncated_weights_is_refused(tmp_path: Path, share: float) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, checkpoint_of())
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"hidden": 1}'),
        ("preprocessing.json", "{}"),
        ("preprocessing.json", "[]"),
        ("preprocessing.json", '{"image_size": [8, 8], "channels": 2, "mean": [0, 0], "std": [1, 1]}'),
    ],
)
def test_load_checkpoint_with_a_malformed_json_file_is_refused(tmp_path: Path, name: str, text: str) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, checkpoint_of())
    (directory / name).write_text(text)
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        load_checkpoint(directory)


class Executed:
    """Leaves a file behind when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["model", "training"])
def test_a_pickle_in_place_of_the_weights_is_refused_and_never_executed(tmp_path: Path, writer: str, name: str) -> None:
    directory, marker = tmp_path / "checkpoint", tmp_path / "marker"
    save_checkpoint(directory, checkpoint_of(), {"step": torch.tensor(1)}, {"step": 1})
    target = directory / f"{name}.safetensors"
    if writer == "pickle":
        target.write_bytes(pickle.dumps(Executed(marker)))
    else:
        torch.save({"weight": Executed(marker)}, target)
    load = load_checkpoint if name == "model" else load_training_state
    with pytest.raises(CheckpointError):
        load(directory)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Executed(marker)))  # the trap is armed: this is what would have happened
    assert marker.exists()


def test_load_training_state_with_damaged_progress_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", checkpoint_of(), {"step": torch.tensor(1)}, {"step": 1})
    (tmp_path / "checkpoint" / "training.json").write_text("{")
    with pytest.raises(CheckpointError, match="no training state to resume from"):
        load_training_state(tmp_path / "checkpoint")


def test_with_group_images_keeps_the_weights_and_changes_the_group() -> None:
    saved = checkpoint_of()
    grouped = saved.with_group_images(2)
    assert grouped.config == replace(CONFIG, moe=replace(MOE, group_images=2))
    assert grouped.state is saved.state
    with pytest.raises(ValueError, match="batch of 3 is not a multiple"):
        grouped.model()(images_of(CONFIG, 3))


def test_with_group_images_of_a_dense_model_changes_nothing() -> None:
    saved = checkpoint_of(DENSE)
    assert saved.with_group_images(2) is saved


def test_with_labels_replaces_them_and_refuses_another_number() -> None:
    assert checkpoint_of().with_labels(("a", "b", "c")).labels == ("a", "b", "c")
    with pytest.raises(CheckpointError, match="2 labels were given for a model of 3 classes"):
        checkpoint_of().with_labels(("a", "b"))


def test_round_to_float16_gives_float32_that_float16_can_hold() -> None:
    saved = checkpoint_of()
    saved = replace(saved, state=saved.state | {"head.bias": torch.tensor([1 / 3, 65504.0, 2.0**-30])})
    original = {name: value.clone() for name, value in saved.state.items()}
    saved.round_to(torch.float16)
    rounded = saved.state
    # 1/3 in float16 is 1365 / 4096; 65504 is its largest value; 2**-30 lies below its smallest, 2**-24.
    assert rounded["head.bias"].tolist() == [1365 / 4096, 65504.0, 0.0]
    for name, value in rounded.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, value.half().float())
        torch.testing.assert_close(value, original[name], rtol=2**-11, atol=2**-24)  # half a unit in the last place


@pytest.mark.parametrize("value", [1e5, -1e5])
def test_round_to_float16_of_a_value_beyond_its_range_is_refused(value: float) -> None:
    saved = checkpoint_of()
    state = saved.state | {"head.bias": torch.tensor([0.0, value, 0.0])}
    with pytest.raises(CheckpointError, match=r"head.bias reaches 100000, float16 ends at 65504"):
        replace(saved, state=state).round_to(torch.float16)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_replaced_directory_when_its_body_fails_leaves_the_old_one_and_no_temporaries(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")

    def fail_half_way() -> None:
        with replaced_directory(target) as temporary:
            (temporary / "new").write_text("new")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert contents(target) == {"old": "old"}
    assert list(tmp_path.iterdir()) == [target]


def test_replaced_directory_when_its_body_fails_and_nothing_was_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), replaced_directory(tmp_path / "parent" / "target"):
        raise RuntimeError
    assert list((tmp_path / "parent").iterdir()) == []


@pytest.mark.parametrize("existed", [True, False])
def test_replaced_directory_when_the_last_rename_fails_puts_the_old_one_back(tmp_path: Path, existed: bool) -> None:
    # The second of the two renames fails, since what it would move is gone.
    target = tmp_path / "target"
    if existed:
        target.mkdir()
        (target / "old").write_text("old")
    with pytest.raises(FileNotFoundError), replaced_directory(target) as temporary:
        shutil.rmtree(temporary)
    assert [path.name for path in tmp_path.iterdir()] == ["target"] * existed
    if existed:
        assert contents(target) == {"old": "old"}


def test_replaced_directory_shows_the_old_contents_until_its_body_is_done(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("old")
    with replaced_directory(target) as temporary:
        (temporary / "new").write_text("new")
        assert contents(target) == {"old": "old"}
    assert contents(target) == {"new": "new"}
    assert list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o755  # a temporary directory would be readable to its owner only


def test_save_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, checkpoint_of(seed=0))
    with pytest.raises(TypeError):  # the progress is no JSON; by then the weights have been written
        save_checkpoint(directory, checkpoint_of(seed=1), {"step": torch.tensor(1)}, {"step": {1}})
    assert_same_state(load_checkpoint(directory).state, checkpoint_of(seed=0).state)
    assert list(tmp_path.iterdir()) == [directory]


def test_load_checkpoint_then_model_with_weights_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    save_checkpoint(directory, checkpoint_of())
    save_file(model_of(DENSE).state_dict(), directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks.0.mlp.router.weight of shape \(4, 8\) is missing"):
        load_checkpoint(directory).model()


def test_config_of_a_checkpoint_is_readable_json(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", checkpoint_of())
    assert json.loads((tmp_path / "checkpoint" / "config.json").read_text())["moe"]["layers"] == [0, 1]
