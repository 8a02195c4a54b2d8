"""What objects put into a checkpoint: their entries, copied, compared and matched."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

_VALUE = "VARIABLE_VALUE"
# What TensorFlow raises for damaged files, a matter of where the damage is.
UNREADABLE = (tf.errors.OpError, RuntimeError, LookupError, ValueError, AssertionError)


class _Copy(tf.__internal__.tracking.Trackable):
    """An object's entries and children at one moment."""

    def __init__(self, entries: dict[str, tf.Tensor]):
        self._own, self.children = entries, dict[str, "_Copy"]()

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return self._own

    def _trackable_children(self, *args: Any, **kwargs: Any) -> dict[str, "_Copy"]:
        return self.children


def copied(root: Any) -> _Copy:
    """Returns a trackable object with the entries of `root` as they are now.

    They lie on the host. On a CPU they share the variables' memory until these change,
    which TensorFlow then copies first; so no later step changes them.
    """
    found = [(trackable, children) for _, trackable, children in _walk(root)]
    copies = {id(trackable): _Copy({
        name: _on_host(value) for name, value in _entries(trackable).items()})
        for trackable, _ in found}  # fmt: skip
    for trackable, children in found:
        copies[id(trackable)].children = {
            name: copies[id(child)] for name, child in children.items()}
    return copies[id(root)]


def _on_host(value: Any) -> tf.Tensor:
    tensor = tf.convert_to_tensor(value)
    if tensor.device.endswith("CPU:0"):
        return tensor
    with tf.device("CPU:0"):
        return tf.identity(tensor)


class Match(NamedTuple):
    """How a checkpoint's entries compare with those of objects; texts name entries.

    Attributes:
        same: pairs of a variable or object here and the key of its entry there.
        reshaped, missing, unknown: of another shape, only here, only there.
    """

    same: list[tuple[Any, str]]
    reshaped: list[str]
    missing: list[str]
    unknown: list[str]


def match(path: str, root: Any) -> Match:
    """Compares a checkpoint with `root` entry by entry.

    TensorFlow finds differences only while it overwrites the objects, and does not see
    entries of a checkpoint that an object no longer has.
    """
    reader = tf.compat.v1.train.NewCheckpointReader(path)  # looks for no folder
    shapes = reader.get_variable_to_shape_map()
    graph = reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    matched = tf.train.CheckpointView(path).match(root)
    owners = {node_id: id(trackable) for node_id, trackable in matched.items()}
    keys = {  # of the checkpoint, by owner (below 0: none here) and name of entry
        (owners.get(node_id, -node_id), attribute.name): attribute.checkpoint_key
        for node_id, node in enumerate(TrackableObjectGraph.FromString(graph).nodes)
        for attribute in node.attributes
    }
    same, reshaped, missing = [], [], []
    for name, trackable, _ in _walk(root):
        for entry, value in _entries(trackable).items():
            key = keys.pop((id(trackable), entry), None)
            here = _readable(f"{name}/.ATTRIBUTES/{entry}")
            if key is None:
                missing.append(f"{here} is only here")
            elif shapes[key] != list(value.shape):
                shape = list(value.shape)
                reshaped.append(f"{here} is {shapes[key]} there, {shape} here")
            else:
                same.append((trackable, key))
    unknown = [f"{_readable(key)} is only there" for key in keys.values()]
    return Match(same, reshaped, missing, unknown)


def _walk(root: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yields all objects that a checkpoint of `root` holds, with readable names.

    Yields:
        name, object, its children by name.
    """
    seen, queue = {id(root): root}, collections.deque([("", root)])
    while queue:
        name, trackable = queue.popleft()
        children = tf.train.TrackableView.children(trackable)
        is_keras = isinstance(trackable, keras.Variable)
        yield (trackable.path if is_keras else name), trackable, children
        for child_name, child in children.items():
            if id(child) not in seen:
                seen[id(child)] = child  # held, so that no other takes its id
                queue.append((f"{name}/{child_name}".lstrip("/"), child))


def _entries(trackable: Any) -> dict[str, Any]:
    """Returns what an object itself puts into a checkpoint, by name."""
    if isinstance(trackable, keras.Variable):
        trackable = trackable.value
    if isinstance(trackable, tf.Variable):
        return {_VALUE: trackable}
    try:
        return trackable._serialize_to_tensors()  # TensorFlow's hook for own formats
    except NotImplementedError:
        return {}


def _readable(key: str) -> str:
    """Returns a checkpoint's key without the words that are TensorFlow's alone."""
    return key.replace(f"/.ATTRIBUTES/{_VALUE}", "").replace("/.ATTRIBUTES/", "/")
