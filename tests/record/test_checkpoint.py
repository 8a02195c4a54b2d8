import json
import os
import re
import threading
import time
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

from mpl.errors import CheckpointError, ConfigError
from mpl.record import commit
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
    checkpoints.wait()
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
    checkpoints.wait()
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


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00 no text", b"no proto", None])
def test_a_damaged_or_missing_list_does_not_matter(checkpoints, step, damage):
    save_at(checkpoints, step, 9, 10)
    path = os.path.join(checkpoints.directory, "checkpoint")
    os.remove(path)
    if damage is not None:
        with open(path, "wb") as file:
            file.write(damage)
    assert checkpoints.resume() == 10 == step.numpy()
    save_at(checkpoints, step, 12)
    assert tf.train.latest_checkpoint(checkpoints.directory).endswith("ckpt-12")


@pytest.fixture
def warned(monkeypatch):
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *values: lines.append(text % values))
    return lines


INDEX, DATA, MARKER = ".index", ".data-00000-of-00001", ".commit"


def flip(path):
    """Changes a bit in the middle of a file."""
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


DAMAGES = {
    "removed": os.remove,
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, os.path.getsize(path) * 9 // 10),
    "flipped": flip,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("ending", [INDEX, DATA, MARKER])
def test_damaged_ones_are_named_and_passed_over(
    damage, ending, checkpoints, step, warned
):
    path = save_at(checkpoints, step, 10, 20, 30)
    if (ending, damage) == (MARKER, "flipped"):
        os.truncate(path + ending, 0)
        with open(path + ending, "w") as file:
            file.write('{"step": 30, "time": "no number"')
    else:
        DAMAGES[damage](path + ending)
    why = {"removed": "is missing", "flipped": "its checksum is another"}.get(
        damage, "has not the")
    if ending == MARKER:
        why = ("was not finished" if damage == "removed"
               else "ckpt-30.commit cannot be read")
    assert checkpoints.resume() == 20 == step.numpy()
    assert len(warned) == 1
    assert warned[0].startswith(f"{path} is passed over: ") and why in warned[0]
    if (ending, damage) != (MARKER, "removed"):  # which TensorFlow's never have
        with pytest.raises(CheckpointError, match="ckpt-30` cannot be read: ") as error:
            checkpoints.restore(path)
        assert why in error.value.cause


def test_if_all_are_damaged_nothing_starts_again(checkpoints, step, warned):
    for path in (save_at(checkpoints, step, 10), save_at(checkpoints, step, 20)):
        flip(path + DATA)
    step.assign(0)
    with pytest.raises(CheckpointError, match="holds checkpoints, but none of them"):
        checkpoints.resume()
    assert [re.search(r"ckpt-\d+", line)[0] for line in warned] == [
        "ckpt-20", "ckpt-10"]  # fmt: skip
    for ending in (INDEX, DATA, MARKER):
        for number in (10, 20):
            os.remove(f"{checkpoints.directory}/ckpt-{number}{ending}")
    with pytest.raises(CheckpointError, match="none of them is whole"):  # the list
        checkpoints.restore()
    with pytest.raises(CheckpointError, match="none of them is whole"):
        checkpoints.latest


@pytest.mark.parametrize("there", [[DATA], [DATA, INDEX], ["_temp/part-00000.data"]])
def test_a_first_save_cut_off_counts_as_none(there, checkpoints, step, warned):
    for ending in there:
        path = os.path.join(checkpoints.directory, f"ckpt-10{ending}")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()
    assert checkpoints.latest is None
    assert checkpoints.resume() == 0
    assert "ckpt-10 is passed over: it was not finished" in warned[0]
    save_at(checkpoints, step, 5)  # and clears what nobody needs
    assert sorted(os.listdir(checkpoints.directory)) == [
        "checkpoint", "ckpt-5.commit", "ckpt-5.data-00000-of-00001", "ckpt-5.index"]


def test_the_marker_is_written_last_and_says_what_is_there(tmp_path, monkeypatch):
    checkpoints = Checkpoints(
        tmp_path, facts={"flags": {"seed": 3}}, step=tf.Variable(3))
    seen = []
    put = commit._put
    monkeypatch.setattr(commit, "_put", lambda path, text: (
        seen.append((os.path.basename(path), sorted(os.listdir(tmp_path)))),
        put(path, text)))
    path = checkpoints.save(3)
    checkpoints.wait()
    files = ["ckpt-3.data-00000-of-00001", "ckpt-3.index"]
    assert seen == [("ckpt-3.commit", files),
                    ("checkpoint", ["ckpt-3.commit", *files])]
    with open(path + MARKER) as file:
        marker = json.load(file)
    assert marker["step"] == 3 and abs(marker["time"] - time.time()) < 60
    assert marker["flags"] == {"seed": 3}
    assert marker["versions"]["tensorflow"] == tf.__version__
    for name in files:
        data = (tmp_path / name).read_bytes()
        assert marker["files"][name] == [len(data), zlib.crc32(data)]


def test_some_steps_are_kept(tmp_path, step):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2, keep_every_steps=10, step=step)
    save_at(checkpoints, step, *range(0, 40, 5))
    names = [os.path.basename(path) for path in checkpoints.paths()]
    assert names == [f"ckpt-{n}" for n in (0, 10, 20, 30, 35)]
    with pytest.raises(ConfigError, match=r"`keep_every_steps` \(0\) must be at least"):
        Checkpoints(tmp_path, keep_every_steps=0)


@pytest.fixture
def held(monkeypatch):
    """Writes wait until it is set."""
    event, written = threading.Event(), commit.commit
    monkeypatch.setattr(
        commit, "commit", lambda *args: (event.wait(30), written(*args)))
    yield event
    event.set()


def test_a_thread_writes_what_was_there_when_save_was_called(tmp_path, monkeypatch):
    """Whatever changes the variables afterwards, in place or not."""
    begin, write = threading.Event(), tf.train.Checkpoint.write
    monkeypatch.setattr(tf.train.Checkpoint, "write", lambda *args: (
        begin.wait(30), write(*args))[1])
    values = np.arange(64, dtype=np.float32).reshape(16, 4)
    variables = {name: tf.Variable(values) for name in (
        "assigned", "added", "scattered", "adam", "in_graph", "momentum")}
    again = [tf.Variable(values), tf.Variable(values)]
    checkpoints = Checkpoints(tmp_path, **variables)
    checkpoints.save(1)
    slots = [tf.Variable(tf.zeros_like(values)) for _ in range(2)]

    @tf.function
    def in_graph(times):
        for _ in tf.range(times):
            variables["in_graph"].assign_sub(values)

    for _ in range(3):
        variables["assigned"].assign(-values)
        variables["added"].assign_add(values)
        variables["scattered"].scatter_sub(tf.IndexedSlices(values[:2], [1, 3]))
        tf.raw_ops.ResourceApplyAdam(
            var=variables["adam"].handle, m=slots[0].handle, v=slots[1].handle,
            beta1_power=0.9, beta2_power=0.99, lr=0.1, beta1=0.9, beta2=0.99,
            epsilon=1e-7, grad=values)
        tf.raw_ops.ResourceApplyMomentum(
            var=variables["momentum"].handle, accum=again[0].handle, lr=0.1,
            grad=values, momentum=0.9)
        in_graph(3)
    begin.set()
    checkpoints.restore()
    for name, variable in variables.items():
        np.testing.assert_array_equal(variable.numpy(), values, err_msg=name)


def test_one_write_at_a_time(checkpoints, step, held):
    checkpoints.save(1)
    assert not os.path.exists(f"{checkpoints.directory}/ckpt-1.commit")
    threading.Timer(0.3, held.set).start()
    start = time.monotonic()
    checkpoints.save(2)
    assert time.monotonic() - start > 0.2
    assert os.path.exists(f"{checkpoints.directory}/ckpt-1.commit")
    assert [os.path.basename(path) for path in checkpoints.paths()] == [
        "ckpt-1", "ckpt-2"]  # fmt: skip


@pytest.mark.parametrize("is_best", [False, True])
def test_what_goes_wrong_in_the_background_is_raised_once(
    is_best, checkpoints, step, monkeypatch
):
    one = checkpoints.best("accuracy") if is_best else checkpoints
    with monkeypatch.context() as patch:
        patch.setattr(commit, "commit", lambda *args: 1 / 0)
        one.save(1)
        one._writer.join()
    with pytest.raises(ZeroDivisionError):
        checkpoints.check()
    checkpoints.check()
    assert save_at(checkpoints, step, 2) == checkpoints.latest


def test_what_must_not_be_saved_is_not(tmp_path):
    def refuse():
        raise ValueError("nan")

    checkpoints = Checkpoints(tmp_path, check_values=refuse, step=tf.Variable(1))
    with pytest.raises(ValueError, match="nan"):
        checkpoints.save(1)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("when", ["the data", "the marker"])
def test_a_full_disk_leaves_the_older_ones(when, checkpoints, step, monkeypatch):
    before = save_at(checkpoints, step, 10)
    write = tf.train.Checkpoint.write

    def full(*args):
        if when == "the data":
            write(*args)
        raise tf.errors.ResourceExhaustedError(None, None, "No space left\nSource: ...")

    with monkeypatch.context() as patch:
        owner, name = (tf.train.Checkpoint, "write") if when == "the data" else (
            commit, "_put")  # fmt: skip
        patch.setattr(owner, name, full)
        checkpoints.save(20)
        with pytest.raises(CheckpointError, match="ckpt-20` cannot be written: No sp"):
            checkpoints.wait()
    assert checkpoints.paths() == [before]
    assert not [name for name in os.listdir(checkpoints.directory) if "20" in name]
    assert save_at(checkpoints, step, 30) == checkpoints.latest


def test_unknown_path(checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match="ckpt-5` cannot be read: "):
        checkpoints.restore(str(tmp_path / "ckpt-5"))


def test_unwritable_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    checkpoints = Checkpoints(file / "run", step=tf.Variable(0))
    with pytest.raises(CheckpointError, match="cannot be written") as info:
        checkpoints.save(1)
        checkpoints.wait()
    assert str(file) in info.value.cause and len(str(info.value).splitlines()) == 2
    assert file.read_text() == "kept"


def test_shape_of_another_model(tmp_path):
    Checkpoints(tmp_path, asynchronous=False, model=model_of(3)).save(5)
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
    Checkpoints(
        directory, asynchronous=False, model=model_of(), step=tf.Variable(1)).save(5)
    with pytest.raises(CheckpointError, match="net/norm/gamma is only here"):
        model = model_of(normalized=True)
        Checkpoints(directory, model=model, step=tf.Variable(1)).restore()
    with pytest.raises(CheckpointError, match=r"[: ]step is only there"):
        Checkpoints(directory, model=model_of()).restore()
    Checkpoints(wider, asynchronous=False, model=model_of(normalized=True)).save(5)
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
    Checkpoints(tmp_path, asynchronous=False, optimizer=table).save(5)
    with pytest.raises(CheckpointError, match=message):
        Checkpoints(tmp_path, optimizer=Table(**shapes)).restore()
    same = Table(**{"momentum|kernel": [3], "velocity|kernel": [3]})
    Checkpoints(tmp_path, optimizer=same).restore()
    np.testing.assert_array_equal(same.values["momentum|kernel"], np.ones(3))


def test_names_some_of_many_differences(tmp_path):
    objects = {f"v{number}": tf.Variable(0.0) for number in range(20)}
    Checkpoints(tmp_path, asynchronous=False, **objects).save(1)
    with pytest.raises(CheckpointError) as info:
        Checkpoints(tmp_path, other=tf.Variable(0.0)).restore()
    assert "21 differ: other is only here; " in info.value.cause
    assert len(re.findall("is only there", info.value.cause)) == 7


@pytest.mark.parametrize("saved, restored", [(1, 2), (2, 0)])
def test_any_number_of_replicas(tmp_path, strategy_of, saved, restored):
    with strategy_of(saved).scope():
        model, step = model_of(), tf.Variable(7)
    Checkpoints(tmp_path, asynchronous=False, model=model, step=step).save(7)
    with strategy_of(restored).scope():
        other, other_step = model_of(), tf.Variable(0)
    assert Checkpoints(tmp_path, model=other, step=other_step).resume() == 7
    assert other_step.numpy() == 7
    for old, new in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_plain_tensorflow_reads_the_weights(tmp_path):
    model, other = model_of(), model_of()
    path = Checkpoints(
        tmp_path, asynchronous=False, model=model, step=tf.Variable(3)).save(3)
    status = tf.train.Checkpoint(model=other).restore(path)
    status.assert_existing_objects_matched().expect_partial()
    for old, new in zip(model.get_weights(), other.get_weights()):
        np.testing.assert_array_equal(old, new)


def test_another_model_gives_way_to_nothing(tmp_path):
    before = Checkpoints(tmp_path, asynchronous=False, model=model_of(3))
    before.save(5)
    Checkpoints(tmp_path, asynchronous=False, model=model_of(4)).save(6)
    with pytest.raises(CheckpointError, match="ckpt-6` is of another model"):
        before.resume()


def test_a_directory_that_moved(checkpoints, step, tmp_path):
    save_at(checkpoints, step, 10, 20)
    os.rename(checkpoints.directory, tmp_path / "moved")
    moved = Checkpoints(tmp_path / "moved", max_to_keep=2, step=step)
    assert moved.resume() == 20
    save_at(moved, step, 30)
    assert [os.path.basename(path) for path in moved.paths()] == ["ckpt-20", "ckpt-30"]
