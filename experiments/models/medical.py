"""Small networks for images, volumes and tables of measurements."""

import keras

layers = keras.layers

_OF_RANK = {
    2: (layers.Conv2D, layers.MaxPooling2D, layers.GlobalAveragePooling2D),
    3: (layers.Conv3D, layers.MaxPooling3D, layers.GlobalAveragePooling3D),
}


def cnn(shape: tuple[int, ...], num_outputs: int, filters: int) -> keras.Model:
    """Makes a CNN of three convolutions with batch normalisation and pooling.

    Args:
        shape: of an image, `(height, width, channels)`, or of a volume, `(depth,
            height, width, channels)`; at least 8 in each direction.
        num_outputs: logits.
        filters: of the first convolution; the others have twice and four times as many.

    Returns:
        A model of uint8 `[batch, *shape]`; it returns float32 logits.
    """
    convolution, pooling, average = _OF_RANK[len(shape) - 1]
    stack = [keras.Input(shape), layers.Rescaling(1 / 255)]
    for factor in (1, 2, 4):
        stack += [  # pooled first: less is left to normalise
            convolution(factor * filters, 3, padding="same", use_bias=False),
            pooling(2), layers.BatchNormalization(momentum=0.9), layers.ReLU()]
    head = [average(), layers.Dense(4 * filters, activation="relu"),
            layers.Dropout(0.2), layers.Dense(num_outputs, dtype="float32")]
    return keras.Sequential(stack + head)


def mlp(num_features: int, num_outputs: int, units: int) -> keras.Model:
    """Makes an MLP with one hidden layer; it returns float32 logits.

    Args:
        num_features: measurements, of mean 0 and standard deviation 1.
        num_outputs: logits.
        units: of the hidden layer.
    """
    return keras.Sequential([
        keras.Input((num_features,)),
        layers.Dense(units, activation="relu"),
        layers.Dropout(0.3),
        layers.Dense(num_outputs, dtype="float32"),
    ])
