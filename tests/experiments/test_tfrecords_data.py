"""Records are counted without a look at what is in them."""

import pytest
import tensorflow as tf

import mpl
from experiments.datasets import tfrecords


def write(path, *sizes):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for size in sizes:
            writer.write(b"\xff" * size)
    return str(path)


def test_files_are_counted_in_their_order(tmp_path):
    sizes = [(3, 0, 70_000), (), (1,) * 300]
    paths = [write(tmp_path / str(number), *each) for number, each in enumerate(sizes)]
    assert tfrecords.counts(paths) == [3, 0, 300]
    assert tfrecords.count(paths[0]) == 3


@pytest.mark.parametrize("kept, needed", [
    (1, 16 + 7), (15, 16 + 7), (16 + 6, 16 + 7), (16 + 7 + 1, 23 + 16 + 9),
    (23 + 16 + 8, 23 + 16 + 9)])
def test_a_file_that_is_cut_off_is_named(kept, needed, tmp_path):
    path = tmp_path / "a"
    write(path, 7, 9)
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    number, start = (0, 0) if kept < 23 else (1, 23)
    with pytest.raises(mpl.ConfigError) as error:
        tfrecords.counts([write(tmp_path / "good", 7), str(path)])
    # Of a length that is cut itself nobody knows what the record needs.
    assert error.value.cause.startswith(
        f"File {path} ends inside record {number}, which begins at byte {start}: "
        f"it has {kept} bytes")
    if kept - start >= 8:
        assert error.value.cause.endswith(f"and needs {needed}.")
