"""Disks that take no more: what to do is said in two lines."""

import errno
import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

import mpl
from mpl.launch import workdir


class Line(mpl.Experiment):
    def build_data(self, split, context):
        return {"x": np.ones((8, 2), np.float32)} if split == "train" else None

    def build_model(self):
        return keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])

    def loss(self, batch, training):
        losses = self.model(batch["x"], training=training)[:, 0] ** 2
        return mpl.LossOutput(losses, batch["weight"])


SETTINGS = dict(policy="float32", global_batch_size=8, train_steps=4, mode="train",
                log_every_steps=2, checkpoint_every_steps=2)  # fmt: skip


def test_a_full_disk_is_named_and_the_same_command_goes_on(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.symlink_to("/dev/full")
    with pytest.raises(mpl.ConfigError) as error:
        mpl.run(Line, **SETTINGS, workdir=str(tmp_path))
    assert str(error.value) == (
        f"A file cannot be written: {log}; No space left on device.\nMake room there "
        "and start the same command again: it goes on from the last checkpoint.")
    log.unlink()
    mpl.run(Line, **SETTINGS, workdir=str(tmp_path))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("error, is_named", [
    (tf.errors.ResourceExhaustedError(None, None, "f; No space left on device"), True),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "f"), True),
    (tf.errors.PermissionDeniedError(None, None, "f; Read-only file system"), True),
    (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "f"), True),
    (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), False),
    (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "f"), False)])
def test_which_errors_are_named(error, is_named):
    with pytest.raises(mpl.ConfigError if is_named else type(error)) as caught:
        with workdir.naming_full_disk():
            raise error
    assert (caught.value is error) is not is_named
    assert str(error) in str(caught.value)
