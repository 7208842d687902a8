"""`python -m vmoe upcycle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmoe.architecture import Hints, parse_image_size
from vmoe.checkpoint import save_checkpoint
from vmoe.config import MoeConfig
from vmoe.options import MeanOption, OverwriteOption, StdOption
from vmoe.sources import load_source
from vmoe.terminal import check_output, clear_errors, console
from vmoe.train_cli import with_statistics
from vmoe.upcycle import ROUTER_STD, parse_layers
from vmoe.upcycle import upcycle as make_sparse


def upcycle(
    checkpoint: Annotated[
        Path, typer.Argument(help="A dense model: directory of `python -m vmoe train`, or state dict of a timm ViT.")
    ],
    output: Annotated[Path, typer.Option(help="Directory of the new checkpoint.")],
    num_experts: Annotated[int, typer.Option(min=1)] = 8,
    moe_layers: Annotated[str, typer.Option(help="last-N, every-N, or block numbers such as 1,3.")] = "every-2",
    num_selected_experts: Annotated[int, typer.Option(min=1, help="K of training.")] = 2,
    capacity_factor: Annotated[float, typer.Option(help="C of training.")] = 1.05,
    normalize: Annotated[
        bool,
        typer.Option(help="Combine weights of a token sum to 1; without, the model starts far from the dense one."),
    ] = True,
    router_std: Annotated[float, typer.Option(min=0, help="Of the router's first weights.")] = ROUTER_STD,
    seed: int = 0,
    config: Annotated[Path | None, typer.Option(help="Configuration of a state dict that does not tell it.")] = None,
    image_size: Annotated[str | None, typer.Option(help="H or HxW, where it is not the model's own.")] = None,
    mean: MeanOption = None,
    std: StdOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Makes a V-MoE of a trained dense ViT: every expert is a copy of the MLP that it replaces."""
    with clear_errors():
        check_output(output, overwrite=overwrite)
        hints = Hints(image_size=None if image_size is None else parse_image_size(image_size))
        dense = with_statistics(load_source(checkpoint, hints, config_path=config), mean, std)
        moe = MoeConfig(
            num_experts,
            parse_layers(moe_layers, dense.config.num_layers),
            num_selected_experts,
            capacity_factor,
            normalize_weights=normalize,
        )
        sparse = make_sparse(dense, moe, router_std=router_std, seed=seed)
        save_checkpoint(output, sparse)
        before, after = (sum(value.numel() for value in each.state.values()) for each in (dense, sparse))
        console.print(f"{output}: {before:,} parameters became {after:,}, experts in blocks {list(moe.layers)}")
