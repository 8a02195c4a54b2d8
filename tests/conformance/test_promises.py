"""Promises that cross modules: resume, one trace, plain checkpoints, accuracy."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments import digits, gan_digits
from mpl import distribute, inference
from mpl.record.checkpoint import Checkpoints

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def prepared(kind, strategy, **overrides):
    """Returns an experiment that is set up."""
    experiment = kind()
    experiment.setup((kind.Config or mpl.RunConfig)(**overrides), strategy)
    return experiment


def everything(experiment, directory, step):
    """Returns all entries of a checkpoint of the experiment's state by key."""
    path = Checkpoints(
        directory, asynchronous=False, **experiment.checkpoint_objects()).save(step)
    reader = tf.train.load_checkpoint(path)
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()
            if not key.startswith(("_CHECKPOINTABLE", "save_counter"))}


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("kind, policy", [
    (digits.Digits, "mixed_float16"), (digits.Digits, "float32"),
    (gan_digits.GanDigits, "mixed_bfloat16")])
def test_a_restored_run_continues_bit_for_bit(
    kind, policy, replicas, strategy_of, tmp_path
):
    settings = dict(policy=policy, ema_decay=0.9, clip_norm=1.0)
    if kind is digits.Digits:
        settings.update(accumulate_steps=2, hidden=16)
    whole = prepared(kind, strategy_of(replicas), **settings)
    whole.trainer.train(9)
    whole.trainer.train(20)
    want = everything(whole, tmp_path / "whole", 29)

    first = prepared(kind, strategy_of(replicas), **settings)
    first.trainer.train(13)
    Checkpoints(
        tmp_path / "run", asynchronous=False, **first.checkpoint_objects()).save(13)
    rest = prepared(kind, strategy_of(replicas), **{**settings})
    assert Checkpoints(tmp_path / "run", **rest.checkpoint_objects()).resume() == 13
    rest.after_restore()
    assert int(rest.global_step) == int(rest.trainer.position) == 13
    rest.trainer.train(16)
    got = everything(rest, tmp_path / "rest", 29)
    assert got.keys() == want.keys() and len(want) > 20
    for key, value in want.items():
        np.testing.assert_array_equal(got[key], value, err_msg=key)


def test_each_step_is_traced_once(strategy_of):
    class Counted(digits.Digits):
        traces = {True: 0, False: 0}

        def loss(self, batch, training):
            self.traces[training] += 1
            return super().loss(batch, training)

    class AlwaysFinite(Counted):
        pass

    experiment = prepared(
        AlwaysFinite, strategy_of(1), policy="mixed_float16", hidden=8)
    experiment.loss_scale.period = 3  # before the trace: the scale will change
    for steps in (1, 7, 4):
        experiment.trainer.train(steps)
        for evaluator in experiment.evaluators.values():
            evaluator.evaluate(-1)
    assert float(experiment.loss_scale.value) > 2.0**15
    experiment.trainer.reset_iterator(5)
    experiment.trainer.train(2)
    assert experiment.traces == {True: 1, False: 2}  # one a split in evaluation


def test_plain_tensorflow_reads_the_weights(strategy_of, tmp_path):
    experiment = prepared(digits.Digits, strategy_of(1), policy="mixed_bfloat16")
    experiment.trainer.train(3)
    path = Checkpoints(
        tmp_path, asynchronous=False, **experiment.checkpoint_objects()).save(3)
    fresh = experiment.build_model()
    reader = tf.train.Checkpoint(model=fresh)
    reader.restore(path).expect_partial().assert_existing_objects_matched()
    for ours, theirs in zip(experiment.model.weights, fresh.weights):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_another_packing_restores(strategy_of, tmp_path):
    class OtherPacking(digits.Digits):
        def build_weights(self, model):
            return mpl.MasterWeights(model, self.policy, pack_below=0)

    settings = dict(policy="float32", ema_decay=0.9)
    saved = prepared(digits.Digits, strategy_of(2), **settings)
    saved.trainer.train(5)
    Checkpoints(
        tmp_path, asynchronous=False, **saved.checkpoint_objects()).save(5)
    restored = prepared(OtherPacking, strategy_of(1), **settings)
    Checkpoints(tmp_path, **restored.checkpoint_objects()).resume()
    restored.after_restore()
    assert len(restored.weights.buckets) > len(saved.weights.buckets)
    for averages in (False, True):
        got, want = (
            e.weights.by_key(e.optimizer.averages if averages else None)
            for e in (restored, saved))
        for key in want:
            np.testing.assert_array_equal(got[key], want[key])


@pytest.mark.parametrize("weights, tolerance", [("float32", 1e-6), ("compute", 1e-6)])
def test_an_export_agrees_with_the_model(weights, tolerance, strategy_of, tmp_path):
    """In the dtype of training to rounding; float32 against a float32 model."""
    experiment = prepared(
        digits.Digits, strategy_of(1), ema_decay=0.9,
        policy="float32" if weights == "float32" else "mixed_bfloat16")
    experiment.trainer.train(30)
    path = experiment.export(str(tmp_path / "export"), weights)
    images = digits.digits.load("test")
    want = experiment.predictor()(images)
    got = mpl.load_predictor(path)({"image": images["image"][:50]})
    np.testing.assert_allclose(got, want[:50], rtol=tolerance, atol=tolerance)
    assert got.dtype == np.float32 and got.shape == (50, 10)


def test_a_float32_export_of_a_mixed_model_computes_in_float32(strategy_of, tmp_path):
    experiment = prepared(digits.Digits, strategy_of(1), policy="mixed_bfloat16")
    experiment.trainer.train(30)
    images = {"image": digits.digits.load("test")["image"][:64]}
    got = mpl.load_predictor(experiment.export(str(tmp_path / "export")))(images)
    twin = inference.twin_of(experiment, "float32")
    full = twin.model(images["image"], training=False)
    np.testing.assert_allclose(got, tf.nn.softmax(full), atol=1e-6)
    mixed = experiment.predictor()(images)
    assert 0 < np.abs(got - mixed).max() < 0.05


@pytest.mark.parametrize("replicas", [1, 2])
def test_too_many_skips_stop_with_a_report(replicas, strategy_of):
    class Poisoned(digits.Digits):
        def loss(self, batch, training):
            output = super().loss(batch, training)
            return output._replace(per_example=output.per_example * np.nan)

    experiment = prepared(Poisoned, strategy_of(replicas), max_consecutive_skips=4,
                          policy="mixed_float16", hidden=8)
    experiment.trainer.train(50)
    assert int(experiment.global_step) == 4
    error = experiment.trainer.nonfinite_error()
    assert isinstance(error, mpl.NonFiniteError)
    for part in ("step 4", "nan in 'sequential", "/bias'", "scale 2048", "--clip_norm"):
        assert part in str(error), part


@pytest.mark.parametrize("change, message", [
    (dict(global_batch_size=63), r"divisible by 2 replicas.\nUse 62 or 64"),
    (dict(policy="mixed_float8"), "mixed_float8"),
    (dict(jit_compile=True), "does not go with 2 replicas"),
    (dict(optimizer="adamm"), "adamm"),
])
def test_bad_settings_are_named(change, message, strategy_of):
    with pytest.raises(mpl.ConfigError, match=message):
        prepared(digits.Digits, strategy_of(2), **change)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", [digits.Digits, gan_digits.GanDigits])
def test_every_experiment_runs_two_steps(kind, policy, replicas, strategy_of):
    experiment = prepared(kind, strategy_of(replicas), policy=policy)
    experiment.trainer.train(2)
    values = experiment.evaluators["validation"].evaluate(-1)
    assert np.isfinite(float(values[experiment.headline()]))
    report = experiment.train_report()
    assert report["applied_steps"] == 2 and report["grad_norm"] > 0


@pytest.mark.slow
def test_mixed_precision_costs_no_accuracy(strategy_of):
    """Five seeds of digits: the mixed means lie within float32's spread, its mean ± 2
    standard deviations (one test image is 0.0028).
    """
    accuracy = {}
    for policy in POLICIES:
        for seed in range(5):
            experiment = prepared(
                digits.Digits, strategy_of(1), policy=policy, seed=seed)
            experiment.trainer.train(experiment.train_steps)
            values = experiment.evaluators["test"].evaluate(-1)
            accuracy.setdefault(policy, []).append(float(values["accuracy"]))
    print({policy: (np.mean(values), values) for policy, values in accuracy.items()})
    mean, spread = np.mean(accuracy["float32"]), np.std(accuracy["float32"], ddof=1)
    for policy in POLICIES[1:]:
        assert abs(np.mean(accuracy[policy]) - mean) <= 2 * spread, accuracy
    assert mean >= 0.98


def test_fresh_metrics_and_config_are_needed():
    @dataclasses.dataclass(frozen=True)
    class Config(mpl.RunConfig):
        extra: int = mpl.option(3, "A number.", minimum=1)

    assert Config().extra == 3
    with pytest.raises(mpl.ConfigError, match="`extra`"):
        Config(extra=0)
    with pytest.raises(mpl.ConfigError, match="'loss'"):
        from mpl.step.metrics import Metrics
        Metrics({"loss": keras.metrics.Mean()})


def test_an_export_knows_what_the_data_told_the_model(strategy_of, tmp_path):
    class FromData(digits.Digits):
        def build_data(self, split, context):
            self.classes = 10
            return super().build_data(split, context)

        def build_model(self):
            assert self.classes == 10
            return super().build_model()

    experiment = prepared(FromData, strategy_of(1), policy="float32", hidden=8)
    assert experiment.export(str(tmp_path / "export"))


@pytest.mark.parametrize("policy", ["float64", "bfloat16"])
def test_batch_statistics_of_any_dtype_export(policy, strategy_of, tmp_path):
    class Normalised(digits.Digits):
        def build_model(self):
            return keras.Sequential([
                keras.Input((8, 8, 1)), keras.layers.Flatten(),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(10), keras.layers.Activation("linear"),
            ])

        def loss(self, batch, training):
            logits = mpl.cast_floating(self.model(
                batch["image"], training=training), tf.float32)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
                batch["label"], logits)
            return mpl.LossOutput(losses, batch["weight"], (batch["label"], logits))

    experiment = prepared(
        Normalised, strategy_of(1), policy=policy, optimizer="sgd")
    experiment.trainer.train(2)
    got = mpl.load_predictor(experiment.export(str(tmp_path / "export")))(
        {"image": digits.digits.load("test")["image"][:8]})
    assert got.shape == (8, 10) and np.isfinite(got).all()


def test_nothing_counted_is_reported_as_nan(strategy_of):
    experiment = prepared(digits.Digits, strategy_of(1), policy="float32", hidden=8)
    assert np.isnan(experiment.train_report()["loss"])
    experiment.trainer.train(1)
    assert np.isfinite(experiment.train_report()["accuracy"])


def test_a_research_file_is_short():
    from test_layout import ROOT, _code_lines
    assert _code_lines(ROOT / "experiments" / "digits.py") <= 40
    assert _code_lines(ROOT / "experiments" / "gan_digits.py") <= 60


def test_models_that_share_a_weight_are_refused(strategy_of):
    class Sharing(gan_digits.GanDigits):
        def build_model(self):
            shared = keras.layers.Dense(4)
            return {name: keras.Sequential([keras.Input((4,)), shared])
                    for name in ("generator", "discriminator")}

    with pytest.raises(mpl.ConfigError, match="belongs to two of the models"):
        prepared(Sharing, strategy_of(1))


def test_a_block_that_fails_leaves_what_it_trained(strategy_of):
    class Broken(digits.Digits):
        def build_data(self, split, context):
            arrays = super().build_data(split, context)
            rows = tf.data.Dataset.from_tensor_slices(arrays)
            bad = rows.take(1).map(self.fail)
            return mpl.DatasetSource(rows.take(192).concatenate(bad), 1257)

        def fail(self, record):
            check = tf.debugging.Assert(record["label"] < 0, ["bad record"])
            with tf.control_dependencies([check]):
                return {**record, "label": tf.identity(record["label"])}

    experiment = prepared(Broken, strategy_of(1), hidden=8, policy="float32")
    with pytest.raises(tf.errors.InvalidArgumentError, match="bad record"):
        experiment.trainer.train(20)
    steps = int(experiment.global_step)
    assert steps == int(experiment.optimizer.applied_steps) > 0
    for entry in experiment.weights.entries:
        np.testing.assert_array_equal(
            entry.value.numpy(), experiment.weights.by_key()[entry.key])


def test_vector_metrics_are_reported(strategy_of, tmp_path):
    class Vector(digits.Digits):
        def metrics(self):
            class PerClass(keras.metrics.F1Score):
                def update_state(self, label, logits, sample_weight=None):
                    super().update_state(tf.one_hot(label, 10), tf.nn.softmax(logits))

            return {"accuracy": keras.metrics.SparseCategoricalAccuracy(),
                    "f1": PerClass()}

    mpl.run(Vector, train_steps=2, hidden=8, workdir=str(tmp_path / "run"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all('"f1": [' in line for line in lines) and lines


def test_an_export_takes_every_feature_that_predict_looks_at(strategy_of, tmp_path):
    class Masked(digits.Digits):
        def build_data(self, split, context):
            arrays = super().build_data(split, context)
            return {**arrays, "mask": np.ones(len(arrays["label"]), np.float32)}

        def predict(self, batch):
            mask = batch.get("mask")
            return super().predict(batch) * (1.0 if mask is None else mask[:, None])

    experiment = prepared(Masked, strategy_of(1), policy="float32", hidden=8)
    predict = mpl.load_predictor(experiment.export(str(tmp_path / "export")))
    image = digits.digits.load("test")["image"][:2]
    got = predict({"image": image, "mask": np.array([0, 1], np.float32)})
    assert (got[0] == 0).all() and got[1].sum() > 0.99


class OfTwo(distribute.Peers):
    """The chief of two processes, as if the other had the same of all."""

    def __init__(self):
        super().__init__()
        self.size = 2

    def share(self, value):
        return [value, value]


KINDS, SUMS = tf.VariableSynchronization, tf.VariableAggregation


@pytest.mark.parametrize("keras_model", [False, True])
@pytest.mark.parametrize("kind, aggregation, peers, refused", [
    (KINDS.ON_READ, SUMS.SUM, OfTwo(), True),
    (KINDS.ON_READ, SUMS.MEAN, OfTwo(), True),
    (KINDS.ON_READ, SUMS.ONLY_FIRST_REPLICA, OfTwo(), False),
    (KINDS.AUTO, SUMS.MEAN, OfTwo(), False),
    (KINDS.ON_READ, SUMS.SUM, distribute.Peers(), False)])
def test_the_chief_can_save_alone(
    kind, aggregation, peers, refused, keras_model, strategy_of
):
    """A variable that all processes must read together would stop it for ever."""
    class Counting(digits.Digits):
        def build_model(self):
            model = super().build_model()
            if not keras_model:
                model, inner = tf.Module(), model
                model.inner = inner
            model.seen = tf.Variable(
                0.0, trainable=False, name="seen", aggregation=aggregation,
                synchronization=kind)
            return model

    experiment = Counting()
    experiment.peers = peers
    arguments = digits.Config(policy="float32"), strategy_of(1)
    if not refused:
        assert experiment.setup(*arguments) is None
        return
    with pytest.raises(mpl.ConfigError) as error:
        experiment.setup(*arguments)
    assert str(error.value) == (
        "`seen:0` of the model has synchronization ON_READ: all processes would have "
        "to read it, and the chief saves alone.\nLeave `synchronization` out, or make "
        "it a metric: return what it counts in `LossOutput.outputs`.")
