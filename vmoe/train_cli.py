"""`python -m vmoe train` and `finetune`: one loop, from random weights or from a checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from vmoe.architecture import Hints, parse_image_size
from vmoe.atomic_directory import recover_directory
from vmoe.checkpoint import Checkpoint, check_parameters, load_checkpoint
from vmoe.class_subset import choose_classes
from vmoe.config import VARIANTS, ConfigError, ModelConfig, Routing, load_config
from vmoe.data import FASHION_MNIST_DIRECTORY, FASHION_MNIST_MEAN, FASHION_MNIST_STD, LabelledImages, load_images
from vmoe.errors import CheckpointError
from vmoe.evaluate import evaluate as evaluate_points
from vmoe.finetune import FINE_TUNING, for_task
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.options import DataOption, MeanOption, StdOption
from vmoe.parallel import process_group
from vmoe.preprocess import Preprocessing, parse_channel_values
from vmoe.recipe_options import Recipe, recipe_options
from vmoe.sources import load_source
from vmoe.terminal import choose_device, clear_errors, count_progress
from vmoe.train import SAVE_EVERY_S, TrainConfig, Trainer
from vmoe.train import train as run_training

logger = logging.getLogger(__name__)

GLIMPSE = 2000  # test images looked at after each epoch: a full pass would take a tenth of the run

OutputOption = Annotated[Path, typer.Option(help="Directory of the run: checkpoint and log.jsonl.")]
ClassesOption = Annotated[
    str | None, typer.Option(help="Only these classes of the data, such as 0-4 or 0,2,5-7; the head fits them.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU when there is one.")]
ResumeOption = Annotated[bool, typer.Option(help="Continue the run in --output if it holds a checkpoint.")]
SaveEveryOption = Annotated[float, typer.Option(help="Seconds between checkpoints; the last step writes one, too.")]


@recipe_options(TrainConfig())
def train(
    output: OutputOption,
    data: DataOption = FASHION_MNIST_DIRECTORY,
    variant: Annotated[str, typer.Option(help=f"Named configuration: {', '.join(VARIANTS)}.")] = "vmoe_fashion_mnist",
    config: Annotated[Path | None, typer.Option(help="Model configuration (JSON) instead of a variant.")] = None,
    routing: Annotated[
        str | None, typer.Option(help="bpr or vanilla (the paper's training), instead of the configuration's.")
    ] = None,
    classes: ClassesOption = None,
    *,
    recipe: Recipe,
    start_from: Annotated[Path | None, typer.Option(help="Checkpoint whose weights the run begins with.")] = None,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    save_every: SaveEveryOption = SAVE_EVERY_S,
) -> None:
    """Trains a model; the averaged weights of the run end up in OUTPUT/checkpoint."""
    logging.basicConfig(level=logging.INFO)
    target = choose_device(device)
    with clear_errors(), process_group(target) as shard:
        if config is None and variant not in VARIANTS:
            raise typer.BadParameter(f"unknown variant {variant!r}; known are {', '.join(VARIANTS)}")
        settings = recipe.settings(device)
        model_config = VARIANTS[variant] if config is None else load_config(config)
        if routing is not None:
            model_config = _with_routing(model_config, routing)
        preprocessing = default_preprocessing(model_config)
        images, held_out = _load(data, preprocessing, classes)
        if classes is not None:
            model_config = replace(model_config, num_classes=len(images.labels))
        trainer = Trainer(model_config, settings, images, preprocessing, torch.device(target), shard)
        start = None if start_from is None else load_checkpoint(start_from)
        run_with_progress(trainer, output, held_out, start=start, resume=resume, save_every_s=save_every)


@recipe_options(FINE_TUNING)
def finetune(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Any that the exporter reads: ours, google-research/vmoe, timm and others."),
    ],
    output: OutputOption,
    data: DataOption = FASHION_MNIST_DIRECTORY,
    classes: ClassesOption = None,
    image_size: Annotated[
        str | None, typer.Option(help="H or HxW, where it is not the model's own: positions are interpolated.")
    ] = None,
    num_selected_experts: Annotated[int | None, typer.Option(min=1, help="K, instead of the checkpoint's.")] = None,
    capacity_factor: Annotated[
        float | None, typer.Option(help="C, instead of the checkpoint's; the reference fine-tunes with 1.5.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration of a source that does not tell it.")] = None,
    mean: MeanOption = None,
    std: StdOption = None,
    *,
    recipe: Recipe,
    device: DeviceOption = "auto",
    resume: ResumeOption = False,
    save_every: SaveEveryOption = SAVE_EVERY_S,
) -> None:
    """Trains all weights of CHECKPOINT on new data; the head starts anew where the classes are other ones."""
    logging.basicConfig(level=logging.INFO)
    target = choose_device(device)
    with clear_errors(), process_group(target) as shard:
        settings = recipe.settings(device)
        hints = Hints(
            image_size=None if image_size is None else parse_image_size(image_size),
            num_selected_experts=num_selected_experts,
            capacity_factor=capacity_factor,
        )
        source = with_statistics(load_source(checkpoint, hints, config_path=config), mean, std)
        images, held_out = _load(data, source.preprocessing, classes)
        start = for_task(source, images.labels)
        trainer = Trainer(start.config, settings, images, start.preprocessing, torch.device(target), shard)
        run_with_progress(trainer, output, held_out, start=start, resume=resume, save_every_s=save_every)


def default_preprocessing(config: ModelConfig) -> Preprocessing:
    """Fashion-MNIST's statistics for one channel, the value range -1..1 of the reference for three."""
    if config.channels == 1:
        return Preprocessing(config.image_size, 1, FASHION_MNIST_MEAN, FASHION_MNIST_STD)
    return Preprocessing(config.image_size, 3, (0.5,) * 3, (0.5,) * 3)


def with_statistics(checkpoint: Checkpoint, mean: str | None, std: str | None) -> Checkpoint:
    """The model with other pixel statistics, where they are given: state dicts do not tell theirs."""
    preprocessing = checkpoint.preprocessing.overridden(
        mean=None if mean is None else parse_channel_values(mean),
        std=None if std is None else parse_channel_values(std),
    )
    return replace(checkpoint, preprocessing=preprocessing)


def _load(data: Path, preprocessing: Preprocessing, classes: str | None) -> tuple[LabelledImages, LabelledImages]:
    """Training and test images of the chosen classes."""
    train_images, test_images = (
        choose_classes(load_images(data, preprocessing, train=part), classes) for part in (True, False)
    )
    return train_images, test_images


def _with_routing(config: ModelConfig, routing: str) -> ModelConfig:
    if config.moe is None:
        raise ConfigError(f"--routing {routing} needs a model with experts, this one is dense")
    order: Routing = "vanilla" if routing == "vanilla" else "bpr"
    if order != routing:
        raise ConfigError(f"--routing must be bpr or vanilla, got {routing!r}")
    return replace(config, moe=replace(config.moe, routing=order))


def run_with_progress(
    trainer: Trainer,
    output: Path,
    held_out: LabelledImages,
    *,
    start: Checkpoint | None,
    resume: bool,
    save_every_s: float = SAVE_EVERY_S,
) -> None:
    """Trains to the end with a progress bar.

    Raises:
        CheckpointError: `output` holds a checkpoint and the run is not to continue it; or `start` is another model.
    """
    checkpoint = output / "checkpoint"
    if trainer.shard.rank == 0 and recover_directory(checkpoint):
        logger.warning("%s was put back: the last run was killed while it replaced it", checkpoint)
    trainer.shard.wait()
    if checkpoint.exists() and not resume:
        raise CheckpointError(f"{checkpoint} exists: --resume continues its run, another --output leaves it alone")
    if checkpoint.exists():
        trainer.resume(checkpoint, load_checkpoint(checkpoint).state)
    elif start is not None:
        check_parameters({name: tuple(p.shape) for name, p in trainer.model.state_dict().items()}, start.state)
        trainer.start_from(start.state)
    config = trainer.model.config
    points: list[OperatingPoint | None] = [config.operating_point]
    if config.moe is not None:
        points.append(OperatingPoint(0.25, 1))

    def accuracies(model: VisionTransformer) -> dict[str, float]:
        found = evaluate_points(model, held_out, trainer.preprocessing, points, limit=GLIMPSE)
        return {"accuracy" if each.point is None else f"accuracy_{each.point}": each.accuracy for each in found}

    with count_progress(disable=trainer.shard.rank > 0) as bar:
        task = bar.add_task("train", total=trainer.num_steps, completed=trainer.step, status="")

        def report(step: int, values: dict[str, float]) -> None:
            status = f"loss {values['loss']:.3f}  accuracy {values['train_accuracy']:.3f}"
            bar.update(task, completed=step, status=status)

        run_training(trainer, output, evaluate=accuracies, progress=report, save_every_s=save_every_s)
