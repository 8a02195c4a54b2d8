"""What a run does about steps that are not finite."""

import dataclasses
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl import launch
from mpl.errors import ConfigError, NonFiniteError
from mpl.experiment import Experiment
from mpl.launch.config import RunConfig
from mpl.step.state import LossOutput

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    train_steps = 10
    checkpoint_every_steps = 2
    global_batch_size = 4
    policy = "float32"
    loss_scale = 8.0
    summary_every_steps = 0


class Bad(Experiment):
    """The loss is infinite in the steps after the fourth."""

    Config = Config

    def build_model(self):
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="only")])

    def build_data(self, split, context):
        return {"x": X} if split == "train" else None

    def loss(self, batch, training):
        losses = self.model(batch["x"], training=training)[:, 0] ** 2
        losses *= tf.where(self.global_step >= 4, np.inf, 1.0)
        return LossOutput(losses, batch["weight"])


class Unbuilt(Bad):
    def build_data(self, split, context):
        raise AssertionError("nothing is built")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("settings, step, row", [
    ({"on_nonfinite": "stop"}, 5, 1), ({"max_consecutive_skips": 3}, 7, 3)])
def test_a_run_ends_with_a_report_and_saves_nothing_bad(settings, step, row):
    said = (rf"^At step {step}: {row} steps? in a row (was|were) skipped: (inf|nan) in "
            r"'.*(kernel|bias)' at loss scale 8\.\nLower the learning rate")
    with pytest.raises(NonFiniteError, match=said):
        launch.run(Bad, workdir="w", **settings)
    steps = {name for name in os.listdir("w/checkpoints") if name.endswith(".commit")}
    assert {"ckpt-2.commit", "ckpt-4.commit"} <= steps
    for name in steps:
        path = os.path.join("w", "checkpoints", name.removesuffix(".commit"))
        reader = tf.train.load_checkpoint(path)
        for key in reader.get_variable_to_shape_map():
            value = reader.get_tensor(key)
            if np.asarray(value).dtype.kind == "f" and "model" in key:
                assert np.isfinite(value).all(), key


def test_skipping_goes_on_to_the_end():
    results = launch.run(Bad, workdir="w")
    assert results["train"]["skipped_steps"] == 6
    assert results["train"]["applied_steps"] == 4


@pytest.mark.parametrize("settings", [
    {"loss_scale": "dynamic"}, {"policy": "mixed_float16", "loss_scale": "auto"}])
def test_stop_does_not_go_with_a_dynamic_scale(settings):
    said = (r"^`on_nonfinite` \(stop\) does not go with `loss_scale` \(.*\), which "
            r"under .* is dynamic: .*\nUse --loss_scale=1024, ")
    with pytest.raises(ConfigError, match=said):
        launch.run(Unbuilt, workdir="w", on_nonfinite="stop", **settings)
    assert not os.path.exists("w")
