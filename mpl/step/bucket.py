"""Variables that a step casts, reduces and updates as one."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mpl.step import binding as binding_lib

# Elements; the variables of one shape begin on such a row of a packed bucket. 32 make
# 64 bytes in 16 bits, the alignment that TensorFlow asks for to cut without a copy.
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
      kind: what they have in common.
      entries: its variables; if packed, those of one shape stand together.
      variable: the model's own variable, or a buffer `[rows, 32]` if packed.
    """

    def __init__(self, kind: Kind, entries: Sequence[binding_lib.ModelVariable]):
        self.kind, self.entries = kind, list(entries)
        if kind.packed:
            by_shape: dict[tuple, list[binding_lib.ModelVariable]] = {}
            for entry in entries:
                by_shape.setdefault(tuple(entry.value.shape), []).append(entry)
            self.entries = [entry for group in by_shape.values() for entry in group]
            self._shapes = [(len(group), *shape) for shape, group in by_shape.items()]
            self._rows = [-(-math.prod(shape) // _ROW) for shape in self._shapes]
            buffer = self.join([value_of(entry.value) for entry in self.entries])
            self.variable = tf.Variable(buffer, trainable=False, name="bucket")
        else:
            self.variable = self.entries[0].value

    def split(self, packed: Any) -> list:
        """Returns each entry's part of a tensor or array laid out like the bucket."""
        if not self.kind.packed:
            return [packed]
        parts = list if isinstance(packed, np.ndarray) else tf.unstack
        return [part for group in self._cut(packed) for part in parts(group)]

    def _cut(self, packed: Any) -> list:
        """Returns the entries of each shape as `[entries, *shape]`."""
        arrays, groups = isinstance(packed, np.ndarray), []
        reshape = np.reshape if arrays else tf.reshape
        parts = (np.split(packed, np.cumsum(self._rows)[:-1]) if arrays
                 else tf.split(packed, self._rows))
        for part, shape in zip(parts, self._shapes):
            size = math.prod(shape)
            if size % _ROW:
                part = reshape(part, [-1])[:size]
            groups.append(reshape(part, shape))
        return groups

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
        stack, concatenate, reshape, zeros = (
            (np.stack, np.concatenate, np.reshape, np.zeros) if arrays
            else (tf.stack, tf.concat, tf.reshape, tf.zeros))
        parts, rest = [], iter(values)
        for (count, *shape), rows in zip(self._shapes, self._rows):
            group = list(itertools.islice(rest, count))
            parts.append(reshape(stack(group) if count > 1 else group[0], [-1]))
            missing = rows * _ROW - count * math.prod(shape)
            parts += [zeros([missing], parts[0].dtype)] * bool(missing)
        return reshape(concatenate(parts, 0), [-1, _ROW])

    def squares(self, gradient: tf.Tensor) -> tf.Tensor:
        """Returns the sum of squares of each entry's part, shape `[entries]`."""
        squared = tf.square(gradient)
        if not self.kind.packed:
            return tf.reduce_sum(squared)[tf.newaxis]
        return tf.concat([tf.reduce_sum(group, list(range(1, group.shape.rank)))
                          for group in self._cut(squared)], 0)


def value_of(variable: tf.Variable) -> Any:
    """Returns a NumPy array where there is one: to cut it costs least."""
    return variable.numpy() if tf.executing_eagerly() else variable.read_value()


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
