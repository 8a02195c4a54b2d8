"""What to type next."""

import os
import shlex
import sys
from typing import Any

import tensorflow as tf

from mpl.experiment import Experiment
from mpl.launch.option import written

_FILES = (
    "flagfile.txt", "metrics.jsonl", "checkpoints", "summaries", "profile", "export",
    "predictions.npz",
)  # fmt: skip

_OF_A_COMMAND = ("input", "output", "export_weights")


def python() -> str:
    """Returns the path of this Python, relative where it lies below this folder."""
    path = os.path.relpath(sys.executable)  # not resolved: in .venv it is a link
    return sys.executable if path.startswith("..") else path


class Guide:
    """Says where the files of a run lie, and what to type next.

    Args:
        experiment: set up.
        path: folder of the run.
        start: command that starts the program; None: in a notebook.

    Attributes:
        stopped_early: whether training would stop at once if it went on.
    """

    def __init__(self, experiment: Experiment, path: str, start: str | None):
        self._config, self._name = experiment.config, type(experiment).__name__
        self._path, self._start, self.stopped_early = path, start, False

    def command(self, **settings: Any) -> str:
        """Returns what to type to use this run's folder with these settings."""
        mode, default = self._config.mode, type(self._config).mode
        same = {} if mode == default else {"mode": mode}
        settings = {"workdir": self._path, **same, **settings}
        if self._start is None:
            shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            return f"mpl.run({self._name}, {shown})"
        words = [f"--{name}={written(value)}" for name, value in settings.items()]
        return f"{self._start} {shlex.join(words)}"

    def again(self) -> str:
        """Returns what to type to do the same again."""
        given = {name: getattr(self._config, name) for name in _OF_A_COMMAND}
        default = type(self._config)
        return self.command(**{
            name: value for name, value in given.items()
            if value != getattr(default, name)})

    def __str__(self) -> str:
        unit = "train_steps" if self._config.train_steps else "train_epochs"
        longer: dict[str, Any] = {unit: 2 * (getattr(self._config, unit) or 1)}
        if self._config.lr_schedule != "constant":
            longer["allow_changed_flags"] = True
        if self.stopped_early:
            longer["early_stop"] = None
        paths = {name: os.path.join(self._path, name) for name in _FILES}
        there = [name for name, path in paths.items() if tf.io.gfile.exists(path)]
        curves = f"{python()} -m pip install tensorboard  # then train again"
        if "summaries" in there:
            summaries = shlex.quote(paths["summaries"])
            curves = f"{python()} -m tensorboard.main --logdir={summaries}"
        return (
            f"Files:    {', '.join(there)} in {self._path}\n"
            f"Resume:   {self.command(**longer)}\n"
            f"Curves:   {curves}\n"
            f"Evaluate: {self.command(mode='eval')}\n"
            f"Predict:  {self.command(mode='predict')}"
        )
