"""Embedding tables that are read and updated row by row."""

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from mpl import errors


def lookup(layer: keras.layers.Embedding, table: tf.Variable | tf.Tensor) -> Callable:
    """Returns a `call` for `layer` that gathers rows of `table`, then casts them.

    Keras's own lookup converts the variable to a tensor first, which costs the whole
    table in the backward pass.
    """

    def call(inputs: tf.Tensor) -> tf.Tensor:
        ids = inputs if inputs.dtype.is_integer else tf.cast(inputs, tf.int32)
        return tf.cast(_gather(table, ids), layer.compute_dtype)

    return call


def _gather(table: tf.Variable | tf.Tensor, ids: tf.Tensor) -> tf.Tensor:
    if not isinstance(table, tf.Variable):
        return tf.gather(table, ids)
    # tf.gather would read a mirrored variable as a whole first.
    return tf.raw_ops.ResourceGather(
        resource=table.handle, indices=ids, dtype=table.dtype
    )


def sum_duplicates(slices: tf.IndexedSlices) -> tf.IndexedSlices:
    """Returns slices in which each row occurs once, its gradients summed."""
    ids, positions = tf.unique(slices.indices)
    values = tf.math.unsorted_segment_sum(slices.values, positions, tf.size(ids))
    return tf.IndexedSlices(values, ids, slices.dense_shape)


def problem(inner: keras.optimizers.Optimizer, bucket: Any) -> str | None:
    """Returns why `inner` cannot update single rows of a bucket, or None."""
    if type(inner) not in _RULES:
        return f"{type(inner).__name__} has no rule for single rows"
    whole = {
        "momentum": getattr(inner, "momentum", 0.0),
        "amsgrad": getattr(inner, "amsgrad", False),
        "weight decay": bucket.kind.decay and inner.weight_decay,
        "a regularizer": bucket.entries[0].regularizer,
        "a constraint": bucket.entries[0].constraint,
    }
    used = [name for name, value in whole.items() if value]
    return f"{used[0]} would have to move every row" if used else None


def check_rule(
    inner: keras.optimizers.Optimizer, bucket: Any, ema_decay: float | None
) -> None:
    """Raises ConfigError if `inner` has no rule for the rows of a table."""
    why = problem(inner, bucket)
    if ema_decay is not None:
        why = "ema_decay would have to move every row"
    if why:
        raise errors.ConfigError(
            f"the table {bucket.entries[0].name!r} is updated row by row, but {why}.",
            "Use SGD without momentum, Adagrad, Adam or AdamW, exclude the table from "
            "decay (`no_decay`) and averages, or pass `sparse=None` to MasterWeights.",
        )


def update_rows(
    inner: keras.optimizers.Optimizer,
    table: tf.Variable,
    slices: tf.IndexedSlices,
    learning_rate: tf.Tensor,
    slots: Mapping[str, tf.Variable],
) -> None:
    """Updates the rows of `table` that `slices` name (each once), and their slots."""
    gradient = tf.cast(slices.values, table.dtype)
    step = _RULES[type(inner)](inner, gradient, slices.indices, slots)
    rate = tf.cast(learning_rate, table.dtype)
    table.scatter_sub(tf.IndexedSlices(rate * step, slices.indices))


def _sgd(inner, gradient, ids, slots):
    return gradient


def _adagrad(inner, gradient, ids, slots):
    total = _gather(slots["accumulator"], ids) + tf.square(gradient)
    slots["accumulator"].scatter_update(tf.IndexedSlices(total, ids))
    return gradient / tf.sqrt(total + inner.epsilon)


def _lazy_adam(inner, gradient, ids, slots):
    """Adam whose moments decay only when their row is touched."""
    step = tf.cast(inner.iterations + 1, gradient.dtype)
    first = _gather(slots["momentum"], ids)
    first += (gradient - first) * (1 - inner.beta_1)
    second = _gather(slots["velocity"], ids)
    second += (tf.square(gradient) - second) * (1 - inner.beta_2)
    slots["momentum"].scatter_update(tf.IndexedSlices(first, ids))
    slots["velocity"].scatter_update(tf.IndexedSlices(second, ids))
    correction = tf.sqrt(1 - inner.beta_2**step) / (1 - inner.beta_1**step)
    return correction * first / (tf.sqrt(second) + inner.epsilon)


_RULES: dict[type, Callable] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.Adam: _lazy_adam,
    keras.optimizers.AdamW: _lazy_adam,
}
