"""ResNets for 32×32 images.

Source: He, Zhang, Ren and Sun 2015, Deep Residual Learning for Image Recognition,
section 4.2, https://arxiv.org/abs/1512.03385
"""

from typing import Any

import keras

layers = keras.layers


def resnet(
    depth: int, num_classes: int, *preparation: keras.layers.Layer,
    projection: bool = False, momentum: float = 0.99, **kernels: Any,
) -> keras.Model:
    """Returns a network of 6n + 2 layers with weights, for `[batch, 32, 32, 3]`.

    A convolution of 16 filters; n blocks each of 16, 32 and 64, of two convolutions,
    the first of a size with stride 2; the mean over positions; logits.

    Args:
        depth: 6n + 2.
        num_classes: how many logits.
        preparation: layers that the images pass first.
        projection: where a block has more filters than the one before, its shortcut is
            a 1×1 convolution. False: every second pixel with zeros for the new filters
            (the paper's option A, without weights).
        momentum: of the averages of batch statistics, which evaluation uses.
        kernels: arguments of all layers with a kernel, such as `kernel_initializer`.
    """

    def convolve(x, filters, strides=1):
        padding = "same"
        if strides > 1:  # "same" would not centre kernels on the shortcut's pixels
            x, padding = layers.ZeroPadding2D(1)(x), "valid"
        x = layers.Conv2D(
            filters, 3, strides, padding, use_bias=False, **kernels)(x)
        return layers.BatchNormalization(momentum=momentum)(x)

    def shortcut(x, filters):
        if projection:
            return layers.Conv2D(filters, 1, 2, use_bias=False, **kernels)(x)
        new = filters - x.shape[-1]
        sides = [(0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)]
        return keras.ops.pad(x[:, ::2, ::2], sides)

    x = inputs = keras.Input((32, 32, 3))
    for layer in preparation:
        x = layer(x)
    x = layers.ReLU()(convolve(x, 16))
    for filters in (16, 32, 64):
        for block in range((depth - 2) // 6):
            strides = 2 if filters > 16 and block == 0 else 1
            y = layers.ReLU()(convolve(x, filters, strides))
            y = convolve(y, filters)
            if strides > 1:
                x = shortcut(x, filters)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(num_classes, dtype="float32", **kernels)(x)
    return keras.Model(inputs, outputs)
