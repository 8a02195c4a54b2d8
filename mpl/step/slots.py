"""The inner optimizer's variables, and their names in a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from mpl import errors


class Slots:
    """Builds a Keras optimizer on buckets and knows whose each slot is.

    Args:
      inner: an optimizer that has not been built.
      buckets: what it will update.

    Raises:
      ConfigError: if the optimizer keeps state outside `update_step`, which a loop
        that calls `update_step` alone would leave behind.
    """

    def __init__(self, inner: keras.optimizers.Optimizer, buckets: Sequence[Any]):
        _check_update_step(inner)
        self._inner = inner
        self._buckets = buckets
        references = [
            bucket.entries[0].keras_variable if bucket.rows is None and bucket.entries[0].keras_variable
            is not None else bucket.variable
            for bucket in buckets
        ]
        number_of = {id(reference): n for n, reference in enumerate(references)}
        self._slots: list[tuple[int, str, tf.Variable]] = []
        create = inner.add_variable_from_reference

        def recorded(reference_variable, name=None, initializer="zeros"):
            slot = create(reference_variable, name=name, initializer=initializer)
            number = number_of[id(reference_variable)]
            self._slots.append((number, name or "slot", slot.value))
            return slot

        # For the time of `build`: Keras's names for slots do not tell whose they are.
        vars(inner)["add_variable_from_reference"] = recorded
        try:
            inner.build(references)
        finally:
            del vars(inner)["add_variable_from_reference"]
        mine = {id(slot) for _, _, slot in self._slots}
        self._others = [v for v in inner.variables if id(v.value) not in mine]

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
                variable.assign(values[key])

    def _named_others(self) -> list[tuple[str, keras.Variable]]:
        return [
            (f"optimizer/{number}/{variable.name}", variable)
            for number, variable in enumerate(self._others)
        ]


def by_entry(name: str, bucket: Any, packed: tf.Variable) -> dict[str, tf.Tensor]:
    """Returns the parts of a variable laid out like `bucket`, by checkpoint key."""
    parts = bucket.split(tf.convert_to_tensor(packed))
    return {f"{name}/{e.key}": part for e, part in zip(bucket.entries, parts)}


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
        product = inner._u_product  # no public name; watched by a canary test
        step = tf.cast(inner.iterations + 1, product.dtype)
        factor = inner.beta_1 * (1.0 - 0.5 * tf.pow(0.96, step))
        product.assign(product * factor)


def _check_update_step(inner: keras.optimizers.Optimizer) -> None:
    outside = ("apply", "_backend_update_step", "_backend_apply_gradients")
    for kind in type(inner).__mro__:
        if kind in (keras.optimizers.Optimizer, keras.optimizers.Nadam):
            return
        overridden = [name for name in outside if name in vars(kind)]
        if overridden:
            raise errors.ConfigError(
                f"the inner optimizer {type(inner).__name__} overrides "
                f"`{overridden[0]}`; only its `update_step` would be called.",
                "Move the rule into `update_step`, or use another optimizer.",
            )
