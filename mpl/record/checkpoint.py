"""Checkpoints: all state of a run on disk and back, or an error that says why not.

The files are TensorFlow's own: `tf.train.Checkpoint(model=model).restore(path)` reads
the weights without mpl.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import logging

from mpl.errors import CheckpointError, ConfigError
from mpl.record import commit, object_graph


class Checkpoints:
    """Saves numbered checkpoints of a set of objects in a directory and restores them.

        ckpt-<step>.index, ckpt-<step>.data-...   TensorFlow's files
        ckpt-<step>.commit                        written last: sizes and checksums
        checkpoint                                the list that TensorFlow reads

    A checkpoint counts once it is committed and as long as its files are as they were
    then. The newest that does is restored, with a warning that names each one passed
    over; if none does, there is an error. Training never starts again at step 0 beside
    a committed checkpoint.

    `save` copies the objects and returns; a thread writes. One write runs at a time,
    and the process does not end before it is done. What goes wrong in it is raised by
    the next call of `check`, `save` or `wait`.

    Args:
        directory: where to write, a local path or one of `tf.io.gfile`; made by `save`.
        max_to_keep: number of checkpoints kept; those written earlier are deleted.
        keep_every_steps: those at its multiples are kept beside these.
        writes: whether `save` writes; of processes that train in step one does.
        asynchronous: whether a thread writes; else `save` does, and raises.
        check_values: called before a copy is made; raises what forbids to save.
        facts: more for the commit marker to say: settings, versions.
        **objects: what to save, by name: variables, modules, Keras models, optimizers.

    Raises:
        ConfigError: `max_to_keep` or `keep_every_steps` is below 1.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, max_to_keep: int = 5,
        keep_every_steps: int | None = None, writes: bool = True,
        asynchronous: bool = True, check_values: Callable[[], Any] = lambda: None,
        facts: Mapping[str, Any] = {}, **objects: Any
    ):
        for name, number in (("max_to_keep", max_to_keep),
                             ("keep_every_steps", keep_every_steps)):
            if number is not None and number < 1:
                cause = f"`{name}` ({number}) must be at least 1."
                raise ConfigError(cause, "Use 1 or more.")
        self.directory = os.fspath(directory)
        self.max_to_keep, self._keep_every = max_to_keep, keep_every_steps
        self._settings: dict[str, Any] = {
            "writes": writes, "asynchronous": asynchronous,
            "check_values": check_values, "facts": facts}
        self._objects = objects
        self._checkpoint = tf.train.Checkpoint(**objects)
        self._counter = self._checkpoint.save_counter  # made here, so never missing
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._best: list[Checkpoints] = []

    def best(self, metric: str) -> "Checkpoints":
        """Returns the place of the one best checkpoint by `metric`: `best/<metric>`.

        What goes wrong there is raised here as well.
        """
        directory = os.path.join(self.directory, "best", metric.replace("/", "_"))
        best = Checkpoints(directory, max_to_keep=1, **self._settings, **self._objects)
        self._best.append(best)
        return best

    def paths(self) -> list[str]:
        """Returns the paths of the committed checkpoints, the last written last.

        Files that are missing or of another size are noticed here, others by `restore`.
        """
        self.wait()
        return [found.path for found in commit.find(self.directory)
                if not found.problem]

    @property
    def latest(self) -> str | None:
        """The path of the last committed checkpoint; None where none ever was.

        Raises:
            CheckpointError: there were checkpoints, but none of them is whole.
        """
        if paths := self.paths():
            return paths[-1]
        if commit.was_any(self.directory):
            raise self._none_whole()
        return None

    def save(self, step: int) -> str:
        """Begins to write checkpoint `step`; then deletes what is too old.

        Returns:
            The path of the checkpoint, without the endings of its files.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        path = os.path.join(self.directory, f"ckpt-{int(step)}")
        if not self._settings["writes"]:
            return path
        self.wait()
        self._settings["check_values"]()
        # As `tf.train.Checkpoint.save` counts, so that a plain restore finds all that
        # it expects.
        self._counter.assign_add(1)
        copy = object_graph.copied(self._checkpoint)
        self._writer = threading.Thread(target=self._write, args=(path, copy))
        self._writer.start()
        if not self._settings["asynchronous"]:
            self.wait()
        return path

    def _write(self, path: str, copy: Any) -> None:
        versions = {each.__name__: each.__version__ for each in (tf, keras, np)}
        facts = {**self._settings["facts"], "versions": versions}
        try:
            tf.io.gfile.makedirs(self.directory)
            commit.remove_files(path)  # what a killed process left of it
            tf.train.Checkpoint(root=copy).write(path, _options())
            commit.commit(path, facts)
            commit.tidy(self.directory, self.max_to_keep, self._keep_every)
        except tf.errors.OpError as error:
            with contextlib.suppress(tf.errors.OpError):  # makes room
                commit.remove_files(path)
            cause = f"`{path}` cannot be written: {error}".partition("\n")[0]
            remedy = "Choose a directory that can be written; older ones are as before."
            self._error = CheckpointError(cause, remedy)
            self._error.__cause__ = error
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raises what went wrong in writing, if anything did until now."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        for best in self._best:
            best.check()

    def wait(self) -> None:
        """Waits until all is written, and then does what `check` does."""
        for checkpoints in (self, *self._best):
            if checkpoints._writer is not None:
                checkpoints._writer.join()
                checkpoints._writer = None
        self.check()

    def restore(self, path: str | None = None) -> str | None:
        """Gives every object its value in a checkpoint.

        Args:
            path: what `save` returned; None: the newest checkpoint that is not damaged.

        Returns:
            The path restored; None when there is no checkpoint yet.

        Raises:
            CheckpointError: the checkpoint is damaged, or it is of other objects: the
                message names variables that are missing, unknown or of another shape,
                and no object has changed.
        """
        self.wait()
        if path is not None:
            if problem := self._restore(path):
                cause = f"`{path}` cannot be read: {problem}."
                raise CheckpointError(cause, "Restore another checkpoint by its path.")
            return path
        for found in reversed(commit.find(self.directory)):
            if not (problem := found.problem or self._restore(found.path)):
                return found.path
            logging.warning("%s is passed over: %s", found.path, problem)
        if commit.was_any(self.directory):
            raise self._none_whole()
        return None

    def _restore(self, path: str) -> str | None:
        """Restores a checkpoint; returns why it cannot be read, or None."""
        if problem := commit.damage(path):
            return problem
        try:
            differences = object_graph.match(path, self._checkpoint)[1:]
            if not any(differences):
                self._checkpoint.restore(path, _options()).assert_consumed()
        except object_graph.UNREADABLE as error:
            return str(error).partition("\n")[0].rstrip(".")
        if named := [text for kind in differences for text in kind]:
            cause = f"`{path}` is of another model: {len(named)} differ: "
            remedy = "Use the settings it was written with, or another directory."
            raise CheckpointError(f"{cause}{'; '.join(named[:8])}.", remedy)
        return None

    def resume(self) -> int:
        """Restores the newest checkpoint; returns its step, 0 when there is none."""
        path = self.restore()
        return 0 if path is None else int(path.rpartition("-")[2])

    def _none_whole(self) -> CheckpointError:
        cause = f"`{self.directory}` holds checkpoints, but none of them is whole."
        return CheckpointError(cause, "Repair one, or begin in another directory.")


def _options() -> tf.train.CheckpointOptions:
    """Lets this process read and write, also what lies on parameter servers."""
    with tf.device("CPU:0"):
        return tf.train.CheckpointOptions(experimental_io_device=tf.constant(0).device)
