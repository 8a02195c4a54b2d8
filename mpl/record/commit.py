"""What makes a checkpoint count: a marker that is written last, and is true.

`ckpt-<step>.commit` is JSON: `step`, `time` (seconds since 1970), `files`: name to
`[bytes, CRC-32]`, and what the run adds. Whatever has none was never finished.
"""

import json
import math
import os
import re
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

_NAME = re.compile(
    r"(ckpt-\d+)(\.index|\.data-\d{5}-of-\d{5}|\.commit|\.commit\.tmp|_temp/?)")
_LIST = "checkpoint"
_OF_TF = (".index", ".data-")
_UNFINISHED = "it was not finished"
_CHUNK_BYTES = 2**24


class Found(NamedTuple):
    """A checkpoint that a directory holds, whole or not.

    Attributes:
        order: by which the last written is the last.
        path: without the endings of its files.
        problem: why it does not count, as far as names and sizes of files tell; or "".
    """

    order: tuple[float, int]
    path: str
    problem: str


def commit(path: str, facts: Mapping[str, Any]) -> None:
    """Writes the marker of a checkpoint whose files are complete.

    Args:
        path: without the endings of the files.
        facts: what else the marker says, for readers.
    """
    directory, name = os.path.split(path)
    step = int(name.rpartition("-")[2])
    files = {file: list(_sum(os.path.join(directory, file)))
             for file in _files(directory, name) if file.startswith(_OF_TF, len(name))}
    marker = {"step": step, "time": time.time(), "files": files, **facts}
    _put(f"{path}.commit", json.dumps(marker, indent=1, default=str))


def find(directory: str) -> list[Found]:
    """Returns what checkpoints there are; those without a true marker come last."""
    if not tf.io.gfile.isdir(directory):
        return []
    names = {match[1] for match in map(_NAME.match, tf.io.gfile.listdir(directory))
             if match}  # fmt: skip
    return sorted(_look(os.path.join(directory, name)) for name in names)


def _look(path: str) -> Found:
    order, problem = (math.inf, int(path.rpartition("-")[2])), ""
    try:
        marker = _marker(path)
        for file, (size, _) in marker["files"].items():
            there = os.path.join(os.path.dirname(path), file)
            if not tf.io.gfile.exists(there):
                problem = f"{file} is missing"
            elif tf.io.gfile.stat(there).length != size:
                problem = f"{file} has not the {size} bytes it had"
        order = (float(marker["time"]), order[1])
    except tf.errors.NotFoundError:
        problem = _UNFINISHED
    except (tf.errors.OpError, ValueError, LookupError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        problem = f"{os.path.basename(path)}.commit cannot be read: {reason}"
    return Found(order, path, problem)


def damage(path: str) -> str | None:
    """Returns which file is not as it was when the checkpoint was committed, or None.

    Reads all of them. One that has no marker, as of `tf.train.Checkpoint`, is taken as
    it is.
    """
    if not tf.io.gfile.exists(f"{path}.commit"):
        return None
    if problem := _look(path).problem:
        return problem
    for file, expected in _marker(path)["files"].items():
        if list(_sum(os.path.join(os.path.dirname(path), file))) != expected:
            return f"{file} is damaged: its checksum is another"
    return None


def was_any(directory: str) -> bool:
    """Whether there was ever a checkpoint: a marker is there, or TensorFlow's list."""
    has_list = tf.io.gfile.exists(os.path.join(directory, _LIST))
    return has_list or any(tf.io.gfile.exists(f"{found.path}.commit")
                           for found in find(directory))  # fmt: skip


def tidy(directory: str, max_to_keep: int, keep_every_steps: int | None) -> None:
    """Lists what is kept for TensorFlow, and deletes what is too old or unfinished."""
    found = find(directory)
    committed = [path for order, path, _ in found if order[0] < math.inf]
    old = [path for path in committed[:-max_to_keep] if not keep_every_steps or (
        int(path.rpartition("-")[2]) % keep_every_steps)]  # fmt: skip
    kept = [os.path.basename(path) for path in committed if path not in old]
    lines = [f'model_checkpoint_path: "{kept[-1]}"\n']
    lines += [f'all_model_checkpoint_paths: "{name}"\n' for name in kept]
    _put(os.path.join(directory, _LIST), "".join(lines))
    for path in old:
        tf.io.gfile.remove(f"{path}.commit")  # first, so that it is not half of one
    for path in [*old, *(path for _, path, why in found if why == _UNFINISHED)]:
        remove_files(path)


def remove_files(path: str) -> None:
    """Deletes the files of a checkpoint, unless it has a marker."""
    directory, name = os.path.split(path)
    for file in [] if tf.io.gfile.exists(f"{path}.commit") else _files(directory, name):
        there = os.path.join(directory, file)
        (tf.io.gfile.rmtree if tf.io.gfile.isdir(there) else tf.io.gfile.remove)(there)


def _files(directory: str, name: str) -> list[str]:
    matches = map(_NAME.fullmatch, tf.io.gfile.listdir(directory))
    return sorted(match[0] for match in matches if match and match[1] == name)


def _marker(path: str) -> dict[str, Any]:
    with tf.io.gfile.GFile(f"{path}.commit") as file:
        return json.loads(file.read())


def _put(path: str, text: str) -> None:
    """Writes a file as a whole or not at all."""
    with tf.io.gfile.GFile(f"{path}.tmp", "w") as file:
        file.write(text)
    tf.io.gfile.rename(f"{path}.tmp", path, overwrite=True)


def _sum(path: str) -> tuple[int, int]:
    """Returns a file's size and CRC-32."""
    size = crc = 0
    with tf.io.gfile.GFile(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
