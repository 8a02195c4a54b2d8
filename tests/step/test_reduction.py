"""One reduction a bucket, which need not wait for the rest of the backward pass."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl import errors
import small_models as models
import test_replicas

layers = keras.layers


def _stack():
    """Kernels of 5184 bytes, biases of 144; the head has 432 and 12."""
    hidden = [layers.Dense(36, name=f"hidden{n}", activation="tanh") for n in "1234"]
    return keras.Sequential([
        keras.Input((6, 6, 1)), layers.Flatten(), *hidden,
        layers.Dense(models.CLASSES, name="head", dtype="float32")])


@pytest.fixture
def reductions(monkeypatch):
    """(what is summed, the sum) of each call of the first replica."""
    calls = []
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def recorded(context, op, value, options=None):
        result = all_reduce(context, op, value, options)
        assert op == tf.distribute.ReduceOp.SUM
        if tf.get_static_value(context.replica_id_in_sync_group) == 0:
            calls.append((value, result))
        return result

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", recorded)
    return calls


def _names(step):
    return [["/".join(entry.name.split("/")[-2:]) for entry in bucket.entries]
            for bucket in step.weights.buckets]


def _ancestors(tensor):
    found, todo = set(), [tensor.op]
    while todo:
        operation = todo.pop()
        if operation.name not in found:
            found.add(operation.name)
            todo += [each.op for each in operation.inputs] + operation.control_inputs
    return found


BY_DEPTH = [
    ["head/bias", "head/kernel", "hidden4/bias", "hidden4/kernel", "hidden3/bias"],
    ["hidden3/kernel", "hidden2/bias", "hidden2/kernel", "hidden1/bias"],
    ["hidden1/kernel"],
]
# Of the small ones the first variable's gradient is the last but one.
KERNELS_APART = [
    *([f"hidden{n}/kernel"] for n in "432"),
    ["head/bias", "head/kernel", *(f"hidden{n}/bias" for n in "4321")],
    ["hidden1/kernel"],
]


@pytest.mark.parametrize("settings, buckets", [
    ({}, [sum(BY_DEPTH, [])]),
    ({"bucket_mb": 11000 / 2**20}, BY_DEPTH),
    ({"bucket_mb": 11100 / 2**20}, [BY_DEPTH[0] + BY_DEPTH[1][:1], [
        *BY_DEPTH[1][1:], *BY_DEPTH[2]]]),
    ({"pack_below": 1000}, KERNELS_APART),
    ({"bucket_mb": 1e-6}, [[name] for name in sum(BY_DEPTH, [])]),
])
def test_one_reduction_a_bucket_in_the_order_of_the_backward_pass(
    strategy_of, reductions, settings, buckets, monkeypatch
):
    step = models.Step(strategy_of(2), make_model=_stack, **settings)
    assert list(map(sorted, _names(step))) == list(map(sorted, buckets))
    made, gradients_of = [], step.weights.gradients
    monkeypatch.setattr(step.weights, "gradients", lambda *args: (
        made.append(gradients_of(*args)), list(made[-1]))[1])
    step.concrete(models.image_batch())
    *summed, (scalars, _) = reductions  # Σ loss and Σ weight are one more
    assert scalars.shape == [2]
    assert [value.shape for value, _ in summed] == [
        bucket.variable.shape for bucket in step.weights.buckets]
    for replica in made:
        for number, (_, total) in enumerate(summed):
            before = _ancestors(total)
            assert replica[number].op.name in before
            for later in replica[number + 1:]:
                assert later.op.name not in before


@pytest.mark.parametrize("bucket_mb", [0, -1, float("nan"), float("inf")])
def test_a_bound_of_buckets_is_positive(bucket_mb):
    message = r"`bucket_mb` \(.*\) must be positive"
    with pytest.raises(errors.ConfigError, match=message):
        mpl.MasterWeights(_stack(), "float32", bucket_mb=bucket_mb)


@pytest.mark.parametrize("policy, reduce_dtype, dtypes", [
    ("mixed_bfloat16", "compute", {tf.bfloat16, tf.float32}),
    ("mixed_float16", "compute", {tf.float16, tf.float32}),
    ("float32", "compute", {tf.float32}),
    ("float64", "compute", {tf.float64, tf.float32}),  # the head is float32
    ("mixed_bfloat16", "float32", {tf.float32}),
    ("mixed_bfloat16", "float16", {tf.float16}),
])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_dtype_of_the_reduction(strategy_of, reductions, policy, reduce_dtype, dtypes,
                                accumulate):
    step = models.Step(strategy_of(2), policy, reduce_dtype=reduce_dtype,
                       accumulate=accumulate, loss_scale=8)
    step.concrete(models.image_batch())
    found = [value.dtype for value, _ in reductions[:-1]]
    assert set(found) == dtypes and reductions[-1][0].dtype == tf.float32
    if reduce_dtype == "compute":
        assert found == [bucket.kind.compute for bucket in step.weights.buckets]


@pytest.mark.slow
@pytest.mark.parametrize("replicas, accumulate", [(2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_sums_in_the_compute_dtype_err_no_more_than_twice_one_device(
    strategy_of, policy, replicas, accumulate
):
    one = test_replicas._error_of_one_device(policy)
    error = test_replicas._error(
        strategy_of(replicas), policy, accumulate, reduce_dtype="compute")
    print(policy, replicas, accumulate, error / one)
    assert error <= 2 * one


@pytest.mark.parametrize("reduce_dtype", ["int32", "float33", tf.bool, None, 3.5])
def test_other_dtypes_are_refused(reduce_dtype):
    with pytest.raises(errors.ConfigError, match=(
        r"`reduce_dtype` \(.*\) must be a floating dtype or 'compute'\.\nUse float32"
    )):
        mpl.LossScaleOptimizer(keras.optimizers.SGD(), reduce_dtype=reduce_dtype)


# Synchronised batch statistics.


def _normalised(synchronized=True):
    return keras.Sequential([
        keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(8),
        layers.BatchNormalization(momentum=0.5, synchronized=synchronized, name="norm"),
        layers.Dense(models.CLASSES)])


def _trained(strategy, make_model=_normalised):
    step = models.Step(strategy, make_model=make_model)
    losses = [step(models.image_batch(seed=seed)) for seed in range(3)]
    norm = step.model.get_layer("norm")
    statistics = [norm.moving_mean.numpy(), norm.moving_variance.numpy()]
    return [np.array(losses), *step.masters().values(), *statistics]


def test_synchronised_statistics_are_those_of_the_whole_batch(strategy_of):
    want = _trained(strategy_of(1))
    for got, value in zip(_trained(strategy_of(2)), want, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
    apart = _trained(strategy_of(2), lambda: _normalised(synchronized=False))
    assert np.abs(apart[0] - want[0]).max() > 1e-3


def test_synchronised_statistics_do_not_go_with_micro_batches(strategy_of):
    step = models.Step(strategy_of(2), make_model=_normalised, accumulate=2)
    before = step.everything()
    with pytest.raises(errors.ConfigError, match=(
        r"layer 'sequential[^']*/norm' has `synchronized` batch statistics, which 2 "
        r"micro-batches on 2 replicas cannot have\.\n *Use --accumulate_steps=1"
    )):
        step(models.image_batch())
    for old, new in zip(before, step.everything(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_synchronised_statistics_of_one_replica_go_with_micro_batches(strategy_of):
    for strategy in (strategy_of(0), strategy_of(1)):
        step = models.Step(strategy, make_model=_normalised, accumulate=2)
        assert np.isfinite(step(models.image_batch()))


class _Experiment(mpl.Experiment):
    def build_model(self):
        return {"first": _stack(), "second": _normalised()}

    def build_data(self, split, context):
        return models.image_batch(16) if split == "train" else None

    def loss(self, batch, training):
        logits = sum(m(batch["image"], training=training) for m in self.model.values())
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["label"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"])

    accumulates = True

    def train_step(self, iterator):
        raise AssertionError("setup refuses before")


def test_setup_refuses_and_hands_on_the_settings(strategy_of):
    def setup(accumulate_steps):
        experiment = _Experiment()
        experiment.setup(mpl.RunConfig(
            global_batch_size=8, accumulate_steps=accumulate_steps, bucket_mb=1,
            reduce_dtype="compute", policy="mixed_bfloat16"), strategy_of(2))
        return experiment

    with pytest.raises(errors.ConfigError, match="norm' has `synchronized` batch"):
        setup(2)
    optimizer = setup(1).optimizer["second"]
    assert optimizer.reduce_dtype == "compute"
