"""Bad records of files are left out, up to a number, and each is named."""

import gzip
import itertools
import pathlib

import pytest
import tensorflow as tf
from absl import logging

from mpl.data import FileSource, Pipeline, naming_damage
from mpl.errors import ConfigError

FRAME = 8 + 4 + 4


def _text(number):
    return b"number %d" % number * (number % 3 + 1)


def _write(folder, *counts):
    """Files of numbered records, of different lengths."""
    numbers, files = itertools.count(), []
    for file, count in enumerate(counts):
        files.append(str(folder / f"part-{file}"))
        with tf.io.TFRecordWriter(files[-1]) as writer:
            for _ in range(count):
                writer.write(_text(next(numbers)))
    return files


def _damage(file, first, record, how="data"):
    """Damages a record of a file that begins with number `first`."""
    content = bytearray(pathlib.Path(file).read_bytes())
    start = sum(FRAME + len(_text(first + i)) for i in range(record))
    if how == "data":
        content[start + 12 + 3] ^= 1
    elif how == "length":
        content[start + 6] ^= 1
    elif how == "header":
        del content[start + 5:]
    else:
        del content[start + 12 + 3:]
    pathlib.Path(file).write_bytes(content)


def _parse(text):
    number = tf.strings.split(tf.strings.regex_replace(text, "number", ""))[0]
    return {"x": tf.strings.to_number(number, tf.int64)}


def _read(path):
    return tf.data.TFRecordDataset(path).map(_parse)


@pytest.fixture
def warned(monkeypatch):
    warned = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: warned.append(text % args))
    return warned


def _numbers(source, batch_size=2, shuffle=False, shard=(0, 1)):
    pipeline = Pipeline(
        source, global_batch_size=batch_size, shuffle=shuffle, repeat=False)
    batches = pipeline.dataset(shard=shard[0], num_shards=shard[1])
    return [
        int(x) for batch in batches
        for x, weight in zip(batch["x"], batch["weight"]) if weight]


def _good(bad, count=18):
    return [number for number in range(count) if number not in bad]


@pytest.mark.parametrize("shuffle_buffer", [0, 4])
def test_damaged_records_are_left_out(tmp_path, warned, shuffle_buffer):
    files = _write(tmp_path, 6, 6, 6)
    _damage(files[0], 0, 0)
    _damage(files[1], 6, 3)
    _damage(files[1], 6, 4)
    _damage(files[2], 12, 5, "truncated")
    source = FileSource(files, _read, max_bad_records=4, shuffle_buffer=shuffle_buffer)
    assert (source.num_examples, source.examples_per_file) == (14, [5, 4, 5])
    places = [(0, 0), (1, 3), (1, 4), (2, 5)]
    hows = ["corrupted"] * 3 + ["truncated"]
    assert len(warned) == 4
    for found, ((file, record), how, text) in enumerate(zip(places, hows, warned), 1):
        assert text.startswith(
            f"File {files[file]} cannot be read after {record} examples: {how} record")
        assert text.endswith(f". It is left out ({found} of at most 4).")
    good = _good([0, 9, 10, 17])
    assert sorted(_numbers(source)) == good
    assert sorted(_numbers(source, shuffle=True)) == good
    parts = [_numbers(source, 4, True, (shard, 2)) for shard in range(2)]
    assert sorted(sum(parts, [])) == good
    again = FileSource(files, _read, max_bad_records=4, shuffle_buffer=shuffle_buffer)
    assert _numbers(again, shuffle=True) == _numbers(source, shuffle=True)


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_one_more_is_an_error(tmp_path, warned, allowed):
    files = _write(tmp_path, 6, 6)
    for file, record in [(0, 1), (1, 0), (1, 2)]:
        _damage(files[file], 6 * file, record)
    file, record = [(0, 1), (1, 0), (1, 2)][allowed]
    message = f"^File {files[file]} cannot be read after {record} examples: corrupted"
    with pytest.raises(ConfigError, match=message) as error:
        FileSource(files, _read, max_bad_records=allowed)
    assert error.value.remedy == (
        f"Repair it or leave it out, or skip it: --max_bad_records={allowed + 1}.")
    assert len(warned) == allowed


# TensorFlow takes what is shorter than the header of a record for the file's end.
@pytest.mark.parametrize("how, found", [("header", 0), ("truncated", 1)])
def test_a_file_cut_off_in_its_first_record_is_left_out(tmp_path, warned, how, found):
    files = _write(tmp_path, 3, 3)
    _damage(files[0], 0, 0, how)
    source = FileSource(files, _read, max_bad_records=1)
    assert _numbers(source) == [3, 4, 5] and len(warned) == found
    assert source.files == files[1:]


def _compress(file):
    content = bytearray(gzip.compress(pathlib.Path(file).read_bytes()))
    pathlib.Path(file).write_bytes(content[:len(content) // 2])


def test_what_nobody_knows_the_size_of_is_an_error(tmp_path, warned):
    files = _write(tmp_path, 6, 6)
    _damage(files[0], 0, 2, "length")
    with pytest.raises(ConfigError, match=f"{files[0]} .* after 2 examples: corr") as e:
        FileSource(files, _read, max_bad_records=9)
    assert e.value.remedy == "Repair it or leave it out." and not warned
    _compress(files[1])
    with pytest.raises(ConfigError, match=f"{files[1]} cannot be read after ") as e:
        FileSource(
            files[1], lambda path: tf.data.TFRecordDataset(path, "GZIP").map(_parse),
            max_bad_records=9)
    assert e.value.remedy == "Repair it or leave it out." and not warned


def test_records_that_cannot_be_parsed_are_left_out(tmp_path, warned):
    files = _write(tmp_path, 6, 6)
    _damage(files[1], 6, 1)

    def read(path):
        def parse(text):
            example = _parse(text)
            bad = tf.reduce_any(example["x"] == [0, 8, 11])
            with tf.control_dependencies([tf.debugging.Assert(~bad, ["no such"])]):
                return {"x": tf.identity(example["x"])}

        return tf.data.TFRecordDataset(path).map(parse)

    for allowed in (5, 4):
        warned.clear()
        source = FileSource(files, read, max_bad_records=allowed)
        places = [(0, 0, "no such"), (1, 1, "corrupted"), (1, 2, "no"), (1, 5, "no")]
        assert len(warned) == 4
        for text, (file, record, reason) in zip(warned, places):
            assert f"after {record} examples: " in text and reason in text
            assert text.startswith(f"File {files[file]} cannot be read ")
        assert source.examples_per_file == [5, 3]
        for shuffle in (False, True):
            assert sorted(_numbers(source, shuffle=shuffle)) == _good([0, 7, 8, 11], 12)
    with pytest.raises(ConfigError, match="after 5 examples: no such"):
        FileSource(files, read, max_bad_records=3)


def test_lines_that_cannot_be_parsed_are_left_out(tmp_path, warned):
    (tmp_path / "part").write_text("0\nx\n2\n3\ny\n")

    def read(path):
        return tf.data.TextLineDataset(path).map(
            lambda line: {"x": tf.strings.to_number(line, tf.int64)})

    source = FileSource(
        tmp_path / "part", read, max_bad_records=2, examples_per_file=[9])
    assert (_numbers(source), source.examples_per_file) == ([0, 2, 3], [3])
    assert "after 1 examples" in warned[0] and "after 4 examples" in warned[1]


@pytest.mark.parametrize("file", [0, 1])
def test_a_record_that_becomes_bad_later_is_an_error(tmp_path, warned, file):
    files = _write(tmp_path, 6, 6)
    _damage(files[1], 6, 1)
    source = FileSource(files, _read, max_bad_records=5)
    pipeline = Pipeline(source, global_batch_size=2, shuffle=False, repeat=False)
    _damage(files[file], 6 * file, 4)
    if file == 1:  # of which a copy was made
        assert len(list(pipeline.dataset())) == 6
        return
    message = f"^File {files[0]} cannot be read after 4 examples: corrupted"
    with pytest.raises(ConfigError, match=message), naming_damage([pipeline]):
        list(pipeline.dataset())
    assert len(warned) == 1
