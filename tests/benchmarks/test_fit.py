"""Keras's `fit` of a binary: the same model, data, loss and evaluations as mpl's."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from experiments import digits, gan_digits
from experiments.benchmarks import binaries, fit

SETTINGS = dict(policy="float32", hidden=8, global_batch_size=32, train_epochs=None,
                train_steps=7, eval_every_steps=3, optimizer="sgd", learning_rate=0.1)


class NoDropout(digits.Digits):
    def build_model(self):
        model = super().build_model()
        for layer in model.layers:
            if isinstance(layer, keras.layers.Dropout):
                layer.rate = 0.0
        return model


class InModule(NoDropout):
    def build_model(self):
        return Lines()


class Lines(tf.Module):
    """A layer on plain TensorFlow."""

    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(tf.random.stateless_normal([64, 10], [0, 1]) / 64)
        self.bias = tf.Variable(tf.zeros([10]))

    def __call__(self, image, training):
        pixels = tf.reshape(tf.cast(image, tf.float32), [-1, 64]) / 16
        return pixels @ self.kernel + self.bias


class NoDecay(NoDropout):
    def build_weights(self, model):
        return mpl.MasterWeights(model, self.policy, no_decay=["bias"])


def by_mpl(config, kind=NoDropout):
    experiment = kind()
    experiment.setup(config, tf.distribute.OneDeviceStrategy("CPU:0"))
    experiment.trainer.train(config.train_steps)
    return experiment


def test_what_a_binary_runs():
    assert {"digits", "gan_digits"} <= set(binaries.names())
    assert binaries.names() == sorted(binaries.names())
    assert binaries.launched("digits") == (digits.Digits, {})
    assert binaries.launched("gan_digits") == (
        gan_digits.GanDigits, {"train_epochs": 60})


@pytest.mark.slow
@pytest.mark.parametrize("kind, settings", [
    (NoDropout, {}), (NoDropout, {"clip_norm": 0.5}), (NoDropout, {"train_steps": 2}),
    (NoDropout, {"lr_schedule": "constant"}), (NoDropout, {"policy": "mixed_float16"}),
    (NoDecay, {"weight_decay": 0.5}), (InModule, {})])
def test_it_trains_as_mpl_does(kind, settings):
    config = digits.Config(**{**SETTINGS, **settings})
    ours = by_mpl(config, kind)
    evaluations = ours.evaluators["test"].evaluate(-1)
    experiment = fit.set_up(kind, config)
    assert experiment.train_steps == config.train_steps
    clock = fit.Clock()
    model = fit.train(experiment, clock)
    assert int(model.optimizer.iterations) == config.train_steps
    assert clock.secs > 0
    rtol = 1e-3 if config.policy == "float32" else 0.05
    pairs = zip(model.inner.trainable_variables, ours.model.trainable_variables,
                strict=True)
    for theirs, own in pairs:
        np.testing.assert_allclose(
            theirs.numpy(), own.numpy(), rtol=rtol, atol=rtol / 50)
    test = experiment.pipelines["test"]
    found = model.evaluate(test.dataset(), steps=test.batches_per_epoch, verbose=0,
                           return_dict=True)
    for name in ("loss", "accuracy"):
        np.testing.assert_allclose(found[name], evaluations[name], rtol=max(rtol, 5e-3))


def test_float16_is_scaled_and_the_gradient_clipped():
    experiment = digits.Digits()
    experiment.train_steps = 1
    for policy, kind in (("mixed_float16", keras.optimizers.LossScaleOptimizer),
                         ("mixed_bfloat16", keras.optimizers.Adam)):
        experiment.config = digits.Config(policy=policy, clip_norm=2.0)
        experiment.policy = mpl.get_policy(policy)
        optimizer = fit.build_optimizer(experiment)
        assert type(optimizer) is kind
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        assert inner.global_clipnorm == 2.0


@pytest.mark.parametrize("kind, settings, reason", [
    (gan_digits.GanDigits, {}, "a loop of its own"),
    (digits.Digits, {"ema_decay": 0.9}, "mpl alone heeds --ema_decay"),
    (digits.Digits, {"accumulate_steps": 2, "early_stop": "loss:3"},
     "mpl alone heeds --accumulate_steps, --early_stop"),
    (digits.Digits, {"loss_scale": 1024}, "mpl alone heeds --loss_scale"),
    (digits.Digits, {"strategy": "mirrored", "num_devices": 2},
     "mpl alone heeds --strategy, --num_devices"),
    (digits.Digits, {"reduce_dtype": "compute"}, "mpl alone heeds --reduce_dtype"),
    (digits.Digits, {"init_from": "runs/x"}, "mpl alone heeds --init_from"),
    (digits.Digits, {"on_nonfinite": "stop", "jit_compile": True},
     "mpl alone heeds --jit_compile, --on_nonfinite"),
    (digits.Digits, {"strategy": "one_device", "num_devices": 1}, None),
    (digits.Digits, {"loss_scale": "dynamic"}, None),
    (digits.Digits, {"jit_compile": False, "loss_scale": "none"}, None),
    (digits.Digits, {}, None)])
def test_what_fit_cannot_do(kind, settings, reason):
    config = (kind.Config or mpl.RunConfig)(**settings)
    assert fit.why_not(kind, config) == reason
    if reason:
        assert fit.run(kind, config) == {"why_not": reason}


def test_several_gpus_are_mpls_alone(monkeypatch):
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [kind] * 2)
    reasons = [fit.why_not(digits.Digits, digits.Config(**settings)) for settings in (
        {}, {"num_devices": 1}, {"strategy": "one_device"})]
    assert reasons == ["several GPUs, all of which mpl takes", None, None]


def test_no_flag_is_dropped_in_silence():
    """Each flag of mpl is heeded, refused, or one that training does not depend on."""
    heeded = set(
        "workdir data_dir max_bad_records policy loss_scale global_batch_size "
        "train_steps train_epochs eval_every_steps eval_every_epochs seed optimizer "
        "learning_rate lr_schedule warmup_steps weight_decay clip_norm".split())
    indifferent = set(
        "mode resume device_report cluster_timeout communication bucket_mb "
        "steps_per_loop checkpoint_every_steps checkpoint_every_secs max_to_keep "
        "keep_every_steps async_checkpoints best_metric log_every_steps "
        "summary_every_steps histogram_every_steps profile_steps "
        "allow_changed_flags max_consecutive_skips preemption_signal watchdog_secs "
        "export_weights saved_model input output".split())
    fields = {field.name for field in dataclasses.fields(mpl.RunConfig)}
    assert heeded | indifferent | set(fit.NEUTRAL) == fields
    assert not heeded & indifferent and not indifferent & set(fit.NEUTRAL)
    assert heeded & set(fit.NEUTRAL) == {"loss_scale"}


def test_a_module_is_left_out_where_somebody_must_cast():
    config = digits.Config(**{**SETTINGS, "policy": "mixed_bfloat16"})
    assert fit.run(InModule, config) == {
        "why_not": "a tf.Module, whose variables nobody casts"}


@pytest.mark.parametrize("lengths, steps", [
    ([7], 7), ([40, 0], 40), ([79], 79), ([196], 49), ([128], 32), ([30, 20], 10)])
def test_steps_of_an_execution(lengths, steps):
    assert fit.steps_of(*lengths) == steps


@pytest.mark.slow
def test_the_program_takes_the_flags_of_the_binary(tmp_path, capsys):
    fit.main(["fit", "digits", f"--workdir={tmp_path}/run", "--policy=float32",
              "--train_steps=4", "--eval_every_steps=2", "--hidden=8"])
    content = json.loads((tmp_path / "run" / "fit.json").read_text())
    assert content["metric"] == "accuracy" and 0 <= content["final"] <= 1
    assert 0 < content["training_secs"] < 60
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == content
    header, *rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert header == "epoch,accuracy,loss,val_accuracy,val_loss" and len(rows) == 2
    assert (tmp_path / "run" / "best.weights.h5").stat().st_size > 10_000
