"""A small experiment of which one process can be told to die, to stop or to differ.

    FAULT=train:1:12 python -m mpl.launch.local --workers=2 -- python faulty.py …

FAULT is PHASE:RANK:STEP; PHASE start, train, eval, save (SIGKILL there), stop (SIGSTOP
in training), raise; or data, code, flags, which are other ones then. The chief alone
can write files.
"""

import atexit
import os
import pathlib
import signal
import sys
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf

import mpl
from mpl import distribute
from mpl.launch import session
from mpl.record import commit
from mpl.record.checkpoint import Checkpoints

cluster = distribute.find_cluster()
phase, rank, step = f"{os.environ.get('FAULT', '')}::".split(":")[:3]
mine = cluster is not None and rank == str(cluster.rank)


def end(*_, **__):
    """Ends or stops this process, or fails."""
    print("fault at", time.time(), flush=True)
    if phase == "raise":
        raise ValueError("told to fail")
    os.kill(os.getpid(), signal.SIGSTOP if phase == "stop" else signal.SIGKILL)


class Faulty(mpl.Experiment):
    def build_data(self, split, context):
        random = np.random.default_rng(int(mine and phase == "data"))
        x = random.normal(size=(50, 4)).astype(np.float32)
        return {"x": x, "y": (x.sum(1) > 0).astype(np.int32)}

    def build_model(self):
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])

    def loss(self, batch, training):
        logits = tf.cast(self.model(batch["x"]), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["y"], logits)
        return mpl.LossOutput(losses, batch["weight"])

    def predict(self, batch):
        return tf.nn.softmax(self.model(batch["x"]))

    def setup(self, config, strategy):
        super().setup(config, strategy)
        if mine and phase in ("train", "eval", "stop", "raise"):
            loop = self.evaluators["validation"] if phase == "eval" else self.trainer
            name = "eval_begin" if phase == "eval" else "train_loop_begin"
            before = getattr(loop, name)
            setattr(loop, name, lambda: (self.fail(), before())[1])

    def fail(self):
        if int(self.global_step) >= int(step):
            end()


class FaultySaving(Checkpoints):
    """The chief is slow to end a save, in which it or the other one is killed."""

    def save(self, number):
        index = pathlib.Path(self.directory, f"ckpt-{step}.index")
        if mine and cluster.rank and str(number) == step:
            while not index.exists():  # the chief's commit follows
                time.sleep(0.05)
            end()
        return super().save(number)


def commit_slowly(path, facts):
    if path.endswith(f"ckpt-{step}"):
        if mine:
            end()
        time.sleep(4)
    committed(path, facts)


class ReadOnly(tf.io.gfile.GFile):
    def __init__(self, name, mode="r"):
        assert mode.startswith("r"), f"{name} is written by another than the chief"
        super().__init__(name, mode)


if cluster is not None and cluster.rank:
    tf.io.gfile.GFile = ReadOnly
if phase == "save":
    session.Checkpoints = FaultySaving
    committed, commit.commit = commit.commit, commit_slowly
if mine and phase == "start":
    distribute.get_strategy = end
if __name__ == "__main__":
    copy = pathlib.Path(tempfile.gettempdir(), f"other_{os.getppid()}.py")
    if mine and phase == "code" and "other_" not in __file__:
        copy.write_text(pathlib.Path(__file__).read_text() + "# changed\n")
        os.execv(sys.executable, [sys.executable, str(copy), *sys.argv[1:]])
    atexit.register(copy.unlink, missing_ok=True)
    if mine and phase == "flags":
        sys.argv.append("--clip_norm=3")
    mpl.run(Faulty, train_steps=40, eval_every_steps=10, checkpoint_every_steps=5,
            steps_per_loop=5, log_every_steps=5, global_batch_size=8,
            async_checkpoints=phase == "save",
            policy="float32", optimizer="sgd", learning_rate=0.1)
