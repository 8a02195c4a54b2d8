"""metrics.jsonl: every figure of a run, one JSON object a line."""

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.record.goodput import Goodput


class MetricsWriter:
    """Adds the figures of each report to a file, for programs to read.

    A line holds `step`, `epoch` (steps ÷ batches per epoch), `split`, the values by
    name, `steps_per_sec` and `examples_per_sec`. What is not known, not measured or
    not finite is null. Of each step and split the last line stays. A reporter of the
    loop.

    Args:
        path: The file, made with its directory by the first line.
        global_batch_size: Examples a step.
        batches_per_epoch: Steps an epoch; None where the data has no known end.
        goodput: Gives `goodput`, `lost_steps`, `restarts` and `time` of train lines.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, global_batch_size: int,
        batches_per_epoch: int | None = None, goodput: Goodput | None = None,
    ):
        self.path = os.fspath(path)
        self._global_batch_size = global_batch_size
        self._batches_per_epoch = batches_per_epoch
        self._goodput = goodput

    def start(self, step: int, total_steps: int | None) -> None:
        """Deletes the lines of later steps, which a run resumed at `step` redoes."""
        self._keep(lambda key: key[0] <= step)
        if self._goodput:
            self._goodput.start(step)

    def _keep(self, condition: Callable[[tuple[float, str]], bool]) -> None:
        lines = []
        if tf.io.gfile.exists(self.path):
            with tf.io.gfile.GFile(self.path) as file:
                lines = file.read().splitlines()
        kept = [line for line in lines if condition(_key(line))]
        if kept != lines:
            with tf.io.gfile.GFile(f"{self.path}.tmp", "w") as file:
                file.write("".join(f"{line}\n" for line in kept))
            tf.io.gfile.rename(f"{self.path}.tmp", self.path, overwrite=True)

    def train(
        self, step: int, values: Mapping[str, Any], steps_per_sec: float | None
    ) -> None:
        """Writes what training steps since the last report came to."""
        if self._goodput:
            values = {**values, **self._goodput.train(step, steps_per_sec)}
        self._write(step, "train", values, steps_per_sec)

    def evaluation(self, step: int, split: str, values: Mapping[str, Any]) -> None:
        """Writes the result of one evaluation, in place of one at the same step."""
        self._keep(lambda key: key != (step, split) and key[0] < math.inf)
        self._write(step, split, values, values.get("steps_per_sec"))

    def note(self, step: int, text: str) -> None:
        """Writes what happened at a step, as the one value of the split "note"."""
        self._append({"step": step, "split": "note", "note": text})

    def finish(self, step: int) -> None:
        """Does nothing: each line is on disk when its report returns."""

    def _write(
        self, step: int, split: str, values: Mapping[str, Any],
        steps_per_sec: float | None,
    ) -> None:
        per_epoch, speed = self._batches_per_epoch, steps_per_sec
        line = {
            **{name: _number(value) for name, value in values.items()},
            "step": step,
            "epoch": round(step / per_epoch, 4) if per_epoch else None,
            "split": split,
            "steps_per_sec": _number(speed),
            "examples_per_sec": _number(speed and speed * self._global_batch_size),
        }
        first = {name: line[name] for name in ("step", "epoch", "split")}
        self._append({**first, **line})

    def _append(self, line: Mapping[str, Any]) -> None:
        tf.io.gfile.makedirs(os.path.dirname(self.path) or ".")
        with tf.io.gfile.GFile(self.path, "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def _number(value: Any) -> Any:
    """Returns a number or array as JSON can say it: NaN and infinities become None."""
    if np.ndim(value):
        return [_number(item) for item in value]
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, (int, np.integer)) else float(value)


def _key(line: str) -> tuple[float, str]:
    """Returns step and split; step infinity for a line whose writer died at it."""
    try:
        values = json.loads(line)
        return values["step"], values["split"]
    except (ValueError, KeyError, TypeError):
        return math.inf, ""
