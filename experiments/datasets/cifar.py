"""CIFAR-10 and CIFAR-100 in their binary version: 32×32 colour images.

`cifar-10-batches-bin/data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`, or
`cifar-100-binary/train.bin` and `test.bin`. A record is a byte for each label (of
CIFAR-100 the coarse one of 20, then the fine one of 100) and 3,072 bytes: the red, the
green and the blue plane, row by row. The version for Python is pickled and not read.
The sets of TensorFlow Datasets are: see tfds_folder.py.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
"""

import dataclasses
import os

import numpy as np
import tensorflow as tf
from absl import logging

import mpl
from experiments.datasets import digits, tfds_folder

_IMAGE_BYTES = 3 * 32 * 32
_REMEDY = "Copy or download it again, in the binary version."


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a set lies on disk.

    Attributes:
        folder: the folder of its archive.
        train, test: the files of a split, in order.
        labels: the name of each label of a record and how many classes it has; the last
            one is to be learned.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: tuple[tuple[str, int], ...]

    @property
    def num_classes(self) -> int:
        return self.labels[-1][1]


SETS = {
    "cifar10": Layout(
        "cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",), (("label", 10),)),
    "cifar100": Layout(
        "cifar-100-binary", ("train.bin",), ("test.bin",),
        (("coarse label", 20), ("fine label", 100))),
}
# As published, in all files of a split.
NUM_IMAGES = {"train": 50_000, "test": 10_000}


def load(
    split: str, data_dir: str | None, name: str = "cifar10", holds_out: bool = True
) -> dict[str, np.ndarray] | None:
    """Reads one split.

    Args:
        split: "train", "validation" or "test".
        data_dir: the folder with the set's folder or its files; None: the embedded
            digits, enlarged.
        name: which of `SETS`.
        holds_out: whether the last tenth of the training images is the validation
            split; else there is none.

    Returns:
        `image`: uint8 `[num_examples, 32, 32, 3]`; `label`: int32 `[num_examples]`.
        None: there is no such split.

    Raises:
        ConfigError: there are no such files, one is damaged or has not as many images
            as published; CIFAR-100 or all training images are asked for without
            `data_dir`.
    """
    if data_dir is None:
        if name != "cifar10" or not holds_out:
            raise mpl.ConfigError(
                f"`dataset` ({name}) and `holdout` ({str(holds_out).lower()}) are of "
                "CIFAR, and `data_dir` is not set.",
                "Set --data_dir, or leave all three out for the embedded digits.")
        return digits.load_enlarged(split, factor=4, channels=3)
    if split == "validation" and not holds_out:
        return None
    part, layout = "test" if split == "test" else "train", SETS[name]
    paths, missing = _find(data_dir, layout, getattr(layout, part))
    if not missing:
        images, labels = zip(*(read(path, name) for path in paths))
        full = NUM_IMAGES[part] // len(paths)
        for path, found in zip(paths, map(len, labels)):
            if found != full:
                raise mpl.ConfigError(
                    f"{path} holds {found:,} images, and that file of {name} holds "
                    f"{full:,}.", _REMEDY)
        image, label = np.concatenate(images), np.concatenate(labels)
    elif prepared := tfds_folder.find(data_dir, name):
        image, label = tfds_folder.load_images(
            prepared, part, (32, 32, 3), layout.num_classes)
    else:
        raise mpl.ConfigError(
            f"`data_dir` ({data_dir}) lacks {', '.join(missing)}, in itself or in "
            f"{layout.folder}.",
            "Unpack the binary version there, or leave --data_dir out for the embedded "
            "digits.")
    if part == "train" and holds_out:
        held_out = max(1, len(label) // 10)
        kept = slice(-held_out, None) if split == "validation" else slice(-held_out)
        image, label = image[kept], label[kept]
    logging.info("%s data: %d images of %s in %s", split, len(label), name, data_dir)
    return {"image": image, "label": label}


def read(path: str, name: str = "cifar10") -> tuple[np.ndarray, np.ndarray]:
    """Reads a file: uint8 images `[n, 32, 32, 3]` and int32 labels `[n]`.

    Args:
        path: of the file.
        name: which of `SETS` it belongs to.

    Raises:
        ConfigError: its last record is cut short, or a label is out of range.
    """
    labels = SETS[name].labels
    with tf.io.gfile.GFile(path, "rb") as file:
        content = np.frombuffer(file.read(), np.uint8)
    size = len(labels) + _IMAGE_BYTES
    count, rest = divmod(len(content), size)
    if rest or not count:
        raise mpl.ConfigError(
            f"{path} ends within record {count}, {rest} bytes after byte "
            f"{count * size}; a record of {name} has {size} bytes.", _REMEDY)
    records = content.reshape(count, size)
    for column, (what, num_classes) in enumerate(labels):
        wrong = np.flatnonzero(records[:, column] >= num_classes)
        if wrong.size:
            record = int(wrong[0])
            raise mpl.ConfigError(
                f"{path} has the {what} {records[record, column]} in record {record} "
                f"(byte {record * size + column}), and must have 0 to "
                f"{num_classes - 1}.", _REMEDY)
    planes = records[:, len(labels):].reshape(count, 3, 32, 32)
    return planes.transpose(0, 2, 3, 1), records[:, len(labels) - 1].astype(np.int32)


def _find(
    data_dir: str, layout: Layout, names: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Returns the paths of files, in the set's folder or in `data_dir` itself.

    Returns:
        The paths, and the names of files that are not there.
    """
    choices = []
    for place in (os.path.join(data_dir, layout.folder), data_dir):
        paths = [os.path.join(place, name) for name in names]
        choices.append((paths, [name for name, path in zip(names, paths)
                                if not tf.io.gfile.exists(path)]))
    return min(choices, key=lambda choice: len(choice[1]))
