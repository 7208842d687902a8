"""Checkpoints of google-research/vmoe, read without JAX and without torch.

`PREFIX.index` and `PREFIX.data-NNNNN-of-NNNNN` -> `cursor` (msgpack, one header at a time) -> `index` (which chunks
make up a parameter, and where they are) -> `parameters` (float32 arrays by name).

The format is described in tests/data/upstream/README.md; upstream's own reader is `vmoe/checkpoints/partitioned.py`.
"""

from vmoe.flax.index import StoredArray
from vmoe.flax.parameters import read_parameters, tree_shapes

__all__ = ["StoredArray", "read_parameters", "tree_shapes"]
