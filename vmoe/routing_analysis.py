"""Do experts specialise in classes, and more so the deeper the layer? The paper's analysis of its routers.

Axes: N images, L MoE layers, Y classes, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vmoe.checkpoint import Checkpoint
from vmoe.data import LabelledImages
from vmoe.evaluate import forward_passes
from vmoe.figure import new_figure
from vmoe.model import RoutingStatistics
from vmoe.operating_point import OperatingPoint

SHUFFLES = 20  # of the class labels, for the level of chance; its spread is far below what is looked for


@dataclass(frozen=True)
class LayerRouting:
    """One MoE layer.

    Attributes:
        block: index of the block.
        weights: (Y, E) mean combine weight that a token of a class gives to an expert; 0 where it was not processed.
        dependence: normalised mutual information of class and expert over the processed assignments, 0 to 1.
        chance: the same with the class labels shuffled among the images.
        load: (E,) share of the processed assignments.
        dropped: share of the assignments that found no slot.
        unserved: share of the tokens that no expert processed.
    """

    block: int
    weights: tuple[tuple[float, ...], ...]
    dependence: float
    chance: float
    load: tuple[float, ...]
    dropped: float
    unserved: float


def analyse_routing(
    loaded: Checkpoint,
    data: LabelledImages,
    point: OperatingPoint | None = None,
    *,
    limit: int | None = None,
    device: torch.device | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[LayerRouting]:
    """What the routers of a sparse model do with the images of each class; one entry per MoE layer.

    Every image is a routing group of its own.

    Arguments:
        data: numbered as the model numbers its classes.
        point: None takes the configured one.

    Raises:
        ValueError: the model is dense, has no such operating point, or there is no image.
    """
    moe = loaded.config.moe
    if moe is None:
        raise ValueError("the checkpoint is a dense model, which routes nothing: a sparse one is needed")
    point = point or loaded.config.operating_point
    total = len(data) if limit is None else min(limit, len(data))
    if total < 1:
        raise ValueError(f"no images to analyse: {len(data)} in the data set, limit {limit}")
    model = loaded.with_group_images(1).model().to(device)
    num_layers, num_classes = len(moe.layers), len(loaded.labels)
    load = np.zeros((total, num_layers, moe.num_experts))  # processed assignments
    weight = np.zeros((total, num_layers, moe.num_experts))
    kept, unserved, targets = np.zeros(num_layers), np.zeros(num_layers), np.zeros(total, dtype=np.int64)
    for done in forward_passes(model, data, loaded.preprocessing, [point], np.arange(total), advance=advance):
        statistics = done.output.statistics
        assert statistics is not None
        targets[done.indices] = done.targets
        load[done.indices] = statistics.expert_load.cpu().numpy()
        weight[done.indices] = _weights(statistics).cpu().numpy()
        kept += statistics.kept.double().sum(0).cpu().numpy()
        unserved += (statistics.processed == 0).double().mean(2).sum(0).cpu().numpy()
    classes = np.eye(num_classes)[targets]  # (N, Y)
    per_class = classes.sum(0)[:, None].clip(1)
    random = np.random.default_rng(0)
    shuffles = [random.permutation(total) for _ in range(SHUFFLES)]
    layers = []
    for layer, block in enumerate(moe.layers):
        chance = np.mean([normalised_mutual_information(classes[order].T @ load[:, layer]) for order in shuffles])
        sums = load[:, layer].sum(0)
        layers.append(
            LayerRouting(
                block,
                tuple(map(tuple, (classes.T @ weight[:, layer] / per_class).tolist())),
                normalised_mutual_information(classes.T @ load[:, layer]),
                float(chance),
                tuple((sums / sums.sum()).tolist()),
                float(1 - kept[layer] / total),
                float(unserved[layer] / total),
            )
        )
    return layers


def normalised_mutual_information(counts: npt.NDArray[np.float64]) -> float:
    """2 I(Y; E) / (H(Y) + H(E)) of a table of counts (Y, E): 0 when independent, 1 when each determines the other."""
    joint = counts / counts.sum()
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = _entropy(rows) + _entropy(columns)
    information = entropies - _entropy(joint.ravel())
    return float(max(0.0, 2 * information / entropies)) if entropies > 0 else 0.0


def seriation(table: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Orders of rows and columns that put alike ones side by side: the first axis of correspondence analysis.

    That axis is the leading singular pair of the table's deviations from independence, (p - r c) / sqrt(r c).
    """
    joint = table / table.sum()
    independent = np.outer(joint.sum(1), joint.sum(0)).clip(np.finfo(np.float64).tiny)
    left, _, right = np.linalg.svd((joint - independent) / np.sqrt(independent), full_matrices=False)
    return left[:, 0].argsort(kind="stable"), right[0].argsort(kind="stable")


def save_routing_figure(path: Path, layers: Sequence[LayerRouting], labels: Sequence[str]) -> None:
    """Heat maps of the first and the last MoE layer, classes down and experts across, both in the order of `seriation`.

    Raises:
        ValueError: the suffix of the path is no format, or matplotlib is not installed.
    """
    shown = [layers[0]] if len(layers) == 1 else [layers[0], layers[-1]]
    figure = new_figure((4.2 * len(shown), 1.6 + 0.2 * len(labels)))
    for axes, layer in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        table = np.array(layer.weights)
        rows, columns = seriation(table)
        picture = axes.imshow(table[np.ix_(rows, columns)], cmap="viridis", vmin=0, aspect="auto")
        axes.set_title(f"block {layer.block}: dependence {layer.dependence:.3f}", fontsize=9)
        axes.set_yticks(range(len(labels)), [labels[row] for row in rows], fontsize=7)
        axes.set_xticks(range(len(columns)), columns, fontsize=7)
        axes.set_xlabel("expert")
        figure.colorbar(picture, ax=axes, label="average routing weight")
    figure.savefig(path, dpi=90)


def _weights(statistics: RoutingStatistics) -> Tensor:
    """Mean over an image's tokens of the combine weight given to each expert, where processed: (N, L, E)."""
    layers = []
    for layer in statistics.layers:  # routing groups are images here
        assignment, zeros = layer.assignment, torch.zeros_like(layer.gates)
        per_token = zeros.scatter_add(-1, assignment.expert_index, assignment.weights * assignment.kept)
        layers.append(per_token.mean(1))
    return torch.stack(layers, 1)


def _entropy(probabilities: npt.NDArray[np.float64]) -> float:
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())
