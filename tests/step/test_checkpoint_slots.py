"""A checkpoint holds one entry per variable, whatever the packing and the replicas."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.precision import loss_scale as loss_scale_lib
import small_models as models

optimizers = keras.optimizers
INNER = {
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9),
    "amsgrad": lambda: optimizers.Adam(0.01, amsgrad=True),
    "nadam": lambda: optimizers.Nadam(0.01),  # its product is no slot of a variable
    "adafactor": lambda: optimizers.Adafactor(0.01),  # some slots are rows and columns
    "muon": lambda: optimizers.Muon(0.01),
}


def _step(strategy, name="momentum", seed=0, **kwargs):
    return models.Step(
        strategy, "mixed_float16", inner=INNER[name], seed=seed, clip_norm=1.0,
        loss_scale=loss_scale_lib.DynamicLossScale(initial=64.0, period=3),
        ema_decay=0.9, **kwargs)


def _train(step, seeds):
    return [step(models.image_batch(seed=seed)) for seed in seeds]


def _save(step, folder):
    step.weights.publish()
    checkpoint = tf.train.Checkpoint(model=step.model, optimizer=step.optimizer)
    return checkpoint.save(str(folder / "checkpoint"))


def _restore(step, path):
    checkpoint = tf.train.Checkpoint(model=step.model, optimizer=step.optimizer)
    status = checkpoint.restore(path)
    status.assert_existing_objects_matched()
    status.assert_consumed()
    step.weights.adopt()


def _by_name(step):
    """All that training goes on from, by name."""
    optimizer = step.optimizer
    values = {f"weights/{key}": value for key, value in step.masters().items()}
    values |= {key: value.numpy() for key, value in optimizer.export_slots().items()}
    values |= {f"state/{one.key}": one.value.numpy() for one in step.weights.state}
    values |= {f"scale/{v.name}": v.numpy() for v in optimizer.loss_scale.variables}
    values["skips"] = optimizer.skipped_steps.numpy()
    return values


def _assert_same(one, other):
    one, other = _by_name(one), _by_name(other)
    assert list(one) != [] and one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.mark.parametrize("name", INNER)
def test_a_restored_run_goes_on_bit_for_bit(strategy_of, tmp_path, name):
    step = _step(strategy_of(0), name)
    _train(step, range(3))
    step(models.image_batch(), [np.inf])
    path = _save(step, tmp_path)
    other = _step(strategy_of(0), name, seed=1)
    _train(other, [5])  # traced, with state of its own, before it is restored
    _restore(other, path)
    _assert_same(step, other)
    assert int(other.optimizer.applied_steps) == 3
    assert int(other.optimizer.skipped_steps) == 1
    assert _train(step, range(3, 6)) == _train(other, range(3, 6))
    _assert_same(step, other)
    assert other.traces == 1


@pytest.mark.parametrize("first, second", [
    ({"pack_below": 10**6}, {"pack_below": 0}),
    ({"pack_below": 0}, {"pack_below": 300}),
    ({"pack_below": 300, "no_decay": ["bias"]}, {"pack_below": 10**6})])
def test_under_another_packing(strategy_of, tmp_path, first, second):
    step = _step(strategy_of(0), **first)
    _train(step, range(3))
    other = _step(strategy_of(0), seed=1, **second)
    assert len(other.weights.buckets) != len(step.weights.buckets)
    _restore(other, _save(step, tmp_path))
    _assert_same(step, other)
    # The norm that clips is summed up in another order.
    np.testing.assert_allclose(_train(step, [3, 4]), _train(other, [3, 4]), rtol=1e-3)


@pytest.mark.parametrize("first, second", [(2, 1), (1, 2), (3, 2)])
def test_under_another_number_of_replicas(strategy_of, tmp_path, first, second):
    step = _step(strategy_of(first), "amsgrad")
    _train(step, range(2))
    other = _step(strategy_of(second), "amsgrad", seed=1)
    _restore(other, _save(step, tmp_path))
    _assert_same(step, other)
    for bucket in other.weights.buckets:
        copies = other.strategy.experimental_local_results(bucket.variable)
        for copy in copies:
            np.testing.assert_array_equal(copies[0].numpy(), copy.numpy())
    _train(other, [3])


@pytest.mark.parametrize("name", ["nadam", "adafactor"])
def test_in_a_process_that_built_other_models_before(strategy_of, tmp_path, name):
    """Keras counts layers and variables through the life of a process."""
    step = _step(strategy_of(0), name)
    _train(step, [0])
    path = _save(step, tmp_path)
    keys = list(step.optimizer.export_slots())
    models.image_model(), models.image_model(), keras.Variable(0.0)
    other = _step(strategy_of(0), name, seed=1)
    assert other.model.layers[0].name != step.model.layers[0].name
    assert list(other.optimizer.export_slots()) == keys
    _restore(other, path)
    _assert_same(step, other)


def test_entries_have_names_of_variables(strategy_of, tmp_path):
    step = _step(strategy_of(0))
    path = _save(step, tmp_path)
    shapes = dict(tf.train.list_variables(path))
    for kind in ("momentum", "average"):
        for entry in step.weights.entries:
            name = "|".join([kind, *entry.key.split("/")])
            key, = (key for key in shapes if key.endswith(name))
            assert shapes[key] == entry.value.shape.as_list()


def test_the_model_alone_restores_the_weights(strategy_of, tmp_path):
    """What Keras and TensorFlow read without mpl."""
    step = _step(strategy_of(0))
    _train(step, range(2))
    path = _save(step, tmp_path)
    plain = models.image_model()
    tf.train.Checkpoint(model=plain).restore(path).expect_partial()
    for variable, expected in zip(plain.trainable_variables,
                                  step.masters().values(), strict=True):
        np.testing.assert_array_equal(variable.numpy(), expected)
    x = models.image_batch()["image"]
    mine = models.image_model()
    mine.set_weights(step.model.get_weights())
    np.testing.assert_array_equal(plain(x), mine(x))


def test_publish_and_adopt_are_inverses(strategy_of):
    step = _step(strategy_of(0))
    before = [bucket.variable.numpy() for bucket in step.weights.buckets]
    stale = step.model.get_weights()
    _train(step, [0])
    for old, new in zip(stale[:2], step.model.get_weights()[:2]):
        np.testing.assert_array_equal(old, new)  # packed: the model lags behind
    step.weights.adopt()
    for bucket, value in zip(step.weights.buckets, before):
        np.testing.assert_array_equal(bucket.variable.numpy(), value)
    _train(step, [0])
    trained = [bucket.variable.numpy() for bucket in step.weights.buckets]
    step.weights.publish()
    step.weights.adopt()
    for bucket, value in zip(step.weights.buckets, trained):
        np.testing.assert_array_equal(bucket.variable.numpy(), value)


@pytest.mark.parametrize("replicas", [0, 2])
def test_publish_and_adopt_copy_however_often(strategy_of, replicas):
    step = _step(strategy_of(replicas))
    variables = step.model.trainable_variables
    for number in range(12):  # from some call on they are traced
        for variable in variables:
            variable.assign(tf.fill(variable.shape, float(number)))
        step.weights.adopt()
        assert all(np.all(m == number) for m in step.masters().values())
        for bucket in step.weights.buckets:
            bucket.variable.assign(bucket.variable + 0.5)
        step.weights.publish()
        assert all(np.all(variable.numpy() == number + 0.5) for variable in variables)


@pytest.mark.parametrize("name", INNER)
def test_rebuild_keeps_the_slots_of_what_stays(strategy_of, name):
    make_model = functools.partial(models.image_model, dropout=0)
    step = _step(strategy_of(0), name, make_model=make_model)
    _train(step, range(2))
    before = _by_name(step)
    step.model.layers[0].trainable = False
    step.weights.rebuild()
    after = _by_name(step)
    for key, value in after.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
    gone = set(before) - set(after)
    assert gone and all("conv2d" in key for key in gone)
