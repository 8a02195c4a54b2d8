"""Casts of the floating leaves of a nest."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def map_floating(function: Callable[[Any], Any], tree: Any) -> Any:
    """Applies a function to the tensors, variables and arrays of a floating dtype.

    Everything else in the nest (`tf.nest`) passes as it is. Of IndexedSlices the
    function gets the values.
    """

    def apply(leaf):
        if isinstance(leaf, tf.IndexedSlices):
            return tf.IndexedSlices(apply(leaf.values), leaf.indices, leaf.dense_shape)
        return function(leaf) if _is_floating(leaf) else leaf

    return tf.nest.map_structure(apply, tree)


def cast_floating(tree: Any, dtype: tf.DType | None) -> Any:
    """Casts the floating leaves of a nest; everything else passes as it is.

    Args:
        tree: a nest (`tf.nest`) of tensors, variables, NumPy arrays (which stay
            NumPy) or anything else. Integers, bools, strings, None and Python
            numbers pass.
        dtype: the floating dtype to cast to; None returns `tree` unchanged.

    Returns:
        A nest of the same structure and shapes. A variable becomes a tensor.
    """
    if dtype is None:
        return tree
    target = tf.as_dtype(dtype)

    def cast(leaf):
        if isinstance(leaf, (np.ndarray, np.generic)):
            return leaf.astype(target.as_numpy_dtype, copy=False)
        if keras.utils.is_keras_tensor(leaf):
            return keras.ops.cast(leaf, target.name)
        return tf.cast(leaf, target)

    return map_floating(cast, tree)


def _is_floating(leaf: Any) -> bool:
    if isinstance(leaf, (np.ndarray, np.generic)):
        # NumPy does not count bfloat16, an extension type, among its floats.
        return leaf.dtype.kind == "f" or leaf.dtype == tf.bfloat16.as_numpy_dtype
    if tf.is_tensor(leaf) or keras.utils.is_keras_tensor(leaf):
        return tf.as_dtype(leaf.dtype).is_floating
    return False
