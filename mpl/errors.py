"""Errors that users see: what is wrong, then what to do about it.

Every error takes two sentences. `cause` names the argument, its value and the rule
it breaks; `remedy` says what to write instead. Both are lines of the message.
"""


class _Joining(type):
    def __call__(cls, *lines: str) -> Exception:
        return super().__call__("\n".join(lines))


class _TwoLines(Exception, metaclass=_Joining):
    """An error whose message is a line of cause and a line of remedy."""

    # AutoGraph and Keras raise an error of user code anew, as type(error)(message),
    # and AutoGraph only where __init__ is Exception's own: so no __init__ here, and
    # one argument.
    __init__ = Exception.__init__

    @property
    def cause(self) -> str:
        return str(self).rpartition("\n")[0]

    @property
    def remedy(self) -> str:
        return str(self).rpartition("\n")[2]


class ConfigError(_TwoLines, ValueError):
    """A setting, an argument or a model that cannot work, found before anything ran."""


class CheckpointError(_TwoLines, RuntimeError):
    """A checkpoint that cannot be read, written, or does not fit the model."""


class ClusterError(_TwoLines, RuntimeError):
    """Devices or workers that are missing or disagree."""


class NonFiniteError(_TwoLines, ArithmeticError):
    """Too many steps in a row had an infinite or undefined gradient, loss or state."""


class Preempted(SystemExit):
    """A signal asked the run to end. It can go on; a program ends with code 42."""

    def __init__(self, message: str = ""):
        super().__init__(message)
        self.code = 42


def two_lines(error: BaseException) -> str:
    """Returns cause and remedy, without what AutoGraph and Keras wrote around them."""
    inner: BaseException | None = error
    message = str(error)
    while inner is not None:
        if isinstance(inner, _TwoLines):
            message = str(inner)
        inner = inner.__cause__ or inner.__context__
    return message
