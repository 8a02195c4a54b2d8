"""A run that goes on with another learning rate trains with it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl


class Line(mpl.Experiment):
    """One weight, whose gradient is always -1."""

    def build_data(self, split, context):
        ones = np.ones([8, 1], np.float32)
        return {"x": ones} if split == "train" else None

    def build_model(self):
        dense = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
        return keras.Sequential([keras.Input((1,)), dense])

    def loss(self, batch, training):
        return mpl.LossOutput(-self.model(batch["x"])[:, 0], batch["weight"])


@pytest.mark.parametrize("change, rate, weight", [
    ({}, 0.5, 2.0),
    ({"learning_rate": 0.25, "allow_changed_flags": True}, 0.25, 1.5),
])
def test_the_rate_of_the_flag_counts(change, rate, weight, tmp_path, capsys):
    settings = {"workdir": str(tmp_path), "mode": "train", "summary_every_steps": 0}
    mpl.run(Line, policy="float32", optimizer="sgd", learning_rate=0.5, train_steps=2,
            global_batch_size=8, **settings)
    results = mpl.run(Line, train_steps=4, **settings, **change)
    assert results["train"]["learning_rate"] == rate
    model = Line().build_model()
    path = f"{tmp_path}/checkpoints/ckpt-4"
    tf.train.Checkpoint(model=model).restore(path).expect_partial()
    assert float(model.weights[0].numpy()[0, 0]) == weight
    said = "learning_rate 0.5 -> 0.25" in capsys.readouterr().out
    assert said == bool(change)
