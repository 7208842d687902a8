"""Training runs on a tiny data set: exact resume, schedule, mixup, random points, weight average, log, interruption."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.vmoe.tiny import CONFIG, DENSE, MOE, PREPROCESSING, assert_same_state, data_of
from vmoe.checkpoint import load_checkpoint
from vmoe.config import ModelConfig
from vmoe.errors import CheckpointError
from vmoe.train import TrainConfig, Trainer, learning_rate, mixup, train

CPU = torch.device("cpu")
# 24 images in batches of 6: 4 steps per epoch, 8 steps.
SETTINGS = TrainConfig(
    epochs=2,
    batch_size=6,
    learning_rate=1e-3,
    warmup_steps=2,
    mixup=0.0,
    average_decay=0.999,
    adaptive=0.0,
    adaptive_min_capacity_factor=0.15,
    autocast="none",
    seed=3,
)


def trainer_of(config: ModelConfig = CONFIG, **changes: Any) -> Trainer:
    return Trainer(config, replace(SETTINGS, **changes), data_of(24), PREPROCESSING, CPU)


def run(trainer: Trainer, steps: int) -> list[float]:
    return [trainer.run_step()["loss"] for _ in range(steps)]


def optimizer_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (CONFIG, {"mixup": 0.2, "adaptive": 0.5}),
        (CONFIG, {"adaptive": 0.5, "distill": 0.5}),
        (CONFIG, {"autocast": "bfloat16"}),
        (CONFIG, {"optimizer": "sgd"}),
        (replace(CONFIG, moe=replace(MOE, group_images=2), position_embedding="learned"), {"adaptive": 1.0}),
        (DENSE, {}),
    ],
    ids=["adaptive-mixup", "distill", "bfloat16", "sgd", "groups", "dense"],
)
def test_run_of_six_steps_equals_three_and_three_after_a_resume_bit_for_bit(
    tmp_path: Path, config: ModelConfig, changes: dict[str, Any]
) -> None:
    # 3 is in the middle of the first epoch, 6 in that of the second.
    whole = trainer_of(config, **changes)
    losses = run(whole, 6)
    first = trainer_of(config, **changes)
    run(first, 3)
    first.save(tmp_path / "checkpoint")
    second = trainer_of(config, **changes)
    torch.manual_seed(99)  # nothing may hang on torch's global generator
    second.resume(tmp_path / "checkpoint", load_checkpoint(tmp_path / "checkpoint").state)
    assert second.step == 3
    assert run(second, 3) == losses[3:]
    assert_same_state(second.model.state_dict(), whole.model.state_dict())
    assert_same_state(second.average, whole.average)
    assert_same_state(optimizer_state(second), optimizer_state(whole))
    assert second.step == whole.step == 6


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not() -> None:
    assert run(trainer_of(), 3) == run(trainer_of(), 3) != run(trainer_of(seed=4), 3)


def test_checkpoint_of_a_run_holds_the_average_and_the_labels_of_the_data(tmp_path: Path) -> None:
    trainer = trainer_of()
    run(trainer, 3)
    trainer.save(tmp_path / "checkpoint")
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert_same_state(loaded.state, trainer.average)
    assert_same_state(trainer.averaged_model().state_dict(), trainer.average)
    assert not torch.equal(trainer.average["head.weight"], trainer.model.head.weight)
    assert loaded.labels == ("dark", "grey", "bright")


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 1e-4}, {"seed": 4}, {"epochs": 3}, {"mixup": 0.1}, {"batch_size": 8}]
)
def test_resume_with_other_settings_is_refused_and_names_them(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer_of().save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=f"other settings .*{next(iter(changes))}"):
        trainer_of(**changes).resume(tmp_path / "checkpoint", {})


@pytest.mark.parametrize("config", [DENSE, replace(CONFIG, moe=replace(MOE, capacity_factor=0.5))])
def test_resume_with_another_model_is_refused(tmp_path: Path, config: ModelConfig) -> None:
    # The second has the same parameters, only another capacity factor.
    trainer_of().save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="another model configuration"):
        trainer_of(config).resume(tmp_path / "checkpoint", {})


def test_resume_of_a_checkpoint_without_training_state_is_refused(tmp_path: Path) -> None:
    trainer_of().save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "training.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no training state"):
        trainer_of().resume(tmp_path / "checkpoint", {})


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.5),  # warm-up of 4 steps to 2.0
        (3, 2.0),
        (4, 2.0),  # cos 0
        (8, 1.0),  # half of the 8 steps after the warm-up: (1 + cos(pi / 2)) / 2
        (10, 1 - math.sqrt(0.5)),  # three quarters: 2 * (1 - sqrt(1/2)) / 2
        (12, 0.0),
        (99, 0.0),  # never rises again
    ],
)
def test_learning_rate_warms_up_linearly_and_decays_along_a_cosine(step: int, expected: float) -> None:
    found = learning_rate(step, 12, TrainConfig(learning_rate=2.0, warmup_steps=4))
    assert found == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_warm_up_starts_at_its_peak() -> None:
    assert learning_rate(0, 10, TrainConfig(learning_rate=2.0, warmup_steps=0)) == 2.0


def test_learning_rate_of_a_run_shorter_than_its_warm_up_keeps_rising() -> None:
    assert learning_rate(2, 3, TrainConfig(learning_rate=2.0, warmup_steps=4)) == 1.5


def test_run_step_applies_the_schedule_to_every_parameter_group() -> None:
    trainer = trainer_of(learning_rate=1e-3, warmup_steps=2)
    assert trainer.run_step()["learning_rate"] == pytest.approx(5e-4)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [5e-4, 5e-4]


def test_weight_decay_applies_to_matrices_only() -> None:
    decayed, others = trainer_of(weight_decay=0.3).optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in others["params"])


def test_mixup_combines_each_image_with_the_one_in_reverse_order() -> None:
    # Image i is filled with 10 i and has its own class: the label shows the weight w of the image itself, and the
    # pixels must be 10 (i w + (3 - i) (1 - w)).
    images = (10 * torch.arange(4.0)).view(4, 1, 1, 1).expand(4, 2, 2, 1)
    mixed, labels = mixup(images, torch.eye(4), 0.5, step=1, seed=2)
    weight = labels.diagonal()
    torch.testing.assert_close(labels, torch.diag(weight) + torch.diag(1 - weight).flip(1))
    expected = 10 * (torch.arange(4.0) * weight + (3 - torch.arange(4.0)) * (1 - weight))
    torch.testing.assert_close(mixed, expected.view(4, 1, 1, 1).expand(4, 2, 2, 1))
    assert ((weight > 0) & (weight < 1)).all()
    assert len(weight.unique()) == 4  # one weight per image


def test_mixup_depends_on_step_and_seed_alone() -> None:
    images, labels = torch.zeros(4, 1, 1, 1), torch.eye(4)
    first = mixup(images, labels, 0.5, 1, 2)[1]
    assert torch.equal(first, mixup(images, labels, 0.5, 1, 2)[1])
    assert not torch.equal(first, mixup(images, labels, 0.5, 2, 2)[1])
    assert not torch.equal(first, mixup(images, labels, 0.5, 1, 3)[1])


@pytest.mark.parametrize("changes", [{}, {"adaptive": 0.5, "adaptive_min_capacity_factor": 0.5}])
def test_loss_falls_on_data_that_can_be_learned(changes: dict[str, Any]) -> None:
    trainer = trainer_of(
        epochs=20, learning_rate=1e-2, label_smoothing=0.0, shift=0.0, scale=0.0, erase=0.0, warmup_steps=5, **changes
    )
    losses = run(trainer, 80)
    assert losses[0] == pytest.approx(math.log(3), abs=1e-6)  # the head starts at zero: three equal classes
    assert np.mean(losses[-8:]) < 0.2


def test_every_image_is_seen_once_per_epoch_and_in_another_order_in_the_next() -> None:
    trainer = trainer_of()
    epochs = []
    for epoch in range(2):
        seen = []
        for position in range(4):
            trainer.step = 4 * epoch + position
            seen.append(trainer._batch()[0].reshape(6, -1))
        epochs.append(np.concatenate(seen))
    rows = trainer.data.read(np.arange(24))[0].reshape(24, -1)
    for epoch_rows in epochs:
        np.testing.assert_array_equal(np.unique(epoch_rows, axis=0), np.unique(rows, axis=0))
    assert (epochs[0] != epochs[1]).any()


def adaptive_draws(count: int, group_images: int = 1, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # 32 x 32 pixels in patches of 4: 64 tokens, so that slots resolve the capacity factor.
    config = replace(CONFIG, image_size=(32, 32), moe=replace(MOE, group_images=group_images))
    trainer = Trainer(config, replace(SETTINGS, **changes), data_of(24), PREPROCESSING, CPU)
    slots, selected = trainer._operating_points(count, torch.Generator().manual_seed(0))
    assert slots is not None
    assert selected is not None
    return slots, selected


def test_adaptive_draws_stay_within_their_bounds_and_fill_them() -> None:
    slots, selected = adaptive_draws(4000, adaptive=1.0, adaptive_min_capacity_factor=0.25)
    assert slots.shape == (4000, 2)
    assert torch.equal(slots[:, 0], slots[:, 1])
    assert set(selected.tolist()) == {1, 2}
    # slots = ceil(64 K C / 4) with C from 0.25 to 1: 4 to 16 at K = 1, 8 to 32 at K = 2. C is hardly ever 0.25 exactly.
    for k, low, high in ((1, 5, 16), (2, 9, 32)):
        found = slots[selected == k, 0]
        assert set(found.tolist()) == set(range(low, high + 1))
    assert 0.45 < (selected == 1).float().mean() < 0.55


def test_adaptive_share_of_the_images_gets_a_random_point_and_the_rest_the_full_one() -> None:
    slots, selected = adaptive_draws(4000, adaptive=0.25)
    full = ((slots[:, 0] == 32) & (selected == 2)).float().mean().item()
    # 75 %, and the few random points that happen to be the full one (1 in 54).
    assert 0.72 < full < 0.79


def test_adaptive_draws_are_shared_by_the_images_of_a_group() -> None:
    slots, selected = adaptive_draws(400, group_images=2, adaptive=1.0)
    assert torch.equal(slots[::2], slots[1::2])
    assert torch.equal(selected[::2], selected[1::2])
    assert len(slots[:, 0].unique()) > 20
    assert slots.max() <= 64  # a group of 2 has 128 tokens: ceil(128 * 2 / 4)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, moe=replace(MOE, group_images=2))], ids=["image", "group"])
def test_distillation_mixes_the_averages_answer_at_the_full_point_into_the_targets_of_reduced_images(
    config: ModelConfig,
) -> None:
    trainer = trainer_of(config, adaptive=0.5, distill=0.25)
    run(trainer, 3)  # so that average and weights differ, and the average is not that of the first call
    inputs = torch.randn(6, *config.image_size, config.channels)
    targets = torch.eye(config.num_classes)[torch.arange(6) % config.num_classes]
    assert config.operating_point is not None
    full = torch.tensor(config.slots(config.operating_point))
    slots = full.repeat(6, 1)
    slots[2:4, 0] -= 1
    mixed = trainer._distil(inputs, targets, slots)
    answers = trainer.averaged_model()(inputs).logits.softmax(-1)
    assert torch.equal(mixed[[0, 1, 4, 5]], targets[[0, 1, 4, 5]])
    torch.testing.assert_close(mixed[2:4], 0.75 * targets[2:4] + 0.25 * answers[2:4], rtol=0, atol=1e-6)
    assert not torch.allclose(mixed[2:4], targets[2:4])


def test_distillation_changes_what_a_run_learns() -> None:
    with_it, without = trainer_of(adaptive=1.0, distill=0.5), trainer_of(adaptive=1.0)
    assert run(with_it, 3) != run(without, 3)


@pytest.mark.parametrize(
    ("changes", "said"), [({"distill": 1.5, "adaptive": 1.0}, "1.5"), ({"distill": 0.5}, "adaptive")]
)
def test_distillation_out_of_range_or_without_random_points_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(SETTINGS, **changes)


def test_without_adaptive_every_image_gets_the_configured_point() -> None:
    assert trainer_of()._operating_points(6, torch.Generator()) == (None, None)
    assert trainer_of(DENSE, adaptive=1.0)._operating_points(6, torch.Generator()) == (None, None)


def test_average_with_a_decay_of_zero_is_the_weights_themselves() -> None:
    trainer = trainer_of(average_decay=0.0)
    run(trainer, 2)
    assert_same_state(trainer.average, dict(trainer.model.state_dict()))


def test_average_of_the_first_step_keeps_a_tenth_of_the_start() -> None:
    # The decay grows as (1 + step) / (10 + step): 0.1 at step 0.
    trainer = trainer_of(average_decay=0.999)
    start = {name: value.clone() for name, value in trainer.average.items()}
    trainer.run_step()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(trainer.average[name], 0.1 * start[name] + 0.9 * value)


def test_average_when_its_decay_is_reached_stops_growing() -> None:
    trainer = trainer_of(average_decay=0.05)
    start = {name: value.clone() for name, value in trainer.average.items()}
    trainer.run_step()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(trainer.average[name], 0.05 * start[name] + 0.95 * value)


def test_gradient_that_is_not_finite_stops_the_run_and_leaves_the_weights() -> None:
    trainer = trainer_of()
    with torch.no_grad():
        trainer.model.head.bias[0] = float("nan")
    embedding = trainer.model.embedding.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="the gradient is not finite at step 0"):
        trainer.run_step()
    assert torch.equal(trainer.model.embedding.weight, embedding)
    assert trainer.step == 0


def test_weights_that_are_not_finite_are_not_saved_over_a_good_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_of(learning_rate=math.inf, warmup_steps=0)
    trainer.save(tmp_path / "checkpoint")
    before = load_checkpoint(tmp_path / "checkpoint").state
    trainer.run_step()  # the gradient was finite, the step is not
    with pytest.raises(FloatingPointError, match="is not finite at step 1, nothing was saved"):
        trainer.save(tmp_path / "checkpoint")
    assert_same_state(load_checkpoint(tmp_path / "checkpoint").state, before)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_checkpoint_from_before_a_setting_existed_resumes_with_its_default(tmp_path: Path) -> None:
    trainer_of().save(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "training.json"
    progress = json.loads(path.read_text())
    del progress["train_config"]["optimizer"]
    path.write_text(json.dumps(progress))
    average = load_checkpoint(tmp_path / "checkpoint").state
    trainer_of().resume(tmp_path / "checkpoint", average)
    with pytest.raises(CheckpointError, match=r"other settings .*'optimizer': \('adamw', 'sgd'\)"):
        trainer_of(optimizer="sgd").resume(tmp_path / "checkpoint", average)


def test_trainer_with_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 25 is larger than the data set of 24 images"):
        trainer_of(batch_size=25)


def test_trainer_with_data_of_another_number_of_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="the data has 3 classes, the model num_classes 10"):
        trainer_of(replace(CONFIG, num_classes=10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs and batch_size must be at least 1, got 0 and 6"),
        ({"batch_size": 0}, "epochs and batch_size must be at least 1, got 2 and 0"),
        ({"optimizer": "adam"}, "optimizer must be 'adamw' or 'sgd', got 'adam'"),
        ({"autocast": "bf16"}, "autocast must be 'bfloat16' or 'none', got 'bf16'"),
    ],
)
def test_train_config_with_a_bad_value_says_what_would_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_train_logs_a_line_of_json_per_epoch_and_saves_at_the_end(tmp_path: Path) -> None:
    trainer, steps = trainer_of(), []
    train(
        trainer,
        tmp_path / "run",
        evaluate=lambda model: {"accuracy": 0.5 if not model.training else 0.0},
        progress=lambda step, values: steps.append(step),
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 4), (2, 8)]
    for line in lines:
        assert line["accuracy"] == 0.5
        assert math.isfinite(line["loss"])
        assert line["images_per_s"] > 0
    assert steps == list(range(1, 9))
    assert_same_state(load_checkpoint(tmp_path / "run" / "checkpoint").state, trainer.average)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint", "log.jsonl"]


def test_train_when_interrupted_leaves_the_last_checkpoint_to_resume_from(tmp_path: Path) -> None:
    def interrupt_at_three(step: int, values: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # a negative interval saves after every step
        train(trainer_of(), tmp_path, evaluate=lambda model: {}, progress=interrupt_at_three, save_every_s=-1.0)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    resumed = trainer_of()
    resumed.resume(tmp_path / "checkpoint", load_checkpoint(tmp_path / "checkpoint").state)
    assert resumed.step == 2
    train(resumed, tmp_path, evaluate=lambda model: {}, progress=lambda step, values: None)
    whole = trainer_of()
    run(whole, 8)
    assert_same_state(resumed.average, whole.average)


KILLED_AT_FIVE = """
import os, signal, sys
from pathlib import Path
import torch
from tests.vmoe.test_train import train, trainer_of

torch.set_num_threads(1)  # as in this process (conftest): with two, sums come in another order

def progress(step, values):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)

train(trainer_of(), Path(sys.argv[1]), evaluate=lambda model: {}, progress=progress, save_every_s=-1.0)
"""


def test_run_that_is_killed_without_warning_resumes_to_the_same_weights(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", KILLED_AT_FIVE, tmp_path], cwd=Path(__file__).parents[2], check=False
    )
    assert process.returncode == -signal.SIGKILL
    resumed = trainer_of()
    resumed.resume(tmp_path / "checkpoint", load_checkpoint(tmp_path / "checkpoint").state)
    assert resumed.step == 4  # the fifth step was done, but not saved
    run(resumed, 4)
    whole = trainer_of()
    run(whole, 8)
    assert_same_state(resumed.average, whole.average)
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())


def test_train_when_interrupted_before_the_first_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    def interrupt(step: int, values: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trainer_of(), tmp_path, evaluate=lambda model: {}, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
