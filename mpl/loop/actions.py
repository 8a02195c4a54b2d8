"""Things to do after a block of steps or an evaluation.

An action is called with the output of the block or the evaluation. What an action must
remember is in variables: put it into the checkpoint, and a resumed run goes on alike.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from mpl.errors import ConfigError
from mpl.loop.inner_loop import counter

Action = Callable[[Any], Any]
Actions = Action | Sequence[Action]


class Conditional(tf.Module):
    """Calls actions when `condition(output)` is true."""

    def __init__(self, condition: Callable[[Any], Any], action: Actions):
        super().__init__()
        self.condition, self.action = condition, action

    def __call__(self, output: Any) -> None:
        if self.condition(output):
            for action in tf.nest.flatten(self.action):
                action(output)

    @property
    def stopped(self) -> bool:
        """Whether one of the actions has `stopped`."""
        actions = tf.nest.flatten(self.action)
        return any(getattr(action, "stopped", False) for action in actions)


class EverySteps(Conditional):
    """Calls actions once for each multiple of `interval` that `global_step` reaches.

    Blocks need not end at the multiples; one that passes several calls once.
    """

    def __init__(self, action: Actions, interval: int, global_step: tf.Variable):
        super().__init__(self._is_due, action)
        require_positive(interval=interval)
        self._interval, self._global_step, self._last = interval, global_step, counter()
        self._last.assign(global_step)

    def _is_due(self, output: Any) -> bool:
        step, last = int(self._global_step.numpy()), int(self._last.numpy())
        self._last.assign(step)
        return step // self._interval > last // self._interval


class EverySecs(Conditional):
    """Calls actions when `every_secs` have passed since it did, or since its making."""

    def __init__(
        self, action: Actions, every_secs: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(self._is_due, action)
        self._every_secs, self._clock, self._last = every_secs, clock, clock()

    def _is_due(self, output: Any) -> bool:
        is_due = self._clock() - self._last >= self._every_secs
        self._last = self._clock() if is_due else self._last
        return is_due


class NewBestMetric(tf.Module):
    """A condition: true when a metric is better than all before. NaN never is.

    Calling it keeps the new best value, as `commit` does. `test` does not: use it as
    the condition, and `commit` as the last of the actions, where the best counts only
    once they are done.

    Args:
        metric: Name of a number in the output, "validation/accuracy" for the accuracy
            of the evaluation set "validation"; or a function of the output.
        mode: "max" or "min", which is better.
    """

    def __init__(self, metric: str | Callable[[Any], Any], mode: str = "max"):
        super().__init__()
        if mode not in ("max", "min"):
            raise ConfigError(f"`mode` ({mode}) must be max or min.", "Use either.")
        self._metric, self._sign = metric, 1.0 if mode == "max" else -1.0
        worst = -self._sign * float("inf")
        self._best = tf.Variable(worst, trainable=False, dtype=tf.float64)

    @property
    def best_value(self) -> float:
        """The best value so far, ∓inf before the first."""
        return float(self._best.numpy())

    def metric_value(self, output: Any) -> float:
        """Returns the metric's value in an output."""
        if callable(self._metric):
            return float(self._metric(output))
        split, _, name = self._metric.partition("/")
        try:
            is_there = self._metric in output  # else in the output of its set
            return float(output[self._metric] if is_there else output[split][name])
        except (KeyError, TypeError):
            cause = f"`metric` ({self._metric}) is not in the output: {output!r}."
            remedy = "Name one that is, as `metric` or `set/metric`."
            raise ConfigError(cause, remedy) from None

    def test(self, output: Any) -> bool:
        """Returns whether the output's value is a new best."""
        return self._sign * self.metric_value(output) > self._sign * self.best_value

    def commit(self, output: Any) -> bool:
        """Returns whether the output's value is a new best, and keeps it if so."""
        is_best = self.test(output)
        if is_best:
            self._best.assign(self.metric_value(output))
        return is_best

    __call__ = commit


class EarlyStopping(tf.Module):
    """Ends training when a metric had no new best for `patience` evaluations.

    The controller asks `stopped` after its actions and before it trains, so a run that
    was resumed after it had stopped does not go on.

    Args:
        metric: As for `NewBestMetric`.
        patience: Evaluations in a row without a new best, 1 or more.
        mode: "max" or "min", which is better.
        stop: Called as well, once patience is at its end.
    """

    def __init__(
        self, metric: str | Callable[[Any], Any], patience: int, mode: str = "max",
        stop: Callable[[], Any] = lambda: None,
    ):
        super().__init__()
        require_positive(patience=patience)
        self.best, self._waited = NewBestMetric(metric, mode), counter()
        self._patience, self._stop = patience, stop

    def __call__(self, output: Any) -> None:
        self._waited.assign(0 if self.best(output) else self._waited + 1)
        if self.stopped:
            self._stop()

    @property
    def stopped(self) -> bool:
        """Whether patience is at its end."""
        return int(self._waited.numpy()) >= self._patience


class ExportSavedModel:
    """Exports a model to `directory/<step>`, a version as TensorFlow Serving takes it.

    A version appears whole or not at all.

    Args:
        export: Writes a SavedModel to a path: `model.export` of a Keras model,
            `functools.partial(tf.saved_model.save, module)`.
        directory: Where the versions are.
        global_step: Names the version.
        max_to_keep: How many of the last versions stay.
    """

    def __init__(
        self, export: Callable[[str], Any], directory: str | os.PathLike[str],
        *, global_step: tf.Variable, max_to_keep: int = 5,
    ):
        require_positive(max_to_keep=max_to_keep)
        self._export, self._directory = export, os.fspath(directory)
        self._global_step, self._max_to_keep = global_step, max_to_keep

    def __call__(self, output: Any) -> None:
        path = os.path.join(self._directory, str(self._global_step.numpy()))
        unfinished = os.path.join(self._directory, "unfinished")
        tf.io.gfile.makedirs(self._directory)
        for old in (unfinished, path):
            if tf.io.gfile.exists(old):
                tf.io.gfile.rmtree(old)
        self._export(unfinished)
        tf.io.gfile.rename(unfinished, path)
        names = [name.rstrip("/") for name in tf.io.gfile.listdir(self._directory)]
        steps = sorted(int(name) for name in names if name.isdigit())
        for step in steps[: -self._max_to_keep]:
            tf.io.gfile.rmtree(os.path.join(self._directory, str(step)))


def require_positive(**values: int | None) -> None:
    """Raises a ConfigError if a value is not a whole number, 1 or more, or None."""
    for name, value in values.items():
        if value is not None and (value < 1 or int(value) != value):
            cause = f"`{name}` ({value}) must be a whole number, 1 or more."
            raise ConfigError(cause, "Use 1 or more.")
