"""A TensorFlow profile of some steps of a training."""

import contextlib
import importlib.util
import shlex
import sys
from collections.abc import Iterator

import tensorflow as tf
from absl import logging

from mpl.launch.config import parse_profile_steps


class Profile:
    """Profiles exactly the steps FIRST to LAST; a watch of `ExperimentTrainer`.

    Whatever happens between two blocks of them, such as an evaluation, is in the trace.

    Args:
        steps: FIRST,LAST, see `--profile_steps`; None: none.
        directory: where the trace is written.
        writes: whether it is written; of processes that train in step one does.
    """

    def __init__(self, steps: str | None, directory: str, writes: bool = True):
        self._first, self._last = parse_profile_steps(steps) if steps else (0, 0)
        self._directory, self._writes = directory, writes
        self._runs = self._began = False

    def ahead(self, step: int) -> int:
        """Returns how many steps there are to where a block must end."""
        if self._last and step >= self._last and not self._began and self._writes:
            self._began = True
            logging.warning("No profile: step %d is over.", self._last)
        edges = [edge for edge in (self._first - 1, self._last) if edge > step]
        return edges[0] - step if edges else sys.maxsize

    @contextlib.contextmanager
    def around(self, end: int) -> Iterator[None]:
        """Is around a block that ends after step `end`."""
        if self._writes and not self._runs and self._first <= end <= self._last:
            tf.profiler.experimental.start(self._directory)
            self._runs = self._began = True
        yield
        if end >= self._last:
            self.stop()

    def stop(self) -> None:
        """Writes what was profiled, if anything was; says how to look at it."""
        if not self._runs:
            return
        self._runs = False
        tf.profiler.experimental.stop()
        shown = f"tensorboard --logdir={shlex.quote(self._directory)}"
        if importlib.util.find_spec("tensorboard_plugin_profile") is None:
            shown = f"pip install tensorboard tensorboard-plugin-profile; {shown}"
        print(f"Profile of steps {self._first} to {self._last}: {shown}", flush=True)
