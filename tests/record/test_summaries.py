import importlib.util
import sys

import pytest
import tensorflow as tf
from absl import logging

from mpl.record.summaries import Summaries


def scalars_in(directory):
    """Returns {(tag, step): value} of all event files in a directory."""
    found = {}
    for path in sorted(directory.glob("events*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    return found


def test_writes_a_folder_for_each_split(tmp_path):
    pytest.importorskip("tensorboard")
    summaries = Summaries(tmp_path)
    summaries.start(0, 20)
    summaries.train(10, {"loss": 0.5, "loss_scale": 2.0}, 4.0)
    summaries.evaluation(10, "validation", {"loss": 0.75})
    train = {("loss", 10): 0.5, ("loss_scale", 10): 2.0, ("steps_per_sec", 10): 4.0}
    assert scalars_in(tmp_path / "train") == train  # before finish: nothing waits
    assert scalars_in(tmp_path / "validation") == {("loss", 10): 0.75}
    summaries.train(20, {"loss": float("nan")}, None)
    summaries.finish(20)
    assert len(scalars_in(tmp_path / "train")) == 4


def test_without_tensorboard_says_so_once(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "warning", messages.append)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    summaries = Summaries(tmp_path)
    summaries.start(0, 20)
    summaries.train(10, {"loss": 0.5}, 4.0)
    summaries.evaluation(10, "test", {"loss": 0.75})
    summaries.finish(10)
    assert messages == ["No summaries: they need `pip install tensorboard`."]
    assert not list(tmp_path.iterdir())
