import keras
import numpy as np
import pytest
import tensorflow as tf

from mpl.errors import CheckpointError, ConfigError
from mpl.record import Checkpoints, init_from


def model_of(classes, width=4):
    return keras.Sequential([
        keras.Input([3]), keras.layers.Dense(width, name="body"),
        keras.layers.Dense(classes, name="head")], name="net")


@pytest.fixture
def pretrained(tmp_path):
    model = model_of(2)
    checkpoints = Checkpoints(
        tmp_path / "run" / "checkpoints", asynchronous=False, model=model,
        optimizer=tf.Variable([1.0]), global_step=tf.Variable(9))
    return model, checkpoints.save(9)


@pytest.mark.parametrize("place", ["path", "checkpoints", "run"])
def test_what_fits_is_taken_and_the_rest_reported(place, pretrained, tmp_path):
    source, path = pretrained
    given = {"path": path, "checkpoints": str(tmp_path / "run" / "checkpoints"),
             "run": str(tmp_path / "run")}[place]  # fmt: skip
    model = model_of(5)
    head = [value.copy() for value in model.get_layer("head").get_weights()]
    report = init_from(given, {"model": model}).splitlines()
    for old, new in zip(source.layers[0].get_weights(), model.layers[0].get_weights()):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(head, model.get_layer("head").get_weights()):
        np.testing.assert_array_equal(old, new)
    assert report[0] == f"Initial weights from {path}: 2 of 4 variables"
    assert report[1].startswith("  other shape: ") and len(report) == 2
    assert "net/head/kernel is [4, 2] there, [4, 5] here" in report[1]


def test_a_plain_checkpoint_will_do(tmp_path):
    source, model = model_of(2), model_of(2)
    path = tf.train.Checkpoint(model=source).save(str(tmp_path / "plain"))
    report = init_from(str(tmp_path), {"model": model})
    assert report == f"Initial weights from {path}: 4 of 4 variables"
    for old, new in zip(source.get_weights(), model.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_layers_that_only_one_has(pretrained):
    _, path = pretrained
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(4, name="body")])
    report = init_from(path, {"model": model})
    assert "2 of 2 variables\n  left out: " in report and "only there" in report


def test_nothing_fits(pretrained):
    with pytest.raises(ConfigError, match="holds nothing that fits this model"):
        init_from(pretrained[1], {"model": model_of(7, width=9)})
    with pytest.raises(ConfigError, match="holds nothing that fits this model"):
        init_from(pretrained[1], {"model_teacher": model_of(2)})


def test_no_checkpoint_or_a_damaged_one(pretrained, tmp_path):
    with pytest.raises(ConfigError, match=r"`init_from` \(.*none\) must be a check"):
        init_from(str(tmp_path / "none"), {"model": model_of(2)})
    with open(f"{pretrained[1]}.data-00000-of-00001", "r+b") as file:
        file.write(b"?")
    with pytest.raises(CheckpointError, match="checksum is another"):
        init_from(pretrained[1], {"model": model_of(2)})
