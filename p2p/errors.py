class UsageError(ValueError):
    """What was asked cannot be done: says what was found and what to do."""


class NumericsError(ArithmeticError):
    """A computation left the finite numbers: says at which stage."""
