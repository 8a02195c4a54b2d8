"""Trains the model of a binary by Keras's `fit`, which mpl is compared with.

    python -m experiments.benchmarks.fit digits --policy=float32 --workdir=runs/fit

The same model, data in the same order, loss, metrics, optimizer and evaluations as
`python -m experiments.digits` with the same flags; after each evaluation Keras's
backup, checkpoint of the best weights and log, as mpl saves and logs by itself.
Expected: fit.json in the folder, with the test's metric and the seconds of training.
"""

import gc
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

import mpl
from experiments.benchmarks import binaries
from mpl import experiment_data
from mpl.launch import flags
from mpl.launch.config import better, merged
from mpl.launch.intervals import intervals
from mpl.precision import loss_scale

FILE = "fit.json"
_STEPS = 32  # of an execution, or more: twice as many gained nothing in the benchmark
# Flags that `fit` does not heed, and the values with which there is nothing to heed.
NEUTRAL: dict[str, tuple] = {
    "accumulate_steps": (1,), "ema_decay": (None,), "init_from": (None,),
    "early_stop": (None,), "loss_scale": ("auto", "none", "dynamic"),
    "strategy": ("auto", "one_device"), "num_devices": (None, 1),
    "visible_devices": (None,), "gpu_memory_limit_mb": (None,), "tpu": (None,),
    "reduce_dtype": ("float32",), "jit_compile": ("auto", False),
    "debug_eager": (False,), "deterministic": (False,), "on_nonfinite": ("skip",),
}


class Fit(keras.Model):
    """A model that `fit` trains by the loss of an experiment.

    Args:
        experiment: with its `model`, a Keras model or a tf.Module.
    """

    def __init__(self, experiment: mpl.Experiment):
        super().__init__()
        self.experiment, self.inner = experiment, experiment.model
        self.mean_loss = keras.metrics.Mean()
        self.own = dict(experiment.metrics())
        self.built = True

    def train_step(self, batch):
        variables = self.inner.trainable_variables
        with tf.GradientTape() as tape:
            output = self.experiment.loss(batch, training=True)
            weights = tf.reduce_sum(output.weights)
            loss = tf.reduce_sum(output.per_example * output.weights) / weights
            penalties = getattr(self.inner, "losses", [])
            loss += sum(tf.cast(term, loss.dtype) for term in penalties)
            scaled_loss = self.optimizer.scale_loss(loss)
        self.optimizer.apply(tape.gradient(scaled_loss, variables), variables)
        return self._results(output)

    def test_step(self, batch):
        return self._results(self.experiment.loss(batch, training=False))

    def _results(self, output: mpl.LossOutput) -> dict[str, Any]:
        self.mean_loss.update_state(output.per_example, output.weights)
        for name, metric in self.own.items():
            values = output.outputs
            values = values[name] if isinstance(values, Mapping) else values
            values = values if isinstance(values, (tuple, list)) else (values,)
            metric.update_state(*values, sample_weight=output.weights)
        named = {"loss": self.mean_loss, **self.own}
        return {name: metric.result() for name, metric in named.items()}


class Clock(keras.callbacks.Callback):
    """Adds up the seconds of training: of tracing and steps, not of evaluation."""

    secs, _began = 0.0, math.nan

    def on_epoch_begin(self, epoch, logs=None):
        self._began = time.perf_counter()

    def on_test_begin(self, logs=None):
        self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()

    def _stop(self) -> None:
        if not math.isnan(self._began):
            self.secs += time.perf_counter() - self._began
        self._began = math.nan


def why_not(kind: type[mpl.Experiment], config: mpl.RunConfig) -> str | None:
    """Returns what `fit` cannot do of an experiment; None: nothing."""
    if kind.train_step is not mpl.Experiment.train_step:
        return "a loop of its own"
    if config.strategy == "auto" and config.num_devices is None and len(
            tf.config.get_visible_devices("GPU")) > 1:
        return "several GPUs, all of which mpl takes"
    given = [f"--{name}" for name, values in NEUTRAL.items()
             if getattr(config, name) not in values]
    return f"mpl alone heeds {', '.join(given)}" if given else None


def why_not_model(experiment: mpl.Experiment) -> str | None:
    """Returns what `fit` cannot do of a model under its policy; None: nothing."""
    policy = experiment.policy
    if isinstance(experiment.model, keras.layers.Layer) or (
            policy.param_dtype == policy.compute_dtype):
        return None
    return "a tf.Module, whose variables nobody casts"


def set_up(kind: type[mpl.Experiment], config: mpl.RunConfig) -> mpl.Experiment:
    """Returns the experiment with its data and its model, as `setup` makes them."""
    experiment = kind()
    experiment.config, experiment.strategy = config, tf.distribute.get_strategy()
    experiment.policy = mpl.get_policy(config.policy, kind.policy_overrides)
    pipelines = experiment.pipelines = experiment_data.build_pipelines(experiment)
    experiment.num_examples = {n: each.num_examples for n, each in pipelines.items()}
    experiment.batches_per_epoch = pipelines["train"].batches_per_epoch
    experiment.train_steps = experiment_data.resolve_train_steps(
        config, experiment.batches_per_epoch)
    keras.utils.set_random_seed(config.seed)
    experiment.build()
    return experiment


def build_optimizer(experiment: mpl.Experiment) -> keras.optimizers.Optimizer:
    """Returns the experiment's own optimizer with what mpl adds to it by its flags."""
    config = experiment.config
    optimizer = experiment.build_optimizer(config)
    optimizer.global_clipnorm = config.clip_norm
    if optimizer.weight_decay:
        experiment.weights.build(optimizer)  # groups the variables
        optimizer.exclude_from_weight_decay(var_list=[
            entry.value for bucket in experiment.weights.buckets
            if not bucket.kind.decay for entry in bucket.entries])
    if loss_scale.resolved(config.loss_scale, experiment.policy) == "dynamic":
        return keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


def steps_of(*lengths: int) -> int:
    """Returns how many steps an execution has, so that all lengths are whole ones.

    One that is cut short would be traced anew.
    """
    whole = math.gcd(*lengths)
    return min(n for n in range(1, whole + 1)
               if whole % n == 0 and n >= min(whole, _STEPS))


def savers(
    experiment: mpl.Experiment, folder: pathlib.Path
) -> list[keras.callbacks.Callback]:
    """Returns what Keras has so that a run can go on, its best is kept, and it logs."""
    name = next(iter(experiment.metrics()), "loss")
    found = [keras.callbacks.BackupAndRestore(folder / "backup"),
             keras.callbacks.CSVLogger(folder / "log.csv")]
    if "validation" in experiment.pipelines:
        found.append(keras.callbacks.ModelCheckpoint(
            folder / "best.weights.h5", monitor=f"val_{name}", mode=better(name),
            save_best_only=True, save_weights_only=True))
    return found


def train(experiment: mpl.Experiment, *callbacks: keras.callbacks.Callback) -> Fit:
    """Trains and evaluates as often as the experiment's flags say."""
    model, pipelines = Fit(experiment), experiment.pipelines
    total, validation = experiment.train_steps, pipelines.get("validation")
    block = intervals(experiment.config, total, experiment.batches_per_epoch)[
        "eval_every_steps"]
    epochs, rest = divmod(total, block)
    model.compile(build_optimizer(experiment), auto_scale_loss=False,
                  steps_per_execution=steps_of(*([block] if epochs else []), rest))
    data, evaluation = pipelines["train"].dataset(), dict[str, Any]()
    if validation is not None:
        evaluation = {"validation_data": validation.dataset(),
                      "validation_steps": validation.batches_per_epoch}
    for count, length in ((epochs, block), (1, rest)):
        if count and length:
            model.fit(data, epochs=count, steps_per_epoch=length, verbose=0,
                      callbacks=callbacks, **evaluation)
            data = pipelines["train"].dataset(epochs * block)
    return model


def run(kind: type[mpl.Experiment], config: mpl.RunConfig) -> dict[str, Any]:
    """Trains and tests, saves in `workdir`; returns what fit.json holds."""
    if reason := why_not(kind, config):
        return {"why_not": reason}
    experiment = set_up(kind, config)
    if reason := why_not_model(experiment):
        return {"why_not": reason}
    clock = Clock()
    folder = pathlib.Path(config.workdir or ".")
    model = train(experiment, clock, *savers(experiment, folder))
    if (test := experiment.pipelines.get("test")) is not None:
        model.evaluate(test.dataset(), steps=test.batches_per_epoch, verbose=0)
    name = next(iter(model.own), "loss")
    metric = model.own.get(name, model.mean_loss)
    return {"metric": name, "final": float(metric.result()),
            "training_secs": clock.secs}


def main(argv: Sequence[str]) -> None:
    """Reads the name of a binary and its flags, trains, and writes fit.json."""
    gc.unfreeze()  # that what it imports ends sooner is mpl's gain (see mpl/imports.py)
    kind, settings = binaries.launched(argv[1])
    config_class = kind.Config or mpl.RunConfig
    given = flags.parse(config_class, argv[1:], defaults=settings)
    config = merged(config_class, settings, given)
    folder = pathlib.Path(config.workdir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(run(kind, config))
    (folder / FILE).write_text(content + "\n", encoding="utf-8")
    print(content)


if __name__ == "__main__":
    main(sys.argv)
