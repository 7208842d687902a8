"""One thread: the models of these tests are tiny, and waiting for a second thread at every operator is what would take
the time where the machine is busy (measured beside a training run: 59 s against 1 s for one case)."""

import torch

torch.set_num_threads(1)
