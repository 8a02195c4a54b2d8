"""A convolutional network on MNIST.

    python -m experiments.mnist_cnn --data_dir=mnist

MNIST's four files, or mnist.npz, lie in the folder: see experiments/datasets/mnist.py.
Expected of 5 epochs: test accuracy of at least 0.99 (not run here: MNIST was not).
Without --data_dir:

    python -m experiments.mnist_cnn --train_epochs=30

on the embedded digits, enlarged: half a minute on 2 CPU cores, expected test accuracy
about 0.99 in any policy.
Source of the model: https://www.tensorflow.org/tutorials/images/cnn
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

import mpl
from experiments.datasets import mnist
from experiments.models.convnet import convnet


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """The defaults of this experiment."""

    train_epochs = 5
    lr_schedule = "cosine"


class MnistCnn(mpl.Experiment):
    """28×28 grey images, ten classes."""

    Config = Config

    def build_data(self, split, context):
        return mnist.load(split, context.data_dir)

    def build_model(self):
        return convnet(keras.layers.Rescaling(1 / 255))

    def loss(self, batch, training):
        logits = self.model(batch["image"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["label"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"], (batch["label"], logits))

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}

    def predict(self, batch):
        return tf.nn.softmax(self.model(batch["image"], training=False))

    def read_input(self, path):  # an IDX file of images
        if "idx3-ubyte" in path:
            return [{"image": mnist.read_images(path)[..., np.newaxis]}]


if __name__ == "__main__":
    mpl.run(MnistCnn)
