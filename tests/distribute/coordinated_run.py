"""One process of a cluster with parameter servers; what the chief does has a name.

    TF_CONFIG=... python tests/distribute/coordinated_run.py <what> <folder>
    TF_CONFIG=... python tests/distribute/coordinated_run.py --workdir=<folder> ...

The chief writes what it saw to <folder>/<what>.json; with flags it is a run as any.
"""

import contextlib
import dataclasses
import json
import os
import sys

import keras
import numpy as np
import tensorflow as tf

import mpl
from mpl import distribute, errors
from mpl.distribute import parameter_server
from mpl.launch.session import Session

BATCH, CLASSES = 32, 3
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    global_batch_size = BATCH
    learning_rate = 1e-2
    summary_every_steps = 0
    kind: str = mpl.option("plain", "Which model.", choices=("plain", "rich"))
    bad_from: int | None = mpl.option(None, "Label from which the loss is infinite.")


class Blobs(mpl.Experiment):
    """Three clouds of points in eight dimensions."""

    Config = Config

    def build_data(self, split, context):
        random = np.random.default_rng(SPLITS.index(split))
        label = random.integers(0, CLASSES, 320 if split == "train" else 100)
        centres = np.random.default_rng(9).normal(size=[CLASSES, 8])
        x = centres[label] + random.normal(scale=0.8, size=[len(label), 8])
        word = label * 5 + random.integers(0, 5, len(label))
        arrays = {"x": x.astype("float32"), "label": label.astype("int32"),
                  "word": word.astype("int32")}
        if self.config.kind == "rich" and split == "train":
            return tf.data.Dataset.from_tensor_slices(arrays).shuffle(100)
        return arrays

    def build_model(self):
        features = keras.Input([8], name="x")
        hidden = keras.layers.Dense(16, activation="relu")(features)
        inputs = {"x": features}
        if self.config.kind == "rich":
            inputs["word"] = word = keras.Input([], dtype="int32", name="word")
            table = keras.layers.Embedding(70_000, 1)(word)  # updated row by row
            hidden = keras.layers.BatchNormalization()(hidden)
            hidden = keras.layers.Dropout(0.1)(hidden)
            frozen = keras.layers.Dense(16)
            frozen.trainable = False
            hidden = keras.layers.Concatenate()([frozen(hidden), hidden, table])
        last = keras.layers.Dense(CLASSES, dtype="float32", kernel_regularizer="l2")
        return keras.Model(inputs, last(hidden))

    def loss(self, batch, training):
        inputs = {name: batch[name] for name in self.model.input}
        logits = self.model(inputs, training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["label"], logits, from_logits=True)
        if training and self.config.bad_from is not None:
            bad = tf.reduce_any(batch["label"] >= self.config.bad_from)
            losses *= tf.where(bad, np.inf, 1.0)
        outputs = {"accuracy": (batch["label"], logits),
                   "examples": (tf.ones_like(losses),),
                   "worker": (tf.fill(tf.shape(losses), self.worker(training)),)}
        return mpl.LossOutput(losses, batch["weight"], outputs)

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy(),
                "examples": keras.metrics.Sum(), "worker": keras.metrics.Mean()}

    def worker(self, training):
        """Returns the number of the worker that makes a step; elsewhere 0."""
        coordinator = tf.distribute.coordinator
        servers = isinstance(self.strategy, tf.distribute.ParameterServerStrategy)
        if not (training and servers):
            return 0.0
        index = coordinator.experimental_get_current_worker_index()
        return tf.cast(index, tf.float32)

    def predict(self, batch):
        inputs = {name: batch[name] for name in self.model.input}
        return tf.nn.softmax(self.model(inputs, training=False))


def evaluated(experiment, split="validation"):
    values = experiment.evaluators[split].evaluate()
    return {name: float(value) for name, value in values.items()}


def made(strategy, **settings):
    experiment = Blobs()
    experiment.setup(Config(**settings), strategy)
    return experiment


def counts(experiment):
    optimizer = experiment.optimizer
    return {"global_step": int(experiment.global_step),
            "position": int(experiment.trainer.position),
            "applied": int(optimizer.applied_steps),
            "skipped": int(optimizer.skipped_steps)}


def checks(strategy, folder):
    """Yields the name and the result of each thing to do in one cluster."""
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        experiment = made(strategy, policy=policy, train_steps=60)
        before = evaluated(experiment)
        trainer = experiment.trainer
        trainer.train(tf.constant(40, tf.int64))
        trainer.train(tf.constant(20, tf.int64))
        report = {name: float(value) for name, value in trainer.report().items()}
        yield policy, {"before": before, "after": evaluated(experiment),
                       "report": report, **counts(experiment)}
    rich = made(strategy, kind="rich", train_steps=40, accumulate_steps=2,
                clip_norm=1.0, policy="mixed_bfloat16")
    before = evaluated(rich)
    rich.trainer.train(tf.constant(40, tf.int64))
    yield "rich", {"before": before, "after": evaluated(rich), **counts(rich)}
    averaged = made(strategy, ema_decay=0.9, optimizer="nadam", train_steps=40)
    before = evaluated(averaged)
    averaged.trainer.train(tf.constant(40, tf.int64))
    after = evaluated(averaged)
    yield "averaged", {"before": before, "after": after, **counts(averaged)}
    try:
        averaged.trainer.train(-1)
    except errors.ConfigError as error:
        yield "endless", str(error)
    bad = made(strategy, bad_from=0, train_steps=8, max_consecutive_skips=6)
    bad.trainer.train(tf.constant(4, tf.int64))
    early = bool(bad.trainer.should_stop())
    bad.trainer.train(tf.constant(4, tf.int64))
    yield "bad", {"early": early, "late": bool(bad.trainer.should_stop()),
                  "error": str(bad.trainer.nonfinite_error()), **counts(bad)}
    before = os.environ["ONE_DEVICE"]
    there = made(strategy, mode="eval", workdir=before, policy="mixed_bfloat16",
                 ema_decay=0.9, train_steps=10)
    yield "restored", {**Session(there, before).go(), "step": int(there.global_step)}
    for name, value in {"loss_scale": "dynamic", "deterministic": True}.items():
        try:
            made(strategy, **{name: value})
        except errors.ConfigError as error:
            yield f"refused_{name}", str(error)


def run(strategy, folder):
    """Runs a whole session in a folder, or goes on with the run there."""
    experiment = made(
        strategy, train_steps=int(os.environ["STEPS"]), eval_every_steps=10,
        checkpoint_every_steps=10, workdir=folder, policy="mixed_bfloat16",
        ema_decay=0.9)
    with contextlib.suppress(KeyboardInterrupt):
        yield "results", Session(experiment, folder).go()
    yield "counts", counts(experiment)


def main():
    if sys.argv[1].startswith("--"):
        mpl.run(Blobs)
        return
    what, folder = sys.argv[1:]
    cluster = distribute.find_cluster()
    if cluster.job != "chief":
        parameter_server._GONE_SECS = float(os.environ["GONE_SECS"])
        distribute.serve(cluster, 120.0)
        return
    with distribute.coordinating(cluster, 120.0):
        strategy = distribute.get_strategy("parameter_server", cluster=cluster)
        seen = dict(globals()[what](strategy, folder))
    with open(os.path.join(folder, f"{what}.json"), "w") as file:
        json.dump(seen, file, indent=1)


if __name__ == "__main__":
    main()
