"""What all processes of a cluster must have in common, to compare before they train."""

import hashlib
import inspect
import os
import pathlib
import platform
import sys
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from mpl.experiment import Experiment
from mpl.launch.config import RunConfig, fields_of
from mpl.launch.option import written
from mpl.launch.workdir import PER_COMMAND

_MPL = pathlib.Path(__file__).parents[1]


def facts_of(
    experiment_class: type[Experiment], config: RunConfig,
    record: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Returns settings, versions and digests of code by name.

    Args:
        experiment_class: what runs.
        config: its settings.
        record: what the flagfile of the run said before, if there is one.
    """
    names = [field.name for field in fields_of(type(config))]
    facts: dict[str, Any] = {f"--{name}": written(getattr(config, name))
                             for name in names if name not in PER_COMMAND}
    facts["--workdir"] = config.workdir and os.path.abspath(config.workdir)
    facts["flags in the workdir"] = record and _digest(str(sorted(record.items())))
    facts["Python"] = platform.python_version()
    facts |= {"TensorFlow": tf.__version__, "Keras": keras.__version__}
    sources = [_source(kind) for kind in experiment_class.__mro__]
    facts["code of the experiment"] = _digest(*filter(None, sources))
    facts["code of mpl"] = _digest(*[
        path.read_text() for path in sorted(_MPL.rglob("*.py"))])
    return facts


def _source(kind: type) -> str | None:
    """Returns the text of the file that defines a class, unless it is a library's."""
    module = sys.modules.get(kind.__module__)
    if module is None or kind.__module__.partition(".")[0] in ("mpl", "builtins"):
        return None
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):  # a notebook
        return None


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
