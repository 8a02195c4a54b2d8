"""Summaries for TensorBoard: values, and what a step says to `tf.summary`."""

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging


class Summaries:
    """Writes summaries at `global_step`; a directory of None is nowhere.

    TensorFlow needs the package tensorboard; without it one warning says so.
    """

    def __init__(self, global_step: tf.Variable):
        self._global_step, self._writers = global_step, dict[str, Any]()
        self._can_write: bool | None = None

    @contextlib.contextmanager
    def to(self, directory: str | None, interval: int | None = 1) -> Iterator[bool]:
        """Makes `tf.summary` write there at multiples of an interval; None: never."""
        if directory and self._can_write is None:
            self._can_write = importlib.util.find_spec("tensorboard") is not None
            if not self._can_write:
                logging.warning("No summaries: they need `pip install tensorboard`.")
        if not (directory and self._can_write):
            yield False
            return
        if directory not in self._writers:
            self._writers[directory] = tf.summary.create_file_writer(directory)
        due = (lambda: self._global_step % interval == 0) if interval else False
        with self._writers[directory].as_default(self._global_step):
            with tf.summary.record_if(due):
                yield True

    def write(self, directory: str | None, values: Mapping[str, Any]) -> None:
        """Writes the numbers among values by name."""
        with self.to(directory) as is_open:
            for name, value in values.items():
                if is_open and np.ndim(value) == 0:
                    tf.summary.scalar(name, value)

    def flush(self) -> None:
        """Puts on disk what was written."""
        for writer in self._writers.values():
            writer.flush()
