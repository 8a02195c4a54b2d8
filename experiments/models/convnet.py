"""A small convolutional network for 28×28 grey images, of 93,322 parameters."""

import keras

layers = keras.layers


def convnet(*preparation: keras.layers.Layer) -> keras.Sequential:
    """Returns convolutions of 32, 64 and 64 filters, 64 dense units and ten logits.

    Args:
        preparation: layers that the images `[batch, 28, 28, 1]` pass first.
    """
    return keras.Sequential([
        keras.Input((28, 28, 1)),
        *preparation,
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"),
        layers.Flatten(),
        layers.Dense(64, activation="relu"),
        layers.Dense(10, dtype="float32"),
    ])
