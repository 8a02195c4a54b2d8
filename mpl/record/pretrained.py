"""Pretrained weights: what fits is taken, and a report says what did not."""

import os
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from mpl.errors import CheckpointError, ConfigError
from mpl.record import commit, object_graph

_SHOWN = 8  # so many names of a kind


def init_from(path: str, models: Mapping[str, Any]) -> str:
    """Gives models the weights that a checkpoint holds for them.

    Variables are matched by their place in the model, and taken where the shape is the
    same: a model with another head keeps its own head.

    Args:
        path: a checkpoint of mpl or of `tf.train.Checkpoint(model=...)`, as
            `<run>/checkpoints/ckpt-100`; a folder of them, or of a run: its newest.
        models: by the name they have in checkpoints: `model`, `model_<name>`.

    Returns:
        What matched and what did not, in lines.

    Raises:
        ConfigError: there is no checkpoint, or nothing in it fits.
        CheckpointError: it is damaged.
    """
    path = checkpoint_at(path)
    try:
        problem, match = commit.damage(path), None
        match = object_graph.match(path, tf.train.Checkpoint(**models))
        reader = tf.train.load_checkpoint(path)
        taken = [(v, reader.get_tensor(key)) for v, key in match.same
                 if isinstance(v, (tf.Variable, keras.Variable))]
    except object_graph.UNREADABLE as error:
        problem = str(error).partition("\n")[0].rstrip(".")
    if problem:
        cause = f"`init_from` ({path}) cannot be read: {problem}."
        raise CheckpointError(cause, "Give the path of a whole checkpoint.")
    assert match
    own = tuple(f"{name}/" for name in models)
    unknown = [text for text in match.unknown if text.startswith(own)]
    missing = [text for text in match.missing if not text.startswith("save_counter")]
    if not taken:
        raise ConfigError(
            f"`init_from` ({path}) holds nothing that fits this model.",
            "Give a checkpoint of the same architecture, or leave it out.")
    for variable, value in taken:
        variable.assign(tf.cast(value, variable.dtype))
    total = len(taken) + len(missing) + len(match.reshaped)
    lines = [f"Initial weights from {path}: {len(taken)} of {total} variables"]
    for what, names in (("other shape", match.reshaped), ("as initialised", missing),
                        ("left out", unknown)):
        more = [f"and {len(names) - _SHOWN} more"] * (len(names) > _SHOWN)
        lines += [f"  {what}: {'; '.join(names[:_SHOWN] + more)}"] * bool(names)
    return "\n".join(lines)


def checkpoint_at(path: str) -> str:
    """Returns the checkpoint that a path names, or the newest in a folder.

    Raises:
        ConfigError: there is none.
    """
    if tf.io.gfile.exists(f"{path}.index"):
        return path
    for folder in (path, os.path.join(path, "checkpoints")):
        whole = [found.path for found in commit.find(folder) if not found.problem]
        if newest := whole[-1] if whole else tf.train.latest_checkpoint(folder):
            return newest
    raise ConfigError(
        f"`init_from` ({path}) must be a checkpoint, or a folder that holds one.",
        "Name it without the endings of its files: <run>/checkpoints/ckpt-100.")
