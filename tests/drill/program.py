"""The training that is drilled: a small one that keeps all that a run can keep.

    DRILL_PHASE=<file> python tests/drill/program.py --workdir=<folder> ...

What mpl says is going on is written to the file at once, so that it stays readable
after SIGKILL. With --data_dir the examples come from files, else from memory.
"""

import dataclasses
import itertools
import os
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf

import mpl
from mpl import loop

FEATURES, EXAMPLES = 16, 250  # 16 batches an epoch, the last of 10 examples
_FILES = 5


def examples(split):
    """Returns rows of features and, in the last column, the label."""
    random = np.random.default_rng(("train", "validation", "test").index(split))
    x = random.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
    noisy = x.sum(1) + random.normal(scale=2.0, size=EXAMPLES) > 0
    return np.concatenate([x, noisy[:, None]], 1).astype(np.float32)


def write_files(folder):
    """Writes the training examples as files for --data_dir."""
    for number, rows in enumerate(np.array_split(examples("train"), _FILES)):
        (pathlib.Path(folder) / f"{number}.f32").write_bytes(rows.tobytes())


def read(path):
    """Returns the examples of a file."""

    def parse(record):
        row = tf.reshape(tf.io.decode_raw(record, tf.float32), [FEATURES + 1])
        return {"x": row[:FEATURES], "y": tf.cast(row[FEATURES], tf.int32)}

    return tf.data.FixedLengthRecordDataset(path, 4 * (FEATURES + 1)).map(parse)


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    policy = "mixed_float16"
    train_steps = 1000
    global_batch_size = 16
    steps_per_loop = 5
    log_every_steps = checkpoint_every_steps = 10
    eval_every_steps = 20
    summary_every_steps = 0
    max_to_keep, keep_every_steps = 3, 200
    lr_schedule = "cosine"
    learning_rate = 1e-4
    clip_norm = 1.0
    ema_decay = 0.99
    early_stop = "loss:100000"  # never, but it counts
    jit_compile = False
    step_secs: float = mpl.option(
        0.0, "Least time of a step, in seconds.", minimum=0, math=False)


class Drilled(mpl.Experiment):
    """Two classes; dropout, batch statistics, averages and a loss scale that moves."""

    Config = Config

    def build_data(self, split, context):
        if split == "train" and context.data_dir:
            files = os.path.join(context.data_dir, "*.f32")
            return mpl.FileSource(files, read, shuffle_buffer=32)
        rows = examples(split)
        return {"x": rows[:, :FEATURES], "y": rows[:, FEATURES].astype(np.int32)}

    def build_model(self):
        return keras.Sequential([
            keras.Input((FEATURES,)),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(2, dtype="float32"),
        ])

    def setup(self, config, strategy):
        super().setup(config, strategy)
        self.loss_scale.period = 7  # grows, overflows and backs off all the time

    def loss(self, batch, training):
        if training and self.config.step_secs:
            tf.numpy_function(self._sleep, [], tf.int64)
        logits = self.model(batch["x"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["y"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"], (batch["y"], logits))

    def _sleep(self):
        time.sleep(self.config.step_secs)
        return np.int64(0)

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}


def say_phases(path):
    """Has each phase that the watchdog is told written to a file.

    The first block of training is "tracing": a step is traced in it.
    """
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    entered, blocks = loop.Watchdog.enter, itertools.count()

    def enter(watchdog, phase, its_loop=None):
        is_first = phase == "training" and next(blocks) == 0
        said = "tracing" if is_first else phase or "waiting"
        os.pwrite(file, said.ljust(40).encode(), 0)
        entered(watchdog, phase, its_loop)

    loop.Watchdog.enter = enter


def main(experiment_class):
    """Runs it as a program."""
    if "DRILL_PHASE" in os.environ:
        say_phases(os.environ["DRILL_PHASE"])
    mpl.run(experiment_class)


if __name__ == "__main__":
    main(Drilled)
