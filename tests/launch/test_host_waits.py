"""How often Python waits for the device: once a log."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.launch import session
from mpl.loop.inner_loop import InnerLoop


class Line(mpl.Experiment):
    def build_model(self):
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])

    def build_data(self, split, context):
        return {"x": np.ones([64, 3], np.float32)} if split == "train" else None

    def loss(self, batch, training):
        outputs = tf.cast(self.model(batch["x"], training=training), tf.float32)
        return mpl.LossOutput(tf.reduce_sum(outputs**2, -1), batch["weight"])


class Reads:
    """Notes what Python reads of a device, blocks of steps and logs, in order."""

    def __init__(self, monkeypatch, device):
        self.events = []
        kind = type(tf.constant(0))
        read, run = kind._numpy, InnerLoop.run

        def noted_read(tensor):
            if tensor.device.endswith(device):
                self.events.append("read")
            return read(tensor)

        def noted_run(*args):
            self.events.append("block")
            run(*args)
            self.events.append("end")

        monkeypatch.setattr(kind, "_numpy", noted_read)
        monkeypatch.setattr(InnerLoop, "run", noted_run)

    def start(self, step, total_steps): ...

    def train(self, step, values, steps_per_sec):
        self.events.append("log")

    def finish(self, step): ...


@pytest.mark.parametrize("settings, blocks_a_log", [
    ({"train_steps": 300}, 1), ({"train_steps": 30, "log_every_steps": 10}, 1),
    ({"train_steps": 30, "log_every_steps": 10, "steps_per_loop": 5}, 2),
])
def test_the_device_is_read_once_a_log(settings, blocks_a_log, monkeypatch):
    experiment = Line()
    config = mpl.RunConfig(policy="float32", jit_compile=False, **settings)
    experiment.setup(config, tf.distribute.OneDeviceStrategy("CPU:1"))
    reads = Reads(monkeypatch, "CPU:1")
    every = session.intervals(config, experiment.train_steps, None)
    controller = mpl.Controller(
        global_step=experiment.global_step, trainer=experiment.trainer,
        reporters=[reads], **every)
    controller.train(experiment.train_steps)
    *logs, rest = " ".join(reads.events).split("log")
    assert len(logs) == 3 and "block" not in rest
    assert "read" in rest + logs[0]  # it is seen
    for log in logs:
        blocks = log.split("block")[1:]
        assert len(blocks) == blocks_a_log
        for number, block in enumerate(blocks, 1):
            inside, after = block.split("end")
            assert "read" not in inside
            assert ("read" in after) == (number == blocks_a_log)
