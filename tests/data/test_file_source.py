"""Files are read by streams: each example once an epoch, from any position."""

import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from mpl.data import FileSource, Pipeline, as_source
from mpl.data.file_source import naming_damage
from mpl.errors import ConfigError
from mpl.loop.trainer import Trainer

COUNTS = [5, 1, 9, 3, 0, 7]  # 25 examples


def _write(folder, counts):
    """Files of numbered lines: 0 ... sum(counts) - 1 through all of them."""
    numbers, files = itertools.count(), []
    for file, count in enumerate(counts):
        files.append(folder / f"part-{file:02d}")
        lines = [f"{next(numbers)}\n" for _ in range(count)]
        files[-1].write_text("".join(lines))
    return [str(file) for file in files]


def _parse(line):
    return {"x": tf.strings.to_number(line, tf.int64)}


def _read(path):
    return tf.data.TextLineDataset(path).map(_parse)


def _pipeline(files, batch_size, counts=None, shuffle_buffer=0, **settings):
    source = FileSource(
        files, settings.pop("read", _read), examples_per_file=counts,
        shuffle_buffer=shuffle_buffer)
    settings = {"shuffle": True, "repeat": True, **settings}
    return Pipeline(source, global_batch_size=batch_size, **settings)


def _batches(pipeline, num_batches=-1, position=0):
    batches = pipeline.dataset(position).take(num_batches)
    return [(b["x"].numpy().tolist(), b["weight"].numpy().tolist()) for b in batches]


def _real(batches):
    pairs = [pair for x, weight in batches for pair in zip(x, weight, strict=True)]
    return [x for x, weight in pairs if weight]


def _documented(counts, batch_size, streams, seed, shuffle, epoch):
    """An epoch's batches as the class says, None for a record that fills up."""
    fold_in = tf.random.experimental.stateless_fold_in
    key = fold_in(tf.constant([0, seed]), tf.constant(epoch, tf.int64))
    counts = [count for count in counts if count]
    order = range(len(counts))
    if shuffle:
        last = tf.constant(len(counts) - 1, tf.int64)
        index = tf.range(len(counts), dtype=tf.int64)
        order = tf.random.experimental.index_shuffle(index, key, last).numpy()
    starts = np.cumsum([0, *counts])
    row = np.concatenate([np.arange(starts[f], starts[f + 1]) for f in order]).tolist()
    parts = [
        row[s * len(row) // streams : (s + 1) * len(row) // streams]
        for s in range(streams)
    ]
    rows = batch_size // streams
    for batch in range(-(-len(row) // batch_size)):
        taken = [part[batch * rows : (batch + 1) * rows] for part in parts]
        yield [x for part in taken for x in part + [None] * (rows - len(part))]


def test_streams_share_the_examples_evenly_whatever_the_files(tmp_path):
    pipeline = _pipeline(_write(tmp_path, COUNTS), 8, shuffle=False)
    assert pipeline.source.num_streams(8) == 4  # which begin with 0, 6, 12 and 18
    assert (pipeline.num_examples, pipeline.batches_per_epoch) == (25, 4)
    epoch = [
        ([0, 1, 6, 7, 12, 13, 18, 19], [1] * 8),
        ([2, 3, 8, 9, 14, 15, 20, 21], [1] * 8),
        ([4, 5, 10, 11, 16, 17, 22, 23], [1] * 8),
        # Each stream's file begins with 0, 6, 6 and 18.
        ([0, 0, 6, 6, 6, 6, 24, 18], [0, 0, 0, 0, 0, 0, 1, 0]),
    ]
    assert _batches(pipeline, 8) == epoch * 2


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("counts", "batch_size", "streams"),
    [(COUNTS, 6, 3), ([4, 4, 4, 4], 8, 4), ([30], 4, 1), ([1, 1, 1], 7, 1)],
)
def test_the_order_is_the_documented_function(
    tmp_path, counts, batch_size, streams, shuffle
):
    pipeline = _pipeline(
        _write(tmp_path, counts), batch_size, counts, seed=3, shuffle=shuffle)
    assert pipeline.source.num_streams(batch_size) == streams
    expected = [
        batch for epoch in range(3)
        for batch in _documented(counts, batch_size, streams, 3, shuffle, epoch)
    ]
    read = _batches(pipeline, len(expected))
    for (x, weight), batch in zip(read, expected, strict=True):
        assert weight == [float(record is not None) for record in batch]
        assert all(r in (None, value) for value, r in zip(x, batch, strict=True))


@pytest.mark.parametrize("shuffle_buffer", [0, 1, 4, 100])
@pytest.mark.parametrize("counts, batch_size", [(COUNTS, 4), ([2, 40, 3], 6)])
def test_every_example_comes_once_an_epoch(
    tmp_path, counts, batch_size, shuffle_buffer
):
    files = _write(tmp_path, counts)
    pipeline = _pipeline(files, batch_size, counts, shuffle_buffer)
    epoch, numbers = pipeline.batches_per_epoch, list(range(sum(counts)))
    batches = _batches(pipeline, 3 * epoch)
    epochs = [_real(batches[i * epoch : (i + 1) * epoch]) for i in range(3)]
    assert [sorted(each) for each in epochs] == [numbers] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    partial = [i for i, (_, weight) in enumerate(batches) if 0 in weight]
    assert {i % epoch for i in partial} <= {epoch - 1}


def test_each_stream_and_epoch_is_shuffled_anew(tmp_path):
    files = _write(tmp_path, [20, 20])
    pipeline = _pipeline(files, 2, [20, 20], shuffle_buffer=20)
    orders = set()
    for epoch in range(3):
        batches = [x for x, _ in _batches(pipeline, 20, 20 * epoch)]
        orders |= {tuple(x % 20 for x in part) for part in zip(*batches, strict=True)}
    assert len(orders) == 6
    assert all(sorted(order) == list(range(20)) for order in orders)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("shuffle_buffer", [0, 5])
def test_seeking_equals_skipping(tmp_path, shuffle_buffer, repeat):
    files = _write(tmp_path, COUNTS)
    pipeline = _pipeline(files, 4, COUNTS, shuffle_buffer, repeat=repeat)
    straight = _batches(pipeline, 16)
    assert len(straight) == (16 if repeat else 7)
    for position in (1, 6, 9):
        assert _batches(pipeline, 16 - position, position) == straight[position:]


def test_the_order_depends_on_the_pipeline_s_seed_alone(tmp_path):
    files = _write(tmp_path, COUNTS)
    orders = []
    for seed, program_s_seed in [(0, 0), (0, 7), (1, 0)]:
        tf.random.set_seed(program_s_seed)
        orders.append(_batches(_pipeline(files, 4, COUNTS, 5, seed=seed), 9))
        first = tf.random.uniform([])
        tf.random.set_seed(program_s_seed)
        assert tf.random.uniform([]) == first  # which is left alone
    assert orders[0] == orders[1] != orders[2]


def _noting(opened):
    def read(path):
        def note(path):
            opened.append(pathlib.Path(path.decode()).name)
            return path

        return tf.data.Dataset.from_tensors(path).flat_map(
            lambda path: _read(tf.numpy_function(note, [path], tf.string)))

    return read


@pytest.mark.parametrize("shuffle_buffer", [0, 3])
def test_a_worker_opens_its_own_files_only(tmp_path, shuffle_buffer):
    files, opened = _write(tmp_path, [6] * 8), []
    settings = dict(read=_noting(opened), repeat=False, seed=5)
    pipeline = _pipeline(files, 8, [6] * 8, shuffle_buffer, **settings)
    assert opened == []  # the examples were not counted
    by_worker = []
    for shard in range(4):
        opened.clear()
        assert len(list(pipeline.dataset(shard=shard, num_shards=4))) == 6
        by_worker.append(sorted(opened))
    assert [len(opened) for opened in by_worker] == [2] * 4
    assert sorted(sum(by_worker, [])) == sorted(pathlib.Path(f).name for f in files)
    assert by_worker != sorted(by_worker)  # shuffled


def test_a_file_that_two_streams_share_is_all_that_workers_share(tmp_path):
    files, opened = _write(tmp_path, [5, 6, 13]), []
    pipeline = _pipeline(
        files, 2, [5, 6, 13], read=_noting(opened), shuffle=False, repeat=False)
    for shard, expected in [(0, ["part-00", "part-01", "part-02"]), (1, ["part-02"])]:
        opened.clear()
        part = pipeline.dataset(shard=shard, num_shards=2)
        numbers = [int(x) for batch in part for x in batch["x"]]
        assert numbers == list(range(12 * shard, 12 * shard + 12))
        assert opened == expected


def test_files_before_a_position_are_not_opened(tmp_path):
    files, opened = _write(tmp_path, [4, 4, 4]), []
    pipeline = _pipeline(
        files, 2, [4, 4, 4], read=_noting(opened), shuffle=False, repeat=False)
    assert pipeline.source.num_streams(2) == 2
    assert _batches(pipeline, position=5) == [([5, 11], [1, 1])]
    assert sorted(opened) == ["part-01", "part-02"]


def test_examples_are_counted_once_or_given(tmp_path, monkeypatch):
    said, opened = [], []
    monkeypatch.setattr(logging, "info", lambda *args: said.append(args[0] % args[1:]))
    files = _write(tmp_path, COUNTS)
    counted = FileSource(tmp_path / "part-*", _noting(opened))
    assert sorted(opened) == [pathlib.Path(file).name for file in files]
    assert "Counted 25 examples in 6 files in " in said[0]
    given = [COUNTS, dict(zip(files, COUNTS, strict=True))]
    for source in [counted, *(FileSource(files, _read, examples_per_file=g)
                              for g in given)]:
        assert source.examples_per_file == [5, 1, 9, 3, 7]
        assert source.files == [files[i] for i in (0, 1, 2, 3, 5)]
        assert source.num_examples == 25
    assert len(said) == 1
    assert as_source(counted) is counted


def test_examples_of_any_dtype_and_shape(tmp_path):
    def parse(line):
        number = tf.strings.to_number(line)
        side = tf.cast(2 + 0 * number, tf.int32)  # not static
        return {"text": line, "image": tf.fill([side, 3], number),
                "any": tf.io.parse_tensor(tf.io.serialize_tensor(number), tf.float32),
                "weight": number / 4}

    def read(path):
        return tf.data.TextLineDataset(path).map(parse)

    files = _write(tmp_path, [3, 2])
    pipeline = _pipeline(files, 4, read=read, shuffle=False, repeat=False)
    part = pipeline.dataset(shard=1, num_shards=2)
    assert part.element_spec["any"].shape.rank is None
    assert part.element_spec["image"] == tf.TensorSpec([2, None, 3], tf.float32)
    assert part.element_spec["weight"] == tf.TensorSpec([2], tf.float32)
    first, last = part
    assert first["text"].numpy().tolist() == [b"2", b"3"]
    np.testing.assert_array_equal(first["weight"], np.float32([0.5, 0.75]))
    np.testing.assert_array_equal(first["image"][1], np.full([2, 3], 3.0))
    np.testing.assert_array_equal(last["weight"], [1.0, 0.0])


@pytest.mark.parametrize("shuffle_buffer", [0, 10])
@pytest.mark.parametrize(
    ("counts", "file", "holds"),
    [
        ([4, 6, 6], 0, "more"),
        ([6, 6, 6], 0, "fewer"),
        ([5, 6, 4], 2, "more"),
        ([5, 6, 7], 2, "fewer"),
        ([5, 9, 6], 1, "fewer"),
    ],
)
def test_a_wrong_count_is_found_when_it_is_read(
    tmp_path, counts, file, holds, shuffle_buffer
):
    """Whether the last batch is filled up or, where the last file is wrong, full."""
    files = _write(tmp_path, [5, 6, 6])
    for shuffle in (False, True):
        read = []
        pipeline = _pipeline(
            files, 3, counts, shuffle_buffer, shuffle=shuffle, repeat=False)
        with pytest.raises(tf.errors.InvalidArgumentError) as error:
            for batch in pipeline.dataset():
                read += batch["x"][batch["weight"] > 0].numpy().tolist()
        said = (f"File {files[file]} must hold {counts[file]} examples by "
                f"`examples_per_file` and holds {holds}.")
        assert said in error.value.message
        with pytest.raises(ConfigError) as error, naming_damage([pipeline]):
            list(pipeline.dataset())
        assert error.value.cause == said
        assert len(read) == len(set(read))  # what is missing had no weight


RECORD = 8 + 4 + 1 + 4  # length, its checksum, data, their checksum


@pytest.fixture
def records(tmp_path):
    """Two files of three records, and a function that damages the last one."""
    files = [str(tmp_path / name) for name in "ab"]
    for file in files:
        with tf.io.TFRecordWriter(file) as writer:
            for number in range(3):
                writer.write(str(number).encode())

    def damage(how):
        content = bytearray(pathlib.Path(files[1]).read_bytes())
        assert len(content) == 3 * RECORD
        if how == "corrupted":
            content[2 * RECORD + 12] ^= 1
        else:
            del content[2 * RECORD + 12:]
        pathlib.Path(files[1]).write_bytes(content)
        return f"^File {files[1]} cannot be read after 2 examples: {how} record at "

    return files, damage


def _read_records(path):
    return tf.data.TFRecordDataset(path).map(_parse)


@pytest.mark.parametrize("how", ["corrupted", "truncated"])
def test_a_damaged_file_is_named_where_examples_are_counted(records, how):
    files, damage = records
    assert FileSource(files, _read_records).num_examples == 6
    message = damage(how)
    with pytest.raises(ConfigError, match=message) as error:
        FileSource(files, _read_records)
    assert error.value.remedy == (
        "Repair it or leave it out, or skip it: --max_bad_records=1.")


@pytest.mark.parametrize("counts", [None, [3, 3]])
@pytest.mark.parametrize("how", ["corrupted", "truncated"])
def test_a_file_that_is_damaged_later_is_named_in_training(records, how, counts):
    class Reader(Trainer):
        def train_step(self, iterator):
            next(iterator)

    files, damage = records
    source = FileSource(files, _read_records, examples_per_file=counts)
    message = damage(how)
    pipeline = Pipeline(source, global_batch_size=2, shuffle=False, repeat=True)
    trainer = Reader(pipeline.dataset())
    settings = dict(global_batch_size=2, shuffle=False, repeat=True)
    others = [Pipeline(other, **settings) for other in (
        as_source({"x": np.zeros(3)}), FileSource(files[:1], _read_records))]
    with pytest.raises(ConfigError, match=message), naming_damage([*others, pipeline]):
        trainer.train(10)
    assert int(trainer.position.numpy()) == 2
    trainer.reset_iterator()
    with pytest.raises(tf.errors.DataLossError), naming_damage(others):
        trainer.train(10)  # damage of something else


def test_a_record_that_cannot_be_parsed_is_named(tmp_path):
    files = _write(tmp_path, [2, 2])
    pathlib.Path(files[0]).write_text("0\n1\nx\n")
    message = f"File {files[0]} cannot be read after 2 examples: .*x"
    with pytest.raises(ConfigError, match=message):
        FileSource(files, _read)


def test_what_cannot_be_a_source_of_files_is_an_error(tmp_path):
    files = _write(tmp_path, [2, 0])
    missing, pattern = str(tmp_path / "none"), str(tmp_path / "none-*")

    def fault(files=files, read=_read, **settings):
        with pytest.raises(ConfigError) as error:
            FileSource(files, read, **settings)
        assert len(str(error.value).splitlines()) == 2
        return error.value.cause

    assert fault([files[0], missing]) == f"`files` names no file: {missing}."
    assert fault(pattern) == f"`files` names no file: {pattern}."
    assert fault([]) == "`files` names no file: []."
    assert fault([files[1]]) == "The data has no examples."
    assert fault(examples_per_file=[0, 0]) == "The data has no examples."
    assert fault(read=lambda path: {"x": path}) == (
        "`read` must return a tf.data.Dataset, not dict.")
    assert "must be dicts of dense tensors" in fault(read=tf.data.TextLineDataset)
    assert "never ends" in fault(read=lambda path: _read(path).repeat())
    counts = "`examples_per_file` must be 0 or more for each of 2 files, not "
    for given in ([2], [2, -1], {files[0]: 2}):
        assert fault(examples_per_file=given) == f"{counts}{given}."


def test_the_number_of_streams_is_a_divisor_of_the_batch(tmp_path):
    source = FileSource(_write(tmp_path, [1] * 70), _read, examples_per_file=[1] * 70)
    sizes = {1: 1, 7: 7, 64: 64, 128: 64, 96: 48, 71: 1, 1000: 50}
    assert {size: source.num_streams(size) for size in sizes} == sizes


def _drawn(example, seed):
    """Another number for each example and epoch."""
    return {**example, "drawn": tf.random.stateless_uniform([], seed)}


def _draws(files, position=0, shard=0, num_shards=1, **settings):
    source = FileSource(files, _read, transform=_drawn)
    pipeline = Pipeline(source, global_batch_size=6, repeat=True, **settings)
    batches = pipeline.dataset(position, shard=shard, num_shards=num_shards)
    return [list(zip(b["x"].numpy().tolist(), b["drawn"].numpy().tolist()))
            for b in batches.take(6 - position)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_transform_is_a_function_of_seed_and_place(tmp_path, shuffle):
    files = _write(tmp_path, [5, 6, 6, 2])  # 4 batches an epoch
    whole = _draws(files, shuffle=shuffle)
    assert _draws(files, shuffle=shuffle) == whole
    for position in (1, 3, 4, 5):
        assert _draws(files, position, shuffle=shuffle) == whole[position:]
    parts = [_draws(files, shard=n, num_shards=3, shuffle=shuffle) for n in range(3)]
    assert [sorted(sum(batch, [])) for batch in zip(*parts)] == list(map(sorted, whole))
    values = [drawn for batch in whole for _, drawn in batch]
    assert len(set(values)) == len(values) == 36  # two epochs, and what fills them up
    if shuffle:
        assert _draws(files, shuffle=True, seed=1) != whole


def test_a_transform_that_fails_names_file_and_example(tmp_path):
    files = _write(tmp_path, [2, 4])

    def transform(example, seed):
        check = tf.debugging.Assert(example["x"] != 4, ["no such number"])
        with tf.control_dependencies([check]):
            return {"x": tf.identity(example["x"])}

    pipeline = Pipeline(FileSource(files, _read, transform=transform),
                        global_batch_size=2, shuffle=True, repeat=False)
    said = f"File {files[1]} cannot be read after 2 examples: no such number"
    with pytest.raises(ConfigError, match=said), naming_damage([pipeline]):
        list(pipeline.dataset())
