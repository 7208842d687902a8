"""Fine-tuning: a trained model on a new task, all weights.

What the reference does (`initialization` and the `_ft_` configurations of vmoe/configs/vmoe_paper): the head starts
anew, learned positions are interpolated to the new resolution (`vmoe.positions`; fixed ones are computed for it), SGD
with momentum 0.9, no weight decay, a cosine from 0.003, gradients clipped at 10, a capacity factor of 1.5. The rest of
the run is `vmoe.train`.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from vmoe.checkpoint import Checkpoint
from vmoe.train import TrainConfig

# Optimiser, rate, decay and clipping as in the reference; length, warm-up and average are chosen for small data sets.
FINE_TUNING = TrainConfig(
    epochs=5,
    optimizer="sgd",
    learning_rate=0.003,
    warmup_steps=100,
    weight_decay=0.0,
    label_smoothing=0.0,
    average_decay=0.99,
    flip=0.0,
    shift=0.0,
    scale=0.0,
    erase=0.0,
    clip_norm=10.0,
)


def for_task(checkpoint: Checkpoint, labels: tuple[str, ...]) -> Checkpoint:
    """The model with a head for other classes, which starts at zero; with the same classes it keeps its head."""
    if labels == checkpoint.labels:
        return checkpoint
    weight = checkpoint.state["head.weight"]
    head = {"head.weight": weight.new_zeros(len(labels), weight.shape[1]), "head.bias": torch.zeros(len(labels))}
    return replace(
        checkpoint,
        config=replace(checkpoint.config, num_classes=len(labels)),
        state=checkpoint.state | head,
        labels=labels,
    )
