"""MedMNIST: images and volumes of many fields of medicine, an .npz file a set.

They may be downloaded from https://zenodo.org/records/10519652 (CC BY 4.0, DermaMNIST
CC BY-NC 4.0). Source: Yang et al. 2023, MedMNIST v2,
https://doi.org/10.1038/s41597-022-01721-8
"""

import os

import numpy as np
import tensorflow as tf

import mpl

_NAMES = {"train": "train", "validation": "val", "test": "test"}
_REMEDY = "Get the file anew from https://zenodo.org/records/10519652."


def find(folder: str | None, name: str | None) -> str:
    """Returns the path of a set.

    Args:
        folder: `data_dir`.
        name: of the set, such as `pathmnist`; None: the only one in the folder.

    Raises:
        ConfigError: no folder, no such set, or several and no name.
    """
    if folder is None:
        raise mpl.ConfigError(
            f"`dataset` ({name}) names an .npz file of `data_dir`, which is not set.",
            "Set --data_dir, or leave --dataset out for synthetic images.")
    files = sorted(
        file for file in tf.io.gfile.listdir(folder) if file.endswith(".npz"))
    if name is None and len(files) == 1:
        return os.path.join(folder, files[0])
    if f"{name}.npz" not in files:
        raise mpl.ConfigError(
            f"`dataset` ({str(name).lower()}) must name one .npz file of `data_dir` "
            f"({folder}), which holds {', '.join(files) or 'none'}.",
            "Write for example --dataset=pathmnist for pathmnist.npz.")
    return os.path.join(folder, f"{name}.npz")


def load(path: str, split: str) -> dict[str, np.ndarray]:
    """Reads one split of a set.

    Args:
        path: of the .npz file.
        split: "train", "validation" or "test".

    Returns:
        `image`: uint8 `[num_examples, height, width, 1 or 3]`, of volumes
        `[num_examples, depth, height, width, 1]`; `label`: integers
        `[num_examples, labels]`, not checked.

    Raises:
        ConfigError: the file cannot be read, or its arrays are others.
    """
    names = [f"{_NAMES[split]}_{kind}" for kind in ("images", "labels")]
    try:
        with tf.io.gfile.GFile(path, "rb") as file, np.load(
                file, allow_pickle=False) as arrays:
            image, label = (arrays[name] for name in names)
    except Exception as error:  # NumPy, zipfile, zlib and TensorFlow have their own
        raise mpl.ConfigError(
            f"{path} must be an .npz file with {' and '.join(names)}: "
            f"{str(error).partition(chr(10))[0]}.", _REMEDY) from error
    cube = image.ndim == 4 and len(set(image.shape[1:])) == 1
    rgb = image.ndim == 4 and image.shape[-1] == 3
    if image.dtype != np.uint8 or not (image.ndim == 3 or rgb or cube):
        raise mpl.ConfigError(
            f"{path}: {names[0]} is {image.dtype} {list(image.shape)}, and must be "
            "uint8 [n, height, width], [n, height, width, 3] or [n, size, size, size].",
            _REMEDY)
    if label.dtype.kind not in "iu" or label.ndim != 2 or not label.shape[1]:
        raise mpl.ConfigError(
            f"{path}: {names[1]} is {label.dtype} {list(label.shape)}, and must be "
            "integers [n, labels].", _REMEDY)
    if not 0 < len(image) == len(label):
        raise mpl.ConfigError(
            f"{path} holds {len(image)} {names[0]} and {len(label)} {names[1]}.",
            _REMEDY)
    return {"image": image if rgb else image[..., np.newaxis], "label": label}
