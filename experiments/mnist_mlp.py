"""Dense layers, 784-128-10, on MNIST in bfloat16.

    python -m experiments.mnist_mlp --data_dir=mnist --hidden=512 --layers=3

The folder is that of experiments/mnist_cnn.py; without it embedded digits, enlarged,
are learned in seconds, with a test accuracy of about 0.96. Loss and accuracy of
training and test images after each of 10 epochs, beside those of float32, as a table
and a picture:

    python -m experiments.benchmarks.epochs --data_dir=mnist
"""

import dataclasses

import keras

import mpl
from experiments import mnist_cnn

layers = keras.layers


@dataclasses.dataclass(frozen=True)
class Config(mnist_cnn.Config):
    """Flags of this experiment, and its own defaults."""

    policy = "mixed_bfloat16"
    train_epochs = 10
    global_batch_size = 128
    lr_schedule = "constant"
    hidden: int | str = mpl.option(
        128, "Units of the hidden layers: a number for all, or as many numbers as "
        "there are layers: 128,512,1024.", minimum=1)
    layers: int | None = mpl.option(
        None, "Number of hidden layers. none: as many as --hidden has numbers.",
        minimum=1)

    def validate(self) -> None:
        super().validate()
        words = str(self.hidden).split(",")
        numbers = all(word.isdecimal() and int(word) > 0 for word in words)
        if not numbers or (self.layers or len(words)) != len(words) > 1:
            raise mpl.ConfigError(
                f"`hidden` ({self.hidden}) must be a number, or one for each of "
                f"`layers` ({self.layers}) with commas between.",
                "Write for example --hidden=512 --layers=3, or --hidden=512,256,128.")

    @property
    def units(self) -> list[int]:
        """The units of each hidden layer."""
        units = [int(word) for word in str(self.hidden).split(",")]
        return units if len(units) > 1 else units * (self.layers or 1)


class MnistMlp(mnist_cnn.MnistCnn):
    """The data, the loss and the metrics of `mnist_cnn`, with dense layers."""

    Config = Config

    def build_model(self):
        hidden = [layers.Dense(n, activation="relu") for n in self.config.units]
        return keras.Sequential([
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            *hidden,
            layers.Dense(10, dtype="float32"),
        ])


if __name__ == "__main__":
    mpl.run(MnistMlp)
