"""Command line of the vmoe package: train, evaluate and transfer."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from vmoe import fewshot_cli, upcycle_cli
from vmoe.analysis_cli import app as analysis
from vmoe.checkpoint import check_parameters, load_checkpoint
from vmoe.class_subset import choose_classes, match_classes
from vmoe.config import VARIANTS, ModelConfig, load_config
from vmoe.data import FASHION_MNIST_DIRECTORY, FASHION_MNIST_MEAN, FASHION_MNIST_STD, load_images
from vmoe.evaluate import evaluate as evaluate_points
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint, parse_point
from vmoe.preprocess import Preprocessing
from vmoe.terminal import choose_autocast, choose_device, clear_errors, console, count_progress
from vmoe.train import TrainConfig, Trainer
from vmoe.train import train as run_training

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train, evaluate and transfer V-MoE models.")
app.command("fewshot")(fewshot_cli.fewshot)
app.command("upcycle")(upcycle_cli.upcycle)
app.add_typer(analysis)
DEFAULTS = TrainConfig()

# The ladder that evaluation prints when none is given: from the cheapest useful point to beyond full capacity.
EVALUATION_POINTS = tuple(
    OperatingPoint(capacity_factor, k) for k in (1, 2) for capacity_factor in (0.125, 0.25, 0.5, 0.75, 1.0, 1.5)
)


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="Directory of the run: checkpoint and log.jsonl.")],
    data: Annotated[Path, typer.Option(help="IDX directory or image folder.")] = FASHION_MNIST_DIRECTORY,
    variant: Annotated[str, typer.Option(help=f"Named configuration: {', '.join(VARIANTS)}.")] = "vmoe_fashion_mnist",
    config: Annotated[Path | None, typer.Option(help="Model configuration (JSON) instead of a variant.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="Only these classes of the data, such as 0-4 or 0,2,5-7; the head fits them.")
    ] = None,
    epochs: int = DEFAULTS.epochs,
    batch_size: int = DEFAULTS.batch_size,
    learning_rate: float = DEFAULTS.learning_rate,
    warmup_steps: int = DEFAULTS.warmup_steps,
    weight_decay: float = DEFAULTS.weight_decay,
    label_smoothing: float = DEFAULTS.label_smoothing,
    mixup: Annotated[float, typer.Option(help="Alpha of the Beta distribution; 0 is off.")] = DEFAULTS.mixup,
    average_decay: Annotated[
        float, typer.Option(help="Decay of the weight average; 0 is off.")
    ] = DEFAULTS.average_decay,
    flip: Annotated[float, typer.Option(help="Augmentation: probability of a mirrored image.")] = DEFAULTS.flip,
    shift: Annotated[float, typer.Option(help="Augmentation: largest shift as a share of the side.")] = DEFAULTS.shift,
    scale: Annotated[float, typer.Option(help="Augmentation: largest zoom, ratio minus 1.")] = DEFAULTS.scale,
    erase: Annotated[float, typer.Option(help="Augmentation: probability of an erased rectangle.")] = DEFAULTS.erase,
    adaptive: Annotated[
        float, typer.Option(help="Share of images that get a random (C, K) in each step.")
    ] = DEFAULTS.adaptive,
    adaptive_min_capacity_factor: float = DEFAULTS.adaptive_min_capacity_factor,
    autocast: Annotated[str, typer.Option(help="bfloat16, none, or auto: bfloat16 where it is fast.")] = "auto",
    clip_norm: float = DEFAULTS.clip_norm,
    seed: int = DEFAULTS.seed,
    start_from: Annotated[Path | None, typer.Option(help="Checkpoint whose weights the run begins with.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU when there is one.")] = "auto",
    resume: Annotated[bool, typer.Option(help="Continue the run in --output if it holds a checkpoint.")] = False,
) -> None:
    """Trains a model; the averaged weights of the run end up in OUTPUT/checkpoint."""
    logging.basicConfig(level=logging.INFO)
    with clear_errors():
        if config is None and variant not in VARIANTS:
            raise typer.BadParameter(f"unknown variant {variant!r}; known are {', '.join(VARIANTS)}")
        settings = TrainConfig(
            epochs, batch_size, learning_rate, warmup_steps, weight_decay, label_smoothing, mixup, average_decay, flip,
            shift, scale, erase, adaptive, adaptive_min_capacity_factor, choose_autocast(autocast, device), clip_norm,
            seed,
        )  # fmt: skip
        model_config = VARIANTS[variant] if config is None else load_config(config)
        preprocessing = default_preprocessing(model_config)
        images, held_out = (
            choose_classes(load_images(data, preprocessing, train=part), classes) for part in (True, False)
        )
        if classes is not None:
            model_config = replace(model_config, num_classes=len(images.labels))
        trainer = Trainer(model_config, settings, images, preprocessing, torch.device(choose_device(device)))
        checkpoint = output / "checkpoint"
        if resume and checkpoint.exists():
            trainer.resume(checkpoint, load_checkpoint(checkpoint).state)
        elif start_from is not None:
            state = load_checkpoint(start_from).state
            check_parameters({name: tuple(p.shape) for name, p in trainer.model.state_dict().items()}, state)
            trainer.start_from(state)
        points = [model_config.operating_point]
        if model_config.moe is not None:
            points.append(OperatingPoint(0.25, 1))

        def accuracies(model: VisionTransformer) -> dict[str, float]:
            # A glimpse on 2,000 images: a full pass after every epoch would take a tenth of the run.
            found = evaluate_points(model, held_out, preprocessing, points, limit=2000)
            return {f"accuracy_{result.point}": result.accuracy for result in found}

        with count_progress() as bar:
            task = bar.add_task("train", total=trainer.num_steps, completed=trainer.step, status="")

            def report(step: int, values: dict[str, float]) -> None:
                status = f"loss {values['loss']:.3f}  accuracy {values['train_accuracy']:.3f}"
                bar.update(task, completed=step, status=status)

            run_training(trainer, output, evaluate=accuracies, progress=report)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Directory with model.safetensors and config.json.")],
    data: Annotated[Path, typer.Option(help="IDX directory or image folder.")] = FASHION_MNIST_DIRECTORY,
    point: Annotated[
        list[str] | None, typer.Option(help="Operating point as C,K (for example 0.25,1); repeat for several.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first images.")] = None,
    device: str = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results here.")] = None,
) -> None:
    """Prints top-1 accuracy and the share of assignments kept, per operating point."""
    with clear_errors():
        loaded = load_checkpoint(checkpoint)
        images = match_classes(load_images(data, loaded.preprocessing, train=False), loaded.labels)
        points: list[OperatingPoint | None] = [None]
        if loaded.config.moe is not None:
            points = [parse_point(text) for text in point] if point else list(EVALUATION_POINTS)
        model = loaded.model().to(choose_device(device))
        total = (len(images) if limit is None else min(limit, len(images))) * len(points)
        with count_progress() as bar:
            task = bar.add_task("evaluate", total=total, status="")
            results = evaluate_points(
                model, images, loaded.preprocessing, points, limit=limit, advance=lambda n: bar.advance(task, n)
            )
        table = Table("C", "K", "slots", "accuracy", "kept per MoE layer", title=f"{results[0].num_images} images")
        for result in results:
            c, k = (
                ("-", "-")
                if result.point is None
                else (f"{result.point.capacity_factor:g}", str(result.point.num_selected_experts))
            )
            slots = ", ".join(map(str, result.slots))
            table.add_row(c, k, slots, f"{100 * result.accuracy:.2f} %", "  ".join(f"{x:.3f}" for x in result.kept))
        console.print(table)
        if json_path is not None:
            json_path.write_text(json.dumps([asdict(result) for result in results], indent=2))


def default_preprocessing(config: ModelConfig) -> Preprocessing:
    """Fashion-MNIST's statistics for one channel, the value range -1..1 of the reference for three."""
    if config.channels == 1:
        return Preprocessing(config.image_size, 1, FASHION_MNIST_MEAN, FASHION_MNIST_STD)
    return Preprocessing(config.image_size, 3, (0.5,) * 3, (0.5,) * 3)
