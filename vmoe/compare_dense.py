"""V-MoE against the dense ViT of the same backbone: runs of one recipe, their accuracy and their operations.

Operations are counted by torch's FlopCounterMode, two per multiply-accumulate: of inference by `vmoe.flops` with every
slot filled, of training on one real step forward and backward, times the number of steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vmoe.config import VARIANTS, ModelConfig, every_layers
from vmoe.data import LabelledImages
from vmoe.evaluate import evaluate
from vmoe.flops import flops_per_image
from vmoe.moe import MoeMlp
from vmoe.operating_point import OperatingPoint
from vmoe.train import TrainConfig, Trainer

Kind = Literal["dense", "sparse"]

# Two passes over Fashion-MNIST, nearly plain images: what 2 shared cores can repeat for several seeds within an hour.
RECIPE = TrainConfig(
    epochs=2,
    learning_rate=1.2e-3,
    warmup_steps=200,
    average_decay=0.995,
    flip=0.0,
    shift=0.02,
    scale=0.02,
    erase=0.0,
)
LADDER = tuple(OperatingPoint(c, k) for c, k in ((0.25, 1), (0.5, 1), (1.0, 1), (0.5, 2), (1.0, 2)))


@dataclass(frozen=True)
class Run:
    """A model to train: the comparison has one per kind, width and seed."""

    kind: Kind
    width: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.width}-seed{self.seed}"

    def model_config(self, num_classes: int, blocks: int) -> ModelConfig:
        """The shipped model's architecture at another width and depth, with experts or without."""
        base = VARIANTS["vmoe_fashion_mnist"]
        assert base.moe is not None
        moe = replace(base.moe, layers=every_layers(blocks, 2)) if self.kind == "sparse" else None
        return replace(
            base, num_classes=num_classes, hidden_size=self.width, mlp_dim=2 * self.width, num_layers=blocks, moe=moe
        )


@dataclass(frozen=True)
class Measured:
    """Attributes:
    point: None for a dense model.
    accuracy: over the test images, between 0 and 1.
    inference_flops: per image.
    training_flops: of the whole run.
    """

    run: Run
    point: OperatingPoint | None
    accuracy: float
    inference_flops: int
    training_flops: int
    parameters: int
    num_images: int


@dataclass(frozen=True)
class Summary:
    """Mean over the seeds of one kind, width and point.

    Attributes:
        deviation: of the accuracies, None for one seed.
    """

    kind: Kind
    width: int
    point: OperatingPoint | None
    accuracy: float
    deviation: float | None
    inference_flops: float
    training_flops: float
    parameters: int
    num_seeds: int


def all_runs(widths: Sequence[int], seeds: int) -> list[Run]:
    """Seed by seed, so that a comparison that is stopped has whole pairs."""
    kinds: tuple[Kind, ...] = ("dense", "sparse")
    return [Run(kind, width, seed) for seed in range(seeds) for width in widths for kind in kinds]


def measure(
    run: Run,
    trainer: Trainer,
    held_out: LabelledImages,
    *,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Measured]:
    """Accuracy and operations of a finished run, at every point of the ladder.

    Arguments:
        advance: called with the number of images done, once per point.
    """
    model = trainer.averaged_model()
    points: list[OperatingPoint | None] = [None] if run.kind == "dense" else list(LADDER)
    found = evaluate(model, held_out, trainer.preprocessing, points, limit=limit, advance=advance)
    training = training_flops(trainer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        Measured(
            run,
            each.point,
            each.accuracy,
            flops_per_image(model.config, each.point),
            training,
            parameters,
            each.num_images,
        )
        for each in found
    ]


def training_flops(trainer: Trainer) -> int:
    """Operations of the whole run of a trainer, which is left as it was: one step of a copy, times their number."""
    copy = Trainer(
        trainer.model.config,
        replace(trainer.config, autocast="none"),
        trainer.data,
        trainer.preprocessing,
        torch.device("cpu"),
    )
    copy.start_from({name: value.cpu() for name, value in trainer.average.items()})
    for module in copy.model.modules():
        if isinstance(module, MoeMlp):
            module.rows_multiple = 1  # padding is no work that the model needs
    # The fused attention of the CPU is not in the counter's table; its plain form is.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        copy.run_step()
    return int(counter.get_total_flops()) * trainer.num_steps


def summarise(measured: Sequence[Measured]) -> list[Summary]:
    """In the order in which kind, width and point first occur."""
    groups: dict[tuple[Kind, int, OperatingPoint | None], list[Measured]] = {}
    for each in measured:
        groups.setdefault((each.run.kind, each.run.width, each.point), []).append(each)
    return [
        Summary(
            kind,
            width,
            point,
            statistics.mean(each.accuracy for each in group),
            statistics.stdev(each.accuracy for each in group) if len(group) > 1 else None,
            statistics.mean(each.inference_flops for each in group),
            statistics.mean(each.training_flops for each in group),
            group[0].parameters,
            len(group),
        )
        for (kind, width, point), group in groups.items()
    ]
