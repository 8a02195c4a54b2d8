import os
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from mpl.errors import CheckpointError, ConfigError
from mpl.record.checkpoint import Checkpoints


def model_of(units: int = 3, normalized: bool = False) -> keras.Model:
    layers = [keras.Input([4]), keras.layers.Dense(units, name="hidden")]
    if normalized:
        layers.append(keras.layers.BatchNormalization(name="norm"))
    return keras.Sequential([*layers, keras.layers.Dense(2, name="head")], name="net")


class Table(tf.Module):
    """Puts entries into a checkpoint in its own format, as mpl's optimizer does."""

    def __init__(self, **shapes):
        super().__init__()
        self._store = tf.Variable(0.0)
        self.values = {name: np.zeros(shape) for name, shape in shapes.items()}

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        return {}

    def _serialize_to_tensors(self):
        return {name: tf.constant(value) for name, value in self.values.items()}

    def _restore_from_tensors(self, restored):
        self.values = {name: restored[name].numpy() for name in self.values}


@pytest.fixture
def step():
    return tf.Variable(0, dtype=tf.int64)


@pytest.fixture
def checkpoints(tmp_path, step):
    return Checkpoints(tmp_path / "run", max_to_keep=3, step=step)


def save_at(checkpoints, step, *numbers):
    for number in numbers:
        step.assign(number)
        path = checkpoints.save(number)
    return path


def test_nothing_saved_starts_at_zero(checkpoints):
    assert checkpoints.latest is None
    assert checkpoints.restore() is None
    assert checkpoints.resume() == 0


def test_resume_restores_the_latest_and_returns_its_step(checkpoints, step):
    path = save_at(checkpoints, step, 10, 20)
    step.assign(99)
    assert checkpoints.resume() == 20
    assert step.numpy() == 20
    assert checkpoints.latest == path == os.path.join(checkpoints.directory, "ckpt-20")
    assert tf.train.latest_checkpoint(checkpoints.directory) == path


def test_restores_by_path(checkpoints, step):
    save_at(checkpoints, step, 10, 20)
    path = os.path.join(checkpoints.directory, "ckpt-10")
    assert checkpoints.restore(path) == path
    assert step.numpy() == 10


def test_deletes_what_was_written_first(checkpoints, step):
    save_at(checkpoints, step, 1, 2, 3, 4)
    names = [os.path.basename(path) for path in checkpoints.paths()]
    assert names == ["ckpt-2", "ckpt-3", "ckpt-4"]
    assert not [name for name in os.listdir(checkpoints.directory) if "ckpt-1." in name]


def test_going_back_keeps_the_new_branch(checkpoints, step):
    save_at(checkpoints, step, 10, 20, 30)
    checkpoints.restore(os.path.join(checkpoints.directory, "ckpt-10"))
    path = save_at(checkpoints, step, 15)
    assert checkpoints.latest == path
    names = [os.path.basename(path) for path in checkpoints.paths()]
    assert names == ["ckpt-20", "ckpt-30", "ckpt-15"]


def test_the_same_step_is_written_anew(checkpoints, step):
    save_at(checkpoints, step, 10, 20)
    step.assign(7)
    checkpoints.save(10)
    assert [os.path.basename(path) for path in checkpoints.paths()] == [
        "ckpt-20",
        "ckpt-10",
    ]
    assert checkpoints.resume() == 10
    assert step.numpy() == 7


def test_needs_room_for_one(tmp_path):
    with pytest.raises(ConfigError, match=r"`max_to_keep` \(0\) must be at least 1"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_best_is_one_checkpoint_in_its_own_directory(checkpoints, step):
    save_at(checkpoints, step, 30)
    best = checkpoints.best("top/accuracy")
    save_at(best, step, 10, 20)
    assert best.directory == os.path.join(checkpoints.directory, "best", "top_accuracy")
    assert [os.path.basename(path) for path in best.paths()] == ["ckpt-20"]
    assert checkpoints.resume() == 30
    assert checkpoints.best("top/accuracy").resume() == 20


@pytest.mark.parametrize(
    "damage", [b"", b"\xff\xfe\x00 no text", b"no proto", b'model_check: "x"']
)
def test_damaged_state_file_falls_back_to_the_newest_whole(checkpoints, step, damage):
    save_at(checkpoints, step, 9, 10, 11)
    directory = checkpoints.directory
    os.remove(os.path.join(directory, "ckpt-11.data-00000-of-00001"))
    with open(os.path.join(directory, "checkpoint"), "wb") as file:
        file.write(damage)
    assert checkpoints.resume() == 10
    assert step.numpy() == 10
    # Damage is neither overwritten nor forgotten: the next save sets the list right.
    assert os.path.exists(os.path.join(directory, "ckpt-11.index"))
    save_at(checkpoints, step, 12)
    assert tf.train.latest_checkpoint(directory).endswith("ckpt-12")
    assert len(checkpoints.paths()) == 3


def test_missing_state_file_falls_back(checkpoints, step):
    save_at(checkpoints, step, 10)
    os.remove(os.path.join(checkpoints.directory, "checkpoint"))
    assert checkpoints.resume() == 10


@pytest.mark.parametrize("file", ["ckpt-20.index", "ckpt-20.data-00000-of-00001"])
def test_listed_but_incomplete_is_passed_over(checkpoints, step, file):
    save_at(checkpoints, step, 10, 20)
    os.remove(os.path.join(checkpoints.directory, file))
    assert checkpoints.resume() == 10


def test_empty_index_is_not_whole(checkpoints, step):
    save_at(checkpoints, step, 10, 20)
    open(os.path.join(checkpoints.directory, "ckpt-20.index"), "wb").close()
    assert checkpoints.resume() == 10


def test_all_shards_are_needed(checkpoints, step):
    path = save_at(checkpoints, step, 10)
    os.rename(f"{path}.data-00000-of-00001", f"{path}.data-00000-of-00002")
    with pytest.raises(CheckpointError, match="none of them is whole"):
        checkpoints.resume()


def test_never_starts_at_zero_beside_a_damaged_checkpoint(checkpoints, step):
    path = save_at(checkpoints, step, 10)
    os.remove(f"{path}.data-00000-of-00001")
    step.assign(0)
    with pytest.raises(CheckpointError, match="holds checkpoints, but none of them"):
        checkpoints.resume()
    os.remove(f"{path}.index")  # the state file alone still says that there was one
    with pytest.raises(CheckpointError, match="holds checkpoints, but none of them"):
        checkpoints.restore()


def test_a_first_save_cut_off_counts_as_none(checkpoints):
    os.makedirs(checkpoints.directory)
    name = os.path.join(checkpoints.directory, "ckpt-10.data-00000-of-00001")
    open(name, "wb").close()
    assert checkpoints.resume() == 0


def test_unknown_path(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        checkpoints.restore(str(tmp_path / "ckpt-5"))


def test_unwritable_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    checkpoints = Checkpoints(file / "run", step=tf.Variable(0))
    with pytest.raises(CheckpointError, match="cannot be written") as info:
        checkpoints.save(1)
    assert str(file) in info.value.cause and len(str(info.value).splitlines()) == 2
    assert file.read_text() == "kept"


def test_shape_of_another_model(tmp_path):
    Checkpoints(tmp_path, model=model_of(3)).save(5)
    other = model_of(4)
    before = [value.copy() for value in other.get_weights()]
    with pytest.raises(CheckpointError) as info:
        Checkpoints(tmp_path, model=other).restore()
    cause = info.value.cause
    assert "is of another model: 3 differ" in cause
    assert "net/hidden/kernel is [4, 3] there, [4, 4] here" in cause
    assert "net/hidden/bias is [3] there, [4] here" in cause
    for old, new in zip(before, other.get_weights()):
        np.testing.assert_array_equal(old, new)  # refused before anything is read


def test_missing_and_unknown_variables(tmp_path):
    directory, wider = tmp_path / "small", tmp_path / "large"
    Checkpoints(directory, model=model_of(), step=tf.Variable(1)).save(5)
    with pytest.raises(CheckpointError, match="net/norm/gamma is only here"):
        model = model_of(normalized=True)
        Checkpoints(directory, model=model, step=tf.Variable(1)).restore()
    with pytest.raises(CheckpointError, match=r"[: ]step is only there"):
        Checkpoints(directory, model=model_of()).restore()
    Checkpoints(wider, model=model_of(normalized=True)).save(5)
    with pytest.raises(CheckpointError, match=r"model/\S+/gamma is only there"):
        Checkpoints(wider, model=model_of()).restore()


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"momentum|kernel": [3]}, r"optimizer/velocity\|kernel is only there"),
        (
            {"momentum|kernel": [3], "velocity|kernel": [3], "average|kernel": [3]},
            r"optimizer/average\|kernel is only here",
        ),
        (
            {"momentum|kernel": [2], "velocity|kernel": [3]},
            r"optimizer/momentum\|kernel is \[3\] there, \[2\] here",
        ),
    ],
)
def test_entries_in_an_objects_own_format(tmp_path, shapes, message):
    table = Table(**{"momentum|kernel": [3], "velocity|kernel": [3]})
    table.values["momentum|kernel"] += 1
    Checkpoints(tmp_path, optimizer=table).save(5)
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, optimizer=Table(**shapes)).restore()
    same = Table(**{"momentum|kernel": [3], "velocity|kernel": [3]})
    Checkpoints(tmp_path, optimizer=same).restore()
    np.testing.assert_array_equal(same.values["momentum|kernel"], np.ones(3))


def test_names_some_of_many_differences(tmp_path):
    objects = {f"v{number}": tf.Variable(0.0) for number in range(20)}
    Checkpoints(tmp_path, **objects).save(1)
    with pytest.raises(CheckpointError) as info:
        Checkpoints(tmp_path, other=tf.Variable(0.0)).restore()
    assert "21 differ: other is only here; " in info.value.cause
    assert len(re.findall("is only there", info.value.cause)) == 7


@pytest.mark.parametrize("saved, restored", [(1, 2), (2, 0)])
def test_any_number_of_replicas(tmp_path, strategy_of, saved, restored):
    with strategy_of(saved).scope():
        model, step = model_of(), tf.Variable(7)
    Checkpoints(tmp_path, model=model, step=step).save(7)
    with strategy_of(restored).scope():
        other, other_step = model_of(), tf.Variable(0)
    assert Checkpoints(tmp_path, model=other, step=other_step).resume() == 7
    assert other_step.numpy() == 7
    for old, new in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_plain_tensorflow_reads_the_weights(tmp_path):
    model, other = model_of(), model_of()
    path = Checkpoints(tmp_path, model=model, step=tf.Variable(3)).save(3)
    status = tf.train.Checkpoint(model=other).restore(path)
    status.assert_existing_objects_matched().expect_partial()
    for old, new in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("ending", [".index", ".data-00000-of-00001"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_cut_off_files_are_an_error(checkpoints, step, ending, kept):
    file = save_at(checkpoints, step, 10) + ending
    os.truncate(file, int(kept * os.path.getsize(file)))
    with pytest.raises(CheckpointError, match="cannot be read|none of them is whole"):
        checkpoints.restore()


def test_a_damaged_latest_gives_way_to_the_one_before(checkpoints, step, monkeypatch):
    save_at(checkpoints, step, 10, 20, 30)
    for number in (20, 30):
        data = f"{checkpoints.directory}/ckpt-{number}.data-00000-of-00001"
        os.truncate(data, 0)
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: lines.append(text % values)
    )
    assert checkpoints.resume() == 10 and step.numpy() == 10
    assert ["ckpt-30` cannot be" in lines[0], "ckpt-20` cannot be" in lines[1]] == [
        True, True,
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match="ckpt-30` cannot be read"):
        checkpoints.restore(os.path.join(checkpoints.directory, "ckpt-30"))
    os.truncate(f"{checkpoints.directory}/ckpt-10.data-00000-of-00001", 0)
    with pytest.raises(CheckpointError, match="ckpt-10` cannot be read"):
        checkpoints.resume()


def test_another_model_gives_way_to_nothing(tmp_path):
    before = Checkpoints(tmp_path, model=model_of(3))
    before.save(5)
    Checkpoints(tmp_path, model=model_of(4)).save(6)
    with pytest.raises(CheckpointError, match="ckpt-6` is of another model"):
        before.resume()


def test_changed_bytes_are_an_error(tmp_path):
    checkpoints = Checkpoints(tmp_path, big=tf.Variable(np.ones(1000, np.float32)))
    name = f"{checkpoints.save(1)}.data-00000-of-00001"
    with open(name, "r+b") as file:
        file.seek(2000)
        file.write(b"?")
    with pytest.raises(CheckpointError, match="cannot be read: .*hecksum"):
        checkpoints.restore()


def test_a_directory_that_moved(checkpoints, step, tmp_path):
    save_at(checkpoints, step, 10, 20)
    os.rename(checkpoints.directory, tmp_path / "moved")
    moved = Checkpoints(tmp_path / "moved", max_to_keep=2, step=step)
    assert moved.resume() == 20
    save_at(moved, step, 30)
    assert [os.path.basename(path) for path in moved.paths()] == ["ckpt-20", "ckpt-30"]
