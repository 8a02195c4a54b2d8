"""Handwritten digits: 1,797 real images of 8 x 8, in digits.npz beside this file.

The test part of the UCI "Optical Recognition of Handwritten Digits" set, as carried by
scikit-learn; source, citation and licence (CC BY 4.0) in README.md. Training,
validation and test images are drawn at random from all writers.
"""

import pathlib

import numpy as np

import mpl

NUM_CLASSES = 10
SPLITS = {"train": (0, 1257), "validation": (1257, 1437), "test": (1437, 1797)}
_FILE = pathlib.Path(__file__).with_name("digits.npz")
_SPLIT_SEED = 0


def load(split: str, data_dir: str | None = None) -> dict[str, np.ndarray]:
    """Reads one split, and prints which data these are if it is "train".

    Args:
        split: "train" (1,257 images), "validation" (180) or "test" (360).
        data_dir: of the run; None, for nothing is read there.

    Returns:
        `image`: uint8 `[num_examples, 8, 8, 1]`, ink from 0 to 16; `label`: int32
        `[num_examples]`, 0 to 9.

    Raises:
        ConfigError: another split, or there is a `data_dir`.
    """
    if data_dir is not None:
        raise mpl.ConfigError(
            f"`data_dir` ({data_dir}) is not read: these digits are embedded.",
            "Leave --data_dir out.")
    return _load(split, "from the UCI set")


def _load(split: str, what: str) -> dict[str, np.ndarray]:
    if split not in SPLITS:
        raise mpl.ConfigError(
            f"`split` ({split}) is not a part of digits.", f"Use one of {list(SPLITS)}."
        )
    with np.load(_FILE) as file:
        image, label = file["image"], file["label"]
    # RandomState, because NumPy promises that its numbers never change.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(label))
    part = order[slice(*SPLITS[split])]
    if split == "train":
        print(f"Data: {len(part):,} embedded digits of 8×8, {what}", flush=True)
    return {"image": image[part], "label": label[part].astype(np.int32)}


def load_enlarged(
    split: str, factor: int, border: int = 0, channels: int = 1
) -> dict[str, np.ndarray]:
    """Reads one split as larger images, in place of other data, and says so.

    Args:
        split: as of `load`.
        factor: how many pixels wide and high each pixel becomes.
        border: how many empty pixels surround the digit.
        channels: how many equal channels there are.

    Returns:
        `image`: uint8 `[num_examples, size, size, channels]`, ink from 0 to 255, where
        `size` is 8 × factor + 2 × border; `label`: as of `load`.
    """
    size = 8 * factor + 2 * border
    examples = _load(split, f"enlarged to {size}×{size}, for want of --data_dir")
    image = np.round(examples["image"] * (255 / 16)).astype(np.uint8)
    image = image.repeat(factor, 1).repeat(factor, 2).repeat(channels, 3)
    sides = (border, border)
    image = np.pad(image, [(0, 0), sides, sides, (0, 0)])
    return {"image": image, "label": examples["label"]}
