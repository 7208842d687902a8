"""The options of a recipe, for every command that trains by one: a field of `TrainConfig` is an option of each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final, get_type_hints

import typer

from vmoe.terminal import choose_autocast
from vmoe.train import TrainConfig

# Fields that their names say all of have none.
_HELP: Final = {
    "mixup": "Alpha of the Beta distribution; 0 is off.",
    "average_decay": "Decay of the weight average; 0 is off.",
    "flip": "Augmentation: probability of a mirrored image.",
    "shift": "Augmentation: largest shift as a share of the side.",
    "scale": "Augmentation: largest zoom, ratio minus 1.",
    "erase": "Augmentation: probability of an erased rectangle.",
    "adaptive": "Share of images that get a random (C, K) in each step.",
    "distill": "Share of the model's own answer at the full point in the targets of those images.",
    "autocast": "bfloat16, none, or auto: bfloat16 where it is fast.",
    "optimizer": "adamw or sgd (momentum 0.9).",
}


@dataclass(frozen=True)
class Recipe:
    """What the options say, unchecked."""

    values: Mapping[str, Any]

    def settings(self, device: str) -> TrainConfig:
        """Raises ValueError for values out of their ranges.

        Arguments:
            device: as given, see `choose_autocast`.
        """
        return TrainConfig(**{**self.values, "autocast": choose_autocast(self.values["autocast"], device)})


def recipe_options(defaults: TrainConfig) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command the options of a recipe where its parameter `recipe` stands.

    The command gets them as one `Recipe`, by keyword as everything else.

    Arguments:
        defaults: of the options; `autocast` is left to the device.
    """
    options = [_option(field.name, getattr(defaults, field.name)) for field in fields(TrainConfig)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            recipe = Recipe({option.name: values.pop(option.name) for option in options})
            command(**values, recipe=recipe)

        parameters: list[inspect.Parameter] = []
        signature = inspect.signature(command, eval_str=True)
        for parameter in signature.parameters.values():
            own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
            parameters += options if parameter.name == "recipe" else own
        # Typer reads these two.
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _option(name: str, default: Any) -> inspect.Parameter:
    annotation = get_type_hints(TrainConfig)[name]
    if name in _HELP:
        annotation = Annotated[annotation, typer.Option(help=_HELP[name])]
    default = "auto" if name == "autocast" else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
