"""Summaries for TensorBoard: values, and what a step says to `tf.summary`."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
from absl import logging

_proto = tf.compat.v1

# Marks what is written after a step: what `train_step` itself says at `global_step` n
# belongs to the step after n.
AFTER_STEP = "After this many steps."
# As `tf.summary.scalar` has it, at a fifth of its time.
_SCALAR = _proto.SummaryMetadata(
    plugin_data=_proto.SummaryMetadata.PluginData(plugin_name="scalars"),
    summary_description=AFTER_STEP)
# Texts that each start of a run writes anew.
TEXTS = ("flags", "parameters")


class Summaries:
    """Writes summaries at `global_step`; where there is no directory, none.

    A run that goes on at step n first deletes what was written of later steps, and
    what it writes again: no step appears twice.

    TensorFlow needs the package tensorboard; without it one warning says so.

    Args:
        global_step: int64 variable.
        directory: For those of training, the split "train"; or None.
        eval_directory: With a folder for each other split; None: as the other.
        rewrites: Whether it deletes; False: nothing, as another process may write.
    """

    def __init__(
        self, global_step: tf.Variable, directory: Any, eval_directory: Any,
        rewrites: bool = True,
    ):
        self._rewrites = rewrites
        self._directory, self._eval_directory = directory, eval_directory or directory
        if self._eval_directory and importlib.util.find_spec("tensorboard") is None:
            _say_what_is_missing()
            self._directory = self._eval_directory = None
        self._global_step = global_step
        self._writer_of = functools.cache(self._open)

    @contextlib.contextmanager
    def to(self, split: str, interval: int = 1) -> Iterator[bool]:
        """Makes `tf.summary` write at multiples of an interval; says whether it can."""
        if not (self._directory if split == "train" else self._eval_directory):
            yield False
            return
        writer = self._writer_of(split)
        with writer.as_default(self._global_step):
            with tf.summary.record_if(lambda: self._global_step % interval == 0):
                yield True
        writer.flush()

    def write(self, split: str, values: Mapping[str, Any]) -> None:
        """Writes the numbers among values by name, as one event."""
        with self.to(split) as can_write:
            if can_write:
                summary = _proto.Summary()
                for name, value in values.items():
                    if np.ndim(value) == 0:
                        tensor = tf.make_tensor_proto(value, tf.float32)
                        summary.value.add(tag=name, tensor=tensor, metadata=_SCALAR)
                tf.summary.experimental.write_raw_pb(summary.SerializeToString())

    def _open(self, split: str) -> tf.summary.SummaryWriter:
        step = int(self._global_step.numpy())
        path = os.path.join(self._eval_directory, split)
        if split == "train":
            path = self._directory
        if not self._rewrites:
            return tf.summary.create_file_writer(path)
        if split == "train":
            for folder, *_ in tf.io.gfile.walk(self._eval_directory):
                _keep(folder, lambda event: event.step <= step)
            _keep(path, functools.partial(_is_before, step))
        else:  # an evaluation of an older checkpoint leaves later ones alone
            _keep(path, lambda event: event.step != step and not event.graph_def)
        return tf.summary.create_file_writer(path)


@functools.cache  # once a process
def _say_what_is_missing() -> None:
    logging.warning("No summaries: they need `pip install tensorboard`.")


def _is_before(step: int, event: Any) -> bool:
    """Says whether a run that trains from `step` on will not write the event again."""
    values = event.summary.value
    after = all(v.metadata.summary_description == AFTER_STEP for v in values)
    once = event.graph_def or any(value.tag in TEXTS for value in values)
    return not once and (event.step < step or event.step == step and after)


def _keep(directory: str, condition: Callable[[Any], bool]) -> None:
    """Deletes the other events from the files in a directory, not in those below."""
    _, _, names = next(tf.io.gfile.walk(directory), ("", [], []))
    for path in [os.path.join(directory, n) for n in names if ".tfevents." in n]:
        records, kept = [], []
        with contextlib.suppress(tf.errors.DataLossError):  # its writer was killed
            for record in tf.data.TFRecordDataset(path).as_numpy_iterator():
                records.append(record)
                event = _proto.Event.FromString(record)
                if event.file_version or condition(event):
                    kept.append(record)
        if kept != records:  # beside it under a name that TensorBoard does not read
            beside = os.path.join(directory, "kept.tmp")
            with tf.io.TFRecordWriter(beside) as writer:
                for record in kept:
                    writer.write(record)
            tf.io.gfile.rename(beside, path, overwrite=True)
