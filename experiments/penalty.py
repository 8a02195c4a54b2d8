"""Trains a CNN on digits with a penalty on the gradient by the image.

    python -m experiments.penalty

A new loop by `train_step` alone, with two tapes: ‖∂loss ÷ ∂image‖² is part of the loss,
so that a little noise on an image changes little (double backpropagation). Hardware:
any. Expected: test accuracy of 0.98 or more, and a third to a half of the
`squared_slope` that --penalty=0 has (seen with two seeds: 0.0035 and 0.0036, where that
had 0.0085 and 0.0114).
Data: UCI optical recognition of handwritten digits, in experiments/datasets.
Source: Drucker and LeCun 1992, doi:10.1109/72.165600; Ross and Doshi-Velez 2018,
https://arxiv.org/abs/1711.09404
"""

import dataclasses

import keras
import tensorflow as tf

import mpl
from experiments import digits


@dataclasses.dataclass(frozen=True)
class Config(digits.Config):
    """Flags of this experiment."""

    penalty: float = mpl.option(
        10.0, "Factor of the squared gradient by the image, whose ink is 0 to 16.",
        minimum=0)


class Penalty(digits.Digits):
    """A CNN with a loss that is flat around the images."""

    Config = Config
    accumulates = True

    def build_model(self):
        layers = keras.layers
        return keras.Sequential([
            keras.Input((8, 8, 1)), layers.Rescaling(1 / 16),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, activation="relu"),
            # Not the largest: its second gradient XLA has in float32 alone.
            layers.AveragePooling2D(2), layers.Flatten(),
            layers.Dense(self.config.hidden, activation="relu"),
            layers.Dropout(0.3), layers.Dense(10, dtype="float32")])

    def train_step(self, iterator):
        def replica_step(batch):
            params = self.weights.cast()

            def replica_forward(batch, state):
                with tf.GradientTape() as outer:
                    outer.watch(params)
                    with self.weights.bound(params, state) as forward:
                        output, squares = self.sloped(batch, training=True)
                        losses = output.per_example + self.config.penalty * squares
                        scaled_loss = self.optimizer.scale_loss(
                            output._replace(per_example=losses), forward)
                gradients = self.weights.gradients(outer, scaled_loss, forward)
                return gradients, forward, output

            gradients, forward, output = mpl.accumulate(
                replica_forward, batch, self.config.accumulate_steps,
                weights=self.weights)
            self.optimizer.apply(gradients, forward)
            self.update_metrics(output, forward)  # without the penalty, as evaluation

        self.strategy.run(self.compiled(replica_step), args=(next(iterator),))

    def sloped(self, batch, training):
        """Returns the output of the loss, and ‖∂loss ÷ ∂image‖² `[batch]`."""
        image = tf.cast(batch["image"], tf.float32)
        # The root of the loss scale S: the inner pass carries √S, and the outer one, on
        # its way back through the inner, S ÷ √S, so that neither underflows in float16.
        root = tf.sqrt(self.loss_scale.value)
        with tf.GradientTape() as inner:
            inner.watch(image)
            output = super().loss({**batch, "image": image}, training)
            scaled_losses = root * output.per_example
        squares = tf.reduce_sum(
            (inner.gradient(scaled_losses, image) / root) ** 2, axis=[1, 2, 3])
        outputs = {"accuracy": output.outputs, "squared_slope": squares}
        return output._replace(outputs=outputs), squares

    def loss(self, batch, training):  # of evaluation
        return self.sloped(batch, training)[0]

    def metrics(self):
        return {**super().metrics(), "squared_slope": keras.metrics.Mean()}


if __name__ == "__main__":
    mpl.run(Penalty)
