"""What objects put into a checkpoint: their entries, copied, compared and matched."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph

_VALUE = "VARIABLE_VALUE"
# What TensorFlow raises for damaged files, a matter of where the damage is.
UNREADABLE = (tf.errors.OpError, RuntimeError, LookupError, ValueError, AssertionError)


class _Copy(tf.Module):
    """An object's entries and children at one moment."""

    def __init__(self, entries: dict[str, tf.Tensor]):
        super().__init__()
        self._entries, self._children = lambda: entries, dict[str, "_Copy"]

    def _serialize_to_tensors(self) -> dict[str, tf.Tensor]:
        return self._entries()

    def _trackable_children(self, *args: Any, **kwargs: Any) -> dict[str, "_Copy"]:
        return self._children()


def copied(root: Any) -> tf.Module:
    """Returns a trackable object with the entries of `root` as they are now.

    They lie on the host. On a CPU they share the variables' memory until these change,
    which TensorFlow then copies first; so no later step changes them.
    """
    found = [trackable for _, trackable in _walk(root)]
    with tf.device("CPU:0"):
        copies = {id(trackable): _Copy({
            name: tf.identity(value) for name, value in _entries(trackable).items()})
            for trackable in found}  # fmt: skip
    for trackable in found:
        children = {name: copies[id(child)] for name, child in _children(trackable)}
        copies[id(trackable)]._children = lambda children=children: children
    return copies[id(root)]


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
    reader = tf.train.load_checkpoint(path)
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
    for name, trackable in _walk(root):
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


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Yields all objects that a checkpoint of `root` holds, with readable names."""
    seen, queue = {id(root): root}, collections.deque([("", root)])
    while queue:
        name, trackable = queue.popleft()
        is_keras = isinstance(trackable, keras.Variable)
        yield (trackable.path if is_keras else name), trackable
        for child_name, child in _children(trackable):
            if id(child) not in seen:
                seen[id(child)] = child  # held, so that no other takes its id
                queue.append((f"{name}/{child_name}".lstrip("/"), child))


def _children(trackable: Any) -> list[tuple[str, Any]]:
    return list(tf.train.TrackableView.children(trackable).items())


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
