"""ResNets of bottleneck blocks, for images of some 224×224 pixels."""

from collections.abc import Sequence

import keras

layers = keras.layers
# Blocks of each size, by number of layers; 14 and 26 are small ones, to try things.
BLOCKS = {"14": (1, 1, 1, 1), "26": (2, 2, 2, 2), "50": (3, 4, 6, 3),
          "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}


def resnet(
    depth: str, num_classes: int, image_size: int, *, mean: Sequence[float],
    stddev: Sequence[float], width: int = 64, l2: float = 0.0,
) -> keras.Model:
    """Returns a ResNet v1.5 for uint8 images `[batch, size, size, 3]`.

    A 7×7 convolution and a pool, both with stride 2; blocks of a 1×1, a 3×3 and a 1×1
    convolution; the mean over positions; float32 logits. Version 1.5: the 3×3
    convolution of a block has its stride, not the first 1×1. The last normalisation of
    a block begins with gain 0, so that at first the block passes on what it gets.

    Args:
        depth: a name in `BLOCKS`.
        num_classes: how many logits.
        image_size: height and width in pixels.
        mean: of each colour, 0 to 255.
        stddev: of each colour.
        width: filters of the first convolution.
        l2: factor of kernels that is added to their gradient.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385; Goyal et al. 2017, section
    5.1, https://arxiv.org/abs/1706.02677 (stride, gain 0)
    """

    def convolve(x, filters, size, strides=1, gain="ones"):
        if strides > 1:  # "same" would not centre kernels on the shortcut's pixels
            x = layers.ZeroPadding2D(size // 2)(x)
        x = layers.Conv2D(
            filters, size, strides, "valid" if strides > 1 else "same", use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_in", "untruncated_normal"), **penalty)(x)
        return layers.BatchNormalization(
            momentum=0.9, epsilon=1e-5, gamma_initializer=gain)(x)

    penalty = {"kernel_regularizer": keras.regularizers.L2(l2 / 2)} if l2 else {}
    inputs = keras.Input((image_size, image_size, 3), dtype="uint8")
    scale = [1 / each for each in stddev]
    offset = [-middle / each for middle, each in zip(mean, stddev, strict=True)]
    x = layers.Rescaling(scale, offset, dtype="float32")(inputs)
    x = layers.ReLU()(convolve(x, width, 7, 2))
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for number, blocks in enumerate(BLOCKS[depth]):
        filters = width * 2**number
        for block in range(blocks):
            strides = 2 if number and block == 0 else 1
            y = layers.ReLU()(convolve(x, filters, 1))
            y = layers.ReLU()(convolve(y, filters, 3, strides))
            y = convolve(y, 4 * filters, 1, gain="zeros")
            if block == 0:
                x = convolve(x, 4 * filters, 1, strides)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(
        num_classes, kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        dtype="float32", **penalty)(x)
    return keras.Model(inputs, x)
