"""Writes small files in exactly the layout of ImageNet's TFRecords."""

import numpy as np
import tensorflow as tf


def feature(value):
    if isinstance(value, bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))


def record(encoded, label):
    """Returns a record; without a label, if that is None."""
    features = {
        "image/encoded": encoded, "image/class/label": label,
        "image/class/synset": b"n01440764", "image/class/text": b"tench",
        "image/height": 60, "image/width": 80, "image/channels": 3,
        "image/colorspace": b"RGB", "image/format": b"JPEG",
        "image/filename": b"n01440764_10026.JPEG"}
    return tf.train.Example(features=tf.train.Features(feature={
        name: feature(value) for name, value in features.items() if value is not None
    })).SerializeToString()


def grey(level, height=60, width=80):
    """Returns a JPEG of one grey, which decodes to just that."""
    pixels = np.full((height, width, 3), level, np.uint8)
    return tf.io.encode_jpeg(pixels, quality=100).numpy()


def write(folder, split, files):
    """Writes lists of records to files of a split; returns their paths."""
    paths = []
    total = {"train": 1024, "validation": 128}[split]
    for number, records in enumerate(files):
        paths.append(folder / f"{split}-{number:05}-of-{total:05}")
        with tf.io.TFRecordWriter(str(paths[-1])) as writer:
            for each in records:
                writer.write(each)
    return paths


def write_greys(folder, split="train", files=2, per_file=5):
    """Writes images of which each has a level of grey, 10 times its label."""
    number = iter(range(1, 1 + files * per_file))
    return write(folder, split, [
        [record(grey(10 * label), label) for _, label in zip(range(per_file), number)]
        for _ in range(files)])
