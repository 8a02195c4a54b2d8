"""What workers are sent: data as a graph. Processes: test_parameter_server.py."""

import numpy as np
import pytest
import tensorflow as tf

from mpl.errors import ConfigError
from mpl.loop.coordinated import graph_of


def test_a_dataset_comes_out_as_it_went_in():
    x = np.arange(6, dtype=np.float32)
    dataset = tf.data.Dataset.from_tensor_slices({"x": x}).map(
        lambda example: {"x": example["x"] + 1}).batch(4)
    variant = tf.raw_ops.DatasetFromGraph(graph_def=graph_of(dataset))
    copy = tf.data.experimental.from_variant(variant, dataset.element_spec)
    there, here = list(copy.as_numpy_iterator()), list(dataset.as_numpy_iterator())
    assert [len(batch["x"]) for batch in there] == [4, 2]
    for a, b in zip(there, here):
        np.testing.assert_array_equal(a["x"], b["x"])
    np.testing.assert_array_equal(there[1]["x"], [5, 6])


@pytest.mark.parametrize("name", ["from_generator", "py_function"])
def test_data_that_call_python_are_refused(name):
    spec = tf.TensorSpec([], tf.int32)
    dataset = {
        "from_generator": tf.data.Dataset.from_generator(
            lambda: iter([1]), output_signature=spec),
        "py_function": tf.data.Dataset.range(3).map(
            lambda x: tf.py_function(lambda y: y + 1, [x], tf.int64)),
    }[name]
    with pytest.raises(ConfigError, match="^The training data call Python"):
        graph_of(dataset.batch(1))
