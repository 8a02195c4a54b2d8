"""Errors that users see: what is wrong, then what to do about it.

Every error takes two sentences. `cause` names the argument, its value and the rule
it breaks; `remedy` says what to write instead. Both are lines of the message.
"""


class _TwoLines(Exception):
    """An error whose message is a line of cause and a line of remedy."""

    def __init__(self, cause: str, remedy: str):
        super().__init__(f"{cause}\n{remedy}")
        self.cause = cause
        self.remedy = remedy


class ConfigError(_TwoLines, ValueError):
    """A setting, an argument or a model that cannot work, found before anything ran."""


class CheckpointError(_TwoLines, RuntimeError):
    """A checkpoint that cannot be read, written, or does not fit the model."""


class ClusterError(_TwoLines, RuntimeError):
    """Devices or workers that are missing or disagree."""


class NonFiniteError(_TwoLines, ArithmeticError):
    """Too many steps in a row had an infinite or undefined gradient, loss or state."""
