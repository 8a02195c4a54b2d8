"""MNIST, and sets in its layout such as Fashion-MNIST: 28×28 grey images, ten classes.

Three layouts are read, the first that a folder holds:

- the four IDX files, `train-images-idx3-ubyte` and so on, plain or as `.gz`: big-endian
  int32 magic number (2051 for images, 2049 for labels) and sizes, then bytes;
- `mnist.npz`, as Keras has it: `x_train`, `y_train`, `x_test`, `y_test`;
- `mnist` or `fashion_mnist` of TensorFlow Datasets, see tfds_folder.py.

The last twelfth of the training images, of MNIST's 60,000 the last 5,000, is the
validation split. Source: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist
"""

import gzip
import io
import math
import os
import zlib

import numpy as np
import tensorflow as tf
from absl import logging

import mpl
from experiments.datasets import digits, tfds_folder

NUM_CLASSES = 10
_SIZE = (28, 28)
_IMAGES, _LABELS = 2051, 2049  # magic numbers: 2048, bytes, + the number of dimensions
_AGAIN = "Copy or download it again."


def load(split: str, data_dir: str | None) -> dict[str, np.ndarray]:
    """Reads one split.

    Args:
        split: "train", "validation" or "test".
        data_dir: the folder with the files; None: the embedded digits, enlarged.

    Returns:
        `image`: uint8 `[num_examples, 28, 28, 1]`, white (255) on black; `label`: int32
        `[num_examples]`, 0 to 9.

    Raises:
        ConfigError: there are no such files, or one is damaged.
    """
    if data_dir is None:
        return digits.load_enlarged(split, factor=3, border=2)
    image, label = _read(data_dir, "test" if split == "test" else "train")
    if split != "test":
        held_out = max(1, len(label) // 12)
        part = slice(-held_out, None) if split == "validation" else slice(-held_out)
        image, label = image[part], label[part]
    logging.info("%s data: %d images of %s", split, len(label), data_dir)
    return {"image": image[..., np.newaxis], "label": label.astype(np.int32)}


def read_images(path: str) -> np.ndarray:
    """Reads an IDX file of images: uint8 `[num_images, 28, 28]`.

    Raises:
        ConfigError: it is damaged.
    """
    images = _read_idx(path, _IMAGES)
    _check(images.shape[1:] == _SIZE, f"{path} holds images of {images.shape[1:]}, and "
           f"must hold images of {_SIZE}.")
    return images


def _read(folder: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    prefix = {"train": "train", "test": "t10k"}[part]
    names = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    images, labels = (_find(folder, name, f"{name}.gz") for name in names)
    if images and labels:
        image, label = read_images(images), _read_idx(labels, _LABELS)
        place = labels
    elif arrays := _find(folder, "mnist.npz"):
        image, label = _read_npz(arrays, part)
        place = f"y_{part} of {arrays}"
    elif prepared := tfds_folder.find(folder, "mnist", "fashion_mnist"):
        image, label = tfds_folder.load_images(
            prepared, part, (*_SIZE, 1), NUM_CLASSES)
        return image[..., 0], label
    else:
        raise mpl.ConfigError(
            f"`data_dir` ({folder}) holds neither {names[0]} and {names[1]} (or .gz) "
            "nor mnist.npz nor a folder of TensorFlow Datasets.",
            "Put MNIST there, or leave --data_dir out for the embedded digits.")
    _check(len(image) == len(label), f"{folder} has {len(image)} images and "
           f"{len(label)} labels of {part}, and must have as many of both.")
    wrong = np.flatnonzero(label >= NUM_CLASSES)
    if wrong.size:
        record = int(wrong[0])
        raise mpl.ConfigError(
            f"{place} has the label {label[record]} in record {record}, and must have "
            f"labels of 0 to {NUM_CLASSES - 1}.",
            _AGAIN)
    return image, label


def _find(folder: str, *names: str) -> str | None:
    paths = (os.path.join(folder, name) for name in names)
    return next((path for path in paths if tf.io.gfile.exists(path)), None)


def _read_idx(path: str, magic: int) -> np.ndarray:
    """Reads an IDX file; offsets in messages are those of the uncompressed bytes."""
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    if path.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            cause = f"{path} cannot be uncompressed: {error}."
            raise mpl.ConfigError(cause, _AGAIN) from error
    found = int.from_bytes(content[:4], "big")
    _check(found == magic, f"{path} begins with {found} (byte 0), and must begin with "
           f"the magic number {magic}.")
    start = 4 + 4 * (magic - 2048)
    header = content[:start].ljust(start, b"\0")  # too short is found below
    shape = np.frombuffer(header[4:], ">u4").tolist()
    end = start + math.prod(shape)
    _check(len(content) == end, f"{path} ends at byte {len(content)}, and must end at "
           f"byte {end} by its header: {shape} bytes from byte {start} on.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_npz(path: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    with tf.io.gfile.GFile(path, "rb") as file:
        content = io.BytesIO(file.read())
    try:
        with np.load(content, allow_pickle=False) as arrays:
            image, label = arrays[f"x_{part}"], arrays[f"y_{part}"]
    except Exception as error:  # NumPy, zipfile and zlib have their own
        cause = f"x_{part} and y_{part} of {path} cannot be read: {error}."
        raise mpl.ConfigError(cause, _AGAIN) from error
    for name, array, shape in (("x", image, _SIZE), ("y", label, ())):
        _check(array.dtype == np.uint8 and array.shape[1:] == shape and array.ndim > 0,
               f"{name}_{part} of {path} is {array.dtype} {list(array.shape)}, and "
               f"must be uint8 [n{''.join(f', {size}' for size in shape)}].")
    return image, label


def _check(good: bool, cause: str) -> None:
    if not good:
        raise mpl.ConfigError(cause, _AGAIN)
