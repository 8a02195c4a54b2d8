"""The order is a pure function of (seed, epoch, position), and loses no example."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from mpl.data import ArraySource, DatasetSource, Pipeline, as_source
from mpl.errors import ConfigError

NUM_EXAMPLES, BATCH = 22, 8  # two full batches and one of 6
EPOCH = 3  # batches


def _arrays():
    index = np.arange(NUM_EXAMPLES)
    return {"x": index.astype(np.int32), "image": np.tile(index[:, None], 2)}


def _indexed(**settings):
    settings = {"shuffle": True, "repeat": True, **settings}
    return Pipeline(ArraySource(_arrays()), global_batch_size=BATCH, **settings)


def _in_order(known_length=True, **settings):
    dataset = tf.data.Dataset.from_tensor_slices(_arrays())
    if not known_length:
        dataset = dataset.filter(lambda example: example["x"] >= 0)
    settings = {"shuffle": False, "repeat": True, **settings}
    return Pipeline(DatasetSource(dataset), global_batch_size=BATCH, **settings)


def _read(pipeline, num_batches, position=0):
    batches = pipeline.dataset(position).take(num_batches)
    return [{name: t.numpy() for name, t in batch.items()} for batch in batches]


def _order(pipeline, num_batches, position=0):
    return [b["x"].tolist() for b in _read(pipeline, num_batches, position)]


def _real(batches):
    """The records that count."""
    return [
        record
        for batch in batches
        for record, weight in zip(batch["x"].tolist(), batch["weight"], strict=True)
        if weight
    ]


def _documented(arrays, batch_size, seed, shuffle, position):
    """The batch at a position and the seed of its transform, as the class says."""
    num_examples = len(arrays["x"])
    epoch, batch = divmod(position, -(-num_examples // batch_size))
    index = np.arange(batch * batch_size, (batch + 1) * batch_size)
    fold_in = tf.random.experimental.stateless_fold_in
    key = fold_in(tf.constant([0, seed]), tf.constant(epoch, tf.int64))
    record = tf.constant(index % num_examples)
    if shuffle:
        last = tf.constant(num_examples - 1, tf.int64)
        record = tf.random.experimental.index_shuffle(record, key, last)
    batch_seed = fold_in(key, tf.constant(batch, tf.int64))
    examples = {name: array[record.numpy()] for name, array in arrays.items()}
    weight = examples.get("weight", np.ones(1)).astype(np.float32)
    return {**examples, "weight": weight * (index < num_examples)}, batch_seed


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize(
    ("num_examples", "batch_size", "width", "positions"),
    [
        (22, 8, 2, range(8)),
        (1, 3, 1, range(3)),  # an epoch is less than a batch
        (5, 1, 1, [0, 4, 5, 3 * 10**17]),
        (521, 4, 3, [0, 1, 43, 44, 60, 130, 131, 5 * 131 + 129]),  # chunks of 44
        (40, 4, 2**14, [0, 6, 7, 9, 10, 19]),  # chunks of 4
        (6, 2, 2**17, [0, 2, 3]),  # no chunks
    ],
)
def test_the_order_is_the_documented_function(
    num_examples, batch_size, width, positions, augmented
):
    arrays = {"x": np.arange(num_examples, dtype=np.int32)}
    arrays["image"] = np.repeat(arrays["x"][:, None] % 2**15, width, 1).astype(np.int16)
    if num_examples % 2:
        arrays["weight"] = np.linspace(0, 1, num_examples)

    def noise(batch, seed):
        return {**batch, "noise": tf.random.stateless_uniform([batch_size], seed)}

    source = ArraySource(arrays, noise if augmented else None)
    for position, shuffle in zip(positions, itertools.cycle([True, True, False])):
        settings = dict(seed=position % 7, shuffle=shuffle)
        pipeline = Pipeline(
            source, global_batch_size=batch_size, repeat=True, **settings)
        for number, read in enumerate(_read(pipeline, 3, position)):
            expected, seed = _documented(
                arrays, batch_size, position=position + number, **settings)
            if augmented:
                expected = noise(expected, seed)
            assert read.keys() == expected.keys()
            for name, value in expected.items():
                assert name == "weight" or read[name].dtype == value.dtype
                np.testing.assert_array_equal(read[name], value, err_msg=name)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("num_examples, batch_size", [(521, 4), (6, 2)])
def test_every_position_continues_what_came_before(num_examples, batch_size, repeat):
    pipeline = Pipeline(
        ArraySource({"x": np.arange(num_examples)}),
        global_batch_size=batch_size,
        shuffle=True,
        repeat=repeat,
    )
    epoch = pipeline.batches_per_epoch
    straight = _order(pipeline, 2 * epoch + 3)
    assert len(straight) == (2 * epoch + 3 if repeat else epoch)
    for position in [*range(0, len(straight) - 1, max(1, epoch // 9)), epoch - 1]:
        wanted = straight[position : position + 2]
        assert _order(pipeline, 2, position)[: len(wanted)] == wanted


@pytest.mark.parametrize("width, at_a_time", [(4, 40), (2**12, 14), (2**15, 1)])
def test_small_batches_are_read_many_at_a_time_large_ones_alone(width, at_a_time):
    """As even parts of an epoch, and never more than a megabyte of small ones."""
    read = []

    class Counting(ArraySource):
        def gather(self, index):
            batches = tf.size(index) // 16
            tf.numpy_function(lambda n: read.append(int(n)), [batches], [])
            return super().gather(index)

    source = Counting({"x": np.zeros([16 * 80, width], np.uint8)})
    pipeline = Pipeline(source, global_batch_size=16, shuffle=False, repeat=False)
    assert len(_read(pipeline, 99)) == 80
    assert max(read) == at_a_time and sum(read) == 80


def test_the_order_depends_on_seed_and_epoch_only():
    orders = {
        seed: _order(_indexed(seed=seed), 2 * EPOCH) for seed in (0, 1, 2**31 - 1)
    }
    assert orders[0] == _order(_indexed(seed=0), 2 * EPOCH)
    epochs = [order[i : i + EPOCH] for order in orders.values() for i in (0, EPOCH)]
    for one, other in itertools.combinations(epochs, 2):
        assert one != other


@pytest.mark.parametrize("make", [_indexed, _in_order])
@pytest.mark.parametrize("position", [1, 3, 5, 7])
def test_seeking_equals_skipping(make, position):
    straight = _order(make(), position + 4)
    assert _order(make(), 4, position) == straight[position:]


def test_a_dataset_of_unknown_length_is_sought_by_reading():
    pipeline = _in_order(known_length=False)
    assert pipeline.batches_per_epoch is None
    assert _order(pipeline, 2, 4) == _order(_in_order(), 2, 4)


def test_arrays_are_sought_without_reading():
    far = 3 * 10**17  # reading so far would take ten million years
    pipeline = _indexed()
    first, second = _order(pipeline, 2, far)
    assert _order(pipeline, 1, far + 1) == [second]
    assert sorted(_real(_read(pipeline, EPOCH, far))) == list(range(NUM_EXAMPLES))


@pytest.mark.parametrize(
    "make", [_indexed, lambda: _indexed(shuffle=False), _in_order]
)
def test_every_example_comes_once_an_epoch(make):
    batches = _read(make(), 3 * EPOCH)
    for epoch in range(3):
        records = _real(batches[epoch * EPOCH : (epoch + 1) * EPOCH])
        assert sorted(records) == list(range(NUM_EXAMPLES))


@pytest.mark.parametrize("num_examples", [1, 2, 5, 1000])
def test_every_example_comes_once_whatever_their_number(num_examples):
    source = ArraySource({"x": np.arange(num_examples)})
    pipeline = Pipeline(source, global_batch_size=16, shuffle=True, repeat=True)
    batches = _read(pipeline, pipeline.batches_per_epoch)
    assert sorted(_real(batches)) == list(range(num_examples))


@pytest.mark.parametrize("make", [_indexed, _in_order])
def test_unshuffled_evaluation_reads_one_epoch_in_order(make):
    batches = _read(make(shuffle=False, repeat=False), 100)
    assert len(batches) == EPOCH
    assert _real(batches) == list(range(NUM_EXAMPLES))
    assert _read(make(shuffle=False, repeat=False), 100, EPOCH) == []


@pytest.mark.parametrize("make", [_indexed, _in_order])
def test_the_last_batch_is_filled_up_with_records_of_weight_0(make):
    pipeline = make(shuffle=False)
    last = _read(pipeline, EPOCH)[-1]
    np.testing.assert_array_equal(last["weight"], [1, 1, 1, 1, 1, 1, 0, 0])
    np.testing.assert_array_equal(last["x"][:6], range(16, 22))
    assert set(last["x"][6:]) < set(range(NUM_EXAMPLES))
    spec = pipeline.dataset().element_spec
    assert spec["image"] == tf.TensorSpec([BATCH, 2], tf.int64)
    assert spec["weight"] == tf.TensorSpec([BATCH], tf.float32)


@pytest.mark.parametrize("make", [ArraySource, tf.data.Dataset.from_tensor_slices])
def test_an_example_s_own_weight_counts(make):
    data = make({"x": np.arange(3), "weight": np.array([0.5, 0.0, 2.0])})
    source = data if isinstance(data, ArraySource) else DatasetSource(data)
    pipeline = Pipeline(source, global_batch_size=4, shuffle=False, repeat=False)
    (batch,) = _read(pipeline, 4)
    np.testing.assert_array_equal(batch["weight"], np.float32([0.5, 0, 2, 0]))


def test_transform_is_a_function_of_the_position():
    def add_noise(batch, seed):
        noise = tf.random.stateless_uniform([BATCH], seed)
        return {**batch, "noise": noise}

    def noise(seed, position, num_batches=1):
        pipeline = Pipeline(
            ArraySource(_arrays(), add_noise),
            global_batch_size=BATCH,
            seed=seed,
            shuffle=False,
            repeat=True,
        )
        return [b["noise"].tolist() for b in _read(pipeline, num_batches, position)]

    straight = noise(0, 0, 2 * EPOCH)
    assert noise(0, 4) == straight[4:5]
    assert noise(1, 4) != straight[4:5]
    for one, other in itertools.combinations(straight, 2):
        assert one != other


def test_a_transform_keeps_the_batch_static():
    def halve_and_join(batch, _):
        count = tf.shape(batch["x"])[0] // 2
        return {"x": tf.concat([batch["x"][:count], batch["x"][count:]], 0)}

    source = ArraySource(_arrays(), halve_and_join)
    pipeline = Pipeline(source, global_batch_size=BATCH, shuffle=False, repeat=True)
    assert pipeline.dataset().element_spec["x"].shape == [BATCH]
    assert _order(pipeline, 1) == [list(range(BATCH))]
    source = ArraySource(_arrays(), lambda batch, _: {"x": batch["x"][1:]})
    pipeline = Pipeline(source, global_batch_size=BATCH, shuffle=False, repeat=True)
    with pytest.raises(ValueError, match="are 8 and 7"):
        pipeline.dataset()


@pytest.mark.parametrize("make", [_indexed, _in_order])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_global_order_is_the_same_for_any_number_of_replicas(
    make, replicas, strategy_of
):
    strategy = strategy_of(replicas)
    expected = _read(make(), 2 * EPOCH, position=1)
    distributed = strategy.experimental_distribute_dataset(make().dataset(1))
    for wanted, batch in zip(expected, distributed, strict=False):
        for name, value in batch.items():
            slices = strategy.experimental_local_results(value)
            assert [s.shape[0] for s in slices] == [BATCH // replicas] * replicas
            np.testing.assert_array_equal(tf.concat(slices, 0), wanted[name])
    first = tf.nest.flatten(distributed.element_spec, expand_composites=True)[0]
    assert first.shape[0] == BATCH // replicas  # static: nothing retraces


def test_a_shuffle_that_a_dataset_does_not_follow_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", said.append)
    _in_order(shuffle=True)
    assert len(said) == 1
    assert "`shuffle` is left to the tf.data.Dataset" in said[0]


def test_a_batch_size_or_seed_out_of_range_is_an_error():
    source = ArraySource(_arrays())
    with pytest.raises(ConfigError, match=r"`global_batch_size` \(0\)"):
        Pipeline(source, global_batch_size=0, shuffle=True, repeat=True)
    for seed in (-1, 2**31):
        with pytest.raises(ConfigError, match=rf"`seed` \({seed}\)"):
            _indexed(seed=seed)


def test_only_where_no_code_of_users_runs_may_a_loop_wait_for_a_batch():
    arrays = {"x": np.arange(8.0)}

    def threads(source):
        made = Pipeline(
            as_source(source), global_batch_size=4, shuffle=False, repeat=True)
        size = made.dataset().options().threading.private_threadpool_size
        return made.has_own_threads, bool(size)

    assert threads(arrays) == (True, True)
    assert threads(ArraySource(arrays, lambda batch, seed: batch)) == (False, False)
    assert threads(tf.data.Dataset.from_tensor_slices(arrays)) == (False, False)


def test_no_autotuner_holds_up_the_end_of_an_iterator():
    arrays = {"x": np.zeros([8, 2], np.float32)}
    dataset = tf.data.Dataset.from_tensor_slices(arrays)
    asked = tf.data.Options()
    asked.autotune.enabled = True
    for examples, enabled in (
        (arrays, False), (dataset, False), (dataset.with_options(asked), True)
    ):
        pipeline = Pipeline(as_source(examples), global_batch_size=4, seed=0,
                            shuffle=False, repeat=False)
        assert pipeline.dataset().options().autotune.enabled is enabled


def test_autograph_leaves_the_pipelines_own_code_alone():
    status = []

    class Noting(ArraySource):
        def gather(self, index):
            status.append(tf.__internal__.autograph.control_status_ctx().status.name)
            return super().gather(index)

    source = Noting(_arrays())
    _read(Pipeline(source, global_batch_size=BATCH, shuffle=True, repeat=True), 1)
    assert status and set(status) == {"DISABLED"}


def test_autograph_rewrites_a_users_transform():
    def transform(batch, seed):
        if batch["x"][0] < 1000:  # of a tensor
            batch["x"] += 1000
        return batch

    def order(transform=None):
        source = ArraySource(_arrays(), transform)
        settings = {"global_batch_size": BATCH, "shuffle": True, "repeat": False}
        return _order(Pipeline(source, **settings), EPOCH)

    assert order(transform) == (np.array(order()) + 1000).tolist()
