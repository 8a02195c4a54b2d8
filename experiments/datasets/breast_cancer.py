"""Breast cancer Wisconsin (diagnostic): 569 tumours, 30 measurements each.

Carried by scikit-learn, an optional extra. Source: Wolberg, Mangasarian, Street and
Street 1995, https://doi.org/10.24432/C5DW2B (CC BY 4.0)
"""

import math

import numpy as np
import tensorflow as tf

import mpl

NUM_FEATURES = 30
SPLITS = {"train": (0, 341), "validation": (341, 455), "test": (455, 569)}
_SPLIT_SEED = 0


def load(split: str) -> dict[str, np.ndarray]:
    """Reads one split, drawn at random from all tumours.

    Args:
        split: "train" (341 tumours), "validation" or "test" (114 each).

    Returns:
        `features`: float32 `[num_examples, 30]`, as measured; `label`: int32
        `[num_examples, 1]`, 1 for malignant.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError as error:
        raise mpl.ConfigError(
            "`dataset` (breast_cancer) needs scikit-learn, which is not installed.",
            "Install the extra: pip install -e '.[medical]'.") from error
    features, target = load_breast_cancer(return_X_y=True)
    # RandomState, because NumPy promises that its numbers never change.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(target))
    part = order[slice(*SPLITS[split])]
    label = 1 - target[part, np.newaxis]  # there 0 is malignant
    return {"features": features[part].astype(np.float32),
            "label": label.astype(np.int32)}


def read_features(path: str) -> dict[str, np.ndarray]:
    """Reads measurements to predict, 30 numbers with commas between them a line.

    Returns:
        `features`: float32 `[num_lines, 30]`.

    Raises:
        ConfigError: a line holds something else.
    """
    with tf.io.gfile.GFile(path, "rb") as file:
        lines = file.read().decode("latin-1").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = [float(text) for text in line.split(",")]
        except ValueError:
            row = []
        if len(row) != NUM_FEATURES or not all(map(math.isfinite, row)):
            raise mpl.ConfigError(
                f"{path}: line {number} must hold {NUM_FEATURES} numbers, and is "
                f"{line[:80]!r}.",
                "Write the measurements of a tumour in each line, with commas, without "
                "a header.")
        rows.append(row)
    return {"features": np.array(rows, np.float32).reshape([-1, NUM_FEATURES])}
