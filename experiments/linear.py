"""y = w x + b by gradient descent: the smallest loop.

    python -m experiments.linear

1,000 steps on four points of y = 2 x, in seconds on any machine. Expected: the last
line says `linear: error 0.0000 w 2.0000 b 0.0000`, of points beyond those learned.
In 16 bits w and b are right to the digits that these have: w 1.9922, b 0.0156 with
--policy=mixed_bfloat16; w 1.9990, b 0.0020 with mixed_float16, which skips its first
four steps until the loss scale fits. docs/graphs_and_loops.md builds the same loop from
nothing.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import mpl

POINTS = {"train": [1, 2, 3, 4], "validation": [5, 6], "test": [7, 8, 9, 10]}


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """The defaults of this experiment."""

    policy = "float32"  # here digits matter, not speed
    train_steps = 1000
    global_batch_size = 4
    optimizer = "sgd"
    learning_rate = 0.05


class Line(tf.Module):
    """w x + b."""

    def __init__(self):
        super().__init__()
        self.w = tf.Variable(0.3, name="w")
        self.b = tf.Variable(-0.3, name="b")

    def __call__(self, x):
        return self.w * x + self.b


class Linear(mpl.Experiment):
    """The line through a few points."""

    Config = Config

    def build_data(self, split, context):
        if context.data_dir is not None:
            raise mpl.ConfigError(
                f"`data_dir` ({context.data_dir}) is not read: the points are those of "
                "experiments/linear.py.", "Leave --data_dir out.")
        x = np.array(POINTS[split], np.float32)
        return {"x": x, "y": 2 * x}

    def build_model(self):
        return Line()

    def loss(self, batch, training):
        y = self.predict(batch)
        w, b = (self.policy.cast_to_output(variable) * tf.ones_like(y)
                for variable in (self.model.w, self.model.b))
        error = y - batch["y"]
        outputs = {"error": tf.abs(error), "w": w, "b": b}
        return mpl.LossOutput(tf.square(error), batch["weight"], outputs)

    def metrics(self):
        return {name: keras.metrics.Mean() for name in ("error", "w", "b")}

    def predict(self, batch):
        x = self.policy.cast_to_compute(batch["x"])
        return self.policy.cast_to_output(self.model(x))

    def read_input(self, path):  # numbers in a text file
        if path.endswith(".txt"):
            return [{"x": np.loadtxt(path, np.float32, ndmin=1)}]


if __name__ == "__main__":
    mpl.run(Linear)
