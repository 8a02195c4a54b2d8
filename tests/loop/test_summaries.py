"""What TensorBoard finds, and where."""

import numpy as np
import pytest
import tensorflow as tf

from mpl.loop.summaries import AFTER_STEP, Summaries

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


def test_a_scalar_is_as_tensorflow_writes_it(tmp_path):
    step = tf.Variable(10, dtype=tf.int64)
    values = {"loss": 0.1, "scale": 2.0**15, "nan": np.nan, "count": 3}
    Summaries(step, str(tmp_path / "ours"), None).write("train", values)
    with tf.summary.create_file_writer(str(tmp_path / "theirs")).as_default(step):
        for name, value in values.items():
            tf.summary.scalar(name, value, description=AFTER_STEP)

    def told(path):
        file, = path.iterdir()
        events = [tf.compat.v1.Event.FromString(record.numpy())
                  for record in tf.data.TFRecordDataset(str(file))]
        return [(event.step, value.tag, value.metadata, value.tensor.dtype,
                 str(tf.make_ndarray(value.tensor)))
                for event in events for value in event.summary.value]

    assert len(told(tmp_path / "ours")) == 4
    assert told(tmp_path / "ours") == told(tmp_path / "theirs")


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


def steps_in(directory):
    return sorted(step for _, step in scalars_in(directory))


def test_a_run_that_goes_on_writes_no_step_twice(tmp_path):
    def life(first, last):
        """Trains with a point each step, and evaluates at the end."""
        step = tf.Variable(first, dtype=tf.int64)
        summaries = Summaries(step, str(tmp_path / "train"), str(tmp_path))
        for number in range(first, last):
            with summaries.to("train"):
                tf.summary.scalar("inside", float(number))
            step.assign(number + 1)
            summaries.write("train", {"after": float(number)})
        summaries.write("validation", {"loss": float(last)})

    life(0, 5)
    life(3, 4)  # killed after 4 it left nothing of 5
    assert steps_in(tmp_path / "train") == [0, 1, 1, 2, 2, 3, 3, 4]
    assert steps_in(tmp_path / "validation") == [4]
    life(4, 6)
    found = scalars_in(tmp_path / "train")
    assert found == {
        **{("inside", n): float(n) for n in range(6)},
        **{("after", n + 1): float(n) for n in range(6)},
    }
    files = [path.name for path in (tmp_path / "train").iterdir()]
    assert all(".tfevents." in name for name in files)
    records = sum(1 for name in files
                  for _ in tf.data.TFRecordDataset(str(tmp_path / "train" / name)))
    assert records == len(found) + len(files)  # each begins with its version


def test_an_evaluation_of_an_older_step_leaves_later_ones_alone(tmp_path):
    def evaluate(number, value):
        summaries = Summaries(tf.Variable(number, dtype=tf.int64), None, str(tmp_path))
        summaries.write("test", {"loss": value})

    for number in (3, 6, 9):
        evaluate(number, 1.0)
    evaluate(6, 2.0)
    assert scalars_in(tmp_path / "test") == {
        ("loss", 3): 1.0, ("loss", 6): 2.0, ("loss", 9): 1.0}


def test_beside_another_process_nothing_is_deleted(tmp_path):
    for rewrites in (True, False):
        step = tf.Variable(5, dtype=tf.int64)
        summaries = Summaries(step, str(tmp_path / "train"), str(tmp_path), rewrites)
        summaries.write("validation", {"loss": 1.0})
        summaries.write("train", {"loss": 1.0})
    for split in ("train", "validation"):
        files = [str(path) for path in (tmp_path / split).iterdir()]
        records = [sum(1 for _ in tf.data.TFRecordDataset(file)) for file in files]
        assert records == [2, 2]  # the version, and the loss


def test_a_file_whose_writer_was_killed_is_kept_as_far_as_it_goes(tmp_path):
    step = tf.Variable(0, dtype=tf.int64)
    summaries = Summaries(step, str(tmp_path), None)
    for number in (1, 2, 3):
        step.assign(number)
        summaries.write("train", {"loss": 0.5})
    (path,) = tmp_path.glob("*.tfevents.*")
    path.write_bytes(path.read_bytes()[:-3])
    step.assign(1)
    Summaries(step, str(tmp_path), None).write("train", {"other": 1.0})
    assert scalars_in(tmp_path) == {("loss", 1): 0.5, ("other", 1): 1.0}
