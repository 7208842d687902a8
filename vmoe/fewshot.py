"""Few-shot transfer: frozen features and a linear head fitted in closed form to a few images per class.

The protocol of the paper (section 3.2, linear few-shot evaluation) as in `evaluators/fewshot_lsr.py` of
google-research/big_vision and `configs/common_fewshot.py` of google-research/vmoe: pre-logits, standardised per
feature with the mean and deviation of the shots; a constant column of 100, so that the bias is hardly regularised;
targets -1 and 1 per class; L2-regularised least squares. There the strength is fixed or read off the test set; here
it is chosen among the reference's 2^-10 .. 2^19 on validation images that are neither shots nor test images.

Axes: N images, F features, M classes, A regularisation strengths.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from vmoe.checkpoint import Checkpoint
from vmoe.data import DataError, LabelledImages
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.preprocess import Preprocessing, scale_and_offset

L2_STRENGTHS = tuple(2.0**power for power in range(-10, 20))  # the reference's
BIAS_CONSTANT = 100.0  # the reference's
EPSILON = 1e-5  # the reference's, for features that do not vary


@dataclass(frozen=True)
class Features:
    """Attributes:
    values: (N, F) float64.
    targets: (N,) int64.
    """

    values: Tensor
    targets: Tensor

    def at(self, indices: npt.NDArray[np.int64]) -> Features:
        chosen = torch.from_numpy(indices)
        return Features(self.values[chosen], self.targets[chosen])


@dataclass(frozen=True)
class Head:
    """Attributes:
    weight: (M, F).
    bias: (M,).
    """

    weight: Tensor
    bias: Tensor

    def logits(self, values: Tensor) -> Tensor:
        """(N, F) -> (N, M)."""
        return values @ self.weight.T + self.bias

    def accuracy(self, features: Features) -> float:
        return (self.logits(features.values).argmax(-1) == features.targets).double().mean().item()


@dataclass(frozen=True)
class FewShotResult:
    """Attributes:
    l2: strength with the best mean validation accuracy.
    accuracies: on the test images, one per seed.
    deviation: of the accuracies over the seeds, None for one seed.
    """

    shots: int
    l2: float
    accuracies: tuple[float, ...]
    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Draws:
    """Which training images are used.

    Attributes:
        validation: (N,) indices that choose the strength, the same for every seed.
        shots: per seed (M, largest number of shots) indices; fewer shots are the first columns.
    """

    validation: npt.NDArray[np.int64]
    shots: tuple[npt.NDArray[np.int64], ...]


@dataclass(frozen=True)
class Transfer:
    """Attributes:
    results: one per number of shots, ascending.
    head: of the first seed and the most shots.
    """

    results: tuple[FewShotResult, ...]
    head: Head
    validation: Features
    test: Features


def few_shot(
    checkpoint: Checkpoint,
    train: LabelledImages,
    test: LabelledImages,
    shots: Sequence[int],
    seeds: int,
    validation_per_class: int,
    *,
    point: OperatingPoint | None = None,
    limit: int | None = None,
    device: torch.device,
    advance: Callable[..., None] = lambda **fields: None,
) -> Transfer:
    """The whole protocol for one backbone.

    Arguments:
        train, test: of the same classes.
        shots: images per class, ascending.
        point: None takes the checkpoint's own; a dense model has none.
        limit: only the first test images.
        advance: called with `total` or `advance`, as rich's `Progress.update`.

    Raises:
        DataError: train and test have other classes, or a class has too few images.
    """
    if train.labels != test.labels:
        raise DataError(f"the classes of training and test images differ: {train.labels} and {test.labels}")
    draws = draw(train.targets, len(train.labels), shots[-1], seeds, validation_per_class)
    used = np.unique(np.concatenate([draws.validation, *(rows.reshape(-1) for rows in draws.shots)]))
    test_indices = np.arange(len(test) if limit is None else min(limit, len(test)))
    advance(total=len(used) + len(test_indices))
    model = checkpoint.with_group_images(1).model().to(device)
    if model.config.moe is None:
        point = None
    elif point is None:
        point = model.config.operating_point
    features, test_features = (
        extract_features(model, data, checkpoint.preprocessing, indices, point, advance=advance)
        for data, indices in ((train, used), (test, test_indices))
    )
    validation = features.at(np.searchsorted(used, draws.validation))
    rows = [np.searchsorted(used, of_seed) for of_seed in draws.shots]
    found = [
        evaluate_shots(features, validation, test_features, [of_seed[:, :count] for of_seed in rows]) for count in shots
    ]
    return Transfer(tuple(result for result, _ in found), found[-1][1], validation, test_features)


@torch.inference_mode()
def extract_features(
    model: VisionTransformer,
    data: LabelledImages,
    preprocessing: Preprocessing,
    indices: npt.NDArray[np.int64],
    point: OperatingPoint | None,
    *,
    batch_size: int = 250,
    advance: Callable[..., None] = lambda **fields: None,
) -> Features:
    """What the head sees, for some images of a data set.

    Arguments:
        model: in evaluation mode, with one image per routing group.
        point: None for a dense model.
        advance: see `few_shot`.
    """
    device = model.head.weight.device
    scale, offset = (torch.from_numpy(a).to(device) for a in scale_and_offset(preprocessing))
    values, targets = [], []
    for start in range(0, len(indices), batch_size):
        images, numbers = data.read(indices[start : start + batch_size])
        inputs = torch.from_numpy(images).to(device).float() * scale + offset
        tensors = (None, None) if point is None else model.operating_point_tensors(point, len(images))
        values.append(model(inputs, *tensors).features.double().cpu())
        targets.append(torch.from_numpy(numbers))
        advance(advance=len(images))
    return Features(torch.cat(values), torch.cat(targets))


def draw(targets: npt.NDArray[np.int64], num_classes: int, shots: int, seeds: int, validation_per_class: int) -> Draws:
    """Validation images and shots of every class, by generators seeded per seed.

    Raises:
        DataError: a class has too few images.
    """
    validation, pools = [], []
    for index in range(num_classes):
        of_class = np.random.default_rng([index, 0]).permutation(np.flatnonzero(targets == index))
        if len(of_class) < validation_per_class + shots:
            raise DataError(
                f"class {index} has {len(of_class)} training images, {shots} shots and {validation_per_class} images "
                "for validation are needed"
            )
        validation.append(of_class[:validation_per_class])
        pools.append(of_class[validation_per_class:])
    chosen = []
    for seed in range(seeds):
        generators = [np.random.default_rng([index, 1 + seed]) for index in range(num_classes)]
        rows = [generator.permutation(pool)[:shots] for generator, pool in zip(generators, pools, strict=True)]
        chosen.append(np.stack(rows))
    return Draws(np.concatenate(validation), tuple(chosen))


def fit_heads(shots: Features, num_classes: int, strengths: Sequence[float] = L2_STRENGTHS) -> list[Head]:
    """The least-squares head of every strength: minimises |X W - Y|^2 + l2 |W|^2, standardisation folded in.

    With X (N, F + 1) and N below F + 1 the solution is X^T (X X^T + l2)^-1 Y, else (X^T X + l2)^-1 X^T Y; one
    eigendecomposition serves all A strengths.
    """
    mean = shots.values.mean(0)
    deviation = shots.values.std(0, correction=0) + EPSILON
    x = functional.pad((shots.values - mean) / deviation, (0, 1), value=BIAS_CONSTANT)
    y = 2 * functional.one_hot(shots.targets, num_classes).double() - 1
    if len(x) < x.shape[1]:
        eigenvalues, vectors = torch.linalg.eigh(x @ x.T)
        left, right = x.T @ vectors, vectors.T @ y
    else:
        eigenvalues, vectors = torch.linalg.eigh(x.T @ x)
        left, right = vectors, vectors.T @ (x.T @ y)
    heads = []
    for strength in strengths:
        solution = (left / (eigenvalues + strength)) @ right  # (F + 1, M)
        weight = (solution[:-1] / deviation[:, None]).T
        heads.append(Head(weight, solution[-1] * BIAS_CONSTANT - weight @ mean))
    return heads


def evaluate_shots(
    train: Features,
    validation: Features,
    test: Features,
    shots: Sequence[npt.NDArray[np.int64]],
    strengths: Sequence[float] = L2_STRENGTHS,
) -> tuple[FewShotResult, Head]:
    """Accuracy over the seeds at one number of shots, and the head of the first seed.

    Arguments:
        shots: per seed (M, shots), rows of `train`.
    """
    fitted = [fit_heads(train.at(rows.reshape(-1)), len(rows), strengths) for rows in shots]
    scores = [[head.accuracy(validation) for head in heads] for heads in fitted]
    best = int(np.mean(scores, axis=0).argmax())
    accuracies = tuple(heads[best].accuracy(test) for heads in fitted)
    deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    result = FewShotResult(shots[0].shape[1], strengths[best], accuracies, statistics.mean(accuracies), deviation)
    return result, fitted[0][best]


def calibrated(head: Head, validation: Features) -> Head:
    """The head with its logits scaled so that their softmax fits the validation images (temperature, 1706.04599).

    Least squares aims at -1 and 1, which a softmax would turn into nearly even probabilities. Answers stay the same.
    Each class gets one imagined image under every answer (Laplace's rule), or validation images that are all right
    would ask for infinite logits.
    """
    logits = head.logits(validation.values)
    factors = torch.logspace(-1, 3, 81, dtype=torch.float64)  # steps of 12 %
    num_images, num_classes = logits.shape
    smoothing = num_classes / (num_images + num_classes)
    losses = [
        functional.cross_entropy(logits * factor, validation.targets, label_smoothing=smoothing).item()
        for factor in factors
    ]
    factor = factors[int(np.argmin(losses))]
    return Head(head.weight * factor, head.bias * factor)


def with_head(checkpoint: Checkpoint, head: Head, labels: tuple[str, ...]) -> Checkpoint:
    """The backbone of a checkpoint with a new head for other classes."""
    state = checkpoint.state | {"head.weight": head.weight.float(), "head.bias": head.bias.float()}
    return replace(checkpoint, config=replace(checkpoint.config, num_classes=len(labels)), state=state, labels=labels)
