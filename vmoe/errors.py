"""The errors of this package. No torch here: the checkpoint readers need none.

ValueError
└── CheckpointError     a checkpoint that cannot be read, or does not fit the model
"""


class CheckpointError(ValueError):
    """The message names the file and, where there is one, the parameter; the value seen; and what would be right."""
