"""What a process that was killed in a save left does not hinder the next one."""

import json
import os

import pytest
import tensorflow as tf

from mpl.record.checkpoint import Checkpoints


@pytest.mark.parametrize("was_committed", [False, True])
def test_the_same_step_is_saved_beside_temporary_files(was_committed, tmp_path):
    step = tf.Variable(10)
    checkpoints = Checkpoints(tmp_path, asynchronous=False, step=step)
    if was_committed:
        checkpoints.save(10)
    temporary = tmp_path / "ckpt-10_temp"
    temporary.mkdir()
    (temporary / "part-00000-of-00001.data-00000-of-00001.tempstate7").write_text("x")
    step.assign(11)
    checkpoints.save(10)
    step.assign(0)
    assert checkpoints.resume() == 10
    assert step.numpy() == 11
    files = json.loads((tmp_path / "ckpt-10.commit").read_text())["files"]
    assert sorted(files) == ["ckpt-10.data-00000-of-00001", "ckpt-10.index"]
    assert temporary.exists() is was_committed
    for number in range(11, 16):  # deletes what is too old
        checkpoints.save(number)
    assert not [name for name in os.listdir(tmp_path) if name.startswith("ckpt-10")]
