"""Checkpoints: all state of a run on disk and back, or an error that says why not.

The files are TensorFlow's own: `tf.train.Checkpoint(model=model).restore(path)` reads
the weights without mpl.
"""

import collections
import os
import re
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from absl import logging
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

from mpl.errors import CheckpointError, ConfigError

_INDEX = re.compile(r"ckpt-(\d+)\.index")
_DATA = r"\.data-\d{5}-of-(\d{5})"
# What TensorFlow raises for damaged files, a matter of where the damage is.
_UNREADABLE = (tf.errors.OpError, RuntimeError, LookupError, ValueError, AssertionError)
_VALUE = "VARIABLE_VALUE"


class Checkpoints:
    """Saves numbered checkpoints of a set of objects in a directory and restores them.

    `ckpt-<step>.index` and its `.data-` files are one checkpoint. The file `checkpoint`
    lists those kept, in the order of writing. When it cannot be read, the directory is
    searched for the whole checkpoint of the highest step: training never starts again
    at step 0 beside a checkpoint.

    Args:
        directory: where to write, a local path or one of `tf.io.gfile`; made by `save`.
        max_to_keep: number of checkpoints kept; those written earlier are deleted.
        writes: whether `save` writes; of processes that train in step one does.
        **objects: what to save, by name: variables, modules, Keras models, optimizers.

    Raises:
        ConfigError: `max_to_keep` is below 1.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, max_to_keep: int = 5,
        writes: bool = True, **objects: Any
    ):
        if max_to_keep < 1:
            cause = f"`max_to_keep` ({max_to_keep}) must be at least 1."
            raise ConfigError(cause, "Use 1 to keep the last checkpoint only.")
        self.directory = os.fspath(directory)
        self.max_to_keep, self._writes = max_to_keep, writes
        self._objects = objects
        self._checkpoint = tf.train.Checkpoint(**objects)
        self._counter = self._checkpoint.save_counter  # made here, so never missing
        self._state_file = os.path.join(self.directory, "checkpoint")

    def best(self, metric: str) -> "Checkpoints":
        """Returns the place of the one best checkpoint by `metric`: `best/<metric>`."""
        directory = os.path.join(self.directory, "best", metric.replace("/", "_"))
        return Checkpoints(
            directory, max_to_keep=1, writes=self._writes, **self._objects)

    def paths(self) -> list[str]:
        """Returns the paths of the whole checkpoints kept, the last written last."""
        try:
            state = tf.train.get_checkpoint_state(self.directory)
        except ValueError:  # empty, or not text
            state = None
        listed = [] if state is None else state.all_model_checkpoint_paths
        # By their names: the directory may have moved since.
        here = [os.path.join(self.directory, os.path.basename(path)) for path in listed]
        whole = [path for path in here if _is_whole(path)]
        return whole or [path for path in self._search() if _is_whole(path)]

    @property
    def latest(self) -> str | None:
        """The path of the last whole checkpoint; None where none was ever written.

        Raises:
            CheckpointError: there are checkpoints, but none of them is whole.
        """
        if paths := self.paths():
            return paths[-1]
        if self._search() or tf.io.gfile.exists(self._state_file):
            cause = f"`{self.directory}` holds checkpoints, but none of them is whole."
            raise CheckpointError(cause, "Repair one, or begin in another directory.")
        return None

    def save(self, step: int) -> str:
        """Writes the objects as checkpoint `step` and deletes what is too old.

        Returns:
            The path of the checkpoint, without the endings of its files.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        path = os.path.join(self.directory, f"ckpt-{int(step)}")
        if not self._writes:
            return path
        try:
            tf.io.gfile.makedirs(self.directory)
            kept = [other for other in self.paths() if other != path]
            # Counts as `tf.train.Checkpoint.save` does, so that a plain restore finds
            # all it expects.
            self._counter.assign_add(1)
            self._checkpoint.write(path, _options())
            self._commit([os.path.basename(kept_path) for kept_path in [*kept, path]])
        except tf.errors.OpError as error:
            cause = f"`{path}` cannot be written: {error}".partition("\n")[0]
            remedy = "Choose a directory that can be written; older ones are as before."
            raise CheckpointError(cause, remedy) from error
        return path

    def restore(self, path: str | None = None) -> str | None:
        """Gives every object its value in a checkpoint.

        Args:
            path: what `save` returned; None: the latest checkpoint that is not damaged.

        Returns:
            The path restored; None when there is no checkpoint yet.

        Raises:
            CheckpointError: the checkpoint is damaged, or it is of other objects: the
                message names variables that are missing, unknown or of another shape,
                and no object has changed.
        """
        if path is None and self.latest is None:
            return None
        paths = self.paths() if path is None else [path]
        while not self._reads(path := paths.pop(), is_last=not paths):
            pass
        return path

    def _reads(self, path: str, is_last: bool) -> bool:
        """Restores a checkpoint; says whether it could be read. The last one must."""
        if not _is_whole(path):
            cause = f"`{path}` is no whole checkpoint: a file is missing or damaged."
            raise CheckpointError(cause, "Give a path as `save` returns: ckpt-<step>.")
        try:
            differences = self._differences(path)
            if not differences:
                self._checkpoint.restore(path, _options()).assert_consumed()
        except _UNREADABLE as error:
            cause = f"`{path}` cannot be read: {error}".partition("\n")[0]
            if not is_last:
                logging.warning("%s; taking the one before it", cause)
                return False
            remedy = "Restore another checkpoint by its path, or delete this one."
            raise CheckpointError(cause, remedy) from error
        if differences:
            cause = f"`{path}` is of another model: {len(differences)} differ"
            remedy = "Use the settings it was written with, or another directory."
            named = "; ".join(differences[:8])
            raise CheckpointError(f"{cause}: {named}.", remedy)
        return True

    def resume(self) -> int:
        """Restores the latest checkpoint; returns its step, 0 when there is none."""
        path = self.restore()
        return 0 if path is None else int(path.rpartition("-")[2])

    def _search(self) -> list[str]:
        """Returns the checkpoints that the directory holds, whole or not, by step."""
        if not tf.io.gfile.isdir(self.directory):
            return []
        names = map(_INDEX.fullmatch, tf.io.gfile.listdir(self.directory))
        steps = sorted(int(name[1]) for name in names if name)
        return [os.path.join(self.directory, f"ckpt-{step}") for step in steps]

    def _commit(self, names: list[str]) -> None:
        """Makes the last name the latest checkpoint and deletes the oldest."""
        with tf.io.gfile.GFile(f"{self._state_file}.tmp", "w") as file:
            file.write(f'model_checkpoint_path: "{names[-1]}"\n')
            for name in names[-self.max_to_keep :]:
                file.write(f'all_model_checkpoint_paths: "{name}"\n')
        tf.io.gfile.rename(f"{self._state_file}.tmp", self._state_file, overwrite=True)
        for name in names[: -self.max_to_keep]:
            files = tf.io.gfile.listdir(self.directory)
            data = [file for file in files if file.startswith(f"{name}.data-")]
            for file in [f"{name}.index", *data]:  # without its index it is not whole
                tf.io.gfile.remove(os.path.join(self.directory, file))

    def _differences(self, path: str) -> list[str]:
        """Says what differs between the objects and a checkpoint, entry by entry.

        TensorFlow finds differences only while it overwrites the objects, and does not
        see entries of a checkpoint that an object no longer has.
        """
        reader = tf.train.load_checkpoint(path)
        shapes = reader.get_variable_to_shape_map()
        graph = reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
        matched = tf.train.CheckpointView(path).match(self._checkpoint)
        owners = {node_id: id(trackable) for node_id, trackable in matched.items()}
        keys = {  # of the checkpoint, by owner (below 0: none here) and name of entry
            (owners.get(node_id, -node_id), attribute.name): attribute.checkpoint_key
            for node_id, node in enumerate(TrackableObjectGraph.FromString(graph).nodes)
            for attribute in node.attributes
        }
        reshaped, missing = [], []
        for name, trackable in _walk(self._checkpoint):
            for entry, shape in _entries(trackable).items():
                key = keys.pop((id(trackable), entry), None)
                here = _readable(f"{name}/.ATTRIBUTES/{entry}")
                if key is None:
                    missing.append(f"{here} is only here")
                elif shapes[key] != shape:
                    reshaped.append(f"{here} is {shapes[key]} there, {shape} here")
        unknown = [f"{_readable(key)} is only there" for key in keys.values()]
        return reshaped + missing + unknown


def _options() -> tf.train.CheckpointOptions:
    """Lets this process read and write, also what lies on parameter servers."""
    with tf.device("CPU:0"):
        return tf.train.CheckpointOptions(experimental_io_device=tf.constant(0).device)


def _is_whole(path: str) -> bool:
    """Whether the index can be read and all parts of the data are there."""
    directory, name = os.path.split(path)
    files = tf.io.gfile.listdir(directory) if tf.io.gfile.isdir(directory) else []
    data = [re.fullmatch(re.escape(name) + _DATA, file) for file in files]
    counts = collections.Counter(part[1] for part in data if part)
    try:
        if not any(count == int(total) for total, count in counts.items()):
            raise tf.errors.NotFoundError(None, None, "a part of the data is missing")
        tf.train.load_checkpoint(path)
    except _UNREADABLE as error:
        logging.warning("%s is not a whole checkpoint: %s", path, error)
        return False
    return True


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Yields all objects that a checkpoint of `root` holds, with readable names."""
    seen, queue = {id(root): root}, collections.deque([("", root)])
    while queue:
        name, trackable = queue.popleft()
        is_keras = isinstance(trackable, keras.Variable)
        yield (trackable.path if is_keras else name), trackable
        for child_name, child in tf.train.TrackableView.children(trackable).items():
            if id(child) not in seen:
                seen[id(child)] = child  # held, so that no other takes its id
                queue.append((f"{name}/{child_name}".lstrip("/"), child))


def _entries(trackable: Any) -> dict[str, list[int]]:
    """Returns the shape of each tensor that an object itself puts into a checkpoint."""
    if isinstance(trackable, (tf.Variable, keras.Variable)):
        return {_VALUE: list(trackable.shape)}
    try:
        tensors = trackable._serialize_to_tensors()  # TensorFlow's hook for own formats
    except NotImplementedError:
        return {}
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _readable(key: str) -> str:
    """Returns a checkpoint's key without the words that are TensorFlow's alone."""
    return key.replace(f"/.ATTRIBUTES/{_VALUE}", "").replace("/.ATTRIBUTES/", "/")
