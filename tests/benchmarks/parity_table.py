"""Worst difference from the reference's golden logits per case: `python -m tests.benchmarks.parity_table`."""

from __future__ import annotations

import numpy as np
import torch

from tests.exporter import test_upstream_parity as graph
from tests.vmoe import test_upstream_parity as pytorch
from tests.vmoe.upstream import CASES, Case


@torch.inference_mode()
def main() -> None:
    print("| case | settings | PyTorch | ONNX Runtime |\n| --- | --- | --- | --- |")
    for name in CASES:
        case = Case(name)
        settings = list(case.settings())
        configs = {setting.config for setting in settings}
        models = {config: case.checkpoint(config).model() for config in configs}
        sessions = {config: graph.open_graph(case, config) for config in configs}
        worst = [0.0, 0.0]
        for setting in settings:
            answers = (
                pytorch.run(models[setting.config], case, setting).logits.numpy(),
                graph.run(sessions[setting.config], case, setting)[0],
            )
            for index, logits in enumerate(answers):
                worst[index] = max(worst[index], float(np.abs(logits - setting.logits).max()))
        print(f"| `{name}` | {len(settings)} | {worst[0]:.1e} | {worst[1]:.1e} |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
