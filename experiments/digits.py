"""A small CNN on 1,797 real handwritten digits.

    python -m experiments.digits --mode=all

trains, evaluates, exports, reloads and predicts, in about half a minute on 2 CPU cores.
Expected: the last line says `digits: accuracy 0.98` or more, in any policy.
Data: UCI optical recognition of handwritten digits, in experiments/datasets.
"""

import dataclasses

import keras

import mpl
from experiments.datasets import digits


@dataclasses.dataclass(frozen=True)
class Config(mpl.RunConfig):
    """Flags of this experiment, and its own defaults."""

    train_epochs = 30
    learning_rate = 2e-3
    lr_schedule = "cosine"
    hidden: int = mpl.option(64, "Units of the hidden layer.", minimum=1)


class Digits(mpl.Experiment):
    """8×8 images in 17 grey levels, ten classes."""

    Config = Config
    ranges = {"image": (0, 16), "label": (0, digits.NUM_CLASSES - 1)}

    def build_data(self, split, context):
        return digits.load(split, context.data_dir)

    def build_model(self):
        return keras.Sequential([
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(self.config.hidden, activation="relu"),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(digits.NUM_CLASSES, dtype="float32"),
        ])

    def loss(self, batch, training):
        logits = self.model(batch["image"], training=training)
        losses = keras.losses.sparse_categorical_crossentropy(
            batch["label"], logits, from_logits=True)
        return mpl.LossOutput(losses, batch["weight"], (batch["label"], logits))

    def metrics(self):
        return {"accuracy": keras.metrics.SparseCategoricalAccuracy()}

    def predict(self, batch):
        return keras.ops.softmax(self.model(batch["image"], training=False))

    def from_pixels(self, pixels):  # of image files; the data have 17 grey levels
        return (pixels / 255 * 16).round()


if __name__ == "__main__":
    mpl.run(Digits)
