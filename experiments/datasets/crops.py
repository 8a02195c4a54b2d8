"""Random crops and mirror images of whole batches."""

import tensorflow as tf


def crop_and_mirror(
    batch: dict[str, tf.Tensor], seed: tf.Tensor, *, border: int = 4,
    mirrors: bool = True, grey: int = 0,
) -> dict[str, tf.Tensor]:
    """Returns a batch with images shifted, and half of them mirrored, at random.

    An image is surrounded by `border` pixels of one grey, and a part of the old size is
    cut out: He et al. 2015, section 4.2, https://arxiv.org/abs/1512.03385.

    Args:
        batch: `image` `[batch, height, width, channels]`; what else there is stays.
        seed: `[2]`; the same one gives the same crops.
        border: in pixels.
        mirrors: whether images are mirrored, left and right, with probability 1/2.
        grey: 0 for black, to 255.
    """
    image = batch["image"]
    _, height, width, _ = image.shape
    random = tf.random.stateless_uniform([tf.shape(image)[0], 3, 1], seed)
    first_row = tf.cast(random[:, 0] * (2 * border + 1), tf.int32)
    first_column = tf.cast(random[:, 1] * (2 * border + 1), tf.int32)
    rows, columns = first_row + tf.range(height), first_column + tf.range(width)
    if mirrors:
        columns = tf.where(random[:, 2] < 0.5, columns[:, ::-1], columns)
    around = [[0, 0], [border, border], [border, border], [0, 0]]
    image = tf.pad(image, around, constant_values=tf.cast(grey, image.dtype))
    image = tf.gather(image, rows, axis=1, batch_dims=1)
    return {**batch, "image": tf.gather(image, columns, axis=2, batch_dims=1)}
