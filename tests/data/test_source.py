"""What enters is checked once, with the array and the record in the message."""

import numpy as np
import pytest
import tensorflow as tf

from mpl.data import ArraySource, DatasetSource, as_source
from mpl.errors import ConfigError


def test_gather_returns_the_examples_at_the_index():
    source = ArraySource({"x": np.arange(6).reshape(3, 2), "name": ["a", "b", "c"]})
    batch = source.gather(tf.constant([2, 0], tf.int64))
    np.testing.assert_array_equal(batch["x"], [[4, 5], [0, 1]])
    assert batch["name"].numpy().tolist() == [b"c", b"a"]
    assert source.num_examples == 3


@pytest.mark.parametrize(
    "texts",
    [
        np.array(["a", "bc"]),
        np.array([b"a", b"bc"]),
        np.array(["a", "bc"], object),
        np.array([b"a", b"bc"], object),  # as `as_numpy_iterator` gives them
    ],
)
def test_strings_of_any_kind(texts):
    batch = ArraySource({"text": texts}).gather(tf.constant([1, 0], tf.int64))
    assert batch["text"].numpy().tolist() == [b"bc", b"a"]


def _with(index, value, dtype=np.float32):
    array = np.ones([4, 3], dtype)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no examples"),
        ({"x": np.zeros([0, 2])}, "no examples"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, r"same number .*'x': 3, 'y': 4"),
        ({"x": np.float32(1)}, "same number of examples"),
        ({"x": np.array([{}, None])}, "`x` holds Python objects"),
        ({"x": np.array(["a", None], object)}, "`x` holds Python objects"),
        ({"x": np.zeros(3, "datetime64[s]")}, r"`x` holds datetime64\[s\]"),
        ({"x": _with((2, 1), np.nan)}, "`x` has a NaN or an infinity in record 2"),
        ({"x": _with((3, 0), np.inf)}, "`x` has a NaN or an infinity in record 3"),
        (
            {"x": _with((1, 0), -np.inf, tf.bfloat16.as_numpy_dtype)},
            "`x` has a NaN or an infinity in record 1",
        ),
        ({"weight": np.ones(4, np.int32)}, r"`weight` is int32 \[4\]"),
        ({"weight": np.ones([4, 2])}, r"`weight` is float64 \[4, 2\]"),
        ({"weight": np.array([1.0, -0.5])}, r"negative in record 1 \(-0.5\)"),
    ],
)
def test_faulty_arrays_are_named(arrays, message):
    with pytest.raises(ConfigError, match=message) as error:
        ArraySource(arrays)
    assert len(str(error.value).splitlines()) == 2


def test_a_dataset_of_other_than_dicts_is_an_error():
    with pytest.raises(ConfigError, match="must be dicts of dense tensors"):
        DatasetSource(tf.data.Dataset.range(3))
    ragged = tf.data.Dataset.from_tensor_slices({"x": tf.ragged.constant([[1], []])})
    with pytest.raises(ConfigError, match="must be dicts of dense tensors"):
        DatasetSource(ragged)


def test_an_endless_or_empty_dataset_is_an_error():
    dataset = tf.data.Dataset.from_tensor_slices({"x": [1, 2]})
    with pytest.raises(ConfigError, match="never ends has no epochs"):
        DatasetSource(dataset.repeat())
    with pytest.raises(ConfigError, match="no examples"):
        DatasetSource(dataset.take(0))


def test_num_examples_of_a_dataset():
    dataset = tf.data.Dataset.from_tensor_slices({"x": [1, 2, 3]})
    unknown = dataset.filter(lambda example: example["x"] > 1)
    assert DatasetSource(dataset).num_examples == 3
    assert DatasetSource(unknown).num_examples is None
    source = DatasetSource(unknown, num_examples=3)
    assert source.num_examples == 3
    with pytest.raises(tf.errors.FailedPreconditionError, match="contain 3 elements"):
        list(source.dataset)


def test_as_source():
    source = ArraySource({"x": np.zeros(3)})
    assert as_source(source) is source
    assert as_source({"x": np.zeros(5)}).num_examples == 5
    dataset = tf.data.Dataset.from_tensor_slices({"x": [1, 2]})
    assert as_source(dataset).num_examples == 2
    with pytest.raises(ConfigError, match="not list"):
        as_source([1, 2])
