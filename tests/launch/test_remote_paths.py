"""A working folder that is not on a local disk; memory stands for `gs://`."""

import json
import uuid

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl

pytestmark = pytest.mark.slow
X = np.random.default_rng(0).normal(size=[24, 3]).astype(np.float32)


class Line(mpl.Experiment):
    def build_model(self):
        return keras.Sequential([
            keras.Input((3,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])

    def build_data(self, split, context):
        return {"x": X, "y": X.sum(axis=1)}

    def loss(self, batch, training):
        outputs = tf.cast(self.model(batch["x"], training=training), tf.float32)
        return mpl.LossOutput((outputs[:, 0] - batch["y"]) ** 2, batch["weight"])

    def predict(self, batch):
        return self.model(batch["x"], training=False)


def run(folder, **settings):
    return mpl.run(Line, workdir=folder, policy="float32", global_batch_size=8,
                   checkpoint_every_steps=3, mode="all", **settings)


def test_a_run_goes_on_exports_and_predicts(tmp_path):
    folder = f"ram://{uuid.uuid4().hex}/runs/line"
    run(folder, train_steps=6, max_to_keep=1)
    first = run(folder, train_steps=12, summary_every_steps=3)
    assert first["test"] == run(str(tmp_path / "line"), train_steps=12)["test"]

    names = set(tf.io.gfile.listdir(folder))
    assert {"checkpoints", "metrics.jsonl", "flagfile.txt", "goodput.json", "export",
            "predictions.npz", "summaries"} <= names
    kept = sorted(name for name in tf.io.gfile.listdir(f"{folder}/checkpoints")
                  if name.endswith(".commit"))
    assert kept == ["ckpt-12.commit"]  # the run keeps its flags
    with tf.io.gfile.GFile(f"{folder}/metrics.jsonl") as file:
        steps = [json.loads(line)["step"] for line in file]
    assert steps == sorted(steps) and steps[-1] == 12

    with tf.io.gfile.GFile(f"{folder}/predictions.npz", "rb") as file:
        written = np.load(file)["predictions"]
    with np.load(tmp_path / "line" / "predictions.npz") as arrays:
        np.testing.assert_array_equal(written, arrays["predictions"])
    predict = mpl.load_predictor(f"{folder}/export")
    np.testing.assert_allclose(predict({"x": X}), written, rtol=1e-5)


def test_an_export_that_fails_leaves_no_word_of_itself(monkeypatch):
    folder = f"ram://{uuid.uuid4().hex}/export"
    settings = dict(policy="float32", train_steps=3, global_batch_size=8)
    experiment = Line()
    experiment.setup(mpl.RunConfig(**settings), tf.distribute.get_strategy())
    experiment.export(folder)

    def fails(*_, **__):
        raise tf.errors.UnavailableError(None, None, "")

    monkeypatch.setattr(tf.saved_model, "save", fails)
    with pytest.raises(mpl.CheckpointError, match="cannot be written: UnavailableErr"):
        experiment.export(folder)
    assert not tf.io.gfile.exists(f"{folder}/mpl_export.json")
