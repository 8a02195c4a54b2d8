"""BERT's pre-training TFRecords under both sets of names."""

import numpy as np
import pytest
import tensorflow as tf

import mpl
from bert_files import LENGTH, MASKED, PIECES, V1, V2, record_arrays, write_records
from experiments.datasets import bert_records

SIZES = {"length": LENGTH, "masked": MASKED}
ARRAYS = record_arrays(5)


class Records(mpl.Experiment):
    """Only its data are read."""

    path = ""

    def build_data(self, split, context):
        if split != "train":
            return None
        source, has_pairs, _ = bert_records.load(
            [self.path], **SIZES, max_bad_records=context.max_bad_records)
        self.ranges = bert_records.ranges(len(PIECES), LENGTH, has_pairs)
        return source

    def build_model(self):
        raise NotImplementedError


def experiment_of(path):
    experiment = Records()
    experiment.path = str(path)
    return experiment


def read(source, count):
    """Returns the examples of a source in their own order."""
    zero = tf.constant(0, tf.int64)
    dataset = source.stream(
        zero, 1, count, zero, tf.zeros([2], tf.int64), shuffle=False)
    return [example for _, (example, _) in dataset]


@pytest.mark.parametrize("names", [V1, V2])
def test_examples(names, tmp_path):
    path = tmp_path / "train.tfrecord"
    write_records(path, ARRAYS, names)
    source, has_pairs, words = bert_records.load([str(path)], **SIZES)
    assert has_pairs and source.num_examples == 5
    assert words == pytest.approx(ARRAYS["masked_lm_weights"].sum(1).mean())
    examples = read(source, 5)
    for name, array in ARRAYS.items():
        got = np.stack([example[name] for example in examples])
        is_pair = name == "next_sentence_labels"
        np.testing.assert_array_equal(got, array[:, 0] if is_pair else array)
        assert got.dtype == ("float32" if name == "masked_lm_weights" else "int32")
    assert examples[0].keys() == ARRAYS.keys()


def test_pairs_are_read_where_asked_for(tmp_path):
    alone = {name: array for name, array in ARRAYS.items() if name[0] != "n"}
    write_records(tmp_path / "alone", alone)
    write_records(tmp_path / "pairs", ARRAYS)
    source, has_pairs, _ = bert_records.load([str(tmp_path / "alone")], **SIZES)
    assert not has_pairs and read(source, 5)[0].keys() == alone.keys()
    source, has_pairs, _ = bert_records.load(
        [str(tmp_path / "pairs")], **SIZES, has_pairs=False)
    assert not has_pairs and read(source, 5)[0].keys() == alone.keys()
    with pytest.raises(mpl.ConfigError, match="alone, record 0 has no `next_sent"):
        bert_records.load([str(tmp_path / "alone")], **SIZES, has_pairs=True)


@pytest.mark.parametrize("sizes, message", [
    ({"length": 8, "masked": MASKED},
     "16 values of `input_ids`, and --length asks for 8.\nUse --length=16"),
    ({"length": LENGTH, "masked": 20},
     "3 values of `masked_lm_positions`, and --masked asks for 20.\nUse --masked=3"),
])
def test_other_sizes_are_named(sizes, message, tmp_path):
    path = tmp_path / "train.tfrecord"
    write_records(path, ARRAYS)
    with pytest.raises(mpl.ConfigError, match=f"File {path}, record 0 has {message}"):
        bert_records.load([str(path)], **sizes)


def test_other_features_are_named(tmp_path):
    path = tmp_path / "train.tfrecord"
    write_records(path, ARRAYS, ("tokens", *V1[1:]))
    with pytest.raises(mpl.ConfigError, match=f"File {path}, record 0 has no `input_ids"
                       "`; it has input_mask, masked_lm_ids, .*, tokens"):
        bert_records.load([str(path)], **SIZES)


def flipped(content):
    """Changes a bit of the second record."""
    place = 16 + int.from_bytes(content[:8], "little") + 40
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]


@pytest.mark.parametrize("damage, message", [
    (lambda content: content[:-9], " ends inside record 4, which begins at byte "),
    (lambda content: b"\x93NUMPY" + content,
     "record 0 cannot be read: corrupted record at 0"),
    (lambda content: b"", "record 0 cannot be read: it has none"),
])
def test_a_damaged_file_is_named(damage, message, tmp_path):
    path = tmp_path / "train.tfrecord"
    write_records(path, ARRAYS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(mpl.ConfigError, match=f"File {path}.*{message}"):
        bert_records.load([str(path)], **SIZES)


def test_a_damaged_record_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "train.tfrecord"
    write_records(path, ARRAYS)
    path.write_bytes(flipped(path.read_bytes()))
    source, _, words = bert_records.load([str(path)], **SIZES)
    assert source.num_examples == 5  # by their lengths alone
    assert words == ARRAYS["masked_lm_weights"][0].sum()
    with pytest.raises(mpl.ConfigError, match=f"File {path} cannot be read after 1 exam"
                       "ples: corrupted record at"):
        read_all(experiment_of(path))
    source, *_ = bert_records.load([str(path)], **SIZES, max_bad_records=1)
    assert source.num_examples == 4


@pytest.mark.parametrize("count, buffer", [(1, 10_000), (4, 2_500), (80, 156)])
def test_streams_together_hold_10000_examples(count, buffer, tmp_path, monkeypatch):
    one = {name: array[:1] for name, array in ARRAYS.items()}
    paths = [str(tmp_path / f"train-{number}") for number in range(count)]
    for path in paths:
        write_records(path, one)
    given = {}

    def made(*args, **kwargs):
        given.update(kwargs)
        return file_source(*args, **kwargs)

    file_source = mpl.FileSource
    monkeypatch.setattr(mpl, "FileSource", made)
    source, *_ = bert_records.load(paths, **SIZES)
    assert source.num_streams(64) * given["shuffle_buffer"] <= 10_000
    assert given["shuffle_buffer"] == buffer
    assert given["examples_per_file"] == [1] * count


def test_a_record_that_is_no_example_is_named(tmp_path):
    path = tmp_path / "train.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(b"\xff\xff\xff")
    with pytest.raises(mpl.ConfigError, match=f"{path}, record 0 cannot be read: "):
        bert_records.load([str(path)], **SIZES)


def test_a_later_record_of_other_sizes_is_named_or_left_out(tmp_path):
    path = tmp_path / "train.tfrecord"
    mixed = {name: [*array[:2], array[2][:1], *array[3:]] for name, array in
             ARRAYS.items()}
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number in range(5):
            one = tmp_path / f"{number}"
            write_records(one, {name: np.stack([array[number]]) for name, array in
                                mixed.items()})
            writer.write(next(iter(tf.data.TFRecordDataset(str(one)))).numpy())
    with pytest.raises(mpl.ConfigError, match=f"{path} cannot be read after 2 example"):
        read_all(experiment_of(path))
    source, *_ = bert_records.load([str(path)], **SIZES, max_bad_records=1)
    assert source.num_examples == 4


@pytest.mark.parametrize("name, value, allowed", [
    ("input_ids", 99, f"0 ... {len(PIECES) - 1}"),
    ("masked_lm_ids", -1, f"0 ... {len(PIECES) - 1}"),
    ("masked_lm_positions", LENGTH, f"0 ... {LENGTH - 1}"),
    ("next_sentence_labels", 2, "0 ... 1"),
])
def test_a_value_out_of_range_is_named(name, value, allowed, tmp_path):
    path = tmp_path / "train.tfrecord"
    arrays = {key: array.copy() for key, array in ARRAYS.items()}
    arrays[name][3, 0] = value
    write_records(path, arrays)
    with pytest.raises(mpl.ConfigError) as error:
        read_all(experiment_of(path))
    assert str(error.value).startswith(
        f"File {path} cannot be read after 3 examples: Split train: `{name}` is "
        f"{value}, and must lie in {allowed}.")


def read_all(experiment):
    """Reads an experiment's data as a run does, outside of its training."""
    from mpl import data, experiment_data
    experiment.config = mpl.RunConfig(global_batch_size=5, policy="float32")
    experiment.policy = mpl.get_policy("float32")
    pipelines = experiment_data.build_pipelines(experiment)
    with data.naming_damage(pipelines.values()):
        next(iter(pipelines["train"].dataset()))
