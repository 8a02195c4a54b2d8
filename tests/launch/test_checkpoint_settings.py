"""The settings of checkpoints: what is kept, the best, pretrained weights."""

import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.launch import workdir
from mpl.launch.config import RunConfig, parse_best_metric


class Line(mpl.Experiment):
    def build_data(self, split, context):
        x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
        return {"x": x, "y": x.sum(1, keepdims=True)}

    def build_model(self):
        return keras.Sequential([keras.Input([3]), keras.layers.Dense(1, name="out")])

    def loss(self, batch, training):
        error = self.model(batch["x"], training=training) - batch["y"]
        return mpl.LossOutput(tf.reduce_sum(error**2, 1), batch["weight"])


SETTINGS = dict(policy="float32", global_batch_size=8, train_steps=8, steps_per_loop=1,
                checkpoint_every_steps=1, eval_every_steps=2)  # fmt: skip


def steps_in(folder):
    return sorted(int(name[5:-7]) for name in os.listdir(folder)
                  if name.endswith(".commit"))  # fmt: skip


def test_what_is_kept_and_the_best(tmp_path):
    mpl.run(Line, **SETTINGS, workdir=str(tmp_path), max_to_keep=2, keep_every_steps=3,
            best_metric="loss:max")
    checkpoints = tmp_path / "checkpoints"
    assert steps_in(checkpoints) == [3, 6, 7, 8]
    assert steps_in(checkpoints / "best" / "loss") == [2]  # the loss only falls
    marker = json.loads((checkpoints / "ckpt-8.commit").read_text())
    assert marker["flags"]["keep_every_steps"] == 3


def test_pretrained_weights_begin_a_new_run_and_its_averages(
    tmp_path, capsys, monkeypatch
):
    mpl.run(Line, **SETTINGS, workdir=str(tmp_path / "one"))
    experiment = Line()
    config = RunConfig(**SETTINGS, ema_decay=0.9)
    experiment.setup(config, tf.distribute.OneDeviceStrategy("CPU:0"))
    report = experiment.init_from(str(tmp_path / "one"))
    assert report.endswith("ckpt-8: 2 of 2 variables")
    trained = tf.train.load_checkpoint(str(tmp_path / "one" / "checkpoints" / "ckpt-8"))
    bias, = [trained.get_tensor(name) for name, shape in
             trained.get_variable_to_shape_map().items()
             if name.startswith("model/") and shape == [1]]
    assert bias != 0
    for values in (None, experiment.optimizer.averages):
        by_key = experiment.weights.by_key(values)
        got, = [v.numpy() for v in by_key.values() if v.shape == [1]]
        np.testing.assert_array_equal(got, bias)
    capsys.readouterr()
    mpl.run(Line, **SETTINGS, workdir=str(tmp_path / "two"),
            init_from=str(tmp_path / "one"))
    assert "ckpt-8: 2 of 2 variables" in capsys.readouterr().out
    (tmp_path / "latest").symlink_to("one")
    read, create = [], workdir.create
    monkeypatch.setattr(Line, "init_from", lambda self, path: read.append(path))

    def moved(*args):
        (tmp_path / "latest").unlink()
        (tmp_path / "latest").symlink_to("four")
        return create(*args)

    monkeypatch.setattr(workdir, "create", moved)
    mpl.run(Line, **SETTINGS, workdir=str(tmp_path / "four"),
            init_from=str(tmp_path / "latest"))
    assert read == [str(tmp_path / "one")]
    with pytest.raises(mpl.ConfigError, match=r"`init_from` \(nowhere\) must be a"):
        mpl.run(Line, **SETTINGS, workdir=str(tmp_path / "three"), init_from="nowhere")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    experiment = Line()
    experiment.setup(RunConfig(**SETTINGS), tf.distribute.OneDeviceStrategy("CPU:0"))
    assert experiment.require_finite() is None
    experiment.model.layers[-1].bias.assign([bad])
    experiment.weights.adopt()
    with pytest.raises(mpl.NonFiniteError, match="After step 0 .*out/bias' is not fin"):
        experiment.require_finite()


def test_a_checkpoint_is_due_by_time(tmp_path):
    now, saved = [0.0], []
    experiment = Line()
    experiment.setup(RunConfig(**SETTINGS), tf.distribute.OneDeviceStrategy("CPU:0"))

    class Manager:
        directory = str(tmp_path)

        def save(self, step):
            saved.append(step)
            return "path"

    def tick(output):
        now[0] += 10.0

    mpl.Controller(
        global_step=experiment.global_step, trainer=experiment.trainer,
        checkpoint_manager=Manager(), checkpoint_every_secs=25, steps_per_loop=1,
        train_actions=[tick], clock=lambda: now[0]).train(8)
    assert saved == [3, 6, 8]


def test_the_form_of_best_metric():
    assert parse_best_metric("accuracy") == ("accuracy", "max")
    assert parse_best_metric("loss") == ("loss", "min")
    assert parse_best_metric("loss:max") == ("loss", "max")
    for text in (":max", "loss:best"):
        with pytest.raises(mpl.ConfigError, match="must be METRIC, METRIC:min or"):
            RunConfig(best_metric=text)
    with pytest.raises(mpl.ConfigError, match="`best_metric` .loss. needs evaluations"):
        RunConfig(best_metric="loss", mode="train")
