"""Distils the CNN of experiments.digits into a small network.

    python -m experiments.distill

A new loop by `train_step` alone: in each step the teacher learns from the labels, and
the student, which is given a tenth of the images, from their labels and the teacher's
softened classes; both updates are applied or none is. Metrics, export and predictions
are the student's.
Hardware: any. Expected: test accuracy 0.928 ± 0.007 against 0.904 ± 0.006 with
--soft_share=0, better by 0.023 ± 0.010 at equal seeds; the test loss is worse, 0.48
against 0.30. So seen in mixed_bfloat16 with seeds 3 to 7 (mean ± standard deviation).
--soft_share and --temperature were chosen by the validation accuracy of seeds 0 to 2,
the other settings before that, with test figures of seeds 0 and 1 in sight.
Data: UCI optical recognition of handwritten digits, in experiments/datasets.
Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, sections 2 and 6 (few
images); a teacher that trains at the same time: Anil et al. 2018,
https://arxiv.org/abs/1804.03235
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import mpl
from experiments import digits


@dataclasses.dataclass(frozen=True)
class Config(digits.Config):
    """Flags of this experiment."""

    learning_rate = 1e-2
    units: int = mpl.option(32, "Units of the student's hidden layer.", minimum=1)
    given: int = mpl.option(10, "The student gets one image in so many.", minimum=1)
    temperature: float = mpl.option(8.0, "Softens both models' classes.", above=0)
    soft_share: float = mpl.option(
        0.5, "The teacher's part in the student's loss.", minimum=0, maximum=1)


class Distill(digits.Digits):
    """A convolutional teacher, and a student with one hidden layer."""

    Config = Config

    def build_data(self, split, context):
        examples = super().build_data(split, context)
        given = np.arange(len(examples["label"])) % self.config.given == 0
        return {**examples, "given": np.float32(given)}

    def build_model(self):
        layers = keras.layers
        student = keras.Sequential([
            keras.Input((8, 8, 1)), layers.Rescaling(1 / 16), layers.Flatten(),
            layers.Dense(self.config.units, activation="relu"),
            layers.Dense(10, dtype="float32")])
        return {"teacher": super().build_model(), "student": student}

    def train_step(self, iterator):
        def replica_step(batch):
            params = {name: part.cast() for name, part in self.weights.items()}
            teacher, _ = self.learn("teacher", params, batch)
            # Without a tape and without dropout: to the student these are constants.
            with self.weights["teacher"].bound(params["teacher"]):
                targets = self.model["teacher"](batch["image"], training=False)
            student, output = self.learn(
                "student", params, {**batch, "targets": targets})
            mpl.apply_together([teacher, student])
            self.update_metrics(output, student[-1])

        self.strategy.run(self.compiled(replica_step), args=(next(iterator),))

    def learn(self, name, params, batch):
        """Returns the update of one of the models, and the output of its loss."""
        weights, optimizer = self.weights[name], self.optimizer[name]
        with tf.GradientTape() as tape:
            tape.watch(params[name])
            with weights.bound(params[name]) as forward:
                output = self.loss(batch, training=True, name=name)
                scaled_loss = optimizer.scale_loss(output, forward)
        gradients = weights.gradients(tape, scaled_loss, forward)
        return (optimizer, gradients, forward), output

    def loss(self, batch, training, name="student"):
        logits = self.model[name](batch["image"], training=training)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits)
        if "targets" in batch:  # the student's, in training
            share, heat = self.config.soft_share, self.config.temperature
            soft = tf.nn.softmax_cross_entropy_with_logits(
                tf.nn.softmax(batch["targets"] / heat), logits / heat)
            # T² makes up for gradients that softening divides by as much.
            losses = batch["given"] * ((1 - share) * losses + share * heat**2 * soft)
        return mpl.LossOutput(losses, batch["weight"], (batch["label"], logits))

    def predict(self, batch):
        return tf.nn.softmax(self.model["student"](batch["image"], training=False))


if __name__ == "__main__":
    mpl.run(Distill, train_epochs=60)
