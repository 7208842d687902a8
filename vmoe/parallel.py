"""Data-parallel training through torch.distributed: one process per device, started by torchrun.

Several processes compute what one would with the same batch: each draws the random numbers of the whole batch and keeps
those of its images, torch's DistributedDataParallel averages the gradients, and the sums over images behind the
auxiliary losses (importance, load) are taken over all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one of `count` processes works on."""

    rank: int = 0
    count: int = 1

    def rows(self, total: int) -> Tensor:
        """Which of `total` things in a row are this process's: (total / count,) int64.

        A piece and its mirror image, so that mixup, which pairs a batch with itself in reverse order, finds the
        partner of every image in the same process.

        Raises:
            ValueError: `total` cannot be shared out like that.
        """
        if self.count == 1:
            return torch.arange(total)
        if total % (2 * self.count):
            raise ValueError(
                f"{self.count} processes share a batch in halves: its {total} images or routing groups must be a "
                f"multiple of {2 * self.count}"
            )
        half = total // (2 * self.count)
        first = torch.arange(self.rank * half, (self.rank + 1) * half)
        return torch.cat([first, (total - 1 - first).flip(0)])

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, through which gradients flow."""
        return values if self.count == 1 else _Sum.apply(values, self.count)  # type: ignore[no-untyped-call]


WHOLE = Shard()


@contextmanager
def process_group(device: str) -> Iterator[Shard]:
    """Joins the processes that torchrun started; alone without torchrun.

    Arguments:
        device: `cuda` takes the GPU of this process's local rank, with NCCL; `cpu` works through gloo.
    """
    if not distributed.is_torchelastic_launched():
        yield WHOLE
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # torchrun's interface
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Shard(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


class _Sum(torch.autograd.Function):
    """All-reduce. Every process computes the same loss from the sum, so the gradient that arrives is the same in all;
    that of their added losses, which DistributedDataParallel divides by their number again, is `count` times as large.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, count: int) -> Tensor:
        ctx.count = count
        total = values.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.count, None
