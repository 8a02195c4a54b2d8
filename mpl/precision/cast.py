"""Casts of the floating leaves of a nest."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf


def is_floating(leaf: Any) -> bool:
    """Tells whether a leaf is a tensor, variable or array of a floating dtype."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        # NumPy does not count bfloat16, an extension type, among its floats.
        return leaf.dtype.kind == "f" or leaf.dtype == tf.bfloat16.as_numpy_dtype
    if tf.is_tensor(leaf) or keras.utils.is_keras_tensor(leaf):
        return tf.as_dtype(leaf.dtype).is_floating
    return False


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
        if not is_floating(leaf):
            return leaf
        if isinstance(leaf, (np.ndarray, np.generic)):
            return leaf.astype(target.as_numpy_dtype, copy=False)
        if keras.utils.is_keras_tensor(leaf):
            return keras.ops.cast(leaf, target.name)
        return tf.cast(leaf, target)

    return tf.nest.map_structure(cast, tree)
