from p2p.weights.untrusted import printable


class CheckpointError(Exception):
    """A model file that cannot be used: the message says what was found and what to do, with names from files
    escaped."""

    def __init__(self, message: object):
        super().__init__(printable(message))
