"""The inner optimizer's variables, and their names in a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpl.step import binding as binding_lib
from mpl.step import names as names_lib


class Slots:
    """Builds a Keras optimizer on buckets and knows whose each slot is.

    Args:
      inner: an optimizer that has not been built.
      buckets: what it will update.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, buckets: Sequence[Any]):
        self._inner = inner
        self._buckets = buckets
        references = [
            bucket.variable
            if bucket.kind.packed or bucket.entries[0].keras_variable is None
            else bucket.entries[0].keras_variable
            for bucket in buckets
        ]
        number_of = {id(reference): n for n, reference in enumerate(references)}
        owners: dict[int, tuple[int, str]] = {}
        create = inner.add_variable_from_reference

        def recorded(reference_variable, name=None, initializer="zeros"):
            slot = create(reference_variable, name=name, initializer=initializer)
            owners[id(slot)] = number_of[id(reference_variable)], name or "slot"
            return slot

        class Watched(list):
            """Notes whose are the variables that `build` makes while it iterates."""

            def __iter__(self):
                for number, reference in enumerate(super().__iter__()):
                    known = len(inner.variables)
                    yield reference
                    for count, variable in enumerate(inner.variables[known:]):
                        owners.setdefault(id(variable), (number, f"extra_{count}"))

        # For the time of `build`: Keras's names for slots do not tell whose they are.
        vars(inner)["add_variable_from_reference"] = recorded
        try:
            inner.build(Watched(references))
        finally:
            del vars(inner)["add_variable_from_reference"]
        self._slots = [
            (*owners[id(v)], v.value) for v in inner.variables if id(v) in owners
        ]
        self._others = [v for v in inner.variables if id(v) not in owners]

    def of(self, number: int) -> dict[str, tf.Variable]:
        """Returns the slots of one bucket by name."""
        return {name: slot for n, name, slot in self._slots if n == number}

    def export(self) -> dict[str, tf.Tensor]:
        """Returns every slot, one entry per model variable, and the other variables."""
        values: dict[str, tf.Tensor] = {}
        for number, name, slot in self._slots:
            values.update(by_entry(name, self._buckets[number], slot))
        for key, variable in self._named_others():
            values[key] = tf.convert_to_tensor(variable.value)
        return values

    def restore(self, values: Mapping[str, tf.Tensor]) -> None:
        """Assigns what `export` returned, under whatever packing."""
        for number, name, slot in self._slots:
            restore_entries(name, self._buckets[number], slot, values)
        for key, variable in self._named_others():
            if key in values:
                variable.value.assign(values[key])  # of unknown shape, in a graph

    def decay(self, number: int) -> float | None:
        """Returns the weight decay of one bucket."""
        if isinstance(self._inner, keras.optimizers.Muon) and "velocity" in self.of(
            number
        ):
            return self._inner.adam_weight_decay  # Muon leaves this variable to Adam
        return self._inner.weight_decay

    def _named_others(self) -> list[tuple[str, keras.Variable]]:
        names = names_lib.canonical([v.name for v in self._others])
        return [(entry_key("optimizer", n), v) for n, v in zip(names, self._others)]


def by_entry(name: str, bucket: Any, packed: tf.Variable) -> dict[str, tf.Tensor]:
    """Returns the parts of a variable laid out like `bucket`, by checkpoint key."""
    parts = bucket.split(tf.convert_to_tensor(packed))
    return {entry_key(name, e.key): part for e, part in zip(bucket.entries, parts)}


def entry_key(*names: str) -> str:
    """Returns a name for `_serialize_to_tensors`.

    TensorFlow escapes "/" twice on saving and once on restoring such names.
    """
    return "|".join(names).replace("/", "|")


def restore_entries(
    name: str, bucket: Any, packed: tf.Variable, values: Mapping[str, tf.Tensor]
) -> None:
    """Assigns the parts that `values` holds; others keep theirs."""
    present = by_entry(name, bucket, packed)
    packed.assign(bucket.join([values.get(key, old) for key, old in present.items()]))


def advance(inner: keras.optimizers.Optimizer) -> None:
    """Advances state that `inner` keeps outside `update_step`.

    Nadam is the only such optimizer of Keras: its product of momentum schedules.
    Source: Dozat 2016, http://cs229.stanford.edu/proj2015/054_report.pdf
    """
    if isinstance(inner, keras.optimizers.Nadam):
        product = binding_lib.momentum_product(inner)
        step = tf.cast(inner.iterations + 1, product.dtype)
        product.assign(product * inner.beta_1 * (1.0 - 0.5 * tf.pow(0.96, step)))
