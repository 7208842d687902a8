"""Training: AdamW with warm-up and cosine decay, mixup, weight averaging, random operating points and distillation.

A run is a function of its configuration: data order, augmentation, router noise and operating points of a step are
drawn from generators seeded by (seed, step), never from a state that a checkpoint would have to carry. A resumed run is
therefore bit-identical to one that was never stopped, and one of several processes differs from it by rounding alone.

Axes: N images of a batch, L MoE layers.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from vmoe.augment import augment
from vmoe.checkpoint import Checkpoint, load_training_state, save_checkpoint
from vmoe.config import ModelConfig, load_config
from vmoe.data import LabelledImages
from vmoe.errors import CheckpointError
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.parallel import WHOLE, Shard
from vmoe.preprocess import Preprocessing, scale_and_offset

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 120.0  # chosen: what a killed run loses at most


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on besides model and data. The defaults are those of the shipped model.

    Attributes:
        epochs, batch_size: length of the run and images per step, those of all processes together.
        learning_rate: peak, reached after `warmup_steps`; decays to 0 along a cosine.
        weight_decay: AdamW's, on matrices only.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of the Beta distribution, 0 for none.
        average_decay: decay of the exponential moving average of the weights, 0 for none. The average is what
            is evaluated and exported.
        flip, shift, scale, erase: see `augment.augment`.
        adaptive: share of the images of a step that get a random operating point (K uniform in 1..K, C uniform between
            `adaptive_min_capacity_factor` and the configured C) instead of the configured one. 0 trains one point only.
        distill: share of the averaged model's answer at the full point in the targets of the images with a random
            point ("in-place distillation", 1903.05134); 0 leaves them the labels alone.
        autocast: `bfloat16` or `none`.
        clip_norm: largest norm of the gradient.
        optimizer: `adamw`, or `sgd` with momentum 0.9.
    """

    epochs: int = 26
    batch_size: int = 96
    learning_rate: float = 1.2e-3
    warmup_steps: int = 500
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.0
    average_decay: float = 0.999
    flip: float = 0.5
    shift: float = 0.05
    scale: float = 0.08
    erase: float = 0.15
    adaptive: float = 0.0
    adaptive_min_capacity_factor: float = 0.15
    distill: float = 0.0
    autocast: str = "bfloat16"
    clip_norm: float = 1.0
    optimizer: str = "adamw"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}")
        if self.autocast not in ("bfloat16", "none"):
            raise ValueError(f"autocast must be 'bfloat16' or 'none', got {self.autocast!r}")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"optimizer must be 'adamw' or 'sgd', got {self.optimizer!r}")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must be between 0 and 1, got {self.distill}")
        if self.distill > 0 and self.adaptive <= 0:
            raise ValueError(f"distill is {self.distill}, but no image has a random point: set adaptive above 0")


class Trainer:
    """One run: weights, their average, the optimiser and the step counter."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        data: LabelledImages,
        preprocessing: Preprocessing,
        device: torch.device,
        shard: Shard = WHOLE,
    ) -> None:
        """Arguments:
        shard: this process's part of every batch; others work on the rest at the same time.
        """
        if len(data.labels) != model_config.num_classes:
            raise ValueError(
                f"the data has {len(data.labels)} classes, the model num_classes {model_config.num_classes}"
            )
        groups = config.batch_size if model_config.moe is None else config.batch_size // model_config.moe.group_images
        shard.rows(groups)  # refuses what cannot be shared out
        self.config, self.data, self.preprocessing, self.device = config, data, preprocessing, device
        self.shard = shard
        torch.manual_seed(config.seed)
        self.model = VisionTransformer(model_config).to(device)
        self._forward = self.model if shard.count == 1 else DistributedDataParallel(self.model, broadcast_buffers=False)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._teacher: VisionTransformer | None = None
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        parameters: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
        self.steps_per_epoch = len(data) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch_size {config.batch_size} is larger than the data set of {len(data)} images")
        self.num_steps = self.steps_per_epoch * config.epochs
        self.step = 0
        scale, offset = scale_and_offset(preprocessing)
        self._scale, self._offset = torch.from_numpy(scale).to(device), torch.from_numpy(offset).to(device)

    def run_step(self) -> dict[str, float]:
        """One optimiser step: loss, share of assignments kept and images per second are the caller's to log."""
        config = self.config
        # numpy's SeedSequence mixes (seed, step) so that neighbouring steps have unrelated streams.
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence([config.seed, self.step]).generate_state(1)[0])
        )
        images, classes = self._batch()
        with torch.no_grad():
            inputs = torch.from_numpy(images).to(self.device).float() * self._scale + self._offset
            inputs = augment(
                inputs,
                generator,
                flip=config.flip,
                shift=config.shift,
                scale=config.scale,
                erase=config.erase,
                shard=self.shard,
            )
            labels = functional.one_hot(
                torch.from_numpy(classes).to(self.device), self.model.config.num_classes
            ).float()
            if config.mixup > 0:
                inputs, labels = mixup(inputs, labels, config.mixup, self.step, config.seed, self.shard)
        slots, num_selected = self._operating_points(config.batch_size, generator)
        smooth = config.label_smoothing
        targets = labels * (1 - smooth) + smooth / labels.shape[1]
        if config.distill > 0 and slots is not None:
            targets = self._distil(inputs, targets, slots)
        noise = torch.Generator(self.device).manual_seed(generator.initial_seed())
        rate = learning_rate(self.step, self.num_steps, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast == "bfloat16"):
            moe = self.model.config.moe
            output = self._forward(
                inputs,
                slots,
                num_selected,
                max_selected_experts=None if moe is None else moe.num_selected_experts,
                generator=noise,
                shard=self.shard,
            )
        logits = output.logits.float()
        loss = functional.cross_entropy(logits, targets)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + output.auxiliary_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {self.step} (loss {loss.item():g})")
        self.optimizer.step()
        self._update_average()
        self.step += 1
        accuracy = (logits.argmax(-1) == labels.argmax(-1)).float().mean()
        with torch.no_grad():
            means = self.shard.sum(torch.stack([loss, accuracy])) / self.shard.count
        return {
            "loss": means[0].item(),
            "auxiliary_loss": output.auxiliary_loss.item(),
            "train_accuracy": means[1].item(),
            "learning_rate": rate,
        }

    def averaged_model(self) -> VisionTransformer:
        """A copy with the averaged weights, in evaluation mode."""
        model = VisionTransformer(self.model.config).to(self.device)
        model.load_state_dict(self.average)
        return model.eval()

    def save(self, directory: Path) -> None:
        """Atomic; the averaged weights are the checkpoint's model.

        Raises:
            FloatingPointError: weights are not finite; the checkpoint that was there stays.
        """
        for name, value in self.average.items():
            if not torch.isfinite(value).all():
                raise FloatingPointError(f"parameter {name} is not finite at step {self.step}, nothing was saved")
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        progress = {"step": self.step, "train_config": asdict(self.config)}
        save_checkpoint(
            directory,
            Checkpoint(self.model.config, self.average, self.preprocessing, self.data.labels),
            state,
            progress,
        )

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Begins with the weights of another run instead of random ones."""
        self.model.load_state_dict(state)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._teacher = None

    def resume(self, directory: Path, average: dict[str, Tensor]) -> None:
        """Continues a saved run exactly.

        Raises:
            CheckpointError: the run was made with other settings, so its continuation would be neither run.
        """
        state, progress = load_training_state(directory)
        # A setting that did not exist when the run was saved had its default.
        saved = asdict(TrainConfig()) | progress["train_config"]
        differing = {name: (saved[name], value) for name, value in asdict(self.config).items() if saved[name] != value}
        if differing:
            raise CheckpointError(f"{directory} was trained with other settings (saved, given): {differing}")
        if load_config(directory / "config.json") != self.model.config:
            raise CheckpointError(f"{directory} was trained with another model configuration, see its config.json")
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        optimizer: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                optimizer.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": groups})
        self.average = {name: value.to(self.device) for name, value in average.items()}
        self._teacher = None
        self.step = int(progress["step"])

    def _batch(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.data))
        start = position * self.config.batch_size
        batch = order[start : start + self.config.batch_size]
        return self.data.read(batch[self.shard.rows(self.config.batch_size).numpy()])

    def _operating_points(self, batch: int, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        model_config = self.model.config
        if model_config.moe is None or self.config.adaptive <= 0:
            return None, None
        full = model_config.operating_point
        assert full is not None
        # Drawn per routing group: images that share buffers share a point.
        group = model_config.moe.group_images
        uniform = torch.rand(3, batch // group, generator=generator).tolist()
        points = [
            OperatingPoint(
                self.config.adaptive_min_capacity_factor
                + (full.capacity_factor - self.config.adaptive_min_capacity_factor) * capacity,
                1 + int(choice * full.num_selected_experts),
            )
            if share < self.config.adaptive
            else full
            for share, capacity, choice in zip(*uniform, strict=True)
        ]
        slots = torch.tensor([model_config.slots(point) for point in points]).repeat_interleave(group, 0)
        num_selected = torch.tensor([p.num_selected_experts for p in points]).repeat_interleave(group, 0)
        rows = self.shard.rows(batch)
        return slots[rows].to(self.device), num_selected[rows].to(self.device)

    @torch.no_grad()
    def _distil(self, inputs: Tensor, targets: Tensor, slots: Tensor) -> Tensor:
        """Mixes the averaged model's answers into the targets (N, classes) of images that are not at the full point.

        One with a random point that happens to buy the full point's slots keeps its labels.
        """
        config = self.model.config
        assert config.operating_point is not None
        full = torch.tensor(config.slots(config.operating_point), device=self.device)
        rows = (slots < full).any(1).nonzero()[:, 0]
        if len(rows) == 0:
            return targets
        if self._teacher is None:
            # Shares the tensors of the average, so it is always as new as that.
            self._teacher = VisionTransformer(config).to(self.device).eval()
            self._teacher.load_state_dict(self.average, assign=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast == "bfloat16"):
            answers = self._teacher(inputs[rows]).logits.float().softmax(-1)
        mixed = targets.clone()
        mixed[rows] = torch.lerp(targets[rows], answers, self.config.distill)
        return mixed

    @torch.no_grad()
    def _update_average(self) -> None:
        # The average of few steps would be mostly the random start, so the decay grows to its value (as TensorFlow's).
        decay = min(self.config.average_decay, (1 + self.step) / (10 + self.step))
        names, current = zip(*self.model.state_dict().items(), strict=True)
        torch._foreach_lerp_([self.average[name] for name in names], list(current), 1 - decay)


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def mixup(
    images: Tensor, labels: Tensor, alpha: float, step: int, seed: int, shard: Shard = WHOLE
) -> tuple[Tensor, Tensor]:
    """Convex combination of the batch with itself in reverse order (1710.09412); one weight per image.

    Arguments:
        images: (N, H, W, C).
        labels: (N, classes) one-hot.
        shard: which part of the batch the images are.
    """
    total = len(images) * shard.count
    weight = np.random.default_rng([seed, step, 1]).beta(alpha, alpha, size=total).astype(np.float32)
    mix = torch.from_numpy(weight)[shard.rows(total)].to(images.device)
    image_mix, label_mix = mix[:, None, None, None], mix[:, None]
    return images * image_mix + images.flip(0) * (1 - image_mix), labels * label_mix + labels.flip(0) * (1 - label_mix)


def train(
    trainer: Trainer,
    directory: Path,
    *,
    evaluate: Callable[[VisionTransformer], dict[str, float]],
    progress: Callable[[int, dict[str, float]], None],
    save_every_s: float = SAVE_EVERY_S,
) -> None:
    """Runs to the end: a line of JSON per epoch in `log.jsonl`, a checkpoint every `save_every_s` and at the end.

    Of several processes the first one writes and evaluates.

    Arguments:
        evaluate: called with the averaged model at the end of each epoch; its values are logged.
        progress: called after every step with the step counter and the step's values.
    """
    last_save = start = time.monotonic()
    start_step = trainer.step
    if trainer.shard.rank > 0:
        for _ in _steps(trainer):
            pass
        return
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "log.jsonl").open("a") as log:
        for step, values in _steps(trainer):
            progress(step, values)
            if step % trainer.steps_per_epoch == 0:
                elapsed = time.monotonic() - start
                rate = (step - start_step) * trainer.config.batch_size / elapsed
                values |= {"epoch": step // trainer.steps_per_epoch, "step": step, "images_per_s": rate}
                values |= evaluate(trainer.averaged_model())
                _log(log, values)
            if time.monotonic() - last_save > save_every_s or step == trainer.num_steps:
                trainer.save(directory / "checkpoint")
                last_save = time.monotonic()


def _steps(trainer: Trainer) -> Iterator[tuple[int, dict[str, float]]]:
    while trainer.step < trainer.num_steps:
        values = trainer.run_step()
        yield trainer.step, values


def _log(log: IO[str], values: dict[str, Any]) -> None:
    log.write(json.dumps(values) + "\n")
    log.flush()
