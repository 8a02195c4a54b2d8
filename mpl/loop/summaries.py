"""Summaries for TensorBoard: values, and what a step says to `tf.summary`."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf


class Summaries:
    """Writes summaries at `global_step`; a directory of None is nowhere."""

    def __init__(self, global_step: tf.Variable):
        self._global_step = global_step
        self._writer = functools.cache(tf.summary.create_file_writer)

    @contextlib.contextmanager
    def to(self, directory: str | None, interval: int = 1) -> Iterator[None]:
        """Makes `tf.summary` write to a directory at multiples of an interval."""
        if directory is None:
            yield
            return
        with self._writer(directory).as_default(self._global_step):
            with tf.summary.record_if(lambda: self._global_step % interval == 0):
                yield

    def write(self, directory: str | None, values: Mapping[str, Any]) -> None:
        """Writes the numbers among values by name."""
        if directory is not None:
            with self.to(directory):
                for name in (name for name in values if np.ndim(values[name]) == 0):
                    tf.summary.scalar(name, values[name])
            self._writer(directory).flush()
