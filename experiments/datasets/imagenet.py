"""ImageNet's images in TFRecords, decoded and cropped in one step.

    train-%05d-of-01024, validation-%05d-of-00128

Of a record's features `image/encoded`, a JPEG, and `image/class/label` are read. The
label in the files is 1 ... 1000; here it is 0 ... 999, one less.

To get them: ask for access at https://image-net.org, download ILSVRC2012, and write
records with build_imagenet_data.py,
https://github.com/tensorflow/models/tree/archive/research/inception
"""

import os
from typing import Any

import numpy as np
import tensorflow as tf

import mpl
from experiments.datasets import tfrecords

NUM_CLASSES = 1000
# Of the colours of training images, 0 to 255.
MEAN, STDDEV = (123.68, 116.78, 103.94), (58.39, 57.12, 57.38)
_SHUFFLED = 64  # records of each stream, encoded: some 7 MB
_MARGIN = 32  # pixels around the middle of an image that evaluation leaves out


class Images(mpl.FileSource):
    """`image`, uint8 `[size, size, 3]`, and `label`, int32, 0 to 999.

    Args:
        files: paths.
        size: of the images, in pixels.
        training: whether an image is a random part of its picture, 8 to 100 % of the
            area and 3:4 to 4:3 in shape, half of them mirrored, drawn anew in each
            epoch; else it is the middle.
        max_bad_records: as of `mpl.FileSource`; above 0 all images are decoded first.

    Raises:
        ConfigError: a file ends inside a record; as of `mpl.FileSource`.

    Source: Szegedy et al. 2014, section 6, https://arxiv.org/abs/1409.4842
    """

    def __init__(
        self, files: list[str], size: int, *, training: bool, max_bad_records: int = 0
    ):
        def image(record: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, Any]:
            encoded = record["encoded"]
            part = random_part(encoded, size, seed) if training else middle(
                encoded, size)
            return {"image": part, "label": record["label"]}

        counts = None if max_bad_records else tfrecords.counts(files)
        super().__init__(
            files, decodable if max_bad_records else records, examples_per_file=counts,
            shuffle_buffer=_SHUFFLED, max_bad_records=max_bad_records, transform=image)

    def find_fault(self, check: Any) -> None:
        """Decodes all images whole: a bad part may lie outside of those drawn."""
        if self.max_bad_records:  # what is bad has been left out
            super().find_fault(check)
        else:
            mpl.FileSource(self.files, decodable)  # reads all, to count them


def load(
    split: str, data_dir: str | None, size: int, max_bad_records: int = 0
) -> Images | None:
    """Returns the images of "train" or "validation"; of "test" there are no labels.

    Args:
        split: "train", "validation" or "test".
        data_dir: the folder with the records.
        size: of the images, in pixels.
        max_bad_records: how many damaged records are left out.

    Raises:
        ConfigError: there are no such files, or one ends inside a record.
    """
    if split == "test":
        return None
    pattern = os.path.join(data_dir or "", f"{split}-?????-of-?????")
    files = sorted(tf.io.gfile.glob(pattern)) if data_dir else []
    if not files:
        raise mpl.ConfigError(
            f"`data_dir` ({data_dir}) holds no {os.path.basename(pattern)}; ImageNet"
            " may not be part of this repository.",
            "Download ILSVRC2012 from https://image-net.org, make TFRecords of it (see "
            "experiments/datasets/imagenet.py) and set --data_dir; for speed alone "
            "--synthetic.")
    return Images(
        files, size, training=split == "train", max_bad_records=max_bad_records)


def synthetic(number: int, size: int) -> dict[str, np.ndarray]:
    """Returns random pixels and labels in the form of the data, to measure speed."""
    random = np.random.default_rng(0)
    return {"image": random.integers(0, 256, (number, size, size, 3), np.uint8),
            "label": random.integers(0, NUM_CLASSES, number, np.int32)}


def records(path: tf.Tensor) -> tf.data.Dataset:
    """Makes a dataset of a file's records: `encoded`, a JPEG, and `label`."""
    return tf.data.TFRecordDataset(path).map(_parse)


def decodable(path: tf.Tensor) -> tf.data.Dataset:
    """Makes a dataset of a file's records, of which one fails if its image does."""

    def add_pixel(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        whole = tf.concat([[0, 0], tf.io.extract_jpeg_shape(record["encoded"])[:2]], 0)
        image = tf.io.decode_and_crop_jpeg(record["encoded"], whole, channels=3)
        return {**record, "pixel": image[-1, -1]}  # what is not used is not decoded

    return records(path).map(add_pixel, tf.data.AUTOTUNE)


def _parse(record: tf.Tensor) -> dict[str, tf.Tensor]:
    parts = tf.io.parse_single_example(record, {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64)})
    label = parts["image/class/label"]
    said = tf.strings.join([
        "`image/class/label` is ", tf.strings.as_string(label),
        f", and must lie in 1 ... {NUM_CLASSES}"])
    check = tf.debugging.Assert((label >= 1) & (label <= NUM_CLASSES), [said])
    with tf.control_dependencies([check]):
        return {"encoded": parts["image/encoded"],
                "label": tf.cast(label, tf.int32) - 1}


def random_part(encoded: tf.Tensor, size: int, seed: tf.Tensor) -> tf.Tensor:
    """Returns uint8 `[size, size, 3]`: a random part of a JPEG, mirrored or not."""
    begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(encoded), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), seed,
        min_object_covered=0.0, area_range=(0.08, 1), aspect_ratio_range=(3 / 4, 4 / 3))
    image = _cropped(encoded, tf.concat([begin[:2], extent[:2]], 0), size)
    # The same seed would tell from a part's shape whether it is mirrored.
    mirror = tf.random.experimental.stateless_fold_in(seed, 1)
    return tf.image.stateless_random_flip_left_right(image, mirror)


def middle(encoded: tf.Tensor, size: int) -> tf.Tensor:
    """Returns uint8 `[size, size, 3]`: the largest square in the middle of a JPEG.

    Around it are left out as many pixels as 32 of an image resized for it.
    """
    shape = tf.io.extract_jpeg_shape(encoded)[:2]
    shorter = tf.cast(tf.reduce_min(shape), tf.float32)
    side = tf.cast(shorter * (size / (size + _MARGIN)), tf.int32)
    side = tf.fill([2], tf.maximum(side, 1))
    return _cropped(encoded, tf.concat([(shape - side) // 2, side], 0), size)


def _cropped(encoded: tf.Tensor, window: tf.Tensor, size: int) -> tf.Tensor:
    image = tf.io.decode_and_crop_jpeg(
        encoded, window, channels=3, dct_method="INTEGER_FAST")
    return tf.cast(tf.round(tf.image.resize(image, [size, size])), tf.uint8)
