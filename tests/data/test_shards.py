"""What workers train on is, together, what one worker would train on."""

import json

import numpy as np
import pytest
import tensorflow as tf

from mpl.data import ArraySource, DatasetSource, FileSource, Pipeline, fingerprint
from mpl.errors import ConfigError

NUM_EXAMPLES, BATCH, EPOCH = 50, 12, 5  # the last batch of an epoch has 2 examples
FILES = [5, 17, 1, 9, 3, 15]


def _arrays():
    index = np.arange(NUM_EXAMPLES)
    return {"x": index, "image": np.tile(index[:, None], 2).astype(np.float32),
            "weight": (1 + index % 3) / 2, "name": [f"{i:d}" for i in index]}


def _noise(batch, seed):
    return {**batch, "noise": tf.random.stateless_uniform([BATCH, 3], seed)}


def _files(folder, shuffle_buffer=0, offset=0, name="part"):
    numbers = np.split(np.arange(NUM_EXAMPLES) + offset, np.cumsum(FILES)[:-1])
    for number, part in enumerate(numbers):
        text = "".join(f"{i}\n" for i in part)
        (folder / f"{name}-{number}").write_text(text)

    def parse(line):
        return {"x": tf.strings.to_number(line, tf.int64), "name": line}

    return FileSource(
        str(folder / f"{name}-*"),
        lambda path: tf.data.TextLineDataset(path).map(parse),
        examples_per_file=FILES, shuffle_buffer=shuffle_buffer)


SOURCES = {
    "arrays": lambda folder: ArraySource(_arrays()),
    "augmented": lambda folder: ArraySource(_arrays(), _noise),
    "dataset": lambda folder: DatasetSource(
        tf.data.Dataset.from_tensor_slices(_arrays())),
    "files": _files,
    "shuffled files": lambda folder: _files(folder, shuffle_buffer=4),
}


def _pipeline(source, **settings):
    settings = {"shuffle": True, "repeat": True, **settings}
    return Pipeline(source, global_batch_size=BATCH, **settings)


def _read(dataset, num_batches):
    batches = dataset.take(num_batches)
    return [{name: t.numpy() for name, t in batch.items()} for batch in batches]


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [2, 3, 4])
@pytest.mark.parametrize("source", SOURCES)
def test_parts_together_are_the_global_batch(source, num_shards, tmp_path):
    """Files have 6 streams: two or three workers share them, four read them all."""
    pipeline = _pipeline(SOURCES[source](tmp_path), seed=num_shards)
    for position in (0, EPOCH + 3):
        whole = _read(pipeline.dataset(position), 4)
        parts = [pipeline.dataset(position, shard=shard, num_shards=num_shards)
                 for shard in range(num_shards)]
        for part in parts:
            for spec in part.element_spec.values():
                assert spec.shape[0] == BATCH // num_shards
        batches = zip(*(_read(part, 4) for part in parts), strict=True)
        for expected, read in zip(whole, batches, strict=True):
            for name, value in expected.items():
                joined = np.concatenate([part[name] for part in read])
                np.testing.assert_array_equal(joined, value, err_msg=name)


@pytest.mark.parametrize("source", SOURCES)
def test_workers_see_the_end_after_as_many_batches(source, tmp_path):
    pipeline = _pipeline(SOURCES[source](tmp_path), shuffle=False, repeat=False)
    parts = [_read(pipeline.dataset(shard=i, num_shards=4), 99) for i in range(4)]
    assert [len(part) for part in parts] == [EPOCH] * 4
    real = [x for part in parts for batch in part
            for x, weight in zip(batch["x"], batch["weight"], strict=True) if weight]
    assert sorted(real) == list(range(NUM_EXAMPLES))
    assert all(len(batch["x"]) == 3 for part in parts for batch in part)
    assert _read(pipeline.dataset(EPOCH, shard=1, num_shards=4), 99) == []


@pytest.mark.parametrize("transform, gathered", [(None, 3), (_noise, 12)])
def test_a_worker_gathers_its_own_records_unless_they_are_changed(transform, gathered):
    records = []

    class Noting(ArraySource):
        def gather(self, index):
            tf.numpy_function(lambda index: records.append(index.tolist()), [index], [])
            return super().gather(index)

    pipeline = _pipeline(Noting(_arrays(), transform), repeat=False)
    own = [x for batch in _read(pipeline.dataset(shard=2, num_shards=4), 99)
           for x in batch["x"].tolist()]
    records = sum(records, [])
    assert len(records) == EPOCH * gathered
    if transform is None:
        assert records == own


@pytest.mark.parametrize("source", ["arrays", "files"])
def test_replicas_of_a_worker_take_consecutive_rows(source, tmp_path, strategy_of):
    """As the second of two workers with two replicas each."""
    pipeline, strategy = _pipeline(SOURCES[source](tmp_path)), strategy_of(2)

    def part(context):
        return pipeline.dataset(3, shard=1, num_shards=2).rebatch(BATCH // 4)

    whole = _read(pipeline.dataset(3), 4)
    distributed = iter(strategy.distribute_datasets_from_function(part))
    for batch in whole:
        replicas = strategy.experimental_local_results(next(distributed)["x"])
        assert [x.shape for x in replicas] == [[3], [3]]
        np.testing.assert_array_equal(tf.concat(replicas, 0), batch["x"][6:])


def test_parts_that_are_not_equal_are_an_error():
    with pytest.raises(ConfigError) as error:
        _pipeline(ArraySource(_arrays())).dataset(num_shards=5)
    assert error.value.cause == (
        "`global_batch_size` (12) must be divisible by 5 workers.")
    assert error.value.remedy == "Use a multiple, such as 15."
    with pytest.raises(ConfigError, match="such as 24"):
        _pipeline(ArraySource(_arrays())).dataset(num_shards=24)


def test_several_workers_must_know_where_the_data_end():
    dataset = tf.data.Dataset.from_tensor_slices(_arrays())
    dataset = dataset.filter(lambda example: example["x"] < 30)
    pipeline = _pipeline(DatasetSource(dataset), repeat=False)
    assert len(_read(pipeline.dataset(), 99)) == 3
    with pytest.raises(ConfigError, match="cannot agree on .*\n.*`num_examples`"):
        pipeline.dataset(num_shards=2)
    known = _pipeline(DatasetSource(dataset, num_examples=30), repeat=False)
    assert len(_read(known.dataset(shard=1, num_shards=2), 99)) == 3
    endless = _pipeline(DatasetSource(dataset))
    first = _read(endless.dataset(4, shard=1, num_shards=2), 1)[0]
    assert first["x"].tolist() == [18, 19, 20, 21, 22, 23]


def test_fingerprints_tell_data_apart(tmp_path):
    facts = fingerprint(_pipeline(ArraySource(_arrays())))
    assert facts == fingerprint(_pipeline(ArraySource(_arrays())))
    assert facts == json.loads(json.dumps(facts))
    assert facts["num_examples"] == "50"
    assert "'image': TensorSpec(shape=(12, 2), dtype=tf.float32" in facts["elements"]
    changed = {**_arrays(), "name": [f"{i:d}." for i in range(NUM_EXAMPLES)]}
    longer = {name: np.concatenate([a, a[:1]]) for name, a in _arrays().items()}
    others = [
        _pipeline(ArraySource(_arrays()), seed=1),
        _pipeline(ArraySource(changed)),
        _pipeline(ArraySource(longer), shuffle=False),
    ]
    crcs = [facts["first_batch_crc32"]]
    crcs += [fingerprint(other)["first_batch_crc32"] for other in others]
    assert len(set(crcs)) == 4
    shuffled = DatasetSource(
        tf.data.Dataset.from_tensor_slices(_arrays()).shuffle(NUM_EXAMPLES))
    pipeline = _pipeline(shuffled)
    assert fingerprint(pipeline) != fingerprint(pipeline)


def test_fingerprints_of_files_tell_their_names_and_sizes_not_their_folder(tmp_path):
    facts, changes = [], {"a": {}, "b": {}, "c": {"offset": 1}, "d": {"name": "p"}}
    for folder, changed in changes.items():
        (tmp_path / folder).mkdir()
        facts.append(fingerprint(_pipeline(_files(tmp_path / folder, **changed))))
    assert facts[0] == facts[1]
    batches = [each["first_batch_crc32"] for each in facts]
    files = [each["files_crc32"] for each in facts]
    assert batches[0] == batches[3] != batches[2]
    assert files[0] == files[2] != files[3]
