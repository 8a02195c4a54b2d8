"""Sets that TensorFlow Datasets has prepared: a folder `<name>/<version>` each.

It holds dataset_info.json, features.json and `<name>-<split>.tfrecord-…` files, and is
read by tensorflow-datasets, an optional extra; nothing is downloaded.
Source: https://www.tensorflow.org/datasets/external_tfrecord
"""

import json
import os

import numpy as np
import tensorflow as tf

import mpl

_INFO = "dataset_info.json"
_DEEPEST = 3  # <name>/<config>/<version>
_REMEDY = "Copy the folder again, or prepare it anew by tfds.load."


def find(folder: str, *names: str) -> str | None:
    """Returns the folder of a set: `folder` itself, or the one below it.

    Args:
        folder: `data_dir`.
        names: of sets that will do, as TensorFlow Datasets has them.

    Returns:
        The path; None: there is none.

    Raises:
        ConfigError: there are several, or a description is damaged.
    """
    files = [file for depth in range(_DEEPEST + 1) for file in sorted(
        tf.io.gfile.glob(os.path.join(folder, *["*"] * depth, _INFO)))]
    found = [os.path.dirname(file) for file in files if _name(file) in names]
    if len(found) > 1:
        raise mpl.ConfigError(
            f"`data_dir` ({folder}) holds {len(found)} sets: {', '.join(found)}.",
            f"Name one of them, as --data_dir={found[-1]}.")
    return found[0] if found else None


def load_images(
    path: str, split: str, shape: tuple[int, ...], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split of labelled images into memory, in the order of the files.

    Args:
        path: of the set, from `find`.
        split: as the set has it: "train" or "test".
        shape: that its images must have.
        num_classes: labels must be below.

    Returns:
        uint8 `[num_examples, *shape]` and int32 `[num_examples]`.

    Raises:
        ConfigError: the extra is not installed, there is no such split, a file is
            damaged or missing, or the images or labels are others.
    """
    arrays = _load(path, split)
    missing = {"image", "label"} - set(arrays)
    if missing:
        raise mpl.ConfigError(
            f"{path} has no {' and no '.join(sorted(missing))}; it has "
            f"{', '.join(sorted(arrays))}.", _REMEDY)
    image, label = arrays["image"], arrays["label"]
    if image.dtype != np.uint8 or image.shape[1:] != shape:
        raise mpl.ConfigError(
            f"{path} holds images of {image.dtype} {list(image.shape[1:])}, and must "
            f"hold images of uint8 {list(shape)}.", _REMEDY)
    wrong = np.flatnonzero((label < 0) | (label >= num_classes))
    if wrong.size:
        raise mpl.ConfigError(
            f"The split {split} of {path} has the label {label[wrong[0]]} in record "
            f"{wrong[0]}, and must have 0 to {num_classes - 1}.", _REMEDY)
    return image, label.astype(np.int32)


def _load(path: str, split: str) -> dict[str, np.ndarray]:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise mpl.ConfigError(
            f"{path} needs tensorflow-datasets, which is not installed.",
            "Install the extra: pip install -e '.[tfds]'.") from error
    try:
        builder = tfds.builder_from_directory(path)
        if split not in builder.info.splits:
            raise ValueError(f"it has the splits {', '.join(builder.info.splits)}")
        arrays = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
        count = builder.info.splits[split].num_examples
        if {len(array) for array in arrays.values()} != {count}:
            raise ValueError(f"it must have {count} examples by {_INFO}")
    except (tf.errors.OpError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise mpl.ConfigError(
            f"The split {split} of {path} cannot be read: {reason}.",
            _REMEDY) from error
    return dict(arrays)


def _name(file: str) -> str:
    try:
        with tf.io.gfile.GFile(file) as content:
            return json.load(content)["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise mpl.ConfigError(
            f"{file} is damaged: {error}.", "Copy the folder again.") from error
