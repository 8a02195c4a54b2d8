"""What a run has left in its folder: its flags, and its figures step by step."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.launch import workdir

LOG = "metrics.jsonl"
EVALUATIONS = ("validation", "test")
# What a line says besides metrics.
_FACTS = frozenset((
    "step", "epoch", "split", "steps_per_sec", "examples_per_sec", "loss_scale",
    "applied_steps", "skipped_steps", "grad_norm", "learning_rate", "goodput",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    Attributes:
        path: the folder.
        name: what it is called beside others.
        flags: texts of its flagfile by name; empty where there is none.
        lines: of metrics.jsonl, in the file's order.
    """

    path: str
    name: str
    flags: dict[str, str]
    lines: list[dict[str, Any]]

    def curve(self, split: str, name: str) -> tuple[list[int], list[float]]:
        """Returns steps in order and the numbers there; NaN for what is null."""
        points = [
            (line["step"], math.nan if line[name] is None else line[name])
            for line in self.lines
            if line["split"] == split and _is_number(line.get(name, []))
        ]
        points.sort(key=lambda point: point[0])
        return [step for step, _ in points], [value for _, value in points]

    def last(self, split: str, name: str) -> float:
        """Returns the number written last; NaN if there is none."""
        values = (n[name] for n in reversed(self.lines)
                  if n["split"] == split and name in n)
        value = next(values, None)
        return math.nan if value is None or not _is_number(value) else value

    @property
    def metrics(self) -> list[str]:
        """Names of the numbers of its evaluations, or else of its training."""
        lines = [line for line in self.lines if line["split"] in EVALUATIONS]
        names = dict.fromkeys(
            name for line in lines or self.lines for name, value in line.items()
            if name not in _FACTS and _is_number(value))
        return list(names)

    def split(self, *preferred: str) -> str:
        """Returns the first of these splits that the run has; else "train"."""
        there = {line["split"] for line in self.lines}
        return next((split for split in preferred if split in there), "train")

    def training_secs(self, steps: Sequence[int]) -> np.ndarray:
        """Returns seconds of training up to each of these steps; NaN: not known.

        They are those in blocks of steps: steps ÷ `steps_per_sec`, from line to line.
        So they go on over restarts; the time between, and of steps that were lost and
        redone, does not count. Tracing counts, evaluation and saving do not.
        """
        ends, speeds = self.curve("train", "steps_per_sec")
        if not ends:
            return np.full(len(steps), math.nan)
        secs = np.cumsum(np.diff(ends, prepend=0) / np.asarray(speeds))
        return np.interp(steps, [0, *ends], [0, *secs])


def load(path: str, name: str | None = None) -> Run:
    """Reads a run's folder.

    A last line that was not written to its end is passed over.

    Args:
        path: the folder, local or another that `tf.io.gfile` reads.
        name: what to call the run; None: its path.

    Raises:
        ConfigError: there is no such folder, no metrics.jsonl, or a damaged line in it.
    """
    path = path.rstrip("/") or path
    file = os.path.join(path, LOG)
    if not tf.io.gfile.exists(file):
        there = tf.io.gfile.isdir(path)
        what = f"it holds no {LOG}" if there else "there is no such folder"
        raise ConfigError(
            f"`{path}` is not the folder of a run: {what}.",
            "Give the folder that the run printed, such as runs/digits/latest.",
        )
    flags = {}
    if tf.io.gfile.exists(os.path.join(path, workdir.FLAGFILE)):
        flags = workdir.read_flagfile(path)
    return Run(path, name or path, flags, _lines(file))


def _lines(file: str) -> list[dict[str, Any]]:
    with tf.io.gfile.GFile(file, "rb") as content:
        *texts, torn = content.read().split(b"\n")
    lines = [_line(text) for text in texts]
    if None in lines:
        raise ConfigError(
            f"Line {lines.index(None) + 1} of `{file}` is damaged: it is no JSON "
            "object with a step and a split.",
            "Delete that line, or put the file back from a copy.",
        )
    last = _line(torn)  # whole, but for its end, or still being written
    found = [line for line in [*lines, last] if line]
    if not found:
        cause = f"`{file}` has no line yet."
        raise ConfigError(cause, "Wait for the run's first report.")
    return found


def _line(text: bytes) -> dict[str, Any] | None:
    """Returns what a line says; None: it is damaged."""
    try:
        line = json.loads(text)
        whole = isinstance(line["step"], int) and isinstance(line["split"], str)
    except (ValueError, KeyError, TypeError):
        return None
    return line if whole else None


def common_metrics(runs: Sequence[Run]) -> list[str]:
    """Returns the metrics that all of the runs have, the loss last.

    Raises:
        ConfigError: there is none.
    """
    first, *others = runs
    names = [n for n in first.metrics if all(n in other.metrics for other in others)]
    if not names:
        have = "; ".join(f"{r.name}: {', '.join(r.metrics) or 'none'}" for r in runs)
        cause = f"The runs have no metric in common ({have})."
        raise ConfigError(cause, "Give runs of one experiment.")
    return sorted(names, key=lambda name: name == "loss")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)  # null is NaN
