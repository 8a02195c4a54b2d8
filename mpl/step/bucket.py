"""Variables that a step casts, reduces and updates as one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.step import binding as binding_lib

# Elements; slices of a packed bucket begin on such a row. 32 make 64 bytes in 16 bits,
# the alignment that TensorFlow asks for to slice without a copy.
_ROW = 32


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the variables of one bucket have in common.

    Attributes:
      master: dtype of the masters.
      compute: what `MasterWeights.cast` casts them to.
      decay: whether weight decay applies.
      multiplier: factor on the learning rate.
      packed: whether they lie in one buffer; else the bucket has one variable.
      sparse: whether it is a table read row by row.
    """

    master: tf.DType
    compute: tf.DType
    decay: bool = True
    multiplier: float = 1.0
    packed: bool = False
    sparse: bool = False


class Bucket:
    """Variables of one kind, and the variable that is their master.

    Attributes:
      kind, entries: its variables and what they have in common.
      variable: the model's own variable, or a buffer `[rows, 32]` if packed.
    """

    def __init__(self, kind: Kind, entries: Sequence[binding_lib.ModelVariable]):
        self.kind, self.entries = kind, list(entries)
        self.variable = self.entries[0].value
        self._shapes = [entry.value.shape for entry in self.entries]
        self._rows = [-(-shape.num_elements() // _ROW) for shape in self._shapes]
        if kind.packed:
            buffer = self.join([value_of(entry.value) for entry in self.entries])
            self.variable = tf.Variable(buffer, trainable=False, name="bucket")

    def split(self, packed: Any) -> list:
        """Returns each entry's part of a tensor or array laid out like the bucket."""
        if not self.kind.packed:
            return [packed]
        if isinstance(packed, np.ndarray):
            parts = np.split(packed, np.cumsum(self._rows)[:-1])
            return [part.reshape(-1)[:shape.num_elements()].reshape(shape)
                    for part, shape in zip(parts, self._shapes)]
        # One constant for each shape: they take most of the time that tracing takes.
        shapes = {shape: tf.constant(shape, tf.int32)
                  for shape in map(tuple, self._shapes)}
        parts = tf.split(packed, self._rows)
        return [_cut(part, shape, shapes[tuple(shape)])
                for part, shape in zip(parts, self._shapes)]

    def slices(self, packed: Any) -> list:
        """Returns `split` of a tensor, whose gradient is one `join`."""
        if not self.kind.packed:
            return [packed]

        @tf.custom_gradient
        def split(packed: tf.Tensor) -> Any:
            def join(*parts: Any) -> tf.Tensor:
                # A variable read with tf.gather has row gradients.
                return self.join([tf.convert_to_tensor(part) for part in parts])

            return self.split(packed), join

        return split(packed)

    def join(self, values: Sequence[Any]) -> Any:
        """Returns the tensor, or for arrays the array, whose `split` is `values`."""
        if not self.kind.packed:
            return tf.convert_to_tensor(values[0])
        arrays = all(isinstance(value, np.ndarray) for value in values)
        zeros, concatenate, reshape, flat = (
            (np.zeros, np.concatenate, np.reshape, -1) if arrays
            else (tf.zeros, tf.concat, tf.reshape, tf.constant([-1])))
        parts, fillings = [], dict[int, Any]()
        for value, rows, shape in zip(values, self._rows, self._shapes):
            parts.append(reshape(value, flat))
            missing = rows * _ROW - shape.num_elements()
            if missing not in fillings:
                fillings[missing] = zeros([missing], parts[0].dtype)
            parts += [fillings[missing]] * bool(missing)
        return reshape(concatenate(parts, 0), [-1, _ROW])

    def squares(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns the sum of squares of each entry's part, shape `[entries]`."""
        squared = tf.square(gradient)
        if not self.kind.packed:
            return tf.reduce_sum(squared)[tf.newaxis]
        segments = np.repeat(np.arange(len(self._rows)), self._rows).astype(np.int32)
        # The unsorted form has a static result, which XLA asks for.
        return tf.math.unsorted_segment_sum(
            tf.reduce_sum(squared, axis=1), segments, len(self._rows))


def value_of(variable: tf.Variable) -> Any:
    """Returns a NumPy array where there is one: to cut it costs least."""
    return variable.numpy() if tf.executing_eagerly() else variable.read_value()


def _cut(part: tf.Tensor, shape: tf.TensorShape, constant: tf.Tensor) -> tf.Tensor:
    """Returns the first elements of `part` `[rows, 32]` in a shape; copies nothing."""
    size = shape.num_elements()
    if size % _ROW:
        part = tf.reshape(part, [-1])[:size]
    return part if part.shape == shape else tf.reshape(part, constant)


def buckets_of(
    variables: Sequence[tuple[Kind, binding_lib.ModelVariable]], max_bytes: int = 0
) -> list[Bucket]:
    """Returns buckets in the order in which the last of their variables come.

    Args:
      variables: with their kinds, in the order in which their gradients are ready.
      max_bytes: bound of a packed bucket of several variables.
    """
    members: list[tuple[Kind, list[binding_lib.ModelVariable]]] = []
    last: dict[Kind, list[binding_lib.ModelVariable]] = {}
    sizes: dict[Kind, int] = {}
    for kind, entry in variables:
        sizes[kind] = sizes.get(kind, 0) + entry.num_bytes
        if not kind.packed or kind not in last or sizes[kind] > max_bytes:
            last[kind], sizes[kind] = [], entry.num_bytes
            members.append((kind, last[kind]))
        last[kind].append(entry)
    place = {id(entry): number for number, (_, entry) in enumerate(variables)}
    members.sort(key=lambda member: place[id(member[1][-1])])
    return [Bucket(kind, entries) for kind, entries in members]
