"""What all processes of a cluster must have in common, to compare before they train."""

import hashlib
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

# What may differ between hosts; data are compared themselves.
_OF_A_HOST = (*PER_COMMAND, "data_dir")
_MPL = pathlib.Path(__file__).parents[1]


def identity_of(
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
                             for name in names if name not in _OF_A_HOST}
    path = config.workdir
    facts["--workdir"] = path if path and "://" in path else os.path.abspath(path or "")
    facts["flags in the workdir"] = record and _digest(
        str(sorted(record.items())).encode())
    facts["Python"] = platform.python_version()
    facts |= {"TensorFlow": tf.__version__, "Keras": keras.__version__}
    facts["code of the experiment"] = _digest(*_sources(experiment_class))
    facts["code of mpl"] = _digest(*[
        file.read_bytes() for file in sorted(_MPL.rglob("*.py"))])
    return facts


def _sources(experiment_class: type[Experiment]) -> list[bytes]:
    """Returns the files of the experiment's package, or folder, that are imported."""
    module = sys.modules.get(experiment_class.__module__)
    own = getattr(module, "__file__", None)
    if module is None or own is None:
        return []  # a notebook
    spec = module.__spec__
    package = (spec and spec.parent or "").partition(".")[0]
    files = {own}
    for name, other in list(sys.modules.items()):
        file = getattr(other, "__file__", None) or ""
        is_near = os.path.dirname(file) == os.path.dirname(own)
        if file.endswith(".py") and (
                name.partition(".")[0] == package if package else is_near):
            files.add(file)
    return [pathlib.Path(file).read_bytes() for file in sorted(files)]


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"\0".join(contents)).hexdigest()[:12]
