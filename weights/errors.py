from p2p.weights.untrusted import printable


class CheckpointError(Exception):
    """A model file that cannot be used: says what was found in it and what to do. Names from files are made harmless here."""

    def __init__(self, message: object):
        super().__init__(printable(message))
