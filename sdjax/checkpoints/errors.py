"""What a broken checkpoint raises."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: the message names the file and everything that is wrong with it."""
