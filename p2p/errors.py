"""What a caller may catch."""
from p2p.weights.errors import CheckpointError
from p2p.weights.untrusted import printable

__all__ = ["CheckpointError", "NumericsError", "UsageError"]


class UsageError(ValueError):
    """What was asked cannot be done: says what was found and what to do. What came from files is
    made harmless here."""

    def __init__(self, message: object):
        super().__init__(printable(message))


class NumericsError(ArithmeticError):
    """A computation left the finite numbers: says at which stage."""
