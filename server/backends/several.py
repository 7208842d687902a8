"""Several bundles of one model in this process: the images of a batch run on the bundle of their rung, one bundle after
the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from server.backends.base import Backend, Batch, Outputs


class SeveralBackends:
    """Arguments:
    backends: by the name that `Batch.models` has.
    """

    num_workers = 1  # those of the bundles would fight each other for the cores
    floors_only = False
    cancellable = False

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends = dict(backends)

    async def start(self, changed: Callable[[], None]) -> None:
        for backend in self._backends.values():
            await backend.start(changed)

    async def infer(self, batch: Batch) -> Outputs:
        models = np.array(batch.models)
        places, parts = [], []
        for model in dict.fromkeys(batch.models):
            rows = np.flatnonzero(models == model)
            part = replace(
                batch,
                images=batch.images[rows],
                slots=batch.slots[rows],
                num_selected_experts=batch.num_selected_experts[rows],
                models=(model,) * len(rows),
            )
            parts.append(await self._backends[model].infer(part))
            places.append(rows)
        if len(parts) == 1:
            return parts[0]
        order = np.argsort(np.concatenate(places))
        explained = [part.token_experts for part in parts if part.token_experts is not None]
        return Outputs(
            logits=np.concatenate([part.logits for part in parts])[order],
            kept=np.concatenate([part.kept for part in parts])[order],
            expert_load=np.concatenate([part.expert_load for part in parts])[order],
            token_experts=np.concatenate(explained)[order] if explained else None,
        )

    async def close(self) -> None:
        for backend in self._backends.values():
            await backend.close()
