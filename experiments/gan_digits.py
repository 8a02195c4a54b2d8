"""Generates digits: a new loop by `train_step` alone.

    python -m experiments.gan_digits

A conditional GAN with two models, two optimizers and one loss scale: both updates of a
step are applied or none is. Ten seconds on 2 CPU cores. Expected: `mae`, the mean
distance between a generated digit and real ones of its class, falls below 0.2 (an
untrained generator: about 0.4).
Source: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661
"""

import keras
import tensorflow as tf

import mpl
from experiments.datasets import digits


class GanDigits(mpl.Experiment):
    """A generator and a discriminator of 8×8 digits, given the class."""

    def build_data(self, split, context):
        return digits.load(split, context.data_dir)

    def build_model(self):
        layers = keras.layers
        label, image = keras.Input((), dtype="int32"), keras.Input((8, 8, 1))
        # The noise's seed is part of the model: a skipped step draws it again.
        code = layers.GaussianNoise(1.0, seed=0)(
            layers.Embedding(10, 32)(label), training=True)
        x = layers.Dense(256, activation="relu")(code)
        x = layers.Dense(64, activation="sigmoid", dtype="float32")(x)
        fake = layers.Reshape((8, 8, 1), dtype="float32")(x)
        x = layers.Concatenate()(
            [layers.Flatten()(image), layers.Embedding(10, 16)(label)])
        for _ in range(2):
            x = layers.Dropout(0.3)(layers.Dense(128, activation="leaky_relu")(x))
        verdict = layers.Dense(1, dtype="float32")(x)
        return {"generator": keras.Model(label, fake),
                "discriminator": keras.Model([image, label], verdict)}

    def build_optimizer(self, config):
        return keras.optimizers.Adam(config.learning_rate, beta_1=0.5)

    def train_step(self, iterator):
        of_g, of_d = self.weights["generator"], self.weights["discriminator"]
        optimizer_g = self.optimizer["generator"]
        optimizer_d = self.optimizer["discriminator"]

        def replica_step(batch):
            params_g, params_d = of_g.cast(), of_d.cast()
            with tf.GradientTape() as tape_g, tf.GradientTape() as tape_d:
                tape_g.watch(params_g)
                tape_d.watch(params_d)
                with of_g.bound(params_g) as g, of_d.bound(params_d) as d:
                    real, fake = self.pairs(batch)
                    on_real, on_fake = self.judge(real, batch), self.judge(fake, batch)
                losses_d = tf.nn.softplus(-on_real) + tf.nn.softplus(on_fake)
                loss_g = mpl.LossOutput(tf.nn.softplus(-on_fake), batch["weight"])
                loss_d = mpl.LossOutput(losses_d, batch["weight"], (real, fake))
                scaled_g = optimizer_g.scale_loss(loss_g, g)
                scaled_d = optimizer_d.scale_loss(loss_d, d)
            mpl.apply_together([
                (optimizer_g, of_g.gradients(tape_g, scaled_g, g), g),
                (optimizer_d, of_d.gradients(tape_d, scaled_d, d), d)])
            self.update_metrics(loss_d, d)

        self.strategy.run(self.compiled(replica_step), args=(next(iterator),))

    def judge(self, image, batch):
        return self.model["discriminator"]([image, batch["label"]], training=True)[:, 0]

    def pairs(self, batch):
        return tf.cast(batch["image"], tf.float32) / 16, self.predict(batch)

    def predict(self, batch):
        return self.model["generator"](batch["label"])

    def loss(self, batch, training):  # of evaluation
        real, fake = self.pairs(batch)
        error = tf.reduce_mean(tf.abs(real - fake), axis=[1, 2, 3])
        return mpl.LossOutput(error, batch["weight"], (real, fake))

    def metrics(self):
        return {"mae": keras.metrics.MeanAbsoluteError()}


if __name__ == "__main__":
    mpl.run(GanDigits, train_epochs=60)
