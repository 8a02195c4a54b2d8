"""Generates digits: a new loop by `train_step` alone.

    python -m experiments.gan_digits

A conditional GAN with two models, two optimizers and one loss scale: both updates of a
step are applied or none is. About a minute on 2 CPU cores. Expected: `mae`, the mean
distance between a generated digit and real ones of its class, falls below 0.2 (an
untrained generator: about 0.4).
Source: Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661
"""

import dataclasses

import keras
import tensorflow as tf

import mpl
from experiments.datasets import digits

LATENT = 32


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """Defaults of this experiment."""

    train_epochs = 60


class Latent(keras.layers.Layer):
    """Random codes; the seed is the model's own, so a skipped step repeats them."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, label):
        return keras.random.normal(
            (tf.shape(label)[0], LATENT), seed=self.seed_generator)


class GanDigits(mpl.Experiment):
    """A generator and a discriminator of 8×8 digits, given the class."""

    Config = Config

    def build_data(self, split, context):
        return digits.load(split)

    def build_model(self):
        layers = keras.layers
        label, image = keras.Input((), dtype="int32"), keras.Input((8, 8, 1))
        code = layers.Concatenate()([Latent()(label), layers.Embedding(10, 16)(label)])
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

        def replica_step(batch):
            params_g, params_d = of_g.cast(), of_d.cast()
            with tf.GradientTape() as tape_g, tf.GradientTape() as tape_d:
                tape_g.watch(params_g)
                tape_d.watch(params_d)
                with of_g.bound(params_g) as g, of_d.bound(params_d) as d:
                    fake = self.generate(batch, training=True)
                    on_fake = self.judge(fake, batch)
                    real = tf.cast(batch["image"], tf.float32) / 16
                    on_real = self.judge(real, batch)
                loss_g = mpl.LossOutput(tf.nn.softplus(-on_fake), batch["weight"])
                loss_d = mpl.LossOutput(
                    tf.nn.softplus(-on_real) + tf.nn.softplus(on_fake), batch["weight"],
                    self.outputs(batch, fake))
                scaled_g = self.optimizer["generator"].scale_loss(loss_g, g)
                scaled_d = self.optimizer["discriminator"].scale_loss(loss_d, d)
            grads_g = of_g.gradients(tape_g, scaled_g, g)
            grads_d = of_d.gradients(tape_d, scaled_d, d)
            mpl.apply_together([(self.optimizer["generator"], grads_g, g),
                                (self.optimizer["discriminator"], grads_d, d)])
            self.update_metrics(loss_d, d)

        self.strategy.run(self.compiled(replica_step), args=(next(iterator),))

    def generate(self, batch, training):
        return self.model["generator"](batch["label"], training=training)

    def judge(self, image, batch):
        return self.model["discriminator"]([image, batch["label"]], training=True)[:, 0]

    def outputs(self, batch, fake):
        return tf.cast(batch["image"], tf.float32) / 16, fake

    def loss(self, batch, training):
        real, fake = self.outputs(batch, self.generate(batch, training))
        error = tf.reduce_mean(tf.abs(real - fake), axis=[1, 2, 3])
        return mpl.LossOutput(error, batch["weight"], (real, fake))

    def metrics(self):
        return {"mae": keras.metrics.MeanAbsoluteError()}

    def predict(self, batch):
        return self.generate(batch, training=False)


if __name__ == "__main__":
    mpl.run(GanDigits)
