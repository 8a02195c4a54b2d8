"""A run that says where it is and takes its time there; a program for tests.

    AT=<train|input|eval|save|export|predict> PAUSE=<seconds> FROM=<n> \
    python tests/launch/preempted_run.py --workdir=<folder> ...

At that place it prints `at <place>`, from the n-th time on sleeps, and prints `past
<place>`.
"""

import dataclasses
import functools
import itertools
import os
import sys
import time

import keras
import numpy as np
import tensorflow as tf

import mpl
from mpl.record import progress

AT, PAUSE = os.environ.get("AT"), float(os.environ.get("PAUSE", 0))
TIMES = itertools.count(1)
X = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
Y = (X.sum(axis=1) > 0).astype(np.int32)


def here(place):
    if place == AT:
        print(f"at {place}", flush=True)
        time.sleep(PAUSE if next(TIMES) >= int(os.environ.get("FROM", 1)) else 0)
        print(f"past {place}", flush=True)
    return np.int64(0)


def in_graph(place):
    if place == AT:
        tf.numpy_function(functools.partial(here, place), [], tf.int64)


def after(place, function):
    def call(*args, **kwargs):
        result = function(*args, **kwargs)
        here(place)
        return result

    return call


def before_each(place, function):
    def call(*args):
        for item in function(*args):
            here(place)
            yield item

    return call


tf.saved_model.save = after("export", tf.saved_model.save)
progress.tracked = before_each("predict", progress.tracked)
tf.train.Checkpoint.write = after("save", tf.train.Checkpoint.write)


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    policy = "float32"
    train_steps = 20
    steps_per_loop = log_every_steps = eval_every_steps = checkpoint_every_steps = 10
    global_batch_size = 8
    summary_every_steps = 0


class Line(mpl.Experiment):
    """A line between two classes."""

    Config = Config

    def build_data(self, split, context):
        def slowly(example):
            in_graph("input")
            return example

        if split != "train":
            return {"x": X, "y": Y}
        return tf.data.Dataset.from_tensor_slices({"x": X, "y": Y}).map(slowly)

    def build_model(self):
        Line.made = self
        return keras.Sequential([
            keras.Input((3,)), keras.layers.Dense(8), keras.layers.Dropout(0.5),
            keras.layers.Dense(2)])

    def loss(self, batch, training):
        if training:
            time.sleep(float(os.environ.get("TRACE_SECS", 0)))
        in_graph("train" if training else "eval")
        logits = self.model(batch["x"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["y"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"], (batch["y"], logits))

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}

    def predict(self, batch):
        return tf.nn.softmax(self.model(batch["x"], training=False))


if __name__ == "__main__":
    print(f"pid {os.getpid()}", flush=True)
    try:
        mpl.run(Line)
    except SystemExit as end:
        print(f"code {end.code} after step {int(Line.made.global_step)}", flush=True)
        sys.exit(end.code)
