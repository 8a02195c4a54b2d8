"""cast_floating: floats are cast, all else passes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.precision import cast_floating

DTYPES = [tf.float16, tf.bfloat16, tf.float32, tf.float64]


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_floats_of_every_kind_are_cast(source, target):
    tree = {
        "tensor": tf.constant([1.5], source),
        "variable": [tf.Variable([1.5], dtype=source)],
        "array": (np.array([1.5], source.as_numpy_dtype),),
        "scalar": source.as_numpy_dtype(1.5),
    }
    cast = cast_floating(tree, target)
    assert [leaf.dtype for leaf in (cast["tensor"], cast["variable"][0])] == [
        target
    ] * 2
    for leaf in (cast["array"][0], cast["scalar"]):
        assert isinstance(leaf, (np.ndarray, np.generic))
        assert leaf.dtype == target.as_numpy_dtype
    assert all(float(leaf[0]) == 1.5 for leaf in (cast["tensor"], cast["array"][0]))


def test_everything_else_passes():
    tree = {
        "int": tf.constant([2**31 - 1]),
        "uint8": np.array([255], np.uint8),
        "bool": tf.constant([True]),
        "string": tf.constant(["a"]),
        "words": np.array(["a"]),
        "none": None,
        "python": [1, 2.5, "a", True],
    }
    cast = cast_floating(tree, tf.bfloat16)
    assert cast["python"] == [1, 2.5, "a", True]
    for key in set(tree) - {"python"}:
        assert cast[key] is tree[key]


def test_no_dtype_changes_nothing():
    tree = [tf.constant(1.0), np.ones(2)]
    assert cast_floating(tree, None) is tree


def test_values_are_rounded_to_nearest_even():
    cast = cast_floating(tf.constant([1 + 2**-8, 1 + 3 * 2**-8, 70000.0]), tf.bfloat16)
    assert cast.numpy().tolist() == [1.0, 1 + 2**-6, 70144.0]


def test_slices_and_symbolic_tensors():
    slices = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([4, 5]), tf.constant([9, 3]))
    cast = cast_floating(slices, tf.float16)
    assert cast.values.dtype == tf.float16 and cast.indices.dtype == tf.int32
    symbolic = cast_floating(
        [keras.Input([2]), keras.Input([2], dtype="int32")], "float16"
    )
    assert [leaf.dtype for leaf in symbolic] == ["float16", "int32"]
    variable = cast_floating(keras.Variable([1.5]), tf.float16)
    assert tf.is_tensor(variable) and variable.dtype == tf.float16
