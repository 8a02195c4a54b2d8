"""What TensorBoard finds, and where."""

import numpy as np
import pytest
import tensorflow as tf

from mpl.loop.summaries import Summaries

pytest.importorskip("tensorboard")


def scalars_in(directory):
    """Returns {(tag, step): value} of all event files in a directory."""
    found = {}
    for path in sorted(directory.glob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    return found


@pytest.mark.parametrize("eval_folder", [None, "evaluation"])
def test_writes_a_folder_for_each_evaluation_set(eval_folder, tmp_path):
    step = tf.Variable(10, dtype=tf.int64)
    eval_directory = eval_folder and str(tmp_path / eval_folder)
    summaries = Summaries(step, str(tmp_path), eval_directory)
    summaries.write("train", {"loss": 0.5, "scale": 2.0, "vector": np.ones(3)})
    summaries.write("validation", {"loss": 0.75})
    step.assign(20)
    summaries.write("train", {"loss": 0.25})
    # Nothing waits to be written.
    train = {("loss", 10): 0.5, ("scale", 10): 2.0, ("loss", 20): 0.25}
    assert scalars_in(tmp_path) == train
    validation = scalars_in(tmp_path / (eval_folder or "") / "validation")
    assert validation == {("loss", 10): 0.75}


def test_what_is_said_inside_is_written_at_the_multiples(tmp_path):
    step = tf.Variable(0, dtype=tf.int64)
    summaries = Summaries(step, str(tmp_path), None)

    @tf.function
    def say():
        tf.summary.scalar("x", 2.0)

    with summaries.to("train", interval=3):
        for number in range(8):
            step.assign(number)
            say()
    assert scalars_in(tmp_path) == {("x", 0): 2.0, ("x", 3): 2.0, ("x", 6): 2.0}


def test_without_a_directory_nothing_is_written(tmp_path):
    own = tf.summary.create_file_writer(str(tmp_path))
    summaries = Summaries(tf.Variable(0, dtype=tf.int64), None, None)
    summaries.write("train", {"loss": 0.5})
    with own.as_default(step=7), summaries.to("train"):
        tf.summary.scalar("mine", 1.0)  # where the caller wants it
    own.flush()
    assert scalars_in(tmp_path) == {("mine", 7): 1.0}
