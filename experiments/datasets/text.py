"""Text in UTF-8 files `*.txt` of one folder, and windows of text for language models.

Where there is a `train*.txt`, such files are the training text, `validation*.txt` and
`test*.txt` the others. Else each file gives its last twentieth to test, the one before
to validation, and the rest to training.
"""

import os

import numpy as np
import tensorflow as tf

import mpl

SPLITS = {"train": (0, 18), "validation": (18, 19), "test": (19, 20)}  # twentieths
_BETWEEN = "\n\n\n"  # texts


def load(split: str, data_dir: str) -> str | None:
    """Reads one split.

    Args:
        split: "train", "validation" or "test".
        data_dir: the folder.

    Returns:
        The text; None: there is none of this split.

    Raises:
        ConfigError: another split, a folder without such files or training text, or a
            file that is no UTF-8 text.
    """
    if split not in SPLITS:
        raise mpl.ConfigError(
            f"`split` ({split}) is not a part of a text.", f"Use one of {list(SPLITS)}."
        )
    names = sorted(n for n in tf.io.gfile.listdir(data_dir) if n.endswith(".txt"))
    if not names:
        raise mpl.ConfigError(
            f"`data_dir` ({data_dir}) holds no .txt file.",
            "Put UTF-8 text there, or leave --data_dir out for Python's documentation.")
    if any(name.startswith("train") for name in names):
        own = [name for name in names if name.startswith(split)]
        texts = [read(os.path.join(data_dir, name)) for name in own]
    else:
        texts = [read(os.path.join(data_dir, name)) for name in names]
        texts = [text[slice(*(len(text) * part // 20 for part in SPLITS[split]))]
                 for text in texts]
    whole = joined(texts)
    if split == "train" and not whole:
        raise mpl.ConfigError(
            f"`data_dir` ({data_dir}) holds no training text: its files are empty.",
            "Put UTF-8 text there.")
    return whole or None


def joined(texts: list[str]) -> str:
    """Returns the texts as one, with empty lines between them."""
    return _BETWEEN.join(text.strip("\n") for text in texts)


def read(path: str) -> str:
    """Reads a file, with or without a byte order mark, which is left out.

    Raises:
        ConfigError: it cannot be read, is no UTF-8, or holds a zero byte.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            content = file.read()
        text = content.decode().removeprefix("\ufeff")
    except tf.errors.OpError as error:
        raise mpl.ConfigError(
            f"File {path} cannot be read: {error.message}.", "Correct the path."
        ) from error
    except UnicodeDecodeError as error:
        raise mpl.ConfigError(
            f"File {path} is no UTF-8: byte {error.start} "
            f"({content[error.start]:#04x}): {error.reason}.",
            "Copy it again if it is cut off; else convert it, as with iconv -t UTF-8.",
        ) from error
    if (place := content.find(b"\0")) >= 0:
        raise mpl.ConfigError(
            f"File {path} is no text: byte {place} is 0.",
            "Repair it, or leave it out.")
    return text


def windows(text: str, length: int) -> np.ndarray:
    """Returns a text's bytes in rows, each byte after the first of a row once.

    Returns:
        uint8 `[rows, length + 1]`. A row begins with the last byte of the one before,
        the first with a line's end; zeros fill up the last.
    """
    given = np.frombuffer(b"\n" + text.encode(), np.uint8)
    rows = -(-(len(given) - 1) // length)
    filled = np.zeros(rows * length + 1, np.uint8)
    filled[: len(given)] = given
    return np.lib.stride_tricks.sliding_window_view(filled, length + 1)[::length]


def crops(text: str, length: int) -> mpl.ArraySource:
    """Returns windows of a text that begin somewhere else in each epoch.

    An epoch has one for every `length` bytes: `text`, uint8 `[length + 1]`.

    Raises:
        ConfigError: the text is too short.
    """
    given = np.frombuffer(text.encode(), np.uint8)
    count = len(given) // length - 1  # each can move on by up to length - 1
    if count < 1:
        raise mpl.ConfigError(
            f"The training text has {len(given)} bytes, less than two windows of "
            f"{length}.", "Give more text, or shorter windows: --length.")
    with tf.device("CPU:0"):  # where tf.data reads it
        given = tf.constant(given)

    def moved(batch: dict[str, tf.Tensor], seed: tf.Tensor) -> dict[str, tf.Tensor]:
        start = batch["start"] + tf.random.stateless_uniform(
            tf.shape(batch["start"]), seed, 0, length, tf.int32)
        return {"text": tf.gather(given, start[:, tf.newaxis] + tf.range(length + 1))}

    return mpl.ArraySource({"start": np.arange(count, dtype=np.int32) * length}, moved)
