class CheckpointError(Exception):
    """A model file that cannot be used: says what was found in it and what to do."""
